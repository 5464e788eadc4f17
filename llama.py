"""LLaMA-3 from its published weights: rows, cache, forward pass; then configuration and loading.

**The one idea.** A pass takes T token *rows*. A row does not know whether it is being decoded,
verified or tried out; it is told three things about itself, and one attention routine serves every
pass of the method (`python llama.py` draws them):

    pass                       rows    RoPE position    cache slot written     slots it may read
    decode, draft              1       t                t                      0 .. t
    prefill, verify            T       t, t+1, ...      its own position       0 .. its own
    candidates of the DP       J       t for all        t+1, t+2, ...          0 .. t-1 and its own

The third line is the interesting one: J candidates for the state of the *same* token, none of which
may see another, nor the entry that the full model wrote for that token at slot t (CLaSp §3.6).

Glossary (sizes are in `Config`)
    T, t  rows of a pass; the position of the first
    S     slots of the cache
    W     a pass looks at slots 0 .. W-1 only
    R     query heads that share a key/value head, H / G
    h[i]  the residual stream before layer i: h[0] the embedding, h[L] *before* the final norm
    D     the width of a state (in dp_layer_skip.py `width`, and D the table)
    wide  float32, or the model's dtype if wider: norms, softmax, rotation and logits

The model owns weights and nothing else; `Cache` stores; the caller counts positions. So rolling
back a rejected draft is mere arithmetic: later slots are overwritten before anyone may read them.
Tested against a slow one, written apart (tests/slow_llama.py), and Transformers (gpu/check.py).
"""
from __future__ import annotations

import json
import math
import signal
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")     # nothing here needs it
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from safetensors import SafetensorError, safe_open  # noqa: E402
from torch import Tensor  # noqa: E402


@dataclass(frozen=True)
class Config:
    """What is needed of config.json; in brackets its values in the 8B."""
    L: int                      # num_hidden_layers [32]
    D: int                      # hidden_size [4096]
    H: int                      # num_attention_heads [32]
    G: int                      # num_key_value_heads [8]
    hd: int                     # head_dim [128]; H * hd need not be D
    ffn: int                    # intermediate_size [14336]
    V: int                      # vocab_size [128256]
    eps: float                  # rms_norm_eps [1e-5]
    context: int                # max_position_embeddings [8192]
    tied: bool                  # tie_word_embeddings [False]: the head is the embedding table
    theta: float                # rope_theta [500000]
    scaling: tuple[float, float, float, int] | None     # from 3.1 on: see rope_frequencies


class Rows(NamedTuple):
    """What the T rows of a pass are told about themselves."""
    cos: Tensor                 # (T, 1, hd) rotary table at each row's position
    sin: Tensor                 # (T, 1, hd) likewise, the first half negated (see `rotate`)
    slots: Tensor               # (T,) cache slot that each row writes
    bias: Tensor                # (T, W) added to the row's scores. 0: may read this slot, -inf: not

    def first(self, J: int) -> Rows:
        """The first J of these rows."""
        return Rows(self.cos[:J], self.sin[:J], self.slots[:J], self.bias[:J])


class Cache:
    """Keys and values of S slots for every layer, allocated once: never grown, never copied."""

    def __init__(self, cfg: Config, S: int, device: torch.device, dtype: torch.dtype) -> None:
        # Zeros, not `empty`: a masked slot gets weight 0, and 0 * NaN would still be NaN.
        self.k = torch.zeros(cfg.L, cfg.G, S, cfg.hd, device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)
        self.layers = list(zip(self.k, self.v))        # the same, by layers: (G, S, hd), (G, S, hd)
        self.S = S
        self.all_slots = torch.arange(S, device=device)
        angle = torch.outer(torch.arange(S, dtype=torch.float64), rope_frequencies(cfg))
        cos = torch.cat((angle.cos(), angle.cos()), 1)[:, None]                 # (S, 1, hd)
        sin = torch.cat((-angle.sin(), angle.sin()), 1)[:, None]
        wide = torch.promote_types(dtype, torch.float32)
        self.cos = cos.to(device, wide)
        self.sin = sin.to(device, wide)

    def sequence(self, t: int, T: int) -> Rows:
        """T tokens in a row, the first at position t: decode, draft (T = 1), prefill, verify."""
        assert t + T <= self.S, f"slots {t}..{t + T - 1} in a cache of {self.S}"
        window = self.all_slots[:t + T]                # slots 0 .. W-1
        slots = window[t:]                             # t .. t+T-1, also their positions
        may_read = window <= slots[:, None]                                     # (T, W)
        return self.rows(slots, slots, may_read)

    def candidates(self, t: int, J: int) -> Rows:
        """J candidates for the state of the token at position t (§3.6). Each stands at the token's
        position, writes a slot of its own after it, where no entry is needed yet, and reads its
        own slot and those before the token. The full model's entry for the token stays
        unharmed, and unread: else the token would be seen twice."""
        assert t + J < self.S, f"{J} slots after {t} in a cache of {self.S}"
        window = self.all_slots[:t + 1 + J]
        slots = window[t + 1:]
        may_read = (window < t) | (window == slots[:, None])                    # (J, W)
        position = torch.full_like(slots, t)
        return self.rows(position, slots, may_read)

    def rows(self, position: Tensor, slots: Tensor, may_read: Tensor) -> Rows:
        """(T,), (T,), (T, W) of bool -> Rows, with the rotary table and the bias looked up."""
        bias = torch.zeros_like(may_read, dtype=self.k.dtype).masked_fill(~may_read, -math.inf)
        return Rows(self.cos[position], self.sin[position], slots, bias)


