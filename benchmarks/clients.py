"""The echo client under measurement, written in several ways, on any loop: what an application does, and no more.

``python -m benchmarks.clients --loop NAME --mode MODE (--port PORT | --unix PATH) [--size BYTES] [--connections N]
[--warmup SECONDS] [--seconds SECONDS]`` prints a line of JSON: the echoes that were back in full within the window, and
the CPU microseconds (user and system, all threads of this process) that each of them took.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any, cast

from .limits import raise_descriptor_limit
from .peers import PEERS, new_event_loop

_HOST = "127.0.0.1"


class _Load:
    """What all connections share: where to, with what, and how many echoes are back."""

    def __init__(self, path: str | None, port: int | None, size: int) -> None:
        self.path = path
        self.port = port
        self.message = bytes(range(256)) * (size // 256) + bytes(size % 256)
        self.echoes = 0
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def lose(self, exc: BaseException | None) -> None:
        """A connection has ended, which none does by itself."""
        if not self.lost.done():
            self.lost.set_exception(exc or ConnectionError("the server closed a connection"))


class _Asking(asyncio.Protocol):
    """Sends the message, waits until as many bytes are back, and sends it again."""

    def __init__(self, load: _Load) -> None:
        self._load = load
        self._left = len(load.message)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._write = cast(asyncio.Transport, transport).write
        self._write(self._load.message)

    def data_received(self, data: bytes) -> None:
        self._receive(len(data))

    def _receive(self, count: int) -> None:
        self._left -= count
        if not self._left:
            load = self._load
            load.echoes += 1
            self._left = len(load.message)
            self._write(load.message)

    def connection_lost(self, exc: Exception | None) -> None:
        self._load.lose(exc)


class _BufferedAsking(_Asking, asyncio.BufferedProtocol):
    """The same, into a buffer of its own."""

    def __init__(self, load: _Load) -> None:
        super().__init__(load)
        self._buffer = memoryview(bytearray(64 * 1024))

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._receive(nbytes)


async def _with_protocol(load: _Load, factory: Callable[[_Load], asyncio.BaseProtocol]) -> None:
    loop = asyncio.get_running_loop()
    make = cast(Callable[[], asyncio.Protocol], lambda: factory(load))
    if load.path is not None:
        await loop.create_unix_connection(make, load.path)
    else:
        await loop.create_connection(make, _HOST, cast(int, load.port))
    await load.lost


async def _protocol(load: _Load) -> None:
    await _with_protocol(load, _Asking)


async def _buffered(load: _Load) -> None:
    await _with_protocol(load, _BufferedAsking)


async def _with_streams(streams: Any, load: _Load) -> None:
    """By the open_connection and open_unix_connection of `streams`, a module."""
    if load.path is not None:
        reader, writer = await streams.open_unix_connection(load.path)
    else:
        reader, writer = await streams.open_connection(_HOST, load.port)
    size = len(load.message)
    while True:
        writer.write(load.message)
        await writer.drain()
        await reader.readexactly(size)
        load.echoes += 1


async def _streams(load: _Load) -> None:
    await _with_streams(asyncio, load)


async def _named_streams(load: _Load) -> None:
    await _with_streams(importlib.import_module("iocp_loop"), load)


async def _sock(load: _Load) -> None:
    loop = asyncio.get_running_loop()
    address: Any = load.path or (_HOST, load.port)
    with socket.socket(socket.AF_UNIX if load.path else socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        await loop.sock_connect(sock, address)
        if not load.path:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while True:
            await loop.sock_sendall(sock, load.message)
            left = len(load.message)
            while left:
                data = await loop.sock_recv(sock, left)
                if not data:
                    raise ConnectionError("the server closed a connection")
                left -= len(data)
            load.echoes += 1


_MODES: dict[str, Callable[[_Load], Awaitable[None]]] = {
    "protocol": _protocol,
    "buffered": _buffered,
    "streams": _streams,
    "named-streams": _named_streams,
    "sock": _sock,
}


async def _measure(options: argparse.Namespace) -> dict[str, float]:
    load = _Load(options.unix, options.port, options.size)

    async def connection() -> None:
        try:
            await _MODES[options.mode](load)
        except (OSError, EOFError) as error:
            load.lose(error)

    kept = [asyncio.ensure_future(connection()) for _ in range(options.connections)]
    while load.echoes < options.connections:
        await _for(load, 0.01)
    await _for(load, options.warmup)
    echoes, began, cpu = load.echoes, time.perf_counter(), time.process_time()
    await _for(load, options.seconds)
    spent, elapsed, echoes = time.process_time() - cpu, time.perf_counter() - began, load.echoes - echoes
    for task in kept:
        task.cancel()
    if not echoes:
        raise SystemExit("no echo in the window")
    return {"messages": echoes, "messages_per_second": echoes / elapsed, "cpu_us": spent / echoes * 1e6}


async def _for(load: _Load, seconds: float) -> None:
    """Let the load go on for so long.  Raises what a connection ended with."""
    await asyncio.wait([load.lost], timeout=seconds)
    if load.lost.done():
        load.lost.result()


def _main() -> None:
    parser = argparse.ArgumentParser(prog="clients", description=__doc__)
    parser.add_argument("--loop", choices=[name for name, peer in PEERS.items() if peer.module], required=True)
    parser.add_argument("--mode", choices=_MODES, required=True)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--port", type=int)
    where.add_argument("--unix", metavar="PATH")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--warmup", type=float, default=0.2)
    parser.add_argument("--seconds", type=float, default=1.0)
    options = parser.parse_args()

    raise_descriptor_limit()
    loop = new_event_loop(PEERS[options.loop])
    asyncio.set_event_loop(loop)
    print(json.dumps(loop.run_until_complete(_measure(options))), flush=True)


if __name__ == "__main__":
    _main()
