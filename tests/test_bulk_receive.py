"""Large messages, and protocols that lend the buffer: paused, closed or failing at every point on the way."""

from __future__ import annotations

import array
import asyncio
import ctypes
import socket
import sys
import time
from typing import Any

import pytest

import iocp_loop

from .support import LIMIT, Recorder, in_thread, read_exactly, reset, turns, until

Loop = iocp_loop.IocpEventLoop
Pair = tuple[socket.socket, socket.socket]
Reports = list[dict[str, Any]]

#: Enough for a stream to go over to bulk, and to come in 16 pieces of 256 KiB or more of less.
LARGE = bytes(range(256)) * (1 << 14)


class Lender(asyncio.BufferedProtocol):
    """Lends `memory`, joins what it gets, and has a method called at the point named `at`."""

    def __init__(self, memory: Any, at: str = "", action: Any = None) -> None:
        self.memory = memory
        self.at = at
        self.action = action
        self.data = bytearray()
        self.hints: list[int] = []
        self.lost: list[BaseException | None] = []
        self.ended = False
        self.transport: asyncio.Transport = None  # type: ignore[assignment]  # set by connection_made

    def come_to(self, point: str) -> None:
        if self.at == point and self.action is not None:
            self.action(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # stream transports only

    def get_buffer(self, sizehint: int) -> Any:
        self.hints.append(sizehint)
        self.come_to("get_buffer")
        return self.memory

    def buffer_updated(self, nbytes: int) -> None:
        assert 0 < nbytes <= memoryview(self.memory).nbytes
        self.data += memoryview(self.memory).cast("B")[:nbytes]
        self.come_to("buffer_updated")

    def eof_received(self) -> bool:
        self.ended = True
        return False

    def connection_lost(self, exc: BaseException | None) -> None:
        self.lost.append(exc)


class Counter(Recorder):
    """A protocol that does something at its nth piece."""

    def __init__(self, number: int, action: Any) -> None:
        super().__init__()
        self.number = number
        self.action = action
        self.pieces = 0

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.pieces += 1
        if self.pieces == self.number:
            self.action(self)


async def connect(loop: Loop, pair: Pair, protocol: Any) -> Any:
    transport, _ = await loop.create_connection(lambda: protocol, sock=pair[0])
    return transport


def pause_for_a_while(protocol: Any) -> None:
    protocol.transport.pause_reading()
    asyncio.get_running_loop().call_later(0.02, protocol.transport.resume_reading)


def pause_and_resume(protocol: Any) -> None:
    protocol.transport.pause_reading()
    protocol.transport.resume_reading()


def close(protocol: Any) -> None:
    protocol.transport.close()


def abort(protocol: Any) -> None:
    protocol.transport.abort()


def fail(protocol: Any) -> None:
    raise ValueError("on purpose")


def leave(protocol: Any) -> None:
    sys.exit(3)


async def become_bulk(pair: Pair, protocol: Any) -> None:
    """Send large pieces until the stream receives in bulk, and wait for all of them."""
    for _ in range(8):
        before = len(protocol.data)
        with in_thread(lambda: pair[1].sendall(LARGE[:60_000])):
            await until(lambda: len(protocol.data) == before + 60_000)  # noqa: B023 - awaited here


@pytest.mark.parametrize("action", [pause_for_a_while, pause_and_resume], ids=["pause", "pause and resume"])
@pytest.mark.parametrize("number", [1, 2, 5, 6, 12])
async def test_paused_within_data_received(loop: Loop, pair: Pair, number: int, action: Any) -> None:
    protocol = Counter(number, action)
    transport = await connect(loop, pair, protocol)
    with in_thread(lambda: pair[1].sendall(LARGE)):
        await until(lambda: len(protocol.data) == len(LARGE))
    assert protocol.data == LARGE
    transport.close()
    await until(lambda: protocol.finished)


@pytest.mark.parametrize("action", [close, abort], ids=["close", "abort"])
@pytest.mark.parametrize("number", [1, 6, 12])
async def test_closed_within_data_received(loop: Loop, pair: Pair, number: int, action: Any) -> None:
    protocol = Counter(number, action)
    await connect(loop, pair, protocol)
    with in_thread(lambda: send_in_pieces(pair[1], protocol)):
        await until(lambda: protocol.finished)
    assert protocol.pieces == number
    assert protocol.data == LARGE[: len(protocol.data)]


def send_what_goes(sock: socket.socket) -> None:
    try:
        sock.sendall(LARGE)
    except OSError:
        pass  # the other side has closed


def send_in_pieces(sock: socket.socket, protocol: Any) -> None:
    """Send LARGE so that it comes in many pieces, however much a driver receives at once; or until the other closes."""
    size = 60_000
    try:
        for start in range(0, len(LARGE), size):
            sock.sendall(LARGE[start : start + size])
            deadline = time.monotonic() + LIMIT
            while len(protocol.data) < min(start + size, len(LARGE)) and not protocol.finished:
                assert time.monotonic() < deadline, "it was not received in time"
                time.sleep(0.0005)
    except OSError:
        pass  # the other side has closed


@pytest.mark.parametrize("number", [1, 6, 12])
async def test_an_exception_within_data_received(loop: Loop, pair: Pair, reports: Reports, number: int) -> None:
    protocol = Counter(number, fail)
    await connect(loop, pair, protocol)
    with in_thread(lambda: send_in_pieces(pair[1], protocol)):
        await until(lambda: protocol.finished)
    assert isinstance(protocol.lost, ValueError)
    (report,) = reports
    reports.clear()
    assert report["message"] == "Fatal error: protocol.data_received() call failed."
    assert protocol.pieces == number


@pytest.mark.parametrize("number", [1, 6, 12])
def test_system_exit_within_data_received_loses_nothing(driver: str, pair: Pair, number: int) -> None:
    loop = iocp_loop.new_event_loop(driver)
    protocol = Counter(number, leave)
    loop.run_until_complete(connect(loop, pair, protocol))
    with in_thread(lambda: send_in_pieces(pair[1], protocol)):
        with pytest.raises(SystemExit):
            loop.run_forever()
        loop.run_until_complete(until(lambda: len(protocol.data) == len(LARGE)))
    assert protocol.data == LARGE
    protocol.transport.abort()
    loop.run_until_complete(turns())
    loop.close()


async def test_a_reset_in_bulk_is_told(loop: Loop, pair: Pair) -> None:
    """The recv that tells of it takes it away; another would say that the peer has ended in peace."""
    protocol = Recorder()
    await connect(loop, pair, protocol)
    await become_bulk(pair, protocol)
    reset(pair[1])
    await until(lambda: protocol.finished)
    assert isinstance(protocol.lost, ConnectionResetError)
    assert "eof_received" not in protocol.calls


async def test_the_end_in_bulk(loop: Loop, pair: Pair) -> None:
    protocol = Recorder()
    transport = await connect(loop, pair, protocol)
    await become_bulk(pair, protocol)
    pair[1].sendall(b"last")
    pair[1].shutdown(socket.SHUT_WR)
    await until(lambda: "eof_received" in protocol.calls)
    assert protocol.data[-4:] == b"last"
    transport.write(b"still here")
    assert await asyncio.to_thread(read_exactly, pair[1], 10) == b"still here"
    transport.close()
    await until(lambda: protocol.finished)


async def test_from_small_to_large_and_back(loop: Loop, pair: Pair) -> None:
    protocol = Recorder()
    transport = await connect(loop, pair, protocol)
    for _ in range(3):
        del protocol.data[:]
        await become_bulk(pair, protocol)
        for number in range(10):
            pair[1].sendall(b"%d" % number)
            await until(lambda: protocol.data[480_000:].endswith(b"%d" % number))  # noqa: B023 - awaited here
        assert protocol.data == LARGE[:60_000] * 8 + b"0123456789"
    transport.close()
    await until(lambda: protocol.finished)


# --------------------------------------------------------------------------------------------------
# Buffers that are lent
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "memory",
    [
        bytearray(1),
        bytearray(7),
        bytearray(300_000),
        memoryview(bytearray(5000))[1:4000],
        array.array("i", [0] * 1000),
        memoryview(bytearray(4096)).cast("B", (64, 64)),
        memoryview(bytearray(4096)).cast("h", (32, 64)),
        (ctypes.c_char * 1000)(),
    ],
    ids=["1 byte", "7 bytes", "large", "part", "array", "two dimensions", "shorts", "ctypes"],
)
async def test_buffers_of_every_kind(loop: Loop, pair: Pair, memory: Any) -> None:
    protocol = Lender(memory)
    await connect(loop, pair, protocol)
    size = min(len(LARGE), 2000 * memoryview(memory).nbytes)
    with in_thread(lambda: (pair[1].sendall(LARGE[:size]), pair[1].shutdown(socket.SHUT_WR))):
        await until(lambda: protocol.lost)
    assert protocol.data == LARGE[:size]
    assert protocol.ended
    assert protocol.lost == [None]
    assert all(hint == -1 or hint > 0 for hint in protocol.hints)


