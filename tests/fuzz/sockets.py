"""The loop's methods on plain sockets: several at once, given up, asked again, closed meanwhile, misused."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from .program import Source, pattern
from .stage import Stage, describe, stream_pair

__all__ = ["make_sockets", "play_sockets"]


@dataclass
class _Read:
    into: bool  # sock_recv_into, else sock_recv
    size: int
    #: None: wait for it.  A number below 0: give up after so many turns.  Else: give up after so many seconds.
    patience: float | None


@dataclass
class _Stream:
    """One direction of a connection.  Messages of several senders must not be mixed, and no byte may be lost."""

    unix: bool
    buffers: int | None
    #: What each sender sends: the sizes of its messages, with the seconds that it rests after each.
    senders: list[list[tuple[int, float]]]
    #: What each receiver asks for, again and again.
    receivers: list[list[_Read]]
    #: The last message of the first sender is given up after so many seconds.
    gives_up: float | None


@dataclass
class _Accepts:
    """Clients come; whoever accepts may give up, and no client may be lost."""

    unix: bool
    clients: list[float]  # when they come
    acceptors: list[list[float]]  # how long each waits, time after time


@dataclass
class _Closes:
    """A socket is closed while the loop waits for it, and its number comes back as another's."""

    operation: str
    cancels: bool  # before it is closed, as it ought to be
    sizes: list[int]  # what then goes through the other socket


@dataclass
class _Misuse:
    """Calls that are wrong, or hardly right."""

    calls: list[str]


Part = _Stream | _Accepts | _Closes | _Misuse


def make_sockets(source: Source) -> list[Part]:
    """Choose what goes on side by side."""

    def part() -> Part:
        kind = source.weighted([(5, "stream"), (2, "accepts"), (2, "closes"), (1, "misuse")])
        if kind == "stream":
            return _make_stream(source)
        if kind == "accepts":
            waits = [0.0001, 0.001, 0.01, 0.05]
            acceptors = [source.several(lambda: source.pick(waits), 1, 10) for _ in range(source.between(1, 6))]
            clients = [source.pick([0, 0, 0.001, 0.005]) for _ in range(source.between(1, 20))]
            return _Accepts(source.chance(0.4), clients, acceptors)
        if kind == "closes":
            sizes = source.several(lambda: source.pick([1, 1000, 100_000]), 1, 4)
            return _Closes(source.pick(sorted(_OPERATIONS)), source.chance(0.5), sizes)
        return _Misuse(source.several(lambda: source.pick(sorted(_MISUSES)), 1, 6))

    return source.several(part, 1, source.pick([1, 2, 8]))


def _make_stream(source: Source) -> _Stream:
    sizes = source.pick([[1, 10, 1000], [1, 40_000, 300_000], [1_000_000]])

    def read() -> _Read:
        patience = source.pick([None, None, -1, -2, 0, 0.0002, 0.003])
        return _Read(source.chance(0.4), source.pick([1, 7, 1000, 32_768, 32_769, 200_000]), patience)

    def message() -> tuple[int, float]:
        return source.pick(sizes), source.pick([0, 0, 0, 0.0005, 0.002])

    unix = source.chance(0.6)
    return _Stream(
        unix=unix,
        buffers=source.pick([None, 4096]) if unix else None,  # small ones make TCP wait
        senders=[source.several(message, 0, 6) for _ in range(source.pick([1, 1, 1, 2, 4]))],
        receivers=[source.several(read, 1, 5) for _ in range(source.pick([1, 1, 1, 2, 4]))],
        gives_up=source.pick([None, None, None, 0, 0.001]),
    )


async def play_sockets(program: list[Part], stage: Stage) -> None:
    """Play them all at once."""
    plays: dict[type, Any] = {
        _Stream: _play_stream,
        _Accepts: _play_accepts,
        _Closes: _play_closes,
        _Misuse: _play_misuse,
    }
    await stage.together(*(plays[type(part)](part, stage, str(number)) for number, part in enumerate(program)))


# -- streams ---------------------------------------------------------------------------------------