def rope_frequencies(cfg: Config) -> Tensor:
    """theta^(-2k/hd) for k = 0 .. hd/2-1, in radians per position; float64. With scaling = (factor,
    low, high, original), from LLaMA-3.1 on, a frequency with fewer than `low` turns in `original`
    positions is divided by `factor`, one with more than `high` is kept, one between is blended
    linearly."""
    f = cfg.theta ** -(torch.arange(0, cfg.hd, 2, dtype=torch.float64) / cfg.hd)  # (hd/2,)
    if cfg.scaling:
        factor, low, high, original = cfg.scaling
        turns = original * f / (2 * math.pi)                                # (hd/2,)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        f = keep * f + (1 - keep) * f / factor
    return f


class Layer(NamedTuple):
    """One decoder layer's weights; matrices map rows, x @ W. Projections that read the same input
    are one matrix: with few rows the time goes by the number of calls, so it is four, not seven."""
    attn_norm: Tensor           # (D,)
    qkv: Tensor                 # (D, (H + 2G) * hd): queries, keys, values
    out: Tensor                 # (H * hd, D)
    mlp_norm: Tensor            # (D,)
    gate_up: Tensor             # (D, 2 * ffn)
    down: Tensor                # (ffn, D)
    eps: Tensor                 # (), for both norms; its dtype is the wide one


def rms_norm(x: Tensor, weight: Tensor, eps: Tensor) -> Tensor:             # (T, D) -> (T, D)
    """x / sqrt(mean(x^2) + eps), in the dtype of eps (wide); then times weight, in that of x. eps
    is a tensor, since with a Python number small calls on a CPU take twice as long."""
    x_wide = x.type(eps.dtype)                         # as .to, in half the time
    squares = x_wide.square().sum(-1, keepdim=True)
    under_root = torch.add(eps, squares, alpha=1 / x.shape[-1])      # mean(x^2) + eps, in one call
    return (x_wide * under_root.rsqrt()).type(x.dtype) * weight


