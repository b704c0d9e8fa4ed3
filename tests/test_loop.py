"""The event loop: callbacks, timers, threads, forks, the ways to make one and the ways to end one."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import gc
import math
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from typing import Any

import pytest

import iocp_loop

from .support import (
    LIMIT,
    WINDOWS,
    Echo,
    Recorder,
    child_environment,
    in_thread,
    open_files,
    python_command,
    read_exactly,
    run_python,
    tcp_pair,
    turns,
    until,
)

Loop = iocp_loop.IocpEventLoop
Pair = tuple[socket.socket, socket.socket]
Reports = list[dict[str, Any]]


# -- callbacks and timers --------------------------------------------------------------------------


async def test_callbacks_run_in_order_and_with_their_arguments(loop: Loop) -> None:
    calls: list[Any] = []
    for number in range(10):
        loop.call_soon(calls.append, number)
    assert not calls
    await turns(1)
    assert calls == list(range(10))


async def test_a_cancelled_callback_does_not_run(loop: Loop) -> None:
    calls: list[Any] = []
    loop.call_soon(calls.append, 1).cancel()
    loop.call_later(0, calls.append, 2).cancel()
    await asyncio.sleep(0.01)
    assert not calls


async def test_a_callback_that_raises_is_reported_and_the_loop_goes_on(loop: Loop, reports: Reports) -> None:
    loop.call_soon(lambda: 1 / 0)
    await turns()
    (report,) = reports
    reports.clear()
    assert isinstance(report["exception"], ZeroDivisionError)


async def test_callbacks_run_in_their_context(loop: Loop) -> None:
    variable = contextvars.ContextVar("variable", default="outside")
    context = contextvars.copy_context()
    context.run(variable.set, "inside")
    seen: list[str] = []
    loop.call_soon(lambda: seen.append(variable.get()), context=context)
    loop.call_soon(lambda: seen.append(variable.get()))
    await turns()
    assert seen == ["inside", "outside"]


async def test_timers_are_never_early(loop: Loop) -> None:
    fired: list[tuple[float, float]] = []
    for delay in (0.0, 0.0001, 0.001, 0.0015, 0.003, 0.0101, 0.02, 0.0333):
        when = loop.time() + delay
        loop.call_at(when, lambda when=when: fired.append((when, loop.time())))  # type: ignore[misc]  # no type for when
    await until(lambda: len(fired) == 8)
    assert [when for when, _ in fired] == sorted(when for when, _ in fired)
    for when, now in fired:
        # asyncio counts what is less than one tick of its clock away as due; that is far below a millisecond.
        assert now >= when - 1e-5


async def test_sleep_is_never_short(loop: Loop) -> None:
    for delay in (0.0001, 0.001, 0.005, 0.0123):
        start = time.perf_counter()
        await asyncio.sleep(delay)
        assert time.perf_counter() - start >= delay - 1e-5


async def test_a_timer_while_data_come_all_the_time(loop: Loop, pair: Pair) -> None:
    transport, _ = await loop.create_connection(Echo, sock=pair[0])
    fired = asyncio.Event()
    loop.call_later(0.05, fired.set)
    stop = threading.Event()

    def flood() -> None:
        while not stop.is_set():
            pair[1].sendall(b"x" * 1000)
            read_exactly(pair[1], 1000)

    with in_thread(flood):
        await asyncio.wait_for(fired.wait(), LIMIT)
        stop.set()
        await asyncio.sleep(0.05)
    transport.close()
    await turns(10)


async def test_callbacks_do_not_keep_completions_away(loop: Loop, pair: Pair) -> None:
    """A program that always has a callback ready still receives."""
    busy = True

    def again() -> None:
        if busy:
            loop.call_soon(again)

    again()
    pair[1].send(b"x")
    assert await asyncio.wait_for(loop._proactor.recv(pair[0], 1), LIMIT) == b"x"
    busy = False


@pytest.mark.parametrize("debug", [False, True], ids=["", "debug"])
async def test_times_that_are_none(loop: Loop, debug: bool) -> None:
    """asyncio takes NaN, and its timers lose their order; a number too large for a float ends its run."""
    loop.set_debug(debug)
    calls: list[int] = []
    for number in range(20):
        loop.call_later(number / 10_000, calls.append, number)
        for method in (loop.call_later, loop.call_at):
            with pytest.raises(ValueError, match="NaN"):
                method(math.nan, calls.append, -1)
            with pytest.raises(OverflowError):
                method(10**400, calls.append, -1)
            with pytest.raises(OverflowError):
                method(-(10**400), calls.append, -1)
    with pytest.raises(ValueError, match="NaN"):
        await asyncio.sleep(math.nan)
    with pytest.raises(ValueError, match="NaN"):
        await asyncio.wait_for(loop.create_future(), math.nan)
    never = loop.call_later(math.inf, calls.append, -1)
    at_once = loop.call_at(-math.inf, calls.append, 20)
    await until(lambda: len(calls) == 21)
    assert calls == [20, *range(20)]
    assert at_once.when() == -never.when() == -math.inf
    never.cancel()


async def test_what_was_ready_before_runs_before_the_completions(loop: Loop, pair: Pair) -> None:
    """As on asyncio's own loops: who was told of a connection can be sure to have it before its data come."""
    order: list[str] = []
    ours, peer = pair
    protocol = Recorder()
    protocol.data_received = lambda data: order.append("data")  # type: ignore[method-assign]  # notes the order
    transport, _ = await loop.create_connection(lambda: protocol, sock=ours)
    await turns()
    peer.send(b"x")
    loop.call_soon(order.append, "ready")
    await until(lambda: "data" in order)
    assert order == ["ready", "data"]
    transport.abort()
    await turns()


