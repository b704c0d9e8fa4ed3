"""The contract of a driver: what the three of them share, and what each must do.

A driver turns operations into completions.  It has four verbs that matter:

``submit(op)``
    Hand an operation to the kernel, or note it so that it goes in with the next wait.  If the kernel refuses it
    outright, raise; nothing is in flight then.  If it is done at once, its completion is put on the `ready` queue and
    comes out with the next ``dispatch``: never by recursion, never twice.
``wait(timeout)``
    The one call into the kernel of a turn: takes the noted submissions in, blocks at most `timeout` seconds, and
    gathers what has completed.  It calls nobody.
``dispatch()``
    Hand each gathered completion to its operation's ``complete``.  If one of them raises (only what is to end the
    loop does), the rest stay for the next dispatch.  Anything else that is raised on the way ends its own operation,
    or, if `complete` raised it, is reported.
``cancel(op)``
    A request.  The operation stays in flight until its last completion.

First come, first served: operations of one handle and one direction are served in the order of their submission, and
complete in it.  Two kinds are left out of it: reads and writes at an offset of a file, and whatever receives beside a
stream.  Operations of different handles complete in any order.  An operation belongs to the file that its handle meant
when it was submitted: when a number has become another file's, it ends with EBADF.

``submit``, ``cancel`` and ``dispatch`` belong to the thread that runs the port (or are called under its lock);
``wake`` may be called from any thread.  Nothing else in a driver is shared between threads, and nothing in a driver
knows of Futures, transports or loops.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import threading
import weakref
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Set
from typing import Any, ClassVar

from ..operations import CANCELLING, DONE, IN_FLIGHT, NEW, HandleLike, Operation

__all__ = ["Driver", "DriverUnavailable", "cancelled_error"]

_logger = logging.getLogger("iocp_loop")

#: The longest timeout that is handed to the kernel, ns: about 100 years.
LONGEST_NS = 3_000_000_000_000_000_000


class DriverUnavailable(RuntimeError):
    """A driver that was asked for by name can't work here.  The message names the cause and the way out."""


def cancelled_error() -> OSError:
    """The error of an operation that a cancel ended (ECANCELED, as io_uring and POSIX aio report it)."""
    return OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))


