"""Tar shards read from end to end, to index them or to compare them with their index.

Damage that a streaming reader would pass over is refused here, by shard and member, before a run reads it.
"""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from multidomain_cct.data.shards.index import (
    FIELDS,
    IMAGE,
    MASK,
    META,
    ShardIndex,
    checked_index,
    index_path,
    with_notes_of,
)
from multidomain_cct.errors import UserError
from multidomain_cct.files.durable import file_sha256

_BLOCK = 512
_PIECE = 1 << 20
"""Most bytes of a shard that are in memory at a time."""
_LONGEST_NAME = 240
_EXECUTABLE = frozenset("dill exe gz joblib npy npz pickle pkl pt pth py pyc pyd sh so".split())
"""Parts of endings of files that other readers of shards would run or unpack."""
_AGAIN = "Make or copy the shard again."


@dataclass(frozen=True)
class Extensions:
    """Endings, after the key, of a sample's members, with or without the dot, in any case."""

    image: str = "jpg"
    mask: str = "png"
    meta: str = "json"

    @property
    def columns(self) -> dict[str, int]:
        """The index's column of each ending; an image's wins."""
        columns = {self.meta: META, self.mask: MASK, self.image: IMAGE}
        return {ending.lstrip(".").lower(): column for ending, column in columns.items()}


class _Tar(io.BufferedReader):
    """A tar whose headers cannot fill the memory: tarfile reads long names whole."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _PIECE:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def scan_shard(path: Path, *, extensions: Extensions | None = None, skipped: Counter[str] | None = None) -> ShardIndex:
    """Read a tar once and return its index. With `skipped`, folders, hidden files and members with other endings are
    passed over and counted there; without it they are refused.

    Raises UserError for a missing end marker, a damaged header, links, members that could be run, duplicate keys, keys
    that come back later, keys without an image, and descriptions that are not JSON.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such shard.")
    if not path.stat().st_size:
        raise UserError(f"{path} has 0 bytes; it is not a tar. {_AGAIN}")
    columns = (extensions or Extensions()).columns
    samples: dict[str, list[tuple[int, int, int]]] = {}
    """By key, for each column: offset, size, crc32."""
    previous = ""
    try:
        with _Tar(io.FileIO(path)) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member, key, column in _sample_members(path, tar, columns, skipped):
                if key != previous and key in samples:
                    raise UserError(f"{path}: the key {key!r} appears twice. Members of a sample are adjacent.")
                row = samples.setdefault(key, [(-1, -1, 0)] * 3)
                if row[column][0] >= 0:
                    raise UserError(f"{path}: the member {member.name!r} appears twice. {_AGAIN}")
                row[column] = (member.offset_data, member.size, _checked_content(path, file, member, column == META))
                previous = key
            _require_end_marker(path, file, tar.offset)
    except (tarfile.TarError, ValueError) as error:
        # ValueError: a header field that should be a number and is not.
        raise UserError(f"{path}: this is not an uncompressed tar file ({error}).") from None
    _require_images(path, samples, skipped or {}, columns)
    offset, size, crc32 = np.moveaxis(np.array(list(samples.values()), dtype=np.int64), 2, 0).copy()  # (n, 3) each
    return ShardIndex(tuple(samples), offset, size, crc32, path.stat().st_size, file_sha256(path), {})


def _sample_members(
    path: Path, tar: tarfile.TarFile, columns: dict[str, int], skipped: Counter[str] | None
) -> Iterator[tuple[tarfile.TarInfo, str, int]]:
    """Each member of a sample, with its key and column."""
    for member in tar:
        key, column = _key_and_column(path, member, columns)
        if column is not None:
            yield member, key, column
        elif skipped is not None:
            skipped[key] += 1
        else:
            allowed = ", ".join(f".{ending}" for ending in columns)
            raise UserError(f"{path}: the member {member.name!r} has the ending {key}; allowed: {allowed}.")


