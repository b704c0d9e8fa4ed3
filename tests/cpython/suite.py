"""CPython's own asyncio tests, made to run against IocpEventLoop.

The tests are taken from the ``test`` package of the running interpreter; nothing of them is copied here.  They come in
two shapes.

*Mixins* are what CPython itself runs once for each of its loops.  Here each is subclassed once for each driver, and
``create_event_loop`` or ``new_loop`` returns our loop.

*Whole classes* make their loop by name: ``asyncio.new_event_loop()``, ``asyncio.run``, ``asyncio.SelectorEventLoop()``.
While one of their tests runs, those names lead to our loop too.

In both shapes every loop that runs is noted, and a test in which any loop but ours ran fails; and each class has a test
of our own, that its loop is ours.  The suite cannot pass by testing something else.

Left out are the tests that look into the private parts of one of CPython's loops (its selectors, its child watchers),
and those that run on no loop at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import importlib
import inspect
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import pytest

import iocp_loop.methods.pipes
import iocp_loop.methods.unix
from iocp_loop import readers
from iocp_loop.policy import IocpPolicy

from .expected_failures import EXPECTED_FAILURES

__all__ = ["MIXINS", "Source", "bases_of", "loops_that_run", "make_case", "sources"]


class Source(NamedTuple):
    """One group of CPython's tests: `bases` of `module` make one test class together.

    A class that an older Python lacks is named in `since`, with the first version that has it.  `system` is ``"unix"``
    or ``"windows"`` for one that is of use there alone.  `left_out` are tests that look into private parts.  With
    `own_streams` asyncio's names lead to the streams of iocp_loop/readers.py.
    """

    name: str
    module: str
    bases: tuple[str, ...]
    since: tuple[int, int] = (3, 11)
    system: str = ""
    left_out: tuple[str, ...] = ()
    own_streams: bool = False


#: What CPython runs once per loop.
MIXINS = (
    Source("EventLoop", "test_events", ("EventLoopTestsMixin", "SubprocessTestsMixin", "test_utils.TestCase")),
    Source("Sock", "test_sock_lowlevel", ("BaseSockTestsMixin", "test_utils.TestCase")),
    Source("Sendfile", "test_sendfile", ("SendfileTestsBase", "test_utils.TestCase")),
    Source("StartServer", "test_server", ("SelectorStartServerTests",)),
    Source("BufferedProtocol", "test_buffered_proto", ("BaseTestBufferedProtocol", "unittest.TestCase")),
    Source("StartTLS", "test_sslproto", ("BaseStartTLS", "unittest.TestCase")),
    Source("Subprocess", "test_subprocess", ("SubprocessMixin", "test_utils.TestCase")),
)

#: What makes its loop by name.
CLASSES = (
    Source("Streams", "test_streams", ("StreamTests",)),
    Source("OwnStreams", "test_streams", ("StreamTests",), own_streams=True),
    Source("TLS", "test_ssl", ("TestSSL",)),
    Source("TLSHandshake", "test_sslproto", ("SslProtoHandshakeTests",)),
    Source("Context", "test_context", ("DecimalContextTest",)),
    Source("UnixSockets", "test_unix_events", ("SelectorEventLoopUnixSocketTests",), system="unix"),
    Source("UnixFunctional", "test_unix_events", ("TestFunctional",), system="unix"),
    Source("Fork", "test_unix_events", ("TestFork",), since=(3, 12), system="unix"),
    Source("Server", "test_server", ("TestServer2",), since=(3, 12)),
    Source("UnixServerCleanup", "test_server", ("UnixServerCleanupTests",), since=(3, 13), system="unix"),
    Source("CtrlC", "test_windows_events", ("ProactorLoopCtrlC",), system="windows"),
    Source("OtherThread", "test_windows_events", ("ProactorMultithreading",), system="windows"),
    Source(
        "Proactor",
        "test_windows_events",
        ("ProactorTests",),
        system="windows",
        left_out=(
            "test_close",  # makes a transport by a private method, of a socket that blocks
            "test_double_bind",  # makes asyncio's own PipeServer
            "test_connect_pipe_cancel",  # replaces a function of _overlapped
            "test_address_argument_type_error",  # calls methods of asyncio's proactor
        ),
    ),
)


def sources() -> Iterator[Source]:
    """The groups that the running Python has."""
    system = "windows" if sys.platform == "win32" else "unix"
    for source in (*MIXINS, *CLASSES):
        if sys.version_info >= source.since and source.system in ("", system):
            yield source


def bases_of(source: Source) -> list[Any]:
    """CPython's classes of one group."""
    module = importlib.import_module(f"test.test_asyncio.{source.module}")
    return [functools.reduce(getattr, name.split("."), module) for name in source.bases]


def make_case(source: Source, driver: str) -> Any:
    """The test class of one group on one driver."""
    name = f"{source.name}_{driver}"
    case: Any = type(name, (_OnOurLoop, *bases_of(source)), {"driver": driver, "__module__": __name__})
    case.own_streams = source.own_streams
    for left_out in source.left_out:
        setattr(case, left_out, None)
    if sys.platform == "win32" and hasattr(case, "_basetest_datagram_sendto_blocking"):
        case.test_sendto_blocking = _sendto_blocking
    for listed, reason in EXPECTED_FAILURES.items():
        group, _, test = listed.partition(".")
        if group == source.name and hasattr(case, test):
            setattr(case, test, _expected_to_fail(getattr(case, test), reason))
    # CPython's tests leave things unclosed: warnings are shown, and end nothing.
    case.pytestmark = [pytest.mark.filterwarnings("default")]
    return case


