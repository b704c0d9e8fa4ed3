"""add_signal_handler: signals as callbacks of the loop.

Python's own handler, written in C, puts the number of each signal as one byte into the *wakeup descriptor*
(:func:`signal.set_wakeup_fd`).  Here that is one end of a socket pair; the loop receives from the other end by an
ordinary stream, so a signal is a completion like any other and ends the loop's wait.

There is one wakeup descriptor for the whole process, and several loops may want it.  They form a chain: each remembers
whose place it took, and gives the place back when it is done.  One that is done earlier than its successor takes
itself out of the middle, so no loop's signals are lost because another loop was closed.

On Windows a signal that another thread of the program raises ends no wait, as no thread is interrupted by it.  There a
loop that runs in the main thread holds the place for as long as it runs, if nobody else does: what comes ends its wait,
and the signal's handler in Python (KeyboardInterrupt) runs at once, as in asyncio's own loop there.

Windows has three signals that a program can expect: SIGINT (Ctrl-C), SIGBREAK (Ctrl-Break) and SIGTERM, which only the
program itself can send, by :func:`signal.raise_signal`.  A closed console, a log-off and a shutdown are SIGBREAK, as in
the C runtime; or SIGTERM, where a loop has a handler for that and none for SIGBREAK.  They leave the program some
seconds (5 when the console is closed) to end by itself, see ``_native/windows/console.c``.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import errno
import functools
import inspect
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVarTuple

from ..operations import Operation
from ..ports.iocp.binding import lib

if TYPE_CHECKING:  # only: os keeps what it calls after a fork, and with that all that this module has
    from ..proactor import Proactor

__all__ = ["SignalMethods"]


_Args = TypeVarTuple("_Args")


class _Wakeup:
    """A socket pair whose one end can be the process's wakeup descriptor."""

    #: Those that hold the place or wait to get it back, in the order in which they took it.
    chain: list[_Wakeup] = []  # noqa: RUF012 - shared on purpose: there is one place in a process

    def __init__(self) -> None:
        self.reader, self._writer = socket.socketpair()
        self.reader.setblocking(False)
        self._writer.setblocking(False)
        self._previous = -1

    @property
    def held(self) -> bool:
        """True from ``hold`` to ``release``."""
        return self in self.chain

    def hold(self) -> None:
        """Become the wakeup descriptor.  ValueError outside the main thread."""
        if not self.held:
            # A full buffer is no news: the loop has so many signals to look at already.
            self._previous = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            self.chain.append(self)

    def hold_if_free(self) -> bool:
        """Become the wakeup descriptor unless there is one already.  ValueError outside the main thread."""
        if self.chain:
            return False
        self.hold()
        if self._previous != -1:
            self.release()
        return self.held

    def release(self) -> None:
        """Give the place back to whoever had it before, or leave the chain.  ValueError outside the main thread."""
        if not self.held:
            return
        mine = self._writer.fileno()
        current = _place(self._previous)
        if current != mine:
            _place(current)
            for other in self.chain:
                if other._previous == mine:
                    other._previous = self._previous
        self.chain.remove(self)

    def close(self) -> None:
        """Close both ends; not while the place is held."""
        self.reader.close()
        self._writer.close()

    @classmethod
    def forget_in_child(cls) -> None:
        """After a fork: the socket pairs are the parent's, and a signal to the child is not for it."""
        if cls.chain:
            with contextlib.suppress(ValueError):  # forked from another thread, which is the main one of the child
                signal.set_wakeup_fd(-1)
            cls.chain.clear()


@functools.cache
def _waker() -> _Wakeup | None:
    """What a loop holds while it runs, on Windows.  One for all loops: they run one after another.

    None where no socket pair is available, as a firewall may forbid it: then such a signal waits until the loop wakes.
    """
    try:
        wakeup = _Wakeup()
    except OSError:
        return None
    atexit.register(wakeup.close)
    return wakeup


def _hold_while_running() -> _Wakeup | None:
    """The waker, as the wakeup descriptor; None where that is somebody else, and where no signal is dealt with."""
    if threading.current_thread() is not threading.main_thread():
        return None
    waker = _waker()
    try:
        return waker if waker is not None and waker.hold_if_free() else None
    except ValueError:  # a subinterpreter, whose main thread is none for signals
        return None


def _place(fd: int) -> int:
    """Make `fd` the wakeup descriptor, or none if it was closed meanwhile; what it was before."""
    try:
        return signal.set_wakeup_fd(fd, warn_on_full_buffer=False)
    except (OSError, ValueError):  # ValueError: it is no socket, or blocks; or this is not the main thread
        return signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_Wakeup.forget_in_child)


def _python_handler(number: int, frame: Any) -> None:
    """Stands for the Python part of a handler: the byte in the wakeup descriptor does the work."""


