"""Every callback of a protocol runs in the context that asyncio's own loop gives it.

Each test plays a scene twice, on asyncio's own loop and on ours, and compares what the protocol has seen.  In a scene a
context variable says who acts: the maker of the transport, later its writer, later whoever closes it.
"""

from __future__ import annotations

import asyncio
import contextvars
import io
import os
import socket
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import iocp_loop

from .support import (
    WINDOWS,
    WINE,
    Pipe,
    listening_socket,
    read_exactly,
    reset,
    runtime_pipe,
    tcp_pair,
    turns,
    until,
    windows_pipe,
)

actor: contextvars.ContextVar[str] = contextvars.ContextVar("actor", default="nobody")

Seen = dict[str, str]
Scene = Callable[[Seen], Awaitable[None]]


class Witness(asyncio.Protocol, asyncio.DatagramProtocol, asyncio.SubprocessProtocol):
    """A protocol of every kind.  Notes who acts when a method is called for the first time; from then on it acts."""

    transport: Any
    acts = True

    def __init__(self, seen: Seen, raising: str = "") -> None:
        self.seen = seen
        self.raising = raising

    def note(self, name: str) -> None:
        if name not in self.seen:
            self.seen[name] = actor.get()
            if self.acts:
                actor.set(name)
        if name == self.raising:
            raise RuntimeError(name)

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.note("connection_made")

    def connection_lost(self, exc: BaseException | None) -> None:
        self.note("connection_lost")

    def data_received(self, data: bytes) -> None:
        self.note("data_received")

    def eof_received(self) -> None:
        self.note("eof_received")

    def pause_writing(self) -> None:
        self.note("pause_writing")

    def resume_writing(self) -> None:
        self.note("resume_writing")

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.note("datagram_received")

    def error_received(self, exc: Exception) -> None:
        self.note("error_received")

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        self.note(f"pipe_data_received {fd}")

    def pipe_connection_lost(self, fd: int, exc: BaseException | None) -> None:
        self.note(f"pipe_connection_lost {fd}")

    def process_exited(self) -> None:
        self.note("process_exited")


class Onlooker(Witness):
    """Notes who acts, and does not act itself."""

    acts = False


#: asyncio's loop on a completion port, which has the pipes of Windows, runs each completion in a context of its own.
#: There a method of the protocol does not see what the one before it has set; on its other loops and on ours it does.
PipeWitness = Onlooker if WINDOWS else Witness


