"""Regenerates oracle/tiny/ and oracle/vectors/: a random model, and short runs and passes of it and
of the demo model in float64.

    python oracle/make_vectors.py [FOLDER]

Each trace shows situations that an implementation can get wrong; TRACE.md lists them. Where they
depend on the weights (a stop token inside a draft, say) they are looked for, always in the same
order, so that new weights need no new settings.
"""
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)     # see check_trace.py

import argparse  # noqa: E402
import io  # noqa: E402
import itertools  # noqa: E402
import json  # noqa: E402
from collections import Counter  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from dataclasses import replace  # noqa: E402

import clasp_mini  # noqa: E402
from dp_layer_skip import choose_skip  # noqa: E402
from llama import Llama, torch  # noqa: E402
from oracle import trace  # noqa: E402
from oracle.dump_forward import dump_forward  # noqa: E402
from tests.slow_llama import AS_4, random_checkpoint  # noqa: E402
from oracle.trace import Recording, by_round, write_trace  # noqa: E402
from speculative import Chance, Settings  # noqa: E402
from text.tokenizer import Tokenizer  # noqa: E402

HERE = Path(__file__).resolve().parent
PROMPT = "def mean(values):\n"
BASE = Settings(N=20, K=6, M=16, exit_threshold=0.3, interval=32)
HOT = replace(BASE, temperature=1.0)
NUCLEUS = replace(HOT, temperature=0.8, top_k=50, top_p=0.9)
LIVELY = replace(BASE, N=24, K=4, M=24, exit_threshold=0.15, interval=2)
DEMO = {            # name: settings, and how often at least what must happen
    "greedy": (LIVELY, dict(rejected=3, bonus=1, K=1, confidence=1, table_after_rejection=2)),
    "temperature": (replace(LIVELY, temperature=1.0, M=22, K=3, exit_threshold=0.1), dict(
        rejected=3, bonus=2, K=1, confidence=1, doubted=1, table_after_rejection=1)),
    "top-p": (NUCLEUS, dict(rejected=2, bonus=2, excluded=1, confidence=1)),
    "full-draft": (replace(HOT, M=0), dict(bonus=3, K=1, N=1)),
    "plain": (replace(HOT, K=0), {}),
    "short-interval": (replace(HOT, N=16, M=8, interval=2), dict(tables=3, sets=2)),
}
TINY = {
    "tiny-greedy": (Settings(N=30, K=4, M=2, interval=2), dict(
        rejected=3, bonus=1, K=1, N=1, table_after_rejection=2, sets=2)),
    "tiny-temperature": (Settings(N=30, K=4, M=2, interval=2, temperature=0.2), dict(
        rejected=3, bonus=1, K=1, doubted=1, table_after_rejection=2, sets=2)),
    "tiny-probe": (Settings(N=20, K=4, M=2, interval=2, r=3, temperature=0.2), dict(
        rejected=3, table_after_rejection=2)),
    "tiny-top-p": (Settings(N=30, K=4, M=2, interval=2, temperature=0.2, top_k=20, top_p=0.9), dict(
        rejected=3, bonus=1, excluded=1, table_after_rejection=2)),
}


def tiny_model(folder: Path) -> None:
    """Random weights of what the demo has not: grouped queries, a head size of its own, an untied
    head, LLaMA-3.1's scaling."""
    random_checkpoint(folder, dict(
        AS_4, head_dim=12, num_hidden_layers=6, intermediate_size=40, vocab_size=80,
        max_position_embeddings=256, torch_dtype="bfloat16"), dtype=torch.bfloat16)


def uniforms(seed: int, zero: int | None) -> Iterator[float]:
    """Those of a seed; 0 in place of number `zero`."""
    chance = Chance(seed)
    return (0.0 if n == zero else chance.uniform() for n in itertools.count())


def situations(lines: list[dict]) -> Counter:
    """How often what happens in a trace. A draft's end counts if nothing else would have ended it
    as well."""
    threshold, out, sets = lines[0]["settings"]["exit_threshold"], Counter(), set()
    for r in by_round(lines):
        drafts, verdicts, own, ended = r["draft"], r["verify"], r["own"][0], r["round"][0]["ended"]
        out[own["kind"].replace("residual", "rejected")] += 1
        out["excluded"] += any(v["accepted"] is False and v["a"] == 0 for v in verdicts)
        out["doubted"] += any(v["accepted"] and v["a"] < 0.9 for v in verdicts)
        if drafts:
            alone = ended == "confidence" or drafts[-1]["confidence"] >= threshold
            out[ended] += alone
            out["accepted_stop"] += alone and ended == "stop" and verdicts[-1]["accepted"] is True
        for table in r["optimise"]:
            out["tables"] += 1
            out["table_after_rejection"] += own["kind"] == "residual"
            sets.add(tuple(table["skip"]))
    out["sets"] = len(sets)
    return out


