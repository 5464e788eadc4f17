"""Self-speculative decoding: the lossless sampler and CLaSp's loop. `generate` is the paper's
round, step for step.

Why it is lossless (Leviathan et al. 2023, Chen et al. 2023). A draft proposes token d with
probability q(d); the full model would have said p(d).

    min(1, p/q)            accept with this probability: accepted drafts pay min(p, q)
    norm(max(0, p - q))    draw from this after a refusal: exactly what is still owed

The sum is p, whatever q was: a bad draft costs time, never truth. Three things must hold for this,
and each has a test that fails when it does not:

    - one function (`probabilities`) turns logits into p and into q, for draft, acceptance, residual
      and bonus;
    - what is drafted is judged: a token that was drawn is never thrown away because it looks
      doubtful;
    - draft and verify see the same text: refused tokens leave nothing behind that anyone reads.

Glossary
    K, M       most tokens drafted per round; layers that the draft leaves out
    p, q       target (full model) and draft distributions over V tokens
    k          tokens drafted this round, k <= K
    text       prompt and everything emitted; `cached` of its tokens have keys and values of the
               full model
    chance     who answers the two questions of chance: "accept with probability a?" and "draw from
               p"

This file knows no LLaMA and no dynamic program, and of GPUs only how to wait for one rarely. A
model is anything with cfg.L, device, cache(S), forward, layer and head as in llama.py; a chooser is
anything called as dp_layer_skip.choose_skip is.
"""
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK = 512                  # rows of one prefill pass: scores take rows x slots of memory per head


# -------------------------------------------------------------------------- logits -> probabilities

@dataclass(frozen=True)
class Settings:
    """What a user chooses. Only the first five change what comes out: three its distribution, N and
    stop_ids where it ends."""
    temperature: float = 0.0    # 0 is greedy
    top_k: int = 0              # 0 is off
    top_p: float = 1.0          # 1 is off
    N: int = 128                # exactly so many new tokens, unless a stop token comes first
    stop_ids: tuple[int, ...] = ()
    K: int = 0                  # 0 is plain decoding
    M: int = 0                  # 0 drafts with the full model
    exit_threshold: float = 0.0  # stop drafting after a token of lower confidence; 0 never does
    interval: int = 16          # verifications between two layer optimisations (the paper's LOI)

    def check(self, L: int) -> str | None:
        """The first fault of these settings for a model of L layers, as one line; else None."""
        for ok, complaint in (
                (0 <= self.temperature <= 1e300,
                 f"temperature {self.temperature}: 0 (greedy) to 1e300 wanted"),
                (0 <= self.top_k <= 2 ** 53, f"top-k {self.top_k}: 0 (off) to 2**53 wanted"),
                (0 < self.top_p <= 1, f"top-p {self.top_p}: above 0 and at most 1 (off) wanted"),
                (self.N >= 1, f"max-new-tokens {self.N}: at least 1 wanted"),
                (0 <= self.K < CHUNK,
                 f"draft-length {self.K}: 0 (no drafting) to {CHUNK - 1} wanted"),
                (0 <= self.M <= L,
                 f"skip-layers {self.M}: the model has {L} layers, so 0 to {L} wanted"),
                (0 <= self.exit_threshold <= 1,
                 f"draft-exit-threshold {self.exit_threshold}: 0 (off) to 1 wanted"),
                (1 <= self.interval <= 2 ** 53,
                 f"interval {self.interval}: 1 to 2**53 wanted")):
            if not ok:
                return complaint
        return None