def play(scene: Scene, loop: asyncio.AbstractEventLoop) -> Seen:
    seen: Seen = {}

    def report(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        seen["exception handler"] = actor.get()

    async def begin() -> None:
        actor.set("the maker")
        await scene(seen)

    loop.set_exception_handler(report)
    try:
        loop.run_until_complete(asyncio.wait_for(begin(), 30))
    finally:
        loop.close()
    return seen


def stock_loop(*, pipes: bool = False) -> asyncio.AbstractEventLoop:
    """asyncio's own loop; `pipes`: one that has pipes, which on Windows is another."""
    if sys.platform == "win32" and pipes:
        return asyncio.ProactorEventLoop()
    return asyncio.SelectorEventLoop()


class TakenWholeError(Exception):
    """Nothing of what was written waits."""


async def must_wait(transport: asyncio.WriteTransport) -> None:
    if not transport.get_write_buffer_size():
        transport.abort()
        await asyncio.sleep(0.01)
        raise TakenWholeError


def compare(scene: Scene, driver: str, least: str = "connection_lost", *, pipes: bool = False) -> None:
    """Play `scene` on both loops; the call named `least` must be among those that it brings about."""
    ours = play(scene, iocp_loop.new_event_loop(driver))
    assert least in ours
    try:
        stock = play(scene, stock_loop(pipes=pipes))
    except TakenWholeError:
        return  # Windows takes any amount at once, and that loop offers it all: there is nothing to compare
    if least not in stock:
        pytest.skip(f"this Python's own loop does not call {least}")  # 3.13.0 leaves a datagram protocol paused
    assert ours == stock


@pytest.fixture(params=[socket.AF_INET, getattr(socket, "AF_UNIX", None)], ids=["tcp", "unix"])
def connect(request: pytest.FixtureRequest) -> Callable[[], tuple[socket.socket, socket.socket]]:
    """Makes two connected sockets: ours, non-blocking, and the peer."""
    if request.param is socket.AF_INET:
        return tcp_pair
    if WINDOWS:
        pytest.skip("Python has no UNIX sockets on Windows")

    def pair() -> tuple[socket.socket, socket.socket]:
        ours, peer = socket.socketpair()
        ours.setblocking(False)
        return ours, peer

    return pair


@pytest.mark.parametrize("raising", ["", "data_received", "eof_received"])
def test_the_peer_ends_a_connection(driver: str, connect: Any, raising: str, no_leak: None) -> None:
    async def scene(seen: Seen) -> None:
        ours, peer = connect()
        with peer:
            await asyncio.get_running_loop().create_connection(lambda: Witness(seen, raising), sock=ours)
            actor.set("the peer")
            peer.sendall(b"x")
            await until(lambda: "data_received" in seen)
            peer.shutdown(socket.SHUT_WR)
            await until(lambda: "connection_lost" in seen)

    compare(scene, driver)


@pytest.mark.skipif(WINE, reason="under Wine asyncio's own loop is told of an end, not of a reset")
def test_the_peer_resets_a_connection(driver: str, no_leak: None) -> None:
    async def scene(seen: Seen) -> None:
        ours, peer = tcp_pair()
        await asyncio.get_running_loop().create_connection(lambda: Witness(seen), sock=ours)
        actor.set("the peer")
        reset(peer)
        await until(lambda: "connection_lost" in seen)

    compare(scene, driver)


@pytest.mark.parametrize("end", ["close", "abort"])
def test_whoever_ends_a_connection(driver: str, connect: Any, end: str, no_leak: None) -> None:
    async def scene(seen: Seen) -> None:
        ours, peer = connect()
        with peer:
            transport, _ = await asyncio.get_running_loop().create_connection(lambda: Witness(seen), sock=ours)
            actor.set("the end")
            getattr(transport, end)()
            await until(lambda: "connection_lost" in seen)

    compare(scene, driver)


def test_a_resumed_protocol_keeps_its_context(driver: str, no_leak: None) -> None:
    """Unlike asyncio's own before Python 3.15, which call it in the context of whoever resumed."""

    async def scene(seen: Seen) -> None:
        ours, peer = tcp_pair()
        with peer:
            transport, _ = await asyncio.get_running_loop().create_connection(lambda: Witness(seen), sock=ours)
            transport.pause_reading()
            actor.set("whoever resumes")
            transport.resume_reading()
            peer.sendall(b"x")
            await until(lambda: "data_received" in seen)
            transport.close()
            await until(lambda: "connection_lost" in seen)

    expected = "connection_made" if sys.version_info >= (3, 15) else "the maker"
    assert play(scene, iocp_loop.new_event_loop(driver))["data_received"] == expected


def narrow(ours: socket.socket, peer: socket.socket) -> None:
    """Keep the system from taking more and more at once, as it does for TCP that flows: what is written must queue."""
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)


@pytest.mark.parametrize("raising", ["", "resume_writing"])
def test_what_is_queued_is_sent(driver: str, connect: Any, raising: str, no_leak: None) -> None:
    async def scene(seen: Seen) -> None:
        ours, peer = connect()
        narrow(ours, peer)
        with peer:
            peer.settimeout(30)
            transport, _ = await asyncio.get_running_loop().create_connection(lambda: Witness(seen, raising), sock=ours)
            actor.set("the writer")
            size = 2 << 20
            transport.write(bytes(size))
            await must_wait(transport)
            assert "pause_writing" in seen
            actor.set("later")
            await asyncio.to_thread(read_exactly, peer, size)
            await until(lambda: "resume_writing" in seen)
            if raising:
                transport.close()
            else:
                transport.write(bytes(size))
                assert transport.get_write_buffer_size()
                actor.set("the end")
                transport.close()  # and connection_lost comes when the queue is empty
                await asyncio.to_thread(read_exactly, peer, size)
            await until(lambda: "connection_lost" in seen)

    compare(scene, driver)


