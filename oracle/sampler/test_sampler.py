"""The kit's promises: the laws are right, right samplers pass, each wrong one is found and named,
in any language; conformance.py's levels pass our own program and reject wrong ones.
"""
import json
import random
import re
import shutil
import sys
from collections import Counter
from itertools import product
from operator import mul
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from oracle import conformance, ours
from oracle.sampler import check
from oracle.sampler.exact import Refused, distance, exact, main, short
from oracle.sampler.law import ALONE, CASES, RIGHT, law, rounds, target
from oracle.sampler.wrong import WRONG, by
from speculative import Chance
from tests.wrong_programs import edited, running

torch.set_num_threads(1)
HERE = Path(__file__).resolve().parent
JS = (HERE / "sampler.js").read_text()


def faults(seen):
    """What is said of these texts, if they are wrong: case by case, then together."""
    alone = [check.wrong_in(case, counts) for case, counts in seen.items()]
    return list(filter(None, [*alone, check.all_together(seen)[2]]))


@pytest.mark.parametrize("name", [*RIGHT, *WRONG, "a fault without a name"])
def test_texts_are_called_wrong_if_their_sampler_is_and_the_fault_is_named(name):
    """Rejects a right sampler that is not, tables that are blind to a fault, a test that does not
    tell it from the others, one at p > .05, and naming the nearest fault whatever the texts are.
    `missed` is a bound, not an experiment; of this seed it is known that the rest holds."""
    sampler = (RIGHT | WRONG).get(name, by(owed=lambda p, q, s, x: q[s]))
    chance = random.Random(61)

    seen = {}
    for case in CASES:
        known = check.laws(case)
        texts = known[name] if name in known else law(sampler, CASES[case])
        seen[case] = Counter(chance.choices(list(texts), texts.values(), k=check.TEXTS))
    said = faults(seen)
    if name in RIGHT:
        assert not said
        assert all(distance(law(sampler, CASES[case]), check.laws(case)["right"]) < 1e-12
                   for case in CASES)
    else:
        assert said[-1].startswith(name)
        assert name not in WRONG or check.missed(name, list(CASES)) <= 1e-6


def test_rows_that_share_their_numbers_and_their_prompt_say_the_same():
    """Rejects numbers that are shared in part, or not uniform."""
    case = dict(CASES["batch"], prompt=[1, 1])
    texts = law(WRONG["batch: one number for all rows"], case)
    same = {one: probability for (one, other), probability in texts.items() if one == other}
    assert distance(same, target(dict(case, prompt=1))) < 1e-12


def test_the_same_text_again_and_again_is_told_as_a_seed():
    """Rejects a fault's name alone, which leads astray: the rule may be right."""
    assert "seeded anew" in faults(dict(plain=Counter({(0, 0, 0, 0): check.TEXTS})))[0]


AS_NEEDED = [("d.map(uniform)", "[]"), ("verdicts[s]", "uniform()")]


@pytest.mark.parametrize("level, edits, status, said", [
    (0, [], 0, " 0 wrong"), (0, AS_NEEDED, 1, "WRONG rejections and residuals"),
    (1, [], 0, "ok    rounds per text: 2.3.; token rule 2.38, "),
    (1, [("p, q, last, uniform))", "p, q, c.prompt[0] ?? last, uniform))")], 1, "WRONG batch: ")])
@pytest.mark.skipif(not shutil.which("node"), reason="no node: the program in JavaScript")
def test_a_program_in_javascript_passes_and_its_faults_are_named(level, edits, status, said,
                                                                  tmp_path, capsys):
    """The protocol needs nothing of ours. Rejects a level 0 at which it does not matter how many
    numbers a round takes."""
    (tmp_path / "sampler.js").write_text(edited(JS, edits))
    program = f"node {tmp_path / 'sampler.js'}"
    assert conformance.main(["--level", str(level), "--program", program]) == status
    assert re.search(said, capsys.readouterr().out)


def test_how_many_rounds_a_text_takes_is_known():
    """By hand: of two tokens one is drafted, and kept with a probability that differs by rule.
    Rejects a slow rule that is taken for a fast one."""
    for name, p_q in (("token rule", min), ("block rule", min), ("sample and compare", mul)):
        case = TWO["plain"]
        kept = sum(map(p_q, case["p"][case["prompt"]], case["q"][case["prompt"]]))
        assert rounds(RIGHT[name], case) == pytest.approx({1: 2 * (1 - kept), 2: kept})
    assert rounds(RIGHT["no bonus"], case) == pytest.approx({1: 2})


@pytest.mark.parametrize("name, n, status, said", [
    ("token rule", 2000, 0, "ok    all together\n"),
    ("token rule", 90, 0, "in 90 texts a fault may be missed"),
    ("batch: padding read", 2000, 1,
     "ok    plain\nskip  zeros: not counted\n(?s:.*)\nWRONG batch: batch: padding read"),
    ("residual = p", 2000, 1, "WRONG all together: residual = p")])
def test_texts_that_were_counted_elsewhere_are_judged(name, n, status, said, tmp_path, capsys):
    """Rejects a batch that is not read, a case that is not there and counts as right, and silence
    about too few."""
    counts = {}
    for case in ("plain", "batch"):
        texts = law((RIGHT | WRONG)[name], CASES[case])
        drawn = random.Random(61).choices(list(map(json.dumps, texts)), texts.values(), k=n)
        counts[case] = Counter(drawn)
    (tmp_path / "counts").write_text(json.dumps(counts))
    assert conformance.main(["--level", "1", "--counts", str(tmp_path / "counts")]) == status
    assert re.search(said, capsys.readouterr().out)


