"""Samplers that do not emit what p says, as somebody wrote them: each the token rule of law.py but
for one part. ../BUGS.md says where they were met.

A part is a function of p and q (the k+1 rows of a round), s (the step that is judged) and x (the
token that was drafted there).
"""
import math
from collections.abc import Callable
from functools import partial
from typing import Any

from oracle.sampler.law import (Models, Row, Sampler, block_rule, by, drafts, filtered, greedy,
                                ratio, residual, token_rule, unfiltered, without)


def likeliest(weights: Row) -> Row:
    return [float(x == weights.index(max(weights))) for x in range(len(weights))]


def typical(p: list[Row], q: list[Row], s: int, x: int) -> float:
    """Medusa's: likely enough, given the entropy."""
    entropy = -sum(v * math.log(v) for v in p[s] if v > 0)
    return float(p[s][x] > min(0.3, 0.55 * math.exp(-entropy)))


def overlap(start: float, length: float, start2: float, end2: float) -> float:
    return max(0.0, min(start + length, end2) - max(start, start2))


def drew_already(p: list[Row], q: list[Row], s: int, x: int) -> float:
    """The number that drew the token, from a piece of 0..1 as long as q[x], judges it as well."""
    return overlap(sum(q[s][:x]), q[s][x], 0.0, ratio(p, q, s, x)) / q[s][x]


def rejected_already(p: list[Row], q: list[Row], s: int, x: int) -> Row:
    """The number that rejected, one from a to 1, draws as well."""
    owed = residual(p, q, s, x)
    share = [v / sum(owed) for v in owed]
    return [overlap(sum(share[:y]), v, ratio(p, q, s, x), 1.0) for y, v in enumerate(share)]


def raced_already(p: list[Row], q: list[Row], s: int, x: int) -> Row:
    """Draft and correction are the first of one race, at E[y] / q[y] and at E[y] / owed[y]. That x
    was first at time t leaves E[y] = q[y] t + an exponential; t itself is exponential."""
    owed = residual(p, q, s, x)
    starts = sorted((q[s][y] / v, y) for y, v in enumerate(owed) if v > 0)      # in units of t
    out = [0.0] * len(owed)
    for n, (start, _) in enumerate(starts):
        running = [y for _, y in starts[:n + 1]]

        ends = [start] + [time for time, _ in starts[n + 1:n + 2]]
        still = [1 / (1 + sum(owed[y] * time - q[s][y] for y in running)) for time in ends]
        decided = still[0] - sum(still[1:])            # the last runs until it is decided
        for y in running:
            out[y] += decided * owed[y] / sum(owed[z] for z in running)
    return out


def unlikely_dropped(models: Models, last: int, room: int, chance: Any) -> tuple:
    """By its own q. (That the row is doubtful, whatever was drawn from it, would do no harm.)"""
    d, q, p = drafts(models, last, room, chance)
    for s, x in enumerate(d):
        if q[s][x] < models.case["exit"]:
            return d[:s], q[:s + 1], p[:s + 1]
    return d, q, p


def in_step(models: Models, chance: Any, verdict: Callable) -> list[list[int]]:
    """Rows side by side, of which all keep as many tokens as `verdict` says."""
    texts = [[last] for last in models.case["prompts"]]
    while len(texts[0]) <= models.case["N"]:
        room = models.case["N"] + 1 - len(texts[0])
        rows = [drafts(models, text[-1], room, chance) for text in texts]
        accepted = []
        for d, q, p in rows:
            s = 0
            while s < len(d) and chance.accept(ratio(p, q, s, d[s])):
                s += 1
            accepted.append(s)
        s = verdict(accepted)
        for text, (d, q, p) in zip(texts, rows):
            text += d[:s] + [chance.draw(residual(p, q, s, d[s]) if s < len(d) else p[-1])]
    return [text[1:] for text in texts]


def top_p_first(row: Row, case: dict) -> Row:
    nucleus = filtered(row, dict(case, temperature=1))
    return filtered(nucleus, dict(case, top_p=1))


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
    "accept by the number that drew": by(accept=drew_already),
    "residual = p": by(owed=lambda p, q, s, x: p[s]),
    "residual = p without the rejected": by(owed=without),
    "residual |p - q|": by(owed=lambda p, q, s, x: [abs(v - w) for v, w in zip(p[s], q[s])]),
    "residual softmax(p - q)": by(
        owed=lambda p, q, s, x: [math.exp(v - w) for v, w in zip(p[s], q[s])]),
    "residual of the row before": by(owed=lambda p, q, s, x: residual(p, q, max(s - 1, 0), x)),
    "residual by argmax": by(owed=lambda p, q, s, x: likeliest(residual(p, q, s, x))),
    "residual by the number that rejected": by(owed=rejected_already),
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
    "top-p without the token that crosses": Sampler(
        p=partial(filtered, crossing=False), q=partial(filtered, crossing=False)),
    "unlikely drafts dropped unjudged": by(draft=unlikely_dropped),
    "a stop token inside is not seen": Sampler(cut=lambda emitted, stop: tuple(emitted)),
    "block rule, residual of the token rule": Sampler(partial(
        block_rule, owed=lambda p, q, s, x, paid: residual(p, q, s, x))),
    "block rule, kept by the product": Sampler(partial(
        block_rule, keep=lambda p, q, s, paid: paid)),
    "block rule, stops at a refusal": Sampler(partial(block_rule, stops=True)),
    "the batch's shortest row cuts all": Sampler(batch=partial(in_step, verdict=min)),
    "row 0 judges the batch": Sampler(batch=partial(in_step, verdict=lambda each: each[0])),
}
