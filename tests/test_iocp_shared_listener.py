"""Driver iocp: processes that share a listener share its connections.

The system hands connections to outstanding accepts in the order in which those were made, whoever made them.  Each that
a process has outstanding is a connection that it gets though it may be busy.
"""

from __future__ import annotations

import base64
import socket
import subprocess
import sys
from collections import Counter

import pytest

if sys.platform != "win32":
    pytest.skip("I/O completion ports exist on Windows only", allow_module_level=True)

from .support import LIMIT, listening_socket, python_command

WORKER = """
import asyncio, base64, os, socket, sys, time
import iocp_loop

async def answer(reader, writer):
    writer.write(b"%d" % os.getpid())
    if await reader.read(10) == b"block":
        print("blocked", flush=True)
        sys.stdin.readline()
    writer.close()

async def main(listener):
    await asyncio.start_server(answer, sock=listener)
    print("up", flush=True)
    await asyncio.sleep(60)

listener = socket.fromshare(base64.b64decode(sys.stdin.readline()))
with asyncio.Runner(loop_factory=iocp_loop.new_event_loop) as runner:
    runner.run(main(listener))
"""


def connect(listener: socket.socket, seconds: float = LIMIT) -> tuple[socket.socket, bytes]:
    """A connection, and the number of the process that has taken it; empty if none has in time."""
    client = socket.create_connection(listener.getsockname(), LIMIT)
    client.settimeout(seconds)
    try:
        return client, client.recv(10)
    except TimeoutError:
        return client, b""


def test_workers_that_share_a_listener_share_its_connections() -> None:
    workers = []
    with listening_socket() as listener:
        for _ in range(3):
            worker = subprocess.Popen(
                python_command(WORKER), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
            )
            workers.append(worker)
            assert worker.stdin is not None
            assert worker.stdout is not None
            worker.stdin.write(base64.b64encode(listener.share(worker.pid)).decode() + "\n")
            assert worker.stdout.readline() == "up\n"
        try:
            taken: Counter[bytes] = Counter()
            for _ in range(30):
                client, who = connect(listener)
                client.close()
                taken[who] += 1
            assert len(taken) == 3
            assert min(taken.values()) >= 5, taken

            blocking, who = connect(listener)
            blocking.sendall(b"block")
            (blocked,) = (worker for worker in workers if worker.pid == int(who))
            assert blocked.stdout is not None
            assert blocked.stdout.readline() == "blocked\n"
            clients = [connect(listener, 0.5) for _ in range(10)]
            assert sum(not answer for _, answer in clients) <= 1
            for client, _ in [*clients, (blocking, b"")]:
                client.close()
        finally:
            for worker in workers:
                worker.kill()
                worker.communicate()
