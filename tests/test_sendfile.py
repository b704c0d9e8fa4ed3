"""sendfile on transports and sock_sendfile on sockets: offsets, counts, big files, failures, and the fallback."""

from __future__ import annotations

import asyncio
import functools
import io
import os
import select
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pytest

import iocp_loop
from iocp_loop.endpoints import sendfile

from .certificates import client_context, server_context
from .support import Recorder, in_thread, read_all, read_exactly, reset, tcp_pair, turns, udp_socket, until

Loop = iocp_loop.IocpEventLoop

SIZE = 3_000_000
DATA = os.urandom(SIZE)

#: A file of more than 2 GiB that takes no room, and what is sent of it.
BIG = 2 * 1024**3 + 1_000_000


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sendfile") / "data"
    path.write_bytes(DATA)
    return path


@pytest.fixture
def file(path: Path) -> Any:
    with path.open("rb") as file:
        yield file


@pytest.fixture(params=["sent", "copied"])
def source(request: pytest.FixtureRequest, file: BinaryIO) -> Any:
    """A file that the system sends, and one that has to be copied."""
    return file if request.param == "sent" else io.BytesIO(DATA)


def small_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected sockets that take much less than the file; ours is non-blocking."""
    ours, peer = tcp_pair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32768)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32768)
    return ours, peer


@asynccontextmanager
async def connected(loop: Loop) -> AsyncIterator[tuple[Recorder, socket.socket]]:
    """A transport's protocol, and the blocking socket of its peer."""
    ours, peer = small_pair()
    _, protocol = await loop.create_connection(Recorder, sock=ours)
    with peer:
        yield protocol, peer
        protocol.transport.abort()
        await until(lambda: protocol.finished)


async def received(peer: socket.socket, count: int) -> bytes:
    return await asyncio.to_thread(read_exactly, peer, count)


# --------------------------------------------------------------------------------------------------
# Sockets
# --------------------------------------------------------------------------------------------------

PARTS = [(0, None), (0, 1000), (1000, None), (1000, 1000), (0, SIZE), (SIZE - 10, 100), (0, 2 * SIZE), (SIZE, None)]


@pytest.mark.parametrize(("offset", "count"), PARTS)
@pytest.mark.parametrize("fallback", [True, False])
async def test_sock_sendfile(loop: Loop, file: BinaryIO, offset: int, count: int | None, fallback: bool) -> None:
    expected = DATA[offset:] if count is None else DATA[offset : offset + count]
    ours, peer = tcp_pair()
    with ours, peer:
        reading = asyncio.create_task(received(peer, len(expected)))
        assert await loop.sock_sendfile(ours, file, offset, count, fallback=fallback) == len(expected)
        assert await reading == expected
    assert file.tell() == offset + len(expected)


async def test_it_is_done_by_the_system(loop: Loop, file: BinaryIO) -> None:
    ours, peer = tcp_pair()
    with ours, peer:
        reading = asyncio.create_task(received(peer, SIZE))
        await loop.sock_sendfile(ours, file)
        await reading
    operations = loop.stats().operations
    assert operations["SendFile"] > 1
    assert "Send" not in operations
    assert "SendAll" not in operations


@pytest.mark.parametrize("kind", [io.BytesIO, io.BufferedReader])
@pytest.mark.parametrize("over", ["socket", "transport"])
async def test_what_the_system_can_not_send_is_copied(loop: Loop, kind: Callable[..., Any], over: str) -> None:
    """An object without a descriptor; and a pipe, which has no position: that is no error either."""
    reader, writer = os.pipe()
    with open(reader, "rb") as pipe, open(writer, "wb") as feed:
        data = DATA[:4000]  # no more than a pipe holds on any system
        feed.write(data)
        feed.close()
        source: Any = io.BytesIO(data) if kind is io.BytesIO else pipe
        async with connected(loop) as (protocol, peer):
            transport, sock = protocol.transport, tcp_pair()
            with sock[0], sock[1]:
                if over == "socket":
                    send, peer = functools.partial(loop.sock_sendfile, sock[0]), sock[1]
                else:
                    send = functools.partial(loop.sendfile, transport)
                with pytest.raises(asyncio.SendfileNotAvailableError):
                    await send(source, fallback=False)
                reading = asyncio.create_task(received(peer, len(data)))
                assert await send(source) == len(data)
                assert await reading == data


