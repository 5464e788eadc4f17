"""The table of wrong programs is a good one: each is held against a test, and none is stale."""
import pytest

import policy.test_exact  # noqa: F401
import speculative
import test_clasp
import tests.test_numerics
import tests.test_printed  # noqa: F401
from speculative import acceptance
from tests.wrong_programs import HELD, NAMED, WRONG, Stale, altered, edit, put, rejects, running


def test_every_wrong_program_is_rejected_by_some_test():
    """Rejects a row that no test is held against, two rows of one name, and a name that no row has.
    (The tests above are imported for what `@rejects` notes.)"""
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


def test_a_change_whose_place_is_gone_is_no_rejection():
    """Rejects a stale row that passes for a rejected one."""
    for change in (put(speculative, "no_such", None), edit(speculative, "no_such", ("a", "b")),
                   edit(speculative, "acceptance", ("no such text", ""))):
        with pytest.raises(Stale), running(change):
            pass
    with pytest.raises(Stale):
        altered(speculative, ("no such text", ""))
    assert not issubclass(Stale, AssertionError)


def test_a_test_that_is_too_kind_is_told_so():
    """Rejects a decorator that takes a test's silence for a rejection."""
    with pytest.raises(pytest.fail.Exception, match="not rejected: residual = p"):
        rejects("residual = p")(lambda: None)()
