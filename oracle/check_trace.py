"""Is this trace what CLaSp does? Replays a trace, written by any implementation, against this one.

    python oracle/check_trace.py FILE [--model DIR] [--tolerance X] [--dtype D] [--device DEVICE]
    python oracle/check_trace.py FILE --survey
    python oracle/check_trace.py FILE --dump-at ROUND[,STEP] --out DUMP

The replay is *teacher-forced*: every pass reads the tokens that the trace names, skips the layers
that it names and follows the parents of its table. What is compared is therefore one step at a
time, and the first departure reported is the first error, not what an earlier rounding made of the
rest. TRACE.md says what each line must hold; `RULES` names what is checked here, and each method of
`Check` checks one kind of line, in the order in which they come.

--survey goes on after a departure in a number, counts them by rule, and says what the pattern
means where it is known. --dump-at writes what the replay has there, cache, states and logits, as a
forward dump: of the pass that drafts a step, or with a round alone of its verify.

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
from collections.abc import Sequence  # noqa: E402
from dataclasses import asdict, replace  # noqa: E402
from typing import Any  # noqa: E402

import clasp_mini  # noqa: E402
from dp_layer_skip import nearness  # noqa: E402
from llama import Config, Llama, ModelError, Tensor, torch  # noqa: E402
from oracle import trace  # noqa: E402
from oracle.dump_forward import save_dump  # noqa: E402
from oracle.survey import Tally, repeated, survey  # noqa: E402
from oracle.trace import Incomplete, Invalid, Lines, Recording, short  # noqa: E402
from speculative import Settings, probabilities, read, residual  # noqa: E402
from command.cli import Parser, UsageError, answer, number, numbers  # noqa: E402

GPUS = torch.cuda.device_count()
# X: how far two correct programs may be apart in a probability at temperature 1. Logits may then be
# apart by 4 X, the slope of a softmax being 1/4 at most, and cosines by X / 4, as was measured
# (TRACE.md, "Tolerance").
TOLERANCE = {"float64": 1e-9, "float32": 2e-5, "bfloat16": 0.1}
EXACT = 1e-9                 # for arithmetic on numbers that stand in the trace themselves
RULES = dict(
    header="the sizes are those of config.json",
    order="the lines of a round come in their order, rounds and steps are counted from 0",
    start="start is the number of tokens of text before the round",
    skip="a draft leaves out the set of the last table for M layers, or for as many as a policy "
         "chooses; none before the first",
    exit="drafting goes on until K or N is reached, a stop token drawn or confidence below the "
         "threshold, and no further; where the settings leave one open, or until a policy ends it",
    confidence="confidence is the draft's highest probability at temperature 1, unfiltered",
    q="q is the draft's probability of the token: temperature, then top-k, then top-p",
    p="p is the full model's probability of the token, by the same function as q",
    draw="the token is the first whose running sum of probability, by id, exceeds u times the sum",
    ratio="a = min(1, p / q) of the p and q beside it, and q is the one of the draft line",
    verdict="a token is accepted if u < a, strictly; after a rejection nothing is judged",
    kind="the own token is plain if nothing was drafted, bonus if all was accepted, else residual",
    own="probability is that of the own token in p, or for a residual in norm(max(0, p - q))",
    emit="emitted are the accepted tokens and the own one, cut after the first stop token",
    interval="layers are optimised after round 0 and every interval rounds, if K, M > 0, unless "
             "the text is done; where the settings leave something open a policy may pass one by",
    probe="the probe is the last position read whose prediction was emitted",
    column="D[i][0] is about 1, layer i-1 run on h[i-1]; below it that candidate does not see what "
           "the verify saw (position, mask or slot), or is not held against h[i]",
    table="D[i][j] is how near h[i] the state is that its parent names",
    parent="a parent names the better of its two states; on a tie the layer is run",
    path="skip is read back from D[L][M] by the parents",
    end="the text ends after a stop token or N tokens, its line says which, and nothing follows")
# After a departure from one of these the trace itself says how it goes on.
NUMERIC = {"confidence", "q", "p", "draw", "ratio", "own", "column", "table", "parent"}
MIXED = "all draft lines of a round stand before its verify lines"


class Departure(Exception):
    """The trace and this implementation differ: `args` are the lines that say where and how."""


class Reached(Exception):
    """The replay has come to the place of --dump-at and written what it has there."""


def allowed(logits: Tensor, s: Settings, X: float, about: Sequence[int]) -> list[Tensor]:
    """(V,) logits -> the distributions (V,) that a correct program may have made of them: ours, and
    what ours would be had two logits 4 X apart, on either side of the edge of an argmax, top-k or
    top-p, come out the other way round. Of many such logits three on each side are tried, those of
    the tokens `about` first."""
    if s.temperature and not s.top_k and s.top_p == 1:
        return [probabilities(logits, s)]              # nothing is cut off
    out = []
    for d in (0, -X, X) if s.temperature and s.top_p < 1 else (0,):
        each = replace(s, top_p=min(1.0, max(s.top_p + d / min(1, s.temperature or 1), 1e-300)))
        out.append(probabilities(logits, each))
        kept = out[-1] > 0
        edge = logits[kept].amin()                     # of the last token kept
        near = ~kept & (logits >= edge - 4 * X), kept & (logits <= edge + 4 * X)
        for i, j in itertools.product(*(
                sorted(n.nonzero()[:, 0].tolist(), key=lambda i: i not in about)[:3]
                for n in near)):
            nudged = logits.clone()                    # swapped; X / 2 settles what was a tie
            nudged[i], nudged[j] = logits[j] + X / 2, logits[i] - X / 2
            out.append(probabilities(nudged, each))
    return out


def owed(p: Tensor, q: Tensor | None) -> Tensor:                    # (V,), (V,) -> (V,) float64
    """What a token is drawn from: p, or given q what a rejection still owes. Not normalised, since
    where little is owed rounding is a large part of it, and must be allowed to be."""
    return p.double() if q is None else (p.double() - q.double()).clamp(min=0)


def draws(p: Tensor, q: Tensor | None, token: int, u: float, slack: float) -> bool:
    """Does u draw `token`, if every running sum may be off by `slack`?"""
    weights = owed(p, q)
    cdf = weights.cumsum(0)
    # Of no width is the interval of an excluded token, and u = 0 may touch it.
    return bool(p[token] > 0 and
                cdf[token] - weights[token] - slack <= u * cdf[-1] < cdf[token] + slack)


class Check:
    """This implementation, led along the trace. The fields are those of speculative.generate."""

    def __init__(self, lines: Lines, model: Llama, prompt: list[int], s: Settings, X: float,
                 a: argparse.Namespace) -> None:
        self.lines, self.model, self.s, self.X, self.a = lines, model, s, X, a
        # Below temperature 1 a difference of two logits is that much larger.
        self.slack = X / min(1, s.temperature or 1)
        self.prompt, self.text, self.cached = prompt, list(prompt), 0
        self.end = len(prompt) + s.N
        self.cache = model.cache(self.end + s.r + 1)
        self.probe = model.embed.new_empty(model.cfg.L + 1, 0, model.cfg.D)    # r states at most
        # What the settings leave open a policy decides; it may be any.
        self.free = None in (s.K, s.M, s.exit_threshold, s.interval)
        self.parents: list[str] | None = None          # of the last table
        self.round, self.step, self.done = 0, None, False
        self.tally = {rule: Tally() for rule in RULES}
        self.outcomes: list[tuple[int, int]] = []      # of each round: drafted, accepted
        self.uniforms: list[float] = []

    # ------------------------------------------------------------------ what rules are written in

    def depart(self, rule: str, field: str, theirs: Any, ours: Any, slack: float = 0.0,
               note: str = "", final: bool = False) -> None:
        """A departure: the end of the check, or of a survey if how it goes on is not known."""
        step = f", step {self.step}" if self.step is not None else ""
        notes = "; ".join(filter(None, (f"tolerance {slack:.3g}" if slack else "", note)))
        what = (f"line {self.lines.number}, round {self.round}{step}: {field}: "
                f"trace {short(theirs)}, ours {short(ours)}" + (f" ({notes})" if notes else ""))
        kind = self.lines.now.get("kind", self.lines.now["event"])
        self.tally[rule].departed.append((self.lines.number, self.round, kind))
        if final or rule not in NUMERIC or not (self.a.survey or self.a.dump_at):
            raise Departure(what, f"rule {rule}: {RULES[rule]}")

    def equal(self, rule: str, field: str, theirs: Any, ours: Any, note: str = "") -> None:
        self.tally[rule].checked += 1
        if theirs != ours:
            self.depart(rule, field, theirs, ours, note=note)

    def close(self, rule: str, field: str, theirs: float, ours: float, slack: float,
              note: str = "", scale: float = 1.0) -> None:
        """... within `slack` where `scale` is 1: a part of less mass is known less exactly."""
        off, tally = abs(theirs - ours) * scale, self.tally[rule]
        tally.checked, tally.largest = tally.checked + 1, max(tally.largest, off)
        if not off <= slack:
            self.depart(rule, field, theirs, ours, slack / scale if scale else slack, note)

    def drawn(self, rule: str, field: str, options: list[tuple[Tensor, Tensor | None]]) -> None:
        """The line looked at has drawn its token from one of these (p, q): one gives it the
        probability that the line says, and from such a one its u draws it. In this order, so that a
        wrong distribution is told from a wrong way to draw."""
        line, tolerance = self.lines.now, self.slack * (1 if options[0][1] is None else 2)
        token, u = line["token"], line["u"]
        self.uniforms.append(u)
        masses = [1.0 if q is None else owed(p, q).sum().item() for p, q in options]
        off = [abs(line[field] * m - owed(p, q)[token].item())
               for (p, q), m in zip(options, masses)]
        best = min(range(len(off)), key=off.__getitem__)
        p, q = options[best]
        dist = p if q is None else residual(p, q)
        ours = Recording(lambda: u).draw(dist)
        instead = "" if ours == token else f"ours draws token {ours} by this u"
        # Of no mass at all anything is as good; residual then gives p.
        self.close(rule, field, line[field], dist[token].item() if masses[best] else line[field],
                   tolerance, instead, masses[best])
        fit = [o for o, d in zip(options, off) if d <= tolerance] or [options[best]]
        self.tally["draw"].checked += 1
        if not any(draws(p, q, token, u, tolerance) for p, q in fit):
            self.depart("draw", "token", token, ours, tolerance)

    def take(self, event: str, **want: Any) -> dict:
        """The line looked at, which must be of this kind and hold what is wanted in these
        fields."""
        line = self.lines.now
        mixed = event == "verify" and line["event"] == "draft"
        for name, ours in dict(event=event, round=self.round, **want).items():
            self.equal("order", name, line.get(name), ours, mixed * MIXED)
        return line

    # ------------------------------------------------------------------ the rules, line by line

    def run(self) -> None:
        self.lines.advance()
        while not self.done:
            self.begin()
            drafts, draft_logits = self.draft()
            logits = self.pass_over(drafts)
            accepted = self.verify(drafts, logits)
            own = self.own(drafts, draft_logits, logits, accepted)
            self.outcomes.append((len(drafts), accepted))
            self.emit([d["token"] for d in drafts[:accepted]] + [own])
            seen = self.h[:, :self.h.shape[1] - len(drafts) + accepted]
            self.probe = torch.cat((self.probe, seen), 1)[:, -self.s.r:]
            self.optimise(self.probe)
            if self.lines.now["event"] == "times":
                self.take("times")
                self.lines.advance()
            self.round += 1
        self.finish()

    def begin(self) -> None:
        self.step = None
        if self.lines.now["event"] == "end":
            self.depart("end", "event", "end", "round")
        line = self.now_round = self.take("round")
        self.equal("start", "start", line["start"], len(self.text))
        j = len(line["skip"]) if self.s.M is None else self.s.M
        self.equal("skip", "skip", line["skip"], self.path(j) if self.parents else [])
        self.lines.advance()

    def path(self, j: int) -> list[int]:
        """The set for budget j, read back by the parents of the last table."""
        out, j = [], min(j, len(self.parents[-1]) - 1)
        for i in range(len(self.parents) - 1, 0, -1):
            if self.parents[i][j] == "1":
                out.insert(0, i - 1)
                j -= 1
        return out

    def draft(self) -> tuple[list[dict], list[Tensor]]:
        """-> the draft's lines, and the logits (V,) that each token was drawn from."""
        s, drafts, logits, t = self.s, [], [], len(self.text) - 1
        skip = [i in self.now_round["skip"] for i in range(self.model.cfg.L)]
        while self.goes_on(drafts):
            last = drafts[-1]["token"] if drafts else self.text[-1]
            line = self.take("draft", step=self.step)
            x, h = self.model.forward(torch.tensor([last], device=self.model.device),
                                      self.cache.sequence(t + self.step, 1), self.cache, skip,
                                      states=True)
            if self.a.dump_at == [self.round, self.step]:
                self.dump(drafts, x, h, self.now_round["skip"])
            logits.append(x[0])
            self.close("confidence", "confidence", line["confidence"],
                       x[0].softmax(-1).amax().item(), self.X)
            self.drawn("q", "q", [(q, None) for q in allowed(x[0], s, self.X, [line["token"]])])
            drafts.append(line)
            self.lines.advance()
        return drafts, logits

    def goes_on(self, drafts: list[dict]) -> bool:
        """Is the line looked at one more draft, and should it be? And is what ended it said?"""
        s, k, event = self.s, len(drafts), self.lines.now["event"]
        self.step = k
        left = self.end - len(self.text) - 1
        last = drafts[-1] if drafts else dict(token=None, confidence=math.inf)
        # Within the tolerance of the threshold the trace may have gone on or not.
        sure = last["confidence"] - s.exit_threshold if s.exit_threshold else math.inf
        must = {name for name, so in dict(
            prefill=self.round == 0, K=k == s.K, N=k == left, stop=last["token"] in s.stop_ids,
            confidence=sure < -self.X).items() if so}
        may = must | {name for name, so in dict(
            confidence=sure < self.X, policy=self.free and self.round > 0).items() if so}
        state = f"{k} of at most {left if s.K is None else min(s.K, left)} drafted"
        if drafts:
            state += (f", token {last['token']}{' stops' * ('stop' in must)}, confidence "
                      f"{last['confidence']:.3g}, threshold {s.exit_threshold}")
        if event == "draft" and must:
            self.depart("exit", "event", event, "the end of the draft", note=state)
        if event != "draft" and not may:
            if event == "verify" and self.interleaved():
                self.depart("order", "event", "verify", "draft", note=MIXED)
            self.depart("exit", "event", event, "draft", note=state)
        if event != "draft" and self.now_round["ended"] not in may:
            self.step, self.lines.number = None, self.lines.number - k - 1      # the round's line
            self.depart("exit", "ended", self.now_round["ended"], " or ".join(sorted(may)),
                        note=state)
        return event == "draft"

    def interleaved(self) -> bool:
        """Does a draft follow the verify lines that begin here? The place is kept, not the file's:
        the check ends here anyway."""
        number, now = self.lines.number, self.lines.now
        try:
            while self.lines.now["event"] == "verify":
                self.lines.advance()
            return self.lines.now["event"] == "draft"
        except (Incomplete, Invalid):
            return False
        finally:
            self.lines.number, self.lines.now = number, now

    def pass_over(self, drafts: list[dict]) -> Tensor:
        """The verify pass over what is not cached: logits (k+1, V). Keeps its states (L+1, rows, D)
        for the probe: of the prompt up to r rows."""
        todo, k = self.text[self.cached:] + [d["token"] for d in drafts], len(drafts)
        logits, self.h = read(self.model, todo, self.cached, self.cache,
                              max(k + 1, min(self.s.r, len(todo))), states=True)
        if self.a.dump_at == [self.round]:
            self.dump(drafts, logits[-k - 1:], self.h[:, -k - 1:], [])
        return logits[-k - 1:]

    def verify(self, drafts: list[dict], logits: Tensor) -> int:
        """-> how many of the drafted tokens were accepted."""
        accepted, rejected = 0, False
        for self.step, d in enumerate(drafts):
            line = self.take("verify", step=self.step, token=d["token"])
            p, q, a, u = (line[name] for name in "pqau")
            ours = [o[d["token"]].item() for o in allowed(logits[self.step], self.s, self.X,
                                                          [d["token"]])]
            self.close("p", "p", p, min(ours, key=lambda o: abs(o - p)), self.slack)
            self.equal("ratio", "q", q, d["q"])
            self.close("ratio", "a", a, min(1.0, p / q) if q else math.inf, EXACT)
            self.equal("verdict", "u given", u is not None, not rejected)
            self.equal("verdict", "accepted", line["accepted"], None if rejected else u < a)
            self.uniforms += [] if rejected else [u]
            rejected = rejected or not line["accepted"]
            accepted += not rejected
            self.lines.advance()
        self.step = None
        return accepted

    def own(self, drafts: list[dict], draft_logits: list[Tensor], logits: Tensor,
            accepted: int) -> int:
        """-> the full model's own token."""
        line, r, k = self.take("own"), accepted, len(drafts)
        self.equal("kind", "kind", line["kind"],
                   "plain" if k == 0 else "bonus" if r == k else "residual")
        about = [line["token"], *(d["token"] for d in drafts[r:r + 1])]
        self.drawn("own", "probability", list(itertools.product(
            allowed(logits[r], self.s, self.X, about),
            allowed(draft_logits[r], self.s, self.X, about) if r < k else [None])))
        self.lines.advance()
        return line["token"]

    def emit(self, tokens: list[int]) -> None:
        stops = [n for n, token in enumerate(tokens) if token in self.s.stop_ids]
        tokens = tokens[:stops[0] + 1] if stops else tokens
        self.equal("emit", "tokens", self.take("emit")["tokens"], tokens)
        self.text += tokens
        self.cached = len(self.text) - 1
        self.reason = "stop" if stops else "length"
        self.done = bool(stops) or len(self.text) == self.end
        self.lines.advance()

    def optimise(self, h: Tensor) -> None:                                  # (L+1, r, D)
        s, L, event = self.s, self.model.cfg.L, self.lines.now["event"]
        may = (s.K != 0 and s.M != 0 and self.round % (s.interval or 1) == 0 and not self.done)
        if event == "optimise" and not may or event != "optimise" and may and not self.free:
            self.depart("interval", "event", event, "optimise" if may else "none")
        if event != "optimise":
            return
        line = self.take("optimise")
        # subtle: not the last position of the text, which is emitted and not yet read
        self.equal("probe", "position", line["position"], len(self.text) - 2)
        M = line["M"]
        if M != (min(M, L) if s.M is None else s.M):
            self.depart("table", "M", M, L if s.M is None else s.M, final=True)
        for name in ("D", "parents"):
            theirs, ours = [len(x) for x in line[name]], [min(i, M) + 1 for i in range(L + 1)]
            if theirs != ours:
                self.depart("table", f"entries per line of {name}", theirs, ours, final=True)
        rows, g = self.cache.candidates(line["position"], 1, h.shape[1]), {}
        for i in range(L + 1):
            for j in range(min(i, M) + 1):
                states = {} if i else {"0": h[0]}      # by the parent bit that names them
                if j < i:
                    states["0"] = self.model.layer(i - 1, g[i - 1, j], rows, self.cache)
                if j > 0:
                    states["1"] = g[i - 1, j - 1]
                bit, theirs = line["parents"][i][j], line["D"][i][j]
                if bit not in states:
                    self.depart("parent", f"parents[{i}][{j}]", bit, *states, final=True)
                near = {b: nearness(h, i, x).item() for b, x in states.items()}
                slack = self.X / 4
                best = max(near, key=near.get)
                self.tally["parent"].checked += 1
                # A value that neither state has is no wrong choice: the table itself is wrong.
                if near[best] - near[bit] > slack >= min(abs(theirs - v) for v in near.values()):
                    self.depart("parent", f"parents[{i}][{j}]", bit, best, slack,
                                f"cosines {near[bit]:.9g} and {near[best]:.9g}")
                else:
                    self.close("table" if j else "column", f"D[{i}][{j}]", theirs, near[bit], slack)
                g[i, j] = states[bit] if j else h[i]
        self.parents = line["parents"]
        self.equal("path", "skip", line["skip"], self.path(M))
        self.lines.advance()

    def finish(self) -> None:
        self.step, self.round = None, self.round - 1
        line = self.lines.now
        self.equal("end", "event", line["event"], "end")
        self.equal("end", "reason", line["reason"], self.reason)
        self.equal("end", "emitted", line["emitted"], len(self.text) - len(self.prompt))
        try:
            self.lines.advance()
        except Incomplete:
            return
        self.depart("end", "event", self.lines.now["event"], "the end of the file")

    # ------------------------------------------------------------------ what the replay has

    def dump(self, drafts: list[dict], logits: Tensor, h: Tensor, skip: list[int]) -> None:
        """The pass just made as a forward dump, up to its last token, and no further."""
        t, c = len(self.text) - 1, self.cache
        ids = self.text + [d["token"] for d in drafts]
        k, v = c.k[:, :, :len(ids)].clone(), c.v[:, :, :len(ids)].clone()
        for x in (k, v):               # what a verify has not filled yet, an earlier pass may have
            x[skip, :, t:] = 0
        place = f"step {self.step}" if self.a.dump_at[1:] else "its verify"
        raise Reached(f"round {self.round}, {place}: " + save_dump(
            self.a.out, self.model, trace.about(self.a.model), skip, prompt_ids=torch.tensor(ids),
            logits=logits, hidden=h, keys=k.transpose(1, 2), values=v.transpose(1, 2)))


