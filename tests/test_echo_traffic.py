"""Echo servers on our loop under traffic, spoken to by asyncio's own loop in another thread, and by plain sockets."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

import iocp_loop

from .support import LIMIT, WINDOWS, Echo, read_all, read_exactly, reset, turns, until

Loop = iocp_loop.IocpEventLoop

KiB, MiB = 1 << 10, 1 << 20


# -- servers ---------------------------------------------------------------------------------------


class BufferedEcho(asyncio.BufferedProtocol):
    """An echo that receives into a buffer of its own."""

    def __init__(self) -> None:
        self.buffer = bytearray(64 * KiB)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]  # stream transports only

    def get_buffer(self, sizehint: int) -> bytearray:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.transport.write(memoryview(self.buffer)[:nbytes])

    def pause_writing(self) -> None:
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.transport.resume_reading()


async def echo_stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """An echo by streams."""
    try:
        while data := await reader.read(64 * KiB):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass  # the client has reset the connection
    finally:
        writer.close()


@asynccontextmanager
async def serving(loop: Loop, mode: str) -> AsyncIterator[Any]:
    """A running echo server; the value is its address.  Its connections are gone at the end."""
    if mode == "streams":
        server = await asyncio.start_server(echo_stream, "127.0.0.1", 0, backlog=1024)
    else:
        factory: Callable[[], Any] = Echo if mode == "protocol" else BufferedEcho
        server = await loop.create_server(factory, "127.0.0.1", 0, backlog=1024)
    yield server.sockets[0].getsockname()
    server.close()
    await until(lambda: len(loop._proactor.in_flight) == 0)


modes = pytest.mark.parametrize("mode", ["protocol", "buffered", "streams"])


# -- clients ---------------------------------------------------------------------------------------


def by_stock_asyncio(main: Coroutine[Any, Any, Any]) -> Any:
    """Run `main` on asyncio's own loop; to be called in another thread."""
    factory = getattr(asyncio, "ProactorEventLoop", None) or asyncio.SelectorEventLoop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main)


async def ask(address: Any, data: bytes) -> bytes:
    """Send `data`, close the sending side, and receive to the end."""
    reader, writer = await asyncio.open_connection(*address, limit=MiB)

    async def send() -> None:
        for position in range(0, len(data), MiB):
            writer.write(data[position : position + MiB])
            await writer.drain()
        writer.write_eof()

    sending = asyncio.create_task(send())
    pieces = []
    while piece := await reader.read(MiB):
        pieces.append(piece)
    await sending
    writer.close()
    await writer.wait_closed()
    return b"".join(pieces)


async def ping(address: Any, number: int, rounds: int, all_are_here: asyncio.Barrier) -> None:
    """A conversation of some rounds, begun when every other client is connected too."""
    reader, writer = await asyncio.open_connection(*address)
    await all_are_here.wait()
    for round_ in range(rounds):
        message = b"%08d %08d" % (number, round_)
        writer.write(message)
        assert await reader.readexactly(len(message)) == message
    writer.close()
    await writer.wait_closed()


async def many(address: Any, count: int, rounds: int) -> None:
    all_are_here = asyncio.Barrier(count)
    await asyncio.gather(*(ping(address, number, rounds, all_are_here) for number in range(count)))


def need_descriptors(count: int) -> None:
    """Make sure that this process may open so many; skips the test where it may not."""
    if WINDOWS:
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        pytest.skip(f"this process may have no more than {hard} descriptors")
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


# -- amounts and numbers ---------------------------------------------------------------------------


@modes
@pytest.mark.parametrize("size", [1, KiB, MiB, 64 * MiB], ids=["1 byte", "1 KiB", "1 MiB", "64 MiB"])
async def test_every_byte_comes_back_after_a_half_close(loop: Loop, mode: str, size: int) -> None:
    data = os.urandom(size)
    async with serving(loop, mode) as address:
        # Compared outside pytest's assert: it would explain 64 MiB.
        same = await asyncio.to_thread(by_stock_asyncio, ask(address, data)) == data
        assert same


