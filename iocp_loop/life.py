"""The life of a transport, of every kind: from its making to the close of its handle.

LIFE is the machine: what happens to a transport in which state, where that leads, and what is done then.  A pair that
is not in it changes nothing: a second ``close()``, an error that comes after the end.  docs/architecture.md shows it.

A transport asks the table when something happens to it, never for a message: it compares its `_state` there, as the
states stand in their order.

Not part of a life is what moves independently of it: whether reading is paused, whether one direction has ended before
the other (``write_eof``, the peer's end with the rest kept open), and what is queued.

The native tier has the same table in C (``_native/hot/life.c``), for connections; tests/test_life.py compares the two.
"""

from __future__ import annotations

import asyncio
import contextvars
import enum
import logging
import warnings
from asyncio import constants
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, cast

from .debugging import context_for, unclosed
from .operations import Operation
from .proactor import Proactor

__all__ = ["CLOSE", "CLOSED", "CLOSING", "LIFE", "LOST", "MADE", "OPEN", "OVER", "Event", "Life", "LifeBase", "State"]

_logger = logging.getLogger("asyncio")


class State(enum.IntEnum):
    """How far a transport has come; no state leads back to an earlier one."""

    MADE = 1  # connection_made is to come
    OPEN = 2
    CLOSING = 3  # nothing is received any more; what is queued still goes out
    LOST = 4  # connection_lost is to come; nothing is sent any more
    OVER = 5  # connection_lost has run; the kernel may still be at it
    CLOSED = 6  # and so is the handle


class Event(enum.IntEnum):
    """What happens to it."""

    BEGIN = 0  # its turn to begin
    CLOSE = 1  # close() with something queued, or the peer's end
    LOSE = 2  # abort(), an error, or nothing left to send
    TOLD = 3  # connection_lost has run
    LET_GO = 4  # no operation is in flight


MADE, OPEN, CLOSING, LOST, OVER, CLOSED = State
_BEGIN, CLOSE, _LOSE, _TOLD, _LET_GO = Event

#: In this state, at this event: the next state, and the method that is called then.
LIFE: dict[tuple[int, int], tuple[State, str]] = {
    (MADE, _BEGIN): (OPEN, "_tell_of_connection"),
    (CLOSING, _BEGIN): (CLOSING, "_tell_of_connection"),
    (LOST, _BEGIN): (LOST, "_tell_of_connection"),
    (MADE, CLOSE): (CLOSING, "_stop_receiving"),
    (OPEN, CLOSE): (CLOSING, "_stop_receiving"),
    (MADE, _LOSE): (LOST, "_schedule_loss"),
    (OPEN, _LOSE): (LOST, "_schedule_loss"),
    (CLOSING, _LOSE): (LOST, "_schedule_loss"),
    (LOST, _TOLD): (OVER, "_release"),
    (OVER, _LET_GO): (CLOSED, "_close_handle"),
}


class LifeBase(asyncio.BaseTransport):
    """What is rare in a life, and in Python on both tiers: what is told of it, and to whom."""

    if not TYPE_CHECKING:  # mypy: the subclasses have the attributes below, in a __dict__ or in slots of their own
        __slots__ = ()

    _context: Any
    _loop: asyncio.AbstractEventLoop
    _protocol: Any
    _state: int
    _writes_after_loss: int

    #: Writes after the end silently ignored before we warn, and in which words: both asyncio's.
    _patience = constants.LOG_THRESHOLD_FOR_CONNLOST_WRITES - 1
    _words_for_late_writes = "socket.send() raised exception."

    def __repr__(self) -> str:
        state = "closed" if self._state >= OVER else "closing" if self._state >= CLOSING else self._condition()
        return f"<{type(self).__name__} {state} {self._details()}>"

    def _condition(self) -> str:
        """A word for the repr, while the transport is not closing."""
        return "open"

    def _details(self) -> str:
        """What the repr tells beside the kind and the state."""
        raise NotImplementedError

    def get_protocol(self) -> asyncio.BaseProtocol:
        """The current protocol; None after its ``connection_lost``."""
        return cast("asyncio.BaseProtocol", self._protocol)

    def _lose_connection(self, exc: BaseException | None) -> None:
        """The end: ``connection_lost(exc)`` follows, in the context of the caller."""
        raise NotImplementedError

    def _is_usual(self, exc: BaseException) -> bool:
        """Whether `exc` is a way in which such transports end, which the protocol learns from ``connection_lost``."""
        return isinstance(exc, OSError)

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

    def _count_late_write(self) -> None:
        self._writes_after_loss += 1
        if self._writes_after_loss > self._patience:
            _logger.warning(self._words_for_late_writes)

    def _end_unclosed(self, _warn: Any = warnings.warn) -> None:
        """The transport is being collected, and nobody has closed it."""
        _warn(unclosed(self, self._context), ResourceWarning, source=self)
        self._give_up()

    def _give_up(self) -> None:
        """Close the handle if that can be.  The collector may have closed it before."""
        raise NotImplementedError


