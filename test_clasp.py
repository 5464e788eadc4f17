"""The specification of the method. How to read it:

Six tests stand first; they are the method in short. Which layers are left out? How do all
the candidates for that go through a layer in one call? Why does a draft change no
probability? Is the whole loop exact? Would the proof of this see an error? And what does it
mean for greedy text? To see them pass, in about ten seconds:

    python -m pytest -q test_clasp.py -k proven

The rest follows the files: dynamic program, sampler, loop, LLaMA. A test's name is a
sentence about the program. Its docstring says why that matters, and which errors the test
rejects. `@rejects` names wrong programs of tests/wrong_programs.py: the test holds for the
right program, and then it must fail while each of these stands in its place. So no test is
only for show.

Small models and the enumeration of chance are in tests/, and so are the tests of numerics
and of loading. The policies beyond the paper are tested in policy/, the other rooms beside
their files.

    CLASP_EXHAUSTIVE=1    the loop's distribution at all 720 combinations of settings, not at 20 in
                          which every two values of two settings meet
"""
import collections
import contextlib
import itertools
import math
import os
import tempfile
import types
from pathlib import Path

import pytest

import dp_layer_skip
import speculative
from command.report import fates
from dp_layer_skip import Choice, choose_skip, choose_skip_plain, cosine, run_set, table, torch
from llama import Llama
from speculative import (Chance, Paper, Settings, acceptance, generate, judge, probabilities,
                         residual)
from tests.every_outcome import distance, every_outcome, filtered
from tests.helpers import (assert_same_choice, decode, flags, full_model, having_read, tiny_llama,
                           tokens)
from tests.slow_llama import AS_5, IDS, loaded, passes, reference, same, worst_error
from tests.wrong_programs import rejects


def proven(test):
    """One of the six to read first: `-k proven` finds it by this attribute."""
    test.proven = True
    return test


# ========================================================================== the six to read first

@proven
@rejects("the worse choice wins", "the target is always h[L]", "ties are run",
         "cell (i,i) does not know it skipped", "skipping spends nothing",
         "the losing state is kept", "the way back reads one row early")
def test_the_layers_to_leave_out_on_a_case_worked_by_hand():
    """Three layers add (0,3), (-1,1), (1,-4) to whatever they are given. From (4,0) the
    full model goes through (4,3) and (3,4) back to (4,0). Two layers are to be left out. By
    eq. 2:

        D[1,1]  skip 0:  (4,0) against h[1] = (4,3)         16/20
        D[2,1]  run 1:   (4,0) + (-1,1) = (3,1)             13/(5 sqrt 10) = 0.82
                skip 1:  (4,3) against h[2] = (3,4)         24/25, which wins
        D[2,2]  skip 1:  (4,0)                              12/20
        D[3,1]  run 2:   (4,3) + (1,-4) = (5,-1)            5/sqrt 26 = 0.98, which wins
                skip 2:  (3,4) against h[3] = (4,0)         12/20
        D[3,2]  run 2:   (4,0) + (1,-4) = (5,-4)            5/sqrt 41 = 0.78
                skip 2:  (4,3)                              16/20, which wins

    The way back from D[3,2]: layer 2 was skipped, layer 1 was skipped, layer 0 was run. To
    skip 0 and 2 would be better: (3,1) has 0.95 in the end, but at depth 2 it lost to
    (4,3). The method is an approximation, and here it shows. Where both ways are equally
    near, the layer is skipped."""
    add = torch.tensor([(0, 3), (-1, 1), (1, -4)], dtype=torch.float64)
    h = torch.tensor([(4, 0), (4, 3), (3, 4), (4, 0)], dtype=torch.float64)

    def run_layer(i, x):
        return x + add[i]

    nan = math.nan
    D = [[1, nan, nan], [1, 0.8, nan], [1, 0.96, 0.6], [1, 5 / math.sqrt(26), 0.8]]
    skipped = [[False] * 3, [False, True, False], [False, True, True], [False, False, True]]
    by_hand = Choice(D, skipped, g=torch.tensor([(4, 0), (5, -1), (4, 3)]))
    for choose in (choose_skip_plain, choose_skip):
        choice = choose(h, run_layer, 2)
        assert_same_choice(choice, by_hand, 1e-14)
        assert choice.g.tolist() == by_hand.g.tolist()
        assert choice.skip() == (False, True, True)
        assert choice.skip(1) == (False, True, False)
    assert run_set(h, run_layer, (True, False, True)) == pytest.approx(3 / math.sqrt(10))

    # A tie to the last bit: run (0,2) and skipped (1,0) both lie 45 degrees off h[2] = (1,1).
    add = torch.tensor([(1, -1), (0, 1)], dtype=torch.float64)
    h = torch.tensor([(0, 1), (1, 0), (1, 1)], dtype=torch.float64)
    for choose in (choose_skip_plain, choose_skip):
        assert choose(h, run_layer, 1).skip() == (False, True)


