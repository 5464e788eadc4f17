"""The exact law of what a sampler emits: chance is asked, and every answer it can give is followed.

    python oracle/sampler/law.py NAME      be this sampler of RIGHT or WRONG: a program for check.py

No model and no PyTorch: p, the full model, and q, the draft, are tables whose row c is the
distribution behind a token c. The samplers of `RIGHT` emit exactly what p says, slowly or fast.

Glossary
    case          what a program is asked for: an object of cases.json (README.md has its fields)
    last, room    the token that is continued; how many tokens the text may still have
    d, k          the drafted tokens of a round; their number
    p, q          k+1 rows: the distributions where d1 stands, ..., where dk stands, and behind
    s, x          a step of the draft, from 0; a token
    chance        answers "accept with probability a?" and "draw a token by these weights"
"""
import json
import math
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

CASES = {case["case"]: case for case in json.loads(
    Path(__file__).with_name("cases.json").read_text())}
Row = list[float]
Law = dict[tuple[int, ...], float]           # text, or those of a batch as one -> probability


# ----------------------------------------------------------------------------------------- chance

class Branch:
    """Chance that answers as it is told, then the first way that is open, and notes the others."""

    def __init__(self, told: tuple[int, ...]) -> None:
        self.told = told
        self.answered: tuple[int, ...] = ()
        self.probability = 1.0
        self.others: list[tuple[int, ...]] = []

    def draw(self, weights: Row) -> int:
        n = len(self.answered)
        if n < len(self.told):
            answer = self.told[n]
        else:
            answer, *others = [x for x, weight in enumerate(weights) if weight > 0]
            self.others += [(*self.answered, other) for other in others]
        self.answered += (answer,)
        self.probability *= weights[answer] / sum(weights)
        return answer

    def accept(self, a: float) -> bool:
        return self.draw([1 - a, a]) == 1


def every(run: Callable[[Branch], Any]) -> Iterator[tuple[float, Any]]:
    """What `run` returns down each branch of chance, and how likely that branch is."""
    ways = [()]
    while ways:
        chance = Branch(ways.pop())
        outcome = run(chance)
        yield chance.probability, outcome
        ways += chance.others


class Dice:
    """Chance by uniform numbers: one for each answer, and inverse sums in ascending id."""

    def __init__(self, uniform: Callable[[], float]) -> None:
        self.uniform = uniform

    def draw(self, weights: Row) -> int:
        u = self.uniform() * sum(weights)
        total = 0.0
        for x, weight in enumerate(weights):
            total += weight
            if weight > 0:
                drawn = x
                if total > u:
                    break
        return drawn

    def accept(self, a: float) -> bool:
        return self.uniform() < a


# --------------------------------------------------------------------- from a table to p and q

def filtered(row: Row, case: dict, crossing: bool = True) -> Row:
    """Top-k, temperature, top-p, of probabilities. Temperature 0: all on the likeliest. The token
    that crosses top_p is kept."""
    order = sorted(range(len(row)), key=lambda x: (-row[x], x))
    T = case["temperature"]
    if T == 0:
        return [float(x == order[0]) for x in range(len(row))]
    order = order[:case["top_k"] or None]
    weight = {x: row[x] ** (1 / T) for x in order}
    mass = sum(weight.values())
    kept = {}
    for x in order:
        reached = sum(kept.values()) + (0.0 if crossing else weight[x])
        if reached < case["top_p"] * mass or not kept:
            kept[x] = weight[x]
    mass = sum(kept.values())
    return [kept.get(x, 0.0) / mass for x in range(len(row))]


def unfiltered(row: Row, case: dict) -> Row:
    return row


def greedy(row: Row, case: dict) -> Row:
    return filtered(row, dict(case, temperature=0))


def cut(emitted: list[int], stop: list[int]) -> tuple[int, ...]:
    """Nothing stays behind a stop token."""
    for s, x in enumerate(emitted):
        if x in stop:
            return tuple(emitted[:s + 1])
    return tuple(emitted)