def test_a_ci_reads_which_cases_are_wrong_and_why(tmp_path):
    """Rejects a wrong case that counts as passed, and a report of another form."""
    cases = [("ok", "a", ""), ("WRONG", "b", "p < q"), ("skip", "c", "no loop")]
    conformance.junit("level 1", cases).write(tmp_path / "it.xml")
    suite = ElementTree.parse(tmp_path / "it.xml").getroot()
    assert suite.tag == "testsuite" and suite.get("tests") == "3"
    read = [(case.get("name"), *[(of.tag, of.get("message")) for of in case]) for case in suite]
    assert read == [("a",), ("b", ("failure", "p < q")), ("c", ("skipped", "no loop"))]


@pytest.mark.parametrize("flag, text, said", [
    ("--counts", None, "No such file"), ("--counts", "[]", "is wanted"),
    ("--counts", "{", "is wanted"), ("--counts", '{"x": {}}', "x is no case"),
    ("--counts", '{"plain": {"[0]": -1}}', "\"counts\" {text"),
    ("--counts", '{"plain": {"a": 1}}', "\"counts\" {text"),
    ("--program", None, "No such file"), ("--program", "import sys; sys.exit(3)", "exit status 3"),
    ("--program", "print('x')", "value"), ("--program", "print('{}')", "lines are wanted"),
    ("--program", "answers('[]')", "a JSON object"),
    ("--program", "answers('{}')", "\"texts\" should"),
    ("--program", "answers('{\"texts\": [[0]]}')", f"list of {check.TEXTS}"),
    ("--program", f"answers('{{\"rounds\": [1], \"texts\": %s}}' % ([[0]] * {check.TEXTS}))",
     "\"rounds\" should")])
def test_what_is_no_answer_is_one_line(flag, text, said, tmp_path, capsys):
    """Rejects a traceback; and counts or a text that nothing can be said of."""
    path = tmp_path / "mine"
    command = str(path)
    if text and flag == "--program":
        text = f"def answers(line):\n    print((line + '\\n') * {len(CASES)})\n{text}"
        command = f"{sys.executable} {path}"
    if text:
        path.write_text(text)
    assert conformance.main(["--level", "1", flag, command]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


# ------------------------------------------------------------------------------------- exact.py

TWO = {name: dict(short(name), N=2) for name in ALONE}      # tokens: one is drafted


@pytest.mark.parametrize("case", TWO.values(), ids=TWO)
def test_our_own_draft_and_judge_have_the_right_law(case):
    """Their own code, down every branch of chance. Rejects the sampler's wrong programs."""
    assert distance(exact(ours.run, case), target(case)) < 1e-12


@pytest.mark.parametrize("draw", [
    lambda p: torch.multinomial(p, 1)[0],
    lambda p: (p / torch.empty_like(p).exponential_()).argmax(),
    lambda p: torch.empty_like(p).exponential_().div_(p).argmin(),
    lambda p: (p.cumsum(0) < torch.rand(3)[1] * p.sum()).sum(),
    lambda p: (p.cumsum(0) < torch.stack([torch.rand(()), torch.rand(())])[1]).sum()])
def test_draws_of_every_kind_are_followed(draw, monkeypatch):
    """As engines write them. Rejects a comparison that forgets what its number was compared with
    before."""
    monkeypatch.setattr(Chance, "draw", lambda self, p: draw(p).view(1))
    assert distance(exact(ours.run, TWO["plain"]), target(TWO["plain"])) < 1e-12


@pytest.mark.parametrize("wrong, fault, name", [
    ("residual = p", "residual = p", "plain"),
    ("argmax draft scored with a softmax q", "argmax drafts, q softmax", "plain"),
    ("q at temperature 1", "q at temperature 1, unfiltered", "top-p")])
def test_our_own_code_gone_wrong_has_exactly_the_law_of_that_fault(wrong, fault, name):
    """Holds wrong.py and exact.py against code that was written for another purpose."""
    with running(wrong):
        mine = exact(ours.run, TWO[name])
    assert distance(mine, law(WRONG[fault], TWO[name])) < 1e-9 < distance(mine, target(TWO[name]))


@pytest.mark.parametrize("program, said", [
    (lambda case: [noise.argmin() for noise in [torch.ones(3).exponential_()] * 2], "race twice"),
    (lambda case: [int(torch.rand(3).cumsum(0)[0])], "cannot be followed"),
    (lambda case: torch.rand(3).tolist(), "cannot be followed"),
    (lambda case: [int(-2 * torch.rand(()) < -.5)], "cannot be followed"),
    (lambda case: [int(torch.rand(()) < torch.rand(()))], "cannot be followed"),
    (lambda case: torch.tensor([torch.rand(()), 0.5]) < 0.5, "cannot be followed"),
    (lambda case: [int(torch.randint(3, (1,)))], "cannot be followed")])
def test_what_cannot_be_followed_is_refused(program, said):
    """Rejects noise that races twice, and a number that is used as if it were known."""
    with pytest.raises(Refused, match=said):
        exact(program, TWO["limit"])


def test_exact_names_the_nearest_fault(tmp_path, capsys):
    """Rejects a random number that is drawn because its function was imported by name."""
    (tmp_path / "mine.py").write_text("from random import random\n\ndef run(case):\n"
                                      "    return [int(random() < 0.5) for _ in range(3)]\n")
    assert main([f"{tmp_path}/mine.py:run"]) == 1
    off = distance(dict.fromkeys(product((0, 1), repeat=3), 1 / 8), target(short("plain")))
    assert re.match(f"plain +total variation {off:.1e} from the right law: WRONG; .* from ",
                    capsys.readouterr().out)
