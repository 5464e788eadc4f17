"""Several processes are one. On a CPU with gloo, each rank forked from the test; once as torchrun
starts them. What each rank holds, computes and decides is compared with one process that has the
whole model.
"""
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
from pathlib import Path

import pytest
import torch.distributed.tensor  # noqa: F401  which else every rank would import for itself

import clasp_mini
import command.job
import llama
import speculative
from dp_layer_skip import choose_skip, torch
from gpu import parallel, ranks
from gpu.stand_in import replaying
from policy import costs
from policy.probe import choose_by
from speculative import Settings
from tests.helpers import DEMO, ROOT, assert_same_choice, decode
from tests.slow_llama import AS_5, IDS, random_checkpoint
from tests.wrong_programs import altered

dist = parallel.dist
FOUR = dict(AS_5, num_attention_heads=8, num_key_value_heads=4, intermediate_size=24,
            num_hidden_layers=4)                       # 50 tokens: not to be divided by 4
TINY = ("--model", ROOT / "oracle" / "tiny", "--dtype", "float64", "--prompt-ids", "3,1,2",
        "--max-new-tokens", 30)


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
        os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n),
                           LOCAL_WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1",
                           MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
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
        mine = module.Parallel.load(folder, "cpu", torch.float64)
        n = dist.get_world_size()
        both = ((whole, whole.cache(30)), (mine, mine.cache(30)))
        t = 0
        for T, skip in ((5, ()), (4, ()), (1, (True, False, True, False)), (2, ())):
            ids = IDS[t:t + T]
            h, g = (torch.stack(m.forward(ids, c.sequence(t, T), c, skip)) for m, c in both)
            logits = mine.head(g[-1])
            assert near(whole.head(h[-1]), logits) and near(h, g), "another number"
            same_everywhere(logits, g)
            t += T
        heads = slice(rank * whole.cfg.G // n, (rank + 1) * whole.cfg.G // n)
        (_, one), (_, other) = both
        for a, b in ((one.k, other.k), (one.v, other.v)):
            assert b.shape[1] == a.shape[1] // n and near(a[:, heads], b), "another cache"
        (a, _), (b, _) = (choose_by(2, choose_skip, m, c, IDS[:t].tolist(), h[:, -1], 3)
                          for m, c in both)
        assert_same_choice(a, b, 1e-12)
        half = module.Parallel.load(folder, "cpu", torch.bfloat16)
        cache = half.cache(12)
        h = half.forward(IDS, cache.sequence(0, 12), cache)
        same_everywhere(*(x.float() for x in h), half.head(h[-1]))
    return connected(check)


@pytest.mark.parametrize("n, tied, old_pytorch", [(2, False, True), (4, True, False)])
def test_logits_states_cache_and_tables_are_those_of_one_process(
        tmp_path, monkeypatch, n, tied, old_pytorch):
    """Rejects a share of the wrong heads, rows or columns, a part that is not added or added
    twice, logits in another order, and different bits on two ranks, in float64 and bfloat16; and
    the name of one PyTorch alone for what puts logits side by side."""
    if old_pytorch:
        monkeypatch.delattr(dist, "all_gather_single", raising=False)
    random_checkpoint(tmp_path, dict(FOUR, tie_word_embeddings=tied), shards=2)
    assert_all_well(start(n, every_pass_is_that_of_the_whole(tmp_path), tmp_path))


WRONG_SHARES = {
    "parts are not added": ("dist.all_reduce(x)", "pass"),
    "what attention adds is not": ("total(attention(", "(attention("),
    "heads are dealt out like cards": (
        "[rank * size:(rank + 1) * size]", "[rank::dist.get_world_size()]"),
    "every rank has the first share": ("rank = dist.get_rank()", "rank = 0"),
    "out is not cut by the heads that it reads": (
        "x if dim is None else share(x, dim)", "x if dim is None else share(x if 'o_proj' not in "
        "name else x.flip(1), dim)"),
    "logits stand rank by rank": (
        ".transpose(0, 1).reshape(T, self.n * m)", ".reshape(T, self.n * m)"),
    "the head is its own share's norm": ("rms_norm(x, self.norm, self.eps)", "x"),
    "logits of the padding come out": ("every[:, :self.cfg.V]", "every")}


@pytest.mark.parametrize("wrong", WRONG_SHARES)
def test_a_wrong_share_is_seen(tmp_path, wrong):
    """Rejects a test of the numbers that is too kind."""
    random_checkpoint(tmp_path, FOUR)
    module = altered(parallel, WRONG_SHARES[wrong])
    results = start(4, every_pass_is_that_of_the_whole(tmp_path, module), tmp_path)
    assert any("Error" in err for *_, err in results), wrong


def test_recorded_passes_hold_their_exchanges(tmp_path):
    """Rejects recordings of a share that leave out what the ranks exchange, by a stand-in that
    repeats calls where a graph repeats kernels: the rounds are those of the whole model."""
    random_checkpoint(tmp_path, FOUR)
    s = Settings(temperature=0.9, N=15, K=3, M=2, interval=2)

    def check(_):
        want = decode(llama.Llama.load(tmp_path, dtype=torch.float64), (3, 1), s)
        mine = parallel.Parallel.load(tmp_path, "cpu", torch.float64)
        assert decided(decode(None, (3, 1), s, loop=replaying(mine, s.K, s.M))) == decided(want)
    assert_all_well(start(2, connected(check), tmp_path))


def test_passes_run_eagerly_on_all_ranks_where_one_cannot_record_an_exchange(tmp_path):
    """Rejects a rank that replays while another runs eagerly, one that decides by itself, silence,
    and a note where nothing is amiss or eager passes were asked for. CUDA is played."""
    @contextlib.contextmanager
    def graph(recording):
        yield
        if fails and os.environ["RANK"] == "1":
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    def load(self):
        self.costs = {}
        self.device, self.model = torch.device("cpu"), parallel.Parallel.load(self.folder)

    def check(kind):
        torch.cuda.CUDAGraph, torch.cuda.graph = object, graph
        clasp_mini.Job.load = load
        module = sys.modules["gpu.ranks"]
        real, tried = module.recordable, []
        module.recordable = lambda _: tried.append(0) or real("cpu")
        job = job_of(kind, *flags)
        job.device = torch.device("cuda")
        assert job.load().a.eager == (fails or bool(flags))
        assert len(tried) == (not flags)
        return 0

    for fails, flags in ((False, ()), (True, ()), (True, ("--eager",))):
        results = start(2, lambda rank: sys.modules["gpu.ranks"].together(check, clasp_mini.Job),
                        tmp_path)
        assert_all_well(results)
        said, other = (err for *_, err in results)
        assert ("passes run eagerly" in said) == (fails and not flags) and other == ""


def held(c, n):
    """Numbers in the weights of one of n ranks: of the embedding and the norms each has all."""
    layer = 2 * c.D + (2 * (c.H + c.G) * c.hd * c.D + 3 * c.D * c.ffn) // n
    return c.L * layer + c.D + c.V * c.D + (0 if c.tied else -(-c.V // n) * c.D)


def test_a_rank_holds_copies_and_exchanges_no_more_than_its_share(tmp_path):
    """Rejects a rank that keeps the whole, in a view's storage too, that copies more from the
    memory map than it keeps, or exchanges once too often."""
    c = llama.Config(L=4, D=32, H=8, G=4, hd=16, ffn=24, V=50, eps=1e-5, context=2048, tied=False,
                     theta=500.0, scaling=None)
    random_checkpoint(tmp_path, FOUR, shards=2)
    for n in (1, 2):
        def check(rank, n=n):
            copied, sent, cut = [], [], parallel.own_part

            def part(name, x):
                copied.append(cut(name, x).numel())
                return cut(name, x)

            def noting(exchange):
                return lambda x, *rest: sent.append(x.numel()) or exchange(x, *rest)
            parallel.own_part = part
            dist.all_reduce = noting(dist.all_reduce)
            dist.all_gather_single = noting(dist.all_gather_single)
            model = parallel.Parallel.load(tmp_path, "cpu", torch.float32)
            tensors = [model.embed, model.norm, model.lm_head]
            tensors += [x for w in model.layers for x in w]
            storages = {s.data_ptr(): s.nbytes() for s in (x.untyped_storage() for x in tensors)}
            assert sum(storages.values()) == 4 * sum(copied) == 4 * held(c, n)
            cache = model.cache(64)
            assert 2 * cache.k.numel() == 2 * c.L * c.G * c.hd * 64 // n
            h = model.forward(IDS[:5], cache.sequence(0, 5), cache, (True, False, False, True))
            assert sent == [5 * c.D] * 4
            model.head(h[-1][-1:])
            assert sent[4:] == [50]
        assert_all_well(start(n, connected(check), tmp_path))


# ------------------------------------------------------------------------------ decisions

def job_of(kind, *flags):
    return kind(clasp_mini.parser().parse_args([*map(str, (*TINY, *flags))]))


def decided(rounds):
    return [(r.skip, r.drafted, r.emitted, r.choice and r.choice.skipped) for r in rounds]


def decisions(job):
    return decided(clasp_mini.run(job, job.prompt(), job.a.seed))


FIXED = ("--draft-length", 4, "--skip-layers", 2, "--draft-exit-threshold", 0.04, "--interval", 2)
ALONE = ("--draft-length", 0, "--skip-layers", 0, "--draft-exit-threshold", 0, "--interval", 1)


def test_two_ranks_draft_choose_and_write_what_one_process_does(tmp_path):
    """Rejects any decision that differs, by the policy, for which each rank has guessed and
    measured other costs (rank 0's hold), or by fixed numbers."""
    def check(kind):
        rank = int(os.environ["RANK"])
        own = dict(draft=[1 - 0.5 * rank, *[0.01 + 0.2 * rank] * 6], optimise=0, risk=[0.1] * 7)
        costs.shelf = lambda *_: Path(os.devnull) / "none"
        costs.guess = lambda *_: dict(own, verify=[1.0] * 14)
        costs.measure = lambda *_: [1 + 0.1 * rank] * 14
        job = job_of(kind, *flags)
        got = decisions(job.load())
        costs.guess = lambda *_: dict(job.costs, verify=[1.0] * 14)
        costs.measure = lambda *_: [1.0] * 14          # rank 0's
        whole = job_of(clasp_mini.Job, *flags)
        assert got == decisions(whole.load())
        assert any(r[3] for r in got) and any(r[1] for r in got)
        assert not job.adaptive or (job.costs["draft"][0], job.costs["verify"][5]) == (1, 1)
        return 0

    for flags in (("--seed", 5, "--max-new-tokens", 100), (*FIXED, "--top-p", 0.9, "--probe", 2)):
        flags = (*flags, "--temperature", 1)
        assert_all_well(start(2, lambda rank: sys.modules["gpu.ranks"].together(
            check, clasp_mini.Job), tmp_path))


def main_command(*flags, before=lambda rank: None):
    """A rank's work: the main command."""
    def work(rank):
        before(rank)
        return clasp_mini.main([*map(str, (*TINY, *flags))])
    return work


def test_only_rank_0_prints_and_its_trace_checks_clean_against_the_whole_model(tmp_path):
    """Rejects a second voice, two writers of one file, a trace with the sizes of a share."""
    from oracle import check_trace
    trace = tmp_path / "run.jsonl"
    (status, out, err), *others = start(2, main_command(
        *FIXED, "--temperature", 0.9, "--trace", trace, "--verbose", "--json"), tmp_path)
    assert status == 0 and json.loads(out)["stats"]["drafted"] > 10 and "\n" in err
    assert others == [(0, "", "")]
    assert check_trace.main([str(trace), "--model", str(ROOT / "oracle" / "tiny")]) == 0
    (status, out, err), *others = start(2, main_command(
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
    (hanging, 1, ("rank 0", "no round ended within 2 seconds", "--eager")),
    (out_of_memory, 1, ("rank 0", "did another rank end?"))])
def test_a_rank_that_dies_hangs_or_fails_ends_all_of_them_with_a_line(tmp_path, act, theirs, said):
    """Rejects ranks that wait forever for one that is gone, tracebacks, and status 0."""
    began = time.time()
    results = start(2, main_command(*FIXED, before=at_round(9, act)), tmp_path)
    assert [status for status, *_ in results] == [1, theirs] and time.time() - began < 20
    assert one_line(results[0][2], *said), results[0][2]
    assert act is killed or one_line(results[1][2], "rank 1"), results[1][2]
    assert act is not out_of_memory or "CUDA out of memory (" in results[1][2]


def test_ctrl_c_ends_all_and_what_was_written_is_kept(tmp_path):
    """Rejects a rank that hangs, aborts or loses its text when it is interrupted."""
    def before(rank):
        at_round(9, lambda token, p: os.kill(os.getpid(), signal.SIGINT))(1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    (status, out, err), other = start(2, main_command(*ALONE, before=before), tmp_path)
    assert (status, other, out.count(",")) == (130, (130, "", ""), 7), err
    results = start(2, main_command(*FIXED, "--compare", before=before), tmp_path)
    for rank, (status, _, err) in enumerate(results):
        assert status == 130 and one_line(err, f"rank {rank}: interrupted"), err


def test_a_wrong_token_on_one_rank_ends_all_of_them_in_that_round(tmp_path):
    """Rejects a comparison that is left out, in the first round or in the last."""
    for n in (12, 1):
        results = start(2, main_command(
            *ALONE, "--max-new-tokens", 12, "--temperature", 1, "--verbose",
            before=at_round(n, lambda token, p: (token + 1) % len(p))), tmp_path)
        for rank, (status, _, err) in enumerate(results):
            *rounds, last, _ = err.split("\n")
            assert one_line(last + "\n", f"rank {rank}: the ranks decided differently")
            assert status == 1 and len(rounds) == (0 if rank else n)      # and the legend


def test_so_does_a_wrong_set_of_layers(tmp_path):
    """Rejects a comparison of the text alone: with other layers the ranks' sums are nonsense."""
    def before(rank):
        if rank == 1:
            command.job.choose_skip = lambda h, f, M: choose_skip(h.flip(0), f, M)
    results = start(2, main_command(*FIXED, "--max-new-tokens", 9, before=before), tmp_path)
    for rank, (status, _, err) in enumerate(results):
        assert status == 1 and one_line(err, f"rank {rank}: the ranks decided differently"), err


def test_what_cannot_be_shared_is_said_once_and_before_anything_is_read(tmp_path, monkeypatch):
    """Rejects a share of half a head, N lines for N ranks, fewer GPUs than processes."""
    monkeypatch.setattr(llama, "tensors", None)
    results = start(3, main_command(), tmp_path)
    assert [status for status, *_ in results] == [2, 2, 2]
    assert [err for *_, err in results] == [
        "clasp_mini.py: 3 processes cannot share 2 key/value heads and a feed-forward width of 40 "
        "evenly; take 1 or 2\n", "", ""]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    results = start(2, main_command("--device", "cuda"), tmp_path)
    assert one_line(results[0][2], "2 processes need a GPU each, and PyTorch sees 1")


def test_a_rank_that_cannot_load_its_share_or_never_comes_ends_the_others(tmp_path):
    """Rejects ranks that wait at the first exchange, or for the connection, without an end."""
    def broken(rank):
        def part(name, x):
            raise llama.ModelError(f"{name} is broken")
        if rank == 1:
            parallel.own_part = part
    (status, _, err), (status_1, _, err_1) = start(2, main_command(*FIXED, before=broken), tmp_path)
    assert (status, status_1) == (1, 1) and one_line(err, "did another rank end?"), err
    assert one_line(err_1, "is broken")

    def absent(rank):
        sys.modules["gpu.ranks"].TIMEOUT = 1
        if rank == 1:
            sys.exit(0)
    (status, _, err), _ = start(2, main_command(before=absent), tmp_path)
    assert status == 1 and one_line(err, "rank 0"), err


WRONG_RANKS = {
    "nothing is compared": (
        test_so_does_a_wrong_set_of_layers, "if both.sum() != 0:", "if False:"),
    "only the text is compared": (
        test_so_does_a_wrong_set_of_layers,
        "(r.skip, r.drafted, r.emitted, r.choice and r.choice.skipped)", "r.emitted"),
    "a round comes out before it is compared": (
        test_a_wrong_token_on_one_rank_ends_all_of_them_in_that_round,
        "r = next(rounds, None)", "yield (r := next(rounds, None))"),
    "costs are each rank's own": (
        test_two_ranks_draft_choose_and_write_what_one_process_does,
        "self.costs, self.guessed = json.loads(known)", "json.loads(known)"),
    "every rank traces": (
        test_only_rank_0_prints_and_its_trace_checks_clean_against_the_whole_model,
        "if self.rank > 0: a.trace = None", "pass"),
    "a trace has the sizes of a share": (
        test_only_rank_0_prints_and_its_trace_checks_clean_against_the_whole_model,
        "cfg=self.cfg, **own", "cfg=self.model.cfg, **own"),
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
        test_a_rank_that_cannot_load_its_share_or_never_comes_ends_the_others,
        "lost(f\"{str(e)", "print(f\"{str(e)")}


@pytest.mark.parametrize("wrong", WRONG_RANKS)
def test_a_wrong_rank_is_seen(tmp_path, monkeypatch, wrong):
    """Rejects tests of the ranks that are too kind."""
    test, *edit = WRONG_RANKS[wrong]
    monkeypatch.setitem(sys.modules, "gpu.ranks", altered(ranks, edit))
    with pytest.raises(AssertionError):
        test(tmp_path)
