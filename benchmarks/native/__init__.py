"""The programs in C: the load client and the server to compare with, built when a source is newer."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

__all__ = ["BuildFailed", "build"]

_SOURCES = Path(__file__).resolve().parent
_BUILD = _SOURCES.parent / ".build"
_FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra")


class BuildFailed(Exception):
    """The C compiler is missing or refused a source.  The message is what it said."""


def build(name: str) -> Path:
    """The executable of ``native/NAME.c``, compiled by $CC (or ``cc``) if it is older than its source."""
    source, program = _SOURCES / f"{name}.c", _BUILD / name
    if program.exists() and program.stat().st_mtime >= source.stat().st_mtime:
        return program
    _BUILD.mkdir(exist_ok=True)
    fresh = program.with_suffix(f".{os.getpid()}")  # renamed when complete: another run never sees half a program
    command = [*shlex.split(os.environ.get("CC", "cc")), *_FLAGS, "-o", str(fresh), str(source)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise BuildFailed(f"no C compiler: {command[0]} is not there (set CC to name another)") from None
    if done.returncode:
        raise BuildFailed(done.stderr.strip())
    fresh.replace(program)
    return program
