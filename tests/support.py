"""What several test files need: sockets, children, protocols that note what happens to them."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

#: Seconds that anything may take which ought to happen soon; long, since machines can be busy.
LIMIT = 20.0

#: Bytes: more than the kernel buffers of a connection hold.
MUCH = 32 << 20

WINDOWS = sys.platform == "win32"


def _is_wine() -> bool:
    if sys.platform != "win32":
        return False
    import ctypes

    return hasattr(ctypes.WinDLL("ntdll"), "wine_get_version")


#: True under Wine, which lacks a few things that Windows has.
WINE = _is_wine()


# --------------------------------------------------------------------------------------------------
# Sockets
# --------------------------------------------------------------------------------------------------


def listening_socket(backlog: int = 128) -> socket.socket:
    """A non-blocking TCP socket that listens on a free port of the loopback interface."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.bind(("127.0.0.1", 0))
    sock.listen(backlog)
    sock.setblocking(False)
    return sock


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected TCP sockets: the first non-blocking (ours), the second with a time limit (the peer)."""
    with listening_socket() as listener:
        listener.settimeout(LIMIT)
        peer = socket.create_connection(listener.getsockname(), LIMIT)
        ours, _ = listener.accept()
    ours.setblocking(False)
    return ours, peer


def udp_socket() -> socket.socket:
    """A non-blocking UDP socket on a free port of the loopback interface."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    sock.setblocking(False)
    return sock


def reset(sock: socket.socket) -> None:
    """Close a connection so that its peer sees a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("HH" if WINDOWS else "ii", 1, 0))
    sock.close()


def fill(sock: socket.socket, chunk: bytes = b"x" * (1 << 20)) -> int:
    """Send until the kernel takes no more; the number of bytes."""
    total = 0
    refusals = 0
    # Full is what stays full: room comes back while the peer's side stores data and its acknowledgements travel.
    while refusals < 15:
        try:
            total += sock.send(chunk)
            refusals = 0
        except BlockingIOError:
            refusals += 1
            time.sleep(0.01)
    return total


def send_in_pieces(sock: socket.socket, data: bytes, size: int = 1 << 16) -> None:
    """All of `data`, held up by a kernel that is full: Windows takes any amount of a single send at once."""
    for start in range(0, len(data), size):
        sock.sendall(data[start : start + size])


def read_all(sock: socket.socket) -> bytes:
    """Everything until the end of the stream, from a blocking socket."""
    pieces = []
    while piece := sock.recv(1 << 20):
        pieces.append(piece)
    return b"".join(pieces)


def read_exactly(sock: socket.socket, count: int) -> bytes:
    """`count` bytes, fewer only at the end of the stream, from a blocking socket."""
    got = bytearray()
    while len(got) < count and (piece := sock.recv(min(1 << 20, count - len(got)))):
        got += piece
    return bytes(got)


def open_files() -> set[int] | None:
    """The descriptors that this process has open; None where the system does not tell."""
    try:
        names = os.listdir("/proc/self/fd")
    except OSError:
        return None
    return {fd for fd in map(int, names) if _is_open(fd)}  # without the one that listdir had


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def open_handles() -> int:
    """How many handles this process has open, on Windows.

    They are counted one by one: Wine has no number to tell.
    """
    if sys.platform != "win32":
        raise NotImplementedError("handles exist on Windows only")
    import ctypes

    kernel32 = ctypes.WinDLL("kernel32")
    flags = ctypes.c_ulong()
    numbers = range(4, 1 << 14, 4)
    return sum(bool(kernel32.GetHandleInformation(ctypes.c_void_p(each), ctypes.byref(flags))) for each in numbers)


# --------------------------------------------------------------------------------------------------
# Pipes
# --------------------------------------------------------------------------------------------------

Pipe = tuple[Any, Any]


def runtime_pipe() -> Pipe:
    """The two ends of ``os.pipe()`` as unbuffered files."""
    reading, writing = os.pipe()
    return open(reading, "rb", 0), open(writing, "wb", 0)


def windows_pipe(ours: str) -> Pipe:
    """The two ends of a pipe on Windows: the loop's (`ours`: "read", "write", "both") overlapped, the other a file."""
    # By name: typeshed has them on Windows only.
    utilities: Any = importlib.import_module("asyncio.windows_utils")
    runtime: Any = importlib.import_module("msvcrt")
    # Duplex as the standard input of a child process: whoever writes learns then that the other end is gone.
    reading, writing = utilities.pipe(
        duplex=ours == "write", overlapped=(ours != "write", ours != "read"), bufsize=65536
    )
    reader: Any = (
        utilities.PipeHandle(reading)
        if ours != "write"
        else open(runtime.open_osfhandle(reading, os.O_RDONLY), "rb", 0)
    )
    writer: Any = utilities.PipeHandle(writing) if ours != "read" else open(runtime.open_osfhandle(writing, 0), "wb", 0)
    return reader, writer


