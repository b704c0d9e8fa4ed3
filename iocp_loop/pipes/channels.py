"""What the pipe transports of Windows read and write by: one face for three ways of doing it.

A *channel* is one handle with at most one read and one write in flight.  Its owner asks by ``read(deliver)`` and
``write(data, deliver)``, and is called with each completion: ``deliver(value, error)``, never before the call returns.

====================  ==============================================================================================
overlapped handle     an operation on the port: named pipes, the pipes of child processes
socket                operations on the port, those of sockets
any other             a thread of its own, which blocks in the call and posts what came of it to the loop: consoles,
                      the null device, standard input and output, what ``os.pipe`` makes
====================  ==============================================================================================

Which handle an object stands for: a socket its own.  An object that can ``read`` or ``write`` is a file, and its
``fileno()`` a descriptor of the C runtime, behind which stands a handle.  The ``fileno()`` of anything else *is* a
handle: asyncio's PipeHandle, the connections of multiprocessing.

The thread.  Windows has no way to wait for such a handle, and none to end a read of it from the outside that always
works.  CancelSynchronousIo works for pipes and most devices, if the thread is in the call just then; so ``stop`` asks
again and again for a while.  A thread that does not come back is left to itself, with a ResourceWarning, and so is its
handle: closing that would block too.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import socket
import sys
import threading
import time
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from .. import operations as ops
from ..operations import READABLE
from ..ports.driver import cancelled_error, leak
from ..proactor import Deliver, Proactor

if sys.platform != "win32":
    raise ImportError("the channels of this module are for Windows")

from ..ports.iocp import handles

__all__ = ["BlockingChannel", "Channel", "open_channel"]

#: Bytes per read.
READ_SIZE = 64 * 1024

#: Bytes per write of a thread: between two it can be stopped.
WRITE_SIZE = 64 * 1024

#: Seconds for which a thread is asked to leave a call that blocks, and between two times of asking.
PATIENCE = 1.0
INTERVAL = 0.01


class Channel(ABC):
    """See the top of the module.  `number` is the handle or SOCKET."""

    number: int

    @abstractmethod
    def read(self, deliver: Deliver) -> None:
        """Read once: ``deliver(bytes, None)``, empty at the end.  OSError if that is refused outright."""

    @abstractmethod
    def write(self, data: memoryview, deliver: Deliver) -> None:
        """Write once: ``deliver(number of bytes taken, None)``.  OSError if that is refused outright."""

    @abstractmethod
    def watch(self, deliver: Deliver) -> None:
        """For who only writes: ``deliver(b"", None)`` or an error when the other end is gone, if that can be told."""

    @abstractmethod
    def stop(self) -> None:
        """Ask for the end of what is in flight.  Its completions come all the same."""

    @abstractmethod
    def may_be_closed(self) -> bool:
        """After ``stop``: whether the handle can be closed now, or else when the next completion has come."""

    def give_up(self) -> bool:
        """The owner is being collected: stop, and tell whether the handle can be closed."""
        self.stop()
        return True


class OverlappedChannel(Channel):
    """A handle with overlapped I/O."""

    def __init__(self, proactor: Proactor, handle: ops.HandleLike) -> None:
        self.number = ops.fileno(handle)
        self._handle: Any = handle
        self._proactor = proactor
        self._in_flight: set[ops.Operation] = set()
        self._stopped = False

    def read(self, deliver: Deliver) -> None:
        self._start(ops.Read(self._handle, READ_SIZE), deliver)

    def write(self, data: memoryview, deliver: Deliver) -> None:
        self._start(ops.Write(self._handle, data), deliver)

    def watch(self, deliver: Deliver) -> None:
        if handles.is_device(self.number):
            return  # it has input of its own, which somebody else may want to read

        def look(data: bytes, error: BaseException | None) -> None:
            if data and not self._stopped:
                self.watch(deliver)  # the words of the other end are not for us
            elif not isinstance(error, PermissionError):  # else this end can't be read; a failing write will tell
                deliver(data, error)

        self.read(look)

    def _start(self, op: ops.Operation, deliver: Deliver) -> None:
        def completed(value: Any, error: BaseException | None) -> None:
            op.complete = ops.is_over  # this and the operation refer to each other: part them
            self._in_flight.discard(op)
            deliver(value, error)

        self._proactor.start(op, completed)
        self._in_flight.add(op)

    def stop(self) -> None:
        self._stopped = True
        for op in list(self._in_flight):
            self._proactor.cancel(op)

    def may_be_closed(self) -> bool:
        return not self._in_flight or self._proactor.let_go()


class SocketChannel(OverlappedChannel):
    """A stream socket."""

    def read(self, deliver: Deliver) -> None:
        self._start(ops.Receive(self._handle, READ_SIZE), deliver)

    def write(self, data: memoryview, deliver: Deliver) -> None:
        self._start(ops.Send(self._handle, data), deliver)

    def watch(self, deliver: Deliver) -> None:
        def look(events: Any, error: BaseException | None) -> None:
            if error is not None or self._stopped or not self._peer_talks():
                deliver(b"", error)
            # Else a failing write will tell; what the peer says is not for us.

        self._start(ops.Readiness(self._handle, READABLE), look)

    def _peer_talks(self) -> bool:
        try:
            return bool(self._handle.recv(1, socket.MSG_PEEK))
        except (BlockingIOError, InterruptedError):
            return True
        except OSError:
            return False


class _Handle:
    """A handle by its number, which somebody else closes."""

    def __init__(self, number: int) -> None:
        self._number = number

    def fileno(self) -> int:
        return self._number


# --------------------------------------------------------------------------------------------------
# A thread
# --------------------------------------------------------------------------------------------------


class _Job:
    """One call that blocks, done by the thread of a channel; `stopping` asks it to end."""

    def __init__(self, work: Callable[[_Job], Any]) -> None:
        self._work = work
        self.stopping = False
        self.over = threading.Event()
        self.value: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            if self.stopping:
                raise cancelled_error()
            self.value = self._work(self)
        except BaseException as exc:
            self.error = exc
        finally:
            self.over.set()


class BlockingChannel(Channel):
    """A handle without overlapped I/O, and the thread that serves it.  One call at a time.

    `busy` is the loop's set of channels whose thread is in a call: it keeps them, and their owners, alive meanwhile.
    The thread itself refers to neither, so an owner that nobody refers to any more can be collected.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, pipe: Any, number: int, busy: set[BlockingChannel]) -> None:
        self.number = number
        self._loop = loop
        self._pipe = pipe
        self._busy = busy
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._job: _Job | None = None
        self._deliver: Deliver | None = None  # while there is a job; not in it, since the thread refers to that
        self._thread: threading.Thread | None = None
        self._stopped = False
        self._abandoned = False

    def read(self, deliver: Deliver) -> None:
        number = self.number

        def work(job: _Job) -> bytes:
            while (data := handles.read_blocking(number, READ_SIZE)) is None:
                if job.stopping:
                    raise cancelled_error()
                time.sleep(INTERVAL)
            return data

        self._do(_Job(work), deliver)

    def write(self, data: memoryview, deliver: Deliver) -> None:
        number = self.number

        def work(job: _Job) -> int:
            while not (count := handles.write_blocking(number, data[:WRITE_SIZE])):
                if job.stopping:
                    raise cancelled_error()
                time.sleep(INTERVAL)
            return count

        self._do(_Job(work), deliver)

    def watch(self, deliver: Deliver) -> None:
        """It can't be told: a thread that reads would keep the one handle from writing."""

    def _do(self, job: _Job, deliver: Deliver) -> None:
        if self._thread is None:
            name = f"iocp_loop handle {self.number}"
            self._thread = threading.Thread(target=_serve, args=(self._jobs, weakref.ref(self)), name=name, daemon=True)
            self._thread.start()
        self._job = job
        self._deliver = deliver
        self._busy.add(self)
        self._jobs.put(job)

    def _completed(self) -> None:
        """The job is over; called in the loop."""
        job, self._job = self._job, None
        deliver, self._deliver = self._deliver, None
        self._abandoned = False  # it has come back after all
        self._busy.discard(self)
        if self._stopped:
            self._jobs.put(None)
        if job is not None and deliver is not None:
            deliver(job.value, job.error)

    def stop(self) -> None:
        if self._stopped:
            return
        self._stopped = True
        if self._job is None:
            self._jobs.put(None)
        else:
            self._job.stopping = True
            self._interrupt(time.monotonic() + PATIENCE)

    def _interrupt(self, deadline: float) -> None:
        """Get the thread out of its call; again, if it was not in it yet."""
        if self._job is None:
            return
        self._ask_thread()
        if time.monotonic() < deadline:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                self._loop.call_later(INTERVAL, self._interrupt, deadline)
        elif not self._job.over.is_set():
            self._abandon()

    def _ask_thread(self) -> None:
        thread = self._thread
        if thread is not None and thread.native_id is not None:
            handles.interrupt(thread.native_id)

    def end(self, seconds: float) -> None:
        """Stop, wait for the thread at most `seconds`, and deliver ECANCELED.  For a loop that is being closed."""
        self._end(seconds)
        self._job = None
        deliver, self._deliver = self._deliver, None
        self._busy.discard(self)
        if deliver is not None:
            deliver(None, cancelled_error())

    def _end(self, seconds: float) -> bool:
        """Stop and wait for the thread; False if it does not come back."""
        self._stopped = True
        job = self._job
        if job is None:
            self._jobs.put(None)
            return not self._abandoned
        job.stopping = True
        deadline = time.monotonic() + seconds
        while not job.over.is_set() and time.monotonic() < deadline:
            self._ask_thread()
            job.over.wait(INTERVAL)
        if not job.over.is_set() and not self._abandoned:
            self._abandon()
        self._jobs.put(None)
        return not self._abandoned

    def _abandon(self) -> None:
        self._abandoned = True
        self._busy.discard(self)
        leak(self._pipe)
        warnings.warn(
            f"a thread blocks in reading or writing {self._pipe!r} and can't be stopped; both are left as they are",
            ResourceWarning,
            stacklevel=2,
        )

    def may_be_closed(self) -> bool:
        return not self._abandoned and (self._job is None or self._job.over.is_set())

    def give_up(self) -> bool:
        return self._end(PATIENCE)


