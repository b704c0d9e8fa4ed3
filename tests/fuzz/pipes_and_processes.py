"""Pipes of all kinds, and child processes that answer, end early, are killed, and are not waited for."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from dataclasses import dataclass
from typing import Any

from .program import Source, digest, pattern
from .stage import Stage, describe

__all__ = ["make_pipes", "make_processes", "play_pipes", "play_processes"]


# -- pipes -----------------------------------------------------------------------------------------


@dataclass
class _Pipe:
    kind: str  # "pipe", "fifo", "socket", "terminal"
    buffered: bool  # no StreamReader but a protocol
    writes: list[tuple[int, float]]  # sizes, and seconds to wait after each
    pauses: list[int]  # places at which the reader rests for a moment
    end: str  # of the writer: "close", "abort", "write_eof"; of the reader: "reader leaves", "reader aborts"
    leaves_at: int  # the byte at which the reader leaves


def make_pipes(source: Source) -> list[_Pipe]:
    """Choose some pipes."""

    def pipe() -> _Pipe:
        writes = source.several(lambda: (source.pick([0, 1, 4096, 65_537, 300_000]), source.pick([0, 0, 0.001])), 0, 6)
        total = sum(size for size, _ in writes)
        pauses = sorted(source.below(total + 1) for _ in range(source.below(4)))
        ends = [(4, "close"), (2, "write_eof"), (1, "abort"), (1, "reader leaves"), (1, "reader aborts")]
        kind = source.pick(["pipe", "pipe", "fifo", "socket"])
        return _Pipe(kind, source.chance(0.5), writes, pauses, source.weighted(ends), source.below(total + 1))

    return source.several(pipe, 1, source.pick([1, 3, 8]))


async def play_pipes(program: list[_Pipe], stage: Stage) -> None:
    """Play them all at once."""
    await stage.together(*(_play_pipe(pipe, stage, number) for number, pipe in enumerate(program)))


def _ends(kind: str, name: str) -> tuple[Any, Any]:
    if kind == "socket":
        reader, writer = socket.socketpair()
        return reader, writer
    if kind == "fifo":
        path = f"/tmp/{name}"
        os.mkfifo(path)
        try:
            reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            writing = os.open(path, os.O_WRONLY)
        finally:
            os.unlink(path)
    else:
        reading, writing = os.pipe()
    return open(reading, "rb", 0), open(writing, "wb", 0)


class _Reader(asyncio.Protocol):
    def __init__(self, pipe: _Pipe, stage: Stage) -> None:
        self.pipe = pipe
        self.stage = stage
        self.got = 0
        self.calls: list[str] = []
        self.resting = False
        self.left = False
        self.pauses = list(pipe.pauses)
        self.over = stage.loop.create_future()

    def connection_made(self, transport: Any) -> None:
        self.calls.append("made")
        self.transport: Any = transport

    def data_received(self, data: bytes) -> None:
        begin, self.got = self.got, self.got + len(data)
        self.stage.check(data and data == pattern(begin, len(data)), f"wrong bytes through a pipe at {begin}")
        self.stage.check(self.calls == ["made"], f"data from a pipe after {self.calls}")
        self.stage.check(not self.resting, "data from a pipe that rests")
        self.stage.check(not self.left, "data from a pipe that was closed")
        if self.pipe.end.startswith("reader") and self.got >= self.pipe.leaves_at:
            self.leave()
        elif self.pauses and self.got >= self.pauses[0]:
            self.pauses.pop(0)
            self.resting = True
            self.transport.pause_reading()
            self.stage.loop.call_later(0.001, self._go_on)

    def leave(self) -> None:
        """End it from this side."""
        self.left = True
        if self.transport is not None:  # else it has ended long ago
            self.transport.close()

    def _go_on(self) -> None:
        self.resting = False
        if self.transport is not None:  # as above
            self.transport.resume_reading()

    def eof_received(self) -> None:
        self.stage.check(self.calls == ["made"], f"the end of a pipe after {self.calls}")
        self.calls.append("eof")

    def connection_lost(self, exc: BaseException | None) -> None:
        self.calls.append(f"lost({describe(exc)})")
        self.stage.check(len(self.calls) <= 3, f"a pipe was lost more than once: {self.calls}")
        self.over.done() or self.over.set_result(None)


class _Writer(asyncio.BaseProtocol):
    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.calls: list[str] = []
        self.may_write = asyncio.Event()
        self.may_write.set()
        self.over = stage.loop.create_future()

    def connection_made(self, transport: Any) -> None:
        self.calls.append("made")
        self.transport: Any = transport

    def pause_writing(self) -> None:
        self.stage.check(self.may_write.is_set(), "pause_writing of a pipe twice")
        self.may_write.clear()

    def resume_writing(self) -> None:
        self.stage.check(not self.may_write.is_set(), "resume_writing of a pipe that was not paused")
        self.may_write.set()

    def connection_lost(self, exc: BaseException | None) -> None:
        self.calls.append(f"lost({describe(exc)})")
        self.stage.check(len(self.calls) == 2, f"a pipe was lost more than once: {self.calls}")
        self.may_write.set()
        self.over.done() or self.over.set_result(None)


async def _play_pipe(pipe: _Pipe, stage: Stage, number: int) -> None:
    loop = stage.loop
    reading, writing = _ends(pipe.kind, f"fuzz-{os.getpid()}-{number}")
    reader, writer = _Reader(pipe, stage), _Writer(stage)
    await loop.connect_read_pipe(lambda: reader, reading)
    await loop.connect_write_pipe(lambda: writer, writing)
    if pipe.end == "reader aborts":
        loop.call_later(0.001, reader.leave)
    sent = 0
    for size, seconds in pipe.writes:
        if writer.transport.is_closing():
            break
        writer.transport.write(pattern(sent, size))
        sent += size
        await writer.may_write.wait()
        if seconds:
            await asyncio.sleep(seconds)
    repr(reader.transport), repr(writer.transport)
    if pipe.end == "abort":
        writer.transport.abort()
    elif pipe.end == "write_eof":
        if not writer.transport.is_closing():
            writer.transport.write_eof()
    elif not (pipe.end == "reader leaves" and pipe.leaves_at):
        writer.transport.close()
    await stage.within(asyncio.wait([reader.over, writer.over]), f"the end of {pipe}: {reader.calls} {writer.calls}")
    whole = pipe.end in ("close", "write_eof")
    stage.check(reader.got == sent if whole else reader.got <= sent, f"{reader.got} bytes of {sent} through {pipe}")
    if whole and not stage.hard:
        stage.note(f"pipe {number}", f"{reader.got} bytes, reader {reader.calls}, writer {writer.calls}")
    for end in (reader.transport, writer.transport):
        end.close()
    reader.transport = writer.transport = None


# -- processes -------------------------------------------------------------------------------------


@dataclass
class _Process:
    how: str  # the key of _COMMANDS
    size: int  # of what it is sent
    signal: int | None
    seconds: float  # until then
    waits: str  # "communicate", "wait", "leave", "both"


_COMMANDS = {
    "cat": "cat",
    "count": "wc -c | tr -d ' '",
    "exit": "cat >/dev/null; exit 7",
    "early": "exit 3",
    "errors": "cat >&2",
    "deaf": "exec sleep 0.02",
    "stubborn": "trap '' TERM; cat",
    "grandchild": "(sleep 0.05) & cat",
}


def make_processes(source: Source) -> list[_Process]:
    """Choose some processes."""

    def process() -> _Process:
        sent = source.pick([None, None, None, int(signal.SIGKILL), int(signal.SIGTERM)])
        waits = source.pick(["communicate", "communicate", "wait", "both", "leave"])
        size = source.pick([0, 10, 100_000, 400_000])
        return _Process(source.pick(sorted(_COMMANDS)), size, sent, source.pick([0, 0.001, 0.01]), waits)

    return source.several(process, 1, source.pick([1, 2, 5]))


async def play_processes(program: list[_Process], stage: Stage) -> None:
    """Play them all at once."""
    if not stage.ours and sys.version_info < (3, 12):
        # Before 3.12 asyncio's own waits in a thread for each child, and reports those that ended before it did.
        watcher = asyncio.PidfdChildWatcher()
        watcher.attach_loop(stage.loop)
        asyncio.set_child_watcher(watcher)
    await stage.together(*(_play_process(each, stage, number) for number, each in enumerate(program)))


async def _play_process(process: _Process, stage: Stage, number: int) -> None:
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_shell(_COMMANDS[process.how], stdin=pipe, stdout=pipe, stderr=pipe)
    data = pattern(0, process.size)
    if process.signal is not None:
        stage.loop.call_later(process.seconds, _send, child, process.signal)
    out = err = b""
    if process.waits == "leave":
        child.stdin.close()  # type: ignore[union-attr]  # there is one
        await stage.within(asyncio.gather(child.stdout.read(), child.stderr.read()), f"the end of output: {process}")  # type: ignore[union-attr]
    elif process.waits == "wait":
        child.stdin.close()  # type: ignore[union-attr]
    else:
        result = await stage.within(child.communicate(data), f"communicate(): {process}")
        out, err = result or (b"", b"")
    waits = [child.wait() for _ in range(2 if process.waits == "both" else 1)]
    codes = await stage.within(asyncio.gather(*waits), f"wait(): {process}")
    stage.check(codes is None or set(codes) == {child.returncode}, f"wait() gave {codes}, not {child.returncode}")
    calm = process.signal is None
    if calm and process.waits in ("communicate", "both"):
        stage.note(f"process {number}", f"{process.how}: {child.returncode}, {digest(out)}, {digest(err)}")
    elif calm:
        stage.note(f"process {number}", f"{process.how}: {child.returncode}")
    else:
        stage.check(child.returncode in (0, 3, 7, -9, -15, 137, 143), f"{process} ended with {child.returncode}")
    # Dropped pipes are closed by the transport of the process, which is closed when all of them are.
    transport = child._transport  # type: ignore[attr-defined]  # Process has no public way
    await asyncio.sleep(0)
    transport.close()
    with contextlib.suppress(ProcessLookupError):
        child.kill()


def _send(child: Any, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        child.send_signal(number)
