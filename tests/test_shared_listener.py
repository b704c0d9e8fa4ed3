"""Processes or threads that accept on one listener: each gets some connections, and none keeps the others waiting."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from iocp_loop import new_event_loop

from .support import LIMIT, WINDOWS, child_environment, listening_socket, python_command, run_python

if WINDOWS:
    pytest.skip("processes of Windows share a listener otherwise; test_iocp.py", allow_module_level=True)

CLIENTS = 160

SERVER = """
import asyncio, os, signal, socket, sys, time, warnings
warnings.simplefilter("ignore")
import iocp_loop

driver, kind, clients = sys.argv[1], sys.argv[2], int(sys.argv[3])
path = sys.argv[4]
if kind == "unix":
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(500)
else:
    listener = socket.create_server(("127.0.0.1", 0), backlog=500)


async def serve(number):
    async def answer(reader, writer):
        if await reader.read(1) == b"b":
            time.sleep(1)  # a worker that computes: nobody else is to wait for it
        writer.write(b"%d" % number)
        writer.close()

    if kind == "unix":
        server = await asyncio.start_unix_server(answer, sock=listener)
    else:
        server = await asyncio.start_server(answer, sock=listener)
    os.write(ready, b"x")
    await server.serve_forever()


begun, ready = os.pipe()
children = []
for number in range(4):
    pid = os.fork()
    if not pid:
        try:
            iocp_loop.run(serve(number), driver=driver)
        finally:
            os._exit(1)
    children.append(pid)
for _ in children:
    os.read(begun, 1)


async def one(what=b"x"):
    if kind == "unix":
        reader, writer = await asyncio.open_unix_connection(path)
    else:
        reader, writer = await asyncio.open_connection(*listener.getsockname())
    writer.write(what)
    number = await asyncio.wait_for(reader.read(), 20)
    writer.close()
    return number


async def main():
    counts = {}
    for _ in range(clients // 16):
        for number in await asyncio.gather(*(one() for _ in range(16))):
            counts[number] = counts.get(number, 0) + 1
    busy = asyncio.create_task(one(b"b"))
    await asyncio.sleep(0.1)
    others = await asyncio.gather(*(one() for _ in range(12)))
    assert not busy.done(), "the others have waited for the one that computes"
    assert await busy not in others
    return counts


try:
    counts = asyncio.run(main())
finally:
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
assert len(counts) == 4 and min(counts.values()) >= 4, counts
"""


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_forked_workers_share_a_listener(driver: str, kind: str, tmp_path: Path) -> None:
    run_python(SERVER, driver, kind, str(CLIENTS), str(tmp_path / "socket"))


@pytest.mark.parametrize("same", ["the object", "a duplicate"])
def test_loops_in_threads_share_a_listener(driver: str, same: str) -> None:
    counts = [0, 0]
    loops: list[Any] = []
    begun = threading.Barrier(3)

    def run(number: int, listener: socket.socket) -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            counts[number] += 1
            writer.write(await reader.read(10))
            writer.close()

        async def serve() -> None:
            ended = asyncio.Event()
            loops.append((asyncio.get_running_loop(), ended))
            async with await asyncio.start_server(answer, sock=listener):
                await asyncio.to_thread(begun.wait, LIMIT)
                await ended.wait()

        with asyncio.Runner(loop_factory=lambda: new_event_loop(driver)) as runner:
            runner.run(serve())

    with listening_socket() as listener:
        address = listener.getsockname()
        listeners = [listener, listener if same == "the object" else listener.dup()]
        threads = [threading.Thread(target=run, args=(n, sock)) for n, sock in enumerate(listeners)]
        for thread in threads:
            thread.start()
        begun.wait(LIMIT)
        for _ in range(100):
            with socket.create_connection(address, LIMIT) as client:
                client.sendall(b"hello")
                assert client.recv(10) == b"hello"
        for loop, ended in loops:
            loop.call_soon_threadsafe(ended.set)
        for thread in threads:
            thread.join(LIMIT)
    assert sum(counts) == 100
    assert min(counts) >= 4, counts


def test_a_killed_server_leaves_its_port_free(driver: str) -> None:
    code = """
import asyncio, sys, iocp_loop

async def main():
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.sleep(1000)

iocp_loop.run(main(), driver=sys.argv[1])
"""
    for number in range(4):
        with subprocess.Popen(
            python_command(code, driver), stdout=subprocess.PIPE, text=True, env=child_environment()
        ) as process:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            client = socket.create_connection(("127.0.0.1", port), LIMIT)
            process.send_signal(signal.SIGKILL if number % 2 else signal.SIGTERM)
            process.wait(LIMIT)
        socket.create_server(("127.0.0.1", port)).close()
        client.close()
