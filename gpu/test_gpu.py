"""Recorded passes are the plain ones, and the host waits for few of them. Without a GPU all but the
recording itself is tested: trial.Played repeats calls where a graph repeats kernels. And check.py,
which measures all this on a GPU, runs dry.
"""
import collections
import itertools
import json
from unittest.mock import MagicMock, Mock

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

import clasp_mini
import llama
from dp_layer_skip import choose_skip, torch
from gpu import check, replay, trial
from gpu.trial import replayed, replaying, tensors
from oracle import check_trace
from oracle.sampler.law import Branch
from policy.adaptive import Adaptive
from policy.costs import layer_weights
from policy.probe import choose_by
from speculative import Chance, Settings, generate
from tests.every_outcome import Enumerating
from tests.helpers import assert_same_choice, decode, tiny_llama, tokens
from tests.wrong_programs import running

A_GPU = [pytest.param("cuda", fuse, marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU"))
    for fuse in (replay.unfused, replay.fused)]


# ------------------------------------------------------------------------------ passes

@pytest.mark.parametrize("r", [1, 2])
@pytest.mark.parametrize("device, fuse", [("cpu", replay.unfused), *A_GPU])
def test_a_replayed_pass_is_the_plain_one_for_a_draft_a_verify_and_the_dynamic_program(
        r, device, fuse):
    """Every kind of pass at several positions, against the plain model with an ordinary cache;
    recorded for probes of r tokens. Rejects a buffer that is not updated, a graph of the wrong
    layer, a row too many or too few, a row that sees or writes another slot, results where others
    work, recordings of a cache that is gone, and a chooser asked for what was not recorded that
    answers from the recording."""
    model, K, M = tiny_llama(V=11, L=5, D=16, H=4, G=2, seed=6, device=device), 3, 3
    fast = replayed(model, K, M, r, fuse)
    gen = torch.Generator().manual_seed(0)
    text = []

    def equal(a, b):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)

    def both(T, skip=()):
        """T rows after the text by either way: -> states (L+1, T, D). The head is replayed before
        the states are looked at, as `generate` does it."""
        ids = torch.randint(11, (T,), generator=gen).to(device)
        out = []
        for m, _, cache in ways:
            h = m.forward(ids, cache.sequence(len(text), T), cache, skip)
            out.append((m.head(h[-1]).clone(), m.head(h[-1][-1:]).clone(), torch.stack(h)))
        for a, b in zip(*out):
            assert a.shape == b.shape
            equal(a, b)
        return ids.tolist(), out[0][2]

    def both_choose(n, M, h):
        """A choice of up to M by the last n tokens of text, h (L+1, D) of the last. It outlives the
        next pass, which reads what it left of the text."""
        (a, end), (b, other_end) = (choose_by(n, choose, m, cache, text, h, M)
                                    for m, choose, cache in ways)
        both(1)
        assert_same_choice(a, b, 1e-12)
        equal(a.g, b.g)
        equal(end, other_end)

    with torch.inference_mode():
        fast.cache(60)
        ways = [(model, choose_skip, model.cache(600)), (fast, fast.choose, fast.cache(600))]
        ids, _ = both(9)                               # a prompt longer than a verify
        text += ids
        for skip in itertools.product((False, True), repeat=5):
            both(1, skip)                              # a draft step with every set there is
        for T in (3, 1, 4, 2):
            ids, h = both(T)
            for accepted in range(T):                  # not the position of the recording
                text.append(ids[accepted])
                for n, m in ((5, M), (3, M), (2, M), (1, M), (r, 0), (r, M - 1)):
                    both_choose(n, m, h[:, accepted])  # most of them are not recorded


