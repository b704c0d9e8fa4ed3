"""What only driver iocp has: overlapped files and pipes, its accounts, timers of Windows."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import socket
import sys
import time
import tracemalloc
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if sys.platform != "win32":
    pytest.skip("I/O completion ports exist on Windows only", allow_module_level=True)

import _winapi
import msvcrt

import iocp_loop
from iocp_loop import CompletionPort
from iocp_loop import operations as ops
from iocp_loop.ports.iocp import readiness as iocp_readiness
from iocp_loop.ports.iocp.binding import ffi, lib
from iocp_loop.ports.iocp.driver import IocpDriver

from .support import LIMIT, WINE, Echo, in_thread, listening_socket, read_all, read_exactly, reset, udp_socket
from .windows_rig import Handle, result

Pair = tuple[socket.socket, socket.socket]

FLAG_OVERLAPPED = 0x40000000  # FILE_FLAG_OVERLAPPED
CREATE_ALWAYS = 2


@pytest.fixture
def port() -> Iterator[CompletionPort]:
    with CompletionPort(driver="iocp") as port:
        yield port
    assert port.in_flight == 0


def overlapped_file(path: Path) -> Handle:
    access = _winapi.GENERIC_READ | _winapi.GENERIC_WRITE
    number = _winapi.CreateFile(str(path), access, 0, _winapi.NULL, CREATE_ALWAYS, FLAG_OVERLAPPED, _winapi.NULL)
    return Handle(number)


# -- files and pipes -------------------------------------------------------------------------------


def test_a_file_is_written_and_read_at_offsets(port: CompletionPort, tmp_path: Path) -> None:
    with overlapped_file(tmp_path / "file") as file:
        assert result(port, ops.Write(file, b"hello, world", 0)) == 12
        assert result(port, ops.Write(file, b"W", 7)) == 1
        assert result(port, ops.Read(file, 100, 7)) == b"World"
        buffer = bytearray(5)
        assert result(port, ops.ReadInto(file, buffer, 0)) == 5
        assert buffer == b"hello"
        assert result(port, ops.Read(file, 100, 12)) == b""


def test_a_file_without_an_offset_is_read_on_from_where_it_stands(port: CompletionPort, tmp_path: Path) -> None:
    with overlapped_file(tmp_path / "file") as file:
        result(port, ops.Write(file, b"0123456789", 0))
        assert [result(port, ops.Read(file, 4)) for _ in range(4)] == [b"0123", b"4567", b"89", b""]


def test_a_file_without_overlapped_io_is_refused(port: CompletionPort, tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        handle = msvcrt.get_osfhandle(file.fileno())
        with pytest.raises(OSError, match="without overlapped") as caught:
            port.submit(ops.Write(handle, b"x"))
    assert caught.value.winerror == 87
    assert port.in_flight == 0


def test_a_pipe_carries_bytes_both_ways_and_ends(port: CompletionPort, pipe: tuple[Handle, Handle]) -> None:
    one, other = pipe
    reading = ops.Read(one, 100)
    port.submit(reading)
    assert port.get(0) is None
    port.submit(ops.Write(other, b"hello"))
    values = {}
    for _ in range(2):
        completion = port.get(LIMIT)
        assert completion is not None
        assert completion.operation is not None
        values[completion.operation.kind] = completion.result()
    assert values == {"Read": b"hello", "Write": 5}
    assert result(port, ops.Write(one, b"back")) == 4
    assert result(port, ops.Read(other, 100)) == b"back"


def test_reading_a_pipe_whose_writer_is_gone_gives_the_end(port: CompletionPort) -> None:
    name = rf"\\.\pipe\iocp_loop-test-{os.getpid()}-{time.perf_counter_ns()}"
    server, client = ffi.new("uintptr_t *"), ffi.new("uintptr_t *")
    assert lib.iocp_pipe_serve(name, 1, 65536, server) == 0
    assert lib.iocp_pipe_connect(name, client) == 0
    with Handle(server[0]) as one:
        reading = ops.Read(one, 100)
        port.submit(reading)
        _winapi.CloseHandle(client[0])
        completion = port.get(LIMIT)
        assert completion is not None
        assert completion.result() == b""


def test_a_cancelled_read_of_a_pipe(port: CompletionPort, pipe: tuple[Handle, Handle]) -> None:
    reading = ops.Read(pipe[0], 100)
    port.submit(reading)
    port.cancel(reading)
    completion = port.get(LIMIT)
    assert completion is not None
    assert completion.error is not None
    assert completion.error.errno == errno.ECANCELED


def test_part_of_a_file_is_sent(port: CompletionPort, pair: Pair, tmp_path: Path) -> None:
    ours, peer = pair
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    with path.open("rb") as file:
        assert result(port, ops.SendFile(ours, file.fileno(), 2, 5)) == 5
        assert read_exactly(peer, 5) == b"23456"
        assert result(port, ops.SendFile(ours, file.fileno(), 8, 100)) == 2
        assert read_exactly(peer, 2) == b"89"
        assert result(port, ops.SendFile(ours, file.fileno(), 10, 100)) == 0


# -- accepting -------------------------------------------------------------------------------------


def test_an_accept_stream_outlives_clients_that_reset(listener: socket.socket) -> None:
    with CompletionPort(driver="iocp") as port:
        stream = ops.AcceptStream(listener, depth=3)
        port.submit(stream)
        for _ in range(20):
            reset(socket.create_connection(listener.getsockname(), LIMIT))
        with socket.create_connection(listener.getsockname(), LIMIT) as client:
            while True:
                completion = port.get(LIMIT)
                assert completion is not None
                sock, address = completion.result()
                sock.close()
                if address == client.getsockname():
                    break
        assert stream.in_flight


def test_accepts_that_a_shortage_has_cost_are_made_again(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream went on with what the shortage had left, for as long as the server ran."""
    driver = IocpDriver()
    arm = driver._arm_accept
    room = 2

    def arm_if_there_is_room(sub: Any) -> None:
        if outstanding() >= room:
            raise OSError(errno.ENOBUFS, "no buffer space available")
        arm(sub)

    def outstanding() -> int:
        return sum(sub.op is op for sub in driver._outstanding.values())

    def accept_one() -> None:
        with socket.create_connection(listener.getsockname(), LIMIT):
            while not got:
                driver.wait(LIMIT)
                driver.dispatch()
            got.pop()[0].close()

    got: list[Any] = []
    monkeypatch.setattr(driver, "_arm_accept", arm_if_there_is_room)
    op = ops.AcceptStream(listener, depth=4)
    op.complete = lambda value, error: got.append(error or value)
    driver.submit(op)
    assert outstanding() == 2
    room = 0
    accept_one()
    assert outstanding() == 1
    room = 100
    accept_one()
    assert outstanding() == 4
    accept_one()
    assert outstanding() == 4
    monkeypatch.undo()
    driver.close()
    assert isinstance(got.pop(), OSError)
    assert not got


