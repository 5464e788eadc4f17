"""LLaMA-3 from its published weights: configuration, cache, forward pass, loading. Batch of one.

**The one idea.** A pass takes T token *rows*. A row does not know whether it is being decoded,
verified or tried out; it is told three things about itself, and one attention routine serves every
pass of the method (`python llama.py` draws them):

    pass                       rows    RoPE position    cache slot written     slots it may read
    decode, draft              1       t                t                      0 .. t
    prefill, verify            T       t, t+1, ...      its own position       0 .. its own
    candidates of the DP       J       t for all        t+1, t+2, ...          0 .. t-1 and its own

The third line is the interesting one: J candidates for the state of the *same* token, none of which
may see another, nor the entry that the full model wrote for that token at slot t (CLaSp §3.6,
"sequence parallel" with a specialised mask).

Glossary (8B in brackets)
    L    decoder layers [32]                D     width of the residual stream [4096]
    H    query heads [32]                   G     key/value heads [8], each for R = H / G of them
    hd   head size [128]                    V     vocabulary [128256]
    T    rows of a pass, the first at t     S     slots of the cache; n <= S of them are looked at
    h[i] the residual stream before layer i: h[0] the embedding, h[L] *before* the final norm

The model owns weights and nothing else; `Cache` stores; the caller counts positions. To roll back a
rejected draft is therefore arithmetic: what lies behind is overwritten before anyone may read it.
"""
import json
import math
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


class ModelError(Exception):
    """What is wrong with a model folder or with what is asked of it, in one line for its user."""


