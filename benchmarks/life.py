"""The life of a connection: what it costs to make and to end one, and the small things that are made and dropped."""

from __future__ import annotations

from .benchmark import Benchmark, Column
from .connections import LOOP, WORKLOADS
from .micro import Workload, run_module
from .peers import Peer

__all__ = ["LIFE", "run", "workloads"]

_COST = Column("CPU us/operation", "cpu_ns", scale=1e-3)

LIFE = Benchmark(
    "life",
    "The life of a connection",
    "CPU time of one side per connection that is made, has an echo of 100 bytes and ends, and per operation of the"
    " other rows, in microseconds. The other side is a process of its own that does not count.",
    (
        _COST,
        Column("min-max", "cpu_ns", show="spread", scale=1e-3),
        Column("{baseline} / it", "cpu_ns", show="ratio"),
    ),
    _COST,
)


def workloads() -> list[Workload]:
    """All of them."""
    return [Workload(name) for name in (*WORKLOADS, LOOP)]


def run(workload: Workload, peer: Peer) -> dict[str, float]:
    """One run in a fresh process on the server's core.  Raises RunFailed."""
    return run_module("benchmarks.connections", workload, peer)