async def test_an_empty_file(loop: Loop, tmp_path: Path) -> None:
    ours, peer = tcp_pair()
    with ours, peer, (tmp_path / "empty").open("w+b") as empty:
        assert await loop.sock_sendfile(ours, empty) == 0


#: What is wrong with a mode, an offset and a count; of two mistakes, the one that asyncio tells of.
WRONG: list[tuple[str, Any, Any, type[Exception], str]] = [
    ("r", 0, None, ValueError, "binary mode"),
    ("r", "x", 1.5, ValueError, "binary mode"),
    ("rb", 0, 0, ValueError, "count must be"),
    ("rb", 0, -5, ValueError, "count must be"),
    ("rb", 0, 1.5, TypeError, "count must be"),
    ("rb", 0, "all", TypeError, "count must be"),
    ("rb", "x", 0, ValueError, "count must be"),
    ("rb", -1, None, ValueError, "offset must be"),
    ("rb", 1.5, None, TypeError, "offset must be"),
    ("rb", "x", 10, TypeError, "offset must be"),
]


async def refuses(send: Callable[..., Any], path: Path) -> None:
    """`send` refuses each wrong argument, and says what is wrong with it."""
    for mode, offset, count, error, message in WRONG:
        with path.open(mode) as file, pytest.raises(error, match=message):
            await send(file, offset, count)
    with pytest.raises((OverflowError, ValueError)), path.open("rb") as file:
        await send(file, 1 << 70, 10)


async def test_wrong_arguments_for_a_socket(loop: Loop, path: Path) -> None:
    ours, peer = tcp_pair()
    with ours, peer:
        await refuses(functools.partial(loop.sock_sendfile, ours), path)
        reading = asyncio.create_task(received(peer, 1000))
        with path.open("rb") as file:
            assert await loop.sock_sendfile(ours, file, 0, 1000) == 1000
        assert await reading == DATA[:1000]
    with udp_socket() as sock, path.open("rb") as file, pytest.raises(ValueError, match="SOCK_STREAM"):
        await loop.sock_sendfile(sock, file)


async def test_a_socket_that_a_transport_uses(loop: Loop, source: BinaryIO) -> None:
    async with connected(loop) as (protocol, _):
        sock = protocol.transport._sock  # type: ignore[attr-defined]  # our transport's
        with pytest.raises(RuntimeError, match="is used by transport"):
            await loop.sock_sendfile(sock, source)


async def test_cancelling_stops_it(loop: Loop, file: BinaryIO) -> None:
    ours, peer = small_pair()
    with ours, peer:
        task = asyncio.create_task(loop.sock_sendfile(ours, file))
        await asyncio.sleep(0.05)
        assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: not loop.stats().in_flight)
        sent = file.tell()
        assert 0 < sent < SIZE
        # The connection is in order: what was counted is what arrives, and more can be sent.
        sending = asyncio.create_task(loop.sock_sendall(ours, b"end"))
        assert await received(peer, sent + 3) == DATA[:sent] + b"end"
        await sending


async def test_a_peer_that_resets(loop: Loop, file: BinaryIO) -> None:
    ours, peer = small_pair()
    with ours:
        task = asyncio.create_task(loop.sock_sendfile(ours, file))
        await received(peer, 1000)
        reset(peer)
        with pytest.raises(ConnectionError):
            await task
        assert 0 < file.tell() <= SIZE


