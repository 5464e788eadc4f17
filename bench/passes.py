"""What passes cost: those that the policy's tables are made of (policy/costs.py), against the bytes
that they must read and a copy of memory; below, the tables, for --costs or a clasp.json.

    python bench/passes.py
    python bench/passes.py --questions demo/prompts.jsonl         # with the risks of the budgets
    python bench/passes.py --model synthetic-8b --draft-length 7 --repeats 20         # on a GPU

Calls are queued one behind another and waited for once, as many as fill a fiftieth of a second; the
passes take turns, so that a machine that slows down does so for all. On a GPU they are the recorded
ones, of which a verify has always --draft-length + 1 rows, or one.
"""
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)
from bench.questions import first_turns, job_for, parser, read_questions  # noqa: E402
from command.cli import UsageError, answer  # noqa: E402
from command.job import Job  # noqa: E402
from dp_layer_skip import choose_skip, torch  # noqa: E402
from policy import costs  # noqa: E402
from policy.adaptive import budgets  # noqa: E402
from speculative import Chance, generate  # noqa: E402

CONTEXT = 128                                          # tokens read before, as for the policy
COPY = {"cpu": 2 ** 28, "cuda": 2 ** 30}               # bytes, far more than any cache holds


def described(job: Job, kind: str, x: int) -> tuple[str, int]:
    """A pass's name, and the bytes that it reads: its layers' weights, the keys and values of the
    text, the head. A copy reads and writes."""
    c = job.cfg
    item = torch.finfo(job.dtype).bits // 8
    weights = 2 * c.D + 2 * (c.H + c.G) * c.hd * c.D + 3 * c.D * c.ffn
    layer = item * (weights + 2 * CONTEXT * c.G * c.hd)
    head = item * c.V * c.D
    if kind == "copy":
        return "copy of memory", 2 * x
    if kind == "draft":
        name = f"draft step, {x} of {c.L} left out" if x < c.L else "head alone"
        return name, (c.L - x) * layer + head
    if kind == "verify":
        return f"verify, {x} rows" if x > 1 else "plain step", c.L * layer + head
    again = x > 1                                      # the tokens of a probe are read once more
    return f"choice of up to {job.M} layers by {x}", (1 + again) * c.L * layer + head


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Of one call, from as many as fill a fiftieth of a second, 1 to 100."""
    def clock(n: int) -> float:
        began = time.perf_counter()
        for _ in range(n):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - began) / n
    return clock(max(1, min(100, int(0.02 / clock(1)))))


@torch.inference_mode()
def measured(job: Job) -> dict[tuple[str, int], float]:
    """The seconds of every pass of policy.costs, and of a copy of memory: medians."""
    timed = costs.passes(job.model, job.choose, job.K, job.M, job.probe, CONTEXT)
    a = torch.ones(COPY[job.device.type], device=job.device, dtype=torch.int8)
    b = torch.empty_like(a)
    timed["copy", a.nbytes] = lambda: b.copy_(a)
    times = {key: [] for key in timed}
    for _ in range(1 + job.a.repeats):                 # the first is a warm-up
        for key, call in timed.items():
            times[key].append(seconds(call, job.device))
    return {key: statistics.median(every[1:]) for key, every in times.items()}


def risks(job: Job, prompts: Sequence[list[int]]) -> list[float]:
    """risk[j]: how often a drafted token that was judged was rejected, at temperature 1, with j
    layers left out; between the policy's budgets linear."""
    found = {0: 0.005}
    for M in budgets(job.cfg.L):
        s = replace(job.plain, temperature=1.0, K=6, M=M, exit_threshold=0.3, interval=32)
        kept = 0
        rejected = 0
        for n, ids in enumerate(prompts):
            for r in generate(job.model, ids, s, Chance(n), choose_skip):
                kept += r.accepted
                rejected += r.accepted < len(r.drafted)
        found[M] = rejected / max(1, kept + rejected)
    return [min(x, 1.0) for x in costs.fill(found, job.cfg.L + 1)]


def main(argv: Sequence[str] | None = None) -> int:
    def work() -> int:
        p = parser("[flags]", __doc__.partition(":")[0])
        p.add_argument("--questions", metavar="FILE", help="measure the risks by these, too")
        a = p.parse_args(argv)
        if a.prompt is not None or a.prompt_ids or a.compare or a.verbose or a.trace:
            raise UsageError("no text is written: without --prompt, --prompt-ids, --compare, "
                             "--verbose, --trace")
        questions = read_questions(a.questions) if a.questions else []
        job = job_for(a, questions)
        prompts = [ids for _, ids in first_turns(job, questions)]
        job.adaptive = False                           # measured here, whatever the folder says
        took = measured(job.load())
        job.costs = costs.tables(took, job.cfg.L, job.K)
        if prompts:
            job.costs["risk"] = risks(job, prompts)
        found = {}
        for key, each in took.items():
            name, size = described(job, *key)
            found[name] = dict(seconds=each, bytes=size, bytes_per_second=size / each,
                               plain_steps=each / took["verify", 1])
        if a.json:
            print(json.dumps(dict(settings=job.report(), context=CONTEXT, passes=found)))
            return 0
        copy = found["copy of memory"]["bytes_per_second"]
        print(f"{f'after {CONTEXT} tokens':<32}        ms  GB to read    GB/s of copy plain steps")
        for name, f in found.items():
            rate = f["bytes_per_second"]
            print(f"{name:<32} {1e3 * f['seconds']:9.3f} {f['bytes'] / 1e9:11.4f} "
                  f"{rate / 1e9:7.1f} {rate / copy:7.0%} {f['plain_steps']:11.2f}")
        print(f"\n{json.dumps(job.costs)}")
        return 0
    return answer(work)


if __name__ == "__main__":
    sys.exit(main())
