"""docs/architecture.md is true: imports point down, and every function that it names is there.

LAYERS is the one place where the layers are written down; the page shows the same to people.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from .support import ROOT, WINDOWS

#: Under Wine the tests have a part of the tree only.
pytestmark = pytest.mark.skipif(WINDOWS, reason="the files are the same on every system")

PACKAGE = ROOT / "iocp_loop"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")

#: Who may import whom: a module imports only what stands below its own line.
LAYERS = [
    "__main__ pytest_plugin _startup.sitecustomize echo.__main__",
    "doctor launch takeover echo.options",
    "__init__ echo.__init__ echo.service echo.output echo.supervisor",
    "threads",
    "policy readers",
    "loop",
    "methods.clock methods.connecting methods.embedding methods.names methods.pipes methods.readiness methods.signals",
    "methods.sockets methods.subprocesses methods.tls methods.turns methods.unix methods.__init__ statistics",
    "endpoints.datagrams endpoints.tls pipes.named pipes.unix pipes.windows",
    "pipes.transports pipes.channels pipes.__init__ endpoints.listener",
    "transports",
    "connections",
    "streams",
    "life",
    "flow proactor endpoints.sendfile endpoints.__init__ debugging ports.iocp.handles",
    "ports.__init__",
    "ports.port",
    "ports.choice",
    "ports.iocp.driver ports.uring.driver",
    "ports.iocp.turns ports.iocp.files ports.iocp.readiness ports.iocp.sockets ports.poll.driver ports.uring.files",
    "ports.uring.turns",
    "ports.iocp.receiving ports.poll.calls ports.poll.pollers ports.poll.turns",
    "ports.iocp.datagrams",
    "ports.iocp.requests",
    "ports.iocp.binding ports.uring.binding ports.iocp.__init__ ports.uring.__init__ ports.poll.__init__",
    "ports.accepting ports.receiving",
    "ports.driver",
    "operations native system",
    "built _cffi_build",
]

#: The same for headers in C: a file includes only what stands below its own line; a .c file stands on its headers.
HEADERS = [
    "hot/accepting.h hot/connecting.h hot/epoll.h hot/iocp.h hot/sockets.h hot/streams.h hot/turns.h",
    "hot/calls.h hot/driver.h hot/handles.h hot/readers.h hot/receiving.h",
    "hot/hot.h",
    "windows/shared.h",
    "linux/pool.h",
    "linux/kernel.h linux/uring.h windows/iocp.h",
]

#: And for the C of the native tier: a file calls only functions, and uses only data, of files below its own line.
NATIVE_TIER = [
    "module",
    "turns uring iocp",
    "epoll iocp_sockets schedule tasks",
    "epoll_watches iocp_datagrams iocp_once ready",
    "ahead epoll_waits iocp_submissions",
    "accepting transports",
    "life",
    "connections",
    "addresses connecting proactor readers sockets streams tls",
    "datagrams driver handles receiving stream_calls",
    "timers",
    "shared",
]

#: Extension modules, which import nothing of ours.
COMPILED = {"_hot", "_iocp", "_uring"}

LEVEL = {module: level for level, line in enumerate(LAYERS) for module in line.split()}
HEADER_LEVEL = {header: level for level, line in enumerate(HEADERS) for header in line.split()}


def modules() -> dict[str, Path]:
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}


def run_time_imports(tree: ast.AST) -> Iterator[ast.ImportFrom]:
    """Every relative import but those for the type checker, those inside functions too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield from run_time_imports(ast.Module([other], []))
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield node
        else:
            yield from run_time_imports(node)


def imported(module: str, path: Path) -> Iterator[str]:
    known = modules()
    package = module.split(".")[:-1]
    for node in run_time_imports(ast.parse(path.read_text(encoding="utf-8"))):
        base = [*package[: len(package) - node.level + 1], *filter(None, [node.module])]
        for alias in node.names:
            names = [".".join([*base, alias.name]), ".".join(base), ".".join([*base, "__init__"])]
            found = next(name for name in names if name in known or name in COMPILED)
            if found not in COMPILED and base[-1:] != [alias.name]:
                yield found


def test_every_module_has_its_layer() -> None:
    assert set(modules()) == set(LEVEL)


@pytest.mark.parametrize("module", sorted(LEVEL))
def test_imports_point_down(module: str) -> None:
    for other in set(imported(module, modules()[module])):
        assert LEVEL[other] > LEVEL[module], f"{module} imports {other}, which does not stand below it"


def c_files() -> list[Path]:
    return sorted(path for path in (PACKAGE / "_native").rglob("*.[ch]") if not path.name.endswith(".cdef.h"))


