"""`export`: a run as a file that other software runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from multidomain_cct.commands.terminal import DONE, Words, numbers, say


def register(words: Words) -> None:
    command = words.add_parser("export", help="a run as a file for other software: ONNX or torch.export")
    command.add_argument("folder", type=Path, metavar="RUN")
    command.add_argument("--domain", metavar="D|all", help="whose classes (not needed for a run of one domain)")
    command.add_argument("--out", required=True, type=Path, metavar="FILE", help=".onnx or .pt2")
    command.add_argument(
        "--size", type=numbers(int, "640,480", 2), metavar="W,H", help="of all photographs (default: any size)"
    )
    command.add_argument("--opset", type=int, default=18, metavar="N", help="of ONNX (default: 18)")
    command.add_argument("--shards", type=Path, metavar="DIR", help="folder of shards (default: the recipe's)")
    command.add_argument("--checkpoint", default="last", help="last, best or a checkpoint's folder (default: last)")
    command.add_argument(
        "--weights", choices=("ema", "student", "trained"), help="the running average, or those that were trained"
    )
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    import torch

    from multidomain_cct.results.export import export
    from multidomain_cct.results.trained_run import TrainedRun

    trained = TrainedRun.load(options.folder, options.checkpoint, torch.device("cpu"), options.weights)
    size = options.size and (options.size[0], options.size[1])
    written = export(trained, options.domain, options.out, size=size, opset=options.opset, shards=options.shards)
    for parity in written.parities:
        say(f"{parity.described}, as by {trained.described}")
    width, height = written.image_size
    say(
        f"{written.path}: {written.mib:.1f} MiB, outputs {', '.join(written.outputs)}; {1000 * written.seconds:.0f} ms "
        f"for an image of {width}x{height} on {torch.get_num_threads()} CPU thread(s)"
    )
    return DONE
