"""The contract of a driver (ports/driver.py), kind by kind, on each driver."""

from __future__ import annotations

import array
import errno
import gc
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from iocp_loop import operations as ops
from iocp_loop.operations import READABLE, WRITABLE, Operation
from iocp_loop.ports import Driver, make_driver

from .support import (
    LIMIT,
    WINDOWS,
    fill,
    in_thread,
    listening_socket,
    open_files,
    read_all,
    read_exactly,
    reset,
    tcp_pair,
    udp_socket,
)

Pair = tuple[socket.socket, socket.socket]

#: A turn that is to show that nothing comes; seconds.
A_MOMENT = 0.02


class Rig:
    """A driver and what it delivered: ``(operation, value, error)`` in order."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.delivered: list[tuple[Operation, Any, OSError | None]] = []

    def submit(self, op: Operation, then: Callable[[Any, OSError | None], object] | None = None) -> Any:
        """Submit `op`; its completions are noted, and given to `then`."""

        def complete(value: Any, error: OSError | None) -> None:
            self.delivered.append((op, value, error))
            if then is not None:
                then(value, error)

        op.complete = complete
        if isinstance(op.handle, socket.socket):
            self.driver.register(op.handle)
        self.driver.submit(op)
        return op

    def turn(self, timeout: float = 0.0) -> None:
        self.driver.wait(timeout)
        self.driver.dispatch()

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + LIMIT
        while not condition():
            assert time.monotonic() < deadline, f"it has not happened in time; delivered: {self.delivered}"
            self.turn(A_MOMENT)

    def nothing_comes(self) -> bool:
        """True if nothing is delivered for a moment."""
        before = len(self.delivered)
        for _ in range(3):
            self.turn(A_MOMENT)
        return len(self.delivered) == before

    def completions(self, op: Operation) -> list[tuple[Any, OSError | None]]:
        return [(value, error) for each, value, error in self.delivered if each is op]

    def values(self, op: Operation) -> list[Any]:
        return [value for value, error in self.completions(op) if error is None]

    def outcome(self, op: Operation) -> tuple[Any, OSError | None]:
        """Wait for the one completion of an ordinary operation."""
        self.until(lambda: not op.in_flight)
        self.until(lambda: self.completions(op))
        (completion,) = self.completions(op)
        return completion

    def value(self, op: Operation) -> Any:
        value, error = self.outcome(op)
        assert error is None
        return value

    def error(self, op: Operation) -> OSError:
        value, error = self.outcome(op)
        assert isinstance(error, OSError), value
        return error

    def last_error(self, op: Operation) -> OSError:
        """Wait for the end of a stream; the error that ended it."""
        self.until(lambda: not op.in_flight and self.completions(op) and self.completions(op)[-1][1])
        error = self.completions(op)[-1][1]
        assert error is not None
        return error

    def end(self, op: Operation) -> None:
        """Cancel `op` and see its last completion."""
        self.driver.cancel(op)
        assert self.last_error(op).errno == errno.ECANCELED


@pytest.fixture
def rig(driver: str, no_leak: None) -> Iterator[Rig]:
    rig = Rig(make_driver(driver))
    yield rig
    rig.driver.close()
    assert not rig.driver.in_flight


def received(rig: Rig, op: Operation) -> bytes:
    """What a receive stream has delivered."""
    return b"".join(bytes(value) for value in rig.values(op))


# -- submitting ------------------------------------------------------------------------------------


def test_a_submitted_operation_is_in_flight_until_it_completes(rig: Rig, pair: Pair) -> None:
    op = rig.submit(ops.Receive(pair[0], 10))
    assert op.state is ops.IN_FLIGHT
    assert list(rig.driver.in_flight.values()) == [op]
    assert rig.nothing_comes()
    pair[1].send(b"x")
    assert rig.value(op) == b"x"
    assert op.state is ops.DONE
    assert not rig.driver.in_flight
    assert rig.nothing_comes()


def test_what_is_done_at_once_comes_with_the_next_dispatch_and_not_by_recursion(rig: Rig, pair: Pair) -> None:
    pair[1].send(b"already here")
    deep: list[int] = []

    def receive_again(value: Any, error: OSError | None) -> None:
        # A driver that completed within submit would get here before the line after it.
        count = len(deep)
        if count < 200:
            pair[1].send(b"x")
            rig.submit(ops.Receive(pair[0], 1), receive_again)
            assert len(deep) == count
            deep.append(count)

    rig.submit(ops.Receive(pair[0], 100), receive_again)
    assert not rig.delivered
    rig.until(lambda: len(deep) == 200)
    rig.until(lambda: not rig.driver.in_flight)


def test_completions_that_lead_to_more_do_not_hold_dispatch_for_ever(rig: Rig, pair: Pair) -> None:
    def send_again(value: Any, error: OSError | None) -> None:
        if len(rig.delivered) < 1000:
            rig.submit(ops.Send(pair[0], b"x"), send_again)

    send_again(None, None)
    for _ in range(5):
        rig.turn()
    assert len(rig.delivered) < 100
    rig.until(lambda: len(rig.delivered) == 1000)


def test_an_operation_serves_once(rig: Rig, pair: Pair) -> None:
    op = rig.submit(ops.Receive(pair[0], 10))
    with pytest.raises(ValueError, match="once"):
        rig.driver.submit(op)
    assert list(rig.driver.in_flight.values()) == [op]
    pair[1].send(b"x")
    rig.value(op)
    with pytest.raises(ValueError, match="once"):
        rig.driver.submit(op)
    assert not rig.driver.in_flight


def test_an_unknown_kind_is_refused_and_nothing_is_in_flight(rig: Rig, pair: Pair) -> None:
    class Teleport(Operation):
        pass

    with pytest.raises(NotImplementedError, match="Teleport"):
        rig.driver.submit(Teleport(pair[0]))
    assert not rig.driver.in_flight


@pytest.mark.parametrize("kind", [ops.Readiness, ops.ReadinessStream])
@pytest.mark.parametrize("events", [0, 2, 64 | READABLE])
def test_readiness_for_unknown_events_is_refused(rig: Rig, pair: Pair, kind: Any, events: int) -> None:
    op = kind(pair[0], events)
    with pytest.raises(ValueError, match="events"):
        rig.driver.submit(op)
    assert op.state is ops.NEW
    assert not rig.driver.in_flight


def test_a_socket_closed_before_submit_is_an_error_either_way(rig: Rig) -> None:
    ours, peer = tcp_pair()
    peer.close()
    op = ops.Receive(ours, 10)
    ours.close()
    try:
        rig.submit(op)
    except (OSError, ValueError):
        assert op.state is ops.NEW
        assert rig.nothing_comes()
    else:
        rig.error(op)
    assert not rig.driver.in_flight


def test_statistics_count_what_happened(rig: Rig, pair: Pair) -> None:
    pair[1].send(b"x")
    rig.value(rig.submit(ops.Receive(pair[0], 1)))
    assert rig.driver.submissions[ops.Receive] == 1
    assert rig.driver.completions >= 1
    assert rig.driver.waits >= 1


# -- receiving -------------------------------------------------------------------------------------


def test_receive_takes_at_most_its_size(rig: Rig, pair: Pair) -> None:
    pair[1].send(b"abcdef")
    assert rig.value(rig.submit(ops.Receive(pair[0], 4))) == b"abcd"
    assert rig.value(rig.submit(ops.Receive(pair[0], 4))) == b"ef"


def test_receive_gives_real_bytes(rig: Rig, pair: Pair) -> None:
    pair[1].send(b"abc")
    assert type(rig.value(rig.submit(ops.Receive(pair[0], 10)))) is bytes


def test_receive_at_the_end_of_the_stream_is_empty(rig: Rig, pair: Pair) -> None:
    op = rig.submit(ops.Receive(pair[0], 10))
    pair[1].close()
    assert rig.value(op) == b""


def test_receive_on_a_reset_connection(rig: Rig, pair: Pair) -> None:
    op = rig.submit(ops.Receive(pair[0], 10))
    assert rig.nothing_comes()
    reset(pair[1])
    assert isinstance(rig.error(op), ConnectionResetError)


@pytest.mark.parametrize("late", [False, True], ids=["data first", "receive first"])
def test_receive_into_fills_the_buffer_and_no_more(rig: Rig, pair: Pair, late: bool) -> None:
    buffer = bytearray(b"........")
    if not late:
        pair[1].send(b"abc")
    op = rig.submit(ops.ReceiveInto(pair[0], memoryview(buffer)[2:6]))
    if late:
        assert rig.nothing_comes()
        pair[1].send(b"abc")
    assert rig.value(op) == 3
    assert buffer == b"..abc..."


def test_receive_into_a_buffer_of_numbers(rig: Rig, pair: Pair) -> None:
    numbers = array.array("I", [0, 0])
    sent = array.array("I", [7, 8])
    pair[1].send(sent.tobytes())
    assert rig.value(rig.submit(ops.ReceiveInto(pair[0], numbers))) == 8
    assert numbers == sent


def test_receive_into_at_the_end_of_the_stream_is_0(rig: Rig, pair: Pair) -> None:
    pair[1].close()
    assert rig.value(rig.submit(ops.ReceiveInto(pair[0], bytearray(10)))) == 0


def test_buffers_of_operations_in_flight_outlive_their_owners(rig: Rig, pair: Pair) -> None:
    rig.driver.register(pair[0])
    op = ops.ReceiveInto(pair[0], bytearray(1000))
    done: list[Any] = []
    op.complete = lambda value, error: done.append(value)
    rig.driver.submit(op)
    del op
    gc.collect()
    pair[1].send(b"x" * 1000)
    rig.until(lambda: done)
    assert done == [1000]


def test_two_directions_of_one_socket_do_not_wait_for_each_other(rig: Rig, pair: Pair) -> None:
    receive = rig.submit(ops.Receive(pair[0], 10))
    assert rig.value(rig.submit(ops.Send(pair[0], b"out"))) == 3
    assert receive.in_flight
    assert pair[1].recv(10) == b"out"
    pair[1].send(b"in")
    assert rig.value(receive) == b"in"


# -- sending ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [bytes, bytearray, memoryview, lambda data: array.array("B", data)])
def test_send_takes_any_buffer(rig: Rig, pair: Pair, make: Callable[[bytes], Any]) -> None:
    assert rig.value(rig.submit(ops.Send(pair[0], make(b"hello")))) == 5
    assert read_exactly(pair[1], 5) == b"hello"


def test_send_waits_for_room(rig: Rig, pair: Pair) -> None:
    filled = fill(pair[0])
    op = rig.submit(ops.Send(pair[0], b"end"))
    if not WINDOWS:  # where AFD takes one more send for buffering
        assert rig.nothing_comes()
    got = bytearray()
    with in_thread(lambda: got.extend(read_exactly(pair[1], filled + 3))):
        assert rig.value(op) == 3
    assert got.endswith(b"xend")


def test_send_to_a_reset_connection(rig: Rig, pair: Pair) -> None:
    reset(pair[1])
    time.sleep(A_MOMENT)
    assert isinstance(rig.error(rig.submit(ops.Send(pair[0], b"x"))), ConnectionError)


def test_send_all_of_nothing(rig: Rig, pair: Pair) -> None:
    assert rig.value(rig.submit(ops.SendAll(pair[0], [b"", b""]))) == 0


def test_send_all_sends_more_buffers_than_one_call_takes(rig: Rig, pair: Pair) -> None:
    buffers = [bytes([number % 256]) * (number % 3) for number in range(5000)]
    whole = b"".join(buffers)
    op = rig.submit(ops.SendAll(pair[0], buffers))
    assert rig.value(op) == op.sent == len(whole)
    assert read_exactly(pair[1], len(whole)) == whole


def test_send_all_of_more_than_the_kernel_buffers(rig: Rig, pair: Pair) -> None:
    buffers: list[Any] = [os.urandom(1 << 20), bytearray(os.urandom(5 << 20)), memoryview(os.urandom(3 << 20))]
    whole = b"".join(buffers)
    got = bytearray()
    op = rig.submit(ops.SendAll(pair[0], buffers))
    assert rig.nothing_comes()
    with in_thread(lambda: got.extend(read_exactly(pair[1], len(whole)))):
        assert rig.value(op) == len(whole)
    assert got == whole


def test_send_all_to_a_peer_that_resets_on_the_way(rig: Rig, pair: Pair) -> None:
    op = rig.submit(ops.SendAll(pair[0], [bytes(16 << 20)]))
    assert rig.nothing_comes()
    reset(pair[1])
    assert isinstance(rig.error(op), ConnectionError)


def test_a_cancelled_send_all_tells_how_much_was_sent(rig: Rig, pair: Pair) -> None:
    op = rig.submit(ops.SendAll(pair[0], [b"x" * (32 << 20)]))
    assert rig.nothing_comes()
    rig.driver.cancel(op)
    assert rig.error(op).errno == errno.ECANCELED
    pair[0].shutdown(socket.SHUT_WR)
    arrived = len(read_all(pair[1]))
    assert 0 < arrived < 32 << 20
    if not WINDOWS:  # an overlapped send that is cancelled half way does not tell how far it came
        assert op.sent == arrived


# -- connecting and accepting ----------------------------------------------------------------------


def test_accept_waits_for_a_connection(rig: Rig, listener: socket.socket) -> None:
    op = rig.submit(ops.Accept(listener))
    assert rig.nothing_comes()
    with socket.create_connection(listener.getsockname(), LIMIT) as client:
        sock, address = rig.value(op)
        with sock:
            assert address == client.getsockname()
            assert (sock.family, sock.type) == (listener.family, listener.type)
            assert sock.gettimeout() == 0
            assert not os.get_inheritable(sock.fileno()) if not WINDOWS else True
            assert sock.getpeername() == client.getsockname()
            assert sock.getsockname() == listener.getsockname()
            client.send(b"through")
            assert rig.value(rig.submit(ops.Receive(sock, 10))) == b"through"


def test_accept_takes_a_connection_that_waits_already(rig: Rig, listener: socket.socket) -> None:
    with socket.create_connection(listener.getsockname(), LIMIT) as client:
        sock, address = rig.value(rig.submit(ops.Accept(listener)))
        with sock:
            assert address == client.getsockname()


def test_accept_gives_an_ipv6_address_as_the_socket_module_does(rig: Rig) -> None:
    if not socket.has_ipv6:
        pytest.skip("this Python has no IPv6")
    with socket.socket(socket.AF_INET6) as listener:
        try:
            listener.bind(("::1", 0))
        except OSError as exc:
            pytest.skip(f"no IPv6 loopback here: {exc}")
        listener.listen()
        listener.setblocking(False)
        op = rig.submit(ops.Accept(listener))
        with socket.create_connection(listener.getsockname()[:2], LIMIT) as client:
            sock, address = rig.value(op)
            with sock:
                assert address == client.getsockname()
                assert sock.family == socket.AF_INET6


@pytest.mark.skipif(WINDOWS, reason="a unix socket is bound to a path, and Python has none on Windows")
def test_accept_and_connect_on_a_unix_socket(rig: Rig, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(path)
        listener.listen()
        listener.setblocking(False)
        client.setblocking(False)
        accept = rig.submit(ops.Accept(listener))
        assert rig.value(rig.submit(ops.Connect(client, path))) is None
        sock, address = rig.value(accept)
        with sock:
            assert address == ""
            assert client.getpeername() == path


def test_connect(rig: Rig, listener: socket.socket) -> None:
    with socket.socket() as client:
        client.setblocking(False)
        assert rig.value(rig.submit(ops.Connect(client, listener.getsockname()))) is None
        assert client.getpeername() == listener.getsockname()
        client.shutdown(socket.SHUT_WR)  # on Windows it fails unless the socket knows that it is connected


def test_connect_refused(rig: Rig) -> None:
    with listening_socket() as listener:
        address = listener.getsockname()
    with socket.socket() as client:
        client.setblocking(False)
        assert isinstance(rig.error(rig.submit(ops.Connect(client, address))), ConnectionRefusedError)


def test_a_cancelled_connect(rig: Rig) -> None:
    # The backlog of this listener is full, so that the system leaves further connections in the air.
    with listening_socket(backlog=0) as listener:
        clients = [socket.socket() for _ in range(8)]
        for client in clients:
            client.setblocking(False)
        connects = [rig.submit(ops.Connect(client, listener.getsockname())) for client in clients]
        rig.nothing_comes()
        for op in connects:
            rig.driver.cancel(op)
        for op in connects:
            _, error = rig.outcome(op)
            assert error is None or error.errno == errno.ECANCELED or isinstance(error, ConnectionRefusedError)
        for client in clients:
            client.close()


# -- datagrams -------------------------------------------------------------------------------------


def test_datagrams_there_and_back(rig: Rig) -> None:
    with udp_socket() as one, udp_socket() as two:
        receive = rig.submit(ops.ReceiveFrom(two, 100))
        assert rig.nothing_comes()
        assert rig.value(rig.submit(ops.SendTo(one, b"ping", two.getsockname()))) == 4
        assert rig.value(receive) == (b"ping", one.getsockname())
        buffer = bytearray(10)
        receive = rig.submit(ops.ReceiveFromInto(one, buffer))
        assert rig.value(rig.submit(ops.SendTo(two, memoryview(b"pong"), one.getsockname()))) == 4
        assert rig.value(receive) == (4, two.getsockname())
        assert buffer[:5] == b"pong\0"


def test_send_to_where_the_socket_is_connected(rig: Rig) -> None:
    with udp_socket() as one, udp_socket() as two:
        one.connect(two.getsockname())
        assert rig.value(rig.submit(ops.SendTo(one, b"ping", None))) == 4
        assert rig.value(rig.submit(ops.ReceiveFrom(two, 100))) == (b"ping", one.getsockname())


def test_an_empty_datagram_is_a_value(rig: Rig) -> None:
    with udp_socket() as one, udp_socket() as two:
        receive = rig.submit(ops.ReceiveFrom(two, 100))
        assert rig.value(rig.submit(ops.SendTo(one, b"", two.getsockname()))) == 0
        assert rig.value(receive) == (b"", one.getsockname())


def test_a_stream_of_datagrams_goes_on_until_cancelled(rig: Rig) -> None:
    with udp_socket() as one, udp_socket() as two:
        op = rig.submit(ops.ReceiveFromStream(two, 2000))
        messages = [bytes([number]) * number for number in range(50)]  # an empty one too
        for message in messages:
            one.sendto(message, two.getsockname())
        rig.until(lambda: len(rig.values(op)) == 50)
        assert rig.values(op) == [(message, one.getsockname()) for message in messages]
        assert op.in_flight
        rig.end(op)


def test_a_paused_stream_of_datagrams_rests(rig: Rig) -> None:
    with udp_socket() as one, udp_socket() as two:
        op = rig.submit(ops.ReceiveFromStream(two, 2000))
        one.sendto(b"1", two.getsockname())
        rig.until(lambda: rig.values(op))
        rig.driver.pause(op)
        rig.nothing_comes()  # what the kernel had handed over already may still come
        for number in range(2, 5):
            one.sendto(b"%d" % number, two.getsockname())
        rig.nothing_comes()
        rig.driver.resume(op)
        rig.until(lambda: len(rig.values(op)) == 4)
        assert [data for data, _ in rig.values(op)] == [b"1", b"2", b"3", b"4"]
        rig.end(op)


# -- files and pipes -------------------------------------------------------------------------------

posix_files = pytest.mark.skipif(
    WINDOWS, reason="a C runtime descriptor is no overlapped handle; test_iocp.py has files and pipes"
)


@pytest.fixture
def pipe(no_leak: None) -> Iterator[tuple[int, int]]:
    """The reading and the writing end of a pipe, non-blocking."""
    ends = os.pipe()
    for end in ends:
        os.set_blocking(end, False)
    yield ends
    for end in ends:
        try:
            os.close(end)
        except OSError:
            pass  # the test closed it


@posix_files
def test_read_from_a_pipe_waits_for_data(rig: Rig, pipe: tuple[int, int]) -> None:
    op = rig.submit(ops.Read(pipe[0], 10))
    assert rig.nothing_comes()
    os.write(pipe[1], b"hello")
    assert rig.value(op) == b"hello"
    buffer = bytearray(3)
    op = rig.submit(ops.ReadInto(pipe[0], buffer))
    os.write(pipe[1], b"abcd")
    assert rig.value(op) == 3
    assert buffer == b"abc"


@posix_files
def test_read_at_the_end_of_a_pipe_is_empty(rig: Rig, pipe: tuple[int, int]) -> None:
    op = rig.submit(ops.Read(pipe[0], 10))
    assert rig.nothing_comes()
    os.close(pipe[1])
    assert rig.value(op) == b""


@posix_files
def test_write_to_a_full_pipe_waits_for_room(rig: Rig, pipe: tuple[int, int]) -> None:
    filled = 0
    try:
        while True:
            filled += os.write(pipe[1], bytes(4096))
    except BlockingIOError:
        pass
    op = rig.submit(ops.Write(pipe[1], b"end"))
    assert rig.nothing_comes()
    while filled:
        filled -= len(os.read(pipe[0], filled))
    assert rig.value(op) == 3
    assert os.read(pipe[0], 10) == b"end"


@posix_files
def test_write_to_a_pipe_that_nobody_reads(rig: Rig, pipe: tuple[int, int]) -> None:
    os.close(pipe[0])
    assert isinstance(rig.error(rig.submit(ops.Write(pipe[1], b"x"))), BrokenPipeError)


@posix_files
def test_a_file_is_read_and_written_at_an_offset(rig: Rig, tmp_path: Path) -> None:
    with open(tmp_path / "file", "wb+", buffering=0) as file:
        assert rig.value(rig.submit(ops.Write(file, b"hello world", 5))) == 11
        assert rig.value(rig.submit(ops.Read(file, 5, 11))) == b"world"
        buffer = bytearray(100)
        assert rig.value(rig.submit(ops.ReadInto(file, buffer, 0))) == 16
        assert buffer[:16] == bytes(5) + b"hello world"
        assert rig.value(rig.submit(ops.Read(file, 5, 1000))) == b""


@posix_files
def test_a_file_without_offset_is_read_from_where_it_stands(rig: Rig, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"hello world")
    with open(path, "rb", buffering=0) as file:
        assert rig.value(rig.submit(ops.Read(file, 6))) == b"hello "
        assert rig.value(rig.submit(ops.Read(file, 100))) == b"world"
        assert rig.value(rig.submit(ops.Read(file, 100))) == b""


@posix_files
def test_a_file_opened_for_reading_only_is_not_written(rig: Rig, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with open(path, "rb", buffering=0) as file:
        assert rig.error(rig.submit(ops.Write(file, b"x"))).errno == errno.EBADF


# -- readiness -------------------------------------------------------------------------------------


def test_readiness_tells_what_holds(rig: Rig, pair: Pair) -> None:
    readable = rig.submit(ops.Readiness(pair[0], READABLE))
    assert rig.value(rig.submit(ops.Readiness(pair[0], WRITABLE))) == WRITABLE
    assert rig.nothing_comes()
    assert readable.in_flight
    pair[1].send(b"x")
    assert rig.value(readable) == READABLE
    assert pair[0].recv(10) == b"x"  # it was not taken


def test_readiness_for_either_event_completes_once(rig: Rig, pair: Pair) -> None:
    value = rig.value(rig.submit(ops.Readiness(pair[0], READABLE | WRITABLE)))
    assert value == WRITABLE
    pair[1].send(b"x")
    assert rig.nothing_comes()


def test_readiness_at_the_end_of_the_stream(rig: Rig, pair: Pair) -> None:
    op = rig.submit(ops.Readiness(pair[0], READABLE))
    pair[1].close()
    assert rig.value(op) == READABLE


def test_an_error_counts_as_every_event_that_was_asked_for(rig: Rig, pair: Pair) -> None:
    reset(pair[1])
    time.sleep(A_MOMENT)
    assert rig.value(rig.submit(ops.Readiness(pair[0], READABLE | WRITABLE))) == READABLE | WRITABLE


def test_a_readiness_stream_tells_while_it_holds_and_rests_while_not(rig: Rig, pair: Pair) -> None:
    op = rig.submit(ops.ReadinessStream(pair[0], READABLE))
    assert rig.nothing_comes()
    pair[1].send(b"x")
    rig.until(lambda: len(rig.values(op)) >= 3)  # level-triggered: it tells until the data are taken
    assert set(rig.values(op)) == {READABLE}
    pair[0].recv(10)
    rig.turn()  # one look may have been on its way
    rig.turn()
    assert rig.nothing_comes()
    pair[1].send(b"y")
    before = len(rig.values(op))
    rig.until(lambda: len(rig.values(op)) > before)
    rig.end(op)
    assert rig.nothing_comes()


def test_a_readiness_stream_for_both_events(rig: Rig, pair: Pair) -> None:
    op = rig.submit(ops.ReadinessStream(pair[0], READABLE | WRITABLE))
    rig.until(lambda: WRITABLE in rig.values(op))
    pair[1].send(b"x")
    rig.until(lambda: rig.values(op)[-3:] == [READABLE | WRITABLE] * 3)  # not one after the other
    rig.end(op)


def test_a_readiness_stream_may_be_cancelled_in_its_own_callback(rig: Rig, pair: Pair) -> None:
    op = ops.ReadinessStream(pair[0], WRITABLE)
    rig.submit(op, lambda value, error: rig.driver.cancel(op))
    assert rig.last_error(op).errno == errno.ECANCELED
    assert rig.values(op) == [WRITABLE]


@posix_files
def test_readiness_of_a_pipe(rig: Rig, pipe: tuple[int, int]) -> None:
    op = rig.submit(ops.Readiness(pipe[0], READABLE))
    assert rig.nothing_comes()
    os.write(pipe[1], b"x")
    assert rig.value(op) == READABLE
    assert rig.value(rig.submit(ops.Readiness(pipe[1], WRITABLE))) == WRITABLE


# -- streams ---------------------------------------------------------------------------------------


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


def test_a_receive_stream_ends_with_the_error(rig: Rig, pair: Pair) -> None:
    op = rig.submit(ops.ReceiveStream(pair[0]))
    pair[1].send(b"before")
    rig.until(lambda: rig.values(op))
    reset(pair[1])
    assert isinstance(rig.last_error(op), ConnectionResetError)
    assert received(rig, op) == b"before"
    assert rig.nothing_comes()


def test_a_cancelled_receive_stream_leaves_the_data_that_come_later(rig: Rig, pair: Pair) -> None:
    op = rig.submit(ops.ReceiveStream(pair[0]))
    pair[1].send(b"one")
    rig.until(lambda: rig.values(op))
    rig.end(op)
    pair[1].send(b"two")
    assert rig.nothing_comes()
    assert rig.value(rig.submit(ops.Receive(pair[0], 10))) == b"two"


def test_a_paused_receive_stream_rests_and_loses_nothing(rig: Rig, pair: Pair) -> None:
    op = rig.submit(ops.ReceiveStream(pair[0]))
    pair[1].send(b"1")
    rig.until(lambda: rig.values(op))
    rig.driver.pause(op)
    rig.nothing_comes()
    data = os.urandom(8 << 20)
    with in_thread(lambda: pair[1].sendall(data)) as sender:
        sender.join(0.2)
        rig.nothing_comes()
        # However much a driver reads ahead, a rest must reach the peer in the end.
        assert sender.is_alive()
        assert len(received(rig, op)) < len(data)
        rig.driver.resume(op)
        rig.until(lambda: len(received(rig, op)) == 1 + len(data))
    assert received(rig, op) == b"1" + data
    rig.end(op)


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

    def take(value: Any, error: OSError | None) -> None:
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


# -- cancelling ------------------------------------------------------------------------------------


def waiting_operations(sock: socket.socket) -> list[Operation]:
    """One operation of each kind that waits for something to arrive on a socket where nothing does."""
    return [
        ops.Receive(sock, 10),
        ops.ReceiveInto(sock, bytearray(10)),
        ops.Readiness(sock, READABLE),
        ops.ReadinessStream(sock, READABLE),
        ops.ReceiveStream(sock),
        ops.ReceiveStream(sock, get_buffer=lambda: bytearray(10)),
    ]


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("turns", [0, 1], ids=["before the kernel saw it", "in the kernel"])
def test_cancel_ends_an_operation_with_ecanceled(rig: Rig, pair: Pair, number: int, turns: int) -> None:
    op = rig.submit(waiting_operations(pair[0])[number])
    for _ in range(turns):
        rig.turn(A_MOMENT)
    rig.driver.cancel(op)
    assert not rig.delivered  # a cancel is a request: only dispatch delivers
    rig.driver.cancel(op)  # again is nothing
    assert rig.error(op).errno == errno.ECANCELED
    rig.driver.cancel(op)  # late is nothing
    assert rig.nothing_comes()


def test_cancel_of_an_accept(rig: Rig, listener: socket.socket) -> None:
    op = rig.submit(ops.Accept(listener))
    rig.turn(A_MOMENT)
    rig.driver.cancel(op)
    assert rig.error(op).errno == errno.ECANCELED


@pytest.mark.parametrize("kind", [ops.ReceiveFrom, ops.ReceiveFromStream])
def test_cancel_of_a_receive_from(rig: Rig, kind: Any) -> None:
    with udp_socket() as sock:
        op = rig.submit(kind(sock, 10))
        rig.turn(A_MOMENT)
        rig.driver.cancel(op)
        assert rig.error(op).errno == errno.ECANCELED


def test_cancel_of_what_was_never_submitted_is_nothing(rig: Rig, pair: Pair) -> None:
    op = ops.Receive(pair[0], 10)
    rig.driver.cancel(op)
    assert op.state is ops.NEW
    assert rig.nothing_comes()


def test_cancel_after_the_completion_was_gathered_keeps_the_value(rig: Rig, pair: Pair) -> None:
    pair[1].send(b"abc")
    op = rig.submit(ops.Receive(pair[0], 10))
    rig.driver.wait(LIMIT)
    rig.driver.cancel(op)
    value, error = rig.outcome(op)
    if error is not None:  # a driver that reads in dispatch has not read yet: then the data must still be there
        assert error.errno == errno.ECANCELED
        value = pair[0].recv(10)
    assert value == b"abc"


def test_cancel_of_one_operation_leaves_the_others_of_its_socket(rig: Rig, pair: Pair) -> None:
    one, two = rig.submit(ops.Readiness(pair[0], READABLE)), rig.submit(ops.Receive(pair[0], 10))
    rig.turn(A_MOMENT)
    rig.driver.cancel(one)
    assert rig.error(one).errno == errno.ECANCELED
    assert two.in_flight
    pair[1].send(b"x")
    assert rig.value(two) == b"x"


def test_operations_may_cancel_each_other_while_they_are_delivered(rig: Rig) -> None:
    pairs = [tcp_pair() for _ in range(2)]
    streams = [ops.ReceiveStream(ours) for ours, _ in pairs]
    rig.submit(streams[0], lambda value, error: rig.driver.cancel(streams[1]))
    rig.submit(streams[1], lambda value, error: rig.driver.cancel(streams[0]))
    rig.turn()
    for _, peer in pairs:
        peer.send(b"x")
    rig.until(lambda: not rig.driver.in_flight)
    rig.nothing_comes()
    for op in streams:
        assert [error for _, error in rig.completions(op)].count(None) <= 1
        error = rig.completions(op)[-1][1]
        assert error is not None
        assert error.errno == errno.ECANCELED
    for sock in (sock for pair in pairs for sock in pair):
        sock.close()


@pytest.mark.parametrize("number", range(6))
def test_cancel_of_an_operation_whose_socket_was_closed_behind_its_back(rig: Rig, number: int) -> None:
    ours, peer = tcp_pair()
    op = rig.submit(waiting_operations(ours)[number])
    rig.turn(A_MOMENT)
    ours.close()
    rig.driver.cancel(op)
    rig.until(lambda: not op.in_flight)
    rig.nothing_comes()
    ends = [error for _, error in rig.completions(op) if error is not None]
    assert len(ends) <= 1
    assert len(rig.completions(op)) >= 1
    # The number comes back with another socket, and that one works.
    again, other = tcp_pair()
    with peer, again, other:
        receive = rig.submit(ops.Receive(again, 10))
        other.send(b"fresh")
        assert rig.value(receive) == b"fresh"


@pytest.mark.skipif(WINDOWS, reason="closing a socket on Windows ends its operations")
def test_a_number_that_comes_back_with_another_socket_is_that_socket(rig: Rig) -> None:
    ours, peer = tcp_pair()
    again, other = tcp_pair()
    stale = rig.submit(ops.ReceiveStream(ours))
    rig.turn()
    number = ours.fileno()
    os.dup2(again.fileno(), number)  # closes `ours` behind everybody's back
    ours.detach()
    again.close()
    again = socket.socket(fileno=number)
    with peer, again, other:
        op = rig.submit(ops.ReceiveStream(again))
        other.send(b"fresh")
        rig.until(lambda: rig.values(op))
        assert rig.values(op) == [b"fresh"]
        assert not [value for value in rig.values(stale) if value]
        rig.end(op)
        rig.driver.cancel(stale)
        rig.until(lambda: not stale.in_flight)
        rig.nothing_comes()
        assert len([error for _, error in rig.completions(stale) if error]) == 1


# -- waiting and waking ----------------------------------------------------------------------------


def test_wait_blocks_no_longer_than_its_timeout_and_no_shorter(rig: Rig) -> None:
    resolution = time.get_clock_info("monotonic").resolution
    for timeout in (0.0, 0.0002, 0.001, 0.0017, 0.03):
        start = time.monotonic()
        rig.driver.wait(timeout)
        elapsed = time.monotonic() - start
        assert timeout - resolution <= elapsed < timeout + LIMIT / 4
        rig.driver.dispatch()


def test_wait_calls_nobody(rig: Rig, pair: Pair) -> None:
    rig.submit(ops.ReceiveStream(pair[0]))
    pair[1].send(b"x")
    rig.driver.wait(LIMIT)
    assert not rig.delivered
    rig.until(lambda: rig.delivered)


def test_wait_does_not_block_while_something_is_ready(rig: Rig, pair: Pair) -> None:
    pair[1].send(b"x")
    rig.submit(ops.Receive(pair[0], 10))
    start = time.monotonic()
    rig.driver.wait(LIMIT)
    assert time.monotonic() - start < LIMIT / 4
    rig.driver.dispatch()
    rig.until(lambda: rig.delivered)


def test_wake_from_another_thread_ends_a_wait(rig: Rig) -> None:
    rig.driver.wait(0)
    start = time.monotonic()

    def wake() -> None:
        while not rig.driver._sleeping:
            time.sleep(0.001)
        rig.driver.wake()

    with in_thread(wake):
        rig.driver.wait(LIMIT)
    assert time.monotonic() - start < LIMIT / 4
    assert rig.driver.wakes >= 1
    rig.driver.dispatch()
    start = time.monotonic()
    for _ in range(3):
        rig.turn(A_MOMENT)
    assert time.monotonic() - start >= A_MOMENT  # the wake was used up


def test_wake_costs_no_kernel_call_while_nobody_sleeps(rig: Rig) -> None:
    for _ in range(3):
        rig.driver.wake()
    assert rig.driver.wakes == 0


def test_before_sleep_closes_the_gap_between_the_last_look_and_the_sleep(rig: Rig) -> None:
    rig.driver.before_sleep = lambda: True
    start = time.monotonic()
    rig.driver.wait(LIMIT)
    assert time.monotonic() - start < LIMIT / 4


def test_many_wakes_from_many_threads(rig: Rig) -> None:
    items: list[int] = []
    rig.driver.before_sleep = lambda: bool(items)

    def produce() -> None:
        for number in range(200):
            items.append(number)
            rig.driver.wake()

    threads = [threading.Thread(target=produce, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    taken = 0
    deadline = time.monotonic() + LIMIT
    while taken < 800:
        assert time.monotonic() < deadline, "a wake was lost"
        rig.turn(LIMIT)
        while items:
            items.pop()
            taken += 1
    for thread in threads:
        thread.join()


# -- an exception that ends the loop ---------------------------------------------------------------


def test_dispatch_survives_an_exception_that_ends_the_loop(rig: Rig) -> None:
    pairs = [tcp_pair() for _ in range(5)]
    streams = []

    def interrupt(value: Any, error: OSError | None) -> None:
        if len(rig.delivered) == 2:
            raise KeyboardInterrupt

    for ours, _ in pairs:
        streams.append(rig.submit(ops.ReceiveStream(ours), interrupt))
    rig.turn()
    for _, peer in pairs:
        peer.send(b"x")
    time.sleep(A_MOMENT)
    with pytest.raises(KeyboardInterrupt):
        rig.until(lambda: False)
    assert len(rig.delivered) == 2
    rig.until(lambda: len(rig.delivered) == 5)
    for op in streams:
        assert rig.values(op) == [b"x"]
    for ours, peer in pairs:
        ours.close()
        peer.close()


def test_an_exception_leaves_what_is_ready_for_the_next_dispatch(rig: Rig, pair: Pair) -> None:
    pair[1].send(b"abc")

    def interrupt(value: Any, error: OSError | None) -> None:
        raise KeyboardInterrupt

    one = rig.submit(ops.Receive(pair[0], 1), interrupt)
    two = rig.submit(ops.Receive(pair[0], 1))
    with pytest.raises(KeyboardInterrupt):
        rig.until(lambda: False)
    assert rig.value(one) in (b"a", b"b")
    assert rig.value(two) in (b"a", b"b")


# -- closing ---------------------------------------------------------------------------------------


def test_close_ends_everything_in_flight_within_its_time(rig: Rig, pair: Pair, listener: socket.socket) -> None:
    with udp_socket() as datagrams:
        operations = [
            *(rig.submit(op) for op in waiting_operations(pair[0])),
            rig.submit(ops.AcceptStream(listener)),
            rig.submit(ops.ReceiveFromStream(datagrams, 100)),
            rig.submit(ops.SendAll(pair[0], [bytes(32 << 20)])),
        ]
        rig.turn(A_MOMENT)
        start = time.monotonic()
        rig.driver.close()
        assert time.monotonic() - start < 2.5
    assert rig.driver.closed
    assert not rig.driver.in_flight
    for op in operations:
        assert op.state is ops.DONE
        *_, (_, error) = rig.completions(op)
        assert error is not None
        assert error.errno == errno.ECANCELED
    rig.driver.close()  # again is nothing


def test_close_before_the_kernel_saw_the_operations(rig: Rig, pair: Pair) -> None:
    operations = [rig.submit(op) for op in waiting_operations(pair[0])]
    rig.driver.close()
    for op in operations:
        ((_, error),) = rig.completions(op)
        assert error is not None


def test_close_delivers_what_was_done_but_not_dispatched(rig: Rig, pair: Pair) -> None:
    pair[1].send(b"abc")
    op = rig.submit(ops.Receive(pair[0], 10))
    cancelled = rig.submit(ops.Readiness(pair[0], WRITABLE))
    rig.driver.wait(0)
    rig.driver.cancel(cancelled)
    rig.driver.close()
    for each in (op, cancelled):
        assert each.state is ops.DONE
        assert len(rig.completions(each)) == 1


def test_close_does_not_leak_connections_accepted_and_not_dispatched(rig: Rig, listener: socket.socket) -> None:
    op = rig.submit(ops.AcceptStream(listener))
    rig.turn()
    with socket.create_connection(listener.getsockname(), LIMIT):
        rig.driver.wait(LIMIT)
        before = open_files()
        rig.driver.close()
        for sock, _ in rig.values(op):
            sock.close()
        gc.collect()
        if before is not None:
            assert (open_files() or set()) <= before


def test_a_closed_driver_refuses(rig: Rig, pair: Pair) -> None:
    rig.driver.close()
    op = ops.Receive(pair[0], 10)
    with pytest.raises(ValueError, match="closed"):
        rig.driver.submit(op)
    assert op.state is ops.NEW
    rig.driver.cancel(op)
    rig.driver.wake()


def test_a_driver_that_was_never_used_closes(driver: str, no_leak: None) -> None:
    make_driver(driver).close()


def test_many_drivers_come_and_go(driver: str, no_leak: None) -> None:
    for _ in range(50):
        each = make_driver(driver)
        each.wait(0)
        each.dispatch()
        each.close()
