"""Loops beside the loop: made and closed with work in flight, run in threads, dropped without being closed; a listener
that two of them share."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .program import Source, pattern
from .stage import LIMIT, Stage, describe, leave, stream_pair

__all__ = ["make_loops", "play_loops"]


@dataclass
class _Life:
    """One loop's life."""

    has: list[str]  # what it leaves in flight: names of functions of `_Furniture`
    turns: int  # before it is left
    in_thread: bool
    end: str  # "close", "close twice", "drop", "drop in a circle"


@dataclass
class _Share:
    """Loops in threads that share a listener."""

    loops: int
    clients: int
    unix: bool


@dataclass
class _Program:
    lives: list[_Life]
    share: _Share | None


def make_loops(source: Source) -> _Program:
    """Choose some lives."""
    furniture = [
        "server",
        "connection",
        "reading",
        "writing",
        "receive",
        "datagrams",
        "reader",
        "timer",
        "task",
        "pipe",
    ]

    def life() -> _Life:
        has = source.several(lambda: source.pick(furniture), 0, 5)
        end = source.pick(["close", "close", "close twice", "drop", "drop in a circle"])
        return _Life(has, source.pick([0, 1, 3, 10]), source.chance(0.4), end)

    share = _Share(source.between(2, 3), source.pick([5, 40]), source.chance(0.3)) if source.chance(0.5) else None
    return _Program(source.several(life, 0 if share else 1, 4), share)


class _Furniture:
    """What a loop has in flight when it ends.  The sockets are closed by whoever made them: that is this class."""

    def __init__(self, loop: Any) -> None:
        self.loop = loop
        self.own: list[Any] = []  # to be closed afterwards
        self.calls: list[str] = []

    def _pair(self) -> tuple[socket.socket, socket.socket]:
        pair = stream_pair(unix=True)
        self.own += pair
        return pair

    async def server(self) -> None:
        await self.loop.create_server(asyncio.Protocol, "127.0.0.1", 0)

    async def connection(self) -> None:
        ours, theirs = stream_pair(unix=True)
        self.own.append(theirs)
        await self.loop.create_connection(asyncio.Protocol, sock=ours)

    async def reading(self) -> None:
        ours, theirs = stream_pair(unix=True)
        self.own.append(theirs)
        transport, _ = await self.loop.create_connection(asyncio.Protocol, sock=ours)
        theirs.send(b"never read, perhaps")
        transport.pause_reading()

    async def writing(self) -> None:
        ours, theirs = stream_pair(unix=True)
        self.own.append(theirs)
        transport, _ = await self.loop.create_connection(asyncio.Protocol, sock=ours)
        transport.write(pattern(0, 4_000_000))

    async def receive(self) -> None:
        self.loop.create_task(self._forever(self.loop.sock_recv(self._pair()[0], 100)))

    async def datagrams(self) -> None:
        await self.loop.create_datagram_endpoint(asyncio.DatagramProtocol, local_addr=("127.0.0.1", 0))

    async def reader(self) -> None:
        self.loop.add_reader(self._pair()[0], self.calls.append, "reader")

    async def timer(self) -> None:
        self.loop.call_later(1000, self.calls.append, "timer")

    async def task(self) -> None:
        self.loop.create_task(self._forever(asyncio.sleep(1000)))

    async def pipe(self) -> None:
        reading, writing = os.pipe()
        self.own.append(open(writing, "wb", 0))
        await self.loop.connect_read_pipe(asyncio.Protocol, open(reading, "rb", 0))

    async def _forever(self, work: Any) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await work


async def play_loops(program: _Program, stage: Stage) -> None:
    """Play a program; the loop under test itself goes on meanwhile."""
    loop = stage.loop
    for life in program.lives:
        work = asyncio.to_thread(_live, life, stage) if life.in_thread else None
        if work is not None:
            await work
        else:
            # As if between two runs: one thread runs one loop at a time.
            with _outside(loop):
                _live(life, stage)
        await asyncio.sleep(0)
    if program.share is not None:
        await loop.run_in_executor(None, _share, program.share, stage)


@contextlib.contextmanager
def _outside(loop: Any) -> Iterator[None]:
    task = leave(loop)
    try:
        yield
    finally:
        asyncio._set_running_loop(loop)
        if task is not None:
            asyncio.tasks._enter_task(loop, task)


