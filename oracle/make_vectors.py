"""Makes oracle/tiny/, a random model, and all of oracle/vectors/ again, for another demo model or
another format: each vector says itself what it is of.

    python oracle/make_vectors.py

Of a trace that is the header, and where it names no seed the uniform numbers of its lines; of a
dump its metadata. TRACE.md lists what the traces show. Whether that occurs depends on the weights:
with new ones the tests tell which vector has become too tame, and another seed helps.
"""
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)     # see check_trace.py

from llama import torch  # noqa: E402
from oracle import conformance, ours  # noqa: E402
from tests.slow_llama import AS_4, random_checkpoint  # noqa: E402


def tiny_model(folder: Path) -> None:
    """Random weights of what the demo has not: grouped queries, a head size of its own, an untied
    head, LLaMA-3.1's scaling."""
    random_checkpoint(folder, dict(
        AS_4, head_dim=12, num_hidden_layers=6, intermediate_size=40, vocab_size=80,
        max_position_embeddings=256, torch_dtype="bfloat16"), dtype=torch.bfloat16)


def make(vectors: Path) -> None:
    torch.set_num_threads(1)
    for request in [*conformance.passes(vectors), *conformance.runs(vectors)]:
        if request.get("settings", {}).get("seed") is not None:
            del request["u"]
        ours.ANSWERS[request["level"]](request)


if __name__ == "__main__":
    tiny_model(conformance.HERE / "tiny")
    make(conformance.HERE / "vectors")
