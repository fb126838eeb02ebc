"""What is known of every shard of a split without opening its index: enough to number the samples and to tell one data
set from another.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from multidomain_cct.data.shards.index import MASK, ShardIndex, index_path, load_table, save_table
from multidomain_cct.errors import UserError

CATALOGUE_SCHEMA = "multidomain_cct.catalogue.1"
_ARRAYS = ("samples", "labelled", "shard_bytes", "shard_sha256", "index_sha256", "digests", "names")


@dataclass(frozen=True)
class Catalogue:
    """The s shards of a split, in order."""

    names: tuple[str, ...]
    """File names."""
    samples: np.ndarray  # (s,) int64
    """How many samples a shard holds."""
    labelled: np.ndarray  # (s,) int64
    """How many of them have a mask."""
    shard_bytes: np.ndarray  # (s,) int64
    shard_sha256: np.ndarray  # (s, 32) uint8
    index_sha256: np.ndarray  # (s, 32) uint8
    """Of the index file, by which an index is known for the one that was counted."""
    digests: np.ndarray  # (s, 16) uint8
    """`ShardIndex.digest`."""

    @property
    def fingerprint(self) -> str:
        """Hex digest of the keys and contents of all samples."""
        return hashlib.sha256(self.digests.tobytes()).hexdigest()[:16]

    @classmethod
    def of(
        cls, paths: Sequence[Path], *, seen: Callable[[int, ShardIndex], None] = lambda number, index: None
    ) -> Catalogue:
        """Read the index of every shard once; `seen` is shown each.

        Raises UserError when one is missing, for one that does not fit its shard, for a key that is in two shards and
        for a packing that was not finished.
        """
        rows: list[tuple[int, int, int, bytes, bytes, bytes]] = []
        hashes: list[np.ndarray] = []
        totals: set[int] = set()
        for number, path in enumerate(paths):
            index = checked_index(path)
            checksum = hashlib.sha256(index_path(path).read_bytes()).digest()
            labelled = int((index.size[:, MASK] >= 0).sum())
            rows.append(
                (
                    len(index.keys),
                    labelled,
                    index.shard_bytes,
                    bytes.fromhex(index.shard_sha256),
                    checksum,
                    index.digest,
                )
            )
            hashes.append(np.fromiter(map(hash, index.keys), dtype=np.int64, count=len(index.keys)))
            if "total" in index.notes:
                totals.add(index.notes["total"])
            seen(number, index)
        _require_different_keys(paths, hashes)
        _require_finished(paths, totals, sum(row[0] for row in rows))
        counts = np.array([row[:3] for row in rows], dtype=np.int64)
        checksums = [
            np.frombuffer(b"".join(column), dtype=np.uint8).reshape(len(rows), -1)
            for column in list(zip(*rows, strict=True))[3:]
        ]
        return cls(tuple(path.name for path in paths), *counts.T.copy(), *checksums)

    def save(self, path: Path) -> None:
        arrays = {name: getattr(self, name) for name in _ARRAYS if name != "names"}
        save_table(
            path,
            arrays | {"names": np.frombuffer("\n".join(self.names).encode(), dtype=np.uint8)},
            {"schema": CATALOGUE_SCHEMA},
        )

    @classmethod
    def load(cls, path: Path) -> Catalogue:
        """Raises UserError for a catalogue of which a byte has changed."""
        remedy = "Make it again: python -m multidomain_cct index --catalogue SHARD..."
        arrays, _ = load_table(path, _ARRAYS, CATALOGUE_SCHEMA, what="catalogue", remedy=remedy)
        names = tuple(arrays.pop("names").tobytes().decode().split("\n"))
        wrong = [name for name in names if not re.fullmatch(r"[\w+-][\w.+-]*\.tar", name)]
        if wrong:
            raise UserError(f"{path}: the catalogue lists {wrong[0][:80]!r}, which is no name of a shard. {remedy}")
        return cls(names, **arrays)


def catalogue_path(folder: Path, split: str) -> Path:
    """Where the catalogue of a split stands, if there is one. Few shards need none; many, or remote ones, do."""
    return folder / f"{split}.catalogue"


def checked_index(path: Path) -> ShardIndex:
    """The index of a shard that is there and has the size it had when it was indexed."""
    if not index_path(path).is_file():
        raise UserError(f"{path} has no index. Build it: python -m multidomain_cct index {path}")
    index = ShardIndex.load(index_path(path))
    if index.shard_bytes != path.stat().st_size:
        raise UserError(
            f"{path} has {path.stat().st_size} bytes, but its index was made for {index.shard_bytes}. Build it again: "
            f"python -m multidomain_cct index {path}"
        )
    return index


def _require_different_keys(paths: Sequence[Path], hashes: Sequence[np.ndarray]) -> None:
    """Refuse a key that is in two shards.

    Eight bytes a key are compared first, so that the keys themselves need not all be in memory.
    """
    found, counts = np.unique(np.concatenate(hashes), return_counts=True)
    suspects = set(found[counts > 1].tolist())
    if not suspects:
        return
    seen: set[str] = set()
    for path, own in zip(paths, hashes, strict=True):
        if suspects.isdisjoint(own.tolist()):
            continue
        keys = [key for key in ShardIndex.load(index_path(path)).keys if hash(key) in suspects]
        twice = seen.intersection(keys)
        if twice:
            raise UserError(
                f"{path.parent}: the key {min(twice)!r} is in more than one shard of the split. Pack or number the "
                "shards again."
            )
        seen.update(keys)


def _require_finished(paths: Sequence[Path], totals: Iterable[int], found: int) -> None:
    """Refuse the shards of a packing that was interrupted: half a data set trains as quietly as a whole one."""
    if totals and set(totals) != {found}:
        folder, split = paths[0].parent, paths[0].name.rpartition("-")[0]
        raise UserError(
            f"{folder}: the {split} shards hold {found} of {max(totals)} images; packing was interrupted, or a shard "
            "is missing. "
            f"Go on with it: python -m multidomain_cct pack {folder.name} --raw FOLDER --split {split} --out "
            f"{folder.parent}"
        )
