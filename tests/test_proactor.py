"""The proactor: a Future for each operation, streams for their owners, and nothing that arrived is lost by a cancel."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import socket
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import iocp_loop
from iocp_loop import operations as ops
from iocp_loop.operations import CANCELLING, DONE, READABLE, WRITABLE, Operation
from iocp_loop.ports.driver import cancelled_error
from iocp_loop.proactor import Proactor, advance

from .rig import SlowDriver
from .support import LIMIT, WINDOWS, fill, in_thread, listening_socket, read_exactly, reset, turns, udp_socket, until

Loop = iocp_loop.IocpEventLoop
Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def proactor(loop: Loop) -> Proactor:
    return loop._proactor


# -- one method for each operation -----------------------------------------------------------------


async def test_recv(loop: Loop, proactor: Proactor, pair: Pair) -> None:
    future = proactor.recv(pair[0], 3)
    assert isinstance(future, asyncio.Future)
    assert len(proactor.in_flight) == 1
    await turns()
    assert not future.done()
    pair[1].send(b"abcdef")
    assert await future == b"abc"
    assert not proactor.in_flight
    assert await proactor.recv(pair[0], 100) == b"def"


async def test_recv_into(loop: Loop, proactor: Proactor, pair: Pair) -> None:
    buffer = bytearray(10)
    pair[1].send(b"abc")
    assert await proactor.recv_into(pair[0], memoryview(buffer)[1:]) == 3
    assert buffer == b"\0abc\0\0\0\0\0\0"


async def test_send(loop: Loop, proactor: Proactor, pair: Pair) -> None:
    assert await proactor.send(pair[0], memoryview(b"abc")) == 3
    assert pair[1].recv(10) == b"abc"


async def test_sendall_of_several_buffers(loop: Loop, proactor: Proactor, pair: Pair) -> None:
    buffers: list[Any] = [os.urandom(1 << 20), b"", bytearray(os.urandom(3 << 20)), memoryview(b"end")]
    whole = b"".join(buffers)
    got = bytearray()
    with in_thread(lambda: got.extend(read_exactly(pair[1], len(whole)))):
        assert await proactor.sendall(pair[0], *buffers) == len(whole)
    assert got == whole


async def test_accept_and_connect(loop: Loop, proactor: Proactor, listener: socket.socket) -> None:
    accept = proactor.accept(listener)
    with socket.socket() as client:
        client.setblocking(False)
        await proactor.connect(client, listener.getsockname())
        sock, address = await accept
        with sock:
            assert address == client.getsockname()
            assert sock.gettimeout() == 0


async def test_connect_refused(loop: Loop, proactor: Proactor) -> None:
    with listening_socket() as listener:
        address = listener.getsockname()
    with socket.socket() as client:
        client.setblocking(False)
        with pytest.raises(ConnectionRefusedError):
            await proactor.connect(client, address)


async def test_datagrams(loop: Loop, proactor: Proactor) -> None:
    with udp_socket() as one, udp_socket() as two:
        assert await proactor.sendto(one, b"ping", two.getsockname()) == 4
        assert await proactor.recvfrom(two, 100) == (b"ping", one.getsockname())
        buffer = bytearray(10)
        future = proactor.recvfrom_into(one, buffer)
        assert await proactor.sendto(two, b"pong", one.getsockname()) == 4
        assert await future == (4, two.getsockname())
        assert buffer[:4] == b"pong"


@pytest.mark.skipif(WINDOWS, reason="a C runtime descriptor is no overlapped handle")
async def test_files(loop: Loop, proactor: Proactor, tmp_path: Path) -> None:
    with open(tmp_path / "file", "wb+", buffering=0) as file:
        assert await proactor.write(file, b"hello world", 0) == 11
        assert await proactor.read(file, 5, 6) == b"world"
        buffer = bytearray(5)
        assert await proactor.read_into(file, buffer, 0) == 5
        assert buffer == b"hello"


@pytest.mark.skipif(WINDOWS, reason="pipes of the C runtime are not overlapped")
async def test_pipes(loop: Loop, proactor: Proactor) -> None:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    future = proactor.read(reader, 100)
    assert await proactor.write(writer, b"hello") == 5
    assert await future == b"hello"
    os.close(writer)
    assert await proactor.read(reader, 100) == b""
    os.close(reader)


async def test_readiness(loop: Loop, proactor: Proactor, pair: Pair) -> None:
    assert await proactor.wait_writable(pair[0]) == WRITABLE
    future = proactor.wait_readable(pair[0])
    await turns()
    assert not future.done()
    pair[1].send(b"x")
    assert await future == READABLE


async def test_an_error_arrives_in_the_future(loop: Loop, proactor: Proactor, pair: Pair) -> None:
    future = proactor.recv(pair[0], 1)
    await turns()
    reset(pair[1])
    with pytest.raises(ConnectionResetError):
        await future


async def test_what_is_refused_outright_raises_at_once(loop: Loop, proactor: Proactor, pair: Pair) -> None:
    with pytest.raises(ValueError, match="events"):
        proactor.submit(ops.Readiness(pair[0], 0))
    pair[0].close()
    with pytest.raises(ValueError, match="closed"):
        proactor.recv(pair[0], 1)
    assert not proactor.in_flight


async def test_a_future_and_its_operation_leave_no_cycle(loop: Loop, proactor: Proactor, pair: Pair) -> None:
    gc.collect()
    gc.disable()
    try:
        pair[1].send(b"x")
        future = proactor.recv(pair[0], 1)
        watched = weakref.ref(future)
        await future
        del future
        await turns()
        assert watched() is None
    finally:
        gc.enable()


# -- streams ---------------------------------------------------------------------------------------


class Sink:
    """Notes what a stream delivers."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.error: BaseException | None = None

    def __call__(self, value: Any, error: BaseException | None) -> None:
        if error is None:
            self.values.append(value)
        else:
            self.error = error


