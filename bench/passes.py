"""What passes cost on this machine, in plain steps. (On a GPU, and against its bandwidth:
gpu/check.py.)

    python bench/passes.py
    python bench/passes.py --json > costs.json              # as tables, for --costs
    python bench/passes.py demo/prompts.jsonl --json        # with the risks of the budgets

The passes take turns, so that a machine that slows down does so for all; medians of --repeats.
"""
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)
from bench.spec_bench import first_turns, opened  # noqa: E402
from command.cli import answered, told  # noqa: E402
from command.job import Job  # noqa: E402
from dp_layer_skip import torch  # noqa: E402
from policy import costs  # noqa: E402
from policy.adaptive import budgets  # noqa: E402
from policy.probe import PaperByProbe, choose_by  # noqa: E402
from speculative import Chance, generate, read  # noqa: E402
from torch import Tensor  # noqa: E402

CONTEXT = 128                                          # tokens of text before
Key = tuple[str, int]                                  # a kind of pass, and how large


def passes(job: Job) -> dict[Key, Callable[[], Tensor]]:
    """("draft", j) is a draft step with j layers left out, ("verify", n) one of n rows, ("choice",
    r) of up to M layers by r tokens, with all that the policy does then."""
    L = job.cfg.L
    model = job.model
    text = [0] * CONTEXT
    cache = model.cache(CONTEXT + max(job.K + 1, (job.M + 1) * job.probe + 1))
    h = torch.stack([x[-1] for x in read(model, text, 0, cache)])           # (L+1, D)

    def rows(n: int, j: int = 0) -> Tensor:
        ids = torch.tensor([0] * n, device=model.device)
        skip = costs.spread(L, j)
        return model.head(model.forward(ids, cache.sequence(CONTEXT, n), cache, skip)[-1])

    def choice() -> Tensor:
        found, end = choose_by(job.probe, job.choose, model, cache, text, h, job.M)
        g = found.g.view(-1, model.cfg.D)[:len(budgets(L)) * job.probe]
        return model.head(torch.cat((end, g)))

    out = {("draft", j): partial(rows, 1, j) for j in sorted({1, L // 3, 2 * L // 3, L} - {0})}
    out |= {("verify", n): partial(rows, n) for n in (1, 2, 4, 8, job.K + 1) if n <= job.K + 1}
    return out | {("choice", job.probe): choice}


@torch.inference_mode()
def measured(job: Job) -> dict[Key, float]:
    """The seconds of every pass."""
    timed = passes(job)
    turns = []
    for _ in told(range(1 + job.flags.repeats), "turn"):
        turn = {}
        for key, call in timed.items():
            began = time.perf_counter()
            call()[0, 0].item()                        # waits for a GPU
            turn[key] = time.perf_counter() - began
        turns.append(turn)
    return {key: statistics.median(turn[key] for turn in turns[1:]) for key in timed}


def tables(took: dict[Key, float], L: int, K: int) -> dict[str, Any]:
    """What the policy goes by, in plain steps. Noise makes no draft dearer, no verify cheaper."""
    cost = {key: seconds / took["verify", 1] for key, seconds in took.items()}
    draft = {0: 1.0} | {j: min(1.0, cost["draft", j]) for kind, j in cost if kind == "draft"}
    verify = {0: 1.0} | {n: max(1.0, cost["verify", n]) for kind, n in cost if kind == "verify"}
    choice = next(cost[kind, r] for kind, r in cost if kind == "choice")
    return dict(draft=costs.fill(draft, L + 1), verify=costs.fill(verify, K + 2),
                optimise=round(choice, 3))


def risks(job: Job, prompts: Sequence[list[int]]) -> list[float]:
    """risk[j]: how often a drafted token that was judged was rejected, at temperature 1, with j
    layers left out; between the policy's budgets linear."""
    L = job.cfg.L
    found = {0: 0.005}
    for M in told(budgets(L), "risks: budget"):
        s = replace(job.plain, temperature=1.0, K=6, M=M, exit_threshold=0.3, interval=32)
        kept = 0
        rejected = 0
        for n, ids in enumerate(prompts):
            policy = PaperByProbe(s, L, job.probe)
            for r in generate(job.model, ids, s, Chance(n), job.choose, policy):
                kept += r.accepted
                rejected += r.accepted < len(r.drafted)
        found[M] = rejected / max(1, kept + rejected)
    return [min(x, 1.0) for x in costs.fill(found, L + 1)]


def table(took: dict[Key, float], job: Job) -> str:
    names = dict(draft=f"draft step, {{}} of {job.cfg.L} left out", verify="verify, {} rows",
                 choice=f"choice of up to {job.M} layers by {{}}")
    lines = [f"{f'after {CONTEXT} tokens':<32}        ms  plain steps"]
    for (kind, x), seconds in took.items():
        name = "plain step" if (kind, x) == ("verify", 1) else names[kind].format(x)
        lines.append(f"{name:<32} {1e3 * seconds:9.3f} {seconds / took['verify', 1]:12.2f}")
    return "\n".join(lines)


@answered
def main(argv: Sequence[str] | None = None) -> int:
    job, questions = opened(__doc__.partition(".")[0], argv, file=None, repeats=20)
    prompts = first_turns(job, questions)
    took = measured(job.load())
    job.costs = tables(took, job.cfg.L, job.K)
    if prompts:
        job.costs["risk"] = risks(job, prompts)
    print(json.dumps(dict(settings=job.report())) if job.flags.json else table(took, job))
    return 0


if __name__ == "__main__":
    sys.exit(main())
