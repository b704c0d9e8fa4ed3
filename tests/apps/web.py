"""Servers and clients of HTTP and WebSocket."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from . import LIMIT, case, certificates, daemon, free_port, load, until_it_accepts

BIG = os.urandom(1 << 20) * 8


@contextlib.asynccontextmanager
async def aiohttp_site(routes: dict[str, Any], tls: Any = None) -> AsyncIterator[int]:
    web = load("aiohttp.web")
    app = web.Application(client_max_size=64 << 20)
    for path, handler in routes.items():
        app.router.add_route("*", path, handler)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


async def echo_body(request: Any) -> Any:
    return load("aiohttp.web").Response(body=await request.read())


@case("aiohttp", "8 MB up and down over TLS, 200 requests at once, a WebSocket")
async def aiohttp(folder: Path) -> None:
    library = load("aiohttp")
    server_tls, client_tls = certificates(folder)

    async def socket(request: Any) -> Any:
        ws = library.web.WebSocketResponse()
        await ws.prepare(request)
        async for message in ws:
            await ws.send_str(message.data[::-1])
        return ws

    async with (
        aiohttp_site({"/echo": echo_body, "/ws": socket}, server_tls) as port,
        library.ClientSession(f"https://localhost:{port}", connector=library.TCPConnector(ssl=client_tls)) as client,
    ):
        async with client.post("/echo", data=BIG) as answer:
            assert await answer.read() == BIG

        async def small(n: int) -> bytes:
            async with client.post("/echo", data=b"%d" % n) as answer:
                body: bytes = await answer.read()
                return body

        assert await asyncio.gather(*map(small, range(200))) == [b"%d" % n for n in range(200)]
        async with client.ws_connect("/ws") as ws:
            await ws.send_str("hello")
            assert await ws.receive_str() == "olleh"


@case("aiohttp", "behind nginx, which keeps its connections", programs=["nginx"])
async def nginx(folder: Path) -> None:
    library = load("aiohttp")
    port = free_port()
    async with aiohttp_site({"/echo": echo_body}) as upstream:
        (folder / "nginx.conf").write_text(
            f"daemon off; user root; worker_processes 1; pid {folder}/pid; error_log stderr; events {{}}\n"
            f"http {{ access_log off; client_max_body_size 64m; client_body_temp_path {folder}/body; "
            f"proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; "
            f"scgi_temp_path {folder}/s; upstream us {{ server 127.0.0.1:{upstream}; keepalive 8; }}\n"
            f"server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://us; proxy_http_version 1.1; "
            f"proxy_set_header Connection ''; }} }} }}\n"
        )
        async with (
            daemon(["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf")], port, folder),
            library.ClientSession(f"http://127.0.0.1:{port}") as client,
        ):
            for body in (b"small", BIG, b"again"):
                async with client.post("/echo", data=body) as answer:
                    assert await answer.read() == body


async def asgi(scope: Any, receive: Any, send: Any) -> None:
    """An application that sends back what it gets."""
    if scope["type"] == "lifespan":
        while (message := await receive())["type"] != "lifespan.shutdown":
            await send({"type": f"{message['type']}.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-pid", b"%d" % os.getpid())]})
    await send({"type": "http.response.body", "body": body})


async def exercise_http(client: Any, url: str) -> None:
    assert (await client.post(url, content=BIG)).content == BIG
    answers = await asyncio.gather(*[client.post(url, content=b"%d" % n) for n in range(100)])
    assert [answer.content for answer in answers] == [b"%d" % n for n in range(100)]


@case(
    "uvicorn httpx",
    "httptools and h11 over TLS: 8 MB, 100 requests at once by httpx",
    modules=["uvicorn", "httpx", "httptools"],
)
async def uvicorn(folder: Path) -> None:
    library, httpx = load("uvicorn"), load("httpx")
    _, client_tls = certificates(folder)
    for http in ("httptools", "h11"):
        port = free_port()
        files = {"ssl_certfile": str(folder / "cert.pem"), "ssl_keyfile": str(folder / "key.pem")}
        # Longer than any pause between two requests, or it closes a connection that httpx is about to use.
        config = library.Config(asgi, port=port, http=http, log_level="warning", timeout_keep_alive=int(LIMIT), **files)
        server = library.Server(config)
        serving = asyncio.create_task(server.serve())
        await until_it_accepts(port)
        async with httpx.AsyncClient(verify=client_tls, timeout=LIMIT) as client:
            await exercise_http(client, f"https://localhost:{port}/")
        server.should_exit = True
        await serving


async def exercise_workers(port: int, workers: int) -> None:
    """Whoever is free takes the next connection: with all but one at work, the last one answers."""
    held = []
    for _ in range(workers):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /work HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = await asyncio.wait_for(reader.readuntil(b"working"), LIMIT)
        held.append((answer.partition(b"x-pid: ")[2].split()[0], writer))
    assert len({pid for pid, _ in held}) == workers
    for _, writer in held:
        writer.close()


async def asgi_with_work(scope: Any, receive: Any, send: Any) -> None:
    """The same application, whose process may have to compute until the client is gone."""
    if scope.get("path") != "/work":
        return await asgi(scope, receive, send)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-pid", b"%d" % os.getpid())]})
    await send({"type": "http.response.body", "body": b"working", "more_body": True})
    client = int(scope["client"][1])
    compute_until_gone(client)
    await send({"type": "http.response.body", "body": b""})
    return None


def compute_until_gone(port: int) -> None:
    """Return when no connection from `port` is established any more; the loop of this process waits meanwhile."""
    established = re.compile(rf"^ *\d+: \w+:{port:04X} \w+:\w+ 01 ", re.MULTILINE)
    while established.search(Path("/proc/net/tcp").read_text()):
        time.sleep(0.01)


@case(
    "uvicorn",
    "4 workers on one port: while three of them compute, the fourth answers",
    modules=["uvicorn"],
    unix="processes of Windows do not share a listener",
)
async def uvicorn_workers(folder: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "tests.apps.web:asgi_with_work", "--workers", "4", "--port", str(port)]
    loop = ["--loop", "tests.apps:new_event_loop", "--log-level", "warning"]
    async with daemon([*command, *loop], port, folder, cwd=None):
        await exercise_workers(port, 4)


@case(
    "gunicorn uvicorn-worker httpx",
    "4 workers of a class of two lines: while three of them compute, the fourth answers; 8 MB, 100 requests at once",
    modules=["gunicorn", "uvicorn_worker", "httpx"],
    unix="gunicorn is for Unix",
)
async def gunicorn(folder: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "gunicorn", "tests.apps.web:asgi_with_work", "--workers", "4"]
    more = ["--worker-class", "tests.apps.gunicorn_worker.Worker", "--bind", f"127.0.0.1:{port}"]
    async with daemon([*command, *more], port, folder, cwd=None):
        await exercise_workers(port, 4)
        async with load("httpx").AsyncClient(timeout=LIMIT) as client:
            await exercise_http(client, f"http://127.0.0.1:{port}/")


@case("granian httpx", "2 workers, their loops by loops.register: 8 MB, 100 requests at once")
async def granian(folder: Path) -> None:
    (folder / "serve.py").write_text(
        "import sys\nimport tests.apps\nfrom granian import Granian, loops\n"
        "loops.register('asyncio')(tests.apps.new_event_loop)\n"
        "if __name__ == '__main__':\n"
        "    options = dict(interface='asgi', loop='asyncio', workers=2)\n"
        "    Granian('tests.apps.web:asgi', port=int(sys.argv[1]), **options).serve()\n"
    )
    port = free_port()
    command = [sys.executable, str(folder / "serve.py"), str(port)]
    async with (
        daemon(command, port, folder, cwd=None, env={**os.environ, "PYTHONPATH": os.getcwd()}),
        load("httpx").AsyncClient(timeout=LIMIT) as client,
    ):
        await exercise_http(client, f"http://127.0.0.1:{port}/")


@case(
    "hypercorn h2 httpx",
    "HTTP/1.1 and HTTP/2 over TLS by httpx: 8 MB, 100 requests at once",
    modules=["hypercorn", "h2", "httpx"],
)
async def hypercorn(folder: Path) -> None:
    config = load("hypercorn.config").Config()
    httpx = load("httpx")
    _, client_tls = certificates(folder)
    port = free_port()
    config.bind = [f"127.0.0.1:{port}"]
    config.certfile, config.keyfile = str(folder / "cert.pem"), str(folder / "key.pem")
    config.loglevel = "WARNING"
    stop = asyncio.Event()
    serving = asyncio.create_task(load("hypercorn.asyncio").serve(asgi, config, shutdown_trigger=stop.wait))
    await until_it_accepts(port)
    for http2 in (False, True):
        async with httpx.AsyncClient(verify=client_tls, http2=http2, timeout=LIMIT) as client:
            await exercise_http(client, f"https://localhost:{port}/")
    stop.set()
    await serving


@case(
    "fastapi starlette",
    "TestClient on such a loop: requests, a WebSocket, background tasks",
    modules=["fastapi", "httpx"],
)
async def fastapi(folder: Path) -> None:
    library = load("fastapi")
    done: list[int] = []
    app = library.FastAPI()
    kind = type(asyncio.get_running_loop())

    @app.get("/items/{number}")
    async def item(number: int) -> dict[str, Any]:
        asyncio.get_running_loop().call_soon(done.append, number)
        return {"number": number, "loop": type(asyncio.get_running_loop()) is kind}

    async def ws(websocket: Any) -> None:
        await websocket.accept()
        await websocket.send_text((await websocket.receive_text()).upper())
        await websocket.close()

    ws.__annotations__["websocket"] = library.WebSocket  # fastapi wants to see the class, not its name
    app.add_api_websocket_route("/ws", ws)

    def use() -> None:
        options = {"loop_factory": kind}
        with load("starlette.testclient").TestClient(app, backend_options=options) as client:
            assert client.get("/items/5").json() == {"number": 5, "loop": True}
            with client.websocket_connect("/ws") as websocket:
                websocket.send_text("hello")
                assert websocket.receive_text() == "HELLO"

    await asyncio.to_thread(use)
    assert done == [5]


@case("websockets", "server and client: 100 clients, messages of 4 MB, ping, close")
async def websockets(folder: Path) -> None:
    serve, connect = load("websockets.asyncio.server").serve, load("websockets.asyncio.client").connect

    async def handle(ws: Any) -> None:
        async for message in ws:
            await ws.send(message)

    async with serve(handle, "127.0.0.1", 0, max_size=None) as server:
        url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"

        async def talk(n: int) -> None:
            async with connect(url, max_size=None) as ws:
                for text in (f"hello {n}", "bye"):
                    await ws.send(text)
                    assert await ws.recv() == text
                await (await ws.ping())

        await asyncio.gather(*map(talk, range(100)))
        async with connect(url, max_size=None) as ws:
            await ws.send(BIG[: 4 << 20])
            assert await ws.recv() == BIG[: 4 << 20]


@case("tornado", "HTTP server and client, a WebSocket; a subprocess, which it has on Unix alone")
async def tornado(folder: Path) -> None:
    web, websocket = load("tornado.web"), load("tornado.websocket")

    async def post(self: Any) -> None:
        self.write(self.request.body[::-1])

    def on_message(self: Any, message: str) -> None:
        self.write_message(message.upper())

    app = web.Application([
        ("/", type("Post", (web.RequestHandler,), {"post": post})),
        ("/ws", type("Socket", (websocket.WebSocketHandler,), {"on_message": on_message})),
    ])  # fmt: skip
    server = app.listen(0, "127.0.0.1")
    port = next(iter(server._sockets.values())).getsockname()[1]
    client = load("tornado.httpclient").AsyncHTTPClient(force_instance=True)
    answers = await asyncio.gather(*[
        client.fetch(f"http://127.0.0.1:{port}/", method="POST", body=bytes([n]) * 10_000 + b"end") for n in range(20)
    ])  # fmt: skip
    assert [answer.body[:4] for answer in answers] == [b"dne" + bytes([n]) for n in range(20)]
    ws = await websocket.websocket_connect(f"ws://127.0.0.1:{port}/ws")
    await ws.write_message("hello")
    assert await ws.read_message() == "HELLO"
    ws.close()
    if sys.platform != "win32":
        process = load("tornado.process").Subprocess([sys.executable, "-c", "raise SystemExit(3)"])
        assert await process.wait_for_exit(raise_error=False) == 3
    client.close()
    server.stop()
    await server.close_all_connections()


@case(
    "hypercorn aioquic",
    "HTTP/3: hypercorn asked by aioquic, 2 MB there and back, 20 requests at once",
    modules=["hypercorn", "aioquic", "h2"],
)
async def http3(folder: Path) -> None:
    events = load("aioquic.h3.events")
    config = load("hypercorn.config").Config()
    certificates(folder)
    port = free_port()
    config.bind = config.quic_bind = [f"127.0.0.1:{port}"]
    config.certfile, config.keyfile = str(folder / "cert.pem"), str(folder / "key.pem")
    config.loglevel = "WARNING"

    class Client(load("aioquic.asyncio.protocol").QuicConnectionProtocol):  # type: ignore[misc]  # loaded untyped
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.http = load("aioquic.h3.connection").H3Connection(self._quic)
            self.answers: dict[int, tuple[bytearray, asyncio.Future[bytes]]] = {}

        def quic_event_received(self, event: Any) -> None:
            for each in self.http.handle_event(event):
                if isinstance(each, events.DataReceived):
                    body, finished = self.answers[each.stream_id]
                    body += each.data
                    if each.stream_ended:
                        finished.set_result(bytes(body))

        async def post(self, body: bytes) -> bytes:
            stream = self._quic.get_next_available_stream_id()
            self.answers[stream] = bytearray(), asyncio.get_running_loop().create_future()
            names = {"method": "POST", "scheme": "https", "authority": "localhost", "path": "/"}
            self.http.send_headers(stream, [(b":" + name.encode(), names[name].encode()) for name in names])
            self.http.send_data(stream, body, end_stream=True)
            self.transmit()
            return await self.answers[stream][1]

    ours = load("aioquic.quic.configuration").QuicConfiguration(alpn_protocols=["h3"], server_name="localhost")
    ours.load_verify_locations(str(folder / "ca.pem"))
    stop = asyncio.Event()
    serving = asyncio.create_task(load("hypercorn.asyncio").serve(asgi, config, shutdown_trigger=stop.wait))
    await until_it_accepts(port)
    async with load("aioquic.asyncio").connect("127.0.0.1", port, configuration=ours, create_protocol=Client) as client:
        assert await client.post(BIG[: 2 << 20]) == BIG[: 2 << 20]
        bodies = [b"%d" % n * 100 for n in range(20)]
        assert await asyncio.gather(*map(client.post, bodies)) == bodies
    stop.set()
    await serving


@case("aioquic", "QUIC: 1 MB there and back, 20 streams at once")
async def aioquic(folder: Path) -> None:
    library = load("aioquic.asyncio")
    configuration = load("aioquic.quic.configuration").QuicConfiguration
    certificates(folder)
    theirs = configuration(is_client=False, alpn_protocols=["echo"])
    theirs.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    ours = configuration(alpn_protocols=["echo"], server_name="localhost")
    ours.load_verify_locations(str(folder / "ca.pem"))
    tasks: set[asyncio.Task[None]] = set()

    async def echo(reader: Any, writer: Any) -> None:
        writer.write(await reader.read())
        writer.write_eof()

    def handle(reader: Any, writer: Any) -> None:
        tasks.add(asyncio.ensure_future(echo(reader, writer)))

    port = free_port()
    server = await library.serve("127.0.0.1", port, configuration=theirs, stream_handler=handle)
    async with library.connect("127.0.0.1", port, configuration=ours) as client:

        async def talk(data: bytes) -> None:
            reader, writer = await client.create_stream()
            writer.write(data)
            writer.write_eof()
            assert await reader.read() == data

        await talk(BIG[: 1 << 20])
        await asyncio.gather(*[talk(b"%d" % n * 1000) for n in range(20)])
    server.close()
