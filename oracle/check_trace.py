"""Is this trace what CLaSp does? Replays a trace, written by any implementation, against this one.

    python oracle/check_trace.py FILE [--model DIR] [--tolerance X] [--dtype D] [--device DEVICE]
    python oracle/check_trace.py FILE --survey
    python oracle/check_trace.py FILE --dump-at ROUND[,STEP] --out DUMP

The replay is *teacher-forced*: every pass reads the tokens that the trace names, skips the layers
that it names and hands on the states that its table names. So one step at a time is compared, and
the first departure reported is the first error, not what an earlier rounding made of the rest.
TRACE.md says what each line must hold; `RULES` names what is checked here, and each method of
`Check` checks one kind of line, in the order in which they come.

--survey goes on after a departure in a number and says what the pattern means. --dump-at writes
what the replay has there as a forward dump: after a step's draft, or a round's verify.

Exit status: 0 no departure, 1 departure, 2 not a trace that can be checked, 3 no departure in a
trace that breaks off before its `end`.
"""
import sys
from pathlib import Path

if __name__ == "__main__":
    # Instead of this folder, whose trace.py would stand before the standard library's.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse  # noqa: E402
import itertools  # noqa: E402
import math  # noqa: E402
from collections import defaultdict  # noqa: E402
from collections.abc import Callable, Iterator, Sequence  # noqa: E402
from dataclasses import asdict, replace  # noqa: E402
from functools import partial  # noqa: E402
from typing import Any  # noqa: E402

from command.cli import Parser, UsageError, answer, number, numbers  # noqa: E402
from command.flags import DEMO, DTYPES  # noqa: E402
from dp_layer_skip import Choice  # noqa: E402
from llama import Config, Llama, ModelError, Tensor, torch  # noqa: E402
from oracle import trace  # noqa: E402
from oracle.dump_forward import save_dump  # noqa: E402
from oracle.survey import Tally, repeated, survey  # noqa: E402
from oracle.trace import Invalid, Lines, Recording, short  # noqa: E402
from policy.probe import choose_by  # noqa: E402
from speculative import Settings, probabilities, read, residual  # noqa: E402

# X: how far two correct programs may be apart in a probability at temperature 1. Logits may then be
# apart by 4 X, the slope of a softmax being 1/4 at most, and cosines by X / 4, as was measured
# (TRACE.md, "Tolerance").
TOLERANCE = {"float64": 1e-9, "float32": 2e-5, "bfloat16": 0.1}
EXACT = 1e-9                 # for arithmetic on numbers that stand in the trace themselves
RULES = dict(
    header="the sizes are those of config.json",
    order="lines come in their order, all drafts of a round before its verifies; steps from 0",
    start="start is the number of tokens of text before the round",
    skip="the set of the last table for M layers, or for as many as a policy takes; at first none",
    exit="a draft ends at K, N, a stop token, a confidence below the threshold, or by a policy",
    confidence="confidence is the draft's highest probability at temperature 1, unfiltered",
    q="q is the draft's probability of the token: top-k, temperature, then top-p",
    p="p is the full model's probability of the token, by the same function as q",
    draw="the token is the first whose running sum of probability, by id, exceeds u times the sum",
    ratio="a = min(1, p / q) of the p and q beside it, and q is the one of the draft line",
    verdict="a token is accepted if u < a, strictly; after a rejection nothing is judged",
    kind="the own token is plain if nothing was drafted, bonus if all was accepted, else residual",
    own="probability is that of the own token in p, or for a residual in norm(max(0, p - q))",
    emit="emitted are the accepted tokens and the own one, cut after the first stop token",
    interval="a table after round 0 and every interval rounds, if K, M > 0 and the text goes on",
    probe="the probe is the last position read whose prediction was emitted",
    column="D[i][0] is about 1; else this candidate's position, mask or slot is not the verify's",
    table="D[i][j] is how near h[i] the state of the cell is",
    choice="a cell has the nearer of its two states; on a tie the layer is skipped",
    path="skip is read back from D[L][M]",
    end="the text ends after a stop token or N tokens, its line says which, and nothing follows")
# After a departure from one of these the trace itself says how it goes on.
NUMERIC = {"confidence", "q", "p", "draw", "ratio", "own", "column", "table", "choice"}


class Departure(Exception):
    """The trace and this implementation differ: `args` are the lines that say where and how."""


class Incomplete(Exception):
    """The file ends, in whole lines, before the trace does."""


