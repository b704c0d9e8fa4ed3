"""README and docs: every block of Python runs, every link leads somewhere, figures are those of the performance page.

A block runs as it stands, in a process of its own, on each driver.  A comment right before it says what it needs:

    <!-- run with: NAME -->     the program PREFACES[NAME] comes first
    <!-- run as: server -->     it serves until it is stopped; what it gets it must send back
    <!-- not run: REASON -->    it is only compiled

``since 3.12`` or ``until 3.13`` in the comment names the Pythons that it is for.  The blocks of docs/recipes.md are run
by test_recipes.py.
"""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import pytest

from .support import LIMIT, ROOT, WINDOWS, child_environment

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("*/README.md")])

PREFACES = {
    "main": "import asyncio\nasync def main():\n    await asyncio.sleep(0)\n",
    "window": """
import iocp_loop
class root:
    def after(ms, function):
        root.later = function
loop = iocp_loop.new_event_loop()
import atexit
def use_it():
    ran = []
    loop.call_soon(ran.append, 1)
    every_10_ms()
    assert ran and root.later is every_10_ms
    loop.close()
atexit.register(use_it)
""",
}

_BLOCK = re.compile(
    r"(?:^<!-- (?P<how>(?:run with|run as|not run): .*?) -->\n)?^```python\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    where: str
    text: str
    how: str

    def __str__(self) -> str:
        return self.where


def blocks() -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in _BLOCK.finditer(text):
            line = text.count("\n", 0, match.start("text"))
            found.append(Block(f"{page.relative_to(ROOT).as_posix()}:{line}", match["text"], match["how"] or ""))
    return [block for block in found if not block.where.startswith("docs/recipes.md")]


def test_every_block_is_found() -> None:
    """None is written in a way that the pattern above does not know."""
    fences = sum(
        len(re.findall(r"^```+ *(?:python|py|\{code-block\})", page.read_text(encoding="utf-8"), re.MULTILINE))
        for page in PAGES
        if page.name != "recipes.md"
    )
    assert len(blocks()) == fences > 5


@pytest.mark.parametrize("block", blocks(), ids=str)
def test_block(block: Block, driver: str) -> None:
    how, _, what = block.how.partition(": ")
    compile(block.text, block.where, "exec")
    if how == "not run":
        return
    this = sys.version_info[:2]
    for word, version in re.findall(r"(since|until) (\d\.\d+)", what):
        other = tuple(map(int, version.split(".")))
        if this < other if word == "since" else this > other:
            pytest.skip(f"for Python {word} {version}")
    environment = child_environment(IOCP_LOOP_DRIVER=driver, PYTHONUNBUFFERED="1")
    if how == "run as":
        serve(block.text, environment)
        return
    name = what.partition(",")[0]
    program = PREFACES[name] + block.text if how == "run with" else block.text
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=3 * LIMIT)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    # What a comment says of the output is so.
    for line in re.findall(r"^ *print\(.*\)  # (.*)$", block.text, re.MULTILINE):
        assert line in done.stdout.splitlines()


def serve(text: str, environment: dict[str, str]) -> None:
    if WINDOWS:
        pytest.skip("a Ctrl-C cannot be sent to one process there; examples/echo_server.py is this program")
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    assert "8888" in text
    process = subprocess.Popen([sys.executable, "-c", text.replace("8888", str(port))], env=environment, cwd=ROOT,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    with process:
        try:
            deadline = time.monotonic() + LIMIT
            while True:
                assert process.poll() is None
                assert time.monotonic() < deadline
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), LIMIT) as sock:
                    sock.sendall(b"hello\n")
                    assert sock.makefile("rb").readline() == b"hello\n"
                    break
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=LIMIT)
            assert "KeyboardInterrupt" in errors
        finally:
            process.kill()


# -- links -----------------------------------------------------------------------------------------


