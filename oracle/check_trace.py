"""Is this trace what CLaSp does? Replays a trace, written by any implementation, against this one.

    python oracle/check_trace.py FILE [--model DIR] [--tolerance X] [--dtype D] [--device DEVICE]

The replay is *teacher-forced*: every pass reads the tokens that the trace names, skips the layers
that it names and follows the parents of its table. What is compared is therefore one step at a
time, and the first departure reported is the first error, not what an earlier rounding made of the
rest. TRACE.md says what each line must hold; `RULES` names what is checked here, and each method of
`Check` checks one kind of line, in the order in which they come.

Exit status: 0 no departure, 1 departure, 2 not a trace that can be checked, 3 no departure in a
trace that breaks off before its `end`.
"""
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    for name in ("SIGINT", "SIGPIPE"):                 # Ctrl-C and `| head` end it without a word
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    # Instead of this folder, whose trace.py would stand before the standard library's.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse  # noqa: E402
import itertools  # noqa: E402
import math  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from dataclasses import asdict, replace  # noqa: E402
from typing import Any  # noqa: E402

import clasp_mini  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from dp_layer_skip import cosine  # noqa: E402
from llama import Llama, ModelError  # noqa: E402
from oracle import trace  # noqa: E402
from oracle.trace import Incomplete, Invalid, Lines, short  # noqa: E402
from speculative import (  # noqa: E402
    Settings, in_parts, inverse_cdf, probabilities, residual)

# X: how far two correct programs may be apart in a probability at temperature 1. Logits may then be
# apart by 4 X, the slope of a softmax being 1/4 at most, and cosines by X / 4, as was measured
# (TRACE.md, "Tolerance").
TOLERANCE = {"float64": 1e-9, "float32": 2e-5, "bfloat16": 0.1}
EXACT = 1e-9                 # for arithmetic on numbers that stand in the trace themselves
RULES = dict(
    header="the sizes are those of config.json",
    order="the lines of a round come in their order, rounds and steps are counted from 0",
    start="start is the number of tokens of text before the round",
    skip="a draft leaves out the layers of the last optimise line; none before the first",
    exit="drafting goes on until K or N is reached, a stop token drawn or confidence below the "
         "threshold, and no further",
    confidence="confidence is the draft's highest probability at temperature 1, unfiltered",
    q="q is the draft's probability of the token: temperature, then top-k, then top-p",
    p="p is the full model's probability of the token, by the same function as q",
    draw="the token is the first whose running sum of probability, by id, exceeds u times the sum",
    ratio="a = min(1, p / q) of the p and q beside it, and q is the one of the draft line",
    verdict="a token is accepted if u < a, strictly; after a refusal nothing is judged",
    kind="the own token is plain if nothing was drafted, bonus if all was accepted, else residual",
    own="probability is that of the own token in p, or for a residual in norm(max(0, p - q))",
    emit="emitted are the accepted tokens and the own one, cut after the first stop token",
    interval="layers are optimised after round 0 and every interval rounds, if K, M > 0, unless "
             "the text is done",
    probe="the probe is the last position read whose prediction was emitted",
    table="D[i][j] is the cosine with h[i] of the state its parent names; j = 0 is 1, run",
    parent="a parent names the better of its two states; on a tie the layer is run",
    path="skip is read back from D[L][M] by the parents, cosine is the last line of D",
    end="the text ends after a stop token or N tokens, its line says which, and nothing follows")


