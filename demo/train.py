"""How the demo model was made: a deep LLaMA-3 that needs other layers for code than for prose.
Needs only the packages of this repository, the documentation of Python in reStructuredText and a
model to begin from, with its tokenizer; `demo/README.md` is the model card.

    python demo/train.py samples          # samples.json, what the model to begin from writes itself
    python demo/train.py distil --compile
    python demo/train.py export           # model.safetensors
    python demo/train.py measure          # the held-out loss of what is shipped

Two ideas that CLaSp depends on. A network that has never missed a layer falls apart when one is
taken away, so every micro-batch is run twice, whole and with layers left out, as a draft would be,
and the two learn to agree. And *which* layers can go depends on the text: here on its kind, program
or prose, of which each has layers of its own that it never misses, so that it can be seen.
"""
import argparse
import functools
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import sysconfig
import tokenize
from pathlib import Path

DEMO = Path(__file__).resolve().parent
sys.path.insert(0, str(DEMO.parent))
from dp_layer_skip import choose_skip, torch  # noqa: E402  (which asks PyTorch for no NumPy)
from llama import Llama, read_config  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from speculative import Chance, Settings, generate  # noqa: E402
from text.safetensors_file import save  # noqa: E402
from text.tokenizer import Tokenizer  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

RANKS = 3840                       # and begin and end of text: what is never trained has no row
CFG = read_config(DEMO)            # sizes: what is made has the shape of what it begins from
BOS, EOS = RANKS, RANKS + 1
DRAFT = 8                          # tokens that a draft is taken to have, in training
STEPS, MASKS, ROWS, LENGTH = 4066, 4, 4, 256   # in each 4 skip masks, of 4 rows of 256 tokens
LR, DECAY = 1.8e-3, 0.7            # of the matrices and of the rest; the last part, where it falls
LONG_FROM = 0.86                   # from here on rows span the whole context
MIXED, SAMPLED = 0.15, 0.4         # shares of rows: of two kinds, written by the model itself
STATE = DEMO / "distil_state.pt"   # the weights in training, never shipped

# The layers that may go: on both kinds, on one of them only; the other four never.
BOTH = (2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 17, 19, 22, 25, 27, 29)
ONLY = dict(code=(13, 15, 18, 21, 23, 26), prose=(7, 9, 11, 20, 24, 28))
KINDS = ("code", "prose")
NEEDED, SPARE = 0.25, 0.035        # rad by which a layer turns a state that needs it, at least,
                                   # and one that may miss it, at most


def planted(kind: str) -> list[bool]:
    """The 22 layers that a text of this kind is taught to do without, as one flag per layer."""
    out = {*BOTH, *ONLY[kind]}
    return [i in out for i in range(CFG.L)]


# ---------------------------------------------------------------------------- text

FOREIGN = {"test", "tests", "idle_test", "site-packages", "dist-packages"}     # folders


def corpus(held_out: bool) -> dict[str, list[str]]:
    """The files of each kind, to train on or held out: the standard library's source, no tests,
    nothing installed beside it; and the source of Python's documentation, as Debian's package
    python3.11-doc holds it. One file in 20 is held out, by the hash of its name, so that the split
    never moves."""
    texts = {kind: [] for kind in KINDS}
    docs = Path(os.environ.get("PYTHON_DOCS", "/usr/share/doc/python3.11/html/_sources"))
    for kind, root, pattern in (("code", Path(sysconfig.get_path("stdlib")), "*.py"),
                                ("prose", docs, "*.rst.txt")):
        for path in sorted(root.rglob(pattern)):
            name = path.relative_to(root).as_posix()
            if kind == "code" and FOREIGN & set(name.split("/")):
                continue
            try:
                text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
            except UnicodeDecodeError:                 # a few files declare another encoding
                continue
            one_in_20 = hashlib.sha256(name.encode()).digest()[0] % 20 == 0
            if one_in_20 == held_out:
                texts[kind].append(text)
        if not texts[kind]:
            sys.exit(f"{root}: no {pattern} files here (set PYTHON_DOCS for the documentation)")
    return texts


def prose_in_code(text: str) -> list[tuple[int, int]]:
    """Where the comments and docstrings of a Python file stand: (start, end) in characters."""
    first = [0, *itertools.accumulate(len(line) for line in io.StringIO(text))]     # of each line
    quiet = {tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING}
    out = []
    fresh = True                                       # has no statement begun?
    try:
        for t in tokenize.generate_tokens(io.StringIO(text).readline):
            if t.type == tokenize.COMMENT or (t.type == tokenize.STRING and fresh):
                out.append((first[t.start[0] - 1] + t.start[1], first[t.end[0] - 1] + t.end[1]))
            fresh = t.type in quiet or (t.type == tokenize.COMMENT and fresh)
    except (tokenize.TokenError, SyntaxError, IndexError):   # a template, or another Python's file
        pass
    return out


