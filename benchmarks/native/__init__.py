"""The programs in C: the load client and the servers to compare with, built when a source is newer."""

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
    """The C compiler is missing or refused a source.  The message is one line of what it said."""


def build(name: str, *, tls: bool = False) -> Path:
    """The executable of ``native/NAME.c``, compiled by $CC (or ``cc``) if it is older than its sources.

    With `tls` it is one that speaks TLS, and needs OpenSSL with its headers.  Raises BuildFailed.
    """
    source, program = _SOURCES / f"{name}.c", _BUILD / (f"{name}-tls" if tls else name)
    newest = max(path.stat().st_mtime for path in (source, *_SOURCES.glob("*.h")))
    if program.exists() and program.stat().st_mtime >= newest:
        return program
    _BUILD.mkdir(exist_ok=True)
    fresh = program.with_suffix(f".{os.getpid()}")  # renamed when complete: another run never sees half a program
    flags, libraries = (("-DWITH_TLS",), ("-lssl", "-lcrypto")) if tls else ((), ())
    command = [*shlex.split(os.environ.get("CC", "cc")), *_FLAGS, *flags, "-o", str(fresh), str(source), *libraries]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise BuildFailed(f"no C compiler: {command[0]} is not there (set CC to name another)") from None
    if done.returncode:
        raise BuildFailed(_first_error(done.stderr))
    fresh.replace(program)
    return program


def _first_error(complaint: str) -> str:
    lines = complaint.strip().splitlines()
    return next((line for line in lines if "error" in line), lines[-1] if lines else "the C compiler said nothing")
