"""Which samples a stream uses: budgets of labelled images by key, and parts of a split by rule, not as lists."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from multidomain_cct.data.shards.reader import Shards
from multidomain_cct.errors import UserError
from multidomain_cct.files.seeds import seed_from


def labelled_subset(
    keys: Sequence[str],
    budget: str,
    *,
    seed: int,
    where: str,
    first: Callable[[list[str], int], list[str]] | None = None,
) -> list[str]:
    """The keys whose labels may be used.

    `budget` is a number, a fraction such as 1/16, `all`, or a text file with one key a line. Of a number, they are the
    first ones of a pseudo-random order that depends on keys and seed alone, not on shards or listing; or those that
    `first(keys in that order, number)` gives. Smaller budgets lie inside larger ones. Raises UserError, starting with
    `where`, for a budget that cannot be met.
    """
    if budget == "all":
        return sorted(keys)
    parts = budget.split("/")
    if len(parts) > 2 or not all(part.isascii() and part.isdigit() for part in parts):
        return _listed_keys(keys, Path(budget), where)
    count = int(parts[0])
    if len(parts) == 2:
        if not 0 < count <= int(parts[1]):
            raise UserError(f"{where} is {budget}; a share lies above 0 and is at most 1.")
        count = max(1, round(len(keys) * count / int(parts[1])))
    if count > len(keys):
        raise UserError(
            f"{where} asks for {count} labelled images; there are {len(keys)}. Ask for at most {len(keys)}, or `all`."
        )
    ordered = sorted(keys, key=lambda key: (seed_from(seed, key, "budget"), key))
    return first(ordered, count) if first else ordered[:count]


def _listed_keys(keys: Sequence[str], path: Path, where: str) -> list[str]:
    if not path.is_file():
        raise UserError(
            f"{where} is {str(path)!r}; it is a number, a share such as 1/16, `all`, or a text file with one key a "
            "line."
        )
    try:
        listed = {line.strip() for line in path.read_text(encoding="utf-8").splitlines()} - {""}
    except UnicodeDecodeError:
        raise UserError(f"{where}: {path} is not text in UTF-8; it is a text file with one key a line.") from None
    if not listed:
        raise UserError(f"{where}: {path} lists no keys.")
    if unknown := listed.difference(keys):
        raise UserError(
            f"{where}: {path} lists the key {min(unknown)!r}, which is not among the {len(keys)} labelled images."
        )
    return sorted(listed)


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
        return position + bisect_right(range(len(self.left_out)), position, key=lambda j: int(self.left_out[j]) - j)

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
        starts = self._ends - [len(part) for part in self.parts]
        return np.concatenate(
            [start + part.up_to(sources[part.source].ends) for start, part in zip(starts, self.parts, strict=True)]
        )