class Maker:
    """Looks for runs of one model and writes them."""

    def __init__(self, source: Path, out: Path, ids: list[int]) -> None:
        self.model, self.out, self.ids = Llama.load(source, dtype=torch.float64), out, ids
        self.about = trace.about(source)
        out.mkdir(parents=True, exist_ok=True)

    def run(self, s: Settings, seed: int, zero: int | None = None) -> list[dict]:
        """The lines of a trace, without times."""
        text = io.StringIO()
        for _ in write_trace(self.model, self.ids, s, Recording(uniforms(seed, zero).__next__),
                             choose_skip, text, self.about, seed if zero is None else None):
            pass
        lines = map(json.loads, text.getvalue().splitlines())
        return [line for line in lines if line["event"] != "times"]

    def write(self, name: str, lines: list[dict]) -> None:
        text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
        (self.out / f"{name}.jsonl").write_text(text, encoding="utf-8")

    def first(self, s: Settings, wanted: dict[str, int]) -> list[dict]:
        """The first seed's run in which all that is wanted happens; greedily, the nearest M's."""
        tries = [(s, seed) for seed in range(200)] if s.temperature else [
            (replace(s, M=M), 0) for M in sorted(range(1, self.model.cfg.L + 1),
                                                 key=lambda M: abs(M - s.M))]
        for each, seed in tries:
            lines = self.run(each, seed)
            happens = situations(lines)
            if all(happens[what] >= least for what, least in wanted.items()):
                return lines
        raise AssertionError(f"no run of {len(tries)} has {wanted}")

    def stop_in_draft(self, s: Settings) -> list[dict]:
        """A run that ends with a drafted and accepted stop token, where the draft would else have
        gone on. Of a run without stop tokens every drafted token is tried as one."""
        for seed in range(200):
            drafted = [d["token"] for r in by_round(self.run(s, seed))[3:] for d in r["draft"][1:]]
            for token in dict.fromkeys(drafted):
                lines = self.run(replace(s, stop_ids=(token,)), seed)
                if situations(lines)["accepted_stop"] and len(by_round(lines)) > 3:
                    return lines
        raise AssertionError("no stop token inside a draft in 200 runs")

    def zero(self, s: Settings, event: str) -> list[dict]:
        """A run with one u = 0: it judges a token that the full model excludes, or it draws where
        the first tokens are excluded."""
        for seed in range(200):
            asked = [x for x in self.run(s, seed) if x.get("u") is not None]
            for n, line in enumerate(asked):
                if line["event"] == event and line["round"] > 1 and line.get("a", 0) == 0:
                    lines = self.run(s, seed, n)
                    line, = [x for x in lines if x.get("u") == 0]
                    if event == "verify" or line["token"] > 0:
                        return lines
        raise AssertionError(f"no {event} for u = 0 in 200 runs")

    def dumps(self, name: str, length: int, skip: list[int]) -> None:
        for which, T, left_out in (("", length, []), ("-skip", 2, skip)):
            dump_forward(self.model, self.ids[:T], left_out,
                         self.out / f"{name}{which}.safetensors", self.about)


def main(folder: Path = HERE) -> None:
    torch.set_num_threads(1)
    tok = Tokenizer(clasp_mini.DEMO)
    demo = Maker(clasp_mini.DEMO, folder / "vectors", [tok.bos, *tok.encode(PROMPT)])
    for name, (s, wanted) in DEMO.items():
        demo.write(name, demo.first(s, wanted))
    demo.write("stop-in-draft", demo.stop_in_draft(HOT))
    demo.write("zero-verdict", demo.zero(NUCLEUS, "verify"))
    demo.write("zero-draw", demo.zero(NUCLEUS, "draft"))
    demo.dumps("forward", 3, [3, 7, *range(12, 20)])
    tiny_model(folder / "tiny")
    tiny = Maker(folder / "tiny", folder / "vectors", [3, 41, 7, 19, 5, 66, 0, 12, 41, 3, 79, 8])
    for name, (s, wanted) in TINY.items():
        tiny.write(name, tiny.first(s, wanted))
    tiny.dumps("tiny-forward", 12, [1, 4])


if __name__ == "__main__":
    p = argparse.ArgumentParser(description="Write the tiny model and all vectors.")
    p.add_argument("folder", nargs="?", type=Path, default=HERE, metavar="FOLDER")
    main(p.parse_args().folder)
