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
import warnings
from collections.abc import Callable
from typing import Any, cast

from ..debugging import context_for, unclosed
from ..flow import FlowControl
from ..operations import writable_view

__all__ = ["PipeTransport", "ReadingSide", "WritingSide"]

_logger = logging.getLogger("asyncio")

#: Writes to a lost pipe silently ignored before we warn.
_PATIENCE = 5


class PipeTransport(asyncio.BaseTransport):
    """The pipe, the protocol, and how it all ends.

    If making one fails, the pipe is still the caller's.
    """

    _loop: asyncio.AbstractEventLoop

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        pipe: Any,
        protocol: asyncio.BaseProtocol,
        waiter: asyncio.Future[None] | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        asyncio.BaseTransport.__init__(self, extra)
        self._extra: dict[str, Any]
        self._extra["pipe"] = pipe
        self._loop = loop
        self._closing = False
        self._lost = False
        self._finished = False  # connection_lost has run
        # Receiving happens in one context, as it does in the handle that asyncio's own loops keep for a reader.
        self._context = context_for(loop)
        self._run = self._context.run
        self.set_protocol(protocol)
        self._pipe = pipe
        loop.call_soon(self._begin, waiter)

    def _begin(self, waiter: asyncio.Future[None] | None) -> None:
        try:
            self._protocol.connection_made(self)
            self._start()
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:
            self._fatal_error(exc, "Fatal error: protocol.connection_made() call failed.")
            if waiter is not None and not waiter.cancelled():
                waiter.set_exception(exc)
            return
        if waiter is not None and not waiter.cancelled():
            waiter.set_result(None)

    def __repr__(self) -> str:
        state = "closed" if self._pipe is None else "closing" if self._closing else "open"
        return f"<{type(self).__name__} {state} {self._details()}>"

    def __del__(self, _warn: Any = warnings.warn) -> None:
        pipe = getattr(self, "_pipe", None)  # not set where the constructor failed
        if pipe is not None and not self._finished:
            _warn(unclosed(self, self._context), ResourceWarning, source=self)
            if self._give_up():
                pipe.close()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Switch protocols; what comes next goes to the new one."""
        self._protocol: Any = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        """The current protocol; None after its ``connection_lost``."""
        return cast("asyncio.BaseProtocol", self._protocol)

    def is_closing(self) -> bool:
        """True once the transport is closing or closed."""
        return self._closing

    # -- what differs between the systems ----------------------------------------------------------

    def _start(self) -> None:
        """Called once, after ``connection_made``: time to wait for what comes by itself.  May raise."""

    def _details(self) -> str:
        """What the repr tells beside the kind and the state."""
        raise NotImplementedError

    def _stop(self) -> None:
        """Ask for the end of what is in flight.  Its completions come all the same."""
        raise NotImplementedError

    def _may_be_closed(self) -> bool:
        """After ``_stop``: whether nothing is in flight any more, or it has to be let go of."""
        raise NotImplementedError

    def _give_up(self) -> bool:
        """The transport is being collected: whether the pipe can be closed."""
        return True

    def _is_usual(self, exc: BaseException) -> bool:
        """Whether `exc` is a way in which such pipes end, and not worth a report."""
        raise NotImplementedError

    # -- the end -----------------------------------------------------------------------------------

    def _lose_connection(self, exc: BaseException | None) -> None:
        self._closing = True
        if self._lost:
            return
        self._lost = True
        self._stop()
        self._loop.call_soon(self._call_connection_lost, exc)

    def _call_connection_lost(self, exc: BaseException | None) -> None:
        try:
            self._protocol.connection_lost(exc)
        finally:
            self._finished = True
            self._protocol = None  # it may keep the transport, and then only the collector would free the two
            self._release_pipe()

    def _release_pipe(self) -> None:
        """Close the pipe when the protocol is done with it and the kernel too."""
        if self._finished and self._pipe is not None and self._may_be_closed():
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

    def _note_the_peer_left(self) -> None:
        if self._loop.get_debug():
            _logger.info("%r was closed by peer", self)


class ReadingSide(PipeTransport):
    """What reads, once there are bytes.  How they are read, and how a pause begins, is up to the subclass."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._paused = False
        self._held: bytes | memoryview | None = None  # what came and is still to be delivered; empty: the end
        super().__init__(*args, **kwargs)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Switch protocols; the next data go to the new one."""
        super().set_protocol(protocol)
        self._buffered = isinstance(protocol, asyncio.BufferedProtocol)

    def is_reading(self) -> bool:
        """False while paused or closing."""
        return not self._paused and not self._closing

    def resume_reading(self) -> None:
        """Go on after ``pause_reading``."""
        if self._paused and not self._closing:
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
        if self._closing or self._protocol is not protocol:
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

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._writes_after_loss = 0
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
        if not self._closing:
            self._write(data)
            return
        self._writes_after_loss += 1
        if self._writes_after_loss > _PATIENCE:
            _logger.warning("pipe closed by peer or os.write(pipe, data) raised exception.")  # in asyncio's words

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
        self._drop_unsent()
        self._lose_connection(exc)

    def _write_failed(self, exc: BaseException) -> None:
        self._drop_unsent()
        self._fatal_error(exc, "Fatal write error on pipe transport")

    def _written(self) -> None:
        """Less is queued than before.  Called in the context of writing."""
        self._maybe_resume_protocol()  # may call write() again
        if self._closing and not self._writing:
            self._lose_connection(None)

    def can_write_eof(self) -> bool:
        """True: closing a pipe is its end of file."""
        return True

    def write_eof(self) -> None:
        """Close the pipe once everything written has been taken by the system."""
        self.close()

    def close(self) -> None:
        """Write what is queued, then close; ``connection_lost(None)`` follows."""
        if self._closing:
            return
        self._closing = True
        if not self._writing:
            self._lose_connection(None)

    def abort(self) -> None:
        """Close at once; what is queued is dropped."""
        self._drop_unsent()
        self._lose_connection(None)
