"""Rows of arrays that have something in common: numbered, counted, found. Pure: no torch."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sp_backend.columns import Index


def classes(codes: NDArray[Any]) -> tuple[Index, Index]:
    """The distinct values (at least 0), ascending, and for each code the index of its value."""
    most = int(codes.max(initial=0)) + 1
    if most > 8 * len(codes) + 1024:
        order = np.argsort(codes, kind="stable")
        new = np.diff(codes[order], prepend=-1) > 0
        index = np.empty(len(codes), np.intp)
        index[order] = np.cumsum(new) - 1
        return codes[order][new], index
    there = np.zeros(most, bool)
    there[codes] = True
    return np.flatnonzero(there), (np.cumsum(there, dtype=np.int32) - 1)[codes]


def last_of_each(number: Index) -> Index:
    """[classes]: its last row."""
    last = np.zeros(int(number.max(initial=-1)) + 1, np.intp)
    last[number] = np.arange(len(number))
    return last


def first_of_each(number: Index) -> Index:
    """[classes]: its first row."""
    return len(number) - 1 - last_of_each(number[::-1])


def place_in_run(ascending: NDArray[Any]) -> Index:
    """For each row how many before it have the same value."""
    starts = run_starts(ascending)
    return np.arange(len(ascending)) - np.repeat(starts, np.diff(np.append(starts, len(ascending))))


def run_starts(ascending: NDArray[Any]) -> Index:
    """The first row of each value (at least 0)."""
    return np.flatnonzero(np.diff(ascending, prepend=-1))


def bounds(rounds: Index, number: int) -> list[tuple[int, int]]:
    """The rows of each of so many rounds, which ascend."""
    return list(pairwise(np.searchsorted(rounds, np.arange(number + 1)).tolist()))
