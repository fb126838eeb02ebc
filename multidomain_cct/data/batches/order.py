"""Which sample is at which position: pure arithmetic, no state.

A stream (the labelled or the unlabelled images of a domain) is an endless sequence of positions. Position p is in epoch
p // n at offset p % n, and each epoch is its own permutation of the n samples. The step determines all its positions,
so resuming is a seek. No permutation is stored: `scatter` computes the image of one number.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from multidomain_cct.files.seeds import seed_from

_DOUBLE_ROUNDS = 6
"""Double rounds of the Feistel network. With 4, some orders of 5 samples are twice as frequent as others."""
_64_BITS = 2**64 - 1


def scatter(number: int, size: int, seed: int) -> int:
    """The image of a number under a pseudo-random permutation of 0 ... size - 1, chosen by the seed.

    A Feistel network on pairs (left, right) whose product of sizes is just above `size`. Images outside the range go
    through it again until they are inside (cycle walking), which keeps the map one to one. Black and Rogaway, Ciphers
    with arbitrary finite domains, 2002.
    """
    sides, keys = _sides(size), _round_keys(seed)
    placed: int = _through_network(number, sides, keys)
    while placed >= size:
        placed = _through_network(placed, sides, keys)
    return placed


def permutation(size: int, seed: int) -> np.ndarray:
    """(size,) int64: `scatter` of each number below size."""
    sides, keys = _sides(size), _round_keys(seed)
    placed: np.ndarray = _through_network(np.arange(size, dtype=np.uint64), sides, keys)
    while len(outside := np.flatnonzero(placed >= size)):
        placed[outside] = _through_network(placed[outside], sides, keys)
    return placed.astype(np.int64)


def _sides(size: int) -> tuple[int, int]:
    high = math.isqrt(size - 1) + 1
    return high, -(-size // high)


@lru_cache(maxsize=64)
def _round_keys(seed: int) -> tuple[tuple[int, int], ...]:
    digest = hashlib.shake_128(seed.to_bytes(8, "big")).digest(16 * _DOUBLE_ROUNDS)
    keys = [int.from_bytes(digest[start : start + 8], "big") for start in range(0, len(digest), 8)]
    return tuple(zip(keys[::2], keys[1::2], strict=True))


def _through_network(placed: Any, sides: tuple[int, int], keys: tuple[tuple[int, int], ...]) -> Any:
    """One pass, for an integer or an array of uint64."""
    high, low = sides
    left, right = placed // low, placed % low
    for even, odd in keys:
        left = (left + _mixed(right ^ even) % high) % high
        right = (right + _mixed(left ^ odd) % low) % low
    return left * low + right


def _mixed(value: Any) -> Any:
    """The last steps of splitmix64, for an integer or an array of uint64."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _64_BITS
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _64_BITS
    return value ^ value >> 31


@dataclass(frozen=True)
class Stream:
    """An endless shuffled sequence over n samples."""

    name: str
    """Part of the seed, for example `camvid/labelled`."""
    num_samples: int
    seed: int
    window: int = 0
    """0: each epoch is one permutation of all samples. K: each epoch permutes the shards, and samples only within
    windows of K shards.
    """
    shard_ends: np.ndarray | None = field(default=None, compare=False)
    """(s,) int64: the sample number at which each shard ends; the last is num_samples. Only a window needs it."""
    _plans: dict[int, tuple[np.ndarray, np.ndarray]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        assert not self.window or (self.shard_ends is not None and self.shard_ends[-1] == self.num_samples)

    def at(self, position: int) -> tuple[int, int]:
        """(epoch, sample number) at a position."""
        epoch, offset = divmod(position, self.num_samples)
        if not self.window:
            return epoch, scatter(offset, self.num_samples, seed_from(self.seed, self.name, epoch, "order"))
        shards, ends = self._plan(epoch)
        window = int(np.searchsorted(ends, offset, side="right"))
        first = int(ends[window - 1]) if window else 0
        seed = seed_from(self.seed, self.name, epoch, window, "order")
        placed = scatter(offset - first, int(ends[window]) - first, seed)
        return epoch, self._in_shards(placed, shards[window * self.window : (window + 1) * self.window])

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards of an epoch in their order, and the offset at which each of its windows ends."""
        assert self.shard_ends is not None
        if epoch not in self._plans:
            # Positions advance, so at most two epochs are in use.
            for old in sorted(self._plans)[:-1]:
                del self._plans[old]
            shards = permutation(len(self.shard_ends), seed_from(self.seed, self.name, epoch, "shards"))
            ends = np.cumsum(np.diff(self.shard_ends, prepend=0)[shards])
            self._plans[epoch] = shards, np.append(ends[self.window - 1 : -1 : self.window], ends[-1])
        return self._plans[epoch]

    def _in_shards(self, placed: int, shards: np.ndarray) -> int:
        """The sample number at a position in the concatenation of these shards."""
        assert self.shard_ends is not None
        ends = np.cumsum(self.shard_ends[shards] - np.where(shards > 0, self.shard_ends[shards - 1], 0))
        which = int(np.searchsorted(ends, placed, side="right"))
        return int(self.shard_ends[shards[which]] - ends[which]) + placed


def batch_positions(turn: int, global_batch: int, *, part: int, parts: int) -> range:
    """The positions of one of `parts` equal shares of a global batch; parts divides global_batch.

    The parts are processes and accumulated micro-batches. Together they see the same global batch in the same order,
    whatever their number.
    """
    share = global_batch // parts
    start = turn * global_batch + part * share
    return range(start, start + share)
