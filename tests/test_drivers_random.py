"""Random sequences of submit, cancel, pause and close on a driver: nothing completes twice, and no byte is lost."""

from __future__ import annotations

import gc
import socket
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from iocp_loop import operations as ops
from iocp_loop.operations import READABLE, WRITABLE, Operation
from iocp_loop.ports import make_driver

from .rig import Rig
from .support import tcp_pair


class OneSocket(RuleBasedStateMachine):
    """One socket on a driver, with one receiver at a time and any number of waits for readiness beside it."""

    def __init__(self, driver: str) -> None:
        super().__init__()
        self.rig = Rig(make_driver(driver))
        self.ours, self.peer = tcp_pair()
        self.submitted: list[Operation] = []
        self.receiver: Operation | None = None
        self.sent = bytearray()  # by the peer
        self.got = bytearray()
        self.wrote = 0  # bytes that our sends were given
        self.ended = False  # the peer has sent its last

    def submit(self, op: Operation) -> None:
        self.submitted.append(op)
        self.rig.submit(op)

    def receive(self, op: Operation) -> None:
        def take(value: Any, error: BaseException | None) -> None:
            if error is None:
                self.got += op.buffer[:value] if isinstance(op, ops.ReceiveInto) else value

        self.submitted.append(op)
        self.receiver = op
        self.rig.submit(op, take)

    def nobody_receives(self) -> bool:
        # A receiver that was asked to end may still deliver: the next one stands in line behind it.
        return self.receiver is None or self.receiver.state in (ops.DONE, ops.CANCELLING)

    # -- what happens ------------------------------------------------------------------------------

    @precondition(nobody_receives)
    @rule(size=st.integers(1, 50))
    def receive_some(self, size: int) -> None:
        self.receive(ops.Receive(self.ours, size))

    @precondition(nobody_receives)
    @rule(size=st.integers(1, 50))
    def receive_into(self, size: int) -> None:
        self.receive(ops.ReceiveInto(self.ours, bytearray(size)))

    @precondition(nobody_receives)
    @rule()
    def receive_stream(self) -> None:
        self.receive(ops.ReceiveStream(self.ours))

    @rule(events=st.sampled_from([READABLE, WRITABLE, READABLE | WRITABLE]), stream=st.booleans())
    def wait_for_readiness(self, events: int, stream: bool) -> None:
        self.submit((ops.ReadinessStream if stream else ops.Readiness)(self.ours, events))

    @rule(sizes=st.lists(st.integers(0, 100), max_size=4))
    def send(self, sizes: list[int]) -> None:
        self.wrote += sum(sizes)
        self.submit(ops.SendAll(self.ours, [bytes(size) for size in sizes]))

    @precondition(lambda self: not self.ended)
    @rule(data=st.binary(min_size=1, max_size=100))
    def peer_sends(self, data: bytes) -> None:
        self.peer.sendall(data)
        self.sent += data

    @precondition(lambda self: not self.ended)
    @rule()
    def peer_ends(self) -> None:
        self.peer.shutdown(socket.SHUT_WR)
        self.ended = True

    @precondition(lambda self: self.submitted)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.rig.driver.cancel(data.draw(st.sampled_from(self.submitted)))

    @rule()
    def cancel_the_receiver(self) -> None:
        if self.receiver is not None:
            self.rig.driver.cancel(self.receiver)

    @precondition(lambda self: isinstance(self.receiver, ops.ReceiveStream))
    @rule(rest=st.booleans())
    def pause_or_resume(self, rest: bool) -> None:
        (self.rig.driver.pause if rest else self.rig.driver.resume)(self.receiver)

    @rule()
    def turn(self) -> None:
        self.rig.turn()

    # -- what always holds -------------------------------------------------------------------------

    @invariant()
    def the_table_holds_exactly_what_is_in_flight(self) -> None:
        table = self.rig.driver.in_flight
        assert set(table.values()) == {op for op in self.submitted if op.in_flight}
        assert all(table[op.token] is op for op in table.values())

    @invariant()
    def nothing_completes_twice(self) -> None:
        for op in self.submitted:
            completions = self.rig.completions(op)
            errors = [error for _, error in completions if error is not None]
            assert len(errors) <= 1
            assert not errors or completions[-1][1] is errors[0]
            if not op.stream:
                assert len(completions) <= 1

    @invariant()
    def what_was_received_is_what_was_sent(self) -> None:
        assert self.sent.startswith(self.got)

    def teardown(self) -> None:
        """End everything: each operation had its last completion, and each byte went one way."""
        try:
            for op in self.submitted:
                self.rig.driver.cancel(op)
            self.rig.until(lambda: not any(op.in_flight for op in self.submitted))
            self.rig.turn()
            self.rig.turn()
            self.nothing_completes_twice()
            for op in self.submitted:
                assert self.rig.completions(op)
            if not self.ended:
                self.peer.shutdown(socket.SHUT_WR)
            self.ours.settimeout(5)
            while rest := self.ours.recv(1000):
                self.got += rest
            assert self.got == self.sent
            self.ours.close()
            arrived = 0
            try:
                while data := self.peer.recv(1000):
                    arrived += len(data)
            except ConnectionResetError:
                pass
            assert arrived <= self.wrote
        finally:
            self.rig.driver.close()
            self.ours.close()
            self.peer.close()


def test_random_sequences_on_one_socket(driver: str, no_leak: None) -> None:
    run_state_machine_as_test(
        lambda: OneSocket(driver),  # type: ignore[arg-type]  # any maker of machines will do
        settings=settings(
            max_examples=150,
            stateful_step_count=30,
            suppress_health_check=list(HealthCheck),  # a busy machine is no failure
        ),
    )
    gc.collect()
