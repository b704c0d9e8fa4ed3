"""The loop's methods on plain sockets: sock_recv, sock_sendall, sock_accept and their kin."""

from __future__ import annotations

import array
import asyncio
import os
import socket
import ssl
import time
from typing import Any

import pytest

import iocp_loop

from .support import (
    LIMIT,
    WINDOWS,
    closed,
    connected,
    fill,
    in_thread,
    listening_socket,
    read_exactly,
    reset,
    tcp_pair,
    turns,
    udp_socket,
    until,
)

Loop = iocp_loop.IocpEventLoop
Pair = tuple[socket.socket, socket.socket]


@pytest.mark.parametrize("late", [False, True], ids=["data first", "call first"])
async def test_sock_recv(loop: Loop, pair: Pair, late: bool) -> None:
    if not late:
        pair[1].send(b"hello")
    task = asyncio.create_task(loop.sock_recv(pair[0], 3))
    await turns()
    if late:
        assert not task.done()
        pair[1].send(b"hello")
    assert await task == b"hel"
    assert await loop.sock_recv(pair[0], 100) == b"lo"
    pair[1].close()
    assert await loop.sock_recv(pair[0], 100) == b""


@pytest.mark.parametrize("late", [False, True], ids=["data first", "call first"])
async def test_sock_recv_into(loop: Loop, pair: Pair, late: bool) -> None:
    buffer = bytearray(10)
    if not late:
        pair[1].send(b"abc")
    task = asyncio.create_task(loop.sock_recv_into(pair[0], memoryview(buffer)[2:]))
    await turns()
    if late:
        pair[1].send(b"abc")
    assert await task == 3
    assert buffer == b"\0\0abc\0\0\0\0\0"


@pytest.mark.parametrize("late", [False, True], ids=["data first", "call first"])
async def test_sock_recvfrom_and_sock_recvfrom_into(loop: Loop, late: bool) -> None:
    with udp_socket() as one, udp_socket() as two:
        buffer = bytearray(10)
        for expected in ((b"ping", two.getsockname()), (4, two.getsockname())):
            if not late:
                assert await loop.sock_sendto(two, b"ping", one.getsockname()) == 4
            task: Any = asyncio.create_task(
                loop.sock_recvfrom(one, 100) if expected[0] == b"ping" else loop.sock_recvfrom_into(one, buffer)
            )
            await turns()
            if late:
                assert await loop.sock_sendto(two, b"ping", one.getsockname()) == 4
            assert await task == expected
        assert buffer[:4] == b"ping"
        with pytest.raises(ValueError):
            await loop.sock_recvfrom_into(one, buffer, 11)


@pytest.mark.parametrize("make", [bytes, bytearray, memoryview, lambda data: memoryview(array.array("I", data))])
async def test_sock_sendall_of_much(loop: Loop, pair: Pair, make: Any) -> None:
    data = os.urandom(16 << 20)
    got = bytearray()
    with in_thread(lambda: got.extend(read_exactly(pair[1], len(data)))):
        assert await loop.sock_sendall(pair[0], make(data)) is None
    assert got == data


async def test_sock_sendall_of_nothing(loop: Loop, pair: Pair) -> None:
    for nothing in (b"", bytearray(), memoryview(b"")):
        await loop.sock_sendall(pair[0], nothing)


async def test_sock_sendall_to_a_peer_that_resets(loop: Loop, pair: Pair) -> None:
    fill(pair[0])  # or Windows takes it all
    task = asyncio.create_task(loop.sock_sendall(pair[0], bytes(32 << 20)))
    await turns()
    reset(pair[1])
    with pytest.raises(ConnectionError):
        await task


async def test_sock_connect_and_sock_accept(loop: Loop, listener: socket.socket) -> None:
    accept = asyncio.create_task(loop.sock_accept(listener))
    await turns()
    with socket.socket() as client:
        client.setblocking(False)
        await loop.sock_connect(client, ("localhost", listener.getsockname()[1]))  # a name is resolved
        conn, address = await accept
        with conn:
            assert address == client.getsockname()
            assert conn.gettimeout() == 0
            await loop.sock_sendall(conn, b"hello")
            assert await loop.sock_recv(client, 100) == b"hello"


async def test_sock_accept_of_a_connection_that_waits_already(loop: Loop, listener: socket.socket) -> None:
    with socket.create_connection(listener.getsockname(), LIMIT) as client:
        conn, address = await loop.sock_accept(listener)
        with conn:
            assert conn.gettimeout() == 0
            assert address == client.getsockname()


