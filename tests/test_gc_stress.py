"""The garbage collector runs at nearly every allocation, and each time a finalizer calls the loop.

So whatever the loop does between two of its own steps, somebody else may have done something to it meanwhile: what was
looked at may have changed, what was only borrowed may be gone.  Bytes, datagrams, callbacks and timers come through all
the same.  Run under AddressSanitizer (``make sanitize``), this finds what is used after it was freed.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import os
import random
import re
import socket
import sys
import sysconfig
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import iocp_loop
from iocp_loop import native

from .support import LIMIT, WINDOWS, Echo, turns, until

Loop = iocp_loop.IocpEventLoop
Action = Callable[[], object]

#: How many objects are made between two collections.
THRESHOLDS = pytest.mark.parametrize("threshold", [1, 2, 5])


class Finalizer:
    """Garbage that does something when it is found, and leaves more of its kind."""

    on = False
    found = 0
    actions: Iterator[Action] = iter(())

    def __init__(self) -> None:
        self.myself = self

    def __del__(self) -> None:
        kind = type(self)
        if kind.on:
            kind.found += 1
            kind()
            next(kind.actions)()


#: Free-threaded Python counts objects by the hundred, and waits for more of them the more there are.  There it collects
#: at every so many calls and returns instead, in the thread that makes them.
CALLS = 200 if sysconfig.get_config_var("Py_GIL_DISABLED") else 0


def collect_at_calls(threshold: int) -> None:
    numbers = itertools.count()

    def note(*_: object) -> None:
        if next(numbers) % (CALLS * threshold) == 0:
            gc.collect()

    sys.setprofile(note)


@contextlib.contextmanager
def collecting(threshold: int, *actions: Action) -> Iterator[None]:
    """Collect garbage all the time; finalizers call `actions` in turn.  What they raise is an error of the test."""
    before = gc.get_threshold()
    errors: list[BaseException] = []

    def careful(action: Action) -> Action:
        def call() -> None:
            try:
                action()
            except BaseException as exc:  # nobody is above a finalizer to hear it
                errors.append(exc)

        return call

    gc.collect()
    Finalizer.actions = itertools.cycle([careful(action) for action in actions])
    Finalizer.found = 0
    Finalizer.on = True
    Finalizer()
    gc.set_threshold(threshold, 1000, 1000)
    if CALLS:
        collect_at_calls(threshold)
    try:
        yield
    finally:
        sys.setprofile(None)
        Finalizer.on = False
        gc.set_threshold(*before)
        gc.collect()
    assert not errors, errors
    assert Finalizer.found


def nobody(*args: object) -> None:
    pass


class Meddler:
    """What finalizers do to a loop: everything that may be called while it runs."""

    def __init__(self, loop: Loop, stack: contextlib.ExitStack) -> None:
        self.loop = loop
        self.handles: list[asyncio.Handle] = []
        self.timers: list[asyncio.TimerHandle] = []
        self.waits: list[Any] = []
        self.pairs = []
        for _ in range(3):
            one, two = socket.socketpair()
            one.setblocking(False)
            two.setblocking(False)
            self.pairs.append((stack.enter_context(one), stack.enter_context(two)))
        if not WINDOWS:
            self.pairs.append((stack.enter_context(_at_a_high_number(self.pairs[0][0])), self.pairs[0][1]))
        self.numbers = itertools.count()
        stack.callback(self.stop)

    def call(self) -> None:
        self.handles.append(self.loop.call_soon(nobody, self, object()))
        if len(self.handles) > 5:
            handle = self.handles.pop(0)
            if native.hot is not None:  # asyncio's own handles can't be cancelled while they begin to run
                handle.cancel()

    def call_later(self) -> None:
        delay = next(self.numbers) % 7 * 0.0001
        self.timers.append(self.loop.call_later(delay, nobody, object()))
        if len(self.timers) > 5:
            timer = self.timers.pop(2)
            if native.hot is not None:  # as above
                timer.cancel()

    def look(self) -> None:
        """As tools do that show what a loop is at."""
        list(self.loop._ready)
        list(self.loop._scheduled)
        repr(self.loop)
        self.loop.create_future()

    def receive(self) -> None:
        """Begin to wait for a socket, as a task would, and give another wait up."""
        wait: Any = self.loop.sock_recv(self.pairs[next(self.numbers) % len(self.pairs)][0], 10)
        with contextlib.suppress(StopIteration):
            wait.send(None)
            self.waits.append(wait)
        if len(self.waits) > 3:
            self.waits.pop(0).close()

    def send(self) -> None:
        for one, two in self.pairs:
            with contextlib.suppress(BlockingIOError):
                one.recv(1 << 16)  # or what is sent would find no room some day
            coroutine: Any = self.loop.sock_sendall(two, b"x")
            with contextlib.suppress(StopIteration):
                coroutine.send(None)

    @property
    def actions(self) -> list[Action]:
        actions: list[Action] = [self.call, self.receive, self.look, self.send]
        # asyncio's own heap of timers is refused by heapq if it grows meanwhile; with a GIL nothing collects then.
        if native.hot is not None or native.gil_is_on():
            actions.append(self.call_later)
        return actions

    def stop(self) -> None:
        Finalizer.on = False  # also where a test has failed in between
        for handle in (*self.handles, *self.timers):
            handle.cancel()
        for wait in self.waits:
            wait.close()


def _at_a_high_number(sock: socket.socket) -> socket.socket:
    """The same under a number for which the tables of a driver have no room yet."""
    if sys.platform == "linux":
        other = socket.socket(fileno=os.dup2(sock.fileno(), sock.fileno() + 500, inheritable=False))
    else:
        other = sock.dup()
    other.setblocking(False)
    return other


@pytest.fixture
def meddler(loop: Loop) -> Iterator[Meddler]:
    with contextlib.ExitStack() as stack:
        yield Meddler(loop, stack)
        loop.run_until_complete(turns())


@THRESHOLDS
async def test_callbacks_run_in_order(loop: Loop, meddler: Meddler, threshold: int) -> None:
    called: list[int] = []
    with collecting(threshold, *meddler.actions):
        for number in range(300):
            handle = loop.call_soon(called.append, number)
            if number % 3 == 0:
                handle.cancel()
            if number % 50 == 0:
                await turns(2)
        await turns(3)
    assert called == [number for number in range(300) if number % 3]


@THRESHOLDS
async def test_timers_strike_in_order(loop: Loop, meddler: Meddler, threshold: int) -> None:
    called: list[int] = []
    with collecting(threshold, *meddler.actions):
        now = loop.time()
        timers = [loop.call_at(now + number % 10 * 0.001, called.append, number) for number in range(300)]
        for number in range(0, 300, 3):
            timers[number].cancel()
        await until(lambda: len(called) == 200)
    assert sorted(called) == [number for number in range(300) if number % 3]
    assert [number % 10 for number in called] == sorted(number % 10 for number in called)


@THRESHOLDS
@pytest.mark.parametrize("size", [10, 20_000])
async def test_bytes_of_sockets_come_through(loop: Loop, meddler: Meddler, threshold: int, size: int) -> None:
    one, two = socket.socketpair()
    data = os.urandom(size)

    async def answer() -> None:
        while got := await loop.sock_recv(two, 3000):
            await loop.sock_sendall(two, got)

    async def ask() -> None:
        for _ in range(20):
            await loop.sock_sendall(one, data)
            back = bytearray()
            while len(back) < size:
                back += await loop.sock_recv(one, size - len(back))
            assert back == data
        one.shutdown(socket.SHUT_WR)

    with one, two, collecting(threshold, *meddler.actions):
        one.setblocking(False)
        two.setblocking(False)
        await asyncio.gather(answer(), ask())


@THRESHOLDS
async def test_waits_that_are_given_up_lose_nothing(loop: Loop, meddler: Meddler, threshold: int) -> None:
    one, two = socket.socketpair()
    rnd = random.Random(threshold)
    received = bytearray()
    sent = bytes(number % 256 for number in range(80 if CALLS else 200))  # a collection takes longer there
    waits: list[asyncio.Task[None]] = []

    async def receive(size: int) -> None:
        """A task that is cancelled in its last step drops its result, so this has none."""
        received.extend(await loop.sock_recv(one, size))

    def give_up() -> None:
        for wait in waits:
            wait.cancel()

    with one, two, collecting(threshold, *meddler.actions, give_up):
        one.setblocking(False)
        two.setblocking(False)
        for number in sent:
            waits = [asyncio.create_task(receive(3))]
            await turns(rnd.randrange(3))
            two.send(bytes([number]))
            await turns(rnd.randrange(3))
            give_up()
            with contextlib.suppress(asyncio.CancelledError):
                await waits[0]
        waits = []
        while len(received) < len(sent):
            await asyncio.wait_for(receive(1000), LIMIT)
    assert received == sent


class Datagrams(asyncio.DatagramProtocol):
    """Sends each datagram back."""

    def __init__(self, back: bool) -> None:
        self.back = back
        self.received: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.DatagramTransport = transport  # type: ignore[assignment]  # datagrams only

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.received.append(data)
        if self.back:
            self.transport.sendto(data, addr)


@THRESHOLDS
async def test_datagrams_come_through(loop: Loop, meddler: Meddler, threshold: int) -> None:
    server, _ = await loop.create_datagram_endpoint(lambda: Datagrams(True), local_addr=("127.0.0.1", 0))
    address = server.get_extra_info("sockname")
    client, protocol = await loop.create_datagram_endpoint(lambda: Datagrams(False), local_addr=("127.0.0.1", 0))
    sent = [os.urandom(number) for number in range(60)]
    with collecting(threshold, *meddler.actions, lambda: client.sendto(b"by a finalizer", address)):
        for number, data in enumerate(sent):
            client.sendto(data, address)
            await until(lambda count=number + 1: len(_own(protocol)) >= count)  # type: ignore[misc]
    assert _own(protocol) == sent
    client.close()
    server.close()
    await turns()


def _own(protocol: Datagrams) -> list[bytes]:
    return [data for data in protocol.received if data != b"by a finalizer"]


class Client(asyncio.Protocol):
    """Counts on its bytes to come back."""

    def __init__(self) -> None:
        self.received = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]  # stream transports only

    def data_received(self, data: bytes) -> None:
        self.received += data


class BufferedClient(asyncio.BufferedProtocol):
    def __init__(self) -> None:
        self.received = bytearray()
        self.buffer = bytearray(1000)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]  # stream transports only

    def get_buffer(self, hint: int) -> bytearray:
        return self.buffer

    def buffer_updated(self, count: int) -> None:
        self.received += self.buffer[:count]


@THRESHOLDS
@pytest.mark.parametrize("make", [Client, BufferedClient])
async def test_bytes_of_transports_come_through(
    loop: Loop, meddler: Meddler, threshold: int, make: Callable[[], Any]
) -> None:
    server = await loop.create_server(Echo, "127.0.0.1", 0)
    address = server.sockets[0].getsockname()
    sent = [os.urandom(number * 100) for number in range(40)]
    written: list[int] = []  # how much each time

    def pause_and_resume() -> None:
        client.transport.pause_reading()
        client.transport.resume_reading()

    def write(data: bytes = b"?") -> None:
        written.append(len(data))
        client.transport.write(data)

    client: Any = (await loop.create_connection(make, *address[:2]))[1]
    with collecting(threshold, *meddler.actions, pause_and_resume, write):
        for number, data in enumerate(sent):
            write(data)
            if number % 8 == 0:
                await until(lambda: len(client.received) >= sum(written) - 1000)
    await until(lambda: len(client.received) >= sum(written))
    # A finalizer may write before or after a piece, also when that is about to be written; never within one.
    assert re.fullmatch(rb"\?*".join([b"", *map(re.escape, sent), b""]), client.received, re.DOTALL)
    assert len(client.received) == sum(written)
    client.transport.close()
    server.close()
    await turns()


@THRESHOLDS
async def test_connections_that_finalizers_close(loop: Loop, meddler: Meddler, threshold: int) -> None:
    server = await loop.create_server(Echo, "127.0.0.1", 0)
    address = server.sockets[0].getsockname()
    open_ones: list[asyncio.Transport] = []

    def close_one() -> None:
        if open_ones:
            transport = open_ones.pop()
            transport.write(b"last words")
            transport.close() if len(open_ones) % 2 else transport.abort()

    with collecting(threshold, *meddler.actions, close_one):
        for _ in range(30):
            transport, _protocol = await loop.create_connection(Client, *address[:2])
            transport.write(b"x" * 1000)
            open_ones.append(transport)
            await turns(2)
    while open_ones:
        close_one()
    server.close()
    await until(lambda: not loop._transports)
