"""The turn of driver ``iocp``, which the native tier has in C: what may happen between a completion and the next.

The files tests/test_iocp*.py have the rest of the driver, and all run on either tier.
"""

from __future__ import annotations

import errno
import gc
import os
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from iocp_loop import native
from iocp_loop import operations as ops
from iocp_loop.ports.iocp.driver import IocpDriver
from iocp_loop.ports.iocp.receiving import SLOT_SIZE
from iocp_loop.ports.iocp.turns import IocpTurns, PythonIocpTurns

from .rig import Pair, Rig, received
from .support import LIMIT, in_thread, read_all, reset, tcp_pair

if sys.platform != "win32":
    pytest.skip("I/O completion ports exist on Windows only", allow_module_level=True)

#: More than the system takes from one send while nobody receives, bytes.
MUCH = 16 << 20

native_only = pytest.mark.skipif(native.hot is None, reason="the Python tier is in force")


@pytest.fixture
def rig(no_leak: None) -> Iterator[Rig]:
    rig = Rig(IocpDriver())
    yield rig
    rig.driver.close()
    assert not rig.driver.in_flight


def driver_of(rig: Rig) -> IocpDriver:
    assert isinstance(rig.driver, IocpDriver)
    return rig.driver


def small_stream(rig: Rig, pair: Pair, then: Callable[[Any, BaseException | None], object] | None = None) -> Any:
    """A receive stream that has been lent a slot."""
    op = rig.submit(ops.ReceiveStream(pair[0]))
    pair[1].sendall(b"first")
    rig.until(lambda: received(rig, op) == b"first")
    assert op.driver_data.slot is not None
    if then is not None:
        noted = op.complete

        def complete(value: Any, error: BaseException | None) -> None:
            noted(value, error)
            then(value, error)

        op.complete = complete
    rig.delivered.clear()
    return op


def test_the_turn_is_that_of_the_tier_in_force() -> None:
    if native.hot is None:
        assert IocpTurns is PythonIocpTurns
    else:
        assert issubclass(IocpDriver, native.hot.IocpTurns)
        assert not issubclass(IocpDriver, PythonIocpTurns)


# -- the wait --------------------------------------------------------------------------------------


def test_a_wait_takes_its_time_and_a_wake_ends_it(rig: Rig) -> None:
    begun = time.perf_counter()
    rig.driver.wait(0.05)
    assert time.perf_counter() - begun >= 0.045
    rig.driver.wait(-1)
    rig.driver.wait(1e-12)
    for forever in (None, 1e300):
        timer = threading.Timer(0.05, rig.driver.wake)
        timer.start()
        rig.driver.wait(forever)
        timer.join()
    assert rig.driver.waits == 5
    assert rig.driver.wakes == 2
    with pytest.raises(TypeError):
        rig.driver.wait("soon")


@pytest.mark.parametrize("source", ["before_sleep", "ready", "at once"])
def test_a_wait_does_not_block_while_there_is_something_to_do(rig: Rig, pair: Pair, source: str) -> None:
    if source == "before_sleep":
        rig.driver.before_sleep = lambda: True
    elif source == "ready":
        rig.driver.ready.append((ops.Receive(pair[0], 1), None, None))
    else:
        rig.submit(ops.SendAll(pair[0], []))
    begun = time.monotonic()
    rig.driver.wait(LIMIT)
    assert time.monotonic() - begun < LIMIT / 2
    assert rig.driver.gathered == (source != "before_sleep")
    rig.driver.dispatch()
    assert not rig.driver.gathered


def test_an_exception_of_before_sleep_leaves_nobody_asleep(rig: Rig) -> None:
    def interrupt() -> bool:
        raise KeyboardInterrupt

    rig.driver.before_sleep = interrupt
    with pytest.raises(KeyboardInterrupt):
        rig.driver.wait(LIMIT)
    assert not rig.driver._sleeping
    rig.driver.before_sleep = None


# -- the dispatch ----------------------------------------------------------------------------------


@pytest.mark.parametrize("small", [True, False], ids=["slot", "no slot"])
def test_a_dispatch_that_an_exception_ended_goes_on_with_the_rest(rig: Rig, small: bool) -> None:
    pairs = [tcp_pair() for _ in range(5)]
    streams = [small_stream(rig, pair) if small else rig.submit(ops.ReceiveStream(pair[0])) for pair in pairs]

    def interrupt(value: Any, error: BaseException | None) -> None:
        rig.delivered.append((streams[0], value, error))
        streams[0].complete = noted
        raise KeyboardInterrupt

    for number, (_, peer) in enumerate(pairs):
        peer.sendall(b"%d" % number)
    time.sleep(0.1)
    rig.driver.wait(LIMIT)
    # The first of the batch, whichever stream that is.
    driver = driver_of(rig)
    assert driver._port.count == len(pairs)
    streams.sort(key=lambda op: op.driver_data.address != driver._port.batch[0])
    noted, streams[0].complete = streams[0].complete, interrupt
    with pytest.raises(KeyboardInterrupt):
        rig.driver.dispatch()
    assert [op for op, _, _ in rig.delivered] == [streams[0]]
    assert streams[0].driver_data.armed
    begun = time.monotonic()
    rig.driver.wait(LIMIT)
    assert time.monotonic() - begun < LIMIT / 2
    rig.driver.dispatch()
    assert sorted(value for _, value, _ in rig.delivered) == [b"%d" % number for number in range(len(pairs))]
    for ours, peer in pairs:
        peer.sendall(b"again")
        op = next(op for op in streams if op.handle is ours)
        rig.until(lambda op=op: received(rig, op).endswith(b"again"))
        rig.end(op)
        ours.close()
        peer.close()