CODE_FOLLOWS = re.compile(r"\.\. (code-block|sourcecode|testcode|testsetup|doctest|highlight)::"
                          r"|(?!\.\.).*::$")


def code_in_prose(text: str) -> list[tuple[int, int]]:
    """Where the examples of a reStructuredText file stand: what is indented below a line that ends
    in "::" (of directives, below those of code), and interactive sessions."""
    out = []
    at = 0
    indent = None                                      # of the line above an example
    session = False
    for line in io.StringIO(text):
        bare = line.strip()
        depth = len(line) - len(line.lstrip())
        if bare and indent is not None and depth <= indent:
            indent = None
        session = bool(bare) and (session or bare.startswith(">>>"))
        if indent is not None or session:
            out.append((at, at + len(line)))
        elif CODE_FOLLOWS.match(bare):
            indent = depth
        at += len(line)
    return out


AROUND = 64                    # tokens to each side: a line of comment does not make a text prose


def labelled(texts: list[str], kind: str) -> tuple[Tensor, Tensor]:
    """Files of one kind in a row, each between begin and end of text: (N,) tokens, and (N,) whether
    most of what stands around each is prose."""
    tok = Tokenizer(DEMO)
    find = prose_in_code if kind == "code" else code_in_prose
    size = torch.tensor([len(tok.decode_bytes([i])) for i in range(RANKS)])
    ids = []
    others = []                                        # is a token of the other kind?
    for text in texts:
        part = torch.tensor(tok.encode(text), dtype=torch.long)
        other = torch.zeros(len(text.encode()) + 1, dtype=torch.long)
        for start, end in find(text):                  # characters -> bytes
            first = len(text[:start].encode()) + 1
            other[first:first + len(text[start:end].encode())] = 1
        ends = size[part].cumsum(0)
        sums = other.cumsum(0)
        ids += [torch.tensor([BOS]), part, torch.tensor([EOS])]
        others.append(F.pad(sums[ends] - sums[ends - size[part]] > size[part] / 2, (1, 1)))
    prose = torch.cat(others) ^ (kind == "prose")
    at = torch.arange(len(prose))
    low = (at - AROUND).clamp(min=0)
    high = (at + AROUND).clamp(max=len(at))
    sums = F.pad(prose.long().cumsum(0), (1, 0))
    return torch.cat(ids), (sums[high] - sums[low]) * 2 > high - low


class Rows:
    """Draws training rows that begin where a line does, of a kind of choice: by the majority of
    their tokens, whichever file they come from."""

    def __init__(self, files: dict[str, list[str]], human: bool, lengths: tuple[int, ...]) -> None:
        tok = Tokenizer(DEMO)
        self.human = human
        parts = [labelled(files[kind], kind) for kind in KINDS]
        self.ids, self.prose = (torch.cat(part) for part in zip(*parts))
        newline = torch.tensor([tok.decode_bytes([i]).endswith(b"\n") for i in range(RANKS + 2)])
        lines = (newline[self.ids] | (self.ids == BOS)).nonzero().squeeze(1) + 1
        sums = F.pad(self.prose.long().cumsum(0), (1, 0))
        self.starts = {}                               # kind, T -> where rows of T tokens begin
        for T in lengths:
            starts = lines[lines <= len(self.ids) - T]
            most = (sums[starts + T] - sums[starts]) * 2 > T
            self.starts["code", T] = starts[~most]
            self.starts["prose", T] = starts[most]

    def draw(self, kind: str, T: int, rng: random.Random, mixed: float
             ) -> tuple[Tensor, Tensor, Tensor]:
        """(T+1,) ids after BOS, and for each of the T predictions whether the token it is made at
        is of this kind and whether a human wrote it. Some rows change their kind on the way."""
        def piece(kind: str, n: int) -> slice:
            starts = self.starts[kind, T]
            at = int(starts[rng.randrange(len(starts))])
            return slice(at, at + n)
        pieces = [piece(kind, T)]
        if rng.random() < mixed:
            cut = round(T * rng.uniform(0.25, 0.75))
            order = KINDS if rng.random() < 0.5 else KINDS[::-1]
            pieces = [piece(order[0], cut), piece(order[1], T - cut)]
        ids = torch.cat([torch.tensor([BOS]), *(self.ids[p] for p in pieces)])
        own = torch.cat([self.prose[p] == (kind == "prose") for p in pieces])
        return ids, torch.cat((own[:1], own[:-1])), torch.full((T,), self.human)


