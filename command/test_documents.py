"""What the documents promise."""
import re

import pytest

import dp_layer_skip
from command.flags import DEMO

dp_layer_skip.torch.set_num_threads(1)
ROOT = DEMO.parent
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("[!.]*/*.md"))]
PROGRAMS = {*ROOT.glob("*.py"), *ROOT.glob("[!.]*/**/*.py")}
TESTS = {path for path in PROGRAMS if path.name.startswith("test_")}


def flags_of(path):
    """The flags that a program here takes: its own, and those of files that it has them from."""
    source = path.read_text(encoding="utf-8")
    flags = {*re.findall(r'"(--[a-z-]+)"', source), "--help"}
    for file, use in (("command/flags.py", r"from command\.flags import|clasp_mini\.parser\(\)"),
                      ("bench/spec_bench.py", r"from bench\.spec_bench import")):
        if re.search(use, source):
            flags |= flags_of(ROOT / file)
    return flags


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
    names = " ".join(re.findall(r"^(?:def |@)(\w+)", "".join(
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
