"""A run as one page to be opened in a browser: step by step, with the run's own numbers.

    python oracle/explore.py --prompt "class Stack:" --temperature 0.8 --out run.html
    python oracle/explore.py --from-trace run.jsonl --model DIR --out run.html

Either way the page is made of a trace (TRACE.md): tokens, p, q, a, u, verdicts, D and sets are
those of its lines. What a trace leaves out, the distributions around the tokens and the choice that
each cell of the table did not take, comes from a replay, led along the trace as in check_trace.py.
`explored` says what the page is given; explore.html shows it and computes nothing but places.
"""
import sys
from pathlib import Path

if __name__ == "__main__":
    # Instead of this folder, whose trace.py would stand before the standard library's.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import collections  # noqa: E402
import io  # noqa: E402
import json  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Iterator, Sequence  # noqa: E402
from typing import Any  # noqa: E402

import clasp_mini  # noqa: E402
from dp_layer_skip import nearness  # noqa: E402
from llama import Config, Llama, ModelError, Tensor, torch  # noqa: E402
from oracle import trace  # noqa: E402
from speculative import Settings, overlap, probabilities, read, residual  # noqa: E402
from command.cli import Parser, UsageError, answer  # noqa: E402
from command.report import Text  # noqa: E402
from text.tokenizer import Tokenizer  # noqa: E402

TEMPLATE = Path(trace.__file__).with_name("explore.html")
TOP = 6                      # tokens shown of each distribution, beside those that were drawn
Rounds = list[dict[str, list[dict]]]                   # event -> its lines in the round


def lines_of(path: str | Path) -> tuple[dict, Rounds, dict | None]:
    """A trace's header, its rounds, and its `end`, if it came to it. One that breaks off, even in
    the middle of a line, is read as far as it goes."""
    raw = Path(path).read_bytes()
    lines = trace.Lines(io.BytesIO(raw[:raw.rfind(b"\n") + 1]))
    header, out = lines.header(), []
    lines.schema = trace.schema(Config(**header["config"]))
    try:
        while not out or out[-1]["event"] != "end":
            lines.advance()
            if not out and lines.now["event"] != "round":
                raise trace.Invalid("line 2: a trace's rounds begin with a round")
            out.append(lines.now)
    except trace.Incomplete:
        return header, trace.by_round(out), None
    return header, trace.by_round(out), out[-1]


def wanted(so: bool, n: int, what: str) -> None:
    """The replay can only be led by what follows TRACE.md in these things."""
    if not so:
        raise trace.Invalid(f"round {n}: {what}; check_trace.py says more")


def digits(x: float, n: int = 5) -> float:
    """x in n digits, to be shown."""
    return float(f"{x:.{n}g}")


