"""What docs/guarantees.md promises and no other test file shows; and that the page names tests that exist."""

from __future__ import annotations

import ast
import asyncio
import errno
import gc
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import iocp_loop
from iocp_loop import operations as ops
from iocp_loop.methods import signals
from iocp_loop.ports import make_driver

from .support import (
    LIMIT,
    ROOT,
    WINDOWS,
    Echo,
    Recorder,
    child_environment,
    in_thread,
    python_command,
    read_exactly,
    reset,
    run_python,
    tcp_pair,
    turns,
    until,
)

Loop = iocp_loop.IocpEventLoop
Pair = tuple[socket.socket, socket.socket]
Reports = list[dict[str, Any]]

# -- the pages -------------------------------------------------------------------------------------

PAGES = [ROOT / "docs" / "guarantees.md", ROOT / "docs" / "differences.md"]

#: What a row without a test has to say in its last column.
NO_TEST = ("not tested", "not there yet")


def rows(page: Path) -> list[list[str]]:
    """The rows of the page's tables, as lists of cells, without heads and rulers."""
    found = []
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("|") and not line.startswith("|-"):
            found.append([cell.strip() for cell in line.strip("|").split("|")])
    return [row for row in found if row[0] != "what users report"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_that_the_page_names_exists(page: Path) -> None:
    named = set(re.findall(r"`(test_\w+\.py)::(\w+)`", page.read_text(encoding="utf-8")))
    assert named
    for file, name in sorted(named):
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        tests = {one.name for one in tree.body if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)}
        assert name in tests, f"{page.name} names {file}::{name}, which is no test"


def test_every_row_has_a_test_or_says_that_it_has_none() -> None:
    promises = rows(PAGES[0])
    assert len(promises) > 25
    for row in promises:
        assert "::" in row[-1] or any(words in row[-1] for words in NO_TEST), row[0]


def test_a_row_says_where_its_tests_are_skipped() -> None:
    for row in rows(PAGES[0]):
        for file, name, note in re.findall(r"`(test_\w+\.py)::(\w+)`([^`]*)", row[-1]):
            tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
            (test,) = (one for one in tree.body if getattr(one, "name", None) == name)
            assert isinstance(test, ast.FunctionDef | ast.AsyncFunctionDef)
            marks = " ".join(map(ast.unparse, test.decorator_list))
            if "skipif(WINDOWS" in marks:
                assert "on Unix" in row[-1] or "on Linux" in row[-1], f"{file}::{name} does not run on Windows"
            if re.search(r"^pytest\.mark\.skipif\(WINE", marks):
                assert "Wine" in note, f"{file}::{name} does not run under Wine"


# -- readiness -------------------------------------------------------------------------------------


async def test_readers_and_writers_take_no_thread(loop: Loop, pair: Pair) -> None:
    """gh-81554: elsewhere add_reader on a proactor is a second loop, of select(), in a thread of its own."""
    before = set(threading.enumerate())
    seen: list[str] = []
    loop.add_reader(pair[0], seen.append, "readable")
    loop.add_writer(pair[0], seen.append, "writable")
    pair[1].send(b"x")
    await until(lambda: {"readable", "writable"} <= set(seen))
    assert set(threading.enumerate()) <= before
    loop.remove_reader(pair[0])
    loop.remove_writer(pair[0])


# -- servers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ECONNABORTED, errno.ECONNRESET, errno.EPERM])
async def test_an_accept_that_fails_does_not_end_the_server(loop: Loop, reports: Reports, code: int) -> None:
    """gh-93821: one error of one accept closed the listener."""
    server = await loop.create_server(Echo, "127.0.0.1", 0)
    (listener,) = loop._listeners.values()
    assert listener._stream is not None
    loop._proactor.cancel(listener._stream)
    await until(lambda: listener._stream is None or not listener._stream.in_flight)
    listener._accepted(None, OSError(code, os.strerror(code)))
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    writer.write(b"hello")
    assert await asyncio.wait_for(reader.read(5), LIMIT) == b"hello"
    assert [report["exception"].errno for report in reports] == [code]
    reports.clear()
    writer.close()
    await writer.wait_closed()
    server.close()
    await server.wait_closed()


