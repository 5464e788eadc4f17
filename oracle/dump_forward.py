"""One forward pass over a prompt, dumped: logits, hidden states, keys and values, as safetensors.

    python oracle/dump_forward.py FILE --prompt "def f(" [--skip 3,7] [flags of clasp_mini.py]

With --skip the pass leaves those layers out, as a draft does. TRACE.md says what is in the file.
"""
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)     # see check_trace.py

import json  # noqa: E402
from collections.abc import Iterator, Sequence  # noqa: E402
from dataclasses import asdict  # noqa: E402

from command.cli import UsageError, answer, numbers  # noqa: E402
from command.flags import parsed, parser  # noqa: E402
from llama import Cache, Llama, Tensor, torch  # noqa: E402
from oracle.compare_dumps import TENSORS  # noqa: E402
from oracle.trace import PROGRAM, VERSION, about  # noqa: E402
from speculative import CHUNK  # noqa: E402
from text.safetensors_file import save  # noqa: E402


def passes(model: Llama, ids: Sequence[int], cache: Cache, skip: Sequence[bool] = ()
           ) -> Iterator[list[Tensor]]:
    """The states h[0..L] of `ids`, from position 0 on, (T, D) each; T is at most CHUNK."""
    t = 0
    for part in torch.tensor(ids, device=model.device).split(CHUNK):
        yield model.forward(part, cache.sequence(t, len(part)), cache, skip)
        t += len(part)


@torch.inference_mode()
def dump_forward(model: Llama, prompt: Sequence[int], skip: Sequence[int], path: str | Path,
                 about: dict) -> str:
    """One pass over `prompt` without the layers `skip`; -> what has been written, in words."""
    cache = model.cache(len(prompt))
    left_out = [i in skip for i in range(model.cfg.L)]
    parts = passes(model, prompt, cache, left_out)
    hidden = torch.stack([torch.cat(each) for each in zip(*parts)])         # (L+1, T, D)
    tensors = dict(prompt_ids=torch.tensor(prompt), hidden=hidden, logits=model.head(hidden[-1]),
                   keys=cache.k.transpose(1, 2), values=cache.v.transpose(1, 2))
    meta = dict(version=VERSION, program=PROGRAM, tensors=TENSORS, skip=sorted(skip),
                config=asdict(model.cfg), dtype=str(model.dtype).removeprefix("torch."), **about)
    # One entry: several would come in any order, and the same dump not be the same bytes.
    save({name: x.cpu().contiguous() for name, x in tensors.items()}, path,
         {"clasp-forward": json.dumps(meta)})
    shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items())
    return f"{path}: {shapes}, {Path(path).stat().st_size / 1e6:.1f} MB"


def main(argv: Sequence[str] | None = None) -> int:
    def work() -> int:
        from command.job import Job                    # the others need no tokenizer
        p = parser()
        p.usage = "python oracle/dump_forward.py FILE --prompt TEXT [--skip 3,7] [flags]"
        p.description = "Write one forward pass over a prompt as safetensors (oracle/TRACE.md)."
        p.add_argument("file", metavar="FILE", help="the safetensors file to write")
        p.add_argument("--skip", type=numbers, default=[], metavar="3,7",
                       help="layers that the pass leaves out")
        a = parsed(argv, p)
        a.strategy = "ar"                              # no costs are measured for one pass
        a.eager = True                                 # nor is it worth recording
        a.max_new_tokens = 1
        job = Job(a)
        ids = job.prompt()
        if max(a.skip, default=0) >= job.cfg.L:
            raise UsageError(f"--skip {max(a.skip)}: the model has layers 0 to {job.cfg.L - 1}")
        job.load()
        print(dump_forward(job.model, ids, a.skip, a.file, about(job.folder)))
        return 0
    return answer(work)


if __name__ == "__main__":
    sys.exit(main())
