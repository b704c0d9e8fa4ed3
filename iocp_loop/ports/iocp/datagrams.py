"""Datagrams on driver ``iocp``: a short receive would cut them, so each is received into a buffer of its own.

The buffer takes the largest datagram, however few bytes were asked for.  Nobody knows for sure whether a WSARecvFrom
whose buffer is too short leaves an entry on the port when it fails at once; so none is, and what is too long is refused
here.
"""

from __future__ import annotations

import contextlib
from typing import Any

from ... import operations as ops
from ...operations import CANCELLING, IN_FLIGHT
from ..receiving import receive_datagrams
from .binding import ABORTED, WSA_INVALID, WSA_MESSAGE_SIZE, Submission, lib, pointer_to
from .requests import Association, IocpRequests

__all__ = ["DatagramRequests"]

#: A datagram is never larger, bytes.
LARGEST_DATAGRAM = 65536


class DatagramRequests(IocpRequests):
    """The operations ReceiveFrom, ReceiveFromInto, ReceiveFromStream and SendTo."""

    # -- receiving ---------------------------------------------------------------------------------

    def _start_receive_from(self, op: Any, association: Association) -> None:
        into = memoryview(op.buffer) if hasattr(op, "buffer") else None
        most = min(op.size, LARGEST_DATAGRAM) if into is None else into.nbytes
        finish = self._received_datagram if op.stream else self._received_from
        self._arm_receive_from(self._take(op, association, finish, (bytearray(LARGEST_DATAGRAM), into, most)))

    def _arm_receive_from(self, sub: Submission) -> None:
        self._request(sub, self._receive_from, pointer_to(sub.keep[0], writable=True), sub.op.handle)

    @staticmethod
    def _receive_from(fd: int, native: Any, memory: Any, sock: Any) -> int:
        code: int = lib.iocp_receive_from(fd, native, memory, LARGEST_DATAGRAM)
        if code == WSA_INVALID:
            # Windows receives on bound sockets only; others bind theirs on the way.
            with contextlib.suppress(OSError):
                sock.bind(("", 0))
                code = lib.iocp_receive_from(fd, native, memory, LARGEST_DATAGRAM)
        return code

    def _received_from(self, sub: Submission, count: int, code: int) -> None:
        op = sub.op
        if code and self._left_undone(op, code):
            self._arm_receive_from(sub)
            return
        memory, into, most = sub.keep
        if not code and count > most:
            code = WSA_MESSAGE_SIZE
        if code:
            self._end(sub, None, code)
            return
        value: Any = bytes(memory[:count]) if into is None else count
        if into is not None:
            into[:count] = memory[:count]
        if isinstance(op, (ops.ReceiveFrom, ops.ReceiveFromInto)):
            value = value, sub.get_address()
        self._end(sub, value)

    def _received_datagram(self, sub: Submission, count: int, code: int) -> None:
        """A datagram of a stream.

        One that was there when it was asked for is one of many: then a call for each of the others, in place of two.
        """
        op = sub.op
        if code and self._left_undone(op, code):
            self._arm_datagrams(op)
            return
        if not code and count > sub.keep[2]:
            code = WSA_MESSAGE_SIZE
        if code:
            self._end(sub, None, code)
            return
        at_once = sub.native.bytes > 0
        self.completions += 1
        try:
            self._complete(op, (bytes(sub.keep[0][:count]), sub.get_address()), None)
            if at_once:
                self.completions += receive_datagrams(self, op, _receive_now)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            if sub.op is op:
                self._end_with(sub, None, error)
        finally:
            if op.state is CANCELLING:  # the datagram was faster than the cancel
                self._end(sub, None, ABORTED)
            else:
                self._arm_datagrams(op)

    def _arm_datagrams(self, op: ops.ReceiveFromStream) -> None:
        """Arm a stream of datagrams, unless it is armed, paused or over."""
        sub = op.driver_data
        if op.state is IN_FLIGHT and not op.paused and not sub.armed:  # once it is over, `sub` may serve another
            self._arm_receive_from(sub)

    # -- sending -----------------------------------------------------------------------------------

    def _start_send_to(self, op: ops.SendTo, association: Association) -> None:
        sub = self._take(op, association, self._finish_with_count, memoryview(op.data))
        code = 0 if op.address is None else sub.set_address(association.family, op.address)
        if code:
            self._submitted(sub, code)
        else:
            send = lib.iocp_send if op.address is None else lib.iocp_send_to
            self._request(sub, send, pointer_to(sub.keep), sub.keep.nbytes)


def _receive_now(op: Any) -> Any:
    return op.handle.recvfrom(op.size)
