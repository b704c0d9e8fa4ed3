"""Latency beside a busy thread: how long one small message takes while the executor computes in Python.

The loop shares the interpreter lock with the thread.  Each time it lets the lock go, for a system call for
instance, it may have to wait a whole switch interval (5 ms) until it has it again.
"""

from __future__ import annotations

from dataclasses import dataclass

from .benchmark import Benchmark, Column
from .echo import Cell, measure, runs_on
from .peers import Peer

__all__ = ["CORES", "LATENCY", "Neighbour", "run"]

CORES = ("all", "one")

_SIZE = 100
_COST = Column("mean us", "mean_us", digits=1)

LATENCY = Benchmark(
    "latency",
    "Latency beside a busy thread",
    "Mean time of an echo of 100 bytes on one connection, in microseconds, with so many threads that compute in Python"
    " in the loop's executor.",
    (
        _COST,
        Column("min-max", "mean_us", show="spread", digits=1),
        Column("{baseline} / it", "mean_us", show="ratio"),
        Column("p50 us", "p50_us", digits=0),
        Column("p99 us", "p99_us", digits=0),
        Column("echoes/s", "messages_per_second", digits=0),
    ),
    _COST,
)


@dataclass(frozen=True)
class Neighbour:
    """One case: the mode of the echo server, how many threads are busy beside its loop, and on how many CORES."""

    mode: str
    busy: int
    cores: str

    @property
    def label(self) -> str:
        """Such as ``streams, 1 busy``."""
        return f"{self.mode}, {self.busy} busy" + (", one core" if self.busy and self.cores == "one" else "")

    def takes(self, peer: Peer) -> bool:
        """The servers in C have no interpreter to share: they stand beside the loop that has it for itself."""
        if peer.module is None:
            return self.mode == "protocol" and not self.busy
        return runs_on(self.mode, peer)


def run(case: Neighbour, peer: Peer, seconds: float) -> dict[str, float]:
    """One run.  Raises RunFailed."""
    server = ["--busy", str(case.busy)] if case.busy else []
    cell = Cell(case.mode, "tcp", _SIZE, 1)
    return measure(cell, peer, seconds, server=server, pinned=case.cores == "one" or not case.busy)
