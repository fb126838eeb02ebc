"""The index beside a shard: where each sample lies, and how to tell that it is still what was indexed."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from multidomain_cct.errors import UserError
from multidomain_cct.files.durable import replacing

INDEX_SCHEMA = "multidomain_cct.index.2"
IMAGE, MASK, META = 0, 1, 2
FIELDS = ("image", "mask", "description")
_ARRAYS = ("keys", "offset", "size", "crc32")
_BUILD = "Build it again: python -m multidomain_cct index"


@dataclass(frozen=True)
class ShardIndex:
    """Where the n samples of one shard lie.

    The columns of offset, size and crc32 are image, mask, meta; size is -1 where a sample has no such member.
    """

    keys: tuple[str, ...]
    offset: np.ndarray  # (n, 3) int64
    size: np.ndarray  # (n, 3) int64
    crc32: np.ndarray  # (n, 3) int64
    shard_bytes: int
    shard_sha256: str
    """Of the whole shard, headers and padding included."""
    notes: dict[str, Any]
    """What the writer recorded about the shard; empty for foreign shards."""
    pixels: np.ndarray = field(default_factory=lambda: np.empty((0, 3), dtype=np.int32))  # (k, 3) int32
    """Mask pixels as rows of (sample, train id, pixels), in the samples' order; none for a sample whose masks the
    writer did not count.
    """

    @property
    def num_bytes(self) -> int:
        """Memory that the index takes, about."""
        return 3 * self.offset.nbytes + self.pixels.nbytes + sum(len(key) + 60 for key in self.keys)

    @property
    def digest(self) -> bytes:
        """16 bytes that depend on the keys and contents of the samples only."""
        content = hashlib.sha256("\n".join(self.keys).encode())
        content.update(self.size.tobytes() + self.crc32.tobytes())
        return content.digest()[:16]

    def save(self, path: Path) -> None:
        keys = np.frombuffer("\n".join(self.keys).encode(), dtype=np.uint8)
        arrays = {"keys": keys, "offset": self.offset, "size": self.size, "crc32": self.crc32, "pixels": self.pixels}
        facts = {"shard_bytes": self.shard_bytes, "shard_sha256": self.shard_sha256, "notes": self.notes}
        save_table(path, arrays, facts | {"schema": INDEX_SCHEMA})

    def pixels_of(self, row: int) -> dict[int, int]:
        """Pixels per train id in a sample's mask; empty when they were not counted."""
        start, stop = np.searchsorted(self.pixels[:, 0], [row, row + 1])
        return {train_id: count for _, train_id, count in self.pixels[start:stop].tolist()}

    @classmethod
    def load(cls, path: Path) -> ShardIndex:
        """Raises UserError for an index that has changed by a byte, and for one of another version."""
        remedy = f"{_BUILD} {path.with_name(path.name.removesuffix('.idx'))}"
        arrays, facts = load_table(path, _ARRAYS, INDEX_SCHEMA, what="index", remedy=remedy)
        keys = tuple(arrays.pop("keys").tobytes().decode().split("\n"))
        if not "".join(keys).isprintable():
            raise UserError(f"{path}: the index holds keys with control characters, which are not allowed. {remedy}")
        columns: dict[str, Any] = arrays | facts
        del columns["schema"]
        return cls(keys, **columns)


def shard_paths(folder: Path, split: str) -> list[Path]:
    """The finished shards of a split, in order. Raises UserError when the folder may not be read."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}. Ask its owner for the right to read it.") from None
    return [folder / name for name in sorted(names) if re.fullmatch(rf"{re.escape(split)}-[0-9]+\.tar", name)]


def index_path(shard: Path) -> Path:
    """The path of a shard's index."""
    return shard.with_name(shard.name + ".idx")


def existing_index(shard: Path) -> Path:
    """The path of a shard's index. Raises UserError when there is none."""
    if not index_path(shard).is_file():
        raise UserError(f"{shard} has no index. Build it: python -m multidomain_cct index {shard}")
    return index_path(shard)


def require_indexed_size(shard: Path, size: int, indexed: int) -> None:
    """Raises UserError when the shard's size is not the one that was indexed."""
    if size == 0:
        raise UserError(f"{shard} has 0 bytes: it was emptied. Copy it again, or remove it and pack the split again.")
    if size != indexed:
        raise UserError(f"{shard} has {size} bytes, but its index was made for {indexed}. {_BUILD} {shard}")


def checked_index(shard: Path) -> ShardIndex:
    """The index of a shard. Raises UserError when the shard's size is not the one that was indexed."""
    index = ShardIndex.load(existing_index(shard))
    require_indexed_size(shard, shard.stat().st_size, index.shard_bytes)
    return index


def with_notes_of(path: Path, index: ShardIndex) -> ShardIndex:
    """The index with notes and pixel counts of the index file at `path`, of any version, if that has the same keys and
    contents.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            keys, crc32 = file.get_tensor("keys").tobytes().decode(), file.get_tensor("crc32")
            notes = json.loads((file.metadata() or {}).get("index", "{}")).get("notes", {})
            pixels = file.get_tensor("pixels") if "pixels" in file.keys() else index.pixels  # noqa: SIM118
    except (SafetensorError, ValueError, AttributeError, OSError):
        return index
    same = keys == "\n".join(index.keys) and np.array_equal(crc32, index.crc32)
    return replace(index, notes=notes, pixels=pixels) if same and isinstance(notes, dict) else index


def save_table(path: Path, arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
    """Write arrays and facts as one safetensors file with a checksum over both; it appears whole or not at all."""
    facts = facts | {"checksum": _checksum(arrays, facts)}
    with replacing(path) as temporary:
        # One entry: safetensors writes several in an order that changes from run to run.
        temporary.write_bytes(save(arrays, metadata={"index": json.dumps(facts, sort_keys=True)}))


def load_table(
    path: Path, names: tuple[str, ...], schema: str, *, what: str, remedy: str
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and facts of `save_table`. Raises UserError, ending in the remedy, when a bit differs or an array of
    `names` is missing.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            facts = json.loads((file.metadata() or {}).get("index", "{}"))
            version = facts.get("schema")
            arrays = {name: file.get_tensor(name) for name in {*names, *file.keys()}} if version == schema else {}
    except PermissionError as error:
        raise UserError(f"{path} may not be read ({error}). Ask its owner for the right to read it.") from None
    except (SafetensorError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: the {what} is damaged ({' '.join(str(error).split())[:200]}). {remedy}") from None
    if version != schema:
        raise UserError(f"{path}: the {what} has the schema {str(version)[:60]!r}, not {schema!r}. {remedy}")
    checksum = facts.pop("checksum", None)
    if checksum != _checksum(arrays, facts):
        raise UserError(f"{path}: the {what} is damaged (its checksum differs). {remedy}")
    return arrays, facts


def _checksum(arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> str:
    content = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        content.update(f"{name} {array.dtype} {array.shape}".encode())
        content.update(np.ascontiguousarray(array).tobytes())
    return content.hexdigest()
