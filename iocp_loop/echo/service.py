"""The echo server itself, an ordinary asyncio program: with streams, and with a protocol."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections import Counter
from collections.abc import Callable
from typing import cast

__all__ = ["Counts", "EchoProtocol", "Service", "serve", "serve_one", "welcomer"]

#: Bytes that one read of a stream asks for.
CHUNK = 64 * 1024

#: Connections that may wait to be accepted.
BACKLOG = 1024

#: Seconds in which clients may fetch what is still queued for them when the server ends.
GRACE = 2.0


class Counts:
    """What has been served: connections in all, and now; bytes and messages (reads) sent back."""

    __slots__ = ("bytes", "connections", "messages", "open")

    def __init__(self) -> None:
        self.connections = 0
        self.open = 0
        self.bytes = 0
        self.messages = 0

    def as_counter(self) -> Counter[str]:
        """The counts by name."""
        return Counter({name: getattr(self, name) for name in self.__slots__})


class Service:
    """The server's connections: both ways to serve one, the counts, and how to end them all."""

    def __init__(self) -> None:
        self.counts = Counts()
        self._open: set[asyncio.WriteTransport] = set()
        self._all_gone = asyncio.Event()

    async def echo(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection with streams; for ``asyncio.start_server``."""
        counts = self.counts
        self.came(writer.transport)
        try:
            while data := await reader.read(CHUNK):
                writer.write(data)
                counts.bytes += len(data)
                counts.messages += 1
                await writer.drain()  # waits, and so does not read, while the client is slow to read
            writer.close()
            await writer.wait_closed()
        except OSError:
            # The client has reset the connection, or the network has lost it.  asyncio notes that in a future too, and
            # its way not to have it reported when nobody looks fails where there is no GIL; so look.
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        finally:
            writer.close()
            self.left(writer.transport)

    def protocol(self) -> EchoProtocol:
        """Serve one connection with a protocol; for ``loop.create_server``."""
        return EchoProtocol(self)

    def came(self, transport: asyncio.WriteTransport) -> None:
        """Count a new connection."""
        self._open.add(transport)
        self.counts.connections += 1
        self.counts.open += 1
        self._all_gone.clear()

    def left(self, transport: asyncio.WriteTransport) -> None:
        """Count a connection that is over."""
        self._open.discard(transport)
        self.counts.open = len(self._open)
        if not self._open:
            self._all_gone.set()

    async def close(self) -> None:
        """End all connections; those that do not take what is queued for them within `GRACE` seconds are cut."""
        for transport in list(self._open):
            transport.close()
        await self._wait_until_all_gone()
        for transport in list(self._open):
            transport.abort()
        await self._wait_until_all_gone()

    async def _wait_until_all_gone(self) -> None:
        if self._open:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._all_gone.wait(), GRACE)


class EchoProtocol(asyncio.Protocol):
    """One connection, served with callbacks."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._counts = service.counts

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._service.came(self._transport)

    def data_received(self, data: bytes) -> None:
        self._transport.write(data)
        counts = self._counts
        counts.bytes += len(data)
        counts.messages += 1

    # A client that does not read is not read from either, so what waits for it stays small.
    def pause_writing(self) -> None:
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._service.left(self._transport)


async def serve(service: Service, listener: socket.socket, mode: str, tls: ssl.SSLContext | None) -> asyncio.Server:
    """Serve the connections that come to `listener`."""
    if mode == "streams":
        return await asyncio.start_server(service.echo, sock=listener, ssl=tls, backlog=BACKLOG)
    loop = asyncio.get_running_loop()
    return await loop.create_server(service.protocol, sock=listener, ssl=tls, backlog=BACKLOG)


async def serve_one(service: Service, conn: socket.socket, mode: str, tls: ssl.SSLContext | None) -> None:
    """Serve one connection that somebody else has accepted."""
    loop = asyncio.get_running_loop()

    def factory() -> asyncio.Protocol:
        if mode == "protocol":
            return service.protocol()
        return asyncio.StreamReaderProtocol(asyncio.StreamReader(), service.echo)  # as start_server does it

    try:
        await loop.connect_accepted_socket(factory, conn, ssl=tls)
    except OSError:
        conn.close()  # it broke before it began, or it speaks no TLS


def welcomer(
    loop: asyncio.AbstractEventLoop, service: Service, mode: str, tls: ssl.SSLContext | None
) -> Callable[[socket.socket], None]:
    """A function that serves a connection which somebody else has accepted; to be called in the loop."""
    tasks: set[asyncio.Task[None]] = set()

    def welcome(conn: socket.socket) -> None:
        task = loop.create_task(serve_one(service, conn, mode, tls))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    return welcome
