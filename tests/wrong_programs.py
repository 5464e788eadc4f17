"""Deliberately wrong programs, as errors are really written, some of them met in real
repositories. Tests, and the checker of traces, are held against them.

    @rejects("residual = p", "lenient acceptance")
    def test_...                         # holds; and fails while the sampler is one of these

    with running("residual = p"):
        ...                              # here it is that one, for everyone

A wrong program is one change. `put` has a function in the place of another, whatever that one's
body is by now. Where a line inside of one is wrong its text is changed (`edit`). A change whose
place is gone raises AttributeError or LookupError, which nobody takes for a rejection.
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


def edited(text, edits):
    """`text` with every (right, wrong); a space in `right` stands for any white space."""
    for right, wrong in edits:
        pattern = r"\s+".join(map(re.escape, right.split(" ")))
        text, n = re.subn(pattern, lambda _: wrong, text)
        if n == 0:
            raise LookupError(f"gone: {right}")
    return text


def put(owner, name, wrong):
    """A change: `wrong` in the place of a class's function, or of a module's and wherever that was
    imported."""
    def change(patch):
        right = getattr(owner, name)
        patch.setattr(owner, name, wrong)
        for module in [] if inspect.isclass(owner) else list(sys.modules.values()):
            if getattr(module, "__dict__", {}).get(name) is right:
                patch.setattr(module, name, wrong)
    return change


def edit(owner, name, *edits, into=()):
    """A change: a function with edits of its text, in its own place and `into` others."""
    def change(patch):
        right = inspect.unwrap(getattr(owner, name))
        text = edited(textwrap.dedent(inspect.getsource(right)), edits)
        out = {}
        exec(compile(text, f"wrong_{name}", "exec"), right.__globals__, out)
        for place in (name, *into):
            put(owner, place, out[name])(patch)
    return change


@contextlib.contextmanager
def running(*wrong):
    """While it lasts the program has these changes, or those of the table by these names."""
    with pytest.MonkeyPatch.context() as patch:
        for one in wrong:
            change = one if callable(one) else NAMED[one]
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
accept = Chance.accept
optimise = Paper.optimise


# --------------------------------------------------------------------------- the dynamic program

def recurrence(right, wrong):
    """An error of the cell at a time, in the place of the row at a time too: so that their being
    equal is no defence."""
    return edit(dp_layer_skip, "choose_skip_plain", (right, wrong), into=["choose_skip"])


def calling(how):
    """The table, where a layer is called by how(run_layer, i, g)."""
    def table(h, run_layer, M, near=dp.cosine):
        return dp.table(h, lambda i, g: how(run_layer, i, g), M, near)
    return put(dp_layer_skip, "table", table)


DYNAMIC_PROGRAM = {
    "the worse choice wins": recurrence(
        "j == 0 or near_run > near_skip", "j == 0 or j < i and not near_run > near_skip"),
    "ties are run": recurrence("near_run > near_skip", "near_run >= near_skip"),
    "the target is always h[L]": recurrence(", h[i]).item()", ", h[L]).item()"),
    "cell (i,i) does not know it skipped": recurrence(
        "else g[i - 1, j - 1]", "else g[i - 1, j - 1]\n            skipped[i][j] &= j < i"),
    "skipping spends nothing": recurrence("g[i - 1, j - 1]", "g[i - 1, min(j, i - 1)]"),
    "g[i,0] is computed again": recurrence("g[i, 0] = h[i]", "pass"),
    "the losing state is kept": recurrence(
        "after[0] if run_wins else", "after[0] if run_wins != (0 < j < i) else"),
    "a row at a time runs what is no number": edit(
        dp_layer_skip, "table", ("near_run > near_skip", "~(near_run <= near_skip)")),
    "the way back reads one row early": edit(
        dp_layer_skip.Choice, "skip", ("self.skipped[i][j]", "self.skipped[i - 1][j]")),
    "the cosine is as wide as the states": edit(
        dp_layer_skip, "cosine", ("torch.promote_types(a.dtype, torch.float32)", "a.dtype")),
    "a zero state has no cosine": edit(
        dp_layer_skip, "cosine", (".clamp_min(torch.finfo(wide).tiny)", "")),
    "a call for every cell": calling(lambda f, i, g: torch.cat([f(i, x[None]) for x in g])),
    "the host waits for every layer": calling(lambda f, i, g: f(i, g) if g.isfinite().all() else g),
    "the stars stand one row early": edit(
        dp_layer_skip, "show", ("sum(skip[:i])", "sum(skip[:max(0, i - 1)])")),
    "the printed case is another": edit(dp_layer_skip, "main", ("(-1,1)", "(1,-1)")),
}


# ------------------------------------------------------------------------------ sampler and loop

loop = functools.partial(edit, speculative, "generate")
drafting = functools.partial(edit, speculative, "draft")


def used_again(self, a):
    state = self.generator.get_state()
    accepted = accept(self, a)
    if accepted < len(a):
        self.generator.set_state(state)
    return accepted


def normed(self, choose, model, cache, text, h):
    end = ll.rms_norm(h[-1:], model.norm, model.eps)
    return optimise(self, choose, model, cache, text, torch.cat((h[:-1], end)))


SAMPLER_AND_LOOP = {
    "residual = p": put(speculative, "residual", lambda p, q: p),
    "residual through a softmax": put(speculative, "residual", lambda p, q: (p - q).softmax(-1)),
    "a residual of no mass is no number": edit(
        speculative, "residual", ("torch.where(mass > 0, owed / mass, p)", "owed / mass")),
    "lenient acceptance": put(
        speculative, "acceptance", lambda p, q: (1.3 * p.double() / q).clamp(max=1)),
    "accepts at u = a": edit(Chance, "accept", ("kept = u <", "kept = u <=")),
    "draws at u = the running sum": edit(Chance, "draw", ("cdf > ", "cdf >= ")),
    "the running sum is float32": edit(Chance, "draw", ("torch.float64", "torch.float32")),
    "uniforms of 24 bits": put(
        Chance, "uniform", lambda self: torch.rand((), generator=self.generator).item()),
    "a token after a rejected one is kept": edit(Chance, "accept", (".cumprod(0)", "")),
    "the correction is drawn with the number that rejected": put(Chance, "accept", used_again),
    "argmax draft scored with a softmax q": drafting(
        ("chance.draw(q[-1])", "q[-1].argmax(0, True)")),
    "q at temperature 1": drafting(
        ("q.append(probabilities(logits, s))", "q.append(logits.softmax(-1))"),
        ("chance.draw(q[-1])", "chance.draw(probabilities(logits, s))")),
    "p without the filters": loop(
        ("probabilities(logits, s)", "probabilities(logits, Settings(temperature=s.temperature))")),
    "bonus from unfiltered logits": loop(
        ("p = probabilities(logits, s)",
         "p = probabilities(logits, s)\n        p[-1] = logits[-1].softmax(-1)")),
    "bonus from the row before": edit(speculative, "judge", (
        "residual(p[accepted]", "residual(p[accepted - (accepted == len(q)).int()]")),
    "top-k cuts ties by id": edit(
        speculative, "probabilities", ("values[..., -1:]", "indices"),
        ("logits.masked_fill(logits < kth, -torch.inf)",
         "torch.full_like(logits, -torch.inf).scatter(-1, kth, logits.gather(-1, kth))")),
    "top-p before temperature": edit(
        speculative, "probabilities", (" / s.temperature).softmax(-1)", ").softmax(-1)"), (
            "return p", "p = p ** (1 / s.temperature)\n    return p / p.sum(-1, keepdim=True)")),
    "top-p keeps one more where the mass is reached": edit(
        speculative, "probabilities", ("before >= s.top_p", "before > s.top_p")),
    "doubtful tokens are thrown away": drafting((
        "drafted.append(int(token))",
        "if q[-1][int(token)] < s.exit_threshold:\n            q.pop()\n            break\n"
        "        drafted.append(int(token))")),
    "a policy can reach into the text": loop(("text[:cached], probe", "text, probe")),
    "drafting goes on after a stop token": drafting(("drafted[-1] in s.stop_ids", "False")),
    "drafting ends at the threshold": edit(Paper, "goes_on", (">= self.s", "> self.s")),
    "the drafts' keys stay after a verify": loop(
        ("h = read(model, text[cached:] + drafted, cached, cache)",
         "was = cache.k[:, :, cached:].clone()\n"
         "        h = read(model, text[cached:] + drafted, cached, cache)\n"
         "        if k > 0:\n            cache.k[:, :, cached:] = was")),
    "position off by one after full acceptance": loop(
        ("text = list(prompt)", "text = list(prompt)\n    late = 0"),
        ("cache(end + policy.slots)", "cache(end + policy.slots + 99)"),
        ("drafted, cached, cache)", "drafted, cached + late, cache)"),
        ("policy.judged(", "late += 0 < k == accepted\n        policy.judged(")),
    "token 0 is no token": loop((", own]", ", own or 1]")),
    "the text goes on after an accepted stop": loop(("emitted.pop()", "pass")),
    "a stop in a draft is told twice": edit(
        report, "fates", ("own=r.emitted[r.accepted:]", "own=r.emitted[-1:]")),
    "infinite logits are numbers": loop(("logits.isfinite()", "~logits.isnan()")),
    "only the prompt's logits are looked at": loop(("if not ok", "if n == 0 and not ok")),
    "layers are optimised a round late": edit(Paper, "due", ("== 0 and", "== 1 and")),
    "the probe is the last drafted token": loop(("x[accepted] for", "x[-1] for")),
    "the probe is the token before the round": loop(("x[accepted] for", "x[0] for")),
    "h[L] comes after the final norm": put(Paper, "optimise", normed),
    "the verify's seconds are the draft's too": loop(
        ("verifying - drafting,", "verifying - began,")),
}


# ----------------------------------------------------------------------------------------- LLaMA

def interleaved(x, rows):
    halves = ll.rotate(torch.cat((x[..., 0::2], x[..., 1::2]), -1), rows)
    return torch.stack(halves.chunk(2, -1), -1).flatten(-2)


candidates = functools.partial(edit, Cache, "candidates")
LLAMA = {
    "candidates see one another": candidates(
        ("window == slots[:, None]", "window > 0 * slots[:, None] + t")),
    "one position too far": candidates(("full_like(slots, t)", "full_like(slots, t + 1)")),
    "the token's own entry is seen": candidates(("window < t", "window <= t")),
    "scratch begins at the probe": candidates(("window[t + 1:]", "window[t:-1]")),
    "the interleaved rotary layout": put(llama, "rotate", interleaved),
    "decoding one position late": edit(
        Cache, "sequence", ("rows(slots, slots,", "rows((slots + (T == 1)) % self.S, slots,")),
    "the mask without + t": edit(Cache, "sequence", ("<= slots[:", "<= self.all_slots[:T][:")),
    "LLaMA-3.1's stretching left out": put(
        llama, "rope_frequencies", lambda c: ll.rope_frequencies(replace(c, scaling=None))),
    "Transformers 5 not understood": put(
        llama, "read_config", lambda folder: replace(
            ll.read_config(folder), theta=1e4, scaling=None)),
    "query heads dealt to kv heads in turn": edit(
        llama, "attention",
        ("T, cfg.G, R, cfg.hd).transpose(0, 1)", "T, R, cfg.G, cfg.hd).permute(2, 0, 1, 3)"),
        ("cfg.G, T, R, cfg.hd).transpose(0, 1)", "cfg.G, T, R, cfg.hd).permute(1, 2, 0, 3)")),
    "a norm without eps": put(
        llama, "rms_norm", lambda x, weight, eps: ll.rms_norm(x, weight, 0 * eps)),
    "norms in bfloat16": put(
        llama, "rms_norm", lambda x, weight, eps: ll.rms_norm(x, weight, eps.type(x.dtype))),
    "rotary tables in bfloat16": edit(
        Cache, "__init__", ("torch.promote_types(dtype, torch.float32)", "dtype")),
    "a cache begins uninitialised": edit(Cache, "__init__", ("torch.zeros(", "torch.empty(")),
    "the layers that run are those to be skipped": edit(
        Llama, "forward", ("skip and skip[i]", "skip and not skip[i]")),
    "a skipped layer writes": edit(
        Llama, "forward", ("append(h[i])", "append(h[i] + 0 * self.layer(i, h[i], rows, cache))")),
}


# ----------------------------------------------------------------- the probe of several tokens

PROBE = {
    "several tokens are held against h[i]": edit(
        probe, "nearness", ("end, end + error.view(-1, *end.shape)",
                            "g.view(-1, *end.shape), target.view(end.shape)")),
    "errors ride along in the states' dtype": edit(
        probe, "nearness", ("torch.promote_types(end.dtype, torch.float32)", "end.dtype")),
    "one token is compared as several are": edit(probe, "choose_by", ("if r > 1:", "if True:")),
    "candidates of a token see those of another": edit(
        probe, "places", ("(slot == slots[:, None])", "(slot > t) & (slot <= slots[:, None])")),
    "one position for all tokens": edit(
        probe, "places", ("return position,", "return 0 * position + t,")),
    "a token of a probe is blind to those before it": edit(
        probe, "places", ("(slot < position[:, None])", "(slot < position.min())")),
    "a probe longer than the text": edit(probe, "choose_by", ("r = min(r, len(text))", "pass")),
}

WRONG = {dp_layer_skip: DYNAMIC_PROGRAM, speculative: SAMPLER_AND_LOOP, llama: LLAMA, probe: PROBE}
NAMED = {name: change for table in WRONG.values() for name, change in table.items()}
