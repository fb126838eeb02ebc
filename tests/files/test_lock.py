"""One process at a time writes a folder."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from multidomain_cct.errors import UserError
from multidomain_cct.files.lock import locked


def hold(folder: Path, ready: Connection) -> None:
    with locked(folder, "packing"):
        # It must not outlive its parent's lock: a forked process of a killed one holds nothing.
        multiprocessing.get_context("fork").Process(target=time.sleep, args=(5,), daemon=True).start()
        ready.send(None)
        time.sleep(60)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_folder_in_use_is_refused_with_process_and_host_until_that_ends(tmp_path: Path, end: int) -> None:
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    holder = context.Process(target=hold, args=(tmp_path / "new", theirs))
    holder.start()
    mine.recv()
    with pytest.raises(UserError) as refused, locked(tmp_path / "new", "packing"):
        pass
    for part in (str(tmp_path / "new"), f"process {holder.pid}", socket.gethostname(), "packing", "Wait"):
        assert part in str(refused.value)
    with locked(tmp_path / "other", "packing"):
        pass
    os.kill(holder.pid or 0, end)
    holder.join()
    with locked(tmp_path / "new", "packing"):
        assert not (tmp_path / "new").exists()
    assert list(tmp_path.iterdir()) == []
