"""The driver ``poll`` on the pollers and the waker of other systems, where they need tests of their own.

Tests of the drivers' contract that are marked `every_poller` run on them as well.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from iocp_loop import operations as ops
from iocp_loop.ports.poll import pollers
from iocp_loop.ports.poll.driver import PollDriver

from .rig import POLLERS, Rig, driver_of_another_system
from .support import LIMIT, in_thread, tcp_pair

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture(params=POLLERS, ids=lambda kind: kind.__name__)
def rig(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, no_leak: None) -> Iterator[Rig]:
    """A poll driver as another system would have it."""
    rig = Rig(driver_of_another_system(request.param, monkeypatch))
    yield rig
    rig.driver.close()
    assert not rig.driver.in_flight


def test_a_socket_closed_behind_its_back_ends_its_operation_and_no_other(rig: Rig, pair: Pair) -> None:
    """select() refuses all its descriptors because of one that was closed."""
    ours, peer = tcp_pair()
    stale = rig.submit(ops.ReceiveStream(ours))
    alive = rig.submit(ops.ReceiveStream(pair[0]))
    rig.turn()
    ours.close()
    pair[1].send(b"still here")
    rig.until(lambda: rig.values(alive))
    assert rig.values(alive) == [b"still here"]
    rig.driver.cancel(stale)
    rig.until(lambda: not stale.in_flight)
    rig.nothing_comes()
    assert len([error for _, error in rig.completions(stale) if error is not None]) == 1
    rig.end(alive)
    peer.close()


def test_a_connection_that_was_aborted_before_the_accept_is_passed_over(rig: Rig) -> None:
    class Listener(socket.socket):
        """As the BSDs and Windows have it; Linux gives no such error any more."""

        aborted = 3

        def accept(self) -> Any:
            if self.aborted:
                self.aborted -= 1
                raise ConnectionAbortedError
            return super().accept()

    with Listener() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)
        op = rig.submit(ops.AcceptStream(listener))
        with socket.create_connection(listener.getsockname(), LIMIT) as client:
            rig.until(lambda: rig.values(op))
            ((sock, address),) = rig.values(op)
            assert address == client.getsockname()
            sock.close()
        rig.end(op)


def test_what_another_thread_begins_to_watch_is_watched(rig: Rig, pair: Pair) -> None:
    """select() and poll() look at what they were given when they began."""
    got: list[Any] = []

    def begin() -> None:
        while not rig.driver._sleeping:
            time.sleep(0.001)
        op = ops.Receive(pair[0], 10)
        op.complete = lambda value, error: got.append(value)
        rig.driver.submit(op)
        pair[1].send(b"x")

    rig.turn()
    with in_thread(begin):
        rig.until(lambda: got)
    assert got == [b"x"]


def test_a_waker_that_is_full_does_not_block(rig: Rig) -> None:
    for waker in (pollers.SocketWaker(), pollers.make_waker()):
        for _ in range(5000):
            waker.wake()
        waker.drain()
        waker.close()


@pytest.mark.skipif(not hasattr(select, "epoll"), reason="only epoll tells of a hang-up beside what can be read")
def test_a_hang_up_ends_a_stream_by_the_short_way(no_leak: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over UNIX sockets each connection ended by the long way, which cost as much as all of its life."""
    rig = Rig(PollDriver())
    long_ways: list[int] = []
    monkeypatch.setattr(rig.driver, "_dispatch_other", lambda *args: long_ways.append(args[-1]))
    for last in (b"", b"the last words"):
        ours, peer = socket.socketpair()
        ours.setblocking(False)
        with ours, peer:
            op = rig.submit(ops.ReceiveStream(ours))
            rig.turn()
            if last:
                peer.send(last)
            peer.close()
            rig.until(lambda op=op: not op.in_flight)  # type: ignore[misc]  # a default binds the operation
            assert rig.values(op) == [last, b""][not last :]
    assert not long_ways
    rig.driver.close()


@pytest.mark.skipif(not hasattr(select, "epoll"), reason="as above")
def test_a_hang_up_is_told_to_who_sends_as_well(no_leak: None) -> None:
    rig = Rig(PollDriver())
    ours, peer = socket.socketpair()
    ours.setblocking(False)
    with ours, peer:
        receiving = rig.submit(ops.ReceiveStream(ours))
        sending = rig.submit(ops.SendAll(ours, [bytes(10_000_000)]))
        rig.turn()
        assert sending.in_flight
        peer.close()
        rig.until(lambda: not receiving.in_flight and not sending.in_flight)
        ((_, error),) = rig.completions(sending)
        assert isinstance(error, (BrokenPipeError, ConnectionResetError))
    rig.driver.close()


@pytest.mark.skipif(not hasattr(os, "eventfd") or not hasattr(select, "epoll"), reason="wakers of other kinds are read")
def test_a_wake_costs_no_read(no_leak: None) -> None:
    """The poller tells of each write to the eventfd once, also where nobody has read the one before."""
    driver: Any = PollDriver()
    rig = Rig(driver)
    for _ in range(3):
        woken = driver.wakes
        with in_thread(lambda: until_woken(driver)):
            driver.wait(LIMIT)
        driver.dispatch()
        assert driver.wakes > woken
    assert os.eventfd_read(driver._waker.fileno()) == driver.wakes
    assert rig.nothing_comes()
    driver.close()


def until_woken(driver: Any) -> None:
    woken = driver.wakes
    while driver.wakes == woken:
        driver.wake()
        time.sleep(0.001)
