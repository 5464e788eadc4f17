"""Text to token ids and back: byte-pair encoding with LLaMA-3's ranks, and the chat format of the
Instruct models. tiktoken does the merging; here the files of a model are read.
"""
import base64
from collections.abc import Sequence
from pathlib import Path

import tiktoken

from llama import ModelError, read_json

SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
         r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
EOT = "<|eot_id|>"
NAMED = {0: "<|begin_of_text|>", 1: "<|end_of_text|>",
         6: "<|start_header_id|>", 7: "<|end_header_id|>", 9: EOT}


def stop_ids(folder: str | Path) -> tuple[int, ...]:
    """The tokens that end a text: eos_token_id of generation_config.json, else of config.json.
    subtle: Instruct models end a turn with <|eot_id|>, which their config.json may not name."""
    return _token_ids(folder, "eos_token_id")


def _token_ids(folder: str | Path, key: str) -> tuple[int, ...]:
    """What the first of the two files that has `key` says, an int or a list there."""
    for path in (Path(folder) / name for name in ("generation_config.json", "config.json")):
        ids = read_json(path).get(key) if path.exists() else None
        if ids is not None:                            # 0 is a token, and [] an answer
            ids = ids if isinstance(ids, list) else [ids]
            if not all(isinstance(i, int) for i in ids):
                raise ModelError(f"{path}: {key} {str(ids)[:40]} holds no token ids")
            return tuple(ids)
    return ()


class Tokenizer:
    """Byte-pair encoding with LLaMA-3's ranks, from Meta's tokenizer.model or Hugging Face's
    tokenizer.json.

    >>> tok = Tokenizer("demo")
    >>> tok.decode(tok.encode("def f(x):"))
    'def f(x):'
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        readers = {folder / "tokenizer.model": _ranks_of_meta,
                   folder / "original" / "tokenizer.model": _ranks_of_meta,
                   folder / "tokenizer.json": _ranks_of_hugging_face}
        path = next((p for p in readers if p.exists()), None)
        if not path:
            raise ModelError(f"{folder}: no tokenizer.model (here or in original/) and no "
                             "tokenizer.json; --prompt-ids works without one")
        ranks, self.special = readers[path](path)
        if ({*ranks.values()} != {*range(len(ranks))} or not {*NAMED.values()} <= {*self.special}
                or not all(bytes([b]) in ranks for b in range(256))):
            raise ModelError(f"{path}: not LLaMA-3's tokenizer: ranks are not 0, 1, 2, ..., a "
                             "single byte has none, or a special token is missing")
        self.bos, self.stop_ids = self.special["<|begin_of_text|>"], stop_ids(folder)
        # A file that was cut short moves every special token.
        if self.bos not in (_token_ids(folder, "bos_token_id") or [self.bos]):
            raise ModelError(f"{path}: cut short or another model's: <|begin_of_text|> is "
                             f"{self.bos} here, which the config's bos_token_id denies")
        self._bpe = tiktoken.Encoding("llama-3", pat_str=SPLIT, mergeable_ranks=ranks,
                                      special_tokens=self.special)

    def encode(self, text: str) -> list[int]:
        """Ordinary text -> ids. No special token is added, and none can be written: "<|eot_id|>" in
        a user's text is a handful of ordinary tokens."""
        return self._bpe.encode_ordinary(text)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """ids -> bytes; a token may end in the middle of a character. Special tokens come out by
        name."""
        try:
            return self._bpe.decode_bytes(ids)
        except KeyError:
            raise ModelError(f"the tokenizer has no token for one of {list(ids)[:8]}") from None

    def decode(self, ids: Sequence[int]) -> str:
        """ids -> text; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """[{"role": ..., "content": ...}, ...] -> ids up to where the assistant's answer begins, as
        the Instruct models were trained: content stripped, every turn closed by <|eot_id|>."""
        ids = [self.bos]
        for m in messages:
            ids += [*self._header(m["role"]), *self.encode(m["content"].strip()), self.special[EOT]]
        return [*ids, *self._header("assistant")]

    def _header(self, role: str) -> list[int]:
        return [self.special["<|start_header_id|>"], *self.encode(role),
                self.special["<|end_header_id|>"], *self.encode("\n\n")]


def _ranks_of_meta(path: Path) -> tuple[dict[bytes, int], dict[str, int]]:
    """Lines "base64(bytes) rank"; 256 special tokens follow the ranks, of which five matter and the
    rest are reserved (later versions of LLaMA-3 renamed some of those; the ids of the five never
    moved). Parsed here, since tiktoken's own reader keeps a copy under a hash of the *path* and
    would not see that a file has changed."""
    try:
        rows = (line.split() for line in path.read_bytes().splitlines())
        ranks = {base64.b64decode(t, validate=True): int(r) for t, r in rows}
    except ValueError as e:
        raise ModelError(f"{path}: not a tokenizer.model of LLaMA-3, base64 and rank per line: "
                         f"{e}") from None
    spare = (f"<|reserved_special_token_{n}|>" for n in range(256))
    return ranks, {NAMED.get(i) or next(spare): len(ranks) + i for i in range(256)}


def _ranks_of_hugging_face(path: Path) -> tuple[dict[bytes, int], dict[str, int]]:
    """The vocabulary of tokenizer.json, whose strings spell bytes in GPT-2's way: a printable
    Latin-1 character is itself, the 68 others are the characters from U+0100 on. Ids are ranks."""
    t = read_json(path)
    printable = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b]
    byte = {chr(b): b for b in printable}
    byte |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in printable)}
    try:
        special = {a["content"]: a["id"] for a in t["added_tokens"]}
        vocab, kind, pre = t["model"]["vocab"], t["model"]["type"], t["pre_tokenizer"]
        ranks = {bytes(byte[ch] for ch in s): i for s, i in vocab.items() if s not in special}
        steps = [{k: v for k, v in step.items() if k != "trim_offsets"}         # not about ids
                 for step in pre.get("pretokenizers", [pre])]
        altered = t.get("normalizer") or t["model"].get("dropout")
    except (KeyError, TypeError, AttributeError) as e:
        raise ModelError(f"{path}: not a byte-level tokenizer: {type(e).__name__} {e}") from None
    if kind != "BPE" or altered or steps != [
            dict(type="Split", pattern=dict(Regex=SPLIT), behavior="Isolated", invert=False),
            dict(type="ByteLevel", add_prefix_space=False, use_regex=False)]:
        raise ModelError(f"{path}: not LLaMA-3's tokenizer (model {kind}, normalizer, dropout or "
                         "split pattern)")
    return ranks, special
