"""What tools reach for: private parts of asyncio's loops, and functions of asyncio's that they replace.

The tools themselves, where they are installed, are in test_libraries.py.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import heapq
import os
import random
import socket
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import iocp_loop

from .support import LIMIT, MUCH, WINDOWS, read_exactly, until

Loop = iocp_loop.IocpEventLoop
Pair = tuple[socket.socket, socket.socket]


async def turns(count: int = 3) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_the_queues_show_handles(loop: Loop) -> None:
    seen: list[Any] = []
    timer = loop.call_later(100, print)
    earlier = loop.call_later(50, print)

    def look() -> None:
        queue: Any = loop._ready
        seen.extend(queue)
        seen.extend(queue[n] for n in range(len(queue)))
        seen.append(queue[-1])

    loop.call_soon(look)
    loop.call_soon(len, ())
    await turns()
    assert len(seen) > 2
    assert all(isinstance(handle, asyncio.Handle) and not handle.cancelled() for handle in seen)
    assert [handle for handle in loop._scheduled if handle in (timer, earlier)] == [earlier, timer]
    # Who cancels all that is ready does not cancel the loop.
    loop.call_soon(lambda: [handle.cancel() for handle in loop._ready])
    await asyncio.sleep(0.001)
    timer.cancel()
    earlier.cancel()


async def test_private_parts_of_handles_and_loops(loop: Any) -> None:
    context = contextvars.copy_context()
    soon = loop.call_soon(len, (), context=context)
    later = loop.call_later(100, len, ())
    assert (soon._callback, soon._args, soon._loop, soon._context) == (len, ((),), loop, context)
    assert (soon._cancelled, soon._repr, soon._source_traceback) == (False, None, None)
    assert later._scheduled
    assert later._when == later.when() > loop.time()
    later.cancel()
    assert later._cancelled
    assert later._callback is later._args is None
    assert loop._thread_id == threading.get_ident()
    assert loop._default_executor is None
    await loop.run_in_executor(None, len, ())
    assert loop._default_executor is not None
    assert loop._signal_handlers == {}
    assert not loop._closed
    assert not loop._stopping
    assert loop._clock_resolution > 0


async def test_private_parts_of_a_stream(loop: Any, pair: Pair) -> None:
    ours, _ = pair
    name, peer = ours.getsockname(), ours.getpeername()
    transport: Any
    transport, protocol = await loop.create_connection(asyncio.Protocol, sock=ours)
    assert (transport._sock, transport._loop, transport._protocol) == (ours, loop, protocol)
    assert transport._extra["socket"].fileno() == ours.fileno()
    assert (transport._extra["sockname"], transport._extra["peername"]) == (name, peer)
    transport._extra["mine"] = 1
    assert transport.get_extra_info("mine") == 1
    assert transport._read_ready_cb is not None
    transport.close()
    assert transport._read_ready_cb is None
    await until(lambda: ours.fileno() == -1)
    assert (transport._extra["sockname"], transport._extra["peername"]) == (name, peer)


# -- a turn that is not ours -----------------------------------------------------------------------


class Nested(Loop):
    """Runs turns of its own, within each other too, on what BaseEventLoop's turn uses."""

    _ready: Any
    _scheduled: Any
    _selector: Any
    _stopping: bool

    def _run_once(self) -> None:
        ready, timers = self._ready, self._scheduled
        while timers and timers[0]._cancelled:
            heapq.heappop(timers)
        timeout = None
        if ready or self._stopping:
            timeout = 0.0
        elif timers:
            timeout = max(0.0, timers[0]._when - self.time())
        self._process_events(self._selector.select(timeout))
        while timers and timers[0]._when < self.time() + self._clock_resolution:
            ready.append(heapq.heappop(timers))
        for _ in range(len(ready)):
            if not ready:
                break
            handle = ready.popleft()
            assert isinstance(handle, asyncio.Handle)
            if not handle.cancelled():
                handle._run()

    def run_inside(self, future: asyncio.Future[Any]) -> Any:
        """Run turns in the middle of one until `future` is done."""
        while not future.done():
            self._run_once()
        return future.result()


