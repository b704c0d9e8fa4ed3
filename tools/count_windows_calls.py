"""Count the calls into Windows that a server makes for each message or connection, on several event loops.

An echo server, or what else `MODES` names, runs on Windows Python under Wine, whose trace (``WINEDEBUG=+relay``) shows
every call of one DLL into another.  A client on this side sends messages; what the server has called meanwhile, divided
by the number of messages, is what one costs.  Wall time under Wine would say nothing of Windows; the number of calls is
the same there.

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
import asyncio, socket, sys

class Echo(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.transport.write(data)

class Goodbye(asyncio.Protocol):
    def connection_made(self, transport):
        transport.close()

class Datagrams(asyncio.DatagramProtocol):
    def connection_made(self, transport):
        self.transport = transport

    def datagram_received(self, data, address):
        self.transport.sendto(data, address)

async def echo(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()

async def serve(loop, conn):
    with conn:
        while data := await loop.sock_recv(conn, 65536):
            await loop.sock_sendall(conn, data)

async def accept(loop, listener):
    tasks = set()
    while True:
        conn, _ = await loop.sock_accept(listener)
        tasks.add(task := loop.create_task(serve(loop, conn)))
        task.add_done_callback(tasks.discard)

async def answer(loop, sock):
    while True:
        data, address = await loop.sock_recvfrom(sock, 65536)
        await loop.sock_sendto(sock, data, address)

async def connect(port):
    while True:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await reader.read()
        writer.close()
        await writer.wait_closed()

def bound(kind):
    sock = socket.socket(socket.AF_INET, kind)
    sock.bind(("127.0.0.1", 0))
    sock.setblocking(False)
    return sock

async def main(mode, port):
    loop = asyncio.get_running_loop()
    task = None
    if mode == "streams":
        server = await asyncio.start_server(echo, "127.0.0.1", 0, backlog=1000)
        sock = server.sockets[0]
    elif mode in ("protocol", "connections"):
        factory = Echo if mode == "protocol" else Goodbye
        server = await loop.create_server(factory, "127.0.0.1", 0, backlog=1000)
        sock = server.sockets[0]
    elif mode == "sockets":
        sock = bound(socket.SOCK_STREAM)
        sock.listen(1000)
        task = loop.create_task(accept(loop, sock))
    elif mode == "datagrams":
        sock = bound(socket.SOCK_DGRAM)
        await loop.create_datagram_endpoint(Datagrams, sock=sock)
    elif mode == "sock_datagrams":
        sock = bound(socket.SOCK_DGRAM)
        task = loop.create_task(answer(loop, sock))
    else:
        sock = bound(socket.SOCK_DGRAM)
        task = loop.create_task(connect(port))
    print("listening", sock.getsockname()[1], flush=True)
    await (task or asyncio.Event().wait())

name, mode, port = sys.argv[1:]
if name == "asyncio":
    factory = asyncio.ProactorEventLoop
elif name == "winloop":
    import winloop
    factory = winloop.new_event_loop
else:
    import iocp_loop
    factory = iocp_loop.new_event_loop
with asyncio.Runner(loop_factory=factory) as runner:
    runner.run(main(mode, int(port)))
"""

#: What is counted, of which a "message" is: an echo by a protocol, by streams, by sock_recv and sock_sendall, by a
#: datagram endpoint, by sock_recvfrom and sock_sendto; a connection that is accepted and closed; one that is made,
#: heard to the end (at once) and closed.
MODES = ("protocol", "streams", "sockets", "datagrams", "sock_datagrams", "connections", "connect")

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


class NoAnswer(Exception):
    """The server does not answer: its loop cannot do what it was asked for."""


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
        while data := self._more():
            self.last = time.monotonic()
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self._take(line)

    def _more(self) -> bytes:
        try:
            return os.read(self._descriptor, 1 << 20)
        except OSError:  # the case is over
            return b""

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
    """Sockets that each have one message under way."""

    def __init__(self, kind: socket.SocketKind, port: int, connections: int, size: int) -> None:
        self._message = b"x" * size
        self._selector = selectors.DefaultSelector()
        self._missing: dict[socket.socket, int] = {}
        for _ in range(connections):
            sock = socket.socket(socket.AF_INET, kind)
            sock.settimeout(60)
            sock.connect(("127.0.0.1", port))
            self._selector.register(sock, selectors.EVENT_READ)
            self._missing[sock] = 0

    def exchange(self, rounds: int) -> int:
        """Send `rounds` messages on each connection and wait for all of them; how many there were."""
        for _ in range(rounds):
            for sock in self._missing:
                sock.sendall(self._message)
                self._missing[sock] = len(self._message)
            while any(self._missing.values()):
                ready = self._selector.select(60)
                if not ready:
                    raise NoAnswer
                for key, _ in ready:
                    sock = key.fileobj
                    assert isinstance(sock, socket.socket)
                    self._missing[sock] -= len(sock.recv(1 << 20))
        return rounds * len(self._missing)

    def close(self) -> None:
        for sock in self._missing:
            sock.close()
        self._selector.close()


