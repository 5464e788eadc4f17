"""The paper's figures 3 and 4, and one more, drawn from the demo: SVG, each with its numbers as CSV
beside it. bench/figures/README.md shows them.

    python bench/figures.py [--out DIR] [--model DIR] [--questions FILE]

It needs matplotlib, which nothing else here does: `pip install matplotlib`. Some minutes on a core.
"""
import ast
import csv
import statistics
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)
from bench.choosers import Page, Skip  # noqa: E402
from bench.questions import opened, parser  # noqa: E402
from bench.sweep import Prompts, speed, sweep  # noqa: E402
from clasp_mini import policy_of  # noqa: E402
from command.cli import UsageError, answer  # noqa: E402
from command.job import Job  # noqa: E402
from dp_layer_skip import choose_skip, cosine, torch  # noqa: E402
from policy.adaptive import Adaptive, overlap  # noqa: E402
from speculative import Paper, Settings, probabilities  # noqa: E402
from torch import Tensor  # noqa: E402

# Of the standard library's files that training kept back, some with a long docstring.
MODULES = ("ast", "http/server", "json/encoder", "pydoc", "asyncio/unix_events", "random",
           "zipimport", "turtledemo/lindenmayer")
START = 16                             # tokens of a text before layers are first chosen
PIECE = 128                            # tokens of either half of a text
ROWS = 128                             # candidates in one pass of the brute force
INNER = 12                             # layers of which brute force tries every set
BIN = 16                               # tokens that a point of figure 6 is the mean of
DISTANCES = (1, 2, 4, 8, 16, 32, 64, 128)
NEVER = 10 ** 9
Curves = dict[str, dict[Any, float]]                   # label -> x -> y
Pages = Sequence[tuple[str, Page]]                     # the kind with which a text begins, the text


def code_and_prose(module: str) -> tuple[str, str]:
    """A file of the standard library without its docstrings, and the longest of these."""
    path = Path(sysconfig.get_path("stdlib"), f"{module}.py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docs = []
    for node in ast.walk(tree):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if documented and ast.get_docstring(node):
            docs.append(ast.get_docstring(node))
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree), max(docs, key=len)