async def test_waiting_connections_are_accepted_together_and_without_tasks(loop: Loop) -> None:
    """asyncio's proactor loop has a task for each accept, and accepts one connection in a turn."""
    count = 20
    all_there = loop.create_future()
    protocols: list[Recorder] = []
    tasks: set[Any] = set()

    def factory() -> Recorder:
        tasks.update(asyncio.all_tasks(loop))
        protocols.append(Recorder())
        if len(protocols) == count:
            all_there.set_result(None)
        return protocols[-1]

    server = await loop.create_server(factory, "127.0.0.1", 0)
    await turns()
    before, tasks_before = loop.stats(), asyncio.all_tasks(loop)
    # No turn of the loop meanwhile: they wait in the backlog.
    clients = [socket.create_connection(server.sockets[0].getsockname(), LIMIT) for _ in range(count)]
    await all_there
    after = loop.stats()
    assert after.batches - before.batches < count / 2
    assert after.operations["AcceptStream"] == 1
    assert tasks == tasks_before
    for client in clients:
        client.close()
    await turns()
    for protocol in protocols:
        protocol.transport.close()
    await until(lambda: all(protocol.finished for protocol in protocols))
    server.close()
    await server.wait_closed()


@pytest.mark.skipif(sys.version_info < (3, 13), reason="create_server has keep_alive since Python 3.13")
async def test_keep_alive(loop: Loop) -> None:
    new: Any = {"keep_alive": True}  # which types for older Pythons do not know
    server = await loop.create_server(Echo, "127.0.0.1", 0, **new)
    assert server.sockets[0].getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    server.close()
    await server.wait_closed()


# -- teardown --------------------------------------------------------------------------------------


async def test_closing_what_the_peer_has_reset_raises_nothing(loop: Loop) -> None:
    """gh-83037: ConnectionResetError out of _call_connection_lost.  What is reported fails the test by itself."""
    served: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.append(writer)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    for _ in range(5):
        client = socket.create_connection(server.sockets[0].getsockname(), LIMIT)
        await until(lambda: served)
        writer = served.pop()
        reset(client)
        writer.close()  # with no turn between: closing finds the connection reset
        await writer.wait_closed()
    server.close()
    await server.wait_closed()


def test_whatever_outlives_its_loop_only_warns(driver: str) -> None:
    """gh-92841, gh-83413: "Event loop is closed" out of the __del__ of pipes, processes and endpoints."""
    done = run_python(
        """
        import asyncio, gc, os, socket, sys, warnings
        import iocp_loop

        async def main():
            loop = asyncio.get_running_loop()
            left = [await loop.create_datagram_endpoint(asyncio.DatagramProtocol, local_addr=("127.0.0.1", 0))]
            if sys.platform != "win32":
                ends = [os.fdopen(fd, mode) for fd, mode in zip(os.pipe(), ("rb", "wb"))]
                left.append(await loop.connect_read_pipe(asyncio.Protocol, ends[0]))
                left.append(await loop.connect_write_pipe(asyncio.BaseProtocol, ends[1]))
                left.append(await asyncio.create_subprocess_exec(
                    "sleep", "60",
                    stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
                ))
                left.append(await loop.create_unix_connection(asyncio.Protocol, sock=socket.socketpair()[0]))
            return left

        warnings.simplefilter("always")
        loop = iocp_loop.new_event_loop(sys.argv[1])
        left = loop.run_until_complete(main())
        loop.close()
        del left, loop
        gc.collect()
        """,
        driver,
    )
    assert "ResourceWarning: unclosed transport" in done.stderr
    for noise in ("Event loop is closed", "Exception ignored", "Traceback"):
        assert noise not in done.stderr, done.stderr


# -- sockets of others -----------------------------------------------------------------------------


@pytest.mark.parametrize("first_is_closed", [True, False])
def test_a_socket_serves_one_loop_after_another(driver: str, no_leak: None, first_is_closed: bool) -> None:
    """gh-122240: WinError 87, for a socket stays with the first port that it met."""
    ours, peer = tcp_pair()
    loops = [iocp_loop.new_event_loop(driver) for _ in range(2)]
    for number, loop in enumerate(loops):
        receiving = loop.create_task(loop.sock_recv(ours, 100))
        loop.run_until_complete(turns())  # it waits now: a socket that is ready at once meets no port
        peer.send(b"%d" % number)
        assert loop.run_until_complete(asyncio.wait_for(receiving, LIMIT)) == b"%d" % number
        if first_is_closed:
            loop.close()
    for loop in loops:
        loop.close()
    ours.close()
    peer.close()


@pytest.mark.skipif(WINDOWS, reason="descriptors are handed to a child by their numbers")
def test_a_listening_socket_serves_several_processes(driver: str, no_leak: None) -> None:
    """gh-108089: servers that reload hand their listening socket to a child."""
    loop = iocp_loop.new_event_loop(driver)
    server = loop.run_until_complete(loop.create_server(Echo, "127.0.0.1", 0))
    address = server.sockets[0].getsockname()
    code = """
        import asyncio, socket, sys
        import iocp_loop

        async def serve(reader, writer):
            writer.write(b"child " + await reader.readline())
            writer.close()

        async def main():
            server = await asyncio.start_server(serve, sock=socket.socket(fileno=int(sys.argv[2])))
            print("ready", flush=True)
            await asyncio.to_thread(sys.stdin.read)
            server.close()

        iocp_loop.run(main(), driver=sys.argv[1])
        """
    number = server.sockets[0].fileno()
    with subprocess.Popen(
        python_command(code, driver, str(number)),
        env=child_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=[number],
    ) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
            server.close()
            loop.run_until_complete(server.wait_closed())
            with socket.create_connection(address, LIMIT) as client:
                client.send(b"hello\n")
                assert read_exactly(client, 12) == b"child hello\n"
            child.communicate(timeout=LIMIT)
        finally:
            child.kill()
    loop.close()
    assert child.returncode == 0


