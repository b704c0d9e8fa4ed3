"""The order of callbacks, tasks and timers; calls from other threads; signals."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .program import Source
from .stage import Planned, Stage, describe

__all__ = ["make_signals", "make_threads", "make_timers", "play_signals", "play_threads", "play_timers"]


#: What the clock can tell apart, seconds.
_RESOLUTION = time.get_clock_info("monotonic").resolution


# -- callbacks, tasks and timers -------------------------------------------------------------------


@dataclass
class _Node:
    """A callback: what it does when it runs."""

    name: str
    how: str  # it is called: "soon", "later", "at", "task", "future"
    seconds: float
    children: list[_Node]
    does: str  # "", "raise", "cancel" (one that was called later), "collect", "time", "context"


@dataclass
class _Timers:
    roots: list[_Node]
    #: Coroutines that wait for each other: the key of `_SCENES`.
    scenes: list[str]


def make_timers(source: Source) -> _Timers:
    """Choose a tree of callbacks."""
    names = map("c{}".format, itertools.count())
    left = [source.pick([10, 60, 300])]

    def node(depth: int) -> _Node:
        left[0] -= 1
        many = 0 if depth > 6 or left[0] <= 0 else source.below(4)
        return _Node(
            next(names),
            source.weighted([(5, "soon"), (2, "later"), (1, "at"), (1, "task"), (1, "future")]),
            source.pick([0, 0, -1, 0.0003, 0.001, 0.005]),
            [node(depth + 1) for _ in range(many)],
            source.weighted([(10, ""), (1, "raise"), (2, "cancel"), (1, "collect"), (1, "time")]),
        )

    roots = source.several(lambda: node(0), 1, 5)
    return _Timers(roots, source.several(lambda: source.pick(sorted(_SCENES)), 0, 4))


class _Tree:
    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.loop = stage.loop
        self.waiting: dict[str, tuple[Any, float, float]] = {}  # timers: handle, when it is due, when it was made
        self.cancelled: set[str] = set()
        self.called = 0
        self.ran = 0

    def call(self, node: _Node) -> None:
        """Have it called in its way."""
        self.called += 1
        if node.how == "soon":
            self.loop.call_soon(self.run, node)
        elif node.how in ("later", "at"):
            now = self.loop.time()
            due = now + node.seconds
            if node.how == "later":
                handle = self.loop.call_later(node.seconds, self.run, node)
                self.stage.check(handle.when() >= due, "a timer's when() lies before now")
                due = handle.when()
            else:
                handle = self.loop.call_at(due, self.run, node)
                self.stage.check(handle.when() == due, "a timer's when() is not what it was made with")
            self.waiting[node.name] = (handle, due, now)
        elif node.how == "task":
            self.loop.create_task(self._as_task(node))
        else:
            future = self.loop.create_future()
            future.add_done_callback(lambda _: self.run(node))
            future.set_result(None)

    async def _as_task(self, node: _Node) -> None:
        with contextlib.suppress(Planned):
            self.run(node)

    def run(self, node: _Node) -> None:
        """It is called."""
        self.ran += 1
        _, due, _ = self.waiting.pop(node.name, (None, None, None))
        if node.name in self.cancelled:
            self.stage.fail(f"{node.name} was cancelled and runs")
        if due is not None:
            # A timer may come earlier than it is due by what the clock can tell.
            early = due - self.loop.time()
            self.stage.check(early <= _RESOLUTION, f"a timer ran {early} s early")
            # Those that were made before it can have been ready.
            waiting = self.waiting.items()
            sooner = [name for name, (_, other, made) in waiting if other < due and made < due - 2 * _RESOLUTION]
            self.stage.check(not sooner, f"{node.name} ran before {sooner}, which were due before it")
        for child in node.children:
            self.call(child)
        if node.does == "cancel" and self.waiting:
            name = max(self.waiting, key=lambda name: self.waiting[name][1])
            self.waiting.pop(name)[0].cancel()
            self.cancelled.add(name)
            self.called -= 1
        elif node.does == "collect":
            gc.collect(0)
        elif node.does == "time":
            before = self.loop.time()
            self.stage.check(self.loop.time() >= before, "the clock goes backwards")
        elif node.does == "raise":
            raise Planned


async def play_timers(program: _Timers, stage: Stage) -> None:
    """Play a program."""
    tree = _Tree(stage)
    for root in program.roots:
        tree.call(root)
    scenes = [_SCENES[name](stage, f"{name} {number}") for number, name in enumerate(program.scenes)]
    await stage.together(*scenes)
    await stage.until(lambda: tree.ran == tree.called, f"all callbacks: {len(tree.waiting)} timers wait")
    await asyncio.sleep(0)
    _play_order(program, stage)
    await stage.quiet()
    stage.check(stage.trace["order"][-1] == "end", "some callbacks were not called")


def _play_order(program: _Timers, stage: Stage) -> None:
    """The same trees without timers, whose callbacks have to run in one order only."""
    loop = stage.loop
    left = [0]

    def run(node: _Node) -> None:
        stage.note("order", node.name)
        for child in node.children:
            call(child)
        left[0] -= 1
        if not left[0]:
            stage.note("order", "end")

    async def as_task(node: _Node) -> None:
        run(node)
        await asyncio.sleep(0)

    def call(node: _Node) -> None:
        left[0] += 1
        if node.how == "task":
            loop.create_task(as_task(node))
        elif node.how == "future":
            future = loop.create_future()
            future.add_done_callback(lambda _: run(node))
            future.set_result(None)
        else:
            loop.call_soon(run, node)

    for root in program.roots:
        call(root)


async def _queue_scene(stage: Stage, name: str) -> None:
    queue: asyncio.Queue[int] = asyncio.Queue(2)

    async def put() -> None:
        for number in range(6):
            await queue.put(number)
            stage.note(name, f"put {number}")

    async def get(who: str) -> None:
        for _ in range(3):
            stage.note(name, f"{who} gets {await queue.get()}")

    await asyncio.gather(put(), get("one"), get("other"))


async def _lock_scene(stage: Stage, name: str) -> None:
    lock, event = asyncio.Lock(), asyncio.Event()

    async def hold(who: int) -> None:
        async with lock:
            stage.note(name, f"{who} holds")
            await asyncio.sleep(0)
            if who == 2:
                event.set()

    await asyncio.gather(*map(hold, range(4)), event.wait())
    stage.note(name, "over")


async def _cancel_scene(stage: Stage, name: str) -> None:
    async def sleeper(who: int) -> None:
        try:
            await asyncio.sleep(5)
        except asyncio.CancelledError:
            stage.note(name, f"{who} is cancelled")
            if who == 1:
                await asyncio.sleep(0)
            raise

    tasks = [asyncio.ensure_future(sleeper(who)) for who in range(3)]
    await asyncio.sleep(0)
    for task in reversed(tasks):
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        stage.note(name, describe(result))


async def _group_scene(stage: Stage, name: str) -> None:
    async def fails(turns: int) -> None:
        for _ in range(turns):
            await asyncio.sleep(0)
        raise Planned

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(fails(2))
            group.create_task(asyncio.sleep(5))
    except* Planned as caught:
        stage.note(name, f"{len(caught.exceptions)} failed")


async def _timeout_scene(stage: Stage, name: str) -> None:
    for seconds in (0, 0.001):
        try:
            async with asyncio.timeout(seconds):
                await asyncio.sleep(5)
        except TimeoutError:
            stage.note(name, f"timed out after {seconds}")
    stage.note(name, str(await asyncio.wait_for(asyncio.sleep(0, "in time"), 5)))


async def _executor_scene(stage: Stage, name: str) -> None:
    results = await asyncio.gather(*(stage.loop.run_in_executor(None, pow, 2, number) for number in range(5)))
    stage.note(name, results)


async def _shield_scene(stage: Stage, name: str) -> None:
    inner = asyncio.ensure_future(asyncio.sleep(0.001, "kept"))
    outer = asyncio.shield(inner)
    await asyncio.sleep(0)
    outer.cancel()
    stage.note(name, await inner)


_SCENES = {
    "queue": _queue_scene,
    "lock": _lock_scene,
    "cancel": _cancel_scene,
    "group": _group_scene,
    "timeout": _timeout_scene,
    "executor": _executor_scene,
    "shield": _shield_scene,
}


# -- other threads ---------------------------------------------------------------------------------


@dataclass
class _Caller:
    """A thread: what it does, one thing after the other, and how many calls it makes without a rest."""

    does: list[str]  # "soon", "coroutine", "burst", "rest"
    burst: int


@dataclass
class _Threads:
    callers: list[_Caller]
    busy: bool  # the loop has something to do by itself
    executor: int  # functions that run in the executor meanwhile


def make_threads(source: Source) -> _Threads:
    """Choose some threads."""

    def caller() -> _Caller:
        does = source.several(lambda: source.pick(["soon", "coroutine", "burst", "rest", "rest"]), 1, 20)
        return _Caller(does, source.pick([2, 50, 500]))

    return _Threads(source.several(caller, 1, 6), source.chance(0.3), source.below(8))


async def play_threads(program: _Threads, stage: Stage) -> None:
    """Play a program."""
    loop = stage.loop
    got: list[list[int]] = [[] for _ in program.callers]
    given = [0] * len(program.callers)
    answers = 0

    async def answer(number: int) -> int:
        await asyncio.sleep(0)
        return number

    def run(who: int, caller: _Caller) -> None:
        nonlocal answers
        for what in caller.does:
            if what == "rest":
                time.sleep(0.0005)
            elif what == "coroutine":
                future = asyncio.run_coroutine_threadsafe(answer(who), loop)
                if future.result(30) == who:
                    answers += 1
            else:
                for _ in range(caller.burst if what == "burst" else 1):
                    loop.call_soon_threadsafe(got[who].append, given[who])
                    given[who] += 1

    threads = [threading.Thread(target=run, args=each, daemon=True) for each in enumerate(program.callers)]
    for thread in threads:
        thread.start()
    executed = [loop.run_in_executor(None, time.sleep, 0.0005) for _ in range(program.executor)]
    while any(thread.is_alive() for thread in threads):
        # Asleep for long: only the threads' calls may end it.
        await asyncio.sleep(0 if program.busy else 0.02)
    await asyncio.gather(*executed)
    await stage.until(lambda: sum(map(len, got)) == sum(given), "the calls of other threads")
    for who, numbers in enumerate(got):
        stage.check(numbers == list(range(given[who])), f"calls of one thread out of order: {numbers[:20]}")
    for thread in threads:
        thread.join()


# -- signals ---------------------------------------------------------------------------------------

_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGCHLD, signal.SIGTERM)


@dataclass
class _Signals:
    #: What happens, one after the other: "add", "remove", "send", "from a thread", "from a child", "wait", "misuse".
    steps: list[tuple[str, int]]


def make_signals(source: Source) -> _Signals:
    """Choose what happens."""
    names = ["add", "add", "remove", "send", "send", "send", "from a thread", "from a child", "wait", "misuse"]
    return _Signals(source.several(lambda: (source.pick(names), source.below(len(_SIGNALS))), 3, 20))


async def play_signals(program: _Signals, stage: Stage) -> None:
    """Play a program."""
    loop = stage.loop
    handled: list[int] = []
    added: set[signal.Signals] = set()
    with _own_handlers():
        for number, (name, which) in enumerate(program.steps):
            sent = _SIGNALS[which]
            if name == "add":
                loop.add_signal_handler(sent, handled.append, sent)
                added.add(sent)
            elif name == "remove":
                stage.check(loop.remove_signal_handler(sent) is (sent in added), "remove_signal_handler() is wrong")
                added.discard(sent)
            elif name == "misuse":
                for wrong in (signal.SIGKILL, 0, 1000, "SIGTERM"):
                    try:
                        loop.add_signal_handler(wrong, print)
                    except Exception as exc:
                        stage.note("misuse", f"{wrong}: {describe(exc)}")
                    else:
                        stage.fail(f"add_signal_handler({wrong}) did not raise")
            elif name == "wait":
                await asyncio.sleep(0.001)
            elif sent in added:
                await _expect(name, sent, handled, stage)
            stage.note("signals", f"{number} {name}")
        for sent in list(added):
            stage.check(loop.remove_signal_handler(sent), "remove_signal_handler() at the end")


async def _expect(how: str, number: signal.Signals, handled: list[int], stage: Stage) -> None:
    """Send a signal that has a handler, which is to be called once."""
    before = handled.count(number)
    if how == "send":
        os.kill(os.getpid(), number)
    elif how == "from a thread":
        await stage.loop.run_in_executor(None, os.kill, os.getpid(), number)
    else:
        await asyncio.to_thread(os.spawnlp, os.P_WAIT, "kill", "kill", f"-{int(number)}", str(os.getpid()))
    await stage.until(lambda: handled.count(number) > before, f"the handler of {number!r}")
    if number is not signal.SIGCHLD:  # which also comes by itself
        stage.check(handled.count(number) == before + 1, f"a handler ran {handled.count(number) - before} times")


@contextlib.contextmanager
def _own_handlers() -> Iterator[None]:
    """Signals that nobody handles are ignored meanwhile; and it is looked at that the old handlers come back."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
