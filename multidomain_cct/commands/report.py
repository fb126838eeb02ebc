"""`report`: one HTML page about one or several runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from multidomain_cct.commands.terminal import DONE, Words, say


def register(words: Words) -> None:
    command = words.add_parser("report", help="one HTML page about one or several runs")
    command.add_argument("folders", nargs="+", type=Path, metavar="RUN")
    command.add_argument("--out", type=Path, metavar="FILE.html")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from multidomain_cct.results.report import last_scores, write_report

    page = write_report(options.folders, options.out)
    scores = {folder: last_scores(folder) for folder in options.folders}
    table = Table("val mIoU", *(escape(folder.resolve().name) for folder in scores))
    for name in dict.fromkeys(name for found in scores.values() for name in found):
        table.add_row(name, *(f"{100 * found[name]:.1f}" if name in found else "" for found in scores.values()))
    if table.row_count:
        Console(highlight=False).print(table)
    say(f"report: {page}")
    return DONE
