"""The reliability tests: what each promise reached, and tiny runs that are shared.

`MDCCT_RELIABILITY=full` asks for the full figures; without it the tests are those of CI. At the end a table of promise,
figure and outcome is printed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

# Processes of the tests import what they run by name.
sys.path.insert(0, str(Path(__file__).parent))
# Forked processes of one thread each give the same bits on every machine.
os.environ["OMP_NUM_THREADS"] = "1"
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


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Callable[[str, str], None]:
    """A function (promise, figure) that puts what a test has reached into the table."""

    def record(promise: str, text: str) -> None:
        assert promise in PROMISES
        record_property(promise, text)

    return record


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


@pytest.fixture
def command(tiny_recipe: Callable[..., Any], two_domains: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """A function (run's name, recipe keys) -> the words of a command that trains a tiny run in tmp_path/runs/<name>;
    `more` are further words.
    """

    def words(name: str, *more: str, **changes: Any) -> list[str]:
        plain = {
            "training": {"steps": 12, "log_every": 1, "evaluate_every": 100, "save_every": 100, "keep": 99},
            "optimiser": {"lr": 0.05},
        } | changes
        path = tmp_path / f"{name}.yaml"
        path.write_text(tiny_recipe(name=name, **plain).to_yaml())
        return ["train", str(path), "--domains", str(two_domains / "domains"), *more]

    return words
