"""Pipe transports on Windows: a channel (pipes/channels.py) on one side, an asyncio Protocol on the other.

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
import sys
from typing import Any

from ..life import CLOSING, LOST
from ..operations import was_cancelled
from .transports import PipeTransport, ReadingSide, WritingSide

if sys.platform != "win32":
    raise ImportError("the transports of this module are for Windows")

from .channels import Channel

__all__ = ["DuplexPipeTransport", "ReadPipeTransport", "WritePipeTransport"]


class _Channelled(PipeTransport):
    """The channel that a pipe is read and written by.  It is the transport's own, which stops it."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        channel: Channel,
        pipe: Any,
        protocol: asyncio.BaseProtocol,
        waiter: asyncio.Future[None] | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        self._channel = channel
        super().__init__(loop, pipe, protocol, waiter, extra)

    def _begin(self, waiter: asyncio.Future[None] | None) -> None:
        super()._begin(waiter)
        self._loop.call_soon(self._arm)  # after whoever waits has got the transport: data may be there at once

    def _arm(self) -> None:
        """Start to wait for what comes by itself: data, or the end."""
        raise NotImplementedError

    def _details(self) -> str:
        return f"handle={self._channel.number}"

    def _stop(self) -> None:
        self._channel.stop()

    def _may_be_closed(self) -> bool:
        return self._channel.may_be_closed()

    def _give_up(self) -> None:
        if self._channel.give_up():
            super()._give_up()

    def _is_usual(self, exc: BaseException) -> bool:
        return isinstance(exc, ConnectionError)


class _Reading(ReadingSide, _Channelled):
    """The reading side."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._reading = False  # a read is in flight
        self._at_eof = False
        super().__init__(*args, **kwargs)

    def pause_reading(self) -> None:
        """Stop calling the protocol with data.  What comes by the read that is in flight is held, not lost."""
        if self.is_reading():
            self._paused = True

    def _go_on(self) -> None:
        self._arm()

    def _arm(self) -> None:
        if self._reading or self._at_eof or self._held is not None or not self.is_reading():
            return
        try:
            self._channel.read(self._was_read)
        except (OSError, ValueError) as exc:  # ValueError: somebody has closed it
            self._fatal_error(exc, "Fatal read error on pipe transport")
        else:
            self._reading = True

    def _was_read(self, data: bytes, error: BaseException | None) -> None:
        """The completion of the read that was in flight."""
        self._reading = False
        if self._state >= LOST:
            self._release()
        elif self._state >= CLOSING:
            pass  # what is still to be written goes first; nobody wants what comes
        elif error is not None:
            if not was_cancelled(error):  # that would be the loop closing under us
                self._run(self._fatal_error, error, "Fatal read error on pipe transport")
        elif self._paused:
            self._held = data
        else:
            self._deliver(data)

    def _deliver(self, data: bytes | memoryview) -> None:
        if not data:
            self._at_eof = True
            self._note_the_peer_left()
            self._run(self._end_of_stream)
        else:
            try:
                self._feed(data)
            finally:
                self._run(self._arm)  # where it is told if that is refused


class _Writing(WritingSide, _Channelled):
    """The writing side."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._queue: list[bytes] = []
        self._queued = 0  # bytes in _queue
        self._unsent = memoryview(b"")  # what the write in flight has, or is to have
        self._writing = False  # a write is in flight
        super().__init__(*args, **kwargs)

    def get_write_buffer_size(self) -> int:
        """How many bytes were written and not yet taken by the system."""
        return self._queued + self._unsent.nbytes

    def _write(self, data: bytes | bytearray | memoryview) -> None:
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
            self._channel.write(self._unsent, self._in_this_context(self._was_written))
        except (OSError, ValueError) as exc:
            self._write_failed(exc)
        else:
            self._writing = True

    def _was_written(self, count: int, error: BaseException | None) -> None:
        """The completion of the write that was in flight."""
        self._writing = False
        if self._state >= LOST:
            self._release()
            return
        if error is not None:
            if not was_cancelled(error):
                self._write_failed(error)
            return
        self._unsent = self._unsent[count:]
        if self._unsent or self._queue:
            self._write_on()
        self._written()

    def _drop_unsent(self) -> None:
        self._queue, self._queued, self._unsent = [], 0, memoryview(b"")


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
        if self._state < LOST:
            with contextlib.suppress(OSError):  # a failing write will tell
                self._channel.watch(self._look_at_peer)

    def _look_at_peer(self, _: bytes, error: BaseException | None) -> None:
        """The other end is gone."""
        if self._state >= LOST:
            self._release()
            return
        if error is not None and was_cancelled(error):
            return  # the loop is closing under us
        self._run(self._peer_left)


class DuplexPipeTransport(_Reading, _Writing, asyncio.Transport):
    """Either end of a named pipe: reads and writes."""

    def can_write_eof(self) -> bool:
        """False: a named pipe can't close one direction alone."""
        return False

    def write_eof(self) -> None:
        """Raises NotImplementedError, see ``can_write_eof``."""
        raise NotImplementedError("a named pipe can't close its writing side alone")

    def _ended(self, keep_open: bool | None) -> None:
        if not keep_open:
            self.close()
