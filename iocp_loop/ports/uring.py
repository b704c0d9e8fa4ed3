"""The driver ``uring``: Linux's io_uring, a completion port in the kernel.

How it works
------------
A *ring* is a pair of queues in memory that we share with the kernel.  We put requests into the submission queue; one
system call, ``io_uring_enter``, hands all of them over and waits; the kernel puts completions into the completion
queue.  Each completion carries the 64-bit number that its request was given: here the operation's token, its number
in the in-flight table.  So a turn of the loop is one call, ``uring_wait`` in ``_native/linux/uring.c``, whatever
happens in it; that file holds the queues, this one what they mean, and uring_turns.py the turn itself.

A *multishot* request completes many times (``MORE`` is set on all but the last completion).  Receiving that way needs
no submission per message: the kernel picks a buffer from a pool that we lend it, at the moment that data come, so an
idle connection holds none.  The pool is one block of memory; a completion says where in it the bytes are, and
``dispatch`` copies them out by slicing it.  That is the hot path; it comes first there.

Who owns what
-------------
* The ring belongs to the thread that waits in it (``SINGLE_ISSUER`` and ``DEFER_TASKRUN`` make it much cheaper, and
  the kernel answers every other thread with EEXIST).  It is made by the first ``wait``; when another thread takes over,
  what the old queue still holds is delivered first, then a new ring is made and everything in flight is submitted
  again.  A port for several threads (`concurrency` above 1) has a ring without these flags.  There a request is handed
  over by whoever submits it, and comes to nothing when that thread is no more: ECANCELED that nobody asked for
  submits it again.
* No request is ever half done while it is in flight, which is what makes submitting again safe: a send completes with
  what the kernel took at once (there is no MSG_WAITALL here), and the rest is a new request.
* An operation's buffers, and the ``msghdr`` or ``sockaddr`` that the kernel reads, hang on the operation (on itself or
  its `driver_data`), and the in-flight table holds the operation until its last completion.  A buffer is kept by the
  operation's memoryview; cffi only tells its address.  (A ``from_buffer`` that lives on would lock that view, and
  the garbage collector does not survive clearing a locked view.)
* The pool's buffers that a batch of completions used go back to the kernel when the next ``wait`` begins.  Then the
  batch has been dispatched: ``wait`` does nothing as long as something of the batch is left.

What may complete out of order
------------------------------
Anything, except the completions of one stream.  A cancel is a request of its own; the cancelled operation completes
when it completes, with what it had done or with ECANCELED.  A request that the kernel has not seen yet is simply taken
out of the queue: its descriptor's number may mean something else by the time the kernel would look.

Streams end and are armed again
-------------------------------
A multishot request ends when the pool is empty (ENOBUFS, nothing is lost), when the completion queue overflows, or when
the kernel likes; it is armed again exactly when ``MORE`` is missing, or there would be two.  Pausing a stream cancels
its request (else the kernel would go on filling the pool for it), but not the stream: what has been received is
delivered, and ``resume`` arms another request.  A stream that keeps receiving large pieces is served by polling and
``recv`` into one hot scratch buffer instead, until the pieces become small again: the pool is used in turn from end to
end, and large pieces would drag all of it through the cache.

What io_uring does not do better (datagrams, sendfile) waits for readiness by a one-shot poll request, and then makes
the socket module's own call, without blocking.

Manuals: io_uring(7), io_uring_setup(2), io_uring_enter(2), io_uring_register(2), io_uring_prep_recv_multishot(3),
io_uring_setup_buf_ring(3), all at https://man7.org/linux/man-pages/man7/io_uring.7.html and beside it.
"""

from __future__ import annotations

import contextlib
import errno
import math
import mmap
import os
import socket
import stat
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

from .. import operations as ops
from ..operations import CANCELLING, IN_FLIGHT, READABLE, WRITABLE, Operation
from .driver import Driver, DriverUnavailable, adopt_accepted, cancelled_error, leak, receive_datagrams
from .uring_binding import ffi, lib, new_bytes, open_ring, probe
from .uring_turns import UringTurns

if sys.platform != "linux":
    raise ImportError("io_uring exists on Linux only")

__all__ = ["UringDriver", "probe"]

# Flags of a completion, as uring.h defines them.
_MORE = 1
_DATA = 2
_BIG = 4