class Departure(Exception):
    """The trace and this implementation differ: `args` are the lines that say where and how."""


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
    """What a token is drawn from: p, or given q what a refusal still owes. Not normalised, since
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

    def __init__(self, lines: Lines, model: Llama, prompt: list[int], s: Settings,
                 X: float) -> None:
        self.lines, self.model, self.s, self.X = lines, model, s, X
        # Below temperature 1 a difference of two logits is that much larger.
        self.slack = X / min(1, s.temperature or 1)
        self.prompt, self.text, self.cached = prompt, list(prompt), 0
        self.end = len(prompt) + s.N
        self.cache = model.cache(self.end + s.M)
        self.skip, self.round, self.step, self.done = [], 0, None, False
        self.largest = dict(p=0.0, q=0.0, D=0.0)       # differences seen

    # ------------------------------------------------------------------ what rules are written in

    def depart(self, rule: str, field: str, theirs: Any, ours: Any, slack: float = 0.0) -> None:
        step = f", step {self.step}" if self.step is not None else ""
        within = f" (tolerance {slack:.3g})" if slack else ""
        raise Departure(f"line {self.lines.number}, round {self.round}{step}: {field} is "
                        f"{short(theirs)}, here {short(ours)}{within}",
                        f"rule {rule}: {RULES[rule]}")

    def equal(self, rule: str, field: str, theirs: Any, ours: Any) -> None:
        if theirs != ours:
            self.depart(rule, field, theirs, ours)

    def close(self, rule: str, field: str, theirs: float, ours: float, slack: float) -> None:
        if not abs(theirs - ours) <= slack:
            self.depart(rule, field, theirs, ours, slack)
        name = field.partition("[")[0]
        if name in self.largest:
            self.largest[name] = max(self.largest[name], abs(theirs - ours))

    def near(self, field: str, value: float, token: int, options: list[Tensor]) -> None:
        """One of the allowed distributions must give `token` this probability."""
        best = min(options, key=lambda p: abs(p[token].item() - value))
        self.close(field, field, value, best[token].item(), self.slack)

    def drawn(self, line: dict, options: list[tuple[Tensor, Tensor | None]]) -> list:
        """Those (p, q) of the allowed ones from which u draws the token; there must be one."""
        token, u = line["token"], line["u"]
        fit = [(p, q) for p, q in options if draws(p, q, token, u, self.within(q))]
        if not fit:
            p, q = options[0]
            ours = int(inverse_cdf(p if q is None else residual(p, q), u))
            self.depart("draw", "token", token, ours, self.within(q))
        return fit

    def within(self, q: Tensor | None) -> float:
        """The tolerance of what is owed: p and q may both be off."""
        return self.slack if q is None else 2 * self.slack

    def take(self, event: str, **want: Any) -> dict:
        """The line looked at, which must be of this kind and hold what is wanted in these
        fields."""
        line = self.lines.now
        for field, ours in dict(event=event, round=self.round, **want).items():
            self.equal("order", field, line.get(field), ours)
        return line

    # ------------------------------------------------------------------ the rules, line by line

    def run(self) -> None:
        self.lines.advance()
        while not self.done:
            self.begin()
            drafts, draft_logits = self.draft()
            logits, h = self.pass_over(drafts)
            accepted = self.verify(drafts, logits)
            own = self.own(drafts, draft_logits, logits, accepted)
            self.emit([d["token"] for d in drafts[:accepted]] + [own])
            self.optimise(h[:, accepted])
            if self.lines.now["event"] == "times":
                self.take("times")
                self.lines.advance()
            self.round += 1
        self.finish()

    def begin(self) -> None:
        self.step = None
        if self.lines.now["event"] == "end":
            self.depart("end", "event", "end", "round")
        line = self.take("round")
        self.equal("start", "start", line["start"], len(self.text))
        self.equal("skip", "skip", line["skip"], self.skip)
        self.lines.advance()

    def draft(self) -> tuple[list[dict], list[Tensor]]:
        """-> the draft's lines, and the logits (V,) that each token was drawn from."""
        s, drafts, logits = self.s, [], []
        most = min(s.K, self.end - len(self.text) - 1) if self.round else 0
        while True:
            self.step = len(drafts)
            last = drafts[-1]["token"] if drafts else self.text[-1]
            over = len(drafts) == most or drafts and last in s.stop_ids
            sure = drafts[-1]["confidence"] - s.exit_threshold if drafts and s.exit_threshold else 1
            # Within the tolerance of the threshold the trace may have gone on or not.
            event = self.lines.now["event"]
            if event == "draft" and (over or sure < -self.X):
                self.depart("exit", "event", event, "the end of the draft")
            if event != "draft" and not over and sure >= self.X:
                self.depart("exit", "event", event, "draft")
            if event != "draft":
                return drafts, logits
            line = self.take("draft", step=self.step)
            rows = self.cache.sequence(len(self.text) - 1 + self.step, 1)
            x, _ = self.model.forward(torch.tensor([last], device=self.model.device), rows,
                                      self.cache, [i in self.skip for i in range(self.model.cfg.L)])
            logits.append(self.model.head(x)[0])
            top = logits[-1].softmax(-1).amax().item()
            self.close("confidence", "confidence", line["confidence"], top, self.X)
            options = allowed(logits[-1], s, self.X, [line["token"]])
            self.drawn(line, [(q, None) for q in options])
            self.near("q", line["q"], line["token"], options)
            drafts.append(line)
            self.lines.advance()

    def pass_over(self, drafts: list[dict]) -> tuple[Tensor, Tensor]:
        """The verify pass over what is not cached: logits (k+1, V), states (L+1, k+1, D)."""
        k, todo = len(drafts), self.text[self.cached:] + [d["token"] for d in drafts]
        for x, h in in_parts(self.model, torch.tensor(todo, device=self.model.device), self.cached,
                           self.cache, states=slice(-k - 1, None)):
            pass                                       # the rows that count are in the last part
        return self.model.head(x[-k - 1:]), h

    def verify(self, drafts: list[dict], logits: Tensor) -> int:
        """-> how many of the drafted tokens were accepted."""
        accepted, refused = 0, False
        for self.step, d in enumerate(drafts):
            line = self.take("verify", step=self.step, token=d["token"])
            p, q, a, u = (line[name] for name in "pqau")
            self.near("p", p, d["token"], allowed(logits[self.step], self.s, self.X,
                                                  [d["token"]]))
            self.equal("ratio", "q", q, d["q"])
            self.close("ratio", "a", a, min(1.0, p / q) if q else math.inf, EXACT)
            self.equal("verdict", "u given", u is not None, not refused)
            self.equal("verdict", "accepted", line["accepted"], None if refused else u < a)
            refused = refused or not line["accepted"]
            accepted += not refused
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
        options = list(itertools.product(
            allowed(logits[r], self.s, self.X, about),
            allowed(draft_logits[r], self.s, self.X, about) if r < k else [None]))
        fit, token, probability = self.drawn(line, options), line["token"], line["probability"]
        off = {}
        for p, q in fit:
            weights = owed(p, q)
            mass = 1.0 if q is None else weights.sum().item()
            off[abs(probability * mass - weights[token].item())] = p, q
        p, q = off[min(off)]
        if min(off) > self.within(q):
            ours = (p if q is None else residual(p, q))[token].item()
            self.depart("own", "probability", probability, ours, self.within(q))
        self.lines.advance()
        return token

    def emit(self, tokens: list[int]) -> None:
        stops = [n for n, token in enumerate(tokens) if token in self.s.stop_ids]
        tokens = tokens[:stops[0] + 1] if stops else tokens
        self.equal("emit", "tokens", self.take("emit")["tokens"], tokens)
        self.text += tokens
        self.cached = len(self.text) - 1
        self.reason = "stop" if stops else "length"
        self.done = bool(stops) or len(self.text) == self.end
        self.lines.advance()

    def optimise(self, h: Tensor) -> None:                                  # (L+1, D)
        s, L, event = self.s, self.model.cfg.L, self.lines.now["event"]
        due = s.K > 0 and s.M > 0 and self.round % s.interval == 0 and not self.done
        if due != (event == "optimise"):
            self.depart("interval", "event", event, "optimise" if due else "none")
        if not due:
            return
        line = self.take("optimise")
        # subtle: not the last position of the text, which is emitted and not yet read
        self.equal("probe", "position", line["position"], len(self.text) - 2)
        self.equal("table", "M", line["M"], s.M)
        for field in ("D", "parents"):
            self.equal("table", f"entries per line of {field}", [len(x) for x in line[field]],
                       [min(i, s.M) + 1 for i in range(L + 1)])
        rows, g = self.cache.versions(line["position"], 1), {}
        for i in range(L + 1):
            for j in range(min(i, s.M) + 1):
                states = {}                            # by the parent bit that names them
                if j == 0:
                    states["0"] = h[i]
                elif j < i:
                    states["0"] = self.model.layer(i - 1, g[i - 1, j][None], rows, self.cache)[0]
                if j > 0:
                    states["1"] = g[i - 1, j - 1]
                near = {bit: cosine(h[i], x).item() for bit, x in states.items()}
                bit = line["parents"][i][j]
                best = max(near, key=near.get)
                if bit not in near or near[best] - near[bit] > self.X / 4:
                    self.depart("parent", f"parents[{i}][{j}]", bit, best, self.X / 4)
                self.close("table", f"D[{i}][{j}]", line["D"][i][j], near[bit] if j else 1.0,
                           self.X / 4)
                g[i, j] = states[bit]
        j, self.skip = s.M, []
        for i in range(L, 0, -1):
            if line["parents"][i][j] == "1":
                self.skip.insert(0, i - 1)
                j -= 1
        self.equal("path", "skip", line["skip"], self.skip)
        self.equal("path", "cosine", line["cosine"], line["D"][-1])
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


