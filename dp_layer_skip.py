"""Which layers should the draft leave out? CLaSp's dynamic program over the full model's hidden
states (§3.4, eq. 2). `python dp_layer_skip.py` shows a table, its path, and how near it comes.

    D[i,j] = max( cos(h[i], f_{i-1}(g[i-1, j])),     run  layer i-1
                  cos(h[i], g[i-1, j-1]) )           skip layer i-1
    g[i,j] = the state that won,   g[i,0] = h[i]

In words: after the first i layers, of which j were left out, how close can we be to where the full
model is *at that depth*? Either the last of the i was run, on the best state one layer earlier, or
it was skipped, and then one skip fewer had been spent before it. The parents lead back from the
answer, in the last row at j = M, to the set.

Glossary
    L, M     layers; layers to leave out
    h[0..L]  the full model's states of one token, h[L] before the final norm: (L+1, width).
             Or, beyond the paper, of r tokens: (L+1, r, width). Then a cell holds r states.
    D, g     (L+1, M+1) best cosines found (see `nearness`); (M+1, [r,] width) the states of a row
    f_i      (run_layer) layer i on J independent candidates: (J, [r,] width) -> the same.
    parents  (L+1, M+1) bits: True where the cell was reached by skipping

Why at the same depth: a beginning can be judged before its end is known. Why approximate (§3.5): a
cell keeps one state, the nearest so far, although a farther one might come out nearer in the end.

The verify pass has just computed h. The cost is L calls of f with at most M+1 candidates. Column 0
skips nothing: cosines other than 1 there say that candidates do not see what the verify saw.
"""
import itertools
import signal
import warnings
from collections.abc import Callable
from dataclasses import dataclass

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")     # nothing here needs it
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

RunLayer = Callable[[int, Tensor], Tensor]     # f_i: (i, (J, [r,] width)) -> (J, [r,] width)
NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Choice:
    """What one run of the dynamic program knows: the set found for every budget 0..M."""
    D: list[list[float]]        # (L+1) x (M+1) cosines; nan where j > i
    parents: list[list[bool]]   # (L+1) x (M+1) True where layer i-1 was skipped
    states: Tensor | None = None        # (M+1, [r,] width) g[L], where each budget leads to

    @classmethod
    def read(cls, D: Tensor, parents: Tensor, states: Tensor) -> "Choice":
        """What `table` returns, fetched from its device; row 0 of D is added."""
        M = D.shape[1] - 1
        return cls([[1.0] + [NAN] * M, *D.tolist()], [[False] * (M + 1), *parents.bool().tolist()],
                   states)

    def path(self, j: int | None = None) -> list[tuple[int, int]]:
        """The cells (i, j) from the last row, at budget j (default M), back to (0, 0)."""
        i, j = len(self.D) - 1, len(self.D[0]) - 1 if j is None else j
        cells = [(i, j)]
        while i:
            i, j = i - 1, j - self.parents[i][j]       # a skip was spent if layer i-1 was skipped
            cells.append((i, j))
        return cells

    def skip(self, j: int | None = None) -> tuple[bool, ...]:
        """The set for budget j (default M), one flag per layer."""
        return tuple(self.parents[i][j] for i, j in self.path(j)[-2::-1])       # from row 1 on


def cosine(a: Tensor, b: Tensor) -> Tensor:                # (..., width), (..., width) -> (...)
    """a.b / (|a| |b|), in float32 or wider: bfloat16 cannot tell 0.999 from 1."""
    wide = torch.promote_types(a.dtype, torch.float32)
    a, b = a.to(wide), b.to(wide)
    norms = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    return (a * b).sum(-1) / norms.clamp_min(torch.finfo(wide).tiny)


def nearness(h: Tensor, i: int, g: Tensor) -> Tensor:          # (..., [r,] width) -> (...)
    """How near the states g come to the full model's after i layers. Of one token the paper's
    cos(h[i], g). Of r > 1, ours: the mean of cos(h[L], h[L] + (g - h[i])), since so g comes out if
    the layers after i add to it what they added to h[i]. So an error counts by its size at the end,
    not by its angle at depth i; and one token's accident is not taken for a rule."""
    if h.dim() < 3:
        return cosine(h[i], g)
    if h.shape[1] == 1:
        return cosine(h[i], g).mean(-1)
    end = h[-1].to(torch.promote_types(h.dtype, torch.float32))
    return cosine(end, end + (g.to(end.dtype) - h[i])).mean(-1)


