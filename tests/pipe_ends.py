"""The two ends of pipes, as a loop reads and writes them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

from .support import WINDOWS, Recorder, turns


def closed(end: Any) -> bool:
    """Whether an end of a pipe, a file or a PipeHandle, is closed."""
    return bool(end.closed if hasattr(end, "closed") else end.handle is None)


async def take(reader: Any, count: int) -> bytes:
    """Read `count` bytes from a file.  On Unix what was written has gone out at once."""
    if not WINDOWS:
        return bytes(reader.read(count))
    got = b""
    while len(got) < count and (piece := await asyncio.to_thread(reader.read, count - len(got))):
        got += piece
    return got


@contextlib.asynccontextmanager
async def read_end(file: Any, protocol: Any = None) -> AsyncIterator[Any]:
    """A protocol connected to the reading end `file`."""
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.connect_read_pipe(lambda: protocol or Recorder(), file)
    try:
        yield protocol
    finally:
        transport.close()
        await turns()


@contextlib.asynccontextmanager
async def write_end(file: Any) -> AsyncIterator[Any]:
    """A protocol connected to the writing end `file`."""
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.connect_write_pipe(Recorder, file)
    try:
        yield protocol
    finally:
        transport.abort()
        await turns()


def fill(fd: int) -> int:
    """Write to a non-blocking descriptor until it takes no more; the number of bytes."""
    assert sys.platform != "win32"
    os.set_blocking(fd, False)
    total = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            total += os.write(fd, b"x" * 65536)
    return total