#: Bytes that one request can move, the kernel's MAX_RW_COUNT on the smallest page size.
_MOST = 0x7FFF_F000

#: Buffers in one sendmsg, UIO_MAXIOV.
_MOST_BUFFERS = 1024

#: How long the kernel may take to clean up a ring that was closed; it does that in its own time, usually 10 ms.
_OLD_RING_SECONDS = 1.0

#: A stream that got so many big pieces (BIG_RECEIVE of uring.c, or more) is polled and read into a scratch buffer ...
_BULK_AFTER = 4
#: ... until so many pieces in a row were below this size, bytes.
_BULK_UNTIL = 4
_BULK_SIZE = 2 * 1024

#: The size of the scratch buffer, bytes; about as much as a core's second-level cache holds.
_SCRATCH_SIZE = 256 * 1024

#: Datagrams received in one turn from one endpoint: a busy one must not starve the others.
_DATAGRAMS = 16

# Results that end a request but not what it was for.
_AGAIN = frozenset({-errno.ECANCELED, -errno.EINTR})
_RECEIVE_AGAIN = frozenset({*_AGAIN, -errno.EAGAIN, -errno.ENOBUFS})
#: A connection that failed before it was accepted; accept(2).
_ACCEPT_AGAIN = frozenset({*_AGAIN, -errno.EAGAIN, -errno.ECONNABORTED, -errno.EPROTO})

#: What the functions that queue a request return (an int, but cffi tells no types): 0, or a negative errno.
_Code: TypeAlias = Any

_WOULD_BLOCK = (BlockingIOError, InterruptedError)

#: poll(2)'s POLLERR, POLLHUP and POLLNVAL: they count as every event that was asked for.
_POLL_TROUBLE = 0x008 | 0x010 | 0x020

_WRITING_KINDS = frozenset({ops.Send, ops.SendAll, ops.SendTo, ops.SendFile, ops.Write, ops.Connect})
_FILE_KINDS = (ops.Read, ops.ReadInto, ops.Write)
#: Kinds with memory that the kernel may touch as long as they are in flight.
_BUFFER_KINDS = (*_FILE_KINDS, ops.ReceiveInto, ops.Send, ops.SendAll)


class _Stream:
    """The `driver_data` of a stream: what the kernel has of it."""

    __slots__ = ("armed", "bulk", "polling", "stopping", "streak")

    def __init__(self) -> None:
        self.armed = False  # a request is in flight (or in the queue)
        self.stopping = False  # ... and is being cancelled, so that the stream rests or changes its way
        self.polling = False  # ... and is a poll
        self.bulk = False  # receive by polling, from the next time it is armed
        self.streak = 0  # pieces that speak for changing between the two ways


