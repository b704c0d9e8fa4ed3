"""Sending a file over a socket, chunk after chunk, each one an operation: by the system, or else by copying.

Used by ``loop.sock_sendfile`` on plain sockets and by ``loop.sendfile`` on transports; they differ in who submits.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
from asyncio import SendfileNotAvailableError
from collections.abc import Callable
from typing import Any

from ..operations import SendAll, SendFile

__all__ = ["Submit", "begin_at", "check_regular", "copy_file", "send_file"]

#: Submits an operation, and gives the Future of the number of bytes that were sent.
Submit = Callable[[SendAll | SendFile], asyncio.Future[int]]

#: The most that one operation sends, bytes.  Linux takes 2 GiB - 4 KiB in one call, TransmitFile 2 GiB - 2.
_CHUNK = 1 << 30

#: The most that is copied at a time, bytes.
_BLOCK = 256 * 1024

#: Errors that are about the file or the system, not about the connection: copying may still work.
_NOT_AVAILABLE = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ESPIPE, errno.EOVERFLOW})


async def send_file(submit: Submit, sock: socket.socket, file: Any, offset: int, count: int | None) -> int:
    """Send `count` bytes of `file` (None: all) from `offset`, in bytes; the number of bytes sent.

    Stops early at the end of the file.  Afterwards, also after an error, the file stands behind the last byte sent, or
    at `offset` if there is none.
    Raises SendfileNotAvailableError, with nothing sent, where the system can't do it for this file.
    """
    number = check_regular(file)
    sent = 0
    try:
        while count is None or sent < count:
            chunk = _CHUNK if count is None else min(_CHUNK, count - sent)
            op = SendFile(sock, number, offset + sent, chunk)
            future = submit(op)
            try:
                taken = await future
            except asyncio.CancelledError:
                sent += await _sent_in_spite(op, future)
                raise
            if not taken:
                break
            sent += taken
    except NotImplementedError as exc:
        raise SendfileNotAvailableError(str(exc)) from exc
    except OSError as exc:
        if not sent and exc.errno in _NOT_AVAILABLE:
            raise SendfileNotAvailableError(f"the system can't send this file by itself: {exc}") from exc
        if exc.errno == errno.ENOTCONN and not isinstance(exc, ConnectionError):
            raise ConnectionError(errno.ENOTCONN, "the connection was closed while a file was sent") from exc
        raise
    finally:
        with contextlib.suppress(OSError):  # somebody has closed it
            os.lseek(number, offset + sent, os.SEEK_SET)
    return sent


async def copy_file(submit: Submit, sock: socket.socket, file: Any, offset: int, count: int | None) -> int:
    """As :func:`send_file`, by way of memory: for anything with ``readinto``, which is called in a thread."""
    begin_at(file, offset)
    memory = memoryview(bytearray(_BLOCK if count is None else min(_BLOCK, count)))
    loop = asyncio.get_running_loop()
    sent = 0
    try:
        while count is None or sent < count:
            room = memory if count is None else memory[: count - sent]
            size = await loop.run_in_executor(None, file.readinto, room)
            if not size:
                break
            op = SendAll(sock, [memory[:size]])
            future = submit(op)
            try:
                await future
            except asyncio.CancelledError:
                await _sent_in_spite(op, future)
                raise
            finally:
                sent += op.sent
    finally:
        with contextlib.suppress(AttributeError, OSError):  # a pipe has no position
            file.seek(offset + sent)
    return sent


def begin_at(file: Any, offset: int) -> None:
    """Have `file` read from `offset`, in bytes; one that has no position begins where it is, if that is asked for."""
    with contextlib.nullcontext() if offset else contextlib.suppress(AttributeError, OSError):
        file.seek(offset)


async def _sent_in_spite(op: SendAll | SendFile, future: asyncio.Future[int]) -> int:
    """How many bytes an operation had sent whose sender was cancelled; known when the kernel has given it back."""
    if not op.in_flight:
        # The sender was cancelled in the turn in which it would have learned it.
        return future.result() if future.done() and not future.cancelled() and future.exception() is None else 0
    count: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    complete = op.complete

    def completed(value: Any, error: BaseException | None) -> None:
        complete(value, error)
        if not count.done():
            count.set_result(value or 0)

    op.complete = completed
    return await count


def check_regular(file: Any) -> int:
    """The descriptor of `file`.  SendfileNotAvailableError if it is nothing that the system can send by itself."""
    try:
        number: int = file.fileno()
        mode = os.fstat(number).st_mode
    except (AttributeError, OSError) as exc:  # io.UnsupportedOperation is an OSError
        raise SendfileNotAvailableError(f"not a regular file: {file!r}") from exc
    if not stat.S_ISREG(mode):
        raise SendfileNotAvailableError(f"not a regular file: {file!r}")
    return number
