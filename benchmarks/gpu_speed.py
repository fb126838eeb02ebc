"""How fast a step is on a CUDA card, in which precision, and where its time goes.

python benchmarks/gpu_speed.py --out DIR [--seconds 140] [--device cuda] [--rehearse]

Each row is appended to DIR/speed_rows.jsonl as soon as it is measured; one that fails says why, and the next begins.
Rows are medians over steps of forward, backward, AdamW and the running average, on images that are on the card already.
A row has no time left when another one like it would go beyond --seconds: what was not measured is named in a last row.

`operations` are multiplications and additions of convolutions and matrix products in one step, forward and backward,
counted by torch (FlopCounterMode); `peak_share` divides them by the step's time and by the card's dense peak, where it
is known. `launches` are kernels and copies on the card in one step.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import step as step_benchmark
import torch
from PIL import Image
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": None, "fp32": None}
TERAFLOPS = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362, "L4": 121, "RTX 4090": 165}
"""Dense bf16 peaks that the makers state, by a part of the card's name."""
CNN = ("--encoder resnet50 --context psp --width 512 --decoder pixelshuffle --decoders 30 --classes 21", 8, 512)
VIT = (
    "--encoder vit_small_patch16_224 --context fpn --stride 16 --decoder pixelshuffle --decoders 8 --classes 21",
    8,
    512,
)
SMALL = ("--encoder test_resnet --context psp --width 32 --decoder pixelshuffle --decoders 3 --classes 3", 2, 64)

Case = dict[str, Any]


def cases(rehearse: bool) -> list[Case]:
    """What is measured, most wanted first."""
    cnn, vit = (SMALL, SMALL) if rehearse else (CNN, VIT)
    # Compiling takes longer than the rest of a rehearsal; tests/model/test_encoder.py compiles an encoder.
    compiled = [] if rehearse else [{"of": cnn, "which": "ours", "precision": "bf16", "extra": "--compile"}]
    return [
        {"of": cnn, "which": "ours", "precision": "bf16", "count": True},
        {"of": cnn, "which": "encoder", "precision": "bf16"},
        {"of": cnn, "which": "plain", "precision": "bf16"},
        {"of": cnn, "which": "strong", "precision": "bf16"},
        {"of": vit, "which": "ours", "precision": "bf16", "count": True},
        {"of": cnn, "which": "ours", "precision": "bf16", "extra": "--decoders 1"},
        {"of": cnn, "which": "ours", "precision": "tf32"},
        {"of": cnn, "which": "ours", "precision": "fp16"},
        {"of": cnn, "which": "ours", "precision": "fp32"},
        {"of": cnn, "which": "ours", "precision": "bf16", "channels_last": False},
        {"of": vit, "which": "strong", "precision": "bf16"},
        *compiled,
    ]


