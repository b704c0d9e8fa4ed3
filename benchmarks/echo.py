"""The echo benchmark: what one message costs the server, over a grid of modes, sizes and connections."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .native import build
from .peers import Peer
from .processes import CLIENT_CORE, Server, run_pinned, serving
from .report import Column

__all__ = ["COLUMNS", "MODES", "TRANSPORTS", "Cell", "echo_server", "grid", "run", "size_text"]

#: How the server is written (servers/echo_server.py), and over what it is reached.
MODES = ("protocol", "buffered", "streams", "sock")
TRANSPORTS = ("tcp", "unix")

COLUMNS = (
    Column("CPU us/echo", "cpu_us", digits=2),
    Column("min-max", "cpu_us", show="spread", digits=2),
    Column("{baseline} / it", "cpu_us", show="ratio"),
    Column("echoes/s", "messages_per_second", digits=0),
    Column("p50 us", "p50_us", digits=0),
    Column("p99 us", "p99_us", digits=0),
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
        """The server in C is written one way only; it stands beside the protocols."""
        return peer.module is not None or self.mode == "protocol"


def grid(
    modes: Sequence[str], transports: Sequence[str], sizes: Sequence[int], connections: Sequence[int]
) -> list[Cell]:
    """Every combination, in the order given."""
    return [
        Cell(mode, transport, size, count)
        for transport in transports
        for mode in modes
        for size in sizes
        for count in connections
    ]


@contextlib.contextmanager
def echo_server(peer: Peer, mode: str, transport: str) -> Iterator[tuple[Server, list[str]]]:
    """A server of `peer` on its core, and the arguments with which the load client finds it."""
    command = [str(build("epoll_server"))]
    if peer.module is not None:
        command = [
            sys.executable,
            "-m",
            "benchmarks.servers.echo_server",
            "--loop",
            peer.name,
            "--mode",
            mode,
        ]
    with tempfile.TemporaryDirectory() as directory:
        if transport == "unix":
            command += ["--unix", str(Path(directory) / "echo")]
        with serving(command) as server:
            yield server, ["--unix" if transport == "unix" else "--port", server.address]


def run(cell: Cell, peer: Peer, seconds: float) -> dict[str, float]:
    """One run: a fresh server, a warm-up of a fifth of a second, and a measured window of so many seconds.

    Raises RunFailed if either side fails, BuildFailed if the programs in C can't be built.
    """
    client = str(build("echo_client"))
    with echo_server(peer, cell.mode, cell.transport) as (server, where):
        load = ["--connections", str(cell.connections), "--size", str(cell.size)]
        window = ["--seconds", str(seconds), "--watch", str(server.pid)]
        printed = run_pinned([client, *where, *load, *window], CLIENT_CORE, timeout_s=seconds + 30)
    values: dict[str, float] = json.loads(printed)
    if values["messages"]:
        values["cpu_us"] = values["server_cpu_seconds"] / values["messages"] * 1e6
    return values
