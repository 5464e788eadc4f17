"""Which layers should the draft leave out? CLaSp's dynamic program over the hidden states of one
token (§3.4, eq. 2).

    D[i,j] = max( cos(h[i], f_{i-1}(g[i-1, j])),     run  layer i-1
                  cos(h[i], g[i-1, j-1]) )           skip layer i-1
    g[i,j] = the state that won

In words: after the first i layers, of which j were left out, how close can we be to where the full
model is *at that depth*? Either the last of the i was run, on the best state one layer earlier, or
it was skipped, and then one skip fewer had been spent before it. The answer for a budget of M
stands in the last row, at j = M; the parents lead back from there to the set.

Glossary
    L, M     layers; layers to leave out
    h[0..L]  the full model's states of one token, h[L] before the final norm
    D, g     (L+1, M+1) best cosines found; (M+1, width) the states behind one row of D
    f_i      (run_layer) layer i on J independent versions of the token: (J, width) -> (J, width).
             This file knows no more of the model.
    parents  (L+1, M+1) bits: True where the cell was reached by skipping

Why at the same depth, and not h[L]: so a beginning can be judged before its end is known, and the
next layer is handed what it was trained on. What is predicted is a draft step at the probe itself;
the tokens drafted after it read keys and values that the draft has written, which D does not see.

It is an approximation, and says so: each cell keeps one state, the nearest so far, although a
farther one might have come out nearer in the end (§3.5, "approximate Markov"). To see a table, a
path, and how near it comes:    python dp_layer_skip.py

Run it on states you already have: a verify pass has just computed h. The cost is L - 1 calls of f,
with at most M rows each.
"""
import itertools
import os
import random
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass

# torch warns that it is missing; nothing here needs it
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

RunLayer = Callable[[int, Tensor], Tensor]            # f_i: (i, (J, width)) -> (J, width)


@dataclass(frozen=True)
class Choice:
    """What one run of the dynamic program knows: the set found for every budget 0..M."""
    D: list[list[float]]        # (L+1) x (M+1) cosines; nan where j > i
    parents: list[list[bool]]   # (L+1) x (M+1) True where layer i-1 was skipped

    def skip(self, j: int | None = None) -> tuple[bool, ...]:
        """The set for budget j (default M), one flag per layer: read back from the last row of the
        table."""
        L, M = len(self.D) - 1, len(self.D[0]) - 1
        j = M if j is None else j
        assert 0 <= j <= M, f"budget {j} in a table for 0..{M}"
        out = [False] * L
        for i in range(L, 0, -1):
            if self.parents[i][j]:                     # the cell was reached by skipping layer i-1,
                out[i - 1] = True
                j -= 1                           # which used up one skip; i falls by one either way
        return tuple(out)

    @classmethod
    def read(cls, D: Tensor, parents: Tensor) -> "Choice":
        """What `table` returns, fetched from its device. Row 0 and column 0, where nothing was
        skipped, are added."""
        L, M = D.shape
        rows, bits = D.tolist(), parents.tolist()      # here the host waits
        return cls([[1.0] + [float("nan")] * M] + [[1.0, *row] for row in rows],
                   [[False] * (M + 1)] + [[False, *row] for row in bits])

    @property
    def cosine(self) -> list[float]:
        """The cosine with h[L] of the set found for each budget 0..M."""
        return self.D[-1]


def cosine(a: Tensor, b: Tensor) -> Tensor:                # (..., width), (..., width) -> (...)
    """a.b / (|a| |b|), in float32 or wider: bfloat16 cannot tell 0.999 from 1."""
    wide = torch.promote_types(a.dtype, torch.float32)
    a, b = a.to(wide), b.to(wide)
    norms = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    return (a * b).sum(-1) / norms.clamp_min(torch.finfo(wide).tiny)


# ----------------------------------------------------------------- the recurrence, as it is written

def choose_skip_plain(h: Tensor, run_layer: RunLayer, M: int) -> Choice:
    """One cell at a time: the reference for the fast one below, and the version to read first.

    h (L+1, width); run_layer(i, x) for x (1, width). On ties, where the paper is silent, the layer
    is run: that choice stands first, and `max` keeps the first."""
    L, nan = len(h) - 1, float("nan")
    assert 0 <= M <= L, f"{M} of {L} layers cannot be skipped"
    D = [[nan] * (M + 1) for _ in range(L + 1)]
    parents = [[False] * (M + 1) for _ in range(L + 1)]
    D[0][0], g = 1.0, {(0, 0): h[0]}
    for i in range(1, L + 1):
        D[i][0], g[i, 0] = 1.0, h[i]                   # nothing skipped: the full model's own state
        for j in range(1, min(i, M) + 1):
            choices = []
            if j < i:                             # j = i: there is nothing that could have been run
                choices.append((False, run_layer(i - 1, g[i - 1, j][None])[0]))
            choices.append((True, g[i - 1, j - 1]))
            parents[i][j], g[i, j] = max(choices, key=lambda c: cosine(h[i], c[1]).item())
            D[i][j] = cosine(h[i], g[i, j]).item()
    return Choice(D, parents)


# ----------------------------------------------------------- the same, a row of the table at a time

def choose_skip(h: Tensor, run_layer: RunLayer, M: int) -> Choice:
    """The set for a budget of M, and for every smaller one.

    h (L+1, width), on any device; run_layer(i, x) for x (J, width), J <= M; 0 <= M <= L."""
    return Choice.read(*table(h, run_layer, M))


