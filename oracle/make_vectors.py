"""Regenerates oracle/tiny/ and oracle/vectors/: a random model, and short runs and passes of it and
of the demo model in float64.

    python oracle/make_vectors.py [FOLDER]

Each trace shows situations that an implementation can get wrong; TRACE.md lists them. They depend
on the weights, so they are looked for among seeds and prompts, always in the same order, and new
weights need no new settings.
"""
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)     # see check_trace.py

import io  # noqa: E402
import itertools  # noqa: E402
import json  # noqa: E402
from collections import Counter, defaultdict  # noqa: E402
from collections.abc import Iterator, Sequence  # noqa: E402
from dataclasses import replace  # noqa: E402
from functools import partial  # noqa: E402

from command.cli import Parser, UsageError, answer  # noqa: E402
from command.flags import DEMO  # noqa: E402
from dp_layer_skip import choose_skip  # noqa: E402
from llama import Llama, torch  # noqa: E402
from oracle.dump_forward import dump_forward  # noqa: E402
from oracle.trace import Recording, about, write_trace  # noqa: E402
from policy.probe import PaperByProbe  # noqa: E402
from speculative import Chance, Paper, Settings  # noqa: E402
from tests.slow_llama import AS_4, random_checkpoint  # noqa: E402
from text.tokenizer import Tokenizer  # noqa: E402

HERE = Path(__file__).resolve().parent
PROMPTS = ("def mean(values):\n", "import os\n\n\ndef ", "class Stack:\n", "The list of ")
TINY_PROMPT = [3, 41, 7, 19, 5, 66, 0, 12, 41, 3, 79, 8]
LONG_PROMPT = [(7 * n * n + 3 * n) % 80 for n in range(100)]
BASE = Settings(N=20, K=6, M=16, exit_threshold=0.3, interval=32)
HOT = replace(BASE, temperature=1.0)
NUCLEUS = replace(HOT, temperature=0.8, top_k=50, top_p=0.9)
LIVELY = replace(BASE, N=24, K=4, M=24, exit_threshold=0.15, interval=2)
TINY = Settings(N=30, K=4, M=2, interval=2, temperature=0.2)
PROBE = {"tiny-probe": 3, "tiny-stops": 4}             # tokens of the probe, else 1


# name: settings, and what must happen, counted by `situations`: at least so often; 0: never.
VECTORS: dict[str, tuple[Settings, dict[str, int]]] = {
    "greedy": (LIVELY, dict(rejected=3, bonus=1, K=1, confidence=1, table_after_rejection=2,
                            uncertain=0)),
    "temperature": (replace(LIVELY, temperature=1.0, M=22, K=3, exit_threshold=0.1), dict(
        rejected=3, bonus=2, K=1, confidence=1, doubted=1, table_after_rejection=1)),
    "top-p": (NUCLEUS, dict(rejected=2, bonus=2, excluded=1, confidence=1)),
    "full-draft": (replace(HOT, M=0), dict(bonus=3, rejected=0, tables=0, K=1, N=1)),
    "plain": (replace(HOT, K=0), dict(plain=20, drafted=0)),
    "short-interval": (replace(HOT, N=16, M=8, interval=2), dict(tables=3, sets=2)),
    "stop-in-draft": (HOT, dict(accepted_stop=1, bonus=1, emitted=8)),
    "zero-verdict": (NUCLEUS, dict(zero_verdict=1)),
    "zero-draw": (NUCLEUS, dict(zero_draw=1)),
    "tiny-greedy": (replace(TINY, temperature=0.0), dict(
        rejected=3, bonus=1, K=1, N=1, table_after_rejection=2, sets=2, uncertain=0)),
    "tiny-temperature": (TINY, dict(
        rejected=3, bonus=1, K=1, doubted=1, table_after_rejection=2, sets=2)),
    "tiny-probe": (replace(TINY, N=20), dict(rejected=3, table_after_rejection=2, sets=2)),
    "tiny-stops": (replace(TINY, N=60), dict(
        rejected_stop=1, own_stop=1, emitted=26, bonus=1, table_after_rejection=2)),
    "tiny-top-p": (replace(TINY, top_k=20, top_p=0.9), dict(
        rejected=3, bonus=1, excluded=1, table_after_rejection=2, sets=2)),
}


def by_round(lines: list[dict]) -> list[dict[str, list[dict]]]:
    """The rounds of a trace: event -> its lines in the round, in their order."""
    out = []
    for line in lines:
        if line["event"] == "round":
            out.append(defaultdict(list))
        if "round" in line:
            out[-1][line["event"]].append(line)
    return out


def situations(lines: list[dict]) -> Counter:
    """How often what happens in a trace. A draft's end counts if nothing else would have ended it
    as well."""
    threshold = lines[0]["settings"]["exit_threshold"]
    stops = lines[0]["settings"]["stop_ids"]
    out = Counter()
    for r in by_round(lines):
        drafts, verdicts, own, ended = r["draft"], r["verify"], r["own"][0], r["round"][0]["ended"]
        rejected = [v for v in verdicts if v["accepted"] is False]
        out[own["kind"].replace("residual", "rejected")] += 1
        out["drafted"] += len(drafts)
        out["emitted"] += len(r["emit"][0]["tokens"])
        out["uncertain"] += any(0 < v["p"] < 1 for v in verdicts)
        out["excluded"] += any(v["a"] == 0 for v in rejected)
        out["doubted"] += any(v["accepted"] and v["a"] < 0.9 for v in verdicts)
        out["zero_verdict"] += any(v["u"] == v["a"] == 0 for v in rejected)
        out["zero_draw"] += any(d["u"] == 0 and d["token"] > 0 for d in drafts)
        out["rejected_stop"] += any(v["token"] in stops for v in rejected)
        out["own_stop"] += own["token"] in stops and own["token"] == r["emit"][0]["tokens"][-1]
        if drafts and (ended == "confidence" or drafts[-1]["confidence"] >= threshold):
            out[ended] += 1
            out["accepted_stop"] += ended == "stop" and verdicts[-1]["accepted"] is True
        for table in r["optimise"]:
            out["tables"] += 1
            out["table_after_rejection"] += own["kind"] == "residual"
    out["sets"] = len({str(line["skip"]) for line in lines if line["event"] == "optimise"})
    return out


