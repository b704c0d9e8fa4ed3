"""The Windows binding by itself: each function of _native/windows does what the driver relies on."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

if sys.platform != "win32":
    pytest.skip("I/O completion ports exist on Windows only", allow_module_level=True)

from iocp_loop import _iocp

ffi, lib = _iocp.ffi, _iocp.lib

PENDING = 997  # ERROR_IO_PENDING
ABORTED = 995  # ERROR_OPERATION_ABORTED
RETRY = 1237  # ERROR_RETRY
NOT_FOUND = 1168  # ERROR_NOT_FOUND
INVALID_PARAMETER = 87
CONNECTION_REFUSED = {10061, 1225}
CONNECTION_RESET = 10054


@pytest.fixture
def port() -> Iterator[Any]:
    assert lib.iocp_start() == 0
    port = ffi.new("iocp_port *")
    assert lib.iocp_port_open(port, 0) == 0
    yield port
    lib.iocp_port_close(port)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        one.setblocking(False)
        other.settimeout(10)
        yield one, other


def address(sub: Any) -> int:
    return int(ffi.cast("uintptr_t", sub))


def reap(port: Any, seconds: float = 10) -> list[tuple[int, int, int]]:
    """(address of the submission, bytes, error) of what completes within `seconds`."""
    assert lib.iocp_wait(port, int(seconds * 1e9)) == 0
    flat = ffi.unpack(port.batch, port.count * 3)
    port.count = 0
    return list(zip(*[iter(flat)] * 3, strict=True))


def associate(port: Any, sock: socket.socket) -> bool:
    skips = ffi.new("int[3]")
    assert lib.iocp_associate_socket(port, sock.fileno(), skips) == 0
    return bool(skips[0])


@pytest.mark.parametrize(
    ("status", "socket_error", "file_error"),
    [
        (0x00000000, 0, 0),
        (0x4000000F, 0, 0),  # STATUS_RECEIVE_PARTIAL, informational
        (0x40000010, 0, 0),  # STATUS_RECEIVE_EXPEDITED, informational
        (0x00000103, 997, 997),  # STATUS_PENDING
        (0x00000102, 10060, 0),  # STATUS_TIMEOUT, a success but for sockets
        (0x80000005, 10040, 234),  # STATUS_BUFFER_OVERFLOW: a datagram, a message of a pipe
        (0xC0000120, 995, 995),  # STATUS_CANCELLED
        (0xC000020D, 10054, None),  # STATUS_CONNECTION_RESET
        (0xC0000236, 10061, None),  # STATUS_CONNECTION_REFUSED
        (0xC000A012, 10052, None),  # STATUS_HOPLIMIT_EXCEEDED
        (0xC00000BE, 10051, 53),  # STATUS_BAD_NETWORK_PATH: no FileNotFoundError for a socket
        (0xC0000022, 10013, 5),  # STATUS_ACCESS_DENIED
        (0xC0000017, 10055, 8),  # STATUS_NO_MEMORY
        (0xC00000B0, 10058, 233),  # STATUS_PIPE_DISCONNECTED
        (0xC0000008, 10038, 6),  # STATUS_INVALID_HANDLE
    ],
)
def test_statuses_are_errors_by_their_names(status: int, socket_error: int, file_error: int | None) -> None:
    assert lib.iocp_error_of_status(status, 1) == socket_error
    if file_error is not None:
        assert lib.iocp_error_of_status(status, 0) == file_error


def test_a_wait_that_runs_out_takes_its_time(port: Any) -> None:
    started = time.perf_counter()
    assert reap(port, 0.05) == []
    assert time.perf_counter() - started >= 0.045
    assert reap(port, 0) == []


def test_a_post_from_another_thread_ends_a_wait(port: Any) -> None:
    threading.Timer(0.05, lib.iocp_post, [port]).start()
    started = time.perf_counter()
    assert reap(port, 30) == []
    assert time.perf_counter() - started < 20


def test_what_was_not_taken_is_not_lost(port: Any, pair: tuple[socket.socket, socket.socket]) -> None:
    one, other = pair
    associate(port, one)
    sub = ffi.new("iocp_submission *")
    assert lib.iocp_receive(one.fileno(), sub, ffi.NULL, 0) == PENDING
    other.send(b"x")
    assert lib.iocp_wait(port, 10_000_000_000) == 0
    assert port.count == 1
    assert lib.iocp_wait(port, -1) == 0
    assert port.count == 1
    assert reap(port, 0) == [(address(sub), 0, 0)]


def test_echo_over_acceptex_and_connectex(port: Any, listener: socket.socket) -> None:
    associate(port, listener)
    accepting, connecting = ffi.new("iocp_submission *"), ffi.new("iocp_submission *")
    listening = (listener.family, listener.type, listener.proto)
    assert lib.iocp_accept(listener.fileno(), accepting, *listening) == PENDING
    with socket.socket() as client:
        client.setblocking(False)
        skips = associate(port, client)
        host, number = listener.getsockname()
        assert lib.iocp_set_address(connecting, socket.AF_INET, host.encode(), number, 0, 0) == 0
        pending = {address(accepting)}
        if lib.iocp_connect(client.fileno(), connecting) == PENDING or not skips:
            pending.add(address(connecting))
        while pending:
            for which, _count, error in reap(port):
                assert error == 0
                pending.remove(which)
        assert lib.iocp_connect_finish(client.fileno()) == 0
        assert lib.iocp_accept_finish(listener.fileno(), accepting) == 0

        text, numbers = ffi.new("char[]", lib.IOCP_HOST_SIZE), ffi.new("unsigned long[3]")
        assert lib.iocp_get_address(accepting, text, numbers) == 0
        assert (ffi.string(text).decode(), numbers[0]) == client.getsockname()
        with socket.socket(fileno=accepting.accepted) as server:
            assert server.getpeername() == client.getsockname()
            assert client.getpeername() == server.getsockname()
            associate(port, server)
            receiving, sending = ffi.new("iocp_submission *"), ffi.new("iocp_submission *")
            buffer = ffi.new("char[]", 100)
            assert lib.iocp_receive(server.fileno(), receiving, buffer, 100) == PENDING
            assert lib.iocp_send(client.fileno(), sending, ffi.from_buffer(b"hello"), 5) in (0, PENDING)
            results = reap(port)  # the send's completion too, where the provider does not skip it
            while address(receiving) not in [each[0] for each in results]:
                results += reap(port)
            assert (address(receiving), 5, 0) in results
            pieces = [ffi.from_buffer(ffi.buffer(buffer, 5)), ffi.from_buffer(b", world")]
            sizes = ffi.new("unsigned long[]", [5, 7])
            again = ffi.new("iocp_submission *")
            buffers = ffi.new("void *[]", pieces)
            assert lib.iocp_send_gathered(server.fileno(), again, 2, buffers, sizes) in (0, PENDING)
            client.settimeout(10)
            assert client.recv(100) == b"hello, world"
            reap(port, 0)


def test_a_cancelled_receive_completes_as_aborted(port: Any, pair: tuple[socket.socket, socket.socket]) -> None:
    one, _other = pair
    associate(port, one)
    sub = ffi.new("iocp_submission *")
    assert lib.iocp_receive(one.fileno(), sub, ffi.NULL, 0) == PENDING
    assert lib.iocp_cancel(sub) == 0
    assert reap(port) == [(address(sub), 0, ABORTED)]
    assert lib.iocp_cancel(sub) == NOT_FOUND


def test_a_request_that_its_thread_left_behind_says_so(port: Any, pair: tuple[socket.socket, socket.socket]) -> None:
    # Wine: the thread that made the request ends before it has written the result.
    sub = ffi.new("iocp_submission *")
    assert lib.iocp_associate_socket(port, pair[0].fileno(), ffi.new("int[3]")) == 0
    assert lib.iocp_receive(pair[0].fileno(), sub, ffi.NULL, 0) == PENDING
    assert lib.iocp_cancel(sub) == 0
    time.sleep(0.1)  # now the entry is on the port
    ffi.cast("uintptr_t *", sub)[0] = 0x103  # STATUS_PENDING, in OVERLAPPED.Internal
    assert reap(port) == [(address(sub), 0, RETRY)]


def test_a_refused_connection_says_so(port: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    with socket.socket() as client:
        associate(port, client)
        sub = ffi.new("iocp_submission *")
        lib.iocp_set_address(sub, socket.AF_INET, b"127.0.0.1", number, 0, 0)
        assert lib.iocp_connect(client.fileno(), sub) == PENDING
        ((which, _count, error),) = reap(port)
        assert which == address(sub)
        assert error in CONNECTION_REFUSED


def test_a_reset_is_a_reset_and_not_a_deleted_network_name(
    port: Any, pair: tuple[socket.socket, socket.socket]
) -> None:
    one, other = pair
    associate(port, one)
    sub = ffi.new("iocp_submission *")
    assert lib.iocp_receive(one.fileno(), sub, ffi.NULL, 0) == PENDING
    other.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0")
    other.close()
    assert reap(port) == [(address(sub), 0, CONNECTION_RESET)]


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_a_datagram_and_its_address(port: Any, family: socket.AddressFamily, host: str) -> None:
    with socket.socket(family, socket.SOCK_DGRAM) as one, socket.socket(family, socket.SOCK_DGRAM) as other:
        one.bind((host, 0))
        other.bind((host, 0))
        associate(port, one)
        associate(port, other)
        receiving, sending = ffi.new("iocp_submission *"), ffi.new("iocp_submission *")
        buffer = ffi.new("char[]", 100)
        assert lib.iocp_receive_from(one.fileno(), receiving, buffer, 100) == PENDING
        lib.iocp_set_address(sending, family, host.encode(), one.getsockname()[1], 0, 0)
        assert lib.iocp_send_to(other.fileno(), sending, ffi.from_buffer(b"hi"), 2) in (0, PENDING)
        seen = dict.fromkeys((address(receiving), address(sending)))
        while None in seen.values():
            for which, count, error in reap(port):
                assert (count, error) == (2, 0)
                seen[which] = count
        text, numbers = ffi.new("char[]", lib.IOCP_HOST_SIZE), ffi.new("unsigned long[3]")
        assert lib.iocp_get_address(receiving, text, numbers) == 0
        assert (ffi.string(text).decode(), *list(numbers)[: len(other.getsockname()) - 1]) == other.getsockname()


def test_readiness_of_a_socket(port: Any, pair: tuple[socket.socket, socket.socket]) -> None:
    one, other = pair
    device, base = ffi.new("uintptr_t *"), ffi.new("uintptr_t *")
    assert lib.iocp_poll_open(port, device) == 0
    assert lib.iocp_base_socket(one.fileno(), base) == 0
    reading, writing = ffi.new("iocp_submission *"), ffi.new("iocp_submission *")
    assert lib.iocp_poll(device[0], reading, base[0], lib.IOCP_READABLE) == PENDING
    assert reap(port, 0) == []
    assert lib.iocp_poll(device[0], writing, base[0], lib.IOCP_WRITABLE) == PENDING
    assert [each[0] for each in reap(port)] == [address(writing)]
    assert lib.iocp_polled(writing) == lib.IOCP_WRITABLE
    other.send(b"x")
    assert [each[0] for each in reap(port)] == [address(reading)]
    assert lib.iocp_polled(reading) == lib.IOCP_READABLE
    one.recv(1)
    assert lib.iocp_poll(device[0], reading, base[0], lib.IOCP_READABLE) == PENDING
    assert lib.iocp_cancel(reading) == 0
    assert [(each[0], each[2]) for each in reap(port)] == [(address(reading), ABORTED)]
    lib.iocp_close_handle(device[0])


def test_named_pipes(port: Any) -> None:
    name = rf"\\.\pipe\iocp_loop-test-{time.perf_counter_ns()}"
    skips, server, client = ffi.new("int *"), ffi.new("uintptr_t *"), ffi.new("uintptr_t *")
    assert lib.iocp_pipe_serve(name, 1, 65536, server) == 0
    assert lib.iocp_associate_file(port, server[0], skips) == 0
    accepting = ffi.new("iocp_submission *")
    assert lib.iocp_pipe_accept(server[0], accepting) == PENDING
    assert lib.iocp_pipe_connect(name, client) == 0
    assert reap(port) == [(address(accepting), 0, 0)]
    assert lib.iocp_associate_file(port, client[0], skips) == 0
    assert not lib.iocp_is_synchronous(client[0])
    reading, writing = ffi.new("iocp_submission *"), ffi.new("iocp_submission *")
    buffer = ffi.new("char[]", 100)
    assert lib.iocp_read(client[0], reading, buffer, 100, 0) == PENDING
    assert lib.iocp_write(server[0], writing, ffi.from_buffer(b"hello"), 5, 0) in (0, PENDING)
    assert (address(reading), 5, 0) in reap(port)
    assert ffi.buffer(buffer, 5)[:] == b"hello"
    lib.iocp_close_handle(client[0])
    lib.iocp_close_handle(server[0])


def test_a_wait_for_a_handle_posts_once_or_is_taken_back(port: Any) -> None:
    import _overlapped

    event = _overlapped.CreateEvent(None, True, False, None)
    sub = ffi.new("iocp_submission *")
    assert lib.iocp_watch_handle(port, sub, event) == PENDING
    assert reap(port, 0) == []
    _overlapped.SetEvent(event)
    assert reap(port) == [(address(sub), 0, 0)]
    assert lib.iocp_unwatch_handle(sub) == 1
    _overlapped.ResetEvent(event)
    assert lib.iocp_watch_handle(port, sub, event) == PENDING
    assert lib.iocp_unwatch_handle(sub) == 0
    _overlapped.SetEvent(event)
    assert reap(port, 0.05) == []
    lib.iocp_close_handle(event)


def test_a_socket_of_another_port_is_used_by_event(port: Any, pair: tuple[socket.socket, socket.socket]) -> None:
    one, other = pair
    first = ffi.new("iocp_port *")
    assert lib.iocp_port_open(first, 0) == 0
    associate(first, one)
    assert lib.iocp_associate_socket(port, one.fileno(), ffi.new("int[3]")) == INVALID_PARAMETER
    sub = ffi.new("iocp_submission *")
    buffer = ffi.new("char[]", 100)
    assert lib.iocp_emulate(sub) == 0
    assert lib.iocp_receive(one.fileno(), sub, buffer, 100) == PENDING
    assert lib.iocp_emulate_watch(port, sub, lib.IOCP_KEY_SOCKET) == 0
    other.send(b"hello")
    assert reap(port) == [(address(sub), 5, 0)]
    lib.iocp_emulate_finish(sub)
    assert reap(first, 0) == []
    lib.iocp_port_close(first)


def test_the_rest_of_a_file_goes_out(port: Any, pair: tuple[socket.socket, socket.socket], tmp_path: Any) -> None:
    import msvcrt

    one, other = pair
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    associate(port, one)
    sub = ffi.new("iocp_submission *")
    with path.open("rb") as file:
        handle = msvcrt.get_osfhandle(file.fileno())
        assert lib.iocp_is_synchronous(handle)
        assert lib.iocp_transmit_file(one.fileno(), sub, handle, 4, 6) in (0, PENDING)
        assert other.recv(100) == b"456789"
        reap(port, 0)
