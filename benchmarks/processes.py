"""Processes under measurement: started on one core, watched for their first line, ended for certain."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

__all__ = ["CLIENT_CORE", "SERVER_CORE", "RunFailed", "Server", "on_core", "run_pinned", "serving", "talking"]

#: Places in the list of cores that this process may use.
SERVER_CORE = 0
CLIENT_CORE = 1

_START_TIMEOUT_S = 10.0
_STOP_TIMEOUT_S = 3.0

_NOTHING: Mapping[str, str] = types.MappingProxyType({})

#: Where the packages `benchmarks` and `iocp_loop` are found.
_ROOT = Path(__file__).resolve().parent.parent


class RunFailed(Exception):
    """One run gave no figure.  The message is one line that says why."""


class Server:
    """A running server: its process id, and where it listens (a port, or the path of a UNIX socket)."""

    def __init__(self, pid: int, address: str) -> None:
        self.pid = pid
        self.address = address


@contextlib.contextmanager
def on_core(place: int, cores: Sequence[int] | None = None) -> Iterator[None]:
    """Pin this process, so that a child started meanwhile inherits the core before its first instruction.

    `cores`: of which the core is one; None: of those that this process may use.
    """
    if sys.platform != "linux":
        raise NotImplementedError("processes are pinned on Linux only")
    allowed = os.sched_getaffinity(0)
    cores = sorted(allowed) if cores is None else cores
    core = cores[place % len(cores)]
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def _first_line(process: subprocess.Popen[str], timeout_s: float) -> str:
    """The line that a server prints when it accepts, or an empty string."""
    assert process.stdout is not None  # for the type checker: it is always started with a pipe
    readable, _, _ = select.select([process.stdout], [], [], timeout_s)
    return process.stdout.readline() if readable else ""


def _stop(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
    process.communicate()


@contextlib.contextmanager
def serving(command: Sequence[str], environment: Mapping[str, str], *, pinned: bool = True) -> Iterator[Server]:
    """Run a server until the block ends, on its core or on all, with these variables beside those of this process.

    The server has to print ``listening ADDRESS`` when it accepts.  Raises RunFailed if it does not within ten
    seconds, and when the block ends with a server that is gone.
    """
    with tempfile.TemporaryFile("w+") as stderr:
        with on_core(SERVER_CORE) if pinned else contextlib.nullcontext():
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                cwd=_ROOT,
                env={**os.environ, **environment},
            )

        def complaint() -> str:
            stderr.seek(0)
            return _last_line(stderr.read())

        try:
            word, _, address = _first_line(process, _START_TIMEOUT_S).strip().partition(" ")
            if word != "listening":
                raise RunFailed(f"the server did not start: {complaint()}")
            try:
                yield Server(process.pid, address)
            except RunFailed as failure:
                time.sleep(0.1)  # a dying server is the cause more often than the consequence: let it finish
                if process.poll() is None:
                    raise
                raise RunFailed(f"{failure}; the server ended ({process.returncode}): {complaint()}") from None
            if process.poll() is not None:
                raise RunFailed(f"the server ended ({process.returncode}): {complaint()}")
        finally:
            _stop(process)


@contextlib.contextmanager
def talking(command: Sequence[str], core: int) -> Iterator[subprocess.Popen[str]]:
    """Run a program on a core, with pipes to talk through, until the block ends."""
    with on_core(core):
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=_ROOT,
        )
    try:
        yield process
    finally:
        _stop(process)


def run_pinned(
    command: Sequence[str], core: int | None, timeout_s: float, environment: Mapping[str, str] = _NOTHING
) -> str:
    """Run a program on a core, or on all, to its end; what it printed.  RunFailed carries its last line on stderr."""
    with on_core(core) if core is not None else contextlib.nullcontext():
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=_ROOT,
            env={**os.environ, **environment},
        )
    try:
        printed, complained = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise RunFailed(f"no end after {timeout_s:.0f} s") from None
    finally:
        _stop(process)
    if process.returncode:
        raise RunFailed(_last_line(complained))
    return printed
