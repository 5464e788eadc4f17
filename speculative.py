"""Self-speculative decoding: the lossless sampler and CLaSp's loop. `python speculative.py` prints
what comes out of the right sampler and of three wrong ones.

Why it is lossless (Leviathan et al. 2023, Chen et al. 2023). A draft proposes token d with
probability q(d); the full model would have said p(d).

    min(1, p/q)            accept with this probability: accepted drafts pay min(p, q)
    norm(max(0, p - q))    draw from this after a rejection: exactly what is still owed

The sum is p, whatever q was: a bad draft costs time, never truth. Three things must hold for this:

    - one function (`probabilities`) turns logits into p and into q, wherever they are needed;
    - what is drafted is judged. To stop *after* a doubtful token is harmless: how many are judged
      together changes no token's chance. To throw it away would make it rarer than p says;
    - draft and verify see the same text: rejected tokens leave nothing behind that anyone reads.

Glossary
    K, M       most tokens drafted per round; layers that the draft leaves out (at most)
    p, q       target (full model) and draft distributions over V tokens
    probe      the last r accepted tokens, whose states choose the layers to leave out next
    chance     answers "accept with probability a?" and "draw from p"; policy: see `Fixed`

This file knows no LLaMA and no dynamic program. A model is anything with cfg.L, device, cache(S),
forward, layer and head as in llama.py; a chooser is called as dp_layer_skip.choose_skip is.
"""
import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")     # nothing here needs it
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

CHUNK = 512                  # rows of one prefill pass: scores take rows x slots of memory per head


@dataclass(frozen=True)
class Settings:
    """What a user chooses; the first five make the distribution. None is for `Adaptive` alone."""
    temperature: float = 0.0    # 0 is greedy
    top_k: int = 0              # 0 is off
    top_p: float = 1.0          # above 0; 1 is off
    N: int = 128                # exactly so many new tokens, unless a stop token comes first
    stop_ids: tuple[int, ...] = ()
    K: int | None = 0           # 0 is plain decoding
    M: int | None = 0           # 0 drafts with the full model
    exit_threshold: float | None = 0.0  # end a draft after a token of lower confidence
    interval: int | None = 16   # verifications between two layer optimisations (the paper's LOI)
    r: int = 1                  # tokens of the probe (1 in the paper)


