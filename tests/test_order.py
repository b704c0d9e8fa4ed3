"""First come, first served: the order that a driver keeps for each handle and direction (ports/driver.py)."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from iocp_loop import CompletionPort, IocpEventLoop
from iocp_loop import operations as ops

from .rig import Pair, Rig
from .support import LIMIT, WINDOWS, fill, in_thread, udp_socket

Loop = IocpEventLoop


@pytest.fixture
def port(driver: str, no_leak: None) -> Iterator[CompletionPort]:
    with CompletionPort(driver=driver) as port:
        yield port


def test_receives_are_served_in_the_order_of_their_submission(rig: Rig, pair: Pair) -> None:
    for _ in range(30):
        receives = [rig.submit(ops.Receive(pair[0], 1)) for _ in range(4)]
        rig.turn()
        pair[1].send(b"abcd")
        rig.until(lambda: not rig.driver.in_flight)
        assert [rig.value(op) for op in receives] == [b"a", b"b", b"c", b"d"]
        assert [op for op, _, _ in rig.delivered[-4:]] == receives


def test_receives_of_several_kinds_stand_in_one_line(rig: Rig, pair: Pair) -> None:
    buffer = bytearray(1)
    first, second, third = ops.Receive(pair[0], 1), ops.ReceiveInto(pair[0], buffer), ops.Receive(pair[0], 1)
    for op in (first, second, third):
        rig.submit(op)
    pair[1].send(b"abc")
    assert (rig.value(first), rig.value(second), bytes(buffer), rig.value(third)) == (b"a", 1, b"b", b"c")


def test_who_is_cancelled_leaves_the_line(rig: Rig, pair: Pair) -> None:
    receives = [rig.submit(ops.Receive(pair[0], 1)) for _ in range(4)]
    rig.turn()
    rig.end(receives[1])
    pair[1].send(b"abc")
    assert [rig.value(op) for op in (receives[0], receives[2], receives[3])] == [b"a", b"b", b"c"]


def test_messages_sent_side_by_side_are_not_torn(rig: Rig, pair: Pair) -> None:
    size = 300_000
    pair[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 20_000)
    sends = [rig.submit(ops.SendAll(pair[0], [letter * size])) for letter in (b"a", b"b", b"c")]
    rig.submit(ops.Send(pair[0], b"d"))
    got = bytearray()

    def read() -> None:
        while len(got) < 3 * size + 1:
            got.extend(pair[1].recv(1 << 16))

    with in_thread(read):
        rig.until(lambda: not rig.driver.in_flight)
    assert got == b"a" * size + b"b" * size + b"c" * size + b"d"
    assert [op for op, _, _ in rig.delivered[:3]] == sends


def test_datagrams_are_received_in_the_order_of_their_submission(rig: Rig) -> None:
    with udp_socket() as ours, udp_socket() as peer:
        receives = [rig.submit(ops.ReceiveFrom(ours, 10)) for _ in range(4)]
        rig.turn()
        for number in range(4):
            peer.sendto(b"%d" % number, ours.getsockname())
        assert [rig.value(op)[0] for op in receives] == [b"0", b"1", b"2", b"3"]


def test_connections_are_accepted_in_the_order_of_their_submission(rig: Rig, listener: socket.socket) -> None:
    accepts = [rig.submit(ops.Accept(listener)) for _ in range(4)]
    rig.turn()
    peers = [socket.create_connection(listener.getsockname(), LIMIT) for _ in range(4)]
    connections = [rig.value(op)[0] for op in accepts]
    assert [sock.getpeername() for sock in connections] == [sock.getsockname() for sock in peers]
    for sock in (*connections, *peers):
        sock.close()


@pytest.mark.skipif(WINDOWS, reason="a C runtime descriptor is no overlapped handle; test_iocp.py has files and pipes")
@pytest.mark.parametrize("blocking", [True, False])
def test_reads_of_a_pipe_and_of_what_stands_in_a_file(rig: Rig, tmp_path: Path, blocking: bool) -> None:
    readable, writable = os.pipe()
    os.set_blocking(readable, blocking)
    file = os.open(tmp_path / "letters", os.O_RDWR | os.O_CREAT)
    os.write(file, b"abcd")
    os.lseek(file, 0, os.SEEK_SET)
    try:
        for fd in (readable, file):
            reads = [rig.submit(ops.Read(fd, 1)) for _ in range(4)]
            rig.turn()
            if fd == readable:
                os.write(writable, b"abcd")
            assert [rig.value(op) for op in reads] == [b"a", b"b", b"c", b"d"]
        writes = [rig.submit(ops.Write(file, b"%d" % number)) for number in range(4)]
        rig.until(lambda: not any(op.in_flight for op in writes))
        assert os.pread(file, 10, 0) == b"abcd0123"
    finally:
        for fd in (readable, writable, file):
            os.close(fd)


def test_a_port_keeps_the_order(port: CompletionPort, pair: Pair) -> None:
    port.register(pair[0])
    for _ in range(30):
        receives: list[Any] = [ops.Receive(pair[0], 1) for _ in range(4)]
        for op in receives:
            port.submit(op)
        pair[1].send(b"abcd")
        completions = [port.get(LIMIT) for _ in range(4)]
        assert [(c.operation, c.value) for c in completions if c] == list(
            zip(receives, [b"a", b"b", b"c", b"d"], strict=True)
        )


# -- the methods of the loop: they try at once, but not past who waits -----------------------------


async def test_sock_sendall_side_by_side(loop: Loop, pair: Pair) -> None:
    size = 300_000
    pair[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 20_000)
    got = bytearray()

    def read() -> None:
        while len(got) < 3 * size:
            got.extend(pair[1].recv(1 << 16))

    with in_thread(read):
        await asyncio.gather(*(loop.sock_sendall(pair[0], letter * size) for letter in (b"a", b"b", b"c")))
    assert got == b"a" * size + b"b" * size + b"c" * size


async def test_sock_recv_side_by_side(loop: Loop, pair: Pair) -> None:
    for _ in range(30):
        tasks = [asyncio.ensure_future(loop.sock_recv(pair[0], 1)) for _ in range(4)]
        await asyncio.sleep(0)
        pair[1].send(b"abcd")
        assert await asyncio.gather(*tasks) == [b"a", b"b", b"c", b"d"]


@pytest.mark.parametrize("call", ["sock_recv", "sock_recv_into"])
async def test_who_asks_later_does_not_overtake_who_waits(loop: Loop, pair: Pair, call: str) -> None:
    waiting = asyncio.ensure_future(loop.sock_recv(pair[0], 1))
    await asyncio.sleep(0)
    pair[1].send(b"ab")
    buffer = bytearray(1)
    later: Any = loop.sock_recv(pair[0], 1) if call == "sock_recv" else loop.sock_recv_into(pair[0], buffer)
    second = await later
    assert await waiting == b"a"
    assert (second if call == "sock_recv" else bytes(buffer)) == b"b"


async def test_a_send_does_not_overtake_one_that_waits(loop: Loop, pair: Pair) -> None:
    filled = fill(pair[0])
    waiting = asyncio.ensure_future(loop.sock_sendall(pair[0], b"first"))
    await asyncio.sleep(0)
    while filled:  # there is room now, and nobody has told the loop yet
        filled -= len(pair[1].recv(min(filled, 1 << 16)))
    await loop.sock_sendall(pair[0], b"second")
    await waiting
    got = b""
    while len(got) < 11:
        got += await asyncio.to_thread(pair[1].recv, 100)
    assert got == b"firstsecond"


async def test_sock_accept_side_by_side(loop: Loop, listener: socket.socket) -> None:
    waiting = asyncio.ensure_future(loop.sock_accept(listener))
    await asyncio.sleep(0)
    peers = [socket.create_connection(listener.getsockname(), LIMIT) for _ in range(2)]
    second, _ = await loop.sock_accept(listener)
    first, _ = await waiting
    assert [first.getpeername(), second.getpeername()] == [sock.getsockname() for sock in peers]
    for sock in (first, second, *peers):
        sock.close()
