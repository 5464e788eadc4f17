"""What test_clasp.py leaves out: where rounding matters, what `python dp_layer_skip.py`, `python
speculative.py` and `python llama.py` print, what the documents promise, and whether the table of
wrong programs is a good one.
"""
import cmath
import itertools
import math
import os
import re
import signal
import subprocess
import sys

import pytest
import torch

import dp_layer_skip
import llama
import policy.test_exact  # noqa: F401
import speculative
import test_clasp
from dp_layer_skip import choose_skip_plain
from speculative import Settings, acceptance, probabilities
from tests.helpers import ROOT, decode, flags, tiny_llama
from tests.slow_llama import AS_4, AS_5, random_checkpoint, reference_frequencies, worst_error
from tests.wrong_programs import HELD, NAMED, WRONG, edit, put, rejects, running


# -------------------------------------------------------------------- rounding

# bfloat16 rounds by up to 2^-9 = 0.002, some ten times per layer; 0.015 was measured.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 0.05}


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_every_row_is_llama_up_to_rounding(tmp_path, dtype):
    """Rejects arithmetic that is coarser somewhere than the model's dtype."""
    stored = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32    # is loaded exactly
    assert worst_error(tmp_path, overrides=AS_5, stored=stored, dtype=dtype) < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_probabilities_are_float64_and_finite_at_any_temperature(dtype):
    """Rejects arithmetic in bfloat16, overflow at tiny temperatures, no numbers at vast ones, and
    an empty nucleus."""
    logits = torch.tensor([-300.0, 0.0, 300.0, 299.0], dtype=dtype)
    for temperature in (1e-300, 1e-46, 1e-30, 1e-3, 1.0, 1e300):
        for top_k, top_p in ((0, 1.0), (9, 1.0), (2, 0.5), (1, 1.0), (0, 1e-300)):
            p = probabilities(logits, Settings(temperature=temperature, top_k=top_k, top_p=top_p))
            assert p.dtype == torch.float64 and p.isfinite().all()
            assert abs(p.sum().item() - 1) < 1e-6
    assert probabilities(logits, Settings(temperature=1e300)).tolist() == pytest.approx([0.25] * 4)


@rejects("norms in bfloat16")
def test_in_bfloat16_norms_are_computed_in_float32():
    """Rejects statistics in bfloat16, which change a value in five (in float32, 1 in some 2^14)."""
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    wide = x.double()
    exact = (wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).bfloat16()
    got = llama.rms_norm(x, torch.ones(512).bfloat16(), torch.tensor(1e-5))
    assert got.dtype == torch.bfloat16
    assert (got != exact).double().mean() < 1e-3


@rejects("rotary tables in bfloat16")
def test_in_bfloat16_rows_are_turned_by_exact_tables_to_the_end_of_a_long_context(tmp_path):
    """Rejects angles computed in float32, wrong by 1e-3 there, and rows turned in bfloat16."""
    c, _ = random_checkpoint(tmp_path, AS_4)
    cfg = llama.read_config(tmp_path)
    narrow, wide = (llama.Cache(cfg, 32768, torch.device("cpu"), dtype).sequence(32704, 64)
                    for dtype in (torch.bfloat16, torch.float64))
    want = [cmath.exp(32767j * f) for f in reference_frequencies(c).tolist()]
    assert narrow.cos[-1, 0].tolist() == pytest.approx([z.real for z in want * 2], abs=1e-7)
    assert narrow.sin[-1, 0, 8:].tolist() == pytest.approx([z.imag for z in want], abs=1e-7)
    x = torch.randn(64, 1, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = llama.rotate(x.double(), wide).bfloat16()
    assert (llama.rotate(x, narrow) != exact).double().mean() < 2e-3


def test_a_draft_of_no_numbers_draws_no_token():
    """Rejects token 0, the argmax of what is no number, for an answer: nobody else looks at the
    logits of a draft."""
    model = tiny_llama()
    passes = itertools.count()

    def head(x):
        return llama.Llama.head(model, x) * (math.nan if next(passes) == 1 else 1)
    model.head = head
    with pytest.raises(FloatingPointError):
        decode(model, [0], Settings(temperature=1.0, K=1))


# ------------------------------------------------------------- what is printed

@rejects("the stars stand one row early", "the printed case is another")
def test_the_first_table_is_that_of_the_case_above_it_and_its_stars_are_the_way_back(
        monkeypatch, capsys):
    """Rejects a sentence with other numbers than the table's, and stars in another row."""
    monkeypatch.setattr(dp_layer_skip, "run_set", lambda *_: 0.0)           # of all sets: is slow
    dp_layer_skip.main()
    said, table, *_ = capsys.readouterr().out.split("\n\n")
    numbers = re.findall(r"\((-?[0-9]),(-?[0-9])\)", said)
    *add, start = torch.tensor([[float(x), float(y)] for x, y in numbers])
    h = torch.stack([start + sum(add[:i]) for i in range(4)])
    choice = choose_skip_plain(h, lambda i, x: x + add[i], 2)
    stars = [(i, sum(choice.skip()[:i])) for i in range(4)]
    for i, line in enumerate(table.splitlines()[1:]):
        cells = [f"{v:.3f}" + "*" * ((i, j) in stars) for j, v in enumerate(choice.D[i]) if j <= i]
        assert line.split()[3:3 + len(cells)] == cells


def test_the_right_sampler_is_right_and_the_three_wrong_ones_are_wrong(capsys):
    """Rejects a table in which a wrong sampler happens to be exact, or the right one is not."""
    speculative.main()
    right, *wrong = re.findall(r"^(?:right|wrong):.* ([^ ]+)$", capsys.readouterr().out, re.M)
    assert float(right) < 1e-15
    assert len(wrong) == 3 and min(map(float, wrong)) > 0.01


def test_candidates_are_drawn_as_rows_that_read_the_past_and_themselves(capsys):
    """Rejects a drawing of another mask, or with a row shifted against its slots."""
    llama.main()
    rows = capsys.readouterr().out.splitlines()[-5:]
    for j, row in enumerate(rows):
        position, slot, *marks = row.split()
        assert (position, slot) == ("6", str(7 + j))
        assert "".join(marks) == "#" * 6 + "." * (1 + j) + "w" + "." * (4 - j)


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="no broken pipes here")
@pytest.mark.parametrize("name", ["dp_layer_skip.py", "speculative.py", "llama.py"])
def test_a_reader_that_has_seen_enough_gets_no_traceback(name):
    """Rejects a broken pipe told at length: `python dp_layer_skip.py | head`. Nobody reads here."""
    read, write = os.pipe()
    os.close(read)
    program = [sys.executable, ROOT / name]
    done = subprocess.run(program, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, b"")


