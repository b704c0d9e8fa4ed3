"""Whatever an operation or a `complete` raises, of whatever type, ends that one and reaches nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import logging
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import iocp_loop
from iocp_loop import CompletionPort
from iocp_loop import operations as ops
from iocp_loop.operations import READABLE

from .rig import Pair, Rig
from .support import LIMIT, WINDOWS, Recorder, closed, connected, fill, tcp_pair, turns, udp_socket, until

Loop = iocp_loop.IocpEventLoop


class Odd(Exception):
    """Nothing that the system or Python would raise."""


class VeryOdd(BaseException):
    """As Odd, and not even an Exception."""


#: What may be raised in place of an OSError.
KINDS = [
    TypeError,
    ValueError,
    OverflowError,
    MemoryError,
    BufferError,
    StopIteration,
    asyncio.CancelledError,
    Odd,
    VeryOdd,
]


class OddSocket(socket.socket):
    """A socket of the user's own class, whose methods raise `error` once there is one."""

    error: BaseException | None = None

    @classmethod
    def of(cls, sock: socket.socket) -> OddSocket:
        """It takes the place of `sock`."""
        odd = cls(sock.family, sock.type, sock.proto, sock.detach())
        odd.setblocking(False)
        return odd


def _raising(name: str) -> Callable[..., Any]:
    method = getattr(socket.socket, name)

    def call(self: OddSocket, *args: Any) -> Any:
        if self.error is not None:
            raise self.error
        return method(self, *args)

    return call


_METHODS = "accept connect connect_ex fileno getsockopt recv recv_into recvfrom recvfrom_into send sendmsg sendto"
for _name in _METHODS.split():
    if hasattr(socket.socket, _name):
        setattr(OddSocket, _name, _raising(_name))


@pytest.fixture
def odd(pair: Pair) -> Iterator[OddSocket]:
    """An odd socket in place of our end of the pair."""
    odd = OddSocket.of(pair[0])
    with odd:
        yield odd
        odd.error = None


@pytest.fixture
def other() -> Iterator[Pair]:
    """A pair whose connection is in order all the time."""
    ours, peer = tcp_pair()
    with ours, peer:
        yield ours, peer


#: Operations on a stream socket, by name: those that receive first, then those that send.
RECEIVING: dict[str, Callable[[socket.socket], ops.Operation]] = {
    "Receive": lambda sock: ops.Receive(sock, 10),
    "ReceiveInto": lambda sock: ops.ReceiveInto(sock, bytearray(10)),
    "ReceiveFrom": lambda sock: ops.ReceiveFrom(sock, 10),
    "ReceiveFromInto": lambda sock: ops.ReceiveFromInto(sock, bytearray(10)),
    "ReceiveStream": lambda sock: ops.ReceiveStream(sock),
    "ReceiveStream into a buffer": lambda sock: ops.ReceiveStream(sock, lambda: bytearray(10)),
}
SENDING: dict[str, Callable[[socket.socket], ops.Operation]] = {
    "Send": lambda sock: ops.Send(sock, b"x"),
    "SendAll": lambda sock: ops.SendAll(sock, [b"x", b"y"]),
    "SendTo": lambda sock: ops.SendTo(sock, b"x", None),
}


def named(table: dict[str, Callable[[socket.socket], ops.Operation]]) -> Any:
    return pytest.mark.parametrize("make", table.values(), ids=table.keys())


def see_it_end(rig: Rig, op: ops.Operation, error: BaseException) -> None:
    """`op` ends with `error`, or goes on where the driver calls nothing of its socket."""
    rig.until(lambda: rig.completions(op))
    if rig.completions(op)[-1][1] is None:
        if op.in_flight:
            rig.end(op)
    else:
        value, last = rig.completions(op)[-1]
        assert value is None
        assert last is error or isinstance(last, OSError)  # OSError: all that is known is that the socket is no use
        assert not op.in_flight


def in_order(rig: Rig, pair: Pair) -> None:
    """Something can be received on `pair`, and the driver delivers it."""
    pair[1].send(b"in order")
    assert rig.value(rig.submit(ops.Receive(pair[0], 10))) == b"in order"


# --------------------------------------------------------------------------------------------------
# Drivers
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_of_any_type_is_that_of_its_operation(rig: Rig, odd: OddSocket, pair: Pair, kind: Any) -> None:
    op = rig.submit(ops.ReceiveFrom(odd, 10))
    rig.turn()
    odd.error = error = kind("odd")
    pair[1].send(b"data")
    see_it_end(rig, op, error)


