"""CompletionPort: the queue by itself, as the seed's C program uses it, without an event loop.

::

    port = CompletionPort()
    port.register(sock, key)                   # which key its completions carry
    port.submit(Receive(sock, 4096))           # start I/O
    operation, key, value, error = port.get()  # wait for whatever completes next

One port serves several threads: each may ``submit``, ``post`` and ``get``.  One thread waits in the kernel for all, and
the others stand in line behind it; whoever comes out with completions leaves what it does not take to the next.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import deque
from types import TracebackType
from typing import Any

from ..operations import Completion, HandleLike, Operation, fileno
from .choice import make_driver

__all__ = ["CompletionPort"]


class CompletionPort:
    """A queue of completed I/O (after ``CreateIoCompletionPort`` and ``GetQueuedCompletionStatus``).

    `driver`: ``"auto"``, ``"iocp"``, ``"uring"`` or ``"poll"``; None: what IOCP_LOOP_DRIVER says, else ``auto``.
    `concurrency`: how many threads will use the port at once; 0, the default, means any number (at least 2, so that
    the default port is never the one-thread kind).  1 is for a port that one thread owns: then only ``post`` may be
    called from others.

    Raises ValueError for an unknown driver, DriverUnavailable for one that can't work here.
    """

    def __init__(self, concurrency: int = 0, *, driver: str | None = None) -> None:
        if concurrency < 0:
            raise ValueError(f"concurrency must be 0 (any number of threads) or more, not {concurrency}")
        # CreateIoCompletionPort takes 0 for as many running threads as the machine has processors.
        self._driver = make_driver(driver, concurrency or max(2, os.cpu_count() or 1))
        self._completed: deque[Completion] = deque()
        self._keys: dict[int, object] = {}
        self._turn = threading.Lock()  # held by the thread that waits
        self._tables = threading.RLock()  # held around every other use of the driver
        self._waiter: int | None = None  # and its identifier
        self._closed = False
        self._patience = 0.0  # seconds, of `close`
        self._driver.before_sleep = lambda: bool(self._completed) or self._closed

    @property
    def driver(self) -> str:
        """The name of the driver that carries this port."""
        return self._driver.name

    @property
    def closed(self) -> bool:
        """True once ``close`` was called."""
        return self._closed

    @property
    def in_flight(self) -> int:
        """How many operations are submitted and not reaped."""
        return len(self._driver.in_flight)

    def register(self, handle: HandleLike, key: object = None) -> None:
        """Associate `handle` with the port.  Completions of its operations carry `key`, any object.

        A socket object is made non-blocking: from now on the port does the waiting.  A handle that was never
        registered can be used all the same where the system wants no association; its key is None.
        Raises OSError (Windows: error 87) if the handle belongs to another port.
        """
        with self._tables:
            self._check_open()
            self._driver.register(handle)
            if isinstance(handle, socket.socket):
                handle.setblocking(False)
            self._keys[fileno(handle)] = key

    def unregister(self, handle: HandleLike) -> None:
        """Forget the key of `handle`; call it before the handle is closed."""
        with self._tables:
            self._keys.pop(fileno(handle), None)

    def submit(self, operation: Operation) -> None:
        """Start `operation`.  Its completion comes out of ``get``, in whichever thread asks next.

        Raises OSError, ValueError or the like if it is refused outright; there is no completion then.
        """
        completed = self._completed

        def complete(value: Any, error: BaseException | None) -> None:
            completed.append(Completion(operation, operation.key, value, error))

        with self._tables:
            self._check_open()
            operation.key = self._keys.get(operation.fd)
            operation.complete = complete
            self._driver.submit(operation)
            self._wake_for_ready()

    def cancel(self, operation: Operation) -> None:
        """Ask for the end of `operation`.  Its completion still comes, with ECANCELED or with what it had done."""
        with self._tables:
            if not self._closed:
                self._driver.cancel(operation)
                self._wake_for_ready()

    def post(self, value: Any = None, key: object = None) -> None:
        """Put a completion on the port by hand (after ``PostQueuedCompletionStatus``).  From any thread."""
        self._check_open()
        self._completed.append(Completion(None, key, value))
        self._driver.wake()

    def get(self, timeout: float | None = None) -> Completion | None:
        """The next completion; None if there is none within `timeout` seconds (None: wait without limit).

        Raises ValueError once the port is closed, in threads that wait in it too.
        """
        deadline = None if timeout is None else time.perf_counter() + timeout
        while True:
            self._check_open()
            try:
                return self._completed.popleft()
            except IndexError:
                pass
            remaining = None if deadline is None else deadline - time.perf_counter()
            if remaining is not None and remaining < 0 and timeout != 0:
                return None
            if not self._take_turn(remaining):
                return None
            if timeout == 0:
                try:
                    return self._completed.popleft()
                except IndexError:
                    return None

    def get_batch(self, timeout: float | None = None, limit: int = 256) -> list[Completion]:
        """Up to `limit` completions at once; empty if none comes within `timeout` seconds."""
        if limit < 1:
            raise ValueError(f"limit must be 1 or more, not {limit}")
        first = self.get(timeout)
        if first is None:
            return []
        batch = [first]
        while len(batch) < limit:
            try:
                batch.append(self._completed.popleft())
            except IndexError:
                break
        return batch

    def close(self, timeout: float = 2.0) -> None:
        """Cancel what is in flight, reap it, and free the port, within about `timeout` seconds.

        Threads that wait in ``get`` get ValueError.  If a finalizer or a signal handler calls this from inside of a
        ``get``, that one frees the port before it raises.  What the kernel does not give back in time is leaked, with
        a ResourceWarning: nothing is freed under the kernel.
        """
        if self._closed:
            return
        self._patience = timeout
        self._closed = True
        if self._waiter == threading.get_ident():
            return
        while not self._turn.acquire(timeout=0.01):
            self._driver.wake()
        self._end_turn()

    def __enter__(self) -> CompletionPort:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self.in_flight} in flight"
        return f"<CompletionPort driver={self.driver} {state}>"

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the completion port is closed")

    def _wake_for_ready(self) -> None:
        """Let the thread that waits, if there is one, fetch a completion that came without the kernel's help."""
        if self._driver.ready:
            self._driver.wake()

    def _take_turn(self, timeout: float | None) -> bool:
        """Wait once for all threads; False if another thread held the turn for all of `timeout` seconds."""
        if not self._turn.acquire(timeout=-1 if timeout is None else max(timeout, 0)):
            return False
        self._waiter = threading.get_ident()
        try:
            if self._completed or self._closed:
                return True
            self._driver.wait(timeout if timeout is None else max(timeout, 0))
            with self._tables:
                if not self._closed:
                    self._driver.dispatch()
        finally:
            self._waiter = None
            self._end_turn()
        return True

    def _end_turn(self) -> None:
        """Let another thread wait; or free the port, which has been closed."""
        try:
            if self._closed:
                with self._tables:
                    self._driver.close(self._patience)
                self._completed.clear()  # nobody can fetch them any more; they hold buffers and sockets
        finally:
            self._turn.release()
