"""StreamReader and StreamWriter: what is read by lines, marks, blocks and pieces is what was written, also when whoever
reads gives up and asks again, and when both sides change to TLS in the middle."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from .. import certificates
from .program import Source, pattern
from .stage import LIMIT, Stage, describe

__all__ = ["make_streams", "play_streams"]

_MARK = b"##"


@dataclass
class _Write:
    data: bytes
    in_pieces: bool
    drains: bool
    seconds: float  # to wait afterwards


@dataclass
class _Read:
    how: str  # "line", "until", "exactly", "pieces", "rest", "too much"
    want: bytes
    piece: int  # of "pieces"
    patience: float | None  # gives up after so many seconds at first, and then asks again


@dataclass
class _Way:
    """What goes one way, in what pieces, and how it is read."""

    writes: list[_Write]
    reads: list[_Read]


@dataclass
class _Program:
    kind: str  # "tcp", "unix", "tls"
    limit: int
    #: To the server and back; the second pair, if there is one, over TLS after start_tls.
    phases: list[tuple[_Way, _Way]]
    #: The client begins with TLS before it has read the server's last answer.
    eager: bool


def make_streams(source: Source) -> _Program:
    """Choose a program."""
    kind = source.pick(["tcp", "unix", "tls"])
    limit = source.pick([4000, 65_536, 1 << 20])
    phases = source.pick([1, 1, 2]) if kind != "tls" else 1
    ways = [
        (_make_way(source, limit, at == phases - 1), _make_way(source, limit, at == phases - 1)) for at in range(phases)
    ]
    return _Program(kind, limit, ways, source.chance(0.3))


def _make_way(source: Source, limit: int, last: bool) -> _Way:
    messages = source.several(lambda: _make_message(source, limit), 0 if last else 1, 8)
    written = b"".join(data for data, _ in messages)
    reads = [read for _, read in messages]
    if last:
        if source.chance(0.5):
            rest = pattern(0, source.pick([0, 1, 5000]))
            written += rest
            reads.append(_Read(source.pick(["rest", "too much"]), rest, 1, source.pick([None, 0.001])))
        else:
            reads.append(_Read(source.pick(["rest", "too much", "line", "until"]), b"", 1, None))
    writes: list[_Write] = []
    while written:
        size = source.pick([1, 10, 1000, 20_000, 200_000])
        data, written = written[:size], written[size:]
        pause = source.pick([0, 0, 0, 0.0005, 0.002]) if len(writes) < 30 else 0
        writes.append(_Write(data, source.chance(0.2), source.chance(0.5), pause))
        if len(writes) > 200:
            writes[-1].data, written = writes[-1].data + written, b""
    return _Way(writes, reads)


def _make_message(source: Source, limit: int) -> tuple[bytes, _Read]:
    kind = source.pick(["line", "until", "exactly", "exactly", "pieces"])
    patience = source.pick([None, None, 0, 0.001])
    if kind in ("line", "until"):
        data = b"x" * source.pick([0, 1, 500, limit - 10]) + (b"\n" if kind == "line" else _MARK)
    else:
        data = pattern(source.below(1000), source.pick([1, 10, 5000, 100_000, 400_000]))
    return data, _Read(kind, data, source.pick([1, 500, 100_000]) if len(data) < 500 else 20_000, patience)


async def play_streams(program: _Program, stage: Stage) -> None:
    """Play a program."""
    served: asyncio.Future[Any] = stage.loop.create_future()
    over: asyncio.Future[Any] = stage.loop.create_future()

    async def serve(reader: Any, writer: Any) -> None:
        served.set_result((reader, writer))
        await over

    kind: dict[str, Any] = {"ssl": certificates.server_context()} if program.kind == "tls" else {}
    if program.kind == "unix":
        name = f"\0fuzz-{id(over):x}"
        server = await asyncio.start_unix_server(serve, name, limit=program.limit)
        client = await asyncio.open_unix_connection(name, limit=program.limit)
    else:
        server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=program.limit, **kind)
        if kind:
            kind = {"ssl": certificates.client_context(), "server_hostname": "localhost"}
        client = await asyncio.open_connection(*server.sockets[0].getsockname(), limit=program.limit, **kind)
    server_end = await served
    await stage.within(_converse(program, stage, client, server_end), "the end of all that is to be read", 2 * LIMIT)
    for who, (_, writer) in (("client", client), ("server", server_end)):
        writer.close()
        try:
            await stage.within(writer.wait_closed(), f"wait_closed() of the {who}")
        except OSError as exc:
            if program.kind != "tls" and len(program.phases) == 1:
                stage.note(who, f"wait_closed: {describe(exc)}")
    over.set_result(None)
    server.close()
    await stage.within(server.wait_closed(), "wait_closed() of the server")


async def _converse(program: _Program, stage: Stage, client: Any, server: Any) -> None:
    for number, (there, back) in enumerate(program.phases):
        last = number == len(program.phases) - 1
        eager = program.eager and not last and stage.ours  # asyncio's own waits for ever
        if last:
            await stage.together(
                _write(there.writes, client, last=True),
                _read(there.reads, server, stage, "server"),
                _write(back.writes, server, last=True),
                _read(back.reads, client, stage, "client"),
            )
            if client[1].can_write_eof():
                stage.check(client[0].at_eof() and server[0].at_eof(), "not at_eof() at the end")
            return
        await stage.together(
            _client_upgrades(there, back, client, stage, eager),
            _server_upgrades(there, back, server, stage, eager),
        )


async def _client_upgrades(there: _Way, back: _Way, end: Any, stage: Stage, eager: bool) -> None:
    await _write(there.writes, end)
    if not eager:
        await _read(back.reads, end, stage, "client")
    await end[1].start_tls(certificates.client_context(), server_hostname="localhost")


async def _server_upgrades(there: _Way, back: _Way, end: Any, stage: Stage, eager: bool) -> None:
    await _read(there.reads, end, stage, "server")
    if not eager:
        await _write(back.writes, end)
        await end[1].drain()
    await end[1].start_tls(certificates.server_context())


async def _write(writes: list[_Write], end: Any, last: bool = False) -> None:
    _, writer = end
    for write in writes:
        if write.in_pieces:
            middle = len(write.data) // 2
            writer.writelines([write.data[:middle], write.data[middle:]])
        else:
            writer.write(write.data)
        if write.drains:
            await writer.drain()
        if write.seconds:
            await asyncio.sleep(write.seconds)
    if last and writer.can_write_eof():
        writer.write_eof()


async def _read(reads: list[_Read], end: Any, stage: Stage, who: str) -> None:
    reader, writer = end
    for read in reads:
        ends = read.how in ("rest", "too much") or not read.want
        if ends and not writer.can_write_eof():
            # Over TLS nobody can end one way alone: read what there is to be.
            read = _Read("exactly", read.want, 1, read.patience)
        try:
            got = await _one_read(read, reader)
        except asyncio.IncompleteReadError as exc:
            got = exc.partial
            stage.note(who, f"{read.how}: incomplete, {len(got)} bytes")
        stage.check(bytes(got) == read.want, f"{who} reads {read.how}: {len(got)} bytes, not the {len(read.want)}")


async def _one_read(read: _Read, reader: Any) -> bytes:
    size = len(read.want)

    def begin() -> Any:
        if read.how == "line":
            return reader.readline()
        if read.how == "until":
            return reader.readuntil(_MARK)
        if read.how == "exactly":
            return reader.readexactly(size)
        return reader.readexactly(size + 5) if read.how == "too much" else reader.read()

    if read.how == "pieces":
        got = b""
        while len(got) < size and (piece := await reader.read(min(read.piece, size - len(got)))):
            got += piece
        return got
    # A read() of all there is keeps what it has got to itself: giving it up would lose that.
    if read.patience is not None and read.how != "rest":
        try:
            return await asyncio.wait_for(begin(), read.patience)
        except TimeoutError:
            pass
    return await begin()  # type: ignore[no-any-return]  # bytes
