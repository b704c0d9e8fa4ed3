"""create_connection: a short way for what most clients ask for, one literal address and nothing else.

BaseEventLoop looks names up, tries one address after the other or several at once, and binds a local one first.  To an
address that is known already there is nothing of this to do.
"""

from __future__ import annotations

import asyncio
import functools
import socket
from asyncio import base_events
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from ..system import NONBLOCKING

__all__ = ["ConnectingMethods"]

#: With the parameters of the running Python's own, so that a wrong call fails as it does there, before it is awaited.
_SHORT_WAY = """
async def create_connection(self, protocol_factory, host=None, port=None, *, {parameters}):
    if type(host) is str and type(port) is int and {plain} and not self.get_debug():
        known = literal(host, port)
        if known is not None:
            return await self._connect_to(protocol_factory, *known)
    return await super(this_class, self).create_connection(protocol_factory, host, port, {options})
"""


class ConnectingMethods(asyncio.BaseEventLoop):
    """The part of the loop that makes connections of the Internet."""

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


def _short_way(whole: Any) -> Callable[..., Any]:
    """create_connection: as `whole`, which is BaseEventLoop's; by the short way where every option is the default.

    Not in debug mode, which logs its steps.
    """
    defaults = whole.__kwdefaults__
    source = _SHORT_WAY.format(
        parameters=", ".join(f"{name}=None" for name in defaults),
        plain=" and ".join(f"{name} is default_{name}" for name in defaults),
        options=", ".join(f"{name}={name}" for name in defaults),
    )
    names = {f"default_{name}": default for name, default in defaults.items()}
    names |= {"__name__": __name__, "this_class": ConnectingMethods, "literal": _literal}
    exec(compile(source, f"<create_connection in {__name__}>", "exec"), names)  # of names that asyncio has chosen
    function: Any = functools.wraps(whole)(names["create_connection"])
    function.__kwdefaults__ = dict(defaults)
    return cast("Callable[..., Any]", function)


# What it takes is for the running Python to say, and for the type checker typeshed.  Where somebody has put another in
# its place (tools that trace do), that one is heard, for each connection.
if not TYPE_CHECKING and getattr(asyncio.BaseEventLoop.create_connection, "__kwdefaults__", None):
    ConnectingMethods.create_connection = _short_way(asyncio.BaseEventLoop.create_connection)
