"""Where to look: what is demanded of a trace, what departures from it mean together, and what its
uniform numbers and drafted tokens tell of generator and policy. Read by check_trace.py.
"""
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

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
    draw=("", "the token is the first whose running sum, by id, exceeds u times the sum"),
    ratio=("the verdict", "a = min(1, p / q) of the p and q beside it; q is the draft line's"),
    verdict=("the verdict", "accepted if u < a, strictly; after a rejection nothing is judged"),
    kind=("the loop", "plain if nothing was drafted, bonus if all was accepted, else residual"),
    own=("", "p and q are the own token's, mass the sum of max(0, p - q); else q is 0, mass 1"),
    residual=("", "probability is (p - q) / mass of the same line, above 0; p if the mass is 0"),
    emit=("the loop", "the accepted tokens and the own one, cut after the first stop token"),
    interval=("the loop", "a table after round 0 and every interval rounds, if K, M > 0 and the "
              "text goes on"),
    probe=("the loop", "the probe is the last position read whose prediction was emitted"),
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
    line: int                                          # of the file
    round: int
    step: int | None
    kind: str                                          # of an own line; of others their event
    slack: float
    said: str
    hint: str = ""                                     # where to look, if the place itself tells


@dataclass
class Tally:
    """What one rule has met in a trace."""
    checked: int = 0
    largest: float = 0.0                               # difference seen
    departed: list[Departure] = field(default_factory=list)


def look_at(first: Departure, tally: dict[str, Tally], before: tuple[int, int] | None,
            sampled: bool) -> str:
    """The part of a program where the error is. `first` departed first; `before`: tokens drafted
    and accepted in the round before it."""
    rule = first.rule
    part, _ = RULES[rule]
    if first.hint or part:
        return first.hint or part
    wrong = {d.field for t in tally.values() for d in t.departed}  # p may be an own token's
    kind = first.kind
    if rule == "draw" and tally["draw"].largest < 1e-5:
        return "the draw: a running sum in float32 or less, or in another order"
    if rule == "draw":
        return "the draw: the first running sum, by ascending id, that exceeds u times the total"
    if rule == "residual" and kind != "residual":
        return f"the {kind} token: from which row of p it is drawn"
    if rule == "residual" or rule == "own" and first.field in ("q", "mass"):
        return "the residual: norm(max(0, p - q)) at the place of the rejection"
    if first.round == 0:
        return of_prefill(first, tally)
    if rule == "confidence" and sampled and "q" not in wrong:
        return "the confidence: the draft's highest probability, at temperature 1, unfiltered"
    if rule == "confidence" and "p" not in wrong:
        return of_draft({d.step for d in tally["confidence"].departed})
    if rule == "q":
        return FILTERS + ("" if "p" in wrong else "; those of the draft alone")
    if rule == "own" and not {"p", "confidence"} & {d.rule for t in tally.values()
                                                    for d in t.departed}:
        return f"the {kind} token: the verify's row behind the accepted ones, filtered as others"
    if rule == "p" and first.step:
        return "the verify's rows: which judges which token, what each may read, its position"
    return of_cache(first, before)


def of_prefill(first: Departure, tally: dict[str, Tally]) -> str:
    """... where the first token is wrong, with nothing drafted before it."""
    dumps = "compare forward dumps (dump_forward.py, compare_dumps.py)"
    if tally["confidence"].departed:
        return f"the forward pass: {dumps}"
    if max(tally[rule].largest for rule in ("q", "p", "own")) < 100 * first.slack:
        return f"the forward pass: little is wrong, such as eps or a type; {dumps}"
    if tally["confidence"].checked:
        return FILTERS + "; the drafts' logits are right"
    return f"the forward pass, or the filters: {dumps}"


def of_draft(steps: set[int | None]) -> str:
    """... where the full model is right, and the draft is not in these steps."""
    if 0 in steps:
        return "the draft: its set of layers, its position, what its layers read and write"
    return "the draft: what a step reads of those before it, in its layers' cache; its position"


def of_cache(first: Departure, before: tuple[int, int] | None) -> str:
    """... where all was right before a round."""
    if before == (0, 0):
        return ("the cache: slots, positions and mask of a pass behind the prompt: a row reads all "
                "slots up to its own")
    return (f"the cache: all is right before round {first.round}, {since(first.step, before)}: a "
            "position, or an entry that was kept, lost or overwritten; --dump-at shows it")


def since(step: int | None, before: tuple[int, int] | None) -> str:
    """Which pass this is, by what came before it."""
    if step:
        return f"step {step} of a draft"
    if before is None:
        return "the first that is checked"
    drafted, accepted = before
    if accepted < drafted:
        return "the first pass after a rejection"
    return "the first pass after all were accepted" if drafted else "the first drafted"


def of_table(off: dict[tuple[int, int], float], L: int, r: int) -> str:
    """... where cells (i, j) of a table by r tokens are off by so much. Column 0 runs a layer on
    h[i-1] alone, the diagonal runs none, the other cells compete. None is: a wrong choice alone."""
    if not off:
        return "the table: which of two ways wins"
    column = {i for i, j in off if i > 0 and j == 0}
    diagonal = {i for i, j in off if i == j > 0}
    if {i for i, _ in off} == {L}:
        return "the table: h[L], which is taken before the final norm"
    if diagonal and max(off.values()) < 0.01:
        return "the table: how near is computed, in float32 or wider"
    if (0, 0) in off or column and diagonal:
        return ("the table: what states are held against: h[i], of the token at `position`, as the "
                "verify had it")
    if diagonal:
        near = "cosine with h[i]" if r == 1 else "by h[L] + g - h[i]"
        return f"the table: how near is computed ({near}), or of which token the states are"
    if 1 in column:
        return ("the candidates: their position, their mask or their slots; each reads the slots "
                "before its token, and its own")
    if column:
        return "the table: column 0 hands on h[i] itself"
    return ("the table: which state a cell hands on, and its cosine; or the candidates, which must "
            "not see one another")


# ------------------------------------------------------------------- the numbers of a whole trace

def repeated(uniforms: Sequence[float]) -> int:
    """How many of these numbers repeat an earlier one; 0 also if chance would have it, but once in
    10^8 traces. Generators have 2^24 numbers (of float32), 2^32, or 2^53."""
    n = len(uniforms)
    again = sum(c - 1 for c in Counter(uniforms).values())
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
    x = torch.tensor(pairs, dtype=torch.float64)
    x = x - x.mean(0)
    return ((x[:, 0] * x[:, 1]).sum() / x.square().sum(0).prod().sqrt().clamp_min(1e-300)
            * len(pairs) ** 0.5).item()


def surprise(q: Tensor, token: int) -> tuple[float, float]:                 # (V,)
    """How much more a token drawn from q surprises than is expected, -log q(token) - H(q), and the
    variance of that."""
    some = q[q > 0]
    own = -some.log()
    expected = (some * own).sum()
    variance = (some * (own - expected).square()).sum()
    return (-q[token].log() - expected).item(), variance.item()


def surprised(tokens: Sequence[tuple[float, float]]) -> float:
    """The sum of surprises in standard deviations. Around 0; below it if unlikely tokens, once
    drawn, do not appear. (Which token comes next may depend on those before.)"""
    total = sum(off for off, _ in tokens)
    return total / max(sum(variance for _, variance in tokens), 1e-300) ** 0.5
