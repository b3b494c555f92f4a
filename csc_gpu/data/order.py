"""The order of names, so that a corpus is numbered alike on every machine."""

from __future__ import annotations

import re
from collections.abc import Iterable

_NUMBERS = re.compile(r"([0-9]+)")


def natural(name: str) -> tuple[list[str | int], str]:
    """A key to sort by that puts 9.png before 10.png."""
    pieces: list[str | int] = list(_NUMBERS.split(name))
    pieces[1::2] = [int(piece) for piece in pieces[1::2]]
    return pieces, name  # the name itself orders 01.png and 1.png


def class_order(names: Iterable[str]) -> tuple[str, ...]:
    """The distinct names sorted, by their value if all are numbers. C"""
    distinct = sorted(set(names))
    if all(name.isdecimal() for name in distinct):
        distinct.sort(key=int)
    return tuple(distinct)
