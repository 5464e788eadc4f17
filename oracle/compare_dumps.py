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

import json  # noqa: E402
from collections.abc import Iterable, Iterator, Sequence  # noqa: E402
from dataclasses import asdict  # noqa: E402

from command.cli import Parser, UsageError, answer, number  # noqa: E402
from llama import Llama, SafetensorError, Tensor, safe_open, torch  # noqa: E402
from oracle.trace import PROGRAM, VERSION  # noqa: E402
from text.safetensors_file import save  # noqa: E402

TENSORS = dict(
    prompt_ids="(T,) the tokens",
    logits="(n, V) of the last n tokens: a row scores what follows its token; before temperature",
    hidden="(L+1, n, D) 0 the embedding, i what layer i receives, L before the final norm",
    keys="(L, T, G, hd) as cached, after the rotary embedding; zeros where a layer was skipped",
    values="(L, T, G, hd) as cached; zeros where a layer was skipped")


def save_dump(path: str | Path, model: Llama, about: dict, skip: Iterable[int],
              **tensors: torch.Tensor) -> str:
    """Write the tensors of `TENSORS`; -> what has been written, in words."""
    assert tensors.keys() == TENSORS.keys()
    meta = dict(version=VERSION, program=PROGRAM, tensors=TENSORS, skip=sorted(skip),
                config=asdict(model.cfg), dtype=str(model.dtype).removeprefix("torch."), **about)
    tensors = {name: t.cpu().contiguous() for name, t in tensors.items()}
    # One entry: several would come in any order, and the same dump not be the same bytes.
    save(tensors, path, {"clasp-forward": json.dumps(meta)})
    shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())
    return f"{path}: {shapes}, {Path(path).stat().st_size / 1e6:.1f} MB"

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


def parts(d: dict[str, Tensor]) -> Iterator[tuple[str, str, int, Tensor]]:
    """(name in words, kind, layer, (rows, ...)) in the order of computation."""
    yield "the embedding, hidden[0]", "embedding", 0, d["hidden"][0]
    for i in range(len(d["keys"])):
        yield f"layer {i}, values[{i}]", "values", i, d["values"][i]
        yield f"layer {i}, keys[{i}]", "keys", i, d["keys"][i]
        yield f"layer {i}, its output hidden[{i + 1}]", "hidden", i, d["hidden"][i + 1]
    yield "the logits", "logits", 0, d["logits"]


def look_at(kind: str, i: int, off: Tensor, ours: dict[str, Tensor], theirs: dict[str, Tensor],
            limit: float) -> str:
    """What can be wrong where rows `off` of a part depart: what agrees, before it or in other rows,
    excludes the rest. Numbers count as equal within `limit`."""
    first = int(off.int().argmax())                    # row
    if kind == "embedding":
        return "the embedding: its rows, or how bfloat16 is read (the upper half of a float32)"
    if kind == "logits":
        return "the states agree: the final norm, or the head (is it tied to the embedding?)"
    if kind == "hidden":
        if off[:-1].all() and not off[-1]:
            return "the last row agrees, which may read all slots: the causal mask"
        if len(off) < len(ours["prompt_ids"]):
            return ("keys and values agree: which slots the pass reads, the position of its "
                    "queries; else their scale, heads (h // (H/G)) or the feed-forward part")
        if first == 0:
            return ("keys and values agree, and the first token sees itself: which kv head a query "
                    "head reads (h // (H/G)), the output's matrix, or the feed-forward part")
        return ("keys, values and the first token agree: queries and their rotation, the scale "
                "hd^-0.5, the mask, the softmax, which query head reads which kv head (h // (H/G))")
    a = ours[kind][i].double()                         # (T, G, hd)
    b = theirs[kind][i].double()

    def equal(x: Tensor, y: Tensor) -> bool:
        return bool(((x - y).abs() <= limit).all())

    def lengths(x: Tensor) -> Tensor:                  # of the pairs that turn together
        return x.unflatten(-1, (2, -1)).square().sum(-2)

    if equal(a[off].flatten(1).sort().values, b[off].flatten(1).sort().values):
        return "the same numbers in another order: how heads and their elements are laid out"
    if kind == "keys" and off[1:].all() and not off[0]:
        return ("values and the keys at position 0 agree: the rotary embedding, its layout (pairs "
                "k and k + hd/2), theta, LLaMA-3.1's scaling, angles not in float64")
    if off.all():
        return ("the norm before attention (eps inside the root; float32 statistics), or W of the "
                "values" if kind == "values" else
                "values agree, so the norm does: the keys' matrix, as nothing turns at position 0")
    if kind == "keys" and equal(lengths(a[first]), lengths(b[first])):
        return "keys of other tokens agree, and it is only turned: the position it was written at"
    if not b[first].any():
        return "the cache: other tokens agree, and this entry was never written"
    for s in range(len(a)):
        if equal(b[first], a[s]):
            return f"the cache: here is the entry of token {s}; slots, or what was kept"
    for layer in range(len(ours[kind])):
        if equal(b[first], ours[kind][layer, first].double()):
            return f"the cache: here is the entry of layer {layer}; how layers find theirs"
    return ("the cache: other tokens agree, so norm and matrix do; this entry was written by "
            "another pass or for another token, and not overwritten")


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
    for (name, kind, i, a), (*_, b) in zip(parts(ours), parts(theirs)):
        scale = a.double().abs().max().item() or 1.0
        off = (a.double() - b.double()).abs().flatten(1) / scale
        off = off.nan_to_num(torch.inf).amax(1)                             # (rows,)
        if off.max() > X:
            row = int((off > X).int().argmax())
            return 1, (f"{name}, token {T - len(a) + row} of 0..{T - 1}: largest difference "
                       f"{off[row] * scale:.3g}, {off[row]:.2g} of the largest number there "
                       f"(tolerance {X:g}); all before agrees to {worst:.1e}\n"
                       f"look at: {look_at(kind, i, off > X, ours, theirs, X * scale)}")
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
