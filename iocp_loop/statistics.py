"""What a loop has done so far, counted by its driver; always on, for it costs next to nothing."""

from __future__ import annotations

from typing import NamedTuple

from .ports.driver import Driver

__all__ = ["Statistics", "statistics"]


class Statistics(NamedTuple):
    """Counts since the loop was made, but for `in_flight`, which is of now.

    `completions` divided by `batches` is how many completions one call into the kernel brought.
    """

    #: ``"iocp"``, ``"uring"`` or ``"poll"``.
    driver: str
    #: How many operations were submitted, by kind (``{"ReceiveStream": 12, ...}``).  A stream counts once.
    operations: dict[str, int]
    #: How many completions were delivered.  Each value of a stream is one.
    completions: int
    #: How often the loop asked the kernel for completions; each time it takes one batch.
    batches: int
    #: How often another thread had to wake the loop by a call into the kernel.
    wakes: int
    #: How many operations are submitted and not reaped.
    in_flight: int


def statistics(driver: Driver) -> Statistics:
    """The counts of `driver`."""
    operations = {kind.__name__: count for kind, count in driver.submissions.items() if count}
    return Statistics(driver.name, operations, driver.completions, driver.waits, driver.wakes, len(driver.in_flight))
