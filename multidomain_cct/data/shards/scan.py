"""Tar shards read from end to end, to index them or to compare them with their index.

Whatever a streaming reader would skip silently is refused here, by shard and member, before a run reads it.
"""

from __future__ import annotations

import json
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from multidomain_cct.data.shards.index import IMAGE, MASK, META, ShardIndex, checked_index, index_path, with_notes_of
from multidomain_cct.errors import UserError
from multidomain_cct.files.durable import file_sha256

_BLOCK = 512
_LONGEST_NAME = 240
_AGAIN = "Make or copy the shard again."


@dataclass(frozen=True)
class Extensions:
    """Endings, after the key, of a sample's members."""

    image: str = "jpg"
    mask: str = "png"
    meta: str = "json"


def scan_shard(path: Path, *, extensions: Extensions | None = None, notes: dict[str, Any] | None = None) -> ShardIndex:
    """Read a tar once and return its index.

    Raises UserError for a missing end marker, a damaged header, members that are not regular files, unknown members,
    duplicate keys, keys that come back later, samples without an image, and descriptions that are not JSON.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such shard.")
    endings = extensions or Extensions()
    columns = {endings.image: IMAGE, endings.mask: MASK, endings.meta: META}
    samples: dict[str, list[tuple[int, int, int]]] = {}
    """By key, for each column: offset, size, crc32."""
    previous, end = "", 0
    try:
        with path.open("rb") as file:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    key, column = _key_and_column(path, member.name, columns)
                    content = _content(path, file, member)
                    if key != previous and key in samples:
                        raise UserError(f"{path}: the key {key!r} appears twice. Members of a sample are adjacent.")
                    row = samples.setdefault(key, [(-1, -1, 0)] * 3)
                    if row[column][0] >= 0:
                        raise UserError(f"{path}: the member {member.name!r} appears twice. {_AGAIN}")
                    if column == META:
                        _require_description(path, member.name, content)
                    row[column] = (member.offset_data, len(content), zlib.crc32(content))
                    previous, end = key, member.offset_data + -(-member.size // _BLOCK) * _BLOCK
            file.seek(end)
            _require_end_marker(path, file.read(), end)
    except (tarfile.TarError, ValueError) as error:
        # ValueError: a header field that should be a number and is not.
        raise UserError(f"{path}: this is not an uncompressed tar file ({error}).") from None
    if not samples:
        raise UserError(f"{path}: the shard holds no samples.")
    for key, row in samples.items():
        if row[IMAGE][0] < 0:
            raise UserError(f"{path}: the key {key!r} has no image (.{endings.image}). Add it, or remove the key.")
    offset, size, crc32 = np.moveaxis(np.array(list(samples.values()), dtype=np.int64), 2, 0).copy()  # (n, 3) each
    return ShardIndex(tuple(samples), offset, size, crc32, path.stat().st_size, file_sha256(path), notes or {})


def _key_and_column(path: Path, name: str, columns: dict[str, int]) -> tuple[str, int]:
    """A member's key and column. As in WebDataset, the key ends at the first dot of the last part of the path."""
    folder, _, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    inside = not name.startswith("/") and ".." not in folder.split("/")
    if not stem or not dot or not inside or not name.isprintable() or len(name) > _LONGEST_NAME:
        raise UserError(
            f"{path}: the member {name[:80]!r} has no usable name; expected KEY.ENDING, relative, printable, of at "
            f"most {_LONGEST_NAME} characters."
        )
    if extension.lower() not in columns:
        raise UserError(
            f"{path}: the member {name!r} has the ending .{extension.lower()}; allowed: "
            f"{', '.join(f'.{ending}' for ending in columns)}. Choose others with --image, --mask."
        )
    return (f"{folder}/{stem}" if folder else stem), columns[extension.lower()]


def _content(path: Path, file: BinaryIO, member: tarfile.TarInfo) -> bytes:
    if not member.isreg() or member.issparse():
        raise UserError(f"{path}: the member {member.name!r} is not a regular file. Pack without links and folders.")
    file.seek(member.offset_data)
    content = file.read(member.size)
    if len(content) < member.size:
        raise UserError(f"{path}: the member {member.name!r} is cut off. {_AGAIN}")
    if not content:
        raise UserError(f"{path}: the member {member.name!r} is empty. {_AGAIN}")
    return content


def _require_description(path: Path, name: str, content: bytes) -> None:
    try:
        description = json.loads(content)
    except (ValueError, RecursionError):
        raise UserError(f"{path}: the member {name!r} is not valid JSON; a description is a JSON object.") from None
    if not isinstance(description, dict):
        found = type(description).__name__
        raise UserError(f"{path}: the member {name!r} holds {found}; a description is a JSON object.")


def _require_end_marker(path: Path, tail: bytes, end: int) -> None:
    if tail.strip(b"\0"):
        raise UserError(f"{path}: the bytes after {end} are not a tar header, so the shard is damaged there. {_AGAIN}")
    if len(tail) < 2 * _BLOCK:
        raise UserError(f"{path}: the end marker is missing after byte {end}; the shard may be cut off. {_AGAIN}")


def index_shard(path: Path, *, extensions: Extensions | None = None) -> ShardIndex:
    """Build the index beside a shard. Notes of an earlier index are kept if the contents are the same."""
    index = with_notes_of(index_path(path), scan_shard(path, extensions=extensions))
    index.save(index_path(path))
    return index


def verify_shard(path: Path) -> ShardIndex:
    """Read the whole shard and return its index.

    Raises UserError, naming the first difference, when any byte differs from the indexed ones, headers and padding
    included.
    """
    index = checked_index(path)
    if file_sha256(path) == index.shard_sha256:
        return index
    with path.open("rb") as file:
        for row, key in enumerate(index.keys):
            for column, field in ((IMAGE, "image"), (MASK, "mask"), (META, "description")):
                size = int(index.size[row, column])
                file.seek(max(0, int(index.offset[row, column])))
                if size >= 0 and zlib.crc32(file.read(size)) != index.crc32[row, column]:
                    where = f"{path}: key {key!r}"
                    raise UserError(f"{where}: the {field} differs from what was indexed. Copy the shard again.")
    raise UserError(f"{path}: a tar header or padding differs from what was indexed. Copy the shard again.")