# -- waking, timers, embedding ---------------------------------------------------------------------


@pytest.mark.skipif(not WINDOWS and not hasattr(os, "eventfd"), reason="nothing but a socket pair wakes a poller there")
def test_no_socket_pair_is_needed_to_wake_the_loop(driver: str, no_leak: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """gh-83191: "Error on reading from the self pipe"."""
    if WINDOWS and driver == "poll":
        pytest.skip("select() on Windows takes nothing but sockets")

    def refuse(*args: Any) -> Any:
        # On Windows one is asked for, once in a process, so that signals end a wait; it is done without.
        raise OSError("none here") if WINDOWS else AssertionError("a socket pair was asked for")

    monkeypatch.setattr(socket, "socketpair", refuse)
    monkeypatch.setattr(signals, "_waker", signals._waker.__wrapped__)
    loop = iocp_loop.new_event_loop(driver)
    woken = loop.create_future()

    def wake() -> None:
        time.sleep(0.05)  # let the loop fall asleep
        loop.call_soon_threadsafe(woken.set_result, None)

    with in_thread(wake):
        loop.run_until_complete(asyncio.wait_for(woken, LIMIT))
    loop.close()


async def test_short_sleeps_are_short(loop: Loop) -> None:
    """gh-75720: the clock of GetQueuedCompletionStatus ticks every 15.6 ms."""
    durations = []
    for _ in range(20):
        start = time.perf_counter()
        await asyncio.sleep(0.001)
        durations.append(time.perf_counter() - start)
    # A busy machine may delay some; a coarse clock delays every one but the first.
    assert sorted(durations)[4] < 0.01


def test_waiting_and_delivering_are_apart(driver: str, pair: Pair) -> None:
    """gh-154971: whoever embeds the proactor in another loop waits in one place and delivers in another."""
    owner = asyncio.new_event_loop()
    proactor = iocp_loop.Proactor(owner, make_driver(driver))
    delivered: list[Any] = []
    proactor.receive_stream(pair[0], lambda data, error: delivered.append(data))
    pair[1].send(b"hello")
    deadline = time.monotonic() + LIMIT
    while not delivered and time.monotonic() < deadline:
        proactor.select(0.1)
        assert not delivered
        proactor.dispatch()
    assert delivered == [b"hello"]
    proactor.close()
    owner.close()


# -- standard input --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pipe", "socket", "null"])
def test_standard_input(driver: str, kind: str) -> None:
    """gh-87694: connect_read_pipe(sys.stdin)."""
    if WINDOWS and kind == "socket":
        pytest.skip("Popen of Windows takes descriptors of the C runtime, and a socket is none")
    code = """
        import asyncio, sys
        import iocp_loop

        async def main():
            loop = asyncio.get_running_loop()
            reader = asyncio.StreamReader()
            transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
            print(len(await reader.read()))
            transport.close()

        iocp_loop.run(main(), driver=sys.argv[1])
        """
    ours, theirs = socket.socketpair()
    with ours, theirs:
        stdin = {"pipe": subprocess.PIPE, "socket": theirs.fileno(), "null": subprocess.DEVNULL}[kind]
        with subprocess.Popen(
            python_command(code, driver),
            env=child_environment(),
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as child:
            theirs.close()
            try:
                if kind == "socket":
                    ours.sendall(bytes(1000))
                    ours.shutdown(socket.SHUT_WR)
                output = child.communicate("\0" * 1000 if kind == "pipe" else None, timeout=LIMIT)
            finally:
                child.kill()
    assert (*output, child.returncode) == ("0\n" if kind == "null" else "1000\n", "", 0)


# -- what uvloop's users ask for -------------------------------------------------------------------


def resolved(*addresses: tuple[str, int]) -> list[Any]:
    """What getaddrinfo would answer for a host with these addresses."""
    families = [socket.AF_INET6 if ":" in host else socket.AF_INET for host, _ in addresses]
    return [
        (family, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", address)
        for family, address in zip(families, addresses, strict=True)
    ]


class Attempts:
    """In place of a loop's name lookup and sock_connect: notes who is tried, and decides what comes of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, loop: Loop, *addresses: tuple[str, int]) -> None:
        self.tried: list[str] = []
        self.cancelled: list[str] = []
        self.outcomes: dict[str, BaseException | None] = {}
        self._answer = resolved(*addresses)
        monkeypatch.setattr(loop, "getaddrinfo", self._getaddrinfo)
        monkeypatch.setattr(loop, "sock_connect", self._sock_connect)

    async def _getaddrinfo(self, *args: Any, **kwargs: Any) -> list[Any]:
        return self._answer

    async def _sock_connect(self, sock: socket.socket, address: Any) -> None:
        self.tried.append(address[0])
        if address[0] in self.outcomes:
            raise self.outcomes[address[0]] or AssertionError
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.append(address[0])
            raise


SIX = ("::1", "::2")
FOUR = ("127.0.0.1", "127.0.0.2")


@pytest.fixture
def attempts(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> Attempts:
    """Two addresses of each family, those of IPv6 first; none of them answers unless `outcomes` says so."""
    try:
        socket.socket(socket.AF_INET6).close()
    except OSError:
        pytest.skip("this system has no IPv6 at all")
    return Attempts(monkeypatch, loop, *((host, 9) for host in SIX + FOUR))


@pytest.mark.parametrize(
    ("interleave", "order"),
    [(None, [*SIX, *FOUR]), (1, [SIX[0], FOUR[0], SIX[1], FOUR[1]]), (2, [SIX[0], SIX[1], FOUR[0], FOUR[1]])],
)
async def test_interleave(loop: Loop, attempts: Attempts, interleave: int | None, order: list[str]) -> None:
    attempts.outcomes = {host: ConnectionRefusedError(errno.ECONNREFUSED, host) for host in order}
    with pytest.raises(OSError):
        await loop.create_connection(Echo, "host", 9, interleave=interleave)
    assert attempts.tried == order


async def test_happy_eyeballs(loop: Loop, attempts: Attempts) -> None:
    """The next address is tried while the first is silent, one of the other family, and the rest are given up."""
    attempts.outcomes = {FOUR[0]: ConnectionRefusedError(errno.ECONNREFUSED, FOUR[0])}
    connecting = loop.create_task(loop.create_connection(Echo, "host", 9, happy_eyeballs_delay=0.01))
    await until(lambda: len(attempts.tried) == 4)
    assert attempts.tried == [SIX[0], FOUR[0], SIX[1], FOUR[1]]
    connecting.cancel()
    await asyncio.wait([connecting])
    assert set(attempts.cancelled) == {*SIX, FOUR[1]}
    del connecting
    gc.collect()


@pytest.mark.skipif(sys.version_info < (3, 12), reason="create_connection has all_errors since Python 3.12")
async def test_all_errors(loop: Loop, attempts: Attempts) -> None:
    attempts.outcomes = {host: ConnectionRefusedError(errno.ECONNREFUSED, host) for host in SIX + FOUR}
    new: Any = {"all_errors": True}  # which types for older Pythons do not know
    with pytest.raises(ExceptionGroup) as caught:
        await loop.create_connection(Echo, "host", 9, **new)
    assert [exc.strerror for exc in caught.value.exceptions if isinstance(exc, OSError)] == [*SIX, *FOUR]


# -- batches ---------------------------------------------------------------------------------------


async def test_one_wait_brings_many_completions(loop: Loop) -> None:
    """GetQueuedCompletionStatus gives one completion for each call into the kernel."""
    count = 30
    pairs = [tcp_pair() for _ in range(count)]
    receiving = [loop.create_task(loop.sock_recv(ours, 10)) for ours, _ in pairs]
    await turns()
    before = loop.stats()
    for _, peer in pairs:
        peer.send(b"x")
    assert await asyncio.gather(*receiving) == [b"x"] * count
    after = loop.stats()
    assert after.operations["Receive"] == count
    assert after.completions - before.completions == count
    assert after.batches - before.batches < count / 2
    for ours, peer in pairs:
        ours.close()
        peer.close()


async def test_what_was_received_is_delivered_after_a_pause(loop: Loop, pair: Pair) -> None:
    """gh-77875: what a cancelled receive had got was lost.  A pause cancels nothing."""
    transport, protocol = await loop.create_connection(Recorder, sock=pair[0])
    expected = bytearray()
    for number in range(100):
        pair[1].send(b"%d," % number)
        expected += b"%d," % number
        transport.pause_reading()
        await turns(number % 3)
        transport.resume_reading()
        await turns(number % 2)
    await until(lambda: len(protocol.data) == len(expected))
    assert protocol.data == expected
    assert loop.stats().operations == {ops.ReceiveStream.__name__: 1}
    transport.close()
    await until(lambda: protocol.finished)
