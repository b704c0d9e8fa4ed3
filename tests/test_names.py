"""getaddrinfo: numbers are read at once, with the results and errors of the socket module; names go to a thread."""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import iocp_loop

Loop = iocp_loop.IocpEventLoop


class AskedElsewhere(Exception):
    """The executor was asked."""


def outcome(look_up: Any, *arguments: Any) -> Any:
    try:
        return look_up(*arguments)
    except AskedElsewhere:
        return AskedElsewhere
    except Exception as error:
        return type(error), error.args


def asked(loop: Loop, *arguments: Any) -> Any:
    """What the loop answers, the executor being asked in place, and whether that was."""
    asked = []

    async def in_place(executor: None, look_up: Any, *arguments: Any) -> Any:
        asked.append(look_up)
        return look_up(*arguments)

    host, port, family, kind, proto, flags = arguments

    def ask() -> Any:
        return loop.run_until_complete(loop.getaddrinfo(host, port, family=family, type=kind, proto=proto, flags=flags))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "run_in_executor", in_place)
        return outcome(ask), bool(asked)


LITERALS = [
    "127.0.0.1",
    "127.1",
    "0x7f.1",
    "2130706433",
    "0177.0.0.01",
    "::1",
    "::ffff:1.2.3.4",
    "fe80::1%lo",
    "fe80::1%1",
]
ADDRESSES = st.one_of(st.sampled_from(LITERALS), st.ip_addresses().map(str))
HOSTS = st.one_of(ADDRESSES, ADDRESSES.map(str.encode), st.none())
PORTS = st.one_of(
    st.none(),
    st.integers(-2, 70000),
    st.sampled_from(["", "80", b"443", "080", "65536", " 80", "8O", "٣"]),
    st.booleans(),
)
FLAGS = [0, socket.AI_PASSIVE, socket.AI_NUMERICHOST, socket.AI_CANONNAME, socket.AI_ADDRCONFIG, 1 << 30]
KINDS = st.sampled_from([0, socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW, 77])


@pytest.fixture(scope="module")
def plain() -> Any:
    with asyncio.Runner(loop_factory=iocp_loop.new_event_loop) as runner:
        yield runner.get_loop()


@given(
    host=HOSTS,
    port=PORTS,
    family=st.sampled_from([0, socket.AF_INET, socket.AF_INET6, 99]),
    kind=KINDS,
    proto=st.sampled_from([0, socket.IPPROTO_TCP, socket.IPPROTO_UDP]),
    flags=st.sampled_from(FLAGS),
)
@example(host=None, port=None, family=0, kind=0, proto=0, flags=0)
@example(host="::1", port=80, family=socket.AF_INET, kind=socket.SOCK_STREAM, proto=0, flags=0)
def test_what_is_numeric_is_as_of_the_socket_module(
    plain: Loop, host: Any, port: Any, family: int, kind: int, proto: int, flags: int
) -> None:
    arguments = host, port, family, kind, proto, flags
    expected = outcome(socket.getaddrinfo, *arguments)
    for _ in range(2):  # the second time it may be remembered
        answer, _ = asked(plain, *arguments)
        assert answer == expected
        if isinstance(answer, list):
            assert [[type(part) for part in info] for info in answer] == [
                [type(part) for part in info] for info in expected
            ]


@pytest.mark.parametrize("host", ["127.0.0.1", b"127.0.0.1", "127.1", "::1", None])
@pytest.mark.parametrize("port", [80, "80", b"80", None, 0])
def test_no_thread_is_asked_for_numbers(plain: Loop, host: Any, port: Any) -> None:
    if host is None and port is None:
        pytest.skip("an error, which is told by the thread")
    answer, elsewhere = asked(plain, host, port, 0, socket.SOCK_STREAM, 0, 0)
    assert answer == socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)
    assert not elsewhere


@pytest.mark.parametrize(
    ("host", "port"),
    [
        ("localhost", 80),
        ("", 80),
        ("127.0.0.1", "http"),
        ("\uff11\uff12\uff17.0.0.1", 80),  # IDNA makes it a number
        ("1.example.invalid", 80),
        ("a:b", 80),
        ("::g", 80),
        ("256.1.1.1", 80),
        ("fe80::1%nothing", 80),
        (bytearray(b"127.0.0.1"), 80),
    ],
)
def test_names_go_to_the_executor(plain: Loop, host: Any, port: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere(*arguments: Any) -> Any:
        assert arguments[2:4] == (host, port)
        raise AskedElsewhere

    monkeypatch.setattr(plain, "run_in_executor", elsewhere)
    with pytest.raises(AskedElsewhere):
        plain.run_until_complete(plain.getaddrinfo(host, port))


async def test_the_result_is_the_callers_own(loop: Loop) -> None:
    first = await loop.getaddrinfo("127.0.0.1", 80, type=socket.SOCK_STREAM)
    first.clear()
    assert len(await loop.getaddrinfo("127.0.0.1", 80, type=socket.SOCK_STREAM)) == 1


async def test_who_replaces_the_function_of_the_socket_module_is_asked(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    await loop.getaddrinfo("127.0.0.1", 80)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments: ["mine"])
    assert await loop.getaddrinfo("127.0.0.1", 80) == ["mine"]


async def test_in_debug_mode_it_is_logged(loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    loop.set_debug(True)
    with caplog.at_level(logging.DEBUG, logger="asyncio"):
        await loop.getaddrinfo("127.0.0.1", 80)
    assert "Get address info 127.0.0.1:80" in caplog.text


def test_a_closed_loop_refuses(driver: str) -> None:
    loop = iocp_loop.new_event_loop(driver)
    loop.close()
    with pytest.raises(RuntimeError, match="Event loop is closed"):
        loop.getaddrinfo("127.0.0.1", 80).send(None)
