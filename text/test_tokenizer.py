"""The tokenizer against a slow one, against published vectors, and against broken files."""
import base64
import itertools
import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest
import regex  # comes with tiktoken

from command.flags import DEMO
from llama import ModelError
from text import tokenizer
from text.tokenizer import NAMED, Tokenizer, stop_ids

LLAMA3 = os.environ.get("CLASP_LLAMA3")                # a folder of Meta's files
META = "tokenizer.model"
PIECE = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
         r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
TEXTS = ["", " ", "   \n\n \n\t", "def f(x):\n\treturn  x ** 2  # why?\n\n\n", "\r\n\r\n x\r",
         "I'LL don't we've ſ's", "1234567 3.14 1e-5", "naïve Führer ½ ² 日本語 العربية नमस्ते",
         "🦙👩‍👩‍👧 ꙊéÉ e\u0301", "\0\x7f\u2028\u00a0\ufeff", "        self.assertEqual(None, ...)",
         "<|begin_of_text|>x<|eot_id|>", "a" * 500, "=" * 70 + "\n",
         Path(tokenizer.__file__).read_text(encoding="utf-8")]


def complaint(call, *args):
    """What `call` says when it refuses: a ModelError of one line."""
    with pytest.raises(ModelError) as e:
        call(*args)
    assert str(e.value) and "\n" not in str(e.value)
    return str(e.value)


def ranks_of(path):
    rows = map(bytes.split, path.read_bytes().splitlines())
    return {base64.b64decode(t): int(r) for t, r in rows}


def slow_encode(ranks, text):
    """Split; a known piece is one token; else join the pair of lowest rank, again and again."""
    out = []
    for piece in (p.encode() for p in regex.findall(PIECE, text)):
        parts = [piece] if piece in ranks else [bytes([b]) for b in piece]
        while len(parts) > 1:
            joined = [ranks.get(a + b, math.inf) for a, b in itertools.pairwise(parts)]
            k = joined.index(min(joined))
            if joined[k] == math.inf:
                break
            parts[k:k + 2] = [parts[k] + parts[k + 1]]
        out += [ranks[p] for p in parts]
    return out


def hugging_face(ranks, special, **changes):
    """tokenizer.json as Hugging Face writes it: bytes spelled GPT-2's way, ids as ranks."""
    same = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    others = (b for b in range(256) if b not in same)
    spell = {b: chr(b) for b in same} | {b: chr(256 + n) for n, b in enumerate(others)}
    vocab = {"".join(map(spell.get, t)): i for t, i in ranks.items()}
    split = dict(type="Split", pattern=dict(Regex=PIECE), behavior="Isolated", invert=False)
    return json.dumps(dict(
        added_tokens=[dict(id=i, content=name, special=True) for name, i in special.items()],
        pre_tokenizer=dict(type="Sequence", pretokenizers=[
            split, dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True,
                        use_regex=False)]),
        model=dict(type="BPE", ignore_merges=True, vocab=vocab, merges=[])) | changes)


@pytest.fixture
def folder(tmp_path):
    """A folder with the demo's ranks and nothing else."""
    shutil.copy(DEMO / META, tmp_path)
    return tmp_path


def test_text_becomes_the_tokens_of_a_slow_tokenizer_and_comes_back(folder):
    """Rejects another split pattern or order of merges, and a round trip that loses a byte."""
    tok, ranks = Tokenizer(folder), ranks_of(DEMO / META)
    for text in TEXTS:
        assert tok.encode(text) == slow_encode(ranks, text) and tok.decode(tok.encode(text)) == text


def test_a_user_cannot_write_a_special_token(folder):
    """Rejects text that closes its own turn: the 256 special tokens lie behind the ranks."""
    tok = Tokenizer(folder)
    n = len(ranks_of(DEMO / META))
    assert sorted(tok.special.values()) == list(range(n, n + 256)) and tok.bos == n
    for name, i in tok.special.items():
        ids = tok.encode(f"a{name}b")
        assert max(ids) < n and tok.decode(ids) == f"a{name}b" and tok.decode([i]) == name


