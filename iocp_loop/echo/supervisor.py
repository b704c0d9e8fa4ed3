"""Several processes that serve one address: a supervisor, which owns the sockets, and its workers.

The supervisor binds and listens, starts the workers as new processes (nothing of its memory, least of all a ring, is
shared), and sees to it that each gets connections:

===========  ==========================================================================================================
Linux        Each worker has a listening socket of its own on the same port (``SO_REUSEPORT``): the kernel spreads the
             connections over them by a hash of their addresses.  No two workers wake up for one connection.
other POSIX  All workers inherit the same listening socket.
Windows      A socket can be tied to one completion port only, so no listening socket is shared: the supervisor
             accepts, and hands each connection to the next worker (``socket.share``).
===========  ==========================================================================================================

On POSIX the supervisor keeps a copy of each listening socket.  So connections that come while a worker is being
replaced wait in its queue and are not refused.  A worker that has died is reported and replaced; one that dies within
`MINIMUM_LIFE` is not replaced, as the next would do the same.

The two sides talk in lines of JSON over the worker's standard input and output.  To the worker: first its settings,
then, on Windows, connections.  When its input ends, by the supervisor's will or by its death, the worker finishes.
From the worker: ``{"ready": driver}`` once, and ``{"counts": {...}}`` from time to time and at its end.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import IO, Any

__all__ = ["MINIMUM_LIFE", "Orders", "Supervisor", "WorkersFailed", "listeners", "report", "stop_signals"]

#: Seconds that a worker must have served to be replaced when it dies.
MINIMUM_LIFE = 1.0

#: Seconds that the workers may take to finish before they are killed.
PATIENCE = 10.0

#: Seconds between two looks at Ctrl-C where it does not interrupt a wait.
_WINDOWS_NAP = 0.25


class WorkersFailed(RuntimeError):
    """There are no workers (left); the message says why."""


def stop_signals() -> list[int]:
    """What tells a program to stop: Ctrl-C, SIGTERM and, on Windows, Ctrl-Break."""
    return [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)]


# ----------------------------------------------------------------------------------------------------------------------
# The supervisor's side
# ----------------------------------------------------------------------------------------------------------------------


class _Worker:
    """One worker process.  Its number stays when it is replaced; its process does not."""

    def __init__(self, number: int, command: Sequence[str], settings: dict[str, Any], sock: socket.socket | None):
        self.number = number
        self.sock = sock
        self.driver: str | None = None  # known once it is ready
        self.counts: Counter[str] = Counter()
        self.began = time.monotonic()  # to serve, once it is ready
        descriptors = [] if sock is None else [sock.fileno()]
        # Not in our process group: a Ctrl-C of the terminal is for the supervisor, which then tells its workers.
        if sys.platform == "win32":
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                creationflags=subprocess.CREATE_NEW_PROCESS_GROUP,
            )
        else:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=descriptors, process_group=0
            )
        self._send({**settings, "descriptor": descriptors[0] if descriptors else None})

    def __str__(self) -> str:
        return f"worker {self.number} (pid {self.process.pid})"

    @property
    def _input(self) -> IO[bytes]:
        assert self.process.stdin is not None  # it was asked for
        return self.process.stdin

    def _send(self, message: dict[str, Any]) -> bool:
        """False if the worker does not listen any more."""
        try:
            self._input.write(json.dumps(message).encode() + b"\n")
            self._input.flush()
        except (OSError, ValueError):
            return False
        return True

    def hand_over(self, conn: socket.socket) -> bool:
        """Windows: give the worker a connection.  False if it cannot take it."""
        if sys.platform != "win32":
            raise NotImplementedError("sockets are handed over on Windows only")
        try:
            shared = conn.share(self.process.pid)
        except OSError:
            return False
        return self._send({"connection": base64.b64encode(shared).decode()})

    def hear(self, events: queue.SimpleQueue[Any]) -> None:
        """Read what the worker says until it has ended: one thread does nothing else."""
        output = self.process.stdout
        assert output is not None  # it was asked for
        with output:
            for line in output:
                with contextlib.suppress(ValueError):
                    message = json.loads(line)
                    if isinstance(message, dict):  # and no stray print
                        events.put((self, message))
        self.process.wait()
        events.put((self, None))

    def finish(self) -> None:
        """Ask the worker to finish."""
        with contextlib.suppress(OSError):
            self._input.close()

    def how_it_ended(self) -> str:
        code = self.process.returncode
        if code is not None and code < 0:
            with contextlib.suppress(ValueError):
                return f"was ended by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"


class Supervisor:
    """Runs `count` workers that share the address of `listener`, which is bound and belongs to the supervisor now.

    `command` starts one worker; `settings`, any JSON, is the first thing it reads.  `gauges` names those counts that
    end with their worker (open connections), while the others add up over all workers that ever were.  `say` gets a
    line for whatever an operator should know.
    """

    def __init__(
        self,
        command: Sequence[str],
        count: int,
        listener: socket.socket,
        settings: dict[str, Any],
        *,
        gauges: Sequence[str] = (),
        say: Callable[[str], object],
    ) -> None:
        self._command = command
        self._settings = settings
        self._gauges = gauges
        self._say = say
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._retired: Counter[str] = Counter()
        self._stops = 0  # how many signals have come
        self._next = 0
        self._listener = listener
        self._sockets: list[socket.socket | None] = list(listeners(listener, count))
        self._workers: dict[int, _Worker] = {}

    @property
    def totals(self) -> Counter[str]:
        """The sum of what all workers have counted, as last reported."""
        return sum((worker.counts for worker in self._workers.values()), self._retired.copy())

    def start(self) -> str | None:
        """Start the workers and wait until all accept; the name of their driver.  None: a signal came meanwhile.

        Raises WorkersFailed if one of them cannot begin, OSError if it cannot even be started.
        """
        for number in stop_signals():
            signal.signal(number, lambda *_: self._events.put(None))  # this put may interrupt another one
        for worker_number in range(1, len(self._sockets) + 1):
            self._start_worker(worker_number)
        while not all(worker.driver for worker in self._workers.values()):
            self._turn(None)
            if self._stops:
                return None
            if len(self._workers) < len(self._sockets):
                raise WorkersFailed("a worker could not begin to serve")
        if sys.platform == "win32":
            threading.Thread(target=self._accept, name="accept", daemon=True).start()
        return self._workers[1].driver

    def run(self, interval: float | None = None, each_interval: Callable[[], object] | None = None) -> None:
        """Supervise until a signal stops it; call `each_interval` every `interval` seconds.

        Raises WorkersFailed when no worker is left.
        """
        due = None if interval is None else time.monotonic() + interval
        while not self._stops:
            self._turn(None if due is None else max(0.0, due - time.monotonic()))
            if not self._workers and not self._stops:
                raise WorkersFailed("no worker is left")
            if due is not None and interval is not None and time.monotonic() >= due:
                due += interval
                if each_interval is not None:
                    each_interval()

    def close(self) -> None:
        """Let every worker finish, and wait for it; kill what has not finished within `PATIENCE` seconds.

        A second signal ends the waiting.
        """
        for sock in {self._listener, *self._sockets}:
            if sock is not None:
                sock.close()
        for worker in self._workers.values():
            worker.finish()
        self._stops = 0
        deadline = time.monotonic() + PATIENCE
        while self._workers and not self._stops and time.monotonic() < deadline:
            self._turn(deadline - time.monotonic(), replace=False)
        for worker in self._workers.values():
            self._say(f"{worker} does not finish, it is killed")
            worker.process.kill()
        while self._workers:
            self._turn(None, replace=False)

    # -- the turn ----------------------------------------------------------------------------------

    def _start_worker(self, number: int) -> None:
        worker = _Worker(number, self._command, self._settings, self._sockets[number - 1])
        self._workers[number] = worker
        threading.Thread(target=worker.hear, args=(self._events,), name=f"worker-{number}", daemon=True).start()

    def _turn(self, timeout: float | None, *, replace: bool = True) -> None:
        """Wait for one event, at most `timeout` seconds, and act on it."""
        if sys.platform == "win32":
            timeout = _WINDOWS_NAP if timeout is None else min(timeout, _WINDOWS_NAP)
        try:
            event = self._events.get(timeout=timeout)
        except queue.Empty:
            return
        if event is None:
            self._stops += 1
            return
        worker, message = event
        if message is None:
            self._bury(worker, replace)
        elif "ready" in message:
            worker.driver = message["ready"]
            worker.began = time.monotonic()
        elif "counts" in message:
            worker.counts = Counter(message["counts"])

    def _bury(self, worker: _Worker, replace: bool) -> None:
        """A worker has ended: keep its counts, and put another in its place if that is of use."""
        del self._workers[worker.number]
        for gauge in self._gauges:
            worker.counts.pop(gauge, None)
        self._retired += worker.counts
        worker.finish()
        if not replace:
            if worker.process.returncode > 0:  # it failed; a negative one is the signal that ended it
                self._say(f"{worker} {worker.how_it_ended()}")
            return
        lived = time.monotonic() - worker.began
        if worker.driver is not None and lived >= MINIMUM_LIFE:
            self._say(f"{worker} {worker.how_it_ended()}, another takes its place")
            try:
                self._start_worker(worker.number)
                return
            except OSError as error:
                self._say(f"it cannot be started: {error}")
        else:
            self._say(f"{worker} {worker.how_it_ended()} after {lived:.1f} s, it is not replaced")
        sock, self._sockets[worker.number - 1] = self._sockets[worker.number - 1], None
        if sock is not None and sock not in self._sockets:
            sock.close()  # else the kernel would go on to choose it

    # -- Windows: connections are handed over ------------------------------------------------------

    def _accept(self) -> None:
        while True:
            try:
                conn, _ = self._listener.accept()
            except OSError:
                if self._listener.fileno() < 0:
                    return
                time.sleep(0.1)  # the client was gone already, or there are no handles left
                continue
            with conn:
                workers = list(self._workers.values())
                for _ in workers:
                    self._next += 1
                    if workers[self._next % len(workers)].hand_over(conn):
                        break


def listeners(first: socket.socket, count: int) -> list[socket.socket] | list[None]:
    """A listening socket for each of `count` workers, or threads; None where connections are handed over."""
    if sys.platform == "win32":
        return [None] * count
    if sys.platform != "linux":
        return [first] * count
    # The first one was bound without SO_REUSEPORT, which proved that nobody else has the port; now it opens up.
    first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sockets = [first]
    for _ in range(count - 1):
        sock = socket.socket(first.family, first.type, first.proto)
        sockets.append(sock)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if first.family == socket.AF_INET6:
            v6_only = first.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6_only)
        sock.bind(first.getsockname())
        sock.listen(128)
    return sockets


# ----------------------------------------------------------------------------------------------------------------------
# The worker's side
# ----------------------------------------------------------------------------------------------------------------------


def report(**message: Any) -> None:
    """Tell the supervisor: ``ready=driver`` or ``counts={...}``.  If it is gone, nobody wants to know."""
    with contextlib.suppress(OSError):
        os.write(1, json.dumps(message).encode() + b"\n")


class Orders:
    """What the supervisor wants of this worker.

    `settings` are those of the supervisor; `listener` is the socket to serve, or None where connections are handed
    over.  Raises EOFError if there is no supervisor.
    """

    def __init__(self) -> None:
        self._input = open(0, "rb", closefd=False)
        first = self._input.readline()
        if not first:
            raise EOFError("there are no orders on standard input: a worker is started by its supervisor")
        self.settings: dict[str, Any] = json.loads(first)
        descriptor = self.settings.pop("descriptor")
        self.listener = None if descriptor is None else socket.socket(fileno=descriptor)

    def follow(
        self, loop: asyncio.AbstractEventLoop, welcome: Callable[[socket.socket], object], stop: Callable[[], object]
    ) -> None:
        """From now on, call `welcome` in the loop with each connection, and `stop` when the supervisor wants the end.

        SIGTERM stops this worker too; Ctrl-C does not: it is for the supervisor.
        """

        def read() -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                for line in self._input:
                    conn = _adopt_shared(base64.b64decode(json.loads(line)["connection"]))
                    loop.call_soon_threadsafe(welcome, conn)
                loop.call_soon_threadsafe(stop)

        for number in stop_signals():
            if number == signal.SIGTERM:
                loop.add_signal_handler(number, stop)
            else:
                signal.signal(number, signal.SIG_IGN)
        threading.Thread(target=read, name="orders", daemon=True).start()


def _adopt_shared(shared: bytes) -> socket.socket:
    if sys.platform != "win32":
        raise NotImplementedError("sockets are handed over on Windows only")
    conn = socket.fromshare(shared)
    conn.setblocking(False)
    return conn
