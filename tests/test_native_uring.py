"""The driver ``uring``: what is its own, beside the contract of all drivers (test_drivers.py and its siblings)."""

from __future__ import annotations

import errno
import gc
import importlib
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from iocp_loop import native
from iocp_loop import operations as ops
from iocp_loop.operations import READABLE, Operation
from iocp_loop.ports import availability, make_driver

from .rig import Pair, Rig, received
from .support import LIMIT, fill, in_thread, listening_socket, run_python, tcp_pair

if sys.platform != "linux":
    pytest.skip("io_uring exists on Linux only", allow_module_level=True)

uring: Any = importlib.import_module("iocp_loop.ports.uring.driver")
uring_turns: Any = importlib.import_module("iocp_loop.ports.uring.turns")
binding: Any = importlib.import_module("iocp_loop.ports.uring.binding")

_state = availability("uring")
needs_uring = pytest.mark.skipif(not _state.available, reason=f"uring can't work here: {_state.reason}")


@pytest.fixture(params=["incremental", "plain"])
def rig(request: pytest.FixtureRequest, no_leak: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """A uring driver, with a pool as new kernels have it, and one as kernels before 6.12 have it."""
    if request.param == "plain":
        monkeypatch.setattr(binding, "lib", _OlderKernel(binding.lib))
    rig = Rig(uring.UringDriver())
    yield rig
    rig.driver.close()
    assert not rig.driver.in_flight


class _OlderKernel:
    """The native module, but its rings have no incremental buffers."""

    def __init__(self, lib: Any) -> None:
        self._lib = lib

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lib, name)

    def uring_open(self, flags: int, wake_fd: int, epoll_fd: int, step: Any) -> Any:
        return self._lib.uring_open(flags | self._lib.URING_PLAIN, wake_fd, epoll_fd, step)


def run_in_thread(work: Callable[[], object]) -> None:
    with in_thread(work):
        pass


def until_values(rig: Rig, op: Operation, count: int = 1) -> None:
    rig.until(lambda: len(rig.values(op)) == count)


# -- the ring --------------------------------------------------------------------------------------


@needs_uring
def test_a_ring_is_made_when_there_is_something_for_it(rig: Rig, pair: Pair) -> None:
    """To make one costs more than all the rest of a loop that neither sleeps nor waits for anything."""
    driver: Any = rig.driver
    for _ in range(3):
        driver.wait(0)
        driver.dispatch()
    assert driver._ring is None
    rig.submit(ops.Readiness(pair[0], READABLE))
    driver.wait(0)
    assert driver._ring is not None


@needs_uring
def test_what_wrote_to_the_waker_before_there_was_a_ring_ends_the_first_sleep(rig: Rig) -> None:
    driver: Any = rig.driver
    driver.wait(0)
    driver._waker.wake()  # as the system does for a signal
    begun = time.monotonic()
    driver.wait(LIMIT)
    assert time.monotonic() - begun < LIMIT / 2
    assert driver._ring is not None


# -- the queues ------------------------------------------------------------------------------------


@needs_uring
def test_more_submissions_than_the_queue_holds(rig: Rig, pair: Pair) -> None:
    pair[1].send(b"ready")
    operations = [rig.submit(ops.Readiness(pair[0], READABLE)) for _ in range(3000)]
    rig.turn()
    more = [rig.submit(ops.Readiness(pair[0], READABLE)) for _ in range(3000)]
    rig.until(lambda: not rig.driver.in_flight)
    assert all(rig.values(op) == [READABLE] for op in (operations + more)[::97])


@needs_uring
def test_more_completions_than_the_queue_holds_arrive_all(rig: Rig) -> None:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        for _ in range(12_000):
            rig.submit(ops.Readiness(fd, READABLE))
        rig.turn()
        assert not rig.delivered
        os.eventfd_write(fd, 1)
        rig.until(lambda: len(rig.delivered) == 12_000)
        assert not rig.driver.in_flight
    finally:
        os.close(fd)


