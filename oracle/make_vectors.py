"""Regenerates oracle/tiny/ and oracle/vectors/: a random model, and short runs and passes of it and
of the demo model in float64.

    python oracle/make_vectors.py

Each trace shows situations that an implementation can get wrong; TRACE.md lists them. Whether they
occur depends on the weights: with new ones the tests tell which vector has become too tame, and
another seed helps.
"""
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)     # see check_trace.py

import itertools  # noqa: E402
from dataclasses import replace  # noqa: E402

from command.flags import DEMO  # noqa: E402
from llama import torch  # noqa: E402
from oracle.ours import dump, traced, write  # noqa: E402
from oracle.trace import Recording  # noqa: E402
from speculative import Chance, Settings  # noqa: E402
from tests.slow_llama import AS_4, random_checkpoint  # noqa: E402
from text.tokenizer import Tokenizer  # noqa: E402

HERE = Path(__file__).resolve().parent
MEAN = "def mean(values):\n"
CLASS = "class Stack:\n"
SHORT = [3, 41, 7, 19, 5, 66, 0, 12, 41, 3, 79, 8]
LONG = [(7 * n * n + 3 * n) % 80 for n in range(100)]
LIVELY = Settings(N=24, K=3, M=22, exit_threshold=0.1, interval=2, temperature=1.0)
HOT = Settings(N=20, K=6, M=16, exit_threshold=0.3, interval=32, temperature=1.0)
NUCLEUS = replace(HOT, temperature=0.8, top_k=50, top_p=0.9)
TINY = Settings(N=30, K=4, M=2, interval=2, temperature=0.2)

VECTORS: dict[str, tuple[str | list[int], Settings, int]] = {     # name: prompt, settings, seed
    "temperature": (MEAN, LIVELY, 1),
    "top-p": (MEAN, NUCLEUS, 9),
    "full-draft": (MEAN, replace(HOT, M=0), 2),
    "plain": (MEAN, replace(HOT, K=0), 0),
    "short-interval": (CLASS, replace(HOT, N=16, M=8, interval=2), 0),
    "stop-in-draft": (MEAN, replace(HOT, stop_ids=(361,)), 4),
    "zero-verdict": (MEAN, NUCLEUS, 3),
    "zero-draw": (MEAN, NUCLEUS, 0),
    "tiny-greedy": (SHORT, replace(TINY, temperature=0.0), 0),
    "tiny-temperature": (SHORT, TINY, 0),
    "tiny-probe": (SHORT, replace(TINY, N=20), 0),
    "tiny-stops": (LONG, replace(TINY, N=60, stop_ids=(61, 9)), 22),
}
PROBE = {"tiny-probe": 3, "tiny-stops": 4}             # tokens of the probe, else 1
ZERO = {"zero-verdict": 28, "zero-draw": 5}            # which uniform number is a 0


def vector(name: str, tiny: Path = HERE / "tiny") -> list[dict]:
    """The lines of a vector."""
    prompt, s, seed = VECTORS[name]
    ids = ids_of(prompt) if isinstance(prompt, str) else prompt
    chance = None
    if name in ZERO:
        uniform = Chance(seed).uniform
        numbers = (0.0 if n == ZERO[name] else uniform() for n in itertools.count())
        chance = Recording(numbers.__next__)
    folder = tiny if name.startswith("tiny") else DEMO
    return traced(folder, ids, s, seed, PROBE.get(name, 1), chance)


def ids_of(text: str) -> list[int]:
    tok = Tokenizer(DEMO)
    return [tok.bos, *tok.encode(text)]


def tiny_model(folder: Path) -> None:
    """Random weights of what the demo has not: grouped queries, a head size of its own, an untied
    head, LLaMA-3.1's scaling."""
    random_checkpoint(folder, dict(
        AS_4, head_dim=12, num_hidden_layers=6, intermediate_size=40, vocab_size=80,
        max_position_embeddings=256, torch_dtype="bfloat16"), dtype=torch.bfloat16)


def make(folder: Path) -> None:
    torch.set_num_threads(1)
    tiny = folder / "tiny"
    out = folder / "vectors"
    out.mkdir(parents=True, exist_ok=True)
    tiny_model(tiny)
    for name in VECTORS:
        write(out / f"{name}.jsonl", vector(name, tiny))
    for name, model, ids, skip in (
            ("forward", DEMO, ids_of(MEAN)[:3], []),
            ("forward-skip", DEMO, ids_of(MEAN)[:2], [3, 7, *range(12, 20)]),
            ("tiny-forward", tiny, SHORT, []), ("tiny-forward-skip", tiny, SHORT[:2], [1, 4])):
        dump(dict(model=model, prompt_ids=ids, skip=skip, out=out / f"{name}.safetensors"))


if __name__ == "__main__":
    make(HERE)
