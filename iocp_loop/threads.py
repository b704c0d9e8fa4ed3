"""Loops in several threads: a main for each, and one end for all.

On a free-threaded Python they run side by side; with a GIL one at a time, no faster than one loop.  A loop and what
belongs to it is its thread's; threads talk to each other by ``loop.call_soon_threadsafe``.
"""

from __future__ import annotations

import _thread
import asyncio
import contextvars
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar, cast

from .loop import IocpEventLoop, new_event_loop

__all__ = ["run_threads"]

_T = TypeVar("_T")

#: Seconds between two looks at Ctrl-C.  On Windows it does not interrupt a wait; elsewhere not one that begins.
_NAP = 0.25


def run_threads(
    main: Callable[[int], Coroutine[Any, Any, _T]],
    *,
    threads: int,
    debug: bool | None = None,
    driver: str | None = None,
) -> list[_T]:
    """Run ``main(index)`` on a new loop in each of so many threads; their results, in the order of `index` from 0.

    The caller waits meanwhile, with its signal handlers at work.  If one main raises, the others are cancelled, and
    when all have ended, its exception is raised; where several raise, an ExceptionGroup of theirs.  Ctrl-C cancels all,
    and is raised (KeyboardInterrupt) when they have ended; a second one does not wait for them.

    `debug` as for :class:`asyncio.Runner`, `driver` as for :func:`new_event_loop`.  Each main has a copy of the
    caller's context.  Raises ValueError for less than one thread, RuntimeError when called from a running loop.
    """
    if threads < 1:
        raise ValueError(f"there must be 1 thread or more, not {threads}")
    if asyncio._get_running_loop() is not None:
        raise RuntimeError("iocp_loop.run_threads() cannot be called from a running event loop")
    return _Crew(main, threads, debug, driver).run()


class _Crew(Generic[_T]):
    """The threads, and what has become of each."""

    def __init__(
        self, main: Callable[[int], Coroutine[Any, Any, _T]], count: int, debug: bool | None, driver: str | None
    ) -> None:
        self._main = main
        self._debug = debug
        self._results: list[Any] = [None] * count
        self._failures: list[BaseException] = []  # in the order of their coming
        self._lock = threading.Lock()  # held around each use of what follows
        self._stopped = False
        self._begun: list[threading.Thread] = []
        self._free = set(range(count))  # places that nobody has taken: see _take
        self._left = count  # places whose thread has not ended
        # Held until all have ended.  A plain lock and no Event: Ctrl-C may strike within that, which then stays locked.
        self._not_ended = threading.Lock()
        self._not_ended.acquire()
        self._running: dict[asyncio.AbstractEventLoop, Callable[[], object]] = {}  # what cancels the main of each
        self._loops: list[IocpEventLoop] = []
        try:
            for _ in range(count):  # here: if the driver can't work, that is one error and not many
                self._loops.append(new_event_loop(driver))
        except BaseException:
            self._close_loops()
            raise

    def run(self) -> list[_T]:
        interrupted = False
        try:
            members = [
                threading.Thread(
                    target=self._run_one, args=(index, contextvars.copy_context()), name=f"loop-{index}", daemon=True
                )
                for index in range(len(self._loops))
            ]
            _thread.start_new_thread(self._begin, (members,))
        except BaseException as error:  # no thread can be had; or Ctrl-C, and it may have begun or not
            self._fail(error)
            self._take_the_rest()
        while True:
            try:
                # Not by join: on Python 3.11 and 3.12 a thread counts as ended once its join was interrupted.
                while self._left:
                    self._not_ended.acquire(timeout=_NAP)
                break
            except KeyboardInterrupt:
                if interrupted:
                    raise
                interrupted = True
                self._stop()
        try:
            for member in self._begun:
                member.join()
        finally:
            self._close_loops()
        failure = self._failure()
        if interrupted:
            raise KeyboardInterrupt from failure
        if failure is not None:
            try:
                raise failure
            finally:
                failure = None  # it refers to this frame
                self._failures.clear()
        return cast("list[_T]", self._results)

    def _close_loops(self) -> None:
        """Those that no thread has run and closed."""
        for loop in self._loops:
            loop.close()

    def _failure(self) -> BaseException | None:
        """What is to be raised."""
        failures = self._failures
        for failure in failures:
            if isinstance(failure, (SystemExit, KeyboardInterrupt)):
                return failure
        if len(failures) > 1:
            return BaseExceptionGroup("several threads have failed", failures)
        return failures[0] if failures else None

    def _begin(self, members: list[threading.Thread]) -> None:
        """In a thread of its own: a Ctrl-C that strikes within ``Thread.start`` may become a RuntimeError there."""
        try:
            for member in members:
                member.start()
                self._begun.append(member)
        except BaseException as error:  # no more threads can be had
            self._fail(error)
            self._take_the_rest()

    def _take(self, index: int) -> bool:
        """Take a place, to run its main and to count its end; False if somebody has."""
        with self._lock:
            free = index in self._free
            self._free.discard(index)
        return free

    def _take_the_rest(self) -> None:
        """Leave nothing to threads that have not begun to run, or that there are none of."""
        for index in range(len(self._loops)):
            if self._take(index):
                self._ended()

    def _run_one(self, index: int, context: contextvars.Context) -> None:
        if not self._take(index):
            return
        try:
            with asyncio.Runner(debug=self._debug, loop_factory=lambda: self._loops[index]) as runner:
                self._results[index] = runner.run(self._take_part(index), context=context)
        except BaseException as error:
            self._fail(error)
        finally:
            self._ended()

    def _ended(self) -> None:
        with self._lock:
            self._left -= 1
            if self._left == 0:
                self._not_ended.release()

    async def _take_part(self, index: int) -> _T:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None  # a Runner runs tasks
        with self._lock:
            self._running[loop] = task.cancel
            if self._stopped:
                task.cancel()
        try:
            return await self._main(index)
        finally:
            with self._lock:
                del self._running[loop]

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            if not (self._stopped and isinstance(error, asyncio.CancelledError)):  # which we have asked for
                self._failures.append(error)
        self._stop()

    def _stop(self) -> None:
        """Cancel every main, those that have not begun yet too; once, so that each can end in order."""
        with self._lock:
            if not self._stopped:
                self._stopped = True
                for loop, cancel in self._running.items():
                    loop.call_soon_threadsafe(cancel)
