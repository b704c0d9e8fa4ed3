"""TLS: the programs of transports.py above it, connections that change to it, and handshakes that come to nothing."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from dataclasses import dataclass
from typing import Any

from .. import certificates
from .program import Source, pattern
from .stage import LIMIT, Planned, Stage, describe, stream_pair
from .transports import Script, Side, make_script, play_pair

__all__ = ["make_tls", "play_tls"]


@dataclass
class _Pair:
    """Two sides as in transports.py."""

    way: str
    one: Script
    other: Script


@dataclass
class _Calm:
    """Both send so much, echo nothing, and close when they have got it all."""

    buffered: bool
    upgrade: bool  # start_tls on a connection that has carried something
    sizes: list[int]  # of the pieces, there and back
    closes_first: str


@dataclass
class _Spoiled:
    """A handshake that comes to nothing."""

    how: str  # what the client does: "garbage", "silence", "leave", "half", "distrust"
    cancel_after: float


Part = _Pair | _Calm | _Spoiled


def make_tls(source: Source) -> list[Part]:
    """Choose some connections."""

    def part() -> Part:
        kind = source.weighted([(3, "pair"), (2, "calm"), (1, "spoiled")])
        if kind == "pair":
            way = source.pick(["unix pair", "tcp pair", "tcp", "unix"])
            return _Pair(way, make_script(source, tls=True), make_script(source, tls=True))
        if kind == "calm":
            sizes = source.several(lambda: source.pick([1, 100, 16_384, 100_000, 700_000]), 1, 5)
            return _Calm(source.chance(0.5), source.chance(0.5), sizes, source.pick(["client", "server", "both"]))
        how = source.pick(["garbage", "silence", "leave", "half", "distrust"])
        return _Spoiled(how, source.pick([0, 0.001, 0.01]))

    return source.several(part, 1, source.pick([1, 2, 5]))


async def play_tls(program: list[Part], stage: Stage) -> None:
    """Play them all at once."""
    plays: dict[type, Any] = {_Pair: _play_pair, _Calm: _play_calm, _Spoiled: _play_spoiled}
    await stage.together(*(plays[type(part)](part, stage, str(number)) for number, part in enumerate(program)))


def _options(stage: Stage) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of the client and of the server."""
    limits = {"ssl_handshake_timeout": LIMIT, "ssl_shutdown_timeout": 1.0}
    client = {"ssl": certificates.client_context(), "server_hostname": "localhost"}
    return client | limits, {"ssl": certificates.server_context()} | limits


async def _play_pair(pair: _Pair, stage: Stage, number: str) -> None:
    one = Side(pair.one, stage, f"client {number}", tls=True)
    other = Side(pair.other, stage, f"server {number}", tls=True)
    await play_pair(one, other, pair.way, stage, *_options(stage))


# -- both get all that was sent --------------------------------------------------------------------


class _Sink(asyncio.Protocol):
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.got = bytearray()
        self.calls: list[str] = []
        self.over: asyncio.Future[None] = loop.create_future()
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self.calls.append("made")
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.got += data

    def eof_received(self) -> None:
        self.calls.append("eof")

    def connection_lost(self, exc: BaseException | None) -> None:
        self.calls.append(f"lost({describe(exc)})")
        self.over.set_result(None)


class _BufferedSink(_Sink, asyncio.BufferedProtocol):
    def get_buffer(self, sizehint: int) -> bytearray:
        self.buffer = bytearray(1000)
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.got += self.buffer[:nbytes]


def _sink(buffered: bool, loop: asyncio.AbstractEventLoop) -> Any:
    if not buffered:
        return _Sink(loop)
    # A BufferedProtocol that is no Protocol as well: asyncio asks for the class.
    return type("Sink", (asyncio.BufferedProtocol,), dict(vars(_Sink)) | dict(vars(_BufferedSink)))(loop)