@named(RECEIVING)
def test_a_receive_that_fails_when_something_comes(
    rig: Rig, odd: OddSocket, pair: Pair, other: Pair, make: Callable[[socket.socket], ops.Operation]
) -> None:
    op = rig.submit(make(odd))
    rig.turn()
    odd.error = error = VeryOdd()
    pair[1].send(b"data")
    see_it_end(rig, op, error)
    in_order(rig, other)


@named({**RECEIVING, **SENDING})
def test_a_call_that_fails_at_once(
    rig: Rig, odd: OddSocket, pair: Pair, other: Pair, make: Callable[[socket.socket], ops.Operation]
) -> None:
    pair[1].send(b"data")
    rig.driver.register(odd)
    op = make(odd)
    odd.error = error = VeryOdd()
    try:
        rig.submit(op)
    except VeryOdd:
        assert not op.in_flight
    else:
        see_it_end(rig, op, error)
    in_order(rig, other)


@named(SENDING)
def test_a_send_that_fails_when_there_is_room(
    rig: Rig, odd: OddSocket, pair: Pair, other: Pair, make: Callable[[socket.socket], ops.Operation]
) -> None:
    size = fill(odd)
    op = rig.submit(make(odd))
    rig.turn()
    odd.error = error = VeryOdd()
    while size > 0:
        size -= len(pair[1].recv(1 << 20))
    see_it_end(rig, op, error)
    in_order(rig, other)


@pytest.mark.parametrize("kind", [ops.Accept, ops.AcceptStream])
def test_an_accept_that_fails(rig: Rig, listener: socket.socket, other: Pair, kind: Any) -> None:
    with OddSocket.of(listener) as odd:
        op = rig.submit(kind(odd))
        rig.turn()
        odd.error = error = VeryOdd()
        with socket.create_connection(listener_address(odd), LIMIT):
            see_it_end(rig, op, error)
        for conn, _ in rig.values(op):
            conn.close()
        odd.error = None
        in_order(rig, other)


def listener_address(sock: socket.socket) -> Any:
    return socket.socket.getsockname(sock)


@pytest.mark.parametrize("address", [None, 5, ("127.0.0.1",), ("127.0.0.1", "x"), ("127.0.0.1", -1), (b"\0", 1)])
@pytest.mark.parametrize("kind", ["Connect", "SendTo"])
def test_an_address_that_makes_no_sense(rig: Rig, other: Pair, kind: str, address: Any) -> None:
    if kind == "SendTo" and address is None:
        pytest.skip("None is an address there: where the socket is connected")
    type_ = socket.SOCK_STREAM if kind == "Connect" else socket.SOCK_DGRAM
    with socket.socket(socket.AF_INET, type_) as sock:
        sock.setblocking(False)
        op = ops.Connect(sock, address) if kind == "Connect" else ops.SendTo(sock, b"x", address)
        try:
            rig.submit(op)
        except Exception:
            assert not op.in_flight
        else:
            value, error = rig.outcome(op)
            assert value is None
            assert isinstance(error, Exception)
        in_order(rig, other)


@pytest.mark.parametrize(
    "arguments",
    [
        *[(kind, size) for kind in (ops.Receive, ops.ReceiveFrom) for size in (-1, 1.5, "x", 1 << 70)],
        (ops.SendFile, 0, 1.5, 10),
        (ops.SendFile, 0, 1 << 70, 10),
        (ops.SendFile, 1 << 40, 0, 10),
        (ops.SendFile, "x", 0, 10),
    ],
)
def test_an_argument_that_makes_no_sense(rig: Rig, pair: Pair, other: Pair, arguments: Any) -> None:
    rig.turn()
    pair[1].send(b"data")
    kind, *rest = arguments
    op = kind(pair[0], *rest)
    try:
        rig.submit(op)
    except Exception:
        assert not op.in_flight
    else:
        value, error = rig.outcome(op)
        # A size may be larger than any memory where the driver has its own.
        assert isinstance(error, Exception) or value == b"data" or value[0] == b"data"
    in_order(rig, other)


