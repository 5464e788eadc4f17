"""Which layers should the draft leave out? CLaSp's dynamic program over the full model's hidden
states (§3.4, eq. 2). `python dp_layer_skip.py` shows a table, the way back, and how good sets are.

    D[i,j] = max( cos(h[i], f_{i-1}(g[i-1, j])),     run  layer i-1   (if j < i)
                  cos(h[i], g[i-1, j-1]) )           skip layer i-1   (if j > 0; wins a tie)
    g[i,j] = the state that won; then g[i,0] is set to h[i], which it equals up to rounding

In words: after the first i layers, j of them left out, how close can we be to where the full model
is *at that depth*? Either the last of the i was run, on the best state one layer earlier, or it was
skipped, with j-1 skips before it. Traced back from D[L,M], the choices are the set.

Glossary
    L, M     layers; layers to leave out
    h[0..L]  the full model's states of one token, h[L] before the final norm: (L+1, width)
    f_i      layer i, on J states of that token at once, each as if alone: (J, width) -> (J, width)
    D        (L+1, M+1) best cosines, nan where j > i
    g        (M+1, width) the states of one row of the table; in row i cells beyond i are filler
    skipped  (L+1, M+1) True where the cell was reached by skipping layer i-1

Why compared at depth i and not at the end: running the remaining layers for every cell would cost
too much, and a state near h[i] mostly ends near h[L]. Why approximate (§3.5): a cell keeps one
state, the nearest so far, although a farther one might come out nearer in the end.

The cost is L calls of f with at most M+1 states. h costs nothing: verifying has computed it.
Column 0 checks f (tests look at it): D[i,0] is how near layer i-1, run on the full model's own
h[i-1], comes to h[i]. If it is not 1, up to rounding, f sees another cache or mask than the model.
"""
import itertools
import signal
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from math import inf, nan

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")     # nothing here needs it
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

RunLayer = Callable[[int, Tensor], Tensor]     # f: i, (J, width) -> (J, width)
Near = Callable[[Tensor, Tensor], Tensor]      # (J, width), (width,) -> (J,); more is nearer


@dataclass(frozen=True)
class Choice:
    """What one run of the dynamic program knows: the set found for every budget 0..M."""
    D: list[list[float]]        # (L+1) x (M+1)
    skipped: list[list[bool]]   # (L+1) x (M+1)
    g: Tensor                   # (M+1, width) g[L], the state that each budget leads to

    def skip(self, j: int | None = None) -> tuple[bool, ...]:
        """The set for a budget of j layers (default M), a flag per layer: by the way back."""
        L = len(self.D) - 1
        j = len(self.D[0]) - 1 if j is None else j
        left_out = [False] * L
        for i in range(L, 0, -1):
            if self.skipped[i][j]:
                left_out[i - 1] = True
                j -= 1                                 # now the skips before layer i-1
        return tuple(left_out)


def cosine(a: Tensor, b: Tensor) -> Tensor:                # (..., width), (..., width) -> (...)
    """a.b / (|a| |b|), in float32 or wider: bfloat16 cannot tell 0.999 from 1."""
    wide = torch.promote_types(a.dtype, torch.float32)
    a = a.to(wide)
    b = b.to(wide)
    norms = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    return (a * b).sum(-1) / norms.clamp_min(torch.finfo(wide).tiny)


def choose_skip_plain(h: Tensor, run_layer: RunLayer, M: int, near: Near = cosine) -> Choice:
    """The recurrence as it is written, a cell at a time: to read first, and the reference for the
    fast one. The paper's Algorithm 1 runs a layer only if that is nearer, so a tie skips it."""
    L = len(h) - 1
    D = [[nan] * (M + 1) for _ in range(L + 1)]
    skipped = [[False] * (M + 1) for _ in range(L + 1)]
    D[0][0] = 1.0
    g = {(0, 0): h[0]}
    for i in range(1, L + 1):
        for j in range(min(i, M) + 1):
            near_run = -inf
            near_skip = -inf
            if j < i:                                  # at j = i all are skipped: none can run
                after = run_layer(i - 1, g[i - 1, j][None])                 # (1, width)
                near_run = near(after, h[i]).item()
            if j > 0:
                near_skip = near(g[i - 1, j - 1][None], h[i]).item()
            run_wins = j == 0 or near_run > near_skip  # strict: a tie skips, and so does nan
            skipped[i][j] = not run_wins
            D[i][j] = near_run if run_wins else near_skip
            g[i, j] = after[0] if run_wins else g[i - 1, j - 1]
        g[i, 0] = h[i]                                 # column 0: the full model's state
    return Choice(D, skipped, torch.stack([g[L, j] for j in range(M + 1)]))


def choose_skip(h: Tensor, run_layer: RunLayer, M: int, near: Near = cosine) -> Choice:
    """As choose_skip_plain, but a row of the table at a time; 0 <= M <= L."""
    D, skipped, g = table(h, run_layer, M, near)
    return Choice(D.tolist(), skipped.tolist(), g)


