"""Pipes on the loop: ``connect_read_pipe`` and ``connect_write_pipe``.

What a pipe is differs between the systems, so the transports stand in a file for each: unix_pipes.py.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from .proactor import Proactor

if sys.platform != "win32":
    from .unix_pipes import ReadPipeTransport, WritePipeTransport

__all__ = ["PipeMethods"]


class PipeMethods(asyncio.BaseEventLoop):
    """The part of the loop that makes pipe transports; BaseEventLoop's ``connect_..._pipe`` calls it."""

    _proactor: Proactor

    if sys.platform != "win32":

        def _make_read_pipe_transport(
            self,
            pipe: Any,
            protocol: asyncio.BaseProtocol,
            waiter: asyncio.Future[None] | None = None,
            extra: dict[str, Any] | None = None,
        ) -> ReadPipeTransport:
            return ReadPipeTransport(self, self._proactor, pipe, protocol, waiter, extra)

        def _make_write_pipe_transport(
            self,
            pipe: Any,
            protocol: asyncio.BaseProtocol,
            waiter: asyncio.Future[None] | None = None,
            extra: dict[str, Any] | None = None,
        ) -> WritePipeTransport:
            return WritePipeTransport(self, self._proactor, pipe, protocol, waiter, extra)
