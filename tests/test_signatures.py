"""The loop's methods take what asyncio's own take: a table, made by the running Python."""

from __future__ import annotations

import asyncio
import importlib
import inspect
from typing import Any

import pytest

import iocp_loop

from .support import WINDOWS

#: The loop of this system with the most methods; where ProactorEventLoop has others, they are Windows' own.
STOCK = asyncio.SelectorEventLoop

#: What is ours and asyncio does not have; and what only ProactorEventLoop has.
OURS = {"driver", "stats", "poll", "dispatch"}
STOCK_PROACTOR: Any = getattr(asyncio, "ProactorEventLoop", None)
PROACTORS = {"create_pipe_connection", "start_serving_pipe"}


def public(kind: type) -> dict[str, Any]:
    return {name: getattr(kind, name) for name in dir(kind) if not name.startswith("_")}


METHODS = [name for name, value in public(STOCK).items() if callable(value)]


def shape(function: Any) -> list[tuple[str, Any, Any]]:
    """Names, kinds and defaults of the parameters; not their types, which asyncio does not state.

    Without `self`, which is never given by name: methods in C take it by position only.
    """
    parameters = inspect.signature(function).parameters.values()
    return [(one.name, one.kind, one.default) for one in parameters if one.name != "self"]


@pytest.mark.parametrize("name", METHODS)
def test_the_signature_is_asyncios_own(name: str) -> None:
    ours, stock = getattr(iocp_loop.IocpEventLoop, name), getattr(STOCK, name)
    if WINDOWS and "unix" in name:
        pytest.skip("asyncio has only the abstract method on Windows, whose signature is an older one")
    assert shape(ours) == shape(stock)
    assert inspect.iscoroutinefunction(ours) == inspect.iscoroutinefunction(stock)


def test_nothing_public_that_is_not_known() -> None:
    assert set(public(iocp_loop.IocpEventLoop)) - set(public(STOCK)) == OURS | (PROACTORS if WINDOWS else set())


@pytest.mark.skipif(not WINDOWS, reason="ProactorEventLoop exists on Windows only, and named pipes of this kind too")
@pytest.mark.parametrize("name", sorted(PROACTORS))
def test_the_signature_is_that_of_the_proactor_loop(name: str) -> None:
    ours: Any = getattr(iocp_loop.IocpEventLoop, name)
    stock = getattr(STOCK_PROACTOR, name)
    assert shape(ours) == shape(stock)
    assert inspect.iscoroutinefunction(ours) == inspect.iscoroutinefunction(stock)
    assert inspect.getdoc(ours)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in vars(asyncio.BaseEventLoop)])
def test_what_is_ours_is_documented(name: str) -> None:
    assert inspect.getdoc(getattr(iocp_loop.IocpEventLoop, name))


@pytest.mark.parametrize("kind", [asyncio.Transport, asyncio.DatagramTransport])
def test_transports_have_every_method(kind: type) -> None:
    from iocp_loop.endpoints.datagrams import DatagramTransport
    from iocp_loop.transports import SocketTransport

    has_every_method(SocketTransport if kind is asyncio.Transport else DatagramTransport, kind)


@pytest.mark.skipif(not WINDOWS, reason="named pipes of this kind exist on Windows only")
def test_the_transport_of_named_pipes_has_every_method() -> None:
    ours = importlib.import_module("iocp_loop.pipes.windows").DuplexPipeTransport
    has_every_method(ours, asyncio.Transport, inherited=("get_extra_info", "writelines"))


def has_every_method(ours: type, kind: type, inherited: tuple[str, ...] = ("get_extra_info",)) -> None:
    for name, method in public(kind).items():
        assert getattr(ours, name) is not method or name in inherited, name
        assert shape(getattr(ours, name)) == shape(method), name
