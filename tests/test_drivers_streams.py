"""The contract of a driver: operations that yield many completions, on each driver."""

from __future__ import annotations

import errno
import os
import socket
from typing import Any

import pytest

from iocp_loop import operations as ops

from .rig import A_MOMENT, Pair, Rig, received
from .support import LIMIT, WINDOWS, in_thread, reset, send_in_pieces, udp_socket


@pytest.mark.every_poller
def test_a_receive_stream_delivers_all_in_order_and_ends_with_the_stream(rig: Rig, pair: Pair) -> None:
    data = os.urandom(3 << 20)
    op = rig.submit(ops.ReceiveStream(pair[0]))

    def feed() -> None:
        pair[1].sendall(data)
        pair[1].shutdown(socket.SHUT_WR)

    with in_thread(feed):
        rig.until(lambda: not op.in_flight)
    assert rig.completions(op)[-1] == (b"", None)
    assert b"" not in rig.values(op)[:-1]
    assert all(type(value) is bytes for value in rig.values(op))
    assert received(rig, op) == data


@pytest.mark.parametrize("size", [0, 1, 4, 10, 100_000])
def test_a_stream_of_datagrams_keeps_to_its_size(rig: Rig, size: int) -> None:
    with udp_socket() as ours, udp_socket() as peer:
        op = rig.submit(ops.ReceiveFromStream(ours, size))
        rig.turn()
        peer.sendto(b"0123456789", ours.getsockname())
        if WINDOWS and size < 10:
            assert rig.last_error(op).winerror == 10040  # type: ignore[attr-defined]  # WSAEMSGSIZE: it does not fit
            return
        rig.until(lambda: rig.values(op))
        assert rig.values(op) == [(b"0123456789"[:size], peer.getsockname())]
        rig.end(op)


def test_a_receive_stream_ends_with_the_error(rig: Rig, pair: Pair) -> None:
    op = rig.submit(ops.ReceiveStream(pair[0]))
    pair[1].send(b"before")
    rig.until(lambda: rig.values(op))
    reset(pair[1])
    assert isinstance(rig.last_error(op), ConnectionResetError)
    assert received(rig, op) == b"before"
    assert rig.nothing_comes()


@pytest.mark.every_poller
def test_a_cancelled_receive_stream_leaves_the_data_that_come_later(rig: Rig, pair: Pair) -> None:
    op = rig.submit(ops.ReceiveStream(pair[0]))
    pair[1].send(b"one")
    rig.until(lambda: rig.values(op))
    rig.end(op)
    pair[1].send(b"two")
    assert rig.nothing_comes()
    assert rig.value(rig.submit(ops.Receive(pair[0], 10))) == b"two"


@pytest.mark.every_poller
def test_a_paused_receive_stream_rests_and_loses_nothing(rig: Rig, pair: Pair) -> None:
    op = rig.submit(ops.ReceiveStream(pair[0]))
    pair[1].send(b"1")
    rig.until(lambda: rig.values(op))
    rig.driver.pause(op)
    rig.nothing_comes()
    data = os.urandom(8 << 20)
    with in_thread(lambda: send_in_pieces(pair[1], data)) as sender:
        sender.join(0.2)
        rig.nothing_comes()
        # However much a driver reads ahead, a rest must reach the peer in the end.
        assert sender.is_alive()
        assert len(received(rig, op)) < len(data)
        rig.driver.resume(op)
        rig.until(lambda: len(received(rig, op)) == 1 + len(data))
    assert received(rig, op) == b"1" + data
    rig.end(op)


@pytest.mark.every_poller
def test_the_end_of_the_stream_during_a_rest_comes_after_it(rig: Rig, pair: Pair) -> None:
    op = rig.submit(ops.ReceiveStream(pair[0]))
    rig.turn()
    rig.driver.pause(op)
    rig.nothing_comes()
    pair[1].sendall(b"late")
    pair[1].close()
    rig.nothing_comes()
    rig.driver.resume(op)
    rig.until(lambda: not op.in_flight)
    rig.until(lambda: rig.completions(op) and rig.completions(op)[-1] == (b"", None))
    assert received(rig, op) == b"late"


def test_pause_and_resume_again_and_again(rig: Rig, pair: Pair) -> None:
    data = os.urandom(1 << 20)
    op = rig.submit(ops.ReceiveStream(pair[0]))
    with in_thread(lambda: pair[1].sendall(data)):
        while len(received(rig, op)) < len(data):
            rig.driver.pause(op)
            rig.driver.pause(op)
            rig.turn()
            rig.driver.resume(op)
            rig.driver.resume(op)
            rig.turn(A_MOMENT)
    assert received(rig, op) == data
    rig.end(op)


def test_a_paused_receive_stream_can_be_cancelled(rig: Rig, pair: Pair) -> None:
    op = rig.submit(ops.ReceiveStream(pair[0]))
    rig.turn()
    rig.driver.pause(op)
    rig.turn()
    rig.end(op)


def test_a_receive_stream_into_buffers_given_just_before(rig: Rig, pair: Pair) -> None:
    data = os.urandom(1 << 20)
    buffer = bytearray(5000)
    got = bytearray()
    ends: list[Any] = []

    def take(value: Any, error: BaseException | None) -> None:
        assert error is None
        got.extend(buffer[:value] if isinstance(value, int) else value)
        if not value:
            ends.append(value)

    op = rig.submit(ops.ReceiveStream(pair[0], get_buffer=lambda: buffer), take)

    def feed() -> None:
        pair[1].sendall(data)
        pair[1].close()

    with in_thread(feed):
        rig.until(lambda: not op.in_flight)
        rig.until(lambda: ends)
    assert got == data
    assert len(ends) == 1


