"""The workloads of the micro benchmarks, each run in a process of its own.

``python -m benchmarks.callbacks PEER WORKLOAD`` prints the CPU nanoseconds (user and system, all threads)
that one operation took.  A workload is a coroutine function that does `count` operations.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable

from .peers import PEERS, new_event_loop

__all__ = ["WORKLOADS"]


async def _call_soon(count: int) -> None:
    """A chain: each callback schedules the next, so every turn of the loop runs one."""
    loop = asyncio.get_running_loop()
    done = loop.create_future()
    left = count

    def link() -> None:
        nonlocal left
        left -= 1
        if left:
            loop.call_soon(link)
        else:
            done.set_result(None)

    loop.call_soon(link)
    await done


async def _sleep_0(count: int) -> None:
    """One task that gives way, again and again."""
    for _ in range(count):
        await asyncio.sleep(0)


async def _call_later(count: int) -> None:
    """Timers set a thousand at a time, due in another order than they are set in; all of them fire."""
    loop = asyncio.get_running_loop()
    batch = 1000

    for _ in range(count // batch):
        done = loop.create_future()
        left = batch

        def fire(done: asyncio.Future[None] = done) -> None:
            nonlocal left
            left -= 1
            if not left:
                done.set_result(None)

        for number in range(batch):
            loop.call_later(number * 7919 % batch * 1e-6, fire)
        await done


async def _call_later_cancel(count: int) -> None:
    """Timeouts that never strike: set, and cancelled a hundred later, as those of a busy server are."""
    loop = asyncio.get_running_loop()
    pending: list[asyncio.TimerHandle] = []
    for number in range(count):
        pending.append(loop.call_later(60.0, _nothing))
        if len(pending) == 100:
            for handle in pending:
                handle.cancel()
            pending.clear()
            if number % 1000 == 999:
                await asyncio.sleep(0)


async def _tasks(count: int) -> None:
    """Tasks that end at once, a hundred made before each is awaited."""
    loop = asyncio.get_running_loop()

    async def nothing() -> None:
        pass

    for _ in range(count // 100):
        for task in [loop.create_task(nothing()) for _ in range(100)]:
            await task


def _nothing() -> None:
    pass


WORKLOADS: dict[str, Callable[[int], Awaitable[None]]] = {
    "call_soon": _call_soon,
    "sleep(0)": _sleep_0,
    "call_later": _call_later,
    "call_later, cancelled": _call_later_cancel,
    "tasks": _tasks,
}

_WARMUP = 10_000
_COUNT = 200_000


def _main(peer: str, workload: str) -> None:
    loop = new_event_loop(PEERS[peer])
    asyncio.set_event_loop(loop)

    async def measure() -> float:
        work = WORKLOADS[workload]
        await work(_WARMUP)
        before = time.process_time_ns()
        await work(_COUNT)
        return (time.process_time_ns() - before) / _COUNT

    print(loop.run_until_complete(measure()))


if __name__ == "__main__":
    _main(*sys.argv[1:3])
