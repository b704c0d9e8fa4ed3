"""Subprocess transports: a child process, its pipes, and the news that it has exited.

asyncio's own base class brings the protocol of the pipes and of the exit.  This module starts the process and watches
it.  On Linux a process has a descriptor (pidfd_open(2)) that becomes readable when it exits: one more readiness
operation, without a signal handler, without a child watcher, and in any thread.  On Windows a process has a handle, and
waiting for it is an operation too; the pipes are asyncio's own there, whose end on our side has overlapped I/O.

Every process that was started is watched until it exits.  Where the operation is refused or fails, a thread waits for
the process; where no thread can be started either, a timer checks from time to time.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import os
import subprocess
import sys
import threading
from asyncio import base_subprocess
from typing import Any, cast, overload

from ..operations import READABLE, Readiness, WaitForHandle, was_cancelled
from ..proactor import Proactor

if sys.platform == "win32":
    from asyncio import windows_utils as popen
else:
    import subprocess as popen

__all__ = ["SubprocessMethods", "SubprocessTransport"]

_logger = logging.getLogger("asyncio")

#: The exit status of a process whose real one somebody else has taken; as in asyncio's child watchers.
UNKNOWN_STATUS = 255

#: Seconds after the exit of a process in which its pipes should end too.  Who waits for the process waits no longer: it
#: may have left them to a child of its own.
PIPES_PATIENCE = 0.01

#: Seconds between two looks at a process that neither the system nor a thread watches.
_LOOK_INTERVAL = 0.05


class SubprocessTransport(base_subprocess.BaseSubprocessTransport):
    """A running process with its pipes, as an asyncio SubprocessTransport."""

    _loop: asyncio.AbstractEventLoop
    _proc: subprocess.Popen[bytes] | None
    _pipes: dict[int, Any]
    _returncode: int | None
    _patience: asyncio.TimerHandle | None = None  # from the exit on

    def _start(self, args: Any, shell: bool, stdin: Any, stdout: Any, stderr: Any, bufsize: int, **kwargs: Any) -> None:
        self._waiters: list[asyncio.Future[None]] = []
        self._proc = popen.Popen(
            args, shell=shell, stdin=stdin, stdout=stdout, stderr=stderr, bufsize=bufsize, **kwargs
        )

    def close(self) -> None:
        """Close the pipes and kill the process if it still runs."""
        if self._loop is not None and self._loop.is_closed():
            # No loop is left to close pipes on; that of Python 3.11 would raise.  Each closes when it is collected.
            self._pipes.clear()
        super().close()

    # Who waits for the process is woken here and not by the base class, which waits for the pipes too, or does not wait
    # for them at all (which of the two depends on the version of Python).

    async def _wait(self) -> int:
        """Wait until the process has exited; its exit status."""
        if self._returncode is None:
            waiter = self._loop.create_future()
            self._waiters.append(waiter)
            await waiter
        return cast("int", self._returncode)

    def _process_exited(self, returncode: int) -> None:
        super()._process_exited(returncode)
        self._patience = self._loop.call_later(PIPES_PATIENCE, self._wake_waiters)

    def _call_connection_lost(self, exc: BaseException | None) -> None:
        if self._patience is not None:
            self._patience.cancel()
        try:
            super()._call_connection_lost(exc)
        finally:
            self._wake_waiters()

    def _wake_waiters(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()

    def watch_exit(self, proactor: Proactor) -> None:
        """Have the loop told when the process exits.  Call it once, after the transport was made."""
        process: Any = self._proc
        context = contextvars.copy_context()  # that of whoever starts the process, as for the callbacks of its pipes
        if sys.platform == "win32":
            self._watch_handle(proactor, process, context)
        else:
            self._watch_descriptor(proactor, process, context)

    def _watch_handle(self, proactor: Proactor, process: Any, context: contextvars.Context) -> None:
        def exited(value: Any, error: BaseException | None) -> None:
            if error is None:
                context.run(self._process_exited, process.poll())
            else:
                self._wait_failed(error, process, context)

        try:
            # The operation refers to the handle, so that it stays open until the wait is over.
            proactor.start(WaitForHandle(process._handle), exited)
        except (OSError, ValueError):
            self._watch_by_thread(process, context)

    def _watch_descriptor(self, proactor: Proactor, process: Any, context: contextvars.Context) -> None:
        pidfd = open_pidfd(process.pid)
        if pidfd is None:
            self._watch_by_thread(process, context)
            return

        def exited(events: Any, error: BaseException | None) -> None:
            os.close(pidfd)
            if error is None:
                context.run(self._process_exited, take_exit_status(process))
            else:
                self._wait_failed(error, process, context)

        try:
            proactor.start(Readiness(pidfd, READABLE), exited)
        except (OSError, ValueError):
            os.close(pidfd)
            self._watch_by_thread(process, context)

    def _wait_failed(
        self, error: BaseException, process: subprocess.Popen[bytes], context: contextvars.Context
    ) -> None:
        if not was_cancelled(error):  # that would be the loop closing under us
            self._watch_by_thread(process, context)

    def _watch_by_thread(self, process: subprocess.Popen[bytes], context: contextvars.Context) -> None:
        loop = self._loop

        def wait() -> None:
            status = take_exit_status(process)
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits any more
                loop.call_soon_threadsafe(self._process_exited, status, context=context)

        try:
            threading.Thread(target=wait, name=f"wait for process {process.pid}", daemon=True).start()
        except RuntimeError:  # the process has as many threads as it may
            self._watch_by_timer(process, context)

    def _watch_by_timer(self, process: subprocess.Popen[bytes], context: contextvars.Context) -> None:
        def look() -> None:
            status = take_exit_status(process, block=False)
            if status is None:
                self._watch_by_timer(process, context)
            else:
                self._process_exited(status)

        self._loop.call_later(_LOOK_INTERVAL, look, context=context)


def open_pidfd(pid: int) -> int | None:
    """A descriptor of a process; None on an old or another system, in a sandbox, or when descriptors have run out."""
    if sys.platform == "linux":
        try:
            return os.pidfd_open(pid)
        except (AttributeError, OSError):  # a Python that was built on an older system does not have it
            pass
    return None


@overload
def take_exit_status(process: subprocess.Popen[bytes]) -> int: ...
@overload
def take_exit_status(process: subprocess.Popen[bytes], *, block: bool) -> int | None: ...
def take_exit_status(process: subprocess.Popen[bytes], *, block: bool = True) -> int | None:
    """The exit status of `process`, negative for a signal.  Waits for it; with `block` False, None if it still runs."""
    if sys.platform == "win32":
        return process.wait() if block else process.poll()
    # Popen may have taken it already: asked by the user, or by close().
    if process.returncode is None:
        try:
            pid, status = os.waitpid(process.pid, 0 if block else os.WNOHANG)
        except ChildProcessError:
            if process.returncode is None:
                _logger.warning("Unknown child process pid %d, will report returncode 255", process.pid)
                return UNKNOWN_STATUS
        else:
            if pid == 0:
                return None
            process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode


class SubprocessMethods(asyncio.BaseEventLoop):
    """The part of the loop that starts processes; BaseEventLoop's ``subprocess_exec`` and ``_shell`` call it."""

    _proactor: Proactor

    async def _make_subprocess_transport(
        self,
        protocol: asyncio.SubprocessProtocol,
        args: Any,
        shell: bool,
        stdin: Any,
        stdout: Any,
        stderr: Any,
        bufsize: int,
        extra: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> SubprocessTransport:
        if sys.platform == "win32" and WaitForHandle not in self._proactor.driver.kinds:
            raise NotImplementedError(f"driver {self._proactor.driver.name} has no subprocesses on Windows; iocp has")
        waiter = self.create_future()
        transport = SubprocessTransport(
            self, protocol, args, shell, stdin, stdout, stderr, bufsize, waiter=waiter, extra=extra, **kwargs
        )
        transport.watch_exit(self._proactor)
        try:
            await waiter
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException:
            # Nobody will ever hold the transport: the process must not outlive the attempt.
            transport.close()
            await transport._wait()
            raise
        return transport
