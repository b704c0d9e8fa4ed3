"""The doctor: ``python -m iocp_loop [--json]`` tells which drivers work here, why others do not, and which is taken.

It only looks: it exits 0 whatever it finds.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import sys
import sysconfig
from typing import Any

from . import native
from .ports.choice import AUTO_ORDER, DRIVERS, ENVIRONMENT_VARIABLE, availability

__all__ = ["examine", "main"]

#: What each driver is, for those who meet the names here first.
_DESCRIPTIONS = {"iocp": "Windows I/O completion ports", "uring": "Linux io_uring", "poll": "readiness poller"}


def examine() -> dict[str, Any]:
    """What there is to tell, ready for JSON.

    ``drivers``: a list of ``name``, ``available`` and ``reason`` (why not; empty if it is).  ``auto``: the driver
    that ``auto`` takes.  ``environment``: the value of IOCP_LOOP_DRIVER or None.  ``in_force``: the driver that a new
    loop gets, or None if IOCP_LOOP_DRIVER asks for one that does not work; ``problem`` says so then.  ``binding``:
    the compiled extension module of this platform, its ``module`` (None where the platform has none) and ``path``
    (None if it was not built).  ``tier``: what runs with every callback and message, its ``name`` (``native`` or
    ``python``), the ``path`` of the native one or None, the ``reason`` why it is not that (empty if it is) and the
    ``environment``, the value of IOCP_LOOP_NATIVE or None.
    ``gil``: whether this Python ``has`` one for good, whether it is ``on``, and ``turned_on``: whether this package
    has turned it on.
    """
    from . import __version__

    drivers = [availability(name) for name in DRIVERS]
    reasons = {driver.name: driver.reason for driver in drivers}
    auto = next(name for name in AUTO_ORDER if not reasons[name])
    environment = os.environ.get(ENVIRONMENT_VARIABLE)
    wanted = environment or "auto"
    problem = ""
    if wanted != "auto" and wanted not in reasons:
        problem = f"there is no driver {wanted!r}: choose one of auto, {', '.join(DRIVERS)}"
    elif wanted != "auto":
        problem = reasons[wanted]
    return {
        "iocp_loop": __version__,
        "platform": platform.platform(),
        "machine": platform.machine(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "executable": sys.executable,
        "binding": _binding(),
        "tier": _tier(),
        "gil": _gil(),
        "drivers": [driver._asdict() for driver in drivers],
        "auto": auto,
        "environment": environment,
        "in_force": None if problem else auto if wanted == "auto" else wanted,
        "problem": problem,
    }


def _binding() -> dict[str, str | None]:
    name = "_iocp" if sys.platform == "win32" else "_uring" if sys.platform == "linux" else None
    if name is None:
        return {"module": None, "path": None}
    module = f"{__package__}.{name}"
    spec = importlib.util.find_spec(module)
    return {"module": module, "path": spec.origin if spec is not None else None}


def _tier() -> dict[str, str | None]:
    return {
        "name": "python" if native.hot is None else "native",
        "path": getattr(native.hot, "__file__", None),
        "reason": native.why_not,
        "environment": os.environ.get(native.ENVIRONMENT_VARIABLE),
    }


def _gil() -> dict[str, bool]:
    has = not sysconfig.get_config_var("Py_GIL_DISABLED")
    on = native.gil_is_on()
    return {"has": has, "on": on, "turned_on": on and not native.gil_was_on}


def describe(facts: dict[str, Any]) -> str:
    """The facts of `examine`, for people."""
    binding = facts["binding"]
    if binding["module"] is None:
        built = "none for this platform"
    elif binding["path"] is None:
        built = f"{binding['module']} was not built (that takes a C compiler and Python's headers)"
    else:
        built = f"{binding['module']}, {binding['path']}"
    tier = facts["tier"]
    lines = [
        f"iocp_loop  {facts['iocp_loop']}",
        f"platform   {facts['platform']}",
        f"python     {facts['python']}, {facts['executable']}",
        f"binding    {built}",
        f"tier       {tier['name']}, {tier['path'] or tier['reason']}",
        f"gil        {_describe_gil(facts['gil'])}",
        "",
    ]
    for driver in facts["drivers"]:
        state = "available" if driver["available"] else f"not available, {driver['reason']}"
        lines.append(f"{driver['name']:9}  {state}  [{_DESCRIPTIONS[driver['name']]}]")
    source = f"{ENVIRONMENT_VARIABLE}={facts['environment']}" if facts["environment"] else "auto"
    in_force = f"none, a new loop cannot be made: {facts['problem']}" if facts["problem"] else facts["in_force"]
    lines += ["", f"auto       takes {facts['auto']}", f"in force   {in_force} ({source})"]
    return "\n".join(lines)


def _describe_gil(gil: dict[str, bool]) -> str:
    if gil["has"]:
        return "on, as this Python has one: loops in several threads run by turns"
    if not gil["on"]:
        return "off, and this package leaves it off: loops in several threads run side by side"
    if gil["turned_on"]:
        return "on: a module of this package has turned it on"
    return "on, though this Python can do without: by PYTHON_GIL=1, -X gil=1 or another module"


def main(arguments: list[str] | None = None) -> int:
    """The program; its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m iocp_loop",
        description="Which drivers work on this machine, and which one is taken.",
        epilog="`iocp-loop run PROGRAM ...` runs a program on this loop, `python -m iocp_loop.echo` an echo server;"
        " both have a --help of their own.",
    )
    parser.add_argument("--json", action="store_true", help="the same for programs")
    facts = examine()
    if parser.parse_args(arguments).json:
        print(json.dumps(facts, indent=2))
    else:
        print(describe(facts))
    return 0
