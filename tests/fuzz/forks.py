"""Forks in the middle of everything: the child lets go of, or goes on with, what it has inherited; the parent must not
notice, and its own work goes on."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from .program import Source, pattern
from .stage import LIMIT, Stage, leave, stream_pair

__all__ = ["make_forks", "play_forks"]


@dataclass
class _Fork:
    when: str  # in a "callback", in a "task", or "between" two runs of the loop
    child: list[str]  # what it does, one after the other: keys of `_DEEDS`
    seconds: float  # the parent waits so long before


@dataclass
class _Program:
    connections: int
    pieces: list[int]  # sizes of what goes through each of them
    server: bool
    reader: bool
    datagrams: bool
    process: bool
    forks: list[_Fork]


def make_forks(source: Source) -> _Program:
    """Choose a program."""

    def fork() -> _Fork:
        when = source.pick(["callback", "task", "between", "between"])
        choices = sorted(_DEEDS if when == "between" else _DEEDS.keys() - {"close the loop", "run the loop"})
        return _Fork(when, source.several(lambda: source.pick(choices), 0, 4), source.pick([0, 0.001, 0.003]))

    return _Program(
        connections=source.between(1, 3),
        pieces=source.several(lambda: source.pick([1, 5000, 300_000]), 1, 10),
        server=source.chance(0.5),
        reader=source.chance(0.5),
        datagrams=source.chance(0.3),
        process=source.chance(0.3),
        forks=source.several(fork, 1, 3),
    )


class _Inherited:
    """What there is at the time of a fork."""

    def __init__(self, loop: Any) -> None:
        self.loop = loop
        self.transports: list[Any] = []
        self.servers: list[Any] = []
        self.datagrams: list[Any] = []
        self.watched: list[socket.socket] = []


class _Count(asyncio.Protocol):
    """Counts and checks what comes."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.got = 0
        self.lost = False

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        begin, self.got = self.got, self.got + len(data)
        self.stage.check(data == pattern(begin, len(data)), f"the parent got wrong bytes at {begin}")

    def connection_lost(self, exc: BaseException | None) -> None:
        self.lost = True


async def play_forks(program: _Program, stage: Stage) -> None:
    """Play a program."""
    loop = stage.loop
    inherited = _Inherited(loop)
    readable = 0

    def read() -> None:
        nonlocal readable
        readable += len(inherited.watched[0].recv(100))

    pairs = []
    for _ in range(program.connections):
        ours, theirs = stream_pair(unix=False)
        sender, _ = await loop.create_connection(asyncio.Protocol, sock=ours)
        receiver, count = await loop.create_connection(lambda: _Count(stage), sock=theirs)
        pairs.append((sender, count))
        inherited.transports += [sender, receiver]
    if program.server:
        inherited.servers.append(await loop.create_server(asyncio.Protocol, "127.0.0.1", 0))
    if program.datagrams:
        endpoint, _ = await loop.create_datagram_endpoint(asyncio.DatagramProtocol, local_addr=("127.0.0.1", 0))
        inherited.datagrams.append(endpoint)
    if program.reader:
        inherited.watched += stream_pair(unix=True)
        loop.add_reader(inherited.watched[0], read)
    child = await asyncio.create_subprocess_shell("sleep 0.01; exit 5") if program.process else None

    await stage.together(
        *(_send(sender, program.pieces) for sender, _ in pairs),
        *(_fork(fork, inherited, stage) for fork in program.forks),
    )
    total = sum(program.pieces)
    await stage.until(lambda: all(count.got == total for _, count in pairs), "the parent's bytes after a fork")
    if program.reader:
        inherited.watched[1].send(b"x")
        await stage.until(lambda: readable == 1, "the parent's reader after a fork")
        loop.remove_reader(inherited.watched[0])
    if program.server:
        address = inherited.servers[0].sockets[0].getsockname()
        transport, _ = await loop.create_connection(asyncio.Protocol, *address)
        inherited.transports.append(transport)
        await asyncio.sleep(0.001)
        inherited.servers[0].close()
        if sys.version_info >= (3, 13):
            inherited.servers[0].abort_clients()
    if child is not None:
        stage.check(await stage.within(child.wait(), "the parent's child after a fork") == 5, "a child's exit status")
    stage.check(not any(count.lost for _, count in pairs), "the parent lost a connection by a fork")
    for transport in (*inherited.transports, *inherited.datagrams):
        transport.close()
    for sock in inherited.watched:
        sock.close()
    await stage.until(lambda: all(count.lost for _, count in pairs), "connection_lost after a fork")


async def _send(sender: Any, pieces: list[int]) -> None:
    begin = 0
    for size in pieces:
        sender.write(pattern(begin, size))
        begin += size
        await asyncio.sleep(0.0005)


