"""Stream transports that were made by half, twice or with odd arguments, and odd answers of protocols.

They lead to an exception, and neither to a crash nor to anything that stays behind.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import socket
from typing import Any

import pytest

import iocp_loop
from iocp_loop import native
from iocp_loop.operations import Receive
from iocp_loop.transports import SocketTransport

from .support import LIMIT, Recorder, closed, connected, turns, until

Loop = iocp_loop.IocpEventLoop
Pair = tuple[socket.socket, socket.socket]
Reports = list[dict[str, Any]]

natively = pytest.mark.skipif(native.hot is None, reason=f"the native tier is not in force: {native.why_not}")


class OnPurpose(Exception):
    """Raised by the protocols here."""


class Unasked:
    """Does not tell what it is."""

    @property  # type: ignore[misc]  # that is the point
    def __class__(self) -> Any:
        raise OnPurpose


CALLS = {
    "_arm_receive": (),
    "_begin": (None,),
    "_call_connection_lost": (None,),
    "_lose_connection": (None,),
    "_release": (),
    "close": (),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_transport_without_its_constructor(name: str, pair: Pair) -> None:
    transport: Any = SocketTransport.__new__(SocketTransport)
    transport._sock = pair[0]
    with pytest.raises(AttributeError):
        getattr(transport, name)(*CALLS[name])


def test_a_life_is_not_for_subclasses_to_change() -> None:
    """The native tier has its steps in C, which calls no method of a class: so neither tier takes one."""
    with pytest.raises(TypeError, match="Own may not replace _lose_connection, _stop_receiving"):

        class Own(SocketTransport):
            def _lose_connection(self, exc: BaseException | None) -> None: ...
            def _stop_receiving(self) -> None: ...


async def test_a_transport_whose_proactor_was_taken_away(loop: Loop, pair: Pair) -> None:
    protocol = await connected(loop, pair)
    transport: Any = protocol.transport
    proactor = transport._proactor
    del transport._proactor
    with pytest.raises(AttributeError, match="_proactor"):
        transport._stop_receiving()
    transport._proactor = proactor
    await closed(protocol)


@natively
async def test_what_is_no_operation_is_not_dropped(loop: Loop, pair: Pair) -> None:
    protocol = await connected(loop, pair)
    transport: Any = protocol.transport
    driver: Any = loop._proactor.driver
    for name in ("drop", "_cancel_alone"):
        if hasattr(driver, name):
            with pytest.raises(TypeError, match="an operation is expected"):
                getattr(driver, name)("x")
    await closed(protocol)
    assert transport.is_closing()


@natively
@pytest.mark.parametrize("name", ["_kept", "_lines"])
async def test_a_proactor_whose_tables_were_replaced(name: str, loop: Loop, pair: Pair) -> None:
    proactor: Any = loop._proactor
    table = getattr(proactor, name)
    setattr(proactor, name, [])
    with pytest.raises(TypeError, match="must be dicts"):
        proactor.receive_stream(pair[0], print)
    setattr(proactor, name, table)


async def test_a_second_constructor_leaves_no_way_to_a_strange_descriptor(loop: Loop, pair: Pair) -> None:
    """What it lets go of may look at the transport, which has no socket at that moment."""
    seen = []

    class Last(asyncio.Protocol):
        def __del__(self) -> None:
            seen.append(transport._sock is None and transport._direct)

    protocol = await connected(loop, pair)
    transport: Any = protocol.transport
    await closed(protocol)
    transport._direct = True
    transport.set_protocol(Last())
    protocol = Recorder()
    pair[1].setblocking(False)
    transport.__init__(loop, loop._proactor, pair[1], protocol)
    gc.collect()
    assert seen == [False]
    await until(lambda: protocol.calls)
    await closed(protocol)


@natively
async def test_no_name_is_read_out_of_any_bytes(loop: Loop, pair: Pair) -> None:
    extra: Any = b"\2\0" + b"x" * 100_000
    protocol = Recorder()
    transport = SocketTransport(loop, loop._proactor, pair[0], protocol, None, extra)
    assert transport.get_extra_info("peername") == pair[1].getsockname()
    await until(lambda: protocol.calls)
    await closed(protocol)


async def test_a_protocol_that_does_not_tell_what_it_is(loop: Loop, pair: Pair) -> None:
    protocol = await connected(loop, pair)
    odd: Any = Unasked()
    with pytest.raises(OnPurpose):
        protocol.transport.set_protocol(odd)
    assert protocol.transport.get_protocol() in (protocol, odd)
    protocol.transport.set_protocol(protocol)
    await closed(protocol)


# It is half made, so unclosed.  No catch_warnings within: without a GIL that holds in the context of the task alone.
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
async def test_a_server_forgets_a_transport_that_could_not_be_made(loop: Loop, reports: Reports) -> None:
    factory: Any = Unasked
    server: Any = await loop.create_server(factory, "127.0.0.1", 0)
    with socket.create_connection(server.sockets[0].getsockname()):
        await until(lambda: reports)
        assert isinstance(reports.pop()["exception"], OnPurpose)
        gc.collect()
    assert not (server._clients if hasattr(server, "_clients") else server._active_count)
    server.close()
    await server.wait_closed()


class Refusing(socket.socket):
    """Can't be closed: its descriptor is gone already."""

    def close(self) -> None:
        super().close()
        raise OSError(errno.EBADF, "on purpose")


