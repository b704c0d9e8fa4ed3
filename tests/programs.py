"""Servers under test as they are used: programs of their own, started, spoken to by sockets, and stopped."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

from .support import LIMIT, ROOT, WINDOWS, child_environment, read_all

#: Runs a module or a file as a program, and treats the end of its input as Ctrl-C.  For Windows: there a Ctrl-C goes to
#: everything in the console, the tests themselves included.
_LAUNCHER = """
import _thread, os, runpy, sys, threading

def await_end():
    while os.read(0, 100):
        pass
    _thread.interrupt_main()

program = sys.argv[1]
sys.argv = sys.argv[1:]
threading.Thread(target=await_end, daemon=True).start()
if program.endswith(".py"):
    runpy.run_path(program, run_name="__main__")
else:
    runpy.run_module(program, run_name="__main__", alter_sys=True)
"""


#: A child's first lines: a seccomp filter that answers io_uring_setup, or all three calls, with an errno.
REFUSE = """
import ctypes, struct, sys
def refuse_io_uring(code, calls=(425,)):  # 425 setup, 426 enter, 427 register: on every architecture
    LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
    ALLOW, REFUSE = 0x7FFF0000, 0x00050000
    lines = [(LOAD, 0, 0, 0)]
    for call in calls:
        lines += [(JUMP_IF_EQUAL, 0, 1, call), (RETURN, 0, 0, REFUSE | code)]
    program = b"".join(struct.pack("HBBI", *line) for line in [*lines, (RETURN, 0, 0, ALLOW)])
    lines = ctypes.create_string_buffer(program, len(program))
    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("lines", ctypes.c_void_p)]
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, MODE_FILTER = 38, 22, 2
    assert prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    filter = Program(len(program) // 8, ctypes.addressof(lines))
    if prctl(PR_SET_SECCOMP, MODE_FILTER, ctypes.byref(filter), 0, 0) != 0:
        print("no seccomp", ctypes.get_errno())
        sys.exit()
"""


def _command(program: str | Path, *arguments: str, launcher: bool = False) -> list[str]:
    """The command that runs `program`, the name of a module or a file, with warnings as errors."""
    target = [str(program)] if isinstance(program, Path) else ["-m", program]
    if launcher:
        target = ["-c", _LAUNCHER, str(program)]
    return [sys.executable, "-W", "error", *target, *arguments]


def run_to_end(program: str | Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program that is to end by itself."""
    return subprocess.run(
        _command(program, *arguments),
        env=child_environment(**environment),
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=2 * LIMIT,
        check=False,
    )


class Server:
    """A running server, which has said that it listens.  To be used in a ``with`` block, whose end kills it."""

    def __init__(self, program: str | Path, *arguments: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            _command(program, *arguments, launcher=WINDOWS),
            env=child_environment(**environment),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        watchdog = threading.Timer(2 * LIMIT, self.process.kill)
        watchdog.start()
        #: The first line of its output.
        self.line = self.process.stdout.readline().rstrip("\n")
        watchdog.cancel()
        match = re.match(r"listening on (?P<host>\S+):(?P<port>\d+)( driver=(?P<driver>\w+))?$", self.line)
        if match is None:
            self.process.kill()
            raise AssertionError(f"it does not listen: {self.line!r} {self.process.communicate()}")
        self.host = match["host"].strip("[]")
        self.port = int(match["port"])
        self.driver = match["driver"]

    def connect(self) -> socket.socket:
        """A new connection, blocking with a time limit."""
        return socket.create_connection((self.host, self.port), LIMIT)

    def stop(self, number: int = signal.SIGINT) -> tuple[str, str]:
        """Send a signal (on Windows always Ctrl-C) and wait; what came after the first line, and its stderr."""
        if not WINDOWS:
            self.process.send_signal(number)
        return self.process.communicate(timeout=2 * LIMIT)

    def stop_cleanly(self, number: int = signal.SIGINT) -> str:
        """As `stop`; the server must exit with 0 and have nothing to complain of."""
        out, err = self.stop(number)
        assert (self.process.returncode, err) == (0, ""), f"exit {self.process.returncode}\n{out}\n{err}"
        return out

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


def ask(sock: socket.socket, data: bytes) -> bytes:
    """Send `data`, then end the sending side; everything that comes back."""

    def send() -> None:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send)
    sender.start()
    answer = read_all(sock)
    sender.join()
    return answer


#: Serves one connection on a loop, with what a tier has to do with, and tells by which types.
USE_IT = """
import asyncio, socket, sys
import iocp_loop
from iocp_loop import native
from iocp_loop.ports import DRIVERS, availability

async def main():
    loop = asyncio.get_running_loop()
    one, two = socket.socketpair()
    with one, two:
        one.setblocking(False)
        two.setblocking(False)
        loop.call_soon(two.send, b"hello")
        assert await loop.sock_recv(one, 100) == b"hello"
    server = await asyncio.start_server(lambda reader, writer: echo(reader, writer), "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    writer.write(b"x" * 100_000)
    assert await reader.readexactly(100_000) == b"x" * 100_000
    writer.close()
    await writer.wait_closed()
    server.close()
    await asyncio.sleep(0.01)

async def echo(reader, writer):
    writer.write(await reader.readexactly(100_000))
    await reader.read()
    writer.close()

for driver in DRIVERS:
    if availability(driver).available:
        with asyncio.Runner(loop_factory=lambda: iocp_loop.new_event_loop(driver)) as runner:
            runner.run(main())
print(native.hot is not None, native.why_not)
"""
