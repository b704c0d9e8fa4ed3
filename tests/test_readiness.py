"""add_reader and add_writer: what they call, when, how often, and for which descriptors."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import errno
import gc
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import iocp_loop
from iocp_loop.operations import ReadinessStream

from .support import WINDOWS, turns, until

Loop = iocp_loop.IocpEventLoop

PIPES = pytest.mark.skipif(sys.platform == "win32", reason="there only sockets can be watched")


@contextlib.contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    """The two ends of a pipe, non-blocking."""
    if WINDOWS:
        pytest.skip("only sockets can be polled on Windows")
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    try:
        yield reader, writer
    finally:
        for fd in (reader, writer):
            with contextlib.suppress(OSError):
                os.close(fd)


@contextlib.contextmanager
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        one.setblocking(False)
        other.setblocking(False)
        yield one, other


async def test_reader(loop: Loop) -> None:
    with sockets() as (one, other):
        got: list[bytes] = []
        loop.add_reader(one, lambda: got.append(one.recv(100)))
        await turns()
        assert got == []
        for data in (b"1", b"2", b"3"):
            got.clear()
            other.send(data)
            await until(lambda: got)
            assert got == [data]
        assert loop.remove_reader(one) is True
        assert loop.remove_reader(one) is False
        other.send(b"4")
        await turns(20)
        assert got == [b"3"]


async def test_writer(loop: Loop) -> None:
    with sockets() as (one, other):
        calls: list[Any] = []

        def writable(word: str) -> None:
            calls.append(word)
            loop.remove_writer(one)

        loop.add_writer(one.fileno(), writable, "now")
        await until(lambda: calls)
        await turns()
        assert calls == ["now"]
        with contextlib.suppress(BlockingIOError):
            while True:
                one.send(b"x" * 65536)
        loop.add_writer(one, writable, "later")
        await turns(20)
        assert calls == ["now"]
        with contextlib.suppress(BlockingIOError):
            while True:
                other.recv(1 << 20)
        await until(lambda: calls == ["now", "later"])


async def test_reader_and_writer_of_one_descriptor(loop: Loop) -> None:
    with sockets() as (one, other):
        calls: list[str] = []
        loop.add_reader(one, calls.append, "reader")
        loop.add_writer(one, calls.append, "writer")
        await until(lambda: "writer" in calls)
        assert "reader" not in calls
        assert loop.remove_writer(one)
        calls.clear()
        other.send(b"x")
        await until(lambda: calls)
        assert set(calls) == {"reader"}
        assert loop.remove_reader(one)
        assert not loop.remove_writer(one)


async def test_it_is_level_triggered(loop: Loop) -> None:
    with sockets() as (one, other):
        got: list[bytes] = []
        loop.add_reader(one, lambda: got.append(one.recv(2)))
        other.send(b"aabbccdd")
        await until(lambda: len(got) == 4)
        assert got == [b"aa", b"bb", b"cc", b"dd"]
        loop.remove_reader(one)


async def test_no_call_for_what_was_read_already(loop: Loop) -> None:
    """A callback that empties the descriptor is not called again until there is more: it could block."""
    with sockets() as (one, other):
        calls = []

        def readable() -> None:
            calls.append(one.recv(100))  # BlockingIOError, which is reported, if nothing is there

        loop.add_reader(one, readable)
        for count in range(1, 30):
            other.send(b"x")
            await until(lambda count=count: len(calls) >= count)  # type: ignore[misc]  # a default binds the count
            await turns(3)
            assert len(calls) == count
        loop.remove_reader(one)


async def test_one_call_for_each_turn(loop: Loop) -> None:
    with sockets() as (one, other):
        turn = 0
        calls: list[int] = []
        loop.add_reader(one, lambda: calls.append(turn))
        other.send(b"x")
        for turn in range(1, 20):  # noqa: B007 - the callback reads it
            await asyncio.sleep(0)
        loop.remove_reader(one)
        assert calls
        assert len(calls) == len(set(calls))


async def test_the_second_callback_replaces_the_first(loop: Loop) -> None:
    with sockets() as (one, other):
        calls: list[str] = []
        loop.add_reader(one, calls.append, "first")
        loop.add_reader(one, calls.append, "second")
        other.send(b"x")
        await until(lambda: calls)
        loop.add_reader(one, calls.append, "third")
        await until(lambda: "third" in calls)
        assert "first" not in calls
        assert calls == sorted(calls, key=["second", "third"].index)
        loop.remove_reader(one)
        assert not loop.remove_reader(one)


async def test_a_removed_callback_is_never_called_again(loop: Loop) -> None:
    """Also where it is due in this very turn, because both were found ready together."""
    with sockets() as (one, one_peer), sockets() as (two, two_peer):
        calls: list[str] = []

        def readable(name: str) -> None:
            calls.append(name)
            loop.remove_reader(one)
            loop.remove_reader(two)

        loop.add_reader(one, readable, "one")
        loop.add_reader(two, readable, "two")
        one_peer.send(b"x")
        two_peer.send(b"x")
        await until(lambda: calls)
        await turns(20)
        assert len(calls) == 1


async def test_removing_and_adding_many_times(loop: Loop) -> None:
    with sockets() as (one, other):
        other.send(b"x")
        for _ in range(200):
            seen = loop.create_future()

            def readable(seen: asyncio.Future[None] = seen) -> None:
                loop.remove_reader(one)
                seen.set_result(None)

            loop.add_reader(one, readable)
            await asyncio.wait_for(seen, 10)
        await turns()
        assert loop.stats().in_flight <= 2  # a cancel may be under way


@PIPES
async def test_pipe_ends(loop: Loop) -> None:
    with pipe() as (reader, writer):
        calls: list[Any] = []
        loop.add_reader(reader, lambda: calls.append(os.read(reader, 10)))
        loop.add_writer(writer, calls.append, "writable")
        await until(lambda: calls)
        loop.remove_writer(writer)
        os.write(writer, b"x")
        await until(lambda: b"x" in calls)
        calls.clear()
        os.close(writer)
        await until(lambda: calls)
        assert calls[0] == b""
        loop.remove_reader(reader)


@PIPES
async def test_a_broken_pipe_is_writable(loop: Loop) -> None:
    with pipe() as (reader, writer):
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, b"x" * 65536)
        called = loop.create_future()
        loop.add_writer(writer, lambda: called.done() or called.set_result(None))
        await turns()
        assert not called.done()
        os.close(reader)
        await asyncio.wait_for(called, 10)
        loop.remove_writer(writer)


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A child process that ends by itself."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        yield process


@pytest.mark.skipif(sys.platform != "linux", reason="kinds of descriptors that Linux has")
async def test_whatever_poll_takes(loop: Loop, tmp_path: Path, child: subprocess.Popen[bytes]) -> None:

    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    leader, follower = os.openpty()
    event = os.eventfd(0)
    inner = select.epoll()
    fifo_end = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
    # A Python that was built on an old system lacks it.
    process = os.pidfd_open(child.pid) if hasattr(os, "pidfd_open") else os.dup(event)
    inner.register(event, select.EPOLLIN)
    descriptors = [leader, event, inner.fileno(), fifo_end, process]
    seen: set[int] = set()

    def readable(fd: int) -> None:
        seen.add(fd)
        loop.remove_reader(fd)

    try:
        for fd in descriptors:
            loop.add_reader(fd, readable, fd)
        os.write(follower, b"line\n")
        os.eventfd_write(event, 1)
        os.write(fifo_end, b"x")
        await until(lambda: seen == set(descriptors))
    finally:
        inner.close()
        for fd in (leader, follower, event, fifo_end, process):
            os.close(fd)


async def test_what_is_no_descriptor(loop: Loop) -> None:
    class Odd:
        def __init__(self, number: Any) -> None:
            self.number = number

        def fileno(self) -> Any:
            return self.number

    methods: tuple[Any, ...] = (loop.add_reader, loop.add_writer, loop.remove_reader, loop.remove_writer)
    for method in methods:
        arguments = () if "remove" in method.__name__ else (print,)
        for odd in (object(), -1, Odd(-1), Odd(None), Odd("number"), "text", None, 1.0):
            with pytest.raises(ValueError, match="Invalid file"):
                method(odd, *arguments)


@pytest.mark.skipif(sys.platform != "linux", reason="what epoll refuses")
async def test_what_is_always_ready_is_refused(loop: Loop, tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        with pytest.raises(PermissionError):
            loop.add_reader(file, print)
        assert not loop.remove_reader(file)


@PIPES
async def test_a_closed_descriptor_is_refused(loop: Loop) -> None:
    with pipe() as (reader, _):
        os.close(reader)
        with pytest.raises(OSError) as caught:
            loop.add_reader(reader, print)
        assert caught.value.errno == errno.EBADF
        assert not loop.remove_reader(reader)


async def test_the_descriptor_of_a_transport(loop: Loop) -> None:
    with sockets() as (one, other):
        transport, _ = await loop.create_connection(asyncio.Protocol, sock=one)
        number = one.fileno()
        for method in (loop.remove_reader, loop.remove_writer):
            with pytest.raises(RuntimeError, match="is used by transport"):
                method(number)
        for add in (loop.add_reader, loop.add_writer):
            with pytest.raises(RuntimeError, match="is used by transport"):
                add(number, print)
        with pytest.raises(RuntimeError, match="is used by transport"):
            await loop.sock_recv(one, 1)
        transport.close()
        await until(lambda: one.fileno() == -1)
        assert other.recv(1) == b""


def test_a_closed_loop(driver: str) -> None:
    loop = iocp_loop.new_event_loop(driver)
    with sockets() as (one, _):
        loop.add_reader(one, print)
        loop.close()
        for add in (loop.add_reader, loop.add_writer):
            with pytest.raises(RuntimeError, match="closed"):
                add(one, print)
        assert not loop.remove_reader(one)
        assert not loop.remove_writer(one)


@PIPES
@pytest.mark.parametrize("forget_writer", [True, False])
async def test_closed_behind_the_loops_back(loop: Loop, forget_writer: bool) -> None:
    """The number comes back with another file, which is watched, and the old callback is gone."""
    calls: list[str] = []
    with pipe() as (reader, writer):
        loop.add_reader(reader, calls.append, "old")
        loop.add_writer(reader, calls.append, "never")
        await turns()
        calls.clear()
        spare = os.dup(writer)
        os.close(reader)
        os.close(writer)
        new_reader, new_writer = os.pipe()
        try:
            if new_reader != reader:
                os.dup2(new_reader, reader)
                os.close(new_reader)
            if forget_writer:
                loop.remove_writer(reader)
            loop.add_reader(reader, calls.append, "new")
            await turns()
            assert calls == []
            os.write(new_writer, b"x")
            await until(lambda: calls)
            assert set(calls) == {"new"}
            assert loop.remove_reader(reader)
            loop.remove_writer(reader)
        finally:
            os.close(new_writer)
            os.close(spare)


async def test_a_closed_socket_can_still_be_removed(loop: Loop) -> None:
    with sockets() as (one, _):
        loop.add_reader(one, print)
        await turns()
        one.close()
        assert loop.remove_reader(one)
        with pytest.raises(ValueError, match="Invalid file descriptor: -1"):
            loop.remove_reader(one)
        with pytest.raises(ValueError, match="Invalid file descriptor: -1"):
            loop.remove_writer(one)


async def test_an_error_of_the_callback_is_reported(loop: Loop, reports: list[dict[str, Any]]) -> None:
    with sockets() as (one, other):

        def faulty() -> None:
            one.recv(1)
            raise ZeroDivisionError

        loop.add_reader(one, faulty)
        other.send(b"xy")
        await until(lambda: len(reports) == 2)
        assert "Exception in callback" in reports[0]["message"]
        assert isinstance(reports[0]["exception"], ZeroDivisionError)
        reports.clear()
        loop.remove_reader(one)


async def test_the_callback_runs_in_the_context_of_the_one_who_added_it(loop: Loop) -> None:
    variable = contextvars.ContextVar("variable", default="unset")
    seen = loop.create_future()
    with sockets() as (one, _):
        variable.set("when added")
        loop.add_writer(one, lambda: seen.done() or seen.set_result(variable.get()))
        variable.set("later")
        assert await seen == "when added"
        loop.remove_writer(one)


async def test_sock_methods_beside_a_reader(loop: Loop) -> None:
    with sockets() as (one, other):
        calls: list[str] = []
        loop.add_reader(one, calls.append, "readable")
        await loop.sock_sendall(other, b"x" * 10)
        await until(lambda: calls)
        loop.remove_reader(one)
        assert await loop.sock_recv(one, 100) == b"x" * 10


async def test_readers_and_subprocesses_on_one_loop(loop: Loop) -> None:
    """On Windows, psycopg wanted asyncio's selector loop and playwright its proactor loop: never both."""
    with sockets() as (one, other):
        got: list[bytes] = []
        loop.add_reader(one, lambda: got.append(one.recv(10)))
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", "print('from the child')", stdout=asyncio.subprocess.PIPE
        )
        other.send(b"x")
        output, _ = await child.communicate()
        await until(lambda: got)
        loop.remove_reader(one)
    assert output.split() == [b"from", b"the", b"child"]
    assert child.returncode == 0


