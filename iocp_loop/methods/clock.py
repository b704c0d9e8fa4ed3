"""The loop's clock, on systems whose monotonic clock is too coarse for timers.

Before Python 3.13, ``time.monotonic`` on Windows counts in ticks of 15.6 ms.  asyncio runs a timer when it is less than
one tick of the clock away, so each could be early by so much, and a sleep of a millisecond would be none or sixteen.
There the loop reads the performance counter, which counts in fractions of a microsecond.
"""

from __future__ import annotations

import asyncio
import time

__all__ = ["ClockMethods"]

#: A clock with longer ticks, seconds, is no clock for timers.
COARSE = 0.001


class ClockMethods(asyncio.BaseEventLoop):
    """The part of the loop that tells the time."""

    if time.get_clock_info("monotonic").resolution > COARSE:

        def __init__(self) -> None:
            super().__init__()
            self._clock_resolution = time.get_clock_info("perf_counter").resolution

        def time(self) -> float:
            """The time of the loop's own clock, seconds; not that of ``time.monotonic`` here, which is too coarse."""
            return time.perf_counter()
