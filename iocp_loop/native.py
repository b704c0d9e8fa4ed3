"""The native tier: C types for what runs with every callback and every message, or None where there are none.

``_native/hot/hot.h`` tells what is in it.  Each of its types has a counterpart in Python of the same shape, which is
the reference; a class inherits from the one or the other::

    Turns = PythonTurns if hot is None else hot.Turns

It is an extension module of its own beside the binding that cffi makes: it uses CPython's full interface, so it is
built for one version of Python and may one day fail to build for a new one, and then the drivers must be there all the
same.

``IOCP_LOOP_NATIVE=0`` in the environment forces the Python tier, ``1`` makes its absence an error.

It needs no GIL: on a free-threaded Python loops in several threads run side by side (docs/free-threading.md).  Only on
Windows nobody has tried that yet, and where the GIL is off there it is not imported.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import sys
from asyncio import format_helpers
from collections.abc import Callable
from typing import Any

from .built import why_missing

__all__ = ["ENVIRONMENT_VARIABLE", "gil_is_on", "gil_was_on", "hot", "why_not"]

ENVIRONMENT_VARIABLE = "IOCP_LOOP_NATIVE"

_logger = logging.getLogger("asyncio")

#: Whether the GIL is on; only free-threaded Pythons can do without.
gil_is_on: Callable[[], bool] = getattr(sys, "_is_gil_enabled", lambda: True)
#: Whether it was before the first of our compiled modules was imported.
gil_was_on = gil_is_on()

#: The module, or None.
hot: Any = None
#: Why there is none; empty if there is.
why_not = ""

_wanted = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
if _wanted not in ("auto", "0", "1"):
    raise ImportError(f"{ENVIRONMENT_VARIABLE}={_wanted}: it must be 0 (the Python tier), 1 (the native tier) or unset")
if _wanted == "0":
    why_not = f"{ENVIRONMENT_VARIABLE}=0"
elif sys.platform == "win32" and not gil_is_on():
    why_not = "the GIL is off, and on Windows the native tier was not tried without it; PYTHON_GIL=1 turns it on"
else:
    try:
        # Not `from . import _hot`: where there is none, that speaks of a circular import.
        hot = importlib.import_module("iocp_loop._hot")
    except ImportError as _error:
        why_not = why_missing("iocp_loop._hot", _error)
if _wanted == "1" and hot is None:
    raise ImportError(f"{ENVIRONMENT_VARIABLE}=1, but {why_not}")


def report_error(handle: Any, error: BaseException) -> None:
    """Tell the loop of `handle` that its callback has raised; asyncio's handles say it in the same words."""
    context = {
        "message": f"Exception in callback {_describe(handle)}",
        "exception": error,
        "handle": handle,
    }
    if handle._source_traceback:
        context["source_traceback"] = handle._source_traceback
    handle._loop.call_exception_handler(context)


def _describe(handle: Any) -> Any:
    describe: Any = format_helpers._format_callback_source
    try:
        return describe(handle._callback, handle._args, debug=handle._loop.get_debug())
    except TypeError:  # an older Python, whose function knows no `debug`
        return describe(handle._callback, handle._args)


def run_by_method(loop: Any, handle: Any) -> None:
    """Run a handle by its ``_run``, as BaseEventLoop does.

    For debug mode, where slow ones are logged; for handles of other kinds; and for all where a tool has replaced
    ``asyncio.Handle._run``.
    """
    if handle._cancelled:
        return
    try:
        if not loop.get_debug():
            handle._run()
            return
        loop._current_handle = handle
        start = loop.time()
        handle._run()
        duration = loop.time() - start
        if duration >= loop.slow_callback_duration:
            _logger.warning("Executing %s took %.3f seconds", _format(handle), duration)
    finally:
        loop._current_handle = None
        handle = None  # what a callback raises refers to this frame, and the handle may refer to what it raises


_format: Any = asyncio.base_events._format_handle  # type: ignore[attr-defined]  # not in typeshed

if hot is not None:
    hot.set_helpers(report_error, run_by_method)
