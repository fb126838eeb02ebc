"""The index beside a shard: where each sample lies, and how to tell that it is still what was indexed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from multidomain_cct.errors import UserError
from multidomain_cct.files.durable import replacing

INDEX_SCHEMA = "multidomain_cct.index.2"
IMAGE, MASK, META = 0, 1, 2
_ARRAYS = ("keys", "offset", "size", "crc32")


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
    """Of the whole shard, headers and padding too."""
    notes: dict[str, Any]
    """What the writer recorded about the shard; empty for foreign shards."""

    @property
    def num_bytes(self) -> int:
        """Memory that the index takes, about."""
        return (
            self.offset.nbytes + self.size.nbytes + self.crc32.nbytes + sum(map(len, self.keys)) + 60 * len(self.keys)
        )

    @property
    def digest(self) -> bytes:
        """16 bytes that depend on the keys and contents of the samples, and on nothing else."""
        content = hashlib.sha256("\n".join(self.keys).encode())
        content.update(self.size.tobytes() + self.crc32.tobytes())
        return content.digest()[:16]

    def save(self, path: Path) -> None:
        blob = np.frombuffer("\n".join(self.keys).encode(), dtype=np.uint8)
        arrays = {"keys": blob, "offset": self.offset, "size": self.size, "crc32": self.crc32}
        facts = {
            "schema": INDEX_SCHEMA,
            "shard_bytes": self.shard_bytes,
            "shard_sha256": self.shard_sha256,
            "notes": self.notes,
        }
        save_table(path, arrays, facts)

    @classmethod
    def load(cls, path: Path) -> ShardIndex:
        """Raises UserError for an index of which a byte has changed, and for one of another version."""
        remedy = f"Build it again: python -m multidomain_cct index {shard_of(path)}"
        arrays, facts = load_table(path, _ARRAYS, INDEX_SCHEMA, what="index", remedy=remedy)
        keys = tuple(arrays.pop("keys").tobytes().decode().split("\n"))
        if not "".join(keys).isprintable():
            raise UserError(
                f"{path}: the index holds keys with control characters, which `index` never writes. {remedy}"
            )
        return cls(
            keys, **arrays, shard_bytes=facts["shard_bytes"], shard_sha256=facts["shard_sha256"], notes=facts["notes"]
        )


def shard_paths(folder: Path, split: str) -> list[Path]:
    """The finished shards of a split, in order."""
    return sorted(path for path in folder.glob(f"{split}-*.tar") if path.name[len(split) + 1 : -4].isdigit())


def index_path(shard: Path) -> Path:
    """Where the index of a shard stands."""
    return shard.with_name(shard.name + ".idx")


def shard_of(index: Path) -> Path:
    """The shard that an index describes."""
    return index.with_name(index.name.removesuffix(".idx"))


def notes_of_same(path: Path, index: ShardIndex) -> dict[str, Any]:
    """The notes in an earlier index, of any version, of a shard with the same keys and contents; empty when there is
    none.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            same = file.get_tensor("keys").tobytes().decode().split("\n") == list(index.keys) and np.array_equal(
                file.get_tensor("crc32"), index.crc32
            )
            notes = json.loads((file.metadata() or {}).get("index", "{}")).get("notes", {})
    except (SafetensorError, ValueError, AttributeError, OSError):
        return {}
    return notes if same and isinstance(notes, dict) else {}


def save_table(path: Path, arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
    """Write arrays and facts as one safetensors file with a checksum over both.

    The file appears whole or not at all.
    """
    facts = facts | {"checksum": _checksum(arrays, facts)}
    with replacing(path) as temporary:
        # One entry: safetensors writes several in an order that changes from run to run.
        temporary.write_bytes(save(arrays, metadata={"index": json.dumps(facts, sort_keys=True)}))


def load_table(
    path: Path, names: tuple[str, ...], schema: str, *, what: str, remedy: str
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What `save_table` wrote. Raises UserError, ending in the remedy, when it is not that to the last bit."""
    try:
        with safe_open(path, framework="numpy") as file:
            facts = json.loads((file.metadata() or {}).get("index", "{}"))
            found = facts.get("schema")
            arrays = {name: file.get_tensor(name) for name in names} if found == schema else {}
    except (SafetensorError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: the {what} is damaged ({' '.join(str(error).split())[:200]}). {remedy}") from None
    if found != schema:
        raise UserError(f"{path}: the {what} has the schema {str(found)[:60]!r}, not {schema!r}. {remedy}")
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
