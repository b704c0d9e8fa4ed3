"""Driver iocp: first come, first served, per handle and direction; and no request reaches a number that was reused."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

import pytest

if sys.platform != "win32":
    pytest.skip("I/O completion ports exist on Windows only", allow_module_level=True)

import iocp_loop
from iocp_loop import CompletionPort
from iocp_loop import operations as ops
from iocp_loop.operations import READABLE, WRITABLE, Operation
from iocp_loop.ports.iocp import sockets as iocp_sockets

from .rig import Pair, Rig, waiting_operations
from .support import LIMIT, in_thread, read_all, read_exactly, tcp_pair, udp_socket
from .windows_rig import Handle

Loop = iocp_loop.IocpEventLoop

SIZE = 300_000


def order(rig: Rig, operations: list[Operation]) -> list[Operation]:
    """In which order they completed."""
    rig.until(lambda: not any(op.in_flight for op in operations))
    return [op for op, _, _ in rig.delivered if op in operations]


# -- order -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_most", [1000, 100_000, 1 << 30])
def test_sends_at_once_do_not_tear_each_others_messages(
    rig: Rig, pair: Pair, at_most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(iocp_sockets, "LARGEST_SEND", at_most)
    pieces = [bytes([letter]) * SIZE for letter in b"abcdef"]
    got = bytearray()
    with in_thread(lambda: got.extend(read_exactly(pair[1], len(pieces) * SIZE))):
        operations: list[Any] = []
        for piece in pieces:
            cut = len(operations) % 2 * SIZE // 2
            operations.append(rig.submit(ops.SendAll(pair[0], [piece[:cut], piece[cut:]])))
        assert order(rig, operations) == operations
    assert got == b"".join(pieces)


def test_receives_get_their_bytes_in_the_order_of_submission(rig: Rig, pair: Pair) -> None:
    into = bytearray(1)
    operations = [ops.Receive(pair[0], 1), ops.ReceiveInto(pair[0], into), ops.Receive(pair[0], 1)]
    for op in operations:
        rig.submit(op)
    last = rig.submit(ops.ReceiveStream(pair[0]))
    pair[1].sendall(b"abcrest")
    assert order(rig, operations) == operations
    assert [rig.values(operations[0]), bytes(into), rig.values(operations[2])] == [[b"a"], b"b", [b"c"]]
    rig.until(lambda: b"".join(map(bytes, rig.values(last))) == b"rest")
    rig.end(last)


def test_datagrams_are_received_in_the_order_of_submission(rig: Rig) -> None:
    with udp_socket() as ours, udp_socket() as peer:
        operations: list[Any] = [rig.submit(ops.ReceiveFrom(ours, 10)) for _ in range(5)]
        for number in range(5):
            peer.sendto(b"%d" % number, ours.getsockname())
        assert order(rig, operations) == operations
        assert [rig.values(op)[0][0] for op in operations] == [b"0", b"1", b"2", b"3", b"4"]
        sends: list[Any] = [rig.submit(ops.SendTo(ours, b"%d" % n, peer.getsockname())) for n in range(5)]
        assert order(rig, sends) == sends
        peer.settimeout(LIMIT)
        assert [peer.recv(10) for _ in range(5)] == [b"0", b"1", b"2", b"3", b"4"]


def test_pipes_are_read_and_written_in_the_order_of_submission(rig: Rig, pipe: tuple[Handle, Handle]) -> None:
    ours, peer = pipe
    reads: list[Any] = [rig.submit(ops.Read(ours, 3)) for _ in range(4)]
    writes: list[Any] = [rig.submit(ops.Write(peer, piece)) for piece in (b"one", b"two", b"thr", b"fou")]
    assert order(rig, writes) == writes
    assert order(rig, reads) == reads
    assert [rig.values(op) for op in reads] == [[b"one"], [b"two"], [b"thr"], [b"fou"]]


def test_a_send_waits_until_the_socket_is_connected(rig: Rig, listener: socket.socket) -> None:
    with socket.socket() as ours:
        ours.setblocking(False)
        operations = [ops.Connect(ours, listener.getsockname()), ops.SendAll(ours, [b"hello"])]
        for op in operations:
            rig.submit(op)
        assert order(rig, operations) == operations
        listener.settimeout(LIMIT)
        conn, _ = listener.accept()
        with conn:
            assert read_exactly(conn, 5) == b"hello"


def test_accepts_do_not_wait_for_each_other(rig: Rig, listener: socket.socket) -> None:
    driver: Any = rig.driver
    operations: list[Any] = [rig.submit(ops.Accept(listener)) for _ in range(3)]
    assert len(driver._outstanding) == 3
    clients = [socket.create_connection(listener.getsockname(), LIMIT) for _ in range(3)]
    assert order(rig, operations) == operations
    for op, client in zip(operations, clients, strict=True):
        conn, address = rig.values(op)[0]
        assert address == client.getsockname()
        conn.close()
        client.close()


def test_one_that_is_cancelled_in_the_line_never_begins(rig: Rig, pair: Pair) -> None:
    first, second, third = (rig.submit(ops.Receive(pair[0], 1)) for _ in range(3))
    rig.end(second)
    assert first.in_flight
    assert third.in_flight
    rig.end(first)
    pair[1].sendall(b"x")
    assert rig.value(third) == b"x"


def test_the_directions_of_a_handle_are_busy_by_themselves(rig: Rig, pair: Pair) -> None:
    driver: Any = rig.driver
    fd = pair[0].fileno()
    assert not driver.busy(fd, READABLE)
    receiving = [rig.submit(ops.Receive(pair[0], 1)) for _ in range(2)]
    watching = rig.submit(ops.Readiness(pair[0], WRITABLE))
    assert driver.busy(fd, READABLE)
    assert not driver.busy(fd, WRITABLE)
    pair[1].send(b"xy")
    order(rig, receiving)
    assert not driver.busy(fd, READABLE)
    rig.until(lambda: not watching.in_flight)
    sending = rig.submit(ops.SendAll(pair[0], [b"x"]))
    assert driver.busy(fd, WRITABLE)
    assert rig.value(sending) == 1
    assert not driver.busy(fd, WRITABLE)
    assert not driver.busy(fd + 4, READABLE)


def test_a_port_of_several_threads_keeps_the_order(pair: Pair) -> None:
    with CompletionPort(driver="iocp") as port:
        port.register(pair[0])
        receiving: list[Any] = [ops.Receive(pair[0], 1) for _ in range(20)]
        for op in receiving:
            port.submit(op)
        got: list[Any] = []

        def work() -> None:
            while len(got) < 20:
                if (completion := port.get(0.1)) is not None:
                    got.append(completion)

        with in_thread(work), in_thread(work):
            pair[1].sendall(bytes(range(20)))
        values = {completion.operation: completion.result() for completion in got}
        assert [values[op] for op in receiving] == [bytes([n]) for n in range(20)]


async def test_operations_of_the_proactor_keep_their_order(loop: Loop, pair: Pair) -> None:
    got = bytearray()
    with in_thread(lambda: got.extend(read_exactly(pair[1], 3 << 20))):
        await asyncio.gather(*(loop._proactor.sendall(pair[0], bytes([n]) * (1 << 20)) for n in b"abc"))
    assert got == b"a" * (1 << 20) + b"b" * (1 << 20) + b"c" * (1 << 20)
    receiving = [loop._proactor.recv(pair[0], 1) for _ in range(4)]
    pair[1].sendall(b"abcd")
    assert await asyncio.gather(*receiving) == [b"a", b"b", b"c", b"d"]


# -- sockets that are closed -----------------------------------------------------------------------


def take_number(number: int, make: Callable[[], socket.socket]) -> socket.socket:
    """One of the sockets that `make()` gives which has the number of one that was closed."""
    spare = []
    while (again := make()).fileno() != number:
        spare.append(again)
        assert len(spare) < 100, f"{number} is not used again, but {[each.fileno() for each in spare]}"
    for each in spare:
        each.close()
    again.setblocking(False)
    return again


@pytest.mark.parametrize("number", range(6))
def test_an_operation_whose_socket_is_closed_ends_as_cancelled(rig: Rig, pair: Pair, number: int) -> None:
    op = rig.submit(waiting_operations(pair[0])[number])
    behind = rig.submit(ops.Receive(pair[0], 1))
    assert rig.nothing_comes()
    pair[0].close()
    assert rig.last_error(op).errno == errno.ECANCELED
    assert rig.last_error(behind).errno == errno.ECANCELED


def test_an_accept_whose_listener_is_closed_ends_as_cancelled(rig: Rig, listener: socket.socket) -> None:
    operations = [rig.submit(ops.Accept(listener)), rig.submit(ops.AcceptStream(listener))]
    assert rig.nothing_comes()
    listener.close()
    assert {rig.last_error(op).errno for op in operations} == {errno.ECANCELED}


@pytest.mark.parametrize("make", [lambda sock: ops.ReceiveFrom(sock, 10), lambda sock: ops.ReceiveFromStream(sock, 10)])
def test_a_datagram_operation_whose_socket_is_closed_ends_as_cancelled(
    rig: Rig, make: Callable[[socket.socket], Operation]
) -> None:
    with udp_socket() as sock:
        op = rig.submit(make(sock))
        assert rig.nothing_comes()
        sock.close()
        assert rig.last_error(op).errno == errno.ECANCELED


@pytest.mark.parametrize("small", [False, True])
def test_a_stream_does_not_go_on_with_a_socket_that_has_its_number(rig: Rig, pair: Pair, small: bool) -> None:
    ours, peer = tcp_pair()
    stolen: list[socket.socket] = []
    number = ours.fileno()

    def close(value: Any, error: OSError | None) -> None:
        if value == b"close" and not stolen:
            ours.close()
            stolen.append(take_number(number, pair[0].dup))

    stream = rig.submit(ops.ReceiveStream(ours), close)
    with peer:
        if small:  # the next receive has a slot
            peer.sendall(b"small")
            rig.until(lambda: rig.values(stream))
        peer.sendall(b"close")
        rig.until(lambda: stolen)
        pair[1].sendall(b"secret")
        assert rig.last_error(stream).errno == errno.ECANCELED
    with stolen[0]:
        assert rig.values(stream)[-1] == b"close"
        assert rig.value(rig.submit(ops.Receive(stolen[0], 100))) == b"secret"


def test_a_paused_stream_is_not_resumed_on_a_socket_that_has_its_number(rig: Rig, pair: Pair) -> None:
    ours, peer = tcp_pair()
    number = ours.fileno()
    stream = ops.ReceiveStream(ours)
    rig.submit(stream, lambda value, error: rig.driver.pause(stream))
    with peer:
        peer.sendall(b"pause")
        rig.until(lambda: stream.paused)
        ours.close()
        with take_number(number, pair[0].dup) as stolen:
            rig.driver.resume(stream)
            pair[1].sendall(b"secret")
            assert rig.last_error(stream).errno == errno.ECANCELED
            assert rig.values(stream) == [b"pause"]
            assert rig.value(rig.submit(ops.Receive(stolen, 100))) == b"secret"


def test_a_datagram_stream_does_not_go_on_with_a_socket_that_has_its_number(rig: Rig) -> None:
    with udp_socket() as peer:
        ours = udp_socket()
        number = ours.fileno()
        stream = ops.ReceiveFromStream(ours, 100)
        rig.submit(stream, lambda value, error: rig.driver.pause(stream))
        peer.sendto(b"pause", ours.getsockname())
        rig.until(lambda: stream.paused)
        ours.close()
        with take_number(number, udp_socket) as stolen:
            rig.driver.resume(stream)
            peer.sendto(b"secret", stolen.getsockname())
            assert rig.last_error(stream).errno == errno.ECANCELED
            assert rig.value(rig.submit(ops.ReceiveFrom(stolen, 100)))[0] == b"secret"


def test_the_rest_of_a_send_does_not_go_to_a_socket_that_has_its_number(
    rig: Rig, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(iocp_sockets, "LARGEST_SEND", 1000)
    ours, peer = tcp_pair()
    number = ours.fileno()
    with peer:
        op = rig.submit(ops.SendAll(ours, [b"x" * 5000]))
        behind = rig.submit(ops.SendAll(ours, [b"y" * 5000]))
        rig.driver.wait(0)
        ours.close()
        with take_number(number, pair[0].dup):
            assert rig.last_error(op).errno == errno.ECANCELED
            assert rig.last_error(behind).errno == errno.ECANCELED
            pair[0].shutdown(socket.SHUT_WR)
            assert read_all(pair[1]) == b""


async def test_a_loop_lives_on_when_a_socket_is_closed_under_its_transport(loop: Loop, pair: Pair) -> None:
    lost: list[Exception | None] = []

    class Protocol(asyncio.DatagramProtocol, asyncio.Protocol):
        def connection_lost(self, exc: Exception | None) -> None:
            lost.append(exc)

    udp = udp_socket()
    datagrams, _ = await loop.create_datagram_endpoint(Protocol, sock=udp)
    stream, _ = await loop.create_connection(Protocol, sock=pair[0])
    await asyncio.sleep(0.01)
    udp.close()
    pair[0].close()
    await asyncio.sleep(0.05)
    datagrams.close()
    stream.close()
    for _ in range(100):
        await asyncio.sleep(0.01)
        if len(lost) == 2:
            break
    assert len(lost) == 2


async def test_a_future_of_a_closed_socket_is_cancelled(loop: Loop, pair: Pair, listener: socket.socket) -> None:
    futures = [loop._proactor.recv(pair[0], 10), loop._proactor.accept(listener)]
    await asyncio.sleep(0.01)
    pair[0].close()
    listener.close()
    await asyncio.wait(futures, timeout=LIMIT)
    assert all(future.cancelled() for future in futures)


async def test_a_call_for_a_closed_socket_is_cancelled(loop: Loop, pair: Pair, listener: socket.socket) -> None:
    calls: list[Any] = [
        loop.sock_recv(pair[0], 10),
        loop.sock_recv_into(pair[1], bytearray(10)),
        loop.sock_accept(listener),
    ]
    pair[1].setblocking(False)
    tasks = [asyncio.create_task(call) for call in calls]
    await asyncio.sleep(0.01)
    for sock in (*pair, listener):
        sock.close()
    results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), LIMIT)
    assert [type(result) for result in results] == 3 * [asyncio.CancelledError]


# -- datagrams that are too long -------------------------------------------------------------------


@pytest.mark.parametrize("first", ["datagram", "operation"])
@pytest.mark.parametrize("kind", ["from", "from into", "into", "plain"])
def test_a_datagram_that_is_longer_than_asked_for_is_an_error_of_its_own(rig: Rig, kind: str, first: str) -> None:
    with udp_socket() as ours, udp_socket() as peer:
        make: dict[str, Callable[[], Operation]] = {
            "from": lambda: ops.ReceiveFrom(ours, 10),
            "from into": lambda: ops.ReceiveFromInto(ours, bytearray(10)),
            "into": lambda: ops.ReceiveInto(ours, bytearray(10)),
            "plain": lambda: ops.Receive(ours, 10),
        }
        for _ in range(3):
            if first == "datagram":
                peer.sendto(b"x" * 100, ours.getsockname())
            again: list[Operation] = []
            op = rig.submit(make[kind](), lambda *_, again=again: again.append(rig.submit(make[kind]())))
            if first == "operation":
                peer.sendto(b"x" * 100, ours.getsockname())
            error: Any = rig.error(op)
            assert error.winerror == 10040
            assert rig.nothing_comes()
            peer.sendto(b"y" * 10, ours.getsockname())
            assert rig.outcome(again[0])[1] is None


def test_files_that_are_sent_at_once_tell_how_much(rig: Rig, pair: Pair, tmp_path: Any) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"z" * 1000)
    descriptor = os.open(path, os.O_RDONLY | os.O_BINARY)
    try:
        assert rig.value(rig.submit(ops.SendFile(pair[0], descriptor, 0, 1000))) == 1000
    finally:
        os.close(descriptor)
    assert read_exactly(pair[1], 1000) == b"z" * 1000
