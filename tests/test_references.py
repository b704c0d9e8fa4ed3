"""Nothing is left behind: connections, callbacks, timers and waits by the thousand leave the process as it was.

What is counted is memory blocks and objects.  Caches fill and lists grow, so each work is done three times, and what
the third adds beyond the second must be next to nothing for each of its rounds.  ``make soak`` does it longer.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import os
import socket
import sys
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

import iocp_loop
from iocp_loop import native

from .certificates import client_context, server_context
from .support import MUCH, WINDOWS, reset, runtime_pipe, tcp_pair, until

Loop = iocp_loop.IocpEventLoop
Work = Callable[[Loop, int], Awaitable[None]]

#: By how much more is done: 1 in the suite.
SOAK = int(os.environ.get("IOCP_LOOP_SOAK", "1"))


class Quiet(asyncio.Protocol):
    """Says one thing, hears one thing, and goes."""

    def __init__(self, lost: asyncio.Event) -> None:
        self.lost = lost

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]  # stream transports only
        self.transport.write(b"hello")

    def data_received(self, data: bytes) -> None:
        self.transport.close()

    def connection_lost(self, exc: BaseException | None) -> None:
        self.lost.set()


class Speaking(asyncio.BufferedProtocol):
    """Says a few things above TLS, hears them, and goes."""

    def __init__(self, polite: bool) -> None:
        self.buffer = bytearray(100)
        self.heard = 0
        self.lost = asyncio.Event()
        self.polite = polite

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]  # stream transports only
        for _ in range(5):
            self.transport.write(b"hello" * 100)

    def get_buffer(self, sizehint: int) -> bytearray:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.heard += nbytes
        if self.heard == 2500:
            self.transport.close() if self.polite else self.transport.abort()

    def connection_lost(self, exc: BaseException | None) -> None:
        self.lost.set()


async def pairs(loop: Loop, count: int) -> None:
    for _ in range(count // 2):
        one, two = socket.socketpair()
        ends = [asyncio.Event(), asyncio.Event()]
        for sock, lost in zip((one, two), ends, strict=True):
            await loop.create_connection(lambda: Quiet(lost), sock=sock)  # noqa: B023 - called at once
        for lost in ends:
            await lost.wait()


async def clients_of_a_server(loop: Loop, count: int) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.read(100))
        await reader.read()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    address = server.sockets[0].getsockname()

    async def be_client(number: int) -> None:
        for _ in range(number):
            reader, writer = await asyncio.open_connection(*address)
            writer.write(b"hello")
            assert await reader.read(100) == b"hello"
            writer.transport.abort()  # a reset leaves no port in TIME_WAIT
            await asyncio.sleep(0)

    await asyncio.gather(*[be_client(count // 50) for _ in range(25)])  # each connection has two ends
    server.close()
    await server.wait_closed()
    await asyncio.sleep(0.01)


async def tls_connections(loop: Loop, count: int) -> None:
    """Handshakes, data both ways, and the ends of both: half of them in good order, half by an abort."""
    server, client = server_context(), client_context()
    for number in range(count // 4):
        one, two = socket.socketpair()
        ends = [Speaking(polite=number % 2 == 0) for _ in range(2)]
        made: list[Callable[[], Speaking]] = [functools.partial(ends.__getitem__, side) for side in range(2)]
        await asyncio.gather(
            loop.connect_accepted_socket(made[0], one, ssl=server),
            loop.create_connection(made[1], sock=two, ssl=client, server_hostname="localhost"),
        )
        for end in ends:
            await end.lost.wait()


async def callbacks(loop: Loop, count: int) -> None:
    done = loop.create_future()

    def run(left: int, *_: Any) -> None:
        if left:
            loop.call_soon(run, left - 1, left, [])
            loop.call_soon(run, 0).cancel()
        else:
            done.done() or done.set_result(None)

    for _ in range(10):
        done = loop.create_future()
        run(count // 10)
        await done


async def timers(loop: Loop, count: int) -> None:
    for _ in range(count // 1000):
        kept = [loop.call_later(100, print, number, []) for number in range(500)]
        struck = [loop.call_later(0, str, number) for number in range(500)]
        for timer in kept:
            timer.cancel()
        await asyncio.sleep(0)
        del kept, struck


async def failures(loop: Loop, count: int) -> None:
    loop.set_exception_handler(lambda *_: None)
    for _ in range(count):
        loop.call_soon(int, "no number")
        await asyncio.sleep(0)


async def waits(loop: Loop, count: int) -> None:
    one, two = socket.socketpair()
    with one, two:
        one.setblocking(False)
        two.setblocking(False)
        for number in range(count):
            task = asyncio.ensure_future(loop.sock_recv(one, 100 if number % 2 else 100_000))
            await asyncio.sleep(0)
            if number % 10 == 0:
                task.cancel()
                await asyncio.wait([task])
                continue
            await loop.sock_sendall(two, b"hello")
            assert await task == b"hello"


async def datagrams(loop: Loop, count: int) -> None:
    received = loop.create_future()

    class Receiver(asyncio.DatagramProtocol):
        def datagram_received(self, data: bytes, address: Any) -> None:
            received.set_result(address)

    one, _ = await loop.create_datagram_endpoint(Receiver, local_addr=("127.0.0.1", 0))
    address = one.get_extra_info("sockname")
    for _ in range(count):
        received = loop.create_future()
        one.sendto(b"hello", address)
        assert await received == address
    one.abort()
    await asyncio.sleep(0)


#: The work, and how often in the suite: a few seconds in all.
WORKS: list[tuple[Work, int]] = [
    (pairs, 2000),
    (clients_of_a_server, 2000),
    (tls_connections, 2000),
    (callbacks, 20_000),
    (timers, 20_000),
    (failures, 2000),
    (waits, 4000),
    (datagrams, 4000),
]


@pytest.mark.skipif(WINDOWS, reason="the work is made for Linux: socket pairs by the thousand")
@pytest.mark.parametrize(("work", "count"), WORKS, ids=[work.__name__ for work, _ in WORKS])
def test_nothing_is_left(driver: str, work: Work, count: int) -> None:
    count *= SOAK
    loop = iocp_loop.new_event_loop(driver)
    left: list[tuple[int, int, int]] = []
    try:
        for _ in range(6):  # a leak grows each time, what Python keeps for later use does not
            loop.run_until_complete(work(loop, count))
            gc.collect()
            left.append((sys.getallocatedblocks(), len(gc.get_objects()), references()))
            if len(left) > 2 and all(now - before < count / 20 for before, now in zip(*left[-2:], strict=True)):
                return
    finally:
        loop.close()
    pytest.fail(f"blocks, objects, references to what lives for ever: {left}")


# -- a lost connection is freed when nobody refers to it any more, without the collector ---------------------------


class Keeping(asyncio.BaseProtocol):
    """A protocol that keeps its transport, as asyncio's documentation shows it."""

    def __init__(self, seen: list[weakref.ref[Any]]) -> None:
        self.seen = seen
        seen.append(weakref.ref(self))
        self.lost = asyncio.Event()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.seen.append(weakref.ref(transport))

    def connection_lost(self, exc: BaseException | None) -> None:
        self.lost.set()


