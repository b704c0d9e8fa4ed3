"""subprocess_exec, subprocess_shell and asyncio.subprocess."""

from __future__ import annotations

import asyncio
import asyncio.subprocess
import errno
import gc
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from asyncio.subprocess import DEVNULL, PIPE, STDOUT
from collections.abc import Iterator
from typing import Any

import pytest

import iocp_loop
from iocp_loop import operations as ops
from iocp_loop.methods import subprocesses

from .support import LIMIT, WINDOWS, open_handles, run_python, turns, until

unix_only = pytest.mark.skipif(sys.platform == "win32", reason="Windows has nothing like it")

#: Commands that every system has: copy the input to the output; sleep; succeed.
if WINDOWS:
    CAT: tuple[str, ...] = (
        sys.executable,
        "-c",
        "import os\nwhile data := os.read(0, 65536):\n  while data: data = data[os.write(1, data):]",
    )
    SLEEP: tuple[str, ...] = (sys.executable, "-c", "import time; time.sleep(1000)")
    TRUE: tuple[str, ...] = (os.environ["COMSPEC"], "/c", "exit")
else:
    CAT, SLEEP, TRUE = ("cat",), ("sleep", "1000"), ("true",)

#: The exit status of a process that was killed: Popen.kill() of Windows says 1.
KILLED = 1 if sys.platform == "win32" else -signal.SIGKILL


def python(code: str) -> tuple[str, ...]:
    """The command of a Python that runs `code`."""
    return sys.executable, "-c", code


@pytest.fixture(params=["handle"] if WINDOWS else ["pidfd", "thread"])
def watched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the exit of a process is watched: by its handle or descriptor, or, where there is none, by a thread."""
    way: str = request.param
    if way == "handle":
        return way
    if way == "thread":
        monkeypatch.delattr(os, "pidfd_open", raising=False)
    else:
        pidfd = subprocesses.open_pidfd(os.getpid())
        if pidfd is None:
            pytest.skip("this system has no pidfd_open")
        os.close(pidfd)
    return way


@pytest.fixture(autouse=True)
def no_child_left() -> Iterator[None]:
    """Every child was waited for."""
    yield
    if sys.platform == "win32":
        return  # a process is not a child of anybody there, and its handle is Popen's
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def wait_without_the_loop(pid: int, *, take: bool) -> None:
    """Wait for the exit of a process while the loop stands still; take its status or leave it."""
    assert sys.platform != "win32"
    os.waitid(os.P_PID, pid, os.WEXITED if take else os.WEXITED | os.WNOWAIT)


class Watcher(asyncio.SubprocessProtocol):
    """Notes what happens to a process."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.output: dict[int, bytearray] = {1: bytearray(), 2: bytearray()}
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.calls.append("made")
        self.transport = transport

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        self.output[fd] += data

    def pipe_connection_lost(self, fd: int, exc: BaseException | None) -> None:
        self.calls.append(fd)

    def process_exited(self) -> None:
        self.calls.append("exited")

    def connection_lost(self, exc: BaseException | None) -> None:
        self.calls.append("lost")


# --------------------------------------------------------------------------------------------------
# Running
# --------------------------------------------------------------------------------------------------


async def test_exec(loop: iocp_loop.IocpEventLoop, watched: str) -> None:
    process = await asyncio.create_subprocess_exec(*CAT, stdin=PIPE, stdout=PIPE)
    assert process.returncode is None
    assert (await process.communicate(b"hello"))[0] == b"hello"
    assert process.returncode == 0


async def test_shell(loop: iocp_loop.IocpEventLoop, watched: str) -> None:
    line = "echo out&echo err>&2&exit 7" if WINDOWS else "echo out; echo err >&2; exit 7"
    process = await asyncio.create_subprocess_shell(line, stdout=PIPE, stderr=PIPE)
    output, errors = await process.communicate()
    assert (output.split(), errors.split()) == ([b"out"], [b"err"])
    assert process.returncode == 7


