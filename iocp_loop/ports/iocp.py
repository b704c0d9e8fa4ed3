"""The driver ``iocp``: Windows' own I/O completion ports.

How it works
------------
A completion port is a queue in the kernel.  A handle is associated with it once, by ``CreateIoCompletionPort``, when
its first operation comes in.  From then on each overlapped request on the handle (WSARecv, AcceptEx, ReadFile, ...)
ends in an entry of the queue, and ``GetQueuedCompletionStatusEx`` takes many entries off at once: one call of
``wait``.  A request that is done at once makes no entry on a handle that skips it
(``FILE_SKIP_COMPLETION_PORT_ON_SUCCESS``); its completion goes through a queue of our own to the next ``dispatch``.

Who owns what
-------------
A `Submission` is one request in the kernel's hands.  Its OVERLAPPED comes first in the C struct, so the address that
comes back with the entry *is* the submission; `_outstanding` is the table from the one to the other, and keeps the
struct and the buffers alive until the entry was reaped.  An ordinary operation has one submission at a time.  An
accept stream has several, each with the socket that its connection will have.

Sockets receive without lending memory at first: a WSARecv of zero bytes completes when there is something to receive,
and then ``recv`` takes it, into one scratch buffer that all streams share.  So a connection that says nothing costs no
buffer, and a pause or a cancel can lose nothing.  A stream whose data come in small pieces is lent a slot, 16 KiB of a
pool that is limited, for its next receive: that saves the ``recv``.  What comes then is delivered, also if the stream
has been paused or cancelled meanwhile, and whoever receives next stands in line behind it.  Once a piece fills the
slot, or no slot is left, zero bytes are asked for again.  Datagrams can't be had so: a short receive would cut them.
They get a real buffer.

Readiness is a request too: a poll of ``\\Device\\Afd``, which is what ``select`` is made of.  Each operation has a
poll of its own, on a device handle that at most 500 of them share (a handle's requests form one list in the kernel).

A wait for a handle (the exit of a process) is no request on that handle, which need not be associated: a wait
completion packet, or where Windows has none a thread of the system's pool, puts the entry on the port.  Taking it back
tells for certain whether the entry is or will be there, so a cancel that meets the signal half way loses nothing.

A handle that another port owns (error 87) is used by way of an event and a registered wait that posts to our port.
Windows could part it from its owner, but that may be another process which still uses it.  A handle without overlapped
I/O is refused: it has to be served by a thread.

What may complete out of order
------------------------------
Sends of one socket are carried out in the order of submission, but entries of one handle may come off the queue in any
order, and completions at once overtake older ones that pend.  ``CancelIoEx`` is a request: the entry comes all the
same, with ERROR_OPERATION_ABORTED or with the result, if that was earlier.

A thread that ends leaves its requests to the port.  But one may come back undone (ERROR_RETRY, see ``iocp.c``; or
cancelled by nobody), when its thread ended at the wrong moment.  A wait to receive, a poll, an accept is made again
then; of a send nobody knows how far it got, nor of a read of a pipe that Wine gives back, so that fails.

Ctrl-C ends a wait: a console handler in C posts to every port (see ``_native/windows/iocp.c``).

Manuals, below https://learn.microsoft.com/windows/win32/: ``fileio/i-o-completion-ports``,
``fileio/getqueuedcompletionstatusex-func``, ``fileio/cancelioex-func``, ``api/mswsock/nf-mswsock-acceptex``.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import socket
import stat
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from .. import operations as ops
from ..operations import CANCELLING, IN_FLIGHT, READABLE, WRITABLE, HandleLike, Operation, fileno
from .driver import Driver, adopt_accepted, cancelled_error, leak
from .iocp_binding import (
    ABORTED,
    BROKEN_PIPE,
    END_OF_FILE,
    INVALID_HANDLE,
    INVALID_PARAMETER,
    MORE_DATA,
    PENDING,
    PIPE_NOT_CONNECTED,
    RETRY,
    WSA_INVALID,
    WSA_NOT_A_SOCKET,
    Slot,
    SlotPool,
    Submission,
    check,
    error_of,
    ffi,
    handle_of_file,
    lib,
    nobody,
    probe,
)

__all__ = ["IocpDriver", "probe"]

#: The size of the scratch buffer, bytes; about as much as a core's second-level cache holds.
SCRATCH_SIZE = 256 * 1024

#: The pool of slots for small receives: the size of one, bytes, and how many a port lends at most.
SLOT_SIZE = 16384
SLOT_LIMIT = 512

#: The largest request, bytes: a DWORD holds 4 GiB, but locking so much memory at once helps nobody.
LARGEST_REQUEST = 1 << 30

#: How many readiness polls share a handle of the AFD device.
POLLS_PER_DEVICE = 500

#: The most that TransmitFile takes in one call, bytes.
LARGEST_TRANSMISSION = (1 << 31) - 2

#: A datagram is never larger, bytes.
LARGEST_DATAGRAM = 65536

#: What a request ends with that nobody cancelled, when its thread has ended.
_UNDONE = frozenset({ABORTED, RETRY})

_END_OF_STREAM = frozenset({END_OF_FILE, BROKEN_PIPE, PIPE_NOT_CONNECTED})


class _Association:
    """What is known of a handle that was associated with the port."""

    __slots__ = ("emulated", "ending", "handle", "key", "position", "skips", "stream", "waiting")

    def __init__(self, handle: HandleLike, key: int) -> None:
        #: Gives the object whose handle this is; None when it is gone or was a mere number.
        self.handle: Callable[[], Any] = _no_object
        if not isinstance(handle, int):
            with contextlib.suppress(TypeError):  # an object that can't be referred to weakly
                self.handle = weakref.ref(handle)
        self.key = key
        self.skips = False  # a request that is done at once makes no entry
        self.emulated = False  # it belongs to another port
        self.stream = isinstance(handle, socket.socket) and handle.type == socket.SOCK_STREAM
        self.position = 0  # of a file, in bytes, for requests that name none
        #: How many receives into slots were cancelled and have not ended, and the receives that must not overtake them.
        self.ending = 0
        self.waiting: list[Any] = []


def _has_peer(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def _no_object() -> None:
    return None


class IocpDriver(Driver):
    """The contract of :class:`~iocp_loop.ports.driver.Driver` over an I/O completion port."""

    name = "iocp"

    def __init__(self, concurrency: int = 1) -> None:
        super().__init__(concurrency)
        self._port = ffi.new("iocp_port *")
        check(lib.iocp_start())
        check(lib.iocp_port_open(self._port, concurrency))
        self._outstanding: dict[int, Submission] = {}
        self._at_once: deque[tuple[Submission, int, int]] = deque()  # done without an entry
        self._reaped: Iterator[tuple[int, int, int]] = iter(())
        self._spare: list[Submission] = []
        self._devices: list[_PollDevice] = []
        self._associations: dict[int, _Association] = {}
        self._scratch = mmap.mmap(-1, SCRATCH_SIZE)
        self._slots = SlotPool(SLOT_SIZE, SLOT_LIMIT)
        self._skips = ffi.new("int *")
        self._number = ffi.new("uintptr_t *")
        self._starts: dict[type[Operation], Callable[[Any, _Association], None]] = {
            ops.Receive: self._start_receive,
            ops.ReceiveInto: self._start_receive,
            ops.Send: self._start_send,
            ops.SendAll: self._start_send_all,
            ops.SendFile: self._start_send_file,
            ops.Accept: self._start_accept,
            ops.Connect: self._start_connect,
            ops.ReceiveFrom: self._start_receive_from,
            ops.ReceiveFromInto: self._start_receive_from,
            ops.SendTo: self._start_send_to,
            ops.Read: self._start_read,
            ops.ReadInto: self._start_read,
            ops.Write: self._start_write,
            ops.AcceptPipe: self._start_accept_pipe,
            ops.AcceptStream: self._start_accept,
            ops.ReceiveStream: self._start_receive_stream,
            ops.ReceiveFromStream: self._start_receive_from,
        }

    # -- submitting --------------------------------------------------------------------------------

    def submit(self, op: Operation) -> None:
        kind = type(op)
        if kind is ops.Readiness or kind is ops.ReadinessStream:
            self._start_readiness(op)
            return
        if isinstance(op, ops.WaitForHandle):
            self._start_watch(op)
            return
        start = self._starts.get(kind)
        if start is None:
            raise NotImplementedError(f"the iocp driver has no operation {op.kind}")
        self._launch(op)
        try:
            association = self._associations.get(op.fd)
            if association is None or association.handle() is not op.handle:
                association = self._associate(op.fd, op.handle)
            start(op, association)
        except BaseException:
            if op.state is IN_FLIGHT:
                self._retract(op)
            raise
        if self._sleeping and (self.ready or self._at_once):
            self.wake()  # another thread waits for what is here already

    def register(self, handle: HandleLike) -> None:
        """Associate `handle` with the port.  Raises OSError if that can't be.

        A handle that belongs to another port is no error where it can be parted from that or used in spite of it.
        """
        if self.closed:
            raise ValueError("the completion port is closed")
        fd = fileno(handle)
        known = self._associations.get(fd)
        if known is None or known.handle() is not handle:
            self._associate(fd, handle)

    def _associate(self, fd: int, handle: HandleLike) -> _Association:
        is_socket = isinstance(handle, socket.socket)
        call = lib.iocp_associate_socket if is_socket else lib.iocp_associate_file
        association = _Association(handle, lib.IOCP_KEY_SOCKET if is_socket else lib.IOCP_KEY_FILE)
        code = call(self._port, fd, self._skips)
        if code == 0:
            association.skips = bool(self._skips[0])
        elif code != INVALID_PARAMETER:
            raise error_of(code)
        elif not is_socket and lib.iocp_is_synchronous(fd):
            raise OSError(0, "the handle was opened without overlapped I/O (FILE_FLAG_OVERLAPPED)", None, code)
        elif fd in self._associations and self._associations[fd].handle is _no_object:
            return self._associations[fd]  # ours: nothing but the number is known of it
        else:
            association.emulated = True
        self._associations[fd] = association
        return association

    def _take(self, op: Operation, finish: Callable[[Submission, int, int], None], keep: Any = None) -> Submission:
        """A submission for `op`, which is its operation's only one."""
        sub = self._spare.pop() if self._spare else Submission()
        sub.op = op
        sub.finish = finish
        sub.keep = keep
        op.driver_data = sub
        return sub

    def _give_back(self, sub: Submission) -> None:
        if sub.native.event:
            lib.iocp_emulate_finish(sub.native)
        elif sub.native.wait:
            lib.iocp_unwatch_handle(sub.native)
        if sub.slot is not None:
            self._slots.give_back(sub.slot)
        sub.op = sub.keep = sub.slot = None
        sub.small = False
        sub.finish = nobody
        self._spare.append(sub)

    def _ready_to_emulate(self, sub: Submission, association: _Association) -> None:
        """Before each request on a handle of another port: an event takes the place of the entry."""
        if association.emulated:
            if sub.native.event:
                lib.iocp_emulate_finish(sub.native)
            check(lib.iocp_emulate(sub.native))

    def _submitted(self, sub: Submission, code: int, association: _Association) -> None:
        """Note what became of a request: `code` is what the C function returned."""
        sub.armed = True
        if code == PENDING or (code == 0 and not association.skips and not association.emulated):
            self._outstanding[sub.address] = sub
            if association.emulated:
                check(lib.iocp_emulate_watch(self._port, sub.native, association.key))
        else:
            self._at_once.append((sub, sub.native.bytes if code == 0 else 0, code))

    def _next_dispatch(self, sub: Submission) -> None:
        """Let the next dispatch finish or go on with a submission, without a request to the kernel."""
        sub.armed = True
        self._at_once.append((sub, 0, 0))

    # -- cancelling, pausing -----------------------------------------------------------------------

    def cancel(self, op: Operation) -> None:
        if not self._begin_cancel(op):
            return
        if isinstance(op, ops.WaitForHandle):
            self._end_watch(op)
            return
        subs = op.driver_data if type(op.driver_data) is set else (op.driver_data,)
        armed = [sub for sub in subs if sub.armed]
        for sub in armed:
            if sub.slot is not None:  # it may have got bytes that come before those of whoever receives next
                sub.keep = self._associations[op.fd]
                sub.keep.ending += 1
            lib.iocp_cancel(sub.native)
        if not armed:  # it rests: a paused stream, or one whose `complete` runs just now
            for sub in subs:
                self._give_back(sub)
            self._finish(op, None, cancelled_error())

    def resume(self, op: Any) -> None:
        op.paused = False
        self._arm(op)

    def _arm(self, op: Any) -> None:
        """Arm a receive stream, unless it is armed, paused or over."""
        sub = op.driver_data
        if op.state is not IN_FLIGHT or op.paused or sub.armed:
            return  # in this order: once it is over, the submission may serve another
        if type(op) is ops.ReceiveStream:
            association = self._associations[op.fd]
            if association.ending:
                association.waiting.append(op)
                return
            slot = self._slots.take() if sub.small and not association.emulated else None
            if slot is None:
                self._arm_receive(sub, association)
                return
            sub.slot = slot
            self._submitted(sub, lib.iocp_receive(op.fd, sub.native, slot[0], SLOT_SIZE), association)
        else:
            self._arm_receive_from(sub, self._associations[op.fd])

    # -- waiting and dispatching -------------------------------------------------------------------

    def wait(self, timeout: float | None) -> None:
        self.waits += 1
        self._sleeping = True
        try:
            if self.ready or self._at_once or (self.before_sleep is not None and self.before_sleep()):
                nanoseconds = 0
            elif timeout is None:
                nanoseconds = -1
            else:
                nanoseconds = min(int(timeout * 1e9), 1 << 62)
            code = lib.iocp_wait(self._port, nanoseconds)
        finally:
            self._sleeping = False
        check(code)

    def dispatch(self) -> None:
        if self.ready:
            self._drain_ready()
        at_once = self._at_once
        for _ in range(len(at_once)):
            sub, count, code = at_once.popleft()
            sub.armed = False
            sub.finish(sub, count, code)
        self._deliver_reaped()  # what a dispatch that an exception ended has left
        port = self._port
        if port.count:
            # From the batch to the iterator without a step between at which a signal's exception could come in.
            numbers = iter(ffi.unpack(port.batch, port.count * 3))
            reaped = zip(numbers, numbers, numbers, strict=True)
            self._reaped = reaped
            port.count = 0
            self._deliver_reaped()
        if self.ready:
            self._drain_ready()

    @property
    def gathered(self) -> bool:
        return bool(self.ready or self._at_once or self._port.count)

    def _deliver_reaped(self) -> None:
        outstanding = self._outstanding
        for address, count, code in self._reaped:
            sub = outstanding.pop(address)
            sub.armed = False
            sub.finish(sub, count, code)

    @staticmethod
    def _left_undone(op: Any, code: int) -> bool:
        """The request was ended by the end of the thread that made it, and by nothing else: it is to be made again."""
        if code not in _UNDONE or op.state is not IN_FLIGHT:
            return False
        try:
            return bool(fileno(op.handle) == op.fd)
        except ValueError:  # closed meanwhile
            return False

    def _end(self, sub: Submission, value: Any, code: int = 0) -> None:
        """Deliver the last completion of an operation."""
        if code:
            self._end_with(sub, None, error_of(code))
        else:
            self._end_with(sub, value, None)

    def _end_with(self, sub: Submission, value: Any, error: OSError | None) -> None:
        op = sub.op
        self._give_back(sub)
        self._land(op)
        self.completions += 1
        op.complete(value, error)

    def _finish_with_count(self, sub: Submission, count: int, code: int) -> None:
        """The `finish` of an operation whose value is a number of bytes.

        One that was cancelled or failed half way has done the half; what stopped it meets the next one.
        """
        self._end(sub, count, 0 if count else code)

    # -- receiving from streams --------------------------------------------------------------------

    def _start_receive(self, op: ops.Receive | ops.ReceiveInto, association: _Association) -> None:
        if association.stream:
            sub = self._take(op, self._receive_once)
            if association.ending:
                association.waiting.append(op)
            else:
                self._arm_receive(sub, association)
        else:
            self._start_receive_from(op, association)

    def _arm_receive(self, sub: Submission, association: _Association) -> None:
        if association.emulated:
            self._ready_to_emulate(sub, association)
        self._submitted(sub, lib.iocp_receive(sub.op.fd, sub.native, ffi.NULL, 0), association)

    def _receive_once(self, sub: Submission, count: int, code: int) -> None:
        """Something can be received now, or the wait for it has failed."""
        op = sub.op
        if code and not self._left_undone(op, code):
            self._end(sub, None, code)
            return
        sock: Any = op.handle
        try:
            value = sock.recv(op.size) if type(op) is ops.Receive else sock.recv_into(op.buffer)
        except BlockingIOError:  # somebody else was faster
            if op.state is CANCELLING:
                self._end(sub, None, ABORTED)
            else:
                self._arm_receive(sub, self._associations[op.fd])
        except OSError as error:
            self._end_with(sub, None, error)
        else:
            self._end(sub, value)

    def _start_receive_stream(self, op: ops.ReceiveStream, association: _Association) -> None:
        self._take(op, self._receive_some)
        self._arm(op)

    def _receive_some(self, sub: Submission, count: int, code: int) -> None:
        """One receive of a stream, delivered at once.  The hottest function of this driver."""
        op = sub.op
        slot = sub.slot
        if slot is not None:
            self._receive_from_slot(sub, op, slot, count, code)
            return
        if op.state is CANCELLING:
            self._end(sub, None, ABORTED)
            return
        if code and not self._left_undone(op, code):
            self._end(sub, None, code)
            return
        if op.paused:
            return  # what there is stays in the socket; resume() asks again
        again = False
        try:
            if op.get_buffer is None:
                scratch = self._scratch
                count = op.handle.recv_into(scratch)
                if count:
                    again = count == SCRATCH_SIZE
                    sub.small = count < SLOT_SIZE
                    self.completions += 1
                    op.complete(scratch[:count], None)
                else:
                    self._end(sub, b"")
            elif (buffer := op.get_buffer()) is not None:
                count = op.handle.recv_into(buffer)
                if count:
                    self.completions += 1
                    op.complete(count, None)
                else:
                    self._end(sub, 0)
        except BlockingIOError:
            pass
        except OSError as error:
            self._end_with(sub, None, error)
        finally:
            # Also when an exception is on its way that ends the loop's run: another run may follow.
            if again and op.state is IN_FLIGHT and not op.paused and not sub.armed:
                self._next_dispatch(sub)  # the buffer was full: there is more
            else:
                self._arm(op)

    def _receive_from_slot(self, sub: Submission, op: Any, slot: Slot, count: int, code: int) -> None:
        """The same for a receive that had memory: the data are here already, whatever has become of the stream."""
        data = slot[1][slot[2] : slot[2] + count]
        association = sub.keep if op.state is CANCELLING else None
        sub.slot = None
        self._slots.give_back(slot)
        full = count == SLOT_SIZE
        sub.small = not full
        try:
            if count:
                self.completions += 1
                op.complete(data, None)
        finally:
            if sub.armed:
                pass  # `complete` paused and resumed
            elif op.state is CANCELLING:
                self._end(sub, None, ABORTED)
            elif code and not self._left_undone(op, code):
                self._end(sub, None, code)
            elif not count and not code:
                self._end(sub, b"")
            elif full and op.state is IN_FLIGHT and not op.paused:
                self._next_dispatch(sub)  # there may be more
            else:
                self._arm(op)
            if association is not None:
                self._end_of_a_cancelled_receive(association)

    def _end_of_a_cancelled_receive(self, association: _Association) -> None:
        """Let those go on that stood in line behind it."""
        association.ending -= 1
        if not association.ending:
            waiting, association.waiting = association.waiting, []
            for op in waiting:
                if type(op) is ops.ReceiveStream:
                    self._arm(op)
                elif op.state is IN_FLIGHT:
                    self._arm_receive(op.driver_data, association)

    # -- sending -----------------------------------------------------------------------------------

    def _start_send(self, op: ops.Send, association: _Association) -> None:
        sub = self._take(op, self._finish_with_count, op.data)
        self._ready_to_emulate(sub, association)
        size = min(op.data.nbytes, LARGEST_REQUEST)
        self._submitted(sub, lib.iocp_send(op.fd, sub.native, ffi.from_buffer(op.data), size), association)

    def _start_send_all(self, op: ops.SendAll, association: _Association) -> None:
        sub = self._take(op, self._sent_some)
        if not op.buffers:
            self._next_dispatch(sub)
            return
        self._send_gathered(sub, association)

    def _send_gathered(self, sub: Submission, association: _Association) -> None:
        op = sub.op
        self._ready_to_emulate(sub, association)
        if len(op.buffers) > lib.IOCP_GATHER_LIMIT:
            op.buffers = [memoryview(b"".join(op.buffers))]
        sub.keep = views = list(op.buffers)
        if len(views) == 1:
            size = min(views[0].nbytes, LARGEST_REQUEST)
            code = lib.iocp_send(op.fd, sub.native, ffi.from_buffer(views[0]), size)
        else:
            count = 1  # what follows a piece that is cut must wait
            while count < len(views) and views[count - 1].nbytes <= LARGEST_REQUEST:
                count += 1
            sizes = ffi.new("unsigned long[]", [min(view.nbytes, LARGEST_REQUEST) for view in views])
            pieces = [ffi.from_buffer(view) for view in views]
            code = lib.iocp_send_gathered(op.fd, sub.native, count, ffi.new("void *[]", pieces), sizes)
        self._submitted(sub, code, association)

    def _sent_some(self, sub: Submission, count: int, code: int) -> None:
        op = sub.op
        if op.advance(count):
            self._end(sub, op.sent)
        elif code:
            self._end(sub, None, code)
        elif op.state is CANCELLING:
            self._end(sub, None, ABORTED)
        else:
            self._send_gathered(sub, self._associations[op.fd])

    def _start_send_file(self, op: ops.SendFile, association: _Association) -> None:
        status = os.fstat(op.file)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "only a regular file can be sent")
        # TransmitFile takes 0 bytes for "all", and says nothing helpful about more than there are.
        size = min(op.count, status.st_size - op.offset, LARGEST_TRANSMISSION)
        sub = self._take(op, self._finish_with_count)
        if size <= 0:
            self._next_dispatch(sub)
            return
        self._ready_to_emulate(sub, association)
        code = lib.iocp_transmit_file(op.fd, sub.native, handle_of_file(op.file), op.offset, size)
        self._submitted(sub, code, association)

    # -- connections -------------------------------------------------------------------------------

    def _start_accept(self, op: ops.Accept | ops.AcceptStream, association: _Association) -> None:
        subs = set()
        try:
            for _ in range(op.depth if type(op) is ops.AcceptStream else 1):
                sub = self._take(op, self._accepted)
                subs.add(sub)
                self._arm_accept(sub, association)
        except OSError as error:
            subs.discard(sub)
            self._give_back(sub)
            if not subs:
                self._finish(op, None, error)
        finally:
            op.driver_data = subs

    def _arm_accept(self, sub: Submission, association: _Association) -> None:
        """Raises OSError if there is no socket to accept with, or the listener can't accept."""
        listener = sub.op.handle
        self._ready_to_emulate(sub, association)
        code = lib.iocp_accept(sub.op.fd, sub.native, listener.family, listener.type, listener.proto)
        if code not in (0, PENDING):
            raise error_of(code)
        self._submitted(sub, code, association)

    def _accepted(self, sub: Submission, count: int, code: int) -> None:
        """A connection has come in, or one has failed: that concerns the connection, and not the listener."""
        op = sub.op
        value = self._accepted_connection(sub, code)
        if value is not None and type(op) is ops.Accept:
            self._end(sub, value)
            return
        error: OSError | None = None
        if op.state is IN_FLIGHT:
            try:
                if op.handle.fileno() != op.fd:
                    raise error_of(WSA_NOT_A_SOCKET)
                self._arm_accept(sub, self._associations[op.fd])
            except OSError as exc:
                error = exc
        if sub.armed:
            if value is not None:
                self.completions += 1
                op.complete(value, None)
            return
        # This one accepts no more; the stream goes on as long as another does.
        op.driver_data.discard(sub)
        self._give_back(sub)
        if not op.driver_data:
            self._finish(op, None, error or cancelled_error())
        if value is not None:
            self.completions += 1
            op.complete(value, None)

    @staticmethod
    def _accepted_connection(sub: Submission, code: int) -> tuple[socket.socket, Any] | None:
        """The connection that an accept has brought, and its address; None if it is gone already, or was none."""
        listener = sub.op.handle
        if code not in (0, RETRY) or listener.fileno() != sub.op.fd or lib.iocp_accept_finish(sub.op.fd, sub.native):
            lib.iocp_close_socket(sub.native.accepted)
            return None
        conn = adopt_accepted(listener, sub.native.accepted)
        try:
            return conn, sub.get_address() or conn.getpeername()
        except OSError:
            conn.close()
            return None

    def _start_connect(self, op: ops.Connect, association: _Association) -> None:
        sub = self._take(op, self._connected)
        try:
            if association.stream and op.handle.family in (socket.AF_INET, socket.AF_INET6):
                sub.set_address(sub.op.handle.family, op.address)
                self._ready_to_emulate(sub, association)
                code = lib.iocp_connect(op.fd, sub.native)
                self._submitted(sub, code, association)
                return
            # ConnectEx is for TCP.  Others connect without waiting for anybody.
            op.handle.connect(op.address)
        except OSError as error:
            self._give_back(sub)
            self._finish(op, None, error)
        else:
            self._give_back(sub)
            self._finish(op, None)

    def _connected(self, sub: Submission, count: int, code: int) -> None:
        if code in (0, RETRY):
            undone, code = code == RETRY, lib.iocp_connect_finish(sub.op.fd)
            if undone and not code and not _has_peer(sub.op.handle):
                code = RETRY
        error = error_of(code) if code else None
        if error is not None and code != ABORTED:
            error.strerror = f"Connect call failed {sub.op.address}: {error.strerror}"
        self._end_with(sub, None, error)

    # -- datagrams ---------------------------------------------------------------------------------

    def _start_receive_from(self, op: Any, association: _Association) -> None:
        into = getattr(op, "buffer", None)
        if into is None:
            into = bytearray(min(op.size, LARGEST_DATAGRAM))
        finish = self._received_datagram if op.stream else self._received_from
        self._arm_receive_from(self._take(op, finish, into), association)

    def _arm_receive_from(self, sub: Submission, association: _Association) -> None:
        op = sub.op
        self._ready_to_emulate(sub, association)
        memory = ffi.from_buffer(sub.keep, require_writable=True)
        code = lib.iocp_receive_from(op.fd, sub.native, memory, len(memory))
        if code == WSA_INVALID:
            # Windows receives on bound sockets only; others bind theirs on the way.
            with contextlib.suppress(OSError):
                op.handle.bind(("", 0))
                code = lib.iocp_receive_from(op.fd, sub.native, memory, len(memory))
        self._submitted(sub, code, association)

    def _received_from(self, sub: Submission, count: int, code: int) -> None:
        op = sub.op
        if code and self._left_undone(op, code):
            self._arm_receive_from(sub, self._associations[op.fd])
            return
        if code:
            self._end(sub, None, code)
            return
        value: Any = count if hasattr(op, "buffer") else bytes(sub.keep[:count])
        if isinstance(op, (ops.ReceiveFrom, ops.ReceiveFromInto)):
            value = value, sub.get_address()
        self._end(sub, value)

    def _received_datagram(self, sub: Submission, count: int, code: int) -> None:
        """A datagram of a stream; then some more, as long as there are any: a call each, in place of two."""
        op = sub.op
        if code and self._left_undone(op, code):
            self._arm(op)
            return
        if code:
            self._end(sub, None, code)
            return
        datagram: Any = bytes(sub.keep[:count]), sub.get_address()
        patience = 16  # one busy endpoint must not starve the others
        try:
            while True:
                self.completions += 1
                op.complete(datagram, None)
                patience -= 1
                if not patience or op.paused or op.state is not IN_FLIGHT:
                    break
                datagram = op.handle.recvfrom(op.size)
        except BlockingIOError:
            pass
        except OSError as error:
            if op.state is IN_FLIGHT:
                self._end_with(sub, None, error)
        finally:
            if op.state is CANCELLING:  # the datagram was faster than the cancel
                self._end(sub, None, ABORTED)
            else:
                self._arm(op)

    def _start_send_to(self, op: ops.SendTo, association: _Association) -> None:
        data = ffi.from_buffer(op.data)
        sub = self._take(op, self._finish_with_count, op.data)
        self._ready_to_emulate(sub, association)
        if op.address is None:
            code = lib.iocp_send(op.fd, sub.native, data, op.data.nbytes)
        else:
            try:
                sub.set_address(sub.op.handle.family, op.address)
            except OSError as error:
                self._give_back(sub)
                self._finish(op, None, error)
                return
            code = lib.iocp_send_to(op.fd, sub.native, data, op.data.nbytes)
        self._submitted(sub, code, association)

    # -- files and pipes ---------------------------------------------------------------------------

    def _start_read(self, op: ops.Read | ops.ReadInto, association: _Association) -> None:
        into = op.buffer if isinstance(op, ops.ReadInto) else bytearray(min(op.size, LARGEST_REQUEST))
        self._arm_read(self._take(op, self._was_read, into), association)

    def _arm_read(self, sub: Submission, association: _Association) -> None:
        op = sub.op
        memory = ffi.from_buffer(sub.keep, require_writable=True)
        self._ready_to_emulate(sub, association)
        offset = association.position if op.offset is None else op.offset
        code = lib.iocp_read(op.fd, sub.native, memory, min(len(memory), LARGEST_REQUEST), offset)
        self._submitted(sub, code, association)

    def _was_read(self, sub: Submission, count: int, code: int) -> None:
        op = sub.op
        if code == ABORTED and self._left_undone(op, code):
            self._arm_read(sub, self._associations[op.fd])
            return
        if code in _END_OF_STREAM:
            count = code = 0
        elif code == MORE_DATA:  # the rest of a message comes with the next read
            code = 0
        elif not code and not count and len(sub.keep):
            # Somebody has written nothing to the other end of a pipe: no data, and not the end either.
            if op.state is CANCELLING:
                self._end(sub, None, ABORTED)
            else:
                self._arm_read(sub, self._associations[op.fd])
            return
        if code:
            self._end(sub, None, code)
            return
        if op.offset is None:
            self._associations[op.fd].position += count
        self._end(sub, count if isinstance(op, ops.ReadInto) else bytes(sub.keep[:count]))

    def _start_write(self, op: ops.Write, association: _Association) -> None:
        data = ffi.from_buffer(op.data)
        sub = self._take(op, self._was_written, op.data)
        self._ready_to_emulate(sub, association)
        offset = association.position if op.offset is None else op.offset
        code = lib.iocp_write(op.fd, sub.native, data, min(op.data.nbytes, LARGEST_REQUEST), offset)
        self._submitted(sub, code, association)

    def _was_written(self, sub: Submission, count: int, code: int) -> None:
        if not code and sub.op.offset is None:
            self._associations[sub.op.fd].position += count
        self._end(sub, count, code)

    def _start_accept_pipe(self, op: ops.AcceptPipe, association: _Association) -> None:
        self._arm_accept_pipe(self._take(op, self._pipe_accepted), association)

    def _arm_accept_pipe(self, sub: Submission, association: _Association) -> None:
        self._ready_to_emulate(sub, association)
        code = lib.iocp_pipe_accept(sub.op.fd, sub.native)
        if code == 0 and sub.native.bytes:
            self._next_dispatch(sub)  # the client was there first: no entry tells of it
        else:
            self._submitted(sub, code, association)

    def _pipe_accepted(self, sub: Submission, count: int, code: int) -> None:
        op = sub.op
        if code and self._left_undone(op, code):
            self._arm_accept_pipe(sub, self._associations[op.fd])
        else:
            self._end(sub, None, code)

    # -- waiting for handles -----------------------------------------------------------------------

    def _start_watch(self, op: ops.WaitForHandle) -> None:
        self._launch(op)
        sub = self._take(op, self._signalled)
        code = lib.iocp_watch_handle(self._port, sub.native, op.fd)
        if code != PENDING:
            self._give_back(sub)
            self._retract(op)
            raise error_of(code)
        sub.armed = True
        self._outstanding[sub.address] = sub

    def _signalled(self, sub: Submission, count: int, code: int) -> None:
        self._end(sub, True, code)

    def _end_watch(self, op: ops.WaitForHandle) -> None:
        """Take a wait back.  If the handle was signalled before that, its entry comes, and is the completion."""
        sub = op.driver_data
        if lib.iocp_unwatch_handle(sub.native) == 0:
            del self._outstanding[sub.address]
            sub.armed = False
            self._give_back(sub)
            self._finish(op, None, cancelled_error())

    # -- readiness ---------------------------------------------------------------------------------

    def _start_readiness(self, op: Any) -> None:
        if not op.events or op.events & ~(READABLE | WRITABLE):
            raise ValueError(f"events must be READABLE, WRITABLE or both, not {op.events!r}")
        check(lib.iocp_base_socket(op.fd, self._number))
        base = self._number[0]
        device = self._device_with_room()
        self._launch(op)
        sub = self._take(op, self._polled, (device, base))
        device.polls += 1
        self._arm_poll(sub)

    def _device_with_room(self) -> _PollDevice:
        for device in reversed(self._devices):
            if device.polls < POLLS_PER_DEVICE:
                return device
        check(lib.iocp_poll_open(self._port, self._number))
        self._devices.append(_PollDevice(self._number[0]))
        return self._devices[-1]

    def _arm_poll(self, sub: Submission) -> None:
        device, base = sub.keep
        sub.armed = True
        code = lib.iocp_poll(device.handle, sub.native, base, sub.op.events)
        if code == PENDING:
            self._outstanding[sub.address] = sub
        else:
            self._at_once.append((sub, 0, code))

    def _polled(self, sub: Submission, count: int, code: int) -> None:
        op = sub.op
        events = lib.iocp_polled(sub.native)
        if code and self._left_undone(op, code):
            self._arm_poll(sub)
            return
        if code == 0 and events & lib.IOCP_CLOSED:
            code = ABORTED if op.state is CANCELLING else INVALID_HANDLE
        if code or op.state is CANCELLING or not op.stream:
            sub.keep[0].polls -= 1
            self._end(sub, self._events_for(op, events), ABORTED if op.state is CANCELLING else code)
            return
        device = sub.keep[0]
        try:
            if value := self._events_for(op, events):
                self.completions += 1
                op.complete(value, None)
        finally:
            if op.state is IN_FLIGHT:
                self._arm_poll(sub)
            else:
                device.polls -= 1

    @staticmethod
    def _events_for(op: Any, events: int) -> int:
        wanted: int = op.events
        return wanted if events & lib.IOCP_FAILED else wanted & events

    # -- waking and closing ------------------------------------------------------------------------

    def _wake(self) -> None:
        lib.iocp_post(self._port)

    def _release(self, timeout: float) -> None:
        self._end_watches()
        for sub in self._outstanding.values():
            lib.iocp_cancel(sub.native)
        deadline = time.monotonic() + timeout
        self._forget_reaped()
        while self._outstanding and (remaining := deadline - time.monotonic()) > 0:
            if lib.iocp_wait(self._port, int(remaining * 1e9)):
                break
            self._forget_reaped()
        for sub, _count, _code in self._at_once:
            self._drop(sub)
        self._at_once.clear()
        for op in list(self.in_flight.values()):
            self._land(op)
        self._close_handles()
        self._scratch.close()
        if self._outstanding:
            self._leak_outstanding()
            warnings.warn(
                f"the kernel has not given back {len(self._outstanding)} operations within {timeout:g} s; "
                "their memory is kept",
                ResourceWarning,
                stacklevel=3,
            )

    def _end_watches(self) -> None:
        """Take every wait for a handle back; what was signalled before that is still reaped."""
        for sub in list(self._outstanding.values()):
            if sub.finish == self._signalled and lib.iocp_unwatch_handle(sub.native) == 0:
                del self._outstanding[sub.address]
                self._give_back(sub)

    def _forget_reaped(self) -> None:
        """Take what was reaped off the table without delivering it."""
        numbers = iter(ffi.unpack(self._port.batch, self._port.count * 3) if self._port.count else ())
        for address, _count, _code in [*self._reaped, *zip(numbers, numbers, numbers, strict=True)]:
            self._drop(self._outstanding.pop(address))
        self._port.count = 0

    def _drop(self, sub: Submission) -> None:
        if sub.finish == self._accepted and sub.native.accepted:
            lib.iocp_close_socket(sub.native.accepted)
        self._give_back(sub)

    def _leak_outstanding(self) -> None:
        leak(*((sub.native, sub.keep, sub.slot) for sub in self._outstanding.values()))

    def _close_handles(self) -> None:
        for device in self._devices:
            lib.iocp_close_handle(device.handle)
        lib.iocp_port_close(self._port)

    def __del__(self) -> None:
        # An unclosed driver frees its handles, but must not take from under the kernel what that may still write to.
        if not getattr(self, "closed", True) and hasattr(self, "_associations"):
            self.closed = True
            self._end_watches()  # or they would post to whatever has the number of our port then
            self._leak_outstanding()
            self._close_handles()


class _PollDevice:
    """A handle of the AFD device, and how many polls it carries."""

    __slots__ = ("handle", "polls")

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self.polls = 0
