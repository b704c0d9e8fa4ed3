"""TLS on the loop's transports: asyncio's SSLProtocol with a shorter way for the data.

The SSLProtocol is an ordinary protocol of a socket transport; what the user's protocol sees is the transport that it
offers on its other side.  Its states, the handshake, the shutdown, the timeouts and the flow control are the standard
library's (:mod:`asyncio.sslproto`).  What every message goes through is ours:

- What the peer sends comes as bytes, by ``data_received``, and goes into the SSLObject's MemoryBIO at once.  asyncio's
  class keeps a buffer of 256 KiB for each connection instead.
- As many records as there are become one piece of data, and no read is tried that can only raise SSLWantReadError.
- What is received before a record that is not valid is delivered, and then the connection fails.
- A BufferedProtocol whose buffer was too small is asked for another at once, not in the next turn; one that provides
  an empty buffer has made a mistake, which is not the end of the stream.
"""

from __future__ import annotations

import ssl
from asyncio import sslproto
from typing import TYPE_CHECKING, Any

from ..flow import TakesBytes
from ..native import hot
from ..operations import writable_view

__all__ = ["make_protocol"]

_State: Any = sslproto.SSLProtocolState
_AppState: Any = sslproto.AppProtocolState
_CONNECTED = frozenset({_AppState.STATE_CON_MADE, _AppState.STATE_EOF})
_NOT_NOW: tuple[type[Exception], ...] = sslproto.SSLAgainErrors

#: The plain text of a TLS record, in bytes, at most (RFC 8446, 5.1).
_RECORD = 16 * 1024

#: How much a transport that is not ours may put into our buffer at once, in bytes: a read gives one record at most.
_BUFFER = 64 * 1024


class PythonTls:
    """The way of one message through TLS.  The native tier has it in C (``_native/hot/tls.c``)."""

    if TYPE_CHECKING:  # the rest of the protocol: asyncio's
        _app_protocol: Any
        _app_protocol_buffer_updated: Any
        _app_protocol_get_buffer: Any
        _app_protocol_is_buffer: bool
        _app_state: Any
        _app_reading_paused: bool
        _app_writing_paused: bool
        _eof_received: bool
        _incoming: ssl.MemoryBIO
        _outgoing_high_water: int
        _sslobj: ssl.SSLObject
        _state: Any
        _write_backlog: Any

        def _call_eof_received(self) -> None: ...
        def _control_app_writing(self) -> None: ...
        def _control_ssl_reading(self) -> None: ...
        def _do_shutdown(self) -> None: ...
        def _do_write(self) -> None: ...
        def _fatal_error(self, exc: BaseException, message: str) -> None: ...
        def _get_write_buffer_size(self) -> int: ...
        def _go_on(self) -> None: ...
        def _process_outgoing(self) -> None: ...
        def _set_state(self, state: Any) -> None: ...
        def _start_shutdown(self) -> None: ...

    def data_received(self, data: bytes) -> None:
        """Some bytes from the peer."""
        self._incoming.write(data)
        if self._state is _State.WRAPPED:
            self._do_read()
        else:
            self._go_on()

    def _do_read(self) -> None:
        """Give the protocol what has come, until there is no more or it pauses."""
        if not self._is_open():
            return
        try:
            if not self._app_reading_paused:
                self._read_all()
                if self._write_backlog:
                    self._do_write()
                else:
                    self._process_outgoing()
            self._control_ssl_reading()
        except Exception as exc:
            self._fatal_error(exc, "Fatal error on SSL protocol")

    def _is_open(self) -> bool:
        """Whether there may be something to read."""
        return self._state is _State.WRAPPED or self._state is _State.FLUSHING

    def _read_all(self) -> None:
        full = True
        while full and not self._app_reading_paused and self._is_open():
            read = self._read_for_buffered_protocol if self._app_protocol_is_buffer else self._read_for_protocol
            full, ended = read()
            if ended:
                self._call_eof_received()
                self._start_shutdown()

    def _read_for_protocol(self) -> tuple[bool, bool]:
        # A record of which OpenSSL has the beginning already may be larger than what is left of it here.
        size = self._incoming.pending + _RECORD
        with memoryview(bytearray(size)) as view:
            count, ended, error = self._fill(view)
            data = bytes(view[:count])
        if data:
            self._app_protocol.data_received(data)
        if error is not None:
            raise error
        return count == size, ended

    def _read_for_buffered_protocol(self) -> tuple[bool, bool]:
        protocol = self._app_protocol
        buffer = self._app_protocol_get_buffer(self._incoming.pending)
        if self._app_protocol is not protocol or not self._is_open():
            return True, False  # it has been replaced, or has closed: look again who wants what there is
        with writable_view(buffer) as view:
            size = view.nbytes
            if not size:
                raise RuntimeError("get_buffer() returned an empty buffer")
            count, ended, error = self._fill(view)
        if count:
            self._app_protocol_buffer_updated(count)
        if error is not None:
            raise error
        return count == size, ended

    def _fill(self, view: memoryview) -> tuple[int, bool, Exception | None]:
        """Decrypt what there is into `view`: how much, whether it was the end, and what went wrong after it."""
        size = view.nbytes
        count = 0
        try:
            while count < size:
                more: int = self._sslobj.read(size - count, view[count:])  # type: ignore[assignment]  # given a buffer, a count
                if not 0 <= more <= size - count:
                    raise ValueError(f"an SSLObject has taken {more} of {size - count} bytes")
                if not more:
                    return count, True, None
                count += more
                # A read gives of one record what there is of it.  If it left room, and no other record has begun to
                # come, the next would only raise that there is nothing.
                if count < size and not self._incoming.pending:
                    break
        except _NOT_NOW:
            pass
        except Exception as exc:
            return count, False, exc
        return count, False, None


