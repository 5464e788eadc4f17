"""Text to token ids and back: byte-pair encoding with LLaMA-3's ranks, and the chat format of the
Instruct models. tiktoken does the merging; here the files of a model are read.
"""
import base64
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import tiktoken

from llama import ModelError, read_json

SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
         r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
BOS = "<|begin_of_text|>"
HEADER = "<|start_header_id|>"
END_HEADER = "<|end_header_id|>"
EOT = "<|eot_id|>"
NAMED = {0: BOS, 1: "<|end_of_text|>", 6: HEADER, 7: END_HEADER, 9: EOT}
BLANKS = 990_000             # in a row, before the library that splits text runs out of its stack
BLANK = re.compile(r"\s*")
OPTIONS = ("special", "normalized", "single_word", "lstrip", "rstrip")      # of a token added


def stop_ids(folder: str | Path) -> tuple[int, ...]:
    """The tokens that end a text: eos_token_id of generation_config.json, else of config.json.
    subtle: Instruct models end a turn with <|eot_id|>, which their config.json may not name."""
    return _token_ids(folder, "eos_token_id")


def _said(path: Path) -> dict:
    """What a file says that need not be there."""
    return read_json(path) if path.exists() else {}


def _token_ids(folder: str | Path, key: str) -> tuple[int, ...]:
    """What the first of the two files that has `key` says, an int or a list there."""
    for name in ("generation_config.json", "config.json"):
        ids = _said(Path(folder) / name).get(key)
        if ids is not None:                            # 0 is a token, and [] an answer
            ids = ids if isinstance(ids, list) else [ids]
            if not all(isinstance(i, int) for i in ids):
                raise ModelError(f"{folder}/{name}: {key} {str(ids)[:40]} holds no token ids")
            return tuple(ids)
    return ()


def has_other_template(folder: Path) -> bool:
    """Does the folder's chat template write what `Tokenizer.chat` does not, as from LLaMA-3.1 on
    the dates that begin every system turn? Judged by the texts that it holds."""
    template = str(_said(folder / "tokenizer_config.json").get("chat_template") or "")
    alone = folder / "chat_template.jinja"
    if alone.exists():
        template = alone.read_text(encoding="utf-8", errors="replace")
    texts = [a + b for a, b in re.findall(r"""'([^']*)'|"([^"]*)\"""", template)]
    texts.append(re.sub(r"\{.*?\}+", "", template, flags=re.S))     # outside of {{ }}, {% %}
    ours = "|".join(map(re.escape, (HEADER, END_HEADER, EOT, BOS)))
    rest = {re.sub(ours, "", text).replace("\\n", "").strip() for text in texts}
    return not rest <= {"", "role", "content", "assistant"}


class Tokenizer:
    """Byte-pair encoding with LLaMA-3's ranks, from Hugging Face's tokenizer.json or Meta's
    tokenizer.model.

    special   name -> id of the tokens that no text can spell
    bos       the one that begins a text
    longest   bytes of text that one token can stand for: a text of n has n / longest tokens or more
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        readers = {folder / "tokenizer.json": _ranks_of_hugging_face,
                   folder / "tokenizer.model": _ranks_of_meta,
                   folder / "original" / "tokenizer.model": _ranks_of_meta}
        path = next((p for p in readers if p.exists()), None)
        if not path:
            raise ModelError(f"{folder}: no tokenizer.json and no tokenizer.model, here or in "
                             "original/; --prompt-ids works without one")
        ranks, added, made = readers[path](path)
        if ({*ranks.values()} != {*range(len(ranks))}
                or not all(bytes([b]) in ranks for b in range(256))):
            raise ModelError(f"{path}: not LLaMA-3's tokenizer: ranks are not 0, 1, 2, ..., or a "
                             "single byte has none")
        self.special = {name: a["id"] for name, a in added.items() if a["special"]}
        self.stop_ids = stop_ids(folder)
        self.bos = _begin_of_text(folder, path, self.special)
        # Meta's file does not say where its special tokens are. One that was cut short moves them.
        said = max(_token_ids(folder, "bos_token_id"), default=0)
        if path.suffix == ".model" and said > self.bos:
            raise ModelError(f"{path}: cut short or another model's: <|begin_of_text|> is "
                             f"{self.bos} here, and {said} by the config's bos_token_id")
        self._bytes = {i: token for token, i in ranks.items()}
        self._bytes |= {a["id"]: name.encode() for name, a in added.items()}
        takes_blanks = any(a["lstrip"] or a["rstrip"] for a in added.values())     # any number
        self.longest = math.inf if takes_blanks else max(map(len, self._bytes.values()))
        self._added = added
        self._spelled = [_any_of(name for name, a in added.items() if a["normalized"] is kind)
                         for kind in (False, True)]    # what is not normalized is looked for first
        self._bpe = _bpe(ranks if made is None else _reached(ranks, made))

    def encode(self, text: str) -> list[int]:
        """Ordinary text -> ids, and words that were added to the vocabulary. No special token is
        added, and none can be written: "<|eot_id|>" in a user's text is a handful of ordinary
        tokens."""
        if len(text) > BLANKS and max(map(len, re.findall(r"\s+", text)), default=0) > BLANKS:
            raise ModelError(f"more than {BLANKS} blanks in a row: tiktoken cannot split that")
        return self._encode(text, self._spelled)

    def _encode(self, text: str, patterns: Sequence[re.Pattern]) -> list[int]:
        """Cut where a word stands that was added, by the rules of the tokenizers library: those of
        the first pattern, then, between them, those of the next."""
        if not patterns:
            return self._bpe.encode_ordinary(text)
        first, *others = patterns
        ids = []
        done = 0
        for match in first.finditer(text):
            a = self._added[match[0]]
            start, end = match.span()
            around = text[start - 1:start] + text[end:end + 1]
            if a["special"] or a["single_word"] and re.search(r"\w", around):
                continue
            before = text[done:start]
            ids += self._encode(before.rstrip() if a["lstrip"] else before, others)
            ids.append(a["id"])
            done = BLANK.match(text, end).end() if a["rstrip"] else end
        return ids + self._encode(text[done:], others)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """ids -> bytes; a token may end in the middle of a character. Special tokens come out by
        name, and what only the model knows, whose table may be padded, as nothing."""
        return b"".join(self._bytes.get(i, b"") for i in ids)

    def decode(self, ids: Sequence[int]) -> str:
        """ids -> text; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """[{"role": ..., "content": ...}, ...] -> ids up to where the assistant's answer begins, as
        the Instruct models were trained: content stripped, every turn closed by <|eot_id|>."""
        lacking = [name for name in (HEADER, END_HEADER, EOT) if name not in self.special]
        if lacking:
            raise ModelError(f"the tokenizer has no {lacking[0]}: another chat format than "
                             "LLaMA-3's; write it with --prompt-ids")
        ids = [self.bos]
        for m in [*messages, dict(role="assistant")]:
            ids += [self.special[HEADER], *self.encode(m["role"]), self.special[END_HEADER]]
            ids += self.encode("\n\n")
            if "content" in m:                         # which the answer is to be
                ids += [*self.encode(m["content"].strip()), self.special[EOT]]
        return ids


