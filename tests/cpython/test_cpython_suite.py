"""Runs the tests that suite.py makes: one class for each group of CPython's tests and each driver.

pytest tests/cpython -k poll               # one driver
pytest tests/cpython -k "Sock_ and uring"  # one group on one driver
"""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from iocp_loop.ports import choice

try:
    importlib.import_module("test.test_asyncio")
except ImportError as error:
    pytest.skip(
        f"this Python comes without its test package ({error}); Debian has it in libpython3.*-testsuite",
        allow_module_level=True,
    )

from ..support import LIMIT, ROOT, WINDOWS
from .expected_failures import EXPECTED_FAILURES
from .suite import make_case, sources

#: On Windows poll is available too, but is no loop for pipes, processes and all that only iocp has.
DRIVERS = [name for name in choice.DRIVERS if choice.availability(name).available]
if "iocp" in DRIVERS:
    DRIVERS = ["iocp"]

globals().update((f"{source.name}_{driver}", make_case(source, driver)) for driver in DRIVERS for source in sources())


@pytest.mark.parametrize("name", choice.DRIVERS)
def test_driver_is_covered(name: str) -> None:
    """A driver that can't work here is named in the summary, not passed over in silence."""
    driver = choice.availability(name)
    if driver.available and name not in DRIVERS:
        pytest.skip(f"on Windows CPython's tests run on driver iocp, not on {name}")
    if not driver.available:
        pytest.skip(f"CPython's tests do not run on driver {name}: {driver.reason}")
    assert f"EventLoop_{name}" in globals()


def test_every_expected_failure_is_a_test() -> None:
    """A name in the list that no group has any more must go."""
    for listed in EXPECTED_FAILURES:
        group, _, test = listed.partition(".")
        case = globals().get(f"{group}_{DRIVERS[0]}")
        assert hasattr(case, test), listed


@pytest.mark.skipif(WINDOWS or sys.version_info >= (3, 16), reason="it is for Unix, and needs policies")
@pytest.mark.parametrize(("loop", "test", "code"), [
    ("iocp_loop", "Sock.test_sock_accept", 0),
    ("iocp_loop", "EventLoop.test_internal_fds", 2),
    ("asyncio", "EventLoop.test_internal_fds", 0),
])  # fmt: skip
def test_the_program_that_counts(loop: str, test: str, code: int) -> None:
    """`python -m tests.cpython`, with one test: 0 if it passes, 1 if it fails, 2 if it is skipped."""
    command = [sys.executable, "-m", "tests.cpython", loop, "--one", test]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3 * LIMIT, check=False)
    assert done.returncode == code, done.stderr
