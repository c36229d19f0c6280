"""Finds what repeats in a list of layers, so that it is compiled once."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple


class Repeat(NamedTuple):
    """Layers start ... stop - 1: `length` layers, `count` times over."""

    start: int
    length: int
    count: int

    @property
    def stop(self) -> int:
        return self.start + self.length * self.count

    @property
    def places(self) -> list[range]:
        """For each layer of the unit the layers it stands for."""
        return [range(self.start + n, self.stop, self.length) for n in range(self.length)]


def find_repeats(keys: Sequence[Hashable], most: int = 16) -> list[Repeat]:
    """Divides layers into repeats of repeated units so that the units, which are what is compiled, are shortest together.

    `* GKA * GKA * GKA GKA GKA` is two layers three times and one twice. Of equal ones the one with fewer repeats.

    Args:
      keys: equal for layers that share a program.
      most: layers a unit may have.
    """
    n = len(keys)
    best: list[tuple[int, int, list[Repeat]]] = [(0, 0, [])]
    for stop in range(1, n + 1):
        options = []
        for length in range(1, min(most, stop) + 1):
            count = 1
            while True:
                start = stop - length * count
                if start < 0 or tuple(keys[start : start + length]) != tuple(keys[stop - length : stop]):
                    break
                size, repeats, division = best[start]
                options.append((size + length, repeats + 1, [*division, Repeat(start, length, count)]))
                count += 1
        best.append(min(options, key=lambda o: o[:2]))
    return best[n][2]
