"""The driver ``poll`` on the pollers and the waker of other systems: the contract again, where they could differ."""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from iocp_loop import operations as ops
from iocp_loop.ports import make_driver, poll

from .rig import Rig
from .support import LIMIT, in_thread, tcp_pair
from .test_drivers import (  # noqa: F401  # collected here too, with the `rig` of this file
    test_close_ends_everything_in_flight_within_its_time,
    test_dispatch_survives_an_exception_that_ends_the_loop,
    test_many_wakes_from_many_threads,
    test_wait_blocks_no_longer_than_its_timeout_and_no_shorter,
    test_wake_from_another_thread_ends_a_wait,
)
from .test_drivers_cancelling import (  # noqa: F401  # collected here too, with the `rig` of this file
    test_cancel_ends_an_operation_with_ecanceled,
    test_cancel_of_an_operation_whose_socket_was_closed_behind_its_back,
)
from .test_drivers_operations import (  # noqa: F401  # collected here too, with the `rig` of this file
    test_a_readiness_stream_for_both_events,
    test_a_readiness_stream_tells_while_it_holds_and_rests_while_not,
    test_an_error_counts_as_every_event_that_was_asked_for,
    test_connect,
    test_connect_refused,
    test_readiness_tells_what_holds,
    test_send_all_of_more_than_the_kernel_buffers,
    test_two_directions_of_one_socket_do_not_wait_for_each_other,
)
from .test_drivers_streams import (  # noqa: F401  # collected here too, with the `rig` of this file
    test_a_cancelled_receive_stream_leaves_the_data_that_come_later,
    test_a_paused_receive_stream_rests_and_loses_nothing,
    test_a_receive_stream_delivers_all_in_order_and_ends_with_the_stream,
    test_an_accept_stream_accepts_until_cancelled,
    test_the_end_of_the_stream_during_a_rest_comes_after_it,
)

Pair = tuple[socket.socket, socket.socket]

POLLERS = [
    kind
    for name in ("SelectSelector", "PollSelector", "EpollSelector", "KqueueSelector")
    if (kind := getattr(selectors, name, None)) is not None
]


@pytest.fixture(params=POLLERS, ids=lambda kind: kind.__name__)
def rig(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, no_leak: None) -> Iterator[Rig]:
    """A poll driver as another system would have it."""
    monkeypatch.setattr(selectors, "DefaultSelector", request.param)
    monkeypatch.setattr(poll, "make_poller", poll._SelectorPoller)
    monkeypatch.setattr(poll, "make_waker", poll._SocketWaker)
    rig = Rig(make_driver("poll"))
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
    for waker in (poll._SocketWaker(), poll.make_waker()):
        for _ in range(5000):
            waker.wake()
        waker.drain()
        waker.close()
