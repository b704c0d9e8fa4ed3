"""connect_read_pipe and connect_write_pipe: pipes, FIFOs, sockets, terminals, devices.

On Windows each runs on a pipe with overlapped I/O, and on one of the C runtime, which a thread serves.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

import iocp_loop

from .pipe_ends import closed, fill, read_end, take, write_end
from .support import WINDOWS, Pipe, Recorder, runtime_pipe, turns, until, windows_pipe

unix_only = pytest.mark.skipif(sys.platform == "win32", reason="Windows has nothing like it")


@pytest.fixture(params=["overlapped", "thread"] if WINDOWS else ["pipe"])
def kind(request: pytest.FixtureRequest) -> str:
    """What kind of pipe the loop gets: on Windows there are two, elsewhere one."""
    name: str = request.param
    return name


@pytest.fixture
def incoming(no_leak: None, kind: str) -> Iterator[Pipe]:
    """The two ends of a pipe: where the loop reads, and a file where the test writes."""
    reader, writer = windows_pipe("read") if kind == "overlapped" else runtime_pipe()
    with reader, writer:
        yield reader, writer


@pytest.fixture
def outgoing(no_leak: None, kind: str) -> Iterator[Pipe]:
    """The two ends of a pipe: a file where the test reads, and where the loop writes."""
    reader, writer = windows_pipe("write") if kind == "overlapped" else runtime_pipe()
    with reader, writer:
        yield reader, writer


@pytest.fixture
def pipe(no_leak: None, kind: str) -> Iterator[Pipe]:
    """The two ends of a pipe, both for the loop: where to read, where to write."""
    reader, writer = windows_pipe("both") if kind == "overlapped" else runtime_pipe()
    with reader, writer:
        yield reader, writer


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------


async def test_read(loop: iocp_loop.IocpEventLoop, incoming: Pipe) -> None:
    reader, writer = incoming
    async with read_end(reader) as protocol:
        transport = protocol.transport
        assert transport.get_extra_info("pipe") is reader
        assert transport.is_reading()
        assert transport.get_protocol() is protocol
        writer.write(b"one")
        await until(lambda: protocol.data == b"one")
        writer.write(b"two")
        await until(lambda: protocol.data == b"onetwo")
        writer.close()
        await until(lambda: protocol.finished)
    assert protocol.calls == ["connection_made", "data_received", "eof_received", "connection_lost"]
    assert protocol.lost is None
    assert closed(reader)
    assert "closed" in repr(transport)


async def test_read_much(loop: iocp_loop.IocpEventLoop, incoming: Pipe) -> None:
    reader, writer = incoming
    data = os.urandom(1 << 20) * 3
    async with read_end(reader) as protocol:
        work = asyncio.ensure_future(asyncio.to_thread(write_fully_and_close, writer, data))
        await until(lambda: protocol.finished)
        await work
    assert protocol.data == data


def write_fully_and_close(file: Any, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]
    file.close()


async def test_a_paused_reader_leaves_the_data_in_the_pipe(loop: iocp_loop.IocpEventLoop, incoming: Pipe) -> None:
    reader, writer = incoming
    async with read_end(reader) as protocol:
        for _ in range(3):
            protocol.transport.pause_reading()
            protocol.transport.pause_reading()
            assert not protocol.transport.is_reading()
            protocol.data.clear()
            writer.write(b"data")
            await asyncio.sleep(0.01)
            assert not protocol.data
            protocol.transport.resume_reading()
            protocol.transport.resume_reading()
            await until(lambda: protocol.data == b"data")
        protocol.transport.pause_reading()
        writer.close()
        await asyncio.sleep(0.01)
        assert not protocol.finished
        protocol.transport.resume_reading()
        await until(lambda: protocol.finished)


async def test_pausing_in_data_received_holds_at_once(loop: iocp_loop.IocpEventLoop, incoming: Pipe) -> None:
    class PausesItself(Recorder):
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.transport.pause_reading()

    reader, writer = incoming
    async with read_end(reader, PausesItself()) as protocol:
        writer.write(b"a" * 1000)
        for _ in range(3):
            await until(lambda: len(protocol.data) == 1000)
            await asyncio.to_thread(writer.write, b"a" * 1000)
            await asyncio.sleep(0.01)
            assert len(protocol.data) == 1000
            protocol.data.clear()
            protocol.transport.resume_reading()


async def test_paused_in_connection_made(loop: iocp_loop.IocpEventLoop, incoming: Pipe) -> None:
    class BeginsPaused(Recorder):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            transport.pause_reading()

    reader, writer = incoming
    writer.write(b"early")
    async with read_end(reader, BeginsPaused()) as protocol:
        await asyncio.sleep(0.01)
        assert not protocol.data
        protocol.transport.resume_reading()
        await until(lambda: protocol.data == b"early")


@unix_only
async def test_a_resume_that_cannot_wait_for_data_ends_the_transport(
    loop: iocp_loop.IocpEventLoop, incoming: Pipe, reports: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The poller has no room left: a transport that says it reads, and does not, would be worse."""
    reader, _ = incoming
    async with read_end(reader) as protocol:
        protocol.transport.pause_reading()
        await turns()

        def refuse(*_: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(loop._proactor, "watch_natively", lambda *_: None)  # it leaves what fails to the other way
        monkeypatch.setattr(loop._proactor, "start", refuse)
        protocol.transport.resume_reading()
        monkeypatch.undo()
        await until(lambda: protocol.finished)
    assert isinstance(protocol.lost, OSError)
    assert protocol.lost.errno == errno.ENOSPC
    assert [report["exception"] for report in reports] == [protocol.lost]
    reports.clear()
    assert closed(reader)


async def test_data_come_after_the_caller_has_the_transport(loop: iocp_loop.IocpEventLoop, incoming: Pipe) -> None:
    reader, writer = incoming
    writer.write(b"early")
    protocol = Recorder()
    transport, _ = await loop.connect_read_pipe(lambda: protocol, reader)
    assert protocol.calls == ["connection_made"]
    await until(lambda: protocol.data)
    transport.close()
    await turns()


async def test_close_a_reader_with_data_unread(loop: iocp_loop.IocpEventLoop, incoming: Pipe) -> None:
    reader, writer = incoming
    async with read_end(reader) as protocol:
        protocol.transport.pause_reading()
        writer.write(b"unread")
        protocol.transport.close()
        protocol.transport.close()
        assert protocol.transport.is_closing()
        await until(lambda: protocol.finished)
        await until(lambda: closed(reader))
        protocol.transport.resume_reading()
    assert protocol.calls == ["connection_made", "connection_lost"]
    with pytest.raises(OSError if WINDOWS else BrokenPipeError):  # the C runtime has a number of its own for it
        writer.write(b"nobody listens")


async def test_close_in_data_received(loop: iocp_loop.IocpEventLoop, incoming: Pipe) -> None:
    class ClosesItself(Recorder):
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.transport.close()

    reader, writer = incoming
    async with read_end(reader, ClosesItself()) as protocol:
        writer.write(b"x")
        writer.close()
        await until(lambda: protocol.finished)
    assert protocol.calls == ["connection_made", "data_received", "connection_lost"]


async def test_a_buffered_protocol_reads_a_pipe(loop: iocp_loop.IocpEventLoop, incoming: Pipe) -> None:
    class Buffered(asyncio.BufferedProtocol):
        def __init__(self) -> None:
            self.got = b""
            self.buffer = bytearray(3)
            self.lost = loop.create_future()

        def get_buffer(self, sizehint: int) -> bytearray:
            return self.buffer

        def buffer_updated(self, nbytes: int) -> None:
            self.got += self.buffer[:nbytes]

        def connection_lost(self, exc: BaseException | None) -> None:
            self.lost.set_result(exc)

    reader, writer = incoming
    _, protocol = await loop.connect_read_pipe(Buffered, reader)
    writer.write(b"0123456789")
    writer.close()
    assert await protocol.lost is None
    assert protocol.got == b"0123456789"


async def test_switching_the_protocol_of_a_reader(loop: iocp_loop.IocpEventLoop, incoming: Pipe) -> None:
    reader, writer = incoming
    async with read_end(reader) as first:
        second = Recorder()
        second.calls.append("switched to")
        first.transport.set_protocol(second)
        assert first.transport.get_protocol() is second
        writer.write(b"for the second")
        await until(lambda: second.data == b"for the second")
        writer.close()
        await until(lambda: second.finished)
    assert first.calls == ["connection_made"]


@pytest.mark.parametrize("call", ["connection_made", "data_received", "eof_received"])
async def test_an_exception_of_the_protocol_closes_its_pipe(
    loop: iocp_loop.IocpEventLoop, incoming: Pipe, reports: list[Any], call: str
) -> None:
    class Fails(Recorder):
        pass

    def fail(self: Any, *args: Any) -> None:
        raise ZeroDivisionError

    setattr(Fails, call, fail)
    reader, writer = incoming
    protocol = Fails()
    protocol.calls.append("new")
    connecting = loop.connect_read_pipe(lambda: protocol, reader)
    if call == "connection_made":
        with pytest.raises(ZeroDivisionError):
            await connecting
    else:
        await connecting
        writer.write(b"x")
        writer.close()
    await until(lambda: protocol.finished)
    await until(lambda: closed(reader))
    assert isinstance(protocol.lost, ZeroDivisionError)
    report = reports.pop()
    assert call in report["message"]
    assert report["protocol"] is protocol


async def test_streams_over_pipes(loop: iocp_loop.IocpEventLoop, pipe: Pipe) -> None:
    reading, writing = pipe
    reader = asyncio.StreamReader()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), reading)
    sink, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, writing)
    writer = asyncio.StreamWriter(sink, protocol, None, loop)
    lines = [b"%d\n" % number for number in range(50_000)]

    async def produce() -> None:
        for line in lines:
            writer.write(line)
            await writer.drain()
        writer.close()

    producing = asyncio.ensure_future(produce())
    assert [line async for line in reader] == lines
    await producing
    transport.close()
    await turns()


