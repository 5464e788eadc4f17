"""What the policy decides, followed by hand: costs, confidences and what was accepted are given,
and it is read off how much is left out, how long is drafted, when layers are chosen and when it
rests. Then its promise, and what passes cost: guessed, measured by a clock that is played, kept,
and read from files. That no text depends on it stands in test_exact.py.
"""
import itertools
import json
import math
import random
from statistics import NormalDist, fmean
from types import SimpleNamespace
from unittest.mock import Mock

from pytest import approx, mark, raises

from dp_layer_skip import Choice, torch
from llama import Config, ModelError
from policy import adaptive, costs
from speculative import Settings
from tests.helpers import put

CHEAP = [1.0] * 6            # verifies of 0 .. 5 rows at the price of a plain step: K is 4
FREE = [1.0, 0.01]           # draft steps of a model of one layer: nearly always they pay


def policy_of(draft, verify, N=1000, **how):
    """The policy at these costs, after the prefill."""
    policy = adaptive.Adaptive(Settings(N=N), draft, verify, **how)
    verified(policy)
    return policy


def draft_of(x):
    """Drafts (..., 3) that p = (.5, .5, 0) accepts with chances x."""
    return torch.stack((x / 2, x / 2, 1 - x), -1)


def verified(policy, xs=(), accepted=0, confidence=(0.9, 0.9, 0.9)):
    """A verify of tokens that p accepts with chances xs; of none, a plain step."""
    p = None                                           # nobody has to look at it
    q = []
    if xs:
        p = draft_of(torch.ones(len(xs) + 1, dtype=torch.float64))
        q = [*draft_of(torch.tensor(xs, dtype=torch.float64))]
    policy.judged(list(confidence), p, q, accepted)


def look(policy, *shown):
    """Layers are chosen, always the last ones. With 1, 2, .. left out p would accept a draft
    with these chances (where r tokens choose, r each). Logits are states: head changes nothing."""
    L = len(policy.c) - 1
    M = len(shown)
    x = torch.tensor([shown[0], *shown], dtype=torch.float64).view(M + 1, -1)           # (M+1, r)
    g = draft_of(x).log().flatten(1)                                                    # (M+1, r*3)
    h = draft_of(torch.ones_like(x[0])).log()                                           # (r, 3)
    choice = Choice([[1.0] * (M + 1)] * (L + 1), [[False] + [True] * M] * (L + 1), g)
    model = Mock(device="cpu", head=lambda h: h, forward=lambda *how: [h] * (L + 1))
    cache = Mock(S=99, all_slots=torch.arange(99))
    policy.optimise(lambda *how: choice, model, cache, [0] * 9, h[-1:].repeat(L + 1, 1))


def plain_steps(policy):
    """Verifications without a draft until layers are due, if ever."""
    for n in range(1, 1000):
        assert not policy.goes_on([])
        verified(policy)
        if policy.due(n):
            return n


def corrected(risk, xs):
    """risk * rejected / expected after tokens of xs."""
    return risk * (1 + sum(1 - x for x in xs)) / (1 + risk * len(xs))


def test_gain_is_the_tokens_per_plain_step_of_the_best_draft_length():
    """Rejects the cost of k rows for that of k + 1, a power of a too few, and a chance below 0."""
    # Of each token .8 is kept: drafts of 1, 2, 3 bring 1.8, 2.44 and 2.952 tokens.
    how = dict(draft=[1, 0.25], M=1, risk=[0, 0.2])
    assert policy_of(verify=[1, 1, 1, 1, 1], **how).gain(1) == approx(2.952 / (0.75 + 1))
    assert policy_of(verify=[1, 1, 1.1, 1.2, 1.9], **how).gain(1) == approx(2.44 / (0.5 + 1.2))
    assert policy_of(verify=[1, 1, 1.1], **how).gain(1) == approx(1.8 / (0.25 + 1.1))
    assert policy_of(FREE, CHEAP, risk=[0, 7.0]).keep(1) == 0


