"""A stream transport is made, receives and ends: what it puts into the life that all transports have (life.py).

A short connection costs what is here, and little else.  The native tier has it in C (``_native/hot/connections.c`` and
``life.c``).  What is rare in a life (a file that is being sent, a queue that has to empty first) is SocketTransport's.
"""

from __future__ import annotations

import asyncio
import contextvars
import socket
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from . import operations as ops
from .debugging import context_for
from .flow import TakesBytes
from .life import CLOSING, MADE, Life
from .native import hot
from .proactor import Proactor
from .streams import PythonStream, StreamBase

__all__ = ["Connection", "PythonConnection", "attach", "detach", "name_of"]

#: The context of ``connection_made`` and ``connection_lost`` is before 3.15 that of whoever brings them about.
_ENDS_HAVE_CONTEXT = sys.version_info >= (3, 15)

_INTERNET = (int(socket.AF_INET), int(socket.AF_INET6))

#: Before Python 3.13 (and late 3.12) a server counts its connections, later ones know them.
_SERVERS_COUNT = asyncio.base_events.Server._attach.__code__.co_argcount == 1  # type: ignore[attr-defined]  # not in typeshed


def attach(server: Any, transport: asyncio.BaseTransport) -> None:
    """Tell `server` of a new connection, in the way of the running Python."""
    if _SERVERS_COUNT:
        server._attach()
    else:
        server._attach(transport)


def detach(server: Any, transport: asyncio.BaseTransport) -> None:
    """Tell `server` that a connection has ended."""
    if _SERVERS_COUNT:
        server._detach()
    else:
        server._detach(transport)