async def test_sock_connect_refused(loop: Loop) -> None:
    with listening_socket() as sock:
        address = sock.getsockname()
    with socket.socket() as client:
        client.setblocking(False)
        with pytest.raises(ConnectionRefusedError):
            await loop.sock_connect(client, address)


async def test_a_connect_begins_before_the_next_turn(loop: Loop) -> None:
    with listening_socket() as listener, socket.socket() as client:
        client.setblocking(False)
        task = asyncio.create_task(loop.sock_connect(client, listener.getsockname()))
        await asyncio.sleep(0)
        listener.settimeout(LIMIT)
        conn, _ = listener.accept()  # the loop stands still meanwhile
        conn.close()
        await task


async def test_connecting_again_after_a_cancelled_connect(loop: Loop) -> None:
    with socket.socket() as listener, socket.socket() as client:
        client.setblocking(False)
        listener.bind(("127.0.0.1", 0))
        task = asyncio.create_task(loop.sock_connect(client, listener.getsockname()))
        await asyncio.sleep(0)
        task.cancel()
        listener.listen()
        try:
            await loop.sock_connect(client, listener.getsockname())
        except (ConnectionRefusedError, ConnectionAbortedError):  # the answer to the first try
            await loop.sock_connect(client, listener.getsockname())
        assert client.getpeername() == listener.getsockname()


async def test_many_at_once(loop: Loop, listener: socket.socket) -> None:
    async def serve(conn: socket.socket) -> None:
        with conn:
            while data := await loop.sock_recv(conn, 1000):
                await loop.sock_sendall(conn, data)

    async def client(number: int) -> None:
        with socket.socket() as sock:
            sock.setblocking(False)
            await loop.sock_connect(sock, listener.getsockname())
            for round_ in range(5):
                message = b"%d %d" % (number, round_)
                await loop.sock_sendall(sock, message)
                assert await loop.sock_recv(sock, 1000) == message

    clients = [asyncio.create_task(client(number)) for number in range(50)]
    servers = [asyncio.create_task(serve((await loop.sock_accept(listener))[0])) for _ in clients]
    await asyncio.gather(*clients, *servers)


async def test_a_timed_out_receive_loses_nothing(loop: Loop, pair: Pair) -> None:
    """wait_for around sock_recv in a loop, while the peer sends in its own rhythm."""
    data = os.urandom(200)
    got = bytearray()

    def send() -> None:
        for position in range(0, len(data), 4):
            pair[1].sendall(data[position : position + 4])
            time.sleep(0.001)

    with in_thread(send):
        while len(got) < len(data):
            try:
                got += await asyncio.wait_for(loop.sock_recv(pair[0], 3), 0.0007)
            except TimeoutError:
                pass
    assert got == data


def _receive_into(loop: Loop, sock: socket.socket) -> Any:
    buffer = bytearray(1)

    async def receive() -> bytes:
        return bytes(buffer[: await loop.sock_recv_into(sock, buffer)])

    return receive()


@pytest.mark.parametrize("receive", [lambda loop, sock: loop.sock_recv(sock, 1), _receive_into])
async def test_one_of_several_that_receive_is_given_up_as_its_bytes_come(loop: Loop, pair: Pair, receive: Any) -> None:
    """They are for the next in line, who gets no later ones."""
    tasks = [loop.create_task(receive(loop, pair[0])) for _ in range(3)]
    await turns()
    pair[1].sendall(b"abc")
    await asyncio.sleep(0)  # the next turn takes what has come, and then it is for us to run
    tasks[0].cancel()
    assert await asyncio.wait_for(asyncio.gather(*tasks[1:]), LIMIT) == [b"a", b"b"]
    assert tasks[0].cancelled()
    assert await loop.sock_recv(pair[0], 10) == b"c"


@pytest.mark.parametrize("receive", [lambda loop, sock: loop.sock_recv(sock, 1), _receive_into])
async def test_who_begins_to_receive_as_another_is_served_and_given_up(loop: Loop, pair: Pair, receive: Any) -> None:
    first = loop.create_task(receive(loop, pair[0]))
    await turns()
    pair[1].sendall(b"abc")
    second = loop.create_task(receive(loop, pair[0]))
    loop.call_soon(first.cancel)
    assert await asyncio.wait_for(second, LIMIT) == b"a"
    assert first.cancelled()
    assert await loop.sock_recv(pair[0], 10) == b"bc"
    await turns()
    assert not loop._proactor.claims(pair[0])


