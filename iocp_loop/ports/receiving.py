"""Receiving from sockets for streams, once for all drivers: one receive, and what it has come to.

A driver acts on the outcome: data go to the operation's `complete`, nothing means to wait again, an empty value or an
exception ends the stream.  The native tier has the same in C (``_native/hot/receiving.c``, ``datagrams.c``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from .. import operations as ops
from ..native import hot
from ..operations import IN_FLIGHT
from .driver import Driver

__all__ = ["AGAIN", "DATAGRAMS_IN_A_TURN", "SCRATCH_SIZE", "receive_datagrams", "receive_for_stream"]

#: The size of the scratch buffer of a driver, bytes; about as much as a core's second-level cache holds.
SCRATCH_SIZE = 256 * 1024

#: How many datagrams an endpoint gets at most before the others have their turn.
DATAGRAMS_IN_A_TURN = 16

#: What a call raises that found nothing just now.
AGAIN = (BlockingIOError, InterruptedError)


def receive_for_stream(op: ops.ReceiveStream, scratch: Any) -> bytes | int | None:
    """Receive once for a stream: bytes, or their number if its owner provides the memory; empty or 0 is the end.

    None: nothing is to be received now.  `scratch` is the driver's buffer.  Raises what `get_buffer` or receiving
    raises.
    """
    try:
        if op.get_buffer is not None:
            return _receive_into(op)
        return cast("bytes", scratch[: cast("Any", op.handle).recv_into(scratch)])
    except AGAIN:
        return None


def _receive_into(op: Any) -> int | None:
    """Asking for the buffer may have ended the stream: what there is stays in the socket then.

    The buffer is let go of before the owner is told, who may give it another size.
    """
    lent = op.get_buffer()
    if lent is None or op.state is not IN_FLIGHT:
        return None
    with memoryview(lent) as view:
        del lent
        return cast("int", op.handle.recv_into(view))


def receive_datagrams(driver: Driver, op: ops.ReceiveFromStream, receive: Callable[[Any], Any]) -> int:
    """Receive for a stream what there is, up to `DATAGRAMS_IN_A_TURN`, and deliver each; how many they were.

    `receive(op)` makes one attempt: ``(data, address)``, or it raises, and so does this if receiving fails.  The native
    tier does this in C for the datagrams of the Internet.
    """
    if op.internet and _receive_natively is not None:
        received = _receive_natively(driver, op, DATAGRAMS_IN_A_TURN)
        if received is not None:
            return cast("int", received)
    count = 0
    while count < DATAGRAMS_IN_A_TURN and not op.paused and op.state is IN_FLIGHT:
        try:
            value = receive(op)
        except AGAIN:
            break
        driver._complete(op, value, None)
        count += 1
    return count


_receive_natively = getattr(hot, "receive_datagrams", None)
if _receive_natively is not None:
    hot.use_operations(ops)
