"""Driver iocp: datagram endpoints, and what Windows does with them."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Iterator
from typing import Any

import pytest

if sys.platform != "win32":
    pytest.skip("I/O completion ports exist on Windows only", allow_module_level=True)


import iocp_loop
from iocp_loop import operations as ops
from iocp_loop.ports.iocp.binding import lib
from iocp_loop.ports.iocp.driver import IocpDriver

from .support import turns, udp_socket, until


class Datagrams(asyncio.DatagramProtocol):
    """Notes what comes, and what it is told."""

    def __init__(self) -> None:
        self.data: list[bytes] = []
        self.errors: list[Exception] = []
        self.calls: list[str] = []

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.data.append(data)

    def error_received(self, exc: Exception) -> None:
        self.errors.append(exc)

    def pause_writing(self) -> None:
        self.calls.append("pause_writing")

    def resume_writing(self) -> None:
        self.calls.append("resume_writing")

    def connection_lost(self, exc: Exception | None) -> None:
        self.calls.append("connection_lost")


#: "Port unreachable" as Winsock says it, as Windows does elsewhere, and "time to live exceeded".
@pytest.mark.parametrize("code", [10054, 1234, 10052])
async def test_an_endpoint_receives_on_after_what_a_datagram_met(loop: iocp_loop.IocpEventLoop, code: int) -> None:
    """gh-91227, gh-127057, gh-156784.  Wine hands no such answer to a receive, so it is put into a completion here."""
    transport, protocol = await loop.create_datagram_endpoint(Datagrams, local_addr=("127.0.0.1", 0))
    await turns()
    driver = loop._proactor.driver
    assert isinstance(driver, IocpDriver)
    finish = driver._received_datagram

    def unreachable(sub: Any, count: int, _code: int) -> None:
        finish(sub, 0, code)

    [sub] = [sub for sub in driver._outstanding.values() if isinstance(sub.op, ops.ReceiveFromStream)]
    sub.finish = unreachable
    lib.iocp_cancel(sub.native)
    await until(lambda: protocol.errors)
    assert [error.winerror for error in protocol.errors] == [code]
    with udp_socket() as peer:
        peer.sendto(b"hello", transport.get_extra_info("sockname"))
        await until(lambda: protocol.data)
    assert protocol.data == [b"hello"]
    transport.close()
    await until(lambda: protocol.calls == ["connection_lost"])


class Reluctant(socket.socket):
    """A datagram socket whose sends would block, so that every datagram goes by the port."""

    def sendto(self, *_: Any) -> int:
        raise BlockingIOError


@pytest.fixture
def reluctant() -> Iterator[socket.socket]:
    with Reluctant(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.setblocking(False)
        yield sock


async def test_an_endpoint_that_closes_sends_what_is_queued(
    loop: iocp_loop.IocpEventLoop, reluctant: socket.socket
) -> None:
    """gh-156920"""
    transport, protocol = await loop.create_datagram_endpoint(Datagrams, sock=reluctant)
    with udp_socket() as peer:
        for number in range(20):
            transport.sendto(b"%d" % number, peer.getsockname())
        transport.close()
        await until(lambda: protocol.calls)
        assert protocol.calls == ["connection_lost"]
        assert [peer.recv(100) for _ in range(20)] == [b"%d" % number for number in range(20)]


async def test_a_paused_endpoint_resumes_when_its_sends_fail(
    loop: iocp_loop.IocpEventLoop, reluctant: socket.socket
) -> None:
    """gh-156698"""
    transport, protocol = await loop.create_datagram_endpoint(Datagrams, sock=reluctant)
    transport.set_write_buffer_limits(high=100)
    for _ in range(20):
        transport.sendto(bytes(66_000), ("127.0.0.1", 9))  # longer than any datagram: refused
    assert protocol.calls == ["pause_writing"]
    await until(lambda: len(protocol.errors) == 20)
    assert protocol.calls == ["pause_writing", "resume_writing"]
    transport.close()
    await until(lambda: protocol.calls[-1] == "connection_lost")


async def test_many_datagrams_that_wait_come_together(loop: iocp_loop.IocpEventLoop) -> None:
    protocol = Datagrams()
    transport, _ = await loop.create_datagram_endpoint(lambda: protocol, local_addr=("127.0.0.1", 0))
    address = transport.get_extra_info("sockname")
    await turns()
    before = loop.stats()
    with udp_socket() as sender:
        for number in range(32):  # no turn of the loop meanwhile
            sender.sendto(b"%d" % number, address)
    await until(lambda: len(protocol.data) == 32)
    assert protocol.data == [b"%d" % number for number in range(32)]
    assert loop.stats().batches - before.batches < 16
    transport.close()
    await turns()
