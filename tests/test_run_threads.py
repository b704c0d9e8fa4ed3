"""``run_threads``: a loop in each of several threads, their results, and their one end."""

from __future__ import annotations

import asyncio
import contextvars
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from types import FrameType
from typing import Any

import pytest

import iocp_loop
from iocp_loop import run_threads, threads
from iocp_loop.ports import DriverUnavailable

from .support import LIMIT, ROOT

pytestmark = pytest.mark.usefixtures("no_leak")

posix_signals = pytest.mark.skipif(sys.platform == "win32", reason="only POSIX sends signals to processes")


def test_results_come_back_in_order(driver: str) -> None:
    async def main(index: int) -> tuple[int, str, str]:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, iocp_loop.IocpEventLoop)
        await asyncio.sleep(0.01 * (3 - index))
        return index, loop.driver, threading.current_thread().name

    assert run_threads(main, threads=3, driver=driver) == [(n, driver, f"loop-{n}") for n in range(3)]


def test_each_main_has_a_copy_of_the_callers_context() -> None:
    name = contextvars.ContextVar("name", default="nobody")
    name.set("caller")

    async def main(index: int) -> str:
        before = name.get()
        name.set(f"main {index}")
        return before

    assert run_threads(main, threads=2) == ["caller", "caller"]
    assert name.get() == "caller"


def test_what_one_raises_ends_the_others_in_order() -> None:
    ended = []
    others = threading.Barrier(3)

    async def main(index: int) -> None:
        others.wait(LIMIT)
        if index == 1:
            raise LookupError("number 1")
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            await asyncio.sleep(0)
            ended.append(index)

    with pytest.raises(LookupError, match="number 1"):
        run_threads(main, threads=3)
    assert sorted(ended) == [0, 2]


def test_what_raises_before_the_others_have_begun_ends_them_too() -> None:
    async def main(index: int) -> None:
        if index == 0:
            raise LookupError
        await asyncio.get_running_loop().create_future()

    for _ in range(10):
        with pytest.raises(LookupError):
            run_threads(main, threads=2)


def test_several_exceptions_come_as_a_group() -> None:
    async def main(index: int) -> None:
        try:
            if index:
                await asyncio.get_running_loop().create_future()
        finally:
            raise LookupError(index)

    with pytest.raises(ExceptionGroup) as caught:
        run_threads(main, threads=3)
    assert sorted(error.args[0] for error in caught.value.exceptions) == [0, 1, 2]


def test_a_main_that_cancels_itself_has_failed() -> None:
    async def main(index: int) -> None:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        run_threads(main, threads=1)


def test_system_exit_goes_through() -> None:
    async def main(index: int) -> None:
        if index:
            sys.exit(7)
        await asyncio.get_running_loop().create_future()

    with pytest.raises(SystemExit) as caught:
        run_threads(main, threads=2)
    assert caught.value.code == 7


def test_what_cannot_begin() -> None:
    async def main(index: int) -> None: ...

    with pytest.raises(ValueError, match="1 thread or more, not 0"):
        run_threads(main, threads=0)
    with pytest.raises((ValueError, DriverUnavailable)):
        run_threads(main, threads=2, driver="iocp" if sys.platform != "win32" else "uring")

    async def nested() -> None:
        run_threads(main, threads=1)

    with pytest.raises(RuntimeError, match="from a running event loop"):
        iocp_loop.run(nested())


def test_without_threads_to_be_had_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = threading.Thread.start

    def start(self: threading.Thread) -> None:
        if self.name == "loop-1":
            raise RuntimeError("can't start new thread")
        begin(self)

    async def main(index: int) -> None:
        await asyncio.get_running_loop().create_future()

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        run_threads(main, threads=3)


def test_ctrl_c_may_strike_anywhere() -> None:
    """At each step of the thread that waits, in this package and in the threading module, until it closes the loops."""
    strikes_at = steps = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal steps
        if frame.f_code.co_filename not in (threads.__file__, threading.__file__):
            return None
        name = frame.f_code.co_name
        if name == "_close_loops":
            steps = 0
        elif steps or (name == "run" and frame.f_lineno > frame.f_code.co_firstlineno + 2):  # from its `try` on
            steps += 1
            if steps == strikes_at:
                raise KeyboardInterrupt
        return trace

    async def main(index: int) -> None:
        await asyncio.sleep(0.01)

    before, struck = sys.gettrace(), True
    while struck:
        strikes_at += 1
        steps = 0
        sys.settrace(trace)
        try:
            run_threads(main, threads=2, driver="poll")
        except KeyboardInterrupt:
            struck = True
        else:
            struck = False
        finally:
            sys.settrace(before)
        for member in threading.enumerate():
            if member.name.startswith("loop-") and member.ident is not None:
                member.join(LIMIT)
    assert strikes_at > 50


@posix_signals
def test_ctrl_c_ends_all_in_order(driver: str) -> None:
    program = """
        import asyncio, iocp_loop, sys

        async def main(index):
            try:
                await asyncio.sleep(0)
                print("begun\\n", end="", flush=True)  # in one piece
                await asyncio.get_running_loop().create_future()
            finally:
                await asyncio.sleep(0.01)
                print("ended\\n", end="", flush=True)

        try:
            iocp_loop.run_threads(main, threads=3, driver=sys.argv[1])
        except KeyboardInterrupt:
            print("interrupted", flush=True)
    """
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(program), driver]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for _ in range(3):
            assert child.stdout.readline() == "begun\n"
        os.kill(child.pid, signal.SIGINT)
        rest, _ = child.communicate(timeout=LIMIT)
    assert rest == 3 * "ended\n" + "interrupted\n"
    assert child.returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel spreads connections over listeners on Linux")
def test_threads_that_share_a_port_share_its_connections(driver: str) -> None:
    count, threads = 200, 2
    with socket.socket() as holder:  # it holds the port, and does not listen
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(("127.0.0.1", 0))
        address = holder.getsockname()
        done, ready = threading.Event(), threading.Barrier(threads + 1)

        async def main(index: int) -> int:
            served = 0

            class Echo(asyncio.Protocol):
                def connection_made(self, transport: asyncio.BaseTransport) -> None:
                    nonlocal served
                    served += 1
                    self.transport = transport

                def data_received(self, data: bytes) -> None:
                    self.transport.write(data)  # type: ignore[attr-defined]  # it is a stream's

            server = await asyncio.get_running_loop().create_server(Echo, *address, reuse_port=True)
            ready.wait(LIMIT)
            while not done.is_set():
                await asyncio.sleep(0.01)
            server.close()
            return served

        def connect() -> None:
            ready.wait(LIMIT)
            for _ in range(count // 20):
                clients = [socket.create_connection(address, LIMIT) for _ in range(20)]
                for client in clients:
                    client.sendall(b"x")
                for client in clients:
                    assert client.recv(1) == b"x"
                    client.close()
            done.set()

        client = threading.Thread(target=connect)
        client.start()
        served = run_threads(main, threads=threads, driver=driver)
        client.join(LIMIT)
    assert sum(served) == count
    assert min(served) > 0
