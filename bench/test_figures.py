"""The numbers behind the figures, held against counts by hand; drawing them needs matplotlib."""
import csv
import hashlib
import json
import sys
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace

import pytest

import clasp_mini
from bench import figures
from bench.test_bench import wrong_tool
from dp_layer_skip import choose_skip, cosine, torch
from speculative import Settings, overlap
from test_clasp import DEMO, tiny_llama
from command.cli import UsageError
from text.test_report import a_round

L, IDS = 5, [1, 0, 2, 2, 1, 0, 1, 2]
COSTS = dict(draft=[1.0, 0.6, 0.2], verify=[1.0, 1.0, 1.1, 1.2, 1.5], optimise=2.0)


def bits(n):
    return tuple(bool(n >> i & 1) for i in range(L))


def rejects(test, *edits):
    """`test`, which takes the module that it judges, fails on each edited one."""
    for right, wrong in edits:
        module = wrong_tool(figures, right, wrong)
        with pytest.raises((AssertionError, IndexError, RuntimeError)):
            test(module)
            pytest.fail(f"{wrong!r} passes")


# ----------------------------------------------------------------------------------- the numbers

def test_the_overlap_of_neighbouring_sets_by_hand(module=figures):
    """Rejects intersections over sizes, pairs of another distance, kinds told by the wrong place
    of the change."""
    assert module.jaccard(bits(0b00111), bits(0b01110)) == 2 / 4
    assert module.jaccard(bits(0b1), bits(0b10)) == 0 and module.jaccard(bits(0), bits(0)) == 1
    # Tokens START.. have the sets 1 | 1, 3, 2: one of prose, then of code.
    sets = [bits(n) for n in (0b1, 0b1, 0b11, 0b10)]
    rows = {(r["tokens"], r["distance"]): (r["jaccard"], r["pairs"])
            for r in module.neighbours([(module.PROSE, module.START + 1, sets)])}
    assert rows == {("code", 1): (0.5, 2), ("code", 2): (0.0, 1), ("across", 1): (1.0, 1),
                    ("across", 2): (0.5, 1)}


def test_tokens_per_plain_step_by_hand(module=figures):
    """Rejects a prefill that counts, a first choice of layers that does not, drafts at the price of
    another budget, a verify of one row too few."""
    rounds = [a_round([], 0, [7], (0, 0, 0), "set", (False, False)),
              a_round([1, 2, 3], 2, [1, 2, 9], (0, 0, 0), None, (True, False)),
              a_round([4], 1, [4, 5], (0, 0, 0), "set", (True, True)),
              a_round([], 0, [6], (0, 0, 0), None, (True, True))]
    # 2, then 3 * .6 + 1.5, then .2 + 1.1 + 2, then 1: 9.6 for 3 + 2 + 1 tokens.
    got = module.speed([rounds, rounds], COSTS)
    assert got == dict(speedup=round(6 / 9.6, 4), plain_steps=19.2, tokens_per_verify=2.0,
                       acceptance=0.75, left_out=1.25, choices=4, verifies=6)
    line = module.time_line(rounds, COSTS)
    assert [(r["what"], r["start"]) for r in line if r["lane"] == "rounds"] == [
        ("optimise", 0), ("draft", 2), ("draft", 2.6), ("draft", 3.2), ("verify", 3.8),
        ("draft", 5.3), ("verify", 5.5), ("optimise", 6.6), ("verify", 8.6)]
    assert [r["start"] for r in line if r["lane"] == "plain"] == [0, 1, 2, 3, 4, 5]


