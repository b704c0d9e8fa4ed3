"""The tests of CPython that are expected to fail on our loop, each with its reason.

The list is strict: a listed test that passes fails the run, and so does a name that is no test on any Python.  Only a
test that CPython's own loops could not pass in our place belongs here: one that looks into a loop's private parts.
"""

from __future__ import annotations

__all__ = ["EXPECTED_FAILURES"]

#: ``Group.test_name`` -> reason.  The groups are those of suite.py.
EXPECTED_FAILURES: dict[str, str] = {}