def test_a_send_that_fails(driver: str, connect: Any, no_leak: None) -> None:
    async def scene(seen: Seen) -> None:
        ours, peer = connect()
        narrow(ours, peer)
        transport, _ = await asyncio.get_running_loop().create_connection(lambda: Witness(seen), sock=ours)
        transport.pause_reading()
        actor.set("the writer")
        transport.write(bytes(2 << 20))
        with peer:
            await must_wait(transport)
            actor.set("later")
            peer.recv(1)
        # It closes with data that it has not read: a reset.
        await until(lambda: "connection_lost" in seen)
        seen.pop("resume_writing", None)  # more or less of it went out before

    compare(scene, driver)


def test_a_server(driver: str, no_leak: None) -> None:
    async def scene(seen: Seen) -> None:
        with listening_socket() as listener:
            loop = asyncio.get_running_loop()
            server = await loop.create_server(lambda: Witness(seen), sock=listener)
            actor.set("the client")
            with socket.create_connection(listener.getsockname()) as client:
                client.sendall(b"x")
                await until(lambda: "data_received" in seen)
            await until(lambda: "connection_lost" in seen)
            server.close()
            await server.wait_closed()

    compare(scene, driver)


class TestPipes:
    @pytest.fixture(params=["overlapped", "thread"] if WINDOWS else ["pipe"])
    def make(self, request: pytest.FixtureRequest) -> Callable[[str], Pipe]:
        """Makes the two ends of a pipe, given what is the loop's: "read" or "write".  The other end is a file.

        On Windows asyncio's own loop has pipes with overlapped I/O only.
        """

        def pipe(ours: str) -> Pipe:
            stock = not isinstance(asyncio.get_running_loop(), iocp_loop.IocpEventLoop)
            return windows_pipe(ours) if WINDOWS and (stock or request.param == "overlapped") else runtime_pipe()

        pipe.kind = request.param  # type: ignore[attr-defined]  # for a test that is not for every kind
        return pipe

    def test_a_pipe_is_read_to_its_end(self, driver: str, make: Any, no_leak: None) -> None:
        async def scene(seen: Seen) -> None:
            reader, writer = make("read")
            await asyncio.get_running_loop().connect_read_pipe(lambda: PipeWitness(seen), reader)
            actor.set("the peer")
            writer.write(b"x")
            await until(lambda: "data_received" in seen)
            writer.close()
            await until(lambda: "connection_lost" in seen)

        compare(scene, driver, pipes=True)

    def test_what_is_queued_is_written(self, driver: str, make: Any, no_leak: None) -> None:
        async def scene(seen: Seen) -> None:
            reader, writer = make("write")
            transport, _ = await asyncio.get_running_loop().connect_write_pipe(lambda: PipeWitness(seen), writer)
            actor.set("the writer")
            transport.write(bytes(1 << 20))
            actor.set("later")
            transport.close()
            with io.BufferedReader(reader) as file:
                await asyncio.to_thread(file.read, 1 << 20)
                await until(lambda: "connection_lost" in seen)

        compare(scene, driver, pipes=True)

    def test_a_writer_goes_on(self, driver: str, make: Any, no_leak: None) -> None:
        async def scene(seen: Seen) -> None:
            reader, writer = make("write")
            transport, _ = await asyncio.get_running_loop().connect_write_pipe(lambda: PipeWitness(seen), writer)
            actor.set("the writer")
            transport.write(bytes(1 << 20))
            actor.set("later")
            with io.BufferedReader(reader) as file:
                await asyncio.to_thread(file.read, 1 << 20)
                await until(lambda: "resume_writing" in seen)
                transport.close()
                await until(lambda: "connection_lost" in seen)

        compare(scene, driver, pipes=True, least="resume_writing")

    @pytest.mark.parametrize("written", [0, 1 << 20])
    def test_the_reader_of_a_pipe_goes_away(self, driver: str, make: Any, written: int, no_leak: None) -> None:
        if make.kind == "thread" and not written:
            pytest.skip("that is not told of a handle that a thread serves")

        async def scene(seen: Seen) -> None:
            reader, writer = make("write")
            transport, _ = await asyncio.get_running_loop().connect_write_pipe(lambda: PipeWitness(seen), writer)
            # The end may be told by the watch on the reader or by the next write: the same context for both.
            transport.write(bytes(written))
            actor.set("later")
            reader.close()
            await until(lambda: "connection_lost" in seen)
            if seen.get("pause_writing"):
                assert seen.pop("connection_lost") in ("the maker", "pause_writing")
                seen["connection_lost"] = "either"

        compare(scene, driver, pipes=True)

    @pytest.mark.skipif(not WINDOWS, reason="named pipes of this kind exist on Windows only")
    @pytest.mark.parametrize("raising", ["", "eof_received"])
    def test_a_named_pipe(self, driver: str, raising: str, no_leak: None) -> None:
        async def scene(seen: Seen) -> None:
            loop: Any = asyncio.get_running_loop()
            peer: asyncio.Future[Any] = loop.create_future()

            class Peer(asyncio.Protocol):
                def connection_made(self, transport: Any) -> None:
                    peer.set_result(transport)

            address = rf"\\.\pipe\iocp_loop-contexts-{os.getpid()}"
            [server] = await loop.start_serving_pipe(Peer, address)
            await loop.create_pipe_connection(lambda: PipeWitness(seen, raising), address)
            actor.set("the peer")
            (await peer).write(b"x")
            await until(lambda: "data_received" in seen)
            peer.result().close()
            server.close()
            await until(lambda: "connection_lost" in seen)

        compare(scene, driver, pipes=True)

    @pytest.mark.skipif(
        not WINDOWS and sys.version_info < (3, 12), reason="asyncio waits for processes in a thread up to Python 3.11"
    )
    def test_a_subprocess(self, driver: str, no_leak: None) -> None:
        async def scene(seen: Seen) -> None:
            program = "import sys; sys.stdout.write(sys.stdin.read()); sys.stdout.flush()"
            transport, _ = await asyncio.get_running_loop().subprocess_exec(
                lambda: Witness(seen), sys.executable, "-c", program, stderr=None
            )
            actor.set("the writer")
            stdin: Any = transport.get_pipe_transport(0)
            stdin.write(b"x")
            stdin.close()
            actor.set("later")
            await until(lambda: "connection_lost" in seen)
            transport.close()
            # In which order the pipes and the process end is not certain; that none of them is nobody's, is.
            seen.update({name: "somebody" for name in seen if seen[name] != "nobody" and name != "connection_made"})

        compare(scene, driver, pipes=True)


