"""The tests of CPython that are expected to fail on our loop, each with its reason.

The list is strict: a listed test that passes fails the run, and so does a name that is no test on any Python.  Only a
test that CPython's own loops could not pass in our place belongs here: one that looks into a loop's private parts, or
that fails for want of something in the system, as some do under Wine.
"""

from __future__ import annotations

import sys

from ..support import WINE

__all__ = ["EXPECTED_FAILURES"]

#: ``Group.test_name`` -> reason.  The groups are those of suite.py.
EXPECTED_FAILURES: dict[str, str] = {}

if sys.version_info[:3] == (3, 14, 0):
    EXPECTED_FAILURES["Fork.test_fork_not_share_current_task"] = (
        "a forked child has its parent's task; mended in a later 3.14"
    )

if WINE:
    # CPython's own ProactorEventLoop fails in these there too.
    EXPECTED_FAILURES |= {
        "Subprocess.test_kill_issue43884": "under Wine CTRL_BREAK can't be sent to a process group (WinError 12)",
    }
    if sys.version_info >= (3, 14):
        EXPECTED_FAILURES["EventLoop.test_datagram_recvfrom_connection_reset_recovers"] = (
            "under Wine the answer 'port unreachable' does not reach a receive"
        )
