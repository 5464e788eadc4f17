"""A run as one page to be opened in a browser: step by step, with the run's own numbers.

    python oracle/explore.py --prompt "class Stack:" --temperature 0.8 --out run.html
    python oracle/explore.py --from-trace run.jsonl --model DIR --out run.html

Either way the page is made of a trace (TRACE.md): what its lines say is shown as it stands there.
What they leave out, the distributions around the tokens and the choice that each cell of the table
did not take, check_trace.py has while it follows the trace. explore.html computes nothing but
places.
"""
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)     # see check_trace.py

import json  # noqa: E402
import math  # noqa: E402
import tempfile  # noqa: E402
from argparse import Namespace  # noqa: E402
from collections.abc import Sequence  # noqa: E402

from clasp_mini import policy_of  # noqa: E402
from command.cli import UsageError, answer  # noqa: E402
from command.flags import parsed, parser  # noqa: E402
from command.job import Job  # noqa: E402
from llama import Llama, ModelError, Tensor, torch  # noqa: E402
from oracle.check_trace import Check, Departure, Incomplete, prepare  # noqa: E402
from oracle.trace import Invalid, Lines, record  # noqa: E402
from policy.adaptive import overlap  # noqa: E402
from speculative import probabilities, residual  # noqa: E402
from command.screen import Text  # noqa: E402
from text.tokenizer import Tokenizer  # noqa: E402

TEMPLATE = Path(__file__).resolve().with_name("explore.html")
TOP = 6                      # tokens shown of each distribution, beside those that were drawn


def digits(x: float) -> float:
    return float(f"{x:.5g}")


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

    def check_round(self) -> None:
        super().check_round()
        said = self.taken
        p = probabilities(self.logits, self.s)                              # (k+1, V)
        q = [probabilities(logits, self.s) for logits in self.draft_logits]
        out = {name: self.begin[name] for name in ("start", "skip", "ended")}
        out["draft"] = [told(*each) for each in zip(p, q, said["draft"], said["verify"])]
        own = said["own"][0]
        accepted = self.outcomes[-1][1]
        dist = residual(p[accepted], q[accepted]) if own["kind"] == "residual" else p[accepted]
        best = [[i, x] for i, x, _ in top(dist, dist, own["token"])]
        out["own"] = own | dict(at=bounds(dist, own["token"]), top=best)
        out["emit"] = said["emit"][0]["tokens"]
        for line in said["optimise"]:
            other = [[near.get("10"[int(bit)]) for near, bit in zip(row, bits)]
                     for row, bits in zip(self.ways, line["skipped"])]
            out["optimise"] = line | dict(D=rounded(line["D"]), other=rounded(other))
        for line in said["times"]:
            out["times"] = [line[name] for name in ("draft", "verify", "optimise")]
        self.rounds.append(out)


def told(p: Tensor, q: Tensor, draft: dict, verify: dict) -> dict:
    """A drafted token: its lines, and what stands around it in p and q."""
    token = draft["token"]
    return verify | draft | dict(judged=verify["u"], at=bounds(q, token), top=top(p, q, token),
                                 overlap=digits(overlap(p, q).item()))


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
        draft = 1 - left_out / L
        verify = 1.0
        if costs:
            try:
                draft = float(costs["draft"][left_out])
                verify = float(costs["verify"][k + 1])
                if not math.isfinite(draft + verify):
                    raise ValueError
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
        story.rounds = []
        try:
            story.run()
        except Incomplete:
            pass
        except Departure as e:
            raise Invalid(f"{e.args[0]}; check_trace.py says more") from None
    h = story.header
    shown = Text(tok, ())
    prompt = [[i, piece(shown, i)] for i in h["prompt_ids"]]
    ids = {*h["prompt_ids"]}
    for r in story.rounds:
        r["pieces"] = [piece(shown, i) for i in r["emit"]]
        for x in [*r["draft"], r["own"]]:
            ids |= {x["token"], *(row[0] for row in x["top"])}
    return dict(settings=h["settings"], dtype=h["dtype"], L=h["config"]["L"], V=h["config"]["V"],
                costs=bool(h["costs"]), end=next(iter(story.taken["end"]), None), prompt=prompt,
                rounds=story.rounds, accounts=accounts(h, story.rounds),
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
            for r in record(job, ids, a.seed, policy_of(job)):
                if sys.stderr.isatty():
                    done = r.start + len(r.emitted) - len(ids)
                    print(f"\r{done} tokens", end="\r", file=sys.stderr, flush=True)
        except KeyboardInterrupt:                      # what has been made so far is shown
            pass
        return explored(a.trace, a, job.model, job.tokenizer)


def main(argv: Sequence[str] | None = None) -> int:
    def work() -> int:
        p = parser()
        p.usage = "python oracle/explore.py (--prompt TEXT | --from-trace FILE) --out PAGE [flags]"
        p.add_argument("--from-trace", metavar="FILE", help="show this run of --model")
        p.add_argument("--out", metavar="PAGE", required=True, help="the HTML file to write")
        p.set_defaults(tolerance=None, survey=True, dump_at=None)      # of check_trace.py
        a = parsed(argv, p)
        if a.from_trace and (a.prompt is not None or a.prompt_ids is not None or a.trace):
            raise UsageError("--from-trace goes without --prompt, --prompt-ids and --trace")
        if a.compare or a.json or a.verbose:
            raise UsageError("a page is written: without --compare, --json and --verbose")
        if not Path(a.out).parent.is_dir():            # before a long run, not after it
            raise UsageError(f"--out {a.out}: no such folder")
        try:
            data = told_of(a)
        except Invalid as e:
            raise UsageError(f"{a.from_trace or 'the run'}: {e}") from None
        # `<` in a text of the run cannot end the element that it stands in.
        said = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
        said = TEMPLATE.read_text(encoding="utf-8").replace("{RUN}", said, 1)
        Path(a.out).write_text(said, encoding="utf-8")
        tokens = sum(len(r["emit"]) for r in data["rounds"])
        print(f"{a.out}: {len(data['rounds'])} rounds, {tokens} tokens, {len(said) / 1000:.0f} kB")
        return 0
    return answer(work)


if __name__ == "__main__":
    sys.exit(main())
