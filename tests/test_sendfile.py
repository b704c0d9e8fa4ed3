"""sendfile on transports and sock_sendfile on sockets: offsets, counts, big files, failures, and the fallback."""

from __future__ import annotations

import asyncio
import io
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pytest

import iocp_loop

from .certificates import client_context, server_context
from .support import Recorder, in_thread, read_all, read_exactly, reset, tcp_pair, turns, until

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
async def test_what_the_system_can_not_send_is_copied(loop: Loop, kind: Callable[..., Any]) -> None:
    """An object without a descriptor, and a pipe: sendfile() wants something that can be mapped."""
    reader, writer = os.pipe()
    with open(reader, "rb") as pipe, open(writer, "wb") as feed:
        data = DATA[:4000]  # no more than a pipe holds on any system
        feed.write(data)
        feed.close()
        source: Any = io.BytesIO(data) if kind is io.BytesIO else Unseekable(pipe)
        ours, peer = tcp_pair()
        with ours, peer:
            with pytest.raises(asyncio.SendfileNotAvailableError):
                await loop.sock_sendfile(ours, source, fallback=False)
            reading = asyncio.create_task(received(peer, len(data)))
            assert await loop.sock_sendfile(ours, source) == len(data)
            assert await reading == data


class Unseekable:
    """A pipe that pretends that it can seek, so that asyncio accepts it as a source to copy from."""

    mode = "rb"

    def __init__(self, pipe: BinaryIO) -> None:
        self._pipe = pipe
        self.fileno = pipe.fileno
        self.readinto = pipe.readinto  # type: ignore[attr-defined]  # of a BufferedReader

    def seek(self, position: int) -> None:
        assert position >= 0


async def test_an_empty_file(loop: Loop, tmp_path: Path) -> None:
    ours, peer = tcp_pair()
    with ours, peer, (tmp_path / "empty").open("w+b") as empty:
        assert await loop.sock_sendfile(ours, empty) == 0


async def test_wrong_arguments(loop: Loop, file: BinaryIO, path: Path) -> None:
    ours, peer = tcp_pair()
    with ours, peer:
        for arguments in ((-1, None), (0, 0), (0, -1)):
            with pytest.raises(ValueError):
                await loop.sock_sendfile(ours, file, *arguments)
        with pytest.raises(TypeError):
            await loop.sock_sendfile(ours, file, 0, "all")  # type: ignore[arg-type]  # what the test is about
        with path.open() as text, pytest.raises(ValueError, match="binary mode"):
            await loop.sock_sendfile(ours, text)  # type: ignore[arg-type]  # what the test is about


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
            assert await asyncio.wait_for(loop.sock_sendfile(ours, sparse, 10), 100) == BIG - 10
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


async def test_between_writes(loop: Loop, file: BinaryIO) -> None:
    """What was written before goes first, also if the kernel has not taken it yet; what is written after, last."""
    before = os.urandom(2_000_000)
    async with connected(loop) as (protocol, peer):
        transport = protocol.transport
        transport.write(before)
        assert transport.get_write_buffer_size() > 0
        sending = asyncio.create_task(loop.sendfile(transport, file))
        reading = asyncio.create_task(received(peer, len(before) + SIZE + 5))
        assert await sending == SIZE
        transport.write(b"after")
        assert await reading == before + DATA + b"after"
        assert "pause_writing" in protocol.calls
        assert protocol.calls[-1] == "resume_writing"


async def test_no_writes_meanwhile(loop: Loop, file: BinaryIO) -> None:
    async with connected(loop) as (protocol, peer):
        transport = protocol.transport
        sending = asyncio.create_task(loop.sendfile(transport, file))
        await turns(1)
        for write in (lambda: transport.write(b"x"), lambda: transport.writelines([b"x"])):
            with pytest.raises(RuntimeError, match="sendfile is in progress"):
                write()
        with pytest.raises(RuntimeError, match="another sendfile is in progress"):
            await loop.sendfile(transport, file)
        assert await received(peer, SIZE) == DATA
        assert await sending == SIZE


async def test_receiving_goes_on_meanwhile(loop: Loop, file: BinaryIO) -> None:
    async with connected(loop) as (protocol, peer):
        sending = asyncio.create_task(loop.sendfile(protocol.transport, file))
        await turns()
        peer.sendall(b"are you there?")
        await until(lambda: protocol.data)
        assert not sending.done()
        assert await received(peer, SIZE) == DATA
        assert await sending == SIZE


