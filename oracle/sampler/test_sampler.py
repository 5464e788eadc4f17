"""The kit's promises: the laws are right, right samplers pass, each wrong one is found and named,
in any language; conformance.py's levels pass our own program and reject wrong ones.
"""
import json
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from oracle import conformance, ours
from oracle.sampler import check
from oracle.sampler.exact import Refused, distance, exact, short
from oracle.sampler.law import CASES, RIGHT, Dice, law, play, target
from oracle.sampler.wrong import WRONG
from tests.wrong_programs import NAMED, running

torch.set_num_threads(1)
HERE = Path(__file__).resolve().parent
JS = HERE / "sampler.js"
UNIFORMS = json.loads((HERE / "uniforms.json").read_text())
node = pytest.mark.skipif(not shutil.which("node"), reason="no node: the program in JavaScript")


def answered(sampler):
    """What a program that is this sampler answers to check.py's requests."""
    requests = check.requests(CASES)
    chance = random.Random(1)
    answers = []
    for request in requests:
        texts, _ = law(sampler, request)
        n = request["texts"] // len(request["prompts"])
        drawn = Counter(chance.choices(list(texts), list(texts.values()), k=n))
        answers.append(dict(counts={" ".join(map(str, text)): k for text, k in drawn.items()}))
    return requests, answers


@pytest.mark.parametrize("name", CASES)
def test_right_samplers_emit_the_product_of_p_and_the_fewest_rounds_take_the_block_rule(name):
    """Rejects a block rule with the token rule's residual, a bonus from elsewhere, filters of p
    alone; and a block rule that accepts fewer than the token rule."""
    case = CASES[name]
    rounds = {}
    for rule, sampler in RIGHT.items():
        texts, rounds[rule] = law(sampler, case)
        assert distance(texts, target(case)) < 1e-12, rule
    assert min(rounds, key=rounds.get) == "block rule" or (
        rounds["block rule"] == pytest.approx(rounds["token rule"]))


@pytest.mark.parametrize("fault", WRONG)
def test_a_thousand_texts_of_each_case_find_each_fault_and_name_it(fault):
    """Rejects tables that are blind to a fault, and a bet that does not tell it from the others.
    `missed` is a bound, not an experiment; of this seed it is known that the rest holds."""
    assert check.missed(fault, list(CASES)) <= check.MISSED
    _, said = check.judge(*answered(WRONG[fault]))
    assert said.startswith(fault), said


@pytest.mark.parametrize("rule", RIGHT)
def test_a_right_sampler_passes_however_slow(rule):
    """Rejects an alarm of the rounds, and a test at p > .05."""
    lines, said = check.judge(*answered(RIGHT[rule]))
    assert not said and not any(wrong for _, wrong, _ in lines), said


def test_a_fault_that_has_no_name_is_found_and_gets_none():
    """Two rows of a batch that share their numbers are right one by one. Rejects counting rows
    alone, and naming the nearest fault whatever the texts are."""
    request = check.requests(["batch"])[0]
    texts = []
    for seed in range(500):
        for prompt in request["prompts"]:
            one = dict(request, prompts=[prompt])
            texts += play(RIGHT["token rule"], one, Dice(random.Random(seed).random))
    lines, said = check.judge([request], [dict(texts=texts)])
    assert lines[0][1] and "without a name" in said


def test_the_same_text_again_and_again_is_told_as_a_seed():
    """Rejects a fault's name alone, which leads astray: the rule may be right."""
    request = check.requests(["plain"])[0]
    lines, _ = check.judge([request], [dict(texts=[[0, 0, 0, 0]] * 1000)])
    assert lines[0][1] and "seeded anew" in lines[0][2]


def test_answers_that_were_made_elsewhere_are_judged_too(tmp_path, capsys):
    """Rejects requests that are not those of --program, and a wrong sampler that cannot be run."""
    assert check.main(["--requests"]) == 0
    asked = capsys.readouterr().out
    told = subprocess.run([sys.executable, HERE / "law.py", "residual = p"], input=asked, text=True,
                          capture_output=True, check=True)
    file = tmp_path / "answers.jsonl"
    file.write_text(told.stdout)
    assert check.main(["--answers", str(file)]) == 1
    assert "wrong: residual = p (" in capsys.readouterr().out


