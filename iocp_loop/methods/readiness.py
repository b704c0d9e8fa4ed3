"""add_reader and add_writer: callbacks for descriptors that libraries read and write by themselves.

Each watched direction of a descriptor is one :class:`~iocp_loop.operations.ReadinessStream`.  Its completions run the
callback's Handle, so that the callback has its own context and its errors are reported as asyncio reports them.

As with asyncio's selector loop: one callback for each direction, a second one replaces the first, and the watch is
level-triggered.  Beyond it: adding a callback always looks at the descriptor anew, so one that was closed behind the
loop's back, and whose number came back with another file, is watched correctly.
"""

from __future__ import annotations

import asyncio
import contextvars
import errno
import weakref
from collections.abc import Callable
from typing import Any, TypeVarTuple

from ..debugging import context_for
from ..operations import READABLE, WRITABLE, HandleLike, Operation, fileno
from ..proactor import Proactor

__all__ = ["ReadinessMethods"]


_Args = TypeVarTuple("_Args")


class _Watch:
    """One direction of one descriptor: the Handle to run, and the stream that tells when."""

    __slots__ = ("handle", "source", "stream")

    def __init__(self, source: HandleLike, handle: asyncio.Handle) -> None:
        self.source = source
        self.handle = handle
        self.stream: Operation | None = None


class ReadinessMethods(asyncio.BaseEventLoop):
    """The part of the loop that watches descriptors for others."""

    _proactor: Proactor
    _transport_refs: dict[int, weakref.ref[asyncio.BaseTransport]]
    _ensure_fd_no_transport: Callable[[HandleLike], None]
    _closed: bool  # BaseEventLoop's

    def __init__(self) -> None:
        super().__init__()
        self._readers: dict[int, _Watch] = {}
        self._writers: dict[int, _Watch] = {}

    def add_reader(self, fd: HandleLike, callback: Callable[[*_Args], Any], *args: *_Args) -> None:
        """Call ``callback(*args)`` whenever `fd` is readable, until it is removed; replaces an earlier callback.

        `fd` is a number or an object with ``fileno()``.  Raises ValueError if it is neither, RuntimeError if the
        loop is closed or a transport of it owns `fd`, OSError if the system can't watch it (PermissionError: a regular
        file).
        """
        self._watch(self._readers, READABLE, fd, callback, args)

    def remove_reader(self, fd: HandleLike) -> bool:
        """Stop calling the reader of `fd`, also if it is due in this turn; False if there was none.

        A socket that was closed first can still be removed, once; after that, and where `fd` is neither a number nor an
        object with ``fileno()``, ValueError is raised.
        """
        return self._unwatch(self._readers, fd)

    def add_writer(self, fd: HandleLike, callback: Callable[[*_Args], Any], *args: *_Args) -> None:
        """Call ``callback(*args)`` whenever `fd` is writable; see :meth:`add_reader`."""
        self._watch(self._writers, WRITABLE, fd, callback, args)

    def remove_writer(self, fd: HandleLike) -> bool:
        """Stop calling the writer of `fd`; see :meth:`remove_reader`."""
        return self._unwatch(self._writers, fd)

    def _watch(
        self,
        table: dict[int, _Watch],
        events: int,
        source: HandleLike,
        callback: Callable[..., Any],
        args: tuple[Any, ...],
    ) -> None:
        # Libraries come here for each of their waits: what needs no frame has none.
        debug = self.get_debug()
        if self._closed:
            self._check_closed()  # type: ignore[attr-defined]  # BaseEventLoop's
        if debug:
            self._check_thread()  # type: ignore[attr-defined]  # BaseEventLoop's
        fd = fileno(source)
        if fd in self._transport_refs:
            self._ensure_fd_no_transport(source)
        # In debug mode it is none, but measures as BaseEventLoop measures Handles.
        context: Any = context_for(self) if debug else contextvars.copy_context()
        watch = _Watch(source, asyncio.Handle(callback, args, self, context))

        def ready(value: Any, error: BaseException | None) -> None:
            if error is None:
                # Now, not with the next turn: whether the descriptor is still ready is looked at before that.
                handle = watch.handle
                if not handle._cancelled:
                    handle._run()
            elif table.get(fd) is watch:
                del table[fd]
                self._report_lost_watch(watch, error)

        earlier = table.pop(fd, None)
        if earlier is not None:
            self._end(earlier)
        begin = self._proactor.watch_natively
        watch.stream = None if begin is None else begin(fd, fd, events, ready)
        if watch.stream is None:
            watch.stream = self._proactor.readiness_stream(fd, events, ready)
        table[fd] = watch

    def _unwatch(self, table: dict[int, _Watch], source: HandleLike) -> bool:
        if self._closed:
            return False
        if self.get_debug():
            self._check_thread()  # type: ignore[attr-defined]  # BaseEventLoop's
        try:
            fd = fileno(source)
        except ValueError:
            known = _number_of_closed(table, source)
            if known is None:
                raise
            fd = known
        if fd in self._transport_refs:
            self._ensure_fd_no_transport(fd)
        watch = table.pop(fd, None)
        if watch is None:
            return False
        self._end(watch)
        return True

    def _end(self, watch: _Watch) -> None:
        watch.handle.cancel()
        stream, watch.stream = watch.stream, None  # which refers to the watch
        if stream is not None and not self._proactor.drop(stream):
            self._proactor.cancel(stream)

    def _report_lost_watch(self, watch: _Watch, error: BaseException) -> None:
        watch.handle.cancel()
        # The loop is closing, or the descriptor is closed: a selector drops those silently too.
        if not (isinstance(error, OSError) and error.errno in (errno.ECANCELED, errno.EBADF)):
            self.call_exception_handler(
                {
                    "message": f"Watching {watch.source!r} failed",
                    "exception": error,
                    "handle": watch.handle,
                }
            )


def _number_of_closed(table: dict[int, _Watch], source: HandleLike) -> int | None:
    """The number that `source` is watched under, which has lost its own; None: it is not watched."""
    for fd, watch in table.items():
        if watch.source is source:
            return fd
    return None
