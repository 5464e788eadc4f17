"""What the policy decides: whether to draft, with how many layers left out, when to choose anew.
That it changes no distribution is shown in test_clasp.py.
"""
import itertools
import types

from speculative import Adaptive, torch
from test_clasp import adaptive, decode, tiny_llama


def test_the_policy_declines_where_nothing_pays_and_looks_again_later():
    """Rejects a run that is slowed down by drafts that cost as much as they save, one that never
    tries again, and a rest that grows no longer."""
    s, loop = adaptive(c=[1, .99, .98, .97], temperature=1.0, N=240)
    rounds = decode(tiny_llama(V=9), [0], s, 0, loop)
    assert not any(r.drafted or r.choice for r in rounds) and len(rounds) == 240
    s, loop = adaptive(c=[1, .85, .85, .85], temperature=1.0, N=240)
    rounds = decode(tiny_llama(V=3), [0], s, 0, loop)
    plain = [len(list(g)) for drafts, g in itertools.groupby(bool(r.drafted) for r in rounds[1:-1])
             if not drafts]
    assert plain and plain[0] in range(63, 66) and sum(len(r.drafted) for r in rounds) > 3


def test_the_policy_leaves_out_what_costs_least_for_what_is_accepted():
    """Rejects a budget that does not follow the costs, and drafts that end neither earlier where
    verifies are dear nor later where drafts are nearly free."""
    drafted = []
    for c, v in (([1, .9, .1, .1], None), ([1, .1, .9, .9], None), ([1, .02, .02, .02], None),
                 ([1, .3, .9, .9], [1, 1, 1.1, 1.6, 2.1])):
        s, loop = adaptive(c=c, v=v, N=60)
        rounds = [r for r in decode(tiny_llama(V=5, seed=3), [1], s, 0, loop) if r.drafted]
        assert {sum(r.skip) for r in rounds} == {2} if c[1] == .9 else {1}
        drafted.append(sum(len(r.drafted) for r in rounds) / len(rounds))
    assert drafted[2] > drafted[3]


def test_layers_are_chosen_anew_when_rejections_run_ahead_of_their_rate():
    """Rejects a CUSUM that never fires, that fires while the rate stays, or that forgets to start
    over: fed by hand, at 0.9 accepted for 200 tokens, then 0.3."""
    s, _ = adaptive()
    policy, one = Adaptive(s, [1, .7, .4, .1], [1] * 5), torch.tensor([[1.0, 0.0]])

    def feed(x, times):
        for n in range(times):
            policy.plan(True), policy.goes_on(0.9)
            policy.judged(torch.tensor([[x, 1 - x], [1.0, 0.0]]), [one[0]], 0)
            if policy.due(n):
                return n
        return None
    assert policy.due(0) and policy.watches(0)
    model = types.SimpleNamespace(head=lambda h: h)
    policy.probed(model, one, one.expand(3, 1, 2))
    assert feed(0.9, 200) is None and feed(0.3, 50) in range(2, 25)
    policy.probed(model, one, one.expand(3, 1, 2))
    assert policy.alarm == 0 and not policy.due(0)
