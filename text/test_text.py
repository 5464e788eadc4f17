"""The tokenizer against what the libraries tokenizers and transformers said of folders made here,
against published vectors, and against broken files; the writer of safetensors files.

`python -m text.test_text` writes what they said to recorded.json; it alone needs the two (made with
tokenizers 0.23.1, transformers 5.24.0).
"""
import json
import math
import os
import re
import shutil
import tempfile
from pathlib import Path

import pytest

from command.flags import DEMO
from llama import ModelError, safe_open, torch
from tests.helpers import put
from text.safetensors_file import save
from text.tokenizer import BOS, NAMED, SPLIT, Tokenizer, _ranks_of_meta, stop_ids

LLAMA3 = os.environ.get("CLASP_LLAMA3")                # a folder of Meta's files
META = "tokenizer.model"
HF = "tokenizer.json"
CONFIG = "config.json"
RANKS = _ranks_of_meta(DEMO / META)[0]
V = len(RANKS)
FILE = Path(__file__).with_name("recorded.json")
RECORDED = json.loads(FILE.read_text(encoding="utf-8"))
PLAIN = RECORDED["plain"]["ids"]                       # text -> ids; a new text is added by hand


# ------------------------------------------------------------------- folders as they may be

same = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
others = [b for b in range(256) if b not in same]
SPELLED = {b: chr(b) for b in same} | {b: chr(256 + n) for n, b in enumerate(others)}    # by GPT-2


def spelled(token):
    return "".join(map(SPELLED.get, token))


def token(name, i, special=False, **options):
    return dict(id=i, content=name, special=special, **dict(
        single_word=False, lstrip=False, rstrip=False, normalized=not special) | options)


def specials(names=NAMED):
    spare = (f"<|reserved_special_token_{n}|>" for n in range(256))
    return [token(names.get(i) or next(spare), V + i, True) for i in range(256)]


def words(*names, **options):
    """The special tokens, and after them words that stay text."""
    return [*specials(), *(token(name, V + 256 + n, **options) for n, name in enumerate(names))]


def tokenizer_json(ranks, added, vocab={}, unmade=b"", ignore_merges=True):
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
                post_processor=None, decoder=level, model=model)


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
    "a word and the blanks after it": dict(added=words("<think>", rstrip=True)),
    "a word that is a token already": dict(added=[*words(), token("return", RANKS[b"return"])]),
    "added tokens in the vocabulary": dict(
        added=words("<think>"), vocab={a["content"]: a["id"] for a in words("<think>")}),
    "renamed": dict(added=specials(RENAMED), tokenizer_config=dict(
        bos_token=dict(content=RENAMED[0], __type="AddedToken"))),
    "moved": dict(added=specials({i + 100: name for i, name in NAMED.items()}),
                  config=dict(bos_token_id=V)),
    "ids of no one": dict(config=dict(bos_token_id=1)),
    "ids that disagree": dict(config=dict(bos_token_id=V + 7))}


def write(folder, added=specials(), ranks=RANKS, tokenizer_config=dict(bos_token=BOS), config={},
          **of_merges):
    """The files of a folder that say something of its tokens."""
    put(folder, {HF: tokenizer_json(ranks, added, **of_merges),
                 "tokenizer_config.json": tokenizer_config,
                 CONFIG: dict(config, model_type="llama")})


def record(folder):
    """What the libraries say of FOLDERS; of ids where they differ from those of the first."""
    import tokenizers
    import transformers
    out = {}
    for name, how in FOLDERS.items():
        write(folder, **how)
        theirs = tokenizers.Tokenizer.from_file(str(folder / HF))
        theirs.encode_special_tokens = True            # a user's text closes no turn
        ids = {text: theirs.encode(text, add_special_tokens=False).ids for text in PLAIN}
        plain = out["plain"]["ids"] if out else {}
        out[name] = dict(bos=transformers.AutoTokenizer.from_pretrained(folder).bos_token_id,
                         ids={text: of for text, of in ids.items() if of != plain.get(text)})
    FILE.write_text(json.dumps(out, ensure_ascii=False), encoding="utf-8")


# ----------------------------------------------------------------------------- what is read

def complaint(call, *args):
    """What `call` says when it refuses: a ModelError of one line."""
    with pytest.raises(ModelError) as e:
        call(*args)
    assert str(e.value) and "\n" not in str(e.value)
    return str(e.value)