def test_system_exit_with_more_to_come_loses_nothing(driver: str, incoming: Pipe) -> None:
    class Leaving(asyncio.BufferedProtocol):
        exits = 0
        data = bytearray()
        buffer = bytearray(3)

        def get_buffer(self, sizehint: int) -> bytearray:
            return self.buffer

        def buffer_updated(self, nbytes: int) -> None:
            self.data += self.buffer[:nbytes]
            self.exits += 1
            if self.exits < 4:
                sys.exit(3)

    loop = iocp_loop.new_event_loop(driver)
    reader, writer = incoming
    transport, protocol = loop.run_until_complete(loop.connect_read_pipe(Leaving, reader))
    writer.write(b"in pieces of three, ")
    for _ in range(3):
        with pytest.raises(SystemExit):
            loop.run_forever()
    writer.write(b"all of them")
    loop.run_until_complete(until(lambda: len(protocol.data) == 31))
    assert protocol.data == b"in pieces of three, all of them"
    transport.close()
    loop.run_until_complete(turns())
    loop.close()
    writer.close()


# --------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------


async def test_write(loop: iocp_loop.IocpEventLoop, outgoing: Pipe) -> None:
    reader, writer = outgoing
    async with write_end(writer) as protocol:
        transport = protocol.transport
        assert transport.get_extra_info("pipe") is writer
        assert transport.can_write_eof()
        transport.write(b"one")
        transport.write(bytearray(b"two"))
        transport.write(memoryview(b"three"))
        transport.write(b"")
        assert await take(reader, 11) == b"onetwothree"
        transport.writelines([b"four", b"five"])
        assert await take(reader, 8) == b"fourfive"
        with pytest.raises(TypeError):
            transport.write("text")
        transport.write_eof()
        transport.write_eof()
        await until(lambda: protocol.finished)
    assert protocol.calls == ["connection_made", "connection_lost"]
    assert protocol.lost is None
    await until(lambda: closed(writer))
    assert reader.read(100) == b""


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
async def test_what_the_pipe_does_not_take_is_queued_in_order(
    loop: iocp_loop.IocpEventLoop, outgoing: Pipe, kind: Any
) -> None:
    reader, writer = outgoing
    data = os.urandom(300_000)
    async with write_end(writer) as protocol:
        source = bytearray(data)
        protocol.transport.write(kind(source))
        source[:] = bytes(len(source))  # the caller may use its buffer again
        assert protocol.transport.get_write_buffer_size() > 0
        assert protocol.calls[-1] == "pause_writing"
        protocol.transport.write(b"the end")
        protocol.transport.close()
        got = await asyncio.to_thread(reader.readall)
        await until(lambda: protocol.finished)
    assert got == data + b"the end"
    assert protocol.calls == ["connection_made", "pause_writing", "resume_writing", "connection_lost"]
    assert protocol.transport.get_write_buffer_size() == 0


