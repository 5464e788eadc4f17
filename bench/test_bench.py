"""The measuring tools, held against runs whose counts and times are known."""
import json
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace

import pytest

import clasp_mini
from bench import choosers, passes, picture, spec_bench
from command.cli import UsageError
from command.flags import parser
from command.job import Job
from command.report import ids_of
from command.test_report import IDS, a_round, clasp_run, plain_run
from dp_layer_skip import choose_skip, torch
from policy.probe import choose_by
from speculative import Chance, Settings
from tests.helpers import DEMO, ROOT, full_model, having_read, tiny_llama
from tests.slow_llama import random_checkpoint

PROMPTS = DEMO / "prompts.jsonl"
QUESTIONS = PROMPTS.read_text(encoding="utf-8").splitlines()


@pytest.fixture
def run(capsys):
    """run(tool, *arguments) -> (exit status, stdout, stderr), in this process."""
    def call(tool, *arguments):
        return tool.main(["--device", "cpu", *map(str, arguments)]), *capsys.readouterr()
    return call


@pytest.fixture
def small(tmp_path):
    """A folder with a model of 8 layers, without tokenizer."""
    random_checkpoint(tmp_path, dict(num_hidden_layers=8, max_position_embeddings=200))
    return tmp_path


def job_of(*arguments):
    return Job(parser().parse_args(["--device", "cpu", *map(str, arguments)]))


# ----------------------------------------------------------------------------- spec_bench.py

def fits(ids):
    if len(ids) >= 20:
        raise UsageError("too long")
    return ids


# What the bench asks of a Job: a text's ids are its characters, and of 20 none fits.
JOB = SimpleNamespace(
    flags=SimpleNamespace(seed=7, json=False), stops=(6,), fits=fits, K=3, costs_guessed=False,
    cfg=SimpleNamespace(L=2), costs=dict(draft=[1, 0.5, 0.2], verify=[9, 9, 9, 9, 1], optimise=0.4),
    tokenizer=SimpleNamespace(decode=lambda ids: "".join(map(str, ids))),
    encode=lambda messages: [*"|".join(m["content"] for m in messages)])


@pytest.fixture
def asked(monkeypatch):
    """The (prompt, seed) of every pair that is run. The seventh is interrupted."""
    asked = []

    def pair(job, ids, seed, run):
        asked.append(("".join(ids), seed))
        if len(asked) == 7:
            raise KeyboardInterrupt
        if ids == ["X"]:
            return plain_run([3, 4], 1.0), plain_run([3], 1.0)
        if ids in (["B"], ["D"]):
            return plain_run([*range(13)], 2.0), clasp_run([*range(13)], 2.0, 2.4)
        return plain_run(IDS, 1.0), clasp_run(IDS[::-1], 0.2, 1.2)
    monkeypatch.setattr(spec_bench, "pair", pair)
    return asked


def test_later_turns_see_the_earlier_ones_and_the_answers_of_plain_decoding(asked, capsys):
    """Rejects later turns without the answers or with CLaSp's, a stop token within them, a question
    that sees the one before, a warm-up that is counted or comes again, another seed than the
    user's; a long question that ends all, later turns without the one before."""
    file = [("a", ["x", "y", "z" * 20]), ("b", ["z" * 30, "y"]), ("c", ["u", "v"])]
    got = spec_bench.answers(JOB, file)
    assert "".join(category for category, *_ in got) == "aacc"
    assert asked == [(turn, 7) for turn in ("x", "x", "x|012345|y", "u", "u|012345|v")]
    assert [line.partition(": ")[2] for line in capsys.readouterr().err.splitlines()] == [
        "question 1 left out: too long", "question 2 left out: too long"]
    with pytest.raises(UsageError, match="no question fits"):
        spec_bench.bench(JOB, file[1:2])
    assert spec_bench.first_turns(JOB, [("a", [[5]]), ("b", []), ("c", ["xy", "z"])]) == [
        ("a", [5]), ("c", ["x", "y"])]


