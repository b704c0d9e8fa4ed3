"""The stream transport: the order of calls, the ends of a connection, and what programs do wrong with them."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import os
import socket
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

import iocp_loop
from iocp_loop.operations import CANCELLING
from iocp_loop.ports.driver import cancelled_error
from iocp_loop.proactor import Proactor
from iocp_loop.transports import SocketTransport

from .rig import SlowDriver
from .support import (
    LIMIT,
    MUCH,
    WINE,
    Recorder,
    closed,
    connected,
    in_thread,
    read_all,
    read_exactly,
    reset,
    turns,
    until,
)

Loop = iocp_loop.IocpEventLoop
Pair = tuple[socket.socket, socket.socket]
Reports = list[dict[str, Any]]


# -- the order of calls ----------------------------------------------------------------------------


async def test_made_data_eof_lost_in_this_order(loop: Loop, pair: Pair) -> None:
    protocol = await connected(loop, pair)
    assert protocol.calls == ["connection_made"]
    pair[1].sendall(b"hello")
    pair[1].shutdown(socket.SHUT_WR)
    await until(lambda: "eof_received" in protocol.calls)
    assert protocol.data == b"hello"
    assert not protocol.finished  # it asked to stay open
    protocol.transport.write(b"answer")
    assert pair[1].recv(100) == b"answer"
    await closed(protocol)
    assert protocol.calls == ["connection_made", "data_received", "eof_received", "connection_lost"]
    assert protocol.lost is None
    assert pair[1].recv(100) == b""


async def test_connection_lost_comes_later_and_once(loop: Loop, pair: Pair) -> None:
    protocol = await connected(loop, pair)
    transport = protocol.transport
    transport.close()
    assert transport.is_closing()
    assert not protocol.finished  # never from within close()
    transport.close()
    transport.abort()
    await turns()
    assert protocol.calls.count("connection_lost") == 1
    transport.close()
    transport.abort()
    await turns()
    assert protocol.calls.count("connection_lost") == 1
    assert pair[0].fileno() == -1


async def test_a_protocol_that_does_not_stay_open_at_eof_is_closed(loop: Loop, pair: Pair) -> None:
    protocol = Recorder()
    protocol.keep_open_at_eof = False
    await connected(loop, pair, protocol)
    pair[1].close()
    await until(lambda: protocol.finished)
    assert protocol.calls == ["connection_made", "eof_received", "connection_lost"]
    assert protocol.lost is None


async def test_a_reset_is_what_connection_lost_tells(loop: Loop, pair: Pair) -> None:
    protocol = await connected(loop, pair)
    await turns()  # until it receives
    reset(pair[1])
    await until(lambda: protocol.finished)
    assert isinstance(protocol.lost, ConnectionResetError)
    assert protocol.calls == ["connection_made", "connection_lost"]


async def test_data_are_held_until_connection_made_has_run(loop: Loop, pair: Pair) -> None:
    pair[1].sendall(b"early")
    protocol = await connected(loop, pair)
    await until(lambda: protocol.data)
    assert protocol.calls == ["connection_made", "data_received"]
    await closed(protocol)


@pytest.mark.parametrize("method", ["close", "abort"])
async def test_close_in_connection_made(loop: Loop, pair: Pair, method: str) -> None:
    class Shy(Recorder):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            getattr(transport, method)()

    pair[1].sendall(b"never read")
    protocol = await connected(loop, pair, Shy())
    await until(lambda: protocol.finished)
    assert protocol.calls == ["connection_made", "connection_lost"]


@pytest.mark.parametrize("method", ["close", "abort"])
async def test_close_in_data_received_drops_what_comes_after(loop: Loop, pair: Pair, method: str) -> None:
    class Once(Recorder):
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            getattr(self.transport, method)()

    protocol = await connected(loop, pair, Once())
    pair[1].sendall(b"one")
    await until(lambda: protocol.data)
    try:
        pair[1].sendall(b"two")
    except ConnectionError:
        pass
    await until(lambda: protocol.finished)
    assert protocol.data == b"one"


async def test_a_transport_is_hashable_and_can_be_referred_to_weakly(loop: Loop, pair: Pair) -> None:
    protocol = await connected(loop, pair)
    assert protocol.transport in weakref.WeakSet([protocol.transport])
    await closed(protocol)


# -- the ends --------------------------------------------------------------------------------------


async def test_close_sends_what_is_queued_first(loop: Loop, pair: Pair) -> None:
    protocol = await connected(loop, pair)
    data = os.urandom(MUCH)
    protocol.transport.write(data)
    protocol.transport.close()
    await turns()
    assert not protocol.finished
    got: list[bytes] = []
    with in_thread(lambda: got.append(read_all(pair[1]))):
        await until(lambda: protocol.finished)
    assert got == [data]
    assert protocol.lost is None


async def test_abort_drops_what_is_queued(loop: Loop, pair: Pair) -> None:
    protocol = await connected(loop, pair)
    protocol.transport.write(bytes(MUCH))
    protocol.transport.abort()
    assert protocol.transport.is_closing()
    await until(lambda: protocol.finished)
    await turns()
    assert protocol.lost is None
    got = 0
    try:
        got = len(read_all(pair[1]))
    except ConnectionResetError:
        pass
    assert got < MUCH


async def test_abort_while_close_still_sends(loop: Loop, pair: Pair) -> None:
    protocol = await connected(loop, pair)
    protocol.transport.write(bytes(MUCH))
    protocol.transport.close()
    await asyncio.sleep(0.02)
    assert not protocol.finished
    protocol.transport.abort()
    await until(lambda: protocol.finished)


async def test_write_eof_closes_the_sending_side_alone(loop: Loop, pair: Pair) -> None:
    protocol = await connected(loop, pair)
    transport = protocol.transport
    assert transport.can_write_eof()
    data = os.urandom(MUCH)
    transport.write(data)
    transport.write_eof()
    transport.write_eof()
    with pytest.raises(RuntimeError, match="write_eof"):
        transport.write(b"too late")
    with pytest.raises(RuntimeError, match="write_eof"):
        transport.writelines([b"too late"])
    got: list[bytes] = []
    with in_thread(lambda: got.append(read_all(pair[1]))):
        await until(lambda: transport.get_write_buffer_size() == 0)
    assert got == [data]
    with pytest.raises(RuntimeError, match="write_eof"):
        transport.write(b"much too late")
    pair[1].sendall(b"still listening")
    await until(lambda: protocol.data == b"still listening")
    await closed(protocol)
    transport.write_eof()


async def test_write_eof_with_nothing_written(loop: Loop, pair: Pair) -> None:
    protocol = await connected(loop, pair)
    protocol.transport.write_eof()
    assert pair[1].recv(1) == b""
    await closed(protocol)


async def test_both_sides_half_close(loop: Loop, pair: Pair) -> None:
    protocol = Recorder()
    protocol.keep_open_at_eof = False
    await connected(loop, pair, protocol)
    protocol.transport.write_eof()
    assert pair[1].recv(1) == b""
    pair[1].sendall(b"bye")
    pair[1].shutdown(socket.SHUT_WR)
    await until(lambda: protocol.finished)
    assert protocol.data == b"bye"


async def test_write_to_a_peer_that_is_gone(loop: Loop, pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    protocol = await connected(loop, pair)
    protocol.transport.pause_reading()  # so that the write finds out
    reset(pair[1])
    await asyncio.sleep(0.02)
    for _ in range(3):
        protocol.transport.write(b"anybody there?")
    await until(lambda: protocol.finished)
    assert isinstance(protocol.lost, ConnectionError)
    assert not caplog.records
    for _ in range(10):
        protocol.transport.write(b"x")
        protocol.transport.writelines([b"x"])
    assert "socket.send() raised exception." in caplog.text
    assert protocol.transport.get_write_buffer_size() == 0


async def test_a_peer_that_resets_during_a_large_write(loop: Loop, pair: Pair) -> None:
    protocol = await connected(loop, pair)
    protocol.transport.write(bytes(MUCH))
    await turns()
    reset(pair[1])
    await until(lambda: protocol.finished)
    assert isinstance(protocol.lost, ConnectionError)
    assert protocol.transport.get_write_buffer_size() == 0
    assert protocol.calls.count("connection_lost") == 1


async def test_write_after_close_is_queued_or_ignored_but_never_raises(loop: Loop, pair: Pair) -> None:
    protocol = await connected(loop, pair)
    protocol.transport.close()
    protocol.transport.write(b"late")
    protocol.transport.writelines([b"later"])
    await until(lambda: protocol.finished)
    protocol.transport.write(b"latest")
    assert pair[1].recv(100) == b""


async def test_shutdown_by_the_peer_while_we_still_send(loop: Loop, pair: Pair) -> None:
    """A client that has sent its end gets all of a large answer."""
    protocol = await connected(loop, pair)
    pair[1].shutdown(socket.SHUT_WR)
    await until(lambda: "eof_received" in protocol.calls)
    data = os.urandom(MUCH)
    protocol.transport.write(data)
    protocol.transport.close()
    assert not protocol.finished
    got: list[bytes] = []
    with in_thread(lambda: got.append(read_all(pair[1]))):
        await until(lambda: protocol.finished)
    assert got == [data]


# -- a kernel that takes its time ------------------------------------------------------------------


@pytest.fixture
def slow(loop: Loop) -> Iterator[SlowDriver]:
    driver = SlowDriver()
    yield driver
    driver.close()


async def test_the_socket_stays_open_until_the_kernel_has_let_go_of_it(
    loop: Loop, slow: SlowDriver, pair: Pair
) -> None:
    protocol = Recorder()
    transport = SocketTransport(loop, Proactor(loop, slow), pair[0], protocol)
    await turns()
    receive = slow.only()
    transport.close()
    await turns()
    assert protocol.finished
    assert receive.state is CANCELLING
    assert pair[0].fileno() != -1
    slow.finish(receive, None, cancelled_error())
    assert pair[0].fileno() == -1


async def test_what_a_cancelled_receive_still_brings_is_not_for_the_protocol(
    loop: Loop, slow: SlowDriver, pair: Pair
) -> None:
    protocol = Recorder()
    transport = SocketTransport(loop, Proactor(loop, slow), pair[0], protocol)
    await turns()
    receive = slow.only()
    transport.abort()
    slow.ready.append((receive, b"too late", None))
    slow.finish(receive, b"")
    await turns()
    assert protocol.calls == ["connection_made", "connection_lost"]
    assert pair[0].fileno() == -1


async def test_what_comes_during_a_pause_and_right_after_it_keeps_its_order(
    loop: Loop, slow: SlowDriver, pair: Pair
) -> None:
    protocol = Recorder()
    transport = SocketTransport(loop, Proactor(loop, slow), pair[0], protocol)
    await turns()
    receive = slow.only()

    def arrive(data: bytes) -> None:
        slow.ready.append((receive, data, None))
        slow.dispatch()

    transport.pause_reading()
    for data in (b"1", b"2", b"3"):  # the kernel had them already
        arrive(data)
    assert not protocol.data
    transport.resume_reading()
    arrive(b"4")
    assert not protocol.data  # never by recursion
    await turns()
    arrive(b"5")
    assert protocol.data == b"12345"
    transport.abort()
    slow.finish(receive, None, cancelled_error())
    await turns()


# -- exceptions of protocols -----------------------------------------------------------------------


class Boom(Exception):
    """What the protocols here raise."""


@pytest.mark.parametrize("where", ["data_received", "eof_received"])
async def test_a_protocol_that_raises_while_receiving(loop: Loop, pair: Pair, reports: Reports, where: str) -> None:
    def boom(*args: Any) -> None:
        raise Boom

    protocol = Recorder()
    setattr(protocol, where, boom)
    await connected(loop, pair, protocol)
    pair[1].sendall(b"x")
    if where == "eof_received":
        pair[1].shutdown(socket.SHUT_WR)
    await until(lambda: protocol.finished)
    assert isinstance(protocol.lost, Boom)
    (report,) = reports
    reports.clear()
    assert isinstance(report["exception"], Boom)
    assert where in report["message"]
    assert report["protocol"] is protocol
    assert report["transport"] is protocol.transport


async def test_connection_made_raises(loop: Loop, pair: Pair, reports: Reports) -> None:
    class Wrong(Recorder):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            raise Boom

    protocol = Wrong()
    with pytest.raises(Boom):
        await connected(loop, pair, protocol)
    await until(lambda: protocol.finished)
    assert [type(report["exception"]) for report in reports] == [Boom]
    reports.clear()


async def test_connection_lost_raises(loop: Loop, pair: Pair, reports: Reports) -> None:
    class Wrong(Recorder):
        def connection_lost(self, exc: BaseException | None) -> None:
            super().connection_lost(exc)
            raise Boom

    protocol = await connected(loop, pair, Wrong())
    await closed(protocol)
    assert [type(report["exception"]) for report in reports] == [Boom]
    reports.clear()
    assert pair[0].fileno() == -1


@pytest.mark.parametrize("where", ["pause_writing", "resume_writing"])
async def test_a_protocol_that_raises_in_flow_control_goes_on(
    loop: Loop, pair: Pair, reports: Reports, where: str
) -> None:
    def boom() -> None:
        raise Boom

    protocol = Recorder()
    setattr(protocol, where, boom)
    await connected(loop, pair, protocol)
    data = os.urandom(MUCH)
    protocol.transport.write(data)
    got = bytearray()
    with in_thread(lambda: got.extend(read_exactly(pair[1], MUCH))):
        await until(lambda: protocol.transport.get_write_buffer_size() == 0)
    assert got == data
    (report,) = reports
    reports.clear()
    assert isinstance(report["exception"], Boom)
    assert where in report["message"]
    assert not protocol.transport.is_closing()
    await closed(protocol)


def test_an_exception_that_ends_the_loop_ends_it(loop: Loop, pair: Pair) -> None:
    class Fatal(Recorder):
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if data == b"stop":
                raise KeyboardInterrupt

    protocol = loop.run_until_complete(connected(loop, pair, Fatal()))
    pair[1].sendall(b"stop")
    with pytest.raises(KeyboardInterrupt):
        loop.run_until_complete(asyncio.sleep(LIMIT))
    pair[1].sendall(b"go on")
    loop.run_until_complete(until(lambda: protocol.data == b"stopgo on"))
    loop.run_until_complete(closed(protocol))


async def test_one_failing_connection_disturbs_no_other(loop: Loop, pair: Pair, reports: Reports) -> None:
    class Wrong(Recorder):
        def data_received(self, data: bytes) -> None:
            raise Boom

    ours, peer = socket.socketpair()
    with peer:
        ours.setblocking(False)
        good = await connected(loop, pair)
        bad = await connected(loop, (ours, peer), Wrong())
        peer.sendall(b"x")
        pair[1].sendall(b"y")
        await until(lambda: bad.finished and good.data == b"y")
        reports.clear()
        await closed(good)


# -- what is known about a transport ---------------------------------------------------------------


async def test_extra_info(loop: Loop, pair: Pair) -> None:
    sockname, peername, fd = pair[0].getsockname(), pair[0].getpeername(), pair[0].fileno()
    protocol = await connected(loop, pair)
    info = protocol.transport.get_extra_info
    assert info("sockname") == sockname
    assert info("peername") == peername
    assert info("socket").fileno() == fd
    assert info("nothing") is None
    assert info("nothing", 42) == 42
    assert str(fd) in repr(protocol.transport)
    await closed(protocol)
    assert info("sockname") == sockname
    assert info("peername") == peername
    assert "closed" in repr(protocol.transport)


@pytest.mark.skipif(WINE, reason="Wine tells of a reset that nobody waited for as the end of the stream")
async def test_a_peer_that_is_gone_before_the_transport_is_made(loop: Loop, pair: Pair) -> None:
    reset(pair[1])
    await asyncio.sleep(0.02)
    protocol = await connected(loop, pair)
    assert protocol.transport.get_extra_info("peername") is None
    await until(lambda: protocol.finished)
    assert isinstance(protocol.lost, ConnectionError)


async def test_data_are_received_in_the_context_of_the_connection(loop: Loop, pair: Pair) -> None:
    variable = contextvars.ContextVar("variable", default="outside")
    seen: list[tuple[str, str]] = []

    class Looking(Recorder):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            seen.append(("made", variable.get()))

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            seen.append(("data", variable.get()))

        def eof_received(self) -> bool:
            seen.append(("eof", variable.get()))
            return super().eof_received()

        def connection_lost(self, exc: BaseException | None) -> None:
            super().connection_lost(exc)
            seen.append(("lost", variable.get()))

    async def connect() -> Any:
        variable.set("inside")
        return await connected(loop, pair, Looking())

    protocol = await asyncio.create_task(connect())
    pair[1].sendall(b"x")
    pair[1].shutdown(socket.SHUT_WR)
    await until(lambda: "eof_received" in protocol.calls)
    assert variable.get() == "outside"
    protocol.transport.abort()
    await until(lambda: protocol.finished)
    assert seen[:3] == [("made", "inside"), ("data", "inside"), ("eof", "inside")]


# -- transports that nobody closed -----------------------------------------------------------------


def test_a_transport_that_nobody_closed_warns_and_closes_its_socket(driver: str, pair: Pair) -> None:
    loop = iocp_loop.new_event_loop(driver)
    transport, _ = loop.run_until_complete(loop.create_connection(asyncio.Protocol, sock=pair[0]))
    text = repr(transport)
    loop.close()
    kept = [transport, _]
    del transport, _

    def let_go() -> None:
        kept.clear()
        gc.collect()

    with pytest.warns(ResourceWarning, match="unclosed transport") as caught:
        let_go()
    assert text.split()[0] in str(caught[0].message)
    assert pair[1].recv(1) == b""


def test_a_transport_closed_too_late_for_the_loop(driver: str, pair: Pair) -> None:
    """Nothing but a warning comes of it: no "Event loop is closed" out of a destructor."""
    loop = iocp_loop.new_event_loop(driver)
    transport, _ = loop.run_until_complete(loop.create_connection(asyncio.Protocol, sock=pair[0]))
    transport.close()
    loop.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        del transport, _
        gc.collect()


async def test_a_closed_transport_does_not_warn(loop: Loop, pair: Pair) -> None:
    protocol = await connected(loop, pair)
    await closed(protocol)
    del protocol
    gc.collect()