class Callers:
    """Connections that the other side closes, some at once."""

    def __init__(self, port: int, connections: int) -> None:
        self._address = ("127.0.0.1", port)
        self._connections = connections

    def exchange(self, rounds: int) -> int:
        for _ in range(rounds):
            socks = [socket.create_connection(self._address, 60) for _ in range(self._connections)]
            for sock in socks:
                sock.recv(1)
                sock.close()
        return rounds * self._connections

    def close(self) -> None:
        pass


class Listener:
    """Takes connections and closes them."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener

    def exchange(self, rounds: int) -> int:
        for _ in range(rounds):
            self._listener.accept()[0].close()
        return rounds

    def close(self) -> None:
        self._listener.close()


def peer(case: Case, port: int, listener: socket.socket) -> Clients | Callers | Listener:
    """This side of a case."""
    if case.mode == "connect":
        return Listener(listener)
    listener.close()
    if case.mode == "connections":
        return Callers(port, case.connections)
    kind = socket.SOCK_DGRAM if "datagrams" in case.mode else socket.SOCK_STREAM
    return Clients(kind, port, case.connections, case.size)


def count(python: WindowsPython, folder: Path, case: Case, rounds: int) -> tuple[Counter[str], Counter[str], int]:
    """Calls and system calls of one case, and the number of messages that they served."""
    environment = {**python.wine.environment, "WINEDEBUG": "+relay,+loaddll"}
    listener = socket.create_server(("127.0.0.1", 0))
    number = str(listener.getsockname()[1])
    command = [find_wine() or "wine64", str(python.exe), "-c", SERVER, case.loop, case.mode, number]
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
            clients = peer(case, int(line.split()[1]), listener)
            clients.exchange(5)
            trace.settle()
            calls, system_calls = trace.calls.copy(), trace.system_calls.copy()
            messages = clients.exchange(rounds)
            trace.settle()
            clients.close()
            return trace.calls - calls, trace.system_calls - system_calls, messages
        finally:
            process.kill()


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Count the calls into Windows for each message or connection, under Wine."
    )
    parser.add_argument("--version", default="auto", help="of Windows Python: X.Y, or auto")
    parser.add_argument("--loops", nargs="+", default=["iocp_loop", "asyncio", "winloop"])
    parser.add_argument("--mode", nargs="+", default=["protocol"], choices=MODES)
    parser.add_argument("--connections", nargs="+", type=int, default=[1, 100])
    parser.add_argument("--size", nargs="+", type=int, default=[1024], help="bytes of a message")
    parser.add_argument("--messages", type=int, default=1000, help="how many are counted, about")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each case, of which the median is shown")
    parser.add_argument("--details", action="store_true", help="each function by itself")
    options = parser.parse_args()
    end_cleanly()
    try:
        python = WindowsPython(options.version)
        python.build([*requirements(python), *(["winloop"] if "winloop" in options.loops else [])])
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


#: Calls that move bytes, wait, or ask what became of a request; the rest are clocks, the text of errors and addresses.
IO_CALL = re.compile(
    r"(ws2_32\.(?!WSAGetLastError|inet_|ntoh|hton|getaddrinfo|freeaddrinfo)|mswsock\.|ntdll\.Nt|kernel32\.(GetQueuedCompletionStatus|"
    r"GetOverlappedResult|PostQueued|CancelIo|ReadFile|WriteFile|CreateEvent|RegisterWait|WaitFor))"
)


def show(python: WindowsPython, folder: Path, case: Case, options: argparse.Namespace) -> None:
    """Print the row of one case."""
    rounds = max(1, options.messages // case.connections)
    try:
        runs = [count(python, folder, case, rounds) for _ in range(options.repeat)]
    except NoAnswer:
        print(f"| {case.mode} | {case.size} | {case.connections} | {case.loop} | no answer | | |", flush=True)
        return
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
