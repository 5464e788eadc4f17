"""Deliberately wrong programs, as errors are really written, some of them met in real repositories.
The tests, and the checker of traces, are held against them: each must be rejected by something.

    @rejects("residual = p", "lenient acceptance")
    def test_...                         # holds, and fails while the sampler is one of these

    with running("residual = p"):
        ...                              # here it is, for everyone

`WRONG` is the table: module -> name -> changes. A change puts a function in the place of another
(`put`), so that it outlives whatever is done to that one's body; only where a line inside a loop is
wrong does it edit the text (`edit`). A change whose place is gone raises Stale, which no test takes
for a rejection.

What cannot be written any more is not here: a policy is asked before a token is drawn, and has no
way to drop one; how states and logits of a pass are cut to its last rows is nobody's decision.
"""
import contextlib
import functools
import inspect
import re
import sys
import textwrap
import types
from dataclasses import replace

import pytest
import torch

import dp_layer_skip
import llama
import speculative
from command import report
from llama import Cache, rms_norm
from policy import probe
from speculative import Chance, Paper


class Stale(Exception):
    """The program has changed, and a wrong program not: what it changes is gone."""


def edited(text, edits):
    """`text` with every (right, wrong); a space in `right` stands for any white space."""
    for right, wrong in edits:
        pattern = r"\s+".join(map(re.escape, right.split(" ")))
        text, n = re.subn(pattern, lambda _: wrong, text)
        if n == 0:
            raise Stale(right)
    return text


def altered(module, *edits):
    """A copy of `module` as it would be with these edits of its text."""
    out = types.ModuleType(module.__name__)
    text = edited(inspect.getsource(module), edits)
    exec(compile(text, f"wrong_{module.__name__}", "exec"), out.__dict__)
    return out


def put(owner, name, wrong):
    """A change: `wrong` in the place of a module's function, wherever it was imported or is a
    default, or of a class's."""
    def change(patch):
        if not hasattr(owner, name):
            raise Stale(f"{owner.__name__}.{name}")
        right = getattr(owner, name)
        patch.setattr(owner, name, wrong)
        if inspect.ismodule(owner):
            for module in list(sys.modules.values()):
                if getattr(module, "__dict__", {}).get(name) is right:
                    patch.setattr(module, name, wrong)
            for f in filter(inspect.isfunction, list(vars(owner).values())):
                if right in (f.__defaults__ or ()):
                    with_wrong = tuple(wrong if x is right else x for x in f.__defaults__)
                    patch.setattr(f, "__defaults__", with_wrong)
    return change


def edit(owner, name, *edits, into=()):
    """A change: a function with edits of its text; in the place of others too, if they are named."""
    def change(patch):
        if not hasattr(owner, name):
            raise Stale(f"{owner.__name__}.{name}")
        right = inspect.unwrap(getattr(owner, name))
        text = edited(textwrap.dedent(inspect.getsource(right)), edits)
        out = {}
        exec(compile(text, f"wrong_{name}", "exec"), right.__globals__, out)
        for place in (name, *into):
            put(owner, place, out[name])(patch)
    return change


@contextlib.contextmanager
def running(*wrong):
    """While it lasts the program has these changes, or those that the table has by this name."""
    with pytest.MonkeyPatch.context() as patch:
        for change in wrong:
            for one in [change] if callable(change) else NAMED[change]:
                one(patch)
        yield


def rejects(*wrong):
    """A test that must hold, and fail on each of these wrong programs of the table."""
    HELD.update(wrong)

    def note(test):
        @functools.wraps(test)
        def holds_and_can_fail(*args, **kwargs):
            test(*args, **kwargs)
            for name in wrong:
                with running(name):
                    try:
                        test(*args, **kwargs)
                    except AssertionError:
                        continue
                pytest.fail(f"not rejected: {name}")
        return holds_and_can_fail
    return note


HELD = set()                 # wrong programs that a test is held against


# The modules as they are, for wrong programs that are the right one but for a step before or after.
dp = types.SimpleNamespace(**vars(dp_layer_skip))
sp = types.SimpleNamespace(**vars(speculative))
ll = types.SimpleNamespace(**vars(llama))
optimise = Paper.optimise
sequence = Cache.sequence
cache_init = Cache.__init__


# --------------------------------------------------------------------------- the dynamic program

