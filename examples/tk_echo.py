"""An echo server in a window: asyncio's loop inside that of tkinter, which keeps the main thread to itself.

    python examples/tk_echo.py [--port 8888] [--driver auto]

``loop.poll`` waits in a helper thread; ``loop.dispatch`` runs in tkinter's, between its own events.  Nothing ticks: a
program that has nothing to do sleeps, and one that has, does it at once.
"""

from __future__ import annotations

import argparse
import asyncio
import threading
import tkinter
from collections.abc import Callable

import iocp_loop


class Embedded:
    """Runs `loop` in the thread of another main loop.

    `call_there` calls a function in that thread and returns when it has run.  While this runs, that thread may use the
    loop only inside ``dispatch``, and otherwise by ``call_soon_threadsafe``.
    """

    def __init__(self, loop: iocp_loop.IocpEventLoop, call_there: Callable[[Callable[[], object]], object]) -> None:
        self._loop = loop
        self._call_there = call_there
        self._stopped: Callable[[], object] | None = None
        self._waiter = threading.Thread(target=self._wait, name="loop.poll")

    def start(self) -> None:
        self._waiter.start()

    def stop(self, stopped: Callable[[], object]) -> None:
        """Let go of the loop, then call `stopped` in the thread of the main loop, which must go on until then."""
        self._stopped = stopped
        self._loop.call_soon_threadsafe(lambda: None)  # ends the poll

    def _wait(self) -> None:
        while self._stopped is None:
            if self._loop.poll() and self._stopped is None:
                self._call_there(self._loop.dispatch)
        self._call_there(self._stopped)


class Window:
    """Shows how many connections there are, and how many messages there were."""

    def __init__(self, root: tkinter.Tk) -> None:
        self.text = tkinter.StringVar(root, "no message yet")
        self.messages = 0
        self.writers: set[asyncio.StreamWriter] = set()
        tkinter.Label(root, textvariable=self.text, padx=40, pady=20).pack()

    async def echo(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.add(writer)
        try:
            while line := await reader.readline():
                self.messages += 1
                self.text.set(f"{self.messages} messages, {len(self.writers)} connections")
                writer.write(line)
                await writer.drain()
        except ConnectionError:
            pass  # it has gone without a word
        finally:
            self.writers.remove(writer)
            writer.close()

    async def close(self, server: asyncio.Server) -> None:
        server.close()
        for writer in self.writers:
            writer.close()
        await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()})


def call_in(root: tkinter.Tk) -> Callable[[Callable[[], object]], object]:
    """A way from other threads into `root`'s: tkinter hands calls over, and waits for them."""
    names: dict[Callable[[], object], str] = {}

    def call_there(function: Callable[[], object]) -> None:
        if function not in names:
            names[function] = root.register(function)
        root.tk.call(names[function])

    return call_there


def main() -> None:
    parser = argparse.ArgumentParser(description="An echo server in a window.")
    parser.add_argument("--port", type=int, default=8888)
    parser.add_argument("--driver", default=None)
    options = parser.parse_args()
    root = tkinter.Tk()
    root.title("echo")
    loop = iocp_loop.new_event_loop(options.driver)
    window = Window(root)
    server = loop.run_until_complete(
        asyncio.start_server(window.echo, "127.0.0.1", options.port)  # before the main loop begins
    )
    print(f"listening on 127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    embedded = Embedded(loop, call_in(root))
    root.protocol("WM_DELETE_WINDOW", lambda: embedded.stop(root.quit))
    embedded.start()
    root.mainloop()
    # The loop is an ordinary one again.
    loop.run_until_complete(window.close(server))
    loop.close()
    root.destroy()


if __name__ == "__main__":
    main()
