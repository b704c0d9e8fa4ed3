"""Files, pipes and waits for handles on driver ``iocp``."""

from __future__ import annotations

from ... import operations as ops
from ...operations import CANCELLING
from ..driver import cancelled_error
from .binding import (
    ABORTED,
    BROKEN_PIPE,
    END_OF_FILE,
    MORE_DATA,
    PENDING,
    PIPE_CONNECTED,
    PIPE_NOT_CONNECTED,
    Submission,
    error_of,
    lib,
    pointer_to,
)
from .requests import LARGEST_REQUEST, Association, IocpRequests

__all__ = ["FileRequests"]

_END_OF_STREAM = frozenset({END_OF_FILE, BROKEN_PIPE, PIPE_NOT_CONNECTED})


class FileRequests(IocpRequests):
    """The operations Read, ReadInto, Write, AcceptPipe and WaitForHandle."""

    # -- files and pipes ---------------------------------------------------------------------------

    def _start_read(self, op: ops.Read | ops.ReadInto, association: Association) -> None:
        into = op.buffer if isinstance(op, ops.ReadInto) else bytearray(min(op.size, LARGEST_REQUEST))
        self._arm_read(self._take(op, association, self._was_read, memoryview(into)))

    def _arm_read(self, sub: Submission) -> None:
        memory = pointer_to(sub.keep, writable=True)
        offset = sub.association.position if sub.op.offset is None else sub.op.offset
        self._request(sub, lib.iocp_read, memory, min(sub.keep.nbytes, LARGEST_REQUEST), offset)

    def _was_read(self, sub: Submission, count: int, code: int) -> None:
        op = sub.op
        if code == ABORTED and self._left_undone(op, code):
            self._arm_read(sub)
            return
        if code in _END_OF_STREAM:
            count = code = 0
        elif code == MORE_DATA:  # the rest of a message comes with the next read
            code = 0
        elif not code and not count and sub.keep.nbytes and lib.iocp_file_type(op.fd) == lib.IOCP_PIPE:
            # Somebody has written nothing to the other end of a pipe: no data, and not the end either.  What else
            # answers so would do it again at once: a serial port that has nothing.
            if op.state is CANCELLING:
                self._end(sub, None, ABORTED)
            else:
                self._arm_read(sub)
            return
        if code:
            self._end(sub, None, code)
            return
        if op.offset is None:
            sub.association.position += count
        self._end(sub, count if isinstance(op, ops.ReadInto) else bytes(sub.keep[:count]))

    def _start_write(self, op: ops.Write, association: Association) -> None:
        sub = self._take(op, association, self._was_written, memoryview(op.data))
        offset = association.position if op.offset is None else op.offset
        self._request(sub, lib.iocp_write, pointer_to(sub.keep), min(sub.keep.nbytes, LARGEST_REQUEST), offset)

    def _was_written(self, sub: Submission, count: int, code: int) -> None:
        if not code and sub.op.offset is None:
            sub.association.position += count
        self._end(sub, count, code)

    def _start_accept_pipe(self, op: ops.AcceptPipe, association: Association) -> None:
        self._request(self._take(op, association, self._pipe_accepted), lib.iocp_pipe_accept)

    def _pipe_accepted(self, sub: Submission, count: int, code: int) -> None:
        op = sub.op
        if code and self._left_undone(op, code):
            self._request(sub, lib.iocp_pipe_accept)
        else:
            self._end(sub, None, 0 if code == PIPE_CONNECTED else code)

    # -- waiting for handles -----------------------------------------------------------------------

    def _start_watch(self, op: ops.WaitForHandle) -> None:
        self._launch(op)
        sub = self._take(op, None, self._signalled)
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

    def _end_watches(self) -> None:
        """Take every wait for a handle back; what was signalled before that is still reaped."""
        for sub in list(self._outstanding.values()):
            if sub.finish == self._signalled and lib.iocp_unwatch_handle(sub.native) == 0:
                del self._outstanding[sub.address]
                self._give_back(sub)
