"""Which levels of the oracle does a program, in any language, reach?

    python oracle/conformance.py --level N --program "./mine" [--junit FILE]

README.md says what a level asks and promises. The program reads one JSON object per line on stdin
and answers each with one on stdout, {"skip": "why"} where it cannot. A line is printed per case.
Exit status: 0 all right, 1 a case is wrong, 2 the program does not answer as it should.
"""
import contextlib
import io
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from oracle.sampler import check  # noqa: E402
from oracle.sampler.check import Parser, Refused, ask  # noqa: E402
from oracle.sampler.law import CASES  # noqa: E402

HERE = Path(__file__).resolve().parent
OWN = dict(N=40, K=4, M=3, exit_threshold=0.05, interval=2, r=1, stop_ids=[], top_k=0, top_p=1.0)
Case = tuple[str, str, str]          # name, what is wrong or nothing, a remark


def alike(ours: Any, theirs: Any) -> bool:
    """Equal, but for the rounding of floats; lists and objects by their parts."""
    if isinstance(ours, float) and isinstance(theirs, (int, float)):
        return math.isclose(ours, theirs, rel_tol=1e-6, abs_tol=1e-6)
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(alike, ours, theirs))
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(alike(ours[k], theirs[k]) for k in ours)
    return ours == theirs


def asked(program: str, requests: list[dict], judge: Callable[[dict, dict], str]
          ) -> Iterator[Case]:
    """Each request's case, judged unless the program has skipped it."""
    for request, answer in zip(requests, ask(program, requests)):
        if "skip" in answer and isinstance(answer["skip"], str):
            yield request["case"], "", f"skipped: {answer['skip']}"
        else:
            yield request["case"], judge(request, answer), ""


def uniforms(program: str, folder: Path) -> Iterator[Case]:
    """Level 0: texts from given uniform numbers."""
    vectors = json.loads((HERE / "sampler" / "uniforms.json").read_text())
    want = {vector["shows"]: vector["text"] for vector in vectors}
    requests = [CASES[vector["case"]] | dict(level=0, case=vector["shows"], texts=1, u=vector["u"])
                for vector in vectors]

    def judge(request: dict, answer: dict) -> str:
        rounds = want[request["case"]]
        flat = [x for part in rounds for x in part]
        text = answer.get("texts", [None])[0]
        return "" if text in (rounds, flat) else f"{text}; {rounds} is right"
    return asked(program, requests, judge)


def sampler(program: str, folder: Path) -> Iterator[Case]:
    """Level 1: the law of texts from a generator of its own."""
    requests = check.requests(CASES)
    lines, fault = check.judge(requests, ask(program, requests))
    for name, wrong, words in lines:
        yield name, words if wrong else "", "" if wrong else words
    yield "all together", fault, ""


def dynamic_program(program: str, folder: Path) -> Iterator[Case]:
    """Level 2: tables and sets for given states and layers."""
    vectors = json.loads((HERE / "dynamic_program.json").read_text())
    answers = ("D", "skipped", "skip")
    want = {vector["case"]: {name: vector.pop(name) for name in answers} for vector in vectors}

    def judge(request: dict, answer: dict) -> str:
        for name in answers:
            right = want[request["case"]][name]
            if name in answer and not alike(right, answer[name]) or "skip" not in answer:
                return f"{name} {answer.get(name)}; {right} is right"
        return ""
    return asked(program, [dict(vector, level=2) for vector in vectors], judge)


