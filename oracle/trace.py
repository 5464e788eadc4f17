"""A trace of a run, which another implementation can be held against: here it is written and read
back. TRACE.md is the contract.

`HEADER` and `schema` are the grammar: what may stand in each field of each line. Whether the values
are *right* is the business of check_trace.py.
"""
import hashlib
import json
import platform
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from llama import Config, Llama, torch
from speculative import CHUNK, Chance, Round, Settings, generate
from command.flags import VERSION as PROGRAM_VERSION

VERSION = 2                  # of the format
PROGRAM = "clasp-mini"


class Invalid(Exception):
    """Why a file is not a trace that can be checked, in one line for its user."""


class Incomplete(Exception):
    """The file ends, in whole lines, before the trace does."""


# ------------------------------------------------------------------------------------ writing

class Recording(Chance):
    """A Chance whose uniforms come from `uniform`, and which keeps a log of what it was asked:
    ("accept", a, u, verdict) and ("draw", p, u, token)."""

    def __init__(self, uniform: Callable[[], float]) -> None:
        self.source, self.log = uniform, []

    def uniform(self) -> float:
        self.last = self.source()
        return self.last

    def accept(self, a: float) -> bool:
        verdict = super().accept(a)
        self.log.append(("accept", a, self.last, verdict))
        return verdict

    def draw(self, p: torch.Tensor) -> int:
        token = super().draw(p)
        self.log.append(("draw", p, self.last, token))
        return token


def fingerprint(folder: str | Path) -> dict[str, str]:
    """name -> SHA-256 (hex) of every file that determines the model's numbers."""
    folder, index = Path(folder), "model.safetensors.index.json"
    names = ["config.json", "model.safetensors"]
    if not (folder / names[1]).exists():
        shards = set(json.loads((folder / index).read_text("utf-8"))["weight_map"].values())
        names[1:] = [index, *sorted(shards)]
    out = {}
    for name in names:
        with open(folder / name, "rb") as f:
            digest = hashlib.sha256()
            while part := f.read(1 << 20):
                digest.update(part)
        out[name] = digest.hexdigest()
    return out


def about(folder: str | Path) -> dict[str, dict[str, str]]:
    """What a trace or a dump says of the model in `folder` and of the programs that ran it."""
    return dict(model=fingerprint(folder), versions={
        PROGRAM: PROGRAM_VERSION, "torch": torch.__version__, "python": platform.python_version()})


def record(job: Any, ids: Sequence[int], path: str | Path) -> Iterator[Round]:
    """The rounds of a job of the command, each written to the trace at `path` before it is yielded
    (clasp_mini.py --trace)."""
    with open(path, "w", encoding="utf-8") as out:
        yield from write_trace(job.model, ids, job.settings, Recording(Chance(job.a.seed).uniform),
                               job.choose, out, about(job.folder), job.a.seed, job.costs)


def write_trace(model: Llama, prompt: Sequence[int], s: Settings, chance: Recording,
                choose: Callable[..., Any], out: TextIO, about: dict, seed: int | None = None,
                costs: dict[str, Any] | None = None) -> Iterator[Round]:
    """`generate`, each round written to `out` before it is yielded; with `costs` by the policy that
    adapts. `about` and `seed` are for the header. If the run is broken off, what has been written
    is whole rounds, without `end`."""
    def write(lines: list[dict]) -> None:
        out.write("".join(json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n"
                          for line in lines))
        out.flush()

    write([dict(event="header", schema="clasp-trace", version=VERSION, program=PROGRAM, **about,
                config=asdict(model.cfg), dtype=str(model.dtype).removeprefix("torch."),
                settings=dict(asdict(s), seed=seed), costs=costs, prompt_ids=list(prompt))])
    policy = Adaptive(s, **costs) if costs else None
    left, last = s.N, None
    for n, r in enumerate(generate(model, prompt, s, chance, choose, policy)):
        events = _events(r, chance.log, ended(r, s, left) if n else "prefill")
        write([dict(event=event, round=n, **fields) for event, fields in events])
        chance.log.clear()             # its distributions have V entries: one round of them at most
        left, last = left - len(r.emitted), r.emitted[-1]
        yield r
    write([dict(event="end", reason="stop" if last in s.stop_ids else "length",
                emitted=s.N - left)])


def ended(r: Round, s: Settings, left: int) -> str:
    """What ended the draft of a round before which `left` tokens may still be emitted."""
    k = len(r.drafted)
    if k == s.K or k == left - 1:
        return "K" if k == s.K else "N"
    if k and r.drafted[-1] in s.stop_ids:
        return "stop"
    doubted = k and s.exit_threshold is not None and r.confidence[-1] < s.exit_threshold
    return "confidence" if doubted else "policy"


