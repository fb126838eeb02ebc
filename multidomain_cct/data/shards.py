"""Tar shards: write, index, verify, read. The only file that knows tar.

A sample is up to three members with one key: `<key>.jpg` the image, `<key>.png` the mask (8-bit train ids; absent when unlabelled), `<key>.json` its origin.
Beside each `<shard>.tar` stands `<shard>.tar.idx`, a safetensors file with the place, size and crc32 of every member, so that a sample is one seek and one
read, and damage is seen.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import webdataset
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

MAX_SHARD_BYTES = 512 * 1024 * 1024
INDEX_SCHEMA = "multidomain_cct.index.1"
_BLOCK = 512
IMAGE, MASK, META = 0, 1, 2


@dataclass(frozen=True)
class Extensions:
    """Which member of a sample is which, by what follows the key in its name."""

    image: str = "jpg"
    mask: str = "png"
    meta: str = "json"


@dataclass(frozen=True)
class Record:
    """One sample as it lies in its shard."""

    key: str
    shard: Path
    image: bytes
    mask: bytes | None


@dataclass(frozen=True)
class ShardIndex:
    """Where the n samples of one shard lie. The columns of offset, size and crc32 are image, mask, meta; size is -1 where a sample has no such member."""

    keys: tuple[str, ...]
    offset: np.ndarray  # (n, 3) int64
    size: np.ndarray  # (n, 3) int64
    crc32: np.ndarray  # (n, 3) int64
    shard_bytes: int
    notes: dict[str, Any]
    """What the writer recorded about the shard; empty for foreign shards."""

    def save(self, path: Path) -> None:
        blob = np.frombuffer("\n".join(self.keys).encode(), dtype=np.uint8)
        arrays = {"keys": blob, "offset": self.offset, "size": self.size, "crc32": self.crc32}
        facts = {"schema": INDEX_SCHEMA, "shard_bytes": self.shard_bytes, "notes": self.notes}
        # One entry: safetensors writes several in an order that changes from run to run.
        path.write_bytes(save(arrays, metadata={"index": json.dumps(facts, sort_keys=True)}))

    @classmethod
    def load(cls, path: Path) -> ShardIndex:
        try:
            with safe_open(path, framework="numpy") as file:
                facts = json.loads((file.metadata() or {}).get("index", "{}"))
                arrays = {name: file.get_tensor(name) for name in ("keys", "offset", "size", "crc32")}
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{path}: the index is damaged ({error}). Build it again: python -m multidomain_cct index {shard_of(path)}") from None
        if facts.get("schema") != INDEX_SCHEMA:
            raise ValueError(
                f"{path}: the index has the schema {facts.get('schema')!r}, not {INDEX_SCHEMA!r}. Run: python -m multidomain_cct index {shard_of(path)}"
            )
        keys = tuple(arrays.pop("keys").tobytes().decode().split("\n"))
        return cls(keys, **arrays, shard_bytes=facts["shard_bytes"], notes=facts["notes"])


def index_path(shard: Path) -> Path:
    """Where the index of a shard stands."""
    return shard.with_name(shard.name + ".idx")


def shard_of(index: Path) -> Path:
    """The shard that an index describes."""
    return index.with_name(index.name.removesuffix(".idx"))


def scan_shard(path: Path, *, extensions: Extensions | None = None, notes: dict[str, Any] | None = None) -> ShardIndex:
    """Read a tar once and return its index.

    Raises ValueError for what a streaming reader would swallow in silence: a missing end marker, a damaged header, members that are not regular files,
    unknown members, duplicate keys, keys that come back later, samples without an image.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such shard.")
    extensions = extensions or Extensions()
    column = {extensions.image: IMAGE, extensions.mask: MASK, extensions.meta: META}
    keys: list[str] = []
    places: list[list[tuple[int, int, int]]] = []
    seen: set[str] = set()
    end = 0
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if not member.isreg() or member.issparse():
                    raise ValueError(
                        f"{path}: the member {member.name!r} is not a regular file. A shard holds plain files only; write it again without links and folders."
                    )
                key, extension = _split_name(path, member.name)
                if extension not in column:
                    allowed = ", ".join(f".{name}" for name in column)
                    raise ValueError(f"{path}: the member {member.name!r} has the ending .{extension}; allowed: {allowed}. Choose others with --image, --mask.")
                if not keys or keys[-1] != key:
                    if key in seen:
                        raise ValueError(f"{path}: the key {key!r} appears twice. The members of a sample stand together and a key has one sample.")
                    seen.add(key)
                    keys.append(key)
                    places.append([(-1, -1, 0)] * 3)
                if places[-1][column[extension]][1] >= 0:
                    raise ValueError(f"{path}: the member {member.name!r} appears twice.")
                file.seek(member.offset_data)
                content = file.read(member.size)
                if len(content) < member.size:
                    raise ValueError(f"{path}: the member {member.name!r} is cut off. The file is incomplete; make or copy it again.")
                places[-1][column[extension]] = (member.offset_data, member.size, zlib.crc32(content))
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
            file.seek(end)
            _require_end_marker(path, file.read(), end)
    except tarfile.TarError as error:
        raise ValueError(f"{path}: this is not an uncompressed tar file ({error}).") from None
    if not keys:
        raise ValueError(f"{path}: the shard holds no samples.")
    table = np.array(places, dtype=np.int64)  # (n, 3, 3)
    for row in np.flatnonzero(table[:, IMAGE, 1] < 0)[:1]:
        raise ValueError(f"{path}: the key {keys[row]!r} has no image (.{extensions.image}). A mask or description without its image is of no use.")
    return ShardIndex(tuple(keys), table[:, :, 0].copy(), table[:, :, 1].copy(), table[:, :, 2].copy(), path.stat().st_size, notes or {})


