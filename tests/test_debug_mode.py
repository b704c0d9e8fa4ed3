"""Debug mode, warnings about what was left open, and the contexts that callbacks run in."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

import iocp_loop

from .support import Recorder, run_python, tcp_pair, turns, until

Loop = iocp_loop.IocpEventLoop


@pytest.fixture
def debug(loop: Loop) -> Iterator[Loop]:
    """The loop of the test in debug mode, with a low limit for slow callbacks, in seconds."""
    loop.set_debug(True)
    loop.slow_callback_duration = 0.05
    yield loop
    loop.set_debug(False)


def slow(*_: Any) -> None:
    time.sleep(0.06)


# --------------------------------------------------------------------------------------------------
# Slow callbacks
# --------------------------------------------------------------------------------------------------


async def test_a_slow_handle(debug: Loop, caplog: pytest.LogCaptureFixture) -> None:
    debug.call_soon(slow)
    await turns()
    assert "Executing <Handle" in caplog.text
    assert "slow" in caplog.text


class SlowProtocol(Recorder):
    """Takes its time over data."""

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        slow()


async def test_slow_data_received(debug: Loop, caplog: pytest.LogCaptureFixture) -> None:
    """No Handle stands between the port and the protocol; debug mode sees it all the same."""
    ours, peer = tcp_pair()
    with peer:
        transport, protocol = await debug.create_connection(SlowProtocol, sock=ours)
        caplog.clear()
        peer.sendall(b"x" * 1000)
        await until(lambda: protocol.data)
        assert "SlowProtocol.data_received" in caplog.text
        assert "seconds" in caplog.text
        assert "x" * 100 not in caplog.text
        transport.close()
        await until(lambda: protocol.finished)


class SlowBufferedProtocol(asyncio.BufferedProtocol):
    def __init__(self) -> None:
        self.count = 0

    def get_buffer(self, sizehint: int) -> bytearray:
        return bytearray(100)

    def buffer_updated(self, nbytes: int) -> None:
        self.count += nbytes
        slow()


async def test_slow_buffer_updated(debug: Loop, caplog: pytest.LogCaptureFixture) -> None:
    ours, peer = tcp_pair()
    with peer:
        transport, protocol = await debug.create_connection(SlowBufferedProtocol, sock=ours)
        caplog.clear()
        peer.sendall(b"x")
        await until(lambda: protocol.count)
        assert "SlowBufferedProtocol.buffer_updated" in caplog.text
        transport.close()
        await turns(10)


class SlowDatagrams(asyncio.DatagramProtocol):
    count = 0

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.count += 1
        slow()


async def test_slow_datagram_received(debug: Loop, caplog: pytest.LogCaptureFixture) -> None:
    transport, protocol = await debug.create_datagram_endpoint(SlowDatagrams, local_addr=("127.0.0.1", 0))
    caplog.clear()
    transport.sendto(b"x", transport.get_extra_info("sockname"))
    await until(lambda: protocol.count)
    assert "SlowDatagrams.datagram_received" in caplog.text
    transport.close()
    await turns(10)


async def test_a_slow_protocol_factory(debug: Loop, caplog: pytest.LogCaptureFixture) -> None:
    made: list[Recorder] = []

    def factory() -> Recorder:
        slow()
        made.append(Recorder())
        return made[-1]

    server = await debug.create_server(factory, "127.0.0.1", 0)
    caplog.clear()
    with socket.create_connection(server.sockets[0].getsockname()):
        await until(lambda: made and made[0].calls)
    assert "Executing" in caplog.text
    made[0].transport.close()
    await until(lambda: made[0].finished)
    server.close()
    await server.wait_closed()


async def test_nothing_is_measured_outside_debug_mode(loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    loop.slow_callback_duration = 0.01
    ours, peer = tcp_pair()
    with peer:
        transport, protocol = await loop.create_connection(SlowProtocol, sock=ours)
        peer.sendall(b"x")
        await until(lambda: protocol.data)
        transport.close()
        await until(lambda: protocol.finished)
    assert not caplog.records


async def test_an_exception_passes_through_the_measuring(debug: Loop, reports: list[dict[str, Any]]) -> None:
    class Faulty(Recorder):
        def data_received(self, data: bytes) -> None:
            raise ZeroDivisionError

    ours, peer = tcp_pair()
    with peer:
        _, protocol = await debug.create_connection(Faulty, sock=ours)
        peer.sendall(b"x")
        await until(lambda: protocol.finished)
    assert isinstance(reports.pop()["exception"], ZeroDivisionError)


# --------------------------------------------------------------------------------------------------
# The wrong thread, the wrong socket
# --------------------------------------------------------------------------------------------------


async def test_calls_from_another_thread(debug: Loop) -> None:
    one, other = socket.socketpair()
    with one, other:
        calls = [
            lambda: debug.call_soon(print),
            lambda: debug.call_later(0, print),
            lambda: debug.call_at(0, print),
            lambda: debug.add_reader(one, print),
            lambda: debug.add_writer(one, print),
            lambda: debug.remove_reader(one),
            lambda: debug.remove_writer(one),
        ]

        def work() -> None:
            for call in calls:
                with pytest.raises(RuntimeError, match="Non-thread-safe operation"):
                    call()

        await asyncio.to_thread(work)


async def test_blocking_sockets(debug: Loop) -> None:
    one, other = socket.socketpair()
    with one, other:
        for make in (
            lambda: debug.sock_recv(one, 1),
            lambda: debug.sock_recv_into(one, bytearray(1)),
            lambda: debug.sock_recvfrom(one, 1),
            lambda: debug.sock_recvfrom_into(one, bytearray(1)),
            lambda: debug.sock_sendall(one, b"x"),
            lambda: debug.sock_sendto(one, b"x", "nowhere"),
            lambda: debug.sock_connect(one, "nowhere"),
            lambda: debug.sock_accept(one),
        ):
            with pytest.raises(ValueError, match="non-blocking"):
                await make()


def test_coroutines_that_nobody_awaits(driver: str) -> None:
    async def forgotten() -> None: ...

    async def main() -> None:
        forgotten()  # type: ignore[unused-coroutine]  # what the test is about
        gc.collect()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        iocp_loop.run(main(), driver=driver, debug=True)
    text = "".join(str(warning.message) for warning in caught)
    assert "was never awaited" in text
    assert "Coroutine created at" in text


def test_a_loop_that_nobody_closed(driver: str) -> None:
    loop = iocp_loop.new_event_loop(driver)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del loop
        gc.collect()
    assert any("unclosed event loop" in str(warning.message) for warning in caught)


# --------------------------------------------------------------------------------------------------
# Transports that nobody closed
# --------------------------------------------------------------------------------------------------


def text_of_warnings(driver: str, debug: bool) -> str:
    """What is said when a connection is thrown away with its loop."""
    loop = iocp_loop.new_event_loop(driver)
    loop.set_debug(debug)
    ours, peer = tcp_pair()

    async def make_a_connection_and_forget_it(sock: socket.socket) -> Any:
        return await loop.create_connection(asyncio.Protocol, sock=sock)

    with peer:
        made = loop.run_until_complete(make_a_connection_and_forget_it(ours))
        loop.close()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            del made
            gc.collect()
            text = "\n".join(str(warning.message) for warning in caught)
            caught.clear()  # they refer to what they are about
        assert ours.fileno() == -1
    return text


def test_the_warning_tells_where_a_transport_was_made(driver: str) -> None:
    text = text_of_warnings(driver, debug=True)
    assert "unclosed transport <SocketTransport open" in text
    assert "Object created at (most recent call last):" in text
    assert "make_a_connection_and_forget_it" in text
    assert "return await loop.create_connection" in text


def test_outside_debug_mode_the_warning_is_short(driver: str) -> None:
    text = text_of_warnings(driver, debug=False)
    assert "unclosed transport <SocketTransport open" in text
    assert "Object created" not in text


def test_a_transport_that_outlives_its_loop_does_nothing_but_warn(driver: str) -> None:
    """gh-92841, gh-83413: "Event loop is closed", printed from a __del__ long after."""
    done = run_python(
        """
        import asyncio, gc, sys, warnings
        import iocp_loop

        async def main():
            server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer.write(b"x" * 10_000_000)
            return server, reader, writer

        warnings.simplefilter("always")
        loop = iocp_loop.new_event_loop(sys.argv[1])
        left = loop.run_until_complete(main())
        loop.close()
        del left, loop
        gc.collect()
        """,
        driver,
    )
    assert "ResourceWarning: unclosed" in done.stderr
    assert "Event loop is closed" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert "Traceback" not in done.stderr


# --------------------------------------------------------------------------------------------------
# Contexts
# --------------------------------------------------------------------------------------------------

variable = contextvars.ContextVar("variable", default="unset")


class ContextRecorder(Recorder):
    """Notes the value of the variable at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, str] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.seen["connection_made"] = variable.get()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.seen["data_received"] = variable.get()
        variable.set("set by data_received")

    def eof_received(self) -> bool:
        self.seen["eof_received"] = variable.get()
        return super().eof_received()


