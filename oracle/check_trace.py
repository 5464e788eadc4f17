"""Is this trace what CLaSp does? Replays a trace, written by any implementation, against this one.

    python oracle/check_trace.py FILE [--model DIR] [--dtype D] [--device DEVICE] [--tolerance X]
                                      [--rounds A-B]

The replay is *teacher-forced*: every pass reads the tokens that the trace names, skips the layers
that it names and hands on the states that its table names. So one step at a time is compared, and
the first departure reported is the first error, not what an earlier rounding made of the rest. It
goes on after departures in numbers, since their pattern tells where to look. TRACE.md says what
each line must hold; `RULES` names what is checked, and each method of `Check` checks one kind
of line, in the order in which they come.

Exit status: 0 no departure, 1 departure, 2 not a trace that can be checked, 3 no departure in a
trace that breaks off before its `end`.
"""
import sys
from pathlib import Path

if __name__ == "__main__":
    # Instead of this folder, whose trace.py would stand before the standard library's.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse  # noqa: E402
import functools  # noqa: E402
import itertools  # noqa: E402
import math  # noqa: E402
from collections import Counter  # noqa: E402
from collections.abc import Callable, Iterator, Sequence  # noqa: E402
from dataclasses import asdict  # noqa: E402
from typing import Any  # noqa: E402

from command.cli import Parser, UsageError, answered, number  # noqa: E402
from command.flags import DEMO, DTYPES  # noqa: E402
from dp_layer_skip import Choice  # noqa: E402
from llama import Llama, ModelError, Tensor, read_config, torch  # noqa: E402
from oracle import alike, diagnosis, trace  # noqa: E402
from oracle.allowed import allowed, distance, drawn_by, owed  # noqa: E402
from oracle.diagnosis import RULES, Departure  # noqa: E402
from oracle.trace import indices, lines_of, short  # noqa: E402
from policy.probe import choose_by  # noqa: E402
from speculative import Settings, read  # noqa: E402

# X: how far two correct programs may be apart in a probability at temperature 1. Logits may then be
# apart by 4 X, the slope of a softmax being 1/4 at most, and cosines by X / 4, as was measured
# (TRACE.md, "Tolerance").
TOLERANCE = {"float64": 1e-9, "float32": 2e-5, "bfloat16": 0.1}
EXACT = 1e-9                 # for arithmetic on numbers that stand in the trace themselves
ROUNDED = 1e-6               # ... in float32, of the size of its terms
SIGMAS = 4.0                 # of a sum over a trace; one right trace in 10,000 is further off
DEPARTED, INCOMPLETE = 1, 3  # exit statuses
# After a departure from one of these the trace itself says how it goes on.
NUMERIC = {"confidence", "q", "p", "draw", "ratio", "own", "residual", "column", "table", "choice",
           "repeats", "independent", "kept"}


class Ended(Exception):
    """DEPARTED: how the trace goes on is not known. INCOMPLETE: the file ends before the trace."""


def ways(skipped: Sequence[str], h: Tensor, run_layer: Callable[[int, Tensor], Tensor], M: int,
         near: Callable[[Tensor, Tensor], Tensor]) -> Iterator[list[dict[str, float]]]:
    """The recurrence of dp_layer_skip.table, row by row, but its choices are `skipped`. Of each
    cell: how near it comes if layer i-1 is run ("0") and if it is skipped ("1"), if it can be."""
    g = h[:1]
    yield [{"0": 1.0}]
    for i in range(1, len(h)):
        run = run_layer(i - 1, g)
        row = [{"0": value} for value in near(run, h[i]).tolist()] + [{}]
        for j, value in enumerate(near(g, h[i]).tolist()):
            row[j + 1]["1"] = value
        row = row[:min(i, M) + 1]
        yield row
        states = [g[j - 1] if skipped[i][j] == "1" else run[j] for j in range(1, len(row))]
        g = torch.stack([h[i], *states])