def test_the_risk_of_each_budget_is_the_mean_of_the_prior_and_of_all_that_was_shown():
    """Rejects budgets that end sooner or later than at 11/16 of the layers; risks of a file without
    effect, another prior than j/L, the last look alone, one token of several."""
    assert adaptive.budgets(32) == list(range(2, 23, 2)) and adaptive.budgets(4) == [1, 2, 3]
    tables = ([1, 0.1, 0.1, 0.1, 0.1], CHEAP)
    policy = policy_of(*tables, risk=[0, 0.1, 0.2, 0.4, 0.9])
    look(policy, 0.9, 0.7, 0.5)
    look(policy, 0.6, 0.7, 1.0)
    means = {1: (0.1 + 0.1 + 0.4) / 3, 2: (0.2 + 0.3 + 0.3) / 3, 3: (0.4 + 0.5 + 0.0) / 3}
    assert policy.risk == approx(means)
    policy = policy_of(*tables, probe=2)
    look(policy, (0.9, 0.5), (0.7, 0.1), (0.6, 0.0))   # means of .7, .4, .3
    means = {1: (1 / 4 + 0.3) / 2, 2: (2 / 4 + 0.6) / 2, 3: (3 / 4 + 0.7) / 2}
    assert policy.risk == approx(means) and policy.slots == (3 + 1) * 2


@mark.parametrize("accepted, counted", [(0, 1), (1, 2), (2, 3), (3, 3)])
def test_risks_are_corrected_by_what_was_judged_since_the_look(accepted, counted):
    """Rejects drafts after a rejection that are counted, and what a look does not set back."""
    xs = [0.9, 0.4, 0.2]
    policy = policy_of(FREE, CHEAP, risk=[0, 0.2])
    look(policy, 0.6)
    verified(policy, xs, accepted)                     # held against .3, the mean of .2 and .4
    assert policy.keep(1) == approx(1 - corrected(0.3, xs[:counted]))
    assert policy.left == 1000 - 1 - (accepted + 1)
    look(policy, 0.7)
    assert policy.keep(1) == approx(0.7) and policy.alarm == 0


def test_after_every_verify_the_budget_is_the_one_of_the_largest_gain():
    """Rejects a budget that stays after a look; layers left out that are another budget's."""
    # One token a draft. Where 1, 2, 3 layers are left out, it costs .6, .3, .1.
    policy = policy_of([1, 0.6, 0.3, 0.1, 0.1], CHEAP, risk=[0, 0.05, 0.2, 0.35, 1], K=1)
    look(policy, 0.95, 0.8, 0.65)                      # 1.95/1.6, 1.8/1.3, 1.65/1.1
    assert policy.gain(3) == approx(1.65 / 1.1) and policy.gain(2) == approx(1.8 / 1.3)
    assert policy.j == 3 and policy.skip == (False, True, True, True)
    # Two rejections, held against .35 each: of 1.7 expected 3 were rejected, all risks are 1.765
    # times as high. 1.912/1.6 = 1.19, 1.647/1.3 = 1.27, 1.382/1.1 = 1.26.
    verified(policy, [0.0, 0.0], accepted=1)
    assert policy.j == 2 and policy.skip == (False, False, True, True)
    verified(policy, [1.0], accepted=1)                # held against .2
    assert policy.keep(2) == approx(1 - 0.2 * 3 / 1.9)


def assert_dearest(policy, confidence, price):
    """So much, and no more, one more token after those may cost."""
    k = len(confidence)
    for factor, answer in ((0.999, True), (1.001, False)):
        policy.v[k + 2] = policy.v[k + 1] + factor * price - policy.c[policy.j]
        assert policy.goes_on(confidence) is answer


