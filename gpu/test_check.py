"""gpu/check.py by a dry run: all its steps with a small model on a CPU."""
import json
import re
import types

import pytest

import clasp_mini
from dp_layer_skip import torch
from gpu import check, synthetic
from speculative import Settings
from tests.helpers import ROOT, decode


def test_a_dry_run_goes_through_every_step_and_one_that_fails_costs_only_itself(
        tmp_path, monkeypatch, capsys):
    """Rejects a step that does not fit the program any more, one that takes the others with it, a
    report that is written at the end alone, and comparisons that compare nothing."""
    seen = []

    def broken(self, fast):
        seen.append(json.loads((tmp_path / "r.json").read_text()))
        raise RuntimeError("no profiler\nand much more")
    monkeypatch.setattr(check.Check, "kernels", broken)
    assert check.main([str(tmp_path / "r"), "--tiny"]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report.pop("kernels")["failed"] == "RuntimeError no profiler" and "passes" in seen[0]
    assert len(report) == 15
    for name, step in report.items():
        assert not {"failed", "skipped"} & step.keys(), (name, step)
    lossless = report["lossless by enumeration"]
    assert lossless["largest_error"] < 1e-12 and lossless["runs_with_rejections"] > 9
    for name in ("plain kernels against eager", "kernels against eager"):
        assert report[name]["after 60"]["verify"] < 1e-5 and report[name]["after 60"]["same_set"]
    assert report["passes"]["draft, 11 left out"]["plain_steps"] < 1
    assert report["texts"]["paper, T = 0"]["parts"] == "nowhere"
    page = (tmp_path / "r.md").read_text()
    assert "| plain step |" in page and "failed: RuntimeError no profiler" in page


def test_no_step_begins_when_time_is_up(tmp_path):
    """Rejects a run that outlasts the time it was given."""
    assert check.main([str(tmp_path / "r"), "--tiny", "--seconds", "0"]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert len(report) == 16 and all("skipped" in step for step in report.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_a_line_says_what_is_missing(tmp_path, monkeypatch, capsys):
    """Rejects a traceback, and a run on the CPU that is taken for one on a GPU."""
    assert check.main([str(tmp_path / "r")]) == 2
    assert "sees no CUDA GPU" in capsys.readouterr().err
    monkeypatch.setattr(check, "unusable", lambda: "driver too old")
    assert check.main([str(tmp_path / "r")]) == 2
    assert capsys.readouterr().err.endswith("driver too old\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("factor, low, high", [(0.0, 1, 1), (0.2, 0.5, 0.999), (1.0, 0, 0.4)])
def test_a_random_model_is_accepted_as_far_as_its_quiet_layers_are_quiet(
        monkeypatch, factor, low, high):
    """Rejects quiet layers that are as loud as others, and activations that blow up or die out with
    depth; idle layers must be exactly those that the program finds."""
    monkeypatch.setattr(synthetic, "QUIET", factor)
    model = synthetic.random_llama(synthetic.TINY, torch.device("cpu"), torch.float32)
    quiet = synthetic.quiet_layers(16)
    rounds = decode(model, [1, 2, 3], Settings(K=4, M=len(quiet), N=100))
    drafted = sum(len(r.drafted) for r in rounds)
    assert low <= sum(r.accepted for r in rounds) / drafted <= high
    if factor == 0:
        assert {i for i, out in enumerate(rounds[-1].skip) if out} == quiet
    h = model.forward(torch.arange(8), model.cache(8).sequence(0, 8), model.cache(8))
    assert all((x.std(-1) > 0.5).all() and (x.std(-1) < 3).all() for x in h)


def test_the_random_8b_has_an_8bs_numbers_of_weights_and_quiet_layers(monkeypatch):
    """Rejects shapes that add up to another model, and quiet layers at the ends."""
    none = types.SimpleNamespace(manual_seed=lambda seed: None)
    monkeypatch.setattr(torch, "Generator", lambda device: none)       # meta has no random numbers
    model = synthetic.random_llama(synthetic.EIGHT_B, torch.device("meta"), torch.bfloat16)
    every = [model.embed, model.norm, model.lm_head, *(x for w in model.layers for x in w)]
    assert sum(x.numel() for x in every) == 8_030_261_248
    quiet = synthetic.quiet_layers(32)
    assert len(quiet) == 18 and not quiet & {0, 31}


def test_the_commands_of_the_readme_exist():
    """Rejects a script that has moved and a flag that is gone."""
    text = (ROOT / "gpu" / "README.md").read_text(encoding="utf-8")
    commands = [line.partition("#")[0] for block in re.findall(r"```sh\n(.*?)```", text, re.S)
                for line in block.splitlines()]
    assert len(commands) > 3
    for script in re.findall(r"[\w/]+\.py", " ".join(commands)):
        assert (ROOT / script).exists(), script
    known = clasp_mini.parser().format_help() + (check.__doc__ or "")
    flags = set(re.findall(r"(?<!torchrun )--[a-z][a-z-]*", text))
    assert flags and flags <= set(re.findall(r"--[a-z-]+", known))