@pytest.fixture
def folder(tmp_path):
    """A folder with the demo's ranks and nothing else."""
    shutil.copy(DEMO / META, tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_read_as_the_libraries_read_them(tmp_path, name):
    """Rejects another split pattern, order of merges or spelling of bytes, tokens that no merges
    reach where these alone count; words that were added and stay text, a special token that a user
    can spell, options of a word that are passed over; special tokens that are expected by their
    names or their places alone; a round trip that loses a byte."""
    write(tmp_path, **FOLDERS[name])
    tok, theirs = Tokenizer(tmp_path), RECORDED[name]
    assert tok.bos == theirs["bos"]
    for text, ids in (PLAIN | theirs["ids"]).items():
        assert tok.encode(text) == ids, text
        assert "blanks" in name or tok.decode(ids) == text
        assert len(text.encode()) / tok.longest <= len(ids)
    assert (tok.longest == math.inf) == ("blanks" in name)


def test_every_file_of_a_model_gives_the_same_tokens(folder):
    """Rejects a download of only one file; a reserved token that is named by its place among all
    256, as if the five had numbers of their own; text that closes its own turn; a traceback for a
    token that the model's padded table has and the tokenizer has not."""
    tok = Tokenizer(folder)
    assert tok.bos == V and tok.special == {a["content"]: a["id"] for a in specials()}
    assert all(max(tok.encode(f"a{name}b")) < V for name in tok.special)
    assert tok.decode([V + 256, 10 ** 9]) == ""
    (folder / "original").mkdir()
    (folder / META).rename(folder / "original" / META)
    original = Tokenizer(folder)
    write(folder, specials())
    for other in (original, Tokenizer(folder)):
        assert (other.special, other.bos) == (tok.special, tok.bos)
        assert {text: other.encode(text) for text in PLAIN} == PLAIN
        assert other.decode_bytes(range(V + 256)) == tok.decode_bytes(range(V + 256))
    write(folder, [*specials(), token("secret", V + 256, True)], vocab={"secret": V + 256})
    assert max(Tokenizer(folder).encode("secret")) < V
    write(folder, specials(RENAMED), config=dict(bos_token_id=V))
    assert Tokenizer(folder).bos == V                  # by its number alone


def test_a_changed_file_at_the_same_path_is_read_again(folder):
    """Rejects a reader that keeps files by a hash of their path, as tiktoken's own does."""
    path, a = folder / META, Tokenizer(folder).encode("a")
    path.write_bytes(path.read_bytes().replace(b"YQ==", b"?").replace(b"Yg==", b"YQ==")
                     .replace(b"?", b"Yg=="))          # a and b change places
    assert Tokenizer(folder).encode("b") == a == [RANKS[b"a"]]


def test_a_chat_is_spelled_as_the_instruct_models_were_trained(folder):
    """Rejects a missing header or end of turn, content stripped of blanks and newlines alone or
    within, a role or content that ends a turn; a chat by a tokenizer that has no tokens for it."""
    tok = Tokenizer(folder)
    ids = tok.chat([dict(role="system", content="Be brief."),
                    dict(role="user", content=" \r\n\tHi<|eot_id|>!\r\n\tYou \t\r\n ")])
    assert tok.decode(ids) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>!\r\n\tYou<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n")
    assert [i - tok.bos for i in ids if i >= tok.bos] == [0, 6, 7, 9, 6, 7, 9, 6, 7]
    write(folder, **FOLDERS["renamed"])
    assert "no <|start_header_id|>" in complaint(Tokenizer(folder).chat, [])


@pytest.mark.parametrize("generation, model, want", [
    ([3841, 3849], 3841, (3841, 3849)), (..., 3849, (3849,)), (..., [1, 2], (1, 2)), (0, 5, (0,)),
    (None, 7, (7,)), ([], 7, ()), (..., ..., ())])
def test_stop_tokens_come_from_generation_config_else_config(folder, generation, model, want):
    """Rejects an Instruct model that never stops, token 0 read as none, and an empty list, which
    says that nothing stops, read as if the file said nothing."""
    for name, ids in (("generation_config.json", generation), (CONFIG, model)):
        if ids is not ...:                             # None: the file is there and does not say
            put(folder, {name: dict(eos_token_id=ids)})
    assert stop_ids(folder) == Tokenizer(folder).stop_ids == want


@pytest.mark.skipif(not LLAMA3, reason="CLASP_LLAMA3 names no folder of Meta's files")
def test_published_vectors_conversations_and_special_tokens():
    """Rejects a tokenizer that differs from two independent ones on Meta's ranks. Those two let
    text spell special tokens, so it is cut there."""
    def read(name):
        return json.loads((Path(LLAMA3) / name).read_text(encoding="utf-8"))
    tok = Tokenizer(LLAMA3)
    assert tok.special == read("special_tokens.json")["llama3"] and tok.bos == 128000
    assert all(tok.chat(v["messages"]) == v["ids"] for v in read("chat_vectors.json"))
    special = {**tok.special, "<|eom_id|>": 128008}    # its name since 3.1
    cut = re.compile(f"({'|'.join(map(re.escape, special))})")
    vectors = read("llama_cpp_vectors.json") + read("tokenizer_js_vectors.json")
    assert len(vectors) > 50
    for v in vectors:
        ids = [[special[part]] if part in special else tok.encode(part)
               for part in cut.split(v["text"])]
        assert sum(ids, []) == v["ids"]


BYTES = {bytes([b]): b for b in range(256)}
FIVE = [token(name, 256 + i, True) for i, name in enumerate(NAMED.values())]
ALONE = tokenizer_json(BYTES, FIVE)                    # a tokenizer of bytes


def but(right, wrong):
    """ALONE, a part of it spelled otherwise."""
    assert right in json.dumps(ALONE)
    return json.dumps(ALONE).replace(right, wrong)


BROKEN = [              # files, what is said
    ({META: None}, "no tokenizer.model"),
    # Cut short between two lines it is a tokenizer in itself.
    ({CONFIG: dict(bos_token_id=V), META: b"".join(
        (DEMO / META).read_bytes().splitlines(True)[:3000])}, "cut short or another model's"),
    ({CONFIG: dict(eos_token_id="</s>")}, "eos_token_id ['</s>'] holds no token ids"),
    ({META: b"\x0a<unk>\x15\x00"}, "not a tokenizer.model of LLaMA-3"),
    ({META: "I!Q== 0\n"}, "base64 and rank"), ({META: "IQ== one\n"}, "base64 and rank"),
    ({META: "IQ== 0\n"}, "a single byte has none"),
    ({META: "IQ== 0\nIg== 2\n"}, "ranks are not 0, 1"),
    ({META: "IQ== 0\nIQ== 1\n"}, "ranks are not 0, 1"),
    ({HF: "{"}, "cannot be read"), ({HF: {}}, "not a byte-level tokenizer"),
    ({HF: ALONE | dict(pre_tokenizer=None)}, "not a byte-level tokenizer"),
    ({HF: but('"\\u0100"', '"\\u2581"')}, "not a byte-level tokenizer"),
    ({HF: but('"id": 256', '"id": "x"')}, "not a byte-level tokenizer"),
    ({HF: but('"merges": []', '"merges": [["a", "b"]]')}, "not a byte-level tokenizer"),
    ({HF: but("{1,3}", "{1,2}")}, "or split pattern"), ({HF: but('"BPE"', '"Unigram"')}, "Unigram"),
    ({HF: but("Isolated", "Removed")}, "or split pattern"),
    ({HF: but('space": false', 'space": true')}, "or split pattern"),
    ({HF: ALONE | dict(normalizer=dict(type="Lowercase"))}, "normalizer"),
    ({HF: but('"dropout": null', '"dropout": 0.1')}, "dropout"),
    ({HF: ALONE | dict(pre_tokenizer=ALONE["pre_tokenizer"]["pretokenizers"][0])},
     "or split pattern"),
    ({HF: but("<|begin_of_text|>", "<s>"), CONFIG: dict(bos_token_id=1)},
     "no <|begin_of_text|>, and neither"),
    ({HF: tokenizer_json({**BYTES, b"cd": 257, b"ab": 256}, FIVE)}, "order of merges"),
    ({HF: tokenizer_json({**BYTES, b"ab": 255}, FIVE)}, "ranks are not 0, 1"),
    ({HF: tokenizer_json({**BYTES, b"ab": "x"}, FIVE)}, "ranks are not 0, 1")]


@pytest.mark.parametrize("files, said", BROKEN)
def test_what_is_wrong_with_a_tokenizer_is_named_in_one_line(folder, tmp_path, files, said):
    """Rejects a traceback, and the tokens of another tokenizer taken for LLaMA-3's."""
    assert Tokenizer(folder).encode("ab")              # whole before it is harmed
    assert Tokenizer(put(tmp_path / "alone", {HF: ALONE})).encode("ab") == [97, 98]
    assert said in complaint(Tokenizer, put(folder, files))


def test_more_blanks_than_the_library_can_split_are_refused(folder):
    """Rejects the panic of a library, which no `except Exception` would catch."""
    tok = Tokenizer(folder)
    assert tok.decode(tok.encode("x" + " " * 990_000)) == "x" + " " * 990_000
    assert "blanks in a row" in complaint(tok.encode, "x" + "\t" * 1_100_000)


def test_tensors_that_were_written_are_read_again_by_all_who_may_read_files_here(tmp_path):
    """Rejects another dtype, order or name, a file that its owner alone may read, and matrices that
    are silently transposed."""
    tensors = {str(dtype): torch.arange(6).view(2, 3).to(dtype)
               for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int64)}
    (tmp_path / "other").touch()
    save(tensors, tmp_path / "x", {"format": "pt"})
    with safe_open(tmp_path / "x", "pt") as f:
        assert f.metadata() == {"format": "pt"} and f.keys() == sorted(tensors)
        assert all(f.get_tensor(name).equal(t) for name, t in tensors.items())
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "other").stat().st_mode
    with pytest.raises(AssertionError):
        save({"a": torch.zeros(2, 3).t()}, tmp_path / "x", {})


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as t:
        record(Path(t))
