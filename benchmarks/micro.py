"""The micro benchmarks: what the loop itself costs where nothing is sent: callbacks, timers and tasks."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from .callbacks import WORKLOADS
from .peers import Peer
from .processes import SERVER_CORE, run_pinned
from .report import Column

__all__ = ["COLUMNS", "Workload", "run", "workloads"]

COLUMNS = (
    Column("CPU ns/operation", "cpu_ns", digits=0),
    Column("min-max", "cpu_ns", show="spread", digits=0),
    Column("{baseline} / it", "cpu_ns", show="ratio"),
)


@dataclass(frozen=True)
class Workload:
    """One case: a name in ``callbacks.WORKLOADS``."""

    label: str

    def takes(self, peer: Peer) -> bool:
        """Loops only."""
        return peer.module is not None


def workloads() -> list[Workload]:
    """All of them."""
    return [Workload(name) for name in WORKLOADS]


def run(workload: Workload, peer: Peer) -> dict[str, float]:
    """One run in a fresh process on the server's core.  Raises RunFailed."""
    command = [sys.executable, "-m", "benchmarks.callbacks", peer.name, workload.label]
    return {"cpu_ns": float(run_pinned(command, SERVER_CORE, timeout_s=60))}
