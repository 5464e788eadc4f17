"""What a model's passes cost (text/costs.py), and how often a token that is drafted with so many of
its layers left out is rejected: what a clasp.json holds, for a seed to mean one text everywhere.

    python bench/costs.py [FILE] [flags]       # the risks by the questions of FILE (the demo's)
"""
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)
import clasp_mini  # noqa: E402
from bench.spec_bench import read_questions  # noqa: E402
from speculative import Adaptive  # noqa: E402
from command.cli import answer  # noqa: E402
from text.costs import fill  # noqa: E402


def risks(job: Any, prompts: Sequence[list[int]]) -> list[float]:
    """risk[j] for every budget j: how often a drafted token that was judged was rejected, at
    temperature 1, with j layers left out; between the policy's budgets linear."""
    L, found = job.cfg.L, {0: 0.005}
    for j in Adaptive.budgets(L):
        kept = rejected = 0
        for n, ids in enumerate(prompts):
            s = replace(job.settings, temperature=1.0, K=6, M=j, exit_threshold=0.3, interval=32)
            for r in job.run(ids, s, n):
                kept, rejected = kept + r.accepted, rejected + (r.accepted < len(r.drafted))
        found[j] = rejected / max(1, kept + rejected)
    return [min(x, 1.0) for x in fill(found, L + 1)]


def main(argv: Sequence[str] | None = None) -> int:
    def work() -> int:
        p = clasp_mini.parser()
        p.usage = "python bench/costs.py [FILE] [flags]"
        p.add_argument("file", nargs="?", default=str(clasp_mini.DEMO / "prompts.jsonl"))
        job = clasp_mini.Job(p.parse_args(argv))
        job.adaptive, job.costs = True, None           # measured anew, whatever the folder says
        job.load()
        prompts = [job.encode([dict(role="user", content=turns[0])])
                   for _, turns in read_questions(job.a.file)]
        job.costs["risk"] = risks(job, [job.fits(ids) for ids in prompts])
        print(json.dumps(job.costs))
        return 0
    return answer(work)


if __name__ == "__main__":
    sys.exit(main())
