"""LLaMA by another route, slow and plain: no cache, no rows, a whole sequence at once by PyTorch's
own norm and attention, in float64. What the fast one is held against, with random checkpoints, and
how far apart they are.
"""
import json
import math

import torch
import torch.nn.functional as F

import llama
from text.safetensors_file import save

INDEX = "model.safetensors.index.json"
BASE = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=32,
            num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3, vocab_size=50,
            intermediate_size=48, rms_norm_eps=1e-5)
SCALED = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)     # so small that all three regimes occur
AS_4 = dict(rope_theta=500.0, rope_scaling=SCALED, torch_dtype="float32", head_dim=16)
AS_5 = dict(rope_parameters=dict(SCALED, rope_theta=500.0), dtype="float32", head_dim=16)
IDS = torch.tensor([3, 41, 7, 7, 0, 19, 49, 22, 5, 30, 11, 2])


def sizes(c):
    """(H, G, hd) of a config.json."""
    H = c["num_attention_heads"]
    return H, c.get("num_key_value_heads") or H, c.get("head_dim") or c["hidden_size"] // H


def weight_shapes(c):
    """Hugging Face's names -> shapes, for a config.json."""
    H, G, hd = sizes(c)
    D = c["hidden_size"]
    ffn = c["intermediate_size"]
    layer = {"input_layernorm": (D,), "post_attention_layernorm": (D,),
             "self_attn.q_proj": (H * hd, D), "self_attn.k_proj": (G * hd, D),
             "self_attn.v_proj": (G * hd, D), "self_attn.o_proj": (D, H * hd),
             "mlp.gate_proj": (ffn, D), "mlp.up_proj": (ffn, D), "mlp.down_proj": (D, ffn)}
    shapes = {"model.embed_tokens": (c["vocab_size"], D), "model.norm": (D,)}
    if not c.get("tie_word_embeddings"):
        shapes["lm_head"] = (c["vocab_size"], D)
    for i in range(c["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def random_checkpoint(folder, overrides=None, seed=0, dtype=torch.float32, shards=1):
    """Write a Hugging Face folder with random weights; -> config, name -> weight in float64."""
    c = {**BASE, **(overrides or {})}
    gen = torch.Generator().manual_seed(seed)
    w = {}
    for name, shape in weight_shapes(c).items():
        x = torch.randn(shape, generator=gen)
        if len(shape) == 1:
            x = 1 + x / 10
        else:
            x = x / 10 if shape[0] == c["vocab_size"] else x * shape[1] ** -0.5
        w[name] = x.to(dtype)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(c))
    place = dict.fromkeys(w, "model.safetensors")
    if shards > 1:           # dealt out like cards, so that every layer lies in several shards
        place = {x: f"model-{n % shards + 1}-of-{shards}.safetensors" for n, x in enumerate(w)}
        (folder / INDEX).write_text(json.dumps(dict(metadata={}, weight_map=place)))
    for file in set(place.values()):
        part = {name: x for name, x in w.items() if place[name] == file}
        save(part, folder / file, {"format": "pt"})
    return c, {name: x.double() for name, x in w.items()}


def reference_frequencies(c):
    """Radians per position for each pair, (hd/2,); LLaMA-3.1's stretching by its three cases."""
    rope = {"rope_theta": c.get("rope_theta", 1e4), **(c.get("rope_scaling") or {})}
    rope = c.get("rope_parameters") or rope
    hd = sizes(c)[2]
    f = rope["rope_theta"] ** (-torch.arange(0, hd, 2, dtype=torch.float64) / hd)
    if "factor" not in rope:
        return f
    low = rope["low_freq_factor"]
    turns = rope["original_max_position_embeddings"] * f / (2 * math.pi)
    share = (turns - low) / (rope["high_freq_factor"] - low)
    long = f / rope["factor"]
    between = share * f + (1 - share) * long
    return torch.where(share < 0, long, torch.where(share > 1, f, between))


def reference_layer(c, w, i, x):
    """Layer i on a whole sequence x (T, D) from position 0 on."""
    hd = sizes(c)[2]
    turn = torch.exp(1j * torch.outer(torch.arange(len(x)), reference_frequencies(c)))

    def project(name, x):
        return x @ w[f"model.layers.{i}.{name}_proj.weight"].T

    def norm(name, x):
        weight = w[f"model.layers.{i}.{name}_layernorm.weight"]
        return F.rms_norm(x, weight.shape, weight, c["rms_norm_eps"])

    def spin(x):                                       # elements k and k + hd/2: a complex number
        z = torch.complex(x[..., :hd // 2], x[..., hd // 2:]) * turn
        return torch.cat((z.real, z.imag), -1)

    a = norm("input", x)
    q, k, v = (project(f"self_attn.{name}", a).unflatten(1, (-1, hd)).transpose(0, 1)
               for name in "qkv")                      # (heads, T, hd)
    mixed = F.scaled_dot_product_attention(spin(q), spin(k), v, is_causal=True, enable_gqa=True)
    x = x + project("self_attn.o", mixed.transpose(0, 1).flatten(1))
    a = norm("post_attention", x)
    return x + project("mlp.down", F.silu(project("mlp.gate", a)) * project("mlp.up", a))


def reference(c, w, ids, skip=(), first=0):
    """-> logits (T, V), h[0..L] (L+1, T, D). Rows from `first` on leave out what is in `skip`."""
    h = [w["model.embed_tokens.weight"][ids]]
    for i in range(c["num_hidden_layers"]):
        ran = reference_layer(c, w, i, h[-1])
        h.append(torch.cat((ran[:first], h[-1][first:])) if i in skip else ran)
    head = w["model.embed_tokens.weight" if c.get("tie_word_embeddings") else "lm_head.weight"]
    norm = w["model.norm.weight"]
    return F.rms_norm(h[-1], norm.shape, norm, c["rms_norm_eps"]) @ head.T, torch.stack(h)


def relative_error(got, want):
    return ((got.double() - want.double()).abs().max() / want.double().abs().max()).item()


def same(got, want):
    return relative_error(got, want) < 1e-12


def loaded(folder, overrides=None, stored=torch.float32, dtype=torch.float64):
    """(config, weights, the model loaded from them, a cache for IDS and six slots more)."""
    c, w = random_checkpoint(folder, overrides, dtype=stored)
    model = llama.Llama.load(folder, dtype=dtype)
    return c, w, model, model.cache(len(IDS) + 6)


def passes(model, cache, ids, lengths, t=0, skip=()):
    """Logits (T, V) and states (L+1, T, D) of `ids`, from position t on, by passes so long."""
    states = []
    for part in ids.split(lengths):
        h = model.forward(part, cache.sequence(t, len(part)), cache, skip)
        states.append(torch.stack(h))
        t += len(part)
    states = torch.cat(states, 1)
    return model.head(states[-1]), states


def worst_error(folder, lengths=(5, 3, 1, 1, 2), **how):
    """The largest relative error of a program: logits and states of prefill, chunk and decode;
    candidates for one token in each layer; the cache entries that those must leave alone."""
    c, w, model, cache = loaded(folder, **how)
    logits, states = passes(model, cache, IDS, lengths)
    want, h = reference(c, w, IDS)
    errors = [relative_error(logits, want), relative_error(states, h)]
    t = 7
    before = torch.stack((cache.k, cache.v))[:, :, :, :t + 1]
    noise = torch.randn(4, h.shape[-1], generator=torch.Generator().manual_seed(1)) / 10
    for i in range(c["num_hidden_layers"]):
        x = (h[i, t] + noise).to(model.dtype)
        want = [reference_layer(c, w, i, torch.vstack((h[i, :t], v.double())))[-1] for v in x]
        got = model.layer(i, x, cache.candidates(t, len(x)), cache)
        errors.append(relative_error(got, torch.stack(want)))
    errors.append(relative_error(torch.stack((cache.k, cache.v))[:, :, :, :t + 1], before))
    return torch.tensor(errors).max().item()       # unlike Python's max, it lets a nan through
