"""Tar shards, read sample by sample.

Beside each `<shard>.tar` is `<shard>.tar.idx` with the offset, size and crc32 of every member: a sample takes one seek
and one read, and damage is detected. Memory does not grow with the number of samples: indexes are opened when needed
and closed again.
"""

from __future__ import annotations

import json
import os
import re
import resource
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from multidomain_cct.data.shards.catalogue import Catalogue, catalogue_path
from multidomain_cct.data.shards.index import FIELDS, IMAGE, MASK, META, ShardIndex, shard_paths
from multidomain_cct.data.shards.sources import LocalFolder, RemoteFolder
from multidomain_cct.errors import UserError

INDEX_BYTES = 32 * 1024 * 1024
"""Memory for opened indexes per split and process; at least one is kept."""
OPEN_FILES = 64
"""Shards that a process has open at a time, of all splits together; fewer where it may open few files."""
_descriptors: OrderedDict[tuple[str, bytes], int] = OrderedDict()
"""Descriptors of open shards by location and checksum, the ones used longest ago first. A forked process has its own,
and may close them.
"""


class BadSample(UserError):
    """A sample that cannot be used. The message is one line: shard, key, field, what was found."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason
        """The same words for all samples with this fault, to count by."""


@dataclass(frozen=True)
class Record:
    """The stored bytes of one sample."""

    key: str
    shard: str
    """The shard's path or address, for messages."""
    image: bytes
    mask: bytes | None

    @property
    def where(self) -> str:
        """Shard and key, with which messages begin."""
        return f"{self.shard}: key {self.key!r}"


