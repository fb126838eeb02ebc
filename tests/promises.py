"""The table of the reliability tests, which pytest prints at the end: promise, figure and outcome.

tests/conftest.py has these hooks, because the process that collects the results of several test processes does not load
the folder's own.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

PROMISES = {
    "B1": "SIGKILL anywhere resumes bit-exactly",
    "B2": "same seed, same bytes",
    "B3": "the world size may change",
    "B4": "every sample once per epoch",
    "B5": "resume is a seek",
    "B6": "no hang",
    "B7": "every head gets its gradient",
    "B8": "BatchNorm does not leak between domains",
    "B9": "a published checkpoint is whole",
    "B10": "a damaged newest is never half used",
    "B11": "a full disk is survived",
    "B12": "retention never leaves nothing",
    "B13": "SIGTERM saves within grace",
    "B14": "a non-finite step is skipped and reported",
    "B15": "nothing is restored silently wrong",
    "B16": "drift is caught",
    "B17": "a dead worker is noticed",
    "B18": "malformed data is named",
    "B19": "bit rot is seen",
    "B20": "masks are byte-true",
    "B21": "images are bounded",
    "B22": "shards cannot execute",
    "B23": "configuration cannot execute or leak",
    "B24": "checkpoints cannot execute",
    "B25": "keys cannot escape",
    "B26": "no network unless asked",
    "elastic": "a killed rank or node: the run goes on by itself",
}
_figures: dict[str, list[str]] = {}
_outcomes: dict[str, list[bool]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    promise = _promise_of(report.nodeid)
    if promise and (report.when == "call" or report.failed):
        _outcomes.setdefault(promise, []).append(report.passed)
        for name, text in report.user_properties:
            if name in PROMISES:
                _figures.setdefault(name, []).append(str(text))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not _outcomes:
        return
    table = Table("promise", "", "figure", "tests", "pass", title="Reliability")
    for promise, title in PROMISES.items():
        if promise in _outcomes:
            passed, total = sum(_outcomes[promise]), len(_outcomes[promise])
            table.add_row(
                promise,
                title,
                "; ".join(dict.fromkeys(_figures.get(promise, []))),
                f"{passed}/{total}",
                "yes" if passed == total else "NO",
            )
    Console(file=sys.__stdout__, width=int(os.environ.get("COLUMNS", 160)), markup=False).print(table)


def _promise_of(nodeid: str) -> str | None:
    """tests/reliability/test_b09_....py -> B9."""
    name = Path(nodeid.split("::")[0])
    if name.parent.name != "reliability":
        return None
    first = name.stem.removeprefix("test_").split("_")[0]
    promise = f"B{int(first[1:])}" if first[:1] == "b" and first[1:].isdigit() else first
    return promise if promise in PROMISES else None
