"""Readiness on driver ``iocp``: polls of the AFD device."""

from __future__ import annotations

import contextlib
import socket
from typing import Any

from ...operations import CANCELLING, IN_FLIGHT, READABLE
from .binding import ABORTED, INVALID_HANDLE, PENDING, Submission, check, ffi, lib
from .requests import UNDONE, IocpRequests, still_open

__all__ = ["POLLS_PER_DEVICE", "ReadinessRequests"]

#: How many readiness polls share a handle of the AFD device.
POLLS_PER_DEVICE = 500


class ReadinessRequests(IocpRequests):
    """The operations Readiness and ReadinessStream."""

    def __init__(self, concurrency: int = 1) -> None:
        super().__init__(concurrency)
        self._devices: list[_PollDevice] = []
        self._number = ffi.new("uintptr_t *")
        self._ear: Submission | None = None

    def _start_readiness(self, op: Any) -> None:
        base = self._base_socket(op.fd)
        device = self._device_with_room()
        self._launch(op)
        sub = self._take(op, None, self._polled, (device, base))
        device.polls += 1
        self._arm_poll(sub)

    def _base_socket(self, fd: int) -> int:
        check(lib.iocp_base_socket(fd, self._number))
        base: int = self._number[0]
        return base

    def _device_with_room(self) -> _PollDevice:
        for device in reversed(self._devices):
            if device.polls < POLLS_PER_DEVICE:
                return device
        check(lib.iocp_poll_open(self._port, self._number))
        self._devices.append(_PollDevice(self._number[0]))
        return self._devices[-1]

    def _arm_poll(self, sub: Submission) -> None:
        device, base = sub.keep
        sub.armed = True
        code = ABORTED
        if still_open(sub.op):
            code = lib.iocp_poll(device.handle, sub.native, base, sub.op.events)
        if code == PENDING:
            self._outstanding[sub.address] = sub
        else:
            self._at_once.append((sub, 0, code))

    def _polled(self, sub: Submission, count: int, code: int) -> None:
        op = sub.op
        events = lib.iocp_polled(sub.native)
        if code and self._left_undone(op, code):
            self._arm_poll(sub)
            return
        if code == 0 and events & lib.IOCP_CLOSED:
            code = ABORTED if op.state is CANCELLING else INVALID_HANDLE
        if code or op.state is CANCELLING or not op.stream:
            sub.keep[0].polls -= 1
            self._end(sub, self._events_for(op, events), ABORTED if op.state is CANCELLING else code)
            return
        device = sub.keep[0]
        try:
            if value := self._events_for(op, events):
                self.completions += 1
                op.complete(value, None)
        finally:
            if op.state is IN_FLIGHT:
                self._arm_poll(sub)
            else:
                device.polls -= 1

    @staticmethod
    def _events_for(op: Any, events: int) -> int:
        wanted: int = op.events
        return wanted if events & lib.IOCP_FAILED else wanted & events

    # -- a poll of the driver's own, that no operation stands for ----------------------------------

    def hear(self, sock: socket.socket) -> None:
        if self._ear is None:
            keep = self._device_with_room(), self._base_socket(sock.fileno()), sock
            self._ear = self._spare.pop() if self._spare else Submission()
            self._ear.finish = self._heard
            self._ear.keep = keep
            keep[0].polls += 1
        if not self._ear.armed:  # it is new, or a signal's exception has come up just when this one was heard
            self._listen(self._ear)

    def _listen(self, sub: Submission) -> None:
        device, base, _ = sub.keep
        if lib.iocp_poll(device.handle, sub.native, base, READABLE) == PENDING:
            sub.armed = True
            self._outstanding[sub.address] = sub
        else:
            self._stop_listening(sub)

    def _heard(self, sub: Submission, count: int, code: int) -> None:
        sock = sub.keep[2]
        with contextlib.suppress(BlockingIOError):
            while code == 0 and sock.fileno() >= 0 and sock.recv(4096):
                pass  # the wait is over, that was all
        if code not in (0, *UNDONE) or sock.fileno() < 0:
            self._stop_listening(sub)
        else:
            self._listen(sub)

    def _stop_listening(self, sub: Submission) -> None:
        sub.keep[0].polls -= 1
        self._ear = None
        self._give_back(sub)


class _PollDevice:
    """A handle of the AFD device, and how many polls it carries."""

    __slots__ = ("handle", "polls")

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self.polls = 0
