"""clasp-mini: self-speculative decoding with layers chosen in context (CLaSp, Chen et al., ACL
2025). The command, which joins the others in one direction: config and weights (llama.py) -> rounds
(speculative.py, which is handed the chooser of dp_layer_skip.py and a policy) -> text.

    python clasp_mini.py                                      # the model and a prompt that ship
    python clasp_mini.py --verbose                            # round by round
    python clasp_mini.py --prompt "class Stack:" --compare    # against plain decoding
"""
import signal
import time

BEGAN = time.perf_counter()
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Until the weights are read Ctrl-C just ends us: C code would make errors of its own of it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import os  # noqa: E402
import sys  # noqa: E402
from collections.abc import Iterator, Sequence  # noqa: E402

from command.cli import answer  # noqa: E402
from command.compare import Pair, compare  # noqa: E402
from command.flags import VERSION, parsed, parser  # noqa: E402, F401
from command.job import Job  # noqa: E402
from command.screen import Screen  # noqa: E402
from speculative import Chance, Paper, Round, generate  # noqa: E402


def run(job: Job, ids: list[int], seed: int) -> Iterator[Round]:
    """The method, joined: rounds of drafting, verifying and, now and then, choosing layers."""
    if job.a.trace:
        from oracle.trace import record
        return job.agreed(record(job, ids, seed))
    return job.agreed(generate(job.model, ids, job.settings, Chance(seed), job.choose,
                               job.policy()))


def pair(job: Job, ids: list[int], seed: int) -> Pair:
    """The same prompt plainly, a token per pass, and with CLaSp."""
    plain = generate(job.model, ids, job.plain, Chance(seed), job.choose)
    return list(job.agreed(plain)), list(run(job, ids, seed))


def write(job: Job, ids: list[int]) -> int:
    """Text as it is made; the exit status."""
    screen = Screen(job, ids)
    status = 0
    try:
        for r in run(job, ids, job.a.seed):
            screen.show(r)
    except KeyboardInterrupt:
        status = 130
    screen.end()
    return status


def main(argv: Sequence[str] | None = None, began: float | None = None) -> int:
    """The command; its exit status: 0, 1 (a file, memory), 2 (usage), 130 (Ctrl-C). The user has
    been waiting since `began`."""
    began = began or time.perf_counter()

    def work(kind: type[Job] = Job) -> int:
        a = parsed(argv)
        own = a.prompt is None and a.prompt_ids is None
        job = kind(a)
        ids = job.prompt()                             # what is wrong is found before this reads
        job.load_seconds = time.perf_counter() - began
        job.load()                                     # the weights
        if a.compare:
            return compare(job, lambda seed: pair(job, ids, seed), ids)
        status = write(job, ids)
        if own and sys.stderr.isatty():
            print("Next: --verbose to watch the rounds; --prompt TEXT; --compare to time them; "
                  "--help", file=sys.stderr)
        return status
    if "LOCAL_RANK" in os.environ:                     # torchrun has started several of us
        from gpu.ranks import together
        return answer(lambda: together(work, Job))
    return answer(work)


if __name__ == "__main__":
    sys.exit(main(began=BEGAN))
