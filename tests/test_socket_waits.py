"""sock_recv when nothing has come yet: cancelled, closed under, given away, or not alone on its socket."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import socket
import sys
import weakref
from typing import Any

import pytest

import iocp_loop
from iocp_loop import native

from .support import WINDOWS, reset, turns, until

Loop = iocp_loop.IocpEventLoop
Pair = tuple[socket.socket, socket.socket]

pytestmark = pytest.mark.skipif(WINDOWS, reason="these use socket pairs of AF_UNIX, and close sockets that are in use")


@pytest.fixture
def ends(no_leak: None) -> Any:
    """Two connected sockets, both non-blocking."""
    one, two = socket.socketpair()
    one.setblocking(False)
    two.setblocking(False)
    with one, two:
        yield one, two


async def begin(loop: Loop, sock: socket.socket, size: int = 100) -> asyncio.Task[bytes]:
    """A task that waits for `sock`."""
    task = asyncio.create_task(loop.sock_recv(sock, size))
    await turns(3)
    assert not task.done()
    return task


SIZES = [100, 100_000]  # by the kernel into the pool, and by a poll and recv, on driver uring


@pytest.mark.parametrize("size", SIZES)
async def test_a_wait_that_is_answered(loop: Loop, ends: Pair, size: int) -> None:
    for number in range(5):
        task = await begin(loop, ends[0], size)
        ends[1].send(b"%d" % number)
        assert await task == b"%d" % number
    task = await begin(loop, ends[0], size)
    ends[1].shutdown(socket.SHUT_WR)
    assert await task == b""


@pytest.mark.skipif(native.hot is None, reason="the Python tier always receives the same way")
@pytest.mark.parametrize("size", [100, 3000, 1 << 20])
async def test_large_pieces_are_not_expected_for_ever(loop: Loop, ends: Pair, size: int) -> None:
    other = Loop(driver=loop.driver)
    for sock in ends:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    ends[1].send(bytes(200_000))
    received = 0
    while received < 200_000:
        received += len(await loop.sock_recv(ends[0], 1 << 20))
    assert loop._quick.expected >= 50_000
    assert other._quick.expected == 0  # each loop expects for itself
    other.close()
    for number in range(10):
        task = await begin(loop, ends[0], size) if number % 2 else asyncio.create_task(loop.sock_recv(ends[0], size))
        ends[1].send(bytes(min(size, 1000)))
        assert len(await task) == min(size, 1000)
    assert loop._quick.expected < 4096


@pytest.mark.skipif(native.hot is None, reason="the Python tier has it from its own operation")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("replacement", [None, "deleted", object()])
@pytest.mark.parametrize("attribute", ["handle", "size"])
async def test_a_wait_whose_operation_is_spoilt(
    loop: Loop, ends: Pair, size: int, attribute: str, replacement: object
) -> None:
    ends[1].send(bytes(200_000))  # then it waits by a poll, on driver uring
    while True:
        try:
            await loop.sock_recv(ends[0], 1 << 20)
            ends[0].recv(1)
        except BlockingIOError:
            break
    task = await begin(loop, ends[0], size)
    (op,) = loop._proactor.in_flight.values()
    if replacement == "deleted":
        delattr(op, attribute)
    else:
        setattr(op, attribute, replacement)
    ends[1].send(b"hello")
    with pytest.raises(TypeError, match="has been replaced"):
        await task


async def test_more_waits_than_the_kernel_has_buffers_for_are_answered_without_trying_again(
    loop: Loop, no_leak: None
) -> None:
    pairs = [socket.socketpair() for _ in range(300)]
    tasks = []
    for ours, _ in pairs:
        ours.setblocking(False)
        tasks.append(asyncio.create_task(loop.sock_recv(ours, 100)))
    await turns(3)
    before = loop.stats().completions
    for number, (_, peer) in enumerate(pairs):
        peer.send(b"%d" % number)
    assert await asyncio.gather(*tasks) == [b"%d" % number for number in range(300)]
    if native.hot is not None:  # the first 129 may find the pool empty, once or twice
        assert loop.stats().completions - before <= 300 + 129
    for sock in (sock for pair in pairs for sock in pair):
        sock.close()


@pytest.mark.parametrize("size", SIZES)
async def test_a_wait_that_ends_with_a_reset(loop: Loop, pair: Pair, size: int) -> None:
    task = await begin(loop, pair[0], size)
    reset(pair[1])
    with pytest.raises(ConnectionResetError):
        await task


@pytest.mark.parametrize("size", SIZES)
async def test_cancelled_before_anything_comes(loop: Loop, ends: Pair, size: int) -> None:
    for _ in range(3):
        task = await begin(loop, ends[0], size)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    ends[1].send(b"later")
    assert await loop.sock_recv(ends[0], size) == b"later"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("when", ["before the turn", "after the turn"])
async def test_cancelled_when_data_are_there_they_are_not_lost(loop: Loop, ends: Pair, size: int, when: str) -> None:
    for number in range(5):
        task = await begin(loop, ends[0], size)
        ends[1].send(b"precious %d" % number)
        if when == "after the turn":  # its task is to run in the next one
            loop.call_soon(task.cancel)
            await turns(1)
        else:
            task.cancel()
        try:
            got = await task
        except asyncio.CancelledError:
            got = await asyncio.wait_for(loop.sock_recv(ends[0], size), 5)
        assert got == b"precious %d" % number


async def test_a_wait_whose_coroutine_is_closed(loop: Loop, ends: Pair) -> None:
    waiting = loop.sock_recv(ends[0], 100)
    waiting.send(None)
    waiting.close()
    await turns()
    thrown = loop.sock_recv(ends[0], 100)
    thrown.send(None)
    with pytest.raises(ZeroDivisionError):
        thrown.throw(ZeroDivisionError("thrown in"))
    await turns()
    dropped = loop.sock_recv(ends[0], 100)
    dropped.send(None)
    del dropped
    await turns()
    ends[1].send(b"hello")
    assert await loop.sock_recv(ends[0], 100) == b"hello"


def test_the_loop_is_closed_while_a_task_waits(driver: str, ends: Pair) -> None:
    loop = iocp_loop.new_event_loop(driver)
    task = loop.create_task(loop.sock_recv(ends[0], 100))
    loop.run_until_complete(turns(3))
    loop.close()
    assert not task.done()
    reference = weakref.ref(task)
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # asyncio's: it would warn, rightly
    del task
    loop = None  # type: ignore[assignment]  # the last reference
    gc.collect()
    assert reference() is None


def test_the_loop_is_closed_as_a_wait_begins(driver: str, ends: Pair) -> None:
    loop: Any = iocp_loop.new_event_loop(driver)
    loop.run_until_complete(turns())
    future = loop.create_future()
    loop.create_future = lambda: loop.close() or future
    waiting = loop.sock_recv(ends[0], 100)
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        waiting.send(None)
    waiting.close()
    loop.close()
    del loop.create_future


async def test_the_loop_of_a_call_is_closed_already(loop: Loop, driver: str, ends: Pair) -> None:
    """Its descriptors are something else by now, perhaps those of the loop that runs."""
    other = iocp_loop.new_event_loop(driver)
    other.close()
    with pytest.raises(ValueError, match="closed"):
        await other.sock_recv(ends[0], 100)
    ends[1].send(b"hello")
    before = loop.stats().batches
    await asyncio.sleep(0.05)
    assert loop.stats().batches - before < 10
    assert await loop.sock_recv(ends[0], 100) == b"hello"


async def test_a_wait_that_goes_on_too_early_waits_again(loop: Loop, ends: Pair) -> None:
    ours, peer = ends
    call: Any = loop.sock_recv(ours, 10)
    future = call.send(None)
    future._asyncio_future_blocking = False  # as a task has it
    assert call.send(None) is future
    peer.send(b"abc")
    await until(future.done)
    with pytest.raises(StopIteration) as info:
        call.send(None)
    assert info.value.value == b"abc"


async def test_two_wait_for_one_socket(loop: Loop, ends: Pair) -> None:
    first, second = await begin(loop, ends[0]), await begin(loop, ends[0])
    ends[1].send(b"one")
    await until(lambda: first.done() or second.done())
    ends[1].send(b"two")
    assert {await first, await second} == {b"one", b"two"}  # io_uring wakes the last one first
    third, fourth = await begin(loop, ends[0]), await begin(loop, ends[0])
    third.cancel()
    await turns()
    ends[1].send(b"three")
    assert await fourth == b"three"
    with pytest.raises(asyncio.CancelledError):
        await third


async def test_a_reader_on_a_socket_that_is_waited_for(loop: Loop, ends: Pair) -> None:
    told: list[int] = []
    task = await begin(loop, ends[0])
    loop.add_reader(ends[0], told.append, 1)
    ends[1].send(b"hello")
    assert await task == b"hello"
    loop.remove_reader(ends[0])
    task = await begin(loop, ends[0])
    ends[1].send(b"again")
    assert await task == b"again"


async def test_a_writer_on_a_socket_that_is_waited_for(loop: Loop, ends: Pair) -> None:
    told: list[int] = []
    task = await begin(loop, ends[0])
    loop.add_writer(ends[0], told.append, 1)
    await until(lambda: told)
    loop.remove_writer(ends[0])
    ends[1].send(b"hello")
    assert await task == b"hello"


async def test_the_number_of_a_closed_socket_comes_back(loop: Loop, ends: Pair) -> None:
    """A wait leaves its registration behind; the next socket with that number is another."""
    numbers = []
    for _ in range(5):
        one, two = socket.socketpair()
        with one, two:
            one.setblocking(False)
            numbers.append(one.fileno())
            task = await begin(loop, one)
            two.send(b"hello")
            assert await task == b"hello"
    assert len(set(numbers)) < len(numbers)


async def test_a_socket_that_is_closed_while_it_is_waited_for(loop: Loop) -> None:
    one, two = socket.socketpair()
    one.setblocking(False)
    number = one.fileno()
    task = await begin(loop, one)
    one.close()
    three, four = socket.socketpair()
    with two, three, four:
        assert number in (three.fileno(), four.fileno())
        mine, peer = (three, four) if three.fileno() == number else (four, three)
        mine.setblocking(False)
        other = await begin(loop, mine)
        peer.send(b"not for the first")
        assert await other == b"not for the first"
        with pytest.raises(OSError, match="descriptor") as caught:
            await task
        assert caught.value.errno == errno.EBADF


async def test_a_socket_that_lives_on_elsewhere_does_not_make_the_loop_spin(loop: Loop) -> None:
    """Given to another process and closed here, it is still registered, and nothing can take that back."""
    one, two = socket.socketpair()
    with two:
        with one:
            one.setblocking(False)
            task = await begin(loop, one)
            two.send(b"head")
            assert await task == b"head"
            elsewhere = os.dup(one.fileno())
        two.send(b"body")
        before = loop.stats().batches
        await asyncio.sleep(0.1)
        assert loop.stats().batches - before < 20
        assert os.read(elsewhere, 100) == b"body"
        os.close(elsewhere)


async def test_data_that_come_while_nobody_waits(loop: Loop, ends: Pair) -> None:
    task = await begin(loop, ends[0])
    ends[1].send(b"one")
    assert await task == b"one"
    ends[1].send(b"two three")
    await asyncio.sleep(0.01)  # the event is told, and nobody is there
    assert await loop.sock_recv(ends[0], 3) == b"two"
    assert await loop.sock_recv(ends[0], 100) == b" three"
    task = await begin(loop, ends[0])
    ends[1].send(b"four")
    assert await task == b"four"


async def test_somebody_else_takes_the_data(loop: Loop, ends: Pair) -> None:
    for size in SIZES:
        task = await begin(loop, ends[0], size)
        ends[1].send(b"one")
        if size > 1000 or loop.driver == "poll":  # else the kernel has it already
            assert ends[0].recv(100) == b"one"
            await turns()
            assert not task.done()
            ends[1].send(b"two")
            assert await task == b"two"
        else:
            assert await task == b"one"


def test_system_exit_in_one_completion_loses_no_other(driver: str) -> None:
    """Data of several sockets in one batch, and the first makes an end of the loop."""
    loop = iocp_loop.new_event_loop(driver)
    pairs = [socket.socketpair() for _ in range(6)]

    class Exits(asyncio.Protocol):
        def data_received(self, data: bytes) -> None:
            sys.exit(3)

    async def serve() -> list[asyncio.Task[bytes]]:
        tasks = []
        for one, _ in pairs[:-1]:
            one.setblocking(False)
            tasks.append(asyncio.create_task(loop.sock_recv(one, 100)))
        self_made.append((await loop.create_connection(Exits, sock=pairs[-1][0]))[0])
        await turns()
        return tasks

    self_made: list[asyncio.Transport] = []
    tasks = loop.run_until_complete(serve())
    for _, peer in [pairs[-1], *pairs[:-1]]:
        peer.send(b"hello")
    with pytest.raises(SystemExit):
        loop.run_forever()
    assert loop.run_until_complete(asyncio.wait_for(asyncio.gather(*tasks), 5)) == [b"hello"] * 5
    self_made[0].abort()
    loop.run_until_complete(turns())
    for one, two in pairs:
        one.close()
        two.close()
    loop.close()


class LoudSocket(socket.socket):
    """A subclass with a mind of its own."""

    def recv(self, *args: Any) -> bytes:
        return super().recv(*args).upper()


async def test_the_methods_of_a_subclass_are_called(loop: Loop) -> None:
    one, two = socket.socketpair()
    with two, LoudSocket(one.family, one.type, one.proto, one.detach()) as loud:
        loud.setblocking(False)
        two.send(b"quiet")
        assert await loop.sock_recv(loud, 100) == b"QUIET"
        task = await begin(loop, loud)
        two.send(b"quiet")
        assert await task == b"QUIET"


async def test_datagrams_are_not_cut(loop: Loop) -> None:
    """After pieces of one size the next are expected to be as large, which is nothing to a datagram."""
    one, two = socket.socketpair()
    with one, two:
        one.setblocking(False)
        for _ in range(3):
            two.sendall(b"x" * 5000)
            assert len(await loop.sock_recv(one, 5000)) == 5000
    three, four = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with three, four:
        three.setblocking(False)
        four.send(b"y" * 60_000)
        assert len(await loop.sock_recv(three, 100_000)) == 60_000
        four.send(b"")
        assert await loop.sock_recv(three, 100) == b""
        for size in (60_000, 100):
            task = await begin(loop, three, 100_000)
            four.send(b"z" * size)
            assert await task == b"z" * size


@pytest.mark.parametrize("size", [1, 2**31 - 1, 2**31, 2**62, sys.maxsize])
async def test_large_sizes(loop: Loop, ends: Pair, size: int) -> None:
    if native.hot is None and size > 2**31 - 1:
        pytest.skip("the socket module makes a buffer of that size at once")
    ends[1].send(b"h")
    assert await loop.sock_recv(ends[0], size) == b"h"
    task = await begin(loop, ends[0], size)
    ends[1].send(b"e")
    assert await task == b"e"


async def test_no_bytes_at_all(loop: Loop, ends: Pair) -> None:
    assert await loop.sock_recv(ends[0], 0) == b""
    assert await loop.sock_recv(ends[0], False) == b""
    ends[1].send(b"x")
    assert await loop.sock_recv(ends[0], 0) == b""
    assert await loop.sock_recv(ends[0], True) == b"x"


@pytest.mark.parametrize(
    ("size", "error"),
    [(-1, ValueError), (2**100, OverflowError), (1.5, TypeError), ("1", TypeError), (None, TypeError)],
)
async def test_sizes_that_are_none(loop: Loop, ends: Pair, size: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        await loop.sock_recv(ends[0], size)


async def test_things_that_are_no_sockets(loop: Loop, ends: Pair) -> None:
    for thing in (None, 42, "socket", object()):
        with pytest.raises((AttributeError, TypeError)):
            await loop.sock_recv(thing, 100)  # type: ignore[arg-type]  # on purpose
        with pytest.raises((AttributeError, TypeError)):
            await loop.sock_sendall(thing, b"x")  # type: ignore[arg-type]  # on purpose
    closed = socket.socket()
    closed.close()
    with pytest.raises(OSError, match="descriptor"):
        await loop.sock_recv(closed, 100)


async def test_a_cancelled_wait_keeps_its_socket_no_longer(loop: Loop) -> None:
    one, two = socket.socketpair()
    one.setblocking(False)
    task = await begin(loop, one)
    task.cancel()
    await asyncio.wait([task])
    await turns()
    reference = weakref.ref(one)
    one.close()
    two.close()
    del one, task
    await turns()
    gc.collect()
    assert reference() is None