class SignalMethods(asyncio.BaseEventLoop):
    """The part of the loop that turns signals into callbacks."""

    _proactor: Proactor

    def __init__(self) -> None:
        super().__init__()
        self._signal_handlers: dict[int, asyncio.Handle] = {}
        self._wakeup: _Wakeup | None = None
        self._signal_stream: Operation | None = None

    def add_signal_handler(self, sig: int, callback: Callable[[*_Args], Any], *args: *_Args) -> None:
        """Call ``callback(*args)`` in the loop for each signal `sig`; replaces an earlier callback.

        Only in the main thread of the process.  Raises TypeError if `sig` is no int or `callback` a coroutine function,
        ValueError if there is no such signal, RuntimeError if it can't be caught, or not from this thread.
        """
        if inspect.iscoroutinefunction(callback) or inspect.iscoroutine(callback):
            raise TypeError("coroutines cannot be used with add_signal_handler()")
        _check_signal(sig)
        self._check_closed()  # type: ignore[attr-defined]  # BaseEventLoop's
        try:
            self._listen_for_signals()
        except (ValueError, OSError) as exc:
            raise RuntimeError(str(exc)) from exc
        try:
            signal.signal(sig, _python_handler)
            if hasattr(signal, "siginterrupt"):
                # System calls in other code go on after the signal; the loop's own wait ends all the same.
                signal.siginterrupt(sig, False)
        except OSError as exc:
            self._release_wakeup_if_unused()
            if exc.errno == errno.EINVAL:
                raise RuntimeError(f"sig {sig} cannot be caught") from exc
            raise
        except ValueError as exc:  # Windows knows the number, but has no such signal
            self._release_wakeup_if_unused()
            raise RuntimeError(f"sig {sig} cannot be caught: {exc}") from exc
        _name_closing_signal()
        earlier = self._signal_handlers.get(sig)
        self._signal_handlers[sig] = asyncio.Handle(callback, args, self)
        if earlier is not None:
            earlier.cancel()

    def remove_signal_handler(self, sig: int) -> bool:
        """Give `sig` its default action back (SIGINT: KeyboardInterrupt); False if this loop had no handler for it."""
        _check_signal(sig)
        handle = self._signal_handlers.pop(sig, None)
        if handle is None:
            return False
        handle.cancel()
        try:
            signal.signal(sig, signal.default_int_handler if sig == signal.SIGINT else signal.SIG_DFL)
        except OSError as exc:
            if exc.errno == errno.EINVAL:
                raise RuntimeError(f"sig {sig} cannot be caught") from exc
            raise
        finally:
            _name_closing_signal()
            self._release_wakeup_if_unused()
        return True

    if sys.platform == "win32":
        _waited: bool

        def run_forever(self) -> None:
            """Run until ``stop`` is called."""
            waker = None if self._waited or self.is_closed() else _hold_while_running()
            if waker is None:
                super().run_forever()
                return
            try:
                with contextlib.suppress(OSError):  # it works without, too
                    self._proactor.driver.hear(waker.reader)
                super().run_forever()
            finally:
                waker.release()

    def _listen_for_signals(self) -> None:
        if self._wakeup is not None:
            return
        wakeup = _Wakeup()

        def received(data: bytes, error: BaseException | None) -> None:
            if error is None:
                self._run_signal_handlers(data)
            elif not wakeup.held:
                wakeup.close()

        try:
            wakeup.hold()
            self._signal_stream = self._proactor.receive_stream(wakeup.reader, received)
        except BaseException:
            wakeup.release()
            wakeup.close()
            raise
        self._wakeup = wakeup

    def _release_wakeup_if_unused(self) -> None:
        wakeup, stream = self._wakeup, self._signal_stream
        if wakeup is not None and stream is not None and not self._signal_handlers:
            wakeup.release()
            self._wakeup = self._signal_stream = None
            self._proactor.cancel(stream)

    def _run_signal_handlers(self, numbers: bytes) -> None:
        for number in numbers:
            handle = self._signal_handlers.get(number)
            if handle is not None:
                self._add_callback(handle)  # type: ignore[attr-defined]  # BaseEventLoop's

    def _close_signals(self) -> None:
        """Remove every handler; for ``close``, before the port is closed."""
        with contextlib.suppress(ValueError):  # not the main thread: there signals can't be changed
            for sig in list(self._signal_handlers):
                self.remove_signal_handler(sig)
        self._signal_handlers.clear()


def _name_closing_signal() -> None:
    """Windows: tell which signal the end of the console or of the session is to be."""
    if sys.platform == "win32" and lib is not None:
        ours = [sig for sig in (signal.SIGBREAK, signal.SIGTERM) if signal.getsignal(sig) is _python_handler]
        lib.iocp_start()
        lib.iocp_set_closing_signal(ours[0] if ours else 0)


def _check_signal(sig: int) -> None:
    if not isinstance(sig, int):
        raise TypeError(f"sig must be an int, not {sig!r}")
    if sig not in signal.valid_signals():
        raise ValueError(f"invalid signal number {sig}")
