"""One turn of the loop: the ready queue, the timers, and where the completions come in.

A turn waits in the port for what has completed, lets the completions run, and then runs the callbacks that are ready.
What was ready before the wait runs before the completions; what callbacks schedule runs in the next turn.

BaseEventLoop brings all of this but the completions.  The native tier has it in C (``_native/hot/turns.c``).
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVarTuple

from ..native import hot
from ..ports.driver import Driver

__all__ = ["PythonTurns", "Turns"]

_Args = TypeVarTuple("_Args")


class _Completions(asyncio.Handle):
    """Stands in the ready queue: all that the wait of this turn has gathered, to be delivered."""

    __slots__ = ()

    _callback: Callable[[], None]

    def _run(self) -> None:
        self._callback()  # in no context of its own: each operation has one, and a nested run comes here again

    def cancel(self) -> None:
        """Nothing: whoever cancels all that is ready does not mean the whole loop."""

    def __repr__(self) -> str:
        return "<the completions of a turn>"


class PythonTurns(asyncio.BaseEventLoop):
    """The turn of BaseEventLoop, with completions instead of events."""

    _ready: Any  # BaseEventLoop's ready queue
    _scheduled: list[Any]  # and its heap of timers, some of which are cancelled: so many
    _timer_cancelled_count: int

    _waited = False  # True: the wait of this turn has been already, see embedding.py; only the native turn looks at it

    _select: Any = None  # a replacement of the proactor's `select`, for the native turn as well
    _selector: Any  # what BaseEventLoop waits in: the proactor, whose `select` is the driver's `wait`

    def _use(self, driver: Driver) -> None:
        """Wait for and deliver the completions of `driver`, from now on."""
        driver.before_sleep = self._has_work
        self._dispatch = driver.dispatch
        self._completions = _Completions(driver.dispatch, (), self, contextvars.Context())

    def _has_work(self) -> bool:
        """True if a callback is ready to run."""
        return bool(self._ready)

    def _next_timer(self) -> float | None:
        """When the earliest timer is due, by the loop's clock; None if there is none."""
        while self._scheduled and self._scheduled[0]._cancelled:  # BaseEventLoop drops them in its own turn only
            heapq.heappop(self._scheduled)._scheduled = False
            self._timer_cancelled_count -= 1
        return self._scheduled[0].when() if self._scheduled else None

    def call_at(
        self,
        when: float,
        callback: Callable[[*_Args], object],
        *args: *_Args,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        """Call ``callback(*args)`` when time() has come to `when`, seconds.  Raises ValueError for NaN."""
        # Neither earlier nor later than anything: the heap would lose its order.
        if when is not None and math.isnan(when):
            raise ValueError("the time of a timer must be a number, not NaN")
        timer: Any = super().call_at(when, callback, *args, context=context)
        if timer._source_traceback:
            del timer._source_traceback[-1]  # this frame, which is of no interest
        return timer  # type: ignore[no-any-return]  # it is one

    def _process_events(self, event_list: Any) -> None:
        if self._ready:
            self._ready.append(self._completions)
        else:
            self._dispatch()

    def _forget_callbacks(self) -> None:
        """Drop what is ready and every timer; here BaseEventLoop's close() does."""


if TYPE_CHECKING or hot is None:
    Turns = PythonTurns
else:

    class Turns(hot.Turns):
        """The native turn, which has to be told what stands for the completions."""

        def _use(self, driver):
            super()._use(driver, _Completions(driver.dispatch, (), self, contextvars.Context()))