class Models:
    """The tables of a case, as a sampler sees them."""

    def __init__(self, case: dict, p: Callable, q: Callable, told: Callable) -> None:
        self.case = case
        self.p = [p(row, case) for row in case["p"]]
        self.q = [q(row, case) for row in case["q"]]            # what drafts are drawn from
        self.told = [told(row, case) for row in case["q"]]      # what the judge takes for it
        self.confidence = [max(row) for row in case["q"]]


# ----------------------------------------------------------------------- rounds of right samplers

def drafts(models: Models, last: int, room: int, chance: Any) -> tuple[list[int], list, list]:
    """d, q and p. A stop token ends a draft, and so does a doubtful one, which is judged like any
    other: only none is drafted behind it."""
    case = models.case
    read = [last]
    sure = True
    while len(read) <= min(case["K"], room - 1) and read[-1] not in case["stop"] and sure:
        sure = models.confidence[read[-1]] >= case["exit"]
        read.append(chance.draw(models.q[read[-1]]))
    return read[1:], [models.told[x] for x in read], [models.p[x] for x in read]


def ratio(p: list[Row], q: list[Row], s: int, x: int) -> float:
    return min(1.0, p[s][x] / q[s][x]) if q[s][x] > 0 else float(p[s][x] > 0)


def residual(p: list[Row], q: list[Row], s: int, x: int, paid: float = 1.0) -> Row:
    """max(0, p - q): what is still owed. Chance normalises it."""
    owed = [max(0.0, paid * v - w) for v, w in zip(p[s], q[s])]
    return owed if sum(owed) > 0 else p[s]


def token_rule(models: Models, last: int, room: int, chance: Any, draft: Callable = drafts,
               accept: Callable = ratio, owed: Callable = residual,
               bonus: Callable = lambda p, q: p[-1]) -> list[int]:
    """Leviathan et al. 2023, Algorithm 1."""
    d, q, p = draft(models, last, room, chance)
    for s, x in enumerate(d):
        if not chance.accept(accept(p, q, s, x)):
            return d[:s] + [chance.draw(owed(p, q, s, x))]
    return d + [chance.draw(bonus(p, q))]


def kept(p: list[Row], q: list[Row], s: int, paid: float) -> float:
    """How likely a block of s tokens is kept, if no longer one was (Sun et al. 2024, Algorithm 2);
    all of them, as the product says."""
    if s == len(p) - 1:
        return paid
    mass = sum(max(0.0, paid * v - w) for v, w in zip(p[s], q[s]))
    return mass / (mass + 1 - paid) if mass > 0 else 0.0


def block_rule(models: Models, last: int, room: int, chance: Any, keep: Callable = kept,
               owed: Callable = residual, stops: bool = False) -> list[int]:
    """Sun et al. 2024, Algorithm 2: the longest block that is kept, whatever failed before it."""
    d, q, p = drafts(models, last, room, chance)
    paid = [1.0]                                # of each block: min(1, the product of p/q so far)
    accepted = 0
    for s, x in enumerate(d):
        paid.append(min(1.0, paid[s] * p[s][x] / q[s][x]))
        if chance.accept(keep(p, q, s + 1, paid[s + 1])):
            accepted = s + 1
        elif stops:
            break
    if accepted == len(d):
        return d + [chance.draw(p[-1])]
    return d[:accepted] + [chance.draw(owed(p, q, accepted, d[accepted], paid[accepted]))]


def sample_and_compare(models: Models, last: int, room: int, chance: Any) -> list[int]:
    """The full model draws; as long as it draws the same, the draft was right."""
    d, q, p = drafts(models, last, room, chance)
    for s, x in enumerate(d):
        own = chance.draw(p[s])
        if own != x:
            return d[:s] + [own]
    return d + [chance.draw(p[-1])]


def no_bonus(models: Models, last: int, room: int, chance: Any) -> list[int]:
    d, q, p = drafts(models, last, room, chance)
    for s, x in enumerate(d):
        if not chance.accept(ratio(p, q, s, x)):
            return d[:s] + [chance.draw(residual(p, q, s, x))]
    return d or [chance.draw(p[0])]


def without(p: list[Row], q: list[Row], s: int, x: int) -> Row:
    return [0.0 if y == x else v for y, v in enumerate(p[s])]


