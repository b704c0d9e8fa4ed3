"""Plots for the documentation: how many times the cost of each peer the baseline costs, case by case (SVG).

Bars are this package's loops, marks are the others: a reader finds ours at a glance, and without colours too.
The colours are those of Okabe and Ito, told apart by all kinds of colour vision.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .peers import OURS, PEERS

__all__ = ["Panel", "draw"]

#: Colour, and for those who are no bars their mark.
_LOOKS = {
    "iocp_loop-uring": ("#0072B2", ""),
    "iocp_loop-poll": ("#E69F00", ""),
    "iocp_loop-uring-python": ("#56B4E9", ""),
    "iocp_loop-poll-python": ("#F0E442", ""),
    "asyncio": ("#000000", "x"),
    "c-epoll": ("#D55E00", "D"),
    "c-uring": ("#009E73", "o"),
    "rloop": ("#CC79A7", "^"),
    "winloop": ("#CC79A7", "v"),
    "blazio": ("#CC79A7", "s"),
    "talyn": ("#CC79A7", "P"),
    "uvloop": ("#000000", "|"),
}

#: Of the figures within bars, where black can't be read.
_INK = {"iocp_loop-uring": "white"}

_ROW_INCHES = 0.42
_WIDTH_INCHES = 8.6


@dataclass(frozen=True)
class Panel:
    """One part of a plot: for each case by its name, the ratios of the peers that have one."""

    title: str
    rows: Mapping[str, Mapping[str, float]]


def draw(path: Path, title: str, panels: Sequence[Panel], baseline: str) -> None:
    """Write an SVG file: the panels side by side, two in a row.  Raises ImportError without matplotlib."""
    matplotlib: Any = importlib.import_module("matplotlib")
    figures: Any = importlib.import_module("matplotlib.figure")
    # Words stay words, to be read aloud and found; and the same figures give the same file.
    style = {"svg.fonttype": "none", "svg.hashsalt": "iocp_loop", "font.family": "sans-serif", "font.size": 9}
    columns = min(2, len(panels))
    lines = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    heights = [max(len(panel.rows) for panel in line) for line in lines]
    with matplotlib.rc_context(style):
        size = (_WIDTH_INCHES, sum(heights) * _ROW_INCHES + 0.6 * len(lines) + 0.9)
        figure = figures.Figure(figsize=size, layout="constrained")
        axes = figure.subplots(len(lines), columns, squeeze=False, height_ratios=heights, sharex=True)
        shown: dict[str, Any] = {}
        limit = _limit(panels)
        for place, axis in enumerate(axes.flat):
            if place < len(panels):
                shown |= _panel(axis, panels[place], limit)
            else:
                axis.set_visible(False)
        handles = [shown[name] for name in PEERS if name in shown]
        figure.suptitle(f"{title}: cost of {baseline} / cost of it (more is cheaper)", fontsize=10)
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 5), frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None, "Title": title})


def _panel(axis: Any, panel: Panel, limit: float) -> dict[str, Any]:
    """Draw one panel; the handles for the legend, by peer."""
    names = list(panel.rows)
    present = {peer for ratios in panel.rows.values() for peer in ratios}
    bars = [peer for peer in OURS if peer in present]
    thickness = 0.8 / max(len(bars), 1)
    handles = {}
    beyond = dict.fromkeys(range(len(names)), 0)  # marks of a row that are off the axis: one below the other
    for place, peer in enumerate(bars):
        offset = (place - (len(bars) - 1) / 2) * thickness
        at = [row + offset for row in range(len(names))]
        widths = [panel.rows[name].get(peer, 0.0) for name in names]
        handles[peer] = axis.barh(at, widths, thickness * 0.92, color=_LOOKS[peer][0], label=peer)
        if thickness >= 0.3:
            for height, width in zip(at, widths, strict=True):
                axis.text(limit * 0.01, height, f"{width:.2f}" if width else "", color=_INK.get(peer, "black"),
                          va="center", fontsize=7.5, fontweight="bold")  # fmt: skip
    for peer in (name for name in PEERS if name in present and name not in OURS):
        colour, mark = _LOOKS[peer]
        points = [(panel.rows[name][peer], row) for row, name in enumerate(names) if peer in panel.rows[name]]
        (handles[peer],) = axis.plot(*zip(*points, strict=True), mark, color=colour, label=peer, markersize=6,
                                     markeredgecolor=colour if mark in "x|" else "white", linestyle="none")  # fmt: skip
        for value, row in points:
            if value > limit:
                beyond[row] += 1
                axis.text(
                    limit,
                    row + 0.3 * (beyond[row] - 1),
                    f"{value:.0f} \N{RIGHTWARDS ARROW}",
                    color=colour,
                    ha="right",
                    va="center",
                )
    axis.axvline(1.0, color="black", linewidth=1)
    axis.set_yticks(range(len(names)), names)
    axis.margins(y=0.02)
    axis.invert_yaxis()
    axis.set_xlim(0, limit)
    axis.tick_params(labelbottom=True)
    axis.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    if panel.title:
        axis.set_title(panel.title, fontsize=9, loc="left", fontweight="bold")
    return handles


def _limit(panels: Sequence[Panel]) -> float:
    """Where the axis ends: beyond our bars, and beyond marks unless they are so far off that bars would vanish."""
    ratios = [(peer, value) for panel in panels for row in panel.rows.values() for peer, value in row.items()]
    ours = max((value for peer, value in ratios if peer in OURS), default=1.0)
    return 1.08 * max(1.2, ours, *(value for _, value in ratios if value <= 2 * max(ours, 1.0)))
