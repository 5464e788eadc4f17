"""Recorded passes are the plain ones. Without a GPU all but the recording itself is tested: a
stand-in (`rerun`) repeats calls where a graph would repeat kernels.

    CLASP_8B=DIR      on a GPU: the recorded passes of a full-size model, such as
                      `python gpu/synthetic.py DIR` writes (-k 8b)
"""
import collections
import contextlib
import functools
import gc
import itertools
import json
import math
import os
import re
import types

import pytest

import clasp_mini
import llama
from dp_layer_skip import choose_skip, torch
from gpu import replay, synthetic
from gpu.synthetic import EIGHT_B, quiet_layers, synthetic_checkpoint
from oracle import check_trace
from speculative import Adaptive, Settings, generate, read
from test_clasp import (ROOT, adaptive, altered, assert_same_choice, decode, distance, full_model,
                        tiny_llama, tokens)


def leaves(out):
    return [x for part in out for x in leaves(part)] if isinstance(out, tuple) else [out]


def rerun(self, f):
    """Replay.record without a GPU: what is repeated is f itself, its result put where that of the
    recording lies. Recording runs nothing, so until the first replay nonsense lies there."""
    f(), f()
    out = f()
    for x in leaves(out):
        if x is not self.x:
            x.fill_(math.nan if x.is_floating_point() else 1)

    def again():
        for old, new in zip(leaves(out), leaves(f())):
            old.copy_(new)
    again()
    return out, again


def replayed(model, K, M, r=1, fuse=lambda f: f, module=replay):
    fast = module.Replay(model, K, M, r, fuse)
    if model.device.type != "cuda":
        fast.record = types.MethodType(rerun, fast)
    return fast


def replaying(model, K, M, r=1, by=generate, **how):
    """`generate`, or another loop, by replayed passes; takes a plain model's place in `decode` and
    `distance`."""
    fast = replayed(model, K, M, r, **how)

    def loop(_, prompt, s, chance, choose):
        return by(fast, prompt, s, chance, fast.choose)
    return loop


def chosen(model, cache, choose, h, at, M):
    """The call that generate makes after a verify, for a probe whose last token is `at`."""
    rows = cache.candidates(at, M + 1, h.shape[1])

    def run_layer(i, x):
        return model.layer(i, x.flatten(0, 1), rows, cache).view_as(x)
    return choose(h, run_layer, M)


def assert_replays_equal_plain_passes(module=replay):
    """Every kind of pass at several positions, against the plain model with an ordinary cache;
    recorded for probes of one token, and of two."""
    for r in (1, 2):
        assert_these_replays_equal_plain_passes(module, r)


def assert_these_replays_equal_plain_passes(module, r):
    model, K, M = tiny_llama(V=11, L=5, D=16, H=4, G=2, seed=6), 3, 3
    fast, gen = replayed(model, K, M, r, module=module), torch.Generator().manual_seed(0)
    slow_cache, fast_cache, t = model.cache(200), fast.cache(60), 0

    def both(T, **how):
        """Logits and states of T rows from t on by either way; equal to rounding."""
        ids, out = torch.randint(11, (T,), generator=gen), []
        for m, cache in ((model, slow_cache), (fast, fast_cache)):
            got = m.forward(ids, cache.sequence(t, T), cache, **how)
            out.append([None if x is None else x.clone() for x in got])
        for a, b in zip(*out):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
        return out[0][1], out[1][1]

    def both_choose(h, g, at):
        """The same choice, and states that outlive the next replays."""
        a = chosen(model, slow_cache, choose_skip, h, at, M)
        b = chosen(fast, fast_cache, fast.choose, g, at, M)
        assert_same_choice(a, b, 1e-12)
        if h.shape[1] == r:
            fast.found[2].fill_(math.nan)
        torch.testing.assert_close(a.states, b.states, rtol=0, atol=1e-12)
        torch.testing.assert_close(model.head(h[-1]), fast.head(g[-1]), rtol=0, atol=1e-12)

    with torch.inference_mode():
        both(9, last=2, states=True)                       # a prompt longer than a verify
        t = 9
        for skip in itertools.product((False, True), repeat=5):
            both(1, skip=skip)                             # a draft step with every set there is
            both(1, skip=skip, states=True)
        for T in (4, 1, 3, 2, 4):
            both(T, last=0)
            both(T, last=T)
            both(T, last=1, states=True)
            h, g = both(T, last=T, states=True)
            for end in range(1, T + 1):                    # not the position of the recording
                for n in range(1, end + 1):                # most of them are not recorded
                    both_choose(h[:, end - n:end], g[:, end - n:end], t + end - 1)
            t += T
        both(1)


