"""Which levels of the oracle does a program, in any language, reach?

    python oracle/conformance.py --level N --program "./mine" [--junit FILE]
    python oracle/conformance.py --level 1 --counts FILE         # of texts that were made elsewhere

README.md says what a level asks and promises. The program reads one JSON object per line on stdin
and answers each with one on stdout, {"skip": "why"} where it cannot. A line is printed per case.
Exit status: 0 all right, 1 a case is wrong, 2 the program does not answer as it should.
"""
import argparse
import contextlib
import io
import itertools
import json
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from oracle import alike  # noqa: E402
from oracle.sampler import check  # noqa: E402
from oracle.sampler.check import Refused, Verdict  # noqa: E402
from oracle.sampler.law import ALONE, CASES  # noqa: E402

HERE = Path(__file__).resolve().parent
Ask = Callable[[list[dict]], list[dict]]     # whoever answers requests, one for each


def answers_of(program: str, requests: list[dict]) -> list[dict]:
    """One for each request: JSON objects, a line each, through the program's stdin and stdout."""
    text = "".join(json.dumps(request) + "\n" for request in requests)
    try:
        done = subprocess.run(shlex.split(program), input=text, stdout=subprocess.PIPE, text=True,
                              timeout=600, check=True)
        answers = [json.loads(line) for line in done.stdout.split("\n") if line.strip()]
    except (OSError, ValueError, subprocess.SubprocessError) as e:
        raise Refused(f"{program}: {e}") from None
    if len(answers) != len(requests) or not all(isinstance(answer, dict) for answer in answers):
        raise Refused(f"{program}: {len(requests)} lines are wanted, each a JSON object")
    return answers


def counts_of(path: str, requests: list[dict]) -> list[dict]:
    """The same from a file of texts that were counted elsewhere, {case: {text: how often}}."""
    cases = [request["case"] for request in requests]
    try:
        file = json.loads(Path(path).read_text(encoding="utf-8"))
        unknown = sorted(file.keys() - cases)
    except (OSError, ValueError, AttributeError) as e:
        raise Refused(f"{path}: {e}; {{case: {{text: how often}}}} is wanted") from None
    if unknown:
        raise Refused(f"{path}: {unknown[0]} is no case; these are {', '.join(cases)}")
    return [dict(counts=file[case]) if case in file else dict(skip="not counted")
            for case in cases]


def judged(ask: Ask, requests: list[dict], judge: Callable[[dict, dict], str]) -> Iterator[Verdict]:
    """Each case; judge(request, answer) says what is wrong, unless the program has skipped it."""
    for request, answer in zip(requests, ask(requests)):
        if isinstance(answer.get("skip"), str):
            yield "skip", request["case"], answer["skip"]
        else:
            fault = judge(request, answer)
            yield "WRONG" if fault else "ok", request["case"], fault


def departure(ours: dict, theirs: dict) -> str:
    """The first field that is not alike, in words."""
    for name in ours:
        if not alike(ours[name], theirs.get(name)):
            return f"{name} {theirs.get(name)}; {ours[name]} is right"
    return ""


def uniforms(ask: Ask, folder: Path) -> Iterator[Verdict]:
    """Level 0: texts from given uniform numbers."""
    vectors = json.loads((HERE / "sampler" / "uniforms.json").read_text())
    right = {vector["shows"]: dict(texts=[vector["text"]]) for vector in vectors}
    requests = [CASES[vector["case"]] | dict(level=0, case=vector["shows"], texts=1, seed=0,
                                             u=vector["u"]) for vector in vectors]
    return judged(ask, requests, lambda request, answer: departure(
        right[request["case"]], answer))


def sampler(ask: Ask, folder: Path) -> Iterator[Verdict]:
    """Level 1: the law of texts from a generator of its own."""
    requests = [case | dict(level=1, texts=check.TEXTS, seed=seed)
                for seed, case in enumerate(CASES.values())]
    seen: check.Seen = {}
    taken: dict[str, float] = {}

    def judge(request: dict, answer: dict) -> str:
        case = request["case"]
        seen[case] = check.counted(request, answer)
        if "rounds" in answer and case in ALONE:
            taken[case] = check.average(request, answer["rounds"])
        return check.wrong_in(case, seen[case])
    yield from judged(ask, requests, judge)
    yield check.all_together(seen)
    if taken:
        yield "ok", "rounds per text", check.speed(taken)


def dynamic_program(ask: Ask, folder: Path) -> Iterator[Verdict]:
    """Level 2: tables and sets for given states and layers."""
    vectors = json.loads((HERE / "dynamic_program.json").read_text())
    want = {vector["case"]: {name: vector.pop(name) for name in ("skip", "D", "skipped")}
            for vector in vectors}

    def judge(request: dict, answer: dict) -> str:
        right = want[request["case"]]
        return departure({name: right[name] for name in right if name in {"skip", *answer}}, answer)
    return judged(ask, [dict(vector, level=2) for vector in vectors], judge)


