"""Libraries that live on add_reader and add_writer run on this loop, without a thread or a second loop to help them.

gh-81554: on Windows they refuse asyncio's ProactorEventLoop, or go around it.  And tools that put functions of theirs
into asyncio, each in a process of its own.  They are no dependency of the tests: where one is not installed, its tests
are skipped (``pip install iocp_loop[libraries]`` installs them all).
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Generator
from typing import Any

import pytest

import iocp_loop

from .support import LIMIT, WINDOWS, fill, read_all, run_python

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


# -- tools -----------------------------------------------------------------------------------------


def test_nest_asyncio_nests(driver: str) -> None:
    library("nest_asyncio")
    run_python(
        """
        import asyncio, nest_asyncio, socket, sys, iocp_loop

        loop = iocp_loop.new_event_loop(sys.argv[1])
        asyncio.set_event_loop(loop)
        nest_asyncio.apply(loop)
        reports = []
        loop.set_exception_handler(lambda loop, context: reports.append(context))
        inside = []

        async def echo(reader, writer):
            writer.write(await reader.readline())
            writer.close()

        async def later(value):
            await asyncio.sleep(0.005)
            return value

        def readable():
            ours.recv(10)
            inside.append(loop.run_until_complete(later("in a reader")))

        async def main():
            task = asyncio.ensure_future(later("beside"))
            assert loop.run_until_complete(later("in a task")) == "in a task"
            assert asyncio.get_event_loop().run_until_complete(later("again")) == "again"
            assert await task == "beside"
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer.write(b"hello\\n")
            assert loop.run_until_complete(reader.readline()) == b"hello\\n"
            writer.close()
            loop.add_reader(ours, readable)
            peer.send(b"x")
            loop.call_later(0.001, lambda: inside.append(loop.run_until_complete(later("in a timer"))))
            while len(inside) < 2:
                await asyncio.sleep(0.001)
            loop.remove_reader(ours)

        ours, peer = socket.socketpair()
        ours.setblocking(False)
        server = loop.run_until_complete(asyncio.start_server(echo, "127.0.0.1", 0))
        loop.run_until_complete(asyncio.wait_for(main(), 10))
        loop.run_until_complete(asyncio.sleep(0.01))
        assert sorted(inside) == ["in a reader", "in a timer"], inside
        assert not reports, reports
        server.close()
        loop.run_until_complete(asyncio.sleep(0.01))
        """,
        driver,
    )


@pytest.mark.parametrize("debug", ["", "debug"])
def test_aiodebug_sees_slow_callbacks(driver: str, debug: str) -> None:
    library("aiodebug")
    run_python(
        """
        import asyncio, sys, time, iocp_loop
        from aiodebug import log_slow_callbacks

        slow = []

        def new_loop():
            return iocp_loop.new_event_loop(sys.argv[1])

        async def main():
            loop = asyncio.get_running_loop()
            log_slow_callbacks.enable(0.05, lambda name, duration: slow.append(name))
            await asyncio.sleep(0)
            loop.call_soon(time.sleep, 0.1)  # more than it takes: aiodebug asks a clock that may tick each 16 ms
            loop.call_later(0.01, time.sleep, 0.1)
            await asyncio.sleep(0.15)

        with asyncio.Runner(loop_factory=new_loop, debug=bool(sys.argv[2])) as runner:
            runner.run(main())
        # On a busy machine others may be slow as well.
        assert len([name for name in slow if "sleep(0.1)" in name]) == 2, slow
        """,
        driver,
        debug,
    )


@pytest.mark.skipif(WINDOWS, reason="UNIX sockets and os.sendfile")
def test_blockbuster_finds_no_blocking_call_of_the_loop(driver: str) -> None:
    library("blockbuster")
    run_python(
        """
        import asyncio, os, socket, sys, tempfile
        from blockbuster import blockbuster_ctx  # before the loop, which must not take what it puts into os

        size = 30_000_000

        async def echo(reader, writer):
            writer.write(await reader.readline())
            writer.close()

        async def main(folder, file):
            loop = asyncio.get_running_loop()
            server = await asyncio.start_unix_server(echo, folder + "/stale")
            reader, writer = await asyncio.open_unix_connection(folder + "/stale")
            writer.write(b"hello\\n")
            assert await reader.readline() == b"hello\\n"
            writer.close()
            server.close()

            got = asyncio.Queue()
            async def swallow(reader, writer):
                got.put_nowait(len(await reader.read()))
                writer.close()

            server = await asyncio.start_server(swallow, "127.0.0.1", 0)
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            await loop.sendfile(writer.transport, file, fallback=False)
            writer.close()
            assert await got.get() == size
            server.close()

            process = await asyncio.create_subprocess_exec("cat", stdin=-1, stdout=-1)
            out, _ = await process.communicate(b"x" * 300_000)
            assert len(out) == 300_000 and process.returncode == 0
            await loop.getaddrinfo("127.0.0.1", 80)

        with tempfile.TemporaryDirectory() as folder:
            with socket.socket(socket.AF_UNIX) as stale:
                stale.bind(folder + "/stale")
            with open(folder + "/file", "w+b") as file:
                file.truncate(size)
                with blockbuster_ctx():
                    import iocp_loop
                    with asyncio.Runner(loop_factory=lambda: iocp_loop.new_event_loop(sys.argv[1])) as runner:
                        runner.run(main(folder, file))
        """,
        driver,
    )
