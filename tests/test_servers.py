"""Listeners: they accept at once, survive every failure of one connection, and let go of their address."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import socket
import ssl
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import trustme

import iocp_loop

from .support import (
    LIMIT,
    WINDOWS,
    Echo,
    Recorder,
    in_thread,
    listening_socket,
    read_all,
    reset,
    run_python,
    turns,
    until,
)

Loop = iocp_loop.IocpEventLoop
Pair = tuple[socket.socket, socket.socket]
Reports = list[dict[str, Any]]


async def echo_server(loop: Loop, factory: Callable[[], Any] = Echo, **options: Any) -> tuple[Any, Any]:
    """A server on a free port, and its address."""
    server = await loop.create_server(factory, "127.0.0.1", 0, **options)
    return server, server.sockets[0].getsockname()


async def finish(server: asyncio.Server) -> None:
    """Close the server, and see its connections through."""
    server.close()
    await asyncio.wait_for(server.wait_closed(), LIMIT)
    await turns()


def talk(address: Any, data: bytes = b"hello") -> bytes:
    """What a stock blocking client gets back before the end of the stream."""
    with socket.create_connection(address, LIMIT) as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        return read_all(client)


async def echoes(address: Any, data: bytes = b"hello") -> bool:
    return await asyncio.to_thread(talk, address, data) == data


# -- accepting -------------------------------------------------------------------------------------


async def test_a_server_accepts_when_create_server_returns(loop: Loop) -> None:
    server, address = await echo_server(loop)
    # No turn of the loop between: the first accepts are posted already, or the connection waits in the backlog.
    with socket.create_connection(address, LIMIT):
        pass
    assert await echoes(address)
    await finish(server)


async def test_start_serving_later(loop: Loop) -> None:
    made: list[Recorder] = []

    def factory() -> Recorder:
        made.append(Recorder())
        return made[-1]

    server, address = await echo_server(loop, factory, start_serving=False)
    assert not server.is_serving()
    await server.start_serving()
    assert server.is_serving()
    with socket.create_connection(address, LIMIT) as client:
        await until(lambda: made and made[0].calls)
        assert made[0].transport.get_extra_info("peername") == client.getsockname()
        assert made[0].transport.get_extra_info("sockname") == address
    await until(lambda: "eof_received" in made[0].calls)
    made[0].transport.close()
    await finish(server)


async def test_serve_forever_until_cancelled(loop: Loop) -> None:
    server, address = await echo_server(loop)
    serving = asyncio.create_task(server.serve_forever())
    assert await echoes(address)
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    assert not server.is_serving()


async def test_a_server_on_a_socket_that_somebody_made(loop: Loop) -> None:
    sock = listening_socket()
    address = sock.getsockname()
    server = await loop.create_server(Echo, sock=sock)
    assert await echoes(address)
    await finish(server)
    assert sock.fileno() == -1


async def test_a_server_on_several_addresses(loop: Loop) -> None:
    server = await loop.create_server(Echo, ["127.0.0.1", "localhost"], 0)
    for sock in server.sockets:
        assert await echoes(sock.getsockname()[:2])
    await finish(server)


async def test_start_server_and_open_connection(loop: Loop) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1000):
            writer.write(data)
            await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    writer.writelines([b"x" * 100_000, b"\n"])
    writer.write_eof()
    assert len(await reader.read()) == 100_001
    writer.close()
    await writer.wait_closed()
    await finish(server)


async def test_a_port_that_is_taken(loop: Loop) -> None:
    server, address = await echo_server(loop)
    with pytest.raises(OSError):
        await loop.create_server(Echo, *address, reuse_address=False)
    assert await echoes(address)
    await finish(server)


# -- failures of one connection --------------------------------------------------------------------


async def test_a_raising_protocol_factory_costs_its_connection_only(loop: Loop, reports: Reports) -> None:
    failures = iter([True, True, False])

    def factory() -> Echo:
        if next(failures, False):
            raise ZeroDivisionError
        return Echo()

    server, address = await echo_server(loop, factory)
    for _ in range(2):
        with socket.create_connection(address, LIMIT) as client:
            assert await asyncio.to_thread(read_end, client) == b""  # closed, not left hanging
    assert await echoes(address)
    assert [type(report["exception"]) for report in reports] == [ZeroDivisionError] * 2
    assert all("socket" in report for report in reports)
    reports.clear()
    await finish(server)


def read_end(sock: socket.socket) -> bytes:
    try:
        return sock.recv(1)
    except ConnectionError:
        return b""


async def test_an_exception_in_connection_made_costs_its_connection_only(loop: Loop, reports: Reports) -> None:
    class Wrong(Echo):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            raise ZeroDivisionError

    kinds = iter([Wrong])
    server, address = await echo_server(loop, lambda: next(kinds, Echo)())
    with socket.create_connection(address, LIMIT) as client:
        assert await asyncio.to_thread(read_end, client) == b""
    assert await echoes(address)
    assert [type(report["exception"]) for report in reports] == [ZeroDivisionError]
    reports.clear()
    await finish(server)


@pytest.mark.parametrize("count", [1, 100])
async def test_connections_reset_before_they_are_accepted(loop: Loop, count: int) -> None:
    """A reset of a connection in the backlog: error 64 of AcceptEx, ECONNABORTED, or a dead socket."""
    lost: list[Any] = []

    class Noting(Echo):
        def connection_lost(self, exc: BaseException | None) -> None:
            lost.append(exc)

    server, address = await echo_server(loop, Noting)
    for _ in range(3):
        for _ in range(count):  # no turn of the loop meanwhile
            reset(socket.create_connection(address, LIMIT))
        await turns()
        assert await echoes(address)
    await finish(server)
    assert all(exc is None or isinstance(exc, OSError) for exc in lost)


async def test_connections_reset_after_they_are_accepted(loop: Loop) -> None:
    server, address = await echo_server(loop)
    for _ in range(50):
        client = socket.create_connection(address, LIMIT)
        client.send(b"hello")
        await turns(2)
        reset(client)
    assert await echoes(address)
    await finish(server)


@pytest.mark.skipif(WINDOWS, reason="Windows has no limit on sockets to run into")
def test_running_out_of_descriptors_for_a_moment(driver: str) -> None:
    printed = run_python(
        """
        import asyncio, os, resource, socket, sys, iocp_loop

        class Echo(asyncio.Protocol):
            def connection_made(self, transport):
                self.transport = transport
            def data_received(self, data):
                self.transport.write(data)

        async def main():
            loop = asyncio.get_running_loop()
            reports = []
            loop.set_exception_handler(lambda loop, context: reports.append(context))
            clients = [socket.socket() for _ in range(5)]
            for client in clients:
                client.setblocking(False)
            # One descriptor for the listener, and one for one of the five.
            free = os.open(os.devnull, os.O_RDONLY)
            os.close(free)
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (free + 2, hard))
            server = await loop.create_server(Echo, "127.0.0.1", 0)
            address = server.sockets[0].getsockname()
            for client in clients:
                await loop.sock_connect(client, address)
                await loop.sock_sendall(client, b"x")
            answers = [asyncio.create_task(loop.sock_recv(client, 1)) for client in clients]
            await asyncio.sleep(0.35)  # several tries
            print(sum(answer.done() for answer in answers), len(reports))
            print(reports[0]["exception"].errno, reports[0]["message"])
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            print([await asyncio.wait_for(answer, 10) for answer in answers])
            for client in clients:
                client.close()
            server.close()
            await asyncio.sleep(0.01)

        iocp_loop.run(main(), driver=sys.argv[1])
        """,
        driver,
    ).stdout.splitlines()
    assert printed[0] in ("1 1", "0 1")  # one report for one shortage, however often it was tried
    assert printed[1] == "24 socket.accept() out of system resource"
    assert printed[2] == str([b"x"] * 5)


@pytest.mark.skipif(WINDOWS, reason="Windows has no limit on sockets to run into")
def test_closed_while_descriptors_are_short(driver: str) -> None:
    """The next try to accept is called off, and the port is free."""
    printed = run_python(
        """
        import asyncio, os, resource, socket, sys, iocp_loop

        async def main():
            loop = asyncio.get_running_loop()
            reports = []
            loop.set_exception_handler(lambda loop, context: reports.append(context["message"]))
            client = socket.socket()
            client.setblocking(False)
            # One descriptor for the listener, and none for whoever comes.
            free = os.open(os.devnull, os.O_RDONLY)
            os.close(free)
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, hard))
            server = await loop.create_server(asyncio.Protocol, "127.0.0.1", 0)
            address = server.sockets[0].getsockname()
            await loop.sock_connect(client, address)
            while not reports:
                await asyncio.sleep(0.01)
            server.close()
            await asyncio.wait_for(server.wait_closed(), 10)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            await asyncio.sleep(0.25)  # longer than from one try to the next
            print(reports, loop.stats().in_flight)
            client.close()
            with socket.socket() as other:
                print(other.connect_ex(address) != 0)

        iocp_loop.run(main(), driver=sys.argv[1])
        """,
        driver,
    ).stdout.splitlines()
    assert printed == ["['socket.accept() out of system resource'] 0", "True"]


async def test_a_shortage_that_goes_on_when_accepting_is_tried_again(
    loop: Loop, reports: Reports, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system may refuse to accept outright, and not only by a completion."""
    server, address = await echo_server(loop)
    (listener,) = loop._listeners.values()
    assert listener._stream is not None
    loop._proactor.cancel(listener._stream)
    await until(lambda: listener._stream is not None and not listener._stream.in_flight)
    tries = 0
    accept_stream = loop._proactor.accept_stream

    def refuse(sock: socket.socket, deliver: Any) -> Any:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return accept_stream(sock, deliver)

    monkeypatch.setattr(loop._proactor, "accept_stream", refuse)
    listener._ended(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)))
    assert await echoes(address)
    assert tries == 3
    assert [report["message"] for report in reports] == ["socket.accept() out of system resource"]
    reports.clear()
    await finish(server)


