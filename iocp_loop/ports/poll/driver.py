"""The driver ``poll``: a readiness poller that plays the part of a completion port.

How it works
------------
The kernel tells which descriptors are ready (epoll on Linux, else what :mod:`selectors` finds: kqueue, poll, select);
the driver then makes the call that was asked for, without blocking, and its result is the completion.  So a
completion is *made* in ``dispatch``, at the moment that it is delivered.  This has two good consequences.  Data go
from the kernel into one hot scratch buffer and on to the protocol before the next connection's data overwrite it: one
buffer for all, none for an idle connection.  And nothing is ever half done in the background: cancelling and pausing
are exact.

Who owns what
-------------
Each descriptor with something in flight has a `_Watch`: a queue of operations that wait to read, one of operations
that wait to write, and the events that the poller has been told.  The poller works level-triggered, so an operation
that stays (a stream) is not armed again, and a short read needs no second call to learn that the socket is drained.

What may complete out of order
------------------------------
Operations of one descriptor and one direction complete in the order of their submission.  Nothing else is promised.

Descriptors that are closed behind the driver's back leave epoll by themselves.  Their watch is thrown away when the
number comes back with another object, or when the poller refuses it.

Manuals: epoll(7), epoll_ctl(2) (https://man7.org/linux/man-pages/man7/epoll.7.html), and the selectors module.
"""

from __future__ import annotations

import errno
import mmap
import os
import socket
from collections.abc import Callable
from typing import Any, cast

from ... import operations as ops
from ...operations import READABLE, WRITABLE, Operation
from ..accepting import accept_now
from ..driver import Driver, cancelled_error
from ..receiving import AGAIN, SCRATCH_SIZE, receive_datagrams, receive_for_stream
from .calls import ATTEMPTS, may_block, receive_from, start_connect
from .pollers import EDGES, EpollPoller, EventfdWaker, SelectorPoller, make_poller, make_waker
from .turns import PollTurns

__all__ = ["PollDriver"]

#: How many connections a listener takes at most before the others have their turn.
ACCEPTS_IN_A_TURN = 16

# A hang-up or an error (POLLHUP, POLLERR) makes every attempt worthwhile: the call itself tells what happened.
_READ_MASK = ~WRITABLE
_WRITE_MASK = ~READABLE


class _Watch:
    """What is in flight on one descriptor, and which events the poller watches for it.

    There is one for each idle connection, so it is kept small: the queues are tuples, made anew when they change.
    """

    __slots__ = ("events", "readers", "stream", "writers")

    def __init__(self) -> None:
        self.events = 0
        self.readers: tuple[Operation, ...] = ()
        self.writers: tuple[Operation, ...] = ()
        #: The one stream that receives here while nothing else reads: it has a short way through ``dispatch``.
        self.stream: ops.ReceiveStream | None = None

    def sweep(self) -> None:
        """Let go of what has ended."""
        self.readers = tuple([op for op in self.readers if op.state is not ops.DONE])
        self.writers = tuple([op for op in self.writers if op.state is not ops.DONE])

    def remove(self, op: Operation) -> None:
        self.readers = tuple(other for other in self.readers if other is not op)
        self.writers = tuple(other for other in self.writers if other is not op)

    def wanted(self) -> int:
        """The events to watch for now."""
        wanted = WRITABLE if self.writers else 0
        for op in self.readers:
            if not getattr(op, "paused", False):
                return wanted | READABLE
        return wanted


