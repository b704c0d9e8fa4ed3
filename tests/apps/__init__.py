"""Real libraries on this loop, each doing something real: what ``make test-apps`` runs, and the table in the docs.

A case is a coroutine, run in a process of its own on a loop of one kind: ours on each driver, asyncio's own, uvloop.
So what fails here is told from what fails everywhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import glob
import importlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

#: Seconds that anything may take which ought to happen soon.
LIMIT = 30.0

Body = Callable[[Path], Awaitable[None]]


class Case(NamedTuple):
    """One library and what is done with it."""

    name: str
    #: The distributions that it is about, as pip names them; the table has their versions.
    distributions: tuple[str, ...]
    does: str
    body: Body
    #: What must be here: importable modules, and programs of Debian's packages.
    modules: tuple[str, ...]
    programs: tuple[str, ...]
    #: Why it is not for Windows.
    unix: str
    #: The oldest Python that it works on.
    python: tuple[int, int]

    def missing(self) -> str | None:
        """What of it is not here, or None."""
        if sys.platform == "win32" and self.unix:
            return self.unix
        if sys.version_info < self.python:
            return f"it needs Python {'.'.join(map(str, self.python))}"
        for module in self.modules:
            if not _is_here(module):
                return f"{module} is not installed (make test-apps)"
        for name in self.programs:
            if program(name) is None:
                return f"{name} is not installed"
        return None


def _is_here(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False


CASES: dict[str, Case] = {}


def case(
    distributions: str,
    does: str,
    *,
    modules: Sequence[str] | None = None,
    programs: Sequence[str] = (),
    unix: str = "",
    python: tuple[int, int] = (3, 11),
) -> Callable[[Body], Body]:
    """Register a case; its name is that of the function."""
    names = tuple(distributions.split())
    if programs:
        unix = "it needs programs of Debian's packages"

    def register(body: Body) -> Body:
        name: str = body.__name__
        needed = tuple(names if modules is None else modules)
        CASES[name] = Case(name, names, does, body, needed, tuple(programs), unix, python)
        return body

    return register


def load(name: str) -> Any:
    """A module, untyped: not every environment has these libraries, mypy's least of all."""
    return importlib.import_module(name)


# ----------------------------------------------------------------------------------------------------------------------
# What several cases need
# ----------------------------------------------------------------------------------------------------------------------

#: The variable that names the factory of a case's loop, as MODULE:NAME, for programs that it starts.
FACTORY = "TESTS_APPS_LOOP"


def new_event_loop() -> asyncio.AbstractEventLoop:
    """A loop of the case's kind."""
    module, _, name = os.environ[FACTORY].partition(":")
    loop: asyncio.AbstractEventLoop = getattr(load(module), name)()
    return loop


def program(name: str) -> str | None:
    """A program of Debian's packages, some of which are not on every PATH, or of this environment."""
    places = [os.path.dirname(sys.executable), "/usr/sbin", *glob.glob("/usr/lib/postgresql/*/bin")]
    path = os.pathsep.join([os.environ.get("PATH", ""), *places])
    return shutil.which(name, path=path)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


async def until_it_accepts(port: int) -> None:
    deadline = time.monotonic() + LIMIT
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.05)
        else:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            return


@contextlib.asynccontextmanager
async def daemon(command: Sequence[str], port: int, folder: Path, **options: Any) -> AsyncIterator[None]:
    """A server that is no part of the case, in the foreground, until the block ends."""
    words = [program(command[0]) or command[0], *command[1:]]
    with (
        (folder / "daemon.log").open("w") as log,
        ended(start(words, log, {"cwd": folder, **options})),
    ):
        await until_it_accepts(port)
        yield


def start(command: Sequence[str], log: IO[str], options: dict[str, Any]) -> subprocess.Popen[Any]:
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **options)


@contextlib.contextmanager
def ended(process: subprocess.Popen[Any]) -> Iterator[subprocess.Popen[Any]]:
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def certificates(folder: Path) -> tuple[Any, Any]:
    """TLS contexts of a server for localhost and of a client that trusts it; the files are cert.pem and key.pem."""
    import ssl

    trustme = load("trustme")
    authority = trustme.CA()
    issued = authority.issue_cert("localhost", "127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(str(folder / "cert.pem"))
    issued.private_key_pem.write_to_path(str(folder / "key.pem"))
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    issued.configure_cert(server)
    client = ssl.create_default_context()
    authority.configure_trust(client)
    return server, client


def everything() -> dict[str, Case]:
    """All cases, by name."""
    for module in ("databases", "messages", "tools", "web"):
        importlib.import_module(f"{__name__}.{module}")
    return CASES