class PythonTlsTransport:
    """The native tier has ``write`` in C (``_native/hot/tls.c``); the Python tier leaves it to asyncio's class."""


if TYPE_CHECKING:
    Tls = PythonTls
    TlsTransport = PythonTlsTransport
elif hot is None:
    Tls, TlsTransport = PythonTls, PythonTlsTransport
else:
    from _ssl import _SSLSocket

    Tls, TlsTransport = hot.tls_types(_State.WRAPPED, _State.FLUSHING, _NOT_NOW, ssl.SSLObject, _SSLSocket)


class _SSLTransport(TlsTransport, sslproto._SSLProtocolTransport):
    """What a protocol above TLS writes to."""

    _write_otherwise = sslproto._SSLProtocolTransport.write

    def close(self) -> None:
        """Send what is queued, say good-bye to the peer, then close; ``connection_lost`` follows."""
        if not self._closed:  # asyncio's class forgets its protocol the second time, and then fails in most methods
            super().close()


class _SSLProtocol(TakesBytes, Tls, sslproto.SSLProtocol):  # type: ignore[misc]  # it redefines _do_read
    """asyncio's SSLProtocol with the way of a message as above."""

    max_size = 0  # of the buffer that the constructor makes

    def _get_app_transport(self) -> Any:
        if self._app_transport is None:
            self._app_transport = _SSLTransport(self._loop, self)
        return self._app_transport

    def _go_on(self) -> None:
        """Bytes have come, and it is not just data that is awaited: the step that the state says."""
        super().buffer_updated(0)

    def _on_handshake_complete(self, handshake_exc: BaseException | None) -> None:
        super()._on_handshake_complete(handshake_exc)
        if self._state is _State.WRAPPED:
            self._process_outgoing()  # the last of the handshake, also if the protocol has paused in connection_made

    def _control_app_writing(self) -> None:
        """Pause or resume the user's protocol.  It may write up to the high-water mark, as on any other transport."""
        full = self._get_write_buffer_size() > self._outgoing_high_water
        if self._app_protocol is not None and (full or self._app_writing_paused):
            super()._control_app_writing()

    def _do_flush(self) -> None:
        """Deliver what is left, then say good-bye; unless the protocol aborts meanwhile, which ends it all."""
        self._do_read()
        if self._state is _State.FLUSHING:
            self._set_state(_State.SHUTDOWN)
            self._do_shutdown()

    def connection_lost(self, exc: BaseException | None) -> None:
        """The transport beneath is lost, and whoever is the user's protocol is told at once.

        asyncio's class tells it with the next iteration of the loop, and perhaps one that has been replaced by then.
        The protocol is let go of first: it may keep the transport above, which keeps this.
        """
        protocol = self._app_protocol
        is_told = self._state is not _State.DO_HANDSHAKE and self._app_state in _CONNECTED
        if is_told:
            self._app_state = _AppState.STATE_CON_LOST
        super().connection_lost(exc)
        self._app_protocol = self._app_protocol_get_buffer = self._app_protocol_buffer_updated = None
        if is_told:
            protocol.connection_lost(exc)

    def _do_shutdown(self) -> None:
        """End the connection with the peer's consent.  What it sends until it has consented is for nobody.

        OpenSSL takes data in the middle of that for an error, unless they have been read before.
        """
        try:
            while not self._eof_received and self._sslobj.read(_RECORD):
                pass
        except ssl.SSLError:
            pass  # there are no more, or something is wrong, which the shutdown itself will meet
        super()._do_shutdown()
        self._control_ssl_reading()  # a full buffer has kept the transport beneath from reading on

    def get_buffer(self, n: int) -> memoryview:
        """A buffer for a transport that is not ours, and so takes this protocol for a BufferedProtocol."""
        self.max_size = _BUFFER  # type: ignore[misc]  # typeshed: of the class
        return super().get_buffer(n)


#: Makes the protocol of TLS for a transport: asyncio's SSLProtocol with a shorter way for the data.
make_protocol: Any = _SSLProtocol  # its parameters differ between the Python versions
