"""What an installation without native code tells: the doctor, errors, and a line at import in debug mode."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from iocp_loop import built

from .support import run_python

#: Hides compiled modules as if they had never been built.
HIDE = """
import importlib.machinery, sys
hidden = {names!r}
find_spec = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = lambda name, *a, **k: None if name in hidden else find_spec(name, *a, **k)
"""

BINDING = [f"iocp_loop.{name}" for name in {"linux": ["_uring"], "win32": ["_iocp"]}.get(sys.platform, [])]
ALL = ["iocp_loop._hot", *BINDING]


def printed(code: str, hidden: list[str], *options: str, **environment: str) -> tuple[str, str]:
    done = run_python(HIDE.format(names=hidden) + code, *options, **environment)
    return done.stdout, done.stderr


def test_the_doctor_says_that_it_was_not_built() -> None:
    code = "from iocp_loop import doctor; print(doctor.describe(doctor.examine()))"
    text, _ = printed(code, ALL)
    for line in text.splitlines():
        assert "circular" not in line
    (tier,) = (line for line in text.splitlines() if line.startswith("tier"))
    assert tier.startswith("tier       python, iocp_loop._hot was not built")
    if sys.platform == "linux":
        (uring,) = (line for line in text.splitlines() if line.startswith("uring "))
        assert "not available, iocp_loop._uring was not built" in uring


def test_a_native_tier_that_was_asked_for_and_not_built_is_an_error_with_the_cause() -> None:
    code = "try:\n    import iocp_loop.native\nexcept ImportError as error:\n    print(error)"
    text, _ = printed(code, ALL, IOCP_LOOP_NATIVE="1")
    assert text.startswith("IOCP_LOOP_NATIVE=1, but iocp_loop._hot was not built")


@pytest.mark.parametrize("mode", ["PYTHONASYNCIODEBUG", "PYTHONDEVMODE"])
def test_in_debug_mode_the_import_says_so_in_one_line(mode: str) -> None:
    _, err = printed("import iocp_loop", ALL, **{mode: "1"})
    (line,) = err.splitlines()
    assert line.startswith(f"iocp_loop runs without {' and '.join(ALL)}, which was not built: it is slower")
    assert ("driver poll alone" in line) == bool(BINDING)
    assert "python -m iocp_loop" in line


def test_without_debug_mode_or_with_everything_built_it_says_nothing() -> None:
    assert printed("import iocp_loop", ALL) == ("", "")
    complete = "import iocp_loop, logging; from iocp_loop import built; print(built.needed_modules())"
    assert printed(complete, [])[1] == ""


def test_who_wants_the_python_tier_is_not_told_that_it_is_one() -> None:
    assert printed("import iocp_loop", ALL, PYTHONASYNCIODEBUG="1", IOCP_LOOP_NATIVE="0") == ("", "")


def test_what_was_built_for_another_python_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(built, "__file__", str(tmp_path / "built.py"))
    (tmp_path / "_hot.cpython-39-other.so").touch()
    error = ModuleNotFoundError("No module named 'iocp_loop._hot'", name="iocp_loop._hot")
    assert "not built for this Python, only _hot.cpython-39-other.so" in built.why_missing("iocp_loop._hot", error)


def test_what_was_not_built_at_all_lacked_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(built, "__file__", str(tmp_path / "built.py"))
    error = ModuleNotFoundError("No module named 'iocp_loop._hot'", name="iocp_loop._hot")
    assert built.why_missing("iocp_loop._hot", error).startswith("iocp_loop._hot was not built: no C compiler or no")


def test_what_is_there_and_does_not_load_gives_the_loaders_reason() -> None:
    error = ImportError("undefined symbol: Py_Nonsense")
    assert (
        built.why_missing("iocp_loop._hot", error) == "iocp_loop._hot cannot be imported: undefined symbol: Py_Nonsense"
    )
