"""Streams by name: asyncio's StreamReader and StreamWriter, with what runs for every message in C.

:func:`open_connection`, :func:`start_server` and their kin for UNIX sockets are used as asyncio's are, on any loop.
The readers and writers that they bring are instances of asyncio's classes.  On the native tier ``read``,
``readexactly``, ``readline``, ``readuntil``, ``write`` and ``drain`` run without a frame of Python while nothing
unusual happens, and leave the rest to asyncio's methods; on the Python tier the classes are asyncio's own.
"""

from __future__ import annotations

import asyncio
import socket
from asyncio import streams
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .native import hot

__all__ = ["StreamReader", "StreamReaderProtocol", "StreamWriter", "open_connection", "start_server"]

_LIMIT: int = streams._DEFAULT_LIMIT  # type: ignore[attr-defined]  # not in typeshed

if TYPE_CHECKING or hot is None:
    StreamReader = asyncio.StreamReader
    StreamWriter = asyncio.StreamWriter
    StreamReaderProtocol = asyncio.StreamReaderProtocol
else:

    class StreamReader(hot.Reader, asyncio.StreamReader):
        """asyncio's StreamReader, read without a frame of Python."""

    class StreamWriter(hot.Writer, asyncio.StreamWriter):
        """asyncio's StreamWriter, written to and drained without a frame of Python."""

    class StreamReaderProtocol(hot.ReaderProtocol, asyncio.StreamReaderProtocol):
        """asyncio's StreamReaderProtocol, which brings our StreamWriter."""

        def connection_made(self, transport):
            """Begin: and, in a server, call ``client_connected_cb(reader, writer)``."""
            # asyncio's method would make a writer of its own class.
            connected, self._client_connected_cb = self._client_connected_cb, None
            try:
                super().connection_made(transport)
            finally:
                self._client_connected_cb = connected
            if connected is None or self._reject_connection:
                return
            reader = self._stream_reader
            writer = StreamWriter(transport, self, reader, self._loop)
            if hasattr(self, "_stream_writer"):  # an older Python's, which keeps it: newer ones let it be collected
                self._stream_writer = writer
            try:
                result = connected(reader, writer)
            except Exception as error:
                self._failed(transport, error)
                result = None
            if asyncio.iscoroutine(result):
                self._task = self._loop.create_task(result)
                self._task.add_done_callback(lambda task: self._served(transport, task))
            self._strong_reader = None

        def _served(self, transport, task):
            if task.cancelled():
                transport.close()
            elif (error := task.exception()) is not None:
                self._failed(transport, error)

        def _failed(self, transport, error):
            message = "Unhandled exception in client_connected_cb"
            self._loop.call_exception_handler({"message": message, "exception": error, "transport": transport})
            transport.close()

    hot.use_reader(StreamReader)


def _pair(limit: int) -> tuple[StreamReader, StreamReaderProtocol]:
    loop = asyncio.get_running_loop()
    reader = StreamReader(limit=limit, loop=loop)
    return reader, StreamReaderProtocol(reader, loop=loop)


def _serving(client_connected_cb: Callable[[StreamReader, StreamWriter], Any], limit: int) -> Callable[[], Any]:
    loop = asyncio.get_running_loop()
    return lambda: StreamReaderProtocol(StreamReader(limit=limit, loop=loop), client_connected_cb, loop=loop)


async def open_connection(
    host: str | None = None, port: int | str | None = None, *, limit: int = _LIMIT, **kwds: Any
) -> tuple[StreamReader, StreamWriter]:
    """Connect: ``(reader, writer)``.  As :func:`asyncio.open_connection`, whose `limit` is in bytes."""
    loop: Any = asyncio.get_running_loop()
    reader, protocol = _pair(limit)
    transport, _ = await loop.create_connection(lambda: protocol, host, port, **kwds)
    return reader, StreamWriter(transport, protocol, reader, loop)


async def start_server(
    client_connected_cb: Callable[[StreamReader, StreamWriter], Any],
    host: Any = None,
    port: int | str | None = None,
    *,
    limit: int = _LIMIT,
    **kwds: Any,
) -> asyncio.Server:
    """Serve: ``client_connected_cb(reader, writer)`` for each client.  As :func:`asyncio.start_server`."""
    loop: Any = asyncio.get_running_loop()
    server: asyncio.Server = await loop.create_server(_serving(client_connected_cb, limit), host, port, **kwds)
    return server


if hasattr(socket, "AF_UNIX"):
    __all__ += ["open_unix_connection", "start_unix_server"]

    async def open_unix_connection(
        path: Any = None, *, limit: int = _LIMIT, **kwds: Any
    ) -> tuple[StreamReader, StreamWriter]:
        """Connect to a UNIX socket: ``(reader, writer)``.  As :func:`asyncio.open_unix_connection`."""
        loop: Any = asyncio.get_running_loop()
        reader, protocol = _pair(limit)
        transport, _ = await loop.create_unix_connection(lambda: protocol, path, **kwds)
        return reader, StreamWriter(transport, protocol, reader, loop)

    async def start_unix_server(
        client_connected_cb: Callable[[StreamReader, StreamWriter], Any],
        path: Any = None,
        *,
        limit: int = _LIMIT,
        **kwds: Any,
    ) -> asyncio.Server:
        """Serve at a UNIX socket.  As :func:`asyncio.start_unix_server`."""
        loop: Any = asyncio.get_running_loop()
        server: asyncio.Server = await loop.create_unix_server(_serving(client_connected_cb, limit), path, **kwds)
        return server
