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
from rich.table import Column, Table

from multidomain_cct import __version__
from multidomain_cct.data.batches.loader import Batch
from multidomain_cct.files.durable import replace_text
from multidomain_cct.files.printable import printable


class RunLog:
    """Records the metrics of a run and shows its progress. Only the first process of a run has it `enabled`."""

    def __init__(
        self, folder: Path, first_step: int, num_steps: int, *, enabled: bool = True, scored: bool = True
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
        kept = [line for line in read_metrics(path) if line["step"] <= first_step]
        if not scored:
            kept = [line for line in kept if line["step"] < first_step or "val/mean_miou" not in line]
        replace_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")
        if self.console.is_terminal:
            width = self.console.width
            columns = (BarColumn(bar_width=10), TimeRemainingColumn())[width < 100 :]
            # A narrow terminal cuts the losses, which come last.
            losses = TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1))
            count = TextColumn("{task.completed}/{task.total}", table_column=Column(no_wrap=True))
            self._progress = Progress(count, *columns, losses, console=self.console, expand=True)
            self._width = width - (2 * len(str(num_steps)) + 2) - (8 if width < 100 else 19)
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
        """Append one line, with the seconds since this start. Numbers that are not finite become null, for JSON."""
        if self.enabled:
            finite = {key: value if math.isfinite(value or 0) else None for key, value in values.items()}
            clock = {"sys/wall_s": round(time.monotonic() - self._started, 1)}
            self._file.write(json.dumps({"step": step} | finite | clock) + "\n")
            self._file.flush()

    def advance(self, step: int, window: Window, device: torch.device, *, plain: bool) -> None:
        """Show where the run is: the live line always, a plain line when asked."""
        if not self.enabled:
            return
        if self._progress is not None:
            text = window.text(device, self._width)
            self._progress.update(self._task, completed=step, description=escape(text))
        elif plain:
            seconds = int((time.monotonic() - self._started) / (step - self.first_step) * (self.num_steps - step))
            left = f"{seconds // 60}:{seconds % 60:02d}"
            self.console.print(f"step {step}/{self.num_steps}  ETA {left}  {window.text(device)}", markup=False)

    def notice(self, text: str, style: str = "") -> None:
        """Lines that stay."""
        if self.enabled:
            lines = "\n".join(printable(line) for line in text.split("\n"))
            self.console.print(lines, markup=False, style=style)

    def warning(self, text: str) -> None:
        """A line that stays, in colour."""
        self.notice(text, "yellow")

    def show(self, table: Table) -> None:
        """A table, at the terminal's width, or at one that suits a file."""
        if self.enabled:
            console = self.console if self.console.is_terminal else Console(width=120)
            console.print(table, soft_wrap=False)


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

    def text(self, device: torch.device, width: int | None = None) -> str:
        """Speed, waiting for data, memory, and the losses by domain: as much as `width` columns hold, every domain."""
        domains: dict[str, dict[str, float]] = defaultdict(dict)
        for term, total in self.sums.items():
            name, _, loss = term.partition("/")
            domains[name][loss[:3]] = total / self.counts[term]
        values = self.metrics(device)
        speed = (
            f"{values['sys/images_per_s']:.1f} img/s  wait {values['sys/data_wait_fraction']:.0%}  "
            f"{values['sys/peak_mib']:.0f} MiB"
        )
        each = {
            name: " ".join(f"{loss} {value:.3f}" for loss, value in terms.items()) for name, terms in domains.items()
        }
        losses = " | ".join(f"{name} {terms}" for name, terms in each.items())
        sums = {name: sum(terms.values()) for name, terms in domains.items()}
        short = " | ".join(f"{name} {value:.3f}" for name, value in sums.items())
        fits = (text for text in (f"{speed}  {losses}", losses, short) if width is None or len(text) <= width)
        letters = max(1, (width or 0) // max(1, len(sums)) - 6)
        return next(fits, " ".join(f"{name[:letters]} {value:.2f}" for name, value in sums.items()))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl but those that are cut or damaged; none without a file."""
    lines = []
    for text in path.read_bytes().splitlines() if path.is_file() else []:
        with suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                lines.append(line)
    return lines


def peak_mib(device: torch.device) -> float:
    """Largest memory that the process has used so far: the GPU's, or resident without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    scale = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's architecture and cores."""
    on_gpu = device.type == "cuda"
    return torch.cuda.get_device_name(device) if on_gpu else f"{platform.machine()} CPU, {os.cpu_count()} cores"


def environment(command: str, device: torch.device, world: int) -> dict[str, Any]:
    """Command, hardware and versions of a start, for env.json."""
    packages = ("torch", "torchvision", "timm", "accelerate", "webdataset", "numpy", "pillow")
    return {
        "command": command,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        "processes": world,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {"multidomain_cct": __version__} | {name: version(name) for name in packages},
    }