def probabilities(logits: Tensor, s: Settings) -> Tensor:                   # (..., V) -> (..., V)
    """The one way from logits to the distribution that is sampled: temperature, top-k, top-p, in
    float32 or wider. Greedy is one-hot and needs no rule of its own. Ties: the smaller id first."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if s.temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    logits = logits - logits.amax(-1, keepdim=True)    # small temperatures must not overflow
    logits = logits / max(s.temperature, torch.finfo(logits.dtype).tiny)
    if not s.top_k and s.top_p == 1:
        return logits.softmax(-1)
    logits, order = logits.sort(dim=-1, descending=True, stable=True)
    if s.top_k:
        logits[..., s.top_k:] = -torch.inf
    p = logits.softmax(-1)
    if s.top_p < 1:              # the shortest beginning that reaches it: what precedes falls short
        p = torch.where(p.cumsum(-1) - p < max(s.top_p, torch.finfo(p.dtype).tiny), p, 0)
    return torch.zeros_like(p).scatter_(-1, order, p / p.sum(-1, keepdim=True))


# ---------------------------------------------------------------- the sampler: formulas, chance

def overlap(p: Tensor, q: Tensor) -> Tensor:                        # (..., V), (..., V) -> (...)
    """sum(min(p, q)): the chance that a token drafted from q is accepted."""
    return torch.minimum(p, q).sum(-1)


def acceptance(p: Tensor, q: Tensor) -> Tensor:
    """min(1, p/q): how likely a drafted token is kept (Leviathan et al. 2023, Algorithm 1)."""
    return (p.double() / q.double()).clamp(max=1)


def residual(p: Tensor, q: Tensor) -> Tensor:                               # (V,), (V,) -> (V,)
    """norm(max(0, p - q)): the probability still owed after drafting has paid min(p, q) (ibid.).
    Where p and q agree nothing is owed or can have been rejected; should rounding say so, p."""
    owed = (p - q).clamp(min=0)
    mass = owed.sum()
    return torch.where(mass > 0, owed / mass, p)


@dataclass(frozen=True)
class Verdict:
    """What the full model said to k drafted tokens."""
    p: list[float]              # probability of each under the full model
    q: list[float]              # and under the draft
    a: list[float]              # acceptance probability of each
    accepted: int               # how many were accepted, from the first on
    token: int                  # the full model's own: a correction or, if all were accepted, bonus


def judge(p: Tensor, q: Sequence[Tensor], drafted: Sequence[int], chance: "Chance") -> Verdict:
    """Leviathan et al. 2023, Algorithm 1. p (k+1, V): row r predicts what stands in the place of
    drafted[r], the last row what follows all; q k times (V,)."""
    k = len(drafted)
    at = torch.tensor(drafted, dtype=torch.long, device=p.device)[:, None]
    p_at, q_at = p[:k].gather(1, at)[:, 0], torch.stack([*q, p[k]])[:k].gather(1, at)[:, 0]
    said = torch.stack((p_at.double(), q_at.double(), acceptance(p_at, q_at))).tolist()
    for r, a in enumerate(said[2]):
        if not chance.accept(a):
            return Verdict(*said, r, chance.draw(residual(p[r], q[r])))
    return Verdict(*said, k, chance.draw(p[k]))


class Chance:
    """A seeded generator, on the host: a seed means the same uniforms on every device."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)        # of which it uses 32 bits

    def uniform(self) -> float:
        """u in [0, 1), 53 random bits."""
        return torch.rand((), generator=self.generator, dtype=torch.float64).item()

    def accept(self, a: float) -> bool:
        """True with probability a. Strict: u <= a would pass a token of probability 0 at u = 0."""
        return self.uniform() < a

    def draw(self, p: Tensor) -> int:
        """A token drawn from p (V,): the first id at which the running sum, in float64, exceeds u
        times the total. Parallel sums may fall by rounding, so where p is 0 they count as 0."""
        cdf = torch.where(p > 0, p.cumsum(0, dtype=torch.float64), 0)
        return int((cdf > self.uniform() * cdf.amax()).int().argmax())


class Fixed:
    """The paper's: up to K tokens with M layers left out, an end after one of low confidence, a new
    choice of layers every `interval` rounds. A round of the loop calls these methods in turn: plan,
    goes_on after every drafted token, watches, judged, due, and probed if layers were chosen."""

    def __init__(self, s: Settings) -> None:
        self.s, self.M, self.j = s, s.M, s.M           # left out at most, now

    def plan(self, chosen: bool) -> int:
        """A round begins, `chosen` if there is a set: how many tokens may be drafted?"""
        return self.s.K

    def goes_on(self, confidence: float) -> bool:
        """A token was drafted with this confidence: another?"""
        return confidence >= self.s.exit_threshold

    def judged(self, p: Tensor, q: Sequence[Tensor], accepted: int) -> None:
        """A verify has spoken: p (k+1, V), q k times (V,)."""

    def due(self, n: int) -> bool:
        """States were kept: are layers to be optimised after verification n?"""
        return n % self.s.interval == 0

    def watches(self, n: int) -> bool:
        """Can layers be optimised then, or soon by states of then? Else none are kept."""
        return self.s.K != 0 and self.M > 0 and (self.s.r > 1 or n % self.s.interval == 0)

    def probed(self, model: Any, h: Tensor, g: Tensor) -> None:
        """Layers were optimised: h (r, D) the full model's last states, g (M+1, r, D) a draft's."""


