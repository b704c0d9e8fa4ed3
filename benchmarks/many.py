"""Many connections: whether an echo costs more when ten thousand connections are busy than when a hundred are."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

from .benchmark import Benchmark, Column
from .echo import Cell, measure
from .peers import Peer

__all__ = ["MANY", "Growth", "missing", "run"]

#: Descriptors that a server or the client needs apart from those of its connections.
_SPARE = 100
#: Enough for every connection of the many to have had its turn before the window opens.
_WARMUP_S = 1.0

_COST = Column("CPU us/echo, many", "cpu_us", digits=2)

MANY = Benchmark(
    "many",
    "Many connections",
    "CPU time of the server process per message, in microseconds, with ten thousand connections that each have one"
    " message under way. Growth is that over the cost with a hundred, of the same loop in the same round.",
    (
        Column("CPU us/echo, few", "cpu_us_few", digits=2),
        _COST,
        Column("min-max", "cpu_us", show="spread", digits=2),
        Column("growth", "growth", digits=2),
        Column("{baseline} / it", "cpu_us", show="ratio"),
        Column("echoes/s, many", "messages_per_second", digits=0),
        Column("p99 us, many", "p99_us", digits=0),
    ),
    _COST,
)


@dataclass(frozen=True)
class Growth:
    """One case: a cell with many connections, and how many are few."""

    cell: Cell
    few: int

    @property
    def label(self) -> str:
        """Such as ``protocol tcp 1 KiB x 10000 after x 100``."""
        return f"{self.cell.label} after x {self.few}"

    def takes(self, peer: Peer) -> bool:
        """As the cell does."""
        return self.cell.takes(peer)


def missing(connections: int) -> str | None:
    """Why so many connections are not possible here, or None."""
    if sys.platform == "win32":
        return None
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and most < connections + _SPARE:
        return f"a process may open {most} files only (ulimit -Hn)"
    return None


def run(case: Growth, peer: Peer, seconds: float) -> dict[str, float]:
    """The few, then the many, each with a fresh server.  Raises RunFailed."""
    few = measure(replace(case.cell, connections=case.few), peer, seconds)
    values = measure(case.cell, peer, seconds, warmup=_WARMUP_S)
    if "cpu_us" in few and "cpu_us" in values:
        values |= {"cpu_us_few": few["cpu_us"], "growth": values["cpu_us"] / few["cpu_us"]}
    return values
