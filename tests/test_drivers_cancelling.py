"""The contract of a driver: cancelling, on each driver."""

from __future__ import annotations

import errno
import os
import socket
from typing import Any

import pytest

from iocp_loop import operations as ops
from iocp_loop.operations import READABLE

from .rig import A_MOMENT, Pair, Rig, waiting_operations
from .support import LIMIT, WINDOWS, tcp_pair, udp_socket


@pytest.mark.every_poller
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


@pytest.mark.parametrize("count", [2, 50])
def test_operations_may_cancel_each_other_while_they_are_delivered(rig: Rig, count: int) -> None:
    pairs = [tcp_pair() for _ in range(count)]
    streams = [ops.ReceiveStream(ours) for ours, _ in pairs]

    def cancel_all(value: Any, error: BaseException | None) -> None:
        for op in streams:
            rig.driver.cancel(op)

    for op in streams:
        rig.submit(op, cancel_all)
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


@pytest.mark.every_poller
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
