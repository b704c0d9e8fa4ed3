"""How many descriptors a process may open: as many as it is allowed, for thousands of connections."""

from __future__ import annotations

import sys

__all__ = ["raise_descriptor_limit"]


def raise_descriptor_limit() -> None:
    """Raise the soft limit of this process to its hard limit.  Windows has none."""
    if sys.platform != "win32":
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
