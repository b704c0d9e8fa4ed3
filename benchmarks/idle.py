"""Memory per idle connection: how much the server process grows by holding connections that do nothing.

Twice: once they are open, and once each has had one message echoed.  A loop that keeps a receive buffer for
every connection shows it in the second figure at the latest.  The kernel's own memory for a socket is not in
it; that is the same for everybody.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .benchmark import Benchmark, Column
from .echo import echo_server, runs_on, size_text
from .limits import raise_descriptor_limit
from .peers import Peer
from .processes import RunFailed

__all__ = ["IDLE", "TRANSPORTS", "Crowd", "run"]

TRANSPORTS = ("tcp", "tls")

IDLE = Benchmark(
    "idle",
    "Memory per idle connection",
    "KiB (proportional set size) by which the server process grows per connection that has had one echo and then"
    " does nothing.",
    (
        Column("PSS/connection, opened, KiB", "pss_opened", scale=1 / 1024, digits=2),
        Column("after one echo, KiB", "pss_echoed", scale=1 / 1024, digits=2),
        Column("min-max", "pss_echoed", show="spread", scale=1 / 1024, digits=2),
        Column("{baseline} / it", "pss_echoed", show="ratio"),
        Column("RSS/connection, opened, KiB", "rss_opened", scale=1 / 1024, digits=2),
        Column("after one echo, KiB", "rss_echoed", scale=1 / 1024, digits=2),
    ),
    Column("KiB/connection", "pss_echoed", scale=1 / 1024, digits=2),
)

_HOST = "127.0.0.1"
_WARM_CONNECTIONS = 10
#: What goes through the server before the count begins: more than a ring of receive buffers holds.
_WARM_BYTES = 8 * 1024 * 1024
_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Crowd:
    """One case: so many connections in a mode of the echo server, and the bytes that each sends once."""

    mode: str
    transport: str
    connections: int
    size: int

    @property
    def label(self) -> str:
        """Such as ``protocol tcp, 1000 idle after 1 KiB``."""
        return f"{self.mode} {self.transport}, {self.connections} idle after {size_text(self.size)}"

    def takes(self, peer: Peer) -> bool:
        """The server in C is written one way only."""
        if peer.module is None:
            return (self.mode, self.transport) == ("protocol", "tcp")
        return runs_on(self.mode, peer)


def run(crowd: Crowd, peer: Peer) -> dict[str, float]:
    """Bytes per connection (proportional and resident set, opened and after one echo).  Raises RunFailed.

    The server has served some connections and megabytes before the count begins, so what it sets up once is not in it.
    """
    raise_descriptor_limit()
    try:
        with echo_server(peer, crowd.mode, crowd.transport) as (server, _), contextlib.ExitStack() as crowded:
            port = int(server.address)
            tls = _trusting() if crowd.transport == "tls" else None

            def connect(stack: contextlib.ExitStack) -> socket.socket:
                sock = socket.create_connection((_HOST, port), _TIMEOUT_S)
                return stack.enter_context(sock if tls is None else tls.wrap_socket(sock))

            with contextlib.ExitStack() as warm:
                for _ in range(_WARM_CONNECTIONS):
                    client = connect(warm)
                    for _ in range(1 + _WARM_BYTES // _WARM_CONNECTIONS // crowd.size):
                        _echo(client, crowd.size)
            before = _settled(server.pid)
            clients = [connect(crowded) for _ in range(crowd.connections)]
            opened = _settled(server.pid)
            for client in clients:
                _echo(client, crowd.size)
            echoed = _settled(server.pid)
    except OSError as error:
        raise RunFailed(f"an idle connection failed: {error}") from error
    return {
        f"{kind}_{when}": (after[kind] - before[kind]) / crowd.connections
        for when, after in (("opened", opened), ("echoed", echoed))
        for kind in ("rss", "pss")
    }


def _trusting() -> ssl.SSLContext:
    """For a client that takes any certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _echo(client: socket.socket, size: int) -> None:
    client.sendall(bytes(size))
    left = size
    while left:
        received = len(client.recv(left))
        if not received:
            raise ConnectionResetError("the server closed the connection")
        left -= received


def _settled(pid: int) -> dict[str, int]:
    """The memory of a process in bytes once it has stopped changing (the server may still be accepting)."""
    return _until_equal(lambda: _memory(pid))


def _until_equal(read: Callable[[], dict[str, int]]) -> dict[str, int]:
    last = read()
    for _ in range(100):
        time.sleep(0.05)
        now = read()
        if now == last:
            break
        last = now
    return last


def _memory(pid: int) -> dict[str, int]:
    fields = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in ("Rss", "Pss"):
            fields[name.lower()] = int(rest.split()[0]) * 1024
    return fields
