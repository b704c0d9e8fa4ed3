"""Who is measured: the event loops, each by name, and the servers in C.

A loop is made in the process that it serves in, never in the one that measures.  Whether it can be made is
asked in a process of its own too (``python -m benchmarks.peers NAME``): a loop that can't be imported, or
that crashes, is listed as absent with the reason and disturbs nobody.  A server in C is asked with ``--check``.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from typing import Any, cast

from .native import BuildFailed, build

__all__ = ["DEFAULT", "OURS", "PEERS", "Absent", "Peer", "Present", "new_event_loop", "probe"]


@dataclass(frozen=True)
class Peer:
    """One contestant: an event loop that `module` makes, or, where that is None, the echo server `program` in C."""

    name: str
    module: str | None
    #: What of the module is called to make the loop.
    factory: str = "new_event_loop"
    #: What is called with the loop before it is used, as ``module.function``: another's transports on it.
    patch: str | None = None
    #: Passed to the factory as ``driver=``, where the loop has drivers.
    driver: str | None = None
    #: Variables that its processes get beside the ones of this process.
    environment: tuple[tuple[str, str], ...] = ()
    program: str | None = None
    #: Over what the server in C can be reached.
    transports: tuple[str, ...] = ()


_PYTHON_TIER = (("IOCP_LOOP_NATIVE", "0"),)

PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("asyncio", "asyncio"),
        Peer("uvloop", "uvloop"),
        Peer("iocp_loop-uring", "iocp_loop", driver="uring"),
        Peer("iocp_loop-poll", "iocp_loop", driver="poll"),
        Peer("iocp_loop-uring-python", "iocp_loop", driver="uring", environment=_PYTHON_TIER),
        Peer("iocp_loop-poll-python", "iocp_loop", driver="poll", environment=_PYTHON_TIER),
        Peer("rsloop", "rsloop"),
        Peer("zuvloop", "zuvloop"),
        Peer("aiofastnet-uvloop", "uvloop", patch="aiofastnet.patch_loop"),
        Peer("rloop", "rloop"),
        Peer("winloop", "winloop"),
        Peer("blazio", "blazio"),
        Peer("talyn", "talyn", factory="Loop"),
        Peer("c-epoll", None, program="epoll_server", transports=("tcp", "unix", "udp")),
        Peer("c-uring", None, program="uring_server", transports=("tcp", "unix")),
    )
}

#: Who is measured unless told otherwise, and which of all are this package's.
DEFAULT = ("asyncio", "uvloop", "iocp_loop-uring", "iocp_loop-poll", "c-epoll", "c-uring")
OURS = tuple(name for name, peer in PEERS.items() if peer.module == "iocp_loop")


@dataclass(frozen=True)
class Present:
    """A peer that can run here."""

    peer: Peer
    version: str


@dataclass(frozen=True)
class Absent:
    """A peer that can't run here, and why."""

    peer: Peer
    reason: str


def new_event_loop(peer: Peer) -> asyncio.AbstractEventLoop:
    """Make the loop of `peer` in this process.  Raises ImportError, or what the loop raises."""
    if peer.module is None:
        raise ValueError(f"{peer.name} is not an event loop")
    module: Any = importlib.import_module(peer.module)
    make = getattr(module, peer.factory)
    loop = make() if peer.driver is None else make(driver=peer.driver)
    if peer.patch is not None:
        patcher, _, function = peer.patch.partition(".")
        getattr(importlib.import_module(patcher), function)(loop)
    return cast(asyncio.AbstractEventLoop, loop)


def probe(peer: Peer) -> Present | Absent:
    """Try `peer` in a process of its own, at most ten seconds."""
    command = [sys.executable, "-m", __spec__.name, peer.name]
    if peer.program is not None:
        try:
            command = [str(build(peer.program)), "--check"]
        except BuildFailed as failure:
            return Absent(peer, str(failure))
    environment = {**os.environ, **dict(peer.environment)}
    try:
        tried = subprocess.run(command, capture_output=True, text=True, timeout=10, env=environment)
    except subprocess.TimeoutExpired:
        return Absent(peer, "making the loop took more than 10 s")
    if tried.returncode == 0:
        return Present(peer, tried.stdout.strip())
    complaint = tried.stderr if peer.program is not None else tried.stdout
    return Absent(peer, complaint.strip() or f"exit status {tried.returncode}")


def _version(peer: Peer) -> str:
    if peer.module is None or peer.module == "asyncio":
        return platform.python_version()
    module = peer.module if peer.patch is None else peer.patch.partition(".")[0]
    try:
        return importlib.metadata.version(module)
    except importlib.metadata.PackageNotFoundError:
        return "not installed, run from its source"


def _try(name: str) -> int:
    """Print the version of a loop that works here, or why it does not.  stderr is left to what may follow it."""
    peer = PEERS[name]
    try:
        loop = new_event_loop(peer)
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
        return 1
    print(_version(peer))
    return 0


if __name__ == "__main__":
    sys.exit(_try(sys.argv[1]))