@needs_uring
def test_what_was_cancelled_before_the_kernel_saw_it_never_reaches_it(rig: Rig, pair: Pair) -> None:
    rig.turn()
    ours, peer = tcp_pair()
    op = rig.submit(ops.Receive(ours, 10))
    number = ours.fileno()
    rig.driver.cancel(op)
    ours.close()
    peer.close()
    # The number means another connection now, whose data are nobody's to take.
    os.dup2(pair[0].fileno(), number)
    try:
        pair[1].send(b"keep")
        assert rig.error(op).errno == errno.ECANCELED
        assert rig.nothing_comes()
        assert pair[0].recv(10) == b"keep"
    finally:
        os.close(number)


@needs_uring
@pytest.mark.skipif(native.hot is not None, reason="in the native tier nothing can come between: IOCP_LOOP_NATIVE=0")
def test_an_interrupt_right_after_the_wait_loses_no_completion(
    rig: Rig, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = rig.submit(ops.ReceiveStream(pair[0]))
    pair[1].send(b"data")

    class Interrupted:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def unpack(self, array: Any, count: int) -> Any:
            raise KeyboardInterrupt

    real = binding.ffi
    with monkeypatch.context() as patch:
        patch.setattr(uring_turns, "ffi", Interrupted())
        with pytest.raises(KeyboardInterrupt):
            rig.until(lambda: False)
    until_values(rig, op)
    assert received(rig, op) == b"data"
    rig.end(op)


@needs_uring
def test_wait_does_not_block_while_something_is_not_dispatched(rig: Rig, pair: Pair) -> None:
    def interrupt(value: Any, error: BaseException | None) -> None:
        raise KeyboardInterrupt

    pair[1].send(b"data")
    first = rig.submit(ops.Readiness(pair[0], READABLE), then=interrupt)
    second = rig.submit(ops.Readiness(pair[0], READABLE))
    rig.driver.wait(LIMIT)
    with pytest.raises(KeyboardInterrupt):
        rig.driver.dispatch()
    begun = time.monotonic()
    rig.driver.wait(LIMIT)
    assert time.monotonic() - begun < 1
    rig.driver.dispatch()
    assert rig.values(first) == rig.values(second) == [READABLE]


# -- the pools of buffers --------------------------------------------------------------------------


@needs_uring
def test_more_data_than_the_pool_holds_arrives_whole(rig: Rig) -> None:
    pairs = [tcp_pair() for _ in range(40)]
    data = os.urandom(1 << 18)
    try:
        streams = [rig.submit(ops.ReceiveStream(ours)) for ours, _ in pairs]
        with in_thread(lambda: [peer.sendall(data) for _ in range(2) for _, peer in pairs]):
            rig.until(lambda: all(len(received(rig, op)) == 2 * len(data) for op in streams))
        for op in streams:
            assert received(rig, op) == 2 * data
            rig.end(op)
    finally:
        for ours, peer in pairs:
            ours.close()
            peer.close()


@needs_uring
def test_more_single_receives_at_once_than_the_pool_has_buffers(rig: Rig) -> None:
    pairs = [tcp_pair() for _ in range(300)]
    try:
        operations = [rig.submit(ops.Receive(ours, 100)) for ours, _ in pairs]
        rig.turn()
        for i, (_, peer) in enumerate(pairs):
            peer.send(b"%d" % i)
        for i, op in enumerate(operations):
            assert rig.value(op) == b"%d" % i
    finally:
        for ours, peer in pairs:
            ours.close()
            peer.close()


@needs_uring
def test_small_messages_keep_their_place_in_the_pool(rig: Rig, pair: Pair) -> None:
    # Enough to go round the whole pool; every byte says where it belongs.
    data = bytes(range(251)) * 40_000
    op = rig.submit(ops.ReceiveStream(pair[0]))
    sent = 0
    while sent < len(data):
        for size in (1, 1000, 4093, 9999):
            pair[1].send(data[sent : sent + size])
            sent += size
        rig.turn()
    rig.until(lambda: len(received(rig, op)) >= len(data))
    assert received(rig, op) == data
    rig.end(op)


@needs_uring
@pytest.mark.parametrize("into", [False, True], ids=["bytes", "get_buffer"])
def test_large_pieces_change_the_way_of_receiving_and_small_ones_change_it_back(
    rig: Rig, pair: Pair, into: bool
) -> None:
    buffer = bytearray(100_000)
    got = bytearray()

    def take(value: Any, error: BaseException | None) -> None:
        if error is None:
            got.extend(buffer[:value] if isinstance(value, int) else value)

    op = rig.submit(ops.ReceiveStream(pair[0], (lambda: buffer) if into else None), then=take)
    rig.turn()
    data = os.urandom(16 << 20)
    driver: Any = rig.driver
    if driver._ring.incremental:
        with in_thread(lambda: pair[1].sendall(data)):
            rig.until(lambda: op.driver_data.large)
            rig.until(lambda: len(got) == len(data))
        assert got == data
        assert any(isinstance(value, int) for value in rig.values(op)) == into
        for _ in range(10):
            pair[1].send(b"small")
            rig.until(lambda: got.endswith(b"small"))
            del got[-5:]
        assert not op.driver_data.large
    pair[1].send(b"last")
    pair[1].shutdown(socket.SHUT_WR)
    rig.until(lambda: not op.in_flight)
    assert got.endswith(b"last")


@needs_uring
def test_a_datagram_is_not_cut_to_the_size_of_the_pools_buffers(rig: Rig) -> None:
    ours, peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, peer:
        ours.setblocking(False)
        data = os.urandom(50_000)
        peer.send(data)
        assert rig.value(rig.submit(ops.Receive(ours, 65536))) == data


@needs_uring
def test_a_stream_that_finds_the_pool_empty_asks_no_more(rig: Rig) -> None:
    """Else it would ask in vain in every turn, as long as others empty the pool in each."""
    pairs = [socket.socketpair() for _ in range(80)]
    try:
        sent = 0
        for ours, peer in pairs:
            ours.setblocking(False)
            peer.setblocking(False)
            sent += peer.send(bytes(150_000))
        assert sent > 2 << 20  # twice what the pool holds
        streams = [ops.ReceiveStream(ours) for ours, _ in pairs]
        polled: dict[Operation, bool] = {}  # whether its first piece came by polling
        for op in streams:
            rig.submit(op, lambda value, error, op=op: polled.setdefault(op, op.driver_data.watched))  # type: ignore[misc]  # a default binds it
        rig.until(lambda: len(polled) == len(streams))
        assert any(polled.values())
    finally:
        rig.driver.close()
        for sock in (sock for pair in pairs for sock in pair):
            sock.close()


# -- other threads ---------------------------------------------------------------------------------


@needs_uring
@pytest.mark.parametrize("alive", [False, True], ids=["thread ended", "thread lives"])
def test_another_thread_takes_over_everything_in_flight(rig: Rig, pair: Pair, alive: bool) -> None:
    """The ring belongs to a thread; what is in flight does not."""
    readable, writable = os.pipe()
    target = bytearray(10)
    second = tcp_pair()
    third = tcp_pair()
    fourth = tcp_pair()
    fill(fourth[0])
    done = threading.Event()
    with listening_socket() as listener:
        stream = ops.ReceiveStream(pair[0])
        accepts = ops.AcceptStream(listener)
        readiness = ops.ReadinessStream(third[0], READABLE)
        single = ops.Receive(second[0], 10)
        pipe = ops.ReadInto(readable, target)
        send = ops.SendAll(fourth[0], [b"tail", b"end"])
        cancelled = ops.Receive(third[0], 10)

        def first_thread() -> None:
            for op in (stream, accepts, readiness, single, pipe, send, cancelled):
                rig.submit(op)
            rig.turn()
            pair[1].send(b"before")
            rig.until(lambda: rig.values(stream))
            rig.driver.cancel(cancelled)
            if alive:
                threading.Thread(target=done.wait, daemon=True).start()

        if alive:
            thread = threading.Thread(target=lambda: (first_thread(), ready.set(), done.wait()), daemon=True)
            ready = threading.Event()
            thread.start()
            assert ready.wait(LIMIT)
        else:
            run_in_thread(first_thread)

        assert rig.error(cancelled).errno == errno.ECANCELED
        pair[1].send(b" after")
        rig.until(lambda: received(rig, stream) == b"before after")
        for count in (1, 2, 3):
            with socket.create_connection(listener.getsockname(), LIMIT):
                until_values(rig, accepts, count)
        third[1].send(b"r")
        rig.until(lambda: rig.values(readiness))
        third[0].recv(1)
        second[1].send(b"s")
        assert rig.value(single) == b"s"
        os.write(writable, b"p")
        assert rig.value(pipe) == 1
        tail: list[bytes] = []
        with in_thread(lambda: tail.append(_read_until(fourth[1], b"tailend"))):
            assert rig.value(send) == 7
        assert tail[0].count(b"tailend") == 1
        done.set()
        for op in (stream, accepts, readiness):
            rig.end(op)
        for sock, _ in rig.values(accepts):
            sock.close()
    for sock in (*second, *third, *fourth):
        sock.close()
    os.close(readable)
    os.close(writable)


def _read_until(sock: socket.socket, end: bytes) -> bytes:
    data = b""
    while not data.endswith(end):
        data = data[-100:] + sock.recv(1 << 16)
    return data


@needs_uring
def test_what_the_first_thread_gathered_and_did_not_deliver_comes_first(rig: Rig, pair: Pair) -> None:
    stream = ops.ReceiveStream(pair[0])

    def first_thread() -> None:
        rig.submit(stream)
        rig.turn()
        pair[1].send(b"one ")
        rig.driver.wait(LIMIT)

    run_in_thread(first_thread)
    pair[1].send(b"two")
    rig.until(lambda: received(rig, stream) == b"one two")
    rig.end(stream)


@needs_uring
def test_a_connection_under_way_survives_the_change_of_thread(rig: Rig) -> None:
    with listening_socket() as listener, socket.socket() as sock:
        sock.setblocking(False)
        op = ops.Connect(sock, listener.getsockname())

        def first_thread() -> None:
            rig.submit(op)
            rig.driver.wait(0)

        run_in_thread(first_thread)
        assert rig.value(op) is None


@needs_uring
def test_closing_in_another_thread_than_the_rings(no_leak: None, pair: Pair) -> None:
    """After that thread's end, as ``loop.close()`` does it, and in its lifetime."""
    for alive in (False, True):
        rig = Rig(uring.UringDriver())
        done, ready = threading.Event(), threading.Event()

        def work(rig: Rig = rig, done: threading.Event = done, ready: threading.Event = ready) -> None:
            rig.submit(ops.ReceiveStream(pair[0]))
            rig.submit(ops.Readiness(pair[0], READABLE))
            rig.turn()
            ready.set()
            done.wait(LIMIT)

        if not alive:
            done.set()
        with in_thread(work):
            assert ready.wait(LIMIT)
            begun = time.monotonic()
            rig.driver.close()
            assert time.monotonic() - begun < 1
            done.set()
        assert not rig.driver.in_flight


@needs_uring
def test_a_shared_port_outlives_the_threads_that_submit(no_leak: None, pair: Pair) -> None:
    rig = Rig(make_driver("uring", concurrency=2))
    stream, single = ops.ReceiveStream(pair[0]), ops.Readiness(pair[0], READABLE)
    try:
        run_in_thread(lambda: [rig.submit(op) for op in (stream, single)])
        time.sleep(0.05)  # the kernel cancels what the thread had, once it has really gone
        rig.turn()
        assert not rig.delivered
        pair[1].send(b"data")
        rig.until(lambda: received(rig, stream) == b"data")
        rig.end(stream)
        pair[1].send(b"more")
        assert rig.value(single) == READABLE
    finally:
        rig.driver.close()


@needs_uring
def test_a_submission_reaches_a_shared_port_on_which_another_thread_sleeps(no_leak: None, pair: Pair) -> None:
    rig = Rig(make_driver("uring", concurrency=2))
    lock = threading.Lock()
    op = ops.Receive(pair[0], 10)

    def sleeper() -> None:
        while not rig.delivered:
            rig.driver.wait(LIMIT)
            with lock:
                rig.driver.dispatch()

    try:
        with in_thread(sleeper):
            time.sleep(0.05)
            with lock:
                rig.submit(op)
            pair[1].send(b"data")
        assert rig.values(op) == [b"data"]
    finally:
        rig.driver.close()


# -- forking ---------------------------------------------------------------------------------------


@needs_uring
def test_a_forked_child_does_not_disturb_its_parent() -> None:
    run_python(
        """
        import os, socket, warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons dislike fork beside threads
        from iocp_loop.operations import ReceiveStream
        from iocp_loop.ports.uring.driver import UringDriver

        driver = UringDriver()
        ours, peer = socket.socketpair()
        ours.setblocking(False)
        op, got, children = ReceiveStream(ours), [], []

        def complete(value, error):
            got.append(value)
            if len(got) == 1:
                # In the midst of a dispatch: the child comes back to it too.
                child = os.fork()
                if child:
                    children.append(child)

        op.complete = complete
        driver.submit(op)
        driver.wait(0)
        peer.send(b"one")
        driver.wait(10)
        driver.dispatch()
        if not children:
            driver.cancel(op)
            driver.dispatch()
            assert got == [b"one", None] and not driver.in_flight
            driver.close()
            again = UringDriver()
            again.wait(0)
            again.close()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 0
        peer.send(b"two")
        driver.wait(10)
        driver.dispatch()
        assert got == [b"one", b"two"], got
        driver.close()
        """
    )


# -- single kinds ----------------------------------------------------------------------------------


@needs_uring
def test_a_write_to_a_full_non_blocking_pipe_waits(rig: Rig) -> None:
    readable, writable = os.pipe()
    try:
        os.set_blocking(writable, False)
        filled = 0
        try:
            while True:
                filled += os.write(writable, b"x" * 4096)
        except BlockingIOError:
            pass
        op = rig.submit(ops.Write(writable, b"tail"))
        assert rig.nothing_comes()
        assert len(os.read(readable, filled)) == filled
        assert rig.value(op) == 4
        assert os.read(readable, 10) == b"tail"
    finally:
        os.close(readable)
        os.close(writable)


@needs_uring
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "", "::1"])
def test_connect_takes_what_the_socket_module_takes(rig: Rig, host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, 0), family=family)
    except OSError as error:
        pytest.skip(f"this machine has no such address: {error}")
    with listener, socket.socket(family) as sock:
        sock.setblocking(False)
        assert rig.value(rig.submit(ops.Connect(sock, (host, *listener.getsockname()[1:])))) is None
        assert sock.getpeername()[1] == listener.getsockname()[1]


