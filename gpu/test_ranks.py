"""Several processes are one. On a CPU with gloo, each rank forked from the test; once as torchrun
starts them. What each rank holds, computes and decides is compared with one process that has the
whole model.
"""
import faulthandler
import io
import itertools
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch.distributed.tensor  # noqa: F401  which else every rank would import for itself

import clasp_mini
import llama
import speculative
from command.flags import parser
from dp_layer_skip import choose_skip, torch
from gpu import ranks
from gpu.trial import replaying
from oracle import check_trace
from policy import costs
from policy.probe import choose_by
from speculative import Chance, Settings
from tests.helpers import DEMO, ROOT, assert_same_choice, decode
from tests.slow_llama import AS_5, IDS, random_checkpoint

dist = ranks.dist
FOUR = dict(AS_5, num_attention_heads=8, num_key_value_heads=4, intermediate_size=24,
            num_hidden_layers=4)                       # 50 tokens: not to be divided by 4
TINY = ("--model", ROOT / "oracle" / "tiny", "--dtype", "float64", "--prompt-ids", "3,1,2",
        "--max-new-tokens", 30)
FIXED = ("--draft-length", 4, "--skip-layers", 2, "--draft-exit-threshold", 0.04, "--interval", 2)
ALONE = ("--strategy", "ar")


def start(n, work, folder, timeout=60):
    """Fork n ranks that do work(rank), which may return an exit status; -> (status, stdout, stderr)
    of each. The status of one that has not ended in time is None."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]

    def child(rank):
        faulthandler.disable()                         # pytest's, which writes to pytest's stderr
        if hasattr(os, "sched_setaffinity"):           # one core passes from rank to rank faster
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})         # than another wakes up
        sys.stdout = open(folder / f"out{rank}", "w")
        sys.stderr = sys.__stderr__ = open(folder / f"err{rank}", "w")
        for fd, file in ((1, sys.stdout), (2, sys.stderr)):
            os.dup2(file.fileno(), fd)
        os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n),
                           LOCAL_WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1",
                           MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
        sys.argv = ["clasp_mini.py"]
        sys.exit(work(rank))

    fork = multiprocessing.get_context("fork")
    every = [fork.Process(target=child, args=(rank,)) for rank in range(n)]
    end = time.time() + timeout
    for p in every:
        p.start()
    for p in every:
        p.join(max(0, end - time.time()))
    statuses = [p.exitcode for p in every]
    for p in every:
        p.kill()
        p.join()
    return [(status, *((folder / f"{name}{rank}").read_text() for name in ("out", "err")))
            for rank, status in enumerate(statuses)]


def connected(check):
    """A rank's work: `check`, given the rank, with the others connected."""
    def work(rank):
        dist.init_process_group("gloo")
        check(rank)
        dist.barrier()
        dist.destroy_process_group()
    return work


def the_command(*flags, before=lambda rank: None):
    """A rank's work: the main command."""
    def work(rank):
        before(rank)
        return clasp_mini.main([*map(str, (*TINY, *flags))])
    return work


def assert_all_well(results):
    for status, _, err in results:
        assert status == 0, err


# ------------------------------------------------------------------------------ numbers

def same_everywhere(*values):
    for x in values:
        every = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(every, x.contiguous())
        assert all(torch.equal(x, y) for y in every), "the ranks have different bits"


def near(a, b):
    return (a - b).abs().max() < 1e-12


def decided(rounds):
    return [(r.skip, r.drafted, r.emitted, r.choice and r.choice.skipped) for r in rounds]


@pytest.mark.parametrize("n, tied, old_pytorch", [(2, False, True), (4, True, False)])
def test_logits_states_cache_tables_and_runs_are_those_of_one_process(
        tmp_path, monkeypatch, n, tied, old_pytorch):
    """Of prefill, chunk, draft, verify and choice. Rejects a share of the wrong heads, rows or
    columns, a part that is not added or added twice, logits in another order, different bits on two
    ranks, in float64 and bfloat16; the name of one PyTorch alone for what puts logits side by side;
    recordings that leave out what the ranks exchange."""
    if old_pytorch:
        monkeypatch.delattr(dist, "all_gather_single", raising=False)
    random_checkpoint(tmp_path, dict(FOUR, tie_word_embeddings=tied), shards=2)

    def check(rank):
        whole = llama.Llama.load(tmp_path, dtype=torch.float64)
        mine = ranks.Parallel.load(tmp_path, "cpu", torch.float64)
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
        s = Settings(temperature=0.9, N=15, K=3, M=2, interval=2)
        got = decode(None, (3, 1), s, loop=replaying(mine, s.K, s.M))
        assert decided(got) == decided(decode(whole, (3, 1), s))
        half = ranks.Parallel.load(tmp_path, "cpu", torch.bfloat16)
        cache = half.cache(12)
        h = half.forward(IDS, cache.sequence(0, 12), cache)
        same_everywhere(*(x.float() for x in h), half.head(h[-1]))
    assert_all_well(start(n, connected(check), tmp_path))


