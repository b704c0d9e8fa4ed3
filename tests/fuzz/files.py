"""Files into connections: between writes, with and without the system's help, cut short and refused."""

from __future__ import annotations

import asyncio
import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .. import certificates
from .program import Source, digest, pattern
from .stage import Stage, describe, stream_pair

__all__ = ["make_files", "play_files"]

#: Bytes of the file that is sent.
_SIZE = 2_000_000

_WRONG_CALLS: dict[str, dict[str, Any]] = {
    "float count": {"count": 1.5},
    "negative count": {"count": -1},
    "count 0": {"count": 0},
    "float offset": {"offset": 0.5},
    "negative offset": {"offset": -1},
    "text": {"file": "text"},
    "no file": {"file": None},
    "in memory": {"file": "memory", "fallback": False},
    "closed": {"file": "closed"},
}


@dataclass
class _Step:
    what: str  # "write", "send", "wrong", "sock"
    size: int | None
    offset: int = 0
    fallback: bool = True
    file: str = "real"
    meddling: str = ""  # meanwhile: "write", "write_eof", "pause", "look", "another"
    cut: str = ""  # "cancel", "abort", "peer"
    seconds: float = 0.0  # until then
    wrong: str = ""


@dataclass
class _Program:
    tls: bool
    unix: bool
    plain: bool  # loop.sock_sendfile, and no transport
    steps: list[_Step]


def make_files(source: Source) -> _Program:
    """Choose a program."""
    plain = source.chance(0.3)
    cuts = source.chance(0.3)

    def step() -> _Step:
        what = source.weighted([(2, "write"), (4, "send"), (1, "wrong")])
        if what == "write":
            return _Step(what, source.pick([0, 1, 5000, 300_000]))
        if what == "wrong":
            return _Step(what, None, wrong=source.pick(sorted(_WRONG_CALLS)))
        return _Step(
            what,
            source.pick([None, 1, 1000, 500_000, 10 * _SIZE]),
            source.pick([0, 1, 4096, 999_999, _SIZE - 1, _SIZE, _SIZE + 1]),
            source.chance(0.7),
            source.pick(["real", "real", "memory"]),
            source.pick(["", "", "write", "pause", "look", "another"]),
            source.pick(["cancel", "abort", "peer"]) if cuts and source.chance(0.3) else "",
            source.pick([0, 0.0005, 0.002]),
        )

    return _Program(not plain and source.chance(0.3), source.chance(0.5), plain, source.several(step, 1, 5))


