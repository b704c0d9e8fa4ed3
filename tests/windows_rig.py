"""Handles, pipes and requests of Windows, as its tests use them.  To be imported on Windows only."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

if sys.platform != "win32":
    raise ImportError("for Windows only")

import _winapi
from asyncio import windows_utils

from iocp_loop import CompletionPort
from iocp_loop import operations as ops
from iocp_loop.ports.iocp import handles as windows_handles
from iocp_loop.ports.iocp.binding import ABORTED, RETRY, ffi, lib
from iocp_loop.ports.iocp.driver import IocpDriver

from .support import LIMIT


class Handle:
    """A HANDLE with a fileno(), as pipes of asyncio have it."""

    def __init__(self, number: int) -> None:
        self.number = number

    def fileno(self) -> int:
        return self.number

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        _winapi.CloseHandle(self.number)


@contextlib.contextmanager
def overlapped_pipe() -> Iterator[tuple[Handle, Handle]]:
    """The two ends of an overlapped named pipe."""
    name = rf"\\.\pipe\iocp_loop-test-{os.getpid()}-{time.perf_counter_ns()}"
    server, client = ffi.new("uintptr_t *"), ffi.new("uintptr_t *")
    assert lib.iocp_pipe_serve(name, 1, 65536, server) == 0
    assert lib.iocp_pipe_connect(name, client) == 0
    with Handle(server[0]) as one, Handle(client[0]) as other:
        yield one, other


def result(port: CompletionPort, operation: ops.Operation) -> Any:
    """Submit `operation` and wait for its completion, which must be the next one."""
    port.submit(operation)
    completion = port.get(LIMIT)
    assert completion is not None
    assert completion.operation is operation
    return completion.result()


def raw_client(address: str) -> Any:
    """A client's end by itself."""
    return windows_utils.PipeHandle(windows_handles.connect_pipe(address))


def leave_undone(driver: IocpDriver, code: int) -> None:
    """End every request as the end of the thread that made it may: without the result, and cancelled by nobody."""
    for sub in driver._outstanding.values():
        assert lib.iocp_cancel(sub.native) == 0
    driver.wait(LIMIT)
    assert driver._port.count == len(driver._outstanding)
    for n in range(driver._port.count):
        driver._port.batch[3 * n + 2] = code
    driver.dispatch()


UNDONE = {"unfinished": RETRY, "cancelled": ABORTED}
