"""The measuring tools, held against runs whose counts and times are known."""
import json
import random
import runpy
import statistics
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace

import pytest

import clasp_mini
import gpu.replay
from bench import passes, picture, probe, spec_bench, sweep
from dp_layer_skip import choose_skip, torch
from llama import Config
from speculative import Settings, overlap, probabilities, read
from tests.slow_llama import random_checkpoint
from test_clasp import DEMO, ROOT, altered, tiny_llama
from command.cli import UsageError
from command.report import figures
from text.test_report import IDS, a_round, clasp_run, plain_run

QUESTIONS = (DEMO / "prompts.jsonl").read_text(encoding="utf-8").splitlines()


@pytest.fixture
def run(capsys):
    """run(tool, *arguments) -> (exit status, stdout, stderr), in this process."""
    def call(tool, *arguments):
        try:
            status = tool.main(["--device", "cpu", *map(str, arguments)])
        except SystemExit as e:                        # --help and --version end by themselves
            status = e.code
        return status, *capsys.readouterr()
    return call


# ---------------------------------------------------------------- spec_bench.py

def a_job(answers=lambda ids: (plain_run(IDS, 1.0), clasp_run(IDS, 0.2, 1.2)), json=False):
    """What the bench asks of a Job: a text's ids are its characters, and of 20 none fits."""
    def fits(ids):
        if len(ids) >= 20:
            raise UsageError("too long")
        return ids
    return SimpleNamespace(
        a=SimpleNamespace(seed=7, json=json), stops=(6,), fits=fits,
        tokenizer=SimpleNamespace(decode=lambda ids: "".join(map(str, ids))),
        encode=lambda messages: [*"|".join(m["content"] for m in messages)],
        pair=lambda ids, seed: answers("".join(ids)), report=lambda: {})


def test_a_line_of_the_table_by_hand(module=spec_bench):
    """Rejects a speed-up upside down, a mean of ratios for a ratio of rates, the token of the
    prefill counted as decoded, and an ideal of something else."""
    # 6 and 12 decoded tokens. Plain: 6 steps of 1 s, 12 of 2 s. CLaSp: 2 rounds of 3 * .2 + 1.2 s
    # and 4 of 3 * .4 + 2.4 s, with a layer optimisation of .4 s each. A draft step is 0.2 plain
    # steps in both, so the ideals are 6 / (6 * .2 + 2) and 12 / (12 * .2 + 4), the same.
    pairs = [(figures(plain), figures(clasp)) for plain, clasp in (
        (plain_run(IDS, 1.0), clasp_run(IDS, 0.2, 1.2)),
        (plain_run([*range(13)], 2.0), clasp_run([*range(13)], 0.4, 2.4)))]
    got = module.line(pairs)
    plain, clasp = 18 / (6 + 24), 18 / (4 + 14.8)
    assert got == pytest.approx(dict(answers=2, tokens_per_verify=3, acceptance=2 / 3,
                                     speedup=clasp / plain, ideal_speedup=6 / 3.2))
    # With c = 1 for the second: 12 / (12 + 4), and together 18 / (3.2 + 16).
    pairs[1] = pairs[1][0], figures(clasp_run([*range(13)], 2.0, 2.4))
    assert module.line(pairs)["ideal_speedup"] == pytest.approx(18 / 19.2)
    at_once = figures(plain_run([3], 1.0))             # all that it says is the prefill's token
    assert module.line([*pairs, (at_once, at_once)]) == module.line(pairs) | dict(answers=3)
    assert set(module.line([(at_once, at_once)]).values()) == {1, None}


@pytest.mark.parametrize("right, wrong", [
    ("over(rate[1], rate[0])", "over(rate[0], rate[1])"), (" - len(pairs) for", " for"),
    ("ideal_speedup(clasp, plain)", "ideal_speedup(plain, clasp)"),
    ("sum(w / i for w, i in ideal)", "sum(w * i for w, i in ideal)"),
    ('clasp["emitted"] - 1, i)', 'clasp["emitted"], i)'),
    ("over(decoded[1], total", "over(decoded[0], total(0, 'verifies') or total"),
    ('total(1, "accepted"), total(1, "drafted")', 'total(1, "drafted"), total(1, "accepted")'),
    ('"decode_seconds")) for', '"seconds")) for')])
def test_the_line_by_hand_rejects(right, wrong):
    """Each wrong text of the program in the place of the right one."""
    module = wrong_tool(spec_bench, right, wrong)
    with pytest.raises((AssertionError, TypeError)):
        test_a_line_of_the_table_by_hand(module)


def wrong_tool(module, right, wrong):
    here = 'Path(__file__).resolve().parent.parent'
    return altered(module, (here, repr(str(ROOT))), (right, wrong))