class Check:
    """This implementation, led along the trace. Its names are those of speculative.generate."""

    def __init__(self, lines: list[dict], model: Llama, X: float,
                 rounds: tuple[float, float] = (0, math.inf)) -> None:
        self.header, *rest = lines
        said = self.header["settings"]
        self.lines = iter(rest)
        self.number = 1                                # of the line looked at
        self.now = self.header                         # ... which is {} after the last,
        self.event = "header"                          # ... and of this kind, or ""
        self.model = model
        self.rounds = rounds                           # those to check
        self.s = Settings(said["temperature"], said["top_k"], said["top_p"], said["N"],
                          tuple(said["stop_ids"]))     # what makes the distribution
        self.K, self.M, self.threshold, self.interval, self.r = [
            said[name] for name in ("K", "M", "exit_threshold", "interval", "r")]
        # What the settings leave open a policy decides; it may be any.
        self.free = None in (self.K, self.M, self.threshold, self.interval)
        self.X = X
        # Below temperature 1 a difference of two logits is that much larger.
        self.slack = X / min(1, self.s.temperature or 1)
        self.text = list(self.header["prompt_ids"])
        self.start = len(self.text)
        self.end = self.start + self.s.N
        self.cached = 0
        self.cache = model.cache(self.end + (model.cfg.L + 1) * min(self.r, self.end))
        self.table: Choice | None = None               # the last
        self.round = 0
        self.step: int | None = None
        self.reason = ""                               # why the text has ended
        self.checked: Counter[str] = Counter()         # rule: how often
        self.largest: Counter[str] = Counter()         # ... and the largest difference seen
        self.departures: list[Departure] = []
        self.uniforms: list[float] = []
        self.pairs: list[tuple[float, float]] = []     # a draw's number, its verdict's
        self.corrections: list[tuple[float, float]] = []           # a rejection's, its correction's
        self.surprises: list[tuple[float, float]] = []

    def depart(self, rule: str, field: str, theirs: Any, ours: Any, slack: float = 0.0,
               note: str = "", hint: str = "") -> None:
        """A departure: the end of the check, if how the trace goes on is not known. `hint`: where
        to look, if the place itself tells."""
        step = f", step {self.step}" if self.step is not None else ""
        notes = "; ".join(filter(None, (f"tolerance {slack:.3g}" if slack else "", note)))
        said = (f"line {self.number}, round {self.round}{step}: {field}: "
                f"trace {short(theirs)}, ours {short(ours)}" + (f" ({notes})" if notes else ""))
        self.departures.append(Departure(rule, field, self.number, self.now, said, hint))
        if rule not in NUMERIC:
            raise Ended(DEPARTED)

    def equal(self, rule: str, field: str, theirs: Any, ours: Any, **more: Any) -> None:
        self.checked[rule] += 1
        if theirs != ours:
            self.depart(rule, field, theirs, ours, **more)

    def met(self, rule: str, off: float) -> None:
        """A number has been compared, and was so far off."""
        self.checked[rule] += 1
        self.largest[rule] = max(self.largest[rule], off)

    def close(self, rule: str, field: str, theirs: float, ours: float, slack: float,
              **more: Any) -> None:
        self.met(rule, abs(theirs - ours))
        if not abs(theirs - ours) <= slack:
            self.depart(rule, field, theirs, ours, slack, **more)

    def advance(self) -> None:
        """Look at the next line."""
        self.number += 1
        self.now = next(self.lines, {})
        self.event = self.now.get("event", "")

    def take(self, event: str, **want: Any) -> dict:
        """The line looked at, which must be of this kind and hold this."""
        if not self.now:
            raise Ended(INCOMPLETE)
        for name, ours in dict(event=event, **want).items():
            self.equal("order", name, self.now.get(name), ours)
        return self.now

    def run(self) -> int:
        """-> 0, or why the check could not go on to the trace's end."""
        status = 0
        try:
            self.check_rounds()
        except Ended as e:
            status = e.args[0]
        self.check_whole()
        return status

    def check_rounds(self) -> None:
        for name, value in asdict(self.model.cfg).items():
            theirs = self.header["config"][name]
            if not alike(value, theirs, least=0.0):    # a program may keep it in float32
                self.depart("header", f"config.{name}", theirs, value)
        self.advance()
        first, last = self.rounds
        if first > 0:
            self.pass_over(first)
        for self.round in itertools.count(first):
            self.check_round()
            if self.reason:
                break
            if self.round == last:
                return
        line = self.take("end")
        self.equal("end", "reason", line["reason"], self.reason)
        self.equal("end", "emitted", line["emitted"], len(self.text) - self.start)
        self.advance()
        self.equal("end", "event", self.event, "")

    def pass_over(self, first: int) -> None:
        """Take text and sets of the rounds before `first` as they stand, in one pass."""
        while self.now and self.now.get("round", first) < first:
            if self.event == "emit":
                self.text += self.now["tokens"]
            if self.event == "optimise":
                self.check_shape(self.now)
            self.advance()
        if self.event != "round" or len(self.text) >= self.end:
            raise UsageError(f"line {self.number}: no round {first} follows")
        self.cached = len(self.text) - 1
        read(self.model, self.text[:-1], 0, self.cache)

    def check_round(self) -> None:
        self.check_begin()
        drafts = self.check_drafts()
        drafted = [d["token"] for d in drafts]
        k = len(drafts)
        h = read(self.model, self.text[self.cached:] + drafted, self.cached, self.cache)
        h = torch.stack([x[-(k + 1):] for x in h])                          # (L+1, k+1, D)
        self.logits = self.model.head(h[-1])                                # (k+1, V)
        accepted = self.check_verdicts(drafts)
        own = self.check_own(drafts, accepted)
        self.check_emit([*drafted[:accepted], own])
        self.check_table(h[:, accepted])
        if self.event == "times":
            self.take("times", round=self.round)
            self.advance()

    def check_begin(self) -> None:
        self.begin = self.take("round", round=self.round)
        self.equal("start", "start", self.begin["start"], len(self.text))
        skip = self.begin["skip"]
        self.equal("skip", "skip", skip, self.set_of(len(skip) if self.M is None else self.M))
        self.advance()

    def set_of(self, j: int) -> list[int]:
        """The set for budget j by the last table."""
        if self.table is None:
            return []
        return indices(self.table.skip(min(j, len(self.table.skipped[-1]) - 1)))

    def check_drafts(self) -> list[dict]:
        """-> the draft's lines. Keeps the logits (V,) that each token was drawn from."""
        left_out = [i in self.begin["skip"] for i in range(self.model.cfg.L)]
        drafts: list[dict] = []
        self.draft_logits: list[Tensor] = []
        while self.goes_on(drafts):
            line = self.take("draft", round=self.round, step=self.step)
            last = drafts[-1]["token"] if drafts else self.text[-1]
            ids = torch.tensor([last], device=self.model.device)
            rows = self.cache.sequence(len(self.text) - 1 + self.step, 1)
            logits = self.model.head(self.model.forward(ids, rows, self.cache, left_out)[-1])[0]
            self.close("confidence", "confidence", line["confidence"],
                       logits.softmax(-1).amax().item(), self.X)
            of_q = self.nearest(logits, "q")
            self.check_draw([(q, None) for q in of_q], self.slack)
            if of_q[0][line["token"]] > 0:
                self.surprises.append(diagnosis.surprise(of_q[0], line["token"]))
            drafts.append(line)
            self.draft_logits.append(logits)
            self.advance()
        self.step = None
        return drafts

    def goes_on(self, drafts: list[dict]) -> bool:
        """Is the line looked at one more draft, and should it be? And is what ended it said?"""
        k = len(drafts)
        self.step = k
        left = self.end - len(self.text) - 1
        last = drafts[-1] if drafts else dict(token=None, confidence=math.inf)
        above = last["confidence"] - self.threshold if self.threshold else math.inf
        # Must it end here, or may it (None)? So it may within the tolerance of the threshold.
        ends = dict(prefill=self.round == 0, K=k == self.K, N=k == left,
                    stop=last["token"] in self.s.stop_ids,
                    confidence=True if above < -self.X else None if above < self.X else False,
                    policy=None if self.free and self.round > 0 else False)
        reasons = [name for name, so in ends.items() if so is not False]
        note = (f"{k} of at most {left if self.K is None else min(self.K, left)} drafted, "
                f"confidence {last['confidence']:.3g}, threshold {self.threshold}")
        event = self.event
        if event == "draft":
            if True in ends.values():
                self.depart("exit", "event", event, "the end of the draft", note=note)
            return True
        if not self.now:
            raise Ended(INCOMPLETE)
        if not reasons:
            self.depart("exit", "event", event, "draft", note=note)
        if self.begin["ended"] not in reasons:
            self.step = None
            self.number -= k + 1                 # the round's line
            self.depart("exit", "ended", self.begin["ended"], " or ".join(reasons), note=note)
        return False

    def nearest(self, logits: Tensor, field: str, about: Sequence[int] = ()) -> list[Tensor]:
        """Of the distributions that rounding allows those whose probability of the token is near
        enough to what the line says in p or q; before them the nearest."""
        line = self.now
        token = line["token"]
        options = allowed(logits, self.s, self.X, [token, *about])
        off = [abs(line[field] - each[token].item()) for each in options]
        best = options[off.index(min(off))]
        rule = "own" if self.event == "own" else field
        note = ""
        if min(off) > self.slack and (rule == "q" or line.get("kind") in ("plain", "bonus")):
            note = f"ours draws token {drawn_by(best, line['u'])} by this u"
        self.close(rule, field, line[field], best[token].item(), self.slack, note=note)
        return [best, *(each for each, d in zip(options, off) if d <= self.slack)]

    def check_draw(self, options: list[tuple[Tensor, Tensor | None]], slack: float) -> None:
        """The line looked at has drawn its token by its u from one of these (p, q)."""
        token, u = self.now["token"], self.now["u"]
        self.uniforms.append(u)
        off = min(distance(*each, token, u) for each in options)
        self.met("draw", off)
        if off > slack:
            self.depart("draw", "token", token, drawn_by(owed(*options[0]), u), slack)

    def check_verdicts(self, drafts: list[dict]) -> int:
        """-> how many of the drafted tokens were accepted."""
        accepted = 0
        rejected = False
        for self.step, d in enumerate(drafts):
            line = self.take("verify", round=self.round, step=self.step, token=d["token"])
            p, q, a, u = (line[name] for name in "pqau")
            self.nearest(self.logits[self.step], "p")
            self.equal("ratio", "q", q, d["q"],
                       hint="the verdict: a token is judged by the q that it was drawn from")
            self.close("ratio", "a", a, min(1.0, p / q) if q else math.inf, EXACT,
                       note="in float64")
            if u is not None:
                self.uniforms.append(u)
                self.pairs.append((d["u"], u))
            if rejected:
                self.equal("verdict", "accepted", line["accepted"], None)
            else:
                self.equal("verdict", "u given", u is not None, True)
                self.equal("verdict", "accepted", line["accepted"], u < a)
                self.last_u = u
                rejected = not line["accepted"]
                accepted += not rejected
            self.advance()
        self.step = None
        return accepted

    def check_own(self, drafts: list[dict], accepted: int) -> int:
        """-> the full model's own token."""
        line = self.take("own", round=self.round)
        rejected = accepted < len(drafts)
        self.equal("kind", "kind", line["kind"],
                   "residual" if rejected else "bonus" if drafts else "plain")
        about = [drafts[accepted]["token"]] if rejected else []
        of_p = self.nearest(self.logits[accepted], "p", about)
        of_q: list[Tensor | None] = [None]
        if rejected:
            of_q = self.nearest(self.draft_logits[accepted], "q", about)
            self.corrections.append((self.last_u, line["u"]))
        else:
            self.equal("own", "q", line["q"], 0)
        options = list(itertools.product(of_p, of_q))
        masses = [1.0 if q is None else owed(p, q).sum().item() for p, q in options]
        mass = min(masses, key=lambda mass: abs(mass - line["mass"]))
        slack = 2 * self.slack if rejected else 0.0
        self.close("own", "mass", line["mass"], mass, slack)
        self.check_probability(line)
        self.check_draw(options, slack or self.slack)
        self.advance()
        return line["token"]

    def check_probability(self, line: dict) -> None:
        """... of an own token, by what its own line says. So it is exact in any type."""
        p, q, mass, probability = (line[name] for name in ("p", "q", "mass", "probability"))
        ours = (p - q) / mass if mass > 0 else p
        hint = "the residual: the token was drawn from p" if probability == p else ""
        if line["kind"] != "residual":
            hint = f"the {line['kind']} token: from which row of p it is drawn"
        slack = ROUNDED * (p + q) / (mass or 1.0)
        self.close("residual", "probability", probability, ours, slack, hint=hint)
        if mass > 0 and q >= p:
            self.depart("residual", "q", q, f"less than p, {p}")

    def check_emit(self, tokens: list[int]) -> None:
        stops = [n for n, token in enumerate(tokens) if token in self.s.stop_ids]
        if stops:
            tokens = tokens[:stops[0] + 1]
        self.equal("emit", "tokens", self.take("emit", round=self.round)["tokens"], tokens)
        self.text += tokens
        self.cached = len(self.text) - 1
        if stops or len(self.text) == self.end:
            self.reason = "stop" if stops else "length"
        self.advance()

    def check_table(self, probe: Tensor) -> None:                           # (L+1, D)
        event = self.event
        due = (self.K != 0 and self.M != 0 and self.round % (self.interval or 1) == 0
               and not self.reason)
        if event != "optimise" and (self.free or not due):
            return
        if event and due != (event == "optimise"):
            self.depart("interval", "event", event, "optimise" if due else "none")
        line = self.take("optimise", round=self.round)
        # subtle: not the last token of the text, which is emitted and not yet read
        self.equal("probe", "position", line["position"], len(self.text) - 2)
        M = self.check_shape(line)
        rows, _ = choose_by(self.r, functools.partial(ways, line["skipped"]), self.model,
                            self.cache, self.text[:-1], probe, M)
        self.check_cells(list(rows), line)
        self.equal("path", "skip", line["skip"], self.set_of(M))
        self.advance()

    def check_shape(self, line: dict) -> int:
        """Keep a table's choices, if it has all; -> its M."""
        L = self.model.cfg.L
        M = min(line["M"], L) if self.M is None else self.M
        self.equal("shape", "M", line["M"], M)
        shape = [min(i, M) + 1 for i in range(L + 1)]
        for name in ("D", "skipped"):
            self.equal("shape", f"entries per line of {name}", [len(x) for x in line[name]], shape)
        for i, row in enumerate(line["skipped"]):
            for j, bit in enumerate(row):
                ways = "0" if j == 0 else "1" if j == i else "01"       # nothing, or all skipped
                if bit not in ways:
                    self.depart("shape", f"skipped[{i}][{j}]", bit, ways)
        skipped = [[bit == "1" for bit in row] for row in line["skipped"]]
        self.table = Choice(line["D"], skipped, torch.empty(0))
        return M

    def check_cells(self, ways: list[list[dict[str, float]]], line: dict) -> None:
        """A whole table is compared before a word is said of it: which cells depart tells why."""
        slack = self.X / 4
        off = {}
        wrong = []                                     # what is to be said
        cells = [(i, j, near) for i, row in enumerate(ways) for j, near in enumerate(row)]
        for i, j, near in cells:
            bit = line["skipped"][i][j]
            D = line["D"][i][j]
            best = max(near, key=near.get)
            self.checked["choice"] += 1
            # A value that neither way has is no wrong choice: the table itself is wrong.
            if near[best] - near[bit] > slack >= min(abs(D - value) for value in near.values()):
                wrong.append(("choice", f"skipped[{i}][{j}]", bit, best, slack,
                              f"cosines {near[bit]:.9g} and {near[best]:.9g}"))
            rule = "table" if j > 0 else "column"
            self.met(rule, abs(D - near[bit]))
            if not abs(D - near[bit]) <= slack:
                off[i, j] = abs(D - near[bit])
                wrong.append((rule, f"D[{i}][{j}]", D, near[bit], slack))
        hint = diagnosis.of_table(off, len(ways) - 1)
        for departure in wrong:
            self.depart(*departure, hint=hint)

    def check_whole(self) -> None:
        """What no line shows: are the uniform numbers independent, and all drafts judged?"""
        self.step = None
        if self.s.temperature == 0:
            return
        self.equal("repeats", "numbers that repeat an earlier one",
                   diagnosis.repeated(self.uniforms), 0, note=f"of {len(self.uniforms)}")
        for what, pairs in (("a draw's with its verdict's", self.pairs),
                            ("a rejection's with its correction's", self.corrections),
                            ("neighbours", list(itertools.pairwise(self.uniforms)))):
            self.close("independent", f"correlation of numbers, {what}",
                       round(diagnosis.correlated(pairs), 2), 0.0, SIGMAS, note="its sigmas")
        off, variance = map(sum, zip((0, 1e-300), *self.surprises))
        self.close("kept", "surprise of drafted tokens", min(0.0, round(off / variance ** 0.5, 2)),
                   0.0, SIGMAS, note="its sigmas")

    def report(self, status: int) -> str:
        """What is said of a trace: its first departure, which others there are, where to look."""
        rounds = f"{self.round + 1} rounds, {len(self.text) - self.start} tokens"
        if self.rounds != (0, math.inf):
            rounds = f"rounds {self.rounds[0]} to {self.round}"
        if not self.departures and status == INCOMPLETE:
            return (f"incomplete: no departure in {self.number - 1} lines, and they break "
                    f"off in round {self.round}")
        if not self.departures:
            seen = [f"{rule} {self.largest[rule]:.1e}" for rule in ("p", "q", "table")]
            return f"no departure in {rounds}; largest difference in {', '.join(seen)}"
        first = self.departures[0]
        where = diagnosis.look_at(self.departures, self.checked, self.s.temperature > 0)
        said = [first.said, f"rule {first.rule}: {RULES[first.rule][1]}", f"look at: {where}"]
        departed = Counter(d.rule for d in self.departures)
        checked = [rule for rule in RULES if rule in NUMERIC and self.checked[rule]]
        counts = [f"{rule} {departed[rule]} of {self.checked[rule]}" for rule in checked
                  if departed[rule]]
        right = [rule for rule in checked if not departed[rule]]
        if counts:
            said.append(f"departures in {rounds}: {', '.join(counts)}; none in {', '.join(right)}")
        if status == DEPARTED and self.number != first.number:
            said.append(f"it ends in line {self.number}: from there it is not known how the "
                        "trace goes on")
        return "\n".join(said)