# ------------------------------------------------------------------------------------ the command

def prepare(lines: Lines, a: argparse.Namespace) -> Check:
    """The header: is this a trace of the model at hand, of a size it can have?"""
    h, job = lines.header(), clasp_mini.Job(clasp_mini.parser().parse_args(
        ["--prompt-ids", "0", "--model", a.model, "--device", a.device]))
    ours, theirs = trace.fingerprint(a.model), h["model"]
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise Invalid(f"line 1: a trace of another model than {a.model}: SHA-256 of "
                          f"{short(name)} is {short(theirs.get(name))} there and "
                          f"{short(ours.get(name))} here; --model names the folder")
    cfg, prompt, values = job.cfg, h["prompt_ids"], dict(h["settings"])
    del values["seed"]
    s = Settings(**values | dict(stop_ids=tuple(values["stop_ids"])))
    fault = s.check(cfg.L)
    if fault:
        raise Invalid(f"line 1: {fault}")
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
    model = Llama.load(a.model, job.device, clasp_mini.DTYPES[dtype])
    check = Check(lines, model, prompt, s, X)
    for name, value in asdict(cfg).items():
        value = list(value) if isinstance(value, tuple) else value
        check.equal("header", f"config.{name}", h["config"][name], value)
    lines.schema = trace.schema(cfg)
    return check


