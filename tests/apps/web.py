"""Servers and clients of HTTP and WebSocket."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections import Counter
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
        server = library.Server(library.Config(asgi, port=port, http=http, log_level="warning", **files))
        serving = asyncio.create_task(server.serve())
        await until_it_accepts(port)
        async with httpx.AsyncClient(verify=client_tls, timeout=LIMIT) as client:
            await exercise_http(client, f"https://localhost:{port}/")
        server.should_exit = True
        await serving


@case("uvicorn httpx", "4 workers on one port: each gets its share of 400 connections", modules=["uvicorn", "httpx"])
async def uvicorn_workers(folder: Path) -> None:
    port = free_port()
    loop = type(asyncio.get_running_loop()).__module__.partition(".")[0]
    loop = {"iocp_loop": "iocp_loop:new_event_loop"}.get(loop, loop)
    command = [sys.executable, "-m", "uvicorn", "tests.apps.web:asgi", "--workers", "4", "--port", str(port)]
    async with daemon([*command, "--loop", loop, "--log-level", "warning"], port, folder, cwd=None):
        served: Counter[bytes] = Counter()

        async def ask() -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            served[(await reader.read()).partition(b"x-pid: ")[2].split()[0]] += 1
            writer.close()

        for _ in range(20):
            await asyncio.gather(*[ask() for _ in range(20)])
        assert len(served) == 4, f"only {len(served)} of 4 workers served: {served}"
        assert min(served.values()) >= 20, f"unfair shares: {served}"


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


@case("tornado", "HTTP server and client, a WebSocket, a subprocess")
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
    process = load("tornado.process").Subprocess([sys.executable, "-c", "raise SystemExit(3)"])
    assert await process.wait_for_exit(raise_error=False) == 3
    client.close()
    server.stop()
    await server.close_all_connections()


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