def test_a_table_by_hand_and_ctrl_c_ends_with_what_there_is_of_it(asked, capsys):
    """Rejects a speed-up upside down, a mean of ratios for a ratio of rates, the token of the
    prefill counted as decoded, an ideal of something else, other costs, a number where there is
    none; a traceback, lost measurements, an exit status of success, an empty table."""
    # Decoded are 6 and 12 tokens. Plain: 6 steps of 1 s, 12 of 2 s. CLaSp: 2 rounds of 3 * .2 +
    # 1.2 s and 4 of 3 * 2 + 2.4 s, and a choice of layers of .4 s. The ideals are 6 / (6 * .2 + 2)
    # and 12 / (12 * 1 + 4), all four 36 / 38.4. Counted: 6 for 2 (3 * .5 + 1) + .4 plain steps and
    # 12 for 4 (3 * .5 + 1) + .4. Of the last, plain decoding wrote a token more, and CLaSp none.
    assert spec_bench.bench(JOB, [(name, [name]) for name in "aBcDXfg"]) == 130
    assert capsys.readouterr().out.splitlines() == [
        "category           answers tokens/verify acceptance speed-up  ideal counted",
        "a                        1          3.00       0.67     1.50   1.88    1.11",
        "B                        1          3.00       0.67     0.71   0.75    1.15",
        "c                        1          3.00       0.67     1.50   1.88    1.11",
        "D                        1          3.00       0.67     0.71   0.75    1.15",
        "X                        1             -          -        -      -       -",
        "overall                  5          3.00       0.67     0.78   0.94    1.14"]
    asked[:] = "123456"
    with pytest.raises(KeyboardInterrupt):             # before the first answer: nothing to show
        spec_bench.bench(JOB, [("a", ["x"])])


def test_the_tools_run_on_the_demo_with_the_flags_of_the_command(run, tmp_path, monkeypatch):
    """Rejects a category or a chooser that is lost, a flag that does not arrive, and the demo's own
    temperature for other prompts than its own."""
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(QUESTIONS[::20]))
    status, out, err = run(spec_bench, path, "--max-new-tokens", 6, "--skip-layers", 20, "--json")
    r = json.loads(out)
    assert (status, err) == (0, "") and r["settings"]["M"] == 20
    assert r["settings"]["temperature"] == r["settings"]["seed"] == 0
    assert list(r["categories"]) == ["functions", "scripts", "guides in prose", "overall"]
    assert r["categories"]["overall"]["answers"] == 3
    monkeypatch.setattr(choosers, "RANDOM", 1)
    monkeypatch.setattr(choosers, "PROBES", (1, 4))
    status, out, _ = run(choosers, path, "--max-new-tokens", 3, "--skip-layers", 1)
    assert status == 0 and out.count("\n") == 6


def test_choosers_judge_other_texts_than_the_one_set_is_made_from(run, tmp_path, monkeypatch):
    """Rejects a set for all made from texts that it is judged on, kinds of text and temperatures
    that change places, and means of another column."""
    apart, judged = [], []

    def walk(model, ids, start, M, s, sets):
        judged.append(ids)
        return [("x", [len(judged), 0.5])]
    monkeypatch.setattr(choosers, "one_set", lambda job, texts, s: apart.extend(texts) or [3])
    monkeypatch.setattr(choosers, "walk", walk)
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(QUESTIONS[n] for n in (40, 20, 0)))
    status, out, _ = run(choosers, path, "--max-new-tokens", 3, "--skip-layers", 1)
    assert status == 0 and [line.split() for line in out.splitlines()[1:]] == [
        "first drafted token kept prose code".split(),
        "x 0.750 / 1.250 1.750 / 2.250".split()]
    (ids, n), = apart
    assert ids[:n] not in [other[:n] for other in judged]


@pytest.mark.parametrize("line, more, status, said", [
    (dict(ids=[1, 2, 3]), [], 0, ""), (dict(ids=[10 ** 6]), [], 2, "token 1000000 is not"),
    (dict(ids=[1]), ["--chat"], 1, "token"), (dict(turns=["x"]), [], 1, "token")])
