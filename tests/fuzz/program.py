"""What programs are made of: choices that follow from a seed, and bytes that tell where they belong."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from typing import TypeVar

__all__ = ["Source", "digest", "pattern"]

_T = TypeVar("_T")


class Source:
    """Choices that follow from `key`, the same on every version of Python."""

    def __init__(self, *key: object) -> None:
        self._key = key
        # Only random() is promised to stay as it is from version to version.
        self._next = random.Random("/".join(map(str, key))).random

    def sub(self, *key: object) -> Source:
        """A source of its own for a part of the program: what it is asked changes nothing for the rest."""
        return Source(*self._key, *key)

    def below(self, limit: int) -> int:
        """A number from 0 to `limit` - 1."""
        return int(self._next() * limit)

    def between(self, least: int, most: int) -> int:
        """A number from `least` to `most`, both included."""
        return least + self.below(most - least + 1)

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self._next() < probability

    def pick(self, choices: Sequence[_T]) -> _T:
        """One of `choices`."""
        return choices[self.below(len(choices))]

    def weighted(self, choices: Sequence[tuple[float, _T]]) -> _T:
        """One of `choices`, each given with its weight."""
        rest = self._next() * sum(weight for weight, _ in choices)
        for weight, choice in choices:
            rest -= weight
            if rest < 0:
                return choice
        return choices[-1][1]

    def several(self, make: Callable[[], _T], least: int, most: int) -> list[_T]:
        """From `least` to `most` things that `make` makes."""
        return [make() for _ in range(self.between(least, most))]


#: Bytes; a prime, so that no piece of a usual size repeats what came before it.
_PERIOD = 1_048_573
_BYTES = hashlib.shake_128(b"iocp_loop").digest(_PERIOD) * 2


def pattern(position: int, count: int) -> bytes:
    """The `count` bytes from `position` on of an endless stream in which every place looks different."""
    begin = position % _PERIOD
    if count <= _PERIOD:
        return _BYTES[begin : begin + count]
    whole, rest = divmod(count, _PERIOD)
    return _BYTES[begin : begin + _PERIOD] * whole + _BYTES[begin : begin + rest]


def digest(data: bytes | bytearray) -> str:
    """A short name for `data`, for notes."""
    return f"{len(data)} bytes {hashlib.sha256(data).hexdigest()[:12]}"