def probabilities(logits: Tensor, s: Settings) -> Tensor:                   # (..., V) -> (..., V)
    """The one way from logits to the distribution that is sampled: temperature, then top-k, then
    top-p, in float32 or wider. Greedy is a one-hot distribution, so that it needs no rule of its
    own anywhere else. Ties: the smaller id first."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if s.temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    # The smallest temperatures must neither overflow nor vanish in float32.
    logits = logits - logits.amax(-1, keepdim=True)
    logits = logits / max(s.temperature, torch.finfo(logits.dtype).tiny)
    if not s.top_k and s.top_p == 1:
        return logits.softmax(-1)
    logits, order = logits.sort(dim=-1, descending=True, stable=True)
    if s.top_k:
        logits[..., s.top_k:] = -torch.inf
    p = logits.softmax(-1)
    # The nucleus is the shortest beginning with a mass of at least top_p: a token stays if those
    # before it fall short.
    if s.top_p < 1:
        p = torch.where(p.cumsum(-1) - p < max(s.top_p, torch.finfo(p.dtype).tiny), p, 0)
    return torch.zeros_like(p).scatter_(-1, order, p / p.sum(-1, keepdim=True))


# ---------------------------------------------------------------------- the sampler: three formulas

def acceptance(p: Tensor, q: Tensor) -> Tensor:
    """min(1, p/q): how likely a drafted token is kept, from its probabilities under target and
    draft (Leviathan et al. 2023, Algorithm 1)."""
    return (p.double() / q.double()).clamp(max=1)


def residual(p: Tensor, q: Tensor) -> Tensor:                               # (V,), (V,) -> (V,)
    """norm(max(0, p - q)): the probability still owed after drafting has paid min(p, q) (ibid.).
    Where p and q agree to the last bit nothing is owed, and nothing can have been refused; should
    rounding say otherwise, p itself."""
    owed = (p - q).clamp(min=0)
    mass = owed.sum()
    return torch.where(mass > 0, owed / mass, p)


@dataclass(frozen=True)
class Verdict:
    """What the full model said to k drafted tokens."""
    p: list[float]              # probability of each under the full model
    q: list[float]              # and under the draft
    a: list[float]              # acceptance probability of each
    accepted: int               # how many were kept, from the first on
    token: int                  # what the full model adds: the correction of the first refusal or,
                                # if all passed, a bonus


def judge(p: Tensor, q: Sequence[Tensor], drafted: Tensor, chance: "Chance") -> Verdict:
    """p (k+1, V), q k times (V,), drafted (k,) ids on p's device. What the full model adds is drawn
    from one of k+1 distributions: after a refusal at r from the residual there, else from p's last
    row."""
    def owed(r: int) -> Tensor:                                             # (V,)
        return residual(p[r], q[r]) if r < len(q) else p[-1]

    draw = chance.one_of(owed, len(q) + 1)
    if not len(q):
        return Verdict([], [], [], 0, draw(0))
    at = drafted[:, None]
    p_at, q_at = p[:-1].gather(1, at)[:, 0], torch.stack(list(q)).gather(1, at)[:, 0]
    # One wait for a GPU: with these numbers come the tokens that `one_of` may have drawn ahead.
    p_at, q_at, a = torch.stack((p_at.double(), q_at.double(), acceptance(p_at, q_at))).tolist()
    r = next((r for r, a_r in enumerate(a) if not chance.accept(a_r)), len(a))
    return Verdict(p_at, q_at, a, r, draw(r))


# ------------------------------------------------------------------------------ chance

class Chance:
    """The real one: a seeded generator. It lives on the host, so that a seed means the same
    uniforms on every device."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self) -> float:
        """u in [0, 1), 53 random bits."""
        return torch.rand((), generator=self.generator, dtype=torch.float64).item()

    def accept(self, a: float) -> bool:
        """True with probability a. Strict: u <= a would pass a token of probability 0 at u = 0."""
        return self.uniform() < a

    def draw(self, p: Tensor) -> int:
        """A token drawn from p (V,)."""
        return int(inverse_cdf(p, self.uniform()))

    def one_of(self, p: Callable[[int], Tensor], n: int) -> Callable[[int], int]:
        """Take the uniform of one draw now, and choose the distribution later: returns draw(r), a
        token from p(r), where p(0) .. p(n-1) are (V,) each. On a GPU all n tokens are drawn at
        once, so that the host need not wait a second time."""
        u, device = self.uniform(), p(n - 1).device
        if device.type != "cuda":
            return lambda r: int(inverse_cdf(p(r), u))
        tokens = inverse_cdf(torch.stack([p(r) for r in range(n)]), u).to("cpu", non_blocking=True)

        def draw(r: int) -> int:
            torch.cuda.current_stream(device).synchronize()     # at once: judge has waited already
            return int(tokens[r])
        return draw


def inverse_cdf(p: Tensor, u: float) -> Tensor:                             # (..., V) -> (...) ids
    """The first token, in ascending id, at which the running sum of p, in float64, exceeds u times
    its total."""
    # Zero where p is: no such token can be the first to exceed, even where the rounding of a
    # parallel sum makes it fall.
    cdf = torch.where(p > 0, p.cumsum(-1, dtype=torch.float64), 0)
    # (1 - 2^-53) * total can round up to total, which no sum exceeds.
    u = min(u, 1 - 2 ** -52)
    return (cdf > u * cdf.amax(-1, keepdim=True)).int().argmax(-1)


