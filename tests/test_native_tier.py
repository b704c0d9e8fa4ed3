"""Which tier is in force: the native one, or the one in Python.

What a tier does is tested where its subject is, and those tests run on both (``make test-python-tier``).
"""

from __future__ import annotations

import sys
from typing import Any

import pytest

import iocp_loop
from iocp_loop import native

from .programs import USE_IT
from .support import run_python

Loop = iocp_loop.IocpEventLoop
Reports = list[dict[str, Any]]

natively = pytest.mark.skipif(native.hot is None, reason=f"the native tier is not in force: {native.why_not}")


_TRY_TO_IMPORT = """
try:
    import iocp_loop.loop
except ImportError as error:
    print(error)
"""

_WITHOUT_HOT = "import sys; sys.modules['iocp_loop._hot'] = None\n"


def test_the_python_tier_is_used_if_the_environment_says_so() -> None:
    assert run_python(USE_IT, IOCP_LOOP_NATIVE="0").stdout == "False IOCP_LOOP_NATIVE=0\n"


@natively
@pytest.mark.parametrize("value", ["1", "auto", ""])
def test_the_native_tier_is_used_if_it_may_be(value: str) -> None:
    assert run_python(USE_IT, IOCP_LOOP_NATIVE=value).stdout == "True \n"


def test_without_the_extension_module_everything_works_in_python() -> None:
    done = run_python(_WITHOUT_HOT + USE_IT, IOCP_LOOP_NATIVE="")
    assert done.stdout.startswith("False iocp_loop._hot was not built")


def test_a_native_tier_that_is_demanded_and_missing_is_an_error() -> None:
    done = run_python(_WITHOUT_HOT + _TRY_TO_IMPORT, IOCP_LOOP_NATIVE="1")
    assert "IOCP_LOOP_NATIVE=1, but iocp_loop._hot was not built" in done.stdout


@pytest.mark.skipif(getattr(sys, "_is_gil_enabled", lambda: True)(), reason="this Python has the GIL on")
def test_importing_the_package_leaves_the_gil_off() -> None:
    """And it is used as it is."""
    done = run_python("import sys\n" + USE_IT + "print(sys._is_gil_enabled())", IOCP_LOOP_NATIVE="")
    assert done.stdout == "True \nFalse\n"


def test_a_value_that_means_nothing_is_an_error() -> None:
    done = run_python(_TRY_TO_IMPORT, IOCP_LOOP_NATIVE="yes")
    assert "IOCP_LOOP_NATIVE=yes: it must be 0" in done.stdout
