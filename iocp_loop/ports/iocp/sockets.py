"""Sending, accepting and connecting on driver ``iocp``."""

from __future__ import annotations

import errno
import os
import socket
import stat
from typing import Any

from ... import operations as ops
from ...operations import CANCELLING, IN_FLIGHT
from ..accepting import accept_now, adopt_accepted
from ..driver import cancelled_error
from .binding import (
    ABORTED,
    PENDING,
    RETRY,
    WSA_INVALID,
    Submission,
    error_of,
    ffi,
    handle_of_file,
    lib,
    pointer_to,
)
from .requests import Association, IocpRequests, still_open

__all__ = ["SocketRequests"]

#: The most of a send that is in the system's hands at once, bytes.  Windows may take all of it into its own memory, the
#: write buffer being empty then, however slow the peer is; or lock it.
LARGEST_SEND = 1 << 20

#: The most that TransmitFile takes in one call, bytes.
LARGEST_TRANSMISSION = (1 << 31) - 2

#: How many connections a stream takes at most before the loop goes on.
ACCEPTS_IN_A_TURN = 16


class SocketRequests(IocpRequests):
    """The operations Send, SendAll, SendFile, Accept, AcceptStream and Connect."""

    # -- sending -----------------------------------------------------------------------------------

    def _start_send(self, op: ops.Send, association: Association) -> None:
        sub = self._take(op, association, self._finish_with_count, memoryview(op.data))
        self._request(sub, lib.iocp_send, pointer_to(sub.keep), min(sub.keep.nbytes, LARGEST_SEND))

    def _start_send_all(self, op: ops.SendAll, association: Association) -> None:
        sub = self._take(op, association, self._sent_some)
        if op.buffers:
            self._send_gathered(sub)
        else:
            self._next_dispatch(sub)

    def _send_gathered(self, sub: Submission) -> None:
        """Send what is left of a SendAll, or the front of it, as much as a request may have."""
        room = LARGEST_SEND
        views: list[memoryview] = []
        for view in sub.op.buffers:
            views.append(memoryview(view)[:room])
            room -= views[-1].nbytes
            if not room:
                break
        if len(views) > lib.IOCP_GATHER_LIMIT:
            views = [memoryview(b"".join(views))]
        sub.keep = views
        pieces = [pointer_to(view) for view in views]
        if len(pieces) == 1:
            self._request(sub, lib.iocp_send, pieces[0], views[0].nbytes)
        else:
            sizes = ffi.new("unsigned long[]", [view.nbytes for view in views])
            self._request(sub, lib.iocp_send_gathered, len(pieces), ffi.new("void *[]", pieces), sizes)

    def _sent_some(self, sub: Submission, count: int, code: int) -> None:
        op = sub.op
        try:
            done = op.advance(count)
            if not done and not code and op.state is not CANCELLING:
                self._send_gathered(sub)
                return
        except Exception as error:  # somebody has taken the buffers away
            self._end_with(sub, None, error)
            return
        if done:
            self._end(sub, op.sent)
        else:
            self._end(sub, None, code or ABORTED)

    def _start_send_file(self, op: ops.SendFile, association: Association) -> None:
        status = os.fstat(op.file)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "only a regular file can be sent")
        # TransmitFile takes 0 bytes for "all", and says nothing helpful about more than there are.
        size = min(op.count, status.st_size - op.offset, LARGEST_TRANSMISSION)
        sub = self._take(op, association, self._finish_with_count)
        if size > 0:
            self._request(sub, lib.iocp_transmit_file, handle_of_file(op.file), op.offset, size)
        else:
            self._next_dispatch(sub)

    # -- connections -------------------------------------------------------------------------------

    def _start_accept(self, op: ops.Accept | ops.AcceptStream, association: Association) -> None:
        op.driver_data = set()
        try:
            self._arm_accepts(op, association)
        except OSError as error:
            if not op.driver_data:
                association.reading.remove(op)
                self._finish(op, None, error)

    def _arm_accepts(self, op: ops.Accept | ops.AcceptStream, association: Association) -> None:
        """Have as many accepts outstanding as `op` asks for; fewer, with OSError, when resources run out."""
        subs = op.driver_data
        while len(subs) < (op.depth if type(op) is ops.AcceptStream else 1):
            sub = self._take(op, association, self._accepted)
            op.driver_data = subs  # all of them, and not the latest
            try:
                self._arm_accept(sub)
            except OSError:
                self._give_back(sub)
                raise
            subs.add(sub)

    def _arm_accept(self, sub: Submission) -> None:
        """Raises OSError if there is no socket to accept with, or the listener can't accept."""
        listener = sub.op.handle
        code = self._call(sub, lib.iocp_accept, listener.family, listener.type, listener.proto)
        if code not in (0, PENDING):
            raise error_of(code)
        self._submitted(sub, code)

    def _accepted(self, sub: Submission, count: int, code: int) -> None:
        """A connection has come in, or one has failed: that concerns the connection, and not the listener."""
        op, association = sub.op, sub.association
        value = self._accepted_connection(sub, code)
        if value is not None and type(op) is ops.Accept:
            self._end(sub, value)
            return
        error: BaseException | None = None
        if op.state is IN_FLIGHT:
            try:
                if value is not None:
                    self._accept_what_waits(op)
                self._arm_accept(sub)
                self._arm_accepts(op, association)  # those that failed when resources had run out
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as exc:
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
            self._leave_line(association, op)
            self._finish(op, None, error or cancelled_error())
        if value is not None:
            self.completions += 1
            op.complete(value, None)

    def _accept_what_waits(self, op: ops.AcceptStream) -> None:
        """Take what else has connected, a call each: an accept for every one would be a turn for every one."""
        for _ in range(ACCEPTS_IN_A_TURN - 1):
            try:
                self.ready.append((op, accept_now(op.handle), None))
            except OSError:  # there is none, or it is gone; if resources have run out, the next accept tells
                return

    @staticmethod
    def _accepted_connection(sub: Submission, code: int) -> tuple[socket.socket, Any] | None:
        """The connection that an accept has brought, and its address; None if it is gone already, or was none."""
        listener = sub.op.handle
        if code not in (0, RETRY) or not still_open(sub.op) or lib.iocp_accept_finish(sub.op.fd, sub.native):
            lib.iocp_close_socket(sub.native.accepted)
            return None
        conn = adopt_accepted(listener, sub.native.accepted)
        try:
            return conn, sub.get_address() or conn.getpeername()
        except OSError:
            conn.close()
            return None

    def _start_connect(self, op: ops.Connect, association: Association) -> None:
        sub = self._take(op, association, self._connected)
        if association.stream and association.family in (socket.AF_INET, socket.AF_INET6):
            code = sub.set_address(association.family, op.address)
            if code:
                self._submitted(sub, code)
            else:
                self._request(sub, lib.iocp_connect)
            return
        # ConnectEx is for TCP.  Others connect without waiting for anybody.
        sub.finish = self._connected_at_once
        try:
            op.handle.connect(op.address)
        except OSError as error:
            self._submitted(sub, getattr(error, "winerror", None) or error.errno or WSA_INVALID)
        else:
            self._next_dispatch(sub)

    def _connected_at_once(self, sub: Submission, count: int, code: int) -> None:
        self._end(sub, None, code)

    def _connected(self, sub: Submission, count: int, code: int) -> None:
        if not still_open(sub.op):
            code = ABORTED
        elif code in (0, RETRY):
            undone, code = code == RETRY, lib.iocp_connect_finish(sub.op.fd)
            if undone and not code and not _has_peer(sub.op.handle):
                code = RETRY
        error = error_of(code) if code else None
        if error is not None and code != ABORTED:
            error.strerror = f"Connect call failed {sub.op.address}: {error.strerror}"
        self._end_with(sub, None, error)


def _has_peer(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True
