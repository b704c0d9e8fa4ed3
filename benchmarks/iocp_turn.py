"""What driver iocp's turn costs by itself, on either tier: without Windows, hence without Wine.

Run it with Windows Python::

    make test-windows ARGS="--run -m benchmarks.iocp_turn"

The port's batch is filled by hand, and a function that does nothing stands for iocp_wait and for iocp_receive. So
the clock sees what the driver itself does for each message: the wait, the search for the operation, the bytes
object, the call of the receiver, and the preparation of the next receive; nothing of Wine, whose time says nothing
of Windows. Both tiers are measured in turn, in processes of their own.
"""

from __future__ import annotations

import operator
import os
import socket
import statistics
import subprocess
import sys
import time
from typing import Any

from iocp_loop import native
from iocp_loop import operations as ops
from iocp_loop.ports.iocp import turns as iocp_turns
from iocp_loop.ports.iocp.binding import ffi, lib
from iocp_loop.ports.iocp.driver import IocpDriver

SIZE = 1024
STREAMS = 100
TURNS = 2000
ROUNDS = 9


def put_nothing_in_the_place_of_windows() -> None:
    """A function of the binding that returns 0, for any arguments: "no error", and "the kernel has it"."""
    assert lib.iocp_has_wait_packets() == 0, "this wants a system without wait completion packets: Wine"
    nothing = ffi.addressof(lib.library, "iocp_has_wait_packets")
    lib.iocp_wait = ffi.cast("long (*)(iocp_port *, long long)", nothing)
    lib.iocp_receive = ffi.cast("long (*)(uintptr_t, iocp_submission *, void *, unsigned long)", nothing)
    if native.hot is not None:
        functions: Any = iocp_turns
        functions._FUNCTIONS[:] = [int(ffi.cast("uintptr_t", nothing))] * 2


def time_of_a_message() -> float:
    """In nanoseconds."""
    put_nothing_in_the_place_of_windows()
    driver = IocpDriver()
    entries: list[int] = []
    pairs = [socket.socketpair() for _ in range(STREAMS)]
    for ours, _ in pairs:
        op: Any = ops.ReceiveStream(ours)
        op.complete = operator.is_  # of two arguments, and done at once
        driver.submit(op)
        driver._associations[op.fd].skips = False  # so that a receive that is "done" is one that is under way
        sub = op.driver_data
        driver._outstanding[sub.address] = sub
        sub.slot = driver._slots.take()
        entries += [sub.address, SIZE, 0]
    driver._at_once.clear()
    port = driver._port
    batch = ffi.cast("char *", port.batch)
    filled = ffi.new("uintptr_t[]", entries)
    size = ffi.sizeof(filled)
    spent = 0
    for _ in range(TURNS):
        ffi.memmove(batch, filled, size)
        port.count = STREAMS
        begun = time.perf_counter_ns()
        driver.wait(0)
        driver.dispatch()
        spent += time.perf_counter_ns() - begun
    assert driver.completions == TURNS * STREAMS
    os.write(1, b"%.0f\n" % (spent / driver.completions))
    os._exit(0)  # nothing of this is fit to be closed


def main() -> None:
    if sys.argv[1:] == ["one"]:
        time_of_a_message()
    times: dict[str, list[float]] = {"1": [], "0": []}
    for _ in range(ROUNDS):
        for tier, each in times.items():
            command = [sys.executable, "-m", "benchmarks.iocp_turn", "one"]
            answer = subprocess.run(
                command, env={**os.environ, "IOCP_LOOP_NATIVE": tier}, capture_output=True, text=True, check=True
            )
            each.append(float(answer.stdout))
    ratios = sorted(plain / quick for quick, plain in zip(times["1"], times["0"], strict=True))
    print(f"native tier: {statistics.median(times['1']):.0f} ns for each message")
    print(f"Python tier: {statistics.median(times['0']):.0f} ns")
    print(f"ratio: {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
