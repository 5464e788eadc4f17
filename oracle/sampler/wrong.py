"""Samplers that do not emit what p says, as somebody wrote them (../BUGS.md says where they were
met): each a rule of law.py but for one part, which is a function of p, q, s and x as there.
"""
import math
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

from oracle.sampler.law import (Round, Row, Sampler, apart, block_rule, drafts, filtered, greedy,
                                ratio, residual, token_rule, without)


def by(rule: Any = token_rule, **parts: Any) -> Sampler:
    """A rule with other parts."""
    return Sampler(partial(rule, **parts))


def unfiltered(row: Row, case: dict) -> Row:
    return row


def likeliest(weights: Row) -> Row:
    return [float(x == weights.index(max(weights))) for x in range(len(weights))]


def typical(p: list[Row], q: list[Row], s: int, x: int) -> float:
    """Medusa's: likely enough, given the entropy."""
    entropy = -sum(v * math.log(v) for v in p[s] if v > 0)
    return float(p[s][x] > min(0.3, 0.55 * math.exp(-entropy)))


def raced_already(p: list[Row], q: list[Row], s: int, x: int) -> Row:
    """Draft and correction are the first of one race, at E[y] / q[y] and at E[y] / owed[y]. That x
    was first at time t leaves E[y] = q[y] t + an exponential, and t is exponential too: what y owes
    starts at t q[y] / owed[y]."""
    owed = residual(p, q, s, x)
    starts = [w / v if v > 0 else 1e99 for v, w in zip(owed, q[s])]         # in units of t

    def undecided(time: float) -> float:
        return 1 / (1 + sum(max(0.0, v * time - w) for v, w in zip(owed, q[s])))
    out = [0.0] * len(owed)
    for begin, end in pairwise([*sorted(starts), 1e99]):
        running = [v if start <= begin else 0.0 for v, start in zip(owed, starts)]
        decided = undecided(begin) - undecided(end)
        out = [o + decided * v / sum(running) for o, v in zip(out, running)]
    return out


def unlikely_dropped(case: dict, q: list[Row], last: int, room: int, chance: Any) -> list[int]:
    """By its own q. (That the row is doubtful, whatever was drawn from it, would do no harm.)"""
    d = drafts(case, q, last, room, chance)
    for s, (c, x) in enumerate(pairwise([last, *d])):
        if q[c][x] < case["exit"]:
            return d[:s]
    return d


def top_p_first(row: Row, case: dict) -> Row:
    nucleus = filtered(row, dict(case, temperature=1))
    return filtered(nucleus, dict(case, top_p=1))


def by_place(p: list[Row], q: list[Row], s: int, x: int) -> Row:
    """The nth of what a filter left of q is taken from the nth of p, which may be another token."""
    left = [w for w in q[s] if w > 0]
    subtracted = [left.pop(0) if v > 0 and left else 0.0 for v in p[s]]
    return residual([p[s]], [subtracted], 0, x)


# ------------------------- the rows of a batch: of, rows and chance as in law.apart; () has ended

Rows = list[tuple[int, int]]


def by_the_others(n: int) -> Any:
    """Of two rows each is judged by the p (n = 1) or q (2) of the other, as far as that goes."""
    def batch(of: Round, rows: Rows, chance: Any) -> list:
        drafted = [list(of.drafted(*row, chance)) for row in rows]
        emitted = []
        for row, own, other in zip(rows, drafted, drafted[::-1]):
            told = list(own)
            told[n] = other[n][:len(own[n])] + own[n][len(other[n]):]
            emitted.append(() if of.ended(*row) else of.judged(*told, chance))
        return emitted
    return batch


def going_on(of: Round, rows: Rows, chance: Any) -> list:
    """... as long as another row does, if there is room."""
    return [of.judged(*of.drafted(last, room, chance), chance) if room else ()
            for last, room in rows]


def padded(of: Round, rows: Rows, chance: Any) -> list:
    """Shorter rows are filled up with zeros, and the last column is read."""
    least = min(room for _, room in rows)
    return apart(of, [(0, room) if room > least and not of.ended(last, room) else (last, room)
                      for last, room in rows], chance)