async def test_more_than_two_gib(loop: Loop, tmp_path: Path) -> None:
    """dotnet#42534 and many others: one call takes less than 2 GiB."""
    ours, peer = tcp_pair()
    got = 0

    def read() -> None:
        nonlocal got
        buffer = bytearray(1 << 20)
        discard = socket.MSG_TRUNC if sys.platform == "linux" else 0  # saves a copy
        while count := peer.recv_into(buffer, 0, discard):
            got += count

    with (tmp_path / "sparse").open("w+b") as sparse, peer:
        sparse.truncate(BIG)
        sparse.seek(BIG - 4)
        sparse.write(b"tail")
        sparse.flush()
        with in_thread(read), ours:
            assert await asyncio.wait_for(loop.sock_sendfile(ours, sparse, 10), 300) == BIG - 10
            assert sparse.tell() == BIG
            ours.shutdown(socket.SHUT_WR)
            await until(lambda: got == BIG - 10)
        # An offset that does not fit in 32 bits.
        ours, peer_again = tcp_pair()
        with ours, peer_again:
            assert await loop.sock_sendfile(ours, sparse, BIG - 8, 100, fallback=False) == 8
            assert await received(peer_again, 8) == b"\0\0\0\0tail"


# --------------------------------------------------------------------------------------------------
# Transports
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("offset", "count"), PARTS)
@pytest.mark.parametrize("fallback", [True, False])
async def test_sendfile(loop: Loop, file: BinaryIO, offset: int, count: int | None, fallback: bool) -> None:
    expected = DATA[offset:] if count is None else DATA[offset : offset + count]
    async with connected(loop) as (protocol, peer):
        reading = asyncio.create_task(received(peer, len(expected)))
        assert await loop.sendfile(protocol.transport, file, offset, count, fallback=fallback) == len(expected)
        assert await reading == expected


async def test_between_writes(loop: Loop, source: BinaryIO) -> None:
    """What was written before goes first, also if the kernel has not taken it yet; what is written after, last."""
    before = os.urandom(2_000_000)
    async with connected(loop) as (protocol, peer):
        transport = protocol.transport
        transport.write(before)
        assert transport.get_write_buffer_size() > 0
        sending = asyncio.create_task(loop.sendfile(transport, source))
        reading = asyncio.create_task(received(peer, len(before) + SIZE + 5))
        assert await sending == SIZE
        transport.write(b"after")
        assert await reading == before + DATA + b"after"
        assert "pause_writing" in protocol.calls
        assert protocol.calls[-1] == "resume_writing"


async def test_no_writes_meanwhile(loop: Loop, source: BinaryIO) -> None:
    async with connected(loop) as (protocol, peer):
        transport = protocol.transport
        sending = asyncio.create_task(loop.sendfile(transport, source))
        await turns(1)
        for write in (lambda: transport.write(b"x"), lambda: transport.writelines([b"x"])):
            with pytest.raises(RuntimeError, match="sendfile is in progress"):
                write()
        with pytest.raises(RuntimeError, match="another sendfile is in progress"):
            await loop.sendfile(transport, source)
        assert await received(peer, SIZE) == DATA
        assert await sending == SIZE


async def test_receiving_goes_on_meanwhile(loop: Loop, source: BinaryIO) -> None:
    async with connected(loop) as (protocol, peer):
        sending = asyncio.create_task(loop.sendfile(protocol.transport, source))
        await turns()
        peer.sendall(b"are you there?")
        await until(lambda: protocol.data)
        assert not sending.done()
        assert await received(peer, SIZE) == DATA
        assert await sending == SIZE


async def test_write_eof_afterwards(loop: Loop, source: BinaryIO) -> None:
    async with connected(loop) as (protocol, peer):
        reading = asyncio.create_task(received(peer, 10 * SIZE))
        await loop.sendfile(protocol.transport, source)
        protocol.transport.write_eof()
        assert await reading == DATA


