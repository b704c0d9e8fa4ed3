"""``python -m iocp_loop``, also ``iocp-loop``: the doctor; with ``run`` in front, a program on this loop."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> int:
    """The program; its exit code."""
    arguments = sys.argv[1:]
    # Only what is asked for is imported: what is run should not wait for the doctor.
    if arguments[:1] == ["run"]:
        from . import launch

        return launch.main(arguments[1:])
    from . import doctor

    return doctor.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
