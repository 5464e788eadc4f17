"""Two greedy texts part: is it a bug, or rounding? The model is asked, in a wider type, how far the
tokens where they part, and all after them, lie below the highest logit.

    python oracle/greedy.py A B [--model DIR] [--dtype TYPE] [--device DEVICE]

A and B are files: a trace, what `clasp_mini.py --json` prints, or the ids of prompt and text as
numbers. They may come from any two programs. Exit status: 0 equal, or rounding explains where they
part; 1 it does not; 2 they cannot be compared; 3 equal as far as both go, but one goes on.
"""
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)     # see check_trace.py

import argparse  # noqa: E402
import json  # noqa: E402
from collections.abc import Sequence  # noqa: E402

from command.cli import Parser, UsageError, answered, numbers  # noqa: E402
from command.flags import DTYPES  # noqa: E402
from llama import Llama, torch  # noqa: E402
from oracle.check_trace import TOLERANCE, add_model  # noqa: E402
from oracle.dumps import passes  # noqa: E402

WIDER = dict(bfloat16="float32", float32="float64", float64="float64")


def text_of(path: str) -> tuple[list[int], dict]:
    """-> the ids of prompt and text, and the settings that are known."""
    try:
        words = Path(path).read_text(encoding="utf-8")
        if not words.lstrip().startswith("{"):
            return numbers(words.strip().strip("[]")), {}
        lines = [json.loads(line) for line in words.splitlines()]
        head = lines[0]
        new = head["ids"] if "ids" in head else [
            token for line in lines if line["event"] == "emit" for token in line["tokens"]]
        settings = dict(head["settings"])
        settings.setdefault("dtype", head.get("dtype"))
        return [*head["prompt_ids"], *new], settings
    except OSError as e:
        raise UsageError(f"{path}: {e.strerror}") from None
    except (LookupError, TypeError, ValueError, AttributeError, argparse.ArgumentTypeError):
        raise UsageError(f"{path}: neither a trace, nor the output of --json, nor ids") from None


def gaps(model: Llama, ids: Sequence[int], first: int) -> list[float]:
    """How far each token of `ids` from `first` on lies below the highest logit, by one pass."""
    out = []
    for h in passes(model, ids[:-1], model.cache(len(ids))):
        logits = model.head(h[-1])                                          # (T, V)
        t = len(out) + 1
        after = torch.tensor(ids[t:t + len(logits)], device=model.device)
        out += (logits.amax(-1) - logits.gather(1, after[:, None])[:, 0]).tolist()
    return out[first - 1:]


@torch.inference_mode()
def compare(paths: Sequence[str], folder: str, dtype: str | None, device: str) -> tuple[int, str]:
    """-> exit status and report."""
    texts, settings = zip(*map(text_of, paths))
    if any(s.get("temperature") for s in settings):
        raise UsageError("a text was sampled; two greedy ones can be compared")
    n = min(map(len, texts))
    t = next((t for t in range(n) if texts[0][t] != texts[1][t]), n)
    if t == n:
        longer = paths[len(texts[1]) > n]
        if len(texts[0]) == len(texts[1]):
            return 0, f"equal: {n} tokens"
        return 3, f"equal as far as both go, {n} tokens; {longer} goes on"
    if t == 0:
        raise UsageError("the first tokens differ: texts of two prompts?")
    known = [dtype] if dtype else [s["dtype"] for s in settings if s.get("dtype") in TOLERANCE]
    made = max(known or ["bfloat16"], key=TOLERANCE.__getitem__)
    limit = 4 * TOLERANCE[made]                        # of a logit: TRACE.md, "Tolerance"
    model = Llama.load(folder, device, DTYPES[WIDER[made]])
    if max(max(text) for text in texts) >= model.cfg.V or n > model.cfg.context:
        raise UsageError(f"{folder}: not the model of these texts, by its vocabulary or context")
    said = [f"the texts part at token {t}, after {t} equal ones"]
    good = True
    for path, ids in zip(paths, texts):
        below = gaps(model, ids, t)
        wrong = [i for i, gap in enumerate(below) if not gap <= limit]
        good = good and not wrong
        place = "the highest logit" if below[0] == 0 else f"{below[0]:.3g} below the highest logit"
        rest = f"all {len(below) - 1} after it are at most {max(below[1:], default=0):.3g} below"
        if wrong and wrong[0] > 0:
            rest = f"but token {t + wrong[0]} is {below[wrong[0]]:.3g} below"
        said.append(f"  {path}: token {ids[t]}, {place}; {rest}")
    said.append(f"rounding in {made} explains up to {limit:.3g}: "
                + ("a tie, not a bug" if good else "not a tie"))
    return int(not good), "\n".join(said)


@answered
def main(argv: Sequence[str] | None) -> int:
    p = Parser(prog="greedy.py", allow_abbrev=False, description="Say whether rounding explains "
               "where two greedy texts part.")
    p.add_argument("texts", metavar="TEXT", nargs=2, help="trace, --json output, or ids")
    add_model(p)
    p.add_argument("--dtype", choices=list(TOLERANCE), help="in which the texts were made (as the "
                   "files say, else bfloat16)")
    a = p.parse_args(argv)
    status, said = compare(a.texts, a.model, a.dtype, a.device)
    print(said)
    return status


if __name__ == "__main__":
    sys.exit(main())
