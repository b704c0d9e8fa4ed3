"""The datagram transport: UDP over IPv4 and IPv6, and UNIX datagram sockets.

Receiving is one stream.  A datagram that could not be delivered somewhere comes back as an error of a later receive
(port unreachable); it ends the stream, the protocol is told by ``error_received``, and the stream is armed again.

``sendto`` tries at once.  What would block is queued; the datagram at the head of the queue is a ``SendTo`` operation.
A datagram that fails is reported and forgotten, and the next one has its turn: nothing can block the queue for good.
"""

from __future__ import annotations

import asyncio
import contextvars
import errno
import functools
import socket
from asyncio import trsock
from collections import deque
from collections.abc import Iterable
from typing import Any

from .. import operations as ops
from ..flow import FlowControl
from ..life import CLOSING, LOST, MADE, Life
from ..native import hot
from ..operations import was_cancelled
from ..proactor import Proactor

__all__ = ["DatagramTransport"]

#: Bytes of the largest datagram.  The length field of IP has 16 bits; UNIX sockets are limited by their send buffer.
_MOST_INET = 64 * 1024
_MOST_UNIX = 256 * 1024

#: What a queued datagram counts beside its data, bytes: so that empty ones fill the buffer too.
_HEADER = 8

#: Seconds between two tries to send where no event tells that there is room again.
_RETRY_DELAY = 0.005

#: The native tier's way to send a plain datagram (``_native/hot/datagrams.c``), or None.
_send_natively: Any = getattr(hot, "send_datagram", None)

#: The socket is gone, or never was one: arming the receive again would fail for ever.
_HOPELESS = frozenset({errno.EBADF, errno.ENOTSOCK})

#: WSAEINVAL, the `winerror` of a socket without an address (winsock/windows-sockets-error-codes-2).
_WSA_INVALID = 10022


