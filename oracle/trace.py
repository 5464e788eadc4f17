"""A trace of a run, which another implementation can be held against: here it is written and read
back. TRACE.md is the contract.

`HEADER` and `EVENTS` are the grammar: what may stand in each field of each line. Whether the values
are *right* is the business of check_trace.py.
"""
import hashlib
import json
import math
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from command.cli import UsageError
from command.flags import VERSION as PROGRAM_VERSION
from dp_layer_skip import Choice
from llama import INDEX, Tensor, torch, weight_files
from speculative import Chance, Round, Settings, generate

VERSION = 5                  # of the format
PROGRAM = "clasp-mini"


class Recording(Chance):
    """A Chance whose uniforms come from `uniform`, and which keeps what a round asked: `u`, 2k + 1
    numbers; `draws`, k + 1 times (token, its probability); `a`, of the k verdicts."""

    def __init__(self, uniform: Callable[[], float]) -> None:
        self.source = uniform
        self.forget()

    def forget(self) -> None:
        self.u: list[float] = []
        self.a: list[float] = []
        self.draws: list[tuple[int, float]] = []

    def uniform(self) -> float:
        self.u.append(self.source())
        return self.u[-1]

    def accept(self, a: Tensor) -> Tensor:
        self.a = a.tolist()
        return super().accept(a)

    def draw(self, p: Tensor) -> Tensor:
        token = super().draw(p)
        self.draws.append((int(token), p[token].item()))
        return token


class Witness:
    """A policy that does as another one, and keeps the p and q that this is told of last."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    def judged(self, confidence: list[float], p: Tensor, q: list[Tensor], accepted: int) -> None:
        self.p = p                                     # (k+1, V)
        self.q = q                                     # k times (V,)
        self.policy.judged(confidence, p, q, accepted)


def traced(job: Any) -> Callable[..., Iterator[Round]]:
    """`generate` for a job of the command, which writes each round to its --trace as well. Of the
    chance that it is given it takes the uniform numbers alone."""
    said = job.numbers | dict(r=job.probe, seed=job.flags.seed)

    def rounds(model: Any, ids: Sequence[int], s: Settings, chance: Chance, choose: Callable,
               policy: Any) -> Iterator[Round]:
        with open(job.flags.trace, "w", encoding="utf-8") as out:
            yield from write_trace(out, model, ids, s, Recording(chance.uniform), choose, policy,
                                   about(job.folder), said, job.costs)
    return rounds


def write_trace(out: TextIO, model: Any, prompt: Sequence[int], s: Settings, chance: Recording,
                choose: Callable[..., Any], policy: Any, about: dict, said: dict,
                costs: dict | None = None) -> Iterator[Round]:
    """`generate`, each round written to `out` before it is yielded. What follows the policy is for
    the header; `said` are settings beside s: r, seed, and as None what the policy decides. If the
    run is broken off, what has been written is whole rounds, without `end`."""
    def write(*lines: dict) -> None:
        out.write("".join(json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n"
                          for line in lines))
        out.flush()

    witness = Witness(policy)
    settings = asdict(s) | said
    write(dict(event="header", schema="clasp-trace", version=VERSION, program=PROGRAM, **about,
               config=asdict(model.cfg), dtype=str(model.dtype).removeprefix("torch."),
               settings=settings, costs=costs, prompt_ids=list(prompt)))
    left = s.N
    for n, r in enumerate(generate(model, prompt, s, chance, choose, witness)):
        why = ended(n, r, settings, left)
        write(*(dict(event=event, round=n, **fields)
                for event, fields in events(r, chance, witness, why)))
        chance.forget()
        left -= len(r.emitted)
        stopped = r.emitted[-1] in s.stop_ids
        yield r
    write(dict(event="end", reason="stop" if stopped else "length", emitted=s.N - left))


def ended(n: int, r: Round, settings: dict, left: int) -> str:
    """What ended the draft of round n, before which `left` tokens may still be emitted."""
    k = len(r.drafted)
    doubtful = k > 0 and r.confidence[-1] < (settings["exit_threshold"] or 0)
    so = dict(prefill=n == 0, K=k == settings["K"], N=k == left - 1,
              stop=k > 0 and r.drafted[-1] in settings["stop_ids"], confidence=doubtful)
    return next((why for why in so if so[why]), "policy")


def events(r: Round, chance: Recording, witness: Witness, why: str) -> Iterator[tuple[str, dict]]:
    """A round's lines."""
    k = len(r.drafted)
    yield "round", dict(start=r.start, skip=indices(r.skip), ended=why)
    for step, token in enumerate(r.drafted):
        _, q = chance.draws[step]
        yield "draft", dict(step=step, token=token, q=q, confidence=r.confidence[step],
                            u=chance.u[step])
    for step, token in enumerate(r.drafted):
        verdict = step < r.accepted if step <= r.accepted else None         # None: not judged
        yield "verify", dict(step=step, token=token, p=witness.p[step, token].item(),
                             q=witness.q[step][token].item(), a=chance.a[step],
                             u=chance.u[k + step], accepted=verdict)
    kind = "residual" if r.accepted < k else "bonus" if k > 0 else "plain"
    token, probability = chance.draws[k]
    p = witness.p[r.accepted]
    q = witness.q[r.accepted] if kind == "residual" else torch.zeros_like(p)
    mass = (p - q).clamp(min=0).sum().item() if kind == "residual" else 1.0
    yield "own", dict(kind=kind, token=token, probability=probability, u=chance.u[2 * k],
                      p=p[token].item(), q=q[token].item(), mass=mass)
    yield "emit", dict(tokens=r.emitted)
    if r.choice:
        M = len(r.choice.D[0]) - 1
        yield "optimise", dict(position=r.start - 1 + r.accepted, M=M, **table_of(r.choice))
    yield "times", dict(zip(("draft", "verify", "optimise"), r.seconds))


