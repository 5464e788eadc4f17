"""What the libraries tokenizers and transformers say of folders that are made here, to which
test_tokenizer.py holds text/tokenizer.py. `python text/record.py` writes recorded.json; it alone
needs the two (made with tokenizers 0.23.1, transformers 5.24.0).
"""
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from text.tokenizer import NAMED, SPLIT, _ranks_of_meta  # noqa: E402

HERE = Path(__file__).resolve().parent
RANKS, _ = _ranks_of_meta(HERE.parent / "demo" / "tokenizer.model")
V = len(RANKS)
TEXTS = ["", " ", "   \n\n \n\t", "def f(x):\n\treturn  x ** 2  # why?\n\n\n", "\r\n\r\n x\r",
         "I'LL don't we've ſ's", "1234567 3.14 1e-5", "naïve Führer ½ ² 日本語 العربية नमस्ते",
         "🦙👩‍👩‍👧 ꙊéÉ e\u0301", "\0\x7f\u2028\u00a0\ufeff", "        self.assertEqual(None, ...)",
         "<|begin_of_text|>x<|eot_id|>", "a" * 500, "=" * 70 + "\n",
         "hi Bác <think> </think>", "a <think>\n b", "thinking <think>ing", "return returned",
         "a <think>more</think> <|eot_id|> eot", "Bác. xBác Bácx  Bác", "<｜begin▁of▁sentence｜>x"]


def printable() -> dict[int, str]:
    """How GPT-2 spells bytes."""
    same = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    others = (b for b in range(256) if b not in same)
    return {b: chr(b) for b in same} | {b: chr(256 + n) for n, b in enumerate(others)}


def token(name: str, i: int, special: bool = False, **options: bool) -> dict:
    return dict(id=i, content=name, special=special, **dict(
        single_word=False, lstrip=False, rstrip=False, normalized=not special) | options)


def specials(names: dict[int, str] = NAMED) -> list[dict]:
    spare = (f"<|reserved_special_token_{n}|>" for n in range(256))
    return [token(names.get(i) or next(spare), V + i, True) for i in range(256)]


def tokenizer_json(ranks: dict[bytes, int], added: list[dict], vocab: dict[str, int] = {},
                   merges: list = [], **changes: object) -> dict:
    """tokenizer.json as Hugging Face writes it."""
    spell = printable()
    split = dict(type="Split", pattern=dict(Regex=SPLIT), behavior="Isolated", invert=False)
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
    return dict(
        version="1.0", truncation=None, padding=None, added_tokens=added, normalizer=None,
        pre_tokenizer=dict(type="Sequence", pretokenizers=[split, level]),
        post_processor=None, decoder=level,
        model=dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None,
                   end_of_word_suffix=None, fuse_unk=False, byte_fallback=False, ignore_merges=True,
                   vocab={"".join(map(spell.get, t)): i for t, i in ranks.items()} | vocab,
                   merges=merges)) | changes


RENAMED = NAMED | {0: "<｜begin▁of▁sentence｜>", 1: "<｜end▁of▁sentence｜>", 6: "<｜User｜>", 7: "<｜A｜>"}
BEGIN = dict(tokenizer_config=dict(bos_token="<|begin_of_text|>"))
FOLDERS = {                     # added tokens, and what else lies in the folder
    "plain": dict(added=specials(), config=dict(bos_token_id=V, eos_token_id=V + 1), **BEGIN),
    "words": dict(added=[*specials(), token("Bác", V + 256), token("<think>", V + 257),
                         token("</think>", V + 258)], **BEGIN),
    "overlapping words": dict(added=[*specials(), token("<think>", V + 256), token("eot", V + 257),
                                     token("<think>more", V + 258)], **BEGIN),
    "words that are normalized come last": dict(added=[
        *specials(), token("<think>more", V + 256), token("think", V + 257, normalized=False)],
        **BEGIN),
    "a word alone": dict(added=[*specials(), token("Bác", V + 256, single_word=True),
                                token("think", V + 257, single_word=True)], **BEGIN),
    "a word and the blanks before it": dict(
        added=[*specials(), token("<think>", V + 256, lstrip=True)], **BEGIN),
    "a word and the blanks behind it": dict(
        added=[*specials(), token("<think>", V + 256, rstrip=True)], **BEGIN),
    "a word that is a token already": dict(
        added=[*specials(), token("return", RANKS[b"return"])], **BEGIN),
    "special tokens in the vocabulary": dict(
        added=specials(), vocab={a["content"]: a["id"] for a in specials()}, **BEGIN),
    "renamed": dict(added=specials(RENAMED), tokenizer_config=dict(
        bos_token=dict(content=RENAMED[0], __type="AddedToken"))),
    "moved": dict(added=specials({i + 100: name for i, name in NAMED.items()}),
                  config=dict(bos_token_id=V, eos_token_id=V + 101), **BEGIN),
    "ids of no one": dict(added=specials(), config=dict(bos_token_id=1, eos_token_id=2), **BEGIN),
    "ids that disagree": dict(added=specials(), config=dict(bos_token_id=V + 7, eos_token_id=V + 1),
                              generation_config=dict(eos_token_id=[V + 1, V + 9]), **BEGIN)}


def write(folder: Path, added: list[dict], vocab: dict[str, int] = {}, merges: list = [],
          **files: dict) -> None:
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(RANKS, added, vocab, merges)))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def merged() -> list[list[str]]:
    """The pairs that the ranks stand for, in their order."""
    spell = printable()
    pairs = []
    for whole, rank in sorted(RANKS.items(), key=lambda item: item[1]):
        parts = [bytes([b]) for b in whole]
        while len(parts) > 2:
            near = [RANKS.get(a + b, rank) for a, b in zip(parts, parts[1:])]
            k = near.index(min(near))
            if near[k] == rank:
                break                                  # joined by nobody: a piece of its own
            parts[k:k + 2] = [parts[k] + parts[k + 1]]
        if len(parts) == 2:
            pairs.append(["".join(map(spell.get, part)) for part in parts])
    return pairs


def main() -> None:
    import tokenizers
    import transformers
    out = {}
    for name, files in FOLDERS.items():
        with tempfile.TemporaryDirectory() as t:
            folder = Path(t)
            write(folder, merges=merged(), **files)
            theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            theirs.encode_special_tokens = True        # a user's text closes no turn
            ids = [theirs.encode(text, add_special_tokens=False).ids for text in TEXTS]
            config = dict(files.get("config", {}), model_type="llama")
            (folder / "config.json").write_text(json.dumps(config))
            whole = transformers.AutoTokenizer.from_pretrained(folder)
            stop = None
            if "eos_token_id" in config | files.get("generation_config", {}):
                model = transformers.AutoConfig.from_pretrained(folder)
                how = transformers.GenerationConfig
                how = (how.from_pretrained(folder) if "generation_config" in files else
                       how.from_model_config(model))
                stop = how.eos_token_id
        out[name] = dict(bos=whole.bos_token_id, stop=stop,
                         ids=ids if name == "plain" else {
                             text: now for text, now, was in zip(TEXTS, ids, out["plain"]["ids"])
                             if now != was})
    (HERE / "recorded.json").write_text(json.dumps(out, ensure_ascii=False))


if __name__ == "__main__":
    main()
