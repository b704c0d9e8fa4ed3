"""The life of a transport, once for datagrams and pipes: from its making to the close of its handle.

LIFE is the machine: what happens to a transport in which state, where that leads, and what is done then.  A pair that
is not in it changes nothing: a second ``close()``, an error that comes after the end.  docs/architecture.md shows it.

A transport asks the table when something happens to it, never for a message: it compares its `_state` there, as the
states stand in their order.

A connection has the same states, see connections.py; its native tier keeps them in C.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import warnings
from typing import Any, cast

from .debugging import context_for, unclosed

__all__ = ["CLOSED", "CLOSING", "LIFE", "LOST", "MADE", "OPEN", "OVER", "Event", "Life", "State"]

_logger = logging.getLogger("asyncio")


class State(enum.IntEnum):
    """How far a transport has come; no state leads back to an earlier one."""

    MADE = 0  # connection_made is to come
    OPEN = 1
    CLOSING = 2  # nothing is received any more; what is queued still goes out
    LOST = 3  # connection_lost is to come; nothing is sent any more
    OVER = 4  # connection_lost has run; the kernel may still be at it
    CLOSED = 5  # and so is the handle


class Event(enum.Enum):
    """What happens to it."""

    BEGIN = "its turn to begin"
    CLOSE = "close() with something queued, or the peer's end"
    LOSE = "abort(), an error, or nothing left to send"
    TOLD = "connection_lost has run"
    LET_GO = "no operation is in flight"


MADE, OPEN, CLOSING, LOST, OVER, CLOSED = State

#: In this state, at this event: the next state, and the method that is called then.
LIFE = {
    (MADE, Event.BEGIN): (OPEN, "_tell_of_connection"),
    (CLOSING, Event.BEGIN): (CLOSING, "_tell_of_connection"),
    (LOST, Event.BEGIN): (LOST, "_tell_of_connection"),
    (MADE, Event.CLOSE): (CLOSING, "_stop_receiving"),
    (OPEN, Event.CLOSE): (CLOSING, "_stop_receiving"),
    (MADE, Event.LOSE): (LOST, "_schedule_loss"),
    (OPEN, Event.LOSE): (LOST, "_schedule_loss"),
    (CLOSING, Event.LOSE): (LOST, "_schedule_loss"),
    (LOST, Event.TOLD): (OVER, "_release"),
    (OVER, Event.LET_GO): (CLOSED, "_close_handle"),
}


class Life(asyncio.BaseTransport):
    """What leads this life: a protocol is told of its beginning and its end, and of nothing after that."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        protocol: asyncio.BaseProtocol,
        waiter: asyncio.Future[None] | None,
        extra: dict[str, Any] | None,
    ) -> None:
        asyncio.BaseTransport.__init__(self, extra)
        self._extra: dict[str, Any]
        self._loop = loop
        # Receiving happens in one context, as it does in the handle that asyncio's own loops keep for a reader.
        self._context = context_for(loop)
        self.set_protocol(protocol)
        loop.call_soon(self._begin, waiter)
        self._state = MADE  # from now on the handle is ours

    def __repr__(self) -> str:
        state = "closed" if self._state >= OVER else "closing" if self._state >= CLOSING else "open"
        return f"<{type(self).__name__} {state} {self._details()}>"

    def __del__(self, _warn: Any = warnings.warn) -> None:
        if getattr(self, "_state", CLOSED) < OVER:  # it has none where the constructor failed
            _warn(unclosed(self, self._context), ResourceWarning, source=self)
            self._give_up()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Switch protocols; what comes next goes to the new one."""
        self._protocol: Any = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        """The current protocol; None after its ``connection_lost``."""
        return cast("asyncio.BaseProtocol", self._protocol)

    def is_closing(self) -> bool:
        """True once ``close`` or ``abort`` was called, the peer has ended, or the transport has failed."""
        return self._state >= CLOSING

    # -- what differs ------------------------------------------------------------------------------

    def _details(self) -> str:
        """What the repr tells beside the kind and the state."""
        raise NotImplementedError

    def _start(self) -> None:
        """Called once, after ``connection_made``: time to wait for what comes by itself.  May raise."""

    def _stop_receiving(self) -> None:
        """Ask for the end of what is in flight for receiving, where that may end before the rest."""

    def _stop(self) -> None:
        """Drop what is queued, and ask for the end of all that is in flight.  Its completions come all the same."""
        raise NotImplementedError

    def _may_be_closed(self) -> bool:
        """After ``_stop``: whether nothing is in flight any more, or it has to be let go of."""
        raise NotImplementedError

    def _close_handle(self) -> None:
        """Close the socket or pipe.  Nobody else does."""
        raise NotImplementedError

    def _give_up(self) -> None:
        """The transport is being collected, unclosed: close the handle if that can be."""
        self._close_handle()

    def _is_usual(self, exc: BaseException) -> bool:
        """Whether `exc` is a way in which such transports end, which the protocol learns from ``connection_lost``."""
        return isinstance(exc, OSError)

    # -- the machine -------------------------------------------------------------------------------

    def _happens(self, event: Event, *args: Any) -> bool:
        """Take the step of LIFE; False if there is none."""
        step = LIFE.get((self._state, event))
        if step is None:
            return False
        self._state, action = step
        getattr(self, action)(*args)
        return True

    def _begin(self, waiter: asyncio.Future[None] | None) -> None:
        self._happens(Event.BEGIN, waiter)

    def _tell_of_connection(self, waiter: asyncio.Future[None] | None) -> None:
        try:
            self._protocol.connection_made(self)
            self._start()
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:
            self._fatal_error(exc, "Fatal error: protocol.connection_made() call failed.")
            if waiter is not None and not waiter.done():
                waiter.set_exception(exc)
            return
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _lose_connection(self, exc: BaseException | None) -> None:
        """The end: ``connection_lost(exc)`` follows, in the context of the caller."""
        self._happens(Event.LOSE, exc)

    def _schedule_loss(self, exc: BaseException | None) -> None:
        self._stop()
        self._loop.call_soon(self._call_connection_lost, exc)

    def _call_connection_lost(self, exc: BaseException | None) -> None:
        try:
            self._protocol.connection_lost(exc)
        finally:
            self._protocol = None  # it may keep the transport, and then only the collector would free the two
            self._happens(Event.TOLD)

    def _release(self) -> None:
        """Close the handle when the protocol is done with it and the kernel too."""
        if self._state is OVER and self._may_be_closed():
            self._happens(Event.LET_GO)

    def _fatal_error(self, exc: BaseException, message: str = "Fatal error on transport") -> None:
        if self._is_usual(exc):
            if self._loop.get_debug():
                _logger.debug("%r: %s", self, message, exc_info=True)
        else:
            self._report(exc, message)
        self._lose_connection(exc)

    def _report(self, exc: BaseException, message: str) -> None:
        self._loop.call_exception_handler(
            {"message": message, "exception": exc, "transport": self, "protocol": self._protocol}
        )
