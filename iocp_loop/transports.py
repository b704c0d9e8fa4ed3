"""The stream transport: a socket on one side, an asyncio Protocol on the other.

The way of one received byte: the driver reaps a completion of this transport's receive stream and calls
``_received`` (or ``_received_into`` for a BufferedProtocol), which calls the protocol, in the same turn, without a
Handle between.  The way back: ``write`` tries ``send`` at once; what the kernel does not take goes into a queue, and a
``SendAll`` operation empties the queue.

How far a transport's life has come is its ``_state``, and what changes that stands in life.py.  Three things move in it
independently of the life, and have flags of their own:

===============  =====================================================================================================
``_paused``      reading pauses: data that still come are held in ``_held`` until ``resume_reading``
``_at_eof``      the peer has ended its side, or receiving has failed: ``_receive`` is None and is not armed again
``_eof_asked``   ``write_eof`` was called: when the queue is empty, the sending side is shut down
===============  =====================================================================================================

``_direct`` and the `complete` of ``_receive`` follow from all of these and from the state: who takes the next write and
the next completion (``_choose_receiver``), so that a message has nothing to ask.

Rules:

1. ``connection_made`` first, then data, then at most one ``eof_received``, then ``connection_lost``, once.
2. Data that the kernel had handed over before a pause are delivered after the resume, in order.
3. The socket is closed when ``connection_lost`` has run *and* no operation is in flight on it: never under the kernel.
4. An exception of the protocol closes its connection and is reported; it reaches nobody else.
"""

from __future__ import annotations

import asyncio
import contextvars
import errno
import functools
import socket
import sys
from asyncio import constants, trsock
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from . import operations as ops
from .connections import Connection, PythonConnection
from .endpoints.sendfile import check_regular, copy_file, send_file
from .life import CLOSING, LOST, Life
from .proactor import advance, fail
from .streams import MOST_AT_ONCE, PythonStream

__all__ = ["SocketTransport"]

#: What is in C in the native tier, where these functions call each other and no method of a subclass.
_OWN = frozenset(
    name
    for kind in (PythonStream, PythonConnection, Life)
    for name, value in vars(kind).items()
    if callable(value) and name.startswith("_") and not name.endswith("__")
)

#: More pieces than this are joined before they are sent: copying them costs less than a long list of buffers.
_WORTH_JOINING = 64


