"""The same model as the library transformers has it: one set of weights, of which it gets views."""
from typing import Any

from llama import Llama, Tensor, torch


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
    other.load_state_dict(weights(model), assign=True)
    # Its rotary table is not among the weights, and float32 in every dtype.
    other.model.rotary_emb = type(other.model.rotary_emb)(config=config).to(model.device)
    other.generation_config.eos_token_id = None
    other.generation_config.pad_token_id = 0
    return other.eval()


def weights(model: Llama) -> dict[str, Tensor]:
    """Hugging Face's names -> what they name: rows of ours."""
    c = model.cfg
    out = {"model.embed_tokens.weight": model.embed, "model.norm.weight": model.norm,
           "lm_head.weight": model.lm_head}
    for i, w in enumerate(model.layers):
        q, k, v = w.qkv.t().split([c.H * c.hd, c.G * c.hd, c.G * c.hd])
        gate, up = w.gate_up.t().split(c.ffn)
        named = dict(input_layernorm=w.attn_norm, post_attention_layernorm=w.mlp_norm)
        named |= {"self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v,
                  "self_attn.o_proj": w.out.t(), "mlp.gate_proj": gate, "mlp.up_proj": up,
                  "mlp.down_proj": w.down.t()}
        out |= {f"model.layers.{i}.{name}.weight": x for name, x in named.items()}
    return out
