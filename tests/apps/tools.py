"""Frameworks on top of asyncio, and tools that look into it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from . import LIMIT, case, certificates, free_port, load, program


@case("anyio", "TCP and, on Unix, UNIX sockets, a process, threads, timeouts")
async def anyio(folder: Path) -> None:
    library = load("anyio")

    async def echo(stream: Any) -> None:
        async with stream:
            async for data in stream:
                await stream.send(data)

    async with library.create_task_group() as group:
        listener = await library.create_tcp_listener(local_host="127.0.0.1")
        group.start_soon(listener.serve, echo)
        ways = [library.connect_tcp("127.0.0.1", listener.extra(library.abc.SocketAttribute.local_port))]
        if sys.platform != "win32":
            group.start_soon((await library.create_unix_listener(folder / "socket")).serve, echo)
            ways.append(library.connect_unix(folder / "socket"))
        for connecting in ways:
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


#: A program that runs a loop of the case's kind until its standard input ends.
TICKING = """\
import asyncio, sys, tests.apps

def tick():
    loop = asyncio.get_running_loop()  # the breakpoint is here
    loop.call_later(0.01, tick)

async def until_the_end_of_input():
    tick()
    print("up", flush=True)
    await asyncio.to_thread(sys.stdin.read)

def our_own_function():
    with asyncio.Runner(loop_factory=tests.apps.new_event_loop) as runner:
        runner.run(until_the_end_of_input())
