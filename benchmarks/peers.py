"""Who is measured: the event loops, each by name, and the server in C.

A loop is made in the process that it serves in, never in the one that measures.  Whether it can be made is
asked in a process of its own too (``python -m benchmarks.peers NAME``): a loop that can't be imported, or
that crashes, is listed as absent with the reason and disturbs nobody.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.metadata
import platform
import subprocess
import sys
from dataclasses import dataclass
from typing import Any, cast

__all__ = ["C_SERVER", "PEERS", "Absent", "Peer", "Present", "new_event_loop", "probe"]


@dataclass(frozen=True)
class Peer:
    """One contestant.  `module` is imported for its ``new_event_loop``; None stands for the server in C."""

    name: str
    module: str | None
    #: Passed to ``new_event_loop`` as ``driver=``, where the loop has drivers.
    driver: str | None = None


C_SERVER = Peer("c-epoll", None)

PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("asyncio", "asyncio"),
        Peer("uvloop", "uvloop"),
        Peer("iocp_loop-uring", "iocp_loop", driver="uring"),
        Peer("iocp_loop-poll", "iocp_loop", driver="poll"),
        C_SERVER,
    )
}


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
    loop = module.new_event_loop() if peer.driver is None else module.new_event_loop(driver=peer.driver)
    return cast(asyncio.AbstractEventLoop, loop)


def probe(peer: Peer) -> Present | Absent:
    """Try `peer` in a process of its own, at most ten seconds."""
    if peer.module is None:
        return Present(peer, "")
    command = [sys.executable, "-m", __spec__.name, peer.name]
    try:
        tried = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except subprocess.TimeoutExpired:
        return Absent(peer, "making the loop took more than 10 s")
    if tried.returncode == 0:
        return Present(peer, tried.stdout.strip())
    return Absent(peer, tried.stdout.strip() or f"exit status {tried.returncode}")


def _version(peer: Peer) -> str:
    if peer.module is None or peer.module == "asyncio":
        return platform.python_version()
    try:
        return importlib.metadata.version(peer.module)
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