def five_layers(seed):
    """A tiny LLaMA whose final norm turns states."""
    model = tiny_llama(V=11, L=5, H=4, G=2, seed=seed)
    model.norm = torch.linspace(0.2, 2, 8, dtype=torch.float64)
    return model


@proven
@rejects("candidates see one another", "one position too far", "the token's own entry is seen")
def test_candidates_in_one_pass_are_as_if_each_were_alone():
    """All states g[i-1, 0..M] of a row of the table are tries at the same token, the probe.
    They go through layer i-1 together, each a row of the pass. Each has the probe's
    position, and reads the text before the probe and itself: not the others, and not what
    the full model wrote for it. So each must come out as if it were alone, an ordinary next
    token on a cache that holds nothing but the text before. That is the reference here,
    with the program a cell at a time."""
    for seed, M in enumerate((1, 2, 3, 5)):
        model = five_layers(seed)
        text = [3, 1, 7, 7, 0, 2, 9]
        t = 6                                          # position of the probe, the last token
        h, cache = having_read(model, text, spare=M + 1)
        _, past = having_read(model, text[:t], spare=1)

        def alone(i, g):
            return model.layer(i, g, past.sequence(t, 1), past)

        want = choose_skip_plain(h, alone, M)
        got = Paper(Settings(K=1, M=M), model.cfg.L).optimise(choose_skip, model, cache, text, h)
        assert_same_choice(got, want, 1e-10)


@proven
@rejects("residual = p", "residual through a softmax", "a residual of no mass is no number",
         "lenient acceptance")
def test_accepting_and_rejecting_together_pay_every_token_exactly_p():
    """A token comes out in two ways: it was drafted and accepted, or another one was
    rejected and it was drawn instead. Together they have to give the full model's p,
    whatever the draft's q:

        q * a  +  P(rejection) * residual  =  p

    for 2000 random pairs, some with zeros, some disjoint, some equal."""
    gen = torch.Generator().manual_seed(0)
    for n in range(2000):
        V = 2 + n % 7
        p, q = torch.rand(2, V, generator=gen, dtype=torch.float64) ** 3
        p[1:] *= torch.rand(V - 1, generator=gen) > n % 3 / 4              # some are impossible
        q[:-1] *= torch.rand(V - 1, generator=gen) > n % 3 / 4
        p = p / p.sum()
        q = p if n % 50 == 0 else q / q.sum()
        a = torch.where(q > 0, acceptance(p, q), 0)
        rejection = (q * (1 - a)).sum()
        assert (q * a + rejection * residual(p, q) - p).abs().max() < 1e-14


SAMPLERS = [dict(temperature=1.0), dict(temperature=0.7, top_k=2), dict(temperature=1.3, top_p=0.8),
            dict(temperature=0.8, top_k=2, top_p=0.7), dict(temperature=0.0)]
STOPS = [(), (2,)]
VALUES = dict(K=(1, 2, 3), M=(0, 1, 2, 3), interval=(1, 2), exit_threshold=(0.0, 0.5, 1.0))


