"""The proactor: one method per operation, each returns an asyncio Future; and streams that call their owner directly.

It joins the two worlds.  Below it a driver turns operations into completions and knows no loop.  Above it coroutines
await Futures, and transports take data.  The proactor makes the operation, hands it to the driver, and ties the
completion to one or the other:

* a Future, where a user awaits one (``recv``, ``accept``, ...);
* a callable, for a *stream* (``receive_stream``, ``accept_stream``, ...): a transport is called with each completion,
  without a Future, a Handle or a turn of the ready queue between.

Cancelling such a Future cancels it at once, as asyncio's users expect, and asks the driver to end the operation; the
buffers stay in the in-flight table until it has.  If the operation had already got something (bytes, a connection,
a datagram) that nobody awaits any more, it is not lost: the next call of the same kind on that socket returns it.
Until the cancelled operation has ended, that next call stands in line behind it, or it would overtake those bytes.  So
do several that wait on one socket: each begins when whoever awaits the one before it has taken what that got.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from . import operations as ops
from .native import hot
from .operations import READABLE, WRITABLE, Address, HandleLike, Operation, was_cancelled
from .ports.driver import Driver

__all__ = ["Deliver", "Proactor", "PythonRequests"]

#: What a stream calls with each completion: ``deliver(value, error)``.  The last call has an error or an empty value.
Deliver = Callable[[Any, BaseException | None], object]

#: Kinds whose value would be lost if nobody took it.


class _OperationFuture(asyncio.Future[Any]):
    """The Future of one operation."""

    #: Somebody awaits it who calls `Proactor.taken` then.
    kept = False
    #: What it has was kept before, for the next in line.
    claimed = False

    def __init__(self, proactor: Proactor, op: Operation, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self._proactor = proactor
        self.op = op

    def start(self) -> None:
        """Submit the operation.  Raises OSError or ValueError if it is refused outright."""
        self.op.complete = self._completed
        self._proactor.driver.submit(self.op)
        if self.done():  # a finalizer has cancelled it before there was anything to cancel
            self._proactor._cancel_precious(self.op)

    def cancel(self, msg: Any | None = None) -> bool:
        if not self.done():
            self._proactor._cancel_precious(self.op)
        return super().cancel(msg=msg)

    def _completed(self, value: Any, error: BaseException | None) -> None:
        self.op.complete = ops.is_over  # the Future and the operation refer to each other: part them
        if not self.take(value, error):
            self._proactor._ended_unawaited(self.op, value, error)
        elif self.kept and error is None:
            self._proactor._lines.setdefault(self.op.handle, self)  # until its task has run

    def take(self, value: Any, error: BaseException | None) -> bool:
        """Be done with a value or an error; False if nobody awaits that any more."""
        if self.done():
            return False
        try:
            if error is None:
                self.set_result(value)
            elif was_cancelled(error):
                return super().cancel()
            else:
                fail(self, error)
        except asyncio.InvalidStateError:  # a finalizer or a signal handler came in between
            return False
        return True


def fail(future: asyncio.Future[Any], error: BaseException) -> None:
    """Give `future` the error of an operation."""
    if isinstance(error, StopIteration):  # no Future takes this one
        cause, error = error, RuntimeError("an operation raised StopIteration")
        error.__cause__ = cause
    future.set_exception(error)


class _Line:
    """One handle's operations whose outcome is open, and what must wait until it is known.

    They have been cancelled and have not ended; or somebody awaits them, and may be given up in the turn in which they
    end: what they got is then for the next in line.
    """

    __slots__ = ("ending", "waiting")

    def __init__(self) -> None:
        self.ending: set[Operation] = set()
        self.waiting: deque[Callable[[], object]] = deque()


class PythonRequests:
    """What a transport asks of its proactor.  The native tier has it in C (``_native/hot/proactor.c``)."""

    _kept: dict[Any, Any]
    _lines: dict[Any, Any]

    if TYPE_CHECKING:  # the rest of the proactor

        def _deliver_unclaimed(self, op: ops.ReceiveStream) -> None: ...
        def _receive_otherwise(self, sock: socket.socket, deliver: Deliver, get_buffer: Any) -> ops.ReceiveStream: ...

    def receive_stream(
        self, sock: socket.socket, deliver: Deliver, get_buffer: Callable[[], Any] | None = None
    ) -> ops.ReceiveStream:
        """Receive until the end: ``deliver(data, None)``; see :class:`~iocp_loop.operations.ReceiveStream`.

        What a cancelled ``recv`` had left behind comes first, with the next turn of the loop.
        """
        op = self._receive_otherwise(sock, deliver, get_buffer)
        if self._kept or self._lines:
            self._deliver_unclaimed(op)
        return op

    def drop(self, op: Operation) -> bool:
        """End a stream at once, of whose end nobody needs to be told; False if it has to be cancelled."""
        return False


if TYPE_CHECKING:
    Requests = PythonRequests
else:
    Requests = PythonRequests if hot is None else hot.Requests


class Proactor(Requests):
    """Starts operations on a driver, for one event loop.

    Each method that returns a Future may raise at once when the operation is refused outright, OSError or ValueError;
    else the error arrives in the Future.  Sockets must be non-blocking.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, driver: Driver) -> None:
        self._loop = loop
        self.driver = driver
        # Bound once: transports call these, and an extra call would only add overhead.
        self.cancel = driver.cancel
        self.pause = driver.pause
        self.resume = driver.resume
        self.wake = driver.wake
        self.let_go = driver.let_go
        # The native tier's short ways, for a plain socket and for a descriptor on which nothing else waits; they return
        # None where they do not apply.
        self._receive_natively: Callable[..., ops.ReceiveStream | None] | None = getattr(driver, "receive_stream", None)
        self._drop_natively: Callable[[Operation], bool] | None = getattr(driver, "drop", None)
        self.watch_natively: Callable[..., ops.ReadinessStream | None] | None
        self.watch_natively = getattr(driver, "readiness_stream", None)
        self._unclaimed: weakref.WeakKeyDictionary[Any, deque[Any]] = weakref.WeakKeyDictionary()
        # By handle: a line; or, as long as nobody stands behind it, an operation that has ended and whose task has not
        # run (its Future, or the native tier's SocketWait).
        self._lines: dict[Any, Any] = {}
        #: The dict within `_unclaimed`, whose truth costs no frame.
        self._kept: dict[Any, Any] = self._unclaimed.data  # type: ignore[attr-defined]  # not in typeshed

    # -- the turn of the loop ----------------------------------------------------------------------

    @property
    def select(self) -> Callable[[float | None], object]:
        """Wait at most `timeout` seconds for completions; true if there are some (the name that BaseEventLoop calls).

        Tools that play with time put a function of their own in its place, and call this one from there.
        """
        return self._select

    @select.setter
    def select(self, select: Callable[[float | None], object]) -> None:
        self._select = select  # type: ignore[method-assign, assignment]  # on purpose
        self._loop._select = select  # type: ignore[attr-defined]  # Turns'; the native one calls the driver otherwise

    def _select(self, timeout: float | None = None) -> list[object]:
        self.driver.wait(timeout)
        return [self.driver] if self.driver.gathered else []

    def dispatch(self) -> None:
        """Deliver the completions that ``select`` gathered."""
        self.driver.dispatch()

    @property
    def in_flight(self) -> dict[int, Operation]:
        """The in-flight table: every operation that is submitted and not reaped, by its number."""
        return self.driver.in_flight

    def close(self, timeout: float = 2.0) -> None:
        """Cancel and reap everything, then free the port.  Bounded by about `timeout` seconds."""
        self.driver.close(timeout)
        for left in self._unclaimed.values():
            for value in left:
                if isinstance(value, tuple) and isinstance(value[0], socket.socket):
                    value[0].close()  # a connection that nobody will take any more
        self._unclaimed.clear()

    # -- one request, one Future -------------------------------------------------------------------

    def submit(self, op: Operation) -> asyncio.Future[Any]:
        """Submit any operation; the Future of its completion."""
        future = _OperationFuture(self, op, self._loop)
        if op.precious and (self._kept or self._lines or self.driver.busy(op.fd, READABLE)):
            self._submit_in_turn(future, op)
        else:
            future.start()
        return future

    def recv(self, sock: socket.socket, size: int) -> asyncio.Future[bytes]:
        """Receive at most `size` bytes; empty at the end of the stream."""
        return self.submit(ops.Receive(sock, size))

    def recv_into(self, sock: socket.socket, buffer: Any) -> asyncio.Future[int]:
        """Receive into a writable buffer; the number of bytes."""
        return self.submit(ops.ReceiveInto(sock, buffer))

    def send(self, sock: socket.socket, data: Any) -> asyncio.Future[int]:
        """Send from `data`; the number of bytes taken, perhaps fewer than were given."""
        return self.submit(ops.Send(sock, data))

    def sendall(self, sock: socket.socket, *buffers: Any) -> asyncio.Future[int]:
        """Send all of several buffers in order; the number of bytes."""
        return self.submit(ops.SendAll(sock, buffers))

    def accept(self, sock: socket.socket) -> asyncio.Future[tuple[socket.socket, Address]]:
        """Accept one connection: ``(non-blocking socket, address)``."""
        return self.submit(ops.Accept(sock))

    def connect(self, sock: socket.socket, address: Address, begun: bool = False) -> asyncio.Future[None]:
        """Connect to a resolved address; see :class:`~iocp_loop.operations.Connect`."""
        return self.submit(ops.Connect(sock, address, begun))

    def recvfrom(self, sock: socket.socket, size: int) -> asyncio.Future[tuple[bytes, Address]]:
        """Receive one datagram of at most `size` bytes: ``(bytes, address)``."""
        return self.submit(ops.ReceiveFrom(sock, size))

    def recvfrom_into(self, sock: socket.socket, buffer: Any) -> asyncio.Future[tuple[int, Address]]:
        """Receive one datagram into a writable buffer: ``(number of bytes, address)``."""
        return self.submit(ops.ReceiveFromInto(sock, buffer))

    def sendto(self, sock: socket.socket, data: Any, address: Address) -> asyncio.Future[int]:
        """Send one datagram; the number of bytes."""
        return self.submit(ops.SendTo(sock, data, address))

    def read(self, handle: HandleLike, size: int, offset: int | None = None) -> asyncio.Future[bytes]:
        """Read at most `size` bytes from a file or pipe; `offset` in bytes, None: from where it stands."""
        return self.submit(ops.Read(handle, size, offset))

    def read_into(self, handle: HandleLike, buffer: Any, offset: int | None = None) -> asyncio.Future[int]:
        """Read from a file or pipe into a writable buffer; the number of bytes."""
        return self.submit(ops.ReadInto(handle, buffer, offset))

    def write(self, handle: HandleLike, data: Any, offset: int | None = None) -> asyncio.Future[int]:
        """Write to a file or pipe; the number of bytes taken, perhaps fewer than were given."""
        return self.submit(ops.Write(handle, data, offset))

    def wait_readable(self, handle: HandleLike) -> asyncio.Future[int]:
        """Wait until a read would not block."""
        return self.submit(ops.Readiness(handle, READABLE))

    def wait_writable(self, handle: HandleLike) -> asyncio.Future[int]:
        """Wait until a write would not block."""
        return self.submit(ops.Readiness(handle, WRITABLE))

    def accept_pipe(self, handle: HandleLike) -> asyncio.Future[None]:
        """Wait until a client has connected to the server's end of a named pipe (Windows)."""
        return self.submit(ops.AcceptPipe(handle))

    def wait_for_handle(self, handle: HandleLike, timeout: float | None = None) -> asyncio.Future[bool]:
        """Wait until a process, an event or the like is signalled (Windows): True; False after `timeout` seconds."""
        op = ops.WaitForHandle(handle)
        future = self.submit(op)
        if timeout is not None:

            def expire() -> None:
                if not future.done():
                    self.driver.cancel(op)
                    future.set_result(False)

            timer = self._loop.call_later(timeout, expire)
            future.add_done_callback(lambda _: timer.cancel())
        return future

    # -- one request, many completions -------------------------------------------------------------

    def start(self, op: Operation, deliver: Deliver) -> None:
        """Submit `op` with `deliver` as the receiver of its completions, without a Future."""
        op.complete = deliver
        self.driver.submit(op)

    def accept_stream(self, sock: socket.socket, deliver: Deliver) -> ops.AcceptStream:
        """Accept until cancelled: ``deliver((socket, address), None)``."""
        op = ops.AcceptStream(sock)
        self.start(op, deliver)
        return op

    def _receive_otherwise(
        self, sock: socket.socket, deliver: Deliver, get_buffer: Callable[[], Any] | None
    ) -> ops.ReceiveStream:
        op = ops.ReceiveStream(sock, get_buffer)
        self.start(op, deliver)
        return op

    def receive_from_stream(self, sock: socket.socket, size: int, deliver: Deliver) -> ops.ReceiveFromStream:
        """Receive datagrams until cancelled: ``deliver((bytes, address), None)``."""
        op = ops.ReceiveFromStream(sock, size)
        self.start(op, deliver)
        return op

    def readiness_stream(self, handle: HandleLike, events: int, deliver: Deliver) -> ops.ReadinessStream:
        """Tell whenever one of `events` holds, level-triggered: ``deliver(events, None)``."""
        op = None
        if self.watch_natively is not None:
            op = self.watch_natively(handle, ops.fileno(handle), events, deliver)
        if op is None:
            op = ops.ReadinessStream(handle, events)
            self.start(op, deliver)
        return op

    # -- results that nobody awaits any more -------------------------------------------------------

    def _cancel_precious(self, op: Operation) -> None:
        """Ask for the end of an operation whose Future is being cancelled."""
        self.driver.cancel(op)
        if op.precious and op.state is not ops.NEW:  # new: it stands in line itself
            line = self._line(op.handle)
            if line is None:
                line = self._lines[op.handle] = _Line()
            line.ending.add(op)

    def _ended_unawaited(self, op: Operation, value: Any, error: BaseException | None) -> None:
        """The last completion of a cancelled operation: keep what it got, and let those behind it go on."""
        if not op.precious:
            return
        if error is None:
            self.keep_value(op, value)
        self._leave_line(op)

    def _leave_line(self, op: Operation) -> None:
        """The outcome of `op` is known: let those behind it go on, up to the first that has to wait itself."""
        line = self._line(op.handle)
        if line is None:
            return
        line.ending.discard(op)
        while line.waiting and not line.ending:
            line.waiting.popleft()()
        if not line.ending and self._lines.get(op.handle) is line:
            del self._lines[op.handle]

    def _line(self, handle: Any) -> _Line | None:
        """The line on `handle`; None if there is none."""
        line = self._lines.get(handle)
        if line is not None and type(line) is not _Line:
            ended, line = line, _Line()
            self._lines[handle] = line
            self._stand_first(line, ended.op, ended if isinstance(ended, _OperationFuture) else ended.future)
        return line

    def taken(self, future: asyncio.Future[Any]) -> None:
        """Whoever awaited `future` has run: it has taken what there was, or given it up."""
        if self._lines and isinstance(future, _OperationFuture) and self._lines.get(future.op.handle) is future:
            del self._lines[future.op.handle]

    def _begin_line(self, op: Operation) -> _Line | None:
        """A line behind the operation that waits on the handle of `op` already; None if there is none."""
        if self.driver.busy(op.fd, READABLE):
            for other in list(self.in_flight.values()):
                owner = getattr(other.complete, "__self__", other.complete)
                if other.handle is op.handle and other.precious and (future := _future_of(owner)):
                    line = self._lines[op.handle] = _Line()
                    self._stand_first(line, other, future)
                    return line
        return None

    def _stand_first(self, line: _Line, op: Operation, future: asyncio.Future[Any]) -> None:
        """Nobody in `line` goes on before `op` has ended and whoever awaits `future` has run."""

        def has_run(_: object) -> None:
            if op.complete is None or op.complete is ops.is_over:  # else its completion comes, to `_ended_unawaited`
                self._leave_line(op)

        line.ending.add(op)
        future.add_done_callback(has_run)  # after that of the task that awaits it already

    def abandon(self, op: Operation) -> None:
        """Nobody awaits `op`, which is in flight, any more: ask for its end, and keep what it gets all the same."""
        op.complete = functools.partial(self._ended_unawaited, op)
        self._cancel_precious(op)

    def _submit_in_turn(self, future: _OperationFuture, op: Operation) -> None:
        """Submit behind earlier operations on the same handle, or answer with what a cancelled one of them had got."""
        line = self._line(op.handle) or self._begin_line(op)
        if line is not None:
            line.waiting.append(lambda: self._go_on(line, future, op))
        else:
            self._submit_now(future, op)

    def _submit_now(self, future: _OperationFuture, op: Operation) -> None:
        try:
            value = self._claim(op)
        except LookupError:  # there is nothing
            future.start()
        else:
            op.complete = ops.is_over
            future.claimed = True
            if not future.take(value, None):
                self.keep_value(op, value, first=True)

    def _go_on(self, line: _Line, future: _OperationFuture, op: Operation) -> None:
        if future.done():
            return
        if self.driver.closed:
            future.cancel()
            return
        try:
            self._submit_now(future, op)
            self._stand_first(line, op, future)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:
            future.take(None, exc)

    def _deliver_unclaimed(self, op: ops.ReceiveStream) -> None:
        """Give a new stream what cancelled operations had received, or will turn out to have."""

        def deliver(complete: Callable[[bytes, None], object]) -> None:
            data = b"".join(value for value in self._unclaimed.pop(op.handle, ()) if isinstance(value, bytes))
            if data and op.in_flight:
                complete(data, None)

        deliver(lambda data, _: self.driver.ready.append((op, data, None)))  # with the next dispatch, not by recursion
        line = self._line(op.handle)
        if line is not None:
            line.waiting.append(lambda: deliver(op.complete))  # in a dispatch, before what came later

    def keep(self, future: asyncio.Future[Any]) -> None:
        """Keep what `future` got, if whoever awaited it was cancelled in the turn in which it came."""
        got_something = future.done() and not future.cancelled() and future.exception() is None
        if got_something and isinstance(future, _OperationFuture):
            self.keep_value(future.op, future.result(), first=future.claimed)

    def keep_value(self, op: Operation, value: Any, *, first: bool = False) -> None:
        """Keep `value`, which `op` got when nobody awaited it any more, for the next one of its kind.

        `first`: it comes before what is kept already.
        """
        if isinstance(op, ops.ReceiveInto):
            value = bytes(op.buffer[:value])
        elif isinstance(op, ops.ReceiveFromInto):
            value = (bytes(op.buffer[: value[0]]), value[1])
        kept = self._unclaimed.setdefault(op.handle, deque())
        (kept.appendleft if first else kept.append)(value)

    def _claim(self, op: Operation) -> Any:
        """The value for `op` out of what an earlier, cancelled one had got; LookupError if there is none."""
        left = self._unclaimed[op.handle]
        value = left.popleft()
        if isinstance(op, (ops.Receive, ops.ReceiveInto, ops.ReceiveFrom, ops.ReceiveFromInto)):
            value, rest = _as_asked_for(op, value)
            if rest:
                left.appendleft(rest)
        if not left:
            self._unclaimed.pop(op.handle, None)
        return value

    def busy(self, sock: socket.socket, direction: int) -> bool:
        """Whether an operation of `direction` (READABLE or WRITABLE) waits on `sock`, which is to be served first."""
        return self.driver.busy(sock.fileno(), direction)

    def claims(self, sock: socket.socket) -> bool:
        """True if something is kept for `sock`, or may be soon, that goes before a new call into the kernel."""
        return bool(self._kept or self._lines) and (sock in self._unclaimed or sock in self._lines)


