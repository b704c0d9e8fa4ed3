"""Other projects' own tests on this loop, beside asyncio's: ``make test-suites``.

For each project of ``suites.toml``: its tests come with its sdist from PyPI (or from git, where the sdist has none), an
environment of its own gets the same version of the project, this package as a wheel, and what the tests import.  Then
they run on asyncio's own loop, and by ``iocp_loop run --children`` on each driver.  What fails on a driver and not on
asyncio runs again alone; if it fails again it must be on the list of ``suites.toml``, with its reason.

    python tools/test_suites.py [NAME ...] [--on KIND ...] [--source NAME=VERSION:FOLDER] [--page docs/suites.md]

``--source``: the tests of that version are in FOLDER, as git or a fork has them, where PyPI or git cannot be reached.
Everything is kept in ``.suites/``, so that some may be run again and the page is of all.  Exit status 1 if the list is
not right.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".suites"
LIST = Path(__file__).with_name("suites.toml")

STOCK = "asyncio"

#: Seconds for one run of a project's tests, and for one test of them.
PATIENCE = 3600
PATIENCE_FOR_ONE = 120

#: How often what failed has to fail alone, each time in a process of its own.
AGAIN = 2


class Failed(Exception):
    """A step that did not work; the message says which."""


class Outcome(NamedTuple):
    """Of one run: how many tests passed, and what the others said."""

    passed: int
    skipped: int
    failed: dict[str, str]
    #: Why the run did not come to its end, if it did not.
    broken: str = ""


def say(text: str) -> None:
    print(f"suites: {text}", flush=True)


def must(command: list[str | Path], **options: Any) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **options)
    if done.returncode != 0:
        raise Failed(f"{' '.join(map(str, command[:6]))} ...\n{done.stdout[-3000:]}")
    return done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# What is run: the tests, and an environment for them
# ---------------------------------------------------------------------------------------------------------------------


def own_wheel() -> Path:
    """This package as a wheel, made anew."""
    shutil.rmtree(WORK / "wheel", ignore_errors=True)
    must([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", WORK / "wheel", ROOT])
    (wheel,) = (WORK / "wheel").glob("*.whl")
    return wheel


def fetch(name: str, suite: Mapping[str, Any]) -> tuple[str, Path]:
    """The newest version on PyPI, and a folder with its tests."""
    with tempfile.TemporaryDirectory(dir=WORK) as tmp:
        must(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", name, "--dest", tmp, name]
        )
        (sdist,) = Path(tmp).glob("*.tar.gz")
        version = sdist.name.removesuffix(".tar.gz").rpartition("-")[2]
        target = WORK / f"{name}-{version}"
        if target.exists():
            return version, target
        if "git" in suite:
            must(["git", "clone", "--quiet", "--depth", "1", "--branch", version, suite["git"], Path(tmp, "git")])
            shutil.move(Path(tmp, "git"), target)
        else:
            with tarfile.open(sdist) as archive:
                archive.extractall(Path(tmp, "sdist"), filter="data")
            shutil.move(next(Path(tmp, "sdist").iterdir()), target)
    return version, target


def prepare(name: str, suite: Mapping[str, Any], source: str | None, wheel: Path) -> tuple[str, Path, Path]:
    """The version, a fresh folder with the tests, and the Python of an environment that has what they need."""
    version, folder = fetch(name, suite) if source is None else (source.split(":")[0], Path(source.partition(":")[2]))
    stage = WORK / "stage" / name
    shutil.rmtree(stage, ignore_errors=True)
    hidden = {str(folder / each) for each in [*suite.get("hide", ()), ".git"]}
    shutil.copytree(folder, stage, ignore=lambda where, names: [n for n in names if f"{where}/{n}" in hidden])
    if "conftest" in suite:
        (stage / "conftest.py").write_text(suite["conftest"] + "\n")
    environment = WORK / "environments" / name
    python = environment / "bin/python"
    if not python.exists():
        must([sys.executable, "-m", "venv", environment])
    must([python, "-m", "pip", "install", "--quiet", f"{name}=={version}", "pytest-timeout", *suite["requirements"]])
    must([python, "-m", "pip", "install", "--quiet", "--force-reinstall", "--no-deps", wheel])
    must([python, "-m", "pip", "install", "--quiet", "cffi"])
    return version, stage, python


# ---------------------------------------------------------------------------------------------------------------------
# A run, and what it shows
# ---------------------------------------------------------------------------------------------------------------------


def run(suite: Mapping[str, Any], kind: str, stage: Path, python: Path, only: Iterable[str] = ()) -> Outcome:
    """The tests on one kind of loop, or those of them whose names are `only`."""
    tests = list(only)
    arguments = [*suite.get("arguments", ()), *(tests or suite["tests"])]
    on = [] if kind == STOCK else ["-m", "iocp_loop", "run", "--children", "--driver", kind]
    plugins = ["-p", "suite_outcomes", "-p", "no:cacheprovider"]
    with tempfile.TemporaryDirectory(dir=WORK) as tmp:
        outcomes = Path(tmp, "outcomes")
        outcomes.touch()
        environment = {
            **os.environ,
            **suite.get("environment", {}),
            "PYTHONPATH": str(Path(__file__).parent),
            "SUITE_OUTCOMES": str(outcomes),
            "TMPDIR": tmp,
        }
        command = [
            python,
            *on,
            "-m",
            "pytest",
            "-q",
            "--tb=short",
            f"--timeout={PATIENCE_FOR_ONE}",
            *plugins,
            *arguments,
        ]
        broken = ""
        with Path(stage, f"log-{kind}.txt").open("w" if not tests else "a") as log:
            try:
                code = subprocess.run(
                    command, cwd=stage, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    timeout=PATIENCE, check=False,
                ).returncode  # fmt: skip
                if code not in (0, 1):
                    broken = f"exit code {code}"
            except subprocess.TimeoutExpired:
                broken = f"not finished in {PATIENCE} s"
        return read(outcomes.read_text(encoding="utf-8").splitlines(), broken)


def read(lines: Iterable[str], broken: str = "") -> Outcome:
    """The outcome of a run, from the lines of suite_outcomes.py."""
    rows = [json.loads(line) for line in lines]
    kinds = [outcome for _, outcome, _ in rows]
    failed = {name: why for name, outcome, why in rows if outcome == "failed"}
    return Outcome(kinds.count("passed"), kinds.count("skipped"), failed, broken)


def beyond(
    suite: Mapping[str, Any], kind: str, ours: Outcome, stock: Outcome, stage: Path, python: Path
) -> dict[str, str]:
    """What fails on a driver and not on asyncio, each time that it is run."""
    left = {name: why for name, why in ours.failed.items() if name not in stock.failed}
    for name in list(left):
        for _ in range(AGAIN):
            if not run(suite, kind, stage, python, [name]).failed:
                del left[name]
                break
    return left


def reason(entries: Iterable[Mapping[str, Any]], name: str, kind: str) -> Mapping[str, Any] | None:
    """The entry of the list for a test, if there is one."""
    for entry in entries:
        if name.startswith(entry["test"]) and entry.get("driver", kind) == kind:
            return entry
    return None


def complaints(name: str, suite: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    """What is wrong with the list of a project, after these results of it."""
    entries = suite.get("beyond", [])
    ours = {kind: each for kind, each in result["kinds"].items() if kind != STOCK}
    wrong = [f"{name} on {kind}: {each['broken']}" for kind, each in result["kinds"].items() if each["broken"]]
    used = []
    for kind, each in ours.items():
        for test, why in each["beyond"].items():
            entry = reason(entries, test, kind)
            used.append(entry)
            if entry is None:
                wrong.append(f"{name} on {kind}: {test} fails here, and not on asyncio: {why}")
    for entry in entries:
        asked_for = entry.get("driver") in (None, *ours)
        if ours and asked_for and entry not in used and not entry.get("sometimes"):
            wrong.append(f"{name}: {entry['test']} is on the list and does not fail")
    return wrong


# ---------------------------------------------------------------------------------------------------------------------
# The page of the documentation
# ---------------------------------------------------------------------------------------------------------------------

PAGE = """\
# Other projects' own tests