async def test_debug_mode_sees_calls_from_the_wrong_thread(loop: Loop) -> None:
    loop.set_debug(True)

    def call() -> None:
        with pytest.raises(RuntimeError, match="thread"):
            loop.call_soon(print)
        with pytest.raises(RuntimeError, match="thread"):
            loop.call_later(0, print)

    await loop.run_in_executor(None, call)


# -- other threads ---------------------------------------------------------------------------------


def test_call_soon_threadsafe_wakes_a_sleeping_loop(loop: Loop) -> None:
    woken: list[float] = []

    def call() -> None:
        time.sleep(0.05)
        loop.call_soon_threadsafe(lambda: (woken.append(time.monotonic()), loop.stop()))
        called.append(time.monotonic())

    called: list[float] = []
    with in_thread(call):
        loop.run_forever()  # without a timer: nothing else would end its wait
    assert woken[0] - called[0] < LIMIT / 4


async def test_no_call_from_many_threads_is_lost(loop: Loop) -> None:
    count = 0

    def called() -> None:
        nonlocal count
        count += 1

    def call() -> None:
        for number in range(500):
            loop.call_soon_threadsafe(called)
            if number % 50 == 0:
                time.sleep(0.001)  # let the loop fall asleep

    threads = [threading.Thread(target=call, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + LIMIT
    while count < 2000 and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    assert count == 2000


def test_the_loop_does_not_fall_asleep_over_a_callback_that_came_just_before(loop: Loop) -> None:
    """A call from another thread between the look at the ready queue and the sleep finds nobody to wake."""
    loop.call_soon(int)
    start = time.monotonic()
    loop._proactor.select(LIMIT)
    assert time.monotonic() - start < LIMIT / 4


async def test_a_call_that_falls_into_the_gap_before_the_sleep(loop: Loop) -> None:
    """Round trips through a thread: a wake that gets lost shows as a long pause."""
    executor = concurrent.futures.ThreadPoolExecutor(1)
    start = time.monotonic()
    for _ in range(500):
        await loop.run_in_executor(executor, int)
    assert time.monotonic() - start < LIMIT / 2
    executor.shutdown()


async def test_executors(loop: Loop) -> None:
    def name() -> str:
        return threading.current_thread().name

    assert await loop.run_in_executor(None, name) != threading.current_thread().name
    assert await asyncio.to_thread(pow, 2, 10) == 1024
    with pytest.raises(ZeroDivisionError):
        await loop.run_in_executor(None, divmod, 1, 0)
    with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="mine") as executor:
        assert (await loop.run_in_executor(executor, name)).startswith("mine")


async def test_names_are_looked_up(loop: Loop) -> None:
    found = await loop.getaddrinfo("localhost", 80, type=socket.SOCK_STREAM)
    assert {address[4][0] for address in found} & {"127.0.0.1", "::1"}
    host, _ = await loop.getnameinfo(("127.0.0.1", 80))
    assert host


def test_run_coroutine_threadsafe(loop: Loop) -> None:
    async def add(one: int, other: int) -> int:
        await asyncio.sleep(0)
        return one + other

    async def main() -> None:
        await asyncio.to_thread(lambda: results.append(asyncio.run_coroutine_threadsafe(add(1, 2), loop).result(LIMIT)))

    results: list[int] = []
    loop.run_until_complete(main())
    assert results == [3]


# -- threads that run loops ------------------------------------------------------------------------


async def exercise(loop: Loop) -> bytes:
    """A bit of everything on the running loop."""
    server = await loop.create_server(Echo, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    writer.write(b"hello\n")
    answer = await reader.readline()
    writer.close()
    await writer.wait_closed()
    server.close()
    await server.wait_closed()
    await asyncio.to_thread(int)
    await asyncio.sleep(0.001)
    return answer


def test_made_in_one_thread_and_run_in_another(loop: Loop) -> None:
    answers: list[bytes] = []
    with in_thread(lambda: answers.append(loop.run_until_complete(exercise(loop)))):
        pass
    assert answers == [b"hello\n"]
    loop.run_until_complete(turns())


def test_run_in_one_thread_after_another(loop: Loop) -> None:
    answers: list[bytes] = []
    for _ in range(3):
        with in_thread(lambda: answers.append(loop.run_until_complete(exercise(loop)))):
            pass
        answers.append(loop.run_until_complete(exercise(loop)))
    assert answers == [b"hello\n"] * 6


def test_operations_in_flight_move_with_the_loop_to_another_thread(loop: Loop, pair: Pair) -> None:
    async def start() -> Any:
        transport, _ = await loop.create_connection(Echo, sock=pair[0])
        await turns()
        return transport

    transport: Any = None

    def run() -> None:
        nonlocal transport
        transport = loop.run_until_complete(start())

    with in_thread(run):
        pass
    assert loop._proactor.in_flight  # its receive stream
    pair[1].sendall(b"one")
    loop.run_until_complete(until(lambda: peek(pair[1]) == b"one"))
    assert pair[1].recv(10) == b"one"
    with in_thread(lambda: loop.run_until_complete(turns())):
        pass
    pair[1].sendall(b"two")
    with in_thread(lambda: loop.run_until_complete(until(lambda: peek(pair[1]) == b"two"))):
        pass
    transport.close()
    loop.run_until_complete(turns(10))


def peek(sock: socket.socket) -> bytes:
    sock.setblocking(False)
    try:
        return sock.recv(100, socket.MSG_PEEK)
    except BlockingIOError:
        return b""
    finally:
        sock.settimeout(LIMIT)


def test_closed_in_another_thread_than_it_ran_in(driver: str, no_leak: None) -> None:
    loop = iocp_loop.new_event_loop(driver)
    ours, peer = tcp_pair()

    async def start() -> None:
        loop._proactor.recv(ours, 10).add_done_callback(lambda future: future.cancelled() or future.exception())
        await turns()

    with in_thread(lambda: loop.run_until_complete(start())):
        pass
    loop.close()
    assert not loop._proactor.in_flight
    ours.close()
    peer.close()


def test_many_loops_at_once(driver: str, no_leak: None) -> None:
    def run() -> None:
        loop = iocp_loop.new_event_loop(driver)
        try:
            assert loop.run_until_complete(exercise(loop)) == b"hello\n"
            loop.run_until_complete(loop.shutdown_default_executor())
        finally:
            loop.close()

    threads = [in_thread(run) for _ in range(5)]
    for thread in threads:
        thread.__enter__()
    for thread in threads:
        thread.__exit__(None, None, None)


# -- Ctrl-C ----------------------------------------------------------------------------------------


@pytest.mark.skipif(WINDOWS, reason="a Ctrl-C goes to the whole console there; test_echo_program.py has one")
@pytest.mark.parametrize("way", ["run", "run_forever"])
def test_ctrl_c_ends_the_loop_and_leaves_it_in_order(driver: str, way: str) -> None:
    code = """
        import asyncio, socket, sys, time, iocp_loop

        async def sleep():
            ours, peer = socket.socketpair()
            ours.setblocking(False)
            print("ready", flush=True)
            try:
                await asyncio.get_running_loop().sock_recv(ours, 1)
            except asyncio.CancelledError:
                print("cancelled", flush=True)
                raise
            finally:
                ours.close()
                peer.close()

        try:
            if sys.argv[2] == "run":
                iocp_loop.run(sleep(), driver=sys.argv[1])
            else:
                loop = iocp_loop.new_event_loop(sys.argv[1])
                task = loop.create_task(sleep())
                try:
                    loop.run_forever()
                finally:
                    task.cancel()
                    loop.run_until_complete(asyncio.wait([task]))
                    loop.close()
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        """
    with subprocess.Popen(
        python_command(code, driver, way),
        env=child_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            time.sleep(0.1)  # let it fall asleep
            child.send_signal(signal.SIGINT)
            output, errors = child.communicate(timeout=LIMIT)
        finally:
            child.kill()
    assert (output, errors, child.returncode) == ("cancelled\ninterrupted\n", "", 0)


# -- closing ---------------------------------------------------------------------------------------


def test_close_with_operations_in_flight_is_bounded(driver: str, no_leak: None) -> None:
    loop = iocp_loop.new_event_loop(driver)
    pairs = [tcp_pair() for _ in range(20)]

    async def start() -> list[Any]:
        futures: list[Any] = [loop._proactor.recv(ours, 10) for ours, _ in pairs]
        futures += [loop._proactor.sendall(ours, bytes(8 << 20)) for ours, _ in pairs]
        await turns()
        return futures

    futures = loop.run_until_complete(start())
    start_time = time.monotonic()
    loop.close()
    assert time.monotonic() - start_time < 2.5
    assert not loop._proactor.in_flight
    assert all(future.cancelled() for future in futures)
    for ours, peer in pairs:
        ours.close()
        peer.close()


def test_close_twice_and_before_it_ever_ran(driver: str, no_leak: None) -> None:
    loop = iocp_loop.new_event_loop(driver)
    assert not loop.is_closed()
    loop.close()
    loop.close()
    assert loop.is_closed()
    assert "closed=True" in repr(loop)


def test_a_closed_loop_refuses(driver: str) -> None:
    loop = iocp_loop.new_event_loop(driver)
    loop.close()
    for call in (lambda: loop.call_soon(print), lambda: loop.call_later(1, print), loop.run_forever):
        with pytest.raises(RuntimeError, match="closed"):
            call()
    with pytest.raises(RuntimeError, match="closed"):
        loop.call_soon_threadsafe(print)


async def test_a_running_loop_cannot_be_closed(loop: Loop) -> None:
    with pytest.raises(RuntimeError, match="running"):
        loop.close()
    await asyncio.sleep(0)


def test_call_soon_threadsafe_while_the_loop_is_closed(driver: str) -> None:
    """A thread that calls all the time gets an error at some point, and never a crash."""
    for _ in range(20):
        loop = iocp_loop.new_event_loop(driver)
        started = threading.Event()

        def call(loop: Any = loop, started: Any = started) -> None:
            with pytest.raises(RuntimeError, match="closed"):
                while True:
                    loop.call_soon_threadsafe(int)
                    started.set()

        with in_thread(call):
            started.wait(LIMIT)
            loop.run_until_complete(turns())
            loop.close()


def test_a_loop_that_nobody_closed_warns(driver: str, no_leak: None) -> None:
    loops = [iocp_loop.new_event_loop(driver)]
    loops[0].run_until_complete(turns())

    def let_go() -> None:
        loops.clear()
        gc.collect()

    with pytest.warns(ResourceWarning, match="unclosed event loop"):
        let_go()


def test_many_loops_one_after_another_leave_nothing(driver: str, no_leak: None) -> None:
    before = open_files()
    for _ in range(30):
        loop = iocp_loop.new_event_loop(driver)
        loop.run_until_complete(exercise(loop))
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
    gc.collect()
    assert open_files() == before


# -- ways to a loop --------------------------------------------------------------------------------


def test_run(driver: str, no_leak: None) -> None:
    async def main() -> Any:
        return asyncio.get_running_loop()

    loop = iocp_loop.run(main(), driver=driver)
    assert isinstance(loop, iocp_loop.IocpEventLoop)
    assert loop.driver == driver
    assert loop.is_closed()
    assert iocp_loop.run(main(), driver=driver, debug=True).get_debug()


async def test_run_within_a_running_loop(loop: Loop) -> None:
    main = asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="running"):
        iocp_loop.run(main, driver=loop.driver)
    main.close()


def test_run_cancels_what_is_left(driver: str, no_leak: None) -> None:
    ends: list[str] = []

    async def forever() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ends.append("task")

    async def generator() -> Any:
        try:
            yield 1
        finally:
            ends.append("generator")

    async def main() -> None:
        asyncio.create_task(forever())
        kept.append(generator())
        await anext(kept[0])
        await turns()

    kept: list[Any] = []
    iocp_loop.run(main(), driver=driver)
    assert sorted(ends) == ["generator", "task"]


def test_asyncio_runner_takes_it_as_a_factory(driver: str, no_leak: None) -> None:
    with asyncio.Runner(loop_factory=lambda: iocp_loop.new_event_loop(driver)) as runner:
        assert runner.run(exercise(runner.get_loop())) == b"hello\n"  # type: ignore[arg-type]  # it is ours
        assert runner.get_loop().driver == driver  # type: ignore[attr-defined]  # as above


def test_it_is_not_what_libraries_refuse() -> None:
    assert issubclass(iocp_loop.IocpEventLoop, asyncio.BaseEventLoop)
    proactor = getattr(asyncio, "ProactorEventLoop", None)
    assert proactor is None or not issubclass(iocp_loop.IocpEventLoop, proactor)


def test_the_policy_makes_our_loops(driver: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # since Python 3.14
        policy = iocp_loop.IocpPolicy(driver)
    loop = policy.new_event_loop()
    assert isinstance(loop, iocp_loop.IocpEventLoop)
    assert loop.driver == driver
    loop.close()


def test_install_makes_it_the_loop_of_asyncio_run(driver: str) -> None:
    run_python(
        """
        import asyncio, sys, warnings, iocp_loop
        warnings.simplefilter("ignore", DeprecationWarning)  # of policies, since Python 3.14
        iocp_loop.install(sys.argv[1])
        async def main():
            return asyncio.get_running_loop()
        loop = asyncio.run(main())
        assert type(loop) is iocp_loop.IocpEventLoop and loop.driver == sys.argv[1], loop
        """,
        driver,
    )


def test_importing_warns_of_nothing_and_changes_nothing() -> None:
    run_python(
        """
        import asyncio, sys
        import iocp_loop
        assert "iocp_loop.policy" not in sys.modules
        async def main():
            return asyncio.get_running_loop()
        assert not isinstance(asyncio.run(main()), iocp_loop.IocpEventLoop)
        for name in iocp_loop.__all__:
            getattr(iocp_loop, name)
        """
    )


def test_the_package_lists_what_it_has() -> None:
    assert set(iocp_loop.__all__) <= set(dir(iocp_loop))
    assert "IocpPolicy" in dir(iocp_loop)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = iocp_loop.nonsense


@pytest.mark.skipif(sys.version_info < (3, 12), reason="asyncio.run has loop_factory since Python 3.12")
def test_asyncio_run_takes_it_as_a_factory(driver: str, no_leak: None) -> None:
    async def main() -> Any:
        return asyncio.get_running_loop()

    loop = asyncio.run(main(), loop_factory=lambda: iocp_loop.new_event_loop(driver))  # type: ignore[call-arg,unused-ignore]  # since 3.12
    assert loop.driver == driver