async def _play_stream(stream: _Stream, stage: Stage, number: str) -> None:
    # asyncio's own takes one at a time in each direction, and forgets the first if there is a second.
    crowd = stage.ours and "crowd" not in stage.without
    senders, receivers = (stream.senders, stream.receivers) if crowd else (stream.senders[:1], stream.receivers[:1])
    ours, theirs = stream_pair(stream.unix, stream.buffers)
    total = sum(size for messages in senders for size, _ in messages)
    sent = bytearray()  # in the order of the calls
    tickets: list[bytes] = []  # what each call to receive got, in the order of the calls

    async def send(messages: list[tuple[int, float]], first: bool) -> None:
        for at, (size, seconds) in enumerate(messages):
            data = pattern(len(sent), size)
            sent.extend(data)
            sending = stage.loop.sock_sendall(ours, data)
            if first and at == len(messages) - 1 and stream.gives_up is not None:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(sending, stream.gives_up)
                return
            await sending
            if seconds:
                await asyncio.sleep(seconds)

    async def send_all() -> None:
        await asyncio.gather(*(send(messages, at == 0) for at, messages in enumerate(senders)))
        ours.shutdown(socket.SHUT_WR)

    async def receive(reads: list[_Read]) -> None:
        for turn in itertools.count():
            read = reads[turn % len(reads)]
            size = max(read.size, total // 200)  # it shall come to an end
            patience = read.patience if turn < 100 else None
            if await _receive(read.into, size, patience, theirs, stage.loop, tickets) == b"":
                return

    with ours, theirs:
        work = asyncio.gather(send_all(), *map(receive, receivers))
        await stage.within(work, f"the end of stream {number}: {stream}")
    whole = b"".join(tickets)
    what = f"stream {number}, {len(senders)} senders, {len(receivers)} receivers"
    if stream.gives_up is None:
        stage.check(len(whole) == len(sent), f"{what}: {len(whole)} bytes of {len(sent)}")
    elif len(senders) > 1:
        return  # of the message that was given up any part may have gone: what came after it stands elsewhere
    if not sent.startswith(whole):
        stage.fail(
            f"{what}: wrong bytes at {next(at for at, byte in enumerate(whole) if sent[at : at + 1] != bytes([byte]))}"
        )


async def _receive(
    into: bool, size: int, patience: float | None, sock: socket.socket, loop: Any, tickets: list[bytes]
) -> bytes | None:
    """What one call brings, which goes into the place of its turn among `tickets`; None if it was given up."""

    async def call() -> bytes:
        turn = len(tickets)
        tickets.append(b"")
        if into:
            buffer = bytearray(size)
            count = await loop.sock_recv_into(sock, buffer)
            tickets[turn] = bytes(buffer[:count])
        else:
            tickets[turn] = await loop.sock_recv(sock, size)
        return tickets[turn]

    if patience is None:
        return await call()
    task = loop.create_task(call())
    if patience < 0:
        for _ in range(-int(patience)):
            await asyncio.sleep(0)
        task.cancel()
    else:
        loop.call_later(patience, task.cancel)
    try:
        return await task  # type: ignore[no-any-return]  # bytes
    except asyncio.CancelledError:
        return None


# -- accepting and connecting ----------------------------------------------------------------------


async def _play_accepts(accepts: _Accepts, stage: Stage, number: str) -> None:
    loop = stage.loop
    listener = socket.socket(socket.AF_UNIX if accepts.unix else socket.AF_INET)
    address: Any = f"\0fuzz-{id(listener):x}" if accepts.unix else ("127.0.0.1", 0)
    listener.bind(address)
    listener.listen(100)
    listener.setblocking(False)
    address = listener.getsockname()
    accepted: list[bytes] = []
    wanted = len(accepts.clients)

    async def client(number: int, seconds: float) -> None:
        await asyncio.sleep(seconds)
        sock = socket.socket(listener.family)
        sock.setblocking(False)
        with sock:
            await loop.sock_connect(sock, address)
            await loop.sock_sendall(sock, bytes([number]))
            stage.check(await loop.sock_recv(sock, 10) == b"", "a client got an answer")

    async def acceptor(waits: Iterable[float]) -> None:
        for seconds in waits:
            if len(accepted) == wanted:
                return
            try:
                sock, _ = await asyncio.wait_for(loop.sock_accept(listener), seconds)
            except (OSError, TimeoutError):
                continue  # it gave up; or that client had gone, which only faults.py brings about
            with sock:
                stage.check(sock.gettimeout() == 0, "an accepted socket that blocks")
                accepted.append(await loop.sock_recv(sock, 1))

    async def accept() -> None:
        # asyncio's own takes one at a time.  And somebody has to go on to the end.
        await asyncio.gather(*map(acceptor, accepts.acceptors if stage.ours else accepts.acceptors[:1]))
        await acceptor(itertools.repeat(0.05))

    clients = [client(at, seconds) for at, seconds in enumerate(accepts.clients)]
    with listener:
        work = asyncio.gather(accept(), *clients)
        await stage.within(work, f"the clients of listener {number}: {len(accepted)} of {wanted}")
    stage.check(sorted(accepted) == [bytes([at]) for at in range(wanted)], f"accepted {sorted(accepted)}")


# -- closing ---------------------------------------------------------------------------------------


def _recv_into(loop: Any, sock: socket.socket) -> Any:
    return loop.sock_recv_into(sock, bytearray(1000))


_OPERATIONS: dict[str, Callable[[Any, socket.socket], Any]] = {
    "recv": lambda loop, sock: loop.sock_recv(sock, 1000),
    "recv_into": _recv_into,
    "sendall": lambda loop, sock: loop.sock_sendall(sock, b"to the wrong file" * 1_000_000),
    "reader": lambda loop, sock: _watch(loop, sock),
}


async def _watch(loop: Any, sock: socket.socket) -> None:
    """Wait for bytes by add_reader; they must not be those of another socket."""
    readable = loop.create_future()
    number = sock.fileno()
    loop.add_reader(number, lambda: readable.done() or readable.set_result(None))
    try:
        await readable
    finally:
        loop.remove_reader(number)


async def _play_closes(closes: _Closes, stage: Stage, number: str) -> None:
    loop = stage.loop
    if "closes" in stage.without:
        return
    ours, theirs = stream_pair(unix=True)
    waiting = loop.create_task(_OPERATIONS[closes.operation](loop, ours))
    await asyncio.sleep(0.001)
    old = ours.fileno()
    if closes.cancels:
        waiting.cancel()
        await asyncio.sleep(0)
    ours.close()
    others = [stream_pair(unix=True)]
    while others[-1][0].fileno() < old and len(others) < 20:
        others.append(stream_pair(unix=True))
    if closes.operation == "reader" and not closes.cancels:
        waiting.cancel()  # it is told of the number that it watches, whoever has it
    await asyncio.sleep(0.001)
    for one, other in others:
        for sender, receiver in ((one, other), (other, one)):
            for size in closes.sizes:
                await _through(sender, receiver, pattern(size, size), stage, f"{closes}")
    # The peer of the closed socket hears its end, once whatever was sent has been read.
    if closes.cancels or stage.ours:
        await stage.within(_read_to_the_end(theirs, loop), f"the end that the peer of a closed socket hears: {closes}")
    waiting.cancel()
    await asyncio.wait([waiting], timeout=1)
    stage.check(waiting.done(), f"an operation on a closed socket that cannot be cancelled: {closes}")
    if waiting.done() and not waiting.cancelled():
        waiting.exception()
    for pair in ((ours, theirs), *others):
        for sock in pair:
            sock.close()


async def _read_to_the_end(sock: socket.socket, loop: Any) -> None:
    with contextlib.suppress(ConnectionError):
        while await loop.sock_recv(sock, 1 << 20):
            pass


async def _through(sender: socket.socket, receiver: socket.socket, data: bytes, stage: Stage, what: str) -> None:
    got = bytearray()

    async def receive() -> None:
        while len(got) < len(data):
            got.extend(await stage.loop.sock_recv(receiver, 65_536))

    await stage.within(asyncio.gather(stage.loop.sock_sendall(sender, data), receive()), f"bytes through it: {what}")
    stage.check(got == data, f"{len(got)} wrong bytes: {what}")


# -- calls that are wrong, or hardly right ---------------------------------------------------------


def _closed(sock: socket.socket) -> socket.socket:
    sock.close()
    return sock


_MISUSES: dict[str, Callable[[Any, socket.socket], Any]] = {
    "recv -1": lambda loop, sock: loop.sock_recv(sock, -1),
    "recv 0": lambda loop, sock: loop.sock_recv(sock, 0),
    "recv 1.5": lambda loop, sock: loop.sock_recv(sock, 1.5),
    "recv text": lambda loop, sock: loop.sock_recv(sock, "1"),
    "recv closed": lambda loop, sock: loop.sock_recv(_closed(sock), 1),
    "recv nothing": lambda loop, sock: loop.sock_recv(None, 1),
    "recv_into bytes": lambda loop, sock: loop.sock_recv_into(sock, b"x"),
    "recv_into empty": lambda loop, sock: loop.sock_recv_into(sock, bytearray()),
    "recv_into closed": lambda loop, sock: loop.sock_recv_into(_closed(sock), bytearray(1)),
    "sendall text": lambda loop, sock: loop.sock_sendall(sock, "text"),
    "sendall nothing": lambda loop, sock: loop.sock_sendall(sock, b""),
    "sendall None": lambda loop, sock: loop.sock_sendall(sock, None),
    "sendall closed": lambda loop, sock: loop.sock_sendall(_closed(sock), b"x"),
    "sendall view": lambda loop, sock: loop.sock_sendall(sock, memoryview(b"abcdef")[::2]),
    "accept stream": lambda loop, sock: loop.sock_accept(sock),
    "accept closed": lambda loop, sock: loop.sock_accept(_closed(sock)),
    "connect again": lambda loop, sock: loop.sock_connect(sock, "\0nobody"),
    "connect closed": lambda loop, sock: loop.sock_connect(_closed(sock), "\0nobody"),
    "sendto closed": lambda loop, sock: loop.sock_sendto(_closed(sock), b"x", "\0nobody"),
    "recvfrom -1": lambda loop, sock: loop.sock_recvfrom(sock, -1),
    "recvfrom_into too much": lambda loop, sock: loop.sock_recvfrom_into(sock, bytearray(3), 5),
}


async def _play_misuse(misuse: _Misuse, stage: Stage, number: str) -> None:
    for call in misuse.calls:
        ours, theirs = stream_pair(unix=True)
        with ours, theirs:
            theirs.setblocking(True)
            theirs.send(b"some bytes")
            result: Any
            try:
                result = await asyncio.wait_for(_MISUSES[call](stage.loop, ours), 0.5)
            except Exception as exc:
                result = describe(exc)
            stage.note(f"misuse {number}", f"{call}: {result}")
