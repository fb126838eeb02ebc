"""Samples -> tar shards, each whole and indexed before it appears.

A sample is up to three members with one key: `<key>.jpg` the image, `<key>.png` the mask (8-bit train ids; absent when
unlabelled), `<key>.json` its origin.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import webdataset

from multidomain_cct.data.shards.index import index_path
from multidomain_cct.data.shards.scan import scan_shard
from multidomain_cct.files.durable import replacing

MAX_SHARD_BYTES = 512 * 1024 * 1024


class ShardWriter:
    """Writes samples into `<folder>/<split>-00000.tar`, `-00001.tar` ...; a shard appears, with its index, only when it
    is whole.

    The bytes depend only on the samples, their order and the calls of `publish`: modification times are 0.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        *,
        first_shard: int = 0,
        max_bytes: int = MAX_SHARD_BYTES,
        note: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        """`note` is called for each finished shard; its result is stored in the shard's index."""
        self.folder, self.split, self.max_bytes, self.note = folder, split, max_bytes, note
        self.number = first_shard
        self.finished: list[Path] = []
        self._bytes = 0
        self._rows = 0
        self._pixels: list[tuple[int, int, int]] = []
        self._shard = ExitStack()
        self._file: Any = None
        self._tar: Any = None
        folder.mkdir(parents=True, exist_ok=True)
        for left_by_a_crash in folder.glob(f".{split}-[0-9]*.tmp"):
            left_by_a_crash.unlink()

    def is_full(self, more: int) -> bool:
        """Whether a sample of `more` bytes belongs in the next shard."""
        return self._tar is not None and self._bytes + more > self.max_bytes

    def write(
        self, key: str, *, image: bytes, mask: bytes | None, meta: bytes, pixels: Mapping[int, int] | None = None
    ) -> None:
        """`pixels`: the mask's pixels per train id, which the index keeps."""
        if self._tar is None:
            self._temporary = self._shard.enter_context(replacing(self._path))
            self._file = self._shard.enter_context(self._temporary.open("wb"))
            self._tar = self._shard.enter_context(webdataset.TarWriter(self._file, encoder=False, mtime=0))
        sample = {"__key__": key, "jpg": image, "json": meta} | ({} if mask is None else {"png": mask})
        self._bytes += self._tar.write(sample)
        self._pixels += [(self._rows, train_id, count) for train_id, count in (pixels or {}).items() if count]
        self._rows += 1

    @property
    def _path(self) -> Path:
        return self.folder / f"{self.split}-{self.number:05d}.tar"

    def publish(self) -> None:
        """Finish the current shard and its index."""
        with self._shard.pop_all():
            self._tar.close()
            self._file.close()
            # The index comes first, so that a shard that is there can be read.
            pixels = np.array(self._pixels, dtype=np.int32).reshape(-1, 3)
            index = replace(scan_shard(self._temporary), notes=self.note(), pixels=pixels)
            index.save(index_path(self._path))
        self.finished.append(self._path)
        self.number, self._bytes, self._tar = self.number + 1, 0, None
        self._rows, self._pixels = 0, []

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tar is not None and kind is None:
            self.publish()
        self._shard.__exit__(kind, error, trace)
