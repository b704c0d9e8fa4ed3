"""What transports share, of sockets, of pipes and of datagrams: flow control, and how they look at a protocol."""

from __future__ import annotations

import asyncio
from asyncio import transports
from typing import TYPE_CHECKING, Any

__all__ = ["FlowControl", "TakesBytes"]


class FlowControl(transports._FlowControlMixin):
    """Pauses a protocol's writing above the high-water mark and resumes it at the low one (both in bytes).

    asyncio's own, by whose class other parts of asyncio know a transport that has flow control.
    """

    __slots__ = ()

    _loop: asyncio.AbstractEventLoop
    _protocol: Any

    if TYPE_CHECKING:  # typeshed leaves these out

        def _maybe_pause_protocol(self) -> None: ...

        def _maybe_resume_protocol(self) -> None: ...

        def _set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...

    def _init_flow_control(self) -> None:
        """Not ``__init__``: asyncio's does not cooperate with other bases."""
        self._protocol_paused = False
        self._set_write_buffer_limits()

    def release_protocol(self) -> None:
        """Let a paused protocol write, because it is about to be replaced; its successor's first write pauses that."""
        if self._protocol_paused and self._protocol is not None:
            self._protocol_paused = False
            self._protocol.resume_writing()


class TakesBytes:
    """For a protocol that is a BufferedProtocol by descent and yet wants its data by ``data_received``."""

    __slots__ = ()
