"""One program, from the making of its loop to the look at what it has left behind."""

from __future__ import annotations

import asyncio
import errno
import gc
import importlib
import json
import logging
import os
import queue
import sys
import threading
import time
import warnings
from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass, field
from typing import Any

from ..support import open_files
from . import Family
from .program import Source
from .stage import LIMIT, Stage

__all__ = ["Report", "Setting", "play"]


@dataclass(frozen=True)
class Setting:
    """How a program's loop is run: `way` is one of `_WAYS`; the others make rare moments more likely."""

    way: str
    debug: bool
    collect: bool
    switch: bool

    @classmethod
    def make(cls, source: Source, family: Family) -> Setting:
        """Choose one for a program of `family`."""
        if family.stops:
            return cls("slices", source.chance(0.15), source.chance(0.15), source.chance(0.2))
        ways = [(6.0, "straight"), (1.0, "slices"), (1.0, "embedded")]
        if family.moves:
            ways.append((1.5, "threads"))
        return cls(source.weighted(ways), source.chance(0.15), source.chance(0.15), source.chance(0.2))


@dataclass
class Report:
    """What came of a program."""

    family: str
    seed: int
    problems: list[str] = field(default_factory=list)
    trace: dict[str, list[str]] = field(default_factory=dict)

    def to_json(self) -> str:
        """On one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Report:
        """The other way."""
        return cls(**json.loads(line))


def make_loop(name: str) -> asyncio.AbstractEventLoop:
    """A loop by the name of a driver, ``stock``, or ``module:function``."""
    if name == "stock":
        return asyncio.SelectorEventLoop()
    if ":" in name:
        module, _, function = name.partition(":")
        return getattr(importlib.import_module(module), function)()  # type: ignore[no-any-return]  # by its name
    import iocp_loop

    return iocp_loop.new_event_loop(name)


def play(family: Family, seed: int, loop_name: str) -> Report:
    """Play one program on a new loop.  To be called once in a process, which it leaves with other hooks."""
    source = Source(family.name, seed)
    program = family.make(source.sub("program"))
    setting = Setting.make(source.sub("setting"), family)
    before = open_files() or set()
    loop = make_loop(loop_name)
    stage = Stage(loop, loop_name)
    _listen(stage)
    loop.set_exception_handler(stage.handle)
    loop.set_debug(setting.debug)
    if setting.collect:
        gc.set_threshold(7, 2, 2)
    if setting.switch:
        sys.setswitchinterval(1e-5)
    try:
        _WAYS[setting.way](stage, family.play(program, stage), source.sub("slices"))
        loop.run_until_complete(_end(stage))
    except BaseException as exc:
        stage.raised(exc, "out of the loop")
    if stage.ours and (left := list(loop._proactor.in_flight.values())):  # type: ignore[attr-defined]  # our loop's own
        stage.fail(f"{len(left)} operations in flight at the end: {left[:3]}")
    loop.close()
    del loop, program
    stage.loop = None
    gc.set_threshold(700, 10, 10)
    gc.collect()
    if left_open := (open_files() or set()) - before:
        stage.fail(f"descriptors left open: {[os.readlink(f'/proc/self/fd/{fd}') for fd in sorted(left_open)]}")
    return Report(family.name, seed, stage.problems, stage.trace)


def _listen(stage: Stage) -> None:
    """Hear of everything that Python would only print."""

    def warned(message: Any, category: type[Warning], *_: Any, **more: Any) -> None:
        stage.fail(f"{category.__name__}: {message}")

    logging.disable(logging.CRITICAL)
    warnings.simplefilter("always")
    # Stock 3.12+: a child's fork while there are threads is the program's own doing.
    warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*fork.*")
    warnings.showwarning = warned
    sys.unraisablehook = lambda what: stage.raised(what.exc_value or Exception(), f"unraisable in {what.object!r}")
    threading.excepthook = lambda what: stage.raised(what.exc_value or Exception(), f"in thread {what.thread}")


async def _end(stage: Stage) -> None:
    """See tasks, executors and operations through."""
    left = asyncio.all_tasks() - {asyncio.current_task()}
    if left:
        stage.fail(f"tasks left: {sorted(map(repr, left))[:3]}")
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=LIMIT)
    await stage.loop.shutdown_asyncgens()
    await stage.loop.shutdown_default_executor()
    deadline = time.monotonic() + 2
    await asyncio.sleep(0)
    while stage.ours and stage.loop._proactor.in_flight and time.monotonic() < deadline:
        await asyncio.sleep(0.001)


# -- ways to run a loop ----------------------------------------------------------------------------

_Main = Coroutine[Any, Any, None]


def _straight(stage: Stage, main: _Main, source: Source) -> None:
    stage.loop.run_until_complete(main)


def _slices(
    stage: Stage, main: _Main, source: Source, call: Callable[[Callable[[], None]], None] | None = None
) -> None:
    """Stop the loop again and again; `call` runs each slice."""
    loop = stage.loop
    begun: list[asyncio.Task[None]] = []

    def begin() -> None:
        begun.append(loop.create_task(main))

    def run_slice() -> None:
        stop = loop.call_later(source.pick([0, 0.0005, 0.002, 0.01]), loop.stop)
        try:
            loop.run_forever()
        except OSError as exc:
            # No descriptor was left for the ring of another thread.  The loop goes on in one that has a ring.
            if not (stage.hard and exc.errno == errno.EMFILE):
                raise
        stop.cancel()
        while stage.between:
            stage.between.pop(0)()

    call = call or (lambda work: work())
    call(begin)
    while not begun[0].done():
        call(run_slice)
    begun[0].result()


def _threads(stage: Stage, main: _Main, source: Source) -> None:
    """The slices run in three threads, by turns that the program's seed decides."""
    threads = [_Worker() for _ in range(3)]
    try:
        _slices(stage, main, source, lambda work: source.pick(threads).call(work))
    finally:
        for thread in threads:
            thread.end()


def _embedded(stage: Stage, main: _Main, source: Source) -> None:
    """``poll`` and ``dispatch``, as a foreign main loop calls them; asyncio's own loop has neither."""
    if not stage.ours:
        _straight(stage, main, source)
        return
    task = stage.loop.create_task(main)
    while not task.done():
        stage.loop.poll(1)
        stage.loop.dispatch()
    task.result()


_WAYS: dict[str, Callable[[Stage, _Main, Source], None]] = {
    "straight": _straight,
    "slices": _slices,
    "threads": _threads,
    "embedded": _embedded,
}


class _Worker:
    """A thread that runs what it is given, one thing after the other."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def call(self, work: Callable[[], None]) -> None:
        """Run `work` in this thread and wait for it; raises what it raises."""
        self._work.put(work)
        exc = self._done.get()
        if exc is not None:
            raise exc

    def end(self) -> None:
        """Let the thread go."""
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                work()
            except BaseException as exc:
                self._done.put(exc)
            else:
                self._done.put(None)