def _split_name(path: Path, name: str) -> tuple[str, str]:
    """A member's key and ending. As in WebDataset, the key ends at the first dot of the last part of the path."""
    folder, _, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    parts = folder.split("/") if folder else []
    if not stem or not dot or name.startswith("/") or ".." in parts or not name.isprintable() or len(name) > 240:
        raise ValueError(f"{path}: the member {name[:80]!r} has no usable name; expected KEY.ENDING, relative, printable, of at most 240 characters.")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def _require_end_marker(path: Path, tail: bytes, end: int) -> None:
    if tail.strip(b"\0"):
        raise ValueError(f"{path}: after byte {end} comes something that is not a tar header. The shard is damaged there; make or copy it again.")
    if len(tail) < 2 * _BLOCK:
        raise ValueError(f"{path}: the end marker is missing after byte {end}, so the shard may be cut off. Make or copy it again.")


def index_shard(path: Path, *, extensions: Extensions | None = None) -> ShardIndex:
    """Build the index beside a shard that somebody else wrote. What `pack` noted of its own shard stays, as long as the contents are the same."""
    index = scan_shard(path, extensions=extensions)
    if index_path(path).is_file():
        with suppress(ValueError):
            old = ShardIndex.load(index_path(path))
            if old.keys == index.keys and np.array_equal(old.crc32, index.crc32):
                index = replace(index, notes=old.notes)
    temporary = index_path(path).with_name(f".{path.name}.idx.tmp")
    index.save(temporary)
    os.replace(temporary, index_path(path))
    return index