@torch.inference_mode()
def check_file(a: argparse.Namespace) -> tuple[int, str]:
    """-> exit status and report."""
    with open(a.file, "rb") as file:
        lines = Lines(file)
        try:
            check = prepare(lines, a)
            check.run()
        except Departure as e:
            return 1, "\n".join(e.args)
        except Incomplete:
            return 3, (f"incomplete: no departure in {lines.number - 1} lines, and they break off "
                       f"in round {check.round}")
    seen = ", ".join(f"{name} {x:.1e}" for name, x in check.largest.items())
    return 0, (f"no departure in {check.round + 1} rounds, {len(check.text) - len(check.prompt)}"
               f" tokens; largest difference in {seen}")


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="check_trace.py", allow_abbrev=False, description="Check a "
                                "trace of CLaSp against this implementation (oracle/TRACE.md).")
    p.add_argument("file", metavar="FILE")
    p.add_argument("--model", metavar="DIR", default=str(clasp_mini.DEMO),
                   help="Hugging Face folder of the trace's model (default: the demo)")
    p.add_argument("--tolerance", type=float, metavar="X", help="of a probability (default: "
                   + ", ".join(f"{x:g} for {name}" for name, x in TOLERANCE.items()) + ")")
    p.add_argument("--dtype", choices=list(TOLERANCE), help="of the replay (default: the trace's)")
    p.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    a = p.parse_args(argv)
    if a.tolerance is not None and not 0 < a.tolerance < 1:
        p.error("--tolerance takes a number above 0 and below 1")
    try:
        status, said = check_file(a)
        print(f"{a.file}: {said}", flush=True)
        return status
    except (Invalid, ModelError, clasp_mini.UsageError) as e:
        print(f"check_trace.py: {a.file}: {e}", file=sys.stderr)
    except OSError as e:
        where = "the output" if e.filename is None else e.filename
        print(f"check_trace.py: {where}: {e.strerror}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    clasp_mini.mend_streams()
    sys.exit(main())
