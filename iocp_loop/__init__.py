"""iocp_loop: an asyncio event loop on completion ports.

    asyncio.run(main(), loop_factory=iocp_loop.new_event_loop)      # Python 3.12+
    iocp_loop.run(main())                                            # any

The drivers below it are Windows I/O completion ports (``iocp``), Linux io_uring (``uring``) and a readiness poller
(``poll``); ``python -m iocp_loop`` tells which of them work here.  :class:`CompletionPort` is the queue by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from .loop import IocpEventLoop, new_event_loop
from .operations import Completion, Operation
from .ports import CompletionPort, DriverUnavailable
from .proactor import Proactor

if TYPE_CHECKING:
    from .policy import IocpPolicy as IocpPolicy

__version__ = "0.1.0"

__all__ = [
    "Completion",
    "CompletionPort",
    "DriverUnavailable",
    "IocpEventLoop",
    "Operation",
    "Proactor",
    "__version__",
    "install",
    "new_event_loop",
    "run",
]

_T = TypeVar("_T")


def run(main: Coroutine[Any, Any, _T], *, debug: bool | None = None, driver: str | None = None) -> _T:
    """Run a coroutine on a new IocpEventLoop and return its result, as :func:`asyncio.run` does.

    `driver` as for :func:`new_event_loop`.  Raises RuntimeError when called from a running loop.
    """
    if asyncio._get_running_loop() is not None:
        raise RuntimeError("iocp_loop.run() cannot be called from a running event loop")
    with asyncio.Runner(debug=debug, loop_factory=lambda: new_event_loop(driver)) as runner:
        return runner.run(main)


def install(driver: str | None = None) -> None:
    """Make IocpEventLoop the loop of ``asyncio.run`` and ``asyncio.new_event_loop``, by setting IocpPolicy.

    For Python 3.11 to 3.15.  Setting a policy is deprecated since 3.14 (Python warns) and impossible in 3.16: prefer
    ``loop_factory=iocp_loop.new_event_loop`` or :func:`run`.
    """
    from .policy import IocpPolicy

    asyncio.set_event_loop_policy(IocpPolicy(driver))


def __getattr__(name: str) -> Any:
    # Made lazily: policies are on their way out, and importing this package must not touch them.
    if name == "IocpPolicy":
        from .policy import IocpPolicy

        return IocpPolicy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "IocpPolicy"]