@pytest.mark.parametrize(
    "memory",
    [b"read-only", bytearray(), None, 42, memoryview(bytearray(100))[::2], memoryview(b"read-only")],
    ids=["bytes", "empty", "None", "int", "every other byte", "view of bytes"],
)
@pytest.mark.parametrize("size", [10, 60_000])
async def test_buffers_that_are_none(loop: Loop, pair: Pair, reports: Reports, memory: Any, size: int) -> None:
    protocol = Lender(bytearray(100_000))
    await connect(loop, pair, protocol)
    if size > 1000:
        await become_bulk(pair, protocol)
    protocol.memory = memory
    pair[1].sendall(b"x" * size)
    await until(lambda: protocol.lost)
    assert isinstance(protocol.lost[0], (TypeError, ValueError, RuntimeError, BufferError))
    (report,) = reports
    reports.clear()
    assert report["message"] == "Fatal error: protocol.get_buffer() call failed."


@pytest.mark.parametrize("bulk", [False, True], ids=["", "bulk"])
@pytest.mark.parametrize("at", ["get_buffer", "buffer_updated"])
@pytest.mark.parametrize("action", [pause_for_a_while, pause_and_resume], ids=["pause", "pause and resume"])
async def test_paused_on_the_way(loop: Loop, pair: Pair, at: str, action: Any, bulk: bool) -> None:
    protocol = Lender(bytearray(20_000))
    transport = await connect(loop, pair, protocol)
    if bulk:
        await become_bulk(pair, protocol)
    before = len(protocol.data)
    protocol.at, protocol.action = at, action
    with in_thread(lambda: pair[1].sendall(LARGE[:200_000])):
        await until(lambda: len(protocol.data) == before + 200_000)
    assert protocol.data[before:] == LARGE[:200_000]
    protocol.action = None
    transport.close()
    await until(lambda: protocol.lost)