def quiet(main: Callable[[list[str]], int], *arguments: str) -> str:
    """What a checker prints, if it is not content."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = main(list(arguments))
    return said.getvalue().strip() if status else ""


def about(level: int, path: Path, folder: Path, **fields: Any) -> dict:
    """For what a vector shows, to be written in `folder`."""
    model = HERE / "tiny" if path.name.startswith("tiny") else HERE.parent / "demo"
    return dict(level=level, case=path.name, model=str(model), dtype="float64",
                out=str(folder / path.name), **fields)


def passes(folder: Path) -> list[dict]:
    """The requests of level 3."""
    from llama import safe_open
    requests = []
    for path in sorted((HERE / "vectors").glob("*.safetensors")):
        with safe_open(path, framework="pt") as f:
            skip = json.loads(f.metadata()["clasp-forward"])["skip"]
            ids = f.get_tensor("prompt_ids").tolist()
        requests.append(about(3, path, folder, prompt_ids=ids, skip=skip))
    return requests


def forward(ask: Ask, folder: Path) -> Iterator[Verdict]:
    """Level 3: passes over a prompt, dumped."""
    from oracle import dumps
    return judged(ask, passes(folder), lambda request, answer: quiet(
        dumps.main, str(HERE / "vectors" / request["case"]), "--against", request["out"]))


def read(path: str | Path) -> list[dict]:
    """The lines of a trace, without times."""
    lines = map(json.loads, Path(path).read_text().splitlines())
    return [line for line in lines if line["event"] != "times"]


def runs(folder: Path) -> list[dict]:
    """The requests of level 4."""
    requests = []
    for path in sorted((HERE / "vectors").glob("*.jsonl")):
        header, *events = read(path)
        u = [line["u"] for line in events if line.get("u") is not None]
        requests.append(about(4, path, folder, prompt_ids=header["prompt_ids"],
                              settings=header["settings"], u=u))
    return requests


def loop(ask: Ask, folder: Path) -> Iterator[Verdict]:
    """Level 4: traces from given uniform numbers."""
    def judge(request: dict, answer: dict) -> str:
        _, *right = read(HERE / "vectors" / request["case"])
        _, *theirs = read(request["out"])
        for ours, line in itertools.zip_longest(right, theirs, fillvalue=dict(event="")):
            if said := departure(ours, line):
                return f"round {ours.get('round')}, {ours['event']}: {said}"
        return ""
    return judged(ask, runs(folder), judge)


def own(ask: Ask, folder: Path) -> Iterator[Verdict]:
    """Level 5: traces from a generator of its own, replayed."""
    from oracle import check_trace
    requests = [{name: run[name] for name in run if name != "u"} | dict(level=5)
                for run in runs(folder) if run["case"].startswith("tiny")]
    return judged(ask, requests, lambda request, answer: quiet(
        check_trace.main, request["out"], "--model", request["model"]))


LEVELS = (uniforms, sampler, dynamic_program, forward, loop, own)


def junit(title: str, cases: Sequence[Verdict]) -> ElementTree.ElementTree:
    """The cases as a CI reads them."""
    suite = ElementTree.Element("testsuite", name=title, tests=str(len(cases)))
    for verdict, name, why in cases:
        case = ElementTree.SubElement(suite, "testcase", name=name)
        if verdict != "ok":
            kind = "failure" if verdict == "WRONG" else "skipped"
            ElementTree.SubElement(case, kind, message=why)
    return ElementTree.ElementTree(suite)


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description="Run all of a level of the oracle.")
    p.error = lambda message: p.exit(2, f"conformance.py: {message} (--help lists the flags)\n")
    p.add_argument("--level", type=int, choices=range(len(LEVELS)), required=True)
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--program", metavar="COMMAND")
    source.add_argument("--counts", metavar="FILE", help="{case: {text: how often}}, for level 1")
    p.add_argument("--junit", metavar="FILE", help="write the result as JUnit XML too")
    a = p.parse_args(argv)
    if a.counts and a.level != 1:
        p.error("--counts goes with --level 1")
    ask = partial(counts_of, a.counts) if a.counts else partial(answers_of, a.program)
    cases = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            for verdict, name, why in LEVELS[a.level](ask, Path(folder)):
                cases.append((verdict, name, why))
                print(f"{verdict:6}{name}: {why}".rstrip(": "))
    except (Refused, OSError, ValueError, KeyError) as e:
        print(f"conformance.py: {e}", file=sys.stderr)
        return 2
    said = Counter(verdict for verdict, *_ in cases)
    title = f"level {a.level} of oracle {(HERE / 'version').read_text().split()[0]}"
    if a.junit:
        junit(title, cases).write(a.junit, encoding="utf-8")
    print(f"{title}: {said['ok']} right, {said['WRONG']} wrong, {said['skip']} skipped")
    return 1 if said["WRONG"] else 0


if __name__ == "__main__":
    sys.exit(main())