class Reached(Exception):
    """The replay has come to the place of --dump-at and written what it has there."""


def allowed(logits: Tensor, s: Settings, X: float, about: Sequence[int]) -> list[Tensor]:
    """(V,) logits -> the distributions (V,) that a correct program may have made of them. Ours
    first; then those where of two logits 4 X apart, on either side of the edge of an argmax, top-k
    or top-p, the other is kept, with top-k also both or none; and where the mass that top-p cuts at
    is X more or less. Of many such logits three on each side are tried, those `about` first."""
    out = [probabilities(logits, s)]
    if s.temperature > 0 and s.top_k == 0 and s.top_p == 1:
        return out                                     # nothing is cut off
    plain = replace(s, temperature=s.temperature or 1.0, top_k=0, top_p=1.0)
    ties = s.temperature > 0 and s.top_k > 0

    def near(which: Tensor) -> list[list[int]]:
        """Three such tokens, [i] each."""
        return sorted(which.nonzero().tolist(), key=lambda i: i[0] not in about)[:3]

    for off in (0, -X, X) if s.temperature > 0 and s.top_p < 1 else (0,):
        top_p = min(1.0, max(s.top_p + off / min(1, s.temperature or 1), 1e-300))
        kept = probabilities(logits, replace(s, top_p=top_p)) > 0
        edge = logits[kept].amin()                     # of the last token kept
        more = near(~kept & (logits >= edge - 4 * X))
        less = near(kept & (logits <= edge + 4 * X))
        changes = [([], []), *itertools.product(more, less)]
        if ties:
            changes += [(i, []) for i in more]
        if ties and kept.sum() > s.top_k:
            changes += [([], j) for j in less]
        for i, j in changes:
            changed = kept.clone()
            changed[i] = True
            changed[j] = False
            out.append(probabilities(logits.masked_fill(~changed, -torch.inf), plain))
    return out


def owed(p: Tensor, q: Tensor | None) -> Tensor:                    # (V,), (V,) -> (V,) float64
    """What a token is drawn from: p, or given q what a rejection still owes. Not normalised, since
    where little is owed rounding is a large part of it, and must be allowed to be."""
    return p.double() if q is None else (p.double() - q.double()).clamp(min=0)


