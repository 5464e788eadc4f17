"""The table of who should choose the demo's layers is that of its prompts; its search searches."""
import re

import clasp_mini
from demo import kinds, train


def test_a_short_table_has_every_chooser_for_both_kinds(monkeypatch, capsys):
    """Rejects a tool that has drifted from the command, and a mean of something else."""
    for name, n in (("EACH", 1), ("RANDOM", 2), ("STALE", 1)):
        monkeypatch.setattr(kinds, name, n)
    assert kinds.main(["--max-new-tokens", "9"]) == 0
    first, _, *lines = capsys.readouterr().out.splitlines()
    assert first == ("M = 22, K = 6, exit threshold 0.0, interval 16, temperature 1.0, "
                     "[1, 1] prompts")
    assert [line[:25].strip() for line in lines] == [
        "the dynamic program, prob", "the dynamic program, prob", "the best one set for both",
        "the set that training gav", "the set of the other kind", "2 random sets, mean"]
    for line in lines:
        code, prose, mean = map(float, re.findall(r"(?:code|prose|mean) (0\.\d+|1\.0+)", line))
        assert abs((code + prose) / 2 - mean) < 1e-3


def test_the_search_finds_the_layers_that_both_kinds_may_miss(monkeypatch):
    """Rejects a search that scores one kind, that keeps what loses, or whose set has another
    size: planted in the model are 16 layers for both kinds."""
    monkeypatch.setattr(kinds, "STALE", 6)
    job = clasp_mini.Job(clasp_mini.parser().parse_args(["--skip-layers", "10"])).load()
    texts = dict(code=["import os\n\nclass A:\n    def"], prose=["The :mod:`json` module"] * 2)
    prompts = {kind: [job.encode([dict(content=text)]) for text in of]
               for kind, of in texts.items()}
    asked, overlap = [], kinds.overlap
    monkeypatch.setattr(kinds, "overlap", lambda p, q: asked.append(len(p)) or overlap(p, q))
    found = kinds.best_for_both(job, prompts, 10)
    assert sum(found) == 10 and sum(found[i] for i in train.BOTH) >= 9
    assert asked == [128, 256] * (len(asked) // 2)     # tokens of code, of prose, each time
