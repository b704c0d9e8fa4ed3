"""What the kernel was lent stays lent until the last completion, whatever becomes of the operation that brought it.

The attributes of an operation are open to everybody.  Memory that is freed, or moved, while the kernel has it is
written to by the kernel all the same.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import socket
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from iocp_loop import operations as ops
from iocp_loop.operations import Operation
from iocp_loop.ports import Driver

from .rig import Pair, Rig
from .support import WINDOWS, fill, read_exactly, udp_socket, windows_pipe

SIZE = 5000


class Memory(bytearray):
    """A buffer that can be referred to weakly."""


class Lent:
    """An operation that waits, with the memory that it has brought, and how to let it end."""

    def __init__(self, op: Operation, memory: Memory, let_go_on: Callable[[], object]) -> None:
        self.op: Any = op
        self.memory = weakref.ref(memory)
        self.let_go_on = let_go_on

    def is_lent_by(self, driver: Driver) -> bool:
        """False where the driver makes the call when that is possible, with what is there then."""
        if driver.name == "uring":
            return isinstance(self.op, (ops.ReadInto, ops.Write))
        return driver.name != "poll"


Made = tuple[Operation, Callable[[], object]]


def receive_into(memory: Memory, pair: Pair, stack: contextlib.ExitStack) -> Made:
    return ops.ReceiveInto(pair[0], memory), functools.partial(pair[1].sendall, b"x" * SIZE)


def receive_from_into(memory: Memory, pair: Pair, stack: contextlib.ExitStack) -> Made:
    ours, peer = stack.enter_context(udp_socket()), stack.enter_context(udp_socket())
    return ops.ReceiveFromInto(ours, memory), functools.partial(peer.sendto, b"x" * SIZE, ours.getsockname())


def send(memory: Memory, pair: Pair, stack: contextlib.ExitStack) -> Made:
    ours, let_go_on = _full(pair, stack)
    return ops.Send(ours, memory), let_go_on


def send_all(memory: Memory, pair: Pair, stack: contextlib.ExitStack) -> Made:
    ours, let_go_on = _full(pair, stack)
    return ops.SendAll(ours, [memory]), let_go_on


def send_all_of_two(memory: Memory, pair: Pair, stack: contextlib.ExitStack) -> Made:
    ours, let_go_on = _full(pair, stack)
    return ops.SendAll(ours, [memory, b"the end"]), let_go_on


def _full(pair: Pair, stack: contextlib.ExitStack) -> tuple[socket.socket, Callable[[], object]]:
    """A socket that takes no more, and how to make it."""
    if not WINDOWS:  # those of AF_UNIX are full at once and stay it
        pair = socket.socketpair()
        for sock in pair:
            stack.enter_context(sock)
        pair[0].setblocking(False)
    return pair[0], functools.partial(read_exactly, pair[1], fill(pair[0]))


def read_into(memory: Memory, pair: Pair, stack: contextlib.ExitStack) -> Made:
    if WINDOWS:
        reader, writer = windows_pipe("read")
        stack.enter_context(reader)
        stack.enter_context(writer)
        return ops.ReadInto(reader.handle, memory), functools.partial(writer.write, b"x" * SIZE)
    reading, writing = _pipe(stack)
    return ops.ReadInto(reading, memory), functools.partial(os.write, writing, b"x" * SIZE)


def write(memory: Memory, pair: Pair, stack: contextlib.ExitStack) -> Made:
    if WINDOWS:
        pytest.skip("a pipe of Windows takes what there is")
    reading, writing = _pipe(stack)
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, bytes(4096))
    os.set_blocking(writing, True)
    return ops.Write(writing, memory), functools.partial(os.read, reading, 1 << 20)


def _pipe(stack: contextlib.ExitStack) -> tuple[int, int]:
    ends = os.pipe()  # which block: those that don't are waited for by readiness
    for end in ends:
        stack.callback(os.close, end)
    return ends


@pytest.fixture(
    params=[receive_into, receive_from_into, send, send_all, send_all_of_two, read_into, write],
    ids=lambda make: make.__name__,
)
def lent(request: pytest.FixtureRequest, rig: Rig, pair: Pair) -> Iterator[Lent]:
    memory = Memory(b"." * SIZE)
    with contextlib.ExitStack() as stack:
        op, let_go_on = request.param(memory, pair, stack)
        lent = Lent(rig.submit(op), memory, let_go_on)
        del memory, op
        yield lent


def _attribute(op: Any) -> str:
    return next(name for name in ("buffer", "data", "buffers") if hasattr(op, name))


def replace(op: Any) -> None:
    setattr(op, _attribute(op), None)


def delete(op: Any) -> None:
    delattr(op, _attribute(op))


def release(op: Any) -> None:
    views = getattr(op, _attribute(op))
    for view in views if isinstance(views, list) else [views]:
        view.release()


def empty(op: Any) -> None:
    """Take it out of where it stands, as far as that can be."""
    if isinstance(op, ops.SendAll):
        op.buffers.clear()
    else:
        setattr(op, _attribute(op), memoryview(b""))


TAKEN_AWAY = pytest.mark.parametrize("take_away", [replace, delete, release, empty])


@TAKEN_AWAY
def test_memory_that_the_kernel_has_stays(rig: Rig, lent: Lent, take_away: Callable[[Any], None]) -> None:
    rig.turn()  # it is the kernel's now
    assert lent.op.in_flight
    take_away(lent.op)
    gc.collect()
    if not lent.is_lent_by(rig.driver):
        return
    memory = lent.memory()
    assert memory is not None
    with pytest.raises(BufferError):
        memory.extend(b"more")


@pytest.mark.parametrize("take_away", [replace, release, empty])
def test_it_is_used_all_the_same(rig: Rig, lent: Lent, take_away: Callable[[Any], None]) -> None:
    rig.turn()
    if not lent.is_lent_by(rig.driver):
        return
    take_away(lent.op)
    memory = lent.memory()
    assert memory is not None
    lent.let_go_on()
    if isinstance(lent.op, ops.SendAll) and take_away is release:
        return  # what is left of it can't be told from what was sent
    value = rig.value(lent.op)
    count = value if isinstance(value, int) else value[0]
    assert count > 0
    if hasattr(lent.op, "buffer"):
        assert bytes(memory) == b"x" * count + b"." * (SIZE - count)


def test_what_has_been_sent_is_not_kept(rig: Rig, pair: Pair) -> None:
    memory = Memory(b"." * SIZE)
    op = ops.SendAll(pair[0], [memory, b"the end"])
    rig.value(rig.submit(op))
    rig.turn()
    watched = weakref.ref(memory)
    del memory
    gc.collect()
    assert watched() is None
    assert op.sent == SIZE + len(b"the end")


#: What an attribute is replaced by; DELETED: it is gone.
DELETED = object()
REPLACEMENTS = [DELETED, None, "text", -1, 1 << 80, 2.5, [], object()]


@pytest.mark.parametrize("replacement", REPLACEMENTS, ids=lambda value: "deleted" if value is DELETED else None)
@pytest.mark.parametrize("attribute", ["handle", "fd", "size", "complete", "paused", "get_buffer", "key"])
def test_an_operation_that_is_spoilt_in_flight_spoils_nothing_else(
    rig: Rig, pair: Pair, attribute: str, replacement: object
) -> None:
    """It may end with an error or not at all; the process and the driver live on."""
    with udp_socket() as ours, udp_socket() as peer:
        spoilt: list[Operation] = [
            rig.submit(ops.ReceiveFromStream(ours, 100)),
            rig.submit(ops.ReceiveStream(pair[0])),
        ]
        rig.turn()
        for op in spoilt:
            if hasattr(op, attribute):
                if replacement is DELETED:
                    delattr(op, attribute)
                else:
                    setattr(op, attribute, replacement)
        peer.sendto(b"a datagram", ours.getsockname())
        pair[1].send(b"some data")
        for _ in range(3):
            with contextlib.suppress(Exception):
                rig.turn(0.01)
        for op in spoilt:
            with contextlib.suppress(Exception):
                rig.driver.cancel(op)
        with contextlib.suppress(Exception):
            rig.turn(0.01)
    with contextlib.suppress(Exception):
        rig.driver.close(0.1)
    rig.driver.in_flight.clear()
