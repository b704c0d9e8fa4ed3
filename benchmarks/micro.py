"""The micro benchmarks: what the loop itself costs where nothing is sent: callbacks, timers, tasks, wakes, children."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

from .benchmark import Benchmark, Column
from .callbacks import WORKLOADS
from .peers import Peer
from .processes import SERVER_CORE, run_pinned

__all__ = ["MICRO", "Workload", "run", "run_module", "workloads"]

_COST = Column("CPU ns/operation", "cpu_ns", digits=0)

MICRO = Benchmark(
    "micro",
    "Callbacks, timers, tasks, threads, children",
    "CPU time per operation, in nanoseconds. A wake-up is the way from a thread into the loop"
    " (`call_soon_threadsafe`) and back; a subprocess is spawned and waited for, its own time not counted.",
    (
        _COST,
        Column("min-max", "cpu_ns", show="spread", digits=0),
        Column("{baseline} / it", "cpu_ns", show="ratio"),
        Column("elapsed ns/operation", "elapsed_ns", digits=0),
    ),
    _COST,
)


@dataclass(frozen=True)
class Workload:
    """One case: a name in the ``WORKLOADS`` of its module."""

    label: str

    def takes(self, peer: Peer) -> bool:
        """Loops only."""
        return peer.module is not None


def workloads() -> list[Workload]:
    """All of them."""
    return [Workload(name) for name in WORKLOADS]


def run(workload: Workload, peer: Peer) -> dict[str, float]:
    """One run in a fresh process on the server's core.  Raises RunFailed."""
    return run_module("benchmarks.callbacks", workload, peer)


def run_module(module: str, workload: Workload, peer: Peer) -> dict[str, float]:
    """Run a workload of `module`, which prints its figures.  Raises RunFailed."""
    command = [sys.executable, "-m", module, peer.name, workload.label]
    printed = run_pinned(command, SERVER_CORE, timeout_s=120, environment=dict(peer.environment))
    values: dict[str, float] = json.loads(printed)
    return values
