"""Pipes on the loop: ``connect_read_pipe`` and ``connect_write_pipe``, and named pipes on Windows.

What a pipe is differs between the systems, so the transports stand in a file for each: pipes/unix.py, pipes/windows.py;
what they share stands in pipes/transports.py.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from ..proactor import Proactor

if sys.platform == "win32":
    from ..operations import AcceptPipe
    from ..pipes import named as named_pipes
    from ..pipes.channels import PATIENCE, BlockingChannel, Channel, open_channel
    from ..pipes.windows import DuplexPipeTransport, ReadPipeTransport, WritePipeTransport
else:
    from ..pipes.unix import ReadPipeTransport, WritePipeTransport

__all__ = ["PipeMethods"]

_Protocol = TypeVar("_Protocol", bound=asyncio.BaseProtocol)


class PipeMethods(asyncio.BaseEventLoop):
    """The part of the loop that makes pipe transports; BaseEventLoop's ``connect_..._pipe`` calls it."""

    _proactor: Proactor

    def _make_read_pipe_transport(
        self,
        pipe: Any,
        protocol: asyncio.BaseProtocol,
        waiter: asyncio.Future[None] | None = None,
        extra: dict[str, Any] | None = None,
    ) -> ReadPipeTransport:
        return ReadPipeTransport(self, self._what_serves(pipe), pipe, protocol, waiter, extra)

    def _make_write_pipe_transport(
        self,
        pipe: Any,
        protocol: asyncio.BaseProtocol,
        waiter: asyncio.Future[None] | None = None,
        extra: dict[str, Any] | None = None,
    ) -> WritePipeTransport:
        return WritePipeTransport(self, self._what_serves(pipe), pipe, protocol, waiter, extra)

    if sys.platform != "win32":

        def _what_serves(self, pipe: Any) -> Proactor:
            return self._proactor

        def _close_pipes(self) -> None:
            """For ``close``, before the port is closed: nothing serves a pipe but the port."""

    else:

        def __init__(self) -> None:
            super().__init__()
            #: channels whose thread is in a call that blocks
            self._busy_channels: set[BlockingChannel] = set()

        def _what_serves(self, pipe: Any) -> Channel:
            return open_channel(self, self._proactor, pipe, self._busy_channels)

        def _close_pipes(self) -> None:
            """For ``close``, before the port is closed: end the threads that serve pipes, within bounds."""
            for channel in list(self._busy_channels):
                channel.end(PATIENCE)

        async def create_pipe_connection(
            self, protocol_factory: Callable[[], _Protocol], address: str
        ) -> tuple[DuplexPipeTransport, _Protocol]:
            r"""Connect to the named pipe `address` (``\\.\pipe\name``): ``(transport, protocol)``.

            Waits while the server has no instance free.  FileNotFoundError if nobody serves that name.
            ``transport.get_extra_info("addr")`` is `address`.
            """
            self._check_named_pipes()
            pipe = await named_pipes.connect(address)
            waiter = self.create_future()
            try:
                protocol = protocol_factory()
                transport = self._make_duplex_pipe_transport(pipe, protocol, address, waiter)
            except BaseException:
                pipe.close()
                raise
            try:
                await waiter
            except BaseException:
                transport.close()
                raise
            return transport, protocol

        async def start_serving_pipe(
            self, protocol_factory: Callable[[], asyncio.BaseProtocol], address: str
        ) -> list[named_pipes.PipeServer]:
            r"""Serve the named pipe `address` (``\\.\pipe\name``), a protocol of `protocol_factory` for each client.

            The list of one server, whose ``close()`` ends it.  Clients can connect when this returns.  PermissionError
            if there is a server of that name already.
            """
            self._check_named_pipes()

            def welcome(pipe: Any) -> None:
                self._make_duplex_pipe_transport(pipe, protocol_factory(), address)

            return [named_pipes.PipeServer(self, self._proactor, address, welcome)]

        def _check_named_pipes(self) -> None:
            if AcceptPipe not in self._proactor.driver.kinds:
                raise NotImplementedError(f"driver {self._proactor.driver.name} has no named pipes; iocp has")

        def _make_duplex_pipe_transport(
            self,
            pipe: Any,
            protocol: asyncio.BaseProtocol,
            address: str,
            waiter: asyncio.Future[None] | None = None,
        ) -> DuplexPipeTransport:
            extra = {"addr": address}
            return DuplexPipeTransport(self, self._what_serves(pipe), pipe, protocol, waiter, extra)
