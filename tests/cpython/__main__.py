"""How many of CPython's own tests of event loops pass on a loop, ours or another: ``python -m tests.cpython uvloop``.

These are the mixins of suite.py, which CPython itself runs once for each of its loops.  Each test has a process of its
own, so that one that crashes or hangs costs no other.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import subprocess
import sys
import tempfile
import unittest
from typing import Any

from .suite import MIXINS, Source, bases_of, loops_that_run

#: Seconds for one test; CPython's slowest takes a few.
LIMIT = 30

PASSED, FAILED, SKIPPED = 0, 1, 2


def _case(source: Source, factory: Any) -> Any:
    """The test class of one group on loops of `factory`."""

    class Case(*bases_of(source)):  # type: ignore[misc]  # the bases are known when it runs
        def create_event_loop(self) -> Any:
            return factory()

        new_loop = create_event_loop

        def setUp(self) -> None:
            super().setUp()
            if not hasattr(self, "loop") and hasattr(self, "set_event_loop"):
                self.loop = factory()
                self.set_event_loop(self.loop)

    return Case


def _close(loop: asyncio.AbstractEventLoop) -> None:
    """In place of CPython's, which looks into private parts."""
    if not loop.is_closed():
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


def _names(source: Source) -> list[str]:
    return list(unittest.TestLoader().getTestCaseNames(_case(source, None)))


def _run_one(factory: Any, group: str, test: str) -> int:
    """Run one test here.  A test in which a loop of another kind ran has failed."""

    class Policy(asyncio.DefaultEventLoopPolicy):
        def new_event_loop(self) -> Any:
            return factory()

    asyncio.set_event_loop_policy(Policy())
    importlib.import_module("test.test_asyncio.utils").TestCase.close_loop = staticmethod(_close)
    made = factory()
    kind = type(made)
    made.close()
    (source,) = (source for source in MIXINS if source.name == group)
    suite = unittest.TestSuite([_case(source, factory)(test)])  # a suite, for the fixtures of the class
    # Some of CPython's tests make files where they stand.
    with loops_that_run() as loops, tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        result = unittest.TextTestRunner(stream=sys.stderr).run(suite)
    if result.skipped:
        return SKIPPED
    return PASSED if result.wasSuccessful() and all(type(loop) is kind for loop in loops) else FAILED


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cpython", description=__doc__)
    parser.add_argument("loop", help="a module with new_event_loop: asyncio, uvloop, winloop, iocp_loop, ...")
    parser.add_argument("--one", help="run only this test, Group.test_name, in this process")
    options = parser.parse_args()
    if options.one:
        module: Any = importlib.import_module(options.loop)
        stock: Any = asyncio.DefaultEventLoopPolicy
        factory = stock._loop_factory if module is asyncio else module.new_event_loop
        return _run_one(factory, *options.one.split("."))
    names: dict[int, list[str]] = {PASSED: [], FAILED: [], SKIPPED: []}
    for source in MIXINS:
        for test in _names(source):
            name = f"{source.name}.{test}"
            command = [sys.executable, "-m", "tests.cpython", options.loop, "--one", name]
            try:
                code = subprocess.run(command, capture_output=True, timeout=LIMIT).returncode
            except subprocess.TimeoutExpired:
                code = FAILED
            names[code if code in names else FAILED].append(name)
    for code, word in (SKIPPED, "skipped"), (FAILED, "failed"):
        for name in names[code]:
            print(f"{word}: {name}")
    passed, failed = len(names[PASSED]), len(names[FAILED])
    print(f"{options.loop}: {passed} of {passed + failed} passed, Python {sys.version.split()[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