def test_a_cache_has_room_for_what_is_recorded_and_is_kept_while_it_has():
    """Rejects one of just the size asked for, made or kept, which near a multiple of 512 ends
    before the padding of a verify at the last slot does, or the candidates of the program; an index
    out of range, which on a GPU ends the process; a recording per run, and one more where drafts
    follow on a plain run; one broken off, for want of memory, taken for whole; and a cache whose
    recordings are gone."""
    model = tiny_llama(L=1)
    left = replayed(model, 5, 0)
    for S in range(490, 516):                          # tokens of a text, and slots after it:
        for M, r in ((0, 1), (1, 8)):
            fast = replayed(model, 5, M, r)
            small = fast.cache(S + 1)
            small.sequence(S, 1)
            assert fast.cache(S + (M + 1) * r) is small
        left.cache(S + 1).sequence(S, 1)
    last = small.S - 6                                 # K + 1 rows
    small.sequence(last, 1)
    with pytest.raises(AssertionError):
        small.sequence(last + 1, 1)
    replayed(model, 0, 1, 300).cache(1)

    record = fast.record

    def out_of_memory(f):
        if f.__name__ == "verify":
            raise torch.OutOfMemoryError
        return record(f)
    fast.record = out_of_memory
    with pytest.raises(torch.OutOfMemoryError):
        fast.cache(2000)
    fast.record = MagicMock(side_effect=record)
    assert fast.cache(20) is not small and fast.record.called
    fast.forward(torch.tensor([0]), fast.slots.sequence(0, 1), fast.slots)
    with pytest.raises(AssertionError):
        fast.forward(torch.tensor([0]), small.sequence(0, 1), small)


# ------------------------------------------------------------------------------ waits

class Far(TorchDispatchMode):
    """On PyTorch's device `meta`: a GPU that computes nothing. What the host asks it for is counted
    and answered with ones, in several numbers the first with 0: so no token is accepted, and all
    logits are finite. What mixes devices fails, and what would have to know how many there are."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:
            out = call.decompose(*args, **kwargs)      # until it is what a device can be asked for
        if out is not NotImplemented:
            return out
        name = call.name().removeprefix("aten::").partition(".")[0]
        given = tensors((args, kwargs))
        far = [x for x in given if x.device.type == "meta"]
        here = [x for x in given if x.device.type == "cpu" and x.dim() > 0]
        if far and name == "_local_scalar_dense":
            self.reads += 1
            return 1
        if far and name == "_to_copy" and str(kwargs.get("device")) == "cpu":
            self.reads += 1
            out = torch.ones(far[0].shape, dtype=kwargs.get("dtype") or far[0].dtype)
            if out.numel() > 1:
                out.view(-1)[0] = 0
            return out
        assert not (far and here), f"{name} of two devices"
        masks = [x for x in given[1:] if x.dtype == torch.bool]
        assert not (masks and name in ("index", "index_put_")), f"{name} by a mask"
        return call(*args, **kwargs)


def test_who_asks_a_gpu_is_seen():
    """Rejects a count that misses a way to wait for a GPU, or a call of two devices."""
    with Far() as far:
        x = torch.ones(1, 1, device="meta")
        for n, ask in enumerate((bool, float, torch.Tensor.tolist, torch.Tensor.cpu), 1):
            ask(x)
            assert far.reads == n
        for wrong in (lambda: x[x > 0], lambda: x.index_put_((x > 0,), x[0, 0]), x.nonzero,
                      lambda: x + torch.ones(1)):
            with pytest.raises((AssertionError, NotImplementedError)):
                wrong()


PAPER = dict(K=3, M=2, interval=1, temperature=0.8, top_k=5, top_p=0.9)


@pytest.mark.parametrize("how, ours, graphs", [
    (dict(), False, False), (dict(), True, True), (PAPER, False, False), (PAPER, False, True)])
def test_a_gpu_is_waited_for_once_per_drafted_token_and_once_per_verify(
        monkeypatch, how, ours, graphs):
    """Rejects a read more: of a token and its confidence apart, of a verdict, the own token and
    whether the logits are numbers apart, of what a mask selects; ids that come back before the
    next step, or are made on another device; and a read inside a recording, which a graph cannot
    hold. A choice of layers is waited for twice, for its two tables. Our policy also asks how near
    p and q are: once per verify of a draft, and once per choice."""
    s = Settings(N=6, **how)
    policy = None
    if ours:
        policy = Adaptive(s, [1, 0.8, 0.6, 0.4], [1.0] * 5, M=2, interval=1)
    tensor = Mock(wraps=torch.tensor)
    monkeypatch.setattr(torch, "tensor", tensor)
    with Far() as far:
        model = tiny_llama(V=9, device="meta")
        choose = choose_skip
        if graphs:
            model = replayed(model, 3, 2)
            choose = model.choose
            model.cache(40)
            assert far.reads == 0
        tensor.reset_mock()
        rounds = list(generate(model, [1, 2], s, Chance(0), choose, policy))
    drafted = sum(len(r.drafted) for r in rounds)
    judged = sum(len(r.drafted) > 0 for r in rounds)
    choices = sum(r.choice is not None for r in rounds)
    assert (drafted > 5, choices > 1) == (bool(how) or ours,) * 2
    assert far.reads <= drafted + len(rounds) + ours * judged + (2 + ours) * choices
    # What is made on a GPU waits for it. Once a round before the draft, and before the verify.
    made = sum("device" in call.kwargs for call in tensor.call_args_list)
    assert made <= 2 * len(rounds)


def test_chance_that_is_enumerated_answers_where_it_is_asked():
    """Rejects tokens and counts on the host, with which a GPU's tensors cannot be joined."""
    s = Settings(temperature=1.0, K=2, M=1, N=4)
    with Far():
        model = tiny_llama(V=9, device="meta")
        assert list(generate(model, [1, 2], s, Enumerating(Branch([])), choose_skip))


