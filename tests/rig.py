"""A driver by itself, as the tests of the drivers use it."""

from __future__ import annotations

import errno
import selectors
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

from iocp_loop import operations as ops
from iocp_loop.operations import READABLE, Operation
from iocp_loop.ports import Driver, make_driver
from iocp_loop.ports.poll import driver as poll
from iocp_loop.ports.poll import pollers

from .support import LIMIT

Pair = tuple[socket.socket, socket.socket]

#: A turn that is to show that nothing comes; seconds.
A_MOMENT = 0.02


#: What a poll driver can stand on, here or on another system.
POLLERS = [
    kind
    for name in ("SelectSelector", "PollSelector", "EpollSelector", "KqueueSelector")
    if (kind := getattr(selectors, name, None)) is not None
]


class Rig:
    """A driver and what it delivered: ``(operation, value, error)`` in order."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.delivered: list[tuple[Operation, Any, Any]] = []

    def submit(self, op: Operation, then: Callable[[Any, BaseException | None], object] | None = None) -> Any:
        """Submit `op`; its completions are noted, and given to `then`."""

        def complete(value: Any, error: BaseException | None) -> None:
            self.delivered.append((op, value, error))
            if then is not None:
                then(value, error)

        op.complete = complete
        if isinstance(op.handle, socket.socket):
            self.driver.register(op.handle)
        self.driver.submit(op)
        return op

    def turn(self, timeout: float = 0.0) -> None:
        self.driver.wait(timeout)
        self.driver.dispatch()

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + LIMIT
        while not condition():
            assert time.monotonic() < deadline, f"it has not happened in time; delivered: {self.delivered}"
            self.turn(A_MOMENT)

    def nothing_comes(self) -> bool:
        """True if nothing is delivered for a moment."""
        before = len(self.delivered)
        for _ in range(3):
            self.turn(A_MOMENT)
        return len(self.delivered) == before

    def completions(self, op: Operation) -> list[tuple[Any, Any]]:
        return [(value, error) for each, value, error in self.delivered if each is op]

    def values(self, op: Operation) -> list[Any]:
        return [value for value, error in self.completions(op) if error is None]

    def outcome(self, op: Operation) -> tuple[Any, Any]:
        """Wait for the one completion of an ordinary operation."""
        self.until(lambda: not op.in_flight)
        self.until(lambda: self.completions(op))
        (completion,) = self.completions(op)
        return completion

    def value(self, op: Operation) -> Any:
        value, error = self.outcome(op)
        assert error is None
        return value

    def error(self, op: Operation) -> OSError:
        value, error = self.outcome(op)
        assert isinstance(error, OSError), value
        return error

    def last_error(self, op: Operation) -> OSError:
        """Wait for the end of a stream; the error that ended it."""
        self.until(lambda: not op.in_flight and self.completions(op) and self.completions(op)[-1][1])
        error = self.completions(op)[-1][1]
        assert isinstance(error, OSError)
        return error

    def end(self, op: Operation) -> None:
        """Cancel `op` and see its last completion."""
        self.driver.cancel(op)
        assert self.last_error(op).errno == errno.ECANCELED


def received(rig: Rig, op: Operation) -> bytes:
    """What a receive stream has delivered."""
    return b"".join(bytes(value) for value in rig.values(op))


def waiting_operations(sock: socket.socket) -> list[Operation]:
    """One operation of each kind that waits for something to arrive on a socket where nothing does."""
    return [
        ops.Receive(sock, 10),
        ops.ReceiveInto(sock, bytearray(10)),
        ops.Readiness(sock, READABLE),
        ops.ReadinessStream(sock, READABLE),
        ops.ReceiveStream(sock),
        ops.ReceiveStream(sock, get_buffer=lambda: bytearray(10)),
    ]


def driver_of_another_system(poller: type, monkeypatch: pytest.MonkeyPatch) -> Driver:
    """A poll driver on `poller`, one of POLLERS, with the waker of systems that have no eventfd."""
    monkeypatch.setattr(selectors, "DefaultSelector", poller)
    monkeypatch.setattr(poll, "make_poller", pollers.SelectorPoller)
    monkeypatch.setattr(poll, "make_waker", pollers.SocketWaker)
    return make_driver("poll")


class SlowDriver(Driver):
    """A driver whose operations complete when the test says so, as a kernel's may: after the cancel, with data."""

    name = "poll"

    def submit(self, op: Operation) -> None:
        if op.handle.fileno() == -1:  # type: ignore[union-attr]  # sockets only
            raise OSError(errno.EBADF, "closed")
        self._launch(op)

    def cancel(self, op: Operation) -> None:
        self._begin_cancel(op)

    def busy(self, fd: int, direction: int) -> bool:
        return False

    def let_go(self) -> bool:
        return False

    def finish(self, op: Operation, value: Any, error: BaseException | None = None) -> None:
        self._finish(op, value, error)
        self.dispatch()

    def only(self) -> Any:
        (op,) = self.in_flight.values()
        return op

    def wait(self, timeout: float | None) -> None: ...

    def dispatch(self) -> None:
        self._drain_ready()

    def _wake(self) -> None: ...

    def _release(self, timeout: float) -> None:
        for op in list(self.in_flight.values()):
            self._land(op)

    def resume(self, op: Any) -> None: ...