def test_a_token_is_drafted_while_it_brings_nine_tenths_of_gain_per_cost():
    """Rejects a rule that ignores confidence or what was kept, one bin for all confidences, another
    bound between the two, other weights of what is foretold, and all of `gain` asked for."""
    policy = policy_of([1, 0.01, 0.7], [1, 1, 1.25, 1.5, 2, 3], M=1, risk=[0, 0.36, 1])
    policy.gain = lambda j: 1.6
    look(policy, 0.64)
    high = (0.64 + 0.9) / 2                            # foretold of tokens of confidence .81
    low = (0.64 + 0.5) / 2                             # and .25: their roots are .9 and .5
    assert_dearest(policy, [0.81], high * 0.64 / (0.9 * 1.6))
    assert_dearest(policy, [0.81, 0.25, 0.25], high * low * low * 0.64 / (0.9 * 1.6))
    # Three tokens are judged, two of confidence .5 or above, of which .8 and 1 are kept, and one
    # below, of which none is. They stand beside four that are foretold.
    verified(policy, [0.8, 1.0, 0.0], 2, confidence=[0.5, 0.99, 0.49])
    a = 1 - corrected(0.36, [0.8, 1.0, 0.0])
    high = (1.8 + 4 * (a + 0.9) / 2) / (2 + 4)
    low = (0.0 + 4 * (a + 0.5) / 2) / (1 + 4)
    assert_dearest(policy, [0.81], high * a / (0.9 * 1.6))
    assert_dearest(policy, [0.81, 0.25], high * low * a / (0.9 * 1.6))


def test_named_numbers_take_the_place_of_the_rules():
    """Rejects a threshold heard beside the rule, of another token, or not met at equality; an
    interval heard beside the alarm; a first token that has to pay by itself, and K + 1 tokens."""
    policy = policy_of(FREE, [1, 1, 3, 3, 3, 3], risk=[0, 0.01])
    look(policy, 0.99)
    assert [policy.goes_on([0.9] * k) for k in range(5)] == [True, True, True, True, False]
    policy = policy_of(FREE, [1, 1, 1, 9, 9, 9], risk=[0, 0.1], exit_threshold=0.7, interval=5)
    look(policy, 0.9)
    answers = [policy.goes_on(c) for c in ([], [0.7], [0.9, 0.69], [0.9] * 4)]
    assert answers == [True, True, False, False]
    policy.alarm = 9.0
    assert [n for n in range(1, 16) if policy.due(n)] == [5, 10, 15]
    for none in (dict(K=0), dict(M=0)):                # no drafts, or nothing to leave out
        policy = policy_of(FREE, CHEAP, risk=[0, 0.1], **none)
        assert not policy.due(0) and not policy.goes_on([])


def test_the_alarm_adds_up_rejections_beyond_five_quarters_of_the_rate():
    """Rejects another slope or bound, a rate that does not learn, three times the evidence, and a
    good stretch that silences it."""
    policy = policy_of(FREE, CHEAP, risk=[0, 0.1])
    look(policy, 0.9)
    verified(policy, [1.0], 1)                         # -1.25 * .1 * 1 / 1.1, but never below 0
    assert policy.alarm == 0
    verified(policy, [0.0])                            # 2 of 1.2
    verified(policy, [0.5])                            # 2.5 of 1.3
    verified(policy, [1.0], 1)                         # 2.5 of 1.4
    level = 1 + 0.5 - 1.25 * 0.1 * (2 / 1.2 + 2.5 / 1.3 + 2.5 / 1.4)
    assert policy.alarm == approx(level)               # .83
    verified(policy, [0.0])                            # 3.5 of 1.5: 1.54
    assert policy.goes_on([]) and not policy.due(4)
    verified(policy, [0.5])                            # 4 of 1.6: 1.72
    assert not policy.due(5)
    verified(policy, [0.5])                            # 4.5 of 1.7: 1.89
    assert policy.due(6)


@mark.parametrize("named", [dict(), dict(M=1)])
def test_it_rests_while_nothing_pays_looks_every_64_verifications_and_forgets_why(named):
    """Rejects drafting before a look or where it does not pay, a draft that brings just what it
    costs, a policy that drafts all the same where M is named, a rest at the next look only, and one
    after which nothing could pay again. A draft of one token costs 1.5 here, and brings 1 + a."""
    policy = policy_of([1, 0.5], [1, 1, 1], risk=[0, 1.0], **named)
    assert policy.due(0) and not policy.goes_on([])    # no layers were chosen yet
    look(policy, 1.0)
    assert policy.gain(1) == 1 and plain_steps(policy) == 64
    policy = policy_of([1, 0.5], [1, 1, 1], risk=[0, 0.49], **named)
    for _ in range(2):
        look(policy, 0.51)
        assert 1 < policy.gain(1) < 1.01 and policy.goes_on([])
        verified(policy, [0.0])                        # .49 * 2 / 1.49 = .66 are rejected
        assert plain_steps(policy) == 64


