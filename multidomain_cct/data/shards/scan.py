"""Tar shards read from end to end: their index, and whether they are still what was indexed.

Anything that a streaming reader would pass over in silence is refused here, by shard and member, before a run sees it.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from multidomain_cct.data.shards.catalogue import checked_index
from multidomain_cct.data.shards.index import IMAGE, MASK, META, ShardIndex, index_path, notes_of_same
from multidomain_cct.errors import UserError

_BLOCK = 512
_LONGEST_NAME = 240


@dataclass(frozen=True)
class Extensions:
    """Which member of a sample is which, by what follows the key in its name."""

    image: str = "jpg"
    mask: str = "png"
    meta: str = "json"


def scan_shard(path: Path, *, extensions: Extensions | None = None, notes: dict[str, Any] | None = None) -> ShardIndex:
    """Read a tar once and return its index.

    Raises UserError for what a streaming reader would swallow in silence: a missing end marker, a damaged header,
    members that are not regular files, unknown members, duplicate keys, keys that come back later, samples without an
    image, descriptions that are not JSON.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such shard.")
    extensions = extensions or Extensions()
    found = _Samples(path, {extensions.image: IMAGE, extensions.mask: MASK, extensions.meta: META})
    end = 0
    try:
        with path.open("rb") as file:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    content = _content(path, file, member)
                    found.add(member.name, member.offset_data, content)
                    end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
            file.seek(end)
            _require_end_marker(path, file.read(), end)
            file.seek(0)
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
    except (tarfile.TarError, ValueError) as error:
        # ValueError: a number in a header that is none.
        raise UserError(f"{path}: this is not an uncompressed tar file ({error}).") from None
    if not found.keys:
        raise UserError(f"{path}: the shard holds no samples.")
    table = np.array(found.places, dtype=np.int64)  # (n, 3, 3)
    for row in np.flatnonzero(table[:, IMAGE, 1] < 0)[:1]:
        raise UserError(
            f"{path}: the key {found.keys[row]!r} has no image (.{extensions.image}). A mask or description without "
            "its image is of no use."
        )
    offset, size, crc32 = (table[:, :, part].copy() for part in range(3))
    return ShardIndex(tuple(found.keys), offset, size, crc32, path.stat().st_size, checksum, notes or {})


class _Samples:
    """The samples of a shard as its members come by."""

    def __init__(self, path: Path, columns: dict[str, int]) -> None:
        self.path, self.columns = path, columns
        self.keys: list[str] = []
        self.places: list[list[tuple[int, int, int]]] = []
        """For each sample and column: offset, size, crc32."""
        self._seen: set[str] = set()

    def add(self, name: str, offset: int, content: bytes) -> None:
        key, extension = _split_name(self.path, name)
        if extension not in self.columns:
            allowed = ", ".join(f".{name}" for name in self.columns)
            raise UserError(
                f"{self.path}: the member {name!r} has the ending .{extension}; allowed: {allowed}. Choose others "
                "with --image, --mask."
            )
        if not self.keys or self.keys[-1] != key:
            if key in self._seen:
                raise UserError(
                    f"{self.path}: the key {key!r} appears twice. The members of a sample stand together and a key "
                    "has one sample."
                )
            self._seen.add(key)
            self.keys.append(key)
            self.places.append([(-1, -1, 0)] * 3)
        column = self.columns[extension]
        if self.places[-1][column][1] >= 0:
            raise UserError(f"{self.path}: the member {name!r} appears twice.")
        if not content:
            raise UserError(f"{self.path}: the member {name!r} is empty. Make or copy the shard again.")
        if column == META:
            _require_description(self.path, name, content)
        self.places[-1][column] = (offset, len(content), zlib.crc32(content))


def _content(path: Path, file: BinaryIO, member: tarfile.TarInfo) -> bytes:
    if not member.isreg() or member.issparse():
        raise UserError(
            f"{path}: the member {member.name!r} is not a regular file. A shard holds plain files only; write it "
            "again without links and folders."
        )
    file.seek(member.offset_data)
    content = file.read(member.size)
    if len(content) < member.size:
        raise UserError(
            f"{path}: the member {member.name!r} is cut off. The file is incomplete; make or copy it again."
        )
    return content


def _require_description(path: Path, name: str, content: bytes) -> None:
    try:
        description = json.loads(content)
    except (ValueError, RecursionError):
        raise UserError(
            f'{path}: the member {name!r} is not valid JSON. A description is an object such as {{"source": "a.jpg"}}.'
        ) from None
    if not isinstance(description, dict):
        raise UserError(
            f"{path}: the member {name!r} holds {type(description).__name__}; a description is a JSON object."
        )


def _split_name(path: Path, name: str) -> tuple[str, str]:
    """A member's key and ending. As in WebDataset, the key ends at the first dot of the last part of the path."""
    folder, _, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    parts = folder.split("/") if folder else []
    if (
        not stem
        or not dot
        or name.startswith("/")
        or ".." in parts
        or not name.isprintable()
        or len(name) > _LONGEST_NAME
    ):
        raise UserError(
            f"{path}: the member {name[:80]!r} has no usable name; expected KEY.ENDING, relative, printable, of at "
            f"most {_LONGEST_NAME} characters."
        )
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def _require_end_marker(path: Path, tail: bytes, end: int) -> None:
    if tail.strip(b"\0"):
        raise UserError(
            f"{path}: after byte {end} comes something that is not a tar header. The shard is damaged there; make or "
            "copy it again."
        )
    if len(tail) < 2 * _BLOCK:
        raise UserError(
            f"{path}: the end marker is missing after byte {end}, so the shard may be cut off. Make or copy it again."
        )


def index_shard(path: Path, *, extensions: Extensions | None = None) -> ShardIndex:
    """Build the index beside a shard that somebody else wrote.

    What `pack` noted of its own shard stays, as long as the contents are the same.
    """
    index = scan_shard(path, extensions=extensions)
    index = replace(index, notes=notes_of_same(index_path(path), index))
    index.save(index_path(path))
    return index


def verify_shard(path: Path) -> ShardIndex:
    """Read the whole shard and return its index.

    Raises UserError, naming what differs, when a byte is not what was indexed, headers and padding included.
    """
    index = checked_index(path)
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() == index.shard_sha256:
            return index
        for row, key in enumerate(index.keys):
            for column, field in ((IMAGE, "image"), (MASK, "mask"), (META, "description")):
                file.seek(max(0, int(index.offset[row, column])))
                if (
                    index.size[row, column] >= 0
                    and zlib.crc32(file.read(int(index.size[row, column]))) != index.crc32[row, column]
                ):
                    raise UserError(
                        f"{path}: key {key!r}: the {field} differs from what was indexed. Copy the shard again."
                    )
    raise UserError(
        f"{path}: a tar header or padding differs from what was indexed; no image, mask or description does. Copy the "
        "shard again."
    )
