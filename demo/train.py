"""How the demo model was made: byte-pair ranks, then a deep LLaMA-3 trained with layer dropout.
Needs only the packages of this repository; `demo/README.md` is the model card.

    python demo/train.py tokenizer        # tokenizer.model, from the standard library's source
    torchrun --nproc-per-node 2 demo/train.py model --compile      # a process per core; resumable
    torchrun --nproc-per-node 2 demo/train.py distil --compile     # from there; resumable
    python demo/train.py export           # model.safetensors and the two config files
    python demo/train.py measure          # the held-out loss of what is shipped

The one idea here that CLaSp depends on: a network that has never missed a layer falls apart when
one is taken away. Large LLaMAs are redundant by size; a model of 6 million weights has to be taught
it. So, as LayerSkip does (arXiv 2404.16710), every micro-batch is run with some layers left out,
and layers differ in how often they are: that difference is what the dynamic program finds at run
time. Then `distil` teaches the network with layers left out to say what the whole one says.
"""
import argparse
import base64
import collections
import hashlib
import heapq
import json
import math
import os
import random
import sys
import sysconfig
import time
from pathlib import Path

import regex                       # comes with tiktoken, which splits text with it
import torch
import torch.nn.functional as F
from torch import Tensor, nn

DEMO = Path(__file__).resolve().parent
sys.path.insert(0, str(DEMO.parent))
from llama import SPLIT, Llama, Tokenizer  # noqa: E402
from oracle.trace import save  # noqa: E402

RANKS, SPECIALS = 3840, 256        # V = 4096
L, D, H, G, HD, FFN = 32, 128, 4, 1, 32, 352
THETA, EPS, CONTEXT = 10000.0, 1e-5, 1024
BOS, EOS = RANKS, RANKS + 1
OFTEN, DISTIL_OFTEN = 17, 21       # layers that may go, of the 28 between the first and last two


# ---------------------------------------------------------------------------- text

def corpus() -> tuple[list[str], list[str]]:
    """(training files, held-out files): the standard library's source, no tests, nothing installed
    beside it. A file is held out if the hash of its name says so (1 in 20), so that the split never
    moves."""
    root = Path(sysconfig.get_path("stdlib"))
    train, held = [], []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if set(name.split("/")) & {"test", "tests", "idle_test", "site-packages", "dist-packages"}:
            continue
        try:
            text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:                     # a few files declare another encoding
            continue
        (held if hashlib.sha256(name.encode()).digest()[0] % 20 == 0 else train).append(text)
    return train, held


def train_ranks(texts: list[str], size: int) -> list[bytes]:
    """Byte-pair encoding (Sennrich et al. 2016): while fewer than `size` tokens, the most frequent
    adjacent pair becomes one. Counts are kept per distinct piece and mended only where a merge
    happened; ties go to the smaller pair."""
    pieces = collections.Counter(p for t in texts for p in regex.findall(SPLIT, t))
    words = [[bytes([b]) for b in piece.encode()] for piece in pieces]
    freq = list(pieces.values())
    count, where = collections.Counter(), collections.defaultdict(set)
    for w, word in enumerate(words):
        for pair in zip(word, word[1:]):
            count[pair] += freq[w]
            where[pair].add(w)
    heap = [(-n, pair) for pair, n in count.items()]
    heapq.heapify(heap)
    ranks = [bytes([b]) for b in range(256)]
    known = set(ranks)
    while len(ranks) < size:
        n, pair = heapq.heappop(heap)
        # subtle: an outdated entry; the present one is also in the heap
        if -n != count[pair] or n == 0:
            continue
        token, touched = pair[0] + pair[1], set()
        for w in where.pop(pair):
            word, new, i = words[w], [], 0
            for old in zip(word, word[1:]):
                count[old] -= freq[w]
                touched.add(old)
            while i < len(word):
                if tuple(word[i:i + 2]) == pair:
                    new.append(token)
                    i += 2
                else:
                    new.append(word[i])
                    i += 1
            for now in zip(new, new[1:]):
                count[now] += freq[w]
                where[now].add(w)
                touched.add(now)
            words[w] = new
        for pair in touched:
            heapq.heappush(heap, (-count[pair], pair))
        if token not in known:                      # two ways to build the same bytes are one token
            known.add(token)
            ranks.append(token)
    return ranks