async def test_write_buffer_limits(loop: iocp_loop.IocpEventLoop, outgoing: Pipe) -> None:
    reader, writer = outgoing
    async with write_end(writer) as protocol:
        transport = protocol.transport
        transport.set_write_buffer_limits(high=1000, low=10)
        assert transport.get_write_buffer_limits() == (10, 1000)
        if sys.platform != "win32":  # there no write is over before the next turn
            fill(writer.fileno())
        transport.write(b"x" * 1000)
        assert "pause_writing" not in protocol.calls
        transport.write(b"x")
        assert protocol.calls[-1] == "pause_writing"
        if sys.platform != "win32":
            os.set_blocking(reader.fileno(), False)

        def drained() -> bool:
            if not WINDOWS:
                reader.read(65536)
            return bool(protocol.calls[-1] == "resume_writing")

        await until(drained)


@unix_only
async def test_a_write_that_cannot_be_waited_for_ends_the_transport(
    loop: iocp_loop.IocpEventLoop, outgoing: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The poller has no room left: better an end with a reason than a close() that never comes."""
    _, writer = outgoing
    async with write_end(writer) as protocol:

        def refuse(*_: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(loop._proactor, "start", refuse)
        protocol.transport.write(bytes(1 << 20))
        monkeypatch.undo()
        assert protocol.transport.get_write_buffer_size() == 0
        await until(lambda: protocol.finished)
    assert isinstance(protocol.lost, OSError)
    assert protocol.lost.errno == errno.ENOSPC
    assert closed(writer)


async def test_abort_ends_a_write_that_waits(loop: iocp_loop.IocpEventLoop, outgoing: Pipe) -> None:
    reader, writer = outgoing
    data = os.urandom(1_000_000)
    async with write_end(writer) as protocol:
        protocol.transport.write(data)
        await asyncio.sleep(0.05)
        assert protocol.transport.get_write_buffer_size() > 0
        protocol.transport.write(b"never")
        protocol.transport.abort()
        await until(lambda: protocol.finished)
        await until(lambda: closed(writer))
    assert protocol.lost is None
    got = await asyncio.to_thread(reader.readall)
    assert len(got) < len(data)
    assert data.startswith(got)


@unix_only
async def test_abort_drops_what_is_queued(loop: iocp_loop.IocpEventLoop, outgoing: Pipe) -> None:
    reader, writer = outgoing
    async with write_end(writer) as protocol:
        size = fill(writer.fileno())
        protocol.transport.write(b"y" * 1000)
        protocol.transport.abort()
        assert protocol.transport.is_closing()
        await until(lambda: protocol.finished)
        await until(lambda: closed(writer))
    assert protocol.lost is None
    assert (await asyncio.to_thread(reader.readall)) == b"x" * size


async def test_the_writer_learns_that_the_reader_went_away(
    loop: iocp_loop.IocpEventLoop, outgoing: Pipe, kind: str
) -> None:
    if kind == "thread":
        pytest.skip("a handle without overlapped I/O can do but one thing at a time; the next write tells")
    reader, writer = outgoing
    async with write_end(writer) as protocol:
        await asyncio.sleep(0.01)
        assert not protocol.finished
        reader.close()
        await until(lambda: protocol.finished)
    assert protocol.lost is None


async def test_the_reader_went_away_with_data_queued(loop: iocp_loop.IocpEventLoop, outgoing: Pipe) -> None:
    reader, writer = outgoing
    async with write_end(writer) as protocol:
        protocol.transport.write(b"x" * 1_000_000)
        await turns()
        reader.close()
        await until(lambda: protocol.finished)
    assert isinstance(protocol.lost, BrokenPipeError)


async def test_the_reader_went_away_while_closing(loop: iocp_loop.IocpEventLoop, outgoing: Pipe) -> None:
    reader, writer = outgoing
    async with write_end(writer) as protocol:
        protocol.transport.write(b"x" * 1_000_000)
        protocol.transport.close()
        await turns()
        assert not protocol.finished
        reader.close()
        await until(lambda: protocol.finished)
    assert isinstance(protocol.lost, BrokenPipeError)


async def test_write_to_a_pipe_without_reader(
    loop: iocp_loop.IocpEventLoop, outgoing: Pipe, caplog: pytest.LogCaptureFixture
) -> None:
    reader, writer = outgoing
    reader.close()
    async with write_end(writer) as protocol:
        with caplog.at_level(logging.WARNING, "asyncio"):
            protocol.transport.write(b"x")
            await until(lambda: protocol.finished)
            for _ in range(20):
                protocol.transport.write(b"x")
        assert "pipe closed by peer" in caplog.text
    assert protocol.lost is None or isinstance(protocol.lost, BrokenPipeError)


# --------------------------------------------------------------------------------------------------
# The end
# --------------------------------------------------------------------------------------------------


def test_an_unclosed_transport_warns_and_closes(driver: str, pipe: Pipe) -> None:
    reader, writer = pipe
    loop = iocp_loop.new_event_loop(driver)
    transports = [
        loop.run_until_complete(loop.connect_read_pipe(Recorder, reader))[0],
        loop.run_until_complete(loop.connect_write_pipe(Recorder, writer))[0],
    ]
    loop.run_until_complete(turns())
    assert "open" in repr(transports[0])
    loop.close()
    for name in "ReadPipeTransport", "WritePipeTransport":
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            del transports[0]
            gc.collect()
        assert [warning.category for warning in caught] == [ResourceWarning]
        assert f"unclosed transport <{name} open" in str(caught[0].message)
    assert closed(reader)
    assert closed(writer)


def test_an_unclosed_transport_without_its_pipe_warns_only(driver: str, pipe: Pipe) -> None:
    loop = iocp_loop.new_event_loop(driver)
    transports: list[Any] = [
        loop.run_until_complete(loop.connect_read_pipe(Recorder, pipe[0]))[0],
        loop.run_until_complete(loop.connect_write_pipe(Recorder, pipe[1]))[0],
    ]
    loop.run_until_complete(turns())
    loop.close()
    for transport in transports:
        transport._pipe = None  # as tests of CPython's do
    del transport
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        transports.clear()
        gc.collect()
    assert [warning.category for warning in caught] == [ResourceWarning, ResourceWarning]


async def test_callbacks_run_in_the_context_of_the_caller(loop: iocp_loop.IocpEventLoop, incoming: Pipe) -> None:
    import contextvars

    variable = contextvars.ContextVar("variable", default="nothing")
    seen: dict[str, str] = {}

    class Notes(Recorder):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            seen["made"] = variable.get()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            seen["data"] = variable.get()

        def connection_lost(self, exc: BaseException | None) -> None:
            super().connection_lost(exc)
            seen["lost"] = variable.get()

    reader, writer = incoming
    variable.set("the caller's")
    async with read_end(reader, Notes()) as protocol:
        variable.set("something else")
        writer.write(b"x")
        await until(lambda: protocol.data)
    assert seen == {"made": "the caller's", "data": "the caller's", "lost": "something else"}