"""


@contextlib.asynccontextmanager
async def ticking(folder: Path, code: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """The program above with `code` behind it, once its loop runs; it has to end by itself, without fault."""
    (folder / "ticking.py").write_text(TICKING + code)
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-X", "frozen_modules=off", str(folder / "ticking.py"),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    assert child.stdin is not None
    assert child.stdout is not None
    assert await asyncio.wait_for(child.stdout.readline(), LIMIT) == b"up\n"
    yield child
    child.stdin.close()
    assert await asyncio.wait_for(child.wait(), LIMIT) == 0


@case("debugpy", "attaches to a program on such a loop, which stops at a breakpoint in a callback and goes on")
async def debugpy(folder: Path) -> None:
    port = free_port()
    async with ticking(folder, f"import debugpy\ndebugpy.listen(('127.0.0.1', {port}))\nour_own_function()\n"):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)

        def request(number: int, command: str, **arguments: Any) -> None:
            body = json.dumps({"seq": number, "type": "request", "command": command, "arguments": arguments}).encode()
            writer.write(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))

        async def until(**wanted: Any) -> dict[str, Any]:
            while True:
                length = int((await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), LIMIT)).split()[-1])
                message: dict[str, Any] = json.loads(await reader.readexactly(length))
                if all(message.get(name) == value for name, value in wanted.items()):
                    return message

        line = TICKING.splitlines().index("    loop = asyncio.get_running_loop()  # the breakpoint is here") + 1
        request(1, "initialize", adapterID="test")
        await until(command="initialize", success=True)
        request(2, "attach", justMyCode=False)
        await until(event="initialized")
        request(3, "setBreakpoints", source={"path": str(folder / "ticking.py")}, breakpoints=[{"line": line}])
        request(4, "configurationDone")
        stopped = await until(event="stopped")
        assert stopped["body"]["reason"] == "breakpoint"
        request(5, "setBreakpoints", source={"path": str(folder / "ticking.py")}, breakpoints=[])
        request(6, "continue", threadId=stopped["body"]["threadId"])
        await until(command="continue", success=True)
        request(7, "disconnect", terminateDebuggee=False)
        await until(command="disconnect", success=True)
        writer.close()


@case("py-spy", "the stack of a program on such a loop, native frames included", modules=[], programs=["py-spy"])
async def py_spy(folder: Path) -> None:
    async with ticking(folder, "our_own_function()\n") as child:
        spy = await asyncio.create_subprocess_exec(
            str(program("py-spy")), "dump", "--native", "--pid", str(child.pid), stdout=subprocess.PIPE
        )
        out, _ = await spy.communicate()
        assert spy.returncode == 0
        assert b"our_own_function" in out


@case(
    "ipykernel jupyter_client",
    "a kernel on such a loop: await in cells, and one that waits is interrupted",
    modules=["ipykernel", "jupyter_client"],
    unix="Ctrl-C by SIGINT",
)
async def ipykernel(folder: Path) -> None:
    kernel = folder / "kernels" / "test"
    kernel.mkdir(parents=True)
    start = "import asyncio, sys, tests.apps\n"
    start += "class Policy(asyncio.DefaultEventLoopPolicy): new_event_loop = lambda self: tests.apps.new_event_loop()\n"
    start += "asyncio.set_event_loop_policy(Policy())\n"
    start += "from ipykernel.kernelapp import launch_new_instance; launch_new_instance()\n"
    argv = [sys.executable, "-W", "ignore", "-c", start, "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "test", "language": "python"}))
    os.environ["JUPYTER_PATH"] = str(folder)
    manager, client = await load("jupyter_client.manager").start_new_async_kernel(
        kernel_name="test", env={**os.environ, "PYTHONPATH": os.getcwd()}
    )
    try:
        kind = type(asyncio.get_running_loop()).__name__
        await cell(client, f"import asyncio; assert type(asyncio.get_running_loop()).__name__ == {kind!r}", "ok")
        await cell(client, "await asyncio.sleep(0.01)", "ok")
        waiting = asyncio.create_task(cell(client, "await asyncio.sleep(60)", "error"))
        while (await client.get_iopub_msg(timeout=LIMIT))["content"].get("execution_state") != "busy":
            pass
        await asyncio.sleep(0.2)  # it is busy a moment before it waits
        await manager.interrupt_kernel()
        await waiting
    finally:
        client.stop_channels()
        await manager.shutdown_kernel(now=True)


async def cell(client: Any, code: str, status: str) -> None:
    number = client.execute(code)
    while (answer := await client.get_shell_msg(timeout=LIMIT / 3))["parent_header"].get("msg_id") != number:
        pass
    assert answer["content"]["status"] == status, answer["content"]


@case("aiofastnet", "its transports on such a loop: 8 MB over TLS by asyncio's streams, a datagram, sock_recv")
async def aiofastnet(folder: Path) -> None:
    loop = load("aiofastnet").patch_loop(asyncio.get_running_loop())
    server_tls, client_tls = certificates(folder)
    big = os.urandom(1 << 20) * 8

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.close()

    async with await asyncio.start_server(echo, "127.0.0.1", 0, ssl=server_tls) as server:
        port = server.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("localhost", port, ssl=client_tls, family=socket.AF_INET)
        assert type(writer.transport).__module__.startswith("aiofastnet"), type(writer.transport)
        writer.write(big)
        assert await asyncio.wait_for(reader.readexactly(len(big)), LIMIT) == big
        writer.close()
        await writer.wait_closed()

    got = loop.create_future()

    class Taker(asyncio.DatagramProtocol):
        def datagram_received(self, data: bytes, address: Any) -> None:
            got.set_result(data)

    far, _ = await loop.create_datagram_endpoint(Taker, local_addr=("127.0.0.1", 0))
    near, _ = await loop.create_datagram_endpoint(asyncio.DatagramProtocol, remote_addr=far.get_extra_info("sockname"))
    near.sendto(b"hello")
    assert await asyncio.wait_for(got, LIMIT) == b"hello"
    near.close()
    far.close()

    ours, peer = socket.socketpair()
    with ours, peer:
        ours.setblocking(False)
        waiting = asyncio.create_task(loop.sock_recv(ours, 100))
        await asyncio.sleep(0)
        peer.sendall(b"hello")
        assert await asyncio.wait_for(waiting, LIMIT) == b"hello"


@case("pyside6-essentials", "asyncio inside Qt's main loop, by poll and dispatch: 1,000 messages", modules=["PySide6"])
async def pyside6(folder: Path) -> None:
    (folder / "main.py").write_text(QT)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    child = await asyncio.create_subprocess_exec(
        sys.executable, str(folder / "main.py"), env=environment, stderr=subprocess.PIPE
    )
    _, errors = await child.communicate()
    assert child.returncode == 0, errors.decode().strip()


#: Qt keeps its thread; a second one waits, and lets Qt run what there is to run.
QT = """
import asyncio, sys, threading, tests.apps
from PySide6.QtCore import QCoreApplication, QObject, Qt, QTimer, Signal, Slot

