"""`report`: one HTML page about one or several runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from multidomain_cct.commands.terminal import DONE, Words, say, show_table


def register(words: Words) -> None:
    command = words.add_parser("report", help="one HTML page about one or several runs")
    command.add_argument("folders", nargs="+", type=Path, metavar="RUN")
    command.add_argument(
        "--out", type=Path, metavar="FILE.html", help="the page (default: report.html in the run's folder)"
    )
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from multidomain_cct.results.report.page import last_scores, write_report

    page = write_report(options.folders, options.out)
    scores = {folder: last_scores(folder) for folder in options.folders}
    rows = []
    for name in dict.fromkeys(name for values in scores.values() for name in values):
        rows.append((name, *(f"{100 * values[name]:.1f}" if name in values else "" for values in scores.values())))
    if rows:
        show_table(("val mIoU", *(folder.resolve().name for folder in scores)), rows)
    say(f"report: {page}")
    return DONE
