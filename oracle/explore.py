"""A run as one page to be opened in a browser: step by step, with the run's own numbers.

    python oracle/explore.py --prompt "class Stack:" --temperature 0.8 --out run.html
    python oracle/explore.py --from-trace run.jsonl --model DIR --out run.html

Either way the page is made of a trace (TRACE.md): tokens, p, q, a, u, verdicts, D and sets are
those of its lines. What a trace leaves out, the distributions around the tokens and the choice that
each cell of the table did not take, is what check_trace.py has while it follows the trace.
`Story` says what the page is given; explore.html shows it and computes nothing but places.
"""
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)     # see check_trace.py

import collections  # noqa: E402
import json  # noqa: E402
import tempfile  # noqa: E402
from argparse import Namespace  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from typing import Any  # noqa: E402

from command.cli import Parser, UsageError, answer  # noqa: E402
from command.flags import parsed, parser  # noqa: E402
from command.job import Job  # noqa: E402
from llama import Llama, ModelError, Tensor, torch  # noqa: E402
from oracle.check_trace import Check, Departure, Incomplete, prepare  # noqa: E402
from oracle.trace import Invalid, Lines, record  # noqa: E402
from policy.adaptive import overlap  # noqa: E402
from speculative import probabilities, residual  # noqa: E402
from text.stream import Text  # noqa: E402
from text.tokenizer import Tokenizer  # noqa: E402

TEMPLATE = Path(__file__).resolve().with_name("explore.html")
TOP = 6                      # tokens shown of each distribution, beside those that were drawn


def digits(x: float, n: int = 5) -> float:
    """x in n digits, to be shown."""
    return float(f"{x:.{n}g}")


def rounded(table: Sequence[Sequence[float | None]]) -> list[list[float | None]]:
    return [[None if value is None else round(value, 6) for value in row] for row in table]


def top(p: Tensor, q: Tensor, also: int) -> list[list]:
    """[token, p, q] of the likeliest of both and of `also`, the most likely first."""
    n = min(TOP, len(p))
    ids = {also, *p.topk(n).indices.tolist(), *q.topk(n).indices.tolist()}
    some = [[i, digits(p[i].item()), digits(q[i].item())] for i in ids]
    possible = [x for x in some if max(x[1:]) > 0 or x[0] == also]
    return sorted(possible, key=lambda x: (-max(x[1:]), x[0]))


def bounds(p: Tensor, token: int) -> list[float]:
    """Where in the running sum of p the token lies: it is drawn by the u between these."""
    cdf = p.double().cumsum(0)
    return [digits((x / cdf[-1]).item()) for x in (cdf[token] - p[token].double(), cdf[token])]


class Story(Check):
    """A check that keeps for each whole round what the page shows of it: in `rounds` `start`,
    `skip`, `ended`, `draft`, `own`, `emit`, `optimise` and `times`, as the trace names them.

    In `draft` a token's lines, its verdict's u as `judged`, the place `at` in the running sum of q,
    sum(min(p, q)) as `overlap`, and `top` with [id, p, q]; in `own` `top` is [id, probability]; in
    `optimise` `other` is how near the state comes that a cell did not take."""

    def __init__(self, *about: Any) -> None:
        super().__init__(*about)
        self.rounds: list[dict] = []
        self.last: dict | None = None                  # the `end`, if the trace comes to it

    def take(self, event: str, **want: Any) -> dict:
        line = super().take(event, **want)
        if event == "end":
            self.last = line
        else:
            self.said[event].append(line)
        return line

    def check_round(self) -> None:
        self.said = collections.defaultdict(list)
        super().check_round()
        said = self.said
        p = probabilities(self.logits, self.s)                              # (k+1, V)
        q = [probabilities(logits, self.s) for logits in self.draft_logits]
        out = {name: self.begin[name] for name in ("start", "skip", "ended")}
        out["draft"] = [told(*each) for each in zip(p, q, said["draft"], said["verify"])]
        own = said["own"][0]
        accepted = self.outcomes[-1][1]
        dist = residual(p[accepted], q[accepted]) if own["kind"] == "residual" else p[accepted]
        out["own"] = {name: own[name] for name in ("kind", "token", "probability", "u")}
        out["own"]["at"] = bounds(dist, own["token"])
        out["own"]["top"] = [[i, x] for i, x, _ in top(dist, dist, own["token"])]
        out["emit"] = said["emit"][0]["tokens"]
        for line in said["optimise"]:
            other = [[skip if bit == "0" else run for run, skip, bit in zip(*ways, bits)]
                     for ways, bits in zip(self.ways, line["skipped"])]
            out["optimise"] = {name: line[name] for name in ("position", "M", "skipped", "skip")}
            out["optimise"] |= dict(D=rounded(line["D"]), other=rounded(other))
        for line in said["times"]:
            out["times"] = [line[name] for name in ("draft", "verify", "optimise")]
        self.rounds.append(out)


def told(p: Tensor, q: Tensor, d: dict, v: dict) -> dict:
    """A drafted token: its lines, and what stands around it in p and q."""
    return dict(token=d["token"], q=d["q"], confidence=d["confidence"], u=d["u"],
                at=bounds(q, d["token"]), overlap=digits(overlap(p, q).item()),
                top=top(p, q, d["token"]), p=v["p"], a=v["a"], judged=v["u"],
                accepted=v["accepted"])


