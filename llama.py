"""LLaMA-3 from its published weights: configuration, loading, tokenizer, forward pass. Batch of
one, no training.

**The one idea.** A pass takes T token *rows*. A row does not know whether it is being decoded,
verified or tried out; it is told three things about itself, and one attention routine serves every
pass of the method:

    pass                         T      RoPE position    cache slot written      slots it may read
    decode, draft                1      t                t                       0 .. t
    prefill, verify              any    t, t+1, ...      its own position        0 .. its own
    candidates of the DP         J      t for all        scratch: t+1, t+2 ..  0 .. t-1 and its own

The third line is the interesting one: J versions of the *same* token, none of which may see
another, nor the entry that the full model wrote for that token at slot t (CLaSp §3.6, "sequence
parallel" with a specialised mask).

Glossary (8B in brackets)
    L    decoder layers [32]                D     width of the residual stream [4096]
    H    query heads [32]                   G     key/value heads [8], each for R = H / G of them
    hd   head size [128]                    V     vocabulary [128256]
    T    rows of a pass, the first at t     S     slots of the cache; n <= S of them are looked at
    J    versions of one token: the DP's candidates, of which there are at most M in a call
    h[i] residual stream before layer i: h[0] the embedding, h[L] the last layer's output *before*
    the final norm

Who owns what: the model owns weights and nothing else; `Cache` stores; the caller counts positions.
To roll back a refused draft is therefore arithmetic on an integer: whatever lies behind it will be
overwritten before anyone may read it.
"""
import base64
import copy
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tiktoken
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor


Progress = Callable[[int, int], None]                                 # (bytes done, bytes in all)


class ModelError(Exception):
    """What is wrong with a model folder or with what is asked of it, in one line for its user."""


# ------------------------------------------------------------------------------ configuration