def test_a_replayed_pass_is_the_plain_one_for_a_draft_a_verify_and_the_dynamic_program():
    """Rejects a buffer that is not updated, a graph of the wrong layer, a row too many or too few,
    and a chooser asked for what was not recorded that answers from the recording."""
    assert_replays_equal_plain_passes()


WRONG_REPLAYS = {
    "the position stays where it was recorded": [
        ("self.t.fill_(t) if T > self.P:", "if T > self.P:")],
    "the candidates keep the last pass's position": [
        ("self.t.fill_(t) return super().candidates", "return super().candidates")],
    "the mask is that of the beginning": [
        ("self.slot <= slots[:, None])", "self.slot <= self.slot[:T, None])")],
    "a candidate sees the probe's own entry": [
        ("(self.slot < position) |", "(self.slot <= position) |")],
    "a candidate sees all the text before the probe's last token": [
        ("(self.slot < position) |", "(self.slot < self.t) |")],
    "candidates see one another": [
        ("(self.slot == slots[:, None]))", "(self.slot > self.t).expand(J * r, -1))")],
    "each candidate has its own position": [
        ("(self.slot[:r] + self.t - r + 1).repeat(J)", "(self.slot[:J * r] + self.t - r + 1)")],
    "the tokens of a probe share a position": [
        ("(self.slot[:r] + self.t - r + 1)", "self.t.repeat(r)")],
    "the tokens of a probe lie behind its end": [
        ("(self.slot[:r] + self.t - r + 1)", "(self.slot[:r] + self.t)")],
    "a token's candidates lie beside one another": [
        (".repeat(J)[:, None]", ".repeat_interleave(J)[:, None]")],
    "scratch begins at the probe": [
        ("self.slot[1:J * r + 1] + self.t", "self.slot[:J * r] + self.t")],
    "every layer's graph is layer 0's": [("in_place.layer(i,", "in_place.layer(0,")],
    "every graph is the last layer's": [("lambda i=i: self.in_place", "lambda: self.in_place")],
    "layers share a cache": [
        ("def begin() -> Rows:", "slots.layers = slots.layers[:1] * 9\n\n        def begin():")],
    "a layer writes beside the buffer": [("x.copy_(decoder_layer(w, x, *rest))",
                                          "decoder_layer(w, x, *rest)")],
    "skipped layers run": [("if not (skip and skip[i]): self.layers[i]()", "self.layers[i]()")],
    "the layers that run are those to be skipped": [
        ("if not (skip and skip[i]): self.layers[i]()",
         "if skip and skip[i]:\n                    self.layers[i]()")],
    "the head is replayed too early": [("self.end() h =", "h =")],
    "the ids are those of the recording": [("self.ids[:T].copy_(ids)", "pass")],
    "states and logits are the last rows of the padding": [
        ("self.logits[T - last:T], self.states[:, T - last:T]",
         "self.logits[self.P - last:], self.states[:, self.P - last:]")],
    "the padding is given back with the rows": [
        ("self.logits[T - last:T]", "self.logits[T - last:]")],
    "states are the first rows": [("self.states[:, T - last:T]", "self.states[:, :last]")],
    "logits of the row before": [("self.logits[T - last:T]", "self.logits.roll(1, 0)[T - last:T]")],
    "the program sees the states it was recorded with": [("self.h.copy_(h)", "pass")],
    "the program runs one candidate too few": [
        (".view_as(padded)[:len(g)]",
         ".view_as(padded)[:len(g)] if len(g) <= self.M else g")],
    "candidates are padded in front": [
        ("(0, 0, 0, 0, 0, J - len(g))", "(0, 0, 0, 0, J - len(g), 0)")],
    "the states of a choice are the next one's": [("g.clone()", "g")],
    "a longer probe is answered by its end": [
        ("if h.shape != self.h.shape or not M:", "h = h[:, -self.r:]\n        if False:")],
    "one row's states are all the last": [("h.append(self.x.clone())", "h.append(self.x)")],
    "one row's states begin behind layer 0": [
        ("torch.stack([*h, self.x])", "torch.stack([*h[1:], self.x, self.x])")],
}


