"""Small models and short ways to run them, for the tests of every room."""
import json
from pathlib import Path

import torch

import dp_layer_skip
import llama
import speculative
from speculative import Chance

torch.set_num_threads(1)
ROOT = Path(llama.__file__).resolve().parent
DEMO = ROOT / "demo"


def put(folder, files):
    """Write files, name -> bytes, text or a JSON value; None: take it away."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            text = content if isinstance(content, str | bytes) else json.dumps(content)
            (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def flags(L, chosen):
    """One flag per layer: is it among the chosen?"""
    return tuple(i in chosen for i in range(L))


def assert_same_choice(a, b, tolerance):
    """Two runs of the dynamic program found the same, up to rounding."""
    D = torch.tensor(a.D, dtype=torch.float64)
    E = torch.tensor(b.D, dtype=torch.float64)
    torch.testing.assert_close(D, E, rtol=0, atol=tolerance, equal_nan=True)
    assert a.skipped == b.skipped
    assert [a.skip(j) for j in range(len(a.D[0]))] == [b.skip(j) for j in range(len(b.D[0]))]


def tiny_llama(V=3, L=3, seed=0, dtype=torch.float64, D=8, H=2, G=1, hd=4, ffn=8, device="cpu"):
    """Random weights, large enough that every layer matters and q is far from p."""
    gen = torch.Generator().manual_seed(seed)

    def new(*shape, scale=1.0):
        return (torch.randn(shape, generator=gen, dtype=torch.float64) * scale).to(device, dtype)

    cfg = llama.Config(L, D, H, G, hd, ffn, V, 1e-5, 256, False, 100.0, None)
    one = torch.ones(D, dtype=dtype, device=device)
    eps = torch.tensor(1e-5, dtype=torch.promote_types(dtype, torch.float32), device=device)
    layers = [llama.Layer(one, new(D, (H + 2 * G) * hd, scale=D ** -0.5), new(H * hd, D, scale=0.5),
                          one, new(D, 2 * ffn, scale=D ** -0.5), new(ffn, D, scale=0.5), eps)
              for _ in range(L)]
    return llama.Llama(cfg, new(V, D), layers, one, new(V, D, scale=0.5))


def full_model(model, text):
    """Logits (V,) after `text`, by one fresh pass: the reference of decoders."""
    h, _ = having_read(model, text, spare=0)
    return model.head(h[-1:])[0]


def having_read(model, text, spare):
    """(h, cache) after a pass over `text`: the states of its last token, (L+1, D), and a cache with
    so many spare slots after."""
    cache = model.cache(len(text) + spare)
    ids = torch.tensor(text, device=model.device)
    h = model.forward(ids, cache.sequence(0, len(text)), cache)
    return torch.stack([x[-1] for x in h]), cache


def decode(model, prompt, s, chance=0, loop=None):
    """The rounds of a whole run with the real dynamic program; `chance` may be a seed."""
    if isinstance(chance, int):
        chance = Chance(chance)
    loop = loop or speculative.generate
    return list(loop(model, list(prompt), s, chance, dp_layer_skip.choose_skip))


def tokens(rounds):
    """The text that came out."""
    return [token for r in rounds for token in r.emitted]
