"""The loop's methods for TLS; what carries the data stands in endpoints/tls.py."""

from __future__ import annotations

import asyncio
import contextvars
import socket
import ssl
from collections.abc import Callable
from typing import Any

from ..endpoints.tls import make_protocol
from ..transports import SocketTransport

__all__ = ["TlsMethods"]


class TlsMethods(asyncio.BaseEventLoop):
    """The part of the loop that speaks TLS."""

    _make_socket_transport: Callable[..., SocketTransport]

    def _make_ssl_transport(
        self,
        rawsock: socket.socket,
        protocol: asyncio.BaseProtocol,
        sslcontext: ssl.SSLContext,
        waiter: asyncio.Future[None] | None = None,
        *,
        server_side: bool = False,
        server_hostname: str | None = None,
        extra: dict[str, Any] | None = None,
        server: Any = None,
        ssl_handshake_timeout: float | None = None,
        ssl_shutdown_timeout: float | None = None,
        call_connection_made: bool = True,
        context: contextvars.Context | None = None,
        **more: Any,
    ) -> Any:
        ssl_protocol = make_protocol(
            self,
            protocol,
            sslcontext,
            waiter,
            server_side,
            server_hostname,
            call_connection_made=call_connection_made,
            ssl_handshake_timeout=ssl_handshake_timeout,
            ssl_shutdown_timeout=ssl_shutdown_timeout,
            **more,
        )
        self._make_socket_transport(rawsock, ssl_protocol, extra=extra, server=server, context=context)
        return ssl_protocol._app_transport

    async def start_tls(
        self,
        transport: asyncio.BaseTransport,
        protocol: asyncio.BaseProtocol,
        sslcontext: ssl.SSLContext,
        *,
        server_side: bool = False,
        server_hostname: str | None = None,
        ssl_handshake_timeout: float | None = None,
        ssl_shutdown_timeout: float | None = None,
    ) -> asyncio.Transport | None:
        """Upgrade `transport` to TLS; the new transport, which `protocol` is to use from now on.

        Parameters and errors as for ``asyncio.loop.start_tls``.  A client may send its first TLS record on the heels of
        the plain-text line that announces it.  What a stream reader has read ahead that way goes into the handshake.
        """
        if not isinstance(sslcontext, ssl.SSLContext):
            raise TypeError(f"sslcontext must be an ssl.SSLContext, got {sslcontext!r}")
        if not getattr(transport, "_start_tls_compatible", False):
            raise TypeError(f"transport {transport!r} is not supported by start_tls()")
        lower: Any = transport
        if isinstance(lower, SocketTransport):
            lower.release_protocol()
        waiter = self.create_future()
        ssl_protocol = make_protocol(
            self,
            protocol,
            sslcontext,
            waiter,
            server_side,
            server_hostname,
            ssl_handshake_timeout=ssl_handshake_timeout,
            ssl_shutdown_timeout=ssl_shutdown_timeout,
            call_connection_made=False,
        )
        if server_side:
            ssl_protocol._incoming.write(_take_read_ahead(protocol))
        lower.pause_reading()  # nothing is to come before the handshake has begun
        lower.set_protocol(ssl_protocol)
        begin = self.call_soon(ssl_protocol.connection_made, lower)
        go_on = self.call_soon(lower.resume_reading)
        try:
            await waiter
        except BaseException:
            lower.close()
            begin.cancel()
            go_on.cancel()
            raise
        return ssl_protocol._app_transport  # type: ignore[no-any-return]  # asyncio's


def _take_read_ahead(protocol: asyncio.BaseProtocol) -> bytes:
    """What the stream reader behind `protocol` has read and nobody has taken from it.

    Only for the side that answers the handshake: all that it has not consumed is the client's handshake.  The side
    that begins may still hold plain text, for no TLS record can have come before its own.
    """
    reader = getattr(protocol, "_stream_reader", None)
    if not isinstance(reader, asyncio.StreamReader):
        return b""
    buffer: bytearray = reader._buffer  # type: ignore[attr-defined]  # StreamReader has no public way
    data = bytes(buffer)
    buffer.clear()
    reader._maybe_resume_transport()  # type: ignore[attr-defined]  # as above
    return data