class ShardWriter:
    """Writes samples into `<folder>/<split>-00000.tar`, `-00001.tar` ...; a shard appears under its name, with its index, only when it is whole.

    The bytes depend only on the samples, their order and where the caller publishes: modification times are 0.
    """

    def __init__(self, folder: Path, split: str, *, first_shard: int = 0, max_bytes: int = MAX_SHARD_BYTES, note: Callable[[], dict[str, Any]] = dict) -> None:
        """`note` is called when a shard is finished; what it returns is kept in the shard's index."""
        self.folder, self.split, self.max_bytes, self.note = folder, split, max_bytes, note
        self.number = first_shard
        self.finished: list[Path] = []
        self._bytes = 0
        self._file: Any = None
        self._tar: Any = None
        folder.mkdir(parents=True, exist_ok=True)

    def is_full(self, more: int) -> bool:
        """Whether a sample of `more` bytes belongs into the next shard."""
        return self._tar is not None and self._bytes + more > self.max_bytes

    def write(self, key: str, *, image: bytes, mask: bytes | None, meta: bytes) -> None:
        if self._tar is None:
            self._file = self._temporary.open("wb")
            self._tar = webdataset.TarWriter(self._file, encoder=False, mtime=0)
        sample = {"__key__": key, "jpg": image, "json": meta} | ({} if mask is None else {"png": mask})
        self._bytes += self._tar.write(sample)

    @property
    def _path(self) -> Path:
        return self.folder / f"{self.split}-{self.number:05d}.tar"

    @property
    def _temporary(self) -> Path:
        return self._path.with_name(f".{self._path.name}.tmp")

    def publish(self) -> None:
        """Finish the shard in hand and put it, with its index, in place."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        # The index is in place before the shard: whoever sees the shard can read it.
        scan_shard(self._temporary, notes=self.note()).save(index_path(self._path))
        os.replace(self._temporary, self._path)
        self.finished.append(self._path)
        self.number, self._bytes, self._tar, self._file = self.number + 1, 0, None, None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._tar is None:
            return
        if kind is None:
            self.publish()
        else:
            self._tar.close()
            self._file.close()
            self._temporary.unlink(missing_ok=True)


class Shards:
    """The samples of one split of one domain, read by their number.

    Opens files when first read, so it may be built before a loader's workers are forked.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        indexes = [_checked_index(path) for path in self.paths]
        self.keys: list[str] = [key for index in indexes for key in index.keys]
        _require_finished(self.paths, indexes)
        self._shard = np.repeat(np.arange(len(indexes)), [len(index.keys) for index in indexes])
        self._offset = np.concatenate([index.offset for index in indexes])
        self._size = np.concatenate([index.size for index in indexes])
        self._crc32 = np.concatenate([index.crc32 for index in indexes])
        if len(set(self.keys)) < len(self.keys):
            twice = Counter(self.keys).most_common(1)[0][0]
            raise ValueError(f"{self.paths[0].parent}: the key {twice!r} is in more than one shard of the split. Pack or number the shards again.")
        self._descriptors: dict[int, int] = {}

    @classmethod
    def open(cls, folder: Path, split: str) -> Shards:
        """The split's shards in a domain's folder. Raises FileNotFoundError with the command that makes them."""
        paths = shard_paths(folder, split)
        if not paths:
            raise FileNotFoundError(
                f"{folder} has no {split} shards. Make them: python -m multidomain_cct pack {folder.name} --raw FOLDER --split {split} --out {folder.parent}"
            )
        return cls(paths)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def labelled(self) -> np.ndarray:
        """(n,) bool: whether the sample has a mask."""
        return self._size[:, MASK] >= 0

    @property
    def fingerprint(self) -> str:
        """Hex digest of keys and contents."""
        digest = hashlib.sha256("\n".join(self.keys).encode())
        digest.update(self._size.tobytes() + self._crc32.tobytes())
        return digest.hexdigest()[:16]

    def read(self, number: int, *, with_mask: bool = True) -> Record:
        """The sample's bytes. Raises ValueError, naming shard and key, when they are not those that were indexed."""
        path = self.paths[self._shard[number]]
        mask = self._read_member(number, MASK) if with_mask and self._size[number, MASK] >= 0 else None
        return Record(self.keys[number], path, self._read_member(number, IMAGE), mask)

    def _read_member(self, number: int, column: int) -> bytes:
        shard, size = int(self._shard[number]), int(self._size[number, column])
        if shard not in self._descriptors:
            self._descriptors[shard] = os.open(self.paths[shard], os.O_RDONLY)
        # pread keeps no file position, so forked workers may share the descriptor.
        content = os.pread(self._descriptors[shard], size, int(self._offset[number, column]))
        if len(content) != size or zlib.crc32(content) != self._crc32[number, column]:
            raise ValueError(
                f"{self.paths[shard]}: key {self.keys[number]!r}: the bytes differ from what was indexed. Copy the shard again, or if it was changed on"
                f" purpose: python -m multidomain_cct index {self.paths[shard]}"
            )
        return content

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_descriptors": {}}

    def __del__(self) -> None:
        for descriptor in getattr(self, "_descriptors", {}).values():
            os.close(descriptor)


def shard_paths(folder: Path, split: str) -> list[Path]:
    """The finished shards of a split, in order."""
    return sorted(path for path in folder.glob(f"{split}-*.tar") if path.name[len(split) + 1 : -4].isdigit())


def _require_finished(paths: Sequence[Path], indexes: Sequence[ShardIndex]) -> None:
    """Refuse the shards of a packing that was interrupted: half a data set trains as quietly as a whole one."""
    totals = {index.notes["total"] for index in indexes if "total" in index.notes}
    found = sum(len(index.keys) for index in indexes)
    if totals and totals != {found}:
        folder, split = paths[0].parent, paths[0].name.rpartition("-")[0]
        raise ValueError(
            f"{folder}: the {split} shards hold {found} of {max(totals)} images; packing was interrupted, or a shard is missing. "
            f"Go on with it: python -m multidomain_cct pack {folder.name} --raw FOLDER --split {split} --out {folder.parent}"
        )


def _checked_index(path: Path) -> ShardIndex:
    if not index_path(path).is_file():
        raise FileNotFoundError(f"{path} has no index. Build it: python -m multidomain_cct index {path}")
    index = ShardIndex.load(index_path(path))
    if index.shard_bytes != path.stat().st_size:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes, but its index was made for {index.shard_bytes}. Build it again: python -m multidomain_cct index {path}"
        )
    return index
