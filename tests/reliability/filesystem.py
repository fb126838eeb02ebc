"""What a writer did to a folder, operation by operation, and what a loss of power could have left of it.

A file operation is anything that Python's audit hooks or `os.fsync` see. Before each one the recorder notes how the
folder has changed; a write by a library shows at the next one. The model of the disk: names change in the order in
which they were changed, and of what was not synced any last part may be lost; contents that were not synced may be lost
or cut.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod"}
Tree = dict[str, tuple[int, bytes | None]]
"""Path in the folder -> (inode, contents, or None for a folder)."""


@dataclass
class Recorder:
    """Calls `before` ahead of each file operation in `folder` while it is on.

    Audit hooks stay for the life of a process: use it in one of its own.
    """

    folder: Path
    before: Callable[[str, str], None]
    on: bool = False
    _inside: bool = field(default=False, repr=False)

    def install(self) -> None:
        sys.addaudithook(self._audit)
        fsync = os.fsync

        def synced(descriptor: int) -> None:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            self._note("fsync", path)
            fsync(descriptor)

        os.fsync = synced

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if (
            not self.on
            or event not in CHANGES
            or self._inside
            or not arguments
            or not isinstance(arguments[0], (str, bytes, os.PathLike))
        ):
            return
        if event == "open" and not _writes(arguments):
            return
        self._note(event, os.path.join(os.getcwd(), os.fsdecode(arguments[0])))

    def _note(self, event: str, path: str) -> None:
        # rmtree names what it removes within a folder that it holds open.
        within = Path(path).is_relative_to(self.folder) or event in ("os.remove", "os.rmdir")
        if not self.on or self._inside or not within:
            return
        self._inside = True
        try:
            self.before(event, path)
        finally:
            self._inside = False


def _writes(arguments: tuple[Any, ...]) -> bool:
    return bool(arguments[2] & (os.O_WRONLY | os.O_RDWR)) if isinstance(arguments[2], int) else True


def tree_of(folder: Path) -> Tree:
    """Everything in a folder."""
    found: Tree = {}
    for path in sorted(folder.rglob("*")):
        found[str(path.relative_to(folder))] = (path.stat().st_ino, None if path.is_dir() else path.read_bytes())
    return found


@dataclass(frozen=True)
class Moment:
    """The folder ahead of one operation."""

    tree: Tree
    synced: str
    """Path in the folder that the operation syncs, `.` for the folder itself; empty for any other operation."""
    acknowledged: int
    """The last step whose save had returned; 0 before the first."""


def after_power_loss(moments: list[Moment]) -> list[tuple[Tree, int]]:
    """Every state of the disk that a loss of power at any of the moments could leave, with the last step that had been
    acknowledged by then.
    """
    found: dict[tuple[Any, ...], tuple[Tree, int]] = {}
    durable = 0
    # A new file may bear the number of one that is gone.
    contents: set[tuple[int, bytes | None]] = set()
    for now, moment in enumerate(moments):
        for shown in range(durable, now + 1):
            for lost in (None, b"", "half"):
                tree: Tree = {}
                for path, (inode, content) in moments[shown].tree.items():
                    if content is not None and (inode, content) not in contents and lost is not None:
                        content = content[: len(content) // 2] if lost == "half" else lost
                    tree[path] = (inode, content)
                key = (moment.acknowledged, *((path, content) for path, (_, content) in tree.items()))
                found[key] = (tree, moment.acknowledged)
        if moment.synced:
            path = moment.synced
            if path == "." or moment.tree[path][1] is None:
                # With the names in one folder, those that were changed before them have reached the disk.
                if _changed_in(path, moments[durable].tree, moment.tree):
                    durable = now
            else:
                contents.add(moment.tree[path])
    return list(found.values())


def _changed_in(folder: str, before: Tree, after: Tree) -> bool:
    def names(tree: Tree) -> set[tuple[str, int]]:
        return {
            (path, inode)
            for path, (inode, _) in tree.items()
            if os.path.dirname(path) == ("" if folder == "." else folder)
        }

    return names(before) != names(after)


def lay_out(tree: Tree, folder: Path) -> None:
    """Make the folder as the tree says."""
    folder.mkdir(parents=True)
    for path, (_, content) in sorted(tree.items()):
        if content is None:
            (folder / path).mkdir(parents=True, exist_ok=True)
        else:
            (folder / path).write_bytes(content)