application = QCoreApplication([])
loop = tests.apps.new_event_loop()
if not hasattr(loop, "dispatch"):
    sys.exit("this loop cannot be dispatched by another main loop")
finished = threading.Event()
ticks = []
timer = QTimer()
timer.timeout.connect(lambda: ticks.append(1))
timer.start(1)

class Bridge(QObject):
    ready = Signal()

    @Slot()
    def dispatch(self):
        loop.dispatch()

bridge = Bridge()
bridge.ready.connect(bridge.dispatch, Qt.ConnectionType.BlockingQueuedConnection)

def wait():
    while not finished.is_set():
        if loop.poll():
            bridge.ready.emit()  # returns when Qt has run dispatch

async def echo(reader, writer):
    while line := await reader.readline():
        writer.write(line)
    writer.close()

async def main():
    try:
        async with await asyncio.start_server(echo, "127.0.0.1", 0) as server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            for n in range(1000):
                writer.write(b"%d\\n" % n)
                assert await reader.readline() == b"%d\\n" % n
            writer.close()
    finally:
        finished.set()
        application.quit()

task = loop.create_task(main())
waiter = threading.Thread(target=wait)
waiter.start()
application.exec()
waiter.join()
task.result()
assert ticks, "Qt's own timer has not run"
loop.close()
"""


@case("chromium", "driven by pipes: a page of a server on this loop fetches 8 MB", modules=[], programs=["chromium"])
async def chromium(folder: Path) -> None:
    loop = asyncio.get_running_loop()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        body = b"x" * (8 << 20) if b"/big" in head else b"<title>hello</title>"
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nConnection: close\r\n")
        writer.write(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        with contextlib.suppress(ConnectionError):
            await writer.drain()
            writer.close()

    (their_read, our_write), (our_read, their_write) = os.pipe(), os.pipe()
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
    command = f"exec {program('chromium')} {flags} --remote-debugging-pipe --user-data-dir={folder}/profile"
    browser = await asyncio.create_subprocess_shell(
        f"{command} 3<&{their_read} 4>&{their_write}",
        pass_fds=[their_read, their_write], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(their_read)
    os.close(their_write)
    reader = asyncio.StreamReader(limit=1 << 24)
    incoming, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(our_read, "rb"))
    outgoing, _ = await loop.connect_write_pipe(asyncio.Protocol, os.fdopen(our_write, "wb"))
    numbers = itertools.count(1)

    async def call(method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        number = next(numbers)
        text = {"id": number, "method": method, "params": parameters, **({"sessionId": session} if session else {})}
        outgoing.write(json.dumps(text).encode() + b"\0")
        while True:
            message = json.loads((await asyncio.wait_for(reader.readuntil(b"\0"), LIMIT))[:-1])
            if message.get("id") == number:
                result: dict[str, Any] = message["result"]
                return result

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        target = await call("Target.createTarget", url=url)
        session = (await call("Target.attachToTarget", targetId=target["targetId"], flatten=True))["sessionId"]
        fetch = f"fetch('{url}/big').then(answer => answer.text()).then(text => text.length)"
        while not (await call("Runtime.evaluate", session, expression="document.title"))["result"].get("value"):
            await asyncio.sleep(0.05)
        answer = await call("Runtime.evaluate", session, expression=fetch, awaitPromise=True)
        assert answer["result"].get("value") == 8 << 20, answer
        await call("Browser.close")
    assert await asyncio.wait_for(browser.wait(), LIMIT) == 0
    if not outgoing.is_closing():
        outgoing.close()
    incoming.close()
