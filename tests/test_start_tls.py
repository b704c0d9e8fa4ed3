"""start_tls, both ways, and the loop's other ways to speak TLS: over TCP, UNIX sockets and accepted sockets."""

from __future__ import annotations

import asyncio
import socket
import ssl
from pathlib import Path
from typing import Any

import pytest

import iocp_loop

from .certificates import client_context, server_context
from .support import Echo, Recorder, listening_socket, tcp_pair, turns, until

Loop = iocp_loop.IocpEventLoop

CLIENT: dict[str, Any] = {"ssl": client_context(), "server_hostname": "localhost"}

BIG = b"0123456789" * 200_000


class Upgrading(Recorder):
    """Answers the line STARTTLS by an upgrade; from then on its data are what came over TLS."""

    def __init__(self, server_side: bool = True) -> None:
        super().__init__()
        self.server_side = server_side
        self.upgraded: asyncio.Task[Any] | None = None

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.upgraded is None and self.data.endswith(b"STARTTLS\n"):
            self.transport.write(b"go ahead\n")
            self.data.clear()
            self.upgraded = asyncio.ensure_future(self.upgrade())

    async def upgrade(self) -> None:
        loop = asyncio.get_running_loop()
        secure = await loop.start_tls(self.transport, self, server_context(), server_side=self.server_side)
        assert secure is not None
        self.transport = secure


async def finish(*protocols: Recorder) -> None:
    for protocol in protocols:
        protocol.transport.close()
    for protocol in protocols:
        await until(lambda protocol=protocol: protocol.finished)  # type: ignore[misc]  # a default binds it


async def pair_of_protocols(loop: Loop, server: Recorder, client: Recorder) -> None:
    ours, peer = tcp_pair()
    await loop.create_connection(lambda: server, sock=ours)
    await loop.create_connection(lambda: client, sock=peer)


# --------------------------------------------------------------------------------------------------
# start_tls
# --------------------------------------------------------------------------------------------------


async def test_upgrade_of_both_ends(loop: Loop) -> None:
    server, client = Upgrading(), Recorder()
    await pair_of_protocols(loop, server, client)
    client.transport.write(b"STARTTLS\n")
    await until(lambda: client.data == b"go ahead\n")
    client.data.clear()
    secure = await loop.start_tls(client.transport, client, client_context(), server_hostname="localhost")
    assert secure is not None
    client.transport = secure
    await until(lambda: server.upgraded and server.upgraded.done())
    assert secure.get_extra_info("peercert")["subject"]
    assert secure.get_extra_info("cipher") == server.transport.get_extra_info("cipher")
    client.transport.write(BIG)
    server.transport.write(BIG)
    await until(lambda: server.data == BIG and client.data == BIG)
    await finish(client, server)
    assert server.lost is None


async def test_connection_made_is_not_called_again(loop: Loop) -> None:
    server, client = Upgrading(), Recorder()
    await pair_of_protocols(loop, server, client)
    client.transport.write(b"STARTTLS\n")
    await until(lambda: client.data)
    secure = await loop.start_tls(client.transport, client, client_context(), server_hostname="localhost")
    assert secure is not None
    client.transport = secure
    await until(lambda: server.upgraded and server.upgraded.done())
    assert client.calls.count("connection_made") == 1
    assert server.calls.count("connection_made") == 1
    await finish(client, server)


async def test_the_handshake_may_be_there_already(loop: Loop) -> None:
    """The client's first record arrives before the server has called start_tls, which paused reading first."""
    server, client = Recorder(), Recorder()
    await pair_of_protocols(loop, server, client)
    server.transport.pause_reading()
    upgrading = asyncio.ensure_future(
        loop.start_tls(client.transport, client, client_context(), server_hostname="localhost")
    )
    await asyncio.sleep(0.02)
    secure = await loop.start_tls(server.transport, server, server_context(), server_side=True)
    assert secure is not None
    server.transport = secure
    made = await upgrading
    assert made is not None
    client.transport = made
    client.transport.write(b"hello")
    await until(lambda: server.data == b"hello")
    await finish(client, server)