@needs_uring
@pytest.mark.parametrize("abstract", [False, True], ids=["path", "abstract"])
def test_connect_to_unix_sockets(rig: Rig, tmp_path: Path, abstract: bool) -> None:
    with tempfile.TemporaryDirectory() as directory:  # pytest's own path may be too long for a socket
        address: Any = f"\0iocp_loop-{os.getpid()}" if abstract else f"{directory}/socket"
        with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as sock:
            listener.bind(address)
            listener.listen()
            sock.setblocking(False)
            assert rig.value(rig.submit(ops.Connect(sock, address))) is None
            assert sock.getpeername() == listener.getsockname()
        with socket.socket(socket.AF_UNIX) as sock:
            sock.setblocking(False)
            wrong = rig.error(rig.submit(ops.Connect(sock, f"{directory}/none")))
            assert wrong.errno == errno.ENOENT
            too_long = rig.error(rig.submit(ops.Connect(sock, "x" * 200)))
            assert "too long" in str(too_long)


@needs_uring
@pytest.mark.parametrize("address", [("127.0.0.1",), ("127.0.0.1", 70000), 5, ("127.0.0.1", "http")])
def test_connect_to_nonsense_is_an_error_of_the_operation(rig: Rig, address: Any) -> None:
    with socket.socket() as sock:
        sock.setblocking(False)
        _, error = rig.outcome(rig.submit(ops.Connect(sock, address)))
        assert isinstance(error, (TypeError, OverflowError))


