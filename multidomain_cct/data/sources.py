"""Where the shards of a split are."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from multidomain_cct.data.catalogue import Catalogue
from multidomain_cct.data.shard_index import ShardIndex, index_path


class Source(Protocol):
    """A folder of shards, wherever it is."""

    def place(self, name: str) -> str:
        """What messages call the shard of this name."""

    def index(self, catalogue: Catalogue, shard: int) -> ShardIndex:
        """The index of a shard. Raises ValueError when it is not the one that the catalogue counted."""

    def descriptor(self, catalogue: Catalogue, shard: int) -> int:
        """A descriptor of the shard, opened for reading; the caller closes it. Raises ValueError when the shard has not the size that was indexed."""


@dataclass(frozen=True)
class LocalFolder:
    """Shards on a disk."""

    folder: Path

    def place(self, name: str) -> str:
        return str(self.folder / name)

    def index(self, catalogue: Catalogue, shard: int) -> ShardIndex:
        path = self.folder / catalogue.names[shard]
        if not index_path(path).is_file():
            raise FileNotFoundError(f"{path} has no index. Build it: python -m multidomain_cct index {path}")
        if hashlib.sha256(index_path(path).read_bytes()).digest() != catalogue.index_sha256[shard].tobytes():
            split = path.name.rpartition("-")[0]
            raise ValueError(
                f"{index_path(path)} is not the index that was counted when the split was opened or catalogued. Begin again, or with a catalogue: python -m"
                f" multidomain_cct index --catalogue {self.folder}/{split}-*.tar"
            )
        return ShardIndex.load(index_path(path))

    def descriptor(self, catalogue: Catalogue, shard: int) -> int:
        path, expected = self.folder / catalogue.names[shard], int(catalogue.shard_bytes[shard])
        descriptor = os.open(path, os.O_RDONLY)
        found = os.fstat(descriptor).st_size
        if found != expected:
            os.close(descriptor)
            raise ValueError(f"{path} has {found} bytes, but its index was made for {expected}. Build it again: python -m multidomain_cct index {path}")
        return descriptor
