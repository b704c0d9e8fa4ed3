"""Driver iocp: Ctrl-C and the other events of a console, and signals that the program raises itself."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

if sys.platform != "win32":
    pytest.skip("I/O completion ports exist on Windows only", allow_module_level=True)

import iocp_loop

from .support import LIMIT, WINE, child_environment, in_thread, python_command

#: Runs in a console of its own, and presses Ctrl-C there.
CTRL_C = """
    import asyncio, ctypes, sys, threading, time
    import iocp_loop, iocp_loop.loop  # which is imported when it is first used: that is not to be interrupted

    def press():
        time.sleep(0.3)
        assert ctypes.windll.kernel32.GenerateConsoleCtrlEvent(0, 0)

    async def sleep():
        threading.Thread(target=press).start()  # not before: on a busy machine 0.3 s pass until a loop runs
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            print("cancelled")
            raise

    if sys.argv[2:] == ["again"]:
        iocp_loop.new_event_loop("iocp").close()
    if sys.argv[1] != "run":
        threading.Thread(target=press).start()
    started = time.perf_counter()
    try:
        if sys.argv[1] == "get":
            iocp_loop.CompletionPort(driver="iocp").get(60)
        elif sys.argv[1] == "run_forever":
            loop = iocp_loop.new_event_loop("iocp")
            loop.call_later(60, loop.stop)
            loop.run_forever()
        else:
            iocp_loop.run(sleep(), driver="iocp")
    except KeyboardInterrupt:
        print("interrupted")
    print("in time" if time.perf_counter() - started < 15 else "late")
