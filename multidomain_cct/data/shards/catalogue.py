"""The catalogue of a split: enough about each shard to number the samples and to identify the data without opening any
index.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from multidomain_cct.data.shards.index import MASK, ShardIndex, checked_index, index_path, load_table, save_table
from multidomain_cct.errors import UserError

CATALOGUE_SCHEMA = "multidomain_cct.catalogue.1"
_ARRAYS = ("samples", "labelled", "shard_bytes", "shard_sha256", "index_sha256", "digests", "names")


@dataclass(frozen=True)
class Catalogue:
    """The s shards of a split, in order."""

    names: tuple[str, ...]
    """File names."""
    samples: np.ndarray  # (s,) int64
    """Number of samples in each shard."""
    labelled: np.ndarray  # (s,) int64
    """Number of samples with a mask."""
    shard_bytes: np.ndarray  # (s,) int64
    shard_sha256: np.ndarray  # (s, 32) uint8
    index_sha256: np.ndarray  # (s, 32) uint8
    """Of the index files from which the catalogue was made."""
    digests: np.ndarray  # (s, 16) uint8
    """`ShardIndex.digest`."""

    @property
    def fingerprint(self) -> str:
        """Hex digest of the keys and contents of all samples."""
        return hashlib.sha256(self.digests.tobytes()).hexdigest()[:16]

    @classmethod
    def of(cls, paths: Sequence[Path]) -> Catalogue:
        """Read the index of every shard once.

        Raises UserError when an index is missing or does not fit its shard, when a key is in two shards, and when the
        packing was not finished.
        """
        counts: list[tuple[int, int, int]] = []
        checksums: list[tuple[bytes, bytes, bytes]] = []
        key_hashes: list[np.ndarray] = []
        totals: set[int] = set()
        for path in paths:
            index = checked_index(path)
            counts.append((len(index.keys), int((index.size[:, MASK] >= 0).sum()), index.shard_bytes))
            of_index = hashlib.sha256(index_path(path).read_bytes()).digest()
            checksums.append((bytes.fromhex(index.shard_sha256), of_index, index.digest))
            key_hashes.append(np.fromiter(map(hash, index.keys), dtype=np.int64, count=len(index.keys)))
            if "total" in index.notes:
                totals.add(index.notes["total"])
        _require_different_keys(paths, key_hashes)
        _require_finished(paths, totals, sum(samples for samples, _, _ in counts))
        return cls(
            tuple(path.name for path in paths),
            *np.array(counts, dtype=np.int64).T.copy(),
            *(
                np.frombuffer(b"".join(column), dtype=np.uint8).reshape(len(paths), -1)
                for column in zip(*checksums, strict=True)
            ),
        )

    def save(self, path: Path) -> None:
        arrays = {
            name: value if isinstance(value, np.ndarray) else np.frombuffer("\n".join(value).encode(), dtype=np.uint8)
            for name, value in vars(self).items()
        }
        save_table(path, arrays, {"schema": CATALOGUE_SCHEMA})

    @classmethod
    def load(cls, path: Path) -> Catalogue:
        """Raises UserError for a catalogue that has changed by a byte."""
        remedy = "Make it again: python -m multidomain_cct index --catalogue SHARD..."
        arrays, _ = load_table(path, _ARRAYS, CATALOGUE_SCHEMA, what="catalogue", remedy=remedy)
        names = tuple(arrays.pop("names").tobytes().decode().split("\n"))
        for name in names:
            if not re.fullmatch(r"[\w+-][\w.+-]*\.tar", name):
                raise UserError(f"{path}: the catalogue lists {name[:80]!r}, which is not a shard's name. {remedy}")
        return cls(names, **arrays)


def catalogue_path(folder: Path, split: str) -> Path:
    """The path of a split's catalogue. It is optional for a few local shards, and needed for remote ones."""
    return folder / f"{split}.catalogue"


def _require_different_keys(paths: Sequence[Path], key_hashes: Sequence[np.ndarray]) -> None:
    """Raises UserError for a key in two shards.

    Eight bytes per key are compared first, so that the keys themselves need not all be in memory.
    """
    hashes, counts = np.unique(np.concatenate(key_hashes), return_counts=True)
    suspects = set(hashes[counts > 1].tolist())
    keys = (key for path in paths if suspects for key in ShardIndex.load(index_path(path)).keys)
    if twice := [key for key, count in Counter(key for key in keys if hash(key) in suspects).items() if count > 1]:
        folder = paths[0].parent
        raise UserError(f"{folder}: the key {min(twice)!r} is in more than one shard. Pack the split again.")


def _require_finished(paths: Sequence[Path], totals: Iterable[int], count: int) -> None:
    """Raises UserError for an interrupted packing: training on half a data set would not be noticed."""
    if totals and set(totals) != {count}:
        folder, split = paths[0].parent, paths[0].name.rpartition("-")[0]
        command = f"python -m multidomain_cct pack {folder.name} --raw FOLDER --split {split} --out {folder.parent}"
        raise UserError(
            f"{folder}: the {split} shards hold {count} of {max(totals)} images; packing was interrupted, or a shard "
            f"is missing. Continue: {command}"
        )