class Step:
    """One step of a case, to be taken again and again."""

    def __init__(self, case: Case, device: torch.device) -> None:
        words, batch, crop = case["of"]
        given = f"{words} --batch {batch} --crop {crop} --device {device.type} {case.get('extra', '')}".split()
        self.options = step_benchmark.arguments(given)
        self.device, self.which, self.precision = device, case["which"], case["precision"]
        torch.set_float32_matmul_precision("highest" if self.precision == "fp32" else "high")
        torch.backends.cudnn.allow_tf32 = self.precision != "fp32"
        torch.manual_seed(0)
        self.model, self.batches = step_benchmark.build("ours" if self.which == "encoder" else self.which, self.options)
        if self.which == "plain" or not case.get("channels_last", True):
            self.model.to(memory_format=torch.contiguous_format)
        self.plain = step_benchmark.plain_step_losses() if self.which == "plain" else None
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimiser = torch.optim.AdamW(trained, lr=1e-5, fused=True)
        fp16 = self.precision == "fp16" and device.type == "cuda"
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)

    @property
    def images(self) -> int:
        return sum(len(each.images) + len(each.unlabelled) for each in self.batches.values())

    def take(self) -> None:
        dtype = PRECISIONS[self.precision]
        with nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype):
            if self.which == "encoder":
                images = torch.cat([part for each in self.batches.values() for part in (each.images, each.unlabelled)])
                loss = self.model.encoder(images, [(name, len(images)) for name in self.batches]).float().mean()
            else:
                losses = (
                    self.plain(self.model, self.batches, 1.0, passes="two")
                    if self.plain
                    else self.model(self.batches, 1.0)
                )
                loss = torch.stack([each.float() for each in losses.values()]).sum()
        self.scaler.scale(loss).backward()
        if self.which != "encoder":
            self.scaler.step(self.optimiser)
            self.scaler.update()
            self.model.after_step()
        self.optimiser.zero_grad()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def measured(case: Case, device: torch.device, steps: int) -> dict[str, Any]:
    one = Step(case, device)
    for _ in range(2):
        one.take()
    one.wait()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        one.take()
        one.wait()
        seconds.append(time.perf_counter() - started)
    taken = statistics.median(seconds)
    found: dict[str, Any] = {"step_s": taken, "images_per_s": one.images / taken, "images": one.images}
    if device.type == "cuda":
        found["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    if case.get("count"):
        with FlopCounterMode(display=False) as counter:
            one.take()
        found |= {"operations": counter.get_total_flops()} | profiled(one)
        peak = next((peak for name, peak in TERAFLOPS.items() if name in card(device)), None)
        found["peak_share"] = None if peak is None else found["operations"] / taken / (peak * 1e12)
    return found


def profiled(one: Step) -> dict[str, Any]:
    """The ten dearest kernels of a step, how many there are, and the share of the time in which none runs."""
    on_gpu = one.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as record:
        for _ in range(3):
            one.take()
        one.wait()
    own = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    rows = sorted(record.key_averages(), key=lambda row: getattr(row, own), reverse=True)
    table = [{"name": row.key[:90], "ms": getattr(row, own) / 3000, "calls": row.count / 3} for row in rows[:10]]
    kernels = [event for event in record.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    found: dict[str, Any] = {"dearest": table, "launches": len(kernels) / 3 if on_gpu else None}
    if kernels:
        spans = sorted((event.time_range.start, event.time_range.end) for event in kernels)
        busy, until = 0.0, spans[0][0]
        for start, end in spans:
            busy, until = busy + max(0.0, end - max(start, until)), max(until, end)
        found["idle_share"] = 1 - busy / (until - spans[0][0])
    return found


def decoding(device: torch.device, count: int) -> dict[str, Any]:
    """Photographs of 1024x512 decoded a second: by Pillow on one core, and on the card where torchvision can."""
    from torchvision.io import decode_jpeg

    rng, files = np.random.default_rng(0), []
    for _ in range(4):
        coarse = Image.fromarray(rng.integers(0, 256, (16, 32, 3), dtype=np.uint8)).resize((1024, 512))
        grain = rng.normal(0, 6, (512, 1024, 3))
        buffer = io.BytesIO()
        Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=95)
        files.append(buffer.getvalue())
    files = files * count
    started = time.perf_counter()
    for content in files:
        np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    found = {"pillow_images_per_s_and_core": len(files) / (time.perf_counter() - started), "cores": os.cpu_count()}
    if device.type == "cuda":
        tensors = [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in files]
        decode_jpeg(tensors[:4], device=device)
        torch.cuda.synchronize()
        started = time.perf_counter()
        decode_jpeg(tensors, device=device)
        torch.cuda.synchronize()
        found["nvjpeg_images_per_s"] = len(files) / (time.perf_counter() - started)
    return found


def card(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else "CPU"


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    device, started = torch.device(options.device), time.monotonic()
    steps = 2 if options.rehearse else 12
    jobs: list[tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = []
    for case in cases(options.rehearse):
        words, batch, crop = case["of"]
        facts = {"settings": words, "batch": f"{batch} + {batch}", "crop": crop}
        facts |= {key: value for key, value in case.items() if key not in ("of", "count")}
        jobs.append((facts, lambda case=case: measured(case, device, steps)))
    jobs.insert(5, ({"which": "decoding"}, lambda: decoding(device, 2 if options.rehearse else 40)))
    longest = 0.0
    for number, (facts, measure) in enumerate(jobs):
        begun = time.monotonic()
        if begun - started + longest > options.seconds:
            yield {"which": "not measured: no time left", "cases": [facts for facts, _ in jobs[number:]]}
            return
        try:
            found = measure()
        except Exception as error:  # the rows after it are wanted all the same
            found = {
                "error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[:300]
            }
        if device.type == "cuda":
            torch.cuda.empty_cache()
        longest = max(longest, time.monotonic() - begun)
        yield {"card": card(device), "torch": torch.__version__} | facts | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=140.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    path = options.out / "speed_rows.jsonl"
    path.write_text("")
    for row in rows(options):
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
