"""``python -m iocp_loop``: which drivers work here, why others do not, which is taken."""

from __future__ import annotations

import importlib.util
import json
import platform
import sys
import sysconfig
from typing import Any

import pytest

import iocp_loop
from iocp_loop import doctor, native
from iocp_loop.ports import DRIVERS, availability

from .programs import run_to_end
from .support import WINDOWS

ABSENT = "uring" if WINDOWS else "iocp"


def output(*arguments: str, **environment: str) -> str:
    done = run_to_end("iocp_loop", *arguments, **environment)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def facts(**environment: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(output("--json", **environment))
    return loaded


def test_it_tells_the_platform_and_the_python() -> None:
    text = output()
    assert platform.platform() in text
    assert platform.python_version() in text
    assert iocp_loop.__version__ in text


def test_it_tells_of_each_driver_whether_it_works_and_why_not() -> None:
    lines = output().splitlines()
    for name in DRIVERS:
        (line,) = (line for line in lines if line.startswith(f"{name} "))
        found = availability(name)
        assert (f"not available, {found.reason}" if not found.available else "  available") in line


def test_it_tells_of_the_gil() -> None:
    free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
    gil = facts(PYTHON_GIL="")["gil"]
    assert gil == {"has": not free_threaded, "on": not free_threaded, "turned_on": False}
    line = next(line for line in output(PYTHON_GIL="").splitlines() if line.startswith("gil "))
    assert ("off, and this package leaves it off" if free_threaded else "on, as this Python has one") in line
    if free_threaded:
        assert facts(PYTHON_GIL="1")["gil"] == {"has": False, "on": True, "turned_on": False}
        assert "on, though this Python can do without" in output(PYTHON_GIL="1")


def test_json_says_the_same() -> None:
    found = facts()
    assert found["iocp_loop"] == iocp_loop.__version__
    assert found["drivers"] == [availability(name)._asdict() for name in DRIVERS]
    assert found["environment"] is None
    assert found["problem"] == ""


def test_auto_is_the_driver_that_a_loop_gets() -> None:
    loop = iocp_loop.new_event_loop("auto")
    loop.close()
    found = facts()
    assert found["auto"] == found["in_force"] == loop.driver
    assert f"auto       takes {loop.driver}" in output()


def test_the_environment_is_told_and_followed(driver: str) -> None:
    found = facts(IOCP_LOOP_DRIVER=driver)
    assert (found["environment"], found["in_force"], found["problem"]) == (driver, driver, "")
    assert f"in force   {driver} (IOCP_LOOP_DRIVER={driver})" in output(IOCP_LOOP_DRIVER=driver)


def test_an_environment_that_asks_for_auto_or_nothing_changes_nothing() -> None:
    assert facts(IOCP_LOOP_DRIVER="auto")["in_force"] == facts(IOCP_LOOP_DRIVER="")["in_force"] == facts()["auto"]


@pytest.mark.parametrize(("name", "reason"), [(ABSENT, availability(ABSENT).reason), ("epoll", "no driver 'epoll'")])
def test_an_environment_that_cannot_be_followed_is_told(name: str, reason: str) -> None:
    found = facts(IOCP_LOOP_DRIVER=name)
    assert found["in_force"] is None
    assert reason in found["problem"]
    assert f"in force   none, a new loop cannot be made: {found['problem']}" in output(IOCP_LOOP_DRIVER=name)


def test_its_help_names_the_other_programs() -> None:
    text = " ".join(output("--help").split())
    assert "iocp-loop run PROGRAM" in text
    assert "python -m iocp_loop.echo" in text


def test_it_tells_which_tier_is_in_force_and_why() -> None:
    found = facts(IOCP_LOOP_NATIVE="0")["tier"]
    assert found == {"name": "python", "path": None, "reason": "IOCP_LOOP_NATIVE=0", "environment": "0"}
    assert "tier       python, IOCP_LOOP_NATIVE=0" in output(IOCP_LOOP_NATIVE="0")


@pytest.mark.skipif(native.hot is None, reason=f"the native tier is not in force: {native.why_not}")
def test_it_tells_where_the_native_tier_is() -> None:
    found = facts(IOCP_LOOP_NATIVE="1")["tier"]
    assert found == {"name": "native", "path": native.hot.__file__, "reason": "", "environment": "1"}
    assert f"tier       native, {native.hot.__file__}" in output(IOCP_LOOP_NATIVE="1")


def test_it_tells_why_there_is_no_native_tier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "hot", None)
    monkeypatch.setattr(native, "why_not", "it is missing")
    assert "tier       python, it is missing" in doctor.describe(doctor.examine())


def test_it_tells_whether_the_binding_was_built(monkeypatch: pytest.MonkeyPatch) -> None:
    binding = doctor.examine()["binding"]
    if sys.platform in ("linux", "win32"):
        assert binding["module"] == ("iocp_loop._iocp" if WINDOWS else "iocp_loop._uring")
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        found = doctor.examine()
        assert found["binding"]["path"] is None
        assert f"{binding['module']} was not built" in doctor.describe(found)
    monkeypatch.setattr(sys, "platform", "darwin")
    found = doctor.examine()
    assert found["binding"] == {"module": None, "path": None}
    assert "none for this platform" in doctor.describe(found)