# ------------------------------------------------------------------------------ runs

def test_a_layer_is_compiled_once_per_row_count_whatever_the_layer_and_the_position():
    """Rejects a compiled function that depends on a layer's number, a position or a skip set; a
    dynamic program that compiles one per row of its table; one that is not the same function."""
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    model = tiny_llama(V=30, L=5, D=16, H=4, G=2, seed=4)
    loop = replaying(model, 3, 2, fuse=lambda f: torch.compile(
        f, backend=backend, fullgraph=True, dynamic=False))
    s = Settings(temperature=0.7, K=3, M=2, N=25, interval=1)
    assert tokens(decode(model, [1, 2], s, loop=loop)) == tokens(decode(model, [1, 2], s))
    assert len(compiled) == 3, "1 row in place, K + 1 rows, M + 1 rows"


@pytest.fixture
def played(monkeypatch):
    """torch.cuda, played: it notes what it is asked for, in order. f is to be recorded."""
    fast = replay.Replay(tiny_llama(), 2, 1, 1, replay.unfused)
    cuda = MagicMock()
    monkeypatch.setattr(torch, "cuda", cuda)
    return fast, cuda


def test_a_pass_is_recorded_after_two_that_are_not_and_all_recordings_share_memory(played):
    """Rejects a first call, which compiles and allocates, inside a recording, work left on the side
    stream, a pool per graph, and a recording taken for a run."""
    fast, cuda = played
    out, again = fast.record(cuda.f)
    assert [name for name, *_ in cuda.mock_calls] == [
        "Stream", "current_stream", "Stream().wait_stream",
        "stream", "stream().__enter__", "f", "f", "stream().__exit__",
        "current_stream().wait_stream",
        "CUDAGraph", "graph", "graph().__enter__", "f", "graph().__exit__",
        "CUDAGraph().pool", "CUDAGraph().replay"]
    assert out is cuda.f() and again is cuda.CUDAGraph().replay
    fast.record(cuda.f)
    pools = [call.kwargs["pool"] for call in cuda.graph.call_args_list]
    assert pools == [None, cuda.CUDAGraph().pool()] and cuda.Stream.call_count == 1


@pytest.mark.parametrize("kind", [RuntimeError, torch.OutOfMemoryError])
def test_what_cannot_be_recorded_is_one_line_that_names_its_cause_and_eager(played, kind):
    """Rejects a traceback, and the error that a broken recording ends in, which hides its cause."""
    fast, cuda = played
    cuda.f.side_effect = [None, None, kind("a host read\nand much more")]
    cuda.graph().__exit__.side_effect = torch.AcceleratorError("CUDA error: capture failed")
    with pytest.raises(llama.ModelError, match="a host read .--eager[^\n]*$"):
        fast.record(cuda.f)


def test_a_gpu_is_awake_before_a_pass_is_recorded(played, monkeypatch):
    """Rejects kernels that are tuned at the clock of an idle GPU: 0.3 s of work come first, without
    a call that the GPU has not yet got to."""
    fast, cuda = played
    one = torch.ones(1, 1)
    monkeypatch.setattr(torch, "ones", lambda *size, device: one)
    monkeypatch.setattr(replay.time, "perf_counter", Mock(side_effect=itertools.count(0, 0.1)))
    fast.device = torch.device("cuda")
    fast.cache(9)
    first = [name for name, *_ in cuda.mock_calls[:3]]
    assert first == ["synchronize", "synchronize", "Stream"]


# ------------------------------------------------------------------------------ the command

