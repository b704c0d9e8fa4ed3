"""Names of hosts and services: what is a number already needs no thread.

Looking a name up may take seconds, so BaseEventLoop leaves it to the executor.  A numeric host with a numeric port only
has to be read, by the very same function of the system: AI_NUMERICHOST forbids it to ask anybody.
"""

from __future__ import annotations

import asyncio
import functools
import re
import socket
from collections.abc import Callable
from typing import Any

__all__ = ["NameMethods"]

#: Whether a host may be numeric: ``127.1`` and ``0x7f.1`` are, ``1.example.org`` turns out not to be.
_may_be_numeric = re.compile("[0-9]|[0-9a-fA-F]*:").match


class NameMethods(asyncio.BaseEventLoop):
    """The part of the loop that looks up names."""

    async def getaddrinfo(
        self,
        host: bytes | str | None,
        port: bytes | str | int | None,
        *,
        family: int = 0,
        type: int = 0,
        proto: int = 0,
        flags: int = 0,
    ) -> list[Any]:
        """As :func:`socket.getaddrinfo`, in the executor unless host and port are numeric.

        In debug mode always there, where it is logged and timed.
        """
        if not self.get_debug() and _is_numeric(host, port) and isinstance(flags, int):
            self._check_closed()  # type: ignore[attr-defined]  # BaseEventLoop's
            # What a plain address means never changes; that of an interface does, and that of the own host.
            read = _read if flags or host is None or "%" in str(host) else _remember
            try:
                return list(read(socket.getaddrinfo, host, port, family, type, proto, flags))
            except OSError:
                pass  # a name after all, or an error, which the same call without the flag is to tell
        return await super().getaddrinfo(host, port, family=family, type=type, proto=proto, flags=flags)


def _is_numeric(host: object, port: object) -> bool:
    """Whether both are numbers, or not given.  The host may turn out to be a name all the same."""
    if isinstance(host, bytes):
        host = host.decode("latin-1")
    if host is not None and not (isinstance(host, str) and _may_be_numeric(host)):
        return False
    # None of the functions of the C library looks up a service that is a number.
    return (
        port is None or isinstance(port, int) or (isinstance(port, (str, bytes)) and port.isdigit() and port.isascii())
    )


def _read(
    look_up: Callable[..., list[Any]],
    host: Any,
    port: Any,
    family: int,
    type: int,
    proto: int,
    flags: int,
) -> list[Any]:
    return look_up(host, port, family, type, proto, flags | socket.AI_NUMERICHOST)


#: Of `look_up` too: somebody may put a function of his own in the place of ``socket.getaddrinfo``.
_remember = functools.lru_cache(maxsize=512, typed=True)(_read)