The test suites of projects that live on asyncio, on this loop (by `iocp-loop run --children`) and on asyncio's own: how
many of their tests fail. What fails on a driver and not on asyncio runs again alone, twice, and counts if it fails each
time; each such test is named below with the reason. What fails on asyncio too is for the machine: no `localhost` of
IPv6, say, or too little time. This page is made by `make test-suites`; `tools/suites.toml` says which tests are run.

Made on {platform} with CPython {python}, iocp_loop {version}.

| project | its tests are from | passed on asyncio | failed on asyncio | {titles} |
|---|---|---|---|{dashes}
"""


def page(results: Mapping[str, Any], suites: Mapping[str, Any]) -> str:
    kinds = sorted({kind for each in results.values() for kind in each["kinds"]} - {STOCK}, reverse=True)
    text = PAGE.format(
        platform=platform.system(),
        python=platform.python_version(),
        version=importlib.metadata.version("iocp_loop"),
        titles=" | ".join(f"beyond that on `{kind}`" for kind in kinds),
        dashes="---|" * len(kinds),
    )
    reasons = ""
    for name, result in sorted(results.items()):
        stock = result["kinds"][STOCK]
        cells = [str(len(result["kinds"][kind]["beyond"])) if kind in result["kinds"] else "" for kind in kinds]
        text += f"| {name} {result['version']} | {result['origin']} | {stock['passed']} | {len(stock['failed'])} | "
        text += " | ".join(cells) + " |\n"
        for entry in suites[name].get("beyond", []):
            where = f" on `{entry['driver']}`" if "driver" in entry else ""
            times = ", sometimes" if entry.get("sometimes") else ""
            reasons += f"- {name}, `{entry['test']}`{where}{times}: {entry['why']}\n"
    for name in sorted(suites.keys() - results.keys()):
        text += f"| {name} | not run yet |" + " |" * (2 + len(kinds)) + "\n"
    return text + (f"\n## What fails here, and why\n\n{reasons}" if reasons else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--on", action="append", metavar="KIND", help="asyncio, uring, poll; default: all")
    parser.add_argument("--source", action="append", default=[], metavar="NAME=VERSION:FOLDER")
    parser.add_argument("--page", type=Path, metavar="FILE")
    options = parser.parse_args()
    suites = tomllib.loads(LIST.read_text(encoding="utf-8"))
    sources = dict(each.split("=", 1) for each in options.source)
    WORK.mkdir(exist_ok=True)
    kept = WORK / "results.json"
    results = json.loads(kept.read_text()) if kept.exists() else {}
    wrong: list[str] = []
    wheel = own_wheel()
    for name in options.names or sorted(suites):
        suite = suites[name]
        try:
            version, stage, python = prepare(name, suite, sources.get(name), wheel)
        except Failed as exc:
            wrong.append(f"{name}: {exc}")
            continue
        result = results.get(name, {})
        if result.get("version") != version:
            result = {"version": version, "kinds": {}}
        result["origin"] = "git" if "git" in suite else "the sdist"
        for kind in options.on or [STOCK, "uring", "poll"]:
            outcome = run(suite, kind, stage, python)
            each = outcome._asdict()
            if kind != STOCK:
                stock = result["kinds"].get(STOCK, {"failed": {}})
                each["beyond"] = beyond(suite, kind, outcome, Outcome(0, 0, stock["failed"]), stage, python)
            result["kinds"][kind] = each
            more = "" if kind == STOCK else f", {len(each['beyond'])} beyond asyncio's"
            counts = f"{outcome.passed} passed, {len(outcome.failed)} failed"
            say(f"{name} {version} on {kind}: {counts}{more} {outcome.broken}".rstrip())
        results[name] = result
        kept.write_text(json.dumps(results, indent=1))
        wrong += complaints(name, suite, result)
    if options.page:
        options.page.write_text(page(results, suites), encoding="utf-8")
    for each in wrong:
        say(each)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