def combinations():
    """20 settings in which every two values of two settings meet; with CLASP_EXHAUSTIVE=1
    all."""
    names = [*VALUES, "sampler", "stop_ids"]
    values = [*VALUES.values(), SAMPLERS, STOPS]
    if os.environ.get("CLASP_EXHAUSTIVE"):
        rows = list(itertools.product(*values))
    else:
        turns = [(n, n, n // 3, n // 5, n, n // 4) for n in range(20)]
        rows = [[v[i % len(v)] for v, i in zip(values, turn)] for turn in turns]
    chosen = [dict(zip(names, row)) for row in rows]
    return [Settings(N=4, **c.pop("sampler"), **c) for c in chosen]


@proven
@pytest.mark.parametrize("s", combinations())
def test_the_whole_loop_has_exactly_the_full_models_distribution(s):
    """The theorem. Chance answers two questions: how many drafted tokens are accepted, and
    which token is drawn? On a tiny random LLaMA every answer is tried, through the whole
    loop with the real cache and the real dynamic program, and the probabilities of all
    branches that end in the same text are added up. They must be those of the full model
    alone, the product over its tokens, computed by another route (tests/every_outcome.py
    has both). In four new tokens drafts are rejected, layers change, and drafts end early.
    Rejects whatever moves any text's probability by 1e-12."""
    assert distance(tiny_llama(seed=s.K + s.M), s) < 1e-12


@proven
@rejects("residual = p", "residual through a softmax", "argmax draft scored with a softmax q",
         "q at temperature 1", "p without the filters", "bonus from unfiltered logits",
         "bonus from the row before", "doubtful tokens are thrown away",
         "the drafts' keys stay after a verify", "token 0 is no token",
         "decoding one position late")
def test_the_same_proof_fails_for_a_wrong_sampler_or_loop():
    """A proof that cannot fail proves nothing. Each of the errors above, some of them found
    in real repositories, shifts the probability of some text, by 0.001 and more."""
    s = Settings(temperature=0.8, top_k=3, top_p=0.9, N=3, stop_ids=(2,), K=2, M=2, interval=1,
                 exit_threshold=0.45)
    assert distance(tiny_llama(V=4, seed=11), s) < 1e-12


@proven
def test_greedy_clasp_is_plain_greedy_token_for_token():
    """At temperature 0 the distribution is a single text: the one that the full model
    writes, a token at a time. Here in float32, against a fresh pass for each token. Rejects
    a draft that shows in the text: 12 prompts and settings, 25 tokens each. Near-ties
    within rounding do not occur."""
    model = tiny_llama(V=40, L=5, D=16, H=4, G=2, seed=4, dtype=torch.float32)
    gen = torch.Generator().manual_seed(0)
    rejected = 0
    for n in range(12):
        prompt = torch.randint(40, (1 + n % 9,), generator=gen).tolist()
        text = list(prompt)
        for _ in range(25):
            text.append(int(full_model(model, text).argmax()))
        s = Settings(K=1 + n % 6, M=n % 5, interval=1 + n % 3, exit_threshold=n % 4 / 4, N=25)
        rounds = decode(model, prompt, s)
        assert tokens(rounds) == text[len(prompt):]
        rejected += sum(r.accepted < len(r.drafted) for r in rounds)
    assert rejected > 20, "drafts that are never rejected test nothing"


# ================================================================================= dp_layer_skip.py

@rejects("the cosine is as wide as the states", "a zero state has no cosine")
def test_a_cosine_is_float32_or_wider_and_0_for_a_zero_state():
    """Rejects a cosine whose 8 bits let 0.999 tie with 1, and 0 / 0."""
    a, b = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    b = a + b / 16
    want = torch.cosine_similarity(a.double(), b.double(), dim=-1)
    assert cosine(a, b).tolist() == pytest.approx(want.tolist(), abs=1e-6)
    assert cosine(a, 0 * b).tolist() == [0, 0, 0]


@rejects("g[i,0] is computed again")
def test_every_cell_is_the_nearer_of_its_two_ways():
    """The states of a cell are computed here from the way back to it, by no line of the
    program. h carries some noise, as on a GPU, where a verify rounds otherwise than a pass
    of few rows: g[i,0] is the verify's h[i], not computed again. Rejects tables that do not
    say what their sets do."""
    for seed, (L, M) in enumerate([(1, 1), (2, 2), (5, 5), (6, 1), (7, 3), (8, 5)]):
        h, run_layer = dp_layer_skip.toy(L, 6, seed)
        h = h + 0.01 * torch.randn(h.shape, generator=torch.Generator().manual_seed(seed))
        for choose in (choose_skip, choose_skip_plain):
            choice = choose(h, run_layer, M)

            def state(i, j):                           # g[i,j]
                if j == 0:
                    return h[i]
                if choice.skipped[i][j]:
                    return state(i - 1, j - 1)
                return run_layer(i - 1, state(i - 1, j))

            for i in range(1, L + 1):
                for j in range(min(i, M) + 1):
                    run = skip = -2.0
                    if j < i:
                        run = torch.cosine_similarity(h[i], run_layer(i - 1, state(i - 1, j)), 0)
                    if j > 0:
                        skip = torch.cosine_similarity(h[i], state(i - 1, j - 1), 0)
                    assert choice.D[i][j] == pytest.approx(float(max(run, skip)), abs=1e-12)
                    assert choice.skipped[i][j] == (skip >= run), (seed, i, j)


@rejects("a row at a time runs what is no number")
def test_a_row_at_a_time_is_the_same_as_a_cell_at_a_time():
    """Rejects any slip in the fast version that the readable one does not share, in the
    table, the sets or the states at the end; also where layers return what is no number;
    and budgets that cannot be spent."""
    for L, budgets in ((1, (0, 1)), (2, (0, 1, 2)), (5, (0, 3, 5)), (8, (2, 7)), (11, (4,))):
        for M, seed in itertools.product(budgets, range(2)):
            h, run_layer = dp_layer_skip.toy(L, 6, seed)
            h = h + 0.01 * torch.randn(h.shape, generator=torch.Generator().manual_seed(seed))

            def overflowing(i, x):
                return torch.where(x.sum(-1, keepdim=True) > 1, math.nan, run_layer(i, x))

            for f in (run_layer, overflowing):
                fast = choose_skip(h, f, M)
                plain = choose_skip_plain(h, f, M)
                assert_same_choice(fast, plain, 1e-12)
                torch.testing.assert_close(fast.g, plain.g, rtol=0, atol=1e-12, equal_nan=True)
    for M in (-1, 12):
        with pytest.raises(AssertionError):
            choose_skip(h, run_layer, M)


@rejects("a call for every cell", "the host waits for every layer")
def test_each_layer_is_called_once_and_nothing_waits_for_its_numbers():
    """Rejects a call per cell, more than M+1 candidates, and a read per layer, which on a
    GPU is a wait per layer: meta tensors hold no numbers, so whoever reads one fails."""
    for L, M in ((4, 0), (4, 2), (9, 4), (5, 5)):
        calls = []

        def run_layer(i, x):
            calls.append((i, *x.shape))
            return x + 1

        try:
            table(torch.zeros(L + 1, 8, device="meta"), run_layer, M)
        except (RuntimeError, NotImplementedError) as e:
            raise AssertionError(f"after {calls[-1:]} a tensor was read") from e
        assert calls == [(i, min(i, M) + 1, 8) for i in range(L)]


@rejects("h[L] comes after the final norm")
def test_the_draft_at_the_probe_has_the_cosine_that_the_table_says():
    """The table is about the draft that will run: one that reads the probe's token again
    and leaves the set out comes as near h[L] as D[L,j] says. Rejects a target after the
    final norm, and candidates that are not what a draft is."""
    for seed in range(3):
        model = five_layers(seed)
        text = [3, 1, 7, 7, 0, 2, 9]
        h, cache = having_read(model, text, spare=4)
        choice = Paper(Settings(K=1, M=3), 5).optimise(choose_skip, model, cache, text, h)
        ids = torch.tensor(text[-1:])
        for j in range(4):
            draft = model.forward(ids, cache.sequence(6, 1), cache, choice.skip(j))
            near = torch.cosine_similarity(h[-1], draft[-1][0], 0).item()
            assert near == pytest.approx(choice.D[-1][j], abs=1e-10), (seed, j)


# =================================================================================== speculative.py

# ------------------------------------------------------------------------------ the sampler

@rejects("top-k cuts ties by id", "top-p before temperature",
         "top-p keeps one more where the mass is reached")
def test_probabilities_are_temperature_top_k_and_top_p_by_another_route():
    """Rejects another order of the filters, an empty nucleus, a token too many where the
    mass is reached exactly (four equal ones, top-p 0.5: two), a top-k that parts equal
    logits, ties for the nucleus to the larger id, greedy by a tiny temperature, and a k too
    large for a computer."""
    gen = torch.Generator().manual_seed(0)
    cases = [torch.randn(6, generator=gen, dtype=torch.float64) * 2 for _ in range(6)]
    cases += [torch.zeros(4, dtype=torch.float64), torch.tensor([1.0, 3.0, 3.0, 0.0]).double(),
              torch.tensor([2.0, 1.0, 0.9, -3.0]).double()]
    for logits, T, top_k, top_p in itertools.product(
            cases, (0.0, 0.7, 2.0), (0, 1, 2, 3, 10 ** 30), (1e-300, 0.25, 0.5, 0.6, 0.7, 1.0)):
        s = Settings(temperature=T, top_k=top_k, top_p=top_p)
        got = probabilities(torch.stack((logits, logits)), s)
        assert got[1].tolist() == pytest.approx(filtered(logits, s), abs=1e-14), (logits, s)


class Given(Chance):
    """A Chance whose uniform is u."""

    def __init__(self, u):
        self.u = u

    def uniform(self):
        return self.u


@rejects("accepts at u = a", "draws at u = the running sum", "the running sum is float32",
         "a token after a rejected one is kept")
def test_a_token_of_probability_zero_never_passes_and_one_above_zero_can():
    """Rejects u <= a in the acceptance test, what follows a rejected token, >= for > in the
    draw, and a running sum in float32, in which a token of probability 2^-25 after a likely
    one has nothing."""
    p = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    q = torch.tensor([1.0, 0.0])
    assert judge(p, [q], [0], Given(0.0)) == (0, 1)
    assert Given(0.5).accept(torch.tensor([0.6, 0.4, 0.6])) == 1
    p = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0])
    for u, token in ((0.0, 1), (0.25 - 2 ** -53, 1), (0.25, 3), (1 - 2 ** -53, 3)):
        assert Given(u).draw(p) == token
    assert Given(1 - 2 ** -53).draw(torch.tensor([1.0, 2 ** -25])) == 1


