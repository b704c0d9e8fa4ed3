"""Pipe transports on Unix: one end of a pipe, FIFO, socket, terminal or character device, and an asyncio Protocol.

Descriptors of these kinds are served by readiness: the driver tells that one is ready, and the transport then reads or
writes without blocking.  So nothing is ever half read in the background, and a pause or a close loses no data.

A few devices (``/dev/null``, ``/dev/zero``) are always ready, and a poller may refuse them for that reason.  They are
read once per turn of the loop.

The life of these transports follows the rules of transports.py: ``connection_made`` first, ``connection_lost`` once,
and the pipe is closed when ``connection_lost`` has run and no operation is in flight on it.

The reading end of a pipe cannot be told apart from the writing end by its readiness alone, and need not be: when the
reader of a pipe goes away, the writing end reports an error condition, which every poller delivers unasked.
"""

from __future__ import annotations

import asyncio
import contextvars
import errno
import fcntl
import functools
import logging
import os
import socket
import stat
import sys
import warnings
from asyncio import protocols
from collections.abc import Callable
from typing import Any, cast

from . import operations as ops
from .debugging import context_for, unclosed
from .operations import READABLE, WRITABLE
from .proactor import Proactor
from .transports import FlowControl

if sys.platform == "win32":
    raise ImportError("the transports of this module are for Unix")

__all__ = ["ReadPipeTransport", "WritePipeTransport"]

_logger = logging.getLogger("asyncio")

#: Bytes per read: what a pipe holds on Linux unless somebody made it larger, see pipe(7).
READ_SIZE = 64 * 1024

#: asyncio's own way to give bytes to a BufferedProtocol; typeshed does not know it.
_feed_buffered: Callable[[Any, bytes], None] = getattr(protocols, "_feed_data_to_buffered_proto")  # noqa: B009 - as said

#: Writes to a lost pipe that are let pass before a warning is logged.
_PATIENCE = 5


class _PipeTransport(asyncio.BaseTransport):
    """What the two directions share: the pipe, the protocol, and how it all ends."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        proactor: Proactor,
        pipe: Any,
        protocol: asyncio.BaseProtocol,
        waiter: asyncio.Future[None] | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        asyncio.BaseTransport.__init__(self, extra)
        self._extra: dict[str, Any]
        self._extra["pipe"] = pipe
        self._pipe: Any = None  # until it is known to be one, it is the caller's
        self._fd: int = pipe.fileno()
        self._mode = os.fstat(self._fd).st_mode
        if not (stat.S_ISFIFO(self._mode) or stat.S_ISSOCK(self._mode) or stat.S_ISCHR(self._mode)):
            raise ValueError("Pipe transport is only for pipes, sockets and character devices")
        os.set_blocking(self._fd, False)
        self._pipe = pipe
        self._loop = loop
        self._proactor = proactor
        self._watches: set[ops.Operation] = set()
        self._closing = False
        self._lost = False
        self._finished = False  # connection_lost has run
        # Receiving happens in one context, as it does in the handle that asyncio's own loops keep for a reader.
        self._context = context_for(loop)
        self._run = self._context.run
        self.set_protocol(protocol)
        loop.call_soon(self._begin, waiter)

    def _begin(self, waiter: asyncio.Future[None] | None) -> None:
        try:
            self._protocol.connection_made(self)
            if not self._closing:
                self._arm()
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:
            self._fatal_error(exc, "Fatal error: protocol.connection_made() call failed.")
            if waiter is not None and not waiter.cancelled():
                waiter.set_exception(exc)
            return
        if waiter is not None and not waiter.cancelled():
            waiter.set_result(None)

    def _arm(self) -> None:
        """Start to wait for what comes by itself: data, or the end."""
        raise NotImplementedError

    def __repr__(self) -> str:
        state = "closed" if self._pipe is None else "closing" if self._closing else "open"
        return f"<{type(self).__name__} {state} fd={self._fd}{self._more_repr()}>"

    def _more_repr(self) -> str:
        return ""

    def __del__(self, _warn: Any = warnings.warn) -> None:
        pipe = getattr(self, "_pipe", None)
        if pipe is not None and not self._finished:
            _warn(unclosed(self, self._context), ResourceWarning, source=self)
            pipe.close()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Switch protocols; what comes next goes to the new one."""
        self._protocol: Any = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        """The current protocol."""
        return cast("asyncio.BaseProtocol", self._protocol)

    def is_closing(self) -> bool:
        """True once the transport is closing or closed."""
        return self._closing

    # -- readiness ---------------------------------------------------------------------------------

    def _watch(self, op: ops.Operation, ready: Callable[[], object]) -> bool:
        """Call `ready` when `op` completes; False where the poller refuses what is always ready.

        `ready` is called in no context of its own.
        """

        def deliver(events: Any, error: OSError | None) -> None:
            if not op.in_flight:
                self._watches.discard(op)
            if self._finished:
                self._release_pipe()
            elif error is None:
                if not self._lost:
                    ready()
            elif error.errno != errno.ECANCELED:
                self._run(self._fatal_error, error)

        self._watches.add(op)
        try:
            self._proactor.start(op, deliver)
        except PermissionError:
            self._watches.discard(op)
            return False
        except BaseException:
            self._watches.discard(op)
            raise
        return True

    def _unwatch(self, op: ops.Operation | None) -> None:
        if op is not None:
            self._proactor.cancel(op)

    # -- the end -----------------------------------------------------------------------------------

    def _lose_connection(self, exc: BaseException | None) -> None:
        self._closing = True
        if self._lost:
            return
        self._lost = True
        for op in list(self._watches):
            self._proactor.cancel(op)
        self._loop.call_soon(self._call_connection_lost, exc)

    def _call_connection_lost(self, exc: BaseException | None) -> None:
        try:
            self._protocol.connection_lost(exc)
        finally:
            self._finished = True
            self._release_pipe()

    def _release_pipe(self) -> None:
        """Close the pipe when the protocol is done with it and the kernel too."""
        if self._pipe is None:
            return
        if not any(op.in_flight for op in self._watches) or self._proactor.let_go():
            self._pipe.close()
            self._pipe = None

    def _fatal_error(self, exc: BaseException, message: str = "Fatal error on pipe transport") -> None:
        if self._is_usual(exc):
            if self._loop.get_debug():
                _logger.debug("%r: %s", self, message, exc_info=True)
        else:
            self._loop.call_exception_handler(
                {"message": message, "exception": exc, "transport": self, "protocol": self._protocol}
            )
        self._lose_connection(exc)

    def _is_usual(self, exc: BaseException) -> bool:
        """Whether `exc` is a way in which such pipes end, and not worth a report."""
        raise NotImplementedError


