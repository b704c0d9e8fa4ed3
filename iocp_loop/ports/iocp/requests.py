"""The requests of driver ``iocp``: what all kinds of them have in common.

A handle is associated with the port before its first request.  A request is a `Submission`, which is taken for it,
handed to the kernel, noted as pending or as done at once, and given back when it is over; driver.py tells who owns
what meanwhile.  The kinds of request stand in files of their own beside this one.

First come, first served, per handle and direction: an operation whose predecessor is in flight stands in line
(``Association.reading``, ``writing``) and makes its first request when it is the first.  The kernel keeps the order of
requests, but not that of operations: one that needs several would be overtaken between them, and completions at once
come before those of older requests.
"""

from __future__ import annotations

import contextlib
import socket
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from ...operations import IN_FLIGHT, WRITABLE, HandleLike, Operation, fileno
from ..driver import Driver, cancelled_error
from .binding import (
    ABORTED,
    INVALID_PARAMETER,
    PENDING,
    RETRY,
    SlotPool,
    Submission,
    check,
    error_of,
    ffi,
    lib,
    nobody,
)

__all__ = ["LARGEST_REQUEST", "UNDONE", "Association", "IocpRequests", "still_open"]

#: The largest request, bytes: a DWORD holds 4 GiB, but locking so much memory at once helps nobody.
LARGEST_REQUEST = 1 << 30

#: What a request ends with that nobody cancelled, when its thread has ended.
UNDONE = frozenset({ABORTED, RETRY})


class Association:
    """What is known of a handle that was associated with the port."""

    __slots__ = ("emulated", "family", "handle", "key", "position", "reading", "skips", "small", "stream", "writing")

    def __init__(self, handle: HandleLike, key: int) -> None:
        #: Gives the object whose handle this is; None when it is gone or was a mere number.
        self.handle: Callable[[], Any] = _no_object
        if not isinstance(handle, int):
            with contextlib.suppress(TypeError):  # an object that can't be referred to weakly
                self.handle = weakref.ref(handle)
        self.key = key
        self.skips = False  # a request that is done at once makes no entry
        self.emulated = False  # it belongs to another port
        self.family = 0  # of a socket, as the system knows it
        self.stream = False
        self.small = False  # the last that was received would have fitted into a slot
        self.position = 0  # of a file, in bytes, for requests that name none
        #: The operations in flight, in the order in which they came.  Those behind the first have not begun (their
        #: `driver_data` is this), but for accepts, which the kernel takes several of.
        self.reading: list[Operation] = []
        self.writing: list[Operation] = []


def _no_object() -> None:
    return None


def still_open(op: Operation) -> bool:
    """Whether the number of `op` is still that of its handle: once that is closed, another may have it.

    What the system knows of a socket decides, and not a `fileno` of the user's.
    """
    handle = op.handle
    try:
        try:
            return socket.socket.fileno(handle) == op.fd  # type: ignore[arg-type]  # TypeError if it is none
        except TypeError:
            return fileno(handle) == op.fd
    except Exception:  # closed, or an object of the user's that has other things to say
        return False


