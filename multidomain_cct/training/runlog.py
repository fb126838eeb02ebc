"""The log of a run: metrics.jsonl, one live line (plain lines outside a terminal), and its environment."""

from __future__ import annotations

import json
import math
import os
import platform
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from multidomain_cct import __version__
from multidomain_cct.data.batches.loader import Batch
from multidomain_cct.files.durable import replace_text
from multidomain_cct.files.printable import printable


class RunLog:
    """Records the metrics of a run and shows its progress. Only the first process of a run has it `enabled`."""

    def __init__(
        self, folder: Path, *, first_step: int, num_steps: int, enabled: bool = True, scored: bool = True
    ) -> None:
        """Drops what an interrupted run logged after `first_step`, its last checkpoint, and the scores of `first_step`
        itself unless it is `scored`.
        """
        self.enabled, self.num_steps, self.first_step = enabled, num_steps, first_step
        self.console = Console(highlight=False, soft_wrap=True)
        self._started = time.monotonic()
        self._progress: Progress | None = None
        if not enabled:
            return
        path = folder / "metrics.jsonl"
        kept = [line for line in read_metrics(path) if line["step"] <= first_step] if path.is_file() else []
        if not scored:
            kept = [line for line in kept if line["step"] < first_step or "val/mean_miou" not in line]
        replace_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")
        if self.console.is_terminal:
            # A narrow terminal cuts the losses, which come last.
            whole = Column(no_wrap=True, min_width=max(7, 2 * len(str(num_steps)) + 1))
            cut = Column(no_wrap=True, overflow="ellipsis", ratio=1)
            self._progress = Progress(
                TextColumn("{task.completed}/{task.total}", table_column=whole),
                BarColumn(bar_width=10),
                TimeRemainingColumn(table_column=whole.copy()),
                TextColumn("{task.description}", table_column=cut),
                console=self.console,
                expand=True,
            )
            self._task = self._progress.add_task("starting", total=num_steps, completed=first_step)

    def __enter__(self) -> RunLog:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self.enabled:
            self._file.close()

    def metrics(self, step: int, values: Mapping[str, float | None]) -> None:
        """Append one line; numbers that are not finite are written as null, which JSON can hold."""
        if self.enabled:
            finite = {key: value if math.isfinite(value or 0) else None for key, value in values.items()}
            self._file.write(json.dumps({"step": step} | finite) + "\n")
            self._file.flush()

    def advance(self, step: int, text: str, *, plain: bool) -> None:
        """Show where the run is: the live line always, a plain line when asked."""
        if not self.enabled:
            return
        if self._progress is not None:
            self._progress.update(self._task, completed=step, description=escape(text))
        elif plain:
            seconds = (time.monotonic() - self._started) / max(1, step - self.first_step) * (self.num_steps - step)
            self.console.print(
                f"step {step}/{self.num_steps}  ETA {int(seconds) // 60}:{int(seconds) % 60:02d}  {text}", markup=False
            )

    def notice(self, text: str) -> None:
        """One line that stays."""
        if self.enabled:
            self.console.print(printable(text), markup=False)


class Window:
    """Sums since the last line of metrics."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.sums: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)
        self.images = self.skipped = 0
        self.waited = 0.0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave the time between two steps (evaluation, saving) out of the rates."""
        self.started = time.perf_counter()
        self.images, self.waited = 0, 0.0

    def timed_next(self, micro_batches: Iterator[dict[str, Batch]]) -> dict[str, Batch]:
        """The next micro-batch; the time that it takes is counted as waiting."""
        before = time.perf_counter()
        batches = next(micro_batches)
        self.waited += time.perf_counter() - before
        return batches

    def add(self, losses: Mapping[str, float], num_images: int) -> None:
        """Count the losses of a micro-batch, and the images that this process saw in it."""
        for term, value in losses.items():
            self.sums[term] += value
            self.counts[term] += 1
        self.images += self.world * num_images

    def metrics(self, device: torch.device) -> dict[str, float]:
        """What goes into metrics.jsonl: mean losses and the run's speed."""
        seconds = max(1e-9, time.perf_counter() - self.started)
        losses = {f"train/{term}": total / self.counts[term] for term, total in self.sums.items()}
        speed = {
            "sys/images_per_s": self.images / seconds,
            "sys/peak_mib": peak_mib(device),
            "sys/data_wait_fraction": self.waited / seconds,
        }
        return losses | speed | {"sys/skipped_steps": self.skipped}

    def text(self, device: torch.device) -> str:
        """Speed, waiting for data, memory, and the losses by domain."""
        domains: dict[str, list[str]] = defaultdict(list)
        for term, total in self.sums.items():
            name, _, loss = term.partition("/")
            domains[name].append(f"{loss[:3]} {total / self.counts[term]:.3f}")
        values = self.metrics(device)
        losses = " | ".join(f"{name} {' '.join(terms)}" for name, terms in domains.items())
        return (
            f"{values['sys/images_per_s']:.1f} img/s  wait {values['sys/data_wait_fraction']:.0%}  "
            f"{values['sys/peak_mib']:.0f} MiB  {losses}"
        )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl but one that a crash has cut."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):
            lines.append(json.loads(text))
    return lines


def peak_mib(device: torch.device) -> float:
    """Largest memory that the process has used so far: the GPU's, or resident without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    scale = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def environment(command: str, device: torch.device, world: int) -> dict[str, Any]:
    """Command, hardware and versions of a start, for env.json."""
    packages = ("torch", "torchvision", "timm", "accelerate", "webdataset", "numpy", "pillow")
    on_gpu, cpu = device.type == "cuda", f"{platform.machine()} CPU, {os.cpu_count()} cores"
    return {
        "command": command,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if on_gpu else cpu,
        "processes": world,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {"multidomain_cct": __version__} | {name: version(name) for name in packages},
    }
