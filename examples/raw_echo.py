"""An echo server on CompletionPort alone: no event loop, no coroutines; worker threads drain one port.

    python examples/raw_echo.py [--port 8888] [--driver auto|iocp|uring|poll] [--threads N] [--verbose]

This is the classic way to write a server for Windows I/O completion ports, and it runs on all three drivers.  It goes
in four steps, which are marked below:

    Step 1    create a completion port
    Step 2    register a socket with the port, with its data as the key
    Step 3    start I/O; when it completes, the system puts a completion on the port
    Step 4    take a completion off the port, see what it is, and start the next I/O

The main thread makes the port, starts the workers and accepts.  Any worker may take any completion of any connection.
A connection always has exactly one operation in flight: a receive, or the send that answers it.  So its bytes stay in
order whichever threads handle them; a client that does not read is not read from either; and when a receive says that
the client has finished, nothing else is under way on that socket and it can be closed.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import threading
import time
from typing import Any, cast

from iocp_loop import CompletionPort, DriverUnavailable
from iocp_loop.operations import Operation, Receive, SendAll

BUFFER_SIZE = 4096

#: The key of the completions that tell a worker to stop.
QUIT = "quit"


class Client:
    """What we know of one connection (``PER_HANDLE_DATA`` in C); the port hands it back with every completion."""

    def __init__(self, sock: socket.socket, address: Any) -> None:
        self.sock = sock
        self.address = address


def start(port: CompletionPort, client: Client, operation: Operation, clients: set[Client]) -> None:
    """Start an operation; hang up if it is refused outright."""
    try:
        port.submit(operation)
    except OSError:
        hang_up(port, client, clients)


def hang_up(port: CompletionPort, client: Client, clients: set[Client]) -> None:
    """Close a connection that has nothing in flight, and forget it."""
    port.unregister(client.sock)
    client.sock.close()
    clients.discard(client)


def echo_thread(port: CompletionPort, clients: set[Client], verbose: bool) -> None:
    """What each worker thread does (``EchoThreadMain`` in C), until it is told to stop."""
    while True:
        # Step 4: take a completion (GetQueuedCompletionStatus).  It waits here, for whatever completes next anywhere.
        completion = port.get()
        if completion is None or completion.key == QUIT:
            return
        operation, key, value, error = completion
        client = cast(Client, key)

        if error is not None:
            # The client has reset the connection, or it got lost.  That concerns nobody else.
            hang_up(port, client, clients)

        # Tell READ from WRITE.  In C a mode stands in PER_IO_DATA for this; here the class of the operation tells.
        elif isinstance(operation, Receive):
            if not value:
                # No bytes: the client has finished sending, and everything it sent has been answered.
                hang_up(port, client, clients)
            else:
                # Send back what came (WSASend).  Send alone may take only a part; SendAll completes when all is sent.
                start(port, client, SendAll(client.sock, [value]), clients)

        else:
            if verbose:
                print("message sent!", flush=True)
            # The next receive (WSARecv).  The C program starts it together with the send; the top says why not here.
            start(port, client, Receive(client.sock, BUFFER_SIZE), clients)


def accept_until(stop: threading.Event, listener: socket.socket, port: CompletionPort, clients: set[Client]) -> None:
    """What the main thread does once all is set up: accept, register, start the first receive."""
    while not stop.is_set():
        try:
            sock, address = listener.accept()
        except TimeoutError:
            continue  # nobody came: time to look at `stop`
        except OSError as error:
            # The client was gone before we came to it, or there are no descriptors left: the next one may do better.
            print(f"accept: {error}", file=sys.stderr)
            time.sleep(0.1)
            continue

        # Step 2: register the socket, with what we know of it as the key (CreateIoCompletionPort, used as it is
        # for an existing port).
        client = Client(sock, address)
        clients.add(client)
        port.register(sock, key=client)

        # Step 3: start the first receive (WSARecv).  This returns at once; a worker gets the completion.
        start(port, client, Receive(sock, BUFFER_SIZE), clients)


def main() -> None:
    parser = argparse.ArgumentParser(description="An echo server on a completion port and worker threads alone.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8888, help="0 takes a free one")
    parser.add_argument("--driver", help="auto, iocp, uring or poll (default: IOCP_LOOP_DRIVER, else auto)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="workers (default: one per processor)")
    parser.add_argument("--verbose", action="store_true", help="say so when a message was sent")
    options = parser.parse_args()

    # Ctrl-C and the like are only noted; as exceptions they could come between an accept and what follows it.
    stop = threading.Event()
    for name in ("SIGINT", "SIGTERM", "SIGBREAK"):  # the last one is Ctrl-Break, which only Windows has
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda *_: stop.set())

    try:
        # Step 1: create the port (CreateIoCompletionPort, used as it is for a new port).
        port = CompletionPort(driver=options.driver)
        listener = socket.create_server((options.host, options.port))
    except (DriverUnavailable, ValueError, OSError, OverflowError) as error:
        parser.error(str(error))
    listener.settimeout(0.2)

    clients: set[Client] = set()
    workers = [
        threading.Thread(target=echo_thread, args=(port, clients, options.verbose), name=f"echo-{number}")
        for number in range(max(1, options.threads))
    ]
    for worker in workers:
        worker.start()
    host, number = listener.getsockname()[:2]
    try:
        print(f"listening on {host}:{number} driver={port.driver}", flush=True)
        accept_until(stop, listener, port, clients)
    finally:
        # The C program never stops.  Here each worker takes one posted completion (PostQueuedCompletionStatus) and
        # ends.  Then the port cancels the receives that are still in flight; after that the sockets may be closed.
        listener.close()
        for _ in workers:
            port.post(key=QUIT)
        for worker in workers:
            worker.join()
        port.close()
        for client in clients:
            client.sock.close()
    print("stopped", flush=True)


if __name__ == "__main__":
    main()