class IocpRequests(Driver):
    """What each family of requests inherits from."""

    _slots: SlotPool  # of ReceiveRequests
    #: How each kind of operation begins.
    _starts: dict[type[Operation], Callable[[Any, Association], None]]

    def __init__(self, concurrency: int = 1) -> None:
        super().__init__(concurrency)
        self._port = ffi.new("iocp_port *")
        check(lib.iocp_start())
        check(lib.iocp_port_open(self._port, concurrency))
        self._outstanding: dict[int, Submission] = {}
        self._at_once: deque[tuple[Submission, int, int]] = deque()  # done without an entry
        self._spare: list[Submission] = []
        self._spoiled: deque[Any] = deque(maxlen=4096)
        self._associations: dict[int, Association] = {}
        self._facts = ffi.new("int[3]")

    # -- handles -----------------------------------------------------------------------------------

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

    def _associate(self, fd: int, handle: HandleLike) -> Association:
        is_socket = isinstance(handle, socket.socket)
        call = lib.iocp_associate_socket if is_socket else lib.iocp_associate_file
        association = Association(handle, lib.IOCP_KEY_SOCKET if is_socket else lib.IOCP_KEY_FILE)
        code = call(self._port, fd, self._facts)
        if is_socket:
            association.family = self._facts[1]
            association.stream = self._facts[2] == socket.SOCK_STREAM
        if code == 0:
            association.skips = bool(self._facts[0])
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

    # -- first come, first served ------------------------------------------------------------------

    def busy(self, fd: int, direction: int) -> bool:
        """Whether an operation of that direction (READABLE, WRITABLE) is in flight on the handle of that number."""
        association = self._associations.get(fd)
        return association is not None and bool(association.writing if direction == WRITABLE else association.reading)

    def _leave_line(self, association: Association, op: Operation) -> None:
        """`op` has landed: whoever is the first in its line now, begins."""
        for line in (association.reading, association.writing):
            if op in line:
                line.remove(op)
                if line and line[0].driver_data is association:
                    self._begin_first(association, line)

    def _begin_first(self, association: Association, line: list[Operation]) -> None:
        """Let the first in `line` begin.  One that is refused or has lost its handle ends with the next dispatch."""
        while line and (op := line[0]).driver_data is association:
            error: Any = cancelled_error()
            op.driver_data = None
            if still_open(op):
                try:
                    self._starts[type(op)](op, association)
                    return
                except (SystemExit, KeyboardInterrupt):
                    raise
                except BaseException as exc:
                    error = exc
            del line[0]
            self._finish(op, None, error)

    # -- the life of a submission ------------------------------------------------------------------

    def _take(
        self,
        op: Operation,
        association: Association | None,
        finish: Callable[[Submission, int, int], None],
        keep: Any = None,
    ) -> Submission:
        """A submission for `op`, which is its operation's only one."""
        sub = self._spare.pop() if self._spare else Submission()
        sub.op = op
        sub.association = association
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
        sub.op = sub.association = sub.keep = sub.slot = None
        sub.finish = nobody
        self._spare.append(sub)

    def _request(self, sub: Submission, function: Callable[..., int], *arguments: Any) -> None:
        """Make a request, ``function(number, submission, *arguments)``, and note what becomes of it."""
        self._submitted(sub, self._call(sub, function, *arguments))

    def _call(self, sub: Submission, function: Callable[..., int], *arguments: Any) -> int:
        """The call of a request.  A number that is not the operation's any more (see `still_open`) is left alone."""
        if not still_open(sub.op):
            return ABORTED
        if sub.association.emulated:  # of another port: an event takes the place of the entry
            if sub.native.event:
                lib.iocp_emulate_finish(sub.native)
            check(lib.iocp_emulate(sub.native))
        return function(sub.op.fd, sub.native, *arguments)

    def _submitted(self, sub: Submission, code: int) -> None:
        """Note what became of a request: `code` is what the C function returned."""
        association = sub.association
        sub.armed = True
        if code == PENDING or (code == 0 and not association.skips and not association.emulated):
            self._outstanding[sub.address] = sub
            if association.emulated:
                check(lib.iocp_emulate_watch(self._port, sub.native, association.key))
        else:
            self._at_once.append((sub, sub.native.bytes if code == 0 else 0, code))
            if code and association.family and not association.stream and not association.emulated:
                # A datagram that is too long, for instance: there may be an entry all the same, soon.  Nobody must take
                # it for that of another request, so what it is the address of serves no more.
                self._spoiled.append(sub.native)
                sub.renew()

    def _next_dispatch(self, sub: Submission) -> None:
        """Let the next dispatch finish or go on with a submission, without a request to the kernel."""
        sub.armed = True
        self._at_once.append((sub, 0, 0))

    # -- the end of a request ----------------------------------------------------------------------

    @staticmethod
    def _left_undone(op: Any, code: int) -> bool:
        """The request was ended by the end of the thread that made it, and by nothing else: it is to be made again."""
        return code in UNDONE and op.state is IN_FLIGHT and still_open(op)

    def _end(self, sub: Submission, value: Any, code: int = 0) -> None:
        """Deliver the last completion of an operation."""
        if code:
            self._end_with(sub, None, error_of(code))
        else:
            self._end_with(sub, value, None)

    def _end_with(self, sub: Submission, value: Any, error: BaseException | None) -> None:
        op, association = sub.op, sub.association
        if op is None:
            return  # a finalizer has cancelled it since it was looked at
        if isinstance(error, OSError) and not still_open(op):
            error = cancelled_error()  # whatever the system calls the end of a request on a handle that was closed
        self._give_back(sub)
        self._land(op)
        if association is not None:
            self._leave_line(association, op)
        self.completions += 1
        op.complete(value, error)

    def _finish_with_count(self, sub: Submission, count: int, code: int) -> None:
        """The `finish` of an operation whose value is a number of bytes.

        One that was cancelled or failed half way has done the half; what stopped it meets the next one.
        """
        self._end(sub, count, 0 if count else code)
