"""The test of level 1: do these texts come from what the full model says?

A likelihood-ratio test. Of texts that the right law r has made, the ratio w / r of any law w that
was chosen before has mean 1. So it reaches c with a chance of 1/c at most (Markov's inequality:
nothing is approximate), and a right program is called wrong once in 10^8 runs. For w stand the laws
of wrong.py, the likeliest of which names the fault, and one that learns, for faults without a name.

The same inequality, of sqrt(r / w) and a wrong program's texts, bounds how likely a fault is
missed: by sqrt(c) times the nth power of the sum of sqrt(r w), if n texts are seen.
"""
import contextlib
import json
import math
from collections import Counter
from functools import cache
from typing import Any

from oracle.sampler.law import ALONE, CASES, RIGHT, Law, apart, law, rounds, target
from oracle.sampler.wrong import WRONG

TEXTS = 1100                 # of each case
FALSE_ALARM = 1e-8           # how likely a right program is called wrong, in a whole run
TRUST = 1000.0               # who learns begins with the law that is in doubt, as if so many texts
#                              of it had been seen
# ln of c: each case is a test, all together are one, and the laws of wrong.py and the learner are
# tried in each.
ALARM = math.log((len(CASES) + 1) * (len(WRONG) + 1) / FALSE_ALARM)
Seen = dict[str, Counter]    # of cases: how often each text came
Verdict = tuple[str, str, str]       # ok, skip or WRONG; of which case; why


class Refused(Exception):
    """The program does not do what oracle/README.md says; in one line."""


@cache
def laws(case: str) -> dict[str, Law]:
    """The right law and the wrong ones. (A fault of batches is none in a text alone.)"""
    right = target(CASES[case])
    return {"right": right} | {
        fault: right if case in ALONE and sampler.batch is not apart else law(sampler, CASES[case])
        for fault, sampler in WRONG.items()}


def likelihood(seen: Seen, name: str) -> float:
    """ln of how likely these texts are, if a sampler makes them."""
    total = 0.0
    for case, counts in seen.items():
        known = laws(case)[name]
        for text, n in counts.items():
            probability = known.get(text, 0.0)
            if probability == 0:
                return -math.inf
            total += n * math.log(probability)
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


def fault_in(seen: Seen) -> str:
    """In words; nothing if these texts may be right."""
    likely = {name: likelihood(seen, name) for name in ("right", *WRONG)}
    first, second = sorted(WRONG, key=likely.get, reverse=True)[:2]

    def doubted(name: str) -> bool:
        """Does something else explain these texts that much better?"""
        if likely[name] == -math.inf:
            return True
        return max(learned(seen, name), likely[first]) - likely[name] >= ALARM

    if not doubted("right"):
        return ""
    if doubted(first):
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


def hashed(text: Any) -> Any:
    """A text as the laws have it; a batch is a list of them."""
    return tuple(map(hashed, text)) if isinstance(text, (list, tuple)) else int(text)


def counted(request: dict, answer: dict) -> Counter:
    """How often each text came: a list of texts, or counts by text, in JSON as a string."""
    with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
        if "counts" in answer:
            texts = {hashed(json.loads(text)): n for text, n in answer["counts"].items()}
            if all(type(n) is int and n >= 0 for n in texts.values()):
                return Counter(texts)
        elif len(answer["texts"]) == TEXTS:
            return Counter(map(hashed, answer["texts"]))
    raise Refused(f"{request['case']}: \"texts\" should be a list of {TEXTS} lists of tokens, or "
                  "\"counts\" {text: how often}")


def average(request: dict, numbers: Any) -> float:
    """... of the rounds that texts took."""
    with contextlib.suppress(TypeError, ValueError):
        if len(numbers) == TEXTS:
            return sum(map(float, numbers)) / TEXTS
    raise Refused(f"{request['case']}: \"rounds\" should be {TEXTS} numbers")


def wrong_in(case: str, counts: Counter) -> str:
    """The fault of one case, and what leaps to the eye."""
    fault = fault_in({case: counts})
    impossible = [text for text in counts if text not in laws(case)["right"]]
    if fault and len(counts) == 1:
        fault += "; all texts are the same: is the generator seeded anew for each?"
    elif impossible:                                   # so there is a fault
        fault += f"; {json.dumps(impossible[0])} cannot be"
    return fault


def all_together(seen: Seen) -> Verdict:
    fault = fault_in(seen)
    few = min((counts.total() for counts in seen.values()), default=0)
    if not fault and few < TEXTS:
        return "ok", "all together", f"but in {few} texts a fault may be missed; {TEXTS} are wanted"
    return "WRONG" if fault else "ok", "all together", fault


def speed(taken: dict[str, float]) -> str:
    """Of these cases how many rounds a text takes, and how many it takes the right samplers."""
    def mean(rounds_of: dict[str, float]) -> str:
        return f"{sum(rounds_of.values()) / len(taken):.2f}"
    others = [f"{name} {mean({case: rounds(sampler, CASES[case]).total() for case in taken})}"
              for name, sampler in RIGHT.items()]
    return f"{mean(taken)}; {', '.join(others)}"