async def test_write_eof_afterwards(loop: Loop, file: BinaryIO) -> None:
    async with connected(loop) as (protocol, peer):
        reading = asyncio.create_task(received(peer, 10 * SIZE))
        await loop.sendfile(protocol.transport, file)
        protocol.transport.write_eof()
        assert await reading == DATA


async def test_write_eof_meanwhile(loop: Loop, file: BinaryIO, reports: list[dict[str, Any]]) -> None:
    async with connected(loop) as (protocol, peer):
        sending = asyncio.create_task(loop.sendfile(protocol.transport, file))
        await turns()
        protocol.transport.write_eof()
        got = await received(peer, 10 * SIZE)
        assert DATA.startswith(got)
        with pytest.raises((OSError, AssertionError)):
            await sending
            assert len(got) < SIZE


@pytest.mark.parametrize("how", ["close", "abort"])
async def test_closed_meanwhile(loop: Loop, file: BinaryIO, how: str) -> None:
    async with connected(loop) as (protocol, peer):
        sending = asyncio.create_task(loop.sendfile(protocol.transport, file))
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


async def test_a_peer_that_resets_a_transport(loop: Loop, file: BinaryIO) -> None:
    async with connected(loop) as (protocol, peer):
        # The system tells of a reset once: if the sender has heard it, the receiver meets but the end of the stream.
        protocol.keep_open_at_eof = False
        sending = asyncio.create_task(loop.sendfile(protocol.transport, file))
        await received(peer, 1000)
        reset(peer)
        with pytest.raises(ConnectionError):
            await sending
        await until(lambda: protocol.finished)


@pytest.mark.parametrize("queued", [True, False])
async def test_cancelling_leaves_the_transport_in_order(loop: Loop, file: BinaryIO, queued: bool) -> None:
    async with connected(loop) as (protocol, peer):
        transport = protocol.transport
        before = b""
        if queued:
            before = os.urandom(5_000_000)
            transport.write(before)
        sending = asyncio.create_task(loop.sendfile(transport, file))
        await asyncio.sleep(0.02)
        assert not sending.done()
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        sent = file.tell()
        transport.write(b"end")
        assert await received(peer, len(before) + sent + 3) == before + DATA[:sent] + b"end"
        assert bool(sent) != queued


@pytest.mark.parametrize("over", ["socket", "transport"])
async def test_what_was_sent_counts_when_the_sender_is_cancelled_in_that_turn(
    loop: Loop, file: BinaryIO, over: str
) -> None:
    ours, peer = small_pair()
    with ours, peer:
        reading = asyncio.create_task(asyncio.to_thread(read_all, peer))
        if over == "socket":
            await cancelled_when_sent(loop, asyncio.create_task(loop.sock_sendfile(ours, file)))
            ours.close()
        else:
            transport, protocol = await loop.create_connection(Recorder, sock=ours)
            await cancelled_when_sent(loop, asyncio.create_task(loop.sendfile(transport, file)))
            transport.close()
            await until(lambda: protocol.finished)
        assert file.tell() > 0
        assert await reading == DATA[: file.tell()]


async def cancelled_when_sent(loop: Loop, sending: asyncio.Task[int]) -> None:
    """Cancel `sending` when an operation of it has ended, and before it learns that."""

    def in_flight() -> list[Any]:
        return [op for op in loop._proactor.in_flight.values() if op.kind == "SendFile"]

    await until(in_flight)
    (op,) = in_flight()
    complete = op.complete

    def completed(value: Any, error: BaseException | None) -> None:
        complete(value, error)
        sending.cancel()

    op.complete = completed
    with pytest.raises(asyncio.CancelledError):
        await sending


async def test_tls_copies(loop: Loop, file: BinaryIO) -> None:
    served: list[Recorder] = []

    def factory() -> Recorder:
        served.append(Recorder())
        return served[-1]

    server = await loop.create_server(factory, "127.0.0.1", 0, ssl=server_context())
    transport, protocol = await loop.create_connection(
        Recorder, *server.sockets[0].getsockname(), ssl=client_context(), server_hostname="localhost"
    )
    with pytest.raises(RuntimeError, match="fallback is disabled"):
        await loop.sendfile(transport, file, fallback=False)
    assert await loop.sendfile(transport, file, 10) == SIZE - 10
    await until(lambda: len(served[0].data) == SIZE - 10)
    assert served[0].data == DATA[10:]
    transport.close()
    await until(lambda: protocol.finished and served[0].finished)
    server.close()
    await server.wait_closed()