async def test_receive_stream(loop: Loop, proactor: Proactor, pair: Pair) -> None:
    sink = Sink()
    op = proactor.receive_stream(pair[0], sink)
    for message in (b"one", b"two"):
        pair[1].send(message)
        await until(lambda message=message: message in sink.values)  # type: ignore[misc]  # no type for message
    proactor.pause(op)
    proactor.resume(op)
    pair[1].close()
    await until(lambda: not op.in_flight)
    assert sink.values == [b"one", b"two", b""]
    assert sink.error is None


async def test_accept_stream(loop: Loop, proactor: Proactor, listener: socket.socket) -> None:
    sink = Sink()
    op = proactor.accept_stream(listener, sink)
    clients = [socket.create_connection(listener.getsockname(), LIMIT) for _ in range(5)]
    await until(lambda: len(sink.values) == 5)
    assert {address for _, address in sink.values} == {client.getsockname() for client in clients}
    proactor.cancel(op)
    await until(lambda: sink.error)
    assert isinstance(sink.error, OSError)
    assert sink.error.errno == errno.ECANCELED
    for sock in [*clients, *(sock for sock, _ in sink.values)]:
        sock.close()


async def test_receive_from_stream(loop: Loop, proactor: Proactor) -> None:
    with udp_socket() as one, udp_socket() as two:
        sink = Sink()
        op = proactor.receive_from_stream(one, 100, sink)
        for number in range(5):
            two.sendto(b"%d" % number, one.getsockname())
        await until(lambda: len(sink.values) == 5)
        assert [data for data, _ in sink.values] == [b"0", b"1", b"2", b"3", b"4"]
        proactor.cancel(op)
        await until(lambda: sink.error)