async def test_streams_keep_what_was_read_ahead(loop: Loop) -> None:
    """gh-142352: the reader had taken the handshake out of the socket, and start_tls waited for it for ever."""
    lines: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lines.append(await reader.readline())
        await asyncio.sleep(0.05)  # by now the first TLS record is in the reader
        assert reader._buffer  # type: ignore[attr-defined]  # that is what the test is about
        await writer.start_tls(server_context())
        lines.append(await reader.readline())
        writer.write(b"welcome\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    with socket.create_connection(server.sockets[0].getsockname(), 10) as sock:

        def talk() -> bytes:
            # The line and the first record in one segment.
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            tls = client_context().wrap_bio(incoming, outgoing, server_hostname="localhost")
            with pytest.raises(ssl.SSLWantReadError):
                tls.do_handshake()
            sock.sendall(b"STARTTLS\n" + outgoing.read())
            while True:
                incoming.write(sock.recv(65536))
                try:
                    tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    sock.sendall(outgoing.read())
            tls.write(b"secret\n")
            sock.sendall(outgoing.read())
            while True:
                try:
                    return tls.read(100)
                except ssl.SSLWantReadError:
                    incoming.write(sock.recv(65536))

        assert await asyncio.wait_for(asyncio.to_thread(talk), 20) == b"welcome\n"
    assert lines == [b"STARTTLS\n", b"secret\n"]
    server.close()
    await server.wait_closed()


async def test_the_client_keeps_plain_text_that_it_has_not_read(loop: Loop) -> None:
    """The other direction: what a client's reader holds came before any TLS record, and stays what it is."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readline() == b"STARTTLS\n"
        writer.write(b"go ahead\nand good luck\n")
        await writer.start_tls(server_context())
        writer.write(b"welcome\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    writer.write(b"STARTTLS\n")
    assert await reader.readline() == b"go ahead\n"
    await writer.start_tls(client_context(), server_hostname="localhost")
    assert await reader.readline() == b"and good luck\n"
    assert await reader.readline() == b"welcome\n"
    writer.close()
    await writer.wait_closed()
    server.close()
    await server.wait_closed()


async def test_what_was_written_goes_in_plain_text_first(loop: Loop) -> None:
    server, client = Recorder(), Recorder()
    await pair_of_protocols(loop, server, client)
    client.transport.write(b"plain " * 1_500_000)
    assert client.transport.get_write_buffer_size() > 0
    assert client.calls[-1] == "pause_writing"
    upgrading = asyncio.ensure_future(
        loop.start_tls(client.transport, client, client_context(), server_hostname="localhost")
    )
    # The server reads exactly the plain part; the handshake begins behind it.
    await until(lambda: len(server.data) >= 9_000_000)
    assert server.data[:9_000_000] == b"plain " * 1_500_000
    rest = bytes(server.data[9_000_000:])
    assert not rest or rest[0] == 22  # a handshake record
    client.transport.abort()
    assert client.calls[-1] == "resume_writing"  # nobody else would tell it
    await asyncio.wait([upgrading])
    await finish(server)


async def test_a_certificate_that_is_not_trusted(loop: Loop, reports: list[dict[str, Any]]) -> None:
    server, client = Upgrading(), Recorder()
    await pair_of_protocols(loop, server, client)
    client.transport.write(b"STARTTLS\n")
    await until(lambda: client.data)
    with pytest.raises(ssl.SSLCertVerificationError):
        await loop.start_tls(client.transport, client, ssl.create_default_context(), server_hostname="localhost")
    assert server.upgraded is not None
    await asyncio.wait([server.upgraded])
    assert isinstance(server.upgraded.exception(), (ssl.SSLError, ConnectionError))
    reports.clear()
    await turns(10)


async def test_a_handshake_that_never_comes(loop: Loop, reports: list[dict[str, Any]]) -> None:
    server, client = Recorder(), Recorder()
    await pair_of_protocols(loop, server, client)
    with pytest.raises(ConnectionAbortedError, match="handshake"):
        await loop.start_tls(server.transport, server, server_context(), server_side=True, ssl_handshake_timeout=0.05)
    await until(lambda: "eof_received" in client.calls or client.finished)
    reports.clear()
    client.transport.close()
    await turns(10)


async def test_what_can_not_be_upgraded(loop: Loop) -> None:
    server, client = Recorder(), Recorder()
    await pair_of_protocols(loop, server, client)
    with pytest.raises(TypeError, match="SSLContext"):
        await loop.start_tls(client.transport, client, None)  # type: ignore[arg-type]  # what the test is about
    datagrams, _ = await loop.create_datagram_endpoint(asyncio.DatagramProtocol, local_addr=("127.0.0.1", 0))
    with pytest.raises(TypeError, match="not supported by start_tls"):
        await loop.start_tls(datagrams, client, client_context())
    datagrams.close()
    await finish(client, server)


# --------------------------------------------------------------------------------------------------
# TLS from the first byte
# --------------------------------------------------------------------------------------------------


async def test_over_unix_sockets(loop: Loop, tmp_path: Path) -> None:
    if not hasattr(socket, "AF_UNIX"):
        pytest.skip("this Python has no UNIX sockets")
    path = str(tmp_path / "socket")
    server = await loop.create_unix_server(Echo, path, ssl=server_context(), ssl_handshake_timeout=10)
    _, client = await loop.create_unix_connection(Recorder, path, **CLIENT)
    client.transport.write(BIG)
    await until(lambda: client.data == BIG)
    await finish(client)
    server.close()
    await server.wait_closed()


async def test_an_accepted_socket(loop: Loop) -> None:
    with listening_socket() as listener:
        listener.setblocking(True)
        connecting = asyncio.ensure_future(loop.create_connection(Recorder, *listener.getsockname(), **CLIENT))
        conn, _ = await asyncio.to_thread(listener.accept)
    transport, _ = await loop.connect_accepted_socket(Echo, conn, ssl=server_context())
    _, client = await connecting
    client.transport.write(b"hello")
    await until(lambda: client.data == b"hello")
    assert transport.get_extra_info("sslcontext") is not None
    await finish(client)
    await turns(10)


async def test_an_accepted_socket_in_plain_text(loop: Loop) -> None:
    ours, peer = tcp_pair()
    ours.setblocking(True)
    with peer:
        transport, protocol = await loop.connect_accepted_socket(Echo, ours)
        assert isinstance(protocol, Echo)
        assert transport.get_extra_info("peername") == peer.getsockname()
        peer.sendall(b"hello")
        assert await asyncio.to_thread(peer.recv, 10) == b"hello"
        transport.close()
        assert await asyncio.to_thread(peer.recv, 10) == b""


async def test_client_certificates_and_server_names(loop: Loop) -> None:
    served: list[Recorder] = []
    names: list[str] = []

    def factory() -> Recorder:
        served.append(Recorder())
        return served[-1]

    context = server_context("localhost", "example.org", ask_client=True)
    context.sni_callback = lambda _, name, __: names.append(name)
    server = await loop.create_server(factory, "127.0.0.1", 0, ssl=context)
    _, client = await loop.create_connection(
        Recorder,
        *server.sockets[0].getsockname(),
        ssl=client_context("somebody.example"),
        server_hostname="example.org",
    )
    client.transport.write(b"x")
    await until(lambda: served and served[0].data)
    certificate = served[0].transport.get_extra_info("peercert")
    assert ("DNS", "somebody.example") in certificate["subjectAltName"]
    assert names == ["example.org"]
    for key in ("sslcontext", "ssl_object", "cipher", "socket", "sockname", "peername"):
        assert client.transport.get_extra_info(key) is not None, key
    await finish(client, *served)
    server.close()
    await server.wait_closed()


async def test_a_plain_client_costs_a_tls_server_only_that_connection(
    loop: Loop, reports: list[dict[str, Any]]
) -> None:
    server = await loop.create_server(Echo, "127.0.0.1", 0, ssl=server_context())
    address = server.sockets[0].getsockname()
    with socket.create_connection(address, 10) as plain:
        plain.sendall(b"GET / HTTP/1.0\r\n\r\n")
        with pytest.raises(ConnectionError):  # the alert, and then the end or a reset
            while await asyncio.to_thread(plain.recv, 100):
                pass
            raise ConnectionError
    _, client = await loop.create_connection(Recorder, *address, **CLIENT)
    client.transport.write(b"hello")
    await until(lambda: client.data == b"hello")
    await finish(client)
    server.close()
    await server.wait_closed()
    assert all(isinstance(report.get("exception"), (ssl.SSLError, OSError)) for report in reports)
    reports.clear()


@pytest.mark.parametrize("size", [1, 100_000, 5_000_000])
async def test_eof_ends_both_sides_cleanly(loop: Loop, size: int) -> None:
    server = await loop.create_server(Echo, "127.0.0.1", 0, ssl=server_context())
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname(), **CLIENT)
    writer.write(b"x" * size)
    assert await reader.readexactly(size) == b"x" * size
    writer.close()
    await asyncio.wait_for(writer.wait_closed(), 10)
    server.close()
    await server.wait_closed()
