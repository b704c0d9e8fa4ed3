"""What asyncio's debug mode sees of callbacks that no Handle carries, and where transports were made.

Drivers call transports, and transports call protocols, without a Handle between.  BaseEventLoop measures Handles; in
debug mode each of these direct calls is measured here, and reported in the same words.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import reprlib
import sys
import traceback
from collections.abc import Callable
from typing import Any

__all__ = ["DebugContext", "context_for", "unclosed"]

_logger = logging.getLogger("asyncio")

#: How many frames of the stack are kept with an object.
_DEPTH = 12


class DebugContext:
    """Stands in for a :class:`contextvars.Context` in debug mode: measures what it runs, knows where it was made."""

    __slots__ = ("_context", "_loop", "stack")

    def __init__(
        self, loop: asyncio.AbstractEventLoop, context: contextvars.Context, stack: traceback.StackSummary
    ) -> None:
        self._loop = loop
        self._context = context
        self.stack = stack

    def copy(self) -> DebugContext:
        """As :meth:`contextvars.Context.copy`."""
        return DebugContext(self._loop, self._context.copy(), self.stack)

    def run(self, callback: Callable[..., Any], *args: Any) -> Any:
        """Call ``callback(*args)`` in the context; one that takes ``slow_callback_duration`` or longer is logged."""
        start = self._loop.time()
        try:
            return self._context.run(callback, *args)
        finally:
            duration = self._loop.time() - start
            if duration >= self._loop.slow_callback_duration:
                # Arguments can be megabytes of data: reprlib shortens them.
                arguments = ", ".join(map(reprlib.repr, args))
                _logger.warning("Executing %r(%s) took %.3f seconds", callback, arguments, duration)


def context_for(
    loop: asyncio.AbstractEventLoop, context: contextvars.Context | None = None, depth: int = 2
) -> contextvars.Context | DebugContext:
    """The context in which an object that the caller makes is to call its protocol.

    None: a copy of the current one; so does the Handle of a reader in asyncio's own loops.  Whoever makes the object
    is `depth` frames above.
    """
    if context is None:
        context = contextvars.copy_context()
    if not loop.get_debug():
        return context
    stack = traceback.StackSummary.extract(traceback.walk_stack(sys._getframe(depth)), limit=_DEPTH, lookup_lines=False)
    stack.reverse()
    return DebugContext(loop, context, stack)


def unclosed(what: object, context: contextvars.Context | DebugContext) -> str:
    """The text of the ResourceWarning about `what`, which nobody closed; in debug mode with where it was made."""
    text = f"unclosed transport {what!r}"
    if isinstance(context, DebugContext):
        made = "".join(traceback.format_list(context.stack)).rstrip()
        text += f"\nObject created at (most recent call last):\n{made}"
    return text