@needs_uring
@pytest.mark.parametrize("kind", [ops.Receive, ops.ReceiveFrom])
def test_receiving_nothing_does_not_wait(rig: Rig, pair: Pair, kind: Any) -> None:
    if kind is ops.Receive:
        assert rig.value(rig.submit(kind(pair[0], 0))) == b""
        assert rig.value(rig.submit(ops.ReceiveInto(pair[0], bytearray()))) == 0
    assert rig.value(rig.submit(ops.Send(pair[0], b""))) == 0
    assert rig.value(rig.submit(ops.SendAll(pair[0], []))) == 0


@needs_uring
def test_send_all_of_more_buffers_than_one_call_takes(rig: Rig, pair: Pair) -> None:
    pieces = [b"%04d" % i for i in range(5000)]
    got: list[bytes] = []

    def read() -> None:
        while sum(map(len, got)) < 20_000:
            got.append(pair[1].recv(65536))

    with in_thread(read):
        assert rig.value(rig.submit(ops.SendAll(pair[0], pieces))) == 20_000
    assert b"".join(got) == b"".join(pieces)


@needs_uring
def test_a_pause_and_a_resume_before_the_kernel_heard_of_either(rig: Rig, pair: Pair) -> None:
    op = rig.submit(ops.ReceiveStream(pair[0]))
    rig.driver.pause(op)
    rig.driver.resume(op)
    rig.turn()
    rig.driver.pause(op)
    rig.driver.resume(op)
    pair[1].send(b"data")
    rig.until(lambda: received(rig, op) == b"data")
    rig.driver.pause(op)
    rig.turn()
    rig.driver.cancel(op)
    assert rig.last_error(op).errno == errno.ECANCELED


