"""What the driver ``poll`` waits in, on each system: a poller, and a waker.

A poller: ``watch(fd, old events, new events)``, ``poll(timeout)``, which gives ``[(fd, events)]``, and ``close()``.  A
waker: a descriptor that becomes readable when another thread wants the wait to end.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import selectors
import socket

from ...operations import READABLE, WRITABLE

__all__ = ["EDGES", "EpollPoller", "EventfdWaker", "SelectorPoller", "SocketWaker", "make_poller", "make_waker"]

#: With an event, of epoll: tell of each change, and not as long as the event holds.
EDGES = getattr(select, "EPOLLET", 0)


class EpollPoller:
    """Linux's epoll; its event bits are those of poll(2), which are ours."""

    #: True where a wait does not notice what another thread has begun to watch meanwhile.
    looks_once = False

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self.fileno = self._epoll.fileno

    def watch(self, fd: int, old: int, new: int) -> None:
        epoll = self._epoll
        if not new:
            epoll.unregister(fd)
        elif not old:
            try:
                epoll.register(fd, new)
            except FileExistsError:
                epoll.modify(fd, new)
        else:
            epoll.modify(fd, new)

    def poll(self, timeout: float | None) -> list[tuple[int, int]]:
        if timeout == 0:
            return self._epoll.poll(0, 1024)
        # epoll counts milliseconds: round up, so that a timer is never early.
        seconds = -1 if timeout is None else math.ceil(timeout * 1000) / 1000
        try:
            return self._epoll.poll(seconds, 1024)
        except InterruptedError:
            return []

    def close(self) -> None:
        self._epoll.close()


class SelectorPoller:
    """kqueue, poll or select, by way of :mod:`selectors`."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self.looks_once = not hasattr(select, "kqueue")

    def watch(self, fd: int, old: int, new: int) -> None:
        bits = (selectors.EVENT_READ if new & READABLE else 0) | (selectors.EVENT_WRITE if new & WRITABLE else 0)
        if not new:
            with contextlib.suppress(KeyError):
                self._selector.unregister(fd)
        elif fd in self._selector.get_map():
            self._selector.modify(fd, bits)
        else:
            self._selector.register(fd, bits)

    def poll(self, timeout: float | None) -> list[tuple[int, int]]:
        try:
            ready = self._selector.select(timeout)
        except OSError:
            closed = self._closed()
            if not closed:
                raise
            return closed
        return [
            (
                key.fd,
                (READABLE if bits & selectors.EVENT_READ else 0) | (WRITABLE if bits & selectors.EVENT_WRITE else 0),
            )
            for key, bits in ready
        ]

    def _closed(self) -> list[tuple[int, int]]:
        """Descriptors closed behind our back, for which select() refuses all; as ready, so that their calls fail."""
        closed = []
        for key in list(self._selector.get_map().values()):
            try:
                select.select([key.fd], [], [], 0)
            except OSError:
                self._selector.unregister(key.fd)
                closed.append((key.fd, READABLE | WRITABLE))
        return closed

    def close(self) -> None:
        self._selector.close()


def make_poller() -> EpollPoller | SelectorPoller:
    """The best poller of this system."""
    return EpollPoller() if hasattr(select, "epoll") else SelectorPoller()


class EventfdWaker:
    """Linux's eventfd(2): one descriptor, a counter."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def fileno(self) -> int:
        return self._fd

    def wake(self) -> None:
        try:
            os.eventfd_write(self._fd, 1)
        except BlockingIOError:  # full: then a wake is on its way already
            pass

    def drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._fd)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    __del__ = close  # once, whoever comes first


class SocketWaker:
    """A socket pair, for systems without eventfd; select() on Windows takes nothing but sockets."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    def fileno(self) -> int:
        return self._reader.fileno()

    def wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: then a wake is on its way already
            self._writer.send(b"\0")

    def drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._reader.recv(4096)

    def close(self) -> None:
        self._reader.close()
        self._writer.close()


def make_waker() -> EventfdWaker | SocketWaker:
    """The cheapest waker of this system."""
    return EventfdWaker() if hasattr(os, "eventfd") else SocketWaker()
