"""Every callback of a protocol times every method of its transport, step by step beside a peer that is a plain socket.

One thing happens at a time: the peer does something, or the program calls a method, and then everything settles.  So
what the protocols see, and what each call of theirs returns or raises, has to be the same on every loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from dataclasses import dataclass
from typing import Any

from .program import Source, digest, pattern
from .stage import Planned, Stage, describe, stream_pair

__all__ = ["make_callbacks", "play_callbacks"]

#: What to do: the name of a method of `_Actor` and its arguments.
Action = tuple[Any, ...]

_CALLS = ("connection_made", "eof_received", "connection_lost", "pause_writing", "resume_writing")

#: Bytes: more than the kernel keeps for a connection.
_FLOOD = 8 << 20


@dataclass
class _Program:
    unix: bool  # a UNIX socket, else TCP
    kind: str  # of the first protocol
    keeps_open: bool  # what eof_received returns
    #: What a protocol does in its callbacks, by name and occurrence.
    calls: dict[str, list[list[Action]]]
    #: What it does as soon as so many bytes have come.
    places: list[tuple[int, list[Action]]]
    #: What happens from outside.
    steps: list[Action]


def make_callbacks(source: Source) -> _Program:
    """Choose a program."""
    # A buffer that holds a part of a message makes several callbacks out of one, and how many of them come in one turn
    # is the loop's own business: no call_soon beside those.
    kinds = source.pick([["plain", "buffered"], ["plain", "buffered", "tiny"]])
    actions = _Actions(source, kinds)
    calls = {name: source.several(lambda: actions.some(0.6), 0, 2) for name in _CALLS}
    # A connection_made that raises closes the connection here, and not in asyncio: see docs/differences.md.
    calls["connection_made"] = [[one for one in some if one[0] != "fail"] for some in calls["connection_made"]]
    steps = source.several(lambda: _step(source, actions), 3, 9)
    sent = 0
    places = []
    for step in steps:
        if step[0] == "send":
            if source.chance(0.7):
                places.append((sent + source.between(1, step[1]), actions.some(0.9)))
            sent += step[1]
    return _Program(source.chance(0.6), source.pick(kinds), source.chance(0.4), calls, places, steps)


def _step(source: Source, actions: _Actions) -> Action:
    return source.weighted(
        [
            (5, ("send", source.pick([1, 5, 100, 3000]))),
            (5, ("act", actions.some(1.0))),
            (2, ("take",)),
            (1, ("end",)),
            (0.3, ("vanish",)),
            (0.3, ("reset",)),
        ]
    )


class _Actions:
    """Makes lists of actions."""

    def __init__(self, source: Source, kinds: list[str]) -> None:
        self._source = source
        self._kinds = kinds

    def some(self, probability: float) -> list[Action]:
        """None or a few, fewer with a lower probability."""
        actions: list[Action] = []
        while self._source.chance(probability) and len(actions) < 4:
            actions.append(self.one())
            probability *= 0.6
        return actions

    def one(self) -> Action:
        """One action."""
        source = self._source
        action = source.weighted(
            [
                (5, ("write", source.pick([0, 1, 10, 1000, _FLOOD]), source.pick(["bytes", "bytearray", "view"]))),
                (1, ("writelines", source.several(lambda: source.pick([0, 1, 100, 20_000]), 0, 4))),
                (0.4, ("write_wrong", source.pick(["text", "number", "list"]))),
                (1.5, ("write_eof",)),
                (1.5, ("close",)),
                (1, ("abort",)),
                (3, ("pause_reading",)),
                (3, ("resume_reading",)),
                (2, ("set_protocol", source.pick(self._kinds))),
                (1, ("set_limits", source.pick([None, 0, 1, 1000, 10_000_000]), source.pick([None, None, 0, 5, 2000]))),
                (2, ("look",)),
                (1, ("look_closer",)),
                (0.7, ("fail",)),
                (2, ("soon",)),
            ]
        )
        if action == ("soon",):
            if "tiny" in self._kinds:
                return ("look",)
            return ("soon", self.some(0.9))
        return action


class _Actor:
    """Does what the program says, for all protocols that its transport has one after the other."""

    def __init__(self, program: _Program, stage: Stage) -> None:
        self.program = program
        self.stage = stage
        self.transport: Any = None
        self.protocols: list[_Protocol] = []
        self.times: dict[str, int] = {}
        self.got = 0
        self.written = 0
        self.places = list(program.places)
        self.lost = False
        self.flooded = self.aborted = False

    def protocol(self, kind: str) -> _Protocol:
        """A new protocol."""
        made: _Protocol = {"plain": _Plain, "buffered": _Buffered, "tiny": _Tiny}[kind](self, len(self.protocols))
        self.protocols.append(made)
        return made

    def called(self, protocol: _Protocol, name: str, argument: str = "") -> None:
        """A callback other than those with data."""
        time = self.times[name] = self.times.get(name, 0) + 1
        self.stage.check(not self.lost, f"{name} after connection_lost")
        if name in ("connection_made", "eof_received", "connection_lost"):
            self.stage.check(time == 1, f"{name} twice")  # asyncio's own: eof_received again after a pause
        self.lost = name == "connection_lost"
        self.stage.note("protocol", f"p{protocol.number}.{name}({argument})")
        lists = self.program.calls.get(name, [])
        if time <= len(lists) and name not in self.stage.without:
            self.perform(name, lists[time - 1])

    def received(self, protocol: _Protocol, data: bytes) -> None:
        """A callback with data, which may bring them in other pieces on every loop."""
        begin, self.got = self.got, self.got + len(data)
        self.stage.check(not self.lost and "eof_received" not in self.times, "data after the end")
        self.stage.check(data == pattern(begin, len(data)), f"wrong bytes at {begin} ({len(data)})")
        notes = self.stage.trace.setdefault("protocol", [])
        mine = f"p{protocol.number}.data "
        if notes and notes[-1].startswith(mine):
            notes.pop()
        self.stage.note("protocol", f"{mine}up to {self.got}")
        while self.places and self.places[0][0] <= self.got:
            place, actions = self.places.pop(0)
            self.perform(f"at byte {place}", actions)

    def perform(self, where: str, actions: list[Action]) -> None:
        """Call the methods, and note what they return or raise."""
        for name, *arguments in actions:
            if name in self.stage.without:
                continue
            result: Any
            try:
                result = getattr(self, name)(*arguments)
            except Planned:
                self.stage.note("protocol", f"{where}: fails")
                raise
            except Exception as exc:
                result = describe(exc)
            if name != "soon":
                self.stage.note("protocol", f"{where}: {name}{tuple(arguments)} -> {result}")

    # -- the actions -------------------------------------------------------------------------------

    def _piece(self, size: int) -> bytes:
        data = pattern(self.written, size)
        self.flooded = self.flooded or size == _FLOOD
        return data

    def write(self, size: int, form: str) -> None:
        data = self._piece(size)
        form_of = {"bytes": bytes, "bytearray": bytearray, "view": memoryview}[form]
        lent: Any = form_of(data)
        before = self.written
        self.written += size  # now: write() may call pause_writing, which may write more
        try:
            self.transport.write(lent)
        except RuntimeError:
            self.written = before  # it was refused
            raise
        if form == "bytearray":
            lent[:] = bytes(size)  # ours again: what was written must not change

    def writelines(self, sizes: list[int]) -> None:
        before = self.written
        pieces = [pattern(before + sum(sizes[:at]), size) for at, size in enumerate(sizes)]
        self.written += sum(sizes)
        try:
            self.transport.writelines(pieces)
        except RuntimeError:
            self.written = before
            raise

    def write_wrong(self, what: str) -> None:
        self.transport.write({"text": "text", "number": 7, "list": [1]}[what])

    def write_eof(self) -> None:
        # asyncio's own raises here when the peer has reset the connection: see docs/differences.md.
        with contextlib.suppress(OSError):
            self.transport.write_eof()

    def close(self) -> None:
        self.transport.close()

    def abort(self) -> None:
        self.aborted = True
        self.transport.abort()

    def pause_reading(self) -> None:
        self.transport.pause_reading()

    def resume_reading(self) -> None:
        self.transport.resume_reading()

    def set_protocol(self, kind: str) -> None:
        self.transport.set_protocol(self.protocol(kind))

    def set_limits(self, high: int | None, low: int | None) -> str:
        self.transport.set_write_buffer_limits(high, low)
        return str(self.transport.get_write_buffer_limits())

    def look(self) -> str:
        transport = self.transport
        seen = f"closing={transport.is_closing()} reading={transport.is_reading()}"
        # Amid a flood it depends on how much the kernel has taken at a time.
        return seen if self.flooded else f"{seen} unsent={self.unsent()}"

    def unsent(self) -> bool:
        """Whether something waits to be sent."""
        return bool(self.transport.get_write_buffer_size() > 0)

    def look_closer(self) -> str:
        transport = self.transport
        repr(transport)
        protocol = transport.get_protocol()
        named = [name for name in ("socket", "sockname", "peername", "nothing") if transport.get_extra_info(name)]
        return f"{protocol and protocol.number} {transport.can_write_eof()} {named}"

    def fail(self) -> None:
        raise Planned

    def soon(self, actions: list[Action]) -> None:
        self.stage.loop.call_soon(self.perform, "soon", actions)


class _Protocol(asyncio.BaseProtocol):
    def __init__(self, actor: _Actor, number: int) -> None:
        self.actor = actor
        self.number = number

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.actor.transport = transport
        self.actor.called(self, "connection_made")

    def connection_lost(self, exc: BaseException | None) -> None:
        self.actor.called(self, "connection_lost", describe(exc))

    def eof_received(self) -> bool:
        self.actor.called(self, "eof_received")
        return self.actor.program.keeps_open

    def pause_writing(self) -> None:
        self.actor.called(self, "pause_writing")

    def resume_writing(self) -> None:
        self.actor.called(self, "resume_writing")


class _Plain(_Protocol, asyncio.Protocol):
    def data_received(self, data: bytes) -> None:
        self.actor.received(self, data)


class _Buffered(_Protocol, asyncio.BufferedProtocol):
    size = 70_000

    def get_buffer(self, sizehint: int) -> bytearray:
        self.buffer = bytearray(self.size)
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.actor.received(self, bytes(self.buffer[:nbytes]))


class _Tiny(_Buffered):
    size = 3


class _Peer:
    """The other end: a plain socket."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sent = 0
        self.got = bytearray()
        self.writes = self.open = True
        self.ended = False

    def send(self, size: int) -> None:
        if self.writes and self.open:
            with contextlib.suppress(ConnectionError, BlockingIOError):
                self.sent += self.sock.send(pattern(self.sent, size))

    def take(self) -> bool:
        """Receive what there is; whether there was anything."""
        if not self.open or self.ended:
            return False
        try:
            data = self.sock.recv(1 << 20)
        except BlockingIOError:
            return False
        except ConnectionError:
            data = b""
        self.got += data
        self.ended = not data
        return True

    def end(self) -> None:
        if self.writes and self.open:
            self.writes = False
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_WR)

    def vanish(self) -> None:
        self.open = False
        self.sock.close()

    def reset(self) -> None:
        if self.open:
            with contextlib.suppress(OSError):
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.vanish()


