"""Servers: clients that stay, leave and reset in a crowd, factories and protocols that raise, closing in the middle."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import sys
from dataclasses import dataclass
from typing import Any

from .program import Source, pattern
from .stage import Planned, Stage

__all__ = ["make_servers", "play_servers"]


@dataclass
class _Program:
    unix: bool
    backlog: int
    starts_later: bool  # start_serving=False
    #: What awaits the clients, in the order in which they are accepted; the first again after the last.
    welcomes: list[str]
    #: When each client comes (seconds), how it goes, and how many bytes it wants to have back.
    clients: list[tuple[float, str, int]]
    #: Seconds until the server is closed; None: when all clients have gone.
    closes_after: float | None
    #: What is done to the connections that are left when it is closed.
    farewell: str


def make_servers(source: Source) -> _Program:
    """Choose a program."""
    welcomes = [(6, "echo"), (1, "close"), (1, "abort"), (0.5, "fail"), (0.5, "refuse"), (0.1, "close the server")]
    if source.chance(0.4):
        welcomes = welcomes[:1]
    ways = ["talk", "talk", "talk", "abort", "reset", "leave"]

    def client() -> tuple[float, str, int]:
        return source.pick([0, 0, 0.001, 0.01]), source.pick(ways), source.pick([0, 1, 1000, 200_000])

    return _Program(
        unix=source.chance(0.3),
        backlog=source.pick([1, 100]),
        starts_later=source.chance(0.3),
        welcomes=source.several(lambda: source.weighted(welcomes), 1, 5),
        clients=[client() for _ in range(source.pick([1, 3, 10, 40]))],
        closes_after=source.pick([None, None, 0, 0.002, 0.01]),
        farewell=source.pick(["none", "close_clients", "abort_clients"]),
    )


class _Host:
    """Makes the protocols of the server, and counts."""

    def __init__(self, program: _Program, stage: Stage) -> None:
        self.program = program
        self.stage = stage
        self.server: Any = None
        self.welcomed = self.made = self.lost = 0

    def factory(self) -> _Welcome:
        """The protocol of the next client."""
        welcome = self.program.welcomes[self.welcomed % len(self.program.welcomes)]
        self.welcomed += 1
        if welcome == "refuse":
            raise Planned
        return _Welcome(self, welcome)


class _Welcome(asyncio.Protocol):
    def __init__(self, host: _Host, welcome: str) -> None:
        self.host = host
        self.welcome = welcome
        self.calls: list[str] = []

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.host.made += 1
        self.calls.append("made")
        if self.welcome == "close":
            transport.close()
        elif self.welcome == "abort":
            transport.abort()
        elif self.welcome == "fail":
            raise Planned
        elif self.welcome == "close the server":
            self.host.server.close()

    def data_received(self, data: bytes) -> None:
        self.host.stage.check(self.calls == ["made"], f"data after {self.calls}")
        self.transport.write(data)

    def pause_writing(self) -> None:
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.transport.resume_reading()

    def connection_lost(self, exc: BaseException | None) -> None:
        self.host.stage.check(self.calls == ["made"], f"connection_lost after {self.calls}")
        self.host.lost += 1
        self.calls.append("lost")


async def play_servers(program: _Program, stage: Stage) -> None:
    """Play a program."""
    host = _Host(program, stage)
    loop = stage.loop
    options = {"backlog": program.backlog, "start_serving": not program.starts_later}
    if program.unix:
        address: Any = f"\0fuzz-{id(host):x}"
        host.server = await loop.create_unix_server(host.factory, address, **options)
    else:
        host.server = await loop.create_server(host.factory, "127.0.0.1", 0, **options)
        if not host.server.sockets and stage.hard:
            return  # no descriptors were left
        address = host.server.sockets[0].getsockname()
    server = host.server
    stage.check(server.is_serving() is not program.starts_later, "is_serving() before start_serving()")
    await server.start_serving()
    stage.check(server.is_serving(), "is_serving() after start_serving()")
    if program.closes_after is not None:
        loop.call_later(program.closes_after, server.close)
    await stage.together(*(_visit(client, address, stage) for client in program.clients))
    server.close()
    stage.check(not server.is_serving(), "is_serving() after close()")
    if sys.version_info >= (3, 13) and program.farewell != "none":
        getattr(server, program.farewell)()
    await stage.until(lambda: host.made == host.lost, f"connection_lost of all connections of the server: {vars(host)}")
    # Before 3.12.1 asyncio returned at once.
    await stage.within(server.wait_closed(), "wait_closed()")
    stage.check(await _is_refused(address, stage), "a closed server takes a connection")
    if program.welcomes == ["echo"] and program.closes_after is None and not stage.hard:
        stage.check(host.made == len(program.clients), f"{host.made} of {len(program.clients)} clients were welcomed")


async def _visit(client: tuple[float, str, int], address: Any, stage: Stage) -> None:
    """One client's visit; whatever it gets back has to be what it has sent."""
    seconds, way, size = client
    loop = stage.loop
    await asyncio.sleep(seconds)
    with contextlib.suppress(OSError), _socket_for(address) as sock:
        await asyncio.wait_for(loop.sock_connect(sock, address), 5)
        if way == "leave":
            return
        if way == "reset":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return
        sending = loop.create_task(loop.sock_sendall(sock, pattern(0, size)))
        got = 0
        try:
            while way == "talk" and got < size:
                # A server that is closed meanwhile leaves some of its clients without an answer.
                data = await asyncio.wait_for(loop.sock_recv(sock, 65_536), 0.5)
                stage.check(data == pattern(got, len(data)), f"a client got wrong bytes at {got}")
                got += len(data)
                if not data:
                    break
        except TimeoutError:
            pass
        finally:
            sending.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await sending


def _socket_for(address: Any) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
    sock.setblocking(False)
    return sock


async def _is_refused(address: Any, stage: Stage) -> bool:
    with _socket_for(address) as sock:
        try:
            await asyncio.wait_for(stage.loop.sock_connect(sock, address), 5)
        except OSError as exc:
            if not (stage.hard or isinstance(exc, ConnectionRefusedError)):
                raise
            return True
        # A connection to an own port that is free may be to oneself.
        return not isinstance(address, str) and sock.getsockname() == sock.getpeername()