@pytest.mark.parametrize("in_debug_mode", [False, True])
async def test_a_client_protocol_runs_in_the_context_that_made_it(loop: Loop, in_debug_mode: bool) -> None:
    loop.set_debug(in_debug_mode)
    variable.set("the client's")
    ours, peer = tcp_pair()
    with peer:
        transport, protocol = await loop.create_connection(ContextRecorder, sock=ours)
        variable.set("later")
        peer.sendall(b"x")
        await until(lambda: protocol.data)
        peer.shutdown(socket.SHUT_WR)
        await until(lambda: "eof_received" in protocol.calls)
        transport.close()
        await until(lambda: protocol.finished)
    loop.set_debug(False)
    assert protocol.seen["connection_made"] == "the client's"
    assert protocol.seen["data_received"] == "the client's"
    # A reader's Handle has one context for all its calls.
    assert protocol.seen["eof_received"] == "set by data_received"
    assert variable.get() == "later"


async def test_a_servers_protocols_run_in_copies_of_its_context(loop: Loop) -> None:
    made: list[ContextRecorder] = []
    in_factory: list[str] = []

    def factory() -> ContextRecorder:
        in_factory.append(variable.get())
        made.append(ContextRecorder())
        return made[-1]

    variable.set("the server's")
    server = await loop.create_server(factory, "127.0.0.1", 0)
    variable.set("later")
    for number in range(2):
        with socket.create_connection(server.sockets[0].getsockname()) as client:
            client.sendall(b"x")
            await until(lambda number=number: len(made) > number and made[number].data)  # type: ignore[misc]  # binds it
        await until(lambda number=number: "eof_received" in made[number].calls)  # type: ignore[misc]  # as above
        made[number].transport.close()
    assert in_factory == ["the server's"] * 2
    assert [protocol.seen["data_received"] for protocol in made] == ["the server's"] * 2
    server.close()
    await server.wait_closed()
    await until(lambda: all(protocol.finished for protocol in made))