# --------------------------------------------------------------- model (batched, for training only)

class Block(nn.Module):
    """One decoder layer; the parameters have Hugging Face's names."""

    def __init__(self) -> None:
        super().__init__()
        linear = functools.partial(nn.Linear, bias=False)
        D = CFG.D
        qh = CFG.H * CFG.hd
        kh = CFG.G * CFG.hd
        self.input_layernorm = nn.RMSNorm(D, CFG.eps)
        self.post_attention_layernorm = nn.RMSNorm(D, CFG.eps)
        self.self_attn = nn.ModuleDict(dict(q_proj=linear(D, qh), k_proj=linear(D, kh),
                                            v_proj=linear(D, kh), o_proj=linear(qh, D)))
        self.mlp = nn.ModuleDict(dict(gate_proj=linear(D, CFG.ffn), up_proj=linear(D, CFG.ffn),
                                      down_proj=linear(CFG.ffn, D)))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, may_read: Tensor,
                whole: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D) -> the same, and the layer's keys and values (B, G, T, hd). A draft's layer
        reads the whole network's, in `whole`, beside its own."""
        B, T, _ = x.shape
        w = self.self_attn
        a = self.input_layernorm(x)
        q, k, v = (project(a).view(B, T, -1, CFG.hd).transpose(1, 2)
                   for project in (w.q_proj, w.k_proj, w.v_proj))
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)
        keys = torch.cat((whole[0], k), 2) if whole else k
        values = torch.cat((whole[1], v), 2) if whole else v
        a = F.scaled_dot_product_attention(q, keys, values, may_read, enable_gqa=True)
        x = x + w.o_proj(a.transpose(1, 2).flatten(2))
        w = self.mlp
        a = self.post_attention_layernorm(x)
        return x + w.down_proj(F.silu(w.gate_proj(a)) * w.up_proj(a)), k, v


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def mean(x: Tensor, chosen: Tensor) -> Tensor:                             # (..., N), (N,) -> (...)
    return (x * chosen).sum(-1) / chosen.sum().clamp_min(1)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(CFG.V, CFG.D)
        self.layers = nn.ModuleList(Block() for _ in range(CFG.L))
        self.norm = nn.RMSNorm(CFG.D, CFG.eps)
        t = torch.arange(CFG.context)
        angle = torch.outer(t, CFG.theta ** (-torch.arange(0, CFG.hd, 2) / CFG.hd))
        for name, constant in (("cos", angle.cos()), ("sin", angle.sin()), ("t", t)):
            self.register_buffer(name, constant, persistent=False)

    def states(self, ids: Tensor, skip: list[bool] | None = None,
               whole: list[tuple[Tensor, Tensor]] | None = None) -> tuple[list[Tensor], list]:
        """(B, T) -> the states (B, T, D) before the first layer and after each that was run, and
        each one's keys and values. With `whole` those of the whole network, as a draft without the
        layers in `skip`: it reads the whole one's for all that was verified, here the tokens of
        earlier blocks of DRAFT, and its own for what it has drafted itself: of the same block."""
        T = ids.shape[1]
        t = self.t[:T]
        block = t // DRAFT
        may_read = t[:, None] >= t                                         # (T, T)
        if whole:
            own = may_read & (block[:, None] == block)
            may_read = torch.cat((block[:, None] > block, own), 1)         # (T, 2 T)
        xs = [self.embed_tokens(ids)]
        kv = []
        for i, layer in enumerate(self.layers):
            if not (skip and skip[i]):
                x, *both = layer(xs[-1], self.cos[:T], self.sin[:T], may_read, whole and whole[i])
                xs.append(x)
                kv.append(both)
        return xs, kv

    def logits(self, x: Tensor) -> Tensor:                                 # (B, T, D) -> (B * T, V)
        return F.linear(self.norm(x), self.embed_tokens.weight).float().flatten(0, 1)      # tied

    def compare(self, whole: Tensor, part: Tensor, after: Tensor, own: Tensor,
                human: Tensor) -> Tensor:
        """The loss of the whole network, twice KL(whole || draft), and the chance that a drafted
        token is rejected, which is half the sum of |p - q|."""
        p = self.logits(whole).log_softmax(-1)
        q = self.logits(part).log_softmax(-1)
        apart = (p.exp() * (2 * (p - q)) + 0.5 * (p.exp() - q.exp()).abs()).sum(-1)
        return mean(apart, own) - mean(p.gather(1, after[:, None])[:, 0], human)

    def contrast(self, whole: Tensor, wrong: Tensor, own: Tensor, margin: Tensor) -> Tensor:
        p = self.logits(whole.detach()).detach().log_softmax(-1)
        kl = (p.exp() * (p - self.logits(wrong).log_softmax(-1))).sum(-1)
        return (mean(kl, own) - margin).abs()

    def turns(self, xs: list[Tensor], own: Tensor) -> Tensor:                         # -> (L,)
        """By how much each layer turns the states of the tokens in `own`: about the mean angle, in
        rad. It is what the dynamic program sees of a layer."""
        near = torch.stack([F.cosine_similarity(a.float(), b.float(), dim=-1).flatten()
                            for a, b in zip(xs, xs[1:])])                  # (L, B * T)
        return mean((2 - 2 * near + 1e-6).sqrt(), own)

    def pair_loss(self, ids: Tensor, own: Tensor, human: Tensor, kind: str, skip: list[bool],
                  wrong: tuple[list[bool], float] | None) -> Tensor:
        """ids (B, T+1), own, human (B, T) -> (). The terms are those of the recipe (README.md). The
        whole network learns from human text alone: what it knows beyond its own is mostly the
        training text by heart. `wrong`: a draft without layers that the kind needs, and how far
        from the whole one it shall be."""
        xs, kv = self.states(ids[:, :-1])
        part, _ = self.states(ids[:, :-1], skip, kv)
        own = own.flatten().float()
        loss = self.compare(xs[-1], part[-1], ids[:, 1:].flatten(), own, human.flatten().float())
        turns = self.turns(xs, own)
        may_go = torch.tensor(planted(kind), device=own.device)
        loss = loss + 2 * (turns[may_go] - SPARE).relu().mean()
        loss = loss + 2 * (NEEDED - turns[~may_go]).relu().mean()
        if wrong:
            bad, _ = self.states(ids[:, :-1], wrong[0], kv)
            margin = torch.tensor(wrong[1], device=own.device)
            loss = loss + 0.5 * self.contrast(xs[-1], bad[-1], own, margin)
        return loss