class Driver(ABC):
    """One way to carry operations out.  See the top of the module for the contract.

    `concurrency` is how many threads may be in ``wait`` and ``submit`` at once; 1, the loop's case, is the fast one.
    """

    #: ``"iocp"``, ``"uring"`` or ``"poll"``.
    name: ClassVar[str]
    #: The kinds of operation that it carries out.
    kinds: Set[type[Operation]]

    def __init__(self, concurrency: int = 1) -> None:
        self.concurrency = concurrency
        #: token -> operation, from submission until the last completion is reaped.
        self.in_flight: dict[int, Operation] = {}
        #: Completions that need no kernel: (operation, value, error).
        self.ready: deque[tuple[Operation, Any, BaseException | None]] = deque()
        self.submissions: Counter[type[Operation]] = Counter()
        self.completions = 0
        self.waits = 0
        self.wakes = 0
        self.closed = False
        #: Asked by ``wait`` once it counts as sleeping: True keeps it from blocking.  Closes the gap between the last
        #: look at a queue and the sleep, in which another thread would see no sleeper to wake.
        self.before_sleep: Callable[[], bool] | None = None
        #: Called with what a `complete` has raised, as asyncio's ``call_exception_handler`` is; None: it is logged.
        self.exception_handler: Callable[[dict[str, Any]], object] | None = None
        #: Whether ``auto`` has chosen it: if it turns out not to work after all, another may do its work.
        self.replaceable = False
        self._sleeping = False
        self._waking = threading.RLock()  # held around `_wake`; again by a signal handler that comes in between
        self._tokens = 0
        _live_drivers.add(self)

    # -- what each driver does ---------------------------------------------------------------------

    @abstractmethod
    def submit(self, op: Operation) -> None:
        """Put `op` in flight.  Raises OSError, ValueError or the like if it is refused outright."""

    @abstractmethod
    def cancel(self, op: Operation) -> None:
        """Ask for the end of `op`.  Nothing happens if it is not in flight or is being cancelled already."""

    @abstractmethod
    def wait(self, timeout: float | None) -> None:
        """Submit what is noted, block at most `timeout` seconds (None: without limit), gather completions.

        Returns early without an error when a signal or a ``wake`` comes in.
        """

    @abstractmethod
    def dispatch(self) -> None:
        """Call ``complete`` for everything that ``wait`` gathered and for what stands on `ready`."""

    @abstractmethod
    def _wake(self) -> None:
        """Make a ``wait`` that is running, or else the next one, return.  From any thread."""

    @abstractmethod
    def _release(self, timeout: float) -> None:
        """Cancel and reap what is in flight within `timeout` seconds, then free the kernel's objects.

        It calls nobody: ``close`` tells every operation that it was cancelled.
        """

    @property
    def gathered(self) -> bool:
        """Whether ``dispatch`` has something to deliver."""
        return bool(self.ready)

    def pause(self, op: Any) -> None:
        """Let a receive stream rest.  What the kernel has handed over already is still delivered."""
        op.paused = True

    @abstractmethod
    def resume(self, op: Any) -> None:
        """Let a paused receive stream go on."""

    def let_go(self) -> bool:
        """Make cancels take effect in the kernel now, so that a handle can be closed at once and is really gone.

        False if that has to wait until the cancelled operations are reaped.  Where a cancel takes effect at once
        anyway, and where closing a handle ends its operations, there is nothing to do.
        """
        return True

    @abstractmethod
    def busy(self, fd: int, direction: int) -> bool:
        """Whether an operation of `direction` (READABLE or WRITABLE) waits on `fd`, which is to be served first."""

    def register(self, handle: HandleLike) -> None:  # noqa: B027 - a driver that needs no association inherits this
        """Associate `handle` with the port, where the system wants that (Windows)."""

    def hear(self, sock: socket.socket) -> None:  # noqa: B027 - a driver whose wait a signal ends inherits this
        """End a ``wait`` when something comes to `sock`, and throw that away, where a signal ends none (Windows)."""

    def after_fork_in_child(self) -> None:
        """Part with what the parent still uses, without a call that it could notice.

        What is in flight stays so.  The child has a port of its own, which begins to wait for all of it with its first
        ``wait``; before that a cancel ends an operation at once.
        """
        self._sleeping = False
        self._waking = threading.RLock()  # the thread that held the old one may be the parent's

    # -- what they share ---------------------------------------------------------------------------

    def wake(self) -> None:
        """Make ``wait`` return.  From any thread; costs a kernel call only if somebody sleeps."""
        if self._sleeping:
            with self._waking:
                # Looked at again: what `_wake` writes to may have been closed, and its number be something else now.
                if self._sleeping and not self.closed:
                    self.wakes += 1
                    self._wake()

    def close(self, timeout: float = 2.0) -> None:
        """Cancel everything, reap it, free the port.  Bounded by `timeout` seconds; never frees under the kernel.

        What the kernel does not give back in time is kept for the life of the process, with a ResourceWarning.
        What was done before is delivered as it was; the rest with ECANCELED.
        """
        if self.closed:
            return
        with self._waking:
            self.closed = True
        remaining = list(self.in_flight.values())
        done = list(self.ready)
        self._release(timeout)
        self.ready.clear()
        for op, value, error in done:
            self._complete(op, value, error)
        for op in remaining:
            self._complete(op, None, cancelled_error())

    def _check_support(self, kind: type[Operation]) -> None:
        if kind not in self.kinds:
            raise NotImplementedError(f"driver {self.name} has no operation {kind.__name__}")

    def _launch(self, op: Operation) -> None:
        """Enter `op` in the in-flight table."""
        if op.state is not NEW:
            raise ValueError(f"{op!r} was submitted before; an operation serves once")
        if self.closed:
            raise ValueError("the completion port is closed")
        self._tokens += 1
        op.token = self._tokens
        op.state = IN_FLIGHT
        self.in_flight[op.token] = op
        self.submissions[type(op)] += 1

    def _retract(self, op: Operation) -> None:
        """Undo `_launch`, for a submission that the kernel refused."""
        del self.in_flight[op.token]
        self.submissions[type(op)] -= 1
        op.state = NEW

    def _land(self, op: Operation) -> bool:
        """Take `op` off the in-flight table: its last completion is here.  False if it has left it already.

        A finalizer may run between any two steps, and cancel `op`.
        """
        landed = self.in_flight.pop(op.token, None) is op
        op.state = DONE
        return landed

    def _finish(self, op: Operation, value: Any, error: BaseException | None = None) -> None:
        """Land `op` and put its last completion on the ready queue."""
        if self._land(op):
            self.ready.append((op, value, error))
        elif error is None:  # a finalizer has cancelled it since the call for it was made, which got something
            for place, (other, _, _) in enumerate(self.ready):
                if other is op:
                    self.ready[place] = (op, value, None)

    def _complete(self, op: Operation, value: Any, error: BaseException | None) -> None:
        """Deliver a completion.  What that raises is reported and reaches nobody else, unless it is to end the loop."""
        try:
            op.complete(value, error)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:
            self.report(exc)

    def report(self, error: BaseException, message: str = "Exception in the completion of an operation") -> None:
        """Tell the exception handler, or else the log, of what a `complete` has raised."""
        if self.exception_handler is None:
            _logger.error(message, exc_info=error)
        else:
            self.exception_handler({"message": message, "exception": error})

    def _begin_cancel(self, op: Operation) -> bool:
        """Note the request; False if there is nothing to cancel, or it was asked for already."""
        if op.state is not IN_FLIGHT:
            return False
        op.state = CANCELLING
        return True

    def _drain_ready(self) -> None:
        """Deliver what stands on the ready queue now; what is added meanwhile waits for the next dispatch."""
        ready = self.ready
        for _ in range(len(ready)):
            if not ready:  # a completion has run the loop inside of itself (nest_asyncio), and that took the rest
                break
            op, value, error = ready.popleft()
            self.completions += 1
            self._complete(op, value, error)


_live_drivers: weakref.WeakSet[Driver] = weakref.WeakSet()


def _forget_parents_ports() -> None:
    for driver in list(_live_drivers):
        driver.after_fork_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_parents_ports)

_leaked: list[object] = []  # what the kernel kept: it must outlive its users
_leak_lock = threading.Lock()


def leak(*things: object) -> None:
    """Keep `things` for the life of the process, because the kernel may still write to them."""
    with _leak_lock:
        _leaked.extend(things)
