"""Deliberately wrong programs, as errors are really written, some of them met in real
repositories. Tests, and the checker of traces, are held against them.

    @rejects("residual = p", "lenient acceptance")
    def test_...                         # holds; and fails while the sampler is one of these

    with running("residual = p"):
        ...                              # here it is that one, for everyone

A wrong program is a list of changes. `put` has a function in the place of another, whatever that
one's body is by now. Only where a line inside of one is wrong is its text changed (`edit`). A
change whose place is gone raises Stale, which nobody takes for a rejection.

Some are impossible by the program's shape (a policy is asked before a token is drawn, so it
cannot drop one). They stand here as a loop that somebody might write instead.
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
from llama import Cache, Llama
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
    """A change: `wrong` in the place of a class's function, or of a module's, then wherever it was
    imported or is a default."""
    def change(patch):
        right = getattr(owner, name, None)
        if right is None:
            raise Stale(f"{owner.__name__}.{name}")
        patch.setattr(owner, name, wrong)
        if inspect.isclass(owner):
            return
        for module in list(sys.modules.values()):
            if getattr(module, "__dict__", {}).get(name) is right:
                patch.setattr(module, name, wrong)
        for f in filter(inspect.isfunction, list(vars(owner).values())):
            if right in (f.__defaults__ or ()):
                defaults = tuple(wrong if x is right else x for x in f.__defaults__)
                patch.setattr(f, "__defaults__", defaults)
    return change


def edit(owner, name, *edits, into=()):
    """A change: a function with edits of its text, in its own place and `into` others."""
    def change(patch):
        right = inspect.unwrap(getattr(owner, name, None))
        if right is None:
            raise Stale(f"{owner.__name__}.{name}")
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
        for one in wrong:
            for change in [one] if callable(one) else NAMED[one]:
                change(patch)
        yield


HELD = set()                 # names of wrong programs that a test is held against


def rejects(*names):
    """A test that must hold, and must fail on each of these wrong programs."""
    HELD.update(names)

    def note(test):
        @functools.wraps(test)
        def holds_and_can_fail(*args, **kwargs):
            test(*args, **kwargs)
            for name in names:
                with running(name):
                    try:
                        test(*args, **kwargs)
                    except AssertionError:
                        continue
                pytest.fail(f"not rejected: {name}")
        return holds_and_can_fail
    return note


# The right functions, for wrong programs that do something before or after.
dp = types.SimpleNamespace(**vars(dp_layer_skip))
sp = types.SimpleNamespace(**vars(speculative))
ll = types.SimpleNamespace(**vars(llama))
optimise = Paper.optimise


# --------------------------------------------------------------------------- the dynamic program

def recurrence(right, wrong):
    """An error of the cell at a time, in the place of the row at a time too: so that their being
    equal is no defence."""
    return [edit(dp_layer_skip, "choose_skip_plain", (right, wrong), into=["choose_skip"])]


def way_back(right, wrong):
    return [edit(dp_layer_skip.Choice, "skip", (right, wrong))]


def cosine_in(dtype, least=1e-30):
    def cosine(a, b):
        a = a.to(dtype or a.dtype)
        b = b.to(dtype or b.dtype)
        norms = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
        return (a * b).sum(-1) / norms.clamp_min(least)
    return [put(dp_layer_skip, "cosine", cosine)]


def calling(how):
    """The table, where a layer is called by how(run_layer, i, g)."""
    def table(h, run_layer, M, near=dp.cosine):
        return dp.table(h, lambda i, g: how(run_layer, i, g), M, near)
    return [put(dp_layer_skip, "table", table)]


DYNAMIC_PROGRAM = {
    "the worse choice wins": recurrence("not run > skip", "(j == i or run > skip)"),
    "ties are run": recurrence("not run > skip", "not run >= skip"),
    "the target is always h[L]": recurrence(", h[i]).item()", ", h[L]).item()"),
    "the target is the layer's input": recurrence(", h[i]).item()", ", h[i - 1]).item()"),
    "cell (i,i) does not know it skipped": recurrence(
        "else after[0]", "else after[0]\n            skipped[i][j] &= j < i"),
    "skipping spends nothing": recurrence("g[i - 1, j - 1]", "g[i - 1, min(j, i - 1)]"),
    "g[i,0] is one layer late": recurrence("g[i, 0] = h[i]", "g[i, 0] = h[i - 1]"),
    "g[i,0] is computed again": recurrence("g[i, 0] = h[i]", "pass"),
    "the losing state is kept": recurrence(
        "j - 1] if skipped[i][j] else", "j - 1] if j == i or 0 < j and not skipped[i][j] else"),
    "the losing cosine is told": recurrence(
        "= skip if skipped[i][j] else run", "= min(run, skip) if 0 < j < i else max(run, skip)"),
    "a row at a time runs what is no number": [
        edit(dp_layer_skip, "table", ("run[1:] > skip[:-1]", "~(run[1:] <= skip[:-1])"))],
    "the way back reads one row early": way_back("self.skipped[i][j]", "self.skipped[i - 1][j]"),
    "the way back names the next layer": way_back("flags[i - 1] = True", "flags[i % L] = True"),
    "the cosine is bfloat16": cosine_in(torch.bfloat16),
    "the cosine is as wide as the states": cosine_in(None),
    "a zero state has no cosine": cosine_in(torch.float64, least=0),
    "a call for every cell": calling(lambda f, i, g: torch.cat([f(i, x[None]) for x in g])),
    "the host waits for every layer": calling(lambda f, i, g: f(i, g) if g.isfinite().all() else g),
    "the stars stand one row early": [
        edit(dp_layer_skip, "show", ("sum(skip[:i])", "sum(skip[:max(0, i - 1)])"))],
    "the printed case is another": [edit(dp_layer_skip, "main", ("(-1,1)", "(1,-1)"))],
}


# ------------------------------------------------------------------------------ sampler and loop

def drawing(cdf, exceeds):
    """Chance.draw by another running sum, or another comparison with it."""
    def draw(self, p):
        total = cdf(p)
        return exceeds(total, self.uniform() * total.amax()).int().argmax()
    return [put(Chance, "draw", draw)]


def accept_and_keep(self, a):
    self.kept = self.uniform()
    return self.kept < a


def kept_uniform(self, right=Chance.uniform):
    return self.__dict__.pop("kept", None) or right(self)


def argmax_draft(*how):
    chance = types.SimpleNamespace(draw=lambda q: int(q.argmax()))
    return sp.draft(*how[:-1], chance)


def dropping(doubtful):
    """`draft`, where a last token that is doubtful(token, q, confidences, s, policy) is dropped."""
    def draft(model, cache, text, most, skip, s, policy, chance):
        drafts = sp.draft(model, cache, text, most, skip, s, policy, chance)
        drafted, q, confidence = drafts
        if drafted and doubtful(drafted[-1], q[-1], confidence, s, policy):
            return [x[:-1] for x in drafts]
        return drafts
    return [put(speculative, "draft", draft)]


def judge_what_is_likely(p, q, drafted, chance):
    k = len(drafted)
    while k > 0 and p[k - 1, drafted[k - 1]] < 0.2:
        k -= 1
    return sp.judge(p[:k + 1], q[:k], drafted[:k], chance)


def verifying(other):
    """`probabilities`, where those of a verify (T, V) are other(p, logits, s)."""
    def probabilities(logits, s):
        p = sp.probabilities(logits, s)
        return other(p, logits, s) if logits.dim() == 2 else p
    return [put(speculative, "probabilities", probabilities)]


def top_k_by_id(logits, s):
    V = logits.shape[-1]
    kept = logits.argsort(dim=-1, descending=True, stable=True)[..., :min(s.top_k or V, V)]
    logits = torch.full_like(logits, -torch.inf).scatter(-1, kept, logits.gather(-1, kept))
    return sp.probabilities(logits, replace(s, top_k=0))


def top_p_first(logits, s):
    p = sp.probabilities(logits, replace(s, temperature=float(s.temperature > 0)))
    p = p ** (1 / (s.temperature or 1))
    return p / p.sum(-1, keepdim=True)


def read_beside_the_drafts(model, tokens, t, cache):
    slots = cache.k[:, :, t:t + len(tokens)]
    was = slots.clone()
    h = sp.read(model, tokens, t, cache)
    if len(tokens) > 1 and t > 0:
        slots.copy_(was)
    return h


def verify_late(by):
    """Verifies begin `by` slots further on after each round."""
    return [edit(speculative, "generate",
                 ("text = list(prompt)", "text = list(prompt)\n    late = 0"),
                 ("cache(end + policy.slots)", "cache(end + policy.slots + 99)"),
                 ("drafted, cached, cache)", "drafted, cached + late, cache)"),
                 ("policy.judged(", f"late += {by}\n        policy.judged("))]


def loop(right, wrong):
    return [edit(speculative, "generate", (right, wrong))]


def normed(self, choose, model, cache, text, h):
    end = ll.rms_norm(h[-1:], model.norm, model.eps)
    return optimise(self, choose, model, cache, text, torch.cat((h[:-1], end)))


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
    "draws at u = the running sum": drawing(
        lambda p: torch.where(p > 0, p.cumsum(0, dtype=torch.float64), 0), torch.ge),
    "the running sum is float32": drawing(lambda p: p.float().cumsum(0), torch.gt),
    "uniforms of 24 bits": [
        put(Chance, "uniform", lambda self: torch.rand((), generator=self.generator).item())],
    "the correction is drawn with the uniform that rejected": [
        put(Chance, "accept", accept_and_keep), put(Chance, "uniform", kept_uniform)],
    "argmax draft scored with a softmax q": [put(speculative, "draft", argmax_draft)],
    "q at temperature 1": [
        edit(speculative, "draft", ("drafted.append(last)",
                                    "drafted.append(last)\n        q[-1] = logits.softmax(-1)"))],
    "p without the filters": verifying(
        lambda p, logits, s: sp.probabilities(logits, replace(s, top_k=0, top_p=1))),
    "bonus from unfiltered logits": verifying(
        lambda p, logits, s: torch.cat((p[:-1], logits[-1:].softmax(-1)))),
    "bonus from the row before": [
        edit(speculative, "judge", ("else p[k]", "else p[max(k - 1, 0)]"))],
    "correction from the row before": [
        edit(speculative, "judge", ("residual(p[accepted], q[accepted])",
                                    "residual(p[max(accepted - 1, 0)], q[max(accepted - 1, 0)])"))],
    "top-k cuts ties by id": [put(speculative, "probabilities", top_k_by_id)],
    "top-p before temperature": [put(speculative, "probabilities", top_p_first)],
    "top-p keeps one more where the mass is reached": [
        put(speculative, "probabilities",
            lambda logits, s: sp.probabilities(logits, replace(s, top_p=min(1, s.top_p + 1e-9))))],
    "doubtful tokens are thrown away": dropping(
        lambda token, q, confidence, s, policy: q[token] < s.exit_threshold),
    "a policy drops what it would not draft on from": dropping(
        lambda token, q, confidence, s, policy: (token not in s.stop_ids
                                                 and not policy.goes_on(confidence))),
    "a policy looks at p before a token is judged": [
        put(speculative, "judge", judge_what_is_likely)],
    "a policy can reach into the text": loop("cache, text[:-1], probe", "cache, text, probe"),
    "drafting goes on behind a stop token": [
        put(speculative, "draft",
            lambda *how: sp.draft(*how[:5], replace(how[5], stop_ids=()), *how[6:]))],
    "drafting ends at the threshold": [
        edit(Paper, "goes_on", (">= self.s.exit_threshold", "> self.s.exit_threshold"))],
    "the drafts' keys stay after a verify": [put(speculative, "read", read_beside_the_drafts)],
    "a rejected draft's slots are not given back": verify_late("k - accepted"),
    "position off by one after full acceptance": verify_late("0 < k == accepted"),
    "token 0 is no token": loop("[*drafted[:accepted], own]",
                                "[*filter(None, [*drafted[:accepted], own])] or [1]"),
    "the text goes on after an accepted stop": loop("emitted = emitted[:stops[0] + 1]",
                                                    "stops = []"),
    "a stop in a draft is told twice": [
        put(report, "fates", lambda r: dict(kept=r.emitted[:r.accepted], own=r.emitted[-1:],
                                            rejected=r.drafted[r.accepted:]))],
    "infinite logits are numbers": loop("not logits.isfinite().all()", "logits.isnan().any()"),
    "only the prompt's logits are looked at": loop("if not logits.", "if n == 0 and not logits."),
    "the prompt's logits are not looked at": loop("if not logits.", "if n > 0 and not logits."),
    "layers are optimised a round late": [
        edit(Paper, "due", ("n % self.s.interval == 0", "n % self.s.interval == 1"))],
    "the probe is the last drafted token": loop("x[accepted] for", "x[-1] for"),
    "the probe is the token before the round": loop("x[accepted] for", "x[0] for"),
    "h[L] comes after the final norm": [put(Paper, "optimise", normed)],
    "the verify's seconds are the draft's too": loop("verifying - drafting,", "verifying - began,"),
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


def sequence(right, wrong):
    return [edit(Cache, "sequence", (right, wrong))]


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


def config_of_4(path):
    c = ll.read_json(path)
    c.pop("rope_parameters", None)
    return c


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
    "decoding one position late": sequence("self.rows(slots, slots,",
                                           "self.rows((slots + (T == 1)) % self.S, slots,"),
    "the mask without + t": sequence("<= slots[:, None]", "<= self.slot[:T, None]"),
    "no causal mask": sequence("<= slots[:, None]", "<= slots[-1] + 0 * slots[:, None]"),
    "LLaMA-3.1's stretching left out": [
        put(llama, "rope_frequencies", lambda c: ll.rope_frequencies(replace(c, scaling=None)))],
    "Transformers 5 not understood": [put(llama, "read_json", config_of_4)],
    "scores divided by the root of D": with_queries(lambda q, c: q * (c.hd / c.D) ** 0.5),
    "query heads dealt to kv heads in turn": with_queries(
        lambda q, c: q.unflatten(1, (-1, c.G)).transpose(1, 2).flatten(1, 2)),
    "a norm without eps": [
        put(llama, "rms_norm", lambda x, weight, eps: ll.rms_norm(x, weight, 0 * eps))],
    "norms in bfloat16": [
        put(llama, "rms_norm", lambda x, weight, eps: ll.rms_norm(x, weight, eps.type(x.dtype)))],
    "rotary tables in bfloat16": [
        edit(Cache, "__init__", ("torch.promote_types(dtype, torch.float32)", "dtype"))],
    "a cache begins uninitialised": [edit(Cache, "__init__", ("torch.zeros(", "torch.empty("))],
    "the layers that run are those to be skipped": [
        edit(Llama, "forward", ("skip and skip[i]", "skip and not skip[i]"))],
    "a skipped layer writes": [
        edit(Llama, "forward", ("h.append(h[i])", "h.append(self.layer(i, h[i], rows, cache))\n"
                                                  "            h[-1] = h[i]"))],
}


# ----------------------------------------------------------------- the probe of several tokens

def nearness(compare):
    """`nearness`, where compare(end, g, target), (r, D), (J, r, D) and (r, D), says how near."""
    def of(end):
        end = end.to(torch.promote_types(end.dtype, torch.float32))
        return lambda g, target: compare(end, g.to(end.dtype).view(-1, *end.shape),
                                         target.to(end.dtype).view(end.shape))
    return [put(probe, "nearness", of)]


def narrow_nearness(end):
    return lambda g, target: dp.cosine(end, end + (g - target).view(-1, *end.shape)).mean(-1)


def several(right, wrong):
    return [edit(probe, "candidates", (right, wrong))]


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
        "(slot == slots[:, None])", "(slot > t) & (slot <= slots[:, None])"),
    "one position for all tokens": several("cache.rows(position,", "cache.rows(0 * position + t,"),
    "a token of a probe is blind to those before it": several(
        "(slot < position[:, None])", "(slot < position.min())"),
    "a token's candidates lie beside one another": several(".repeat(J)", ".repeat_interleave(J)"),
    "a probe longer than the text": [edit(probe, "choose_by", ("r = min(r, len(text))", "pass"))],
}

WRONG = {dp_layer_skip: DYNAMIC_PROGRAM, speculative: SAMPLER_AND_LOOP, llama: LLAMA, probe: PROBE}
NAMED = {name: changes for table in WRONG.values() for name, changes in table.items()}
