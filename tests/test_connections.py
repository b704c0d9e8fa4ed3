"""create_connection and create_server with all that they offer: addresses, happy eyeballs, options, dual stack."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import inspect
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import iocp_loop

from .support import WINDOWS, Echo, Recorder, listening_socket, run_python, tcp_pair, until

Loop = iocp_loop.IocpEventLoop

Resolve = Callable[..., Any]


@pytest.fixture
def resolve(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``resolve(*addresses)``: what the name "somewhere" stands for from now on."""

    def use(*addresses: tuple[Any, ...]) -> None:
        async def getaddrinfo(*_: Any, **__: Any) -> list[tuple[Any, ...]]:
            return [
                (
                    socket.AF_INET6 if ":" in address[0] else socket.AF_INET,
                    socket.SOCK_STREAM,
                    socket.IPPROTO_TCP,
                    "",
                    address,
                )
                for address in addresses
            ]

        monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)

    return use


@pytest.fixture
def refused(no_leak: None) -> tuple[str, int]:
    """An address where nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        address: tuple[str, int] = sock.getsockname()
    return address


@pytest.fixture
def silent(no_leak: None) -> Iterator[tuple[str, int]]:
    """An address that does not answer: a listener with a full backlog."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(listening_socket(backlog=0))
        for _ in range(4):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        time.sleep(0.01)
        yield listener.getsockname()


async def close(*protocols: Recorder) -> None:
    for protocol in protocols:
        protocol.transport.close()
        await until(lambda protocol=protocol: protocol.finished)  # type: ignore[misc]  # a default binds it


async def end(server: asyncio.Server) -> None:
    server.close()
    await server.wait_closed()


# --------------------------------------------------------------------------------------------------
# Clients
# --------------------------------------------------------------------------------------------------


async def test_the_next_address_is_tried(
    loop: Loop, resolve: Resolve, refused: tuple[str, int], listener: socket.socket
) -> None:
    resolve(refused, refused, listener.getsockname())
    _, protocol = await loop.create_connection(Recorder, "somewhere", 0)
    assert protocol.transport.get_extra_info("peername") == listener.getsockname()
    await close(protocol)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the answer of the own machine is waited for")
async def test_a_connection_within_the_own_machine_needs_no_operation(
    loop: Loop, refused: tuple[str, int], listener: socket.socket
) -> None:
    before = loop.stats().operations
    with socket.socket() as sock:
        sock.setblocking(False)
        await loop.sock_connect(sock, listener.getsockname())
        assert sock.getpeername() == listener.getsockname()
    with socket.socket() as sock:
        sock.setblocking(False)
        with pytest.raises(ConnectionRefusedError, match=rf"Connect call failed .*{refused[1]}"):
            await loop.sock_connect(sock, refused)
    assert loop.stats().operations == before


async def test_who_has_begun_to_connect_by_himself_is_told_of_the_outcome(loop: Loop, listener: socket.socket) -> None:
    if loop.driver == "iocp":
        pytest.skip("there the system begins, and nobody else can have")
    with socket.socket() as sock:
        sock.setblocking(False)
        sock.connect_ex(listener.getsockname())
        await loop._proactor.connect(sock, listener.getsockname(), begun=True)
        assert sock.getpeername() == listener.getsockname()


async def test_no_address_answers(loop: Loop, resolve: Resolve, refused: tuple[str, int]) -> None:
    resolve(refused)
    with pytest.raises(ConnectionRefusedError) as caught:
        await loop.create_connection(Recorder, "somewhere", 0)
    assert str(refused[1]) in str(caught.value)
    resolve(refused, (refused[0], 1))
    with pytest.raises(OSError, match="Multiple exceptions") as several:
        await loop.create_connection(Recorder, "somewhere", 0)
    assert str(refused[1]) in str(several.value)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="all_errors is new in Python 3.12")
async def test_all_errors(loop: Loop, resolve: Resolve, refused: tuple[str, int]) -> None:
    resolve(refused, (refused[0], 1))
    new: Any = {"all_errors": True}  # which types for older Pythons do not know
    with pytest.raises(ExceptionGroup) as caught:
        await loop.create_connection(Recorder, "somewhere", 0, **new)
    assert [type(error) for error in caught.value.exceptions] == [ConnectionRefusedError] * 2


