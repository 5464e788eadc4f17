"""Where rounding matters: sums, statistics and rotary tables are float32 or wider, whatever the
model is, and bfloat16 costs no more than its 8 bits.
"""
import cmath
import itertools
import math

import pytest
import torch

import llama
from speculative import Settings, probabilities
from tests.helpers import decode, tiny_llama
from tests.slow_llama import AS_4, AS_5, random_checkpoint, reference_frequencies, worst_error
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
    """Rejects arithmetic in bfloat16, overflow at tiny temperatures, no numbers at vast ones, and
    an empty nucleus."""
    logits = torch.tensor([-300.0, 0.0, 300.0, 299.0], dtype=dtype)
    for temperature in (1e-300, 1e-46, 1e-30, 1e-3, 1.0, 1e300):
        for top_k, top_p in ((0, 1.0), (9, 1.0), (2, 0.5), (1, 1.0), (0, 1e-300)):
            p = probabilities(logits, Settings(temperature=temperature, top_k=top_k, top_p=top_p))
            assert p.dtype == torch.float64 and p.isfinite().all()
            assert abs(p.sum().item() - 1) < 1e-6
    assert probabilities(logits, Settings(temperature=1e300)).tolist() == pytest.approx([0.25] * 4)


@rejects("norms in bfloat16")
def test_in_bfloat16_norms_are_computed_in_float32():
    """Rejects statistics in bfloat16, which change a value in five (in float32, 1 in some 2^14)."""
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    wide = x.double()
    exact = (wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).bfloat16()
    got = llama.rms_norm(x, torch.ones(512).bfloat16(), torch.tensor(1e-5))
    assert got.dtype == torch.bfloat16
    assert (got != exact).double().mean() < 1e-3


@rejects("rotary tables in bfloat16")
def test_in_bfloat16_rows_are_turned_by_exact_tables_to_the_end_of_a_long_context(tmp_path):
    """Rejects angles computed in float32, wrong by 1e-3 there, and rows turned in bfloat16."""
    c, _ = random_checkpoint(tmp_path, AS_4)
    cfg = llama.Config.load(tmp_path)
    narrow, wide = (llama.Cache(cfg, 32768, torch.device("cpu"), dtype).sequence(32704, 64)
                    for dtype in (torch.bfloat16, torch.float64))
    want = [cmath.exp(32767j * f) for f in reference_frequencies(c)]
    assert narrow.cos[-1, 0].tolist() == pytest.approx([z.real for z in want * 2], abs=1e-7)
    assert narrow.sin[-1, 0, 8:].tolist() == pytest.approx([z.imag for z in want], abs=1e-7)
    x = torch.randn(64, 1, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = llama.rotate(x.double(), wide).bfloat16()
    assert (llama.rotate(x, narrow) != exact).double().mean() < 2e-3


def test_a_draft_of_no_numbers_draws_no_token():
    """Rejects token 0, the argmax of what is no number, for an answer: nobody else looks at the
    logits of a draft."""
    model = tiny_llama()
    passes = itertools.count()

    def head(x):
        return llama.Llama.head(model, x) * (math.nan if next(passes) == 1 else 1)
    model.head = head
    with pytest.raises(FloatingPointError):
        decode(model, [0], Settings(temperature=1.0, K=1))
