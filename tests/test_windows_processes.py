"""What a process is on Windows."""

from __future__ import annotations

import asyncio
import asyncio.subprocess
import signal
import subprocess
import sys
from typing import Any

import pytest

if sys.platform != "win32":
    pytest.skip("what these tests are about is of Windows only", allow_module_level=True)


import iocp_loop
from iocp_loop.pipes import channels as windows_channels
from iocp_loop.pipes import windows as windows_pipes

from .support import WINE, turns, until

Loop = iocp_loop.IocpEventLoop


async def test_the_pipes_of_a_process_are_overlapped(loop: Loop) -> None:
    code = "import os; os.write(1, os.read(0, 99))"
    transport, _ = await loop.subprocess_exec(asyncio.SubprocessProtocol, sys.executable, "-c", code)
    for fd in range(3):
        pipe: Any = transport.get_pipe_transport(fd)
        assert isinstance(pipe, (windows_pipes.ReadPipeTransport, windows_pipes.WritePipeTransport))
        assert type(pipe._channel) is windows_channels.OverlappedChannel
    transport.close()
    await turns()
    await asyncio.sleep(0.05)


async def test_standard_input_closes_when_the_process_has_gone(loop: Loop) -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "pass", stdin=asyncio.subprocess.PIPE)
    assert process.stdin is not None
    assert await process.wait() == 0
    await until(process.stdin.is_closing)


async def test_other_signals_are_refused(loop: Loop) -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "import time; time.sleep(1000)")
    with pytest.raises(ValueError, match="signal"):
        process.send_signal(9)
    process.kill()
    await process.wait()


@pytest.mark.skipif(WINE, reason="under Wine CTRL_BREAK does not reach another process group")
async def test_ctrl_break_to_a_process_group(loop: Loop) -> None:
    code = (
        "import signal, time; signal.signal(signal.SIGBREAK, lambda *_: exit(7)); print(1, flush=True); time.sleep(60)"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        code,
        stdout=asyncio.subprocess.PIPE,
        creationflags=subprocess.CREATE_NEW_PROCESS_GROUP,
    )
    assert process.stdout is not None
    await process.stdout.readline()
    process.send_signal(signal.CTRL_BREAK_EVENT)
    assert await process.wait() == 7