@rejects("uniforms of 24 bits", "the correction is drawn with the number that rejected")
def test_the_seeded_generator_draws_from_p():
    """Rejects a generator that is not uniform or is asked wrongly: 2000 tokens drafted from
    q and judged against p, in 5 cells. With 4 degrees of freedom the right program exceeds
    23.5 for one seed in 10,000; the seed is fixed. And a uniform of float32, which has 24
    bits."""
    p = torch.tensor([0.05, 0.4, 0.25, 0.2, 0.1], dtype=torch.float64)
    q = torch.tensor([0.3, 0.1, 0.25, 0.05, 0.3], dtype=torch.float64)
    chance = Chance(seed=1)
    seen = [0] * 5
    n = 2000
    for _ in range(n):
        drafted = int(chance.draw(q))
        accepted, own = judge(torch.stack((p, p)), [q], [drafted], chance)
        seen[drafted if accepted else int(own)] += 1
    assert sum((x - n * w) ** 2 / (n * w) for x, w in zip(seen, p.tolist())) < 23.5
    assert any(chance.uniform() * 2 ** 24 % 1 > 0 for _ in range(9))


def test_a_seed_means_one_text_and_nothing_leaks_from_one_prompt_to_the_next():
    """Rejects a hidden source of chance, a seed that is not used or used before each draw,
    and a cache, a skip set or a position kept in the model."""
    model = tiny_llama(V=5)
    s = Settings(temperature=1.0, K=3, M=1, N=40)
    texts = []
    for seed in (1, 1, 2, 2 ** 32 - 1):
        texts.append(tuple(tokens(decode(model, [0], s, seed))))
        decode(model, [4, 4, 4], s)
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3 and len(set(texts[0])) > 1