def test_a_datagram_that_is_faster_than_the_cancel_is_delivered_before_the_end() -> None:
    with CompletionPort(driver="iocp") as port, udp_socket() as one, udp_socket() as other:
        stream = ops.ReceiveFromStream(one, 100)
        port.submit(stream)
        other.sendto(b"hello", one.getsockname())
        time.sleep(0.05)
        port.cancel(stream)
        completion = port.get(LIMIT)
        assert completion is not None
        assert completion.result() == (b"hello", other.getsockname())
        completion = port.get(LIMIT)
        assert completion is not None
        assert completion.error is not None
        assert completion.error.errno == errno.ECANCELED
        assert not stream.in_flight


def test_closing_with_accepts_in_flight_closes_their_sockets(listener: socket.socket) -> None:
    port = CompletionPort(driver="iocp")
    port.submit(ops.AcceptStream(listener, depth=8))
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        port.close()
    assert time.perf_counter() - started < LIMIT / 2


# -- the driver ------------------------------------------------------------------------------------


def test_a_new_socket_with_an_old_number_is_associated_anew(port: CompletionPort) -> None:
    numbers = []
    for _ in range(5):
        with listening_socket() as listener:
            numbers.append(listener.fileno())
            accepting = ops.Accept(listener)
            port.submit(accepting)
            with socket.create_connection(listener.getsockname(), LIMIT):
                completion = port.get(LIMIT)
                assert completion is not None
                completion.result()[0].close()
    assert len(set(numbers)) < len(numbers)


