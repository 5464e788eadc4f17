"""A run as a picture (SVG): a line per round, a cell per layer, then the tokens that were kept, the
rejected ones and the full model's own. Takes the flags of the main command.

    python bench/picture.py > demo/run.svg             # the run of `python clasp_mini.py`
"""
import shlex
import sys
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)
from clasp_mini import run  # noqa: E402
from command.cli import UsageError, answered  # noqa: E402
from command.flags import parsed  # noqa: E402
from command.job import Job  # noqa: E402
from command.report import fates  # noqa: E402
from command.screen import Text  # noqa: E402
from speculative import Chance, Round  # noqa: E402

CELL = 9                                               # width of a layer
LINE = 20                                              # height of a round
MOST = 32                                              # rounds shown
STYLE = dict(kept='fill="#1a7f37"', dim='fill="#656d76"', own='fill="#0550ae" font-weight="bold"',
             rejected='fill="#cf222e" text-decoration="line-through"')
FONT = 'font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, monospace" font-size="13"'


def line(x: int, y: int, *parts: tuple[str, str], right: bool = False) -> str:
    """Parts of a text, (style, words) each, from x on or up to it."""
    spans = "".join(f"<tspan {STYLE[kind]}>{escape(words)}</tspan>" for kind, words in parts)
    anchor = ' text-anchor="end"' if right else ""
    return f'<text x="{x}" y="{y}"{anchor} xml:space="preserve">{spans}</text>'


def box(x: int, y: int, width: int, height: int, fill: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{fill}"/>'


def draw(rounds: Sequence[Round], spell: Callable[[list[int]], str], title: str) -> str:
    """The first rounds after the prefill."""
    shown = rounds[1:MOST + 1]
    left = 40 + len(rounds[0].skip) * CELL + 70        # where the tokens begin
    width = left + 400
    height = 74 + LINE * len(shown)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
           f'width="{width}" {FONT}>', box(0, 0, width, height, "white"),
           line(12, 22, ("dim", title)),
           line(12, 44, ("dim", "round  dark: the layer runs in the draft")),
           line(left - 24, 44, ("dim", "kept"), right=True),
           line(left, 44, ("kept", "drafted and kept"), ("dim", "  "), ("rejected", "rejected"),
                ("dim", "  "), ("own", "the full model's own"))]
    for n, r in enumerate(shown, 1):
        y = 46 + LINE * n
        out.append(line(30, y, ("dim", str(n)), right=True))
        for i, left_out in enumerate(r.skip):
            fill = "#e6e9ec" if left_out else "#424a53"
            out.append(box(40 + i * CELL, y - 11, CELL - 1, 13, fill))
        out.append(line(left - 24, y, ("dim", f"{r.accepted}/{len(r.drafted)}"), right=True))
        tokens = [(kind, spell(ids).replace("\n", "⏎").replace(" ", "\u00a0"))
                  for kind, ids in fates(r).items() if ids]
        out.append(line(left, y, *tokens))
    return "\n".join([*out, "</svg>"])


@answered
def main(argv: Sequence[str] | None = None) -> int:
    a = parsed(argv)
    if a.compare or a.verbose or a.json:
        raise UsageError("a picture is of one run: without --compare, --verbose, --json")
    job = Job(a)
    ids = job.prompt()
    rounds = list(run(job.load(), ids, Chance(job.flags.seed)))
    words = sys.argv[1:] if argv is None else argv
    title = shlex.join(["python", "clasp_mini.py", *words])
    print(draw(rounds, Text(job.tokenizer, job.stops).spelled, title))
    return 0


if __name__ == "__main__":
    sys.exit(main())