async def test_readiness_stream(loop: Loop, proactor: Proactor, pair: Pair) -> None:
    sink = Sink()
    op = proactor.readiness_stream(pair[0], READABLE, sink)
    pair[1].send(b"x")
    await until(lambda: len(sink.values) >= 3)
    proactor.cancel(op)
    await until(lambda: sink.error)
    assert set(sink.values) == {READABLE}


# -- cancelling ------------------------------------------------------------------------------------


async def test_a_cancelled_future_is_cancelled_at_once_and_its_operation_ends(
    loop: Loop, proactor: Proactor, pair: Pair
) -> None:
    future = proactor.recv(pair[0], 10)
    await turns()
    assert future.cancel()
    assert future.cancelled()
    assert not future.cancel()
    await until(lambda: not proactor.in_flight)
    pair[1].send(b"later")
    assert await proactor.recv(pair[0], 10) == b"later"


async def test_cancelling_a_finished_future_changes_nothing(loop: Loop, proactor: Proactor, pair: Pair) -> None:
    pair[1].send(b"x")
    future = proactor.recv(pair[0], 10)
    assert await future == b"x"
    assert not future.cancel()
    assert future.result() == b"x"
    assert not proactor.claims(pair[0])


async def test_a_cancelled_sendall_ends(loop: Loop, proactor: Proactor, pair: Pair) -> None:
    fill(pair[0])
    future = proactor.sendall(pair[0], bytes(16 << 20))
    await turns()
    future.cancel()
    await until(lambda: not proactor.in_flight)


async def test_wait_for_with_a_timeout(loop: Loop, proactor: Proactor, pair: Pair) -> None:
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(proactor.recv(pair[0], 10), 0.01)
    pair[1].send(b"x")
    assert await proactor.recv(pair[0], 10) == b"x"


async def test_bytes_that_came_before_the_cancel_are_for_the_next_call(
    loop: Loop, proactor: Proactor, pair: Pair
) -> None:
    pair[1].send(b"abcdef")
    future = proactor.recv(pair[0], 100)  # done at once where the driver tries at once, and not delivered yet
    future.cancel()
    assert await proactor.recv(pair[0], 4) == b"abcd"
    buffer = bytearray(10)
    assert await proactor.recv_into(pair[0], buffer) == 2
    assert buffer[:2] == b"ef"
    await until(lambda: not proactor.claims(pair[0]))
    assert not proactor.in_flight


