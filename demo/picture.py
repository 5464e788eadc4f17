"""Draw a real run: one line per round, a cell per layer, the tokens kept, refused and the full
model's own.

    python demo/picture.py "def fibonacci(n):" --interval 8 > demo/run.svg
"""
import sys
from collections.abc import Callable
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import clasp_mini  # noqa: E402
from speculative import Round  # noqa: E402

CELL, LINE = 9, 20
COLOUR = dict(kept="#1a7f37", refused="#cf222e", own="#0550ae", dim="#656d76", run="#424a53",
              skip="#e6e9ec")
STYLE = dict(refused=' text-decoration="line-through"', own=' font-weight="bold"')


def span(kind: str, text: str) -> str:
    return f'<tspan fill="{COLOUR[kind]}"{STYLE.get(kind, "")}>{escape(text)}</tspan>'


def line(x: int, y: int, inside: str, right: bool = False) -> str:
    anchor = ' text-anchor="end"' if right else ""
    return f'<text x="{x}" y="{y}"{anchor} xml:space="preserve">{inside}</text>'


def draw(rounds: list[Round], spell: Callable[[list[int]], str], title: str,
         most: int = 24) -> str:
    """The first rounds after the prefill as SVG."""
    L, shown = len(rounds[0].skip), rounds[1:most + 1]
    left = 40 + L * CELL + 70
    width, height = left + 400, 62 + LINE * len(shown) + 12
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
           f'width="{width}" font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, '
           'monospace" font-size="13">', f'<rect width="{width}" height="{height}" fill="white"/>',
           line(12, 22, span("dim", title)),
           line(12, 44, span("dim", "round  dark: the layer runs in the draft")),
           line(left - 24, 44, span("dim", "kept"), right=True),
           line(left, 44, span("kept", "drafted and kept") + "  " + span("refused", "refused")
                + "  " + span("own", "the full model's own"))]
    for n, r in enumerate(shown, 1):
        y = 46 + LINE * n
        out.append(line(30, y, span("dim", str(n)), right=True))
        out += [f'<rect x="{40 + i * CELL}" y="{y - 11}" width="{CELL - 1}" height="13" '
                f'fill="{COLOUR["skip" if s else "run"]}"/>' for i, s in enumerate(r.skip)]
        out.append(line(left - 24, y, span("dim", f"{r.accepted}/{len(r.drafted)}"), right=True))
        parts = [span(kind, spell(ids)) for kind, ids in r.parts().items() if ids]
        out.append(line(left, y, "".join(parts)))
    return "\n".join([*out, "</svg>"])


def main() -> None:
    prompt = sys.argv[1] if len(sys.argv) > 1 else "def fibonacci(n):"
    job = clasp_mini.Job(clasp_mini.parser().parse_args(["--prompt", prompt, *sys.argv[2:]]))
    ids = job.prompt()
    job.load()
    rounds = list(job.run(ids, job.settings, job.a.seed))

    def spell(ids: list[int]) -> str:
        return job.tokenizer.decode(ids).replace("\n", "⏎").replace(" ", "\u00a0")

    options = " ".join(sys.argv[2:])
    print(draw(rounds, spell, f'python clasp_mini.py --verbose --prompt "{prompt}" {options}'))


if __name__ == "__main__":
    main()