@pytest.mark.parametrize("answer, said", [
    ("import sys; sys.exit(3)", "exit status 3"), ("print('[]')", "1 lines, 10 wanted"),
    ("print('x\\n' * 10)", "no JSON object"), ("print('{}\\n' * 10)", "no \"texts\""),
    ("print('{\"texts\": [0]}\\n' * 10)", "no \"texts\""),
    ("print('{\"texts\": [[0, 0, 0, 0]]}\\n' * 10)", "just 1000 texts")])
def test_a_program_that_answers_something_else_is_one_line(answer, said, capsys):
    """Rejects a traceback; and ten texts that nothing can be said of."""
    assert check.main(["--program", f'{sys.executable} -c "{answer}"'.replace('"t', '\\"t').replace(
        's":', 's\\":')]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


@node
@pytest.mark.parametrize("right, wrong, fault", [
    ("", "", ""),
    ("Math.min(1, now[d[s]] / was[d[s]])", "Math.min(1, 1.3 * now[d[s]] / was[d[s]])",
     "accept leniently, 1.3 p/q"),
    ("draw(p[last], uniform)];", "draw(q[last], uniform)];", "bonus from q"),
    ("if (end >= 0)", "if (end > 9)", "a stop token inside is not seen")])
def test_a_program_in_javascript_passes_and_its_faults_are_named(right, wrong, fault, tmp_path,
                                                                  capsys):
    """The protocol needs nothing of ours."""
    program = tmp_path / "sampler.js"
    assert right in JS.read_text()
    program.write_text(JS.read_text().replace(right, wrong))
    assert check.main(["--program", f"node {program}"]) == bool(fault)
    assert f"wrong: {fault}" in capsys.readouterr().out if fault else True


# ------------------------------------------------------------------------------------- exact.py

@pytest.mark.parametrize("name", [name for name in CASES if name != "batch"])
def test_our_own_draft_and_judge_have_the_right_law(name):
    """Their own code, down every branch of chance. Rejects the sampler's wrong programs."""
    case = dict(short(name), N=2)
    assert distance(exact(ours.run, case), target(case)) < 1e-12


@pytest.mark.parametrize("wrong, fault, name", [
    ("residual = p", "residual = p", "plain"),
    ("lenient acceptance", "accept leniently, 1.3 p/q", "plain"),
    ("argmax draft scored with a softmax q", "argmax drafts, q softmax", "plain"),
    ("q at temperature 1", "q at temperature 1, unfiltered", "top-p")])
def test_our_own_code_gone_wrong_has_exactly_the_law_of_that_fault(wrong, fault, name):
    """Holds wrong.py and exact.py against code that was written for another purpose."""
    case = dict(short(name), N=2)
    with running(wrong):
        mine = exact(ours.run, case)
    assert distance(mine, law(WRONG[fault], case)[0]) < 1e-9 < distance(mine, target(case))


def engine(draw):
    """A sampler as engines write it: one tensor of uniforms, tokens by `draw` of probabilities."""
    def run(case):
        p = torch.tensor(case["p"], dtype=torch.float64)
        q = torch.tensor(case["q"], dtype=torch.float64)
        text = case["prompts"]
        while len(text) <= case["N"]:
            d = []
            while len(d) < case["N"] - len(text):
                d.append(int(draw(q[[*text, *d][-1]])))
            read = [text[-1], *d]
            r = torch.rand(len(d) + 1)
            a = [p[c, x] / q[c, x] for c, x in zip(read, d)]
            s = next((s for s in range(len(d)) if r[s] >= a[s]), len(d))
            owed = (p[read[s]] - q[read[s]]).clamp(min=0) if s < len(d) else p[read[s]]
            text = [*text, *d[:s], int(draw(owed))]
        return text[1:]
    return run


@pytest.mark.parametrize("draw", [
    lambda p: torch.multinomial(p, 1), lambda p: (p / torch.empty_like(p).exponential_()).argmax(),
    lambda p: torch.empty_like(p).exponential_().div_(p).argmin(),
    lambda p: (p.cumsum(0) > torch.rand(()) * p.sum()).int().argmax()])
def test_draws_of_every_kind_are_followed(draw):
    """Rejects a comparison that forgets what the number was compared with before."""
    assert distance(exact(engine(draw), short("limit")), target(short("limit"))) < 1e-12


def test_what_cannot_be_followed_is_refused():
    """Rejects noise that races twice, and a number that is used as if it were known."""
    noise = []

    def same(p):
        noise[1:] = noise[1:] or [torch.empty_like(p).exponential_()]
        return (p / noise[-1]).argmax()
    noise.append(None)
    with pytest.raises(Refused, match="race twice"):
        exact(engine(same), short("limit"))
    with pytest.raises(Refused, match="cannot be followed"):
        exact(lambda case: [int(torch.rand(3).cumsum(0)[0])], short("limit"))


# -------------------------------------------------------------------------------- conformance.py

@pytest.fixture
def level(monkeypatch):
    """level(n) of the program ours.py, in this process, so that it can be made wrong."""
    does = (ours.texts, ours.texts, ours.choose, ours.dump, ours.trace, ours.trace)
    monkeypatch.setattr(conformance, "ask", lambda program, requests: [
        does[request["level"]](json.loads(json.dumps(request))) for request in requests])
    return lambda n, *flags: conformance.main(["--level", str(n), "--program", "ours", *flags])


@pytest.mark.parametrize("n", [0, 3, 4, 5])
def test_our_own_program_reaches_every_level(n, level, capsys):
    assert level(n) == 0, capsys.readouterr().out
    assert " 0 wrong, 0 skipped" in capsys.readouterr().out


def test_it_does_so_as_a_program_too(tmp_path):
    """Rejects a script that starts in its own folder alone, and an exit status that is always 0."""
    for program, status in ((f"{sys.executable} {HERE.parent / 'ours.py'}", 0), ("echo x", 2)):
        done = subprocess.run([sys.executable, HERE.parent / "conformance.py", "--level", "2",
                               "--program", program], cwd=tmp_path, check=False)
        assert done.returncode == status


LEVEL_OF = {0: ["accepts at u = a", "draws at u = the running sum", "top-p before temperature"],
            2: ["ties are run", "the target is always h[L]", "g[i,0] is computed again",
                "the losing state is kept", "the way back reads one row early",
                "several tokens are held against h[i]"],
            3: ["the interleaved rotary layout", "a norm without eps"],
            4: ["one position too far"]}


@pytest.mark.parametrize("n, fault", [(n, fault) for n in LEVEL_OF for fault in LEVEL_OF[n]])
def test_a_wrong_program_does_not_reach_the_level(n, fault, level, capsys):
    with running(fault):
        assert level(n) == 1, capsys.readouterr().out


def test_junit_names_the_cases_that_fail(level, tmp_path):
    with running("ties are run"):
        level(2, "--junit", str(tmp_path / "x.xml"))
    suite = ElementTree.parse(tmp_path / "x.xml").getroot()
    assert int(suite.get("failures")) == len(suite.findall("testcase/failure")) > 0
    assert int(suite.get("tests")) == len(suite)


def test_the_hall_of_bugs_names_wrong_programs_that_its_check_finds():
    """Rejects a row whose program is gone, or whose check does not find it."""
    rows = [line.split("|") for line in (HERE.parent / "BUGS.md").read_text().splitlines()
            if line.startswith("| ")][1:]
    assert len(rows) >= 12
    for row in rows:
        program, finder = (re.search(r"`(.+)`", cell)[1] for cell in row[3:5])
        if program in WRONG:
            cases = list(CASES) if finder == "level 1" else [finder]
            assert check.missed(program, cases) <= 0.01, row
        else:
            assert program in NAMED and program in LEVEL_OF[int(finder[-1])], row


def test_the_vectors_say_what_they_show():
    """Their texts are played anew; the two with u = 0 reject <= and >= (tests above)."""
    for vector in UNIFORMS:
        case = CASES[vector["case"]]
        texts = play(RIGHT["token rule"], case, Dice(iter(vector["u"]).__next__))
        assert texts[0] == vector["text"]
    assert Counter(0.0 in vector["u"] for vector in UNIFORMS)[True] == 2