class Life(LifeBase):
    """What leads this life: a protocol is told of its beginning and its end, and of nothing after that."""

    if not TYPE_CHECKING:  # see LifeBase
        __slots__ = ()

    _proactor: Proactor

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        protocol: asyncio.BaseProtocol,
        waiter: asyncio.Future[None] | None,
        extra: dict[str, Any] | None,
    ) -> None:
        asyncio.BaseTransport.__init__(self, extra)
        self._loop = loop
        # Receiving happens in one context, as it does in the handle that asyncio's own loops keep for a reader.
        self._context = context_for(loop) if loop.get_debug() else contextvars.copy_context()
        self._writes_after_loss = 0
        self.set_protocol(protocol)
        loop.call_soon(self._begin, waiter)
        self._state = MADE  # from now on the handle is ours

    def __del__(self) -> None:
        if getattr(self, "_state", CLOSED) < OVER:  # it has none where the constructor failed
            self._end_unclosed()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Switch protocols; what comes next goes to the new one."""
        self._protocol = protocol

    def is_closing(self) -> bool:
        """True once ``close`` or ``abort`` was called, the peer has ended, or the transport has failed."""
        return self._state >= CLOSING

    def close(self) -> None:
        """Send what is queued, then close; ``connection_lost(None)`` follows."""
        if self._happens(CLOSE) and not self._is_sending():
            self._lose_connection(None)

    # -- what differs ------------------------------------------------------------------------------

    def _start(self) -> None:
        """Called once, after ``connection_made``: time to wait for what comes by itself.  May raise."""

    def _stop_receiving(self) -> None:
        """Ask for the end of what is in flight for receiving, where that may end before the rest."""

    def _is_sending(self) -> bool:
        """Whether anything is still to be sent."""
        raise NotImplementedError

    def _stop(self) -> None:
        """Drop what is queued, and ask for the end of all that is in flight.  Its completions come all the same."""
        raise NotImplementedError

    def _may_be_closed(self) -> bool:
        """After ``_stop``: whether nothing is in flight any more, or it has to be let go of."""
        in_flight = any(op is not None and op.in_flight for op in self._operations())
        return not in_flight or self._proactor.let_go()

    def _operations(self) -> Iterable[Operation | None]:
        """All that may be in flight on the handle."""
        raise NotImplementedError

    def _close_handle(self) -> None:
        """Close the socket or pipe.  Nobody else does."""
        raise NotImplementedError

    def _call_end_soon(self, callback: Callable[[Any], object], argument: Any) -> None:
        """``call_soon`` for what tells the protocol of its beginning and its end."""
        self._loop.call_soon(callback, argument)

    # -- the machine -------------------------------------------------------------------------------

    def _happens(self, event: int, *args: Any) -> bool:
        """Take the step of LIFE; False if there is none."""
        step = LIFE.get((self._state, event))
        if step is None:
            return False
        self._state, action = step
        getattr(self, action)(*args)
        return True

    def _begin(self, waiter: asyncio.Future[None] | None) -> None:
        self._happens(_BEGIN, waiter)

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
        self._happens(_LOSE, exc)

    def _schedule_loss(self, exc: BaseException | None) -> None:
        try:
            self._stop()
        finally:  # whatever comes out of that (Ctrl-C, say): no later step leads there
            self._call_end_soon(self._call_connection_lost, exc)

    def _call_connection_lost(self, exc: BaseException | None) -> None:
        try:
            self._protocol.connection_lost(exc)
        finally:
            self._protocol = None  # it may keep the transport, and then only the collector would free the two
            self._happens(_TOLD)

    def _release(self) -> None:
        """Close the handle when the protocol is done with it and the kernel too."""
        if self._state == OVER and self._may_be_closed():
            self._happens(_LET_GO)
