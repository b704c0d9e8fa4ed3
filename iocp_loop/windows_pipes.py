"""Pipe transports on Windows: a channel (windows_channels.py) on one side, an asyncio Protocol on the other.

The life of these transports follows the rules of transports.py: ``connection_made`` first, ``connection_lost`` once,
and the pipe is closed when ``connection_lost`` has run and nothing is in flight on it.

Reading.  One read is in flight, with a buffer of its own; what comes while the protocol pauses is held, and then there
is no read in flight.  So a pause loses nothing, and the writer at the other end feels it.

Writing.  One write is in flight; what is written meanwhile is joined to the next one.

The end.  A named pipe has no half-close: its end is that one side closes its handle.  Who only writes learns that from
a read that waits beside the writes, as far as the handle lets itself be read; the end of the standard input of a child
process does.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import sys
import warnings
from asyncio import protocols
from collections.abc import Callable
from typing import Any, cast

from .debugging import context_for, unclosed
from .proactor import Proactor
from .transports import FlowControl

if sys.platform != "win32":
    raise ImportError("the transports of this module are for Windows")

from .windows_channels import BlockingChannel, open_channel

__all__ = ["DuplexPipeTransport", "ReadPipeTransport", "WritePipeTransport"]

_logger = logging.getLogger("asyncio")

#: asyncio's own way to give bytes to a BufferedProtocol; typeshed does not know it.
_feed_buffered: Callable[[Any, bytes], None] = getattr(protocols, "_feed_data_to_buffered_proto")  # noqa: B009 - as said

#: Writes to a lost pipe that are let pass before a warning is logged.
_PATIENCE = 5


class _PipeTransport(asyncio.BaseTransport):
    """What all directions share: the pipe, the protocol, and how it all ends."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        proactor: Proactor,
        busy: set[BlockingChannel],
        pipe: Any,
        protocol: asyncio.BaseProtocol,
        waiter: asyncio.Future[None] | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        asyncio.BaseTransport.__init__(self, extra)
        self._extra: dict[str, Any]
        self._extra["pipe"] = pipe
        self._pipe: Any = None  # until it is known to be one, it is the caller's
        self._channel = open_channel(loop, proactor, pipe, busy)
        self._pipe = pipe
        self._loop = loop
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
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:
            self._fatal_error(exc, "Fatal error: protocol.connection_made() call failed.")
            if waiter is not None and not waiter.cancelled():
                waiter.set_exception(exc)
            return
        if waiter is not None and not waiter.cancelled():
            waiter.set_result(None)
        self._loop.call_soon(self._arm)  # after whoever waits has got the transport: data may be there at once

    def _arm(self) -> None:
        """Start to wait for what comes by itself: data, or the end."""
        raise NotImplementedError

    def __repr__(self) -> str:
        state = "closed" if self._pipe is None else "closing" if self._closing else "open"
        return f"<{type(self).__name__} {state} handle={self._channel.number}{self._more_repr()}>"

    def _more_repr(self) -> str:
        return ""

    def __del__(self, _warn: Any = warnings.warn) -> None:
        pipe = getattr(self, "_pipe", None)
        if pipe is not None and not self._finished:
            _warn(unclosed(self, self._context), ResourceWarning, source=self)
            if self._channel.give_up():
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

    # -- the end -----------------------------------------------------------------------------------

    def _lose_connection(self, exc: BaseException | None) -> None:
        self._closing = True
        if self._lost:
            return
        self._lost = True
        self._channel.stop()
        self._loop.call_soon(self._call_connection_lost, exc)

    def _call_connection_lost(self, exc: BaseException | None) -> None:
        try:
            self._protocol.connection_lost(exc)
        finally:
            self._finished = True
            self._release_pipe()

    def _release_pipe(self) -> None:
        """Close the pipe when the protocol is done with it and the channel too."""
        if self._finished and self._pipe is not None and self._channel.may_be_closed():
            self._pipe.close()
            self._pipe = None

    def _fatal_error(self, exc: BaseException, message: str = "Fatal error on pipe transport") -> None:
        if isinstance(exc, ConnectionError):  # the way in which pipes end
            if self._loop.get_debug():
                _logger.debug("%r: %s", self, message, exc_info=True)
        else:
            self._loop.call_exception_handler(
                {"message": message, "exception": exc, "transport": self, "protocol": self._protocol}
            )
        self._lose_connection(exc)


