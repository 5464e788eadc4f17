"""Random models, made where they are used: for measurements where no real weights can be had.

9 in 16 of their layers are quiet: they add a tenth (QUIET) of what the others do to the residual
stream. That sets how much is accepted of a draft without them.
"""
import random

from llama import Config, Layer, Llama, Tensor, torch

REST = dict(eps=1e-5, context=8192, tied=False, theta=5e5, scaling=None)
EIGHT_B = Config(L=32, D=4096, H=32, G=8, hd=128, ffn=14336, V=128256, **REST)
TINY = Config(L=16, D=64, H=4, G=2, hd=16, ffn=96, V=200, **REST)
SMALL = Config(L=3, D=8, H=2, G=1, hd=4, ffn=8, V=3, **REST)       # every branch can be run
QUIET = 0.1


def quiet_layers(L: int) -> set[int]:
    """9 in 16, scattered, never the first nor the last."""
    return set(random.Random(0).sample(range(1, L - 1), 9 * L // 16))


def random_llama(c: Config, device: torch.device, dtype: torch.dtype) -> Llama:
    """A model in which every matrix keeps the size of its input; what leaves a layer is scaled so
    that depth does not blow it up, the head so that distributions are neither flat nor one-hot."""
    gen = torch.Generator(device).manual_seed(0)

    def matrix(n_out: int, n_in: int, scale: float = 1.0) -> Tensor:
        w = torch.randn(n_out, n_in, generator=gen, device=device, dtype=dtype)
        return w.mul_(scale * n_in ** -0.5)

    one = torch.ones(c.D, device=device, dtype=dtype)
    quiet = quiet_layers(c.L)
    layers = []
    for i in range(c.L):
        adds = (2 * c.L) ** -0.5 * (QUIET if i in quiet else 1)
        layers.append(Layer(attn_norm=one, qkv=matrix((c.H + 2 * c.G) * c.hd, c.D).t(),
                            out=matrix(c.D, c.H * c.hd, adds).t(), mlp_norm=one,
                            gate_up=matrix(2 * c.ffn, c.D).t(),
                            down=matrix(c.D, c.ffn, adds).t()))
    return Llama(c, matrix(c.V, c.D, c.D ** 0.5), layers, one, matrix(c.V, c.D, 4))
