"""Datagram endpoints that send to each other, to nobody and to the closed, from within every callback; and the loop's
methods on plain datagram sockets."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import zlib
from dataclasses import dataclass
from typing import Any

from .program import Source, pattern
from .stage import Planned, Stage, describe

__all__ = ["make_datagrams", "play_datagrams"]

#: What to do: the name of a method of `_End` and its arguments.
Action = tuple[Any, ...]

_HEADER = 14  # checksum, sender, number


@dataclass
class _Endpoint:
    connected: bool
    #: What it does with each call, one after the other.
    calls: list[list[Action]]
    #: What it does from outside, in each round.
    rounds: list[list[Action]]


@dataclass
class _Program:
    family: str  # "inet", "inet6", "unix"
    buffers: int | None
    endpoints: list[_Endpoint]
    #: Plain sockets beside them: the sizes of what is sent, and whether it is received into a buffer.
    plain: list[tuple[int, bool]]
    misuses: list[str]


def make_datagrams(source: Source) -> _Program:
    """Choose a program."""
    count = source.pick([2, 2, 3, 6])
    sizes = source.pick([[0, 1, 100], [1400, 9000], [0, 100, 60_000]])

    def one() -> Action:
        return source.weighted(
            [
                (8, ("send", source.below(count), source.pick(sizes), source.pick(["bytes", "bytearray", "view"]))),
                (1, ("send_to_nobody", source.pick(sizes))),
                (0.3, ("send_wrongly", source.pick(["text", "too much", "elsewhere", "no address"]))),
                (0.15, ("close",)),
                (0.1, ("abort",)),
                (0.5, ("limit", source.pick([0, 1, 100_000]))),
                (0.5, ("look",)),
                (0.5, ("collect",)),
                (0.3, ("fail",)),
                (1, ("soon", [("send", source.below(count), source.pick(sizes), "bytes")])),
            ]
        )

    def some() -> list[Action]:
        return source.several(one, 0, 3)

    endpoints = [
        _Endpoint(source.chance(0.2), source.several(some, 0, 20), source.several(some, 1, 12)) for _ in range(count)
    ]
    plain = source.several(lambda: (source.pick([0, 1, 1000, 50_000]), source.chance(0.5)), 0, 5)
    return _Program(
        source.pick(["inet", "inet", "inet6", "unix"]),
        source.pick([None, 4096]),
        endpoints,
        plain,
        source.several(lambda: source.pick(sorted(_MISUSES)), 0, 3),
    )


class _End(asyncio.DatagramProtocol):
    """One endpoint."""

    def __init__(self, number: int, endpoint: _Endpoint, stage: Stage) -> None:
        self.number = number
        self.endpoint = endpoint
        self.stage = stage
        self.calls = list(endpoint.calls)
        self.transport: Any = None
        self.others: list[_End] = []
        self.address: Any = None
        self.peer: _End | None = None  # the only one, if it is connected
        self.sent = 0
        self.latest: dict[int, int] = {}  # of each sender
        self.made = self.lost = self.paused = False

    # -- what happens to it ------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        self.stage.check(not (self.made or self.lost), "connection_made twice")
        self.made = True
        self.transport = transport
        self.address = transport.get_extra_info("sockname")

    def datagram_received(self, data: bytes, address: Any) -> None:
        self.stage.check(self.made and not self.lost, f"a datagram while made={self.made} lost={self.lost}")
        self.stage.check(type(data) is bytes, f"a datagram of type {type(data)}")
        if data == b"stray":
            return
        head, body = data[:_HEADER], data[_HEADER:]
        sum_, sender, number = int(head[:4].hex(), 16), int(head[4:6].hex(), 16), int(head[6:].hex(), 16)
        self.stage.check(sum_ == zlib.crc32(data[4:]), f"a damaged datagram of {len(data)} bytes")
        self.stage.check(body == pattern(number, len(body)), f"a damaged datagram of {len(data)} bytes")
        # One may be lost where there is no room; none may come twice, or before one that was sent earlier.
        self.stage.check(self.latest.get(sender, -1) < number, f"datagram {number} after {self.latest.get(sender)}")
        self.latest[sender] = number
        other = self.others[sender]
        self.stage.check(address == other.address, f"the address of a datagram: {address}, not {other.address}")
        self._perform_next()

    def error_received(self, exc: Exception) -> None:
        self.stage.check(self.made and not self.lost, f"error_received while made={self.made} lost={self.lost}")
        self.stage.check(isinstance(exc, OSError), f"error_received({exc!r})")
        self._perform_next()

    def pause_writing(self) -> None:
        self.stage.check(not self.paused, "pause_writing twice")
        self.paused = True
        self._perform_next()

    def resume_writing(self) -> None:
        self.stage.check(self.paused, "resume_writing without pause_writing")
        self.paused = False
        self._perform_next()

    def connection_lost(self, exc: BaseException | None) -> None:
        self.stage.check(self.made and not self.lost, "connection_lost twice, or without connection_made")
        self.stage.check(exc is None or isinstance(exc, (OSError, Planned)), f"lost by {exc!r}")
        self.lost = True
        self.perform([("look",), ("close",), ("abort",)])

    # -- what it does ------------------------------------------------------------------------------

    def _perform_next(self) -> None:
        if self.calls:
            self.perform(self.calls.pop(0))

    def perform(self, actions: list[Action]) -> None:
        """Do these things."""
        if self.lost and not self.stage.ours:
            return  # asyncio's own breaks
        for name, *arguments in actions:
            if name not in self.stage.without:
                getattr(self, name)(*arguments)

    def send(self, to: int, size: int, form: str) -> None:
        other = self.peer or self.others[to % len(self.others)]
        body = pattern(self.sent, size)
        rest = self.number.to_bytes(2, "big") + self.sent.to_bytes(8, "big") + body
        self.sent += 1
        data: Any = {"bytes": bytes, "bytearray": bytearray, "view": memoryview}[form](
            zlib.crc32(rest).to_bytes(4, "big") + rest
        )
        self.transport.sendto(data, None if self.peer else other.address)
        if form == "bytearray":
            data[:] = bytes(len(data))

    def send_to_nobody(self, size: int) -> None:
        if self.peer is None and isinstance(self.address, tuple):
            self.transport.sendto(bytes(size), (self.address[0], 1, *self.address[2:]))

    def send_wrongly(self, how: str) -> None:
        try:
            if how == "text":
                self.transport.sendto("text")
            elif how == "too much" and isinstance(self.address, tuple):
                self.transport.sendto(bytes(70_000), None if self.peer else self.others[0].address)
            elif how == "elsewhere":
                self.transport.sendto(b"stray", self.others[-1].address)
        except (TypeError, ValueError) as exc:
            if how != {"TypeError": "text", "ValueError": "elsewhere"}[type(exc).__name__]:
                self.stage.raised(exc, f"sendto() {how}")

    def close(self) -> None:
        self.transport.close()

    def abort(self) -> None:
        self.transport.abort()

    def limit(self, high: int) -> None:
        self.transport.set_write_buffer_limits(high)

    def look(self) -> None:
        repr(self.transport)
        self.transport.is_closing()
        self.stage.check(self.transport.get_write_buffer_size() >= 0, "a write buffer of less than nothing")
        self.transport.get_extra_info("peername")

    def collect(self) -> None:
        gc.collect(0)

    def fail(self) -> None:
        raise Planned

    def soon(self, actions: list[Action]) -> None:
        self.stage.loop.call_soon(self.perform, actions)


# -- playing ---------------------------------------------------------------------------------------

_FAMILIES = {"inet": (socket.AF_INET, "127.0.0.1"), "inet6": (socket.AF_INET6, "::1"), "unix": (socket.AF_UNIX, "")}


def _bound(program: _Program, number: int, stage: Stage) -> socket.socket:
    family, host = _FAMILIES[program.family]
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.setblocking(False)
    if program.buffers is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, program.buffers)
    sock.bind((host, 0) if host else f"\0fuzz-{id(stage):x}-{number}")
    return sock


async def play_datagrams(program: _Program, stage: Stage) -> None:
    """Play a program."""
    if program.family == "inet6" and not _has_inet6():
        return
    ends: list[_End] = []
    for number, endpoint in enumerate(program.endpoints):
        sock = _bound(program, number, stage)
        end = _End(number, endpoint, stage)
        if endpoint.connected and ends:
            end.peer = ends[0]
            sock.connect(ends[0].address)
        _, _ = await stage.loop.create_datagram_endpoint(lambda end=end: end, sock=sock)
        ends.append(end)
    for end in ends:
        end.others = ends
    beside = [] if stage.hard else [_play_plain(program, stage), _misuse(program, stage)]
    await stage.together(_go_on(ends), *beside)
    for end in ends:
        end.transport.close()
    await stage.until(lambda: all(end.lost for end in ends), "connection_lost of a datagram endpoint")
    for end in ends:
        end.transport = None
        end.others = []


def _has_inet6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


async def _go_on(ends: list[_End]) -> None:
    for number in range(max(len(end.endpoint.rounds) for end in ends)):
        for end in ends:
            if number < len(end.endpoint.rounds):
                with contextlib.suppress(Planned):
                    end.perform(end.endpoint.rounds[number])
        await asyncio.sleep(0 if number % 3 else 0.001)


async def _play_plain(program: _Program, stage: Stage) -> None:
    """Datagrams between two sockets, each received before the next is sent."""
    one, other = _bound(program, 100, stage), _bound(program, 101, stage)
    with one, other:
        for number, (size, into) in enumerate(program.plain):
            data = pattern(number, size)
            if program.buffers is not None and size > program.buffers // 2:
                continue
            receive = stage.loop.sock_recvfrom_into if into else stage.loop.sock_recvfrom
            buffer = bytearray(65_536)
            receiving = asyncio.ensure_future(receive(other, buffer if into else 65_536))
            if number % 2:
                await asyncio.sleep(0)
            await stage.loop.sock_sendto(one, data, other.getsockname())
            result = await stage.within(receiving, f"a datagram of {size} bytes")
            if result is not None:
                got, address = result
                stage.check((bytes(buffer[:got]) if into else got) == data, f"a damaged datagram of {size} bytes")
                stage.check(address == one.getsockname(), f"the address of a datagram: {address}")


_MISUSES: dict[str, dict[str, Any]] = {
    "no family": {},
    "wrong local address": {"local_addr": "127.0.0.1"},
    "stream": {"sock": "stream"},
    "both": {"sock": "datagram", "local_addr": ("127.0.0.1", 0)},
    "families that differ": {"local_addr": ("127.0.0.1", 0), "remote_addr": ("::1", 1)},
    "taken": {"local_addr": "taken"},
}


async def _misuse(program: _Program, stage: Stage) -> None:
    for name in program.misuses:
        arguments = dict(_MISUSES[name])
        with (
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken,
            socket.socket(socket.AF_INET, socket.SOCK_STREAM if name == "stream" else socket.SOCK_DGRAM) as sock,
        ):
            taken.bind(("127.0.0.1", 0))
            sock.setblocking(False)
            if "sock" in arguments:
                arguments["sock"] = sock
            if name == "taken":
                arguments["local_addr"] = taken.getsockname()
            result = "works"
            try:
                transport, _ = await stage.loop.create_datagram_endpoint(asyncio.DatagramProtocol, **arguments)
            except Exception as exc:
                result = describe(exc)
            else:
                transport.close()
                await asyncio.sleep(0)
            stage.note("misuse", f"{name}: {result}")