def table(h: Tensor, run_layer: RunLayer, M: int) -> tuple[Tensor, Tensor]:
    """Row i of the table needs only row i-1, so all its cells go through layer i-1 in one call
    (§3.6). Rows 1..L and columns 1..M of D and of the parents: (L, M), (L, M).

    What is decided stays on the device: no cell, and no layer, waits for the host."""
    L = len(h) - 1
    assert 0 <= M <= L, f"{M} of {L} layers cannot be skipped"
    g = h[:1]                                          # g[i, 0..min(i, M)], here i = 0: (1, width)
    rows, bits = [], []
    for i in range(1, L + 1):
        J = min(i - 1, M)              # cells 1..J have a choice; cell 0 is h[i], cell i only skips
        last = min(i, M)
        # Skipping moves a state from j-1 to j, cells 1..last. Where running wins, what ran takes
        # its place.
        state = g[:last]
        cos = cosine(h[i], state)                      # (last,)
        bit = torch.ones_like(cos, dtype=torch.bool)
        if J:
            ran = run_layer(i - 1, g[1:J + 1])                               # (J, width)
            cos_ran = cosine(h[i], ran)
            wins = cos[:J] > cos_ran                   # strictly: on a tie the layer is run
            bit[:J] = wins
            cos = torch.cat((torch.where(wins, cos[:J], cos_ran), cos[J:]))
            state = torch.cat((torch.where(wins[:, None], state[:J], ran), state[J:]))
        g = torch.cat((h[i:i + 1], state))             # cell 0: nothing skipped
        pad = (0, M - last)
        rows.append(torch.nn.functional.pad(cos, pad, value=float("nan")))
        bits.append(torch.nn.functional.pad(bit, pad))
    return torch.stack(rows), torch.stack(bits)


# -------------------------------------------------------------------------- python dp_layer_skip.py

def toy(L: int, width: int, seed: int) -> tuple[Tensor, RunLayer]:
    """A network to watch: layer i adds a small nonlinear push of its own strength; every third
    pushes less."""
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
    """The cosine that a set really has: run the layers it keeps."""
    x = h[:1]
    for i, s in enumerate(skip):
        x = x if s else run_layer(i, x)
    return cosine(h[-1], x[0]).item()


def show(choice: Choice, colour: bool) -> str:
    """The table D as a heat strip, a row per depth, the path back marked."""
    L, M = len(choice.D) - 1, len(choice.D[0]) - 1
    low = min(v for row in choice.D for v in row if v == v)
    j, path = M, {(L, M)}
    for i in range(L, 0, -1):
        j -= choice.parents[i][j]
        path.add((i - 1, j))
    out = ["        j = " + "".join(f"{j:^7}" for j in range(M + 1))]
    for i, row in enumerate(choice.D):
        cells = []
        for j, v in enumerate(row):
            mark = "*" if (i, j) in path else " "
            text = f" {v:.3f}{mark}" if v == v else "   .   "
            if colour and v == v:
                heat = 232 + round(20 * min(1, (v - low) / (1 - low or 1)))   # greys, dark to light
                text = f"\033[48;5;{heat}m\033[38;5;{16 if heat > 243 else 231}m{text}\033[0m"
            cells.append(text)
        j = next(j for j in range(M + 1) if (i, j) in path)
        did = "SKIPPED" if choice.parents[i][j] else "run"
        step = f"  layer {i - 1:2} {did}" if i else ""
        out.append(f"  i = {i:2}    " + "".join(cells) + step)
    return "\n".join(out)


def main() -> None:
    colour = (sys.stdout.isatty() and not os.environ.get("NO_COLOR")
              and os.environ.get("TERM") != "dumb")
    L, M = 9, 3
    h, run_layer = toy(L, 16, seed=3)
    choice = choose_skip(h, run_layer, M)
    chosen = [i for i, s in enumerate(choice.skip()) if s]
    print(f"A toy of {L} layers, of which 1, 4 and 7 do little; {M} are to be left out.\n"
          "D[i,j]: the best cosine found with the full model after i layers, j left out.\n"
          "The way back from D[9,3] is marked *.\n")
    print(show(choice, colour))
    print(f"\nLeft out: {chosen}, cosine {choice.cosine[M]:.4f}. "
          "The same table holds every smaller budget: "
          + ", ".join(f"{j} -> {c:.4f}" for j, c in enumerate(choice.cosine[:M])) + ".\n")
    print("How good is it? Cosine with h[L] of the chosen set when run; of all sets; of 200 drawn\n"
          "at random. The program is approximate: it comes near the best, and not always there.\n"
          "  toy    L   M       DP     best    mean of random    rank of the DP's set")
    for seed in range(6):
        L, M = 12, 5
        h, run_layer = toy(L, 24, seed)
        sets = [tuple(i in s for i in range(L)) for s in itertools.combinations(range(L), M)]
        real = run_set(h, run_layer, choose_skip(h, run_layer, M).skip())
        every = sorted((run_set(h, run_layer, s) for s in sets), reverse=True)
        drawn = random.Random(seed).choices(every, k=200)
        print(f"  {seed:3} {L:4} {M:3}  {real:8.4f} {every[0]:8.4f} {sum(drawn) / len(drawn):14.4f}"
              f" {1 + sum(v > real + 1e-12 for v in every):16} of {len(every)}")


if __name__ == "__main__":
    for name in ("SIGINT", "SIGPIPE"):                 # Ctrl-C and `| head` end it without a word
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    if sys.stdout:                                     # None where the caller has closed it
        main()
