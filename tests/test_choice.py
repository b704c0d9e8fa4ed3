"""Choosing a driver is never silent: `auto` takes the best that works, a forced one works or raises with the cause."""

from __future__ import annotations

import errno
import gc
import sys

import pytest

import iocp_loop
from iocp_loop.ports import DRIVERS, CompletionPort, DriverUnavailable, availability, choice, make_driver

from .programs import REFUSE
from .support import run_python

linux = pytest.mark.skipif(sys.platform != "linux", reason="io_uring and seccomp are Linux's")
uring = pytest.mark.skipif(
    sys.platform != "linux" or not availability("uring").available,
    reason=f"a working io_uring is to be taken away: {availability('uring').reason}",
)

IMPOSSIBLE = "uring" if sys.platform == "win32" else "iocp"


@pytest.fixture(autouse=True)
def no_choice_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IOCP_LOOP_DRIVER", raising=False)


# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nonsense", "POLL", "epoll", " poll"])
def test_an_unknown_driver_raises_and_names_those_there_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for make in (make_driver, iocp_loop.new_event_loop, availability, lambda name: CompletionPort(driver=name)):
        with pytest.raises(ValueError, match="auto, iocp, uring, poll"):
            make(name)
    monkeypatch.setenv("IOCP_LOOP_DRIVER", name)
    with pytest.raises(ValueError, match="unknown driver"):
        iocp_loop.new_event_loop()
    gc.collect()  # a loop that could not be made must not complain that it was not closed


def test_a_forced_driver_works_or_raises(driver: str) -> None:
    for name in DRIVERS:
        if availability(name).available:
            loop = iocp_loop.new_event_loop(name)
            assert loop.driver == name
            loop.close()
        else:
            with pytest.raises(DriverUnavailable):
                iocp_loop.new_event_loop(name)


def test_poll_works_everywhere() -> None:
    assert availability("poll") == ("poll", True, "")


def test_the_cause_and_the_way_out_are_named() -> None:
    reason = availability(IMPOSSIBLE).reason
    assert reason
    with pytest.raises(DriverUnavailable) as failure:
        iocp_loop.new_event_loop(IMPOSSIBLE)
    message = str(failure.value)
    assert reason in message
    assert f"driver={IMPOSSIBLE!r}" in message
    assert "auto" in message
    gc.collect()


@pytest.mark.parametrize("name", ["nonsense", IMPOSSIBLE])
def test_a_run_that_cannot_begin_raises_that_error_alone(name: str) -> None:
    async def main() -> None: ...

    with pytest.raises((ValueError, DriverUnavailable), match="driver"):
        iocp_loop.run(main(), driver=name)
    gc.collect()  # a coroutine that was never awaited would warn


def test_a_run_inside_a_running_loop_raises_that_error_alone() -> None:
    async def main() -> None: ...

    async def outer() -> None:
        with pytest.raises(RuntimeError, match="cannot be called from a running event loop"):
            iocp_loop.run(main())
        gc.collect()

    iocp_loop.run(outer())


def test_unavailable_is_a_runtime_error_that_the_package_exports() -> None:
    assert issubclass(DriverUnavailable, RuntimeError)
    assert iocp_loop.DriverUnavailable is DriverUnavailable


# -- the environment -------------------------------------------------------------------------------