def slugs(page: Path) -> set[str]:
    """The anchors of a page: its headings, as GitHub and Sphinx name them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.skipif(WINDOWS, reason="the pages are the same on every system, and under Wine some are missing")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links(page: Path) -> None:
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            assert target.startswith("https://"), target
            continue
        path, _, anchor = unquote(target).partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target}: no such file"
        if anchor:
            assert anchor in slugs(file), f"{target}: no such heading"


def test_every_page_is_in_the_table_of_contents() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^([a-z-]+)$", index, re.MULTILINE))
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"} == listed


# -- figures ---------------------------------------------------------------------------------------


def test_the_figures_of_the_readme_are_those_of_the_performance_page() -> None:
    """What README's table says of costs and memory can be measured again by the commands of that page."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")

    def cells(text: str, row: str) -> list[str]:
        (line,) = re.findall(rf"^\| {re.escape(row)} .*$", text.replace("`", ""), re.MULTILINE)
        return [cell.strip() for cell in line.strip("|").split("|")[1:]]

    def costs(row: str, text: str = page) -> list[float]:
        """Of asyncio, uvloop, uring."""
        return [float(cell.split()[0].replace(",", "")) for cell in cells(text, row)[:3]]

    tcp = page[page.index("### Echo, tcp") : page.index("### Echo, unix")]
    shown = cells(readme, "CPU per echo, µs (protocol, streams, sock_*)")[:3]
    for place, mode in enumerate(("protocol", "streams", "sock")):
        ours, stock, uvloop = (float(cell.split(", ")[place]) for cell in shown)
        assert [stock, uvloop, ours] == [round(cost, 1) for cost in costs(f"{mode} 1 KiB x 100", tcp)]
    differences = (ROOT / "docs" / "differences.md").read_text(encoding="utf-8")
    rows = ("iocp_loop on uring, on poll", "asyncio (selector)", "uvloop |")
    counted = [cells(differences[differences.index("## CPython's own tests") :], row)[-2] for row in rows]
    assert cells(readme, "CPython's own tests of every loop, passed")[:3] == counted
    ours, stock, uvloop = map(float, cells(readme, "memory of an idle TLS connection, KiB")[:3])
    assert [stock, uvloop, ours] == [round(cost) for cost in costs("protocol tls, 1000 idle after 1 KiB")]
    windows = page[page.index("## Windows: calls per message") :]
    counted = [cells(windows, f"protocol | 100 | {name}")[3] for name in ("iocp_loop", "asyncio's Proactor", "winloop")]
    assert cells(readme, "calls for I/O per message on Windows")[:2] == [str(round(float(n))) for n in counted[:2]]
    assert cells(readme, "calls for I/O per message on Windows")[3] == str(round(float(counted[2])))


def test_the_readme_counts_the_libraries_of_their_page() -> None:
    page = (ROOT / "docs" / "libraries.md").read_text(encoding="utf-8")
    rows = len(re.findall(r"^\| ", page, re.MULTILINE)) - 1
    assert f"About {5 * round(rows / 5)} [real libraries]" in (ROOT / "README.md").read_text(encoding="utf-8")


#: What a measurement looks like: a unit of time or a percentage, a share, a cell of a table with a decimal.
FIGURE = re.compile(r"\d[\d.,]* (?:us|µs|ns|instructions|per)\b|\d ?%|\| *[\d,]+\.\d+ *(?:\([\d.]+\) *)?\|")
COMMAND = re.compile(r"\b(?:python3? -m [a-z]|make [a-z]|strace )|\btools/\w+|\.ci/run")

#: Figures that are constants of the code and not measured.
CONSTANTS = {"docs/architecture.md": ["50 us"]}


def parts(text: str) -> list[str]:
    """A page, cut at its headings; what a program makes is one part, whatever its headings."""
    made = re.compile(r"^<!-- begin: .*?^<!-- end: .*?$", re.MULTILINE | re.DOTALL)
    found = made.findall(text)
    for part in re.split(r"^#+ .*$", made.sub("", text), flags=re.MULTILINE):
        # A block of code has no figures of ours.
        found.append(re.sub(r"^```python.*?^```", "", part, flags=re.MULTILINE | re.DOTALL))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_figure_names_its_command(page: Path) -> None:
    """Beneath the same heading; README's are those of the performance page, see above."""
    if page.name == "CHANGELOG.md":
        pytest.skip("it tells of versions that are gone")
    name = page.relative_to(ROOT).as_posix()
    for part in parts(page.read_text(encoding="utf-8")):
        figures = [figure for figure in FIGURE.findall(part) if figure not in CONSTANTS.get(name, ())]
        assert not figures or COMMAND.search(part), f"{figures[:5]} without a command that measures them: {part[:200]}"


def commands(page: Path) -> list[list[str]]:
    """The commands that a page shows, in blocks and between backticks, as words without comments."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [*re.findall(r"^(?:    |\$ )(.*)$", text, re.MULTILINE), *re.findall(r"`([^`]+)`", text)]
    return [line.split("#")[0].split() for line in lines]


@pytest.mark.skipif(not (ROOT / "Makefile").exists(), reason="the sources are not here: a wheel is tested")
@pytest.mark.skipif(WINDOWS, reason="the pages are the same on every system")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_command_is_there(page: Path) -> None:
    """The benchmark takes these arguments, make has this target, the tool is a file."""
    from benchmarks.__main__ import _parser

    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for words in commands(page):
        match words:
            case ["python" | "python3", "-m", "benchmarks", name, *arguments] if not name.startswith("-"):
                _parser().parse_args([name, *arguments])
            case ["make", target, *_] if re.fullmatch(r"[a-z-]+", target):
                assert target in targets, f"make {target}: no such target"
            case ["python" | "python3", tool, *_] if tool.startswith("tools/"):
                assert (ROOT / tool).exists(), tool