def test_a_socket_in_a_new_wrapper_goes_on(port: CompletionPort, pair: Pair) -> None:
    ours, peer = pair
    assert result(port, ops.Send(ours, b"one")) == 3
    with socket.socket(fileno=ours.detach()) as again:
        again.setblocking(False)
        assert result(port, ops.Send(again, b"two")) == 3
        assert read_exactly(peer, 6) == b"onetwo"


def test_submissions_are_used_again(pair: Pair) -> None:
    ours, peer = pair
    driver = IocpDriver()
    for _ in range(100):
        op = ops.Send(ours, b"x")
        driver.submit(op)
        while op.in_flight:
            driver.wait(LIMIT)
            driver.dispatch()
    assert len(driver._spare) == 1
    assert len(read_exactly(peer, 100)) == 100
    driver.close()


def test_a_device_carries_a_limited_number_of_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iocp_readiness, "POLLS_PER_DEVICE", 2)
    driver = IocpDriver()
    pairs = [socket.socketpair() for _ in range(5)]
    polls = [ops.Readiness(one, ops.READABLE) for one, _ in pairs]
    for op in polls:
        driver.submit(op)
    assert [device.polls for device in driver._devices] == [2, 2, 1]
    for _, other in pairs:
        other.send(b"x")
    while driver.in_flight:
        driver.wait(LIMIT)
        driver.dispatch()
    assert [device.polls for device in driver._devices] == [0, 0, 0]
    driver.close()
    for one, other in pairs:
        one.close()
        other.close()


def test_a_poll_that_is_cancelled_while_it_delivers_makes_room(pair: Pair) -> None:
    ours, _ = pair
    driver = IocpDriver()
    op = ops.ReadinessStream(ours, ops.WRITABLE)
    op.complete = lambda value, error: driver.cancel(op)
    driver.submit(op)
    while driver.in_flight:
        driver.wait(LIMIT)
        driver.dispatch()
    driver.dispatch()
    assert [device.polls for device in driver._devices] == [0]
    driver.close()


def test_an_exception_in_dispatch_loses_no_other_completion() -> None:
    driver = IocpDriver()
    pairs = [socket.socketpair() for _ in range(3)]
    seen: list[bytes] = []

    def complete(value: bytes, error: BaseException | None) -> None:
        if error is None:
            seen.append(value)
            raise KeyboardInterrupt

    for one, _ in pairs:
        one.setblocking(False)
        op = ops.Receive(one, 10)
        op.complete = complete
        driver.submit(op)
    for number, (_, other) in enumerate(pairs):
        other.send(b"%d" % number)
    deadline = time.monotonic() + LIMIT
    while driver.in_flight and time.monotonic() < deadline:
        driver.wait(0.1)
        try:
            driver.dispatch()
        except KeyboardInterrupt:
            continue
    assert sorted(seen) == [b"0", b"1", b"2"]
    driver.close()
    for one, other in pairs:
        one.close()
        other.close()


def test_an_unclosed_driver_keeps_what_the_kernel_may_write_to(pair: Pair) -> None:
    ours, peer = pair
    driver = IocpDriver()
    driver.submit(ops.Receive(ours, 100))
    del driver
    gc.collect()
    peer.send(b"x")  # completes into memory that must still be there
    peer.close()
    time.sleep(0.05)


def test_a_port_that_is_closed_associates_nothing(pair: Pair) -> None:
    driver = IocpDriver()
    driver.close()
    with pytest.raises(ValueError, match="closed"):
        driver.register(pair[0])
    with pytest.raises(ValueError, match="closed"):
        driver.submit(ops.Send(pair[0], b"x"))


