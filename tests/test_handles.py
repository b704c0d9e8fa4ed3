"""Handles of callbacks, which are asyncio's own on both tiers: what they print, take and refuse, when they are freed.

What is tested here against asyncio's own loop holds on both tiers, unless a test says otherwise.
"""

from __future__ import annotations

import asyncio
import contextvars
import decimal
import gc
import logging
import re
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest

import iocp_loop
from iocp_loop import native

from .support import turns, until

Loop = iocp_loop.IocpEventLoop
Reports = list[dict[str, Any]]

natively = pytest.mark.skipif(native.hot is None, reason=f"the native tier is not in force: {native.why_not}")


def nothing(*_: Any) -> None:
    """A callback."""


def raising(*_: Any) -> None:
    raise ValueError("on purpose")


class Stranger:
    """Not a Context, but it can run."""

    def run(self, callback: Callable[..., Any], *args: Any) -> Any:
        return callback(*args, "by a stranger")


def both(driver: str) -> tuple[Loop, asyncio.AbstractEventLoop]:
    return iocp_loop.new_event_loop(driver), asyncio.SelectorEventLoop()


@pytest.mark.parametrize("debug", [False, True], ids=["", "debug"])
@pytest.mark.parametrize("cancelled", [False, True], ids=["", "cancelled"])
@pytest.mark.parametrize("name", ["call_soon", "call_soon_threadsafe", "call_at"])
def test_a_handle_prints_as_asyncios(driver: str, name: str, cancelled: bool, debug: bool) -> None:
    texts = []
    for loop in both(driver):
        loop.set_debug(debug)
        when = () if name != "call_at" else (123456789.5,)
        handle = getattr(loop, name)(*when, nothing, 1, "two")
        line = repr(handle)
        if cancelled:
            handle.cancel()
            assert handle.cancelled()
            line = repr(handle)
        assert isinstance(handle, asyncio.TimerHandle if when else asyncio.Handle)
        texts.append(line)
        loop.close()
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", ["call_soon", "call_soon_threadsafe", "call_later", "call_at"])
def test_in_debug_mode_a_handle_knows_where_it_was_made(driver: str, name: str) -> None:
    found = []
    for loop in both(driver):
        loop.set_debug(True)
        when = () if name.startswith("call_soon") else (1e6,)
        handle = getattr(loop, name)(*when, nothing)
        found.append([(frame.name, frame.filename, frame.lineno) for frame in handle._source_traceback])
        loop.close()
    assert found[0][-6:] == found[1][-6:]  # of ten, of which asyncio and this loop take out their own frames
    assert found[0][-1][0] == "test_in_debug_mode_a_handle_knows_where_it_was_made"


@pytest.mark.parametrize("debug", [False, True], ids=["", "debug"])
def test_an_exception_in_a_callback_is_reported_in_the_same_words(driver: str, debug: bool) -> None:
    told: list[dict[str, Any]] = []
    for loop in both(driver):
        loop.set_debug(debug)
        loop.set_exception_handler(lambda _, context: told.append(context))
        handle = loop.call_soon(raising, 1, "two")
        loop.run_until_complete(asyncio.sleep(0))
        assert told[-1]["handle"] is handle
        loop.close()
    ours, theirs = told
    assert ours["message"] == theirs["message"]
    assert ours["message"].startswith("Exception in callback raising(")
    assert ours.keys() == theirs.keys()
    assert (type(ours["exception"]), ours["exception"].args) == (ValueError, ("on purpose",))
    if debug:
        assert ours["source_traceback"][-1] == theirs["source_traceback"][-1]


