"""What commands share: exit codes, the parser's common options, one-line errors, a progress bar."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from multidomain_cct.files.printable import printable

DONE, FAILED, MISTAKE = 0, 1, 2
SHARDS = "data/shards"
Words = Any
"""argparse's sub-parsers, whose class has no public name."""


def complain(message: str) -> None:
    """One line on standard error."""
    Console(stderr=True, soft_wrap=True).print(
        f"error: {printable(' '.join(message.split()))}", markup=False, highlight=False
    )


def speaks(error: Exception) -> bool:
    """Whether this process of a run is the one that prints the error: the rank that it names, or the first for what all
    processes find.
    """
    named = re.match(r"rank (\d+): ", str(error))
    return os.environ.get("RANK", "0") == (named[1] if named else "0")


def leave(code: int) -> int:
    """The exit code; of a run in several processes the process ends here, because tidying up might wait for processes
    that are gone.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def say(text: str) -> None:
    """A line on standard output, or several, as they are."""
    Console().print(
        "\n".join(printable(line) for line in text.split("\n")), markup=False, highlight=False, soft_wrap=True
    )


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


def prediction_options() -> argparse.ArgumentParser:
    """The options of all commands that predict whole images."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--checkpoint", default="last", help="last, best or a checkpoint's folder (default: last)")
    parser.add_argument(
        "--window", type=numbers(int, 2), metavar="W,H", help="sliding window for images larger than this"
    )
    parser.add_argument(
        "--scales", type=numbers(float), metavar="S,...", help="image scales to average over, for example 0.75,1,1.25"
    )
    parser.add_argument("--flip", action="store_true", help="average with the mirrored image")
    return parser


def numbers(kind: type[int] | type[float], length: int | None = None) -> Any:
    """A reader of numbers with commas between them, for argparse."""

    def parse(text: str) -> list[Any]:
        values = [kind(part) for part in text.split(",")]
        if length is not None and len(values) != length:
            raise argparse.ArgumentTypeError(f"{text!r} is not {length} numbers with a comma between them")
        return values

    return parse


class progress_bar:
    """A bar with rate and time left, as the wrapper of an iteration that `pack` asks for."""

    def __init__(self, title: str) -> None:
        rate = TextColumn("{task.fields[rate]}")
        self._bar = Progress(
            TextColumn(title, markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            rate,
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )

    def __enter__(self) -> progress_bar:
        return self

    def __exit__(self, *error: object) -> None:
        # rich ends with an empty line what it has not begun.
        if self._bar.live.is_started:
            self._bar.stop()

    def __call__(self, items: Iterable[Any], total: int) -> Iterator[Any]:
        self._bar.start()
        task = self._bar.add_task("", total=total, rate="")
        for item in items:
            yield item
            speed = self._bar.tasks[task].speed
            self._bar.update(task, advance=1, rate=f"{speed:.0f} images/s" if speed else "")
