"""The mutants of mutants.py have not rotted: their text and their tests are still there."""

import pytest

from .mutants import MUTANTS, ROOT, occurrences


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_can_be_made(mutant):
    assert occurrences(mutant) == 1
    assert mutant.after != mutant.before
    for test in mutant.tests:
        file, function = test.split("[")[0].split("::")
        assert f"def {function}(" in (ROOT / "tests" / "referee" / file).read_text()


def test_mutants_have_names_of_their_own():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