def table_of(choice: Choice) -> dict:
    """What a table's lines hold: of line i the cells that are reached."""
    bits = ["".join("01"[bit] for bit in row) for row in choice.skipped]
    return dict(D=[row[:i + 1] for i, row in enumerate(choice.D)],
                skipped=[row[:i + 1] for i, row in enumerate(bits)], skip=indices(choice.skip()))


def indices(skip: Sequence[bool]) -> list[int]:
    return [i for i, left_out in enumerate(skip) if left_out]


def about(folder: str | Path) -> dict[str, dict[str, str]]:
    """What a trace or a dump says of the model in `folder` and of the programs that ran it."""
    return dict(model=fingerprint(folder), versions={
        PROGRAM: PROGRAM_VERSION, "torch": torch.__version__, "python": platform.python_version()})


def fingerprint(folder: str | Path) -> dict[str, str]:
    """name -> SHA-256 (hex) of every file that determines the model's numbers."""
    files, shard_of = weight_files(Path(folder))
    out = {}
    for name in ["config.json", *[INDEX] * bool(shard_of), *files]:
        digest = hashlib.sha256()
        with open(Path(folder, name), "rb") as f:
            while part := f.read(1 << 20):
                digest.update(part)
        out[name] = digest.hexdigest()
    return out


# What may stand in a field. With ? after it also null, with s a list of such. A JSON true is no
# number, though Python's True is an int.
KINDS: dict[str, Callable[[Any], bool]] = dict(
    text=lambda v: type(v) is str,
    flag=lambda v: type(v) is bool,
    object=lambda v: type(v) is dict,
    count=lambda v: type(v) is int and 0 <= v < 2 ** 63,
    size=lambda v: KINDS["count"](v) and v > 0,
    # What the replay has a number of its own for: one out of range is a departure like any other.
    number=lambda v: type(v) in (int, float) and abs(v) < 1e300,
    positive=lambda v: KINDS["number"](v) and v >= 0,
    part=lambda v: KINDS["number"](v) and 0 < v <= 1,
    uniform=lambda v: KINDS["number"](v) and 0 <= v < 1)

