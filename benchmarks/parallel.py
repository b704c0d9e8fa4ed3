"""Threads of one process, a loop in each, beside one thread: what an echo costs, and how much more gets done."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

from .benchmark import Benchmark, Column
from .crews import RAW
from .echo import MODES as ECHO_MODES
from .echo import runs_on, size_text
from .peers import Peer
from .processes import run_pinned

__all__ = ["MODES", "PARALLEL", "Crew", "run"]

#: How the threads are written: loops whose servers are written as for echo, or workers on one CompletionPort.
MODES = (*ECHO_MODES, RAW)

_GAIN = Column("gain", "gain", digits=2)

PARALLEL = Benchmark(
    "parallel",
    "Threads in one process",
    "CPU time of the threads per echo, in microseconds, both ends of the connection included; busy is the share of the"
    " threads' time, without that in which they had no core, in which they ran. Gain: how many times the echoes of one"
    " thread so many threads manage if each has a core, that is threads x CPU / CPU x busy / busy; so are the"
    " echoes/s of all threads.",
    (
        Column("CPU us/echo, 1 thread", "cpu_us_1", digits=2),
        Column("CPU us/echo", "cpu_us", digits=2),
        Column("busy", "busy", digits=2),
        _GAIN,
        Column("min-max", "gain", show="spread", digits=2),
        Column("{baseline} / it", "cpu_us", show="ratio"),
        Column("echoes/s", "rate", digits=0),
    ),
    _GAIN,
)


@dataclass(frozen=True)
class Crew:
    """One case; for each thread so many connections, with one message of `size` bytes under way on each."""

    mode: str
    threads: int
    size: int
    connections: int

    @property
    def label(self) -> str:
        """Such as ``protocol 1 KiB x 50, 2 threads``."""
        return f"{self.mode} {size_text(self.size)} x {self.connections}, {self.threads} threads"

    def takes(self, peer: Peer) -> bool:
        """Loops only, and where there is a port those that have one."""
        return peer.module is not None and (self.mode != RAW or peer.module == "iocp_loop") and runs_on(self.mode, peer)


def run(case: Crew, peer: Peer, seconds: float) -> dict[str, float]:
    """One thread, then so many, each in a fresh process on all cores.  Raises RunFailed."""
    one, values = (_run(case, peer, threads, seconds) for threads in (1, case.threads))
    return {**values, "cpu_us_1": one["cpu_us"], "gain": values["rate"] / one["rate"]}


def _run(case: Crew, peer: Peer, threads: int, seconds: float) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.crews", peer.name, case.mode]
    command += map(str, (threads, case.size, case.connections, seconds))
    values: dict[str, float] = json.loads(run_pinned(command, None, seconds + 40, dict(peer.environment)))
    return values