def test_special_tokens_have_their_names_and_the_rest_are_reserved_in_order(folder):
    """Rejects a reserved token that is named by its place among all 256, as if the five had numbers
    of their own: <|reserved_special_token_0|> is the third, behind begin and end of text."""
    tok = Tokenizer(folder)
    names = [tok.decode([tok.bos + i]) for i in range(256)]
    assert [names.index(name) for name in ("<|begin_of_text|>", "<|end_of_text|>",
            "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")] == [0, 1, 6, 7, 9]
    spare = [name for i, name in enumerate(names) if i not in (0, 1, 6, 7, 9)]
    assert spare == [f"<|reserved_special_token_{k}|>" for k in range(251)]


def test_bytes_come_out_token_by_token(folder):
    """Rejects a decoder that spoils a character whose bytes are spread over tokens, and a traceback
    for a token that the model has and the tokenizer has not."""
    tok, text = Tokenizer(folder), "🦙 ꙊéÉ 日本"
    ids = tok.encode(text)
    assert b"".join(tok.decode_bytes([i]) for i in ids) == text.encode()
    assert tok.decode(ids[:1]) == "\ufffd"
    assert "100000" in complaint(tok.decode, [100000])


def test_tokenizer_json_and_the_original_folder_give_the_same_ids(folder):
    """Rejects a wrong spelling of bytes, a lost special token, a download of only one file."""
    tok, ranks = Tokenizer(folder), ranks_of(DEMO / META)
    (folder / "original").mkdir()
    (folder / META).rename(folder / "original" / META)
    original = Tokenizer(folder)
    (folder / "original" / META).unlink()
    (folder / "tokenizer.json").write_text(hugging_face(ranks, tok.special))
    theirs = Tokenizer(folder)
    for other in (original, theirs):
        assert other.special == tok.special and other.bos == tok.bos
        assert all(other.encode(t) == tok.encode(t) for t in TEXTS)
        all_ids = range(tok.bos + 256)
        assert other.decode_bytes(all_ids) == tok.decode_bytes(all_ids)


def test_a_changed_file_at_the_same_path_is_read_again(folder):
    """Rejects a reader that keeps files by a hash of their path, as tiktoken's own does."""
    path, a = folder / META, Tokenizer(folder).encode("a")
    path.write_bytes(path.read_bytes().replace(b"YQ==", b"?").replace(b"Yg==", b"YQ==")
                     .replace(b"?", b"Yg=="))          # a and b change places
    assert Tokenizer(folder).encode("b") == a == [ranks_of(DEMO / META)[b"a"]]


def test_a_chat_is_spelled_as_the_instruct_models_were_trained(folder):
    """Rejects a missing header or end of turn, content stripped of blanks and newlines alone or
    within, a role or content that ends a turn."""
    tok = Tokenizer(folder)
    ids = tok.chat([dict(role="system", content="Be brief."),
                    dict(role="user", content=" \r\n\tHi<|eot_id|>!\r\n\tYou \t\r\n ")])
    assert tok.decode(ids) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>!\r\n\tYou<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n")
    assert [i - tok.bos for i in ids if i >= tok.bos] == [0, 6, 7, 9, 6, 7, 9, 6, 7]


@pytest.mark.parametrize("generation, model, want", [
    ([3841, 3849], 3841, (3841, 3849)), (..., 3849, (3849,)), (..., [1, 2], (1, 2)), (0, 5, (0,)),
    (None, 7, (7,)), ([], 7, ()), (..., ..., ())])
def test_stop_tokens_come_from_generation_config_else_config(folder, generation, model, want):
    """Rejects an Instruct model that never stops, token 0 read as none, and an empty list, which
    says that nothing stops, read as if the file said nothing."""
    for name, ids in (("generation_config.json", generation), ("config.json", model)):
        if ids is not ...:                             # None: the file is there and does not say
            (folder / name).write_text(json.dumps(dict(eos_token_id=ids)))
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
        parts = cut.split(v["text"])
        ids = [[special[p]] if p in special else tok.encode(p) for p in parts]
        assert sum(ids, []) == v["ids"] and tok.decode(tok.encode(v["text"])) == v["text"]