@pytest.mark.parametrize("bulk", [False, True], ids=["", "bulk"])
@pytest.mark.parametrize("at", ["get_buffer", "buffer_updated"])
@pytest.mark.parametrize("action", [close, abort], ids=["close", "abort"])
async def test_closed_on_the_way(loop: Loop, pair: Pair, at: str, action: Any, bulk: bool) -> None:
    protocol = Lender(bytearray(20_000))
    await connect(loop, pair, protocol)
    if bulk:
        await become_bulk(pair, protocol)
    before = len(protocol.data)
    protocol.at, protocol.action = at, action
    with in_thread(lambda: send_what_goes(pair[1])):
        await until(lambda: protocol.lost)
    assert protocol.lost == [None]
    assert len(protocol.data) - before <= 20_000


@pytest.mark.parametrize("bulk", [False, True], ids=["", "bulk"])
@pytest.mark.parametrize("at", ["get_buffer", "buffer_updated"])
async def test_failed_on_the_way(loop: Loop, pair: Pair, reports: Reports, at: str, bulk: bool) -> None:
    protocol = Lender(bytearray(20_000))
    await connect(loop, pair, protocol)
    if bulk:
        await become_bulk(pair, protocol)
    protocol.at, protocol.action = at, fail
    with in_thread(lambda: send_what_goes(pair[1])):
        await until(lambda: protocol.lost)
    assert isinstance(protocol.lost[0], ValueError)
    (report,) = reports
    reports.clear()
    assert report["message"] == f"Fatal error: protocol.{at}() call failed."


