"""The way of data through TLS: what a protocol gets, what it writes, and what happens when either goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import ssl
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import iocp_loop
from iocp_loop.life import OVER

from .certificates import client_context, server_context
from .support import LIMIT, Recorder, tcp_pair, turns, until
from .tls_rig import RECORD, Buffered, Peer, Pieces, finish

Loop = iocp_loop.IocpEventLoop

Connect = Callable[..., Any]


@pytest.fixture
def pairs() -> Iterator[Callable[[], tuple[socket.socket, socket.socket]]]:
    """Makes connected sockets; the peers' are closed at the end."""
    peers: list[socket.socket] = []

    def make() -> tuple[socket.socket, socket.socket]:
        ours, peer = tcp_pair()
        peers.append(peer)
        return ours, peer

    yield make
    for peer in peers:
        peer.close()


@pytest.fixture
def connect(loop: Loop, pairs: Callable[[], tuple[socket.socket, socket.socket]]) -> Connect:
    """connect(protocol): a TLS server's end of a connection for it, and the Peer at the other end."""

    async def connect(protocol: asyncio.BaseProtocol, context: ssl.SSLContext | None = None) -> Peer:
        ours, sock = pairs()
        peer = Peer(sock)
        shaking = loop.run_in_executor(None, peer.handshake)
        await loop.connect_accepted_socket(lambda: protocol, ours, ssl=context or server_context())
        await shaking
        return peer

    return connect


# --------------------------------------------------------------------------------------------------
# What a protocol gets
# --------------------------------------------------------------------------------------------------


async def test_records_that_come_together_are_one_piece(loop: Loop, connect: Connect) -> None:
    protocol = Pieces()
    peer = await connect(protocol)
    data = bytes(range(256)) * 10
    peer.sock.sendall(peer.records(data[:10]) + peer.records(data[10:2000]) + peer.records(data[2000:]))
    await until(lambda: protocol.data == data)
    assert protocol.pieces == [data]
    await finish(protocol, peer)