class Adaptive(Fixed):
    """Beyond the paper: what pays, by what passes cost and what was accepted; what settings name is
    fixed. It knows confidences, and p and q of what was judged, and drops nothing: still lossless.

    c[j], v[n]   cost of a draft step with j layers left out, of a verify of n rows, in plain steps
    o            of a choice of layers, if no risks are given: the first, which may be in vain, is
                 made only where it costs at most 2 % of what is left to decode
    risk[j]      chance that a drafted token is rejected: given, or 0.5 (j/L)^2; refined by probes
    keep(j)      1 - risk[j] * rejected / expected: corrected by what was seen, the old fading
    gain(j)      tokens per plain step: max over k of (1 + a + .. + a^k) / (k c[j] + v[k+1])"""

    def __init__(self, s: Settings, draft: Sequence[float], verify: Sequence[float],
                 optimise: float = 0.0, risk: Sequence[float] | None = None) -> None:
        L, self.s, self.c, self.v = len(draft) - 1, s, draft, verify
        self.o = 0.0 if risk else optimise
        budgets = self.budgets(L) if s.M is None else [s.M]
        self.risk = {j: risk[j] if risk else 0.5 * (j / L) ** 2 for j in budgets}
        self.K, self.M, self.j = len(verify) - 2 if s.K is None else s.K, max(budgets), max(budgets)
        self.rejected, self.expected = 1.0, 1.0        # seen, and foretold by the risks
        self.kept, self.seen = [0.0, 0.0], [0, 0]      # by confidence: below 0.5, from there on
        self.rest, self.wait, self.probes = 0, 64, 0   # rounds to decode plainly now, and next time
        self.bins, self.alarm, self.misses, self.tokens = [], math.inf, 0.0, 0      # see `judged`

    @staticmethod
    def budgets(L: int) -> list[int]:      # 1/16 to 11/16 of the layers
        return sorted({max(1, round(L * k / 16)) for k in range(1, 12)})

    def keep(self, j: int) -> float:
        return 1 - min(max(self.risk[j] * self.rejected / self.expected, 0.005), 0.99)

    def gain(self, j: int) -> float:
        a, tokens, best = self.keep(j), 1.0, 0.0
        for k in range(1, self.K + 1):
            tokens = 1 + a * tokens
            best = max(best, tokens / (k * self.c[j] + self.v[k + 1]))
        return best

    def plan(self, chosen: bool) -> int:
        self.bins, self.reach = [], 1.0                # reach: chance that all drafted is accepted
        return self.K if chosen and not self.rest else 0

    def goes_on(self, confidence: float) -> bool:
        self.bins.append(b := int(confidence >= 0.5))
        if self.s.exit_threshold is not None:
            return super().goes_on(confidence)
        # It is kept as others of such confidence were; foretold, for 4 of them, (a + sqrt(c)) / 2.
        a, k = self.keep(self.j), len(self.bins)
        self.reach *= (self.kept[b] + 2 * (a + confidence ** 0.5)) / (self.seen[b] + 4)
        # Per cost one more has to bring nine tenths of `gain`, which takes all tokens to be alike.
        return k < self.K and self.reach * a >= 0.9 * self.gain(self.j) * (
            self.c[self.j] + self.v[k + 2] - self.v[k + 1])

    def judged(self, p: Tensor, q: Sequence[Tensor], accepted: int) -> None:
        self.rest, n = max(0, self.rest - 1), min(accepted + 1, len(q))     # n tokens were judged
        for b, x in zip(self.bins, overlap(p[:n], torch.stack(q[:n])).tolist() if n else ()):
            self.kept[b], self.seen[b] = self.kept[b] + x, self.seen[b] + 1
            self.rejected = 0.98 * self.rejected + 1 - x
            self.expected = 0.98 * self.expected + self.risk[self.j]
            # One-sided CUSUM: log likelihood of twice the rate of rejections since the choice of
            # layers (up to a third), against that. Above 2 choose anew: where one token in ten is
            # rejected, for no reason once in 190; where that triples, after 15 (simulated).
            rate = max(self.misses / self.tokens, 0.02)
            high = min(2 * rate, (1 + rate) / 2)
            self.alarm = max(0.0, self.alarm + (1 - x) * math.log(high / rate)
                             + x * math.log((1 - high) / (1 - rate)))
            self.misses, self.tokens = self.misses + 1 - x, self.tokens + 1

    def watches(self, n: int) -> bool:
        tried = self.probes > 0 or self.o <= 0.02 * (self.s.N - n)
        return self.K > 0 and self.rest <= self.s.r and tried

    def due(self, n: int) -> bool:
        if self.rest:
            return False
        self.j = max(self.risk, key=self.gain)
        if self.s.M is None and self.gain(self.j) <= 1:             # nothing pays: decode plainly
            self.rest, self.wait = self.wait, 2 * self.wait         # for a while, then try again
            self.rejected, self.expected, self.alarm = 1.0, 1.0, math.inf
            return False
        return n % self.s.interval == 0 if self.s.interval else self.alarm > 2

    def probed(self, model: Any, h: Tensor, g: Tensor) -> None:
        # At temperature 1, whatever the settings: a first estimate, which `keep` corrects.
        full, drafts = model.head(h).softmax(-1), model.head(g[list(self.risk)].flatten(0, 1))
        a, self.probes = overlap(full, drafts.softmax(-1).view(-1, *full.shape)), self.probes + 1
        for j, a_j in zip(self.risk, a.mean(-1).tolist()):
            self.risk[j] += (1 - a_j - self.risk[j]) / (self.probes + 1)
        self.j = max(self.risk, key=self.gain)
        self.alarm, self.misses, self.tokens = 0.0, 16 * (1 - self.keep(self.j)), 16    # foretold


