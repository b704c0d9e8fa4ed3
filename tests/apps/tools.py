"""Frameworks on top of asyncio, and tools that look into it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

from . import LIMIT, case, free_port, load


@case("anyio", "TCP, UDP and UNIX sockets, a process, threads, timeouts")
async def anyio(folder: Path) -> None:
    library = load("anyio")

    async def echo(stream: Any) -> None:
        async with stream:
            async for data in stream:
                await stream.send(data)

    async with library.create_task_group() as group:
        listeners = [
            await library.create_tcp_listener(local_host="127.0.0.1"),
            await library.create_unix_listener(folder / "socket"),
        ]
        for listener in listeners:
            group.start_soon(listener.serve, echo)
        port = listeners[0].extra(library.abc.SocketAttribute.local_port)
        for connecting in (library.connect_tcp("127.0.0.1", port), library.connect_unix(folder / "socket")):
            async with await connecting as stream:
                got, data = b"", bytes(range(256)) * 1000
                group.start_soon(stream.send, data)
                while len(got) < len(data):
                    got += await stream.receive()
                assert got == data
        group.cancel_scope.cancel()
    done = await library.run_process([sys.executable, "-c", "print(input()[::-1])"], input=b"hello\n")
    assert done.stdout.split() == [b"olleh"]

    def in_thread() -> int:
        result: int = library.from_thread.run(sleep_and_double, 21)
        return result

    async def sleep_and_double(n: int) -> int:
        await library.sleep(0.01)
        return 2 * n

    assert await library.to_thread.run_sync(in_thread) == 42
    with library.move_on_after(0.05) as scope:
        await library.sleep(60)
    assert scope.cancelled_caught


@case("twisted", "its asyncioreactor on such a loop: an echo by endpoints, deferToThread")
async def twisted(folder: Path) -> None:
    load("twisted.internet.asyncioreactor").install(asyncio.get_running_loop())
    reactor = load("twisted.internet.reactor")
    protocol = load("twisted.internet.protocol")
    reactor.startRunning(installSignalHandlers=False)

    class Echo(protocol.Protocol):  # type: ignore[misc,name-defined]  # loaded untyped
        def dataReceived(self, data: bytes) -> None:
            self.transport.write(data)

    listening = reactor.listenTCP(0, protocol.Factory.forProtocol(Echo), interface="127.0.0.1")
    reader, writer = await asyncio.open_connection("127.0.0.1", listening.getHost().port)
    writer.write(b"hello" * 10_000)
    assert await reader.readexactly(50_000) == b"hello" * 10_000
    writer.close()
    loop = asyncio.get_running_loop()
    assert await load("twisted.internet.threads").deferToThread(sum, [1, 2]).asFuture(loop) == 3
    await listening.stopListening().asFuture(loop)
    reactor.threadpool.stop()


@case("distributed", "a cluster in this process: 200 tasks, actors' results gathered")
async def distributed(folder: Path) -> None:
    library = load("distributed")
    async with (
        library.LocalCluster(
            n_workers=2, processes=False, dashboard_address=None, asynchronous=True, local_directory=str(folder)
        ) as cluster,
        library.Client(cluster, asynchronous=True) as client,
    ):
        futures = client.map(lambda n: n * n, range(200))
        assert await client.gather(futures) == [n * n for n in range(200)]


@case("mcp", "a server as a child process, by its standard input and output: a tool called 50 times")
async def mcp(folder: Path) -> None:
    (folder / "server.py").write_text(
        "try:\n    from mcp.server.fastmcp import FastMCP as Server\n"
        "except ImportError:\n    from mcp.server import MCPServer as Server\n"
        "server = Server('numbers')\n"
        "@server.tool()\n"
        "def double(n: int) -> int:\n    return 2 * n\n"
        "server.run()\n"
    )
    library, stdio = load("mcp"), load("mcp.client.stdio")
    parameters = library.StdioServerParameters(command=sys.executable, args=[str(folder / "server.py")])
    async with stdio.stdio_client(parameters) as (reading, writing), library.ClientSession(reading, writing) as session:
        await session.initialize()
        for n in range(50):
            answer = await session.call_tool("double", {"n": n})
            assert answer.content[0].text == str(2 * n)


@case("nest_asyncio", "run_until_complete inside a running loop, three deep")
async def nest_asyncio(folder: Path) -> None:
    loop = asyncio.get_running_loop()
    load("nest_asyncio").apply(loop)

    async def nested(depth: int) -> int:
        await asyncio.sleep(0.001)
        return 0 if depth == 0 else 1 + loop.run_until_complete(nested(depth - 1))

    assert loop.run_until_complete(nested(3)) == 3


@case("opentelemetry-sdk", "spans in 100 tasks and in callbacks know their parents", modules=["opentelemetry.sdk"])
async def opentelemetry(folder: Path) -> None:
    memory = load("opentelemetry.sdk.trace.export.in_memory_span_exporter").InMemorySpanExporter()
    trace = load("opentelemetry.sdk.trace")
    provider = trace.TracerProvider()
    provider.add_span_processor(load("opentelemetry.sdk.trace.export").SimpleSpanProcessor(memory))
    tracer = provider.get_tracer("test")

    async def work(n: int) -> None:
        with tracer.start_as_current_span(f"parent {n}"):
            await asyncio.sleep(0.001 * (n % 3))
            called = asyncio.get_running_loop().create_future()

            def callback() -> None:
                with tracer.start_as_current_span(f"child {n}"):
                    called.set_result(None)

            asyncio.get_running_loop().call_later(0.001, callback)
            await called

    await asyncio.gather(*map(work, range(100)))
    spans = {span.name: span for span in memory.get_finished_spans()}
    for n in range(100):
        assert spans[f"child {n}"].parent.span_id == spans[f"parent {n}"].context.span_id


@case("debugpy", "a breakpoint-free session attaches to a running loop", modules=["debugpy"])
async def debugpy(folder: Path) -> None:
    port = free_port()
    code = f"import debugpy, asyncio; debugpy.listen(('127.0.0.1', {port})); print('up', flush=True); input()"
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-X", "frozen_modules=off", "-c", code, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdin is not None
    assert child.stdout is not None
    assert await asyncio.wait_for(child.stdout.readline(), LIMIT) == b"up\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = b'{"seq":1,"type":"request","command":"initialize","arguments":{"adapterID":"test"}}'
    writer.write(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
    text = b""
    while b'"command": "initialize"' not in text and b'"command":"initialize"' not in text:
        text += await asyncio.wait_for(reader.read(1000), LIMIT)
    writer.close()
    child.stdin.close()
    child.kill()
    await child.wait()