class KeepingStream(Keeping, asyncio.Protocol):
    def data_received(self, data: bytes) -> None:
        self.transport.close()


class KeepingBuffer(Keeping, asyncio.BufferedProtocol):
    def get_buffer(self, sizehint: int) -> bytearray:
        self.buffer = bytearray(100)
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.transport.close()


class KeepingDatagrams(Keeping, asyncio.DatagramProtocol):
    def datagram_received(self, data: bytes, address: Any) -> None:
        self.transport.close()


class KeepingProcess(Keeping, asyncio.SubprocessProtocol):
    pass


Seen = list[weakref.ref[Any]]


async def talk(loop: Loop, kind: Any, seen: Seen, tls: bool) -> None:
    """One side speaks, the other closes."""
    one, two = socket.socketpair()
    protocols = [kind(seen), kind(seen)]
    served: dict[str, Any] = {"ssl": server_context()} if tls else {}
    asked: dict[str, Any] = {"ssl": client_context(), "server_hostname": "localhost"} if tls else {}
    await asyncio.gather(
        loop.connect_accepted_socket(lambda: protocols[0], one, **served),
        loop.create_connection(lambda: protocols[1], sock=two, **asked),
    )
    protocols[0].transport.write(b"hello")
    for protocol in protocols:
        await protocol.lost.wait()
        assert protocol.transport.get_protocol() is None
        repr(protocol.transport)
        assert tls or protocol.transport.get_extra_info("sockname") == ""


async def reset_while_paused(loop: Loop, seen: Seen) -> None:
    ours, peer = tcp_pair()
    _, protocol = await loop.create_connection(lambda: KeepingStream(seen), sock=ours)
    protocol.transport.pause_reading()
    peer.send(b"held")
    await asyncio.sleep(0.01)
    reset(peer)
    while not protocol.transport.is_closing():
        protocol.transport.write(b"until it learns of the reset")
        await asyncio.sleep(0)
    await protocol.lost.wait()


async def abort_while_sending(loop: Loop, seen: Seen) -> None:
    ours, peer = tcp_pair()
    _, protocol = await loop.create_connection(lambda: KeepingStream(seen), sock=ours)
    protocol.transport.write(bytes(MUCH))
    await asyncio.sleep(0.01)
    protocol.transport.abort()
    await protocol.lost.wait()
    protocol.transport.set_write_buffer_limits(0)
    assert protocol.transport.get_write_buffer_size() == 0
    peer.close()


async def start_tls(loop: Loop, seen: Seen) -> None:
    one, two = socket.socketpair()
    _, server = await loop.create_connection(lambda: KeepingStream(seen), sock=one)
    _, client = await loop.create_connection(lambda: KeepingStream(seen), sock=two)
    upper: Any = await asyncio.gather(
        loop.start_tls(server.transport, server, server_context(), server_side=True),
        loop.start_tls(client.transport, client, client_context(), server_hostname="localhost"),
    )
    upper[0].close()
    del upper
    await server.lost.wait()
    await client.lost.wait()