async def test_happy_eyeballs(loop: Loop, resolve: Resolve, silent: tuple[str, int], listener: socket.socket) -> None:
    """The second address is tried while the first keeps silent, and the first attempt leaves nothing behind."""
    resolve(silent, listener.getsockname())
    start = time.monotonic()
    _, protocol = await loop.create_connection(Recorder, "somewhere", 0, happy_eyeballs_delay=0.05)
    assert 0.04 < time.monotonic() - start < 0.9  # the kernel asks a silent address again after a second
    assert protocol.transport.get_extra_info("peername") == listener.getsockname()
    await close(protocol)


async def test_without_it_the_first_address_decides(loop: Loop, resolve: Resolve, silent: tuple[str, int]) -> None:
    resolve(silent, silent)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(loop.create_connection(Recorder, "somewhere", 0), 0.1)
    await until(lambda: not loop.stats().in_flight)


async def test_interleave(loop: Loop, resolve: Resolve, refused: tuple[str, int]) -> None:
    """Families take turns: with one address of each first, the fourth of five is the second of its family."""
    tried: list[str] = []
    connect = loop.sock_connect

    async def sock_connect(sock: socket.socket, address: Any) -> None:
        tried.append(address[0])
        await connect(sock, refused) if sock.family == socket.AF_INET else None
        raise ConnectionRefusedError(errno.ECONNREFUSED, "nobody there")

    loop.sock_connect = sock_connect  # type: ignore[method-assign]  # what the test listens in by
    resolve(("::1", 1, 0, 0), ("::2", 1, 0, 0), ("::3", 1, 0, 0), ("127.0.0.1", 1), ("127.0.0.2", 1))
    with pytest.raises(OSError):
        await loop.create_connection(Recorder, "somewhere", 0, interleave=1)
    assert tried == ["::1", "127.0.0.1", "::2", "127.0.0.2", "::3"]


async def test_local_address(loop: Loop, listener: socket.socket) -> None:
    host, port = listener.getsockname()
    _, protocol = await loop.create_connection(Recorder, host, port, local_addr=("127.0.0.3", 0))
    conn, peer = await loop.sock_accept(listener)
    conn.close()
    assert peer[0] == "127.0.0.3"
    assert protocol.transport.get_extra_info("sockname") == peer
    await close(protocol)


async def test_a_local_address_that_is_taken(loop: Loop, listener: socket.socket) -> None:
    host, port = listener.getsockname()
    with pytest.raises(OSError) as caught:
        await loop.create_connection(Recorder, host, port, local_addr=(host, port))
    assert caught.value.errno == errno.EADDRINUSE


async def test_a_connected_socket(loop: Loop) -> None:
    ours, peer = tcp_pair()
    ours.setblocking(True)
    with peer:
        _, protocol = await loop.create_connection(Recorder, sock=ours)
        assert ours.gettimeout() == 0
        peer.sendall(b"hello")
        await until(lambda: protocol.data == b"hello")
        await close(protocol)


async def test_arguments_that_do_not_fit(loop: Loop) -> None:
    ours, peer = tcp_pair()
    with ours, peer:
        with pytest.raises(ValueError, match="can not be specified at the same time"):
            await loop.create_connection(Recorder, "127.0.0.1", 1, sock=ours)  # type: ignore[call-overload]  # the subject
        with pytest.raises(ValueError, match="host and port was not specified"):
            await loop.create_connection(Recorder)
        with pytest.raises(ValueError, match="server_hostname is only meaningful with ssl"):
            await loop.create_connection(Recorder, "127.0.0.1", 1, server_hostname="x")
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
        pytest.raises(ValueError, match="Stream Socket"),
    ):
        await loop.create_connection(Recorder, sock=datagrams)


async def test_a_protocol_factory_that_raises(loop: Loop, listener: socket.socket) -> None:
    def faulty() -> Recorder:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await loop.create_connection(faulty, *listener.getsockname())
    ours, peer = tcp_pair()
    with peer:
        with pytest.raises(ZeroDivisionError):
            await loop.create_connection(faulty, sock=ours)
        assert ours.fileno() == -1
    assert not loop.stats().in_flight


async def test_connection_made_that_raises(loop: Loop, reports: list[dict[str, Any]]) -> None:
    """Unlike asyncio's own loops, which report it and go on with the connection."""

    class Faulty(Recorder):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            raise ZeroDivisionError

    ours, peer = tcp_pair()
    protocol = Faulty()
    with peer:
        with pytest.raises(ZeroDivisionError):
            await loop.create_connection(lambda: protocol, sock=ours)
        await until(lambda: protocol.finished)
        assert await asyncio.to_thread(peer.recv, 1) == b""
    assert isinstance(protocol.lost, ZeroDivisionError)
    assert isinstance(reports.pop()["exception"], ZeroDivisionError)


