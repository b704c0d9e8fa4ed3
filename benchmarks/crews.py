"""The workloads of parallel, each run in a process of its own: threads of one process that echo to themselves.

``python -m benchmarks.crews PEER MODE THREADS SIZE CONNECTIONS SECONDS`` prints a line of JSON.  MODE is one of
:data:`benchmarks.servers.echo_server.MODES`: a loop in each thread, all of them listening on one port, each with
clients of its own, whom the kernel hands to any of the loops.  Or it is ``raw``: workers on one CompletionPort, which
run the thread function of ``examples/raw_echo.py``, for both ends of each connection; a message goes to and fro.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple, NoReturn

from .peers import PEERS, Peer, new_event_loop
from .servers.echo_server import MODES

__all__ = ["RAW"]

#: The mode of a CompletionPort, without loops.
RAW = "raw"

_WARMUP_S = 0.3


class _Member:
    """One thread of the crew: who it is for the system, and how many echoes have come to it."""

    def __init__(self) -> None:
        self.thread = 0
        self.echoes = 0.0

    def join(self) -> None:
        """To be called in the thread itself."""
        self.thread = threading.get_native_id()


class _Reading(NamedTuple):
    echoes: float
    ran_ns: int
    waited_ns: int  # ready to run, and without a core

    @classmethod
    def of(cls, member: _Member) -> _Reading:
        with open(f"/proc/self/task/{member.thread}/schedstat") as file:
            ran, waited, _ = map(int, file.read().split())
        return cls(member.echoes, ran, waited)


def _watch(crew: list[_Member], joined: threading.Barrier, seconds: float) -> NoReturn:
    """Once all have joined: measure, print, and end the process, with whatever is under way in it.

    The time of a thread is what it ran or waited for anything but a core: what others do on the machine takes no part
    in it, waiting for a lock does.
    """
    joined.wait()
    time.sleep(_WARMUP_S)
    began, before = time.monotonic_ns(), [_Reading.of(member) for member in crew]
    time.sleep(seconds)
    elapsed_ns, after = time.monotonic_ns() - began, [_Reading.of(member) for member in crew]
    pairs = list(zip(before, after, strict=True))
    echoes = sum(late.echoes - early.echoes for early, late in pairs)
    ran_ns = sum(late.ran_ns - early.ran_ns for early, late in pairs)
    own_ns = max(ran_ns, sum(elapsed_ns - (late.waited_ns - early.waited_ns) for early, late in pairs))
    idle = [number for number, (early, late) in enumerate(pairs) if late.echoes == early.echoes]
    if idle:
        print(f"nothing has come to thread {idle[0]}", file=sys.stderr)
        os._exit(1)
    print(
        json.dumps(
            {"cpu_us": ran_ns / echoes / 1000, "busy": ran_ns / own_ns, "rate": echoes * len(crew) / own_ns * 1e9}
        )
    )
    sys.stdout.flush()
    os._exit(0)


# ---------------------------------------------------------------------------------------------------------------------
# Loops
# ---------------------------------------------------------------------------------------------------------------------


class _Client(asyncio.Protocol):
    """Sends back what comes, as the server does."""

    def __init__(self, member: _Member, size: int) -> None:
        self._member = member
        self._size = size

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    def data_received(self, data: bytes) -> None:
        self._member.echoes += len(data) / self._size
        self.transport.write(data)


async def _serve(
    mode: str, listeners: list[socket.socket], crew: list[_Member], size: int, connections: int,
    joined: threading.Barrier, index: int,
) -> None:  # fmt: skip
    loop = asyncio.get_running_loop()
    crew[index].join()
    address = listeners[index].getsockname()
    kept = await MODES[mode](listeners[index], None)
    connect = functools.partial(loop.create_connection, lambda: _Client(crew[index], size), *address)
    clients: list[Any] = [(await connect())[1] for _ in range(connections)]
    joined.wait()  # which may block: nobody has anything to do before
    for client in clients:
        client.transport.write(bytes(size))
    await asyncio.Event().wait()
    del kept


def _listener(port: int) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(("127.0.0.1", port))
    sock.listen(1024)
    sock.setblocking(False)
    return sock


def _run_threads(peer: Peer, main: Callable[[int], Coroutine[Any, Any, None]], count: int) -> None:
    if peer.module == "iocp_loop":
        import iocp_loop

        iocp_loop.run_threads(main, threads=count, driver=peer.driver)
    make = functools.partial(new_event_loop, peer)
    threads = [
        threading.Thread(target=lambda index: asyncio.Runner(loop_factory=make).run(main(index)), args=(index,))
        for index in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# ---------------------------------------------------------------------------------------------------------------------
# A port
# ---------------------------------------------------------------------------------------------------------------------


class _Counted:
    """A port, for one worker, whose completions are counted: an echo is a receive and a send on either side."""

    def __init__(self, port: Any, member: _Member) -> None:
        self.submit, self.unregister, self._get, self._member = port.submit, port.unregister, port.get, member

    def get(self) -> Any:
        completion = self._get()
        self._member.echoes += 0.25
        return completion


def _work(peer: Peer, crew: list[_Member], size: int, connections: int, joined: threading.Barrier) -> None:
    from iocp_loop import CompletionPort
    from iocp_loop.operations import Receive

    raw_echo: Any = importlib.import_module("examples.raw_echo")  # a program, and no package
    port = CompletionPort(driver=peer.driver)
    clients: set[Any] = set()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        for _ in range(connections * len(crew)):
            one = socket.create_connection(listener.getsockname())
            one.sendall(bytes(size))
            for sock in (one, listener.accept()[0]):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                client = raw_echo.Client(sock, None)
                clients.add(client)
                port.register(sock, key=client)
                raw_echo.start(port, client, Receive(sock, raw_echo.BUFFER_SIZE), clients)

    def work(member: _Member) -> None:
        member.join()
        joined.wait()
        raw_echo.echo_thread(_Counted(port, member), clients, verbose=False)

    for member in crew:
        threading.Thread(target=work, args=(member,)).start()


def _main(name: str, mode: str, threads: int, size: int, connections: int, seconds: float) -> None:
    crew = [_Member() for _ in range(threads)]
    joined = threading.Barrier(threads + 1)
    threading.Thread(target=_watch, args=(crew, joined, seconds), daemon=True).start()
    if mode == RAW:
        _work(PEERS[name], crew, size, connections, joined)
        return
    listeners = [_listener(0)]
    listeners += [_listener(listeners[0].getsockname()[1]) for _ in range(threads - 1)]
    serve = functools.partial(_serve, mode, listeners, crew, size, connections, joined)
    _run_threads(PEERS[name], serve, threads)


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]), float(sys.argv[6]))
