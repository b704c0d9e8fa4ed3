"""IocpEventLoop: asyncio's event loop on a completion port.

asyncio.BaseEventLoop brings tasks, executors, name lookup and the orchestration of connections and servers;
methods/turns.py the ready queue and the timers.  This class gives them the rest: a proactor to wait in, transports, and
the socket methods.
"""

from __future__ import annotations

import asyncio
import contextvars
import socket
import ssl
import weakref
from collections.abc import Callable
from typing import Any

from .endpoints.datagrams import DatagramTransport
from .endpoints.listener import Listener
from .endpoints.sendfile import begin_at
from .methods.clock import ClockMethods
from .methods.connecting import ConnectingMethods
from .methods.embedding import EmbeddingMethods
from .methods.names import NameMethods
from .methods.pipes import PipeMethods
from .methods.readiness import ReadinessMethods
from .methods.signals import SignalMethods
from .methods.sockets import SocketMethods
from .methods.subprocesses import SubprocessMethods
from .methods.tls import TlsMethods
from .methods.turns import Turns
from .methods.unix import UnixMethods
from .ports import make_driver
from .proactor import Proactor
from .statistics import Statistics, statistics
from .transports import SocketTransport

__all__ = ["IocpEventLoop", "new_event_loop"]


class IocpEventLoop(
    ClockMethods,  # before the turn, which has a clock too
    Turns,
    SocketMethods,
    ReadinessMethods,
    NameMethods,
    ConnectingMethods,
    UnixMethods,
    TlsMethods,
    SignalMethods,
    PipeMethods,
    SubprocessMethods,
    EmbeddingMethods,
):
    """An asyncio event loop whose I/O is operations on a completion port.

    `driver`: ``"auto"``, ``"iocp"``, ``"uring"`` or ``"poll"``; None: what IOCP_LOOP_DRIVER says, else ``auto``.
    Raises ValueError for an unknown driver, DriverUnavailable for one that can't work here.
    """

    def __init__(self, driver: str | None = None) -> None:
        super().__init__()
        try:
            carrier = make_driver(driver)
        except BaseException:
            asyncio.BaseEventLoop.close(self)  # nothing was opened; without this __del__ would warn of an open loop
            raise
        self._proactor = Proactor(self, carrier)
        carrier.exception_handler = self.call_exception_handler
        self._selector = self._proactor  # BaseEventLoop waits by self._selector.select(timeout)
        self._use(carrier)
        self._listeners: dict[socket.socket, Listener] = {}
        self._transports = weakref.WeakValueDictionary()
        self._transport_refs = self._transports.data  # type: ignore[attr-defined]  # not in typeshed
        self._forget_transport = self._transports._remove  # type: ignore[attr-defined]  # as above
        self._prepare_quick_calls()

    @property
    def driver(self) -> str:
        """The name of the driver that this loop runs on."""
        return self._proactor.driver.name

    def stats(self) -> Statistics:
        """What the loop has done so far: operations by kind, completions, batches, wakes, in flight."""
        return statistics(self._proactor.driver)

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} driver={self.driver} running={self.is_running()} "
            f"closed={self.is_closed()} debug={self.get_debug()}>"
        )

    # -- what BaseEventLoop asks for ---------------------------------------------------------------

    def _write_to_self(self) -> None:
        self._proactor.wake()

    def close(self) -> None:
        """Close the loop; bounded: what the kernel does not give back in time is leaked, with a warning.

        Raises RuntimeError while the loop runs.
        """
        if self.is_running():
            raise RuntimeError("Cannot close a running event loop")
        if self.is_closed():
            return
        self._close_signals()
        self._close_pipes()
        self._proactor.close()
        super().close()
        self._forget_callbacks()

    def _make_socket_transport(
        self,
        sock: socket.socket,
        protocol: asyncio.BaseProtocol,
        waiter: asyncio.Future[None] | None = None,
        *,
        extra: dict[str, Any] | None = None,
        server: Any = None,
        context: contextvars.Context | None = None,
    ) -> SocketTransport:
        return SocketTransport(self, self._proactor, sock, protocol, waiter, extra, server, context)

    async def _create_connection_transport(
        self,
        sock: socket.socket,
        protocol_factory: Callable[[], asyncio.BaseProtocol],
        ssl: Any,
        server_hostname: str | None,
        *arguments: Any,
        **more: Any,
    ) -> Any:
        if not ssl and not arguments and more.get("context") is None:
            try:
                sock.setblocking(False)
            except BaseException:
                sock.close()
                raise
            return await self._make_plain_connection(sock, protocol_factory)
        make: Any = super()._create_connection_transport  # type: ignore[misc]  # BaseEventLoop's
        try:
            return await make(sock, protocol_factory, ssl, server_hostname, *arguments, **more)
        except BaseException:
            # Before Python 3.15 nobody closes the socket of a connection whose protocol factory raises.
            transport = self._transports.get(sock.fileno())
            if not isinstance(transport, SocketTransport) or not transport.owns(sock):
                sock.close()
            raise

    async def _make_plain_connection(
        self, sock: socket.socket, protocol_factory: Callable[[], asyncio.BaseProtocol]
    ) -> Any:
        """As `_create_connection_transport`, of a non-blocking socket and without TLS; most come this way."""
        try:
            protocol = protocol_factory()
            waiter = self.create_future()
            transport = self._make_socket_transport(sock, protocol, waiter)
        except BaseException:
            sock.close()
            raise
        try:
            await waiter
        except BaseException:
            transport.close()
            raise
        finally:
            del waiter  # it may have an exception, which has this frame
        return transport, protocol

    def _make_datagram_transport(
        self,
        sock: socket.socket,
        protocol: asyncio.BaseProtocol,
        address: Any = None,
        waiter: asyncio.Future[None] | None = None,
        extra: dict[str, Any] | None = None,
    ) -> DatagramTransport:
        transport = DatagramTransport(self, self._proactor, sock, protocol, address, waiter, extra)
        self._transports[sock.fileno()] = transport
        return transport

    async def _sendfile_native(self, transp: Any, file: Any, offset: int, count: int | None) -> int:
        # What BaseEventLoop.sendfile tries first.
        self._check_sendfile_params(transp._sock, file, offset, count)  # type: ignore[attr-defined]  # BaseEventLoop's
        sent: int = await transp.send_file(file, offset, count)
        return sent

    async def _sendfile_fallback(self, transp: Any, file: Any, offset: int, count: int | None) -> int:
        # What it does if that is not available.
        sock = transp.get_extra_info("socket")
        self._check_sendfile_params(sock, file, offset, count)  # type: ignore[attr-defined]  # as above
        if isinstance(transp, SocketTransport):
            return await transp.send_file(file, offset, count, copy=True)
        begin_at(file, offset)  # asyncio leaves it where it is if the offset is 0
        sent: int = await super()._sendfile_fallback(transp, file, offset, count)  # type: ignore[misc]  # as above
        return sent

    # -- servers -----------------------------------------------------------------------------------

    def _start_serving(
        self,
        protocol_factory: Callable[[], asyncio.BaseProtocol],
        sock: socket.socket,
        sslcontext: ssl.SSLContext | None = None,
        server: Any = None,
        backlog: int = 100,
        ssl_handshake_timeout: float | None = None,
        ssl_shutdown_timeout: float | None = None,
        context: contextvars.Context | None = None,
        **more: Any,
    ) -> None:
        def welcome(conn: socket.socket, address: Any) -> None:
            protocol = protocol_factory()
            extra = {"peername": address}
            if sslcontext is None:
                self._make_socket_transport(conn, protocol, extra=extra, server=server)
            else:
                self._make_ssl_transport(
                    conn,
                    protocol,
                    sslcontext,
                    server_side=True,
                    extra=extra,
                    server=server,
                    ssl_handshake_timeout=ssl_handshake_timeout,
                    ssl_shutdown_timeout=ssl_shutdown_timeout,
                    **more,
                )

        plain = sslcontext is None and type(self)._make_socket_transport is IocpEventLoop._make_socket_transport
        serves = (protocol_factory, server, SocketTransport) if plain else None
        self._listeners[sock] = Listener(self, self._proactor, sock, welcome, context, serves)

    def _stop_serving(self, sock: socket.socket) -> None:
        self._remove_socket_file(sock)
        listener = self._listeners.pop(sock, None)
        if listener is not None:
            listener.stop()
        else:
            sock.close()


def new_event_loop(driver: str | None = None) -> IocpEventLoop:
    """A new event loop; the ``loop_factory`` of asyncio.Runner and asyncio.run.  See :class:`IocpEventLoop`."""
    return IocpEventLoop(driver)
