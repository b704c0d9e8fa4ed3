"""The echo server under load, written four ways, on any loop: what an application does, and no more.

``python -m benchmarks.servers.echo_server --loop NAME --mode MODE [--host IPV4 --port PORT | --unix PATH]
[--tls CERTIFICATE KEY | --udp] [--busy THREADS]`` prints ``listening ADDRESS`` when it accepts, and serves until a
signal ends it.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import socket
import ssl
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, cast

from ..limits import raise_descriptor_limit
from ..peers import PEERS, new_event_loop

__all__ = ["MODES"]

_BACKLOG = 1024
#: What one read asks for: the greatest message of the grid, no more, as stock asyncio allocates it each time.
_READ_SIZE = 100 * 1024
#: The buffer that each BufferedProtocol brings along.
_BUFFER_SIZE = 64 * 1024
#: Room for the datagrams of a thousand clients, so that the benchmark is not about those that were lost.
_DATAGRAM_ROOM = 8 * 1024 * 1024


class _Echo(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


class _DatagramEcho(asyncio.DatagramProtocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.transport.sendto(data, addr)


class _BufferedEcho(asyncio.BufferedProtocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.buffer = memoryview(bytearray(_BUFFER_SIZE))

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        # A copy, as write() may keep what it is given, and this buffer is filled again.
        self.transport.write(bytes(self.buffer[:nbytes]))


def _bound(path: str | None, host: str, port: int) -> socket.socket:
    if sys.platform != "win32" and path is not None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.bind(path)
    else:
        # The protocol is stated, as create_server(host, port) does: asyncio sets TCP_NODELAY only where it is.
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    sock.listen(_BACKLOG)  # not every loop does so with a socket that it is given
    sock.setblocking(False)
    return sock


def _bound_datagram(host: str, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        force = 33  # SO_RCVBUFFORCE of socket(7): beyond the limit of the system, for those who may
        sock.setsockopt(socket.SOL_SOCKET, force, _DATAGRAM_ROOM)
    except OSError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _DATAGRAM_ROOM)
    sock.bind((host, port))
    sock.setblocking(False)
    return sock


def _tls(files: Sequence[str] | None) -> ssl.SSLContext | None:
    if files is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*files)
    return context


async def _serve_protocol(
    sock: socket.socket, tls: ssl.SSLContext | None, factory: Callable[[], asyncio.BaseProtocol]
) -> asyncio.Server:
    loop = asyncio.get_running_loop()
    # The stubs want a Protocol; a BufferedProtocol is as welcome.
    make = cast(Callable[[], asyncio.Protocol], factory)
    if sys.platform != "win32" and sock.family == socket.AF_UNIX:
        return await loop.create_unix_server(make, sock=sock, backlog=_BACKLOG)
    return await loop.create_server(make, sock=sock, backlog=_BACKLOG, ssl=tls)


async def _protocol(sock: socket.socket, tls: ssl.SSLContext | None) -> object:
    if sock.type == socket.SOCK_DGRAM:
        return await asyncio.get_running_loop().create_datagram_endpoint(_DatagramEcho, sock=sock)
    return await _serve_protocol(sock, tls, _Echo)


async def _buffered(sock: socket.socket, tls: ssl.SSLContext | None) -> object:
    return await _serve_protocol(sock, tls, _BufferedEcho)


async def _serve_streams(streams: Any, sock: socket.socket, tls: ssl.SSLContext | None) -> object:
    """By the start_server and start_unix_server of `streams`, a module."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(_READ_SIZE):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass  # the load client ends by closing, with messages under way: a reset, or an end without TLS's goodbye
        finally:
            writer.close()

    if sys.platform != "win32" and sock.family == socket.AF_UNIX:
        return cast(object, await streams.start_unix_server(echo, sock=sock, backlog=_BACKLOG))
    return cast(object, await streams.start_server(echo, sock=sock, backlog=_BACKLOG, ssl=tls))


async def _streams(sock: socket.socket, tls: ssl.SSLContext | None) -> object:
    return await _serve_streams(asyncio, sock, tls)


async def _named_streams(sock: socket.socket, tls: ssl.SSLContext | None) -> object:
    return await _serve_streams(importlib.import_module("iocp_loop"), sock, tls)


async def _sock(listener: socket.socket, tls: ssl.SSLContext | None) -> object:
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()

    async def echo(sock: socket.socket) -> None:
        with sock:
            try:
                while data := await loop.sock_recv(sock, _READ_SIZE):
                    await loop.sock_sendall(sock, data)
            except ConnectionError:
                pass  # as above

    async def accept() -> None:
        while True:
            sock, _ = await loop.sock_accept(listener)
            if sock.family == socket.AF_INET:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            task = loop.create_task(echo(sock))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    return loop.create_task(accept())


def _spin() -> None:
    """A thread that computes for ever, in Python."""
    while True:
        pass


#: How each mode starts to serve a bound socket, with or without TLS; the result has to be kept for as long as it is to
#: serve.
MODES: dict[str, Callable[[socket.socket, ssl.SSLContext | None], Awaitable[object]]] = {
    "protocol": _protocol,
    "buffered": _buffered,
    "streams": _streams,
    "named-streams": _named_streams,
    "sock": _sock,
}


def _main() -> None:
    parser = argparse.ArgumentParser(prog="echo_server", description=__doc__)
    parser.add_argument("--loop", choices=[name for name, peer in PEERS.items() if peer.module], required=True)
    parser.add_argument("--mode", choices=MODES, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--unix", metavar="PATH")
    parser.add_argument("--tls", nargs=2, metavar=("CERTIFICATE", "KEY"))
    parser.add_argument("--udp", action="store_true")
    parser.add_argument("--busy", type=int, default=0, metavar="THREADS")
    options = parser.parse_args()

    raise_descriptor_limit()
    loop = new_event_loop(PEERS[options.loop])
    asyncio.set_event_loop(loop)
    if options.udp:
        sock = _bound_datagram(options.host, options.port)
    else:
        sock = _bound(options.unix, options.host, options.port)

    # Asked now, as some loops take the descriptor away from the socket.
    address = options.unix or sock.getsockname()[1]

    async def serve() -> None:
        kept = await MODES[options.mode](sock, _tls(options.tls))
        for _ in range(options.busy):
            loop.run_in_executor(None, _spin)
        print("listening", address, flush=True)
        await asyncio.Event().wait()
        del kept

    loop.run_until_complete(serve())


if __name__ == "__main__":
    _main()