async def test_a_connection_that_comes_after_the_end_is_closed(loop: Loop, pair: Pair) -> None:
    """A cancel is a request: the kernel may have accepted one more."""
    server, _ = await echo_server(loop)
    (listener,) = loop._listeners.values()
    server.close()
    listener._accepted((pair[0], pair[0].getpeername()), None)
    assert pair[0].fileno() == -1
    await finish(server)


async def test_a_hopeless_listener_is_reported_and_does_not_spin(loop: Loop, reports: Reports) -> None:
    server, _ = await echo_server(loop)
    (listener,) = loop._listeners.values()
    stream = listener._stream
    assert stream is not None
    loop._proactor.cancel(stream)
    await turns()
    listener._ended(OSError(22, "Invalid argument"))
    await asyncio.sleep(0.25)
    assert len(reports) == 1
    reports.clear()
    await finish(server)


# -- closing ---------------------------------------------------------------------------------------


async def test_a_closed_server_refuses_from_then_on(loop: Loop) -> None:
    server, address = await echo_server(loop)
    assert await echoes(address)
    server.close()
    await turns()
    with pytest.raises(OSError):
        await asyncio.to_thread(talk, address)
    await finish(server)
    server.close()


async def test_close_while_connections_wait_to_be_accepted(loop: Loop) -> None:
    server, address = await echo_server(loop)
    clients = [socket.create_connection(address, LIMIT) for _ in range(20)]
    await finish(server)
    for client in clients:
        client.close()
    await turns(20)


