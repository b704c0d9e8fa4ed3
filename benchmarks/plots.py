"""Plots for the documentation, as SVG of a few kilobytes each: no library is needed to draw a bar.

`draw_ratios` shows case by case how many times the cost of each peer the baseline costs, `draw_costs` the costs
themselves.  Bars are this package's loops, marks are the others: a reader finds ours at a glance, and without colours
too.  The colours are those of Okabe and Ito, told apart by all kinds of colour vision; a second set is for dark pages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from .peers import OURS, PEERS

__all__ = ["Panel", "draw_costs", "draw_ratios"]

#: Colour, colour on dark pages, and how the peer is marked where it has no bar.
_LOOKS = {
    "iocp_loop-uring": ("#56B4E9", "#56B4E9", ""),
    "iocp_loop-poll": ("#E69F00", "#E69F00", ""),
    "iocp_loop-uring-python": ("#9BD3F2", "#9BD3F2", ""),
    "iocp_loop-poll-python": ("#F0E442", "#F0E442", ""),
    "asyncio": ("#555", "#BBB", "cross"),
    "uvloop": ("#009E73", "#2BC89B", "line"),
    "c-epoll": ("#D55E00", "#F0803C", "diamond"),
    "c-uring": ("#009E73", "#2BC89B", "dot"),
    "rloop": ("#CC79A7", "#CC79A7", "up"),
    "rsloop": ("#CC79A7", "#CC79A7", "bar"),
    "zuvloop": ("#CC79A7", "#CC79A7", "cross"),
    "aiofastnet-uvloop": ("#009E73", "#2BC89B", "up"),
    "winloop": ("#CC79A7", "#CC79A7", "down"),
    "blazio": ("#CC79A7", "#CC79A7", "square"),
    "talyn": ("#CC79A7", "#CC79A7", "dot"),
}

#: The marks, drawn from their centre.
_MARKS = {
    "cross": "m-3-3l6 6m0-6l-6 6",
    "line": "m0-5v10",
    "bar": "m-1.5-5h3v10h-3z",
    "diamond": "m0-4l4 4-4 4-4-4z",
    "dot": "m-3 0a3 3 0 1 0 6 0 3 3 0 1 0-6 0",
    "up": "m0-4l4 7h-8z",
    "down": "m0 4l4-7h-8z",
    "square": "m-3-3h6v6h-6z",
}

_WIDTH = 820
_CHARACTER = 6.2  # about the width of one, in pixels, at the size of the labels
_HEAD = 62  # title and legend
_ROW = 27
_BAR = 11
_GAP = 22  # right of a panel, and between two


@dataclass(frozen=True)
class Panel:
    """One part of a plot: for each case by its name, the ratios of the peers that have one."""

    title: str
    rows: Mapping[str, Mapping[str, float]]


def draw_ratios(path: Path, title: str, panels: Sequence[Panel], baseline: str) -> None:
    """Write an SVG file: the panels side by side, two in a row."""
    columns = min(2, len(panels))
    lines = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    limit = _limit(panels)
    names = max(len(name) for panel in panels for name in panel.rows) * _CHARACTER + 8
    body: list[str] = []
    top = float(_HEAD)
    for line in lines:
        for place, panel in enumerate(line):
            left = place * _WIDTH / columns + names
            body += _panel(panel, left, (place + 1) * _WIDTH / columns - _GAP, top, limit)
        top += 44 + _ROW * max(len(panel.rows) for panel in line)
    present = {peer for panel in panels for ratios in panel.rows.values() for peer in ratios}
    _write(path, f"{title}: cost of {baseline} / cost of each (more is cheaper)", present, body, top)


def draw_costs(path: Path, title: str, rows: Mapping[str, Mapping[str, float]]) -> None:
    """Write an SVG file: for each case a bar for each peer, with its cost."""
    names = max(map(len, rows)) * (_CHARACTER + 0.8) + 16
    scale = (_WIDTH - names - 46) / max(cost for costs in rows.values() for cost in costs.values())
    bars: dict[str, str] = {}
    body: list[str] = []
    top = float(_HEAD)
    for name, costs in rows.items():
        middle = top + 13 * len(costs) / 2
        body.append(f'<text x="{names - 8:.0f}" y="{middle + 3:.0f}" class="n b">{escape(name)}</text>')
        for peer, cost in costs.items():
            bars[peer] = bars.get(peer, "") + f"M{names:.0f} {top:.0f}h{cost * scale:.0f}v{_BAR}H{names:.0f}z"
            body.append(f'<text x="{names + cost * scale + 5:.0f}" y="{top + 9.5:g}">{cost:.1f}</text>')
            top += 13
        top += 11
    shapes = [f'<path class="{_class(peer)}" d="{path}"/>' for peer, path in bars.items()]
    _write(path, title, set(bars), [*shapes, *body], top, all_bars=True)


def _panel(panel: Panel, left: float, right: float, top: float, limit: float) -> Iterator[str]:
    """The elements of one panel, between `left` and `right` and below `top`."""
    scale = (right - left) / limit
    top += 18
    bottom = top + _ROW * len(panel.rows)
    yield f'<text x="{left:.0f}" y="{top - 7:.0f}" class="b">{escape(panel.title)}</text>' if panel.title else ""
    ticks = _ticks(limit)
    yield f'<path class="g" d="{"".join(f"M{left + tick * scale:.0f} {top:.0f}V{bottom:.0f}" for tick in ticks)}"/>'
    for tick in ticks:
        yield f'<text x="{left + tick * scale:.0f}" y="{bottom + 13:.0f}" class="m">{tick:g}</text>'
    present = {peer for ratios in panel.rows.values() for peer in ratios}
    bars = [peer for peer in OURS if peer in present]
    thickness = min(_BAR, (_ROW - 4) / max(len(bars), 1))
    shapes: dict[str, str] = {}
    names: list[str] = []
    values: list[str] = []
    beyonds: list[str] = []
    for row, (name, ratios) in enumerate(panel.rows.items()):
        middle = top + (row + 0.5) * _ROW
        names.append(f'<text x="{left - 5:.0f}" y="{middle + 4:.0f}">{escape(name)}</text>')
        beyond = 0  # marks of this row that are off the axis: one below the other
        for peer, ratio in ratios.items():
            if peer in bars:
                y = middle + (bars.index(peer) - len(bars) / 2) * thickness
                shape = f"M{left:.0f} {y:.1f}h{ratio * scale:.1f}v{thickness - 1:.1f}H{left:.0f}z"
                if thickness >= 9:
                    values.append(f'<text x="{left + 4:.0f}" y="{y + 8.5:.0f}">{ratio:.2f}</text>')
            elif ratio <= limit:
                shape = f"M{left + ratio * scale:.1f} {middle:.1f}{_MARKS[_LOOKS[peer][2]]}"
            else:
                y = middle + 3 + 10 * (beyond - 0.5)
                beyonds.append(f'<text x="{right:.0f}" y="{y:.0f}" class="{_class(peer)}">{ratio:.0f} →</text>')
                beyond += 1
                continue
            shapes[peer] = shapes.get(peer, "") + shape
    for peer, shape in sorted(shapes.items(), key=lambda item: item[0] not in bars):  # marks lie on top of bars
        yield f'<path class="{_class(peer)}" d="{shape}"/>'
    yield f'<path class="one" d="M{left + scale:.0f} {top:.0f}V{bottom:.0f}"/>'
    yield f'<g class="n">{"".join(names + beyonds)}</g><g class="v">{"".join(values)}</g>'


def _write(
    path: Path, title: str, present: set[str], body: Sequence[str], height: float, *, all_bars: bool = False
) -> None:
    """Put title and legend above the body.  The same figures give the same file."""
    peers = [name for name in PEERS if name in present]
    marked = set() if all_bars else {peer for peer in peers if peer not in OURS}
    legend, x = [], 16.0
    for peer in peers:
        shape = f"M{x + 5:g} 43{_MARKS[_LOOKS[peer][2]]}" if peer in marked else f"M{x:g} 38h10v10h-10z"
        legend += [f'<path class="{_class(peer)}" d="{shape}"/>', f'<text x="{x + 15:g}" y="47">{peer}</text>']
        x += 36 + round(len(peer) * _CHARACTER)

    def colours(dark: bool) -> str:
        rules = []
        for peer in peers:
            colour = _LOOKS[peer][dark]
            rules.append(f".{_class(peer)}{{fill:{colour}}}")
            if peer in marked and _LOOKS[peer][2] in ("cross", "line"):
                rules.append(f"path.{_class(peer)}{{stroke:{colour}}}")
        return "".join(rules)

    style = (
        "svg{font:11px system-ui,sans-serif;fill:#222}.n{text-anchor:end}.m{text-anchor:middle;font-size:10px}"
        ".b{font-weight:600}.v{font-size:9px;font-weight:600;fill:#000}.t{font-size:13px;font-weight:600}"
        ".p{fill:#fff}.g{stroke:#ddd}.one{stroke:#222}path{stroke-width:1.5}.g,.one{stroke-width:1}"
        f"{colours(False)}"
        "@media(prefers-color-scheme:dark){svg{fill:#ddd}.v{fill:#000}.p{fill:#131416}.g{stroke:#333}.one{stroke:#ddd}"
        f"{colours(True)}}}"
    )
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" width="{_WIDTH}" role="img">',
        f"<title>{escape(title)}</title><style>{style}</style>",
        f'<rect class="p" width="{_WIDTH}" height="{height:.0f}" rx="6"/>',
        f'<text class="t" x="16" y="24">{escape(title)}</text>',
        *legend,
        *filter(None, body),
        "</svg>",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _class(peer: str) -> str:
    return f"c{list(PEERS).index(peer)}"


def _ticks(limit: float) -> list[float]:
    step = next(step for step in (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if limit / step <= 7)
    return [round(step * number, 1) for number in range(int(limit / step) + 1)]


def _limit(panels: Sequence[Panel]) -> float:
    """Where the axis ends: beyond our bars, and beyond marks unless they are so far off that bars would vanish."""
    ratios = [(peer, value) for panel in panels for row in panel.rows.values() for peer, value in row.items()]
    ours = max((value for peer, value in ratios if peer in OURS), default=1.0)
    return 1.08 * max(1.2, ours, *(value for _, value in ratios if value <= 2 * max(ours, 1.0)))
