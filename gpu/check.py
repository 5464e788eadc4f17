"""Everything that a GPU can tell about this project, by one command, in one report.

    python gpu/check.py REPORT                  # random weights of the 8B's shapes; about 8 minutes
    python gpu/check.py REPORT --model DIR      # real ones
    python gpu/check.py REPORT --tiny           # a dry run of all steps, on a CPU

No weights and no network are needed: random ones are made on the GPU. REPORT, a JSON file, is
written whenever a step ends. A step that fails costs only itself; the first are those that would be
missed most.
"""
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)
from command.cli import Parser, UsageError, answer  # noqa: E402
from command.report import figures, ideal_speedup, ids_of  # noqa: E402
from dp_layer_skip import choose_skip  # noqa: E402
from gpu.driver import unusable  # noqa: E402
from gpu.replay import Replay, first_line, fused, unfused  # noqa: E402
from gpu.stand_in import replayed, replaying  # noqa: E402
from gpu.synthetic import EIGHT_B, SMALL, TINY, random_llama  # noqa: E402
from llama import Llama, Tensor, torch  # noqa: E402
from policy import costs  # noqa: E402
from policy.adaptive import Adaptive, budgets  # noqa: E402
from policy.probe import choose_by  # noqa: E402
from speculative import Chance, Settings, generate, read  # noqa: E402
from tests.every_outcome import distance  # noqa: E402

K = 12                       # tokens drafted at most, as the command has it


