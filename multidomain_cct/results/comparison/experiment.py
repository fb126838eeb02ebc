"""Experiments: recipes x seeds read from one YAML file, their runs, and the scores of those that are finished."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime
from itertools import zip_longest
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from multidomain_cct.errors import UserError, did_you_mean, require_choice
from multidomain_cct.files.strict_yaml import read_yaml
from multidomain_cct.results.records import recorded_counts, recorded_environment, recorded_metrics, scores_by_class
from multidomain_cct.training.check import check_recipe
from multidomain_cct.training.checkpoints.checkpoint import checkpoints
from multidomain_cct.training.findings import require
from multidomain_cct.training.recipe import Recipe, differences, read_recipe, read_run_recipe

OWN_KEYS = ("seed", "name", "runs", "resume")
"""Recipe keys that the comparison itself decides."""
MEAN = "mean"
"""The column beside the domains."""


@dataclass(frozen=True)
class Row:
    """One line of the table: a recipe and what is changed in it."""

    recipe: str = ""
    """Recipe in place of the experiment's."""
    set: tuple[str, ...] = ()
    """Overrides as `key=value`, applied after those of `common`."""
    seeds: tuple[int, ...] = ()
    """Seeds in place of the experiment's."""
    baseline: str = ""
    """Row that this one is measured against, in place of the experiment's."""


@dataclass(frozen=True)
class Experiment:
    """A comparison, complete: every row is trained once with each of its seeds."""

    rows: dict[str, Row]
    """The lines of the table, by name."""
    title: str = ""
    """Heading of the table; left out: the experiment's file name."""
    recipe: str = ""
    """Recipe of the rows that name none: a path relative to the experiment file, or as the command `train` finds it."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the rows that name none."""
    common: tuple[str, ...] = ()
    """Overrides of every run."""
    baseline: str = ""
    """Row that the others are measured against."""
    ceiling: str = ""
    """Row that marks 100 % of the gap; the baseline marks 0 %."""
    runs: str = "runs"
    """Folder under which a folder with the experiment's file name receives the runs."""

    def __post_init__(self) -> None:
        if not self.rows:
            raise UserError("rows is empty; name at least one, for example `rows: {cct: {}}`.")
        for name in self.rows:
            if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", name):
                raise UserError(f"rows has the name {name!r}; it holds letters, digits, _ and -, and starts with no -.")
        named = {f"rows.{name}.baseline": row.baseline for name, row in self.rows.items()}
        for key, name in {"baseline": self.baseline, "ceiling": self.ceiling, **named}.items():
            if name:
                require_choice(key, name, self.rows)
        if self.ceiling and self.ceiling == self.baseline:
            raise UserError(f"baseline and ceiling are both {self.ceiling!r}; the gap is between two rows.")
        if self.ceiling and not self.baseline:
            raise UserError(f"ceiling is {self.ceiling!r} and baseline is missing; the gap is between the two.")


@dataclass(frozen=True)
class PlannedRun:
    """One training of a comparison."""

    row: str
    seed: int
    source: Path
    """The recipe's file."""
    overrides: tuple[str, ...]
    recipe: Recipe
    """The recipe with the overrides, with name, folder and seed of this run."""

    @property
    def log(self) -> Path:
        """What the training printed, beside the run's folder, which must not exist before the run."""
        return self.recipe.folder.with_name(f"{self.recipe.name}.log")


@dataclass(frozen=True)
class RunScores:
    """The scores of a finished run on the val splits, at its last step."""

    row: str
    seed: int
    step: int
    miou: dict[str, float | None]
    """By domain, 0 to 1; None when it was not finite."""
    iou: dict[str, dict[str, float | None]]
    """By domain and class, 0 to 1; None for a class that is in neither truth nor prediction."""
    overrides: tuple[str, ...]
    folder: str
    environment: dict[str, Any]
    """The run's env.json: command, date, device, versions."""
    peak_mib: float | None
    """Largest memory use that was logged."""
    minutes: float | None
    """Wall time from start to last score; None for an interrupted run, because it would include the pauses."""
    counts: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)
    """(n, 3, C) pixel counts of each val image, by domain; empty for a run of an earlier version."""

    def score(self, column: str) -> float | None:
        """The mIoU of a domain, or their mean; None when it is not known."""
        if column != MEAN:
            return self.miou.get(column)
        known = [value for value in self.miou.values() if value is not None]
        return mean(known) if known and len(known) == len(self.miou) else None


def read_experiment(path: Path) -> Experiment:
    """The experiment in a YAML file.

    Raises UserError, with one line that names the file and the key, for anything that cannot be used.
    """
    plain = read_yaml(path)
    try:
        return Experiment(**{"rows": {}, "title": path.stem} | _values(plain, Experiment, ""))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _values(section: Any, kind: type[Experiment] | type[Row], where: str) -> dict[str, Any]:
    """A section's values with the types of the dataclass's fields."""
    known = [each.name for each in fields(kind)]
    if not isinstance(section, dict):
        raise UserError(f"{where} is {section!r}; it is a section with the keys {', '.join(known)}.")
    values: dict[str, Any] = {}
    for key, value in section.items():
        here = f"{where}.{key}" if where else str(key)
        if key not in known:
            raise UserError(
                f'unknown key "{here}". Allowed {f"in {where}" if where else "at the top"}: '
                f"{', '.join(known)}.{did_you_mean(str(key), known)}"
            )
        if key == "rows":
            if value and not isinstance(value, dict):
                raise UserError(f"rows is {value!r}; it is a mapping of names to rows, for example {{cct: {{}}}}.")
            rows = (value or {}).items()
            values[key] = {str(name): Row(**_values(row or {}, Row, f"rows.{name}")) for name, row in rows}
        elif key == "seeds":
            values[key] = _seeds(value, here)
        elif key in ("set", "common"):
            values[key] = _overrides(value, here)
        elif isinstance(value, str) and value.strip() and "\n" not in value.strip():
            values[key] = value.strip()
        else:
            raise UserError(f"{here} is {value!r}; it is text on one line.")
    return values