class DatagramTransport(Life, FlowControl, asyncio.DatagramTransport):
    """A datagram socket as an asyncio transport.

    `address`: where every datagram goes; None: where ``sendto`` says, or where the socket is connected.
    """

    _extra: dict[str, Any]

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        proactor: Proactor,
        sock: socket.socket,
        protocol: asyncio.BaseProtocol,
        address: Any = None,
        waiter: asyncio.Future[None] | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        self._proactor = proactor
        self._sock = sock
        self._family = int(sock.family)
        self._address = address
        self._receive: ops.ReceiveFromStream | None = None
        self._sending: ops.SendTo | None = None  # the datagram at the head of the queue, while it is in flight
        self._retry: asyncio.TimerHandle | None = None
        self._queue: deque[tuple[Any, Any]] = deque()  # data and address
        self._queued = 0  # bytes in _queue, with a header for each datagram
        super().__init__(loop, protocol, waiter, extra)
        self._init_flow_control()
        self._describe(sock)

    def _describe(self, sock: socket.socket) -> None:
        info = self._extra
        info["socket"] = trsock.TransportSocket(sock)
        for name, ask in (("sockname", sock.getsockname), ("peername", sock.getpeername)):
            if name not in info:
                try:
                    info[name] = ask()
                except OSError:
                    info[name] = None
        self._connected = info["peername"] is not None

    def _details(self) -> str:
        return f"fd={self._sock.fileno()} unsent={self._queued}"

    def _tell_error(self, error: OSError) -> None:
        """Call ``error_received``, in the context of the caller: that of receiving, or of whoever sends.

        If it fails, that is reported, and the endpoint lives on.
        """
        try:
            self._protocol.error_received(error)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:
            self._report(exc, "Exception in protocol.error_received()")

    # -- receiving ---------------------------------------------------------------------------------

    def _start(self) -> None:
        if self._receive is not None or self._state >= CLOSING:
            return  # whatever the protocol has sent meanwhile has armed it; or has closed
        most = _MOST_INET if self._sock.family in (socket.AF_INET, socket.AF_INET6) else _MOST_UNIX
        try:
            self._receive = self._proactor.receive_from_stream(self._sock, most, self._received)
        except (OSError, ValueError) as exc:  # ValueError: somebody has closed it
            self._fatal_error(exc, "Fatal read error on datagram transport")

    def _received(self, value: Any, error: BaseException | None) -> None:
        if error is not None:
            self._receive_ended(error)
        elif self._state < CLOSING:
            try:
                self._context.run(self._protocol.datagram_received, *value)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as exc:
                self._report(exc, "Exception in protocol.datagram_received()")

    def _receive_ended(self, error: BaseException) -> None:
        self._receive = None
        if self._state >= CLOSING:
            self._release()
        elif not isinstance(error, OSError) or error.errno in _HOPELESS:
            self._context.run(self._fatal_error, error, "Fatal read error on datagram transport")
        elif getattr(error, "winerror", None) == _WSA_INVALID:
            pass  # Windows does not receive on a socket without an address; sending gives it one, see _after_sending
        elif not was_cancelled(error):  # that would be the loop closing under us
            self._context.run(self._tell_error, error)
            self._start()

    # -- sending -----------------------------------------------------------------------------------

    def get_write_buffer_size(self) -> int:
        """How many bytes the kernel has not taken yet, with 8 more for each datagram."""
        return self._queued

    def sendto(self, data: Any, addr: Any = None) -> None:
        """Send one datagram (bytes, bytearray or memoryview; it may be empty) without blocking, or queue it.

        `addr` None: to where the endpoint's remote address is.  Raises TypeError for other data, ValueError if the
        endpoint has a remote address and `addr` is another one.  OSErrors go to ``error_received``.
        """
        if type(data) is not bytes and not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"data argument must be a bytes-like object, not {type(data).__name__!r}")
        if self._address is not None:
            if addr is not None and addr != self._address:
                raise ValueError(f"Invalid address: must be None or {self._address}")
            addr = self._address
        if self._state >= LOST:
            self._count_late_write()
            return
        if not self._queue and self._try_to_send(data, addr):
            return
        # A copy, unless it is immutable: the caller may reuse its buffer.
        self._queue.append((data if type(data) is bytes else bytes(data), addr))
        self._queued += len(self._queue[-1][0]) + _HEADER
        if self._sending is None and len(self._queue) == 1:
            self._submit_head()
        self._maybe_pause_protocol()

    def _try_to_send(self, data: Any, addr: Any) -> bool:
        """Send one datagram now; False if that would block.  A failure is reported."""
        try:
            sent = None
            if _send_natively is not None and (addr is not None or self._connected):
                sent = _send_natively(self._sock, self._family, data, None if self._connected else addr)
            if sent is False:
                return False
            if sent is None:
                if self._connected:
                    self._sock.send(data)
                else:
                    self._sock.sendto(data, addr)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as exc:
            self._tell_error(exc)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:  # the address makes no sense
            self._fatal_error(exc, "Fatal write error on datagram transport")
        else:
            self._after_sending()
        return True

    def _after_sending(self) -> None:
        if self._receive is None and self._state is not MADE:
            self._start()  # the first datagram has bound the socket

    def _submit_head(self) -> None:
        if not self._connected and self._sock.family not in (socket.AF_INET, socket.AF_INET6):
            # A UNIX socket without a peer is always writable: it is the queue of the receiver that is full.
            self._retry = self._loop.call_later(_RETRY_DELAY, self._send_queue)
            return
        data, addr = self._queue[0]
        run: Any = contextvars.copy_context().run  # in the context of whoever sends, as on asyncio's own loops
        try:
            op = self._sending = ops.SendTo(self._sock, data, None if self._connected else addr)
            self._proactor.start(op, functools.partial(run, self._sent))
        except (OSError, ValueError) as exc:
            self._sending = None
            self._fatal_error(exc, "Fatal write error on datagram transport")

    def _sent(self, value: Any, error: BaseException | None) -> None:
        """The completion of the datagram at the head of the queue."""
        self._sending = None
        if self._state >= LOST:
            self._release()
            return
        if error is None:
            self._after_sending()
        elif was_cancelled(error):
            return  # the loop is closing under us
        elif isinstance(error, OSError):
            self._tell_error(error)
        else:  # the address makes no sense
            self._fatal_error(error, "Fatal write error on datagram transport")
            return
        self._forget_head()
        self._send_queue()

    def _send_queue(self) -> None:
        self._retry = None
        while self._queue and self._try_to_send(*self._queue[0]):
            self._forget_head()
        if self._queue:
            self._submit_head()
        self._maybe_resume_protocol()
        if self._state >= CLOSING and not self._queue:
            self._lose_connection(None)

    def _forget_head(self) -> None:
        if self._queue:  # the protocol may have called abort()
            data, _ = self._queue.popleft()
            self._queued -= len(data) + _HEADER

    # -- the end -----------------------------------------------------------------------------------

    def _is_sending(self) -> bool:
        return bool(self._queue)

    def abort(self) -> None:
        """Close at once; what is queued is dropped."""
        self._lose_connection(None)

    def _stop_receiving(self) -> None:
        if self._receive is not None:
            self._proactor.cancel(self._receive)

    def _stop(self) -> None:
        self._queue.clear()
        self._queued = 0
        if self._retry is not None:
            self._retry.cancel()
        if self._sending is not None:
            self._proactor.cancel(self._sending)
        self._stop_receiving()

    def _operations(self) -> Iterable[ops.Operation | None]:
        return self._receive, self._sending

    def _close_handle(self) -> None:
        self._loop._close_socket_of(self, self._sock)  # type: ignore[attr-defined]  # IocpEventLoop's own

    def _give_up(self) -> None:
        self._sock.close()