@pytest.mark.parametrize("queued", [True, False])
async def test_write_eof_meanwhile(loop: Loop, source: BinaryIO, queued: bool) -> None:
    """The end of the stream comes after the file."""
    async with connected(loop) as (protocol, peer):
        before = os.urandom(2_000_000) if queued else b""
        protocol.transport.write(before)
        sending = asyncio.create_task(loop.sendfile(protocol.transport, source))
        await turns()
        protocol.transport.write_eof()
        with pytest.raises(RuntimeError, match="write_eof"):
            protocol.transport.write(b"more")
        assert await received(peer, 10 * SIZE) == before + DATA
        assert await sending == SIZE
        peer.sendall(b"the other way is open")
        await until(lambda: protocol.data == b"the other way is open")


async def test_write_eof_between_two_parts(loop: Loop, source: BinaryIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sendfile, "_CHUNK", 1000)
    monkeypatch.setattr(sendfile, "_BLOCK", 1000)
    async with connected(loop) as (protocol, peer):
        transport: Any = protocol.transport
        part_sent = transport._part_sent

        def then_end(value: Any, error: BaseException | None) -> None:
            part_sent(value, error)
            transport.write_eof()

        transport._part_sent = then_end
        assert await loop.sendfile(transport, source, 0, 10_000) == 10_000
        assert await received(peer, SIZE) == DATA[:10_000]


@pytest.mark.parametrize("how", ["close", "abort"])
async def test_closed_meanwhile(loop: Loop, source: BinaryIO, how: str) -> None:
    async with connected(loop) as (protocol, peer):
        sending = asyncio.create_task(loop.sendfile(protocol.transport, source))
        await turns()
        assert not sending.done()
        getattr(protocol.transport, how)()
        reading = asyncio.create_task(asyncio.to_thread(read_exactly, peer, 10 * SIZE))
        with pytest.raises(ConnectionError):
            await sending
        try:
            assert DATA.startswith(await reading)
        except ConnectionError:
            assert how == "abort"
        await until(lambda: protocol.finished)
        assert protocol.lost is None


async def test_closed_before(loop: Loop, file: BinaryIO) -> None:
    async with connected(loop) as (protocol, _):
        protocol.transport.close()
        with pytest.raises(RuntimeError, match="closing"):
            await loop.sendfile(protocol.transport, file)


async def test_a_peer_that_resets_a_transport(loop: Loop, source: BinaryIO) -> None:
    async with connected(loop) as (protocol, peer):
        # The system tells of a reset once: if the sender has heard it, the receiver meets but the end of the stream.
        protocol.keep_open_at_eof = False
        sending = asyncio.create_task(loop.sendfile(protocol.transport, source))
        await received(peer, 1000)
        reset(peer)
        with pytest.raises(ConnectionError):
            await sending
        await until(lambda: protocol.finished)


@pytest.mark.parametrize("queued", [True, False])
async def test_cancelling_leaves_the_transport_in_order(loop: Loop, source: BinaryIO, queued: bool) -> None:
    async with connected(loop) as (protocol, peer):
        transport = protocol.transport
        before = b""
        if queued:
            before = os.urandom(5_000_000)
            transport.write(before)
        sending = asyncio.create_task(loop.sendfile(transport, source))
        await (turns() if queued else until(lambda: select.select([peer], [], [], 0)[0]))
        assert not sending.done()
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        sent = source.tell()
        transport.write(b"end")
        assert await received(peer, len(before) + sent + 3) == before + DATA[:sent] + b"end"
        assert bool(sent) != queued


@pytest.mark.parametrize("over", ["socket", "transport"])
async def test_what_was_sent_counts_when_the_sender_is_cancelled_in_that_turn(
    loop: Loop, file: BinaryIO, over: str
) -> None:
    ours, peer = small_pair()
    with ours, peer:
        if over == "socket":
            reading = await cancelled_when_sent(loop, asyncio.create_task(loop.sock_sendfile(ours, file)), peer)
            ours.close()
        else:
            transport, protocol = await loop.create_connection(Recorder, sock=ours)
            reading = await cancelled_when_sent(loop, asyncio.create_task(loop.sendfile(transport, file)), peer)
            transport.close()
            await until(lambda: protocol.finished)
        assert file.tell() > 0
        assert await reading == DATA[: file.tell()]


