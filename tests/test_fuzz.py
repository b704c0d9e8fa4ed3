"""The fuzzers of tests/fuzz: a few programs of each family, and that they find what is wrong."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections import defaultdict

import pytest

from .fuzz import FAMILIES
from .fuzz.program import Source, pattern

if not hasattr(os, "fork"):
    pytest.skip("each program is played in a forked child", allow_module_level=True)

if sys.version_info[:3] == (3, 13, 0):
    pytest.skip("this CPython takes a nested run that it refuses for the end of the outer one", allow_module_level=True)

from .fuzz import faults
from .fuzz.__main__ import main

#: The seeds that are played of each family; those that once found something are named beside it.
SEEDS: defaultdict[str, list[int]] = defaultdict(lambda: [1, 2, 3])
SEEDS["callbacks"] += [3674836]  # how much the kernel takes of a flood
SEEDS["tls"] += [3674828]  # a protocol replaced just before connection_lost
SEEDS["sockets"] += [910003, 920001]  # one of several receivers, given up as it is served
SEEDS["datagrams"] += [920003]  # error_received sends
SEEDS["forks"] += [3674828]  # a child that inherits the task of another fork


#: In newer Pythons asyncio's own loop has faults of its own in some of these programs, other ones in each release.
LOOPS = "{},stock" if sys.version_info < (3, 12) else "{}"


@pytest.mark.parametrize("family", [family.name for family in FAMILIES])
def test_programs_of_each_family(driver: str, family: str, capsys: pytest.CaptureFixture[str]) -> None:
    if family == "faults" and faults.why_not():
        pytest.skip(faults.why_not())
    for seed in SEEDS[family]:
        status = main(["--loops", LOOPS.format(driver), "--tier", "auto", "--seed", str(seed), "--count", "1", family])
        assert status == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    ("fault", "family", "words"),
    [
        ("drops_a_byte", "transports", r"wrong bytes at|the end came after"),
        ("calls_twice", "callbacks", r"connection_lost twice"),
        ("leaks", "callbacks", r"descriptors left open: \['/dev/null'\]"),
        ("reports", "callbacks", r"the exception handler was told 'a planted fault'"),
        ("ends", "callbacks", r"out of the loop: SystemExit"),
        ("differs", "callbacks", r"stock: .*reading=False"),
        ("crashes", "callbacks", r"was ended by SIGABRT"),
    ],
)
def test_a_planted_fault_is_found(fault: str, family: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    loops = f"tests.fuzz.planted:{fault}" + (",stock" if fault == "differs" else "")
    assert main(["--loops", loops, "--tier", "auto", "--seed", "1", "--count", "1", family]) == 1
    found = capsys.readouterr().out
    assert re.search(words, found), found
    # The command that repeats it does.
    command = re.search(r"repeat: python -m tests\.fuzz (.*)", found)
    assert command is not None
    assert main(shlex.split(command[1])) == 1
    assert re.search(words, capsys.readouterr().out)


def test_a_program_that_hangs_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    loops = "tests.fuzz.planted:hangs"
    assert main(["--loops", loops, "--tier", "auto", "--seed", "1", "--count", "1", "--limit", "1", "callbacks"]) == 1
    found = capsys.readouterr().out
    assert "has not ended within 1 s" in found
    assert "planted.py" in found  # where it hangs


def test_a_seed_is_a_program() -> None:
    for family in FAMILIES:
        programs = [family.make(Source(family.name, seed)) for seed in (1, 1, 2)]
        assert programs[0] == programs[1]
        assert programs[0] != programs[2]


def test_the_pattern_is_one_stream() -> None:
    whole = pattern(0, 3_000_000)
    assert len(whole) == 3_000_000
    for position, count in ((0, 0), (5, 7), (1_048_570, 10), (1, 2_500_000)):
        assert pattern(position, count) == whole[position : position + count]