def test_much_data_both_ways(port: CompletionPort, pair: Pair) -> None:
    ours, peer = pair
    data = os.urandom(1 << 20)
    pieces = [data[start : start + 4096] for start in range(0, len(data), 4096)]  # more than one call gathers
    got: list[bytes] = []
    with in_thread(lambda: got.append(read_all(peer))):
        assert result(port, ops.SendAll(ours, pieces)) == len(data)
        ours.shutdown(socket.SHUT_WR)
    assert got == [data]


@pytest.mark.parametrize("count", [5, 500], ids=["a few", "more than a request may name"])
def test_what_is_sent_of_several_buffers_is_counted_by_32_bits(
    port: CompletionPort, pair: Pair, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system counts the bytes of a request in a DWORD: of 4 GiB and some it would report some, sent again then."""
    asked: list[int] = []
    send, send_gathered = lib.iocp_send, lib.iocp_send_gathered

    def note_send(fd: int, sub: Any, buffer: Any, size: int) -> Any:
        asked.append(size)
        return send(fd, sub, buffer, size)

    def note_gathered(fd: int, sub: Any, number: int, buffers: Any, sizes: Any) -> Any:
        asked.append(sum(sizes[0:number]))
        return send_gathered(fd, sub, number, buffers, sizes)

    monkeypatch.setattr(lib, "iocp_send", note_send)
    monkeypatch.setattr(lib, "iocp_send_gathered", note_gathered)
    everything = (4 << 30) + 5000
    front = bytes(range(250)) * 8
    piece = memoryview(bytes(everything // count - len(front) // count))
    tracemalloc.start()
    op = ops.SendAll(pair[0], [*(front[n : n + 50] for n in range(0, 2000, 50)), *[piece] * count])
    port.register(pair[0])
    port.submit(op)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20  # none but the front is copied
    tracemalloc.stop()
    got: list[bytes] = []
    with in_thread(lambda: got.append(read_exactly(pair[1], 2 << 20))):
        while not got:
            assert port.get(0.05) is None
    assert got[0] == front + bytes((2 << 20) - len(front))
    port.cancel(op)
    completion = port.get(LIMIT)
    assert completion is not None
    assert completion.operation is op
    assert max(asked) <= 1 << 20


# -- UNIX sockets ----------------------------------------------------------------------------------


async def connect_and_listen(loop: iocp_loop.IocpEventLoop, path: Path, reason: str) -> None:
    with pytest.raises(NotImplementedError, match=reason):
        await loop.create_unix_connection(Echo, path)
    with pytest.raises(NotImplementedError, match=reason):
        await loop.create_unix_server(Echo, path)


@pytest.mark.skipif(hasattr(socket, "AF_UNIX"), reason="this Python has UNIX sockets: test_unix.py runs")
async def test_without_unix_sockets_in_python_the_error_says_so(loop: iocp_loop.IocpEventLoop, tmp_path: Path) -> None:
    await connect_and_listen(loop, tmp_path / "socket", "this Python")


@pytest.mark.skipif(not WINE, reason="Windows has UNIX sockets; Wine has none")
async def test_without_unix_sockets_in_the_system_the_error_says_so(
    loop: iocp_loop.IocpEventLoop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "AF_UNIX", 1, raising=False)
    await connect_and_listen(loop, tmp_path / "socket", "this system")


# -- timers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("high_resolution", [True, False])
def test_sleeps_are_never_short_and_short_ones_are_fine(high_resolution: bool) -> None:
    loop = iocp_loop.new_event_loop("iocp")
    native = loop._proactor.driver._port
    timer = native.timer
    if high_resolution and not timer:
        loop.close()
        pytest.skip("this Windows has no high-resolution timer, or cannot tie one to a port")
    if not high_resolution:
        native.timer = 0
    took = []
    for delay in [0.0003, 0.002, 0.0051, 0.031, 0.032, 0.05] + [0.001] * 20:
        started = time.perf_counter()
        loop.run_until_complete(asyncio.sleep(delay))
        took.append(time.perf_counter() - started)
        assert took[-1] >= delay
    if high_resolution:
        assert sorted(took[6:])[10] < 0.004
    native.timer = timer
    loop.close()


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="Python 3.13 and later have a fine monotonic clock on Windows")
def test_the_clock_of_the_loop_is_finer_than_that_of_the_system() -> None:
    """gh-75720: with ticks of 15.6 ms, asyncio runs a timer that is 15 ms early."""
    loop = iocp_loop.new_event_loop("iocp")
    assert time.get_clock_info("monotonic").resolution > 0.01
    assert loop._clock_resolution < 0.00001
    before = loop.time()
    assert any(loop.time() > before for _ in range(1000))
    loop.close()


# -- connecting on this machine --------------------------------------------------------------------


@pytest.mark.parametrize("any_address", ["0.0.0.0", "::"])
async def test_to_connect_to_any_address_is_to_connect_to_this_machine(
    loop: iocp_loop.IocpEventLoop, any_address: str
) -> None:
    family = socket.AF_INET6 if ":" in any_address else socket.AF_INET
    with socket.socket(family) as listener, socket.socket(family) as client:
        listener.bind(("::1" if ":" in any_address else "127.0.0.1", 0))
        listener.listen()
        client.setblocking(False)
        await loop.sock_connect(client, (any_address, listener.getsockname()[1]))
        assert client.getpeername() == listener.getsockname()


async def test_a_refused_connection_to_this_machine(loop: iocp_loop.IocpEventLoop) -> None:
    with socket.socket() as nobody, socket.socket() as client:
        nobody.bind(("127.0.0.1", 0))
        client.setblocking(False)
        with pytest.raises(ConnectionRefusedError):
            await loop.sock_connect(client, nobody.getsockname())


# -- pipes of others -------------------------------------------------------------------------------


async def test_a_client_may_read_the_pipe_of_a_server_by_messages(loop: iocp_loop.IocpEventLoop, address: str) -> None:
    from multiprocessing.connection import Client

    servers = await loop.start_serving_pipe(Echo, address)
    with await loop.run_in_executor(None, Client, address, "AF_PIPE") as client:
        await loop.run_in_executor(None, client.send_bytes, b"hello")
        assert await loop.run_in_executor(None, client.recv_bytes) == b"hello"
    servers[0].close()
    await asyncio.sleep(0.05)


def test_nothing_from_a_handle_that_is_no_pipe_is_an_answer(
    monkeypatch: pytest.MonkeyPatch, pipe: tuple[Handle, Handle]
) -> None:
    """A serial port says at once that it has nothing, as often as it is asked."""
    monkeypatch.setattr(lib, "iocp_file_type", lambda handle: lib.IOCP_DEVICE)
    driver = IocpDriver()
    got: list[Any] = []
    op = ops.Read(pipe[0], 100)
    op.complete = lambda value, error: got.append((value, error))
    driver.submit(op)
    sub = op.driver_data
    sub.finish(sub, 0, 0)
    assert got == [(b"", None)]
    lib.iocp_cancel(sub.native)  # the request was not over in truth
    driver.wait(LIMIT)
    driver._outstanding.clear()
    driver._port.count = 0
    driver.close()


# -- amounts ---------------------------------------------------------------------------------------


async def test_a_transport_does_not_hand_the_system_more_than_it_may_keep(
    loop: iocp_loop.IocpEventLoop, pair: Pair
) -> None:
    """Windows takes a send of any size at once: nobody would have to wait for the peer."""
    paused: list[bool] = []

    class Writer(asyncio.Protocol):
        def pause_writing(self) -> None:
            paused.append(True)

        def resume_writing(self) -> None:
            paused.append(False)

    transport, _ = await loop.create_connection(Writer, sock=pair[0])
    size = 32 << 20
    transport.write(bytes(size))
    assert transport.get_write_buffer_size() >= size - (1 << 20)
    assert paused == [True]
    received = await loop.run_in_executor(None, read_exactly, pair[1], size)
    assert len(received) == size
    await asyncio.sleep(0.05)
    assert paused == [True, False]
    transport.close()
    await asyncio.sleep(0.05)
