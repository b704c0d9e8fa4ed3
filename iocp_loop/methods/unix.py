"""UNIX stream sockets: create_unix_connection and create_unix_server.

Linux also has *abstract* names, which begin with a NUL and leave no file behind.  A name in the file system does leave
one: what a crashed server left is removed before binding, and since Python 3.13 a server removes its own when it
closes, if the file is still the one that it made.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import ssl
import stat
import sys
from asyncio import base_events
from collections.abc import Callable
from typing import Any

from ..system import NONBLOCKING, system

__all__ = ["UnixMethods"]

_logger = logging.getLogger("asyncio")

_Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]
_Factory = Callable[[], asyncio.BaseProtocol]


class UnixMethods(asyncio.BaseEventLoop):
    """The part of the loop that connects to and listens on UNIX sockets.

    Where the system or its Python has none, every method raises NotImplementedError.
    """

    def __init__(self) -> None:
        super().__init__()
        #: listening socket -> the file that it made and is to remove, and the file's inode
        self._socket_files: dict[socket.socket, tuple[Any, int]] = {}

    async def create_unix_connection(
        self,
        protocol_factory: _Factory,
        path: _Path | None = None,
        *,
        ssl: ssl.SSLContext | bool | None = None,
        sock: socket.socket | None = None,
        server_hostname: str | None = None,
        ssl_handshake_timeout: float | None = None,
        ssl_shutdown_timeout: float | None = None,
    ) -> tuple[asyncio.Transport, Any]:
        """Connect to the UNIX socket at `path`, or take the connected `sock`; ``(transport, protocol)``.

        Parameters and errors as for ``asyncio.loop.create_unix_connection``.
        """
        if ssl:
            if server_hostname is None:
                raise ValueError("you have to pass server_hostname when using ssl")
        elif server_hostname is not None:
            raise ValueError("server_hostname is only meaningful with ssl")
        _check_timeouts(ssl, ssl_handshake_timeout, ssl_shutdown_timeout)
        if path is not None:
            if sock is not None:
                raise ValueError("path and sock can not be specified at the same time")
            sock = _new_socket()
            try:
                await self.sock_connect(sock, os.fspath(path))
            except BaseException:
                sock.close()
                raise
            if not ssl:
                return await self._make_plain_connection(sock, protocol_factory)  # type: ignore[attr-defined, no-any-return]  # the loop's
        else:
            if sock is None:
                raise ValueError("no path and sock were specified")
            _check_family(sock)
            sock.setblocking(False)
        connection: tuple[asyncio.Transport, Any] = await self._create_connection_transport(  # type: ignore[attr-defined]  # BaseEventLoop's
            sock,
            protocol_factory,
            ssl,
            server_hostname,
            ssl_handshake_timeout=ssl_handshake_timeout,
            ssl_shutdown_timeout=ssl_shutdown_timeout,
        )
        return connection

    if sys.version_info >= (3, 13):

        async def create_unix_server(
            self,
            protocol_factory: _Factory,
            path: _Path | None = None,
            *,
            sock: socket.socket | None = None,
            backlog: int = 100,
            ssl: ssl.SSLContext | bool | None = None,
            ssl_handshake_timeout: float | None = None,
            ssl_shutdown_timeout: float | None = None,
            start_serving: bool = True,
            cleanup_socket: bool = True,
        ) -> asyncio.Server:
            """Listen on the UNIX socket `path`, or on the bound `sock`; the Server.

            Parameters and errors as for ``asyncio.loop.create_unix_server``.
            """
            return await self._create_unix_server(
                protocol_factory,
                path,
                sock,
                backlog,
                ssl,
                ssl_handshake_timeout,
                ssl_shutdown_timeout,
                start_serving,
                cleanup_socket,
            )

    else:

        async def create_unix_server(
            self,
            protocol_factory: _Factory,
            path: _Path | None = None,
            *,
            sock: socket.socket | None = None,
            backlog: int = 100,
            ssl: ssl.SSLContext | bool | None = None,
            ssl_handshake_timeout: float | None = None,
            ssl_shutdown_timeout: float | None = None,
            start_serving: bool = True,
        ) -> asyncio.Server:
            """Listen on the UNIX socket `path`, or on the bound `sock`; the Server.

            Parameters and errors as for ``asyncio.loop.create_unix_server``.  The socket's file stays when the server
            closes, as with asyncio's own loop before Python 3.13.
            """
            return await self._create_unix_server(
                protocol_factory,
                path,
                sock,
                backlog,
                ssl,
                ssl_handshake_timeout,
                ssl_shutdown_timeout,
                start_serving,
                False,
            )

    async def _create_unix_server(
        self,
        protocol_factory: _Factory,
        path: _Path | None,
        sock: socket.socket | None,
        backlog: int,
        ssl: ssl.SSLContext | bool | None,
        ssl_handshake_timeout: float | None,
        ssl_shutdown_timeout: float | None,
        start_serving: bool,
        cleanup_socket: bool,
    ) -> asyncio.Server:
        if isinstance(ssl, bool):
            raise TypeError("ssl argument must be an SSLContext or None")
        _check_timeouts(ssl, ssl_handshake_timeout, ssl_shutdown_timeout)
        if path is not None:
            if sock is not None:
                raise ValueError("path and sock can not be specified at the same time")
            sock = _bound_socket(os.fspath(path))
        else:
            if sock is None:
                raise ValueError("path was not specified, and no sock specified")
            _check_family(sock)
            sock.setblocking(False)
        if cleanup_socket:
            self._remember_socket_file(sock)
        make: Any = base_events.Server  # not made by its users, so typeshed has no parameters for it
        server = make(self, [sock], protocol_factory, ssl, backlog, ssl_handshake_timeout, ssl_shutdown_timeout)
        if start_serving:
            server._start_serving()
            await asyncio.sleep(0)
        return server  # type: ignore[no-any-return]  # as above

    def _remember_socket_file(self, sock: socket.socket) -> None:
        name = sock.getsockname()
        if _has_file(name):
            try:
                self._socket_files[sock] = name, system.stat(name).st_ino
            except FileNotFoundError:
                pass

    def _remove_socket_file(self, sock: socket.socket) -> None:
        """Remove the file of a listening socket, if it is one of ours and nobody has replaced it."""
        name, inode = self._socket_files.pop(sock, (None, 0))
        if name is None:
            return
        try:
            if system.stat(name).st_ino == inode:
                system.unlink(name)
        except FileNotFoundError:
            pass
        except OSError as exc:
            _logger.error("Unable to clean up listening UNIX socket %r: %r", name, exc)


def _new_socket() -> socket.socket:
    family = getattr(socket, "AF_UNIX", None)
    if family is None:
        raise NotImplementedError("this Python has no UNIX sockets (there is no socket.AF_UNIX)")
    try:
        sock = socket.socket(family, socket.SOCK_STREAM | NONBLOCKING)
    except OSError as exc:
        if exc.errno != errno.EAFNOSUPPORT:
            raise
        # Windows has them since version 10.0.17063; a Python that knows them may run on an older one.
        raise NotImplementedError("this system has no UNIX sockets") from exc
    if not NONBLOCKING:
        sock.setblocking(False)
    return sock


def _check_family(sock: socket.socket) -> None:
    if sock.family != getattr(socket, "AF_UNIX", None) or sock.type != socket.SOCK_STREAM:
        raise ValueError(f"A UNIX Domain Stream Socket was expected, got {sock!r}")


def _check_timeouts(ssl: Any, handshake: float | None, shutdown: float | None) -> None:
    if ssl:
        return
    if handshake is not None:
        raise ValueError("ssl_handshake_timeout is only meaningful with ssl")
    if shutdown is not None:
        raise ValueError("ssl_shutdown_timeout is only meaningful with ssl")


def _has_file(name: str | bytes) -> bool:
    """False for an abstract name, and for a socket that was never bound."""
    return bool(name) and name[0] not in (0, "\0")


def _bound_socket(path: str | bytes) -> socket.socket:
    sock = _new_socket()
    if _has_file(path):
        _remove_stale_file(path)
    try:
        sock.bind(path)
    except OSError as exc:
        sock.close()
        if exc.errno == errno.EADDRINUSE:
            raise OSError(errno.EADDRINUSE, f"Address {path!r} is already in use") from None
        raise
    except BaseException:
        sock.close()
        raise
    return sock


def _is_socket_file(status: os.stat_result) -> bool:
    # winnt.h: IO_REPARSE_TAG_AF_UNIX.  Windows has no type for such files.
    return stat.S_ISSOCK(status.st_mode) or getattr(status, "st_reparse_tag", 0) == 0x80000023


def _remove_stale_file(path: str | bytes) -> None:
    """Remove the socket file that stands where a server wants to bind; anything else that stands there is left."""
    try:
        if _is_socket_file(system.stat(path)):
            system.remove(path)
    except FileNotFoundError:
        pass
    except OSError as exc:
        # The directory may allow making files in it and nothing else; binding tells.
        _logger.error("Unable to check or remove stale UNIX socket %r: %r", path, exc)
