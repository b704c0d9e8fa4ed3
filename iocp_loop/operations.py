"""What can be asked of a completion port: the kinds of operation, and what comes back.

An :class:`Operation` is one request.  It is plain data: which handle, which buffers, which kind.  It knows no
driver; a driver (:mod:`iocp_loop.ports.driver`) carries it out and keeps it, with everything it refers to, in its
in-flight table from submission until its last completion has been reaped.  That table is what makes the buffers
safe: nothing that the kernel may still touch can be freed, because the table refers to it.

This is the seed's ``PER_IO_DATA`` (the OVERLAPPED, the buffer, the mode) and ``PER_HANDLE_DATA`` (the socket, behind
the completion key): the mode has become the class of the operation.

The life of an operation::

    NEW --submit--> IN_FLIGHT --last completion reaped--> DONE
                        |                                   ^
                        +--cancel--> CANCELLING ------------+

Every submitted operation gets exactly one *last* completion.  An ordinary operation gets no other.  A *stream*
(``stream = True``) gets any number of completions with a value before it; its last one is either the end of its data
(an empty value) or an error (``ECANCELED`` after a cancel).  A cancel is only a request: an operation that finished
before the cancel reached it completes with its value.
"""

from __future__ import annotations

import enum
import errno
import socket
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias

__all__ = [
    "READABLE",
    "WRITABLE",
    "Accept",
    "AcceptPipe",
    "AcceptStream",
    "Address",
    "Buffer",
    "Completion",
    "Connect",
    "FileOperation",
    "HandleLike",
    "Operation",
    "Read",
    "ReadInto",
    "Readiness",
    "ReadinessStream",
    "Receive",
    "ReceiveFrom",
    "ReceiveFromInto",
    "ReceiveFromStream",
    "ReceiveInto",
    "ReceiveStream",
    "Send",
    "SendAll",
    "SendFile",
    "SendTo",
    "State",
    "WaitForHandle",
    "Write",
]

#: Bits of the ``events`` of a readiness operation; the values are those of ``POLLIN`` and ``POLLOUT`` in poll(2).
READABLE = 0x001
WRITABLE = 0x004

Buffer: TypeAlias = "bytes | bytearray | memoryview"
Address: TypeAlias = Any  # whatever the socket module takes and gives for the family


class HasFileno(Protocol):
    """Anything with a ``fileno()``, as :mod:`selectors` takes it."""

    def fileno(self) -> int: ...


HandleLike: TypeAlias = "int | HasFileno"


class State(enum.Enum):
    """Where an operation is in its life; see the top of the module."""

    NEW = "new"
    IN_FLIGHT = "in flight"
    CANCELLING = "cancelling"
    DONE = "done"


NEW, IN_FLIGHT, CANCELLING, DONE = State


def fileno(handle: HandleLike) -> int:
    """The descriptor, SOCKET or HANDLE number of `handle`.

    Raises ValueError, as :mod:`selectors` does, where the object is closed or is no handle at all.
    """
    try:
        fd = handle if isinstance(handle, int) else int(handle.fileno())
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"Invalid file object: {handle!r} is no number and has no fileno()") from None
    if fd < 0:
        raise ValueError(f"Invalid file descriptor: {fd} (is it closed?)")
    return fd


def family_of(sock: Any) -> int:
    """The family of a socket as an int: ``sock.family`` makes an enum of it each time."""
    try:
        return _raw_family(sock)
    except TypeError:  # not of the socket module
        return sock.family  # type: ignore[no-any-return]  # an int, or what somebody has in its place


def type_of(sock: Any) -> int:
    """As :func:`family_of`, the type."""
    try:
        return _raw_type(sock)
    except TypeError:
        return int(sock.type)


# Descriptors of the C class beneath socket.socket.
_raw_family: Callable[[Any], int] = socket.SocketType.family.__get__
_raw_type: Callable[[Any], int] = socket.SocketType.type.__get__


def connect_error(code: int | None, address: Address) -> OSError:
    """What asyncio raises of a connect that has failed later, with errno `code`."""
    return OSError(code, f"Connect call failed {address}")


