"""What many departures mean together, in words, and what the uniform numbers of a trace tell."""
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from llama import torch


@dataclass
class Tally:
    """What one rule has met in a trace."""
    checked: int = 0
    largest: float = 0.0                               # difference seen
    departed: list[tuple[int, int, str]] = field(default_factory=list)   # line, round, its kind


def survey(tally: dict[str, Tally], outcomes: Sequence[tuple[int, int]]) -> tuple[int, list[str]]:
    """-> exit status and lines: departures by rule, and what they mean. `outcomes`: tokens drafted
    and accepted in each round."""
    bad = {rule: t for rule, t in tally.items() if t.departed}
    out = [f"{'no rule' if not bad else f'{len(bad)} of {len(tally)} rules'} departed from in "
           f"{len(outcomes)} rounds"]
    for rule, t in tally.items():
        if t.departed or rule in ("confidence", "q", "p"):
            first = "".join(f", first in line {line}, round {n}" for line, n, _ in t.departed[:1])
            out.append(f"  {rule:11}{len(t.departed):5} of {max(t.checked, len(t.departed)):5}"
                       f", largest difference {t.largest:.1e}{first}")
    return (1 if bad else 0), out + [f"  {text}" for text in meaning(bad, tally, outcomes)]


def meaning(bad: dict[str, Tally], tally: dict[str, Tally],
            outcomes: Sequence[tuple[int, int]]) -> Iterator[str]:
    """What is known of such patterns. `bad`: the part of `tally` that departs."""
    numbers = bad.keys() & {"confidence", "q", "p", "own", "draw"}
    first = min((t.departed[0][1] for rule, t in bad.items() if rule in numbers), default=0)
    kinds = {kind for _, _, kind in bad["own"].departed} if "own" in bad else set()
    if "column" in bad:
        yield ("column 0: the candidate that skips nothing does not see what the verify saw, or "
               "what it is held against is not h[i]; look at its position, mask and slot")
    elif bad.keys() & {"table", "choice"}:
        yield ("column 0 agrees, so a candidate alone is right: look at who sees whom among them, "
               "at the state that is handed on, at the choice and its ties, at cosines in float32")
    if "ratio" in bad:
        yield "a is not min(1, p / q) of the p and q in the trace itself"
    if kinds and tally["p"].checked and numbers <= {"own", "draw"}:
        yield ("p and q agree; only residuals depart: norm(max(0, p - q)) at the place of the "
               "rejection" if kinds == {"residual"} else
               "p and q agree; only the bonus and what is drawn alone depart: the verify's last "
               "row, filtered as every other" if "residual" not in kinds else
               "p and q agree, what own tokens are drawn from does not")
    elif numbers & {"own", "p"} and first == 0:
        yield ("from the prefill on: the forward pass itself, or how logits become p; compare "
               "forward dumps (compare_dumps.py)" if "confidence" in bad else
               "from the prefill on, and the draft's logits agree (confidence): how logits become "
               "p, temperature, then top-k, then top-p")
    elif "confidence" in bad and "p" not in bad:
        yield ("only the draft is wrong: its set, its position, or what its layers read; --dump-at "
               "a step shows its cache")
    elif "confidence" in bad:
        drafted, accepted = outcomes[first - 1] if 0 < first <= len(outcomes) else (0, 0)
        after = ("the first after a rejection" if accepted < drafted else
                 "the first after a round with all accepted" if drafted else "the first drafted")
        yield (f"all is right before round {first}, {after}: keys and values that were kept, or a "
               "position that went astray; --dump-at a step shows the cache as it should be")
    elif {"q", "p"} <= numbers:
        yield ("the draft's logits agree (confidence), what is made of logits does not: "
               "temperature, then top-k, then top-p, each renormalised, ties to the smaller id")
    elif "q" in numbers:
        yield "the draft's logits agree (confidence): its filters alone are wrong"
    elif "p" in numbers:
        yield "the verify alone: which row judges which token, or p is filtered otherwise than q"
    elif "draw" in numbers:
        draws = bad["draw"]
        yield ("a few draws and nothing else: a running sum in float32 or less, or in another order"
               if len(draws.departed) * 10 < draws.checked else
               "draws and nothing else: the first running sum, by id, that exceeds u times the sum")


def repeated(uniforms: Sequence[float]) -> list[str]:
    """A warning, if more of these numbers repeat an earlier one than chance would have it. A
    generator of float32 has 2^24 numbers, in which some repeat in a long trace."""
    n, again = len(uniforms), sum(c - 1 for c in Counter(uniforms).values())
    narrow = torch.tensor(uniforms, dtype=torch.float32).double().tolist() == list(uniforms)
    expected = n * n / 2 / 2 ** (24 if narrow else 53)
    # The chance of so many repeats is about expected^again / again!
    if not again or again * math.log(expected) - math.lgamma(again + 1) > math.log(1e-3):
        return []
    return [f"warning: {again} of {n} uniform numbers repeat an earlier one, so they are not "
            "independent, and the text has not the full model's distribution"]
