"""Signals as callbacks: which are called, what is restored, and what several loops do to each other."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import iocp_loop

from .support import LIMIT, child_environment, python_command, run_python, turns, until

posix = pytest.mark.skipif(
    sys.platform == "win32", reason="Windows sends no signals to processes; test_iocp_console.py has Ctrl-C"
)

Loop = iocp_loop.IocpEventLoop

# Three signals that mean nothing to anybody else.
if sys.platform == "win32":
    ONE, TWO, THREE = signal.SIGBREAK, signal.SIGTERM, signal.SIGINT
else:
    ONE, TWO, THREE = signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM


@pytest.fixture(autouse=True)
def signals_as_they_were() -> Iterator[None]:
    """Nothing of a test stays behind: neither a handler nor the wakeup descriptor."""
    yield
    assert signal.set_wakeup_fd(-1) == -1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    for number in {ONE, TWO, THREE} - {signal.SIGINT}:
        assert signal.getsignal(number) is signal.SIG_DFL


def send(number: int) -> None:
    """As another process sends it; on Windows none can."""
    signal.raise_signal(number) if sys.platform == "win32" else os.kill(os.getpid(), number)


def wakeup_descriptor() -> int:
    """The wakeup descriptor; -1: none.  It stays what it is."""
    fd = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(fd, warn_on_full_buffer=False)
    return fd


async def test_add_and_remove(loop: Loop) -> None:
    calls: list[Any] = []
    loop.add_signal_handler(ONE, calls.append, "usr1")
    loop.add_signal_handler(TWO, calls.append, "usr2")
    send(ONE)
    await until(lambda: calls == ["usr1"])
    send(TWO)
    await until(lambda: calls == ["usr1", "usr2"])
    assert loop.remove_signal_handler(ONE)
    assert not loop.remove_signal_handler(ONE)
    send(TWO)
    await until(lambda: len(calls) == 3)
    assert loop.remove_signal_handler(TWO)
    await turns()
    loop.add_signal_handler(ONE, calls.append, "again")
    send(ONE)
    await until(lambda: calls[-1] == "again")
    assert loop.remove_signal_handler(ONE)


async def test_the_second_handler_replaces_the_first(loop: Loop) -> None:
    calls: list[str] = []
    loop.add_signal_handler(ONE, calls.append, "first")
    loop.add_signal_handler(ONE, calls.append, "second")
    send(ONE)
    await until(lambda: calls)
    await turns()
    assert calls == ["second"]
    loop.remove_signal_handler(ONE)


async def test_a_signal_ends_a_long_wait(loop: Loop) -> None:
    called = loop.create_future()
    loop.add_signal_handler(ONE, lambda: called.set_result(time.monotonic()))
    sent: list[float] = []

    def later() -> None:
        time.sleep(0.1)
        sent.append(time.monotonic())
        send(ONE)

    thread = threading.Thread(target=later)
    thread.start()
    arrived = await asyncio.wait_for(called, LIMIT)
    thread.join()
    assert arrived - sent[0] < 5
    loop.remove_signal_handler(ONE)


async def test_interrupt_while_the_loop_has_a_handler(loop: Loop) -> None:
    calls: list[str] = []
    loop.add_signal_handler(signal.SIGINT, calls.append, "interrupted")
    send(signal.SIGINT)
    await until(lambda: calls)
    loop.remove_signal_handler(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)


async def test_what_can_not_be(loop: Loop) -> None:
    async def coroutine() -> None: ...

    with pytest.raises(TypeError):
        loop.add_signal_handler(ONE, coroutine)
    made = coroutine()
    with pytest.raises(TypeError):
        loop.add_signal_handler(ONE, made)  # type: ignore[arg-type]  # what the test is about
    made.close()
    methods: tuple[Callable[[Any], Any], ...] = (
        lambda sig: loop.add_signal_handler(sig, print),
        loop.remove_signal_handler,
    )
    for method in methods:
        with pytest.raises(TypeError):
            method("SIGUSR1")
        with pytest.raises(ValueError):
            method(4711)
        with pytest.raises(ValueError):
            method(0)
    if sys.platform != "win32":  # every signal that it knows can be caught
        with pytest.raises(RuntimeError, match="cannot be caught"):
            loop.add_signal_handler(signal.SIGKILL, print)
        assert signal.set_wakeup_fd(-1) == -1
        assert not loop.remove_signal_handler(signal.SIGKILL)


async def test_only_in_the_main_thread(loop: Loop) -> None:
    def work() -> None:
        with pytest.raises(RuntimeError, match="main thread"):
            loop.add_signal_handler(ONE, print)

    await asyncio.to_thread(work)


def test_a_closed_loop(driver: str) -> None:
    loop = iocp_loop.new_event_loop(driver)
    loop.add_signal_handler(ONE, print)
    loop.add_signal_handler(TWO, print)
    loop.close()
    assert signal.getsignal(TWO) is signal.SIG_DFL
    with pytest.raises(RuntimeError, match="closed"):
        loop.add_signal_handler(ONE, print)
    assert not loop.remove_signal_handler(ONE)


async def test_an_error_of_the_handler_is_reported(loop: Loop, reports: list[dict[str, Any]]) -> None:
    loop.add_signal_handler(ONE, lambda: 1 / 0)
    send(ONE)
    await until(lambda: reports)
    assert isinstance(reports.pop()["exception"], ZeroDivisionError)
    loop.remove_signal_handler(ONE)


async def test_many_signals(loop: Loop) -> None:
    calls: list[int] = []
    loop.add_signal_handler(ONE, calls.append, 1)
    for count in range(1, 200):
        send(ONE)
        await until(lambda count=count: len(calls) >= count)  # type: ignore[misc]  # a default binds the count
    loop.remove_signal_handler(ONE)


# --------------------------------------------------------------------------------------------------
# The wakeup descriptor belongs to the process
# --------------------------------------------------------------------------------------------------


async def test_the_wakeup_descriptor_is_given_back_if_nobody_can_read_from_it(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stayed held, and the next handler was added without a reader, so that its signals reached nobody."""

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOMEM, "out of memory")

    before = wakeup_descriptor()
    with monkeypatch.context() as shortage:
        shortage.setattr(loop._proactor, "receive_stream", refuse)
        with pytest.raises(RuntimeError, match="out of memory"):
            loop.add_signal_handler(ONE, print)
    assert wakeup_descriptor() == before
    calls: list[int] = []
    loop.add_signal_handler(ONE, calls.append, 1)
    send(ONE)
    await until(lambda: calls == [1])
    loop.remove_signal_handler(ONE)


