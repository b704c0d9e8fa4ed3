"""Streams by name (iocp_loop/readers.py): what asyncio's do, ours do too; what is rare is left to asyncio's methods."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import math
import random
import sys
import warnings
import weakref
from typing import Any

import pytest

import iocp_loop
from iocp_loop import readers
from iocp_loop.native import hot

from .support import WINDOWS, turns, until

Pair = tuple[Any, Any]

only_native = pytest.mark.skipif(hot is None, reason="without the native tier the classes are asyncio's own")


def make_reader(kind: Any = readers.StreamReader, limit: int = 2**16) -> Any:
    return kind(limit=limit, loop=asyncio.get_running_loop())


async def outcome(awaitable: Any) -> Any:
    """The result, or what was raised."""
    try:
        return await asyncio.wait_for(awaitable, 5)
    except (Exception, asyncio.CancelledError) as exc:
        return type(exc), exc.args


@contextlib.asynccontextmanager
async def connected(served: Any, **kwds: Any) -> Any:
    """A client of a server whose connections `served` gets."""
    server = await iocp_loop.start_server(served, "127.0.0.1", 0, **kwds)
    reader, writer = await iocp_loop.open_connection(*server.sockets[0].getsockname(), **kwds)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        server.close()
        await server.wait_closed()


async def echo(reader: Any, writer: Any) -> None:
    while data := await reader.read(1000):
        writer.write(data)
        await writer.drain()
    writer.close()


async def test_an_echo_and_its_classes(loop: iocp_loop.IocpEventLoop) -> None:
    async with connected(echo) as (reader, writer):
        assert isinstance(reader, asyncio.StreamReader)
        assert isinstance(writer, asyncio.StreamWriter)
        assert (type(reader), type(writer)) == (iocp_loop.StreamReader, iocp_loop.StreamWriter)
        for size in (1, 10, 100_000):
            writer.write(b"x" * size)
            await writer.drain()
            assert await reader.readexactly(size) == b"x" * size
        writer.write_eof()
        assert await reader.read() == b""
        assert reader.at_eof()


@pytest.mark.skipif(WINDOWS, reason="there are no UNIX sockets in asyncio for Windows")
async def test_an_echo_over_a_unix_socket(loop: iocp_loop.IocpEventLoop, tmp_path: Any) -> None:
    server = await iocp_loop.start_unix_server(echo, tmp_path / "socket")
    reader, writer = await iocp_loop.open_unix_connection(tmp_path / "socket")
    writer.write(b"one\ntwo\n")
    assert [await reader.readline(), await reader.readuntil()] == [b"one\n", b"two\n"]
    writer.close()
    await writer.wait_closed()
    server.close()


async def test_a_plain_function_serves_too(loop: iocp_loop.IocpEventLoop) -> None:
    served: list[Pair] = []
    async with connected(lambda reader, writer: served.append((reader, writer))) as (reader, _):
        await until(lambda: served)
        served[0][1].write(b"hello\n")
        assert await reader.readline() == b"hello\n"
        served[0][1].close()


async def test_a_serving_coroutine_that_raises_is_reported(
    loop: iocp_loop.IocpEventLoop, reports: list[dict[str, Any]]
) -> None:
    async def fails(reader: Any, writer: Any) -> None:
        raise ZeroDivisionError

    async with connected(fails) as (reader, _):
        assert await reader.read() == b""
    assert [type(report["exception"]) for report in reports] == [ZeroDivisionError]
    reports.clear()


async def test_a_serving_function_that_raises_is_reported(
    loop: iocp_loop.IocpEventLoop, reports: list[dict[str, Any]]
) -> None:
    """And its client is let go, as with the newest asyncio."""

    def fails(reader: Any, writer: Any) -> None:
        raise ZeroDivisionError

    async with connected(fails) as (reader, _):
        assert await reader.read() == b""
    assert [type(report["exception"]) for report in reports] == [ZeroDivisionError]
    if hot is not None:
        assert reports[0]["message"] == "Unhandled exception in client_connected_cb"
    reports.clear()


#: What is done to a reader, one after the other: with the reader, or what is awaited of it.
Program = list[tuple[str, Any]]


async def play(kind: Any, program: Program, limit: int) -> list[Any]:
    """Do it with a reader of a class; what came of each call."""
    log: list[Any] = []
    reader = make_reader(kind, limit)
    for name, argument in program:
        call = getattr(reader, name)
        args = () if argument is None else (argument,)
        if name.startswith("read"):
            waiting = asyncio.ensure_future(outcome(call(*args)))
            await turns(5)
            if not waiting.done():
                log.append("waits")
                reader.feed_data(b"abc\ndef")
                reader.feed_data(b"\n")
                await turns(5)
            if not waiting.done() and not reader._eof:
                reader.feed_eof()
            log.append(await waiting)
        else:
            try:
                log.append(call(*args))
            except AssertionError as exc:
                log.append(str(exc))
        log.append((bytes(reader._buffer), reader._eof, reader._paused, reader._waiter))
    return log


def make_program(source: random.Random) -> Program:
    choices: list[tuple[str, Any]] = [
        ("feed_data", b""), ("feed_data", b"abc"), ("feed_data", b"de\n"), ("feed_data", b"x" * 20), ("read", None),
        ("read", 0), ("read", 2), ("read", 100), ("readexactly", 0), ("readexactly", 3), ("readexactly", 9),
        ("readexactly", -1), ("readline", None), ("readuntil", b"\n"), ("readuntil", b"c"), ("readuntil", b""),
        ("feed_eof", None), ("set_exception", ValueError("told")), ("exception", None), ("at_eof", None),
    ]  # fmt: skip
    return source.choices(choices, weights=[4] * 16 + [1] * 4, k=12)


@pytest.mark.parametrize("seed", range(60))
async def test_whatever_is_done_asyncios_reader_does_the_same(loop: iocp_loop.IocpEventLoop, seed: int) -> None:
    program, limit = make_program(random.Random(seed)), random.Random(seed).choice([1, 5, 8, 1000])
    assert await play(readers.StreamReader, program, limit) == await play(asyncio.StreamReader, program, limit)


async def test_a_transport_pauses_above_the_limit_and_goes_on(loop: iocp_loop.IocpEventLoop) -> None:
    async def serve(reader: Any, writer: Any) -> None:
        writer.write(b"x" * 300_000)
        await writer.drain()
        writer.close()

    async with connected(serve, limit=100) as (reader, _):
        await until(lambda: reader._paused)
        assert not reader._transport.is_reading()
        assert len(await reader.readexactly(300_000)) == 300_000
        assert await reader.read(10) == b""


async def test_a_transport_that_cannot_pause_is_not_asked_again(loop: iocp_loop.IocpEventLoop) -> None:
    class Transport:
        asked = 0

        def pause_reading(self) -> None:
            self.asked += 1
            raise NotImplementedError

    reader, transport = make_reader(limit=1), Transport()
    reader.set_transport(transport)
    reader.feed_data(b"1234")
    reader.feed_data(b"5678")
    assert (transport.asked, reader._transport) == (1, None)
    assert await reader.read(10) == b"12345678"


async def test_nothing_is_taken_before_it_is_awaited(loop: iocp_loop.IocpEventLoop) -> None:
    reader = make_reader()
    reader.feed_data(b"abcd")
    second, first = reader.read(2), reader.read(2)
    assert await first == b"ab"
    assert await second == b"cd"


async def test_a_read_that_is_cancelled_leaves_the_data_and_the_place(loop: iocp_loop.IocpEventLoop) -> None:
    reader = make_reader()
    task = asyncio.ensure_future(outcome(reader.readexactly(3)))
    await turns(5)
    task.cancel()
    await task
    assert reader._waiter is None
    reader.feed_data(b"abc")
    assert await reader.readexactly(3) == b"abc"


async def test_a_second_reader_is_refused(loop: iocp_loop.IocpEventLoop) -> None:
    reader = make_reader()
    first = asyncio.ensure_future(reader.read(1))
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match=r"readline|readuntil"):
        await reader.readline()
    reader.feed_data(b"x")
    assert await first == b"x"


async def test_a_buffer_that_is_lent_raises_as_asyncios(loop: iocp_loop.IocpEventLoop) -> None:
    for kind in (asyncio.StreamReader, readers.StreamReader):
        reader = make_reader(kind)
        reader.feed_data(b"abc")
        with memoryview(reader._buffer), pytest.raises(BufferError):
            reader.feed_data(b"def")
        assert await reader.read(10) == b"abc"


async def test_the_feed_data_of_a_subclass_is_called(loop: iocp_loop.IocpEventLoop) -> None:
    fed = []

    class Reader(readers.StreamReader):
        def feed_data(self, data: Any) -> None:
            fed.append(bytes(data))
            super().feed_data(data)

    reader = make_reader(Reader)
    protocol = readers.StreamReaderProtocol(reader, loop=loop)
    protocol.data_received(b"abc")
    assert fed == [b"abc"]
    assert await reader.read(10) == b"abc"
    protocol.connection_lost(None)


async def test_a_reader_that_is_gone_takes_nothing(loop: iocp_loop.IocpEventLoop) -> None:
    protocol = readers.StreamReaderProtocol(make_reader(), loop=loop)
    gc.collect()
    protocol.data_received(b"abc")
    assert protocol._stream_reader is None  # type: ignore[attr-defined]  # asyncio's own
    protocol.connection_lost(None)


async def test_drain_waits_while_the_peer_does_not_read(loop: iocp_loop.IocpEventLoop) -> None:
    go, served = asyncio.Event(), asyncio.Event()

    async def serve(reader: Any, writer: Any) -> None:
        await go.wait()
        while await reader.read(2**20):
            pass
        writer.close()
        await turns(5)
        served.set()

    async with connected(serve) as (_, writer):
        writer.write(b"x" * 2**24)
        draining = asyncio.ensure_future(writer.drain())
        await turns(5)
        assert not draining.done()
        go.set()
        await asyncio.wait_for(draining, 30)
        writer.close()
        await asyncio.wait_for(served.wait(), 30)


async def test_drain_tells_that_the_connection_is_lost(loop: iocp_loop.IocpEventLoop) -> None:
    async with connected(echo) as (_, writer):
        writer.transport.abort()
        with pytest.raises(ConnectionResetError):
            await writer.drain()


async def test_a_call_passes_for_a_coroutine(loop: iocp_loop.IocpEventLoop) -> None:
    reader = make_reader()
    reader.feed_data(b"abc")
    call: Any = reader.read(1)
    assert asyncio.iscoroutine(call)
    assert inspect.isawaitable(call)
    names = getattr(call, "__qualname__", ""), getattr(call, "__name__", "")
    assert names == ("StreamReader.read", "read")
    task = asyncio.create_task(call)
    assert "StreamReader.read" in repr(task)
    assert await task == b"a"
    with pytest.raises(RuntimeError, match="cannot reuse already awaited coroutine"):
        await call
    closed = reader.read(1)
    closed.close()
    with pytest.raises(RuntimeError, match="cannot reuse already awaited coroutine"):
        await closed
    thrown = reader.read(1)
    with pytest.raises(KeyError):
        thrown.throw(KeyError("x"))
    assert await asyncio.wait_for(reader.readexactly(2), 5) == b"bc"


async def test_a_call_that_nobody_awaits_is_warned_of(loop: iocp_loop.IocpEventLoop) -> None:
    reader = make_reader()
    with pytest.warns(RuntimeWarning, match=r"coroutine 'StreamReader\.read' was never awaited"):
        reader.read(1)


@only_native
async def test_a_call_that_is_dropped_while_it_waits_gives_its_place_up(loop: iocp_loop.IocpEventLoop) -> None:
    reader = make_reader()
    call = reader.read(1)
    call.send(None)
    assert reader._waiter is not None
    del call
    gc.collect()
    assert reader._waiter is None


async def test_a_reader_and_who_waits_for_it_are_collected(loop: iocp_loop.IocpEventLoop) -> None:
    reader = make_reader()
    call: Any = reader.read(1)
    call.send(None)
    reader.itself, reader.call = reader, call  # a circle
    gone = weakref.ref(reader)
    del reader, call
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gc.collect()
    assert gone() is None


@only_native
async def test_no_frame_of_asyncios_runs_for_a_message(loop: iocp_loop.IocpEventLoop) -> None:
    ran: list[str] = []

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename == asyncio.streams.__file__:
            ran.append(frame.f_code.co_name)

    async with connected(echo) as (reader, writer):
        writer.write(b"x")
        await reader.read(1)
        sys.setprofile(note)
        try:
            for _ in range(3):
                writer.write(b"line\n")
                await writer.drain()
                await reader.readline()
                writer.write(b"1234")
                await reader.readexactly(4)
        finally:
            sys.setprofile(None)
    assert ran == []


async def at_the_same_time(kind: Any, name: str, feed: bytes) -> Any:
    """What `name` brings once data, the end and an error have come before its task runs again."""
    reader = make_reader(kind)
    call = reader.readexactly(5) if name == "readexactly" else getattr(reader, name)()
    task = asyncio.create_task(call)
    await turns(1)
    reader.feed_data(feed)
    if len(feed) < 100:
        reader.feed_eof()
    reader.set_exception(OSError("lost"))
    result = await outcome(task)
    return result, bytes(reader._buffer), await outcome(reader.read(1))


@pytest.mark.parametrize("name", ["readexactly", "readline", "readuntil"])
@pytest.mark.parametrize("feed", [b"abc", b"x" * 100_000, b"x" * 100_000 + b"\n"])
async def test_what_came_before_an_error_has_its_turn_first(
    loop: iocp_loop.IocpEventLoop, name: str, feed: bytes
) -> None:
    expected = await at_the_same_time(asyncio.StreamReader, name, feed)
    assert await at_the_same_time(readers.StreamReader, name, feed) == expected


class Number:
    """What is a number to whoever asks."""

    def __repr__(self) -> str:
        return "Number()"

    def __index__(self) -> int:
        return 3

    def __lt__(self, other: int) -> bool:
        return other > 3

    def __gt__(self, other: int) -> bool:
        return other < 3


async def sizes(kind: Any, name: str, n: Any) -> Any:
    reader = make_reader(kind)
    reader.feed_data(b"abcdef")
    reader.feed_eof()
    call = getattr(reader, name)(n)  # raises nothing yet
    return await outcome(call)


@pytest.mark.parametrize("name", ["read", "readexactly"])
@pytest.mark.parametrize("n", [True, 0, -5, 2**100, -(2**100), 1.5, None, Number()], ids=repr)
async def test_any_size_is_as_asyncios(loop: iocp_loop.IocpEventLoop, name: str, n: Any) -> None:
    assert await sizes(readers.StreamReader, name, n) == await sizes(asyncio.StreamReader, name, n)


@pytest.mark.parametrize("limit", [math.inf, 2**100, sys.maxsize, 5.5])
async def test_a_limit_may_be_beyond_any_size(loop: iocp_loop.IocpEventLoop, limit: Any) -> None:
    reader = make_reader(limit=limit)
    pauses: list[str] = []
    reader.set_transport(type("T", (), {"pause_reading": lambda self: pauses.append("pause")})())
    reader.feed_data(b"abc\n")
    assert (await reader.readline(), pauses) == (b"abc\n", [])
    reader.feed_data(b"x" * 100)
    assert pauses == (["pause"] if limit < 100 else [])


async def test_a_call_that_is_awaited_already_is_refused_and_goes_on(loop: iocp_loop.IocpEventLoop) -> None:
    reader = make_reader()
    call = reader.read(3)

    async def wait() -> Any:
        return await call

    first = asyncio.create_task(wait())
    await turns(1)
    assert await outcome(wait()) == (RuntimeError, ("coroutine is being awaited already",))
    reader.feed_data(b"abc")
    assert await asyncio.wait_for(first, 5) == b"abc"


@pytest.mark.parametrize("kind", [readers.StreamReader, asyncio.StreamReader])
async def test_a_call_that_goes_on_too_early_waits_again(kind: Any, loop: iocp_loop.IocpEventLoop) -> None:
    reader = make_reader(kind)
    call = reader.read(3)
    future = call.send(None)
    future._asyncio_future_blocking = False  # as a task has it
    assert call.send(None) is future
    reader.feed_data(b"abc")
    with pytest.raises(StopIteration) as info:
        call.send(None)
    assert info.value.value == b"abc"


@pytest.mark.parametrize("kind", [readers.StreamReader, asyncio.StreamReader])
async def test_a_call_that_was_begun_in_a_wrong_way_can_be_begun(kind: Any, loop: iocp_loop.IocpEventLoop) -> None:
    reader = make_reader(kind)
    call = reader.read(3)
    with pytest.raises(TypeError, match="just-started"):
        call.send(1)
    reader.feed_data(b"abc")
    assert await call == b"abc"


@pytest.mark.parametrize("way", ["send", "throw", "close"])
@pytest.mark.parametrize("name", ["read", "readexactly"])
async def test_a_call_that_runs_is_not_entered_again(loop: iocp_loop.IocpEventLoop, name: str, way: str) -> None:
    reader = make_reader(limit=10)
    inner: list[str] = []

    class Transport:
        def pause_reading(self) -> None: ...

        def resume_reading(self) -> None:
            try:
                getattr(call, way)(*{"send": (None,), "throw": (KeyError("x"),)}.get(way, ()))
            except ValueError as exc:
                inner.append(str(exc))
            gc.collect()

    reader.set_transport(Transport())
    reader.feed_data(b"x" * 100)
    call = getattr(reader, name)(200)  # read takes all, readexactly resumes the transport and waits
    task = asyncio.create_task(call)
    await turns(2)
    reader.feed_data(b"y" * 100)
    assert len(await asyncio.wait_for(task, 5)) == (100 if name == "read" else 200)
    assert set(inner) == {"coroutine already executing"}


async def test_readline_calls_the_readuntil_of_a_subclass(loop: iocp_loop.IocpEventLoop) -> None:
    class Marked(readers.StreamReader):
        async def readuntil(self, separator: Any = b"\n") -> bytes:
            return b"> " + await super().readuntil(separator)

    reader = make_reader(Marked)
    reader.feed_data(b"one\n")
    assert await asyncio.wait_for(reader.readline(), 5) == b"> one\n"


async def test_a_call_that_is_dropped_leaves_the_context_of_an_error_alone(loop: iocp_loop.IocpEventLoop) -> None:
    def started() -> Any:
        call = make_reader().read(1)
        call.send(None)
        return call

    def fail() -> None:
        try:
            raise KeyError
        except KeyError:
            raise IndexError from None

    try:
        raise ArithmeticError
    except ArithmeticError:
        with pytest.raises(IndexError) as caught:
            print(started(), fail())
    assert isinstance(caught.value.__context__, KeyError)