def rotate(x: Tensor, rows: Rows) -> Tensor:                                # (T, heads, hd)
    """Rotary embedding, Hugging Face's layout: element k turns with element k + hd/2. Rolling by
    half a head brings each to its partner's place; the sign that one of the two needs is in the
    table. (Meta's files interleave the pairs: with the wrong layout the text just gets worse.)"""
    partner = x.roll(x.shape[-1] // 2, -1)
    return (x * rows.cos + partner * rows.sin).type(x.dtype)


def attention(w: Layer, x: Tensor, rows: Rows, keys: Tensor, values: Tensor, cfg: Config
              ) -> Tensor:                                                  # (T, D) -> (T, D)
    """What attention adds to the residual stream. keys, values (G, S, hd) are the layer's part of
    the cache: the rows write their slots, then read what they may."""
    T = len(x)
    W = rows.bias.shape[-1]
    R = cfg.H // cfg.G
    heads = (rms_norm(x, w.attn_norm, w.eps) @ w.qkv).view(T, cfg.H + 2 * cfg.G, cfg.hd)
    rotated = rotate(heads[:, :cfg.H + cfg.G], rows)                        # queries and keys
    keys.index_copy_(1, rows.slots, rotated[:, cfg.H:].transpose(0, 1))
    values.index_copy_(1, rows.slots, heads[:, cfg.H + cfg.G:].transpose(0, 1))
    # The R query heads that share a kv head are stacked as rows of one product, so grouped queries
    # need neither copies of K and V nor a kernel that knows about them.
    q = rotated[:, :cfg.H].reshape(T, cfg.G, R, cfg.hd).transpose(0, 1)     # (G, T, R, hd)
    q = q.reshape(cfg.G, T * R, cfg.hd)
    product = torch.bmm(q, keys[:, :W].transpose(1, 2)).view(cfg.G, T, R, W)
    # bias + q.k / sqrt(hd), with one bias (T, 1, W) for all heads
    score = torch.add(rows.bias[:, None], product, alpha=cfg.hd ** -0.5)    # (G, T, R, W)
    weight = score.softmax(-1, dtype=w.eps.dtype).type(x.dtype)             # only inside wide
    mixed = torch.bmm(weight.view(cfg.G, T * R, W), values[:, :W])          # (G, T*R, hd)
    mixed = mixed.view(cfg.G, T, R, cfg.hd).transpose(0, 1).reshape(T, cfg.H * cfg.hd)
    return mixed @ w.out


def feed_forward(w: Layer, x: Tensor) -> Tensor:                            # (T, D) -> (T, D)
    """What the feed-forward part (SwiGLU) adds to the residual stream."""
    gate, up = (rms_norm(x, w.mlp_norm, w.eps) @ w.gate_up).chunk(2, -1)    # (T, ffn) each
    return (F.silu(gate) * up) @ w.down


def decoder_layer(w: Layer, x: Tensor, rows: Rows, keys: Tensor, values: Tensor, cfg: Config
                  ) -> Tensor:                                              # (T, D) -> (T, D)
    """f_i: attention, then feed-forward, each added to the residual stream x. A plain function of
    tensors, so that gpu/ can compile it."""
    x = x + attention(w, x, rows, keys, values, cfg)
    return x + feed_forward(w, x)


class Llama:
    """Weights and what uses them. No pass changes it, so that one model serves many caches."""

    def __init__(self, cfg: Config, embed: Tensor, layers: list[Layer], norm: Tensor,
                 lm_head: Tensor) -> None:
        self.cfg = cfg
        self.embed = embed                             # (V, D)
        self.layers = layers
        self.norm = norm                               # (D,)
        self.lm_head = lm_head                         # (V, D)
        self.device = embed.device
        self.dtype = embed.dtype
        self.eps = layers[0].eps                       # the same in all
        self.block = decoder_layer                     # gpu/ sets its own: compiled, of a share

    def cache(self, S: int) -> Cache:
        """A cache of S slots for one run: prompt, new tokens, and scratch slots after them."""
        return Cache(self.cfg, S, self.device, self.dtype)

    def forward(self, ids: Tensor, rows: Rows, cache: Cache, skip: Sequence[bool] = ()
                ) -> list[Tensor]:
        """(T,) ids -> the states h[0..L], (T, D) each. skip[i] leaves layer i out; () is the full
        model. `head(h[L])` are the logits."""
        h = [F.embedding(ids, self.embed)]                                  # (T, D)
        for i in range(self.cfg.L):
            if skip and skip[i]:
                # h passes unchanged. The hole in this layer's cache is never read: a whole draft
                # skips the same layers, and the verify fills it.
                h.append(h[i])
            else:
                h.append(self.layer(i, h[i], rows, cache))
        return h

    def layer(self, i: int, x: Tensor, rows: Rows, cache: Cache) -> Tensor:       # (T, D) -> (T, D)
        """The whole decoder layer i: h[i+1] = f_i(h[i]). Writes the rows' keys and values."""
        keys, values = cache.layers[i]
        return self.block(self.layers[i], x, rows, keys, values, self.cfg)

    def head(self, x: Tensor) -> Tensor:                                    # (T, D) -> (T, V)
        """h[L] -> logits, computed in the model's dtype, then widened to float32 or more."""
        logits = F.linear(rms_norm(x, self.norm, self.eps), self.lm_head)
        return logits.type(self.eps.dtype)

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu",
             dtype: torch.dtype | None = None, part: Callable = lambda name, x: x) -> Llama:
        """Read a Hugging Face folder, tensor by tensor, to `device` in `dtype` (default: bfloat16
        on a GPU, else float32). part(name, tensor) gets each whole tensor, already checked, and
        returns it or one GPU's share of it (gpu/ranks.py). Raises ModelError."""
        cfg = read_config(folder)
        device = torch.device(device)
        dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        return cls(cfg, *read_weights(Path(folder), cfg, device, dtype, part))