class Operation:
    """One request handed to a port.

    `complete(value, error)` is called by the driver's ``dispatch`` with each completion; of value and error only one
    is meaningful.  Whoever submits the operation sets it: a :class:`~iocp_loop.CompletionPort` queues the completion
    for its ``get``, the proactor resolves a Future, a transport takes its data.

    The error is an OSError if the system has refused, else whatever a method of the handle or of a buffer has raised.
    What `complete` raises is reported and reaches nobody else.  Only KeyboardInterrupt and SystemExit are neither: they
    end the loop.

    The driver owns `token` (the operation's number in the in-flight table), `state` and `driver_data`.
    """

    __slots__ = ("complete", "driver_data", "fd", "handle", "key", "state", "token")

    #: True for kinds that yield many completions.
    stream: ClassVar[bool] = False
    #: True for kinds whose value is lost where nobody takes it: what a cancelled one has got is kept for the next.
    precious: ClassVar[bool] = False
    #: What has to hold on the handle before the call can succeed; of one direction, it is also its place: operations of
    #: a handle and a direction are served in the order of their submission.
    events: int = READABLE

    def __init__(self, handle: HandleLike) -> None:
        self.handle = handle
        self.fd = fileno(handle)
        self.key: object = None
        self.state = NEW
        self.token = 0
        self.complete: Callable[[Any, BaseException | None], object] = _nobody_listens
        self.driver_data: Any = None

    @property
    def in_flight(self) -> bool:
        """True from submission until the last completion has been reaped."""
        return self.state is IN_FLIGHT or self.state is CANCELLING

    @property
    def kind(self) -> str:
        """The name of the kind, for statistics and messages."""
        return type(self).__name__

    def __repr__(self) -> str:
        return f"<{self.kind} fd={self.fd} {self.state.value}>"


def _nobody_listens(value: Any, error: BaseException | None) -> None:
    """The `complete` of an operation that nobody has claimed."""


def is_over(value: Any, error: BaseException | None) -> None:
    """The `complete` of an operation that has ended, set by an owner who refers to it."""


def was_cancelled(error: BaseException) -> bool:
    """Whether `error` tells of a cancel; one that nobody asked for is the loop closing."""
    return isinstance(error, OSError) and error.errno == errno.ECANCELED


# --------------------------------------------------------------------------------------------------
# Sockets: one request, one completion
# --------------------------------------------------------------------------------------------------


class Receive(Operation):
    """Receive at most `size` bytes.  Value: ``bytes``, empty at the end of the stream."""

    __slots__ = ("size",)
    precious = True

    def __init__(self, sock: socket.socket, size: int) -> None:
        super().__init__(sock)
        self.size = size


class ReceiveInto(Operation):
    """Receive into a writable `buffer`.  Value: the number of bytes, 0 at the end of the stream."""

    __slots__ = ("buffer",)
    precious = True

    def __init__(self, sock: socket.socket, buffer: Any) -> None:
        super().__init__(sock)
        self.buffer = writable_view(buffer)


class Send(Operation):
    """Send from one buffer.  Value: how many bytes were taken, which may be fewer than were given."""

    __slots__ = ("data",)
    events = WRITABLE

    def __init__(self, sock: socket.socket, data: Any) -> None:
        super().__init__(sock)
        self.data = readable_view(data)


class SendAll(Operation):
    """Send every byte of several buffers, in order.  Value: the number of bytes sent, which is all of them.

    `size` is the number of bytes in all, `sent` how many the kernel has taken; after a cancel it tells how far it got.
    """

    __slots__ = ("buffers", "sent", "size")
    events = WRITABLE

    def __init__(self, sock: socket.socket, buffers: Sequence[Any]) -> None:
        super().__init__(sock)
        self.buffers = [view for view in map(readable_view, buffers) if view.nbytes]
        self.size = sum(view.nbytes for view in self.buffers)
        self.sent = 0

    def advance(self, count: int) -> bool:
        """Take `count` sent bytes off the front; True when nothing is left."""
        self.sent += count
        buffers = self.buffers
        while buffers and count >= buffers[0].nbytes:
            count -= buffers[0].nbytes
            del buffers[0]
        if count and buffers:
            buffers[0] = buffers[0][count:]
        return not buffers


