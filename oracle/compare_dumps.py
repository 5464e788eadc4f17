"""Where does a forward pass part from this program's? Compares two forward dumps in the order in
which they were computed, and names the first place that departs.

    python oracle/compare_dumps.py OURS THEIRS [--tolerance X]

OURS is from dump_forward.py or `check_trace.py --dump-at`, THEIRS from another implementation, of
the same tokens; TRACE.md says what is in them. Exit status: 0 alike, 1 they depart, 2 they cannot
be compared.
"""
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)     # see dump_forward.py

from collections.abc import Iterator, Sequence  # noqa: E402

from llama import SafetensorError, Tensor, safe_open, torch  # noqa: E402
from oracle.dump_forward import TENSORS  # noqa: E402
from command.cli import Parser, UsageError, answer, number  # noqa: E402

# Of the largest number in its part of a layer. Seen between float32 and float64, over 32 layers of
# the demo, 1e-6; between bfloat16 and float64 0.03.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 0.1}


def read(path: str) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as f:
            if missing := TENSORS.keys() - f.keys():
                raise UsageError(f"{path}: no forward dump, it lacks {min(missing)}")
            return {name: f.get_tensor(name) for name in TENSORS}
    except (SafetensorError, OSError) as e:
        raise UsageError(f"{path}: cannot be read as safetensors: {e}") from None


def parts(d: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, str, str]]:
    """(name, (rows, ...), what it means if it departs in the first token, or only later) in the
    order of computation."""
    embedding = "the embedding: its rows, or how bfloat16 is read (the upper half of a float32)"
    yield "the embedding, hidden[0]", d["hidden"][0], embedding, embedding
    norm = "the norm before attention (eps inside the root; float32 statistics), or W of the values"
    for i in range(len(d["keys"])):
        yield f"layer {i}, values[{i}]", d["values"][i], norm, norm
        yield (f"layer {i}, keys[{i}]", d["keys"][i],
               "values agree, so the norm does: the keys' matrix, as nothing turns at position 0",
               "values and the keys at position 0 agree: the rotary embedding, its layout (pairs k "
               "and k + hd/2), theta, LLaMA-3.1's scaling, angles not in float64")
        yield (f"layer {i}, its output hidden[{i + 1}]", d["hidden"][i + 1],
               "keys and values agree, and the first token sees itself: which kv head a query "
               "head reads (h // (H/G)), the output's matrix, or the feed-forward part",
               "keys, values and the first token agree: queries and their rotation, the scale "
               "hd^-0.5, the mask, the softmax, which query head reads which kv head (h // (H/G))")
    head = "the states agree: the final norm, or the head (is it tied to the embedding?)"
    yield "the logits", d["logits"], head, head


def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor],
            tolerance: float | None = None) -> tuple[int, str]:
    """-> exit status and report."""
    for name in TENSORS:
        if ours[name].shape != theirs[name].shape:
            raise UsageError(f"{name}: shapes {list(ours[name].shape)} and "
                             f"{list(theirs[name].shape)}")
    if not torch.equal(ours["prompt_ids"], theirs["prompt_ids"]):
        raise UsageError("prompt_ids: these are dumps of different tokens")
    T = len(ours["prompt_ids"])
    worst = 0.0
    X = tolerance or max(TOLERANCE.get(d["hidden"].dtype, TOLERANCE[torch.bfloat16])
                         for d in (ours, theirs))
    for (name, a, first, later), (_, b, *_) in zip(parts(ours), parts(theirs)):
        scale = a.double().abs().max().item() or 1.0
        off = (a.double() - b.double()).abs().flatten(1) / scale
        off = off.nan_to_num(torch.inf).amax(1)                             # (rows,)
        if off.max() > X:
            row = int((off > X).int().argmax())
            token = T - len(a) + row
            return 1, (f"{name}, token {token} of 0..{T - 1}: largest difference "
                       f"{off[row] * scale:.3g}, {off[row]:.2g} of the largest number there "
                       f"(tolerance {X:g}); all before agrees to {worst:.1e}\n"
                       f"look at: {later if token else first}")
        worst = max(worst, off.max().item())
    return 0, f"alike: largest difference {worst:.1e} of the largest number of its part"


def main(argv: Sequence[str] | None = None) -> int:
    def work() -> int:
        p = Parser(prog="compare_dumps.py", allow_abbrev=False, description="Compare two forward "
                   "dumps (oracle/TRACE.md) in the order of computation.")
        p.add_argument("ours", metavar="OURS")
        p.add_argument("theirs", metavar="THEIRS")
        p.add_argument("--tolerance", metavar="X", help="of the largest number in each part",
                       type=number(float, "a number above 0 and below 1", lambda v: 0 < v < 1))
        a = p.parse_args(argv)
        status, said = compare(read(a.ours), read(a.theirs), a.tolerance)
        print(said)
        return status
    return answer(work)


if __name__ == "__main__":
    sys.exit(main())