def test_a_page_tries_sets_as_a_draft_does(module=figures):
    """Rejects candidates that see the token twice, that see one another or later tokens, that harm
    what the full model wrote; a subset of the wrong layers."""
    model = tiny_llama(V=3, L=L)
    page = module.Page(model, IDS)
    for t in (0, 4, len(IDS) - 1):
        every = module.every_subset(page, t, 1, 4)
        for n in range(8):                             # a draft of one token behind t of the text
            cache, skip = model.cache(len(IDS)), bits(n << 1)
            if t:
                model.forward(torch.tensor(IDS[:t]), cache.sequence(0, t), cache)
            logits, h = model.forward(torch.tensor(IDS[t:t + 1]), cache.sequence(t, 1), cache, skip,
                                      states=True)
            assert torch.allclose(every[n], cosine(page.h[L, t], h[L, 0]))
            assert torch.allclose(page.draft(skip, t)[0], logits[0].softmax(-1))
        cache = model.cache(30)
        _, h = model.forward(torch.tensor(IDS[:t + 1]), cache.sequence(0, t + 1), cache,
                             states=True)
        rows, c = cache.candidates(t, 4), cache
        want = choose_skip(h[:, 0], lambda i, g, rows=rows, c=c: model.layer(i, g, rows, c), 3)
        assert page.choose(t, 3).skip() == want.skip()
        assert torch.allclose(page.draft(bits(0), 0), page.p)


def test_brute_force_is_never_worse_and_the_mean_is_over_sets_of_one_size(module=figures):
    """Rejects other sizes mixed in, a set of the dynamic program read from another place."""
    model = tiny_llama(V=3, L=L)
    page = module.Page(model, IDS)
    every = module.every_subset(page, 5, 1, 5).tolist()
    cache = model.cache(20)
    model.forward(torch.tensor(IDS[:5]), cache.sequence(0, 5), cache)
    them = cache.candidates(5, 5)                      # nobody reads the slot of the token itself
    choice = choose_skip(page.h[1:6, 5], lambda i, g: model.layer(i + 1, g, them, cache), 4)
    sizes = [(1, 2, 4, 8), (3, 5, 6, 9, 10, 12), (7, 11, 13, 14)]
    rows = module.against_brute_force(page, 5, 1, 5)
    assert [r["left_out"] for r in rows] == [1, 2, 3]
    for row, indices in zip(rows, sizes):
        cosines = [every[n] for n in indices]
        assert row["best"] == pytest.approx(max(cosines), abs=1e-9)
        assert row["mean"] == pytest.approx(sum(cosines) / len(cosines), abs=1e-9)
        chosen = sum(2 ** i for i, s in enumerate(choice.skip(row["left_out"])) if s)
        assert row["dynamic_program"] == pytest.approx(every[chosen], abs=1e-9)
        better = [x > row["dynamic_program"] + 1e-6 for x in cosines]
        assert row["better"] == pytest.approx(sum(better) / len(better))
    assert module.mean_rows([dict(j=1, x=2.0), dict(j=1, x=3.0), dict(j=2, x=1.0)], "j") == [
        dict(j=1, x=2.5, tokens=2), dict(j=2, x=1.0, tokens=1)]


def test_along_a_text_a_set_serves_from_the_next_token_on(module=figures):
    """Rejects a set that serves its own token or one too late, a policy that is told of another
    draft, a choice that is forgotten."""
    page, told = module.Page(tiny_llama(V=3, L=L), IDS), []
    policy = SimpleNamespace(
        M=2, j=2, due=lambda n: n in (0, 3), plan=lambda chosen: 1, goes_on=lambda c: True,
        judged=lambda p, q, accepted: told.append(overlap(p[0], q[0]).item()),
        probed=lambda model, h, g: None)
    values, chosen = module.along(page, 2, policy)
    assert chosen == [1, 4] and values == told and len(values) == 5
    for t, x in enumerate(values, 2):
        q = page.draft(page.choose(1 if t <= 4 else 4, 2).skip(), t)[0]
        assert x == pytest.approx(overlap(page.p[t], q).item(), abs=1e-9)


def test_the_choice_by_disappointment_is_the_policys_and_intervals_count_tokens(module=figures):
    """Rejects an interval that fixes the policy's choice and one that is not told apart from it."""
    base, made = Settings(K=2, M=2, exit_threshold=0.0), []
    of = module.schemes(base, dict(COSTS, draft=[1, .9, .8, .7, .6, .5]))
    for name in module.SCHEMES:
        policy = of[name]()
        made.append((type(policy).__name__, [n for n in range(40) if policy.due(n)]))
    assert made == [("Fixed", [0]), ("Fixed", [0]), ("Fixed", [0, 16, 32]),
                    ("Fixed", [0, 8, 16, 24, 32]), ("Adaptive", list(range(40)))]
    page = module.Page(tiny_llama(V=3, L=L), IDS * 3)
    curve, summary = module.changes([("code", 20, page), ("own", 18, page)], of)
    # p[20..22] speak of what follows the change at 20; of 24 tokens the last has nothing after it.
    tokens = {r["text"]: r["tokens"] for r in summary}
    assert tokens == dict(code=3, own=5) and len(summary) == 10 and not curve