def accounts(header: dict, rounds: Sequence[dict]) -> list[dict]:
    """After each round: what was decoded, and what it took in plain steps. The costs are those that
    the run measured; without any a draft step costs the share of the layers it runs, and a verify
    1. As in the README the prefill is not counted, nor are layer optimisations."""
    L, costs = header["config"]["L"], header["costs"]
    sums = dict(tokens=0, drafted=0, accepted=0, drafting=0.0, verifying=0.0)
    out = []
    for n, r in enumerate(rounds):
        k = len(r["draft"])
        left_out = len(r["skip"])
        draft, verify = 1 - left_out / L, 1.0
        if costs:
            try:
                draft, verify = float(costs["draft"][left_out]), float(costs["verify"][k + 1])
            except (LookupError, TypeError, ValueError):
                raise Invalid(f"round {n}: passes of which the header has no costs") from None
        if n > 0:
            sums["tokens"] += len(r["emit"])
            sums["drafted"] += k
            sums["accepted"] += sum(d["accepted"] is True for d in r["draft"])
            sums["drafting"] += k * draft
            sums["verifying"] += verify
        out.append({name: digits(value) for name, value in sums.items()})
    return out


@torch.inference_mode()
def explored(path: str | Path, a: Namespace, model: Llama | None, tok: Tokenizer | None) -> dict:
    """All that the page shows of a trace: `settings` and the like of its header, `rounds`, `pieces`
    (the texts of each `emit`: a character split over tokens is the last's), `prompt` likewise,
    `tokens` (id -> text of every one that occurs, alone), `accounts` after each round in plain
    steps, and `end`, None if it breaks off."""
    with open(path, "rb") as file:
        story = prepare(Lines(file), a, Story, model)
        header = story.lines.now
        try:
            story.run()
        except Incomplete:
            pass
        except Departure as e:
            raise Invalid(f"{e.args[0]}; check_trace.py says more") from None
    shown = Text(tok, ())
    prompt = [[i, piece(shown, i)] for i in header["prompt_ids"]]
    ids = {*header["prompt_ids"]}
    for r in story.rounds:
        r["pieces"] = [piece(shown, i) for i in r["emit"]]
        for x in [*r["draft"], r["own"]]:
            ids |= {x["token"], *(row[0] for row in x["top"])}
    return dict(settings=header["settings"], dtype=header["dtype"], L=header["config"]["L"],
                V=header["config"]["V"], costs=bool(header["costs"]), end=story.last,
                prompt=prompt, rounds=story.rounds, accounts=accounts(header, story.rounds),
                tokens={i: alone(tok, i) for i in sorted(ids)})


def piece(shown: Text, i: int) -> str:
    return shown.add([i]) if shown.tokenizer else f"{i} "


def alone(tok: Tokenizer | None, i: int) -> str:
    """A token's text; bytes that are no characters by themselves as such, and an id without text,
    of which a model may have some, as it is."""
    try:
        return tok.decode_bytes([i]).decode("utf-8", errors="backslashreplace") if tok else str(i)
    except ModelError:
        return f"[{i}]"


def page(data: dict) -> str:
    """The template with the run in it. `<` in a text cannot end the element it stands in."""
    said = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace("{RUN}", said, 1)


def flags() -> Parser:
    p = parser()
    p.usage = "python oracle/explore.py (--prompt TEXT | --from-trace FILE) --out PAGE [flags]"
    p.add_argument("--from-trace", metavar="FILE", help="show this run; --model names its model")
    p.add_argument("--out", metavar="PAGE", required=True, help="the HTML file to write")
    p.set_defaults(tolerance=None, survey=True, dump_at=None)      # of check_trace.py
    return p


def told_of(a: Namespace) -> dict:
    """What the page shows: of the trace that is asked for, or of a run that is made now."""
    if a.from_trace:
        a.device = a.device or "cpu"
        try:
            tok = Tokenizer(a.model)
        except ModelError:
            tok = None                                 # then ids are shown
        return explored(a.from_trace, a, None, tok)
    a.eager = True                                     # to be looked at, not timed
    job = Job(a)
    ids = job.prompt()
    job.load()
    with tempfile.TemporaryDirectory() as folder:
        a.trace = a.trace or f"{folder}/trace.jsonl"
        try:
            for r in record(job, ids, a.seed):
                if sys.stderr.isatty():
                    done = r.start + len(r.emitted) - len(ids)
                    print(f"\r{done} tokens", end="\r", file=sys.stderr, flush=True)
        except KeyboardInterrupt:                      # what has been made so far is shown
            pass
        return explored(a.trace, a, job.model, job.tokenizer)


def main(argv: Sequence[str] | None = None) -> int:
    def work() -> int:
        a = parsed(argv, flags())
        if a.from_trace and (a.prompt is not None or a.prompt_ids is not None or a.trace):
            raise UsageError("--from-trace goes without --prompt, --prompt-ids and --trace")
        if a.compare or a.json or a.verbose:
            raise UsageError("a page is written: without --compare, --json and --verbose")
        if not Path(a.out).parent.is_dir():            # before a long run, not after it
            raise UsageError(f"--out {a.out}: no such folder")
        try:
            data = told_of(a)
            said = page(data)
        except Invalid as e:
            raise UsageError(f"{a.from_trace or 'the run'}: {e}") from None
        Path(a.out).write_text(said, encoding="utf-8")
        tokens = sum(len(r["emit"]) for r in data["rounds"])
        print(f"{a.out}: {len(data['rounds'])} rounds, {tokens} tokens, {len(said) / 1000:.0f} kB")
        return 0
    return answer(work)


if __name__ == "__main__":
    sys.exit(main())