# ------------------------------------------------------------------------------ the loop

def test_the_enumeration_sees_rejections_acceptance_changing_layers_and_stops_inside_drafts():
    """Rejects a proof that would hold because nothing happens in it."""
    s = Settings(temperature=1.0, K=2, M=2, interval=1, stop_ids=(2,), N=5, top_k=2)
    seen = set()

    def run(chance):
        rounds = decode(tiny_llama(L=4, seed=1), (0, 1), s, chance)[1:]
        for r in rounds:
            k = len(r.drafted)
            seen.add(("rejected", r.accepted) if r.accepted < k else ("all", k))
            if r.emitted[-1] == 2 and r.accepted == len(r.emitted):
                seen.add("drafted stop")
        if len({r.skip for r in rounds}) > 1:
            seen.add("layers changed")

    assert math.isclose(sum(w for w, _ in every_outcome(run)), 1, abs_tol=1e-12)
    assert seen >= {("rejected", 0), ("rejected", 1), ("all", 2), "layers changed", "drafted stop"}


class Whim(Paper):
    """A policy that goes by all it is told, and by nothing that makes sense."""

    def goes_on(self, confidence):
        return len(confidence) < 3 and sum(confidence) < 1.5

    def judged(self, confidence, p, q, accepted):
        self.skip = tuple((int(p.argmax()) + accepted + i) % 2 == 0 for i in range(3))

    def due(self, n):
        return True

    def optimise(self, choose, model, cache, text, h):
        self.skip = tuple(x > 0 for x in h[:3, 0])
        text.append(0)