@pytest.fixture
def nested(driver: str, no_leak: None, reports: list[dict[str, Any]]) -> Iterator[Nested]:
    loop = Nested(driver)
    loop.set_exception_handler(lambda _, context: reports.append(context))
    yield loop
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
    assert not reports


def test_timers_run_once_and_in_order(nested: Nested) -> None:
    randomly = random.Random(1)
    begin = nested.time()
    due = [begin + randomly.randrange(20) / 1000 for _ in range(200)]
    ran: list[tuple[float, int]] = []
    for number, when in enumerate(due):
        nested.call_at(when, ran.append, (when, number))
    cancelled = [nested.call_at(when, ran.append, (when, -1)) for when in due]
    for timer in cancelled:
        timer.cancel()
    nested.run_until_complete(asyncio.sleep(0.03))
    assert [when for when, _ in ran] == sorted(due)
    assert sorted(number for _, number in ran) == list(range(200))
    assert not len(nested._scheduled)


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_a_run_in_the_middle_of_a_delivery(nested: Nested, busy: bool) -> None:
    """In data_received and in a reader: all that comes for others meanwhile is delivered, once."""
    got: dict[str, list[bytes]] = {}
    timers: list[int] = []

    class Receiver(asyncio.Protocol):
        def __init__(self, name: str) -> None:
            self.name = name

        def data_received(self, data: bytes) -> None:
            got.setdefault(self.name, []).append(data)
            for number in range(3):
                nested.call_soon(timers.append, number)
                nested.call_later(0.001 * number, timers.append, number)
            if len(got) == 4 and not all_here.done():
                all_here.set_result(None)
            if data == b"one":
                nested.run_inside(all_here)
                nested.run_inside(nested.create_task(asyncio.sleep(0.005)))

    async def connect(ours: socket.socket, name: str) -> asyncio.BaseTransport:
        transport, _ = await nested.create_connection(lambda: Receiver(name), sock=ours)
        return transport

    all_here: asyncio.Future[None] = nested.create_future()
    pairs = [socket.socketpair() for _ in range(4)]
    watched, writer = socket.socketpair()
    for ours, _ in pairs:
        ours.setblocking(False)
    watched.setblocking(False)

    def readable() -> None:
        watched.recv(10)
        nested.run_inside(all_here)
        got.setdefault("watched", []).append(b"ran")

    async def send() -> None:
        writer.send(b"x")
        for _, peer in pairs:
            peer.send(b"one")
        while busy and not all_here.done():
            await asyncio.sleep(0)

    transports = [nested.run_until_complete(connect(ours, str(n))) for n, (ours, _) in enumerate(pairs)]
    nested.add_reader(watched, readable)
    nested.run_until_complete(send())
    nested.run_until_complete(asyncio.wait_for(asyncio.shield(all_here), LIMIT))
    for _, peer in pairs:
        peer.send(b"two")
    nested.run_until_complete(until(lambda: sum(map(len, got.values())) == 9))
    nested.run_until_complete(asyncio.sleep(0.005))
    assert got.pop("watched") == [b"ran"]
    assert got == {str(n): [b"one", b"two"] for n in range(4)}
    assert sorted(timers) == sorted([0, 1, 2] * 2 * 8)
    nested.remove_reader(watched)
    for transport in transports:
        transport.close()
    nested.run_until_complete(asyncio.sleep(0.01))
    for sock in (watched, writer, *(peer for _, peer in pairs)):
        sock.close()