def test_the_environment_names_the_driver(driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IOCP_LOOP_DRIVER", driver)
    loop = iocp_loop.new_event_loop()
    assert loop.driver == driver
    loop.close()
    with CompletionPort() as port:
        assert port.driver == driver


def test_an_argument_outweighs_the_environment(driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IOCP_LOOP_DRIVER", IMPOSSIBLE)
    loop = iocp_loop.new_event_loop(driver)
    assert loop.driver == driver
    loop.close()
    loop = iocp_loop.new_event_loop("auto")
    loop.close()


@pytest.mark.parametrize("value", ["", "auto"])
def test_auto_in_the_environment(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IOCP_LOOP_DRIVER", value)
    loop = iocp_loop.new_event_loop()
    assert loop.driver == next(name for name in DRIVERS if availability(name).available)
    loop.close()


def test_a_forced_choice_in_the_environment_that_cannot_work_names_the_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("IOCP_LOOP_DRIVER", IMPOSSIBLE)
    with pytest.raises(DriverUnavailable, match=f"IOCP_LOOP_DRIVER={IMPOSSIBLE}"):
        iocp_loop.new_event_loop()
    gc.collect()


# -- auto ------------------------------------------------------------------------------------------


def test_auto_takes_the_first_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[str] = []

    def why_not(name: str) -> str | None:
        if name == "poll":
            return None
        refused.append(name)
        return "not today"

    monkeypatch.setattr(choice, "_why_not", why_not)
    driver = make_driver("auto")
    assert driver.name == "poll"
    assert refused == ["iocp", "uring"]
    driver.close()


# -- io_uring refused ------------------------------------------------------------------------------

#: The first lines of a child in which io_uring_setup answers with the errno that it is given.
REFUSE_IO_URING = REFUSE + "refuse_io_uring(int(sys.argv[1]))\n"

#: What the child then looks at: auto runs, and on what; forced raises, and why.
LOOK = """
import asyncio, iocp_loop
async def main():
    await asyncio.sleep(0)
    return asyncio.get_running_loop().driver
print(iocp_loop.run(main()))
try:
    iocp_loop.new_event_loop("uring")
except iocp_loop.DriverUnavailable as exc:
    print(exc)
"""


def look(before: str, *arguments: str, **environment: str) -> tuple[str, str]:
    """Run LOOK in a child after `before`: the driver that auto took there, and why uring was refused."""
    printed = run_python(before + LOOK, *arguments, **environment).stdout
    if printed.startswith("no seccomp"):
        pytest.skip(f"this machine lets us set no seccomp filter: {printed}")
    driver, refusal = printed.splitlines()
    return driver, refusal


@uring
def test_where_a_seccomp_filter_refuses_io_uring_auto_takes_poll_and_uring_names_the_cause() -> None:
    driver, refusal = look(REFUSE_IO_URING, "1")  # EPERM, as containers have it by default
    assert driver == "poll"
    assert "EPERM" in refusal
    assert "seccomp" in refusal
    assert "allow" in refusal


@uring
def test_a_kernel_without_io_uring() -> None:
    driver, refusal = look(REFUSE_IO_URING, "38")  # ENOSYS
    assert driver == "poll"
    assert "ENOSYS" in refusal
    assert "Linux 6.1" in refusal


@uring
@pytest.mark.parametrize("setting", ["1", "2"])
def test_io_uring_disabled_by_sysctl(setting: str) -> None:
    fake = f"from iocp_loop.ports.uring import binding\nbinding._io_uring_disabled = lambda: {setting!r}\n"
    driver, refusal = look(REFUSE_IO_URING + fake, "1")
    assert driver == "poll"
    assert f"kernel.io_uring_disabled={setting}" in refusal
    assert "sysctl" in refusal


#: A child whose loop, made by `auto`, meets the filter of argv[1] and argv[2] at the stage of argv[3].
SANDBOX_LATER = """
import asyncio, iocp_loop, os, socket, subprocess, sys, tempfile, threading
from iocp_loop.proactor import Proactor

def enter_sandbox(at):
    if at == sys.argv[3]:
        refuse_io_uring(int(sys.argv[1]), {"setup": [425], "all": [425, 426, 427]}[sys.argv[2]])

async def echo(reader, writer):
    while data := await reader.read(100_000):
        writer.write(data)
        await writer.drain()
    writer.close()

async def exchange(reader, writer, size):
    writer.write(b"x" * size)
    assert await reader.readexactly(size) == b"x" * size

async def before():
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    streams = [await asyncio.open_connection(*server.sockets[0].getsockname()) for _ in range(3)]
    for reader, writer in streams:
        await exchange(reader, writer, 100)
    streams[2][1].transport.pause_reading()
    return server, streams

async def traffic(server, streams):
    loop = asyncio.get_running_loop()
    enter_sandbox("inside")
    await asyncio.sleep(0.001)
    streams[2][1].write(b"y")
    await asyncio.sleep(0.005)
    streams[2][1].transport.resume_reading()
    assert await streams[2][0].read(10) == b"y"
    streams.append(await asyncio.open_connection(*server.sockets[0].getsockname()))
    for size in (1, 100, 10_000, 1_000_000, *[10] * 50):
        await asyncio.gather(*[exchange(reader, writer, size) for reader, writer in streams])
    ours, peer = socket.socketpair()
    ours.setblocking(False)
    receiving = asyncio.ensure_future(loop.sock_recv(ours, 10))
    await asyncio.sleep(0)
    peer.send(b"data")
    assert await receiving == b"data"
    await asyncio.to_thread(peer.send, b"more")
    assert await loop.sock_recv(ours, 10) == b"more"
    process = await asyncio.create_subprocess_exec("cat", stdin=-1, stdout=-1)
    assert (await process.communicate(b"data"))[0] == b"data"
    with tempfile.TemporaryFile() as file:
        assert await loop._proactor.write(file, b"written", 0) == 7
        assert await loop._proactor.read(file, 100, 0) == b"written"
    for _, writer in streams:
        writer.close()
        await writer.wait_closed()
    server.close()
    ours.close()
    peer.close()
    return loop.driver

loop = iocp_loop.new_event_loop()
assert loop.driver == "uring"
enter_sandbox("made")
made = loop.run_until_complete(before())
enter_sandbox("run")
if sys.argv[3] == "thread":
    refuse_io_uring(int(sys.argv[1]), [425])
    drivers = []
    thread = threading.Thread(target=lambda: drivers.append(loop.run_until_complete(traffic(*made))))
    thread.start()
    thread.join()
else:
    drivers = [loop.run_until_complete(traffic(*made))]
print(drivers[0], loop.driver, loop.stats().driver, len(loop._proactor.in_flight))
loop.close()
loop = iocp_loop.new_event_loop()
print(loop.driver)
loop.close()
"""


@uring
@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSYS, errno.ENOMEM], ids=errno.errorcode.get)
@pytest.mark.parametrize(
    ("calls", "stage"), [("setup", "made"), ("setup", "thread"), ("all", "made"), ("all", "run"), ("all", "inside")]
)
def test_a_sandbox_that_comes_later(calls: str, stage: str, code: int) -> None:
    """Auto goes on as poll, with everything that it had in flight."""
    done = run_python(REFUSE + SANDBOX_LATER, str(code), calls, stage)
    if done.stdout.startswith("no seccomp"):
        pytest.skip(f"this machine lets us set no seccomp filter: {done.stdout}")
    assert done.stdout.split() == ["poll", "poll", "poll", "0", "poll"]
    assert "going on with driver poll" in done.stderr


@uring
def test_when_no_descriptor_is_left_for_a_ring() -> None:
    """A loop and a port that are made then say so, or work; one that was made before has kept a descriptor."""
    done = run_python(
        """
        import asyncio, iocp_loop, os, resource
        from iocp_loop.ports import availability

        assert availability("uring").available
        loop = iocp_loop.new_event_loop()
        spare = [os.dup(0) for _ in range(3)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (spare[-1] + 1, spare[-1] + 1))
        try:
            iocp_loop.new_event_loop()
        except OSError as error:
            print(error.strerror)
        loop.run_until_complete(asyncio.sleep(0.001))
        print(loop.driver)
        os.close(spare.pop())
        os.close(spare.pop())  # two are enough for a poller, and there can be no ring any more
        with iocp_loop.CompletionPort() as port:
            print(port.driver)
            port.post("value")
            assert port.get(1).value == "value"
        loop.close()
        """
    )
    assert done.stdout.splitlines() == ["Too many open files", "uring", "poll"]


@uring
def test_when_no_descriptor_is_left_for_the_ring_of_another_thread() -> None:
    """A loop that has to be on uring refuses to run there; it goes on where it has a ring, or can have one."""
    done = run_python(
        """
        import asyncio, iocp_loop, os, resource
        from concurrent.futures import ThreadPoolExecutor

        loop = iocp_loop.new_event_loop("uring")
        spare = os.dup(0)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)

        def run():
            try:
                loop.run_until_complete(asyncio.sleep(0.001))
            except OSError as error:
                print(error.strerror.partition(" (")[0])
            else:
                print(loop.driver)

        run()
        os.close(spare)
        resource.setrlimit(resource.RLIMIT_NOFILE, (spare, limits[1]))
        with ThreadPoolExecutor(1) as pool:
            pool.submit(run).result()
            run()
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            pool.submit(run).result()
        loop.close()
        """
    )
    assert done.stdout.splitlines() == ["uring", "no descriptor is left for a ring", "uring", "uring"]


@uring
def test_a_forced_uring_names_the_sandbox_that_comes_later() -> None:
    look = """
import asyncio, iocp_loop
loop = iocp_loop.new_event_loop("uring")
refuse_io_uring(1, [425, 426])
for _ in range(2):
    try:
        loop.run_until_complete(asyncio.sleep(0.001))
    except PermissionError as error:
        print(error)
loop.close()
try:
    iocp_loop.new_event_loop("uring")
except iocp_loop.DriverUnavailable as error:
    print(error)
"""
    done = run_python(REFUSE + look)
    if done.stdout.startswith("no seccomp"):
        pytest.skip(f"this machine lets us set no seccomp filter: {done.stdout}")
    assert done.stdout.count("seccomp filter") == 3


@linux
def test_without_the_compiled_binding() -> None:
    driver, refusal = look("import sys\nsys.modules['iocp_loop._uring'] = None\n")
    assert driver == "poll"
    assert "iocp_loop._uring" in refusal
    assert "compiler" in refusal


@linux
def test_a_forced_uring_in_the_environment_does_not_fall_back() -> None:
    printed = run_python(
        """
        import sys
        sys.modules['iocp_loop._uring'] = None
        import iocp_loop
        try:
            iocp_loop.new_event_loop()
        except iocp_loop.DriverUnavailable as exc:
            print(exc)
        """,
        IOCP_LOOP_DRIVER="uring",
    ).stdout
    assert printed.startswith("IOCP_LOOP_DRIVER=uring can't work here")


def test_the_package_imports_without_any_binding() -> None:
    printed = run_python(
        """
        import sys
        sys.modules['iocp_loop._uring'] = sys.modules['iocp_loop._iocp'] = sys.modules['cffi'] = None
        import iocp_loop
        loop = iocp_loop.new_event_loop()
        print(loop.driver)
        loop.close()
        """
    ).stdout
    assert printed == "poll\n"


@uring
def test_running_out_of_descriptors_is_told_as_such() -> None:
    printed = run_python(
        """
        import resource, iocp_loop.ports.uring.driver
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
        print(iocp_loop.ports.availability("uring").reason)
        """
    ).stdout
    assert "EMFILE" in printed
    assert "RLIMIT_NOFILE" in printed