@pytest.mark.parametrize("failing", [1, 4, 3])
def test_where_a_layer_cannot_be_compiled_a_line_says_so_and_plain_kernels_run(
        monkeypatch, capsys, failing):
    """Rejects a traceback, or silence, where the compiler fails at a layer of so many rows: the one
    in place, a verify's, the dynamic program's. A small trial before would not have told."""
    asked = []

    def compile(f, **_):
        def call(w, x, *rest):
            asked.append(len(x))
            if len(x) == failing:
                raise RuntimeError("no compiler here\nand much more")
            return f(w, x, *rest)
        return call
    monkeypatch.setattr(torch, "compile", compile)
    model = tiny_llama(V=30)
    s = Settings(K=3, M=2, N=9)
    loop = replaying(model, 3, 2, fuse=replay.fused)
    assert tokens(decode(model, [1, 2], s, loop=loop)) == tokens(decode(model, [1, 2], s))
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "no compiler here" in err and "much more" not in err
    assert asked.count(failing) == 1


def test_memory_that_is_lacking_is_no_fault_of_the_compiler(monkeypatch, capsys):
    """Rejects a second attempt, without compiler, in the memory that was too small."""
    def call(x):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(torch, "compile", lambda f, **_: call)
    with pytest.raises(torch.OutOfMemoryError):
        replay.fused(abs)(1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("cuda, usable, signs, hidden, said", [
    ("13.0", False, True, None, "580"), ("11.8", False, True, None, "11.8"),
    (None, False, True, None, None), ("13.0", True, True, None, None),
    ("13.0", False, False, None, None), ("13.0", False, True, "", None)])
def test_a_gpu_that_pytorch_cannot_use_is_named(monkeypatch, tmp_path, cuda, usable, signs, hidden,
                                                said):
    """Rejects silence where a driver is too old, and noise where there is no GPU, where PyTorch was
    built without CUDA, and where the user hides the GPUs."""
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
    monkeypatch.setattr(replay, "SIGNS", [tmp_path] if signs else [])
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    line = replay.unusable()
    assert line is None if said is None else said in line and "\n" not in line


@pytest.fixture
def on_a_gpu(monkeypatch):
    """The command as it is with a GPU; weights and passes are on the CPU, and graphs are repeated
    by calling what they recorded. Returns how often each kind of recording was."""
    played, load = collections.Counter(), llama.Llama.load

    class Counted(trial.Played):
        def record(self, f):
            played.update({f.__name__: 0})
            out, again = super().record(f)
            return out, lambda: played.update([f.__name__]) or again()

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(llama.Llama, "load",
                        lambda folder, device="cpu", dtype=None, **how: load(folder, "cpu", dtype))
    monkeypatch.setattr(replay, "fused", lambda f: played.update(["fused"]) or f)
    monkeypatch.setattr(replay, "Replay", Counted)
    return played


@pytest.mark.parametrize("how", [
    "--strategy paper --temperature 1 --seed 4 --interval 2", "--probe 4 --interval 2",
    "--skip-layers 0 --no-compile", "--strategy ar", "--compare --repeats 1", "--trace run.jsonl"])
def test_the_command_says_the_same_with_recorded_passes_as_without(
        on_a_gpu, capsys, monkeypatch, tmp_path, how):
    """Rejects a chooser, a draft length or a budget that does not reach the recorded passes, so
    that others run in their place, a pass that is recorded and never used, or with --eager, or
    compiled with --no-compile, and a trace of another chooser than the one that ran."""
    monkeypatch.chdir(tmp_path)
    said = []
    for eager in ("--eager", ""):
        assert not on_a_gpu
        command = ("--prompt class --max-new-tokens 11 --device cuda --dtype float32 --json "
                   f"{how} {eager}")
        assert clasp_mini.main(command.split()) == 0
        said.append(json.loads(capsys.readouterr().out))
    a, b = said
    assert a["ids"] == b["ids"]
    for name in ("drafted", "accepted", "verifies", "optimisations", "skip_set"):
        assert a["stats"][name] == b["stats"][name], name
    plain = "--strategy ar" in how
    assert (on_a_gpu["fused"] > 0) == ("--no-compile" not in how)
    assert (on_a_gpu["verify"] > 0) == (not plain) and 0 not in on_a_gpu.values()
    if "--compare" not in how:                         # where plain runs and warm-ups count too
        drafted, verifies, choices = (b["stats"][name] for name in (
            "drafted", "verifies", "optimisations"))
        # The prompt is two tokens: a probe of four is not to be had at first.
        probes = choices if b["settings"]["r"] > 1 else 0
        prompt = not plain
        assert on_a_gpu["begin"] + on_a_gpu["verify"] == drafted + verifies + prompt + probes
        assert on_a_gpu["optimise"] == choices - (b["settings"]["r"] > 2 and choices > 0)
        assert (choices > 1) == ("--interval" in how)
    if "--trace" in how:
        assert check_trace.main(["run.jsonl"]) == 0, capsys.readouterr().out


# ------------------------------------------------------------------------------ check.py

def test_a_dry_run_goes_through_every_step_and_one_that_fails_costs_only_itself(
        tmp_path, monkeypatch):
    """Rejects a step that does not fit the program any more, one that takes the others with it, and
    a report that is written at the end alone."""
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
    assert report["texts"]["paper, T = 0"]["parts"] == "nowhere"
    assert report["tests"]["status"] == 0, report["tests"]
    page = (tmp_path / "r.md").read_text()
    assert "| plain step |" in page and "failed: RuntimeError no profiler" in page


def test_a_gpu_that_computes_something_else_is_seen(tmp_path, monkeypatch):
    """Rejects comparisons that compare nothing, and tests that fail unseen."""
    steps = check.Check(tmp_path / "r", 99, True, None)
    with torch.inference_mode():
        with running("residual = p"):
            assert steps.lossless()["largest_error"] > 1e-4
        fast = check.replayed(steps.model, check.K, 2, 1)
        head = fast.head
        monkeypatch.setattr(fast, "head", lambda x: head(x) * 1.01)
        assert min(row["verify"] for row in steps.agreement(fast).values()) > 1e-3
    ended = Mock(returncode=1, stdout="1 failed", stderr="")
    monkeypatch.setattr(check.subprocess, "run", lambda *_, **__: ended)
    assert steps.tests() == dict(status=1, said="1 failed")


def test_a_timed_pass_runs_the_layers_and_reads_the_weights_that_its_name_says(tmp_path):
    """Rejects a draft step of all layers, a rate of more or less than was read, plain steps upside
    down. Here a layer takes a second."""
    steps = check.Check(tmp_path / "r", 99, True, None)
    steps.model.block = Mock(side_effect=steps.model.block)
    steps.rate = 1e9

    def timed(call):
        steps.model.block.reset_mock()
        call()
        return float(steps.model.block.call_count)
    steps.timed = timed
    with torch.inference_mode():
        took = steps.passes(12, 6, 1, replay.unfused)
    assert {name: row["ms"] for name, row in took.items()} == {
        "plain step": 8e3, "draft, 2 left out": 6e3, "draft, 4 left out": 4e3,
        "draft, 6 left out": 2e3, "verify, 13 rows": 8e3, "choice, M = 6, r = 1": 8e3}
    assert took["draft, 6 left out"]["plain_steps"] == 1 / 4
    plain, draft, choice = (took[name]["of_copy"] * took[name]["ms"] * 1e6 / 4 for name in (
        "plain step", "draft, 6 left out", "choice, M = 6, r = 1"))         # numbers read
    head = trial.TINY.V * trial.TINY.D
    assert plain - choice == pytest.approx(head)       # which a choice does not need
    assert draft - head == pytest.approx((plain - head) / 4)


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
    """Rejects quiet layers as loud as others, and activations that grow or die out with depth."""
    monkeypatch.setattr(trial, "QUIET", quiet)
    model = trial.random_llama(trial.TINY, torch.device("cpu"), torch.float32)
    rounds = decode(model, [1, 2, 3], Settings(K=4, M=4, N=60))
    drafted = sum(len(r.drafted) for r in rounds)
    assert low <= sum(r.accepted for r in rounds) / drafted <= high
    h = model.forward(torch.arange(8), model.cache(8).sequence(0, 8), model.cache(8))
    assert all(0.9 < x.std() < 1.3 for x in h)


def test_the_random_8b_has_an_8bs_number_of_weights():
    """Rejects sizes that add up to another model."""
    c = trial.EIGHT_B
    norms = (2 * c.L + 1) * c.D
    assert c.L * layer_weights(c) + 2 * c.V * c.D + norms == 8_030_261_248
