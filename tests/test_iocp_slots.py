"""Driver iocp: slots, memory that is lent to small receives."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

if sys.platform != "win32":
    pytest.skip("I/O completion ports exist on Windows only", allow_module_level=True)

import iocp_loop
from iocp_loop import operations as ops
from iocp_loop.ports.iocp import receiving as iocp_receiving
from iocp_loop.ports.iocp.binding import SlotPool, ffi
from iocp_loop.ports.iocp.driver import IocpDriver
from iocp_loop.ports.iocp.receiving import SLOT_SIZE

from .rig import Rig
from .support import LIMIT, reset
from .windows_rig import UNDONE, leave_undone

Loop = iocp_loop.IocpEventLoop
Pair = tuple[socket.socket, socket.socket]


class Receiving:
    """A receive stream on a driver of its own, and what it has got: bytes, and errors by their numbers."""

    def __init__(self, sock: socket.socket, first: bytes, peer: socket.socket) -> None:
        self.driver = IocpDriver()
        self.got: list[Any] = []
        self.op = ops.ReceiveStream(sock)
        self.op.complete = self.complete
        self.driver.submit(self.op)
        assert self.op.driver_data.slot is None  # who says nothing is lent nothing
        peer.sendall(first)
        self.turn()
        assert self.take() == [first]

    def complete(self, value: Any, error: BaseException | None) -> None:
        self.got.append(error.errno if error is not None else value)

    def turn(self) -> None:
        self.driver.wait(LIMIT)
        self.driver.dispatch()

    def take(self) -> list[Any]:
        got, self.got = self.got, []
        return got


@pytest.fixture
def small(pair: Pair) -> Iterator[Receiving]:
    """One that has been lent a slot, as its first data were few."""
    receiving = Receiving(pair[0], b"first", pair[1])
    assert receiving.op.driver_data.slot is not None
    yield receiving
    receiving.driver.close()


def test_small_pieces_come_by_slots(small: Receiving, pair: Pair) -> None:
    for message in (b"one", b"two" * 1000, b"three"):
        pair[1].sendall(message)
        small.turn()
        assert small.take() == [message]
        assert small.op.driver_data.slot is not None
    pair[1].shutdown(socket.SHUT_WR)
    small.turn()
    assert small.take() == [b""]
    assert not small.driver.in_flight


def test_a_piece_that_fills_its_slot_is_followed_by_the_rest(small: Receiving, pair: Pair) -> None:
    data = os.urandom(5 * SLOT_SIZE)
    pair[1].sendall(data)
    while sum(map(len, small.got)) < len(data):
        small.turn()
    assert b"".join(small.take()) == data
    assert small.op.driver_data.slot is None  # the next one is expected to be large too
    pair[1].sendall(b"small")
    small.turn()
    assert small.take() == [b"small"]
    assert small.op.driver_data.slot is not None


def test_a_reset_comes_by_a_slot(small: Receiving, pair: Pair) -> None:
    reset(pair[1])
    small.turn()
    [error] = small.take()
    assert error in (errno.ECONNRESET, errno.WSAECONNRESET)
    assert not small.driver.in_flight


def test_what_has_come_into_a_slot_is_delivered_during_a_pause(small: Receiving, pair: Pair) -> None:
    small.driver.pause(small.op)
    pair[1].sendall(b"one")
    small.turn()
    assert small.take() == [b"one"]
    assert small.op.driver_data.slot is None
    pair[1].sendall(b"two")
    small.driver.wait(0.05)
    small.driver.dispatch()
    assert small.take() == []
    small.driver.resume(small.op)
    small.turn()
    assert small.take() == [b"two"]


def test_what_has_come_into_a_slot_is_delivered_before_the_end(small: Receiving, pair: Pair) -> None:
    pair[1].sendall(b"faster than the cancel")
    time.sleep(0.05)
    small.driver.cancel(small.op)
    small.turn()
    assert small.take() == [b"faster than the cancel", errno.ECANCELED]
    assert not small.driver.in_flight


@pytest.mark.parametrize("kind", [ops.Receive, ops.ReceiveInto, ops.ReceiveStream])
def test_nobody_overtakes_what_has_come_into_a_slot(small: Receiving, pair: Pair, kind: Any) -> None:
    pair[1].sendall(b"one")
    time.sleep(0.05)  # it is in the slot, and its completion on the port
    pair[1].sendall(b"two")
    time.sleep(0.05)
    small.driver.cancel(small.op)
    buffer = bytearray(100)
    op = kind(pair[0], *([100] if kind is ops.Receive else [buffer] if kind is ops.ReceiveInto else []))
    op.complete = lambda value, error: small.complete(bytes(buffer[:3]) if value == 3 else value, error)
    small.driver.submit(op)
    small.driver.dispatch()  # without a wait, so that it could be done at once
    assert small.take() == []
    while len(small.got) < 3:
        small.turn()
    assert small.take() == [b"one", errno.ECANCELED, b"two"]


def test_who_stands_in_line_may_be_paused_and_cancelled(small: Receiving, pair: Pair) -> None:
    small.driver.cancel(small.op)
    streams = [ops.ReceiveStream(pair[0]), ops.ReceiveStream(pair[0])]
    receive = ops.Receive(pair[0], 100)
    for op in (*streams, receive):
        op.complete = small.complete
        small.driver.submit(op)
    small.driver.pause(streams[1])
    small.driver.resume(streams[1])
    small.driver.cancel(streams[0])
    small.driver.cancel(receive)
    while len(small.got) < 3:
        small.turn()
    assert small.take() == [errno.ECANCELED] * 3
    pair[1].sendall(b"hello")
    small.turn()
    assert small.take() == [b"hello"]


@pytest.mark.parametrize("size", [5, 3 * SLOT_SIZE])
@pytest.mark.parametrize("action", ["cancel", "pause and resume", "pause, resume and cancel", "raise"])
def test_a_stream_may_be_stopped_while_it_delivers_from_a_slot(
    small: Receiving, pair: Pair, size: int, action: str
) -> None:
    def complete(value: Any, error: BaseException | None) -> None:
        small.complete(value, error)
        small.op.complete = small.complete
        if action == "cancel":
            small.driver.cancel(small.op)
        elif action == "raise":
            raise KeyboardInterrupt
        else:
            small.driver.pause(small.op)
            small.driver.resume(small.op)
            if action.endswith("cancel"):
                small.driver.cancel(small.op)

    small.op.complete = complete
    pair[1].sendall(b"x" * size)
    if action == "raise":
        with pytest.raises(KeyboardInterrupt):
            small.turn()
    else:
        small.turn()
    assert small.got[0] == b"x" * min(size, SLOT_SIZE)
    if action.endswith("cancel"):
        while small.driver.in_flight:
            small.turn()
        assert small.got[-1] == errno.ECANCELED
        assert not small.driver.in_flight
        return
    pair[1].sendall(b"end")
    while not small.got[-1].endswith(b"end"):
        small.turn()
    assert b"".join(small.got) == b"x" * size + b"end"


def test_streams_go_on_when_all_slots_are_lent(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iocp_receiving, "SLOT_LIMIT", 0)
    receiving = Receiving(pair[0], b"first", pair[1])
    for message in (b"one", b"two"):
        assert receiving.op.driver_data.slot is None
        pair[1].sendall(message)
        receiving.turn()
        assert receiving.take() == [message]
    receiving.driver.close()


def test_the_pool_lends_each_slot_once_and_no_more_than_its_limit() -> None:
    pool = SlotPool(10, 128)
    slots = [pool.take() for _ in range(129)]
    assert slots.pop() is None
    addresses = {int(ffi.cast("uintptr_t", slot[0])) for slot in slots if slot is not None}
    assert len(addresses) == 128
    assert slots[5] is not None
    pool.give_back(slots[5])
    assert pool.take() == slots[5]
    assert pool.take() is None


@pytest.mark.parametrize("code", UNDONE.values(), ids=UNDONE)
def test_what_a_thread_left_undone_in_a_slot_is_done_again(code: int, small: Receiving, pair: Pair) -> None:
    leave_undone(small.driver, code)
    assert not small.got
    pair[1].sendall(b"hello")
    small.turn()
    assert small.take() == [b"hello"]


# -- one receive -----------------------------------------------------------------------------------


@pytest.fixture
def port(pair: Pair) -> Iterator[Rig]:
    """A driver that has received a small piece on the first of the pair."""
    rig = Rig(IocpDriver())
    pair[1].sendall(b"first")
    op = rig.submit(ops.Receive(pair[0], 100))
    rig.until(lambda: rig.values(op) == [b"first"])
    yield rig
    rig.driver.close()


@pytest.mark.parametrize("kind", [ops.Receive, ops.ReceiveInto])
def test_one_receive_after_a_small_piece_has_a_slot(port: Rig, pair: Pair, kind: Any) -> None:
    buffer = bytearray(100)
    for message in (b"hello", b"world"):
        op = port.submit(kind(pair[0], 100 if kind is ops.Receive else buffer))
        assert op.driver_data.slot is not None
        pair[1].sendall(message)
        port.until(lambda op=op: bool(port.values(op)))
        [value] = port.values(op)
        assert (value if kind is ops.Receive else bytes(buffer[:value])) == message


def test_one_receive_takes_no_more_than_was_asked_for(port: Rig, pair: Pair) -> None:
    op = port.submit(ops.Receive(pair[0], 3))
    pair[1].sendall(b"hello")
    port.until(lambda: port.values(op) == [b"hel"])
    op = port.submit(ops.Receive(pair[0], 100))
    port.until(lambda: port.values(op) == [b"lo"])


def test_one_receive_that_data_reach_before_its_cancel_has_them(port: Rig, pair: Pair) -> None:
    op = port.submit(ops.Receive(pair[0], 100))
    pair[1].sendall(b"hello")
    time.sleep(0.05)
    port.driver.cancel(op)
    port.until(lambda: port.values(op) == [b"hello"])
    assert not port.driver.in_flight


@pytest.mark.parametrize("end", ["cancel", "close", "reset"])
def test_the_slot_of_one_receive_comes_back(port: Rig, pair: Pair, end: str) -> None:
    op = port.submit(ops.Receive(pair[0], 100))
    free = len(port.driver._slots.free)
    if end == "cancel":
        port.driver.cancel(op)
    elif end == "close":
        pair[1].close()
    else:
        reset(pair[1])
    port.until(lambda: not port.driver.in_flight)
    assert len(port.driver._slots.free) == free + 1
    if end == "close":
        assert port.values(op) == [b""]


@pytest.mark.parametrize("code", UNDONE.values(), ids=UNDONE)
def test_one_receive_that_a_thread_left_undone_in_a_slot_is_made_again(code: int, port: Rig, pair: Pair) -> None:
    op = port.submit(ops.Receive(pair[0], 100))
    assert isinstance(port.driver, IocpDriver)
    leave_undone(port.driver, code)
    assert not port.values(op)
    pair[1].sendall(b"hello")
    port.until(lambda: port.values(op) == [b"hello"])


def test_who_provides_the_memory_is_lent_no_slot(port: Rig, pair: Pair) -> None:
    buffer = bytearray(100)
    op = port.submit(ops.ReceiveStream(pair[0], lambda: buffer))
    assert op.driver_data.slot is None
    pair[1].sendall(b"hello")
    port.until(lambda: port.values(op) == [5])
    assert buffer[:5] == b"hello"


# -- the calls of the loop, which the native tier makes itself ------------------------------------------


async def test_a_wait_that_nobody_awaits_takes_nothing(loop: Loop, pair: Pair) -> None:
    await loop.sock_sendall(pair[1], b"first")
    assert await loop.sock_recv(pair[0], 100) == b"first"
    if loop._quick is None:
        pytest.skip("the Python tier is in force")
    del (wait := [loop._quick.receive(pair[0], 100)])[:]
    await loop.sock_sendall(pair[1], b"hello")
    assert await loop.sock_recv(pair[0], 100) == b"hello"
    assert not wait


async def test_one_after_the_other_on_the_loop(loop: Loop, pair: Pair) -> None:
    for number in range(20):
        receive = loop.create_task(loop.sock_recv(pair[0], 100))
        if number % 2:
            await asyncio.sleep(0)
        await loop.sock_sendall(pair[1], b"%d" % number)
        assert await receive == b"%d" % number
    receive = loop.create_task(loop.sock_recv(pair[0], 100))
    await asyncio.sleep(0)
    receive.cancel()
    await loop.sock_sendall(pair[1], b"hello")
    assert await loop.sock_recv(pair[0], 100) == b"hello"
    pair[1].close()
    assert await loop.sock_recv(pair[0], 100) == b""


async def test_a_socket_that_may_wait_is_not_for_the_quick_way(loop: Loop, pair: Pair) -> None:
    if loop._quick is None:
        pytest.skip("the Python tier is in force")
    pair[0].setblocking(True)
    assert loop._quick.receive(pair[0], 100) is None
    assert loop._quick.send(pair[0], b"hello") is None
    pair[0].setblocking(False)
    assert loop._quick.send(pair[0], b"hello") == 5
