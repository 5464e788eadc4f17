"""Several processes are one. On a CPU with gloo, each rank forked from the test; once as torchrun
starts them. What each rank holds, computes and decides is compared with one process that has the
whole model.
"""
import collections
import contextlib
import faulthandler
import io
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import types

import pytest

import clasp_mini
import llama
import speculative
from dp_layer_skip import choose_skip, torch
from gpu import parallel, ranks, sizes
from gpu.test_gpu import replaying
from oracle import check_trace
from tests.every_outcome import every_outcome
from tests.slow_llama import AS_5, IDS, random_checkpoint
from tests.wrong_programs import altered
from speculative import Settings
from test_clasp import DEMO, ROOT, assert_same_choice, decode, target_distribution, tokens
from policy import costs
from text.safetensors_file import save

dist = parallel.dist
FOUR = dict(AS_5, num_attention_heads=8, num_key_value_heads=4, intermediate_size=24,
            num_hidden_layers=4)                       # 50 tokens: not to be divided by 4
TINY = ("--model", ROOT / "oracle" / "tiny", "--dtype", "float64", "--prompt-ids", "3,1,2",
        "--max-new-tokens", 30)


def environment(n, rank, port):
    return dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")


def start(n, work, folder, timeout=60):
    """Fork n ranks that do work(rank), which may return an exit status; -> (status, stdout, stderr)
    of each. One that has not ended in time fails the test."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]

    def child(rank):
        faulthandler.disable()                         # pytest's, which writes to pytest's stderr
        if hasattr(os, "sched_setaffinity"):           # one core passes from rank to rank faster
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})         # than another wakes up
        for fd, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / f"{name}{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), fd)
        sys.stdout = open(1, "w", closefd=False)
        sys.stderr = sys.__stderr__ = open(2, "w", closefd=False)
        os.environ.update(environment(n, rank, port))
        sys.argv = ["clasp_mini.py"]
        sys.exit(work(rank))

    fork = multiprocessing.get_context("fork")
    every, end = [fork.Process(target=child, args=(rank,)) for rank in range(n)], time.time()
    for p in every:
        p.start()
    for p in every:
        p.join(max(0, end + timeout - time.time()))
    late = [rank for rank, p in enumerate(every) if p.is_alive()]
    for p in every:
        p.kill()
        p.join()
    assert not late, f"ranks {late} hang"
    return [(p.exitcode, *((folder / f"{name}{rank}").read_text() for name in ("out", "err")))
            for rank, p in enumerate(every)]


def connected(check):
    """A rank's work: `check`, given the rank, with the others connected."""
    def work(rank):
        dist.init_process_group("gloo")
        check(rank)
        dist.barrier()
        dist.destroy_process_group()
    return work


def assert_all_well(results):
    for status, _, err in results:
        assert status == 0, err


def same_everywhere(*values):
    for x in values:
        every = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(every, x.contiguous())
        assert all(torch.equal(x, y) for y in every), "the ranks have different bits"


def near(a, b):
    return (a - b).abs().max() < 1e-12


# ------------------------------------------------------------------------------ numbers

