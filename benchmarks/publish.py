"""The figures in the documentation: a block of tables in ``docs/performance.md``, and plots beside it.

What people wrote stays as it is: only what stands between the two comments of the block is made anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .benchmark import Benchmark, Place
from .peers import Absent, Present
from .plots import Panel, draw
from .report import Report, machine_text, pivot
from .summary import ratio

__all__ = ["BEGIN", "END", "PublishFailed", "publish"]

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
    written = []
    lines = _head(reports)
    for report in reports:
        lines += ["", f"## {report.benchmark.title}", "", report.benchmark.about, *report.setting]
        for table, cases in _tables(report).items():
            name = "-".join(filter(None, (report.benchmark.name, table)))
            title = ", ".join(filter(None, (report.benchmark.title, table)))
            panels = _panels(report, cases)
            if table:
                lines += ["", f"### {title}"]
            if panels:
                try:
                    draw(page.parent / "figures" / f"{name}.svg", title, panels, report.baseline)
                except ImportError as error:
                    raise PublishFailed(f"the plots need matplotlib: {error}") from error
                written.append(page.parent / "figures" / f"{name}.svg")
                lines += ["", f"![{title}: cost of {report.baseline} over the cost of each peer](figures/{name}.svg)"]
            rows = {case: " ".join(filter(None, (place.panel, place.row))) for case, place in cases.items()}
            lines += ["", *pivot(report.benchmark.headline, rows, report.samples, report.baseline)]
        remarks = report.remarks()
        lines += ["", *remarks] if remarks else []
    page.write_text("\n".join([before + BEGIN, *lines, END]) + after, encoding="utf-8")
    return [page, *written]


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


def _panels(report: Report, cases: dict[str, Place]) -> list[Panel]:
    """The ratios of each panel; none where the baseline has no figure."""
    panels: dict[str, dict[str, dict[str, float]]] = {}
    peers = [peer.peer.name for peer in report.peers if peer.peer.name != report.baseline]
    for case, place in cases.items():
        taken = {peer: ratio(report.samples, case, peer, report.benchmark.headline.metric, report.baseline)
                 for peer in peers}  # fmt: skip
        if ratios := {peer: value for peer, value in taken.items() if value is not None}:
            panels.setdefault(place.panel, {})[place.row] = ratios
    return [Panel(title, rows) for title, rows in panels.items()]
