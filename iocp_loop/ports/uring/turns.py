"""One turn of the driver ``uring``: the wait, and the dispatch of what it has gathered.

driver.py tells how it all works.  This is its hot path, which the native tier has in C (``_native/hot/uring.c``):
the turn of driver ``poll`` with a ring in it.  Whatever is not the data of a stream that goes on is left to the driver,
by ``_reap``.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Iterator
from operator import length_hint
from typing import TYPE_CHECKING, Any

from ... import operations as ops
from ...native import hot
from ..driver import LONGEST_NS
from ..poll.turns import PythonPollTurns
from .binding import ffi, lib

__all__ = ["PythonUringTurns", "UringTurns"]


class PythonUringTurns(PythonPollTurns):
    """What a driver inherits its turn from."""

    _ring: Any  # ``uring *`` of the native module, or None
    _memory: Any
    _arrays: tuple[Any, ...]
    _shared: bool
    _without_ring: bool
    _taken: int  # the serial of the last batch that was taken from the ring
    _batch: Iterator[tuple[int, int, int, int]]
    _undispatched: bool  # something of the batch may be left
    _unsubmitted: list[ops.Operation]
    _uncancelled: list[ops.Operation]

    if TYPE_CHECKING:  # the rest of the driver: UringDriver's

        def _open_ring(self) -> None: ...  # or it goes on without one
        def _ring_failed(self, code: int) -> None: ...
        def _queue_leftovers(self) -> None: ...
        def _hand_over(self) -> None: ...
        def _reap(self, op: Any, result: int, flags: int, start: int) -> None: ...

    @staticmethod
    def _use_stream(kind: type) -> None:
        """Nothing to prepare; the native turn looks at what the driver keeps for a stream."""

    def wait(self, timeout: float | None) -> None:
        if self._without_ring:
            super().wait(timeout)
            return
        self._before_wait()
        if self._undispatched or length_hint(self._events):
            return  # an exception has ended the dispatch, or this is a run inside of it: it goes on first
        if self._ring is None:
            if timeout is not None and timeout <= 0 and not self.in_flight:
                return  # a loop that has neither slept nor begun anything needs no ring
            self._open_ring()
        if self._ring is None:
            super().wait(timeout)
            return
        self._events = iter(())
        self._new.clear()
        # What has been ready stays ready until somebody looks: the ring tells of changes only.
        if self._take_events() or (timeout is not None and timeout <= 0):
            count = lib.uring_wait(self._ring, 0, self._taken)
        else:
            count = self._sleep(timeout)
        if count == -errno.EEXIST:
            self._open_ring()
            count = lib.uring_wait(self._ring, 0, self._taken) if self._ring is not None else 0
        if count > 0:
            # A signal handler may raise right after any call.  Up to this zip the ring hands the same batch out again;
            # the assignments after it are not interrupted.
            self._batch = zip(*[ffi.unpack(array, count) for array in self._arrays])  # noqa: B905 - equal by make
            self._taken += 1
            self._undispatched = True
            self.completions += count
        elif count < 0:
            self._ring_failed(-count)
        if self._ring is None:
            super().wait(timeout)
        elif not length_hint(self._events):
            self._take_events()

    def _take_events(self) -> bool:
        """Take what the readiness poller may have to tell, without waiting."""
        if not self._ring.events_hold:
            return False
        events = self._poller.poll(0)
        self._events = iter(events)
        self._ring.events_hold = bool(events)
        return bool(events)

    def _sleep(self, timeout: float | None) -> int:
        """uring_wait for at most `timeout` seconds, as somebody whom others can wake."""
        limit = -1 if timeout is None else min(max(math.ceil(timeout * 1e9), lib.URING_SHORTEST_NS), LONGEST_NS)
        self._sleeping = True
        try:
            busy = self.ready or self._unsubmitted or self._uncancelled
            if busy or (self.before_sleep is not None and self.before_sleep()):
                limit = 0
            count: int = lib.uring_wait(self._ring, limit, self._taken)
        finally:
            self._sleeping = False
        return count

    def dispatch(self) -> None:
        if self.ready:
            self._drain_ready()
        if self._undispatched:
            in_flight = self.in_flight
            memory = self._memory
            stream_data = lib.URING_MORE | lib.URING_DATA
            # An iterator: if a completion is to end the loop, the rest is still there for the next dispatch.
            for token, result, flags, start in self._batch:
                op: Any = in_flight[token]
                try:
                    if flags == stream_data:
                        op.complete(memory[start:result], None)
                    else:
                        self._reap(op, result, flags, start)
                except (SystemExit, KeyboardInterrupt):
                    raise
                except BaseException as exc:  # of a `complete`
                    self.report(exc)
            self._undispatched = False
        self._deliver_events()
        if self._unsubmitted or self._uncancelled:
            self._queue_leftovers()
        if self.ready:
            self._drain_ready()
        if self._shared and not self.closed:
            self._hand_over()


if TYPE_CHECKING or hot is None or lib is None:
    UringTurns = PythonUringTurns
else:
    hot.use_operations(ops)
    _FUNCTIONS = [
        int(ffi.cast("uintptr_t", ffi.addressof(lib.library, name)))
        for name in ("uring_wait", "uring_prep_receive_stream", "uring_cookie")
    ]

    class UringTurns(hot.UringTurns):
        """The native turn, which has to be told where the ring is, and the functions of the binding that it calls."""

        @staticmethod
        def _addresses(ring):
            return int(ffi.cast("uintptr_t", ring)), *_FUNCTIONS
