"""Lives of connections, for test_callbacks.py: a protocol that does something in a callback, its peer, and the script.

A *life*: the connection is made, the peer says a few things, our side writes more than the kernel takes, the peer hears
it all and ends its side, ours closes.  Where a callback closes, pauses or raises on the way, the script makes the best
of it.  It goes step by step: neither side does anything before the other has come to where it can.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import itertools
import os
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from .certificates import client_context, server_context
from .support import LIMIT, tcp_pair, turns, udp_socket

Deed = Callable[["Life"], object]

#: What a life came to, as far as it is to come to the same on every loop.
Outcome = tuple[Any, ...]

#: Bytes of a write that fills the kernel's buffers, made small, after a few times.
MUCH = bytes(range(250)) * 1600

#: What the peer says.  A protocol that lends 100 bytes is called several times for the second.
PIECES = [b"one", b"in pieces of a hundred bytes, the last of them not full;" * 4, b"three"]

#: Large enough to be received in bulk, small enough for the kernel to hold.
LARGE = bytes(range(250)) * 200

#: Made once: that takes its time.
client = functools.cache(client_context)


@functools.cache
def server() -> ssl.SSLContext:
    """It issues no session tickets: they come unasked, alone or together with what the peer says first."""
    context = server_context()
    context.num_tickets = 0
    return context


class OnPurpose(Exception):
    """What a callback raises that is to fail."""


class Life:
    """What happens to the protocols of one transport.  In the callback `at`, the first time, `deed` is done.

    `wrong` tells what should not have happened.
    """

    def __init__(self, kind: type[Noted], at: str, deed: Deed, large: bool = False) -> None:
        self.at = at
        self.deed = deed
        self.large = large  # the peer says much at once
        self.armed = at == "connection_made"  # the deed is still to be done
        self.above_tls = False
        self.patience = LIMIT  # seconds
        self.beside: Callable[[], object] = lambda: None  # what goes on elsewhere on the loop
        self.transport: Any = None
        self.protocol = kind(self)
        self.calls: list[str] = []
        self.wrong: list[str] = []
        self.data = bytearray()
        self.written = bytearray()
        self.written_too_late = bytearray()
        self.lost: BaseException | None = None
        self.lent: Any = None  # (to the protocol, memory)
        # What has been done so far.
        self.closing = self.aborted = self.paused = self.failed = self.ended_writing = self.writing_paused = False

    @property
    def over(self) -> bool:
        return "connection_lost" in self.calls

    @property
    def goes_on(self) -> bool:
        return not self.over and not self.closing and self.transport is not None

    @property
    def order(self) -> list[str]:
        """The calls in their order, those that receive under one name, without those of flow control."""
        receiving = dict.fromkeys(("data_received", "get_buffer", "buffer_updated"), "data")
        names = [receiving.get(name, name) for name in self.calls if name not in ("pause_writing", "resume_writing")]
        return [name for name, _ in itertools.groupby(names)]

    def check(self, holds: object, what: str) -> None:
        if not holds:
            self.wrong.append(f"{what}; the calls: {self.calls}")

    def may_receive(self, name: str) -> bool:
        """Whether the callback `name`, one of those that receive, may be called now."""
        if self.above_tls and name == "get_buffer":
            return not self.aborted  # called before it is known whether anything has come
        # Above TLS, what the peer says until it answers our good-bye is delivered, as by asyncio's own.
        closed = self.aborted if self.above_tls else self.closing
        # get_buffer() may pause; what it lent is filled all the same, as by asyncio's own loops.
        rests = self.paused and not self.closing and not (name == "buffer_updated" and self.lent)
        return not closed and not rests and "eof_received" not in self.calls

    def come(self, protocol: Noted, name: str, *args: Any) -> Any:
        """The callback `name` of `protocol` has been called."""
        # asyncio binds a call of a process to its protocol when it schedules it: what came in the turn of a change is
        # told to the earlier one.
        self.check(
            protocol is self.protocol or isinstance(protocol, Process), f"{name} of a protocol that was replaced"
        )
        self.check(not self.over, f"{name} after connection_lost")
        self.check((name == "connection_made") == (not self.calls), f"{name} out of order")
        if name in ("data_received", "get_buffer", "buffer_updated", "eof_received", "datagram_received"):
            self.check(self.may_receive(name), f"{name} after the end, or while paused")
        if self.calls[-1:] != [name]:
            self.calls.append(name)
        getattr(self, name, lambda *_: None)(*args)
        lent = self.lent and self.lent[1]
        if name == self.at and self.armed:
            self.armed = False
            self.deed(self)
        if name == "get_buffer":
            return lent
        return name == "eof_received" and self.transport is not None

    # -- what is noted of some calls ---------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.check(type(data) is bytes and data, f"data_received({data!r})")
        self.data += data

    def datagram_received(self, data: bytes, address: Any) -> None:
        self.data_received(data)

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        self.data_received(data)

    def get_buffer(self, sizehint: int) -> None:
        self.lent = self.protocol, bytearray(20_000 if self.large else 100)

    def buffer_updated(self, count: int) -> None:
        (protocol, lent), self.lent = self.lent or (None, bytearray()), None
        self.check(protocol is self.protocol, "buffer_updated of a protocol that has lent nothing")
        self.check(type(count) is int and 0 < count <= len(lent), f"buffer_updated({count!r})")
        self.data += lent[:count]
        lent.clear()  # an error while somebody else has a view of it

    def pause_writing(self) -> None:
        self.check(not self.writing_paused, "pause_writing twice")
        self.writing_paused = True

    def resume_writing(self) -> None:
        self.check(self.writing_paused, "resume_writing without pause_writing")
        self.writing_paused = False

    def connection_lost(self, exc: BaseException | None) -> None:
        self.lost = exc

    def write(self, data: bytes) -> None:
        """Note that `data` are written.  After close() they are sent only if others before them still wait."""
        if self.closing:
            self.written_too_late += data
        else:
            self.written += data


def callback(name: str) -> Callable[..., Any]:
    def call(self: Any, *args: Any) -> Any:
        return self.life.come(self, name, *args)

    return call


class Noted:
    """A protocol that tells its life of each callback."""

    def __init__(self, life: Life) -> None:
        self.life = life

    connection_made = callback("connection_made")
    connection_lost = callback("connection_lost")
    pause_writing = callback("pause_writing")
    resume_writing = callback("resume_writing")


class Plain(Noted, asyncio.Protocol):
    data_received = callback("data_received")
    eof_received = callback("eof_received")


class Buffered(Noted, asyncio.BufferedProtocol):
    get_buffer = callback("get_buffer")
    buffer_updated = callback("buffer_updated")
    eof_received = callback("eof_received")


class Datagrams(Noted, asyncio.DatagramProtocol):
    datagram_received = callback("datagram_received")
    error_received = callback("error_received")


class Process(Noted, asyncio.SubprocessProtocol):
    pipe_data_received = callback("pipe_data_received")
    pipe_connection_lost = callback("pipe_connection_lost")
    process_exited = callback("process_exited")


# ---------------------------------------------------------------------------------------------------------------------
# The deeds
# ---------------------------------------------------------------------------------------------------------------------


def close(life: Life) -> None:
    life.closing = True
    life.transport.close()


def abort(life: Life) -> None:
    life.closing = life.aborted = True
    getattr(life.transport, "abort", life.transport.close)()  # a pipe that is read has but close()


def pause(life: Life) -> None:
    """Until the script sees that nothing comes any more."""
    life.transport.pause_reading()
    life.paused = not life.closing


def resume(life: Life) -> None:
    life.paused = False
    life.transport.resume_reading()


def setting(kind: type[Noted]) -> Deed:
    def set_protocol(life: Life) -> None:
        life.protocol = kind(life)
        life.transport.set_protocol(life.protocol)

    set_protocol.__name__ = f"set_{kind.__name__.lower()}"
    return set_protocol


def write(life: Life, data: bytes = b"written in a callback") -> None:
    if life.ended_writing:
        with pytest.raises(RuntimeError):
            life.transport.write(data)
    else:
        life.write(data)
        life.transport.write(data)


def write_much(life: Life) -> None:
    write(life, MUCH)


def writelines(life: Life) -> None:
    if not life.ended_writing:
        life.write(b"several lines")
        life.transport.writelines([b"several", bytearray(b" "), memoryview(b"lines")])


def write_eof(life: Life) -> None:
    if life.transport.can_write_eof():
        life.transport.write_eof()
        life.closing = life.transport.is_closing()  # a pipe is, after this
        life.ended_writing = not life.closing


def set_limits(life: Life) -> None:
    life.transport.set_write_buffer_limits(0)


def send(life: Life) -> None:
    life.write(b"a datagram")
    life.transport.sendto(b"a datagram")


def send_many(life: Life) -> None:
    for _ in range(300):
        life.write(bytes(1000))
        life.transport.sendto(bytes(1000))


def ask(life: Life) -> None:
    """Whatever can be asked."""
    transport = life.transport
    repr(transport)
    for name in ("socket", "sockname", "peername", "pipe", "sslcontext", "subprocess", "no such thing"):
        transport.get_extra_info(name)
    for method in (
        *("is_reading", "can_write_eof", "get_write_buffer_size", "get_write_buffer_limits"),
        *("get_pid", "get_returncode"),
    ):
        with contextlib.suppress(NotImplementedError):  # what only writes may be asked whether it reads
            getattr(transport, method, lambda: None)()
    life.check(transport.get_protocol() in (life.protocol, None), "get_protocol() is wrong")
    life.check(transport.is_closing() or not life.closing, "is_closing() is wrong")


def forget(life: Life) -> None:
    """Nobody but the loop has the transport any more."""
    life.transport = None
    gc.collect()


def fail(life: Life) -> None:
    life.failed = True
    raise OnPurpose


def fail_as_cancelled(life: Life) -> None:
    life.failed = True
    raise asyncio.CancelledError


def kill(life: Life) -> None:
    life.closing = True
    life.transport.kill()


def close_input(life: Life) -> None:
    life.closing = True
    life.transport.get_pipe_transport(0).close()


def abort_input(life: Life) -> None:
    life.closing = True
    life.transport.get_pipe_transport(0).abort()


def close_output(life: Life) -> None:
    life.closing = True
    life.transport.get_pipe_transport(1).close()


def rest_of_output(life: Life) -> None:
    output = life.transport.get_pipe_transport(1)
    output.pause_reading()
    asyncio.get_running_loop().call_soon(output.resume_reading)


def both(one: Deed, two: Deed) -> Deed:
    def do(life: Life) -> None:
        one(life)
        two(life)

    do.__name__ = f"{one.__name__}, {two.__name__}"
    return do


# ---------------------------------------------------------------------------------------------------------------------
# The other side
# ---------------------------------------------------------------------------------------------------------------------


class Peer:
    """A plain socket at the other end.  It never blocks."""

    speaks = True
    ready = True  # after the handshake, if there is one

    def __init__(self, sock: Any = None) -> None:
        self.sock = sock
        self.said = bytearray()
        self.got = bytearray()
        self.reset = False
        if sock is not None:
            sock.setblocking(False)

    def put(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # our side has gone
            assert self.sock.send(data) == len(data)

    def take(self) -> bytes:
        """What has come, as far as it has."""
        data = b""
        with contextlib.suppress(BlockingIOError):
            try:
                while more := self.sock.recv(1 << 20):
                    data += more
            except (ConnectionError, AttributeError):
                self.reset = True
        return data

    def say(self, data: bytes) -> None:
        self.put(data)
        self.said += data

    def hear(self) -> None:
        if self.sock is not None:
            self.got += self.take()

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        if self.sock is not None:
            self.sock.close()
            self.sock = None


class TlsPeer(Peer):
    """The same, a server above TLS."""

    def __init__(self, sock: Any) -> None:
        super().__init__(sock)
        self.ready = False
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = server().wrap_bio(self.incoming, self.outgoing, server_side=True)
        self.step: Callable[[], Any] = self.shake_hands

    def go_on(self) -> None:
        with contextlib.suppress(ssl.SSLError):  # more has to come first, or they have said good-bye
            self.step()
        self.put(self.outgoing.read())

    def shake_hands(self) -> None:
        self.tls.do_handshake()
        self.ready = True
        self.step = self.read
        self.step()

    def read(self) -> None:
        while data := self.tls.read(1 << 20):
            self.got += data
        self.step = self.tls.unwrap  # answer their good-bye
        self.step()

    def say(self, data: bytes) -> None:
        with contextlib.suppress(ssl.SSLError):
            self.tls.write(data)
        self.said += data
        self.go_on()

    def hear(self) -> None:
        if self.sock is not None:
            self.incoming.write(self.take())
            self.go_on()

    def end(self) -> None:
        self.step = self.tls.unwrap
        self.go_on()


class PipePeer(Peer):
    """The other end of a pipe, which either `speaks` or hears."""

    def __init__(self, fd: int, speaks: bool) -> None:
        super().__init__()
        self.fd = fd
        self.speaks = speaks
        os.set_blocking(fd, False)

    def put(self, data: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):
            assert os.write(self.fd, data) == len(data)

    def hear(self) -> None:
        with contextlib.suppress(OSError):  # there is nothing just now, or this is the end that speaks
            while data := os.read(self.fd, 1 << 20):
                self.got += data

    def end(self) -> None:
        self.close()

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


#: make(loop, factory), and who is at the other end.
Made = tuple[Callable[[asyncio.AbstractEventLoop, Callable[[], Any]], Awaitable[Any]], Peer]


def stream(peer: type[Peer] = Peer, **arguments: Any) -> Made:
    ours, theirs = socket.socketpair()
    for sock in (ours, theirs):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 100_000)
    return lambda loop, factory: loop.create_connection(factory, sock=ours, **arguments), peer(theirs)


def tls() -> Made:
    return stream(TlsPeer, ssl=client(), server_hostname="localhost")


def tcp() -> Made:
    ours, theirs = tcp_pair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 100_000)
    return lambda loop, factory: loop.create_connection(factory, sock=ours), Peer(theirs)


def reading_pipe() -> Made:
    reading, writing = os.pipe()
    pipe = open(reading, "rb", 0)
    return lambda loop, factory: loop.connect_read_pipe(factory, pipe), PipePeer(writing, speaks=True)


def writing_pipe() -> Made:
    reading, writing = os.pipe()
    pipe = open(writing, "wb", 0)
    return lambda loop, factory: loop.connect_write_pipe(factory, pipe), PipePeer(reading, speaks=False)


def unix_datagrams() -> Made:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    ours.setblocking(False)
    return lambda loop, factory: loop.create_datagram_endpoint(factory, sock=ours), Peer(theirs)


def internet_datagrams() -> Made:
    ours, theirs = udp_socket(), udp_socket()
    ours.connect(theirs.getsockname())
    theirs.connect(ours.getsockname())
    return lambda loop, factory: loop.create_datagram_endpoint(factory, sock=ours), Peer(theirs)


def process() -> Made:
    return lambda loop, factory: loop.subprocess_exec(factory, "cat", stderr=None), Peer()


# ---------------------------------------------------------------------------------------------------------------------
# The script
# ---------------------------------------------------------------------------------------------------------------------


class Script:
    """Leads a life on a loop to its end."""

    def __init__(self, loop: asyncio.AbstractEventLoop, life: Life, made: Made) -> None:
        self.loop = loop
        self.life = life
        self.make, self.peer = made
        self.refused: type | None = None  # what making the connection raised
        life.above_tls = isinstance(self.peer, TlsPeer)

    async def settle(self, condition: Callable[[], object], what: str) -> None:
        """Let the loop turn until `condition` holds, or the life is over."""
        life = self.life
        deadline = time.monotonic() + life.patience
        while not condition() and not life.over:
            assert time.monotonic() < deadline, f"{what} has not come: {life.calls}, {len(life.data)} bytes"
            self.peer.hear()
            life.beside()
            await asyncio.sleep(0)
            if life.paused and life.goes_on:
                await turns()
                resume(life)  # it has rested enough

    async def lead(self) -> Outcome:
        life, peer = self.life, self.peer
        try:
            await self.begin()
            await self.go_on()
            await self.settle(lambda: False, "connection_lost")
            await turns()
            peer.hear()
        finally:
            peer.close()
            if life.transport is not None:
                getattr(life.transport, "abort", life.transport.close)()
            await turns()
        life.check(peer.said.startswith(life.data), "other data came than were sent")
        life.check((life.written + life.written_too_late).startswith(peer.got), "other data went than were written")
        heard = None if self.torn() else len(peer.got)
        life.check(heard is None or heard >= len(life.written), f"the peer got {heard} of {len(life.written)} bytes")
        # How much is written before that is too much depends on how much a loop hands the system at once.
        late = None if heard is None else heard - len(life.written)
        return life.order, len(life.data), type(life.lost), late, self.refused

    async def begin(self) -> None:
        making = asyncio.ensure_future(self.make(self.loop, lambda: self.life.protocol))
        await self.settle(making.done, "the connection")
        result = (await asyncio.gather(making, return_exceptions=True))[0]
        self.refused = type(result) if isinstance(result, BaseException) else None

    async def go_on(self) -> None:
        life, peer = self.life, self.peer
        await self.settle(lambda: peer.ready or life.closing, "the end of the handshake")
        if peer.speaks:
            await self.listen([LARGE] * 6 * life.large)  # which makes the stream one in bulk
        life.armed = life.armed or life.at != "connection_made"
        if peer.speaks:
            await self.listen(PIECES)
        if hasattr(life.transport, "write"):
            life.transport.set_write_buffer_limits(10_000)
            await self.fill(write_much)
        cut_short = life.closing or life.failed or life.over
        if peer.speaks or life.transport is None:
            peer.end()
        if peer.speaks:
            await self.settle(lambda: "eof_received" in life.calls or life.closing, "the end of the stream")
            life.check(cut_short or life.data == peer.said, f"{len(life.data)} of {len(peer.said)} bytes came")
        if life.goes_on:
            close(life)

    async def listen(self, pieces: list[bytes]) -> None:
        """The peer says one thing after the other."""
        life, peer = self.life, self.peer
        for piece in pieces:
            if not life.over and not (life.closing and life.above_tls):
                peer.say(piece)
                await self.settle(lambda: life.data == peer.said or life.closing, "what the peer said")

    async def fill(self, deed: Deed) -> None:
        """Write until that is too much, and then let the peer hear it all."""
        life, peer = self.life, self.peer
        for _ in range(50):
            if life.goes_on and not life.ended_writing and "pause_writing" not in life.calls:
                deed(life)
        life.check("pause_writing" in life.calls or not life.goes_on or life.ended_writing, "no pause_writing")
        await self.settle(lambda: len(peer.got) >= len(life.written) or self.torn(), "what was written")
        await self.settle(lambda: not life.writing_paused or life.closing, "resume_writing")

    def torn(self) -> bool:
        """Whether what was written need not arrive."""
        life = self.life
        answered_too_late = life.above_tls and life.at == "eof_received"
        return life.aborted or life.failed or self.peer.reset or answered_too_late


class DatagramScript(Script):
    """An endpoint that is connected to a socket, which goes away at the end."""

    async def go_on(self) -> None:
        life, peer = self.life, self.peer
        life.armed = life.armed or life.at != "connection_made"
        await self.listen(PIECES)
        if self.make_full:
            if life.goes_on:
                life.transport.set_write_buffer_limits(10_000)
            await self.fill(send_many)
        await self.settle(lambda: peer.got == life.written or self.torn(), "what was sent")
        peer.close()
        if life.goes_on:
            life.transport.sendto(b"nobody receives this")
            await self.settle(lambda: "error_received" in life.calls, "an error")
        if life.goes_on:
            close(life)

    @property
    def make_full(self) -> bool:
        """Whether the peer's kernel takes a few datagrams only; else it throws away what is too much."""
        return bool(self.peer.sock.family == getattr(socket, "AF_UNIX", None))

    def torn(self) -> bool:
        return super().torn() or self.life.at == "error_received"  # then nobody is there any more


class ProcessScript(Script):
    """A child that echoes what it gets.  What its pipes and its exit tell comes in any order."""

    async def go_on(self) -> None:
        life = self.life
        self.peer.said += b"hello"
        life.armed = life.armed or life.at != "connection_made"
        await self.settle(lambda: life.calls, "connection_made")
        if life.goes_on:
            life.transport.get_pipe_transport(0).write(b"hello")
            await self.settle(lambda: life.data == b"hello" or life.closing, "the echo")
        if not life.over:
            life.transport.get_pipe_transport(0).close()
        await self.settle(lambda: False, "connection_lost")
        life.check(life.calls.count("process_exited") == 1, "the end of the process was not told once")

    async def lead(self) -> Outcome:
        await super().lead()
        life = self.life
        return sorted(set(life.calls)), life.closing or len(life.data), type(life.lost)
