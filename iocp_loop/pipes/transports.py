"""What the pipe transports of all systems share: their life, flow control, contexts and errors.

How bytes get into and out of a pipe differs between the systems, and stands in pipes/unix.py and pipes/windows.py.
Each adds that to the classes here: a side (reading, writing, or both) first, then its own PipeTransport.

The life of these transports follows the rules of transports.py: ``connection_made`` first, ``connection_lost`` once,
and the pipe is closed when ``connection_lost`` has run and no operation is in flight on it.

Contexts.  What comes by itself (data, the end, an error of reading, a peer that goes away) is told in the context in
which the transport was made, what comes of writing in that of whoever wrote; both as on asyncio's own loops.  A
completion comes in no particular context, so whoever takes one enters the right one first.  ``_lose_connection`` is
called in the context that ``connection_lost`` is to inherit.
"""

from __future__ import annotations

import asyncio
import contextvars
import errno
import functools
import logging
import os
from asyncio import constants
from collections.abc import Callable
from typing import Any

from ..flow import FlowControl
from ..life import CLOSING, Life
from ..operations import writable_view

__all__ = ["PipeTransport", "ReadingSide", "WritingSide"]

_logger = logging.getLogger("asyncio")


class PipeTransport(Life):
    """The pipe, and how it all ends.

    If making one fails, the pipe is still the caller's.
    """

    _extra: dict[str, Any]

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        pipe: Any,
        protocol: asyncio.BaseProtocol,
        waiter: asyncio.Future[None] | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        self._pipe = pipe
        super().__init__(loop, protocol, waiter, extra)
        self._extra["pipe"] = pipe
        self._run = self._context.run

    def _close_handle(self) -> None:
        self._pipe.close()
        self._pipe = None

    def _give_up(self) -> None:
        if self._pipe is not None:  # as in asyncio, one may have taken it away
            self._pipe.close()

    def _note_the_peer_left(self) -> None:
        if self._loop.get_debug():
            _logger.info("%r was closed by peer", self)


class ReadingSide(PipeTransport):
    """What reads, once there are bytes.  How they are read, and how a pause begins, is up to the subclass."""

    _paused = False
    _held: bytes | memoryview | None = None  # what came and is still to be delivered; empty: the end

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Switch protocols; the next data go to the new one."""
        self._protocol = protocol
        self._buffered = isinstance(protocol, asyncio.BufferedProtocol)

    def is_reading(self) -> bool:
        """False while paused or closing."""
        return not self._paused and self._state < CLOSING

    def resume_reading(self) -> None:
        """Go on after ``pause_reading``."""
        if self._paused and self._state < CLOSING:
            self._paused = False
            if self._held is None:
                self._go_on()
            else:
                self._loop.call_soon(self._deliver_held)

    def _deliver_held(self) -> None:
        if self.is_reading():
            data, self._held = self._held, None
            if data is None:
                self._go_on()
            else:
                self._deliver(data)

    def _deliver(self, data: bytes | memoryview) -> None:
        """Give `data`, which may be the end, to the protocol, and go on reading."""
        raise NotImplementedError

    def _go_on(self) -> None:
        """Read again, unless that is under way or to wait."""
        raise NotImplementedError

    def _feed(self, data: bytes | memoryview) -> None:
        """Give `data` to the protocol.  If that fails, it ends the connection.

        Each call may pause, and the rest stays held; close, and it is dropped; or set a protocol, and it is that one's.
        """
        self._held = data
        try:
            while self._held and self.is_reading():
                if self._buffered:
                    self._run(self._fill_buffer, self._protocol, memoryview(self._held))
                else:
                    data, self._held = bytes(self._held), None
                    self._run(self._protocol.data_received, data)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:
            self._run(self._fatal_error, exc, "Fatal error: protocol.data_received() call failed.")
        finally:
            if self._held and self.is_reading():  # what ends the loop's run is on its way; another may follow
                self._loop.call_soon(self._deliver_held)

    def _fill_buffer(self, protocol: Any, data: memoryview) -> None:
        """Give a BufferedProtocol as much of `data`, which is held, as its buffer takes."""
        buffer = protocol.get_buffer(len(data))
        if self._state >= CLOSING or self._protocol is not protocol:
            return
        with writable_view(buffer) as view:  # let go of before the protocol is told, which may give it another size
            if not view.nbytes:
                raise RuntimeError("get_buffer() returned an empty buffer")
            count = min(len(data), view.nbytes)
            view[:count] = data[:count]
        self._held = data[count:] or None
        protocol.buffer_updated(count)

    def _end_of_stream(self) -> None:
        """Tell the protocol of the end.  Called in the context of receiving."""
        try:
            keep_open = self._protocol.eof_received()
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:
            self._fatal_error(exc, "Fatal error: protocol.eof_received() call failed.")
        else:
            self._ended(keep_open)

    def _ended(self, keep_open: bool | None) -> None:
        """The protocol knows of the end: nothing more can come."""
        self._lose_connection(None)


class WritingSide(PipeTransport, FlowControl):
    """What writes: which writes are taken, and what becomes of them when the transport ends."""

    #: What is in flight for writing; false: nothing is, and nothing is queued.
    _writing: Any

    _patience = constants.LOG_THRESHOLD_FOR_CONNLOST_WRITES
    _words_for_late_writes = "pipe closed by peer or os.write(pipe, data) raised exception."

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._init_flow_control()

    def _details(self) -> str:
        return f"{super()._details()} unsent={self.get_write_buffer_size()}"

    def write(self, data: Any) -> None:
        """Write `data` (bytes, bytearray or memoryview) without blocking; what is not taken at once is queued."""
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"data argument must be a bytes-like object, not {type(data).__name__!r}")
        if not data:
            return
        if self._state < CLOSING:
            self._write(data)
        else:
            self._count_late_write()

    def _write(self, data: bytes | bytearray | memoryview) -> None:
        """Write or queue `data`, which is not empty and may change later."""
        raise NotImplementedError

    def _drop_unsent(self) -> None:
        """Forget what is queued."""
        raise NotImplementedError

    def _in_this_context(self, written: Callable[..., object]) -> Callable[..., object]:
        """`written`, for the completion of a write: to be called in the context of whoever writes."""
        return functools.partial(contextvars.copy_context().run, written)

    def _peer_left(self) -> None:
        """Nobody reads at the other end any more.  Called in the context of receiving."""
        self._note_the_peer_left()
        exc = BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)) if self.get_write_buffer_size() else None
        self._lose_connection(exc)

    def _write_failed(self, exc: BaseException) -> None:
        self._fatal_error(exc, "Fatal write error on pipe transport")

    def _written(self) -> None:
        """Less is queued than before.  Called in the context of writing."""
        self._maybe_resume_protocol()  # may call write() again
        if self._state >= CLOSING and not self._writing:
            self._lose_connection(None)

    def can_write_eof(self) -> bool:
        """True: closing a pipe is its end of file."""
        return True

    def write_eof(self) -> None:
        """Close the pipe once everything written has been taken by the system."""
        self.close()

    def abort(self) -> None:
        """Close at once; what is queued is dropped."""
        self._lose_connection(None)

    def _is_sending(self) -> bool:
        return bool(self._writing)

    def _stop(self) -> None:
        self._drop_unsent()
        super()._stop()
