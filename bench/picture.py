"""Draw a real run as SVG: a line per round, a cell per layer, then the tokens that were kept, the
rejected ones and the full model's own. Takes the main command's flags.

    python bench/picture.py --temperature 0.8 --seed 10 --skip-layers 22 --interval 8 > demo/run.svg
"""
import shlex
import sys
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)
import clasp_mini  # noqa: E402
from speculative import Round  # noqa: E402
from command.cli import answer  # noqa: E402
from command.report import fates  # noqa: E402

CELL, LINE, MOST = 9, 20, 28                           # width, height; rounds shown
COLOUR = dict(kept="#1a7f37", rejected="#cf222e", own="#0550ae", dim="#656d76", run="#424a53",
              skip="#e6e9ec")
STYLE = dict(rejected=' text-decoration="line-through"', own=' font-weight="bold"')


def span(kind: str, text: str) -> str:
    return f'<tspan fill="{COLOUR[kind]}"{STYLE.get(kind, "")}>{escape(text)}</tspan>'


def line(x: int, y: int, inside: str, right: bool = False) -> str:
    anchor = ' text-anchor="end"' if right else ""
    return f'<text x="{x}" y="{y}"{anchor} xml:space="preserve">{inside}</text>'


def draw(rounds: Sequence[Round], spell: Callable[[list[int]], str], title: str) -> str:
    """The first rounds after the prefill."""
    L, shown = len(rounds[0].skip), rounds[1:MOST + 1]
    left = 40 + L * CELL + 70
    width, height = left + 400, 62 + LINE * len(shown) + 12
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
           f'width="{width}" font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, '
           'monospace" font-size="13">', f'<rect width="{width}" height="{height}" fill="white"/>',
           line(12, 22, span("dim", title)),
           line(12, 44, span("dim", "round  dark: the layer runs in the draft")),
           line(left - 24, 44, span("dim", "kept"), right=True),
           line(left, 44, span("kept", "drafted and kept") + "  " + span("rejected", "rejected")
                + "  " + span("own", "the full model's own"))]
    for n, r in enumerate(shown, 1):
        y = 46 + LINE * n
        out.append(line(30, y, span("dim", str(n)), right=True))
        out += [f'<rect x="{40 + i * CELL}" y="{y - 11}" width="{CELL - 1}" height="13" '
                f'fill="{COLOUR["skip" if s else "run"]}"/>' for i, s in enumerate(r.skip)]
        out.append(line(left - 24, y, span("dim", f"{r.accepted}/{len(r.drafted)}"), right=True))
        parts = [span(kind, spell(ids)) for kind, ids in fates(r).items() if ids]
        out.append(line(left, y, "".join(parts)))
    return "\n".join([*out, "</svg>"])


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status as that of clasp_mini.py."""
    def work() -> int:
        p = clasp_mini.parser()
        p.usage, p.description = "python bench/%(prog)s [flags] > FILE", __doc__.split(":")[0]
        job = clasp_mini.Job(p.parse_args(argv))
        ids = job.prompt()
        rounds = list(job.load().run(ids, job.settings, job.a.seed))

        def spell(ids: list[int]) -> str:
            text = job.tokenizer.decode(ids) if job.tokenizer else " ".join(map(str, ids))
            return text.replace("\n", "⏎").replace(" ", "\u00a0")

        flags = sys.argv[1:] if argv is None else argv
        print(draw(rounds, spell, f"python clasp_mini.py --verbose {shlex.join(flags)}"))
        return 0
    return answer(work)


if __name__ == "__main__":
    sys.exit(main())
