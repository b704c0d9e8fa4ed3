"""A plugin of pytest for tools/test_suites.py: one line for each test into the file that SUITE_OUTCOMES names.

A line is written as soon as its test has ended, so a run that dies shows how far it came.
"""

from __future__ import annotations

import json
import os

import pytest

_failed: dict[str, str] = {}
_skipped: set[str] = set()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        lines = report.longreprtext.splitlines() or [""]
        errors = [line[2:].strip() for line in lines if line.startswith("E ")]
        _failed.setdefault(
            report.nodeid, (errors or lines)[0] if report.when == "call" else f"{report.when}: {lines[-1]}"
        )
    elif report.skipped:  # expected failures too
        _skipped.add(report.nodeid)


def pytest_runtest_logfinish(nodeid: str) -> None:
    outcome = "failed" if nodeid in _failed else "skipped" if nodeid in _skipped else "passed"
    with open(os.environ["SUITE_OUTCOMES"], "a", encoding="utf-8") as file:
        file.write(json.dumps([nodeid, outcome, _failed.get(nodeid, "")]) + "\n")