async def test_protocol(loop: iocp_loop.IocpEventLoop, watched: str) -> None:
    code = "import os; x = os.read(0, 99); os.write(1, x); os.write(2, x); os._exit(3)"
    transport, protocol = await loop.subprocess_exec(Watcher, *python(code))
    assert transport.get_pid() > 0
    assert transport.get_returncode() is None
    assert isinstance(transport.get_extra_info("subprocess"), subprocess.Popen)
    pipes: list[Any] = [transport.get_pipe_transport(fd) for fd in range(3)]
    assert all(pipe.get_extra_info("pipe").fileno() > 2 for pipe in pipes)
    pipes[0].write(b"line\n")
    await until(lambda: "lost" in protocol.calls)
    assert protocol.output == {1: b"line\n", 2: b"line\n"}
    assert transport.get_returncode() == 3
    assert protocol.calls[0] == "made"
    assert protocol.calls[-1] == "lost"
    assert sorted(map(str, protocol.calls)) == ["0", "1", "2", "exited", "lost", "made"]
    transport.close()


async def test_redirections(loop: iocp_loop.IocpEventLoop) -> None:
    code = "import os; os.read(0, 99); os.write(2, b'err')"
    process = await asyncio.create_subprocess_exec(*python(code), stdin=DEVNULL, stdout=PIPE, stderr=STDOUT)
    assert (await process.communicate())[0] == b"err"
    process = await asyncio.create_subprocess_shell("echo nobody hears", stdout=DEVNULL)
    assert await process.wait() == 0


async def test_much_output_and_input(loop: iocp_loop.IocpEventLoop) -> None:
    data = os.urandom(1 << 20) * 4
    process = await asyncio.create_subprocess_exec(*CAT, stdin=PIPE, stdout=PIPE)
    output, _ = await process.communicate(data)
    assert output == data


async def test_output_that_nobody_reads_blocks_the_process(loop: iocp_loop.IocpEventLoop) -> None:
    code = "import sys; sys.stdout.buffer.write(b'x' * 1_000_000)"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=PIPE, limit=1000)
    await asyncio.sleep(0.2)
    assert process.returncode is None
    assert process.stdout is not None
    assert len(await process.stdout.read()) == 1_000_000
    assert await process.wait() == 0


async def test_interactive(loop: iocp_loop.IocpEventLoop) -> None:
    process = await asyncio.create_subprocess_exec(*CAT, stdin=PIPE, stdout=PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    for number in range(100):
        process.stdin.write(b"%d\n" % number)
        await process.stdin.drain()
        assert await process.stdout.readline() == b"%d\n" % number
    process.stdin.close()
    await process.stdin.wait_closed()
    assert await process.wait() == 0


@unix_only
async def test_arguments_of_popen(loop: iocp_loop.IocpEventLoop, tmp_path: Any) -> None:
    reading, writing = os.pipe()
    with open(reading, "rb") as file:
        process = await asyncio.create_subprocess_shell(
            f"pwd; echo $GREETING; echo passed > /dev/fd/{writing}",
            stdout=PIPE,
            cwd=tmp_path,
            env={"GREETING": "hello", "PATH": os.environ["PATH"]},
            pass_fds=[writing],
            start_new_session=True,
        )
        os.close(writing)
        output, _ = await process.communicate()
        assert output.split() == [os.fsencode(tmp_path), b"hello"]
        assert file.read() == b"passed\n"


async def test_a_program_that_is_not_there(loop: iocp_loop.IocpEventLoop) -> None:
    with pytest.raises(FileNotFoundError):
        await asyncio.create_subprocess_exec("/no/such/program", stdin=PIPE, stdout=PIPE, stderr=PIPE)
    await turns()
    gc.collect()


# --------------------------------------------------------------------------------------------------
# Signals and the end
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["kill", "terminate", "send_signal"])
async def test_signals(loop: iocp_loop.IocpEventLoop, watched: str, how: str) -> None:
    process = await asyncio.create_subprocess_exec(*SLEEP)
    if sys.platform == "win32":
        number, status = signal.SIGTERM, KILLED  # there is no other that a process of another group can be sent
    else:
        number = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM, "send_signal": signal.SIGUSR1}[how]
        status = -number
    getattr(process, how)(*[number] * (how == "send_signal"))
    assert await asyncio.wait_for(process.wait(), LIMIT) == status
    with pytest.raises(ProcessLookupError):
        process.kill()