@pytest.mark.skipif(WINDOWS, reason="a file without overlapped I/O is refused there, whatever is asked of it")
@pytest.mark.parametrize("size", [-1, 1.5, "x", 1 << 70])
@pytest.mark.parametrize("offset", [None, 0, 1.5, "x", -1, 1 << 70])
def test_a_part_of_a_file_that_makes_no_sense(rig: Rig, other: Pair, tmp_path: Path, size: Any, offset: Any) -> None:
    with (tmp_path / "file").open("w+b") as file:
        for op in (
            ops.Read(file, size, offset),
            ops.ReadInto(file, bytearray(1), offset),
            ops.Write(file, b"", offset),
        ):
            try:
                rig.submit(op)
            except Exception:
                assert not op.in_flight
            else:
                rig.outcome(op)
    in_order(rig, other)


@pytest.mark.parametrize("kind", [ops.Readiness, ops.ReadinessStream])
def test_a_number_that_is_no_descriptor_at_all(rig: Rig, other: Pair, kind: Any) -> None:
    op = kind(1 << 70, READABLE)
    with pytest.raises((OSError, OverflowError)):
        rig.submit(op)
    assert not op.in_flight
    in_order(rig, other)


def fails() -> Any:
    raise VeryOdd


def released_view() -> memoryview:
    view = memoryview(bytearray(10))
    view.release()
    return view


@pytest.mark.parametrize("lend", [fails, released_view, lambda: 5, lambda: b"read-only"])
def test_a_buffer_that_cannot_be_lent_ends_the_stream(rig: Rig, pair: Pair, other: Pair, lend: Any) -> None:
    lending: Any = functools.partial(bytearray, 1 << 16)
    op = rig.submit(ops.ReceiveStream(pair[0], lambda: lending()))
    for _ in range(8):  # until a driver that has another way for large pieces takes it
        rig.delivered.clear()
        pair[1].sendall(bytes(1 << 16))
        rig.until(lambda: rig.completions(op))
    rig.nothing_comes()
    lending = lend
    rig.delivered.clear()
    pair[1].send(b"x")
    rig.until(lambda: rig.completions(op))
    if op.in_flight:
        assert rig.values(op)[-1] == b"x"  # the driver has memory of its own
        rig.end(op)
    else:
        assert isinstance(rig.completions(op)[-1][1], (VeryOdd, TypeError, ValueError, BufferError))
    in_order(rig, other)


@named(
    {
        **RECEIVING,
        "ReceiveFromStream": lambda sock: ops.ReceiveFromStream(sock, 10),
        "Readiness": lambda sock: ops.Readiness(sock, READABLE),
        "ReadinessStream": lambda sock: ops.ReadinessStream(sock, READABLE),
    }
)
@pytest.mark.parametrize("kind", [OSError, Odd, VeryOdd])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "datagram"])
def test_what_a_complete_raises_is_reported(
    rig: Rig, pair: Pair, other: Pair, make: Any, kind: type[BaseException], stream: bool
) -> None:
    raised: list[BaseException] = []
    told: list[dict[str, Any]] = []

    def complete(value: Any, error: BaseException | None) -> None:
        raised.append(kind("odd"))
        raise raised[-1]

    rig.driver.exception_handler = told.append
    with udp_socket() as receiver, udp_socket() as sender:
        sender.connect(receiver.getsockname())
        ours, peer = pair if stream else (receiver, sender)
        op = rig.submit(make(ours), complete)
        beside = rig.submit(ops.Receive(other[0], 10))
        peer.send(b"data")
        other[1].send(b"beside")
        assert rig.value(beside) == b"beside"
        rig.until(lambda: rig.completions(op))
        if op.in_flight:
            rig.driver.cancel(op)
            rig.until(lambda: not op.in_flight)
        rig.nothing_comes()
    message = "Exception in the completion of an operation"
    assert told == [{"message": message, "exception": error} for error in raised]


