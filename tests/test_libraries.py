"""Libraries that live on add_reader and add_writer run on this loop, without a thread or a second loop to help them.

gh-81554: on Windows they refuse asyncio's ProactorEventLoop, or go around it.  They are no dependency of the tests:
where one is not installed, its tests are skipped (``pip install iocp_loop[libraries]`` installs them all).
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Generator
from typing import Any

import pytest

import iocp_loop

from .support import LIMIT, fill, read_all

Loop = iocp_loop.IocpEventLoop
Pair = tuple[socket.socket, socket.socket]


def library(name: str) -> Any:
    return pytest.importorskip(name, reason=f"{name} is not installed", exc_type=ImportError)


# -- tornado ---------------------------------------------------------------------------------------


async def test_tornado_serves_and_fetches(loop: Loop) -> None:
    web, httpserver, httpclient = map(library, ("tornado.web", "tornado.httpserver", "tornado.httpclient"))

    async def post(self: Any) -> None:
        await asyncio.sleep(0.001)
        self.write(self.request.body[::-1])

    handler = type("Handler", (web.RequestHandler,), {"post": post})
    assert library("tornado.ioloop").IOLoop.current().selector_loop is loop
    sockets = library("tornado.netutil").bind_sockets(0, "127.0.0.1")
    server = httpserver.HTTPServer(web.Application([("/", handler)]))
    server.add_sockets(sockets)
    client = httpclient.AsyncHTTPClient(force_instance=True)
    url = f"http://127.0.0.1:{sockets[0].getsockname()[1]}/"
    bodies = [bytes([n]) * 50_000 + b"end" for n in range(10)]
    answers = await asyncio.gather(*[client.fetch(url, method="POST", body=body) for body in bodies])
    assert [answer.body for answer in answers] == [body[::-1] for body in bodies]
    client.close()
    server.stop()
    await server.close_all_connections()
    assert not [thread for thread in threading.enumerate() if "selector" in thread.name.lower()]


# -- pyzmq -----------------------------------------------------------------------------------------


async def test_pyzmq_requests_and_replies(loop: Loop) -> None:
    zmq = library("zmq")
    with (
        library("zmq.asyncio").Context() as context,
        context.socket(zmq.REP) as server,
        context.socket(zmq.REQ) as client,
    ):
        for each in (server, client):
            each.linger = 0
        port = server.bind_to_random_port("tcp://127.0.0.1")
        client.connect(f"tcp://127.0.0.1:{port}")

        async def reply() -> None:
            while (message := await server.recv()) != b"end":
                await server.send(message.upper())

        task = loop.create_task(reply())
        for n in range(50):
            await client.send(b"hello %d" % n)
            assert await client.recv() == b"HELLO %d" % n
        await client.send(b"end")
        await task


# -- psycopg ---------------------------------------------------------------------------------------


async def test_psycopg_waits(loop: Loop, pair: Pair) -> None:
    """Its coroutine that waits for the server: here the server is a socket of ours."""
    waiting = library("psycopg.waiting")
    ours, peer = pair

    def conversation() -> Generator[Any, Any, list[Any]]:
        seen = [(yield waiting.Wait.W)]
        loop.call_later(0.02, peer.sendall, b"hello")
        seen.append((yield waiting.Wait.R))
        seen.append(ours.recv(100))
        fill(ours)
        loop.call_later(0.02, peer.sendall, b"more")
        seen.append((yield waiting.Wait.RW))
        seen.append(ours.recv(100))
        emptying.start()
        seen.append((yield waiting.Wait.W))
        return seen

    emptying = threading.Thread(target=read_all, args=[peer])
    seen = await waiting.wait_async(conversation(), ours.fileno(), interval=LIMIT)
    write, read = waiting.Ready.W, waiting.Ready.R
    assert seen == [write, read, b"hello", read, b"more", write]
    ours.close()
    await asyncio.to_thread(emptying.join)


async def test_psycopg_connects_on_this_loop(loop: Loop) -> None:
    """To a server that hangs up: what counts is that it does not refuse the loop, as it does ProactorEventLoop."""
    psycopg = library("psycopg")

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(psycopg.OperationalError, match="closed the connection"):
        await psycopg.AsyncConnection.connect(f"host=127.0.0.1 port={port} user=nobody dbname=none sslmode=disable")
    server.close()
    await server.wait_closed()