@pytest.mark.parametrize("before", [1, 4, 5, 6, RECORD - 100, RECORD + 10])
async def test_a_record_in_two_parts(loop: Loop, connect: Connect, before: int) -> None:
    """OpenSSL has the most of the record already when the end of it comes: the data are more than what came last."""
    protocol = Pieces()
    peer = await connect(protocol)
    data = b"record" * (RECORD // 6) + b"end."
    record = peer.records(data)
    peer.sock.sendall(record[:before])
    await asyncio.sleep(0.01)
    assert not protocol.pieces
    peer.sock.sendall(record[before:])
    await until(lambda: protocol.pieces)
    assert protocol.pieces == [data]
    await finish(protocol, peer)


async def test_a_record_byte_by_byte(loop: Loop, connect: Connect) -> None:
    protocol = Pieces()
    peer = await connect(protocol)
    peer.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for byte in peer.records(b"hello"):
        peer.sock.sendall(bytes([byte]))
        await asyncio.sleep(0)
    await until(lambda: protocol.pieces)
    assert protocol.pieces == [b"hello"]
    await finish(protocol, peer)


async def test_no_read_is_tried_for_nothing(loop: Loop, connect: Connect) -> None:
    """Each would raise SSLWantReadError, which costs more than decrypting what has come."""
    reads = 0

    class Counting(ssl.SSLObject):
        def read(self, *args: Any) -> Any:
            nonlocal reads
            reads += 1
            return super().read(*args)

    context = server_context()
    context.sslobject_class = Counting
    protocol = Pieces()
    peer = await connect(protocol, context)
    await asyncio.sleep(0.01)
    reads = 0
    for number in range(1, 6):
        peer.sock.sendall(peer.records(b"x" * number))
        await until(lambda number=number: len(protocol.pieces) == number)  # type: ignore[misc]  # a default binds it
    assert reads == 5
    await finish(protocol, peer)


def with_read(read: Callable[..., Any]) -> ssl.SSLContext:
    """A server's context whose SSLObjects read by ``read(its own read, size, buffer)``."""

    class Reading(ssl.SSLObject):
        def read(self, len: int = 1024, buffer: Any = None) -> Any:
            return super().read(len) if buffer is None else read(super().read, len, buffer)

    context = server_context()
    context.sslobject_class = Reading
    return context


@pytest.mark.parametrize("view", [lambda it: it, lambda it: it[:], memoryview], ids=["itself", "slice", "view"])
@pytest.mark.parametrize("make", [Pieces, lambda: Buffered(100_000)], ids=["Protocol", "BufferedProtocol"])
async def test_what_an_sslobject_was_lent_is_its_own_no_longer(
    loop: Loop, connect: Connect, make: Callable[[], Any], view: Callable[[memoryview], memoryview]
) -> None:
    """The memory of a piece of data is the protocol's once it is delivered; a view that was kept does not reach it."""
    kept: list[memoryview] = []

    def keep(read: Callable[..., Any], size: int, buffer: memoryview) -> Any:
        kept.append(view(buffer))
        return read(size, buffer)

    protocol = make()
    peer = await connect(protocol, with_read(keep))
    kept.clear()
    for number in range(1, 6):
        peer.sock.sendall(peer.records(b"hello"))
        await until(lambda number=number: len(protocol.data) == 5 * number)  # type: ignore[misc]  # a default binds it
        for each in kept:
            with contextlib.suppress(ValueError):  # it was released
                bytes(each)
                each[:] = bytes(len(each))
    assert protocol.data == b"hello" * 5
    if isinstance(protocol, Pieces):
        assert protocol.pieces == [b"hello"] * 5
    kept.clear()
    await finish(protocol, peer)


@pytest.mark.parametrize("answer", [-1, -2, -10, 1 << 30, 1 << 70, "many", None, b"bytes"])
@pytest.mark.parametrize("make", [Pieces, lambda: Buffered(1000)], ids=["Protocol", "BufferedProtocol"])
async def test_an_sslobject_that_counts_wrong(
    loop: Loop, connect: Connect, reports: list[dict[str, Any]], make: Callable[[], Any], answer: Any
) -> None:
    protocol = make()
    peer = await connect(protocol, with_read(lambda read, size, buffer: answer))
    peer.sock.sendall(peer.records(b"hello"))
    await until(lambda: protocol.finished)
    assert isinstance(protocol.lost, (ValueError, TypeError, OverflowError))
    assert not protocol.data
    assert [report["exception"] for report in reports] == [protocol.lost]
    reports.clear()


async def test_an_sslobject_that_shrinks_what_it_was_lent(
    loop: Loop, connect: Connect, reports: list[dict[str, Any]]
) -> None:
    def shrink(read: Callable[..., Any], size: int, buffer: memoryview) -> Any:
        count, memory = read(size, buffer), buffer.obj
        buffer.release()
        with contextlib.suppress(BufferError):  # it is held
            memory.clear()  # type: ignore[attr-defined]  # of a bytearray
        return count

    protocol = Pieces()
    peer = await connect(protocol, with_read(shrink))
    peer.sock.sendall(peer.records(b"hello"))
    await until(lambda: protocol.data or protocol.finished)
    assert protocol.data == b"hello" or isinstance(protocol.lost, BufferError)
    reports.clear()
    await finish(protocol, peer)


#: What the way of a message looks at.
MEMBERS = ["_app_protocol", "_incoming", "_outgoing", "_sslobj", "_state", "_transport", "_write_backlog"]
MEMBERS_FOR_BUFFERS = ["_app_protocol_get_buffer", "_app_protocol_buffer_updated"]


@pytest.mark.parametrize("where", ["read", "protocol", "writing"])
@pytest.mark.parametrize("name", [*MEMBERS, *MEMBERS_FOR_BUFFERS])
async def test_a_member_that_goes_missing(
    loop: Loop, connect: Connect, reports: list[dict[str, Any]], where: str, name: str
) -> None:
    """Whatever is called may take it away.  That is an error, and nothing worse."""
    taken: list[Any] = []

    def take() -> None:
        if not taken and armed:
            taken.append(getattr(tls, name))
            delattr(tls, name)

    def read(read: Callable[..., Any], size: int, buffer: memoryview) -> Any:
        count = read(size, buffer)
        if where == "read":
            take()
        return count

    class Taking(Pieces):
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if where == "protocol":
                self.transport.write(b"answer")
                take()
                self.transport.write(b"answer")

    class TakingBuffered(Buffered):
        def get_buffer(self, sizehint: int) -> bytearray:
            if where == "protocol":
                take()
            return super().get_buffer(sizehint)

    armed = False
    protocol: Any = TakingBuffered(3) if name in MEMBERS_FOR_BUFFERS else Taking()
    peer = await connect(protocol, with_read(read))
    tls = protocol.transport._ssl_protocol
    below = tls._transport
    armed = True
    if where == "writing":
        below.write = lambda data: take()
        protocol.transport.write(b"hello")
        del below.write
    peer.sock.sendall(peer.records(b"hello") + peer.records(b"again"))
    await until(lambda: taken)
    await turns()
    gc.collect()
    if not hasattr(tls, name):
        setattr(tls, name, taken[0])
    reports.clear()
    below.abort()
    await until(lambda: below._state >= OVER)
    reports.clear()


async def test_no_buffer_is_kept_for_a_connection(loop: Loop, connect: Connect) -> None:
    protocol = Pieces()
    peer = await connect(protocol)
    peer.sock.sendall(peer.records(b"hello"))
    await until(lambda: protocol.pieces)
    assert len(protocol.transport._ssl_protocol._ssl_buffer) == 0  # type: ignore[attr-defined]  # SSLProtocol's
    await finish(protocol, peer)


@pytest.mark.parametrize("size", [1, 100, RECORD, RECORD + 1, 100_000])
async def test_a_buffered_protocol(loop: Loop, connect: Connect, size: int) -> None:
    protocol = Buffered(size)
    peer = await connect(protocol)
    data = b"0123456789abcdef" * 64
    peer.sock.sendall(peer.records(data))
    await until(lambda: protocol.data == data)
    data += bytes(50_000)
    sending = loop.run_in_executor(None, peer.sock.sendall, peer.records(data[1024:]))
    await until(lambda: protocol.data == data)
    await sending
    await finish(protocol, peer)


async def test_the_hint_of_get_buffer(loop: Loop, connect: Connect) -> None:
    """It is the size of what has come and is not decrypted yet, as in asyncio."""
    protocol = Buffered(1000)
    peer = await connect(protocol)
    protocol.hints.clear()
    record = peer.records(b"hello")
    peer.sock.sendall(record)
    await until(lambda: protocol.data)
    assert protocol.hints == [len(record)]
    await finish(protocol, peer)


async def test_a_buffered_protocol_that_pauses(loop: Loop, connect: Connect) -> None:
    """Even in the middle of a record: it gets no more until it resumes."""

    class Pausing(Buffered):
        def buffer_updated(self, nbytes: int) -> None:
            super().buffer_updated(nbytes)
            if len(self.data) == 10:
                self.transport.pause_reading()

    protocol = Pausing(5)
    peer = await connect(protocol)
    peer.sock.sendall(peer.records(b"0123456789") + peer.records(b"abcdefghij"))
    await until(lambda: len(protocol.data) == 10)
    await asyncio.sleep(0.01)
    assert protocol.data == b"0123456789"
    protocol.transport.resume_reading()
    await until(lambda: len(protocol.data) == 20)
    assert protocol.data == b"0123456789abcdefghij"
    await finish(protocol, peer)


async def test_an_empty_buffer_is_a_mistake(loop: Loop, connect: Connect, reports: list[dict[str, Any]]) -> None:
    protocol = Buffered(0)
    await connect(protocol)
    await until(lambda: protocol.finished)
    assert isinstance(protocol.lost, RuntimeError)
    assert not protocol.ended  # it is not the end of the stream
    assert "get_buffer() returned an empty buffer" in str(reports.pop()["exception"])


async def test_a_protocol_may_become_a_buffered_one(loop: Loop, connect: Connect) -> None:
    """set_protocol by data_received: what has come behind it goes to the new one."""
    second = Buffered(1000)

    class First(Pieces):
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            second.connection_made(self.transport)
            self.transport.set_protocol(second)

    first = First()
    peer = await connect(first)
    peer.sock.sendall(peer.records(b"one"))
    await until(lambda: first.pieces)
    peer.sock.sendall(peer.records(b"two"))
    await until(lambda: second.data)
    assert (first.pieces, bytes(second.data)) == ([b"one"], b"two")
    await finish(second, peer)


@pytest.mark.parametrize("make", [Pieces, lambda: Buffered(1000)])
async def test_the_end_is_told_to_who_is_the_protocol_by_then(
    loop: Loop, connect: Connect, make: Callable[[], Any]
) -> None:
    """set_protocol in each turn, so also in the one between the end of the transport beneath and connection_lost."""
    protocols = [make()]
    peer = await connect(protocols[0])
    transport = protocols[0].transport
    transport.abort()
    while not any(protocol.finished for protocol in protocols):
        protocols.append(make())
        transport.set_protocol(protocols[-1])
        await asyncio.sleep(0)
    assert [protocol.finished for protocol in protocols] == [False] * (len(protocols) - 1) + [True]
    assert transport.get_protocol() is None
    peer.sock.close()


@pytest.mark.parametrize("make", [Pieces, lambda: Buffered(1000)])
async def test_the_end(loop: Loop, connect: Connect, make: Callable[[], Any]) -> None:
    """Data and the peer's goodbye in one piece: the data first."""
    protocol = make()
    peer = await connect(protocol)
    peer.sock.sendall(peer.records(b"last words") + peer.goodbye())
    await until(lambda: protocol.data == b"last words")
    peer.sock.shutdown(socket.SHUT_WR)
    await until(lambda: protocol.finished)
    assert protocol.lost is None
    assert protocol.ended if isinstance(protocol, Buffered) else "eof_received" in protocol.calls


@pytest.mark.parametrize("make", [Pieces, lambda: Buffered(1000)])
async def test_what_comes_before_an_invalid_record_is_delivered(
    loop: Loop, connect: Connect, make: Callable[[], Any]
) -> None:
    protocol = make()
    peer = await connect(protocol)
    good, broken = peer.records(b"authentic"), bytearray(peer.records(b"forged"))
    broken[-1] ^= 1
    peer.sock.sendall(good + broken)
    await until(lambda: protocol.finished)
    assert protocol.data == b"authentic"
    assert isinstance(protocol.lost, ssl.SSLError)


class Closing(Pieces):
    """Closes its transport in the callback that is named so."""

    def __init__(self, where: str, how: str) -> None:
        super().__init__()
        self.where = where
        self.how = how

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if self.where == "connection_made":
            getattr(transport, self.how)()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.where == "data_received":
            getattr(self.transport, self.how)()


@pytest.mark.parametrize("how", ["close", "abort"])
@pytest.mark.parametrize("where", ["connection_made", "data_received"])
async def test_closing_while_the_peer_sends(loop: Loop, connect: Connect, where: str, how: str) -> None:
    """To close a connection of one's own accord is no error, whatever is still coming in; nor need anybody read it."""
    protocol = Closing(where, how)
    peer = await connect(protocol)
    with contextlib.suppress(ConnectionError):
        for _ in range(3):
            peer.sock.sendall(peer.records(b"x" * 10_000))
            await turns()
        peer.sock.sendall(peer.records(b"last words") + peer.goodbye())
    await until(lambda: protocol.finished)
    assert protocol.lost is None


async def test_closing_while_reading_is_paused(loop: Loop, connect: Connect) -> None:
    """What nobody has read is dropped, so that the peer's goodbye is heard."""
    protocol = Pieces()
    peer = await connect(protocol)
    protocol.transport.pause_reading()
    much = bytes(4 << 20)  # the buffer is full long before, and the transport beneath paused
    sending = loop.run_in_executor(None, lambda: peer.sock.sendall(peer.records(much) + peer.goodbye()))
    await until(lambda: protocol.transport._ssl_protocol._ssl_reading_paused)  # type: ignore[attr-defined]  # SSLProtocol's
    protocol.transport.close()
    await sending
    await until(lambda: protocol.finished)
    assert protocol.lost is None
    assert not protocol.data


async def test_an_exception_of_the_protocol(loop: Loop, connect: Connect, reports: list[dict[str, Any]]) -> None:
    class Failing(Pieces):
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            raise ZeroDivisionError("oops")

    protocol = Failing()
    peer = await connect(protocol)
    peer.sock.sendall(peer.records(b"hello"))
    await until(lambda: protocol.finished)
    assert isinstance(protocol.lost, ZeroDivisionError)
    report = reports.pop()
    assert report["message"] == "Fatal error on SSL protocol"
    assert isinstance(report["exception"], ZeroDivisionError)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_loop(loop: Loop, connect: Connect, error: type[BaseException]) -> None:
    class Ending(Pieces):
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            raise error

    protocol = Ending()
    peer = loop.run_until_complete(connect(protocol))
    peer.sock.sendall(peer.records(b"hello"))
    with pytest.raises(error):
        loop.run_until_complete(asyncio.sleep(LIMIT))
    protocol.transport.abort()
    loop.run_until_complete(until(lambda: protocol.finished))


# --------------------------------------------------------------------------------------------------
# What it writes
# --------------------------------------------------------------------------------------------------


async def test_everything_that_can_be_written(loop: Loop, connect: Connect) -> None:
    protocol = Pieces()
    peer = await connect(protocol)
    write = protocol.transport.write
    write(b"bytes,")
    write(bytearray(b"bytearray,"))
    write(memoryview(b"--memoryview,--")[2:-2])
    write(b"")
    protocol.transport.writelines([b"a,", b"list,"])
    write(b"end")
    expected = b"bytes,bytearray,memoryview,a,list,end"
    assert await loop.run_in_executor(None, peer.read, len(expected)) == expected
    wrong: Any
    for wrong in ("text", 7, None):
        with pytest.raises(TypeError, match="bytes-like"):
            write(wrong)
    await finish(protocol, peer)


async def test_flow_control(loop: Loop, connect: Connect) -> None:
    """A peer that does not read: the protocol is paused, and what it has written arrives later, in order."""
    protocol = Pieces()
    peer = await connect(protocol)
    chunk = bytes(range(256)) * 256
    written = bytearray()
    while "pause_writing" not in protocol.calls:
        protocol.transport.write(chunk)
        written += chunk
    more = b"more" * 5000
    protocol.transport.write(more)
    written += more
    low, high = protocol.transport.get_write_buffer_limits()
    assert protocol.transport.get_write_buffer_size() >= high > low
    assert await loop.run_in_executor(None, peer.read, len(written)) == written
    await until(lambda: "resume_writing" in protocol.calls)
    assert protocol.transport.get_write_buffer_size() == 0
    protocol.transport.write(b"again")
    assert await loop.run_in_executor(None, peer.read, 5) == b"again"
    await finish(protocol, peer)


async def test_limits_of_nothing(loop: Loop, connect: Connect) -> None:
    """A protocol that wants to know when all is sent is paused as long as something is not, and no longer."""
    protocol = Pieces()
    peer = await connect(protocol)
    transport = protocol.transport
    transport.set_write_buffer_limits(0)
    assert transport.get_write_buffer_limits() == (0, 0)
    transport.write(b"small")
    assert "pause_writing" not in protocol.calls
    written = b"small"
    while "pause_writing" not in protocol.calls:
        transport.write(bytes(100_000))
        written += bytes(100_000)
    assert await loop.run_in_executor(None, peer.read, len(written)) == written
    await until(lambda: protocol.calls[-1] == "resume_writing")
    await finish(protocol, peer)
    transport.set_write_buffer_limits(0)
    assert protocol.calls[-1] == "connection_lost"


async def test_the_handshake_is_completed_though_the_protocol_rests(loop: Loop) -> None:
    """The last word of the handshake is the client's, and its protocol has been told of the connection by then."""

    class Resting(Recorder):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            self.transport.pause_reading()

    one, two = socket.socketpair()
    resting, server = Resting(), Recorder()
    await asyncio.gather(
        loop.create_connection(lambda: resting, sock=one, ssl=client_context(), server_hostname="localhost"),
        loop.connect_accepted_socket(lambda: server, two, ssl=server_context()),
    )
    server.transport.write(b"hello")
    await turns()
    assert not resting.data
    resting.transport.resume_reading()
    await until(lambda: resting.data == b"hello")
    resting.transport.close()
    await until(lambda: resting.finished and server.finished)


async def test_abort_in_what_close_delivers(loop: Loop, connect: Connect) -> None:
    """close() delivers what has been decrypted, as asyncio's own does; that may change the protocol's mind."""

    class Undecided(Buffered):
        def buffer_updated(self, nbytes: int) -> None:
            super().buffer_updated(nbytes)
            self.transport.abort() if self.transport.is_closing() else self.transport.close()

    protocol = Undecided(10)
    peer = await connect(protocol)
    peer.sock.sendall(peer.records(bytes(100)))
    await until(lambda: protocol.finished)
    assert len(protocol.data) == 20
    assert protocol.lost is None
    peer.sock.close()


async def test_whatever_is_asked_of_a_transport_that_was_closed_twice(loop: Loop, connect: Connect) -> None:
    protocol = Pieces()
    peer = await connect(protocol)
    transport = protocol.transport
    for _ in range(2):
        transport.close()
        assert transport.get_protocol() is protocol
        assert transport.get_extra_info("peername") == peer.sock.getsockname()
        assert transport.get_write_buffer_size() >= 0
        transport.write(b"too late")
    await finish(protocol, peer)


async def test_writing_before_the_handshake_is_done(loop: Loop) -> None:
    """Only those get at the transport that early who ask the one beneath; what they write goes out afterwards."""
    server, client = Recorder(), Recorder()
    ours, theirs = tcp_pair()
    await loop.create_connection(lambda: server, sock=ours)
    await loop.create_connection(lambda: client, sock=theirs)
    upgrades = [
        loop.start_tls(server.transport, server, server_context(), server_side=True),
        loop.start_tls(client.transport, client, client_context(), server_hostname="localhost"),
    ]
    tasks = [asyncio.ensure_future(upgrade) for upgrade in upgrades]
    await turns(2)  # the tasks, and connection_made; the handshake needs more
    server.transport.get_protocol()._app_transport.write(b"early")  # type: ignore[attr-defined]  # SSLProtocol's
    for protocol, secure in zip((server, client), await asyncio.gather(*tasks), strict=True):
        assert secure is not None
        protocol.transport = secure
    await until(lambda: client.data == b"early")
    server.transport.write(b", late")
    await until(lambda: client.data == b"early, late")
    for protocol in (server, client):
        protocol.transport.abort()
        await until(lambda protocol=protocol: protocol.finished)  # type: ignore[misc]  # a default binds it


async def test_writing_to_a_lost_connection_is_logged(
    loop: Loop, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    protocol = Pieces()
    peer = await connect(protocol)
    protocol.transport.abort()
    await until(lambda: protocol.finished)
    for _ in range(10):
        protocol.transport.write(b"anybody there?")
    assert "SSL connection is closed" in caplog.text
    peer.sock.close()


# --------------------------------------------------------------------------------------------------
# TLS in TLS
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [10, 100_000])
async def test_tls_in_tls(loop: Loop, size: int) -> None:
    """The inner protocol's transport is one of asyncio's kind, which takes it for a BufferedProtocol."""
    server, client = Recorder(), Recorder()
    ours, theirs = tcp_pair()
    await loop.create_connection(lambda: server, sock=ours)
    await loop.create_connection(lambda: client, sock=theirs)
    for _ in range(2):
        upgraded = await asyncio.gather(
            loop.start_tls(server.transport, server, server_context(), server_side=True),
            loop.start_tls(client.transport, client, client_context(), server_hostname="localhost"),
        )
        for protocol, secure in zip((server, client), upgraded, strict=True):
            assert secure is not None
            protocol.transport = secure
    client.transport.write(b"x" * size)
    await until(lambda: len(server.data) == size)
    server.transport.write(b"y" * size)
    await until(lambda: len(client.data) == size)
    assert set(server.data) == set(b"x")
    assert set(client.data) == set(b"y")
    for protocol in (server, client):
        protocol.transport.abort()
        await until(lambda protocol=protocol: protocol.finished)  # type: ignore[misc]  # a default binds it