@dataclass(frozen=True)
class Round:
    """One round; in round 0, the prefill, nothing is drafted."""
    start: int                  # tokens of text before it
    skip: tuple[bool, ...]      # layers that the draft left out
    drafted: list[int]          # d1..dk
    confidence: list[float]     # the draft's top-1 probability at each, at temperature 1
    verdict: Verdict            # what the full model said to them
    emitted: list[int]          # the accepted ones and the full model's own, cut after a stop token
    choice: Any                 # what the chooser returned, if it was asked after this round
    seconds: tuple[float, float, float]     # draft, verify, optimise

    @property
    def accepted(self) -> int:
        return self.verdict.accepted


@torch.inference_mode()
def generate(model: Any, prompt: Sequence[int], s: Settings, chance: Chance,
             choose: Callable[..., Any] | None = None, policy: Any = None) -> Iterator[Round]:
    """Continue `prompt` by s.N tokens, or to a stop token; yield each round as it ends (Fig. 1).
    Exactly the full model's distribution comes out, whatever `choose` (None: nothing is left out)
    and `policy` (`Fixed`) do. Raises FloatingPointError if the prompt's logits are not finite."""
    policy = policy or Fixed(s)
    assert prompt and s.temperature >= 0 and s.top_k >= 0 and 0 < s.top_p <= 1 and s.N > 0 < s.r, s
    assert 0 <= (s.K or 0) < CHUNK and 0 <= policy.M <= model.cfg.L and s.interval != 0, s
    text, end, choice = list(prompt), len(prompt) + s.N, None
    recent, cache = [], model.cache(end + (policy.M + 1) * s.r)     # DP's scratch: behind the text

    for n in itertools.count():
        began, t = _clock(model), len(text) - 1        # t: position of the last token
        drafted, q, confidence, skip, cached = [], [], [], (False,) * model.cfg.L, 0
        if n > 0:              # round 0 is the prefill: nothing can be drafted, nothing is cached
            # 1. Draft: up to K tokens, though no more than can be emitted beside the model's own.
            cached, K = t, min(policy.plan(choice is not None), end - len(text) - 1)
            skip = choice.skip(policy.j) if choice else skip
            while len(drafted) < K:
                ids = torch.tensor([drafted[-1] if drafted else text[-1]], device=model.device)
                logits, _ = model.forward(ids, cache.sequence(t + len(drafted), 1), cache, skip)
                q.append(probabilities(logits[0], s))                       # (V,)
                drafted.append(chance.draw(q[-1]))
                # Ours, as the paper is silent: confidence is the draft's top-1 probability at
                # temperature 1, unfiltered; and a doubtful token is judged like any other, only
                # what would follow it is not drafted.
                confidence.append(logits.softmax(-1).amax().item())
                if not policy.goes_on(confidence[-1]) or drafted[-1] in s.stop_ids:
                    break
        drafting = _clock(model)

        # 2. Verify: one full pass over the last token and the drafts (at first, the prompt). It
        #    overwrites all layers' keys and values there, so a rejected draft needs no undoing.
        #    Row 0 of p (k+1, V) predicts what follows the last token, row r what follows r drafts.
        k = len(drafted)
        todo, states = text[cached:] + drafted, choose is not None and policy.watches(n)
        rows = max(k + 1, min(s.r, len(todo)) if states else 0)        # in the prompt, r tokens
        logits, h = read(model, todo, cached, cache, rows, states)
        if n == 0 and not logits.isfinite().all():
            raise FloatingPointError("the model's logits are not finite numbers: damaged weights?")
        p = probabilities(logits[-k - 1:], s)
        verdict = judge(p, q, drafted, chance)
        emitted = drafted[:verdict.accepted] + [verdict.token]
        stops = [r for r, d in enumerate(emitted) if d in s.stop_ids]
        emitted = emitted[:stops[0] + 1] if stops else emitted      # the text ends there
        text += emitted                # the last of them has no keys and values in the cache yet
        done = bool(stops) or len(text) == end
        policy.judged(p, q, verdict.accepted)
        verifying = _clock(model)

        # 3. Optimise layers: the probe is the last accepted token, at first the prompt's last, and
        #    r - 1 before it. The states come from the verify; candidates are told its position.
        new, recent = None, [*recent, h[:, :rows - k + verdict.accepted]][-s.r:] if states else []
        if states and policy.due(n) and not done:
            h = torch.cat(recent, 1)[:, -s.r:]                              # (L+1, r, D)
            them = cache.candidates(t + verdict.accepted, policy.M + 1, h.shape[1])

            def run_layer(i: int, g: Tensor, them: Any = them) -> Tensor:   # (J, r, D)
                return model.layer(i, g.flatten(0, 1), them, cache).view_as(g)
            new = choice = choose(h, run_layer, policy.M)
            policy.probed(model, h[-1], choice.states)
        ended = _clock(model)
        yield Round(t + 1, skip, drafted, confidence, verdict, emitted, new,
                    (drafting - began, verifying - drafting, ended - verifying))
        if done:
            return


