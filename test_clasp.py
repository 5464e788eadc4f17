"""The specification. A test's name is a sentence about the program; its docstring names the wrong
programs it refuses.

In the order of the files: the dynamic program, the sampler and its loop, LLaMA with its loader and
tokenizer, the command, the oracle. Tests prefer an identity to an experiment, and tables of
deliberately wrong programs (`BROKEN_DP`, `WRONG_SAMPLERS`, ...) show that the tests can fail: each
is the source text with an edit, and some test must object.

    CLASP_LLAMA3=DIR      a folder with Meta's tokenizer.model, released config.json files and
                          published token vectors; two tests need it and skip without, since those
                          files cannot be shipped here
    CLASP_EXHAUSTIVE=1    the exact-distribution test over all combinations instead of a covering
                          set of them
    CLASP_8B=DIR          on a GPU: the recorded passes of a full-size model, such as
                          `python test_clasp.py DIR 0.1` writes (-k 8b)
"""
import base64
import cmath
import collections
import contextlib
import functools
import gc
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import regex  # comes with tiktoken

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")      # nothing here needs it
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import clasp_mini  # noqa: E402
import dp_layer_skip  # noqa: E402
import llama  # noqa: E402
import speculative  # noqa: E402
from dp_layer_skip import choose_skip  # noqa: E402
from oracle import check_trace, make_vectors, trace  # noqa: E402
from oracle.trace import save  # noqa: E402
from speculative import (Chance, Recording, Settings, acceptance, every_outcome,  # noqa: E402
                         generate, inverse_cdf, judge, probabilities, residual)

torch.set_num_threads(1)
ROOT = Path(llama.__file__).resolve().parent
DEMO = ROOT / "demo"


def altered(module, *edits):
    """`module` as it would be with each (right, wrong) edit of its text: a wrong program, as one is
    really written."""
    text = inspect.getsource(module)
    for right, wrong in edits:
        pattern = r"\s+".join(map(re.escape, right.split(" ")))            # also across line breaks
        text, n = re.subn(pattern, lambda _: wrong, text)
        assert n, f"{module.__name__} has changed, and the table of wrong programs not: {right!r}"
    out = types.ModuleType(module.__name__)
    exec(compile(text, f"wrong_{module.__name__}", "exec"), out.__dict__)
    return out


# ============================================================================== dp_layer_skip.py
# Its tests take the modules they judge as arguments with defaults: pytest calls them on the right
# program, and test_every_broken_dynamic_program_is_refused calls them on the wrong ones.

def additive_net(L: int, width: int, seed: int, idle: tuple[int, ...] = ()) -> tuple:
    """(h, run_layer) of a net without attention, pushing harder than toy; idle layers add 0."""
    gen = torch.Generator().manual_seed(seed)
    A = torch.randn(L, width, width, generator=gen, dtype=torch.float64) / width ** 0.5
    push = 0.3 + torch.rand(L, generator=gen, dtype=torch.float64)
    push[list(idle)] = 0

    def run_layer(i: int, x: Tensor) -> Tensor:
        return x + push[i] * torch.tanh(x @ A[i].T)

    h = [torch.randn(1, width, generator=gen, dtype=torch.float64)]
    for i in range(L):
        h.append(run_layer(i, h[-1]))
    return torch.cat(h), run_layer


def llama_probe(ll: types.ModuleType, seed: int, spare: int) -> tuple:
    """A random float64 LLaMA that has read 7 tokens: model, ids, the last one's position, its
    h (L+1, D), its h[L] as the pass returned it, and the cache with `spare` slots behind it."""
    L, D, H, G, hd, ffn, V = 5, 8, 4, 2, 4, 12, 11
    gen = torch.Generator().manual_seed(seed)

    def r(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    layers = [ll.Layer(1 + r(D) / 2, r(D, (H + 2 * G) * hd), r(H * hd, D) / 4,
                       1 + r(D) / 2, r(D, 2 * ffn) / 2, r(ffn, D) / 4) for _ in range(L)]
    cfg = ll.Config(L, D, H, G, hd, ffn, V, 1e-5, 64, False, 50.0, None)
    model = ll.Llama(cfg, r(V, D), layers, 1 + r(D), r(V, D))
    ids, cache = torch.randint(V, (7,), generator=gen), model.cache(7 + spare)
    x, h = model.forward(ids, cache.sequence(0, 7), cache, states=slice(-1, None))
    return model, ids, 6, h[:, 0], x[-1], cache


def choose_on_llama(dp: types.ModuleType, model, t: int, h: Tensor, cache, M: int):
    """The call that speculative.generate makes."""
    rows = cache.versions(t, M)
    return dp.choose_skip(h, lambda i, x: model.layer(i, x, rows, cache), M)


def cos(a: Tensor, b: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a, b, dim=-1, eps=0.0).item()


def flags(L: int, chosen: tuple[int, ...]) -> tuple[bool, ...]:
    return tuple(i in chosen for i in range(L))


def assert_same_choice(a, b, tolerance: float) -> None:
    D, E = (torch.tensor(c.D, dtype=torch.float64) for c in (a, b))
    torch.testing.assert_close(D, E, rtol=0, atol=tolerance, equal_nan=True)
    assert a.parents == b.parents
    assert [a.skip(j) for j in range(len(D[0]))] == [b.skip(j) for j in range(len(D[0]))]


def test_a_case_worked_by_hand(dp=dp_layer_skip):
    """Refuses whatever departs from eq. 2 in either version, another target for one."""
    # The layers add (0,3), (-1,1), (1,-4) to whatever they are given; two are to be left out.
    #   D[1,1]  skip: (4,0) against h[1] = (4,3) is 16/20
    #   D[2,1]  run:  (4,0)+(-1,1) = (3,1) against h[2] = (3,4) is 13/(5 sqrt 10) = 0.82
    #           skip: (4,3) is 24/25, which wins
    #   D[2,2]  skip: (4,0) is 12/20
    #   D[3,1]  run:  (4,3)+(1,-4) = (5,-1) against h[3] = (4,0) is 5/sqrt 26 = 0.98, which wins
    #           skip: (3,4) is 12/20
    #   D[3,2]  run:  (4,0)+(1,-4) = (5,-4) is 5/sqrt 41 = 0.78;   skip: (4,3) is 16/20, which wins
    # Back from D[3,2]: skip 2, skip 1, run 0. The best would be to skip 0 and 2, for (3,1) has 0.95
    # in the end; but it lost to (4,3) at depth 2. The method is an approximation: here it shows.
    add = torch.tensor([(0, 3), (-1, 1), (1, -4)], dtype=torch.float64)
    h = torch.tensor([(4, 0), (4, 3), (3, 4), (4, 0)], dtype=torch.float64)
    nan = float("nan")
    D = [[1, nan, nan], [1, 0.8, nan], [1, 0.96, 0.6], [1, 5 / math.sqrt(26), 0.8]]
    parents = [[False] * 3, [False, True, False], [False, True, True], [False, False, True]]
    for choose in (dp.choose_skip, dp.choose_skip_plain):
        choice = choose(h, lambda i, x: x + add[i], 2)
        assert_same_choice(choice, dp_layer_skip.Choice(D, parents), 1e-14)
        assert choice.skip(1) == flags(3, (1,)) and choice.skip() == flags(3, (1, 2))
        assert choice.cosine == choice.D[3]
    best = dp.run_set(h, lambda i, x: x + add[i], flags(3, (0, 2)))
    assert best == pytest.approx(3 / math.sqrt(10), abs=1e-14)


def test_on_a_tie_the_layer_is_run(dp=dp_layer_skip):
    """Refuses >= for > and any rule by state: (0,2), run, and (1,0), skipped, both lie 45 degrees
    off h[2] = (1,1), to the last bit."""
    add = torch.tensor([(1, -1), (0, 1)], dtype=torch.float64)
    h = torch.tensor([(0, 1), (1, 0), (1, 1)], dtype=torch.float64)
    for choose in (dp.choose_skip, dp.choose_skip_plain):
        assert choose(h, lambda i, x: x + add[i], 1).skip() == (True, False), choose.__name__


def test_bfloat16_states_are_compared_in_float32_or_wider(dp=dp_layer_skip):
    """Refuses a cosine in the states' own dtype, whose 8 bits let 0.999 tie with 1."""
    a, b = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    b = a + b / 16
    want = [cos(u.double(), v.double()) for u, v in zip(a, b)]
    assert dp.cosine(a, b).tolist() == pytest.approx(want, abs=1e-6)


def test_planted_idle_layers_are_exactly_the_ones_skipped(dp=dp_layer_skip):
    """Refuses a wrong choice and a misread way back: scattered layers that add nothing, the ends
    included, are the answer, and part of the answer to every smaller budget."""
    draw = random.Random(0)
    for seed in range(40):
        L = draw.randrange(2, 10)
        idle = tuple(draw.sample(range(L), draw.randrange(1, L + 1)))
        choice = dp.choose_skip(*additive_net(L, 6, seed, idle), len(idle))
        assert choice.skip() == flags(L, idle), (seed, idle, choice.skip())
        for j in range(len(idle) + 1):
            chosen = {i for i, s in enumerate(choice.skip(j)) if s}
            assert chosen <= set(idle) and len(chosen) == j, (seed, idle, j, chosen)
            assert choice.cosine[j] == pytest.approx(1, abs=1e-12)


def test_every_cell_is_the_better_of_its_two_choices(dp=dp_layer_skip):
    """Refuses tables that do not say what their sets do: the oracle, which shares no line with the
    program, really runs the way back from each cell and compares what eq. 2 compares."""
    for seed, (L, M) in enumerate([(1, 1), (2, 2), (5, 5), (6, 1), (7, 3), (8, 5)] * 2):
        h, run_layer = additive_net(L, 6, seed)
        choice = dp.choose_skip(h, run_layer, M)

        def chain(i: int, j: int) -> Tensor:                                 # g[i,j]
            if i == 0:
                assert j == 0, "the way back has not spent every skip"
                return h[:1]
            skipped = choice.parents[i][j]
            x = chain(i - 1, j - skipped)
            return x if skipped else run_layer(i - 1, x)

        for i in range(1, L + 1):
            for j in range(1, min(i, M) + 1):
                skip = cos(h[i], chain(i - 1, j - 1))
                run = cos(h[i], run_layer(i - 1, chain(i - 1, j))) if j < i else -2.0
                assert choice.D[i][j] == pytest.approx(max(run, skip), abs=1e-12), (seed, i, j)
                assert choice.parents[i][j] == (skip > run), (seed, i, j)
        for j in range(M + 1):
            real = dp.run_set(h, run_layer, choice.skip(j))
            assert choice.cosine[j] == pytest.approx(real, abs=1e-12), (seed, j)


def test_the_best_of_all_sets_is_near_and_never_beaten(dp=dp_layer_skip):
    """Refuses cosines that no set has and choices hardly better than chance: against the best of
    all sets the chosen ones lose 0.023 on average, any set 0.18; asserted is a quarter."""
    lost = drawn = 0.0
    for seed in range(30):
        L, M = 8, 1 + seed % 5
        h, run_layer = additive_net(L, 8, seed)
        choice = dp.choose_skip(h, run_layer, M)
        every = [dp.run_set(h, run_layer, flags(L, s)) for s in itertools.combinations(range(L), M)]
        assert choice.cosine[M] <= max(every) + 1e-12, seed
        lost += max(every) - dp.run_set(h, run_layer, choice.skip())
        drawn += max(every) - sum(every) / len(every)
    assert lost < drawn / 4, (lost / 30, drawn / 30)


def test_a_row_at_a_time_is_the_same_as_a_cell_at_a_time(dp=dp_layer_skip):
    """Refuses any slip in the row-parallel version that the readable one does not share, and
    budgets that cannot be spent."""
    for L, budgets in ((1, (0, 1)), (2, (0, 1, 2)), (5, (0, 1, 3, 5)), (8, (2, 7)), (11, (4,))):
        for M, seed in ((M, seed) for M in budgets for seed in range(3)):
            for h, f in (additive_net(L, 6, seed), dp.toy(L, 6, seed)):
                assert_same_choice(dp.choose_skip(h, f, M), dp.choose_skip_plain(h, f, M), 1e-12)
    for M in (-1, 12):
        with pytest.raises(AssertionError):
            dp.choose_skip(h, f, M)


def test_each_layer_is_called_once_and_the_host_reads_only_at_the_end(dp=dp_layer_skip):
    """Refuses a call per cell, more than M rows, and a read per layer, which on a GPU is a wait per
    layer: meta tensors hold no numbers, so all reads but the tolist below raise."""
    for L, M in ((4, 0), (4, 2), (9, 4), (5, 5)):
        events, table = [], [[0.0] * M] * L
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "tolist", lambda _: events.append("read") or table)
            try:
                dp.choose_skip(torch.zeros(L + 1, 8, device="meta"),
                               lambda i, x: events.append((i, *x.shape)) or x + 1, M)
            except (RuntimeError, NotImplementedError) as e:
                raise AssertionError(f"after {events[-1:]} a tensor was read: {e}") from e
        # Never layer 0: its output is h[1]. At the end two reads, of D and of the parents.
        assert events == [(i, min(i, M), 8) for i in range(1, L) if M] + ["read"] * 2


def test_on_a_llama_candidates_are_as_if_each_were_alone(dp=dp_layer_skip, ll=llama):
    """Refuses candidates that see one another or the probe's own entry, or sit a position too far:
    the reference runs each as an ordinary next token, on a cache that holds the past only."""
    for seed, M in enumerate((1, 2, 3, 5, 3)):
        model, ids, t, h, _, cache = llama_probe(ll, seed, spare=M)
        past = model.cache(t + 1)
        model.forward(ids[:t], past.sequence(0, t), past)
        row = past.sequence(t, 1)
        alone = dp.choose_skip_plain(h, lambda i, x: model.layer(i, x, row, past), M)
        assert_same_choice(choose_on_llama(dp, model, t, h, cache, M), alone, 1e-10)


def test_the_draft_at_the_probe_has_the_cosine_that_the_table_says(dp=dp_layer_skip, ll=llama):
    """Refuses a target after the final norm and a table about another draft than will run: the
    draft reads the probe's token again, skips the set, and is as near h[L] as D[L,j] says."""
    for seed in range(4):
        model, ids, t, h, full, cache = llama_probe(ll, seed, spare=3)
        choice = choose_on_llama(dp, model, t, h, cache, 3)
        for j in range(4):
            x, _ = model.forward(ids[t:], cache.sequence(t, 1), cache, choice.skip(j))
            assert cos(full, x[0]) == pytest.approx(choice.cosine[j], abs=1e-10), (seed, j)


def test_slot_t_and_what_lies_behind_it_is_not_read_and_slot_t_is_kept(dp=dp_layer_skip, ll=llama):
    """Refuses a mask that lets in the probe's entry or another's scratch slot, seen by garbage in
    them changing a bit of the table, and scratch written over the text or past its slots."""
    for seed, M in enumerate((1, 3, 4)):
        model, _, t, h, _, cache = llama_probe(ll, seed, spare=M + 2)
        clean, gen = choose_on_llama(dp, model, t, h, cache, M), torch.Generator().manual_seed(seed)
        for kv in (cache.k, cache.v):
            kv[:, :, t:] = 1e3 * torch.randn(kv[:, :, t:].shape, generator=gen, dtype=kv.dtype)
        before = cache.k.clone(), cache.v.clone()
        assert repr(choose_on_llama(dp, model, t, h, cache, M)) == repr(clean)
        for kv, old in zip((cache.k, cache.v), before):
            scratch = (kv != old).any(-1).any(0).any(0).nonzero()[:, 0].tolist()
            assert scratch == list(range(t + 1, t + 1 + M)), scratch


# Wrong ideas go into both versions, so that their being equal is no defence.
BROKEN_DP = {
    "the worse choice wins": [("cos[:J] > cos_ran", "cos[:J] < cos_ran"), ("max(choi", "min(choi")],
    "the target is always h[L]": [("cosine(h[i], ", "cosine(h[L], ")],
    "the target is the layer's input": [("cosine(h[i], ", "cosine(h[i - 1], ")],
    "the way back reads one row early": [("if self.parents[i][j]:", "if self.parents[i - 1][j]:")],
    "the way back names the next layer": [("out[i - 1] = True", "out[i % L] = True")],
    "ties are skipped": [("cos[:J] > cos", "cos[:J] >= cos"), ("max(choices", "max(choices[::-1]")],
    "cell (i,i) does not know it skipped": [
        ("ones_like(cos, dtype", "zeros_like(cos, dtype"), ("append((True, g", "append((j < i, g")],
    "skipping spends nothing": [
        ("state = g[:last]", "state = torch.cat((g[1:], g[-1:]))[:last]"),
        ("g[i - 1, j - 1])", "g[i - 1, min(j, i - 1)])")],
    "g[i,0] is one layer late": [
        ("torch.cat((h[i:i + 1]", "torch.cat((h[i - 1:i]"), ("= 1.0, h[i] ", "= 1.0, h[i - 1] ")],
    "the losing state is kept": [("state[:J], ran)", "ran, state[:J])")],
    "the losing cosine is told": [("wins, cos[:J], cos_ran)", "wins, cos_ran, cos[:J])")],
    "the cosine is bfloat16": [("torch.promote_types(a.dtype, torch.float32)", "torch.bfloat16")],
    "the cosine is as wide as the states": [
        ("promote_types(a.dtype, torch.float32)", "promote_types(a.dtype, b.dtype)")],
    "a full model's row is run along": [("(i - 1, g[1:J + 1])", "(i - 1, g[:J + 1])[1:]")],
    "the host waits for every layer": [("if J:", "if J and cos.isfinite().all():")],
}
BROKEN_LLAMA = {
    "siblings see one another": [
        ("(every == slots[:, None])", "(every > t) & (slots[:, None] > 0)")],
    "one position too far": [("expand(J) + t", "expand(J) + t + 1")],
    "each sibling has its own position": [
        ("self.slot[:1].expand(J) + t", "self.slot[:J] + t")],
    "the probe's own entry is seen": [("(every < t) |", "(every <= t) |")],
    "the token before it is not seen": [("(every < t) |", "(every < t - 1) |")],
    "scratch begins at the probe": [("self.slot[1:J + 1] + t", "self.slot[:J] + t")],
    "h[L] comes after the final norm": [
        ("h.append(x)",
         "h.append(rms_norm(x, self.norm, self.eps) if i == self.cfg.L - 1 else x)")],
}


@pytest.mark.parametrize("wrong", [*BROKEN_DP, *BROKEN_LLAMA])
def test_every_broken_dynamic_program_is_refused(wrong):
    """Refuses tests that are too kind: each of these runs to its end, and a test must object."""
    name, module = ("dp", dp_layer_skip) if wrong in BROKEN_DP else ("ll", llama)
    broken = altered(module, *(BROKEN_DP | BROKEN_LLAMA)[wrong])
    for test in [f for n, f in globals().items() if n.startswith("test_")]:
        parameter = inspect.signature(test).parameters.get(name)
        if parameter and parameter.default is module:
            try:
                test(**{name: broken})
            except AssertionError:
                return
    raise AssertionError(f"nobody objects: {wrong}")