async def test_cancelling_a_connection_closes_its_socket(loop: Loop, silent: tuple[str, int]) -> None:
    task = asyncio.create_task(loop.create_connection(Recorder, *silent))
    await until(lambda: loop.stats().in_flight)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: not loop.stats().in_flight)


# --------------------------------------------------------------------------------------------------
# Servers
# --------------------------------------------------------------------------------------------------


async def echoed(host: str, port: int) -> bytes:
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(b"hello")
    writer.write_eof()
    got = await reader.read()
    writer.close()
    await writer.wait_closed()
    return got


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


IPV6 = pytest.mark.skipif(not has_ipv6(), reason="no IPv6 on this machine")


@IPV6
async def test_ipv6(loop: Loop) -> None:
    server = await loop.create_server(Echo, "::1", 0)
    address = server.sockets[0].getsockname()
    assert await echoed(address[0], address[1]) == b"hello"
    _, protocol = await loop.create_connection(Recorder, *address[:2])
    assert protocol.transport.get_extra_info("peername") == address
    await close(protocol)
    await end(server)


@IPV6
async def test_both_families_on_one_port(loop: Loop) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    server = await loop.create_server(Echo, ["127.0.0.1", "::1"], port)
    assert {sock.family for sock in server.sockets} == {socket.AF_INET, socket.AF_INET6}
    assert await echoed("127.0.0.1", port) == b"hello"
    assert await echoed("::1", port) == b"hello"
    await end(server)


async def test_every_interface(loop: Loop) -> None:
    server = await loop.create_server(Echo, None, 0)
    port = server.sockets[0].getsockname()[1]
    host = "127.0.0.1" if server.sockets[0].family == socket.AF_INET else "::1"
    assert await echoed(host, port) == b"hello"
    await end(server)


async def test_a_port_can_be_used_again_at_once(loop: Loop) -> None:
    """Also while connections of the earlier server are in TIME_WAIT, which reuse_address is for."""
    port = 0
    for _ in range(5):
        server = await loop.create_server(Echo, "127.0.0.1", port)
        port = server.sockets[0].getsockname()[1]
        assert await echoed("127.0.0.1", port) == b"hello"
        await end(server)


async def test_a_port_that_is_taken(loop: Loop, listener: socket.socket) -> None:
    with pytest.raises(OSError) as caught:
        await loop.create_server(Echo, *listener.getsockname())
    assert caught.value.errno == errno.EADDRINUSE
    assert str(listener.getsockname()[1]) in str(caught.value)


async def test_reuse_port(loop: Loop) -> None:
    if not hasattr(socket, "SO_REUSEPORT"):
        pytest.skip("this system has no SO_REUSEPORT")
    first = await loop.create_server(Echo, "127.0.0.1", 0, reuse_port=True)
    address = first.sockets[0].getsockname()
    second = await loop.create_server(Echo, *address, reuse_port=True)
    await end(first)
    assert await echoed(*address) == b"hello"
    await end(second)


async def test_start_serving_later(loop: Loop) -> None:
    server = await loop.create_server(Echo, "127.0.0.1", 0, start_serving=False)
    address = server.sockets[0].getsockname()
    assert not server.is_serving()
    with pytest.raises(ConnectionRefusedError):
        await loop.create_connection(Recorder, *address)
    await server.start_serving()
    await server.start_serving()  # a second time does no harm
    assert server.is_serving()
    assert await echoed(*address) == b"hello"
    await end(server)


async def test_serve_forever(loop: Loop) -> None:
    server = await loop.create_server(Echo, "127.0.0.1", 0, start_serving=False)
    address = server.sockets[0].getsockname()
    async with server:
        serving = asyncio.create_task(server.serve_forever())
        await until(server.is_serving)
        assert await echoed(*address) == b"hello"
        with pytest.raises(RuntimeError, match="already being awaited"):
            await server.serve_forever()
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await serving
    assert not server.is_serving()
    assert server.sockets == ()
    with pytest.raises(RuntimeError, match="is closed"):
        await server.serve_forever()


