"""The life of a transport as a table: what holds of it, and that the documentation shows it."""

from __future__ import annotations

import itertools
import re

import pytest

from iocp_loop import native
from iocp_loop.life import CLOSED, CLOSING, LIFE, LOST, MADE, OVER, Event, Life, State

from .support import ROOT, WINDOWS

BEGIN, END = "<!-- begin: LIFE, compared with life.py by tests/test_life.py -->\n", "<!-- end: LIFE -->"


def table() -> str:
    """LIFE as the documentation shows it."""
    lines = [["", *(event.name for event in Event)], ["---"] * (len(Event) + 1)]
    for state in State:
        steps = [LIFE.get((state, event)) for event in Event]
        lines.append([state.name, *("" if step is None else f"{step[0].name}: `{step[1]}`" for step in steps)])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


@pytest.mark.skipif(WINDOWS, reason="the files are the same on every system")
def test_the_documentation_shows_it() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert page.partition(BEGIN)[2].partition(END)[0] == table()


def test_no_state_leads_back() -> None:
    for (before, event), (after, _) in LIFE.items():
        assert after > before or (after is before and event is Event.BEGIN)


@pytest.mark.skipif(native.hot is None, reason=f"the native tier is not in force: {native.why_not}")
def test_the_native_tier_has_the_same_table() -> None:
    steps = {
        (State[before], Event[event]): (State[after], method)
        for before, event, after, method in native.hot.life_steps()
    }
    assert steps == LIFE
    assert len(native.hot.life_steps()) == len(LIFE)


@pytest.mark.skipif(WINDOWS, reason="the files are the same on every system")
def test_the_native_tier_numbers_the_states_in_the_same_way() -> None:
    header = (ROOT / "iocp_loop" / "_native" / "hot" / "streams.h").read_text(encoding="utf-8")
    found = re.search(r"enum life_state \{ UNMADE, ([\w, ]+), STATES \}", header)
    assert found
    assert found[1].split(", ") == [state.name for state in State]
    assert [state.value for state in State] == list(range(1, len(State) + 1))


def test_every_step_is_a_method() -> None:
    for _, action in LIFE.values():
        assert callable(getattr(Life, action))


def test_any_order_of_events_tells_the_protocol_once() -> None:
    """However it goes: made once, lost once, the handle closed once, after that; no order of events does more."""
    for order in itertools.product(Event, repeat=6):
        state, done = MADE, list[str]()
        for event in order:
            state, action = LIFE.get((state, event), (state, ""))
            done.append(action)
        ends = [action for action in done if action in ("_schedule_loss", "_release", "_close_handle")]
        assert ends == ["_schedule_loss", "_release", "_close_handle"][: len(ends)]
        assert state is (CLOSED if len(ends) == 3 else OVER if len(ends) == 2 else LOST if ends else state)
        if "_stop_receiving" in done:
            assert state >= CLOSING
            assert done.count("_stop_receiving") == 1