def test_a_rank_holds_copies_and_exchanges_no_more_than_its_share(tmp_path):
    """Rejects a rank that keeps the whole, in a view's storage too, that copies more from the
    memory map than it keeps, or exchanges once too often."""
    random_checkpoint(tmp_path, FOUR, shards=2)
    c = llama.read_config(tmp_path)
    layer = 2 * c.D + costs.layer_weights(c) // 2      # norms are not shared, nor the embedding
    held = c.L * layer + c.D + c.V * c.D + c.V // 2 * c.D

    def check(rank):
        copied, sent = [], []
        cut, add = ranks.own_part, dist.all_reduce

        def part(name, x):
            copied.append(cut(name, x).numel())
            return cut(name, x)
        ranks.own_part = part
        dist.all_reduce = lambda x: sent.append(x.numel()) or add(x)
        model = ranks.Parallel.load(tmp_path, "cpu", torch.float32)
        parts = [x for w in model.layers for x in w[:-1]]      # without eps
        tensors = [model.embed, model.norm, model.lm_head, *parts]
        storages = {s.data_ptr(): s.nbytes() for s in (x.untyped_storage() for x in tensors)}
        assert sum(storages.values()) == 4 * sum(copied) == 4 * held
        cache = model.cache(9)
        model.forward(IDS[:5], cache.sequence(0, 5), cache, (True, False, False, True))
        assert sent == [5 * c.D] * 4
    assert_all_well(start(2, connected(check), tmp_path))


# ------------------------------------------------------------------------------ decisions

def job_of(kind, *flags):
    return kind(parser().parse_args([*map(str, (*TINY, *flags))]))


def decisions(job):
    return decided(clasp_mini.run(job, job.prompt(), Chance(job.flags.seed)))


def test_two_ranks_draft_choose_and_write_what_one_process_does(tmp_path):
    """Rejects a decision that differs, though each rank has guessed and measured other costs."""
    flags = ("--temperature", 1, "--seed", 5, "--max-new-tokens", 60)

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
        assert (job.costs["draft"][0], job.costs["verify"][5]) == (1, 1)
        return 0
    assert_all_well(start(2, lambda _: ranks.together(check), tmp_path))


def test_only_rank_0_prints_and_its_trace_checks_clean_against_the_whole_model(tmp_path):
    """Rejects a second voice, two writers of one file, a trace with the sizes of a share."""
    trace = tmp_path / "run.jsonl"
    (status, out, err), *others = start(2, the_command(
        *FIXED, "--temperature", 0.9, "--trace", trace, "--verbose", "--json"), tmp_path)
    assert status == 0 and json.loads(out)["stats"]["drafted"] > 10 and "\n" in err
    assert others == [(0, "", "")]
    assert check_trace.main([str(trace), "--model", str(ROOT / "oracle" / "tiny")]) == 0
    (status, out, err), *others = start(2, the_command(
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


def test_each_rank_takes_the_gpu_of_its_number(monkeypatch):
    """CUDA is played. Rejects one GPU for all, N ranks on N GPUs refused, exchanges by the CPU."""
    for name, value in dict(RANK=3, LOCAL_RANK=1, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2).items():
        monkeypatch.setenv(name, str(value))
    taken = Mock()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.device)
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **how: iter([(None, 0, 0)]))
    monkeypatch.setattr(dist, "init_process_group", taken.group)
    job = job_of(ranks.RankedJob, "--device", "cuda")
    assert job.device == torch.device("cuda:1")
    taken.device.assert_called_once_with(job.device)
    assert taken.group.call_args.args == ("nccl",) and taken.group.call_args.kwargs["rank"] == 3