def _events(r: Round, log: list, ended: str) -> Iterator[tuple[str, dict]]:
    """A round's lines. Its log: a draw for each drafted token, the verdicts up to the first
    rejection, and the draw of the full model's own token."""
    v, k = r.verdict, len(r.drafted)
    draws, verdicts, (_, drawn_from, u_own, own) = log[:k], log[k:-1], log[-1]
    yield "round", dict(start=r.start, skip=[i for i, s in enumerate(r.skip) if s], ended=ended)
    for step, token in enumerate(r.drafted):
        yield "draft", dict(step=step, token=token, q=v.q[step], confidence=r.confidence[step],
                            u=draws[step][2])
    for step, token in enumerate(r.drafted):
        _, _, u, accepted = verdicts[step] if step < len(verdicts) else (None,) * 4
        yield "verify", dict(step=step, token=token, p=v.p[step], q=v.q[step], a=v.a[step], u=u,
                             accepted=accepted)
    yield "own", dict(kind="plain" if k == 0 else "bonus" if r.accepted == k else "residual",
                      token=own, probability=drawn_from[own].item(), u=u_own)
    yield "emit", dict(tokens=r.emitted)
    if r.choice:
        M = len(r.choice.D[0]) - 1
        yield "optimise", dict(
            position=r.start - 1 + r.accepted, M=M,
            D=[row[:i + 1] for i, row in enumerate(r.choice.D)],
            parents=["".join("01"[bit] for bit in row[:i + 1])
                     for i, row in enumerate(r.choice.parents)],
            skip=[i for i, s in enumerate(r.choice.skip()) if s])
    yield "times", dict(zip(("draft", "verify", "optimise"), r.seconds))


# ------------------------------------------------------------------------------------ reading

Field = tuple[str, Callable[[Any], bool]]              # what is wanted, in words; whether it is


def whole(low: int, high: int) -> Field:
    # A JSON true is no number here, though Python's True is an int.
    return f"a whole number from {low} to {high}", lambda v: type(v) is int and low <= v <= high


def real(low: float, high: float) -> Field:
    return (f"a number from {low:g} to {high:g}",
            lambda v: type(v) in (int, float) and low <= v <= high)


def some(item: Field) -> Field:
    return f"a list, each {item[0]}", lambda v: type(v) is list and all(map(item[1], v))


def maybe(item: Field) -> Field:
    return f"{item[0]}, or null", lambda v: v is None or item[1](v)


def word(*allowed: str) -> Field:
    return " or ".join(allowed), lambda v: v in allowed


COUNT, SIZE, SEED = whole(0, 10 ** 9), whole(1, 10 ** 9), maybe(whole(0, 2 ** 64))
TEXT = ("a text", lambda v: type(v) is str)
FLAG, NOT_NEGATIVE = ("true or false", lambda v: type(v) is bool), real(0, 1e300)
TEXTS = ("an object of texts", lambda v: type(v) is dict and all(map(TEXT[1], v.values())))
CHANCE = ("a number from 0 up to, but not, 1", lambda v: type(v) in (int, float) and 0 <= v < 1)
NUCLEUS = ("a number above 0, at most 1", lambda v: type(v) in (int, float) and 0 < v <= 1)
# What the replay has a number of its own for: one out of range is a departure like any other.
NUMBER = ("a finite number", lambda v: type(v) in (int, float) and abs(v) < 1e300)
COSTS = ("an object, or null", lambda v: v is None or type(v) is dict)

