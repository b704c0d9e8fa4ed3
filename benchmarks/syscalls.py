"""System calls per message: strace counts those of the server while the client sends so many messages.

Under strace a server is many times slower, so its CPU is of no interest here; and as its clients are always
done before it comes back to look, it finds more to do in each turn than it would by itself.
"""

from __future__ import annotations

import json
import select
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .benchmark import Benchmark, Column
from .echo import Cell, client, echo_server
from .peers import Peer
from .processes import CLIENT_CORE, RunFailed, talking

__all__ = ["SYSCALLS", "Traced", "counts", "missing", "run"]

_TIMEOUT_S = 60.0

#: What a call is for, by its name; all others are "other".
_KINDS = {
    "waits": ("epoll_wait", "epoll_pwait", "epoll_pwait2", "io_uring_enter", "poll", "ppoll", "select", "pselect6"),
    "receives": ("read", "readv", "recvfrom", "recvmsg", "recvmmsg"),
    "sends": ("write", "writev", "sendto", "sendmsg", "sendmmsg"),
}

_COST = Column("calls/message", "calls", digits=2)

SYSCALLS = Benchmark(
    "syscalls",
    "System calls",
    "System calls of the server per message, counted by strace.",
    (
        _COST,
        Column("{baseline} / it", "calls", show="ratio"),
        Column("waits", "waits", digits=3),
        Column("receives", "receives", digits=3),
        Column("sends", "sends", digits=3),
        Column("other", "other", digits=3),
    ),
    _COST,
)


@dataclass(frozen=True)
class Traced:
    """One case: a cell of the echo benchmark."""

    cell: Cell

    @property
    def label(self) -> str:
        """As the cell's."""
        return self.cell.label

    def takes(self, peer: Peer) -> bool:
        """As the cell does."""
        return self.cell.takes(peer)


def missing() -> str | None:
    """Why nothing can be counted here, or None."""
    strace = shutil.which("strace")
    if strace is None:
        return "strace is not there"
    tried = subprocess.run([strace, "-c", "-o", "/dev/null", "true"], capture_output=True, text=True)
    if tried.returncode:
        return f"strace may not trace here: {tried.stderr.strip()}"
    return None


def counts(table: str) -> dict[str, int]:
    """Calls by name, from what ``strace -c`` leaves behind."""
    return dict(_rows(table))


def _rows(table: str) -> Iterator[tuple[str, int]]:
    """A row: % time, seconds, usecs/call, calls, errors (or nothing), name.  The last of them is the total."""
    for line in table.splitlines():
        fields = line.split()
        if len(fields) in (5, 6) and fields[3].isdecimal() and fields[-1] != "total":
            yield fields[-1], int(fields[3])


def run(case: Traced, peer: Peer, messages: int) -> dict[str, float]:
    """One run of so many messages with a fresh server, its connections open before strace comes.  Raises RunFailed."""
    cell = case.cell
    with echo_server(peer, cell.mode, cell.transport) as (server, where), tempfile.NamedTemporaryFile("r") as found:
        load = ["--connections", str(cell.connections), "--size", str(cell.size)]
        window = ["--warmup", "0.01", "--messages", str(messages), "--hold"]
        with talking([client(cell.transport), *where, *load, *window], CLIENT_CORE) as loading:
            _line(loading, "stdout")
            tracer = ["strace", "-c", "-f", "-o", found.name, "-p", str(server.pid)]
            with talking(tracer, CLIENT_CORE) as tracing:
                _line(tracing, "stderr")  # that it is attached
                assert loading.stdin is not None  # for the type checker: talking() makes pipes
                loading.stdin.write("\n")
                loading.stdin.flush()
                values: dict[str, float] = json.loads(_line(loading, "stdout"))
                tracing.send_signal(signal.SIGINT)
                tracing.wait(_TIMEOUT_S)
        calls = counts(Path(found.name).read_text())
    handled = values["messages"] + values["warmup_messages"]
    kinds = {kind: sum(calls.get(name, 0) for name in names) for kind, names in _KINDS.items()}
    kinds["other"] = sum(calls.values()) - sum(kinds.values())
    per_message = {name: count / handled for name, count in {**kinds, **calls}.items()}
    return {"calls": sum(calls.values()) / handled, "messages": handled, **per_message}


def _line(process: subprocess.Popen[str], name: str) -> str:
    """The next line that a process says.  Raises RunFailed if it ends instead, or says nothing."""
    pipe = process.stdout if name == "stdout" else process.stderr
    assert pipe is not None  # for the type checker, as above
    readable, _, _ = select.select([pipe], [], [], _TIMEOUT_S)
    line = pipe.readline() if readable else ""
    if not line:
        if process.poll() is None:
            raise RunFailed(f"nothing was said for {_TIMEOUT_S:.0f} s")
        assert process.stderr is not None
        raise RunFailed(process.stderr.read().strip() or f"exit status {process.returncode}")
    return line
