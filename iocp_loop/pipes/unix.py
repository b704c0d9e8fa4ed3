"""Pipe transports on Unix: one end of a pipe, FIFO, socket, terminal or character device, and an asyncio Protocol.

Descriptors of these kinds are served by readiness: the driver tells that one is ready, and the transport then reads or
writes without blocking.  So nothing is ever half read in the background, and a pause or a close loses no data.

A few devices (``/dev/null``, ``/dev/zero``) are always ready, and a poller may refuse them for that reason.  They are
read once per turn of the loop.

The reading end of a pipe cannot be told apart from the writing end by its readiness alone, and need not be: when the
reader of a pipe goes away, the writing end reports an error condition, which every poller delivers unasked.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import functools
import os
import socket
import stat
import sys
from collections.abc import Callable, Iterable
from typing import Any

from .. import operations as ops
from ..life import CLOSE, CLOSING, LOST, OVER
from ..operations import READABLE, WRITABLE, was_cancelled
from ..proactor import Proactor
from .transports import PipeTransport, ReadingSide, WritingSide

if sys.platform == "win32":
    raise ImportError("the transports of this module are for Unix")

__all__ = ["ReadPipeTransport", "WritePipeTransport"]

#: Bytes per read: what a pipe holds on Linux unless somebody made it larger, see pipe(7).
READ_SIZE = 64 * 1024


class _Watching(PipeTransport):
    """A descriptor, and the operations that tell when it is ready."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        proactor: Proactor,
        pipe: Any,
        protocol: asyncio.BaseProtocol,
        waiter: asyncio.Future[None] | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        self._fd: int = pipe.fileno()
        self._mode = os.fstat(self._fd).st_mode
        if not (stat.S_ISFIFO(self._mode) or stat.S_ISSOCK(self._mode) or stat.S_ISCHR(self._mode)):
            raise ValueError("Pipe transport is only for pipes, sockets and character devices")
        os.set_blocking(self._fd, False)
        self._proactor = proactor
        self._watches: set[ops.Operation] = set()
        super().__init__(loop, pipe, protocol, waiter, extra)

    def _start(self) -> None:
        if self._state < CLOSING:
            self._arm()

    def _arm(self) -> None:
        """Start to wait for what comes by itself: data, or the end."""
        raise NotImplementedError

    def _details(self) -> str:
        return f"fd={self._fd}"

    def _watch_readable(self, ready: Callable[[], object]) -> ops.ReadinessStream | None:
        """Call `ready` whenever there is something to read; None where the poller refuses what is always ready."""

        def deliver(events: Any, error: BaseException | None) -> None:
            if op.state is ops.DONE:
                self._watch_is_over(op)
            self._watch_tells(ready, error)

        begin = self._proactor.watch_natively
        begun = None if begin is None else begin(self._pipe, self._fd, READABLE, deliver)
        if begun is None:
            op = ops.ReadinessStream(self._pipe, READABLE)
            return op if self._watch(op, deliver) else None
        op = begun
        self._watches.add(op)
        return op

    def _watch(self, op: ops.Operation, deliver: Callable[[Any, BaseException | None], object]) -> bool:
        """Submit `op`; False where the poller refuses what is always ready.  `deliver` notes when it is over."""
        self._watches.add(op)
        try:
            self._proactor.start(op, deliver)
        except PermissionError:
            self._watch_is_over(op)
            return False
        except BaseException:
            self._watch_is_over(op)
            raise
        return True

    def _watch_is_over(self, op: ops.Operation) -> None:
        op.complete = ops.is_over  # it and what is called then refer to each other: part them
        self._watches.discard(op)

    def _watch_tells(self, ready: Callable[[], object], error: BaseException | None) -> None:
        """`ready` is called in no context of its own."""
        if self._state >= OVER:
            self._release()
        elif error is None:
            if self._state < LOST:
                ready()
        elif not was_cancelled(error):
            self._run(self._fatal_error, error)

    def _unwatch(self, op: ops.Operation | None) -> None:
        if op is not None:
            if self._proactor.drop(op):
                self._watch_is_over(op)
            else:
                self._proactor.cancel(op)

    def _stop(self) -> None:
        if self._watches:
            for op in list(self._watches):
                self._unwatch(op)

    def _may_be_closed(self) -> bool:
        return not self._watches or super()._may_be_closed()

    def _operations(self) -> Iterable[ops.Operation]:
        return self._watches