class ReadPipeTransport(_PipeTransport, asyncio.ReadTransport):
    """The reading end.  ValueError if `pipe` is a regular file or a directory."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._paused = False
        self._reading: ops.ReadinessStream | None = None
        self._next_turn: asyncio.Handle | None = None
        super().__init__(*args, **kwargs)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Switch protocols; the next data go to the new one."""
        super().set_protocol(protocol)
        self._buffered = isinstance(protocol, asyncio.BufferedProtocol)

    def is_reading(self) -> bool:
        """False while paused or closing."""
        return not self._paused and not self._closing

    def pause_reading(self) -> None:
        """Stop reading; what the pipe holds stays in it."""
        if self.is_reading():
            self._paused = True
            self._unwatch(self._reading)
            self._reading = None
            if self._next_turn is not None:
                self._next_turn.cancel()

    def resume_reading(self) -> None:
        """Go on after ``pause_reading``."""
        if self._paused and not self._closing:
            self._paused = False
            self._arm()

    def close(self) -> None:
        """Close the pipe; ``connection_lost(None)`` follows."""
        self._lose_connection(None)

    def _arm(self) -> None:
        if self._reading is not None or not self.is_reading():
            return
        op = ops.ReadinessStream(self._pipe, READABLE)
        if self._watch(op, self._read):
            self._reading = op
        else:
            self._next_turn = self._loop.call_soon(self._read_each_turn)

    def _read_each_turn(self) -> None:
        """Read what is always ready."""
        if self.is_reading():
            self._read()
            self._next_turn = self._loop.call_soon(self._read_each_turn)

    def _read(self) -> None:
        if not self.is_reading():
            return
        try:
            data = os.read(self._fd, READ_SIZE)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as exc:
            self._run(self._fatal_error, exc, "Fatal read error on pipe transport")
            return
        if not data:
            self._closing = True
            self._unwatch(self._reading)
            if self._loop.get_debug():
                _logger.info("%r was closed by peer", self)
            self._run(self._loop.call_soon, self._end_of_stream)  # which inherits the context
            return
        try:
            if self._buffered:
                self._run(_feed_buffered, self._protocol, data)
            else:
                self._run(self._protocol.data_received, data)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:
            self._run(self._fatal_error, exc, "Fatal error: protocol.data_received() call failed.")

    def _end_of_stream(self) -> None:
        if self._lost:
            return
        try:
            self._protocol.eof_received()
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:
            self._fatal_error(exc, "Fatal error: protocol.eof_received() call failed.")
        else:
            self._run(self._lose_connection, None)

    def _is_usual(self, exc: BaseException) -> bool:
        return isinstance(exc, OSError) and exc.errno == errno.EIO  # a terminal whose other end is gone