async def _play_calm(calm: _Calm, stage: Stage, number: str) -> None:
    loop = stage.loop
    ours, theirs = stream_pair(unix=False)
    one, other = _sink(calm.buffered, loop), _sink(calm.buffered, loop)
    client, server = _options(stage)
    if calm.upgrade:
        await asyncio.gather(
            loop.create_connection(lambda: one, sock=ours), loop.connect_accepted_socket(lambda: other, theirs)
        )
        plain = [one.transport, other.transport]
        client["sslcontext"], server["sslcontext"] = client.pop("ssl"), server.pop("ssl")
        one.transport, other.transport = await asyncio.gather(
            loop.start_tls(plain[0], one, **client), loop.start_tls(plain[1], other, server_side=True, **server)
        )
    else:
        await asyncio.gather(
            loop.create_connection(lambda: one, sock=ours, **client),
            loop.connect_accepted_socket(lambda: other, theirs, **server),
        )
    total = sum(calm.sizes)
    for side in (one, other):
        begin = 0
        for size in calm.sizes:
            side.transport.write(pattern(begin, size))
            begin += size
            await asyncio.sleep(0)
    whole = pattern(0, total)
    await stage.until(lambda: len(one.got) >= total and len(other.got) >= total, "all bytes through TLS")
    stage.check(one.got == whole and other.got == whole, "wrong bytes through TLS")
    for name, side in (("client", one), ("server", other)):
        if calm.closes_first in (name, "both"):
            side.transport.close()
    await stage.within(asyncio.wait([one.over, other.over]), "connection_lost after TLS was closed")
    for name, side in (("client", one), ("server", other)):
        if calm.closes_first == "both":
            side.calls = [call for call in side.calls if call != "eof"]  # whoever hears the other first
        stage.note(f"{name} {number}", f"{len(side.got)} bytes {side.calls}")
    one.transport = other.transport = None


# -- nothing comes of it ---------------------------------------------------------------------------


async def _play_spoiled(spoiled: _Spoiled, stage: Stage, number: str) -> None:
    """The server must neither call its protocol nor report anything, and let go of the socket."""
    loop = stage.loop
    ours, theirs = stream_pair(unix=False)
    sink = _Sink(loop)
    _, server = _options(stage)
    if spoiled.how in ("silence", "half"):
        server["ssl_handshake_timeout"] = 0.05
    accepting = loop.create_task(loop.connect_accepted_socket(lambda: sink, theirs, **server))
    client = loop.create_task(_spoil(spoiled, ours, loop))
    result = (await asyncio.gather(stage.within(accepting, "the end of a handshake"), return_exceptions=True))[0]
    with contextlib.suppress(OSError, asyncio.CancelledError, Planned):
        await client
    ours.close()
    # In TLS 1.3 the server is done before the client has looked at its certificate.
    if spoiled.how != "distrust":
        stage.check(isinstance(result, OSError), f"a spoiled handshake ({spoiled.how}) gave {result!r}")
        stage.check(not sink.calls, f"a spoiled handshake led to {sink.calls}")
        stage.note(f"server {number}", f"{spoiled.how}: {type(result).__name__ if spoiled.how != 'leave' else ''}")
    elif sink.transport is not None:
        await stage.within(asyncio.wait([sink.over]), "connection_lost after an alert")
        sink.transport = None


async def _spoil(spoiled: _Spoiled, sock: socket.socket, loop: Any) -> None:
    if spoiled.how == "garbage":
        await loop.sock_sendall(sock, b"GET / HTTP/1.1\r\n\r\n")
        await asyncio.sleep(spoiled.cancel_after)
    elif spoiled.how == "silence":
        await asyncio.sleep(0.1)
    elif spoiled.how == "leave":
        await asyncio.sleep(spoiled.cancel_after)
    elif spoiled.how == "half":
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        half = certificates.client_context().wrap_bio(incoming, outgoing, server_hostname="localhost")
        with contextlib.suppress(ssl.SSLWantReadError):
            half.do_handshake()
        await loop.sock_sendall(sock, outgoing.read()[:100])
        await asyncio.sleep(0.1)
    else:
        with contextlib.suppress(OSError):
            await loop.create_connection(
                asyncio.Protocol, sock=sock, ssl=ssl.create_default_context(), server_hostname="x"
            )
        return
    sock.close()