def test_a_question_may_be_token_ids_which_need_no_tokenizer(run, small, line, more, status, said):
    """Rejects ids that are encoded, taken for several turns, or not checked against the model, and
    a tokenizer asked for that is not there; a text among them needs one."""
    (small / "q").write_text(json.dumps(dict(line, category="a")))
    got, out, err = run(spec_bench, small / "q", "--model", small, "--max-new-tokens", 3, *more)
    assert got == status == err.count("\n") and said in err                # so many lines, too
    assert out.count("\n") == 3 * (status == 0) and (status or out.endswith("-\n"))


def test_a_file_of_questions_is_json_by_lines(tmp_path):
    """Rejects lines cut at U+2028, a byte order mark as text, turns taken apart, ids unread."""
    path = tmp_path / "odd.jsonl"
    path.write_text('\ufeff{"category": "a", "turns": ["x\u2028y", "z"]}\r\n\n'
                    '{"category": 1, "turns": []}', encoding="utf-8")
    assert spec_bench.read_questions(path) == [("a", ["x\u2028y", "z"]), ("1", [])]
    ours = spec_bench.read_questions(ROOT / "bench" / "smollm2.jsonl")
    assert [spec_bench.is_ids(ids) for _, (ids,) in ours] == [True] * 18
    for wrong in ('{"category": "a", "turns": "xy"}', '{"category": "a", "turns": [1]}', "{}", "[]",
                  '{"category": "a"}', "\x00", "12", '{"category": "a", "ids": []}',
                  '{"category": "a", "ids": [-1]}', '{"category": "a", "ids": [true]}'):
        path.write_text(wrong)
        with pytest.raises(UsageError, match="not a Spec-Bench file"):
            spec_bench.read_questions(path)
    path.write_text('{"category": "a", "turns": []}')
    with pytest.raises(UsageError, match="no questions"):
        spec_bench.read_questions(path)


@pytest.mark.parametrize("tool, arguments, status, said", [
    (spec_bench, ["/nowhere"], 1, "/nowhere: No such file"),
    (spec_bench, ["--system", "y"], 2, "--chat"), (choosers, ["--prompt", "x"], 2, "without"),
    (spec_bench, ["--repeats", 3], 2, "--repeats goes with --compare"),
    (spec_bench, ["--strategy", "ar"], 2, "both kinds"), (passes, ["--compare"], 2, "without"),
    (passes, ["--skip-layers", 99], 2, "has 32"), (choosers, ["--skip-layers", 0], 2, "a layer"),
    (picture, ["--prompt", ""], 2, "empty"), (picture, ["--compare"], 2, "of one run")])
def test_wrong_input_gets_one_clear_line(run, tool, arguments, status, said):
    """Rejects a traceback, a guess, and an error that does not name what is wrong."""
    got, out, err = run(tool, *arguments)
    assert (got, out, err.count("\n")) == (status, "", 1) and said in err


def test_the_tools_are_scripts_that_run_from_anywhere(tmp_path):
    """Rejects a script that finds the project only from its folder, that ends as if all were well,
    or whose own folder stays on the path, where a name can hide the standard library's."""
    p = subprocess.run([sys.executable, ROOT / "bench" / "passes.py", "--repeats", "no"],
                       cwd=tmp_path, capture_output=True, text=True)
    assert (p.returncode, p.stdout, p.stderr.count("\n")) == (2, "", 1) and "--repeats" in p.stderr


# ---------------------------------------------------------------- passes.py, and what they come to