async def test_callbacks_by_keyword(loop: Loop) -> None:
    calls: list[str] = []
    loop.call_soon(callback=lambda: calls.append("soon"))
    loop.call_soon_threadsafe(callback=lambda: calls.append("threadsafe"))
    loop.call_later(delay=0, callback=lambda: calls.append("later"))
    loop.call_later(0, callback=lambda: calls.append("later"), context=contextvars.copy_context())
    loop.call_at(when=0, callback=lambda: calls.append("at"))
    await turns()
    assert sorted(calls) == ["at", "later", "later", "soon", "threadsafe"]


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        ("call_soon", (), {}),
        ("call_soon", (nothing,), {"other": 1}),
        ("call_soon", (nothing,), {"callback": nothing}),
        ("call_later", (1,), {}),
        ("call_later", (), {"callback": nothing}),
        ("call_later", (None, nothing), {}),
        ("call_later", (1, nothing), {"delay": 1}),
        ("call_later", (decimal.Decimal(1), nothing), {}),
        ("call_later", ("1", nothing), {}),
        ("call_at", (1,), {}),
        ("call_at", (None, nothing), {}),
        ("call_at", (1, nothing), {"when": 1}),
    ],
)
def test_calls_that_asyncio_refuses(driver: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    messages = []
    for loop in both(driver):
        with pytest.raises(TypeError) as caught:
            getattr(loop, name)(*args, **kwargs)
        messages.append(re.sub(r"\w+\.(?=call_)", "", str(caught.value)))  # without the class
        loop.close()
    assert messages[0] == messages[1]


async def test_times_of_any_kind_of_number(loop: Loop) -> None:
    calls: list[int] = []
    handles = [
        loop.call_at(0, calls.append, 0),
        loop.call_at(True, calls.append, 1),
        loop.call_at(-float("inf"), calls.append, 2),
        loop.call_later(-1, calls.append, 3),
    ]
    never = loop.call_at(float("inf"), calls.append, 4)
    if native.hot is not None:  # asyncio's own arithmetic is on floats
        exact: Any = decimal.Decimal("0.5")
        handles.append(loop.call_at(exact, calls.append, 5))
        assert handles[-1].when() is exact
    await asyncio.sleep(0.01)
    assert set(calls) == set(range(6 if native.hot is not None else 4)) - {4}
    assert calls[0] == 2
    never.cancel()


async def test_a_handle_cancelled_while_it_runs(loop: Loop, reports: Reports) -> None:
    kept: list[asyncio.Handle] = []

    def callback(argument: list[int]) -> None:
        kept[0].cancel()
        kept[1].cancel()
        gc.collect()
        argument.append(1)
        raise ValueError

    argument: list[int] = []
    kept += [loop.call_soon(callback, argument), loop.call_later(0, callback, argument)]
    await turns()
    assert argument == [1]  # the second was cancelled by the first
    (report,) = reports
    reports.clear()
    assert report["handle"] is kept[0]


async def test_a_timer_cancelled_in_its_own_callback_and_afterwards(loop: Loop) -> None:
    calls: list[int] = []

    def callback() -> None:
        timer.cancel()
        calls.append(1)

    timer = loop.call_later(0, callback)
    await until(lambda: calls)
    timer.cancel()
    assert timer.cancelled()
    assert timer not in loop._scheduled


def test_handles_after_the_loop_was_closed(driver: str) -> None:
    loop = iocp_loop.new_event_loop(driver)
    soon, later = loop.call_soon(nothing, []), loop.call_later(100, nothing, [])
    loop.close()
    for handle in (soon, later):
        assert not handle.cancelled()
        handle.cancel()
        handle.cancel()
        assert handle.cancelled()
    for name, args in (("call_soon", ()), ("call_later", (1,)), ("call_at", (1,))):
        with pytest.raises(RuntimeError, match="Event loop is closed"):
            getattr(loop, name)(*args, nothing)


async def test_a_handle_that_is_added_again(loop: Loop) -> None:
    """By hand, as some libraries do: it is in the ready queue several times, and the collector counts it once."""
    calls: list[list[int]] = []
    argument = [1]
    handle = loop.call_soon(calls.append, argument)
    for _ in range(5):
        loop._ready.append(handle)
        loop._add_callback(handle)  # type: ignore[attr-defined]  # BaseEventLoop's
    timer = loop.call_later(100, calls.append, argument)
    loop._add_callback(timer)  # type: ignore[attr-defined]  # BaseEventLoop's
    gc.collect()
    await turns()
    assert calls == [[1]] * 12
    timer.cancel()


async def test_handles_of_other_kinds(loop: Loop, reports: Reports) -> None:
    """asyncio's own handles, made for our loop: in the ready queue, and as timers that nobody schedules."""
    calls: list[int] = []
    loop._ready.append(asyncio.Handle(calls.append, [1], loop, None))
    loop._add_callback(asyncio.Handle(raising, (), loop, None))  # type: ignore[attr-defined]  # as above
    cancelled = asyncio.Handle(calls.append, (2,), loop, None)
    cancelled.cancel()
    loop._add_callback(cancelled)  # type: ignore[attr-defined]  # as above
    asyncio.TimerHandle(1.0, calls.append, (3,), loop, None).cancel()
    await turns()
    assert calls == [1]
    assert isinstance(reports.pop()["exception"], ValueError)


async def test_the_ready_queue_from_outside(loop: Loop) -> None:
    calls: list[int] = []
    queue = loop._ready
    await turns(1)
    handles = [loop.call_soon(calls.append, number) for number in range(100)]
    assert len(queue) >= 100
    listed = list(queue)
    assert [handle for handle in listed if handle in handles] == handles
    while len(queue):
        queue.popleft()  # one may stand for the completions of this turn
    with pytest.raises(IndexError):
        queue.popleft()
    loop.call_soon(calls.append, 100)
    queue.clear()
    for handle in listed:
        queue.append(handle)
    await turns()
    assert calls == list(range(100))


async def test_a_context_that_is_none(loop: Loop, reports: Reports) -> None:
    calls: list[Any] = []
    loop.call_soon(calls.append, context=Stranger())  # type: ignore[arg-type]  # on purpose
    loop.call_soon(calls.append, 1, context=42)  # type: ignore[arg-type]  # on purpose
    loop.call_soon(calls.append, 2, context=None)
    await turns()
    assert calls == ["by a stranger", 2]
    assert "'int' object has no attribute 'run'" in str(reports.pop()["exception"])


async def test_a_context_that_is_in_use(loop: Loop, reports: Reports, caplog: pytest.LogCaptureFixture) -> None:
    context = contextvars.copy_context()
    calls: list[int] = []
    handle = asyncio.Handle(calls.append, (1,), loop, context)
    ours = loop.call_soon(calls.append, 2, context=context)
    context.run(handle._run)
    context.run(ours._run)
    assert not calls
    # Reported, since Python 3.12 in the very context that can't be entered, and then to the log.
    assert len(reports) == 2 or caplog.text.count("is already entered") >= 2
    reports.clear()
    await turns()
    assert calls == [2]


def test_a_cancelled_handle_that_is_run_by_hand_reports_and_raises_nothing(driver: str) -> None:
    told: list[dict[str, Any]] = []
    for loop in both(driver):
        loop.set_exception_handler(lambda _, context: told.append(context))
        handle = loop.call_soon(nothing)
        handle.cancel()
        handle._run()
        loop.close()
    assert [type(context["exception"]) for context in told] == [TypeError] * 2


@natively
async def test_the_types_have_no_subclasses(loop: Loop) -> None:
    for kind in (type(loop.call_soon(nothing)), type(loop.call_at(0, nothing))):
        with pytest.raises(TypeError):
            type("Sub", (kind,), {})


def test_system_exit_leaves_the_rest_for_the_next_run(driver: str) -> None:
    loop = iocp_loop.new_event_loop(driver)
    calls: list[int] = []
    loop.call_soon(calls.append, 1)
    loop.call_soon(sys.exit, 3)
    loop.call_soon(calls.append, 2)
    with pytest.raises(SystemExit):
        loop.run_forever()
    assert calls == [1]
    loop.run_until_complete(asyncio.sleep(0))
    assert calls == [1, 2]
    loop.close()


class ForeignLoop:
    """As much of a loop as a handle asks for, and not one of ours."""

    def __init__(self, debug: object, told: Callable[[Any], None]) -> None:
        self.debug = debug
        self.told = told

    def get_debug(self) -> Any:
        return self.debug

    def _timer_handle_cancelled(self, handle: Any) -> None:
        self.told(handle)


class Undecided:
    def __bool__(self) -> bool:
        raise ArithmeticError


@natively
def test_a_timer_of_another_loop_that_forgets_the_loop_as_it_is_cancelled() -> None:
    def forget(handle: Any) -> None:
        del handle._loop

    timer = native.hot.TimerHandle(1.0, print, (), ForeignLoop(False, forget))
    timer.cancel()  # nothing but the timer held that loop, and it is asked once more
    assert timer.cancelled()


@natively
def test_a_handle_of_a_loop_that_does_not_know_whether_it_is_in_debug_mode() -> None:
    loop = ForeignLoop(False, print)
    handle = native.hot.Handle(print, (), loop)
    loop.debug = Undecided()
    handle.cancel()
    assert handle.cancelled()


@natively
def test_what_stood_in_the_slot_of_a_timer_may_schedule_others(driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The heap has room for one more, and that is taken meanwhile."""
    loop = Loop(driver=driver)
    called: list[int] = []

    class Schedules:
        def __del__(self) -> None:
            loop.set_debug(False)
            loop.call_later(0, called.append, 1)

    def init(timer: Any, when: float, callback: Any, args: Any, loop: Any, context: Any = None) -> None:
        original(timer, when, callback, args, loop, context)
        timer._scheduled = Schedules()

    original: Any = asyncio.TimerHandle.__init__
    for _ in range(63):
        loop.call_later(0, called.append, 1)
    loop.set_debug(True)  # for then it is made by asyncio's constructor
    monkeypatch.setattr(asyncio.TimerHandle, "__init__", init)
    loop.call_later(0, called.append, 1)
    assert not loop.get_debug()
    loop.run_until_complete(asyncio.sleep(0.01))
    loop.close()
    assert len(called) == 65


# --------------------------------------------------------------------------------------------------
# The garbage collector
# --------------------------------------------------------------------------------------------------


class Holder:
    """Keeps the handle of its own method: a cycle."""

    handle: asyncio.Handle

    def method(self, *_: Any) -> None:
        """Called, or not."""


@pytest.mark.parametrize("debug", [False, True], ids=["", "debug"])
@pytest.mark.parametrize("end", ["run", "cancelled", "left"])
@pytest.mark.parametrize("name", ["call_soon", "call_later"])
def test_cycles_through_handles_are_collected(driver: str, name: str, end: str, debug: bool) -> None:
    loop = iocp_loop.new_event_loop(driver)
    loop.set_debug(debug)
    holder = Holder()
    when = () if name == "call_soon" else (0 if end == "run" else 100,)
    holder.handle = getattr(loop, name)(*when, holder.method, holder, [holder])
    references: list[weakref.ref[Any]] = [weakref.ref(holder), weakref.ref(holder.handle)]
    if end == "cancelled":
        holder.handle.cancel()
    gc.collect()
    assert all(reference() is not None for reference in references)
    if end == "run":
        loop.run_until_complete(asyncio.sleep(0.01))
    del holder
    loop.close()
    gc.collect()
    assert [reference() for reference in references] == [None, None]


@pytest.mark.filterwarnings("ignore:unclosed event loop:ResourceWarning")
@pytest.mark.parametrize("debug", [False, True], ids=["", "debug"])
def test_a_loop_that_was_dropped_with_handles_is_collected(driver: str, debug: bool) -> None:
    loop = iocp_loop.new_event_loop(driver)
    loop.set_debug(debug)
    holder = Holder()
    holder.handle = loop.call_later(100, holder.method, loop)
    loop.call_soon(holder.method, [holder], loop)
    queue = loop._ready
    loop.queue = queue  # type: ignore[attr-defined]  # a cycle through it
    references: list[weakref.ref[Any]] = [weakref.ref(loop), weakref.ref(holder)]
    del loop, holder, queue
    gc.collect()
    gc.collect()
    assert [reference() for reference in references] == [None, None]


async def test_what_only_a_handle_refers_to_lives_until_it_runs(loop: Loop) -> None:
    seen: list[int] = []

    class Only:
        def method(self, argument: list[int]) -> None:
            seen.extend(argument)

    handles = [loop.call_soon(Only().method, [number]) for number in range(50)]
    handles += [loop.call_later(0.001, Only().method, [number]) for number in range(50, 100)]
    loop.call_soon(gc.collect)
    del handles[::2]
    gc.collect()
    await asyncio.sleep(0.02)
    assert sorted(seen) == list(range(100))


async def test_handles_are_weakly_referable_and_their_memory_is_used_again(loop: Loop) -> None:
    died: list[int] = []
    for round_ in range(5):
        handles = [loop.call_soon(nothing, round_) for _ in range(3000)]
        handles += [loop.call_later(0, nothing, round_) for _ in range(3000)]
        references = [weakref.ref(handle, lambda _: died.append(1)) for handle in handles]
        del handles
        await asyncio.sleep(0.005)
        await turns()
        assert not any(reference() for reference in references)
        assert len(died) == 6000 * (round_ + 1)


def test_a_long_chain_of_handles_is_freed_without_a_deep_recursion(driver: str) -> None:
    loop = iocp_loop.new_event_loop(driver)
    variable: contextvars.ContextVar[Any] = contextvars.ContextVar("variable")
    handle: Any = None
    for _ in range(100_000):
        handle = loop.call_soon(nothing, handle)
    last = loop.call_later(100, nothing, handle)
    for _ in range(100_000):
        variable.set(last)
        last = loop.call_later(100, nothing)
    del handle
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    variable.set(None)
    del last
    gc.collect()


def test_debug_mode_may_change_at_any_time(driver: str, caplog: pytest.LogCaptureFixture) -> None:
    loop = iocp_loop.new_event_loop(driver)
    loop.slow_callback_duration = -1
    calls: list[int] = []
    with caplog.at_level(logging.WARNING, "asyncio"):
        loop.call_soon(calls.append, 1)
        loop.call_soon(loop.set_debug, True)
        loop.call_soon(calls.append, 2)
        loop.run_until_complete(asyncio.sleep(0))
        assert "append(2)" in caplog.text
        caplog.clear()
        loop.call_soon(loop.set_debug, False)
        loop.call_later(0, calls.append, 3)
        loop.run_until_complete(asyncio.sleep(0.01))
        assert "append(3)" not in caplog.text
    assert calls == [1, 2, 3]
    loop.close()