@pytest.mark.parametrize("bulk", [False, True], ids=["", "bulk"])
@pytest.mark.parametrize("at", ["get_buffer", "buffer_updated"])
def test_system_exit_on_the_way(driver: str, pair: Pair, at: str, bulk: bool) -> None:
    loop = iocp_loop.new_event_loop(driver)
    protocol = Lender(bytearray(20_000))
    loop.run_until_complete(connect(loop, pair, protocol))
    if bulk:
        loop.run_until_complete(become_bulk(pair, protocol))
    protocol.at, protocol.action = at, leave
    pair[1].sendall(b"first")
    with pytest.raises(SystemExit):
        loop.run_forever()
    protocol.action = None
    pair[1].sendall(b"second")
    loop.run_until_complete(until(lambda: protocol.data.endswith(b"second")))
    protocol.transport.abort()
    loop.run_until_complete(turns())
    loop.close()


@pytest.mark.parametrize("at", ["get_buffer", "buffer_updated"])
def test_system_exit_with_more_to_come_loses_nothing(driver: str, pair: Pair, at: str) -> None:
    loop = iocp_loop.new_event_loop(driver)
    protocol = Lender(bytearray(3))
    loop.run_until_complete(connect(loop, pair, protocol))
    protocol.at, protocol.action = at, leave
    pair[1].sendall(b"in pieces of three, ")
    for _ in range(3):
        with pytest.raises(SystemExit):
            loop.run_forever()
    protocol.action = None
    pair[1].sendall(b"all of them")
    loop.run_until_complete(until(lambda: len(protocol.data) == 31))
    assert protocol.data == b"in pieces of three, all of them"
    protocol.transport.abort()
    loop.run_until_complete(turns())
    loop.close()


def test_system_exit_loses_nothing_of_what_was_held(driver: str, pair: Pair) -> None:
    loop = iocp_loop.new_event_loop(driver)
    protocol = Counter(1, leave)
    transport = loop.run_until_complete(connect(loop, pair, protocol))
    loop.run_until_complete(turns())
    transport.pause_reading()
    for piece in b"one", b"two", b"three":
        pair[1].sendall(piece)
        loop.run_until_complete(turns())
    transport.resume_reading()
    with pytest.raises(SystemExit):
        loop.run_forever()
    loop.run_until_complete(until(lambda: protocol.data == b"onetwothree"))
    transport.abort()
    loop.run_until_complete(turns())
    loop.close()


@pytest.mark.parametrize("at", ["get_buffer", "buffer_updated"])
async def test_another_protocol_is_set_on_the_way(loop: Loop, pair: Pair, at: str) -> None:
    """The method that is being called loses its last reference."""
    memory = bytearray(20_000)
    successor = Lender(memory)

    def change(protocol: Lender) -> None:
        protocol.at = ""
        protocol.transport.set_protocol(successor)

    protocol = Lender(memory)
    transport = await connect(loop, pair, protocol)
    await become_bulk(pair, protocol)
    protocol.at, protocol.action = at, change
    pair[1].sendall(b"a" * 100)
    await until(lambda: protocol.at == "")
    pair[1].sendall(b"b" * 100)
    await until(lambda: successor.data.endswith(b"b" * 100))
    assert (protocol.data[-100:] == b"a" * 100) == (at == "buffer_updated")
    transport.close()
    await until(lambda: successor.lost)
