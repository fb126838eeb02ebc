"""Where the shards of a split are."""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from multidomain_cct.data.shards.cache import FileCache
from multidomain_cct.data.shards.catalogue import Catalogue
from multidomain_cct.data.shards.download import download
from multidomain_cct.data.shards.index import ShardIndex, index_path
from multidomain_cct.errors import UserError


class Source(Protocol):
    """A folder of shards, wherever it is."""

    def place(self, name: str) -> str:
        """What messages call the shard of this name."""

    def index(self, catalogue: Catalogue, shard: int) -> ShardIndex:
        """The index of a shard. Raises UserError when it is not the one that the catalogue counted."""

    def descriptor(self, catalogue: Catalogue, shard: int) -> int:
        """A descriptor of the shard, opened for reading; the caller closes it.

        Raises UserError when the shard has not the size that was indexed.
        """


@dataclass(frozen=True)
class LocalFolder:
    """Shards on a disk."""

    folder: Path

    def place(self, name: str) -> str:
        return str(self.folder / name)

    def index(self, catalogue: Catalogue, shard: int) -> ShardIndex:
        path = self.folder / catalogue.names[shard]
        if not index_path(path).is_file():
            raise UserError(f"{path} has no index. Build it: python -m multidomain_cct index {path}")
        if hashlib.sha256(index_path(path).read_bytes()).digest() != catalogue.index_sha256[shard].tobytes():
            split = path.name.rpartition("-")[0]
            raise UserError(
                f"{index_path(path)} is not the index that was counted when the split was opened or catalogued. Begin "
                "again, or with a catalogue: python -m"
                f" multidomain_cct index --catalogue {self.folder}/{split}-*.tar"
            )
        return ShardIndex.load(index_path(path))

    def descriptor(self, catalogue: Catalogue, shard: int) -> int:
        path, expected = self.folder / catalogue.names[shard], int(catalogue.shard_bytes[shard])
        descriptor = os.open(path, os.O_RDONLY)
        found = os.fstat(descriptor).st_size
        if found != expected:
            os.close(descriptor)
            raise UserError(
                f"{path} has {found} bytes, but its index was made for {expected}. Build it again: python -m "
                f"multidomain_cct index {path}"
            )
        return descriptor


@dataclass(frozen=True)
class RemoteFolder:
    """Shards at an http(s) or s3 address. Whole shards are fetched into a cache when a sample of theirs is read."""

    address: str
    cache: FileCache

    def place(self, name: str) -> str:
        return f"{self.address.rstrip('/')}/{name}"

    def catalogue(self, split: str) -> Catalogue:
        """The split's catalogue, fetched anew: it says what all other files have to be.

        Raises SourceError when there is none.
        """
        self.cache.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.cache.folder, prefix="lock-") as folder:
            path = Path(folder) / f"{split}.catalogue"
            download(self.place(path.name), path, patience=self.cache.patience)
            try:
                return Catalogue.load(path)
            except UserError as error:
                raise UserError(str(error).replace(str(path), self.place(path.name))) from None

    def index(self, catalogue: Catalogue, shard: int) -> ShardIndex:
        address = self.place(index_path(Path(catalogue.names[shard])).name)
        descriptor = self.cache.descriptor(address, catalogue.index_sha256[shard].tobytes())
        try:
            return ShardIndex.load(Path(f"/dev/fd/{descriptor}"))
        finally:
            os.close(descriptor)

    def descriptor(self, catalogue: Catalogue, shard: int) -> int:
        return self.cache.descriptor(
            self.place(catalogue.names[shard]),
            catalogue.shard_sha256[shard].tobytes(),
            int(catalogue.shard_bytes[shard]),
        )