def _sendto_blocking(self: Any) -> None:
    """CPython leaves this out where the loop is a ProactorEventLoop, as ours is by name; but it is not irrelevant."""
    utils = importlib.import_module("test.test_asyncio.utils")
    with utils.run_udp_echo_server() as address:
        self.loop.run_until_complete(self._basetest_datagram_sendto_blocking(address))


def _expected_to_fail(test: Any, reason: str) -> Any:
    # A function of its own: the mark must not stick to the base class, which other drivers share.
    if inspect.iscoroutinefunction(test):

        @functools.wraps(test)
        async def run(self: Any) -> Any:
            return await test(self)
    else:

        @functools.wraps(test)
        def run(self: Any) -> Any:
            return test(self)

    return pytest.mark.xfail(strict=True, reason=reason)(run)


# What comes after it in the bases of a case; for the type checker only.
_Case: Any = object


class _OnOurLoop(_Case):  # type: ignore[misc]  # the base is any class of tests
    """Goes before CPython's classes, and puts our loop under them."""

    driver: str
    own_streams: bool

    def create_event_loop(self) -> asyncio.AbstractEventLoop:
        return iocp_loop.new_event_loop(self.driver)

    new_loop = create_event_loop

    def run(self: Any, result: Any = None) -> Any:
        # Here and not in setUp: IsolatedAsyncioTestCase makes its loop before it calls that.
        with _our_loop_by_name(self.driver), _streams_by_name(self.own_streams), loops_that_run() as loops:
            self.addCleanup(self._check_loops, loops)
            return super().run(result)

    def setUp(self: Any) -> None:
        super().setUp()
        if not hasattr(self, "loop") and hasattr(self, "set_event_loop"):
            # A mixin that leaves the loop to the classes made of it.
            self.loop = self.create_event_loop()
            self.set_event_loop(self.loop)

    @classmethod
    def setUpClass(cls) -> None:
        # Some of CPython's tests make files where they stand.
        folder = tempfile.mkdtemp()
        # On Windows a child that still runs keeps it from being removed: then it is left.
        cls.addClassCleanup(shutil.rmtree, folder, ignore_errors=True)
        cls.enterClassContext(contextlib.chdir(folder))
        super().setUpClass()

    @classmethod
    def tearDownClass(cls) -> None:
        super().tearDownClass()
        # Some of CPython's tests leave garbage that complains when it goes: let it go here, where that ends nothing.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            gc.collect()

    def _check_loops(self: Any, loops: list[asyncio.AbstractEventLoop]) -> None:
        for loop in loops:
            self._check_loop(loop)

    def _check_loop(self: Any, loop: Any) -> None:
        assert type(loop) is iocp_loop.IocpEventLoop
        assert loop.driver == self.driver

    def test_the_loop_is_ours(self: Any) -> None:
        """Not CPython's: what the others run on is an IocpEventLoop on the driver of this class."""
        loop = getattr(self, "loop", None)
        runner = getattr(self, "_asyncioRunner", None)
        if loop is None and runner is not None:
            loop = runner.get_loop()
        if loop is not None:
            self._check_loop(loop)

        async def running_loop() -> asyncio.AbstractEventLoop:
            return asyncio.get_running_loop()

        self._check_loop(asyncio.run(running_loop()))


class _SocketModule:
    """The socket module as asyncio's own UNIX sockets see it: what a test puts in its place there comes in here too."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio.unix_events.socket, name)  # type: ignore[attr-defined]  # not for everyone


@contextlib.contextmanager
def _streams_by_name(own: bool) -> Iterator[None]:
    """Let asyncio's names of streams lead to ours, if they are wanted."""
    with contextlib.ExitStack() as stack:
        for name in readers.__all__ if own else ():
            stack.enter_context(mock.patch.object(asyncio, name, getattr(readers, name)))
        yield


@contextlib.contextmanager
def _our_loop_by_name(driver: str) -> Iterator[None]:
    """Let the names by which loops are made lead to ours."""
    make = functools.partial(iocp_loop.new_event_loop, driver)
    if sys.platform == "win32":
        # A class, since tests ask whether a loop is one: they grant it what they grant CPython's loop on the same port.
        names = {"ProactorEventLoop": iocp_loop.IocpEventLoop, "SelectorEventLoop": make}
        more: Any = mock.patch.multiple(asyncio, **names)
        server: Any = mock.patch.object(asyncio.windows_events, "PipeServer", iocp_loop.pipes.named.PipeServer)
    else:
        more = mock.patch.object(asyncio, "SelectorEventLoop", make)
        server = mock.patch.object(iocp_loop.methods.unix, "socket", _SocketModule())
    with (
        mock.patch.object(asyncio.events, "_event_loop_policy", IocpPolicy(driver)),
        more,
        server,
    ):
        yield


@contextlib.contextmanager
def loops_that_run() -> Iterator[list[Any]]:
    """Note every loop that runs meanwhile."""
    loops: list[Any] = []
    really: Any = asyncio.events._set_running_loop

    def set_running_loop(loop: Any) -> None:
        if loop is not None and loop not in loops:
            loops.append(loop)
        really(loop)

    with mock.patch.object(asyncio.events, "_set_running_loop", set_running_loop):
        yield loops