def _begin_of_text(folder: Path, path: Path, special: dict[str, int]) -> int:
    """The token that begins a text, which some models renamed: as tokenizer_config.json names it,
    else LLaMA-3's, else by its number in a config."""
    said = _said(folder / "tokenizer_config.json").get("bos_token")
    said = said.get("content") if isinstance(said, dict) else said
    for name in (said, BOS):
        if isinstance(name, str) and name in special:
            return special[name]
    for i in _token_ids(folder, "bos_token_id"):
        if i in special.values():
            return i
    raise ModelError(f"{path}: no {BOS}, and neither tokenizer_config.json's bos_token nor a "
                     "config's bos_token_id names the special token in its place")


def _any_of(names: Iterable[str]) -> re.Pattern:
    """Matches any of them, of several at one place the longest."""
    longest_first = sorted(filter(None, names), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _bpe(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    return tiktoken.Encoding("llama-3", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={})


def _reached(ranks: dict[bytes, int], made: set[bytes]) -> dict[bytes, int]:
    """The tokens that merges reach, of which `made` are listed; tiktoken uses any token that is a
    whole piece of the text. No token holds the byte 255, so a piece that ends with it is none."""
    listed = {token: i for token, i in ranks.items() if token in made or len(token) == 1}
    merge = _bpe(listed)._encode_single_piece
    end = b"\xff"
    return {token: i for token, i in listed.items()
            if token == end or merge(token + end) == [i, ranks[end]]}


# token -> rank; name -> what was added; tokens that merges make, if these alone count
Ranks = tuple[dict[bytes, int], dict[str, dict], set[bytes] | None]


def _ranks_of_meta(path: Path) -> Ranks:
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
    plain = dict.fromkeys(OPTIONS, False)
    return ranks, {NAMED.get(i) or next(spare): plain | dict(special=True, id=len(ranks) + i)
                   for i in range(256)}, None


def _ranks_of_hugging_face(path: Path) -> Ranks:
    """The vocabulary of tokenizer.json, whose strings spell bytes in GPT-2's way: a printable
    Latin-1 character is itself, the 68 others are the characters from U+0100 on. Ids are ranks: the
    order of merges. subtle: LLaMA-3 has 588 tokens that no merges reach. They are used where they
    are a whole piece of the text; but only if the file says `ignore_merges`."""
    t = read_json(path)
    printable = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b]
    byte = {chr(b): b for b in printable}
    byte |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in printable)}
    try:
        added = {a["content"]: dict.fromkeys(OPTIONS, False) | a | dict(id=int(a["id"]))
                 for a in t["added_tokens"]}
        vocab, kind, pre = t["model"]["vocab"], t["model"]["type"], t["pre_tokenizer"]
        # A word that was added may have been a token before, and goes on being one.
        ordinary = len(vocab.keys() - added.keys())
        ranks = {bytes(byte[ch] for ch in s): i for s, i in vocab.items()
                 if s not in added or not added[s]["special"] and i < ordinary}
        steps = [{k: v for k, v in step.items() if k != "trim_offsets"}         # not about ids
                 for step in pre.get("pretokenizers", [pre])]
        merges = ["".join(pair).replace(" ", "") for pair in t["model"].get("merges", [])]
        order = [vocab[token] for token in merges]
        altered = t.get("normalizer") or t["model"].get("dropout") or order != sorted(order)
        made = None
        if not t["model"].get("ignore_merges"):
            made = {bytes(map(byte.get, token)) for token in merges}
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise ModelError(f"{path}: not a byte-level tokenizer: {type(e).__name__} {e}") from None
    if kind != "BPE" or altered or steps != [
            dict(type="Split", pattern=dict(Regex=SPLIT), behavior="Isolated", invert=False),
            dict(type="ByteLevel", add_prefix_space=False, use_regex=False)]:
        raise ModelError(f"{path}: not LLaMA-3's tokenizer (model {kind}, normalizer, dropout, "
                         "order of merges or split pattern)")
    return ranks, added, made
