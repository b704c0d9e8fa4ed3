"""Loops with a fault each, for the test that the fuzzers find faults: ``--loops tests.fuzz.planted:drops_a_byte``."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import iocp_loop

__all__ = ["calls_twice", "crashes", "differs", "drops_a_byte", "ends", "hangs", "leaks", "reports"]


class _Faulty(iocp_loop.IocpEventLoop):
    """Has `spoil` called with each new stream transport."""

    spoil: Callable[[Any], object]

    def _make_socket_transport(self, *arguments: Any, **more: Any) -> Any:
        transport = super()._make_socket_transport(*arguments, **more)
        self.spoil(transport)
        return transport


def _loop(spoil: Callable[[Any], object]) -> asyncio.AbstractEventLoop:
    loop = _Faulty()
    loop.spoil = spoil
    return loop


def drops_a_byte() -> asyncio.AbstractEventLoop:
    """Of long pieces the last byte is lost."""

    def spoil(transport: Any) -> None:
        write = transport.write
        transport.write = lambda data: write(data[:-1] if len(data) > 10 else data)

    return _loop(spoil)


def calls_twice() -> asyncio.AbstractEventLoop:
    """connection_lost is called once more than it should be."""

    def spoil(transport: Any) -> None:
        lose = transport._call_connection_lost

        def lose_twice(exc: BaseException | None) -> None:
            protocol = transport.get_protocol()
            lose(exc)
            protocol.connection_lost(exc)

        transport._call_connection_lost = lose_twice

    return _loop(spoil)


def leaks() -> asyncio.AbstractEventLoop:
    """Each connection leaves a descriptor open."""
    return _loop(lambda transport: os.open(os.devnull, os.O_RDONLY))


def reports() -> asyncio.AbstractEventLoop:
    """The exception handler hears what it should not."""
    return _loop(lambda transport: transport._loop.call_exception_handler({"message": "a planted fault"}))


def ends() -> asyncio.AbstractEventLoop:
    """An exception comes out of the loop."""
    loop = _loop(lambda transport: None)
    loop.call_later(0.001, sys.exit)
    return loop


def differs() -> asyncio.AbstractEventLoop:
    """A transport says that it reads when it does not: nothing else is wrong, but asyncio's own does not say so."""

    def spoil(transport: Any) -> None:
        transport.is_reading = lambda: True

    return _loop(spoil)


def hangs() -> asyncio.AbstractEventLoop:
    """The loop stops to turn."""
    return _loop(lambda transport: time.sleep(1000))


def crashes() -> asyncio.AbstractEventLoop:
    """The process crashes."""
    return _loop(lambda transport: os.abort())