async def test_close_within_the_protocol_factory(loop: Loop, reports: Reports) -> None:
    """asyncio's servers take no connection any more then: it is closed, and so are those behind it."""
    servers: list[Any] = []

    class Last(Recorder):
        keep_open_at_eof = False

        def __init__(self) -> None:
            super().__init__()
            servers[0].close()

    server, address = await echo_server(loop, Last)
    servers.append(server)
    clients = [socket.create_connection(address, LIMIT) for _ in range(5)]
    for client in clients:
        assert await asyncio.to_thread(read_end, client) == b""
        client.close()
    await finish(server)
    assert len(reports) == 1
    reports.clear()


async def test_connections_outlive_their_server(loop: Loop) -> None:
    server, address = await echo_server(loop)
    reader, writer = await asyncio.open_connection(*address)
    writer.write(b"before\n")
    assert await reader.readline() == b"before\n"
    server.close()
    writer.write(b"after\n")
    assert await reader.readline() == b"after\n"
    writer.close()
    await writer.wait_closed()
    await finish(server)


@pytest.mark.skipif(sys.version_info < (3, 12, 1), reason="wait_closed waits for connections since Python 3.12.1")
async def test_wait_closed_waits_for_the_connections(loop: Loop) -> None:
    server, address = await echo_server(loop)
    _, writer = await asyncio.open_connection(*address)
    server.close()
    waiting = asyncio.create_task(server.wait_closed())
    await asyncio.sleep(0.02)
    assert not waiting.done()
    writer.close()
    await asyncio.wait_for(waiting, LIMIT)