def draws(p: Tensor, q: Tensor | None, token: int, u: float, slack: float) -> bool:
    """Does u draw `token`, if every running sum may be off by `slack`?"""
    weights = owed(p, q)
    cdf = weights.cumsum(0)
    below = cdf[token] - weights[token]
    # Of no width is the interval of an excluded token, and u = 0 may touch it.
    return bool(p[token] > 0 and below - slack <= u * cdf[-1] < cdf[token] + slack)


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

    def __init__(self, lines: Lines, model: Llama, header: dict, X: float, a: argparse.Namespace
                 ) -> None:
        said = header["settings"]
        self.header = header
        self.lines = lines
        self.model = model
        self.s = Settings(said["temperature"], said["top_k"], said["top_p"], said["N"],
                          tuple(said["stop_ids"]))     # what makes the distribution
        self.K, self.M, self.threshold, self.interval, self.r = [
            said[name] for name in ("K", "M", "exit_threshold", "interval", "r")]
        # What the settings leave open a policy decides; it may be any.
        self.free = None in (self.K, self.M, self.threshold, self.interval)
        self.a = a
        self.X = X
        # Below temperature 1 a difference of two logits is that much larger.
        self.slack = X / min(1, self.s.temperature or 1)
        self.text = list(header["prompt_ids"])
        self.end = len(self.text) + self.s.N
        self.cached = 0
        self.cache = model.cache(self.end + (model.cfg.L + 1) * min(self.r, self.end))
        self.choice: Choice | None = None              # the last table's
        self.round = 0
        self.step: int | None = None
        self.reason = ""                               # why the text has ended
        self.tally = {rule: Tally() for rule in RULES}
        self.outcomes: list[tuple[int, int]] = []      # of each round: drafted, accepted
        self.uniforms: list[float] = []
        self.taken: dict[str, list[dict]] = defaultdict(list)      # this round's lines, by event

    def depart(self, rule: str, field: str, theirs: Any, ours: Any, slack: float = 0.0,
               note: str = "", final: bool = False) -> None:
        """A departure: the end of the check, or of a survey if how it goes on is not known."""
        step = f", step {self.step}" if self.step is not None else ""
        notes = "; ".join(filter(None, (f"tolerance {slack:.3g}" if slack else "", note)))
        what = (f"line {self.lines.number}, round {self.round}{step}: {field}: "
                f"trace {short(theirs)}, ours {short(ours)}" + (f" ({notes})" if notes else ""))
        kind = self.lines.now.get("kind", self.lines.event)
        self.tally[rule].departed.append((self.lines.number, self.round, kind))
        if final or rule not in NUMERIC or not (self.a.survey or self.a.dump_at):
            raise Departure(what, f"rule {rule}: {RULES[rule]}")

    def equal(self, rule: str, field: str, theirs: Any, ours: Any, **more: Any) -> None:
        self.tally[rule].checked += 1
        if theirs != ours:
            self.depart(rule, field, theirs, ours, **more)

    def close(self, rule: str, field: str, theirs: float, ours: float, slack: float,
              note: str = "", scale: float = 1.0) -> None:
        """... within `slack` where `scale` is 1: a part of less mass is known less exactly."""
        off = abs(theirs - ours) * scale
        tally = self.tally[rule]
        tally.checked += 1
        tally.largest = max(tally.largest, off)
        if not off <= slack:
            self.depart(rule, field, theirs, ours, slack / scale if scale else slack, note)

    def drawn(self, rule: str, field: str, options: list[tuple[Tensor, Tensor | None]]) -> None:
        """The line looked at has drawn its token from one of these (p, q): one gives it the
        probability that the line says, and from such a one its u draws it. In this order, so that a
        wrong distribution is told from a wrong way to draw."""
        line = self.lines.now
        token, u = line["token"], line["u"]
        self.uniforms.append(u)
        tolerance = self.slack if options[0][1] is None else 2 * self.slack
        masses = [1.0 if q is None else owed(p, q).sum().item() for p, q in options]
        off = [abs(line[field] * mass - owed(p, q)[token].item())
               for (p, q), mass in zip(options, masses)]
        best = off.index(min(off))
        p, q = options[best]
        dist = p if q is None else residual(p, q)
        ours = Recording(lambda: u).draw(dist)
        instead = "" if ours == token else f"ours draws token {ours} by this u"
        # Of no mass at all anything is as good; residual then gives p.
        probability = dist[token].item() if masses[best] else line[field]
        self.close(rule, field, line[field], probability, tolerance, instead, masses[best])
        fit = [o for o, d in zip(options, off) if d <= tolerance] or [options[best]]
        by_u = any(draws(p, q, token, u, tolerance) for p, q in fit)
        self.equal("draw", "token", token, token if by_u else ours, slack=tolerance)

    def take(self, event: str, **want: Any) -> dict:
        """The line looked at, which must be of this kind and hold this."""
        if not self.lines.now:
            raise Incomplete
        for name, ours in dict(event=event, **want).items():
            self.equal("order", name, self.lines.now.get(name), ours)
        self.taken[event].append(self.lines.now)
        return self.lines.now

    def run(self) -> None:
        for name, value in asdict(self.model.cfg).items():
            theirs = self.header["config"][name]
            if not alike(value, theirs):
                self.depart("header", f"config.{name}", theirs, value)
        self.lines.advance()
        while not self.reason:
            self.check_round()
            self.round += 1
        self.check_end()

    def check_round(self) -> None:
        self.check_begin()
        drafts = self.check_drafts()
        drafted = [d["token"] for d in drafts]
        k = len(drafts)
        h = read(self.model, self.text[self.cached:] + drafted, self.cached, self.cache)
        h = torch.stack([x[-(k + 1):] for x in h])                          # (L+1, k+1, D)
        self.logits = self.model.head(h[-1])                                # (k+1, V)
        if self.a.dump_at == [self.round]:
            self.dump(drafted, self.logits, h, [])
        accepted = self.check_verdicts(drafts)
        own = self.check_own(drafts, accepted)
        self.outcomes.append((k, accepted))
        self.check_emit([*drafted[:accepted], own])
        self.check_table(h[:, accepted])
        if self.lines.event == "times":
            self.take("times", round=self.round)
            self.lines.advance()

    def check_begin(self) -> None:
        self.step = None
        self.taken.clear()
        self.begin = self.take("round", round=self.round)
        self.equal("start", "start", self.begin["start"], len(self.text))
        skip = self.begin["skip"]
        self.equal("skip", "skip", skip, self.way_back(len(skip) if self.M is None else self.M))
        self.lines.advance()

    def way_back(self, j: int) -> list[int]:
        """The set for budget j by the last table."""
        if self.choice is None:
            return []
        return trace.indices(self.choice.skip(min(j, len(self.choice.D[-1]) - 1)))

    def check_drafts(self) -> list[dict]:
        """-> the draft's lines. Keeps the logits (V,) that each token was drawn from."""
        skip = self.begin["skip"]
        left_out = [i in skip for i in range(self.model.cfg.L)]
        drafts: list[dict] = []
        self.draft_logits: list[Tensor] = []
        while self.goes_on(drafts):
            line = self.take("draft", round=self.round, step=self.step)
            drafted = [d["token"] for d in drafts]
            rows = self.cache.sequence(len(self.text) - 1 + self.step, 1)
            ids = torch.tensor((self.text + drafted)[-1:], device=self.model.device)
            h = self.model.forward(ids, rows, self.cache, left_out)
            logits = self.model.head(h[-1])
            if self.a.dump_at == [self.round, self.step]:
                self.dump(drafted, logits, torch.stack(h), skip)
            confidence = logits[0].softmax(-1).amax().item()
            self.close("confidence", "confidence", line["confidence"], confidence, self.X)
            of_q = allowed(logits[0], self.s, self.X, [line["token"]])
            self.drawn("q", "q", [(q, None) for q in of_q])
            drafts.append(line)
            self.draft_logits.append(logits[0])
            self.lines.advance()
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
        state = f"{k} of at most {left if self.K is None else min(self.K, left)} drafted"
        if drafts:
            state += f", confidence {last['confidence']:.3g}, threshold {self.threshold}"
        event = self.lines.event
        if event == "draft":
            if True in ends.values():
                self.depart("exit", "event", event, "the end of the draft", note=state)
            return True
        if not self.lines.now:
            raise Incomplete
        if not reasons:
            self.depart("exit", "event", event, "draft", note=state)
        if self.begin["ended"] not in reasons:
            self.step = None
            self.lines.number -= k + 1                 # the round's line
            self.depart("exit", "ended", self.begin["ended"], " or ".join(reasons), note=state)
        return False

    def check_verdicts(self, drafts: list[dict]) -> int:
        """-> how many of the drafted tokens were accepted."""
        accepted = 0
        rejected = False
        for self.step, d in enumerate(drafts):
            token = d["token"]
            line = self.take("verify", round=self.round, step=self.step, token=token)
            p, q, a, u = (line[name] for name in "pqau")
            of_p = allowed(self.logits[self.step], self.s, self.X, [token])
            ours = min((each[token].item() for each in of_p), key=lambda x: abs(x - p))
            self.close("p", "p", p, ours, self.slack)
            self.equal("ratio", "q", q, d["q"])
            self.close("ratio", "a", a, min(1.0, p / q) if q else math.inf, EXACT, "in float64")
            self.equal("verdict", "u given", u is not None, not rejected)
            self.equal("verdict", "accepted", line["accepted"], None if rejected else u < a)
            if not rejected:
                self.uniforms.append(u)
                rejected = not line["accepted"]
                accepted += not rejected
            self.lines.advance()
        self.step = None
        return accepted

    def check_own(self, drafts: list[dict], accepted: int) -> int:
        """-> the full model's own token."""
        line = self.take("own", round=self.round)
        k = len(drafts)
        kind = "residual" if accepted < k else "bonus" if k > 0 else "plain"
        self.equal("kind", "kind", line["kind"], kind)
        about = [line["token"]]
        of_q = [None]
        if kind == "residual":
            about.append(drafts[accepted]["token"])
            of_q = allowed(self.draft_logits[accepted], self.s, self.X, about)
        of_p = allowed(self.logits[accepted], self.s, self.X, about)
        self.drawn("own", "probability", list(itertools.product(of_p, of_q)))
        self.lines.advance()
        return line["token"]

    def check_emit(self, tokens: list[int]) -> None:
        stops = [n for n, token in enumerate(tokens) if token in self.s.stop_ids]
        if stops:
            tokens = tokens[:stops[0] + 1]
        self.equal("emit", "tokens", self.take("emit", round=self.round)["tokens"], tokens)
        self.text += tokens
        self.cached = len(self.text) - 1
        if stops or len(self.text) == self.end:
            self.reason = "stop" if stops else "length"
        self.lines.advance()

    def check_table(self, probe: Tensor) -> None:                           # (L+1, D)
        L = self.model.cfg.L
        event = self.lines.event
        due = (self.K != 0 and self.M != 0 and self.round % (self.interval or 1) == 0
               and not self.reason)
        if event != "optimise" and (self.free or not due):
            return
        if event and due != (event == "optimise"):
            self.depart("interval", "event", event, "optimise" if due else "none")
        line = self.take("optimise", round=self.round)
        # subtle: not the last token of the text, which is emitted and not yet read
        self.equal("probe", "position", line["position"], len(self.text) - 2)
        M = min(line["M"], L) if self.M is None else self.M
        self.equal("table", "M", line["M"], M, final=True)
        shape = [min(i, M) + 1 for i in range(L + 1)]
        for name in ("D", "skipped"):
            self.equal("table", f"entries per line of {name}", [len(x) for x in line[name]], shape,
                       final=True)
        bits = [[bit == "1" for bit in row] for row in line["skipped"]]
        self.choice = Choice(line["D"], bits, probe)
        rows, _ = choose_by(self.r, partial(ways, line["skipped"]), self.model, self.cache,
                            self.text[:-1], probe, M)
        self.ways = []                                 # of every row
        for i, row in enumerate(rows):
            self.ways.append(row)
            for j, near in enumerate(row):
                self.check_cell(i, j, near, line)
        self.equal("path", "skip", line["skip"], self.way_back(M))
        self.lines.advance()

    def check_cell(self, i: int, j: int, near: dict[str, float], line: dict) -> None:
        bit = line["skipped"][i][j]
        D = line["D"][i][j]
        slack = self.X / 4
        self.tally["choice"].checked += 1
        if bit not in near:
            self.depart("choice", f"skipped[{i}][{j}]", bit, *near, final=True)
        best = max(near, key=near.get)
        # A value that neither way has is no wrong choice: the table itself is wrong.
        if near[best] - near[bit] > slack >= min(abs(D - value) for value in near.values()):
            self.depart("choice", f"skipped[{i}][{j}]", bit, best, slack,
                        f"cosines {near[bit]:.9g} and {near[best]:.9g}")
        else:
            self.close("table" if j else "column", f"D[{i}][{j}]", D, near[bit], slack)

    def check_end(self) -> None:
        self.step = None
        self.round -= 1
        line = self.take("end")
        self.equal("end", "reason", line["reason"], self.reason)
        self.emitted = len(self.text) - len(self.header["prompt_ids"])
        self.equal("end", "emitted", line["emitted"], self.emitted)
        self.lines.advance()
        self.equal("end", "event", self.lines.event, "")

    def dump(self, drafted: list[int], logits: Tensor, h: Tensor, skip: list[int]) -> None:
        """The pass just made as a forward dump, up to its last token, and no further."""
        t = len(self.text) - 1
        ids = torch.tensor(self.text + drafted)
        entries = {}
        for name, x in dict(keys=self.cache.k, values=self.cache.v).items():
            entries[name] = x[:, :, :len(ids)].transpose(1, 2).clone()      # (L, T, G, hd)
            # What a verify has not filled yet, an earlier pass may have.
            entries[name][skip, t:] = 0
        place = f"step {self.step}" if self.a.dump_at[1:] else "its verify"
        said = save_dump(self.a.out, self.model, trace.about(self.a.model), skip, prompt_ids=ids,
                         logits=logits, hidden=h, **entries)
        raise Reached(f"round {self.round}, {place}: {said}")


