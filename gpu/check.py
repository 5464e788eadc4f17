"""Everything that a GPU can tell about this project, by one command, in one report.

    python gpu/check.py REPORT                  # random weights of the 8B's shapes; about 8 minutes
    python gpu/check.py REPORT --model DIR      # real ones
    python gpu/check.py REPORT --tiny           # a dry run of all steps, on a CPU

No weights and no network are needed: random ones are made on the GPU. REPORT.json and REPORT.md are
written whenever a step ends. A step that fails, or for which no time is left, costs only itself;
the first are those that would be missed most.
"""
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)
from command.cli import Parser, UsageError, answered, number  # noqa: E402
from command.report import figures, ideal_speedup, ids_of  # noqa: E402
from dp_layer_skip import choose_skip  # noqa: E402
from gpu.replay import Replay, first_line, fused, unfused, unusable, wake  # noqa: E402
from gpu.trial import EIGHT_B, TINY, random_llama, replayed, replaying, twin  # noqa: E402
from llama import Llama, Tensor, torch  # noqa: E402
from policy import costs  # noqa: E402
from policy.adaptive import Adaptive, budgets  # noqa: E402
from policy.probe import choose_by  # noqa: E402
from speculative import Chance, Settings, generate, read  # noqa: E402
from tests.every_outcome import distance  # noqa: E402
from tests.helpers import tiny_llama  # noqa: E402

K = 12                       # tokens drafted at most, as the command has it


def relative(a: Tensor, b: Tensor) -> float:
    """The largest difference, in parts of the largest of a."""
    return ((a - b).abs().max() / a.abs().max()).item()


