"""Driver iocp: requests that end with the thread that made them are made again."""

from __future__ import annotations

import socket
import sys
from typing import Any

import pytest

if sys.platform != "win32":
    pytest.skip("I/O completion ports exist on Windows only", allow_module_level=True)

from iocp_loop import operations as ops
from iocp_loop.ports.iocp.binding import RETRY
from iocp_loop.ports.iocp.driver import IocpDriver

from .support import LIMIT, udp_socket
from .windows_rig import UNDONE, leave_undone

Pair = tuple[socket.socket, socket.socket]


@pytest.mark.parametrize("code", UNDONE.values(), ids=UNDONE)
@pytest.mark.parametrize("kind", [ops.Receive, ops.ReceiveStream, ops.Readiness, ops.ReadinessStream])
def test_what_a_thread_left_undone_on_a_connection_is_done_again(kind: Any, code: int, pair: Pair) -> None:
    got: list[Any] = []
    driver = IocpDriver()
    op = kind(pair[0], *([100] if kind is ops.Receive else [] if kind is ops.ReceiveStream else [ops.READABLE]))
    op.complete = lambda value, error: got.append(error or value)
    driver.submit(op)
    leave_undone(driver, code)
    assert not got
    pair[1].sendall(b"hello")
    driver.wait(LIMIT)
    driver.dispatch()
    assert got == [b"hello" if kind in (ops.Receive, ops.ReceiveStream) else ops.READABLE]
    driver.close()


@pytest.mark.parametrize("code", UNDONE.values(), ids=UNDONE)
@pytest.mark.parametrize("kind", [ops.ReceiveFrom, ops.ReceiveFromStream])
def test_what_a_thread_left_undone_on_a_datagram_socket_is_done_again(kind: Any, code: int) -> None:
    got: list[Any] = []
    driver = IocpDriver()
    with udp_socket() as ours, udp_socket() as peer:
        op = kind(ours, 100)
        op.complete = lambda value, error: got.append(error or value)
        driver.submit(op)
        leave_undone(driver, code)
        assert not got
        peer.sendto(b"hello", ours.getsockname())
        driver.wait(LIMIT)
        driver.dispatch()
        assert got == [(b"hello", peer.getsockname())]
        driver.close()


@pytest.mark.parametrize("code", UNDONE.values(), ids=UNDONE)
@pytest.mark.parametrize("kind", [ops.Accept, ops.AcceptStream])
def test_what_a_thread_left_undone_on_a_listener_is_done_again(kind: Any, code: int, listener: socket.socket) -> None:
    got: list[Any] = []
    driver = IocpDriver()
    op = kind(listener)
    op.complete = lambda value, error: got.append(error or value)
    driver.submit(op)
    leave_undone(driver, code)
    assert not got
    with socket.create_connection(listener.getsockname(), LIMIT) as peer:
        driver.wait(LIMIT)
        driver.dispatch()
        [(conn, address)] = got
        assert address == peer.getsockname()
        conn.close()
    driver.close()


def test_a_connection_that_an_unfinished_accept_has_brought_is_kept(listener: socket.socket) -> None:
    got: list[Any] = []
    driver = IocpDriver()
    op = ops.AcceptStream(listener)
    op.complete = lambda value, error: got.append(error or value)
    driver.submit(op)
    with socket.create_connection(listener.getsockname(), LIMIT) as peer:
        driver.wait(LIMIT)
        driver._port.batch[2] = RETRY
        driver.dispatch()
        [(conn, address)] = got
        assert address == peer.getsockname()
        conn.close()
    driver.close()


@pytest.mark.parametrize("connected", [True, False])
def test_an_unfinished_connect_succeeds_if_the_socket_is_connected(connected: bool, listener: socket.socket) -> None:
    got: list[Any] = []
    driver = IocpDriver()
    address = listener.getsockname()
    if not connected:
        listener.close()
    with socket.socket() as sock:
        op = ops.Connect(sock, address)
        op.complete = lambda value, error: got.append(error)
        driver.submit(op)
        driver.wait(LIMIT)
        driver._port.batch[2] = RETRY
        driver.dispatch()
        if connected:
            assert got == [None]
        else:
            assert got[0].winerror == RETRY
    driver.close()