class _Reading(_PipeTransport):
    """The reading side."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._paused = False
        self._reading = False  # a read is in flight
        self._held: bytes | None = None  # what came while paused; empty: the end
        self._at_eof = False
        super().__init__(*args, **kwargs)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Switch protocols; the next data go to the new one."""
        super().set_protocol(protocol)
        self._buffered = isinstance(protocol, asyncio.BufferedProtocol)

    def is_reading(self) -> bool:
        """False while paused or closing."""
        return not self._paused and not self._closing

    def pause_reading(self) -> None:
        """Stop calling the protocol with data.  What comes by the read that is in flight is held, not lost."""
        if self.is_reading():
            self._paused = True

    def resume_reading(self) -> None:
        """Go on after ``pause_reading``."""
        if self._paused and not self._closing:
            self._paused = False
            if self._held is None:
                self._arm()
            else:
                self._loop.call_soon(self._deliver_held)

    def _deliver_held(self) -> None:
        if self._held is not None and self.is_reading():
            data, self._held = self._held, None
            self._deliver(data)

    def _arm(self) -> None:
        if self._reading or self._at_eof or self._held is not None or not self.is_reading():
            return
        try:
            self._channel.read(self._was_read)
        except OSError as exc:
            self._fatal_error(exc, "Fatal read error on pipe transport")
        else:
            self._reading = True

    def _was_read(self, data: bytes, error: OSError | None) -> None:
        """The completion of the read that was in flight."""
        self._reading = False
        if self._lost:
            self._release_pipe()
        elif self._closing:
            pass  # what is still to be written goes first; nobody wants what comes
        elif error is not None:
            if error.errno != errno.ECANCELED:  # that one is the loop closing under us
                self._fatal_error(error, "Fatal read error on pipe transport")
        elif self._paused:
            self._held = data
        else:
            self._deliver(data)

    def _deliver(self, data: bytes) -> None:
        if not data:
            self._at_eof = True
            if self._loop.get_debug():
                _logger.info("%r was closed by peer", self)
            self._end_of_stream()
            return
        try:
            if self._buffered:
                self._run(_feed_buffered, self._protocol, data)
            else:
                self._run(self._protocol.data_received, data)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:
            self._fatal_error(exc, "Fatal error: protocol.data_received() call failed.")
        else:
            self._arm()

    def _end_of_stream(self) -> None:
        try:
            keep_open = self._run(self._protocol.eof_received)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:
            self._fatal_error(exc, "Fatal error: protocol.eof_received() call failed.")
        else:
            self._ended(keep_open)

    def _ended(self, keep_open: bool) -> None:
        """The protocol knows of the end: nothing more can come."""
        self._lose_connection(None)


