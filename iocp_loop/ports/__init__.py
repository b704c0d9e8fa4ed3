"""Completion ports: the public queue, the three drivers under it, and the choice between them."""

from .choice import DRIVERS, Availability, availability, make_driver
from .driver import Driver, DriverUnavailable
from .port import CompletionPort

__all__ = [
    "DRIVERS",
    "Availability",
    "CompletionPort",
    "Driver",
    "DriverUnavailable",
    "availability",
    "make_driver",
]