def make_tokenizer() -> None:
    ranks = train_ranks(corpus()[0], RANKS)
    lines = (base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(ranks))
    (DEMO / "tokenizer.model").write_bytes(b"".join(lines))


def tokens(texts: list[str]) -> tuple[Tensor, Tensor]:
    """(ids of all files, each between begin and end of text; positions at which a line starts)."""
    tok, ids = Tokenizer(DEMO), []
    for text in texts:
        ids += [BOS, *tok.encode(text), EOS]
    newline = torch.tensor([tok.decode_bytes([i]).endswith(b"\n") for i in range(RANKS + 2)])
    ids = torch.tensor(ids)
    return ids, (newline[ids] | (ids == BOS)).nonzero().squeeze(1) + 1


# --------------------------------------------------------------- model (batched, for training only)

class Block(nn.Module):
    """One decoder layer; the parameter names are Hugging Face's, so that exporting is a matter of
    prefixes."""

    def __init__(self) -> None:
        super().__init__()
        def lin(i: int, o: int, scale: float = 1.0) -> nn.Linear:
            m = nn.Linear(i, o, bias=False)
            nn.init.normal_(m.weight, std=scale * i ** -0.5)
            return m
        out = (2 * L) ** -0.5            # what a layer adds starts small, so that depth L is stable
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(D, EPS), nn.RMSNorm(D, EPS)
        self.q_proj, self.k_proj, self.v_proj = lin(D, H * HD), lin(D, G * HD), lin(D, G * HD)
        self.o_proj = lin(H * HD, D, out)
        self.gate_proj, self.up_proj, self.down_proj = lin(D, FFN), lin(D, FFN), lin(FFN, D, out)

    # (B, T, D) -> (B, T, D)
    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor) -> Tensor:
        B, T, _ = x.shape
        R = H // G                          # query heads that share a kv head; folded into the rows
        a = self.input_layernorm(x)
        q = rotate(self.q_proj(a).view(B, T, H, HD), cos, sin)
        k = rotate(self.k_proj(a).view(B, T, G, HD), cos, sin).transpose(1, 2).reshape(B * G, T, HD)
        v = self.v_proj(a).view(B, T, G, HD).transpose(1, 2).reshape(B * G, T, HD)
        q = q.view(B, T, G, R, HD).transpose(1, 2).reshape(B * G, T * R, HD)
        score = torch.bmm(q, k.transpose(1, 2)).view(B * G, T, R, T) * HD ** -0.5 + bias
        a = torch.bmm(score.softmax(-1, dtype=q.dtype).view(B * G, T * R, T), v)
        a = a.view(B, G, T, R, HD).transpose(1, 2).reshape(B, T, H * HD)
        x = x + self.o_proj(a)
        a = self.post_attention_layernorm(x)
        return x + self.down_proj(F.silu(self.gate_proj(a)) * self.up_proj(a))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(RANKS + SPECIALS, D)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        self.layers = nn.ModuleList(Block() for _ in range(L))
        self.norm = nn.RMSNorm(D, EPS)
        angle = torch.outer(torch.arange(CONTEXT), THETA ** (-torch.arange(0, HD, 2) / HD))
        self.register_buffer("cos", angle.cos()[:, None], persistent=False)
        self.register_buffer("sin", angle.sin()[:, None], persistent=False)
        causal = torch.full((CONTEXT, CONTEXT), float("-inf"), dtype=torch.bfloat16).triu(1)
        self.register_buffer("bias", causal[:, None], persistent=False)   # (T, 1, T)

    def forward(self, ids: Tensor, skip: list[bool]) -> Tensor:            # (B, T) -> (B * T, V)
        """Logits, the layers with skip[i] left out."""
        T = ids.shape[1]
        x, cos, sin = self.embed_tokens(ids), self.cos[:T], self.sin[:T]
        bias = self.bias[:T, :, :T]
        for layer, s in zip(self.layers, skip):
            if not s:
                x = layer(x, cos, sin, bias)
        return F.linear(self.norm(x), self.embed_tokens.weight).float().flatten(0, 1)      # tied

    def loss(self, ids: Tensor, skip: list[bool]) -> Tensor:               # (B, T+1) -> ()
        """Mean negative log-likelihood of ids[:, 1:] in nats per token."""
        return F.cross_entropy(self(ids[:, :-1], skip), ids[:, 1:].flatten())

    def pair_loss(self, ids: Tensor, skip: list[bool]) -> Tensor:          # (B, T+1) -> ()
        """The whole network learns from the text, and it and the one with layers left out learn to
        agree: the loss above plus twice KL(whole || left out), in nats per token. (What the whole
        one knows beyond the other is mostly the training text by heart.)"""
        whole = self(ids[:, :-1], [False] * L)
        part = self(ids[:, :-1], skip).log_softmax(-1)
        return F.cross_entropy(whole, ids[:, 1:].flatten()) + 2 * F.kl_div(
            part, whole.log_softmax(-1), reduction="batchmean", log_target=True)