@rejects("a policy can reach into the text")
def test_no_answer_of_a_policy_changes_the_distribution():
    """Rejects a loop that lets a policy drop a token that was drawn, or change the text."""
    s = Settings(temperature=1.0, N=4, stop_ids=(2,))

    def loop(model, prompt, s, chance, choose):
        return generate(model, prompt, s, chance, choose, Whim(s, 3))
    assert distance(tiny_llama(seed=3), s, loop) < 1e-12


@rejects("drafting goes on after a stop token", "the text goes on after an accepted stop",
         "a stop in a draft is told twice")
def test_nothing_follows_a_stop_token_wherever_it_stands():
    """Rejects a stop that is seen only as the full model's own token, or only when drafted;
    a draft that goes on after one; and an account of the round that shows it twice."""
    ended = collections.Counter()
    s = Settings(temperature=1.0, N=25, K=4, M=1, stop_ids=(2, 3))
    for seed in range(30):
        rounds = decode(tiny_llama(V=5), [1], s, seed)
        text = tokens(rounds)
        last = rounds[-1]
        assert not set(text[:-1]) & {2, 3} and (text[-1] in (2, 3) or len(text) == 25)
        ended["drafted" if last.accepted == len(last.emitted) else "own"] += text[-1] in (2, 3)
        for r in rounds:
            assert not set(r.drafted[:-1]) & {2, 3}, "drafted after a stop token"
            told = fates(r)
            assert told["kept"] + told["own"] == r.emitted
    assert min(ended["drafted"], ended["own"]) >= 5, ended


@rejects("drafting ends at the threshold")
def test_drafting_ends_after_a_token_of_lower_confidence_and_not_at_the_threshold():
    """Rejects another end of a draft: before the doubtful token, at a confidence equal to
    the threshold (one token has it all: 1), or at none."""
    certain = decode(tiny_llama(V=1), [0], Settings(K=3, M=1, N=9, exit_threshold=1.0))
    assert [len(r.drafted) for r in certain] == [0, 3, 3]
    ends = set()
    s = Settings(temperature=1.0, K=3, M=1, N=60, exit_threshold=0.3)
    for r in decode(tiny_llama(V=5), [1], s, 2)[1:-3]:
        assert all(c >= 0.3 for c in r.confidence[:-1])
        assert r.confidence[-1] < 0.3 or len(r.drafted) == 3
        ends.add(len(r.drafted))
    assert ends == {1, 2, 3}


@rejects("position off by one after full acceptance")
def test_after_every_round_the_cache_is_that_of_a_fresh_prefill():
    """Rejects entries left from drafts, from the scratch slots of candidates or from another
    position; a second cache; and a verify that reads more than is new."""
    model = tiny_llama(V=5, L=4, seed=2)
    text = [1, 4, 0]
    caches = []
    rows_of = []                                       # rows of each full pass
    read = 0                                           # tokens of text in the cache

    def new_cache(S):
        caches.append(Llama.cache(model, S))
        return caches[-1]

    def forward(ids, rows, cache, skip=()):
        if not skip:
            rows_of.append(len(ids))
        return Llama.forward(model, ids, rows, cache, skip)
    model.cache = new_cache
    model.forward = forward
    s = Settings(temperature=1.0, K=3, M=2, interval=1, N=40)
    for r in generate(model, list(text), s, Chance(0), choose_skip):
        assert rows_of.pop() == len(text) - read + len(r.drafted)
        text += r.emitted
        read = len(text) - 1
        _, fresh = having_read(tiny_llama(V=5, L=4, seed=2), text[:-1], spare=0)
        for ours, theirs in ((caches[0].k, fresh.k), (caches[0].v, fresh.v)):
            assert (ours[:, :, :read] - theirs).abs().max() < 1e-12
    assert len(caches) == 1 and rows_of == []