def recurrence(*edits):
    """The cell at a time with an error, in the place of the row at a time too: so that their being
    equal is no defence."""
    return [edit(dp_layer_skip, "choose_skip_plain", *edits, into=("choose_skip",))]


def way_back(before):
    """Choice.skip, where `before(choice, i, j)` is the budget left in row i-1."""
    def skip(self, j=None):
        L = len(self.D) - 1
        j = len(self.D[0]) - 1 if j is None else j
        flags = [False] * L
        for i in range(L, 0, -1):
            flags[i - 1] = self.skipped[i][j]
            j = before(self, i, j)
        return tuple(flags)
    return skip


def cosine_in(dtype, a, b, least):
    a = a.to(dtype)
    b = b.to(dtype)
    norms = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    return (a * b).sum(-1) / norms.clamp_min(least)


def by_cells(h, run_layer, M, near=dp.cosine):
    """A table from calls of one state each."""
    def one_by_one(i, g):
        return torch.cat([run_layer(i, x[None]) for x in g])
    return dp.table(h, one_by_one, M, near)


def waiting(h, run_layer, M, near=dp.cosine):
    """The host looks at every layer's states."""
    def looked_at(i, g):
        assert g.isfinite().all()
        return run_layer(i, g)
    return dp.table(h, looked_at, M, near)


DYNAMIC_PROGRAM = {
    "the worse choice wins": recurrence(("cosines[0] > cosines[1]", "cosines[0] < cosines[1]")),
    "ties are run": recurrence(("cosines[0] > cosines[1]", "cosines[0] >= cosines[1]")),
    "the target is always h[L]": recurrence(("near(state[None], h[i])", "near(state[None], h[L])")),
    "the target is the layer's input": recurrence(("near(state[None], h[i])",
                                                   "near(state[None], h[i - 1])")),
    "cell (i,i) does not know it skipped": recurrence(("(g[i - 1, j - 1], True)",
                                                       "(g[i - 1, j - 1], j < i)")),
    "skipping spends nothing": recurrence(("g[i - 1, j - 1]", "g[i - 1, min(j, i - 1)]")),
    "g[i,0] is one layer late": recurrence(("g[i, 0] = h[i]", "g[i, 0] = h[i - 1]")),
    "g[i,0] is computed again": recurrence(("g[i, 0] = h[i]", "pass")),
    "the losing state is kept": recurrence(("= ways[way]", "= (ways[len(ways) - 1 - way][0],"
                                                           " ways[way][1])")),
    "the losing cosine is told": recurrence(("= cosines[way]", "= cosines[len(ways) - 1 - way]")),
    "a row at a time runs what is no number": [
        edit(dp_layer_skip, "table", ("run_cos[1:] > skip_cos[:-1]",
                                      "~(run_cos[1:] <= skip_cos[:-1])"))],
    "a row at a time computes g[i,0] again": [
        edit(dp_layer_skip, "table", ("cells = [h[i:i + 1],", "cells = [run[:1],"))],
    "a row at a time leaves the last cell out": [
        edit(dp_layer_skip, "table", ("if J <= M:", "if J < M:"))],
    "the way back reads one row early": [
        put(dp_layer_skip.Choice, "skip", way_back(lambda c, i, j: j - c.skipped[i - 1][j]))],
    "the way back spends nothing": [
        put(dp_layer_skip.Choice, "skip", way_back(lambda c, i, j: j))],
    "the way back names the next layer": [
        put(dp_layer_skip.Choice, "skip",
            lambda self, j=None, right=dp_layer_skip.Choice.skip: (False, *right(self, j)[:-1]))],
    "the cosine is bfloat16": [
        put(dp_layer_skip, "cosine", lambda a, b: cosine_in(torch.bfloat16, a, b, 1e-30))],
    "the cosine is as wide as the states": [
        put(dp_layer_skip, "cosine", lambda a, b: cosine_in(a.dtype, a, b, 1e-30))],
    "a zero state has no cosine": [
        put(dp_layer_skip, "cosine",
            lambda a, b: cosine_in(torch.promote_types(a.dtype, torch.float32), a, b, 0))],
    "a call for every cell": [put(dp_layer_skip, "table", by_cells)],
    "the host waits for every layer": [put(dp_layer_skip, "table", waiting)],
    "the stars stand one row early": [
        edit(dp_layer_skip, "show", ("sum(skip[:i])", "sum(skip[:max(0, i - 1)])"))],
    "the printed case is another": [edit(dp_layer_skip, "main", ("(-1,1)", "(1,-1)"))],
}


