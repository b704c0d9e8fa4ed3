"""Driver iocp with many of everything: connections, readers.  No handle is left over, and no thread helps out."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator

import pytest

if sys.platform != "win32":
    pytest.skip("I/O completion ports exist on Windows only", allow_module_level=True)

import ctypes
from ctypes import wintypes

import iocp_loop
from iocp_loop.ports.iocp.driver import IocpDriver
from iocp_loop.ports.iocp.readiness import POLLS_PER_DEVICE

from .support import LIMIT, Echo, until

kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
kernel32.GetCurrentProcess.restype = wintypes.HANDLE
kernel32.GetProcessHandleCount.argtypes = [wintypes.HANDLE, ctypes.POINTER(wintypes.DWORD)]
kernel32.CreateToolhelp32Snapshot.restype = wintypes.HANDLE
kernel32.CloseHandle.argtypes = [wintypes.HANDLE]


def handle_count() -> int:
    """How many handles this process has open."""
    gc.collect()
    count = wintypes.DWORD()
    assert kernel32.GetProcessHandleCount(kernel32.GetCurrentProcess(), count)
    return count.value or listed_handle_count()


def listed_handle_count() -> int:
    """The same for Wine, which counts none but lists those of all processes (SystemExtendedHandleInformation)."""
    buffer = ctypes.create_string_buffer(1 << 24)
    status = ctypes.WinDLL("ntdll").NtQuerySystemInformation(64, buffer, len(buffer), None)
    assert status == 0
    [count] = struct.unpack_from("<Q", buffer)
    entries = struct.iter_unpack("<QQQLHHLL", memoryview(buffer)[16 : 16 + 40 * count])
    return sum(process == os.getpid() for _, process, *_ in entries)


class ThreadEntry(ctypes.Structure):
    """tlhelp32/ns-tlhelp32-threadentry32"""

    _fields_ = [
        ("size", wintypes.DWORD),
        ("usage", wintypes.DWORD),
        ("thread", wintypes.DWORD),
        ("process", wintypes.DWORD),
        ("base_priority", wintypes.LONG),
        ("delta_priority", wintypes.LONG),
        ("flags", wintypes.DWORD),
    ]


def thread_count() -> int:
    """How many threads this process has, Python's and others."""
    snapshot = kernel32.CreateToolhelp32Snapshot(0x4, 0)  # TH32CS_SNAPTHREAD
    entry = ThreadEntry(size=ctypes.sizeof(ThreadEntry))
    count = 0
    more = kernel32.Thread32First(wintypes.HANDLE(snapshot), ctypes.byref(entry))
    while more:
        count += entry.process == os.getpid()
        more = kernel32.Thread32Next(wintypes.HANDLE(snapshot), ctypes.byref(entry))
    kernel32.CloseHandle(snapshot)
    return count


@pytest.fixture
def no_handle_left() -> Iterator[None]:
    """The process has as many handles afterwards as before, give or take what the system keeps for itself."""
    iocp_loop.new_event_loop("iocp").close()  # whatever is made once per process
    before = handle_count()
    yield
    deadline = time.monotonic() + LIMIT
    while handle_count() > before + 20 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert handle_count() <= before + 20


def test_handles_and_threads_are_counted() -> None:
    handles, threads = handle_count(), thread_count()
    with contextlib.ExitStack() as stack:
        for _ in range(50):
            stack.enter_context(socket.socket())
        assert handle_count() >= handles + 50
        assert thread_count() == threads


def test_two_thousand_connections_at_once(no_handle_left: None) -> None:
    connections = 2000

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, iocp_loop.IocpEventLoop)
        server = await loop.create_server(Echo, "127.0.0.1", 0, backlog=200)
        address = server.sockets[0].getsockname()
        threads = thread_count()
        pairs = []
        for _ in range(connections // 100):
            pairs += await asyncio.gather(*[asyncio.open_connection(*address) for _ in range(100)])
        for turn in range(3):
            for number, (_, writer) in enumerate(pairs):
                writer.write(b"%5d %d\n" % (number, turn))
            for number, (reader, _) in enumerate(pairs):
                assert await reader.readline() == b"%5d %d\n" % (number, turn)
        assert thread_count() <= threads + 1  # under Wine a wait may start one for the system
        for _, writer in pairs:
            writer.close()
        await asyncio.gather(*[writer.wait_closed() for _, writer in pairs])
        server.close()
        await server.wait_closed()
        await until(lambda: loop.stats().in_flight == 0)  # the server has seen that they are gone

    iocp_loop.run(main(), driver="iocp")


def test_five_thousand_readers_at_once(no_handle_left: None) -> None:
    """gh-81554: select() takes 512 sockets, and a thread for it."""
    sockets = 5000
    loop = iocp_loop.new_event_loop("iocp")
    threads = thread_count()
    with contextlib.ExitStack() as stack:
        socks = []
        for _ in range(sockets):
            sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            sock.bind(("127.0.0.1", 0))
            sock.setblocking(False)
            socks.append(sock)
        waiting = set(range(sockets))

        def readable(number: int) -> None:
            assert socks[number].recv(10) == b"%d" % number
            waiting.remove(number)
            if not waiting:
                loop.stop()

        for number, sock in enumerate(socks):
            loop.add_reader(sock, readable, number)
        driver = loop._proactor.driver
        assert isinstance(driver, IocpDriver)
        assert len(driver._devices) == sockets / POLLS_PER_DEVICE
        assert thread_count() <= threads  # fewer if the system's pool lets go of what earlier tests have needed
        for _ in range(2):
            waiting.update(range(sockets))
            for number, sock in enumerate(socks):
                sock.sendto(b"%d" % number, sock.getsockname())
            loop.run_forever()
        assert thread_count() <= threads
        for sock in socks:
            assert loop.remove_reader(sock)
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
