"""gpu/check.py by a dry run: all its steps with a small model on a CPU."""
import json
from types import SimpleNamespace

import pytest

from dp_layer_skip import torch
from gpu import check, synthetic
from policy.costs import layer_weights
from speculative import Settings
from tests.helpers import decode, flags
from tests.wrong_programs import running


def test_a_dry_run_goes_through_every_step_and_one_that_fails_costs_only_itself(
        tmp_path, monkeypatch):
    """Rejects a step that does not fit the program any more, one that takes the others with it, a
    report that is written at the end alone, and tests that fail unseen."""
    seen = []

    def broken(self):
        seen.append(json.loads((tmp_path / "r").read_text()))
        raise RuntimeError("no memory\nand much more")
    monkeypatch.setattr(check.Check, "lossless", broken)
    monkeypatch.setattr(check.subprocess, "run", lambda command, **how: SimpleNamespace(
        returncode=7, stdout=" ".join(command[-3:]), stderr=""))
    assert check.main([str(tmp_path / "r"), "--tiny"]) == 0
    report = json.loads((tmp_path / "r").read_text())
    failed = report.pop("lossless by enumeration")["failed"]
    assert failed == "RuntimeError no memory" and "bandwidth" in seen[0]
    assert len(report) == 12 and not any("failed" in step for step in report.values()), report
    assert report["passes"]["draft, 11 left out"]["plain_steps"] < 1
    parts = [row["parts"] for name, row in report["texts"].items() if name.endswith("T = 0")]
    assert parts == ["nowhere"] * 4
    tests = report["tests"]
    assert (tests["status"], tests["said"]) == (7, "gpu/test_gpu.py -k cuda")


def test_a_gpu_that_computes_something_else_is_seen(tmp_path, monkeypatch):
    """Rejects comparisons that compare nothing."""
    steps = check.Check(tmp_path / "r", True, None)
    with torch.inference_mode():
        assert steps.lossless()["largest_error"] < 1e-12
        with running("residual = p"):
            assert steps.lossless()["largest_error"] > 1e-4
        fast = check.replayed(steps.model, check.K, 2, 1)
        head = fast.head
        monkeypatch.setattr(fast, "head", lambda x: -head(x))
        assert steps.texts(fast, fast)["plain, eager, T = 0"]["parts"] == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_a_line_says_what_is_missing(tmp_path, monkeypatch, capsys):
    """Rejects a traceback, and a run on the CPU that is taken for one on a GPU."""
    for amiss, said in ((None, "sees no CUDA GPU"), ("driver too old", "driver too old\n")):
        monkeypatch.setattr(check, "unusable", lambda: amiss)
        assert check.main([str(tmp_path / "r")]) == 2
        assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("quiet, low, high", [(0.0, 1, 1), (0.2, 0.5, 0.999), (1.0, 0, 0.4)])
def test_a_random_model_is_accepted_as_far_as_its_quiet_layers_are_quiet(
        monkeypatch, quiet, low, high):
    """Rejects quiet layers that are as loud as others, at the ends or of another number, and
    activations that blow up or die out with depth; idle layers must be those that are found. And
    sizes of an 8B that add up to another model."""
    monkeypatch.setattr(synthetic, "QUIET", quiet)
    model = synthetic.random_llama(synthetic.TINY, torch.device("cpu"), torch.float32)
    rounds = decode(model, [1, 2, 3], Settings(K=4, M=9, N=60))
    drafted = sum(len(r.drafted) for r in rounds)
    assert low <= sum(r.accepted for r in rounds) / drafted <= high
    quiet_ones = synthetic.quiet_layers(16)
    assert len(quiet_ones) == 9 and not quiet_ones & {0, 15}
    assert quiet > 0 or rounds[-1].skip == flags(16, quiet_ones)
    h = model.forward(torch.arange(8), model.cache(8).sequence(0, 8), model.cache(8))
    assert all(0.5 < x.std() < 3 for x in h)
    c = synthetic.EIGHT_B
    norms = (2 * c.L + 1) * c.D
    assert c.L * layer_weights(c) + 2 * c.V * c.D + norms == 8_030_261_248