# ------------------------------------------------------------------------------ sampler and loop

class Argmax(Chance):
    """It draws the likeliest token."""

    def __init__(self, chance):
        self.accept = chance.accept

    def draw(self, p):
        return int(p.argmax())


def drawing(cdf, exceeds):
    """Chance.draw by another running sum, and another comparison with it."""
    def draw(self, p):
        total = cdf(p)
        return int(exceeds(total, self.uniform() * total.amax()).int().argmax())
    return draw


def wide_sum(p):
    return torch.where(p > 0, p.cumsum(0, dtype=torch.float64), 0)


def accept_and_keep(self, a):
    self.u = self.uniform()
    return self.u < a


def draw_by_the_kept(self, p):
    u = self.__dict__.pop("u", None) or self.uniform()
    cdf = wide_sum(p)
    return int((cdf > u * cdf.amax()).int().argmax())


def judging(own):
    """`judge`, where own(p, q, accepted) is what the full model's token is drawn from."""
    def judge(p, q, drafted, chance):
        accepted = 0
        while accepted < len(drafted):
            token = drafted[accepted]
            if not chance.accept(sp.acceptance(p[accepted, token], q[accepted][token]).item()):
                break
            accepted += 1
        return accepted, chance.draw(own(p, q, accepted))
    return judge


def residual_or_bonus(p, q, accepted):
    return sp.residual(p[accepted], q[accepted]) if accepted < len(q) else p[accepted]


def judge_what_is_likely(p, q, drafted, chance):
    """A policy that looks at p of tokens not judged yet."""
    k = len(drafted)
    while k > 0 and p[k - 1, drafted[k - 1]] < 0.2:
        k -= 1
    return sp.judge(p[:k + 1], q[:k], drafted[:k], chance)


def verifying(other):
    """`probabilities`, which a verify (T, V) replaces: by other(p, logits, s)."""
    def probabilities(logits, s):
        p = sp.probabilities(logits, s)
        return other(p, logits, s) if logits.dim() == 2 else p
    return probabilities


def plain_bonus(p, logits, s):
    return torch.cat((p[:-1], logits[-1:].softmax(-1)))


def top_k_by_id(logits, s):
    if s.temperature > 0 and 0 < s.top_k < logits.shape[-1]:
        kept = logits.argsort(dim=-1, descending=True, stable=True)[..., :s.top_k]
        mask = torch.ones_like(logits, dtype=torch.bool).scatter(-1, kept, False)
        logits = logits.masked_fill(mask, -torch.inf)
    return sp.probabilities(logits, replace(s, top_k=0))


def top_p_first(logits, s):
    if s.temperature == 0:
        return sp.probabilities(logits, s)
    p = sp.probabilities(logits, replace(s, temperature=1.0)) ** (1 / s.temperature)
    return p / p.sum(-1, keepdim=True)


def one_token_more(logits, s):
    return sp.probabilities(logits, replace(s, top_p=min(1.0, s.top_p + 1e-12)))


def drop_the_doubtful(model, cache, text, most, skip, s, policy, chance):
    drafted, q, confidence = sp.draft(model, cache, text, most, skip, s, policy, chance)
    if drafted and q[-1][drafted[-1]] < s.exit_threshold:
        return drafted[:-1], q[:-1], confidence[:-1]
    return drafted, q, confidence


def read_beside_the_drafts(model, tokens, t, cache):
    """Of what a verify writes the keys are not kept: those of the draft stay."""
    drafted = len(tokens) > 1 and t > 0
    was = cache.k[:, :, t:t + len(tokens)].clone()
    h = sp.read(model, tokens, t, cache)
    if drafted:
        cache.k[:, :, t:t + len(tokens)] = was
    return h


def verify_late(by):
    """Verifies begin `by` slots further on after each round."""
    return [edit(speculative, "generate",
                 ("text = list(prompt)", "text = list(prompt)\n    late = 0"),
                 ("cache(end + policy.slots)", "cache(end + policy.slots + 99)"),
                 ("drafted, cached, cache)", "drafted, cached + late, cache)"),
                 ("policy.judged(", f"late += {by}\n        policy.judged("))]


