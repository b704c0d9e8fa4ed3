"""Named pipes, handles that a thread serves, waits for handles, and what a process is on Windows."""

from __future__ import annotations

import asyncio
import asyncio.subprocess
import contextlib
import errno
import gc
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

if sys.platform != "win32":
    pytest.skip("pipes of this kind exist on Windows only", allow_module_level=True)

import _overlapped
import _winapi
import msvcrt
from asyncio import windows_utils
from multiprocessing.connection import Pipe as connection_pair

import iocp_loop
from iocp_loop import named_pipes, pipes, windows_channels, windows_pipes
from iocp_loop import operations as ops
from iocp_loop.ports import windows_handles

from .support import LIMIT, WINE, Echo, Recorder, in_thread, open_handles, python_command, turns, until

Loop = iocp_loop.IocpEventLoop
PipeHandle: Any = windows_utils.PipeHandle

_numbers = itertools.count()

# CreateNamedPipe: PIPE_TYPE_MESSAGE | PIPE_READMODE_MESSAGE
MESSAGES = 0x4 | 0x2


@pytest.fixture
def address() -> str:
    """A name that no pipe has."""
    return rf"\\.\pipe\iocp_loop-test-{os.getpid()}-{next(_numbers)}"


@contextlib.asynccontextmanager
async def serving(loop: Loop, address: str, factory: Any = Echo) -> AsyncIterator[named_pipes.PipeServer]:
    """A server on the named pipe `address`."""
    [server] = await loop.start_serving_pipe(factory, address)
    try:
        yield server
    finally:
        server.close()
        await turns()


async def connect(loop: Loop, address: str, factory: Any = Recorder) -> Any:
    """The protocol of a new client."""
    _, protocol = await loop.create_pipe_connection(factory, address)
    return protocol


def raw_client(address: str) -> Any:
    """A client's end by itself."""
    return PipeHandle(windows_handles.connect_pipe(address))


# --------------------------------------------------------------------------------------------------
# Named pipes
# --------------------------------------------------------------------------------------------------


async def test_echo(loop: Loop, address: str) -> None:
    async with serving(loop, address) as server:
        assert repr(address) in repr(server)
        client = await connect(loop, address)
        assert isinstance(client.transport, asyncio.Transport)
        assert client.transport.get_extra_info("addr") == address
        assert isinstance(client.transport.get_extra_info("pipe"), PipeHandle)
        client.transport.write(b"hello")
        await until(lambda: client.data == b"hello")
        client.transport.close()
        await until(lambda: client.finished)
    assert client.calls == ["connection_made", "data_received", "connection_lost"]
    assert client.lost is None
    assert "closed" in repr(client.transport)


async def test_much_data_both_ways(loop: Loop, address: str) -> None:
    data = os.urandom(1 << 20) * 4
    async with serving(loop, address):
        client = await connect(loop, address)
        client.transport.write(data)
        assert client.calls[-1] == "pause_writing"
        await until(lambda: len(client.data) == len(data))
        assert client.data == data
        assert client.calls.count("resume_writing") == client.calls.count("pause_writing")
        client.transport.close()