class Replay:
    """The passes of a run once more, led along its trace. The fields are those of
    speculative.generate."""

    def __init__(self, model: Llama, header: dict) -> None:
        values = dict(header["settings"], stop_ids=tuple(header["settings"]["stop_ids"]))
        del values["seed"]
        self.model, self.s, self.text = model, Settings(**values), list(header["prompt_ids"])
        self.end = len(self.text) + self.s.N
        self.cache = model.cache(self.end + (model.cfg.L + 1) * self.s.r)
        self.recent = collections.deque(maxlen=self.s.r)       # states of the last rounds
        self.cached = 0

    def round(self, n: int, r: dict[str, list[dict]]) -> dict:
        """What the page is given of a round. Of one that breaks off there may be only a part."""
        begin, drafts, verdicts = r["round"][0], r["draft"], r["verify"]
        drafted, t, k = [d["token"] for d in drafts], len(self.text) - 1, len(drafts)
        said = [(v["step"], v["token"]) for v in verdicts]
        wanted(begin["round"] == n and begin["start"] == t + 1, n, "it does not follow the last")
        wanted([d["step"] for d in drafts] == list(range(k)) and
               said == [*enumerate(drafted)][:k if r["own"] else len(said)], n,
               "drafted and verified are not the same tokens")
        wanted(all(len(r[one]) <= 1 for one in ("own", "emit", "optimise", "times")) and
               t + 1 + k < self.end, n, "more lines than a round has")
        q, p = self.passes(t, drafted, begin["skip"])
        out = dict(start=begin["start"], skip=begin["skip"], ended=begin["ended"],
                   draft=[self.position(p[i], q[i], d, verdicts[i:i + 1])
                          for i, d in enumerate(drafts)])
        accepted = sum(v["accepted"] is True for v in verdicts)
        for own in r["own"]:
            kind = "residual" if accepted < k else "bonus" if k else "plain"
            wanted(own["kind"] == kind, n, f"own is {own['kind']}, and it is {kind}")
            dist = residual(p[accepted], q[accepted]) if accepted < k else p[accepted]
            out["own"] = {name: own[name] for name in ("kind", "token", "probability", "u")}
            out["own"] |= dict(at=bounds(dist, own["token"]), top=[
                [i, digits(x)] for i, x, _ in top(dist, dist, [own["token"]])])
        for emit in r["emit"]:
            said = drafted[:accepted] + [own["token"] for own in r["own"]]
            wanted(emit["tokens"] == said[:len(emit["tokens"])] != [], n,
                   "emitted is not what was accepted and drawn")
            out["emit"] = emit["tokens"]
            self.text += emit["tokens"]
            self.cached = t + accepted + 1
            self.recent.append(self.h[:, :self.h.shape[1] - len(drafted) + accepted])
        for line in r["optimise"]:
            out["optimise"] = self.table(n, line)
        for line in r["times"]:
            out["times"] = [line[name] for name in ("draft", "verify", "optimise")]
        return out

    def passes(self, t: int, drafted: list[int], skip: list[int]) -> tuple[list[Tensor], Tensor]:
        """q (V,) of each drafted token, p (k+1, V); keeps the verify's states."""
        model, q, k = self.model, [], len(drafted)
        left_out = [i in skip for i in range(model.cfg.L)]
        for step, token in enumerate([self.text[-1], *drafted][:k]):
            ids = torch.tensor([token], device=model.device)
            logits, _ = model.forward(ids, self.cache.sequence(t + step, 1), self.cache, left_out)
            q.append(probabilities(logits[0], self.s))
        todo = self.text[self.cached:] + drafted
        rows = max(k + 1, min(self.s.r, len(todo)))
        logits, self.h = read(model, todo, self.cached, self.cache, rows, states=True)
        return q, probabilities(logits[-k - 1:], self.s)

    def position(self, p: Tensor, q: Tensor, d: dict, verdict: list[dict]) -> dict:
        """A drafted token: its lines, and what stands around it in p and q."""
        out = {name: d[name] for name in ("token", "q", "confidence", "u")}
        out |= dict(at=bounds(q, d["token"]), overlap=digits(overlap(p, q).item()), top=[
            [i, digits(x), digits(y)] for i, x, y in top(p, q, [d["token"]])])
        for v in verdict:
            out |= dict(p=v["p"], a=v["a"], judged=v["u"], accepted=v["accepted"])
        return out

    def table(self, n: int, line: dict) -> dict:
        """Both choices of every cell: D, and the cosine of the one not taken (None: there is none).
        The recurrence of dp_layer_skip.table, whose choices are the trace's."""
        model, M, L = self.model, line["M"], self.model.cfg.L
        shape = [min(i, M) + 1 for i in range(L + 1)]
        wanted(M <= L and line["position"] == len(self.text) - 2 and
               all([*map(len, line[name])] == shape for name in ("D", "parents")), n,
               "a table of another size or at another place")
        h, other = torch.cat([*self.recent], 1)[:, -self.s.r:], [[None]]    # (L+1, r, D)
        rows = self.cache.candidates(line["position"], M + 1, h.shape[1])
        g = h[:1]                                      # g[i, 0..min(i, M)], here i = 0
        for i in range(1, L + 1):
            x = model.layer(i - 1, g.flatten(0, 1), rows, self.cache).view_as(g)
            run, skip = torch.cat((x, g[-1:]))[:M + 1], torch.cat((g[:1], g))[:M + 1]
            both = torch.stack((run, skip))                                 # (2, J, r, D)
            cos = nearness(h, i, both).tolist()                             # 2 x J
            skipped = [bit == "1" for bit in line["parents"][i]]
            wanted(not skipped[0] and all(skipped[i:]), n, "a parent outside of the table")
            other.append([None if j in (0, i) else round(cos[not s][j], 6)
                          for j, s in enumerate(skipped)])
            g = both[torch.tensor(skipped, device=h.device).long(),
                     torch.arange(len(skipped), device=h.device)]
            g[0] = h[i]
        return dict(position=line["position"], M=M, parents=line["parents"], other=other,
                    skip=line["skip"], D=[[round(v, 6) for v in row] for row in line["D"]])


