"""The test of level 1: do these texts come from what the full model says?

A likelihood-ratio test. Of texts that the right law r has made, the ratio w / r of any law w that
was chosen before has mean 1. So it reaches c with a chance of 1/c at most (Markov's inequality:
nothing is approximate), and a right program is called wrong once in 10^8 runs. For w stand the laws
of wrong.py, the likeliest of which names the fault, and one that learns, for faults without a name.

The same inequality, of sqrt(r / w) and a wrong program's texts, bounds how likely a fault is
missed: by sqrt(c) times the nth power of the sum of sqrt(r w), if n texts are seen.
"""
import math
from collections import Counter
from functools import cache

from oracle.sampler.law import CASES, Law, law, target
from oracle.sampler.wrong import WRONG

TEXTS = 1100                 # of each case
FALSE_ALARM = 1e-8           # how likely a right program is called wrong, in a whole run
TRUST = 1000.0               # who learns begins with the law that is in doubt, as if so many texts
#                              of it had been seen
# ln of c: each case is a test, all together are one, and the laws of wrong.py and the learner are
# tried in each.
ALARM = math.log((len(CASES) + 1) * (len(WRONG) + 1) / FALSE_ALARM)
Seen = dict[str, Counter]    # of cases: how often each text came


class Refused(Exception):
    """The program does not do what oracle/README.md says; in one line."""


@cache
def laws(case: str) -> dict[str, Law]:
    """The right law and the wrong ones."""
    return {"right": target(CASES[case])} | {
        fault: law(sampler, CASES[case]) for fault, sampler in WRONG.items()}


def likelihood(seen: Seen, name: str) -> float:
    """ln of how likely these texts are, if a sampler makes them."""
    total = 0.0
    for case, counts in seen.items():
        for text, n in counts.items():
            probability = laws(case)[name].get(text, 0.0)
            total += n * math.log(probability) if probability > 0 else -math.inf
    return total


def learned(seen: Seen, name: str) -> float:
    """The same of one that begins as this sampler and learns (a Dirichlet prior)."""
    total = 0.0
    for case, counts in seen.items():
        total += math.lgamma(TRUST) - math.lgamma(TRUST + counts.total())
        for text, n in counts.items():
            before = TRUST * laws(case)[name][text]
            total += math.lgamma(before + n) - math.lgamma(before)
    return total


def doubt(seen: Seen, name: str) -> float:
    """ln of how many times better something else explains these texts than this sampler does."""
    own = likelihood(seen, name)
    if own == -math.inf:
        return math.inf
    return max(learned(seen, name), *(likelihood(seen, fault) for fault in WRONG)) - own


def fault_in(seen: Seen) -> str:
    """In words; nothing if these texts may be right."""
    if doubt(seen, "right") < ALARM:
        return ""
    likely = {fault: likelihood(seen, fault) for fault in WRONG}
    first, second = sorted(likely, key=likely.get, reverse=True)[:2]
    if doubt(seen, first) >= ALARM:
        return "a fault without a name"
    return f"{first} (next, e^{likely[first] - likely[second]:.0f} times less likely: {second})"


def missed(fault: str, cases: list[str]) -> float:
    """How likely, at most, this fault is missed by the texts of these cases."""
    ln = ALARM / 2
    for case in cases:
        right, wrong = laws(case)["right"], laws(case)[fault]
        common = sum(math.sqrt(w * right.get(text, 0.0)) for text, w in wrong.items())
        ln += TEXTS * math.log(common) if common > 0 else -math.inf
    return math.exp(min(ln, 0.0))


def counted(request: dict, answer: dict) -> Counter:
    """How often each text came."""
    try:
        texts = Counter(tuple(map(int, text)) for text in answer["texts"])
    except (KeyError, TypeError, ValueError):
        texts = Counter()
    if texts.total() != TEXTS:
        raise Refused(f"{request['case']}: \"texts\" should be a list of {TEXTS} lists of tokens")
    return texts


def remark(case: str, counts: Counter) -> str:
    """On texts that are wrong: what leaps to the eye."""
    if len(counts) == 1:
        return "; all texts are the same: is the generator seeded anew for each?"
    impossible = [text for text in counts if text not in laws(case)["right"]]
    return f"; {' '.join(map(str, impossible[0]))} cannot be" if impossible else ""
