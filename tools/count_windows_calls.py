"""Count the calls into Windows that an echo server makes for each message, on several event loops.

An echo server runs on Windows Python under Wine, whose trace (``WINEDEBUG=+relay``) shows every call of one DLL into
another.  A client on this side sends messages; what the server has called meanwhile, divided by the number of messages,
is what one costs.  Wall time under Wine would say nothing of Windows; the number of calls is the same there.

Counted are calls by the program's own modules (Python, extension modules) into Windows' DLLs, without the C runtime.
System calls are counted beside: which functions of ntdll, by whomever, enter the kernel.  A message is one that the
client has got back in full; the connections are served at once, one message under way on each.

::

    python3 tools/count_windows_calls.py [--version X.Y] [--loops iocp_loop asyncio winloop] [--connections 1 100] ...
"""

from __future__ import annotations

import argparse
import os
import re
import selectors
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from test_windows import compile_binding, requirements, stage
from windows_python import SetupError, WindowsPython, end_cleanly, find_wine, say

SERVER = """
import asyncio, sys

class Echo(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.transport.write(data)

async def echo(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()

async def main(mode):
    if mode == "protocol":
        server = await asyncio.get_running_loop().create_server(Echo, "127.0.0.1", 0, backlog=1000)
    else:
        server = await asyncio.start_server(echo, "127.0.0.1", 0, backlog=1000)
    print("listening", server.sockets[0].getsockname()[1], flush=True)
    await asyncio.Event().wait()

name, mode = sys.argv[1:]
if name == "asyncio":
    factory = asyncio.ProactorEventLoop
elif name == "winloop":
    import winloop
    factory = winloop.new_event_loop
else:
    import iocp_loop
    factory = iocp_loop.new_event_loop
with asyncio.Runner(loop_factory=factory) as runner:
    runner.run(main(mode))
"""

#: "07f8:Call KERNEL32.GetLastError() ret=0377159d"
CALL = re.compile(rb"^[0-9a-f]{4}:Call (\w+)\.(\w+)\(.*ret=([0-9a-f]+)")
LOADED = re.compile(rb'Loaded L"(.*)" at ([0-9A-F]+): (native|builtin)')

#: The functions of ntdll that enter the kernel and belong to I/O.
SYSTEM_CALL = re.compile(
    r"ntdll\.Nt(DeviceIoControlFile|RemoveIoCompletion(Ex)?|SetIoCompletion|CancelIoFileEx|"
    r"ReadFile|WriteFile|WaitForSingleObject|WaitForMultipleObjects|CreateEvent|Close)$"
)

#: No part of Windows' interface for programs: the C runtime.
NOT_COUNTED = ("ucrtbase", "msvcrt", "vcruntime", "api-ms-win-crt")


class Case(NamedTuple):
    loop: str
    mode: str
    connections: int
    size: int