async def test_a_thousand_descriptors(loop: Loop) -> None:
    """gh-81554 and what stands in for it elsewhere: select() ends at 512 sockets or at descriptor 1023."""
    count = 600
    pairs = [socket.socketpair() for _ in range(count)]
    try:
        seen: set[int] = set()

        def readable(number: int) -> None:
            seen.add(number)
            loop.remove_reader(pairs[number][0])

        for number, (one, _) in enumerate(pairs):
            loop.add_reader(one, readable, number)
        for _, other in pairs:
            other.send(b"x")
        await until(lambda: len(seen) == count)
    finally:
        for one, other in pairs:
            one.close()
            other.close()


async def test_a_thread_writes_while_the_loop_sleeps(loop: Loop) -> None:
    with sockets() as (one, other):
        seen = loop.create_future()
        loop.add_reader(one, lambda: seen.done() or seen.set_result(one.recv(10)))
        threading.Timer(0.05, other.send, (b"x",)).start()
        assert await asyncio.wait_for(seen, 10) == b"x"
        loop.remove_reader(one)


@pytest.mark.skipif(WINDOWS, reason="the number of a closed socket is not the next one to be given out")
async def test_an_event_of_a_closed_descriptor_is_not_taken_for_its_successors(loop: Loop) -> None:
    (first, tell_first), (second, tell_second) = socket.socketpair(), socket.socketpair()
    called: list[str] = []
    successor: list[socket.socket] = []

    def close_the_second() -> None:
        loop.remove_reader(first)
        number = second.fileno()
        loop.remove_reader(second)
        second.close()
        successor.extend(socket.socketpair())
        assert successor[0].fileno() == number
        loop.add_reader(successor[0], called.append, "successor")

    with first, tell_first, tell_second:
        loop.add_reader(first, close_the_second)
        loop.add_reader(second, called.append, "second")
        await turns()
        tell_first.send(b"x")
        tell_second.send(b"x")
        await until(lambda: successor)
        await turns()
        assert "successor" not in called
        loop.remove_reader(successor[0])
        for sock in successor:
            sock.close()


