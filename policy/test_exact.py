"""The policies change no distribution, and the probe of several tokens is what it says: shown as in
test_clasp.py, by enumeration and by each candidate alone. What is decided: test_adaptive.py.
"""
import pytest
import torch

from dp_layer_skip import choose_skip, choose_skip_plain
from policy import adaptive as room
from policy.costs import measure
from policy.probe import PaperByProbe, choose_by, nearness
from speculative import Paper, Settings, generate
from test_clasp import SAMPLERS, STOPS
from tests.every_outcome import distance
from tests.helpers import assert_same_choice, having_read, tiny_llama
from tests.wrong_programs import rejects

CHEAP = dict(draft=[1, 0.7, 0.4, 0.1], verify=[1, 1.01, 1.02, 1.03, 1.04])
COSTS = [dict(), dict(K=2), dict(K=1), dict(draft=[1, .9, .8, .7]), dict(draft=[1, 1, 1, 1]),
         dict(draft=[1, .1, .9, .9]), dict(verify=[1, 1, 1.6, 1.7, 1.8])]
NAMED = [dict(), dict(M=1), dict(exit_threshold=0.5), dict(interval=1), dict(K=2, M=2)]


def test_the_policy_has_exactly_the_full_models_distribution(monkeypatch):
    """At costs at which it drafts much, little or not at all, with what a user may name, samplers,
    stops, probes of one to three tokens. Rejects a policy whose decisions show in the text, and a
    proof that would hold because it does nothing. Where nothing pays it looks every time here."""
    monkeypatch.setattr(room, "REST", 1)
    left_out = set()
    for n in range(14):
        s = Settings(N=4, stop_ids=STOPS[n % 2], **SAMPLERS[(2 * n + n // 5) % 5])
        how = CHEAP | COSTS[n % 7] | NAMED[n % 5] | dict(probe=1 + n % 3)

        def loop(model, prompt, s, chance, choose):
            for r in generate(model, prompt, s, chance, choose, room.Adaptive(s, **how)):
                if r.start > len(prompt):
                    left_out.add(sum(r.skip) if r.drafted else None)
                yield r
        assert distance(tiny_llama(seed=n), s, loop) < 1e-12, f"run {n}"
    assert left_out == {None, 1, 2}                    # None: plain


def test_so_has_the_papers_loop_by_two_tokens_and_with_passes_to_measure_in_between():
    """Rejects a probe or a measurement that leaves something behind which a later pass reads."""
    s = Settings(temperature=0.8, top_k=2, N=4, K=2, M=2, interval=1)

    class Measuring(PaperByProbe):
        def optimise(self, choose, model, cache, text, h):
            choice = super().optimise(choose, model, cache, text, h)
            measure(model, cache, text, s.K)
            return choice

    def loop(model, prompt, s, chance, choose):
        return generate(model, prompt, s, chance, choose, Measuring(s, 3, r=2))
    assert distance(tiny_llama(seed=2), s, loop) < 1e-12


@rejects("several tokens are held against h[i]", "one token is compared as several are",
         "candidates of a token see those of another", "one position for all tokens",
         "a token of a probe is blind to those before it", "a probe longer than the text")
def test_candidates_of_several_tokens_are_as_if_each_were_alone():
    """The reference runs each state of a candidate in the place of its token, on a cache that holds
    the text up to there alone, and holds errors against the end. Of one token the choice is the
    paper's. Rejects candidates that see one another, another's scratch, or another past."""
    text = [3, 1, 7, 7, 0, 2, 9]
    for seed, (M, r) in enumerate(((3, 1), (3, 2), (2, 4), (4, 3), (1, 9))):
        model = tiny_llama(V=11, L=5, H=4, G=2, seed=seed)
        h, cache = having_read(model, text, spare=(M + 1) * r)
        places = range(max(0, len(text) - r), len(text))
        states, pasts = zip(*(having_read(model, text[:t + 1], 0) for t in places))
        states = torch.stack(states, 1)                # (L+1, r, D)
        end = states[-1]

        def alone(i, g):                               # (1, r * D)
            each = zip(g.view(len(pasts), 1, -1), places, pasts)
            return torch.cat([model.layer(i, x, past.sequence(t, 1), past)
                              for x, t, past in each], 1)

        def near(g, target):
            if r == 1:
                return torch.cosine_similarity(g, target, -1)
            error = (g - target).view(-1, *end.shape)
            return torch.cosine_similarity(end, end + error, -1).mean(-1)

        want = choose_skip_plain(states.flatten(1), alone, M, near)
        try:
            got, ended = choose_by(r, choose_skip, model, cache, text, h, M)
        except RuntimeError as e:                      # positions before the text
            raise AssertionError(f"{r} tokens of 7") from e
        assert_same_choice(got, want, 1e-10)
        assert (ended - end).abs().max() < 1e-12
        s = Settings(K=1, M=M)
        for policy in [PaperByProbe(s, 5, r)] + [Paper(s, 5)] * (r == 1):
            again = policy.optimise(choose_skip, model, cache, text, h)
            assert repr(again) == repr(got) and policy.skip == got.skip()


@rejects("errors ride along in the states' dtype")
def test_the_nearness_of_several_tokens_is_float32_or_wider():
    """Rejects an error that is added to the last states in bfloat16."""
    gen = torch.Generator().manual_seed(0)
    end, target = torch.randn(2, 3, 64, generator=gen).bfloat16()
    g = (target + torch.randn(4, 3, 64, generator=gen) / 16).bfloat16()
    error = g.double() - target.double()
    want = torch.cosine_similarity(end.double(), end.double() + error, -1).mean(-1)
    got = nearness(end)(g.flatten(1), target.flatten())
    assert got.tolist() == pytest.approx(want.tolist(), abs=1e-6)