@pytest.mark.skipif(sys.version_info < (3, 13), reason="close_clients and abort_clients are new in Python 3.13")
@pytest.mark.parametrize("method", ["close_clients", "abort_clients"])
async def test_close_clients_and_abort_clients(loop: Loop, method: str) -> None:
    server, address = await echo_server(loop)
    clients = [socket.create_connection(address, LIMIT) for _ in range(3)]
    await until(lambda: len(server._clients) == 3)
    server.close()
    getattr(server, method)()
    await asyncio.wait_for(server.wait_closed(), LIMIT)
    for client in clients:
        with client:
            assert await asyncio.to_thread(read_end, client) == b""


async def test_restart_on_the_same_port_again_and_again(loop: Loop) -> None:
    server, address = await echo_server(loop)
    for _ in range(10):
        assert await echoes(address)
        server.close()
        server = await loop.create_server(Echo, *address)
    await finish(server)


async def test_restart_on_the_same_port_after_wait_closed(loop: Loop) -> None:
    port = 0
    for _ in range(3):
        server = await loop.create_server(Echo, "127.0.0.1", port, reuse_address=not WINDOWS)
        address = server.sockets[0].getsockname()
        port = address[1]
        assert await echoes(address)
        await finish(server)


async def test_a_listening_socket_closed_by_somebody_else(loop: Loop, reports: Reports) -> None:
    server, _ = await echo_server(loop)
    (sock,) = (listener._sock for listener in loop._listeners.values())
    sock.close()
    await turns()
    await finish(server)
    await asyncio.sleep(0.02)
    reports.clear()  # it may be reported, or not be noticed


def test_the_loop_closes_with_a_server_open(driver: str, no_leak: None) -> None:
    loop = iocp_loop.new_event_loop(driver)
    server, address = loop.run_until_complete(echo_server(loop))
    with socket.create_connection(address, LIMIT):
        loop.run_until_complete(turns(10))
        loop.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # of the listening socket and of the connection
        del server, loop
        gc.collect()


# -- TLS -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Contexts of a server named localhost, and of a client that trusts it."""
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(server)
    client = ssl.create_default_context()
    authority.configure_trust(client)
    return server, client


Certificates = tuple[ssl.SSLContext, ssl.SSLContext]


