"""Pairs of transports that do to each other whatever transports can do, from within every callback.

Both ends of each connection run on the loop under test.  A side follows a script: what it does in which of its
callbacks, at which place of the stream that it receives, and beside.  Every byte tells where it belongs, so each side
knows whether what it gets is what the other has written; and the calls of a protocol have to come in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .program import Source, pattern
from .stage import Planned, Stage, describe, stream_pair

__all__ = ["Script", "Side", "make_script", "make_transports", "play_pair", "play_transports"]

#: What to do: the name of a method of `Side` and its arguments.
Action = tuple[Any, ...]

#: How protocols take their data.  Of the buffers: a new one each time, one that is kept, one that is resized in
#: ``buffer_updated``, a view, and few bytes at a time.
KINDS = ("plain", "new", "kept", "resized", "view", "tiny")

_SIZES = (0, 1, 5, 100, 1000, 4096, 5000, 16_384, 16_385, 70_000, 300_000, 1_000_000)


@dataclass
class Script:
    """What one side does."""

    kind: str  # of its first protocol
    keeps_open: bool  # what eof_received returns
    gentle: bool  # it ends its own stream, and closes when it has heard the other's end
    hard_end: bool  # else: it aborts at last, or closes
    #: In its callbacks, by name and occurrence.
    calls: dict[str, list[list[Action]]]
    #: As soon as so many bytes have come.
    places: list[tuple[int, list[Action]]]
    #: From outside: after so many seconds.
    steps: list[tuple[float, list[Action]]]


@dataclass
class _Connection:
    way: str
    one: Script
    other: Script


def make_script(source: Source, tls: bool = False) -> Script:
    """Choose what a side does."""
    gentle = source.chance(0.4)
    most = source.pick([100, 5000, 300_000, 1_000_000])
    actions = _Actions(source, gentle, most, tls)
    names = ["connection_made", "eof_received", "connection_lost", "pause_writing", "resume_writing", "get_buffer"]
    calls = {name: source.several(lambda: actions.some(0.5), 0, 2) for name in names}
    places = [(source.below(source.pick([10, 5000, 1_000_000])), actions.some(0.9)) for _ in range(source.below(6))]
    delays = [0, 0, 0.0005, 0.002]
    steps = source.several(lambda: (source.pick(delays), actions.some(0.9)), 1, 8)
    places.sort(key=lambda place: place[0])
    return Script(source.pick(KINDS), gentle or source.chance(0.3), gentle, source.chance(0.2), calls, places, steps)


class _Actions:
    """Makes lists of actions."""

    def __init__(self, source: Source, gentle: bool, most: int, tls: bool) -> None:
        self._source = source
        self._most = most
        rude = 0.0 if gentle else 1.0
        self._choices: list[tuple[float, str]] = [
            (6, "write"), (2, "writelines"), (0.0 if tls else 0.4, "write_eof"), (0.5 * rude, "close"),
            (0.4 * rude, "abort"), (3, "pause"), (1.5, "resume"), (1.5, "switch"), (0.7, "collect"), (1, "soon"),
            (1, "later"), (0.3, "nest"), (1, "limit"), (1, "look"), (0.4 * rude, "fail"),
        ]  # fmt: skip

    def some(self, probability: float) -> list[Action]:
        """None or a few."""
        actions: list[Action] = []
        while self._source.chance(probability) and len(actions) < 5:
            actions.append(self._one())
            probability *= 0.7
        return actions

    def _one(self) -> Action:
        source = self._source
        name = source.weighted(self._choices)
        if name == "write":
            return (name, self._size(), source.pick(["bytes", "bytearray", "view"]))
        if name == "writelines":
            return (name, source.several(self._size, 0, 4))
        if name == "pause":
            return (name, source.pick([0, 0.0005, 0.003, 0.01]))
        if name == "switch":
            return (name, source.pick(KINDS))
        if name == "soon":
            return (name, self.some(0.7))
        if name == "later":
            return (name, source.pick([0, 0.0001, 0.001, 0.01]), self.some(0.7))
        if name == "limit":
            return (name, source.pick([0, 1, 1000, 65_536, 1_000_000]))
        return (name,)

    def _size(self) -> int:
        return min(self._source.pick(_SIZES), self._most)


class Side:
    """One end of a connection: follows its script, and checks what happens to it.

    What is checked is what a user relies on, whatever the other side does; `tls` takes out what TLS does not promise.
    """

    def __init__(self, script: Script, stage: Stage, name: str, tls: bool = False) -> None:
        self.script = script
        self.stage = stage
        self.name = name
        self.tls = tls
        self.peer: Side = self
        self.transport: Any = None
        self.protocol: Any = None
        self.times: dict[str, int] = {}
        self.places = list(script.places)
        self.got = self.sent = 0
        self.owed = 0  # what was written before the end was asked for: that has to arrive
        self.paused = self.writing_paused = self.in_get_buffer = False
        self.lent = False  # get_buffer has paused, closed or switched: its own buffer may be filled all the same
        self.ended = False  # write_eof
        self.closed = ""  # "close" or "abort", if it was asked for
        self.failed = False  # it raised, which ends it at any place
        self.heard_all = False  # the peer's end had come before it closed
        self.exception: BaseException | None = None
        self.buffer: Any = None  # what get_buffer has lent: of the side, whichever protocol is told what is in it

    # -- what it does ------------------------------------------------------------------------------

    def factory(self) -> Any:
        """Its first protocol."""
        return self.take_protocol(self.script.kind)

    def take_protocol(self, kind: str) -> Any:
        """From now on it has a protocol of this kind."""
        if kind in self.stage.without:
            kind = "plain"
        self.protocol = _PROTOCOLS[kind](self)
        return self.protocol

    @property
    def lost(self) -> bool:
        """connection_lost has been called."""
        return "connection_lost" in self.times

    @property
    def made(self) -> bool:
        """connection_made has been called."""
        return "connection_made" in self.times

    def perform(self, actions: list[Action]) -> None:
        """Do these things."""
        if self.transport is not None:
            for name, *arguments in actions:
                if name not in self.stage.without:
                    getattr(self, name)(*arguments)

    def perform_late(self, actions: list[Action]) -> None:
        """As `perform`, where an exception would end nothing."""
        self.perform([action for action in actions if action[0] != "fail"])

    def _put(self, size: int, put: Callable[[int], object]) -> None:
        """Write `size` bytes by `put(position)`, unless that is too much."""
        if self.sent + size > 4_000_000:
            return
        ended = self.ended
        begin = self.sent
        if not ended:  # before the call: it may call pause_writing, which may write more
            self.sent += size
            if not self.transport.is_closing():
                self.owed = self.sent
        try:
            put(begin)
        except RuntimeError:
            self.stage.check(ended, f"{self.name}: write() raised RuntimeError without write_eof()")
        else:
            self.stage.check(not ended, f"{self.name}: write() after write_eof() did not raise")

    def write(self, size: int, form: str) -> None:
        """Write bytes of one form or another; a bytearray is changed afterwards."""

        def put(begin: int) -> None:
            data: Any = {"bytes": bytes, "bytearray": bytearray, "view": memoryview}[form](pattern(begin, size))
            self.transport.write(data)
            if form == "bytearray":
                data[:] = bytes(size)

        self._put(size, put)

    def writelines(self, sizes: list[int]) -> None:
        """Write several pieces at once."""

        def put(begin: int) -> None:
            places = [begin + sum(sizes[:at]) for at in range(len(sizes))]
            self.transport.writelines(list(map(pattern, places, sizes)))

        self._put(sum(sizes), put)

    def write_eof(self) -> None:
        """End the stream."""
        if not self.ended and not self.transport.is_closing() and self.transport.can_write_eof():
            self.ended = True
            with contextlib.suppress(OSError):  # as asyncio's own after a reset
                self.transport.write_eof()

    def close(self) -> None:
        """Close, after what was written; perhaps again."""
        if self.closed and "again" in self.stage.without:
            return
        self.will_close()
        self.transport.close()

    def will_close(self) -> None:
        """The transport is to be closed in order."""
        if not self.closed and not self.transport.is_closing():
            self.heard_all = "eof_received" in self.times
            self.closed = "close"
            self.lent = self.in_get_buffer

    def abort(self) -> None:
        """Close at once."""
        if not self.lost:
            self.closed = "abort"
            self.lent = self.in_get_buffer
        self.transport.abort()

    def pause(self, seconds: float) -> None:
        """Pause reading for a while."""
        if not self.paused and not self.transport.is_closing():
            self.transport.pause_reading()
            self.paused = True
            self.lent = self.in_get_buffer
            self.stage.loop.call_later(seconds, self.resume)

    def resume(self) -> None:
        """Go on reading."""
        if self.paused and self.transport is not None:
            self.paused = False
            self.transport.resume_reading()

    def switch(self, kind: str) -> None:
        """Take another protocol."""
        if not self.lost and (not self.in_get_buffer or self.stage.ours):  # asyncio's own takes no care of this
            self.lent = self.in_get_buffer
            self.transport.set_protocol(self.take_protocol(kind))

    def collect(self) -> None:
        """Collect garbage in the middle of it all."""
        gc.collect(0)

    def soon(self, actions: list[Action]) -> None:
        """Do things in the next turn."""
        self.stage.loop.call_soon(self.perform_late, actions)

    def later(self, seconds: float, actions: list[Action]) -> None:
        """Do things after a while."""
        self.stage.loop.call_later(seconds, self.perform_late, actions)

    def nest(self) -> None:
        """Try to run the loop that runs."""
        try:
            self.stage.loop.run_forever()
        except RuntimeError:
            return
        self.stage.fail("run_forever() in a callback did not raise")

    def limit(self, high: int) -> None:
        """Change the limits of flow control."""
        self.transport.set_write_buffer_limits(high)

    def look(self) -> None:
        """Ask everything that can be asked."""
        transport = self.transport
        repr(transport)
        for name in ("sockname", "peername", "socket", "cipher"):
            transport.get_extra_info(name)
        self.stage.check(transport.get_write_buffer_size() >= 0, "a write buffer of less than nothing")
        if not self.tls:
            self.stage.check(not (transport.is_reading() and transport.is_closing()), "reading while it closes")

    def fail(self) -> None:
        """Raise."""
        self.failed = True
        raise Planned

    # -- what happens to it ------------------------------------------------------------------------

    def wrong(self, what: str) -> None:
        """Something is wrong with this side."""
        self.stage.fail(f"{self.name}: {what}")

    def called(self, name: str, protocol: Any) -> None:
        """A callback has come: look at the order, and do what the script says."""
        time = self.times[name] = self.times.get(name, 0) + 1
        if not self.made or (name != "connection_lost" and self.lost):
            self.wrong(f"{name} came in state {self.times}")
        if time > 1 and name in ("connection_made", "eof_received", "connection_lost"):
            self.wrong(f"{name} came twice")
        if protocol is not self.protocol and not (self.in_get_buffer or self.lent):
            self.wrong(f"{name} came to a protocol that has been replaced")
        lists = self.script.calls.get(name, [])
        if time <= len(lists) and name not in self.stage.without:
            (self.perform_late if name == "connection_lost" else self.perform)(lists[time - 1])

    def received(self, data: bytes, protocol: Any) -> None:
        """Data have come."""
        begin, self.got = self.got, self.got + len(data)
        lent, self.lent = self.lent, False
        if not self.made or self.lost or "eof_received" in self.times:
            self.wrong(f"data in state {self.times}")
        if data != pattern(begin, len(data)) or not data:
            self.wrong(f"wrong bytes at {begin} ({len(data)})")
            self.abort()
            return
        if self.got > self.peer.sent:
            self.wrong(f"{self.got} bytes of {self.peer.sent}")
        if not (self.tls or lent):
            if self.paused or self.closed:
                self.wrong(f"data while {'paused' if self.paused else 'closing'}")
            if protocol is not self.protocol:
                self.wrong("data for a protocol that has been replaced")
        while self.places and self.places[0][0] <= self.got:
            self.perform(self.places.pop(0)[1])

    def eof(self) -> None:
        """The peer's end has come; so must everything have that it had written before."""
        peer = self.peer
        orderly = not peer.failed and peer.closed != "abort" and not self.stage.hard
        if orderly and not self.tls and not peer.owed <= self.got <= peer.sent:
            self.wrong(f"the end came after {self.got} bytes of {peer.owed}")
        if orderly and not (peer.ended or peer.closed):
            self.wrong("the end came and nobody had asked for it")

    def ends(self, exc: BaseException | None) -> None:
        """connection_lost has come."""
        self.exception = exc
        if exc is not None and not isinstance(exc, (OSError, Planned)):
            self.wrong(f"lost by {exc!r}")

    def finish(self) -> None:
        """The end of the script: close, the gentle ones in order."""
        if self.transport is None or self.lost:
            return
        self.resume()
        if not self.script.gentle or self.tls:
            (self.abort if self.script.hard_end else self.close)()
        else:
            self.write_eof()
            if "eof_received" in self.times:
                self.close()


