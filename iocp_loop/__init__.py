"""iocp_loop: an asyncio event loop on completion ports.

    asyncio.run(main(), loop_factory=iocp_loop.new_event_loop)      # Python 3.12+
    iocp_loop.run(main())                                            # any

The drivers below it are Windows I/O completion ports (``iocp``), Linux io_uring (``uring``) and a readiness poller
(``poll``); ``python -m iocp_loop`` tells which of them work here.  :class:`CompletionPort` is the queue by itself.

Importing the package imports nothing else: each name fetches its module when it is first asked for.  So the pytest
plugin costs a test run nothing where nobody asks for it (which is why pytest need not look at our asserts either:
PYTEST_DONT_REWRITE).
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from .loop import IocpEventLoop as IocpEventLoop
    from .loop import new_event_loop as new_event_loop
    from .operations import Completion as Completion
    from .operations import Operation as Operation
    from .policy import IocpPolicy as IocpPolicy
    from .ports import CompletionPort as CompletionPort
    from .ports import DriverUnavailable as DriverUnavailable
    from .proactor import Proactor as Proactor
    from .readers import StreamReader as StreamReader
    from .readers import StreamReaderProtocol as StreamReaderProtocol
    from .readers import StreamWriter as StreamWriter
    from .readers import open_connection as open_connection
    from .readers import open_unix_connection as open_unix_connection
    from .readers import start_server as start_server
    from .readers import start_unix_server as start_unix_server
    from .threads import run_threads as run_threads

__version__ = "0.1.0"

__all__ = [
    "Completion",
    "CompletionPort",
    "DriverUnavailable",
    "IocpEventLoop",
    "Operation",
    "Proactor",
    "StreamReader",
    "StreamReaderProtocol",
    "StreamWriter",
    "__version__",
    "install",
    "new_event_loop",
    "open_connection",
    "run",
    "run_threads",
    "start_server",
]

if sys.platform != "win32":
    __all__ += ["open_unix_connection", "start_unix_server"]

#: Where the names are; those without a home of their own are modules.
_HOMES = {
    "Completion": "operations",
    "CompletionPort": "ports",
    "DriverUnavailable": "ports",
    "IocpEventLoop": "loop",
    "IocpPolicy": "policy",  # in no list of names: policies are on their way out
    "Operation": "operations",
    "Proactor": "proactor",
    "StreamReader": "readers",
    "StreamReaderProtocol": "readers",
    "StreamWriter": "readers",
    "new_event_loop": "loop",
    "open_connection": "readers",
    "open_unix_connection": "readers",
    "operations": None,
    "ports": None,
    "run_threads": "threads",
    "start_server": "readers",
    "start_unix_server": "readers",
}

_T = TypeVar("_T")


def run(main: Coroutine[Any, Any, _T], *, debug: bool | None = None, driver: str | None = None) -> _T:
    """Run a coroutine on a new IocpEventLoop and return its result, as :func:`asyncio.run` does.

    `driver` as for :func:`new_event_loop`.  Raises RuntimeError when called from a running loop.
    """
    import asyncio

    from .loop import new_event_loop

    try:
        if asyncio._get_running_loop() is not None:
            raise RuntimeError("iocp_loop.run() cannot be called from a running event loop")
        loop = new_event_loop(driver)
    except BaseException:
        # The error is enough, without a warning of a coroutine that was never awaited.
        if asyncio.iscoroutine(main):
            main.close()
        raise
    with asyncio.Runner(debug=debug, loop_factory=lambda: loop) as runner:
        return runner.run(main)


def install(driver: str | None = None) -> None:
    """Make IocpEventLoop the loop of ``asyncio.run`` and ``asyncio.new_event_loop``, by setting IocpPolicy.

    For Python 3.11 to 3.15.  Setting a policy is deprecated since 3.14 (Python warns) and impossible in 3.16: prefer
    ``loop_factory=iocp_loop.new_event_loop``, :func:`run`, or the command ``iocp-loop run``.
    """
    import asyncio

    from .policy import IocpPolicy

    asyncio.set_event_loop_policy(IocpPolicy(driver))


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES[name]
    if home is None:
        return importlib.import_module(f".{name}", __name__)
    value = globals()[name] = getattr(importlib.import_module(f".{home}", __name__), name)
    return value


def __dir__() -> list[str]:
    return [*__all__, "IocpPolicy"]


if sys.flags.dev_mode or (os.environ.get("PYTHONASYNCIODEBUG") and not sys.flags.ignore_environment):
    from .built import complain_of_what_is_missing

    complain_of_what_is_missing()
