"""The workloads of the micro benchmarks, each run in a process of its own.

``python -m benchmarks.callbacks PEER WORKLOAD`` prints a line of JSON: the CPU nanoseconds (user and system, all
threads of this process) and the elapsed ones that one operation took.  A workload is a coroutine function that does
`count` operations.
"""

from __future__ import annotations

import asyncio
import json
import queue
import shutil
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from .peers import PEERS, new_event_loop

__all__ = ["WORKLOADS", "Workload", "measure"]


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
    """Timeouts that never fire: set, and cancelled a hundred later, as those of a busy server are."""
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


async def _many_timers(count: int) -> None:
    """All timers are set before the first is due, in another order than they fire in."""
    loop = asyncio.get_running_loop()
    done = loop.create_future()
    left = count

    def fire() -> None:
        nonlocal left
        left -= 1
        if not left:
            done.set_result(None)

    begin = loop.time() + count * 2e-6
    for number in range(count):
        loop.call_at(begin + number * 7919 % count * 1e-9, fire)
    await done


async def _wake_up(count: int) -> None:
    """A thread wakes the idle loop and waits until the callback has run."""
    loop = asyncio.get_running_loop()
    answers: queue.SimpleQueue[None] = queue.SimpleQueue()
    done = loop.create_future()

    def answer() -> None:
        answers.put(None)

    def ask() -> None:
        for _ in range(count):
            loop.call_soon_threadsafe(answer)
            answers.get()
        loop.call_soon_threadsafe(done.set_result, None)

    thread = threading.Thread(target=ask)
    thread.start()
    await done
    thread.join()


async def _subprocess(count: int) -> None:
    """One child after the other, each waited for."""
    program = shutil.which("true") or "true"
    for _ in range(count):
        process = await asyncio.create_subprocess_exec(program)
        if await process.wait():
            raise RuntimeError("the child failed")


def _nothing() -> None:
    pass


class Workload(NamedTuple):
    """A coroutine function, and how often to call it."""

    run: Callable[[int], Awaitable[None]]
    #: Operations that are measured, and before them those that are not.
    operations: int = 200_000
    warmup: int = 10_000


WORKLOADS = {
    "call_soon": Workload(_call_soon),
    "sleep(0)": Workload(_sleep_0),
    "call_later": Workload(_call_later),
    "call_later, cancelled": Workload(_call_later_cancel),
    "call_later, 1,000,000 timers": Workload(_many_timers, 1_000_000, 0),
    "tasks": Workload(_tasks),
    "wake-up from a thread": Workload(_wake_up, 20_000, 1_000),
    "subprocess": Workload(_subprocess, 200, 10),
}


def measure(loop: asyncio.AbstractEventLoop, workload: Workload) -> None:
    """Run `workload` on `loop` and print what it took."""
    asyncio.set_event_loop(loop)

    async def run() -> dict[str, float]:
        if workload.warmup:
            await workload.run(workload.warmup)
        cpu_ns, elapsed_ns = time.process_time_ns(), time.perf_counter_ns()
        await workload.run(workload.operations)
        cpu_ns, elapsed_ns = time.process_time_ns() - cpu_ns, time.perf_counter_ns() - elapsed_ns
        return {"cpu_ns": cpu_ns / workload.operations, "elapsed_ns": elapsed_ns / workload.operations}

    print(json.dumps(loop.run_until_complete(run())))


if __name__ == "__main__":
    measure(new_event_loop(PEERS[sys.argv[1]]), WORKLOADS[sys.argv[2]])