async def _fork(fork: _Fork, inherited: _Inherited, stage: Stage) -> None:
    parent = os.getpid()
    await asyncio.sleep(fork.seconds)
    if os.getpid() != parent:
        return  # this is an inherited task in another fork's child, whose loop is not to be stopped
    forked: asyncio.Future[tuple[int, int]] = stage.loop.create_future()
    if fork.when == "callback":
        stage.loop.call_soon(lambda: forked.set_result(_fork_now(fork, inherited)))
    elif fork.when == "between":
        stage.between.append(lambda: forked.set_result(_fork_now(fork, inherited)))
        stage.loop.stop()
    else:
        forked.set_result(_fork_now(fork, inherited))
    child, words = await forked
    statuses: list[int] = []
    if not await stage.until(lambda: _has_ended(child, statuses), f"the end of a forked child that does {fork.child}"):
        os.kill(child, signal.SIGKILL)
        await stage.until(lambda: _has_ended(child, statuses), "the end of a killed child")
    status = os.waitstatus_to_exitcode(statuses[0])
    with open(words, "rb") as file:
        said = file.read().decode(errors="replace")
    stage.check(status == 0, f"a forked child that does {fork.child} ended with {status}\n{said}".rstrip())


def _has_ended(child: int, statuses: list[int]) -> bool:
    pid, status = os.waitpid(child, os.WNOHANG)
    if pid:
        statuses.append(status)
    return pid != 0


def _fork_now(fork: _Fork, inherited: _Inherited) -> tuple[int, int]:
    """The child's number, and where it says what went wrong."""
    words, mouth = os.pipe()
    child = os.fork()
    if child == 0:
        _be_child(fork, inherited, mouth)
    os.close(mouth)
    return child, words


def _be_child(fork: _Fork, inherited: _Inherited, mouth: int) -> NoReturn:
    status = 0
    warnings.simplefilter("ignore")
    leave(inherited.loop)
    for name in fork.child:
        try:
            _DEEDS[name](inherited)
        except BaseException as exc:
            if isinstance(exc, RuntimeError) and "fork" in str(exc):
                continue  # one clear error that says why not is as good
            if isinstance(exc, RuntimeError) and inherited.loop.is_closed():
                continue  # as asyncio's own transports say when their loop is closed
            os.write(mouth, f"{name}: {traceback.format_exc()[-3000:]}".encode())
            status = 1
            break
    os._exit(status)


# -- what a child does -----------------------------------------------------------------------------


def _close_transports(inherited: _Inherited) -> None:
    for transport in inherited.transports:
        transport.close()


def _abort_transports(inherited: _Inherited) -> None:
    for transport in inherited.transports:
        transport.abort()


def _use_transports(inherited: _Inherited) -> None:
    """Whatever does not reach the parent's peer."""
    for transport in inherited.transports:
        repr(transport)
        transport.get_extra_info("peername")
        transport.pause_reading()
        transport.resume_reading()


def _close_servers(inherited: _Inherited) -> None:
    for server in inherited.servers:
        server.close()


def _close_datagrams(inherited: _Inherited) -> None:
    for endpoint in inherited.datagrams:
        endpoint.close()


def _remove_readers(inherited: _Inherited) -> None:
    for sock in inherited.watched:
        inherited.loop.remove_reader(sock)


def _close_loop(inherited: _Inherited) -> None:
    inherited.loop.close()


def _new_loop(inherited: _Inherited) -> None:
    new = type(inherited.loop)()
    try:
        new.run_until_complete(_talk(new))
    finally:
        new.close()


async def _talk(loop: Any) -> None:
    """A little of everything on a loop."""
    one, other = stream_pair(unix=False)
    with one, other:
        await loop.sock_sendall(one, b"over sockets")
        assert await loop.sock_recv(other, 100) == b"over sockets"
    server = await asyncio.start_server(_answer, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    writer.write(b"over streams\n")
    assert await asyncio.wait_for(reader.readline(), LIMIT / 2) == b"over streams\n"
    writer.close()
    await writer.wait_closed()
    server.close()
    await asyncio.sleep(0.001)


async def _answer(reader: Any, writer: Any) -> None:
    writer.write(await reader.readline())
    await writer.drain()
    writer.close()


def _run_inherited(inherited: _Inherited) -> None:
    """The inherited loop works in the child, which first gives up what would take from the parent."""
    _abort_transports(inherited)
    _close_servers(inherited)
    _close_datagrams(inherited)
    _remove_readers(inherited)
    inherited.loop.run_until_complete(_talk(inherited.loop))


_DEEDS: dict[str, Callable[[_Inherited], None]] = {
    "close transports": _close_transports,
    "abort transports": _abort_transports,
    "use transports": _use_transports,
    "close servers": _close_servers,
    "close datagrams": _close_datagrams,
    "remove readers": _remove_readers,
    "close the loop": _close_loop,
    "make a loop": _new_loop,
    "run the loop": _run_inherited,
}
