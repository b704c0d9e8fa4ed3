"""Named pipes on Windows."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import sys
import time
import warnings
from collections.abc import AsyncIterator
from typing import Any

import pytest

if sys.platform != "win32":
    pytest.skip("pipes of this kind exist on Windows only", allow_module_level=True)

import _winapi
from asyncio import windows_utils

import iocp_loop
from iocp_loop.pipes import channels as windows_channels
from iocp_loop.pipes import named as named_pipes
from iocp_loop.ports.iocp import handles as windows_handles

from .support import LIMIT, WINE, Echo, Recorder, open_handles, turns, until
from .windows_rig import raw_client

Loop = iocp_loop.IocpEventLoop
PipeHandle: Any = windows_utils.PipeHandle

# CreateNamedPipe: PIPE_TYPE_MESSAGE | PIPE_READMODE_MESSAGE
MESSAGES = 0x4 | 0x2


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