def test_what_cannot_be_shared_is_said_once_and_before_anything_is_read(tmp_path, monkeypatch):
    """Rejects a share of half a head, or of half a number of the feed-forward width; N lines for N
    ranks; fewer GPUs than processes."""
    monkeypatch.setattr(llama, "tensors", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    odd = tmp_path / "odd"
    random_checkpoint(odd, dict(FOUR, intermediate_size=26))
    for n, flags, said in (
            (3, (), "3 processes cannot share 2 key/value heads and a feed-forward width of 40 "
                    "evenly; take 1 or 2"),
            (4, ("--model", odd), "a feed-forward width of 26 evenly; take 1 or 2"),
            (2, ("--device", "cuda"), "2 processes need a GPU each, and PyTorch sees 1")):
        (status, _, err), *others = start(n, the_command(*flags), tmp_path)
        assert status == 2 and one_line(err, f"{said}\n"), err
        assert others == [(2, "", "")] * (n - 1)


# ------------------------------------------------------------------------------ ends

def one_line(err, *said):
    return (err.startswith("clasp_mini.py: ") and err.count("\n") == 1
            and all(x in err for x in said))


def at_round(n, act):
    """Let `act` happen to rank 1 in its n-th round, which the ranks agree on before."""
    def before(rank):
        real, count = speculative.Chance.draw, itertools.count(1)

        def draw(self, p):
            token = real(self, p)
            return act(token, p) if next(count) == n else token
        if rank == 1:
            speculative.Chance.draw = draw
    return before


def interrupted(rank):                                 # Ctrl-C reaches both
    at_round(9, lambda *_: signal.raise_signal(signal.SIGINT))(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def hangs(rank):
    at_round(9, lambda *_: time.sleep(9))(rank)
    ranks.TIMEOUT = 1


def chooses_otherwise(rank):                           # the text is the same
    if rank == 1:
        clasp_mini.choose_skip = lambda h, f, M: choose_skip(h.flip(0), f, M)


def cannot_load(rank):
    if rank == 1:
        ranks.own_part = Mock(side_effect=llama.ModelError("a norm is broken"))


def never_comes(rank):
    ranks.TIMEOUT = 1
    if rank == 1:
        sys.exit(0)


KILLED = at_round(9, lambda *_: signal.raise_signal(signal.SIGKILL))
OUT_OF_MEMORY = at_round(9, Mock(side_effect=torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2 GiB.\nAnd more.")))
ANOTHER_FIRST, ANOTHER_LAST = (at_round(n, lambda token, p: (token + 1) % len(p)) for n in (1, 12))
GONE = "did another rank end?"
DIFFER = "the ranks decided differently"
SUMMARY = "8 tokens"         # of a text that was interrupted
ENDS = [                     # statuses, what each rank says, how many tokens rank 0 shows before
    (KILLED, ALONE, 1, -signal.SIGKILL, GONE, None, 8),
    (OUT_OF_MEMORY, ALONE, 1, 1, GONE, "CUDA out of memory (", 8),
    (ANOTHER_LAST, (*ALONE, "--max-new-tokens", 12), 1, 1, DIFFER, DIFFER, 11),
    (ANOTHER_FIRST, ALONE, 1, 1, DIFFER, DIFFER, 0),
    (interrupted, ALONE, 130, 130, SUMMARY, None, 8),
    (interrupted, (*FIXED, "--compare"), 130, 130, "rank 0: interrupted", "rank 1: int", 0),
    (hangs, ALONE, 1, 1, "no round ended within 1 seconds (on GPUs --eager may help)", "", 8),
    (chooses_otherwise, FIXED, 1, 1, DIFFER, DIFFER, 0),
    (cannot_load, ALONE, 1, 1, GONE, "is broken", 0),
    (never_comes, ALONE, 1, 0, "", None, 0)]


@pytest.mark.parametrize("before, flags, status_0, status_1, said_0, said_1, shown", ENDS)
def test_a_rank_that_ends_hangs_or_differs_ends_all_of_them_with_a_line(
        tmp_path, before, flags, status_0, status_1, said_0, said_1, shown):
    """Rejects ranks that wait without an end, for the connection, at the first exchange or in a
    round; tracebacks; status 0; a comparison of the text alone, one that is left out, in the first
    round or in the last, or made when the token is shown; and text that Ctrl-C loses."""
    results = start(2, the_command(*flags, before=before), tmp_path, 20)
    assert [status for status, *_ in results] == [status_0, status_1], results
    assert [out.count(" ") for _, out, _ in results] == [shown, 0]
    for (_, _, err), said in zip(results, (said_0, said_1)):
        if said is None:
            assert err == ""
        else:
            assert one_line(err, said) or (said == SUMMARY and said in err), err


def test_the_alarm_of_a_round_is_off_while_the_text_is_shown(monkeypatch):
    """Rejects one that is never cancelled, which would end a long run, or a reader who is slow."""
    timer = Mock()
    monkeypatch.setattr(ranks.threading, "Timer", timer)
    monkeypatch.setattr(dist, "all_reduce", lambda *_: None)
    alarm = timer.return_value
    for n, _ in enumerate(ranks.RankedJob.guarded(Mock(device="cpu"), iter([Mock()] * 3)), 1):
        assert alarm.start.call_count == alarm.cancel.call_count == n
    assert n == 3 and alarm.start.call_count == alarm.cancel.call_count == 4