class Shards:
    """The samples of one split of one domain, read by number.

    Opens files at the first read, so it may be built before a loader's workers are forked.
    """

    def __init__(self, source: LocalFolder | RemoteFolder, catalogue: Catalogue) -> None:
        self.source, self.catalogue = source, catalogue
        self.ends = np.cumsum(catalogue.samples)
        """(s,) int64: the sample number at which each shard ends."""
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()
        self._index_bytes = 0

    @classmethod
    def open(cls, folder: Path, split: str) -> Shards:
        """The split's shards in a domain's folder. Raises UserError with the command that makes them."""
        paths = shard_paths(folder, split)
        if not paths:
            command = f"python -m multidomain_cct pack {folder.name} --raw FOLDER --split {split} --out {folder.parent}"
            others = sorted(
                path.name for path in folder.glob("*.tar") if not re.fullmatch(r".+-[0-9]+\.tar", path.name)
            )
            named = f" It holds {others[0]}; a shard is named such as {split}-00000.tar." if others else ""
            raise UserError(f"{folder} has no {split} shards.{named} Make them: {command}")
        listed = catalogue_path(folder, split)
        if not listed.is_file():
            return cls.of(paths)
        catalogue = Catalogue.load(listed)
        if different := {path.name for path in paths} ^ set(catalogue.names):
            raise UserError(
                f"{listed} lists other shards than there are ({min(different)}). Restore them, or make the catalogue "
                f"again: python -m multidomain_cct index --catalogue {folder}/{split}-*.tar"
            )
        return cls(LocalFolder(folder), catalogue)

    @classmethod
    def of(cls, paths: Sequence[Path]) -> Shards:
        """These shards of one folder."""
        return cls(LocalFolder(paths[0].parent), Catalogue.of(paths))

    def __len__(self) -> int:
        return int(self.ends[-1])

    @property
    def keys(self) -> Sequence[str]:
        """The key of each sample, read on access."""
        return _Keys(self)

    @property
    def labelled(self) -> np.ndarray:
        """(n,) bool: whether the sample has a mask."""
        return np.isin(np.arange(len(self)), self.numbers(labelled=True))

    def numbers(self, *, labelled: bool) -> np.ndarray:
        """(m,) int64, ascending: the samples with a mask, or those without.

        Opens only the indexes of shards that hold both.
        """
        parts = [np.empty(0, dtype=np.int64)]
        wanted = self.catalogue.labelled if labelled else self.catalogue.samples - self.catalogue.labelled
        for shard in np.flatnonzero(wanted).tolist():
            rows = np.arange(self.catalogue.samples[shard])
            if wanted[shard] < len(rows):
                rows = rows[(self._index(shard).size[:, MASK] >= 0) == labelled]
            parts.append(rows + self._start(shard))
        return np.concatenate(parts)

    def pixels(self, number: int) -> dict[int, int]:
        """Pixels per train id in a sample's mask; empty when its index does not have them."""
        shard, row = self._locate(number)
        return self._index(shard).pixels_of(row)

    @property
    def fingerprint(self) -> str:
        """Hex digest of keys and contents."""
        return self.catalogue.fingerprint

    def read(self, number: int, *, with_mask: bool = True) -> Record:
        """The sample's bytes. Raises BadSample, naming shard and key, when they differ from the indexed ones."""
        shard, row = self._locate(number)
        index, location = self._index(shard), self.source.location(self.catalogue.names[shard])
        mask = self._member(shard, index, row, MASK) if with_mask and index.size[row, MASK] >= 0 else None
        return Record(index.keys[row], location, self._member(shard, index, row, IMAGE), mask)

    def origin(self, number: int) -> str:
        """The raw file of a sample, relative to the raw folder; empty when its description has none."""
        shard, row = self._locate(number)
        index = self._index(shard)
        source = json.loads(self._member(shard, index, row, META)).get("source") if index.size[row, META] >= 0 else None
        return source if isinstance(source, str) else ""

    def _start(self, shard: int) -> int:
        return int(self.ends[shard] - self.catalogue.samples[shard])

    def _locate(self, number: int) -> tuple[int, int]:
        """The shard of a sample, and its row there."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        shard = int(np.searchsorted(self.ends, number, side="right"))
        return shard, number - self._start(shard)

    def _index(self, shard: int) -> ShardIndex:
        if shard not in self._indexes:
            self._indexes[shard] = index = self.source.index(self.catalogue, shard)
            self._index_bytes += index.num_bytes
            while self._index_bytes > INDEX_BYTES and len(self._indexes) > 1:
                _, oldest = self._indexes.popitem(last=False)
                self._index_bytes -= oldest.num_bytes
        self._indexes.move_to_end(shard)
        return self._indexes[shard]

    def _member(self, shard: int, index: ShardIndex, row: int, column: int) -> bytes:
        size = int(index.size[row, column])
        # pread keeps no file position, so forked workers may share the descriptor.
        content = os.pread(self._descriptor(shard), size, int(index.offset[row, column]))
        if len(content) != size or zlib.crc32(content) != index.crc32[row, column]:
            location, field = self.source.location(self.catalogue.names[shard]), FIELDS[column]
            raise BadSample(
                f"{location}: key {index.keys[row]!r}: the bytes differ from what was indexed ({field}). Copy the "
                f"shard again, or if it was changed on purpose: python -m multidomain_cct index {location}",
                f"{field}: bytes differ from the index",
            )
        return content

    def _descriptor(self, shard: int) -> int:
        name = self.source.location(self.catalogue.names[shard]), self.catalogue.shard_sha256[shard].tobytes()
        if name not in _descriptors:
            allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            most = OPEN_FILES if allowed == resource.RLIM_INFINITY else min(OPEN_FILES, allowed // 4)
            while _descriptors and len(_descriptors) >= most:
                os.close(_descriptors.popitem(last=False)[1])
            _descriptors[name] = self.source.descriptor(self.catalogue, shard)
        _descriptors.move_to_end(name)
        return _descriptors[name]


class _Keys(Sequence[str]):
    """The keys of all samples, in order, without holding them."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, number: Any) -> Any:
        shard, row = self._shards._locate(number)
        return self._shards._index(shard).keys[row]

    def __iter__(self) -> Iterator[str]:
        for shard in range(len(self._shards.ends)):
            yield from self._shards._index(shard).keys
