"""Reads and writes of files, and of pipes that block, on driver ``uring``.

An operation that shares its file's position with an earlier one, or the order of a pipe's bytes, stands in line: its
request is made when it is the first.  driver.py tells who owns the memory meanwhile.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import deque
from typing import TYPE_CHECKING, Any, TypeAlias

from ... import operations as ops
from ...operations import CANCELLING, Operation
from ..driver import cancelled_error, leak
from .binding import ffi, lib, new_bytes
from .turns import UringTurns

__all__ = ["ASKED_AGAIN", "FileRequest", "FileRequests", "file_of", "is_regular", "status_if_blocking"]

#: Bytes that one request can move, the kernel's MAX_RW_COUNT on the smallest page size.
_MOST = 0x7FFF_F000

#: Results that end a request but not what it was for.
ASKED_AGAIN = frozenset({-errno.ECANCELED, -errno.EINTR})

#: What the functions that queue a request return (an int, but cffi tells no types): 0, or a negative errno.
_Code: TypeAlias = Any


class FileRequest:
    """The `driver_data` of an operation on a file: which file that is, and the memory that the kernel has."""

    __slots__ = ("file", "line", "memory")

    def __init__(self, op: Operation, status: os.stat_result) -> None:
        self.file = status.st_dev, status.st_ino
        self.memory = _memory_of(op)
        # Who shares a position, or the order of a pipe's bytes: a regular file has one position for both directions.
        self.line = op.fd, *self.file, type(op) is ops.Write and not stat.S_ISREG(status.st_mode)


if TYPE_CHECKING:
    _Base = UringTurns
else:
    _Base = object


class FileRequests(_Base):
    """What driver ``uring`` does for the operations Read, ReadInto and Write."""

    _lines: dict[tuple[int, ...], deque[Operation]]  # who must not overtake each other on a file

    if TYPE_CHECKING:  # the rest of the driver: UringDriver's

        def _arm(self, op: Any) -> None: ...
        def _end(self, op: Operation, value: Any, error: BaseException | None = None) -> None: ...

    def _submit_file(self, op: Any) -> None:
        """Queue the request, or let `op` stand in line if it shares the file's position with an earlier one."""
        if op.offset is None:
            line = self._lines.setdefault(op.driver_data.line, deque())
            line.append(op)
            if len(line) > 1:
                return
        self._arm(op)

    def _waits_in_line(self, op: Any) -> bool:
        return op.offset is None and self._lines[op.driver_data.line][0] is not op

    def _leave_line(self, op: Any) -> None:
        """`op` has ended: the next in its line has its turn."""
        line = self._lines.get(op.driver_data.line) if op.offset is None else None
        if line is None:
            return
        was_first = line[0] is op
        line.remove(op)
        if not line:
            del self._lines[op.driver_data.line]
        elif was_first and not self.closed:
            following = line[0]
            if file_of(following.fd) == following.driver_data.file:
                self._arm(following)
            else:  # the number has become another file's
                self._finish(following, None, OSError(errno.EBADF, os.strerror(errno.EBADF)))

    def _queue_file_request(self, op: Any) -> _Code:
        memory = op.driver_data.memory
        prepare = lib.uring_prep_write if type(op) is ops.Write else lib.uring_prep_read
        request = self._ring, op.fd, op.token
        offset = -1 if op.offset is None else op.offset
        if type(op) is ops.Read:
            return prepare(*request, memory, min(len(memory), _MOST), offset)
        with ffi.from_buffer(memory) as data:  # let go at once, even by an error whose traceback lives on
            return prepare(*request, data, min(len(data), _MOST), offset)

    def _move_file_request(self, op: Any, had_ring: bool) -> None:
        """Submit `op` to a new ring, perhaps after another ring had it."""
        if had_ring:
            # A worker thread of the old ring may still be busy with the memory, and may have moved the position of a
            # regular file, so that it can't be done again.
            leak(op)
            if op.offset is None and is_regular(op.fd):
                self._finish(op, None, cancelled_error())
                return
        if file_of(op.fd) == op.driver_data.file:
            self._arm(op)
        else:
            self._finish(op, None, OSError(errno.EBADF, os.strerror(errno.EBADF)))

    def _reap_file(self, op: Any, result: int) -> None:
        if result >= 0:
            memory = op.driver_data.memory
            self._end(op, ffi.buffer(memory, result)[:] if type(op) is ops.Read else result)
        elif result not in ASKED_AGAIN:
            self._end(op, None, OSError(-result, os.strerror(-result)))
        elif op.state is CANCELLING:
            self._end(op, None, cancelled_error())
        else:
            self._arm(op)


def _memory_of(op: Any) -> Any:
    """The memory that the kernel reads or writes for an operation on a file."""
    if type(op) is ops.Read:
        return new_bytes(op.size)
    return memoryview(op.data if type(op) is ops.Write else op.buffer)


def file_of(fd: int) -> tuple[int, int]:
    """What tells the file behind a descriptor from others; of no file where the number means none."""
    try:
        status = os.fstat(fd)
    except OSError:
        return -1, -1
    return status.st_dev, status.st_ino


def is_regular(fd: int) -> bool:
    return stat.S_ISREG(os.fstat(fd).st_mode)


def status_if_blocking(fd: int) -> os.stat_result | None:
    """The status of a file on which calls may block; None for others.  OSError if `fd` is closed."""
    status = os.fstat(fd)
    mode = status.st_mode
    return status if stat.S_ISREG(mode) or stat.S_ISBLK(mode) or os.get_blocking(fd) else None
