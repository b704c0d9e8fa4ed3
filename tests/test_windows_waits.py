"""Waits for handles on Windows."""

from __future__ import annotations

import asyncio
import errno
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

if sys.platform != "win32":
    pytest.skip("waits of this kind exist on Windows only", allow_module_level=True)

import _overlapped
import _winapi
from asyncio import windows_utils

import iocp_loop
from iocp_loop import operations as ops
from iocp_loop.ports.iocp.binding import lib

from .support import LIMIT, WINE, turns, until

Loop = iocp_loop.IocpEventLoop
PipeHandle: Any = windows_utils.PipeHandle


#: What a system may do with its wait completion packets: carry them out, say of one that comes that its cancel is
#: pending, refuse to associate them.
@pytest.fixture(autouse=True, params=["", "pending", "refuse"])
def packets(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param and not (WINE and lib.iocp_has_wait_packets()):
        pytest.skip("this is no emulation of wait completion packets, which could be told to do that")
    monkeypatch.setenv("IOCP_LOOP_EMULATE", request.param)


@pytest.fixture
def event() -> Iterator[int]:
    """An event that is not set."""
    number = _overlapped.CreateEvent(None, True, False, None)
    yield number
    _winapi.CloseHandle(number)


async def test_wait_for_a_handle(loop: Loop, event: int) -> None:
    waiting = loop._proactor.wait_for_handle(event)
    await asyncio.sleep(0.01)
    assert not waiting.done()
    _overlapped.SetEvent(event)
    assert await waiting is True
    assert await loop._proactor.wait_for_handle(event) is True


async def test_wait_for_a_handle_for_some_time(loop: Loop, event: int) -> None:
    started = time.monotonic()
    assert await loop._proactor.wait_for_handle(event, 0.05) is False
    assert time.monotonic() - started >= 0.04
    await turns()
    assert not loop._proactor.in_flight
    _overlapped.SetEvent(event)
    assert await loop._proactor.wait_for_handle(event, LIMIT) is True


async def test_cancel_a_wait_for_a_handle(loop: Loop, event: int) -> None:
    for _ in range(3):
        waiting = loop._proactor.wait_for_handle(event)
        await turns(2)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await turns()
        assert not loop._proactor.in_flight


async def test_a_cancel_that_meets_the_signal_half_way(loop: Loop, event: int) -> None:
    for delay in range(20):
        got: list[Any] = []
        op = ops.WaitForHandle(event)
        loop._proactor.start(op, lambda value, error: got.append((value, error)))  # noqa: B023 - awaited here
        _overlapped.SetEvent(event)
        time.sleep(delay / 10_000)  # noqa: ASYNC251 - the loop is to stand still
        loop._proactor.cancel(op)
        await until(lambda: not op.in_flight)  # noqa: B023 - awaited here
        await turns()
        assert len(got) == 1
        value, error = got[0]
        assert value is True or (error is not None and error.errno == errno.ECANCELED)
        _overlapped.ResetEvent(event)


async def test_waits_for_many_handles_leave_nothing(loop: Loop) -> None:
    events = [_overlapped.CreateEvent(None, True, False, None) for _ in range(100)]
    waiting = [loop._proactor.wait_for_handle(each) for each in events]  # more than one thread can wait for by itself
    await turns()
    for each in events:
        _overlapped.SetEvent(each)
    assert await asyncio.gather(*waiting) == [True] * len(events)
    for each in events:
        _winapi.CloseHandle(each)
    assert not loop._proactor.in_flight


def test_a_loop_closes_under_a_wait(driver: str, event: int) -> None:
    loop = iocp_loop.new_event_loop(driver)
    waiting = loop._proactor.wait_for_handle(event)
    started = time.monotonic()
    loop.close()
    assert time.monotonic() - started < 1.5  # taken back, not waited for
    assert waiting.cancelled()
    _overlapped.SetEvent(event)
    time.sleep(0.02)


async def test_what_cannot_be_waited_for(loop: Loop) -> None:
    with pytest.raises(OSError) as caught:
        await loop._proactor.wait_for_handle(0xFFFC)
    assert caught.value.winerror == 6  # ERROR_INVALID_HANDLE
    assert not loop._proactor.in_flight