# ----------------------------------------------------- what the documents promise

DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("[!.]*/*.md"))]
PROGRAMS = {*ROOT.glob("*.py"), *ROOT.glob("[!.]*/**/*.py")}
TESTS = {path for path in PROGRAMS if path.name.startswith("test_")}


def flags_of(path):
    """The flags that a program here takes: its own, and those of files that it has them from."""
    source = path.read_text(encoding="utf-8")
    found = {*re.findall(r'"(--[a-z-]+)"', source), "--help"}
    for file, use in (("command/flags.py", r"from command\.flags import|clasp_mini\.parser\(\)"),
                      ("bench/spec_bench.py", r"from bench\.spec_bench import")):
        if re.search(use, source):
            found |= flags_of(ROOT / file)
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_document_names_only_what_exists(document):
    """Rejects a command that does not run, a flag that is gone, a -k that selects nothing, a link
    to nowhere."""
    text = document.read_text(encoding="utf-8").replace("\\\n", " ")
    for name, arguments in re.findall(r"python ([\w/]+\.py)([^`\n|#]*)", text):
        assert (ROOT / name).exists(), name
        assert {*re.findall(r"(?<=\s)--[a-z-]+", arguments)} <= flags_of(ROOT / name), arguments
    every = set().union(*map(flags_of, PROGRAMS - TESTS))
    assert {*re.findall(r"`(--[a-z-]+)", text)} <= every
    tests = "".join(path.read_text(encoding="utf-8") for path in TESTS)
    names = " ".join(re.findall(r"^(?:def |@)(\w+)", tests, re.M)).lower()
    chosen = " ".join(re.findall(r"pytest[^`\n]* -k (\".+?\"|\w+)", text)).lower()
    assert [w for w in re.findall(r"\w+", chosen) if w != "or" and w not in names] == []
    prose = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.S)
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", prose)
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_the_library_example_of_the_readme_runs_as_it_stands(monkeypatch, capsys):
    """Rejects an example that has drifted from the code."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    example, = re.findall(r"^```python\n(.*?)^```", readme, re.S | re.M)
    monkeypatch.chdir(ROOT)
    exec(example, {"__name__": "example"})
    out, err = capsys.readouterr()
    assert len(out.splitlines()) > 3 and err == ""


def test_the_algorithm_in_the_readme_chooses_what_the_program_chooses():
    """Rejects a listing that has drifted from the recurrence, or never was it."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    listing, = re.findall(r"^```py\n(.*?)^```", readme, re.S | re.M)
    for seed in range(8):
        h, run_layer = dp_layer_skip.toy(9, 16, seed)
        names = dict(h=h, L=9, M=4, layer=lambda i, x: run_layer(i, x[None])[0],
                     cos=lambda a, b: dp_layer_skip.cosine(a, b).item())
        exec(listing, names)
        chosen = dp_layer_skip.choose_skip(h, run_layer, 4).skip()
        assert flags(9, names["left_out"]) == chosen


# -------------------------------------------------------------- wrong programs

def test_every_wrong_program_is_rejected_by_some_test():
    """Rejects a row that no test imported here is held against, twice one name, and a stale one."""
    assert HELD == NAMED.keys()
    assert len(NAMED) == sum(map(len, WRONG.values()))


def test_a_wrong_program_is_in_place_wherever_it_was_imported_and_only_for_a_while():
    """Rejects a table that judges the right program by mistake, or leaves a wrong one behind."""
    right = speculative.acceptance
    for change in (put(speculative, "acceptance", lambda p, q: p),
                   edit(speculative, "acceptance", ("clamp(max=1)", "clamp(max=2)"))):
        with running(change):
            assert speculative.acceptance is not right
            assert acceptance is speculative.acceptance is test_clasp.acceptance
        assert acceptance is speculative.acceptance is test_clasp.acceptance is right


def test_neither_a_stale_change_nor_a_tests_silence_is_a_rejection():
    """Rejects a row whose place is gone that passes for a rejected one, and a test that is too
    kind."""
    for change in (put(speculative, "no_such", None), edit(speculative, "no_such", ("a", "b")),
                   edit(speculative, "acceptance", ("no such text", ""))):
        with pytest.raises((AttributeError, LookupError)), running(change):
            pass
    with pytest.raises(pytest.fail.Exception, match="not rejected: residual = p"):
        rejects("residual = p")(lambda: None)()