def top(p: Tensor, q: Tensor, also: list[int]) -> list[tuple[int, float, float]]:
    """(token, p, q) of the likeliest of both and of those in `also`, the most likely first."""
    ids = {*p.topk(min(TOP, len(p))).indices.tolist(), *q.topk(min(TOP, len(q))).indices.tolist()}
    some = [(i, p[i].item(), q[i].item()) for i in ids | {*also}]
    return sorted((x for x in some if max(x[1:]) > 0 or x[0] in also),
                  key=lambda x: (-max(x[1:]), x[0]))


def bounds(p: Tensor, token: int) -> list[float]:
    """Where in the running sum of p the token lies: it is drawn by the u between these."""
    cdf = p.double().cumsum(0)
    return [digits(((cdf[token] - x) / cdf[-1]).item()) for x in (p[token].double(), 0)]


def accounts(header: dict, rounds: Sequence[dict]) -> Iterator[dict]:
    """After each round: what was decoded, and what it took in plain steps. The costs are those that
    the run measured; without any a draft step costs the share of the layers it runs, and a verify
    1. As in the README the prefill is not counted, nor are layer optimisations."""
    L, costs = header["config"]["L"], header["costs"]
    sums = collections.Counter()
    for n, r in enumerate(rounds):
        k, left_out = len(r["draft"]), len(r["skip"])
        if costs:
            wanted(left_out < len(costs["draft"]) and k + 1 < len(costs["verify"]), n,
                   "it took passes of which the header has no costs")
        if n and r.get("emit"):
            sums["tokens"] += len(r["emit"])
            sums["drafted"] += k
            sums["accepted"] += sum(d["accepted"] is True for d in r["draft"])
            sums["drafting"] += k * (costs["draft"][left_out] if costs else 1 - left_out / L)
            sums["verifying"] += costs["verify"][k + 1] if costs else 1
        yield {name: digits(sums[name]) if name.endswith("ing") else sums[name] for name in
               ("tokens", "drafted", "accepted", "drafting", "verifying")}


@torch.inference_mode()
def explored(model: Llama, tok: Tokenizer | None, header: dict, rounds: Rounds,
             end: dict | None) -> dict:
    """All that the page shows:

    header, end   of the trace; `end` is None if it breaks off
    tokens        id -> text of every token that occurs, alone
    prompt        [id, text] of each, as in the text: a character split over tokens is the last's
    rounds        of each `start`, `skip`, `ended`, `draft`, `own`, `emit`, `optimise`, `times` as
                  the trace names them. In `draft` a token's lines, its verdict's u as `judged`, the
                  place `at` in the running sum of q, sum(min(p, q)) as `overlap`, and `top` with
                  [id, p, q]; in `own` `top` is [id, probability]; in `optimise` `other` is the
                  cosine of the choice that a cell did not take. `pieces` are the texts of `emit`
    accounts      after each round, in plain steps
    """
    replay, shown = Replay(model, header), Text(tok, ())
    prompt = [[i, piece(shown, i)] for i in header["prompt_ids"]]
    out = [replay.round(n, r) for n, r in enumerate(rounds)]
    ids = {*header["prompt_ids"]}
    for r in out:
        own = [r["own"]] if "own" in r else []
        r["pieces"] = [piece(shown, i) for i in r.get("emit", ())]
        ids |= {i for x in r["draft"] + own for i in (x["token"], *(row[0] for row in x["top"]))}
    return dict(header=header, end=end, tokens={i: alone(tok, i) for i in sorted(ids)},
                prompt=prompt, rounds=out, accounts=list(accounts(header, out)))


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