def normed(self, choose, model, cache, text, h):
    """The last target is the state behind the final norm."""
    end = rms_norm(h[-1:], model.norm, model.eps)
    return optimise(self, choose, model, cache, text, torch.cat((h[:-1], end)))


def due_late(self, n):
    return n % self.s.interval == 1 % self.s.interval and self.s.K > 0 and self.s.M > 0


def goes_on_above(self, confidence):
    return len(confidence) < self.s.K and (not confidence
                                           or confidence[-1] > self.s.exit_threshold)


SAMPLER_AND_LOOP = {
    "residual = p": [put(speculative, "residual", lambda p, q: p)],
    "residual through a softmax": [put(speculative, "residual", lambda p, q: (p - q).softmax(-1))],
    "residual without max(0, .)": [
        put(speculative, "residual", lambda p, q: (p - q).abs() / (p - q).abs().sum())],
    "a residual of no mass is no number": [
        put(speculative, "residual", lambda p, q: (p - q).clamp(0) / (p - q).clamp(0).sum())],
    "lenient acceptance": [
        put(speculative, "acceptance", lambda p, q: (1.3 * p.double() / q).clamp(max=1))],
    "acceptance the wrong way up": [
        put(speculative, "acceptance", lambda p, q: (q.double() / p).clamp(max=1))],
    "accepts at u = a": [put(Chance, "accept", lambda self, a: self.uniform() <= a)],
    "draws at u = the running sum": [put(Chance, "draw", drawing(wide_sum, torch.ge))],
    "the running sum is float32": [
        put(Chance, "draw", drawing(lambda p: p.float().cumsum(0), torch.gt))],
    "uniforms of 24 bits": [
        put(Chance, "uniform", lambda self: torch.rand((), generator=self.generator).item())],
    "the correction is drawn with the uniform that rejected": [
        put(Chance, "accept", accept_and_keep), put(Chance, "draw", draw_by_the_kept)],
    "argmax draft scored with a softmax q": [
        put(speculative, "draft", lambda *how: sp.draft(*how[:-1], Argmax(how[-1])))],
    "q at temperature 1": [
        edit(speculative, "draft", ("last = chance.draw(q[-1])",
                                    "last = chance.draw(q[-1])\n        q[-1] = logits.softmax(-1)"))],
    "bonus from unfiltered logits": [put(speculative, "probabilities", verifying(plain_bonus))],
    "bonus from the row before": [
        put(speculative, "judge", judging(lambda p, q, n: residual_or_bonus(p, q, n) if n < len(q)
                                          else p[max(n - 1, 0)]))],
    "correction from the row before": [
        put(speculative, "judge", judging(lambda p, q, n: p[n] if n == len(q) else
                                          sp.residual(p[max(n - 1, 0)], q[max(n - 1, 0)])))],
    "p without the filters": [
        put(speculative, "probabilities",
            verifying(lambda p, logits, s: sp.probabilities(logits, replace(s, top_k=0, top_p=1))))],
    "top-k cuts ties by id": [put(speculative, "probabilities", top_k_by_id)],
    "top-p before temperature": [put(speculative, "probabilities", top_p_first)],
    "top-p keeps one more where the mass is reached": [
        put(speculative, "probabilities", one_token_more)],
    "doubtful tokens are thrown away": [put(speculative, "draft", drop_the_doubtful)],
    "a policy looks at p before a token is judged": [
        put(speculative, "judge", judge_what_is_likely)],
    "drafting goes on behind a stop token": [
        put(speculative, "draft",
            lambda model, cache, text, most, skip, s, policy, chance: sp.draft(
                model, cache, text, most, skip, replace(s, stop_ids=()), policy, chance))],
    "drafting ends at the threshold": [put(Paper, "goes_on", goes_on_above)],
    "the drafts' keys stay after a verify": [put(speculative, "read", read_beside_the_drafts)],
    "a rejected draft's slots are not given back": verify_late("k - accepted"),
    "position off by one after full acceptance": verify_late("0 < k == accepted"),
    "token 0 is no token": [
        edit(speculative, "generate", ("emitted = [*drafted[:accepted], own]",
                                       "emitted = [d for d in (*drafted[:accepted], own) if d] or [1]"))],
    "the text goes on after an accepted stop": [
        edit(speculative, "generate", ("emitted = emitted[:stops[0] + 1]", "stops = []"))],
    "a stop in a draft is told twice": [
        put(report, "fates", lambda r: dict(kept=r.emitted[:r.accepted], own=r.emitted[-1:],
                                            rejected=r.drafted[r.accepted:]))],
    "infinite logits are numbers": [
        edit(speculative, "generate", ("not logits.isfinite().all()", "logits.isnan().any()"))],
    "the prompt's logits alone are looked at": [
        edit(speculative, "generate", ("if not logits.", "if n == 0 and not logits."))],
    "the prompt's logits are not looked at": [
        edit(speculative, "generate", ("if not logits.", "if n > 0 and not logits."))],
    "layers are optimised a round late": [put(Paper, "due", due_late)],
    "the probe is the last drafted token": [
        edit(speculative, "generate", ("x[accepted - (k + 1)]", "x[-1]"))],
    "the probe is the token before the round": [
        edit(speculative, "generate", ("x[accepted - (k + 1)]", "x[-(k + 1)]"))],
    "h[L] comes after the final norm": [put(Paper, "optimise", normed)],
    "the verify's seconds are the draft's too": [
        edit(speculative, "generate", ("verifying - drafting,", "verifying - began,"))],
}


