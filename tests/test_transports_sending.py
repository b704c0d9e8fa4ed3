"""The stream transport: writing, and flow control of the sending side."""

from __future__ import annotations

import array
import asyncio
import os
import socket
from collections.abc import Callable
from typing import Any

import pytest

import iocp_loop

from .support import LIMIT, MUCH, Recorder, closed, connected, fill, in_thread, read_all, read_exactly, turns, until

Loop = iocp_loop.IocpEventLoop
Pair = tuple[socket.socket, socket.socket]
Reports = list[dict[str, Any]]


# -- writing ---------------------------------------------------------------------------------------


async def test_write_sends_all_kinds_of_buffers_in_order(loop: Loop, pair: Pair) -> None:
    protocol = await connected(loop, pair)
    numbers = array.array("I", range(100))
    for data in (b"bytes ", bytearray(b"bytearray "), memoryview(b"view "), b"", memoryview(numbers), memoryview(b"")):
        protocol.transport.write(data)
    expected = b"bytes bytearray view " + numbers.tobytes()
    assert await asyncio.to_thread(read_exactly, pair[1], len(expected)) == expected
    await closed(protocol)


@pytest.mark.parametrize("queued", [False, True], ids=["sent at once", "queued"])
async def test_write_refuses_what_is_no_buffer(loop: Loop, pair: Pair, queued: bool) -> None:
    protocol = await connected(loop, pair)
    if queued:
        protocol.transport.write(bytes(MUCH))
    for wrong in ("text", 3, None, [b"x"]):
        with pytest.raises(TypeError):
            protocol.transport.write(wrong)
    with pytest.raises(TypeError):
        protocol.transport.writelines(["text"])
    protocol.transport.abort()
    await until(lambda: protocol.finished)


@pytest.mark.parametrize("make", [bytes, bytearray, memoryview], ids=["bytes", "bytearray", "memoryview"])
async def test_a_large_write_arrives_whole(loop: Loop, pair: Pair, make: Callable[[bytes], Any]) -> None:
    protocol = await connected(loop, pair)
    data = os.urandom(MUCH)
    protocol.transport.write(make(data))
    assert protocol.transport.get_write_buffer_size() > 0
    got = bytearray()
    with in_thread(lambda: got.extend(read_exactly(pair[1], MUCH))):
        await until(lambda: protocol.transport.get_write_buffer_size() == 0)
    assert got == data
    await closed(protocol)


