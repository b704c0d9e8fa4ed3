"""IocpPolicy: for programs that choose their loop by ``asyncio.set_event_loop_policy``.

Policies are deprecated since Python 3.14 and gone in 3.16, so this module is imported only when somebody asks for the
policy; ``loop_factory=iocp_loop.new_event_loop`` works everywhere.
"""

from __future__ import annotations

import asyncio
import asyncio.events as _events
import sys
from typing import Any

from .loop import IocpEventLoop, new_event_loop

__all__ = ["IocpPolicy"]

_Base: Any
if sys.version_info < (3, 14):
    # The policy of the system, for what else it knows: programs that set a child watcher may go on doing so.
    _Base = asyncio.DefaultEventLoopPolicy
else:
    # 3.14 put an underscore before the name, so that using the old one can warn; 3.16 has none.
    _Base = getattr(_events, "_BaseDefaultEventLoopPolicy", None)
    if _Base is None:
        raise ImportError(
            "this Python has no event loop policies any more: use "
            "asyncio.run(main(), loop_factory=iocp_loop.new_event_loop)"
        )


class IocpPolicy(_Base):  # type: ignore[misc]  # the base depends on the Python version
    """An event loop policy whose loops are IocpEventLoops.

    `driver` is given to each new loop; see :func:`iocp_loop.new_event_loop`.
    """

    def __init__(self, driver: str | None = None) -> None:
        super().__init__()
        self._driver = driver

    def _loop_factory(self) -> IocpEventLoop:
        return new_event_loop(self._driver)