async def test_extra_info_of_tcp(loop: Loop, listener: socket.socket) -> None:
    _, protocol = await loop.create_connection(Recorder, *listener.getsockname())
    conn, address = await loop.sock_accept(listener)
    with conn:
        info = protocol.transport.get_extra_info
        assert info("sockname") == address
        assert info("peername") == listener.getsockname()
        sock = info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert sock.fileno() > 0
        assert not hasattr(sock, "recv")
        assert info("nothing") is None
        assert info("nothing", "default") == "default"
    await close(protocol)
    assert info("sockname") == address
    assert info("peername") == listener.getsockname()


# -- the short way of create_connection -------------------------------------------------------------


def how_it_ends(loop: asyncio.AbstractEventLoop, *args: Any, **options: Any) -> tuple[Any, ...]:
    """What a create_connection comes to: the ends of the connection, or the error."""

    async def connect() -> tuple[Any, ...]:
        try:
            transport, protocol = await loop.create_connection(asyncio.Protocol, *args, **options)
        except (Exception, asyncio.CancelledError) as error:
            # On Windows asyncio's own loops put the words of a failed connect in different ways.
            return type(error), "" if WINDOWS and isinstance(error, OSError) else str(error)
        try:
            sock = transport.get_extra_info("socket")
            kind = type(protocol), sock.family, sock.type, sock.proto, sock.gettimeout()
            return *kind, sock.getsockname()[0], transport.get_extra_info("peername")
        finally:
            transport.close()
            await asyncio.sleep(0.01)

    return loop.run_until_complete(connect())


def test_the_short_way_ends_as_asyncios(loop: Loop, listener: socket.socket, refused: tuple[str, int]) -> None:
    host, port = listener.getsockname()
    cases: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((host, port), {}),
        ((host, str(port)), {}),
        ((host, port), {"ssl": None, "family": 0, "local_addr": None, "happy_eyeballs_delay": None}),
        ((host, port), {"ssl": False}),
        ((host, port), {"family": socket.AF_INET6}),
        ((host, port), {"server_hostname": host}),
        ((host, port), {"server_hostname": ""}),
        ((host, port), {"ssl_handshake_timeout": 0}),
        ((host, port), {"sock": listener}),
        ((host, port), {"interleave": 1}),
        ((host, port), {"ssl": 0, "proto": False, "flags": 0.0}),
        ((host, port), {"interleave": 0, "ssl_shutdown_timeout": None}),
        ((host, port), {"server_hostname": Odd(equal=True)}),
        ((host, port), {"server_hostname": Odd(equal=False)}),
        ((host, port), {"family": Odd(equal=False)}),
        ((host, port), {"local_addr": Odd(equal=True)}),
        ((host, port), {"ssl_handshake_timeout": Odd(equal=True)}),
        (("::1%lo", refused[1]), {}),
        (("127.0.0.1\0", port), {}),
        (("\udc80", port), {}),
        ((type("Host", (str,), {})(host), port), {}),
        ((host, object()), {}),
        (refused, {}),
        ((host, True), {}),
        (("::ffff:127.0.0.1", port), {}),
        (("::1", refused[1]), {}),
        (("255.255.255.255", port), {}),
        ((host.encode(), port), {}),
        ((None, None), {}),
    ]
    if not WINDOWS:  # where asyncio's own loop takes what is left of them
        cases += [((host, 65536), {}), ((host, -1), {})]
    if sys.version_info >= (3, 12):
        cases += [((host, port), {"all_errors": True}), (refused, {"all_errors": True})]
    stock: asyncio.AbstractEventLoop
    if sys.platform == "win32":
        stock = asyncio.ProactorEventLoop()
    else:
        stock = asyncio.SelectorEventLoop()
    with contextlib.closing(stock):
        for args, options in cases:
            assert how_it_ends(loop, *args, **options) == how_it_ends(stock, *args, **options), (args, options)


@pytest.mark.parametrize(
    ("args", "options"),
    [
        ((asyncio.Protocol, "127.0.0.1", 1), {"what": 1}),
        ((asyncio.Protocol, "127.0.0.1", 1, None), {}),
        ((asyncio.Protocol, "127.0.0.1"), {"host": "127.0.0.1"}),
        ((), {}),
        *([] if sys.version_info >= (3, 12) else [((asyncio.Protocol, "127.0.0.1", 1), {"all_errors": True})]),
    ],
)
def test_a_wrong_call_of_create_connection_fails_as_asyncios(
    loop: Loop, args: tuple[Any, ...], options: dict[str, Any]
) -> None:
    """At once, and not when somebody awaits it."""
    said: list[str] = []
    stock = asyncio.SelectorEventLoop()
    with contextlib.closing(stock):
        for one in (loop, stock):
            with pytest.raises(TypeError) as raised:
                _ = one.create_connection(*args, **options)
            said.append(str(raised.value))
    assert said[0] == said[1]


