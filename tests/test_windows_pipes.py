"""Pipe transports on Windows: which handle an object stands for, and handles that a thread serves."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

if sys.platform != "win32":
    pytest.skip("pipes of this kind exist on Windows only", allow_module_level=True)

import _winapi
import msvcrt
from asyncio import windows_utils
from multiprocessing.connection import Pipe as connection_pair

import iocp_loop
from iocp_loop.methods import pipes
from iocp_loop.pipes import channels as windows_channels
from iocp_loop.ports.iocp import handles as windows_handles

from .support import LIMIT, Recorder, in_thread, python_command, turns, until
from .windows_rig import raw_client

Loop = iocp_loop.IocpEventLoop
PipeHandle: Any = windows_utils.PipeHandle


# --------------------------------------------------------------------------------------------------
# Which handle an object stands for
# --------------------------------------------------------------------------------------------------


async def test_a_file_around_an_overlapped_handle(loop: Loop, address: str) -> None:
    """Its fileno() is a descriptor of the C runtime, and what stands behind that needs no thread."""
    server = windows_handles.serve_pipe(address, first=True, buffer_size=4096)
    file = open(msvcrt.open_osfhandle(server, 0), "r+b", 0)
    with raw_client(address) as theirs:
        transport, protocol = await loop.connect_read_pipe(Recorder, file)
        assert isinstance(transport._channel, windows_channels.OverlappedChannel)
        _winapi.WriteFile(theirs.fileno(), b"hello", overlapped=True)[0].GetOverlappedResult(True)
        await until(lambda: protocol.data == b"hello")
        transport.close()
        await until(lambda: file.closed)


async def test_a_connection_of_multiprocessing(loop: Loop) -> None:
    """Its fileno() is a handle."""
    ours, theirs = connection_pair(duplex=False)
    transport, protocol = await loop.connect_read_pipe(Recorder, ours)
    theirs.send_bytes(b"hello")
    await until(lambda: protocol.data)
    assert protocol.data.endswith(b"hello")
    transport.close()
    await turns()
    theirs.close()


async def test_a_handle_that_cannot_be_read_is_written_all_the_same(loop: Loop) -> None:
    reading, writing = windows_utils.pipe(overlapped=(True, True))  # its writing end is just that
    with PipeHandle(reading) as reader:
        transport, protocol = await loop.connect_write_pipe(Recorder, PipeHandle(writing))
        transport.write(b"hello")
        assert await loop._proactor.read(reader, 100) == b"hello"
        assert not protocol.finished
        transport.close()
        await until(lambda: protocol.finished)


async def test_a_socket_is_read_by_one_and_written_by_another(loop: Loop) -> None:
    """Who only writes to it takes nothing away from who reads it."""
    ours, theirs = socket.socketpair()
    with theirs:
        sink, _ = await loop.connect_write_pipe(Recorder, ours)
        await turns()
        source, protocol = await loop.connect_read_pipe(Recorder, ours)
        for _ in range(10):
            theirs.sendall(b"x" * 100)
            await asyncio.sleep(0.001)
        await until(lambda: len(protocol.data) == 1000)
        sink.write(b"hello")
        await until(lambda: theirs.recv(5, socket.MSG_PEEK) == b"hello")
        sink.close()
        source.close()
        await turns()


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_a_writer_that_ends_when_its_peer_has_just_spoken(driver: str, kind: str, address: str) -> None:
    """Nobody goes on watching for the peer to leave: the handle is closed."""
    loop = iocp_loop.new_event_loop(driver)
    ours: Any
    theirs: Any
    if kind == "socket":
        ours, theirs = socket.socketpair()
    else:
        ours = PipeHandle(windows_handles.serve_pipe(address, first=True, buffer_size=4096))
        theirs = raw_client(address)
    with theirs:
        transport, protocol = loop.run_until_complete(loop.connect_write_pipe(Recorder, ours))
        while loop.poll(0):
            loop.dispatch()
        if kind == "socket":
            theirs.sendall(b"hello")
        else:
            _winapi.WriteFile(theirs.fileno(), b"hello", overlapped=True)[0].GetOverlappedResult(True)
        assert loop.poll(LIMIT)  # the completion of the watch is there, and nobody knows of it
        transport.close()
        loop.run_until_complete(until(lambda: protocol.finished))
        loop.run_until_complete(turns())
        assert (ours.fileno() if kind == "socket" else ours.handle or -1) == -1
    loop.close()


# --------------------------------------------------------------------------------------------------
# Threads
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def runtime_pipe() -> Iterator[tuple[Any, Any]]:
    """The two ends of ``os.pipe()``, which have no overlapped I/O."""
    reading, writing = os.pipe()
    with open(reading, "rb", 0) as reader, open(writing, "wb", 0) as writer:
        yield reader, writer


def serving_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("iocp_loop handle")]


async def test_a_thread_serves_and_ends(loop: Loop, runtime_pipe: tuple[Any, Any]) -> None:
    reader, writer = runtime_pipe
    source, got = await loop.connect_read_pipe(Recorder, reader)
    sink, _ = await loop.connect_write_pipe(Recorder, writer)
    sink.write(b"x" * 300_000)
    await until(lambda: len(got.data) == 300_000)
    assert len(serving_threads()) == 2
    source.close()
    sink.close()
    await until(lambda: not serving_threads())
    assert reader.closed
    assert writer.closed


async def test_closing_while_the_thread_blocks(loop: Loop, runtime_pipe: tuple[Any, Any]) -> None:
    reader, writer = runtime_pipe
    for _ in range(20):
        transport, protocol = await loop.connect_read_pipe(Recorder, os.fdopen(os.dup(reader.fileno()), "rb", 0))
        await turns(3)
        transport.close()
        await until(lambda: protocol.finished)  # noqa: B023 - awaited here
    await until(lambda: not serving_threads())
    writer.write(b"nobody has taken it")
    assert reader.read(100) == b"nobody has taken it"


def note_reads(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """An event that is set when a thread goes to read: one that has not begun when it is stopped will not begin."""
    reads = threading.Event()
    really_read = windows_handles.read_blocking

    def read(handle: int, size: int) -> bytes | None:
        reads.set()
        return really_read(handle, size)

    monkeypatch.setattr(windows_handles, "read_blocking", read)
    return reads


async def test_a_thread_that_does_not_come_back_is_left(
    loop: Loop, runtime_pipe: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = note_reads(monkeypatch)
    monkeypatch.setattr(windows_handles, "interrupt", lambda thread: None)
    monkeypatch.setattr(windows_channels, "PATIENCE", 0.1)
    reader, writer = runtime_pipe
    transport, protocol = await loop.connect_read_pipe(Recorder, reader)
    await until(reads.is_set)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        transport.close()
        await until(lambda: protocol.finished)
        await until(lambda: caught)
    assert [each.category for each in caught] == [ResourceWarning]
    assert "can't be stopped" in str(caught[0].message)
    assert not reader.closed
    writer.write(b"the thread comes back after all")
    await until(lambda: reader.closed)
    await until(lambda: not serving_threads())


def test_closing_the_loop_while_a_thread_blocks(driver: str, runtime_pipe: tuple[Any, Any]) -> None:
    reader, _ = runtime_pipe
    loop = iocp_loop.new_event_loop(driver)
    transport, protocol = loop.run_until_complete(loop.connect_read_pipe(Recorder, reader))
    loop.run_until_complete(turns())
    started = time.monotonic()
    loop.close()
    assert time.monotonic() - started < LIMIT / 2
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del transport, protocol
        gc.collect()
    assert ["unclosed transport" in str(each.message) for each in caught] == [True]
    assert reader.closed
    with in_thread(lambda: [thread.join(LIMIT) for thread in serving_threads()]):
        pass
    assert not serving_threads()


def test_closing_the_loop_while_a_thread_does_not_come_back(
    driver: str, runtime_pipe: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = runtime_pipe
    reads = note_reads(monkeypatch)
    loop = iocp_loop.new_event_loop(driver)
    transport, protocol = loop.run_until_complete(loop.connect_read_pipe(Recorder, reader))
    loop.run_until_complete(until(reads.is_set))
    with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch.setattr(windows_handles, "interrupt", lambda thread: None)
        patch.setattr(pipes, "PATIENCE", 0.1)
        patch.setattr(windows_channels, "PATIENCE", 0.1)
        started = time.monotonic()
        loop.close()
        del transport, protocol
        gc.collect()
        assert time.monotonic() - started < LIMIT / 2
    messages = [str(each.message) for each in caught]
    assert [text for text in messages if "can't be stopped" in text]
    assert [text for text in messages if "unclosed transport" in text]
    assert not reader.closed  # that would wait for the thread
    writer.write(b"the thread comes back after all")
    with in_thread(lambda: [thread.join(LIMIT) for thread in serving_threads()]):
        pass
    assert not serving_threads()


async def test_an_empty_write_is_not_the_end_for_a_thread(loop: Loop, runtime_pipe: tuple[Any, Any]) -> None:
    reader, writer = runtime_pipe
    transport, protocol = await loop.connect_read_pipe(Recorder, reader)
    handle = msvcrt.get_osfhandle(writer.fileno())
    for data in b"", b"one", b"":
        await asyncio.to_thread(_winapi.WriteFile, handle, data)
        await asyncio.sleep(0.01)
    await until(lambda: protocol.data == b"one")
    assert "eof_received" not in protocol.calls
    transport.close()
    await turns()


def test_standard_streams_of_a_child() -> None:
    """gh-87694, asyncssh#680: standard input and output as whoever started the program has left them."""
    code = """
        import asyncio, sys
        import iocp_loop

        class Shout(asyncio.Protocol):
            def __init__(self, sink):
                self.sink = sink
            def data_received(self, data):
                self.sink.write(data.upper())
            def connection_lost(self, exc):
                self.sink.close()

        class Sink(asyncio.Protocol):
            def __init__(self, done):
                self.done = done
            def connection_lost(self, exc):
                self.done.set_result(exc)

        async def main():
            loop = asyncio.get_running_loop()
            done = loop.create_future()
            sink, _ = await loop.connect_write_pipe(lambda: Sink(done), sys.stdout)
            await loop.connect_read_pipe(lambda: Shout(sink), sys.stdin)
            await done

        iocp_loop.run(main(), driver="iocp")
        """
    from .support import child_environment

    done = subprocess.run(
        python_command(code),
        env=child_environment(),
        input=b"hello\n" * 10_000,
        capture_output=True,
        timeout=LIMIT,
        check=False,
    )
    assert (done.stdout, done.stderr, done.returncode) == (b"HELLO\n" * 10_000, b"", 0)
