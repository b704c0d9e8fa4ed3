"""pytest-asyncio runs its tests on our loop when it is told to, as a user's test suite would tell it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from .support import LIMIT, child_environment

SUITE = """
import asyncio
import pytest
import pytest_asyncio
import iocp_loop

pytestmark = pytest.mark.asyncio

@pytest.fixture(scope="session")
def event_loop_policy():
    return iocp_loop.IocpPolicy("DRIVER")

@pytest_asyncio.fixture
async def server():
    async def echo(reader, writer):
        writer.write(await reader.readline())
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()
    server.close()
    await asyncio.sleep(0.01)

async def test_the_loop_is_ours(server):
    loop = asyncio.get_running_loop()
    assert type(loop) is iocp_loop.IocpEventLoop
    assert loop.driver == "DRIVER"
    reader, writer = await asyncio.open_connection(*server)
    writer.write(b"hello\\n")
    assert await reader.readline() == b"hello\\n"
    writer.close()
    await writer.wait_closed()

async def test_and_so_is_the_next_one():
    assert await asyncio.to_thread(pow, 2, 5) == 32
"""


def test_a_suite_of_pytest_asyncio(driver: str, tmp_path: Path) -> None:
    (tmp_path / "test_suite.py").write_text(SUITE.replace("DRIVER", driver), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)],
        env=child_environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=3 * LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