def _key_and_column(path: Path, member: tarfile.TarInfo, columns: dict[str, int]) -> tuple[str, int | None]:
    """A member's key and column; or what a member that is passed over is counted as, and None.

    As in WebDataset, the key ends at the first dot of the last part of the path.
    """
    name = member.name
    folder, _, base = name.rpartition("/")
    stem, dot, ending = base.partition(".")
    ending = ending.lower()
    if member.isdir():
        return "folder", None
    if not member.isreg() or member.issparse():
        raise UserError(f"{path}: the member {name!r} is not a regular file. Pack without links.")
    inside = not name.startswith("/") and ".." not in folder.split("/")
    if not dot or not inside or not name.isprintable() or len(name) > _LONGEST_NAME:
        raise UserError(
            f"{path}: the member {name[:80]!r} has no usable name; expected KEY.ENDING, relative, printable, of at "
            f"most {_LONGEST_NAME} characters."
        )
    if not _EXECUTABLE.isdisjoint(ending.split(".")) and ending not in columns:
        remedy = "which other readers may run. Pack without such files."
        raise UserError(f"{path}: the member {name!r} has the ending .{ending}, {remedy}")
    if not stem:
        return "hidden file", None
    column = columns.get(ending)
    return (f".{ending}" if column is None else str(PurePosixPath(folder, stem))), column


def _checked_content(path: Path, file: BinaryIO, member: tarfile.TarInfo, is_description: bool) -> int:
    """The crc32 of a member's content."""
    if not member.size:
        raise UserError(f"{path}: the member {member.name!r} is empty. {_AGAIN}")
    file.seek(member.offset_data)
    crc32, left, first = 0, member.size, b""
    for piece in _pieces(file, left):
        crc32, left, first = zlib.crc32(piece, crc32), left - len(piece), first or piece
    if left:
        raise UserError(f"{path}: the member {member.name!r} is cut off. {_AGAIN}")
    if is_description:
        _require_description(path, member.name, first)
    return crc32


def _pieces(file: BinaryIO, size: int) -> Iterator[bytes]:
    """At most so many bytes, piece by piece, until the file ends."""
    while size > 0 and (piece := file.read(min(size, _PIECE))):
        yield piece
        size -= len(piece)


def _require_description(path: Path, name: str, content: bytes) -> None:
    try:
        description = json.loads(content)
    except (ValueError, RecursionError):
        raise UserError(f"{path}: the member {name!r} is not valid JSON of at most 1 MiB.") from None
    if not isinstance(description, dict):
        found = type(description).__name__
        raise UserError(f"{path}: the member {name!r} holds {found}; a description is a JSON object.")


def _require_end_marker(path: Path, file: BinaryIO, end: int) -> None:
    file.seek(end)
    length = 0
    for piece in _pieces(file, path.stat().st_size):
        length += len(piece)
        if piece.strip(b"\0"):
            raise UserError(f"{path}: the bytes after {end} are not a tar header; the shard is damaged there. {_AGAIN}")
    if length < 2 * _BLOCK:
        raise UserError(f"{path}: the end marker is missing after byte {end}; the shard may be cut off. {_AGAIN}")


def _require_images(
    path: Path, samples: Mapping[str, Any], skipped: Mapping[str, int], columns: dict[str, int]
) -> None:
    """Raises UserError for a key without an image, and when there is no key."""
    ending = next(ending for ending, column in columns.items() if column == IMAGE)
    lacking = next((f"the key {key!r} has no image" for key, row in samples.items() if row[IMAGE][0] < 0), "")
    if lacking or not samples:
        others = "".join(f", {count} x {other}" for other, count in skipped.items())
        found = f" Passed over{others[1:]}." if others else ""
        raise UserError(
            f"{path}: {lacking or 'the shard holds no samples'} (.{ending}).{found} Add it, or choose another --image."
        )


def index_shard(path: Path, *, extensions: Extensions | None = None, skipped: Counter[str] | None = None) -> ShardIndex:
    """Build the index beside a shard, as `scan_shard` does. Notes of an earlier index are kept if the contents are the
    same.
    """
    index = with_notes_of(index_path(path), scan_shard(path, extensions=extensions, skipped=skipped))
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
            for column, field in enumerate(FIELDS):
                size, crc32 = int(index.size[row, column]), 0
                file.seek(max(0, int(index.offset[row, column])))
                for piece in _pieces(file, size):
                    crc32 = zlib.crc32(piece, crc32)
                if size >= 0 and crc32 != index.crc32[row, column]:
                    where = f"{path}: key {key!r}"
                    raise UserError(f"{where}: the {field} differs from what was indexed. Copy the shard again.")
    raise UserError(f"{path}: a tar header or padding differs from what was indexed. Copy the shard again.")