@pytest.mark.parametrize("wrong", WRONG_REPLAYS)
def test_some_pass_rejects_this_wrong_replay(wrong):
    """Rejects a comparison that these would pass."""
    module = altered(replay, *WRONG_REPLAYS[wrong])
    with pytest.raises(AssertionError):
        assert_replays_equal_plain_passes(module)


def assert_the_padding_has_room(module=replay):
    """For every size of the cache around a multiple of 512 a verify at its last slot, in a new
    cache and in one that an earlier run has left."""
    model, again = tiny_llama(L=1), replayed(tiny_llama(L=1), 5, 0, module=module)
    for S in range(503, 516):
        for fast in (replayed(model, 5, 0, module=module), again):
            ids, out = torch.tensor([S % 3]), []
            with torch.inference_mode():
                for m in (model, fast):
                    cache = m.cache(S)
                    cache.k.zero_(), cache.v.zero_()       # of an earlier run
                    out.append(m.forward(ids, cache.sequence(S - 1, 1), cache, states=True))
            torch.testing.assert_close(*out, rtol=0, atol=1e-12)


def test_a_verify_at_the_last_slot_has_room_for_the_rows_it_is_padded_with():
    """Rejects a cache of just the size asked for, made or kept, which near a multiple of 512 ends
    before the padding does."""
    assert_the_padding_has_room()
    for wrong in (("S += self.P ", "S += 0 "), ("S += self.P ", "S += self.P // 2 "),
                  ("if self.slots and S <=", "if self.slots and S - self.P <="),
                  ("-(-S // 512) * 512", "-(-(S - self.P) // 512) * 512")):
        with pytest.raises(AssertionError):
            assert_the_padding_has_room(altered(replay, wrong))


def test_a_slot_too_far_is_an_error_of_ours_before_the_gpu_sees_it():
    """Rejects an index out of range, which on a GPU ends the process, and a cache whose recordings
    are gone."""
    fast = replayed(tiny_llama(), 2, 1)
    small = fast.cache(20)
    with pytest.raises(AssertionError):
        small.sequence(510, 1)
    with pytest.raises(AssertionError):
        small.candidates(510, 2)
    small.sequence(509, 1)
    fast.cache(600)
    with pytest.raises(AssertionError):
        fast.forward(torch.tensor([0]), small.sequence(0, 1), small)


def test_a_cache_is_kept_while_it_is_large_enough_and_never_with_half_its_recordings():
    """Rejects a recording per run, and one that was broken off, for want of memory, taken for
    whole."""
    model = tiny_llama()
    fast = replayed(model, 2, 1)
    first, record = fast.cache(20), fast.record
    assert fast.cache(500) is first

    def out_of_memory(f):
        if f.__name__ == "verify":
            raise torch.OutOfMemoryError
        return record(f)
    fast.record = out_of_memory
    with pytest.raises(torch.OutOfMemoryError):
        fast.cache(600)
    fast.record = record
    assert fast.cache(20) is not first
    s = Settings(K=2, M=1, N=9)
    got = decode(model, [1], s, loop=lambda _, *how: generate(fast, *how[:3], fast.choose))
    assert tokens(got) == tokens(decode(model, [1], s))


@pytest.mark.parametrize("K, M, interval, threshold", [(2, 1, 1, 0.0), (3, 2, 2, 0.5),
                                                       (1, 3, 1, 1.0), (3, 0, 1, 0.0)])
