"""What the policy decides, followed by hand: costs, confidences and what was accepted are given,
and it is read off how much is left out, how long is drafted, when layers are chosen and when it
rests. That no text depends on it stands in test_exact.py, what it gives in test_no_harm.py.
"""
from unittest.mock import Mock

from pytest import approx, mark

from dp_layer_skip import Choice, torch
from policy import adaptive
from speculative import Settings

torch.set_num_threads(1)
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
    cache = Mock(S=99, slot=torch.arange(99))
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
    """Rejects the cost of a verify of k rows for that of k + 1, a power of a too few, and a chance
    below 0."""
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
    costs = ([1, 0.1, 0.1, 0.1, 0.1], CHEAP)
    policy = policy_of(*costs, risk=[0, 0.1, 0.2, 0.4, 0.9])
    look(policy, 0.9, 0.7, 0.5)
    look(policy, 0.6, 0.7, 1.0)
    means = {1: (0.1 + 0.1 + 0.4) / 3, 2: (0.2 + 0.3 + 0.3) / 3, 3: (0.4 + 0.5 + 0.0) / 3}
    assert policy.risk == approx(means)
    policy = policy_of(*costs, probe=2)
    look(policy, (0.9, 0.5), (0.7, 0.1), (0.6, 0.0))   # means of .7, .4, .3
    means = {1: (1 / 4 + 0.3) / 2, 2: (2 / 4 + 0.6) / 2, 3: (3 / 4 + 0.7) / 2}
    assert policy.risk == approx(means) and policy.slots == (3 + 1) * 2


@mark.parametrize("accepted, counted", [(0, 1), (1, 2), (2, 3), (3, 3)])
def test_risks_are_corrected_by_what_was_judged_since_the_look(accepted, counted):
    """Rejects drafts behind a rejection that are counted, and what a look does not set back."""
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
    """So much, and no more, one more token behind those may cost."""
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