class Shared:
    """Chance whose nth number is the same for each row: within these bounds, so far."""

    def __init__(self, chance: Any) -> None:
        self.chance = chance
        self.bounds: list[tuple[float, float]] = []
        self.n = 0

    def draw(self, weights: Row) -> int:
        if self.n == len(self.bounds):
            self.bounds.append((0.0, 1.0))
        low, high = self.bounds[self.n]
        ends = [min(max(end / sum(weights), low), high) for end in accumulate(weights, initial=0)]
        x = self.chance.draw([end - begin for begin, end in pairwise(ends)])
        self.bounds[self.n] = ends[x], ends[x + 1]
        self.n += 1
        return x

    def accept(self, a: float) -> bool:
        return self.draw([a, 1 - a]) == 0


def one_number(of: Round, rows: Rows, chance: Any) -> list:
    shared = Shared(chance)
    emitted = []
    for row in rows:
        shared.n = 0
        emitted += apart(of, [row], shared)
    return emitted


WRONG = {
    "bonus from q": by(bonus=lambda p, q: q[-1]),
    "bonus from the row before": by(bonus=lambda p, q: p[max(len(p) - 2, 0)]),
    "bonus by argmax": by(bonus=lambda p, q: likeliest(p[-1])),
    "accept always": by(accept=lambda p, q, s, x: 1.0),
    "accept by q/p": by(accept=lambda p, q, s, x: ratio(q, p, s, x)),
    "accept if p >= q": by(accept=lambda p, q, s, x: float(p[s][x] >= q[s][x])),
    "accept if the argmax": by(accept=lambda p, q, s, x: likeliest(p[s])[x]),
    "accept leniently, 1.3 p/q": by(accept=lambda p, q, s, x: min(1.0, 1.3 * ratio(p, q, s, x))),
    "accept what is typical": by(accept=typical, owed=lambda p, q, s, x: p[s]),
    "residual = p": by(owed=lambda p, q, s, x: p[s]),
    "residual = p without the rejected": by(owed=without),
    "residual |p - q|": by(owed=lambda p, q, s, x: [abs(v - w) for v, w in zip(p[s], q[s])]),
    "residual softmax(p - q)": by(
        owed=lambda p, q, s, x: [math.exp(v - w) for v, w in zip(p[s], q[s])]),
    "residual of the row before": by(owed=lambda p, q, s, x: residual(p, q, max(s - 1, 0), x)),
    "residual by argmax": by(owed=lambda p, q, s, x: likeliest(residual(p, q, s, x))),
    "residual by the noise that drew": by(owed=raced_already),
    "correction = argmax p": by(owed=lambda p, q, s, x: likeliest(p[s])),
    "argmax for every draw": Sampler(p=greedy, q=greedy),
    "argmax for every draw, judged by softmax": Sampler(
        partial(token_rule, owed=lambda p, q, s, x: likeliest(residual(p, q, s, x)),
                bonus=lambda p, q: likeliest(p[-1])),
        p=unfiltered, q=greedy, told=unfiltered),
    "argmax drafts, q softmax": Sampler(q=greedy, told=filtered),
    "q at temperature 1, unfiltered": Sampler(told=unfiltered),
    "drafts at temperature 1, unfiltered": Sampler(q=unfiltered, told=filtered),
    "p at temperature 1, unfiltered": Sampler(p=unfiltered),
    "top-k and top-p forgotten in p": Sampler(
        p=lambda row, case: filtered(row, dict(case, top_k=0, top_p=1))),
    "top-p before temperature": Sampler(p=top_p_first, q=top_p_first),
    "unlikely drafts dropped unjudged": Sampler(draft=unlikely_dropped),
    "a stop token inside is not seen": Sampler(cut=lambda emitted, stop: tuple(emitted)),
    "block rule, residual of the token rule": by(
        block_rule, owed=lambda p, q, s, x, paid: residual(p, q, s, x)),
    "block rule, kept by the product": by(block_rule, keep=lambda p, q, s, paid: paid),
    "block rule, stops at a refusal": by(block_rule, stops=True),
    "residual by place in what is left": by(owed=by_place),
    "batch: judged by the other row's p": Sampler(batch=by_the_others(1)),
    "batch: judged by the other row's q": Sampler(batch=by_the_others(2)),
    "batch: a finished row goes on": Sampler(batch=going_on),
    "batch: padding read": Sampler(batch=padded),
    "batch: one number for all rows": Sampler(batch=one_number),
}