def test_later_turns_see_the_earlier_ones_and_the_answers_of_plain_decoding(module=spec_bench):
    """Rejects later turns without the answers or with CLaSp's, a stop token within them, a question
    that sees the one before, a warm-up that is counted or that comes again."""
    asked = []

    def answers(ids):
        asked.append(ids)
        return plain_run([1, 2, 6], 1.0), clasp_run([3, 4, 5, 6], 0.2, 1.2)
    got = list(module.answers(a_job(answers), [("a", ["x", "y", "z"]), ("b", ["u", "v"])]))
    turns = ["x", "x|12|y", "x|12|y|12|z", "u", "u|12|v"]
    assert asked == ["x", *turns] and [category for category, *_ in got] == [*"aaabb"]


@pytest.mark.parametrize("right, wrong", [
    ("ids_of(plain)", "ids_of(clasp)"), (" if i not in job.stops", ""),
    ('messages.append(dict(role="assistant", content=said))', "pass"),
    ("warm = True", "pass"), ("messages: list[dict[str, str]] = []", "messages = []; turns = turns"
                              " if n == 1 else [questions[0][1][0] + turn for turn in turns]")])
def test_the_question_of_several_turns_rejects(right, wrong):
    """Each wrong text of the program in the place of the right one."""
    with pytest.raises(AssertionError):
        test_later_turns_see_the_earlier_ones_and_the_answers_of_plain_decoding(
            wrong_tool(spec_bench, right, wrong))


def test_what_does_not_fit_is_named_and_left_out_with_the_turns_behind_it(capsys):
    """Rejects one long question that ends all, or a later turn that lacks the one before."""
    questions = [("a", ["x" * 30, "y"]), ("b", ["x", "y" * 30, "z"]), ("c", ["z"])]
    assert [category for category, *_ in spec_bench.answers(a_job(), questions)] == ["b", "c"]
    assert capsys.readouterr().err == ("question 1 left out: too long\n"
                                       "question 2 left out: too long\n")
    with pytest.raises(UsageError, match="no question fits"):
        spec_bench.bench(a_job(), questions[:1])


def test_ctrl_c_ends_with_the_table_so_far(capsys):
    """Rejects a traceback, lost measurements, an exit status of success, and an empty table."""
    asked = []

    def answers(ids):
        asked.append(ids)
        if len(asked) == 4:                            # after a warm-up and two answers
            raise KeyboardInterrupt
        return plain_run(IDS, 1.0), clasp_run(IDS, 0.2, 1.2)
    try:
        assert spec_bench.bench(a_job(answers), [("a", ["x"]), ("b", ["y", "z"])]) == 130
    except KeyboardInterrupt:
        pytest.fail("what was measured is lost")
    assert capsys.readouterr().out.splitlines() == [
        "category         answers tokens/verify acceptance speed-up  ideal",
        "a                      1          3.00       0.67     1.50   1.88",
        "b                      1          3.00       0.67     1.50   1.88",
        "overall                2          3.00       0.67     1.50   1.88"]
    asked = [0, 0, 0]
    with pytest.raises(KeyboardInterrupt):             # before the first answer: nothing to show
        spec_bench.bench(a_job(answers), [("a", ["x"])])
    assert capsys.readouterr().out == ""


def test_where_nothing_was_decoded_the_table_has_dashes(capsys):
    """Rejects a division by zero and a 0 that was not measured."""
    spec_bench.bench(a_job(lambda ids: (plain_run([3], 1.0),) * 2), [("a", ["x"])])
    assert capsys.readouterr().out.split("\n")[1].split() == ["a", "1", "-", "-", "-", "-"]


def test_progress_of_the_bench_is_for_terminals_alone(capsys, monkeypatch):
    """Rejects control characters in a log file, and an unfinished last line on a screen."""
    list(spec_bench.answers(a_job(), [("a", ["x"]), ("b", ["y"])]))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    list(spec_bench.answers(a_job(), [("a", ["x"]), ("b", ["y"])]))
    assert capsys.readouterr().err == "\r1 of 2\r2 of 2\n"


def test_the_bench_runs_on_the_demo_with_the_flags_of_the_command(run, tmp_path):
    """Rejects a category that is lost, a flag that does not arrive, another object than documented,
    and a context that is not the model's."""
    some, path = QUESTIONS[::9], tmp_path / "some.jsonl"
    path.write_text("\n".join([*some, json.dumps(dict(category="long", turns=["x " * 2000]))]))
    status, out, err = run(spec_bench, path, "--max-new-tokens", 6, "--skip-layers", 20, "--json")
    r = json.loads(out)
    assert status == 0 and err.count("\n") == 1 and f"question {len(some) + 1} left out" in err
    assert list(r) == ["settings", "categories"] and r["settings"]["M"] == 20
    names = dict.fromkeys(json.loads(line)["category"] for line in some)
    assert list(r["categories"]) == [*names, "overall"]
    assert r["categories"]["overall"]["answers"] == len(some)
    assert list(r["categories"]["overall"]) == [
        "answers", "tokens_per_verify", "acceptance", "speedup", "ideal_speedup"]


