"""HTTP: what a request costs aiohttp and uvicorn on each loop, over kept connections: small bodies and large."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
from dataclasses import dataclass

from .benchmark import Benchmark, Column
from .echo import client, size_text
from .peers import Peer
from .processes import CLIENT_CORE, run_pinned, serving

__all__ = ["APPLICATIONS", "BODIES", "HTTP", "Site", "missing", "run", "versions"]

#: The libraries that servers/http_server.py knows.
APPLICATIONS = ("aiohttp", "uvicorn")
#: Bytes of a body: a hello-world, a page, a picture.
BODIES = (14, 10 * 1024, 1024 * 1024)

_COST = Column("CPU us/request", "cpu_us", digits=1)

HTTP = Benchmark(
    "http",
    "HTTP",
    "CPU time of the server process per request, in microseconds: a body of so many bytes, over connections that are"
    " kept, each with one request under way. Most of it is spent in the library; the loop is what differs.",
    (
        _COST,
        Column("min-max", "cpu_us", show="spread", digits=1),
        Column("{baseline} / it", "cpu_us", show="ratio"),
        Column("requests/s", "messages_per_second", digits=0),
        Column("p50 us", "p50_us", digits=0),
        Column("p99 us", "p99_us", digits=0),
    ),
    _COST,
)


@dataclass(frozen=True)
class Site:
    """One case: a library, the bytes of the body that it answers with, and how many connections ask it."""

    application: str
    body: int
    connections: int

    @property
    def label(self) -> str:
        """Such as ``aiohttp 10 KiB x 100``."""
        return f"{self.application} {size_text(self.body)} x {self.connections}"

    def takes(self, peer: Peer) -> bool:
        """Loops only."""
        return peer.module is not None


def missing(application: str) -> str | None:
    """Why `application` can't be measured here, or None."""
    return None if importlib.util.find_spec(application) else "it is not installed"


def versions(applications: tuple[str, ...] | list[str]) -> str:
    """The libraries that are here, such as ``aiohttp 3.13.0, uvicorn 0.38.0 (httptools 0.7.1)``."""
    texts = [f"{name} {importlib.metadata.version(name)}" for name in applications if missing(name) is None]
    parser = "httptools" if importlib.util.find_spec("httptools") else "h11"
    if texts and texts[-1].startswith("uvicorn"):
        texts[-1] += f" with {parser} {importlib.metadata.version(parser)}"
    return ", ".join(texts)


def run(site: Site, peer: Peer, seconds: float) -> dict[str, float]:
    """One run with a fresh server.  Raises RunFailed."""
    command = [sys.executable, "-m", "benchmarks.servers.http_server", "--loop", peer.name, site.application]
    command += ["--body", str(site.body)]
    with serving(command, dict(peer.environment)) as server:
        load = ["--http", "--port", server.address, "--connections", str(site.connections)]
        window = ["--seconds", str(seconds), "--watch", str(server.pid)]
        printed = run_pinned([client("tcp"), *load, *window], CLIENT_CORE, timeout_s=seconds + 30)
    values: dict[str, float] = json.loads(printed)
    if values["messages"]:
        values["cpu_us"] = values["server_cpu_seconds"] / values["messages"] * 1e6
    return values
