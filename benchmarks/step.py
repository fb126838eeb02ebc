"""How fast a CCT step is, and how much memory it takes, beside the plain implementation of the same formulas
(benchmarks/plain_cct.py) and beside its encoder.

python benchmarks/step.py [--encoder resnet18] [--context fpn] [--stride 8] [--width 128] [--decoder pixelshuffle]
                          [--crop 128] [--batch 2] [--decoders 30] [--classes 21] [--domains 1] [--steps 3]
                          [--device cpu] [--threads 1] [--only ours] [--json] [--sample 0] [--consistency-stride 1]
                          [--checkpoint] [--compile] [--return-memory]

A step is forward, backward and SGD with momentum on drawn images. The plain one sends labelled and unlabelled images
through the encoder in two passes, brings PSP's averages to the size of the map before it convolves them, holds the
logits of all K auxiliary decoders until its one backward pass, and keeps torch's default memory format; the networks
start from the same weights. `encoder` is forward and backward of our encoder alone, in one pass, on the same images.
Ours and `encoder` keep the memory that they free, as `train` does, unless --return-memory is given;
`--only ours returning` compares our step with one that does not keep it, and `--only ours strong` with a step of
`cct_strong` on the same images: its teacher, strong views and statistics are what it adds. The K auxiliary decoders are
spread evenly over the authors' thirty.

A process for each takes turns with the others step by step, so that none runs while another is timed; medians are
compared. Memory is the peak of the resident set (on a GPU: of torch's allocations) in a process that does nothing else;
what it holds before the first step is given apart. The options from --sample to --compile are those of recipes that
trade exactness or time: they change ours only.
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

WHICH = ("plain", "ours", "encoder", "returning", "strong")
RATIOS = {
    "step": ("ours", "plain"),
    "tax": ("ours", "encoder"),
    "kept": ("ours", "returning"),
    "strong": ("strong", "ours"),
}
"""By name: what is divided by what."""
MIB = 2**20


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--context", default="fpn")
    parser.add_argument("--stride", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--decoder", default="pixelshuffle")
    parser.add_argument("--crop", type=int, default=128, help="side in pixels")
    parser.add_argument("--batch", type=int, default=2, help="labelled images of a domain, and as many unlabelled ones")
    parser.add_argument("--decoders", type=int, default=30, help="K, auxiliary decoders of a domain")
    parser.add_argument("--classes", type=int, default=21)
    parser.add_argument("--domains", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each, after one that is not")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "1")))
    parser.add_argument("--only", choices=WHICH, nargs="+", default=list(WHICH[:3]))
    parser.add_argument("--sample", type=int, default=0, help="auxiliary decoders drawn per step; 0: all")
    parser.add_argument("--consistency-stride", type=int, default=1)
    parser.add_argument("--checkpoint", action="store_true", help="recompute the encoder's activations in backward")
    parser.add_argument("--compile", action="store_true", help="torch.compile the encoder")
    parser.add_argument(
        "--return-memory", action="store_true", help="give freed memory back to the system, as any other program does"
    )
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(given)


def build(which: str, options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The network and one step's batches, the same in every process."""
    # torch is imported by the processes that need it only: their memory is what is measured.
    import torch

    from multidomain_cct.data.batches.loader import Batch
    from multidomain_cct.methods.cct import CCT
    from multidomain_cct.methods.cct_strong import CCTStrong, CCTStrongSettings
    from multidomain_cct.model.encoder import EncoderSettings
    from multidomain_cct.model.losses import ConsistencySettings
    from multidomain_cct.model.network import Task
    from multidomain_cct.model.perturbations import Perturbations

    authors = Perturbations().each()
    mix = tuple(authors[number * len(authors) // options.decoders % len(authors)] for number in range(options.decoders))
    ours = which in ("ours", "returning", "strong")
    consistency = (
        ConsistencySettings(sample=options.sample, stride=options.consistency_stride) if ours else ConsistencySettings()
    )
    things = tuple(number % 2 == 1 for number in range(options.classes))
    task = Task(things, perturbations=mix, consistency=consistency, crop=(options.crop, options.crop))
    extras = {"checkpoint": options.checkpoint, "compile": options.compile} if ours else {}
    encoder = EncoderSettings(
        name=options.encoder, stride=options.stride, context=options.context, width=options.width, **extras
    )
    names = [f"domain_{number}" for number in range(options.domains)]
    tasks = {name: task for name in names}
    if which == "strong":
        model: CCT | CCTStrong = CCTStrong(encoder, tasks, decoder=options.decoder, settings=CCTStrongSettings())
    else:
        model = CCT(encoder, tasks, decoder=options.decoder)
    model.to(options.device)
    generator, size = torch.Generator().manual_seed(0), (options.batch, options.crop, options.crop)
    batches = {}
    for name in names:
        # Coarse blocks, as real images have them: on noise every pixel would be an object of its own.
        blocks = torch.randint(0, 256, (2, options.batch, 3, 4, 4), dtype=torch.uint8, generator=generator)
        labelled, unlabelled = (
            block.repeat_interleave(-(-options.crop // 4), 2).repeat_interleave(-(-options.crop // 4), 3)
            for block in blocks
        )
        masks = torch.randint(0, options.classes, size, dtype=torch.uint8, generator=generator)
        images, others = (part[..., : options.crop, : options.crop].contiguous() for part in (labelled, unlabelled))
        batches[name] = Batch(images, masks, others, torch.ones(size, dtype=torch.bool)).to(
            torch.device(options.device)
        )
    return model, batches


def plain_step_losses() -> Any:
    path = Path(__file__).with_name("plain_cct.py")
    spec = importlib.util.spec_from_file_location("plain_cct", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.step_losses


def serve(which: str, options: argparse.Namespace, pipe: Connection) -> None:
    """Take a step whenever asked and answer with its seconds; at the end with the memory in MiB, before the first step
    and at its peak.
    """
    import torch

    from multidomain_cct.commands.kept_memory import keep_freed_memory

    torch.set_num_threads(options.threads)
    if which in ("ours", "encoder", "strong") and not options.return_memory:
        keep_freed_memory()
    on_gpu = options.device.startswith("cuda")
    model, batches = build(which, options)
    if which == "plain":
        model.to(memory_format=torch.contiguous_format)
        step_losses = plain_step_losses()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.SGD(trained, lr=0.01, momentum=0.9)

    def step(number: int) -> float:
        torch.manual_seed(number)
        started = time.perf_counter()
        if which == "encoder":
            images = torch.cat([part for batch in batches.values() for part in (batch.images, batch.unlabelled)])
            features = model.encoder(images, [(name, 2 * options.batch) for name in batches])
            features.backward(torch.ones_like(features))
        else:
            losses = step_losses(model, batches, 1.0, passes="two") if which == "plain" else model(batches, 1.0)
            torch.stack(list(losses.values())).sum().backward()
            optimiser.step()
            model.after_step()
        optimiser.zero_grad()
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def peak() -> float:
        return (
            torch.cuda.max_memory_allocated() / MIB
            if on_gpu
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        )

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


def circumstances(options: argparse.Namespace) -> dict[str, Any]:
    """When, where and with which settings."""
    return {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {options.threads} threads, {options.device}",
        "settings": {key: value for key, value in vars(options).items() if key != "json"},
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    workers = {which: Worker(which, options) for which in options.only}
    seconds: dict[str, list[float]] = {which: [] for which in workers}
    for number in range(options.steps + 1):
        for which in list(workers)[:: 1 if number % 2 else -1]:
            taken = workers[which].step(number)
            if number:
                seconds[which].append(taken)
    memory = {which: worker.stop() for which, worker in workers.items()}
    result = circumstances(options) | {"images_per_step": 2 * options.batch * options.domains}
    for which in workers:
        result |= {f"{which}_s": statistics.median(seconds[which]), f"{which}_all_s": seconds[which]}
        result |= {f"{which}_mib_before": memory[which][0], f"{which}_mib_peak": memory[which][1]}
    for name, (above, below) in RATIOS.items():
        if above in workers and below in workers:
            result[f"{name}_time"] = statistics.median(
                a / b for a, b in zip(seconds[above], seconds[below], strict=True)
            )
            result[f"{name}_memory"] = memory[above][1] / memory[below][1]
    return result


def main() -> None:
    options = arguments()
    result = measure(options)
    if options.json:
        print(json.dumps(result, indent=1))
        return
    what = (
        f"{options.encoder}, {options.context}, {options.domains} x ({options.batch} + {options.batch}) images of "
        f"{options.crop}x{options.crop}"
    )
    title = (
        f"CCT step, {what}, {options.decoder}, C = {options.classes}, K = {options.decoders}, {result['date']}, "
        f"{result['machine']}"
    )
    table = Table(title=title)
    for column in ("", "s per step", "peak MiB", "MiB before the first step"):
        table.add_column(column, justify="right")
    for which in options.only:
        table.add_row(
            which,
            f"{result[f'{which}_s']:.3f}",
            f"{result[f'{which}_mib_peak']:.0f}",
            f"{result[f'{which}_mib_before']:.0f}",
        )
    for name, (above, below) in RATIOS.items():
        if f"{name}_time" in result:
            table.add_row(f"{above} / {below}", f"{result[f'{name}_time']:.2f}", f"{result[f'{name}_memory']:.2f}", "")
    Console().print(table)


if __name__ == "__main__":
    main()