class _Sink(asyncio.Protocol):
    """Takes everything, slowly if it is told so."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.got = bytearray()
        self.over: asyncio.Future[None] = loop.create_future()
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.got += data

    def connection_lost(self, exc: BaseException | None) -> None:
        self.over.set_result(None)


async def play_files(program: _Program, stage: Stage) -> None:
    """Play a program."""
    loop = stage.loop
    ours, theirs = stream_pair(program.unix)
    sink = _Sink(loop)
    client, server = {}, {}
    if program.tls:
        client = {"ssl": certificates.client_context(), "server_hostname": "localhost"}
        server = {"ssl": certificates.server_context()}
    accepting = loop.connect_accepted_socket(lambda: sink, theirs, **server)
    if program.plain:
        await accepting
        sender = _Sender(program, stage, sink, ours)
    else:
        connecting = loop.create_connection(lambda: _Sink(loop), sock=ours, **client)
        (transport, _), _ = await asyncio.gather(connecting, accepting)
        sender = _Sender(program, stage, sink, transport)
    with _files() as sender.files:
        for step in program.steps:
            if sender.cut:
                break
            await sender.play(step)
    if program.plain:
        ours.close()
    else:
        sender.target.close()
    await stage.within(asyncio.wait([sink.over]), "the end of what was sent")
    # A cut may come before or after the last byte was taken.
    whole = bytes(sender.sent)
    if sender.cut:
        stage.check(sink.got[: len(whole)] == whole[: len(sink.got)], "wrong bytes of a file that was cut")
    else:
        stage.check(sink.got == whole, f"wrong bytes of a file: {digest(sink.got)}, not {digest(whole)}")
    sink.transport = None


@contextmanager
def _files() -> Iterator[dict[str, Any]]:
    """The file, as it comes in all its forms."""
    with tempfile.NamedTemporaryFile(buffering=0) as real:
        real.write(pattern(0, _SIZE))
        with open(real.name, "rb") as file, open(real.name, encoding="latin-1") as text:
            closed = open(real.name, "rb")
            closed.close()
            memory = io.BytesIO(pattern(0, _SIZE))
            yield {"real": file, "text": text, "closed": closed, "memory": memory, "None": None}


class _Sender:
    def __init__(self, program: _Program, stage: Stage, sink: _Sink, target: Any) -> None:
        self.program = program
        self.stage = stage
        self.sink = sink
        self.target: Any = target  # a transport, or a socket
        self.files: dict[str, Any] = {}
        self.sent = bytearray()
        self.cut = False

    async def play(self, step: _Step) -> None:
        """One step, to its end."""
        if step.what in self.stage.without:
            return
        if step.what == "write":
            await self._write(step.size or 0)
        elif step.what == "wrong":
            await self._call_wrongly(step.wrong)
        else:
            await self._send(step)

    async def _write(self, size: int) -> None:
        data = pattern(len(self.sent), size)
        self.sent += data
        if self.program.plain:
            await self.stage.loop.sock_sendall(self.target, data)
        else:
            self.target.write(data)

    async def _call(self, file: Any, offset: Any, count: Any, fallback: bool) -> Any:
        send = self.stage.loop.sock_sendfile if self.program.plain else self.stage.loop.sendfile
        return await send(self.target, file, offset, count, fallback=fallback)

    async def _call_wrongly(self, how: str) -> None:
        if self.program.tls and how in ("count 0", "negative offset"):
            return  # asyncio sends all of the file then, or leaves it to the file to refuse
        call: dict[str, Any] = {"file": "real", "offset": 0, "count": 10, "fallback": True} | _WRONG_CALLS[how]
        try:
            result = await self._call(self.files[str(call["file"])], call["offset"], call["count"], call["fallback"])
        except Exception as exc:
            result = describe(exc)
        else:
            self.sent += pattern(call["offset"], result)
        self.stage.note("sender", f"{how}: {result}")

    async def _send(self, step: _Step) -> None:
        file = self.files[step.file]
        want = pattern(step.offset, max(0, min(_SIZE - step.offset, step.size or _SIZE)))
        begin = len(self.sent)
        self.sent += want
        sending = self.stage.loop.create_task(self._call(file, step.offset, step.size, step.fallback))
        if step.cut:
            self.cut = True
            self.stage.loop.call_later(step.seconds, self._end_early, step.cut, sending)
        await self._meddle(step, sending)
        try:
            result = await self.stage.within(sending, "sendfile()")
        except asyncio.CancelledError:
            result = None
        except Exception as exc:
            if not step.cut:
                self.stage.note("sender", f"send of {step.file}, fallback={step.fallback}: {describe(exc)}")
            del self.sent[begin:]
            self.cut = self.cut or isinstance(exc, OSError)
            return
        if not step.cut:
            self.stage.check(result == len(want), f"sendfile() gave {result}, not {len(want)}")
            self.stage.note("sender", f"sent {result}")
            if result:  # else asyncio's own leaves it where it was
                place = step.offset + result
                self.stage.check(file.tell() == place, f"the file stands at {file.tell()}, not at {place}: {step}")

    async def _meddle(self, step: _Step, sending: asyncio.Task[Any]) -> None:
        """Do something else with the connection meanwhile."""
        await asyncio.sleep(step.seconds)
        if step.meddling == "pause":
            if not self.sink.transport.is_closing():
                self.sink.transport.pause_reading()
                self.stage.loop.call_later(0.003, self.sink.transport.resume_reading)
        elif self.program.plain or sending.done():
            return
        elif step.meddling == "write" and step.file == "real" and not self.program.tls and not step.cut:
            try:
                self.target.write(b"out of turn")
            except RuntimeError:
                return
            if not sending.done():
                self.stage.fail("write() while a file is sent did not raise")
        elif step.meddling == "look":
            repr(self.target)
            self.target.get_write_buffer_size()
        elif step.meddling == "another" and step.file == "real" and not self.program.tls and not step.cut:
            try:
                await self.stage.loop.sendfile(self.target, self.files["real"], 0, 1, fallback=False)
            except RuntimeError:
                return
            self.stage.fail("a second sendfile() at the same time did not raise")

    def _end_early(self, how: str, sending: asyncio.Task[Any]) -> None:
        if how == "cancel":
            sending.cancel()
        elif how == "peer":
            self.sink.transport.abort()
        elif self.program.plain:
            sending.cancel()
        else:
            self.target.abort()