@pytest.mark.parametrize("raises", [False, True])
async def test_a_server_forgets_a_connection_whose_end_fails(
    raises: bool, loop: Loop, pair: Pair, reports: Reports
) -> None:
    """Every step of the end is taken, whatever comes out of the ones before; their exceptions are reported as one."""

    class Odd(Recorder):
        def connection_lost(self, exc: BaseException | None) -> None:
            super().connection_lost(exc)
            if raises:
                raise OnPurpose

    server = await loop.create_server(Recorder, "127.0.0.1", 0)
    sock = Refusing(fileno=pair[0].detach())
    sock.setblocking(False)
    protocol: Any = Odd()
    loop._make_socket_transport(sock, protocol, server=server)
    await until(lambda: protocol.calls)
    protocol.transport.close()
    await until(lambda: reports)
    assert not (server._clients if hasattr(server, "_clients") else server._active_count)  # type: ignore[attr-defined]
    error = reports.pop()["exception"]
    assert isinstance(error, OSError)
    assert error.errno == errno.EBADF
    assert isinstance(error.__context__, OnPurpose) is raises
    server.close()
    await asyncio.wait_for(server.wait_closed(), LIMIT)


async def test_the_end_comes_although_what_is_in_flight_can_not_be_stopped(loop: Loop, pair: Pair) -> None:
    protocol = await connected(loop, pair)
    transport: Any = protocol.transport
    transport._file = loop.create_future()

    def fail_file() -> None:
        raise KeyboardInterrupt

    transport._fail_file = fail_file
    with pytest.raises(KeyboardInterrupt):
        transport.abort()
    await until(lambda: protocol.finished)
    assert protocol.lost is None
    transport._file = None


async def test_a_listener_whose_parts_are_taken_away(loop: Loop) -> None:
    protocol = Recorder()

    def factory() -> Recorder:
        del listener._loop, listener._proactor, listener._serves
        return protocol

    server = await loop.create_server(factory, "127.0.0.1", 0)
    (listener,) = list[Any](loop._listeners.values())
    with socket.create_connection(server.sockets[0].getsockname()):
        await until(lambda: protocol.calls)
        await closed(protocol)
        listener._proactor = loop._proactor
        server.close()
        await turns()


@pytest.mark.parametrize("value", [None, 5, object()])
async def test_what_was_accepted_is_a_pair(value: object, loop: Loop) -> None:
    server = await loop.create_server(Recorder, "127.0.0.1", 0)
    (listener,) = list[Any](loop._listeners.values())
    with pytest.raises(TypeError):
        listener._accepted(value, None)
    server.close()
    await server.wait_closed()


async def test_an_answer_to_the_end_that_can_not_be_asked(loop: Loop, pair: Pair, reports: Reports) -> None:
    class Answer:
        def __bool__(self) -> bool:
            raise OnPurpose

    class Odd(Recorder):
        def eof_received(self) -> Any:
            return Answer()

    protocol = await connected(loop, pair, Odd())
    pair[1].shutdown(socket.SHUT_WR)
    await until(lambda: protocol.finished)
    assert isinstance(protocol.lost, OnPurpose)
    assert "eof_received() call failed" in reports.pop()["message"]


async def test_nothing_comes_after_close_of_what_was_kept_for_the_stream(loop: Loop, pair: Pair) -> None:
    """What a cancelled ``sock_recv`` had left stands on the driver's ready queue when the transport is closed."""
    loop._proactor.keep_value(Receive(pair[0], 10), b"kept")
    protocol = Recorder()
    transport = SocketTransport(loop, loop._proactor, pair[0], protocol)
    loop.call_soon(transport.close)  # in the turn in which it begins
    await until(lambda: protocol.finished)
    assert protocol.calls == ["connection_made", "connection_lost"]


async def test_a_socket_of_a_class_of_its_own_is_closed_once(loop: Loop, pair: Pair) -> None:
    closes = []

    class Own(socket.socket):
        def close(self) -> None:
            closes.append(self)
            super().close()

    sock = Own(fileno=pair[0].detach())
    sock.setblocking(False)
    protocol = await connected(loop, (sock, pair[1]))
    await turns()
    protocol.transport.write(b"x" * 8_000_000)
    protocol.transport.abort()
    await until(lambda: not loop._proactor.in_flight)
    await turns()
    assert closes == [sock]