# ----------------------------------------------------------------------------------------- LLaMA

def candidates(position=lambda t, slots: t + 0 * slots, first=1,
               may_read=lambda slot, slots, t: (slot < t) | (slot == slots)):
    """Cache.candidates, where one thing that the rows are told is another."""
    def wrong(self, t, J):
        slot = self.slot[:t + 1 + J]
        slots = slot[t + first:][:J]
        reads = may_read(slot, slots[:, None], t).expand(J, -1)
        return self.rows(position(t, slots), slots, reads)
    return [put(Cache, "candidates", wrong)]


def masked(may_read):
    """Cache.sequence, where row i of T may read slot where may_read(slot, slots, i) is true."""
    def wrong(self, t, T):
        slots = self.slot[t:t + T]
        reads = may_read(self.slot[:t + T], slots[:, None], self.slot[:T, None]).expand(T, -1)
        return self.rows(slots, slots, reads)
    return [put(Cache, "sequence", wrong)]


def one_late(self, t, T):
    rows = sequence(self, t, T)
    if T > 1:
        return rows
    return rows._replace(cos=self.cos.roll(-1, 0)[rows.slots], sin=self.sin.roll(-1, 0)[rows.slots])


def interleaved(x, rows):
    half = x.shape[-1] // 2
    cos = rows.cos[..., :half]
    sin = rows.sin[..., half:]
    a = x[..., 0::2]
    b = x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).type(x.dtype)


def with_queries(change):
    """`attention`, where the weights (D, H, hd) of the queries are change(them, config)."""
    def attention(w, x, rows, keys, values, c, eps):
        q, kv = w.qkv.split((c.H * c.hd, 2 * c.G * c.hd), 1)
        q = change(q.unflatten(1, (c.H, c.hd)), c).flatten(1)
        return ll.attention(w._replace(qkv=torch.cat((q, kv), 1)), x, rows, keys, values, c, eps)
    return [put(llama, "attention", attention)]


def narrow_tables(self, cfg, S, device, dtype):
    cache_init(self, cfg, S, device, dtype)
    self.cos = self.cos.to(dtype)
    self.sin = self.sin.to(dtype)