class Trace:
    """Reads the trace of one process, and counts."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._programs: list[tuple[int, int]] = []  # where the program's own modules stand
        self.calls: Counter[str] = Counter()
        self.system_calls: Counter[str] = Counter()
        self.last = time.monotonic()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def settle(self, seconds: float = 3.0) -> None:
        """Wait until nothing has been traced for a while."""
        while time.monotonic() - self.last < seconds:
            time.sleep(seconds / 10)

    def _read(self) -> None:
        rest = b""
        while data := os.read(self._descriptor, 1 << 20):
            self.last = time.monotonic()
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self._take(line)

    def _take(self, line: bytes) -> None:
        if (match := CALL.match(line)) is not None:
            module, function, caller = match[1].decode(), match[2].decode(), int(match[3], 16)
            name = f"{module.lower()}.{function}"
            if SYSTEM_CALL.match(name):
                self.system_calls[name] += 1
            if not name.startswith(NOT_COUNTED) and any(low <= caller < high for low, high in self._programs):
                self.calls[name] += 1
        elif (loaded := LOADED.search(line)) is not None and loaded[3] == b"native":
            path = Path(loaded[1].decode().replace("\\\\", "/").removeprefix("Z:"))
            base = int(loaded[2], 16)
            if "vcruntime" not in path.name.lower():
                self._programs.append((base, base + size_of_image(path)))


def size_of_image(path: Path) -> int:
    """How much room a DLL takes in memory (the PE format, "Optional Header Windows-Specific Fields")."""
    image = path.read_bytes()[:4096]
    header = int.from_bytes(image[0x3C:0x40], "little")
    return int.from_bytes(image[header + 24 + 56 : header + 24 + 60], "little")


class Clients:
    """Connections that each have one message under way."""

    def __init__(self, port: int, connections: int, size: int) -> None:
        self._message = b"x" * size
        self._selector = selectors.DefaultSelector()
        self._missing: dict[socket.socket, int] = {}
        for _ in range(connections):
            sock = socket.create_connection(("127.0.0.1", port), 60)
            self._selector.register(sock, selectors.EVENT_READ)
            self._missing[sock] = 0

    def echo(self, rounds: int) -> int:
        """Send `rounds` messages on each connection and wait for all of them; how many there were."""
        for _ in range(rounds):
            for sock in self._missing:
                sock.sendall(self._message)
                self._missing[sock] = len(self._message)
            while any(self._missing.values()):
                for key, _ in self._selector.select(60):
                    sock = key.fileobj
                    assert isinstance(sock, socket.socket)
                    self._missing[sock] -= len(sock.recv(1 << 20))
        return rounds * len(self._missing)

    def close(self) -> None:
        for sock in self._missing:
            sock.close()
        self._selector.close()


def count(python: WindowsPython, folder: Path, case: Case, rounds: int) -> tuple[Counter[str], Counter[str], int]:
    """Calls and system calls of one case, and the number of messages that they served."""
    environment = {**python.wine.environment, "WINEDEBUG": "+relay,+loaddll"}
    command = [find_wine() or "wine64", str(python.exe), "-c", SERVER, case.loop, case.mode]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            trace = Trace(process.stderr.fileno())
            line = process.stdout.readline()
            if not line.startswith(b"listening "):
                raise SetupError(f"{case.loop} does not start")
            clients = Clients(int(line.split()[1]), case.connections, case.size)
            clients.echo(5)
            trace.settle()
            calls, system_calls = trace.calls.copy(), trace.system_calls.copy()
            messages = clients.echo(rounds)
            trace.settle()
            clients.close()
            return trace.calls - calls, trace.system_calls - system_calls, messages
        finally:
            process.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description="Count the calls into Windows for each echoed message, under Wine.")
    parser.add_argument("--version", default="auto", help="of Windows Python: X.Y, or auto")
    parser.add_argument("--loops", nargs="+", default=["iocp_loop", "asyncio", "winloop"])
    parser.add_argument("--mode", nargs="+", default=["protocol"], choices=["protocol", "streams"])
    parser.add_argument("--connections", nargs="+", type=int, default=[1, 100])
    parser.add_argument("--size", nargs="+", type=int, default=[1024], help="bytes of a message")
    parser.add_argument("--messages", type=int, default=1000, help="how many are counted, about")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each case, of which the median is shown")
    parser.add_argument("--details", action="store_true", help="each function by itself")
    options = parser.parse_args()
    end_cleanly()
    try:
        python = WindowsPython(options.version)
        python.build([*requirements(), *(["winloop"] if "winloop" in options.loops else [])])
        with python.wine.session(), stage(python) as folder:
            compile_binding(python, folder)
            print("| mode | bytes | connections | loop | calls into Windows | of these for I/O | system calls |")
            print("|---|--:|--:|---|--:|--:|--:|")
            cases = [
                Case(loop, mode, connections, size)
                for mode in options.mode
                for size in options.size
                for connections in options.connections
                for loop in options.loops
            ]
            for case in cases:
                show(python, folder, case, options)
    except SetupError as exc:
        say(str(exc))
        return 2
    return 0


#: Calls that move bytes, wait, or ask what became of a request; the rest are clocks and the text of errors.
IO_CALL = re.compile(
    r"(ws2_32\.(?!WSAGetLastError)|mswsock\.|ntdll\.Nt|kernel32\.(GetQueuedCompletionStatus|"
    r"GetOverlappedResult|PostQueued|CancelIo|ReadFile|WriteFile|CreateEvent|RegisterWait|WaitFor))"
)


def show(python: WindowsPython, folder: Path, case: Case, options: argparse.Namespace) -> None:
    """Print the row of one case."""
    rounds = max(1, options.messages // case.connections)
    runs = [count(python, folder, case, rounds) for _ in range(options.repeat)]
    every = statistics.median(calls.total() / messages for calls, _, messages in runs)
    io = statistics.median(
        sum(n for name, n in calls.items() if IO_CALL.match(name)) / messages for calls, _, messages in runs
    )
    system = statistics.median(calls.total() / messages for _, calls, messages in runs)
    print(
        f"| {case.mode} | {case.size} | {case.connections} | {case.loop} | {every:.2f} | {io:.2f} | {system:.2f} |",
        flush=True,
    )
    if options.details:
        calls, system_calls, messages = runs[0]
        for title, counter in (("calls", calls), ("system calls", system_calls)):
            for name, n in counter.most_common():
                print(f"    {title:12} {n / messages:7.3f}  {name}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