def test_what_was_reaped_and_not_dispatched_is_no_leak_at_close(no_leak: None, pair: Pair) -> None:
    rig = Rig(IocpDriver())
    stream = small_stream(rig, pair)
    pair[1].sendall(b"data")
    time.sleep(0.05)
    rig.driver.wait(LIMIT)
    assert rig.driver.gathered
    rig.driver.close()
    assert not driver_of(rig)._outstanding
    assert [error.errno for _, error in rig.completions(stream) if error is not None] == [errno.ECANCELED]


def test_a_completion_may_cancel_another_of_the_same_batch(rig: Rig) -> None:
    pairs = [tcp_pair() for _ in range(2)]
    streams: list[Any] = []

    def cancel_both(value: Any, error: BaseException | None) -> None:
        for op in streams:
            rig.driver.cancel(op)

    streams += [small_stream(rig, pair, cancel_both) for pair in pairs]
    for _, peer in pairs:
        peer.sendall(b"data")
    time.sleep(0.1)
    rig.turn(LIMIT)
    rig.until(lambda: not rig.driver.in_flight)
    rig.turn()
    for op, (ours, peer) in zip(streams, pairs, strict=True):
        assert received(rig, op) == b"data"  # both had come before the cancel
        assert [error.errno for _, error in rig.completions(op) if error is not None] == [errno.ECANCELED]
        ours.close()
        peer.close()


@pytest.mark.parametrize("size", [5, SLOT_SIZE])
def test_a_submission_may_serve_another_before_its_completion_is_over(rig: Rig, pair: Pair, size: int) -> None:
    successors: list[Any] = []

    def succeed(value: Any, error: BaseException | None) -> None:
        if error is None:
            rig.driver.cancel(first)
            successors.append(rig.submit(ops.ReceiveStream(pair[0])))
            assert successors[0].driver_data is submission

    first = small_stream(rig, pair, succeed)
    submission = first.driver_data
    pair[1].sendall(b"x" * size)
    rig.until(lambda: not first.in_flight and successors)
    assert received(rig, first) == b"x" * size
    pair[1].sendall(b"second")
    rig.until(lambda: received(rig, successors[0]) == b"second")
    rig.end(successors[0])


@pytest.mark.parametrize("small", [True, False], ids=["slot", "no slot"])
def test_closing_inside_a_completion(no_leak: None, pair: Pair, small: bool) -> None:
    rig = Rig(IocpDriver())
    if small:
        op = small_stream(rig, pair, lambda value, error: rig.driver.close())
    else:
        op = rig.submit(ops.ReceiveStream(pair[0]), lambda value, error: rig.driver.close())
    pair[1].sendall(b"data")
    rig.driver.wait(LIMIT)
    rig.driver.dispatch()
    assert [value for value, error in rig.completions(op) if error is None] == [b"data"]
    assert [error.errno for _, error in rig.completions(op) if error is not None] == [errno.ECANCELED]
    assert not rig.driver.in_flight
    assert not driver_of(rig)._outstanding
    rig.driver.dispatch()


def test_a_stream_pauses_without_a_slot_and_loses_nothing(rig: Rig, pair: Pair) -> None:
    op = rig.submit(ops.ReceiveStream(pair[0]))
    pair[1].sendall(b"data")
    time.sleep(0.05)
    rig.driver.pause(op)
    assert rig.nothing_comes()
    assert not op.driver_data.armed
    rig.driver.resume(op)
    rig.until(lambda: received(rig, op) == b"data")
    rig.end(op)


def test_a_reset_without_a_slot_is_told_as_python_tells_it(rig: Rig, pair: Pair) -> None:
    op = rig.submit(ops.ReceiveStream(pair[0]))
    pair[1].sendall(b"x" * SLOT_SIZE)  # large, so that the next receive has no slot
    rig.until(lambda: len(received(rig, op)) == SLOT_SIZE)
    assert op.driver_data.slot is None
    reset(pair[1])
    error = rig.last_error(op)
    assert isinstance(error, ConnectionResetError)
    assert error.winerror == 10054


def test_a_socket_closed_under_its_stream_ends_it(rig: Rig, pair: Pair) -> None:
    op = small_stream(rig, pair)
    pair[0].close()
    rig.until(lambda: not op.in_flight)
    [(_, error)] = rig.completions(op)
    assert error is not None
    assert not driver_of(rig)._outstanding


