"""The figures in the documentation: a block of tables in ``docs/performance.md``, and plots beside it.

What people wrote stays as it is: only what stands between the two comments of the block is made anew.  The plots are
drawn from the tables of the page (`redraw`), so both always tell the same, and a plot can be drawn otherwise without
measuring anew.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from .benchmark import Benchmark, Place
from .peers import PEERS, Absent, Present
from .plots import Panel, draw_costs, draw_ratios
from .report import Report, machine_text, pivot

__all__ = ["BEGIN", "END", "OVERVIEW", "PublishFailed", "publish", "redraw"]

#: The picture that tells it all at once: its rows, each with the plot and the row of it where the figures stand.
OVERVIEW = {
    "protocol, TCP": ("echo-tcp", "protocol 1 KiB x 100"),
    "streams, TCP": ("echo-tcp", "streams 1 KiB x 100"),
    "sock_*, TCP": ("echo-tcp", "sock 1 KiB x 100"),
    "protocol, UDP": ("echo-udp", "protocol 1 KiB x 100"),
    "protocol, TLS": ("echo-tls", "protocol 1 KiB x 100"),
    "streams, TLS": ("echo-tls", "streams 1 KiB x 100"),
}

BEGIN = "<!-- begin: made by `python -m benchmarks publish`, do not edit -->"
END = "<!-- end: made by `python -m benchmarks publish` -->"


class PublishFailed(Exception):
    """Nothing was written.  The message says why."""


def publish(results: Path, page: Path, benchmarks: Sequence[Benchmark]) -> list[Path]:
    """Put what there is in the directory `results` into the block of `page`; which files were written.

    Plots go to the directory ``figures`` beside it.  Raises PublishFailed.
    """
    reports = []
    for benchmark in benchmarks:
        path = results / f"{benchmark.name}.json"
        if path.exists():
            try:
                reports.append(Report.load(path.read_text(encoding="utf-8"), benchmark))
            except (KeyError, ValueError, TypeError) as error:
                raise PublishFailed(f"{path} has no samples of this version: {error!r}") from error
    if not reports:
        raise PublishFailed(f"no samples in {results}: run a benchmark first")
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise PublishFailed(f"{page} has no block for the figures: {BEGIN} ... {END}")
    lines = _head(reports)
    for report in reports:
        lines += ["", f"## {report.benchmark.title}", "", report.benchmark.about, *report.setting]
        for table, cases in _tables(report).items():
            name = "-".join(filter(None, (report.benchmark.name, table)))
            title = ", ".join(filter(None, (report.benchmark.title, table)))
            if table:
                lines += ["", f"### {title}"]
            rows = {case: " ".join(filter(None, (place.panel, place.row))) for case, place in cases.items()}
            drawn = pivot(report.benchmark.headline, rows, report.samples, report.baseline)
            if "(" in "".join(drawn[2:]):  # without a ratio there is nothing to draw
                lines += ["", f"![{title}: cost of {report.baseline} over the cost of each peer](figures/{name}.svg)"]
            lines += ["", *drawn]
        remarks = report.remarks()
        lines += ["", *remarks] if remarks else []
    page.write_text("\n".join([before + BEGIN, *lines, END]) + after, encoding="utf-8")
    return [page, *redraw(page, page.parent)]


def redraw(page: Path, directory: Path) -> list[Path]:
    """Draw the plots of `page` from its tables, into `directory`; which files were written."""
    written = []
    found: dict[str, dict[str, dict[str, tuple[float, float | None]]]] = {}
    for plot in _PLOT.finditer(page.read_text(encoding="utf-8")):
        title, baseline, name, table = plot["title"], plot["baseline"], plot["name"], plot["table"]
        found[name] = dict(_rows(table))
        panels: dict[str, dict[str, dict[str, float]]] = {}
        for row, figures in found[name].items():
            panel, rest = row.split(" ", 1) if "-" in name else ("", row)
            ratios = {peer: ratio for peer, (_, ratio) in figures.items() if ratio is not None}
            if ratios:
                panels.setdefault(panel, {})[rest] = ratios
        written.append(directory / "figures" / f"{name}.svg")
        draw_ratios(written[-1], title, [Panel(panel, rows) for panel, rows in panels.items()], baseline)
    costs = {
        label: {peer: cost for peer, (cost, _) in found[plot_name][row].items() if not peer.startswith("c-")}
        for label, (plot_name, row) in OVERVIEW.items()
        if row in found.get(plot_name, {})
    }
    if costs:
        written.append(directory / "figures" / "overview.svg")
        title = "CPU time of an echo server, microseconds per message of 1 KiB, 100 connections (less is better)"
        draw_costs(written[-1], title, costs)
    return written


#: A plot in the page, and the table below it.
_PLOT = re.compile(
    r"^!\[(?P<title>.+): cost of (?P<baseline>\S+) over .*\]\(figures/(?P<name>[\w-]+)\.svg\)\n\n"
    r"(?P<table>(?:\|.*\n)+)",
    re.MULTILINE,
)
_CELL = re.compile(r"([\d.,]+)(?: \(([\d.]+)\))?")


def _rows(table: str) -> Iterator[tuple[str, dict[str, tuple[float, float | None]]]]:
    """What `pivot` has drawn: for each case the figure and the ratio of each peer that has one."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    for name, *cells in lines[2:]:
        row: dict[str, tuple[float, float | None]] = {}
        for peer, cell in zip(lines[0][1:], cells, strict=True):
            matched = _CELL.fullmatch(cell)
            if matched is not None and peer in PEERS:
                row[peer] = float(matched[1].replace(",", "")), float(matched[2]) if matched[2] else None
        yield name, row


def _head(reports: Sequence[Report]) -> list[str]:
    """Which machine, which versions, which command."""
    versions: dict[str, str] = {}
    absent: dict[str, str] = {}
    for report in reports:
        for peer in report.peers:
            if isinstance(peer, Absent):
                absent[peer.peer.name] = peer.reason
            elif isinstance(peer, Present) and peer.peer.module is not None:
                versions[peer.peer.name] = peer.version
    machines = list(dict.fromkeys(machine_text(report.machine) for report in reports))
    days = sorted({str(report.machine["date"]).partition(" ")[0] for report in reports})
    lines = [f"Measured {' to '.join(dict.fromkeys((days[0], days[-1])))} on: {' And: '.join(machines)}"]
    lines += ["Loops: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + "."]
    lines += [f"Absent: {name} ({reason})." for name, reason in absent.items()]
    commands = dict.fromkeys(report.command for report in reports if report.command)
    return [*lines, "", *(f"    {command}" for command in commands)]


def _tables(report: Report) -> dict[str, dict[str, Place]]:
    """The cases of each table, with their places, in the order in which they ran."""
    tables: dict[str, dict[str, Place]] = {}
    for case in dict.fromkeys(sample.case for sample in report.samples):
        place = report.benchmark.place(case)
        tables.setdefault(place.table, {})[case] = place
    return tables
