"""The stream transport: protocols that bring buffers, and pauses of the receiving side."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Any

import pytest

import iocp_loop

from .support import MUCH, Recorder, closed, connected, in_thread, send_in_pieces, turns, until

Loop = iocp_loop.IocpEventLoop
Pair = tuple[socket.socket, socket.socket]
Reports = list[dict[str, Any]]


# -- BufferedProtocol ------------------------------------------------------------------------------


class Buffered(asyncio.BufferedProtocol):
    """Receives into a small buffer of its own; its calls are those of a Recorder."""

    def __init__(self, size: int = 100) -> None:
        self.recorder = Recorder()
        self.buffer = bytearray(size)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.recorder.connection_made(transport)

    def get_buffer(self, sizehint: int) -> bytearray:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        assert type(nbytes) is int
        assert nbytes > 0
        self.recorder.data_received(bytes(self.buffer[:nbytes]))

    def eof_received(self) -> bool:
        return self.recorder.eof_received()

    def connection_lost(self, exc: BaseException | None) -> None:
        self.recorder.connection_lost(exc)


async def test_a_buffered_protocol_gets_everything_in_order(loop: Loop, pair: Pair) -> None:
    data = os.urandom(300_000)
    protocol = await connected(loop, pair, Buffered())
    with in_thread(lambda: (pair[1].sendall(data), pair[1].shutdown(socket.SHUT_WR))[0]):
        await until(lambda: "eof_received" in protocol.recorder.calls)
    assert protocol.recorder.data == data
    await closed(protocol.recorder)
    assert protocol.recorder.calls == ["connection_made", "data_received", "eof_received", "connection_lost"]


async def test_a_buffered_protocol_pauses_without_loss(loop: Loop, pair: Pair) -> None:
    class Stuttering(Buffered):
        def buffer_updated(self, nbytes: int) -> None:
            assert not paused
            super().buffer_updated(nbytes)
            self.recorder.transport.pause_reading()
            paused.append(True)
            loop.call_soon(self.go_on)

        def go_on(self) -> None:
            paused.clear()
            self.recorder.transport.resume_reading()

    paused: list[bool] = []
    data = os.urandom(20_000)
    protocol = await connected(loop, pair, Stuttering(90))
    pair[1].sendall(data)
    await until(lambda: len(protocol.recorder.data) == len(data))
    assert protocol.recorder.data == data
    await closed(protocol.recorder)


@pytest.mark.parametrize("wrong", ["raise", "empty", "read-only", "no buffer"])
async def test_a_buffered_protocol_that_gives_no_buffer(loop: Loop, pair: Pair, reports: Reports, wrong: str) -> None:
    class Wrong(Buffered):
        def get_buffer(self, sizehint: int) -> Any:
            if wrong == "raise":
                raise ZeroDivisionError
            return {"empty": bytearray(), "read-only": b"abc", "no buffer": "abc"}[wrong]

    protocol = await connected(loop, pair, Wrong())
    pair[1].sendall(b"x")
    await until(lambda: protocol.recorder.finished)
    expected = {"raise": ZeroDivisionError, "empty": RuntimeError, "read-only": TypeError, "no buffer": TypeError}
    assert isinstance(reports.pop()["exception"], expected[wrong])
    assert isinstance(protocol.recorder.lost, expected[wrong])


async def test_buffer_updated_raises(loop: Loop, pair: Pair, reports: Reports) -> None:
    class Wrong(Buffered):
        def buffer_updated(self, nbytes: int) -> None:
            raise ZeroDivisionError

    protocol = await connected(loop, pair, Wrong())
    pair[1].sendall(b"x")
    await until(lambda: protocol.recorder.finished)
    assert isinstance(reports.pop()["exception"], ZeroDivisionError)


@pytest.mark.parametrize("first", [Recorder, Buffered])
async def test_set_protocol_switches_from_one_kind_to_the_other(loop: Loop, pair: Pair, first: Any) -> None:
    protocol = await connected(loop, pair, first())
    one = protocol if first is Recorder else protocol.recorder
    pair[1].sendall(b"one")
    await until(lambda: one.data)
    second: Any = Buffered() if first is Recorder else Recorder()
    two = second.recorder if first is Recorder else second
    two.calls.append("connection_made")
    transport = one.transport
    transport.set_protocol(second)
    assert transport.get_protocol() is second
    pair[1].sendall(b"two")
    await until(lambda: two.data)
    assert (one.data, two.data) == (b"one", b"two")
    transport.close()
    await until(lambda: two.finished)
    assert not one.finished


async def test_set_protocol_while_paused_gives_what_is_held_to_the_new_one(loop: Loop, pair: Pair) -> None:
    old = await connected(loop, pair)
    old.transport.pause_reading()
    pair[1].sendall(b"for the new one")
    await asyncio.sleep(0.02)
    new = Buffered(4)
    new.recorder.calls.append("connection_made")
    old.transport.set_protocol(new)
    old.transport.resume_reading()
    await until(lambda: new.recorder.data == b"for the new one")
    assert not old.data
    old.transport.close()
    await until(lambda: new.recorder.finished)


# -- pausing the receiving side --------------------------------------------------------------------


async def test_nothing_is_received_while_paused_and_nothing_is_lost(loop: Loop, pair: Pair) -> None:
    protocol = await connected(loop, pair)
    transport = protocol.transport
    assert transport.is_reading()
    pair[1].sendall(b"before ")
    await until(lambda: protocol.data)
    transport.pause_reading()
    transport.pause_reading()
    assert not transport.is_reading()
    pair[1].sendall(b"during ")
    await asyncio.sleep(0.03)
    assert protocol.data == b"before "
    transport.resume_reading()
    transport.resume_reading()
    assert transport.is_reading()
    pair[1].sendall(b"after")
    await until(lambda: protocol.data == b"before during after")
    await closed(protocol)
    assert not transport.is_reading()


async def test_a_pause_reaches_the_peer(loop: Loop, pair: Pair) -> None:
    protocol = await connected(loop, pair)
    protocol.transport.pause_reading()
    data = os.urandom(MUCH)
    with in_thread(lambda: send_in_pieces(pair[1], data)) as sender:
        for _ in range(20):
            await asyncio.sleep(0.01)
        assert sender.is_alive()  # or somebody holds 32 MiB for us
        assert not protocol.data
        protocol.transport.resume_reading()
        await until(lambda: len(protocol.data) == len(data))
    assert protocol.data == data
    await closed(protocol)


async def test_pausing_in_every_data_received(loop: Loop, pair: Pair) -> None:
    class Stuttering(Recorder):
        paused = False

        def data_received(self, data: bytes) -> None:
            assert not self.paused
            super().data_received(data)
            self.paused = True
            self.transport.pause_reading()
            loop.call_soon(self.go_on)

        def go_on(self) -> None:
            self.paused = False
            self.transport.resume_reading()

    data = os.urandom(3_000_000)
    protocol = await connected(loop, pair, Stuttering())
    with in_thread(lambda: (pair[1].sendall(data), pair[1].shutdown(socket.SHUT_WR))[0]):
        await until(lambda: "eof_received" in protocol.calls)
    assert protocol.data == data
    await closed(protocol)


async def test_paused_in_connection_made(loop: Loop, pair: Pair) -> None:
    class Later(Recorder):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            self.transport.pause_reading()

    pair[1].sendall(b"hello")
    protocol = await connected(loop, pair, Later())
    await asyncio.sleep(0.02)
    assert not protocol.data
    protocol.transport.resume_reading()
    await until(lambda: protocol.data == b"hello")
    await closed(protocol)


async def test_the_end_during_a_pause_comes_after_the_data(loop: Loop, pair: Pair) -> None:
    protocol = await connected(loop, pair)
    protocol.transport.pause_reading()
    pair[1].sendall(b"last words")
    pair[1].close()
    await asyncio.sleep(0.03)
    assert protocol.calls == ["connection_made"]
    protocol.transport.resume_reading()
    await until(lambda: "eof_received" in protocol.calls)
    assert protocol.data == b"last words"
    protocol.transport.pause_reading()
    protocol.transport.resume_reading()
    await closed(protocol)
    assert protocol.calls == ["connection_made", "data_received", "eof_received", "connection_lost"]


@pytest.mark.parametrize("method", ["close", "abort"])
async def test_close_while_paused_with_data_held(loop: Loop, pair: Pair, method: str) -> None:
    protocol = await connected(loop, pair)
    protocol.transport.pause_reading()
    pair[1].sendall(b"never delivered")
    await asyncio.sleep(0.02)
    getattr(protocol.transport, method)()
    protocol.transport.resume_reading()
    await until(lambda: protocol.finished)
    await turns()
    assert not protocol.data


async def test_pause_and_resume_after_the_end_are_nothing(loop: Loop, pair: Pair) -> None:
    protocol = await connected(loop, pair)
    await closed(protocol)
    protocol.transport.pause_reading()
    protocol.transport.resume_reading()
    assert not protocol.transport.is_reading()