class _Protocol(asyncio.BaseProtocol):
    def __init__(self, side: Side) -> None:
        self.side = side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.side.transport = transport
        self.side.called("connection_made", self)

    def connection_lost(self, exc: BaseException | None) -> None:
        self.side.ends(exc)
        self.side.called("connection_lost", self)

    def eof_received(self) -> bool:
        side = self.side
        side.eof()
        side.called("eof_received", self)
        if side.script.keeps_open and not side.tls:
            return True
        side.will_close()
        return False

    def pause_writing(self) -> None:
        self.side.stage.check(not self.side.writing_paused, f"{self.side.name}: pause_writing twice")
        self.side.writing_paused = True
        self.side.called("pause_writing", self)

    def resume_writing(self) -> None:
        self.side.stage.check(self.side.writing_paused, f"{self.side.name}: resume_writing without pause_writing")
        self.side.writing_paused = False
        self.side.called("resume_writing", self)


class _Plain(_Protocol, asyncio.Protocol):
    def data_received(self, data: bytes) -> None:
        self.side.received(bytes(data), self)


class _Buffered(_Protocol, asyncio.BufferedProtocol):
    def lend(self) -> Any:
        """The buffer."""
        return bytearray(65_536)

    def get_buffer(self, sizehint: int) -> Any:
        side = self.side
        side.in_get_buffer = True
        try:
            side.called("get_buffer", self)
        finally:
            side.in_get_buffer = False
        side.buffer = self.lend()
        return side.buffer

    def buffer_updated(self, nbytes: int) -> None:
        buffer = self.side.buffer
        if not 0 < nbytes <= len(buffer):
            self.side.wrong(f"buffer_updated({nbytes}) of a buffer of {len(buffer)}")
        data = bytes(memoryview(buffer)[:nbytes])
        self.done_with(buffer)
        self.side.received(data, self)

    def done_with(self, buffer: Any) -> None:
        """It has been read out."""