@pytest.mark.parametrize("size", [1, 1000, 3_000_000])
async def test_tls_echo(loop: Loop, certificates: Certificates, size: int) -> None:
    server, address = await echo_server(loop, ssl=certificates[0])
    reader, writer = await asyncio.open_connection(*address, ssl=certificates[1], server_hostname="localhost")
    data = bytes(range(256)) * (size // 256) + bytes(size % 256)
    writer.write(data)
    assert await reader.readexactly(size) == data
    assert writer.get_extra_info("cipher")
    assert writer.get_extra_info("peername") == address
    assert writer.get_extra_info("ssl_object").version().startswith("TLS")
    writer.close()
    await writer.wait_closed()
    await finish(server)


async def test_tls_with_a_stock_blocking_client(loop: Loop, certificates: Certificates) -> None:
    server, address = await echo_server(loop, ssl=certificates[0])

    def client() -> bytes:
        with (
            socket.create_connection(address, LIMIT) as raw,
            certificates[1].wrap_socket(raw, server_hostname="localhost") as sock,
        ):
            sock.sendall(b"hello")
            return sock.recv(100)

    assert await asyncio.to_thread(client) == b"hello"
    await finish(server)


async def test_a_failing_handshake_costs_its_connection_only(
    loop: Loop, certificates: Certificates, reports: Reports
) -> None:
    server, address = await echo_server(loop, ssl=certificates[0])
    with socket.create_connection(address, LIMIT) as client:
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        await asyncio.to_thread(read_to_the_end_or_reset, client)
    distrustful = ssl.create_default_context()
    with pytest.raises(ssl.SSLCertVerificationError):
        await asyncio.open_connection(*address, ssl=distrustful, server_hostname="localhost")
    _, writer = await asyncio.open_connection(*address, ssl=certificates[1], server_hostname="localhost")
    writer.close()
    await writer.wait_closed()
    await finish(server)
    reports.clear()  # asyncio reports failed handshakes in its own way


def read_to_the_end_or_reset(sock: socket.socket) -> None:
    try:
        read_all(sock)
    except ConnectionError:
        pass


async def test_a_handshake_that_never_comes_times_out(loop: Loop, certificates: Certificates, reports: Reports) -> None:
    server, address = await echo_server(loop, ssl=certificates[0], ssl_handshake_timeout=0.1)
    with socket.create_connection(address, LIMIT) as client:
        await asyncio.to_thread(read_to_the_end_or_reset, client)
    await finish(server)
    reports.clear()  # as above


async def test_start_tls_on_a_plain_connection(loop: Loop, certificates: Certificates) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readline() == b"STARTTLS\n"
        writer.write(b"go ahead\n")
        await writer.drain()
        await writer.start_tls(certificates[0])
        writer.write((await reader.readline()).upper())
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    writer.write(b"STARTTLS\n")
    assert await reader.readline() == b"go ahead\n"
    await writer.start_tls(certificates[1], server_hostname="localhost")
    writer.write(b"secret\n")
    assert await reader.readline() == b"SECRET\n"
    writer.close()
    await writer.wait_closed()
    await finish(server)


async def test_many_tls_connections_at_once(loop: Loop, certificates: Certificates) -> None:
    server, address = await echo_server(loop, ssl=certificates[0])

    async def client(number: int) -> None:
        reader, writer = await asyncio.open_connection(*address, ssl=certificates[1], server_hostname="localhost")
        writer.write(b"%d\n" % number)
        assert await reader.readline() == b"%d\n" % number
        writer.close()
        await writer.wait_closed()

    await asyncio.gather(*(client(number) for number in range(20)))
    await finish(server)


# -- clients ---------------------------------------------------------------------------------------


async def test_create_connection_refused(loop: Loop) -> None:
    with listening_socket() as sock:
        address = sock.getsockname()
    with pytest.raises(ConnectionRefusedError):
        await loop.create_connection(Echo, *address)


async def test_create_connection_tries_all_addresses(loop: Loop) -> None:
    server, address = await echo_server(loop)
    # localhost may have an IPv6 address first, where nobody listens
    for delay in (None, 0.05):
        _, writer = await asyncio.open_connection("localhost", address[1], happy_eyeballs_delay=delay)
        writer.close()
        await writer.wait_closed()
    await finish(server)


async def test_create_connection_from_a_local_address(loop: Loop) -> None:
    server, address = await echo_server(loop)
    _, writer = await asyncio.open_connection(*address, local_addr=("127.0.0.1", 0))
    assert writer.get_extra_info("sockname")[0] == "127.0.0.1"
    writer.close()
    await writer.wait_closed()
    await finish(server)


async def test_a_cancelled_create_connection_leaves_nothing(loop: Loop) -> None:
    with listening_socket(backlog=0) as sock:
        tasks = [asyncio.create_task(loop.create_connection(Echo, *sock.getsockname())) for _ in range(10)]
        await asyncio.sleep(0.02)
        for task in tasks:
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        for each in done:
            if not isinstance(each, BaseException):
                each[0].abort()
    await turns(20)


async def test_connect_accepted_socket(loop: Loop) -> None:
    with listening_socket() as sock:
        sock.settimeout(LIMIT)
        with socket.create_connection(sock.getsockname(), LIMIT) as client:
            conn, _ = sock.accept()
            conn.setblocking(False)
            transport, _ = await loop.connect_accepted_socket(Echo, conn)
            with in_thread(lambda: client.sendall(b"hello")):
                await turns()
            assert await asyncio.to_thread(client.recv, 100) == b"hello"
            transport.close()
            await turns(10)
