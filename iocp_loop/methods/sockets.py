"""The loop's methods on plain sockets: ``sock_recv``, ``sock_sendall``, ``sock_accept`` and their kin.

Each tries the call at once, because a socket is often ready; what would block becomes an operation.  Sockets must be
non-blocking and stay the caller's: nobody else closes them.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
import sys
import weakref
from typing import Any, TypeVar

from ..endpoints.sendfile import copy_file, send_file
from ..native import hot
from ..operations import READABLE, WRITABLE, HandleLike, connect_error, family_of, fileno
from ..ports.accepting import accept_now
from ..proactor import Proactor

__all__ = ["SocketMethods"]

_T = TypeVar("_T")

_WOULD_BLOCK = (BlockingIOError, InterruptedError)

#: The native tier's ways; what they answer with None is not the plain case.
_receive_datagram: Any = getattr(hot, "receive_datagram", None)
_send_datagram: Any = getattr(hot, "send_datagram", None)
_connect: Any = getattr(hot, "connect", None)


class SocketMethods(asyncio.BaseEventLoop):
    """The part of the loop that works on sockets without transports.

    Every method raises TypeError for an SSLSocket, ValueError for a blocking socket in debug mode, and RuntimeError for
    a socket that a transport of this loop uses.
    """

    _proactor: Proactor
    #: The open transports by descriptor, so that nobody else reads from or writes to what they own.
    _transports: weakref.WeakValueDictionary[int, asyncio.BaseTransport]
    #: What is in it: to look at this costs no frames.
    _transport_refs: dict[int, weakref.ref[asyncio.BaseTransport]]
    #: The native tier's way for the plain case (``_native/hot/sockets.c``), or None.
    _quick: Any = None

    def _prepare_quick_calls(self) -> None:
        if hot is not None and hasattr(hot, "socket_calls"):
            self._quick = hot.socket_calls(
                self,
                self._proactor,
                self._proactor.driver,
                self._proactor._kept,
                self._proactor._lines,
                self._transport_refs,
            )

    def _check_sock(self, sock: socket.socket) -> None:
        if isinstance(sock, ssl.SSLSocket):
            raise TypeError("Socket cannot be of type SSLSocket")
        if self.get_debug() and sock.gettimeout() != 0:
            raise ValueError("the socket must be non-blocking")

    def _ensure_fd_no_transport(self, handle: HandleLike) -> None:
        """Refuse a descriptor that belongs to an open transport (RuntimeError) or is none at all (ValueError)."""
        fd = fileno(handle)
        transport = self._transports.get(fd)
        if transport is None or transport.is_closing():
            return
        if transport.get_extra_info("socket").fileno() == fd:
            raise RuntimeError(f"File descriptor {handle!r} is used by transport {transport!r}")
        del self._transports[fd]  # its socket was closed behind its back, and the number means something else now

    def _close_socket_of(self, transport: asyncio.BaseTransport, sock: socket.socket) -> None:
        """Close the socket of a transport, which is not to be found by its number any more."""
        fd = sock.fileno()
        known = self._transport_refs.get(fd)
        if known is not None and known() is transport:
            del self._transport_refs[fd]
        sock.close()

    def _goes_first(self, sock: socket.socket) -> bool:
        """Whether a receive or an accept may be tried at once: nobody waits for one, nothing is kept for the next."""
        return not self._proactor.claims(sock) and not self._proactor.busy(sock, READABLE)

    async def _keeping(self, future: asyncio.Future[_T]) -> _T:
        """Await `future`; its result is for the next caller if we are given up in the turn in which it comes."""
        future.kept = True  # type: ignore[attr-defined]  # it is an operation's
        try:
            return await future
        except BaseException:  # cancelled, closed, or something was thrown in
            self._proactor.keep(future)
            future.cancel()
            raise
        finally:
            self._proactor.taken(future)

    async def sock_recv(self, sock: socket.socket, n: int) -> bytes:
        """Receive at most `n` bytes; empty at the end of the stream."""
        quick = self._quick
        if quick is not None:
            got = quick.receive(sock, n)
            if type(got) is bytes:
                return got
            if got is not None:
                return await got  # type: ignore[no-any-return]  # made in C
        self._check_sock(sock)
        if self._goes_first(sock):
            try:
                return sock.recv(n)
            except _WOULD_BLOCK:
                pass
        self._ensure_fd_no_transport(sock)
        return await self._keeping(self._proactor.recv(sock, n))

    async def sock_recv_into(self, sock: socket.socket, buf: Any) -> int:
        """Receive into a writable buffer; the number of bytes, 0 at the end of the stream."""
        self._check_sock(sock)
        if self._goes_first(sock):
            try:
                return sock.recv_into(buf)
            except _WOULD_BLOCK:
                pass
        self._ensure_fd_no_transport(sock)
        return await self._keeping(self._proactor.recv_into(sock, buf))

    async def sock_recvfrom(self, sock: socket.socket, bufsize: int) -> tuple[bytes, Any]:
        """Receive one datagram of at most `bufsize` bytes: ``(bytes, address)``."""
        self._check_sock(sock)
        if self._goes_first(sock):
            try:
                received = None if _receive_datagram is None else _receive_datagram(sock, bufsize)
                if received is None:
                    received = sock.recvfrom(bufsize)
                if received:
                    return received
            except _WOULD_BLOCK:
                pass
        self._ensure_fd_no_transport(sock)
        return await self._keeping(self._proactor.recvfrom(sock, bufsize))

    async def sock_recvfrom_into(self, sock: socket.socket, buf: Any, nbytes: int = 0) -> tuple[int, Any]:
        """Receive one datagram of at most `nbytes` bytes (0: as many as fit) into a buffer: ``(count, address)``."""
        self._check_sock(sock)
        view = memoryview(buf).cast("B")
        if nbytes < 0 or nbytes > len(view):
            raise ValueError(f"nbytes must be between 0 and the size of the buffer, {len(view)}, not {nbytes}")
        if nbytes:
            view = view[:nbytes]
        if self._goes_first(sock):
            try:
                return sock.recvfrom_into(view)
            except _WOULD_BLOCK:
                pass
        self._ensure_fd_no_transport(sock)
        return await self._keeping(self._proactor.recvfrom_into(sock, view))

    async def sock_sendall(self, sock: socket.socket, data: Any) -> None:
        """Send all of `data`."""
        quick = self._quick
        sent = None if quick is None else quick.send(sock, data)
        if sent is None:
            self._check_sock(sock)
            try:
                sent = 0 if self._proactor.busy(sock, WRITABLE) else sock.send(data)
            except _WOULD_BLOCK:
                sent = 0
        if type(data) is bytes and sent == len(data):
            return
        view = memoryview(data)
        if sent < view.nbytes:
            self._ensure_fd_no_transport(sock)
            await self._proactor.sendall(sock, view.cast("B")[sent:])

    async def sock_sendto(self, sock: socket.socket, data: Any, address: Any) -> int:
        """Send one datagram to `address`; the number of bytes."""
        self._check_sock(sock)
        if not self._proactor.busy(sock, WRITABLE):
            try:
                sent = None if _send_datagram is None else _send_datagram(sock, sock.family, data, address)
                if sent is None:
                    return sock.sendto(data, address)
                if sent:
                    return len(data)
            except _WOULD_BLOCK:
                pass
        self._ensure_fd_no_transport(sock)
        if sock.family == getattr(socket, "AF_UNIX", None):
            return await self._send_to_unix(sock, data, address)
        return await self._proactor.sendto(sock, data, address)

    async def _send_to_unix(self, sock: socket.socket, data: Any, address: Any) -> int:
        """Send one datagram when the receiver has room.  A socket without a peer is always writable: no event tells."""
        delay = 0.001
        while True:
            await asyncio.sleep(delay)
            try:
                return sock.sendto(data, address)
            except _WOULD_BLOCK:
                delay = min(2 * delay, 0.1)

    async def sock_connect(self, sock: socket.socket, address: Any) -> None:
        """Connect to `address`, resolving it first where the family has names."""
        done = None if _connect is None else _connect(sock, address)
        if done is not None:
            if done is not True:
                await self._connected(sock, address, done)
            return
        self._check_sock(sock)
        family = family_of(sock)
        if family in (socket.AF_INET, socket.AF_INET6):
            resolved = await self._ensure_resolved(  # type: ignore[attr-defined]  # BaseEventLoop's
                address, family=sock.family, type=sock.type, proto=sock.proto, loop=self
            )
            _, _, _, _, address = resolved[0]
            if sys.platform == "linux":
                if not _connect_now(sock, address):
                    await self._proactor.connect(sock, address, begun=True)
                return
        elif family == getattr(socket, "AF_UNIX", None):
            await self._connect_unix(sock, address)
            return
        await self._proactor.connect(sock, address)

    async def _connected(self, sock: socket.socket, address: Any, code: int) -> None:
        """Wait for the end of a connect that has begun; or `code` is its error, if that is known."""
        if code:
            raise connect_error(code, address)
        await self._proactor.connect(sock, address, begun=True)

    async def _connect_unix(self, sock: socket.socket, address: Any) -> None:
        """Connect a UNIX socket: done at once, unless the listener's backlog is full; no event tells when it is not."""
        delay = 0.001
        while True:
            try:
                sock.connect(address)
            except BlockingIOError:
                await asyncio.sleep(delay)
                delay = min(2 * delay, 0.1)
            else:
                return

    async def sock_accept(self, sock: socket.socket) -> tuple[socket.socket, Any]:
        """Accept one connection: ``(socket, address)``; the socket is non-blocking."""
        self._check_sock(sock)
        if self._goes_first(sock):
            try:
                return accept_now(sock)
            except _WOULD_BLOCK:
                pass
        self._ensure_fd_no_transport(sock)
        return await self._keeping(self._proactor.accept(sock))

    async def _sock_sendfile_native(self, sock: socket.socket, file: Any, offset: int, count: int | None) -> int:
        # What BaseEventLoop.sock_sendfile tries first.
        self._ensure_fd_no_transport(sock)
        return await send_file(self._proactor.submit, sock, file, offset, count)

    async def _sock_sendfile_fallback(self, sock: socket.socket, file: Any, offset: int, count: int | None) -> int:
        # What it does if that is not available.
        self._ensure_fd_no_transport(sock)
        return await copy_file(self._proactor.submit, sock, file, offset, count)


def _connect_now(sock: socket.socket, address: Any) -> bool:
    """Connect to a resolved address.  True if that is done, as it is on the own machine; False if it has begun.

    The first call begins.  The second tells what has become of it: on Linux the answer of the own machine comes within
    the first, but after it was decided what that returns.
    """
    try:
        sock.connect(address)
    except _WOULD_BLOCK as begun:
        if begun.errno == errno.EAGAIN:
            raise  # no port is left: nothing has begun
    else:
        return True
    try:
        sock.connect(address)
    except _WOULD_BLOCK:
        return False
    except OSError as error:
        if error.errno != errno.EISCONN:
            raise connect_error(error.errno, address) from None
    return True