async def test_one_of_several_that_accept_is_given_up_as_its_client_comes(loop: Loop, listener: socket.socket) -> None:
    """The client is for the next in line, who does not wait for another."""
    tasks = [loop.create_task(loop.sock_accept(listener)) for _ in range(3)]
    await turns()
    with socket.create_connection(listener.getsockname()) as client:
        await asyncio.sleep(0)  # as above
        tasks[0].cancel()
        sock, address = await asyncio.wait_for(tasks[1], LIMIT)
        with sock:
            assert address == client.getsockname()
    tasks[2].cancel()
    await asyncio.wait(tasks)
    await turns(10)
    assert not loop._proactor.in_flight


@pytest.mark.parametrize("by", ["task", "driver"])
async def test_a_cancelled_call_ends_its_operation(loop: Loop, pair: Pair, listener: socket.socket, by: str) -> None:
    """`by`: on Windows the system cancels what waits for a socket that is closed."""
    fill(pair[0])  # or Windows takes all of a sock_sendall
    with udp_socket() as datagrams:
        calls: list[Any] = [
            loop.sock_recv(pair[0], 10),
            loop.sock_recv_into(pair[0], bytearray(10)),
            loop.sock_accept(listener),
            loop.sock_recvfrom(datagrams, 10),
            loop.sock_sendall(pair[0], bytes(64 << 20)),
        ]
        tasks = [asyncio.create_task(call) for call in calls]
        await turns()
        if by == "task":
            for task in tasks:
                task.cancel()
        else:
            for _ in range(10):  # again for those that stood behind another
                for op in list(loop._proactor.in_flight.values()):
                    loop._proactor.cancel(op)
                await turns()
            assert all(task.done() for task in tasks)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
        await turns(10)
        assert not loop._proactor.in_flight


async def test_a_blocking_socket_is_refused_in_debug_mode(loop: Loop, pair: Pair) -> None:
    loop.set_debug(True)
    pair[0].setblocking(True)
    calls: list[Any] = [
        loop.sock_recv(pair[0], 1),
        loop.sock_recv_into(pair[0], bytearray(1)),
        loop.sock_sendall(pair[0], b"x"),
        loop.sock_connect(pair[0], ("127.0.0.1", 1)),
        loop.sock_accept(pair[0]),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="non-blocking"):
            await call


async def test_a_tls_socket_is_refused(loop: Loop) -> None:
    context = ssl.create_default_context()
    with context.wrap_socket(socket.socket(), server_hostname="localhost") as sock:
        with pytest.raises(TypeError, match="SSLSocket"):
            await loop.sock_recv(sock, 1)
        with pytest.raises(TypeError, match="SSLSocket"):
            await loop.sock_sendall(sock, b"x")


async def test_a_transport_is_forgotten_when_its_socket_closes(loop: Loop, no_leak: None) -> None:
    """Its number comes back as somebody else's."""
    ours, peer = tcp_pair()
    protocol = await connected(loop, (ours, peer))
    datagrams, _ = await loop.create_datagram_endpoint(asyncio.DatagramProtocol, local_addr=("127.0.0.1", 0))
    assert len(loop._transports) == 2
    await closed(protocol)
    datagrams.close()
    await turns()
    assert ours.fileno() == -1
    assert not loop._transports  # though both transports are held here
    peer.close()


@pytest.mark.skipif(WINDOWS, reason="there a socket that operations refer to must not be closed")
async def test_a_number_that_comes_back_belongs_to_no_transport(loop: Loop, no_leak: None) -> None:
    ours, peer = tcp_pair()
    protocol = await connected(loop, (ours, peer))
    protocol.transport.pause_reading()
    await turns()
    number = ours.fileno()
    one, two = socket.socketpair()
    with one, two:
        ours.close()  # behind the back of its transport
        again = socket.socket(fileno=os.dup2(one.fileno(), number, inheritable=False))
        again.setblocking(False)
        with again:
            loop.call_later(0.01, two.send, b"hello")
            assert await loop.sock_recv(again, 100) == b"hello"
            ready = loop.create_future()
            loop.add_writer(again, lambda: ready.done() or ready.set_result(None))
            await ready
            loop.remove_writer(again)
    protocol.transport.abort()
    await until(lambda: protocol.finished)
    peer.close()


async def test_a_socket_of_a_transport_is_refused(loop: Loop, pair: Pair) -> None:
    transport, _ = await loop.create_connection(asyncio.Protocol, sock=pair[0])
    for call in (loop.sock_recv(pair[0], 1), loop.sock_recv_into(pair[0], bytearray(1))):
        with pytest.raises(RuntimeError, match="used by transport"):
            await call
    transport.close()
    await turns(10)