class SendFile(Operation):
    """Send at most `count` bytes of a file, from `offset` on.  Value: how many were taken, 0 at the end of the file.

    `file` is a descriptor; the position of the file is neither used nor moved.
    """

    __slots__ = ("count", "file", "offset")
    events = WRITABLE

    def __init__(self, sock: socket.socket, file: int, offset: int, count: int) -> None:
        super().__init__(sock)
        self.file = file
        self.offset = offset
        self.count = count


class Accept(Operation):
    """Accept one connection.  Value: ``(socket, address)``; the socket is non-blocking and not inherited."""

    __slots__ = ()
    precious = True
    handle: socket.socket

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)


class Connect(Operation):
    """Connect to `address`, which must be resolved already.  Value: None.

    `begun`: connecting has begun by a call of the caller's, and only the outcome is wanted (not on Windows).
    """

    __slots__ = ("address", "begun")
    events = WRITABLE
    handle: socket.socket

    def __init__(self, sock: socket.socket, address: Address, begun: bool = False) -> None:
        super().__init__(sock)
        self.address = address
        self.begun = begun


class ReceiveFrom(Operation):
    """Receive one datagram of at most `size` bytes.  Value: ``(bytes, address)``."""

    __slots__ = ("size",)
    precious = True

    def __init__(self, sock: socket.socket, size: int) -> None:
        super().__init__(sock)
        self.size = size


class ReceiveFromInto(Operation):
    """Receive one datagram into a writable `buffer`.  Value: ``(number of bytes, address)``."""

    __slots__ = ("buffer",)
    precious = True

    def __init__(self, sock: socket.socket, buffer: Any) -> None:
        super().__init__(sock)
        self.buffer = writable_view(buffer)


class SendTo(Operation):
    """Send one datagram to `address` (None: to where the socket is connected).  Value: the number of bytes."""

    __slots__ = ("address", "data")
    events = WRITABLE

    def __init__(self, sock: socket.socket, data: Any, address: Address) -> None:
        super().__init__(sock)
        self.data = readable_view(data)
        self.address = address


# --------------------------------------------------------------------------------------------------
# Files and pipes
# --------------------------------------------------------------------------------------------------


class FileOperation(Operation):
    """What reads and writes of files and pipes share.  `offset` in bytes; None: from where the file stands."""

    __slots__ = ("offset",)

    def __init__(self, handle: HandleLike, offset: int | None) -> None:
        super().__init__(handle)
        self.offset = offset


class Read(FileOperation):
    """Read at most `size` bytes from a file or pipe.  Value: ``bytes``, empty at the end."""

    __slots__ = ("size",)

    def __init__(self, handle: HandleLike, size: int, offset: int | None = None) -> None:
        super().__init__(handle, offset)
        self.size = size


class ReadInto(FileOperation):
    """Read from a file or pipe into a writable `buffer`.  Value: the number of bytes, 0 at the end."""

    __slots__ = ("buffer",)

    def __init__(self, handle: HandleLike, buffer: Any, offset: int | None = None) -> None:
        super().__init__(handle, offset)
        self.buffer = writable_view(buffer)


class Write(FileOperation):
    """Write from one buffer to a file or pipe.  Value: how many bytes were taken, perhaps fewer than were given."""

    __slots__ = ("data",)
    events = WRITABLE

    def __init__(self, handle: HandleLike, data: Any, offset: int | None = None) -> None:
        super().__init__(handle, offset)
        self.data = readable_view(data)


class AcceptPipe(Operation):
    """Wait until a client has connected to `handle`, the server's end of a named pipe.  Value: None.

    Windows only.  BrokenPipeError: the client came and left before it was waited for; this end can't be used again.
    """

    __slots__ = ()


class WaitForHandle(Operation):
    """Wait until a handle is signalled: a process or thread that has ended, an event that was set.  Value: True.

    Windows only.  Whoever holds the handle must not close it while this is in flight.
    """

    __slots__ = ()


class Readiness(Operation):
    """Wait until one of `events` (READABLE, WRITABLE) holds.  Value: the events that do.

    An error or a hang-up on the handle counts as every event that was asked for, as with select(2).  Raises ValueError
    for other events, or none.
    """

    __slots__ = ("events",)

    def __init__(self, handle: HandleLike, events: int) -> None:
        super().__init__(handle)
        self.events = checked_events(events)


