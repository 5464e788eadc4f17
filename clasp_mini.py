"""clasp-mini: self-speculative decoding with layers chosen in context (CLaSp, Chen et al., ACL
2025). The command. It joins the others in one direction: config and weights (llama.py) -> rounds
(speculative.py, which is handed the chooser of dp_layer_skip.py and a policy) -> text.

    python clasp_mini.py                                      # the model and a prompt that ship
    python clasp_mini.py --verbose                            # round by round
    python clasp_mini.py --prompt "class Stack:" --compare    # against plain decoding

Who decides how much is drafted, by which layers, and when these are chosen anew?

    --strategy clasp   the default: our policy (policy/adaptive.py), by what passes cost and what
                       was accepted. If flags name all four of the paper's numbers, nothing is left
                       to decide, and it equals `paper`
    --strategy paper   speculative.Paper, by four fixed numbers: K, M, exit threshold and interval
    --strategy ar      nobody: plain decoding, a token per pass, the paper's loop with K = 0
    --probe r          beside any of them: the last r tokens choose the layers, not one

A Job (command/job.py) is what the flags ask for:

    job.a          the flags themselves, checked
    job.settings   of speculative.py; job.numbers: the paper's four, None where a policy decides
    job.costs      of passes, in plain steps; guessed, as long as nobody has measured them
    job.model      the Llama, once it is loaded, and job.choose, which is choose_skip; on a GPU
                   recordings of both (gpu/replay.py)
    job.guarded    hands rounds on, and makes one line of it if memory is short or GPUs disagree
"""
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial

if __name__ == "__main__":
    import command.start  # noqa: F401  first: starts the clock, and lets Ctrl-C end imports quietly
from command.cli import answer
from command.compare import compare
from command.flags import parsed
from command.job import Job
from command.screen import Screen
from dp_layer_skip import choose_skip
from llama import Llama
from policy.adaptive import Adaptive
from policy.probe import PaperByProbe
from speculative import Chance, Paper, Round, generate


def policy_of(job: Job) -> Paper | Adaptive:
    """Who decides. For `ar` the job has set K = 0."""
    if job.strategy == "clasp":
        return Adaptive(job.settings,
                        **job.costs,                   # draft=, verify=, optimise=
                        **job.numbers,                 # K=, M=, exit_threshold=, interval=
                        probe=job.probe,
                        measure=job.measure if job.costs_guessed else None)
    if job.probe > 1:
        return PaperByProbe(job.settings, job.cfg.L, job.probe)
    return Paper(job.settings, job.cfg.L)


def run(job: Job, ids: list[int], seed: int, chance: Callable = Chance) -> Iterator[Round]:
    """The method, joined: rounds of drafting, verifying and, now and then, choosing layers.
    chance(seed) makes the random numbers; the screen's also shows each token when it is drawn."""
    method = generate
    if job.a.trace:                                    # the same, and each round is written down
        from oracle.trace import traced
        method = traced(job, seed)
    policy = policy_of(job)
    return job.guarded(method(job.model, ids, job.settings, chance(seed), job.choose, policy))


def write(job: Job, ids: list[int]) -> int:
    """Text as it is made; the exit status."""
    screen = Screen(job, ids)
    status = 0
    try:
        for r in run(job, ids, job.a.seed, screen.chance):
            screen.show(r)
    except KeyboardInterrupt:
        status = 130
    screen.end()
    return status


def work(argv: Sequence[str] | None, job_class: type[Job]) -> int:
    """Do what the flags say. What is wrong with them is found before the weights are read."""
    job = job_class(parsed(argv))
    ids = job.prompt()
    job.load(Llama, choose_skip)
    if job.a.compare:
        return compare(job, ids, run)                  # each pair: plain decoding, then `run`
    return write(job, ids)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status: 0, 1 (a file, memory), 2 (usage), 130 (Ctrl-C). `answer` makes
    one line of what goes wrong."""
    task = partial(work, argv)                         # wants the kind of Job
    if "LOCAL_RANK" in os.environ:                     # torchrun runs this once for each GPU:
        from gpu.ranks import together                 # each Job has a part of the model
        return answer(partial(together, task))
    return answer(partial(task, Job))


if __name__ == "__main__":
    sys.exit(main())