async def test_a_large_write_of_numbers_arrives_whole(loop: Loop, pair: Pair) -> None:
    protocol = await connected(loop, pair)
    numbers = array.array("Q", range(MUCH // 8))
    protocol.transport.write(memoryview(numbers))
    protocol.transport.write(memoryview(numbers)[:10])
    got = bytearray()
    expected = numbers.tobytes() + numbers[:10].tobytes()
    with in_thread(lambda: got.extend(read_exactly(pair[1], len(expected)))):
        await until(lambda: protocol.transport.get_write_buffer_size() == 0)
    assert got == expected
    await closed(protocol)


@pytest.mark.parametrize("method", ["write", "writelines"])
async def test_the_caller_may_reuse_its_bytearray(loop: Loop, pair: Pair, method: str) -> None:
    protocol = await connected(loop, pair)
    filled = fill(pair[0])
    buffer = bytearray(b"a" * 1000)
    for letter in b"abc":
        buffer[:] = bytes([letter]) * 1000
        getattr(protocol.transport, method)(buffer if method == "write" else [buffer, memoryview(buffer)[:10]])
        buffer[:] = b"!" * 1000
    buffer.clear()  # not even held
    expected = b"".join(bytes([letter]) * (1000 if method == "write" else 1010) for letter in b"abc")
    got = bytearray()
    with in_thread(lambda: got.extend(read_exactly(pair[1], filled + len(expected)))):
        await until(lambda: protocol.transport.get_write_buffer_size() == 0)
    assert got[filled:] == expected
    await closed(protocol)


async def test_many_small_writes_to_a_slow_peer(loop: Loop, pair: Pair) -> None:
    protocol = await connected(loop, pair)
    filled = fill(pair[0])
    pieces = [b"%d," % number for number in range(20_000)]
    for piece in pieces:
        protocol.transport.write(piece)
    expected = b"".join(pieces)
    assert protocol.transport.get_write_buffer_size() == len(expected)
    got = bytearray()
    with in_thread(lambda: got.extend(read_exactly(pair[1], filled + len(expected)))):
        await until(lambda: protocol.transport.get_write_buffer_size() == 0)
    assert got[filled:] == expected
    await closed(protocol)


async def test_writelines(loop: Loop, pair: Pair) -> None:
    protocol = await connected(loop, pair)
    protocol.transport.writelines([])
    protocol.transport.writelines([b"", bytearray()])
    protocol.transport.writelines([b"a", bytearray(b"b"), memoryview(b"c"), memoryview(array.array("H", [0x6464]))])
    protocol.transport.writelines(piece for piece in (b"e", b"f"))
    assert await asyncio.to_thread(read_exactly, pair[1], 7) == b"abcddef"
    pieces = [b"%d" % (number % 10) for number in range(5000)]  # more than one call takes
    protocol.transport.writelines(pieces)
    assert await asyncio.to_thread(read_exactly, pair[1], 5000) == b"".join(pieces)
    pieces = [os.urandom(1 << 20) for _ in range(24)]
    protocol.transport.writelines(pieces)
    protocol.transport.writelines([b"one", b"more"])
    got = bytearray()
    with in_thread(lambda: got.extend(read_exactly(pair[1], (24 << 20) + 7))):
        await until(lambda: protocol.transport.get_write_buffer_size() == 0)
    assert got == b"".join(pieces) + b"onemore"
    await closed(protocol)


async def test_small_writes_are_not_delayed(loop: Loop, pair: Pair) -> None:
    protocol = await connected(loop, pair)
    sock = protocol.transport.get_extra_info("socket")
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    await closed(protocol)


# -- flow control of the sending side --------------------------------------------------------------


async def test_the_protocol_is_paused_above_the_high_mark_and_resumed_at_the_low_one(loop: Loop, pair: Pair) -> None:
    class Watching(Recorder):
        def pause_writing(self) -> None:
            super().pause_writing()
            assert self.transport.get_write_buffer_size() > 64 * 1024

        def resume_writing(self) -> None:
            super().resume_writing()
            assert self.transport.get_write_buffer_size() <= 16 * 1024

    protocol = await connected(loop, pair, Watching())
    assert protocol.transport.get_write_buffer_limits() == (16 * 1024, 64 * 1024)
    filled = fill(pair[0])
    protocol.transport.write(bytes(60 * 1024))
    assert "pause_writing" not in protocol.calls
    protocol.transport.write(bytes(10 * 1024))
    assert protocol.calls[-1] == "pause_writing"
    protocol.transport.write(bytes(MUCH))
    assert protocol.calls.count("pause_writing") == 1
    with in_thread(lambda: read_exactly(pair[1], filled + MUCH + 70 * 1024)):
        await until(lambda: "resume_writing" in protocol.calls)
    assert protocol.calls.count("resume_writing") == 1
    await closed(protocol)


async def test_limits(loop: Loop, pair: Pair) -> None:
    protocol = await connected(loop, pair)
    transport = protocol.transport
    transport.set_write_buffer_limits(high=1000)
    assert transport.get_write_buffer_limits() == (250, 1000)
    transport.set_write_buffer_limits(low=100)
    assert transport.get_write_buffer_limits() == (100, 400)
    transport.set_write_buffer_limits(high=0)
    assert transport.get_write_buffer_limits() == (0, 0)
    for wrong in ({"high": 10, "low": 11}, {"high": -1}, {"low": -1}):
        with pytest.raises(ValueError, match="low"):
            transport.set_write_buffer_limits(**wrong)
    assert "pause_writing" not in protocol.calls  # nothing is not more than nothing
    fill(pair[0])
    transport.write(b"x")
    assert protocol.calls[-1] == "pause_writing"
    transport.abort()
    await until(lambda: protocol.finished)


async def test_new_limits_pause_at_once(loop: Loop, pair: Pair) -> None:
    protocol = await connected(loop, pair)
    fill(pair[0])
    protocol.transport.write(bytes(1000))
    assert "pause_writing" not in protocol.calls
    protocol.transport.set_write_buffer_limits(high=999)
    assert "pause_writing" in protocol.calls
    protocol.transport.abort()
    await until(lambda: protocol.finished)


async def test_writing_in_resume_writing(loop: Loop, pair: Pair) -> None:
    class Eager(Recorder):
        written = 0
        rounds = 0

        def write_until_paused(self) -> None:
            while self.calls[-1] != "pause_writing":  # a quick peer may take megabytes at once
                self.transport.write(bytes(1 << 20))
                self.written += 1 << 20

        def resume_writing(self) -> None:
            super().resume_writing()
            self.rounds += 1
            if self.rounds < 5:
                self.write_until_paused()
            else:
                self.transport.close()

    protocol = await connected(loop, pair, Eager())
    protocol.write_until_paused()
    got: list[bytes] = []
    with in_thread(lambda: got.append(read_all(pair[1]))):
        await until(lambda: protocol.finished)
    assert len(got[0]) == protocol.written


async def test_drain_of_a_stream_writer_waits_for_the_peer(loop: Loop, pair: Pair) -> None:
    reader, writer = await asyncio.open_connection(sock=pair[0])
    writer.write(bytes(MUCH))
    drain = asyncio.create_task(writer.drain())
    await asyncio.sleep(0.02)
    assert not drain.done()
    with in_thread(lambda: read_exactly(pair[1], MUCH)):
        await drain
    writer.close()
    await writer.wait_closed()
    assert await reader.read() == b""


async def test_an_abort_frees_those_who_wait_in_drain(loop: Loop, pair: Pair) -> None:
    _, writer = await asyncio.open_connection(sock=pair[0])
    writer.write(bytes(MUCH))
    drain = asyncio.create_task(writer.drain())
    await turns()
    writer.transport.abort()
    await asyncio.wait_for(drain, LIMIT)
    await writer.wait_closed()