async def play_callbacks(program: _Program, stage: Stage) -> None:
    """Play a program."""
    ours, theirs = stream_pair(program.unix)
    peer = _Peer(theirs)
    actor = _Actor(program, stage)
    try:
        await stage.loop.create_connection(lambda: actor.protocol(program.kind), sock=ours)
    except Planned:
        pass
    await stage.quiet()
    for name, *arguments in program.steps:
        if name == "act":
            try:
                actor.perform("outside", *arguments)
            except Planned:
                pass
        elif name == "take":
            await _take_all(peer, stage)
        elif name == "send" and not actor.transport.is_reading() and actor.got < peer.sent:
            continue  # whether two messages that wait come together or apart is the loop's own business
        else:
            getattr(peer, name)(*arguments)
        await stage.quiet()
        stage.note("protocol", f"after {name}: {actor.look()} unsent={actor.unsent()}")
    await _end(actor, peer, stage)


async def _take_all(peer: _Peer, stage: Stage) -> None:
    while True:
        taken = 0
        while peer.take():
            taken += 1
            await asyncio.sleep(0)
        await stage.quiet()
        if not taken:
            return


async def _end(actor: _Actor, peer: _Peer, stage: Stage) -> None:
    """Let everything come to its end, and look at what has arrived."""
    actor.places.clear()
    transport = actor.transport
    if not transport.is_closing():
        actor.perform("end", [("resume_reading",)])
        await stage.quiet()
    await _take_all(peer, stage)
    actor.perform("end", [("close",)])
    await _take_all(peer, stage)
    if not actor.lost:
        await stage.until(lambda: actor.lost or peer.take(), "connection_lost after close()")
        await _take_all(peer, stage)
    stage.check(actor.lost, "connection_lost has not come")
    stage.check(pattern(0, actor.written).startswith(peer.got), "the peer got wrong bytes")
    if not (actor.aborted and actor.flooded):  # else it depends on how fast the kernel was
        stage.note("peer", f"{digest(peer.got)} {'open' if peer.open else 'gone'} {'ended' if peer.ended else ''}")
    peer.sock.close()
