"""Listening sockets: accepting, and what a server does when accepting fails.

A listener survives every per-connection failure.  An exception of the protocol factory costs that connection only; a
connection that was reset before it was accepted is passed over; running out of descriptors or memory is reported
once, and the listener tries again until there are some.
"""

from __future__ import annotations

import asyncio
import contextvars
import errno
import socket
from asyncio import trsock
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .. import operations as ops
from ..debugging import context_for
from ..native import hot
from ..proactor import Proactor

__all__ = ["Listener", "PythonAccepting"]

#: Seconds between two tries to accept while the system has no descriptors or no memory left.
RETRY_DELAY = 0.1

#: The system is short of something that will come back.
_SHORTAGE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

#: The listening socket itself is gone or was never one: no use in trying again.
_HOPELESS = frozenset({errno.EBADF, errno.EINVAL, errno.ENOTSOCK, errno.EOPNOTSUPP, errno.ECANCELED})


class PythonAccepting:
    """What is done with each connection.  The native tier has it in C (``_native/hot/accepting.c``)."""

    _context: Any
    _stopped: bool
    _welcome: Callable[[socket.socket, Any], object]
    #: For the native tier what `welcome` of a plain server needs, see Listener.
    _serves: tuple[Callable[[], asyncio.BaseProtocol], Any, type] | None

    if TYPE_CHECKING:  # the rest of the listener

        def _ended(self, error: BaseException) -> None: ...
        def _report(self, error: BaseException, message: str) -> None: ...

    def _accepted(self, value: Any, error: BaseException | None) -> None:
        if error is not None:
            self._ended(error)
            return
        conn, address = value
        if self._stopped:
            conn.close()
            return
        self._in_shortage = False
        try:
            self._context.copy().run(self._welcome, conn, address)
        except (SystemExit, KeyboardInterrupt):
            conn.close()
            raise
        except BaseException as exc:
            conn.close()
            self._report(exc, "Error on transport creation for incoming connection")


if TYPE_CHECKING:
    Accepting = PythonAccepting
else:
    Accepting = PythonAccepting if hot is None else hot.Accepting


class Listener(Accepting):
    """One listening socket with its accept stream.

    `welcome(sock, address)` makes the connection's protocol and transport; if it raises, the connection is closed, the
    error is reported, and accepting goes on.  It is called in a copy of `context`, which is by default the context of
    whoever makes the listener.  With `serves` (protocol factory, server, type of the transport) all that `welcome` does
    is to make these two.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        proactor: Proactor,
        sock: socket.socket,
        welcome: Callable[[socket.socket, Any], object],
        context: contextvars.Context | None = None,
        serves: tuple[Callable[[], asyncio.BaseProtocol], Any, type] | None = None,
    ) -> None:
        self._loop = loop
        self._proactor = proactor
        self._sock = sock
        self._welcome = welcome
        self._serves = serves
        self._context = context_for(loop, context)
        self._stopped = False
        self._in_shortage = False
        self._retry: asyncio.TimerHandle | None = None
        self._stream: ops.AcceptStream | None = None
        self._arm()

    def stop(self) -> None:
        """Stop accepting and close the listening socket as soon as the kernel has let go of it."""
        if self._stopped:
            return
        self._stopped = True
        if self._retry is not None:
            self._retry.cancel()
        stream = self._stream
        if stream is not None:
            self._proactor.cancel(stream)
        if stream is None or not stream.in_flight or self._proactor.let_go():
            # At once where possible: whoever connects from now on is to be refused, and the address is free.
            self._sock.close()

    def _arm(self) -> None:
        self._stream = self._proactor.accept_stream(self._sock, self._accepted)

    def _arm_again(self) -> None:
        self._retry = None
        try:
            self._arm()
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:  # refused outright
            self._ended(exc)

    def _ended(self, error: BaseException) -> None:
        """The accept stream has ended: because it was asked to, or because accepting failed."""
        if self._stopped:
            self._sock.close()
            return
        code = error.errno if isinstance(error, OSError) else None
        if code in _HOPELESS:
            if code != errno.ECANCELED:
                self._report(error, "socket.accept() failed, the listening socket is not usable any more")
            return
        if code in _SHORTAGE:
            if not self._in_shortage:
                self._in_shortage = True
                self._report(error, "socket.accept() out of system resource")
        else:
            self._report(error, "Accept failed on a socket")
        self._retry = self._loop.call_later(RETRY_DELAY, self._arm_again)

    def _report(self, error: BaseException, message: str) -> None:
        self._loop.call_exception_handler(
            {"message": message, "exception": error, "socket": trsock.TransportSocket(self._sock)}
        )