def _future_of(owner: Any) -> Any:
    """With what an operation is awaited whose owner this is; None if it is not."""
    return owner if isinstance(owner, _OperationFuture) else getattr(owner, "future", None)  # of a SocketWait


def _as_asked_for(
    op: ops.Receive | ops.ReceiveInto | ops.ReceiveFrom | ops.ReceiveFromInto, value: Any
) -> tuple[Any, bytes]:
    """`value`, bytes or bytes with an address, in the form that `op` has asked for; and what is left of it."""
    sock: Any = op.handle
    is_stream = sock.type == socket.SOCK_STREAM
    if isinstance(value, tuple):
        data, address = value
    else:
        # Who received it did not ask where it came from.  A socket that is connected has heard its peer.
        data, address = value, None
        if not is_stream:
            with contextlib.suppress(OSError):
                address = sock.getpeername()
    size = op.size if isinstance(op, (ops.Receive, ops.ReceiveFrom)) else op.buffer.nbytes
    data, rest = data[:size], data[size:] if is_stream else b""  # of a datagram, what does not fit is lost, as ever
    if isinstance(op, (ops.ReceiveInto, ops.ReceiveFromInto)):
        op.buffer[: len(data)] = data
        data = len(data)
    return (data, address) if isinstance(op, (ops.ReceiveFrom, ops.ReceiveFromInto)) else data, rest


def advance(buffers: Sequence[Any], count: int) -> list[memoryview]:
    """What is left of `buffers` after `count` bytes were sent."""
    rest = [ops.readable_view(buffer) for buffer in buffers]
    while rest and count >= rest[0].nbytes:
        count -= rest[0].nbytes
        del rest[0]
    if rest and count:
        rest[0] = rest[0][count:]
    return rest
