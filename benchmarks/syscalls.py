"""System calls per message: how many the server makes while the client sends so many messages.

perf counts them where it may read the kernel's tracepoints, and costs little.  Elsewhere strace does, under which a
server is many times slower: its client is always done before it comes back to look, so it waits for less, and finds
more to do in each turn, than it would by itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .benchmark import Benchmark, Column
from .echo import Cell, client, echo_server
from .peers import Peer
from .processes import CLIENT_CORE, RunFailed, talking

__all__ = ["SYSCALLS", "TRACERS", "Traced", "missing", "perf_counts", "run", "strace_counts"]

_TIMEOUT_S = 60.0
_ATTACH_TIMEOUT_S = 10.0

#: What a call is for, by its name; all others are "other".
_KINDS = {
    "waits": ("epoll_wait", "epoll_pwait", "epoll_pwait2", "io_uring_enter", "poll", "ppoll", "select", "pselect6"),
    "receives": ("read", "readv", "recvfrom", "recvmsg", "recvmmsg"),
    "sends": ("write", "writev", "sendto", "sendmsg", "sendmmsg"),
}
#: Where the kernel shows its tracepoints, and what perf calls those of all system calls and of one.
_TRACEPOINTS = "/sys/kernel/tracing/events/syscalls"
_ANY, _ONE = "raw_syscalls:sys_enter", "syscalls:sys_enter_"

_COST = Column("calls/message", "calls", digits=2)

SYSCALLS = Benchmark(
    "syscalls",
    "System calls",
    "System calls of the server per message.",
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


def missing(tracer: str) -> str | None:
    """Why `tracer` (perf or strace) can't count here, or None."""
    if shutil.which(tracer) is None:
        return f"{tracer} is not there"
    tried = subprocess.run([*_TRIALS[tracer], "true"], capture_output=True, text=True)
    if tried.returncode:
        return f"{tracer} may not trace here: {(tried.stderr.strip().splitlines() or ['?'])[-1]}"
    return None


def run(case: Traced, peer: Peer, messages: int, tracer: str) -> dict[str, float]:
    """So many messages with a fresh server; its connections are open before it is traced.  Raises RunFailed."""
    cell = case.cell
    with echo_server(peer, cell.mode, cell.transport) as (server, where):
        load = ["--connections", str(cell.connections), "--size", str(cell.size)]
        window = ["--warmup", "0.01", "--messages", str(messages), "--hold"]
        with talking([client(cell.transport), *where, *load, *window], CLIENT_CORE) as loading:
            _line(loading, "stdout")
            with TRACERS[tracer](server.pid) as calls_so_far:
                assert loading.stdin is not None  # for the type checker: talking() makes pipes
                loading.stdin.write("\n")
                loading.stdin.flush()
                values: dict[str, float] = json.loads(_line(loading, "stdout"))
                calls = calls_so_far()
    handled = values["messages"] + values["warmup_messages"]
    total = calls.pop("", 0) or sum(calls.values())
    kinds = {kind: sum(calls.get(name, 0) for name in names) for kind, names in _KINDS.items()}
    # perf lets its counters go one after the other: their sum may be a little more than the total.
    kinds["other"] = max(total - sum(kinds.values()), 0)
    per_message = {name: count / handled for name, count in {**kinds, **calls}.items()}
    return {"calls": total / handled, "messages": handled, **per_message}


# ---------------------------------------------------------------------------------------------------------------------
# The tracers.  Each is attached when its block begins, and gives a function that ends it and tells the calls by name.
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _strace(pid: int) -> Iterator[Callable[[], dict[str, int]]]:
    with tempfile.TemporaryDirectory() as directory:
        found = Path(directory) / "found"
        with talking(["strace", "-c", "-f", "-o", str(found), "-p", str(pid)], CLIENT_CORE) as tracing:
            _line(tracing, "stderr")  # that it is attached
            yield lambda: strace_counts(_ended(tracing, found))


@contextlib.contextmanager
def _perf(pid: int) -> Iterator[Callable[[], dict[str, int]]]:
    """It begins when told so, and says when it has: by two pipes with names, see perf-stat(1)."""
    names = [name for kind in _KINDS.values() for name in kind if os.path.exists(f"{_TRACEPOINTS}/sys_enter_{name}")]
    events = ",".join([_ANY, *(_ONE + name for name in names)])
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        control, answer, found = (Path(directory) / name for name in ("control", "answer", "found"))
        pipes = []
        for pipe in (control, answer):
            os.mkfifo(pipe)
            pipes.append(os.open(pipe, os.O_RDWR))
            stack.callback(os.close, pipes[-1])
        command = ["perf", "stat", "-x", ",", "-D", "-1", "--control", f"fifo:{control},{answer}"]
        command += ["-o", str(found), "-e", events, "-p", str(pid)]
        with talking(command, CLIENT_CORE) as tracing:
            os.write(pipes[0], b"enable\n")
            if not select.select([pipes[1]], [], [], _ATTACH_TIMEOUT_S)[0]:
                raise RunFailed("perf did not begin to count")
            yield lambda: perf_counts(_ended(tracing, found))


def _ended(tracing: subprocess.Popen[str], found: Path) -> str:
    """End a tracer; what it has found."""
    tracing.send_signal(signal.SIGINT)
    try:
        tracing.wait(_ATTACH_TIMEOUT_S)
        return found.read_text()
    except (subprocess.TimeoutExpired, OSError) as error:
        raise RunFailed(f"the tracer left nothing behind: {error}") from error


_TRIALS = {"perf": ["perf", "stat", "-e", _ANY], "strace": ["strace", "-c", "-o", "/dev/null"]}
#: In the order in which they are tried.
TRACERS = {"perf": _perf, "strace": _strace}


def strace_counts(table: str) -> dict[str, int]:
    """Calls by name, from what ``strace -c`` leaves behind.

    A row has % time, seconds, usecs/call, calls, errors (or nothing), name; the last one is the total.
    """
    rows = (line.split() for line in table.splitlines())
    return {row[-1]: int(row[3]) for row in rows if len(row) in (5, 6) and row[3].isdecimal() and row[-1] != "total"}


def perf_counts(table: str) -> dict[str, int]:
    """Calls by name, from what ``perf stat -x ,`` leaves behind: those that were made, and "" with all of them."""
    rows = (line.split(",") for line in table.splitlines())
    return {
        row[2].removeprefix(_ONE) if row[2] != _ANY else "": int(row[0])
        for row in rows
        if len(row) > 2 and row[0].isdecimal() and int(row[0])
    }


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