@rejects("the probe is the last drafted token", "the probe is the token before the round")
def test_the_probe_is_the_last_token_but_one_with_the_states_of_a_fresh_pass():
    """Rejects states of a rejected token, or of another position: what the chooser sees is
    what a fresh pass over the text computes for the last token that has been read."""
    model = tiny_llama(V=5, L=4)
    text = [1, 3, 2, 2, 0]
    seen = []

    def choose(h, run_layer, M):
        seen.append(h)
        return choose_skip(h, run_layer, M)
    s = Settings(temperature=1.0, K=3, M=2, N=30, interval=2)
    for r in generate(model, list(text), s, Chance(1), choose):
        text += r.emitted
        if r.choice:
            h, _ = having_read(model, text[:-1], spare=0)
            assert (seen[-1] - h).abs().max() < 1e-12
    assert len(seen) > 3


@rejects("layers are optimised a round late", "the verify's seconds are the draft's too")
def test_layers_are_optimised_at_prefill_and_every_interval_verifications():
    """Rejects an interval off by one, a set that is used late, a set of another size,
    seconds that count another step's, and drafts or choices where K is 0."""
    s = Settings(temperature=1.0, K=2, M=2, interval=3, N=30)
    ticks = itertools.count()
    with pytest.MonkeyPatch.context() as patch:        # a clock that is read four times a round
        clock = types.SimpleNamespace(perf_counter=lambda: next(ticks))
        patch.setattr(speculative, "time", clock)
        rounds = decode(tiny_llama(V=5, L=4), [1], s)
    asked = [n for n, r in enumerate(rounds[:-1]) if r.choice]
    assert asked == list(range(0, len(rounds) - 1, 3)) and len(asked) > 2
    for before, after in itertools.pairwise(rounds):
        assert after.skip == (before.choice.skip() if before.choice else before.skip)
        assert sum(after.skip) == 2
        assert after.seconds == (1, 1, 1)
    for K, M in ((0, 2), (2, 0)):
        rounds = decode(tiny_llama(V=5), [1], Settings(N=9, K=K, M=M))
        assert not any(r.choice or any(r.skip) for r in rounds)
        assert any(r.drafted for r in rounds) == (K > 0)


def test_a_prompt_longer_than_a_prefill_pass_changes_nothing(monkeypatch):
    """Rejects states or logits taken from the wrong part of a prompt that is read in pieces,
    and a draft whose verify would be two passes."""
    prompt = [t % 5 for t in range(21)]
    s = Settings(temperature=1.0, K=2, M=1, N=20)
    whole = decode(tiny_llama(V=5), prompt, s)
    monkeypatch.setattr(speculative, "CHUNK", 5)
    pieces = decode(tiny_llama(V=5), prompt, s)
    assert [r.emitted for r in whole] == [r.emitted for r in pieces]
    assert whole[0].choice.D[-1] == pytest.approx(pieces[0].choice.D[-1], abs=1e-12)
    long = decode(tiny_llama(V=5), prompt, Settings(temperature=1.0, K=9, M=1, N=20))
    assert max(len(r.drafted) for r in long) == 4


@pytest.mark.parametrize("name, value", [
    ("temperature", -1.0), ("temperature", math.nan), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.5),
    ("N", 0), ("K", -1), ("M", 4), ("M", -1), ("interval", 0)])
def test_impossible_settings_are_caught(name, value):
    """Rejects a setting that would end in another distribution."""
    with pytest.raises(AssertionError):
        next(generate(tiny_llama(), [0], Settings(**{name: value}), Chance(0), choose_skip))
    with pytest.raises(AssertionError):
        next(generate(tiny_llama(), [], Settings(), Chance(0), choose_skip))


