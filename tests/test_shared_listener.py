"""Processes or threads that accept on one listener: whoever is free takes the next connection."""

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

SERVER = """
import asyncio, os, signal, socket, sys, warnings
warnings.simplefilter("ignore")
import iocp_loop

driver, kind, path = sys.argv[1:]
if kind == "unix":
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(500)
else:
    listener = socket.create_server(("127.0.0.1", 0), backlog=500)


async def serve(number):
    async def answer(reader, writer):
        held = await reader.read(1) == b"b"
        writer.write(b"%d" % number)
        await writer.drain()
        if held:
            os.read(gate, 1)  # a worker that computes
        writer.close()

    if kind == "unix":
        server = await asyncio.start_unix_server(answer, sock=listener)
    else:
        server = await asyncio.start_server(answer, sock=listener)
    os.write(ready, b"x")
    await server.serve_forever()


begun, ready = os.pipe()
gate, opening = os.pipe()
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


async def ask(what):
    if kind == "unix":
        reader, writer = await asyncio.open_unix_connection(path)
    else:
        reader, writer = await asyncio.open_connection(*listener.getsockname())
    writer.write(what)
    number = await asyncio.wait_for(reader.read(1), 20)
    return number, reader, writer


async def main():
    # Whoever is free takes the next connection, so that all four are busy in the end.
    held = []
    for _ in range(4):
        held.append(await ask(b"b"))
        assert len({number for number, _, _ in held}) == len(held), held
        if len(held) < 4:  # and those who are free serve all others
            for number, _, writer in await asyncio.gather(*(ask(b"x") for _ in range(12))):
                assert number not in {busy for busy, _, _ in held}
                writer.close()
    os.write(opening, b"xxxx")
    for _, reader, writer in held:
        assert await asyncio.wait_for(reader.read(), 20) == b""
        writer.close()


try:
    asyncio.run(main())
finally:
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
"""


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_forked_workers_share_a_listener(driver: str, kind: str, tmp_path: Path) -> None:
    run_python(SERVER, driver, kind, str(tmp_path / "socket"))


@pytest.mark.parametrize("same", ["the object", "a duplicate"])
def test_loops_in_threads_share_a_listener(driver: str, same: str) -> None:
    loops: list[Any] = []
    begun = threading.Barrier(3)
    gate = threading.Event()

    def run(number: int, listener: socket.socket) -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            held = await reader.read(1) == b"b"
            writer.write(b"%d" % number)
            await writer.drain()
            if held:
                gate.wait(LIMIT)  # a loop that computes
            writer.close()

        async def serve() -> None:
            ended = asyncio.Event()
            loops.append((asyncio.get_running_loop(), ended))
            async with await asyncio.start_server(answer, sock=listener):
                await asyncio.to_thread(begun.wait, LIMIT)
                await ended.wait()

        with asyncio.Runner(loop_factory=lambda: new_event_loop(driver)) as runner:
            runner.run(serve())

    def ask(what: bytes) -> tuple[bytes, socket.socket]:
        client = socket.create_connection(address, LIMIT)
        client.sendall(what)
        return client.recv(1), client

    with listening_socket() as listener:
        address = listener.getsockname()
        listeners = [listener, listener if same == "the object" else listener.dup()]
        threads = [threading.Thread(target=run, args=(n, sock)) for n, sock in enumerate(listeners)]
        for thread in threads:
            thread.start()
        begun.wait(LIMIT)
        busy, held = ask(b"b")
        for _ in range(20):
            number, client = ask(b"x")
            client.close()
            assert number != busy  # that one is free
        number, also_held = ask(b"b")
        assert number != busy
        gate.set()
        held.close()
        also_held.close()
        for loop, ended in loops:
            loop.call_soon_threadsafe(ended.set)
        for thread in threads:
            thread.join(LIMIT)


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