def test_data_in_the_middle_of_data_received(nested: Nested, reports: list[dict[str, Any]], pair: Pair) -> None:
    """Nobody can take them: the context of the connection is in use.  It fails, and says so; nothing is left out."""
    if nested.driver == "iocp":
        pytest.skip("a receive is armed there when data_received is over: nothing comes in the middle of it")
    ours, peer = pair
    got: list[bytes] = []
    lost: asyncio.Future[Any] = nested.create_future()

    class Receiver(asyncio.Protocol):
        def data_received(self, data: bytes) -> None:
            got.append(data)
            peer.send(b"two")
            nested.run_inside(nested.create_task(asyncio.sleep(0.01)))
            peer.send(b"three")

        def connection_lost(self, exc: BaseException | None) -> None:
            lost.set_result(exc)

    async def main() -> BaseException | None:
        await nested.create_connection(Receiver, sock=ours)
        peer.send(b"one")
        async with asyncio.timeout(LIMIT):
            error: BaseException | None = await lost
        return error

    error = nested.run_until_complete(main())
    assert "already entered" in str(error)
    assert [report["exception"] for report in reports] == [error]
    assert got == [b"one"]
    reports.clear()


def test_a_run_in_the_middle_of_what_needs_no_kernel(nested: Nested) -> None:
    """A stream begins with what a cancelled sock_recv has left, which the ready queue of the driver delivers."""
    got: list[bytes] = []

    class Receiver(asyncio.Protocol):
        def data_received(self, data: bytes) -> None:
            got.append(data)
            nested.run_inside(nested.create_task(asyncio.sleep(0.005)))

    async def main() -> None:
        pairs = [socket.socketpair() for _ in range(3)]
        for ours, peer in pairs:
            ours.setblocking(False)
            future = nested._proactor.recv(ours, 100)
            peer.send(b"left")
            await until(future.done)
            nested._proactor.keep(future)
        for ours, _ in pairs:
            nested._make_socket_transport(ours, Receiver())
        await until(lambda: len(got) == 3)
        for ours, peer in pairs:
            nested._transports[ours.fileno()].close()
            peer.close()
        await turns()

    task = nested.create_task(main())
    nested.run_until_complete(task)
    assert got == [b"left"] * 3


# -- what tools replace ----------------------------------------------------------------------------


@pytest.mark.parametrize("debug", [False, True], ids=["", "debug"])
async def test_handle_run(loop: Loop, monkeypatch: pytest.MonkeyPatch, debug: bool) -> None:
    """As aiodebug and others measure callbacks; also if they begin while the loop runs."""
    loop.set_debug(debug)
    ran: list[Any] = []
    original = asyncio.Handle._run

    def run(self: Any) -> None:
        ran.append(self._callback)
        original(self)

    def one(number: int) -> None: ...

    def other(number: int) -> None: ...

    async def task() -> None: ...

    with monkeypatch.context() as patches:
        patches.setattr(asyncio.Handle, "_run", run)
        await turns(1)
        loop.call_soon(one, 1)
        loop.call_later(0, other, 2)
        await loop.create_task(task())
        await asyncio.sleep(0.002)
        loop.call_soon_threadsafe(one, 3)
        await turns()
    assert ran.count(one) == 2
    assert ran.count(other) == 1
    assert any("task" in repr(callback) for callback in ran)
    ran.clear()
    await turns()
    ran.clear()  # of the turn in which it ended
    loop.call_soon(one, 4)
    await turns()
    assert not ran


