"""Programs of other families while system calls fail: by `faults.c`, which is preloaded, and by too few descriptors.

Soft faults (less than was asked for, "interrupted", "try again") must not show at all.  Hard ones may cost a
connection, and nothing else.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..support import ROOT, open_files
from . import family_named
from .program import Source
from .stage import Stage

__all__ = ["make_faults", "play_faults", "preloaded", "why_not"]

#: The kinds of faults, by the numbers that `faults.c` has for them.
_SOFT = {"short": 1, "interrupted": 2, "again": 4, "aborted": 8}
_HARD = {"lost": 16, "run out": 32}

#: Families whose programs see only what the loop makes of the faults.
_FOR_SOFT = ("transports", "servers", "streams", "tls", "files", "sockets", "datagrams", "pipes")

#: Families that put up with lost connections.
_FOR_HARD = ("transports", "servers", "datagrams")


# -- the library -----------------------------------------------------------------------------------


@functools.cache
def _library() -> Path | str:
    """The library, which is built if it is not there; a str: why there is none."""
    if sys.platform != "linux":
        return "system calls are made to fail on Linux only"
    named = os.environ.get("CC")
    compiler = shlex.split(named) if named else [next(filter(shutil.which, ("cc", "gcc", "clang")), "")]
    if not compiler[0]:
        return "there is no C compiler"
    source = Path(__file__).with_suffix(".c")
    name = f"faults-{hashlib.sha256(source.read_bytes()).hexdigest()[:16]}.so"
    folder = ROOT / "build" / "fuzz"
    library = folder / name
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as beside:
        built = Path(beside) / name
        command = [*compiler, "-std=gnu11", "-O1", "-Wall", "-shared", "-fPIC", "-o", str(built), str(source), "-ldl"]
        # Without a sanitizer that may be preloaded here.
        environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            return f"faults.c does not compile: {done.stderr}"
        built.replace(library)
    return library


def why_not() -> str:
    """Why this family cannot be played here; empty if it can."""
    library = _library()
    return library if isinstance(library, str) else ""


def preloaded(environment: dict[str, str]) -> dict[str, str]:
    """What to change in `environment` to have the library under a process; a sanitizer that is there comes first."""
    return {"LD_PRELOAD": ":".join(filter(None, [environment.get("LD_PRELOAD", ""), str(_library())]))}


# -- programs --------------------------------------------------------------------------------------


@dataclass
class _Program:
    kinds: list[str]
    per_mille: int
    seed: int
    #: So many descriptors may be opened, for so many seconds; None: as many as one likes.
    descriptors: tuple[int, float] | None
    family: str
    program: Any


def make_faults(source: Source) -> _Program:
    """Choose a family's program, and what fails."""
    hard = source.chance(0.4)
    kinds = [kind for kind in _SOFT if source.chance(0.6)]
    if hard:
        kinds.append(source.pick(sorted(_HARD)))
    family = source.pick(_FOR_HARD if hard else _FOR_SOFT)
    few = family != "datagrams" and hard and source.chance(0.4)
    return _Program(
        kinds=kinds,
        per_mille=source.pick([5, 20] if hard else [5, 50, 300]),
        seed=source.below(1 << 31),
        descriptors=(source.between(0, 10), source.pick([0.005, 0.05])) if few else None,
        family=family,
        program=family_named(family).make(source.sub(family)),
    )


async def play_faults(program: _Program, stage: Stage) -> None:
    """Play the other family's program while system calls fail."""
    numbers = _SOFT | _HARD
    kinds = sum(numbers[kind] for kind in program.kinds)
    stage.hard = any(kind in _HARD for kind in program.kinds)
    with _armed(kinds, program.per_mille, program.seed), _limited(program, stage.loop.call_later):
        await family_named(program.family).play(program.program, stage)


@contextmanager
def _armed(kinds: int, per_mille: int, seed: int) -> Iterator[None]:
    library = ctypes.CDLL(None)  # preloaded: its functions are everybody's
    library.faults_arm(kinds, per_mille, seed)
    try:
        yield
    finally:
        library.faults_disarm()


@contextmanager
def _limited(program: _Program, call_later: Callable[..., Any]) -> Iterator[None]:
    """For a while there are only so many more descriptors to be had."""
    if program.descriptors is None:
        yield
        return
    more, seconds = program.descriptors
    usual = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(open_files() or {100}) + 1
    restore = functools.partial(resource.setrlimit, resource.RLIMIT_NOFILE, usual)
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + more, usual[1]))
    call_later(seconds, restore)
    try:
        yield
    finally:
        restore()