@mark.parametrize("risk, left", [(None, [100, 200, 300]), ([0, 1.0], [1, 1, 1])])
def test_looks_that_may_be_in_vain_cost_at_most_a_fiftieth_of_what_is_left(risk, left):
    """Rejects looks at any price, one look that is not counted, and looks counted as in vain where
    it is known what is risked. A look costs two plain steps."""
    policy = policy_of(FREE, CHEAP, risk=risk, optimise=2.0)
    for least in left:
        policy.left = least
        assert policy.due(0)
        policy.left = least - 1
        assert not policy.due(0) or risk
        look(policy, 0.0)                              # nothing pays


@mark.parametrize("N, risk, true, asked, drafts", [
    (34, 0.25, [1, 1, 1, 1.1], 1, True), (34, 0.25, [1, 1, 9, 9], 1, False),
    (32, 0.25, [1, 1, 1, 1.1], 0, False), (999, 1.0, [1, 1, 1, 1.1], 0, False)])
def test_verifies_are_measured_once_and_where_it_is_worth_it(N, risk, true, asked, drafts):
    """Rejects measuring where less than 16 plain steps are saved, or where nothing pays; drafts at
    guessed costs; a decision that does not hear what was measured."""
    # At a risk of .25 drafts of two bring 2.3125 tokens for 1.15625, by the guess: half of all
    # plain steps are saved. Of 33 that are left these are 16.5, of 31 only 15.5.
    measure = Mock(return_value=true)
    policy = policy_of([1, 0.078125], [1.0] * 4, N=N, risk=[0, risk], measure=measure)
    for _ in range(2):
        look(policy, 1 - risk)
        assert policy.goes_on([]) is drafts
    assert measure.call_count == asked and policy.v == (true if asked else [1.0] * 4)


# ------------------------------------------------------------------------------ the promise

# On models that nobody trained for skipping the policy costs next to nothing. Counted in plain
# steps on curves of acceptance. The policy is the real one, the model is drawn, prompt by prompt:
#
#     prompt    has a level of its own on the logit scale, quantiles (deviation .4)
#     token     z is normal; confidence is logistic(.6 + 2 z), and it is accepted with chance
#               a = logistic(start + level + .9 z), start such that the mean is the curve's.
#     p and q   overlap greedily by 1 with chance a, else 0; else by x drawn from Beta(4a, 4(1 - a))
#     a choice  of layers shows all budgets at a level that is wrong by a normal error (deviation
#               1.2 on a CPU, where one token chooses, .6 on a GPU, of four), and each by .3 more
#
# The numbers are SmolLM2's. A prompt's number is its seed.

# Layers, the head's share of bytes, and what is kept with 1, 2, .. layers left out. SmolLM2-135M
# and Qwen2.5-Coder-0.5B: measured here; Qwen2.5-7B, Qwen3-8B and 32B: published for vLLM.
UNTRAINED = [
    (30, 0.21, {1: 0.944, 2: 0.889, 4: 0.834, 6: 0.763, 8: 0.690, 12: 0.491}),
    (24, 0.28, {2: 0.926, 3: 0.900, 4: 0.873, 6: 0.816}),
    (28, 0.077, {1: 0.954, 2: 0.908, 3: 0.869, 4: 0.817, 5: 0.761, 6: 0.659, 7: 0.557}),
    (36, 0.082, {1: 0.951, 2: 0.923, 3: 0.885, 4: 0.849, 5: 0.813, 6: 0.773, 7: 0.694}),
    (64, 0.024, {1: 0.976, 2: 0.954, 3: 0.912, 4: 0.892, 5: 0.833, 6: 0.800, 7: 0.770})]
ERROR = dict(cpu=1.2, gpu=0.6)
PROMPTS = 10


