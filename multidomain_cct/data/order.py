"""Which sample stands at which position: pure arithmetic, no state.

A stream (the labelled or the unlabelled images of a domain) is an endless sequence of positions. Position p lies in epoch p // n at offset p % n, and each
epoch is its own permutation of the n samples. Whoever knows the step knows every position in it, so resuming is a seek.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np


def seed_from(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part and on nothing else (not on PYTHONHASHSEED, platform or library version)."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@lru_cache(maxsize=64)
def permutation(seed: int, stream: str, epoch: int, num_samples: int) -> np.ndarray:
    """(n,) int64: the order of one epoch of one stream."""
    order = np.random.default_rng(seed_from(seed, stream, epoch, "order")).permutation(num_samples)
    order.setflags(write=False)
    return order


@dataclass(frozen=True)
class Stream:
    """An endless shuffled sequence over n samples."""

    name: str
    """Part of the seed, for example `camvid/labelled`."""
    num_samples: int
    seed: int

    def at(self, position: int) -> tuple[int, int]:
        """(epoch, sample number) at a position."""
        epoch, offset = divmod(position, self.num_samples)
        return epoch, int(permutation(self.seed, self.name, epoch, self.num_samples)[offset])


def batch_positions(turn: int, global_batch: int, *, part: int, parts: int) -> range:
    """The positions that one of `parts` equal shares of the turn-th global batch holds.

    The parts are processes and accumulated micro-batches: however many there are, together they see the same global batch in the same order. The caller
    has checked that parts divides global_batch.
    """
    share = global_batch // parts
    start = turn * global_batch + part * share
    return range(start, start + share)


def labelled_subset(keys: Sequence[str], budget: str, *, seed: int, where: str) -> list[str]:
    """The keys whose labels may be used: the first n of a fixed pseudo-random order, so that smaller budgets lie inside larger ones.

    `budget` is a number, a fraction such as 1/16, `all`, or a text file with one key a line. The order hangs on the keys alone, not on shards or listing.
    Raises ValueError, starting with `where`, for a budget that cannot be met.
    """
    if budget == "all":
        return sorted(keys)
    if _is_number(budget):
        count = int(budget)
    elif budget.count("/") == 1 and all(_is_number(part) for part in budget.split("/")):
        numerator, denominator = (int(part) for part in budget.split("/"))
        if not 0 < numerator <= denominator:
            raise ValueError(f"{where} is {budget}; a share lies above 0 and is at most 1.")
        count = max(1, round(len(keys) * numerator / denominator))
    else:
        return _listed_keys(keys, Path(budget), where)
    if count > len(keys):
        raise ValueError(f"{where} asks for {count} labelled images; there are {len(keys)}. Ask for at most {len(keys)}, or `all`.")
    return sorted(keys, key=lambda key: (seed_from(seed, key, "budget"), key))[:count]


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _listed_keys(keys: Sequence[str], path: Path, where: str) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"{where} is {str(path)!r}; it is a number, a share such as 1/16, `all`, or a text file with one key a line.")
    listed = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    known = set(keys)
    for key in listed:
        if key not in known:
            raise ValueError(f"{where}: {path} lists the key {key!r}, which is not among the {len(keys)} labelled images.")
    if not listed:
        raise ValueError(f"{where}: {path} lists no keys.")
    return sorted(set(listed))