class Recording(Chance):
    """A Chance that keeps a log: ("accept", a, u, verdict) and ("draw", p, u, token)."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.log: list[tuple[str, Any, float, int]] = []

    def uniform(self) -> float:
        self.u = super().uniform()
        return self.u

    def accept(self, a: float) -> bool:
        verdict = super().accept(a)
        self.log.append(("accept", a, self.u, verdict))
        return verdict

    def draw(self, p: Tensor) -> int:
        token = super().draw(p)
        self.log.append(("draw", p, self.u, token))
        return token

    def one_of(self, p: Callable[[int], Tensor], n: int) -> Callable[[int], int]:
        ahead, u = super().one_of(p, n), self.u

        def draw(r: int) -> int:
            token = ahead(r)
            self.log.append(("draw", p(r), u, token))
            return token
        return draw


class Enumerating(Chance):
    """Chance without chance: it follows a script of answers, then takes the first possible answer
    to every further question, and notes the scripts of the answers it did not give. `weight` is the
    probability of all it answered."""

    def __init__(self, script: Sequence[int]) -> None:
        self.script, self.taken, self.untaken, self.weight = script, [], [], 1.0

    def _answer(self, options: list[tuple[int, float]]) -> int:
        k = len(self.taken)
        pick = self.script[k] if k < len(self.script) else 0
        if k >= len(self.script):
            self.untaken += [[*self.taken, other] for other in range(1, len(options))]
        self.taken.append(pick)
        self.weight *= options[pick][1]
        return options[pick][0]

    def accept(self, a: float) -> bool:
        return bool(self._answer([(v, w) for v, w in ((True, a), (False, 1 - a)) if w > 0]))

    def draw(self, p: Tensor) -> int:
        return self._answer([(token, w) for token, w in enumerate((p / p.sum()).tolist()) if w > 0])

    def one_of(self, p: Callable[[int], Tensor], n: int) -> Callable[[int], int]:
        return lambda r: self.draw(p(r))


def every_outcome(run: Callable[[Chance], Any]) -> Iterator[tuple[Any, float]]:
    """Run `run` down every branch that chance can take: (its result, the probability of that
    branch), until none is left. The weights sum to 1, and those of equal results to the result's
    exact probability."""
    scripts: list[list[int]] = [[]]
    while scripts:
        chance = Enumerating(scripts.pop())
        result = run(chance)
        scripts += chance.untaken
        yield result, chance.weight


# ------------------------------------------------------------------------------ the loop

@dataclass(frozen=True)
class Round:
    """What happened in one round. Round 0 is the prefill: its verify pass is over the prompt,
    nothing is drafted."""
    start: int                  # tokens of text before it
    skip: tuple[bool, ...]      # layers that the draft left out
    drafted: list[int]          # d1..dk
    confidence: list[float]     # the draft's top-1 probability at each, at temperature 1
    verdict: Verdict            # what the full model said to them
    emitted: list[int]          # the kept ones and the full model's own, cut after a stop token
    choice: Any                 # what the chooser returned, if it was asked after this round
    seconds: tuple[float, float, float]     # draft, verify, optimise

    @property
    def accepted(self) -> int:
        """How many drafted tokens were kept: d1..d_accepted."""
        return self.verdict.accepted

    def parts(self) -> dict[str, list[int]]:
        """The tokens by what became of them: "kept", "refused", the full model's "own"."""
        return dict(kept=self.emitted[:self.accepted], refused=self.drafted[self.accepted:],
                    own=self.emitted[self.accepted:])


