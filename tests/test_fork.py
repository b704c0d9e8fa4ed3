"""A loop in a forked child: what it has inherited closes, runs on, and leaves the parent alone."""

from __future__ import annotations

import os
import sys

import pytest

from .support import run_python

if sys.platform == "win32":
    pytest.skip("Windows has no fork", allow_module_level=True)

#: What each program begins with: the loop, and how a child ends.
PRELUDE = """
import asyncio, os, signal, socket, sys, time, warnings
warnings.simplefilter("ignore")  # of fork beside threads, and of what a child leaves behind
import iocp_loop

loop = iocp_loop.new_event_loop(sys.argv[1])


def in_child(work):
    '''Run `work` in a forked child; its exit status, 0 if all went well.'''
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        work()
        os._exit(0)
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(1)


async def echo(reader, writer):
    while data := await reader.read(100):
        writer.write(data)
    writer.close()


async def ask(address, data=b"ping"):
    reader, writer = await asyncio.open_connection(*address)
    writer.write(data)
    answer = await asyncio.wait_for(reader.read(100), 10)
    writer.close()
    return answer
"""


def run(driver: str, code: str) -> None:
    run_python(PRELUDE + code, driver)


@pytest.mark.parametrize("moment", ["before the first run", "after a run"])
def test_a_loop_made_before_the_fork_runs_in_the_child(driver: str, moment: str) -> None:
    early = "loop.run_until_complete(asyncio.sleep(0))" if moment == "after a run" else ""
    run(
        driver,
        f"""
{early}
server = loop.run_until_complete(asyncio.start_server(echo, "127.0.0.1", 0))
address = server.sockets[0].getsockname()
pid = os.fork()
if not pid:
    try:
        loop.add_signal_handler(signal.SIGTERM, loop.stop)
        loop.run_forever()
        os._exit(7)
    finally:
        os._exit(1)
assert asyncio.run(ask(address)) == b"ping"
os.kill(pid, signal.SIGTERM)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
# The parent's loop is as it was.
assert loop.run_until_complete(ask(address)) == b"ping"
server.close()
loop.run_until_complete(asyncio.sleep(0))
loop.close()
""",
    )


def test_what_waits_goes_on_in_a_child_that_runs_the_loop(driver: str) -> None:
    run(
        driver,
        """
pairs = [socket.socketpair() for _ in range(3)]
for ours, _ in pairs:
    ours.setblocking(False)


async def main():
    got = []
    received = asyncio.ensure_future(loop.sock_recv(pairs[0][0], 10))
    loop.add_reader(pairs[1][0], lambda: got.append(pairs[1][0].recv(10)))

    class Protocol(asyncio.Protocol):
        def data_received(self, data):
            got.append(data)

    transport, _ = await loop.create_connection(Protocol, sock=pairs[2][0])
    await asyncio.sleep(0.01)
    return received, got, transport


received, got, transport = loop.run_until_complete(main())


async def see():
    for n, (_, peer) in enumerate(pairs):
        peer.send(b"%d" % n)
    assert await asyncio.wait_for(received, 10) == b"0"
    while len(got) < 2:
        await asyncio.sleep(0.001)
    assert sorted(got) == [b"1", b"2"], got


assert in_child(lambda: loop.run_until_complete(see())) == 0
assert not received.done() and not got
loop.run_until_complete(see())
loop.remove_reader(pairs[1][0])
transport.close()
loop.run_until_complete(asyncio.sleep(0.01))
loop.close()
""",
    )


