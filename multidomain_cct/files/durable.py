"""Files that survive a crash: when a function here returns, contents and names are on the disk."""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, names on the disk included.

    Raises NotADirectoryError where a file has the name.
    """
    if not folder.is_dir():
        make_folder(folder.parent)
        try:
            folder.mkdir(exist_ok=True)
        except FileExistsError:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from None
        sync(folder.parent)


def write_text(path: Path, text: str) -> None:
    """Write a file and put its contents on the disk; its name follows when the folder is synced."""
    with _naming(path):
        path.write_text(text, encoding="utf-8")
    sync(path)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file and put its contents on the disk. Raises OSError when the disk does not take it."""
    # Here, so that packing and indexing start without torch.
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path)
    except SafetensorError as error:
        # The library reports the operating system's error only as text.
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
    # safetensors creates files that only their owner may read, but teams share runs.
    path.chmod(0o644)
    sync(path)


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A temporary path in the same folder. The file written there replaces `path` when the block ends, and is removed
    when the block raises.

    A crash leaves the old file or the new one. Without `durable`, which waits for the disk, that holds for a crash of
    the program, not of the machine.
    """
    # Part of the name only: file systems limit a name to 255 bytes.
    temporary = path.with_name(f".{path.name[:40]}.{os.getpid()}.tmp")
    try:
        with _naming(path):
            yield temporary
        if durable:
            sync(temporary)
        os.replace(temporary, path)
        if durable:
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Replace a file by UTF-8 text. Lone surrogates, from file names that are not UTF-8, become escapes."""
    with replacing(path) as temporary, _naming(temporary):
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))


def file_sha256(path: Path) -> str:
    """Hex digest of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file's contents, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with _naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Add the path to errors, which the operating system omits for open files."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None
