"""One turn of the driver ``poll``: the wait, and the dispatch of the events.

driver.py tells how it all works.  This is its hot path, which the native tier has in C where there is epoll
(``_native/hot/epoll.c``): whatever is not plain data for the one stream that receives on a descriptor is left to the
driver, by ``_dispatch_other``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from operator import length_hint
from typing import TYPE_CHECKING, Any

from ... import operations as ops
from ...native import hot
from ...operations import READABLE
from ..driver import Driver

__all__ = ["PollTurns", "PythonPollTurns"]

if TYPE_CHECKING:
    _Base = Driver
else:
    _Base = object


class PythonPollTurns(_Base):
    """What a driver inherits its turn from."""

    _events: Iterator[tuple[int, int]] = iter(())
    _poller: Any
    _watches: dict[int, Any]
    _new: set[int]  # descriptors whose watch is newer than the events

    if TYPE_CHECKING:  # the rest of the driver: PollDriver's
        _unarmed_poller: bool

        def _arm_all(self) -> None: ...
        def _dispatch_other(self, fd: int, watch: Any, events: int) -> None: ...
        def _receive_data(self, op: ops.ReceiveStream) -> int: ...

    _epoll_fd = -1
    _quiet_waker = -1  # the descriptor of the waker, where nobody has to read what was written to it

    def _use_poller(self) -> None:
        """The poller is new.  The native turn waits for it itself, and driver uring polls it."""
        if hasattr(self._poller, "fileno"):
            self._epoll_fd = self._poller.fileno()

    def _forget_poller(self) -> None:
        """The poller is being closed; the native turn must not use its descriptor any more."""

    def _forget_socket_waits(self) -> None:
        """The driver is closed; the native turn lets go of what waits there."""

    @staticmethod
    def _use_watch(kind: type) -> None:
        """Nothing to prepare; the native turn looks at what the driver keeps for a descriptor."""

    def _take_socket_wait(self, fd: int) -> ops.Operation | None:
        """A receive on `fd` that is not known here; only the native tier has such."""
        return None

    def _cancel_alone(self, op: ops.Operation) -> bool:
        """End an operation in flight, where nothing else waits on its descriptor; the native tier's short way."""
        return False

    def _socket_waits(self) -> list[int]:
        """The descriptors with such a receive."""
        return []

    def busy(self, fd: int, direction: int) -> bool:
        watch = self._watches.get(fd)
        return watch is not None and bool(watch.readers if direction == READABLE else watch.writers)

    def _before_wait(self) -> None:
        self.waits += 1
        if self._unarmed_poller:
            self._arm_all()

    def wait(self, timeout: float | None) -> None:
        self._before_wait()
        if length_hint(self._events):
            return  # an exception has ended the dispatch, or this is a run inside of it: it goes on first
        self._sleeping = True
        try:
            if self.ready or (self.before_sleep is not None and self.before_sleep()):
                timeout = 0
            self._events = iter(self._poller.poll(timeout))
            self._new.clear()
        finally:
            self._sleeping = False

    @property
    def gathered(self) -> bool:
        return bool(self.ready) or length_hint(self._events) > 0

    def dispatch(self) -> None:
        if self.ready:
            self._drain_ready()
        self._deliver_events()
        if self.ready:
            self._drain_ready()

    def _deliver_events(self) -> None:
        watches = self._watches
        received = 0
        try:
            for fd, events in self._events:
                watch = watches.get(fd)
                try:
                    if (
                        events & READABLE
                        and watch is not None
                        and watch.stream is not None
                        and (events == READABLE or not watch.writers)
                    ):
                        # The end of a UNIX connection hangs up as well: for who only receives, an end like any other.
                        # Without a look at _new: a receive that finds nothing does no harm.
                        received += 1
                        self._receive_data(watch.stream)
                    else:
                        self._dispatch_other(fd, watch, events)
                except (SystemExit, KeyboardInterrupt):
                    raise
                except BaseException as exc:  # of a `complete`
                    self.report(exc)
        finally:
            self.completions += received


if TYPE_CHECKING or hot is None or not hasattr(hot, "EpollTurns"):
    PollTurns = PythonPollTurns
else:
    hot.use_operations(ops)

    class PollTurns(hot.EpollTurns):
        """The native turn, which has to be told which epoll instance to wait for."""

        _before_wait = PythonPollTurns._before_wait
        _deliver_events = PythonPollTurns._deliver_events

        def _use_poller(self):
            if hasattr(self._poller, "fileno"):
                self._epoll_fd = self._poller.fileno()
            else:  # not epoll
                self._events = iter(())
                self.wait = functools.partial(PythonPollTurns.wait, self)
                self.dispatch = functools.partial(PythonPollTurns.dispatch, self)

        @property
        def gathered(self):
            return super().gathered or length_hint(getattr(self, "_events", ())) > 0
