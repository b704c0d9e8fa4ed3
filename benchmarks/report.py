"""What a benchmark leaves behind: a Markdown table to read, and a JSON file with every sample.

The table needs no more than the samples and a list of columns, so each benchmark states its columns and
nothing else.  The documentation has a compact one, with the peers side by side (`pivot`).
"""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .benchmark import Benchmark, Column
from .peers import PEERS, Absent, Present
from .rounds import Sample
from .summary import figure, ratio

__all__ = ["Report", "machine", "machine_text", "pivot", "table"]


@dataclass(frozen=True)
class Report:
    """One finished benchmark."""

    benchmark: Benchmark
    #: Lines under the title: how it was run.
    setting: Sequence[str]
    baseline: str
    peers: Sequence[Present | Absent]
    samples: Sequence[Sample]
    #: What was left out, and why.
    notes: Sequence[str] = ()
    #: What makes these figures anew.
    command: str = ""
    machine: dict[str, str | int] = field(default_factory=lambda: machine())

    def markdown(self) -> str:
        """Title, machine, table, and below it who is absent and which runs failed, and why."""
        lines = [f"# {self.benchmark.title}", "", self.benchmark.about, "", *self.setting, ""]
        lines += [machine_text(self.machine), ""]
        lines += table(self.benchmark.columns, self.samples, self.baseline)
        notes = [f"- {peer.peer.name} is absent: {peer.reason}" for peer in self.peers if isinstance(peer, Absent)]
        notes += self.remarks()
        return "\n".join([*lines, *([""] if notes else []), *notes, ""])

    def remarks(self) -> list[str]:
        """What was left out, which runs failed, and what else a table can't say."""
        return [f"- {note}" for note in self.notes] + list(_remarks(self.samples))

    def json(self) -> str:
        """Everything, raw: machine, peers with their versions, and every sample."""
        peers: list[dict[str, Any]] = [
            {"name": peer.peer.name, "version": peer.version}
            if isinstance(peer, Present)
            else {"name": peer.peer.name, "absent": peer.reason}
            for peer in self.peers
        ]
        document = {
            "benchmark": self.benchmark.name,
            "setting": list(self.setting),
            "command": self.command,
            "machine": self.machine,
            "baseline": self.baseline,
            "peers": peers,
            "notes": list(self.notes),
            "samples": [asdict(sample) for sample in self.samples],
        }
        return json.dumps(document, indent=1) + "\n"

    @classmethod
    def load(cls, text: str, benchmark: Benchmark) -> Report:
        """What `json` wrote.  Raises ValueError or KeyError for anything else."""
        document = json.loads(text)
        if document["benchmark"] != benchmark.name:
            raise ValueError(f"samples of {document['benchmark']}, not of {benchmark.name}")
        peers = [
            Present(PEERS[peer["name"]], peer["version"])
            if "version" in peer
            else Absent(PEERS[peer["name"]], peer["absent"])
            for peer in document["peers"]
        ]
        samples = [Sample(**sample) for sample in document["samples"]]
        return cls(
            benchmark,
            document["setting"],
            document["baseline"],
            peers,
            samples,
            document["notes"],
            document["command"],
            document["machine"],
        )

    def write(self, directory: Path) -> list[Path]:
        """Write ``NAME.md`` and ``NAME.json``; where they are."""
        directory.mkdir(parents=True, exist_ok=True)
        paths = [directory / f"{self.benchmark.name}{suffix}" for suffix in (".md", ".json")]
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
    return _drawn(rows, 2)


def pivot(headline: Column, rows: dict[str, str], samples: Sequence[Sample], baseline: str) -> list[str]:
    """The lines of a compact Markdown table: a row for each case, a column for each peer.

    `rows` has the cases with the names that they get here.  Each cell is the median of the headline's metric, and
    in brackets the ratio to the baseline.
    """
    peers = [name for name in PEERS if any(sample.peer == name and sample.case in rows for sample in samples)]
    lines = [[headline.title, *peers]]
    for case, name in rows.items():
        cells = []
        for peer in peers:
            shown = _shown(headline, samples, case, peer, baseline)
            times = ratio(samples, case, peer, headline.metric, baseline)
            if shown == "-" and any((sample.case, sample.peer) == (case, peer) for sample in samples):
                shown = "failed"
            cells.append(shown if times is None or peer == baseline else f"{shown} ({times:.2f})")
        lines.append([name, *cells])
    return _drawn(lines, 1)


def _drawn(rows: Sequence[Sequence[str]], names: int) -> list[str]:
    """A Markdown table whose first `names` columns are text, the others numbers; the first row is its head."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        texts = (
            cell.ljust(width) if place < names else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "| " + " | ".join(texts) + " |"

    dashes = ("-" * (width + 2) if place < names else "-" * (width + 1) + ":" for place, width in enumerate(widths))
    return [line(rows[0]), "|" + "|".join(dashes) + "|", *map(line, rows[1:])]


def _remarks(samples: Sequence[Sample]) -> Iterator[str]:
    """What the table can't say: runs that failed, connections that a server let starve, lost datagrams."""
    for case, peer in dict.fromkeys((sample.case, sample.peer) for sample in samples):
        runs = [sample for sample in samples if (sample.case, sample.peer) == (case, peer)]
        failed = [sample.failure for sample in runs if sample.failure is not None]
        if failed:
            yield f"- {case}, {peer}: {len(failed)} of {len(runs)} runs failed: {failed[0]}"
        starved = max(sample.values.get("starved", 0) for sample in runs)
        if starved:
            yield f"- {case}, {peer}: up to {starved:.0f} connections were not served once in the window"
        lost = sum(sample.values.get("lost", 0) for sample in runs)
        if lost:
            yield f"- {case}, {peer}: {lost:.0f} datagrams were lost and sent again"


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


def machine_text(host: dict[str, str | int]) -> str:
    """The machine in a line."""
    return f"{host['processor']}, {host['cores']} cores, {host['system']}, Python {host['python']}."


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
