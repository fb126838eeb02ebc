"""A bounded folder of fetched files, shared by any number of processes."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from multidomain_cct.data.shards.download import Patience, download
from multidomain_cct.errors import UserError

_ABANDONED = 3600
"""Seconds without progress after which a partly fetched file may be removed."""


@dataclass(frozen=True)
class FileCache:
    """Files by their sha256.

    A file appears under its name only when it is whole and its checksum matches. To make room, the files used longest
    ago are removed first.
    """

    folder: Path
    max_bytes: int
    patience: Patience = Patience()

    def descriptor(self, address: str, sha256: bytes, size: int | None = None) -> int:
        """A descriptor of the file, fetched if absent; the caller closes it. Raises SourceError if fetching fails.

        The open file stays readable when another process removes it to make room.
        """
        path = self.folder / sha256.hex()
        while True:
            with suppress(FileNotFoundError):
                descriptor = os.open(path, os.O_RDONLY)
                os.utime(descriptor)
                return descriptor
            self._fetch(address, path, sha256, size)

    def _fetch(self, address: str, path: Path, sha256: bytes, size: int | None) -> None:
        if size is not None and size > self.max_bytes:
            limit, needed = self.max_bytes / 2**30, size / 2**30
            raise UserError(f"data.cache_gib is {limit:g}, but {address} alone has {needed:.3g} GiB. Allow more.")
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked(f"lock-{path.name[:2]}"):
            if path.exists():
                return
            partial = path.with_name(f"{path.name}.part")
            self._make_room(size or 0, keep=partial)
            download(address, partial, sha256=sha256, size=size, patience=self.patience)
            os.replace(partial, path)

    def _make_room(self, size: int, *, keep: Path) -> None:
        with self._locked("lock-room"):
            files = []
            for entry in os.scandir(self.folder):
                with suppress(FileNotFoundError):
                    if not entry.name.startswith("lock-") and entry.name != keep.name:
                        files.append((entry.stat().st_mtime, entry.stat().st_size, entry))
            total = sum(length for _, length, _ in files)
            for used, length, entry in sorted(files, key=lambda file: file[0]):
                if total + size <= self.max_bytes:
                    return
                if not entry.name.endswith(".part") or time.time() - used > _ABANDONED:
                    with suppress(FileNotFoundError):
                        os.unlink(entry.path)
                    total -= length

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """A lock that the kernel releases when its process dies."""
        with (self.folder / name).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
