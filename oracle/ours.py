"""This project as conformance.py and exact.py ask for a program: the example in Python.

    python oracle/conformance.py --level 4 --program "python oracle/ours.py"
    python oracle/sampler/exact.py oracle/ours.py:run
"""
import io
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch  # noqa: E402

from dp_layer_skip import choose_skip, cosine  # noqa: E402
from llama import Llama  # noqa: E402
from oracle import dumps  # noqa: E402
from oracle.sampler.law import cut  # noqa: E402
from oracle.trace import Recording, about, table_of, write_trace  # noqa: E402
from policy.probe import PaperByProbe, nearness  # noqa: E402
from speculative import Chance, Paper, Settings, draft, judge, probabilities  # noqa: E402


def chance_of(request: dict, seed: int) -> Recording:
    if "u" in request:
        given = itertools.chain(request["u"], itertools.repeat(0.5))    # more, once it departs
        return Recording(given.__next__)
    return Recording(Chance(seed).uniform)


def run(case: dict, chance: Chance | None = None) -> list[int]:
    """One text of the tables: our draft and our judge."""
    s = Settings(temperature=case["temperature"], top_k=case["top_k"], top_p=case["top_p"],
                 N=case["N"], stop_ids=case["stop"], K=case["K"], exit_threshold=case["exit"])
    chance = chance or Chance(case["seed"])
    p_of, q_of = torch.tensor([case["p"], case["q"]], dtype=torch.float64).log()
    # A "model" of one layer, which the draft leaves out, and needs no cache.
    model = SimpleNamespace(device=q_of.device, sequence=lambda t, T: None, head=lambda h: h,
                            forward=lambda ids, rows, cache, skip: q_of[ids][None])     # (1, 1, V)
    text = [case["prompt"]]
    while len(text) <= s.N and text[-1] not in s.stop_ids:
        d, q, _ = draft(model, model, text, s.N - len(text), (True,), s, Paper(s, 1).goes_on,
                        chance)
        accepted, own = judge(probabilities(p_of[[text[-1], *d]], s), q, d, chance)
        text += cut([*d[:int(accepted)], int(own)], case["stop"])
    return text[1:]


def texts(request: dict) -> dict:
    if isinstance(request["prompt"], list):
        return dict(skip="one text at a time")
    chance = chance_of(request, request["seed"])
    return dict(texts=[run(request, chance) for _ in range(request["texts"])])


def choose(request: dict) -> dict:
    h = torch.tensor(request["h"], dtype=torch.float64)                     # (L+1, r, D)
    layers = torch.tensor(request["layers"], dtype=torch.float64)

    def run_layer(i: int, g: torch.Tensor) -> torch.Tensor:                 # (J, r*D)
        x = g.view(-1, *h[0].shape)
        return (x + x @ layers[i].T).flatten(1)
    near = cosine if h.shape[1] == 1 else nearness(h[-1])
    return table_of(choose_skip(h.flatten(1), run_layer, request["M"], near))


def dump(request: dict) -> dict:
    folder = request["model"]
    model = Llama.load(folder, dtype=torch.float64)
    dumps.dump(folder, model, request["prompt_ids"], request["skip"], request["out"])
    return {}


def traced(folder: str | Path, prompt: Sequence[int], s: Settings, seed: int | None, r: int = 1,
           chance: Recording | None = None, dtype: torch.dtype = torch.float64) -> list[dict]:
    """The lines of a trace by the paper's numbers, without times."""
    model = Llama.load(folder, dtype=dtype)
    policy = PaperByProbe(s, model.cfg.L, r) if r > 1 else Paper(s, model.cfg.L)
    said = dict(r=r, seed=seed)
    chance = chance or Recording(Chance(seed).uniform)
    text = io.StringIO()
    for _ in write_trace(text, model, prompt, s, chance, choose_skip, policy, about(folder), said):
        pass
    lines = map(json.loads, text.getvalue().splitlines())
    return [line for line in lines if line["event"] != "times"]


def trace(request: dict) -> dict:
    settings = dict(request["settings"])
    r, seed = settings.pop("r"), settings.pop("seed")
    lines = traced(request["model"], request["prompt_ids"], Settings(**settings), seed, r,
                   chance_of(request, seed))
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
    Path(request["out"]).write_text(text, encoding="utf-8")
    return {}


ANSWERS = (texts, texts, choose, dump, trace, trace)       # of each level

if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(ANSWERS[asked["level"]](asked)))