class SocketTransport(Connection):
    """A connected stream socket as an asyncio transport (TCP, UNIX; TLS stands above it)."""

    # The __dict__, which costs little while it is empty, is for those who put a method of their own over one of ours,
    # as tests do.
    __slots__ = ("__dict__", "__weakref__")

    _start_tls_compatible = True
    _sendfile_compatible = constants._SendfileMode.TRY_NATIVE

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """TypeError if the class replaces what the native tier has in C, which would not call it."""
        super().__init_subclass__(**kwargs)
        if taken := sorted(_OWN & vars(cls).keys()):
            raise TypeError(f"{cls.__qualname__} may not replace {', '.join(taken)}")

    def _context_of_writing(self) -> Any:
        """The context of ``resume_writing`` and of what else sending leads to: before 3.15 that of whoever writes."""
        return self._context if sys.version_info >= (3, 15) else contextvars.copy_context()

    def owns(self, sock: socket.socket) -> bool:
        """True if `sock` is the socket of this transport, which closes it."""
        return self._sock is sock

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """``socket``, ``sockname`` or ``peername``, as asyncio documents them; `default` for anything else."""
        info = self._info
        if info is None:
            info = self._info = {}
        if name not in info:
            if name == "socket":
                info[name] = trsock.TransportSocket(self._sock)
            elif name == "sockname":
                info[name] = self._sockname
            elif name == "peername":
                return self._peername
        return info.get(name, default)

    # Two names of asyncio's own transports: libraries read the first, CPython's tests of TLS the second.

    @property
    def _extra(self) -> dict[str, Any]:
        """What get_extra_info knows."""
        for name in ("socket", "sockname"):
            self.get_extra_info(name)  # which keeps it
        info: Any = self._info
        info.setdefault("peername", self._peername)
        return info  # type: ignore[no-any-return]  # it is one

    @property
    def _read_ready_cb(self) -> Callable[..., None] | None:
        """Who is called when there are data to read; None once the transport is closing."""
        return None if self.is_closing() else self._received

    def _condition(self) -> str:
        return "paused" if self._paused else "open"

    def _details(self) -> str:
        return f"fd={self._sock.fileno()} unsent={self.get_write_buffer_size()}"

    # -- receiving ---------------------------------------------------------------------------------

    def _choose_receiver(self) -> None:
        """Pick the receiver from the state, so that the hot path needs no checks."""
        receive = self._receive
        if receive is None:
            return
        if self._state >= CLOSING:
            receive.complete = self._received_while_closing
        elif self._paused or self._held:
            receive.complete = self._received_while_paused
        elif self._buffered:
            receive.complete = self._received_into
        else:
            receive.complete = self._received

    def _received_while_paused(self, value: Any, error: BaseException | None) -> None:
        if value and type(value) is int:
            self._received_into(value, error)  # get_buffer() has paused: what it lent is filled all the same
        else:
            self._held += ((value, error),)

    def _received_while_closing(self, value: Any, error: BaseException | None) -> None:
        if self._receive is not None and not self._receive.in_flight:
            self._receive = None
            self._release()

    def _receiving_failed(self, exc: BaseException, message: str) -> None:
        """A fatal error in the course of receiving: the report and ``connection_lost`` inherit its context."""
        # A copy: the error may be that the context is in use, by a callback of this protocol that runs the loop inside.
        self._context.copy().run(self._fatal_error, exc, message)

    def _copy_to_protocol(self, data: memoryview) -> None:
        """Feed data to a BufferedProtocol, as much as its buffer takes at a time.

        Each call may pause, and the rest is held; close, and it is dropped; or set a protocol, and it is that one's.
        """
        try:
            while data and self._takes_data():
                if not self._buffered:
                    rest, data = data, data[:0]
                    self._received(bytes(rest), None)
                elif (buffer := self._get_buffer_of_protocol(len(data))) is not None:
                    with buffer:  # let go of before the protocol is told, which may give its buffer another size
                        count = min(len(data), buffer.nbytes)
                        buffer[:count] = data[:count]
                    data = data[count:]
                    self._received_into(count, None)
        finally:
            self._hold(data)

    def _hold(self, data: memoryview) -> None:
        """Keep what is left of a completion: the protocol has paused, or what ends the loop's run is on its way."""
        if data and self._state < CLOSING:
            self._held = ((bytes(data), None), *self._held)
            self._choose_receiver()
            if not self._paused:
                if self._receive is not None:
                    self._proactor.pause(self._receive)  # until it is delivered
                self._loop.call_soon(self._deliver_held)

    def is_reading(self) -> bool:
        """False while paused or closing."""
        return self._takes_data()

    def _takes_data(self) -> bool:
        # Apart from is_reading, which a subclass or an instance may replace: what it says moves no data.
        return not self._paused and self._state < CLOSING

    def pause_reading(self) -> None:
        """Stop calling the protocol with data.  What the kernel had handed over is held, not lost."""
        if self._paused or self._state >= CLOSING:
            return
        self._paused = True
        if self._receive is not None:
            self._choose_receiver()
            self._proactor.pause(self._receive)

    def resume_reading(self) -> None:
        """Go on after ``pause_reading``."""
        if not self._paused or self._state >= CLOSING:
            return
        self._paused = False
        self._go_on_receiving()

    def _go_on_receiving(self) -> None:
        """What is held comes first."""
        if self._held:
            self._loop.call_soon(self._deliver_held)
        else:
            self._resume_receive()

    def _deliver_held(self) -> None:
        try:
            while self._held and self._takes_data():
                (value, error), *rest = self._held
                self._held = tuple(rest)
                if self._buffered:
                    self._received_into(value, error)
                else:
                    self._received(value, error)
        finally:
            if self._takes_data():
                self._go_on_receiving()

    def _resume_receive(self) -> None:
        if self._receive is not None:
            self._choose_receiver()
            if self._receive.in_flight:
                self._proactor.resume(self._receive)
        elif not self._at_eof:
            self._arm_receive()

    # -- sending -----------------------------------------------------------------------------------

    def get_write_buffer_size(self) -> int:
        """How many bytes were written and not yet taken by the kernel."""
        sending = self._sending
        if sending is None or self._state >= LOST or isinstance(sending, ops.SendFile):
            return self._queued
        return self._queued + sending.size - sending.sent

    def _write_otherwise(self, data: Any) -> None:
        """A write that must queue, or comes too late, or brings something else than bytes."""
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"data argument must be a bytes-like object, not {type(data).__name__!r}")
        if self._eof_asked:
            raise RuntimeError("Cannot call write() after write_eof()")
        if self._file is not None:
            raise RuntimeError("unable to write; sendfile is in progress")
        if self._state >= LOST:
            self._count_late_write()
            return
        view = ops.readable_view(data)
        if view.nbytes and self._direct:
            view = view[self._send_some((view,)) :]
        if view.nbytes and self._state < LOST:
            # What stays is copied unless it is immutable: the caller may reuse its buffer.
            self._enqueue((data if type(data) is bytes else bytes(view),))

    def writelines(self, list_of_data: Iterable[Any]) -> None:
        """Send several buffers in order, in one system call where that is possible."""
        if self._eof_asked:
            raise RuntimeError("Cannot call writelines() after write_eof()")
        if self._file is not None:
            raise RuntimeError("unable to writelines; sendfile is in progress")
        buffers = [ops.readable_view(data) for data in list_of_data]
        if self._state >= LOST:
            if buffers:
                self._count_late_write()
            return
        buffers = [view for view in buffers if view.nbytes]
        if buffers and self._direct:
            buffers = advance(buffers, self._send_some(buffers))
        if buffers and self._state < LOST:
            self._enqueue(view if isinstance(view.obj, bytes) else bytes(view) for view in buffers)

    def _send_some(self, buffers: Sequence[memoryview]) -> int:
        """Try to send at once; the number of bytes taken.  A failure loses the connection."""
        try:
            if len(buffers) > 1 and hasattr(self._sock, "sendmsg"):
                sent: int = self._sock.sendmsg(buffers[:1024])
                return sent
            data = buffers[0] if len(buffers) == 1 else memoryview(b"".join(buffers))
            return self._sock.send(data[:MOST_AT_ONCE])
        except (BlockingIOError, InterruptedError):
            return 0
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:
            self._fatal_error(exc, "Fatal write error on socket transport")
            return 0

    def _enqueue(self, buffers: Iterable[Any]) -> None:
        self._direct = False
        queue = self._queue
        if queue is None:
            queue = self._queue = []
        for data in buffers:
            queue.append(data)
            self._queued += len(data)
        if self._sending is None:
            self._submit_queue(queue)
        self._maybe_pause_protocol()

    def _submit_queue(self, queue: list[Any]) -> None:
        if len(queue) > _WORTH_JOINING:
            queue = [b"".join(queue)]
        self._queue, self._queued = None, 0
        try:
            op = self._sending = ops.SendAll(self._sock, queue)
            self._proactor.start(op, functools.partial(self._context_of_writing().run, self._sent))
        except (OSError, ValueError) as exc:  # ValueError: somebody has closed it
            self._sending = None
            self._fatal_error(exc, "Fatal write error on socket transport")

    def _sent(self, value: Any, error: BaseException | None) -> None:
        """The completion of the send that was in flight."""
        self._sending = None
        if self._state >= LOST:
            self._release()
            return
        if error is not None:
            if not ops.was_cancelled(error):
                self._fatal_error(error, "Fatal write error on socket transport")
            return
        self._go_on_sending()

    def _go_on_sending(self) -> None:
        """Nothing is in flight: send what was queued meanwhile, or tell those who wait for that."""
        if self._queue is not None:
            self._submit_queue(self._queue)
        elif self._file is not None:
            if not self._file.done():
                self._file.set_result(0)
        else:
            self._direct = not self._eof_asked and self._state < CLOSING
        self._maybe_resume_protocol()  # may call write() again, or abort()
        self._end_writing_if_asked()

    def _end_writing_if_asked(self) -> None:
        """Do what waited for the queue to empty: the end of the sending side, or of the connection."""
        if self._sending is None and self._state < LOST:
            if self._state >= CLOSING:
                self._lose_connection(None)
            elif self._eof_asked and self._file is None:
                self._shut_down_sending()

    async def send_file(self, file: Any, offset: int, count: int | None, *, copy: bool = False) -> int:
        """Send `count` bytes of `file` (None: all) from `offset` after what is queued; the number of bytes sent.

        ``loop.sendfile`` is the way to call it.  Raises RuntimeError while another file is sent, ConnectionError if the
        transport is closed meanwhile, and, unless it is to `copy`, SendfileNotAvailableError if the system can't send
        this file by itself.
        """
        if self._file is not None:
            raise RuntimeError("another sendfile is in progress")
        if not copy:
            check_regular(file)  # before anybody can ask for the end of the stream, which would come before a copy
        self._direct = False
        self._file = drained = self._loop.create_future()
        if self._sending is None:
            drained.set_result(0)
        try:
            await drained
            send = copy_file if copy else send_file
            return await send(self._send_part, self._sock, file, offset, count)
        except ValueError as exc:
            if self._sock.fileno() < 0:  # there is no operation on a closed socket
                raise _closed_while_sending_file() from exc
            raise
        finally:
            self._file = None
            if self._sending is None and self._state < LOST:
                self._go_on_sending()

    def _send_part(self, op: ops.SendAll | ops.SendFile) -> asyncio.Future[int]:
        if self._state >= CLOSING:
            raise _closed_while_sending_file()
        future: asyncio.Future[int] = self._loop.create_future()
        self._file = future
        self._proactor.start(op, functools.partial(self._context_of_writing().run, self._part_sent))
        self._sending = op
        future.add_done_callback(lambda future: self._proactor.cancel(op) if future.cancelled() else None)
        return future

    def _fail_file(self) -> None:
        """The connection is lost: tell whoever sends a file."""
        if self._file is not None and not self._file.done():
            self._file.set_exception(_closed_while_sending_file())

    def _part_sent(self, value: Any, error: BaseException | None) -> None:
        """The completion of a part of a file.  An error is for the sender; the connection may be in order."""
        self._sending = None
        future = self._file
        if future is not None and not future.done():
            if error is None:
                future.set_result(value)
            else:
                fail(future, error)
        if self._state >= LOST:
            self._release()
        elif future is None:
            self._go_on_sending()  # the sender was cancelled, and has left this to its last part
        else:
            self._end_writing_if_asked()

    def can_write_eof(self) -> bool:
        """True: a socket can close its sending side alone."""
        return True

    def write_eof(self) -> None:
        """Close the sending side once everything written, or the file, has been sent; receiving goes on."""
        if self._eof_asked or self._state >= CLOSING:
            return
        self._eof_asked = True
        self._direct = False
        self._end_writing_if_asked()

    def _shut_down_sending(self) -> None:
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError as exc:
            if exc.errno != errno.ENOTCONN:  # the peer has reset: the receive stream tells
                self._fatal_error(exc, "Fatal write error on socket transport")

    # -- the end -----------------------------------------------------------------------------------

    def abort(self) -> None:
        """Close at once; what is queued is dropped."""
        self._lose_connection(None)

    def _force_close(self, exc: BaseException | None) -> None:
        """As asyncio's transports of TLS call it."""
        self._lose_connection(exc)

    def _give_up(self) -> None:
        self._sock.close()


def _closed_while_sending_file() -> ConnectionError:
    return ConnectionAbortedError(errno.ECONNABORTED, "the connection was closed while a file was sent")
