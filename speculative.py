"""Self-speculative decoding: the lossless sampler and CLaSp's loop. `python speculative.py` prints
what comes out by the right rule and by three wrong ones.

Why it is lossless (Leviathan et al. 2023, Chen et al. 2023). A draft proposes token d with
probability q(d); the full model would have said p(d).

    min(1, p/q)            accept with this probability. So a token is drafted *and* accepted with
                           probability q * min(1, p/q) = min(p, q); it still lacks max(0, p - q)
    norm(max(0, p - q))    draw from this after a rejection. That happens with probability
                           sum(max(0, p - q)), so every token gets just what it lacked

Together that is p, whatever q was: a bad draft costs time, never truth. Three things must hold:

    - p is what the user asked for, and q is what the token was really drawn from: one function,
      `probabilities`, makes both from logits;
    - every token that is drafted is judged, by its own p and q. To stop *after* a doubtful token is
      harmless. Discarding one unjudged, for its value or for a later one's, makes it too rare;
    - rejected tokens leave nothing that anyone reads.

Glossary
    K, M       most tokens drafted per round; layers that the draft leaves out
    k, t       tokens drafted in this round; a position in the text
    p, q       target (full model) and draft distributions over V tokens
    L, width   layers; size of a state, h[0] to h[L]
    own        the token that the full model adds after the accepted ones: a correction or a bonus
    probe      the token whose states choose the layers: the last accepted one or, if none was, the
               one before the draft. (`own` has not been through the model yet.)
    confidence of a drafted token: the draft's top-1 probability there, at temperature 1

This file knows no LLaMA and no dynamic program. A model and its cache are anything with the methods
of those in llama.py; `choose` is called as dp_layer_skip.choose_skip is.
"""
import itertools
import math
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")     # nothing here needs it
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

CHUNK = 512                  # most rows of a pass, for memory: a head's scores are rows x slots
NOT_FINITE = "the model's logits are not finite numbers: damaged weights?"


@dataclass(frozen=True)
class Settings:
    """What a user chooses. The first five decide what may come out, the others only the speed."""
    temperature: float = 0.0    # 0 is greedy
    top_k: int = 0              # 0 is off
    top_p: float = 1.0          # above 0; 1 is off
    N: int = 128                # exactly so many new tokens, unless a stop token comes first
    stop_ids: tuple[int, ...] = ()
    # For `Paper` alone; other policies do not read these:
    K: int = 0                  # 0 is plain decoding
    M: int = 0                  # 0 drafts with the full model
    exit_threshold: float = 0.0  # no more is drafted after a token of lower confidence
    interval: int = 16          # verifications from one layer optimisation to the next

    def __post_init__(self) -> None:
        assert self.temperature >= 0 and self.top_k >= 0 and 0 < self.top_p <= 1, self
        assert self.N > 0 and self.K >= 0 and self.M >= 0 and self.interval > 0, self