def setting(L, head, points, machine):
    """A curve, for 0..L layers left out, and costs. Beyond what is known .15 are kept at .7 of the
    layers, as of SmolLM2, and none in the end. Draft steps cost by bytes."""
    curve = costs.fill({0: 1} | points | {round(0.7 * L): 0.15, L: 0.0}, L + 1)
    verify = dict(cpu={1: 1, 4: 1.13, 8: 1.28, 16: 1.56}, gpu={1: 1, 13: 1.18})[machine]
    table = dict(draft=costs.fill({0: 1, L: head}, L + 1), verify=costs.fill({0: 1} | verify, 14),
                 optimise=dict(cpu=1.5 if L <= 30 else 3.0, gpu=1.7)[machine])
    return curve, table


def logistic(x):
    return 1 / (1 + math.exp(-x))


def start(a, *deviations):
    """Where the logistic of a normal of these deviations has the mean a, nearly (MacKay 1992)."""
    a = min(max(a, 0.02), 0.999)
    return math.log(a / (1 - a)) * math.hypot(1, *(d * math.sqrt(math.pi / 8) for d in deviations))


def steps(policy, curve, table, error, level, greedy, rng):
    """Plain steps after the prefill; the policy is asked as by speculative.generate."""
    total = 0.0
    verified(policy)
    for n in itertools.count():
        if policy.left <= 0:
            return total
        if policy.due(n):
            off = level + rng.gauss(0, error)
            look(policy, *[logistic(start(a, error, 0.3, 0.4) + off + rng.gauss(0, 0.3))
                           for a in curve[1:policy.M + 1]])
            total += table["optimise"]
        xs = []
        confidence = []
        while len(xs) < policy.left - 1 and policy.goes_on(confidence):
            z = rng.gauss(0, 1)
            a = logistic(start(curve[policy.j], 0.9, 0.4) + level + 0.9 * z)
            xs.append(float(rng.random() < a) if greedy else rng.betavariate(4 * a, 4 * (1 - a)))
            confidence.append(logistic(0.6 + 2 * z))
        total += len(xs) * table["draft"][policy.j] + table["verify"][len(xs) + 1]
        rejected = [i for i, x in enumerate(xs) if rng.random() >= x]
        verified(policy, xs, min(rejected, default=len(xs)), confidence)


@mark.parametrize("N", [64, 128, 512])
@mark.parametrize("known", [True, False])
def test_where_nothing_pays_it_is_as_fast_as_plain_decoding(known, N):
    """Costs are known; or those of verifies are not, and may be measured, for 11 plain steps.
    Rejects a prior that hopes, a look that is read without one, looks at any price, measuring that
    does not wait for a look, drafts that go on till the next look though they do not pay."""
    speeds = []
    for model, machine, greedy, seed in itertools.product(
            UNTRAINED, ERROR, (True, False), range(PROMPTS)):
        curve, table = setting(*model, machine)
        level = 0.4 * NormalDist().inv_cdf((seed + 0.5) / PROMPTS)
        measure = Mock(return_value=table["verify"])
        unknown = {} if known else dict(verify=[1.0] * 14, measure=measure)
        policy = adaptive.Adaptive(Settings(N=N), **table | unknown)
        total = steps(policy, curve, table, ERROR[machine], level, greedy, random.Random(seed))
        speeds.append((N - 1) / (total + 11 * measure.call_count))
    assert fmean(speeds) >= 0.98 and min(speeds) >= 0.95


# ------------------------------------------------------------------------------ costs.py

EIGHT = Config(32, 4096, 32, 8, 128, 14336, 128256, 1e-5, 8192, False, 5e5, None)


def test_the_guess_is_by_the_bytes_that_a_pass_reads():
    """By hand for the 8B: a layer has 4096 * 48 * 128 + 4096 * 4096 + 3 * 4096 * 14336 weights,
    which is 218.1 million, the head 525.3: layers are .930 of what a plain step reads. Rejects a
    head that is left out, keys and values of H heads, a verify or a table of another size."""
    table = costs.guess(EIGHT, 12)
    assert len(table["draft"]) == 33 and table["draft"][0] == 1
    assert table["draft"][16] == approx(1 - 0.930 / 2, abs=1e-3)
    assert table["draft"][32] == approx(0.070, abs=1e-3)
    assert table["verify"] == [1.0] * 14 and table["optimise"] == 2.0