def every_pass_is_that_of_the_whole(folder, module=parallel):
    """A rank's check: logits, states and cache of prefill, chunk, draft and verify; the table."""
    def check(rank):
        whole = llama.Llama.load(folder, dtype=torch.float64)
        mine, n = module.Parallel.load(folder, "cpu", torch.float64), dist.get_world_size()
        caches, t = (whole.cache(30), mine.cache(30)), 0
        heads = slice(rank * whole.cfg.G // n, (rank + 1) * whole.cfg.G // n)
        for T, skip in ((5, ()), (4, ()), (1, (True, False, True, False)), (2, ())):
            ids = IDS[t:t + T]
            (a, h), (b, g) = (m.forward(ids, c.sequence(t, T), c, skip, T, True)
                              for m, c in zip((whole, mine), caches))
            assert near(a, b) and near(h, g), "another number"
            same_everywhere(b, g)
            t += T
        for a, b in ((caches[0].k, caches[1].k), (caches[0].v, caches[1].v)):
            assert b.shape[1] == a.shape[1] // n and near(a[:, heads], b), "another cache"
        choices = []
        for m, c, states in zip((whole, mine), caches, (h, g)):
            rows = c.candidates(t - 1, 4, 2)
            choices.append(choose_skip(states, lambda i, x, m=m, c=c, rows=rows: m.layer(
                i, x.flatten(0, 1), rows, c).view_as(x), 3))
        assert_same_choice(*choices, 1e-12)
        assert torch.equal(mine.forward(ids, caches[1].sequence(t, 2), caches[1], last=0)[0],
                           torch.empty(0, 50).double())
        half = module.Parallel.load(folder, "cpu", torch.bfloat16)
        cache = half.cache(12)
        same_everywhere(*(x.float() for x in half.forward(IDS, cache.sequence(0, 12), cache,
                                                          last=12, states=True)))
    return connected(check)


@pytest.mark.parametrize("n, tied", [(2, False), (4, True)])
def test_logits_states_cache_and_tables_are_those_of_one_process(tmp_path, n, tied):
    """Rejects a share of the wrong heads, rows or columns, a part that is not added or added
    twice, logits in another order, and different bits on two ranks, in float64 and bfloat16."""
    random_checkpoint(tmp_path, dict(FOUR, tie_word_embeddings=tied), shards=2)
    assert_all_well(start(n, every_pass_is_that_of_the_whole(tmp_path), tmp_path))


WRONG_SHARES = {
    "parts are not added": ("dist.all_reduce(x)", "pass"),
    "heads are dealt out like cards": (
        "[rank * size:(rank + 1) * size]", "[rank::dist.get_world_size()]"),
    "every rank has the first share": ("rank, size = dist.get_rank(),", "rank, size = 0,"),
    "out is not cut by the heads that it reads": (
        "x if dim is None else share(x, dim)", "x if dim is None else share(x if 'o_proj' not in "
        "name else x.flip(1), dim)"),
    "logits stand rank by rank": (".transpose(0, 1).reshape(T, n * m)", ".reshape(T, n * m)"),
    "the head is its own share's norm": ("rms_norm(x, self.norm, self.eps)", "x"),
    "logits of the padding come out": ("every[:, :V]", "every")}


@pytest.mark.parametrize("wrong", WRONG_SHARES)
def test_a_wrong_share_is_seen(tmp_path, wrong):
    """Rejects a test of the numbers that is too kind."""
    random_checkpoint(tmp_path, FOUR)
    module = altered(parallel, WRONG_SHARES[wrong])
    results = start(4, every_pass_is_that_of_the_whole(tmp_path, module), tmp_path)
    assert any("Error" in err for *_, err in results), wrong


def test_the_loop_on_two_ranks_has_exactly_the_full_models_distribution(tmp_path):
    """Rejects whatever moves the probability of a text by 1e-12: the ranks enumerate every branch
    of chance in step, and the product of conditionals is that of the whole model."""
    _, w = random_checkpoint(tmp_path, dict(
        vocab_size=3, hidden_size=8, num_attention_heads=2, intermediate_size=8))
    w = {name: x.float() * (20 if x.shape[0] == 3 else 2 if x.dim() == 2 else 1)
         for name, x in w.items()}                     # so that every layer matters
    save(w, tmp_path / "model.safetensors", {"format": "pt"})
    settings = [Settings(temperature=1.0, N=3, K=2, M=2, interval=1, exit_threshold=0.5),
                Settings(temperature=0.8, top_k=2, N=4, K=2, M=1, interval=2, stop_ids=(2,), r=2)]

    def check(_):
        whole = llama.Llama.load(tmp_path, dtype=torch.float64)
        mine, rejected = parallel.Parallel.load(tmp_path, "cpu", torch.float64), 0
        for s in settings:
            want, got = target_distribution(whole, (0, 1), s), collections.Counter()
            for rounds, weight in every_outcome(lambda c, s=s: decode(mine, (0, 1), s, c)):
                got[tuple(tokens(rounds))] += weight
                rejected += any(r.accepted < len(r.drafted) for r in rounds)
            assert max(abs(want.get(t, 0) - got[t]) for t in want | got) < 1e-12
        assert rejected > 10, "drafts that are never rejected test nothing"
    assert_all_well(start(2, connected(check), tmp_path))


def test_recorded_passes_hold_their_exchanges(tmp_path):
    """Rejects recordings of a share that leave out what the ranks exchange, by a stand-in that
    repeats calls where a graph repeats kernels: the rounds are those of the whole model."""
    random_checkpoint(tmp_path, FOUR)
    s = Settings(temperature=0.9, N=30, K=3, M=2, interval=2, exit_threshold=0.1, r=2)

    def check(_):
        want = decode(llama.Llama.load(tmp_path, dtype=torch.float64), (3, 1), s)
        mine = parallel.Parallel.load(tmp_path, "cpu", torch.float64)
        got = decode(None, (3, 1), s, loop=replaying(mine, s.K, s.M, s.r))
        for a, b in zip(want, got, strict=True):
            assert (a.skip, a.drafted, a.emitted) == (b.skip, b.drafted, b.emitted)
            assert a.choice is None or a.choice.parents == b.choice.parents
    assert_all_well(start(2, connected(check), tmp_path))


def test_passes_run_eagerly_on_all_ranks_where_one_cannot_record_an_exchange(tmp_path):
    """Rejects a rank that replays while another runs eagerly, one that decides by itself, silence,
    and a note where nothing is amiss or eager passes were asked for. CUDA is played."""
    @contextlib.contextmanager
    def graph(recording):
        yield
        if fails and os.environ["RANK"] == "1":
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    def check(kind):
        torch.cuda.CUDAGraph, torch.cuda.graph = object, graph
        clasp_mini.Job.load, job = lambda self: setattr(self, "costs", {}), job_of(kind, *flags)
        job.device, job.model, tried = types.SimpleNamespace(type="cuda"), job, []
        job.dtype = job.cache = job.forward = job.layer = job.head = None
        module = sys.modules["gpu.ranks"]
        real, module.recordable = module.recordable, lambda _: tried.append(0) or real("cpu")
        assert job.load().a.eager == (fails or bool(flags)) and len(tried) == (not flags)
        return 0

    for fails, flags in ((False, ()), (True, ()), (True, ("--eager",))):
        together = sys.modules["gpu.ranks"].together
        results = start(2, lambda rank: together(check, clasp_mini.Job), tmp_path)
        assert_all_well(results)
        note = [err for *_, err in results]
        assert note[1] == "" and "passes run eagerly" in note[0] if fails and not flags else \
            note == ["", ""]


def test_a_rank_reads_holds_and_exchanges_what_the_table_of_sizes_counts(tmp_path, monkeypatch):
    """Rejects a rank that keeps the whole, in a view's storage too, that copies more from the
    memory map than it keeps, or exchanges once too often; and a table that counts otherwise."""
    random_checkpoint(tmp_path, FOUR, shards=2)
    monkeypatch.setattr(sizes, "ITEM", 4)              # float32
    for n in (1, 2):
        def check(rank, n=n):
            copied, sent, cut, c = [], [], parallel.part, llama.Config.load(tmp_path)

            def part(name, x):
                copied.append(cut(name, x).numel())
                return cut(name, x)

            def noting(exchange):
                return lambda x, *rest: sent.append(x.numel()) or exchange(x, *rest)
            parallel.part = part
            dist.all_reduce, dist.all_gather_single = map(
                noting, (dist.all_reduce, dist.all_gather_single))
            model = parallel.Parallel.load(tmp_path, "cpu", torch.float32)
            held = {s.data_ptr(): s.nbytes() for s in (x.untyped_storage() for x in (
                model.embed, model.norm, model.lm_head, *(x for w in model.layers for x in w)))}
            assert sum(held.values()) == 4 * sum(copied) == 4 * sizes.held(c, n)
            cache = model.cache(64)
            assert cache.k.numel() + cache.v.numel() == sizes.cached(c, n, 64)
            for T, skip in ((5, ()), (1, (True, False, False, True))):
                sent.clear()
                model.forward(IDS[:T], cache.sequence(0, T), cache, skip, last=T)
                assert (sum(sent), len(sent)) == sizes.exchanged(c, n, 4 - sum(skip), T)
        assert_all_well(start(n, connected(check), tmp_path))


def test_the_table_of_sizes_is_that_of_the_released_models_and_of_the_readme(capsys):
    """Rejects a miscounted matrix: the numbers of weights are the published ones; a table that has
    drifted; and a speed-up that at hand-worked places comes out otherwise."""
    assert [sizes.held(sizes.llama3(name), 1) for name in ("8B", "70B", "405B")] == [
        8_030_261_248, 70_553_706_496, 405_853_388_800]
    assert sizes.main([]) == 0
    printed = capsys.readouterr().out
    readme = (ROOT / "gpu" / "README.md").read_text(encoding="utf-8")
    assert all(table in readme for table in printed.strip().split("\n\n"))
    c = sizes.llama3("8B")
    free = types.SimpleNamespace(context=1, memory=1.0, used=1.0, latency=10, link=1e9)
    weights = 2 * (8_030_261_248 - 128256 * 4096 - 4096) / 1e12             # all but the embedding
    assert sizes.seconds(c, 1, 32, 9, free) == pytest.approx(weights, rel=1e-4)
    both = sizes.seconds(c, 2, 32, 1, free)
    assert both == pytest.approx(weights / 2 + 65 * 10e-6, rel=1e-3)
    # All kept, half left out (0.53 of a step), twelve drafts: 13 tokens for 12 * 0.53 + 1 + 0.13.
    assert sizes.speedup(c, 1, 0.5, 1.0, free) == (pytest.approx(13 / 7.53, rel=0.01), 12)
    assert sizes.speedup(c, 1, 0.5, 0.0, free) == (pytest.approx(1 / 1.545, rel=0.01), 1)


# ------------------------------------------------------------------------------ decisions

def job_of(kind, *flags):
    return kind(clasp_mini.parser().parse_args([*map(str, (*TINY, *flags))]))


def decisions(job):
    return [(r.skip, r.drafted, r.emitted, r.choice and r.choice.parents)
            for r in job.run(job.prompt(), job.settings, job.a.seed)]


FIXED = ("--draft-length", 4, "--skip-layers", 2, "--draft-exit-threshold", 0.04, "--interval", 2)
ALONE = ("--draft-length", 0, "--skip-layers", 0, "--draft-exit-threshold", 0, "--interval", 1)


def test_two_ranks_draft_choose_and_write_what_one_process_does(tmp_path):
    """Rejects any decision that differs, greedy or sampled, by fixed numbers or by the policy, for
    which each rank has measured other costs: rank 0's hold."""
    def check(kind):
        measure, rank = costs.measure, int(os.environ["RANK"])
        costs.measure = lambda *a: measure(*a) | dict(
            draft=[1 - 0.1 * (rank + j) for j in range(7)], verify=[1.0] * 14, optimise=0)
        whole, job = job_of(clasp_mini.Job, *flags), job_of(kind, *flags)
        whole.costs = job.load().costs                 # given, so not measured
        got, want = decisions(job), decisions(whole.load())
        assert got == want and any(r[3] for r in got) and any(r[1] for r in got)
        assert not job.adaptive or job.costs["draft"][0] == 1
        return 0

    for flags in (FIXED, (*FIXED, "--temperature", 0.8, "--top-p", 0.9, "--probe", 2),
                  ("--temperature", 1, "--seed", 5)):
        together = sys.modules["gpu.ranks"].together
        assert_all_well(start(2, lambda rank: together(check, clasp_mini.Job), tmp_path))


def command(*flags, before=lambda rank: None):
    """A rank's work: the main command."""
    def work(rank):
        before(rank)
        return clasp_mini.main([*map(str, (*TINY, *flags))])
    return work


def test_only_rank_0_prints_and_its_trace_checks_clean_against_the_whole_model(tmp_path, capsys):
    """Rejects a second voice, two writers of one file, a trace with the sizes of a share."""
    trace = tmp_path / "run.jsonl"
    (status, out, err), *others = start(2, command(
        *FIXED, "--temperature", 0.9, "--trace", trace, "--verbose", "--json"), tmp_path)
    assert status == 0 and json.loads(out)["stats"]["drafted"] > 10 and "\n" in err
    assert others == [(0, "", "")]
    assert check_trace.main([str(trace), "--model", str(ROOT / "oracle" / "tiny")]) == 0
    assert "no departure" in capsys.readouterr().out
    (status, out, err), *others = start(2, command(
        *FIXED, "--compare", "--json", "--repeats", 1, "--max-new-tokens", 20), tmp_path)
    assert (status, err, others) == (0, "", [(0, "", "")]) and json.loads(out)["equal"]


def test_torchrun_starts_the_command_and_all_ranks_read_rank_0s_standard_input(
        tmp_path, monkeypatch, capsys):
    """Rejects what works only when forked: torchrun's own variables, its store, one standard
    input for all, real ends of processes."""
    random_checkpoint(tmp_path, dict(vocab_size=4096))
    (tmp_path / "tokenizer.model").symlink_to(DEMO / "tokenizer.model")
    flags = [str(f) for f in (ROOT / "clasp_mini.py", "--model", tmp_path, *FIXED, "--json",
                              "--dtype", "float64", "--prompt", "-", "--max-new-tokens", 20)]
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = subprocess.run([*run, *flags], input="x = \u00e9", capture_output=True, text=True,
                         timeout=120)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("x = \u00e9".encode())))
    assert (clasp_mini.main(flags[1:]), two.returncode) == (0, 0), two.stderr
    one, two = json.loads(capsys.readouterr().out), json.loads(two.stdout)
    assert (one["ids"], one["prompt_ids"]) == (two["ids"], two["prompt_ids"])


