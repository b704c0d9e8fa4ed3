"""Subprocess transports: a child process, its pipes, and the news that it has exited.

asyncio's own base class brings the protocol of the pipes and of the exit.  This module starts the process and watches
it.  On Linux a process has a descriptor (pidfd_open(2)) that becomes readable when it exits: one more readiness
operation, without a signal handler, without a child watcher, and in any thread.  Where there is no such descriptor, a
thread waits for the process.  On Windows a process has a handle, and waiting for it is an operation too; the pipes are
asyncio's own there, whose end on our side has overlapped I/O.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import subprocess
import sys
import threading
from asyncio import base_subprocess
from typing import Any

from .operations import READABLE, Readiness, WaitForHandle
from .proactor import Proactor

if sys.platform == "win32":
    from asyncio import windows_utils as popen
else:
    import subprocess as popen

__all__ = ["SubprocessMethods", "SubprocessTransport"]

_logger = logging.getLogger("asyncio")

#: The exit status of a process whose real one somebody else has taken; as in asyncio's child watchers.
UNKNOWN_STATUS = 255


class SubprocessTransport(base_subprocess.BaseSubprocessTransport):
    """A running process with its pipes, as an asyncio SubprocessTransport."""

    _loop: asyncio.AbstractEventLoop
    _proc: subprocess.Popen[bytes] | None
    _pipes: dict[int, Any]

    def _start(self, args: Any, shell: bool, stdin: Any, stdout: Any, stderr: Any, bufsize: int, **kwargs: Any) -> None:
        self._proc = popen.Popen(
            args, shell=shell, stdin=stdin, stdout=stdout, stderr=stderr, bufsize=bufsize, **kwargs
        )

    def close(self) -> None:
        """Close the pipes and kill the process if it still runs."""
        if self._loop is not None and self._loop.is_closed():
            # No loop is left to close pipes on; that of Python 3.11 would raise.  Each closes when it is collected.
            self._pipes.clear()
        super().close()

    def watch_exit(self, proactor: Proactor) -> None:
        """Have the loop told when the process exits.  Call it once, after the transport was made."""
        process: Any = self._proc
        if sys.platform == "win32":
            self._watch_handle(proactor, process)
        else:
            self._watch_descriptor(proactor, process)

    def _watch_handle(self, proactor: Proactor, process: Any) -> None:
        def exited(value: Any, error: OSError | None) -> None:
            if error is None:
                self._process_exited(process.poll())

        # The operation refers to the handle, so that it stays open until the wait is over.
        proactor.start(WaitForHandle(process._handle), exited)

    def _watch_descriptor(self, proactor: Proactor, process: Any) -> None:
        pidfd = open_pidfd(process.pid)
        if pidfd is None:
            self._watch_by_thread(process)
            return

        def exited(events: Any, error: OSError | None) -> None:
            os.close(pidfd)
            if error is None:
                self._process_exited(take_exit_status(process))

        try:
            proactor.start(Readiness(pidfd, READABLE), exited)
        except OSError:
            os.close(pidfd)
            self._watch_by_thread(process)

    def _watch_by_thread(self, process: subprocess.Popen[bytes]) -> None:
        loop = self._loop

        def wait() -> None:
            status = take_exit_status(process)
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits any more
                loop.call_soon_threadsafe(self._process_exited, status)

        threading.Thread(target=wait, name=f"wait for process {process.pid}", daemon=True).start()


def open_pidfd(pid: int) -> int | None:
    """A descriptor of a process; None on an old or another system, in a sandbox, or when descriptors have run out."""
    if sys.platform == "linux":
        try:
            return os.pidfd_open(pid)
        except OSError:
            pass
    return None


def take_exit_status(process: subprocess.Popen[bytes]) -> int:
    """Wait for `process` and return its exit status, negative for a signal."""
    # Popen may have taken it already: asked by the user, or by close().
    if process.returncode is None:
        try:
            _, status = os.waitpid(process.pid, 0)
        except ChildProcessError:
            if process.returncode is None:
                _logger.warning("Unknown child process pid %d, will report returncode 255", process.pid)
                return UNKNOWN_STATUS
        else:
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
        if sys.platform == "win32" and self._proactor.driver.name != "iocp":
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