def quiet(main: Callable[[list[str]], int], *arguments: str) -> str:
    """What a checker prints, if it is not content."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = main(list(arguments))
    return said.getvalue().strip() if status else ""


def forward(program: str, folder: Path) -> Iterator[Case]:
    """Level 3: passes over a prompt, dumped."""
    from llama import safe_open
    from oracle import compare_dumps
    requests = []
    for path in sorted((HERE / "vectors").glob("*.safetensors")):
        with safe_open(path, framework="pt") as f:
            skip = json.loads(f.metadata()["clasp-forward"])["skip"]
            ids = f.get_tensor("prompt_ids").tolist()
        requests.append(dict(level=3, case=path.name, model=model_of(path), dtype="float64",
                             prompt_ids=ids, skip=skip, out=str(folder / path.name)))
    return asked(program, requests, lambda request, answer: quiet(
        compare_dumps.main, str(HERE / "vectors" / request["case"]), request["out"]))


def model_of(path: Path) -> str:
    return str(HERE / "tiny" if path.name.startswith("tiny") else HERE.parent / "demo")


def read(path: Path) -> list[dict]:
    lines = map(json.loads, path.read_text().splitlines())
    return [line for line in lines if line["event"] not in ("header", "times")]


def loop(program: str, folder: Path) -> Iterator[Case]:
    """Level 4: traces from given uniform numbers."""
    requests = []
    for path in sorted((HERE / "vectors").glob("*.jsonl")):
        header = json.loads(path.read_text().split("\n", 1)[0])
        u = [line["u"] for line in read(path) if line.get("u") is not None]
        requests.append(dict(level=4, case=path.name, model=model_of(path), dtype="float64",
                             prompt_ids=header["prompt_ids"], settings=header["settings"], u=u,
                             out=str(folder / path.name)))

    def judge(request: dict, answer: dict) -> str:
        right = read(HERE / "vectors" / request["case"])
        theirs = read(Path(request["out"]))
        for ours, line in zip(right, theirs):
            for name in ours:
                if not alike(ours[name], line.get(name)):
                    return (f"round {ours.get('round')}, {ours['event']}: {name} "
                            f"{line.get(name)}; {ours[name]} is right")
        return "" if len(right) == len(theirs) else f"{len(theirs)} lines of {len(right)}"
    return asked(program, requests, judge)


def own(program: str, folder: Path) -> Iterator[Case]:
    """Level 5: traces from a generator of its own, replayed."""
    from oracle import check_trace
    requests = []
    for case, settings in {"greedy": dict(temperature=0.0), "sampled": dict(temperature=1.0),
                           "top-k, top-p": dict(temperature=0.7, top_k=20, top_p=0.9)}.items():
        requests.append(dict(level=5, case=case, model=str(HERE / "tiny"), dtype="float64",
                             prompt_ids=[3, 41, 7, 19], settings=OWN | settings | dict(seed=7),
                             out=str(folder / f"{len(requests)}.jsonl")))
    return asked(program, requests, lambda request, answer: quiet(
        check_trace.main, request["out"], "--model", request["model"]))


LEVELS = (uniforms, sampler, dynamic_program, forward, loop, own)


def main(argv: Sequence[str] | None = None) -> int:
    p = Parser(description="Run all of a level of the oracle.")
    p.add_argument("--level", type=int, choices=range(len(LEVELS)), required=True)
    p.add_argument("--program", metavar="COMMAND", required=True)
    p.add_argument("--junit", metavar="FILE", help="write the result as JUnit XML too")
    a = p.parse_args(argv)
    version = (HERE / "version").read_text().split()[0]
    suite = ElementTree.Element("testsuite", name=f"clasp-mini oracle {version} level {a.level}")
    wrong = skipped = 0
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name, fault, remark in LEVELS[a.level](a.program, Path(folder)):
                print(f"{'WRONG' if fault else 'ok':6}{name}: {fault or remark}".rstrip(": "))
                case = ElementTree.SubElement(suite, "testcase", name=name, classname=a.program)
                wrong += bool(fault)
                skipped += remark.startswith("skipped")
                if fault:
                    ElementTree.SubElement(case, "failure", message=fault)
                elif remark.startswith("skipped"):
                    ElementTree.SubElement(case, "skipped", message=remark)
    except (Refused, OSError, ValueError, KeyError) as e:
        print(f"conformance.py: {e}", file=sys.stderr)
        return 2
    suite.attrib |= dict(tests=str(len(suite)), failures=str(wrong), skipped=str(skipped))
    if a.junit:
        ElementTree.ElementTree(suite).write(a.junit, encoding="utf-8", xml_declaration=True)
    print(f"level {a.level} of oracle {version}: {len(suite) - wrong - skipped} right, {wrong} "
          f"wrong, {skipped} skipped")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
