"""Accepting a connection, once for all drivers: its socket object, non-blocking, and its address.

The native tier has the same in C (``_native/hot/accepting.c``).
"""

from __future__ import annotations

import socket
from typing import Any

from ..native import hot

__all__ = ["accept_now", "adopt_accepted"]

#: The native tier's ways, None where they do not apply.
_accept_natively: Any = getattr(hot, "accept", None)
_adopt_natively: Any = getattr(hot, "adopt", None)


def accept_now(listener: socket.socket) -> tuple[socket.socket, Any]:
    """A connection that waits, non-blocking, and its address.  BlockingIOError: there is none."""
    if _accept_natively is not None and (accepted := _accept_natively(listener)) is not None:
        return accepted  # type: ignore[no-any-return]  # it is one
    sock, address = listener.accept()
    sock.setblocking(False)
    return sock, address


def adopt_accepted(listener: socket.socket, fd: int) -> socket.socket:
    """The socket object for a descriptor that the kernel accepted on `listener`; non-blocking."""
    if _adopt_natively is not None and (adopted := _adopt_natively(listener, fd)) is not None:
        return adopted  # type: ignore[no-any-return]  # it is one
    sock = socket.socket(listener.family, listener.type, listener.proto, fileno=fd)
    sock.setblocking(False)
    return sock
