"""What the echo server prints."""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

__all__ = ["Statistics", "announce", "complain", "format_address", "say", "statistics_if_wanted", "summary"]


def announce(listener: socket.socket, driver: str) -> None:
    """Say that the server accepts, and where."""
    host, port = listener.getsockname()[:2]
    say(f"listening on {format_address(host, port)} driver={driver}")


def format_address(host: str, port: int) -> str:
    """HOST:PORT, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def statistics_if_wanted(
    options: argparse.Namespace, counts: Callable[[], Counter[str]]
) -> contextlib.AbstractContextManager[Statistics | None]:
    """The statistics that ``--stats`` asks for; None without it."""
    return Statistics(counts) if options.stats else contextlib.nullcontext()


class Statistics:
    """What ``--stats`` shows on stderr: the counts and how fast they grow, whenever they have changed; a summary last.

    On a terminal it is one table that is kept up to date, if rich is installed; else a line for each change.  To be
    used in a ``with`` block, whose end prints the summary.
    """

    def __init__(self, counts: Callable[[], Counter[str]]) -> None:
        self._counts = counts
        self._before = counts()
        self._began = self._then = time.monotonic()
        self._most_open = 0
        self._idle = True
        self._live = _live_display()

    def __enter__(self) -> Statistics:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.show()
        if self._live is not None:
            self._live.stop()
        counts, elapsed = self._before, max(self._then - self._began, 1e-9)
        self._print(
            f"in {elapsed:.1f} s: {counts['connections']} connections, {self._most_open} open at most; "
            f"{counts['bytes']} bytes, {counts['messages']} messages; "
            f"{counts['bytes'] / elapsed / 1e6:.1f} MB/s, {counts['messages'] / elapsed:.0f} messages/s on average"
        )

    def show(self) -> None:
        """Show what has changed since the last call, if anything has."""
        counts, now = self._counts(), time.monotonic()
        elapsed = max(now - self._then, 1e-9)
        grown = {name: (counts[name] - self._before[name]) / elapsed for name in ("bytes", "messages")}
        changed, self._before, self._then = counts != self._before, counts, now
        self._most_open = max(self._most_open, counts["open"])
        megabytes, messages = f"{grown['bytes'] / 1e6:.1f}", f"{grown['messages']:.0f}"
        if self._live is not None:
            if changed or not self._idle:  # a table would go on showing the last speed
                self._live.update(_table(counts, megabytes, messages), refresh=True)
        elif changed:
            self._print(
                f"{counts['connections']} connections, {counts['open']} open; "
                f"{counts['bytes']} bytes, {counts['messages']} messages; "
                f"now {megabytes} MB/s, {messages} messages/s"
            )
        self._idle = not changed

    def _print(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


def _live_display() -> Any:
    """rich's live display on stderr, or None where stderr is no terminal or rich is not installed."""
    if not sys.stderr.isatty():
        return None
    try:
        from rich.console import Console
        from rich.live import Live
    except ImportError:
        return None
    return Live(console=Console(stderr=True), auto_refresh=False, redirect_stdout=False, redirect_stderr=False)


def _table(counts: Counter[str], megabytes: str, messages: str) -> Any:
    from rich.table import Table

    table = Table()
    for name in ("connections", "open", "bytes", "messages", "MB/s", "messages/s"):
        table.add_column(name, justify="right", min_width=10)
    table.add_row(*(f"{counts[name]:,}" for name in ("connections", "open", "bytes", "messages")), megabytes, messages)
    return table


def summary(counts: Counter[str]) -> str:
    """The last line of the program."""
    return f"served {counts['connections']} connections, {counts['bytes']} bytes, {counts['messages']} messages"


def say(line: str) -> None:
    """Print a line at once.  If nobody reads stdout any more, that is no reason to stop serving."""
    try:
        print(line, flush=True)
    except OSError:
        # Else the interpreter would try to flush it again at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def complain(line: str) -> None:
    """Print a line on stderr, with the program's name."""
    print(f"iocp_loop.echo: {line}", file=sys.stderr, flush=True)
