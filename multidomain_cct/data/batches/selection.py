"""Which samples of a split a stream uses, without listing them where a rule will do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from multidomain_cct.data.shards.reader import Shards


@dataclass(frozen=True)
class Only:
    """These samples of a source."""

    source: int
    numbers: np.ndarray  # (m,) int64, ascending

    def __len__(self) -> int:
        return len(self.numbers)

    def at(self, position: int) -> int:
        """The sample number at a position."""
        return int(self.numbers[position])

    def up_to(self, ends: np.ndarray) -> np.ndarray:
        """How many of the samples lie below each of these numbers."""
        counts: np.ndarray = np.searchsorted(self.numbers, ends)
        return counts


@dataclass(frozen=True)
class AllBut:
    """All samples of a source except these."""

    source: int
    total: int
    left_out: np.ndarray  # (m,) int64, ascending

    def __len__(self) -> int:
        return self.total - len(self.left_out)

    def at(self, position: int) -> int:
        # left_out[j] - j samples that are used lie below the j-th that is not.
        below, above = 0, len(self.left_out)
        while below < above:
            middle = (below + above) // 2
            if int(self.left_out[middle]) - middle <= position:
                below = middle + 1
            else:
                above = middle
        return position + below

    def up_to(self, ends: np.ndarray) -> np.ndarray:
        counts: np.ndarray = ends - np.searchsorted(self.left_out, ends)
        return counts


class Selection(Sequence[tuple[int, int]]):
    """(source, sample number) of the samples that a stream uses, in the order of the shards."""

    def __init__(self, parts: Iterable[Only | AllBut] = ()) -> None:
        self.parts = tuple(part for part in parts if len(part))
        self._ends = np.cumsum([len(part) for part in self.parts], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.parts else 0

    def __getitem__(self, position: Any) -> Any:
        if not 0 <= position < len(self):
            raise IndexError(position)
        which = int(np.searchsorted(self._ends, position, side="right"))
        part = self.parts[which]
        return part.source, part.at(int(position - self._ends[which]) + len(part))

    def shard_ends(self, sources: Sequence[Shards]) -> np.ndarray:
        """(s,) int64: how many of the samples come before the end of each shard."""
        before = self._ends - [len(part) for part in self.parts]
        return np.concatenate(
            [start + part.up_to(sources[part.source].ends) for start, part in zip(before, self.parts, strict=True)]
        )
