"""Speculative sampling done right, and the exact law of what a sampler emits: chance is asked, and
every answer that it can give is followed. No model and no PyTorch.

p, the full model, and q, the draft, are tables whose row c is the distribution after a token c.

Glossary
    case          what a program is asked for: an object of cases.json (../README.md has its fields)
    last, room    the token that is continued; how many tokens the text may still have
    rows          of a batch, (last, room) each
    d, k          the drafted tokens of a round; their number
    p, q          in a rule k+1 rows: where d1 stands, ..., where dk stands, and after
    s, x          a step of the draft, from 0; a token
    chance        answers "accept with probability a?" and "draw a token by these weights"
"""
import itertools
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from operator import add
from pathlib import Path
from typing import Any

CASES = {case["case"]: case for case in json.loads(
    Path(__file__).with_name("cases.json").read_text())}
ALONE = [name for name, case in CASES.items() if not isinstance(case["prompt"], list)]
Row = list[float]
Law = dict[tuple, float]                     # text, or a tuple of those of a batch -> probability


# ------------------------------------------------- the theorem: rules whose texts are p's, exactly

def ratio(p: list[Row], q: list[Row], s: int, x: int) -> float:
    """min(1, p/q), also where a wrong sampler has drafted what q excludes."""
    return min(1.0, p[s][x] / q[s][x]) if q[s][x] > 0 else float(p[s][x] > 0)


def residual(p: list[Row], q: list[Row], s: int, x: int, paid: float = 1.0) -> Row:
    """max(0, p - q): what is still owed. Chance normalises it."""
    owed = [max(0.0, paid * v - w) for v, w in zip(p[s], q[s])]
    return owed if sum(owed) > 0 else p[s]


def without(p: list[Row], q: list[Row], s: int, x: int) -> Row:
    return [0.0 if y == x else v for y, v in enumerate(p[s])]


def token_rule(d: list[int], p: list[Row], q: list[Row], chance: Any, accept: Callable = ratio,
               owed: Callable = residual, bonus: Callable = lambda p, q: p[-1]) -> list[int]:
    """Leviathan et al. 2023, Algorithm 1."""
    for s, x in enumerate(d):
        if not chance.accept(accept(p, q, s, x)):
            return d[:s] + [chance.draw(owed(p, q, s, x))]
    return d + [chance.draw(bonus(p, q))]


def without_bonus(d: list[int], p: list[Row], q: list[Row], chance: Any) -> list[int]:
    """As right, and slower."""
    return token_rule(d, p, q, chance)[:max(1, len(d))]


def kept(p: list[Row], q: list[Row], s: int, paid: float) -> float:
    """How likely a block of s tokens is kept, if no longer one was; all of them, as paid says."""
    if s == len(p) - 1:
        return paid
    mass = sum(max(0.0, paid * v - w) for v, w in zip(p[s], q[s]))
    return mass / (mass + 1 - paid) if mass > 0 else 0.0


def block_rule(d: list[int], p: list[Row], q: list[Row], chance: Any, keep: Callable = kept,
               owed: Callable = residual, stops: bool = False) -> list[int]:
    """Sun et al. 2024, Algorithm 2: the longest block that is kept, whatever failed before it."""
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


# ------------------------------------------------------------------------------ a whole sampler

def filtered(row: Row, case: dict) -> Row:
    """Top-k, temperature, top-p, of probabilities. The token that crosses top_p is kept."""
    order = sorted(range(len(row)), key=lambda x: (-row[x], x))
    T = case["temperature"]
    if T == 0:
        return [float(x == order[0]) for x in range(len(row))]
    order = order[:case["top_k"] or None]
    weight = [v ** (1 / T) for v in row]
    enough = case["top_p"] * sum(weight[x] for x in order)
    out = [0.0] * len(row)
    for x in order:
        if sum(out) < enough:
            out[x] = weight[x]
    return [v / sum(out) for v in out]


def greedy(row: Row, case: dict) -> Row:
    return filtered(row, dict(case, temperature=0))


def drafts(case: dict, q: list[Row], last: int, room: int, chance: Any) -> list[int]:
    """A stop token ends a draft, and so does a doubtful one, which is judged like any other: only
    none is drafted after it."""
    d = []
    sure = True
    while len(d) < min(case["K"], room - 1) and last not in case["stop"] and sure:
        sure = max(case["q"][last]) >= case["exit"]
        last = chance.draw(q[last])
        d.append(last)
    return d


def cut(emitted: list[int], stop: list[int]) -> tuple[int, ...]:
    """Nothing stays behind a stop token."""
    ends = [s + 1 for s, x in enumerate(emitted) if x in stop]
    return tuple(emitted[:min(ends, default=None)])


def apart(of: "Round", rows: list[tuple[int, int]], chance: Any) -> list[tuple[int, ...]]:
    """One round of a batch: each row as if alone, and none that has ended."""
    return [() if of.ended(*row) else of.judged(*of.drafted(*row, chance), chance) for row in rows]


