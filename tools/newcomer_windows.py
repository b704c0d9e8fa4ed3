"""A newcomer's path on Windows, under Wine and with a stopwatch: ``make newcomer-windows``.

A wheel, FastAPI and uvicorn go into an empty folder, and an application of five lines is served on this loop and asked.
The Windows Python stands already, as a newcomer's does; pip is that of this machine, told that it is on Windows.

    python tools/newcomer_windows.py [VERSION] [WHEEL]

Exit status 0 if it took less than three minutes.
"""

from __future__ import annotations

import re
import socket
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

from windows_python import SetupError, WindowsPython, end_cleanly, say, windows_path

ROOT = Path(__file__).resolve().parent.parent

#: The application of README's path, as newcomer.sh has it.
APP = re.compile(r"<<'PROGRAM'\n(.*?)\nPROGRAM\n", re.DOTALL)

LIMIT = 180


def ask(port: int, deadline: float) -> str:
    """What the application answers as soon as it does."""
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=10) as answer:
                return str(answer.read().decode())
        except OSError:
            if time.monotonic() > deadline:
                raise SetupError(f"no answer within {LIMIT} s") from None
            time.sleep(0.1)


def main() -> int:
    end_cleanly()
    version = sys.argv[1] if len(sys.argv) > 1 else "auto"
    try:
        python = WindowsPython(version)
        python.build()
        pattern = f"iocp_loop-*-cp{python.version.replace('.', '')}-*-win_amd64.whl"
        wheels = [Path(sys.argv[2])] if len(sys.argv) > 2 else sorted((ROOT / "dist").glob(pattern))
        if not wheels:
            raise SetupError(
                f"no {pattern} in dist/: make wheels ARGS='--version {python.version} --platform win_amd64'"
            )
        with tempfile.TemporaryDirectory() as name, python.wine.session():
            begin = time.monotonic()
            folder = Path(name)
            program = APP.search((ROOT / "tools/newcomer.sh").read_text(encoding="utf-8"))
            assert program is not None
            (folder / "app.py").write_text(program[1], encoding="utf-8")
            # colorama: what click wants on Windows, which pip judges by the system that it runs on.
            python.pip("install", "--target", folder / "site", wheels[-1].absolute(), "fastapi", "uvicorn", "colorama")
            python.wine.environment["PYTHONPATH"] = windows_path(folder / "site")
            with socket.create_server(("127.0.0.1", 0)) as sock:
                port = sock.getsockname()[1]
            words = ["app:app", "--port", str(port), "--loop", "iocp_loop:new_event_loop", "--log-level", "warning"]
            server = threading.Thread(
                target=python.run,
                args=(["-m", "uvicorn", *words],),
                kwargs={"cwd": folder, "timeout": LIMIT},
                daemon=True,
            )
            server.start()
            answer = ask(port, begin + LIMIT)
            seconds = time.monotonic() - begin
            print(f"{answer} after {seconds:.0f} s", flush=True)
            return 0 if "IocpEventLoop driver=iocp" in answer and seconds < LIMIT else 1
    except SetupError as exc:
        say(str(exc))
        return 2


if __name__ == "__main__":
    sys.exit(main())
