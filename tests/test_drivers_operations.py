"""The contract of a driver, operation by operation, on each driver."""

from __future__ import annotations

import array
import errno
import gc
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from iocp_loop import operations as ops
from iocp_loop.operations import READABLE, WRITABLE

from .rig import A_MOMENT, Pair, Rig
from .support import LIMIT, WINDOWS, fill, in_thread, listening_socket, read_all, read_exactly, reset, udp_socket

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


@pytest.mark.every_poller
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


@pytest.mark.every_poller
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


@pytest.mark.every_poller
def test_connect(rig: Rig, listener: socket.socket) -> None:
    with socket.socket() as client:
        client.setblocking(False)
        assert rig.value(rig.submit(ops.Connect(client, listener.getsockname()))) is None
        assert client.getpeername() == listener.getsockname()
        client.shutdown(socket.SHUT_WR)  # on Windows it fails unless the socket knows that it is connected


@pytest.mark.every_poller
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


@pytest.mark.every_poller
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


@pytest.mark.every_poller
def test_an_error_counts_as_every_event_that_was_asked_for(rig: Rig, pair: Pair) -> None:
    reset(pair[1])
    time.sleep(A_MOMENT)
    assert rig.value(rig.submit(ops.Readiness(pair[0], READABLE | WRITABLE))) == READABLE | WRITABLE


@pytest.mark.every_poller
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


@pytest.mark.every_poller
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
