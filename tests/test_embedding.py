"""The loop inside another main loop: ``poll`` waits and runs nothing, ``dispatch`` runs and never waits."""

from __future__ import annotations

import asyncio
import queue
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

import iocp_loop
from iocp_loop import native

from .support import LIMIT, Echo, in_thread, read_exactly

Loop = iocp_loop.IocpEventLoop
Pair = tuple[socket.socket, socket.socket]


def test_poll_runs_nothing_and_dispatch_does(loop: Loop) -> None:
    ran: list[str] = []
    loop.call_soon(ran.append, "soon")
    assert loop.poll(LIMIT)
    assert loop.poll(LIMIT)
    assert not ran
    loop.dispatch()
    assert ran == ["soon"]
    assert not loop.poll(0)
    loop.dispatch()
    assert ran == ["soon"]


def test_poll_waits_no_longer_than_its_limit(loop: Loop) -> None:
    started = time.perf_counter()
    assert not loop.poll(0)
    assert not loop.poll(0.05)
    assert time.perf_counter() - started >= 0.05 - 1e-5


def test_poll_waits_for_timers_and_dispatch_runs_them(loop: Loop) -> None:
    ran: list[float] = []
    due = loop.time() + 0.05
    loop.call_at(due, lambda: ran.append(loop.time()))
    assert not loop.poll(0.001)
    assert loop.poll()
    assert not ran
    loop.dispatch()
    assert len(ran) == 1
    assert ran[0] >= due - 1e-5


def test_a_cancelled_timer_is_nothing_to_run(loop: Loop) -> None:
    loop.call_later(0.001, lambda: None).cancel()
    loop.call_later(0.002, lambda: None).cancel()
    assert not loop.poll(0.05)
    loop.call_later(LIMIT, lambda: None)
    assert not loop.poll(0)


@pytest.mark.skipif(native.hot is None, reason="the Python tier has its timers in a list")
def test_a_poll_does_not_list_the_timers(driver: str) -> None:
    """The native tier makes a list of them all, each time that it is asked for one."""
    asked = []

    class Watched(Loop):
        @property
        def _scheduled(self) -> Any:
            asked.append(self)
            return super()._scheduled

        @_scheduled.setter
        def _scheduled(self, timers: list[Any]) -> None:
            """What BaseEventLoop's constructor brings."""

    loop = Watched(driver)
    loop.call_later(LIMIT, lambda: None)
    assert not loop.poll(0.001)
    loop.call_soon(lambda: None)
    assert loop.poll(LIMIT)
    loop.dispatch()
    assert not asked
    loop.close()


def test_poll_gathers_completions_and_dispatch_delivers_them(loop: Loop, pair: Pair) -> None:
    transport, _ = loop.run_until_complete(loop.create_connection(Echo, sock=pair[0]))
    while loop.poll(0):
        loop.dispatch()
    pair[1].sendall(b"hello")
    assert loop.poll(LIMIT)
    pair[1].setblocking(False)
    with pytest.raises(BlockingIOError):
        pair[1].recv(5)
    pair[1].settimeout(LIMIT)
    loop.dispatch()
    assert read_exactly(pair[1], 5) == b"hello"
    transport.close()


def test_completions_are_gathered_while_callbacks_keep_coming(loop: Loop, pair: Pair) -> None:
    def again() -> None:
        if not future.done():
            loop.call_soon(again)

    future = loop.create_task(loop.sock_recv(pair[0], 5))
    loop.call_soon(again)
    pair[1].sendall(b"hello")
    deadline = time.monotonic() + LIMIT
    while not future.done():
        assert time.monotonic() < deadline
        assert loop.poll()
        loop.dispatch()
    loop.dispatch()
    assert future.result() == b"hello"


def test_a_call_from_another_thread_ends_a_poll(loop: Loop) -> None:
    ran: list[str] = []

    def call() -> None:
        time.sleep(0.05)
        loop.call_soon_threadsafe(ran.append, "called")

    with in_thread(call):
        assert loop.poll()
    loop.dispatch()
    assert ran == ["called"]


def test_the_loop_runs_in_dispatch_only(loop: Loop) -> None:
    async def whoami() -> Any:
        with pytest.raises(RuntimeError):
            loop.poll(0)
        with pytest.raises(RuntimeError):
            loop.dispatch()
        return asyncio.get_running_loop()

    task = loop.create_task(whoami())
    while not task.done():
        assert loop.poll(LIMIT)
        assert not loop.is_running()
        loop.dispatch()
    assert task.result() is loop
    assert not loop.is_running()


def test_what_ends_a_run_ends_a_dispatch_and_loses_nothing(loop: Loop) -> None:
    ran: list[str] = []

    def leave() -> None:
        raise SystemExit

    loop.call_soon(leave)
    loop.call_soon(ran.append, "next")
    with pytest.raises(SystemExit):
        loop.dispatch()
    assert loop.poll(LIMIT)
    loop.dispatch()
    assert ran == ["next"]


def test_a_closed_loop_neither_polls_nor_dispatches(driver: str) -> None:
    loop = iocp_loop.new_event_loop(driver)
    loop.close()
    with pytest.raises(RuntimeError):
        loop.poll(0)
    with pytest.raises(RuntimeError):
        loop.dispatch()


class MainLoop:
    """A main loop as a user interface has it: it runs what other threads hand it, and they wait for that."""

    def __init__(self) -> None:
        self._calls: queue.Queue[tuple[Callable[[], None], threading.Event] | None] = queue.Queue()

    def call_there(self, function: Callable[[], None]) -> None:
        done = threading.Event()
        self._calls.put((function, done))
        if not done.wait(LIMIT):
            raise RuntimeError("the main loop has ended")

    def quit(self) -> None:
        self._calls.put(None)

    def run(self) -> None:
        while (call := self._calls.get(timeout=LIMIT)) is not None:
            function, done = call
            function()
            done.set()


def test_a_helper_thread_polls_and_the_main_thread_dispatches(loop: Loop) -> None:
    """As examples/tk_echo.py does it, with connections that come, talk and go, timers, and the executor."""
    threads: set[int] = set()
    main = MainLoop()

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            threads.add(threading.get_ident())
            writer.write(line)
        writer.close()

    async def talk(port: int, name: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for turn in range(20):
            writer.write(b"%d %d\n" % (name, turn))
            assert await reader.readline() == b"%d %d\n" % (name, turn)
            await asyncio.sleep(0.001)
        await loop.run_in_executor(None, time.sleep, 0.01)
        writer.close()
        await writer.wait_closed()

    async def converse() -> str:
        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        await asyncio.gather(*[talk(port, name) for name in range(10)])
        server.close()
        await server.wait_closed()
        return "done"

    task = loop.create_task(converse())
    task.add_done_callback(lambda _: main.quit())
    stopping = threading.Event()

    def wait() -> None:
        while not stopping.is_set():
            if loop.poll() and not stopping.is_set():
                main.call_there(loop.dispatch)

    with in_thread(wait):
        main.run()
        stopping.set()
        loop.call_soon_threadsafe(lambda: None)
    assert task.result() == "done"
    assert threads == {threading.get_ident()}