async def test_a_protocol_factory_leaves_no_trace_for_the_next_connection(loop: Loop) -> None:
    made: list[ContextRecorder] = []
    in_factory: list[str] = []

    def factory() -> ContextRecorder:
        in_factory.append(variable.get())
        variable.set("the factory's")
        made.append(ContextRecorder())
        return made[-1]

    variable.set("the server's")
    server = await loop.create_server(factory, "127.0.0.1", 0)
    for _ in range(2):
        with socket.create_connection(server.sockets[0].getsockname()) as client:
            client.sendall(b"x")
            await until(lambda: made and made[-1].data and "eof_received" not in made[-1].calls)
        await until(lambda: "eof_received" in made[-1].calls)
        made[-1].transport.close()
        await until(lambda: made[-1].finished)
    server.close()
    await server.wait_closed()
    assert in_factory == ["the server's"] * 2
    for protocol in made:
        assert protocol.seen["connection_made"] == protocol.seen["data_received"] == "the factory's"


@pytest.mark.skipif(sys.version_info < (3, 15), reason="since Python 3.15 a transport has one context for everything")
async def test_the_ends_come_in_the_same_context(loop: Loop) -> None:
    class Whole(ContextRecorder):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            variable.set("set by connection_made")

        def connection_lost(self, exc: BaseException | None) -> None:
            super().connection_lost(exc)
            self.seen["connection_lost"] = variable.get()

    ours, peer = tcp_pair()
    with peer:
        transport, protocol = await loop.create_connection(Whole, sock=ours)
        peer.sendall(b"x")
        await until(lambda: protocol.data)
        transport.close()
        await until(lambda: protocol.finished)
    assert protocol.seen["data_received"] == "set by connection_made"
    assert protocol.seen["connection_lost"] == "set by data_received"


async def test_datagrams_arrive_in_the_context_that_made_the_endpoint(loop: Loop) -> None:
    seen: list[str] = []

    class Datagrams(asyncio.DatagramProtocol):
        def datagram_received(self, data: bytes, addr: Any) -> None:
            seen.append(variable.get())

    variable.set("the endpoint's")
    transport, _ = await loop.create_datagram_endpoint(Datagrams, local_addr=("127.0.0.1", 0))
    variable.set("later")
    transport.sendto(b"x", transport.get_extra_info("sockname"))
    await until(lambda: seen)
    assert seen == ["the endpoint's"]
    transport.close()
    await turns(10)