@rejects("infinite logits are numbers", "only the prompt's logits are looked at")
def test_a_model_whose_numbers_overflow_writes_no_text():
    """Rejects token 0, which is the argmax of what is not a number, for an answer, and an
    infinite logit for a certain token: in the prompt's pass, and in a later verify."""
    for what, calls in itertools.product((math.inf, -math.inf, math.nan), (1, 2, 4)):
        model = tiny_llama()
        count = itertools.count(1)

        def head(x):
            logits = Llama.head(model, x)
            if next(count) == calls:
                logits[-1, 1] = what
            return logits
        model.head = head
        rounds = generate(model, [0], Settings(N=9), Chance(0), choose_skip)
        written = 0
        with contextlib.suppress(FloatingPointError):
            for _ in rounds:
                written += 1
        assert written == calls - 1


# ========================================================================================= llama.py

@rejects("the interleaved rotary layout", "LLaMA-3.1's stretching left out",
         "Transformers 5 not understood", "the mask without + t",
         "query heads dealt to kv heads in turn", "a norm without eps",
         "scratch begins at the probe")
def test_how_a_text_is_cut_into_passes_does_not_matter():
    """Logits, states, candidates and cache against a slow LLaMA by another route. Rejects a
    mask or a position that is right only in prefill or only in decoding, and any other
    arithmetic."""
    for lengths in ((12,), (1,) * 12, (11, 1), (1, 11), (4, 4, 4), (5, 3, 1, 1, 2)):
        with tempfile.TemporaryDirectory() as folder:
            assert worst_error(Path(folder), lengths, overrides=AS_5) < 1e-12


@rejects("the layers that run are those to be skipped", "a skipped layer writes")
def test_a_draft_skips_what_it_is_told_and_leaves_no_trace_after_verifying():
    """Rejects a set read upside down, a skipped layer that writes, drafts that show
    through."""
    with tempfile.TemporaryDirectory() as folder:
        c, w, model, _ = loaded(Path(folder), AS_5)
    t = 6
    n = len(IDS)
    verified = reference(c, w, IDS)
    for skip in ((), (0,), (2,), (0, 1), (0, 1, 2)):
        left_out = flags(3, skip)
        cache = model.cache(n)
        passes(model, cache, IDS[:t], (4, 2))
        cache.k[:, :, t:] = 7.0
        cache.v[:, :, t:] = -7.0
        drafted = (IDS[t:] + 1) % 50
        logits, h = passes(model, cache, drafted, (1,) * 6, t, left_out)
        want, want_h = reference(c, w, torch.cat((IDS[:t], drafted)), skip, first=t)
        assert same(logits, want[t:]) and same(h, want_h[:, t:])
        untouched = (cache.k[:, :, t:] == 7).all(-1)   # (L, G, slots): what is skipped leaves holes
        assert untouched.flatten(1).all(1).tolist() == list(left_out)
        # Rolled back by counting, and overwritten.
        logits, h = passes(model, cache, IDS[t:], (6,), t)
        assert same(logits, verified[0][t:]) and same(h, verified[1][:, t:])


@rejects("a cache begins uninitialised")
def test_what_lies_behind_the_position_has_no_influence_and_a_new_cache_is_clean():
    """Rejects a mask that lets garbage through; and a cache that begins as memory happened
    to be: slots not yet written have weight 0, and 0 * nan is nan."""
    model = tiny_llama(V=50, L=3)
    clean = passes(model, model.cache(18), IDS, (5, 3, 1, 1, 2))
    dirty = model.cache(18)
    dirty.k[:] = 1e6
    dirty.v[:] = -1e6
    assert all(map(torch.equal, clean, passes(model, dirty, IDS, (5, 3, 1, 1, 2))))

    with pytest.MonkeyPatch.context() as patch:        # what uninitialised memory may hold
        patch.setattr(torch, "empty", lambda *sizes, **_: torch.full(sizes, math.nan).double())
        new = model.cache(18)
    out = model.layer(0, torch.ones(4, 8).double(), new.candidates(9, 4), new)
    assert out.isfinite().all()


def test_rows_that_do_not_fit_into_the_cache_are_caught():
    """Rejects a cache that cuts rows off at its end, or refuses the last that fit."""
    cache = tiny_llama().cache(18)
    for rows, most in ((cache.sequence, 5), (cache.candidates, 4)):         # slot 13: the probe's
        assert rows(13, most).slots[-1] == 17
        with pytest.raises(AssertionError):
            rows(13, most + 1)
