"""A checkpoint of the 8B's shapes with random weights (16.1 GB), for measurements where no real
weights can be had.

    python gpu/synthetic.py DIR [FACTOR]

18 of its 32 layers are quiet: they add FACTOR (0.1) times as much to the residual stream as the
others. With 0 they are idle, and so FACTOR sets how much is accepted of a draft without them.
"""
import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)
from llama import torch  # noqa: E402
from command.cli import Parser, UsageError, answer, number  # noqa: E402
from text.safetensors_file import save  # noqa: E402

EIGHT_B = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=4096,
               num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=32,
               vocab_size=128256, intermediate_size=14336, rms_norm_eps=1e-5, rope_theta=500000.0,
               max_position_embeddings=8192, torch_dtype="bfloat16")    # and no stop token


def quiet_layers(L: int) -> set[int]:
    """9 in 16, scattered, never the first nor the last."""
    return set(random.Random(0).sample(range(1, L - 1), 9 * L // 16))


def matrices(c: dict) -> dict[str, tuple[int, int]]:
    """name -> (out, in) of every matrix, in Hugging Face's layout."""
    D, F, V, H = (c[key] for key in ("hidden_size", "intermediate_size", "vocab_size",
                                     "num_attention_heads"))
    hd = c.get("head_dim", D // H)
    kv = c["num_key_value_heads"] * hd
    layer = {"self_attn.q_proj": (H * hd, D), "self_attn.k_proj": (kv, D),
             "self_attn.v_proj": (kv, D), "self_attn.o_proj": (D, H * hd),
             "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}
    return {"model.embed_tokens": (V, D), "lm_head": (V, D)} | {
        f"model.layers.{i}.{name}": shape
        for i in range(c["num_hidden_layers"]) for name, shape in layer.items()}


def synthetic_checkpoint(folder: Path, c: dict = EIGHT_B, factor: float = 0.1,
                         report: Callable[[str], None] = lambda line: None) -> None:
    """Write bfloat16 weights in the layout of the 8B, a shard at a time. Every matrix keeps the
    size of its input, and what leaves a layer is scaled so that depth does not blow it up."""
    folder.mkdir(parents=True)
    L, D, gen = c["num_hidden_layers"], c["hidden_size"], torch.Generator().manual_seed(0)
    quiet, shapes, place = quiet_layers(L), matrices(c), {}
    norms = ["model.norm"] + [f"model.layers.{i}.{name}_layernorm" for i in range(L)
                              for name in ("input", "post_attention")]

    def weight(name: str) -> torch.Tensor:
        if name in norms:
            return torch.ones(D, dtype=torch.bfloat16)
        scale = shapes[name][1] ** -0.5
        if name == "model.embed_tokens":
            scale = 1.0
        elif name == "lm_head":
            scale *= 4                                 # distributions neither flat nor one-hot
        elif "o_proj" in name or "down_proj" in name:
            scale *= (2 * L) ** -0.5 * (factor if int(name.split(".")[2]) in quiet else 1)
        return (torch.randn(shapes[name], generator=gen) * scale).to(torch.bfloat16)

    names = sorted([*shapes, *norms])
    for k in range(4):
        file = f"model-{k + 1:05}-of-00004.safetensors"
        tensors = {f"{name}.weight": weight(name)
                   for name in names[k * len(names) // 4:(k + 1) * len(names) // 4]}
        save(tensors, folder / file, {"format": "pt"})
        place |= dict.fromkeys(tensors, file)
        report(f"{file}: {sum(t.nbytes for t in tensors.values()) / 1e9:.3g} GB")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps(dict(metadata={}, weight_map=place)))
    (folder / "config.json").write_text(json.dumps(c))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status as that of clasp_mini.py."""
    def work() -> int:
        p = Parser(usage="python gpu/%(prog)s DIR [FACTOR]",
                   description="Write random weights of the 8B's shapes, 16.1 GB.")
        p.add_argument("dir", metavar="DIR", type=Path, help="a folder that does not exist yet")
        p.add_argument("factor", metavar="FACTOR", nargs="?", default=0.1,
                       help="what the quiet layers add, in parts of what the others do (0.1)",
                       type=number(float, "0 to 1", lambda v: 0 <= v <= 1))
        a = p.parse_args(argv)
        if a.dir.exists():
            raise UsageError(f"{a.dir}: exists already; name a new folder")
        synthetic_checkpoint(a.dir, factor=a.factor, report=print)
        return 0
    return answer(work)


if __name__ == "__main__":
    sys.exit(main())