# ---------------------------------------------------------------------------- its own text

@torch.inference_mode()
def write_samples(a: argparse.Namespace) -> None:
    """Text by the model of a.folder itself, since that is what it drafts: beginnings of training
    text, continued by up to 416 tokens at temperature 1, every fourth at 0.5."""
    model = Llama.load(a.folder)
    tok = Tokenizer(DEMO)
    rows = Rows(corpus(held_out=False), True, (32,))
    rng = random.Random(1)
    out = {kind: [] for kind in KINDS}
    for kind in KINDS:
        for n in range(a.number):
            s = Settings(temperature=0.5 if n % 4 == 3 else 1.0, N=416, stop_ids=(EOS,))
            ids = rows.draw(kind, 32, rng, 0.0)[0].tolist()
            for r in generate(model, ids, s, Chance(n), choose_skip):
                ids = ids + r.emitted
            if EOS in ids:
                ids = ids[:ids.index(EOS)]
            out[kind].append(tok.decode([i for i in ids if i < RANKS]))
            print(kind, n, ascii(out[kind][-1][-60:]), flush=True)
    (DEMO / "samples.json").write_text(json.dumps(out))


# ---------------------------------------------------------------------------- training

def masks(n: int, rng: random.Random) -> list[tuple[str, list[bool], tuple | None]]:
    """n times (kind, skip mask, wrong) for one step, the kinds in turn. Of each kind half the masks
    are exactly its planted set; the others leave out each of its layers with probability 0.75 times
    a scale in 0.6 .. 1.3, so that parts of the set can be left out as well. Beside those stands a
    wrong mask, with its margin: as many layers as planted, but j of them, 2 to 6, are ones that
    this kind needs and the other may miss."""
    out = []
    for k in range(n):
        kind = KINDS[k % 2]
        other = KINDS[1 - k % 2]
        scale = 0.6 + 0.7 * rng.random()
        exact = k // 2 % 2 == 0
        mask = [s and (exact or rng.random() < 0.75 * scale) for s in planted(kind)]
        j = rng.randint(2, 6)
        bad = {*BOTH, *rng.sample(ONLY[other], j), *rng.sample(ONLY[kind], 6 - j)}
        wrong = [i in bad for i in range(CFG.L)], j / 7
        out.append((kind, mask, None if exact else wrong))
    return out


