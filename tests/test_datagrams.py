"""Datagram endpoints: UDP over both families, UNIX datagram sockets, errors, flow control, closing."""

from __future__ import annotations

import asyncio
import errno
import gc
import socket
import warnings
from pathlib import Path
from typing import Any

import pytest

import iocp_loop
from iocp_loop import operations as ops
from iocp_loop.endpoints.datagrams import DatagramTransport

from .support import WINDOWS, WINE, turns, udp_socket, until

Loop = iocp_loop.IocpEventLoop

UNIX = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="this Python has no UNIX sockets")


class Collector(asyncio.DatagramProtocol):
    """Notes what an endpoint tells it."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.received: list[tuple[bytes, Any]] = []
        self.errors: list[Exception] = []
        self.lost: BaseException | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, DatagramTransport)
        self.calls.append("connection_made")
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.received.append((data, addr))

    def error_received(self, exc: Exception) -> None:
        self.errors.append(exc)

    def connection_lost(self, exc: BaseException | None) -> None:
        self.calls.append("connection_lost")
        self.lost = exc

    def pause_writing(self) -> None:
        self.calls.append("pause_writing")

    def resume_writing(self) -> None:
        self.calls.append("resume_writing")

    @property
    def data(self) -> list[bytes]:
        return [data for data, _ in self.received]

    async def gets(self, data: bytes) -> None:
        await until(lambda: self.data[-1:] == [data])

    async def fails(self, times: int) -> None:
        await until(lambda: len(self.errors) >= times)

    async def closed(self) -> None:
        self.transport.close()
        await until(lambda: self.calls[-1] == "connection_lost")


class Echo(Collector):
    def datagram_received(self, data: bytes, addr: Any) -> None:
        super().datagram_received(data, addr)
        self.transport.sendto(data, addr)


async def endpoint(loop: Loop, protocol: type[Collector] = Collector, **arguments: Any) -> Collector:
    """A new endpoint's protocol; without arguments, on a free port of the loopback interface."""
    if not arguments:
        arguments = {"local_addr": ("127.0.0.1", 0)}
    transport, made = await loop.create_datagram_endpoint(protocol, **arguments)
    assert isinstance(transport, DatagramTransport)
    assert made.transport is transport
    return made


def address_of(protocol: Collector) -> Any:
    return protocol.transport.get_extra_info("sockname")


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        pytest.param("::1", marks=pytest.mark.skipif(not has_ipv6(), reason="no IPv6 on this machine")),
    ],
)
async def test_there_and_back(loop: Loop, host: str) -> None:
    server = await endpoint(loop, Echo, local_addr=(host, 0))
    client = await endpoint(loop, remote_addr=address_of(server)[:2])
    assert client.transport.get_extra_info("peername")[:2] == address_of(server)[:2]
    for data in (b"one", b"two" * 400, b"x" * 60_000):
        client.transport.sendto(data)
        await client.gets(data)
    assert server.received[0][1][:2] == address_of(client)[:2]
    await client.closed()
    await server.closed()
    assert client.calls == ["connection_made", "connection_lost"]
    assert client.lost is None


async def test_every_datagram_stays_one(loop: Loop) -> None:
    server = await endpoint(loop)
    client = await endpoint(loop, remote_addr=address_of(server))
    sent = [b"%d" % number * (number % 50) for number in range(100)]
    for data in sent:
        client.transport.sendto(data)
    await until(lambda: len(server.received) == len(sent))
    assert server.data == sent  # the loopback interface keeps the order, and empty datagrams
    await client.closed()
    await server.closed()


async def test_one_endpoint_sends_to_several_addresses(loop: Loop) -> None:
    first, second = await endpoint(loop), await endpoint(loop)
    sender = await endpoint(loop)
    sender.transport.sendto(bytearray(b"first"), address_of(first))
    sender.transport.sendto(memoryview(b"second"), address_of(second))
    await until(lambda: first.received and second.received)
    assert first.received == [(b"first", address_of(sender))]
    assert second.received == [(b"second", address_of(sender))]
    for one in (first, second, sender):
        await one.closed()


