"""The echo benchmark: what one message costs the server, over a grid of modes, transports, sizes and connections."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .benchmark import Benchmark, Column, Place
from .certificate import make_certificate
from .native import BuildFailed, build
from .peers import Peer
from .processes import CLIENT_CORE, Server, run_pinned, serving

__all__ = [
    "ECHO",
    "MODES",
    "TRANSPORTS",
    "Cell",
    "client",
    "echo_server",
    "grid",
    "measure",
    "missing",
    "runs_on",
    "size_text",
]

#: How the server is written (servers/echo_server.py), and over what it is reached.
MODES = ("protocol", "buffered", "streams", "named-streams", "sock")
TRANSPORTS = ("tcp", "unix", "tls", "udp")

#: What there is no such thing as: sock_* calls know nothing of TLS, and datagrams have a protocol only.
_NOT_OVER = {"tls": ("sock",), "udp": ("buffered", "streams", "named-streams", "sock")}
#: Bytes of the greatest datagram over IPv4.
_DATAGRAM = 65_507

_COST = Column("CPU us/echo", "cpu_us", digits=2)


def _place(label: str) -> Place:
    mode, transport, row = label.split(" ", 2)
    return Place(transport, mode, row)


ECHO = Benchmark(
    "echo",
    "Echo",
    "CPU time of the server process per message, in microseconds. Each connection has one message under way.",
    (
        _COST,
        Column("min-max", "cpu_us", show="spread", digits=2),
        Column("{baseline} / it", "cpu_us", show="ratio"),
        Column("echoes/s", "messages_per_second", digits=0),
        Column("p50 us", "p50_us", digits=0),
        Column("p99 us", "p99_us", digits=0),
    ),
    _COST,
    _place,
)


def size_text(size: int) -> str:
    """A size in bytes as it is read: ``1 KiB``, ``100 B``."""
    return f"{size // 1024} KiB" if size % 1024 == 0 else f"{size} B"


@dataclass(frozen=True)
class Cell:
    """One case: sizes in bytes."""

    mode: str
    transport: str
    size: int
    connections: int

    @property
    def label(self) -> str:
        """Such as ``streams tcp 10 KiB x 100``."""
        return f"{self.mode} {self.transport} {size_text(self.size)} x {self.connections}"

    def takes(self, peer: Peer) -> bool:
        """A server in C is written one way only; it stands beside the protocols."""
        if peer.module is None:
            return self.mode == "protocol" and self.transport in peer.transports
        return runs_on(self.mode, peer)


def runs_on(mode: str, peer: Peer) -> bool:
    """Whether a server of this mode can run on a loop: the streams by name are for those of this package."""
    return mode != "named-streams" or peer.module == "iocp_loop"


def grid(
    modes: Sequence[str], transports: Sequence[str], sizes: Sequence[int], connections: Sequence[int]
) -> list[Cell]:
    """Every combination that there is, in the order given."""
    return [
        Cell(mode, transport, size, count)
        for transport in transports
        for mode in modes
        if mode not in _NOT_OVER.get(transport, ())
        for size in sizes
        if transport != "udp" or size <= _DATAGRAM
        for count in connections
    ]


def missing(transport: str) -> str | None:
    """Why nothing can be measured over `transport` here, or None."""
    if transport != "tls":
        return None
    if shutil.which("openssl") is None:
        return "the command openssl is not there"
    try:
        build("echo_client", tls=True)
    except BuildFailed as failure:
        return f"the client can't be built with OpenSSL: {failure}"
    return None


@contextlib.contextmanager
def echo_server(
    peer: Peer, mode: str, transport: str, *more: str, pinned: bool = True
) -> Iterator[tuple[Server, list[str]]]:
    """A server of `peer`, on its core or all, and the arguments with which the load client finds it."""
    command = [sys.executable, "-m", "benchmarks.servers.echo_server", "--loop", peer.name, "--mode", mode, *more]
    if peer.program is not None:
        command = [str(build(peer.program))]
    with tempfile.TemporaryDirectory() as directory:
        if transport == "unix":
            command += ["--unix", str(Path(directory) / "echo")]
        elif transport == "udp":
            command += ["--udp"]
        elif transport == "tls":
            command += ["--tls", *map(str, make_certificate(Path(directory)))]
        with serving(command, dict(peer.environment), pinned=pinned) as server:
            where = ["--unix" if transport == "unix" else "--port", server.address]
            yield server, [*where, *([f"--{transport}"] if transport in ("tls", "udp") else [])]


def client(transport: str) -> str:
    """The load client for a transport.  Raises BuildFailed."""
    return str(build("echo_client", tls=transport == "tls"))


def measure(
    cell: Cell,
    peer: Peer,
    seconds: float,
    *,
    warmup: float = 0.2,
    server: Sequence[str] = (),
    pinned: bool = True,
) -> dict[str, float]:
    """A fresh server with these further arguments, `warmup` seconds of load, and a measured window of `seconds`.

    The client has its core; so has the server if it is `pinned`.  Raises RunFailed if either side fails, BuildFailed if
    the programs in C can't be built.
    """
    program = client(cell.transport)
    with echo_server(peer, cell.mode, cell.transport, *server, pinned=pinned) as (running, where):
        load = ["--connections", str(cell.connections), "--size", str(cell.size)]
        window = ["--warmup", str(warmup), "--seconds", str(seconds), "--watch", str(running.pid)]
        printed = run_pinned([program, *where, *load, *window], CLIENT_CORE, timeout_s=warmup + seconds + 40)
    values: dict[str, float] = json.loads(printed)
    if values["messages"]:
        values["cpu_us"] = values["server_cpu_seconds"] / values["messages"] * 1e6
    return values
