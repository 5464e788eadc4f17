"""clasp-mini: self-speculative decoding with layers chosen in context (CLaSp, Chen et al., ACL
2025). The command. It joins the others in one direction: config and weights (llama.py) -> rounds
(speculative.py, which is handed the chooser of dp_layer_skip.py and a policy) -> text.

    python clasp_mini.py                                      # the model and a prompt that ship
    python clasp_mini.py --verbose                            # round by round
    python clasp_mini.py --prompt "class Stack:" --compare    # against plain decoding

Who decides how much is drafted, by which layers, and when these are chosen anew?

    --strategy clasp   the default: our policy (policy/adaptive.py), by what passes cost and what
                       was accepted
    --strategy paper   speculative.Paper, by four numbers: K, M, exit threshold and interval. (clasp
                       is the same where flags name all four, as nothing is left to decide.)
    --strategy ar      nobody: plain decoding, a token per pass, the paper's loop with K = 0

A Job (command/job.py) is what the flags ask for, checked, and the model. job.guarded(rounds) yields
the same rounds, and ends with a line if memory is short or the processes of several GPUs disagree.
"""
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial

if __name__ == "__main__":
    import command.start  # noqa: F401  the clock, and what Ctrl-C means while the rest is imported
from command.cli import answer
from command.compare import Pair, compare
from command.flags import parsed
from command.job import Job
from command.screen import Screen
from policy.adaptive import Adaptive
from policy.probe import PaperByProbe
from speculative import Chance, Paper, Round, generate


def policy_of(job: Job) -> Paper | Adaptive:
    """Who decides. --probe r: layers are chosen by r tokens. For `ar` the job has set K = 0."""
    if job.strategy == "clasp":
        # costs     of a draft step, a verify, a choice of layers; a plain step is 1
        # measure   tells what a verify costs, where all of them are guesses
        # numbers   the paper's four, as flags fix them; None: Adaptive decides
        measure = job.measure if job.costs_guessed else None
        return Adaptive(job.settings, **job.costs, **job.numbers, probe=job.probe, measure=measure)
    if job.probe > 1:
        return PaperByProbe(job.settings, job.cfg.L, job.probe)
    return Paper(job.settings, job.cfg.L)


def run(job: Job, ids: list[int], seed: int, chance: Callable = Chance) -> Iterator[Round]:
    """The method, joined: rounds of drafting, verifying and, now and then, choosing layers.
    chance(seed) makes the random numbers; the screen's also shows each token as it is drawn."""
    policy = policy_of(job)
    if job.a.trace:                                    # has a Chance of its own, that shows none
        from oracle.trace import record
        return job.guarded(record(job, ids, seed, policy))
    return job.guarded(generate(job.model, ids, job.settings, chance(seed), job.choose, policy))


def pair(job: Job, ids: list[int], seed: int) -> Pair:
    """The same prompt plainly and with CLaSp."""
    plain = generate(job.model, ids, job.plain, Chance(seed), job.choose)
    return list(job.guarded(plain)), list(run(job, ids, seed))


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


def work(argv: Sequence[str] | None, job_class: type[Job] = Job) -> int:
    """Do what the flags say. What is wrong with them is found before the weights are read."""
    a = parsed(argv)
    job = job_class(a)
    ids = job.prompt()
    job.load()
    if a.compare:
        return compare(job, lambda seed: pair(job, ids, seed), ids)
    return write(job, ids)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status: 0, 1 (a file, memory), 2 (usage), 130 (Ctrl-C)."""
    task = partial(work, argv)
    if "LOCAL_RANK" in os.environ:                     # torchrun runs this once for each GPU:
        from gpu.ranks import together                 # a Job's model is then a part of the whole
        task = partial(together, task, Job)
    return answer(task)


if __name__ == "__main__":
    sys.exit(main())
