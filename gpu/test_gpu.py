"""Recorded passes are the plain ones. Without a GPU all but the recording itself is tested:
gpu/stand_in.py repeats calls where a graph repeats kernels.
"""
import collections
import itertools
import json
from unittest.mock import MagicMock, Mock

import pytest

import clasp_mini
import llama
from dp_layer_skip import choose_skip, torch
from gpu import driver, replay
from gpu.stand_in import moved, replayed, replaying, rerun
from oracle import check_trace
from policy.probe import choose_by
from speculative import Settings
from tests.helpers import assert_same_choice, decode, tiny_llama, tokens

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
    model, K, M = tiny_llama(V=11, L=5, D=16, H=4, G=2, seed=6), 3, 3
    model = moved(model, device)
    fast = replayed(model, K, M, r, fuse)
    gen = torch.Generator().manual_seed(0)
    text = []

    def equal(a, b):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)

    def both(T, skip=()):
        """T rows behind the text by either way: -> states (L+1, T, D). The head is replayed before
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

    def both_choose(n, h, M=M):
        """A choice by the last n tokens of text, h (L+1, D) of the last."""
        out = [choose_by(n, choose, m, cache, text, h, M) for m, choose, cache in ways]
        one = torch.zeros(1, dtype=torch.long, device=device)
        m, _, cache = ways[1]
        m.head(m.forward(one, cache.sequence(len(text), 1), cache)[-1])
        (a, end), (b, other_end) = out                 # which outlive the next replays
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
                for n in (5, 3, 2, 1):                 # most of them are not recorded
                    both_choose(n, h[:, accepted])
                both_choose(r, h[:, accepted], M - 1)
                both(1)                                # reads what the choice left of the text


def test_a_verify_at_the_last_slot_has_room_for_the_rows_it_is_padded_with():
    """Rejects a cache of just the size asked for, made or kept, which near a multiple of 512 ends
    before the padding does; and an index out of range, which on a GPU ends the process."""
    model = tiny_llama(L=1)
    left = replayed(model, 5, 0)
    for S in range(500, 516):
        for fast in (replayed(model, 5, 0), left):
            fast.cache(S).sequence(S - 1, 1)
    with pytest.raises(AssertionError):                # K + 1 rows
        left.slots.sequence(left.slots.S - 5, 1)


def test_a_cache_is_kept_while_it_is_large_enough_and_never_with_half_its_recordings():
    """Rejects a recording per run, one more where drafts follow on a plain run, of a program whose
    candidates need more than there is, one broken off, for want of memory, taken for whole; and a
    cache whose recordings are gone."""
    model = tiny_llama(L=1)
    for S in range(490, 500):                          # (M + 1) * r slots behind a text
        fast = replayed(model, 2, 1, 8)
        small = fast.cache(S + 1)
        assert fast.cache(S + 2 * 8) is small
    replayed(model, 0, 1, 300).cache(1)

    record = fast.record

    def out_of_memory(f):
        if f.__name__ == "verify":
            raise torch.OutOfMemoryError
        return record(f)
    fast.record = out_of_memory
    with pytest.raises(torch.OutOfMemoryError):
        fast.cache(2000)
    fast.record = record
    large = fast.cache(20)
    fast.forward(torch.tensor([0]), large.sequence(0, 1), large)
    with pytest.raises(AssertionError):
        fast.forward(torch.tensor([0]), small.sequence(0, 1), small)


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


def test_recordings_share_memory_and_what_cannot_be_recorded_is_one_line(monkeypatch):
    """Rejects a first call, which compiles and allocates, inside a recording, work left on the side
    stream, a pool per graph, a recording taken for a run; a traceback, and the error with which a
    broken recording ends, which hides its cause. torch.cuda is played."""
    fast = replayed(tiny_llama(), 2, 1)
    del fast.record                                    # the true one
    cuda = MagicMock()
    monkeypatch.setattr(torch, "cuda", cuda)
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
    for kind in (RuntimeError, torch.OutOfMemoryError):
        cuda.f.side_effect = [None, None, kind("a host read\nand much more")]
        cuda.graph().__exit__.side_effect = torch.AcceleratorError("CUDA error: capture failed")
        with pytest.raises(llama.ModelError, match="a host read .--eager[^\n]*$"):
            fast.record(cuda.f)


# ------------------------------------------------------------------------------ the command

@pytest.mark.parametrize("kind, told, said", [
    (RuntimeError, llama.ModelError, "no compiler here .--no-compile[^\n]*$"),
    (torch.OutOfMemoryError, torch.OutOfMemoryError, "no compiler here")])
def test_what_cannot_be_compiled_is_one_line_that_names_its_cause(monkeypatch, kind, told, said):
    """Rejects a traceback, and memory that is lacking taken for the compiler's fault."""
    failing = Mock(side_effect=kind("no compiler here\nand much more"))
    monkeypatch.setattr(torch, "compile", lambda f, **how: failing)
    model = tiny_llama()
    with pytest.raises(told, match=said):
        decode(model, [1, 2], Settings(), loop=replaying(model, 2, 1, fuse=replay.fused))


