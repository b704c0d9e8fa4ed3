"""TLS on the loop's transports, by the standard library's :mod:`asyncio.sslproto`.

The SSLProtocol is an ordinary protocol of a socket transport; what the user's protocol sees is the transport that it
offers on its other side.
"""

from __future__ import annotations

import asyncio
import contextvars
import socket
import ssl
from asyncio import sslproto
from collections.abc import Callable
from typing import Any

from .transports import SocketTransport

__all__ = ["TlsMethods"]


class _TlsProtocol(sslproto.SSLProtocol):
    """asyncio's SSLProtocol with buffers of another size.

    It reads `max_size` bytes at a time, into a new bytes object each time, and asks for as many encrypted ones.  A read
    gives one TLS record at most, 16 KiB (RFC 8446, 5.1); memory of 256 KiB, asyncio's size, is mapped anew by malloc
    for each read, which costs as much as decrypting a small record.
    """

    max_size = 64 * 1024


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
        make: Any = _TlsProtocol  # its parameters differ between the Python versions
        ssl_protocol = make(
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
        if isinstance(transport, SocketTransport) and isinstance(sslcontext, ssl.SSLContext):
            transport.release_protocol()
            if server_side:
                _give_back_read_ahead(transport, protocol)
        return await super().start_tls(
            transport,
            protocol,
            sslcontext,
            server_side=server_side,
            server_hostname=server_hostname,
            ssl_handshake_timeout=ssl_handshake_timeout,
            ssl_shutdown_timeout=ssl_shutdown_timeout,
        )


def _give_back_read_ahead(transport: SocketTransport, protocol: asyncio.BaseProtocol) -> None:
    """Return to `transport` what the stream reader behind `protocol` has read and nobody has taken from it.

    Only for the side that answers the handshake: all that it has not consumed is the client's handshake.  The side
    that begins may still hold plain text, for no TLS record can have come before its own.
    """
    reader = getattr(protocol, "_stream_reader", None)
    if isinstance(reader, asyncio.StreamReader):
        buffer: bytearray = reader._buffer  # type: ignore[attr-defined]  # StreamReader has no public way
        if buffer:
            transport.unread(bytes(buffer))
            buffer.clear()
            reader._maybe_resume_transport()  # type: ignore[attr-defined]  # as above