def table(h: Tensor, run_layer: RunLayer, M: int, near: Near = cosine
          ) -> tuple[Tensor, Tensor, Tensor]:
    """-> D and skipped, (L+1, M+1) each, and g[L]. Row i needs only row i-1, whose cells go through
    layer i-1 in one call (§3.6). Row i has cells 0 .. min(i, M); beyond them g, near_run and
    near_skip are filler. No number reaches the host, so a CUDA graph can record it."""
    L = len(h) - 1
    assert 0 <= M <= L, f"{M} of {L} layers cannot be skipped"
    wide = torch.promote_types(h.dtype, torch.float32)
    D = torch.full((L + 1, M + 1), nan, dtype=wide, device=h.device)
    skipped = torch.zeros(L + 1, M + 1, dtype=torch.bool, device=h.device)
    D[0, 0] = 1.0
    g = h[:1].repeat(M + 1, 1)                         # (M+1, width): cell 0, then filler
    near_run = torch.full_like(D[0], -inf)             # (M+1,); where j = i none can run: -inf
    for i in range(1, L + 1):
        J = min(i, M + 1)                              # row i-1 has cells 0 .. J-1
        after = run_layer(i - 1, g[:J])
        near_run[:J] = near(after, h[i])
        near_skip = near(g, h[i]).roll(1)              # cell j comes from cell j-1
        run_wins = near_run > near_skip                # strict: a tie skips
        run_wins[0] = True                             # cell 0 cannot skip: roll gave it cell M's
        D[i, :i + 1] = torch.where(run_wins, near_run, near_skip)[:i + 1]
        skipped[i, :i + 1] = ~run_wins[:i + 1]
        g = g.roll(1, 0)                               # suppose that every cell skipped
        g[:J] = torch.where(run_wins[:J, None], after, g[:J])               # correct those that ran
        g[0] = h[i]                                    # column 0: the full model's state
    return D, skipped, g


def toy(L: int, width: int, seed: int) -> tuple[Tensor, RunLayer]:
    """A network to watch: layer i adds a push of its own strength; every third pushes less."""
    gen = torch.Generator().manual_seed(seed)
    A = torch.randn(L, width, width, generator=gen, dtype=torch.float64) / width ** 0.5
    push = torch.rand(L, generator=gen, dtype=torch.float64) + 0.2
    push[1::3] *= 0.3

    def run_layer(i: int, x: Tensor) -> Tensor:
        return x + push[i] * torch.tanh(x @ A[i].T)

    h = [torch.randn(1, width, generator=gen, dtype=torch.float64)]
    for i in range(L):
        h.append(run_layer(i, h[-1]))
    return torch.cat(h), run_layer


def run_set(h: Tensor, run_layer: RunLayer, skip: tuple[bool, ...]) -> float:
    """The cosine that a set really has."""
    x = h[:1]
    for i, left_out in enumerate(skip):
        if not left_out:
            x = run_layer(i, x)
    return cosine(h[-1], x[0]).item()


def show(choice: Choice) -> str:
    """The table D, a row per depth, the way back marked."""
    skip = choice.skip()
    lines = ["        j = " + "".join(f"{j:^7}" for j in range(len(choice.D[0])))]
    for i, row in enumerate(choice.D):
        at = sum(skip[:i])                             # the column where the way back meets row i
        cells = ["   .   " if j > i else f" {v:.3f}{'*' if j == at else ' '}"
                 for j, v in enumerate(row)]
        did = f"  layer {i - 1:2} {'SKIPPED' if skip[i - 1] else 'run'}" if i > 0 else ""
        lines.append(f"  i = {i:2}    " + "".join(cells) + did)
    return "\n".join(lines)


def main() -> None:
    print("D[i,j] is the best cosine with the full model after i layers, j of them left out; *\n"
          "marks the way back from the end. Layers add (0,3), (-1,1) and (1,-4); h[0] is (4,0):\n")
    add = torch.tensor([(0, 3), (-1, 1), (1, -4)], dtype=torch.float64)
    h = torch.tensor([(4, 0), (4, 3), (3, 4), (4, 0)], dtype=torch.float64)
    print(show(choose_skip(h, lambda i, x: x + add[i], 2)))
    print("\nThe program is approximate, as one sees: without layers 0 and 2 it would end at\n"
          "0.949, not at 0.8.\n\nA toy of 9 layers, of which 1, 4 and 7 do little; leave out 3:\n")
    choice = choose_skip(*toy(9, 16, seed=3), 3)
    print(show(choice))
    print(f"\nLeft out: {[i for i, left_out in enumerate(choice.skip()) if left_out]}. "
          "The last row shows how near smaller budgets end.\n"
          "\nHow good is it? All sets are run, for their cosine with h[L] in the end. The one\n"
          "chosen is near the best, not always the best.\n"
          "  toy    L   M       DP     best    mean of all    rank of the DP's set")
    L = 12
    M = 5
    sets = [tuple(i in s for i in range(L)) for s in itertools.combinations(range(L), M)]
    for seed in range(6):
        h, run_layer = toy(L, 24, seed)
        choice = choose_skip(h, run_layer, M)
        assert choice.skip() == choose_skip_plain(h, run_layer, M).skip()
        chosen = run_set(h, run_layer, choice.skip())
        every = [run_set(h, run_layer, skip) for skip in sets]
        rank = 1 + sum(v > chosen + 1e-12 for v in every)
        print(f"  {seed:3} {L:4} {M:3}  {chosen:8.4f} {max(every):8.4f} "
              f"{sum(every) / len(every):11.4f} {rank:13} of {len(every)}")


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):                     # a closed pipe ends it without a word
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    main()
