"""What the libraries tokenizers and transformers say of folders that are made here, to which
test_text.py holds text/tokenizer.py. `python text/record.py` writes recorded.json; it alone
needs the two (made with tokenizers 0.23.1, transformers 5.24.0).
"""
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from text.tokenizer import BOS, NAMED, SPLIT, _ranks_of_meta  # noqa: E402

HERE = Path(__file__).resolve().parent
RANKS = _ranks_of_meta(HERE.parent / "demo" / "tokenizer.model")[0]
V = len(RANKS)
RECORDED = json.loads((HERE / "recorded.json").read_text(encoding="utf-8"))
TEXTS = list(RECORDED["plain"]["ids"])                 # a new one is written there by hand

same = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
others = [b for b in range(256) if b not in same]
SPELLED = {b: chr(b) for b in same} | {b: chr(256 + n) for n, b in enumerate(others)}    # by GPT-2


def spelled(token: bytes) -> str:
    return "".join(map(SPELLED.get, token))


def token(name: str, i: int, special: bool = False, **options: bool) -> dict:
    return dict(id=i, content=name, special=special, **dict(
        single_word=False, lstrip=False, rstrip=False, normalized=not special) | options)


def specials(names: dict[int, str] = NAMED) -> list[dict]:
    spare = (f"<|reserved_special_token_{n}|>" for n in range(256))
    return [token(names.get(i) or next(spare), V + i, True) for i in range(256)]


def words(*names: str, **options: bool) -> list[dict]:
    """The special tokens, and behind them words that stay text."""
    return [*specials(), *(token(name, V + 256 + n, **options) for n, name in enumerate(names))]


def tokenizer_json(ranks: dict[bytes, int], added: list[dict], vocab: dict[str, int] = {},
                   unmade: bytes = b"", ignore_merges: bool = True, **changes: object) -> dict:
    """tokenizer.json as Hugging Face writes it, with every split of each token in two as a merge,
    but of `unmade`."""
    merges = [[spelled(t[:n]), spelled(t[n:])] for t in ranks for n in range(1, len(t))
              if t[:n] in ranks and t[n:] in ranks and t != unmade]
    split = dict(type="Split", pattern=dict(Regex=SPLIT), behavior="Isolated", invert=False)
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
    model = dict(type="BPE", dropout=None, ignore_merges=ignore_merges, merges=merges,
                 vocab={spelled(t): i for t, i in ranks.items()} | vocab)
    steps = dict(type="Sequence", pretokenizers=[split, level])
    return dict(version="1.0", added_tokens=added, normalizer=None, pre_tokenizer=steps,
                post_processor=None, decoder=level, model=model) | changes


# With b"et" the first of all merges none makes b"return" any more; nor, unlisted, b"def".
order = list(RANKS)
at = order.index(b"et")
order[256], order[at] = order[at], order[256]
UNREACHED = dict(ranks={t: i for i, t in enumerate(order)}, unmade=b"def")

RENAMED = NAMED | {0: "<｜begin▁of▁sentence｜>", 6: "<｜User｜>", 7: "<｜Assistant｜>"}
FOLDERS = {                     # what `write` is told
    "plain": dict(config=dict(bos_token_id=V)),
    "merges alone": dict(UNREACHED, ignore_merges=False),
    "merges ignored": dict(UNREACHED),
    "words": dict(added=words("Bác", "<think>", "</think>")),
    "overlapping words": dict(added=words("<think>", "eot", "<think>more")),
    "words that are normalized come last": dict(
        added=[*words("<think>more"), token("think", V + 257, normalized=False)]),
    "a word alone": dict(added=words("Bác", "think", single_word=True)),
    "a word and the blanks before it": dict(added=words("<think>", lstrip=True)),
    "a word and the blanks behind it": dict(added=words("<think>", rstrip=True)),
    "a word that is a token already": dict(added=[*words(), token("return", RANKS[b"return"])]),
    "special tokens in the vocabulary": dict(vocab={a["content"]: a["id"] for a in specials()}),
    "renamed": dict(added=specials(RENAMED), tokenizer_config=dict(
        bos_token=dict(content=RENAMED[0], __type="AddedToken"))),
    "moved": dict(added=specials({i + 100: name for i, name in NAMED.items()}),
                  config=dict(bos_token_id=V)),
    "ids of no one": dict(config=dict(bos_token_id=1)),
    "ids that disagree": dict(config=dict(bos_token_id=V + 7))}


def write(folder: Path, added: list[dict] = specials(), ranks: dict[bytes, int] = RANKS,
          tokenizer_config: dict = dict(bos_token=BOS), config: dict = {},
          **of_merges: object) -> None:
    """The files of a folder that say something of its tokens."""
    for name, content in (("tokenizer", tokenizer_json(ranks, added, **of_merges)),
                          ("tokenizer_config", tokenizer_config), ("config", config)):
        (folder / f"{name}.json").write_text(json.dumps(content))


def main() -> None:
    import tokenizers
    import transformers
    out = {}
    for name, how in FOLDERS.items():
        with tempfile.TemporaryDirectory() as t:
            write(Path(t), **how)
            theirs = tokenizers.Tokenizer.from_file(f"{t}/tokenizer.json")
            theirs.encode_special_tokens = True        # a user's text closes no turn
            ids = [theirs.encode(text, add_special_tokens=False).ids for text in TEXTS]
            write(Path(t), **how | dict(config=dict(how.get("config", {}), model_type="llama")))
            bos = transformers.AutoTokenizer.from_pretrained(t).bos_token_id
        ids = dict(zip(TEXTS, ids))
        plain = out["plain"]["ids"] if out else {}
        out[name] = dict(bos=bos, ids={x: ids[x] for x in TEXTS if ids[x] != plain.get(x)})
    (HERE / "recorded.json").write_text(json.dumps(out, ensure_ascii=False))


if __name__ == "__main__":
    main()