class ReadPipeTransport(ReadingSide, _Watching, asyncio.ReadTransport):
    """The reading end.  ValueError if `pipe` is a regular file or a directory."""

    _reading: ops.ReadinessStream | None = None
    _next_turn: asyncio.Handle | None = None

    def pause_reading(self) -> None:
        """Stop reading; what the pipe holds stays in it."""
        if self.is_reading():
            self._paused = True
            self._unwatch(self._reading)
            self._reading = None
            if self._next_turn is not None:
                self._next_turn.cancel()
                self._next_turn = None

    def close(self) -> None:
        """Close the pipe; ``connection_lost(None)`` follows."""
        self._lose_connection(None)

    def _stop_receiving(self) -> None:
        self._unwatch(self._reading)

    def _go_on(self) -> None:
        try:
            self._arm()
        except OSError as exc:
            self._fatal_error(exc, "Fatal read error on pipe transport")

    def _deliver(self, data: bytes | memoryview) -> None:
        try:
            self._feed(data)
        finally:
            self._run(self._go_on)

    def _wants_more(self) -> bool:
        return not self._paused and self._state < CLOSING and self._held is None

    def _arm(self) -> None:
        if self._reading is not None or self._next_turn is not None or not self._wants_more():
            return
        self._reading = self._watch_readable(self._read)
        if self._reading is None:
            self._next_turn = self._loop.call_soon(self._read_each_turn)

    def _read_each_turn(self) -> None:
        """Read what is always ready."""
        self._next_turn = None
        try:
            self._read()
        finally:
            if self._next_turn is None and self._wants_more():
                self._next_turn = self._loop.call_soon(self._read_each_turn)

    def _read(self) -> None:
        if not self._wants_more():
            return
        try:
            data = os.read(self._fd, READ_SIZE)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as exc:
            self._run(self._fatal_error, exc, "Fatal read error on pipe transport")
            return
        if not data:
            self._happens(CLOSE)
            self._note_the_peer_left()
            self._run(self._loop.call_soon, self._end_of_stream)  # which inherits the context
            return
        self._feed(data)

    def _end_of_stream(self) -> None:
        if self._state < LOST:
            super()._end_of_stream()

    def _ended(self, keep_open: bool | None) -> None:
        self._run(self._lose_connection, None)  # not in the context of eof_received's own turn, as on asyncio's loops

    def _is_usual(self, exc: BaseException) -> bool:
        return isinstance(exc, OSError) and exc.errno == errno.EIO  # a terminal whose other end is gone


class WritePipeTransport(WritingSide, _Watching):
    """The writing end.  ValueError if `pipe` is a regular file or a directory.

    When the reader goes away, the transport closes: ``connection_lost`` gets a BrokenPipeError if data were still to
    be written, else None.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._buffer = bytearray()
        self._writing: ops.Readiness | None = None
        self._peer: ops.ReadinessStream | None = None
        super().__init__(*args, **kwargs)

    def _arm(self) -> None:
        # A terminal has input of its own, and a FIFO that is open both ways has what we write: that something can be
        # read there says nothing about who is at the other end.
        one_way = fcntl.fcntl(self._fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY
        if stat.S_ISSOCK(self._mode) or (stat.S_ISFIFO(self._mode) and one_way):
            self._peer = self._watch_readable(functools.partial(self._run, self._look_at_peer))

    def _look_at_peer(self) -> None:
        """The pipe is "readable": nobody reads at the other end any more, or a socket's peer has said something."""
        if stat.S_ISSOCK(self._mode) and self._peer_talks():
            self._unwatch(self._peer)  # its words are not for us; a failing write will tell when it leaves
            self._peer = None
            return
        self._peer_left()

    def _peer_talks(self) -> bool:
        with socket.socket(fileno=os.dup(self._fd)) as sock:
            try:
                return bool(sock.recv(1, socket.MSG_PEEK))
            except (BlockingIOError, InterruptedError):
                return True
            except OSError:
                return False

    def get_write_buffer_size(self) -> int:
        """How many bytes were written and not yet taken by the kernel."""
        return len(self._buffer)

    def _write(self, data: bytes | bytearray | memoryview) -> None:
        rest = ops.readable_view(data)
        if not self._buffer:
            try:
                rest = rest[os.write(self._fd, rest) :]
            except (BlockingIOError, InterruptedError):
                pass
            except OSError as exc:
                self._write_failed(exc)
                return
            if not rest:
                return
        self._buffer += rest
        self._wait_until_writable()
        self._maybe_pause_protocol()

    def _wait_until_writable(self) -> None:
        if self._writing is None:
            try:
                self._writing = op = ops.Readiness(self._pipe, WRITABLE)
                watched = self._watch(op, functools.partial(self._writable, op, self._in_this_context(self._write_on)))
            except (OSError, ValueError) as exc:  # ValueError: somebody has closed it
                self._write_failed(exc)
                return
            if not watched:
                self._loop.call_soon(self._write_on)

    def _writable(
        self, op: ops.Operation, write_on: Callable[[], object], events: Any, error: BaseException | None
    ) -> None:
        self._watch_is_over(op)
        self._watch_tells(write_on, error)

    def _write_on(self) -> None:
        """Write what is queued, as much as the pipe takes."""
        self._writing = None
        if not self._buffer:
            return
        try:
            count = os.write(self._fd, self._buffer)
        except (BlockingIOError, InterruptedError):
            count = 0
        except OSError as exc:
            self._write_failed(exc)
            return
        del self._buffer[:count]
        if self._buffer:
            self._wait_until_writable()
        self._written()

    def _drop_unsent(self) -> None:
        self._buffer = bytearray()
        self._unwatch(self._writing)
        self._writing = None
