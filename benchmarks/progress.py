"""A progress bar that keeps its hands off the measurement: drawn between runs, never by a thread beside them.

rich draws it where it is installed; otherwise one plain line is rewritten.  Nothing is drawn unless stderr is
a terminal.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["progress"]


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """Give a function to be called at the start of each of `total` steps, with what the step is about."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    try:
        bars: Any = importlib.import_module("rich.progress")
        consoles: Any = importlib.import_module("rich.console")
    except ImportError:
        with _plain(total) as step:
            yield step
        return
    bar = bars.Progress(
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeRemainingColumn(),
        bars.TextColumn("{task.description}"),
        console=consoles.Console(stderr=True),
        auto_refresh=False,
        transient=True,
    )
    with bar:
        task = bar.add_task("", total=total)
        begun = 0

        def step(what: str) -> None:
            nonlocal begun
            bar.update(task, completed=begun, description=what, refresh=True)
            begun += 1

        yield step


@contextlib.contextmanager
def _plain(total: int) -> Iterator[Callable[[str], None]]:
    begun = 0

    def step(what: str) -> None:
        nonlocal begun
        begun += 1
        sys.stderr.write(f"\r\033[K[{begun}/{total}] {what}")
        sys.stderr.flush()

    try:
        yield step
    finally:
        sys.stderr.write("\r\033[K")