def choose_skip_plain(h: Tensor, run_layer: RunLayer, M: int) -> Choice:
    """The recurrence as it is written, a cell at a time: to read first, and the reference for the
    fast one. On ties, where the paper is silent, the layer is run: `max` keeps the first."""
    L = len(h) - 1
    D, parents = ([[fill] * (M + 1) for _ in range(L + 1)] for fill in (NAN, False))
    D[0][0], g = 1.0, {(0, 0): h[0]}
    for i in range(1, L + 1):
        for j in range(min(i, M) + 1):
            choices = []
            if j < i:                                  # else there is nothing that could be run
                choices.append((False, run_layer(i - 1, g[i - 1, j][None])[0]))
            if j > 0:
                choices.append((True, g[i - 1, j - 1]))
            parents[i][j], g[i, j] = max(choices, key=lambda c: nearness(h, i, c[1]).item())
            D[i][j] = nearness(h, i, g[i, j]).item()
        g[i, 0] = h[i]                                 # nothing skipped: the full model's own state
    return Choice(D, parents, torch.stack([g[L, j] for j in range(M + 1)]))


def choose_skip(h: Tensor, run_layer: RunLayer, M: int) -> Choice:
    """The set for a budget of M, 0 <= M <= L, and for every smaller one: by rows of the table."""
    return Choice.read(*table(h, run_layer, M))


def table(h: Tensor, run_layer: RunLayer, M: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row i of the table needs only row i-1, so its cells go through layer i-1 in one call (§3.6).
    -> rows 1..L of D and of the parents, (L, M+1) each, and g[L]. Nothing here waits for a GPU."""
    L = len(h) - 1
    assert 0 <= M <= L, f"{M} of {L} layers cannot be skipped"
    g, rows = h[:1], []                                # g[i, 0..min(i, M)], here i = 0
    for i in range(1, L + 1):
        run = torch.cat((run_layer(i - 1, g), g[-1:]))[:M + 1]      # the last cannot run: a filler
        skip = torch.cat((g[:1], g))[:M + 1]           # a skip moves a state from j-1 to j
        both = torch.stack((run, skip))                                     # (2, J, [r,] width)
        cos = nearness(h, i, both)                                          # (2, J)
        cos[0, i:] = cos[1, :1] = -INF                 # cell i only skips, cell 0 only runs
        best, skipped = cos.max(0)                     # of equals the first: the layer is run
        g = both[skipped, torch.arange(len(run), device=h.device)]
        g[0] = h[i]
        rows.append([torch.nn.functional.pad(x, (0, M + 1 - len(run)), value=fill)
                     for x, fill in ((best, NAN), (skipped, 0))])
    D, parents = map(torch.stack, zip(*rows))
    return D, parents, g


# -------------------------------------------------------------------------- python dp_layer_skip.py

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
    for i, s in enumerate(skip):
        x = x if s else run_layer(i, x)
    return cosine(h[-1], x[0]).item()


def show(choice: Choice) -> str:
    """The table D, a row per depth, the path back marked."""
    path = dict(choice.path())                         # i -> j
    out = ["        j = " + "".join(f"{j:^7}" for j in range(len(choice.D[0])))]
    for i, row in enumerate(choice.D):
        cells = [f" {v:.3f}{'*' if path[i] == j else ' '}" if v == v else "   .   "
                 for j, v in enumerate(row)]
        did = f"  layer {i - 1:2} {'SKIPPED' if choice.parents[i][path[i]] else 'run'}" if i else ""
        out.append(f"  i = {i:2}    " + "".join(cells) + did)
    return "\n".join(out)


def main() -> None:
    print("D[i,j] is the best cosine with the full model after i layers, j of them left out; *\n"
          "marks the way back from the end. Three layers add (0,3), (-1,1), (1,-4) to (4,0):\n")
    add = torch.tensor([(0, 3), (-1, 1), (1, -4)], dtype=torch.float64)
    h = torch.tensor([(4, 0), (4, 3), (3, 4), (4, 0)], dtype=torch.float64)
    print(show(choose_skip(h, lambda i, x: x + add[i], 2)), end="\n\nHere it shows that it "
          "is approximate: leaving out layers 0 and 2 would have 0.949 in the end.\n")
    choice = choose_skip(*toy(9, 16, seed=3), 3)
    chosen = [i for i, s in enumerate(choice.skip()) if s]
    print("\nA toy of 9 layers, of which 1, 4 and 7 do little; 3 are to be left out.\n\n"
          f"{show(choice)}\n\nLeft out: {chosen}. The last row has every smaller budget.\n"
          "\nHow good is it? Cosine with h[L] of the chosen set when run, and of all sets: near\n"
          "the best, and not always there.\n"
          "  toy    L   M       DP     best    mean of all    rank of the DP's set")
    L, M = 12, 5
    sets = [tuple(i in s for i in range(L)) for s in itertools.combinations(range(L), M)]
    for seed in range(6):
        net = toy(L, 24, seed)
        real, every = run_set(*net, choose_skip(*net, M).skip()), [run_set(*net, s) for s in sets]
        print(f"  {seed:3} {L:4} {M:3}  {real:8.4f} {max(every):8.4f} "
              f"{sum(every) / len(every):11.4f} {1 + sum(v > real + 1e-12 for v in every):13} "
              f"of {len(every)}")


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):                     # `| head` ends it without a word
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    main()
