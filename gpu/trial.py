"""What recorded passes are tried with, by check.py and by tests: random models of real shapes, the
same model as the library transformers has it, and what stands in for CUDA graphs on a CPU.
"""
import math
import random
from collections.abc import Callable
from typing import Any

from torch.utils._pytree import tree_leaves

from gpu.replay import Replay, unfused
from llama import Config, Layer, Llama, Tensor, torch
from speculative import generate

REST = dict(eps=1e-5, context=8192, tied=False, theta=5e5, scaling=None)
EIGHT_B = Config(L=32, D=4096, H=32, G=8, hd=128, ffn=14336, V=128256, **REST)
TINY = Config(L=8, D=64, H=4, G=2, hd=16, ffn=96, V=200, **REST)
QUIET = 0.1                  # what some layers add to the residual stream, others: 1. It sets how
                             # much is accepted of a draft without them


def random_llama(c: Config, device: torch.device, dtype: torch.dtype) -> Llama:
    """A model in which every matrix keeps the size of its input; what leaves a layer is scaled so
    that depth does not blow it up, the head so that distributions are neither flat nor one-hot."""
    gen = torch.Generator(device).manual_seed(0)

    def matrix(n_out: int, n_in: int, scale: float = 1.0) -> Tensor:
        w = torch.randn(n_out, n_in, generator=gen, device=device, dtype=dtype)
        return w.mul_(scale * n_in ** -0.5)

    one = torch.ones(c.D, device=device, dtype=dtype)
    eps = torch.tensor(c.eps, device=device, dtype=torch.promote_types(dtype, torch.float32))
    # 9 in 16, scattered, never the first nor the last.
    quiet = random.Random(0).sample(range(1, c.L - 1), 9 * c.L // 16)
    layers = []
    for i in range(c.L):
        adds = (2 * c.L) ** -0.5 * (QUIET if i in quiet else 1)
        layers.append(Layer(attn_norm=one, qkv=matrix((c.H + 2 * c.G) * c.hd, c.D).t(),
                            out=matrix(c.D, c.H * c.hd, adds).t(), mlp_norm=one,
                            gate_up=matrix(2 * c.ffn, c.D).t(),
                            down=matrix(c.D, c.ffn, adds).t(), eps=eps))
    return Llama(c, matrix(c.V, c.D, c.D ** 0.5), layers, one, matrix(c.V, c.D, 4))


def twin(model: Llama) -> Any:
    """A transformers.LlamaForCausalLM that computes with the memory of `model`, and greedily
    decodes past stop tokens. Raises ImportError."""
    import transformers
    c = model.cfg
    rope = dict(rope_type="default", rope_theta=c.theta)
    if c.scaling:
        names = ("factor", "low_freq_factor", "high_freq_factor",
                 "original_max_position_embeddings")
        rope |= dict(zip(names, c.scaling), rope_type="llama3")
    config = transformers.LlamaConfig(
        num_hidden_layers=c.L, hidden_size=c.D, num_attention_heads=c.H, num_key_value_heads=c.G,
        head_dim=c.hd, intermediate_size=c.ffn, vocab_size=c.V, rms_norm_eps=c.eps,
        max_position_embeddings=c.context, rope_parameters=rope, rope_theta=c.theta,
        tie_word_embeddings=c.tied, dtype=model.dtype)
    with torch.device("meta"):
        other = transformers.LlamaForCausalLM(config)
    w = {"model.embed_tokens": model.embed, "model.norm": model.norm, "lm_head": model.lm_head}
    for i, layer in enumerate(model.layers):
        q, k, v = layer.qkv.t().split([c.H * c.hd, c.G * c.hd, c.G * c.hd])
        gate, up = layer.gate_up.t().split(c.ffn)
        parts = {"input_layernorm": layer.attn_norm, "post_attention_layernorm": layer.mlp_norm,
                 "self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v,
                 "self_attn.o_proj": layer.out.t(), "mlp.gate_proj": gate, "mlp.up_proj": up,
                 "mlp.down_proj": layer.down.t()}
        w |= {f"model.layers.{i}.{name}": x for name, x in parts.items()}
    other.load_state_dict({f"{name}.weight": x for name, x in w.items()}, assign=True)
    # Its rotary table is not among the weights, and float32 in every dtype.
    other.model.rotary_emb = type(other.model.rotary_emb)(config=config).to(model.device)
    other.generation_config.eos_token_id = None
    other.generation_config.pad_token_id = 0
    return other.eval()


# ---------------------------------------------------------------------- in the place of a graph

class Played(Replay):
    """On a CPU: calls are repeated, not kernels. Recording runs nothing, so results are nonsense at
    first; and all recordings share memory, so a replay leaves nonsense in those of later ones."""

    def __init__(self, *how: Any) -> None:
        super().__init__(*how)
        self.results: list[Tensor] = []                # of all recordings

    def record(self, f: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """As Replay.record: what is repeated is f, its results put where the recording's lie."""
        f()
        f()
        out = f()
        mine = tensors(out)
        spoil(mine)
        self.results += mine
        end = len(self.results)

        def again() -> None:
            spoil(self.results[end:])
            for old, new in zip(mine, tensors(f())):
                old.copy_(new)
        again()
        return out, again


def tensors(out: Any) -> list[Tensor]:
    return [x for x in tree_leaves(out) if isinstance(x, Tensor)]


def spoil(results: list[Tensor]) -> None:
    for x in results:
        x.fill_(math.nan if x.is_floating_point() else 1)


def replayed(model: Llama, K: int, M: int, r: int = 1, fuse: Callable = unfused) -> Replay:
    """The model's passes by graphs if it is on a GPU, else played."""
    kind = Replay if model.device.type == "cuda" else Played
    return kind(model, K, M, r, fuse)


def replaying(model: Llama, K: int, M: int, fuse: Callable = unfused) -> Callable:
    """`generate` by replayed passes, for tests that hand it `model`."""
    fast = replayed(model, K, M, fuse=fuse)
    return lambda _, prompt, s, chance, choose: generate(fast, prompt, s, chance, fast.choose)
