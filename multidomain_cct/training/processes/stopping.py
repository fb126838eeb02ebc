"""Stopping on request: SIGTERM, with which schedulers and launchers announce the end, and Ctrl-C let a run finish its
step, save and end.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Sequence
from types import FrameType

import torch
from accelerate import Accelerator

from multidomain_cct.training.processes.failures import GO_ON

SIGNALS = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}
REPEATS_SECONDS = 5.0
"""Signals within this time of the first are the same request: a scheduler signals every process, and torchrun signals
its processes again. Without a launcher every Ctrl-C counts.
"""


class RunStopped(Exception):
    """The run was asked to stop and has saved. The message is one line."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class StopRequest:
    """Whether the run was asked to stop. Inside the context the signal is noted; a second one ends the process at once.

    Ctrl-C is noted only while `training` is set; before that it interrupts as usual. Loader processes ignore both
    signals, which reach them too: the last batches would die with them.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.training = False
        self.signal = 0
        """The signal that asked this process, or another one in a request that all know of; 0: none."""

    @property
    def flags(self) -> list[float]:
        """This process's request as numbers to add up over the processes, for `agree`."""
        return [float(self.signal == number) for number in SIGNALS]

    def agree(self, total: Sequence[float]) -> bool:
        """Whether any process was asked to stop: the same answer in all, from the sum (or mean) of their flags."""
        for number, asked in zip(SIGNALS, total, strict=True):
            if asked and not self.signal:
                self.signal = number
        return any(total)

    def agreed(self) -> bool:
        """The same with a collective of its own, which all processes have to reach."""
        if self.accelerator.num_processes == 1:
            return bool(self.signal)
        flags = torch.tensor(self.flags, device=self.accelerator.device)
        return self.agree(self.accelerator.reduce(flags, reduction="sum").tolist())

    def stopped(self, step: int) -> RunStopped:
        """What to raise once the step is saved."""
        name = SIGNALS[signal.Signals(self.signal)]
        return RunStopped(f"stopped after step {step}, as {name} asked, and saved. {GO_ON}", 128 + self.signal)

    def __enter__(self) -> StopRequest:
        # Python gives signals to the main thread alone.
        self._listens = threading.current_thread() is threading.main_thread()
        if self._listens:
            reader, self._writer = socket.socketpair()
            self._writer.setblocking(False)
            # Who starts a run in the background may have had Ctrl-C ignored in it.
            heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._earlier = {number: signal.signal(number, self._note) for number in heard}
            self._earlier_file = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=_end_at_the_second, args=(reader,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._listens:
            signal.set_wakeup_fd(self._earlier_file)
            for number, handler in self._earlier.items():
                signal.signal(number, handler)
            self._writer.send(b"\0")
            self._writer.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and not self.training:
            raise KeyboardInterrupt
        self.signal = self.signal or number


def _end_at_the_second(signals: socket.socket) -> None:
    """In a thread of its own, which also runs while the main one waits inside a kernel or for another process."""
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1 or "TORCHELASTIC_RUN_ID" in os.environ
    first: dict[int, float] = {}
    with signals:
        while (received := signals.recv(1)) not in (b"", b"\0"):
            number = received[0]
            if number in SIGNALS:
                since = time.monotonic() - first.setdefault(number, time.monotonic())
                if since > (REPEATS_SECONDS if launched or number == signal.SIGTERM else 0):
                    name = SIGNALS[signal.Signals(number)]
                    os.write(2, f"error: ended at once by a second {name}. {GO_ON}\n".encode())
                    os._exit(128 + number)
