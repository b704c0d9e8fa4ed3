"""From samples to figures: medians over the rounds, how far they spread, and ratios taken round by round."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from .rounds import Sample

__all__ = ["Figure", "figure", "ratio"]


@dataclass(frozen=True)
class Figure:
    """The median over the rounds, the least and the greatest."""

    median: float
    low: float
    high: float


def _by_round(samples: Iterable[Sample], case: str, peer: str, metric: str) -> dict[int, float]:
    return {
        sample.round: sample.values[metric]
        for sample in samples
        if sample.case == case and sample.peer == peer and metric in sample.values
    }


def figure(samples: Iterable[Sample], case: str, peer: str, metric: str) -> Figure | None:
    """`metric` of one cell, or None if no round gave it."""
    values = _by_round(samples, case, peer, metric).values()
    return Figure(median(values), min(values), max(values)) if values else None


def ratio(samples: Iterable[Sample], case: str, peer: str, metric: str, baseline: str) -> float | None:
    """How many times the cost of `peer` the `baseline` costs: above 1, `peer` is cheaper.

    Taken within each round, where both ran seconds apart, then the median; None if no round has both.
    """
    samples = list(samples)
    ours = _by_round(samples, case, peer, metric)
    theirs = _by_round(samples, case, baseline, metric)
    ratios = [theirs[number] / ours[number] for number in ours if number in theirs and ours[number]]
    return median(ratios) if ratios else None