class UringDriver(UringTurns, Driver):
    """The contract of :class:`~iocp_loop.ports.driver.Driver` over io_uring.

    Raises DriverUnavailable where io_uring can't be used, OSError when a resource is short.
    """

    name = "uring"

    def __init__(self, concurrency: int = 1) -> None:
        reason = probe()
        if reason is not None:
            raise DriverUnavailable(reason)
        super().__init__(concurrency)
        self._use_stream(_Stream)
        self._shared = concurrency > 1
        self._ring = None
        self._memory: Any = b""  # the pool, as one buffer
        self._arrays: tuple[Any, ...] = ()  # token, result, flags, start of each completion of a batch
        self._taken = 0
        self._batch = iter(())
        self._undispatched = False
        self._polled: set[int] = set()  # tokens whose request in flight is a poll that comes before the real one
        self._old_ring_until = 0.0  # time.monotonic() up to which the kernel may be busy with an older ring
        self._acceptable: set[int] = set()  # tokens of accepts that were told meanwhile that there is a connection
        self._unarmed: list[Operation] = []  # in flight here, but the kernel had no room for their request
        self._uncancelled: list[Operation] = []  # ... or for the request that cancels theirs
        self._scratch: mmap.mmap | None = None
        self._kinds = self._table_of_kinds()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        if self._shared:
            try:
                self._open_ring()
            except BaseException:
                os.close(self._wake_fd)
                self.closed = True
                raise

    def _table_of_kinds(self) -> dict[type[Operation], tuple[Callable[[Any], _Code], Callable[..., None]]]:
        """For each kind how to queue a request for it, and what to do with a completion."""
        return {
            ops.Receive: (self._arm_receive, self._reap_receive),
            ops.ReceiveInto: (self._arm_receive_into, self._reap_count),
            ops.Send: (self._arm_send, self._reap_count),
            ops.SendAll: (self._arm_send_all, self._reap_send_all),
            ops.SendFile: (self._arm_poll, self._reap_attempt),
            ops.Accept: (self._arm_accept, self._reap_accept),
            ops.Connect: (self._arm_connect, self._reap_connect),
            ops.ReceiveFrom: (self._arm_poll, self._reap_attempt),
            ops.ReceiveFromInto: (self._arm_poll, self._reap_attempt),
            ops.SendTo: (self._arm_poll, self._reap_attempt),
            ops.Read: (self._arm_read, self._reap_read),
            ops.ReadInto: (self._arm_read_into, self._reap_count),
            ops.Write: (self._arm_write, self._reap_count),
            ops.Readiness: (self._arm_readiness, self._reap_readiness),
            ops.ReadinessStream: (self._arm_readiness, self._reap_readiness_stream),
            ops.AcceptStream: (self._arm_accept, self._reap_accept_stream),
            ops.ReceiveStream: (self._arm_receive_stream, self._reap_receive_stream),
            ops.ReceiveFromStream: (self._arm_poll, self._reap_datagrams),
        }

    # -- submitting and cancelling -----------------------------------------------------------------

    def submit(self, op: Operation) -> None:
        kind = type(op)
        if kind not in self._kinds:
            raise NotImplementedError(f"the uring driver has no operation {op.kind}")
        if isinstance(op, (ops.Readiness, ops.ReadinessStream)):
            events = op.events
            if not events or events & ~(READABLE | WRITABLE):
                raise ValueError(f"events must be READABLE, WRITABLE or both, not {events!r}")
            if _is_file_or_directory(op.fd):
                # io_uring would call it ready without end; epoll refuses it, and so do the loops that stand on epoll.
                raise PermissionError(errno.EPERM, "a regular file or directory is always ready", op.fd)
        self._launch(op)
        if op.stream:
            op.driver_data = _Stream()
        try:
            self._arm(op)
        except BaseException:
            self._retract(op)
            raise
        if self._shared:
            self._hand_over()

    def _arm(self, op: Operation) -> None:
        """Queue a request for `op`.  Before there is a ring it is enough to be in flight: a new ring takes them all."""
        if self._ring is None:
            return
        if op.stream:
            stream = op.driver_data
            stream.armed = True
            stream.stopping = False
        try:
            if self._kinds[type(op)][0](op) < 0:
                self._unarmed.append(op)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # an argument that the request can't take
            self._finish(op, None, error)

    def _arm_after_poll(self, op: Operation, events: int) -> None:
        """Wait until the descriptor is ready, and then queue the request for `op`."""
        if op.stream:
            op.driver_data.armed = True
        self._polled.add(op.token)
        if lib.uring_prep_poll(self._ring, op.fd, op.token, events) < 0:
            self._polled.discard(op.token)
            self._unarmed.append(op)

    def _queue_leftovers(self) -> None:
        unarmed, self._unarmed = self._unarmed, []
        for op in unarmed:
            if op.stream:
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

    def cancel(self, op: Operation) -> None:
        if not self._begin_cancel(op):
            return
        if self._ring is None or (op.stream and not op.driver_data.armed):
            self._finish(op, None, cancelled_error())
        elif self._unarmed and op in self._unarmed:
            self._unarmed.remove(op)
            self._finish(op, None, cancelled_error())
        elif self._cancel_request(op):
            self._finish(op, None, cancelled_error())
        if self._shared:
            self._hand_over()

    def _cancel_request(self, op: Operation) -> bool:
        """Ask for the end of the request of `op`.  True if the kernel never saw it: there is no completion then."""
        code = lib.uring_cancel(self._ring, op.token)
        if code < 0:
            self._uncancelled.append(op)
        elif code == 1:
            self._polled.discard(op.token)
        return bool(code == 1)

    def pause(self, op: Any) -> None:
        op.paused = True
        # A poll may stay: when it completes, nothing is received, and no other is armed.
        if op.state is IN_FLIGHT and type(op) is ops.ReceiveStream and not op.driver_data.polling:
            self._stop(op)
            if self._shared:
                self._hand_over()

    def let_go(self) -> bool:
        # A request in the ring holds the file open behind its descriptor, until the kernel has seen to the cancel.
        if self._ring is None:
            return True
        return not self._shared and not self._uncancelled and lib.uring_settle(self._ring) == 0

    def resume(self, op: Any) -> None:
        op.paused = False
        if op.state is IN_FLIGHT and not op.driver_data.armed:
            self._arm(op)
            if self._shared:
                self._hand_over()

    # -- the ring ----------------------------------------------------------------------------------

    def _open_ring(self) -> None:
        """Make the ring of this thread and submit everything that is in flight, in place of an older ring if any."""
        old = self._ring
        ring = open_ring(self._wake_fd, shared=self._shared)
        self._ring = ring
        self._memory = ffi.buffer(ring.memory, ring.memory_size)
        self._arrays = (ring.token, ring.result, ring.flags, ring.start)
        self._taken = 0
        self._polled.clear()
        self._unarmed.clear()
        self._uncancelled.clear()
        self._acceptable.clear()
        if old is not None:
            lib.uring_close(old, 0)
            self._old_ring_until = time.monotonic() + _OLD_RING_SECONDS
        for op in list(self.in_flight.values()):
            if op.state is CANCELLING:
                self._finish(op, None, cancelled_error())
            elif getattr(op, "paused", False):
                op.driver_data.armed = False
            elif old is None:
                self._arm(op)
            else:
                self._move(op)

    def _move(self, op: Operation) -> None:
        """Submit `op` to this ring, after another ring had it."""
        if isinstance(op, _FILE_KINDS):
            # A worker thread of the old ring may still be busy with the memory.
            leak(op)
            if op.offset is None and _is_regular_file(op.fd):
                # It may have moved the file's position, so that it can't be done again.
                self._finish(op, None, cancelled_error())
                return
        self._arm(op)

    @property
    def gathered(self) -> bool:
        return self._undispatched or bool(self.ready)

    def _reap(self, op: Any, result: int, flags: int, start: int) -> None:
        """One completion, other than the data of a stream that goes on."""
        if self._polled and op.token in self._polled:
            self._polled.discard(op.token)
            if result >= 0:
                if op.state is IN_FLIGHT:
                    self._arm(op)
                    return
                result = -errno.ECANCELED
        try:
            self._kinds[type(op)][1](op, result, flags, start)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            if op.stream or not op.in_flight:
                raise  # its `complete` did it: dispatch reports that
            self._end(op, None, error)

    def _end(self, op: Operation, value: Any, error: BaseException | None = None) -> None:
        """The last completion of `op`; only ``dispatch`` may call this."""
        self._land(op)
        op.complete(value, error)

    def _fail(self, op: Operation, result: int) -> None:
        """The request of an ordinary operation ended with the error -`result`."""
        if result in _AGAIN or result == -errno.EAGAIN:
            if op.state is CANCELLING:
                self._end(op, None, cancelled_error())
            elif result == -errno.EAGAIN:
                # Some kinds of files are not polled by the kernel itself if they are non-blocking.
                self._arm_after_poll(op, WRITABLE if type(op) in _WRITING_KINDS else READABLE)
            else:
                self._arm(op)
            return
        self._end(op, None, OSError(-result, os.strerror(-result)))

    def _fail_stream(self, op: Operation, result: int, again: frozenset[int] = _RECEIVE_AGAIN) -> None:
        """The request of a stream ended with the error -`result`; those in `again` do not end the stream."""
        if result in again:
            self._go_on(op)
        else:
            self._end(op, None, OSError(-result, os.strerror(-result)))

    def _go_on(self, op: Any) -> None:
        """The request of a stream has ended: arm the next one, or let the stream rest, or end it if that was asked."""
        if op.state is CANCELLING:
            self._end(op, None, cancelled_error())
        elif op.state is IN_FLIGHT and not op.driver_data.armed and not getattr(op, "paused", False):
            self._arm(op)

    def _stop(self, op: Operation) -> None:
        """Cancel the request of a stream, but not the stream."""
        stream: _Stream = op.driver_data
        if op.state is IN_FLIGHT and stream.armed and not stream.stopping:
            stream.stopping = True
            if self._cancel_request(op):
                stream.armed = stream.stopping = False

    # -- receiving ---------------------------------------------------------------------------------

    def _arm_receive_stream(self, op: ops.ReceiveStream) -> _Code:
        stream: _Stream = op.driver_data
        stream.polling = stream.bulk
        if stream.bulk:
            return lib.uring_prep_poll(self._ring, op.fd, op.token, READABLE)
        return lib.uring_prep_receive_stream(self._ring, op.fd, op.token)

    def _reap_receive_stream(self, op: ops.ReceiveStream, result: int, flags: int, start: int) -> None:
        stream: _Stream = op.driver_data
        if not flags & _MORE:
            stream.armed = False
        if stream.polling and result >= 0:
            self._receive_bulk(op, stream)
        elif flags & _DATA:
            if flags & _BIG:
                stream.streak += 1
                if stream.streak >= _BULK_AFTER and not stream.bulk:
                    stream.bulk = True
                    stream.streak = 0
                    self._stop(op)
            try:
                op.complete(self._memory[start:result], None)
            finally:
                if not stream.armed:
                    self._go_on(op)
        elif result == 0:
            self._end(op, b"")
        else:
            if result == -errno.ENOBUFS and not stream.bulk:
                # The pool is empty.  Where others empty it in each turn, this one would ask in vain for ever.
                stream.bulk = True
                stream.streak = 0
            self._fail_stream(op, result)

    def _receive_bulk(self, op: ops.ReceiveStream, stream: _Stream) -> None:
        """The socket of a stream in bulk is readable: receive once."""
        if op.paused or op.state is CANCELLING:
            self._go_on(op)
            return
        value: Any
        try:
            if op.get_buffer is None:
                scratch = self._scratch
                if scratch is None:
                    scratch = self._scratch = mmap.mmap(-1, _SCRATCH_SIZE)
                count = op.handle.recv_into(scratch, 0, socket.MSG_DONTWAIT)
                value = scratch[:count]
            else:
                buffer = op.get_buffer()
                if buffer is None:
                    self._go_on(op)
                    return
                value = count = op.handle.recv_into(buffer, 0, socket.MSG_DONTWAIT)
        except _WOULD_BLOCK:
            self._go_on(op)
            return
        except (SystemExit, KeyboardInterrupt):  # the stream goes on all the same
            self._go_on(op)
            raise
        except BaseException as error:
            self._end(op, None, error)
            return
        if count == 0:
            self._end(op, value)
            return
        stream.streak = stream.streak + 1 if count < _BULK_SIZE else 0
        if stream.streak >= _BULK_UNTIL:
            stream.bulk = False
            stream.streak = 0
        try:
            op.complete(value, None)
        finally:
            self._go_on(op)

    def _arm_receive(self, op: ops.Receive) -> _Code:
        if op.size == 0:
            self._finish(op, b"")  # the kernel would wait for something to arrive
            return 0
        if _is_stream(op.handle):
            size = min(op.size, _MOST)
            return lib.uring_prep_receive(self._ring, op.fd, op.token, size)
        # A datagram must not be cut to the size of the pool's buffers.
        if op.driver_data is None:
            op.driver_data = new_bytes(op.size)
        return self._receive_into(op, op.driver_data)

    def _reap_receive(self, op: ops.Receive, result: int, flags: int, start: int) -> None:
        if flags & _DATA:
            self._end(op, self._memory[start:result])
        elif result >= 0:
            self._end(op, b"" if op.driver_data is None else ffi.buffer(op.driver_data, result)[:])
        elif result == -errno.ENOBUFS and op.state is IN_FLIGHT:
            self._arm(op)
        else:
            self._fail(op, -errno.ECANCELED if result == -errno.ENOBUFS else result)

    def _arm_receive_into(self, op: ops.ReceiveInto) -> _Code:
        if op.buffer.nbytes == 0:
            self._finish(op, 0)
            return 0
        return self._receive_into(op, ffi.from_buffer(op.buffer))

    def _receive_into(self, op: Operation, data: Any) -> _Code:
        size = min(len(data), _MOST)
        return lib.uring_prep_receive_into(self._ring, op.fd, op.token, data, size)

    # -- sending -----------------------------------------------------------------------------------

    def _arm_send(self, op: ops.Send) -> _Code:
        return self._send(op, ffi.from_buffer(op.data))

    def _send(self, op: Operation, data: Any) -> _Code:
        size = min(len(data), _MOST)
        return lib.uring_prep_send(self._ring, op.fd, op.token, data, size)

    def _reap_count(self, op: Operation, result: int, flags: int, start: int) -> None:
        """The value is the number of bytes."""
        if result >= 0:
            self._end(op, result)
        else:
            self._fail(op, result)

    def _arm_send_all(self, op: ops.SendAll) -> _Code:
        pieces = [ffi.from_buffer(view) for view in op.buffers[:_MOST_BUFFERS]]
        if not pieces:
            pieces = [ffi.from_buffer(b"")]
        if len(pieces) == 1:
            return self._send(op, pieces[0])
        vector = ffi.new("struct iovec[]", len(pieces))
        for entry, piece in zip(vector, pieces, strict=True):
            entry.iov_base = piece
            entry.iov_len = len(piece)
        message = ffi.new("struct msghdr *")
        message.msg_iov = vector
        message.msg_iovlen = len(pieces)
        op.driver_data = (message, vector)
        return lib.uring_prep_send_message(self._ring, op.fd, op.token, message)

    def _reap_send_all(self, op: ops.SendAll, result: int, flags: int, start: int) -> None:
        if result < 0:
            self._fail(op, result)
        elif op.advance(result):
            self._end(op, op.sent)
        elif op.state is CANCELLING:
            self._end(op, None, cancelled_error())
        else:
            self._arm(op)

    # -- connections -------------------------------------------------------------------------------

    def _arm_accept(self, op: ops.Accept | ops.AcceptStream) -> _Code:
        if time.monotonic() < self._old_ring_until:
            # One new connection wakes one accept, and that may be one of the old ring, which comes to nothing.  A poll
            # is woken in any case.
            if op.token not in self._acceptable:
                self._acceptable.add(op.token)
                self._arm_after_poll(op, READABLE)
                return 0
            self._acceptable.discard(op.token)
            return lib.uring_prep_accept(self._ring, op.fd, op.token, False)
        return lib.uring_prep_accept(self._ring, op.fd, op.token, op.stream)

    def _reap_accept(self, op: ops.Accept, result: int, flags: int, start: int) -> None:
        value = _accepted(op, result) if result >= 0 else None
        if value is not None:
            self._end(op, value)
        elif result >= 0 or result in _ACCEPT_AGAIN:
            self._fail(op, -errno.EINTR)
        else:
            self._fail(op, result)

    def _reap_accept_stream(self, op: ops.AcceptStream, result: int, flags: int, start: int) -> None:
        if not flags & _MORE:
            op.driver_data.armed = False
        if result < 0:
            self._fail_stream(op, result, _ACCEPT_AGAIN)
            return
        try:
            value = _accepted(op, result)
            if value is not None:
                op.complete(value, None)
        finally:
            if not op.driver_data.armed:
                self._go_on(op)

    def _arm_connect(self, op: ops.Connect) -> _Code:
        # By connect(2) and a poll, which a cancel ends for good.  The kernel's own request for this tries again by
        # itself, even after it was cancelled, and may connect a socket that is being connected elsewhere by then.
        if op.driver_data is None:
            op.driver_data = "begun"  # the peer may be this very thread, about to accept: it must not wait for a turn
            try:
                code = op.handle.connect_ex(op.address)
            except (OSError, TypeError, ValueError, OverflowError) as error:
                self._finish(op, None, error if isinstance(error, OSError) else OSError(errno.EINVAL, str(error)))
                return 0
            if code not in (errno.EINPROGRESS, errno.EALREADY):
                self._finish(op, None, _connect_error(op, code))
                return 0
        return lib.uring_prep_poll(self._ring, op.fd, op.token, WRITABLE)

    def _reap_connect(self, op: ops.Connect, result: int, flags: int, start: int) -> None:
        if result < 0 or op.state is CANCELLING:
            self._fail(op, result if result < 0 else -errno.ECANCELED)
        else:
            self._end(op, None, _connect_error(op, op.handle.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)))

    # -- files and pipes ---------------------------------------------------------------------------

    def _arm_read(self, op: ops.Read) -> _Code:
        if op.driver_data is None:
            op.driver_data = new_bytes(op.size)
        return self._read(op, op.driver_data)

    def _arm_read_into(self, op: ops.ReadInto) -> _Code:
        return self._read(op, ffi.from_buffer(op.buffer))

    def _read(self, op: ops.Read | ops.ReadInto, data: Any) -> _Code:
        offset = -1 if op.offset is None else op.offset
        size = min(len(data), _MOST)
        return lib.uring_prep_read(self._ring, op.fd, op.token, data, size, offset)

    def _reap_read(self, op: ops.Read, result: int, flags: int, start: int) -> None:
        if result >= 0:
            data, op.driver_data = op.driver_data, None
            self._end(op, ffi.buffer(data, result)[:])
        else:
            self._fail(op, result)

    def _arm_write(self, op: ops.Write) -> _Code:
        data = ffi.from_buffer(op.data)
        offset = -1 if op.offset is None else op.offset
        size = min(len(data), _MOST)
        return lib.uring_prep_write(self._ring, op.fd, op.token, data, size, offset)

    # -- readiness, and the calls that wait for it -------------------------------------------------

    def _arm_readiness(self, op: ops.Readiness | ops.ReadinessStream) -> _Code:
        return lib.uring_prep_poll(self._ring, op.fd, op.token, op.events)

    def _arm_poll(self, op: Operation) -> _Code:
        events = WRITABLE if type(op) in _WRITING_KINDS else READABLE
        return lib.uring_prep_poll(self._ring, op.fd, op.token, events)

    def _reap_readiness(self, op: ops.Readiness, result: int, flags: int, start: int) -> None:
        if result >= 0:
            self._end(op, _events(op, result))
        else:
            self._fail(op, result)

    def _reap_readiness_stream(self, op: ops.ReadinessStream, result: int, flags: int, start: int) -> None:
        op.driver_data.armed = False
        if result < 0:
            self._fail_stream(op, result)
            return
        try:
            if op.state is IN_FLIGHT:
                op.complete(_events(op, result), None)
        finally:
            self._go_on(op)  # only now: what the owner did about it counts

    def _reap_attempt(self, op: Operation, result: int, flags: int, start: int) -> None:
        """The descriptor of an operation that waited for it is ready: make the call."""
        if result < 0 or op.state is CANCELLING:
            self._fail(op, result if result < 0 else -errno.ECANCELED)
            return
        try:
            value = _ATTEMPTS[type(op)](op)
        except _WOULD_BLOCK:
            self._arm(op)
            return
        except (SystemExit, KeyboardInterrupt):
            self._arm(op)
            raise
        except BaseException as error:
            self._end(op, None, error)
            return
        self._end(op, value)

    def _reap_datagrams(self, op: ops.ReceiveFromStream, result: int, flags: int, start: int) -> None:
        op.driver_data.armed = False
        if result < 0:
            self._fail_stream(op, result)
            return
        try:
            receive_datagrams(self, op, _DATAGRAMS, _receive_from)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            self._end(op, None, error)
        finally:
            self._go_on(op)

    # -- waking and closing ------------------------------------------------------------------------

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # at its limit: readable in any case
            os.eventfd_write(self._wake_fd, 1)

    def _release(self, timeout: float) -> None:
        for token, result, flags, _ in self._batch:
            self._discard(token, result, flags)
        self._undispatched = False
        ring, self._ring = self._ring, None
        if ring is not None:
            self._reap_all(ring, timeout)
            kept = self._buffers_in_flight()
            lib.uring_close(ring, bool(self.in_flight))
            if kept:
                leak(*kept)
                warnings.warn(
                    f"the kernel did not give back in {timeout} s: {kept!r}; their memory is kept",
                    ResourceWarning,
                    stacklevel=3,
                )
        for op in list(self.in_flight.values()):
            self._land(op)
        self._polled.clear()
        self._unarmed.clear()
        self._uncancelled.clear()
        self._memory = b""
        self._arrays = ()
        os.close(self._wake_fd)

    def _buffers_in_flight(self) -> list[Operation]:
        """The operations in flight with memory of their own that the kernel may touch."""
        return [
            op
            for op in self.in_flight.values()
            if isinstance(op, _BUFFER_KINDS) or (type(op) is ops.Receive and op.driver_data is not None)
        ]

    def __del__(self) -> None:
        # Nobody closed it.  The kernel ends what is in flight, in its own time.
        ring, self._ring = getattr(self, "_ring", None), None  # there is none where the constructor refused
        if ring is not None:
            leak(*self._buffers_in_flight())
            lib.uring_close(ring, bool(self.in_flight))
            os.close(self._wake_fd)

    def _reap_all(self, ring: Any, timeout: float) -> None:
        """Cancel everything and take the completions off the ring, for at most `timeout` seconds."""
        for op in list(self.in_flight.values()):
            if (op.stream and not op.driver_data.armed) or op in self._unarmed:
                self._land(op)
        if self.in_flight:
            lib.uring_cancel_all(ring)
        deadline = time.monotonic() + timeout
        while self.in_flight and (remaining := deadline - time.monotonic()) > 0:
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
        if op is None:
            return
        if isinstance(op, (ops.Accept, ops.AcceptStream)) and result >= 0 and token not in self._polled:
            os.close(result)
        if not flags & _MORE:
            self._land(op)

    def after_fork_in_child(self) -> None:
        if not self.closed:
            # The ring's memory is not mapped in the child, and whatever goes through its descriptor is the parent's.
            for _ in self._batch:
                pass
            self._undispatched = False
            if self._ring is not None:
                lib.uring_abandon(self._ring)
                self._ring = None
            self._memory = b""
            self._unarmed.clear()
            self._uncancelled.clear()
            os.close(self._wake_fd)
        super().after_fork_in_child()