# ------------------------------------------------------------------------------ ends

def one_line(err, *said):
    return (err.startswith("clasp_mini.py: ") and err.count("\n") == 1
            and all(x in err for x in said))


def at_round(n, act):
    """Let `act` happen to rank 1 in its n-th round, which the ranks agree on before."""
    def before(rank):
        real, count = speculative.Chance.draw, []

        def draw(self, p):
            count.append(0)
            return act(real(self, p), p) if len(count) == n else real(self, p)
        if rank == 1:
            speculative.Chance.draw = draw
        if act is hanging:
            sys.modules["gpu.ranks"].TIMEOUT = 2
    return before


def killed(token, p):
    os.kill(os.getpid(), signal.SIGKILL)


def hanging(token, p):
    time.sleep(9)


def out_of_memory(token, p):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nAnd more.")


@pytest.mark.parametrize("act, theirs, said", [
    (killed, -signal.SIGKILL, ("rank 0", "did another rank end?")),
    (hanging, 1, ("rank 0", "no round ended within 2 seconds")),
    (out_of_memory, 1, ("rank 0", "did another rank end?"))])
def test_a_rank_that_dies_hangs_or_fails_ends_all_of_them_with_a_line(tmp_path, act, theirs, said):
    """Rejects ranks that wait forever for one that is gone, tracebacks, and status 0."""
    began = time.time()
    results = start(2, command(*FIXED, before=at_round(9, act)), tmp_path)
    assert [status for status, *_ in results] == [1, theirs] and time.time() - began < 20
    assert one_line(results[0][2], *said), results[0][2]
    assert act is killed or one_line(results[1][2], "rank 1"), results[1][2]
    assert act is not out_of_memory or "CUDA out of memory (" in results[1][2]


