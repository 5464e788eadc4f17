"""The table of wrong programs is a good one: each is held against a test, and none is stale."""
import pytest

import policy.test_exact  # noqa: F401
import speculative
import test_clasp
import tests.test_numerics  # noqa: F401
from speculative import acceptance
from tests.wrong_programs import HELD, NAMED, WRONG, edit, put, rejects, running


def test_every_wrong_program_is_rejected_by_some_test():
    """Rejects a row that no test imported here is held against, twice one name, and a stale one."""
    assert HELD == NAMED.keys()
    assert len(NAMED) == sum(map(len, WRONG.values()))


def test_a_wrong_program_is_in_place_wherever_it_was_imported_and_only_for_a_while():
    """Rejects a table that judges the right program by mistake, or leaves a wrong one behind."""
    right = speculative.acceptance
    for change in (put(speculative, "acceptance", lambda p, q: p),
                   edit(speculative, "acceptance", ("clamp(max=1)", "clamp(max=2)"))):
        with running(change):
            assert speculative.acceptance is not right
            assert acceptance is speculative.acceptance is test_clasp.acceptance
        assert acceptance is speculative.acceptance is test_clasp.acceptance is right


def test_neither_a_stale_change_nor_a_tests_silence_is_a_rejection():
    """Rejects a row whose place is gone that passes for a rejected one, and a test that is too
    kind."""
    for change in (put(speculative, "no_such", None), edit(speculative, "no_such", ("a", "b")),
                   edit(speculative, "acceptance", ("no such text", ""))):
        with pytest.raises((AttributeError, LookupError)), running(change):
            pass
    with pytest.raises(pytest.fail.Exception, match="not rejected: residual = p"):
        rejects("residual = p")(lambda: None)()
