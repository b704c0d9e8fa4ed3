"""TLS under test: a client without a loop, and protocols that keep what they get."""

from __future__ import annotations

import asyncio
import functools
import socket
import ssl
from typing import Any

import pytest

from .certificates import client_context
from .support import Recorder, until

#: The plain text of a TLS record, in bytes, at most.
RECORD = 16 * 1024


_peers_context = functools.cache(client_context)


class Peer:
    """A client without a loop: a blocking socket, and TLS whose records can be taken before they are sent."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = _peers_context().wrap_bio(self._incoming, self._outgoing, server_hostname="localhost")

    def handshake(self) -> None:
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self.sock.sendall(self._outgoing.read())
                self._incoming.write(self.sock.recv(1 << 16))
            else:
                self.sock.sendall(self._outgoing.read())
                return

    def records(self, data: bytes) -> bytes:
        """`data`, encrypted."""
        self._tls.write(data)
        return self._outgoing.read()

    def goodbye(self) -> bytes:
        """The record that ends the connection."""
        with pytest.raises(ssl.SSLWantReadError):
            self._tls.unwrap()
        return self._outgoing.read()

    def read(self, count: int) -> bytes:
        """So many bytes, decrypted; fewer at the end."""
        got = bytearray()
        while len(got) < count:
            try:
                more = self._tls.read(count - len(got))
            except ssl.SSLWantReadError:
                data = self.sock.recv(1 << 16)
                if not data:
                    break
                self._incoming.write(data)
            else:
                if not more:
                    break
                got += more
        return bytes(got)


class Pieces(Recorder):
    """Keeps the pieces apart in which data came."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[bytes] = []

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        assert type(data) is bytes
        self.pieces.append(data)


class Buffered(asyncio.BufferedProtocol):
    """A BufferedProtocol whose buffer takes `size` bytes."""

    def __init__(self, size: int) -> None:
        self.buffer = bytearray(size)
        self.data = bytearray()
        self.hints: list[int] = []
        self.finished = False
        self.lost: Exception | None = None
        self.ended = False

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def get_buffer(self, sizehint: int) -> bytearray:
        self.hints.append(sizehint)
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.data += self.buffer[:nbytes]

    def eof_received(self) -> None:
        self.ended = True

    def connection_lost(self, exc: Exception | None) -> None:
        self.finished = True
        self.lost = exc


async def finish(protocol: Any, peer: Peer) -> None:
    protocol.transport.abort()
    await until(lambda: protocol.finished)
    peer.sock.close()