# ------------------------------------------------------------------------------------ the command

def prepare(lines: Lines, a: argparse.Namespace) -> Check:
    """The header: is this a trace of the model at hand, of a size it can have?"""
    h, cfg = lines.header(), Config.load(a.model)
    ours, theirs = trace.fingerprint(a.model), h["model"]
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise Invalid(f"line 1: a trace of another model than {a.model}: SHA-256 of "
                          f"{short(name)} is {short(theirs.get(name))} there and "
                          f"{short(ours.get(name))} here; --model names the folder")
    prompt, values = h["prompt_ids"], dict(h["settings"])
    del values["seed"]
    s = Settings(**values | dict(stop_ids=tuple(values["stop_ids"])))
    if (s.M or 0) > cfg.L:
        raise Invalid(f"line 1: M is {s.M}; the model has {cfg.L} layers")
    if not prompt or max(prompt) >= cfg.V:
        raise Invalid(f"line 1: prompt_ids: one or more tokens below {cfg.V} wanted")
    if len(prompt) + s.N > cfg.context:
        raise Invalid(f"line 1: {len(prompt)} prompt tokens and N = {s.N} exceed the model's "
                      f"context of {cfg.context}")
    dtype = a.dtype or h["dtype"]
    X = a.tolerance or max(TOLERANCE[dtype], TOLERANCE[h["dtype"]])
    if 0 < s.temperature < 2 * X:
        raise Invalid(f"line 1: temperature {s.temperature} makes of a tolerance of {X:g} one of "
                      f"{X / s.temperature:g}, which checks nothing; trace at 0, or in float64")
    check = Check(lines, Llama.load(a.model, a.device, clasp_mini.DTYPES[dtype]), prompt, s, X, a)
    for name, value in asdict(cfg).items():
        value, said = (list(v) if isinstance(v, (tuple, list)) else v
                       for v in (value, h["config"][name]))
        if not alike(value, said):
            check.depart("header", f"config.{name}", said, value)
    lines.schema = trace.schema(cfg)
    return check


