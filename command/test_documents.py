"""What the teaching files print, and what the documents promise."""
import itertools
import re

import pytest

import dp_layer_skip
import llama
import speculative
from command.flags import DEMO

llama.torch.set_num_threads(1)
ROOT = DEMO.parent
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("[!.]*/*.md"))]
PROGRAMS = {*ROOT.glob("*.py"), *ROOT.glob("[!.]*/*.py")}
TESTS = {path for path in PROGRAMS if path.name.startswith("test_")}


def test_the_demonstration_of_the_program_prints_what_is_so(capsys):
    """Rejects colours in a pipe, and words that its own figures do not bear out: the marked path,
    the layers named, the rank."""
    dp_layer_skip.main()
    out = capsys.readouterr().out
    assert "\033" not in out and "Left out: [1, 4, 7]" in out
    by_hand, toy = (re.findall(r"^  i = +(\d+) (.*?)(?:layer +(\d+) (run|SKIPPED))?$", part, re.M)
                    for part in out.split("A toy of"))
    for lines, skipped in ((by_hand, [1, 2]), (toy, [1, 4, 7])):
        spent = [sum(layer < i for layer in skipped) for i in range(len(lines))]
        assert [cells.split("*")[0].count(".") - 1 for _, cells, _, _ in lines] == spent
        assert [int(layer) for _, _, layer, did in lines if did == "SKIPPED"] == skipped
    rows = re.findall(r"^ +\d +12 +5 +(.+?) +(.+?) +(.+?) +(\d+) of 792$", out, re.M)
    assert len(rows) == 6 and all(float(m) < float(r) <= float(b) for r, b, m, _ in rows)
    net = dp_layer_skip.toy(12, 24, 1)                 # the second toy, over again
    every = sorted((dp_layer_skip.run_set(*net, tuple(i in s for i in range(12)))
                    for s in itertools.combinations(range(12), 5)), reverse=True)
    real, best, mean, rank = map(float, rows[1])
    assert [best, mean] == [round(x, 4) for x in (every[0], sum(every) / 792)]
    assert round(every[int(rank) - 1], 4) == real < best


def test_the_demonstration_of_the_sampler_prints_p_for_the_right_one_alone(capsys):
    """Rejects a demonstration whose right sampler is not exact, or whose wrong ones are."""
    speculative.main()
    out = capsys.readouterr().out
    p, q, right, *wrong = (float(line.split()[-1]) for line in out.splitlines()[2:])
    assert p == 0 and q > 0.1 and right < 1e-15 and len(wrong) == 3 and min(wrong) > 0.1


def test_the_drawing_shows_the_rows_as_they_are(capsys):
    """Rejects a picture of another mask: counted by hand."""
    llama.main()
    lines = re.findall(r"^ +(\d+) +(\d+)   (.+)$", capsys.readouterr().out, re.M)
    assert [(int(at), int(slot), marks.count("#")) for at, slot, marks in lines] == [
        (6, 6, 6), *((6 + r, 6 + r, 6 + r) for r in range(5)), *((6, 7 + r, 6) for r in range(5))]
    assert all(marks.replace(" ", "").index("w") == int(slot) for _, slot, marks in lines)


def flags_of(path):
    """The flags that a program here takes: its own, and where it adds to them the command's."""
    source, main = path.read_text(encoding="utf-8"), ROOT / "command" / "flags.py"
    inherits = path != main and re.search(r"clasp_mini\.parser\(\)|command\.flags import", source)
    return {*re.findall(r'"(--[a-z-]+)"', source), "--help", *(flags_of(main) if inherits else ())}


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
    names = " ".join(re.findall(r"^def (test_\w+)", "".join(
        path.read_text(encoding="utf-8") for path in TESTS), re.M))
    chosen = " ".join(map("".join, re.findall(r'pytest[^`\n]* -k (?:"(.+?)"|(\w+))', text)))
    assert [w for w in re.findall(r"\w+", chosen)
            if w not in ("or", "and", "not") and w.lower() not in names.lower()] == []
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
    listing, = re.findall(r"^```py\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)
    for seed in range(8):
        h, run_layer = dp_layer_skip.toy(9, 16, seed)
        names = dict(h=h, L=9, M=4, layer=lambda i, x: run_layer(i, x[None])[0],
                     cos=lambda a, b: dp_layer_skip.cosine(a, b).item())
        exec(listing, names)
        chosen = dp_layer_skip.choose_skip(h, run_layer, 4).skip()
        assert names["left_out"] == {i for i, s in enumerate(chosen) if s}