async def test_a_watch_that_is_removed_leaves_nothing_to_the_collector(loop: Loop) -> None:
    """The stream referred to what it told, and that to the stream: whoever adds and removes all day made garbage."""

    def streams() -> int:
        return sum(type(one) is ReadinessStream for one in gc.get_objects())

    with sockets() as (one, other):
        await turns()
        gc.collect()
        gc.disable()
        try:
            before = streams()
            for _ in range(50):
                loop.add_reader(one, print)
                loop.add_writer(one, print)
                assert loop.remove_writer(one)
                loop.add_reader(one, print)
                assert loop.remove_reader(one)
            await until(lambda: streams() <= before)
        finally:
            gc.enable()
        assert other.fileno() >= 0


async def test_a_removed_watch_is_ended_while_others_of_its_descriptor_go_on(loop: Loop) -> None:
    with sockets() as (one, other):
        calls: list[str] = []
        loop.add_reader(one, calls.append, "read")
        loop.add_writer(one, calls.append, "write")
        assert loop.remove_writer(one)
        await turns(5)
        assert calls == []
        loop.add_writer(one, calls.append, "write")
        assert loop.remove_reader(one)
        other.send(b"x")
        await until(lambda: calls)
        await turns(5)
        assert set(calls) == {"write"}
        assert loop.remove_writer(one)
