"""Local and remote folders of shards."""

from __future__ import annotations

import errno
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from multidomain_cct.data.shards.cache import FileCache
from multidomain_cct.data.shards.catalogue import Catalogue
from multidomain_cct.data.shards.download import download
from multidomain_cct.data.shards.index import ShardIndex, existing_index, index_path, require_indexed_size
from multidomain_cct.errors import UserError
from multidomain_cct.files.durable import file_sha256

_REMEDIES = {
    errno.EACCES: "Ask its owner for the right to read it.",
    errno.EMFILE: "Allow more open files: ulimit -n 1024.",
}


@dataclass(frozen=True)
class LocalFolder:
    """Shards on a disk."""

    folder: Path

    def location(self, name: str) -> str:
        """Path of a shard, for messages."""
        return str(self.folder / name)

    def index(self, catalogue: Catalogue, shard: int) -> ShardIndex:
        """The index of a shard. Raises UserError when it is not the one in the catalogue."""
        path = self.folder / catalogue.names[shard]
        index = existing_index(path)
        if bytes.fromhex(file_sha256(index)) != catalogue.index_sha256[shard].tobytes():
            split = path.name.rpartition("-")[0]
            raise UserError(
                f"{index} is not the index that was counted when the split was opened or catalogued. Start again; if "
                f"there is a catalogue: python -m multidomain_cct index --catalogue {self.folder}/{split}-*.tar"
            )
        return ShardIndex.load(index)

    def descriptor(self, catalogue: Catalogue, shard: int) -> int:
        """A descriptor of the shard, opened for reading; the caller closes it.

        Raises UserError when the shard is gone, may not be read, or has not the indexed size.
        """
        path = self.folder / catalogue.names[shard]
        try:
            require_indexed_size(path, path.stat().st_size, int(catalogue.shard_bytes[shard]))
            return os.open(path, os.O_RDONLY)
        except OSError as error:
            remedy = _REMEDIES.get(error.errno or 0, "Bring it back, or pack the split again.")
            raise UserError(f"{path} cannot be opened: {error.strerror}. {remedy}") from None


@dataclass(frozen=True)
class RemoteFolder:
    """Shards at an http(s) or s3 address, with the methods of LocalFolder.

    A shard is fetched whole into a cache when one of its samples is read.
    """

    address: str
    cache: FileCache

    def location(self, name: str) -> str:
        return f"{self.address.rstrip('/')}/{name}"

    def catalogue(self, split: str) -> Catalogue:
        """The split's catalogue, always fetched: it holds the checksums of all other files.

        Raises SourceError when there is none.
        """
        self.cache.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.cache.folder, prefix="lock-") as folder:
            path = Path(folder) / f"{split}.catalogue"
            download(self.location(path.name), path, patience=self.cache.patience)
            try:
                return Catalogue.load(path)
            except UserError as error:
                raise UserError(str(error).replace(str(path), self.location(path.name))) from None

    def index(self, catalogue: Catalogue, shard: int) -> ShardIndex:
        address = self.location(index_path(Path(catalogue.names[shard])).name)
        descriptor = self.cache.descriptor(address, catalogue.index_sha256[shard].tobytes())
        try:
            return ShardIndex.load(Path(f"/dev/fd/{descriptor}"))
        finally:
            os.close(descriptor)

    def descriptor(self, catalogue: Catalogue, shard: int) -> int:
        sha256, size = catalogue.shard_sha256[shard].tobytes(), int(catalogue.shard_bytes[shard])
        return self.cache.descriptor(self.location(catalogue.names[shard]), sha256, size)