def test_the_loop_is_as_lossless_by_replayed_passes(K, M, interval, threshold):
    """Rejects a padded verify or a buffer used twice that moves a text's probability by 1e-12."""
    s = Settings(temperature=0.9, top_p=0.95, K=K, M=M, interval=interval, N=4, stop_ids=(2,),
                 exit_threshold=threshold)
    model = tiny_llama(seed=K + M)
    assert distance(model, s, replaying(model, K, M)) < 1e-12


@pytest.mark.parametrize("n, fixed", [*enumerate([
    {}, dict(M=1), dict(r=2), dict(r=3, interval=1), dict(r=2, temperature=0.0), dict(M=0)])])
def test_so_is_the_policy_that_adapts(n, fixed):
    """Rejects a replay without the head that the policy asks for or with one that is not the full
    model's, states of a round at rest that are not its own, and a probe at the beginning of a text
    that is shorter than the recorded one; 0 layers to leave out must not end the run."""
    s, by = adaptive(**dict(temperature=0.9, stop_ids=(2,), r=1) | fixed)
    model = tiny_llama(seed=n)
    with pytest.MonkeyPatch.context() as patch:
        start = Adaptive.__init__
        patch.setattr(Adaptive, "__init__",            # rests are of 64 rounds: here of one
                      lambda self, *a: start(self, *a) or setattr(self, "wait", 1))
        loop = replaying(model, 3, 2 if s.M is None else s.M, s.r, by)
        assert distance(model, s, loop, prompt=(1,)) < 1e-12


def test_rounds_at_rest_replay_one_row_even_where_their_states_are_asked_for():
    """Rejects a padded verify for one token, and a probe of several tokens that is not replayed;
    counted over a run that rests, looks again with the states of its last rounds, and drafts."""
    model, r = tiny_llama(V=3, L=3), 4
    s, by = adaptive(c=[1, .85, .85, .85], temperature=1.0, N=240, r=r, interval=20)
    played, fast = collections.Counter(), replayed(model, 3, 2, r)
    record = fast.record

    def counting(f):
        out, again = record(f)
        return out, lambda: played.update([f.__name__]) or again()
    fast.record = counting
    got = decode(model, [0], s, loop=lambda _, *how: by(fast, *how[:3], fast.choose))
    want = decode(model, [0], s, loop=by)
    assert tokens(got) == tokens(want) and [x.skip for x in got] == [x.skip for x in want]
    drafts = [len(x.drafted) for x in got]
    alone, choices = drafts.count(0), [n for n, x in enumerate(got) if x.choice]
    assert played["begin"] == sum(drafts) + alone and played["verify"] == len(got) - alone
    assert alone > 64 and len(got) - alone > 3
    assert choices[0] == 0 and played["optimise"] == len(choices) - 1 > 0   # a prompt of one token


def test_a_replay_serves_run_after_run_of_any_length():
    """Rejects a cache that keeps something of an earlier text, or graphs of a cache that is
    gone."""
    model = tiny_llama(V=30, L=5, D=16, H=4, G=2, seed=4)
    for r in (1, 4):
        assert_run_after_run_is_the_plain_one(model, replaying(model, 4, 2, r), r)


def assert_run_after_run_is_the_plain_one(model, loop, r):
    gen = torch.Generator().manual_seed(0)
    for n, (length, N) in enumerate(((1, 10), (30, 30), (490, 30), (4, 20))):
        prompt = torch.randint(30, (length,), generator=gen).tolist()
        for s in (Settings(temperature=0.7, K=4, M=2, N=N, interval=2, r=r), Settings(N=N, K=0)):
            want = decode(model, prompt, s, chance=n)
            got = decode(model, prompt, s, chance=n, loop=loop)
            assert tokens(got) == tokens(want) and [r.skip for r in got] == [r.skip for r in want]


def test_a_layer_is_compiled_once_per_row_count_whatever_the_layer_and_the_position():
    """Rejects a compiled function that depends on a layer's number, a position or a skip set; a
    dynamic program that compiles one per row of its table; one that is not the same function."""
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    model = tiny_llama(V=30, L=5, D=16, H=4, G=2, seed=4)
    loop = replaying(model, 3, 2, 3, fuse=lambda f: torch.compile(
        f, backend=backend, fullgraph=True, dynamic=False))
    s = Settings(temperature=0.7, K=3, M=2, N=25, interval=1, r=3)
    assert tokens(decode(model, [1, 2], s, loop=loop)) == tokens(decode(model, [1, 2], s))
    assert len(compiled) == 3, "1 row in place, K + 1 rows, (M + 1) * r rows"


