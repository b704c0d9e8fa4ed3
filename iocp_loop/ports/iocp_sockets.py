"""Sending, accepting and connecting on driver ``iocp``."""

from __future__ import annotations

import errno
import os
import socket
import stat
from typing import Any

from .. import operations as ops
from ..operations import CANCELLING, IN_FLIGHT
from .driver import adopt_accepted, cancelled_error
from .iocp_binding import (
    ABORTED,
    PENDING,
    RETRY,
    WSA_NOT_A_SOCKET,
    Submission,
    error_of,
    ffi,
    handle_of_file,
    lib,
)
from .iocp_requests import LARGEST_REQUEST, Association, IocpRequests

__all__ = ["SocketRequests"]

#: The most that TransmitFile takes in one call, bytes.
LARGEST_TRANSMISSION = (1 << 31) - 2


class SocketRequests(IocpRequests):
    """The operations Send, SendAll, SendFile, Accept, AcceptStream and Connect."""

    # -- sending -----------------------------------------------------------------------------------

    def _start_send(self, op: ops.Send, association: Association) -> None:
        sub = self._take(op, self._finish_with_count, memoryview(op.data))
        data = ffi.from_buffer(sub.keep)
        self._ready_to_emulate(sub, association)
        self._submitted(sub, lib.iocp_send(op.fd, sub.native, data, min(len(data), LARGEST_REQUEST)), association)

    def _start_send_all(self, op: ops.SendAll, association: Association) -> None:
        sub = self._take(op, self._sent_some)
        if not op.buffers:
            self._next_dispatch(sub)
            return
        self._send_gathered(sub, association)

    def _send_gathered(self, sub: Submission, association: Association) -> None:
        op = sub.op
        self._ready_to_emulate(sub, association)
        if len(op.buffers) > lib.IOCP_GATHER_LIMIT:
            op.buffers = [memoryview(b"".join(op.buffers))]
        sub.keep = views = [memoryview(view) for view in op.buffers]
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

    def _start_send_file(self, op: ops.SendFile, association: Association) -> None:
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

    def _start_accept(self, op: ops.Accept | ops.AcceptStream, association: Association) -> None:
        op.driver_data = set()
        try:
            self._arm_accepts(op, association)
        except OSError as error:
            if not op.driver_data:
                self._finish(op, None, error)

    def _arm_accepts(self, op: ops.Accept | ops.AcceptStream, association: Association) -> None:
        """Have as many accepts outstanding as `op` asks for.  OSError in a shortage: till the next time it is fewer."""
        subs = op.driver_data
        while len(subs) < (op.depth if type(op) is ops.AcceptStream else 1):
            sub = self._take(op, self._accepted)
            op.driver_data = subs  # all of them, and not the latest
            try:
                self._arm_accept(sub, association)
            except OSError:
                self._give_back(sub)
                raise
            subs.add(sub)

    def _arm_accept(self, sub: Submission, association: Association) -> None:
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
        error: BaseException | None = None
        if op.state is IN_FLIGHT:
            try:
                if not self._is_open(op):
                    raise error_of(WSA_NOT_A_SOCKET)
                self._arm_accept(sub, self._associations[op.fd])
                self._arm_accepts(op, self._associations[op.fd])  # those that a shortage has cost
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
            self._finish(op, None, error or cancelled_error())
        if value is not None:
            self.completions += 1
            op.complete(value, None)

    def _accepted_connection(self, sub: Submission, code: int) -> tuple[socket.socket, Any] | None:
        """The connection that an accept has brought, and its address; None if it is gone already, or was none."""
        listener = sub.op.handle
        if code not in (0, RETRY) or not self._is_open(sub.op) or lib.iocp_accept_finish(sub.op.fd, sub.native):
            lib.iocp_close_socket(sub.native.accepted)
            return None
        conn = adopt_accepted(listener, sub.native.accepted)
        try:
            return conn, sub.get_address() or conn.getpeername()
        except OSError:
            conn.close()
            return None

    def _start_connect(self, op: ops.Connect, association: Association) -> None:
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


def _has_peer(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True
