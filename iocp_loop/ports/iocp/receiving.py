"""Receiving from stream sockets on driver ``iocp``: without memory lent, or with a slot; driver.py tells when."""

from __future__ import annotations

import mmap
from typing import Any

from ... import operations as ops
from ...operations import CANCELLING, IN_FLIGHT
from ..receiving import SCRATCH_SIZE, receive_for_stream
from .binding import ABORTED, Slot, SlotPool, Submission, ffi, lib
from .datagrams import DatagramRequests
from .requests import Association

__all__ = ["SLOT_SIZE", "ReceiveRequests"]

#: The pool of slots for small receives: the size of one, bytes, and how many a port hands out at most.
SLOT_SIZE = 16384
SLOT_LIMIT = 512


class ReceiveRequests(DatagramRequests):
    """The operations Receive, ReceiveInto and ReceiveStream; sockets of messages receive as datagrams do."""

    def __init__(self, concurrency: int = 1) -> None:
        super().__init__(concurrency)
        self._scratch = mmap.mmap(-1, SCRATCH_SIZE)
        self._slots = SlotPool(SLOT_SIZE, SLOT_LIMIT)

    # -- one receive -------------------------------------------------------------------------------

    def _start_receive(self, op: ops.Receive | ops.ReceiveInto, association: Association) -> None:
        if association.stream:
            into = memoryview(op.buffer) if isinstance(op, ops.ReceiveInto) else None
            self._arm_once(self._take(op, association, self._receive_once, into))
        else:
            self._start_receive_from(op, association)

    def _arm_receive(self, sub: Submission) -> None:
        self._request(sub, lib.iocp_receive, ffi.NULL, 0)

    def _arm_once(self, sub: Submission) -> None:
        op = sub.op
        slot = self._lend(sub)
        if slot is None:
            self._arm_receive(sub)
        elif sub.op is not op:
            self._slots.give_back(slot)
        else:
            sub.slot = slot
            size = op.size if sub.keep is None else sub.keep.nbytes
            self._request(sub, lib.iocp_receive, slot[0], min(size, SLOT_SIZE))

    def _lend(self, sub: Submission) -> Slot | None:
        """A slot for the next receive, if that is expected to fit; None: there is none, or it is not.

        Making slots runs the garbage collector: a finalizer may end the operation.
        """
        association = sub.association
        return self._slots.take() if association.small and not association.emulated else None

    def _take_from(self, sub: Submission, slot: Slot, count: int) -> bytes:
        """What a request has put into its slot, which is given back."""
        data: bytes = slot[1][slot[2] : slot[2] + count]
        sub.slot = None
        self._slots.give_back(slot)
        sub.association.small = count < SLOT_SIZE
        return data

    def _receive_once(self, sub: Submission, count: int, code: int) -> None:
        """Something was received, or can be now; or the wait for it has failed."""
        op, slot = sub.op, sub.slot
        if slot is not None and (count or not code):
            data = self._take_from(sub, slot, count)
            if sub.keep is not None:
                sub.keep[:count] = data
            self._end(sub, data if sub.keep is None else count)
        elif code and not self._left_undone(op, code):
            self._end(sub, None, code)
        elif slot is not None:
            sub.slot = None
            self._slots.give_back(slot)
            self._arm_once(sub)
        else:
            self._receive_now(sub, op)

    def _receive_now(self, sub: Submission, op: Any) -> None:
        sock: Any = op.handle
        try:
            value = sock.recv(op.size) if sub.keep is None else sock.recv_into(sub.keep)
        except BlockingIOError:  # somebody else was faster
            if op.state is CANCELLING:
                self._end(sub, None, ABORTED)
            else:
                self._arm_receive(sub)
        except (SystemExit, KeyboardInterrupt):
            self._arm_receive(sub)
            raise
        except BaseException as error:
            self._end_with(sub, None, error)
        else:
            sub.association.small = (value if isinstance(value, int) else len(value)) < SLOT_SIZE
            self._end(sub, value)

    # -- streams -----------------------------------------------------------------------------------

    def _start_receive_stream(self, op: ops.ReceiveStream, association: Association) -> None:
        self._take(op, association, self._receive_some)
        self._arm(op)

    def _arm(self, op: ops.ReceiveStream) -> None:
        """Arm a receive stream, unless it is armed, paused or over."""
        sub = op.driver_data
        if op.state is not IN_FLIGHT or op.paused or sub.armed:
            return  # in this order: once it is over, the submission may serve another
        slot = self._lend(sub) if op.get_buffer is None else None
        if slot is None:
            self._arm_receive(sub)
        elif op.state is not IN_FLIGHT or op.paused or sub.armed:
            self._slots.give_back(slot)
        else:
            sub.slot = slot
            self._request(sub, lib.iocp_receive, slot[0], SLOT_SIZE)

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
            value = receive_for_stream(op, self._scratch)
        except (SystemExit, KeyboardInterrupt):
            self._arm(op)  # another run of the loop may follow
            raise
        except BaseException as error:
            if op.state is not IN_FLIGHT:  # get_buffer has ended it, and the submission may serve another
                raise
            self._end_with(sub, None, error)
            return
        if isinstance(value, bytes):
            again = len(value) == SCRATCH_SIZE
            sub.association.small = len(value) < SLOT_SIZE
        try:
            if value:
                self.completions += 1
                op.complete(value, None)
            elif value is not None:
                self._end(sub, value)
        finally:
            if again and op.state is IN_FLIGHT and not op.paused and not sub.armed:
                self._next_dispatch(sub)  # the buffer was full: there is more
            else:
                self._arm(op)

    def _receive_from_slot(self, sub: Submission, op: Any, slot: Slot, count: int, code: int) -> None:
        """The same for a receive that had memory: the data are here already, whatever has become of the stream."""
        data = self._take_from(sub, slot, count)
        full = count == SLOT_SIZE
        try:
            if count:
                self.completions += 1
                op.complete(data, None)
        finally:
            if sub.armed or sub.op is not op:
                pass  # `complete` paused and resumed, or cancelled
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