def prepare(lines: list[dict], a: argparse.Namespace) -> Check:
    """The header: is this a trace of the model at hand, of a size it can have?"""
    h = lines[0]
    cfg = read_config(a.model)
    prompt, said = h["prompt_ids"], h["settings"]
    dtype = a.dtype or h["dtype"]
    X = a.tolerance or max(TOLERANCE[dtype], TOLERANCE[h["dtype"]])
    T = said["temperature"]
    for wrong, what in (
            ((said["M"] or 0) > cfg.L, f"M is {said['M']}; the model has {cfg.L} layers"),
            (not prompt or max(prompt) >= cfg.V, f"prompt_ids: one or more below {cfg.V} wanted"),
            (len(prompt) + said["N"] > cfg.context, f"{len(prompt)} prompt tokens and N = "
             f"{said['N']} exceed the model's context of {cfg.context}"),
            (0 < T < 2 * X, f"at temperature {T} a tolerance of {X:g} is one of {X / (T or 1):g}, "
             "which checks nothing; trace at 0, or in float64")):
        if wrong:
            raise UsageError(f"line 1: {what}")
    if cfg.L * cfg.D * cfg.ffn < 1e7:
        torch.set_num_threads(1)                       # as the command: a second one costs more
    model = Llama.load(a.model, a.device, DTYPES[dtype])
    theirs = h["model"]
    ours = trace.fingerprint(a.model)
    differ = [short(name) for name in ours | theirs if ours.get(name) != theirs.get(name)]
    if differ:
        raise UsageError(f"line 1: a trace of another model than {a.model}, which --model names: "
                         f"SHA-256 of {', '.join(differ)}")
    return Check(lines, model, X, a.rounds)


