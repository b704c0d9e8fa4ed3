"""What an accept gives: a socket and an address as those of ``socket.accept``, on every family of connections."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import iocp_loop
from iocp_loop.operations import AcceptStream

Loop = iocp_loop.IocpEventLoop

UNIX = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="this Python has no UNIX sockets")
ABSTRACT = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has abstract names")

#: The address of the listener, and that of the client, None for one without; ``*`` is a new directory.
WAYS = [
    pytest.param(socket.AF_INET, ("127.0.0.1", 0), ("127.0.0.1", 0), id="IPv4"),
    pytest.param(socket.AF_INET6, ("::1", 0), ("::1", 0), id="IPv6"),
    pytest.param(getattr(socket, "AF_UNIX", None), "*/server", None, id="unnamed", marks=UNIX),
    pytest.param(getattr(socket, "AF_UNIX", None), "*/server", "*/client", id="named", marks=UNIX),
    pytest.param(getattr(socket, "AF_UNIX", None), "*/server", "\0iocp_loop-%d", id="abstract", marks=[UNIX, ABSTRACT]),
]


@contextlib.contextmanager
def ends(family: int, listens: Any, calls: Any, directory: Path) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A listener and a client that has called it."""

    def bind(sock: socket.socket, address: Any) -> None:
        if isinstance(address, str):
            address = address.replace("*", str(directory)).replace("%d", str(os.getpid()))
        sock.bind(address)

    with socket.socket(family) as listener, socket.socket(family) as client:
        try:
            bind(listener, listens)
        except OSError as error:
            pytest.skip(f"this system can't bind that: {error}")
        listener.listen()
        listener.setblocking(False)
        if calls is not None:
            bind(client, calls)
        client.connect(listener.getsockname())
        yield listener, client


@pytest.mark.parametrize(("family", "listens", "calls"), WAYS)
async def test_an_accepted_socket_is_as_that_of_the_socket_module(
    loop: Loop, family: int, listens: object, calls: object, tmp_path: Path
) -> None:
    with ends(family, listens, calls, tmp_path) as (listener, client):
        conn, address = await loop._proactor.accept(listener)
        with conn:
            assert address == conn.getpeername() == client.getsockname()
            assert type(address) is type(conn.getpeername())
            assert (conn.family, conn.type, conn.proto) == (listener.family, listener.type, listener.proto)
            assert conn.gettimeout() == 0
            assert not conn.get_inheritable()
            if sys.platform != "win32":  # there nobody tells
                assert not os.get_blocking(conn.fileno())
            assert conn.getsockname() == listener.getsockname()
            client.send(b"data")
            assert await loop.sock_recv(conn, 10) == b"data"
        assert conn.fileno() == -1


async def test_a_listener_of_ones_own_class_accepts_by_its_method(loop: Loop) -> None:
    class Listener(socket.socket):
        def accept(self) -> tuple[socket.socket, object]:
            conn, _ = super().accept()
            return conn, "mine"

    if loop.driver == "iocp":
        pytest.skip("the system accepts, by no method")
    with Listener() as listener, socket.socket() as client:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)
        client.connect(listener.getsockname())
        conn, address = await loop._proactor.accept(listener)
        conn.close()
        assert address == "mine"


async def test_an_accepted_socket_is_audited_as_any_other(loop: Loop, tmp_path: Path) -> None:
    seen: list[tuple[Any, ...]] = []
    listening = True

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if listening and event == "socket.__new__":
            seen.append(arguments)

    with ends(socket.AF_INET, ("127.0.0.1", 0), None, tmp_path) as (listener, _):
        sys.addaudithook(audit)  # there is no way to take it away
        try:
            conn, _ = await loop._proactor.accept(listener)
        finally:
            listening = False
        with conn:
            assert [(sock is conn, *rest) for sock, *rest in seen] == [
                (True, socket.AF_INET, socket.SOCK_STREAM, listener.proto)
            ]
            assert conn.gettimeout() == 0


@pytest.mark.skipif(sys.platform == "win32", reason="accepts are outstanding there, and nothing is tried")
async def test_connections_that_come_one_by_one_take_one_accept_each(loop: Loop) -> None:
    """One that finds nothing forgets how many the listener has got before."""

    async def serve(reader: Any, writer: Any) -> None:
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    [op] = [op for op in loop._proactor.in_flight.values() if isinstance(op, AcceptStream)]
    for _ in range(10):
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        assert await reader.read() == b""
        assert op.driver_data is not None
        writer.close()
        await asyncio.sleep(0.01)
    server.close()