def probabilities(logits: Tensor, s: Settings) -> Tensor:                   # (..., V) -> (..., V)
    """The one way from logits to the distribution that is sampled: top-k, temperature, top-p, in
    float64. Greedy is one-hot and needs no rule of its own. Logits that tie with the k-th are all
    kept; of those that tie at the edge of top_p the smaller ids are kept first."""
    logits = logits.double()
    if s.temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    if s.top_k > 0:
        kth = logits.topk(min(s.top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    highest = logits.amax(-1, keepdim=True)
    p = ((logits - highest) / s.temperature).softmax(-1)   # <= 0 and so never +inf
    if s.top_p < 1:
        likely, order = p.sort(dim=-1, descending=True, stable=True)
        before = likely.cumsum(-1) - likely            # the mass of all that are likelier
        likely = likely.masked_fill(before >= s.top_p, 0)
        p = torch.zeros_like(p).scatter_(-1, order, likely / likely.sum(-1, keepdim=True))
    return p


def acceptance(p: Tensor, q: Tensor) -> Tensor:
    """min(1, p/q): how likely a drafted token is kept (Leviathan et al. 2023, Algorithm 1)."""
    return (p / q).clamp(max=1)


def residual(p: Tensor, q: Tensor) -> Tensor:                               # (..., V)
    """norm(max(0, p - q)): the probability still owed after drafting has paid min(p, q) (ibid.).
    If nothing is owed (p = q, but for rounding), it is p itself."""
    owed = (p - q).clamp(min=0)
    mass = owed.sum(-1, keepdim=True)
    return torch.where(mass > 0, owed / mass, p)


class Chance:
    """A seeded generator, on the host: a seed means the same uniforms on every device. A round
    takes one for each drafted token, then one for the verdict on each, then one for `own`."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self) -> float:
        """u in [0, 1), 53 random bits."""
        return torch.rand((), generator=self.generator, dtype=torch.float64).item()

    def accept(self, a: Tensor) -> Tensor:             # (k,) -> (1,), on a's device
        """How many drafted tokens are accepted: each with its probability a, until one is not.
        u < a is strict: u <= a would pass a token of probability 0 at u = 0."""
        uniforms = [self.uniform() for _ in range(len(a))]
        u = torch.tensor(uniforms, dtype=torch.float64).to(a.device, non_blocking=True)
        kept = u < a
        return kept.cumprod(0).sum(0, keepdim=True)    # 1 1 0 1 -> 1 1 0 0 -> 2

    def draw(self, p: Tensor) -> Tensor:               # (V,) -> (1,), an id, on p's device
        """A token drawn from p: the first at which the running sum, in float64, exceeds u times the
        total."""
        u = self.uniform()
        cdf = p.cumsum(0, dtype=torch.float64)
        # A parallel sum rounds each entry separately. It may rise where p is 0: such ids are set to
        # 0 and never drawn. It may fall at the end: so the total is the largest, not the last.
        cdf = torch.where(p > 0, cdf, 0)
        exceeds = cdf > u * cdf.amax()
        return exceeds.int().argmax(0, keepdim=True)


def judge(p: Tensor, q: list[Tensor], drafted: list[int], chance: Chance) -> tuple[Tensor, Tensor]:
    """Leviathan et al. 2023, Algorithm 1. p (k+1, V): row i < k is the full model's distribution at
    the place of drafted[i], row k that of the place after them all; q: k times (V,). Returns how
    many are accepted, from the first on, and the full model's own token after them, both (1,), on
    p's device. Nothing here waits for a GPU; reading them does."""
    if not drafted:                                    # nothing to judge: own is drawn from p
        return torch.zeros(1, dtype=torch.long, device=p.device), chance.draw(p[0])
    step = torch.arange(len(drafted), device=p.device)
    token = torch.tensor(drafted).to(p.device, non_blocking=True)
    # Nothing was drafted at row k, so q = 0 there and all of p is owed.
    q_rows = torch.stack([*q, torch.zeros_like(p[0])])                      # (k+1, V)
    accepted = chance.accept(acceptance(p[step, token], q_rows[step, token]))
    own = chance.draw(residual(p[accepted], q_rows[accepted])[0])
    return accepted, own


class Paper:
    """The paper's policy: fixed numbers. Another may take its place (policy/). What it is asked:

        slots         once: how many slots of the cache, after the text, may `optimise` write?
        skip          in each round: which layers does the draft leave out?
        goes_on()     before each token for which there is room: shall it be drafted?
        judged()      after each verify, the prefill included: here is what it said
        due()         after that, unless the text is done: are layers to be chosen?
        optimise()    if they are: set `skip` anew

    Each method may change the policy's state. But a policy decides only how many tokens are drafted
    and by which layers, never what becomes of one. So it cannot change the distribution."""

    def __init__(self, s: Settings, L: int) -> None:
        assert s.M <= L, f"{s.M} of {L} layers cannot be left out"
        self.s = s
        self.skip = (False,) * L
        self.slots = s.M + 1                           # a candidate for each budget 0..M

    def goes_on(self, confidence: list[float]) -> bool:
        """confidence: of the tokens drafted so far in this round."""
        if len(confidence) == self.s.K:
            return False
        return not confidence or confidence[-1] >= self.s.exit_threshold

    def judged(self, confidence: list[float], p: Tensor, q: list[Tensor], accepted: int) -> None:
        """Fixed numbers learn nothing. p (k+1, V), q k times (V,)."""

    def due(self, n: int) -> bool:
        """After verification n; n = 0 is the prefill."""
        return n % self.s.interval == 0 and self.s.K > 0 and self.s.M > 0

    def optimise(self, choose: Callable, model: Any, cache: Any, text: list[int], h: Tensor) -> Any:
        """CLaSp §3.4 to 3.6. h (L+1, width) are the probe's states; `text` ends with the probe.
        (Its length suffices here; another policy may want the tokens.)"""
        rows = cache.candidates(len(text) - 1, self.s.M + 1)

        def run_layer(i: int, g: Tensor) -> Tensor:    # (J, width) -> (J, width)
            return model.layer(i, g, rows.first(len(g)), cache)
        choice = choose(h, run_layer, self.s.M)
        self.skip = choice.skip()
        return choice


@dataclass(frozen=True)
class Round:
    """One round; in round 0, the prefill, nothing is drafted."""
    start: int                  # tokens of text before it
    skip: tuple[bool, ...]      # layers that the draft left out
    drafted: list[int]          # d1..dk
    confidence: list[float]     # one per drafted token
    accepted: int               # how many drafted tokens
    emitted: list[int]          # the accepted ones and own; no own after an accepted stop token
    choice: Any                 # what the chooser returned, if it was asked after this round
    seconds: tuple[float, float, float]     # draft, verify, optimise


@torch.inference_mode()                                # off again at each yield
def generate(model: Any, prompt: Sequence[int], s: Settings, chance: Chance, choose: Callable,
             policy: Any = None) -> Iterator[Round]:
    """CLaSp, Fig. 1: continue `prompt` by s.N tokens, or to a stop token. Yields each round.
    The full model's distribution comes out, whatever `choose` and `policy` (None: `Paper`) decide:
    exactly, but for rounding, as one pass over k rows and k passes over one differ in the last
    bits. Raises FloatingPointError where logits are not finite numbers."""
    assert prompt, "there must be a token to continue"
    policy = policy or Paper(s, model.cfg.L)
    text = list(prompt)
    end = len(text) + s.N
    cache = model.cache(end + policy.slots)
    cached = 0                     # slots 0 .. cached-1 hold the full model's entries for the text

    for n in itertools.count():                        # verification n; n = 0 is the prefill
        start = len(text)
        began = _clock(model)

        # 1. Draft, but not before the prefill. All tokens of a draft leave out the same layers, so
        #    none looks into a layer for an entry that was never written.
        skip = policy.skip
        #    k + 1 tokens (the draft and own) must fit before `end`, k + 1 rows into a pass.
        most = 0 if n == 0 else min(end - start, CHUNK) - 1
        drafted, q, confidence = draft(model, cache, text, most, skip, s, policy.goes_on, chance)
        k = len(drafted)
        drafting = _clock(model)

        # 2. Verify: one full pass over what is not cached (the prompt, later the last token) and
        #    the draft. It overwrites the draft's entries, and fills those of skipped layers.
        h = read(model, text[cached:] + drafted, cached, cache)
        h = [x[-(k + 1):] for x in h]      # L+1 times (k+1, width): of the last token, d1 .. dk
        logits = model.head(h[-1])                                          # (k+1, V)
        p = probabilities(logits, s)                                        # (k+1, V)
        verdict = judge(p, q, drafted, chance)
        finite = logits.isfinite().all()[None]
        accepted, own, ok = torch.cat((*verdict, finite)).tolist()          # ints; waits for a GPU
        if not ok:
            raise FloatingPointError(NOT_FINITE)
        policy.judged(confidence, p, q, accepted)
        emitted = [*drafted[:accepted], own]
        if accepted > 0 and drafted[accepted - 1] in s.stop_ids:
            emitted.pop()                              # the text ends there: own is not wanted
        text += emitted
        done = len(text) == end or text[-1] in s.stop_ids
        # The whole rollback: entries from slot `cached` on are overwritten before any row may look.
        cached = len(text) - 1                         # the last has not been through the model
        verifying = _clock(model)

        # 3. Optimise layers, for the next drafts, by the states of the probe. Row 0 of h is the
        #    token before the draft, row i is d_i: so row `accepted` is the probe, text[cached - 1].
        choice = None
        if not done and policy.due(n):
            probe = torch.stack([x[accepted] for x in h])                   # (L+1, width)
            choice = policy.optimise(choose, model, cache, text[:cached], probe)
        seconds = (drafting - began, verifying - drafting, _clock(model) - verifying)
        yield Round(start, skip, drafted, confidence, accepted, emitted, choice, seconds)
        if done:
            return


def draft(model: Any, cache: Any, text: list[int], most: int, skip: Sequence[bool], s: Settings,
          goes_on: Callable, chance: Chance) -> tuple[list[int], list[Tensor], list[float]]:
    """Up to `most` tokens drafted after `text`, their q (V,) and confidences. A stop token ends the
    draft; so does a doubtful one. (The paper does not say whether that is judged; here it is.)"""
    drafted, q, confidence = [], [], []
    last = torch.tensor(text[-1:], device=model.device)                     # (1,)
    while len(drafted) < most and goes_on(confidence):
        rows = cache.sequence(len(text) - 1 + len(drafted), 1)
        h = model.forward(last, rows, cache, skip)
        logits = model.head(h[-1])[0]                                       # (V,)
        q.append(probabilities(logits, s))
        last = chance.draw(q[-1])
        highest = logits.softmax(-1).amax(0, keepdim=True)
        # One fetch, as each waits for a GPU. In float32 an id below 2^24 is exact.
        token, top = torch.cat((last, highest)).tolist()
        if math.isnan(top):                            # a logit of inf gives nan too, by softmax
            raise FloatingPointError(NOT_FINITE)
        drafted.append(int(token))
        confidence.append(top)
        if drafted[-1] in s.stop_ids:
            break
    return drafted, q, confidence


def read(model: Any, tokens: Sequence[int], t: int, cache: Any) -> list[Tensor]:
    """A full pass over `tokens`, the first at position t; over many (a prompt) several passes of
    about equal size. -> the states of the last one."""
    parts = -(-len(tokens) // CHUNK)                   # rounded up
    for ids in torch.tensor(tokens, device=model.device).tensor_split(parts):
        h = model.forward(ids, cache.sequence(t, len(ids)), cache)
        t += len(ids)
    return h


def _clock(model: Any) -> float:
    """Seconds; a GPU is waited for first, as it works while the host goes on."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def main() -> None:
    p = torch.tensor([.50, .25, .15, .07, .03], dtype=torch.float64)
    q = torch.tensor([.20, .40, .15, .05, .20], dtype=torch.float64)
    a = acceptance(p, q)
    always = torch.ones_like(p)
    argmax = torch.eye(5, dtype=torch.float64)[q.argmax()]
    print("What comes out, token by token, where one is drafted: draft * a + P(rejection) * own\n")
    for name, drafts, accept, own in (
            ("for comparison: p, the full model", p, always, p),
            ("for comparison: q, the draft", q, always, p),
            ("right: a = min(1, p/q), own = residual", q, a, residual(p, q)),
            ("wrong: own = p", q, a, p),
            ("wrong: own = softmax(p - q)", q, a, (p - q).softmax(0)),
            ("wrong: argmax drafts, judged by q", argmax, a, residual(p, q))):
        out = drafts * accept + (drafts * (1 - accept)).sum() * own
        numbers = "".join(f"{v:7.3f}" for v in out.tolist())
        print(f"{name:40}{numbers}   largest error {(out - p).abs().max().item():.1e}")


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):                     # a closed pipe ends it without a word
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    main()