@pytest.mark.parametrize(
    "action",
    [
        "writer.close()",
        "writer.transport.abort()",
        "writer.transport.pause_reading()",
        "writer.write(b'')",
        "server.close()",
        "task.cancel()",
        "loop.remove_reader(b)",
        "datagrams.close()",
        "pipe.close()",
        "loop.close()",
    ],
)
def test_inherited_objects_close_in_the_child(driver: str, action: str) -> None:
    run(
        driver,
        f"""
async def main():
    global server, writer, task, b, datagrams, pipe
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    address = server.sockets[0].getsockname()
    reader, writer = await asyncio.open_connection(*address)
    a, b = socket.socketpair()
    a.setblocking(False)
    task = asyncio.ensure_future(loop.sock_recv(a, 10))
    loop.add_reader(b, int)
    datagrams, _ = await loop.create_datagram_endpoint(asyncio.DatagramProtocol, local_addr=("127.0.0.1", 0))
    readable, writable = os.pipe()
    pipe, _ = await loop.connect_read_pipe(asyncio.Protocol, os.fdopen(readable, "rb"))
    await asyncio.sleep(0.01)
    {"" if action == "loop.close()" else f"assert in_child(lambda: {action}) == 0"}
    # Nothing of the parent's has changed.
    writer.write(b"still there")
    assert await asyncio.wait_for(reader.read(100), 10) == b"still there"
    assert await ask(address) == b"ping"
    os.write(writable, b"x")


loop.run_until_complete(main())
{f"assert in_child(lambda: {action}) == 0" if action == "loop.close()" else ""}
os._exit(0)
""",
    )


def test_a_child_that_forks_in_a_callback_comes_back_to_the_loop(driver: str) -> None:
    run(
        driver,
        """
ours, peer = socket.socketpair()
ours.setblocking(False)


async def main():
    peer.send(b"one")
    assert await loop.sock_recv(ours, 10) == b"one"
    waiting = asyncio.ensure_future(loop.sock_recv(ours, 10))
    await asyncio.sleep(0.01)
    pid = os.fork()
    if pid:
        status = os.waitpid(pid, 0)  # the loop rests meanwhile: it would take what the child sends to itself
        assert os.waitstatus_to_exitcode(status[1]) == 0
        await asyncio.sleep(0.01)
        assert not waiting.done()
    else:
        asyncio._set_running_loop(loop)  # asyncio knows of none in such a child, and Tasks want one since Python 3.14
    peer.send(b"two")
    assert await waiting == b"two"
    if not pid:
        os._exit(0)
    await asyncio.sleep(0.01)


loop.run_until_complete(main())
loop.close()
""",
    )


def test_none_of_a_childs_own_descriptors_is_closed(driver: str) -> None:
    run(
        driver,
        """
loop.run_until_complete(asyncio.sleep(0))


def work():
    mine = [os.open("/dev/null", os.O_RDONLY) for _ in range(20)]
    loop.run_until_complete(asyncio.sleep(0.001))
    loop.close()
    for fd in mine:
        os.close(fd)


assert in_child(work) == 0
loop.run_until_complete(asyncio.sleep(0.001))
loop.close()
""",
    )


def test_a_completion_port_goes_on_in_the_child(driver: str) -> None:
    run(
        driver,
        """
from iocp_loop import CompletionPort, operations as ops

for concurrency in (0, 1):
    port = CompletionPort(concurrency, driver=sys.argv[1])
    ours, peer = socket.socketpair()
    port.register(ours, "key")
    port.submit(ops.Receive(ours, 10))
    assert port.get(0.01) is None

    def work():
        peer.send(b"child")
        completion = port.get(10)
        assert completion.key == "key" and completion.value == b"child"
        port.close()

    assert in_child(work) == 0
    peer.send(b"parent")
    assert port.get(10).value == b"parent"
    port.close()
""",
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_waking_in_the_child_does_not_wake_the_parent(driver: str) -> None:
    run(
        driver,
        """
driver = loop._proactor.driver
loop.run_until_complete(asyncio.sleep(0.001))
before = driver.wakes


def work():
    import threading
    done = loop.create_future()
    threading.Timer(0.05, lambda: loop.call_soon_threadsafe(done.set_result, None)).start()
    loop.run_until_complete(asyncio.wait_for(done, 10))
    assert driver.wakes > before


assert in_child(work) == 0
driver.wait(0.05)  # the parent's own waker was not touched: nothing ends this early but the time
assert not driver.gathered
loop.close()
""",
    )
