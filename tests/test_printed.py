"""What `python dp_layer_skip.py`, `python speculative.py` and `python llama.py` print is true."""
import contextlib
import io
import os
import re
import signal
import subprocess
import sys

import pytest
import torch

import dp_layer_skip
import llama
import speculative
from dp_layer_skip import choose_skip_plain
from tests.helpers import ROOT
from tests.wrong_programs import rejects


def printed(main):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main()
    return out.getvalue()


@rejects("the stars stand one row early", "the printed case is another")
def test_the_first_table_is_that_of_the_case_above_it_and_its_stars_are_the_way_back():
    """Rejects a sentence with other numbers than the table's, and stars in another row."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dp_layer_skip, "run_set", lambda *_: 0.0)             # of all sets: is slow
        said, table, *_ = printed(dp_layer_skip.main).split("\n\n")
    numbers = re.findall(r"\((-?[0-9]),(-?[0-9])\)", said)
    *add, start = torch.tensor([[float(x), float(y)] for x, y in numbers])
    h = torch.stack([start + sum(add[:i]) for i in range(4)])
    choice = choose_skip_plain(h, lambda i, x: x + add[i], 2)
    stars = [(i, sum(choice.skip()[:i])) for i in range(4)]
    for i, line in enumerate(table.splitlines()[1:]):
        cells = [f"{v:.3f}" + "*" * ((i, j) in stars) for j, v in enumerate(choice.D[i]) if j <= i]
        assert line.split()[3:3 + len(cells)] == cells


def test_the_right_sampler_is_right_and_the_three_wrong_ones_are_wrong():
    """Rejects a table in which a wrong sampler happens to be exact, or the right one is not."""
    lines = printed(speculative.main).splitlines()
    errors = {line[:5]: float(line.split()[-1]) for line in lines if line.startswith("right")}
    assert len(errors) == 1 and errors["right"] < 1e-15
    wrong = [float(line.split()[-1]) for line in lines if line.startswith("wrong")]
    assert len(wrong) == 3 and min(wrong) > 0.01


def test_candidates_are_drawn_as_rows_that_read_the_past_and_themselves():
    """Rejects a drawing of another mask, or with a row shifted against its slots."""
    rows = printed(llama.main).splitlines()[-5:]
    for j, row in enumerate(rows):
        position, slot, *marks = row.split()
        assert (position, slot) == ("6", str(7 + j))
        assert "".join(marks) == "#" * 6 + "." * (1 + j) + "w" + "." * (4 - j)


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="no broken pipes here")
def test_a_reader_that_has_seen_enough_gets_no_traceback():
    """Rejects a broken pipe told at length: `python dp_layer_skip.py | head`. Nobody reads here."""
    read, write = os.pipe()
    os.close(read)
    program = [sys.executable, ROOT / "dp_layer_skip.py"]
    done = subprocess.run(program, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, b"")
