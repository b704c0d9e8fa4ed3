"""UNIX stream sockets: connecting, serving, names in the file system and abstract ones, what is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

import iocp_loop

from .support import Echo, Recorder, tcp_pair, turns, until

pytestmark = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="this Python has no UNIX sockets")

Loop = iocp_loop.IocpEventLoop

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="abstract names are Linux's own")
CLEANS_UP = pytest.mark.skipif(sys.version_info < (3, 13), reason="servers remove their files since Python 3.13")


async def echoed(path: Any, data: bytes = b"hello") -> bytes:
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(data)
    writer.write_eof()
    got = await reader.read()
    writer.close()
    await writer.wait_closed()
    return got


async def end(server: asyncio.Server) -> None:
    server.close()
    await server.wait_closed()


@pytest.mark.parametrize("kind", [str, os.fsencode, Path])
async def test_there_and_back(loop: Loop, tmp_path: Path, kind: Any) -> None:
    path = kind(str(tmp_path / "socket"))
    server = await loop.create_unix_server(Echo, path)
    assert await echoed(path) == b"hello"
    big = os.urandom(3_000_000)
    assert await echoed(path, big) == big
    await end(server)


async def test_extra_info(loop: Loop, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    served: list[Recorder] = []

    def factory() -> Recorder:
        served.append(Recorder())
        return served[-1]

    server = await loop.create_unix_server(factory, path)
    transport, _ = await loop.create_unix_connection(Recorder, path)
    assert transport.get_extra_info("peername") == path
    assert transport.get_extra_info("sockname") == ""
    assert transport.get_extra_info("socket").family == socket.AF_UNIX
    await until(lambda: served and served[0].calls)
    assert served[0].transport.get_extra_info("sockname") == path
    assert served[0].transport.get_extra_info("peername") == ""
    transport.close()
    await until(lambda: "eof_received" in served[0].calls)
    served[0].transport.close()
    await end(server)


@LINUX
async def test_abstract_name(loop: Loop) -> None:
    name = f"\0iocp_loop test {os.getpid()}"
    server = await loop.create_unix_server(Echo, name)
    assert server.sockets[0].getsockname() == name.encode()
    assert await echoed(name) == b"hello"
    with pytest.raises(OSError) as caught:
        await loop.create_unix_server(Echo, name)
    assert caught.value.errno == errno.EADDRINUSE
    assert repr(name) in str(caught.value)
    await end(server)
    await end(await loop.create_unix_server(Echo, name.encode()))


async def test_a_stale_file_is_replaced(loop: Loop, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as crashed:
        crashed.bind(str(path))
    assert stat.S_ISSOCK(path.stat().st_mode)
    server = await loop.create_unix_server(Echo, path)
    assert await echoed(path) == b"hello"
    await end(server)


async def test_a_file_of_another_kind_is_left(loop: Loop, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("precious")
    with pytest.raises(OSError) as caught:
        await loop.create_unix_server(Echo, path)
    assert caught.value.errno == errno.EADDRINUSE
    assert str(path) in str(caught.value)
    assert path.read_text() == "precious"


async def test_nowhere_to_connect_to(loop: Loop, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await loop.create_unix_connection(Recorder, str(tmp_path / "nothing"))
    (tmp_path / "file").touch()
    with pytest.raises(ConnectionRefusedError):
        await loop.create_unix_connection(Recorder, tmp_path / "file")
    with pytest.raises(OSError, match="path too long"):
        await loop.create_unix_connection(Recorder, "x" * 200)
    with pytest.raises(OSError, match="path too long"):
        await loop.create_unix_server(Recorder, "x" * 200)


async def test_sockets_of_the_caller(loop: Loop, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    server = await loop.create_unix_server(Echo, sock=listener)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(path)
    transport, protocol = await loop.create_unix_connection(Recorder, sock=sock)
    transport.write(b"hello")
    await until(lambda: protocol.data == b"hello")
    transport.close()
    await until(lambda: protocol.finished)
    await end(server)
    assert listener.fileno() == -1


async def test_a_connected_pair(loop: Loop) -> None:
    one, other = socket.socketpair()
    await loop.create_unix_connection(Echo, sock=one)
    second, recorder = await loop.create_unix_connection(Recorder, sock=other)
    second.write(b"x" * 1_000_000)
    second.write_eof()
    await until(lambda: "eof_received" in recorder.calls)
    assert len(recorder.data) == 1_000_000
    second.close()
    await until(lambda: recorder.finished)


async def test_arguments_that_do_not_fit(loop: Loop, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    tcp, other = tcp_pair()
    with tcp, other:
        for method in (loop.create_unix_connection, loop.create_unix_server):
            with pytest.raises(ValueError, match="A UNIX Domain Stream Socket was expected"):
                await method(Recorder, sock=tcp)
            with pytest.raises(ValueError, match="can not be specified at the same time"):
                await method(Recorder, path, sock=tcp)
            with pytest.raises(ValueError, match=r"no path and sock|path was not specified"):
                await method(Recorder)
            with pytest.raises(ValueError, match="ssl_handshake_timeout is only meaningful with ssl"):
                await method(Recorder, path, ssl_handshake_timeout=1)
            with pytest.raises(ValueError, match="ssl_shutdown_timeout is only meaningful with ssl"):
                await method(Recorder, path, ssl_shutdown_timeout=1)
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams,
        pytest.raises(ValueError, match="A UNIX Domain Stream Socket was expected"),
    ):
        await loop.create_unix_connection(Recorder, sock=datagrams)
    with pytest.raises(ValueError, match="server_hostname is only meaningful with ssl"):
        await loop.create_unix_connection(Recorder, path, server_hostname="x")
    with pytest.raises(ValueError, match="you have to pass server_hostname when using ssl"):
        await loop.create_unix_connection(Recorder, path, ssl=True)
    with pytest.raises(TypeError, match="SSLContext or None"):
        await loop.create_unix_server(Recorder, path, ssl=True)
    assert os.listdir(tmp_path) == []


async def test_start_serving_later(loop: Loop, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    server = await loop.create_unix_server(Echo, path, start_serving=False)
    assert not server.is_serving()
    with pytest.raises(ConnectionRefusedError):
        await loop.create_unix_connection(Recorder, path)
    await server.start_serving()
    assert await echoed(path) == b"hello"
    await end(server)


async def test_the_server_accepts_at_once(loop: Loop, tmp_path: Path) -> None:
    """PR 134259: a client that connects as soon as create_unix_server has returned."""
    path = str(tmp_path / "socket")
    server = await loop.create_unix_server(Echo, path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(10)
        client.connect(path)
        client.sendall(b"x")
        assert await asyncio.to_thread(client.recv, 1) == b"x"
    await end(server)


@CLEANS_UP
async def test_a_server_removes_its_file(loop: Loop, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    server = await loop.create_unix_server(Echo, path)
    await end(server)
    assert not path.exists()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    await end(await loop.create_unix_server(Echo, sock=listener))
    assert not path.exists()


@CLEANS_UP
async def test_a_server_leaves_what_is_not_its_own(loop: Loop, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    server = await loop.create_unix_server(Echo, path)
    path.unlink()
    await end(server)  # gone already
    server = await loop.create_unix_server(Echo, path)
    successor = await loop.create_unix_server(Echo, path)
    await end(server)  # replaced
    assert await echoed(path) == b"hello"
    await end(successor)
    assert not path.exists()


async def test_a_server_can_leave_its_file(loop: Loop, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    without: dict[str, Any] = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}
    await end(await loop.create_unix_server(Echo, path, **without))
    assert stat.S_ISSOCK(path.stat().st_mode)


async def test_connecting_waits_while_the_backlog_is_full(loop: Loop, tmp_path: Path) -> None:
    """connect() says EAGAIN then.  A poller that waits for it sees a writable socket without an error, and no peer."""
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen(0)
        listener.setblocking(False)
        tasks = [asyncio.create_task(loop.create_unix_connection(Recorder, path)) for _ in range(5)]
        await asyncio.sleep(0.05)
        assert 0 < sum(task.done() for task in tasks) < 5
        for _ in tasks:
            conn, _ = await loop.sock_accept(listener)
            conn.close()
        for task in tasks:
            transport, protocol = await task
            assert transport.get_extra_info("peername") == path
            transport.close()
            await until(lambda protocol=protocol: protocol.finished)  # type: ignore[misc]  # a default binds it


async def test_a_connect_operation_fails_while_the_backlog_is_full(loop: Loop, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        listener.bind(path)
        listener.listen(0)
        failures = []
        for _ in range(5):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            sock.setblocking(False)
            try:
                await asyncio.wait_for(loop._proactor.connect(sock, path), 10)
            except BlockingIOError as exc:
                failures.append(exc)
        assert 0 < len(failures) < 5


async def test_cancel_a_connection(loop: Loop, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen(0)
        made = await loop.create_unix_connection(Recorder, path)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(loop.create_unix_connection(Recorder, path), 0.05)
        made[0].abort()
        await turns()


@pytest.mark.skipif(sys.version_info < (3, 13), reason="new in Python 3.13")
@pytest.mark.parametrize("how", ["close_clients", "abort_clients"])
async def test_a_server_ends_its_clients(loop: Loop, tmp_path: Path, how: str) -> None:
    path = tmp_path / "socket"
    server = await loop.create_unix_server(Echo, path)
    _, recorder = await loop.create_unix_connection(Recorder, str(path))
    recorder.transport.write(b"x")
    await until(lambda: recorder.data)
    server.close()
    waiting = asyncio.create_task(server.wait_closed())
    await turns()
    assert not waiting.done()
    getattr(server, how)()
    await asyncio.wait_for(waiting, 10)
    await until(lambda: "eof_received" in recorder.calls or recorder.finished)
    recorder.transport.close()
    await until(lambda: recorder.finished)