# ---------------------------------------------------------------------------- layer dropout

def drop_rates(often: int) -> list[float]:
    """How often each layer is left out at scale 1. The first and last two never; of the others,
    scattered, `often` often and the rest seldom. With one rate for all, every set of layers is as
    good as every other. (A larger `often` adds layers to those of a smaller one.)"""
    chosen = set(random.Random(7).sample(range(2, L - 2), often))
    return [0.0 if i < 2 or i >= L - 2 else 0.75 if i in chosen else 0.1 for i in range(L)]


def often_dropped(often: int) -> list[bool]:
    """The same as one flag per layer: is it one of those left out often?"""
    return [rate > 0.5 for rate in drop_rates(often)]


def masks(n: int, rng: random.Random, distil: bool) -> list[list[bool]]:
    """n skip masks for one step: a third at full depth (else the full model is worse than its own
    subsets), the rest with the rates times a scale in 0 .. 1.3, stratified so that every step sees
    the whole range. When distilling, where each mask is paired with the full depth anyway, all with
    more layers that may go and a scale in 0.6 .. 1.3."""
    rates, full, out = drop_rates(DISTIL_OFTEN if distil else OFTEN), (n + 1) // 3, []
    for k in range(n):
        if distil:
            scale = 0.6 + 0.7 * (k + rng.random()) / n
        else:
            scale = 0.0 if k < full else 1.3 * (k - full + rng.random()) / (n - full)
        out.append([rng.random() < r * scale for r in rates])
    return out


# ---------------------------------------------------------------------------- training