def prepare(lines: Lines, a: argparse.Namespace, kind: type[Check] = Check,
            model: Llama | None = None) -> Check:
    """The header: is this a trace of the model at hand, of a size it can have?"""
    h = lines.header()
    cfg = Config.load(a.model)
    ours = trace.fingerprint(a.model)
    prompt, said = h["prompt_ids"], h["settings"]
    dtype = a.dtype or h["dtype"]
    X = a.tolerance or max(TOLERANCE[dtype], TOLERANCE[h["dtype"]])
    T = said["temperature"]
    differ = [name for name in ours if h["model"].get(name) != ours[name]]
    for wrong, what in (
            (h["model"] != ours, f"a trace of another model than {a.model}, which --model names: "
             f"SHA-256 of {', '.join(differ)}"),
            ((said["M"] or 0) > cfg.L, f"M is {said['M']}; the model has {cfg.L} layers"),
            (not prompt or max(prompt) >= cfg.V, f"prompt_ids: one or more below {cfg.V} wanted"),
            (len(prompt) + said["N"] > cfg.context, f"{len(prompt)} prompt tokens and N = "
             f"{said['N']} exceed the model's context of {cfg.context}"),
            (0 < T < 2 * X, f"at temperature {T} a tolerance of {X:g} is one of {X / (T or 1):g}, "
             "which checks nothing; trace at 0, or in float64")):
        if wrong:
            raise Invalid(f"line 1: {what}")
    if cfg.L * cfg.D * cfg.ffn < 1e7:
        torch.set_num_threads(1)                       # as the command: a second one costs more
    model = model or Llama.load(a.model, a.device, DTYPES[dtype])
    return kind(lines, model, h, X, a)


