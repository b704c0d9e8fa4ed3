"""Fuzzers: seeded programs on every part of the loop, checked by themselves and against asyncio's own loop.

A *program* is plain data that follows from the name of its family and a seed; `program.py` has the random source.  Each
family is a module with two functions::

    make(source)           -> the program; everything that is left to chance is settled here
    play(program, stage)      run it on ``stage.loop``; note what it sees, tell what is wrong

`stage.py` is what they play on, `runner.py` plays one program from its loop's beginning to its end, `worker.py` gives
each program a process of its own, and `__main__.py` is the command line::

    python -m tests.fuzz --loops uring,poll,stock --seed 1 --count 10 transports

What a program *notes* must come out the same on every loop; what it *fails* is wrong by itself.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .program import Source
    from .stage import Stage

__all__ = ["FAMILIES", "Family", "family_named"]


@dataclass(frozen=True)
class Family:
    """A kind of program.

    `stock`: asyncio's own loop can play it too.  `moves`: its loop may go from thread to thread meanwhile.  `stops`: it
    wants the loop to be stopped again and again.  `preload`: it is played in a process with `faults.c` under it.
    """

    name: str
    module: str
    stock: bool = True
    moves: bool = True
    stops: bool = False
    preload: bool = False

    @property
    def make(self) -> Callable[[Source], Any]:
        """The function that makes its programs."""
        return getattr(self._module(), f"make_{self.name}")  # type: ignore[no-any-return]  # by its name

    @property
    def play(self) -> Callable[[Any, Stage], Coroutine[Any, Any, None]]:
        """The function that plays them."""
        return getattr(self._module(), f"play_{self.name}")  # type: ignore[no-any-return]  # by its name

    def _module(self) -> Any:
        return importlib.import_module(f".{self.module}", __package__)


FAMILIES = (
    Family("callbacks", "callbacks", moves=False),
    Family("transports", "transports"),
    Family("servers", "servers"),
    Family("streams", "streams"),
    Family("tls", "tls"),
    Family("files", "files"),
    Family("sockets", "sockets"),
    Family("readiness", "readiness"),
    Family("datagrams", "datagrams"),
    Family("pipes", "pipes_and_processes"),
    Family("processes", "pipes_and_processes", moves=False),
    Family("timers", "timers_and_threads"),
    Family("threads", "timers_and_threads"),
    Family("signals", "timers_and_threads", moves=False),
    Family("loops", "loops", moves=False),
    Family("forks", "forks", stock=False, stops=True),
    Family("ports", "ports", stock=False, moves=False),
    Family("faults", "faults", preload=True),
)


def family_named(name: str) -> Family:
    """The family of that name.  Raises KeyError if there is none."""
    return {family.name: family for family in FAMILIES}[name]
