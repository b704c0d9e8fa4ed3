"""``pytest --iocp-loop``: a user's suite runs on this loop, says so, and fails where a test does not run on it."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from iocp_loop.ports import availability

from .support import LIMIT, WINDOWS, child_environment

HELPER = """
import asyncio

def assert_ours():
    assert type(asyncio.get_running_loop()).__module__.startswith("iocp_loop"), asyncio.get_running_loop()
"""


def run(folder: Path, *options: str, code: int = 0) -> str:
    """pytest's output; only our plugin is loaded, and those that `options` name."""
    always = ["-p", "no:cacheprovider", "-p", "iocp_loop.pytest_plugin", "-rA", "-W", "error"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *always, *options],
        cwd=folder,
        env=child_environment(PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", COLUMNS="200"),
        capture_output=True,
        text=True,
        timeout=3 * LIMIT,
        check=False,
    )
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    (tmp_path / "helper.py").write_text(HELPER)
    (tmp_path / "pytest.ini").write_text("[pytest]\npythonpath = .\n")
    return tmp_path


def test_asyncios_own_ways_and_unittest(suite: Path, driver: str) -> None:
    (suite / "test_it.py").write_text(
        "import asyncio, unittest\n"
        "from helper import assert_ours\n"
        "async def check():\n    assert_ours()\n"
        "def test_run(): asyncio.run(check())\n"
        "def test_nothing(): pass\n"
        "class TestIt(unittest.IsolatedAsyncioTestCase):\n"
        "    async def test_it(self): assert_ours()\n"
    )
    text = run(suite, f"--iocp-loop={driver}")
    assert "3 passed" in text
    assert f", driver {driver}, " in next(line for line in text.splitlines() if line.startswith("iocp_loop: "))


def test_pytest_asyncio(suite: Path, driver: str) -> None:
    pytest.importorskip("pytest_asyncio")
    (suite / "test_it.py").write_text(
        "import pytest, pytest_asyncio\n"
        "from helper import assert_ours\n"
        "@pytest_asyncio.fixture\n"
        "async def made():\n    assert_ours()\n    yield 1\n    assert_ours()\n"
        "@pytest.mark.asyncio\n"
        "async def test_function(made): assert_ours()\n"
        "@pytest.mark.asyncio(loop_scope='class')\n"
        "class TestClass:\n"
        "    async def test_one(self): assert_ours()\n"
        "    async def test_two(self): assert_ours()\n"
    )
    options = ["-o", "asyncio_default_fixture_loop_scope=function", "-W", "ignore:.*[pP]olicy:DeprecationWarning"]
    assert "3 passed" in run(suite, f"--iocp-loop={driver}", "-p", "pytest_asyncio.plugin", *options)


def test_anyio(suite: Path, driver: str) -> None:
    pytest.importorskip("anyio", reason="anyio is not installed")
    (suite / "test_it.py").write_text(
        "import anyio, pytest\n"
        "from helper import assert_ours\n"
        "pytestmark = pytest.mark.anyio\n"
        "@pytest.fixture\n"
        "def anyio_backend(): return 'asyncio'\n"
        "@pytest.fixture\n"
        "async def made():\n    assert_ours()\n    yield 1\n    assert_ours()\n"
        "async def test_it(made):\n    await anyio.sleep(0)\n    assert_ours()\n"
    )
    assert "1 passed" in run(suite, f"--iocp-loop={driver}", "-p", "anyio.pytest_plugin")


def test_pytest_aiohttp(suite: Path, driver: str) -> None:
    pytest.importorskip("pytest_aiohttp", reason="pytest-aiohttp is not installed")
    (suite / "test_it.py").write_text(
        "from aiohttp import web\n"
        "from helper import assert_ours\n"
        "async def hello(request):\n    assert_ours()\n    return web.Response(text='hello')\n"
        "async def test_it(aiohttp_client):\n"
        "    app = web.Application()\n"
        "    app.router.add_get('/', hello)\n"
        "    client = await aiohttp_client(app)\n"
        "    assert await (await client.get('/')).text() == 'hello'\n"
    )
    options = ["-o", "asyncio_default_fixture_loop_scope=function", "-o", "asyncio_mode=auto", "-W", "default"]
    plugins = ["-p", "pytest_asyncio.plugin", "-p", "pytest_aiohttp.plugin"]
    assert "1 passed" in run(suite, f"--iocp-loop={driver}", *plugins, *options)


# -- tests that do not run on it -------------------------------------------------------------------

ELSEWHERE = """
import asyncio
import pytest

class Other(asyncio.SelectorEventLoop):
    pass

async def nothing(): pass

def test_other():
    with asyncio.Runner(loop_factory=Other) as runner:
        runner.run(nothing())

def test_both():
    test_other()
    asyncio.run(nothing())

def test_skipped():
    test_other()
    pytest.skip("first")

def test_failing():
    test_other()
    assert 1 == 2

async def test_coroutine(): pass
"""


def test_a_test_that_ran_on_another_loop_fails(suite: Path) -> None:
    (suite / "test_it.py").write_text(ELSEWHERE)
    (suite / "conftest.py").write_text(
        "def pytest_pyfunc_call(pyfuncitem):\n"  # whoever runs coroutines on no loop of asyncio's, like trio
        "    if pyfuncitem.name == 'test_coroutine':\n"
        "        try: pyfuncitem.obj().send(None)\n"
        "        except StopIteration: return True\n"
    )
    text = run(suite, "--iocp-loop", code=1)
    assert "FAILED test_it.py::test_other - Failed: --iocp-loop: this test ran on test_it.Other" in text
    assert "FAILED test_it.py::test_coroutine - Failed: --iocp-loop: this test ran on no loop of asyncio" in text
    assert "FAILED test_it.py::test_failing - assert 1 == 2" in text
    assert "PASSED test_it.py::test_both" in text
    assert "3 failed, 1 passed, 1 skipped" in text
    assert "2 failed" not in run(suite, code=1)  # without the option only the one that is to fail


# -- asking for it ---------------------------------------------------------------------------------


def test_a_driver_that_cannot_be_had_is_an_error_with_the_cause(suite: Path) -> None:
    impossible = "uring" if WINDOWS else "iocp"
    assert availability(impossible).reason in run(suite, f"--iocp-loop={impossible}", code=4)


def test_the_name_of_a_file_is_no_driver(suite: Path) -> None:
    (suite / "test_it.py").write_text("def test_it(): pass\n")
    assert "write --iocp-loop=auto" in run(suite, "--iocp-loop", "test_it.py", code=4)
    assert "1 passed" in run(suite, "--iocp-loop=auto", "test_it.py")


def test_who_does_not_ask_gets_nothing(suite: Path) -> None:
    (suite / "test_it.py").write_text(
        "import asyncio, sys\n"
        "def test_it():\n"
        "    assert not [name for name in sys.modules if name.startswith('iocp_loop.') and 'plugin' not in name]\n"
        "    loop = asyncio.new_event_loop()\n"
        "    assert 'iocp_loop' not in type(loop).__module__\n"
        "    loop.close()\n"
    )
    assert "iocp_loop: " not in run(suite)


def test_it_is_installed_for_pytest_to_find() -> None:
    points = importlib.metadata.entry_points(group="pytest11")
    if not any(point.value == "iocp_loop.pytest_plugin" for point in points):
        pytest.skip("the package is found here, but not installed")