@pytest.mark.parametrize("cuda, usable, signs, hidden, said", [
    ("13.0", False, True, "0", True), (None, False, True, "0", False),
    ("13.0", True, True, "0", False), ("13.0", False, False, "0", False),
    ("13.0", False, True, "", False)])
def test_a_gpu_that_pytorch_cannot_use_is_named(monkeypatch, tmp_path, cuda, usable, signs, hidden,
                                                said):
    """Rejects silence where a driver is too old, and noise where there is no GPU, where PyTorch was
    built without CUDA, and where the user hides the GPUs."""
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
    monkeypatch.setattr(driver, "SIGNS", [tmp_path] if signs else [])
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert ("the driver" in (driver.unusable() or "")) == said


@pytest.fixture
def on_a_gpu(monkeypatch):
    """The command as it is with a GPU; weights and passes are on the CPU, and graphs are repeated
    by calling what they recorded. Returns how often each kind was."""
    played, load = collections.Counter(), llama.Llama.load

    def record(self, f):
        out, again = rerun(self, f)
        return out, lambda: played.update([f.__name__]) or again()

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(llama.Llama, "load",
                        lambda folder, device="cpu", dtype=None, **how: load(folder, "cpu", dtype))
    monkeypatch.setattr(replay, "fused", lambda f: played.update(["fused"]) or f)
    monkeypatch.setattr(replay.Replay, "record", record)
    return played


@pytest.mark.parametrize("how", [
    "--strategy paper --temperature 1 --seed 4 --interval 2", "--probe 4 --interval 2",
    "--skip-layers 0 --no-compile", "--strategy ar", "--trace run.jsonl"])
def test_the_command_says_the_same_with_recorded_passes_as_without(
        on_a_gpu, capsys, monkeypatch, tmp_path, how):
    """Rejects a chooser, a draft length or a budget that does not reach the recorded passes, so
    that others run in their place, one that is recorded and never used, passes recorded with
    --eager, compiled ones with --no-compile, and a trace of another chooser than the one that
    ran."""
    monkeypatch.chdir(tmp_path)
    said = []
    for eager in ("--eager", ""):
        assert not on_a_gpu
        command = ("--prompt class --max-new-tokens 16 --device cuda --dtype float32 --json "
                   f"{how} {eager}")
        assert clasp_mini.main(command.split()) == 0
        said.append(json.loads(capsys.readouterr().out))
    a, b = said
    assert a["ids"] == b["ids"]
    counts = ("drafted", "verifies", "optimisations")
    drafted, verifies, choices = (b["stats"][name] for name in counts)
    for name in (*counts, "accepted", "skip_set"):
        assert a["stats"][name] == b["stats"][name], name
    assert (on_a_gpu["fused"] > 0) == ("--no-compile" not in how)
    assert (on_a_gpu["verify"] > 0) == ("--strategy ar" != how)
    assert (choices > 1) == ("--interval" in how)
    # The prompt is two tokens: a probe of four is not to be had at first.
    probes = choices if "--probe" in how else 0
    prompt = "--strategy ar" != how
    assert on_a_gpu["begin"] + on_a_gpu["verify"] == drafted + verifies + prompt + probes
    assert on_a_gpu["optimise"] == choices - ("--probe" in how)
    if "--trace" in how:
        assert check_trace.main(["run.jsonl"]) == 0, capsys.readouterr().out
