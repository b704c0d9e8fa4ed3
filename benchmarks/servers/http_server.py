"""An HTTP library on any loop, which answers each request with the same body.

``python -m benchmarks.servers.http_server --loop NAME aiohttp|uvicorn [--body BYTES] [--host IPV4] [--port PORT]``
prints ``listening PORT`` when it accepts, and serves until a signal ends it.  The libraries are set up as their manuals
tell for production: without logs of each request.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from ..limits import raise_descriptor_limit
from ..peers import PEERS, new_event_loop

_BACKLOG = 1024


async def _aiohttp(sock: socket.socket, body: bytes, ready: Callable[[], None]) -> None:
    web: Any = importlib.import_module("aiohttp.web")

    async def hello(request: object) -> object:
        return web.Response(body=body, content_type="text/plain")

    application = web.Application()
    application.router.add_get("/", hello)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.SockSite(runner, sock, backlog=_BACKLOG).start()
    ready()
    await asyncio.Event().wait()


async def _uvicorn(sock: socket.socket, body: bytes, ready: Callable[[], None]) -> None:
    uvicorn: Any = importlib.import_module("uvicorn")

    async def hello(scope: object, receive: object, send: Callable[[dict[str, object]], Awaitable[None]]) -> None:
        headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    config = uvicorn.Config(hello, backlog=_BACKLOG, lifespan="off", log_config=None, access_log=False, ws="none")
    # The socket listens before uvicorn takes it over: who connects now is accepted later.
    sock.listen(_BACKLOG)
    ready()
    await uvicorn.Server(config).serve(sockets=[sock])


_APPLICATIONS = {"aiohttp": _aiohttp, "uvicorn": _uvicorn}


def _main() -> None:
    parser = argparse.ArgumentParser(prog="http_server", description=__doc__)
    parser.add_argument("application", choices=_APPLICATIONS)
    parser.add_argument("--loop", choices=[name for name, peer in PEERS.items() if peer.module], required=True)
    parser.add_argument("--body", type=int, default=14, metavar="BYTES")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    options = parser.parse_args()

    raise_descriptor_limit()
    loop = new_event_loop(PEERS[options.loop])
    asyncio.set_event_loop(loop)
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((options.host, options.port))
    sock.setblocking(False)

    def ready() -> None:
        print("listening", sock.getsockname()[1], flush=True)

    loop.run_until_complete(_APPLICATIONS[options.application](sock, b"x" * options.body, ready))


if __name__ == "__main__":
    _main()