def test_a_question_may_be_token_ids_which_need_no_tokenizer(run, small, tmp_path):
    """Rejects ids that are encoded, taken for several turns, or not checked against the model, and
    a tokenizer asked for that is not there; a text among them needs one."""
    path, ids = tmp_path / "ids.jsonl", [[1, 2, 3], [4], [5] * 3]
    path.write_text("\n".join(json.dumps(dict(category=n, ids=i)) for n, i in enumerate(ids)))
    questions = spec_bench.read_questions(path)
    assert questions == [(str(n), [i]) for n, i in enumerate(ids)]
    assert spec_bench.first_turns(a_job(), [*questions, ("none", [])]) == ids
    job = a_job()
    job.pair = lambda ids, seed: (ids, seed)
    assert [ids for _, ids, _ in spec_bench.answers(job, questions)] == ids
    how = ("--model", small, "--max-new-tokens", 3, "--json", "--strategy", "clasp")
    status, out, err = run(spec_bench, path, *how)
    assert (status, err) == (0, "") and json.loads(out)["categories"]["overall"]["answers"] == 3
    path.write_text(json.dumps(dict(category="a", ids=[10 ** 6])))
    status, out, err = run(spec_bench, path, *how)
    assert status == 2 and "token 1000000 is not" in err
    for texts in (dict(category="a", turns=["x"]), dict(category="a", ids=[1])):
        path.write_text(json.dumps(texts))
        status, out, err = run(spec_bench, path, *how, *["--chat"] * ("ids" in texts))
        assert (status, out, err.count("\n")) == (1, "", 1) and "token" in err


def test_a_file_of_questions_is_json_by_lines(tmp_path):
    """Rejects lines cut at U+2028, a byte order mark taken for text, and turns taken apart."""
    path = tmp_path / "odd.jsonl"
    path.write_text('\ufeff{"category": "a", "turns": ["x\u2028y", "z"]}\r\n\n'
                    '{"category": 1, "turns": []}', encoding="utf-8")
    assert spec_bench.read_questions(path) == [("a", ["x\u2028y", "z"]), ("1", [])]
    for wrong in ('{"category": "a", "turns": "xy"}', '{"category": "a", "turns": [1]}', "{}", "[]",
                  '{"category": "a"}', "\x00", "12", '{"category": "a", "ids": []}',
                  '{"category": "a", "ids": [-1]}', '{"category": "a", "ids": [true]}'):
        path.write_text(wrong)
        with pytest.raises(UsageError, match="not a Spec-Bench file"):
            spec_bench.read_questions(path)
    for empty in ("", '{"category": "a", "turns": []}'):
        path.write_text(empty)
        with pytest.raises(UsageError, match="no questions"):
            spec_bench.read_questions(path)


P = DEMO / "prompts.jsonl"
WRONG_INPUTS = [        # tool, arguments, exit status, what is said
    (spec_bench, [], 2, "required: FILE"), (spec_bench, ["/nowhere"], 1, "/nowhere: No such file"),
    (spec_bench, [DEMO / "config.json"], 2, "not a Spec-Bench file"),
    (spec_bench, [P, "--system", "y"], 2, "--chat"),
    (spec_bench, [P, "--prompt", "x"], 2, "without"),
    (spec_bench, [P, "--strategy", "ar"], 2, "both kinds"),
    (spec_bench, [P, "--verbose"], 2, "without"), (spec_bench, [P, "--trace", "t"], 2, "without"),
    (spec_bench, [P, "--max-new-tokens", 0], 2, "--max-new-tokens"),
    (spec_bench, [P, "--model", "/nowhere"], 1, "no such folder"),
    (passes, ["--chat"], 2, "without"), (passes, ["--trace", "t"], 2, "without"),
    (passes, ["--compare"], 2, "without"), (passes, ["--prompt", "x"], 2, "without"),
    (passes, ["--skip-layers", 99], 2, "--skip-layers 99"), (passes, ["--repeats", 0], 2, "1 or"),
    (sweep, [], 2, "settings|sets|host"), (sweep, ["neither"], 2, "neither"),
    (sweep, ["sets", "--questions", "/nowhere"], 1, "/nowhere: No such file"),
    (probe, ["--layers", "33"], 2, "has 32"), (probe, ["--layers", "0"], 2, "has 32"),
    (picture, ["--prompt", ""], 2, "empty")]


