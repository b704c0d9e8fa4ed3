"""Runs cases: ``python -m tests.apps [NAME ...] [--on KIND ...]`` prints what became of each on each kind of loop.

``--table FILE`` writes the same as a page of the documentation.  ``--results FILE`` keeps what became of them, so that
some may be run again and the table is of all.  ``--one NAME KIND`` runs one here and now.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import iocp_loop
from iocp_loop.ports import DRIVERS, availability

from . import FACTORY, Case, everything, new_event_loop

#: Seconds for one case.
PATIENCE = 180

#: asyncio's own loop is another on Windows, and has a column of its own.
ON_WINDOWS = "asyncio, Windows"

#: The columns of the table, in this order.
COLUMNS = ("uring", "poll", "iocp", "asyncio", ON_WINDOWS, "uvloop")

#: Loops that are not ours.
FACTORIES = {
    "asyncio": "asyncio:SelectorEventLoop",
    ON_WINDOWS: "asyncio:ProactorEventLoop",
    "uvloop": "uvloop:new_event_loop",
}


def kinds() -> list[str]:
    """Our drivers that work here, asyncio's own loop, and uvloop if it is installed."""
    if sys.platform == "win32":
        return ["iocp", ON_WINDOWS]  # poll is available too, but is used elsewhere
    ours = [name for name in DRIVERS if availability(name).available]
    return [*ours, "asyncio", *(["uvloop"] if importlib.util.find_spec("uvloop") else [])]


def run_one(case: Case, kind: str) -> None:
    """Run a case in this process."""
    # In the environment for its children too.
    os.environ[FACTORY] = FACTORIES.get(kind, "iocp_loop:new_event_loop")
    if kind in DRIVERS:
        os.environ["IOCP_LOOP_DRIVER"] = kind

    async def main(folder: Path) -> None:
        await asyncio.wait_for(case.body(folder), PATIENCE - 10)

    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name,
        asyncio.Runner(loop_factory=new_event_loop) as runner,
    ):
        runner.run(main(Path(name)))


def outcome(case: Case, kind: str) -> str:
    """Run a case in a process of its own: empty if it passed, else why not."""
    command = [sys.executable, "-W", "ignore", "-X", "faulthandler", "-m", "tests.apps", "--one", case.name, kind]
    # A session of its own: when it does not end in time, the servers that it has started end with it.
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        _, errors = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return f"not finished in {PATIENCE} s"
    finally:
        if sys.platform == "win32":
            process.kill()
        else:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    if process.returncode == 0:
        return ""
    lines = [line for line in errors.splitlines() if line.strip() and not line.startswith((" ", "\t"))]
    return lines[-1].strip() if lines else f"exit code {process.returncode}"


def versions(case: Case) -> str:
    """Of what it is about, or of its programs where pip knows none."""
    words = []
    for name in case.distributions:
        try:
            words.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            words.append(name)
    return ", ".join(words)


PAGE = """\
# Libraries

Real libraries on this loop, each doing something real, beside asyncio's own loop and uvloop. This page is made by
`make libraries`; `make test-apps` runs the same on this loop alone. `iocp` is Windows' CPython under Wine, with the
libraries that have wheels for Windows (`make libraries-windows`); an empty field was not tried. Servers (PostgreSQL,
Redis, mosquitto, NATS, nginx) and Chromium are Debian's. The [recipes](recipes.md) are run as well, among them IPython,
dask's worker processes, tkinter, pytest-asyncio and pytest-aiohttp.

Made on {platform} with CPython {python}, iocp_loop {version}, uvloop {uvloop}.

| library | what is done | {kinds} |
|---|---|{dashes}
"""


def table(rows: Sequence[tuple[Case, dict[str, str]]], on: Sequence[str]) -> str:
    """The page for the documentation."""
    titles = [f"`{kind}`" if kind in DRIVERS else kind for kind in on]
    try:
        uvloop = importlib.metadata.version("uvloop")
    except importlib.metadata.PackageNotFoundError:
        uvloop = "not installed"
    text = PAGE.format(
        platform=platform.system(), python=platform.python_version(), version=iocp_loop.__version__, uvloop=uvloop,
        kinds=" | ".join(titles), dashes="---|" * len(on),
    )  # fmt: skip
    notes: list[str] = []
    for case, outcomes in rows:
        cells = []
        for kind in on:
            if kind not in outcomes:
                cells.append("")
            elif outcomes[kind]:
                notes.append(f"{case.name} on {kind}: `{outcomes[kind][:160].replace('`', '')}`")
                cells.append(f"no ({len(notes)})")
            else:
                cells.append("yes")
        text += f"| {versions(case)} | {case.does} | {' | '.join(cells)} |\n"
    if notes:
        text += "\nWhat did not work said:\n\n" + "".join(f"{n}. {note}\n" for n, note in enumerate(notes, 1))
    return text


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.apps", description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--on", action="append", metavar="KIND", help="uring, poll, asyncio, uvloop; default: all")
    parser.add_argument("--table", type=Path, metavar="FILE")
    parser.add_argument("--results", type=Path, metavar="FILE")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "KIND"))
    options = parser.parse_args()
    cases = everything()
    if options.one:
        run_one(cases[options.one[0]], options.one[1])
        return 0
    on = options.on or kinds()
    results: dict[str, dict[str, str]] = {}
    if options.results and options.results.exists():
        results = json.loads(options.results.read_text())
    for name in options.names or sorted(cases):
        reason = cases[name].missing()
        if reason:
            print(f"{name}: skipped, {reason}")
            continue
        outcomes = {kind: outcome(cases[name], kind) for kind in on}
        results[name] = results.get(name, {}) | outcomes
        for kind, why in outcomes.items():
            print(f"{name} ({versions(cases[name])}) on {kind}: {why or 'ok'}", flush=True)
        if options.results:
            options.results.write_text(json.dumps(results, indent=1))
    if options.table:
        rows = [(cases[name], results[name]) for name in sorted(results)]
        columns = [kind for kind in COLUMNS if any(kind in outcomes for _, outcomes in rows)]
        options.table.write_text(table(rows, columns))
    return int(any(why for outcomes in results.values() for kind, why in outcomes.items() if kind in DRIVERS))


if __name__ == "__main__":
    sys.exit(main())
