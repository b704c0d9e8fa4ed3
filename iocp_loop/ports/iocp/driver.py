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
slot, or no slot is left, zero bytes are asked for again.  Datagrams get a real
buffer: a short receive would cut them.

Readiness is a request too: a poll of ``\\Device\\Afd``, which is what ``select`` is made of.  Each operation has a
poll of its own, on a device handle that at most 500 of them share (a handle's requests form one list in the kernel).

An accept that is outstanding is a connection promised to this process, busy or not: the kernel serves accepts in the
order in which they were made, whoever made them.  So a listener has one, and processes that share it take turns.  What
else has connected when one completes is taken by plain calls.

A wait for a handle (the exit of a process) is no request on that handle, which need not be associated: a wait
completion packet, or where Windows has none a thread of the system's pool, puts the entry on the port.  Taking it back
tells for certain whether the entry is or will be there, so a cancel that meets the signal half way loses nothing.

A handle that another port owns (error 87) is used by way of an event and a registered wait that posts to our port.
Windows could part it from its owner, but that may be another process which still uses it.  A handle without overlapped
I/O is refused: it has to be served by a thread.

What may complete out of order
------------------------------
Operations on different handles, and the two directions of one.  The kernel keeps the order of the requests of a handle,
but entries may come off the queue in any order, completions at once overtake older ones that pend, and an operation may
need several requests.  So an operation stands in line behind those of its handle and direction, and begins when it is
the first.  ``CancelIoEx`` is a request: the entry comes all the same, with ERROR_OPERATION_ABORTED or with the result,
if that was earlier.

A number is the handle's that had it until that is closed, and anybody's afterwards.  So no request is made by a number
without a look at its object, and an operation whose object is closed ends as cancelled, whatever the system calls that.

A thread that ends leaves its requests to the port.  But one may come back undone (ERROR_RETRY, see ``iocp.c``; or
cancelled by nobody), when its thread ended at the wrong moment.  A wait to receive, a poll, an accept is made again
then; of a send nobody knows how far it got, nor of a read of a pipe that Wine gives back, so that fails.

Ctrl-C ends a wait: a console handler in C posts to every port (see ``_native/windows/console.c``).

Manuals, below https://learn.microsoft.com/windows/win32/: ``fileio/i-o-completion-ports``,
``fileio/getqueuedcompletionstatusex-func``, ``fileio/cancelioex-func``, ``api/mswsock/nf-mswsock-acceptex``.
"""

from __future__ import annotations

import time
import warnings
from typing import Any, cast

from ... import operations as ops
from ...operations import IN_FLIGHT, READABLE, Operation
from ..driver import cancelled_error, leak
from .binding import Submission, lib, probe
from .files import FileRequests
from .readiness import ReadinessRequests
from .receiving import ReceiveRequests
from .requests import Association
from .sockets import SocketRequests
from .turns import IocpTurns

__all__ = ["IocpDriver", "probe"]

#: Kinds whose requests the kernel may have several of: it serves them in order, and each needs only one.
_ACCEPTING = frozenset({ops.Accept, ops.AcceptStream})


class IocpDriver(IocpTurns, ReceiveRequests, SocketRequests, FileRequests, ReadinessRequests):
    """The contract of :class:`~iocp_loop.ports.driver.Driver` over an I/O completion port."""

    name = "iocp"

    def __init__(self, concurrency: int = 1) -> None:
        super().__init__(concurrency)
        self._starts = {
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
        self.kinds = frozenset({*self._starts, ops.Readiness, ops.ReadinessStream, ops.WaitForHandle})

    def submit(self, op: Operation) -> None:
        kind = type(op)
        self._check_support(kind)
        if kind in self._starts:
            self._start(op)
        elif kind is ops.WaitForHandle:
            self._start_watch(cast("ops.WaitForHandle", op))
        else:
            self._start_readiness(op)
        self._let_others_know()

    def _start(self, op: Operation) -> None:
        """Begin `op` if it is the first in its line."""
        self._launch(op)
        line: list[Operation] | None = None
        try:
            association = self._associations.get(op.fd)
            if association is None or association.handle() is not op.handle:
                association = self._associate(op.fd, op.handle)
            # A place in a file that is named does not depend on who came first.
            if not isinstance(op, ops.FileOperation) or op.offset is None:
                line = association.reading if op.events == READABLE else association.writing
                line.append(op)
                if line[0] is not op and type(op) not in _ACCEPTING:
                    op.driver_data = association
                    return
            self._starts[type(op)](op, association)
        except BaseException:
            if op.state is IN_FLIGHT:
                self._retract(op)
                if line is not None and op in line:
                    line.remove(op)
            raise

    def _let_others_know(self) -> None:
        if self._sleeping and (self.ready or self._at_once):
            self.wake()  # another thread waits for what is here already

    # -- cancelling, pausing -----------------------------------------------------------------------

    def cancel(self, op: Operation) -> None:
        if not self._begin_cancel(op):
            return
        if isinstance(op, ops.WaitForHandle):
            self._end_watch(op)
            return
        if type(op.driver_data) is Association:  # it has not begun
            self._leave_line(op.driver_data, op)
            self._finish(op, None, cancelled_error())
            return
        subs = op.driver_data if type(op.driver_data) is set else (op.driver_data,)
        armed = [sub for sub in subs if sub.armed]
        for sub in armed:
            lib.iocp_cancel(sub.native)
        if not armed:  # it rests: a paused stream, or one whose `complete` runs just now
            for sub in subs:
                association = sub.association
                self._give_back(sub)
            if association is not None:
                self._leave_line(association, op)
            self._finish(op, None, cancelled_error())

    def resume(self, op: Any) -> None:
        op.paused = False
        if type(op.driver_data) is Association:
            return  # it has not begun
        if type(op) is ops.ReceiveStream:
            self._arm(op)
        else:
            self._arm_datagrams(op)
        self._let_others_know()

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
        self._associations.clear()  # their lines hold operations
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

    def _forget_reaped(self) -> None:
        """Take what was reaped off the table without delivering it."""
        for address in self._take_reaped():
            if (sub := self._outstanding.pop(address, None)) is not None:
                self._drop(sub)

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
