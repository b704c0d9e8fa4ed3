"""One turn of the loop: the ready queue, the timers, and where the completions come in.

A turn waits in the port for what has completed, lets the completions run, and then runs the callbacks that are ready.
What was ready before the wait runs before the completions; what callbacks schedule runs in the next turn.

BaseEventLoop brings all of this but the completions.  The native tier has it in C (``_native/hot/turns.c``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .native import hot

__all__ = ["PythonTurns", "Turns"]


class _Completions:
    """Stands in the ready queue like a Handle: all that the wait of this turn has gathered, to be delivered."""

    __slots__ = ("_callback", "_run")
    _cancelled = False

    def __init__(self, dispatch: Callable[[], None]) -> None:
        self._callback = self._run = dispatch

    def __repr__(self) -> str:
        return "<the completions of a turn>"


class _Port:
    """What BaseEventLoop waits in, under the name that it calls."""

    __slots__ = ("_wait",)

    def __init__(self, wait: Callable[[float | None], None]) -> None:
        self._wait = wait

    def select(self, timeout: float | None) -> tuple[()]:
        """Wait at most `timeout` seconds for completions, which stay where they are until the dispatch."""
        self._wait(timeout)
        return ()


class PythonTurns(asyncio.BaseEventLoop):
    """The turn of BaseEventLoop, with completions instead of events."""

    _ready: Any  # BaseEventLoop's ready queue

    def _use(self, wait: Callable[[float | None], None], dispatch: Callable[[], None]) -> None:
        """Wait with the one and deliver with the other, from now on."""
        self._selector = _Port(wait)
        self._dispatch = dispatch
        self._completions = _Completions(dispatch)

    def _has_work(self) -> bool:
        """True if a callback is ready to run."""
        return bool(self._ready)

    def _process_events(self, event_list: Any) -> None:
        if self._ready:
            self._ready.append(self._completions)
        else:
            self._dispatch()

    def _forget_callbacks(self) -> None:
        """Drop what is ready and every timer; here BaseEventLoop's close() does."""


if TYPE_CHECKING:
    Turns = PythonTurns
else:
    Turns = PythonTurns if hot is None else hot.Turns
