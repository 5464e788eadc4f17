"""What each kind of pass costs, against the bytes that it must read and a copy of memory.

    python bench/passes.py
    python bench/passes.py --model synthetic-8b --draft-length 7 --repeats 20       # on a GPU

Takes the main command's flags: --skip-layers and --draft-length (at most: 11/16 of the layers, 12)
and --probe add passes of their own, medians are over --repeats. Calls are queued one behind another
and waited for once, as many as fill a fiftieth of a second; the kinds of pass take turns, so that a
machine that slows down does so for all. On a GPU the passes are the recorded ones; each length of a
verify, and each of a probe, is recorded by itself.
"""
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)
import clasp_mini  # noqa: E402
import torch  # noqa: E402
from llama import Cache, Llama  # noqa: E402
from speculative import read  # noqa: E402
from command.cli import UsageError, answer  # noqa: E402
from text.costs import chosen, spread  # noqa: E402

CONTEXT = 1000                                         # tokens read before, where as many fit
COPY = {"cpu": 2 ** 28, "cuda": 2 ** 30}               # bytes, far more than any cache holds


def passes(job: clasp_mini.Job) -> dict[str, tuple[int, Callable[[], object]]]:
    """name -> (bytes to read, a call) of each pass: the weights of its layers, the keys and values
    of the text before it, the head."""
    c, K, M, model, t = job.cfg, job.K, job.M, job.model, context(job)
    plain = getattr(model, "model", model)             # what was recorded, if anything was
    lengths, probes = sorted({1, 4, 8, 16, K + 1}), sorted({1, 4, job.settings.r})
    random = torch.Generator().manual_seed(job.a.seed)
    ids = torch.randint(c.V, (t + lengths[-1],), generator=random).tolist()
    one = torch.tensor(ids[t:t + 1], device=model.device)
    item = torch.finfo(model.dtype).bits // 8
    layer = item * (2 * c.D + 2 * (c.H + c.G) * c.hd * c.D + 3 * c.D * c.ffn + 2 * t * c.G * c.hd)
    head = item * c.V * c.D
    out: dict[str, tuple[int, Callable[[], object]]] = {}

    def filled(model: Llama) -> Cache:
        cache = model.cache(len(ids) + probes[-1] * (M + 1))
        read(model, ids[:t], 0, cache)
        return cache

    cache = filled(model)

    def recorded_for(K: int, M: int, r: int) -> tuple[Llama, Callable, Cache]:
        from gpu.replay import recorded
        fast, choose = recorded(plain, K, M, r, not job.a.no_compile)
        return fast, choose, filled(fast)

    def verify(T: int) -> Callable[[], object]:
        fast, slots = model, cache
        if model is not plain and T not in (1, K + 1):   # else padded, or not recorded at all
            fast, _, slots = recorded_for(T - 1, 0, 1)
        return lambda: read(fast, ids[t:t + T], t, slots, last=T)

    def draft(m: int) -> Callable[[], object]:
        skip = spread(c.L, m)
        return lambda: model.forward(one, cache.sequence(t, 1), cache, skip)

    def optimise(r: int) -> Callable[[], object]:
        fast, choose, slots = model, job.choose, cache
        if model is not plain and r != job.settings.r:
            fast, choose, slots = recorded_for(0, M, r)
        _, h = read(fast, ids[t:t + r], t, slots, last=r, states=True)              # (L+1, r, D)
        return lambda: chosen(fast, choose, slots, h, t + r - 1, M)

    for T in lengths:
        out["plain step" if T == 1 else f"verify, {T} rows"] = c.L * layer + head, verify(T)
    for m in sorted({c.L // 4, c.L // 2, 3 * c.L // 4, M} - {0, c.L}):
        out[f"draft step, {m} of {c.L} skipped"] = (c.L - m) * layer + head, draft(m)
    out["head alone"] = head, draft(c.L)
    for r in probes if M else ():
        out[f"layer optimisation, M = {M}, r = {r}"] = c.L * layer, optimise(r)
    a = torch.ones(COPY[job.device.type], device=job.device, dtype=torch.int8)
    b = torch.empty_like(a)
    out["copy of memory"] = 2 * a.nbytes, lambda: b.copy_(a)
    return out


def context(job: clasp_mini.Job) -> int:
    return min(CONTEXT, job.cfg.context)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Of one call, from as many as fill a fiftieth of a second, 1 to 100."""
    def clock(n: int) -> float:
        began = time.perf_counter()
        for _ in range(n):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - began) / n
    return clock(max(1, min(100, int(0.02 / clock(1)))))


@torch.inference_mode()
def measured(job: clasp_mini.Job) -> dict[str, dict]:
    """name -> what a pass took, and what that means beside a plain step and a copy of memory."""
    kinds = passes(job)
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(1 + job.a.repeats):                 # the first is a warm-up
        for name, (_, call) in kinds.items():
            times[name].append(seconds(call, job.device))
    took = {name: statistics.median(of[1:]) for name, of in times.items()}
    rate = {name: size / took[name] for name, (size, _) in kinds.items()}
    return {name: dict(seconds=took[name], bytes=size, bytes_per_second=rate[name],
                       of_copy=rate[name] / rate["copy of memory"],
                       plain_steps=took[name] / took["plain step"])
            for name, (size, _) in kinds.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status as that of clasp_mini.py."""
    def work() -> int:
        p = clasp_mini.parser()
        p.usage, p.description = "python bench/%(prog)s [flags]", __doc__.partition("\n")[0]
        a = p.parse_args(argv)
        if a.prompt is not None or a.prompt_ids or a.chat or a.compare or a.verbose or a.trace:
            raise UsageError("random tokens are read and no text is written: without --prompt, "
                             "--prompt-ids, --chat, --compare, --verbose, --trace")
        a.prompt_ids = [0]                             # so no tokenizer is needed
        job = clasp_mini.Job(a).load()
        found = measured(job)
        if a.json:
            print(json.dumps(dict(settings=job.report(), context=context(job), passes=found)))
            return 0
        print(f"{f'after {context(job)} tokens':<34} {'ms':>9} {'GB to read':>11} {'GB/s':>8} "
              f"{'of copy':>8} {'plain steps':>12}")
        for name, f in found.items():
            print(f"{name:<34} {1e3 * f['seconds']:9.3f} {f['bytes'] / 1e9:11.4f} "
                  f"{f['bytes_per_second'] / 1e9:8.1f} {f['of_copy']:8.0%} "
                  f"{f['plain_steps']:12.2f}")
        return 0
    return answer(work)


if __name__ == "__main__":
    sys.exit(main())
