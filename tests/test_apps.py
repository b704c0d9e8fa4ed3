"""Real libraries on this loop: the cases of ``tests/apps``, on each driver; what is not installed is skipped."""

from __future__ import annotations

import pytest

from .apps import everything
from .apps.__main__ import outcome
from .support import WINDOWS

#: The cases use UNIX sockets and Debian's servers.
CASES = {} if WINDOWS else everything()

#: What may fail, and why.
MAY_FAIL = {
    "uvicorn_workers": "workers that accept from one inherited socket share its connections unevenly",
}


@pytest.mark.parametrize("name", sorted(CASES))
def test_library(name: str, driver: str) -> None:
    case = CASES[name]
    reason = case.missing()
    if reason:
        pytest.skip(reason)
    why = outcome(case, driver)
    if why and name in MAY_FAIL:
        pytest.xfail(f"{MAY_FAIL[name]}: {why}")
    assert why == ""