def _serve(jobs: queue.SimpleQueue[_Job | None], channel: weakref.ref[BlockingChannel]) -> None:
    """The thread of a channel."""
    while (job := jobs.get()) is not None:
        job.run()
        del job
        owner = channel()
        if owner is None:
            return
        try:
            owner._loop.call_soon_threadsafe(owner._completed)
        except RuntimeError:  # the loop was closed meanwhile
            return
        del owner


def open_channel(loop: asyncio.AbstractEventLoop, proactor: Proactor, pipe: Any, busy: set[BlockingChannel]) -> Channel:
    """The channel for `pipe`; see the top of the module for what it may be.

    ValueError: it is closed, or a regular file.  NotImplementedError: it has overlapped I/O, and the driver has not.
    """
    if isinstance(pipe, socket.socket):
        ops.fileno(pipe)
        pipe.setblocking(False)
        return SocketChannel(proactor, pipe)
    if not handles.available():
        raise NotImplementedError("pipes need the extension module iocp_loop._iocp, which is missing")
    handle: Any = pipe
    number: int = pipe.fileno()
    if hasattr(pipe, "read") or hasattr(pipe, "write"):
        number = handles.handle_of_file(number)
        handle = _Handle(number)
    if handles.is_regular_file(number):
        raise ValueError("Pipe transport is only for pipes, sockets and character devices")
    if not handles.is_synchronous(number):
        if ops.AcceptPipe not in proactor.driver.kinds:
            raise NotImplementedError(f"driver {proactor.driver.name} has no overlapped I/O; that needs driver iocp")
        proactor.driver.register(handle)
        return OverlappedChannel(proactor, handle)
    return BlockingChannel(loop, pipe, number, busy)