async def endpoints(loop: Loop, seen: Seen) -> None:
    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    two.setblocking(False)
    _, protocol = await loop.create_datagram_endpoint(lambda: KeepingDatagrams(seen), sock=one)
    two.send(b"hello")
    await protocol.lost.wait()
    two.close()
    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    _, protocol = await loop.create_datagram_endpoint(lambda: KeepingDatagrams(seen), sock=one)
    for _ in range(1000):
        protocol.transport.sendto(bytes(1000))
    protocol.transport.abort()
    await protocol.lost.wait()
    two.close()


async def pipes(loop: Loop, seen: Seen) -> None:
    reading, writing = runtime_pipe()
    _, reader = await loop.connect_read_pipe(lambda: KeepingStream(seen), reading)
    _, writer = await loop.connect_write_pipe(lambda: Keeping(seen), writing)
    writer.transport.write(b"hello")
    await reader.lost.wait()
    await writer.lost.wait()
    for name in "/dev/zero", "/dev/null":  # which pollers refuse
        with open(name, "rb" if name == "/dev/zero" else "wb", 0) as file:
            connect: Any = loop.connect_read_pipe if name == "/dev/zero" else loop.connect_write_pipe
            _, protocol = await connect(lambda: KeepingStream(seen), file)
            if name == "/dev/null":
                protocol.transport.close()
            await protocol.lost.wait()


async def processes(loop: Loop, seen: Seen) -> None:
    _, protocol = await loop.subprocess_exec(lambda: KeepingProcess(seen), "cat", stderr=None)
    seen.append(weakref.ref(protocol.transport.get_pipe_transport(0)))
    protocol.transport.get_pipe_transport(0).close()
    await protocol.lost.wait()
    protocol.transport.close()


LOST: dict[str, Callable[[Loop, Seen], Awaitable[None]]] = {
    "streams": lambda loop, seen: talk(loop, KeepingStream, seen, tls=False),
    "streams with buffers": lambda loop, seen: talk(loop, KeepingBuffer, seen, tls=False),
    "TLS": lambda loop, seen: talk(loop, KeepingStream, seen, tls=True),
    "TLS with buffers": lambda loop, seen: talk(loop, KeepingBuffer, seen, tls=True),
    "start_tls": start_tls,
    "a reset": reset_while_paused,
    "an abort": abort_while_sending,
    "datagrams": endpoints,
    "pipes": pipes,
    "processes": processes,
}


@pytest.mark.skipif(WINDOWS, reason="as above")
@pytest.mark.parametrize("debug", [False, True], ids=["", "debug"])
@pytest.mark.parametrize("name", LOST)
async def test_a_lost_connection_does_not_wait_for_the_collector(loop: Loop, name: str, debug: bool) -> None:
    loop.set_debug(debug)
    seen: Seen = []
    gc.collect()
    gc.disable()
    try:
        await LOST[name](loop, seen)
        await until(lambda: not any(reference() for reference in seen), 1)
    finally:
        gc.enable()
    assert seen


@pytest.mark.skipif(WINDOWS, reason="as above")
@pytest.mark.skipif(native.hot is None, reason="the frames of the Python tier have the waiter too")
async def test_a_connection_that_could_not_begin_does_not_wait_for_the_collector(loop: Loop) -> None:
    seen: Seen = []
    loop.set_exception_handler(lambda loop, context: None)

    class Faulty(asyncio.Protocol):
        def __init__(self) -> None:
            seen.append(weakref.ref(self))

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            raise ZeroDivisionError

    async def connect() -> None:
        with pytest.raises(ZeroDivisionError):
            await loop.create_connection(Faulty, *server.sockets[0].getsockname())

    server = await loop.create_server(asyncio.Protocol, "127.0.0.1", 0)
    gc.collect()
    gc.disable()
    try:
        await connect()
        await until(lambda: not any(reference() for reference in seen), 1)
    finally:
        gc.enable()
    server.close()
    assert seen


def references() -> int:
    """How many references there are to a few objects that every handle and operation refers to."""
    things: list[Any] = [None, True, False, (), asyncio.Future, asyncio.Task, socket.socket]
    return sum(sys.getrefcount(thing) for thing in things if sys.getrefcount(thing) < 2**30)  # not the immortal


@pytest.mark.skipif(WINDOWS, reason="as above; and /proc tells how much memory there is")
def test_no_memory_is_left_by_connections(driver: str) -> None:
    """What no Python allocator sees: the C library's memory, mappings, the kernel's part in it."""
    loop = iocp_loop.new_event_loop(driver)
    count = 4000 * SOAK
    try:
        loop.run_until_complete(pairs(loop, count))
        before = resident_bytes()
        loop.run_until_complete(pairs(loop, count))
        growth = resident_bytes() - before
    finally:
        loop.close()
    assert growth < 1_000_000 + 20 * count, f"{growth} bytes after {count} connections"


def resident_bytes() -> int:
    gc.collect()
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
