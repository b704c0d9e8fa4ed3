"""CompletionPort: every operation completes once, in order for each handle and direction, from however many threads;
everything that is posted comes out once; closing ends every wait.

With one thread everything is done step by step, and must come out the same on every driver.
"""

from __future__ import annotations

import contextlib
import socket
import tempfile
import threading
import time
from dataclasses import dataclass
from typing import Any

from iocp_loop import Completion, CompletionPort, operations

from .program import Source, digest, pattern
from .stage import LIMIT, Stage, stream_pair

__all__ = ["make_ports", "play_ports"]

#: What to do: the name of a method of `_Handle` and its arguments.
Step = tuple[Any, ...]


@dataclass
class _Program:
    #: What is done with each handle, one after the other.
    handles: list[list[Step]]
    getters: int  # threads that wait for completions; 0: one thread does everything
    batches: bool  # get_batch
    posts: int  # from each of as many threads as there are handles
    closes_early: float | None  # seconds


def make_ports(source: Source) -> _Program:
    """Choose a program."""
    alone = source.chance(0.4)
    sizes = [1, 10, 1000, 70_000, 1_000_000]

    def step() -> Step:
        return source.weighted(
            [
                (3, ("receive", source.pick([1, 10, 5000]))),
                (2, ("receive_into", source.pick([1, 10, 5000]))),
                (2, ("send", source.pick(sizes))),
                (2, ("sendall", source.several(lambda: source.pick(sizes), 0, 4))),
                (1, ("readiness", source.pick([1, 4, 5]))),
                (1.5, ("cancel", source.below(10))),
                (4, ("peer_sends", source.pick([1, 10, 1000, 20_000]))),
                (3, ("peer_reads",)),
                (1, ("write_file", source.pick([0, 1, 5000]), source.pick(sizes[:4]))),
                (1, ("read_file", source.pick([0, 1, 5000]), source.pick(sizes[:4]))),
                (0.1, ("peer_ends",)),
            ]
        )

    return _Program(
        handles=[source.several(step, 1, 40) for _ in range(1 if alone else source.between(1, 5))],
        getters=0 if alone else source.between(1, 4),
        batches=source.chance(0.5),
        posts=source.pick([0, 3, 200]),
        closes_early=None if alone or source.chance(0.7) else source.pick([0, 0.001, 0.01]),
    )