# --------------------------------------------------------------------------------------------------
# Streams: one request, many completions
# --------------------------------------------------------------------------------------------------


class AcceptStream(Operation):
    """Accept connections until cancelled.  Values: ``(socket, address)``, as :class:`Accept` gives them.

    `depth` is how many accepts are outstanding at once where the system takes them one by one (AcceptEx).  Each gets a
    connection, also while whoever made it is busy: with more than one, processes that share a listener are served in
    batches.  An error ends the stream; a connection that was reset before it was accepted is not an error.
    """

    __slots__ = ("depth",)
    stream = True
    handle: socket.socket

    def __init__(self, sock: socket.socket, depth: int = 1) -> None:
        super().__init__(sock)
        self.depth = depth


class ReceiveStream(Operation):
    """Receive until the end of the stream.  Values: ``bytes``; the last completion is ``b""`` or an error.

    With `get_buffer`, a driver that reads straight into memory calls it just before it reads, reads into what it
    returns, and completes with the number of bytes (0 at the end of the stream); a driver whose data are in memory
    already still completes with ``bytes``.  If `get_buffer` returns None, nothing is read this time.

    ``driver.pause(op)`` asks it to rest, ``driver.resume(op)`` to go on.  What the kernel had handed over before the
    rest is still delivered: whoever pauses must be ready to hold it.
    """

    __slots__ = ("get_buffer", "paused")
    stream = True
    handle: socket.socket

    def __init__(self, sock: socket.socket, get_buffer: Callable[[], Any] | None = None) -> None:
        super().__init__(sock)
        self.get_buffer = get_buffer
        self.paused = False


class ReceiveFromStream(Operation):
    """Receive datagrams of at most `size` bytes until cancelled.  Values: ``(bytes, address)``.

    An error that belongs to one datagram (port unreachable) ends the stream like any other; the datagram transport
    reports it and submits a new one.  It can be paused as :class:`ReceiveStream` can.
    """

    __slots__ = ("internet", "paused", "size")
    stream = True
    handle: socket.socket

    def __init__(self, sock: socket.socket, size: int) -> None:
        super().__init__(sock)
        self.size = size
        self.paused = False
        #: True for IPv4 and IPv6: a datagram has at most 64 KiB, and its address is a tuple.
        self.internet = sock.family in (socket.AF_INET, socket.AF_INET6)


class ReadinessStream(Operation):
    """Tell each time that one of `events` holds, level-triggered, until cancelled.  Values: the events that hold.

    The readiness is looked at anew after each completion was delivered.  An error or a hang-up counts as every event
    that was asked for.  Raises ValueError for other events, or none.
    """

    __slots__ = ("events",)
    stream = True

    def __init__(self, handle: HandleLike, events: int) -> None:
        super().__init__(handle)
        self.events = checked_events(events)


class Completion(NamedTuple):
    """What a port gives back: for an operation its value or error, or what somebody posted (`operation` is None)."""

    operation: Operation | None
    key: object
    value: Any
    error: BaseException | None = None

    def result(self) -> Any:
        """The value; raises the error if there is one."""
        if self.error is not None:
            raise self.error
        return self.value


def checked_events(events: int) -> int:
    """`events`, READABLE, WRITABLE or both.  Raises ValueError for anything else."""
    if not events or events & ~(READABLE | WRITABLE):
        raise ValueError(f"events must be READABLE, WRITABLE or both, not {events!r}")
    return events


def readable_view(data: Any) -> memoryview:
    """A flat view of bytes of `data`, which it keeps alive.  TypeError where there is no buffer."""
    view = memoryview(data)
    if view.format == "B" and view.ndim == 1 and view.contiguous:
        return view
    if not view.contiguous:
        raise BufferError("the buffer must be contiguous")
    return view.cast("B")


def writable_view(buffer: Any) -> memoryview:
    """As :func:`readable_view`, for a buffer that will be written to.  TypeError where it is read-only."""
    view = readable_view(buffer)
    if view.readonly:
        raise TypeError("a writable buffer is needed, this one is read-only")
    return view
