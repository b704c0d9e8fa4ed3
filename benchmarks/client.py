"""The client side of the echo: what one message costs a program that asks, on each loop, of a server in C."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

from .benchmark import Benchmark, Column, Place
from .echo import MODES, Cell, echo_server, runs_on
from .peers import PEERS, Peer
from .processes import CLIENT_CORE, run_pinned

__all__ = ["CLIENT", "MODES", "TRANSPORTS", "Asking", "run"]

#: What the server in C is reached over.
TRANSPORTS = ("tcp", "unix")

_SERVER = PEERS["c-epoll"]
_COST = Column("CPU us/echo", "cpu_us", digits=2)


def _place(label: str) -> Place:
    mode, transport, row = label.split(" ", 2)
    return Place(transport, mode, row)


CLIENT = Benchmark(
    "client",
    "Echo, the client's side",
    "CPU time of the client process per message, in microseconds. Each connection has one message under way; the server"
    " is `c-epoll`, on a core of its own.",
    (
        _COST,
        Column("min-max", "cpu_us", show="spread", digits=2),
        Column("{baseline} / it", "cpu_us", show="ratio"),
        Column("echoes/s", "messages_per_second", digits=0),
    ),
    _COST,
    _place,
)


@dataclass(frozen=True)
class Asking:
    """One case: a cell of the echo grid, seen from its other end."""

    cell: Cell

    @property
    def label(self) -> str:
        """Such as ``streams tcp 10 KiB x 100``."""
        return self.cell.label

    def takes(self, peer: Peer) -> bool:
        """Loops only."""
        return peer.module is not None and runs_on(self.cell.mode, peer)


def run(case: Asking, peer: Peer, seconds: float, *, warmup: float = 0.2) -> dict[str, float]:
    """One run: a fresh server, `warmup` seconds of load, a window of `seconds`.  Raises RunFailed, BuildFailed."""
    cell = case.cell
    command = [sys.executable, "-m", "benchmarks.clients", "--loop", peer.name, "--mode", cell.mode]
    command += ["--size", str(cell.size), "--connections", str(cell.connections)]
    command += ["--warmup", str(warmup), "--seconds", str(seconds)]
    with echo_server(_SERVER, "protocol", cell.transport) as (_, where):
        printed = run_pinned([*command, *where], CLIENT_CORE, warmup + seconds + 40, dict(peer.environment))
    values: dict[str, float] = json.loads(printed)
    return values
