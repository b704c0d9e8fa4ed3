"""The requests of driver ``iocp``: what all kinds of them have in common.

A handle is associated with the port before its first request.  A request is a `Submission`, which is taken for it,
handed to the kernel, noted as pending or as done at once, and given back when it is over; ports/iocp.py tells who owns
what meanwhile.  The kinds of request stand in files of their own beside this one.
"""

from __future__ import annotations

import contextlib
import socket
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from ..operations import IN_FLIGHT, HandleLike, Operation, fileno
from .driver import Driver
from .iocp_binding import (
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

__all__ = ["LARGEST_REQUEST", "UNDONE", "Association", "IocpRequests"]

#: The largest request, bytes: a DWORD holds 4 GiB, but locking so much memory at once helps nobody.
LARGEST_REQUEST = 1 << 30

#: What a request ends with that nobody cancelled, when its thread has ended.
UNDONE = frozenset({ABORTED, RETRY})


class Association:
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


def _no_object() -> None:
    return None


class IocpRequests(Driver):
    """What each family of requests inherits from."""

    _slots: SlotPool  # of ReceiveRequests

    def __init__(self, concurrency: int = 1) -> None:
        super().__init__(concurrency)
        self._port = ffi.new("iocp_port *")
        check(lib.iocp_start())
        check(lib.iocp_port_open(self._port, concurrency))
        self._outstanding: dict[int, Submission] = {}
        self._at_once: deque[tuple[Submission, int, int]] = deque()  # done without an entry
        self._spare: list[Submission] = []
        self._associations: dict[int, Association] = {}
        self._skips = ffi.new("int *")

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

    # -- the life of a submission ------------------------------------------------------------------

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

    def _ready_to_emulate(self, sub: Submission, association: Association) -> None:
        """Before each request on a handle of another port: an event takes the place of the entry."""
        if association.emulated:
            if sub.native.event:
                lib.iocp_emulate_finish(sub.native)
            check(lib.iocp_emulate(sub.native))

    def _submitted(self, sub: Submission, code: int, association: Association) -> None:
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

    # -- the end of a request ----------------------------------------------------------------------

    @staticmethod
    def _is_open(op: Any) -> bool:
        """Whether the handle of `op` is still what it was: not closed, nor its number another's."""
        try:
            return bool(fileno(op.handle) == op.fd)
        except ValueError:  # closed
            return False
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException:  # an object of the user's has something else to say: the system will tell
            return True

    def _left_undone(self, op: Any, code: int) -> bool:
        """The request was ended by the end of the thread that made it, and by nothing else: it is to be made again."""
        return code in UNDONE and op.state is IN_FLIGHT and self._is_open(op)

    def _end(self, sub: Submission, value: Any, code: int = 0) -> None:
        """Deliver the last completion of an operation."""
        if code:
            self._end_with(sub, None, error_of(code))
        else:
            self._end_with(sub, value, None)

    def _end_with(self, sub: Submission, value: Any, error: BaseException | None) -> None:
        op = sub.op
        if op is None:
            return  # a finalizer has cancelled it since it was looked at
        self._give_back(sub)
        self._land(op)
        self.completions += 1
        op.complete(value, error)

    def _finish_with_count(self, sub: Submission, count: int, code: int) -> None:
        """The `finish` of an operation whose value is a number of bytes.

        One that was cancelled or failed half way has done the half; what stopped it meets the next one.
        """
        self._end(sub, count, 0 if count else code)