# -- closing ---------------------------------------------------------------------------------------


@needs_uring
def test_closing_inside_a_completion(no_leak: None, pair: Pair) -> None:
    rig = Rig(uring.UringDriver())
    other, its_peer = tcp_pair()
    with other, its_peer:
        for peer in (pair[1], its_peer):
            peer.send(b"data")
        for sock in (pair[0], other):
            rig.submit(ops.ReceiveStream(sock), then=lambda value, error: rig.driver.close())
        rig.until(lambda: rig.driver.closed)
        assert [value for _, value, _ in rig.delivered] == [b"data", None, None]
        assert not rig.driver.in_flight


@needs_uring
def test_what_the_kernel_keeps_is_kept_for_it(no_leak: None, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(uring.UringDriver())
    readable, writable = os.pipe()  # which block: a worker thread of the kernel waits in them
    op = rig.submit(ops.ReadInto(readable, bytearray(10)))
    rig.turn()
    kept: list[Any] = []
    monkeypatch.setattr(uring, "leak", lambda *things: kept.extend(things))
    with pytest.warns(ResourceWarning, match="did not give back"):
        rig.driver.close(timeout=0)
    assert kept == [op]
    os.close(writable)
    os.close(readable)


@needs_uring
@pytest.mark.parametrize("closed", [True, False], ids=["closed", "dropped"])
def test_the_collector_may_find_operations_with_buffers(no_leak: None, pair: Pair, closed: bool) -> None:
    fill(pair[0])
    rig = Rig(uring.UringDriver())
    buffer = bytearray(10)
    # The rig's `complete` refers to the operation, and so they are garbage in a circle.
    for op in (ops.SendAll(pair[0], [b"a", b"b"]), ops.Send(pair[0], b"c"), ops.ReceiveInto(pair[0], buffer)):
        rig.submit(op)
    rig.turn()
    if closed:
        rig.driver.close()
        del op, rig
        gc.collect()
        buffer.append(1)  # nothing holds on to it
    else:
        del op, rig
        gc.collect()