async def test_many_wait_for_one_process(loop: iocp_loop.IocpEventLoop) -> None:
    process = await asyncio.create_subprocess_exec(*CAT, stdin=PIPE)
    waiting = [asyncio.ensure_future(process.wait()) for _ in range(10)]
    await turns()
    assert process.stdin is not None
    process.stdin.close()
    assert await asyncio.gather(*waiting) == [0] * 10


async def test_close_kills_a_running_process(loop: iocp_loop.IocpEventLoop, watched: str) -> None:
    transport, protocol = await loop.subprocess_exec(Watcher, *SLEEP)
    transport.close()
    assert transport.is_closing()
    await until(lambda: "lost" in protocol.calls)
    assert transport.get_returncode() == KILLED


async def test_close_after_an_exit_that_the_loop_has_not_seen(
    loop: iocp_loop.IocpEventLoop, watched: str, caplog: pytest.LogCaptureFixture
) -> None:
    code = "import time; time.sleep(0.1); raise SystemExit(5)"
    transport, protocol = await loop.subprocess_exec(Watcher, *python(code), stdin=None, stdout=None, stderr=None)
    process: Any = transport.get_extra_info("subprocess")
    if watched == "handle":
        process.wait(LIMIT)
    elif watched == "pidfd":
        wait_without_the_loop(process.pid, take=False)
    transport.close()  # asks Popen, which may take the status
    await until(lambda: "lost" in protocol.calls)
    if watched != "thread":
        assert transport.get_returncode() == 5
        assert "Unknown child" not in caplog.text


@unix_only
async def test_somebody_else_takes_the_exit_status(
    loop: iocp_loop.IocpEventLoop, caplog: pytest.LogCaptureFixture
) -> None:
    if sys.platform == "linux" and not hasattr(os, "pidfd_open"):
        pytest.skip("the thread that waits for the process may be first")
    process = await asyncio.create_subprocess_shell("sleep 0.1; exit 5")
    with caplog.at_level(logging.WARNING, "asyncio"):
        wait_without_the_loop(process.pid, take=True)
        assert await process.wait() == subprocesses.UNKNOWN_STATUS
    assert "Unknown child process" in caplog.text


async def test_cancelling_the_start_kills_the_process(loop: iocp_loop.IocpEventLoop, watched: str) -> None:
    for steps in range(6):
        task = asyncio.ensure_future(asyncio.create_subprocess_exec(*SLEEP, stdin=PIPE, stdout=PIPE))
        await turns(steps)
        task.cancel()
        try:
            process = await task
        except asyncio.CancelledError:
            continue
        process.kill()
        await process.communicate()


async def test_cancelling_communicate_leaves_the_process(loop: iocp_loop.IocpEventLoop) -> None:
    process = await asyncio.create_subprocess_exec(*CAT, stdin=PIPE, stdout=PIPE)
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(process.communicate(b"x" * 1_000_000), 0)
    assert process.returncode is None
    process.kill()
    assert await process.wait() == KILLED


def test_closing_the_loop_before_the_process_ends(driver: str, watched: str, no_leak: None) -> None:
    loop = iocp_loop.new_event_loop(driver)
    transport, _ = loop.run_until_complete(loop.subprocess_exec(Watcher, *SLEEP, stdin=None, stdout=None, stderr=None))
    loop.close()
    process: Any = transport.get_extra_info("subprocess")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        transport.close()
        process.wait(LIMIT)
        del transport
        gc.collect()
    if watched == "thread":
        deadline = time.monotonic() + LIMIT
        while any(thread.name.startswith("wait for process") for thread in threading.enumerate()):
            assert time.monotonic() < deadline
            time.sleep(0.001)


# --------------------------------------------------------------------------------------------------
# Watching for the exit
# --------------------------------------------------------------------------------------------------


