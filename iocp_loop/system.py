"""The module behind ``os``, for the calls on files that the loop makes itself, as asyncio's own loops make them.

Tools that look for blocking calls in coroutines (blockbuster) put functions of theirs into ``os``, and know by file and
function which of asyncio's calls to let pass.  They can't know ours; ours do not go by way of ``os``.
"""

from __future__ import annotations

import socket
import sys

if sys.platform == "win32":
    import nt as system
else:
    import posix as system

__all__ = ["NONBLOCKING", "system"]

#: Beside the type of a new socket: it is non-blocking from the start.  0 where the system has no such flag.
NONBLOCKING: int = getattr(socket, "SOCK_NONBLOCK", 0)