def test_a_receive_stream_without_a_buffer_reads_nothing_this_time(rig: Rig, pair: Pair) -> None:
    buffer = bytearray(10)
    buffers: list[Any] = [None, None, buffer]
    op = rig.submit(ops.ReceiveStream(pair[0], get_buffer=lambda: buffers.pop(0) if buffers else buffer))
    pair[1].send(b"abc")
    rig.until(lambda: rig.values(op))
    (value,) = rig.values(op)
    assert (buffer[:value] if isinstance(value, int) else value) == b"abc"
    rig.end(op)


def test_a_receive_stream_may_be_cancelled_in_its_own_callback(rig: Rig, pair: Pair) -> None:
    op = ops.ReceiveStream(pair[0])
    rig.submit(op, lambda value, error: rig.driver.cancel(op))
    pair[1].send(b"abc")
    assert rig.last_error(op).errno == errno.ECANCELED
    assert received(rig, op) == b"abc"


def receive_in_bulk(rig: Rig, op: ops.ReceiveStream, peer: socket.socket) -> None:
    """Send large pieces until every driver receives straight into what is lent; what comes later is small."""
    sent = 0
    while not sent or not isinstance(rig.values(op)[-1], int):
        peer.sendall(bytes(50_000))
        sent += 50_000
        rig.until(lambda: sum(v if isinstance(v, int) else len(v) for v in rig.values(op)) == sent)  # noqa: B023 - now
        assert sent < 2_000_000


@pytest.mark.parametrize("what", ["data", "the end"])
def test_a_receive_stream_may_be_cancelled_by_who_lends_the_buffer(rig: Rig, pair: Pair, what: str) -> None:
    buffer = bytearray(60_000)
    cancels = False

    def lend() -> bytearray:
        if cancels:
            rig.driver.cancel(op)
        return buffer

    op = rig.submit(ops.ReceiveStream(pair[0], get_buffer=lend))
    receive_in_bulk(rig, op, pair[1])
    rig.turn()
    cancels = True
    if what == "data":
        pair[1].send(b"abc")
    else:
        pair[1].shutdown(socket.SHUT_WR)
    assert rig.last_error(op).errno == errno.ECANCELED
    assert rig.nothing_comes()
    assert rig.value(rig.submit(ops.Receive(pair[0], 10))) == (b"abc" if what == "data" else b"")


@pytest.mark.parametrize("outcome", [0, ConnectionResetError()], ids=["the end", "an error"])
def test_a_receive_stream_may_be_cancelled_by_a_finalizer_while_it_receives(rig: Rig, pair: Pair, outcome: Any) -> None:
    """The collector may run whenever Python does; here it does so in the call that receives."""

    class Cancelling(socket.socket):
        def recv_into(self, *args: Any) -> int:
            if not cancels:
                return super().recv_into(*args)
            rig.driver.cancel(op)
            if outcome:
                raise outcome
            return 0

    cancels = False
    with Cancelling(fileno=pair[0].detach()) as sock:
        sock.setblocking(False)
        buffer = bytearray(60_000)
        op = rig.submit(ops.ReceiveStream(sock, get_buffer=lambda: buffer))
        receive_in_bulk(rig, op, pair[1])
        rig.turn()
        cancels = True
        pair[1].send(b"abc")
        assert rig.last_error(op).errno == errno.ECANCELED
        assert rig.nothing_comes()


@pytest.mark.every_poller
def test_an_accept_stream_accepts_until_cancelled(rig: Rig, listener: socket.socket) -> None:
    op = rig.submit(ops.AcceptStream(listener))
    clients = [socket.create_connection(listener.getsockname(), LIMIT) for _ in range(50)]
    rig.until(lambda: len(rig.values(op)) == 50)
    assert {address for _, address in rig.values(op)} == {client.getsockname() for client in clients}
    for sock, address in rig.values(op):
        assert sock.getpeername() == address
        assert sock.gettimeout() == 0
        sock.close()
    rig.end(op)
    for client in clients:
        client.close()


def test_an_accept_stream_outlives_a_reset_before_the_accept(rig: Rig, listener: socket.socket) -> None:
    reset(socket.create_connection(listener.getsockname(), LIMIT))
    op = rig.submit(ops.AcceptStream(listener))
    rig.turn(A_MOMENT)
    for _ in range(30):
        reset(socket.create_connection(listener.getsockname(), LIMIT))
    rig.nothing_comes()
    assert op.in_flight
    with socket.create_connection(listener.getsockname(), LIMIT) as client:
        rig.until(lambda: client.getsockname() in [address for _, address in rig.values(op)])
    rig.end(op)
    for sock, _ in rig.values(op):
        sock.close()


def test_a_cancelled_accept_stream_takes_no_more_connections(rig: Rig, listener: socket.socket) -> None:
    op = rig.submit(ops.AcceptStream(listener))
    rig.turn()
    rig.end(op)
    with socket.create_connection(listener.getsockname(), LIMIT) as client:
        assert rig.nothing_comes()
        sock, address = rig.value(rig.submit(ops.Accept(listener)))
        with sock:
            assert address == client.getsockname()
