"""``pytest --iocp-loop[=DRIVER]``: the tests of pytest-asyncio, anyio or pytest-aiohttp on this loop, unchanged.

pytest loads this file wherever iocp_loop is installed, so nothing is imported until the option is given.  Then
asyncio's own loop classes make our loops (takeover.py), and each test that ran on other loops alone, or is a coroutine
and ran on none, fails: a suite that is green was on this loop.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator
from typing import Any

import pytest

__all__ = ["pytest_addoption", "pytest_configure"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("iocp_loop").addoption(
        "--iocp-loop",
        nargs="?",
        const="auto",
        metavar="DRIVER",
        help="run asyncio's tests on iocp_loop, on this driver: auto (the default), iocp, uring, poll. "
        "A test that runs on another loop fails.",
    )


def pytest_configure(config: pytest.Config) -> None:
    driver = config.getoption("iocp_loop")
    if driver is None:
        return
    from .loop import IocpEventLoop
    from .ports import DRIVERS, DriverUnavailable, make_driver
    from .takeover import take_over

    if driver not in ("auto", *DRIVERS):
        raise pytest.UsageError(
            f"--iocp-loop={driver}: choose one of auto, {', '.join(DRIVERS)} "
            "(before the name of a test, write --iocp-loop=auto)"
        )
    try:
        carrier = make_driver(driver)
    except DriverUnavailable as error:
        raise pytest.UsageError(f"--iocp-loop: {error}") from error
    carrier.close()
    take_over(driver)
    config.pluginmanager.register(_OnThisLoop(carrier.name, IocpEventLoop), "iocp_loop: on this loop")


class _OnThisLoop:
    """Says where the tests run, and fails those that do not run there."""

    def __init__(self, driver: str, kind: type[Any]) -> None:
        self._driver = driver
        self._kind = kind
        self._ran: set[type[Any]] = set()
        self._note_what_runs()

    def _note_what_runs(self) -> None:
        import asyncio
        from asyncio import events

        set_running_loop = events._set_running_loop

        def noting(loop: asyncio.AbstractEventLoop | None) -> None:
            if loop is not None:
                self._ran.add(type(loop))
            set_running_loop(loop)

        # Every loop calls one of these when its run begins and ends.  uvloop fetches it when it is imported.
        asyncio._set_running_loop = events._set_running_loop = noting

    def pytest_report_header(self) -> str:
        from . import __version__, native

        tier = "Python" if native.hot is None else "native"
        return f"iocp_loop: {__version__}, driver {self._driver}, {tier} tier"

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        self._ran.clear()
        result = yield
        is_coroutine = inspect.iscoroutinefunction(getattr(item, "obj", None))
        if (self._ran or is_coroutine) and not any(issubclass(kind, self._kind) for kind in self._ran):
            others = ", ".join(sorted(f"{kind.__module__}.{kind.__qualname__}" for kind in self._ran))
            pytest.fail(f"--iocp-loop: this test ran on {others or 'no loop of asyncio'}", pytrace=False)
        return result