def alike(ours: Any, theirs: Any) -> bool:
    """Equal, but for floats: those of a program that keeps them in float32 differ by 1e-7."""
    if isinstance(ours, tuple) and theirs:
        return len(ours) == len(theirs) and all(map(alike, ours, theirs))
    return math.isclose(ours, theirs, rel_tol=1e-6) if isinstance(ours, float) else ours == theirs


@torch.inference_mode()
def check_file(a: argparse.Namespace) -> tuple[int, str]:
    """-> exit status and report."""
    with open(a.file, "rb") as file:
        check = prepare(Lines(file), a)
        try:
            check.run()
            status = 0
            seen = [f"{rule} {check.tally[rule].largest:.1e}" for rule in ("p", "q", "table")]
            said = [f"no departure in {check.round + 1} rounds, {check.emitted} tokens; largest "
                    f"difference in {', '.join(seen)}"]
        except Reached as e:
            return 0, str(e)
        except Departure as e:
            status = 1
            said = list(e.args)
        except Incomplete:
            status = 3
            said = [f"incomplete: {'a survey of' if a.survey else 'no departure in'} "
                    f"{check.lines.number - 1} lines, and they break off in round {check.round}"]
    if a.dump_at:
        raise Invalid("the replay does not come to round " + ", step ".join(map(str, a.dump_at))
                      + "".join(f"; {line}" for line in said[:status]))
    if a.survey:
        found, counted = survey(check.tally, check.outcomes)
        if status == 1:
            counted.append("  it ends there, as it is not known how the trace goes on:")
        said = counted + (said if status else [])
        status = found or status
    if check.s.temperature > 0:
        said += repeated(check.uniforms)
    return status, "\n".join(said)


