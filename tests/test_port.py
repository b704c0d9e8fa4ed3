"""CompletionPort by itself: the public queue, from one thread and from several."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from iocp_loop import Completion, CompletionPort
from iocp_loop import operations as ops
from iocp_loop.operations import READABLE, Receive, ReceiveStream, Send, SendAll

from .support import LIMIT, in_thread, tcp_pair

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def port(driver: str, no_leak: None) -> Iterator[CompletionPort]:
    """A port for one thread."""
    with CompletionPort(1, driver=driver) as port:
        yield port


@pytest.fixture
def shared_port(driver: str, no_leak: None) -> Iterator[CompletionPort]:
    """A port for any number of threads."""
    with CompletionPort(driver=driver) as port:
        yield port


def get(port: CompletionPort) -> Completion:
    """The next completion, which must come."""
    completion = port.get(LIMIT)
    assert completion is not None, "nothing has completed in time"
    return completion


# -- one thread ------------------------------------------------------------------------------------


def test_a_port_tells_its_driver(port: CompletionPort, driver: str) -> None:
    assert port.driver == driver
    assert driver in repr(port)


def test_a_completion_names_its_operation_and_its_key(port: CompletionPort, pair: Pair) -> None:
    key = object()
    port.register(pair[0], key)
    op = Receive(pair[0], 100)
    port.submit(op)
    assert port.in_flight == 1
    pair[1].send(b"hello")
    completion = get(port)
    assert tuple(completion) == (op, key, b"hello", None)
    assert completion.operation is op
    assert completion.result() == b"hello"
    assert port.in_flight == 0


def test_each_handle_has_its_own_key(port: CompletionPort) -> None:
    pairs = [tcp_pair() for _ in range(5)]
    for number, (ours, peer) in enumerate(pairs):
        port.register(ours, number)
        port.submit(Receive(ours, 10))
        peer.send(b"%d" % number)
    got = [get(port) for _ in pairs]
    assert sorted((completion.key, completion.value) for completion in got) == [(n, b"%d" % n) for n in range(5)]
    for sock in (sock for pair in pairs for sock in pair):
        sock.close()


def test_the_key_is_the_one_at_submission(port: CompletionPort, pair: Pair) -> None:
    port.register(pair[0], "first")
    port.submit(Receive(pair[0], 1))
    port.unregister(pair[0])
    pair[1].send(b"x")
    assert get(port).key == "first"


def test_an_error_comes_as_a_completion(port: CompletionPort, pair: Pair) -> None:
    port.register(pair[0])
    op = Receive(pair[0], 1)
    port.submit(op)
    port.cancel(op)
    completion = get(port)
    assert completion.operation is op
    assert completion.value is None
    with pytest.raises(OSError) as failure:
        completion.result()
    assert failure.value.errno == errno.ECANCELED


def test_get_gives_up_after_its_timeout(port: CompletionPort, pair: Pair) -> None:
    port.register(pair[0])
    port.submit(Receive(pair[0], 1))
    for timeout in (0, 0.03):
        start = time.perf_counter()
        assert port.get(timeout) is None
        assert timeout <= time.perf_counter() - start < LIMIT / 4
    assert port.get(-1) is None


def test_get_with_timeout_0_takes_what_is_there(port: CompletionPort, pair: Pair) -> None:
    port.post("posted")
    completion = port.get(0)
    assert completion is not None
    assert completion.value == "posted"
    port.register(pair[0])
    port.submit(Send(pair[0], b"x"))
    deadline = time.monotonic() + LIMIT
    while (completion := port.get(0)) is None:
        assert time.monotonic() < deadline
    assert completion.value == 1


def test_posts_come_out_in_order(port: CompletionPort) -> None:
    for number in range(100):
        port.post(number, key="by hand")
    assert [port.get(0) for _ in range(100)] == [Completion(None, "by hand", number) for number in range(100)]
    assert port.get(0) is None


def test_batches(port: CompletionPort) -> None:
    assert port.get_batch(0) == []
    for number in range(10):
        port.post(number)
    assert [completion.value for completion in port.get_batch(0, limit=4)] == [0, 1, 2, 3]
    assert [completion.value for completion in port.get_batch(LIMIT)] == [4, 5, 6, 7, 8, 9]
    with pytest.raises(ValueError, match="limit"):
        port.get_batch(0, limit=0)


def test_a_stream_yields_many_completions(port: CompletionPort, pair: Pair) -> None:
    port.register(pair[0], "stream")
    op = ReceiveStream(pair[0])
    port.submit(op)
    for message in (b"one", b"two"):
        pair[1].send(message)
        completion = get(port)
        assert (completion.operation, completion.value) == (op, message)
    pair[1].close()
    assert get(port).value == b""
    assert port.in_flight == 0


def test_send_all_of_several_buffers(port: CompletionPort, pair: Pair) -> None:
    port.register(pair[0])
    port.submit(SendAll(pair[0], [b"one ", b"two"]))
    assert get(port).value == 7
    assert pair[1].recv(100) == b"one two"


def test_a_refused_submission_leaves_nothing(port: CompletionPort, pair: Pair) -> None:
    with pytest.raises(ValueError, match="events"):
        port.submit(ops.Readiness(pair[0], 0))
    assert port.in_flight == 0
    assert port.get(0) is None


def test_concurrency_must_not_be_negative(driver: str) -> None:
    with pytest.raises(ValueError, match="concurrency"):
        CompletionPort(-1, driver=driver)


# -- the end ---------------------------------------------------------------------------------------


def test_a_closed_port_refuses(port: CompletionPort, pair: Pair) -> None:
    assert not port.closed
    port.close()
    assert port.closed
    assert "closed" in repr(port)
    port.close()
    op = Receive(pair[0], 1)
    for call in (
        lambda: port.get(0),
        lambda: port.get_batch(0),
        lambda: port.post(),
        lambda: port.submit(op),
        lambda: port.register(pair[0]),
    ):
        with pytest.raises(ValueError, match="closed"):
            call()
    port.cancel(op)


def test_close_with_operations_in_flight_reaps_them(port: CompletionPort, pair: Pair) -> None:
    port.register(pair[0])
    op = Receive(pair[0], 1)
    port.submit(op)
    port.get(0)
    port.close()
    assert op.state is ops.DONE
    assert port.in_flight == 0
    with pytest.raises(ValueError, match="closed"):
        port.get(0)


def test_close_from_inside_of_get(port: CompletionPort, pair: Pair) -> None:
    """As a finalizer or a signal handler may call it."""
    port.register(pair[0])
    op = Receive(pair[0], 1)
    port.submit(op)

    def close() -> bool:
        port.close()
        return True

    port._driver.before_sleep = close
    with pytest.raises(ValueError, match="closed"):
        port.get()
    assert op.state is ops.DONE
    assert port._driver.closed


def test_close_is_bounded(port: CompletionPort) -> None:
    pairs = [tcp_pair() for _ in range(20)]
    for ours, _ in pairs:
        port.register(ours)
        port.submit(Receive(ours, 10))
        port.submit(SendAll(ours, [bytes(8 << 20)]))
    port.get(0)
    start = time.monotonic()
    port.close()
    assert time.monotonic() - start < 2.5
    for sock in (sock for pair in pairs for sock in pair):
        sock.close()


# -- several threads -------------------------------------------------------------------------------


def test_another_thread_may_post_to_a_port_of_one_thread(port: CompletionPort) -> None:
    def post() -> None:
        for number in range(500):
            port.post(number)

    with in_thread(post):
        got = [get(port).value for _ in range(500)]
    assert got == list(range(500))


def test_a_post_wakes_a_thread_that_waits_without_limit(shared_port: CompletionPort) -> None:
    got: list[Completion | None] = []
    with in_thread(lambda: got.append(shared_port.get())):
        time.sleep(0.05)
        shared_port.post("wake up")
    assert got == [Completion(None, None, "wake up")]


def test_a_submission_that_is_done_at_once_wakes_a_thread_that_waits(shared_port: CompletionPort, pair: Pair) -> None:
    got: list[Completion | None] = []
    with in_thread(lambda: got.append(shared_port.get(LIMIT))):
        time.sleep(0.05)
        shared_port.register(pair[0])
        shared_port.submit(Send(pair[0], b"x"))
    assert [completion and completion.value for completion in got] == [1]


def test_a_submission_from_one_thread_completes_in_another_that_waits(shared_port: CompletionPort, pair: Pair) -> None:
    got: list[Completion | None] = []
    with in_thread(lambda: got.append(shared_port.get(LIMIT))):
        time.sleep(0.05)
        shared_port.register(pair[0])
        shared_port.submit(Receive(pair[0], 10))
        time.sleep(0.05)
        pair[1].send(b"x")
    assert [completion and completion.value for completion in got] == [b"x"]


def test_a_cancel_from_one_thread_wakes_another_that_waits(shared_port: CompletionPort, pair: Pair) -> None:
    shared_port.register(pair[0])
    op = Receive(pair[0], 10)
    shared_port.submit(op)
    got: list[Completion | None] = []
    with in_thread(lambda: got.append(shared_port.get(LIMIT))):
        time.sleep(0.05)
        shared_port.cancel(op)
    ((completion),) = got
    assert completion is not None
    assert completion.operation is op
    assert isinstance(completion.error, OSError)
    assert completion.error.errno == errno.ECANCELED


@pytest.mark.parametrize("batches", [False, True], ids=["get", "get_batch"])
def test_each_completion_goes_to_exactly_one_of_many_threads(shared_port: CompletionPort, batches: bool) -> None:
    taken: list[object] = []
    stop = object()

    def work() -> None:
        while True:
            got = shared_port.get_batch(LIMIT) if batches else [get(shared_port)]
            assert got
            for position, completion in enumerate(got):
                if completion.value is stop:
                    for surplus in got[position + 1 :]:  # each worker takes one stop
                        shared_port.post(surplus.value)
                    return
                taken.append(completion.value)

    def post(first: int) -> None:
        for number in range(first, first + 1000):
            shared_port.post(number)

    workers = [threading.Thread(target=work, daemon=True) for _ in range(4)]
    posters = [threading.Thread(target=post, args=(first,), daemon=True) for first in (0, 1000, 2000)]
    for thread in workers + posters:
        thread.start()
    for thread in posters:
        thread.join(LIMIT)
    for _ in workers:
        shared_port.post(stop)
    for thread in workers:
        thread.join(LIMIT)
        assert not thread.is_alive()
    assert sorted(taken) == list(range(3000))  # type: ignore[type-var]  # they are all numbers


def test_worker_threads_drain_one_port_and_echo(shared_port: CompletionPort) -> None:
    """The seed's program: each thread gets a completion, tells READ from WRITE, and starts the next I/O."""
    pairs = [tcp_pair() for _ in range(8)]

    def work() -> None:
        with contextlib.suppress(ValueError):  # the port is closed, between the end of a send and the next receive too
            while True:
                operation, key, value, error = get(shared_port)
                assert error is None
                assert operation is None or operation.handle is key
                if isinstance(operation, Receive) and value:
                    shared_port.submit(SendAll(operation.handle, [value]))  # type: ignore[arg-type]  # of a socket
                elif isinstance(operation, SendAll):
                    shared_port.submit(Receive(operation.handle, 4096))  # type: ignore[arg-type]  # as above

    workers = [threading.Thread(target=work, daemon=True) for _ in range(4)]
    for thread in workers:
        thread.start()
    for ours, _ in pairs:
        shared_port.register(ours, ours)
        shared_port.submit(Receive(ours, 4096))

    def talk(peer: socket.socket) -> None:
        for _ in range(50):
            message = os.urandom(1000)
            peer.sendall(message)
            answer = b""
            while len(answer) < len(message):
                answer += peer.recv(4096)
            assert answer == message
        peer.shutdown(socket.SHUT_WR)

    talkers = [in_thread(lambda peer=peer: talk(peer)) for _, peer in pairs]  # type: ignore[misc]  # no type for peer
    for talker in talkers:
        talker.__enter__()
    for talker in talkers:
        talker.__exit__(None, None, None)
    shared_port.close()
    for thread in workers:
        thread.join(LIMIT)
        assert not thread.is_alive()
    for sock in (sock for pair in pairs for sock in pair):
        sock.close()


def test_close_while_threads_wait(shared_port: CompletionPort) -> None:
    refused: list[ValueError] = []

    def wait() -> None:
        try:
            shared_port.get()
        except ValueError as exc:
            refused.append(exc)

    threads = [threading.Thread(target=wait, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    start = time.monotonic()
    shared_port.close()
    for thread in threads:
        thread.join(LIMIT)
        assert not thread.is_alive()
    assert time.monotonic() - start < 2.5
    assert len(refused) == 4


def test_a_thread_gives_up_in_time_while_another_waits_without_limit(shared_port: CompletionPort) -> None:
    with in_thread(lambda: shared_port.get()):
        time.sleep(0.05)
        start = time.perf_counter()
        assert shared_port.get(0.05) is None
        assert 0.05 <= time.perf_counter() - start < LIMIT / 4
        shared_port.post()


def test_a_readiness_that_another_thread_brings_about(shared_port: CompletionPort, pair: Pair) -> None:
    shared_port.register(pair[0])
    shared_port.submit(ops.Readiness(pair[0], READABLE))

    def send_later() -> None:
        time.sleep(0.05)
        pair[1].send(b"x")

    with in_thread(send_later):
        assert get(shared_port).value == READABLE
