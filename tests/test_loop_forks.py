"""A process that forks beside a loop, or in one: neither disturbs the other."""

from __future__ import annotations

import os
import socket
import sys
from typing import Any

import pytest

import iocp_loop

from .support import (
    run_python,
)

Loop = iocp_loop.IocpEventLoop
Pair = tuple[socket.socket, socket.socket]
Reports = list[dict[str, Any]]


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
forks_in_a_task = pytest.mark.skipif(
    sys.version_info[:3] == (3, 14, 0), reason="asyncio takes the parent's task for one that runs in the child"
)

#: A child's first lines: an echo conversation on a loop of the given driver.
TALK = """
import asyncio, os, socket, sys, warnings, iocp_loop

warnings.simplefilter("ignore", DeprecationWarning)  # of os.fork beside threads

class Echo(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport = transport
    def data_received(self, data):
        self.transport.write(data)

async def serve():
    return await asyncio.get_running_loop().create_server(Echo, "127.0.0.1", 0)

async def talk(address):
    reader, writer = await asyncio.open_connection(*address)
    writer.write(b"hello")
    assert await reader.readexactly(5) == b"hello"
    writer.close()
    await writer.wait_closed()

def reap(child):
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, status
"""


@forks
def test_a_forked_child_does_not_disturb_the_parent(driver: str) -> None:
    run_python(
        TALK
        + """
loop = iocp_loop.new_event_loop(sys.argv[1])
server = loop.run_until_complete(serve())
address = server.sockets[0].getsockname()
client = socket.create_connection(address)
async def echoed():
    client.sendall(b"x")
    assert await loop.run_in_executor(None, client.recv, 1) == b"x"
loop.run_until_complete(echoed())
for way in ("exit", "close", "collect", "run"):
    child = os.fork()
    if child == 0:
        if way == "close":
            loop.close()
        elif way == "collect":
            import gc
            del loop, server
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()
        elif way == "run":
            async def main():
                await talk((await serve()).sockets[0].getsockname())
            asyncio.Runner(loop_factory=lambda: iocp_loop.new_event_loop(sys.argv[1])).run(main())
        os._exit(0)
    reap(child)
    loop.run_until_complete(echoed())  # the connection that was there
    loop.run_until_complete(talk(address))  # and the listener
client.close()
server.close()
loop.run_until_complete(asyncio.sleep(0.01))
loop.run_until_complete(loop.shutdown_default_executor())
loop.close()
""",
        driver,
    )


@forks
@forks_in_a_task
def test_a_fork_while_the_loop_runs(driver: str) -> None:
    run_python(
        TALK
        + """
async def main():
    server = await serve()
    address = server.sockets[0].getsockname()
    pending = asyncio.ensure_future(asyncio.get_running_loop().create_future())
    for _ in range(3):
        child = os.fork()
        if child == 0:
            async def in_child():
                await talk((await serve()).sockets[0].getsockname())
            asyncio.Runner(loop_factory=lambda: iocp_loop.new_event_loop(sys.argv[1])).run(in_child())
            os._exit(0)
        reap(child)
        await talk(address)
    pending.cancel()
    server.close()
    await asyncio.sleep(0.01)
iocp_loop.run(main(), driver=sys.argv[1])
""",
        driver,
    )


@forks
@forks_in_a_task
def test_multiprocessing_by_fork_works_beside_a_loop(driver: str) -> None:
    run_python(
        TALK
        + """
import multiprocessing

def work(queue):
    async def main():
        await talk((await serve()).sockets[0].getsockname())
    iocp_loop.run(main(), driver=sys.argv[1])
    queue.put("done")

async def main():
    server = await serve()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=work, args=(queue,))
    process.start()
    assert await asyncio.to_thread(queue.get) == "done"
    await asyncio.to_thread(process.join)
    await talk(server.sockets[0].getsockname())
    server.close()
    await asyncio.sleep(0.01)
iocp_loop.run(main(), driver=sys.argv[1])
""",
        driver,
    )