async def test_streams_over_a_named_pipe(loop: Loop, address: str) -> None:
    async def shout(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async for line in reader:
            writer.write(line.upper())
            await writer.drain()
        writer.close()

    def server_protocol() -> asyncio.StreamReaderProtocol:
        return asyncio.StreamReaderProtocol(asyncio.StreamReader(), shout)

    async with serving(loop, address, server_protocol):
        for number in range(5):
            reader = asyncio.StreamReader()
            transport, protocol = await loop.create_pipe_connection(
                lambda reader=reader: asyncio.StreamReaderProtocol(reader),
                address,
            )
            writer = asyncio.StreamWriter(transport, protocol, reader, loop)
            writer.write(b"line %d\n" % number)
            assert await reader.readline() == b"LINE %d\n" % number
            writer.close()
            await writer.wait_closed()


async def test_many_clients_at_once(loop: Loop, address: str) -> None:
    async def one(number: int) -> None:
        client = await connect(loop, address)
        message = b"%d" % number * 100
        client.transport.write(message)
        await until(lambda: client.data == message)
        client.transport.close()

    async with serving(loop, address):
        await asyncio.gather(*map(one, range(5 * named_pipes.DEPTH)))


async def test_several_clients_may_come_before_the_loop_turns(loop: Loop, address: str) -> None:
    made: list[Any] = []

    def factory() -> Recorder:
        made.append(Recorder())
        return made[-1]

    async with serving(loop, address, factory):
        clients = [raw_client(address) for _ in range(named_pipes.DEPTH)]
        with pytest.raises(OSError) as caught:
            raw_client(address)
        assert caught.value.winerror == windows_handles.PIPE_BUSY
        await until(lambda: len(made) == len(clients))
        for client in clients:
            client.close()
        await until(lambda: all("eof_received" in each.calls for each in made))
        for each in made:
            each.transport.close()


async def test_a_client_waits_while_no_instance_is_free(loop: Loop, address: str) -> None:
    server = PipeHandle(windows_handles.serve_pipe(address, first=True, buffer_size=4096))
    with raw_client(address):
        waiting = asyncio.ensure_future(connect(loop, address))
        await asyncio.sleep(0.05)
        assert not waiting.done()
    server.close()
    with PipeHandle(windows_handles.serve_pipe(address, first=False, buffer_size=4096)):
        if not WINE:  # there the name may be gone for a moment
            (await waiting).transport.abort()
        else:
            with contextlib.suppress(FileNotFoundError):
                (await waiting).transport.abort()
        await turns()


async def test_cancelling_a_client_that_waits(loop: Loop, address: str) -> None:
    with PipeHandle(windows_handles.serve_pipe(address, first=True, buffer_size=4096)), raw_client(address):
        waiting = asyncio.ensure_future(connect(loop, address))
        await asyncio.sleep(0.02)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting


async def test_nobody_serves(loop: Loop, address: str) -> None:
    with pytest.raises(FileNotFoundError):
        await connect(loop, address)
    async with serving(loop, address) as server:
        assert not server.closed()
        server.close()
        server.close()
        assert server.closed()
        with pytest.raises(FileNotFoundError):
            await connect(loop, address)


async def test_closing_a_server_leaves_its_clients(loop: Loop, address: str) -> None:
    async with serving(loop, address) as server:
        client = await connect(loop, address)
        client.transport.write(b"one")
        await until(lambda: client.data == b"one")
        server.close()
        client.transport.write(b"two")
        await until(lambda: client.data == b"onetwo")
        client.transport.close()


@pytest.mark.skipif(WINE, reason="Wine does not enforce FILE_FLAG_FIRST_PIPE_INSTANCE")
async def test_a_name_is_served_once(loop: Loop, address: str) -> None:
    async with serving(loop, address):
        with pytest.raises(PermissionError):
            await loop.start_serving_pipe(Echo, address)


async def test_a_name_that_is_none(loop: Loop) -> None:
    with pytest.raises(OSError) as caught:
        await loop.start_serving_pipe(Echo, "no pipe")
    assert caught.value.winerror in (87, 123)  # ERROR_INVALID_PARAMETER, ERROR_INVALID_NAME


async def test_clients_that_leave_at_once_cost_nothing(loop: Loop, address: str, reports: list[Any]) -> None:
    async with serving(loop, address):
        for _ in range(3):
            for _ in range(named_pipes.DEPTH):
                raw_client(address).close()
            await asyncio.sleep(0.01)
        client = await connect(loop, address)
        client.transport.write(b"still there")
        await until(lambda: client.data == b"still there")
        client.transport.close()
    assert not reports


async def test_a_raising_factory_costs_its_client_only(loop: Loop, address: str, reports: list[Any]) -> None:
    fails = True

    def factory() -> Echo:
        if fails:
            raise ZeroDivisionError
        return Echo()

    async with serving(loop, address, factory):
        client = await connect(loop, address)
        await until(lambda: "eof_received" in client.calls)
        client.transport.close()
        report = reports.pop()
        assert isinstance(report["exception"], ZeroDivisionError)
        assert report["pipe"] == address
        fails = False
        client = await connect(loop, address)
        client.transport.write(b"x")
        await until(lambda: client.data == b"x")
        client.transport.close()
    with pytest.raises(ZeroDivisionError):
        async with serving(loop, address):
            fails = True
            await connect(loop, address, factory)


async def test_a_server_without_instances_for_a_moment(
    loop: Loop, address: str, reports: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    really, broken = windows_handles.serve_pipe, False

    def serve(*args: Any, **kwargs: Any) -> int:
        if broken:
            raise OSError(0, "no memory", None, 8)
        return really(*args, **kwargs)

    monkeypatch.setattr(windows_handles, "serve_pipe", serve)
    async with serving(loop, address):
        broken = True
        for _ in range(2):
            (await connect(loop, address)).transport.abort()
        await asyncio.sleep(2.5 * named_pipes.RETRY_DELAY)
        assert [report["message"] for report in reports] == ["Pipe accept failed: no new instance can be made"]
        reports.clear()
        broken = False
        await asyncio.sleep(1.5 * named_pipes.RETRY_DELAY)
        for _ in range(named_pipes.DEPTH):
            (await connect(loop, address)).transport.abort()


async def test_the_end_of_one_side_is_the_end_of_the_other(loop: Loop, address: str) -> None:
    made: list[Recorder] = []

    def factory() -> Recorder:
        made.append(Recorder())
        return made[-1]

    async with serving(loop, address, factory):
        client = await connect(loop, address)
        assert not client.transport.can_write_eof()
        with pytest.raises(NotImplementedError):
            client.transport.write_eof()
        client.transport.write(b"the last words")
        client.transport.close()
        await until(lambda: made and "eof_received" in made[0].calls)
        assert made[0].data == b"the last words"
        assert not made[0].finished  # it keeps the transport open, as a StreamReaderProtocol does
        made[0].transport.close()
        await until(lambda: made[0].finished)
        assert made[0].lost is None


async def test_writing_to_a_peer_that_is_gone(loop: Loop, address: str) -> None:
    with PipeHandle(windows_handles.serve_pipe(address, first=True, buffer_size=4096)) as server:
        client = await connect(loop, address)
        client.transport.write(b"x" * 1_000_000)
        await turns()
        server.close()
        await until(lambda: client.finished or "eof_received" in client.calls)
        client.transport.close()
        await until(lambda: client.finished)
    assert isinstance(client.lost, BrokenPipeError)


async def test_a_paused_protocol_gets_what_came_later(loop: Loop, address: str) -> None:
    async with serving(loop, address):
        client = await connect(loop, address)
        for _ in range(3):
            client.transport.pause_reading()
            client.transport.write(b"x" * 1000)
            await asyncio.sleep(0.02)
            assert not client.data
            client.transport.resume_reading()
            await until(lambda: len(client.data) == 1000)
            client.data.clear()
        client.transport.close()


async def test_messages_are_not_cut(loop: Loop, address: str) -> None:
    """trio#1773: ERROR_MORE_DATA on the pipe of somebody who reads by messages."""
    access = _winapi.PIPE_ACCESS_DUPLEX | _winapi.FILE_FLAG_OVERLAPPED
    ours = PipeHandle(_winapi.CreateNamedPipe(address, access, MESSAGES, 1, 1 << 20, 1 << 20, 0, _winapi.NULL))
    with raw_client(address) as theirs:
        message = os.urandom(windows_channels.READ_SIZE * 2 + 1000)
        early = _winapi.WriteFile(theirs.fileno(), message, overlapped=True)[0]
        transport, protocol = await loop.connect_read_pipe(Recorder, ours)
        await until(lambda: len(protocol.data) == len(message))
        late = _winapi.WriteFile(theirs.fileno(), message, overlapped=True)[0]
        await until(lambda: len(protocol.data) == 2 * len(message))
        assert protocol.data == message * 2
        for overlapped in early, late:
            overlapped.GetOverlappedResult(True)
        transport.close()
        await turns()


async def test_an_empty_message_is_not_the_end(loop: Loop, address: str) -> None:
    ours = PipeHandle(windows_handles.serve_pipe(address, first=True, buffer_size=4096))
    with raw_client(address) as theirs:
        transport, protocol = await loop.connect_read_pipe(Recorder, ours)
        for data in b"", b"one", b"", b"two":
            _winapi.WriteFile(theirs.fileno(), data, overlapped=True)[0].GetOverlappedResult(True)
            await asyncio.sleep(0.01)
        await until(lambda: protocol.data == b"onetwo")
        assert "eof_received" not in protocol.calls
        transport.close()
        await turns()


async def test_connections_leave_no_handle(loop: Loop, address: str) -> None:
    async def one() -> None:
        client = await connect(loop, address)
        client.transport.write(b"x")
        await until(lambda: client.data)
        client.transport.close()
        await until(lambda: client.finished)

    async with serving(loop, address):
        await one()
        before = open_handles()
        for _ in range(50):
            await one()
        await until(lambda: open_handles() <= before)


async def test_a_transport_of_a_named_pipe_that_nobody_closed(loop: Loop, address: str) -> None:
    loop.set_debug(True)
    with PipeHandle(windows_handles.serve_pipe(address, first=True, buffer_size=4096)):
        client = await connect(loop, address)
        pipe = client.transport.get_extra_info("pipe")
        await turns()
        client.transport._channel.stop()  # or the read in flight refers to it
        await turns()
        gc.collect()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            del client
            gc.collect()
    assert [each.category for each in caught] == [ResourceWarning]
    text = str(caught[0].message)
    assert "unclosed transport <DuplexPipeTransport open" in text
    assert "Object created at" in text
    assert pipe.handle is None


def test_a_loop_closes_under_a_server_and_its_clients(address: str, driver: str) -> None:
    before = open_handles()
    loop = iocp_loop.new_event_loop(driver)
    [server] = loop.run_until_complete(loop.start_serving_pipe(Echo, address))
    client = loop.run_until_complete(connect(loop, address))
    client.transport.close()
    loop.run_until_complete(turns())
    started = time.monotonic()
    loop.close()
    assert time.monotonic() - started < LIMIT / 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        del server, client
        gc.collect()
    assert open_handles() <= before + 2  # the pool's thread that waits may be there now


@pytest.mark.parametrize("method", ["create_pipe_connection", "start_serving_pipe"])
def test_on_a_driver_without_overlapped_io(method: str, address: str) -> None:
    loop = iocp_loop.new_event_loop("poll")
    with pytest.raises(NotImplementedError, match="iocp"):
        loop.run_until_complete(getattr(loop, method)(Recorder, address))
    with pytest.raises(NotImplementedError, match="iocp"):
        loop.run_until_complete(asyncio.wait_for(loop.subprocess_exec(asyncio.SubprocessProtocol, "x"), LIMIT))
    loop.close()


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


# --------------------------------------------------------------------------------------------------
# Operations
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def event() -> Iterator[int]:
    """An event that is not set."""
    number = _overlapped.CreateEvent(None, True, False, None)
    yield number
    _winapi.CloseHandle(number)


async def test_wait_for_a_handle(loop: Loop, event: int) -> None:
    waiting = loop._proactor.wait_for_handle(event)
    await asyncio.sleep(0.01)
    assert not waiting.done()
    _overlapped.SetEvent(event)
    assert await waiting is True
    assert await loop._proactor.wait_for_handle(event) is True


async def test_wait_for_a_handle_for_some_time(loop: Loop, event: int) -> None:
    started = time.monotonic()
    assert await loop._proactor.wait_for_handle(event, 0.05) is False
    assert time.monotonic() - started >= 0.04
    await turns()
    assert not loop._proactor.in_flight
    _overlapped.SetEvent(event)
    assert await loop._proactor.wait_for_handle(event, LIMIT) is True


async def test_cancel_a_wait_for_a_handle(loop: Loop, event: int) -> None:
    for _ in range(3):
        waiting = loop._proactor.wait_for_handle(event)
        await turns(2)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await turns()
        assert not loop._proactor.in_flight


async def test_a_cancel_that_meets_the_signal_half_way(loop: Loop, event: int) -> None:
    for delay in range(20):
        got: list[Any] = []
        op = ops.WaitForHandle(event)
        loop._proactor.start(op, lambda value, error: got.append((value, error)))  # noqa: B023 - awaited here
        _overlapped.SetEvent(event)
        time.sleep(delay / 10_000)  # noqa: ASYNC251 - the loop is to stand still
        loop._proactor.cancel(op)
        await until(lambda: not op.in_flight)  # noqa: B023 - awaited here
        await turns()
        assert len(got) == 1
        value, error = got[0]
        assert value is True or (error is not None and error.errno == errno.ECANCELED)
        _overlapped.ResetEvent(event)


async def test_waits_for_many_handles_leave_nothing(loop: Loop) -> None:
    events = [_overlapped.CreateEvent(None, True, False, None) for _ in range(100)]
    waiting = [loop._proactor.wait_for_handle(each) for each in events]  # more than one thread can wait for by itself
    await turns()
    for each in events:
        _overlapped.SetEvent(each)
    assert await asyncio.gather(*waiting) == [True] * len(events)
    for each in events:
        _winapi.CloseHandle(each)
    assert not loop._proactor.in_flight


def test_a_loop_closes_under_a_wait(driver: str, event: int) -> None:
    loop = iocp_loop.new_event_loop(driver)
    waiting = loop._proactor.wait_for_handle(event)
    started = time.monotonic()
    loop.close()
    assert time.monotonic() - started < 1.5  # taken back, not waited for
    assert waiting.cancelled()
    _overlapped.SetEvent(event)
    time.sleep(0.02)


async def test_what_cannot_be_waited_for(loop: Loop) -> None:
    with pytest.raises(OSError) as caught:
        await loop._proactor.wait_for_handle(0xFFFC)
    assert caught.value.winerror == 6  # ERROR_INVALID_HANDLE
    assert not loop._proactor.in_flight


async def test_accept_a_client_that_was_there_first(loop: Loop, address: str) -> None:
    with PipeHandle(windows_handles.serve_pipe(address, first=True, buffer_size=4096)) as server:
        client = raw_client(address)
        await loop._proactor.accept_pipe(server)
        client.close()


async def test_accept_a_client_that_came_and_left(loop: Loop, address: str) -> None:
    with PipeHandle(windows_handles.serve_pipe(address, first=True, buffer_size=4096)) as server:
        raw_client(address).close()
        with pytest.raises(BrokenPipeError):
            await loop._proactor.accept_pipe(server)


async def test_cancel_an_accept(loop: Loop, address: str) -> None:
    with PipeHandle(windows_handles.serve_pipe(address, first=True, buffer_size=4096)) as server:
        accepting = loop._proactor.accept_pipe(server)
        await turns(2)
        accepting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await accepting
        await until(lambda: not loop._proactor.in_flight)


# --------------------------------------------------------------------------------------------------
# Processes
# --------------------------------------------------------------------------------------------------


async def test_the_pipes_of_a_process_are_overlapped(loop: Loop) -> None:
    code = "import os; os.write(1, os.read(0, 99))"
    transport, _ = await loop.subprocess_exec(asyncio.SubprocessProtocol, sys.executable, "-c", code)
    for fd in range(3):
        pipe: Any = transport.get_pipe_transport(fd)
        assert isinstance(pipe, (windows_pipes.ReadPipeTransport, windows_pipes.WritePipeTransport))
        assert type(pipe._channel) is windows_channels.OverlappedChannel
    transport.close()
    await turns()
    await asyncio.sleep(0.05)


async def test_standard_input_closes_when_the_process_has_gone(loop: Loop) -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "pass", stdin=asyncio.subprocess.PIPE)
    assert process.stdin is not None
    assert await process.wait() == 0
    await until(process.stdin.is_closing)


async def test_other_signals_are_refused(loop: Loop) -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "import time; time.sleep(1000)")
    with pytest.raises(ValueError, match="signal"):
        process.send_signal(9)
    process.kill()
    await process.wait()


@pytest.mark.skipif(WINE, reason="under Wine CTRL_BREAK does not reach another process group")
async def test_ctrl_break_to_a_process_group(loop: Loop) -> None:
    code = (
        "import signal, time; signal.signal(signal.SIGBREAK, lambda *_: exit(7)); print(1, flush=True); time.sleep(60)"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        code,
        stdout=asyncio.subprocess.PIPE,
        creationflags=subprocess.CREATE_NEW_PROCESS_GROUP,
    )
    assert process.stdout is not None
    await process.stdout.readline()
    process.send_signal(signal.CTRL_BREAK_EVENT)
    assert await process.wait() == 7