# ---------------------------------------------------------------------------- files of a model

INDEX = "model.safetensors.index.json"


class ModelError(Exception):
    """What is wrong with a model folder or with what is asked of it, in one line for its user."""


def read_weights(folder: Path, cfg: Config, device: torch.device, dtype: torch.dtype, part: Callable
                 ) -> tuple[Tensor, list[Layer], Tensor, Tensor]:
    """Embedding, layers, norm and head, for `Llama.load`. Every tensor of the files is used exactly
    once. Raises ModelError."""
    unused = tensors(folder)
    if cfg.tied and "lm_head.weight" in unused:        # tied files hold one, the other or both
        other = unused.pop("lm_head.weight")
        kept = unused.setdefault("model.embed_tokens.weight", other)
        if not kept.equal(other):
            raise ModelError(f"{folder}: lm_head.weight differs from model.embed_tokens.weight "
                             "though config.json ties them")

    eps = torch.tensor(cfg.eps, device=device, dtype=torch.promote_types(dtype, torch.float32))

    def take(name: str, *shape: int) -> Tensor:
        name += ".weight"
        if name not in unused:
            raise ModelError(f"{folder}: the weights lack {name}")
        got = unused.pop(name)
        if got.shape != shape or not got.is_floating_point():
            raise ModelError(f"{folder}: {name} has {got.dtype}, shape {list(got.shape)}; by "
                             f"config.json these are floats of shape {list(shape)}")
        return part(name, got).to(device, dtype, copy=True)     # a copy, not a view of the file

    def matrix(prefix: str, n_in: int, **n_out: int) -> Tensor:
        """matrix("x", D, k=a, v=b) -> (D, a + b): x.k_proj and x.v_proj, stacked and transposed."""
        w = torch.cat([take(f"{prefix}.{proj}_proj", n, n_in) for proj, n in n_out.items()])
        # w.t() is a view. In float32 on a CPU x @ W is faster with a copy, elsewhere not.
        return w.t().contiguous() if device.type == "cpu" and dtype == torch.float32 else w.t()

    def layer_weights(at: str) -> Layer:
        heads = cfg.H * cfg.hd
        kv = cfg.G * cfg.hd
        return Layer(attn_norm=take(f"{at}.input_layernorm", cfg.D),
                     qkv=matrix(f"{at}.self_attn", cfg.D, q=heads, k=kv, v=kv),
                     out=matrix(f"{at}.self_attn", heads, o=cfg.D),
                     mlp_norm=take(f"{at}.post_attention_layernorm", cfg.D),
                     gate_up=matrix(f"{at}.mlp", cfg.D, gate=cfg.ffn, up=cfg.ffn),
                     down=matrix(f"{at}.mlp", cfg.ffn, down=cfg.D), eps=eps)

    embed = take("model.embed_tokens", cfg.V, cfg.D)
    layers = [layer_weights(f"model.layers.{i}") for i in range(cfg.L)]
    norm = take("model.norm", cfg.D)
    lm_head = embed if cfg.tied else take("lm_head", cfg.V, cfg.D)
    if unused:
        raise ModelError(f"{folder}: {len(unused)} weights too many, such as {min(unused)}")
    return embed, layers, norm, lm_head


