"""How fast a CCT step is, and how much memory it takes, beside the plain implementation of the same formulas (benchmarks/plain_cct.py).

python benchmarks/step.py [--encoder resnet18] [--context fpn] [--stride 8] [--width 128] [--decoder pixelshuffle] [--crop 128] [--batch 2]
                          [--copies 1] [--classes 21] [--domains 1] [--steps 3] [--device cpu] [--threads 1] [--json]

A step is forward, backward and SGD on drawn images. The plain one sends labelled and unlabelled images through the encoder in two passes, holds the logits
of all K auxiliary decoders until its one backward pass, and keeps torch's default memory format; the networks start from the same weights. `--copies` is how
many auxiliary decoders there are of each of the seven perturbations.

Two processes, one for each, take turns step by step, so that neither runs while the other is timed; medians are compared. Memory is the peak of the resident
set (on a GPU: of torch's allocations) in a process that does nothing else; what it holds before the first step is given apart.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import platform
import resource
import statistics
import time
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

WHICH = ("plain", "ours")
MIB = 2**20


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--context", default="fpn")
    parser.add_argument("--stride", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--decoder", default="pixelshuffle")
    parser.add_argument("--crop", type=int, default=128, help="side in pixels")
    parser.add_argument("--batch", type=int, default=2, help="labelled images of a domain, and as many unlabelled ones")
    parser.add_argument("--copies", type=int, default=1, help="auxiliary decoders of each of the seven perturbations: K = 7 x copies")
    parser.add_argument("--classes", type=int, default=21)
    parser.add_argument("--domains", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each, after one that is not")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "1")))
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def build(options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The network and one step's batches, the same in every process."""
    # torch is imported by the processes that need it only: their memory is what is measured.
    import torch

    from multidomain_cct.data.loader import Batch
    from multidomain_cct.methods.cct import CCT
    from multidomain_cct.model.encoder import EncoderSettings
    from multidomain_cct.model.network import Task
    from multidomain_cct.model.perturbations import (
        AdversarialNoise,
        ContextMask,
        Dropout,
        FeatureDrop,
        FeatureNoise,
        GuidedCutout,
        ObjectMask,
        Perturbations,
    )

    n = options.copies
    mix = Perturbations(FeatureNoise(n), FeatureDrop(n), Dropout(n), ObjectMask(n), ContextMask(n), GuidedCutout(n), AdversarialNoise(n))
    task = Task(tuple(number % 2 == 1 for number in range(options.classes)), perturbations=tuple(mix.each()))
    encoder = EncoderSettings(name=options.encoder, stride=options.stride, context=options.context, width=options.width)
    names = [f"domain_{number}" for number in range(options.domains)]
    model = CCT(encoder, {name: task for name in names}, decoder=options.decoder).to(options.device)
    generator, size = torch.Generator().manual_seed(0), (options.batch, options.crop, options.crop)
    batches = {}
    for name in names:
        labelled, unlabelled = torch.randint(0, 256, (2, options.batch, 3, *size[1:]), dtype=torch.uint8, generator=generator)
        masks = torch.randint(0, options.classes, size, dtype=torch.uint8, generator=generator)
        batches[name] = Batch(labelled, masks, unlabelled, torch.ones(size, dtype=torch.bool)).to(torch.device(options.device))
    return model, batches


def plain_step_losses() -> Any:
    path = Path(__file__).with_name("plain_cct.py")
    spec = importlib.util.spec_from_file_location("plain_cct", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.step_losses


def serve(which: str, options: argparse.Namespace, pipe: Connection) -> None:
    """Take a step whenever asked and answer with its seconds; at the end with the memory in MiB, before the first step and at its peak."""
    import torch

    torch.set_num_threads(options.threads)
    on_gpu = options.device.startswith("cuda")
    model, batches = build(options)
    if which == "plain":
        model.to(memory_format=torch.contiguous_format)
        step_losses = plain_step_losses()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step(number: int) -> float:
        torch.manual_seed(number)
        started = time.perf_counter()
        losses = step_losses(model, batches, 1.0, passes="two") if which == "plain" else model(batches, 1.0)
        torch.stack(list(losses.values())).sum().backward()
        optimiser.step()
        optimiser.zero_grad()
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def peak() -> float:
        return torch.cuda.max_memory_allocated() / MIB if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    before = peak()
    pipe.send(None)
    while (number := pipe.recv()) is not None:
        pipe.send(step(number))
    pipe.send((before, peak()))


class Worker:
    """A process that takes steps of one kind."""

    def __init__(self, which: str, options: argparse.Namespace) -> None:
        # spawn: a child of fork would start with this process's memory, and with whatever torch has running.
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(which, options, other), daemon=True)
        self.process.start()
        other.close()
        self.pipe.recv()

    def step(self, number: int) -> float:
        """Seconds."""
        self.pipe.send(number)
        found: float = self.pipe.recv()
        return found

    def stop(self) -> tuple[float, float]:
        """Memory in MiB, before the first step and at its peak."""
        self.pipe.send(None)
        found: tuple[float, float] = self.pipe.recv()
        self.process.join()
        return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    workers = {which: Worker(which, options) for which in WHICH}
    seconds: dict[str, list[float]] = {which: [] for which in WHICH}
    for number in range(options.steps + 1):
        for which in WHICH if number % 2 else WHICH[::-1]:
            taken = workers[which].step(number)
            if number:
                seconds[which].append(taken)
    memory = {which: worker.stop() for which, worker in workers.items()}
    return {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {options.threads} threads, {options.device}",
        "settings": {key: value for key, value in vars(options).items() if key != "json"},
        "auxiliary_decoders": 7 * options.copies,
        **{f"{which}_s": statistics.median(seconds[which]) for which in WHICH},
        **{f"{which}_all_s": seconds[which] for which in WHICH},
        "plain_over_ours": statistics.median(p / o for p, o in zip(seconds["plain"], seconds["ours"], strict=True)),
        **{f"{which}_mib_before": memory[which][0] for which in WHICH},
        **{f"{which}_mib_peak": memory[which][1] for which in WHICH},
    }


def main() -> None:
    options = arguments()
    result = measure(options)
    if options.json:
        print(json.dumps(result, indent=1))
        return
    what = f"{options.encoder}, {options.context}, {options.domains} x ({options.batch} + {options.batch}) images of {options.crop}x{options.crop}"
    table = Table(title=f"CCT step, {what}, C = {options.classes}, K = {result['auxiliary_decoders']}, {result['date']}, {result['machine']}")
    for column in ("", "s per step", "peak MiB", "MiB before the first step"):
        table.add_column(column, justify="right")
    for which in WHICH:
        table.add_row(which, f"{result[f'{which}_s']:.3f}", f"{result[f'{which}_mib_peak']:.0f}", f"{result[f'{which}_mib_before']:.0f}")
    table.add_row("plain / ours", f"{result['plain_over_ours']:.2f}", f"{result['plain_mib_peak'] / result['ours_mib_peak']:.2f}", "")
    Console().print(table)


if __name__ == "__main__":
    main()