def test_a_pass_is_recorded_after_two_that_are_not_and_all_recordings_share_memory(monkeypatch):
    """Rejects a first call, which compiles and allocates, inside a recording, work left on the side
    stream, a pool per graph, and a recording taken for a run; PyTorch's part is played here."""
    happened, inside = [], []

    class Stream:
        def __init__(self, device):
            self.name = "side"

        def wait_stream(self, other):
            happened.append(f"{self.name} waits for {other.name}")

    class Graph:
        def pool(self):
            return "the pool"

        def replay(self):
            happened.append("replayed")

    @contextlib.contextmanager
    def within(what, **how):
        inside.append(what if isinstance(what, str) else f"graph in {how['pool']}")
        yield
        inside.pop()

    here = Stream(None)
    here.name = "here"
    for name, fake in dict(Stream=Stream, CUDAGraph=Graph, current_stream=lambda device: here,
                           stream=lambda side: within(side.name),
                           graph=lambda graph, pool, stream: within(graph, pool=pool)).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    fast = replay.Replay(tiny_llama(), 2, 1, 1, lambda f: f)
    for pool in (None, "the pool"):
        happened.clear()
        out, again = fast.record(lambda: happened.append(inside[-1]) or len(happened))
        assert happened == ["side waits for here", "side", "side", "here waits for side",
                            f"graph in {pool}", "replayed"] and out == 5
        again()
        assert happened[-2:] == ["replayed"] * 2 and not inside


# ------------------------------------------------------------------------------ the command

def test_where_nothing_can_be_compiled_a_line_says_so_and_plain_kernels_run(monkeypatch, capsys):
    """Rejects a traceback, or silence, where a compiler is missing."""
    def fails(f, **_):
        def call(*_):
            raise RuntimeError("no compiler here\nand much more")
        return call
    monkeypatch.setattr(torch, "compile", fails)
    assert replay.fusing(torch.device("cpu"))(abs) is abs
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "no compiler here" in err and "much more" not in err


@pytest.mark.parametrize("terminal", [False, True])
def test_the_compiler_is_asked_only_where_it_may_be(monkeypatch, capsys, terminal):
    """Rejects --no-compile without effect, and silence on a terminal while passes are recorded."""
    monkeypatch.setattr(replay, "fusing", lambda device: lambda f: "fused")
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    model = tiny_llama()
    for compile in (True, False):
        fast, choose = replay.recorded(model, 4, 2, 3, compile)
        assert (fast.in_place.block == fast.fused.block == "fused") == compile
        assert (fast.P, fast.M, fast.r, choose) == (5, 2, 3, fast.choose)
        assert model.block != "fused"
    assert capsys.readouterr().err.count("\n") == 2 * terminal


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
                        lambda folder, device="cpu", dtype=None: load(folder, "cpu", dtype))
    monkeypatch.setattr(replay, "fusing",
                        lambda device: played.update(["fusing"]) or (lambda f: f))
    monkeypatch.setattr(replay.Replay, "record", record)
    return played


@pytest.fixture
def costs(tmp_path):
    """A file of costs for the demo: measured ones would not be the same the next time."""
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(dict(draft=[1 - 0.9 * j / 32 for j in range(33)],
                                    verify=[1 + 0.02 * n for n in range(14)])))
    return path


@pytest.mark.parametrize("how", [
    "--temperature 1 --seed 4 --interval 2 --probe 1", "--probe 4 --interval 2",
    "--skip-layers 0 --no-compile", "--strategy ar", "--compare --repeats 1"])
