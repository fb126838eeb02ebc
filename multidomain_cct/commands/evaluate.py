"""`evaluate`: per-domain mIoU of a run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console

from multidomain_cct.commands.terminal import DONE, Words, prediction_options, say


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
    from multidomain_cct.results.evaluate import evaluate, print_scores, scores_as_json, write_scores
    from multidomain_cct.results.trained_run import TrainedRun

    trained = TrainedRun.load(options.folder, options.checkpoint)
    settings = trained.settings(window=options.window, scales=options.scales, flip=options.flip)
    scores = evaluate(trained, options.domain, options.split, settings, shards=options.shards)
    written = write_scores(trained, scores)
    if options.json:
        print(json.dumps(scores_as_json(trained, scores), indent=1))
    else:
        print_scores(Console(), trained, scores)
        say(f"written to {written}")
    return DONE
