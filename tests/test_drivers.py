"""The contract of a driver (ports/driver.py) on each driver: submitting, waiting and waking, closing."""

from __future__ import annotations

import errno
import gc
import os
import socket
import threading
import time
from typing import Any

import pytest

from iocp_loop import native
from iocp_loop import operations as ops
from iocp_loop.operations import WRITABLE, Operation
from iocp_loop.ports import make_driver

from .rig import A_MOMENT, Pair, Rig, received, waiting_operations
from .support import LIMIT, WINDOWS, in_thread, open_files, tcp_pair, udp_socket

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

    def receive_again(value: Any, error: BaseException | None) -> None:
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
    def send_again(value: Any, error: BaseException | None) -> None:
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


# -- waiting and waking ----------------------------------------------------------------------------


@pytest.mark.every_poller
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


@pytest.mark.every_poller
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


@pytest.mark.every_poller
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


# -- how much at once ------------------------------------------------------------------------------


@pytest.mark.skipif(native.hot is None or WINDOWS, reason="what the native tier does on Linux, to be quicker")
def test_a_dispatch_delivers_so_many_bytes_and_leaves_the_rest_for_the_next(rig: Rig) -> None:
    pairs = [tcp_pair() for _ in range(40)]
    streams = [rig.submit(ops.ReceiveStream(ours)) for ours, _ in pairs]
    rig.turn()
    data = os.urandom(64 * 1024)
    for _, peer in pairs:
        peer.sendall(data)
    most = turns = 0
    deadline = time.monotonic() + LIMIT
    while any(len(received(rig, op)) < len(data) for op in streams):
        assert time.monotonic() < deadline
        before = len(rig.delivered)
        rig.turn(A_MOMENT)
        most = max(most, sum(len(value) for _, value, _ in rig.delivered[before:]))
        turns += 1
    assert all(received(rig, op) == data for op in streams)
    assert most < 512 * 1024
    assert turns >= 40 * 64 // 512
    for op in streams:
        rig.end(op)
    for sock in (sock for pair in pairs for sock in pair):
        sock.close()


# -- an exception that ends the loop ---------------------------------------------------------------


@pytest.mark.every_poller
@pytest.mark.parametrize("count", [5, 50])
def test_dispatch_survives_an_exception_that_ends_the_loop(rig: Rig, count: int) -> None:
    pairs = [tcp_pair() for _ in range(count)]
    streams = []

    def interrupt(value: Any, error: BaseException | None) -> None:
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
    rig.until(lambda: len(rig.delivered) == count)
    for op in streams:
        assert rig.values(op) == [b"x"]
    for ours, peer in pairs:
        ours.close()
        peer.close()


def test_an_exception_leaves_what_is_ready_for_the_next_dispatch(rig: Rig, pair: Pair) -> None:
    pair[1].send(b"abc")

    def interrupt(value: Any, error: BaseException | None) -> None:
        raise KeyboardInterrupt

    one = rig.submit(ops.Receive(pair[0], 1), interrupt)
    two = rig.submit(ops.Receive(pair[0], 1))
    with pytest.raises(KeyboardInterrupt):
        rig.until(lambda: False)
    assert rig.value(one) in (b"a", b"b")
    assert rig.value(two) in (b"a", b"b")


# -- closing ---------------------------------------------------------------------------------------


def test_closing_in_the_midst_of_many_completions_keeps_none_of_their_operations(driver: str, no_leak: None) -> None:
    def streams() -> int:
        gc.collect()
        return sum(isinstance(object_, ops.ReceiveStream) for object_ in gc.get_objects())

    before = streams()  # of other tests, which something may still refer to
    rig = Rig(make_driver(driver))
    pairs = [tcp_pair() for _ in range(50)]
    for ours, _ in pairs:
        rig.submit(ops.ReceiveStream(ours), lambda value, error: rig.driver.close())
    rig.turn()
    for _, peer in pairs:
        peer.send(b"x")
    time.sleep(A_MOMENT)
    rig.until(lambda: rig.driver.closed)
    assert len({op for op, _, _ in rig.delivered}) == len(pairs)
    rig.delivered.clear()
    for sock in (sock for pair in pairs for sock in pair):
        sock.close()
    assert streams() <= before


@pytest.mark.every_poller
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
