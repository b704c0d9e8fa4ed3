"""Running the loop inside another one, that of a graphical user interface for instance: ``poll`` and ``dispatch``.

``run_forever`` waits for completions and runs callbacks, by turns, and never gives the thread back.  These two methods
are the halves of such a turn, for a program whose thread belongs to somebody else's main loop:

* ``loop.poll(timeout)`` waits until there is something to run, and runs nothing.  A helper thread may do the waiting.
* ``loop.dispatch()`` runs what there is, and never waits.  It belongs into the thread of the main loop.

The two take turns: nothing of the loop may be used while a thread is in ``poll``, but what asyncio allows from other
threads (``call_soon_threadsafe``, ``run_coroutine_threadsafe``).  Those end the ``poll``.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from ..proactor import Proactor

__all__ = ["EmbeddingMethods"]

#: The longest single wait, seconds; the system's own limits are farther away.
LONGEST_WAIT = 24 * 3600.0


class _NoWait:
    """Stands in for the proactor where BaseEventLoop would wait: ``poll`` has done so."""

    @staticmethod
    def select(timeout: float | None) -> tuple[()]:
        return ()


class EmbeddingMethods(asyncio.BaseEventLoop):
    """The part of the loop that lets another main loop run it."""

    _proactor: Proactor
    _selector: Any
    _waited: bool
    _clock_resolution: float

    if TYPE_CHECKING:  # the ready queue and the timers: Turns'

        def _has_work(self) -> bool: ...
        def _next_timer(self) -> float | None: ...

    def poll(self, timeout: float | None = None) -> bool:
        """Wait at most `timeout` seconds (None: without limit) for something to run; False if there is nothing.

        It runs nothing: :meth:`dispatch` does.  From any thread, as long as nothing else uses the loop meanwhile but
        ``call_soon_threadsafe``, which ends the wait.  On driver ``uring`` a ring belongs to the thread that waits, so
        it should be the same thread each time.  Raises RuntimeError if the loop runs or is closed.
        """
        self._check_usable()
        driver = self._proactor.driver
        deadline = None if timeout is None else self.time() + timeout
        while not driver.gathered:
            due = self._is_due()
            self._selector.select(0 if due else self._wait_until(deadline))
            if due or self._is_due():
                return True
            if deadline is not None and not driver.gathered and self.time() >= deadline:
                return False
        return True

    def dispatch(self) -> None:
        """Run what is due: the completions that :meth:`poll` has gathered, callbacks and timers.  Never waits.

        What becomes due meanwhile is for the next time, so the caller keeps its own loop alive.  Raises RuntimeError
        if the loop runs or is closed, and whatever ends a ``run_forever`` (KeyboardInterrupt, SystemExit).
        """
        self._check_usable()
        self._selector, self._waited = _NoWait, True
        try:
            self.stop()  # one turn, and no more
            self.run_forever()
        finally:
            self._selector, self._waited = self._proactor, False

    def _check_usable(self) -> None:
        self._check_closed()  # type: ignore[attr-defined]  # BaseEventLoop's
        self._check_running()  # type: ignore[attr-defined]  # BaseEventLoop's

    def _is_due(self) -> bool:
        """Whether a callback or a timer is to be run, as BaseEventLoop will see it."""
        if self._has_work():
            return True
        timer = self._next_timer()
        return timer is not None and timer < self.time() + self._clock_resolution

    def _wait_until(self, deadline: float | None) -> float | None:
        """The seconds until `deadline` or the next timer, whichever is earlier."""
        ends = [end for end in (deadline, self._next_timer()) if end is not None]
        return min(max(0.0, min(ends) - self.time()), LONGEST_WAIT) if ends else None