@dataclass(frozen=True)
class Sampler:
    """A rule, and where its draft and its rows come from."""
    rule: Callable = token_rule
    p: Callable = filtered
    q: Callable = filtered                      # what drafts are drawn from
    told: Callable | None = None                # what the rule takes for it, if not the same
    draft: Callable = drafts
    cut: Callable = cut
    batch: Callable = apart                     # what it does with the rows of a batch


class Round:
    """A round of a sampler, on the tables of a case."""

    def __init__(self, sampler: Sampler, case: dict) -> None:
        self.sampler = sampler
        self.case = case
        self.p = [sampler.p(row, case) for row in case["p"]]
        self.q = [sampler.q(row, case) for row in case["q"]]
        self.told = [(sampler.told or sampler.q)(row, case) for row in case["q"]]

    def ended(self, last: int, room: int) -> bool:
        return room == 0 or last in self.case["stop"]

    def drafted(self, last: int, room: int, chance: Any) -> tuple[list[int], list[Row], list[Row]]:
        """-> d, p, q as a rule takes them."""
        d = self.sampler.draft(self.case, self.q, last, room, chance)
        read = [last, *d]
        return d, [self.p[x] for x in read], [self.told[x] for x in read]

    def judged(self, d: list[int], p: list[Row], q: list[Row], chance: Any) -> tuple[int, ...]:
        """-> what is emitted."""
        return self.sampler.cut(self.sampler.rule(d, p, q, chance), self.case["stop"])


RIGHT = {
    "token rule": Sampler(),
    "block rule": Sampler(block_rule),
    # Right if the full model draws the same: as likely as p says.
    "sample and compare": Sampler(partial(
        token_rule, accept=lambda p, q, s, x: p[s][x], owed=without)),
    "no bonus": Sampler(without_bonus),
    "argmax drafts, q one-hot": Sampler(q=greedy),
}


# ------------------------------------------------------------------------------------ the law

def law(sampler: Sampler, case: dict, say: Callable = tuple) -> Law:
    """What a sampler emits; or what `say` makes of each round's tokens. Where `prompt` is a list
    its texts are a batch, one row each, and the law is that of all together."""
    batch = isinstance(case["prompt"], list)
    prompts = case["prompt"] if batch else [case["prompt"]]
    if batch and sampler.batch is apart:
        rows = [law(sampler, dict(case, prompt=prompt)) for prompt in prompts]
        return {texts: math.prod(row[text] for row, text in zip(rows, texts))
                for texts in itertools.product(*rows)}
    of = Round(sampler, case)

    @cache
    def rest(rows: tuple[tuple[int, int], ...]) -> dict:
        """What follows these rows: the same, whatever stood before them."""
        if all(of.ended(*row) for row in rows):
            return {((),) * len(rows): 1.0}
        texts = defaultdict(float)
        for likely, emitted in every(partial(sampler.batch, of, rows)):
            after = tuple((new[-1], room - len(new)) if new else (last, room)
                          for (last, room), new in zip(rows, emitted))
            for ends, probability in rest(after).items():
                texts[tuple(map(add, map(say, emitted), ends))] += likely * probability
        return texts
    texts = rest(tuple((prompt, case["N"]) for prompt in prompts))
    return texts if batch else {text: probability for (text,), probability in texts.items()}


def rounds(sampler: Sampler, case: dict) -> Counter[int]:
    """n -> how many rounds of a text, on average, emit n tokens: one more than they accept, if they
    add one of their own. Their total is what a text takes."""
    counts = Counter()
    for lengths, probability in law(sampler, case, say=lambda new: (len(new),)).items():
        for n in lengths:
            counts[n] += probability
    return counts


def target(case: dict) -> Law:
    """What is right: the full model alone, a token at a time."""
    return law(Sampler(lambda d, p, q, chance: [chance.draw(p[0])], draft=lambda *_: []), case)


# ----------------------------------------------------------------------------------------- chance

class Branch:
    """Chance that answers as it is told, then the first way that is open, and notes the others."""

    def __init__(self, told: list[int]) -> None:
        self.told = iter(told)
        self.answered: list[int] = []
        self.probability = 1.0
        self.others: list[list[int]] = []

    def draw(self, weights: Row) -> int:
        answer = next(self.told, None)
        if answer is None:
            answer, *others = [x for x, weight in enumerate(weights) if weight > 0]
            self.others += [[*self.answered, other] for other in others]
        self.answered.append(answer)
        self.probability *= weights[answer] / sum(weights)
        return answer

    def accept(self, a: float) -> bool:
        return self.draw([1 - a, a]) == 1


def every(run: Callable[[Branch], Any]) -> Iterator[tuple[float, Any]]:
    """What `run` returns down each branch of chance, and how likely that branch is."""
    ways = [[]]
    while ways:
        chance = Branch(ways.pop())
        outcome = run(chance)
        yield chance.probability, outcome
        ways += chance.others
