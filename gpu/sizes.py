"""What several GPUs hold, read and exchange, and what that predicts: a model on paper.

    python gpu/sizes.py
    python gpu/sizes.py --context 2048 --latency 20

The bytes are counted, and tests hold them against what ranks really hold and exchange. The times
are not measured: a pass takes as long as its reads and its exchanges one after the other, nothing
else takes any, and every drafted token is accepted with the same chance.
"""
import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)
from llama import Config  # noqa: E402
from command.cli import Parser, answer, number  # noqa: E402

#            L    D      H    G  hd   ffn
MODELS = {"8B": (32, 4096, 32, 8, 128, 14336),
          "70B": (80, 8192, 64, 8, 128, 28672),
          "405B": (126, 16384, 128, 8, 128, 53248)}
ITEM = 2                     # bytes of a bfloat16
MOST = 12                    # drafted tokens of a round
EVERY = 100                  # tokens between two choices of layers


def llama3(name: str) -> Config:
    return Config(*MODELS[name], 128256, 1e-5, 8192, False, 5e5, None)


def layer(c: Config, n: int) -> int:
    """Numbers in a layer's share for one of n ranks."""
    return 2 * c.D + (2 * (c.H + c.G) * c.hd * c.D + 3 * c.D * c.ffn) // n


def head(c: Config, n: int) -> int:
    """Numbers in the largest share of the head."""
    return -(-c.V // n) * c.D


def held(c: Config, n: int) -> int:
    """Numbers in a rank's weights: of the embedding and the norms each has all."""
    return c.L * layer(c, n) + c.D + c.V * c.D + (0 if c.tied else head(c, n))


def cached(c: Config, n: int, context: int) -> int:
    """Numbers in a rank's keys and values."""
    return 2 * c.L * c.G * c.hd * context // n


def read(c: Config, n: int, layers: int, context: int) -> int:
    """Numbers that a rank reads in a pass of few rows through so many layers, and the head."""
    return layers * (layer(c, n) + cached(c, n, context) // c.L) + head(c, n)


def exchanged(c: Config, n: int, layers: int, rows: int) -> tuple[int, int]:
    """(numbers, messages) of a pass: two sums over ranks per layer, the logits side by side."""
    return rows * (2 * layers * c.D + n * -(-c.V // n)), 2 * layers + 1


def seconds(c: Config, n: int, layers: int, rows: int, a: argparse.Namespace) -> float:
    """Of a pass. A ring sends a sum twice, all but the n-th part of it; of the logits each once."""
    numbers, messages = exchanged(c, n, layers, rows)
    sent = ITEM * (2 * numbers - rows * c.V) * (n - 1) / n
    reads = ITEM * read(c, n, layers, a.context) / (a.used * a.memory * 1e12)
    return reads + (n > 1) * (messages * a.latency * 1e-6 + sent / (a.link * 1e9))


def speedup(c: Config, n: int, left_out: float, accept: float, a: argparse.Namespace) -> tuple[
        float, int]:
    """(over plain decoding, at so many drafted tokens): the best of 1 to MOST, with this part of
    the layers left out and a choice of layers every EVERY tokens."""
    M = round(c.L * left_out)

    def at(k: int) -> float:
        tokens = sum(accept ** i for i in range(k + 1))
        optimise = seconds(c, n, c.L, M + 1, a) * tokens / EVERY
        took = k * seconds(c, n, c.L - M, 1, a) + seconds(c, n, c.L, k + 1, a) + optimise
        return tokens * seconds(c, n, c.L, 1, a) / took
    return max((at(k), k) for k in range(1, MOST + 1))


def tables(a: argparse.Namespace) -> str:
    """Both tables, as the README has them."""
    ranks = (1, 2, 4, 8)
    out = [f"| GB per GPU, weights + cache of {a.context} tokens | "
           + " | ".join(f"{n} GPU{'s' * (n > 1)}" for n in ranks) + " |", "|---|---|---|---|---|"]
    for name in MODELS:
        c = llama3(name)
        out.append(f"| {name} | " + " | ".join(
            f"{ITEM * held(c, n) / 1e9:.1f} + {ITEM * cached(c, n, a.context) / 1e9:.2f}"
            for n in ranks) + " |")
    cases = [(m, x) for m in (0.5, 0.6) for x in (0.8, 0.9, 0.95)]
    out += ["", "| | reads, GB | exchanges, MB | messages | plain step, ms | "
            + " | ".join(f"{m:.0%} out, {x} kept" for m, x in cases) + " |", "|---" * 11 + "|"]
    for name, n in (("8B", 1), ("8B", 4), ("70B", 2), ("70B", 4), ("70B", 8), ("405B", 8)):
        c = llama3(name)
        numbers, messages = exchanged(c, n, c.L, 1) if n > 1 else (0, 0)
        out.append(f"| {name}, {n} GPU{'s' * (n > 1)} | "
                   f"{ITEM * read(c, n, c.L, a.context) / 1e9:.1f} | {ITEM * numbers / 1e6:.1f} | "
                   f"{messages} | {1e3 * seconds(c, n, c.L, 1, a):.1f} | " + " | ".join(
                       "{:.2f} ({})".format(*speedup(c, n, m, x, a)) for m, x in cases) + " |")
    return "\n".join(out)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status as that of clasp_mini.py."""
    def work() -> int:
        p = Parser(usage="python gpu/%(prog)s [flags]",
                   description=(__doc__ or "").partition("\n")[0])
        positive = number(float, "a number above 0", lambda v: 0 < v < 1e9)
        p.add_argument("--context", metavar="N", default=8192, help="tokens of the cache (8192)",
                       type=number(int, "1 or more", lambda v: 1 <= v < 2 ** 31))
        for name, value, unit in (("memory", 3.35, "TB/s of memory, as sold"),
                                  ("used", 0.8, "part of it that a pass reaches"),
                                  ("latency", 12, "microseconds of a message"),
                                  ("link", 450, "GB/s between GPUs, one way")):
            p.add_argument(f"--{name}", type=positive, default=value, metavar="X",
                           help=f"{unit} ({value})")
        print(tables(p.parse_args(argv)))
        return 0
    return answer(work)


if __name__ == "__main__":
    sys.exit(main())
