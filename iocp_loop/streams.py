"""The way of one message through a stream transport, in and out: what runs for each of them, and nothing else."""

from __future__ import annotations

import contextvars
import socket
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

from . import operations as ops
from .debugging import DebugContext
from .flow import FlowControl
from .life import CLOSING, LifeBase
from .native import hot

__all__ = ["MOST_AT_ONCE", "PythonStream", "StreamBase"]

#: The most that is handed to one call of ``send``, bytes.  Windows takes all that it is given, where other systems take
#: what their buffer has room for: nobody would ever have to wait for a slow peer.
MOST_AT_ONCE = 256 * 1024 if sys.platform == "win32" else sys.maxsize
if hot is not None:
    hot.set_most_at_once(MOST_AT_ONCE)


class StreamBase(LifeBase, FlowControl):
    """What a stream transport stands on, on either tier."""

    __slots__ = ()


class PythonStream(StreamBase):
    """The way of one message in and out.  The native tier has it in C (``_native/hot/streams.c``)."""

    __slots__ = ("_context", "_direct", "_paused", "_protocol", "_sock", "_state")

    if TYPE_CHECKING:  # the rest of the transport: SocketTransport's
        _context: contextvars.Context | DebugContext
        _direct: bool
        _paused: bool
        _sock: socket.socket

        def _copy_to_protocol(self, data: memoryview) -> None: ...
        def _enqueue(self, buffers: Iterable[Any]) -> None: ...
        def _hold(self, data: memoryview) -> None: ...
        def _receive_ended(self, error: BaseException | None) -> None: ...
        def _receiving_failed(self, exc: BaseException, message: str) -> None: ...
        def _write_otherwise(self, data: Any) -> None: ...

    def write(self, data: Any) -> None:
        """Send `data` (bytes, bytearray or memoryview) without blocking; the rest is queued."""
        if not self._direct or type(data) is not bytes:
            self._write_otherwise(data)
            return
        try:
            sent = self._sock.send(data if len(data) <= MOST_AT_ONCE else memoryview(data)[:MOST_AT_ONCE])
        except (BlockingIOError, InterruptedError):
            sent = 0
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:
            self._fatal_error(exc, "Fatal write error on socket transport")
            return
        if sent != len(data):
            self._enqueue((memoryview(data)[sent:],))

    def _received(self, data: bytes, error: BaseException | None) -> None:
        """A completion for a Protocol: data, the end (empty), or an error."""
        if not data:
            self._receive_ended(error)
            return
        try:
            self._context.run(self._protocol.data_received, data)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:
            self._receiving_failed(exc, "Fatal error: protocol.data_received() call failed.")

    def _received_into(self, value: bytes | int, error: BaseException | None) -> None:
        """A completion for a BufferedProtocol: so many bytes are in its buffer already, or here they are."""
        if not value:
            self._receive_ended(error)
        elif type(value) is int:
            self._buffer_updated(value)
        else:
            self._copy_to_protocol(memoryview(cast("bytes", value)))

    def _buffer_updated(self, count: int) -> None:
        try:
            self._context.run(self._protocol.buffer_updated, count)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:
            self._receiving_failed(exc, "Fatal error: protocol.buffer_updated() call failed.")

    def _get_buffer_of_protocol(self, size_hint: int = -1) -> memoryview | None:
        """A buffer to receive into; None if there must be none now, or the protocol failed to give one."""
        if self._paused or self._state >= CLOSING:
            return None
        protocol = self._protocol
        try:
            buffer = self._context.run(protocol.get_buffer, size_hint)
            if self._state >= CLOSING or self._protocol is not protocol:
                return None
            view = ops.writable_view(buffer)
            if not view.nbytes:
                raise RuntimeError("get_buffer() returned an empty buffer")
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:
            self._receiving_failed(exc, "Fatal error: protocol.get_buffer() call failed.")
            return None
        return view