def test_create_connection_looks_as_asyncios(loop: Loop) -> None:
    ours: Any = type(loop).create_connection
    whole: Any = asyncio.BaseEventLoop.create_connection
    assert inspect.iscoroutinefunction(ours)
    assert inspect.signature(ours, follow_wrapped=False) == inspect.signature(whole)
    assert ours.__qualname__ == whole.__qualname__
    coroutine = loop.create_connection(asyncio.Protocol, "127.0.0.1", 1)
    assert inspect.iscoroutine(coroutine)
    coroutine.close()


class Odd:
    """Equal to everything, or cannot be compared."""

    def __init__(self, equal: bool) -> None:
        self._equal = equal

    def __eq__(self, other: object) -> bool:
        if not self._equal:
            raise ValueError("neither true nor false")
        return True

    __hash__ = object.__hash__


@pytest.mark.parametrize("debug", [False, True])
async def test_the_short_way_is_taken_outside_debug_mode(
    loop: Loop, listener: socket.socket, monkeypatch: pytest.MonkeyPatch, debug: bool
) -> None:
    """In debug mode BaseEventLoop's own way is gone, which logs its steps."""
    ways: list[str] = []
    connect_sock: Any = asyncio.BaseEventLoop._connect_sock  # type: ignore[attr-defined]  # not in typeshed

    async def watched(self: Any, *args: Any, **options: Any) -> Any:
        ways.append("BaseEventLoop's")
        return await connect_sock(self, *args, **options)

    monkeypatch.setattr(asyncio.BaseEventLoop, "_connect_sock", watched)
    loop.set_debug(debug)
    transport, _ = await loop.create_connection(asyncio.Protocol, *listener.getsockname())
    assert bool(ways) is debug
    transport.close()


async def test_the_short_way_connects_by_sock_connect(
    loop: Loop, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which some replace, to watch or to forbid connections."""
    seen: list[Any] = []

    async def sock_connect(sock: socket.socket, address: Any) -> None:
        seen.append((sock.getsockname, address))
        raise ConnectionRefusedError("not from here")

    monkeypatch.setattr(loop, "sock_connect", sock_connect)
    with pytest.raises(ConnectionRefusedError, match="not from here"):
        await loop.create_connection(asyncio.Protocol, *listener.getsockname())
    assert [address for _, address in seen] == [listener.getsockname()]
    assert seen[0][0].__self__.fileno() == -1


@pytest.mark.skipif(sys.platform != "linux", reason="the calls of Linux")
async def test_to_connect_is_audited(loop: Loop, listener: socket.socket) -> None:
    seen: list[Any] = []
    watching = True

    def hook(event: str, args: tuple[Any, ...]) -> None:  # it stays for the life of the process
        if watching and event == "socket.connect":
            seen.append(args[1])

    sys.addaudithook(hook)
    try:
        transport, _ = await loop.create_connection(asyncio.Protocol, *listener.getsockname())
    finally:
        watching = False
    assert set(seen) == {listener.getsockname()}
    transport.close()


@pytest.mark.skipif(WINDOWS, reason="ConnectEx waits nowhere, whatever the socket's timeout")
async def test_a_blocking_socket_is_not_connected_by_the_short_way(loop: Loop, silent: tuple[str, int]) -> None:
    """A call in C that waits would hold the loop and everybody else."""
    with socket.socket() as sock:
        sock.settimeout(0.2)
        with pytest.raises(TimeoutError):
            await loop.sock_connect(sock, silent)


def test_a_create_connection_that_was_replaced_before_is_heard() -> None:
    done = run_python(
        """
        import asyncio

        whole = asyncio.BaseEventLoop.create_connection

        async def traced(self, *args, **options):
            print("traced")
            return await whole(self, *args, **options)

        asyncio.BaseEventLoop.create_connection = traced
        import iocp_loop

        async def main():
            async def nothing(reader, writer):
                writer.close()

            async with await asyncio.start_server(nothing, "127.0.0.1", 0) as server:
                await asyncio.open_connection(*server.sockets[0].getsockname())

        iocp_loop.run(main())
        """
    )
    assert done.stdout.split() == ["traced"]
