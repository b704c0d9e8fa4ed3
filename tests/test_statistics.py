"""loop.stats(): what it counts."""

from __future__ import annotations

import asyncio
import threading

import iocp_loop

from .support import tcp_pair, turns, udp_socket, until

Loop = iocp_loop.IocpEventLoop


async def test_operations_by_kind(loop: Loop) -> None:
    assert loop.stats().operations == {}
    with udp_socket() as one, udp_socket() as other:
        for _ in range(3):
            waiting = asyncio.ensure_future(loop.sock_recvfrom(one, 10))
            await turns()
            other.sendto(b"x", one.getsockname())
            await waiting
    stats = loop.stats()
    assert stats.driver == loop.driver
    assert stats.operations == {"ReceiveFrom": 3}
    assert stats.completions >= 3


async def test_a_stream_is_one_operation_with_many_completions(loop: Loop) -> None:
    ours, peer = tcp_pair()
    got: list[bytes] = []
    stream = loop._proactor.receive_stream(ours, lambda data, error: got.append(data))
    with ours, peer:
        before = loop.stats()
        for count in range(1, 11):
            peer.sendall(b"x")
            await until(lambda count=count: len(got) == count)  # type: ignore[misc]  # a default binds the count
        stats = loop.stats()
        assert stats.operations == {"ReceiveStream": 1}
        assert stats.in_flight == 1
        assert stats.completions - before.completions >= 10
        assert stats.batches - before.batches >= 10
        loop._proactor.cancel(stream)
        await until(lambda: not loop.stats().in_flight)


async def test_wakes(loop: Loop) -> None:
    before = loop.stats().wakes
    woken = loop.create_future()
    threading.Timer(0.05, loop.call_soon_threadsafe, (woken.set_result, None)).start()
    await woken
    assert loop.stats().wakes == before + 1
    loop.call_soon_threadsafe(lambda: None)  # nobody sleeps: no call into the kernel
    await turns()
    assert loop.stats().wakes == before + 1


def test_of_a_closed_loop(driver: str) -> None:
    loop = iocp_loop.new_event_loop(driver)
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    assert loop.stats().in_flight == 0
    assert loop.stats().batches > 0