async def test_again_and_again_cancelled_receives_keep_the_order(loop: Loop, proactor: Proactor, pair: Pair) -> None:
    data = os.urandom(6000)
    got = bytearray()
    for position in range(0, len(data), 10):
        step = position // 10
        buffer = bytearray(7)
        future: Any = proactor.recv(pair[0], 7) if step % 2 else proactor.recv_into(pair[0], buffer)
        await turns(step % 3)
        pair[1].send(data[position : position + 10])
        await turns(step % 5 // 2)
        if not future.cancel():  # it came before: then it is delivered
            value = future.result()
            got += value if isinstance(value, bytes) else buffer[:value]
        await turns(step % 7 // 3)
        if step % 11 == 0 and len(got) < position:
            got += await proactor.recv(pair[0], 9)
    while len(got) < len(data):
        got += await proactor.recv(pair[0], 1000)
    assert got == data


async def test_a_connection_that_came_before_the_cancel_is_for_the_next_accept(
    loop: Loop, proactor: Proactor, listener: socket.socket
) -> None:
    with socket.create_connection(listener.getsockname(), LIMIT) as client:
        proactor.accept(listener).cancel()
        sock, address = await proactor.accept(listener)
        with sock:
            assert address == client.getsockname()


async def test_a_datagram_that_came_before_the_cancel_is_for_the_next_call(loop: Loop, proactor: Proactor) -> None:
    with udp_socket() as one, udp_socket() as two:
        for message in (b"one", b"two"):
            two.sendto(message, one.getsockname())
            proactor.recvfrom(one, 100).cancel()
        assert await proactor.recvfrom(one, 100) == (b"one", two.getsockname())
        assert await proactor.recvfrom_into(one, bytearray(2) if not WINDOWS else bytearray(9)) in (
            (2, two.getsockname()),  # what does not fit of a datagram is lost, as ever
            (3, two.getsockname()),
        )


async def test_what_a_cancelled_call_had_got_comes_in_the_form_that_the_next_one_asks_for(
    loop: Loop, proactor: Proactor
) -> None:
    with udp_socket() as one, udp_socket() as two:
        one.connect(two.getsockname())
        for message in (b"first", b"second", b"third"):
            two.sendto(message, one.getsockname())
        proactor.recvfrom(one, 100).cancel()
        assert await proactor.recv(one, 100) == b"first"
        proactor.recv(one, 100).cancel()
        assert await proactor.recvfrom(one, 100) == (b"second", two.getsockname())
        proactor.recv(one, 100).cancel()
        await turns()
        if proactor.claims(one):  # else it was left in the socket
            assert await proactor.recv(one, 2) == b"th"
            assert not proactor.claims(one)  # what does not fit of a datagram is lost, as ever


async def test_bytes_left_by_a_cancelled_recv_go_to_a_stream_first(loop: Loop, proactor: Proactor, pair: Pair) -> None:
    pair[1].send(b"first ")
    proactor.recv(pair[0], 100).cancel()
    await turns()
    pair[1].send(b"second")
    await asyncio.sleep(0.02)
    sink = Sink()
    op = proactor.receive_stream(pair[0], sink)
    assert not sink.values  # never by recursion
    await until(lambda: b"".join(sink.values) == b"first second")
    proactor.cancel(op)
    await until(lambda: sink.error)


# -- with a driver that completes when it is told to -----------------------------------------------


@pytest.fixture
def slow() -> Iterator[tuple[Proactor, SlowDriver]]:
    loop = iocp_loop.new_event_loop("poll")
    driver = SlowDriver()
    proactor = Proactor(loop, driver)
    yield proactor, driver
    proactor.close()
    loop.close()


Slow = tuple[Proactor, SlowDriver]


def turn(proactor: Proactor) -> None:
    """One turn of the loop: whoever awaits what has ended hears of it, and those behind it in line go on."""
    proactor._loop.run_until_complete(asyncio.sleep(0))


def test_the_next_receive_does_not_overtake_a_cancelled_one_that_has_data(slow: Slow, pair: Pair) -> None:
    proactor, driver = slow
    proactor.recv(pair[0], 10).cancel()
    cancelled = driver.only()
    assert cancelled.state is CANCELLING
    assert proactor.claims(pair[0])
    after = [proactor.recv(pair[0], 2), proactor.recv(pair[0], 10)]
    assert driver.only() is cancelled
    driver.finish(cancelled, b"abc")
    turn(proactor)
    assert [future.result() for future in after] == [b"ab", b"c"]
    turn(proactor)
    assert not proactor.claims(pair[0])


def test_the_next_receive_goes_on_after_a_cancelled_one_without_data(slow: Slow, pair: Pair) -> None:
    proactor, driver = slow
    proactor.recv(pair[0], 10).cancel()
    after = proactor.recv(pair[0], 10)
    driver.finish(driver.only(), None, cancelled_error())
    assert not after.done()
    driver.finish(driver.only(), b"abc")
    assert after.result() == b"abc"


def test_a_receive_in_line_behind_a_cancelled_one_can_be_cancelled(slow: Slow, pair: Pair) -> None:
    proactor, driver = slow
    proactor.recv(pair[0], 10).cancel()
    after = proactor.recv(pair[0], 10)
    assert after.cancel()
    driver.finish(driver.only(), b"abc")
    assert not driver.in_flight
    assert proactor.recv(pair[0], 10).result() == b"abc"


def test_two_cancelled_receives_hand_their_data_on_in_order(slow: Slow, pair: Pair) -> None:
    proactor, driver = slow
    futures = [proactor.recv(pair[0], 10), proactor.recv(pair[0], 10)]
    one, two = driver.in_flight.values()
    for future in futures:
        future.cancel()
    after = proactor.recv(pair[0], 10)
    driver.finish(one, b"one")
    assert not after.done()
    driver.finish(two, b"two")
    assert after.result() == b"one"
    turn(proactor)
    assert proactor.recv(pair[0], 10).result() == b"two"


def test_a_socket_closed_while_a_receive_stands_in_line(slow: Slow, pair: Pair) -> None:
    proactor, driver = slow
    proactor.recv(pair[0], 10).cancel()
    after = proactor.recv(pair[0], 10)
    pair[0].close()
    driver.finish(driver.only(), None, cancelled_error())
    assert isinstance(after.exception(), OSError)
    assert not driver.in_flight


def test_close_with_a_receive_in_line(slow: Slow, pair: Pair) -> None:
    proactor, _ = slow
    proactor.recv(pair[0], 10).cancel()
    after = proactor.recv(pair[0], 10)
    proactor.close()
    assert after.cancelled()


def test_a_waiting_accept_gets_the_connection_of_a_cancelled_one(slow: Slow, listener: socket.socket) -> None:
    proactor, driver = slow
    proactor.accept(listener).cancel()
    after = proactor.accept(listener)
    with socket.socket() as conn:
        driver.finish(driver.only(), (conn, "address"))
        assert after.result() == (conn, "address")


def test_close_closes_connections_that_nobody_took(slow: Slow, listener: socket.socket) -> None:
    proactor, driver = slow
    proactor.accept(listener).cancel()
    conn = socket.socket()
    driver.finish(driver.only(), (conn, "address"))
    proactor.close()
    assert conn.fileno() == -1


# Finalizers and signal handlers run between any two steps, and may cancel a task, and so the Future that it waits for.


def test_a_future_that_is_cancelled_as_its_operation_is_submitted(
    slow: Slow, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    proactor, driver = slow
    launch = driver._launch

    def launch_and_cancel(op: Operation) -> None:
        op.complete.__self__.cancel()  # type: ignore[attr-defined]  # a method of the Future
        launch(op)

    with monkeypatch.context() as patch:
        patch.setattr(driver, "_launch", launch_and_cancel)
        assert proactor.recv(pair[0], 10).cancelled()
    assert driver.only().state is CANCELLING
    after = proactor.recv(pair[0], 10)
    driver.finish(driver.only(), b"abc")
    assert after.result() == b"abc"
    turn(proactor)
    assert not proactor.claims(pair[0])


def test_a_future_that_is_cancelled_as_what_is_kept_is_fetched_for_it(
    slow: Slow, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    proactor, driver = slow
    proactor.recv(pair[0], 10).cancel()
    after = proactor.recv(pair[0], 2)
    claim = proactor._claim

    def claim_and_cancel(op: Operation) -> Any:
        after.cancel()
        return claim(op)

    with monkeypatch.context() as patch:
        patch.setattr(proactor, "_claim", claim_and_cancel)
        driver.finish(driver.only(), b"abcdef")
    assert after.cancelled()
    turn(proactor)
    assert [proactor.recv(pair[0], size).result() for size in (1, 2, 10)] == [b"a", b"b", b"cdef"]


def test_a_future_that_is_cancelled_between_the_look_and_the_result(
    slow: Slow, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    proactor, driver = slow
    for error in (ConnectionResetError(), cancelled_error(), None):
        future = proactor.recv(pair[0], 10)
        done = future.done

        def done_and_cancel(done: Any = done, future: Any = future) -> bool:
            answer: bool = done()
            asyncio.Future.cancel(future)
            return answer

        with monkeypatch.context() as patch:
            patch.setattr(future, "done", done_and_cancel)
            driver.finish(driver.only(), b"abc" if error is None else None, error)
        assert future.cancelled()
    assert proactor.recv(pair[0], 10).result() == b"abc"


async def test_a_coroutine_that_is_closed_gives_its_wait_up(loop: Loop, pair: Pair) -> None:
    calls: list[Any] = [loop.sock_recv(pair[0], 10), loop.sock_recv_into(pair[0], bytearray(10))]
    for call in calls:
        call.send(None)
        call.close()
    await until(lambda: not loop._proactor.in_flight)
    pair[1].send(b"precious")
    assert await asyncio.wait_for(loop.sock_recv(pair[0], 100), LIMIT) == b"precious"


def test_a_new_stream_gets_the_data_of_a_cancelled_receive_before_its_own(slow: Slow, pair: Pair) -> None:
    proactor, driver = slow
    proactor.recv(pair[0], 10).cancel()
    cancelled = driver.only()
    sink = Sink()
    stream = proactor.receive_stream(pair[0], sink)
    driver._finish(cancelled, b"one")
    driver.ready.append((stream, b"two", None))
    driver.dispatch()
    assert sink.values == [b"one", b"two"]


def test_a_new_stream_is_not_ended_by_a_cancelled_receive_without_data(slow: Slow, pair: Pair) -> None:
    proactor, driver = slow
    for end in (b"", None):
        proactor.recv(pair[0], 10).cancel()
        cancelled = driver.only()
        sink = Sink()
        stream = proactor.receive_stream(pair[0], sink)
        driver.finish(cancelled, end, None if end is not None else cancelled_error())
        assert not sink.values
        assert sink.error is None
        driver.finish(stream, b"")


def test_operations_of_other_sockets_do_not_stand_in_line(slow: Slow, pair: Pair) -> None:
    proactor, driver = slow
    proactor.recv(pair[0], 10).cancel()
    (cancelled,) = driver.in_flight.values()
    other = proactor.recv(pair[1], 10)
    _, op = driver.in_flight.values()
    driver.finish(op, b"x")
    assert other.result() == b"x"
    driver.finish(cancelled, None, cancelled_error())
    assert cancelled.state is DONE


# -- the socket methods of the loop keep what they got ---------------------------------------------


@pytest.mark.parametrize("method", ["sock_recv", "sock_recv_into"])
async def test_a_task_cancelled_in_the_turn_in_which_its_bytes_come_loses_none(
    loop: Loop, pair: Pair, method: str
) -> None:
    task = asyncio.create_task(getattr(loop, method)(pair[0], 10 if method == "sock_recv" else bytearray(10)))
    await turns()
    (op,) = loop._proactor.in_flight.values()
    resolve = op.complete

    def complete(value: Any, error: BaseException | None) -> None:
        resolve(value, error)
        task.cancel()

    op.complete = complete
    pair[1].send(b"precious")
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.wait_for(loop.sock_recv(pair[0], 100), LIMIT) == b"precious"


async def test_an_accepted_connection_survives_its_cancelled_task(loop: Loop, listener: socket.socket) -> None:
    task = asyncio.create_task(loop.sock_accept(listener))
    await turns()
    (op,) = loop._proactor.in_flight.values()
    resolve = op.complete

    def complete(value: Any, error: BaseException | None) -> None:
        resolve(value, error)
        task.cancel()

    op.complete = complete
    with socket.create_connection(listener.getsockname(), LIMIT) as client:
        with pytest.raises(asyncio.CancelledError):
            await task
        sock, address = await loop.sock_accept(listener)
        with sock:
            assert address == client.getsockname()


# -- helpers ---------------------------------------------------------------------------------------


def test_advance_gives_what_is_left() -> None:
    buffers = [b"abc", bytearray(b"de"), memoryview(b"f")]
    for count in range(7):
        assert b"".join(advance(buffers, count)) == b"abcdef"[count:]
    assert advance([], 0) == []
