"""The workloads of life, each run in a process of its own: what is made, used once and ended, again and again.

``python -m benchmarks.connections PEER WORKLOAD`` prints what benchmarks.callbacks prints.  The other end of a
connection is a child process with blocking sockets, whose time does not count.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import socket
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from .callbacks import Workload, measure
from .peers import PEERS, new_event_loop
from .processes import CLIENT_CORE, on_core

__all__ = ["WORKLOADS"]

_MESSAGE = bytes(100)


# ---------------------------------------------------------------------------------------------------------------------
# The other end
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _child(run: Callable[[], None]) -> Iterator[None]:
    """Do `run` in a forked child on the client's core, meanwhile."""
    with on_core(CLIENT_CORE, range(os.cpu_count() or 1)):
        pid = os.fork()
    if not pid:
        try:
            run()
        finally:
            os._exit(0)
    try:
        yield
    finally:
        os.waitpid(pid, 0)


def _receive(sock: socket.socket) -> None:
    left = len(_MESSAGE)
    while left:
        data = sock.recv(left)
        if not data:
            raise ConnectionError("the connection has ended early")
        left -= len(data)


def _connect(address: Any, count: int, at_once: int) -> None:
    """Open `at_once` connections, have an echo on each, close them; `count` in all."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    for _ in range(0, count, at_once):
        socks = [socket.socket(family) for _ in range(at_once)]
        for sock in socks:
            sock.connect(address)
            sock.sendall(_MESSAGE)
        for sock in socks:
            _receive(sock)
            sock.close()


def _accept(listener: socket.socket, count: int) -> None:
    """Answer so many connections, one after the other."""
    for _ in range(count):
        with listener.accept()[0] as sock:
            _receive(sock)
            sock.sendall(_MESSAGE)
            sock.recv(1)


@contextlib.contextmanager
def _listening(transport: str) -> Iterator[socket.socket]:
    with tempfile.TemporaryDirectory() as directory:
        address: Any = os.path.join(directory, "socket") if transport == "unix" else ("127.0.0.1", 0)
        with socket.socket(socket.AF_UNIX if transport == "unix" else socket.AF_INET) as listener:
            listener.bind(address)
            listener.listen(1024)
            yield listener


# ---------------------------------------------------------------------------------------------------------------------
# Servers and clients
# ---------------------------------------------------------------------------------------------------------------------


class _Counted:
    """So many connections have ended."""

    def __init__(self, count: int) -> None:
        self._left = count
        self.all = asyncio.get_running_loop().create_future()

    def one(self) -> None:
        self._left -= 1
        if not self._left:
            self.all.set_result(None)


class _Echo(asyncio.Protocol):
    def __init__(self, ended: _Counted) -> None:
        self._ended = ended

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def data_received(self, data: bytes) -> None:
        self._transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended.one()


async def _echo_streams(ended: _Counted, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
    writer.close()
    ended.one()


async def _server(mode: str, transport: str, at_once: int, count: int) -> None:
    """Connections come, have an echo, and go."""
    loop = asyncio.get_running_loop()
    ended = _Counted(count)
    with _listening(transport) as listener:
        serve: Any
        if mode == "protocol":
            serve = loop.create_unix_server if transport == "unix" else loop.create_server
            server = await serve(lambda: _Echo(ended), sock=listener)
        else:
            serve = asyncio.start_unix_server if transport == "unix" else asyncio.start_server
            server = await serve(functools.partial(_echo_streams, ended), sock=listener)
        with _child(functools.partial(_connect, listener.getsockname(), count, at_once)):
            await ended.all
        server.close()
        await server.wait_closed()


async def _client(transport: str, count: int) -> None:
    """open_connection, an echo, close and wait_closed."""
    with _listening(transport) as listener, _child(functools.partial(_accept, listener, count)):
        address = listener.getsockname()
        for _ in range(count):
            if transport == "unix":
                reader, writer = await asyncio.open_unix_connection(address)
            else:
                reader, writer = await asyncio.open_connection(*address)
            writer.write(_MESSAGE)
            await reader.readexactly(len(_MESSAGE))
            writer.close()
            await writer.wait_closed()


# ---------------------------------------------------------------------------------------------------------------------
# The small things
# ---------------------------------------------------------------------------------------------------------------------


async def _add_reader(count: int) -> None:
    """add_reader and remove_reader, with nothing to read."""
    loop = asyncio.get_running_loop()
    one, other = socket.socketpair()
    with one, other:
        one.setblocking(False)
        for number in range(count):
            loop.add_reader(one, _nothing)
            loop.remove_reader(one)
            if number % 100 == 99:
                await asyncio.sleep(0)


async def _add_reader_event(count: int) -> None:
    """The same with an event between: how a library waits for its own socket."""
    loop = asyncio.get_running_loop()
    one, other = socket.socketpair()
    with one, other:
        one.setblocking(False)
        other.send(b"x")
        for _ in range(count):
            ready = loop.create_future()
            loop.add_reader(one, ready.set_result, None)
            ready.add_done_callback(lambda _: loop.remove_reader(one))
            await ready


async def _getaddrinfo(count: int) -> None:
    """A numeric host and a port."""
    loop = asyncio.get_running_loop()
    for _ in range(count):
        await loop.getaddrinfo("127.0.0.1", 80, type=socket.SOCK_STREAM)


async def _read_pipe(count: int) -> None:
    """A pipe made, its reading end connected, read to its end."""
    loop = asyncio.get_running_loop()
    for _ in range(count):
        reading, writing = os.pipe()
        os.close(writing)
        ended = _Counted(1)
        await loop.connect_read_pipe(functools.partial(_Echo, ended), os.fdopen(reading, "rb", 0))
        await ended.all


async def _run_in_executor(count: int) -> None:
    """A function that does nothing, in the default executor."""
    loop = asyncio.get_running_loop()
    for _ in range(count):
        await loop.run_in_executor(None, _nothing)


def _nothing() -> None:
    pass


def _connections(run: Callable[[int], Awaitable[None]]) -> Workload:
    return Workload(run, 2_000, 200)


WORKLOADS = {
    "server, protocol tcp": _connections(functools.partial(_server, "protocol", "tcp", 1)),
    "server, protocol tcp, 100 at once": _connections(functools.partial(_server, "protocol", "tcp", 100)),
    "server, protocol unix": _connections(functools.partial(_server, "protocol", "unix", 1)),
    "server, streams tcp": _connections(functools.partial(_server, "streams", "tcp", 1)),
    "client, streams tcp": _connections(functools.partial(_client, "tcp")),
    "client, streams unix": _connections(functools.partial(_client, "unix")),
    "add_reader, remove_reader": Workload(_add_reader, 20_000, 1_000),
    "the same with an event": Workload(_add_reader_event, 20_000, 1_000),
    "getaddrinfo, numeric": Workload(_getaddrinfo, 5_000, 500),
    "read pipe": Workload(_read_pipe, 5_000, 500),
    "run_in_executor": Workload(_run_in_executor, 5_000, 500),
}

#: The one that is no coroutine: a loop is made, run and closed.
LOOP = "loop made, run, closed"


def _loops(make: Callable[[], asyncio.AbstractEventLoop], count: int) -> None:
    for _ in range(count):
        loop = make()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


def _main(peer: str, name: str) -> None:
    make = functools.partial(new_event_loop, PEERS[peer])
    if name != LOOP:
        measure(make(), WORKLOADS[name])
        return

    async def loops(count: int) -> None:
        await asyncio.to_thread(_loops, make, count)

    measure(asyncio.new_event_loop(), Workload(loops, 500, 50))


if __name__ == "__main__":
    _main(*sys.argv[1:3])