@pytest.fixture(params=["refused", "failed"])
def unwatchable(request: pytest.FixtureRequest, loop: iocp_loop.IocpEventLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operation that waits for the exit of a process is refused, or fails at once."""
    proactor = loop._proactor
    start = proactor.start

    def start_others(op: ops.Operation, deliver: Any) -> None:
        if not isinstance(op, ops.WaitForHandle if WINDOWS else ops.Readiness):
            start(op, deliver)
        elif request.param == "failed":
            loop.call_soon(deliver, None, OSError(errno.EIO, "input/output error"))
        else:
            raise OSError(errno.ENOMEM, "out of memory")

    monkeypatch.setattr(proactor, "start", start_others)


async def exit_status(code: str) -> int:
    """How a new Python that runs `code` has ended, as the loop is told; fails if it is not told in time."""
    process = await asyncio.wait_for(asyncio.create_subprocess_exec(*python(code)), LIMIT)
    return await asyncio.wait_for(process.wait(), LIMIT)


async def test_a_thread_waits_where_the_system_can_not(loop: iocp_loop.IocpEventLoop, unwatchable: None) -> None:
    """The process went on unwatched, and who waited for it waited for ever."""
    assert await exit_status("raise SystemExit(5)") == 5


async def test_a_timer_looks_where_no_thread_can_wait(
    loop: iocp_loop.IocpEventLoop, unwatchable: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    looks = 0
    take = subprocesses.take_exit_status

    def look(process: Any, *, block: bool = True) -> int | None:
        nonlocal looks
        looks += 1
        assert not block
        return take(process, block=block)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    monkeypatch.setattr(subprocesses, "take_exit_status", look)
    assert await exit_status("import time; time.sleep(0.2); raise SystemExit(5)") == 5
    assert looks > 1  # at first the process still ran


# --------------------------------------------------------------------------------------------------
# Threads, watchers, many
# --------------------------------------------------------------------------------------------------


def test_in_a_thread_without_a_child_watcher(driver: str, watched: str, no_leak: None) -> None:
    async def main() -> tuple[bytes, int | None]:
        process = await asyncio.create_subprocess_exec(*python("print(6 * 7); raise SystemExit(2)"), stdout=PIPE)
        output, _ = await process.communicate()
        return output.rstrip(), process.returncode

    results: list[Any] = []
    threads = [
        threading.Thread(target=lambda: results.append(iocp_loop.run(main(), driver=driver)), daemon=True)
        for _ in range(3)
    ]
    handler = signal.getsignal(signal.SIGCHLD) if sys.platform != "win32" else None
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert results == [(b"42", 2)] * 3
    if sys.platform != "win32":
        assert signal.getsignal(signal.SIGCHLD) is handler


async def test_200_processes_in_a_row_leave_nothing_open(loop: iocp_loop.IocpEventLoop) -> None:
    # The fixture `loop` looks for descriptors that stay open.  Windows' handles are counted here.
    handles = 0
    for number in range(202):
        if WINDOWS and number == 2:
            await turns()
            handles = open_handles()  # by now there is what is made once: the pool's thread that waits
        process = await asyncio.create_subprocess_exec(*TRUE, stdin=PIPE, stdout=PIPE, stderr=PIPE)
        if number % 2:
            await process.communicate()
        else:
            assert process.stdout is not None
            await process.stdout.read()
            await process.wait()
        assert process.returncode == 0
    del process
    await turns()
    assert len(loop._proactor.in_flight) == 0
    if WINDOWS:
        gc.collect()
        assert open_handles() <= handles


async def test_50_processes_at_once(loop: iocp_loop.IocpEventLoop, watched: str) -> None:
    async def one(number: int) -> None:
        code = f"import os; os.write(1, os.read(0, 99)); os._exit({number})"
        process = await asyncio.create_subprocess_exec(*python(code), stdin=PIPE, stdout=PIPE)
        output, _ = await process.communicate(b"%d\n" % number)
        assert (output, process.returncode) == (b"%d\n" % number, number)

    await asyncio.gather(*map(one, range(50)))


@unix_only
@pytest.mark.parametrize("watched", ["pidfd", "thread"], indirect=True)
async def test_a_process_that_leaves_its_pipe_to_a_grandchild(loop: iocp_loop.IocpEventLoop, watched: str) -> None:
    """The process is over when it has exited, the transport when its pipes have ended too."""
    transport, protocol = await loop.subprocess_shell(Watcher, "exec 3<&0; (read x <&3; echo late) & exit 5")
    assert await transport._wait() == 5  # type: ignore[attr-defined]  # what Process.wait() awaits
    await until(lambda: "exited" in protocol.calls)
    assert "lost" not in protocol.calls
    stdin: Any = transport.get_pipe_transport(0)
    stdin.write(b"go on\n")
    await until(lambda: "lost" in protocol.calls)
    assert protocol.output[1] == b"late\n"
    transport.close()


@unix_only
async def test_wait_does_not_wait_for_a_grandchild(loop: iocp_loop.IocpEventLoop) -> None:
    process = await asyncio.create_subprocess_shell("(sleep 1000 & echo $!); exit 5", stdout=PIPE)
    assert process.stdout is not None
    grandchild = int(await process.stdout.readline())
    try:
        waits = [asyncio.create_task(process.wait()) for _ in range(3)]
        waits[0].cancel()
        assert await asyncio.gather(*waits[1:]) == [5, 5]
    finally:
        os.kill(grandchild, signal.SIGKILL)
    assert await process.stdout.read() == b""
    assert await process.wait() == 5


async def test_wait_returns_when_the_pipes_have_ended(
    loop: iocp_loop.IocpEventLoop, watched: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then nothing is left for a loop that is closed at once."""
    monkeypatch.setattr(subprocesses, "PIPES_PATIENCE", LIMIT)
    process = await asyncio.create_subprocess_exec(*CAT, stdin=PIPE, stdout=PIPE, stderr=PIPE)
    transport: Any = process._transport  # type: ignore[attr-defined]  # not in typeshed
    assert process.stdin is not None
    process.stdin.close()
    assert await process.wait() == 0
    assert transport._finished


@pytest.mark.skipif(WINDOWS, reason="only sockets have readers there; see test_readiness.py for both on one loop")
async def test_add_reader_and_a_process_on_one_loop(loop: iocp_loop.IocpEventLoop) -> None:
    """What drives users of other loops apart: one library needs add_reader, another subprocesses."""
    reading, writing = os.pipe()
    got = loop.create_future()
    loop.add_reader(reading, lambda: got.done() or got.set_result(os.read(reading, 100)))
    process = await asyncio.create_subprocess_shell(f"echo ready > /dev/fd/{writing}", pass_fds=[writing])
    assert await got == b"ready\n"
    loop.remove_reader(reading)
    assert await process.wait() == 0
    os.close(reading)
    os.close(writing)


@pytest.mark.skipif(sys.platform != "linux", reason="there is no pidfd_open elsewhere")
@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSYS, errno.EMFILE], ids=errno.errorcode.get)
async def test_where_pidfd_open_is_refused(
    loop: iocp_loop.IocpEventLoop, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(pid: int, flags: int = 0) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "pidfd_open", refuse, raising=False)
    process = await asyncio.create_subprocess_exec(*CAT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    out, _ = await process.communicate(b"data")
    assert out == b"data"
    assert process.returncode == 0
    process = await asyncio.create_subprocess_exec(*SLEEP)
    process.kill()
    assert await process.wait() == KILLED


@pytest.mark.skipif(sys.platform != "linux", reason="there is neither elsewhere")
def test_a_python_without_pidfd_open_and_eventfd(driver: str) -> None:
    """As one that was built on an older system; io_uring can't be used there."""
    run_python(
        """
        import os, sys
        if hasattr(os, "pidfd_open"):
            del os.pidfd_open
        if sys.argv[1] == "poll":
            del os.eventfd
        import asyncio, iocp_loop

        async def main():
            process = await asyncio.create_subprocess_exec("cat", stdin=-1, stdout=-1)
            assert await process.communicate(b"data") == (b"data", None)
            assert await asyncio.to_thread(len, "data") == 4
            assert process.returncode == 0

        with asyncio.Runner(loop_factory=lambda: iocp_loop.new_event_loop(sys.argv[1])) as runner:
            runner.run(main())
        if sys.argv[1] == "poll":
            loop = iocp_loop.new_event_loop("auto")
            assert loop.driver == "poll", loop
            loop.close()
            try:
                iocp_loop.new_event_loop("uring")
            except iocp_loop.DriverUnavailable as error:
                assert "eventfd" in str(error)
            else:
                raise AssertionError
        """,
        driver,
    )