async def test_an_endpoint_with_a_remote_address_takes_no_other(loop: Loop) -> None:
    server = await endpoint(loop)
    client = await endpoint(loop, remote_addr=address_of(server))
    with pytest.raises(ValueError, match="Invalid address"):
        client.transport.sendto(b"x", ("127.0.0.1", 9))
    client.transport.sendto(b"x", address_of(server))
    await until(lambda: server.received)
    await client.closed()
    await server.closed()


async def test_only_bytes_can_be_sent(loop: Loop) -> None:
    one = await endpoint(loop)
    with pytest.raises(TypeError):
        one.transport.sendto("text", address_of(one))
    await one.closed()


@pytest.mark.parametrize("address", ["nowhere", None, (), 7], ids=repr)
async def test_a_senseless_address_ends_the_endpoint(loop: Loop, reports: list[dict[str, Any]], address: Any) -> None:
    """As with asyncio's own loops; that there is none at all is no better."""
    one = await endpoint(loop)
    one.transport.sendto(b"x", address)
    await until(lambda: one.calls[-1] == "connection_lost")
    assert isinstance(one.lost, TypeError)
    assert reports.pop()["exception"] is one.lost


async def test_a_socket_of_the_caller(loop: Loop) -> None:
    sock = udp_socket()
    one = await endpoint(loop, sock=sock)
    one.transport.sendto(b"to myself", sock.getsockname())
    await until(lambda: one.received)
    assert one.transport.get_extra_info("socket").fileno() == sock.fileno()
    await one.closed()
    assert sock.fileno() == -1


async def test_reuse_port(loop: Loop) -> None:
    if not hasattr(socket, "SO_REUSEPORT"):
        pytest.skip("this system has no SO_REUSEPORT")
    first = await endpoint(loop, local_addr=("127.0.0.1", 0), reuse_port=True)
    second = await endpoint(loop, local_addr=address_of(first), reuse_port=True)
    assert address_of(first) == address_of(second)
    with pytest.raises(OSError) as caught:
        await endpoint(loop, local_addr=address_of(first))
    assert caught.value.errno == errno.EADDRINUSE
    await first.closed()
    await second.closed()


async def test_broadcast(loop: Loop) -> None:
    one = await endpoint(loop, local_addr=("0.0.0.0", 0), allow_broadcast=True)
    option = one.transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST)
    assert option
    # Loopback's own broadcast address reaches whoever listens on all addresses.
    one.transport.sendto(b"to all", ("127.255.255.255", address_of(one)[1]))
    await until(lambda: one.received or one.errors)
    assert one.data == [b"to all"]
    await one.closed()


async def test_broadcast_without_leave_is_an_error_received(loop: Loop) -> None:
    one = await endpoint(loop)
    one.transport.sendto(b"to all", ("255.255.255.255", 9))
    await until(lambda: one.errors)
    assert one.errors[0].errno in (errno.EACCES, errno.ENETUNREACH)  # type: ignore[attr-defined]  # an OSError
    assert not one.transport.is_closing()
    await one.closed()


@pytest.mark.skipif(WINE, reason="under Wine the answer 'port unreachable' does not reach a receive")
async def test_port_unreachable_reaches_error_received_and_receiving_goes_on(loop: Loop) -> None:
    """gh-91227, gh-127057: one answer 'port unreachable' ended the receiving for good."""
    with udp_socket() as closed_soon:
        nowhere = closed_soon.getsockname()
    one = await endpoint(loop, remote_addr=nowhere)
    for count in range(1, 4):
        one.transport.sendto(b"anybody there?")
        await one.fails(count)
    expected = errno.ECONNRESET if WINDOWS else errno.ECONNREFUSED
    assert {error.errno for error in one.errors} == {expected}  # type: ignore[attr-defined]  # OSErrors
    late = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with late:
        late.bind(nowhere)
        late.sendto(b"now I am", address_of(one))
        await until(lambda: one.received)
    assert one.data == [b"now I am"]
    await one.closed()


async def test_an_endpoint_without_an_address(loop: Loop) -> None:
    """gh-119711: nothing can arrive before the first datagram has been sent, which binds the socket."""
    server = await endpoint(loop, Echo)
    one = await endpoint(loop, family=socket.AF_INET)
    await turns(20)
    one.transport.sendto(b"hello", address_of(server))
    await until(lambda: one.data == [b"hello"])
    assert one.errors == []
    await one.closed()
    await server.closed()