def spread(L: int, j: int) -> list[bool]:
    """j of L layers, evenly spread: for passes whose cost alone matters."""
    return [(i + 1) * j // L > i * j // L for i in range(L)]


class Check:
    """The steps, and what they share."""

    def __init__(self, path: Path, tiny: bool, folder: Path | None) -> None:
        self.path = path
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
        self.fuse = unfused if tiny else fused
        self.wait = (lambda: None) if tiny else torch.cuda.synchronize
        self.fast: Any = None                          # the last recording
        self.report: dict[str, dict] = {}

    def step(self, name: str, f: Callable[..., dict], *args: Any) -> None:
        """Run f; what it returns is part of the report."""
        began = time.perf_counter()
        try:
            with torch.inference_mode():
                got = f(*args)
        except Exception as e:                         # of whatever kind: the next may go well
            got = dict(failed=first_line(e))
        got["seconds"] = round(time.perf_counter() - began, 1)
        self.report[name] = got
        print(f"{name}: {json.dumps(got)[:200]}", flush=True)
        self.path.write_text(json.dumps(self.report, indent=1))

    def timed(self, call: Callable[[], Any]) -> float:
        """Seconds of a call in a queue of four: a median, for an idle GPU is slow at first."""
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
        gpu = torch.cuda.get_device_properties(self.device) if not self.tiny else None
        return dict(torch=torch.__version__, cuda=torch.version.cuda, dtype=str(self.model.dtype),
                    gpu=str(gpu))

    def bandwidth(self) -> dict:
        a = torch.ones(2 ** (16 if self.tiny else 28), device=self.device)
        b = torch.empty_like(a)
        self.rate = 2 * a.nbytes / self.timed(lambda: b.copy_(a))
        return dict(copy_GB_per_s=self.rate / 1e9)

    def lossless(self) -> dict:
        """Every branch of chance of a small model by graphs, against the full model's products."""
        model = random_llama(SMALL, self.device, torch.float64)
        s = Settings(temperature=4.0, top_p=0.9, N=4, K=2, M=1, interval=1)
        return dict(largest_error=distance(model, s, replaying(model, s.K, s.M)))

    def passes(self, K: int, M: int, r: int, fuse: Callable) -> dict:
        """What each kind of pass takes at position t, and the part of a copy's bandwidth that it
        reaches, by the weights and slots that it must read."""
        c = self.model.cfg
        fast = replayed(self.model, K, M, r, fuse)
        cache = fast.cache(self.t + (M + 2) * r + K + 2)
        text = self.ids(self.t)
        h = torch.stack([x[-1] for x in read(fast, text, 0, cache)])
        layer = costs.layer_weights(c) + 2 * cache.S * c.G * c.hd
        ids = torch.tensor(self.ids(K + 1), device=self.device)

        def forward(T: int, skip: Sequence[bool] = ()) -> Tensor:
            return fast.head(fast.forward(ids[:T], cache.sequence(self.t, T), cache, skip)[-1])

        kinds = {"plain step": (c.L, lambda: forward(1))}
        for j in sorted({c.L // 3, c.L // 2, M} if M > 0 else ()):
            kinds[f"draft, {j} left out"] = (c.L - j, lambda j=j: forward(1, spread(c.L, j)))
        kinds[f"verify, {K + 1} rows"] = (c.L, lambda: forward(K + 1))
        if M > 0:                                      # by several tokens: they are read once more
            kinds[f"choice, M = {M}, r = {r}"] = (c.L * (1 + (r > 1)), lambda: choose_by(
                r, fast.choose, fast, cache, text, h, M))
        out = {}
        for name, (layers, call) in kinds.items():
            seconds = self.timed(call)
            rate = (layers * layer + c.V * c.D) * self.model.embed.element_size() / seconds
            out[name] = dict(ms=1e3 * seconds, GB_per_s=rate / 1e9, of_copy=rate / self.rate)
        for row in out.values():
            row["plain_steps"] = row["ms"] / out["plain step"]["ms"]
        self.fast = fast                               # now that all went well
        return out

    def texts(self, fast: Replay, paper: Replay) -> dict:
        """The policy's costs; the best of three runs each; where greedy texts part."""
        table = costs.guess(self.model.cfg, K)         # what the policy goes by
        table["verify"] = costs.measure(fast, fast.cache(self.t + K + 2), self.ids(self.t), K)
        out = dict(table)
        for temperature in (0.0, 1.0):
            s = Settings(temperature=temperature, N=self.N)
            fixed = Settings(temperature=temperature, N=self.N, K=K, M=paper.M, exit_threshold=0.7)
            best: dict[str, list] = {}
            for name, model, how in (("plain", fast, s), ("plain, eager", self.model, s),
                                     ("paper", paper, fixed), ("clasp", fast, s)):
                runs = []
                for _ in range(3):
                    policy = Adaptive(s, **table) if name == "clasp" else None
                    choose = choose_skip if model is self.model else model.choose
                    runs.append(list(generate(model, self.ids(64), how, Chance(0), choose, policy)))
                best[name] = min(runs, key=lambda rounds: figures(rounds)["decode_seconds"])
            plain = figures(best["plain"])
            for name, rounds in best.items():
                f = figures(rounds)
                rate = f["tokens_per_second"]
                same = zip(ids_of(best["plain"]), ids_of(rounds))    # till a near tie
                parts = next((n for n, (a, b) in enumerate(same) if a != b), "nowhere")
                out[f"{name}, T = {temperature:g}"] = dict(
                    tokens_per_second=rate, speedup=rate / plain["tokens_per_second"],
                    ideal=ideal_speedup(f, plain), drafted=f["drafted"], accepted=f["accepted"],
                    choices=f["optimisations"], parts="-" if temperature else parts)
        return out

    def tests(self) -> dict:
        """Those that need a GPU: a process of their own, which may end as it likes."""
        command = [sys.executable, "-m", "pytest", "-q", "gpu/test_gpu.py", "-k", "cuda"]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        return dict(status=run.returncode, said=(run.stdout + run.stderr)[-500:])

    def run(self) -> None:
        """All steps; on an H100 they take eight minutes, by an estimate."""
        L = self.model.cfg.L
        M = budgets(L)[-1]
        self.step("machine", self.machine)
        self.step("bandwidth", self.bandwidth)
        self.step("passes, plain kernels", self.passes, K, M, 1, unfused)
        self.step("lossless by enumeration", self.lossless)
        self.step("passes", self.passes, K, M, 1, self.fuse)
        clasp = self.fast
        self.step("passes of --strategy paper", self.passes, K, round(0.55 * L), 1, self.fuse)
        self.step("texts", self.texts, clasp, self.fast)
        self.step("tests", self.tests)
        for r in (4, 16):
            self.step(f"passes, {r} tokens choose", self.passes, 15, M, r, self.fuse)
        for n in (2, 5, 9):
            self.step(f"passes, verify of {n}", self.passes, n - 1, 0, 1, self.fuse)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status as that of clasp_mini.py."""
    def work() -> int:
        p = Parser(usage="python gpu/%(prog)s REPORT [flags]",
                   description="Measure everything on a GPU, or try that out on a CPU.")
        p.add_argument("report", metavar="REPORT", type=Path, help="the JSON file to write")
        p.add_argument("--model", metavar="DIR", type=Path, help="weights (random ones)")
        p.add_argument("--tiny", action="store_true", help="a dry run of a small model on a CPU")
        a = p.parse_args(argv)
        if not a.tiny and not torch.cuda.is_available():
            raise UsageError(unusable() or "PyTorch sees no CUDA GPU here (--tiny: on a CPU)")
        torch.set_num_threads(1)
        Check(a.report, a.tiny, a.model).run()
        return 0
    return answer(work)


if __name__ == "__main__":
    sys.exit(main())