class _Kept(_Buffered):
    def __init__(self, side: Side) -> None:
        super().__init__(side)
        self.kept = bytearray(5000)

    def lend(self) -> Any:
        return self.kept


class _Resized(_Buffered):
    def done_with(self, buffer: Any) -> None:
        buffer.clear()


class _View(_Buffered):
    def lend(self) -> Any:
        return memoryview(bytearray(100_000))[1:]


class _Tiny(_Buffered):
    def lend(self) -> Any:
        return bytearray(3 if self.side.got < 300 else 3000)


_PROTOCOLS: dict[str, type[_Protocol]] = dict(
    zip(KINDS, (_Plain, _Buffered, _Kept, _Resized, _View, _Tiny), strict=True)
)


# -- connections -----------------------------------------------------------------------------------


def make_transports(source: Source) -> list[_Connection]:
    """Choose some connections."""
    ways = ["unix pair", "tcp pair", "tcp", "unix"]
    count = source.pick([1, 1, 2, 4, 10])
    return [_Connection(source.pick(ways), make_script(source), make_script(source)) for _ in range(count)]


async def play_transports(program: list[_Connection], stage: Stage) -> None:
    """Play them all at once."""
    await stage.together(*(_play(each, stage, str(number)) for number, each in enumerate(program)))