def test_a_slot_goes_back_as_often_as_it_is_lent(rig: Rig, pair: Pair) -> None:
    op = small_stream(rig, pair)
    pool = driver_of(rig)._slots
    free = len(pool.free)
    for _ in range(200):
        pair[1].sendall(b"ping")
        before = len(rig.delivered)
        rig.until(lambda before=before: len(rig.delivered) > before)
        assert len(pool.free) == free
    rig.end(op)
    assert len(pool.free) == free + 1
    assert len({slot[3] for slot in pool.free}) == len(pool.free)


# -- buffers that are lent -------------------------------------------------------------------------


def test_data_go_into_the_buffer_that_is_lent(rig: Rig, pair: Pair) -> None:
    buffer = bytearray(10)
    op = rig.submit(ops.ReceiveStream(pair[0], lambda: buffer))
    pair[1].sendall(b"0123456789abc")
    rig.until(lambda: rig.values(op) == [10, 3])
    assert buffer == b"abc3456789"
    pair[1].shutdown(socket.SHUT_WR)
    rig.until(lambda: rig.values(op) == [10, 3, 0])
    assert not op.in_flight


@pytest.mark.parametrize("answer", ["none", "cancel", "pause", "raise"])
def test_no_buffer_loses_no_data(rig: Rig, pair: Pair, answer: str) -> None:
    buffer = bytearray(100)
    asked = 0

    def get_buffer() -> Any:
        nonlocal asked
        asked += 1
        if asked == 1:
            if answer == "none":
                return None
            if answer == "cancel":
                rig.driver.cancel(op)
            elif answer == "pause":
                rig.driver.pause(op)
            elif answer == "raise":
                raise KeyboardInterrupt
        return buffer

    op = rig.submit(ops.ReceiveStream(pair[0], get_buffer))
    pair[1].sendall(b"data")
    if answer == "raise":
        with pytest.raises(KeyboardInterrupt):
            rig.until(lambda: False)
    if answer == "cancel":
        assert rig.last_error(op).errno == errno.ECANCELED
        if rig.values(op):  # it was received all the same
            assert rig.values(op) == [4]
            assert buffer[:4] == b"data"
            return
        op = rig.submit(ops.ReceiveStream(pair[0], get_buffer))
    if answer == "pause":
        rig.until(lambda: asked)
        rig.driver.resume(op)
    rig.until(lambda: rig.values(op) == [4])
    assert buffer[:4] == b"data"
    rig.end(op)


# -- sending ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [1, 3, 100])
def test_all_is_sent_and_told(rig: Rig, pair: Pair, pieces: int) -> None:
    data = os.urandom(MUCH // pieces)
    op = rig.submit(ops.SendAll(pair[0], [data] * pieces))
    got: list[bytes] = []
    with in_thread(lambda: got.append(read_all(pair[1]))):
        assert rig.value(op) == len(data) * pieces
        assert op.sent == op.size == len(data) * pieces
        assert op.buffers == []
        pair[0].shutdown(socket.SHUT_WR)
    assert got == [data * pieces]
    assert [sub.op for sub in driver_of(rig)._spare] == [None]


def test_a_cancelled_send_tells_how_far_it_got(rig: Rig, pair: Pair) -> None:
    op = rig.submit(ops.SendAll(pair[0], [b"x" * MUCH, b"y" * MUCH]))
    rig.turn()
    rig.driver.cancel(op)
    value, error = rig.outcome(op)
    assert value == op.size or (error is not None and error.errno == errno.ECANCELED and op.sent < op.size)


# -- memory ----------------------------------------------------------------------------------------


def test_messages_leave_no_references(rig: Rig, pair: Pair) -> None:
    op = small_stream(rig, pair)
    op.complete = lambda value, error: pair[0].send(value)
    objects = [op, op.driver_data, op.handle, op.complete, driver_of(rig)._associations[op.fd]]

    def echo(rounds: int) -> list[int]:
        for size in (1, SLOT_SIZE, SLOT_SIZE + 1, 1) * rounds:
            pair[1].sendall(b"x" * size)
            left = size
            while left:
                rig.turn(0.01)
                try:
                    left -= len(pair[1].recv(left))
                except BlockingIOError:
                    pass
        gc.collect()
        return [sys.getrefcount(each) for each in objects]

    pair[1].setblocking(False)
    before = echo(2)
    assert echo(50) == before
    op.complete = lambda value, error: rig.delivered.append((op, value, error))
    rig.end(op)


def test_a_driver_that_was_dropped_is_collected(pair: Pair) -> None:
    rig = Rig(IocpDriver())
    small_stream(rig, pair)
    rig.driver.close()
    dead = weakref.ref(rig.driver)
    del rig
    gc.collect()
    assert dead() is None


@native_only
def test_a_driver_without_a_port_says_so() -> None:
    driver = IocpDriver.__new__(IocpDriver)
    with pytest.raises(RuntimeError, match="no port"):
        driver.wait(0)
    with pytest.raises(AttributeError):
        driver._port  # noqa: B018 - what is tested
