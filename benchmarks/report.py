"""What a benchmark leaves behind: a Markdown table to read, and a JSON file with every sample.

The table needs no more than the samples and a list of columns, so each benchmark states its columns and
nothing else.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from .peers import Absent, Present
from .rounds import Sample
from .summary import figure, ratio

__all__ = ["Column", "Report", "machine", "table"]


@dataclass(frozen=True)
class Column:
    """One column: what is shown of which metric, times `scale`, with so many `digits`."""

    title: str
    metric: str
    show: Literal["median", "spread", "ratio"] = "median"
    scale: float = 1.0
    digits: int = 1


@dataclass(frozen=True)
class Report:
    """One finished benchmark."""

    title: str
    #: Lines under the title: what was run, and how.
    setting: Sequence[str]
    columns: Sequence[Column]
    baseline: str
    peers: Sequence[Present | Absent]
    samples: Sequence[Sample]

    def markdown(self) -> str:
        """Title, machine, table, and below it who is absent and which runs failed, and why."""
        host = machine()
        lines = [f"# {self.title}", "", *self.setting, ""]
        lines += [
            f"{host['processor']}, {host['cores']} cores, {host['system']}, Python {host['python']}.",
            "",
        ]
        lines += table(self.columns, self.samples, self.baseline)
        notes = [f"- {peer.peer.name} is absent: {peer.reason}" for peer in self.peers if isinstance(peer, Absent)]
        notes += _notes(self.samples)
        return "\n".join([*lines, *([""] if notes else []), *notes, ""])

    def json(self) -> str:
        """Everything, raw: machine, peers with their versions, and every sample."""
        peers: list[dict[str, Any]] = [
            {"name": peer.peer.name, "version": peer.version}
            if isinstance(peer, Present)
            else {"name": peer.peer.name, "absent": peer.reason}
            for peer in self.peers
        ]
        document = {
            "title": self.title,
            "setting": list(self.setting),
            "machine": machine(),
            "baseline": self.baseline,
            "peers": peers,
            "samples": [asdict(sample) for sample in self.samples],
        }
        return json.dumps(document, indent=1) + "\n"

    def write(self, directory: Path, stem: str) -> list[Path]:
        """Write ``STEM.md`` and ``STEM.json``; where they are."""
        directory.mkdir(parents=True, exist_ok=True)
        paths = [directory / f"{stem}.md", directory / f"{stem}.json"]
        for path, text in zip(paths, (self.markdown(), self.json()), strict=True):
            path.write_text(text, encoding="utf-8")
        return paths


def table(columns: Sequence[Column], samples: Sequence[Sample], baseline: str) -> list[str]:
    """The lines of a Markdown table: a row for each case and peer, in the order in which they first ran."""
    cells = list(dict.fromkeys((sample.case, sample.peer) for sample in samples))
    cases = list(dict.fromkeys(case for case, _ in cells))
    rows = [["case", "peer", *(column.title.format(baseline=baseline) for column in columns)]]
    for case in cases:
        for peer in (peer for of, peer in cells if of == case):
            shown = [_shown(column, samples, case, peer, baseline) for column in columns]
            if set(shown) == {"-"}:
                shown[0] = "failed"
            rows.append([case, peer, *shown])
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        texts = (
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "| " + " | ".join(texts) + " |"

    ruler = (
        "|"
        + "|".join("-" * (width + 2) if place < 2 else "-" * (width + 1) + ":" for place, width in enumerate(widths))
        + "|"
    )
    return [line(rows[0]), ruler, *map(line, rows[1:])]


def _notes(samples: Sequence[Sample]) -> Iterator[str]:
    """What the table can't say: runs that failed, and connections that a server let starve."""
    for case, peer in dict.fromkeys((sample.case, sample.peer) for sample in samples):
        runs = [sample for sample in samples if (sample.case, sample.peer) == (case, peer)]
        failed = [sample.failure for sample in runs if sample.failure is not None]
        if failed:
            yield f"- {case}, {peer}: {len(failed)} of {len(runs)} runs failed: {failed[0]}"
        starved = max(sample.values.get("starved", 0) for sample in runs)
        if starved:
            yield f"- {case}, {peer}: up to {starved:.0f} connections were not served once in the window"


def _shown(column: Column, samples: Sequence[Sample], case: str, peer: str, baseline: str) -> str:
    if column.show == "ratio":
        value = ratio(samples, case, peer, column.metric, baseline)
        return "-" if value is None else f"{value:.2f}"
    measured = figure(samples, case, peer, column.metric)
    if measured is None:
        return "-"

    def number(value: float) -> str:
        return f"{value * column.scale:,.{column.digits}f}"

    if column.show == "spread":
        return f"{number(measured.low)}-{number(measured.high)}"
    return number(measured.median)


def machine() -> dict[str, str | int]:
    """Where this runs, as far as a figure may depend on it."""
    processor, load = platform.machine(), "unknown"
    try:
        load = Path("/proc/loadavg").read_text().strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return {
        "processor": processor,
        "cores": os.cpu_count() or 1,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load": load,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
