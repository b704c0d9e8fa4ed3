"""docs/recipes.md: each recipe does what it says, as it stands there.

A recipe's files are written to a folder and its command is run there, with a port behind it where it serves.  Libraries
that are not installed are skipped; ``make test-apps`` installs them all.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from iocp_loop.ports import availability

from .programs import REFUSE
from .support import LIMIT, ROOT, WINDOWS, child_environment

TEXT = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)

#: Servers end by SIGTERM or Ctrl-C, which cannot be sent to one process on Windows.
pytestmark = pytest.mark.skipif(WINDOWS, reason="the recipes are run on Linux")


def need(*modules: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed (make test-apps)")


def section(heading: str) -> list[tuple[str, str]]:
    """The blocks of one section: language and text."""
    start = TEXT.index(f"# {heading}\n")
    end = TEXT.find("\n##", start)
    return BLOCK.findall(TEXT[start : end if end >= 0 else len(TEXT)])


def commands(heading: str) -> list[list[str]]:
    """The shell commands of a section, with this environment's programs."""
    lines = [line[2:] for language, text in section(heading) if language == "console" for line in text.splitlines()]
    programs = Path(sys.executable).parent
    return [[str(programs / words[0]), *words[1:]] for words in map(shlex.split, lines)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with every file that the recipes show."""
    for match in BLOCK.finditer(TEXT):
        name = re.match(r"# (\w+\.py)\n", match[2])
        if name is not None:
            (tmp_path / name[1]).write_text(match[2])
    return tmp_path


def environment(folder: Path, driver: str) -> dict[str, str]:
    # The environment's own folder first: what a recipe starts by name is this environment's too.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return child_environment(IOCP_LOOP_DRIVER=driver, PATH=path, PYTHONUNBUFFERED="1", HOME=str(folder))


def run(folder: Path, driver: str, command: list[str], text: str | None = None) -> str:
    """The output of a command that ends by itself, without fault."""
    done = subprocess.run(
        command, cwd=folder, env=environment(folder, driver), input=text, capture_output=True, text=True,
        timeout=6 * LIMIT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


@contextlib.contextmanager
def serving(folder: Path, driver: str, command: list[str], port: int) -> Iterator[subprocess.Popen[str]]:
    """A server that accepts on `port`; it must end at a SIGTERM."""
    log = (folder / "log").open("w+")
    process = subprocess.Popen(
        command, cwd=folder, env=environment(folder, driver), stdout=log, stderr=subprocess.STDOUT, text=True
    )
    try:
        deadline = time.monotonic() + 3 * LIMIT
        while True:
            assert process.poll() is None, f"it has ended\n{(folder / 'log').read_text()}"
            assert time.monotonic() < deadline, f"it does not listen\n{(folder / 'log').read_text()}"
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), LIMIT):
                break
            time.sleep(0.05)
        yield process
        process.send_signal(signal.SIGTERM)
        process.wait(3 * LIMIT)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        log.close()


def get(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=2 * LIMIT) as answer:
        body: bytes = answer.read()
        return body.decode()


def answer_of(folder: Path, driver: str, command: list[str], port: int) -> str:
    with serving(folder, driver, command, port):
        return get(port)


# -- servers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_uvicorn(folder: Path, driver: str, workers: int) -> None:
    need("uvicorn")
    port = free_port()
    (command,) = commands("uvicorn")
    assert answer_of(folder, driver, [*command, "--workers", str(workers), "--port", str(port)], port) == (
        f"IocpEventLoop {driver}"
    )


def test_uvicorn_with_fastapi_from_python(folder: Path, driver: str) -> None:
    need("uvicorn", "fastapi")
    port = free_port()
    assert "IocpEventLoop" in answer_of(folder, driver, [sys.executable, "main.py", str(port)], port)


def test_uvicorn_unchanged(folder: Path, driver: str) -> None:
    need("uvicorn")
    port = free_port()
    command = [sys.executable, "-m", "iocp_loop", "run", "-m", "uvicorn", "app:app", "--loop", "asyncio"]
    assert answer_of(folder, driver, [*command, "--port", str(port)], port) == f"IocpEventLoop {driver}"


def test_gunicorn(folder: Path, driver: str) -> None:
    need("gunicorn", "uvicorn_worker")
    port = free_port()
    (command,) = commands("gunicorn")
    more = ["--workers", "2", "--bind", f"127.0.0.1:{port}"]
    assert answer_of(folder, driver, [*command, *more], port) == f"IocpEventLoop {driver}"


def test_hypercorn(folder: Path, driver: str) -> None:
    need("hypercorn")
    port = free_port()
    (command,) = commands("hypercorn")
    assert answer_of(folder, driver, [*command, "--bind", f"127.0.0.1:{port}"], port).endswith(driver)


def test_hypercorn_from_python(folder: Path, driver: str) -> None:
    need("hypercorn")
    port = free_port()
    command = [sys.executable, "serve_hypercorn.py", str(port)]
    assert answer_of(folder, driver, command, port) == f"IocpEventLoop {driver}"


@pytest.mark.parametrize("way", ["registered", "unchanged"])
def test_granian(folder: Path, driver: str, way: str) -> None:
    need("granian")
    port = free_port()
    (command,) = commands("granian")
    command = [*command, "--port", str(port)]
    if way == "registered":
        command = [sys.executable, "serve_granian.py", str(port)]
    assert answer_of(folder, driver, command, port) == f"IocpEventLoop {driver}"


def test_aiohttp(folder: Path, driver: str) -> None:
    need("aiohttp")
    port = free_port()
    assert answer_of(folder, driver, [sys.executable, "serve_aiohttp.py", str(port)], port) == "IocpEventLoop"


def test_sockets_from_systemd(folder: Path, driver: str) -> None:
    """As systemd starts a service: descriptors from 3 on, and two variables."""
    shell = f'export LISTEN_PID=$$ LISTEN_FDS=2; exec "{sys.executable}" activated.py'
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
        ours = [first, second]

        def hand_over() -> None:
            high = [os.dup2(sock.fileno(), 100 + n) for n, sock in enumerate(ours)]
            for n, descriptor in enumerate(high):
                os.dup2(descriptor, 3 + n)

        process = subprocess.Popen(
            ["/bin/sh", "-c", shell],
            cwd=folder,
            env=environment(folder, driver),
            pass_fds=[3, 4],
            preexec_fn=hand_over,
        )
        try:
            for sock in ours:
                with socket.create_connection(sock.getsockname(), 2 * LIMIT) as conn:
                    conn.settimeout(2 * LIMIT)
                    conn.sendall(b"hello\n")
                    assert conn.makefile("rb").readline() == b"hello\n"
        finally:
            process.kill()
            process.wait()


# -- libraries and tools ---------------------------------------------------------------------------


def test_anyio(folder: Path, driver: str) -> None:
    need("anyio")
    assert run(folder, driver, [sys.executable, "with_anyio.py"]) == "IocpEventLoop\n"


def test_test_client(folder: Path, driver: str) -> None:
    need("starlette", "httpx")
    assert run(folder, driver, [sys.executable, "with_testclient.py"]) == f"IocpEventLoop {driver}\n"


def test_ipython(folder: Path, driver: str) -> None:
    need("IPython")
    (command,) = commands("IPython")
    code = "import asyncio\nawait asyncio.sleep(0)\nprint(asyncio.get_running_loop())\n"
    (folder / "cell.ipy").write_text(code)
    assert f"<IocpEventLoop driver={driver}" in run(folder, driver, [*command, "--simple-prompt", "cell.ipy"])


def test_jupyter(folder: Path, driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    need("ipykernel", "jupyter_client")
    spec = next(text for language, text in section("Jupyter") if language == "json")
    kernel = folder / "data" / "kernels" / "iocp_loop"
    kernel.mkdir(parents=True)
    settings = json.loads(spec)
    settings["argv"][0] = sys.executable
    (kernel / "kernel.json").write_text(json.dumps(settings))
    script = """
import queue
from jupyter_client.manager import start_new_kernel
manager, client = start_new_kernel(kernel_name="iocp_loop", startup_timeout=100)
try:
    client.execute_interactive("import asyncio; print(asyncio.get_running_loop())", timeout=100)
finally:
    client.stop_channels()
    manager.shutdown_kernel(now=True)
"""
    monkeypatch.setenv("JUPYTER_PATH", str(folder / "data"))
    assert f"<IocpEventLoop driver={driver}" in run(folder, driver, [sys.executable, "-c", script])


def test_dask(folder: Path, driver: str) -> None:
    need("distributed")
    command = commands("dask.distributed")[0]
    text = run(folder, driver, command)
    assert text.startswith("6\n")
    assert text.count("IocpEventLoop") == 2


def test_dask_on_several_machines(folder: Path, driver: str) -> None:
    """Scheduler and worker by the commands of the page, each in a process of its own."""
    need("distributed")
    port = free_port()
    scheduler, worker = commands("dask.distributed")[1:]
    scheduler += ["--host", "127.0.0.1", "--port", str(port), "--no-dashboard"]
    assert worker[-1] == "tcp://scheduler:8786"
    worker[-1] = f"tcp://127.0.0.1:{port}"
    worker += ["--nworkers", "1", "--no-dashboard", "--local-directory", str(folder)]
    script = f"""
from distributed import Client
from with_dask import which
with Client("tcp://127.0.0.1:{port}", timeout=60) as client:
    client.wait_for_workers(1, timeout=60)
    print(client.submit(sum, [1, 2, 3]).result(), *client.run(which).values(), client.run_on_scheduler(which))
"""
    with serving(folder, driver, scheduler, port):
        workers = subprocess.Popen(worker, cwd=folder, env=environment(folder, driver), stderr=subprocess.DEVNULL)
        try:
            assert run(folder, driver, [sys.executable, "-c", script]) == "6 IocpEventLoop IocpEventLoop\n"
        finally:
            workers.terminate()
            workers.wait(3 * LIMIT)


def test_tkinter(folder: Path, driver: str, display: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISPLAY", display)
    text = run(folder, driver, [sys.executable, "with_tk.py"])
    assert text == f"asyncio inside tkinter, IocpEventLoop {driver}\n"


def test_qt(folder: Path, driver: str) -> None:
    need("PySide6")
    probe = subprocess.run([sys.executable, "-c", "import PySide6.QtCore"], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"PySide6 does not load here: {probe.stderr.splitlines()[-1]}")
    text = run(folder, driver, [sys.executable, "with_qt.py"])
    assert text == f"asyncio inside Qt, IocpEventLoop {driver}\n"


# -- containers ------------------------------------------------------------------------------------


#: By number: the same on every architecture.
CALLS = {"io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427}


LOOK = """
import asyncio, iocp_loop
loop = iocp_loop.new_event_loop()
loop.run_until_complete(asyncio.sleep(0.01))
print(loop.driver)
loop.close()
"""


@pytest.mark.skipif(not availability("uring").available, reason="it is about driver uring")
def test_the_rule_for_containers_is_what_io_uring_needs() -> None:
    """With the calls that it allows there is driver uring; without one of them there is poll."""
    rule: dict[str, Any] = json.loads(next(text for language, text in section("Containers") if language == "json"))
    assert rule["action"] == "SCMP_ACT_ALLOW"
    for allowed in (rule["names"], *(set(rule["names"]) - {name} for name in rule["names"])):
        refused = [number for name, number in CALLS.items() if name not in allowed]
        code = f"{REFUSE}\nrefuse_io_uring(1, {refused}){LOOK}"
        done = subprocess.run([sys.executable, "-c", code], env=child_environment(), capture_output=True, text=True,
                              timeout=LIMIT, check=True)  # fmt: skip
        if done.stdout.startswith("no seccomp"):
            pytest.skip(f"this machine lets us set no seccomp filter: {done.stdout}")
        assert done.stdout.strip() == ("poll" if refused else "uring"), refused


def test_every_block_of_python_compiles() -> None:
    for language, text in BLOCK.findall(TEXT):
        if language == "python":
            compile(text, "recipe", "exec")
