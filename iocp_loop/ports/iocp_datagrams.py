"""Datagrams on driver ``iocp``: a short receive would cut them, so each is received into a buffer of its own."""

from __future__ import annotations

import contextlib
from typing import Any

from .. import operations as ops
from ..operations import CANCELLING, IN_FLIGHT
from .iocp_binding import ABORTED, WSA_INVALID, Submission, ffi, lib
from .iocp_requests import Association, IocpRequests

__all__ = ["DatagramRequests"]

#: A datagram is never larger, bytes.
LARGEST_DATAGRAM = 65536


class DatagramRequests(IocpRequests):
    """The operations ReceiveFrom, ReceiveFromInto, ReceiveFromStream and SendTo."""

    # -- receiving ---------------------------------------------------------------------------------

    def _start_receive_from(self, op: Any, association: Association) -> None:
        into = memoryview(op.buffer) if hasattr(op, "buffer") else bytearray(min(op.size, LARGEST_DATAGRAM))
        finish = self._received_datagram if op.stream else self._received_from
        self._arm_receive_from(self._take(op, finish, into), association)

    def _arm_receive_from(self, sub: Submission, association: Association) -> None:
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
            self._arm_datagrams(op)
            return
        if code:
            self._end(sub, None, code)
            return
        datagram: Any = bytes(sub.keep[:count]), sub.get_address()
        patience = 16  # one busy endpoint must not starve the others
        try:
            while True:
                self.completions += 1
                self._complete(op, datagram, None)
                patience -= 1
                if not patience or op.paused or op.state is not IN_FLIGHT:
                    break
                datagram = op.handle.recvfrom(op.size)
        except BlockingIOError:
            pass
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            if op.state is IN_FLIGHT:
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
            self._arm_receive_from(sub, self._associations[op.fd])

    # -- sending -----------------------------------------------------------------------------------

    def _start_send_to(self, op: ops.SendTo, association: Association) -> None:
        sub = self._take(op, self._finish_with_count, memoryview(op.data))
        data = ffi.from_buffer(sub.keep)
        self._ready_to_emulate(sub, association)
        if op.address is None:
            code = lib.iocp_send(op.fd, sub.native, data, len(data))
        else:
            try:
                sub.set_address(sub.op.handle.family, op.address)
            except OSError as error:
                self._give_back(sub)
                self._finish(op, None, error)
                return
            code = lib.iocp_send_to(op.fd, sub.native, data, len(data))
        self._submitted(sub, code, association)
