"""The calls of the driver ``poll``, one for each kind of operation.

Each makes one attempt, without blocking, and returns the operation's value or raises.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Callable
from typing import Any

from ... import operations as ops
from ...operations import Operation
from ...system import system
from ..accepting import accept_now
from ..receiving import AGAIN

__all__ = ["ATTEMPTS", "may_block", "receive_from", "start_connect"]

_IOV_MAX = 1024  # Linux's and the BSDs' limit on buffers in one call, limits.h


def receive(op: ops.Receive) -> Any:
    return op.handle.recv(op.size)  # type: ignore[union-attr]  # socket operations hold sockets


def receive_into(op: ops.ReceiveInto) -> Any:
    return op.handle.recv_into(op.buffer)  # type: ignore[union-attr]  # as above


def send(op: ops.Send) -> Any:
    return op.handle.send(op.data)  # type: ignore[union-attr]  # as above


def send_all(op: ops.SendAll) -> Any:
    sock: Any = op.handle
    gather = getattr(sock, "sendmsg", None)  # Windows has none
    while op.buffers:
        op.advance(gather(op.buffers[:_IOV_MAX]) if gather is not None else sock.send(op.buffers[0]))
    return op.sent


def accept(op: ops.Accept) -> Any:
    return accept_now(op.handle)


def start_connect(op: ops.Connect) -> bool:
    """Begin to connect; True when it is done already."""
    if op.begun:
        return False
    try:
        op.handle.connect(op.address)
    except AGAIN as exc:
        if exc.errno == errno.EAGAIN:
            raise  # a UNIX listener's backlog is full, or there are no ports left: nothing is under way
        return False
    return True


def connect(op: ops.Connect) -> Any:
    code = op.handle.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        raise ops.connect_error(code, op.address)
    return None


def receive_from(op: ops.ReceiveFrom | ops.ReceiveFromStream) -> Any:
    return op.handle.recvfrom(op.size)  # type: ignore[union-attr]  # as above


def receive_from_into(op: ops.ReceiveFromInto) -> Any:
    return op.handle.recvfrom_into(op.buffer)  # type: ignore[union-attr]  # as above


def send_to(op: ops.SendTo) -> Any:
    sock: Any = op.handle
    return sock.send(op.data) if op.address is None else sock.sendto(op.data, op.address)


def send_file(op: ops.SendFile) -> Any:
    # The descriptor is asked for anew: the socket may have been closed, and its number given to another.
    return system.sendfile(op.handle.fileno(), op.file, op.offset, op.count)  # type: ignore[union-attr]  # as above


def may_block(op: Operation) -> bool:
    """Whether a call for `op` on what is not ready would block; a file that is always ready is no matter."""
    return isinstance(op, ops.FileOperation) and os.get_blocking(op.fd) and not stat.S_ISREG(os.fstat(op.fd).st_mode)


def read(op: ops.Read) -> Any:
    return os.read(op.fd, op.size) if op.offset is None else os.pread(op.fd, op.size, op.offset)


def read_into(op: ops.ReadInto) -> Any:
    return os.readv(op.fd, [op.buffer]) if op.offset is None else os.preadv(op.fd, [op.buffer], op.offset)


def write(op: ops.Write) -> Any:
    return os.write(op.fd, op.data) if op.offset is None else os.pwrite(op.fd, op.data, op.offset)


ATTEMPTS: dict[type[Operation], Callable[[Any], Any]] = {
    ops.Receive: receive,
    ops.ReceiveInto: receive_into,
    ops.Send: send,
    ops.SendAll: send_all,
    ops.Accept: accept,
    ops.Connect: connect,
    ops.ReceiveFrom: receive_from,
    ops.ReceiveFromInto: receive_from_into,
    ops.SendTo: send_to,
    ops.Read: read,
    ops.ReadInto: read_into,
    ops.Write: write,
}
if hasattr(os, "sendfile"):
    ATTEMPTS[ops.SendFile] = send_file
