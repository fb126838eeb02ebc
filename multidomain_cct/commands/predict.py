"""`predict`: segment images."""

from __future__ import annotations

import argparse
from pathlib import Path

from multidomain_cct.commands.terminal import DONE, FAILED, Words, complain, prediction_options, progress_bar, say


def register(words: Words) -> None:
    command = words.add_parser("predict", parents=[prediction_options()], help="segment images")
    command.add_argument("folder", type=Path, metavar="RUN")
    command.add_argument("--domain", metavar="D", help="whose classes to predict (not needed for a run of one domain)")
    command.add_argument("--out", required=True, type=Path, metavar="DIR", help="receives index/, color/ and overlay/")
    command.add_argument("images", nargs="+", type=Path, metavar="IMAGE|FOLDER")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from multidomain_cct.results.predict import predict
    from multidomain_cct.results.trained_run import TrainedRun

    trained = TrainedRun.load(options.folder, options.checkpoint, weights=options.weights)
    settings = trained.settings(window=options.window, scales=options.scales, flip=options.flip)
    with progress_bar("predict") as progress:
        summary = predict(trained, options.domain, options.images, options.out, settings, progress=progress)
    for line in summary.unreadable:
        complain(f"skipped {line}")
    text = f"{summary.written} image(s) written to {options.out} by {trained.described}"
    if summary.unreadable:
        text += f", {len(summary.unreadable)} skipped"
    if summary.resized:
        text += (
            f"; {len(summary.resized)} predicted at the size of the training images, the first of {summary.resized[0]}"
        )
    say(text)
    return FAILED if summary.unreadable else DONE