def test_ctrl_c_ends_all_and_what_was_written_is_kept(tmp_path):
    """Rejects a rank that hangs, aborts or loses its text when it is interrupted."""
    def before(rank):
        at_round(9, lambda token, p: os.kill(os.getpid(), signal.SIGINT))(1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    (status, out, err), other = start(2, command(*ALONE, before=before), tmp_path)
    assert (status, other, out.count(",")) == (130, (130, "", ""), 7), err
    results = start(2, command(*FIXED, "--compare", before=before), tmp_path)
    for rank, (status, _, err) in enumerate(results):
        assert status == 130 and one_line(err, f"rank {rank}: interrupted"), err


def another(token, p):
    return (token + 1) % len(p)




@pytest.mark.parametrize("n", [1, 7, 12])
def test_a_wrong_token_on_one_rank_ends_all_of_them_in_that_round(tmp_path, n):
    """Rejects a comparison that is left out, at the beginning, within or in the last round."""
    results = start(2, command(*ALONE, "--max-new-tokens", 12, "--temperature", 1, "--verbose",
                               before=at_round(n, another)), tmp_path)
    for rank, (status, _, err) in enumerate(results):
        *rounds, last, _ = err.split("\n")
        assert status == 1 and one_line(last + "\n", f"rank {rank}: the ranks decided differently")
        assert len(rounds) == (0 if rank else n - 1)


def test_so_does_a_wrong_set_of_layers(tmp_path):
    """Rejects a comparison of the text alone: with other layers the ranks' sums are nonsense."""
    def before(rank):
        if rank == 1:
            clasp_mini.choose_skip = lambda h, f, M: choose_skip(h.flip(0), f, M)
    for rank, (status, _, err) in enumerate(start(2, command(*FIXED, before=before), tmp_path)):
        assert status == 1 and one_line(err, f"rank {rank}: the ranks decided differently"), err


def test_ranks_that_no_longer_run_the_same_passes_end_too(tmp_path):
    """Rejects a hang and a status of 0 where an exchange of one rank meets another one's: here gloo
    itself ends one of them, in its own words."""
    def before(rank):
        if rank == 1:
            speculative.Fixed.goes_on = lambda self, confidence: False
    (status, _, err), (status_1, _, err_1) = start(2, command(*FIXED, before=before), tmp_path)
    assert 0 not in (status, status_1) and "did another rank end?" in err + err_1


def test_what_cannot_be_shared_is_said_once_and_before_anything_is_read(tmp_path, monkeypatch):
    """Rejects a share of half a head, N lines for N ranks, fewer GPUs than processes."""
    monkeypatch.setattr(llama, "tensors", None)
    results = start(3, command(), tmp_path)
    assert [status for status, *_ in results] == [2, 2, 2]
    assert [err for *_, err in results] == [
        "clasp_mini.py: 3 processes cannot share 2 key/value heads and a feed-forward width of 40 "
        "evenly; take 1 or 2\n", "", ""]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    results = start(2, command("--device", "cuda"), tmp_path)
    assert one_line(results[0][2], "2 processes need a GPU each, and PyTorch sees 1")


def test_a_rank_whose_share_is_damaged_or_that_never_comes_ends_the_others(tmp_path):
    """Rejects ranks that wait at the first exchange, or for the connection, without an end."""
    _, w = random_checkpoint(tmp_path, FOUR)
    name = "model.layers.1.mlp.down_proj.weight"
    w[name][:, -1] = float("nan")                      # in rank 1's columns
    save({name: x.float() for name, x in w.items()}, tmp_path / "model.safetensors",
         {"format": "pt"})
    (status, _, err), (status_1, _, err_1) = start(2, command("--model", tmp_path), tmp_path)
    assert (status, status_1) == (1, 1) and one_line(err, "did another rank end?"), err
    assert one_line(err_1, f"{name} holds values that are not finite")

    def before(rank):
        sys.modules["gpu.ranks"].TIMEOUT = 1
        if rank:
            sys.exit(0)
    (status, _, err), _ = start(2, command(before=before), tmp_path)
    assert status == 1 and one_line(err, "rank 0"), err


WRONG_RANKS = {
    "nothing is compared": (
        test_so_does_a_wrong_set_of_layers, "if both.sum() != 0:", "if False:"),
    "only the text is compared": (
        test_so_does_a_wrong_set_of_layers,
        "(r.skip, r.drafted, r.emitted, r.choice and r.choice.parents)", "r.emitted"),
    "a round comes out before it is compared": (
        test_a_wrong_token_on_one_rank_ends_all_of_them_in_that_round,
        "r = next(rounds, None)", "yield (r := next(rounds, None))"),
    "costs are each rank's own": (
        test_two_ranks_draft_choose_and_write_what_one_process_does,
        "self.costs = json.loads(", "json.loads("),
    "every rank traces": (
        test_only_rank_0_prints_and_its_trace_checks_clean_against_the_whole_model,
        "if rank:\n            a.trace = None", "pass"),
    "a trace has the sizes of a share": (
        test_only_rank_0_prints_and_its_trace_checks_clean_against_the_whole_model,
        "cfg=self.cfg, **{", "cfg=model.cfg, **{"),
    "a rank runs eagerly by itself": (
        test_passes_run_eagerly_on_all_ranks_where_one_cannot_record_an_exchange,
        "dist.all_reduce(x, dist.ReduceOp.MIN)", "pass"),
    "eager passes without a word": (
        test_passes_run_eagerly_on_all_ranks_where_one_cannot_record_an_exchange,
        'print("clasp_mini.py: note', 'str("clasp_mini.py: note'),
    "every rank prints": (
        test_only_rank_0_prints_and_its_trace_checks_clean_against_the_whole_model,
        "if not first:", "if False:"),
    "a rank ends alone": (
        test_a_rank_whose_share_is_damaged_or_that_never_comes_ends_the_others,
        "lost(f\"{str(e)", "print(f\"{str(e)")}


@pytest.mark.parametrize("wrong", WRONG_RANKS)
def test_a_wrong_rank_is_seen(tmp_path, request, monkeypatch, wrong):
    """Rejects tests of the ranks that are too kind."""
    test, *edit = WRONG_RANKS[wrong]
    monkeypatch.setitem(sys.modules, "gpu.ranks", altered(ranks, edit))
    more = dict(n=7) if "token" in test.__name__ else {}
    if "capsys" in test.__code__.co_varnames[:test.__code__.co_argcount]:
        more = dict(capsys=request.getfixturevalue("capsys"))
    with pytest.raises(AssertionError):
        test(tmp_path, **more)