class _Handle:
    """A socket on the port, with its peer and a file; only one thread submits to it."""

    def __init__(self, port: CompletionPort, stage: Stage, name: str) -> None:
        self.port = port
        self.stage = stage
        self.name = name
        self.ours, self.theirs = stream_pair(unix=True)
        self.file = tempfile.TemporaryFile(buffering=0)
        self.written = bytearray()  # what the file has to hold
        self.submitted: list[Any] = []
        self.completions: dict[int, list[Completion]] = {}  # by the place in `submitted`
        self.offered = 0  # bytes that all sends were given
        self.sent_by_peer = 0
        self.got_by_peer = bytearray()
        port.register(self.ours, self)
        port.register(self.file, self)

    def play(self, step: Step) -> None:
        """One step."""
        name, *arguments = step
        getattr(self, name)(*arguments)

    def _submit(self, operation: Any) -> None:
        self.submitted.append(operation)
        self.port.submit(operation)

    def receive(self, size: int) -> None:
        self._submit(operations.Receive(self.ours, size))

    def receive_into(self, size: int) -> None:
        self._submit(operations.ReceiveInto(self.ours, bytearray(size)))

    def send(self, size: int) -> None:
        """Of a send any part may be taken, and the next begins behind that: so one at a time, and small."""
        if all(len(self.completions.get(at, ())) for at, op in enumerate(self.submitted) if _sends(op)):
            self._submit(operations.Send(self.ours, pattern(self._sent(), min(size, 1000))))

    def sendall(self, sizes: list[int]) -> None:
        """Several at once, unless one was cut short by a cancel: what comes after it stands elsewhere."""
        begin = self._sent()
        pieces = []
        for size in sizes:
            pieces.append(pattern(begin, size))
            begin += size
        self._submit(operations.SendAll(self.ours, pieces))

    def _sent(self) -> int:
        """Where the stream stands that the peer will get, if nothing is cancelled any more."""
        total = 0
        for at, op in enumerate(self.submitted):
            if isinstance(op, operations.SendAll):
                total += op.sent if self.completions.get(at) else op.size
            elif isinstance(op, operations.Send):
                done = self.completions.get(at)
                total += (done[-1].value or 0) if done else op.data.nbytes
        return total

    def readiness(self, events: int) -> None:
        self._submit(operations.Readiness(self.ours, events))

    def cancel(self, back: int) -> None:
        """Cancel one of the latest operations, but none that sends."""
        if back < len(self.submitted):
            operation = self.submitted[-1 - back]
            if not _sends(operation) and not isinstance(operation, operations.Write):
                self.port.cancel(operation)

    def write_file(self, offset: int, size: int) -> None:
        self._finish_files()
        data = pattern(offset, size)
        self._submit(operations.Write(self.file, data, offset))
        self._finish_files()
        written = self.completions[len(self.submitted) - 1][0].value if self._is_over(len(self.submitted) - 1) else 0
        self.written.extend(bytes(max(0, offset + written - len(self.written))))
        self.written[offset : offset + written] = data[:written]

    def read_file(self, offset: int, size: int) -> None:
        self._submit(operations.Read(self.file, size, offset))
        self._finish_files()
        at = len(self.submitted) - 1
        if self._is_over(at) and self.completions[at][0].error is None:
            got = self.completions[at][0].value
            self.stage.check(got == self.written[offset : offset + len(got)], f"{self.name}: wrong bytes of a file")

    def _finish_files(self) -> None:
        """Operations on files may overtake each other: one at a time."""
        deadline = time.monotonic() + LIMIT
        files = [at for at, op in enumerate(self.submitted) if isinstance(op, (operations.Read, operations.Write))]
        while files and not self._is_over(files[-1]) and time.monotonic() < deadline and not self.port.closed:
            self.wait()

    def _is_over(self, at: int) -> bool:
        return bool(self.completions.get(at))

    def wait(self) -> None:
        """Let completions come: here other threads fetch them."""
        time.sleep(0.0005)

    def peer_sends(self, size: int) -> None:
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            self.sent_by_peer += self.theirs.send(pattern(self.sent_by_peer, size))

    def peer_reads(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while data := self.theirs.recv(1 << 20):
                self.got_by_peer += data

    def peer_ends(self) -> None:
        with contextlib.suppress(OSError):
            self.theirs.shutdown(socket.SHUT_WR)

    # -- afterwards --------------------------------------------------------------------------------

    def completed(self, completion: Completion) -> None:
        """One of its operations has completed."""
        at = next(at for at, op in enumerate(self.submitted) if op is completion.operation)
        self.completions.setdefault(at, []).append(completion)
        self.stage.check(completion.key is self, f"{self.name}: the key of a completion is {completion.key}")

    def finish(self) -> None:
        """Bring everything to its end: the peer reads, and what still waits is cancelled."""
        deadline = time.monotonic() + LIMIT
        while self._open(sends=True) and time.monotonic() < deadline:
            self.peer_reads()
            self.wait()
        for operation in self._open(sends=False):
            self.port.cancel(operation)
        while self._open(sends=False) and time.monotonic() < deadline:
            self.wait()
        self.peer_reads()

    def _open(self, sends: bool) -> list[Any]:
        return [op for at, op in enumerate(self.submitted) if not self._is_over(at) and (_sends(op) or not sends)]

    def judge(self) -> None:
        """Look at all completions together."""
        received = b""
        sent = b""
        for at, op in enumerate(self.submitted):
            completions = self.completions.get(at, [])
            self.stage.check(len(completions) == 1, f"{self.name}: {op!r} completed {len(completions)} times")
            for _, _, value, error in completions[:1]:
                if isinstance(op, operations.Receive) and error is None:
                    received += value
                elif isinstance(op, operations.ReceiveInto) and error is None:
                    received += op.buffer[:value]
                elif _sends(op):
                    sent += pattern(len(sent), op.sent if isinstance(op, operations.SendAll) else value or 0)
        self.stage.check(pattern(0, self.sent_by_peer).startswith(received), f"{self.name}: received the wrong bytes")
        self.stage.check(
            sent == self.got_by_peer, f"{self.name}: sent {digest(sent)}, which came as {digest(self.got_by_peer)}"
        )

    def close(self) -> None:
        """Close everything."""
        self.port.unregister(self.ours)
        for thing in (self.ours, self.theirs, self.file):
            thing.close()


def _sends(operation: Any) -> bool:
    return isinstance(operation, (operations.Send, operations.SendAll))


class _LoneHandle(_Handle):
    """The thread that submits also waits."""

    def play(self, step: Step) -> None:
        super().play(step)
        for _ in range(3):
            self.wait()
        states = [f"{type(op).__name__}: {_describe(self.completions.get(at))}" for at, op in enumerate(self.submitted)]
        # How much of a long send the kernel has taken is its own business; and a wait for readiness tells of all that
        # holds by the time that it is looked at.
        self.stage.note(self.name, f"{step[0]}: {', '.join(state for state in states if state[0] not in 'S')}")

    def wait(self) -> None:
        while (completion := self.port.get(0.001)) is not None:
            if isinstance(completion.key, _Handle):
                completion.key.completed(completion)


def _describe(completions: list[Completion] | None) -> str:
    if not completions:
        return "waits"
    value = completions[0].value
    error = completions[0].error
    if error is not None:
        return f"error {getattr(error, 'errno', type(error).__name__)}"
    return digest(value) if isinstance(value, bytes) else str(value)


async def play_ports(program: _Program, stage: Stage) -> None:
    """Play a program.  The loop has no part in it, but for its driver's name."""
    with CompletionPort(0 if program.getters else 1, driver=stage.loop.driver) as port:
        make = _Handle if program.getters else _LoneHandle
        handles = [make(port, stage, f"handle {number}") for number in range(len(program.handles))]
        if program.getters:
            _play_with_threads(program, stage, port, handles)
        else:
            for handle, steps in zip(handles, program.handles, strict=True):
                for step in steps:
                    handle.play(step)
                handle.finish()
        if program.closes_early is None:
            stage.check(not port.in_flight, f"{port.in_flight} operations in flight on a port at the end")
            for handle in handles:
                handle.judge()
    for handle in handles:
        handle.close()


def _play_with_threads(program: _Program, stage: Stage, port: CompletionPort, handles: list[_Handle]) -> None:
    posted: dict[Any, int] = {}
    lock = threading.Lock()

    def take(completion: Completion) -> None:
        with lock:
            if completion.operation is None:
                posted[completion.value] = posted.get(completion.value, 0) + 1
            else:
                completion.key.completed(completion)  # type: ignore[attr-defined]  # a handle

    def get() -> None:
        while True:
            try:
                if program.batches:
                    for completion in port.get_batch(0.5, 8):
                        take(completion)
                elif (one := port.get(0.5)) is not None:
                    take(one)
            except ValueError:
                return  # it is closed

    def submit(handle: _Handle, steps: list[Step]) -> None:
        try:
            for step in steps:
                handle.play(step)
            handle.finish()
        except ValueError:
            stage.check(port.closed, "a port that is open raised ValueError")

    def post(who: int) -> None:
        with contextlib.suppress(ValueError):
            for number in range(program.posts):
                port.post((who, number))
                if number % 20 == 0:
                    time.sleep(0)

    getters = [threading.Thread(target=get, daemon=True) for _ in range(program.getters)]
    others = [
        threading.Thread(target=submit, args=each, daemon=True) for each in zip(handles, program.handles, strict=True)
    ]
    others += [threading.Thread(target=post, args=(who,), daemon=True) for who in range(len(handles))]
    for thread in (*getters, *others):
        thread.start()
    if program.closes_early is not None:
        time.sleep(program.closes_early)
        port.close()
    for thread in others:
        thread.join(3 * LIMIT)
    deadline = time.monotonic() + LIMIT
    expected = program.posts * len(handles)
    while program.closes_early is None and len(posted) < expected and time.monotonic() < deadline:
        time.sleep(0.001)
    if program.closes_early is None:
        stage.check(len(posted) == expected, f"{len(posted)} of {expected} things that were posted came out")
    stage.check(set(posted.values()) <= {1}, "what was posted came out twice")
    in_flight = port.in_flight
    port.close()
    stage.check(not in_flight or program.closes_early is not None, f"{in_flight} operations in flight on a port")
    for thread in (*getters, *others):
        thread.join(LIMIT)
        stage.check(not thread.is_alive(), "a thread hangs after close()")
