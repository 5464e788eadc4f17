"""What passes cost: guessed, measured by a clock that is played, kept, and read from files."""
import json
from types import SimpleNamespace

import pytest

from llama import Config, ModelError, torch
from policy import costs

EIGHT = Config(32, 4096, 32, 8, 128, 14336, 128256, 1e-5, 8192, False, 5e5, None)


def test_the_guess_is_by_the_bytes_that_a_pass_reads():
    """By hand for the 8B: a layer has 4096 * 48 * 128 + 4096 * 4096 + 3 * 4096 * 14336 weights,
    which is 218.1 million, the head 525.3: layers are .930 of what a plain step reads. Rejects a
    head that is left out, keys and values of H heads, a verify or a table of another size."""
    table = costs.guess(EIGHT, 12)
    assert len(table["draft"]) == 33 and table["draft"][0] == 1
    assert table["draft"][16] == pytest.approx(1 - 0.930 / 2, abs=1e-3)
    assert table["draft"][32] == pytest.approx(0.070, abs=1e-3)
    assert table["verify"] == [1.0] * 14 and table["optimise"] == 2.0


class Played:
    """A model, its cache of S slots and a clock. A pass takes 10 seconds, the first of each size
    100 more, and the head some for each row."""
    device = torch.device("cpu")

    def __init__(self, monkeypatch, S=40, per_row=1):
        self.S = S
        self.per_row = per_row
        self.now = 0.0
        self.passes = []
        monkeypatch.setattr(costs, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def sequence(self, t, T):
        assert t + T <= self.S
        return t, T

    def forward(self, ids, rows, cache):
        done = (*rows, ids[0].item())
        self.now += 10 if done in self.passes else 110
        self.passes.append(done)
        return [torch.zeros(len(ids), 1)]

    def head(self, x):
        self.now += self.per_row * len(x)
        return x


def test_verifies_are_timed_where_they_will_run_and_the_least_of_three_counts(monkeypatch):
    """Rejects a warm-up that counts, a mean, seconds for plain steps, one row's logits, another
    place than behind the text, slots that are not there, and a gain that is only noise."""
    model = Played(monkeypatch)
    table = costs.measure(model, model, [3, 5, 7], 12)
    assert model.passes == [(3, n, 7) for n in (1, 4, 13)] * 3
    assert len(table) == 14 and [table[n] for n in (0, 1)] == [1, 1]
    steps = [14 / 11, 23 / 11, 1 + (14 / 11 - 1) / 3]
    assert [table[n] for n in (4, 13, 2)] == pytest.approx(steps, abs=1e-3)
    model = Played(monkeypatch, S=10, per_row=-2)      # 7 slots behind the text
    assert costs.measure(model, model, [3, 5, 7], 12) == [1.0] * 14
    assert {T for _, T, _ in model.passes} == {1, 4, 7}


def test_a_table_is_kept_under_a_name_of_what_it_depends_on(tmp_path, monkeypatch):
    """Rejects a table of other weights, of another dtype, or of the last version of the model; and
    a home that cannot be written to as a fault."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(dict(hidden_size=8)))
    (model / "model.safetensors").write_bytes(b"1")
    on = ("bfloat16", 2)
    shelf = costs.shelf(model, *on)
    assert shelf == costs.shelf(model, *on) and tmp_path / "cache" in shelf.parents
    others = [costs.shelf(model, "float32", 2), costs.shelf(model, "bfloat16", 1)]
    for name, content in (("model.safetensors", b"12"), ("config.json", b'{"hidden_size": 16}')):
        (model / name).write_bytes(content)
        others.append(costs.shelf(model, *on))
    assert len({shelf, *others}) == 5
    table = dict(draft=[1.0, 0.5], verify=[1.0, 1.0, 1.2], optimise=2.0)
    assert costs.keep(shelf, table) and costs.load(str(shelf), L=1, K=1) == table
    assert not costs.keep(model / "config.json" / "no folder", table)


@pytest.mark.parametrize("wrong", [
    dict(draft=[1.0]), dict(draft=[1.0, "x"]), dict(verify=[1.0]), dict(verify=[1.0, 1.0, 0.0]),
    dict(verify=[9.0, 1.0]), dict(optimise=[1]), dict(optimise=-1), dict(risk=[0.1]), dict(other=1),
    dict(draft=None)])
def test_a_file_of_costs_is_checked_and_drawn_out(tmp_path, wrong):
    """Rejects tables that a run would stumble over, and a refusal of what --json prints, or of a
    table that was measured for a smaller K."""
    right = dict(draft=[1.0, 0.5], verify=[1.0, 1.0, 1.25], optimise=2.0, risk=[0.0, 0.1])
    path = tmp_path / "costs.json"
    for whole in (right, dict(costs=right), dict(settings=dict(costs=right))):
        path.write_text(json.dumps(whole))
        assert costs.load(str(path), L=1, K=3)["verify"] == [1.0, 1.0, 1.25, 1.5, 1.75]
    path.write_text(json.dumps(right | wrong))
    with pytest.raises(ModelError, match="costs.json: costs are"):
        costs.load(str(path), L=1, K=3)
