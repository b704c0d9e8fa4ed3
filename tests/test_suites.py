"""The tool that runs other projects' own tests: what it makes of their outcomes, and that its list is strict."""

from __future__ import annotations

import importlib.util
import json
import tomllib
from typing import Any

import pytest

from .support import ROOT

TOOL = ROOT / "tools" / "test_suites.py"

pytestmark = pytest.mark.skipif(not TOOL.exists(), reason="the tools are not here")


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("test_suites_tool", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def result(beyond: dict[str, str], broken: str = "") -> dict[str, Any]:
    ours = {"passed": 1, "skipped": 0, "failed": beyond, "broken": broken, "beyond": beyond}
    stock = {"passed": 2, "skipped": 0, "failed": {"tests/z.py::always": "no"}, "broken": ""}
    return {"version": "1.0", "origin": "the sdist", "kinds": {"asyncio": stock, "poll": ours}}


def test_outcomes_are_counted(tool: Any) -> None:
    rows = [["a", "passed", ""], ["b", "failed", "why"], ["c", "skipped", ""], ["d", "passed", ""]]
    assert tool.read(map(json.dumps, rows)) == tool.Outcome(2, 1, {"b": "why"})


def test_the_list_is_strict(tool: Any) -> None:
    suite = {"beyond": [{"test": "tests/a.py::one", "why": "because"}]}
    assert tool.complaints("it", suite, result({"tests/a.py::one[x]": "no"})) == []
    (wrong,) = tool.complaints("it", {}, result({"tests/a.py::one[x]": "no"}))
    assert "tests/a.py::one[x] fails here, and not on asyncio: no" in wrong
    (wrong,) = tool.complaints("it", suite, result({}))
    assert "does not fail" in wrong
    assert tool.complaints("it", {"beyond": [{**suite["beyond"][0], "sometimes": True}]}, result({})) == []
    assert tool.complaints("it", {"beyond": [{**suite["beyond"][0], "driver": "uring"}]}, result({})) == []
    assert tool.complaints("it", {}, result({}, broken="exit code 4")) == ["it on poll: exit code 4"]


def test_a_test_that_passes_alone_is_not_beyond(tool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    failing_alone = {"steady": True, "unsteady": False}
    monkeypatch.setattr(
        tool, "run", lambda *args: tool.Outcome(0, 0, {name: "no" for name in args[-1] if failing_alone[name]})
    )
    ours = tool.Outcome(0, 0, {"steady": "no", "unsteady": "no", "everywhere": "no"})
    stock = tool.Outcome(0, 0, {"everywhere": "no"})
    assert tool.beyond({}, "poll", ours, stock, None, None) == {"steady": "no"}


def test_the_page_names_each_reason(tool: Any) -> None:
    suite = {"it": {"beyond": [{"test": "tests/a.py::one", "why": "because", "driver": "poll"}]}}
    page = tool.page({"it": result({"tests/a.py::one": "no"})}, suite)
    assert "| it 1.0 | the sdist | 2 | 1 | 1 |" in page
    assert "- it, `tests/a.py::one` on `poll`: because" in page


def test_each_project_of_the_list_is_on_the_page() -> None:
    page = (ROOT / "docs" / "suites.md").read_text(encoding="utf-8")
    for name, suite in tomllib.loads((ROOT / "tools" / "suites.toml").read_text(encoding="utf-8")).items():
        assert f"\n| {name} " in page
        for entry in suite.get("beyond", []):
            assert entry["why"] in page