def test_the_demonstration_runs_alone_and_what_it_prints_is_so():
    """Refuses a crash, colours in a pipe, and words that its own figures do not bear out."""
    run = subprocess.run([sys.executable, dp_layer_skip.__file__], capture_output=True, text=True,
                         timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert (run.returncode, run.stderr) == (0, ""), run.stderr
    assert "1, 4 and 7 do little" in run.stdout and "Left out: [1, 4, 7]" in run.stdout
    rows = re.findall(r"^ +\d +12 +5 +(.+?) +(.+?) +(.+?) +(\d+) of 792$", run.stdout, re.M)
    assert len(rows) == 6 and "\033" not in run.stdout
    for real, best, mean, rank in rows:
        assert float(mean) < float(real) <= float(best) and (rank != "1" or real == best), rows


@pytest.mark.parametrize("tty, no_color", [(True, None), (True, "1"), (False, None)])
def test_colour_is_for_terminals_and_never_with_NO_COLOR(monkeypatch, capsys, tty, no_color):
    """Refuses escape codes where none are wanted, and a strip whose text they change."""
    monkeypatch.setattr(dp_layer_skip, "run_set", lambda *_: 0.5)        # 4752 sets: slow
    monkeypatch.setattr(sys.stdout, "isatty", lambda: tty)
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", no_color)
    dp_layer_skip.main()
    out = capsys.readouterr().out
    assert ("\033" in out) == (tty and not no_color)
    h, run_layer = dp_layer_skip.toy(9, 16, seed=3)
    table = dp_layer_skip.show(dp_layer_skip.choose_skip(h, run_layer, 3), colour=False)
    assert table in re.sub(r"\033\[[\d;]*m", "", out)


# ============================================================================== speculative.py
# The heart: on a tiny LLaMA every branch that chance can take is run, and the probability of every
# text is exact.

def tiny_llama(V=3, L=3, seed=0, dtype=torch.float64, D=8, H=2, G=1, hd=4, ffn=8):
    """Random weights, large enough that every layer matters and q is far from p."""
    gen = torch.Generator().manual_seed(seed)

    def new(*shape, scale=1.0):
        return (torch.randn(shape, generator=gen, dtype=torch.float64) * scale).to(dtype)

    cfg = llama.Config(L, D, H, G, hd, ffn, V, 1e-5, 256, False, 100.0, None)
    one = torch.ones(D, dtype=dtype)
    layers = [llama.Layer(one, new(D, (H + 2 * G) * hd, scale=D ** -0.5), new(H * hd, D, scale=0.5),
                          one, new(D, 2 * ffn, scale=D ** -0.5), new(ffn, D, scale=0.5))
              for _ in range(L)]
    return llama.Llama(cfg, new(V, D), layers, one, new(V, D, scale=0.5))


def full_model(model, text):
    """Logits after `text`, by one fresh pass of the full model: what decoders are held against."""
    cache = model.cache(len(text))
    x, _ = model.forward(torch.tensor(text, device=model.device),
                         cache.sequence(0, len(text)), cache)
    return model.head(x[-1])


def decode(model, prompt, s, chance=0, loop=generate):
    """The rounds of a whole run with the real dynamic program; `chance` may be a seed."""
    chance = Chance(chance) if isinstance(chance, int) else chance
    return list(loop(model, list(prompt), s, chance, choose_skip))


def tokens(rounds):
    return [t for r in rounds for t in r.emitted]


def target_distribution(model, prompt, s):
    """text -> probability: the product of the full model's conditionals, token by token."""
    out = {}

    def extend(new, weight):
        if len(new) == s.N or new[-1:] and new[-1] in s.stop_ids:
            out[tuple(new)] = weight
            return
        p = probabilities(full_model(model, [*prompt, *new]), s)
        for token, w in enumerate(p.tolist()):
            if w > 0:
                extend([*new, token], weight * w)

    extend([], 1.0)
    return out


def distance(model, s, loop=generate, prompt=(0, 1)):
    """The largest difference in probability of any text between the loop (real cache, real DP, down
    every branch of chance) and the product of conditionals."""
    want, got = target_distribution(model, prompt, s), collections.defaultdict(float)
    for text, weight in every_outcome(lambda c: tuple(tokens(decode(model, prompt, s, c, loop)))):
        got[text] += weight
    return max(abs(want.get(t, 0.0) - got.get(t, 0.0)) for t in want | got)


SAMPLERS = [dict(temperature=1.0), dict(temperature=0.7, top_k=2), dict(temperature=1.3, top_p=0.8),
            dict(temperature=0.8, top_k=2, top_p=0.7), dict(temperature=0.0)]
DRAFTS = list(itertools.product((1, 2, 3), (0, 1, 2, 3), (1, 2), (0.0, 0.5, 1.0)))
STOPS = [(), (2,)]


def combinations():
    """Every draft setting (K, M, interval, exit threshold), each with one of the ten samplers and
    stops in turn; with CLASP_EXHAUSTIVE=1 each with all."""
    if os.environ.get("CLASP_EXHAUSTIVE"):
        return list(itertools.product(DRAFTS, SAMPLERS, STOPS))
    pairs = list(itertools.product(SAMPLERS, STOPS))
    return [(d, *pairs[(7 * n + n // 10) % 10]) for n, d in enumerate(DRAFTS)]


@pytest.mark.parametrize("draft, sampler, stops", combinations())
def test_the_whole_loop_has_exactly_the_full_models_distribution(draft, sampler, stops):
    """Refuses anything that moves any text's probability by 1e-12. Four new tokens are up to four
    rounds; the model is random, so that p and q differ, drafts are refused and layers change."""
    K, M, interval, threshold = draft
    s = Settings(K=K, M=M, interval=interval, exit_threshold=threshold, stop_ids=stops, N=4,
                 **sampler)
    assert distance(tiny_llama(seed=K + M), s) < 1e-12


@pytest.mark.parametrize("V, N, K, top_k", [(3, 5, 3, 2), (5, 3, 2, 0)])
def test_so_has_a_longer_text_and_a_larger_vocabulary(V, N, K, top_k):
    """Refuses errors that need a third draft, or more than three tokens, to show."""
    s = Settings(temperature=1.0, K=K, M=2, interval=2, exit_threshold=0.4, N=N, top_k=top_k,
                 stop_ids=(1,))
    assert distance(tiny_llama(V=V, L=4, seed=5), s) < 1e-12


def test_the_enumeration_sees_refusals_acceptance_changing_layers_and_stops_inside_drafts():
    """Refuses a test of the loop that would pass because nothing happens in it."""
    s, seen = Settings(temperature=1.0, K=2, M=2, interval=1, stop_ids=(2,), N=5, top_k=2), set()

    def run(chance):
        rounds = decode(tiny_llama(L=4, seed=1), (0, 1), s, chance)[1:]
        for r in rounds:
            k = len(r.drafted)
            seen.add(("refused", r.accepted) if r.accepted < k else ("all", k))
            if r.emitted[-1] == 2 and r.accepted == len(r.emitted):
                seen.add("drafted stop")
        if len({r.skip for r in rounds}) > 1:
            seen.add("layers changed")

    assert math.isclose(sum(w for _, w in every_outcome(run)), 1, abs_tol=1e-12)
    assert seen >= {("refused", 0), ("refused", 1), ("all", 2), "layers changed", "drafted stop"}


# ----------------------------------------------------------------- the checker must be able to fail

DRAW, P = "drafted.append(chance.draw(q[-1]))", "p = probabilities(logits, s)"
EXIT = "if confidence[-1] < s.exit_threshold or drafted[-1] in s.stop_ids:"
TODO, CACHED = "k, todo = len(drafted), text[cached:] + drafted", "cached = len(text) - 1  "
BONUS, EMITTED = "len(q) else p[-1]", "emitted = drafted[:verdict.accepted] + [verdict.token]"
LATE = [("text, cached = list(prompt), 0", "text, cached, late = list(prompt), 0, 0"),
        ("in_parts(model, ids, cached, cache,", "in_parts(model, ids, cached + late, cache,"),
        ("model.cache(end + s.M)", "model.cache(end + s.M + 99)")]
WRONG_SAMPLERS = {      # what is wrong: (the program's text, the wrong text in its place), ...
    "residual = p": [("owed = (p - q).clamp(min=0)", "owed = p")],
    "residual through a softmax": [
        ("return torch.where(mass > 0, owed / mass, p)", "return (p - q).softmax(-1)")],
    "residual without max(0, .)": [("owed = (p - q).clamp(min=0)", "owed = (p - q).abs()")],
    "lenient acceptance": [(".clamp(max=1)", ".mul(1.3).clamp(max=1)")],
    "acceptance the wrong way up": [("(p.double() / q.double())", "(q.double() / p.double())")],
    "argmax draft scored with a softmax q": [(DRAW, "drafted.append(int(q[-1].argmax()))")],
    "q at temperature 1": [(DRAW, DRAW + "\n            q[-1] = logits.softmax(-1)")],
    "bonus from unfiltered logits": [
        (P, P + "\n        p[-1] = model.head(x[-1:])[0].softmax(-1)")],
    "bonus from the row before": [(BONUS, "len(q) else p[max(-2, -len(p))]")],
    "correction from the row before": [("a, r, draw(r))", "a, r, draw(max(0, r - 1)))")],
    "p without the filters": [(P, P[:-2] + "Settings(temperature=s.temperature))")],
    "top-p before temperature": [
        ("logits / max(s.temperature, torch.finfo(logits.dtype).tiny)", "logits"),
        ("p / p.sum(-1, keepdim=True))",
         "torch.nn.functional.normalize(p ** (1 / s.temperature), 1, -1))")],
    "doubtful tokens are thrown away": [
        (EXIT, "if q[-1][drafted[-1]] < s.exit_threshold:\n                drafted.pop(), q.pop()\n"
               "                break\n            if False:")],
    "the drafts' keys stay after a verify": [
        (TODO, TODO + "\n        was = cache.k[:, :, t:t + k + 1].clone()"),
        (CACHED, "if k:\n            cache.k[:, :, t:t + k + 1] = was\n"
                 "        cached = len(text) - 1 #")],
    "a refused draft's slots are not given back": [
        *LATE, (CACHED, "late += k - verdict.accepted\n        cached = len(text) - 1 #")],
    "position off by one after full acceptance": [
        *LATE, (CACHED, "late += 0 < k == verdict.accepted\n        cached = len(text) - 1 #")],
    "token 0 is no token": [
        (EMITTED, "emitted = [d for d in drafted[:verdict.accepted] + [verdict.token] if d]"
                  " or [1]")],
    "the text goes on after an accepted stop": [("emitted = emitted[:stops[0] + 1]", "stops = []")],
}
STRICT = Settings(temperature=0.8, top_k=3, top_p=0.9, N=4, stop_ids=(2,), K=2, M=2, interval=1,
                  exit_threshold=0.6)


@pytest.mark.parametrize("wrong", WRONG_SAMPLERS)
def test_the_exact_test_refuses_this_wrong_sampler(wrong):
    """Refuses an exact test that errors which real repositories have made would pass."""
    loop = altered(speculative, *WRONG_SAMPLERS[wrong]).generate
    assert distance(tiny_llama(V=4, seed=11), STRICT, loop) > 1e-4


def test_the_settings_of_the_wrong_samplers_pass_with_the_right_one():
    """Refuses a table of wrong programs that are refused for another reason."""
    assert distance(tiny_llama(V=4, seed=11), STRICT, altered(speculative).generate) < 1e-12


class Fixed(Chance):
    """A Chance whose uniform is given."""

    def __init__(self, u):
        self.u = u

    def uniform(self):
        return self.u


def test_a_token_of_probability_zero_never_passes_not_even_at_u_zero():
    """Refuses u <= a in the acceptance test, and >= for > in the draw."""
    p, q = torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.tensor([1.0, 0.0])
    verdict = judge(p, [q], torch.tensor([0]), Fixed(0.0))
    assert verdict == speculative.Verdict(p=[0.0], q=[1.0], a=[0.0], accepted=0, token=1)
    assert altered(speculative, ("() < a", "() <= a")).Chance.accept(Fixed(0.0), 0.0)
    p = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0])
    for u, token in ((0.0, 1), (0.25 - 2 ** -53, 1), (0.25, 3), (1 - 2 ** -53, 3)):
        assert inverse_cdf(p, u) == token


# ------------------------------------------------------------------------------ formulas

def test_accepting_and_refusing_together_pay_every_token_exactly_p():
    """Refuses any wrong acceptance or residual: q * accept + P(refuse) * residual = p, for 2000
    random pairs, among them pairs with zeros, disjoint and equal ones."""
    gen = torch.Generator().manual_seed(0)
    for n in range(2000):
        V = 2 + n % 7
        p, q = torch.rand(2, V, generator=gen, dtype=torch.float64) ** 3
        keep = torch.rand(2, V, generator=gen) > n % 3 / 4
        p, q = (x * k if (x * k).sum() > 0 else x for x, k in zip((p, q), keep))
        p, q = p / p.sum(), q / q.sum()
        q = p if n % 50 == 0 else q
        a = torch.where(q > 0, acceptance(p, q), 0)
        assert ((q * a + (q * (1 - a)).sum() * residual(p, q)) - p).abs().max() < 1e-14


def test_a_residual_without_mass_is_p_and_never_nan():
    """Refuses 0/0 where p and q are equal, as with an empty skip set, or p is smaller
    throughout."""
    p = torch.tensor([0.25, 0.75])
    assert residual(p, p).equal(p) and residual(p, p * (1 + 1e-6)).equal(p)


def test_greedy_is_a_one_hot_distribution_and_ties_go_to_the_smaller_id():
    """Refuses greedy by a tiny temperature, which shares a tie."""
    logits = torch.tensor([[1.0, 3.0, 3.0], [0.0, -1.0, 0.0]])
    assert probabilities(logits, Settings()).tolist() == [[0, 1, 0], [1, 0, 0]]


def test_temperature_comes_first_then_top_k_then_top_p():
    """Refuses the other orders: of the top two at temperature 2, the first has more than 0.6; of
    all four it has less, and so the nucleus of 0.6 would hold two."""
    logits = torch.tensor([2.0, 1.0, 0.9, -3.0], dtype=torch.float64)
    two, four = (logits[:2] / 2).softmax(-1), (logits / 2).softmax(-1)
    assert two[0] > 0.6 > four[0]
    for top_p, want in ((0.6, [1, 0, 0, 0]), (0.7, [*two.tolist(), 0, 0])):
        p = probabilities(logits, Settings(temperature=2.0, top_k=2, top_p=top_p))
        assert p.tolist() == pytest.approx(want, abs=1e-15)


def test_the_nucleus_is_the_shortest_beginning_that_reaches_top_p():
    """Refuses one token too few or too many, and an empty nucleus."""
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25], dtype=torch.float64).log()
    for top_p, kept in ((0.49, [1]), (0.51, [1, 3]), (0.74, [1, 3]), (0.76, [1, 2, 3]),
                        (0.01, [1])):
        p = probabilities(logits, Settings(temperature=1.0, top_p=top_p))
        assert p.nonzero()[:, 0].tolist() == kept and abs(p.sum() - 1) < 1e-15


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_probabilities_are_float32_or_wider_and_finite_at_any_temperature(dtype):
    """Refuses arithmetic in bfloat16, overflow, and a top-k that keeps more than k on ties."""
    logits = torch.tensor([-300.0, 0.0, 300.0, 299.0], dtype=dtype)
    for temperature in (1e-300, 1e-46, 1e-30, 1e-3, 1.0, 1e6):
        for top_k, top_p in ((0, 1.0), (9, 1.0), (2, 0.5), (1, 1.0), (0, 1e-300)):
            p = probabilities(logits, Settings(temperature=temperature, top_k=top_k, top_p=top_p))
            assert p.dtype == torch.promote_types(dtype, torch.float32)
            assert abs(p.sum().item() - 1) < 1e-6 and p.isfinite().all()
    p = probabilities(torch.zeros(5, dtype=dtype), Settings(temperature=1.0, top_k=2))
    assert p.tolist() == [0.5, 0.5, 0, 0, 0]


# ------------------------------------------------------------------------------ the real generator

def chi_square(module, n=20000):
    """The statistic of n tokens that were drafted from q and judged against p, over 5 cells."""
    p = torch.tensor([0.05, 0.4, 0.25, 0.2, 0.1], dtype=torch.float64)
    q = torch.tensor([0.3, 0.1, 0.25, 0.05, 0.3], dtype=torch.float64)
    chance, seen = module.Chance(seed=1), [0] * 5
    for _ in range(n):
        d = chance.draw(q)
        verdict = module.judge(torch.stack((p, p)), [q], torch.tensor([d]), chance)
        seen[d if verdict.accepted else verdict.token] += 1
    return sum((x - n * w) ** 2 / (n * w) for x, w in zip(seen, p.tolist()))


def test_the_seeded_generator_draws_from_p():
    """Refuses a generator that is not uniform or is asked wrongly. With 4 degrees of freedom the
    right program exceeds 23.5 for one seed in 10,000; the seed is fixed. A lenient one is far
    beyond, and so is one whose correction is drawn with the uniform that refused."""
    assert chi_square(speculative) < 23.5
    for wrong in ((".clamp(max=1)", ".mul(1.2).clamp(max=1)"),
                  ("return self.uniform() < a", "return self.u < a"),):
        reuse = ("u, device = self.uniform(),", "u, device = setattr(self, 'u', self.uniform()) or "
                 "self.u,")
        assert chi_square(altered(speculative, wrong, reuse), n=5000) > 23.5


def test_a_seed_means_one_text_and_another_seed_another():
    """Refuses a hidden source of chance, a seed that is not used, and seeding before each draw."""
    s = Settings(temperature=1.0, K=3, M=1, N=40)
    texts = [tokens(decode(tiny_llama(V=5), [0], s, seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2] and len(set(texts[0])) > 1


def test_the_recorded_log_explains_every_token():
    """Refuses a log with a question left out, or a token that does not follow from its uniform."""
    chance, s = Recording(3), Settings(temperature=1.0, K=3, M=1, N=30)
    rounds, plain = decode(tiny_llama(V=5), [0], s, chance), Chance(3)
    log = iter(chance.log)

    def drawn():
        kind, p, u, token = next(log)
        assert kind == "draw" and p.cumsum(0)[token] > u >= p.cumsum(0)[token] - p[token] - 1e-12
        return token, u

    for r in rounds:
        assert [drawn() for _ in r.drafted] == [(d, plain.uniform()) for d in r.drafted]
        ahead = plain.uniform()                        # the full model's own, whichever row it is
        for n in range(r.accepted + (r.accepted < len(r.drafted))):
            kind, a, u, verdict = next(log)
            assert (kind, a, verdict) == ("accept", r.verdict.a[n], n < r.accepted)
            assert verdict == (u < a) and u == plain.uniform()
        assert drawn() == (r.emitted[-1], ahead)
    assert next(log, None) is None


# -------------------------------------------------------------------- greedy, lengths, stops, cache

def test_greedy_clasp_is_plain_greedy_token_for_token_in_float32():
    """Refuses a draft that shows in the text: 30 prompts and settings, 30 tokens each; near-ties
    within rounding do not occur among these seeds."""
    model = tiny_llama(V=40, L=5, D=16, H=4, G=2, seed=4, dtype=torch.float32)
    gen, refused = torch.Generator().manual_seed(0), 0
    for n in range(30):
        prompt = torch.randint(40, (1 + n % 9,), generator=gen).tolist()
        text = list(prompt)
        for _ in range(30):
            text.append(int(full_model(model, text).argmax()))
        s = Settings(K=1 + n % 6, M=n % 6, interval=1 + n % 3, exit_threshold=n % 4 / 4, N=30)
        rounds = decode(model, prompt, s)
        assert tokens(rounds) == text[len(prompt):]
        refused += sum(r.accepted < len(r.drafted) for r in rounds)
    assert refused > 30, "drafts that are never refused test nothing"


@pytest.mark.parametrize("N", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("K, M", [(0, 0), (1, 3), (4, 1), (50, 2), (5, 0)])
def test_exactly_n_tokens_come_out(N, K, M):
    """Refuses drafts or a bonus beyond the end."""
    s = Settings(temperature=1.0, N=N, K=K, M=M, interval=1)
    assert len(tokens(decode(tiny_llama(V=5), [1], s))) == N


def test_nothing_follows_a_stop_token_wherever_it_stands():
    """Refuses a stop that is seen only as the full model's own token, or only when drafted."""
    ended = collections.Counter()
    for seed in range(60):
        s = Settings(temperature=1.0, N=25, K=4, M=1, stop_ids=(2, 3))
        rounds = decode(tiny_llama(V=5), [1], s, seed)
        text, last = tokens(rounds), rounds[-1]
        assert not set(text[:-1]) & {2, 3} and (text[-1] in (2, 3) or len(text) == 25)
        ended["drafted" if last.accepted == len(last.emitted) else "own"] += text[-1] in (2, 3)
    assert min(ended["drafted"], ended["own"]) >= 5, ended


def test_after_every_round_the_cache_is_that_of_a_fresh_prefill():
    """Refuses entries left from drafts, from the DP's scratch slots or from another position."""
    model, caches, text = tiny_llama(V=5, L=4, seed=2), [], [1, 4, 0]
    make = model.cache
    model.cache = lambda S: caches.append(make(S)) or caches[-1]
    s = Settings(temperature=1.0, K=3, M=2, interval=1, N=40)
    for r in generate(model, list(text), s, Chance(0), choose_skip):
        text += r.emitted
        n, fresh = len(text) - 1, make(len(text))
        model.forward(torch.tensor(text[:n]), fresh.sequence(0, n), fresh)
        for ours, theirs in ((caches[0].k, fresh.k), (caches[0].v, fresh.v)):
            assert (ours[:, :, :n] - theirs[:, :, :n]).abs().max() < 1e-12
    assert len(caches) == 1


def test_memory_does_not_grow_with_rounds():
    """Refuses a cache or states that pile up: the bytes of all live tensors after each round."""
    def live():
        gc.collect()
        every = (t for t in gc.get_objects() if type(t) is torch.Tensor)
        return sum(t.untyped_storage().nbytes() for t in every)

    s = Settings(temperature=1.0, K=2, M=1, interval=1, N=30)
    sizes = [live() for _ in generate(tiny_llama(V=5), [1], s, Chance(0), choose_skip)][3:]
    assert len(sizes) > 6 and max(sizes) - min(sizes) < 4096, sizes


def test_layers_are_optimised_at_prefill_and_every_interval_verifications():
    """Refuses an interval off by one, a set that is used late, and a set of another size."""
    s = Settings(temperature=1.0, K=2, M=2, interval=3, N=30)
    rounds = decode(tiny_llama(V=5, L=4), [1], s)
    asked = [n for n, r in enumerate(rounds[:-1]) if r.choice]
    assert asked == list(range(0, len(rounds) - 1, 3)) and len(asked) > 2
    for before, after in itertools.pairwise(rounds):
        assert after.skip == (before.choice.skip() if before.choice else before.skip)
        assert sum(after.skip) == 2


def test_without_drafting_it_is_plain_decoding():
    """Refuses layer optimisation that nothing uses, and a round that gives more than one token."""
    rounds = decode(tiny_llama(V=5), [1], Settings(N=9, K=0, M=2))
    assert len(rounds) == 9 and not any(r.drafted or r.choice or any(r.skip) for r in rounds)


def test_a_prompt_longer_than_a_prefill_pass_changes_nothing(monkeypatch):
    """Refuses states or logits taken from the wrong part of a prompt that is read in pieces."""
    prompt, s = [t % 5 for t in range(23)], Settings(temperature=1.0, K=2, M=1, N=20)
    whole = decode(tiny_llama(V=5), prompt, s)
    monkeypatch.setattr(speculative, "CHUNK", 5)
    pieces = decode(tiny_llama(V=5), prompt, s)
    assert [r.emitted for r in whole] == [r.emitted for r in pieces]
    assert whole[0].choice.cosine == pytest.approx(pieces[0].choice.cosine, abs=1e-12)


def test_nothing_leaks_from_one_prompt_to_the_next():
    """Refuses a cache, a skip set or a position kept in the model."""
    model, s = tiny_llama(V=5), Settings(temperature=1.0, K=3, M=1, N=20)
    first = decode(model, [1, 2], s)
    decode(model, [4, 4, 4], s)
    assert [r.emitted for r in decode(model, [1, 2], s)] == [r.emitted for r in first]


@pytest.mark.parametrize("name, value", [
    ("temperature", -1.0), ("temperature", math.nan), ("temperature", math.inf), ("top_k", -1),
    ("top_p", 0.0), ("top_p", 1.5), ("N", 0), ("K", -1), ("K", 512), ("M", 4), ("M", -1),
    ("exit_threshold", 2.0), ("interval", 0)])
def test_impossible_settings_are_named(name, value):
    """Refuses a setting that would end in a traceback or in another distribution."""
    complaint = Settings(**{name: value}).check(3)
    assert Settings().check(3) is None and "\n" not in complaint and str(value) in complaint


# ============================================================================== llama.py
# Against a slow LLaMA by another route, its tokenizer against a slow tokenizer, its loader against
# broken folders.

INDEX, LLAMA3 = "model.safetensors.index.json", os.environ.get("CLASP_LLAMA3")
with_llama3 = pytest.mark.skipif(not LLAMA3, reason="CLASP_LLAMA3 names no folder of Meta's files")


def from_llama3(name):
    return json.loads((Path(LLAMA3) / name).read_text(encoding="utf-8"))


def complaint(call, *args):
    """What `call` says when it refuses: a ModelError of one line."""
    with pytest.raises(llama.ModelError) as e:
        call(*args)
    assert str(e.value) and "\n" not in str(e.value)
    return str(e.value)


# ---------------------------------------------------------------- a slow LLaMA, by another route

BASE = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=32,
            num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3, vocab_size=50,
            intermediate_size=48, rms_norm_eps=1e-5)
SCALED = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)     # so small that all three regimes occur
AS_4 = dict(rope_theta=500.0, rope_scaling=SCALED, torch_dtype="float32", head_dim=16)
AS_5 = dict(rope_parameters=dict(SCALED, rope_theta=500.0), dtype="float32", head_dim=16)
IDS = torch.tensor([3, 41, 7, 7, 0, 19, 49, 22, 5, 30, 11, 2])


def sizes(c):
    """(H, G, hd) of a config.json."""
    H = c["num_attention_heads"]
    return H, c.get("num_key_value_heads") or H, c.get("head_dim") or c["hidden_size"] // H


def weight_shapes(c):
    """Hugging Face's names -> shapes, for a config.json."""
    (H, G, hd), D, F, V = sizes(c), c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    layer = {"input_layernorm": (D,), "post_attention_layernorm": (D,),
             "self_attn.q_proj": (H * hd, D), "self_attn.k_proj": (G * hd, D),
             "self_attn.v_proj": (G * hd, D), "self_attn.o_proj": (D, H * hd),
             "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}
    shapes = {"model.embed_tokens": (V, D), "model.norm": (D,), "lm_head": (V, D)} | {
        f"model.layers.{i}.{n}": s for i in range(c["num_hidden_layers"]) for n, s in layer.items()}
    if c.get("tie_word_embeddings"):
        del shapes["lm_head"]
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def random_checkpoint(folder, overrides=None, seed=0, dtype=torch.float32, shards=1):
    """Write a Hugging Face folder with random weights; -> (config, name -> weight in float64)."""
    c, gen, w = {**BASE, **(overrides or {})}, torch.Generator().manual_seed(seed), {}
    for name, shape in weight_shapes(c).items():
        r = torch.randn(shape, generator=gen)
        tall = shape[0] == c["vocab_size"]
        w[name] = (1 + r / 10 if len(shape) == 1 else r / 10 if tall else r * shape[1] ** -0.5
                   ).to(dtype)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(c))
    # Dealt out like cards, so that every layer lies in several shards.
    place = {n: f"model-{k % shards + 1}-of-{shards}.safetensors" for k, n in enumerate(w)}
    if shards == 1:
        place = dict.fromkeys(w, "model.safetensors")
    else:
        (folder / INDEX).write_text(json.dumps(dict(metadata={}, weight_map=place)))
    for file in set(place.values()):
        save({name: t for name, t in w.items() if place[name] == file}, folder / file,
             {"format": "pt"})
    return c, {name: t.double() for name, t in w.items()}


EIGHT_B = dict(BASE, hidden_size=4096, num_attention_heads=32, num_key_value_heads=8,
               num_hidden_layers=32, vocab_size=128256, intermediate_size=14336,
               rope_theta=500000.0, max_position_embeddings=8192,
               torch_dtype="bfloat16")                 # and no stop token


def quiet_layers(L):
    """Of the layers of a synthetic checkpoint those that may be made quiet: 9 in 16, scattered."""
    return set(random.Random(0).sample(range(1, L - 1), 9 * L // 16))


def synthetic_checkpoint(folder, c=EIGHT_B, factor=0.1, seed=0, shards=4, report=lambda line: None):
    """Write random bf16 weights in the layout of the 8B, a shard at a time, for tests and
    benchmarks where no real ones can be had. Every matrix keeps the size of its input, and what
    leaves a layer is scaled so that depth does not blow it up; what the quiet layers add to the
    residual stream is `factor` times that: 0 makes them idle, and so sets how much a draft without
    them is accepted."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(c))
    L, gen, shapes = c["num_hidden_layers"], torch.Generator().manual_seed(seed), weight_shapes(c)
    names, quiet, place = list(shapes), quiet_layers(c["num_hidden_layers"]), {}
    for k in range(shards):
        file, tensors = f"model-{k + 1:05}-of-{shards:05}.safetensors", {}
        for name in names[k * len(names) // shards:(k + 1) * len(names) // shards]:
            shape, place[name] = shapes[name], file
            if len(shape) == 1:
                tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
                continue
            scale = 1.0 if "embed" in name else 4 * shape[1] ** -0.5 if "lm_head" in name else (
                shape[1] ** -0.5)
            if "o_proj" in name or "down_proj" in name:
                scale *= (2 * L) ** -0.5 * (factor if int(name.split(".")[2]) in quiet else 1)
            tensors[name] = (torch.randn(shape, generator=gen) * scale).to(torch.bfloat16)
        save(tensors, folder / file, {"format": "pt"})
        report(f"{file}: {sum(t.nbytes for t in tensors.values()) / 1e9:.3g} GB")
    (folder / INDEX).write_text(json.dumps(dict(metadata={}, weight_map=place)))


def reference_frequencies(c):
    """Radians per position for each pair; LLaMA-3.1's stretching by its three cases."""
    rope = {"rope_theta": c.get("rope_theta", 1e4), **(c.get("rope_scaling") or {})}
    rope, hd, out, cases = c.get("rope_parameters") or rope, sizes(c)[2], [], set()
    for f in (rope["rope_theta"] ** (-2 * k / hd) for k in range(hd // 2)):
        if "factor" in rope:
            low, high, factor = (rope[s] for s in ("low_freq_factor", "high_freq_factor", "factor"))
            turns = rope["original_max_position_embeddings"] * f / (2 * math.pi)
            share = (turns - low) / (high - low)
            case = "kept" if turns > high else "divided" if turns < low else "blended"
            f = dict(kept=f, divided=f / factor, blended=share * f + (1 - share) * f / factor)[case]
            cases.add(case)
        out.append(f)
    assert len(cases) in (0, 3), f"{cases} alone do not test the stretching"
    return out


def reference_norm(x, weight, eps):
    means = [sum(v * v for v in row) / len(row) for row in x.tolist()]
    return torch.stack([row / math.sqrt(m + eps) for row, m in zip(x, means, strict=True)]) * weight


def reference_layer(c, w, i, x):
    """Layer i on a whole sequence x (T, D) from position 0 on: no cache, no mask, row by row."""
    (H, G, hd), eps, p = sizes(c), c["rms_norm_eps"], f"model.layers.{i}."
    f = torch.tensor(reference_frequencies(c), dtype=torch.float64)
    turn = torch.exp(1j * torch.outer(torch.arange(len(x)), f))
    a, heads = reference_norm(x, w[p + "input_layernorm.weight"], eps), []

    def part(name, j):
        return a @ w[f"{p}self_attn.{name}_proj.weight"][j * hd:(j + 1) * hd].T

    def spin(v):                                       # elements k and k + hd/2: a complex number
        z = torch.complex(v[:, :hd // 2], v[:, hd // 2:]) * turn
        return torch.cat((z.real, z.imag), 1)

    for j in range(H):
        q, k, v = spin(part("q", j)), spin(part("k", j * G // H)), part("v", j * G // H)
        e = [torch.exp(k[:r + 1] @ q[r] / math.sqrt(hd)) for r in range(len(x))]     # rows 0 .. r
        heads.append(torch.stack([e_r @ v[:r + 1] / e_r.sum() for r, e_r in enumerate(e)]))
    x = x + torch.cat(heads, 1) @ w[p + "self_attn.o_proj.weight"].T
    a = reference_norm(x, w[p + "post_attention_layernorm.weight"], eps)
    gate, up = (a @ w[f"{p}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    return x + (gate / (1 + torch.exp(-gate)) * up) @ w[p + "mlp.down_proj.weight"].T


def reference(c, w, ids, skip=(), first=0):
    """-> logits (T, V), h[0..L] (L+1, T, D). Rows from `first` on leave out what is in `skip`."""
    h = [w["model.embed_tokens.weight"][ids]]
    for i in range(c["num_hidden_layers"]):
        ran = reference_layer(c, w, i, h[-1])
        h.append(torch.cat((ran[:first], h[-1][first:])) if i in skip else ran)
    head = w["model.embed_tokens.weight" if c.get("tie_word_embeddings") else "lm_head.weight"]
    x = reference_norm(h[-1], w["model.norm.weight"], c["rms_norm_eps"])
    return x @ head.T, torch.stack(h)


# ---------------------------------------------------------------- forward

def relative_error(got, want):
    got, want = got.double(), want.double()
    return ((got - want).abs().max() / want.abs().max()).item()


def same(got, want):
    return relative_error(got, want) < BOUNDS[torch.float64]


def loaded(folder, overrides=None, stored=torch.float32, dtype=torch.float64, lib=llama):
    """(config, weights, the model loaded from them, a cache for IDS and six slots more)."""
    c, w = random_checkpoint(folder, overrides, dtype=stored)
    model = lib.Llama.load(folder, dtype=dtype)
    return c, w, model, model.cache(len(IDS) + 6)


def passes(model, cache, ids, lengths, t=0, skip=None):
    """Logits and states of `ids`, from position t on, in passes of these lengths."""
    logits, states = [], []
    for part in ids.split(lengths):
        x, h = model.forward(part, cache.sequence(t, len(part)), cache, skip, slice(None))
        logits, states, t = [*logits, model.head(x)], [*states, h], t + len(part)
    return torch.cat(logits), torch.cat(states, 1)


def worst_error(folder, lengths=(5, 3, 1, 1, 2), **how):
    """The largest relative error of a program: logits and states of prefill, chunk and decode;
    versions of one token in each layer; the cache entries that those must leave alone."""
    c, w, model, cache = loaded(folder, **how)
    (logits, states), (want, h), t = passes(model, cache, IDS, lengths), reference(c, w, IDS), 7
    errors = [relative_error(logits, want), relative_error(states, h)]
    before = torch.stack((cache.k, cache.v))[:, :, :, :t + 1]
    noise = torch.randn(4, h.shape[-1], generator=torch.Generator().manual_seed(1)) / 10
    for i in range(c["num_hidden_layers"]):
        x = (h[i, t] + noise).to(model.dtype)
        want = [reference_layer(c, w, i, torch.vstack((h[i, :t], v.double())))[-1] for v in x]
        got = model.layer(i, x, cache.versions(t, len(x)), cache)
        errors.append(relative_error(got, torch.stack(want)))
    errors.append(relative_error(torch.stack((cache.k, cache.v))[:, :, :, :t + 1], before))
    return torch.tensor(errors).max().item()       # unlike Python's max, it lets a nan through


ONCE = {k.replace("rope_", ""): v for k, v in SCALED.items()}                # "type" was its name
VARIANTS = {
    "a kv head for each query head": dict(num_key_value_heads=4),
    "kv heads and head size not given": dict(num_key_value_heads=None, head_dim=None),
    "one kv head for all": dict(num_key_value_heads=1),
    "heads wider than the model": dict(head_dim=12),
    "tied": dict(tie_word_embeddings=True),
    "LLaMA-3, Transformers 4": dict(rope_theta=500.0, rope_scaling=None, torch_dtype="float32"),
    "LLaMA-3, Transformers 5": dict(rope_parameters=dict(rope_type="default", rope_theta=500.0)),
    "LLaMA-3.1, Transformers 4": AS_4,
    "LLaMA-3.1, first spelling": dict(AS_4, rope_scaling=ONCE),
    "LLaMA-3.1, Transformers 5": AS_5,
}
# bfloat16 rounds by up to 2^-9 = 0.002, some ten times per layer; 0.015 was measured.
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_row_of_every_variant_is_llama(tmp_path, name, dtype):
    """Refuses a forward, mask or reading of config.json wrong for some kind of row or variant."""
    stored = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32    # is loaded exactly
    error = worst_error(tmp_path, overrides=VARIANTS[name], stored=stored, dtype=dtype)
    assert error < BOUNDS[dtype]


@pytest.mark.parametrize("lengths", [(12,), (1,) * 12, (11, 1), (1, 11), (4, 4, 4)], ids=str)
def test_how_a_text_is_cut_into_passes_does_not_matter(tmp_path, lengths):
    """Refuses a mask or a position that is right only in prefill or only in decoding."""
    assert worst_error(tmp_path, lengths, overrides=AS_5) < 1e-12


WRONG_LLAMA = {       # what is wrong: (the program's text, the wrong text in its place), ...
    "the interleaved rotary layout": [
        ("x.roll(x.shape[-1] // 2, -1)", "x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)"),
        ("torch.cat((angle.cos(), angle.cos()), 1)", "angle.cos().repeat_interleave(2, 1)"),
        ("torch.cat((-angle.sin(), angle.sin()), 1)",
         "torch.stack((-angle.sin(), angle.sin()), 2).flatten(1)")],
    "decoding one position late": [("self._rows(slots, slots,",
                                    "self._rows(slots + (T == 1), slots,")],
    "versions one position late": [("expand(J) + t", "expand(J) + t + 1")],
    "LLaMA-3.1's stretching left out": [("if cfg.scaling:", "if None:")],
    "Transformers 5 not understood": [('("rope_scaling", "rope_parameters")', '("rope_scaling",)')],
    "the mask without + t": [("self._seen(t, T) <= slots[:, None]",
                              "self._seen(t, T) <= self.slot[:T, None]")],
    "no causal mask": [("self._seen(t, T) <= slots[:, None]",
                        "self._seen(t, T) <= slots[-1] + 0 * slots[:, None]")],
    "versions that see the probe's own entry": [("(every < t)", "(every <= t)")],
    "versions that see each other": [("every == slots[:, None]", "every > 0 * slots[:, None] + t")],
    "versions written over the probe": [("self.slot[1:J + 1] + t", "self.slot[:J] + t")],
    "scores divided by the root of D": [("c.hd ** -0.5", "c.D ** -0.5")],
    "query heads dealt to kv heads in turn": [
        ("q.reshape(T, c.G, R, c.hd)", "q.reshape(T, R, c.G, c.hd).transpose(1, 2)")],
    "a norm without eps": [("torch.add(eps,", "torch.add(0 * eps,")],
    "the last state after the final norm": [("torch.stack([x[states] for x in h])", "torch.stack("
        "[x[states] for x in h[:-1]] + [rms_norm(x, self.norm, self.eps)[states]])")],
}


@pytest.mark.parametrize("name", WRONG_LLAMA)
def test_the_comparison_refuses(tmp_path, name):
    """Refuses a comparison that overlooks a classical mistake: each is a million bounds away."""
    assert not worst_error(tmp_path, overrides=AS_5, lib=altered(llama, *WRONG_LLAMA[name])) < 1e-6


@pytest.mark.parametrize("skip", [(), (0,), (1,), (2,), (0, 2), (0, 1, 2)], ids=str)
def test_a_draft_skips_what_it_is_told_and_leaves_no_trace_after_verifying(tmp_path, skip):
    """Refuses a mask read upside down, a skipped layer that writes, drafts that show through."""
    c, w, model, cache = loaded(tmp_path, AS_5)
    mask, t, n = [i in skip for i in range(3)], 6, len(IDS)
    passes(model, cache, IDS[:t], (4, 2))
    cache.k[:, :, t:], cache.v[:, :, t:] = 7.0, -7.0
    drafted = (IDS[t:] + 1) % 50
    logits, h = passes(model, cache, drafted, (1,) * 6, t, mask)
    want, want_h = reference(c, w, torch.cat((IDS[:t], drafted)), skip, first=t)
    assert same(logits, want[t:]) and same(h, want_h[:, t:])
    untouched = (cache.k[:, :, t:n] == 7).all(-1)      # (L, G, slots); a skipped layer leaves holes
    assert torch.equal(untouched.all(-1).all(-1), torch.tensor(mask))
    logits, h = passes(model, cache, IDS[t:], (6,), t)  # rolled back by counting, and overwritten
    want, want_h = reference(c, w, IDS)
    assert same(logits, want[t:]) and same(h, want_h[:, t:])


def test_states_are_those_of_the_rows_asked_for_and_only_if_asked(tmp_path):
    """Refuses states of other rows, and a last state that is not what the head receives."""
    _, _, model, cache = loaded(tmp_path)
    x, h = model.forward(IDS, cache.sequence(0, 12), cache, states=slice(-3, None))
    every = passes(model, cache, IDS, (12,))[1]
    assert torch.equal(h[-1], x[-3:]) and torch.equal(h, every[:, -3:])
    assert model.forward(IDS, cache.sequence(0, 12), cache)[1] is None


@pytest.mark.parametrize("t", [0, 7, 11])
def test_a_version_among_siblings_is_a_decode_row_alone(tmp_path, t):
    """Refuses candidates at another position than their token, or whose number matters, and a
    cache that begins uninitialised: slots not yet written weigh 0, and 0 * nan is nan."""
    _, _, model, alone = loaded(tmp_path, AS_5)
    dirt = [torch.full_like(alone.k, math.nan) for _ in range(20)]
    del dirt                                           # so this is what uninitialised memory holds
    cache = model.cache(18)
    rows = cache.versions(t, 5)
    h, _ = (passes(model, c, IDS, (12,))[1] for c in (cache, alone))
    for i in range(3):
        x = torch.vstack((h[i, t], h[i, :4] * 1.5))
        want = [model.layer(i, v[None], alone.sequence(t, 1), alone) for v in x]
        for J in (1, 3, 5):
            got = model.layer(i, x[:J], rows.first(J), cache)
            assert same(got, torch.cat(want)[:J])


def test_a_version_sees_neither_siblings_nor_the_probe_nor_what_lies_behind(tmp_path):
    """Refuses a mask that gives anything but the past and the version itself the least weight."""
    _, _, model, cache = loaded(tmp_path, AS_5)
    h, t = passes(model, cache, IDS, (12,))[1], 7
    x, rows = h[1, :4].clone(), cache.versions(t, 4)
    first = model.layer(1, x, rows, cache)
    for a in (cache.k, cache.v):
        a[:, :, t], a[:, :, t + 1:] = -50.0, 50.0
    x[2] = 50 * h[1, 5]
    changed = (model.layer(1, x, rows, cache) != first).any(1)
    assert changed.tolist() == [False, False, True, False]
    assert (cache.k[:, :, t] == -50).all() and (cache.v[:, :, t] == -50).all()


def test_the_cache_never_moves_and_what_lies_behind_the_position_has_no_influence(tmp_path):
    """Refuses a cache that grows, is copied or must be clean: not even a nan comes through."""
    _, _, model, cache = loaded(tmp_path)

    def home():
        return [a.data_ptr() for a in (cache.k, cache.v, cache.k[2], *cache.layers[2])]
    before, clean = home(), passes(model, cache, IDS, (5, 3, 1, 1, 2))
    cache.k[:], cache.v[:] = math.nan, math.nan
    dirty = passes(model, cache, IDS, (5, 3, 1, 1, 2))
    model.layer(1, dirty[1][1, :3], cache.versions(11, 3), cache)
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])
    assert before == home() and before[2] == before[3]


def test_rows_that_do_not_fit_into_the_cache_are_caught(tmp_path):
    """Refuses a cache that cuts rows off at its end, or refuses the last that fit."""
    cache = loaded(tmp_path)[3]                        # 18 slots
    for rows, most in ((cache.sequence, 5), (cache.versions, 4)):            # slot 13: the probe's
        assert rows(13, most).slots[-1] == 17
        with pytest.raises(AssertionError):
            rows(13, most + 1)


def test_norm_statistics_are_float32_in_bfloat16():
    """Refuses statistics in bfloat16, which change a value in five; in float32, 1 in some 2^14."""
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)).bfloat16()

    def norm(x):
        return (x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).bfloat16()
    got, exact = llama.rms_norm(x, torch.ones(512).bfloat16(), torch.tensor(1e-5)), norm(x.double())
    assert got.dtype == torch.bfloat16 and (got != exact).double().mean() < 1e-3
    assert (norm(x) != exact).double().mean() > 0.2


def test_rotary_tables_are_exact_at_the_end_of_a_long_context(tmp_path):
    """Refuses angles computed in float32, wrong by 1e-3 there, and tables kept in bfloat16."""
    c, _ = random_checkpoint(tmp_path, AS_4)
    cfg = llama.Config.load(tmp_path)
    cache = llama.Cache(cfg, 32768, torch.device("cpu"), torch.bfloat16)
    want = [cmath.exp(32767j * f) for f in reference_frequencies(c)]
    assert cache.cos[-1, 0].tolist() == pytest.approx([z.real for z in want * 2], abs=1e-7)
    assert cache.sin[-1, 0, 8:].tolist() == pytest.approx([z.imag for z in want], abs=1e-7)


# ---------------------------------------------------------------- replayed passes

def leaves(out):
    return [x for part in out for x in leaves(part)] if isinstance(out, tuple) else [out]


def rerun(self, f):
    """Replay.record without a GPU: what is repeated is f itself, its result put where that of the
    recording lies. Recording runs nothing, so until the first replay nonsense lies there."""
    f(), f()
    mine = [self.x, self.h, self.ids, self.t]
    out = f()
    for x in leaves(out):
        if not any(x is m for m in mine):
            x.fill_(math.nan if x.is_floating_point() else 1)

    def replay():
        for old, new in zip(leaves(out), leaves(f())):
            old.copy_(new)
    replay()
    return out, replay


def replayed(model, K, M, compile=lambda f: f, module=llama):
    fast = module.Replay(model, K, M, dp_layer_skip.table, compile)
    if model.device.type != "cuda":
        fast.record = types.MethodType(rerun, fast)
    return fast


def assert_replays_equal_plain_passes(module=llama):
    """Every kind of pass at several positions, against the plain model with an ordinary cache."""
    model, K, M = tiny_llama(V=11, L=5, D=16, H=4, G=2, seed=6), 3, 3
    fast, gen = replayed(model, K, M, module=module), torch.Generator().manual_seed(0)
    slow_cache, fast_cache, t = model.cache(200), fast.cache(60), 0

    def both(T, **how):
        """h[L], states and logits of T rows from t on by either way; equal to rounding."""
        ids = torch.randint(11, (T,), generator=gen)
        out = []
        for m, cache in ((model, slow_cache), (fast, fast_cache)):
            x, h = m.forward(ids, cache.sequence(t, T), cache, **how)
            out.append([v.clone() for v in (x, h, m.head(x[-1:]), m.head(x)) if v is not None])
        for a, b in zip(*out):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
        return out

    with torch.inference_mode():
        both(9)                                            # a prompt longer than a verify
        t = 9
        for skip in itertools.product((False, True), repeat=5):
            both(1, skip=skip)                             # a draft step with every set there is
        for T in (4, 1, 3, 2, 4):
            (*_, h, _, _), (*_, g, _, _) = both(T, states=slice(-T, None))
            at = t + T - 1
            rows = slow_cache.versions(at, M)
            want = dp_layer_skip.choose_skip(
                h[:, -1], lambda i, x: model.layer(i, x, rows, slow_cache), M)
            fast_cache.versions(at, M)
            got = dp_layer_skip.Choice.read(*fast.choose(g[:, -1]))
            assert_same_choice(want, got, 1e-12)
            t += T
        both(1)


def test_a_replayed_pass_is_the_plain_one_for_a_draft_a_verify_and_the_dynamic_program():
    """Refuses a buffer that is not updated, a graph of the wrong layer, a row too many or too
    few."""
    assert_replays_equal_plain_passes()


WRONG_REPLAYS = {
    "the position stays where it was recorded": [
        ("self.t.fill_(t) return self.slots.sequence", "return self.slots.sequence")],
    "the candidates keep the last pass's position": [
        ("recorded for {self.M}\" self.t.fill_(t)", "recorded for {self.M}\"")],
    "every layer's graph is layer 0's": [("in zip(m.layers, slots.layers)]",
                                          "in zip(m.layers[:1] * 9, slots.layers)]")],
    "layers share a cache": [("in zip(m.layers, slots.layers)]",
                              "in zip(m.layers, slots.layers[:1] * 9)]")],
    "a layer writes beside the buffer": [("x.copy_(decoder_layer(w, x, *rest))",
                                          "decoder_layer(w, x, *rest)")],
    "skipped layers run": [("if not (skip and skip[i]): self.layers[i]()", "self.layers[i]()")],
    "the layers that run are those to be skipped": [
        ("if not (skip and skip[i]): self.layers[i]()",
         "if skip and skip[i]:\n                self.layers[i]()")],
    "the head is replayed too early": [("self.end() return self.x, None",
                                        "return self.x, None")],
    "the ids are those of the recording": [("self.ids[:T].copy_(ids)", "pass")],
    "the states of the verify are the last rows of the padding": [
        ("self.hs[:, :T][:, states]", "self.hs[:, states]")],
    "the program sees the states it was recorded with": [("self.h.copy_(h)", "pass")],
    "logits of the row before": [("return self.all_logits[:len(x)]",
                                  "return self.all_logits[:len(x)].roll(1, 0)")],
}


@pytest.mark.parametrize("wrong", WRONG_REPLAYS)
def test_some_pass_refuses_this_wrong_replay(wrong):
    """Refuses a comparison that these would pass."""
    module = altered(llama, *WRONG_REPLAYS[wrong])
    with pytest.raises(AssertionError):
        assert_replays_equal_plain_passes(module)


def replaying(model, K, M, **how):
    """`generate` by replayed passes; takes a plain model's place in `decode` and `distance`."""
    fast = replayed(model, K, M, **how)

    def loop(_, prompt, s, chance, choose):
        return generate(fast, prompt, s, chance,
                        lambda h, run_layer, M: dp_layer_skip.Choice.read(*fast.choose(h)))
    return loop


@pytest.mark.parametrize("K, M, interval, threshold", [(2, 1, 1, 0.0), (3, 2, 2, 0.5),
                                                       (1, 3, 1, 1.0), (3, 0, 1, 0.0)])
def test_the_loop_is_as_lossless_by_replayed_passes(K, M, interval, threshold):
    """Refuses a padded verify or a buffer used twice that moves any text's probability by
    1e-12."""
    s = Settings(temperature=0.9, top_p=0.95, K=K, M=M, interval=interval, N=4, stop_ids=(2,),
                 exit_threshold=threshold)
    model = tiny_llama(V=4, seed=K + M)
    assert distance(model, s, replaying(model, K, M)) < 1e-12


def test_a_replay_serves_run_after_run_of_any_length():
    """Refuses a cache that keeps something of an earlier text, or graphs of a cache that is
    gone."""
    model = tiny_llama(V=30, L=5, D=16, H=4, G=2, seed=4)
    loop, gen = replaying(model, 4, 2), torch.Generator().manual_seed(0)
    for n, N in enumerate((10, 30, 300, 20)):
        prompt = torch.randint(30, (1 + 3 * n,), generator=gen).tolist()
        for s in (Settings(temperature=0.7, K=4, M=2, N=N, interval=2), Settings(N=N, K=0)):
            want = decode(model, prompt, s, chance=n)
            got = decode(model, prompt, s, chance=n, loop=loop)
            assert tokens(got) == tokens(want) and [r.skip for r in got] == [r.skip for r in want]


def test_a_layer_is_compiled_once_per_row_count_whatever_the_layer_and_the_position():
    """Refuses a compiled function that depends on a layer's number, a position or a skip set; and
    one that is not the same function."""
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    model = tiny_llama(V=30, L=5, D=16, H=4, G=2, seed=4)
    loop = replaying(model, 3, 2, compile=lambda f: torch.compile(
        f, backend=backend, fullgraph=True, dynamic=False))
    s = Settings(temperature=0.7, K=3, M=2, N=25, interval=1)
    assert tokens(decode(model, [1, 2], s, loop=loop)) == tokens(decode(model, [1, 2], s))
    assert len(compiled) == 3, "1 row in place, K + 1 rows, M rows"


@pytest.mark.parametrize("factor, accepted", [(0.0, (1, 1)), (0.2, (0.5, 0.999)), (1.0, (0, 0.4))])
def test_a_synthetic_checkpoint_is_accepted_as_far_as_its_quiet_layers_are_quiet(
        tmp_path, factor, accepted):
    """Refuses a knob that does nothing, and activations that blow up or die out with depth; idle
    layers must be exactly those the program finds."""
    c = dict(EIGHT_B, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, vocab_size=200,
             intermediate_size=96, num_hidden_layers=16)
    synthetic_checkpoint(tmp_path / "s", c, factor)
    assert len(list((tmp_path / "s").glob("*.safetensors"))) == 4
    model, quiet = llama.Llama.load(tmp_path / "s"), quiet_layers(16)
    s = Settings(K=4, M=len(quiet), N=100)
    rounds = decode(model, [1, 2, 3], s)
    drafted = sum(len(r.drafted) for r in rounds)
    low, high = accepted
    assert low <= sum(r.accepted for r in rounds) / drafted <= high
    if factor == 0:
        assert {i for i, out in enumerate(rounds[-1].skip) if out} == quiet
    cache = model.cache(8)
    _, h = model.forward(torch.arange(8), cache.sequence(0, 8), cache, states=slice(None))
    assert ((h.std(-1) > 0.5) & (h.std(-1) < 3)).all()


def test_a_pass_is_recorded_after_two_that_are_not_and_all_recordings_share_memory(monkeypatch):
    """Refuses a first call, which compiles and allocates, inside a recording, work left on the side
    stream, a pool per graph, and a recording taken for a run; PyTorch's part is played here."""
    happened, inside = [], []

    class Stream:
        def __init__(self, device):
            self.name = "side"

        def wait_stream(self, other):
            happened.append(f"{self.name} waits for {other.name}")

    class Graph:
        def pool(self):
            return "the pool"

        def replay(self):
            happened.append("replayed")

    @contextlib.contextmanager
    def within(what, **how):
        inside.append(what if isinstance(what, str) else f"graph in {how['pool']}")
        yield
        inside.pop()

    here = Stream(None)
    here.name = "here"
    for name, fake in dict(Stream=Stream, CUDAGraph=Graph, current_stream=lambda device: here,
                           stream=lambda side: within(side.name),
                           graph=lambda graph, pool, stream: within(graph, pool=pool)).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    model = tiny_llama()
    replay = llama.Replay(model, 2, 1, dp_layer_skip.table, lambda f: f)
    for pool in (None, "the pool"):
        happened.clear()
        out, again = replay.record(lambda: happened.append(inside[-1]) or len(happened))
        assert happened == ["side waits for here", "side", "side", "here waits for side",
                            f"graph in {pool}", "replayed"] and out == 5
        again()
        assert happened[-2:] == ["replayed"] * 2 and not inside


def parting(model, prompt, s, loop=generate):
    """Where greedy CLaSp parts from greedy plain decoding: None, or (after how many tokens, how far
    apart the logits of the two tokens are in one pass over the text, the larger of the two)."""
    plain = tokens(decode(model, prompt, Settings(N=s.N, K=0)))
    clasp = tokens(decode(model, prompt, s, loop=loop))
    n = next((n for n, (x, y) in enumerate(zip(plain, clasp)) if x != y), None)
    if n is None:
        return None
    x, y = full_model(model, [*prompt, *plain[:n]])[[plain[n], clasp[n]]].tolist()
    return n, abs(x - y), max(abs(x), abs(y))


def assert_partings_are_ties(model, loop, s, prompts=20, length=10):
    """bfloat16 keeps 8 bits, so logits that differ by 1 part in 64 may change places between a pass
    of one row and a pass of several. Prints how often they did."""
    gen, partings = torch.Generator().manual_seed(0), []
    for _ in range(prompts):
        prompt = torch.randint(model.cfg.V, (length,), generator=gen).tolist()
        partings += [p] if (p := parting(model, prompt, s, loop)) else []
    print(f"{len(partings)} of {prompts} greedy texts part; (after, gap, logit): {partings}")
    assert all(gap <= size / 64 for _, gap, size in partings), partings


def test_in_bfloat16_greedy_texts_part_only_at_near_ties(tmp_path):
    """Refuses an error that hides behind rounding: where the texts part, the two tokens were as
    good as equal; a head that is off is found out."""
    c = dict(EIGHT_B, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, vocab_size=200,
             intermediate_size=96, num_hidden_layers=8)
    synthetic_checkpoint(tmp_path / "s", c, factor=0.2)
    model = llama.Llama.load(tmp_path / "s", dtype=torch.bfloat16)
    s = Settings(K=4, M=4, N=60)
    assert_partings_are_ties(model, replaying(model, 4, 4), s, prompts=6)
    off = llama.Llama.load(tmp_path / "s", dtype=torch.bfloat16)
    off.lm_head.mul_(1 + torch.randn(200, 1, generator=torch.Generator().manual_seed(0)) / 5)
    with pytest.raises(AssertionError):
        assert_partings_are_ties(model, replaying(off, 4, 4), s, prompts=6)


@pytest.mark.parametrize("wrong", [None, "the position stays where it was recorded",
                                   "the candidates keep the last pass's position"])
def test_the_comparison_for_the_8b_can_fail(wrong, tmp_path):
    """Refuses tolerances that a wrong position passes."""
    c = dict(EIGHT_B, hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
             vocab_size=500, intermediate_size=192, num_hidden_layers=16)
    synthetic_checkpoint(tmp_path / "s", c)
    model, s = llama.Llama.load(tmp_path / "s"), Settings(K=7, M=8)
    compare = functools.partial(assert_graphs_are_eager, model, s, lambda f: f, 1e-3, 1e-5)
    if wrong is None:
        return compare()
    with pytest.raises(AssertionError):
        compare(module=altered(llama, *WRONG_REPLAYS[wrong]))


cuda = pytest.mark.skipif(not torch.cuda.is_available(),
                          reason="no CUDA GPU here: graphs cannot be recorded")


@cuda
@pytest.mark.parametrize("fuse", [False, True])
def test_recorded_graphs_equal_the_eager_passes_on_a_gpu(fuse):
    """Refuses a kernel that was recorded with another address, and a fusion that is not exact to
    float32's rounding; the tokens and the skip sets are the same."""
    host = tiny_llama(V=30, L=6, D=64, H=4, G=2, hd=16, ffn=128, seed=4, dtype=torch.float32)
    model = llama.Llama(host.cfg, host.embed.cuda(),
                        [llama.Layer(*(w.cuda() for w in layer)) for layer in host.layers],
                        host.norm.cuda(), host.lm_head.cuda())
    compile = clasp_mini.fusing(model.device) if fuse else lambda f: f
    assert (compile(abs) is not abs) == fuse, "torch.compile does not work here"
    loop = replaying(model, 4, 3, compile=compile)
    for n in range(6):
        s = Settings(K=4, M=3, N=60, interval=2, temperature=n % 2 * 0.8)
        want, got = decode(model, [1, n], s, chance=n), decode(model, [1, n], s, n, loop)
        assert tokens(got) == tokens(want) and [r.skip for r in got] == [r.skip for r in want]


@cuda
@pytest.mark.skipif(not os.environ.get("CLASP_8B"),
                    reason="CLASP_8B names no folder of an 8B, such as synthetic_checkpoint writes")
def test_the_8b_by_graphs_is_the_eager_8b():
    """Refuses graphs whose logits and cosines leave the eager ones by more than rounding, in
    float32 so that a position or a quiet layer too many is not taken for it, and in bfloat16 greedy
    texts that part where there is no tie. (-s shows how often they do, and whether the sets are the
    same: among equally quiet layers rounding decides.)"""
    for dtype, logits, cosines in ((torch.float32, 1e-3, 1e-5), (torch.bfloat16, 1 / 32, 5e-3)):
        model = None                                   # 32 GB go before the next 16 come
        gc.collect()
        torch.cuda.empty_cache()
        model = llama.Llama.load(os.environ["CLASP_8B"], "cuda", dtype)
        compile = clasp_mini.fusing(model.device)
        s = Settings(K=7, M=16, N=200)
        assert_graphs_are_eager(model, s, compile, logits, cosines)
    assert_partings_are_ties(model, replaying(model, s.K, s.M, compile=compile), s, length=100)


def assert_graphs_are_eager(model, s, compile, logits, cosines, module=llama):
    """One draft step and one layer optimisation after 1000 tokens, either way: equal to these
    tolerances, that of the logits relative to the largest."""
    prompt = torch.arange(1000, device=model.device) * 97 % model.cfg.V
    fast = replayed(model, s.K, s.M, compile, module)
    with torch.inference_mode():
        got = []
        for m in (model, fast):
            cache = m.cache(1100)
            m.forward(prompt, cache.sequence(0, 1000), cache)
            _, h = m.forward(prompt[:8], cache.sequence(1000, 8), cache, states=slice(None))
            h = h.clone()
            rows = cache.versions(1007, s.M)
            choice = (dp_layer_skip.Choice.read(*m.choose(h[:, -1])) if m is fast else
                      choose_skip(h[:, -1], lambda i, x: m.layer(i, x, rows, cache), s.M))
            skip = choice.skip() if m is model else skip                     # noqa: F821
            x, _ = m.forward(prompt[:1], cache.sequence(1008, 1), cache, skip)
            got.append((m.head(x).clone(), choice))
    (eager, chosen), (graphs, by_graphs) = got
    print("the same skip sets:", chosen.skip() == by_graphs.skip())
    assert (eager - graphs).abs().max() <= eager.abs().max() * logits
    torch.testing.assert_close(torch.tensor(chosen.cosine), torch.tensor(by_graphs.cosine),
                               rtol=0, atol=cosines)


# ---------------------------------------------------------------- config.json and loading

def configure(**overrides):
    """A function that writes BASE with overrides into a folder; `...` takes a key away."""
    c = {k: v for k, v in {**BASE, **overrides}.items() if v is not ...}
    return lambda folder: (folder / "config.json").write_text(json.dumps(c))


def config_of(folder, c):
    configure(**c)(folder)
    return llama.Config.load(folder)


def test_both_spellings_of_the_8b_are_the_8b(tmp_path):
    """Refuses a reader of one spelling only, which from the other gets theta 10000, no scaling."""
    c = dict(hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256,
             intermediate_size=14336, num_hidden_layers=32, max_position_embeddings=131072)
    old = config_of(tmp_path, dict(c, rope_theta=5e5, rope_scaling=SCALED))
    new = config_of(tmp_path, dict(c, rope_parameters=dict(SCALED, rope_theta=5e5), head_dim=128))
    assert old == new == llama.Config(
        L=32, D=4096, H=32, G=8, hd=128, ffn=14336, V=128256, eps=1e-5, context=131072, tied=False,
        theta=5e5, scaling=(8.0, 1.0, 4.0, 64))


@with_llama3
def test_every_released_config_reads_the_same_from_both_spellings(tmp_path):
    """Refuses a reader that misses a field of a released model in either spelling."""
    old, new = from_llama3("llama3_configs.json").values()
    assert old.keys() == new.keys() and len(old) > 5
    for name, c in old.items():
        cfg, scaled = config_of(tmp_path, c), "Meta-Llama-3-" not in name
        assert cfg == config_of(tmp_path, new[name]) and (cfg.H, cfg.G, cfg.hd) == sizes(new[name])
        assert (cfg.L, cfg.D, cfg.ffn) == tuple(
            c[k] for k in ("num_hidden_layers", "hidden_size", "intermediate_size"))
        factor = new[name]["rope_parameters"].get("factor")
        assert cfg.theta == 5e5 and cfg.scaling == ((factor, 1.0, 4.0, 8192) if scaled else None)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_weights_arrive_unchanged_from_one_file_or_shards(tmp_path, stored, shards):
    """Refuses a loader that rounds, misplaces part of a fused matrix or miscounts its progress."""
    c, w = random_checkpoint(tmp_path, AS_5, dtype=stored, shards=shards)
    seen, total = [], sum(t.nbytes for t in w.values())
    model = llama.Llama.load(tmp_path, "cpu", torch.float64, lambda *now: seen.append(now))
    logits, _ = passes(model, model.cache(12), IDS, (12,))
    assert same(logits, reference(c, w, IDS)[0])
    assert len(set(seen)) == len(w) and seen == sorted(seen) and seen[-1] == (total, total)
    assert llama.Llama.load(tmp_path).dtype == torch.float32
    half = llama.Llama.load(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.head(half.embed).dtype == torch.float32


def test_rotary_frequencies_of_old_checkpoints_are_passed_over(tmp_path):
    """Refuses a loader that is strict about a buffer which follows from config.json."""
    _, w = random_checkpoint(tmp_path)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save({n: t.float() for n, t in w.items()} | extra, tmp_path / "model.safetensors",
         {"format": "pt"})
    assert llama.Llama.load(tmp_path)


@pytest.mark.parametrize("overrides", [AS_5, dict(tie_word_embeddings=True)], ids=["", "tied"])
def test_too_little_memory_is_said_before_any_is_taken(tmp_path, monkeypatch, overrides):
    """Refuses a need miscounted by a byte, and a check that comes after the allocation."""
    _, w = random_checkpoint(tmp_path, overrides)
    need, exists = sum(t.numel() for t in w.values()) * 4, os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda path: path != "/proc/meminfo" and exists(path))

    def memory(free):                                  # a system of `free` pages of one byte
        answers = dict(SC_PAGE_SIZE=1, SC_PHYS_PAGES=free)
        monkeypatch.setattr(os, "sysconf", answers.__getitem__, raising=False)
    memory(need)
    model = llama.Llama.load(tmp_path)
    memory(need - 1)
    with monkeypatch.context() as m:
        m.setattr(torch, "empty", None)
        assert "not enough memory on cpu" in complaint(llama.Llama.load, tmp_path)
    whole = model.cache(6)                             # far smaller than the weights
    memory(2 * whole.k.nbytes - 1)
    assert "a cache of 6 slots" in complaint(model.cache, 6)


# ---------------------------------------------------------------- tokenizer

META = "tokenizer.model"
DEMO_RANKS = Path(llama.__file__).parent / "demo" / META
PIECE = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
         r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
TEXTS = ["", " ", "   \n\n \n\t", "def f(x):\n\treturn  x ** 2  # why?\n\n\n", "\r\n\r\n x\r",
         "I'LL don't we've ſ's", "1234567 3.14 1e-5", "naïve Führer ½ ² 日本語 العربية नमस्ते",
         "🦙👩‍👩‍👧 ꙊéÉ e\u0301", "\0\x7f\u2028\u00a0\ufeff", "        self.assertEqual(None, ...)",
         "<|begin_of_text|>x<|eot_id|>", "a" * 500, "=" * 70 + "\n",
         DEMO_RANKS.with_name("train.py").read_text(encoding="utf-8")[:5000]]


def ranks_of(path):
    rows = map(bytes.split, path.read_bytes().splitlines())
    return {base64.b64decode(t): int(r) for t, r in rows}


def slow_encode(ranks, text):
    """Split; a known piece is one token; else join the pair of lowest rank, again and again."""
    out = []
    for piece in (p.encode() for p in regex.findall(PIECE, text)):
        parts = [piece] if piece in ranks else [bytes([b]) for b in piece]
        while len(parts) > 1:
            joined = [ranks.get(a + b, math.inf) for a, b in itertools.pairwise(parts)]
            k = joined.index(min(joined))
            if joined[k] == math.inf:
                break
            parts[k:k + 2] = [parts[k] + parts[k + 1]]
        out += [ranks[p] for p in parts]
    return out


def hugging_face(ranks, special, **changes):
    """tokenizer.json as Hugging Face writes it: bytes spelled GPT-2's way, ids as ranks."""
    same = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    others = (b for b in range(256) if b not in same)
    spell = {b: chr(b) for b in same} | {b: chr(256 + n) for n, b in enumerate(others)}
    vocab = {"".join(map(spell.get, t)): i for t, i in ranks.items()}
    split = dict(type="Split", pattern=dict(Regex=PIECE), behavior="Isolated", invert=False)
    return json.dumps(dict(
        added_tokens=[dict(id=i, content=name, special=True) for name, i in special.items()],
        pre_tokenizer=dict(type="Sequence", pretokenizers=[
            split, dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True,
                        use_regex=False)]),
        model=dict(type="BPE", ignore_merges=True, vocab=vocab, merges=[])) | changes)


@pytest.fixture
def folder(tmp_path):
    """A folder with the demo's ranks and nothing else."""
    shutil.copy(DEMO_RANKS, tmp_path)
    return tmp_path


def test_text_becomes_the_tokens_of_a_slow_tokenizer_and_comes_back(folder):
    """Refuses another split pattern or order of merges, and a round trip that loses a byte."""
    tok, ranks = llama.Tokenizer(folder), ranks_of(DEMO_RANKS)
    for text in TEXTS:
        assert tok.encode(text) == slow_encode(ranks, text) and tok.decode(tok.encode(text)) == text


def test_a_user_cannot_write_a_special_token(folder):
    """Refuses text that closes its own turn: the 256 special tokens lie behind the ranks."""
    tok = llama.Tokenizer(folder)
    assert sorted(tok.special.values()) == list(range(3840, 4096)) and tok.bos == 3840
    for name, i in tok.special.items():
        ids = tok.encode(f"a{name}b")
        assert max(ids) < 3840 and tok.decode(ids) == f"a{name}b" and tok.decode([i]) == name


def test_bytes_come_out_token_by_token(folder):
    """Refuses a decoder that spoils a character whose bytes are spread over tokens."""
    tok, text = llama.Tokenizer(folder), "🦙 ꙊéÉ 日本"
    ids = tok.encode(text)
    assert b"".join(tok.decode_bytes([i]) for i in ids) == text.encode()
    assert tok.decode(ids[:1]) == "\ufffd"
    assert all(str(i) in complaint(tok.decode, [i]) for i in (-1, 4096, 2 ** 40))


def test_tokenizer_json_and_the_original_folder_give_the_same_ids(folder):
    """Refuses a wrong spelling of bytes, a lost special token, a download of only one file."""
    tok, ranks = llama.Tokenizer(folder), ranks_of(DEMO_RANKS)
    (folder / "original").mkdir()
    (folder / META).rename(folder / "original" / META)
    original = llama.Tokenizer(folder)
    (folder / "original" / META).unlink()
    (folder / "tokenizer.json").write_text(hugging_face(ranks, tok.special))
    theirs = llama.Tokenizer(folder)
    for other in (original, theirs):
        assert other.special == tok.special and other.bos == 3840
        assert all(other.encode(t) == tok.encode(t) for t in TEXTS)
        assert other.decode_bytes(range(4096)) == tok.decode_bytes(range(4096))


def test_a_changed_file_at_the_same_path_is_read_again(folder):
    """Refuses a reader that keeps files by a hash of their path, as tiktoken's own does."""
    path, a = folder / META, llama.Tokenizer(folder).encode("a")
    path.write_bytes(path.read_bytes().replace(b"YQ==", b"?").replace(b"Yg==", b"YQ==")
                     .replace(b"?", b"Yg=="))          # a and b change places
    assert llama.Tokenizer(folder).encode("b") == a == [ranks_of(DEMO_RANKS)[b"a"]]


def test_a_chat_is_spelled_as_the_instruct_models_were_trained(folder):
    """Refuses a missing header or end of turn, content not stripped, a user who ends a turn."""
    tok = llama.Tokenizer(folder)
    ids = tok.chat([dict(role="system", content="Be brief."),
                    dict(role="user", content="  Hi<|eot_id|>!\n ")])
    assert tok.decode(ids) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>!<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n")
    assert [i - 3840 for i in ids if i >= 3840] == [0, 6, 7, 9, 6, 7, 9, 6, 7]


@pytest.mark.parametrize("generation, model, want", [
    ([3841, 3849], 3841, (3841, 3849)), (..., 3849, (3849,)), (..., [1, 2], (1, 2)), (0, 5, (0,)),
    (None, 7, (7,)), (..., ..., ())])
def test_stop_tokens_come_from_generation_config_else_config(folder, generation, model, want):
    """Refuses an Instruct model that never stops, and token 0 read as none."""
    for name, ids in (("generation_config.json", generation), ("config.json", model)):
        if ids is not ...:                             # None: the file is there and does not say
            (folder / name).write_text(json.dumps(dict(eos_token_id=ids)))
    assert llama.stop_ids(folder) == llama.Tokenizer(folder).stop_ids == want


@with_llama3
def test_published_vectors_conversations_and_special_tokens():
    """Refuses a tokenizer that differs from two independent ones on Meta's ranks. Those two let
    text spell special tokens, so it is cut there."""
    tok = llama.Tokenizer(LLAMA3)
    assert tok.special == from_llama3("special_tokens.json")["llama3"] and tok.bos == 128000
    assert all(tok.chat(v["messages"]) == v["ids"] for v in from_llama3("chat_vectors.json"))
    special = {**tok.special, "<|eom_id|>": 128008}    # its name since 3.1
    cut = re.compile(f"({'|'.join(map(re.escape, special))})")
    vectors = from_llama3("llama_cpp_vectors.json") + from_llama3("tokenizer_js_vectors.json")
    assert len(vectors) > 50
    for v in vectors:
        parts = cut.split(v["text"])
        ids = [[special[p]] if p in special else tok.encode(p) for p in parts]
        assert sum(ids, []) == v["ids"] and tok.decode(tok.encode(v["text"])) == v["text"]


# ---------------------------------------------------------------- whatever is wrong is one line

def put(name, content=None, instead_of=()):
    """A function that writes a file into a folder, or takes one away."""
    def harm(folder):
        for other in instead_of or [name]:
            (folder / other).unlink()
        if content is not None:
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return harm


def tensors(edit):
    """... that has one file of edited weights instead of the shards."""
    def harm(folder):
        (folder / INDEX).unlink()
        w = {name: t.float() for name, t in random_checkpoint(folder)[1].items()}
        edit(w)
        save(w, folder / "model.safetensors", {"format": "pt"})
    return harm


def put_json(text):
    return put("tokenizer.json", text, instead_of=[META])


def index(**changes):
    """... that changes what the index says; None takes a name away."""
    def harm(folder):
        said = json.loads((folder / INDEX).read_text())["weight_map"] | changes
        said = {name: file for name, file in said.items() if file is not None}
        (folder / INDEX).write_text(json.dumps(dict(weight_map=said)))
    return harm


def cut_short(folder):
    """... that ends a tokenizer.model between two lines."""
    configure(bos_token_id=3840)(folder)
    (folder / META).write_bytes(b"".join((folder / META).read_bytes().splitlines(True)[:3000]))


K, NORM = "model.layers.0.self_attn.k_proj.weight", "model.norm.weight"
SHARD = "model-2-of-2.safetensors"
BYTES = {bytes([b]): b for b in range(256)}
BROKEN = [
    (configure(model_type="mistral"), "model_type 'mistral'"),
    (configure(architectures=["LlamaForSequenceClassification"]), "SequenceClassification"),
    (configure(rope_scaling=dict(type="linear", factor=2.0)), "rope type 'linear'"),
    (configure(rope_scaling=dict(rope_type="dynamic", factor=2.0)), "rope type 'dynamic'"),
    (configure(rope_parameters=dict(rope_type="yarn", rope_theta=1e4)), "rope type 'yarn'"),
    (configure(rope_scaling=dict(rope_type="llama3", factor=8)), "'low_freq_factor' is missing"),
    (configure(partial_rotary_factor=0.5), "partial_rotary_factor"),
    (configure(attention_bias=True), "attention_bias"), (configure(mlp_bias=True), "mlp_bias"),
    (configure(quantization_config=dict(bits=4)), "quantization_config"),
    (configure(hidden_act="gelu"), "= 'gelu'"), (configure(model_type=...), "model_type None"),
    *[(configure(**{k: ...}), f"'{k}' is missing") for k in (
        "hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size",
        "intermediate_size")],
    (configure(hidden_size="wide"), "a number was"), (configure(rope_theta=[1]), "a number was"),
    (configure(num_hidden_layers=None), "missing"), (configure(vocab_size=-1), "a number was"),
    (configure(num_attention_heads=0), "a number was"), (configure(head_dim=7), "do not fit"),
    (configure(num_key_value_heads=3), "do not fit"), (put("config.json"), "no such file"),
    (put("config.json", "{]"), "cannot be read"), (put("config.json", "[1]"), "a JSON object"),
    (put("config.json", b"\xff\xfe"), "cannot be read"),
    (configure(rope_scaling="yarn"), "rope_scaling"), (configure(vocab_size=math.inf), "a number"),
    (configure(rope_scaling=dict(factor=8.0)), "rope type None"),
    (configure(rope_parameters=dict(full_attention=dict(rope_theta=1.0))), "'full_attention'"),
    (configure(hidden_size=10 ** 400), "a number"), (configure(rope_theta=1e308), "a number"),

    (tensors(lambda w: w.pop(NORM)), f"weights missing: {NORM}"),
    (tensors(lambda w: [w.pop(n) for n in list(w) if "layers.1." in n]), "and 6 more"),
    (tensors(lambda w: w.update(extra=torch.ones(2))), "not part of this model: extra"),
    (tensors(lambda w: w.update({NORM: torch.ones(31)})), f"{NORM}: shape [31], but config"),
    (tensors(lambda w: w.update({NORM: torch.ones(1)})), f"{NORM}: shape [1], but config"),
    (tensors(lambda w: w.update({K: w[K].T.contiguous()})), f"{K}: shape [32, 16]"),
    (tensors(lambda w: w.update({K: w[K].to(torch.int8)})), f"{K}: weights of type I8"),
    (tensors(lambda w: w.update({K: w[K].double()})), f"{K}: weights of type F64"),
    (put(SHARD), f"{SHARD}: this shard is missing"), (put(SHARD, ""), f"{SHARD}: broken or cut"),
    (lambda d: os.truncate(d / SHARD, (d / SHARD).stat().st_size - 9), f"{SHARD}: broken or cut"),
    (put(SHARD, "<html>404</html>"), f"{SHARD}: broken or cut"),
    (index(**{K: SHARD}), "that the index does not name"),
    (index(**{NORM: None}), f"weights missing: {NORM}"), (index(**{NORM: 7}), "no weight_map"),
    (put(INDEX, "{}"), "no weight_map"), (put(INDEX), "neither model.safetensors nor"),

    (put(META), "no tokenizer.model"), (put(META, b"\x0a<unk>\x15\x00"), "not a tokenizer.model"),
    (put(META, ""), "ranks are not 0, 1"), (put(META, "IQ== 0\nIg== 2\n"), "ranks are not 0, 1"),
    (put(META, "IQ== 0\nIQ== 1\n"), "ranks are not"), (put(META, "I!Q== 0\n"), "base64 and rank"),
    (put(META, "IQ== one\n"), "base64 and rank"), (put_json("{"), "cannot be read"),
    (put_json("{}"), "not a byte-level tokenizer"),
    (put_json(hugging_face(BYTES, {}, pre_tokenizer=None)), "not a byte-level tokenizer"),
    (put_json(hugging_face(BYTES, {}).replace('"\\u0100"', '"\\u2581"')), "not a byte-level tok"),
    (put_json(hugging_face(BYTES, {}).replace("{1,3}", "{1,2}")), "or split pattern"),
    (put_json(hugging_face(BYTES, {}).replace('"BPE"', '"Unigram"')), "model Unigram"),
    *[(put_json(hugging_face(BYTES, {}, **change)), "or split pattern") for change in (
        dict(normalizer=dict(type="Lowercase")), dict(pre_tokenizer=dict(
            type="Split", pattern=dict(Regex=PIECE), behavior="Isolated", invert=False)))],
    *[(put_json(hugging_face(BYTES, {}).replace(right, wrong)), "or split pattern")
      for right, wrong in (("Isolated", "Removed"), ('space": false', 'space": true'))],
    (put_json(hugging_face(BYTES, dict(zip(llama.NAMED.values(), range(2 ** 32, 2 ** 33))))),
     "tiktoken refuses it"),
    (cut_short, "cut short or another model's"),
    (put(META, "IQ== 0\n"), "a single byte has none"),
    (put_json(hugging_face({**BYTES, b"ab": 255}, {})), "ranks are not 0, 1"),
    (put_json(hugging_face({**BYTES, b"ab": "x"}, {})), "ranks are not 0, 1"),
]


@pytest.mark.parametrize("harm, said", BROKEN)
def test_what_is_wrong_with_a_folder_is_named_in_one_line(folder, harm, said):
    """Refuses a traceback, a setting silently ignored, strict=False, a trusted index."""
    def use():
        return llama.Tokenizer(folder).encode("hello"), llama.Llama.load(folder)
    random_checkpoint(folder, shards=2)
    assert all(use())                                  # it was whole before
    harm(folder)
    assert said in complaint(use)


# ============================================================================== clasp_mini.py

@pytest.fixture
def run(capsys):
    """run(*arguments) -> (exit status, stdout, stderr), in this process."""
    def call(*arguments):
        try:
            status = clasp_mini.main(["--device", "cpu", *map(str, arguments)])
        except SystemExit as e:                        # argparse ends by itself
            status = e.code
        out = capsys.readouterr()
        return status, out.out, out.err
    return call


@pytest.fixture
def result(run):
    """result(*arguments) -> the object that --json prints."""
    def call(*arguments):
        status, out, err = run(*arguments, "--json")
        assert status == 0 and err == "" and out.count("\n") == 1
        return json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    return call


def process(*arguments, **options):
    """The command in a process of its own."""
    command = [sys.executable, ROOT / "clasp_mini.py", "--device", "cpu", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


SHORT = ("--max-new-tokens", 24)
LONG = ("--prompt", "x = ", "--max-new-tokens", 1000, "--temperature", 1, "--strategy", "ar")
QUESTIONS = (DEMO / "prompts.jsonl").read_text(encoding="utf-8").splitlines()


def test_clasp_writes_what_plain_decoding_writes(result):
    """Refuses a demo on which greedy text depends on the strategy: every fourth prompt of the bench
    set, in float32."""
    for line in QUESTIONS[::4]:
        prompt = ("--prompt", json.loads(line)["turns"][0], *SHORT)
        clasp, plain = result(*prompt), result(*prompt, "--strategy", "ar")
        assert clasp["ids"] == plain["ids"] and clasp["text"] == plain["text"]
        assert clasp["stats"]["drafted"] > 0 == plain["stats"]["drafted"]


def test_text_alone_is_on_standard_output_and_one_summary_on_standard_error(run, result):
    """Refuses a prompt, a newline, a colour or a figure in what a pipe receives."""
    status, out, err = run("--prompt", "def f(x):", *SHORT)
    assert status == 0 and out == result("--prompt", "def f(x):", *SHORT)["text"]
    assert err.count("\n") == 1 and "tokens/s" in err and "\033" not in out + err


def test_json_is_one_object_with_the_documented_fields(result):
    """Refuses a field that is missing or does not mean what the README says."""
    sampled = (*SHORT, "--temperature", 1, "--seed", 5, "--skip-layers", 20)
    r = result("--prompt", "class A:", *sampled)
    assert r.keys() == {"prompt_ids", "ids", "text", "settings", "stats"}
    assert r["stats"].keys() >= {"drafted", "accepted", "emitted", "verifies", "seconds",
                                 "tokens_per_second"}
    assert r["stats"]["emitted"] == len(r["ids"]) and r["settings"]["M"] == 20
    ids = ",".join(map(str, r["prompt_ids"]))
    assert result("--prompt-ids", ids, *sampled)["ids"] == r["ids"]


def test_figures_count_each_thing_once():
    """Refuses a prefill counted as decoding, a token counted twice, a wrong ideal; by hand: a
    prefill, a round of 3 drafted with 2 kept, one of 2 with both kept."""
    def a_round(drafted, accepted, emitted, seconds, choice=None):
        verdict = speculative.Verdict([], [], [], accepted, emitted[-1])
        return speculative.Round(0, (True, False), drafted, [], verdict, emitted, choice, seconds)

    f = clasp_mini.figures([a_round([], 0, [7], (0, 1.0, 0.5), "set"),
                            a_round([1, 2, 3], 2, [1, 2, 9], (0.3, 0.2, 0)),
                            a_round([4, 5], 2, [4, 5, 6], (0.2, 0.3, 0.5), "set")])
    want = dict(drafted=5, accepted=4, emitted=7, verifies=2, tokens_per_verify=3, acceptance=0.8,
                seconds=3.0, decode_seconds=2.0, tokens_per_second=3.0, draft_step_seconds=0.1,
                verify_seconds=0.25, optimise_seconds=0.5, optimisations=2)
    assert {k: f[k] for k in want} == pytest.approx(want) and f["skip_set"] == [0]
    assert f["shares"] == pytest.approx(dict(draft=0.25, verify=0.25, optimise=0.5))
    assert clasp_mini.ideal_speedup(f, dict(verify_seconds=0.2)) == pytest.approx(6 / (5 / 2 + 2))


def test_compare_reports_speed_ideal_and_equality(run, result):
    """Refuses a comparison of one side with itself, and equality claimed of two samples."""
    few = ("--prompt", "def f(x):", "--max-new-tokens", 16, "--compare", "--repeats", 2)
    r = result(*few)
    assert r["equal"] is True and r["speedup"] > 0 and r["ideal_speedup"] > 0
    assert r["stats"]["drafted"] > 0 == r["plain_stats"]["drafted"]
    assert result(*few, "--temperature", 1)["equal"] is None
    status, out, _ = run(*few)
    assert status == 0 and "speed-up" in out and re.search("^texts +equal$", out, re.M)


def test_bench_has_a_line_per_category_and_leaves_out_what_does_not_fit(run, tmp_path):
    """Refuses a category that is lost, and one long question that ends all."""
    some, path = QUESTIONS[::5], tmp_path / "some.jsonl"
    path.write_text("\n".join([*some, json.dumps(dict(category="long", turns=["x " * 2000]))]))
    status, out, err = run("--bench", path, "--max-new-tokens", 12)
    names = [json.loads(line)["category"] for line in some]
    assert [line[:16].strip() for line in out.splitlines()] == ["category", *names, "overall"]
    assert status == 0 and err.count("\n") == 1 and "question 6 left out" in err


def test_bench_reads_every_file_that_is_json_by_lines(run, tmp_path):
    """Refuses lines cut at U+2028, a byte order mark taken for text, and turns taken apart."""
    path = tmp_path / "odd.jsonl"
    path.write_text('\ufeff{"category": "a", "turns": ["x\u2028y"]}\r\n\n', encoding="utf-8")
    assert run("--bench", path, "--max-new-tokens", 4)[0] == 0
    for wrong in ('{"category": "a", "turns": "xy"}', '{"category": "overall", "turns": ["x"]}'):
        path.write_text(wrong)
        status, out, err = run("--bench", path)
        assert status == 2 and out == "" and "Spec-Bench" in err and err.count("\n") == 1


def test_a_model_whose_numbers_overflow_writes_no_text(run, tmp_path):
    """Refuses token 0, which is the argmax of what is not a number, for an answer."""
    _, w = random_checkpoint(tmp_path)
    w = {name: t.float() for name, t in w.items()}
    w["model.layers.1.input_layernorm.weight"][0] = 1e30
    save(w, tmp_path / "model.safetensors", {"format": "pt"})
    for how in ((), ("--strategy", "ar", "--temperature", 1), ("--trace", tmp_path / "t")):
        status, out, err = run("--model", tmp_path, "--prompt-ids", "1,2", *how)
        assert (status, out, err.count("\n")) == (1, "", 1) and "not finite" in err


PASSES = ("--bench-passes", "--max-new-tokens", 8, "--repeats", 1)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The command as it is with a GPU, its graphs repeated by calling what they recorded."""
    class Job(clasp_mini.Job):
        graphs = property(lambda self: not self.a.eager, lambda self, value: None)
    monkeypatch.setattr(clasp_mini, "Job", Job)
    monkeypatch.setattr(clasp_mini, "fusing", lambda device: lambda f: f)
    monkeypatch.setattr(llama.Replay, "record", rerun)


def test_the_command_says_the_same_with_recorded_passes_as_without(as_on_a_gpu, result):
    """Refuses a chooser, a draft length or a budget that does not reach the recorded passes."""
    for how in (("--temperature", 1, "--seed", 4), ("--skip-layers", 0), ("--strategy", "ar")):
        arguments = ("--prompt", "class Stack:", *SHORT, *how)
        graphs, eager = result(*arguments), result(*arguments, "--eager")
        assert graphs["settings"]["graphs"] and not eager["settings"]["graphs"]
        assert graphs["ids"] == eager["ids"]
        for name in ("drafted", "accepted", "verifies", "skip_set"):
            assert graphs["stats"][name] == eager["stats"][name], name


def test_a_trace_of_recorded_passes_checks_clean(as_on_a_gpu, tmp_path, capsys):
    """Refuses a trace of another chooser than the one that ran, or without its table."""
    path = str(tmp_path / "t")
    assert clasp_mini.main(["--prompt", "x = ", "--max-new-tokens", "12", "--trace", path]) == 0
    assert check_trace.main([path]) == 0 and '"optimise"' in Path(path).read_text()


@pytest.mark.parametrize("recorded", [False, True])
def test_bench_passes_counts_the_bytes_each_pass_must_read(tmp_path, run, result, request,
                                                           recorded):
    """Refuses bytes that are not those of the weights and the cache, a pass left out, and ratios
    that are not those of the times."""
    if recorded:
        request.getfixturevalue("as_on_a_gpu")
    random_checkpoint(tmp_path, dict(num_hidden_layers=8, max_position_embeddings=100))
    r = result("--model", tmp_path, *PASSES, "--draft-length", 2, "--skip-layers", 3)
    c, t, p = llama.Config.load(tmp_path), r["context"], r["passes"]
    layer = 4 * (c.D * 2 * c.hd * (c.H + c.G) + 3 * c.D * c.ffn + 2 * c.D + 2 * t * c.G * c.hd)
    want = {"plain step": 8 * layer, "layer optimisation, M = 3": 7 * layer}
    want |= {f"draft step, {m} of 8 skipped": (8 - m) * layer for m in (2, 3, 4, 6)}
    want |= {f"verify, {T} rows": 8 * layer for T in (1, 3, 4, 8, 16)}
    head = 4 * c.V * c.D
    for name, size in want.items():
        v = p.pop(name)
        assert v["bytes"] == size + (head if "layer" not in name else 0), name
        assert v["bytes_per_second"] == pytest.approx(v["bytes"] / v["seconds"])
    assert list(p) == ["copy of memory"] and p["copy of memory"]["of_copy"] == 1 and t == 92
    assert (r["outside_passes"] is not None) == recorded and r["settings"]["graphs"] == recorded
    status, out, err = run("--model", tmp_path, *PASSES)
    assert (status, err) == (0, "") and "verify, 7 rows" in out
    assert ("outside the passes" in out) == recorded
    assert result("--model", tmp_path, *PASSES, "--skip-layers", 0)["outside_passes"] is None


def test_where_nothing_can_be_compiled_a_line_says_so_and_plain_kernels_run(monkeypatch, capsys):
    """Refuses a traceback, or silence, where a compiler is missing."""
    def fails(f, **_):
        def call(*_):
            raise RuntimeError("no compiler here\nand much more")
        return call
    monkeypatch.setattr(torch, "compile", fails)
    f = clasp_mini.fusing(torch.device("cpu"))
    assert f(abs) is abs
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "no compiler here" in err and "much more" not in err


def test_verbose_shows_a_line_per_round_with_a_bar_of_all_layers(run, result):
    """Refuses a bar of another skip set and rounds that are not shown."""
    _, out, err = run("--prompt", "import os\n", *SHORT, "--verbose")
    r = result("--prompt", "import os\n", *SHORT)
    *rounds, _ = err.splitlines()
    assert len(rounds) == r["stats"]["verifies"] + 1 and out == r["text"]
    assert all(re.match(r" *\d+ [█░]{32} ", line) for line in rounds)
    assert rounds[1].count("░") == r["settings"]["M"]


def test_colours_of_the_command_are_for_terminals_and_never_with_no_color(monkeypatch):
    """Refuses escape codes where none are wanted, and cells that an encoding does not have."""
    class Screen:
        encoding = "utf-8"

        def isatty(self):
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert clasp_mini.Terminal(Screen()).paint("kept", "x") == "\033[32mx\033[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert clasp_mini.Terminal(Screen()).paint("kept", "x") == "x"
    Screen.encoding = "ascii"
    assert clasp_mini.Terminal(Screen()).bar((False, True)) == "#."


def test_a_character_split_over_tokens_is_shown_when_it_is_whole():
    """Refuses decoding token by token, which shows U+FFFD for every half."""
    tok, text = llama.Tokenizer(DEMO), "naïve 🦙 日本"
    ids, stream = tok.encode(text), clasp_mini.Text(tok, ())
    parts = [stream.add([i]) for i in ids]
    assert "" in parts and "".join(parts) + stream.add([], final=True) == text
    assert clasp_mini.Text(tok, ()).add(ids[:-1], final=True).endswith("\ufffd")


def test_prompt_ids_need_no_tokenizer_and_get_nothing_added(run, result, tmp_path):
    """Refuses a begin-of-text that nobody asked for, and a tokenizer that nobody needs."""
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(DEMO / name)
    few = ("--model", tmp_path, "--max-new-tokens", 4)
    r = result(*few, "--prompt-ids", "3840,5,6")
    assert r["prompt_ids"] == [3840, 5, 6] and r["text"] is None
    assert run(*few, "--prompt-ids", "3840,5,6")[:2] == (0, ",".join(map(str, r["ids"])))
    status, _, err = run(*few, "--prompt", "x")
    assert status == 1 and "tokenizer" in err and err.count("\n") == 1


def test_the_prompt_can_come_through_a_pipe():
    """Refuses - read as a prompt, and anything but the object on a --json run's streams."""
    p = process("--prompt", "-", "--max-new-tokens", 5, "--json", stdin=subprocess.PIPE)
    out, err = p.communicate(b"def f(x):", timeout=60)
    assert p.returncode == 0 and err == b""
    assert json.loads(out)["prompt_ids"][1:] == llama.Tokenizer(DEMO).encode("def f(x):")


def test_a_reader_that_leaves_early_is_no_fault():
    """Refuses the traceback that `| head` would show."""
    p = process(*LONG)
    p.stdout.read(1)
    p.stdout.close()
    err = p.stderr.read()
    assert p.wait(60) == 141 and b"Traceback" not in err and b"Exception" not in err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("mode", [[], ["--json"]], ids=["text", "json"])
def test_output_that_cannot_be_written_is_said_in_one_line(mode):
    """Refuses a traceback, and success reported for a text that is lost."""
    with open("/dev/full", "w") as full:
        command = [sys.executable, str(ROOT / "clasp_mini.py"), "--prompt", "x", *mode]
        p = subprocess.run([*command, "--max-new-tokens", "4"], stdout=full, stderr=subprocess.PIPE)
    assert p.returncode == 1 and p.stderr.count(b"\n") == 1 and b"cannot be written" in p.stderr


def test_ctrl_c_ends_with_the_summary_so_far():
    """Refuses a traceback, a lost summary and an exit status of success."""
    p = process(*LONG)
    p.stdout.read(1)
    time.sleep(0.1)
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=60)
    assert p.returncode == 130 and b"Traceback" not in err and b"tokens" in err


WRONG_INPUTS = [        # arguments, exit status, what is said
    (["--prompt", ""], 2, "empty"), (["--prompt-ids", "1,x"], 2, "whole numbers"),
    (["--prompt-ids", "4096"], 2, "vocabulary"), (["--prompt-ids", "-1"], 2, "vocabulary"),
    (["--prompt-ids", ","], 2, "empty"), ([], 2, "--prompt"),
    (["--prompt", "x", "--prompt-ids", "1"], 2, "not allowed"),
    (["--prompt", "x", "--system", "y"], 2, "--chat"),
    (["--prompt", "x", "--model", "/nowhere"], 1, "no such folder"),
    (["--prompt", "x", "--device", "abacus"], 2, "abacus"),
    (["--prompt", "x", "--device", "cuda:77"], 2, "cuda:77"),
    (["--prompt", "x", "--skip-layers", 33], 2, "32 layers"),
    (["--prompt", "x", "--draft-length", -1], 2, "draft-length"),
    (["--prompt", "x", "--draft-exit-threshold", 1.5], 2, "threshold"),
    (["--prompt", "x", "--interval", 0], 2, "interval"), (["--prompt", " " * 10 ** 5], 2, "blanks"),
    (["--prompt", "x", "--model", "a\nb"], 1, "a\\nb: no such folder"),
    (["--prompt", "x", "--temperature", -1], 2, "temperature"),
    (["--prompt", "x", "--temperature", "nan"], 2, "temperature"),
    (["--prompt", "x", "--top-p", 0], 2, "top-p"), (["--prompt", "x", "--top-k", -3], 2, "top-k"),
    (["--prompt", "x", "--seed", 2 ** 70], 2, "seed"),
    (["--prompt", "x", "--threads", 10 ** 12], 2, "threads"),
    (["--prompt", "x", "--max-new-tokens", 0], 2, "max-new-tokens"),
    (["--prompt", "x", "--max-new-tokens", 99999], 2, "1024"),
    (["--prompt", "x", "--dtype", "int3"], 2, "int3"), (["--prompt", "\udc80"], 2, "UTF-8"),
    (["--prompt", "x", "--compare", "--repeats", 0], 2, "repeats"),
    (["--prompt", "x", "--compare", "--max-new-tokens", 1], 2, "nothing to compare"),
    (["--prompt", "x", "--compare", "--strategy", "ar"], 2, "plain decoding"),
    (["--bench", "/nowhere.jsonl"], 2, "nowhere"),
    (["--bench", DEMO / "config.json"], 2, "Spec-Bench"),
    (["--prompt", "x", "--trace", "/nowhere/t"], 2, "/nowhere/t: cannot be written"),
    (["--prompt", "x", "--trace", DEMO / "model.safetensors"], 2, "model's folder"),
    (["--bench-passes", "--chat"], 2, "--chat goes with"),
    (["--bench-passes", "--trace", "t"], 2, "without --compare"),
    (["--bench-passes", "--max-new-tokens", "5000"], 2, "1023 fit"),
    (["--bench-passes", "--compare"], 2, "goes with a prompt"),
    (["--prompt", "x", "--trace", "t", "--compare"], 2, "without --compare"),
    (["--bench", "b", "--dump-forward", "d"], 2, "without --compare"),
    (["--prompt", "x", "--dump-forward", "d", "--trace", "t"], 2, "without --trace"),
    (["--prompt", "x", "--dump-forward", "d", "--json"], 2, "without --trace, --json"),
    (["--prompt", "x", "--dump-forward", "/nowhere/d"], 2, "/nowhere/d: cannot be written"),
    (["--prompt", "x", "--dump-forward", os.devnull], 2, "not a regular file"),
    (["--prompt", "x", "--skip", "3"], 2, "--skip goes with --dump-forward"),
    (["--prompt", "x", "--dump-forward", "d", "--skip", "3,x"], 2, "layer numbers wanted"),
    (["--prompt", "x", "--dump-forward", "d", "--skip", ""], 2, "layer numbers wanted"),
    (["--prompt", "x", "--trace", ""], 2, "cannot be written"),
    (["--prompt", "x", "--dump-forward", "d", "--skip", "3,32"], 2, "layer 32"),
    (["--prompt", "x", "--dump-forward", "d", "--skip", "3,4,3"], 2, "layer 3 is named twice")]


@pytest.mark.parametrize("arguments, status, said", WRONG_INPUTS)
def test_wrong_input_gets_one_clear_line(run, arguments, status, said):
    """Refuses a traceback, a guess, and an error that does not name what is wrong."""
    got, out, err = run(*arguments)
    lines = [line for line in err.splitlines() if not line.startswith(("usage:", " "))]
    assert got == status and out == "" and len(lines) == 1
    assert lines[0].startswith("clasp_mini.py: ") and said in lines[0]


def test_memory_is_checked_before_it_is_taken(run, monkeypatch):
    """Refuses a load that the system's killer would end."""
    read = Path.read_text
    monkeypatch.setattr(llama.Path, "read_text", lambda self, **how: "MemAvailable: 10 kB\n"
                        if self.name == "meminfo" else read(self, **how))
    monkeypatch.setattr(os.path, "exists", lambda path: True)
    status, out, err = run("--prompt", "x")
    assert status == 1 and out == "" and "not enough memory" in err and err.count("\n") == 1


def test_help_and_version(run):
    """Refuses a help text that argparse cannot print."""
    status, out, _ = run("--help")
    assert status == 0 and all(f in out for f in ("--prompt", "--skip-layers", "--json"))
    assert run("--version")[1] == f"clasp-mini {clasp_mini.VERSION}\n"


def test_the_readme_names_only_flags_and_tests_that_exist():
    """Refuses a command in the README that does not run, and a -k that selects nothing."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = [line for line in readme.splitlines() if "clasp_mini.py" in line]
    flags = {flag for line in lines for flag in re.findall(r"(?<=\s)--[a-z-]+", line)}
    assert flags and flags <= set(re.findall(r"--[a-z-]+", clasp_mini.parser().format_help()))
    words = [w for k in re.findall(r'-k "?([a-z_ ]+?)["`)]', readme) for w in k.split(" or ")]
    names = " ".join(name for name in globals() if name.startswith("test_"))
    assert len(words) > 5 and [w for w in words if w not in names] == []


def test_the_library_example_of_the_readme_runs(monkeypatch, capsys):
    """Refuses an example that has drifted from the code."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", readme, re.S)
    monkeypatch.chdir(ROOT)
    exec(example[1], {})
    assert len(capsys.readouterr().out.splitlines()) > 3


# ============================================================================== oracle/
# Traces are written by the command and judged by the checker's own `main`. Most are of a random
# model of five layers, whose seeds are looked for until all that can happen in a round happens.

@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("oracle")
    random_checkpoint(folder, dict(num_hidden_layers=5))
    return folder


@pytest.fixture
def check(capsys, random_model, tmp_path):
    """check(lines or bytes, *arguments) -> (exit status, stdout, stderr) of the checker."""
    def call(lines, *arguments, model=random_model):
        path = tmp_path / "checked.jsonl"
        if not isinstance(lines, bytes):
            lines = "".join(json.dumps(line) + "\n" for line in lines).encode()
        path.write_bytes(lines)
        capsys.readouterr()
        status = check_trace.main([str(path), "--model", str(model), *map(str, arguments)])
        out = capsys.readouterr()
        return status, out.out.replace(f"{path}: ", ""), out.err
    return call


def traced(folder, path, *arguments):
    """The lines of a trace, without those of times."""
    assert clasp_mini.main(["--model", str(folder), "--device", "cpu", "--trace", str(path),
                            *map(str, arguments)]) == 0
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line["event"] != "times"]


def find(lines, event, n=0, **want):
    """The index of the n-th such line; a wanted value may be a function that says yes."""
    fit = [i for i, line in enumerate(lines) if line["event"] == event and all(
        w(line[k]) if callable(w) else line[k] == w for k, w in want.items())]
    return fit[n] if fit[n:] else None


FOURTH = dict(step=3, confidence=lambda c: c > 0.06, round=lambda n: n < 4)    # K ends the draft
SITUATIONS = [("own", dict(kind="residual")), ("own", dict(kind="bonus")),
              ("optimise", dict(round=3)), ("verify", dict(accepted=None)),
              ("draft", FOURTH), ("verify", dict(accepted=True, a=lambda a: a < 0.9))]
LIVELY = ("--max-new-tokens", 24, "--skip-layers", 2, "--draft-length", 4, "--interval", 3,
          "--draft-exit-threshold", 0.05, "--temperature", 0.5, "--prompt-ids", "3,41,7")


@pytest.fixture(scope="module")
def lively(random_model, tmp_path_factory):
    """The lines of a sampled trace in which everything happens."""
    path = tmp_path_factory.mktemp("lively") / "t"
    for seed in range(50):
        lines = traced(random_model, path, *LIVELY, "--seed", seed)
        if all(find(lines, event, **want) is not None for event, want in SITUATIONS):
            return lines
    raise AssertionError("50 seeds without a lively run")


# ---------------------------------------------------------------- what is right passes

@pytest.mark.parametrize("sampled", [[], ["--temperature", 1, "--top-k", 40, "--top-p", 0.9]],
                         ids=["greedy", "sampled"])
def test_a_trace_of_the_demo_checks_clean_in_its_precision_and_in_a_wider_one(
        sampled, check, tmp_path, random_model):
    """Refuses a checker that raises false alarms, and a tolerance below what rounding does."""
    lines = traced(DEMO, tmp_path / "t", "--prompt", "class A:", "--max-new-tokens", 24, *sampled)
    for dtype in ("float32", "float64"):
        status, out, err = check(lines, "--dtype", dtype, model=DEMO)
        assert (status, err) == (0, "") and re.match("no departure in [0-9]+ rounds, 24 tok", out)


@pytest.mark.parametrize("flags", [
    ("--temperature", 1, "--top-k", 5), ("--temperature", 0.7, "--top-p", 0.6), (),
    ("--temperature", 1, "--draft-length", 0), ("--temperature", 1, "--skip-layers", 0),
    ("--temperature", 1, "--skip-layers", 5, "--interval", 1), ("--dtype", "float64"),
    ("--dtype", "bfloat16", "--temperature", 0.9, "--top-k", 7), ("--strategy", "ar"),
    ("--dtype", "bfloat16", "--temperature", 0.6), ("--prompt-ids", "3,41,7," * 200)],
    ids=lambda flags: " ".join(map(str, flags))[:40])
def test_traces_check_clean_at_every_setting(flags, check, tmp_path, random_model):
    """Refuses a rule that is too strict for some sampler, K, M, dtype or long prompt."""
    base = ("--prompt-ids", "3,41,7", "--max-new-tokens", 30, "--draft-length", 4)
    lines = traced(random_model, tmp_path / "t", *base, *flags, "--seed", 1)
    assert check(lines)[::2] == check(lines, "--dtype", "float64")[::2] == (0, "")


def test_the_trace_that_is_corrupted_below_is_clean_and_lively(check, lively):
    """Refuses a table of corruptions whose every line fails for another reason."""
    assert check(lively)[::2] == (0, "")
    assert check(lively, "--dtype", "float64")[::2] == (0, "")


def test_one_seed_gives_the_same_bytes_but_for_the_times(random_model, tmp_path):
    """Refuses a date, an address or an unordered set in a trace."""
    texts = []
    for name in ("a", "b"):
        traced(random_model, tmp_path / name, *LIVELY)
        lines = (tmp_path / name).read_bytes().splitlines()
        texts.append([line for line in lines if b'"event":"times"' not in line])
        assert len(lines) > len(texts[-1])
    assert texts[0] == texts[1]


def test_tracing_changes_no_token(result, random_model, tmp_path):
    """Refuses a recording that draws, or asks chance, once more."""
    said = result("--model", random_model, *LIVELY)
    lines = traced(random_model, tmp_path / "t", *LIVELY)
    assert [i for x in lines if x["event"] == "emit" for i in x["tokens"]] == said["ids"]
    assert lines[0]["prompt_ids"] == said["prompt_ids"]


def test_a_trace_keeps_no_distributions(random_model, tmp_path):
    """Refuses a log that grows with the run: the vectors of p and q must go with their round."""
    model, sizes = llama.Llama.load(random_model), []
    with open(tmp_path / "t", "w") as out:
        for n, _ in enumerate(trace.record(model, [3], Settings(N=200, K=4, M=2, temperature=1.0),
                                           0, choose_skip, out, {})):
            if n in (5, 40):
                sizes.append(sum(type(o) is Tensor for o in gc.get_objects()))
    assert sizes[1] - sizes[0] < 40


# ---------------------------------------------------------------- what is wrong is found

def change(event, n=0, where=None, line=None, **fields):
    """A corruption: `fields` of the n-th such line set; a function is given the old value."""
    def edit(lines):
        i = find(lines, event, n, **(where or {}))
        for name, new in fields.items():
            lines[i][name] = new(lines[i][name]) if callable(new) else new
        return line or i + 1
    return edit


def setting(name, new, line):
    """... of the header's settings; the line where it shows is another."""
    def edit(lines):
        old = lines[0]["settings"][name]
        lines[0]["settings"][name] = new(lines) if callable(new) else new
        assert lines[0]["settings"][name] != old
        return line(lines) if callable(line) else line
    return edit


def remove(event, n=0, **where):
    def edit(lines):
        i = find(lines, event, n, **where)
        del lines[i]
        return i + 1
    return edit


def insert(event, after, **where):
    """... a copy of the first line `event` after the first line `after` that is so."""
    def edit(lines):
        i = find(lines, after, **where)
        new = dict(lines[find(lines, event)])
        if "round" in new and "round" in lines[i]:
            new["round"] = lines[i]["round"]
        lines.insert(i + 1, new)
        return i + 2
    return edit


def in_table(edit):
    """... of the second table."""
    def harm(lines):
        i = find(lines, "optimise", 1)
        edit(lines[i])
        return i + 1
    return harm


def flip_parent(line):
    row = line["parents"][3]
    line["parents"][3] = row[0] + "10"[int(row[1])] + row[2:]


def another(layers):
    return sorted([*layers[1:], next(i for i in range(5) if i not in layers)])


def next_token(token):
    return (token + 1) % 50


JUDGED = dict(accepted=lambda v: v is not None, a=lambda a: a < 0.9)
UNJUDGED, RESIDUAL, BONUS = dict(accepted=None), dict(kind="residual"), dict(kind="bonus")
CORRUPTIONS = [                        # rule, what is done to the lines
    ("verdict", change("verify", where=JUDGED, accepted=lambda v: not v)),
    ("verdict", change("verify", where=dict(accepted=True), u=None)),
    ("verdict", change("verify", where=UNJUDGED, accepted=True, u=0.0)),
    ("verdict", change("verify", where=UNJUDGED, u=0.5)),
    ("verdict", change("verify", where=JUDGED, u=lambda u: 0.95, accepted=True)),
    ("draw", change("draft", token=next_token)),
    ("draw", change("draft", 2, u=lambda u: (u + 0.5) % 1)),
    ("draw", change("own", where=RESIDUAL, token=next_token)),
    ("draw", change("own", where=BONUS, token=next_token)),
    ("draw", change("own", where=dict(kind="plain"), u=lambda u: (u + 0.5) % 1)),
    ("p", change("verify", 3, p=lambda p: abs(p - 1e-3))),
    ("q", change("draft", 3, q=lambda q: abs(q - 1e-3))),
    ("confidence", change("draft", 1, confidence=lambda c: c + 1e-3)),
    ("ratio", change("verify", where=JUDGED, a=lambda a: a * 0.999)),
    ("ratio", change("verify", where=dict(a=1.0), q=lambda q: q * 0.999)),
    ("own", change("own", where=RESIDUAL, probability=lambda p: p + 1e-3)),
    ("own", change("own", where=BONUS, probability=lambda p: p + 1e-3)),
    ("kind", change("own", where=RESIDUAL, kind="bonus")),
    ("kind", change("own", where=BONUS, kind="plain")),
    ("skip", change("round", 2, skip=another)), ("skip", change("round", skip=[1])),
    ("start", change("round", 3, start=lambda n: n + 1)),
    ("order", change("draft", 2, step=lambda n: n + 1)),
    ("order", change("round", 2, round=lambda n: n + 1)),
    ("order", change("verify", 1, token=next_token)),
    ("order", remove("verify")), ("order", remove("own", 2)), ("order", remove("emit")),
    ("order", insert("own", "own")),
    ("exit", remove("draft", step=3)), ("exit", insert("draft", "draft", step=3)),
    ("emit", change("emit", 1, tokens=lambda t: [*t, 1])),
    ("emit", change("emit", where=dict(tokens=lambda t: len(t) > 1), tokens=lambda t: t[:-1])),
    ("emit", change("emit", 2, tokens=lambda t: [next_token(t[0]), *t[1:]])),
    ("interval", remove("optimise")), ("interval", remove("optimise", 1)),
    ("interval", insert("optimise", "emit", round=1)),
    ("probe", change("optimise", 1, position=lambda t: t + 1)),
    ("probe", change("optimise", position=lambda t: t - 1)),
    ("table", in_table(lambda x: x["D"].insert(3, x["D"].pop(4)))),
    ("table", in_table(lambda x: x["D"][5].__setitem__(1, x["D"][5][1] + 1e-3))),
    ("table", in_table(lambda x: x["D"][2].__setitem__(0, 0.999))),
    ("table", in_table(lambda x: x["D"][3].pop())), ("table", change("optimise", M=3)),
    ("parent", in_table(flip_parent)),
    ("parent", in_table(lambda x: x["parents"].__setitem__(4, "1" + x["parents"][4][1:]))),
    ("path", change("optimise", 1, skip=another)),
    ("path", change("optimise", cosine=lambda c: [*c[:-1], c[-1] + 1e-6])),
    ("end", change("end", reason="stop")), ("end", change("end", emitted=23)),
    ("end", insert("round", "end")), ("end", insert("end", "end")),
    ("end", insert("end", "emit", round=2)),
    (None, setting("temperature", 0.6, 3)), (None, setting("top_k", 3, 3)),
    (None, setting("top_p", 0.5, 3)), ("draw", change("header", line=3, prompt_ids=[3, 40, 7])),
    ("exit", setting("K", 3, lambda lines: find(lines, "draft", step=3) + 1)),
    ("exit", setting("K", 5, lambda lines: find(lines, "draft", **FOURTH) + 2)),
    ("exit", setting("exit_threshold", 0.9, lambda lines: find(lines, "draft", step=1) + 1)),
    ("interval", setting("interval", 2, lambda lines: find(lines, "emit", round=2) + 2)),
    ("interval", setting("stop_ids", lambda lines: lines[3]["tokens"], 5)),
    ("table", setting("M", 1, 5)),
    ("header", change("header", config=lambda c: c | dict(eps=1e-6))),
]


@pytest.mark.parametrize("n", range(len(CORRUPTIONS)), ids=lambda n: f"{CORRUPTIONS[n][0]}-{n}")
def test_every_corruption_is_found_where_it_is(n, check, lively):
    """Refuses a checker that overlooks one wrong value, blames another line, or another rule."""
    (rule, corrupt), lines = CORRUPTIONS[n], json.loads(json.dumps(lively))
    where = corrupt(lines)
    status, out, err = check(lines)
    assert (status, err, out.count("\n")) == (1, "", 2)
    assert re.match(rf"line {where}, round \d+.*: .* is .*, here .*\nrule {rule or ''}", out), out


# A tie is no departure, float32 states have float32 cosines, waiting shows in the times alone. The
# last three write no trace: not every drafted token has its draw in the log, and a crash.
UNSEEN = {"ties are skipped", "the cosine is as wide as the states",
          "the host waits for every layer", "argmax draft scored with a softmax q",
          "doubtful tokens are thrown away", "a full model's row is run along"}


@pytest.mark.parametrize("wrong", sorted({*WRONG_SAMPLERS, *BROKEN_DP, *BROKEN_LLAMA} - UNSEEN))
def test_the_trace_of_a_wrong_program_departs(wrong, check, random_model, monkeypatch):
    """Refuses a checker that any of the wrong programs above would satisfy, on forty prompts."""
    sampler, dp, ll = speculative, dp_layer_skip, llama
    if wrong in WRONG_SAMPLERS:
        sampler = altered(speculative, *WRONG_SAMPLERS[wrong])
    elif wrong in BROKEN_DP:
        dp = altered(dp_layer_skip, *BROKEN_DP[wrong])
    else:
        ll = altered(llama, *BROKEN_LLAMA[wrong])
    monkeypatch.setattr(trace, "generate", sampler.generate)
    monkeypatch.setattr(trace, "Recording", sampler.Recording)
    model, about = ll.Llama.load(random_model), clasp_mini.about(random_model)
    s = Settings(temperature=0.5, top_k=20, top_p=0.9, N=20, stop_ids=tuple(range(40, 46)), K=4,
                 M=2, exit_threshold=0.05, interval=2)
    for seed in range(40):
        out = io.StringIO()
        list(trace.record(model, [seed, 41, 7], s, seed, dp.choose_skip, out, about))
        status, said, err = check(out.getvalue().encode())
        assert err == "" and status in (0, 1)
        if status == 1:
            return
    raise AssertionError(f"nothing departs: {wrong}")


def test_a_greedy_trace_needs_no_uniforms_but_the_right_tokens(check, tmp_path, random_model):
    """Refuses the demand that a greedy program draw at all, and a wrong token that u = 0 lets
    through."""
    lines = traced(random_model, tmp_path / "t", "--prompt-ids", "3,41,7", "--max-new-tokens", 9,
                   "--draft-exit-threshold", 0)
    for line in lines:
        if line.get("u") is not None:
            line["u"] = 0
    assert check(lines)[0] == 0
    for event in ("own", "draft"):
        for token in (0, 49):                          # before and behind the right one
            i = find(lines, event)
            wrong = [*lines[:i], lines[i] | dict(token=token), *lines[i + 1:]]
            assert lines[i]["token"] != token and "rule draw" in check(wrong)[1]


# ---------------------------------------------------------------- ties and edges

TIES_UP = [("logits.argmax(-1, keepdim=True)",                     # the larger id first
            "logits.shape[-1] - 1 - logits.flip(-1).argmax(-1, keepdim=True)"),
           ("logits, order = logits.sort(dim=-1, descending=True, stable=True)",
            "logits, order = logits.flip(-1).sort(dim=-1, descending=True, stable=True)\n"
            "    order = order.shape[-1] - 1 - order")]


@pytest.fixture
def tied_model(tmp_path):
    """A model that finds tokens 2n and 2n + 1 equally likely; its layers 2 and 3 do nothing."""
    folder = tmp_path / "tied"
    w = random_checkpoint(folder, dict(num_hidden_layers=5))[1]
    w["lm_head.weight"][1::2] = w["lm_head.weight"][::2]
    for i in (2, 3):
        w[f"model.layers.{i}.self_attn.o_proj.weight"].zero_()
        w[f"model.layers.{i}.mlp.down_proj.weight"].zero_()
    save({name: x.float() for name, x in w.items()}, folder / "model.safetensors",
         {"format": "pt"})
    return folder


@pytest.mark.parametrize("flags", [(), ("--temperature", 1, "--top-k", 3),
                                   ("--temperature", 1, "--top-p", 0.11)], ids=str)
def test_a_tie_decided_the_other_way_is_no_departure(flags, check, tied_model, tmp_path,
                                                     monkeypatch):
    """Refuses a checker that asks for our order among logits, or cosines, that rounding decides."""
    base = ("--prompt-ids", "3,41,7", "--max-new-tokens", 20, "--draft-length", 3, "--interval", 2,
            "--skip-layers", 2, "--draft-exit-threshold", 0, *flags)
    ours = traced(tied_model, tmp_path / "t", *base)
    other, skips = altered(speculative, *TIES_UP), altered(
        dp_layer_skip, ("wins = cos[:J] > cos_ran", "wins = cos[:J] >= cos_ran"))
    monkeypatch.setattr(trace, "generate", other.generate)
    monkeypatch.setattr(trace, "Recording", other.Recording)
    monkeypatch.setattr(clasp_mini, "choose_skip", skips.choose_skip)
    theirs = traced(tied_model, tmp_path / "t", *base)

    def parts(lines, name):
        return [x[name] for x in lines if name in x]

    assert parts(ours, "tokens") != parts(theirs, "tokens")
    assert parts(ours, "parents")[0] != parts(theirs, "parents")[0]
    assert check(theirs, model=tied_model)[::2] == (0, "")


@pytest.mark.parametrize("M", [0, 1])
def test_a_refusal_that_only_rounding_explains_is_no_departure(M, check, random_model, tmp_path,
                                                               monkeypatch):
    """Refuses a residual compared as if it were exact: here next to nothing is owed, and which
    token it falls to differs with the precision."""
    class Unlucky(Recording):
        def accept(self, a):
            self.log.append(("accept", a, 1 - 1e-12, 1 - 1e-12 < a))
            return self.log[-1][-1]

    monkeypatch.setattr(trace, "Recording", Unlucky)
    lines = traced(random_model, tmp_path / "t", *LIVELY, "--skip-layers", M)
    assert find(lines, "own", kind="residual") is not None
    for dtype in ("float32", "float64"):
        assert check(lines, "--dtype", dtype)[::2] == (0, "")


def test_below_temperature_1_probabilities_may_differ_more(check, tmp_path):
    """Refuses one tolerance for all temperatures: at 0.02 a logit's rounding counts fiftyfold."""
    for seed in range(12):
        ids = ",".join(map(str, random.Random(seed).sample(range(3840), 6)))      # it is unsure
        lines = traced(DEMO, tmp_path / "t", "--prompt-ids", ids, "--temperature", 0.02,
                       "--max-new-tokens", 16, "--seed", seed)
        status, out, _ = check(lines, "--dtype", "float64", model=DEMO)
        assert status == 0
        seen = max(map(float, re.search("in p ([^,]+), q ([^,]+),", out).groups()))
        if seen > check_trace.TOLERANCE["float32"]:
            return
    raise AssertionError("twelve runs without a difference that needs the wider tolerance")


def test_tokens_at_an_edge_within_the_tolerance_may_stand_on_either_side():
    """Refuses one distribution where rounding decides between several, several where it does not,
    and a token asked about that is lost among its equals."""
    def kept(p, s, about=(), X=1e-6):
        logits = torch.tensor(p, dtype=torch.float64).log()
        return {tuple((q > 0).nonzero()[:, 0].tolist())
                for q in check_trace.allowed(logits, s, X, about)}

    hot = Settings(temperature=1.0)
    for top_p in (0.8 - 1e-7, 0.8 + 1e-7):
        assert kept([0.5, 0.3, 0.2], replace(hot, top_p=top_p)) == {(0, 1), (0, 1, 2)}
    assert kept([0.5, 0.3, 0.2], replace(hot, top_p=0.79)) == {(0, 1)}
    assert kept([0.4, 0.2, 0.2, 0.2], replace(hot, top_k=2)) == {(0, 1), (0, 2), (0, 3)}
    assert kept([0.4, 0.25, 0.2, 0.15], replace(hot, top_k=2)) == {(0, 1)}
    assert kept([0.3, 0.3 + 1e-7, 0.2, 0.2], Settings()) == {(0,), (1,)}
    assert (7,) in kept([0.1] * 10, Settings(), about=[7]) >= {(0,)}


def test_a_confidence_within_the_tolerance_of_the_threshold_may_go_either_way(check, lively):
    """Refuses a threshold taken more exactly than confidences are known, and one not taken."""
    low = min(x["confidence"] for x, then in zip(lively, lively[1:])
              if x["event"] == then["event"] == "draft")
    for beyond, status in ((1e-6, 0), (1e-3, 1)):
        changed = lively[0]["settings"] | dict(exit_threshold=low + beyond)
        got, out, _ = check([lively[0] | dict(settings=changed), *lively[1:]])
        assert got == status and (got == 0 or "rule exit" in out)


def test_the_verdict_is_strict(check, lively):
    """Refuses u <= a: at u = a the token is refused."""
    lines = json.loads(json.dumps(lively))
    i = find(lines, "verify", **JUDGED, u=lambda u: u is not None)
    lines[i].update(u=lines[i]["a"], accepted=True)
    assert "rule verdict" in check(lines)[1]


# ---------------------------------------------------------------- files from strangers

def jsonl(*lines):
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def header(lines, **changes):
    return jsonl({**lines[0], **changes}, *lines[1:])


def settings(lines, **changes):
    return header(lines, settings=lines[0]["settings"] | changes)


def patched(lines, at, **changes):
    i = find(lines, at)
    return jsonl(*lines[:i], lines[i] | changes, *lines[i + 1:])


HOSTILE = [                            # what is in the file, what is said
    (lambda x: b"", "empty"), (lambda x: b"\n", "line 1: not JSON"),
    (lambda x: b"{}\n", "\"event\" wanted"), (lambda x: b"[1]\n", "\"event\" wanted"),
    (lambda x: b"hello\n", "not JSON"), (lambda x: b"\xff\xfe\n", "line 1: not UTF-8"),
    (lambda x: b"[" * 10 ** 6 + b"\n", "nested too deeply"),
    (lambda x: b'{"event":' * 10 ** 5 + b"\n", "nested too deeply"),
    (lambda x: b"x" * 2 ** 21, "line 1: longer than 1048576 bytes"),
    (lambda x: jsonl(*x)[:-5], "line {n}: cut short"),
    (lambda x: jsonl(*x[:4]) + b'{"event":"ro', "line 5: cut short"),
    (lambda x: jsonl(*x[:4]) + b'{"event":"ro\n', "line 5: not JSON"),
    (lambda x: jsonl(*x[1:]), "line 1: not the header"),
    (lambda x: header(x, schema="other"), "line 1: not the header"),
    (lambda x: header(x, version=2), "version 2 of the format"),
    (lambda x: header(x, version=True), "version"), (lambda x: header(x, version=None), "version"),
    (lambda x: header(x, extra=1), "unknown field 'extra'"),
    (lambda x: header(x, config=x[0]["config"] | dict(event=1)), "unknown field 'event'"),
    (lambda x: header(x, model={"config.json": "00"}), "a trace of another model"),
    (lambda x: header(x, model=7), "model is 7"), (lambda x: header(x, config=[]), "an object"),
    (lambda x: header(x, prompt_ids=[]), "prompt_ids"),
    (lambda x: header(x, prompt_ids=[50]), "prompt_ids"),
    (lambda x: header(x, prompt_ids=[True]), "a whole number"),
    (lambda x: header(x, prompt_ids=[3] * 3000), "the model's context of 2048"),
    (lambda x: settings(x, N=10 ** 12), "the model's context of 2048"),
    (lambda x: settings(x, N=10 ** 40), "N is 1000"), (lambda x: settings(x, N=0), "N is 0"),
    (lambda x: settings(x, K=10 ** 9), "draft-length"), (lambda x: settings(x, K=1.0), "K is 1.0"),
    (lambda x: settings(x, M=6), "the model has 5 layers"), (lambda x: settings(x, M=-1), "M is -"),
    (lambda x: settings(x, top_p=0), "top-p"), (lambda x: settings(x, other=0), "field 'other'"),
    (lambda x: settings(x, event=1), "unknown field 'event'"),
    (lambda x: settings(x, temperature=1e-30), "checks nothing"),
    (lambda x: settings(x, temperature=math.nan), "NaN is not JSON"),
    (lambda x: settings(x, temperature=math.inf), "Infinity is not JSON"),
    (lambda x: jsonl(*x).replace(b'"temperature": 0.5', b'"temperature": 1e999'), "too large"),
    (lambda x: jsonl(*x).replace(b'"N": 24', b'"N": ' + b"9" * 10 ** 6), "too large"),
    (lambda x: jsonl(*x).replace(b'"N": 24', b'"N": 24, "N": 25'), "'N' stands there twice"),
    (lambda x: patched(x, "round", event="circle"), "line 2: no such event: 'circle'"),
    (lambda x: patched(x, "round", event="header"), "line 2: no such event: 'header'"),
    (lambda x: patched(x, "own", u=1.0), "u is 1.0"), (lambda x: patched(x, "own", u="0"), "u is"),
    (lambda x: patched(x, "own", u=-0.1), "u is -0.1"),
    (lambda x: patched(x, "own", token=50), "token is 50"),
    (lambda x: patched(x, "own", token=-1), "token is -1"),
    (lambda x: patched(x, "own", token=True), "token is True"),
    (lambda x: patched(x, "own", kind=[]), "kind is []"),
    (lambda x: patched(x, "own", **{"\n\ud800": 1}), "unknown field '\\n\\ud800'"),
    (lambda x: jsonl(x[0], x[1], {"event": "own"}), "line 3, own: missing field 'kind'"),
    (lambda x: patched(x, "emit", tokens=4), "tokens is 4"),
    (lambda x: patched(x, "verify", accepted=1), "accepted is 1"),
    (lambda x: patched(x, "optimise", D=[[[]]]), "D is"),
    (lambda x: patched(x, "optimise", parents=["02"]), "parents is"),
    (lambda x: patched(x, "optimise", skip=[5]), "skip is [5]"),
]


@pytest.mark.parametrize("n", range(len(HOSTILE)))
def test_a_file_that_is_no_trace_gets_one_clear_line(n, check, lively):
    """Refuses a traceback, a guess, a hang, and a message without the line's number."""
    make, said = HOSTILE[n]
    began = time.perf_counter()
    status, out, err = check(make(lively))
    assert (status, out, err.count("\n")) == (2, "", 1) and time.perf_counter() - began < 5
    assert said.replace("{n}", str(len(lively))) in err and err.isascii()


def test_a_folder_a_missing_file_and_a_wrong_model_are_named(capsys, random_model, check, lively):
    """Refuses a traceback for what is not a file, and a comparison with another model's numbers."""
    for arguments in ([str(DEMO)], ["/nowhere"], [str(DEMO / "config.json")]):
        assert check_trace.main(arguments) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and err.startswith("check_trace.py: ")
    status, _, err = check(lively, model=DEMO)
    assert status == 2 and "another model" in err and "config.json" in err


def test_a_trace_that_breaks_off_is_checked_as_far_as_it_goes(check, lively):
    """Refuses success for a run without its end, and silence about an error before the break."""
    for n in (1, 3, 4, 9, len(lively) - 1):
        status, out, err = check(lively[:n])
        assert status == 3 and f"incomplete: no departure in {n} lines" in out and err == ""
    assert check([*lively[:2], lively[2] | dict(token=0, u=0.99), *lively[3:5]])[0] == 1


def test_ctrl_c_leaves_whole_lines(check, tmp_path):
    """Refuses a half-written line, and an `end` that was not reached."""
    path = tmp_path / "broken"
    p = process(*LONG, "--trace", path)
    p.stdout.read(1)
    time.sleep(0.1)
    p.send_signal(signal.SIGINT)
    assert b"Traceback" not in p.communicate(timeout=60)[1] and p.returncode == 130
    lines = path.read_bytes().splitlines(True)
    assert len(lines) > 2 and all(json.loads(x)["event"] != "end" for x in lines)
    assert lines[-1].endswith(b"\n") and b'"event":"times"' in lines[-1]
    assert check(b"".join(lines[:9]), model=DEMO)[0] == 3


def test_a_trace_spoils_neither_the_model_nor_an_earlier_trace(run, tmp_path):
    """Refuses a file of the model that is reached by another name, and an old trace emptied by a
    run that comes to nothing."""
    random_checkpoint(tmp_path / "m")
    weights, old = tmp_path / "m" / "model.safetensors", tmp_path / "old"
    (tmp_path / "link").symlink_to(weights)
    (tmp_path / "m" / "original").mkdir()
    (tmp_path / "m" / "original" / "params.json").write_text("{}")
    before, what = weights.read_bytes(), ("--model", tmp_path / "m", "--prompt-ids", "1")
    for path in (tmp_path / "link", tmp_path / "m" / "original" / "params.json"):
        status, _, err = run(*what, "--trace", path)
        assert status == 2 and "in the model's folder" in err
    assert weights.read_bytes() == before
    old.write_text("an old one, longer than none")
    weights.write_bytes(before[:-9])
    assert run(*what, "--trace", old)[0] == 1 and old.read_text() == "an old one, longer than none"
    weights.write_bytes(before)
    assert run(*what, "--trace", old, "--device", "cpu:0")[0] == 0
    assert old.read_text().startswith("{")


def test_the_checker_needs_no_open_streams():
    """Refuses a departure reported for a right trace because nobody listens."""
    checker, sound = ROOT / "oracle" / "check_trace.py", ROOT / "oracle" / "vectors" / "plain.jsonl"
    for file, closed, status in ((sound, ">&- 2>&-", 0), ("/nowhere", "<&- 2>&-", 2)):
        command = shlex.join([sys.executable, str(checker), str(file)])
        assert subprocess.run(f"{command} {closed}", shell=True).returncode == status


def test_text_and_trace_are_not_mixed():
    """Refuses a trace on the pipe that the text goes to: neither could be read."""
    p = process("--prompt", "x", "--trace", "/dev/stdout")
    out, err = p.communicate(timeout=60)
    assert p.returncode == 2 and out == b"" and b"written there" in err and err.count(b"\n") == 1


# ---------------------------------------------------------------- forward dumps and vectors

def dumped(folder, path, *arguments):
    """(the tensors, the metadata) of a dump of the command."""
    assert clasp_mini.main(["--model", str(folder), "--device", "cpu", "--dump-forward", str(path),
                            *map(str, arguments)]) == 0
    with llama.safe_open(path, framework="pt") as f:
        return ({name: f.get_tensor(name) for name in f.keys()},
                json.loads(f.metadata()["clasp-forward"]))


@pytest.mark.parametrize("skip", [(), (0, 3)], ids=str)
def test_a_dump_is_what_a_slow_llama_computes(skip, tmp_path, monkeypatch):
    """Refuses states after the final norm, keys before the rotary embedding, a wrong chunk, and a
    skipped layer that leaves something in the cache."""
    c, w = random_checkpoint(tmp_path / "model", dict(num_hidden_layers=5))
    monkeypatch.setattr(speculative, "CHUNK", 7)
    got, meta = dumped(tmp_path / "model", tmp_path / "d", "--dtype", "float64", "--prompt-ids",
                       ",".join(map(str, IDS.tolist())),
                       *(["--skip", ",".join(map(str, skip))] if skip else []))
    logits, h = reference(c, w, IDS, skip)
    (_, G, hd), eps = sizes(c), c["rms_norm_eps"]
    turn = torch.exp(1j * torch.outer(torch.arange(len(IDS)), torch.tensor(
        reference_frequencies(c), dtype=torch.float64)))[:, None]                  # (T, 1, hd/2)
    for i in range(5):
        p = f"model.layers.{i}."
        a = reference_norm(h[i], w[p + "input_layernorm.weight"], eps)
        k, v = ((a @ w[f"{p}self_attn.{x}_proj.weight"].T).view(-1, G, hd) for x in "kv")
        z = torch.complex(k[..., :hd // 2], k[..., hd // 2:]) * turn
        k = torch.cat((z.real, z.imag), -1)
        if i in skip:
            assert not got["keys"][i].any() and not got["values"][i].any()
        else:
            assert same(got["keys"][i], k) and same(got["values"][i], v)
    assert same(got["logits"], logits) and same(got["hidden"], h)
    assert got["prompt_ids"].tolist() == IDS.tolist() and got["prompt_ids"].dtype == torch.int64
    assert meta["skip"] == list(skip) and meta["dtype"] == "float64"
    assert meta["model"] == trace.fingerprint(tmp_path / "model")
    assert meta["tensors"].keys() == got.keys()


def test_a_dump_is_what_the_model_computes_in_any_dtype(random_model, tmp_path):
    """Refuses a dtype that is lost on the way, and a link that is replaced by the file."""
    real, link = tmp_path / "real", tmp_path / "link"
    link.symlink_to(real)
    for dtype in clasp_mini.DTYPES.values():
        got, _ = dumped(random_model, link, "--dtype", str(dtype)[6:], "--prompt-ids", "3,41,7")
        model = llama.Llama.load(random_model, dtype=dtype)
        cache = model.cache(3)
        x, h = model.forward(torch.tensor([3, 41, 7]), cache.sequence(0, 3), cache,
                             states=slice(None))
        assert torch.equal(got["logits"], model.head(x)) and torch.equal(got["hidden"], h)
        assert torch.equal(got["keys"], cache.k.transpose(1, 2)) and got["keys"].dtype == dtype
    assert link.is_symlink()


def test_fingerprints_are_of_every_file_that_holds_numbers(tmp_path):
    """Refuses a shard, or the index, that could change unnoticed."""
    random_checkpoint(tmp_path, shards=2)
    before = trace.fingerprint(tmp_path)
    assert before.keys() == {"config.json", INDEX, SHARD, SHARD.replace("2-of", "1-of")}
    (tmp_path / SHARD).write_bytes((tmp_path / SHARD).read_bytes() + b" ")
    after = trace.fingerprint(tmp_path)
    assert {name for name in before if before[name] != after[name]} == {SHARD}


def alike(a, b):
    """Equal, but for floats, which may be 1e-9 apart, and versions of programs."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(k == "versions" or alike(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(alike, a, b))
    return type(a) is type(b) and (abs(a - b) < 1e-9 if type(a) is float else a == b)


def test_the_vectors_are_what_this_program_writes(tmp_path, check):
    """Refuses vectors of other weights or of an older program, and a file too many or too few;
    and each of them must check clean."""
    make_vectors.main(tmp_path / "new")
    files = sorted(p.name for p in make_vectors.VECTORS.iterdir())
    assert files == sorted(p.name for p in (tmp_path / "new").iterdir())
    for name in files:
        old, new = make_vectors.VECTORS / name, tmp_path / "new" / name
        if name.endswith(".jsonl"):
            a, b = ([json.loads(x) for x in p.read_text().splitlines()] for p in (old, new))
            assert alike(a, b), name
            assert check(old.read_bytes(), model=DEMO)[::2] == (0, ""), name
        else:
            with llama.safe_open(old, framework="pt") as f, llama.safe_open(new, "pt") as g:
                assert set(f.keys()) == set(g.keys()) == trace.DUMP.keys()
                for key in f.keys():
                    torch.testing.assert_close(f.get_tensor(key), g.get_tensor(key), rtol=0,
                                               atol=1e-9)


def test_the_vectors_show_every_situation():
    """Refuses a set of vectors from which one kind of event, draw or end has gone."""
    runs = {p.stem: [json.loads(x) for x in p.read_text().splitlines()]
            for p in make_vectors.VECTORS.glob("*.jsonl")}
    every = [x for lines in runs.values() for x in lines]
    assert {x["kind"] for x in every if "kind" in x} == {"plain", "residual", "bonus"}
    assert {x["accepted"] for x in every if "accepted" in x} == {True, False, None}
    stop = runs["stop-in-draft"]
    assert stop[-1]["reason"] == "stop" and stop[-2]["event"] == "emit"
    assert stop[-2]["tokens"][-1] != find(stop, "own", -1) and stop[-3]["kind"] == "bonus"
    assert stop[-4]["token"] == stop[-2]["tokens"][-1] in stop[0]["settings"]["stop_ids"]
    assert sum(x["event"] == "optimise" for x in runs["short-interval"]) > 2


def test_the_contract_names_every_field_and_rule():
    """Refuses a TRACE.md that has drifted from the schema, the rules or the tolerances."""
    text = (ROOT / "oracle" / "TRACE.md").read_text(encoding="utf-8")
    words = set(re.findall(r"`([A-Za-z0-9_-]+)`", text))
    events = trace.schema(llama.Config.load(DEMO))
    fields = {name for line in [trace.HEADER, *events.values()] for name in line}
    assert words >= fields | events.keys() | trace.HEADER["settings"].keys()
    assert words >= trace.HEADER["config"].keys() | trace.DUMP.keys()
    rules = re.findall(r"^\| `([a-z]+)` \|", text.partition("## Rules")[2].partition("##")[0],
                       re.M)
    assert sorted(rules) == sorted(check_trace.RULES)
    assert all(f"| {name} | {x:g} |" in text for name, x in check_trace.TOLERANCE.items())
    for line in re.findall(r"^\{.*\}$", text, re.M):
        assert json.loads(line.replace(",...", ""))["event"] in {"header", *events}


def test_the_commands_of_the_oracle_run_as_the_readme_has_them(monkeypatch, tmp_path, capsys):
    """Refuses a command or a flag of that section that does not exist, and figures of a dump that
    have drifted."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = re.search(r"## Use it as an oracle\n.*?\n## ", readme, re.S)[0]
    assert set(re.findall(r"--[a-z-]+", section)) <= set(re.findall(
        r"--[a-z-]+", clasp_mini.parser().format_help() + "--tolerance --dtype"))
    monkeypatch.chdir(tmp_path)
    block = re.search(r"```sh\n(.*?)```", section, re.S)[1]
    for line in block.splitlines():
        _, program, *arguments = shlex.split(line)
        assert (ROOT / program).exists()
        main = dict(clasp_mini=clasp_mini.main, check_trace=check_trace.main)[Path(program).stem]
        assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert "run.jsonl: no departure in " in out and err.splitlines()[-1] in section


if __name__ == "__main__":              # python test_clasp.py DIR [FACTOR]: the synthetic 8B, 16 GB
    if not sys.argv[1:] or sys.argv[1].startswith("-") or Path(sys.argv[1]).exists():
        sys.exit("usage: python test_clasp.py NEW_FOLDER [FACTOR]")
    synthetic_checkpoint(Path(sys.argv[1]), factor=float(sys.argv[2] if sys.argv[2:] else 0.1),
                         report=print)