@dataclass(frozen=True)
class Config:
    """The numbers of config.json that the forward pass needs; in brackets their values in the 8B
    model."""
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

    @classmethod
    def load(cls, folder: str | Path) -> "Config":
        """Read `folder`/config.json as Transformers 4.x or 5.x writes it. What this file does not
        implement is refused by name: a setting that is silently ignored gives a model that is
        silently wrong."""
        path = Path(folder) / "config.json"
        c = _read_json(path)

        def refuse(what: str) -> None:
            raise ModelError(f"{path}: {what} is not supported (this is LLaMA-3 only)")

        kinds = c.get("architectures") or ["LlamaForCausalLM"]
        if c.get("model_type") != "llama" or kinds != ["LlamaForCausalLM"]:
            refuse(f"model_type {c.get('model_type')!r}, architectures {kinds}")
        if c.get("quantization_config"):
            refuse("quantization_config (quantised weights)")
        for key, only in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
            if c.get(key, only) != only:
                refuse(f"{key} = {c[key]!r}")
        # 4.x: rope_theta beside rope_scaling (null, or with its kind under "rope_type", once
        # "type"); 5.x: all in rope_parameters. Reading only the old spelling would give a 5.x file
        # theta 10000, unnoticed.
        rope = {"rope_theta": c.get("rope_theta", 10000.0)}
        for key in ("rope_scaling", "rope_parameters"):
            if not isinstance(c.get(key) or {}, dict):
                refuse(f"{key} = {c[key]!r}")
            rope |= c.get(key) or {}
        kind = rope.get("rope_type", rope.get("type", None if "factor" in rope else "default"))
        if kind not in ("default", "llama3") or any(isinstance(v, dict) for v in rope.values()):
            refuse(f"rope type {kind!r} of {rope}")
        if rope.get("partial_rotary_factor", c.get("partial_rotary_factor", 1)) != 1:
            refuse("partial_rotary_factor")

        def number(key: str, kind: type = int, default: float | None = None, of: dict = c) -> Any:
            value = default if of.get(key) is None else of[key]        # null is "not given"
            if value is None:
                raise ModelError(f"{path}: '{key}' is missing")
            if type(value) not in (int, float) or not 0 < value < 2 ** 53 or kind(value) != value:
                raise ModelError(f"{path}: a number was expected for {key}, above 0 and of "
                                 f"reasonable size, not {str(value)[:20]!r}")
            return kind(value)

        H, D = number("num_attention_heads"), number("hidden_size")
        tied = c.get("tie_word_embeddings")
        if tied not in (None, True, False):
            refuse(f"tie_word_embeddings = {tied!r}")
        scaling = kind == "llama3" and (
            *(number(k, float, of=rope) for k in ("factor", "low_freq_factor", "high_freq_factor")),
            number("original_max_position_embeddings", of=rope))
        cfg = cls(L=number("num_hidden_layers"), D=D, H=H,
                  G=number("num_key_value_heads", default=H),
                  hd=number("head_dim", default=D // H or None),
                  ffn=number("intermediate_size"), V=number("vocab_size"),
                  eps=number("rms_norm_eps", float, 1e-6),
                  context=number("max_position_embeddings", default=2048), tied=bool(tied),
                  theta=number("rope_theta", float, of=rope), scaling=scaling or None)
        if cfg.H % cfg.G or cfg.hd % 2 or scaling and scaling[1] >= scaling[2]:
            raise ModelError(f"{path}: sizes that do not fit together: {cfg}")
        return cfg


def _read_json(path: Path) -> dict:
    try:
        out = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as e:
        raise ModelError(f"{path}: cannot be read: {e}") from None
    if not isinstance(out, dict):
        raise ModelError(f"{path}: a JSON object was expected")
    return out


def stop_ids(folder: str | Path) -> tuple[int, ...]:
    """The tokens that end a text: eos_token_id of generation_config.json, else of config.json.
    subtle: Instruct models end a turn with <|eot_id|>, which their config.json may not name."""
    return _token_ids(folder, "eos_token_id")


def _token_ids(folder: str | Path, key: str) -> tuple[int, ...]:
    """What the first of the two files that has `key` says, an int or a list there."""
    for name in ("generation_config.json", "config.json"):
        if (Path(folder) / name).exists():
            ids = _read_json(Path(folder) / name).get(key)
            ids = ids if isinstance(ids, list) or ids is None else [ids]
            if ids is not None and all(type(i) is int and 0 <= i < 2 ** 31 for i in ids):
                return tuple(ids)
            if ids is not None:
                raise ModelError(f"{Path(folder) / name}: {key} {str(ids)[:40]} holds no token ids")
    return ()


# ----------------------------------------------------------------------------- rows and their cache

class Rows(NamedTuple):
    """What the T rows of a pass are told about themselves. All are tensors and none a Python
    number, so that a recorded pass is moved to another position by overwriting them."""
    cos: Tensor                 # (T, 1, hd) rotary table at each row's position
    sin: Tensor                 # (T, 1, hd) likewise, the first half negated (see `rotate`)
    slots: Tensor               # (T,) cache slot that each row writes
    bias: Tensor                # (T*R, n) 0: row may read slot, -inf: may not; R equal lines each

    def first(self, J: int) -> "Rows":
        """The same, for the first J rows only."""
        R = len(self.bias) // len(self.slots)
        return Rows(self.cos[:J], self.sin[:J], self.slots[:J], self.bias[:J * R])


class Cache:
    """Keys and values of S slots for every layer, allocated once for a run: never grown, never
    copied."""

    def __init__(self, cfg: Config, S: int, device: torch.device, dtype: torch.dtype) -> None:
        # Zeros, not `empty`: a masked slot gets weight 0, and 0 * NaN would still be NaN.
        self.k = torch.zeros(cfg.L, cfg.G, S, cfg.hd, device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)
        self.layers = list(zip(self.k, self.v))                     # L times (G, S, hd), (G, S, hd)
        self.S, self.R = S, cfg.H // cfg.G
        wide = torch.promote_types(dtype, torch.float32)
        position = torch.arange(S, dtype=torch.float64)
        angle = torch.outer(position, rope_frequencies(cfg))                            # (S, hd/2)
        self.cos = torch.cat((angle.cos(), angle.cos()), 1)[:, None].to(device, wide)   # (S, 1, hd)
        self.sin = torch.cat((-angle.sin(), angle.sin()), 1)[:, None].to(device, wide)
        self.slot = torch.arange(S, device=device)
        self.zero, self.hidden = torch.tensor([0.0, -math.inf], device=device, dtype=dtype)

    def sequence(self, t: int | Tensor, T: int) -> Rows:
        """T tokens that follow one another, the first at position t: decode and draft (T = 1),
        prefill, verify. With a t that only the device knows, a tensor (), all S slots are looked
        at."""
        slots = self.slot[:T] + t
        # Row r sits at position t + r, so it may read slots 0 .. t + r. Without the t the mask is
        # right in prefill and wrong ever after, and nothing crashes: the text just gets worse.
        return self._rows(slots, slots, self._seen(t, T) <= slots[:, None])

    def versions(self, t: int | Tensor, J: int) -> Rows:
        """J versions of the one token at position t (§3.6): equal positions, scratch slots behind
        it, each reading the past (slots before t) and its own slot. Slot t holds the full model's
        entry for that token. No version reads it, or the token would be seen twice; none writes it,
        and so the text's cache is unharmed."""
        every, slots = self._seen(t, 1 + J), self.slot[1:J + 1] + t
        may_read = (every < t) | (every == slots[:, None])
        return self._rows(self.slot[:1].expand(J) + t, slots, may_read)

    def _seen(self, t: int | Tensor, T: int) -> Tensor:
        """The slots that T rows from t on look at: (n,)."""
        if isinstance(t, Tensor):
            return self.slot
        assert t + T <= self.S, f"slots {t}..{t + T - 1} in a cache of {self.S}"
        return self.slot[:t + T]

    def _rows(self, position: Tensor, slots: Tensor, may_read: Tensor) -> Rows:
        bias = torch.where(may_read, self.zero, self.hidden)                                # (T, n)
        return Rows(self.cos.index_select(0, position), self.sin.index_select(0, position), slots,
                    bias.repeat_interleave(self.R, 0))                          # (T, n) -> (T*R, n)


def rope_frequencies(cfg: Config) -> Tensor:
    """theta^(-2k/hd) for k = 0 .. hd/2-1, in radians per position; float64. LLaMA-3.1 and later
    slow the slow ones: a frequency whose wavelength exceeds original/low is divided by `factor`,
    one whose wavelength is below original/high is kept, and between them the two are blended
    linearly in original/wavelength."""
    f = cfg.theta ** -(torch.arange(0, cfg.hd, 2, dtype=torch.float64) / cfg.hd)           # (hd/2,)
    if cfg.scaling:
        factor, low, high, original = cfg.scaling
        keep = ((original * f / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        f = keep * f + (1 - keep) * f / factor
    return f


# ------------------------------------------------------------------------------ forward

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
    """x / sqrt(mean(x^2) + eps) * weight, the statistics in eps's dtype, float32 or wider. (eps is
    a tensor and the mean a scaled sum because small CPU calls are faster that way.)"""
    wide = x.type(eps.dtype)
    mean = torch.add(eps, wide.square().sum(-1, keepdim=True), alpha=1 / x.shape[-1])
    return (wide * mean.rsqrt()).type(x.dtype) * weight


def rotate(x: Tensor, rows: Rows) -> Tensor:                                # (T, heads, hd)
    """Rotary embedding, Hugging Face's layout: element k turns with element k + hd/2. Rolling by
    half a head brings each to its partner's place; the minus sign that one of the two needs lives
    in the table. (Meta's own files interleave the pairs instead: the wrong layout does not crash,
    it just writes worse text.)"""
    return (x * rows.cos + x.roll(x.shape[-1] // 2, -1) * rows.sin).type(x.dtype)


def decoder_layer(w: Layer, x: Tensor, rows: Rows, keys: Tensor, values: Tensor, c: Config,
                  eps: Tensor) -> Tensor:                                         # (T, D) -> (T, D)
    """One decoder layer: attention, then the feed-forward part, each added to the residual stream
    x. keys, values (G, S, hd) are the layer's part of the cache."""
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
    x = x + a @ w.out

    gate, up = (rms_norm(x, w.mlp_norm, eps) @ w.gate_up).chunk(2, -1)
    return x + (F.silu(gate) * up) @ w.down


class Llama:
    """The model: weights and the functions that use them. Nothing changes after loading, so one
    model serves any number of caches."""

    def __init__(self, cfg: Config, embed: Tensor, layers: list[Layer], norm: Tensor,
                 head: Tensor) -> None:
        self.cfg, self.embed, self.layers, self.norm, self.lm_head = cfg, embed, layers, norm, head
        self.device, self.dtype = embed.device, embed.dtype
        self.wide = torch.promote_types(self.dtype, torch.float32)      # of norms, softmax, logits
        self.eps = torch.tensor(cfg.eps, device=self.device, dtype=self.wide)
        self.block = decoder_layer                     # or the same function, compiled

    def cache(self, S: int) -> Cache:
        """A cache of S slots for one run: prompt, new tokens, and the scratch slots behind them."""
        c, size = self.cfg, torch.finfo(self.dtype).bits // 8
        need_memory(self.device, 2 * c.L * c.G * c.hd * S * size, f"a cache of {S} slots")
        return Cache(c, S, self.device, self.dtype)

    def forward(self, ids: Tensor, rows: Rows, cache: Cache, skip: Sequence[bool] | None = None,
                states: slice | None = None) -> tuple[Tensor, Tensor | None]:
        """(T,) ids -> h[L] (T, D), and h[0..L] of the rows `states`, (L+1, those rows, D), if asked
        for. skip[i] leaves layer i out; None or all False is the full model, all True the embedding
        itself."""
        x = F.embedding(ids, self.embed)                                    # (T,) -> (T, D)
        h = [x]
        for i in range(self.cfg.L):
            # A skipped layer: the residual stream flows past. Its cache keeps a hole at these
            # slots, which is safe: the verify pass runs every layer over the same slots before
            # anyone reads them.
            if not (skip and skip[i]):
                x = self.layer(i, x, rows, cache)
            if states:
                h.append(x)
        return x, torch.stack([x[states] for x in h]) if states else None

    def layer(self, i: int, x: Tensor, rows: Rows, cache: Cache) -> Tensor:       # (T, D) -> (T, D)
        """f_i: the whole decoder layer i, residuals included: h[i+1] = f_i(h[i]). Writes the rows'
        keys and values."""
        if len(x) < len(rows.slots):                   # rows of the DP's table grow to M cells
            rows = rows.first(len(x))
        return self.block(self.layers[i], x, rows, *cache.layers[i], self.cfg, self.eps)

    def head(self, x: Tensor) -> Tensor:                                    # (T, D) -> (T, V)
        """h[L] -> logits, computed in the model's dtype, then widened to float32 or more."""
        return F.linear(rms_norm(x, self.norm, self.eps), self.lm_head).type(self.wide)

    # -------------------------------------------------------------------------- loading

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu",
             dtype: torch.dtype | None = None, progress: Progress | None = None) -> "Llama":
        """Read a Hugging Face folder: config.json and model.safetensors, or shards with their
        index. Each tensor goes from the memory map straight to its place on `device` in `dtype`
        (default: bfloat16 on a GPU, else float32); every one is used exactly once. `progress(done,
        total)` is called with bytes. Raises ModelError."""
        cfg, device = Config.load(folder), torch.device(device)
        dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        files = tensor_files(Path(folder))

        def new(*shape: int) -> Tensor:
            return torch.empty(shape, device=device, dtype=dtype)

        def matrix(n_in: int, n_out: int) -> Tensor:
            # Files hold (out, in). In float32 on a CPU (in, out) is read faster, elsewhere not.
            if device.type == "cpu" and dtype == torch.float32:
                return new(n_in, n_out)
            return new(n_out, n_in).t()

        count = (cfg.V * cfg.D * (1 if cfg.tied else 2) + cfg.D + cfg.L * (
            2 * cfg.D + cfg.D * cfg.hd * (2 * cfg.H + 2 * cfg.G) + 3 * cfg.D * cfg.ffn))
        need_memory(device, count * torch.finfo(dtype).bits // 8, "the weights")
        qh, kh = cfg.H * cfg.hd, cfg.G * cfg.hd
        embed, norm = new(cfg.V, cfg.D), new(cfg.D)
        head = embed if cfg.tied else new(cfg.V, cfg.D)
        layers = [Layer(new(cfg.D), matrix(cfg.D, qh + 2 * kh), matrix(qh, cfg.D), new(cfg.D),
                        matrix(cfg.D, 2 * cfg.ffn), matrix(cfg.ffn, cfg.D)) for _ in range(cfg.L)]
        # The table: their name -> our place. A fused matrix is filled from its parts.
        place = {"model.embed_tokens.weight": embed, "model.norm.weight": norm}
        if not cfg.tied:
            place["lm_head.weight"] = head
        for i, w in enumerate(layers):
            q, k, v = w.qkv.t().split((qh, kh, kh))
            gate, up = w.gate_up.t().chunk(2)
            place |= {f"model.layers.{i}.{name}.weight": tensor for name, tensor in {
                "input_layernorm": w.attn_norm, "post_attention_layernorm": w.mlp_norm,
                "self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v,
                "self_attn.o_proj": w.out.t(),
                "mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": w.down.t()}.items()}
        _fill(place, files, progress)
        return cls(cfg, embed, layers, norm, head)


def tensor_files(folder: Path) -> dict[str, Path]:
    """tensor name -> the file that holds it."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.exists():
        with _open(single) as f:
            return dict.fromkeys(f.keys(), single)
    if not index.exists():
        raise ModelError(f"{folder}: neither {single.name} nor {index.name}")
    names = _read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(f, str) for f in names.values()):
        raise ModelError(f"{index}: no weight_map")
    return {name: folder / file for name, file in names.items()}


def _open(path: Path) -> safe_open:
    """A safetensors file, memory-mapped; its faults as one line."""
    if not path.exists():
        raise ModelError(f"{path}: this shard is missing")
    try:
        path.open("rb").close()                        # its error says more than safe_open's
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as e:
        raise ModelError(f"{path}: broken or cut short: {e}") from None


def _fill(place: dict[str, Tensor], files: dict[str, Path], progress: Progress | None) -> None:
    """Copy every tensor of `files` to its place, once."""
    def differ(what: str, names: set[str]) -> None:
        # Checkpoints from before 2024 carry the rotary frequencies, which follow from config.json.
        names = sorted(n for n in names if not n.endswith("rotary_emb.inv_freq"))
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ModelError(f"weights {what}: {', '.join(names[:3])}{more}")

    differ("missing", place.keys() - files.keys())
    differ("not part of this model", files.keys() - place.keys())
    total, done = sum(t.nbytes for t in place.values()), 0
    for path in sorted(set(files.values())):
        with _open(path) as f:
            held, ours = set(f.keys()), {n for n in files if files[n] == path}
            differ(f"that should be in {path.name} and are not", ours - held)
            differ(f"in {path.name} that the index does not name", held - ours)
            for name in (n for n in place if n in ours):
                want, view = place[name], f.get_slice(name)
                if view.get_dtype() not in ("BF16", "F16", "F32"):
                    raise ModelError(f"{name}: weights of type {view.get_dtype()}; only bf16, fp16 "
                                     "and fp32 are read")
                if list(view.get_shape()) != list(want.shape):
                    raise ModelError(f"{name}: shape {view.get_shape()}, but config.json makes "
                                     f"it {list(want.shape)}")
                want.copy_(f.get_tensor(name))
                if not torch.stack(want.aminmax()).isfinite().all():           # no copy of it
                    raise ModelError(f"{path.name}: {name} holds values that are not numbers")
                done += want.nbytes
                if progress:
                    progress(done, total)


def need_memory(device: torch.device, need: int, what: str) -> None:
    """Raise ModelError if `device` has fewer than `need` bytes free for `what`."""
    if device.type == "cuda":
        pool = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + pool
    elif os.path.exists("/proc/meminfo"):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next((int(n.split()[1]) * 1024 for n in lines if n.startswith("MemAvail")), need)
    elif hasattr(os, "sysconf"):                       # what there is, as what is free is not told
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        free = need
    if need > free:
        raise ModelError(f"not enough memory on {device}: {what} would take {need / 1e9:.3g} GB, "
                         f"and {free / 1e9:.3g} GB are free; a narrower --dtype, fewer tokens or a "
                         "smaller model would help")


# ------------------------------------------------------------------------------ tokenizer

SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
         r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
NAMED = {0: "<|begin_of_text|>", 1: "<|end_of_text|>",
         6: "<|start_header_id|>", 7: "<|end_header_id|>", 9: "<|eot_id|>"}


class Tokenizer:
    """Byte-pair encoding with LLaMA-3's ranks, from Meta's tokenizer.model or Hugging Face's
    tokenizer.json.

    >>> tok = Tokenizer("demo")
    >>> tok.decode(tok.encode("def f(x):"))
    'def f(x):'
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        meta = [p for p in (folder / "tokenizer.model", folder / "original" / "tokenizer.model")
                if p.exists()]
        path = meta[0] if meta else folder / "tokenizer.json"
        if not path.exists():
            raise ModelError(f"{folder}: no tokenizer.model (here or in original/) and no "
                             "tokenizer.json; --prompt-ids works without one")
        ranks, self.special = (_ranks_of_meta if meta else _ranks_of_hugging_face)(path)
        ids, n = [*ranks.values(), *self.special.values()], len(ranks)
        if (not all(type(i) is int for i in ids) or len(set(ids)) < len(ids)
                or set(ids[:n]) != set(range(n)) or not all(bytes([b]) in ranks for b in range(256))
                or min(ids[n:], default=0) < 0 or not set(NAMED.values()) <= self.special.keys()):
            raise ModelError(f"{path}: not LLaMA-3's tokenizer: ranks are not 0, 1, 2, ..., a "
                             "single byte has none, or a special token is missing")
        self.bos, self.stop_ids = self.special["<|begin_of_text|>"], stop_ids(folder)
        # A file that was cut short moves every special token.
        if self.bos not in (_token_ids(folder, "bos_token_id") or [self.bos]):
            raise ModelError(f"{path}: cut short or another model's: <|begin_of_text|> is "
                             f"{self.bos} here, which the config's bos_token_id denies")
        try:
            self._bpe = tiktoken.Encoding("llama-3", pat_str=SPLIT, mergeable_ranks=ranks,
                                          special_tokens=self.special)
        except (ValueError, TypeError, OverflowError) as e:
            raise ModelError(f"{path}: tiktoken refuses it: {type(e).__name__} {e}") from None

    def encode(self, text: str) -> list[int]:
        """Ordinary text -> ids. No special token is added, and none can be written: "<|eot_id|>" in
        a user's text is a handful of ordinary tokens."""
        return self._bpe.encode_ordinary(text)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """ids -> bytes; a token may end in the middle of a character. Special tokens come out by
        name."""
        try:
            return self._bpe.decode_bytes(ids)
        except (KeyError, OverflowError):
            raise ModelError(f"the tokenizer has no token for one of {list(ids)[:8]}") from None

    def decode(self, ids: Sequence[int]) -> str:
        """ids -> text; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """[{"role": ..., "content": ...}, ...] -> ids up to where the assistant's answer begins, as
        the Instruct models were trained: content stripped, every turn closed by <|eot_id|>."""
        start, end = self.special["<|start_header_id|>"], self.special["<|end_header_id|>"]
        ids = [self.bos]
        for m in messages:
            ids += [start, *self.encode(m["role"]), end, *self.encode("\n\n"),
                    *self.encode(m["content"].strip()), self.special["<|eot_id|>"]]
        return [*ids, start, *self.encode("assistant"), end, *self.encode("\n\n")]


def _ranks_of_meta(path: Path) -> tuple[dict[bytes, int], dict[str, int]]:
    """Lines "base64(bytes) rank"; 256 special tokens follow the ranks, of which five matter and the
    rest are reserved (later versions of LLaMA-3 renamed some of those; the ids of the five never
    moved). Parsed here, since tiktoken's own reader keeps a copy under a hash of the *path* and
    would not see that a file has changed."""
    try:
        rows = (line.split() for line in path.read_bytes().splitlines() if line)
        ranks = {base64.b64decode(t, validate=True): int(r) for t, r in rows}
    except (OSError, ValueError) as e:
        raise ModelError(f"{path}: not a tokenizer.model of LLaMA-3, base64 and rank per line: "
                         f"{e}") from None
    spare = (f"<|reserved_special_token_{n}|>" for n in range(256))
    return ranks, {NAMED.get(i) or next(spare): len(ranks) + i for i in range(256)}


def _ranks_of_hugging_face(path: Path) -> tuple[dict[bytes, int], dict[str, int]]:
    """The vocabulary of tokenizer.json, whose strings spell bytes in GPT-2's way: a printable
    Latin-1 character is itself, the 68 others are the characters from U+0100 on. Ids are ranks."""
    t = _read_json(path)
    printable = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b]
    byte = {chr(b): b for b in printable}
    byte |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in printable)}
    try:
        special = {a["content"]: a["id"] for a in t["added_tokens"]}
        vocab, kind, pre = t["model"]["vocab"], t["model"]["type"], t["pre_tokenizer"]
        ranks = {bytes(byte[ch] for ch in s): i for s, i in vocab.items() if s not in special}
        steps = [{k: v for k, v in step.items() if k != "trim_offsets"}         # not about ids
                 for step in pre.get("pretokenizers", [pre])]
        altered = t.get("normalizer") or t["model"].get("dropout")
    except (KeyError, TypeError, AttributeError) as e:
        raise ModelError(f"{path}: not a byte-level tokenizer: {type(e).__name__} {e}") from None
    if kind != "BPE" or altered or steps != [
            dict(type="Split", pattern=dict(Regex=SPLIT), behavior="Isolated", invert=False),
            dict(type="ByteLevel", add_prefix_space=False, use_regex=False)]:
        raise ModelError(f"{path}: not LLaMA-3's tokenizer (model {kind}, normalizer, dropout or "
                         "split pattern)")
    return ranks, special


# ------------------------------------------------------------- replay: a CUDA graph per layer

class Replay:
    """The same model on a GPU, its passes replayed from CUDA graphs: one graph *per layer*.

    A CUDA graph is a recorded run of kernels, at fixed addresses, that one launch repeats; launched
    one by one, they keep the host busy for longer than the GPU. A graph of a whole pass would fix
    which layers run. So each layer is recorded alone, updating the buffer x in place; a draft step
    replays those it keeps, and a new skip set records nothing anew:

        draft       t, id  -> begin | 0 | 1 |   | 3 |   |   | 6 | ... | L-1 | end -> logits
        verify      t, ids -> [ all layers, P = K + 1 rows, and the head ] -> h, logits
        optimise    t, h   -> [ dp_layer_skip.table, M rows per layer ] -> D, parents

    What differs between steps (t, ids, h) is put into small buffers first; rows are made from t on
    the device. Longer passes, a prompt's, run as they are. What a pass returns is overwritten by
    the next, so it serves one run at a time. `fuse` is torch.compile or nothing. The tests hold all
    this against the plain model."""

    def __init__(self, model: Llama, K: int, M: int, table: Callable, fuse: Callable) -> None:
        self.cfg, self.device, self.dtype = model.cfg, model.device, model.dtype
        self.model, self.P, self.M, self.table = model, K + 1, M, table
        self.fused, self.slots, self.side, self.pool = copy.copy(model), None, None, None
        self.fused.block = fuse(decoder_layer)
        self.in_place = fuse(lambda x, w, *rest: x.copy_(decoder_layer(w, x, *rest)))
        self.ids = torch.zeros(self.P, dtype=torch.long, device=self.device)
        self.t = torch.zeros_like(self.ids[0])
        self.x, self.h = (model.embed.new_zeros(n, self.cfg.D) for n in (1, self.cfg.L + 1))

    def record(self, f: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """Run f; its result, and what repeats it in place."""
        self.side = self.side or torch.cuda.Stream(self.device)    # one, to share memory
        self.side.wait_stream(here := torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.side):
            f(), f()                    # first calls compile and set up libraries: not recorded
        here.wait_stream(self.side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.side):
            out = f()                   # subtle: recorded, but not run; so `out` holds nothing yet
        self.pool = graph.pool()
        graph.replay()
        return out, graph.replay

    def cache(self, S: int) -> "Replay":
        """Graphs belong to the memory they were recorded on, so this is its own cache: what an
        earlier run left there is overwritten like a refused draft. It grows and never shrinks."""
        if self.slots and S + self.P <= self.slots.S:
            return self
        self.slots = None                              # frees what there was
        slots, m = self.model.cache(-(-(S + self.P) // 512) * 512), self.fused

        def verify() -> tuple[Tensor, ...]:
            x, h = m.forward(self.ids, slots.sequence(self.t, self.P), slots, states=slice(None))
            return x, h, m.head(x)

        def optimise() -> tuple[Tensor, Tensor]:
            rows, M = slots.versions(self.t, self.M), self.M
            return self.table(self.h, lambda i, x: m.layer(            # padded to M: compiled once
                i, F.pad(x, (0, 0, 0, M - len(x))), rows, slots)[:len(x)], M)

        # subtle: replays come in another order than the recordings, and share one memory. x, h, t
        # and ids lie outside it; rows must outlive all of the recordings below, as it does here.
        (rows, _), self.begin = self.record(lambda: (
            slots.sequence(self.t, 1), self.x.copy_(F.embedding(self.ids[:1], m.embed))))
        self.layers = [self.record(lambda w=w, kv=kv: self.in_place(
            self.x, w, rows, *kv, m.cfg, m.eps))[1] for w, kv in zip(m.layers, slots.layers)]
        self.logits, self.end = self.record(lambda: m.head(self.x))
        (self.xs, self.hs, self.all_logits), self.run_all = self.record(verify)
        self.found, self.run_table = self.record(optimise) if self.M else (None, None)
        self.slots = slots                             # now that all went well
        return self

    def sequence(self, t: int, T: int) -> Rows | None:
        self.t.fill_(t)
        return self.slots.sequence(t, T) if T > self.P else None

    def versions(self, t: int, J: int) -> None:
        assert J == self.M, f"{J} versions, recorded for {self.M}"
        self.t.fill_(t)

    def forward(self, ids: Tensor, rows: Rows | None, cache: Any, skip: Sequence[bool] = (),
                states: slice | None = None) -> tuple[Tensor, Tensor | None]:
        T = len(ids)
        if rows:
            return self.model.forward(ids, rows, self.slots, skip, states)
        self.ids[:T].copy_(ids)
        if T > 1 or states:      # always P rows: old ids fill up, in slots that will be overwritten
            assert not (skip and any(skip)), "a draft has one row"
            self.run_all()
            return self.xs[:T], self.hs[:, :T][:, states] if states else None
        self.begin()
        for i in range(self.cfg.L):
            if not (skip and skip[i]):
                self.layers[i]()
        self.end()
        return self.x, None

    def head(self, x: Tensor) -> Tensor:
        """The recorded logits, if x is where the last pass left its rows; else computed."""
        if x.data_ptr() == self.xs.data_ptr():
            return self.all_logits[:len(x)]
        return self.logits if x.data_ptr() == self.x.data_ptr() else self.model.head(x)

    def choose(self, h: Tensor) -> tuple[Tensor, Tensor]:
        self.h.copy_(h)
        self.run_table()
        return self.found
