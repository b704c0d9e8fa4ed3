"""Loops in several threads: a main for each, and one end for all.

On a free-threaded Python they run side by side; with a GIL one at a time, no faster than one loop.  A loop and what
belongs to it is its thread's; threads talk to each other by ``loop.call_soon_threadsafe``.
"""

from __future__ import annotations

import asyncio
import contextvars
import sys
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar, cast

from .loop import IocpEventLoop, new_event_loop

__all__ = ["run_threads"]

_T = TypeVar("_T")

#: Seconds between two looks at Ctrl-C where it does not interrupt a wait.
_NAP = 0.25 if sys.platform == "win32" else None


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
        self._left = count  # threads that have not ended
        self._all_ended = threading.Event()
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
        members = [
            threading.Thread(
                target=self._run_one, args=(index, contextvars.copy_context()), name=f"loop-{index}", daemon=True
            )
            for index in range(len(self._loops))
        ]
        begun = 0
        try:
            for member in members:
                member.start()
                begun += 1
        except BaseException as error:  # no more threads can be had
            self._fail(error)
            self._ended(len(members) - begun)
        while not self._all_ended.is_set():
            try:
                # Not by join: on Python 3.11 and 3.12 a thread counts as ended once its join was interrupted.
                self._all_ended.wait(_NAP)
            except KeyboardInterrupt:
                if interrupted:
                    raise
                interrupted = True
                self._stop()
        for member in members[:begun]:
            member.join()
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

    def _run_one(self, index: int, context: contextvars.Context) -> None:
        try:
            with asyncio.Runner(debug=self._debug, loop_factory=lambda: self._loops[index]) as runner:
                self._results[index] = runner.run(self._take_part(index), context=context)
        except BaseException as error:
            self._fail(error)
        finally:
            self._ended(1)

    def _ended(self, count: int) -> None:
        with self._lock:
            self._left -= count
            if self._left == 0:
                self._all_ended.set()

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
