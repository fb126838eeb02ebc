"""The reliability tests: what each promise reached, and tiny runs that are shared.

`MDCCT_RELIABILITY=full` asks for the full figures; without it the tests are those of CI.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from promises import PROMISES

# Processes of the tests import what they run by name.
sys.path.insert(0, str(Path(__file__).parent))
# Forked processes of one thread each give the same bits on every machine.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Callable[[str, str], None]:
    """A function (promise, figure) that puts what a test has reached into the table."""

    def record(promise: str, text: str) -> None:
        assert promise in PROMISES
        record_property(promise, text)

    return record


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