def shows(lines: list[dict], wanted: dict[str, int]) -> bool:
    happens = situations(lines)
    return all(happens[what] >= least if least else not happens[what]
               for what, least in wanted.items())


def policy_of(s: Settings, L: int, r: int) -> Paper:
    return PaperByProbe(s, L, r) if r > 1 else Paper(s, L)


class Maker:
    """Looks for runs of one model and writes them."""

    def __init__(self, source: Path, out: Path, prompts: list[list[int]]) -> None:
        self.model = Llama.load(source, dtype=torch.float64)
        self.out = out
        self.prompts = prompts
        self.about = about(source)
        out.mkdir(parents=True, exist_ok=True)

    def run(self, name: str, ids: list[int], s: Settings, seed: int, zero: int | None = None
            ) -> list[dict]:
        """The lines of a trace, without times; uniform number `zero` is a 0."""
        chance = Chance(seed)
        uniforms = (0.0 if n == zero else chance.uniform() for n in itertools.count())
        r = PROBE.get(name, 1)
        said = dict(r=r, seed=seed if zero is None else None)
        text = io.StringIO()
        for _ in write_trace(text, self.model, ids, s, Recording(uniforms.__next__), choose_skip,
                             policy_of(s, self.model.cfg.L, r), self.about, said):
            pass
        lines = map(json.loads, text.getvalue().splitlines())
        return [line for line in lines if line["event"] != "times"]

    def runs(self, name: str, s: Settings) -> Iterator[list[dict]]:
        """Runs in which it may happen, in an order that is always the same."""
        for seed, ids in itertools.product(range(100), self.prompts):
            if s.temperature == 0:                     # then another M is another run
                s = replace(s, M=(s.M + min(seed, 1)) % (self.model.cfg.L + 1))
            run = partial(self.run, name, ids)
            lines = run(s, seed)
            rounds = by_round(lines)
            if name == "stop-in-draft":                # every drafted token is tried as a stop
                drafted = [d["token"] for r in rounds[3:] for d in r["draft"][1:]]
                for token in dict.fromkeys(drafted):
                    yield run(replace(s, stop_ids=(token,)), seed)
            elif name == "tiny-stops":                 # a rejected token and an own one are
                rejected = [v["token"] for r in rounds for v in r["verify"]
                            if v["accepted"] is False]
                own = [r["own"][0]["token"] for r in rounds[8:]]
                for tokens in itertools.product(rejected[:4], own):
                    yield run(replace(s, stop_ids=tokens), seed)
            elif name.startswith("zero"):              # every uniform number is tried as a 0
                asked = [line for line in lines if line.get("u") is not None]
                for n, line in enumerate(asked):
                    if line["round"] > 1 and (line["event"] == "verify") == ("verdict" in name):
                        yield run(s, seed, n)
            else:
                yield lines

    def make(self, name: str) -> None:
        s, wanted = VECTORS[name]
        for lines in self.runs(name, s):
            if shows(lines, wanted):
                text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
                (self.out / f"{name}.jsonl").write_text(text)
                return
        raise UsageError(f"{name}: no run of these prompts shows {wanted}; add a prompt")


def tiny_model(folder: Path) -> None:
    """Random weights of what the demo has not: grouped queries, a head size of its own, an untied
    head, LLaMA-3.1's scaling."""
    random_checkpoint(folder, dict(
        AS_4, head_dim=12, num_hidden_layers=6, intermediate_size=40, vocab_size=80,
        max_position_embeddings=256, torch_dtype="bfloat16"), dtype=torch.bfloat16)


def make(folder: Path) -> None:
    torch.set_num_threads(1)
    tok = Tokenizer(DEMO)
    out = folder / "vectors"
    demo = Maker(DEMO, out, [[tok.bos, *tok.encode(text)] for text in PROMPTS])
    tiny_model(folder / "tiny")
    tiny = Maker(folder / "tiny", out, [TINY_PROMPT])
    long = Maker(folder / "tiny", out, [LONG_PROMPT])
    for name in VECTORS:
        (long if name == "tiny-stops" else tiny if name.startswith("tiny") else demo).make(name)
    for of, name, length, skip in (
            (demo, "forward", 3, []), (demo, "forward-skip", 2, [3, 7, *range(12, 20)]),
            (tiny, "tiny-forward", 12, []), (tiny, "tiny-forward-skip", 2, [1, 4])):
        dump_forward(of.model, of.prompts[0][:length], skip, out / f"{name}.safetensors", of.about)


def main(argv: Sequence[str] | None = None) -> int:
    def work() -> int:
        p = Parser(description="Write the tiny model and all vectors.")
        p.add_argument("folder", nargs="?", type=Path, default=HERE, metavar="FOLDER")
        make(p.parse_args(argv).folder)
        return 0
    return answer(work)


if __name__ == "__main__":
    sys.exit(main())