def train(a: argparse.Namespace) -> None:
    torch.manual_seed(a.seed)
    torch.set_num_threads(a.threads)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:                          # started by torchrun: one process per core beats threads
        torch.distributed.init_process_group("gloo")
    device = torch.device(a.device)
    train_text, held_text = corpus()
    data, starts = tokens(train_text)
    held, _ = tokens(held_text)
    bytes_held = sum(len(t.encode()) for t in held_text)
    if rank == 0:
        print(f"train {len(data):,} tokens, held out {len(held):,} tokens, "
              f"{bytes_held / len(held):.2f} bytes per token", flush=True)
    model = Model().to(device)
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    known = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in known]
    opts = [torch.optim.Muon(matrices, lr=a.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=a.lr, betas=(0.9, 0.95), weight_decay=0.0)]
    distil, base = a.what == "distil", DEMO / "train_state.pt"           # ours alone, never shipped
    state = DEMO / "distil_state.pt" if distil else base
    step, log, spent = 0, [], 0.0
    if state.exists() or distil:
        s = torch.load(state if state.exists() else base, weights_only=True)
        model.load_state_dict(s["model"])
        for o, saved in zip(opts, s["opts"]):
            o.load_state_dict(saved)
        if state.exists():
            step, log, spent = s["step"], s["log"], s["spent"]
        print(f"begun at step {step} of {state.name}", flush=True)
    if a.compile:
        for layer in model.layers:
            layer.compile(dynamic=False)
    began, window = time.time(), []
    while step < a.steps:
        # A step's data and masks depend on its number alone; the last steps see the whole context.
        rng = random.Random(a.seed * 1_000_003 + step)
        T = a.length if step < a.long_from * a.steps else CONTEXT
        B = max(1, round(a.length * a.rows / T))
        frac = step / a.steps                                 # warm up, hold, fall linearly to zero
        scale = min(1.0, (step + 1) / 100, (1 - frac) / a.decay)
        for o in opts:
            for g in o.param_groups:
                g["lr"] = a.lr * scale
        total = 0.0
        for n, mask in enumerate(masks(a.masks, rng, distil)):
            at = [min(int(starts[rng.randrange(len(starts))]), len(data) - T) for _ in range(B)]
            if n % world != rank:
                continue
            rows = [torch.cat((torch.tensor([BOS]), data[start:start + T])) for start in at]
            with torch.autocast(device.type, torch.bfloat16):
                loss_of = model.pair_loss if distil else model.loss
                loss = loss_of(torch.stack(rows).to(device), mask)
            (loss / a.masks).backward()
            total += loss.item() / a.masks
        if world > 1:
            flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
                              for p in model.parameters()] + [torch.tensor([total], device=device)])
            torch.distributed.all_reduce(flat)
            *grads, loss_sum = flat.split([p.numel() for p in model.parameters()] + [1])
            total = loss_sum.item()
            for p, g in zip(model.parameters(), grads):
                p.grad = g.view_as(p)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in opts:
            o.step()
            o.zero_grad(set_to_none=True)
        step += 1
        window.append(total)
        if rank == 0 and (step % a.every == 0 or step == a.steps):
            seconds = spent + time.time() - began
            full, dropped = evaluate(model, held, device, DISTIL_OFTEN if distil else OFTEN)
            seen, loss = step * a.masks * a.rows * a.length, sum(window) / len(window)
            log.append([step, seen, loss, full, dropped, seconds])
            print(f"step {step} tokens {seen / 1e6:.2f}M train {loss:.3f} held-out full {full:.3f} "
                  f"often-dropped layers left out {dropped:.3f} {seconds / 60:.1f} min", flush=True)
            window = []
            torch.save(dict(model=model.state_dict(), opts=[o.state_dict() for o in opts],
                            step=step, log=log, spent=seconds), state.with_suffix(".tmp"))
            state.with_suffix(".tmp").replace(state)