def test_knobs_are_varied_one_at_a_time_and_no_run_is_made_twice(module=figures):
    """Rejects a grid that leaves another knob changed, a policy that is told some of them."""
    ran = []

    def run(s, adaptive):
        ran.append((s.temperature, s.M, s.interval, s.exit_threshold, adaptive))
        return [[a_round([], 0, [7], (0, 0, 0)), a_round([1], 1, [1, 2], (0, 0, 0))]]
    rows = module.knobs(Settings(K=3, M=20, interval=16, exit_threshold=0.3), 32, run, COSTS)
    assert len(ran) == len(set(ran)) and {r[3] for r in ran if r[1:3] != (20, 16)} == {0.3, None}
    assert {r[1:] for r in ran if r[-1]} == {(20, None, 0.3, True), (None, None, None, True)}
    assert [r["value"] for r in rows["interval"]][:7] == [
        4, 8, 16, 32, "never", "disappointment", "policy"]
    assert {r["speedup"] for of in rows.values() for r in of} == {round(2 / (0.6 + 1.1), 4)}


def test_texts_that_people_wrote_are_kept_back_from_training_and_change_in_the_middle(tmp_path):
    """Rejects files that the demo was trained on, docstrings left in the code, unequal halves."""
    names = [f"m{n}.py" for n in range(200)]
    held = [n for n in names if hashlib.sha256(n.encode()).digest()[0] % 20 == 0]
    for n in names:
        (tmp_path / n).write_text(f'"""Of {n}."""\ndef f():\n    """{"w " * 9}"""\n    return 1\n')
    (tmp_path / held[0]).write_text("def broken(:\n")
    pairs = list(figures.pieces(tmp_path))
    assert len(pairs) == len(held) - 1 and {prose.split()[0] for _, prose in pairs} == {"w"}
    assert {code for code, _ in pairs} == {"def f():\n    return 1\n"}
    long = [("c" * 999, "p" * 999), ("c" * 999, "p"), ("C" * 999, "P" * 999)]
    texts = figures.human_texts(0, lambda s: [*map(ord, s)], long)
    n = figures.PIECE - 1
    assert texts == [("code", [0, *[99] * n, *[112] * n]), ("prose", [0, *[80] * n, *[67] * n])]


def test_these_tests_reject_wrong_numbers():
    """Each of them, on a module with one slip."""
    rejects(test_the_overlap_of_neighbouring_sets_by_hand,
            ("union = sum(x or y", "union = sum(x"), ("len(sets) - d)", "len(sets) - 1)"),
            ("if x < change else second", "if x <= change else second"))
    rejects(test_tokens_per_plain_step_by_hand,
            ("if n:\n            out", "if True:\n            out"),
            ("if r.choice:", "if n and r.choice:"),
            ("[sum(r.skip)]", "[0]"), ("[len(r.drafted) + 1]", "[len(r.drafted)]"))
    rejects(test_a_page_tries_sets_as_a_draft_does,
            ("(seen < t) |", "(seen <= t) |"), ("seen[self.n:]", "seen[t + 1:t + 1 + J]"),
            ("torch.cat((run(i, x), x))", "torch.cat((x, run(i, x)))"),
            ("| (seen == slots[:, None])", "| (seen >= self.n)"))
    rejects(test_brute_force_is_never_worse_and_the_mean_is_over_sets_of_one_size,
            ("every[size == j]", "every[size <= j]"), ("a + i, x), b - a)", "i, x), b - a)"))
    rejects(test_along_a_text_a_set_serves_from_the_next_token_on,
            ("skip(policy.j), t + 1)", "skip(policy.j), t)"),
            ("page.p[t:t + 1]", "page.p[t - 1:t]"))
    rejects(test_the_choice_by_disappointment_is_the_policys_and_intervals_count_tokens,
            ("interval=None, N=NEVER", "interval=8, N=NEVER"), ("if t >= change", "if t > change"))
    rejects(test_knobs_are_varied_one_at_a_time_and_no_run_is_made_twice,
            ("if (s, adaptive) not in done:", "if True:"),
            ("replace(fixed, interval=None), True)", "replace(free, interval=None), True)"))