@mark.parametrize("S, per_row, sizes, want", [
    (40, 1, (1, 4, 13), {0: 1, 1: 1, 2: 1 + (14 / 11 - 1) / 3, 4: 14 / 11, 13: 23 / 11}),
    (10, -2, (1, 4, 7), dict.fromkeys(range(14), 1))])                      # 7 slots are left
def test_verifies_are_timed_where_they_will_run_and_the_least_of_three_counts(
        monkeypatch, S, per_row, sizes, want):
    """Rejects a warm-up that counts, a mean, the last of three, seconds for plain steps, one row's
    logits, another place than after the text, slots that are not there, and a gain that is only
    noise. A pass takes 110, then 10, then 20 seconds, and the head some for each row."""
    now = [0.0]
    passes = []

    def sequence(t, T):
        assert t + T <= S
        return t, T

    def forward(ids, rows, cache):
        done = (*rows, ids[0].item())
        now[0] += (110, 10, 20)[passes.count(done)]
        passes.append(done)
        return [torch.zeros(len(ids), 1)]

    def head(x):
        now[0] += per_row * len(x)
        return x
    monkeypatch.setattr(costs, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    model = SimpleNamespace(device="cpu", forward=forward, head=head)
    table = costs.measure(model, SimpleNamespace(S=S, sequence=sequence), [3, 5, 7], 12)
    assert passes == [(3, n, 7) for n in sizes] * 3 and len(table) == 14
    assert {n: table[n] for n in want} == approx(want, abs=1e-3)


def test_a_table_is_kept_under_a_name_of_what_it_depends_on(tmp_path, monkeypatch):
    """Rejects a table of other weights, of another dtype, or of the last version of the model; and
    a home that cannot be written to as a fault."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = put(tmp_path / "model", {"config.json": dict(hidden_size=8), "model.safetensors": "1"})
    shelf = costs.shelf(model, "bfloat16", 2)
    assert shelf == costs.shelf(model, "bfloat16", 2) and tmp_path / "cache" in shelf.parents
    others = [costs.shelf(model, "float32", 2), costs.shelf(model, "bfloat16", 1)]
    for files in ({"model.safetensors": "12"}, {"config.json": dict(hidden_size=16)}):
        others.append(costs.shelf(put(model, files), "bfloat16", 2))
    assert len({shelf, *others}) == 5
    table = dict(draft=[1.0, 0.5], verify=[1.0, 1.0, 1.2], optimise=2.0)
    assert costs.keep(shelf, table) and costs.load(str(shelf), L=1, K=1) == table
    assert not costs.keep(model / "config.json" / "no folder", table)


@mark.parametrize("wrong", [
    dict(draft=[1.0]), dict(draft=[1.0, "x"]), dict(verify=[1.0]), dict(verify=[1.0, 1.0, 0.0]),
    dict(verify=[9.0, 1.0]), dict(optimise=[1]), dict(optimise=-1), dict(risk=[0.1]), dict(other=1),
    dict(draft=None)])
def test_a_file_of_costs_is_checked_and_drawn_out(tmp_path, wrong):
    """Rejects tables that a run would stumble over, and a refusal of what --json prints, or of a
    table that was measured for a smaller K."""
    right = dict(draft=[1.0, 0.5], verify=[1.0, 1.0, 1.25], optimise=2.0, risk=[0.0, 0.1])
    path = tmp_path / "costs.json"
    for whole in (right, dict(costs=right), dict(settings=dict(costs=right))):
        path.write_text(json.dumps(whole))
        assert costs.load(str(path), L=1, K=3)["verify"] == [1.0, 1.0, 1.25, 1.5, 1.75]
    path.write_text(json.dumps(right | wrong))
    with raises(ModelError, match="costs.json: costs are"):
        costs.load(str(path), L=1, K=3)