def read(model: Any, tokens: Sequence[int], t: int, cache: Any, last: int = 1,
         states: bool = False, skip: Sequence[bool] = ()) -> tuple[Tensor, Tensor | None]:
    """One long pass over `tokens`, the first at position t, in equal parts of at most CHUNK rows:
    what model.forward returns for the last `last` (at most CHUNK / 2), or as many as there are."""
    for ids in torch.tensor(tokens, device=model.device).tensor_split(-(-len(tokens) // CHUNK)):
        last = min(last, len(ids))
        out = model.forward(ids, cache.sequence(t, len(ids)), cache, skip, last, states)
        t += len(ids)
    return out


def _clock(model: Any) -> float:
    """Seconds; a GPU works behind the host's back, so it is waited for first."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def main() -> None:
    p, q = torch.tensor([[.50, .25, .15, .07, .03], [.20, .40, .15, .05, .20]], dtype=torch.float64)
    a, top, one = acceptance(p, q), torch.eye(5)[q.argmax()].double(), torch.ones_like(p)
    print("What comes out, token by token, where one is drafted: draft * a + P(rejection) * own\n")
    for name, draft, a, own in (
            ("p, the full model", p, one, p), ("q, the draft", q, one, p),
            ("right: a = min(1, p/q), own = residual", q, a, residual(p, q)),
            ("wrong: own = p", q, a, p), ("wrong: own = softmax(p - q)", q, a, (p - q).softmax(0)),
            ("wrong: argmax drafts, judged by q", top, a, residual(p, q))):
        out = draft * a + (draft * (1 - a)).sum() * own
        print(f"{name:40}" + "".join(f"{v:7.3f}" for v in out.tolist())
              + f"   largest error {(out - p).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