# --------------------------------------------------------------------------------------------------
# Threads and child processes
# --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def in_thread(work: Callable[[], object]) -> Iterator[threading.Thread]:
    """Runs `work` beside the block and waits for it; what it raised is raised at the end of the block."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as exc:
            failures.append(exc)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield thread
    thread.join(LIMIT)
    if thread.is_alive():
        raise AssertionError("the thread has not ended")
    if failures:
        raise failures[0]


def python_command(code: str, *arguments: str) -> list[str]:
    """The command of a Python in which warnings are errors, running `code`."""
    return [sys.executable, "-W", "error", "-X", "faulthandler", "-c", textwrap.dedent(code), *arguments]


def child_environment(**changes: str) -> dict[str, str]:
    """The environment of a child that finds this very package; without a choice of driver but the one given here."""
    environment = {name: value for name, value in os.environ.items() if name != "IOCP_LOOP_DRIVER"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    return environment | changes


def run_python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new Python to its end; the test fails with its output unless it exits with 0."""
    done = subprocess.run(
        python_command(code, *arguments),
        env=child_environment(**environment),
        capture_output=True,
        text=True,
        timeout=3 * LIMIT,
        check=False,
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


# --------------------------------------------------------------------------------------------------
# asyncio
# --------------------------------------------------------------------------------------------------


async def until(condition: Callable[[], Any], seconds: float = LIMIT) -> None:
    """Let the loop turn until `condition()` holds; AssertionError if it does not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it has not happened in time"
        await asyncio.sleep(0.001)


async def turns(count: int = 5) -> None:
    """Let the loop turn a few times."""
    for _ in range(count):
        await asyncio.sleep(0)


class Recorder(asyncio.Protocol):
    """A protocol that notes which calls it gets, joins its data, and stays open at the end of the stream."""

    keep_open_at_eof = True

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.data = bytearray()
        self.transport: asyncio.Transport = None  # type: ignore[assignment]  # set by connection_made
        self.lost: BaseException | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.calls.append("connection_made")
        self.transport = transport  # type: ignore[assignment]  # stream transports only

    def data_received(self, data: bytes) -> None:
        assert type(data) is bytes
        if self.calls[-1] != "data_received":
            self.calls.append("data_received")
        self.data += data

    def eof_received(self) -> bool:
        self.calls.append("eof_received")
        return self.keep_open_at_eof

    def connection_lost(self, exc: BaseException | None) -> None:
        self.calls.append("connection_lost")
        self.lost = exc

    def pause_writing(self) -> None:
        self.calls.append("pause_writing")

    def resume_writing(self) -> None:
        self.calls.append("resume_writing")

    @property
    def finished(self) -> bool:
        return "connection_lost" in self.calls


class Echo(asyncio.Protocol):
    """Sends back what it gets; reads no further while the peer does not take it."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]  # stream transports only

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)

    def pause_writing(self) -> None:
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.transport.resume_reading()


async def connected(
    loop: asyncio.AbstractEventLoop,
    pair: tuple[socket.socket, socket.socket],
    protocol: Any = None,
) -> Any:
    """The protocol (a Recorder if there is none) on a transport over our end of the pair."""
    transport, protocol = await loop.create_connection(lambda: protocol or Recorder(), sock=pair[0])
    assert transport.get_protocol() in (protocol, None)  # None: it was lost meanwhile
    return protocol


async def closed(protocol: Recorder) -> None:
    """Close the protocol's transport and see it through."""
    protocol.transport.close()
    await until(lambda: protocol.finished)
    await turns()