HEADER: dict[str, Any] = dict(
    event=word("header"), schema=word("clasp-trace"), version=whole(VERSION, VERSION),
    program=TEXT, model=TEXTS, versions=TEXTS,
    config=dict(dict.fromkeys(("L", "D", "H", "G", "hd", "ffn", "V", "context"), SIZE),
                eps=NOT_NEGATIVE, tied=FLAG, theta=NOT_NEGATIVE, scaling=maybe(some(NOT_NEGATIVE))),
    dtype=word("float32", "float64", "bfloat16"),
    settings=dict(temperature=NOT_NEGATIVE, top_k=COUNT, top_p=NUCLEUS, N=SIZE,
                  stop_ids=some(COUNT), K=maybe(whole(0, CHUNK - 1)), M=maybe(COUNT),
                  exit_threshold=maybe(real(0, 1)), interval=maybe(SIZE), r=whole(1, CHUNK // 2),
                  seed=SEED),
    costs=COSTS, prompt_ids=some(COUNT))


def schema(cfg: Config) -> dict[str, dict[str, Field]]:
    """event -> field -> what may stand there, in a trace of a model of these sizes."""
    token, count, layers = whole(0, cfg.V - 1), whole(0, cfg.context), some(whole(0, cfg.L - 1))
    bits = ("a text of 0 and 1", lambda v: type(v) is str and not v.strip("01"))
    return {event: dict(event=word(event), round=count, **fields) for event, fields in dict(
        round=dict(start=count, skip=layers,
                   ended=word("prefill", "K", "N", "stop", "confidence", "policy")),
        draft=dict(step=count, token=token, q=NUMBER, confidence=NUMBER, u=CHANCE),
        verify=dict(step=count, token=token, p=NUMBER, q=NUMBER, a=NUMBER,
                    u=maybe(CHANCE), accepted=maybe(FLAG)),
        own=dict(kind=word("plain", "residual", "bonus"), token=token, probability=NUMBER,
                 u=CHANCE),
        emit=dict(tokens=some(token)),
        optimise=dict(position=count, M=count, D=some(some(NUMBER)), parents=some(bits),
                      skip=layers),
        times=dict(draft=NOT_NEGATIVE, verify=NOT_NEGATIVE, optimise=NOT_NEGATIVE)).items()} | dict(
            end=dict(event=word("end"), reason=word("stop", "length"), emitted=count))


def short(value: Any) -> str:
    """A value from a file as a message may show it: on one line, of a bounded length."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def match(line: dict, fields: dict, where: str) -> None:
    """Raise Invalid unless `line` has exactly these fields and each holds what it may."""
    for wrong, names in (("unknown", line.keys() - fields.keys()),
                         ("missing", fields.keys() - line.keys())):
        if names:
            raise Invalid(f"{where}: {wrong} field {short(min(names))}")
    for name, field in fields.items():
        if isinstance(field, dict):
            if type(line[name]) is not dict:
                raise Invalid(f"{where}: {name} is {short(line[name])}; an object wanted")
            match(line[name], field, f"{where}, {name}")
        elif not field[1](line[name]):
            raise Invalid(f"{where}: {name} is {short(line[name])}; {field[0]} wanted")


def read(file: Iterable[bytes]) -> Iterator[dict]:
    """The objects of a file of JSON lines, one at a time, each with a text `event`. Raises Invalid,
    with the line number: these files come from other programs."""
    def constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    for n, raw in enumerate(file, 1):
        if not raw.endswith(b"\n"):
            raise Invalid(f"line {n}: cut short, it does not end with a newline")
        try:
            line = json.loads(raw, parse_constant=constant)
        except (ValueError, RecursionError) as e:
            raise Invalid(f"line {n}: not JSON: {short(str(e))}") from None
        if type(line) is not dict or type(line.get("event")) is not str:
            raise Invalid(f"line {n}: a JSON object with a text \"event\" wanted")
        yield line


def by_round(lines: Iterable[dict]) -> list[dict[str, list[dict]]]:
    """The rounds of a trace: event -> its lines in the round, in their order."""
    out: list[dict[str, list[dict]]] = []
    for line in lines:
        if line["event"] == "round":
            out.append(defaultdict(list))
        if "round" in line:
            out[-1][line["event"]].append(line)
    return out


class Lines:
    """A trace as a cursor: `now` is the line looked at, line `number` of the file, checked against
    the grammar alone: HEADER, then `schema` once the sizes are known."""

    def __init__(self, file: Iterable[bytes]) -> None:
        self.lines, self.number, self.now, self.schema = read(file), 0, {}, {}

    def advance(self) -> None:
        """To the next line. Raises Incomplete if there is none, or Invalid."""
        self.now, self.number = next(self.lines, None), self.number + 1
        if self.now is None:
            raise Incomplete
        if self.schema:
            event = self.now["event"]
            if event not in self.schema:
                raise Invalid(f"line {self.number}: no such event: {short(event)}")
            match(self.now, self.schema[event], f"line {self.number}, {event}")

    def header(self) -> dict:
        try:
            self.advance()
        except Incomplete:
            raise Invalid("empty; a trace begins with a header") from None
        h = self.now
        if h["event"] != "header" or h.get("schema") != "clasp-trace":
            raise Invalid("line 1: not the header of a clasp-trace")
        if h.get("version") != VERSION:
            raise Invalid(f"line 1: version {short(h.get('version'))} of the format; this program "
                          f"reads version {VERSION}")
        match(h, HEADER, "line 1, header")
        return h
