"""A callback may do anything: in each callback of a protocol each method of its transport is called.

What must hold then is checked on our loop: calls in order, bytes exact and in order, nothing after the end, nothing
reported but what was raised on purpose; and another connection on the same loop does not feel any of it.  The same is
done on asyncio's own loop.  Where all that holds there too, ours is to come out the same.  lives.py tells how.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import iocp_loop

from . import lives
from .lives import Buffered, Datagrams, Deed, Life, Made, OnPurpose, Outcome, Plain, Process, Script
from .support import LIMIT, WINDOWS, Echo, until

Loop = iocp_loop.IocpEventLoop
Reports = list[dict[str, Any]]

#: What may be reported.
RAISED = {OnPurpose, asyncio.CancelledError}

BOTH = ["connection_made", "connection_lost"]
WRITERS = ["pause_writing", "resume_writing"]
READERS: dict[type, list[str]] = {
    Plain: ["data_received", "eof_received"],
    Buffered: ["get_buffer", "buffer_updated", "eof_received"],
}

set_plain, set_buffered = lives.setting(Plain), lives.setting(Buffered)
ALWAYS: list[Deed] = [lives.close, lives.abort, set_plain, lives.ask]
READING: list[Deed] = [lives.pause, lives.resume, set_buffered]
WRITING: list[Deed] = [lives.write, lives.write_much, lives.writelines, lives.write_eof, lives.set_limits]
FAILING: list[Deed] = [lives.fail, lives.fail_as_cancelled]


@pytest.fixture(autouse=True, scope="module")
def quick_collections() -> Iterator[None]:
    """Keep what is there already out of the collections that `forget` asks for."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Bystander:
    """Another connection on the loop.  In each turn something goes there, and comes back."""

    def __init__(self, loop: Loop) -> None:
        ours, self.sock = socket.socketpair()
        self.sock.setblocking(False)
        self.sent = self.came_back = 0
        self.transport, _ = loop.run_until_complete(loop.create_connection(Echo, sock=ours))

    def hear(self) -> bool:
        """Whether all that was sent has come back."""
        with contextlib.suppress(BlockingIOError):
            self.came_back += len(self.sock.recv(100_000))
        return self.came_back == self.sent

    def tick(self) -> None:
        self.hear()
        self.sent += self.sock.send(b".")

    async def leave(self) -> None:
        await until(self.hear)
        self.transport.abort()
        self.sock.close()


@contextlib.contextmanager
def asyncios_loop() -> Iterator[tuple[asyncio.AbstractEventLoop, Reports]]:
    loop = asyncio.SelectorEventLoop()
    reports: Reports = []
    loop.set_exception_handler(lambda _, context: reports.append(context))
    yield loop, reports
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


def kinds_of(reports: Reports) -> list[type]:
    return [type(report.get("exception")) for report in reports]


def be_right(loop: Loop, reports: Reports, life: Life, made: Made, script: type[Script]) -> tuple[Outcome, list[type]]:
    """Lead a life on our loop: what it came to, and what was reported."""
    bystander = Bystander(loop)
    life.beside = bystander.tick
    try:
        outcome = loop.run_until_complete(asyncio.wait_for(script(loop, life, made).lead(), 3 * LIMIT))
    finally:
        loop.run_until_complete(bystander.leave())
    told = kinds_of(reports)
    assert not life.wrong, life.deed.__name__
    assert set(told) <= RAISED, life.deed.__name__
    reports.clear()
    return outcome, told


def walk(
    loop: Loop, reports: Reports, born: Callable[[], Life], make: Callable[[], Made], script: type[Script] = Script
) -> None:
    """Lead a life on our loop, and the same on asyncio's own.  Where all is right there, both come to the same."""
    ours, theirs = born(), born()
    outcome = be_right(loop, reports, ours, make(), script)
    with asyncios_loop() as (other, told):

        def be_right_there() -> None:
            assert not theirs.wrong
            assert set(kinds_of(told)) <= RAISED

        theirs.patience = 2
        theirs.beside = be_right_there  # else there is nothing to wait for
        try:
            expected = other.run_until_complete(script(other, theirs, make()).lead())
            be_right_there()
        except (AssertionError, AttributeError):
            return
    if not differs_there(ours):
        assert outcome == (expected, kinds_of(told))


def differs_there(life: Life) -> bool:
    """docs/differences.md: what ends the connection here is only reported there; what has no room is never written."""
    failed = life.failed and (life.at == "connection_made" or "Pipe" in repr(life.transport))
    return failed or (life.above_tls and life.deed is lives.set_limits)


def callbacks(*kinds: type, reads: bool = True, writes: bool = True) -> list[Any]:
    return [
        pytest.param(kind, at, id=f"{kind.__name__}-{at}")
        for kind in kinds
        for at in BOTH + (READERS[kind] if reads else []) + (WRITERS if writes else [])
    ]


def deeds(*sets: list[Deed]) -> list[Any]:
    return [pytest.param(deed, id=deed.__name__) for deed in itertools.chain(*sets)]


