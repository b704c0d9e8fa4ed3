"""The native tier in several interpreters, and imported again: its state is the module's."""

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


#: Runs `code` in `count` interpreters at once, each in a thread, and in the main one too.
_IN_INTERPRETERS = """
import sys, threading
code, count = sys.argv[1], int(sys.argv[2])
failures = []

def run():
    try:
        if sys.version_info >= (3, 13):
            import _interpreters as interpreters
            made = interpreters.create("isolated")
            failed = interpreters.exec(made, code)
            if failed is not None:
                failures.append(failed.errdisplay)
        else:
            import _xxsubinterpreters as interpreters
            made = interpreters.create(isolated=True)
            interpreters.run_string(made, code)
        interpreters.destroy(made)
    except Exception as error:
        failures.append(repr(error))

threads = [threading.Thread(target=run) for _ in range(count)]
for thread in threads:
    thread.start()
if count > 1:
    exec(code)
for thread in threads:
    thread.join()
assert not failures, failures[0]
"""

#: Uses it twice, the second time from new modules: nothing holds the first ones any more.
_USE_IT_TWICE = f"""
import gc, sys, weakref

def use():
    names = {{"__name__": "used"}}
    exec({USE_IT!r}, names)
    return weakref.ref(names["native"].hot)

first = use()
for name in [name for name in sys.modules if name.partition(".")[0] == "iocp_loop"]:
    del sys.modules[name]
second = use()
for _ in range(3):
    gc.collect()
assert first() is None and second() is not None, (first(), second())
"""


def run_in_interpreters(code: str, count: int) -> None:
    if sys.version_info >= (3, 13):
        pytest.importorskip("_interpreters", reason="this Python cannot make one", exc_type=ImportError)
    run_python(_IN_INTERPRETERS, code, str(count), IOCP_LOOP_NATIVE="1")


@natively
def test_a_subinterpreter_has_a_native_tier_of_its_own() -> None:
    """One after the other, and each gives back what it had."""
    run_in_interpreters("for _ in range(3):\n    exec(" + repr(_USE_IT_TWICE) + ", {})", 1)


@natively
@pytest.mark.skipif(
    sys.version_info < (3, 12), reason="before 3.12 asyncio's C takes the loops of all interpreters for one's"
)
def test_several_interpreters_run_loops_at_once() -> None:
    run_in_interpreters(USE_IT, 2)


@natively
def test_it_can_be_imported_again() -> None:
    """By whoever empties sys.modules; the first module goes, with its types and its spare objects."""
    run_python(_USE_IT_TWICE)
