"""Counts the instructions that a server's process spends on an echo of 1 KiB, or on a connection, with valgrind.

    python tools/count_instructions.py [MODE ...] [--loops poll uvloop asyncio] [--units N]

Unlike time, a count hardly depends on what else the machine does: it differs by a few hundreds from run to run.  Two
runs of each kind, one with three times and more as many messages (or connections) as the other: what lies between them
is theirs alone, without the start and the end of the process.

===============  ======================================================================================================
``protocol``     echoes by a protocol, over a UNIX socket, 10 connections at once
``read``         the same by asyncio's streams: `read`; ``readexactly`` and ``readline`` likewise
``named-read``   by `iocp_loop.start_server`: `read`; ``named-readexactly`` and ``named-readline`` likewise
``ended``        TCP connections, one after the other: made, an echo of 100 bytes by a protocol, ended by the client
``answered``     the same, ended by the server after its answer
``streamed``     as ``ended``, by asyncio's streams
===============  ======================================================================================================
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

READERS = ("read", "readexactly", "readline")
CONNECTIONS = ("ended", "answered", "streamed")
MODES = ("protocol", *READERS, *(f"named-{name}" for name in READERS), *CONNECTIONS)

AT_ONCE = 10
MESSAGE = b"x" * 1023 + b"\n"
SHORT = MESSAGE[-100:]

#: Echoes on each connection, or connections, by default: few, and how many more.
FEW, MORE = 300, {True: 1000, False: 600}


# ----------------------------------------------------------------------------------------------------------------------
# The server, under valgrind
# ----------------------------------------------------------------------------------------------------------------------


def serve(mode: str, loop_name: str, where: str, connections: int) -> None:
    """Serve until so many connections have ended."""
    left = connections
    ended = asyncio.Event()

    def one_ended() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            ended.set()

    class Echo(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:  # uvloop's are no asyncio.Transport
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            self.transport.write(data)

        def connection_lost(self, exc: Exception | None) -> None:
            one_ended()

    class Answer(Echo):
        def data_received(self, data: bytes) -> None:
            self.transport.write(data)
            self.transport.close()

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        read = getattr(reader, mode.removeprefix("named-") if mode not in CONNECTIONS else "read")
        arguments = () if mode.endswith("readline") else (len(MESSAGE),)
        try:
            while data := await read(*arguments):
                writer.write(data)
                await writer.drain()
        except asyncio.IncompleteReadError:
            pass
        writer.close()
        one_ended()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        if mode in ("ended", "answered"):
            sock = socket.create_server(("127.0.0.1", int(where)))
            await loop.create_server(Echo if mode == "ended" else Answer, sock=sock)
        elif mode == "streamed":
            await asyncio.start_server(echo, "127.0.0.1", int(where))
        elif mode == "protocol":
            await loop.create_unix_server(Echo, where)
        elif mode.startswith("named-"):
            sock = socket.socket(socket.AF_UNIX)
            sock.bind(where)
            sock.listen(100)
            import iocp_loop

            await iocp_loop.start_server(echo, sock=sock)
        else:
            await asyncio.start_unix_server(echo, where)
        await ended.wait()

    with asyncio.Runner(loop_factory=factory(loop_name)) as runner:
        runner.run(main())


def factory(name: str) -> Callable[[], asyncio.AbstractEventLoop]:
    if name == "asyncio":
        return asyncio.new_event_loop
    if name == "uvloop":
        import importlib

        made: Callable[[], asyncio.AbstractEventLoop] = importlib.import_module("uvloop").new_event_loop
        return made
    import iocp_loop

    return lambda: iocp_loop.new_event_loop(name)


# ----------------------------------------------------------------------------------------------------------------------
# The client, and the count
# ----------------------------------------------------------------------------------------------------------------------


async def call(mode: str, where: str, units: int) -> None:
    """Exchange so many messages on each connection with the server, or make so many connections."""

    async def connected() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while True:
            try:
                if mode in CONNECTIONS:
                    return await asyncio.open_connection("127.0.0.1", int(where))
                return await asyncio.open_unix_connection(where)
            except OSError:  # valgrind takes its time
                await asyncio.sleep(0.2)

    async def one(message: bytes, times: int) -> None:
        reader, writer = await connected()
        for _ in range(times):
            writer.write(message)
            await reader.readexactly(len(message))
        if mode == "answered":
            await reader.read()
        writer.close()
        await writer.wait_closed()

    if mode in CONNECTIONS:
        for _ in range(units):
            await one(SHORT, 1)
    else:
        await asyncio.gather(*(one(MESSAGE, units) for _ in range(AT_ONCE)))


def counted(mode: str, loop_name: str, units: int) -> int:
    """The instructions of a server's whole life."""
    with tempfile.TemporaryDirectory() as folder:
        with socket.create_server(("127.0.0.1", 0)) as sock:
            port = sock.getsockname()[1]
        where = str(port) if mode in CONNECTIONS else str(Path(folder, "socket"))
        connections = units if mode in CONNECTIONS else AT_ONCE
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={folder}/out", sys.executable, __file__]
        command += ["--serve", mode, loop_name, where, str(connections)]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": path}
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server:
            try:
                asyncio.run(asyncio.wait_for(call(mode, where, units), 600))
            except (OSError, EOFError, TimeoutError) as error:
                server.kill()
                raise SystemExit(f"{mode} on {loop_name} failed: {error!r}\n{server.communicate()[1]}") from None
            _, said = server.communicate(timeout=60)
        found = re.search(r"Collected : (\d+)", said)
        if server.returncode != 0 or found is None:
            raise SystemExit(f"{mode} on {loop_name} failed\n{said}")
        return int(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("modes", nargs="*", metavar="MODE", help=", ".join(MODES))
    parser.add_argument("--loops", nargs="+", default=["poll", "uvloop"], metavar="LOOP", help="poll, uvloop, asyncio")
    parser.add_argument("--units", type=int, metavar="N", help="how many the second run has more than the first")
    parser.add_argument("--serve", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        mode, loop_name, where, connections = options.serve
        serve(mode, loop_name, where, int(connections))
        return
    for mode in options.modes or MODES:
        if mode not in MODES:
            parser.error(f"no mode {mode!r}")
    print(f"instructions of the server, CPython {sys.version.split()[0]}")
    for mode in options.modes or MODES:
        for loop_name in options.loops:
            if mode.startswith("named-") and loop_name in ("uvloop", "asyncio"):
                continue
            more = options.units or MORE[mode in CONNECTIONS]
            spent = counted(mode, loop_name, FEW + more) - counted(mode, loop_name, FEW)
            divisor = more if mode in CONNECTIONS else more * AT_ONCE
            unit = "connection" if mode in CONNECTIONS else "echo of 1 KiB"
            print(f"{mode} on {loop_name}: {spent / divisor:,.0f} per {unit}", flush=True)


if __name__ == "__main__":
    main()