def alike(a: Any, b: Any) -> bool:
    """Equal, but for floats: those of a program that keeps them in float32 differ by 1e-7."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(alike, a, b))
    return math.isclose(a, b, rel_tol=1e-6) if isinstance(a, float) and b is not None else a == b


@torch.inference_mode()
def check_file(a: argparse.Namespace) -> tuple[int, str]:
    """-> exit status and report."""
    with open(a.file, "rb") as file:
        lines = Lines(file)
        status, said, check = 0, [], None
        try:
            check = prepare(lines, a)
            check.run()
        except Reached as e:
            return 0, str(e)
        except Departure as e:
            status, said = 1, ["  it ends there, as it is not known how the trace goes on:"
                               ] * bool(a.survey and check) + list(e.args)
        except Incomplete:
            found = "a survey of" if a.survey else "no departure in"
            status, said = 3, [f"incomplete: {found} {lines.number - 1} lines, and they break off "
                               f"in round {check.round}"]
    if a.dump_at:
        raise Invalid("the replay does not come to round " + ", step ".join(map(str, a.dump_at))
                      + "".join(f"; {line}" for line in said[:1]))
    if check is None:
        return status, "\n".join(said)
    if a.survey:
        found, lines = survey(check.tally, check.outcomes)
        status, said = found or status, lines + said
    elif not said:
        seen = ", ".join(f"{rule} {check.tally[rule].largest:.1e}" for rule in "p q table".split())
        said = [f"no departure in {check.round + 1} rounds, {len(check.text) - len(check.prompt)}"
                f" tokens; largest difference in {seen}"]
    if check.s.temperature:
        said += repeated(check.uniforms)
    return status, "\n".join(said)


def parser() -> Parser:
    p = Parser(prog="check_trace.py", allow_abbrev=False, description="Check a trace of CLaSp "
               "against this implementation (oracle/TRACE.md).")
    p.add_argument("file", metavar="FILE")
    p.add_argument("--model", metavar="DIR", default=str(clasp_mini.DEMO),
                   help="Hugging Face folder of the trace's model (default: the demo)")
    p.add_argument("--tolerance", metavar="X", help="of a probability (default: "
                   + ", ".join(f"{x:g} for {name}" for name, x in TOLERANCE.items()) + ")",
                   type=number(float, "a number above 0 and below 1", lambda v: 0 < v < 1))
    p.add_argument("--dtype", choices=list(TOLERANCE), help="of the replay (default: the trace's)")
    p.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)",
                   type=number(str, "cpu, or a CUDA GPU that PyTorch sees", lambda v: v == "cpu" or
                               v in ("cuda", *map("cuda:{}".format, range(GPUS))) and GPUS > 0))
    p.add_argument("--survey", action="store_true", help="go on after departures in numbers, count "
                   "them by rule and say what the pattern means")
    p.add_argument("--dump-at", type=numbers, metavar="ROUND[,STEP]", help="write cache, states "
                   "and logits of the pass that drafts this step, or of the round's verify")
    p.add_argument("--out", metavar="DUMP", help="the safetensors file that --dump-at writes")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    def work() -> int:
        a = parser().parse_args(argv)
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
