"""Operations by themselves: plain data, no driver."""

from __future__ import annotations

import array
import errno
import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iocp_loop import operations as ops
from iocp_loop.operations import DONE, IN_FLIGHT, NEW, Completion, fileno, readable_view, writable_view


@pytest.fixture
def sock() -> Iterator[socket.socket]:
    with socket.socket() as sock:
        yield sock


# -- handles ---------------------------------------------------------------------------------------


def test_fileno_of_a_number_and_of_an_object(sock: socket.socket) -> None:
    assert fileno(7) == 7
    assert fileno(sock) == sock.fileno()


def test_fileno_of_a_closed_socket_tells_that_it_is_closed(sock: socket.socket) -> None:
    sock.close()
    with pytest.raises(ValueError, match="closed"):
        fileno(sock)


def test_fileno_of_something_else_names_it() -> None:
    with pytest.raises(ValueError, match="Invalid file object"):
        fileno("3")  # type: ignore[arg-type]  # that is the test


def test_an_operation_on_a_closed_socket_cannot_be_made(sock: socket.socket) -> None:
    sock.close()
    with pytest.raises(ValueError, match="closed"):
        ops.Receive(sock, 1)


# -- the life of an operation ----------------------------------------------------------------------


def test_a_new_operation_is_not_in_flight(sock: socket.socket) -> None:
    op = ops.Receive(sock, 10)
    assert op.state is NEW
    assert not op.in_flight
    assert op.complete(b"", None) is None  # nobody listens yet, and that is no error


@pytest.mark.parametrize(
    ("state", "in_flight"), [(NEW, False), (IN_FLIGHT, True), (ops.CANCELLING, True), (DONE, False)]
)
def test_in_flight_is_until_the_last_completion(sock: socket.socket, state: ops.State, in_flight: bool) -> None:
    op = ops.Receive(sock, 10)
    op.state = state
    assert op.in_flight is in_flight


def test_repr_names_kind_descriptor_and_state(sock: socket.socket) -> None:
    assert repr(ops.AcceptStream(sock)) == f"<AcceptStream fd={sock.fileno()} new>"


def test_streams_are_the_kinds_with_many_completions() -> None:
    kinds = {kind for kind in vars(ops).values() if isinstance(kind, type) and issubclass(kind, ops.Operation)}
    assert {kind.__name__ for kind in kinds if kind.stream} == {
        "AcceptStream",
        "ReceiveStream",
        "ReceiveFromStream",
        "ReadinessStream",
    }


def test_operations_have_no_dict(sock: socket.socket) -> None:
    with pytest.raises(AttributeError):
        ops.Receive(sock, 1).nonsense = 1  # type: ignore[attr-defined]  # that is the test


# -- buffers ---------------------------------------------------------------------------------------


def test_views_are_flat_bytes_of_any_buffer() -> None:
    numbers = array.array("I", [1, 2, 3])
    view = readable_view(numbers)
    assert (view.format, view.ndim, view.nbytes) == ("B", 1, 3 * numbers.itemsize)
    assert view.tobytes() == numbers.tobytes()


def test_a_view_keeps_its_buffer_alive_and_in_place() -> None:
    data = bytearray(b"abc")
    view = writable_view(data)
    with pytest.raises(BufferError):
        data.append(0)
    view[0] = ord("x")
    assert data == b"xbc"


def test_a_read_only_buffer_cannot_be_received_into(sock: socket.socket) -> None:
    with pytest.raises(TypeError, match="writable"):
        ops.ReceiveInto(sock, b"abc")


def test_what_is_no_buffer_is_refused(sock: socket.socket) -> None:
    with pytest.raises(TypeError):
        ops.Send(sock, "text")


def test_a_buffer_with_gaps_is_refused() -> None:
    with pytest.raises(BufferError):
        readable_view(memoryview(b"abcdef")[::2])


# -- SendAll ---------------------------------------------------------------------------------------


def test_send_all_leaves_empty_buffers_out(sock: socket.socket) -> None:
    assert [bytes(view) for view in ops.SendAll(sock, [b"", b"ab", bytearray(), b"c"]).buffers] == [b"ab", b"c"]


def test_send_all_of_nothing_has_nothing_left(sock: socket.socket) -> None:
    assert ops.SendAll(sock, []).advance(0)


@given(st.lists(st.binary(max_size=20), max_size=8), st.lists(st.integers(0, 30), max_size=20))
def test_advance_takes_exactly_what_was_sent(buffers: list[bytes], counts: list[int]) -> None:
    whole = b"".join(buffers)
    with socket.socket() as sock:
        op = ops.SendAll(sock, buffers)
        sent = 0
        for wanted in [*counts, len(whole)]:
            count = min(wanted, len(whole) - sent)
            sent += count
            assert op.advance(count) is (sent == len(whole))
            assert op.sent == sent
            assert b"".join(op.buffers) == whole[sent:]
            assert all(view.nbytes for view in op.buffers)


# -- completions -----------------------------------------------------------------------------------


def test_result_is_the_value_or_raises_the_error() -> None:
    assert Completion(None, "key", 42).result() == 42
    error = OSError(errno.ECONNRESET, "reset")
    with pytest.raises(ConnectionResetError):
        Completion(None, None, None, error).result()


@pytest.mark.parametrize("kind", [ops.Readiness, ops.ReadinessStream])
@pytest.mark.parametrize("events", [0, 2, 64 | ops.READABLE])
def test_readiness_for_unknown_events_is_refused(sock: socket.socket, kind: type[ops.Readiness], events: int) -> None:
    with pytest.raises(ValueError, match="events"):
        kind(sock, events)