async def test_create_task_of_the_base_class(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """As tracers follow tasks."""
    original = asyncio.BaseEventLoop.create_task
    made: list[Any] = []

    def create_task(self: Any, *args: Any, **more: Any) -> Any:
        task = original(self, *args, **more)
        made.append(task)
        return task

    with monkeypatch.context() as patches:
        patches.setattr(asyncio.BaseEventLoop, "create_task", create_task)
        tasks: list[Any] = [loop.create_task(turns()), asyncio.create_task(turns()), asyncio.ensure_future(turns())]
        await asyncio.wait(tasks)
    assert made == tasks
    await loop.create_task(turns())
    assert made == tasks


async def test_task_and_future_of_asyncio(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """As nest_asyncio replaces those in C by those in Python."""
    with monkeypatch.context() as patches:
        patches.setattr(asyncio.tasks, "Task", asyncio.tasks._PyTask)  # type: ignore[attr-defined]  # not in typeshed
        patches.setattr(asyncio.futures, "Future", asyncio.futures._PyFuture)  # type: ignore[attr-defined]  # as above
        kinds = (type(loop.create_task(turns())), type(asyncio.create_task(turns())), type(loop.create_future()))
        await turns()
    assert [kind.__module__ for kind in kinds] == ["asyncio.tasks", "asyncio.tasks", "asyncio.futures"]
    assert kinds[0] is asyncio.tasks._PyTask  # type: ignore[attr-defined]  # as above


async def test_the_select_of_the_selector(loop: Loop, pair: Pair) -> None:
    """As tools let time fly."""
    selector: Any = loop._selector
    original = selector.select
    timeouts: list[float | None] = []
    found: list[bool] = []
    flown = 0.0

    def select(timeout: float | None) -> Any:
        nonlocal flown
        timeouts.append(timeout)
        events = original(timeout=0)
        found.append(bool(events))
        if not events and timeout:
            flown += timeout
        return events

    real = loop.time
    try:
        selector.select = select
        loop.time = lambda: real() + flown  # type: ignore[method-assign]  # what the tools do
        await asyncio.sleep(30)  # less than the limit of a test, which flies too
        assert any(timeout and 29 < timeout <= 30 for timeout in timeouts)
        ours, peer = pair
        found.clear()
        receiving = asyncio.ensure_future(loop.sock_recv(ours, 10))
        await turns()
        peer.send(b"data")
        assert await receiving == b"data"
        assert any(found)
    finally:
        selector.select = original
        del loop.time
    begin = len(timeouts)
    await asyncio.sleep(0.001)
    assert len(timeouts) == begin


@pytest.mark.skipif(WINDOWS, reason="UNIX sockets and os.sendfile")
async def test_calls_on_files_do_not_go_by_way_of_os(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pair: Pair
) -> None:
    """Blockbuster would take them for blocking calls of the user's; asyncio's own it knows by file and function."""

    def blocks(*args: Any, **more: Any) -> Any:
        raise AssertionError("a blocking call")

    ours, peer = pair
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(path)
    with (tmp_path / "file").open("w+b") as file, monkeypatch.context() as patches:
        file.truncate(MUCH)
        for name in ("stat", "lstat", "remove", "unlink", "sendfile", "listdir", "access", "readlink", "getcwd"):
            patches.setattr(os, name, blocks)
        server = await loop.create_unix_server(asyncio.Protocol, path)
        transport, _ = await loop.create_unix_connection(asyncio.Protocol, path)
        transport.close()
        server.close()
        reading = loop.run_in_executor(None, read_exactly, peer, 2 * MUCH)
        assert await loop.sock_sendfile(ours, file, 0, fallback=False) == MUCH
        transport, _ = await loop.create_connection(asyncio.Protocol, sock=ours)
        assert await loop.sendfile(transport, file, 0, fallback=False) == MUCH
        assert len(await reading) == 2 * MUCH
        transport.close()
        await turns()


# -- debug mode ------------------------------------------------------------------------------------


class Failed(Exception):
    pass


async def test_debug_mode_makes_no_cycles(loop: Loop) -> None:
    """A task that has failed is freed when nobody refers to it any more, without the collector."""
    loop.set_debug(True)
    references: list[weakref.ref[Any]] = []

    async def fail() -> None:
        raise Failed

    gc.collect()
    gc.disable()
    try:
        for _ in range(20):
            task = loop.create_task(fail())
            references.append(weakref.ref(task))
            with pytest.raises(Failed):
                await task
            del task
            await turns(1)
        await turns()
        assert sum(reference() is not None for reference in references) <= 1
    finally:
        gc.enable()


async def test_debug_mode_shows_the_handle_that_runs(loop: Loop) -> None:
    loop.set_debug(True)
    seen: list[Any] = []
    handle = loop.call_soon(lambda: seen.append(loop._current_handle))  # type: ignore[attr-defined]  # BaseEventLoop's
    await turns()
    assert seen == [handle]