"""


@pytest.mark.parametrize("again", [[], ["again"]], ids=["first", "after another loop was closed"])
@pytest.mark.parametrize("what", ["get", "run_forever", "run"])
def test_ctrl_c_ends_a_wait(what: str, again: list[str]) -> None:
    done = subprocess.run(
        [arg for arg in python_command(CTRL_C, what, *again) if arg not in ("-W", "error")],  # unclosed on purpose
        env=child_environment(),
        creationflags=subprocess.CREATE_NO_WINDOW,
        capture_output=True,
        text=True,
        timeout=3 * LIMIT,
        check=False,
    )
    expected = ["interrupted", "in time"]
    if what == "run":
        expected.insert(0, "cancelled")
    assert done.stdout.split("\n")[:-1] == expected, done.stderr


def raised_in_a_thread(loop: iocp_loop.IocpEventLoop, number: signal.Signals) -> threading.Thread:
    """A thread that raises a signal once `loop` waits, and ends its run much later."""

    def work() -> None:
        time.sleep(0.1)
        signal.raise_signal(number)

    thread = threading.Thread(target=work)
    loop.call_soon(thread.start)
    loop.call_later(LIMIT, loop.stop)
    return thread


def test_a_signal_that_another_thread_raises_ends_the_run(no_leak: None) -> None:
    """As in asyncio's Proactor loop; there and here no handler was added."""
    loop = iocp_loop.new_event_loop("iocp")
    started = time.monotonic()
    for _ in range(3):
        thread = raised_in_a_thread(loop, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            loop.run_forever()
        thread.join()
        assert signal.set_wakeup_fd(-1) == -1
        assert not loop._proactor.in_flight
    assert time.monotonic() - started < LIMIT / 2
    loop.run_until_complete(asyncio.sleep(0.01))
    loop.close()


def test_a_signal_that_another_thread_raises_is_dealt_with_at_once() -> None:
    loop = iocp_loop.new_event_loop("iocp")
    thread = raised_in_a_thread(loop, signal.SIGTERM)
    before = signal.signal(signal.SIGTERM, lambda *_: loop.call_soon_threadsafe(loop.stop))
    try:
        started = time.monotonic()
        loop.run_forever()
        assert time.monotonic() - started < LIMIT / 2
    finally:
        signal.signal(signal.SIGTERM, before)
        thread.join()
        loop.close()


def test_a_loop_that_runs_leaves_the_wakeup_descriptor_of_others_alone() -> None:
    one, other = socket.socketpair()
    loop = iocp_loop.new_event_loop("iocp")
    with one, other:
        one.setblocking(False)
        signal.set_wakeup_fd(one.fileno())
        try:
            loop.run_until_complete(asyncio.sleep(0.01))
        finally:
            assert signal.set_wakeup_fd(-1) == one.fileno()
    loop.close()


def test_handlers_come_and_go_while_the_loop_holds_the_wakeup_descriptor() -> None:
    loop = iocp_loop.new_event_loop("iocp")
    calls: list[str] = []

    async def main() -> None:
        loop.add_signal_handler(signal.SIGTERM, calls.append, "first")
        signal.raise_signal(signal.SIGTERM)
        while not calls:
            await asyncio.sleep(0)
        loop.remove_signal_handler(signal.SIGTERM)
        loop.call_soon(thread.start)
        await asyncio.sleep(LIMIT)

    thread = threading.Thread(target=lambda: (time.sleep(0.1), signal.raise_signal(signal.SIGINT)))
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        loop.run_until_complete(main())
    assert time.monotonic() - started < LIMIT / 2
    thread.join()
    assert calls == ["first"]
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    loop.add_signal_handler(signal.SIGTERM, calls.append, "second")  # kept beyond the run
    loop.run_until_complete(asyncio.sleep(0))
    loop.remove_signal_handler(signal.SIGTERM)
    assert signal.set_wakeup_fd(-1) == -1
    loop.close()


def test_a_loop_in_another_thread_has_nothing_to_do_with_signals() -> None:
    def work() -> None:
        loop = iocp_loop.new_event_loop("iocp")
        loop.run_until_complete(asyncio.sleep(0.01))
        assert loop._proactor.driver._ear is None
        loop.close()

    with in_thread(work):
        pass


#: Runs in a console of its own with handlers for the signals that it is told, and lets a console event come.
CONSOLE_EVENT = """
    import asyncio, ctypes, signal, sys, threading
    import iocp_loop

    async def main():
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()

        def called(name):
            print(name)
            stop.set()

        for name in sys.argv[2:]:
            loop.add_signal_handler(getattr(signal, name), called, name)
        event = int(sys.argv[1])
        if event == 0:
            assert ctypes.windll.kernel32.GenerateConsoleCtrlEvent(event, 0)
        else:  # what Windows calls in a thread of its own: it calls the handlers, then ends the process
            routine = ctypes.WinDLL("kernelbase").CtrlRoutine
            routine.argtypes = [ctypes.c_void_p]
            threading.Thread(target=routine, args=[event], daemon=True).start()
        await stop.wait()
        await asyncio.sleep(0.3)  # cleaning up
        print("cleaned up")

    iocp_loop.run(main(), driver="iocp")
"""

CTRL_C_EVENT, CTRL_BREAK_EVENT, CTRL_CLOSE_EVENT, CTRL_LOGOFF_EVENT, CTRL_SHUTDOWN_EVENT = 0, 1, 2, 5, 6


@pytest.mark.parametrize(
    ("event", "handlers", "expected"),
    [
        (CTRL_C_EVENT, ["SIGINT"], "SIGINT"),
        pytest.param(
            CTRL_BREAK_EVENT,
            ["SIGBREAK"],
            "SIGBREAK",
            marks=pytest.mark.skipif(WINE, reason="Wine's C runtime makes no signal of Ctrl-Break"),
        ),
        (CTRL_CLOSE_EVENT, ["SIGBREAK"], "SIGBREAK"),
        (CTRL_CLOSE_EVENT, ["SIGTERM"], "SIGTERM"),
        (CTRL_CLOSE_EVENT, ["SIGTERM", "SIGBREAK", "SIGINT"], "SIGBREAK"),
        (CTRL_LOGOFF_EVENT, ["SIGBREAK"], "SIGBREAK"),
        (CTRL_SHUTDOWN_EVENT, ["SIGTERM"], "SIGTERM"),
    ],
)
def test_console_events_are_signals_and_leave_time_to_clean_up(event: int, handlers: list[str], expected: str) -> None:
    done = subprocess.run(
        python_command(CONSOLE_EVENT, str(event), *handlers),
        env=child_environment(),
        creationflags=subprocess.CREATE_NO_WINDOW,
        capture_output=True,
        text=True,
        timeout=3 * LIMIT,
        check=False,
    )
    assert (done.stdout, done.returncode) == (f"{expected}\ncleaned up\n", 0), done.stderr


def run_with_console(code: str) -> str:
    """Run `code` in a console of its own; what it has printed."""
    done = subprocess.run(
        python_command(code),
        env=child_environment(),
        creationflags=subprocess.CREATE_NO_WINDOW,
        capture_output=True,
        text=True,
        timeout=3 * LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_log_off_does_not_end_a_service() -> None:
    """Services hear of everybody's."""
    printed = run_with_console(
        """
        import asyncio, ctypes, signal, threading
        import iocp_loop
        from iocp_loop.ports.iocp.binding import lib

        async def main():
            asyncio.get_running_loop().add_signal_handler(signal.SIGBREAK, print, "called")
            lib.iocp_set_service(1)
            routine = ctypes.WinDLL("kernelbase").CtrlRoutine
            routine.argtypes = [ctypes.c_void_p]
            threading.Thread(target=routine, args=[5], daemon=True).start()
            await asyncio.sleep(0.5)
            print("lives")

        iocp_loop.run(main(), driver="iocp")
        """
    )
    assert printed == "lives\n"


def test_ctrl_c_reaches_the_hundredth_port_too() -> None:
    printed = run_with_console(
        """
        import asyncio, ctypes
        import iocp_loop

        others = [iocp_loop.new_event_loop("iocp") for _ in range(100)]

        async def main():
            asyncio.get_running_loop().call_later(0.1, ctypes.windll.kernel32.GenerateConsoleCtrlEvent, 0, 0)
            await asyncio.sleep(30)

        try:
            iocp_loop.run(main(), driver="iocp")
        except KeyboardInterrupt:
            print("interrupted")
        for loop in others:
            loop.close()
        """
    )
    assert printed == "interrupted\n"


def test_a_closed_console_ends_a_program_without_handlers() -> None:
    """One whose loop has let go of its handler, and one that has never had any."""
    code = """
        import asyncio, ctypes, signal, sys, threading, time
        import iocp_loop

        loop = iocp_loop.new_event_loop("iocp")
        if sys.argv[1:]:
            loop.add_signal_handler(signal.SIGBREAK, print, "called")
            loop.remove_signal_handler(signal.SIGBREAK)
        routine = ctypes.WinDLL("kernelbase").CtrlRoutine
        routine.argtypes = [ctypes.c_void_p]
        threading.Thread(target=routine, args=[2], daemon=True).start()
        loop.call_later(30, loop.stop)
        loop.run_forever()
        print("it has gone on")
    """
    for arguments in ([], ["handler"]):
        done = subprocess.run(
            python_command(code, *arguments),
            env=child_environment(),
            creationflags=subprocess.CREATE_NO_WINDOW,
            capture_output=True,
            text=True,
            timeout=3 * LIMIT,
            check=False,
        )
        assert "it has gone on" not in done.stdout