@pytest.mark.parametrize("r", [1, 2])
def test_every_timed_pass_runs_the_layers_and_the_rows_that_its_name_says(small, r):
    """Rejects a draft step of no layers or of all, a verify of one row or of one row's logits, a
    choice without its candidates, one position early, or without the heads that the policy asks."""
    calls = []
    job = job_of("--model", small, "--prompt-ids", 0, "--draft-length", 4, "--skip-layers", 3,
                 "--probe", r).load()
    block, head = job.model.block, job.model.head
    job.model.block = lambda w, x, rows, *rest: calls.append((len(x), rows.slots[0].item())
                                                             ) or block(w, x, rows, *rest)
    job.model.head = lambda x: calls.append(len(x)) or head(x)
    seen = {}
    with torch.inference_mode():
        for key, call in passes.passes(job).items():
            calls.clear()
            call()
            seen[key] = calls[:]
    t = passes.CONTEXT
    want = {("draft", j): [*[(1, t)] * (8 - j), 1] for j in (1, 2, 5, 8)}
    want |= {("verify", n): [*[(n, t)] * 8, n] for n in (1, 2, 4, 5)}
    again = [(r, t - r)] * 8 * (r > 1)
    want["choice", r] = [*again, *((r * min(i, 4), t) for i in range(1, 9)), r + 4 * r]
    assert seen == want


def test_the_medians_of_passes_become_tables_that_the_command_takes(run, small, monkeypatch):
    """Rejects a warm-up that counts, a mean, costs in draft steps, noise that makes a draft dearer
    or a verify cheaper than a plain step, another object than --costs takes."""
    now = [0.0]

    def taking(*seconds):
        left = [*seconds]

        def call():
            now[0] += left.pop(0)
            return torch.zeros(1, 1)
        return call
    how = ("--model", small, "--draft-length", 3)
    with monkeypatch.context() as m:
        m.setattr(time, "perf_counter", lambda: now[0])
        m.setattr(passes, "passes", lambda job: {
            ("draft", 4): taking(9, 1, 1, 7), ("draft", 8): taking(9, 3, 3, 3),
            ("verify", 1): taking(90, 2, 9, 1), ("verify", 2): taking(9, 1, 1, 1),
            ("verify", 3): taking(0, 3, 3, 3), ("choice", 1): taking(9, 5, 5, 5)})
        status, out, _ = run(passes, *how, "--repeats", 3, "--json")
    (small / "c").write_text(out)
    assert status == 0 and job_of(*how, "--prompt-ids", 0, "--costs", small / "c").costs == dict(
        draft=[1.0, .875, .75, .625, .5, .625, .75, .875, 1.0],
        verify=[1.0, 1.0, 1.0, 1.5, 2.0], optimise=2.5)
    status, out, err = run(passes, *how, "--repeats", 1)
    assert (status, err, out.count("\n")) == (0, "", 9) and out.startswith("after 128 tokens ")


def test_a_risk_is_the_part_of_the_judged_tokens_that_was_rejected(monkeypatch):
    """Rejects tokens counted that were never judged, a budget under another's name, greedy runs."""
    def generate(model, ids, s, chance, choose, policy):
        assert s.temperature == 1 and policy.s.M == s.M
        return [a_round([5] * 4, 4, [5] * 5), a_round([5] * 9, s.M - 1, [5] * s.M)]
    monkeypatch.setattr(passes, "generate", generate)
    job = SimpleNamespace(cfg=SimpleNamespace(L=8), model=None, choose=None, probe=1,
                          plain=Settings())
    found = passes.risks(job, [[1], [2]])              # of M + 4 judged tokens one
    assert found == [0.005, *(round(1 / (4 + M), 3) for M in (1, 2, 3, 4, 5, 6)), *found[7:]]


def test_the_demo_decodes_faster_than_plainly():
    """Rejects a policy that never drafts or that drafts what does not pay: counted by the demo's
    own costs, on its own prompt."""
    job = job_of().load()
    rounds = list(clasp_mini.run(job, job.prompt(), Chance(job.flags.seed)))
    decoded = len(ids_of(rounds)) - 1
    assert decoded / spec_bench.plain_steps(rounds, job.costs) > 1.3


# ---------------------------------------------------------------- choosers.py, picture.py

