"""Which driver: what can work here, why the others can't, and which one `auto` takes.

The choice is never silent.  ``auto`` (the default) takes the best that works; a driver that is asked for by name, by
argument or by the environment variable ``IOCP_LOOP_DRIVER``, either works or raises
:class:`~iocp_loop.ports.driver.DriverUnavailable`, with the cause and the way out.
"""

from __future__ import annotations

import os
import sys
from typing import NamedTuple

from .driver import Driver, DriverUnavailable

__all__ = ["AUTO_ORDER", "DRIVERS", "ENVIRONMENT_VARIABLE", "Availability", "availability", "make_driver"]

ENVIRONMENT_VARIABLE = "IOCP_LOOP_DRIVER"

#: Every driver there is, best first; ``auto`` takes the first that works.
DRIVERS = ("iocp", "uring", "poll")
AUTO_ORDER = DRIVERS


class Availability(NamedTuple):
    """Whether a driver works on this machine; `reason` says why not (empty if it does)."""

    name: str
    available: bool
    reason: str


def availability(name: str) -> Availability:
    """Probe the driver `name`.  ValueError if there is no such driver."""
    reason = _why_not(_checked(name))
    return Availability(name, reason is None, reason or "")


def make_driver(name: str | None = None, concurrency: int = 1) -> Driver:
    """The driver `name`; None: what IOCP_LOOP_DRIVER says, else ``auto``.

    Raises ValueError for an unknown name, DriverUnavailable for a driver that can't work here.
    """
    source = f"driver={name!r}"
    if name is None:
        name = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
        source = f"{ENVIRONMENT_VARIABLE}={name}"
    if name == "auto":
        return _best(concurrency)
    reason = _why_not(_checked(name))
    if reason is not None:
        raise DriverUnavailable(
            f"{source} can't work here: {reason}. Ask for driver 'auto' to take the best that works."
        )
    return _driver_class(name)(concurrency)


def _best(concurrency: int) -> Driver:
    for name in AUTO_ORDER[:-1]:
        if _why_not(name) is None:
            try:
                driver = _driver_class(name)(concurrency)
            except OSError:  # short of something that the next may not need
                continue
            driver.replaceable = True
            return driver
    return _driver_class(AUTO_ORDER[-1])(concurrency)


def _checked(name: str) -> str:
    if name not in DRIVERS:
        raise ValueError(f"unknown driver {name!r}: choose one of auto, {', '.join(DRIVERS)}")
    return name


def _why_not(name: str) -> str | None:
    if name == "poll":
        return None
    if name == "iocp":
        if sys.platform != "win32":
            return "I/O completion ports exist on Windows only"
        from .iocp import driver as iocp

        return iocp.probe()
    if not sys.platform.startswith("linux"):
        return "io_uring exists on Linux only"
    from .uring import driver as uring

    return uring.probe()


def _driver_class(name: str) -> type[Driver]:
    # Imported when chosen: a driver's module may need an extension module that was not built.
    if name == "iocp":
        from .iocp.driver import IocpDriver

        return IocpDriver
    if name == "uring":
        from .uring.driver import UringDriver

        return UringDriver
    from .poll.driver import PollDriver

    return PollDriver
