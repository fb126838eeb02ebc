"""A folder that one process writes at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from multidomain_cct.errors import UserError
from multidomain_cct.files.durable import make_folder


@contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Keep other processes out of a folder, which need not exist. `what` names what this one does, such as `packing`.

    The lock is a hidden file beside the folder. The kernel releases it when the process dies, and forked processes do
    not inherit it. Raises UserError, with process and host, when another process has it. A file system without locks
    is used without one.
    """
    make_folder(folder.resolve().parent)
    path = folder.resolve().with_name(f".{folder.resolve().name[:200]}.lock")
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                holder = file.read() or "another process"
                file.close()
                raise UserError(f"{folder} is in use by {holder}. Wait until that ends, or write elsewhere.") from None
        # Whoever had it may have removed the file since it was opened here.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()
    with file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} ({what})")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
