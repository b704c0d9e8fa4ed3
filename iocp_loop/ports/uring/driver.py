"""The driver ``uring``: Linux's io_uring, a completion port in the kernel, and an epoll instance beneath it.

How it works
------------
A *ring* is a pair of queues in memory that we share with the kernel.  We put requests into the submission queue; one
system call, ``io_uring_enter``, hands all of them over and waits; the kernel puts completions into the completion
queue.  Each completion carries the 64-bit number that its request was given: here the operation's token, its number
in the in-flight table.  ``_native/linux/uring.c`` holds the queues, this file what they mean, and turns.py the
turn itself.

The ring does what it does better than a readiness poller, and no more:

* Data of a stream come by a *multishot* request, which completes many times (``MORE`` is set on all but the last
  completion) and needs no submission per message.  The kernel picks a buffer from a pool that we provide, at the
  moment that data come, so an idle connection holds none.  A completion says where in the pool the bytes are, and
  ``dispatch`` copies them out.
* Files are read and written without blocking the loop.

All else is the readiness poller's, and this driver inherits it: see poll/driver.py.  The ring polls the epoll instance,
so that one wait covers both.  A request in the ring would do for those operations too, but it holds the file open that
it refers to.  The peer of a socket that its user closes would see no end, the port of a closed listener would stay
taken, and the first of several processes that accept on one listener would get every connection.  An epoll instance
holds no file open, keeps what waits on a descriptor in order, and wakes everybody.

Who owns what
-------------
* The ring belongs to the thread that waits in it (``SINGLE_ISSUER`` and ``DEFER_TASKRUN`` make it much cheaper, and
  the kernel answers every other thread with EEXIST).  It is made by the first ``wait`` that sleeps or has anything
  in flight; when another thread takes over, what the old queue still holds is delivered first, then a new ring is made
  and its requests are submitted again.  A port for several threads (`concurrency` above 1) has a ring without these
  flags.  There a request is handed over by whoever submits it, and is cancelled if that thread exits: ECANCELED that
  nobody asked for submits it again.
* No request is ever half done while it is in flight, which is what makes submitting again safe.
* Memory that the kernel reads or writes hangs on `driver_data` of the operation, and the in-flight table holds the
  operation until its last completion.  The memory is held by a memoryview of our own, whatever becomes of the
  operation's attribute; cffi only tells its address.  (A ``from_buffer`` that lives on would lock that view, and the
  garbage collector does not survive clearing a locked view.)
* The pool's buffers that a batch of completions used go back to the kernel when the next ``wait`` begins.  Then the
  batch has been dispatched: ``wait`` does nothing as long as something of the batch is left.
* A request is made by the number of a descriptor, and holds the file from then on.  Whoever makes another one for the
  same operation asks first whether the number still means the same file.

What may complete out of order
------------------------------
Operations on different handles.  On one handle and in one direction they complete in the order of their submission,
with two exceptions: reads and writes at an offset of a file, and whatever else reads from a socket beside a stream.

A cancel is a request of its own; the cancelled operation completes when it completes, with what it had done or with
ECANCELED.  A request that the kernel has not seen yet is simply taken out of the queue.

Streams end and are armed again
-------------------------------
A multishot request ends when the pool is empty (ENOBUFS, nothing is lost), when the completion queue overflows, or when
the kernel likes; it is armed again exactly when ``MORE`` is missing, or there would be two.  Pausing a stream cancels
its request (else the kernel would go on filling the pool for it), but not the stream: what has been received is
delivered, and ``resume`` arms another request.  A stream that keeps receiving large pieces is *watched* instead, as on
driver poll, until the pieces become small again: the pool is used in turn from end to end, and large pieces would
drag all of it through the cache.

Manuals: io_uring(7), io_uring_setup(2), io_uring_enter(2), io_uring_register(2), io_uring_prep_recv_multishot(3),
io_uring_setup_buf_ring(3), all at https://man7.org/linux/man-pages/man7/io_uring.7.html and beside it.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import socket
import sys
import time
import warnings
from collections import deque
from typing import Any

from ... import operations as ops
from ...operations import CANCELLING, IN_FLIGHT, READABLE, Operation
from ..driver import DriverUnavailable, cancelled_error, leak
from ..poll.driver import PollDriver
from .binding import ffi, forget_probe, lib, open_ring, probe, why_enter_failed
from .files import ASKED_AGAIN, FileRequest, FileRequests, file_of, is_regular, status_if_blocking
from .turns import UringTurns

if sys.platform != "linux":
    raise ImportError("io_uring exists on Linux only")

__all__ = ["UringDriver", "probe"]

_logger = logging.getLogger("asyncio")

#: The same of a receive.
_RECEIVE_AGAIN = frozenset({*ASKED_AGAIN, -errno.EAGAIN, -errno.ENOBUFS})


class _Stream:
    """The `driver_data` of a receive stream on a socket: how it receives, and what the kernel has of it."""

    __slots__ = ("armed", "cookie", "large", "stopping", "streak", "watched")

    def __init__(self) -> None:
        self.armed = False  # a request is in flight (or in the queue)
        self.stopping = False  # ... and is being cancelled, so that the stream rests or changes its way
        self.large = False  # to be watched, from the next time it is armed
        self.watched = False  # the readiness poller has it
        self.streak = 0  # pieces in a row that speak for changing between the two ways
        self.cookie: int | None = None  # of the socket; None before the first request


class UringDriver(FileRequests, UringTurns, PollDriver):
    """The contract of :class:`~iocp_loop.ports.driver.Driver` over io_uring.

    Raises DriverUnavailable where io_uring can't be used, OSError when a resource is short.
    """

    name = "uring"

    def __init__(self, concurrency: int = 1) -> None:
        reason = probe()
        if reason is not None:
            raise DriverUnavailable(reason)
        self._ring = None
        self._place = -1  # a descriptor that is kept for the ring: it is to be had when there are no others any more
        self._without_ring = False  # it was refused: this is driver poll from then on
        self._shared = concurrency > 1
        self._memory: Any = b""  # the pool, as one buffer
        self._arrays: tuple[Any, ...] = ()  # token, result, flags, start of each completion of a batch
        self._taken = 0
        self._batch = iter(())
        self._undispatched = False
        self._unsubmitted: list[Operation] = []  # in flight here, but the kernel had no room for their request
        self._uncancelled: list[Operation] = []  # ... or for the request that cancels theirs
        self._lines: dict[tuple[int, ...], deque[Operation]] = {}
        super().__init__(concurrency)
        try:
            if self._shared:
                self._open_ring()
            else:
                self._place = os.dup(self._waker.fileno())
        except BaseException:
            self.closed = True
            self._close_poller()
            raise

    def _watch_waker(self) -> None:
        if self._without_ring:  # else the ring polls the waker by itself
            super()._watch_waker()

    # -- submitting and cancelling -----------------------------------------------------------------

    def submit(self, op: Operation) -> None:
        kind = type(op)
        if self._without_ring:
            super().submit(op)
            return
        if kind is ops.ReceiveStream and _is_stream_socket(op.handle):
            self._adopt_socket_wait(op.fd)
            self._launch(op)
            op.driver_data = _Stream()
            op.driver_data.large = op.fd in self._watches  # behind who reads there already
            self._go_on(op)
        elif isinstance(op, ops.FileOperation) and (status := status_if_blocking(op.fd)) is not None:
            request = FileRequest(op, status)
            self._launch(op)
            op.driver_data = request
            self._submit_file(op)
        else:
            super().submit(op)
            return
        if self._shared:
            self._hand_over()

    def _arm(self, op: Any) -> None:
        """Queue a request for `op`.  Before there is a ring it is enough to be in flight: a new ring takes them all."""
        if self._ring is None:
            return
        if type(op) is ops.ReceiveStream:
            op.driver_data.armed = True
            op.driver_data.stopping = False
            code = lib.uring_prep_receive_stream(self._ring, op.fd, op.token)
        else:
            try:
                code = self._queue_file_request(op)
            except (TypeError, ValueError, OverflowError) as error:  # an argument that the request can't take
                self._finish(op, None, error)
                return
        if code < 0:
            self._unsubmitted.append(op)

    def _queue_leftovers(self) -> None:
        unsubmitted, self._unsubmitted = self._unsubmitted, []
        for op in unsubmitted:
            if type(op) is ops.ReceiveStream:
                op.driver_data.armed = False
                self._go_on(op)
            else:
                self._arm(op)
        uncancelled, self._uncancelled = self._uncancelled, []
        for op in uncancelled:
            if op.state is CANCELLING:
                if self._cancel_request(op):
                    self._finish(op, None, cancelled_error())
            elif op.state is IN_FLIGHT:  # a stream that is to rest
                op.driver_data.stopping = False
                self._stop(op)

    def _hand_over(self) -> None:
        """In a port for several threads: submit now, because the thread that waits sleeps already."""
        lib.uring_submit(self._ring)
        if self.ready:
            self.wake()

    def _in_ring(self, op: Operation) -> bool:
        """Whether `op` is the ring's business, if only to rest there."""
        kind = type(op.driver_data)
        return kind is FileRequest or (kind is _Stream and not op.driver_data.watched)

    def cancel(self, op: Operation) -> None:
        if not self._in_ring(op):
            super().cancel(op)
            return
        if not self._begin_cancel(op):
            return
        waits_here = self._ring is None or (type(op) is ops.ReceiveStream and not op.driver_data.armed)
        if op in self._unsubmitted:
            self._unsubmitted.remove(op)
            waits_here = True
        elif type(op.driver_data) is FileRequest:
            waits_here = waits_here or self._waits_in_line(op)
        if waits_here or self._cancel_request(op):
            self._finish(op, None, cancelled_error())
        if self._shared:
            self._hand_over()

    def _cancel_request(self, op: Operation) -> bool:
        """Ask for the end of the request of `op`.  True if the kernel never saw it: there is no completion then."""
        code = lib.uring_cancel(self._ring, op.token)
        if code < 0:
            self._uncancelled.append(op)
        return bool(code == 1)

    def _land(self, op: Operation) -> bool:
        landed = super()._land(op)
        if landed and type(op.driver_data) is FileRequest:
            self._leave_line(op)
        return landed

    def let_go(self) -> bool:
        # A request in the ring holds the file open behind its descriptor, until the kernel has seen to the cancel.
        if self._ring is None:
            return True
        return not self._shared and not self._uncancelled and lib.uring_settle(self._ring) == 0

    # -- the ring ----------------------------------------------------------------------------------

    def _open_ring(self) -> None:
        """Make the ring of this thread and submit what belongs into it, in place of an older ring if there is one."""
        old = self._ring
        self._give_place_up()
        try:
            ring = open_ring(self._waker.fileno(), self._epoll_fd, shared=self._shared)
        except OSError as error:
            self._lose_ring(error)
            return
        self._ring = ring
        self._memory = ffi.buffer(ring.memory, ring.memory_size)
        self._arrays = (ring.token, ring.result, ring.flags, ring.start)
        self._taken = 0
        self._unsubmitted.clear()
        self._uncancelled.clear()
        if old is not None:
            lib.uring_close(old, 0)
        for op in list(self.in_flight.values()):
            if not self._in_ring(op):
                continue
            if op.state is CANCELLING:
                self._finish(op, None, cancelled_error())
            elif type(op) is ops.ReceiveStream:
                op.driver_data.armed = op.driver_data.stopping = False
                self._go_on(op)
            elif op.state is IN_FLIGHT and not self._waits_in_line(op):
                self._move_file_request(op, old is not None)

    def _give_place_up(self) -> None:
        place, self._place = self._place, -1
        if place >= 0:
            os.close(place)

    def _ring_failed(self, code: int) -> None:
        """The kernel refuses a wait in the ring, with errno `code`."""
        self._lose_ring(OSError(code, why_enter_failed(code)))

    def _lose_ring(self, error: OSError) -> None:
        """There is no ring any more, as when a sandbox was entered.  Raises `error`, or goes on as driver poll."""
        forget_probe()
        if not self.replaceable or self._shared:
            raise error
        _logger.warning("going on with driver poll: %s", error.strerror)
        old, had_requests = self._ring, bool(self._requests())
        self._ring = None
        if old is not None:
            lib.uring_close(old, had_requests)
        self._without_ring = True
        self.name = "poll"  # type: ignore[misc]  # of the class until now
        self._unsubmitted.clear()
        self._uncancelled.clear()
        self._lines.clear()
        self._watch_waker()
        for op in list(self.in_flight.values()):
            if self._in_ring(op):
                self._hand_to_poller(op, old is not None)

    def _hand_to_poller(self, op: Any, had_ring: bool) -> None:
        had_request = had_ring and type(op.driver_data) is FileRequest
        if had_request:
            leak(op)  # as in _move_file_request
        if op.state is CANCELLING or (had_request and op.offset is None and is_regular(op.fd)):
            self._finish(op, None, cancelled_error())
            return
        if not (self._same_socket(op) if type(op) is ops.ReceiveStream else file_of(op.fd) == op.driver_data.file):
            self._finish(op, None, OSError(errno.EBADF, os.strerror(errno.EBADF)))
            return
        op.driver_data = None
        if type(op) is not ops.ReceiveStream and self._attempt(op):
            return
        try:
            self._add(op, op.events)
        except OSError as error:
            self._finish(op, None, error)

    @property
    def gathered(self) -> bool:
        return self._undispatched or super().gathered

    def _reap(self, op: Any, result: int, flags: int, start: int) -> None:
        """One completion, other than the data of a stream that goes on."""
        if type(op) is ops.ReceiveStream:
            self._reap_receive_stream(op, result, flags, start)
        else:
            self._reap_file(op, result)

    def _end(self, op: Operation, value: Any, error: BaseException | None = None) -> None:
        """The last completion of `op`; only ``dispatch`` may call this."""
        if self._land(op):
            op.complete(value, error)

    # -- receiving ---------------------------------------------------------------------------------

    def _go_on(self, op: Any) -> None:
        """Where a stream has no request: arm one, or watch the stream, or let it rest, or end it if that was asked."""
        stream: _Stream = op.driver_data
        if stream.armed or stream.watched:
            return
        if op.state is CANCELLING:
            self._finish(op, None, cancelled_error())
        elif op.state is not IN_FLIGHT or op.paused:
            return
        elif not self._same_socket(op):
            self._finish(op, None, OSError(errno.EBADF, os.strerror(errno.EBADF)))
        elif stream.large:
            try:
                self._add(op, READABLE)
                stream.watched = True
                stream.streak = 0
            except OSError as error:
                self._finish(op, None, error)
        else:
            self._arm(op)

    def _same_socket(self, op: ops.ReceiveStream) -> bool:
        """Whether the number of `op` still means the socket that it was submitted for."""
        cookie: int = lib.uring_cookie(op.fd)
        stream: _Stream = op.driver_data
        if stream.cookie is None:
            stream.cookie = cookie
        return stream.cookie == cookie

    def _stop(self, op: Operation) -> None:
        """Cancel the request of a stream, but not the stream."""
        stream: _Stream = op.driver_data
        if op.state is IN_FLIGHT and stream.armed and not stream.stopping:
            stream.stopping = True
            if self._cancel_request(op):
                stream.armed = stream.stopping = False

    def pause(self, op: Any) -> None:
        if not self._in_ring(op):
            super().pause(op)
            return
        op.paused = True
        self._stop(op)
        if self._shared:
            self._hand_over()

    def resume(self, op: Any) -> None:
        if type(op.driver_data) is not _Stream:
            super().resume(op)
            return
        if op.driver_data.watched and op.in_flight and self._same_socket(op):
            super().resume(op)
            return
        self._unwatch(op)
        op.paused = False
        self._go_on(op)
        if self._shared:
            self._hand_over()

    def _reap_receive_stream(self, op: ops.ReceiveStream, result: int, flags: int, start: int) -> None:
        stream: _Stream = op.driver_data
        if not flags & lib.URING_MORE:
            stream.armed = False
        if flags & lib.URING_DATA:
            if flags & lib.URING_BIG:
                stream.streak += 1
                if stream.streak >= lib.URING_IN_A_ROW and not stream.large:
                    stream.large = True
                    self._stop(op)
            try:
                op.complete(self._memory[start:result], None)
            finally:
                self._go_on(op)
        elif result == 0:
            self._end(op, b"")
        elif result in _RECEIVE_AGAIN:
            # The pool is empty.  Where others empty it in each turn, this one would ask in vain for ever.
            stream.large = stream.large or result == -errno.ENOBUFS
            self._go_on(op)
        else:
            self._end(op, None, OSError(-result, os.strerror(-result)))

    def _receive_data(self, op: ops.ReceiveStream) -> int:
        """One receive of a watched stream, which goes back to the ring when its pieces have become small."""
        count = super()._receive_data(op)
        stream = op.driver_data
        if count and stream is not None:
            stream.streak = stream.streak + 1 if count < lib.URING_SMALL else 0
            if stream.streak >= lib.URING_IN_A_ROW:
                self._receive_by_ring(op)
        return count

    def _receive_by_ring(self, op: ops.ReceiveStream) -> None:
        """Watch a stream no longer; the next data are the ring's to receive."""
        if op.state is not IN_FLIGHT:
            return
        self._unwatch(op)
        op.driver_data.large = False
        self._go_on(op)
        if self._shared:
            self._hand_over()

    def _unwatch(self, op: ops.ReceiveStream) -> None:
        stream: _Stream = op.driver_data
        watch = self._watches.get(op.fd)
        if stream.watched and watch is not None:
            watch.remove(op)
            self._settle(op.fd, watch)
        stream.watched = False
        stream.streak = 0

    # -- closing -----------------------------------------------------------------------------------

    def _release(self, timeout: float) -> None:
        for token, result, flags, _ in self._batch:
            self._discard(token, result, flags)
        self._undispatched = False
        ring, self._ring = self._ring, None
        if ring is not None:
            self._reap_all(ring, timeout)
            kept = self._requests_with_memory()
            lib.uring_close(ring, bool(self._requests()))
            if kept:
                leak(*kept)
                warnings.warn(
                    f"the kernel did not give back in {timeout} s: {kept!r}; their memory is kept",
                    ResourceWarning,
                    stacklevel=3,
                )
        self._give_place_up()
        super()._release(timeout)
        self._unsubmitted.clear()
        self._uncancelled.clear()
        self._memory = b""
        self._arrays = ()

    def _requests(self) -> list[Operation]:
        """The operations that the kernel has a request for."""
        return [
            op
            for op in self.in_flight.values()
            if self._in_ring(op)
            and op not in self._unsubmitted
            and (op.driver_data.armed if type(op) is ops.ReceiveStream else not self._waits_in_line(op))
        ]

    def _requests_with_memory(self) -> list[Operation]:
        """Those with memory of their own that the kernel may touch."""
        return [op for op in self._requests() if type(op.driver_data) is FileRequest]

    def __del__(self) -> None:
        # Nobody closed it.  The kernel ends what is in flight, in its own time.
        if getattr(self, "_place", -1) >= 0:
            self._give_place_up()
        if getattr(self, "_ring", None) is not None:  # there is none where the constructor refused
            leak(*self._requests_with_memory())
            ring, self._ring = self._ring, None
            lib.uring_close(ring, bool(self._requests()))

    def _reap_all(self, ring: Any, timeout: float) -> None:
        """Cancel everything and take the completions off the ring, for at most `timeout` seconds."""
        if self._requests():
            lib.uring_cancel_all(ring)
        deadline = time.monotonic() + timeout
        while self._requests() and (remaining := deadline - time.monotonic()) > 0:
            count = lib.uring_wait(ring, math.ceil(remaining * 1e9), self._taken)
            if count > 0:
                self._taken += 1
                for token, result, flags, _ in zip(*[ffi.unpack(array, count) for array in self._arrays]):  # noqa: B905 - equal by make
                    self._discard(token, result, flags)
            elif count < 0:  # EEXIST: another thread's ring, from which there is no more to come
                break

    def _discard(self, token: int, result: int, flags: int) -> None:
        """A completion that nobody will be told of."""
        op = self.in_flight.get(token)
        if op is not None and not flags & lib.URING_MORE:
            self._land(op)

    def after_fork_in_child(self) -> None:
        if not self.closed and self._ring is not None:
            # The ring's memory is not mapped in the child, and whatever goes through its descriptor is the parent's.
            for _ in self._batch:
                pass
            self._undispatched = False
            lib.uring_abandon(self._ring)
            self._ring = None
            self._memory = b""
            self._unsubmitted.clear()
            self._uncancelled.clear()
            for op in self.in_flight.values():
                if type(op.driver_data) is _Stream:
                    op.driver_data.armed = op.driver_data.stopping = False
        super().after_fork_in_child()


UringDriver._use_stream(_Stream)  # once, not by each driver: the native turn has it for all threads


def _is_stream_socket(sock: Any) -> bool:
    try:
        return ops.type_of(sock) == _SOCK_STREAM
    except (AttributeError, TypeError):  # no socket
        return False


_SOCK_STREAM = int(socket.SOCK_STREAM)
