"""The numbers behind the figures, held against counts by hand."""
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from bench import figures
from bench.choosers import Page
from demo.train import kept_back
from dp_layer_skip import choose_skip, cosine, torch
from policy.adaptive import overlap
from speculative import Settings
from tests.helpers import DEMO, having_read, tiny_llama
from text.tokenizer import Tokenizer

L = 5
IDS = [1, 0, 2, 2, 1, 0, 1, 2]


def bits(n):
    return tuple(bool(n >> i & 1) for i in range(L))


@pytest.fixture
def page():
    with torch.inference_mode():
        yield Page(tiny_llama(V=3, L=L), IDS, 40)


def test_the_overlap_of_neighbouring_sets_by_hand():
    """Rejects intersections over sizes, pairs of another distance, kinds told by the wrong place
    of the change."""
    assert figures.jaccard(bits(0b00111), bits(0b01110)) == 2 / 4
    assert figures.jaccard(bits(0b1), bits(0b10)) == 0 and figures.jaccard(bits(0), bits(0)) == 1
    # Tokens START.. have the sets 1 | 1, 3, 2: one of prose, then of code.
    sets = [bits(n) for n in (0b1, 0b1, 0b11, 0b10)]
    assert figures.neighbours([("prose", figures.START + 1, sets)]) == {
        "both in code": {"1": 0.5, "2": 0.0}, "one in code, one in prose": {"1": 1.0, "2": 0.5}}


def test_every_subset_ends_where_a_draft_without_these_layers_ends(page, monkeypatch):
    """Rejects candidates that see one another or the token twice, a subset of the wrong layers, the
    mean over sets of another size, the dynamic program's set read from another place."""
    monkeypatch.setattr(figures, "ROWS", 3)
    h, cache = having_read(page.model, IDS[:6], 5)
    rows = cache.candidates(5, 4)
    every = figures.every_subset(page, 5, 1, 4).tolist()
    for n in range(8):
        end = page.model.forward(page.ids[5:6], rows.first(1), cache, bits(n << 1))[L][0]
        assert every[n] == pytest.approx(cosine(h[L], end).item())
    choice = choose_skip(h[1:5], lambda i, g: page.model.layer(i + 1, g, rows.first(len(g)), cache),
                         3)
    curves = figures.against_brute_force(page, 5, 1, 4)
    for j, sizes in ((1, (1, 2, 4)), (2, (3, 5, 6))):
        mine = every[sum(2 ** i for i, left_out in enumerate(choice.skip(j)) if left_out)]
        want = max(every[n] for n in sizes), mine, sum(every[n] for n in sizes) / 3
        assert [of[j] for of in curves.values()] == pytest.approx(want)
    assert figures.mean([{"a": {1: 1.0, 2: 5.0}}, {"a": {1: 2.0, 2: 7.0}}]) == {"a": {1: 1.5, 2: 6}}


def test_along_a_text_a_set_serves_from_the_next_token_on(page, monkeypatch):
    """Rejects a set that serves its own token or one too late, a policy that is told of another
    draft, a choice that is forgotten."""
    monkeypatch.setattr(figures, "START", 2)
    told = []
    policy = SimpleNamespace(
        due=lambda n: n in (0, 3), optimise=lambda choose, *_: choose(),
        judged=lambda confidence, p, q, accepted: told.append(overlap(p[0], q[0]).item()))
    values, choices = figures.along(page, policy, 2)
    assert choices == 2 and values == told and len(values) == 5
    for t, x in enumerate(values, 2):
        q = page.draft(page.choose(1 if t <= 4 else 4, 2).skip(), t, t + 1).softmax(-1)
        assert x == pytest.approx(overlap(page.full(t, t + 1).softmax(-1), q).item(), abs=1e-9)


def test_a_text_that_changes_is_followed_as_each_rule_says(page, monkeypatch, capsys):
    """Rejects an interval that the policy also has, a rule under another's name, distances from
    another token than the change."""
    for name, value in dict(START=2, PIECE=4, BIN=2).items():
        monkeypatch.setattr(figures, name, value)
    asked = []

    def along(page, policy, M):
        asked.append((type(policy).__name__, sum(policy.due(n) for n in range(40)), M))
        return [0.0, 0.25, 0.5, 1.0, 1.0], 3
    monkeypatch.setattr(figures, "along", along)
    costs = dict(draft=[1, .9, .8, .7, .6, .5], verify=[1, 1, 1.1], optimise=2.0, risk=[.1] * 6)
    curves = figures.changes([("code", page), ("prose", page)], 2, costs)
    assert asked[::2] == asked[1::2] == [("Paper", 5, 2), ("Paper", 3, 2), ("Paper", 1, 2),
                                         ("Paper", 1, 2), ("Adaptive", 40, 2)]
    assert list(curves) == ["every 8 tokens", "every 16 tokens", "every 64 tokens", "once",
                            "by the alarm"]
    assert all(of == {-1: 0.125, 1: 0.75, 3: 1.0} for of in curves.values())
    assert "once: 0.833 after the change, 3.0 choices a text\n" in capsys.readouterr().out


def test_texts_that_people_wrote_are_kept_back_from_training_and_change_in_the_middle(monkeypatch):
    """Rejects files that the demo was trained on, docstrings left in the code, unequal halves."""
    assert all(kept_back(f"{module}.py") for module in figures.MODULES)
    code, prose = figures.code_and_prose("json/encoder")
    assert '"""' not in code and "def iterencode(" in code and prose.startswith("Constructor for")
    monkeypatch.setattr(figures, "MODULES", ("json/encoder", "random"))
    monkeypatch.setattr(figures, "Page", lambda model, ids, spare: ids)
    tok = Tokenizer(DEMO)
    first, second = figures.texts(SimpleNamespace(tokenizer=tok, model=None))
    assert [first[0], second[0]] == ["code", "prose"]
    P = figures.PIECE
    assert len(first[1]) == len(second[1]) == 2 * P and first[1][0] == second[1][0] == tok.bos
    assert prose.startswith(tok.decode(first[1][P:])) and tok.decode(first[1][1:P]) in code


def test_a_figure_has_its_numbers_beside_it(tmp_path, monkeypatch, capsys):
    """Rejects numbers that differ from those drawn; a knob under another's name, the policy's speed
    at another temperature; a traceback where the plotting library is missing."""
    found = dict(M={8: 1.5}, interval={4: 2.0, 8: 2.5})
    monkeypatch.setattr(figures, "sweep", lambda job, prompts, T: (found, None))
    monkeypatch.setattr(figures, "speed", lambda job, prompts, s, policy: s.temperature + 3)
    panels = figures.knobs(SimpleNamespace(plain=Settings(), policy=None), [])
    assert panels["M"]["greedy"] == {"fixed": {"8": 1.5}, "the policy": {"8": 3.0}}
    plt = MagicMock()
    left, right = MagicMock(), MagicMock()
    plt.subplots.return_value = MagicMock(), [[left, right]]
    figures.draw(plt, tmp_path, "4b", "x", "y", panels["interval"])
    drawn = [*left.plot.call_args_list, *right.plot.call_args_list]
    assert [call.args for call in drawn] == [(["4", "8"], y) for y in (
        [2.0, 2.5], [4.0, 4.0], [2.0, 2.5], [3.0, 3.0])]
    head, *rows = (tmp_path / "4b.csv").read_text().splitlines()
    assert head == "panel,curve,x,y" and len(rows) == 8
    assert rows[1::2][:2] == ["temperature 1,fixed,8,2.5", "temperature 1,the policy,8,4.0"]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert figures.main(["--device", "cpu"]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
