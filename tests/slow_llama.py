"""LLaMA by another route, slow and plain: no cache, no mask, a row and a head at a time, in
float64. What the fast one is held against; random checkpoints to hold it there; and how far
apart they are.
"""
import json
import math

import torch

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
    (H, G, hd), D, F, V = sizes(c), c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    layer = {"input_layernorm": (D,), "post_attention_layernorm": (D,),
             "self_attn.q_proj": (H * hd, D), "self_attn.k_proj": (G * hd, D),
             "self_attn.v_proj": (G * hd, D), "self_attn.o_proj": (D, H * hd),
             "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}
    shapes = {"model.embed_tokens": (V, D), "model.norm": (D,), "lm_head": (V, D)} | {
        f"model.layers.{i}.{n}": s for i in range(c["num_hidden_layers"]) for n, s in layer.items()}
    if c.get("tie_word_embeddings"):
        del shapes["lm_head"]
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def random_checkpoint(folder, overrides=None, seed=0, dtype=torch.float32, shards=1):
    """Write a Hugging Face folder with random weights; -> (config, name -> weight in
    float64)."""
    c, gen, w = {**BASE, **(overrides or {})}, torch.Generator().manual_seed(seed), {}
    for name, shape in weight_shapes(c).items():
        r = torch.randn(shape, generator=gen)
        tall = shape[0] == c["vocab_size"]
        w[name] = (1 + r / 10 if len(shape) == 1 else r / 10 if tall else r * shape[1] ** -0.5
                   ).to(dtype)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(c))
    # Dealt out like cards, so that every layer lies in several shards.
    place = {n: f"model-{k % shards + 1}-of-{shards}.safetensors" for k, n in enumerate(w)}
    if shards == 1:
        place = dict.fromkeys(w, "model.safetensors")
    else:
        (folder / INDEX).write_text(json.dumps(dict(metadata={}, weight_map=place)))
    for file in set(place.values()):
        save({name: t for name, t in w.items() if place[name] == file}, folder / file,
             {"format": "pt"})
    return c, {name: t.double() for name, t in w.items()}


def reference_frequencies(c):
    """Radians per position for each pair; LLaMA-3.1's stretching by its three cases."""
    rope = {"rope_theta": c.get("rope_theta", 1e4), **(c.get("rope_scaling") or {})}
    rope, hd, out, cases = c.get("rope_parameters") or rope, sizes(c)[2], [], set()
    for f in (rope["rope_theta"] ** (-2 * k / hd) for k in range(hd // 2)):
        if "factor" in rope:
            low, high, factor = (rope[s] for s in ("low_freq_factor", "high_freq_factor", "factor"))
            turns = rope["original_max_position_embeddings"] * f / (2 * math.pi)
            share = (turns - low) / (high - low)
            case = "kept" if turns > high else "divided" if turns < low else "blended"
            f = dict(kept=f, divided=f / factor, blended=share * f + (1 - share) * f / factor)[case]
            cases.add(case)
        out.append(f)
    assert len(cases) in (0, 3), f"{cases} alone do not test the stretching"
    return out


def reference_norm(x, weight, eps):
    means = [sum(v * v for v in row) / len(row) for row in x.tolist()]
    return torch.stack([row / math.sqrt(m + eps) for row, m in zip(x, means, strict=True)]) * weight


def reference_layer(c, w, i, x):
    """Layer i on a whole sequence x (T, D) from position 0 on: no cache, no mask, row by
    row."""
    (H, G, hd), eps, p = sizes(c), c["rms_norm_eps"], f"model.layers.{i}."
    f = torch.tensor(reference_frequencies(c), dtype=torch.float64)
    turn = torch.exp(1j * torch.outer(torch.arange(len(x)), f))
    a, heads = reference_norm(x, w[p + "input_layernorm.weight"], eps), []

    def part(name, j):
        return a @ w[f"{p}self_attn.{name}_proj.weight"][j * hd:(j + 1) * hd].T

    def spin(v):                                       # elements k and k + hd/2: a complex number
        z = torch.complex(v[:, :hd // 2], v[:, hd // 2:]) * turn
        return torch.cat((z.real, z.imag), 1)

    for j in range(H):
        q, k, v = spin(part("q", j)), spin(part("k", j * G // H)), part("v", j * G // H)
        e = [torch.exp(k[:r + 1] @ q[r] / math.sqrt(hd)) for r in range(len(x))]     # rows 0 .. r
        heads.append(torch.stack([e_r @ v[:r + 1] / e_r.sum() for r, e_r in enumerate(e)]))
    x = x + torch.cat(heads, 1) @ w[p + "self_attn.o_proj.weight"].T
    a = reference_norm(x, w[p + "post_attention_layernorm.weight"], eps)
    gate, up = (a @ w[f"{p}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    return x + (gate / (1 + torch.exp(-gate)) * up) @ w[p + "mlp.down_proj.weight"].T


def reference(c, w, ids, skip=(), first=0):
    """-> logits (T, V), h[0..L] (L+1, T, D). Rows from `first` on leave out what is in
    `skip`."""
    h = [w["model.embed_tokens.weight"][ids]]
    for i in range(c["num_hidden_layers"]):
        ran = reference_layer(c, w, i, h[-1])
        h.append(torch.cat((ran[:first], h[-1][first:])) if i in skip else ran)
    head = w["model.embed_tokens.weight" if c.get("tie_word_embeddings") else "lm_head.weight"]
    x = reference_norm(h[-1], w["model.norm.weight"], c["rms_norm_eps"])
    return x @ head.T, torch.stack(h)


def relative_error(got, want):
    got = got.double()
    want = want.double()
    return ((got - want).abs().max() / want.abs().max()).item()


def same(got, want):
    return relative_error(got, want) < 1e-12


def loaded(folder, overrides=None, stored=torch.float32, dtype=torch.float64):
    """(config, weights, the model loaded from them, a cache for IDS and six slots more)."""
    c, w = random_checkpoint(folder, overrides, dtype=stored)
    model = llama.Llama.load(folder, dtype=dtype)
    return c, w, model, model.cache(len(IDS) + 6)


def passes(model, cache, ids, lengths, t=0, skip=()):
    """Logits (T, V) and states (L+1, T, D) of `ids`, from position t on, by passes so
    long."""
    states = []
    for part in ids.split(lengths):
        h = model.forward(part, cache.sequence(t, len(part)), cache, skip)
        states.append(torch.stack(h))
        t += len(part)
    states = torch.cat(states, 1)
    return model.head(states[-1]), states


def worst_error(folder, lengths=(5, 3, 1, 1, 2), **how):
    """The largest relative error of a program: logits and states of prefill, chunk and
    decode; candidates for one token in each layer; the cache entries that those must leave
    alone."""
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
