"""Which samples a stream uses: parts of splits by rule, not as lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from multidomain_cct.data.shards.reader import Shards

_NONE = np.empty((0, 3), dtype=np.int64)


class Selection(Sequence[tuple[int, int]]):
    """(source, sample number) of some samples, in the order of the shards.

    It holds runs of consecutive numbers: all samples but a few take no room.
    """

    def __init__(self, runs: np.ndarray = _NONE) -> None:
        """`runs`: (r, 3) int64, the source of each run, its first number, and the number at which it ends."""
        self._runs = runs
        self._ends = np.cumsum(runs[:, 2] - runs[:, 1])

    @classmethod
    def of(cls, source: int, numbers: Sequence[int] | np.ndarray) -> Selection:
        """These samples of a source, in ascending order."""
        ascending = np.asarray(numbers, dtype=np.int64)
        starts = ascending[np.diff(ascending, prepend=-2) > 1]
        stops = ascending[np.diff(ascending[::-1], prepend=np.iinfo(np.int64).max)[::-1] < -1] + 1
        return cls(np.stack([np.full_like(starts, source), starts, stops], axis=1))

    @classmethod
    def all_but(cls, source: int, total: int, left_out: Selection | None = None) -> Selection:
        """All samples of a source except some of them."""
        inner = (left_out or cls())._runs[:, 1:].ravel()
        gaps = np.concatenate([[0], inner, [total]]).reshape(-1, 2)
        return cls(np.insert(gaps[gaps[:, 0] < gaps[:, 1]], 0, source, axis=1))

    def __add__(self, other: Selection) -> Selection:
        """The samples of both, which are of different sources."""
        return Selection(np.concatenate([self._runs, other._runs]))

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._runs) else 0

    def __getitem__(self, position: Any) -> Any:
        if not 0 <= position < len(self):
            raise IndexError(position)
        run = int(np.searchsorted(self._ends, position, side="right"))
        source, _, stop = self._runs[run].tolist()
        return source, stop - int(self._ends[run]) + int(position)

    def shard_ends(self, sources: Sequence[Shards]) -> np.ndarray:
        """(s,) int64: how many of the samples come before the end of each shard."""
        ends, before = [np.empty(0, dtype=np.int64)], 0
        for source in dict.fromkeys(self._runs[:, 0].tolist()):
            runs = self._runs[self._runs[:, 0] == source, 1:]
            counts = np.cumsum(np.diff(runs, prepend=0, axis=1) * [0, 1])  # at the start and at the end of each run
            ends.append(before + np.interp(sources[source].ends, runs.ravel(), counts).astype(np.int64))
            before += int(counts[-1])
        return np.concatenate(ends)
