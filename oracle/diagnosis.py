"""Where to look: what is demanded of a trace, what departures from it mean together, and what its
uniform numbers and drafted tokens tell of generator and policy. Read by check_trace.py.
"""
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from llama import Tensor, torch

# rule: the part of a program in which an error is that breaks it ("": the pattern tells), its words
RULES = dict(
    header=("the header", "the sizes are those of config.json"),
    order=("the loop", "lines come in their order, all drafts of a round before its verifies"),
    start=("the loop", "start is the number of tokens of text before the round"),
    skip=("the loop", "the last table's set for M, or as many as a policy takes; at first none"),
    exit=("the draft's end", "K, N, a stop token, a confidence below the threshold, or a policy"),
    confidence=("", "the draft's highest probability at temperature 1, unfiltered"),
    q=("", "the draft's probability of the token: top-k, temperature, then top-p"),
    p=("", "the full model's probability of the token, by the same function as q"),
    draw=("the draw: its running sums, by ascending id and in float64",
          "the token is the first whose running sum, by id, exceeds u times the total"),
    ratio=("the verdict", "a = min(1, p / q) of the p and q beside it; q is the draft line's"),
    verdict=("the verdict", "accepted if u < a, strictly; after a rejection nothing is judged"),
    kind=("the loop", "plain if nothing was drafted, bonus if all was accepted, else residual"),
    own=("", "p and q are the own token's, mass the sum of max(0, p - q); else q is 0, mass 1"),
    residual=("the residual: norm(max(0, p - q)) at the place of the rejection",
              "probability is (p - q) / mass of the same line, above 0; p if the mass is 0"),
    emit=("the loop", "the accepted tokens and the own one, cut after the first stop token"),
    interval=("the loop", "a table after round 0 and every interval rounds, if K, M > 0 and the "
              "text goes on"),
    probe=("the loop", "the probe is the last position read whose prediction was emitted"),
    shape=("the table", "cells (i, j) are those with j <= min(i, M); where none is run or none is "
           "skipped there is no choice"),
    column=("the candidates", "D[i][0] is about 1: this candidate sees what the verify saw"),
    table=("the table", "D[i][j] is how near h[i] the state of the cell is"),
    choice=("the table", "a cell has the nearer of its two states; on a tie the layer is skipped"),
    path=("the table", "skip is read back from (L, M)"),
    end=("the loop", "after a stop token or N tokens; its line says which, and nothing follows"),
    repeats=("the generator", "no uniform number is used again, but as often as by chance"),
    independent=("the generator", "a number of its own for each draw and each verdict"),
    kept=("the draft", "drafted tokens surprise as much as q says: none was drawn and thrown away"))
FILTERS = "the filters: top-k, temperature, softmax, top-p, renormalised"


@dataclass(frozen=True)
class Departure:
    """Where a trace and the replay differ."""
    rule: str
    field: str
    number: int                                        # of the line in the file
    line: dict                                         # ... or {} after the last
    said: str
    hint: str                                          # where to look, if the place itself tells


def look_at(departures: Sequence[Departure], checked: Counter[str], sampled: bool) -> str:
    """The part of a program where the error is. What departs with the first departure, and what
    does not, excludes parts. `checked`: how often a rule was."""
    first = departures[0]
    rule = first.rule
    if part := first.hint or RULES[rule][0]:
        return part
    r = first.line["round"]
    rules = {d.rule for d in departures}
    fields = {d.field for d in departures}             # p may be an own token's
    if rule == "own" and first.field in ("q", "mass"):
        return RULES["residual"][0]
    if r == 0:                                         # the prefill: nothing was drafted before
        if checked["confidence"] and "confidence" not in rules:
            return FILTERS + "; the drafts' logits are right"
        return "the forward pass; or, if forward dumps agree (dumps.py), the filters"
    if rule == "confidence" and sampled and "q" not in fields:
        return "the confidence: the draft's highest probability, at temperature 1, unfiltered"
    if rule == "confidence" and "p" not in fields:
        return "the draft: its set of layers, its position, what its layers read and write"
    if rule == "q":
        return FILTERS + ("" if "p" in fields else "; those of the draft alone")
    if rule == "own" and not rules & {"p", "confidence"}:
        return f"the {first.line['kind']} token: the verify's row after the accepted ones"
    if rule == "p" and first.line["step"] > 0:
        return "the verify's rows: which judges which token, what each may read, its position"
    return (f"the cache: all is right before round {r}: slots, positions and mask of its passes, "
            "or an entry that was kept, lost or overwritten")


def of_table(off: dict[tuple[int, int], float], L: int) -> str:
    """... where cells (i, j) of a table are off by so much. Column 0 runs a layer on h[i-1] alone,
    the diagonal runs none, the other cells compete. None is: a wrong choice alone."""
    column = {i for i, j in off if i > 0 and j == 0}
    diagonal = {i for i, j in off if i == j > 0}
    if not off:
        return "the table: which of two ways wins"
    if {i for i, _ in off} == {L}:
        return "the table: h[L], which is taken before the final norm"
    if diagonal and (max(off.values()) < 0.01 or not column and (0, 0) not in off):
        return "the table: how near is computed, in float32 or wider, or of which token h is"
    if diagonal:
        return "the table: what states are held against: h[i], of the token at `position`"
    if column:
        return ("the candidates: their position, their mask or their slots; each reads the slots "
                "before its token, and its own")
    return ("the table: which state a cell hands on, and its cosine; or the candidates, which must "
            "not see one another")


# ------------------------------------------------------------------- the numbers of a whole trace

def repeated(uniforms: Sequence[float]) -> int:
    """How many of these numbers repeat an earlier one; 0 also if chance would have it, but once in
    10^8 traces. Generators have 2^24 numbers (of float32), 2^32, or 2^53."""
    n = len(uniforms)
    again = n - len(set(uniforms))
    bits = 53
    if all((u * 2 ** 32).is_integer() for u in uniforms):
        bits = 32
    if torch.tensor(uniforms, dtype=torch.float32).double().tolist() == list(uniforms):
        bits = 24
    expected = n * n / 2 / 2 ** bits
    # The chance of so many repeats is about expected^again / again!
    if again and again * math.log(expected) - math.lgamma(again + 1) > math.log(1e-8):
        return 0
    return again


def correlated(pairs: Sequence[tuple[float, float]]) -> float:
    """The correlation of pairs of numbers in standard deviations: near 0 if they are independent,
    and of the size sqrt(n) if one follows from the other."""
    if len(pairs) < 3:
        return 0.0
    r = torch.corrcoef(torch.tensor(pairs, dtype=torch.float64).T)[0, 1]
    return r.nan_to_num(0).item() * len(pairs) ** 0.5


def surprise(q: Tensor, token: int) -> tuple[float, float]:                 # (V,)
    """How much more a token drawn from q surprises than is expected, -log q(token) - H(q), and the
    variance of that. Summed over drafts it falls if unlikely tokens, once drawn, do not appear."""
    some = q[q > 0]
    own = -some.log()
    expected = (some * own).sum()
    variance = (some * (own - expected).square()).sum()
    return (-q[token].log() - expected).item(), variance.item()