def read_config(folder: str | Path) -> Config:
    """Read `folder`/config.json, of Transformers 4 or 5. What is not implemented is refused by
    name: a setting silently ignored gives a model silently wrong. Raises ModelError."""
    path = Path(folder) / "config.json"
    given = {key: v for key, v in read_json(path).items() if v is not None}     # null: not given
    # Transformers 4 has rope_theta beside rope_scaling, 5 has all in rope_parameters. To read the
    # old spelling alone would give a new file theta 10000.
    for name in ("rope_scaling", "rope_parameters"):
        rope = given.get(name, {})
        if not isinstance(rope, dict):
            raise ModelError(f"{path}: {name} = {rope!r} is not supported (LLaMA-3 only)")
        given.update(rope)                             # its keys beside the others
    # Older files say "type". A factor without a type is "unnamed", which is refused below.
    fallback = "unnamed" if "factor" in given else "default"
    given.setdefault("rope_type", given.get("type", fallback))
    supported = dict(                                  # allowed, if a key is given; of []: nothing
        architectures=[["LlamaForCausalLM"]], model_type=["llama"], hidden_act=["silu"],
        mlp_bias=[False], attention_bias=[False], tie_word_embeddings=[True, False],
        rope_type=["default", "llama3"], partial_rotary_factor=[1], quantization_config=[])
    for key, values in supported.items():
        if key in given and given[key] not in values:
            raise ModelError(f"{path}: {key} = {given[key]!r} is not supported (LLaMA-3 only)")

    def number(key: str, default: float | None = None, kind: type = int) -> Any:
        value = given.get(key, default)
        # type(), not isinstance: JSON's true would pass as an int.
        if type(value) not in (int, float) or not 0 < value < 1e15 or kind(value) != value:
            whole = "whole " if kind is int else ""
            raise ModelError(f"{path}: {key} is {str(value)[:20]}, not a {whole}number above 0")
        return kind(value)

    scaling = None
    if given["rope_type"] == "llama3":
        scaling = (number("factor", kind=float), number("low_freq_factor", kind=float),
                   number("high_freq_factor", kind=float),
                   number("original_max_position_embeddings"))
    D = number("hidden_size")
    H = number("num_attention_heads")
    cfg = Config(L=number("num_hidden_layers"), D=D, H=H, G=number("num_key_value_heads", H),
                 hd=number("head_dim", D // H), ffn=number("intermediate_size"),
                 V=number("vocab_size"), eps=number("rms_norm_eps", 1e-6, float),
                 context=number("max_position_embeddings", 2048),
                 tied=given.get("tie_word_embeddings", False),
                 theta=number("rope_theta", 1e4, float), scaling=scaling)
    if cfg.H % cfg.G or cfg.hd % 2 or (scaling and scaling[1] >= scaling[2]):  # low, high
        raise ModelError(f"{path}: sizes that do not fit together: {cfg}")
    return cfg


def read_json(path: Path) -> dict:
    """A file with one JSON object. Raises ModelError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        why = getattr(e, "strerror", None) or e
        raise ModelError(f"{path}: cannot be read as a JSON object: {why}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: cannot be read as a JSON object: it is a {type(value).__name__}")
    return value


def weight_files(folder: Path) -> tuple[list[str], dict[str, str]]:
    """model.safetensors or, without one, the shards that an index names; and in which of them each
    tensor counts, {} without an index. Raises ModelError."""
    index = folder / INDEX
    if (folder / "model.safetensors").exists() or not index.exists():
        return ["model.safetensors"], {}
    shard_of = read_json(index).get("weight_map", {})
    if not isinstance(shard_of, dict) or any(type(f) is not str for f in shard_of.values()):
        raise ModelError(f"{index}: weight_map does not say where tensors are")
    return sorted(set(shard_of.values())), shard_of


def tensors(folder: Path) -> dict[str, Tensor]:
    """The weights by name. The files are mapped into memory, and read when a tensor is used. Raises
    ModelError."""
    files, shard_of = weight_files(folder)
    found = {}
    for file in files:
        try:
            weights = safe_open(folder / file, framework="pt")
        except (SafetensorError, OSError) as e:
            raise ModelError(f"{folder / file}: missing, broken or cut short: {e}") from None
        for name in weights.keys():
            # A tensor that the index names is taken from that shard alone, any other from wherever
            # it lies. inv_freq (of old files) is computed here.
            if shard_of.get(name, file) == file and not name.endswith("rotary_emb.inv_freq"):
                found[name] = weights.get_tensor(name)
    return found


def main() -> None:
    """Draw the rows of the three kinds of pass."""
    cfg = Config(L=1, D=8, H=1, G=1, hd=8, ffn=8, V=1, eps=1e-5, context=12, tied=True, theta=1e4,
                 scaling=None)
    cache = Cache(cfg, 12, torch.device("cpu"), torch.float32)
    print("w: the row writes and reads this slot. #: it may read it. .: it may not. 0 .. 5: text.")
    for title, position, rows in (
            ("decode, draft: the token at position 6", [6], cache.sequence(6, 1)),
            ("verify: that token and four drafted ones", range(6, 11), cache.sequence(6, 5)),
            ("five candidates of the DP for the token at 6", [6] * 5, cache.candidates(6, 5))):
        print(f"\n{title}\n  position   slot " + "".join(f"{s:3}" for s in range(cache.S)))
        for t, slot, bias in zip(position, rows.slots.tolist(), rows.bias.tolist()):
            marks = ("w" if s == slot else "#" if b == 0 else "." for s, b in enumerate(bias))
            print(f"  {t:8} {slot:6}   " + "  ".join(marks))


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):                     # a closed pipe ends it without a word
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    main()