class _Writing(_PipeTransport, FlowControl):
    """The writing side."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._queue: list[bytes] = []
        self._queued = 0  # bytes in _queue
        self._unsent = memoryview(b"")  # what the write in flight has, or is to have
        self._writing = False  # a write is in flight
        self._writes_after_loss = 0
        super().__init__(*args, **kwargs)
        self._init_flow_control()

    def _more_repr(self) -> str:
        return f" unsent={self.get_write_buffer_size()}"

    def get_write_buffer_size(self) -> int:
        """How many bytes were written and not yet taken by the system."""
        return self._queued + self._unsent.nbytes

    def write(self, data: Any) -> None:
        """Write `data` (bytes, bytearray or memoryview) without blocking; what is not taken at once is queued."""
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"data argument must be a bytes-like object, not {type(data).__name__!r}")
        if not data:
            return
        if self._closing:
            self._writes_after_loss += 1
            if self._writes_after_loss > _PATIENCE:
                _logger.warning("pipe closed by peer or writing to it has failed")
            return
        data = bytes(data)  # the caller may use its buffer again
        self._queue.append(data)
        self._queued += len(data)
        if not self._writing:
            self._write_on()
        self._maybe_pause_protocol()

    def _write_on(self) -> None:
        """Put what waits in flight."""
        if not self._unsent:
            queue, self._queue, self._queued = self._queue, [], 0
            self._unsent = memoryview(queue[0] if len(queue) == 1 else b"".join(queue))
        try:
            self._channel.write(self._unsent, self._was_written)
        except OSError as exc:
            self._write_failed(exc)
        else:
            self._writing = True

    def _was_written(self, count: int, error: OSError | None) -> None:
        """The completion of the write that was in flight."""
        self._writing = False
        if self._lost:
            self._release_pipe()
            return
        if error is not None:
            if error.errno != errno.ECANCELED:
                self._write_failed(error)
            return
        self._unsent = self._unsent[count:]
        if self._unsent or self._queue:
            self._write_on()
        self._maybe_resume_protocol()  # may call write() again
        if self._closing and not self._writing:
            self._lose_connection(None)

    def _write_failed(self, exc: OSError) -> None:
        self._drop_queue()
        self._fatal_error(exc, "Fatal write error on pipe transport")

    def _drop_queue(self) -> None:
        self._queue, self._queued, self._unsent = [], 0, memoryview(b"")

    def close(self) -> None:
        """Write what is queued, then close; ``connection_lost(None)`` follows."""
        if self._closing:
            return
        self._closing = True
        if not self._writing:
            self._lose_connection(None)

    def abort(self) -> None:
        """Close at once; what is queued is dropped."""
        self._drop_queue()
        self._lose_connection(None)


class ReadPipeTransport(_Reading, asyncio.ReadTransport):
    """The reading end.  ValueError if `pipe` is a regular file."""

    def close(self) -> None:
        """Close the pipe; ``connection_lost(None)`` follows."""
        self._lose_connection(None)


class WritePipeTransport(_Writing):
    """The writing end.  ValueError if `pipe` is a regular file.

    When the reader goes away, the transport closes: ``connection_lost`` gets a BrokenPipeError if data were still to
    be written, else None.  A handle that can't be read does not tell; there the next write does.
    """

    def _arm(self) -> None:
        if not self._closing or self._writing:
            with contextlib.suppress(OSError):  # a failing write will tell
                self._channel.watch(self._look_at_peer)

    def _look_at_peer(self, _: bytes, error: OSError | None) -> None:
        """The other end is gone."""
        if self._lost:
            self._release_pipe()
            return
        if error is not None and error.errno == errno.ECANCELED:
            return  # the loop is closing under us
        if self._loop.get_debug():
            _logger.info("%r was closed by peer", self)
        exc = BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)) if self.get_write_buffer_size() else None
        self._drop_queue()
        self._lose_connection(exc)

    def can_write_eof(self) -> bool:
        """True: closing a pipe is its end of file."""
        return True

    def write_eof(self) -> None:
        """Close the pipe once everything written has been taken by the system."""
        self.close()


class DuplexPipeTransport(_Reading, _Writing, asyncio.Transport):
    """Either end of a named pipe: reads and writes."""

    def can_write_eof(self) -> bool:
        """False: a named pipe can't close one direction alone."""
        return False

    def write_eof(self) -> None:
        """Raises NotImplementedError, see ``can_write_eof``."""
        raise NotImplementedError("a named pipe can't close its writing side alone")

    def _ended(self, keep_open: bool) -> None:
        if not keep_open:
            self.close()