@torch.no_grad()
def evaluate(model: Model, held: Tensor, device: torch.device, often: int, rows: int = 24,
             T: int = 512) -> tuple[float, float]:
    """Held-out nats per token on evenly spaced windows: at full depth, and without the
    often-dropped layers."""
    at = torch.linspace(0, len(held) - T - 1, rows).long().tolist()
    ids = torch.stack([torch.cat((torch.tensor([BOS]), held[i:i + T])) for i in at]).to(device)
    dropped = often_dropped(often)
    with torch.autocast(device.type, torch.bfloat16):
        return tuple(sum(model.loss(b, m).item() for b in ids.split(4)) / (rows // 4)
                     for m in ([False] * L, dropped))


def export() -> None:
    """distil_state.pt -> the standard Hugging Face folder: bf16 weights, config, generation
    config."""
    s = torch.load(DEMO / "distil_state.pt", weights_only=True)
    out = {}
    for name, t in s["model"].items():
        for part, home in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down"))):
            for p in home:
                name = name.replace(f".{p}_proj", f".{part}.{p}_proj")
        out["model." + name] = t.to(torch.bfloat16).contiguous()
    save(out, DEMO / "model.safetensors", {"format": "pt"})
    config = dict(architectures=["LlamaForCausalLM"], model_type="llama",
                  vocab_size=RANKS + SPECIALS, hidden_size=D, intermediate_size=FFN,
                  num_hidden_layers=L, num_attention_heads=H, num_key_value_heads=G, head_dim=HD,
                  hidden_act="silu", rms_norm_eps=EPS, rope_theta=THETA, rope_scaling=None,
                  max_position_embeddings=CONTEXT, tie_word_embeddings=True, attention_bias=False,
                  mlp_bias=False, bos_token_id=BOS, eos_token_id=EOS, torch_dtype="bfloat16")
    for name, content in (("config.json", config), (
            "generation_config.json", dict(bos_token_id=BOS, eos_token_id=EOS))):
        (DEMO / name).write_text(json.dumps(content, indent=2) + "\n")
    n = sum(t.numel() for t in out.values())
    print(f"{n:,} weights, {n * 2 / 1e6:.1f} MB, step {s['step']}, {s['spent'] / 60:.0f} minutes")


@torch.inference_mode()
def measure() -> None:
    """The shipped weights on the whole held-out text, by llama.py in float32: windows of half the
    context, each begun afresh."""
    model, text = Llama.load(DEMO), corpus()[1]
    held, size = tokens(text)[0], sum(len(t.encode()) for t in text)
    often, T = often_dropped(DISTIL_OFTEN), CONTEXT // 2
    for name, skip in (("all layers", None), (f"{sum(often)} often-dropped left out", often)):
        total, count = 0.0, 0
        for part in held.split(T):
            ids, cache = torch.cat((torch.tensor([BOS]), part)), model.cache(len(part))
            x, _ = model.forward(ids[:-1], cache.sequence(0, len(part)), cache, skip)
            total += F.cross_entropy(model.head(x), ids[1:], reduction="sum").item()
            count += len(part)
        print(f"{name}: {total / count:.3f} nats per token, {total / size / math.log(2):.3f} bits "
              f"per byte, {count:,} held-out tokens")


def main() -> None:
    p = argparse.ArgumentParser(description="Make the demo model.")
    sub = p.add_subparsers(dest="what", required=True)
    sub.add_parser("tokenizer")
    sub.add_parser("export")
    sub.add_parser("measure")
    for what, steps, lr, decay, masks in (("model", 2500, 3e-3, 0.35, 8),
                                          ("distil", 2400, 2e-3, 0.6, 4)):
        m = sub.add_parser(what)
        m.add_argument("--steps", type=int, default=steps)
        m.add_argument("--lr", type=float, default=lr)
        m.add_argument("--decay", type=float, default=decay,
                       help="last part of the steps, over which the rate falls to zero")
        m.add_argument("--long-from", type=float, default=0.8,
                       help="part of the steps after which rows span the whole context")
        m.add_argument("--length", type=int, default=256)
        m.add_argument("--rows", type=int, default=4, help="sequences that share one skip mask")
        m.add_argument("--masks", type=int, default=masks, help="skip masks per step")
        m.add_argument("--every", type=int, default=50, help="steps between two reports")
        m.add_argument("--seed", type=int, default=1)
        m.add_argument("--threads", type=int, default=1)
        m.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        m.add_argument("--compile", action="store_true")
    a = p.parse_args()
    dict(tokenizer=make_tokenizer, model=lambda: train(a), distil=lambda: train(a), export=export,
         measure=measure)[a.what]()


if __name__ == "__main__":
    main()