def _seeds(value: Any, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or not all(type(seed) is int and seed >= 0 for seed in value):
        raise UserError(f"{where} is {value!r}; it is a list of whole numbers from 0 up, for example [0, 1, 2].")
    for seed, count in Counter(value).items():
        if count > 1:
            raise UserError(f"{where} names {seed} twice; keep one.")
    return tuple(value)


def _overrides(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(override, str) for override in value):
        raise UserError(f"{where} is {value!r}; it is a list of key=value, for example [training.steps=600].")
    for key in (override.partition("=")[0] for override in value):
        if key in OWN_KEYS:
            raise UserError(
                f"{where} sets {key}, which the comparison decides. Use `seeds`, or the experiment's `runs`."
            )
    return tuple(value)


def planned_runs(path: Path, experiment: Experiment) -> list[PlannedRun]:
    """Every run of the experiment at `path`, in the order of training: each row's first seed, then each row's second,
    so that a whole table exists early.

    Reads every recipe. Raises UserError, with the row's name, for one that cannot be used or compared.
    """
    turns = zip_longest(*(row.seeds or experiment.seeds for row in experiment.rows.values()))
    return [
        _planned(path, experiment, name, seed)
        for seeds in turns
        for name, seed in zip(experiment.rows, seeds, strict=True)
        if seed is not None
    ]


def _planned(path: Path, experiment: Experiment, name: str, seed: int) -> PlannedRun:
    row = experiment.rows[name]
    where = f"{path}: rows.{name}"
    written = row.recipe or experiment.recipe
    if not written:
        raise UserError(f"{where} has no recipe, nor has the experiment. Name one, for example recipes/demo.yaml.")
    beside = Path(os.path.normpath(path.parent / written))
    source = beside if beside.is_file() else Path(written)
    # Quoted: a folder such as 2026 must stay text.
    folder = json.dumps((Path(experiment.runs) / path.stem).as_posix(), ensure_ascii=False)
    chosen = (*experiment.common, *row.set)
    overrides = (*chosen, f"seed={seed}", f"name={name}-seed{seed}", f"runs={folder}", "resume=auto")
    try:
        recipe = read_recipe(source, overrides)
        require(check_recipe(recipe))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if not any(domain.val_split for domain in recipe.domains.values()):
        raise UserError(f"{where}: no domain has a val_split to compare by. Set domains.NAME.val_split in {source}.")
    return PlannedRun(name, seed, source, overrides, recipe)


def finished_scores(run: PlannedRun) -> RunScores | None:
    """The scores of a run that has reached its last step and saved it; None when it has still to be trained, or its
    folder holds another run.

    Raises UserError when the recipe asks for another evaluation than the one that was made.
    """
    folder, step = run.recipe.folder, run.recipe.training.steps
    saved = {checkpoint.name for checkpoint in checkpoints(folder / "checkpoints")}
    if f"step-{step:08d}" not in saved or _changes(run) != []:
        return None
    metrics = recorded_metrics(folder)
    scored = [name for name, domain in run.recipe.domains.items() if domain.val_split]
    lines = [line for line in metrics if line["step"] == step and all(f"val/{name}/miou" in line for name in scored)]
    if not lines:
        return None
    if read_run_recipe(folder).evaluation != run.recipe.evaluation:
        raise UserError(
            f"{folder} was scored with other evaluation settings than the recipe now has. Take them back, or remove "
            "the folder to train it again."
        )
    peaks = [value for line in metrics if (value := line.get("sys/peak_mib")) is not None]
    environment = recorded_environment(folder)
    return RunScores(
        row=run.row,
        seed=run.seed,
        step=step,
        miou={name: lines[-1][f"val/{name}/miou"] for name in scored},
        iou={name: scores_by_class(lines[-1], name) for name in scored},
        overrides=run.overrides,
        folder=str(folder),
        environment=environment,
        peak_mib=max(peaks, default=None),
        minutes=_minutes(environment, folder / "metrics.jsonl"),
        counts=recorded_counts(folder, step),
    )


def state_of(run: PlannedRun) -> str:
    """What training the run would do: `finished`, `new`, where it goes on, or `will fail`.

    Raises UserError as finished_scores does.
    """
    folder = run.recipe.folder
    if finished_scores(run):
        return "finished"
    if changed := _changes(run):
        return f"will fail: {folder} holds a run of another recipe, {changed[0]}"
    saved = checkpoints(folder / "checkpoints")
    return f"goes on from {saved[-1].name}" if saved else "new"


def _changes(run: PlannedRun) -> list[str] | None:
    """How the run in the folder differs from the planned one; None when the folder holds none."""
    path = run.recipe.folder / "recipe.yaml"
    return differences(read_run_recipe(run.recipe.folder), run.recipe) if path.is_file() else None


def _minutes(environment: Mapping[str, Any], metrics: Path) -> float | None:
    """Wall time from the run's start to its last line of metrics."""
    if "started" not in environment or "resumed" in environment:
        return None
    seconds = metrics.stat().st_mtime - datetime.fromisoformat(environment["started"]).timestamp()
    # A copied folder may have times of its own.
    return seconds / 60 if seconds >= 0 else None