@pytest.mark.parametrize("path", c_files(), ids=lambda path: "/".join(path.parts[-2:]))
def test_includes_point_down(path: Path) -> None:
    name = path.relative_to(PACKAGE / "_native").as_posix()
    level = HEADER_LEVEL[name] if path.suffix == ".h" else -1
    for line in re.findall(r'^#\s*include "(.*)"', path.read_text(encoding="utf-8"), re.MULTILINE):
        target = (path.parent / line).resolve().relative_to((PACKAGE / "_native").resolve()).as_posix()
        assert HEADER_LEVEL[target] > level, f"{name} includes {target}"
        if not name.startswith("hot/"):
            assert not target.startswith("hot/"), f"{name}: the binding knows nothing of the native tier"


@functools.cache
def c_code(path: Path) -> str:
    """The text of a file in C, without comments and strings."""
    text = re.sub(r"/\*.*?\*/", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.sub(r'"(?:\\.|[^"\\\n])*"', '""', text)


def exported() -> dict[str, str]:
    """The file of each function and each variable of the native tier that is not static."""
    found: dict[str, str] = {}
    for path in (PACKAGE / "_native" / "hot").glob("*.c"):
        for line in re.findall(r"^(?!static|typedef|extern|enum .*\{|#)[A-Za-z_].*$", c_code(path), re.MULTILINE):
            names = re.findall(r"(\w+)\(", line)[:1] if "(" in line else re.findall(r"(\w+)(?=[,;\[])", line)
            found |= dict.fromkeys(names, path.stem)
    return found


def test_the_c_of_the_native_tier_calls_down() -> None:
    level = {stem: level for level, line in enumerate(NATIVE_TIER) for stem in line.split()}
    homes = exported()
    assert {"receive_for_stream", "launch", "stream_begin"} < set(homes)
    assert set(level) == {path.stem for path in (PACKAGE / "_native" / "hot").glob("*.c")}
    for path in (PACKAGE / "_native" / "hot").glob("*.c"):
        for name in set(re.findall(r"\w+", c_code(path))) & set(homes):
            home = homes[name]
            assert home == path.stem or level[home] > level[path.stem], f"{path.name} uses {name} of {home}.c"


#: What in C is written to and yet stands outside every object: that of the process, and why.
OF_THE_PROCESS = {
    "hot/shared.c memory": "without a GIL each thread has its own",
    "hot/shared.c key": "frees it when the thread ends",
    "hot/shared.c once": "makes the key",
    "hot/shared.c key_made": "the same on Windows",
    "windows/console.c console_lock": "a process has one console, whose events come in a thread of the system's",
    "windows/console.c console_ports": "the ports that are told of them",
    "windows/console.c console_room": "the ports that are told of them",
    "windows/console.c console_event_at": "when the last one came",
    "windows/console.c closing_signal": "whether the console closes",
    "windows/console.c is_service": "whether the process is a service, which outlives it",
    "windows/iocp.c lock": "Winsock is started once for the process",
    "windows/iocp.c started": "Winsock is started once for the process",
    "windows/iocp.c found": "the addresses of the system's functions, the same for all",
}

#: Tables that CPython reads, and does not take as const.
TABLES = {"PyMethodDef", "PyMemberDef", "PyGetSetDef", "PyType_Slot", "PyType_Spec", "PyModuleDef_Slot", "PyModuleDef"}


def variables(path: Path) -> set[str]:
    """What a file in C keeps outside of functions, or from call to call within them, and may write to."""
    code = re.sub(r"^\s*#(?:.*\\\n)*.*", "", c_code(path), flags=re.MULTILINE)
    outside = re.sub(r"^\{.*?^\}", ";", code, flags=re.MULTILINE | re.DOTALL)  # bodies of functions
    declared = re.findall(r"^(?!typedef|extern)\w[^;{]*[;{]", outside, re.MULTILINE)
    found = set()
    for text in declared + re.findall(r"\bstatic\b[^;{]*[;{]", code):
        plain = re.sub(r"=[^,;{]*", "", text)  # without what they begin with
        words = re.findall(r"\w+", plain)
        is_type = words[0] == "enum" or (words[0] == "struct" and len(words) == 2)
        if "(" not in plain and not is_type and "const" not in words and not TABLES & set(words):
            found |= set(re.findall(r"(\w+)(?:\[\w*\])?\s*(?=[,;{])", plain))
    return {f"{path.parent.name}/{path.name} {name}" for name in found}


def test_nothing_in_c_belongs_to_the_process() -> None:
    """But what stands in the list: all else has its place in the module's state or in a loop (hot.h)."""
    found = set().union(*(variables(path) for path in c_files() if path.suffix == ".c"))
    assert found == set(OF_THE_PROCESS)


@pytest.mark.parametrize(("binding", "header"), [("iocp", "windows/iocp.h"), ("uring", "linux/uring.h")])
def test_what_is_called_of_a_binding_is_declared(binding: str, header: str) -> None:
    """Who takes a function away sees here that a test on the other system calls it."""
    declared = c_code(PACKAGE / "_native" / header)
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        for name in re.findall(rf"\blib\.({binding}_\w+)", path.read_text(encoding="utf-8")):
            assert re.search(rf"\b{name}\(", declared), f"{path.name} calls {name}, which {header} lacks"


def test_the_page_shows_every_module() -> None:
    picture = PAGE[PAGE.index("## The layers") : PAGE.index("## The way of a byte")]
    for path in modules().values():
        if path.name not in ("__init__.py", "sitecustomize.py"):
            assert path.stem in picture, f"{path.name} is missing from the layers in docs/architecture.md"


# -- the functions that the page names -------------------------------------------------------------


@functools.cache
def defined(path: Path) -> set[str]:
    """The functions, classes, methods (`Class.method`) and module-level names of a file in Python or C."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return set(re.findall(r"^[A-Za-z_][\w \*]*?\b(\w+)\([^;]*$", text, re.MULTILINE))
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{child.name}" for child in node.body if isinstance(child, _FUNCTIONS)}
        if isinstance(node, (ast.ClassDef, *_FUNCTIONS)):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {ast.unparse(target) for target in node.targets}
        elif isinstance(node, ast.AnnAssign):
            names.add(ast.unparse(node.target))
    return names


_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

STATIONS = sorted(set(re.findall(r"`([\w/]+\.(?:py|c))::([\w.]+)`", PAGE)))


def test_the_page_names_functions() -> None:
    assert len(STATIONS) > 30


@pytest.mark.parametrize(("file", "name"), STATIONS, ids=[f"{file}-{name}" for file, name in STATIONS])
def test_a_named_function_is_there(file: str, name: str) -> None:
    path = PACKAGE / file if (PACKAGE / file).exists() else ROOT / file
    assert path.exists(), f"docs/architecture.md names {file}, which is gone"
    assert name in defined(path), f"docs/architecture.md names {file}::{name}, which is gone"


def test_the_example_of_an_operation_names_every_file_that_knows_of_it() -> None:
    start = PAGE.index("## Adding an operation")
    section = PAGE[start : PAGE.index("\n## ", start)]
    for path in [*modules().values(), *(PACKAGE / "_native").rglob("*.[ch]")]:
        if re.search(r"ReceiveFromInto|recvfrom_into|iocp_receive_from", path.read_text(encoding="utf-8")):
            assert path.name in section, path


def test_the_way_of_a_byte_is_short() -> None:
    """At most five files in and four out, on each driver and tier."""
    rows = re.findall(r"^\| (in|out), (.*?) \|(.*)$", PAGE, re.MULTILINE)
    assert len(rows) >= 10
    for way, case, stations in rows:
        files = dict.fromkeys(re.findall(r"`([\w/]+\.(?:py|c))::", stations))
        assert len(files) <= (5 if way == "in" else 4), f"{case}: {list(files)}"


# -- sizes -----------------------------------------------------------------------------------------

#: Lines; house rules, so that a file has one subject and a function fits a screen.
LONGEST_FILE = 600
LONGEST_FUNCTION = 50


def functions_in_c(text: str) -> Iterator[tuple[str, int]]:
    """The name of each function that a file defines, and its lines."""
    code = re.sub(r"/\*.*?\*/", lambda comment: "\n" * comment[0].count("\n"), text, flags=re.DOTALL)
    function = r"^\w[^;={}()]*?(\w+)\([^;{}]*\)\s*\{(?:[^\n]*\}$|.*?^\})"
    for found in re.finditer(function, code, re.MULTILINE | re.DOTALL):
        yield found[1], found[0].count("\n") + 1


def functions_in_python(text: str) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, _FUNCTIONS):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            yield node.name, (node.end_lineno or first) - first + 1


@pytest.mark.parametrize("path", [*modules().values(), *c_files()], ids=lambda path: "/".join(path.parts[-2:]))
def test_files_and_functions_are_of_a_size(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= LONGEST_FILE, f"{path.name} has {text.count(chr(10))} lines"
    functions = list(functions_in_python(text) if path.suffix == ".py" else functions_in_c(text))
    long = {name: lines for name, lines in functions if lines > LONGEST_FUNCTION}
    assert not long, f"{path.name} has functions of more than {LONGEST_FUNCTION} lines: {long}"
    if path.suffix == ".c":
        assert defined(path) <= {name for name, _ in functions}, "a function that was not measured"


# -- the tests themselves --------------------------------------------------------------------------


def test_test_files_do_not_import_from_each_other() -> None:
    """What several of them need stands in support.py, rig.py and their kin."""
    for path in (ROOT / "tests").rglob("*.py"):
        found = re.findall(
            r"^\s*from \.+(?:\w+\.)*(test_\w+) import|^\s*import .*\b(test_\w+)$", path.read_text("utf-8"), re.M
        )
        assert not found, f"{path.name} imports from {found}"
