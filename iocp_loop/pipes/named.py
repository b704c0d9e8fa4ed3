"""Named pipes on Windows: listening for clients, and connecting to a server.

A named pipe has *instances*.  A server makes some, and each takes one client, which it then belongs to.  So a server
that listens has several that wait, and makes another as soon as a client has come; that no client is turned away with
ERROR_PIPE_BUSY depends on their number, as it does on the backlog of a socket.

It survives what goes wrong with one client, as the listener of sockets does (endpoints/listener.py).

The pipes are in byte mode, so a message has no bounds and nothing cuts one; clients of other machines are refused.
"""

from __future__ import annotations

import asyncio
import sys
from asyncio import windows_utils
from collections.abc import Callable
from typing import Any, TypeAlias

from .. import operations as ops
from ..debugging import context_for
from ..endpoints.listener import RETRY_DELAY
from ..operations import was_cancelled
from ..proactor import Proactor

if sys.platform != "win32":
    raise ImportError("named pipes of this kind exist on Windows")

import _winapi

from ..ports.iocp import handles

__all__ = ["PipeServer", "connect"]

#: asyncio's PipeHandle, of which typeshed tells on Windows only.
_Pipe: TypeAlias = Any

#: How many instances wait for clients at once.
DEPTH = 8

#: Bytes that the system keeps for each direction of an instance before a writer has to wait.
BUFFER_SIZE = 64 * 1024

#: Seconds between two tries to connect while no instance is free: at first, and at most.
FIRST_DELAY = 0.001
LONGEST_DELAY = 0.1


async def connect(address: str) -> _Pipe:
    r"""The client's end of the named pipe `address` (``\\.\pipe\name``); waits while no instance is free.

    FileNotFoundError if nobody serves it.
    """
    delay = FIRST_DELAY
    while True:
        try:
            return windows_utils.PipeHandle(handles.connect_pipe(address))
        except OSError as exc:
            if exc.winerror != handles.PIPE_BUSY:
                raise
        await asyncio.sleep(delay)
        delay = min(2 * delay, LONGEST_DELAY)


def _is_abandoned(pipe: _Pipe) -> bool:
    """Whether the client has left and has written nothing, as who only asks whether there is such a pipe does."""
    try:
        _winapi.PeekNamedPipe(pipe.fileno())
    except OSError as exc:
        return isinstance(exc, BrokenPipeError)
    return False


class PipeServer:
    """A named pipe that is served; what ``start_serving_pipe`` returns.

    `welcome(pipe)` makes the protocol and the transport of a client; if it raises, the client's pipe is closed, the
    error is reported, and the server goes on.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        proactor: Proactor,
        address: str,
        welcome: Callable[[_Pipe], object],
    ) -> None:
        self.address = address
        self._loop = loop
        self._proactor = proactor
        self._welcome = welcome
        self._context = context_for(loop)
        self._waiting: dict[_Pipe, ops.AcceptPipe] = {}
        self._closed = False
        self._in_shortage = False
        self._retry: asyncio.TimerHandle | None = None
        self._add_instance(first=True)
        self._refill()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {'closed' if self._closed else 'open'} {self.address!r}>"

    def closed(self) -> bool:
        """True once ``close`` was called."""
        return self._closed

    def close(self) -> None:
        """Take no more clients.  Those that are connected stay so."""
        if self._closed:
            return
        self._closed = True
        if self._retry is not None:
            self._retry.cancel()
        for pipe, op in self._waiting.items():
            self._proactor.cancel(op)
            if not op.in_flight or self._proactor.let_go():
                # At once: from now on there is nothing of that name to connect to.
                pipe.close()

    def _add_instance(self, *, first: bool = False) -> None:
        pipe = windows_utils.PipeHandle(handles.serve_pipe(self.address, first=first, buffer_size=BUFFER_SIZE))
        op = ops.AcceptPipe(pipe)
        try:
            self._proactor.start(op, lambda _, error: self._accepted(pipe, error))
        except BaseException:
            pipe.close()
            raise
        self._waiting[pipe] = op

    def _refill(self) -> None:
        """Have as many instances wait as there should be."""
        self._retry = None
        try:
            while len(self._waiting) < DEPTH and not self._closed:
                self._add_instance()
        except OSError as exc:
            if not self._in_shortage:
                self._in_shortage = True
                self._report("Pipe accept failed: no new instance can be made", exc)
            self._retry = self._loop.call_later(RETRY_DELAY, self._refill)
        else:
            self._in_shortage = False

    def _accepted(self, pipe: _Pipe, error: BaseException | None) -> None:
        del self._waiting[pipe]
        if self._closed or (error is not None and was_cancelled(error)):
            pipe.close()
            return
        if self._retry is None:
            self._refill()  # first of all: the next client may be there already
        if error is None and not _is_abandoned(pipe):
            self._welcome_client(pipe)
            return
        pipe.close()
        if error is not None and not isinstance(error, ConnectionError):  # that one is a client that came and left
            self._report("Pipe accept failed", error)

    def _welcome_client(self, pipe: _Pipe) -> None:
        try:
            self._context.copy().run(self._welcome, pipe)
        except (SystemExit, KeyboardInterrupt):
            pipe.close()
            raise
        except BaseException as exc:
            pipe.close()
            self._report("Error on transport creation for incoming connection", exc)

    def _report(self, message: str, exc: BaseException) -> None:
        context: dict[str, Any] = {"message": message, "exception": exc, "pipe": self.address}
        self._loop.call_exception_handler(context)
