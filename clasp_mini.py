"""clasp-mini: self-speculative decoding with layers chosen in context (CLaSp, Chen et al., ACL
2025). The command. It joins the others: llama.py loads the model; speculative.py makes rounds with
it, given the chooser of dp_layer_skip.py and a policy; command/ checks flags and shows text.

    python clasp_mini.py                                      # the model and a prompt that ship
    python clasp_mini.py --verbose                            # round by round
    python clasp_mini.py --prompt "class Stack:" --compare    # against plain decoding

Who decides how many tokens are drafted, by which layers, and when these are chosen anew?

    --strategy clasp   the default: our policy (policy/adaptive.py), which weighs what passes cost
                       against what was accepted. Flags fix any of the paper's four numbers; with
                       all four fixed it is `paper`
    --strategy paper   speculative.Paper, by four fixed numbers: K, M, exit threshold and interval
    --strategy ar      nobody: plain decoding, one token per pass; it is `paper` with K = 0
    --probe r          with clasp or paper: the last r tokens, read once more, choose the layers
                       (policy/probe.py)

A Job (command/job.py) holds the checked flags, what follows from them, and the model. Used here:

    job.flags, job.strategy, job.probe     as above
    job.settings, job.cfg                  a speculative.Settings, a llama.Config
    job.known              a dict, what our policy is told: the cost of passes, in units of a plain
                           decoding step, measured or guessed; the numbers that flags fix; r
    job.prompt()           the prompt's ids
    job.load(...)          reads the weights, and sets job.model and job.choose: a Llama and
                           choose_skip (on a GPU, CUDA graphs of them: gpu/replay.py)
    job.guarded(rounds)    passes them on; turns "out of memory" or "GPUs disagree" into one line
"""
import os
import sys
from collections.abc import Iterator, Sequence

# This comes first, as the other imports are slow: it starts the clock, and quiets Ctrl-C.
if __name__ == "__main__":
    import command.start  # noqa: F401
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
    """Who decides; each answers what speculative.Paper lists. The job has set K = 0 for `ar`, and
    turned clasp with all four numbers fixed into `paper`."""
    if job.strategy == "clasp":
        return Adaptive(job.settings, **job.known)
    if job.probe > 1:
        return PaperByProbe(job.settings, job.cfg.L, job.probe)
    return Paper(job.settings, job.cfg.L)


def run(job: Job, ids: list[int], chance: Chance) -> Iterator[Round]:
    """The method, joined: rounds of drafting, verifying and, now and then, choosing layers."""
    method = generate
    if job.flags.trace:
        from oracle.trace import traced
        method = traced(job)                           # as generate; it also writes each round down
    policy = policy_of(job)
    return job.guarded(method(job.model, ids, job.settings, chance, job.choose, policy))


def write(job: Job, ids: list[int]) -> int:
    """Text as it is made; the exit status."""
    screen = Screen(job, ids)
    chance = screen.watched(Chance(job.flags.seed))    # the same; the screen sees each draw
    status = 0
    try:
        for r in run(job, ids, chance):
            screen.show(r)
    except KeyboardInterrupt:
        status = 130
    screen.end()
    return status


def work(argv: Sequence[str] | None, job_class: type[Job]) -> int:
    """Do what the flags say. What is wrong with them is found before the weights are read.
    job_class: Job or, under torchrun, a subclass that holds this GPU's share of the model."""
    job = job_class(parsed(argv))
    ids = job.prompt()
    job.load(Llama, choose_skip)                       # sets job.model and job.choose by these
    if job.flags.compare:
        return compare(job, ids, run)                  # times plain decoding and `run`, in turn
    return write(job, ids)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status: 0, 1 (a file, memory), 2 (usage), 130 (Ctrl-C). `answer`
    catches what goes wrong, and makes one line of it."""
    # torchrun runs this once for each GPU; together(f) calls f with a Job class for its share.
    if "LOCAL_RANK" in os.environ:
        from gpu.ranks import together
        return answer(lambda: together(lambda job_class: work(argv, job_class)))
    return answer(lambda: work(argv, Job))


if __name__ == "__main__":
    sys.exit(main())