def main(argv: Sequence[str] | None = None) -> int:
    def work() -> int:
        p = Parser(prog="check_trace.py", allow_abbrev=False, description="Check a trace of CLaSp "
                   "against this implementation (oracle/TRACE.md).")
        p.add_argument("file", metavar="FILE")
        p.add_argument("--model", metavar="DIR", default=str(DEMO),
                       help="Hugging Face folder of the trace's model (default: the demo)")
        p.add_argument("--tolerance", metavar="X", help="of a probability (TRACE.md, Tolerance)",
                       type=number(float, "a number above 0 and below 1", lambda v: 0 < v < 1))
        p.add_argument("--dtype", choices=list(TOLERANCE), help="of the replay (the trace's)")
        gpus = [f"cuda:{n}" for n in range(torch.cuda.device_count())]
        p.add_argument("--device", default="cpu", help="(cpu)",
                       choices=["cpu", *["cuda"][:len(gpus)], *gpus])
        p.add_argument("--survey", action="store_true", help="go on after departures in numbers")
        p.add_argument("--dump-at", type=numbers, metavar="ROUND[,STEP]", help="cache, states "
                       "and logits of the pass that drafts this step, or of the round's verify")
        p.add_argument("--out", metavar="DUMP", help="the file that --dump-at writes")
        a = p.parse_args(argv)
        if (a.dump_at is None) != (a.out is None) or a.dump_at and len(a.dump_at) > 2:
            raise UsageError("--dump-at ROUND,STEP (or ROUND) goes with --out FILE")
        try:
            status, said = check_file(a)
        except (Invalid, ModelError) as e:
            raise UsageError(f"{a.file}: {e}") from None
        except OSError as e:                           # 1 is a departure, and this is none
            raise UsageError(f"{e.filename}: {e.strerror}") from None
        print(f"{a.file}: {said}")
        return status
    return answer(work)


if __name__ == "__main__":
    sys.exit(main())