# ---------------------------------------------------------------------------------------------------------------------
# The calls that are made once a descriptor is ready, and small helpers
# ---------------------------------------------------------------------------------------------------------------------


def _receive_from(op: Any) -> Any:
    return op.handle.recvfrom(op.size, socket.MSG_DONTWAIT)


def _receive_from_into(op: Any) -> Any:
    return op.handle.recvfrom_into(op.buffer, 0, socket.MSG_DONTWAIT)


def _send_to(op: Any) -> Any:
    if op.address is None:
        return op.handle.send(op.data, socket.MSG_DONTWAIT)
    return op.handle.sendto(op.data, socket.MSG_DONTWAIT, op.address)


def _send_file(op: Any) -> Any:
    return os.sendfile(op.fd, op.file, op.offset, op.count)


_ATTEMPTS: dict[type[Operation], Callable[[Any], Any]] = {
    ops.ReceiveFrom: _receive_from,
    ops.ReceiveFromInto: _receive_from_into,
    ops.SendTo: _send_to,
    ops.SendFile: _send_file,
}


def _events(op: ops.Readiness | ops.ReadinessStream, result: int) -> int:
    return op.events if result & _POLL_TROUBLE else result & op.events


def _accepted(op: ops.Accept | ops.AcceptStream, fd: int) -> tuple[socket.socket, Any] | None:
    """The value of an accept; None if the peer has reset the connection already."""
    try:
        sock = adopt_accepted(op.handle, fd)
    except BaseException:
        os.close(fd)
        raise
    try:
        return sock, sock.getpeername()
    except OSError:
        sock.close()
        return None


def _connect_error(op: ops.Connect, code: int) -> OSError | None:
    return OSError(code, f"Connect call failed {op.address}: {os.strerror(code)}") if code else None


def _is_stream(sock: Any) -> bool:
    try:
        # The C class's attribute: an int, without the enum that socket.socket makes of it each time.
        return _raw_type(sock) == _SOCK_STREAM
    except TypeError:
        return bool(sock.type == socket.SOCK_STREAM)


_raw_type: Callable[[Any], int] = socket.SocketType.type.__get__  # a C member descriptor
_SOCK_STREAM = int(socket.SOCK_STREAM)


def _is_regular_file(fd: int) -> bool:
    try:
        return stat.S_ISREG(os.fstat(fd).st_mode)
    except OSError:
        return False


def _is_file_or_directory(fd: int) -> bool:
    """Raises OSError (EBADF) where nothing is open under `fd`."""
    mode = os.fstat(fd).st_mode
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)