def test_the_command_says_the_same_with_recorded_passes_as_without(on_a_gpu, costs, capsys, how):
    """Rejects a chooser, a draft length or a budget that does not reach the recorded passes, so
    that others run in their place, passes recorded with --eager, and compiled ones with
    --no-compile."""
    said = []
    for eager in ("--eager", ""):
        assert not on_a_gpu
        command = (f"--prompt class --max-new-tokens 16 --device cuda --dtype float32 --json "
                   f"--costs {costs} {how} {eager}")
        assert clasp_mini.main(command.split()) == 0
        said.append(json.loads(capsys.readouterr().out))
    a, b = said
    assert a["ids"] == b["ids"]
    for name in ("drafted", "accepted", "verifies", "optimisations", "skip_set"):
        assert a["stats"][name] == b["stats"][name], name
    if "--compare" not in how:                         # where plain runs and warm-ups count too
        drafted, verifies, choices = (b["stats"][name] for name in (
            "drafted", "verifies", "optimisations"))
        # The prompt is two tokens: a verify reads it, and a probe of four is not to be had.
        assert on_a_gpu["begin"] + on_a_gpu["verify"] == drafted + verifies + 1
        eager = choices if "--skip-layers 0" in how else min(choices, b["settings"]["r"] > 2)
        assert on_a_gpu["optimise"] == choices - eager
        assert (choices > 1) == ("--interval" in how)
    assert (on_a_gpu["verify"] > 1) == ("--strategy ar" not in how)
    assert on_a_gpu["fusing"] == ("--no-compile" not in how)


def test_a_trace_of_recorded_passes_checks_clean(on_a_gpu, costs, tmp_path, capsys):
    """Rejects a trace of another chooser than the one that ran, or without its table."""
    path = tmp_path / "t"
    assert clasp_mini.main(["--prompt", "x = ", "--max-new-tokens", "12", "--device", "cuda",
                            "--costs", str(costs), "--trace", str(path)]) == 0
    assert on_a_gpu and '"optimise"' in path.read_text()
    assert check_trace.main([str(path)]) == 0, capsys.readouterr().out


# ------------------------------------------------------------------------------ the synthetic 8B

def small(**overrides):
    """The synthetic 8B's config.json, made small."""
    return {**EIGHT_B, **dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2,
                              vocab_size=200, intermediate_size=96), **overrides}


@pytest.mark.parametrize("factor, accepted", [(0.0, (1, 1)), (0.2, (0.5, 0.999)), (1.0, (0, 0.4))])
def test_a_synthetic_checkpoint_is_accepted_as_far_as_its_quiet_layers_are_quiet(
        tmp_path, factor, accepted):
    """Rejects a knob that does nothing, and activations that blow up or die out with depth; idle
    layers must be exactly those that the program finds."""
    synthetic_checkpoint(tmp_path / "s", small(num_hidden_layers=16), factor)
    assert len(list((tmp_path / "s").glob("*.safetensors"))) == 4
    model, quiet = llama.Llama.load(tmp_path / "s"), quiet_layers(16)
    rounds = decode(model, [1, 2, 3], Settings(K=4, M=len(quiet), N=100))
    drafted = sum(len(r.drafted) for r in rounds)
    low, high = accepted
    assert low <= sum(r.accepted for r in rounds) / drafted <= high
    if factor == 0:
        assert {i for i, out in enumerate(rounds[-1].skip) if out} == quiet
    _, h = read(model, range(8), 0, model.cache(8), last=8, states=True)
    assert ((h.std(-1) > 0.5) & (h.std(-1) < 3)).all()


