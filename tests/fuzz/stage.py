"""What a program plays on: its loop, the notes that are compared between loops, and what was found to be wrong."""

from __future__ import annotations

import asyncio
import os
import socket
import time
import traceback
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

__all__ = ["LIMIT", "WITHOUT", "Planned", "Stage", "describe", "stream_pair"]

_T = TypeVar("_T")

#: Seconds that a program waits for what ought to happen soon; long, since machines can be busy.
LIMIT = 10.0

#: The environment variable with names of actions that are left out of all programs: see the option --without.
WITHOUT = "FUZZ_WITHOUT"

#: More than this of one program is no news.
_MOST_PROBLEMS = 12


class Planned(Exception):
    """What programs raise on purpose: the only exception that may reach the loop's exception handler."""


class Stage:
    """A loop under test, with a note book."""

    def __init__(self, loop: asyncio.AbstractEventLoop, kind: str) -> None:
        self.loop: Any = loop
        #: False: asyncio's own loop, which promises less here and there.
        self.ours = kind != "stock"
        #: True while the system calls fail as they never may on a sound machine: connections may be lost at any time.
        self.hard = False
        #: What is to be called when the loop has stopped; for the families that stop it.
        self.between: list[Callable[[], object]] = []
        #: What each actor of the program saw, in order.
        self.trace: dict[str, list[str]] = {}
        self.problems: list[str] = []
        #: Actions that are left out, to see what is behind a fault that is known.
        self.without = frozenset(filter(None, os.environ.get(WITHOUT, "").split(",")))
        #: Counts whatever happens, so that a program can wait until nothing does.
        self.happenings = 0

    # -- notes and findings ------------------------------------------------------------------------

    def note(self, actor: str, what: object) -> None:
        """Write down what `actor` saw: it must see the same on every loop."""
        self.happenings += 1
        self.trace.setdefault(actor, []).append(str(what))

    def fail(self, what: str) -> None:
        """Something is wrong."""
        self.happenings += 1
        if what not in self.problems and len(self.problems) < _MOST_PROBLEMS:
            self.problems.append(what)

    def check(self, holds: object, what: str) -> None:
        """Fail with `what` unless `holds`."""
        if not holds:
            self.fail(what)

    def raised(self, exc: BaseException, where: str) -> None:
        """An exception came out where none may."""
        lines = traceback.format_exception(exc)
        self.fail(f"{where}: {exc!r}\n{''.join(lines[-3:])}".rstrip())

    def handle(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """The loop's exception handler."""
        exc = context.get("exception")
        if isinstance(exc, Planned) or (self.hard and isinstance(exc, OSError)):
            return
        where = f"the exception handler was told {context.get('message')!r}"
        if exc is None:
            self.fail(where)
        else:
            self.raised(exc, where)

    # -- waiting -----------------------------------------------------------------------------------

    async def until(self, condition: Callable[[], object], what: str, seconds: float = LIMIT) -> bool:
        """Wait until `condition()` holds; fails with `what` and returns False if it does not in time."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                self.fail(f"not within {seconds:g} s: {what}")
                return False
            await asyncio.sleep(0.0005)
        return True

    async def within(self, work: Awaitable[_T], what: str, seconds: float = LIMIT) -> _T | None:
        """Await `work`; fails with `what`, cancels it and returns None if it does not end in time."""
        task = asyncio.ensure_future(work)
        done, _ = await asyncio.wait([task], timeout=seconds)
        if not done:
            self.fail(f"not within {seconds:g} s: {what}")
            task.cancel()
            await asyncio.wait([task], timeout=1)
            if task.done() and not task.cancelled():
                task.exception()  # heard
            return None
        return task.result()

    async def together(self, *parts: Coroutine[Any, Any, object]) -> None:
        """Play parts of the program side by side; whatever one of them raises is a finding."""
        results = await asyncio.gather(*parts, return_exceptions=True)
        for part, result in zip(parts, results, strict=True):
            if isinstance(result, BaseException):
                self.raised(result, f"out of {getattr(part, '__qualname__', part)}")

    async def quiet(self, turns: int = 5, looks: int = 3) -> None:
        """Wait until nothing happens any more: `looks` times in a row, each `turns` turns and half a millisecond."""
        still = 0
        while still < looks:
            before = self.happenings
            for _ in range(turns):
                await asyncio.sleep(0)
            await asyncio.sleep(0.0005)
            still = still + 1 if self.happenings == before else 0


def stream_pair(unix: bool, buffers: int | None = None) -> tuple[socket.socket, socket.socket]:
    """Two connected non-blocking stream sockets; `buffers`: bytes that the kernel keeps for each, about."""
    if unix:
        pair = socket.socketpair()
    else:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            first = socket.create_connection(listener.getsockname(), LIMIT)
            try:
                pair = first, listener.accept()[0]
            except OSError:
                first.close()
                raise
    for sock in pair:
        sock.setblocking(False)
        if buffers is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffers)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffers)
    return pair


def leave(loop: asyncio.AbstractEventLoop) -> asyncio.Task[Any] | None:
    """From within a callback of `loop`: let this thread run another loop, as if this one did not run.

    Returns the task that ran.  It is to be left too: since Python 3.14 it is the thread's and not the loop's, and the
    tasks of the other loop would be refused.  In a forked child asyncio leaves both; but 3.14.0 keeps the task.
    """
    asyncio._set_running_loop(loop)
    task = asyncio.current_task(loop)
    if task is not None:
        asyncio.tasks._leave_task(loop, task)
    asyncio._set_running_loop(None)
    return task


def describe(exc: BaseException | None) -> str:
    """An exception, for notes: which of several errors of a connection it is depends on who was quicker."""
    if isinstance(exc, ConnectionError):
        return "ConnectionError"
    return "None" if exc is None else type(exc).__name__