@pytest.mark.parametrize("tool, arguments, status, said", WRONG_INPUTS)
def test_wrong_input_gets_one_clear_line(run, tool, arguments, status, said):
    """Rejects a traceback, a guess, and an error that does not name what is wrong."""
    got, out, err = run(tool, *arguments)
    assert (got, out, err.count("\n")) == (status, "", 1) and said in err


def test_the_tools_run_from_anywhere(tmp_path, run):
    """Rejects a script that finds the project only from the project's folder, or whose own folder
    stays on the path and hides what the standard library has by a file's name."""
    p = subprocess.run([sys.executable, ROOT / "bench" / "spec_bench.py", "--version"],
                       cwd=tmp_path, capture_output=True, text=True)
    assert (p.returncode, p.stdout, p.stderr) == (0, f"clasp-mini {clasp_mini.VERSION}\n", "")
    for tool in (spec_bench, passes, probe, sweep, picture):
        status, out, _ = run(tool, "--help")
        assert status == 0 and out.startswith("usage: python bench/") and "--skip-layers" in out
        assert 'sys.path[0] = str(Path(__file__).resolve().parent.parent)' in open(
            tool.__file__, encoding="utf-8").read()


# ---------------------------------------------------------------- passes.py

def rerun(self, f):
    """Replay.record without a GPU: what is repeated is f itself."""
    out = f()

    def replay():
        for old, new in zip(leaves(out), leaves(f())):
            old.copy_(new)
    return out, replay