async def _play(connection: _Connection, stage: Stage, number: str) -> None:
    one = Side(connection.one, stage, f"client {number}")
    other = Side(connection.other, stage, f"server {number}")
    await play_pair(one, other, connection.way, stage)


async def play_pair(
    one: Side, other: Side, way: str, stage: Stage, client: dict[str, Any] | None = None, server: Any = None
) -> None:
    """Connect two sides, and see them through; `client`, `server`: more arguments, those of TLS."""
    one.peer, other.peer = other, one
    try:
        await stage.within(_connect(one, other, way, stage.loop, client or {}, server or {}), "a connection")
    except (Planned, OSError):
        pass  # one of them raised, or closed before it was connected
    await asyncio.gather(_go_on(one), _go_on(other))
    await _finish(one, other, stage)
    _look_back(one)
    _look_back(other)
    if one.script.gentle and other.script.gentle and not one.tls and not stage.hard:
        for side in (one, other):
            stage.note(side.name, f"heard the end: {'eof_received' in side.times}, lost by {describe(side.exception)}")
    for side in (one, other):
        side.transport = side.protocol = None


async def _connect(one: Side, other: Side, way: str, loop: Any, client: dict[str, Any], server: dict[str, Any]) -> None:
    if way.endswith("pair"):
        ours, theirs = stream_pair(way.startswith("unix"))
        connecting = loop.create_connection(one.factory, sock=ours, **client)
        accepting = loop.connect_accepted_socket(other.factory, theirs, **server)
        results = await asyncio.gather(connecting, accepting, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return
    if way == "unix":
        name = f"\0fuzz-{id(one):x}-{id(loop):x}"
        listener = await loop.create_unix_server(other.factory, name, **server)
        connecting = loop.create_unix_connection(one.factory, name, **client)
    else:
        listener = await loop.create_server(other.factory, "127.0.0.1", 0, **server)
        if not listener.sockets:
            raise OSError("a server without a socket: no descriptors were left")  # asyncio's own way to say so
        connecting = loop.create_connection(one.factory, *listener.sockets[0].getsockname(), **client)
    try:
        await connecting
    finally:
        for _ in range(200):
            if other.made:
                break
            await asyncio.sleep(0.001)
        listener.close()


async def _go_on(side: Side) -> None:
    for seconds, actions in side.script.steps:
        await asyncio.sleep(seconds)
        side.perform_late(actions)


async def _finish(one: Side, other: Side, stage: Stage) -> None:
    """Both come to their end."""
    there = [side for side in (one, other) if side.made]

    patience = time.monotonic() + 0.3

    def over() -> bool:
        for side in there:
            side.finish()
        if time.monotonic() > patience and all(side.lost or side.closed == "close" for side in there):
            for side in there:
                side.abort()  # neither reads any more, so neither may get rid of what it has to send
        return all(side.lost for side in there)

    if not await stage.until(over, f"connection_lost of {one.name} or {other.name}: {[side.times for side in there]}"):
        for side in there:
            side.transport.abort()
        await asyncio.sleep(0.01)


def _look_back(side: Side) -> None:
    """What has to have arrived has."""
    peer = side.peer
    if not (side.made and peer.made) or side.stage.hard or side.tls:
        return
    orderly = not (side.failed or peer.failed) and "abort" not in (side.closed, peer.closed)
    heard_out = side.heard_all or side.closed == ""
    if orderly and heard_out and peer.heard_all and not peer.owed <= side.got <= peer.sent:
        side.wrong(f"got {side.got} bytes of {peer.owed}")
    if orderly and side.script.gentle and peer.script.gentle and side.exception is not None:
        side.wrong(f"lost by {side.exception!r} without a reason")
