"""Where does a forward pass part from this program's? Writes logits, hidden states, keys and values
of one pass over a prompt, as safetensors; or compares two such dumps in the order in which they
were computed, and names the first place that departs.

    python oracle/dumps.py FILE --prompt "def f(" [--skip 3,7] [flags of clasp_mini.py]
    python oracle/dumps.py FILE --against THEIRS

With --skip the pass leaves those layers out, as a draft does. TRACE.md says what is in a dump. Exit
status: 0 written, or alike; 1 they depart; 2 they cannot be compared.
"""
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)     # see check_trace.py

import json  # noqa: E402
from collections.abc import Iterator, Sequence  # noqa: E402
from dataclasses import asdict  # noqa: E402

from command.cli import UsageError, answered, numbers  # noqa: E402
from command.flags import parsed, parser  # noqa: E402
from llama import Cache, Llama, SafetensorError, Tensor, safe_open, torch  # noqa: E402
from oracle.trace import PROGRAM, VERSION, about  # noqa: E402
from speculative import CHUNK  # noqa: E402
from text.safetensors_file import save  # noqa: E402

TENSORS = dict(
    prompt_ids="(T,) the tokens",
    logits="(T, V) a row scores what follows its token; before the temperature",
    hidden="(L+1, T, D) 0 the embedding, i what layer i receives, L before the final norm",
    keys="(L, T, G, hd) as cached, after the rotary embedding; zeros where a layer was skipped",
    values="(L, T, G, hd) as cached; zeros where a layer was skipped")
# Of the largest number in its part of a layer. Seen between float32 and float64, over 32 layers of
# the demo, 1e-6; between bfloat16 and float64 0.03.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 0.1}


def passes(model: Llama, ids: Sequence[int], cache: Cache, skip: Sequence[bool] = ()
           ) -> Iterator[list[Tensor]]:
    """The states h[0..L] of `ids`, from position 0 on, (T, D) each; T is at most CHUNK."""
    t = 0
    for part in torch.tensor(ids, device=model.device).split(CHUNK):
        yield model.forward(part, cache.sequence(t, len(part)), cache, skip)
        t += len(part)


@torch.inference_mode()
def dump(folder: str | Path, model: Llama, prompt: Sequence[int], skip: Sequence[int],
         path: str | Path) -> str:
    """One pass of the model in `folder` over `prompt`, without the layers `skip`; -> what has been
    written, in words."""
    cache = model.cache(len(prompt))
    left_out = [i in skip for i in range(model.cfg.L)]
    states = zip(*passes(model, prompt, cache, left_out))
    hidden = torch.stack([torch.cat(h) for h in states])                    # (L+1, T, D)
    tensors = dict(prompt_ids=torch.tensor(prompt), hidden=hidden, logits=model.head(hidden[-1]),
                   keys=cache.k.transpose(1, 2), values=cache.v.transpose(1, 2))
    meta = dict(version=VERSION, program=PROGRAM, tensors=TENSORS, skip=sorted(skip),
                config=asdict(model.cfg), dtype=str(model.dtype).removeprefix("torch."),
                **about(folder))
    # One entry: several would come in any order, and the same dump not be the same bytes.
    save({name: x.cpu().contiguous() for name, x in tensors.items()}, path,
         {"clasp-forward": json.dumps(meta)})
    shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items())
    return f"{path}: {shapes}, {Path(path).stat().st_size / 1e6:.1f} MB"


def read(path: str) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as f:
            if missing := TENSORS.keys() - f.keys():
                raise UsageError(f"{path}: no forward dump, it lacks {min(missing)}")
            return {name: f.get_tensor(name) for name in TENSORS}
    except (SafetensorError, OSError) as e:
        raise UsageError(f"{path}: cannot be read as safetensors: {e}") from None


def parts(d: dict[str, Tensor]) -> Iterator[tuple[str, str, Tensor]]:
    """(name in words, kind, (T, ...)) in the order of computation."""
    yield "the embedding, hidden[0]", "embedding", d["hidden"][0]
    for i in range(len(d["keys"])):
        yield f"layer {i}, values[{i}]", "values", d["values"][i]
        yield f"layer {i}, keys[{i}]", "keys", d["keys"][i]
        yield f"layer {i}, its output hidden[{i + 1}]", "hidden", d["hidden"][i + 1]
    yield "the logits", "logits", d["logits"]