def parser() -> Parser:
    p = clasp_mini.parser()
    p.usage = "python oracle/explore.py (--prompt TEXT | --from-trace FILE) --out PAGE [flags]"
    p.add_argument("--from-trace", metavar="FILE", help="show this run; --model names its model")
    p.add_argument("--out", metavar="PAGE", required=True, help="the HTML file to write")
    return p


def traced(a: Any) -> tuple[clasp_mini.Job, dict, Rounds, dict | None]:
    """The job and the lines of the trace it is asked for, or of a run that is made now."""
    a.eager = True                                     # to be looked at, not timed
    if a.from_trace:
        header, rounds, end = lines_of(a.from_trace)
        # Nothing is decoded here, so no costs need be measured.
        a.strategy, a.dtype, a.prompt_ids = "ar", a.dtype or header["dtype"], header["prompt_ids"]
        a.max_new_tokens = header["settings"]["N"]
        job = clasp_mini.Job(a)
        if (trace.fingerprint(job.folder) != header["model"] or
                any(header["config"][size] != getattr(job.cfg, size) for size in "LV")):
            raise trace.Invalid(f"a trace of another model than {a.model}; --model names it")
        if not a.prompt_ids:
            raise trace.Invalid("a trace without a prompt")
        job.fits(a.prompt_ids)
        return job.load(), header, rounds, end
    job = clasp_mini.Job(a)
    ids = job.prompt()
    job.load()
    with tempfile.TemporaryDirectory() as folder:
        path = a.trace or f"{folder}/trace.jsonl"
        try:
            for r in trace.record(job, ids, path):
                if sys.stderr.isatty():
                    done = r.start + len(r.emitted) - len(ids)
                    print(f"\r{done} tokens", end="\r", file=sys.stderr, flush=True)
        except KeyboardInterrupt:                      # what has been made so far is shown
            pass
        return job, *lines_of(path)


def main(argv: Sequence[str] | None = None) -> int:
    def work() -> int:
        a = parser().parse_args(argv)
        if a.from_trace and (a.prompt is not None or a.prompt_ids is not None or a.trace):
            raise UsageError("--from-trace goes without --prompt, --prompt-ids and --trace")
        if a.compare or a.json or a.verbose:
            raise UsageError("a page is written: without --compare, --json and --verbose")
        if a.system is not None and not a.chat:
            raise UsageError("--system goes with --chat")
        if a.prompt_ids is not None and (a.chat or a.prompt is not None):
            raise UsageError("--prompt-ids goes without --prompt and --chat")
        if not Path(a.out).parent.is_dir():            # before a long run, not after it
            raise UsageError(f"--out {a.out}: no such folder")
        try:
            job, header, rounds, end = traced(a)
            said = page(explored(job.model, job.tokenizer, header, rounds, end))
        except trace.Invalid as e:
            raise UsageError(f"{a.from_trace or 'the run'}: {e}") from None
        Path(a.out).write_text(said, encoding="utf-8")
        tokens = sum(len(line["tokens"]) for r in rounds for line in r["emit"])
        print(f"{a.out}: {len(rounds)} rounds, {tokens} tokens, {len(said) / 1000:.0f} kB")
        return 0
    return answer(work)


if __name__ == "__main__":
    sys.exit(main())
