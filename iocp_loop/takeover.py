"""Programs that were written for asyncio's own loop get this one, unchanged: what ``iocp-loop run`` and the pytest
plugin do inside their process.

Whoever asks asyncio for a loop without naming another kind, be it by ``asyncio.run``, a Runner, ``new_event_loop`` or
``loop_factory=asyncio.SelectorEventLoop``, ends at one of asyncio's own loop classes, called without arguments.  So
those classes make ours then: one way for every Python, with policies (before 3.16, where touching them may warn) or
without.  Their subclasses, and calls with arguments, make what they always made.
"""

from __future__ import annotations

import asyncio
import atexit
import sys
import weakref
from collections import Counter
from functools import partial
from typing import Any

from .loop import IocpEventLoop

__all__ = ["report_statistics_at_exit", "take_over"]


def take_over(driver: str | None = None, kind: type[IocpEventLoop] = IocpEventLoop) -> None:
    """From now on asyncio's own loop classes make loops of `kind` on `driver`, in this process and what it forks."""
    for name in ("SelectorEventLoop", "ProactorEventLoop"):
        stock: Any = getattr(asyncio, name, None)
        if stock is not None:
            stock.__new__ = staticmethod(partial(_make, stock, kind, driver))


def _make(stock: type, kind: type[IocpEventLoop], driver: str | None, cls: Any, *args: Any, **kwargs: Any) -> Any:
    if cls is stock and not args and not kwargs:
        return kind(driver)  # no instance of `cls`, so nobody calls __init__ on it again
    return object.__new__(cls)


# ----------------------------------------------------------------------------------------------------------------------
# Statistics of all loops of a process
# ----------------------------------------------------------------------------------------------------------------------


class _CountedLoop(IocpEventLoop):
    """An IocpEventLoop whose statistics outlive it."""

    def __init__(self, driver: str | None = None) -> None:
        super().__init__(driver)
        _open.add(self)

    def close(self) -> None:
        if not self.is_closed():
            super().close()
            _open.discard(self)
            _count(self)


_open: weakref.WeakSet[_CountedLoop] = weakref.WeakSet()
_counts: Counter[str] = Counter()
_operations: Counter[str] = Counter()
_drivers: set[str] = set()


def _count(loop: _CountedLoop) -> None:
    stats = loop.stats()
    _drivers.add(stats.driver)
    _operations.update(stats.operations)
    _counts.update(loops=1, completions=stats.completions, batches=stats.batches, wakes=stats.wakes)


def report_statistics_at_exit() -> type[IocpEventLoop]:
    """The kind of loop whose statistics are printed on stderr, summed up, when this process exits."""
    atexit.register(lambda: print(_summary(), file=sys.stderr))
    return _CountedLoop


def _summary() -> str:
    for loop in list(_open):
        _count(loop)
    if not _counts:
        return "iocp_loop: no loop of asyncio's was made here"
    loops = "1 loop" if _counts["loops"] == 1 else f"{_counts['loops']} loops"
    operations = ", ".join(f"{kind} {count}" for kind, count in _operations.most_common())
    return (
        f"iocp_loop: {loops} on driver {' and '.join(sorted(_drivers))}: {_counts['completions']} completions in "
        f"{_counts['batches']} batches, {_counts['wakes']} wakes; operations: {operations or 'none'}"
    )