@modes
@pytest.mark.parametrize("count", [1, 100, 1000])
async def test_connections_at_once(loop: Loop, mode: str, count: int) -> None:
    need_descriptors(2 * count + 100)
    async with serving(loop, mode) as address:
        await asyncio.to_thread(by_stock_asyncio, many(address, count, 1000 // count + 2))


async def test_a_thousand_connections_by_our_own_client(loop: Loop) -> None:
    need_descriptors(2 * 1000 + 100)
    async with serving(loop, "protocol") as address:
        await many(address, 1000, 2)


async def test_large_messages_on_many_connections(loop: Loop) -> None:
    data = os.urandom(300 * KiB)

    async def all_of_them(address: Any) -> bool:
        answers = await asyncio.gather(*(ask(address, data[number:]) for number in range(20)))
        return all(answer == data[number:] for number, answer in enumerate(answers))

    async with serving(loop, "protocol") as address:
        assert await asyncio.to_thread(by_stock_asyncio, all_of_them(address))


async def test_connections_that_come_and_go(loop: Loop) -> None:
    async def one_after_another(address: Any) -> None:
        for number in range(200):
            assert await ask(address, b"%d" % number) == b"%d" % number

    async with serving(loop, "protocol") as address:
        await asyncio.to_thread(by_stock_asyncio, one_after_another(address))


@pytest.mark.parametrize("mode", ["protocol", "buffered"])
async def test_a_burst_on_a_thousand_connections_while_the_loop_is_busy(loop: Loop, mode: str) -> None:
    """More completions at once than any queue holds, and more data than any pool of buffers."""
    count = 1000
    need_descriptors(2 * count + 100)
    data = os.urandom(20 * KiB)
    async with serving(loop, mode) as address:
        clients = []
        for number in range(count):
            clients.append(socket.create_connection(address, LIMIT))
            if number % 100 == 0:
                await turns(3)  # the listener's backlog is no larger than the system lets it be
        await until(lambda: len(loop._proactor.in_flight) == count + 1)
        for client in clients:  # without a turn of the loop
            client.sendall(data)
        for client in clients:
            assert await asyncio.to_thread(read_exactly, client, len(data)) == data
            client.close()


# -- difficult clients -----------------------------------------------------------------------------


def half_close(address: Any, size: int) -> tuple[int, int]:
    """Send everything and the end before reading a byte, as ``nc -N`` may."""
    data = bytes(range(256)) * (size // 256)
    with socket.create_connection(address, LIMIT) as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        time.sleep(0.05)
        got = read_all(client)
        return len(got), got == data


@modes
async def test_a_client_that_half_closes_before_it_reads(loop: Loop, mode: str) -> None:
    size = 256 * KiB  # what both kernels' buffers can hold: nobody reads yet
    async with serving(loop, mode) as address:
        assert await asyncio.to_thread(half_close, address, size) == (size, True)


@modes
async def test_clients_that_reset_disturb_nobody(loop: Loop, mode: str) -> None:
    async def good(address: Any) -> bool:
        data = os.urandom(100 * KiB)
        return all([await ask(address, data) == data for _ in range(10)])

    def bad(address: Any) -> None:
        for number in range(60):
            client = socket.create_connection(address, LIMIT)
            if number % 3:
                client.sendall(bytes(number * 1000))
            if number % 3 == 2:
                client.recv(10)
            reset(client)

    async with serving(loop, mode) as address:
        result, *_ = await asyncio.gather(
            asyncio.to_thread(by_stock_asyncio, good(address)), asyncio.to_thread(bad, address)
        )
        assert result
        assert await asyncio.to_thread(half_close, address, 1024) == (1024, True)


async def test_a_client_that_never_reads_stops_the_server_from_reading(loop: Loop) -> None:
    """Backpressure: what the server holds for a client that does not read is bounded."""

    def send_until_it_stalls(address: Any) -> int:
        with socket.create_connection(address, LIMIT) as client:
            client.settimeout(0.3)
            sent = 0
            try:
                while sent < 256 * MiB:
                    sent += client.send(bytes(MiB))
            except TimeoutError:
                pass
            reset(client)
            return sent

    async with serving(loop, "protocol") as address:
        assert await asyncio.to_thread(send_until_it_stalls, address) < 64 * MiB


async def test_a_slow_reader_gets_everything(loop: Loop) -> None:
    data = os.urandom(4 * MiB)

    async def slowly(address: Any) -> bool:
        reader, writer = await asyncio.open_connection(*address, limit=64 * KiB)
        writer.write(data)
        writer.write_eof()
        got = bytearray()
        while piece := await reader.read(128 * KiB):
            got += piece
            await asyncio.sleep(0.001)
        writer.close()
        await writer.wait_closed()
        return got == data

    async with serving(loop, "protocol") as address:
        assert await asyncio.to_thread(by_stock_asyncio, slowly(address))


@pytest.mark.skipif(sys.platform == "win32", reason="counts what is allocated by Python alone")
async def test_an_idle_connection_holds_no_buffer(loop: Loop) -> None:
    import tracemalloc

    async with serving(loop, "protocol") as address:
        clients = [socket.create_connection(address, LIMIT) for _ in range(50)]
        await until(lambda: len(loop._proactor.in_flight) >= 51)
        gc.collect()
        tracemalloc.start()
        more = [socket.create_connection(address, LIMIT) for _ in range(100)]
        await until(lambda: len(loop._proactor.in_flight) >= 151)
        await turns()
        for client in more:  # and neither does one that was busy once
            client.sendall(bytes(16 * KiB))
        await asyncio.to_thread(receive, more, 16 * KiB)  # in one go: a thread has memory of its own
        gc.collect()
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        for client in clients + more:
            client.close()
    assert held / 100 < 8 * KiB


def receive(socks: list[socket.socket], count: int) -> None:
    """Receive `count` bytes from each."""
    for sock in socks:
        left = count
        while left > 0:
            left -= len(sock.recv(left))