class Check:
    """The steps, and what they share."""

    def __init__(self, path: Path, seconds: float, tiny: bool, folder: Path | None) -> None:
        self.path = path
        self.end = time.perf_counter() + seconds
        self.tiny = tiny
        self.device = torch.device("cpu" if tiny else "cuda:0")
        dtype = torch.float32 if tiny else torch.bfloat16
        if folder:
            self.model = Llama.load(folder, self.device, dtype)
        else:
            self.model = random_llama(TINY if tiny else EIGHT_B, self.device, dtype)
        self.t = 60 if tiny else 1000                  # the position of what is measured
        self.N = 9 if tiny else 192                    # tokens of a text
        self.least = 0.01 if tiny else 0.3             # seconds for which a pass is repeated
        self.S = 0 if tiny else 1400                   # slots that all recordings have at least
        self.fuse = unfused if tiny else fused
        self.wait = (lambda: None) if tiny else torch.cuda.synchronize
        self.fast: Any = None                          # the last recording
        self.report: dict[str, dict] = {}

    def step(self, name: str, need: float, f: Callable[..., dict], *args: Any) -> None:
        """Report what f returns, run on a GPU that is awake, if `need` seconds are left."""
        began = time.perf_counter()
        if self.end - began < need:
            got = dict(skipped=f"{self.end - began:.0f} s left, about {need} wanted")
        else:
            try:
                wake(self.device)
                with torch.inference_mode():
                    got = f(*args)
            except Exception as e:                     # of whatever kind: the next may go well
                got = dict(failed=first_line(e))
        self.report[name] = got
        got["seconds"] = round(time.perf_counter() - began, 1)
        print(f"{name}: {json.dumps(got)[:200]}", flush=True)
        self.path.with_suffix(".json").write_text(json.dumps(self.report, indent=1))
        self.path.with_suffix(".md").write_text(markdown(self.report))

    def timed(self, call: Callable[[], Any]) -> float:
        """Seconds of a call in a queue of four: a median."""
        took: list[float] = []
        end = time.perf_counter() + self.least
        while time.perf_counter() < end or len(took) < 3:
            self.wait()
            began = time.perf_counter()
            for _ in range(4):
                call()
            self.wait()
            took.append((time.perf_counter() - began) / 4)
        return statistics.median(took)

    def ids(self, n: int) -> list[int]:
        return [i * 97 % self.model.cfg.V for i in range(n)]

    # -------------------------------------------------------------------------------- the steps

    def machine(self) -> dict:
        out = dict(torch=torch.__version__, cuda=torch.version.cuda, dtype=str(self.model.dtype))
        if self.device.type == "cuda":
            query = "--query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem,power.limit"
            out["gpu"] = subprocess.check_output(["nvidia-smi", query, "--format=csv,noheader"],
                                                 text=True).strip()
        return out

    def bandwidth(self) -> dict:
        a = torch.ones(2 ** (16 if self.tiny else 28), device=self.device)
        b = torch.empty_like(a)
        self.rate = 2 * a.nbytes / self.timed(lambda: b.copy_(a))
        reads = a.nbytes / self.timed(lambda: a.amax())
        return dict(copy_GB_per_s=self.rate / 1e9, read_GB_per_s=reads / 1e9)

    def agreement(self, fast: Replay) -> dict:
        """Recorded passes against eager ones at several positions: a verify and a draft step (the
        largest difference of logits), a choice of layers (of the last cosines)."""
        out = {}
        skip = costs.spread(self.model.cfg.L, fast.M)
        for t in (20, self.t // 2, self.t):
            ids = self.ids(t + K + 1)
            got = []
            for model, choose in ((self.model, choose_skip), (fast, fast.choose)):
                cache = model.cache(self.t + (fast.M + 2) * fast.r + K + 2)
                read(model, ids[:t], 0, cache)
                h = read(model, ids[t:], t, cache)
                verify = model.head(h[-1]).clone()
                probe = torch.stack([x[-1] for x in h])
                choice, _ = choose_by(fast.r, choose, model, cache, ids, probe, fast.M)
                one = torch.tensor(ids[:1], device=self.device)
                h = model.forward(one, cache.sequence(t + K + 1, 1), cache, skip)
                cosines = torch.tensor(choice.D[-1])
                got.append((verify, model.head(h[-1]).clone(), cosines, choice.skip()))
            verify, draft, cosines, same = zip(*got)
            out[f"after {t}"] = dict(verify=relative(*verify), draft=relative(*draft),
                                     cosines=relative(*cosines), same_set=same[0] == same[1])
        return out

    def lossless(self) -> dict:
        """Every branch of chance of a small model by graphs, against the full model's products."""
        model = tiny_llama(device=self.device)
        s = Settings(temperature=0.8, top_p=0.9, N=4, K=2, M=1, interval=1)
        return dict(largest_error=distance(model, s, replaying(model, s.K, s.M)))

    def passes(self, K: int, M: int, r: int, fuse: Callable) -> dict:
        """What each kind of pass takes at position t, and the part of a copy's bandwidth that it
        reaches, by the weights and slots that it must read."""
        c = self.model.cfg
        self.fast = fast = replayed(self.model, K, M, r, fuse)
        cache = fast.cache(max(self.S, self.t + (M + 2) * r + K + 2))
        text = self.ids(self.t)
        h = torch.stack([x[-1] for x in read(fast, text, 0, cache)])
        layer = costs.layer_weights(c) + 2 * cache.S * c.G * c.hd           # numbers that it reads
        head = c.V * c.D
        ids = torch.tensor(self.ids(K + 1), device=self.device)

        def rows(T: int, j: int = 0) -> Tensor:
            skip = costs.spread(c.L, j)
            return fast.head(fast.forward(ids[:T], cache.sequence(self.t, T), cache, skip)[-1])

        kinds = {"plain step": (c.L * layer + head, partial(rows, 1))}
        for j in sorted({c.L // 3, c.L // 2, M} if M > 0 else ()):
            kinds[f"draft, {j} left out"] = ((c.L - j) * layer + head, partial(rows, 1, j))
        kinds[f"verify, {K + 1} rows"] = (c.L * layer + head, partial(rows, K + 1))
        if M > 0:                                      # by several tokens: they are read once more
            kinds[f"choice, M = {M}, r = {r}"] = (c.L * layer * (1 + (r > 1)), partial(
                choose_by, r, fast.choose, fast, cache, text, h, M))
        out = {}
        for name, (numbers, call) in kinds.items():
            seconds = self.timed(call)
            rate = numbers * self.model.dtype.itemsize / seconds
            out[name] = dict(ms=1e3 * seconds, GB_per_s=rate / 1e9, of_copy=rate / self.rate)
        for row in out.values():
            row["plain_steps"] = row["ms"] / out["plain step"]["ms"]
        return out

    def kernels(self, fast: Replay) -> dict:
        """What a plain step and a verify launch, the longest first."""
        from torch.profiler import ProfilerActivity, profile
        kind = ProfilerActivity.CUDA if self.device.type == "cuda" else ProfilerActivity.CPU
        cache = fast.cache(self.t + K + 2)
        out = {}
        for name, n in (("plain step", 1), ("verify", K + 1)):
            ids = torch.tensor(self.ids(n), device=self.device)
            with profile(activities=[kind]) as p:
                fast.head(fast.forward(ids, cache.sequence(self.t, n), cache)[-1])
                self.wait()
            every = sorted(p.key_averages(), key=lambda e: -e.device_time_total)
            out[name] = dict(calls=sum(e.count for e in every),
                             us=sum(e.device_time_total for e in every))
            for e in every[:12]:
                out[f"{name}: {e.key[:60]}"] = dict(calls=e.count, us=e.device_time_total)
        return out

    def tables(self, fast: Replay) -> dict:
        """What the policy goes by, to be held against the passes."""
        cache = fast.cache(self.t + K + 2)
        self.table = costs.guess(self.model.cfg, K)
        self.table["verify"] = costs.measure(fast, cache, self.ids(self.t), K)
        return dict(self.table)

    def texts(self, fast: Replay, paper: Replay) -> dict:
        """The best of three runs each, and after how many tokens greedy texts part."""
        out = {}
        for temperature in (0.0, 1.0):
            s = Settings(temperature=temperature, N=self.N)
            fixed = Settings(temperature=temperature, N=self.N, K=K, M=paper.M, exit_threshold=0.7)
            best: dict[str, list] = {}
            for name, model, how in (("plain", fast, s), ("plain, eager", self.model, s),
                                     ("paper", paper, fixed), ("clasp", fast, s)):
                runs = []
                for _ in range(3):
                    policy = Adaptive(s, **self.table) if name == "clasp" else None
                    choose = choose_skip if model is self.model else model.choose
                    runs.append(list(generate(model, self.ids(64), how, Chance(0), choose, policy)))
                best[name] = min(runs, key=lambda rounds: figures(rounds)["decode_seconds"])
            plain = figures(best["plain"])
            for name, rounds in best.items():
                f = figures(rounds)
                rate = f["tokens_per_second"]
                row = dict(tokens_per_second=rate, speedup=rate / plain["tokens_per_second"],
                           ideal=ideal_speedup(f, plain), drafted=f["drafted"],
                           accepted=f["accepted"], choices=f["optimisations"], parts="-")
                if temperature == 0:                   # for good reason only where two nearly tie
                    same = zip(ids_of(best["plain"]), ids_of(rounds))
                    row["parts"] = next((n for n, (a, b) in enumerate(same) if a != b), "nowhere")
                out[f"{name}, T = {temperature:g}"] = row
        return out

    def transformers(self) -> dict:
        """The library's model on the same memory: its logits, and how fast it decodes."""
        try:
            other = twin(self.model)
        except ImportError as e:
            return dict(skipped=str(e))
        ids = torch.tensor(self.ids(48), device=self.device)
        cache = self.model.cache(len(ids))
        ours = self.model.head(read(self.model, ids.tolist(), 0, cache)[-1])
        theirs = other(ids[None]).logits[0].type(ours.dtype)

        def decode() -> None:
            other.generate(ids[None], max_new_tokens=self.N, do_sample=False)
            self.wait()
        decode()
        began = time.perf_counter()
        decode()
        same = (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item()
        return dict(logits=relative(theirs, ours), same_argmax=same,
                    tokens_per_second=self.N / (time.perf_counter() - began))

    def tests(self) -> dict:
        """Those that need a GPU: a process of their own, which may end as it likes."""
        command = [sys.executable, "-m", "pytest", "-q", "gpu/test_gpu.py", "-k", "cuda"]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                             timeout=max(5, self.end - time.perf_counter()))
        return dict(status=run.returncode, said=(run.stdout + run.stderr)[-500:])

    def run(self) -> None:
        """All steps; what they need is an estimate for an H100."""
        L = self.model.cfg.L
        M = budgets(L)[-1]
        self.step("machine", 0, self.machine)
        self.step("bandwidth", 5, self.bandwidth)
        self.step("passes, plain kernels", 20, self.passes, K, M, 1, unfused)
        self.step("plain kernels against eager", 10, self.agreement, self.fast)
        self.step("lossless by enumeration", 20, self.lossless)
        self.step("passes", 60, self.passes, K, M, 1, self.fuse)
        clasp = self.fast
        self.step("kernels against eager", 10, self.agreement, clasp)
        self.step("kernels", 10, self.kernels, clasp)
        self.step("costs", 10, self.tables, clasp)
        self.step("passes of --strategy paper", 30, self.passes, K, round(0.55 * L), 1, self.fuse)
        self.step("texts", 40, self.texts, clasp, self.fast)
        self.step("transformers", 20, self.transformers)
        self.step("tests", 40, self.tests)
        for r in (4, 16):
            self.step(f"passes, {r} tokens choose", 45, self.passes, 15, M, r, self.fuse)
        for n in (2, 5, 9):
            self.step(f"passes, verify of {n}", 30, self.passes, n - 1, 0, 1, self.fuse)
        self.S = 6 * self.S                            # 8704 slots
        self.step("passes, long cache", 90, self.passes, K, M, 1, self.fuse)


def markdown(report: dict[str, dict]) -> str:
    """The report as a page."""
    def shown(x: Any) -> str:
        return f"{x:.3g}" if isinstance(x, float) else str(x)

    lines = ["# What this GPU tells"]
    for name, step in report.items():
        lines += ["", f"## {name}", ""]
        rows = {key: x for key, x in step.items() if isinstance(x, dict)}
        lines += [f"{key}: {shown(x)}  " for key, x in step.items() if key not in rows]
        if rows:
            columns = list(next(iter(rows.values())))
            lines += ["", f"| | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
            lines += [f"| {key} | {' | '.join(shown(row[c]) for c in columns)} |"
                      for key, row in rows.items()]
    return "\n".join(lines) + "\n"


@answered
def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status as that of clasp_mini.py."""
    p = Parser(usage="python gpu/%(prog)s REPORT [flags]",
               description="Measure everything on a GPU, or try that out on a CPU.")
    p.add_argument("report", metavar="REPORT", type=Path, help="writes REPORT.json, REPORT.md")
    p.add_argument("--model", metavar="DIR", type=Path, help="weights (random ones)")
    p.add_argument("--tiny", action="store_true", help="a dry run of a small model on a CPU")
    p.add_argument("--seconds", metavar="S", default=450, help="for all steps (450)",
                   type=number(float, "0 or more", lambda v: 0 <= v < 1e6))
    a = p.parse_args(argv)
    if not a.tiny and not torch.cuda.is_available():
        raise UsageError(unusable() or "PyTorch sees no CUDA GPU here (--tiny: on a CPU)")
    torch.set_num_threads(1)
    Check(a.report, a.seconds, a.tiny, a.model).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
