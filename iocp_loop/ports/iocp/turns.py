"""One turn of the driver ``iocp``: the wait, and the dispatch of what it has gathered.

driver.py tells how it all works.  This is its hot path, which the native tier has in C (``_native/hot/iocp.c``),
and with it the receive of a stream that goes on and the end of a SendAll, as receiving.py and sockets.py do
them; whatever else completes is left to the `finish` of its submission.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ... import operations as ops
from ...native import hot
from ..driver import LONGEST_NS
from .binding import SlotPool, Submission, check, ffi, lib, nobody
from .receiving import SLOT_SIZE
from .requests import Association

__all__ = ["IocpTurns", "PythonIocpTurns"]

if TYPE_CHECKING:
    from .requests import IocpRequests as _Base
else:
    _Base = object


class PythonIocpTurns(_Base):
    """What a driver inherits its turn from."""

    _reaped: Iterator[tuple[int, int, int]] = iter(())
    _undispatched = False  # something of `_reaped` may be left

    def wait(self, timeout: float | None) -> None:
        self.waits += 1
        if self._undispatched:
            return
        self._sleeping = True
        try:
            if self.ready or self._at_once or (self.before_sleep is not None and self.before_sleep()):
                nanoseconds = 0
            elif timeout is None:
                nanoseconds = -1
            else:
                nanoseconds = int(min(max(timeout, 0) * 1e9, LONGEST_NS))
            code = lib.iocp_wait(self._port, nanoseconds)
        finally:
            self._sleeping = False
        check(code)

    def dispatch(self) -> None:
        if self.ready:
            self._drain_ready()
        at_once = self._at_once
        for _ in range(len(at_once)):
            if not at_once:  # as in _drain_ready
                break
            self._finish_submission(*at_once.popleft())
        if self._undispatched:  # what a dispatch that an exception ended has left
            self._deliver_reaped()
        port = self._port
        if port.count:
            # From the batch to the iterator without a step between at which a signal's exception could come in.
            numbers = iter(ffi.unpack(port.batch, port.count * 3))
            reaped = zip(numbers, numbers, numbers, strict=True)
            self._reaped = reaped
            self._undispatched = True
            port.count = 0
            self._deliver_reaped()
        if self.ready:
            self._drain_ready()

    def _deliver_reaped(self) -> None:
        outstanding = self._outstanding
        for address, count, code in self._reaped:
            sub = outstanding.pop(address, None)
            if sub is not None:  # else a request that had failed at once, see `_spoiled`
                self._finish_submission(sub, count, code)
        self._undispatched = False

    def _finish_submission(self, sub: Submission, count: int, code: int) -> None:
        sub.armed = False
        try:
            sub.finish(sub, count, code)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:  # of a `complete`
            self.report(exc)

    @property
    def gathered(self) -> bool:
        return bool(self.ready or self._at_once or self._undispatched or self._port.count)

    def _take_reaped(self) -> list[int]:
        """Take what was reaped and not dispatched away: the addresses of the submissions."""
        numbers = iter(ffi.unpack(self._port.batch, self._port.count * 3) if self._port.count else ())
        left = [address for address, _, _ in [*self._reaped, *zip(numbers, numbers, numbers, strict=True)]]
        self._port.count = 0
        self._undispatched = False
        return left


if TYPE_CHECKING or hot is None or lib is None:
    IocpTurns = PythonIocpTurns
else:
    hot.use_operations(ops)
    _FUNCTIONS = ("iocp_wait", "iocp_receive", "iocp_receive_from")
    hot.IocpTurns._use_requests(
        *(Submission, Association, SlotPool, nobody, SLOT_SIZE),
        tuple(int(ffi.cast("uintptr_t", ffi.addressof(lib.library, name))) for name in _FUNCTIONS),
    )

    class IocpTurns(hot.IocpTurns):
        """The native turn, which has to be told where the port is."""

        @staticmethod
        def _address(port):
            return int(ffi.cast("uintptr_t", port))
