"""`evaluate`: per-domain mIoU of a run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from multidomain_cct.commands.terminal import DONE, Words, prediction_options, say, show_table

if TYPE_CHECKING:
    from multidomain_cct.evaluation.scoring import Score
    from multidomain_cct.results.trained_run import TrainedRun


def register(words: Words) -> None:
    command = words.add_parser("evaluate", parents=[prediction_options()], help="per-domain mIoU of a run")
    command.add_argument("folder", type=Path, metavar="RUN")
    command.add_argument(
        "--domain", action="append", default=[], metavar="D", help="domain to score; may be repeated (default: all)"
    )
    command.add_argument("--split", metavar="S", help="split to score (default: the recipe's val_split)")
    command.add_argument("--shards", type=Path, metavar="DIR", help="folder of shards (default: the recipe's)")
    command.add_argument("--json", action="store_true", help="print JSON instead of tables")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from multidomain_cct.results.evaluate import evaluate, scores_as_json, write_scores
    from multidomain_cct.results.trained_run import TrainedRun

    trained = TrainedRun.load(options.folder, options.checkpoint, weights=options.weights)
    settings = trained.settings(window=options.window, scales=options.scales, flip=options.flip)
    scores = evaluate(trained, options.domain, options.split, settings, shards=options.shards)
    # Printed first: the run may lie where nothing can be written.
    if options.json:
        print(json.dumps(scores_as_json(trained, scores), indent=1))
    else:
        _print_scores(trained, scores)
    written = write_scores(trained, scores)
    if not options.json:
        say(f"written to {written}")
    return DONE


def _print_scores(run: TrainedRun, scores: Sequence[Score]) -> None:
    """A table per domain: IoU per class, mIoU, pixel accuracy, and how the numbers were made."""
    from multidomain_cct.evaluation.scoring import arithmetic_and_harmonic

    for result in scores:
        shares = result.confusion.sum(axis=1) / max(1, result.confusion.sum())
        rows = [
            (label, "absent" if iou is None else f"{100 * iou:.1f}", f"{100 * share:.1f} %")
            for share, (label, iou) in zip(shares, result.iou.items(), strict=True)
        ]
        rows += [("mIoU", f"{100 * result.miou:.1f}", ""), ("pixel accuracy", f"{100 * result.pixel_accuracy:.1f}", "")]
        title = f"{result.domain.name}: {result.domain.title or result.split}"
        show_table(("class", "IoU", "share of pixels"), rows, title=title, numbers=True, sums=2)
        say(f"{result.protocol}, {run.described}")
    if len(scores) > 1:
        arithmetic, harmonic = arithmetic_and_harmonic([result.miou for result in scores])
        say(f"mean of {len(scores)} domains: mIoU {100 * arithmetic:.1f} (harmonic {100 * harmonic:.1f})")