async def test_a_receive_that_wants_a_bound_socket_is_armed_after_the_first_send(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gh-119711 again, with the refusal that Windows has for it and Linux has not."""
    arm = loop._proactor.receive_from_stream
    calls = 0
    refusal: Any = OSError(errno.EINVAL, "an invalid argument was supplied")
    refusal.winerror = 10022  # WSAEINVAL

    def refuse_once(sock: socket.socket, size: int, deliver: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            loop.call_soon(deliver, None, refusal)
            return None
        return arm(sock, size, deliver)

    monkeypatch.setattr(loop._proactor, "receive_from_stream", refuse_once)
    server = await endpoint(loop, Echo)
    assert calls == 1
    await turns(20)
    assert (calls, server.errors) == (1, [])
    client = await endpoint(loop)
    server.transport.sendto(b"first", address_of(client))
    client.transport.sendto(b"second", address_of(server))
    await until(lambda: client.data == [b"first", b"second"])
    await client.closed()
    await server.closed()


async def test_another_invalid_argument_is_an_error_received_and_receiving_goes_on(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EINVAL that does not say "no address yet" stopped the receiving until the next datagram was sent."""
    arm = loop._proactor.receive_from_stream
    refusal = OSError(errno.EINVAL, "an invalid argument was supplied")
    refusals = [refusal]

    def refuse_once(sock: socket.socket, size: int, deliver: Any) -> Any:
        if refusals:
            loop.call_soon(deliver, None, refusals.pop())
            return None
        return arm(sock, size, deliver)

    monkeypatch.setattr(loop._proactor, "receive_from_stream", refuse_once)
    one = await endpoint(loop)
    await one.fails(1)
    assert one.errors == [refusal]
    with udp_socket() as peer:
        peer.sendto(b"all the same", address_of(one))
        await one.gets(b"all the same")
    await one.closed()


async def test_datagram_received_may_raise(loop: Loop, reports: list[dict[str, Any]]) -> None:
    class Faulty(Collector):
        def datagram_received(self, data: bytes, addr: Any) -> None:
            super().datagram_received(data, addr)
            raise ZeroDivisionError

    server = await endpoint(loop, Faulty)
    client = await endpoint(loop, remote_addr=address_of(server))
    client.transport.sendto(b"1")
    client.transport.sendto(b"2")
    await until(lambda: len(server.received) == 2)
    assert [type(report["exception"]) for report in reports] == [ZeroDivisionError] * 2
    reports.clear()
    assert not server.transport.is_closing()
    await client.closed()
    await server.closed()


async def test_connection_made_may_raise(loop: Loop, reports: list[dict[str, Any]]) -> None:
    class Faulty(Collector):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await endpoint(loop, Faulty)
    assert isinstance(reports.pop()["exception"], ZeroDivisionError)


async def test_a_datagram_sent_in_connection_made_begins_one_receive(loop: Loop) -> None:
    class Eager(Collector):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            transport.sendto(b"at once", address_of(server))

    server = await endpoint(loop)
    client = await endpoint(loop, Eager)
    await until(lambda: server.data == [b"at once"])
    streams = [op for op in loop._proactor.in_flight.values() if isinstance(op, ops.ReceiveFromStream)]
    assert len(streams) == 2
    await client.closed()
    await server.closed()


@pytest.mark.skipif(WINE, reason="under Wine the answer 'port unreachable' does not reach a receive")
async def test_a_datagram_sent_in_error_received_begins_no_second_receive(loop: Loop) -> None:
    class Again(Collector):
        def error_received(self, exc: Exception) -> None:
            super().error_received(exc)
            if len(self.errors) == 1:
                self.transport.sendto(b"again")

    with udp_socket() as nobody:
        address = nobody.getsockname()
    client = await endpoint(loop, Again, remote_addr=address)
    client.transport.sendto(b"hello")
    await client.fails(2)
    assert [type(op) for op in loop._proactor.in_flight.values()] == [ops.ReceiveFromStream]
    await client.closed()


async def test_close_in_datagram_received(loop: Loop) -> None:
    class Once(Collector):
        def datagram_received(self, data: bytes, addr: Any) -> None:
            super().datagram_received(data, addr)
            self.transport.close()

    server = await endpoint(loop, Once)
    client = await endpoint(loop, remote_addr=address_of(server))
    for _ in range(5):
        client.transport.sendto(b"x")
    await until(lambda: server.calls[-1] == "connection_lost")
    await turns()
    assert server.data == [b"x"]
    await client.closed()


async def test_after_the_end(loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    server = await endpoint(loop)
    one = await endpoint(loop, remote_addr=address_of(server))
    transport = one.transport
    await one.closed()
    assert transport.is_closing()
    transport.close()
    transport.abort()
    for _ in range(10):
        transport.sendto(b"x")
    assert "socket.send() raised exception." in caplog.text
    await turns()
    assert one.calls.count("connection_lost") == 1
    await server.closed()


async def test_readers_of_the_loop_keep_off(loop: Loop) -> None:
    one = await endpoint(loop)
    number = one.transport.get_extra_info("socket").fileno()
    with pytest.raises(RuntimeError, match="is used by transport"):
        loop.add_reader(number, print)
    with pytest.raises(RuntimeError, match="is used by transport"):
        loop.remove_writer(number)
    await one.closed()
    assert not loop.remove_writer(number)


def test_an_unclosed_endpoint_warns(driver: str) -> None:
    loop = iocp_loop.new_event_loop(driver)
    try:
        made = loop.run_until_complete(loop.create_datagram_endpoint(Collector, local_addr=("127.0.0.1", 0)))
    finally:
        loop.close()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del made
        gc.collect()
    assert "unclosed transport <DatagramTransport open" in "".join(str(warning.message) for warning in caught)


# --------------------------------------------------------------------------------------------------
# UNIX sockets, which are what can be full: UDP throws away
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def unix_peer(tmp_path: Path, no_leak: None) -> Any:
    """A bound UNIX datagram socket that reads when the test wants it to."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "peer"))
        sock.setblocking(False)
        yield sock


def fill_up(one: Collector) -> int:
    """Send until the endpoint has to queue; the number of datagrams."""
    count = 0
    while not one.transport.get_write_buffer_size():
        one.transport.sendto(b"%05d" % count)
        count += 1
        assert count < 100_000
    return count


def drain(sock: socket.socket) -> list[bytes]:
    got = []
    try:
        while True:
            got.append(sock.recv(1 << 16))
    except BlockingIOError:
        return got


async def drained_until_lost(sock: socket.socket, one: Collector) -> list[bytes]:
    """What `sock` gets until the endpoint has ended."""
    got = []
    while one.calls[-1] != "connection_lost":
        got += drain(sock)
        await asyncio.sleep(0)
    return got + drain(sock)


@UNIX
async def test_unix_there_and_back(loop: Loop, tmp_path: Path) -> None:
    server = await endpoint(loop, Echo, family=socket.AF_UNIX, local_addr=str(tmp_path / "server"))
    client = await endpoint(
        loop, family=socket.AF_UNIX, local_addr=str(tmp_path / "client"), remote_addr=str(tmp_path / "server")
    )
    for data in (b"one", b"", b"x" * 100_000):
        client.transport.sendto(data)
        await client.gets(data)
    assert server.received[0][1] == str(tmp_path / "client")
    await client.closed()
    await server.closed()


@UNIX
async def test_what_does_not_fit_is_queued_and_close_flushes_it(loop: Loop, unix_peer: socket.socket) -> None:
    """gh-156920, gh-156698: an endpoint hung when it was closed with something queued."""
    one = await endpoint(loop, family=socket.AF_UNIX, remote_addr=unix_peer.getsockname())
    count = fill_up(one)
    for number in range(count, count + 20):
        one.transport.sendto(b"%05d" % number)
    one.transport.close()
    await turns()
    assert one.calls == ["connection_made"]
    got = await drained_until_lost(unix_peer, one)
    assert got == [b"%05d" % number for number in range(count + 20)]
    assert one.lost is None


@UNIX
async def test_abort_drops_what_is_queued(loop: Loop, unix_peer: socket.socket) -> None:
    one = await endpoint(loop, family=socket.AF_UNIX, remote_addr=unix_peer.getsockname())
    count = fill_up(one)
    one.transport.abort()
    await until(lambda: one.calls[-1] == "connection_lost")
    await until(lambda: not loop.stats().in_flight)
    assert len(drain(unix_peer)) == count - 1


@UNIX
async def test_abort_drops_what_waits_for_room(loop: Loop, unix_peer: socket.socket) -> None:
    """Without a peer of its own the endpoint waits by a timer, which has to go as well."""
    one = await endpoint(loop, family=socket.AF_UNIX)
    count = 0
    while not one.transport.get_write_buffer_size():
        one.transport.sendto(b"%05d" % count, unix_peer.getsockname())
        count += 1
    one.transport.abort()
    await until(lambda: one.calls[-1] == "connection_lost")
    assert one.transport.get_write_buffer_size() == 0
    assert len(drain(unix_peer)) == count - 1
    await asyncio.sleep(0.05)
    assert not drain(unix_peer)


@UNIX
async def test_waiting_for_room_does_not_spin(loop: Loop, unix_peer: socket.socket) -> None:
    """A UNIX socket without a peer counts as writable while the queue of the receiver is full."""
    one = await endpoint(loop, family=socket.AF_UNIX)
    address = unix_peer.getsockname()
    count = 0
    while not one.transport.get_write_buffer_size():
        one.transport.sendto(b"%05d" % count, address)
        count += 1
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.setblocking(False)
        sending = asyncio.ensure_future(loop.sock_sendto(other, b"other", address))
        before = loop.stats().batches
        await asyncio.sleep(0.1)
        assert loop.stats().batches - before < 100
        one.transport.close()
        got = await drained_until_lost(unix_peer, one)
        assert await sending == 5
        got += drain(unix_peer)
    assert sorted(got) == [*(b"%05d" % number for number in range(count)), b"other"]


@UNIX
async def test_flow_control(loop: Loop, unix_peer: socket.socket) -> None:
    one = await endpoint(loop, family=socket.AF_UNIX, remote_addr=unix_peer.getsockname())
    one.transport.set_write_buffer_limits(high=100, low=10)
    fill_up(one)
    assert "pause_writing" not in one.calls
    for _ in range(20):
        one.transport.sendto(b"12345")
    assert one.calls.count("pause_writing") == 1
    assert one.transport.get_write_buffer_size() > 100
    await until(lambda: drain(unix_peer) and "resume_writing" in one.calls)
    await until(lambda: drain(unix_peer) or not one.transport.get_write_buffer_size())
    assert one.calls.count("resume_writing") == 1
    await one.closed()


@UNIX
async def test_a_paused_protocol_resumes_when_the_queue_fails(loop: Loop, unix_peer: socket.socket) -> None:
    one = await endpoint(loop, family=socket.AF_UNIX, remote_addr=unix_peer.getsockname())
    one.transport.set_write_buffer_limits(high=100)
    fill_up(one)
    for _ in range(50):
        one.transport.sendto(b"12345")
    assert one.calls[-1] == "pause_writing"
    unix_peer.close()
    await until(lambda: one.calls[-1] == "resume_writing")
    assert all(isinstance(error, OSError) for error in one.errors)
    assert len(one.errors) >= 50
    assert not one.transport.is_closing()
    await one.closed()


@UNIX
async def test_the_callers_buffer_can_be_reused(loop: Loop, unix_peer: socket.socket) -> None:
    one = await endpoint(loop, family=socket.AF_UNIX, remote_addr=unix_peer.getsockname())
    fill_up(one)
    buffer = bytearray(b"first")
    one.transport.sendto(buffer)
    buffer[:] = b"other"
    one.transport.sendto(memoryview(buffer))
    one.transport.close()
    got = await drained_until_lost(unix_peer, one)
    assert got[-2:] == [b"first", b"other"]


# --------------------------------------------------------------------------------------------------
# sock_recvfrom and its kin
# --------------------------------------------------------------------------------------------------


async def test_sock_recvfrom_and_sendto_what_is_not_plain(loop: Loop) -> None:
    """What the short way of the native tier leaves to that in Python, and what the system refuses."""
    with udp_socket() as one, udp_socket() as two:
        to_two = two.getsockname()
        with pytest.raises(ValueError, match="negative"):
            await loop.sock_recvfrom(two, -1)
        assert await loop.sock_sendto(one, bytearray(b"bytearray"), to_two) == 9
        assert await loop.sock_sendto(one, b"", to_two) == 0
        assert await loop.sock_sendto(one, b"a name", ("localhost", to_two[1])) == 6
        for expected in (b"bytearray", b"", b"a name"):
            assert await loop.sock_recvfrom(two, 100_000) == (expected, one.getsockname())
        with pytest.raises(OSError, match=r"."):
            await loop.sock_sendto(one, b"x" * 70000, to_two)
        two.close()
        with pytest.raises(OSError, match=r"."):
            await loop.sock_recvfrom(two, 100)


async def test_sock_sendto_and_recvfrom(loop: Loop) -> None:
    with udp_socket() as one, udp_socket() as other:
        waiting = asyncio.ensure_future(loop.sock_recvfrom(one, 100))
        await turns()
        assert await loop.sock_sendto(other, b"hello", one.getsockname()) == 5
        assert await waiting == (b"hello", other.getsockname())
        await loop.sock_sendto(other, b"", one.getsockname())
        assert await loop.sock_recvfrom(one, 3) == (b"", other.getsockname())


async def test_a_datagram_larger_than_asked_for_is_cut_or_refused_as_the_system_does(loop: Loop) -> None:
    with udp_socket() as one, udp_socket() as other:
        for at_once in (True, False):
            waiting = asyncio.ensure_future(loop.sock_recvfrom(one, 3))
            if not at_once:
                await turns()
            other.sendto(b"again", one.getsockname())
            if WINDOWS:
                with pytest.raises(OSError, match="10040"):  # WSAEMSGSIZE
                    await waiting
            else:
                assert await waiting == (b"aga", other.getsockname())


@pytest.mark.parametrize("at_once", [True, False])
async def test_sock_recvfrom_into(loop: Loop, at_once: bool) -> None:
    with udp_socket() as one, udp_socket() as other:
        for nbytes, expected in ((0, b"0123456789"), (4, b"0123")):
            sent = expected if WINDOWS else b"0123456789"  # Windows refuses to cut one
            buffer = bytearray(20)
            if at_once:
                other.sendto(sent, one.getsockname())
                count, address = await loop.sock_recvfrom_into(one, buffer, nbytes)
            else:
                waiting = asyncio.ensure_future(loop.sock_recvfrom_into(one, buffer, nbytes))
                await turns()
                other.sendto(sent, one.getsockname())
                count, address = await waiting
            assert (bytes(buffer[:count]), address) == (expected, other.getsockname())
        with pytest.raises(ValueError, match="nbytes"):
            await loop.sock_recvfrom_into(one, bytearray(3), 4)


async def test_a_datagram_for_a_cancelled_recvfrom_is_not_lost(loop: Loop) -> None:
    """gh-77875: what a cancelled receive had got already was thrown away."""
    with udp_socket() as one, udp_socket() as other:
        waiting = asyncio.ensure_future(loop.sock_recvfrom(one, 100))
        await turns()
        other.sendto(b"hello", one.getsockname())
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert await asyncio.wait_for(loop.sock_recvfrom(one, 100), 5) == (b"hello", other.getsockname())


@UNIX
async def test_sock_sendto_waits_until_there_is_room(loop: Loop, unix_peer: socket.socket) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.connect(unix_peer.getsockname())
        count = 0
        try:
            while True:
                sock.send(b"x")
                count += 1
        except BlockingIOError:
            pass
        sending = asyncio.ensure_future(loop.sock_sendto(sock, b"last", unix_peer.getsockname()))
        await turns()
        assert not sending.done()
        got = drain(unix_peer)
        assert await sending == 4
        got += drain(unix_peer)
        assert got == [b"x"] * count + [b"last"]


async def test_no_warning_when_all_is_closed(loop: Loop) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one = await endpoint(loop)
        await one.closed()
        del one
        gc.collect()
