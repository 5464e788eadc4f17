"""The paper's figures 3 and 4 and three more, drawn from the demo: SVG, each with its numbers as
CSV beside it, and a page that shows them and says what the paper's showed.

    python bench/figures.py [--out DIR] [--model DIR] [--questions FILE]

It needs matplotlib, which nothing else here does, so no other command installs it: `pip install
matplotlib`. A few minutes on one core. Nothing is timed: passes are counted and weighed by the
model's table of costs (its clasp.json, or --costs; else measured first), so load changes nothing.

    page       a text that the model has read, with p (n, V) and h (L+1, n, D) of every token
    overlap    sum(min(p, q)): the chance that the first drafted token is kept
    speed-up   decoded tokens per plain step (one pass of one token through all layers)
"""
import ast
import csv
import math
import statistics
import sys
import sysconfig
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)
import clasp_mini  # noqa: E402
from bench.spec_bench import first_turns, job_for, read_questions  # noqa: E402
from demo.train import FOREIGN, kept_back  # noqa: E402
from dp_layer_skip import Choice, choose_skip, cosine, torch  # noqa: E402
from llama import Llama  # noqa: E402
from speculative import (Adaptive, Chance, Fixed, Round, Settings, generate, overlap,  # noqa: E402
                         probabilities)
from command.cli import UsageError, answer  # noqa: E402
from command.report import ids_of  # noqa: E402
from torch import Tensor  # noqa: E402

START, PIECE, TEXTS = 16, 150, 10      # tokens before the first choice, of each half; human texts
PROMPTS = 5                            # of each kind, for the speed-ups
ROWS = 128                             # candidates in one pass of the brute force
INNER = 12                             # layers of which brute force tries every subset
BIN = 15                               # tokens that a point of figure 6a is the mean of
SHOWN = 64                             # tokens of figure 5
DISTANCES = (1, 2, 4, 8, 16, 32, 64, 128)
NEVER = 10 ** 9
GRID = dict(M=(1 / 4, 3 / 8, 1 / 2, 9 / 16, 5 / 8, 11 / 16, 3 / 4),              # in parts of L
            interval=(4, 8, 16, 32, NEVER), exit_threshold=(0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8))
NAMES = {NEVER: "never"}
T1 = Settings(temperature=1.0)
CODE, PROSE = ("code", "prose")
Row = dict[str, Any]


# ------------------------------------------------------------------------------- texts and pages

def kind_of(category: str) -> str:
    return "mixed" if category == "mixed" else PROSE if PROSE in category else CODE


def pieces(root: Path) -> Iterator[tuple[str, str]]:
    """(code, prose) of Python files below `root` that train.py keeps back: the code
    without its docstrings, and the longest of these. Longest prose first."""
    found = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not kept_back(name) or FOREIGN & set(name.split("/")):
            continue
        try:
            text = path.read_text(encoding="utf-8")
            nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(
                n, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(n)]
        except (UnicodeDecodeError, SyntaxError):      # templates, files of another encoding
            continue
        lines = text.splitlines(keepends=True)
        for n in nodes:
            first, last = n.body[0].lineno, n.body[0].end_lineno
            lines[first - 1:last] = [""] * (last + 1 - first)
        found.append(("".join(lines), max((ast.get_docstring(n) for n in nodes), key=len,
                                          default="")))
    return iter(sorted(found, key=lambda pair: -len(pair[1])))