class PollDriver(PollTurns, Driver):
    """The contract of :class:`~iocp_loop.ports.driver.Driver` over a readiness poller."""

    name = "poll"

    def __init__(self, concurrency: int = 1) -> None:
        super().__init__(concurrency)
        self._watches: dict[int, _Watch] = {}
        self._scratch = mmap.mmap(-1, SCRATCH_SIZE)
        self._new: set[int] = set()  # descriptors whose watch is newer than the events
        self._open_poller()
        self._stream_steps: dict[type[Operation], Callable[[Any], None]] = {
            ops.ReceiveStream: self._receive_while_others_read,
            ops.ReceiveFromStream: self._receive_datagrams,
            ops.AcceptStream: self._accept_some,
        }
        self.kinds = frozenset({*ATTEMPTS, *self._stream_steps, ops.Readiness, ops.ReadinessStream})

    def _open_poller(self) -> None:
        self._unarmed_poller = False  # whether the poller knows none of the watches
        self._poller: EpollPoller | SelectorPoller = make_poller()
        self._use_poller()
        self._waker = make_waker()
        self._watch_waker()

    def _watch_waker(self) -> None:
        fd = self._waker.fileno()
        if EDGES and isinstance(self._poller, EpollPoller) and isinstance(self._waker, EventfdWaker):
            self._poller.watch(fd, 0, READABLE | EDGES)  # of each write, whatever the count: nobody has to read it
            self._quiet_waker = fd
        else:
            self._poller.watch(fd, 0, READABLE)
            self._quiet_waker = -1

    def _close_poller(self) -> None:
        self._forget_poller()
        self._poller.close()
        self._waker.close()

    # -- submitting --------------------------------------------------------------------------------

    def submit(self, op: Operation) -> None:
        kind = type(op)
        self._check_support(kind)
        self._adopt_socket_wait(op.fd)
        self._launch(op)
        if kind is ops.Connect:
            try:
                if start_connect(op):  # type: ignore[arg-type]  # its kind was looked at
                    self._finish(op, None)
                    return
            except (SystemExit, KeyboardInterrupt):
                self._retract(op)
                raise
            except BaseException as error:
                self._finish(op, None, error)
                return
        elif kind in ATTEMPTS and op.fd not in self._watches and not may_block(op) and self._attempt(op):
            return
        try:
            self._add(op, op.events)
        except BaseException:  # epoll refuses regular files too, but no call on one waits: it was made above
            self._retract(op)
            raise

    def _adopt_socket_wait(self, fd: int) -> None:
        """Before anything else is begun on `fd`: watch here for the receive that the native tier waits for there."""
        waiting = self._take_socket_wait(fd)
        if waiting is None:
            return
        if cast("socket.socket", waiting.handle).fileno() == fd:
            self._add(waiting, READABLE)
        else:  # its socket was closed, and the number means something else now
            self._finish(waiting, None, OSError(errno.EBADF, os.strerror(errno.EBADF)))

    def _attempt(self, op: Operation) -> bool:
        """Make the call of an ordinary operation; True when it is over, well or badly."""
        try:
            value = ATTEMPTS[type(op)](op)
        except AGAIN:
            return False
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # not only OSError: the argument may be wrong, the socket's class somebody's own
            self._finish(op, None, error)
            return True
        self._finish(op, value)
        return True

    def _add(self, op: Operation, events: int) -> None:
        watch = self._watches.get(op.fd)
        if watch is None or not self._still_watched(op.fd, watch):
            watch = self._watches[op.fd] = _Watch()
            self._new.add(op.fd)
        if events & READABLE:
            watch.readers += (op,)
        if events & WRITABLE:
            watch.writers += (op,)
        try:
            self._update(op.fd, watch)
        except BaseException:
            watch.remove(op)
            if not watch.readers and not watch.writers:
                self._watches.pop(op.fd, None)
            raise

    def _still_watched(self, fd: int, watch: _Watch) -> bool:
        """False where the watched file was closed, and its number now means something else.

        The poller tells: a file that is closed has left it.  What waited for the old file ends with EBADF.
        """
        if not watch.events:
            return bool(watch.readers or watch.writers)
        try:
            self._poller.watch(fd, watch.events, watch.events)
        except OSError:
            self._end_all(watch, OSError(errno.EBADF, os.strerror(errno.EBADF)))
            return False
        return True

    def _end_all(self, watch: _Watch, error: OSError) -> None:
        for op in (*watch.readers, *watch.writers):
            if op.in_flight:
                self._finish(op, None, error)

    def _wait_again(self, op: Operation) -> None:
        """Wait for a receive that the native tier has begun, in line."""
        self._adopt_socket_wait(op.fd)
        try:
            self._add(op, READABLE)
        except OSError as error:
            self._finish(op, None, error)

    def _update(self, fd: int, watch: _Watch) -> None:
        """Tell the poller what is wanted of `fd` now."""
        wanted = watch.wanted()
        only = watch.readers[0] if wanted & READABLE and len(watch.readers) == 1 else None
        watch.stream = only if isinstance(only, ops.ReceiveStream) else None
        if wanted != watch.events:
            self._poller.watch(fd, watch.events, wanted)
            watch.events = wanted
            if self._poller.looks_once:
                self.wake()  # the thread that waits, if it is another one, does not know of this

    def _settle(self, fd: int, watch: _Watch) -> None:
        """As `_update`, and drop the watch when nothing is in flight on it."""
        try:
            self._update(fd, watch)
        except OSError:
            watch.events = 0  # the descriptor was closed: the poller has forgotten it already
        if not watch.readers and not watch.writers and self._watches.get(fd) is watch:
            del self._watches[fd]

    def cancel(self, op: Operation) -> None:
        if self._cancel_alone(op) or not self._begin_cancel(op):
            return
        watch = self._watches.get(op.fd)
        self._finish(op, None, cancelled_error())
        if watch is not None:
            watch.remove(op)
            self._settle(op.fd, watch)
        else:
            self._adopt_socket_wait(op.fd)  # if it was this one, it is let go

    def pause(self, op: Any) -> None:
        op.paused = True
        watch = self._watches.get(op.fd)
        if watch is not None and op.in_flight:
            self._settle(op.fd, watch)

    def resume(self, op: Any) -> None:
        op.paused = False
        watch = self._watches.get(op.fd)
        if watch is None or not op.in_flight:
            return
        try:
            self._update(op.fd, watch)
        except OSError as error:  # the descriptor was closed meanwhile
            watch.remove(op)
            self._finish(op, None, error)
            self._settle(op.fd, watch)

    # -- dispatching -------------------------------------------------------------------

    def _dispatch_other(self, fd: int, watch: _Watch | None, events: int) -> None:
        """Whatever is not plain data for the one stream that receives on a descriptor."""
        if watch is None:
            if fd == self._waker.fileno() != self._quiet_waker:
                self._waker.drain()
            return
        if fd in self._new:
            return  # the event is that of an earlier file with the same number; the next wait tells about this one
        if len(watch.readers) == 1 and type(watch.readers[0]) is ops.AcceptStream and not watch.writers:
            self._accept_some(watch.readers[0])  # which sees to the watch itself
            return
        held = (READABLE if events & _READ_MASK else 0) | (WRITABLE if events & _WRITE_MASK else 0)
        if held & READABLE and watch.readers:
            self._serve(fd, watch, watch.readers, READABLE, held)
        if held & WRITABLE and watch.writers:
            self._serve(fd, watch, watch.writers, WRITABLE, held)

    def _serve(self, fd: int, watch: _Watch, queue: tuple[Operation, ...], direction: int, held: int) -> None:
        """Advance the operations of one direction of a ready descriptor, in order, until one has to wait.

        `held` are all the events that hold on it: one that waits for both is told of both at once.
        """
        for op in queue:
            if op.state is ops.DONE:
                continue
            kind = type(op)
            step = self._stream_steps.get(kind)
            if step is not None:
                step(op)
            elif kind is ops.ReadinessStream:
                events = held & op.events
                if direction == READABLE or not events & READABLE:  # else it was told as a reader
                    self.completions += 1
                    self._complete(op, events, None)
            elif kind is ops.Readiness:
                self._finish(op, held & op.events)
            elif not self._attempt(op):
                break
        watch.sweep()
        self._settle(fd, watch)

    def _end_stream(self, op: Operation, value: Any, error: BaseException | None) -> None:
        if not self._land(op):
            return  # a finalizer has cancelled it since it was looked at
        watch = self._watches.get(op.fd)
        if watch is not None:
            watch.remove(op)
            self._settle(op.fd, watch)
        self.completions += 1
        self._complete(op, value, error)

    def _receive_data(self, op: ops.ReceiveStream) -> int:
        """One receive of a stream, delivered at once: the hottest function of this driver.  The number of bytes."""
        try:
            value = receive_for_stream(op, self._scratch)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            self._end_stream(op, None, error)
            return 0
        if value:
            op.complete(value, None)
            return value if isinstance(value, int) else len(value)
        if value is not None:
            self._end_stream(op, value, None)
        return 0

    def _receive_while_others_read(self, op: ops.ReceiveStream) -> None:
        if not op.paused:
            self.completions += 1
            self._receive_data(op)

    def _receive_datagrams(self, op: ops.ReceiveFromStream) -> None:
        # A few per turn: one busy endpoint must not starve the others.
        try:
            self.completions += receive_datagrams(self, op, receive_from)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            self._end_stream(op, None, error)

    def _accept_some(self, op: ops.AcceptStream) -> None:
        # One, and twice as many in each turn that finds more left: what one process leaves, others that share the
        # listener may take.  None of them is to take them all because it woke first.
        turn, burst = divmod(op.driver_data or 0, 2 * ACCEPTS_IN_A_TURN)
        if turn != self.waits:
            burst = 1
        op.driver_data = (self.waits + 1) * 2 * ACCEPTS_IN_A_TURN + min(2 * burst, ACCEPTS_IN_A_TURN)
        for _ in range(burst):
            if op.state is ops.DONE:
                return
            try:
                value = accept_now(op.handle)
            except ConnectionAbortedError:
                return
            except AGAIN:
                op.driver_data = None
                return
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:
                self._end_stream(op, None, error)
                return
            self.completions += 1
            self._complete(op, value, None)

    # -- waking and closing ------------------------------------------------------------------------

    def _wake(self) -> None:
        self._waker.wake()

    def _release(self, timeout: float) -> None:
        for op in list(self.in_flight.values()):
            self._land(op)
        self._watches.clear()
        self._forget_socket_waits()
        self._close_poller()
        self._scratch.close()

    def after_fork_in_child(self) -> None:
        if not self.closed:
            self._close_poller()  # what goes through its descriptor is the parent's
            self._open_poller()
            for watch in self._watches.values():
                watch.events = 0
            self._unarmed_poller = True
        super().after_fork_in_child()

    def _arm_all(self) -> None:
        """Tell a new poller of everything that waits."""
        self._unarmed_poller = False
        for fd in self._socket_waits():
            self._adopt_socket_wait(fd)
        for fd, watch in list(self._watches.items()):
            try:
                self._update(fd, watch)
            except OSError as error:  # closed since
                self._end_all(watch, error)
                self._watches.pop(fd, None)


PollDriver._use_watch(_Watch)  # once, not by each driver: the native turn has it for all threads
