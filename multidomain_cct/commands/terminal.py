"""What commands share: exit codes, parsers, common options, one-line errors, tables, a progress bar."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from multidomain_cct.files.printable import printable

DONE, FAILED, MISTAKE = 0, 1, 2
SHARDS = "data/shards"
Words = Any
"""argparse's sub-parsers; their class has no public name."""


class Parser(argparse.ArgumentParser):
    """A parser that takes options by their whole names only."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False)


def program() -> str:
    """The program as the person started it."""
    return "multidomain-cct" if Path(sys.argv[0]).stem == "multidomain-cct" else "python -m multidomain_cct"


def complain(message: str, label: str = "error") -> None:
    """One line on standard error; a warning is yellow."""
    line, style = f"{label}: {printable(' '.join(message.split()))}", "yellow" if label == "warning" else ""
    Console(stderr=True, soft_wrap=True).print(line, style=style, markup=False, highlight=False)


def report_error(error: Exception) -> None:
    """One line about the end of a run, from the rank that the message names, or the first for what all ranks find.

    torchrun and multi-process `accelerate launch` end with a summary of their own; it repeats the line.
    """
    summary = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if summary:
        Path(summary).write_text(json.dumps({"message": f"error: {error}", "timestamp": int(time.time())}))
    named = re.match(r"rank (\d+): ", str(error))
    if os.environ.get("RANK", "0") == (named[1] if named else "0"):
        complain(str(error))


def leave(code: int) -> int:
    """The exit code. One of several processes ends here: cleaning up might wait for processes that are gone."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def say(text: str) -> None:
    """Lines on standard output, as they are."""
    lines = "\n".join(printable(line) for line in text.split("\n"))
    Console().print(lines, markup=False, highlight=False, soft_wrap=True)


def show_table(
    heading: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", numbers: bool = False, sums: int = 0
) -> None:
    """A table on standard output; in a file or a pipe, which have no width, each row is one line.

    `numbers` aligns all columns but the first to the right, and a line sets off the last `sums` rows.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=100_000)
    table = Table(
        title=escape(printable(title)) or None, title_justify="left", box=SIMPLE, show_edge=False, padding=(0, 1, 0, 0)
    )
    for position, name in enumerate(heading):
        table.add_column(escape(printable(name)), justify="right" if numbers and position else "left", overflow="fold")
    for position, cells in enumerate(rows):
        table.add_row(*(escape(printable(cell)) for cell in cells), end_section=position == len(rows) - sums - 1)
    console.print(table)


def domain_options() -> argparse.ArgumentParser:
    """The option of all commands that look for domains by name."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--domains",
        metavar="DIR",
        type=Path,
        action="append",
        default=[],
        help="folder of domain files, looked at first; may be repeated",
    )
    return parser


def recipe_options() -> argparse.ArgumentParser:
    """The arguments of all commands that read a recipe."""
    parser = argparse.ArgumentParser(add_help=False, parents=[domain_options()])
    parser.add_argument("recipe", type=Path, metavar="RECIPE")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's")
    return parser


def prediction_options() -> argparse.ArgumentParser:
    """The options of all commands that predict whole images."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--checkpoint", default="last", help="last, best or a checkpoint's folder (default: last)")
    parser.add_argument(
        "--weights",
        choices=("ema", "student", "trained"),
        help="the running average, or the weights that were trained (default: ema where the run keeps one)",
    )
    parser.add_argument(
        "--window", type=numbers(int, "1024,512", 2), metavar="W,H", help="sliding window for images larger than this"
    )
    parser.add_argument(
        "--scales", type=numbers(float, "0.75,1,1.25"), metavar="S,...", help="image scales to average over"
    )
    parser.add_argument("--flip", action="store_true", help="average with the mirrored image")
    return parser


def numbers(kind: type[int] | type[float], example: str, count: int | None = None) -> Callable[[str], list[Any]]:
    """A reader of numbers with commas between them, for argparse."""

    def read(text: str) -> list[Any]:
        try:
            values = [kind(part) for part in text.split(",")]
        except ValueError:
            values = []
        if not values or count not in (None, len(values)):
            raise argparse.ArgumentTypeError(f"{text!r} is not written like {example}")
        return values

    return read


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[Iterable[Any], int], Iterator[Any]]]:
    """A bar with rate and time left: a function that wraps an iteration of known length."""
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    bar = Progress(TextColumn(title, markup=False), *columns, console=Console(stderr=True))

    def wrap(items: Iterable[Any], total: int) -> Iterator[Any]:
        bar.start()
        task = bar.add_task("", total=total, rate="")
        for item in items:
            yield item
            speed = bar.tasks[task].speed
            bar.update(task, advance=1, rate=f"{speed:.0f} images/s" if speed else "")

    try:
        yield wrap
    finally:
        # rich ends with an empty line what it has not begun.
        if bar.live.is_started:
            bar.stop()
