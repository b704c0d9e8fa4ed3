"""create_connection: a short way for what most clients ask for, one literal address and nothing else.

BaseEventLoop looks names up, tries one address after the other or several at once, and binds a local one first.  To an
address that is known already there is nothing of this to do.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import socket
from asyncio import base_events
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..system import NONBLOCKING

__all__ = ["ConnectingMethods"]

#: What BaseEventLoop does if it is not told otherwise.
_DEFAULTS = {
    name: one.default
    for name, one in inspect.signature(asyncio.BaseEventLoop.create_connection).parameters.items()
    if one.kind is one.KEYWORD_ONLY
}


class ConnectingMethods(asyncio.BaseEventLoop):
    """The part of the loop that makes connections of the Internet."""

    if not TYPE_CHECKING:  # what it takes is for the running Python to say, and for the type checker typeshed

        @functools.wraps(asyncio.BaseEventLoop.create_connection)
        async def create_connection(self, protocol_factory, host=None, port=None, **options):
            """As BaseEventLoop's, by the short way where that applies; not in debug mode, which logs its steps."""
            plain = type(host) is str and type(port) is int and options.items() <= _DEFAULTS.items()
            if plain and not self.get_debug():
                known = _literal(host, port)
                if known is not None:
                    return await self._connect_to(protocol_factory, *known)
            return await super().create_connection(protocol_factory, host, port, **options)

    async def _connect_to(
        self, protocol_factory: Callable[[], asyncio.BaseProtocol], family: int, kind: int, proto: int, address: Any
    ) -> tuple[asyncio.BaseTransport, Any]:
        sock = socket.socket(family, kind, proto)
        try:
            if not NONBLOCKING:
                sock.setblocking(False)
            await self.sock_connect(sock, address)
        except BaseException:
            sock.close()
            raise
        return await self._make_plain_connection(sock, protocol_factory)  # type: ignore[attr-defined, no-any-return]  # the loop's


@functools.lru_cache(maxsize=512)
def _literal(host: str, port: int) -> tuple[int, int, int, Any] | None:
    """Family, type, protocol and address, as asyncio itself reads a literal host; None: it is a name."""
    read: Any = base_events._ipaddr_info  # type: ignore[attr-defined]  # not in typeshed
    info = read(host, port, socket.AF_UNSPEC, socket.SOCK_STREAM, 0)
    if info is None:
        return None
    family, kind, proto, _, address = info
    return int(family), int(kind) | NONBLOCKING, int(proto), address
