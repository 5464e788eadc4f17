"""This project as conformance.py and exact.py ask for a program: the example in Python.

    python oracle/conformance.py --level 4 --program "python oracle/ours.py"
    python oracle/sampler/exact.py oracle/ours.py:run
"""
import itertools
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch  # noqa: E402

from dp_layer_skip import choose_skip, cosine  # noqa: E402
from llama import Llama  # noqa: E402
from oracle.dump_forward import dump_forward  # noqa: E402
from oracle.sampler.law import cut  # noqa: E402
from oracle.trace import Recording, about, write_trace  # noqa: E402
from policy.probe import PaperByProbe, nearness  # noqa: E402
from speculative import Chance, Paper, Settings, draft, judge, probabilities  # noqa: E402


class Tables:
    """A "model" of one layer for `draft`, which leaves it out: q."""
    device = torch.device("cpu")

    def __init__(self, case: dict) -> None:
        self.q = torch.tensor(case["q"], dtype=torch.float64).log()

    def sequence(self, t: int, T: int) -> None:
        """It needs no cache."""

    def forward(self, ids: torch.Tensor, rows: None, cache: "Tables", skip: tuple) -> torch.Tensor:
        return self.q[ids][None]                                            # (1, 1, V)

    def head(self, h: torch.Tensor) -> torch.Tensor:
        return h


def chance_of(request: dict) -> Recording:
    if "u" in request:
        given = itertools.chain(request["u"], itertools.repeat(0.5))    # more, once it departs
        return Recording(given.__next__)
    return Recording(Chance(request["seed"]).uniform)


def run(case: dict, chance: Chance | None = None, prompt: int | None = None) -> list[list[int]]:
    """One text of the tables, by rounds: our draft and our judge."""
    s = Settings(temperature=case["temperature"], top_k=case["top_k"], top_p=case["top_p"],
                 N=case["N"], stop_ids=tuple(case["stop"]), K=case["K"],
                 exit_threshold=case["exit"])
    chance = chance or Chance(case["seed"])
    model = Tables(case)
    p = torch.tensor(case["p"], dtype=torch.float64).log()
    text = [case["prompts"][0] if prompt is None else prompt]
    rounds = []
    while len(text) <= s.N and text[-1] not in s.stop_ids:
        d, q, _ = draft(model, model, text, s.N - len(text), (True,), s, Paper(s, 1), chance)
        accepted, own = judge(probabilities(p[[text[-1], *d]], s), q, d, chance)
        rounds.append(list(cut([*d[:accepted], int(own)], case["stop"])))
        text += rounds[-1]
    return rounds


def texts(request: dict) -> dict:
    chance = chance_of(request)
    prompts = itertools.islice(itertools.cycle(request["prompts"]), request["texts"])
    return dict(texts=[run(request, chance, prompt) for prompt in prompts])


def choose(request: dict) -> dict:
    h = torch.tensor(request["h"], dtype=torch.float64)                     # (L+1, r, D)
    layers = torch.tensor(request["layers"], dtype=torch.float64)

    def run_layer(i: int, g: torch.Tensor) -> torch.Tensor:                 # (J, r*D)
        x = g.view(-1, *h[0].shape)
        return (x + x @ layers[i].T).flatten(1)
    near = cosine if h.shape[1] == 1 else nearness(h[-1])
    choice = choose_skip(h.flatten(1), run_layer, request["M"], near)
    rows = [min(i, request["M"]) + 1 for i in range(len(h))]
    return dict(D=[row[:J] for row, J in zip(choice.D, rows)],
                skipped=["".join(str(int(s)) for s in row[:J])
                         for row, J in zip(choice.skipped, rows)],
                skip=[i for i, left_out in enumerate(choice.skip()) if left_out])


def dump(request: dict) -> dict:
    model = Llama.load(request["model"], dtype=torch.float64)
    dump_forward(model, request["prompt_ids"], request["skip"], request["out"],
                 about(request["model"]))
    return {}


def trace(request: dict) -> dict:
    model = Llama.load(request["model"], dtype=torch.float64)
    said = request["settings"]
    s = Settings(**{name: tuple(value) if name == "stop_ids" else value
                    for name, value in said.items() if name not in ("r", "seed")})
    policy = PaperByProbe(s, model.cfg.L, said["r"]) if said["r"] > 1 else Paper(s, model.cfg.L)
    with open(request["out"], "w", encoding="utf-8") as out:
        for _ in write_trace(out, model, request["prompt_ids"], s,
                             chance_of(dict(said) | request), choose_skip, policy,
                             about(request["model"]), dict(r=said["r"], seed=said["seed"])):
            pass
    return {}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps((texts, texts, choose, dump, trace, trace)[asked["level"]](asked)))