async def cancelled_when_sent(loop: Loop, sending: asyncio.Task[int], peer: socket.socket) -> asyncio.Task[bytes]:
    """Cancel `sending` when an operation of it has ended, and before it learns that.  Who reads what has come."""

    def in_flight() -> list[Any]:
        return [op for op in loop._proactor.in_flight.values() if op.kind == "SendFile"]

    await until(in_flight)
    (op,) = in_flight()
    complete = op.complete

    def completed(value: Any, error: BaseException | None) -> None:
        complete(value, error)
        sending.cancel()

    op.complete = completed
    reading = asyncio.create_task(asyncio.to_thread(read_all, peer))  # not before: there would be room at once
    with pytest.raises(asyncio.CancelledError):
        await sending
    return reading


async def test_wrong_arguments_for_a_transport(loop: Loop, path: Path) -> None:
    async with connected(loop) as (protocol, peer):
        await refuses(functools.partial(loop.sendfile, protocol.transport), path)
        with path.open("rb") as file:
            reading = asyncio.create_task(received(peer, 1000))
            assert await loop.sendfile(protocol.transport, file, 0, 1000) == 1000
        assert await reading == DATA[:1000]


@asynccontextmanager
async def encrypted(loop: Loop) -> AsyncIterator[tuple[Recorder, Recorder]]:
    """The protocols at both ends of a TLS connection."""
    served = Recorder()
    served.keep_open_at_eof = False
    server = await loop.create_server(lambda: served, "127.0.0.1", 0, ssl=server_context())
    transport, protocol = await loop.create_connection(
        Recorder, *server.sockets[0].getsockname(), ssl=client_context(), server_hostname="localhost"
    )
    try:
        yield protocol, served
    finally:
        transport.close()
        await until(lambda: protocol.finished and served.finished)
        server.close()
        await server.wait_closed()


async def test_wrong_arguments_for_tls(loop: Loop, path: Path) -> None:
    async with encrypted(loop) as (protocol, served):
        await refuses(functools.partial(loop.sendfile, protocol.transport), path)
        with path.open("rb") as file:
            assert await loop.sendfile(protocol.transport, file, 0, 1000) == 1000
        await until(lambda: len(served.data) == 1000)


@pytest.mark.parametrize(("offset", "count"), PARTS)
async def test_tls_copies_from_the_offset(loop: Loop, file: BinaryIO, offset: int, count: int | None) -> None:
    """Also from the beginning, wherever the file stands."""
    expected = DATA[offset:] if count is None else DATA[offset : offset + count]
    async with encrypted(loop) as (protocol, served):
        file.seek(100)
        with pytest.raises(RuntimeError, match="fallback is disabled"):
            await loop.sendfile(protocol.transport, file, offset, count, fallback=False)
        assert await loop.sendfile(protocol.transport, file, offset, count) == len(expected)
        assert file.tell() == offset + len(expected)
        await until(lambda: len(served.data) == len(expected))
        assert served.data == expected


@pytest.mark.parametrize("over", ["socket", "transport"])
async def test_a_copy_begins_at_the_offset(loop: Loop, over: str) -> None:
    memory = io.BytesIO(DATA)
    memory.seek(100)
    ours, peer = tcp_pair()
    async with connected(loop) as (protocol, other):
        with ours, peer:
            sends = functools.partial(loop.sock_sendfile, ours)
            if over == "transport":
                sends, peer = functools.partial(loop.sendfile, protocol.transport), other
            assert await sends(memory, 0, 1000) == 1000
            assert memory.tell() == 1000
            assert await received(peer, 1000) == DATA[:1000]
