"""Timers in their order, and when a turn asks the system, and for how long."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
import weakref
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import iocp_loop
from iocp_loop import native

from .support import LIMIT, WINDOWS, Recorder, until

Loop = iocp_loop.IocpEventLoop
Reports = list[dict[str, Any]]

natively = pytest.mark.skipif(native.hot is None, reason=f"the native tier is not in force: {native.why_not}")


def nothing(*_: Any) -> None:
    """A callback."""


class Clock:
    """Time that stands still but when told to go on."""

    now = 0.0


@given(st.data())
def test_timers_strike_in_order(data: st.DataObject) -> None:
    """Made, cancelled and struck as a list that is sorted would have it; ties in the order in which they were made."""
    with contextlib.closing(iocp_loop.new_event_loop("poll")) as loop:
        compare_with_a_model(loop, data)


def compare_with_a_model(loop: Loop, data: st.DataObject) -> None:
    clock = Clock()
    loop.time = lambda: clock.now  # type: ignore[method-assign]  # time is the test's
    loop._clock_resolution = 1e-9
    struck: list[int] = []
    model: dict[int, tuple[float, asyncio.TimerHandle]] = {}
    made = 0
    for _ in range(data.draw(st.integers(1, 60))):
        action = data.draw(st.sampled_from(["make", "make", "make", "cancel", "strike"]))
        if action == "make":
            when = clock.now + data.draw(st.sampled_from([0, 1, 1, 2, 3, 5, 8, -1, 0.5]))
            model[made] = (when, loop.call_at(when, struck.append, made))
            made += 1
        elif action == "cancel" and model:
            model.pop(data.draw(st.sampled_from(sorted(model))))[1].cancel()
        elif action == "strike":
            clock.now += data.draw(st.sampled_from([0, 1, 2, 3]))
            struck.clear()
            loop.call_soon(loop.stop)
            loop.run_forever()
            due = sorted((when, number) for number, (when, _) in model.items() if when <= clock.now)
            if native.hot is None:  # asyncio's heap knows no order among equals
                assert sorted(struck) == sorted(number for _, number in due)
            else:
                assert struck == [number for _, number in due]
            for _, number in due:
                assert not model.pop(number)[1]._scheduled  # type: ignore[attr-defined]  # asyncio's
        pending = {timer for timer in loop._scheduled if not timer.cancelled()}
        assert pending == {timer for _, timer in model.values()}
        if pending:
            assert loop._scheduled[0].when() <= min(when for when, _ in model.values())


@natively
async def test_a_cancelled_timer_leaves_at_once(loop: Loop) -> None:
    alive = Recorder()
    reference = weakref.ref(alive)
    for _ in range(1000):
        loop.call_later(1000, nothing, alive).cancel()
    del alive
    assert reference() is None
    assert len(loop._scheduled) < 10


async def test_who_overrides_time_may_cancel_timers_in_it(loop: Loop) -> None:
    timer = loop.call_later(1000, nothing)

    def time() -> float:
        timer.cancel()
        return type(loop).time(loop)

    loop.time = time  # type: ignore[method-assign]  # on purpose
    await asyncio.sleep(0.01)
    assert timer.cancelled()


# --------------------------------------------------------------------------------------------------
# When a turn asks the system, and for how long
# --------------------------------------------------------------------------------------------------


class _Clocked:
    """In place of a driver: notes how long it was to wait, and lets that time pass."""

    before_sleep: Any = None

    def __init__(self) -> None:
        self.now = 100.0
        self.timeouts: list[float] = []

    def wait(self, timeout: float) -> None:
        self.timeouts.append(timeout)
        self.now += timeout

    def dispatch(self) -> None:
        pass


@natively
@pytest.mark.parametrize(
    ("delays_ms", "waits_ms"),
    [
        ([0.3, 0.5, 0.9], [1.0]),
        ([0.3], [0.3]),
        ([0.25, 0.75], [0.25, 0.5]),
        ([0.25, 0.5, 3.0], [0.25, 0.25, 2.5]),
        ([2.0, 2.25, 2.5], [2.0, 0.25, 0.25]),
    ],
)
def test_timers_of_the_same_millisecond_are_woken_for_together_if_there_are_several(
    driver: str, delays_ms: list[float], waits_ms: list[float]
) -> None:
    clocked = _Clocked()

    class Timed(Loop):
        def time(self) -> float:
            return clocked.now

    loop = Timed(driver=driver)
    real = loop._proactor.driver
    ran: list[float] = []
    begin = clocked.now
    for delay in delays_ms:
        loop.call_at(begin + delay / 1000, lambda: ran.append(clocked.now))
    loop._use(clocked)  # type: ignore[arg-type]  # it has what a turn needs
    try:
        while len(ran) < len(delays_ms):
            loop._run_once()  # type: ignore[attr-defined]  # BaseEventLoop's
    finally:
        loop._use(real)
        loop.close()
    assert clocked.timeouts == pytest.approx([wait / 1000 for wait in waits_ms])
    assert all(time >= begin + delay / 1000 - 1e-6 for time, delay in zip(ran, delays_ms, strict=True))


@natively
@pytest.mark.skipif(not hasattr(native.hot, "EpollTurns"), reason="elsewhere than with epoll it asks in each turn")
def test_a_busy_loop_asks_the_poller_every_50_microseconds_only() -> None:
    loop = Loop(driver="poll")
    turns = 20_000

    async def main() -> tuple[int, float]:
        waits, begin = loop.stats().batches, time.perf_counter()
        for _ in range(turns):
            await asyncio.sleep(0)
        return loop.stats().batches - waits, time.perf_counter() - begin

    try:
        waits, seconds = loop.run_until_complete(main())
    finally:
        loop.close()
    assert waits <= 20 + seconds / 50e-6


async def test_a_busy_loop_does_not_starve_what_comes_in(loop: Loop) -> None:
    ours, peer = socket.socketpair()
    with ours, peer:
        ours.setblocking(False)
        receiving = loop.create_task(loop.sock_recv(ours, 10))
        for _ in range(100):
            await asyncio.sleep(0)
        peer.send(b"x")
        begin = time.perf_counter()
        while not receiving.done():
            assert time.perf_counter() < begin + LIMIT
            await asyncio.sleep(0)
        assert await receiving == b"x"


@pytest.mark.skipif(WINDOWS, reason="there the two sockets are connected by TCP, which takes its time")
def test_a_run_of_one_turn_takes_what_has_come(driver: str) -> None:
    loop = Loop(driver=driver)
    ours, peer = socket.socketpair()
    protocol = Recorder()

    async def connect_and_be_busy() -> None:
        await loop.create_connection(lambda: protocol, sock=ours)
        for _ in range(100):
            await asyncio.sleep(0)

    with peer:
        loop.run_until_complete(connect_and_be_busy())
        for count in range(1, 30):
            peer.send(b"x")
            loop.call_soon(loop.stop)
            loop.run_forever()
            assert bytes(protocol.data) == b"x" * count
        protocol.transport.close()
        loop.run_until_complete(until(lambda: protocol.finished))
        loop.close()