def _make_loop(stage: Stage) -> Any:
    made = type(stage.loop)() if not stage.ours else type(stage.loop)(stage.loop.driver)
    made.set_exception_handler(lambda *_: None)  # what is left behind is reported
    return made


def _live(life: _Life, stage: Stage) -> None:
    with _sentinels(stage, life) as sentinels, _warnings_that_open(sentinels):
        loop = _make_loop(stage)
        furniture = _Furniture(loop)
        for name in life.has:
            loop.run_until_complete(getattr(furniture, name)())
        for _ in range(life.turns):
            loop.run_until_complete(asyncio.sleep(0))
        own = furniture.own
        began = time.monotonic()
        if life.end.startswith("close"):
            loop.close()
            if life.end == "close twice":
                loop.close()
            stage.check(loop.is_closed(), "is_closed() after close()")
        elif life.end == "drop in a circle":
            loop.itself = loop
        loop = furniture.loop = None
        furniture = None  # type: ignore[assignment]  # it is dropped
        gc.collect()
        stage.check(time.monotonic() - began < LIMIT / 2, f"the end of a loop took long: {life}")
        for thing in own:
            thing.close()
        gc.collect()


@contextlib.contextmanager
def _warnings_that_open(sentinels: list[int]) -> Iterator[None]:
    """What is dropped without being closed warns, as it should.  Whoever hears it opens a file, as a log may do: so
    numbers become somebody else's in the middle of the collector's work."""

    def show(*_: Any, **more: Any) -> None:
        sentinels.append(os.open(os.devnull, os.O_RDONLY))

    usual, warnings.showwarning = warnings.showwarning, show
    try:
        yield
    finally:
        warnings.showwarning = usual


@contextlib.contextmanager
def _sentinels(stage: Stage, life: _Life) -> Iterator[list[int]]:
    """Files of somebody else, opened before, meanwhile and, under numbers that became free, after: nobody may close
    them."""
    sentinels = [os.open(os.devnull, os.O_RDONLY) for _ in range(3)]
    yield sentinels
    sentinels += [os.open(os.devnull, os.O_RDONLY) for _ in range(20)]
    gc.collect()
    for number in sentinels:
        try:
            os.close(number)
        except OSError as exc:
            stage.fail(f"somebody else's descriptor was closed: {describe(exc)} after {life}")


def _share(share: _Share, stage: Stage) -> None:
    """Every client of a shared listener is served, by whichever loop."""
    listener = socket.socket(socket.AF_UNIX if share.unix else socket.AF_INET)
    listener.bind(f"\0fuzz-{id(share):x}" if share.unix else ("127.0.0.1", 0))
    listener.listen(100)
    listener.setblocking(False)
    loops = [_make_loop(stage) for _ in range(share.loops)]
    ready = threading.Barrier(share.loops + 1)

    async def answer(reader: Any, writer: Any) -> None:
        writer.write(await reader.read(100))
        writer.close()
        await writer.wait_closed()

    def serve(loop: Any) -> None:
        async def main() -> None:
            own = listener.dup()
            start = asyncio.start_unix_server if share.unix else asyncio.start_server
            server = await start(answer, sock=own)
            ready.wait()
            await stopped
            server.close()
            await asyncio.sleep(0.01)

        stopped = loop.create_future()
        loop.stopped = lambda: loop.call_soon_threadsafe(stopped.set_result, None)
        loop.run_until_complete(main())
        loop.close()

    threads = [threading.Thread(target=serve, args=(loop,), daemon=True) for loop in loops]
    for thread in threads:
        thread.start()
    ready.wait()
    with listener:
        for number in range(share.clients):
            with socket.socket(listener.family) as client:
                client.settimeout(LIMIT)
                client.connect(listener.getsockname())
                client.sendall(b"%d" % number)
                got = client.recv(100)
                stage.check(got == b"%d" % number, f"a client of a shared listener got {got!r}")
    for loop, thread in zip(loops, threads, strict=True):
        loop.stopped()
        thread.join(LIMIT)
        stage.check(not thread.is_alive(), "a loop in a thread does not end")