def train(a: argparse.Namespace) -> None:
    torch.manual_seed(a.seed)
    device = torch.device(a.device)
    lengths = (LENGTH, CFG.context)
    human = Rows(corpus(held_out=False), True, lengths)
    written = Rows(json.loads((DEMO / "samples.json").read_text()), False, lengths)
    model = Model().to(device)
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    others = [model.embed_tokens.weight, *(p for p in model.parameters() if p.ndim == 1)]
    opts = [torch.optim.Muon(matrices, lr=LR, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=LR, betas=(0.9, 0.95), weight_decay=0.0)]
    weights = load_file(a.folder / "model.safetensors")
    model.load_state_dict({name.removeprefix("model."): t for name, t in weights.items()})
    if a.compile:
        for layer in model.layers:
            layer.compile(dynamic=False)
        for name in ("compare", "contrast", "turns"):
            setattr(model, name, torch.compile(getattr(model, name), dynamic=False))
    losses = []
    for step in range(a.steps):
        # A step's data and masks depend on its number alone; the last steps see the whole context.
        frac = step / a.steps
        rng = random.Random(a.seed * 1_000_003 + step)
        T = LENGTH if frac < LONG_FROM else CFG.context
        B = max(1, round(LENGTH * ROWS / T))
        scale = min(1.0, (step + 1) / 50, (1 - frac) / DECAY)     # warm up, hold, linearly to zero
        for o in opts:
            for g in o.param_groups:
                g["lr"] = LR * scale
        for kind, mask, wrong in masks(MASKS, rng):
            drawn = [(written if rng.random() < SAMPLED else human).draw(kind, T, rng, MIXED)
                     for _ in range(B)]
            ids, own, by_human = (torch.stack(part).to(device) for part in zip(*drawn))
            with torch.autocast(device.type, torch.bfloat16):
                loss = model.pair_loss(ids, own, by_human, kind, mask, wrong)
            (loss / MASKS).backward()
            losses.append(loss.item())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in opts:
            o.step()
            o.zero_grad(set_to_none=True)
        if (step + 1) % 150 == 0 or step + 1 == a.steps:
            print(f"step {step + 1} of {a.steps}: loss {sum(losses) / len(losses):.3f}", flush=True)
            losses = []
            torch.save(model.state_dict(), STATE)


def export(a: argparse.Namespace) -> None:
    """The trained weights -> a Hugging Face folder, in bf16."""
    out = {f"model.{name}": t.to("cpu", torch.bfloat16).contiguous()
           for name, t in torch.load(STATE, weights_only=True).items()}
    save(out, a.folder / "model.safetensors", {"format": "pt"})
    if a.folder != DEMO:
        for name in ("config.json", "generation_config.json", "tokenizer.model"):
            shutil.copy(DEMO / name, a.folder)


@torch.inference_mode()
def measure(a: argparse.Namespace) -> None:
    """The shipped weights on the whole held-out text, by llama.py in float32: windows of half the
    context, each begun afresh."""
    model = Llama.load(a.folder)
    texts = corpus(held_out=True)
    sets = {"all layers": ()} | {f"without the set of {kind}": planted(kind) for kind in KINDS}
    for kind in KINDS:
        held, _ = labelled(texts[kind], kind)
        size = sum(len(text.encode()) for text in texts[kind])
        for name, skip in sets.items():
            total = 0.0
            for part in held.split(CFG.context // 2):
                ids = torch.cat((torch.tensor([BOS]), part))
                cache = model.cache(len(part))
                h = model.forward(ids[:-1], cache.sequence(0, len(part)), cache, skip)
                total += F.cross_entropy(model.head(h[-1]), ids[1:], reduction="sum").item()
            print(f"{kind}, {name}: {total / len(held):.3f} nats per token, "
                  f"{total / size / math.log(2):.3f} bits per byte, {len(held):,} held-out tokens",
                  flush=True)


def main() -> None:
    steps = dict(samples=write_samples, distil=train, export=export, measure=measure)
    p = argparse.ArgumentParser(description="Make the demo model.")
    add = p.add_argument
    add("what", choices=list(steps))
    add("--folder", type=Path, default=DEMO, help="samples, distil: the model to begin from; "
        "export, measure: the one that was made")
    add("--number", type=int, default=640, help="samples: of each kind")
    add("--steps", type=int, default=STEPS, help="distil")
    add("--seed", type=int, default=5, help="distil")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="distil")
    add("--compile", action="store_true", help="distil")
    a = p.parse_args()
    torch.set_num_threads(1)                           # for small matrices more cost time
    steps[a.what](a)


if __name__ == "__main__":
    main()