class PythonConnection(Life, PythonStream):
    """From the socket to ``connection_made``, and from ``close`` or the peer's end to ``connection_lost``."""

    # There is one for each idle connection: everything has its slot, nothing is kept that the system can be asked for
    # later.
    __slots__ = (
        "_at_eof",
        "_buffered",
        "_eof_asked",
        "_file",
        "_held",
        "_info",
        "_peername",
        "_proactor",
        "_queue",
        "_queued",
        "_receive",
        "_sending",
        "_server",
        "_writes_after_loss",
    )

    if TYPE_CHECKING:  # the rest of the transport: SocketTransport's

        def _choose_receiver(self) -> None: ...
        def _fail_file(self) -> None: ...
        def get_extra_info(self, name: str, default: Any = ...) -> Any: ...

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        proactor: Proactor,
        sock: socket.socket,
        protocol: asyncio.BaseProtocol,
        waiter: asyncio.Future[None] | None = None,
        extra: dict[str, Any] | None = None,
        server: Any = None,
        context: contextvars.Context | None = None,
    ) -> None:
        if server is not None:
            attach(server, self)  # before anything else: a server that has been closed meanwhile refuses
        try:
            self._set_up(loop, proactor, sock, protocol, waiter, extra, server, context)
        except BaseException:
            self._server = None
            if server is not None:
                detach(server, self)
            raise

    def _set_up(
        self,
        loop: asyncio.AbstractEventLoop,
        proactor: Proactor,
        sock: socket.socket,
        protocol: asyncio.BaseProtocol,
        waiter: asyncio.Future[None] | None,
        extra: dict[str, Any] | None,
        server: Any,
        context: contextvars.Context | None,
    ) -> None:
        # The peer's name can't be asked for any more once the peer has reset the connection.
        self._peername = extra.pop("peername", None) if extra else name_of(sock.getpeername)
        self._info: dict[str, Any] | None = extra or None  # of get_extra_info, as far as it was asked for
        self._loop = loop
        self._proactor = proactor
        self._sock = sock
        self._server = server
        self._receive: ops.ReceiveStream | None = None
        self._sending: ops.SendAll | ops.SendFile | None = None
        self._file: asyncio.Future[int] | None = None  # while a file is sent: what its sender awaits
        self._queue: list[Any] | None = None  # written and not yet submitted
        self._queued = 0  # bytes in _queue
        self._direct = True  # write may send at once: nothing is queued, nothing has ended
        self._held: tuple[tuple[Any, BaseException | None], ...] = ()  # completions that came while paused
        self._paused = False
        self._eof_asked = False
        self._at_eof = False
        self._writes_after_loss = 0
        # Receiving happens in one context, as it does in the handle that asyncio's own loops keep for a reader.
        self._context = context_for(loop, context, 3)
        self._init_flow_control()
        self.set_protocol(protocol)
        send_without_delay(sock)
        self._call_end_soon(self._begin, waiter)
        self._state = MADE  # from now on the socket is ours
        loop._transports[sock.fileno()] = self  # type: ignore[attr-defined]  # IocpEventLoop's own

    @property
    def _sockname(self) -> Any:
        return name_of(self._sock.getsockname)

    def _start(self) -> None:
        if self._receive is None and self._state < CLOSING and not self._paused:
            self._arm_receive()

    def _arm_receive(self) -> None:
        # Neither paused nor closing, and nothing is held: see _choose_receiver.
        if self._buffered:
            get_buffer = self._get_buffer_of_protocol
            self._receive = self._proactor.receive_stream(self._sock, self._received_into, get_buffer)
        else:
            self._receive = self._proactor.receive_stream(self._sock, self._received)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Switch protocols; the next data go to the new one."""
        self._protocol = protocol
        self._buffered = isinstance(protocol, asyncio.BufferedProtocol) and not isinstance(protocol, TakesBytes)
        if self._receive is not None:
            self._receive.get_buffer = self._get_buffer_of_protocol if self._buffered else None
            self._choose_receiver()

    # -- the end -----------------------------------------------------------------------------------

    def _receive_ended(self, error: BaseException | None) -> None:
        self._receive = None
        self._at_eof = True
        if error is None:
            self._end_of_stream()
        elif not ops.was_cancelled(error):  # that would be the loop closing under us
            self._receiving_failed(error, "Fatal read error on socket transport")

    def _end_of_stream(self) -> None:
        try:
            keep_open = bool(self._context.run(self._protocol.eof_received))
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:
            self._receiving_failed(exc, "Fatal error: protocol.eof_received() call failed.")
            return
        if not keep_open:
            self._context.copy().run(self.close)  # connection_lost inherits it

    def _is_sending(self) -> bool:
        return self._sending is not None

    def _stop_receiving(self) -> None:
        self._held = ()
        if self._receive is not None:
            self._choose_receiver()
            self._proactor.cancel(self._receive)

    def _stop(self) -> None:
        self._direct = False
        self._queue, self._queued = None, 0
        if self._sending is not None:
            self._proactor.cancel(self._sending)
        self._stop_receiving()
        if self._file is not None:
            self._fail_file()

    def _call_end_soon(self, callback: Callable[[Any], object], argument: Any) -> None:
        context: Any = self._context if _ENDS_HAVE_CONTEXT else None
        self._loop.call_soon(callback, argument, context=context)

    def _call_connection_lost(self, exc: BaseException | None) -> None:
        try:
            super()._call_connection_lost(exc)
        finally:
            server, self._server = self._server, None
            if server is not None:
                detach(server, self)

    def _operations(self) -> Iterable[ops.Operation | None]:
        return self._receive, self._sending

    def _close_handle(self) -> None:
        self.get_extra_info("sockname")  # can't be asked for afterwards
        self._loop._close_socket_of(self, self._sock)  # type: ignore[attr-defined]  # IocpEventLoop's own


def send_without_delay(sock: socket.socket) -> None:
    """Set TCP_NODELAY, as asyncio does: a small write goes out before what is on its way is acknowledged."""
    if ops.family_of(sock) in _INTERNET and sock.proto in (0, socket.IPPROTO_TCP):
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError:
            pass  # the peer has reset the connection: receiving tells


def name_of(ask: Callable[[], Any]) -> Any:
    """What getsockname or getpeername says; None where it says nothing."""
    try:
        return ask()
    except OSError:
        return None


if TYPE_CHECKING:
    Connection = PythonConnection
else:
    Connection = (
        PythonConnection
        if hot is None
        else hot.stream_type(StreamBase, TakesBytes, context_for, send_without_delay, _SERVERS_COUNT)
    )