def test_datagrams(driver: str, no_leak: None) -> None:
    async def scene(seen: Seen) -> None:
        transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
            lambda: Witness(seen), local_addr=("127.0.0.1", 0)
        )
        actor.set("the sender")
        transport.sendto(b"x", transport.get_extra_info("sockname"))
        actor.set("later")
        await until(lambda: "datagram_received" in seen)
        transport.close()
        await until(lambda: "connection_lost" in seen)

    compare(scene, driver)


def test_an_answer_that_cannot_be_sent(driver: str, no_leak: None) -> None:
    """It fails while ``datagram_received`` runs, so ``error_received`` is called within that."""

    class Answering(Witness):
        def datagram_received(self, data: bytes, addr: Any) -> None:
            super().datagram_received(data, addr)
            self.transport.sendto(bytes(1 << 16), addr)  # more than a datagram can hold

    async def scene(seen: Seen) -> None:
        transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
            lambda: Answering(seen), local_addr=("127.0.0.1", 0)
        )
        actor.set("the sender")
        transport.sendto(b"x", transport.get_extra_info("sockname"))
        actor.set("later")
        await until(lambda: "error_received" in seen)
        transport.sendto(bytes(1 << 16), transport.get_extra_info("sockname"))
        transport.close()
        await until(lambda: "connection_lost" in seen)

    compare(scene, driver, least="error_received")


@pytest.mark.skipif(WINDOWS, reason="Python has no UNIX sockets on Windows")
def test_queued_datagrams(driver: str, tmp_path: Path, no_leak: None) -> None:
    async def scene(seen: Seen) -> None:
        ours, peer = (socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(2))
        address = tempfile.mktemp(dir=tmp_path)
        ours.setblocking(False)
        with peer:
            peer.bind(address)
            ours.connect(address)
            transport: Any
            transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(lambda: Witness(seen), sock=ours)
            transport.set_write_buffer_limits(high=2000, low=0)
            actor.set("the sender")
            count = 0
            while "pause_writing" not in seen:
                transport.sendto(bytes(1000))
                count += 1
            actor.set("later")
            peer.settimeout(30)
            for _ in range(count):
                await asyncio.to_thread(peer.recv, 1000)
            await turns(20)
            transport.abort()
            await until(lambda: "connection_lost" in seen)

    compare(scene, driver, least="resume_writing")