def leaves(out):
    return [x for part in out for x in leaves(part)] if isinstance(out, tuple) else [out]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder with a model of 8 layers without tokenizer, and a memory that is soon copied."""
    monkeypatch.setattr(passes, "COPY", dict(cpu=2 ** 16))
    random_checkpoint(tmp_path, dict(num_hidden_layers=8, max_position_embeddings=100))
    return tmp_path


@pytest.mark.parametrize("is_recorded", [False, True])
def test_every_timed_pass_runs_the_layers_and_the_rows_that_its_name_says(small, monkeypatch,
                                                                          is_recorded):
    """Rejects a draft step of no layers or of all, a verify of one row or of one row's logits, one
    that is padded to the rows of another recording, and a layer optimisation without its candidates
    or its tokens."""
    calls, r = [], 2

    def counted(right):
        return lambda w, x, *rest: calls.append(len(x)) or right(w, x, *rest)
    a = clasp_mini.parser().parse_args(["--model", str(small), "--prompt-ids", "0", "--device",
                                        "cpu", "--draft-length", "6", "--skip-layers", "3",
                                        "--probe", str(r)])
    job = clasp_mini.Job(a).load()
    if is_recorded:
        monkeypatch.setattr(gpu.replay, "decoder_layer", counted(gpu.replay.decoder_layer))
        monkeypatch.setattr(gpu.replay.Replay, "record", rerun)
        monkeypatch.setattr(gpu.replay, "fusing", lambda device: lambda f: f)
        job.model.block = gpu.replay.decoder_layer
        job.model, job.choose = gpu.replay.recorded(job.model, job.K, job.M, r)
    else:
        job.model.block = counted(job.model.block)
    seen = {}
    with torch.inference_mode():
        for name, (_, call) in passes.passes(job).items():
            calls.clear()
            out = call()
            seen[name] = calls[:]
            if "verify" in name:                       # a verify asks for the logits of every row
                assert len(out[0]) == calls[0]
    drafts = {f"draft step, {m} of 8 skipped": [1] * (8 - m) for m in (2, 3, 4, 6)}
    verifies = {f"verify, {T} rows": [T] * 8 for T in (4, 7, 8, 16)}
    tables = {f"layer optimisation, M = 3, r = {r}":
              [4 * r] * 8 if is_recorded else [r * min(i, 4) for i in range(1, 9)]
              for r in (1, 2, 4)}
    assert seen == {"plain step": [1] * 8, "head alone": [], "copy of memory": [], **drafts,
                    **verifies, **tables}


def test_a_pass_is_held_against_the_bytes_that_it_must_read(small, run, monkeypatch):
    """Rejects bytes that are not those of the weights and the cache, a pass left out, and ratios
    that are not those of the times."""
    how = ("--model", small, "--repeats", 1, "--draft-length", 2, "--skip-layers", 3)
    status, out, err = run(passes, *how, "--json")
    assert (status, err) == (0, "")
    r = json.loads(out)
    c, t, p = Config.load(small), r["context"], r["passes"]
    layer = 4 * (c.D * 2 * c.hd * (c.H + c.G) + 3 * c.D * c.ffn + 2 * c.D + 2 * t * c.G * c.hd)
    head = 4 * c.V * c.D
    want = {"plain step": 8 * layer + head, "head alone": head, "copy of memory": 2 ** 17}
    want |= {f"layer optimisation, M = 3, r = {r}": 8 * layer for r in (1, 4)}
    want |= {f"draft step, {m} of 8 skipped": (8 - m) * layer + head for m in (2, 3, 4, 6)}
    want |= {f"verify, {T} rows": 8 * layer + head for T in (3, 4, 8, 16)}
    assert {name: v["bytes"] for name, v in p.items()} == want and t == 100
    for v in p.values():
        rate = v["bytes"] / v["seconds"]
        assert v["bytes_per_second"] == pytest.approx(rate) and v["seconds"] > 0
        assert v["of_copy"] == pytest.approx(rate / p["copy of memory"]["bytes_per_second"])
        assert v["plain_steps"] == pytest.approx(v["seconds"] / p["plain step"]["seconds"])
    monkeypatch.setattr(passes, "seconds", lambda call, device: 0.5)
    status, out, err = run(passes, "--model", small, "--repeats", 1, "--skip-layers", 0)
    assert (status, err) == (0, "") and "verify, 13 rows" in out and "optimisation" not in out
    assert out.split("\n")[0].startswith("after 100 tokens ")
    assert out.split("\n")[-2].split() == ["copy", "of", "memory", "500.000", "0.0001", "0.0",
                                           "100%", "1.00"]


def test_a_time_is_of_one_call_and_medians_are_without_the_warm_up(monkeypatch):
    """Rejects the time of many calls for that of one, a mean, and a first call that counts."""
    now, cost = [0.0], iter([9.0, 0.004, *[0.004] * 99, 5.0, 1.0, 7.0, 2.0, 3.0])

    def call():
        now[0] += next(cost)
    monkeypatch.setattr(passes.time, "perf_counter", lambda: now[0])
    device = torch.device("cpu")
    assert passes.seconds(call, device) == pytest.approx(0.004)   # one long call, then one
    assert passes.seconds(call, device) == pytest.approx(0.004)   # one, then five
    took = iter([100.0, 1.0, 5.0, 3.0, 100.0, 2.0, 8.0, 4.0])
    kinds = {"plain step": (10, None), "copy of memory": (40, None)}
    monkeypatch.setattr(passes, "passes", lambda job: kinds)
    monkeypatch.setattr(passes, "seconds", lambda call, device: next(took))
    job = SimpleNamespace(a=SimpleNamespace(repeats=3), device=device)
    got = {name: v["seconds"] for name, v in passes.measured(job).items()}
    assert got == {"plain step": 8.0, "copy of memory": 3.0}


# ---------------------------------------------------------------- sweep.py

NONE = dict(K=None, M=None, exit_threshold=None, interval=None)     # left to the policy


def test_a_sweep_varies_one_setting_at_a_time_around_the_best_so_far(capsys, monkeypatch):
    """Rejects a grid that forgets what it found, compares with a plain run that drafts, or takes
    the slowest; a comparison of the policy with another setting than the best, at another
    temperature, upside down, or on fewer prompts than there are."""
    best, tried, by_policy = dict(M=20, exit_threshold=0.2, K=8, interval=32), [], []

    def generate(model, ids, s, chance, choose):
        tried.append((ids, s))
        yield s

    def run(ids, s, seed):
        by_policy.append((ids, s, tried[-1]))
        yield s

    def line(pairs):
        if pairs[0][1].K is None:
            assert pairs[0][0].K == 8
            return dict(speedup=0.987)
        return dict(speedup=-sum(abs(getattr(s, name) - v) / v for _, s in pairs
                                 for name, v in best.items()))
    monkeypatch.setattr(sweep, "generate", generate)
    monkeypatch.setattr(sweep, "figures", lambda rounds: rounds[0])
    monkeypatch.setattr(sweep, "line", line)
    job = SimpleNamespace(cfg=SimpleNamespace(L=32), choose=None, model=None, run=run,
                          a=SimpleNamespace(seed=3), settings=Settings(**NONE))
    prompts = [[n] for n in range(7)]
    sweep.settings(job, prompts)
    out = capsys.readouterr().out
    for temperature in ("0.0", "1.0"):
        assert f"best at temperature {temperature}: M=20 K=8 exit=0.2 interval=32\n" in out
    assert out.count("the policy's rate over that one's, 7 prompts: 0.987\n") == 2
    assert [ids for ids, *_ in by_policy] == prompts * 2
    assert all(s == Settings(temperature=n // 7, **NONE) for n, (_, s, _) in enumerate(by_policy))
    assert all(last == (ids, Settings(temperature=n // 7, **best))
               for n, (ids, _, last) in enumerate(by_policy))
    swept = tried[:len(tried) // 2 - 7]                # then 7 beside the policy
    assert [ids for ids, _ in swept[::2]] == [[0], [5]] * (len(swept) // 4)
    assert all((s.K, s.M) == (0, 0) for _, s in swept[::2])
    assert {s.M for _, s in swept[1::2]} == {16, 20, 22, 24}
    # The interval comes last: 5 values on 2 prompts around what was found before.
    assert {(s.M, s.exit_threshold, s.K) for _, s in swept[-1:-20:-2]} == {(20, 0.2, 8)}


def test_what_the_command_names_stays_as_it_is_in_a_sweep():
    """Rejects a start that is not the paper's knobs, or that overrules the user's."""
    job = SimpleNamespace(cfg=SimpleNamespace(L=30), settings=Settings(**NONE))
    assert sweep.fixed(job) == Settings(K=12, M=15, exit_threshold=0.3, interval=64)
    job.settings = Settings(K=0, M=None, exit_threshold=0.0, interval=2)
    assert sweep.fixed(job, temperature=1.0) == Settings(
        temperature=1.0, K=0, M=15, exit_threshold=0.0, interval=2)


def test_sets_are_compared_on_the_same_texts_by_who_chose_them(capsys, monkeypatch):
    """Rejects a set for all that is not the one chosen most often, random sets of another size or
    of fewer than all layers, a probe that is always of one token, and an acceptance of something
    else."""
    L, M, often, seldom = 8, 3, (0, 1, 2), (5, 6, 7)
    sets, used = iter([often, seldom, often, often, seldom, often] * 4), {}

    def choose(h, run_layer, M):
        chosen = next(sets)[:M]
        return SimpleNamespace(skip=lambda j=None: tuple(i in chosen for i in range(L)))

    def generate(model, ids, s, chance, choose):
        skip = choose(None, None, s.M).skip(s.M)
        used.setdefault((s.temperature, s.M), []).append((ids, s.r, skip))
        yield a_round([], 0, [1], (0, 1.0, 0), skip=skip)
        yield a_round([1] * 10, sum(skip[:3]), [1] * (1 + sum(skip[:3])), (1, 1, 0), skip=skip)
    monkeypatch.setattr(sweep, "generate", generate)
    job = SimpleNamespace(cfg=SimpleNamespace(L=L), choose=choose, model=None, M=M,
                          a=SimpleNamespace(seed=0), settings=Settings(**NONE, r=2))
    prompts = [[n] for n in range(6)]
    sweep.sets(job, prompts)
    blocks = capsys.readouterr().out.strip().split("\n\n")
    assert list(used) == [(0.0, 3), (0.0, 4), (1.0, 3), (1.0, 4)] and len(blocks) == 4
    runs = used[0.0, 3]
    assert [ids for ids, *_ in runs] == prompts[::2] * (3 + sweep.RANDOM)
    assert [r for _, r, _ in runs[:6]] == [1] * 3 + [4] * 3
    assert all(skip == tuple(i in often for i in range(L)) for *_, skip in runs[6:9])
    drawn = [skip for *_, skip in runs[9:]]
    assert all(sum(skip) == 3 for skip in drawn) and all(map(any, zip(*drawn)))
    assert drawn[::3] == drawn[1::3] == drawn[2::3] and len(set(drawn)) > 15
    _, *by_program, one, some = blocks[0].split("\n")
    assert all(dp.endswith("0.200; 3.00") for dp in by_program) and len(by_program) == 2
    assert one.endswith("0.300; 4.00")
    kept = [sum(skip[:3]) / 10 for skip in drawn]
    assert f"{sum(kept) / len(kept):.3f} on average, {min(kept):.3f} to {max(kept):.3f}" in some


def test_all_sweeps_run_on_the_demo(run, tmp_path, monkeypatch):
    """Rejects tools that have drifted from the command."""
    monkeypatch.setattr(sweep, "GRID", dict(M=(1 / 2,), K=(2, 4)))
    monkeypatch.setattr(sweep, "RANDOM", 1)
    (tmp_path / "q").write_text(QUESTIONS[0])
    for what, said in (("settings", "1 prompts: "), ("sets", "1 random sets"),
                       ("host", "us a round: plan 0")):
        status, out, err = run(sweep, what, "--questions", tmp_path / "q", "--max-new-tokens", 3)
        assert (status, err) == (0, "") and said in out


# ---------------------------------------------------------------- probe.py

def slow_walk(model, prompt, new, budgets, s, sets):
    """probe.walk by fresh caches: at each token the text before it is read anew, then one step is
    drafted; at each 16th the program is asked as after a verify."""
    found = {}

    def after(text, ids, skip=()):
        cache = model.cache(len(text) + 1)
        read(model, text, 0, cache)
        logits, _ = model.forward(torch.tensor(ids), cache.sequence(len(text), 1), cache, skip)
        return probabilities(logits, s)
    for n, token in enumerate(new):
        text = [*prompt, *new[:n]]
        if n % 16 == 0:
            for r in (1, 4, 16, 64):
                cache = model.cache(len(text) + 300)
                _, h = read(model, text, 0, cache, r, states=True)
                rows = cache.candidates(len(text) - 1, max(budgets) + 1, h.shape[1])
                choice = choose_skip(h, lambda i, g, c=cache, rows=rows: model.layer(
                    i, g.flatten(0, 1), rows, c).view_as(g), max(budgets))
                sets = sets | {f"the dynamic program, {r} token(s)":
                               {j: [choice.skip(j)] for j in budgets}}
        for who, by in sets.items():
            for j in budgets:
                found.setdefault((who, j), []).extend(
                    overlap(after(text, [token]), after(text, [token], skip)).item()
                    for skip in by[j])
    return found


def test_the_first_tokens_of_many_drafts_are_those_of_one_at_a_time(module=probe):
    """Rejects tokens that see the draft's entries of one another, states of other tokens for the
    probe, a set chosen after what it is judged by, and one kept beyond its 16 tokens."""
    model, gen = tiny_llama(V=9, L=6, D=16, H=4, G=2, seed=5), torch.Generator().manual_seed(1)
    prompt, new = (torch.randint(9, (n,), generator=gen).tolist() for n in (19, 20))
    sets = {"some": {2: [(True, False) * 3, (False, True) * 3], 3: [(True,) * 3 + (False,) * 3]}}
    s, got = Settings(temperature=0.8), {}
    with torch.inference_mode():
        for who, j, values in module.walk(model, prompt, new, (2, 3), s, sets):
            got.setdefault((who, j), []).append(values)
        want = slow_walk(model, prompt, new, (2, 3), s, sets)
    assert set(got) == set(want) and len(want) == 10
    for name, parts in got.items():                    # of two sets one after the other, by parts
        k = 2 if name == ("some", 2) else 1
        flat = [x for part in parts for n in range(len(part) // k) for x in part[n::len(part) // k]]
        assert flat == pytest.approx(want[name], abs=1e-9), name


@pytest.mark.parametrize("right, wrong", [
    ("cache.candidates(t + n - 1, 1, n)", "cache.sequence(t, n)"),
    ("h[:, -r:], t - 1, M)", "h[:, -r:], t, M)"), ("h[:, -r:], t - 1", "h[:, :r], t - 1"),
    ("torch.cat((h, states), 1)", "h"), ("t + len(ids)", "t"), ("[choice.skip(j)]", "[()]"),
    ("c.skip(j)", "c.skip(max(budgets))"), ("split(EVERY)", "split(99)"),
    ("overlap(p, probabilities(draft(skip), s)).tolist()", "draft(skip).amax(-1).tolist()")])
def test_the_comparison_one_at_a_time_rejects(right, wrong):
    """Each wrong text of the program in the place of the right one."""
    with pytest.raises((AssertionError, RuntimeError, ZeroDivisionError)):
        test_the_first_tokens_of_many_drafts_are_those_of_one_at_a_time(
            wrong_tool(probe, right, wrong))


def test_the_one_set_leaves_out_what_costs_least_one_layer_after_the_other():
    """Rejects a set of the worst layers, or of the best by themselves (at seed 0 another set): each
    is the best beside those left out before. Layers that do nothing come first."""
    model, s = tiny_llama(V=9, L=6, D=16, H=4, G=2, seed=0), Settings(temperature=1.0)
    texts = [([1, 2, 3], [4, 5, 6, 7]), ([8, 0], [3, 3, 1])]
    order = probe.one_set(model, texts, 3, s)

    def score(out):
        values = 0.0
        for prompt, new in texts:
            sets = {"x": {1: [probe.flags(6, out)]}}
            values += statistics.mean(slow_walk(model, prompt, new, (1,), s, sets)["x", 1])
        return values
    for n in range(3):
        left = [i for i in range(6) if i not in order[:n]]
        assert max(left, key=lambda i: score([*order[:n], i])) == order[n]
    assert set(order) != set(sorted(range(6), key=lambda i: score([i]))[-3:])
    for i in (1, 3):
        model.layers[i].out.zero_(), model.layers[i].down.zero_()
    assert set(probe.one_set(model, texts, 3, s)[:2]) == {1, 3}


def test_every_third_prompt_is_for_the_one_set_alone(monkeypatch):
    """Rejects a set judged on the texts that it was made from, columns that change places, and
    values that are lost."""
    made, judged = [], []

    def one_set(model, texts, M, s):
        made.append((texts, M, s.temperature))
        return [3, 1]

    def walk(model, prompt, new, budgets, s, sets):
        judged.append((prompt, new, s.temperature))
        assert sets["one set"] == {1: [probe.flags(4, [3])], 2: [probe.flags(4, [1, 3])]}
        drawn = sets[f"{probe.RANDOM} random sets"]
        assert all({sum(skip) for skip in drawn[j]} == {j} for j in (1, 2))
        assert len(drawn[2]) == probe.RANDOM and len(set(drawn[2])) > 3
        yield "x", 2, [s.temperature + prompt[0]] * prompt[0]
    monkeypatch.setattr(probe, "one_set", one_set)
    monkeypatch.setattr(probe, "walk", walk)
    job = SimpleNamespace(cfg=SimpleNamespace(L=4), model=None, a=SimpleNamespace(seed=0),
                          settings=Settings(), run=lambda ids, s, seed: plain_run(
                              [ids[0], int(s.temperature)], 1.0))
    found = probe.measured(job, [[1], [2], [3], [4], [5], [6]], (1, 2))
    assert made == [([([3], [3, 1]), ([6], [6, 1])], 2, 1.0)]
    assert judged == [([n], [n, t], t) for t in (0, 1) for n in (1, 2, 4, 5)]
    greedy = [1, 2, 2, 4, 4, 4, 4, 5, 5, 5, 5, 5]
    assert found == {"x": {2: (greedy, [1 + x for x in greedy])}}


def test_the_probe_runs_on_the_demo(run, tmp_path, monkeypatch):
    """Rejects a tool that has drifted from the command, a table of another shape, and an only
    question, which cannot be kept back and measured."""
    monkeypatch.setattr(probe, "RANDOM", 1)
    (tmp_path / "q").write_text("\n".join(QUESTIONS[:3]))
    status, out, err = run(probe, "--questions", tmp_path / "q", "--max-new-tokens", 5,
                           "--layers", "1,2")
    assert status == 0 and err.count("\n") == 1 and err.count(",") == 2
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["left", "out", "of", "32", "1", "2"] and len(lines) == 8
    assert all(0 <= float(x) <= 1 for line in lines[1:-1] for at in line[-2:]
               for x in at.split("/"))
    assert lines[-1][2] == lines[-1][7] == "10"        # 5 of each of two prompts
    (tmp_path / "q").write_text("\n".join(QUESTIONS[:2]))
    assert run(probe, "--questions", tmp_path / "q")[0] == 2


# ---------------------------------------------------------------- picture, versus_transformers

def test_a_picture_has_a_line_per_round_and_a_cell_per_layer():
    """Rejects layers that run drawn as skipped, a token under another's colour, the prefill drawn
    as a round, and text that is no XML."""
    skips = random.Random(0)
    rounds = [a_round([], 0, [9], (0, 1.0, 0), skip=(False,) * 5)] + [
        a_round([10, 11, 12], 2, [10, 11, 13], (0, 1.0, 0),
                skip=tuple(skips.random() < 0.5 for _ in range(5))) for _ in range(3)]
    svg = ElementTree.fromstring(picture.draw(rounds, lambda ids: f"<{ids}&", "a < b"))
    cells = [c for c in svg.iter() if c.tag.endswith("rect")][1:]
    lines = [[(s.get("fill"), s.text) for s in text] for text in svg if text.tag.endswith("text")]
    colour = [picture.COLOUR["skip" if s else "run"] for r in rounds[1:] for s in r.skip]
    assert [c.get("fill") for c in cells] == colour and lines[0][0][1] == "a < b"
    assert [x[0][1] for x in lines[4::3]] == ["1", "2", "3"]
    assert [x[0][1] for x in lines[5::3]] == ["2/3"] * 3
    want = [(picture.COLOUR[kind], f"<{ids}&") for kind, ids in (
        ("kept", [10, 11]), ("rejected", [12]), ("own", [13]))]
    assert lines[6::3] == [want] * 3
    many = picture.draw(rounds + rounds[1:] * 10, str, "")
    assert many.count("2/3") == picture.MOST


def test_a_picture_of_the_demo_says_how_it_was_made(run):
    """Rejects a tool that has drifted from the command, and a title of another run."""
    status, out, err = run(picture, "--prompt", "def f(x):", "--max-new-tokens", 6)
    svg = ElementTree.fromstring(out)
    assert (status, err) == (0, "") and svg.find(".//{*}tspan").text == (
        "python clasp_mini.py --verbose --device cpu --prompt 'def f(x):' --max-new-tokens 6")


def test_the_comparison_with_another_library_says_what_it_needs(monkeypatch):
    """Rejects a traceback where that library is not installed, as here."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit, match="hf/bin/pip install torch"):
        runpy.run_path(str(ROOT / "bench" / "versus_transformers.py"), run_name="__main__")