def meta(content):
    """A function that writes tokenizer.model into a folder."""
    content = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / META).write_bytes(content)


def hf(content):
    """A function that writes tokenizer.json instead."""
    def harm(folder):
        (folder / META).unlink()
        (folder / "tokenizer.json").write_text(content)
    return harm


def hf_with(right, wrong):
    assert right in BYTES_ALONE
    return hf(BYTES_ALONE.replace(right, wrong))


def says(**of):
    return lambda folder: (folder / "config.json").write_text(json.dumps(of))


def cut_short(folder):
    """Between two lines: what is left is a tokenizer in itself."""
    says(bos_token_id=Tokenizer(folder).bos)(folder)
    (folder / META).write_bytes(b"".join((folder / META).read_bytes().splitlines(True)[:3000]))


BYTES = {bytes([b]): b for b in range(256)}
SPECIAL = {name: 256 + i for i, name in enumerate(NAMED.values())}
BYTES_ALONE = hugging_face(BYTES, SPECIAL)
BROKEN = [
    (lambda folder: (folder / META).unlink(), "no tokenizer.model"),
    (cut_short, "cut short or another model's"),
    (says(eos_token_id="</s>"), "eos_token_id ['</s>'] holds no token ids"),
    (meta(b"\x0a<unk>\x15\x00"), "not a tokenizer.model of LLaMA-3"),
    (meta("I!Q== 0\n"), "base64 and rank"), (meta("IQ== one\n"), "base64 and rank"),
    (meta(""), "a single byte has none"), (meta("IQ== 0\n"), "a single byte has none"),
    (meta("IQ== 0\nIg== 2\n"), "ranks are not 0, 1"),
    (meta("IQ== 0\nIQ== 1\n"), "ranks are not 0, 1"),
    (hf("{"), "cannot be read"), (hf("{}"), "not a byte-level tokenizer"),
    (hf(hugging_face(BYTES, SPECIAL, pre_tokenizer=None)), "not a byte-level tokenizer"),
    (hf_with('"\\u0100"', '"\\u2581"'), "not a byte-level tokenizer"),
    (hf_with("{1,3}", "{1,2}"), "or split pattern"), (hf_with('"BPE"', '"Unigram"'), "Unigram"),
    (hf_with("Isolated", "Removed"), "or split pattern"),
    (hf_with('space": false', 'space": true'), "or split pattern"),
    (hf(hugging_face(BYTES, SPECIAL, normalizer=dict(type="Lowercase"))), "normalizer"),
    (hf_with('"BPE"', '"BPE", "dropout": 0.1'), "dropout"),
    (hf(hugging_face(BYTES, SPECIAL, pre_tokenizer=dict(
        type="Split", pattern=dict(Regex=PIECE), behavior="Isolated", invert=False))),
     "or split pattern"),
    (hf_with("<|eot_id|>", "<|im_end|>"), "a special token is missing"),
    (hf(hugging_face({**BYTES, b"ab": 255}, SPECIAL)), "ranks are not 0, 1"),
    (hf(hugging_face({**BYTES, b"ab": "x"}, SPECIAL)), "ranks are not 0, 1"),
]


@pytest.mark.parametrize("harm, said", BROKEN)
def test_what_is_wrong_with_a_tokenizer_is_named_in_one_line(folder, harm, said):
    """Rejects a traceback, and the tokens of another tokenizer taken for LLaMA-3's."""
    assert Tokenizer(folder).encode("hello")           # it was whole before
    harm(folder)
    assert said in complaint(Tokenizer, folder)


def test_the_smallest_tokenizer_json_of_those_is_whole_before_it_is_harmed(folder):
    """Rejects the rows above if they would complain of something else."""
    hf(BYTES_ALONE)(folder)
    assert Tokenizer(folder).encode("ab") == [97, 98] and Tokenizer(folder).bos == 256