@dataclass(frozen=True)
class Sampler:
    """A rule for a round, (models, last, room, chance) -> what it emits; and how rows are made."""
    rule: Callable = token_rule
    p: Callable = filtered
    q: Callable = filtered
    told: Callable | None = None                # as q
    cut: Callable = cut
    batch: Callable | None = None               # (models, chance) -> texts that are not independent

    def models(self, case: dict) -> Models:
        return Models(case, self.p, self.q, self.told or self.q)


def by(**parts: Any) -> Sampler:
    """The token rule with other parts."""
    return Sampler(partial(token_rule, **parts))


RIGHT = {
    "token rule": Sampler(),
    "block rule": Sampler(block_rule),
    "sample and compare": Sampler(sample_and_compare),
    "no bonus": Sampler(no_bonus),
    "argmax drafts, q one-hot": Sampler(q=greedy),
    "any draft, q taken for one-hot": by(accept=lambda p, q, s, x: p[s][x], owed=without),
}


# ------------------------------------------------------------------------------------ the law

def law(sampler: Sampler, case: dict) -> tuple[Law, float]:
    """Of each text how likely it is; and how many rounds a text takes."""
    models = sampler.models(case)

    @cache
    def rest(last: int, room: int) -> tuple[Law, float]:
        """What follows `last`: the same, whatever stood before it."""
        if room == 0 or last in case["stop"]:
            return {(): 1.0}, 0.0
        texts = defaultdict(float)
        rounds = 1.0
        for likely, emitted in every(lambda chance: sampler.rule(models, last, room, chance)):
            emitted = sampler.cut(emitted, case["stop"])
            more, further = rest(emitted[-1], room - len(emitted))
            for text, probability in more.items():
                texts[emitted + text] += likely * probability
            rounds += likely * further
        return texts, rounds

    if sampler.batch and len(case["prompts"]) > 1:
        texts = defaultdict(float)
        for likely, rows in every(lambda chance: sampler.batch(models, chance)):
            texts[sum(map(tuple, rows), ())] += likely
        return texts, math.nan
    rows = [rest(last, case["N"]) for last in case["prompts"]]
    return product([texts for texts, _ in rows]), sum(rounds for _, rounds in rows) / len(rows)


def product(rows: list[Law]) -> Law:
    """Of texts that are independent, one behind the other."""
    out = {(): 1.0}
    for row in rows:
        out = {a + b: v * w for a, v in out.items() for b, w in row.items()}
    return out


def target(case: dict) -> Law:
    """What is right, by another route: the product of p along a text."""
    p = [filtered(row, case) for row in case["p"]]

    def rest(last: int, room: int) -> Law:
        if room == 0 or last in case["stop"]:
            return {(): 1.0}
        return {(x, *text): w * v for x, w in enumerate(p[last]) if w > 0
                for text, v in rest(x, room - 1).items()}
    return product([rest(last, case["N"]) for last in case["prompts"]])


# ------------------------------------------------------------------------- python law.py NAME

def play(sampler: Sampler, case: dict, chance: Any) -> list[list[list[int]]]:
    """The texts of the case's prompts, each a list of rounds."""
    models = sampler.models(case)
    if sampler.batch and len(case["prompts"]) > 1:
        return [[text] for text in sampler.batch(models, chance)]
    texts = []
    for last in case["prompts"]:
        rounds = []
        room = case["N"]
        while room > 0 and last not in case["stop"]:
            emitted = sampler.rule(models, last, room, chance)
            rounds.append(list(sampler.cut(emitted, case["stop"])))
            last = rounds[-1][-1]
            room -= len(rounds[-1])
        texts.append(rounds)
    return texts


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
    from oracle.sampler.wrong import WRONG
    named = RIGHT | WRONG
    if len(sys.argv) != 2 or sys.argv[1] not in named:
        print("law.py: NAME is one of " + "; ".join(named), file=sys.stderr)
        sys.exit(2)
    sampler = named[sys.argv[1]]
    for line in sys.stdin:
        case = json.loads(line)
        uniform = iter(case["u"]).__next__ if "u" in case else random.Random(case["seed"]).random
        texts = []
        while len(texts) < case["texts"]:
            texts += play(sampler, case, Dice(uniform))
        print(json.dumps({"texts": texts}))


if __name__ == "__main__":
    main()
