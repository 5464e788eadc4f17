"""Draw a real run: one line per round, a cell per layer, the tokens kept, refused and the full
model's own.

    python demo/picture.py "def fibonacci(n):" > demo/run.svg
"""
import sys
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import clasp_mini  # noqa: E402
from speculative import Round  # noqa: E402

CELL, LINE, CHAR = 9, 20, 7.8
COLOUR = dict(kept="#1a7f37", refused="#cf222e", own="#0550ae", dim="#656d76", run="#424a53", skip="#e6e9ec")


def draw(rounds: list[Round], spell, title: str, most: int = 24) -> str:
    """The first rounds after the prefill as SVG."""
    L, shown = len(rounds[0].skip), rounds[1:most + 1]
    left = 40 + L * CELL + 70
    width, height = left + 400, 62 + LINE * len(shown) + 12
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
           'font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, monospace" font-size="13">',
           f'<rect width="{width}" height="{height}" fill="white"/>',
           f'<text x="12" y="22" fill="{COLOUR["dim"]}" xml:space="preserve">{escape(title)}</text>',
           f'<text x="12" y="44" fill="{COLOUR["dim"]}" xml:space="preserve">round  dark: layer runs in the draft</text>',
           f'<text x="{left - 60}" y="44" fill="{COLOUR["dim"]}">kept   <tspan fill="{COLOUR["kept"]}">drafted and kept</tspan>  '
           f'<tspan fill="{COLOUR["refused"]}" text-decoration="line-through">refused</tspan>  '
           f'<tspan fill="{COLOUR["own"]}" font-weight="bold">full model\'s own</tspan></text>']
    for n, r in enumerate(shown, 1):
        y = 46 + LINE * n
        out.append(f'<text x="30" y="{y}" text-anchor="end" fill="{COLOUR["dim"]}">{n}</text>')
        out += [f'<rect x="{40 + i * CELL}" y="{y - 11}" width="{CELL - 1}" height="13" '
                f'fill="{COLOUR["skip" if s else "run"]}"/>' for i, s in enumerate(r.skip)]
        out.append(f'<text x="{left - 24}" y="{y}" text-anchor="end" fill="{COLOUR["dim"]}">{r.accepted}/{len(r.drafted)}</text>')
        parts = [("kept", r.emitted[:r.accepted]), ("refused", r.drafted[r.accepted:]), ("own", r.emitted[r.accepted:])]
        style = dict(refused=' text-decoration="line-through"', own=' font-weight="bold"', kept="")
        spans = "".join(f'<tspan fill="{COLOUR[kind]}"{style[kind]}>{escape(spell(ids))}</tspan>' for kind, ids in parts if ids)
        out.append(f'<text x="{left}" y="{y}" xml:space="preserve">{spans}</text>')
    return "\n".join([*out, "</svg>"])


def main() -> None:
    prompt = sys.argv[1] if len(sys.argv) > 1 else "def fibonacci(n):"
    job = clasp_mini.Job(clasp_mini.parser().parse_args(["--prompt", prompt, *sys.argv[2:]]))
    rounds = job.run(job.prompt(), job.settings, job.a.seed)

    def spell(ids: list[int]) -> str:
        return job.tokenizer.decode(ids).replace("\n", "⏎")
    print(draw(rounds, spell, f'python clasp_mini.py --verbose --prompt "{prompt}" {" ".join(sys.argv[2:])}'))


if __name__ == "__main__":
    main()
