"""What else connect_read_pipe and connect_write_pipe take: FIFOs, sockets, terminals, devices; and what they refuse."""

from __future__ import annotations

import asyncio
import errno
import io
import os
import socket
import sys
from pathlib import Path

import pytest

import iocp_loop

from .pipe_ends import read_end, write_end
from .support import Recorder, turns, until

unix_only = pytest.mark.skipif(sys.platform == "win32", reason="Windows has nothing like it")


@unix_only
async def test_fifo(loop: iocp_loop.IocpEventLoop, tmp_path: Path) -> None:
    assert sys.platform != "win32"
    path = tmp_path / "fifo"
    os.mkfifo(path)
    reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with open(reading, "rb", 0) as reader, open(path, "wb", 0) as writer:
        async with read_end(reader) as source, write_end(writer) as sink:
            sink.transport.write(b"through the fifo")
            await until(lambda: source.data == b"through the fifo")
            sink.transport.close()
            await until(lambda: source.finished)


@unix_only
async def test_a_fifo_that_is_open_both_ways_stays_open(loop: iocp_loop.IocpEventLoop, tmp_path: Path) -> None:
    assert sys.platform != "win32"
    path = tmp_path / "fifo"
    os.mkfifo(path)
    with open(os.open(path, os.O_RDWR), "r+b", 0) as both:
        async with write_end(both) as sink:
            sink.transport.write(b"for whoever comes")
            await asyncio.sleep(0.01)
            assert not sink.finished


async def test_sockets(loop: iocp_loop.IocpEventLoop, no_leak: None) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        async with read_end(ours) as source, write_end(theirs) as sink:
            sink.transport.write(b"through the socket")
            await until(lambda: source.data == b"through the socket")
            source.transport.close()
            await until(lambda: sink.finished)


async def test_a_socket_whose_peer_talks_is_not_lost(loop: iocp_loop.IocpEventLoop, no_leak: None) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        async with write_end(ours) as sink:
            theirs.send(b"not asked for")
            await asyncio.sleep(0.01)
            assert not sink.finished
            sink.transport.write(b"still there")
            assert theirs.recv(100) == b"still there"


@unix_only
async def test_terminal(loop: iocp_loop.IocpEventLoop, no_leak: None) -> None:
    import tty

    assert sys.platform != "win32"
    primary, secondary = os.openpty()
    tty.setraw(secondary)
    with open(primary, "r+b", 0) as outer, open(secondary, "r+b", 0) as inner:
        async with read_end(inner) as source:
            outer.write(b"typed")
            await until(lambda: source.data == b"typed")
            async with write_end(os.fdopen(os.dup(secondary), "wb", 0)) as sink:
                sink.transport.write(b"printed")
                assert outer.read(100) == b"printed"
                outer.write(b" more")  # input of the terminal is no news for who writes to it
                await until(lambda: source.data == b"typed more")
                assert not sink.finished
        await turns()


@unix_only
async def test_a_closed_terminal_is_not_reported(loop: iocp_loop.IocpEventLoop, no_leak: None) -> None:
    assert sys.platform != "win32"
    primary, secondary = os.openpty()
    with open(primary, "rb", 0) as outer:
        async with read_end(outer) as source:
            os.close(secondary)
            await until(lambda: source.finished)
    assert isinstance(source.lost, OSError)
    assert source.lost.errno == errno.EIO


async def test_null_device(loop: iocp_loop.IocpEventLoop, no_leak: None) -> None:
    with open(os.devnull, "r+b", 0) as file:
        async with write_end(file) as sink:
            sink.transport.write(b"into the void")
            await asyncio.sleep(0.01)
            assert not sink.finished
            sink.transport.close()
            await until(lambda: sink.finished)
    with open(os.devnull, "rb", 0) as file:
        async with read_end(file) as source:
            await until(lambda: source.finished)
        assert source.calls == ["connection_made", "eof_received", "connection_lost"]


@unix_only
async def test_a_device_that_is_always_ready_lets_others_run(loop: iocp_loop.IocpEventLoop, no_leak: None) -> None:
    class Counts(Recorder):
        count = 0

        def data_received(self, data: bytes) -> None:
            self.count += 1

    with open("/dev/zero", "rb", 0) as file:
        async with read_end(file, Counts()) as source:
            await until(lambda: source.count > 10)
            source.transport.pause_reading()
            count = source.count
            await asyncio.sleep(0.01)
            assert source.count == count
            source.transport.resume_reading()
            await until(lambda: source.count > count + 10)


@unix_only
async def test_a_device_that_is_always_ready_is_read_once_in_a_turn(
    loop: iocp_loop.IocpEventLoop, no_leak: None
) -> None:
    class Restless(Recorder):
        count = 0

        def data_received(self, data: bytes) -> None:
            self.count += 1
            self.transport.pause_reading()
            self.transport.resume_reading()

    with open("/dev/zero", "rb", 0) as file:
        async with read_end(file, Restless()) as source:
            await turns(10)
            before = source.count
            await turns(10)
            assert source.count - before in (9, 10, 11)


async def test_regular_files_are_refused(loop: iocp_loop.IocpEventLoop, tmp_path: Path) -> None:
    for connect in loop.connect_read_pipe, loop.connect_write_pipe:
        with open(tmp_path / "file", "w+b") as file:
            with pytest.raises(ValueError, match="pipe"):
                await connect(Recorder, file)
            assert not file.closed
    with pytest.raises(ValueError, match="closed"):
        await loop.connect_read_pipe(Recorder, file)
    with pytest.raises(AttributeError):
        await loop.connect_read_pipe(Recorder, object())
    with pytest.raises(io.UnsupportedOperation):
        await loop.connect_read_pipe(Recorder, io.BytesIO())