def test_a_set_is_judged_on_the_tokens_behind_those_that_chose_it(monkeypatch):
    """Rejects tokens that see the entries of one another or their own twice, a trial that harms
    what the full model wrote; a set that is kept beyond its piece or chosen after what it is judged
    by, a token left out or counted twice."""
    monkeypatch.setattr(choosers, "EVERY", 4)
    monkeypatch.setattr(choosers, "PROBES", (1, 3))
    model = tiny_llama(V=9, L=6, D=16, H=4, seed=5)
    ids = torch.randint(9, (12,), generator=torch.Generator().manual_seed(1)).tolist()
    own = (False, True, False, True, True, False)
    want = []
    with torch.inference_mode():
        for at in (3, 7, 11):
            h, cache = having_read(model, ids[:at], 30)
            sets = {f"the dynamic program, by {r}": choose_by(
                r, choose_skip, model, cache, ids[:at], h, 4)[0].skip() for r in (1, 3)}
            for who, skip in (sets | dict(x=own)).items():
                values = []
                for t in range(at, min(at + 4, 12)):   # a draft of one token after t of the text
                    _, cache = having_read(model, ids[:t], 1)
                    h = model.forward(torch.tensor(ids[t:t + 1]), cache.sequence(t, 1), cache, skip)
                    q = model.head(h[-1])[0].softmax(-1)
                    p = full_model(model, ids[:t + 1]).softmax(-1)
                    values.append(torch.minimum(p, q).sum().item())
                want.append((who, pytest.approx(values)))
        s = Settings(temperature=1.0)
        assert list(choosers.walk(model, ids, 3, 4, s, dict(x=[own]))) == want


def test_the_one_set_leaves_out_what_costs_least_one_layer_after_the_other(monkeypatch):
    """Rejects a set of the worst layers, the best by themselves, the best of some texts alone; and
    choices of the dynamic program, which it does not need."""
    worth = {(2,): 5, (0,): 4, (1,): 3, (1, 2): 6, (0, 2): 2, (2, 3): 3, (0, 1): 9, (0, 1, 2): 1,
             (1, 2, 3): 2}

    def kept(model, piece, skip, s):
        out = tuple(i for i, left_out in enumerate(skip) if left_out)
        return [worth.get(out, 0), piece.ids[0].item() * (out == (3,))]
    monkeypatch.setattr(choosers, "kept", kept)
    monkeypatch.setattr(choosers, "choose_by", None)
    job = SimpleNamespace(cfg=SimpleNamespace(L=4), model=tiny_llama(V=10, L=4), M=3)
    with torch.inference_mode():
        assert choosers.one_set(job, [([1, 9], 1), ([2, 0], 1)], Settings()) == [2, 1, 3]


def test_a_picture_is_the_run_that_its_title_names(run):
    """Rejects layers that run drawn as skipped, a token under another's colour, the prefill drawn
    as a round, text that is no XML, a tool that has drifted from the command."""
    how = ("--prompt", "def f(x):", "--max-new-tokens", 20)
    svg = ElementTree.fromstring(run(picture, *how)[1])
    assert svg.find(".//{*}tspan").text == (
        "python clasp_mini.py --device cpu --prompt 'def f(x):' --max-new-tokens 20")
    job = job_of(*how).load()
    _, *rounds = clasp_mini.run(job, job.prompt(), Chance(job.flags.seed))
    fills = [cell.get("fill") for cell in svg.iter() if cell.tag.endswith("rect")][1:]
    assert [fill == "#e6e9ec" for fill in fills] == [out for r in rounds for out in r.skip]
    lines = [[(s.get("fill"), s.text) for s in text] for text in svg if text.tag.endswith("text")]
    assert [x[0][1] for x in lines[5::3]] == [f"{r.accepted}/{len(r.drafted)}" for r in rounds]
    shown = "".join(text for x in lines[6::3] for fill, text in x if fill != "#cf222e")
    assert shown.replace("⏎", "\n").replace("\u00a0", " ") == job.tokenizer.decode(ids_of(rounds))
    many = picture.draw([a_round([], 0, [1])] + [a_round([1, 2], 1, [1, 3])] * 50, str, "a < b")
    assert many.count("1/2") == picture.MOST and 'line-through">[2]<' in many
    assert ElementTree.fromstring(many).find(".//{*}tspan").text == "a < b"