class WritePipeTransport(_PipeTransport, FlowControl):
    """The writing end.  ValueError if `pipe` is a regular file or a directory.

    When the reader goes away, the transport closes: ``connection_lost`` gets a BrokenPipeError if data were still to
    be written, else None.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._buffer = bytearray()
        self._writing: ops.Readiness | None = None
        self._peer: ops.ReadinessStream | None = None
        self._writes_after_loss = 0
        super().__init__(*args, **kwargs)
        self._init_flow_control()

    def _more_repr(self) -> str:
        return f" unsent={len(self._buffer)}"

    def _arm(self) -> None:
        # A terminal has input of its own, and a FIFO that is open both ways has what we write: that something can be
        # read there says nothing about who is at the other end.
        one_way = fcntl.fcntl(self._fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY
        if stat.S_ISSOCK(self._mode) or (stat.S_ISFIFO(self._mode) and one_way):
            self._peer = ops.ReadinessStream(self._pipe, READABLE)
            self._watch(self._peer, functools.partial(self._run, self._look_at_peer))

    def _look_at_peer(self) -> None:
        """The pipe is "readable": nobody reads at the other end any more, or a socket's peer has said something."""
        if stat.S_ISSOCK(self._mode) and self._peer_talks():
            self._unwatch(self._peer)  # its words are not for us; a failing write will tell when it leaves
            self._peer = None
            return
        if self._loop.get_debug():
            _logger.info("%r was closed by peer", self)
        exc = BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)) if self._buffer else None
        self._drop_buffer()
        self._lose_connection(exc)

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

    def write(self, data: Any) -> None:
        """Write `data` (bytes, bytearray or memoryview) without blocking; the rest is queued."""
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"data argument must be a bytes-like object, not {type(data).__name__!r}")
        if not data:
            return
        if self._closing:
            self._writes_after_loss += 1
            if self._writes_after_loss > _PATIENCE:
                _logger.warning("pipe closed by peer or os.write(pipe, data) raised exception.")
            return
        rest = ops.readable_view(data)
        if not self._buffer:
            try:
                rest = rest[os.write(self._fd, rest) :]
            except (BlockingIOError, InterruptedError):
                pass
            except OSError as exc:
                self._fatal_error(exc, "Fatal write error on pipe transport")
                return
            if not rest:
                return
        self._buffer += rest
        self._wait_until_writable()
        self._maybe_pause_protocol()

    def _wait_until_writable(self) -> None:
        if self._writing is None:
            self._writing = ops.Readiness(self._pipe, WRITABLE)
            # In the context of whoever writes, as on asyncio's own loops.
            write_on = functools.partial(contextvars.copy_context().run, self._write_on)
            if not self._watch(self._writing, write_on):
                self._loop.call_soon(self._write_on)

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
            self._drop_buffer()
            self._fatal_error(exc, "Fatal write error on pipe transport")
            return
        del self._buffer[:count]
        if self._buffer:
            self._wait_until_writable()
        self._maybe_resume_protocol()  # may call write() again
        if self._closing and not self._buffer:
            self._lose_connection(None)

    def can_write_eof(self) -> bool:
        """True: closing a pipe is its end of file."""
        return True

    def write_eof(self) -> None:
        """Close the pipe once everything written has been taken by the kernel."""
        if self._closing:
            return
        self._closing = True
        if not self._buffer:
            self._lose_connection(None)

    def close(self) -> None:
        """Write what is queued, then close; ``connection_lost(None)`` follows."""
        self.write_eof()

    def abort(self) -> None:
        """Close at once; what is queued is dropped."""
        self._drop_buffer()
        self._lose_connection(None)

    def _drop_buffer(self) -> None:
        self._buffer = bytearray()
        self._unwatch(self._writing)
        self._writing = None

    def _is_usual(self, exc: BaseException) -> bool:
        return isinstance(exc, OSError)