def texts(job: Job) -> Pages:
    """Texts that people wrote and that change their kind in the middle: from code to prose and the
    other way about, in turn."""
    out = []
    for n, module in enumerate(MODULES):
        code, prose = (job.tokenizer.encode(text) for text in code_and_prose(module))
        code = code[len(code) // 2:]                   # behind the imports
        first, a, b = ("code", code, prose) if n % 2 == 0 else ("prose", prose, code)
        ids = [job.tokenizer.bos, *a[:PIECE - 1], *b[:PIECE]]
        out.append((first, Page(job.model, ids, PIECE * 2 + ROWS)))
    return out


def jaccard(a: Skip, b: Skip) -> float:
    """|A & B| / |A | B|; of two empty sets 1."""
    union = sum(x or y for x, y in zip(a, b))
    return sum(x and y for x, y in zip(a, b)) / union if union else 1.0


def neighbours(texts: Sequence[tuple[str, int, list[Skip]]]) -> Curves:
    """3a. Of texts (first kind, token at which it changes, the best set at each token from START
    on) the mean overlap of two tokens' sets, by the kinds of the two and by distance."""
    found = defaultdict(lambda: defaultdict(list))
    for first, change, sets in texts:
        second = "prose" if first == "code" else "code"
        for d in DISTANCES:
            for n in range(len(sets) - d):
                here = first if START + n < change else second
                there = first if START + n + d < change else second
                label = f"both in {here}" if here == there else "one in code, one in prose"
                found[label][str(d)].append(jaccard(sets[n], sets[n + d]))
    return {label: {d: statistics.mean(values) for d, values in of.items()}
            for label, of in sorted(found.items())}


def every_subset(page: Page, t: int, a: int, b: int) -> Tensor:
    """Cosine with h[L] of the token at t, for every set of the layers a..b-1 left out: (2^(b-a),),
    bit i of the index says that layer a+i is. Sets that begin alike share their beginning."""
    f = page.run_layer(t, t + 1, ROWS)
    x = page.h[a, t][None]                                                  # (1, D)
    for i in range(a, page.model.cfg.L):
        run = torch.cat([f(i, part) for part in x.split(ROWS)])
        x = torch.cat((run, x)) if i < b else run                           # below b twice as many
    return cosine(page.h[-1, t], x).cpu()


def against_brute_force(page: Page, t: int, a: int, b: int) -> Curves:
    """3b at one token: for 1 .. b-a-1 of the layers a..b-1 left out, the cosine at the end."""
    every = every_subset(page, t, a, b).double()
    size = torch.tensor([n.bit_count() for n in range(len(every))])
    f = page.run_layer(t, t + 1, b - a + 1)
    choice = choose_skip(page.h[a:b + 1, t], lambda i, g: f(a + i, g), b - a)
    out = {"the best of all sets": {}, "the dynamic program's": {}, "the mean of all sets": {}}
    for j in range(1, b - a):
        mine = sum(2 ** i for i, left_out in enumerate(choice.skip(j)) if left_out)
        values = (every[size == j].max(), every[mine], every[size == j].mean())
        for of, value in zip(out.values(), values):
            of[j] = value.item()
    return out


def mean(found: Sequence[Curves]) -> Curves:
    """Curves of the same points, averaged."""
    return {label: {x: statistics.mean(one[label][x] for one in found) for x in of}
            for label, of in found[0].items()}


def knobs(job: Job, prompts: Prompts) -> dict[str, dict[str, Curves]]:
    """4. name -> panel -> curves: the paper's numbers as bench/sweep.py varies them, one at a time
    around the best so far, beside the policy, which decides all."""
    panels = defaultdict(dict)
    for title, temperature in (("temperature 1", 1.0), ("greedy", 0.0)):
        s = replace(job.plain, temperature=temperature)
        ours = speed(job, prompts, s, lambda: policy_of(job))
        for name, of in sweep(job, prompts, temperature)[0].items():
            fixed = {str(value): x for value, x in of.items()}
            panels[name][title] = {"fixed": fixed, "the policy": dict.fromkeys(fixed, ours)}
    return panels


def along(page: Page, policy: Any, M: int) -> tuple[list[float], int]:
    """The chance that a first drafted token is kept, at each token from START on, and how often
    layers were chosen. The policy is told of each, as if one token were drafted everywhere."""
    s = Settings(temperature=1.0)
    values = []
    choices = 0
    for n, t in enumerate(range(START - 1, page.n - 1)):
        if n > 0:
            p = probabilities(page.full(t, t + 1), s)                       # (1, V)
            mine = q[t - since - 1]                                         # (V,)
            values.append(overlap(p[0], mine).item())
            policy.judged([mine.amax().item()], p, [mine], 0)
        if policy.due(n):
            choice = policy.optimise(lambda *_: page.choose(t, M), page.model, page.cache,
                                     page.ids[:t + 1].tolist(), page.h[:, t])
            q = probabilities(page.draft(choice.skip(), t + 1, page.n), s)
            since = t
            choices += 1
    return values, choices


def changes(pages: Pages, M: int, costs: dict[str, Any]) -> Curves:
    """6. How likely the first drafted token is kept, by the distance from the change of kind and by
    who says when layers are chosen anew."""
    s = Settings(temperature=1.0, N=NEVER, K=1, M=M)
    rules = {f"every {n} tokens": n for n in (8, 16, 64)} | {"once": NEVER, "by the alarm": None}
    curves = {}
    for label, interval in rules.items():
        found = defaultdict(list)
        chosen = 0
        for _, page in pages:
            if interval is None:
                policy = Adaptive(s, **costs, M=M)
            else:
                policy = Paper(replace(s, interval=interval), page.model.cfg.L)
            values, choices = along(page, policy, M)
            chosen += choices
            for t, value in enumerate(values, START):
                found[(t - PIECE) // BIN * BIN + BIN // 2].append(value)
        curves[label] = {x: statistics.mean(of) for x, of in sorted(found.items())}
        after = statistics.mean(value for x, of in found.items() if x > 0 for value in of)
        print(f"{label}: {after:.3f} after the change, {chosen / len(pages):.1f} choices a text")
    return curves


def pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise UsageError("this script alone needs more: pip install matplotlib") from None
    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({
        "svg.fonttype": "none", "svg.hashsalt": "clasp", "font.size": 9, "axes.grid": True,
        "axes.spines.top": False, "axes.spines.right": False, "grid.color": "#e2e2e2",
        # Okabe and Ito's colours, told apart by the colour-blind.
        "axes.prop_cycle": plt.cycler(
            color=["#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7"], marker=[*"osD^v"])})
    return plt


def draw(plt: Any, out: Path, name: str, x: str, y: str, panels: dict[str, Curves]) -> None:
    """Write NAME.svg and NAME.csv."""
    fig, axes = plt.subplots(1, len(panels), figsize=(7.2, 3.2), squeeze=False, sharey="row")
    rows = [("panel", "curve", x, y)]
    for ax, (title, curves) in zip(axes[0], panels.items()):
        for label, of in curves.items():
            ax.plot(list(of), list(of.values()), label=label, markersize=4)
            rows += [(title, label, at, round(value, 4)) for at, value in of.items()]
        ax.set(xlabel=x, title=title)
    axes[0][0].set_ylabel(y)
    axes[0][0].legend(frameon=False)
    fig.tight_layout()
    fig.savefig(out / f"{name}.svg", metadata={"Date": None, "Creator": None})
    plt.close(fig)
    with open(out / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    print(f"{name} is drawn", flush=True)


@torch.inference_mode()
def figures(job: Job, prompts: Prompts) -> Iterator[tuple[str, str, str, dict[str, Curves]]]:
    """(name, what stands below, what stands beside, panels) of each."""
    L = job.cfg.L
    M = round(L * 11 / 16)
    pages = texts(job)
    sets = [(first, PIECE, [page.choose(t, M).skip() for t in range(START, page.n)])
            for first, page in pages]
    random = dict.fromkeys(map(str, DISTANCES), M / (2 * L - M))            # about
    yield ("3a", "distance of the two tokens", "overlap of their sets (Jaccard)",
           {"": neighbours(sets) | {"random sets": random}})
    a = (L - INNER) // 2
    found = [against_brute_force(page, t, a, a + INNER)
             for _, page in pages for t in (PIECE - 1, page.n - 1)]
    yield ("3b", f"layers left out of {a} to {a + INNER - 1}", "cosine with the full model's state",
           {"": mean(found)})
    panels = knobs(job, prompts)
    y = "speed-up (tokens per plain step)"
    yield "4a", "layers left out", y, panels["M"]
    yield "4b", "verifications between two choices of layers", y, panels["interval"]
    yield "4c", "exit threshold", y, panels["exit_threshold"]
    yield ("6", "distance from the change of kind (tokens)", "first drafted token kept",
           {"": changes(pages, M, job.costs)})


def main(argv: Sequence[str] | None = None) -> int:
    def work() -> int:
        p = parser("[flags]", __doc__.partition(":")[0])
        p.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "figures",
                       metavar="DIR", help="where figures go (bench/figures)")
        job, questions = opened(p, argv)
        plt = pyplot()
        if job.cfg.L < INNER or not job.tokenizer or not job.left_open:
            raise UsageError(f"needed are {INNER} layers, a tokenizer, and that something is left "
                             "to the policy")
        job.load()
        job.a.out.mkdir(parents=True, exist_ok=True)
        for figure in figures(job, [ids for _, ids in questions[::4]]):
            draw(plt, job.a.out, *figure)
        return 0
    return answer(work)


if __name__ == "__main__":
    sys.exit(main())