async def test_the_wakeup_descriptor_is_given_back(loop: Loop) -> None:
    one, other = socket.socketpair()
    with one, other:
        one.setblocking(False)
        signal.set_wakeup_fd(one.fileno())
        try:
            loop.add_signal_handler(ONE, print)
            loop.add_signal_handler(TWO, print)
            loop.remove_signal_handler(ONE)
            loop.remove_signal_handler(TWO)
        finally:
            assert signal.set_wakeup_fd(-1) == one.fileno()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0), (0, 2, 1), (2, 0, 1)])
def test_closing_one_loop_leaves_the_others_their_signals(driver: str, order: tuple[int, ...]) -> None:
    """gh-91170: closing any loop took the wakeup descriptor from all of them."""
    loops = [iocp_loop.new_event_loop(driver) for _ in range(3)]
    numbers = [ONE, TWO, THREE]
    calls: list[int] = []
    for loop, number in zip(loops, numbers, strict=True):
        loop.add_signal_handler(number, calls.append, number)
    left = [0, 1, 2]
    for index in order:
        loops[index].close()
        left.remove(index)
        if left:
            # Whoever took the place last has it.
            holder = left[-1]
            calls.clear()
            send(numbers[holder])
            loops[holder].run_until_complete(asyncio.wait_for(turn_until(calls), LIMIT))
            assert calls == [numbers[holder]]


async def turn_until(calls: list[int]) -> None:
    while not calls:
        await asyncio.sleep(0)


def test_a_loop_without_handlers_does_not_touch_the_wakeup_descriptor(driver: str) -> None:
    busy = iocp_loop.new_event_loop(driver)
    calls: list[int] = []
    busy.add_signal_handler(ONE, calls.append, 1)
    iocp_loop.new_event_loop(driver).close()
    asyncio.SelectorEventLoop().close()
    send(ONE)
    busy.run_until_complete(asyncio.wait_for(turn_until(calls), LIMIT))
    busy.close()


@posix
def test_signals_of_a_forked_child_stay_there(driver: str) -> None:
    run_python(
        """
        import asyncio, os, signal, sys, warnings
        import iocp_loop
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads

        async def main():
            loop = asyncio.get_running_loop()
            calls = []
            loop.add_signal_handler(signal.SIGUSR1, calls.append, 1)
            child = os.fork()
            if not child:
                signal.signal(signal.SIGUSR1, lambda *_: None)
                os.kill(os.getpid(), signal.SIGUSR1)
                os._exit(0 if signal.set_wakeup_fd(-1) == -1 else 1)
            _, status = os.waitpid(child, 0)
            assert status == 0, status
            await asyncio.sleep(0.05)
            assert calls == [], calls
            os.kill(os.getpid(), signal.SIGUSR1)
            await asyncio.sleep(0.05)
            assert calls == [1], calls

        iocp_loop.run(main(), driver=sys.argv[1])
        """,
        driver,
    )


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_program_ends_cleanly_on_a_signal(driver: str, number: signal.Signals) -> None:
    code = """
        import asyncio, signal, sys
        import iocp_loop

        async def main():
            loop = asyncio.get_running_loop()
            stop = asyncio.Event()
            for name in ("SIGINT", "SIGTERM"):
                loop.add_signal_handler(getattr(signal, name), stop.set)
            print("ready", flush=True)
            await stop.wait()
            print("stopped", flush=True)

        iocp_loop.run(main(), driver=sys.argv[1])
        """
    with subprocess.Popen(
        python_command(code, driver), env=child_environment(), stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(number)
        assert child.stdout.read() == "stopped\n"
        assert child.wait(LIMIT) == 0


@posix
def test_interrupt_ends_run_without_a_handler(driver: str) -> None:
    code = """
        import asyncio, sys
        import iocp_loop

        async def main():
            try:
                print("ready", flush=True)
                await asyncio.sleep(60)
            finally:
                print("cleaned up", flush=True)

        try:
            iocp_loop.run(main(), driver=sys.argv[1])
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        """
    with subprocess.Popen(
        python_command(code, driver), env=child_environment(), stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        time.sleep(0.1)
        child.send_signal(signal.SIGINT)
        assert child.stdout.read() == "cleaned up\ninterrupted\n"
        assert child.wait(LIMIT) == 0