LLAMA = {
    "candidates see one another": candidates(may_read=lambda slot, slots, t: slot + 0 * slots != t),
    "one position too far": candidates(position=lambda t, slots: t + 1 + 0 * slots),
    "each candidate has its own position": candidates(position=lambda t, slots: slots - 1),
    "the token's own entry is seen": candidates(
        may_read=lambda slot, slots, t: (slot <= t) | (slot == slots)),
    "the token before it is not seen": candidates(
        may_read=lambda slot, slots, t: (slot < t - 1) | (slot == slots)),
    "scratch begins at the probe": candidates(first=0),
    "the interleaved rotary layout": [put(llama, "rotate", interleaved)],
    "decoding one position late": [put(Cache, "sequence", one_late)],
    "LLaMA-3.1's stretching left out": [
        put(llama, "rope_frequencies",
            lambda cfg: ll.rope_frequencies(replace(cfg, scaling=None)))],
    "Transformers 5 not understood": [
        put(llama, "read_json", lambda path: {key: value for key, value in ll.read_json(path).items()
                                              if key != "rope_parameters"})],
    "the mask without + t": masked(lambda slot, slots, i: slot <= i),
    "no causal mask": masked(lambda slot, slots, i: slot + 0 * slots >= 0),
    "scores divided by the root of D": with_queries(lambda q, c: q * (c.hd / c.D) ** 0.5),
    "query heads dealt to kv heads in turn": with_queries(
        lambda q, c: q.unflatten(1, (-1, c.G)).transpose(1, 2).flatten(1, 2)),
    "a norm without eps": [
        put(llama, "rms_norm", lambda x, weight, eps: ll.rms_norm(x, weight, 0 * eps))],
    "norms in bfloat16": [
        put(llama, "rms_norm", lambda x, weight, eps: ll.rms_norm(x, weight, eps.type(x.dtype)))],
    "rotary tables in bfloat16": [put(Cache, "__init__", narrow_tables)],
    "a cache begins uninitialised": [
        edit(Cache, "__init__", ("torch.zeros(", "torch.empty("),
             ("torch.zeros_like(", "torch.empty_like("))],
    "a skipped layer runs": [
        edit(llama.Llama, "forward", ("if skip and skip[i]:", "if False:"))],
    "the layers that run are those to be skipped": [
        edit(llama.Llama, "forward", ("if skip and skip[i]:", "if skip and not skip[i]:"))],
    "a skipped layer writes": [
        edit(llama.Llama, "forward", ("h.append(h[i])",
                                      "self.layer(i, h[i], rows, cache)\n            h.append(h[i])"))],
}


# ----------------------------------------------------------------------- the probe of several tokens

def nearness(compare):
    """`nearness`, where compare(end, g, target), all (..., r, D), says how near."""
    def of(end):
        end = end.to(torch.promote_types(end.dtype, torch.float32))
        return lambda g, target: compare(end, g.to(end.dtype).view(-1, *end.shape),
                                         target.to(end.dtype).view(end.shape))
    return [put(probe, "nearness", of)]


def narrow_nearness(end):
    return lambda g, target: dp.cosine(end, end + (g - target).view(-1, *end.shape)).mean(-1)


def several(position=lambda t, r, J: torch.arange(t - r + 1, t + 1).repeat(J),
            may_read=lambda slot, position, slots, t: (slot < position) | (slot == slots)):
    """The candidates of several tokens, where one thing that the rows are told is another."""
    def wrong(cache, t, J, r):
        slot = cache.slot[:t + 1 + J * r]
        slots = slot[t + 1:]
        positions = position(t, r, J)
        reads = may_read(slot, positions[:, None], slots[:, None], t)
        return cache.rows(positions, slots, reads)
    return [put(probe, "candidates", wrong)]


PROBE = {
    "several tokens are held against h[i]": nearness(
        lambda end, g, target: dp.cosine(g, target).mean(-1)),
    "an error is added to a state that has it already": nearness(
        lambda end, g, target: dp.cosine(end, end + g).mean(-1)),
    "errors ride along in the states' dtype": [put(probe, "nearness", narrow_nearness)],
    "several tokens are compared by their mean state": nearness(
        lambda end, g, target: dp.cosine(end.mean(0), (end + g - target).mean(-2))),
    "several tokens are compared by the last": nearness(
        lambda end, g, target: dp.cosine(end, end + g - target)[..., -1]),
    "one token is compared as several are": [edit(probe, "choose_by", ("if r > 1:", "if True:"))],
    "candidates of a token see those of another": several(
        may_read=lambda slot, position, slots, t: (
            (slot < position) | (slot == slots) | (slot > t) & (slot < slots))),
    "one position for all tokens": several(
        position=lambda t, r, J: torch.full((J * r,), t)),
    "a token of a probe sees those before it not": several(
        may_read=lambda slot, position, slots, t: (slot < position.min()) | (slot == slots)),
    "a token's candidates lie beside one another": several(
        position=lambda t, r, J: torch.arange(t - r + 1, t + 1).repeat_interleave(J)),
    "a probe longer than the text": [edit(probe, "choose_by", ("r = min(r, len(text))", "pass"))],
}

WRONG = {dp_layer_skip: DYNAMIC_PROGRAM, speculative: SAMPLER_AND_LOOP, llama: LLAMA, probe: PROBE}
NAMED = {name: changes for table in WRONG.values() for name, changes in table.items()}