@pytest.mark.parametrize("deed", deeds(ALWAYS, READING, WRITING, [lives.forget], FAILING))
@pytest.mark.parametrize(("kind", "at"), callbacks(Plain, Buffered))
def test_streams(loop: Loop, reports: Reports, kind: type, at: str, deed: Deed) -> None:
    walk(loop, reports, lambda: Life(kind, at, deed), lives.stream)


@pytest.mark.parametrize("deed", deeds(ALWAYS, READING, WRITING, [lives.forget], FAILING))
@pytest.mark.parametrize(("kind", "at"), callbacks(Plain, Buffered, writes=False))
def test_streams_in_bulk(loop: Loop, reports: Reports, kind: type, at: str, deed: Deed) -> None:
    walk(loop, reports, lambda: Life(kind, at, deed, large=True), lives.tcp)


@pytest.mark.parametrize("deed", deeds(ALWAYS, READING, WRITING, [lives.forget], FAILING))
@pytest.mark.parametrize(("kind", "at"), callbacks(Plain, Buffered))
def test_tls(loop: Loop, reports: Reports, kind: type, at: str, deed: Deed) -> None:
    walk(loop, reports, lambda: Life(kind, at, deed), lives.tls)


@pytest.mark.skipif(WINDOWS, reason="pipes that never block are Unix's; test_windows_pipes.py has Windows'")
@pytest.mark.parametrize("deed", deeds(ALWAYS, READING, [lives.forget], FAILING))
@pytest.mark.parametrize(("kind", "at"), callbacks(Plain, Buffered, writes=False))
def test_pipes_that_are_read(loop: Loop, reports: Reports, kind: type, at: str, deed: Deed) -> None:
    walk(loop, reports, lambda: Life(kind, at, deed), lives.reading_pipe)


@pytest.mark.skipif(WINDOWS, reason="as above")
@pytest.mark.parametrize("deed", deeds(ALWAYS, WRITING, [lives.forget], FAILING))
@pytest.mark.parametrize(("kind", "at"), callbacks(Plain, reads=False))
def test_pipes_that_are_written(loop: Loop, reports: Reports, kind: type, at: str, deed: Deed) -> None:
    walk(loop, reports, lambda: Life(kind, at, deed), lives.writing_pipe)


@pytest.mark.skipif(WINDOWS, reason="there is no socket pair of datagrams, and errors of them come otherwise")
@pytest.mark.parametrize("make", [lives.unix_datagrams, lives.internet_datagrams], ids=["unix", "internet"])
@pytest.mark.parametrize(
    "deed",
    deeds(
        [lives.close, lives.abort, lives.setting(Datagrams), lives.ask],
        [lives.send, lives.send_many, lives.set_limits],
        FAILING,
    ),
)
@pytest.mark.parametrize("at", [*BOTH, *WRITERS, "datagram_received", "error_received"])
def test_datagrams(loop: Loop, reports: Reports, make: Callable[[], Made], at: str, deed: Deed) -> None:
    if make is lives.internet_datagrams and (at in WRITERS or deed is lives.send_many):
        pytest.skip("the kernel takes any number of these, and throws away what is too much")
    walk(loop, reports, lambda: Life(Datagrams, at, deed), make, lives.DatagramScript)


@pytest.mark.skipif(WINDOWS, reason="there is no cat")
@pytest.mark.parametrize(
    "deed",
    deeds(
        [lives.close, lives.kill, lives.setting(Process), lives.ask],
        [lives.close_input, lives.abort_input, lives.close_output, lives.rest_of_output],
        FAILING,
    ),
)
@pytest.mark.parametrize("at", [*BOTH, "pipe_data_received", "pipe_connection_lost", "process_exited"])
def test_processes(loop: Loop, reports: Reports, at: str, deed: Deed) -> None:
    walk(loop, reports, lambda: Life(Process, at, deed), lives.process, lives.ProcessScript)


def pairs(deeds: list[Deed]) -> list[Deed]:
    """Any two deeds, the first of which leaves the transport to the second; what rests for ever is not forgotten."""
    second = [*deeds, lives.forget, lives.fail]
    return [lives.both(one, two) for one in deeds for two in second if (one, two) != (lives.pause, lives.forget)]


@pytest.mark.parametrize(("kind", "at"), callbacks(Plain, Buffered))
@pytest.mark.parametrize(
    ("make", "some"),
    [
        pytest.param(lives.stream, [lives.close, lives.abort, set_plain, *READING, *WRITING[1:4]], id="plain"),
        pytest.param(lives.tls, [lives.close, lives.abort, lives.pause, lives.write_much, set_buffered], id="TLS"),
    ],
)
def test_two_at_once(
    loop: Loop, reports: Reports, make: Callable[[], Made], some: list[Deed], kind: type, at: str
) -> None:
    for deed in pairs(some):
        be_right(loop, reports, Life(kind, at, deed), make(), Script)