HEADER: dict[str, Any] = dict(
    event="text", schema=("clasp-trace",), version=(VERSION,), program="text", model="object",
    versions="object", config="object", dtype=("float32", "float64", "bfloat16"),
    settings="object", costs="object?", prompt_ids="counts")
CONFIG = dict(
    L="size", D="size", H="size", G="size", hd="size", ffn="size", V="size", context="size",
    eps="positive", theta="positive", tied="flag", scaling="positives?")
SETTINGS = dict(
    temperature="positive", top_k="count", top_p="part", N="size", stop_ids="counts", K="count?",
    M="count?", exit_threshold="positive?", interval="size?", r="size", seed="count?")
LINE = dict(event="text", round="count")
EVENTS: dict[str, dict[str, Any]] = dict(
    round=LINE | dict(start="count", skip="counts",
                      ended=("prefill", "K", "N", "stop", "confidence", "policy")),
    draft=LINE | dict(step="count", token="count", q="number", confidence="number", u="uniform"),
    verify=LINE | dict(step="count", token="count", p="number", q="number", a="number",
                       u="uniform?", accepted="flag?"),
    own=LINE | dict(kind=("plain", "residual", "bonus"), token="count", probability="number",
                    u="uniform", p="number", q="number", mass="positive"),
    emit=LINE | dict(tokens="counts"),
    optimise=LINE | dict(position="count", M="count", D="numberss", skipped="texts", skip="counts"),
    times=LINE | dict(draft="positive", verify="positive", optimise="positive"),
    end=dict(event="text", reason=("stop", "length"), emitted="count"))


def holds(kind: str | tuple, value: Any) -> bool:
    """Is the value of this kind, or one of the words?"""
    if isinstance(kind, tuple):
        return value in kind
    if kind.endswith("?"):
        return value is None or holds(kind[:-1], value)
    if kind.endswith("s"):
        return type(value) is list and all(holds(kind[:-1], each) for each in value)
    return KINDS[kind](value)


def short(value: Any) -> str:
    """A value from a file as a message may show it: on one line, of a bounded length."""
    said = ascii(value)
    return said if len(said) <= 60 else said[:57] + "..."


def match(line: dict, fields: dict, where: str) -> None:
    """Raise UsageError unless `line` has exactly these fields and each holds what it may."""
    for name, kind in fields.items():
        if name not in line:
            raise UsageError(f"{where}: missing field {name!r}")
        value = line[name]
        if not holds(kind, value):
            raise UsageError(f"{where}: {name} is {short(value)}; {kind} wanted (TRACE.md)")
    if len(line) > len(fields):
        raise UsageError(f"{where}: unknown field {short(min(line.keys() - fields.keys()))}")


def lines_of(file: Iterable[bytes]) -> list[dict]:
    """The lines of a trace, a JSON object each, held against the grammar alone. Raises UsageError,
    with the line's number: files come from other programs."""
    lines = []
    grammar = dict(header=HEADER)
    V = math.inf
    for number, raw in enumerate(file, 1):
        where = f"line {number}"
        try:
            line = json.loads(raw)
            event = line["event"]
            fields = grammar[event]
        except (ValueError, RecursionError, TypeError, LookupError):
            raise UsageError(f"{where}: {short(raw)}, where a JSON object is wanted whose event is "
                             f"one of {', '.join(grammar)}") from None
        match(line, fields, f"{where}, {event}")
        if event == "header":
            for part, fields in dict(config=CONFIG, settings=SETTINGS).items():
                match(line[part], fields, f"{where}, {part}")
            grammar = EVENTS
            V = line["config"]["V"]
        for token in [line.get("token", 0), *line.get("tokens", ())]:
            if token >= V:
                raise UsageError(f"{where}, {event}: token {token} of {V}")
        lines.append(line)
    if not lines:
        raise UsageError("empty; a trace begins with a header")
    return lines
