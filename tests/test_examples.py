"""The programs in examples/ do what they say."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import signal
import socket
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import iocp_loop
from iocp_loop.ports import availability

from .programs import Server, ask, run_to_end
from .support import LIMIT, ROOT, WINDOWS, fill, read_exactly, reset

EXAMPLES = ROOT / "examples"
RAW_ECHO = EXAMPLES / "raw_echo.py"
CHAT = EXAMPLES / "chat.py"
TK_ECHO = EXAMPLES / "tk_echo.py"


def imported(path: Path) -> ModuleType:
    """A program as a module; it does not run."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_lists_every_example() -> None:
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f"({path.name})" in readme


# -- echo_server.py --------------------------------------------------------------------------------


async def test_echo_server(loop: iocp_loop.IocpEventLoop) -> None:
    server = await asyncio.start_server(imported(EXAMPLES / "echo_server.py").echo, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    writer.write(b"hello\n")
    assert await reader.readline() == b"hello\n"
    writer.write_eof()
    assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()
    server.close()
    await server.wait_closed()


# -- named_pipe.py ---------------------------------------------------------------------------------


@pytest.mark.skipif(not WINDOWS, reason="named pipes of this kind exist on Windows only")
async def test_named_pipe(loop: iocp_loop.IocpEventLoop) -> None:
    example = imported(EXAMPLES / "named_pipe.py")
    address = rf"\\.\pipe\iocp_loop-test-{os.getpid()}-example"
    serving = asyncio.ensure_future(example.serve(address))
    await asyncio.sleep(0)
    for words in "hello", "hello again":
        assert await example.say(words, address) == words.upper()
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving


@pytest.mark.skipif(WINDOWS, reason="there it runs")
def test_named_pipe_elsewhere_says_that_it_is_for_windows() -> None:
    done = run_to_end(EXAMPLES / "named_pipe.py", "serve")
    assert done.returncode == 1
    assert "Windows" in done.stderr


# -- raw_echo.py -----------------------------------------------------------------------------------


@pytest.fixture
def raw(driver: str) -> Iterator[Server]:
    """The server on CompletionPort alone, with four workers."""
    with Server(RAW_ECHO, "--port", "0", "--driver", driver, "--threads", "4") as server:
        yield server


def test_raw_echo_tells_where_it_listens_and_stops(raw: Server, driver: str) -> None:
    assert raw.line == f"listening on 127.0.0.1:{raw.port} driver={driver}"
    assert raw.stop_cleanly() == "stopped\n"


@pytest.mark.skipif(WINDOWS, reason="only POSIX sends signals to processes")
def test_raw_echo_stops_on_sigterm(raw: Server) -> None:
    assert raw.stop_cleanly(signal.SIGTERM) == "stopped\n"


@pytest.mark.parametrize("size", [0, 1, 1024, 2**20, 2**23])
def test_raw_echo_sends_everything_back_in_order(raw: Server, size: int) -> None:
    data = os.urandom(size)
    with raw.connect() as sock:
        assert ask(sock, data) == data
    raw.stop_cleanly()


def test_raw_echo_serves_many_at_once(raw: Server) -> None:
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(raw.connect()) for _ in range(50)]
        for turn in range(5):
            for number, sock in enumerate(socks):
                sock.sendall(b"%d %d\n" % (turn, number) * 1000)
            for number, sock in enumerate(socks):
                expected = b"%d %d\n" % (turn, number) * 1000
                assert read_exactly(sock, len(expected)) == expected
        # They are still connected: the server ends all the same.
        raw.stop_cleanly()
        assert socks[0].recv(1) == b""


def test_raw_echo_survives_clients_that_reset_or_do_not_read(raw: Server) -> None:
    with raw.connect() as idle, raw.connect() as other:
        idle.setblocking(False)
        fill(idle)
        for _ in range(5):
            sock = raw.connect()
            sock.sendall(b"y" * 100_000)
            reset(sock)
        other.sendall(b"hello")
        assert read_exactly(other, 5) == b"hello"
        _, err = raw.stop()
        assert raw.process.returncode == 0
        # Windows reports a connection that was reset before it was accepted.
        assert all(line.startswith("accept: ") for line in err.splitlines()), err