# --------------------------------------------------------------------------- all of it, and drawn

@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """What `numbers` yields on the demo, everything small."""
    costs = tmp_path_factory.mktemp("costs") / "costs.json"
    costs.write_text(json.dumps(dict(draft=[1 - n / 40 for n in range(33)], optimise=2.5,
                                     verify=[1 + n / 20 for n in range(14)])))
    small = dict(PIECE=24, TEXTS=2, PROMPTS=1, INNER=4, BIN=4, GRID=dict(
        M=(0.5,), interval=(2, figures.NEVER), exit_threshold=(0.3,)))
    patch = pytest.MonkeyPatch()
    for name, value in small.items():
        patch.setattr(figures, name, value)
    job = clasp_mini.Job(clasp_mini.parser().parse_args(
        ["--device", "cpu", "--costs", str(costs), "--max-new-tokens", "8"])).load()
    texts = ("def f(x):\n", "The module",
             "def f(x):\n    return x\n\nThis function returns the value that it was given.\n")
    prompts = [job.encode([dict(role="user", content=text)]) for text in texts]
    with torch.inference_mode():
        yield list(figures.numbers(job, ["code", "prose", "mixed"], prompts))
    patch.undo()


def test_every_figure_has_numbers_and_a_caption_that_says_them(drawn):
    """Rejects a figure without rows or words, and a caption of other numbers than its rows."""
    assert [of[0] for of in drawn] == ["3a", "3b", "4a", "4b", "4c", "5", "6a", "6b"]
    assert set(figures.PAPER) == {of[0] for of in drawn}
    assert all(rows and len(caption) > 100 for _, _, caption, rows, *_ in drawn)
    captions, rows = {of[0]: of[2] for of in drawn}, {of[0]: of[3] for of in drawn}
    at_one = {r["tokens"]: r["jaccard"] for r in rows["3a"] if r["distance"] == 1}
    assert {r["text"] for r in rows["6b"]} == {"code", "prose", "own"}
    assert f"{at_one['code']:.2f} (code) and {at_one['prose']:.2f} (prose)" in captions["3a"]
    policy = next(r for r in rows["4a"] if r["value"] == "policy" and r["temperature"] == 1)
    assert f"the policy {policy['speedup']:.2f} and" in captions["4a"]


def test_figures_are_svg_with_text_and_their_numbers_lie_beside_them(drawn, tmp_path):
    """Rejects glyphs drawn as paths, numbers that differ from those drawn, a large file."""
    pytest.importorskip("matplotlib", reason="drawing needs matplotlib, which only it needs")
    plt = figures.pyplot()
    for name, title, caption, rows, draw, panels, height in drawn:
        page = figures.figure(plt, tmp_path, name, title, caption, rows, draw, panels, height)
        assert f"({name}.svg)" in page and f"({name}.csv)" in page and caption in page
        svg = ElementTree.parse(tmp_path / f"{name}.svg")
        words = " ".join("".join(e.itertext()) for e in svg.iter() if e.tag.endswith("text"))
        assert title in words and caption.split()[-1] in words
        assert (tmp_path / f"{name}.svg").stat().st_size < 90_000
        with open(tmp_path / f"{name}.csv", newline="", encoding="utf-8") as f:
            read = list(csv.DictReader(f))
        assert [{k: v for k, v in r.items() if v} for r in read] == [
            {k: str(v) for k, v in r.items() if v is not None} for r in rows]


def test_without_the_plotting_library_one_line_says_what_is_missing(monkeypatch, capsys):
    """Rejects a traceback, and a wait for the numbers before it is noticed."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert figures.main(["--model", str(DEMO)]) == 2
    err = capsys.readouterr().err
    assert "pip install matplotlib" in err and err.count("\n") == 1
    with pytest.raises(UsageError):
        figures.pyplot()