def add_model(p: Parser) -> None:
    """The flags that say which model is asked, and where it runs."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    p.add_argument("--model", metavar="DIR", default=str(DEMO),
                   help="its Hugging Face folder (default: the demo)")
    p.add_argument("--device", choices=devices, default="cpu", help="(cpu)")


@answered
@torch.inference_mode()
def main(argv: Sequence[str] | None) -> int:
    p = Parser(prog="check_trace.py", allow_abbrev=False, description="Check a trace of CLaSp "
               "against this implementation (oracle/TRACE.md).")
    p.add_argument("file", metavar="FILE")
    add_model(p)
    p.add_argument("--tolerance", metavar="X", help="of a probability (TRACE.md, Tolerance)",
                   type=number(float, "a number above 0 and below 1", lambda v: 0 < v < 1))
    p.add_argument("--dtype", choices=list(TOLERANCE), help="of the replay (the trace's)")
    p.add_argument("--rounds", metavar="A-B", default=(0, math.inf),
                   help="check these alone; the text before them is read in one pass",
                   type=number(lambda text: tuple(map(int, text.split("-"))),
                               "two rounds such as 10-20",
                               lambda v: len(v) == 2 and 0 <= v[0] <= v[1]))
    a = p.parse_args(argv)
    try:
        with open(a.file, "rb") as file:
            check = prepare(lines_of(file), a)
            status = check.run()
    except (UsageError, ModelError) as e:
        raise UsageError(f"{a.file}: {e}") from None
    except OSError as e:                               # 1 is a departure, and this is none
        raise UsageError(f"{e.filename}: {e.strerror}") from None
    print(f"{a.file}: {check.report(status)}")
    return DEPARTED if check.departures else status


if __name__ == "__main__":
    sys.exit(main())
