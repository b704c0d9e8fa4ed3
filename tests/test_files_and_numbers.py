"""An operation belongs to a file, not to the number under which that is open, and nothing holds a closed file open."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import socket
import sys
import warnings
from typing import Any

import pytest

from iocp_loop import CompletionPort, IocpEventLoop, new_event_loop
from iocp_loop import operations as ops

from .rig import Pair, Rig, received
from .support import LIMIT, Recorder, closed, connected, fill, listening_socket, open_files, tcp_pair, turns, until

if sys.platform == "win32":
    pytest.skip(
        "the numbers of sockets are Unix descriptors here; test_iocp.py has those of Windows", allow_module_level=True
    )

Loop = IocpEventLoop


def in_place_of(number: int) -> tuple[socket.socket, socket.socket]:
    """A pair of sockets, non-blocking, the first of which has a number that has just become free."""
    first, second = socket.socketpair()
    if first.fileno() != number:
        first, second = second, first
    assert first.fileno() == number
    first.setblocking(False)
    second.setblocking(False)
    return first, second


def what_came(sock: socket.socket) -> bytes:
    try:
        return sock.recv(1 << 16)
    except BlockingIOError:
        return b""


# -- nothing reaches another file ------------------------------------------------------------------


@pytest.mark.parametrize("way", ["write", "writelines", "sock_sendall"])
async def test_the_rest_of_a_send_does_not_go_to_another_socket(loop: Loop, reports: list[Any], way: str) -> None:
    ours, peer = socket.socketpair()
    ours.setblocking(False)
    peer.setblocking(False)
    data = bytes(4_000_000)
    transport: Any = None
    task: Any = None
    if way == "sock_sendall":
        task = asyncio.ensure_future(loop.sock_sendall(ours, data))
    else:
        transport, _ = await loop.create_connection(Recorder, sock=ours)
        transport.writelines([data[:100_000]] * 40) if way == "writelines" else transport.write(data)
    await turns()
    number = ours.fileno()
    ours.close()
    other, its_peer = in_place_of(number)
    for _ in range(50):
        what_came(peer)
        await asyncio.sleep(0.001)
        assert not what_came(its_peer)
    if transport is not None:
        transport.abort()
    else:
        task.cancel()
        await asyncio.wait([task])
    await turns()
    for sock in (peer, other, its_peer):
        sock.close()
    reports.clear()  # a socket that was closed under its transport


@pytest.mark.parametrize("turns_before", [0, 3])
async def test_a_receive_does_not_take_from_another_socket(loop: Loop, turns_before: int) -> None:
    ours, peer = socket.socketpair()
    ours.setblocking(False)
    task = asyncio.ensure_future(loop.sock_recv(ours, 100))
    await asyncio.sleep(0)
    await turns(turns_before)
    number = ours.fileno()
    ours.close()
    other, its_peer = in_place_of(number)
    its_peer.send(b"not yours")
    await asyncio.sleep(0.02)
    assert what_came(other) == b"not yours"
    task.cancel()
    await asyncio.wait([task])
    for sock in (peer, other, its_peer):
        sock.close()


@pytest.mark.parametrize("large", [False, True])
def test_a_stream_that_goes_on_after_a_rest_asks_whose_number_it_is(rig: Rig, large: bool) -> None:
    ours, peer = socket.socketpair()
    ours.setblocking(False)
    op = rig.submit(ops.ReceiveStream(ours))
    size = 60_000 if large else 10
    for count in range(1, 9):
        peer.send(bytes(size))
        rig.until(lambda: len(received(rig, op)) == count * size)  # noqa: B023 - called here
    rig.driver.pause(op)
    rig.turn()
    number = ours.fileno()
    os.close(number)  # behind the socket object's back
    other, its_peer = in_place_of(number)
    before = len(rig.delivered)
    if rig.driver.name == "uring":
        rig.driver.resume(op)
        its_peer.send(b"not yours")
        assert rig.last_error(op).errno == errno.EBADF
        assert len(rig.delivered) == before + 1
        assert what_came(other) == b"not yours"
    else:
        rig.end(op)  # a poller's own call goes by the number that the socket object has, as with every other loop
    ours.detach()
    for sock in (peer, other, its_peer):
        sock.close()


async def test_a_socket_that_was_replaced_by_dup2_is_waited_for_anew(loop: Loop, pair: Pair) -> None:
    other, its_peer = tcp_pair()
    with other, its_peer:
        task = asyncio.ensure_future(loop.sock_recv(pair[0], 10))
        await turns()
        pair[1].send(b"one")
        assert await task == b"one"
        os.dup2(other.fileno(), pair[0].fileno())
        task = asyncio.ensure_future(loop.sock_recv(pair[0], 10))
        await turns()
        its_peer.send(b"two")
        assert await task == b"two"


async def test_numbers_that_were_watched_and_closed_serve_pipes_and_processes(loop: Loop) -> None:
    pairs = [socket.socketpair() for _ in range(30)]
    for ours, _ in pairs:
        loop.add_reader(ours.fileno(), lambda: None)
    await asyncio.sleep(0.01)
    for ours, _ in pairs:
        ours.close()
    process = await asyncio.create_subprocess_exec("sh", "-c", "exit 3")
    assert await process.wait() == 3
    for _, peer in pairs:
        peer.close()
    for number in list(loop._readers):
        loop.remove_reader(number)


async def test_a_reader_of_a_number_that_comes_back_is_the_new_files(loop: Loop) -> None:
    ours, peer = socket.socketpair()
    number = ours.fileno()
    loop.add_reader(number, lambda: None)
    await turns()
    ours.close()
    other, its_peer = in_place_of(number)
    called = asyncio.Event()
    loop.add_writer(number, called.set)
    await asyncio.wait_for(called.wait(), LIMIT)
    loop.remove_writer(number)
    loop.remove_reader(number)
    for sock in (peer, other, its_peer):
        sock.close()


# -- nothing holds a closed file open --------------------------------------------------------------


@pytest.mark.parametrize("wait", ["sock_recv", "sock_recv_into", "add_reader"])
async def test_the_peer_of_a_socket_that_is_closed_while_somebody_waits_sees_the_end(loop: Loop, wait: str) -> None:
    ours, peer = tcp_pair()
    task: Any = None
    if wait == "add_reader":
        loop.add_reader(ours, lambda: None)
    else:
        call = loop.sock_recv(ours, 10) if wait == "sock_recv" else loop.sock_recv_into(ours, bytearray(10))
        task = asyncio.ensure_future(call)
    await turns()
    ours.close()
    await turns()
    assert await asyncio.to_thread(peer.recv, 10) == b""
    if task is None:
        loop.remove_reader(ours)
    else:
        task.cancel()
        await asyncio.wait([task])
    peer.close()


@pytest.mark.parametrize("wait", ["sock_accept", "add_reader"])
async def test_the_port_of_a_listener_that_is_closed_while_somebody_waits_is_free(loop: Loop, wait: str) -> None:
    listener = listening_socket()
    address = listener.getsockname()
    task: Any = None
    if wait == "add_reader":
        loop.add_reader(listener, lambda: None)
    else:
        task = asyncio.ensure_future(loop.sock_accept(listener))
    await turns()
    listener.close()
    with socket.create_server(address) as again, socket.create_connection(address, LIMIT):
        again.settimeout(LIMIT)
        again.accept()[0].close()
    if task is None:
        loop.remove_reader(listener)
    else:
        task.cancel()
        await asyncio.wait([task])


async def test_a_send_that_waits_does_not_keep_its_socket(loop: Loop) -> None:
    ours, peer = tcp_pair()
    filled = fill(ours)
    task = asyncio.ensure_future(loop.sock_sendall(ours, b"more"))
    await turns()
    ours.close()

    def read() -> int:
        count = 0
        while data := peer.recv(1 << 20):
            count += len(data)
        return count

    assert await asyncio.to_thread(read) == filled
    task.cancel()
    await asyncio.wait([task])
    peer.close()


# -- what is dropped without close closes each descriptor once -------------------------------------


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_loop_that_is_dropped_closes_its_own_descriptors_and_no_others(
    driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    others: list[int] = []
    # The warning comes in the midst of it; what is opened there takes the numbers that have just become free.
    monkeypatch.setattr(warnings, "showwarning", lambda *_: others.append(os.open(os.devnull, os.O_WRONLY)))
    warnings.simplefilter("always")
    gc.collect()
    before = open_files() or set()
    for _ in range(10):
        loop = new_event_loop(driver)
        loop.call_later(1000, print)
        loop.run_until_complete(asyncio.sleep(0))
        del loop
        gc.collect()
    for fd in others:
        os.close(fd)  # EBADF if somebody else has
    assert others
    assert not (open_files() or set()) - before


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_port_that_is_dropped_leaks_nothing(driver: str, pair: Pair) -> None:
    gc.collect()
    before = open_files() or set()
    for _ in range(10):
        port = CompletionPort(driver=driver)
        port.submit(ops.Receive(pair[0], 10))
        port.get(0)
        del port
    gc.collect()
    assert not (open_files() or set()) - before


async def test_a_transport_whose_socket_is_closed_ends_in_order(loop: Loop, pair: Pair, reports: list[Any]) -> None:
    protocol = await connected(loop, pair)
    pair[0].close()
    protocol.transport.write(b"nowhere")
    await closed(protocol)
    await until(lambda: not loop._proactor.in_flight)
    reports.clear()
