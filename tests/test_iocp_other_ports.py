"""Driver iocp: sockets that belong to another port."""

from __future__ import annotations

import asyncio
import base64
import errno
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

if sys.platform != "win32":
    pytest.skip("I/O completion ports exist on Windows only", allow_module_level=True)


import iocp_loop
from iocp_loop import CompletionPort
from iocp_loop import operations as ops

from .support import LIMIT, Echo, child_environment, python_command, read_exactly
from .windows_rig import result

Pair = tuple[socket.socket, socket.socket]


def test_a_socket_that_another_port_owns_is_used_all_the_same(pair: Pair) -> None:
    ours, peer = pair
    with CompletionPort(driver="iocp") as first, CompletionPort(driver="iocp") as second:
        first.register(ours)
        assert result(second, ops.Send(ours, b"hello")) == 5
        assert read_exactly(peer, 5) == b"hello"
        receiving = ops.Receive(ours, 100)
        second.submit(receiving)
        peer.send(b"back")
        completion = second.get(LIMIT)
        assert completion is not None
        assert completion.result() == b"back"
        stream = ops.ReceiveStream(ours)
        second.submit(stream)
        for message in (b"one", b"two"):
            peer.send(message)
            completion = second.get(LIMIT)
            assert completion is not None
            assert completion.result() == message
        second.cancel(stream)
        completion = second.get(LIMIT)
        assert completion is not None
        assert completion.error is not None
        assert completion.error.errno == errno.ECANCELED
        assert first.get(0) is None


def test_a_socket_outlives_the_port_that_it_was_used_on_first(pair: Pair) -> None:
    ours, peer = pair
    for message in (b"one", b"two", b"three"):
        with CompletionPort(driver="iocp") as port:
            receiving = ops.Receive(ours, 100)
            port.submit(receiving)
            peer.send(message)
            completion = port.get(LIMIT)
            assert completion is not None
            assert completion.result() == message


def test_a_listener_of_another_port_accepts(listener: socket.socket) -> None:
    with CompletionPort(driver="iocp") as first, CompletionPort(driver="iocp") as second:
        first.register(listener)
        stream = ops.AcceptStream(listener, depth=2)
        second.submit(stream)
        for _ in range(3):
            with socket.create_connection(listener.getsockname(), LIMIT) as client:
                completion = second.get(LIMIT)
                assert completion is not None
                sock, address = completion.result()
                with sock:
                    assert address == client.getsockname()
        second.cancel(stream)
        completion = second.get(LIMIT)
        assert completion is not None
        assert completion.error is not None


def stock_loop() -> asyncio.AbstractEventLoop:
    """asyncio's own loop on a completion port."""
    return asyncio.ProactorEventLoop()


def test_a_connection_that_asyncios_loop_has_used_before(pair: Pair) -> None:
    """gh-122240: the socket stays associated with a port that is long closed."""
    ours, peer = pair
    stock = stock_loop()
    peer.sendall(b"before")
    assert stock.run_until_complete(stock.sock_recv(ours, 100)) == b"before"
    stock.close()
    loop = iocp_loop.new_event_loop("iocp")

    async def use() -> None:
        peer.sendall(b"one")
        assert await loop.sock_recv(ours, 100) == b"one"
        waiting = loop.create_task(loop.sock_recv(ours, 100))
        await asyncio.sleep(0.01)
        peer.sendall(b"two")
        assert await waiting == b"two"
        await loop.sock_sendall(ours, b"x" * 100_000)
        assert len(await asyncio.to_thread(read_exactly, peer, 100_000)) == 100_000
        readable = asyncio.Event()
        loop.add_reader(ours, readable.set)
        peer.sendall(b"three")
        await readable.wait()
        loop.remove_reader(ours)
        assert ours.recv(100) == b"three"
        transport, _ = await loop.create_connection(Echo, sock=ours)
        for message in (b"four", b"five" * 10_000):
            peer.sendall(message)
            assert await asyncio.to_thread(read_exactly, peer, len(message)) == message
        transport.close()
        assert await asyncio.to_thread(peer.recv, 1) == b""

    loop.run_until_complete(asyncio.wait_for(use(), LIMIT))
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()


def test_a_listener_that_asyncios_loop_has_used_before(listener: socket.socket) -> None:
    address = listener.getsockname()
    stock = stock_loop()
    other = listener.dup()  # another handle of the same socket: the server closes its own
    server = stock.run_until_complete(stock.create_server(Echo, sock=other))
    stock.run_until_complete(converse(address))
    server.close()
    stock.run_until_complete(server.wait_closed())
    stock.close()
    loop = iocp_loop.new_event_loop("iocp")
    server = loop.run_until_complete(loop.create_server(Echo, sock=listener))
    for _ in range(3):
        loop.run_until_complete(converse(address))
    server.close()
    loop.run_until_complete(server.wait_closed())
    loop.close()


async def converse(address: Any) -> None:
    reader, writer = await asyncio.open_connection(*address)
    writer.write(b"hello")
    assert await asyncio.wait_for(reader.readexactly(5), LIMIT) == b"hello"
    writer.close()
    await writer.wait_closed()


def new_loop() -> asyncio.AbstractEventLoop:
    return iocp_loop.new_event_loop("iocp")


@pytest.mark.parametrize("parents", [new_loop, stock_loop])
def test_a_listener_that_two_processes_share(
    parents: Callable[[], asyncio.AbstractEventLoop], listener: socket.socket
) -> None:
    """gh-108089, uvicorn#477: it belongs to the port of whichever process used it first, ours or asyncio's."""
    code = """
        import asyncio, base64, socket, sys
        import iocp_loop

        class Serve(asyncio.Protocol):
            def connection_made(self, transport):
                self.transport = transport

            def data_received(self, data):
                self.transport.write(b"child " + data)

        async def main():
            sock = socket.fromshare(base64.b64decode(sys.stdin.readline()))
            server = await asyncio.get_running_loop().create_server(Serve, sock=sock)
            print("ready", flush=True)
            await asyncio.to_thread(sys.stdin.read)
            server.close()

        iocp_loop.run(main(), driver="iocp")
    """
    loop = parents()
    server = loop.run_until_complete(loop.create_server(Echo, sock=listener))
    address = listener.getsockname()
    loop.run_until_complete(converse(address))
    with subprocess.Popen(
        python_command(code),
        env=child_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        try:
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write(base64.b64encode(listener.share(child.pid)).decode() + "\n")
            child.stdin.flush()
            assert child.stdout.readline() == "ready\n"
            server.close()
            loop.run_until_complete(server.wait_closed())
            loop.run_until_complete(asyncio.sleep(0.05))
            for _ in range(3):
                with socket.create_connection(address, LIMIT) as client:
                    client.sendall(b"hello\n")
                    assert read_exactly(client, 12) == b"child hello\n"
            child.communicate(timeout=LIMIT)
            assert child.returncode == 0
        finally:
            child.kill()
    loop.close()
