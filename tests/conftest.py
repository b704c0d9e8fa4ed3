"""Fixtures that every test file shares, first of all `driver`: the test runs once on each driver of this machine."""

from __future__ import annotations

import asyncio
import gc
import importlib
import inspect
import itertools
import os
import selectors
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from typing import Any, cast

import pytest
from hypothesis import settings

import iocp_loop
from iocp_loop.ports import DRIVERS, availability, make_driver

from .rig import POLLERS, Rig, driver_of_another_system
from .support import LIMIT, WINDOWS, listening_socket, open_files, tcp_pair

# A test that fails, fails again; and a busy machine is no failure.
settings.register_profile("project", derandomize=True, database=None, deadline=None)
settings.load_profile("project")

_numbers = itertools.count()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--driver",
        action="append",
        choices=DRIVERS,
        help="run on this driver only; may be given several times (default: IOCP_LOOP_DRIVER, else all that work here)",
    )


def drivers_to_test(config: pytest.Config) -> list[str]:
    """The names of the drivers that tests run on."""
    named: list[str] | None = config.getoption("driver")
    if named:
        return named
    forced = os.environ.get("IOCP_LOOP_DRIVER", "auto")
    return [forced] if forced != "auto" else [name for name in DRIVERS if availability(name).available]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "every_poller: the test runs on the pollers and the waker of other systems too")


def pytest_report_header(config: pytest.Config) -> str:
    return f"drivers: {', '.join(drivers_to_test(config))}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "driver" not in metafunc.fixturenames:
        return
    drivers = drivers_to_test(metafunc.config)
    if "poll" in drivers and any(metafunc.definition.iter_markers("every_poller")):
        drivers = [*drivers, *(f"poll-{kind.__name__}" for kind in POLLERS)]
    metafunc.parametrize("driver", drivers, scope="session")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a coroutine test on its `loop`."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj) or "loop" not in pyfuncitem.fixturenames:
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in inspect.signature(pyfuncitem.obj).parameters}
    cast("iocp_loop.IocpEventLoop", pyfuncitem.funcargs["loop"]).run_until_complete(
        asyncio.wait_for(pyfuncitem.obj(**arguments), 3 * LIMIT)
    )
    return True


@pytest.fixture
def no_leak() -> Iterator[None]:
    """Fails the test if it leaves descriptors open, where the system tells which are open."""
    before = open_files()
    yield
    after = open_files()
    if after is None or before is None:
        return
    if after - before:
        gc.collect()
        after = open_files() or set()
    left = {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in after - before}
    assert not left, f"descriptors left open: {left}"


@pytest.fixture
def reports() -> list[dict[str, Any]]:
    """What the loop's exception handler was told.  A test takes out what it expects; what stays is a failure."""
    return []


@pytest.fixture
def loop(driver: str, no_leak: None, reports: list[dict[str, Any]]) -> Iterator[iocp_loop.IocpEventLoop]:
    """A loop on `driver`.  At the end nothing may be in flight, reported or left open."""
    loop = iocp_loop.new_event_loop(driver)
    loop.set_exception_handler(lambda _, context: reports.append(context))
    yield loop
    settle(loop)
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.run_until_complete(loop.shutdown_default_executor())
    left = list(loop._proactor.in_flight.values())
    loop.close()
    assert not left, f"still in flight: {left}"
    assert not reports, f"reported: {reports}"


def settle(loop: iocp_loop.IocpEventLoop) -> None:
    """End what tasks are left, and let what was cancelled come back."""
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.wait(tasks, timeout=LIMIT))
    deadline = time.monotonic() + 1
    loop.run_until_complete(asyncio.sleep(0))
    while loop._proactor.in_flight and time.monotonic() < deadline:
        loop.run_until_complete(asyncio.sleep(0.001))


@pytest.fixture
def pair(no_leak: None) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two connected TCP sockets: ours, non-blocking, and the peer, blocking with a time limit."""
    ours, peer = tcp_pair()
    with ours, peer:
        yield ours, peer


@pytest.fixture
def pipe() -> Iterator[tuple[Any, Any]]:
    """The two ends of an overlapped named pipe of Windows."""
    rig: Any = importlib.import_module(".windows_rig", __package__)  # for Windows only
    with rig.overlapped_pipe() as ends:
        yield ends


@pytest.fixture
def listener(no_leak: None) -> Iterator[socket.socket]:
    """A non-blocking TCP socket that listens on the loopback interface."""
    with listening_socket() as sock:
        yield sock


@pytest.fixture
def rig(driver: str, monkeypatch: pytest.MonkeyPatch, no_leak: None) -> Iterator[Rig]:
    """A driver by itself.  At the end nothing may be in flight."""
    name, _, poller = driver.partition("-")
    rig = Rig(driver_of_another_system(getattr(selectors, poller), monkeypatch) if poller else make_driver(name))
    yield rig
    rig.driver.close()
    assert not rig.driver.in_flight


@pytest.fixture
def address() -> str:
    """A name that no named pipe of Windows has."""
    return rf"\\.\pipe\iocp_loop-test-{os.getpid()}-{next(_numbers)}"


@pytest.fixture
def display() -> Iterator[str]:
    """The name of a display to open windows on: one that nobody sees, else the user's own."""
    pytest.importorskip("tkinter", reason="this Python has no tkinter")
    if shutil.which("Xvfb") is None:
        if not WINDOWS and not os.environ.get("DISPLAY"):
            pytest.skip("there is neither a display nor Xvfb")
        yield os.environ.get("DISPLAY", "")
        return
    with subprocess.Popen(
        ["Xvfb", "-displayfd", "1", "-nolisten", "tcp"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        assert server.stdout is not None
        yield f":{server.stdout.readline().strip()}"
        server.terminate()