def test_the_command_writes_a_new_folder_with_the_factor_that_was_asked_for(
        tmp_path, monkeypatch, capsys):
    """Rejects a factor without effect, a folder that is written over, and factors above 1."""
    monkeypatch.setattr(synthetic.synthetic_checkpoint, "__defaults__", (
        small(num_hidden_layers=16), *synthetic.synthetic_checkpoint.__defaults__[1:]))
    sizes = []
    for name, factor in (("half", ["0.5"]), ("default", [])):
        assert synthetic.main([str(tmp_path / name), *factor]) == 0
        assert capsys.readouterr().out.count(" GB\n") == 4
        quiet, loud = (llama.Llama.load(tmp_path / name).layers[i].out.std() for i in (
            min(quiet_layers(16)), 0))
        sizes.append((quiet / loud).item())
    assert sizes == pytest.approx([0.5, 0.1], rel=0.1)
    for wrong in ([tmp_path / "half"], [tmp_path / "new", "2"], []):
        assert synthetic.main([*map(str, wrong)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_the_synthetic_8b_is_an_8b():
    """Rejects shapes that add up to another model: the 8B has 8.03 billion weights, 18 of whose 32
    layers are the quiet ones."""
    norms = (2 * 32 + 1) * 4096
    assert sum(n * m for n, m in synthetic.matrices(EIGHT_B).values()) + norms == 8_030_261_248
    assert len(quiet_layers(32)) == 18 and not quiet_layers(32) & {0, 31}


def test_the_commands_of_the_readme_exist():
    """Rejects a script that has moved and a flag that is gone."""
    text = (ROOT / "gpu" / "README.md").read_text(encoding="utf-8")
    commands = [line.partition("#")[0] for block in re.findall(r"```sh\n(.*?)```", text, re.S)
                for line in block.splitlines()]
    assert len(commands) == 8
    for script in re.findall(r"[\w/]+\.py", " ".join(commands)):
        assert (ROOT / script).exists(), script
    flags = set(re.findall(r"(?<!torchrun )--[a-z][a-z-]*", text))
    assert flags <= set(re.findall(r"--[a-z-]+", clasp_mini.parser().format_help())) and flags


# ------------------------------------------------------------------------------ on a GPU, or almost

def parting(model, prompt, s, loop=generate):
    """Where greedy CLaSp parts from greedy plain decoding: None, or (after how many tokens, how far
    apart the logits of the two tokens are in one pass over the text, the larger of the two)."""
    plain = tokens(decode(model, prompt, Settings(N=s.N, K=0)))
    clasp = tokens(decode(model, prompt, s, loop=loop))
    n = next((n for n, (x, y) in enumerate(zip(plain, clasp)) if x != y), None)
    if n is None:
        return None
    x, y = full_model(model, [*prompt, *plain[:n]])[[plain[n], clasp[n]]].tolist()
    return n, abs(x - y), max(abs(x), abs(y))


def assert_partings_are_ties(model, loop, s, prompts=20, length=10):
    """bfloat16 keeps 8 bits, so logits that differ by 1 part in 64 may change places between a pass
    of one row and a pass of several. Prints how often they did."""
    gen, partings = torch.Generator().manual_seed(0), []
    for _ in range(prompts):
        prompt = torch.randint(model.cfg.V, (length,), generator=gen).tolist()
        partings += [p] if (p := parting(model, prompt, s, loop)) else []
    print(f"{len(partings)} of {prompts} greedy texts part; (after, gap, logit): {partings}")
    assert all(gap <= size / 64 for _, gap, size in partings), partings


def test_in_bfloat16_greedy_texts_part_only_at_near_ties(tmp_path):
    """Rejects an error that hides behind rounding: where the texts part, the two tokens were as
    good as equal; a head that is off is found out."""
    synthetic_checkpoint(tmp_path / "s", small(num_hidden_layers=8), factor=0.2)
    model = llama.Llama.load(tmp_path / "s", dtype=torch.bfloat16)
    s = Settings(K=4, M=4, N=40)
    assert_partings_are_ties(model, replaying(model, 4, 4), s, prompts=6)
    off = llama.Llama.load(tmp_path / "s", dtype=torch.bfloat16)
    off.lm_head.mul_(1 + torch.randn(200, 1, generator=torch.Generator().manual_seed(0)) / 5)
    with pytest.raises(AssertionError):
        assert_partings_are_ties(model, replaying(off, 4, 4), s, prompts=6)


def assert_graphs_are_eager(model, s, fuse, logits, cosines, module=replay):
    """One draft step and one layer optimisation after 1000 tokens, either way: equal to these
    tolerances, that of the logits relative to the largest."""
    prompt = (torch.arange(1000) * 97 % model.cfg.V).tolist()
    fast, got = replayed(model, s.K, s.M, s.r, fuse, module), []
    with torch.inference_mode():
        for m, choose in ((model, choose_skip), (fast, fast.choose)):
            cache = m.cache(1100)
            read(m, prompt, 0, cache)
            all_rows, h = read(m, prompt[:s.K + 1], 1000, cache, last=s.K + 1, states=True)
            all_rows = all_rows.clone()
            choice = chosen(m, cache, choose, h[:, -s.r:], 1000 + s.K, s.M)
            skip = choice.skip() if m is model else skip                     # noqa: F821
            step, _ = read(m, prompt[:1], 1001 + s.K, cache, skip=skip)
            got.append((torch.cat((all_rows, step)), choice))
    (eager, by_eager), (graphs, by_graphs) = got
    print("the same skip sets:", by_eager.skip() == by_graphs.skip())
    assert (eager - graphs).abs().max() <= eager.abs().max() * logits
    torch.testing.assert_close(torch.tensor(by_eager.D[-1]), torch.tensor(by_graphs.D[-1]),
                               rtol=0, atol=cosines)


@pytest.mark.parametrize("wrong", [None, "the position stays where it was recorded",
                                   "the candidates keep the last pass's position"])
def test_the_comparison_for_the_8b_can_fail(wrong, tmp_path):
    """Rejects tolerances that a wrong position passes."""
    c = small(hidden_size=128, head_dim=32, intermediate_size=192, num_hidden_layers=16)
    synthetic_checkpoint(tmp_path / "s", c)
    model, s = llama.Llama.load(tmp_path / "s"), Settings(K=7, M=8)
    compare = functools.partial(assert_graphs_are_eager, model, s, lambda f: f, 1e-3, 1e-5)
    if wrong is None:
        return compare()
    with pytest.raises(AssertionError):
        compare(module=altered(replay, *WRONG_REPLAYS[wrong]))


cuda = pytest.mark.skipif(not torch.cuda.is_available(),
                          reason="no CUDA GPU here: graphs cannot be recorded")


@cuda
@pytest.mark.parametrize("compile", [False, True])
def test_recorded_graphs_equal_the_eager_passes_on_a_gpu(compile):
    """Rejects a kernel that was recorded with another address, and a fusion that is not exact to
    float32's rounding; the tokens and the skip sets are the same."""
    host = tiny_llama(V=30, L=6, D=64, H=4, G=2, hd=16, ffn=128, seed=4, dtype=torch.float32)
    model = llama.Llama(host.cfg, host.embed.cuda(),
                        [llama.Layer(*(w.cuda() for w in layer)) for layer in host.layers],
                        host.norm.cuda(), host.lm_head.cuda())
    fuse = replay.fusing(model.device) if compile else lambda f: f
    assert (fuse(abs) is not abs) == compile, "torch.compile does not work here"
    loop = replaying(model, 4, 3, fuse=fuse)
    for n in range(6):
        s = Settings(K=4, M=3, N=60, interval=2, temperature=n % 2 * 0.8)
        want, got = decode(model, [1, n], s, chance=n), decode(model, [1, n], s, n, loop)
        assert tokens(got) == tokens(want) and [r.skip for r in got] == [r.skip for r in want]


@cuda
@pytest.mark.skipif(not os.environ.get("CLASP_8B"),
                    reason="CLASP_8B names no folder of an 8B, such as gpu/synthetic.py writes")
def test_the_8b_by_graphs_is_the_eager_8b():
    """Rejects graphs whose logits and cosines leave the eager ones by more than rounding, in
    float32 so that a position or a quiet layer too many is not taken for it, and in bfloat16 greedy
    texts that part where there is no tie. (-s shows how often they do, and whether the sets are the
    same: among equally quiet layers rounding decides.)"""
    s = Settings(K=7, M=16, N=200)
    for dtype, logits, cosines in ((torch.float32, 1e-3, 1e-5), (torch.bfloat16, 1 / 32, 5e-3)):
        model = None                                   # 32 GB go before the next 16 come
        gc.collect()
        torch.cuda.empty_cache()
        model = llama.Llama.load(os.environ["CLASP_8B"], "cuda", dtype)
        fuse = replay.fusing(model.device)
        assert_graphs_are_eager(model, s, fuse, logits, cosines)
    assert_partings_are_ties(model, replaying(model, s.K, s.M, fuse=fuse), s, length=100)
