"""Readers and writers that come and go, on sockets that come and go, in each other's callbacks."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
from dataclasses import dataclass, field
from typing import Any

from .program import Source
from .stage import Stage, stream_pair

__all__ = ["make_readiness", "play_readiness"]

#: What to do, and to which pair of sockets.
Action = tuple[str, int]

_CHOICES = [
    (3, "send"), (2, "receive"), (3, "read"), (2, "write"), (1.5, "read no more"), (1.5, "write no more"),
    (0.5, "close"), (0.3, "close the peer"), (0.2, "close behind"), (1, "renew"), (0.3, "fill"), (0.2, "collect"),
]  # fmt: skip


@dataclass
class _Program:
    pairs: int
    #: What happens from outside, in each turn.
    turns: list[list[Action]]
    #: What happens in each call of a reader or writer, one after the other.
    calls: list[list[Action]]


def make_readiness(source: Source) -> _Program:
    """Choose a program."""
    pairs = source.pick([1, 3, 20])

    def some() -> list[Action]:
        return source.several(lambda: (source.weighted(_CHOICES), source.below(pairs)), 0, 4)

    return _Program(pairs, source.several(some, 5, 60), source.several(some, 5, 100))


@dataclass(eq=False)
class _Pair:
    """A watched socket and its peer; `marks` tells which callback is the present one of each direction."""

    ours: socket.socket
    theirs: socket.socket
    marks: dict[str, int] = field(default_factory=dict)
    just_read: int = 0
    called: set[str] = field(default_factory=set)  # directions that have been called since they were watched

    def read_before(self) -> None:
        """It was read some turns ago."""
        self.just_read -= 1

    @property
    def open(self) -> bool:
        return self.ours.fileno() >= 0


class _Watcher:
    def __init__(self, program: _Program, stage: Stage) -> None:
        self.stage = stage
        self.loop = stage.loop
        self.calls = list(program.calls)
        self.pairs = [_Pair(*stream_pair(unix=True)) for _ in range(program.pairs)]
        self.marks = 0

    def perform(self, actions: list[Action]) -> None:
        """Do these things."""
        for name, number in actions:
            getattr(self, "do_" + name.replace(" ", "_"))(self.pairs[number])

    def _called(self, pair: _Pair, direction: str, mark: int) -> None:
        """A reader or a writer is called: nobody may be who was removed, and nobody without a reason."""
        self.stage.happenings += 1
        if pair.marks.get(direction) != mark:
            self.stage.fail(f"a {direction} callback was called that had been removed or replaced")
        pair.called.add(direction)
        if direction == "read" and pair.open and not pair.just_read:
            with contextlib.suppress(ConnectionError):
                try:
                    pair.ours.recv(1, socket.MSG_PEEK)
                except BlockingIOError:
                    self.stage.fail("a reader was called and there is nothing to read")
        if self.calls:
            self.perform(self.calls.pop(0))
        elif pair.open:  # quiet now: level-triggered callbacks come for as long as there is a reason
            self.do_read_no_more(pair)
            self.do_write_no_more(pair)

    # -- the actions -------------------------------------------------------------------------------

    def do_send(self, pair: _Pair) -> None:
        if pair.theirs.fileno() >= 0:
            with contextlib.suppress(BlockingIOError, ConnectionError):
                pair.theirs.send(b"x")

    def do_receive(self, pair: _Pair) -> None:
        if pair.open:
            with contextlib.suppress(BlockingIOError, ConnectionError):
                pair.ours.recv(1000)
                # Who was found to be readable in the same turn is called all the same.
                pair.just_read += 1
                self.loop.call_soon(self.loop.call_soon, pair.read_before)

    def do_read(self, pair: _Pair) -> None:
        self._watch(pair, "read", self.loop.add_reader)

    def do_write(self, pair: _Pair) -> None:
        self._watch(pair, "write", self.loop.add_writer)

    def _watch(self, pair: _Pair, direction: str, add: Any) -> None:
        if pair.open:
            self.marks += 1
            pair.marks[direction] = self.marks
            pair.called.discard(direction)
            # By number every other time.
            add(pair.ours if self.marks % 2 else pair.ours.fileno(), self._called, pair, direction, self.marks)

    def do_read_no_more(self, pair: _Pair) -> None:
        self._watch_no_more(pair, "read", self.loop.remove_reader)

    def do_write_no_more(self, pair: _Pair) -> None:
        self._watch_no_more(pair, "write", self.loop.remove_writer)

    def _watch_no_more(self, pair: _Pair, direction: str, remove: Any) -> None:
        if pair.open:
            removed = remove(pair.ours)
            there = pair.marks.pop(direction, None) is not None
            self.stage.check(removed is there, f"remove_{direction}er returned {removed}")

    def do_close(self, pair: _Pair) -> None:
        self.do_read_no_more(pair)
        self.do_write_no_more(pair)
        pair.ours.close()

    def do_close_behind(self, pair: _Pair) -> None:
        """Close without a word to the loop, which then forgets the number when it is asked to."""
        if pair.open and self.stage.ours:  # asyncio's own is at a loss afterwards
            number = pair.ours.fileno()
            pair.ours.close()
            pair.marks.clear()
            self.loop.remove_reader(number)
            self.loop.remove_writer(number)

    def do_close_the_peer(self, pair: _Pair) -> None:
        pair.theirs.close()

    def do_renew(self, pair: _Pair) -> None:
        if not pair.open:
            pair.theirs.close()
            self.pairs[self.pairs.index(pair)] = _Pair(*stream_pair(unix=True))

    def do_fill(self, pair: _Pair) -> None:
        if pair.open:
            with contextlib.suppress(BlockingIOError, ConnectionError):
                while True:
                    pair.ours.send(bytes(100_000))

    def do_collect(self, pair: _Pair) -> None:
        gc.collect(0)

    # -- the end -----------------------------------------------------------------------------------

    async def end(self) -> None:
        """Everybody who is watched and ready has to be called."""
        self.calls.clear()
        for pair in list(self.pairs):
            self.do_renew(pair)
        for pair in self.pairs:
            self.do_send(pair)
            self.do_read(pair)
            self.do_write(pair)
        readable = [pair for pair in self.pairs if pair.open]
        await self.stage.until(lambda: all(pair.called for pair in readable), "a reader or writer was not called")
        for pair in self.pairs:
            self.do_close(pair)
            pair.theirs.close()


async def play_readiness(program: _Program, stage: Stage) -> None:
    """Play a program."""
    watcher = _Watcher(program, stage)
    for actions in program.turns:
        watcher.perform(actions)
        await asyncio.sleep(0)
    await asyncio.sleep(0.001)
    await watcher.end()