def test_raw_echo_tells_of_each_message_if_asked_to(driver: str) -> None:
    with Server(RAW_ECHO, "--port", "0", "--driver", driver, "--verbose") as server:
        assert server.process.stdout is not None
        with server.connect() as sock:
            sock.sendall(b"hello")
            assert read_exactly(sock, 5) == b"hello"
            assert server.process.stdout.readline() == "message sent!\n"
        server.stop_cleanly()


@pytest.mark.skipif(
    sys.version_info[:3] == (3, 14, 0) and bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
    reason="CPython 3.14.0t looks through its memory for ever as it ends, with no C of this package in the process",
)
def test_raw_echo_tells_why_it_cannot_begin() -> None:
    name = "uring" if WINDOWS else "iocp"
    done = run_to_end(RAW_ECHO, "--driver", name)
    assert done.returncode == 2
    assert availability(name).reason in done.stderr
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run_to_end(RAW_ECHO, "--port", str(taken.getsockname()[1]))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


# -- chat.py ---------------------------------------------------------------------------------------


@pytest.fixture
def chat(driver: str) -> Iterator[Server]:
    with Server(CHAT, "--port", "0", "--driver", driver) as server:
        yield server


class Member:
    """One who takes part in the chat."""

    def __init__(self, server: Server, name: str) -> None:
        self.sock = server.connect()
        self.sock.settimeout(LIMIT)
        assert read_exactly(self.sock, 11) == b"Your name? "
        self.lines = self.sock.makefile("r", encoding="utf-8")
        self.say(name)

    def say(self, line: str) -> None:
        self.sock.sendall(f"{line}\n".encode())

    def hear(self) -> str:
        return self.lines.readline().rstrip("\n")

    def leave(self) -> None:
        self.lines.close()
        self.sock.close()


def test_members_of_the_chat_hear_each_other(chat: Server) -> None:
    ann = Member(chat, "Ann")
    ann.say("is anybody there?")  # nobody is: but now she is in the room for sure, as lines are taken in order
    bob = Member(chat, "Bob")
    assert ann.hear() == "* Bob is here"
    bob.say("hello, Ann")
    assert ann.hear() == "Bob: hello, Ann"
    ann.say("hello, Bob")
    assert bob.hear() == "Ann: hello, Bob"
    bob.leave()
    assert ann.hear() == "* Bob has left"
    ann.leave()


def test_the_chat_goes_on_without_a_member_who_does_not_read(chat: Server) -> None:
    ann = Member(chat, "Ann")
    bob = Member(chat, "Bob")
    assert ann.hear() == "* Bob is here"
    # More than the kernel buffers on Bob's way can hold, and what the room has patience for.
    for _ in range(600):
        ann.say("x" * 60_000)
    assert ann.hear() == "* Bob has left"
    ann.leave()
    bob.leave()


@pytest.mark.skipif(WINDOWS, reason="only POSIX sends signals to processes")
def test_the_chat_ends_on_ctrl_c(chat: Server) -> None:
    ann = Member(chat, "Ann")
    stranger = chat.connect()
    assert read_exactly(stranger, 11) == b"Your name? "
    assert chat.stop_cleanly() == ""
    assert ann.hear() == ""
    ann.leave()
    stranger.close()


# -- tk_echo.py ------------------------------------------------------------------------------------

#: Runs a tkinter program, and closes its window when its input ends.
QUIT_AT_END_OF_INPUT = """
import runpy, sys, threading, tkinter

class Tk(tkinter.Tk):
    def __init__(self):
        super().__init__()
        threading.Thread(target=self.await_end, daemon=True).start()

    def await_end(self):
        sys.stdin.read()
        self.after(0, lambda: self.tk.call(self.protocol("WM_DELETE_WINDOW")))

tkinter.Tk = Tk
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_an_echo_server_in_a_window(driver: str, display: str, tmp_path: Path) -> None:
    launcher = tmp_path / "launcher.py"
    launcher.write_text(QUIT_AT_END_OF_INPUT, encoding="utf-8")
    with Server(launcher, str(TK_ECHO), "--port", "0", "--driver", driver, DISPLAY=display) as server:
        with server.connect() as one, server.connect() as other:
            for turn in range(20):
                for sock in (one, other):
                    sock.sendall(b"hello %d\n" % turn)
                    assert read_exactly(sock, len(b"hello %d\n" % turn)) == b"hello %d\n" % turn
            # It sleeps now, and one of them is still connected: it ends all the same.
            one.close()
            out, err = server.process.communicate(timeout=2 * LIMIT)
        assert (server.process.returncode, out, err) == (0, "", "")
