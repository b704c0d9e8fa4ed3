"""Real libraries on this loop: the cases of ``tests/apps``, on each driver; what is not installed is skipped."""

from __future__ import annotations

import pytest

from .apps import everything
from .apps.__main__ import outcome

CASES = everything()


@pytest.mark.parametrize("name", sorted(CASES))
def test_library(name: str, driver: str) -> None:
    case = CASES[name]
    reason = case.missing()
    if reason:
        pytest.skip(reason)
    assert outcome(case, driver) == ""
