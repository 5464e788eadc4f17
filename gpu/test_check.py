"""gpu/check.py by a dry run: all its steps with a small model on a CPU."""
import json

import pytest

from dp_layer_skip import torch
from gpu import check, trial
from policy.costs import layer_weights
from speculative import Settings
from tests.helpers import decode
from tests.wrong_programs import running


def test_a_dry_run_goes_through_every_step_and_one_that_fails_costs_only_itself(
        tmp_path, monkeypatch):
    """Rejects a step that does not fit the program any more, one that takes the others with it, a
    report that is written at the end alone, and tests that fail unseen."""
    seen = []

    def broken(self, fast):
        seen.append(json.loads((tmp_path / "r.json").read_text()))
        raise RuntimeError("no profiler\nand much more")
    monkeypatch.setattr(check.Check, "kernels", broken)
    assert check.main([str(tmp_path / "r"), "--tiny"]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report.pop("kernels")["failed"] == "RuntimeError no profiler" and "passes" in seen[0]
    assert len(report) == 18
    other = report.pop("transformers")
    assert "transformers" in other["skipped"] if "skipped" in other else other["logits"] < 1e-5
    for name, step in report.items():
        assert not {"failed", "skipped"} & step.keys(), (name, step)
    assert report["lossless by enumeration"]["largest_error"] < 1e-12
    for name in ("plain kernels against eager", "kernels against eager"):
        assert report[name]["after 60"]["verify"] < 1e-5 and report[name]["after 60"]["same_set"]
    assert report["passes"]["draft, 11 left out"]["plain_steps"] < 1
    assert report["texts"]["paper, T = 0"]["parts"] == "nowhere"
    assert report["tests"]["status"] == 0, report["tests"]
    page = (tmp_path / "r.md").read_text()
    assert "| plain step |" in page and "failed: RuntimeError no profiler" in page


def test_a_gpu_that_computes_something_else_is_seen(tmp_path, monkeypatch):
    """Rejects comparisons that compare nothing."""
    steps = check.Check(tmp_path / "r", 99, True, None)
    with torch.inference_mode():
        with running("residual = p"):
            assert steps.lossless()["largest_error"] > 1e-4
        fast = check.replayed(steps.model, check.K, 2, 1)
        head = fast.head
        monkeypatch.setattr(fast, "head", lambda x: head(x) * 1.01)
        assert min(row["verify"] for row in steps.agreement(fast).values()) > 1e-3


def test_no_step_begins_when_time_is_up(tmp_path):
    """Rejects a run that outlasts the time it was given."""
    assert check.main([str(tmp_path / "r"), "--tiny", "--seconds", "0"]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert len(report) == 19 and all("skipped" in step for step in report.values())


@pytest.mark.parametrize("amiss", [None, "driver too old"])
def test_without_a_gpu_a_line_says_what_is_missing(tmp_path, monkeypatch, capsys, amiss):
    """Rejects a traceback, and a run on the CPU that is taken for one on a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(check, "unusable", lambda: amiss)
    assert check.main([str(tmp_path / "r")]) == 2 and not list(tmp_path.iterdir())
    assert (amiss or "sees no CUDA GPU") in capsys.readouterr().err


@pytest.mark.parametrize("quiet, low, high", [(0.0, 1, 1), (0.2, 0.5, 0.999), (1.0, 0, 0.4)])
def test_a_random_model_is_accepted_as_far_as_its_quiet_layers_are_quiet(
        monkeypatch, quiet, low, high):
    """Rejects quiet layers that are as loud as others, and activations that blow up or die out with
    depth."""
    monkeypatch.setattr(trial, "QUIET", quiet)
    model = trial.random_llama(trial.TINY, torch.device("cpu"), torch.float32)
    rounds = decode(model, [1, 2, 3], Settings(K=4, M=9, N=60))
    drafted = sum(len(r.drafted) for r in rounds)
    assert low <= sum(r.accepted for r in rounds) / drafted <= high
    h = model.forward(torch.arange(8), model.cache(8).sequence(0, 8), model.cache(8))
    assert all(0.5 < x.std() < 3 for x in h)


def test_the_random_8b_has_an_8bs_number_of_weights():
    """Rejects sizes that add up to another model."""
    c = trial.EIGHT_B
    norms = (2 * c.L + 1) * c.D
    assert c.L * layer_weights(c) + 2 * c.V * c.D + norms == 8_030_261_248
