"""What a benchmark is called, and how its samples are shown: all that tables and plots need to know of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from .peers import Peer
from .rounds import Case

__all__ = ["Benchmark", "Column", "Place", "Plan"]

C = TypeVar("C", bound=Case)


@dataclass(frozen=True)
class Column:
    """One column: what is shown of which metric, times `scale`, with so many `digits`."""

    title: str
    metric: str
    show: Literal["median", "spread", "ratio"] = "median"
    scale: float = 1.0
    digits: int = 1


@dataclass(frozen=True)
class Place:
    """Where a case stands in the documentation: in which table and plot, in which panel of that plot, in which row."""

    table: str
    panel: str
    row: str


@dataclass(frozen=True)
class Benchmark:
    """A benchmark, without its cases."""

    name: str
    title: str
    #: What is measured, in a sentence or two of Markdown.
    about: str
    columns: Sequence[Column]
    #: The figure that is compared in the documentation.
    headline: Column
    #: Where the case of a label stands; by default all stand in one table.
    place: Callable[[str], Place] = lambda label: Place("", "", label)


@dataclass(frozen=True)
class Plan(Generic[C]):
    """A benchmark with all that it is to measure."""

    benchmark: Benchmark
    #: How it is measured: lines under the title.
    setting: Sequence[str]
    cases: Sequence[C]
    run: Callable[[C, Peer], dict[str, float]]
    #: What was left out, and why.
    notes: Sequence[str] = ()