@torch.inference_mode()
def generate(model: Any, prompt: Sequence[int], s: Settings, chance: Chance,
             choose: Callable[..., Any] | None = None) -> Iterator[Round]:
    """Continue `prompt` by s.N tokens, or to a stop token; yield each round as it ends.

    The emitted tokens have exactly the distribution of sampling from the full model one by one: no
    choice of K, M, exit_threshold, interval or `choose` changes it. Without `choose`, or with K or
    M = 0, no layers are optimised. Raises FloatingPointError if the prompt's logits are not finite.
    """
    assert prompt, "an empty prompt has no last token to continue from"
    assert not s.check(model.cfg.L), s.check(model.cfg.L)
    text, cached = list(prompt), 0
    end, verified = len(text) + s.N, 0
    skip = (False,) * model.cfg.L
    cache = model.cache(end + s.M)     # M scratch slots for the DP; drafts stay within the text's

    while True:
        began, t = _clock(model), len(text) - 1        # t: position of the last token
        # 1. Draft: up to K tokens from the layers not skipped, though no more than can be emitted
        #    beside the full model's own. While nothing is cached, the prefill comes first.
        drafted, q, confidence = [], [], []
        while cached and len(drafted) < min(s.K, end - len(text) - 1):
            token = drafted[-1] if drafted else text[-1]
            rows = cache.sequence(t + len(drafted), 1)
            x, _ = model.forward(_ids(model, [token]), rows, cache, skip)
            logits = model.head(x)[0]                  # (V,)
            q.append(probabilities(logits, s))
            # This copy starts before `draw` waits for a GPU, and is there when that wait is over.
            top = logits.softmax(-1).amax().to("cpu", non_blocking=True)
            drafted.append(chance.draw(q[-1]))
            confidence.append(top.item())
            # Our decision, as the paper is silent: confidence is the draft's top-1 probability at
            # temperature 1, before top-k and top-p; and a doubtful token stays and is judged like
            # any other, only what would follow it is not drafted. To throw a token away after
            # having seen it would make it rarer than p says (the tests measure that).
            if confidence[-1] < s.exit_threshold or drafted[-1] in s.stop_ids:
                break
        drafting = _clock(model)

        # 2. Verify: one full pass over everything not cached, which is the last token and the
        #    drafts (at first, the prompt). It overwrites all layers' keys and values there, so a
        #    refused draft needs no undoing.
        k, todo = len(drafted), text[cached:] + drafted
        optimise = choose is not None and s.K > 0 and s.M > 0 and verified % s.interval == 0
        ids = _ids(model, todo)
        states = slice(-k - 1, None) if optimise else None
        for x, h in in_parts(model, ids, cached, cache, states=states):
            pass                                       # the rows that count are in the last part
        # p (k+1, V): row r predicts what follows the r-th draft, row 0 what follows the last token.
        logits = model.head(x[-k - 1:])
        if not cached and not logits.isfinite().all():
            raise FloatingPointError("the model's logits are not finite numbers: damaged weights?")
        p = probabilities(logits, s)
        verdict = judge(p, q, ids[len(ids) - k:], chance)
        emitted = drafted[:verdict.accepted] + [verdict.token]
        stops = [r for r, d in enumerate(emitted) if d in s.stop_ids]
        if stops:                                      # the text ends there, drafted or not
            emitted = emitted[:stops[0] + 1]
        text += emitted
        cached = len(text) - 1                         # the last token is emitted, not yet read
        done = bool(stops) or len(text) == end
        verifying = _clock(model)

        # 3. Optimise layers: the states of the last accepted row are the probe; its candidates are
        #    told its position. The first set comes from the last prompt token ("Prefill & Update",
        #    Fig. 1), the others every `interval` verifications.
        used, choice = skip, None
        if optimise and not done:
            rows = cache.versions(t + verdict.accepted, s.M)

            def run_layer(i: int, x: Tensor, rows: Any = rows) -> Tensor:
                return model.layer(i, x, rows, cache)
            choice = choose(h[:, verdict.accepted], run_layer, s.M)
            skip = choice.skip()
        verified += 1
        ended = _clock(model)
        yield Round(t + 1, used, drafted, confidence, verdict, emitted, choice,
                    (drafting - began, verifying - drafting, ended - verifying))
        if done:
            return


def in_parts(model: Any, ids: Tensor, t: int, cache: Any, **how: Any) -> Iterator[tuple]:
    """One long pass over ids (n,), the first at position t, in parts of at most CHUNK rows: what
    model.forward returns for each."""
    for part in ids.split(CHUNK):
        yield model.forward(part, cache.sequence(t, len(part)), cache, **how)
        t += len(part)


def _ids(model: Any, tokens: Sequence[int]) -> Tensor:
    """Ids on the model's device; from pinned memory the host need not wait for the copy."""
    if model.device.type != "cuda":
        return torch.tensor(tokens, device=model.device)
    return torch.tensor(tokens, pin_memory=True).to(model.device, non_blocking=True)


def _clock(model: Any) -> float:
    """Seconds; a GPU works behind the host's back, so it is waited for first."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
