"""That a suite which two processes share is one suite: nothing is lost, run twice, or green by
accident.
"""
import re
import subprocess
import sys
from pathlib import Path

import pytest

FILE = """
import os, time
import pytest

FIRST = os.getpid()                                    # of the process that has collected

@pytest.mark.parametrize("n", range(6))
def test_it(n, capfd):
    with open("ran", "a") as f:
        f.write(f"{{__name__}} {{n}} {{os.getpid() == FIRST}}\\n")
    time.sleep(0.01)
    print("said by", __name__, n)
    assert f"by {{__name__}} {{n}}" in capfd.readouterr().out
    print("seen", "at", n)
    {act}
"""


def suite(folder, act, *flags):
    """(exit status, output, what ran where) of a suite of 5 files of 6 tests that end in `act`."""
    source = Path(__file__).with_name("conftest.py").read_text(encoding="utf-8")
    (folder / "conftest.py").write_text(source.replace("cores() < 2", "False"))
    for i in range(5):
        (folder / f"test_{i}.py").write_text(FILE.format(act=act))
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *flags],
                         cwd=folder, capture_output=True, text=True, timeout=60)
    return run.returncode, run.stdout + run.stderr, (folder / "ran").read_text().splitlines()


def test_every_test_runs_once_in_one_of_two_processes_and_what_fails_is_reported(tmp_path):
    """Rejects reports that are lost, a file that both take or nobody, and output of one process
    that stands in the other's."""
    status, out, ran = suite(tmp_path, "assert n != 4 and (n or __name__ != 'test_3')")
    assert status == 1 and "6 failed, 24 passed" in out
    assert sorted(line[:8] for line in ran) == [f"test_{i} {n}" for i in range(5) for n in range(6)]
    assert {line[9:] for line in ran} == {"True", "False"}
    failed = re.findall(r"FAILED (test_\d).py::test_it\[(\d)\]", out)
    assert sorted(failed) == [(f"test_{i}", n) for i in range(5) for n in ("04" if i == 3 else "4")]
    assert out.count("seen at 4") == 5 and out.count("seen at 0") == 1


@pytest.mark.parametrize("end", ["os._exit(0)", "os.kill(os.getpid(), 9)"])
def test_a_second_process_that_a_test_ends_is_no_success(tmp_path, end):
    """Rejects a suite that is green because half of it was never run."""
    status, out, _ = suite(tmp_path, f"os.getpid() == FIRST or {end}")
    assert status == 3 and "ended early" in out


def test_who_wants_the_first_failure_gets_it(tmp_path):
    """Rejects a run with -x that goes on elsewhere."""
    status, out, ran = suite(tmp_path, "assert n != 4", "-x")
    assert (status, len(ran)) == (1, 5) and "1 failed, 4 passed" in out