def look_at(kind: str, off: Tensor, ours: Tensor, theirs: Tensor, limit: float) -> str:
    """What can be wrong where rows `off` of a part depart: what agrees, before it or in other rows,
    excludes the rest. Numbers count as equal within `limit`."""
    if kind == "embedding":
        return "the embedding: its rows, or how bfloat16 is read (the upper half of a float32)"
    if kind == "logits":
        return "the states agree: the final norm, or the head (is it tied to the embedding?)"
    if kind == "hidden":
        if off[:-1].all() and not off[-1]:
            return "the last row agrees, which may read all slots: the causal mask"
        if off[0]:
            return ("keys and values agree, and the first token sees itself: which kv head a query "
                    "head reads (h // (H/G)), the output's matrix, or the feed-forward part")
        return ("keys, values and the first token agree: queries and their rotation, the scale "
                "hd^-0.5, the mask, the softmax, which query head reads which kv head (h // (H/G))")
    a = ours[off].flatten(1).sort().values
    b = theirs[off].flatten(1).sort().values
    if ((a - b).abs() <= limit).all():
        return "the same numbers in another order: how heads and their elements are laid out"
    if not off[0]:
        return ("the first token agrees, so norm and matrix do: entries that were not written, or "
                "for another token; of keys the rotary embedding, its layout (pairs k and k + "
                "hd/2), theta, LLaMA-3.1's scaling, positions, angles not in float64")
    if kind == "values":
        return "the norm before attention (eps inside the root; float32 statistics), or its matrix"
    return "values agree, so the norm does: the keys' matrix, as nothing turns at position 0"


def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[int, str]:
    """-> exit status and report."""
    for name in TENSORS:
        if ours[name].shape != theirs[name].shape:
            raise UsageError(f"{name}: shapes {list(ours[name].shape)} and "
                             f"{list(theirs[name].shape)}")
    if not torch.equal(ours["prompt_ids"], theirs["prompt_ids"]):
        raise UsageError("prompt_ids: these are dumps of different tokens")
    worst = 0.0
    X = max(TOLERANCE.get(d["hidden"].dtype, TOLERANCE[torch.bfloat16]) for d in (ours, theirs))
    for (name, kind, a), (*_, b) in zip(parts(ours), parts(theirs)):
        a = a.double()
        b = b.double()
        scale = a.abs().max().item() or 1.0
        off = ((a - b).abs().flatten(1) / scale).nan_to_num(torch.inf).amax(1)      # (T,)
        if off.max() > X:
            row = int((off > X).int().argmax())
            return 1, (f"{name}, token {row} of 0..{len(off) - 1}: largest difference "
                       f"{off[row] * scale:.3g}, {off[row]:.2g} of the largest number there "
                       f"(tolerance {X:g}); all before agrees to {worst:.1e}\n"
                       f"look at: {look_at(kind, off > X, a, b, X * scale)}")
        worst = max(worst, off.max().item())
    return 0, f"alike: largest difference {worst:.1e} of the largest number of its part"


@answered
def main(argv: Sequence[str] | None) -> int:
    p = parser()
    p.usage = "python oracle/dumps.py FILE --prompt TEXT | --against THEIRS [flags]"
    p.description = "Write one forward pass as safetensors, or compare two (oracle/TRACE.md)."
    p.add_argument("file", metavar="FILE", help="the safetensors file, to write or to compare")
    p.add_argument("--against", metavar="THEIRS", help="another dump, of the same tokens")
    p.add_argument("--skip", type=numbers, default=[], metavar="3,7",
                   help="layers that the pass leaves out")
    a = parsed(argv, p)
    if a.against:
        status, said = compare(read(a.file), read(a.against))
        print(said)
        return status
    a.strategy = "ar"                                  # no costs are measured for one pass
    a.eager = True                                     # nor is it worth recording
    a.max_new_tokens = 1
    from command.job import Job                        # all else needs no tokenizer
    job = Job(a)
    ids = job.prompt()
    if max(a.skip, default=0) >= job.cfg.L:
        raise UsageError(f"--skip {max(a.skip)}: the model has layers 0 to {job.cfg.L - 1}")
    job.load()
    print(dump(job.folder, job.model, ids, a.skip, a.file))
    return 0


if __name__ == "__main__":
    sys.exit(main())