def test_what_nobody_else_is_told_is_logged(rig: Rig, pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    def complete(value: Any, error: BaseException | None) -> None:
        raise Odd

    op = rig.submit(ops.Receive(pair[0], 10), complete)
    pair[1].send(b"data")
    rig.value(op)
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("iocp_loop", logging.ERROR)
    assert record.exc_info
    assert record.exc_info[0] is Odd


def test_what_a_complete_raises_at_the_end_of_the_driver(rig: Rig, pair: Pair, other: Pair) -> None:
    def complete(value: Any, error: BaseException | None) -> None:
        raise Odd

    told: list[dict[str, Any]] = []
    rig.driver.exception_handler = told.append
    rig.submit(ops.Receive(pair[0], 10), complete)
    op = rig.submit(ops.Receive(other[0], 10))
    rig.turn()
    rig.driver.close()
    assert rig.error(op).errno == errno.ECANCELED
    assert [type(each["exception"]) for each in told] == [Odd]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_loop_is_no_error_of_an_operation(rig: Rig, odd: OddSocket, pair: Pair, kind: Any) -> None:
    op = rig.submit(ops.ReceiveFrom(odd, 10))
    rig.turn()
    odd.error = kind()
    pair[1].send(b"data")
    try:
        rig.until(lambda: rig.completions(op))
    except kind:
        odd.error = None
    assert rig.value(op)[0] == b"data"


# --------------------------------------------------------------------------------------------------
# CompletionPort
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("concurrency", [0, 1])
def test_a_port_goes_on(driver: str, pair: Pair, odd: OddSocket, other: Pair, concurrency: int) -> None:
    with CompletionPort(concurrency, driver=driver) as port:

        def lend() -> Any:
            raise Odd

        failing = [
            ops.ReceiveFrom(odd, 10),
            ops.ReceiveStream(odd, lend),
            ops.Receive(odd, -1),
            ops.SendTo(odd, b"x", 5),
            ops.SendFile(odd, 0, 1.5, 10),  # type: ignore[arg-type]  # what the test is about
        ]
        pair[1].send(b"data")
        odd.error = VeryOdd()
        for op in failing:
            try:
                port.submit(op)
            except Exception:
                assert not op.in_flight
        for _ in range(20):
            if not port.in_flight:
                break
            completion = port.get(0.05)
            if completion is not None and completion.error is not None:
                with pytest.raises(BaseException) as raised:
                    completion.result()
                assert raised.value is completion.error
        odd.error = None
        for op in failing:
            port.cancel(op)
        port.submit(ops.Receive(other[0], 10))
        other[1].send(b"in order")
        while (completion := port.get(LIMIT)) is not None and completion.value != b"in order":
            pass
        assert completion is not None


# --------------------------------------------------------------------------------------------------
# Loops
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
async def test_a_future_gets_the_error(loop: Loop, odd: OddSocket, pair: Pair, kind: type[BaseException]) -> None:
    task = asyncio.create_task(loop.sock_recv(odd, 10) if WINDOWS else loop.sock_recvfrom(odd, 10))
    await turns()
    odd.error = error = kind("odd")
    pair[1].send(b"data")
    await asyncio.wait([task], timeout=LIMIT)
    if kind is asyncio.CancelledError:
        assert task.cancelled()
    elif kind is StopIteration:
        assert isinstance(task.exception(), RuntimeError)
    else:
        assert task.exception() is error


async def test_a_call_behind_a_cancelled_one_gets_its_error(loop: Loop, odd: OddSocket, pair: Pair) -> None:
    first = asyncio.create_task(loop.sock_recvfrom(odd, 10))
    await turns()
    first.cancel()
    odd.error = VeryOdd()
    with pytest.raises(VeryOdd):
        await loop.sock_recvfrom(odd, 10)
    with pytest.raises(asyncio.CancelledError):
        await first


@pytest.mark.parametrize("kind", [TypeError, VeryOdd])
async def test_a_stream_transport_on_a_socket_that_fails(
    loop: Loop, odd: OddSocket, pair: Pair, other: Pair, reports: list[dict[str, Any]], kind: Any
) -> None:
    protocol = await connected(loop, (odd, pair[1]))
    beside = await connected(loop, other)
    odd.error = error = kind("odd")
    pair[1].send(b"data")
    other[1].send(b"data")
    await until(lambda: beside.data)
    await until(lambda: protocol.finished or protocol.data)
    if protocol.finished:
        assert protocol.lost is error
        assert reports.pop()["exception"] is error
    odd.error = None
    protocol.transport.abort()
    await closed(beside)
    reports[:] = [report for report in reports if report["exception"] is not error]  # after the data, on iocp


@pytest.mark.parametrize("how", ["write", "writelines", "write a bytearray"])
async def test_a_stream_transport_whose_write_fails(
    loop: Loop, odd: OddSocket, pair: Pair, reports: list[dict[str, Any]], how: str
) -> None:
    protocol = await connected(loop, (odd, pair[1]))
    odd.error = error = VeryOdd()
    if how == "writelines":
        protocol.transport.writelines([b"one", b"two"])
    else:
        protocol.transport.write(b"data" if how == "write" else bytearray(b"data"))
    odd.error = None
    await until(lambda: protocol.finished)
    assert protocol.lost is error
    assert reports.pop()["exception"] is error


async def test_a_socket_that_somebody_closes_under_a_stream(loop: Loop, pair: Pair, other: Pair, reports: Any) -> None:
    """What is queued can't be sent any more: that ends the connection, and not the loop."""
    protocol = await connected(loop, pair)
    beside = await connected(loop, other)
    protocol.transport.write(bytes(8 << 20))
    protocol.transport.write(bytes(1 << 20))
    assert protocol.transport.get_write_buffer_size() > 0
    pair[0].close()
    got = asyncio.create_task(asyncio.to_thread(drain, pair[1]))
    other[1].send(b"data")
    await until(lambda: beside.data)
    protocol.transport.abort()
    await until(lambda: protocol.finished)
    await got
    await closed(beside)
    reports.clear()  # the drivers differ in what they see of it


def drain(sock: socket.socket) -> None:
    try:
        while sock.recv(1 << 20):
            pass
    except OSError:
        pass


async def test_a_socket_that_somebody_closes_under_an_endpoint(loop: Loop, other: Pair, reports: Any) -> None:
    beside = await connected(loop, other)
    sock = udp_socket()
    address = sock.getsockname()
    transport, protocol = await loop.create_datagram_endpoint(Endpoint, sock=sock)
    await turns()
    sock.close()
    with udp_socket() as peer:
        peer.sendto(b"data", address)
        transport.sendto(b"data", address)
        other[1].send(b"data")
        await until(lambda: beside.data)
    transport.abort()
    await until(lambda: protocol.finished)
    await closed(beside)
    reports.clear()


class Endpoint(asyncio.DatagramProtocol):
    finished = False
    lost: BaseException | None = None

    def connection_lost(self, exc: BaseException | None) -> None:
        self.finished = True
        self.lost = exc


@pytest.mark.parametrize("queued", [False, True])
@pytest.mark.skipif(WINDOWS, reason="UNIX datagrams")
async def test_an_address_that_makes_no_sense_ends_an_endpoint(
    loop: Loop, reports: list[dict[str, Any]], queued: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        path = os.path.join(folder, "receiver")
        receiver.bind(path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        sock.setblocking(False)
        transport, protocol = await loop.create_datagram_endpoint(Endpoint, sock=sock)
        if queued:
            while not transport.get_write_buffer_size():  # type: ignore[attr-defined]  # typeshed lacks it
                transport.sendto(b"data", path)
        transport.sendto(b"data", 5)  # type: ignore[arg-type]  # what the test is about
        receiver.setblocking(False)
        while not protocol.finished:
            with contextlib.suppress(BlockingIOError):
                receiver.recv(10)
            await asyncio.sleep(0)
        assert isinstance(protocol.lost, TypeError)
        assert reports.pop()["exception"] is protocol.lost


async def test_a_listener_that_fails_goes_on(
    loop: Loop, listener: socket.socket, reports: list[dict[str, Any]]
) -> None:
    served: list[Recorder] = []

    def serve() -> Recorder:
        served.append(Recorder())
        served[-1].keep_open_at_eof = False
        return served[-1]

    odd = OddSocket.of(listener)
    address = odd.getsockname()
    server = await loop.create_server(serve, sock=odd)
    odd.error = VeryOdd()
    with socket.create_connection(address, LIMIT), socket.create_connection(address, LIMIT):
        await turns(20)
        odd.error = None
        await until(lambda: len(served) == 2)
    await until(lambda: all(protocol.finished for protocol in served))
    assert all(type(each["exception"]) is VeryOdd for each in reports)
    reports.clear()
    server.close()
    await server.wait_closed()


async def test_what_a_complete_raises_goes_to_the_exception_handler(
    loop: Loop, pair: Pair, other: Pair, reports: list[dict[str, Any]]
) -> None:
    error = VeryOdd()

    def complete(value: Any, _: Any) -> None:
        raise error

    loop._proactor.start(ops.Receive(pair[0], 10), complete)
    pair[1].send(b"data")
    other[1].send(b"data")
    assert await loop.sock_recv(other[0], 10) == b"data"
    await until(lambda: reports)
    assert reports.pop() == {"message": "Exception in the completion of an operation", "exception": error}
