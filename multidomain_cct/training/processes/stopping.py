"""Stopping on request.

SIGTERM, by which schedulers and launchers announce the end, lets a run finish its step, save, and end.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from types import FrameType, TracebackType

import torch
from accelerate import Accelerator

STOPPED = 128 + signal.SIGTERM
"""Exit code of a run that was asked to stop: what a shell reports of a process that SIGTERM ended, so that schedulers
count it as that.
"""
REPEATS_SECONDS = 5.0
"""Signals that follow the first one this closely are the same request: a scheduler tells every process, and torchrun
tells its processes again.
"""


class RunStopped(Exception):
    """The run was asked to stop and has saved. The message is one line."""


class StopRequest:
    """Whether the run was asked to stop. Inside the context SIGTERM is noted; a second one, after REPEATS_SECONDS, ends
    the process at once.

    Loader processes ignore the signal, which a scheduler sends to them too: the last batches would die with them.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.requested = False

    def agreed(self) -> bool:
        """Whether any process of the run was asked to stop: the same answer in all of them, which all have to ask at
        the same point.
        """
        if self.accelerator.num_processes == 1:
            return self.requested
        flag = torch.tensor([float(self.requested)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum").item())

    def __enter__(self) -> StopRequest:
        # Python gives signals to the main thread alone.
        self._listens = threading.current_thread() is threading.main_thread()
        if self._listens:
            self._reader, self._writer = socket.socketpair()
            self._writer.setblocking(False)
            self._earlier_handler = signal.signal(signal.SIGTERM, self._note)
            self._earlier_file = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=_end_at_the_second, args=(self._reader,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._listens:
            signal.set_wakeup_fd(self._earlier_file)
            signal.signal(signal.SIGTERM, self._earlier_handler)
            self._writer.send(b"\0")
            self._writer.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True


def _end_at_the_second(signals: socket.socket) -> None:
    """In a thread of its own, which runs also while the main one waits inside a kernel or for another process."""
    first: float | None = None
    with signals:
        while (number := signals.recv(1)) not in (b"", b"\0"):
            if number[0] != signal.SIGTERM:
                continue
            first = time.monotonic() if first is None else first
            if time.monotonic() - first > REPEATS_SECONDS:
                os.write(
                    2,
                    b"error: ended at once by a second SIGTERM. The run goes on from its last checkpoint with "
                    b"resume=auto.\n",
                )
                os._exit(STOPPED)