@dataclass(frozen=True)
class Config:
    """What the forward pass needs of config.json; in brackets its values in the 8B."""
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
    scaling: tuple[float, float, float, int] | None     # LLaMA-3.1: factor, low, high, original
    total = staticmethod(lambda x: x)   # of parts of a sum; gpu/parallel.py has another

    @classmethod
    def load(cls, folder: str | Path) -> "Config":
        """Read `folder`/config.json, of Transformers 4 or 5. What is not implemented is refused by
        name: a setting silently ignored gives a model silently wrong. Raises ModelError."""
        path = Path(folder) / "config.json"
        c = {key: v for key, v in read_json(path).items() if v is not None}  # null is "not given"
        # 4 has rope_theta beside rope_scaling, whose rope_type was once called type; 5 has all in
        # rope_parameters. Reading the old spelling alone would give a new file theta 10000.
        for part in (c.get("rope_scaling", {}), c.get("rope_parameters", {})):
            c |= part if isinstance(part, dict) else {"rope_type": part}
        c.setdefault("rope_type", c.get("type", None if "factor" in c else "default"))
        only = dict(architectures=[["LlamaForCausalLM"]], model_type=["llama"], mlp_bias=[False],
                    hidden_act=["silu"], attention_bias=[False], tie_word_embeddings=[True, False],
                    rope_type=["default", "llama3"], partial_rotary_factor=[1],
                    quantization_config=[])
        for key, value in {"model_type": None, **c}.items():
            if value not in only.get(key, [value]):
                raise ModelError(f"{path}: {key} = {value!r} is not supported (LLaMA-3 only)")

        def number(key: str, default: float | None = None, kind: type = int) -> Any:
            value = c.get(key, default)                # JSON's true is no number
            if type(value) not in (int, float) or not 0 < value < 1e15 or kind(value) != value:
                raise ModelError(f"{path}: {key} is {str(value)[:20]}, not a number above 0")
            return kind(value)

        H, D = number("num_attention_heads"), number("hidden_size")
        scaling = c["rope_type"] == "llama3" and (
            *(number(k, kind=float) for k in ("factor", "low_freq_factor", "high_freq_factor")),
            number("original_max_position_embeddings"))
        cfg = cls(L=number("num_hidden_layers"), D=D, H=H, G=number("num_key_value_heads", H),
                  hd=number("head_dim", D // H), ffn=number("intermediate_size"),
                  V=number("vocab_size"), eps=number("rms_norm_eps", 1e-6, float),
                  context=number("max_position_embeddings", 2048), scaling=scaling or None,
                  tied=c.get("tie_word_embeddings", False), theta=number("rope_theta", 1e4, float))
        if cfg.H % cfg.G or cfg.hd % 2 or scaling and scaling[1] >= scaling[2]:
            raise ModelError(f"{path}: sizes that do not fit together: {cfg}")
        return cfg


def read_json(path: Path) -> dict:
    """A file with one JSON object; whatever is wrong with it as a ModelError."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as e:
        raise ModelError(f"{path}: cannot be read as a JSON object: {e}") from None


class Rows(NamedTuple):
    """What the T rows of a pass are told about themselves."""
    cos: Tensor                 # (T, 1, hd) rotary table at each row's position
    sin: Tensor                 # (T, 1, hd) likewise, the first half negated (see `rotate`)
    slots: Tensor               # (T,) cache slot that each row writes
    bias: Tensor                # (T*R, n) added to the scores of a row's R query heads that share a
                                #          kv head. 0: may read this slot, -inf: may not


class Cache:
    """Keys and values of S slots for every layer, allocated once: never grown, never copied."""

    def __init__(self, cfg: Config, S: int, device: torch.device, dtype: torch.dtype) -> None:
        # Zeros, not `empty`: a masked slot gets weight 0, and 0 * NaN would still be NaN.
        self.k = torch.zeros(cfg.L, cfg.G, S, cfg.hd, device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)
        self.layers = list(zip(self.k, self.v))                     # L times (G, S, hd), (G, S, hd)
        self.S, self.R = S, cfg.H // cfg.G
        wide = torch.promote_types(dtype, torch.float32)
        angle = torch.outer(torch.arange(S, dtype=torch.float64), rope_frequencies(cfg))
        self.cos = torch.cat((angle.cos(), angle.cos()), 1)[:, None].to(device, wide)   # (S, 1, hd)
        self.sin = torch.cat((-angle.sin(), angle.sin()), 1)[:, None].to(device, wide)
        self.slot = torch.arange(S, device=device)
        self.zero, self.hidden = torch.tensor([0.0, -math.inf], device=device, dtype=dtype)

    def sequence(self, t: int, T: int) -> Rows:
        """T tokens in a row, the first at position t: decode, draft (T = 1), prefill, verify."""
        assert t + T <= self.S, f"slots {t}..{t + T - 1} in a cache of {self.S}"
        slots = self.slot[t:t + T]
        # Row r sits at position t + r, so it may read slots 0 .. t + r. Without the t the mask is
        # right in prefill and wrong ever after, and nothing crashes: the text just gets worse.
        return self.rows(slots, slots, self.slot[:t + T] <= slots[:, None])

    def candidates(self, t: int, J: int, r: int = 1) -> Rows:
        """J candidates for the states of the r tokens up to position t (§3.6; there r = 1), those
        of one candidate beside one another. Each has its token's position, writes a scratch slot
        behind t, and reads the slots before its token and its own. So the full model's entry for
        the token is neither read, or the token would be seen twice, nor harmed."""
        assert r <= t + 1 and t + J * r < self.S, f"{J} x {r} slots behind {t} of {self.S}"
        position, seen = self.slot[t - r + 1:t + 1].repeat(J)[:, None], self.slot[:t + 1 + J * r]
        slots = seen[t + 1:]
        return self.rows(position[:, 0], slots, (seen < position) | (seen == slots[:, None]))

    def rows(self, position: Tensor, slots: Tensor, may_read: Tensor) -> Rows:
        """(T,), (T,), (T, n) of bool -> the rows that are told so."""
        bias = torch.where(may_read, self.zero, self.hidden)
        return Rows(self.cos.index_select(0, position), self.sin.index_select(0, position), slots,
                    bias.repeat_interleave(self.R, 0))                          # (T, n) -> (T*R, n)


def rope_frequencies(cfg: Config) -> Tensor:
    """theta^(-2k/hd) for k = 0 .. hd/2-1, in radians per position; float64. LLaMA-3.1 and later
    divide those of wavelength above original/low by `factor`, keep those below original/high, and
    blend the two between them, linearly in original/wavelength."""
    f = cfg.theta ** -(torch.arange(0, cfg.hd, 2, dtype=torch.float64) / cfg.hd)           # (hd/2,)
    if cfg.scaling:
        factor, low, high, original = cfg.scaling
        keep = ((original * f / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        f = keep * f + (1 - keep) * f / factor
    return f


class Layer(NamedTuple):
    """One decoder layer's weights; matrices map rows, x @ W. Projections that read the same input
    are one matrix: a pass of few rows is mostly the overhead of its calls, and this saves three."""
    attn_norm: Tensor           # (D,)
    qkv: Tensor                 # (D, (H + 2G) * hd): queries, keys, values
    out: Tensor                 # (H * hd, D)
    mlp_norm: Tensor            # (D,)
    gate_up: Tensor             # (D, 2 * ffn)
    down: Tensor                # (ffn, D)


def rms_norm(x: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, the statistics in eps's dtype, float32 or wider. (The
    mean is a sum times alpha: one small call less, of which there are 65 in a step of the demo.)"""
    wide = x.type(eps.dtype)
    mean = torch.add(eps, wide.square().sum(-1, keepdim=True), alpha=1 / x.shape[-1])
    return (wide * mean.rsqrt()).type(x.dtype) * weight


def rotate(x: Tensor, rows: Rows) -> Tensor:                                # (T, heads, hd)
    """Rotary embedding, Hugging Face's layout: element k turns with element k + hd/2. Rolling by
    half a head brings each to its partner's place; the sign that one of the two needs lives in the
    table. (Meta's files interleave the pairs: the wrong layout does not crash, it writes worse.)"""
    return (x * rows.cos + x.roll(x.shape[-1] // 2, -1) * rows.sin).type(x.dtype)


def decoder_layer(w: Layer, x: Tensor, rows: Rows, keys: Tensor, values: Tensor, c: Config,
                  eps: Tensor) -> Tensor:                                         # (T, D) -> (T, D)
    """Attention, then the feed-forward part, each added to the residual stream x. keys, values
    (G, S, hd): the layer's part of the cache. c.total: the sum over GPUs, of one the sum itself."""
    T, R, n = len(x), c.H // c.G, rows.bias.shape[-1]
    a = (rms_norm(x, w.attn_norm, eps) @ w.qkv).view(T, c.H + 2 * c.G, c.hd)
    qk, v = rotate(a[:, :c.H + c.G], rows), a[:, c.H + c.G:]                # the heads: H + G | G
    q, k = qk[:, :c.H], qk[:, c.H:]
    keys.index_copy_(1, rows.slots, k.transpose(0, 1))
    values.index_copy_(1, rows.slots, v.transpose(0, 1))
    # The R query heads that share a kv head become rows of one product with it, so grouped queries
    # need neither copies of K and V nor a kernel that knows about them:
    # q (T, H, hd) -> (G, T*R, hd), score (G, T*R, n).
    q = q.reshape(T, c.G, R, c.hd).transpose(0, 1).reshape(c.G, T * R, c.hd)
    score = torch.baddbmm(rows.bias, q, keys[:, :n].transpose(1, 2), alpha=c.hd ** -0.5)
    weight = score.softmax(-1, dtype=eps.dtype).type(x.dtype)
    a = torch.bmm(weight, values[:, :n])                                    # (G, T*R, hd)
    a = a.view(c.G, T, R, c.hd).transpose(0, 1).reshape(T, c.H * c.hd)      # -> (T, H*hd)
    x = x + c.total(a @ w.out)

    gate, up = (rms_norm(x, w.mlp_norm, eps) @ w.gate_up).chunk(2, -1)
    return x + c.total((F.silu(gate) * up) @ w.down)


class Llama:
    """Weights and what uses them. Nothing changes after loading: one model serves many caches."""

    def __init__(self, cfg: Config, embed: Tensor, layers: list[Layer], norm: Tensor,
                 head: Tensor) -> None:
        self.cfg, self.embed, self.layers, self.norm, self.lm_head = cfg, embed, layers, norm, head
        self.device, self.dtype = embed.device, embed.dtype
        wide = torch.promote_types(self.dtype, torch.float32)       # of norms, softmax, logits
        self.eps = torch.tensor(cfg.eps, device=self.device, dtype=wide)
        self.block = decoder_layer                     # or the same function, compiled

    def cache(self, S: int) -> Cache:
        """A cache of S slots for one run: prompt, new tokens, and the scratch slots behind them."""
        return Cache(self.cfg, S, self.device, self.dtype)

    def forward(self, ids: Tensor, rows: Rows, cache: Cache, skip: Sequence[bool] = (),
                last: int = 1, states: bool = False) -> tuple[Tensor, Tensor | None]:
        """(T,) ids -> of the last `last` rows the logits (last, V) and, if asked for, the states
        h[0..L] (L+1, last, D). skip[i] leaves layer i out; () is the full model."""
        h, tail = [F.embedding(ids, self.embed)], slice(len(ids) - last, None)             # (T, D)
        for i in range(self.cfg.L):
            # Past a skipped layer the residual stream flows on. Its cache keeps a hole at these
            # slots, which is safe: a verify runs every layer over them before anyone reads there.
            h.append(h[i] if skip and skip[i] else self.layer(i, h[i], rows, cache))
        return self.head(h[-1][tail]), torch.stack([x[tail] for x in h]) if states else None

    def layer(self, i: int, x: Tensor, rows: Rows, cache: Cache) -> Tensor:       # (T, D) -> (T, D)
        """f_i, the whole decoder layer i: h[i+1] = f_i(h[i]). Writes the rows' keys and values."""
        if (n := len(rows.slots)) > len(x):            # the DP begins with few of its candidates
            rows = Rows(*(part[:len(part) * len(x) // n] for part in rows))
        return self.block(self.layers[i], x, rows, *cache.layers[i], self.cfg, self.eps)

    def head(self, x: Tensor) -> Tensor:                                    # (T, D) -> (T, V)
        """h[L] -> logits, computed in the model's dtype, then widened to float32 or more."""
        return F.linear(rms_norm(x, self.norm, self.eps), self.lm_head).type(self.eps.dtype)

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu",
             dtype: torch.dtype | None = None, part: Callable = lambda name, x: x) -> "Llama":
        """Read a Hugging Face folder with one file of weights or shards, tensor by tensor, to
        `device` in `dtype` (default: bfloat16 on a GPU, else float32); every tensor is used exactly
        once, or `part(name, tensor)` of it. Raises ModelError."""
        c, device = Config.load(folder), torch.device(device)
        dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        left, qh, kh = tensors(Path(folder)), c.H * c.hd, c.G * c.hd

        def take(name: str, *shape: int) -> Tensor:
            if name not in left:
                raise ModelError(f"{folder}: the weights lack {name}")
            got = left.pop(name).get_tensor(name)
            if got.shape != shape or not got.is_floating_point():
                raise ModelError(f"{folder}: {name} has {got.dtype}, shape {list(got.shape)}; by "
                                 f"config.json these are floats of shape {list(shape)}")
            got = part(name, got).to(device, dtype, copy=True)     # away from the memory map
            if not torch.stack(got.aminmax()).isfinite().all():
                raise ModelError(f"{folder}: {name} holds values that are not finite numbers")
            return got

        def matrix(n_in: int, prefix: str, **n_out: int) -> Tensor:
            """Projections that read the same input as one matrix, (n_in, all n_out)."""
            w = torch.cat([take(f"{prefix}.{x}_proj.weight", n, n_in) for x, n in n_out.items()])
            # Files hold (out, in). In float32 on a CPU (in, out) is read faster, elsewhere not.
            return w.t().contiguous() if device.type == "cpu" and dtype == torch.float32 else w.t()

        embed, norm = take("model.embed_tokens.weight", c.V, c.D), take("model.norm.weight", c.D)
        layers = [Layer(take(p + "input_layernorm.weight", c.D),
                        matrix(c.D, p + "self_attn", q=qh, k=kh, v=kh),
                        matrix(qh, p + "self_attn", o=c.D),
                        take(p + "post_attention_layernorm.weight", c.D),
                        matrix(c.D, p + "mlp", gate=c.ffn, up=c.ffn),
                        matrix(c.ffn, p + "mlp", down=c.D))
                  for p in (f"model.layers.{i}." for i in range(c.L))]
        head = embed if c.tied else take("lm_head.weight", c.V, c.D)
        if left:
            raise ModelError(f"{folder}: {len(left)} weights too many, such as {min(left)}")
        return cls(c, embed, layers, norm, head)


def tensors(folder: Path) -> dict[str, safe_open]:
    """name -> the memory-mapped file with it: model.safetensors, or the shards of an index."""
    index, paths, out = folder / "model.safetensors.index.json", [folder / "model.safetensors"], {}
    if index.exists() and not paths[0].exists():
        paths = sorted({folder / file for file in read_json(index).get("weight_map", {}).values()})
    for path in paths:
        try:
            file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as e:
            raise ModelError(f"{path}: missing, broken or cut short: {e}") from None
        # Checkpoints from before 2024 carry the rotary frequencies, which follow from config.json.
        out |= {name: file for name in file.keys() if not name.endswith("rotary_emb.inv_freq")}
    return out


def main() -> None:
    """Draw the rows of the three kinds of pass."""
    t, cache = 6, Cache(Config(1, 8, 1, 1, 8, 8, 1, 1e-5, 12, True, 1e4, None), 12,
                        torch.device("cpu"), torch.float32)
    print("w: the row writes and reads this slot. #: it may read it. .: it may not. 0 .. 5: text.")
    for title, position, rows in (
            ("decode, draft: the token at position 6", [t], cache.sequence(t, 1)),
            ("verify: that token and four drafted ones", range(t, t + 5), cache.sequence(t, 5)),
            ("five candidates of the DP for the token at 6", [t] * 5, cache.candidates(t, 5))):
        print(f"\n{title}\n  position   slot " + "".join(f"{s:3}" for s in range(cache.S)))
        for at, slot, bias in zip(position, rows.slots.tolist(), rows.bias.tolist()):
            marks = ("w" if s == slot else "#" if b == 0 else "." for s, b in enumerate(bias))
            print(f"  {at:8} {slot:6}   " + "  ".join(marks))


if __name__ == "__main__":
    main()
