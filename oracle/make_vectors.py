"""Regenerates oracle/vectors/: short runs and passes of the demo model in float64.

    python oracle/make_vectors.py [FOLDER]

Each trace shows a situation that an implementation can get wrong; TRACE.md lists them. Where one
depends on the weights (a stop token inside a draft, say) it is looked for, always in the same
order, so that new weights need no new settings.
"""
import argparse
import io
import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)     # see check_trace.py

import clasp_mini  # noqa: E402
import torch  # noqa: E402

from dp_layer_skip import choose_skip  # noqa: E402
from llama import Llama, Tokenizer  # noqa: E402
from oracle.trace import dump_forward, record  # noqa: E402
from speculative import Chance, Round, Settings, generate  # noqa: E402

VECTORS = Path(__file__).resolve().parent / "vectors"
PROMPT = "def mean(values):\n"
BASE = Settings(N=20, K=6, M=16, exit_threshold=0.3, interval=32)
HOT = replace(BASE, temperature=1.0)
CASES = {          # name: settings
    "greedy": BASE,
    "temperature": HOT,
    "top-p": replace(HOT, temperature=0.8, top_k=50, top_p=0.9),
    "full-draft": replace(HOT, M=0),                   # p and q agree: all accepted, all bonuses
    "plain": replace(HOT, K=0),
    "short-interval": replace(HOT, N=16, M=8, interval=2),
}


def varied(rounds: list[Round]) -> bool:
    """A refusal, a bonus, and a draft that a doubtful token ended."""
    k = [(r.accepted, len(r.drafted)) for r in rounds[1:] if r.drafted]
    return any(a < n for a, n in k) and any(a == n for a, n in k) and any(n < BASE.K for _, n in k)


def stop_inside(rounds: list[Round]) -> int | None:
    """A token that was drafted and accepted after another, not among the first eight, and had not
    occurred before: as a stop token it ends the text inside a draft."""
    seen = []
    for r in rounds:
        for n, token in enumerate(r.emitted):
            if 0 < n < r.accepted and len(seen) > 7 and token not in seen:
                return token
            seen.append(token)
    return None


def main(folder: Path = VECTORS) -> None:
    torch.set_num_threads(1)
    model, tok = Llama.load(clasp_mini.DEMO, dtype=torch.float64), Tokenizer(clasp_mini.DEMO)
    ids, about = [tok.bos, *tok.encode(PROMPT)], clasp_mini.about(clasp_mini.DEMO)
    folder.mkdir(parents=True, exist_ok=True)

    def first(s: Settings, wanted: Callable[[list[Round]], object]) -> tuple[int, object]:
        """The first seed whose run has what is wanted, and that."""
        for seed in itertools.count():
            found = wanted(list(generate(model, ids, s, Chance(seed), choose_skip)))
            if found:
                return seed, found
            assert seed < 200, f"200 seeds without {wanted.__name__}"

    def trace(name: str, s: Settings, seed: int) -> None:
        out = io.StringIO()
        list(record(model, ids, s, seed, choose_skip, out, about))
        lines = [x for x in out.getvalue().splitlines(True) if '"event":"times"' not in x]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")

    for name, s in CASES.items():
        trace(name, s, first(s, varied)[0] if name in ("temperature", "top-p") else 0)
    seed, stop = first(HOT, stop_inside)
    trace("stop-in-draft", replace(HOT, stop_ids=(stop,)), seed)
    for name, length, skip in (("forward", 3, []), ("forward-skip", 2, [3, 7, *range(12, 20)])):
        dump_forward(model, ids[:length], skip, folder / f"{name}.safetensors", about)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description="Write the vectors of the demo model.")
    p.add_argument("folder", nargs="?", type=Path, default=VECTORS, metavar="FOLDER")
    main(p.parse_args().folder)
