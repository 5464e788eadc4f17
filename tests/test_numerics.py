"""Where rounding matters: sums, statistics and rotary tables are float32 or wider, whatever
the model is, and bfloat16 costs no more than its 8 bits.
"""
import cmath
import math

import pytest
import torch

import llama
from speculative import Chance, Settings, probabilities
from tests.slow_llama import (AS_4, AS_5, random_checkpoint, reference_frequencies, worst_error)
from tests.wrong_programs import rejects

# bfloat16 rounds by up to 2^-9 = 0.002, some ten times per layer; 0.015 was measured.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 0.05}


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_every_row_is_llama_up_to_rounding(tmp_path, dtype):
    """Rejects arithmetic that is coarser somewhere than the model's dtype."""
    stored = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32    # is loaded exactly
    assert worst_error(tmp_path, overrides=AS_5, stored=stored, dtype=dtype) < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_probabilities_are_float64_and_finite_at_any_temperature(dtype):
    """Rejects arithmetic in bfloat16, overflow at tiny temperatures, and an empty
    nucleus."""
    logits = torch.tensor([-300.0, 0.0, 300.0, 299.0], dtype=dtype)
    for temperature in (1e-300, 1e-46, 1e-30, 1e-3, 1.0, 1e6):
        for top_k, top_p in ((0, 1.0), (9, 1.0), (2, 0.5), (1, 1.0), (0, 1e-300)):
            p = probabilities(logits, Settings(temperature=temperature, top_k=top_k, top_p=top_p))
            assert p.dtype == torch.float64
            assert p.isfinite().all()
            assert abs(p.sum().item() - 1) < 1e-6


@rejects("norms in bfloat16")
def test_in_bfloat16_norms_are_computed_in_float32():
    """Rejects statistics in bfloat16, which change a value in five (in float32, 1 in some
    2^14)."""
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    wide = x.double()
    exact = (wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).bfloat16()
    got = llama.rms_norm(x, torch.ones(512).bfloat16(), torch.tensor(1e-5))
    assert got.dtype == torch.bfloat16
    assert (got != exact).double().mean() < 1e-3


@rejects("rotary tables in bfloat16")
def test_in_bfloat16_rows_are_turned_in_float32():
    """Rejects rotary tables in bfloat16."""
    cfg = llama.Config(1, 8, 1, 1, 64, 8, 8, 1e-5, 64, False, 1e4, None)
    x = torch.randn(64, 1, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    wide = llama.Cache(cfg, 64, torch.device("cpu"), torch.float64).sequence(0, 64)
    narrow = llama.Cache(cfg, 64, torch.device("cpu"), torch.bfloat16).sequence(0, 64)
    exact = llama.rotate(x.double(), wide).bfloat16()
    assert (llama.rotate(x, narrow) != exact).double().mean() < 1e-3


def test_rotary_tables_are_exact_at_the_end_of_a_long_context(tmp_path):
    """Rejects angles computed in float32, wrong by 1e-3 there."""
    c, _ = random_checkpoint(tmp_path, AS_4)
    cache = llama.Cache(llama.Config.load(tmp_path), 32768, torch.device("cpu"), torch.bfloat16)
    want = [cmath.exp(32767j * f) for f in reference_frequencies(c)]
    assert cache.cos[-1, 0].tolist() == pytest.approx([z.real for z in want * 2], abs=1e-7)
    assert cache.sin[-1, 0, 8:].tolist() == pytest.approx([z.imag for z in want], abs=1e-7)


def test_where_nothing_can_be_drawn_nothing_is():
    """Rejects token 0 for an answer where p holds no number above 0, in a draft too, whose logits
    nobody else looks at; and no number at a temperature beyond float32, with a filter or without."""
    for p in (torch.zeros(3), torch.full((3,), math.nan)):
        assert Chance(0).draw(p) == -1
    logits = torch.tensor([0.0, 3.0, 2.0])
    for how, want in ((dict(), [1 / 3] * 3), (dict(top_k=1), [0, 1, 0])):
        p = probabilities(logits, Settings(temperature=1e300, **how))
        assert p.tolist() == pytest.approx(want)