def human_texts(bos: int, encode: Callable[[str], list[int]], pairs: Iterable[tuple[str, str]]
                ) -> list[tuple[str, list[int]]]:
    """(first kind, ids) of texts that people wrote and that change their kind in the middle: PIECE
    tokens of code, then of prose, or the other way about. Code from the middle of its file."""
    out = []
    for code, prose in pairs:
        a, b = encode(code), encode(prose)[:PIECE - 1]
        a = a[len(a) // 2:][:len(b)]
        if len(out) < TEXTS and len(a) == len(b) == PIECE - 1:
            first = (CODE, PROSE)[len(out) % 2]
            out.append((first, [bos, *a, *b] if first == CODE else [bos, *b, *a]))
    return out


class Page:
    """A text, read once. What is tried at one of its tokens is written behind the text."""

    def __init__(self, model: Llama, ids: Sequence[int]) -> None:
        self.model, self.ids, self.n = model, torch.tensor(ids, device=model.device), len(ids)
        self.cache = model.cache(2 * self.n + ROWS + 1)
        logits, self.h = model.forward(self.ids, self.cache.sequence(0, self.n), self.cache,
                                       last=self.n, states=True)                # (n, V)
        self.p = probabilities(logits, T1)

    def at(self, t: int, J: int) -> Callable[[int, Tensor], Tensor]:
        """f_i on up to J candidates for the token at t, as Cache.candidates has it."""
        seen = self.cache.slot[:self.n + J]
        slots = seen[self.n:]
        rows = self.cache.rows(torch.full_like(slots, t), slots,
                               (seen < t) | (seen == slots[:, None]))
        return lambda i, x: self.model.layer(i, x, rows, self.cache)

    def choose(self, t: int, M: int) -> Choice:
        return choose_skip(self.h[:, t], self.at(t, M + 1), M)

    def draft(self, skip: Sequence[bool], t: int) -> Tensor:
        """(n - t, V): what a draft that begins at each token from t on says follows it."""
        rows = self.cache.candidates(self.n - 1, 1, self.n - t)
        return probabilities(self.model.forward(self.ids[t:], rows, self.cache, skip,
                                                self.n - t)[0], T1)


# ------------------------------------------------------------------------------------ the numbers

def jaccard(a: Sequence[bool], b: Sequence[bool]) -> float:
    """|A & B| / |A | B|; of two empty sets 1."""
    union = sum(x or y for x, y in zip(a, b))
    return sum(x and y for x, y in zip(a, b)) / union if union else 1.0


def neighbours(texts: Sequence[tuple[str, int, list[Sequence[bool]]]]) -> list[Row]:
    """3a. Of texts (first kind, token at which it changes, the best set at each token from START
    on) the mean Jaccard overlap of two tokens' sets, by distance and by the kinds of the two."""
    found = defaultdict(list)
    for first, change, sets in texts:
        second = PROSE if first == CODE else CODE
        for d in DISTANCES:
            for t in range(START, START + len(sets) - d):
                kinds = {first if x < change else second for x in (t, t + d)}
                pair = "across" if len(kinds) == 2 else kinds.pop()
                found[pair, d].append(jaccard(sets[t - START], sets[t - START + d]))
    return [dict(tokens=pair, distance=d, jaccard=round(statistics.mean(found[pair, d]), 4),
                 pairs=len(found[pair, d]))
            for pair in (CODE, PROSE, "across") for d in DISTANCES if found[pair, d]]


def every_subset(page: Page, t: int, a: int, b: int) -> Tensor:
    """Cosine with h[L] of the token at t, for every set of the layers a..b-1 left out: (2^(b-a),),
    bit i of the index says that layer a+i is. Sets that begin alike share their beginning."""
    L, x, J = page.model.cfg.L, page.h[a, t][None], min(ROWS, 2 ** (b - a))
    layer = page.at(t, J)

    def run(i: int, x: Tensor) -> Tensor:
        return torch.cat([layer(i, part) for part in x.split(J)])
    for i in range(a, b):
        x = torch.cat((run(i, x), x))
    for i in range(b, L):
        x = run(i, x)
    return cosine(page.h[L, t], x).cpu()


def against_brute_force(page: Page, t: int, a: int, b: int) -> list[Row]:
    """3b at one token: for 1 .. b-a-1 left out, the cosine at the end of the best set, of the
    dynamic program's (over the states a..b), and of all sets: mean and a tenth at either end."""
    every, out = every_subset(page, t, a, b), []
    size = torch.tensor([bin(i).count("1") for i in range(len(every))])
    layer = page.at(t, b - a + 1)
    choice = choose_skip(page.h[a:b + 1, t], lambda i, x: layer(a + i, x), b - a)
    for j in range(1, b - a):
        all_j = every[size == j].double()
        mine = every[sum(2 ** i for i, s in enumerate(choice.skip(j)) if s)].item()
        out.append(dict(left_out=j, best=all_j.max().item(), dynamic_program=mine,
                        mean=all_j.mean().item(), low=all_j.quantile(0.1).item(),
                        high=all_j.quantile(0.9).item(),
                        better=(all_j > mine + 1e-6).double().mean().item()))
    return out


def mean_rows(rows: Sequence[Row], key: str) -> list[Row]:
    """The mean of all other columns of the rows that agree in `key`."""
    groups = defaultdict(list)
    for row in rows:
        groups[row[key]].append(row)
    return [{key: value} | {name: round(statistics.mean(r[name] for r in of), 5)
                            for name in of[0] if name != key} | dict(tokens=len(of))
            for value, of in groups.items()]


def passes(rounds: Sequence[Round], costs: dict) -> list[tuple[str, float, int]]:
    """(what, its cost in plain steps, tokens that it yields) of every pass after the prefill's; the
    prefill's layer optimisation counts."""
    out = []
    for n, r in enumerate(rounds):
        if n:
            out += [("draft", costs["draft"][sum(r.skip)], 0)] * len(r.drafted)
            out.append(("verify", costs["verify"][len(r.drafted) + 1], len(r.emitted)))
        if r.choice:
            out.append(("optimise", costs.get("optimise", 0.0), 0))
    return out


def speed(runs: Sequence[Sequence[Round]], costs: dict) -> Row:
    """What a few runs come to: tokens per plain step and where that comes from."""
    done = [p for rounds in runs for p in passes(rounds, costs)]
    after = [r for rounds in runs for r in rounds[1:]]
    drafted, steps = sum(len(r.drafted) for r in after), sum(cost for _, cost, _ in done)
    left_out = sum(len(r.drafted) * sum(r.skip) for r in after)
    return dict(speedup=round(sum(n for _, _, n in done) / steps, 4), plain_steps=round(steps, 2),
                tokens_per_verify=round(sum(n for _, _, n in done) / len(after), 3),
                acceptance=round(sum(r.accepted for r in after) / drafted, 4) if drafted else None,
                left_out=round(left_out / drafted, 2) if drafted else None,
                choices=sum(what == "optimise" for what, _, _ in done), verifies=len(after))


def knobs(base: Settings, L: int, run: Callable[[Settings, bool], list[list[Round]]],
          costs: dict) -> dict[str, list[Row]]:
    """4a-c: knob -> rows. One knob of `base` is varied at a time; beside it the policy, which
    decides all of them, and for the interval the policy that decides this alone."""
    grid = GRID | dict(M=sorted({max(1, round(part * L)) for part in GRID["M"]}))
    out, done = {knob: [] for knob in grid}, {}        # base occurs once in each grid

    def row(value: Any, s: Settings, adaptive: bool) -> Row:
        if (s, adaptive) not in done:
            done[s, adaptive] = speed(run(s, adaptive), costs)
        return dict(temperature=s.temperature, value=value) | done[s, adaptive]

    for temperature in (1.0, 0.0):
        fixed = replace(base, temperature=temperature)
        free = replace(fixed, K=None, M=None, exit_threshold=None, interval=None)
        for knob, values in grid.items():
            for v in values:
                out[knob].append(row(NAMES.get(v, v), replace(fixed, **{knob: v}), False))
            if knob == "interval":
                out[knob].append(row("disappointment", replace(fixed, interval=None), True))
            out[knob].append(row("policy", free, True))
    return out


def time_line(rounds: Sequence[Round], costs: dict) -> list[Row]:
    """5. Every pass of a run and of plain decoding to as many tokens, one behind the other."""
    done, at, out = passes(rounds, costs), 0.0, []
    for what, cost, tokens in done:
        out.append(dict(lane="rounds", what=what, start=round(at, 3), plain_steps=round(cost, 3),
                        tokens=tokens))
        at += cost
    plain = [dict(lane="plain", what="step", start=float(n), plain_steps=1.0, tokens=1)
             for n in range(sum(tokens for _, _, tokens in done))]
    return plain + out


def along(page: Page, start: int, policy: Any) -> tuple[list[float], list[int]]:
    """The overlap at each token of a page from `start` on, and the tokens by whose states layers
    were chosen. The policy is told each, as if one token were drafted everywhere."""
    values, chosen, q = [], [], None
    for n, t in enumerate(range(start - 1, page.n - 1)):
        if n:
            mine, p = q[t - chosen[-1] - 1], page.p[t:t + 1]
            values.append(overlap(p[0], mine).item())
            policy.plan(True)
            policy.goes_on(mine.amax().item())
            policy.judged(p, [mine], 0)
        if policy.due(n):
            choice = page.choose(t, policy.M)
            policy.probed(page.model, page.h[-1, t:t + 1], choice.states[:, None])
            q = page.draft(choice.skip(policy.j), t + 1)
            chosen.append(t)
    return values, chosen


def schemes(base: Settings, costs: dict) -> dict[str, Callable[[], Any]]:
    """Who says when layers are chosen anew; here an interval counts tokens."""
    fixed = {f"every {n} tokens": n for n in (8, 16, 64)} | {"once, at the beginning": NEVER}
    return {name: lambda n=n: Fixed(replace(base, temperature=1.0, interval=n))
            for name, n in fixed.items()} | {
        "when the draft disappoints": lambda: Adaptive(
            replace(base, temperature=1.0, interval=None, N=NEVER), **costs)}


def changes(pages: Sequence[tuple[str, int, Page]], policies: dict[str, Callable[[], Any]]
            ) -> tuple[list[Row], list[Row]]:
    """6a, 6b. Of (what text, token at which the kind changes, page): the overlap along the human
    texts by distance from the change, and for each what: after it, and choices per 100 tokens."""
    near, after, choices = defaultdict(list), defaultdict(list), defaultdict(list)
    for what, change, page in pages:
        for name, policy in policies.items():
            values, chosen = along(page, START, policy())
            choices[what, name].append(100 * len(chosen) / max(1, len(values)))
            for t, x in enumerate(values, START):
                if t >= change:                        # p[t] speaks of the next token
                    after[what, name].append(x)
                if what != "own":
                    near[name, (t - change) // BIN * BIN].append(x)
    curve = [dict(chosen=name, first=b, last=b + BIN - 1, overlap=round(statistics.mean(xs), 4),
                  tokens=len(xs)) for (name, b), xs in sorted(near.items()) if len(xs) > BIN]
    summary = [dict(text=what, chosen=name, overlap_after=round(statistics.mean(xs), 4),
                    tokens=len(xs), choices_per_100=round(statistics.mean(choices[what, name]), 2))
               for (what, name), xs in after.items()]
    return curve, summary


# ------------------------------------------------------------------------------------ the drawing

BLUE, RED, GREEN, ORANGE, PURPLE, GREY = (      # Okabe and Ito's, told apart by the colour-blind
    "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#666666")
MARKS = dict(zip((BLUE, RED, GREEN, ORANGE, PURPLE, GREY), "osD^vX"))


def pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise UsageError("matplotlib is missing, which only this script needs: "
                         "pip install matplotlib") from None
    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({
        "svg.fonttype": "none", "svg.hashsalt": "clasp", "font.size": 9, "axes.spines.top": False,
        "axes.spines.right": False, "axes.grid": True, "grid.color": "#e2e2e2", "lines.markersize":
        4, "legend.frameon": False, "figure.facecolor": "white", "font.family": "sans-serif"})
    return plt


def line(ax: Any, rows: Sequence[Row], x: str, y: str, colour: str, label: str,
         style: str = "-") -> None:
    ax.plot([r[x] for r in rows], [r[y] for r in rows], style, marker=MARKS[colour], color=colour,
            label=label)


def draw_3a(axes: Sequence[Any], rows: list[Row], chance: float) -> None:
    ax = axes[0]
    for pair, colour, label in ((CODE, BLUE, "both in code"), (PROSE, GREEN, "both in prose"),
                                ("across", RED, "one in code, one in prose")):
        line(ax, [r for r in rows if r["tokens"] == pair], "distance", "jaccard", colour, label)
    ax.axhline(chance, color=GREY, linestyle=":", label="random sets")
    ax.set_xscale("log", base=2)
    ax.set_xticks(DISTANCES, map(str, DISTANCES))
    ax.set(xlabel="distance of the two tokens (tokens)", ylim=(0, 1),
           ylabel="overlap of their best sets (Jaccard)")
    ax.legend()


def draw_3b(axes: Sequence[Any], rows: list[Row]) -> None:
    ax, x = axes[0], [r["left_out"] for r in rows]
    ax.fill_between(x, [r["low"] for r in rows], [r["high"] for r in rows], color="#d9d9d9",
                    label="80 % of all sets")
    for key, colour, label in (("best", GREY, "best of all sets (brute force)"),
                               ("dynamic_program", BLUE, "the dynamic program's"),
                               ("mean", RED, "a random set (mean of all)")):
        line(ax, rows, "left_out", key, colour, label, "--" if key == "best" else "-")
    ax.set(xlabel=f"left out of the {INNER} layers in the middle (layers)",
           ylabel="cosine with the full model's last state")
    ax.legend(loc="lower left")


def draw_knob(axes: Sequence[Any], rows: list[Row], label: str) -> None:
    for ax, temperature in zip(axes, (1.0, 0.0)):
        mine = [r for r in rows if r["temperature"] == temperature]
        fixed = [r for r in mine if r["value"] not in ("policy", "disappointment")]
        x = [r["value"] for r in fixed]
        if NAMES[NEVER] in x:                          # intervals: evenly spaced, and one more
            ax.set_xticks(range(len(x) + 1), [*map(str, x), ""])
            x = range(len(x))
        ax.plot(x, [r["speedup"] for r in fixed], "o-", color=BLUE, label="fixed")
        for r in mine:
            if r["value"] == "disappointment":
                ax.plot(len(x), r["speedup"], MARKS[GREEN], color=GREEN, label="by disappointment")
            if r["value"] == "policy":
                ax.axhline(r["speedup"], color=RED, linestyle="--", label="the policy")
                if label.startswith("layers") and r["left_out"]:
                    ax.plot(r["left_out"], r["speedup"], MARKS[RED], color=RED)
        if label.startswith("layers"):
            ax.set_xticks(x)
        ax.axhline(1, color=GREY, linewidth=0.8)
        ax.set(xlabel=label, title="greedy" if temperature == 0 else "temperature 1")
        ax.title.set_fontsize(9)
    axes[0].set_ylabel("speed-up (tokens per plain step)")
    axes[0].legend(loc="best")


def draw_5(axes: Sequence[Any], rows: list[Row]) -> None:
    ax, colours = axes[0], dict(step=GREY, draft=BLUE, verify=ORANGE, optimise=PURPLE)
    for what, colour in colours.items():
        mine = [r for r in rows if r["what"] == what]
        y = 1.0 if what == "step" else 0.0
        ax.broken_barh([(r["start"], r["plain_steps"]) for r in mine], (y, 0.6), facecolor=colour,
                       edgecolor="white", linewidth=0.5,
                       label=dict(step="plain step", optimise="layer optimisation").get(what, what))
    tokens, last = 0, -9.0
    for r in rows:
        if r["what"] == "verify":
            tokens, end = tokens + r["tokens"], r["start"] + r["plain_steps"]
            if end - last > 1.6:                       # room for a number
                ax.text(end, -0.06, str(tokens), ha="right", va="top", fontsize=6.5)
                last = end
    ax.set(xlabel="time (plain steps)", yticks=(0.3, 1.3), yticklabels=("rounds", "plain"),
           ylim=(-0.3, 2.3))
    ax.grid(False)
    ax.legend(ncols=4, loc="upper left")


SCHEMES = dict(zip(("once, at the beginning", "every 64 tokens", "every 16 tokens",
                    "every 8 tokens", "when the draft disappoints"),
                   (GREY, ORANGE, PURPLE, BLUE, RED)))


def draw_6a(axes: Sequence[Any], rows: list[Row]) -> None:
    ax = axes[0]
    for name, colour in SCHEMES.items():
        mine = [r | dict(x=(r["first"] + r["last"]) / 2) for r in rows if r["chosen"] == name]
        line(ax, mine, "x", "overlap", colour, name)
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set(xlabel="distance from the change of kind (tokens)",
           ylabel="chance that the first draft is kept")
    ax.legend(loc="lower left")


def draw_6b(axes: Sequence[Any], rows: list[Row]) -> None:
    titles = {CODE: "code, then prose", PROSE: "prose, then code", "own": "mixed prompts, own text"}
    for ax, (what, title) in zip(axes, titles.items()):
        for r in sorted(rows, key=lambda r: list(SCHEMES).index(r["chosen"])):
            if r["text"] == what:
                colour = SCHEMES[r["chosen"]]
                ax.plot(r["choices_per_100"], r["overlap_after"], MARKS[colour], color=colour,
                        markersize=7, label=r["chosen"])
        ax.set(title=title, xlabel="choices per 100 tokens")
        ax.title.set_fontsize(9)
    axes[0].set_ylabel("first draft kept, after the change")
    axes[0].legend(fontsize=7, loc="lower right")


# --------------------------------------------------------------------------------------- the page

def figure(plt: Any, out: Path, name: str, title: str, caption: str, rows: list[Row],
           draw: Callable[..., None], panels: int = 1, height: float = 3.4) -> str:
    """Write NAME.csv and NAME.svg; -> their part of the page."""
    with open(out / f"{name}.csv", "w", newline="", encoding="utf-8") as f:
        w = csv.DictWriter(f, dict.fromkeys(key for row in rows for key in row),
                           lineterminator="\n")
        w.writeheader()
        w.writerows(rows)
    words = textwrap.fill(caption, 112)
    below = 0.15 * (words.count("\n") + 1) + 0.1       # inches
    fig, axes = plt.subplots(1, panels, figsize=(7.2, height + below), squeeze=False,
                             sharey="row")
    draw(axes[0], rows)
    fig.suptitle(title, x=0.02, ha="left", fontsize=10.5, fontweight="bold")
    fig.tight_layout(rect=(0, below / (height + below), 1, 1))
    fig.text(0.02, 0.06 / (height + below), words, fontsize=8.5, va="bottom", linespacing=1.25)
    fig.savefig(out / f"{name}.svg", metadata={"Date": None, "Creator": None})
    plt.close(fig)
    return f"## {title}\n\n![{title}: {caption}]({name}.svg)\n\nNumbers: [{name}.csv]({name}.csv)."


PAPER = {
    "3a": "The paper's 3a: the best sets of neighbouring tokens are much alike, of distant ones "
          "less, which is why a set may be kept for a while. Here the same within a kind. The fall "
          "across kinds is this model's own: it was trained to need other layers for code than "
          "for prose.",
    "3b": "The paper's 3b, LLaMA3-8B with its first and last 10 layers fixed: the dynamic program "
          "comes near to brute force and lies far above random sets. Here the same layers of 32 "
          "are fixed, and all sets of the middle 12 are tried, of every size.",
    "4a": "The paper's 4a has a peak too, at 44 of the 70B's 80 layers; 50 to 60 % in general. "
          "A model that was trained to be skipped bears more.",
    "4b": "The paper's 4b: intervals up to 128 serve the 70B best; there a choice costs about 1.4 "
          "verifies. Here it costs more beside a step, and 128 tokens have room for few. The "
          "choice by disappointment, and the policy, are not in the paper.",
    "4c": "The paper's 4c: 0.7 is best on the 70B and the curve is flat above. Where it lies "
          "depends on what a draft step costs beside a verify.",
    "5": "The paper draws this time line as a scheme, its figure 1; this is a run.",
    "6a": "The paper has no such figure. That the sets have to follow the text is what its 3a "
          "suggests; here the gain of following can be seen, because the kinds differ by training.",
    "6b": "Nor this one: what the following costs. An interval is paid for on all texts alike, the "
          "choice by disappointment where the kind changes."}


def numbers(job: clasp_mini.Job, kinds: Sequence[str], prompts: Sequence[list[int]]
            ) -> Iterator[tuple[str, str, str, list[Row], Callable[..., None], int, float]]:
    """(name, title, caption, rows, how to draw them, panels, inches) of each figure."""
    L, model, costs, s = job.cfg.L, job.model, job.costs, job.settings
    M = round(L * 11 / 16)
    base = replace(s, K=min(12, len(costs["verify"]) - 2), M=M, exit_threshold=0.3, interval=32)
    human = human_texts(job.tokenizer.bos, job.tokenizer.encode,
                        pieces(Path(sysconfig.get_path("stdlib"))))
    if len(human) < 2:
        raise UsageError(f"{sysconfig.get_path('stdlib')}: too few Python files to read from")
    pages = [(first, PIECE, Page(model, ids)) for first, ids in human]

    sets = [(first, change, [page.choose(t, M).skip() for t in range(START, page.n)])
            for first, change, page in pages]
    rows = neighbours(sets)
    chance = sum(k / (2 * M - k) * in_common(L, M, k) for k in range(max(0, 2 * M - L), M + 1))
    by = defaultdict(dict)
    for r in rows:
        by[r["distance"]][r["tokens"]] = r["jaccard"]
    d = max(d for d, of in by.items() if len(of) == 3 and d <= 64)
    far, next_to = by[d], by[1]
    yield ("3a", "3a. Neighbours want the same layers, kinds do not", (
        f"How much the sets of {M} of {L} layers that the dynamic program finds best for two "
        f"tokens of one text have in common: {next_to[CODE]:.2f} (code) and {next_to[PROSE]:.2f} "
        f"(prose) for neighbours, {far[CODE]:.2f} and {far[PROSE]:.2f} {d} tokens apart, "
        f"{far['across']:.2f} when the kind has changed between them; two random sets have "
        f"{chance:.2f}. {len(pages)} texts that people wrote, half code, half docstring, of files "
        "kept back from training."),
        rows, lambda axes, rows: draw_3a(axes, rows, chance), 1, 3.4)

    a = (L - INNER) // 2
    rows = mean_rows([row for _, change, page in pages for t in (change - 1, page.n - 1)
                      for row in against_brute_force(page, t, a, a + INNER)], "left_out")
    some = [rows[j - 1] for j in (INNER // 2, INNER - 2)]
    yield ("3b", "3b. The dynamic program against brute force", (
        f"Layers {a} to {a + INNER - 1} of {L} may be left out, all {2 ** INNER} sets are tried. "
        "The best set, the dynamic program's and a random one have "
        + " and ".join(f"{r['best']:.3f}, {r['dynamic_program']:.3f}, {r['mean']:.3f} with "
                       f"{r['left_out']} out" for r in some)
        + f"; {some[0]['better']:.1%} and {some[1]['better']:.1%} of all sets are better than the "
        f"dynamic program's. Means over {rows[0]['tokens']} tokens, half of them code."),
        rows, draw_3b, 1, 3.4)

    chosen = [n for kind in (CODE, PROSE, "mixed") for n in spread(
        [n for n, k in enumerate(kinds) if k == kind], PROMPTS)]

    def run(s: Settings, adaptive: bool) -> list[list[Round]]:
        return [list(generate(model, prompts[n], s, Chance(job.a.seed + n), job.choose,
                              Adaptive(s, **costs) if adaptive else None)) for n in chosen]
    by_knob = knobs(base, L, run, costs)
    weighed = (f"{len(chosen)} prompts of code, prose and both, {s.N} tokens each. Passes are "
               "counted and weighed by the model's table of costs, not timed, so the figure can be "
               "repeated anywhere.")
    rest = dict(M=f"{M} layers out", K=f"K = {base.K}", exit_threshold="threshold 0.3",
                interval="interval 32")
    for name, knob, title, label, see in (
            ("4a", "M", "4a. Speed-up against the layers left out", "layers left out (of "
             f"{L})", "Too few make drafts dear, too many make them wrong. Red: the policy, at "
             "the number that it left out on average."),
            ("4b", "interval", "4b. Speed-up against the interval",
             "verifications between two choices of layers", "Green: all else fixed, layers are "
             "chosen anew when rejections run ahead of their rate (--interval would fix it). Red: "
             "the policy, which decides all of it."),
            ("4c", "exit_threshold", "4c. Speed-up against the exit threshold",
             "exit threshold (least confidence to go on)", "Low thresholds draft too "
             "long, high ones too short. Red: the policy, which has no threshold.")):
        rows, others = by_knob[knob], ", ".join(v for k, v in rest.items() if k != knob)
        mine = [[r for r in rows if r["temperature"] == t] for t in (1.0, 0.0)]
        best = [max((r for r in of if r["value"] not in ("policy", "disappointment")),
                    key=lambda r: r["speedup"]) for of in mine]
        policy = [next(r for r in of if r["value"] == "policy") for of in mine]
        yield (name, title, (
            f"{see} Best fixed {best[0]['speedup']:.2f} at {best[0]['value']} (temperature 1), "
            f"{best[1]['speedup']:.2f} at {best[1]['value']} (greedy); the policy "
            f"{policy[0]['speedup']:.2f} and {policy[1]['speedup']:.2f}. Else {others}. {weighed}"),
            rows, lambda axes, rows, label=label: draw_knob(axes, rows, label), 2, 2.9)

    own = [n for n, k in enumerate(kinds) if k == "mixed"] or [0]
    greedy, rounds = replace(s, temperature=0.0), []
    for r in generate(model, prompts[own[0]], greedy, Chance(0), job.choose,
                      Adaptive(greedy, **costs)):
        rounds.append(r)
        if len(ids_of(rounds)) > SHOWN:
            break
    rows = time_line(rounds, costs)
    total = {lane: sum(r["plain_steps"] for r in rows if r["lane"] == lane)
             for lane in ("plain", "rounds")}
    yield ("5", "5. One run to scale", (
        f"The first prompt of both kinds, greedy, after the prefill: the same "
        f"{total['plain']:.0f} tokens take {total['plain']:.0f} steps one by one and "
        f"{total['rounds']:.1f} in the policy's rounds of draft and verify, below which the tokens "
        "are counted. A choice of layers must be earned back. Lengths are the model's table of "
        "costs, not times."),
        rows, draw_5, 1, 1.9)

    for n in own:
        if len(prompts[n]) > START + 2:
            sample = replace(s, temperature=1.0, K=0, M=0, exit_threshold=0.0, interval=1)
            new = ids_of(list(generate(model, prompts[n], sample, Chance(job.a.seed + n))))
            pages.append(("own", len(prompts[n]), Page(model, [*prompts[n], *new])))
    curve, summary = changes(pages, schemes(base, costs))
    kept = {name: statistics.mean(r["overlap_after"] for r in summary
                                  if r["chosen"] == name and r["text"] != "own")
            for name in SCHEMES}
    dear = {name: statistics.mean(r["choices_per_100"] for r in summary if r["chosen"] == name)
            for name in SCHEMES}
    once, often, when = "once, at the beginning", "every 8 tokens", "when the draft disappoints"
    yield ("6a", "6a. A text that changes its kind", (
        f"The chance that the first drafted token is kept (temperature 1, {M} of {L} layers left "
        f"out) along {len(human)} texts that people wrote, from code to docstring and the other "
        f"way about in turn; each point is the mean of {BIN} tokens of each. After the change a "
        f"set chosen once has {kept[once]:.2f}, choosing every 8 tokens {kept[often]:.2f}, and "
        f"when the draft disappoints {kept[when]:.2f}."), curve, draw_6a, 1, 3.4)
    yield ("6b", "6b. What following the text costs", (
        "The same after the change, and for the model's own text behind mixed prompts, against how "
        f"often layers were chosen: on average {dear[often]:.1f} times per 100 tokens every 8 "
        f"tokens, {dear[when]:.1f} when the draft disappoints. Up and to the left is better."),
        summary, draw_6b, 3, 2.9)


def in_common(L: int, M: int, k: int) -> float:
    """Chance that two random sets of M of L have k in common."""
    return math.comb(M, k) * math.comb(L - M, M - k) / math.comb(L, M)


def spread(of: Sequence[int], n: int) -> list[int]:
    """n of them at even distances."""
    return [of[i * len(of) // n] for i in range(n)] if len(of) > n else list(of)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status as that of clasp_mini.py."""
    def work() -> int:
        p = clasp_mini.parser()
        p.usage, p.description = "python bench/%(prog)s [flags]", __doc__.partition(":")[0]
        p.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "figures",
                       metavar="DIR", help="where figures and page go (bench/figures)")
        p.add_argument("--questions", default=clasp_mini.DEMO / "prompts.jsonl", metavar="FILE",
                       help="in Spec-Bench's format; the categories tell the kind (the demo's)")
        a = p.parse_args(argv)
        a.eager, plt = True, pyplot()
        questions = [q for q in read_questions(a.questions) if q[1]]
        job = job_for(a, questions)
        if not job.tokenizer or job.cfg.L < INNER:
            raise UsageError(f"{a.model}: a tokenizer and {INNER} layers or more are needed")
        job.adaptive = True                            # whatever is named: a policy is drawn too
        prompts = first_turns(job, questions)
        job.load()
        a.out.mkdir(parents=True, exist_ok=True)
        parts = ["Made by `python bench/figures.py`; what the paper (arXiv 2505.24196) showed is "
                 "said below each figure. The demo was trained to need other layers for code than "
                 "for prose, so that a choice in context can be seen to matter; large models "
                 "are reported to have such a difference too, a weaker one."]
        with torch.inference_mode():
            for name, title, caption, rows, draw, panels, height in numbers(
                    job, [kind_of(category) for category, _ in questions], prompts):
                part = figure(plt, a.out, name, title, caption, rows, draw, panels, height)
                parts.append(f"{part} {PAPER[name]}")
                print(f"{name}: {caption}", flush=True)
        page = "\n\n".join(["# The paper's figures, from the demo", *parts]) + "\n"
        (a.out / "README.md").write_text(page, encoding="utf-8")
        return 0
    return answer(work)


if __name__ == "__main__":
    sys.exit(main())
