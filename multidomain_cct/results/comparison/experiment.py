"""Experiments: recipes x seeds read from one YAML file, the runs that they mean, and what became of those."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from multidomain_cct.errors import UserError, did_you_mean
from multidomain_cct.files.strict_yaml import read_yaml
from multidomain_cct.training.checkpoints.checkpoint import checkpoints
from multidomain_cct.training.recipe import Recipe, differences, read_recipe, read_run_recipe
from multidomain_cct.training.runlog import read_metrics

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
                raise UserError(
                    f"rows has the name {name!r}; it holds letters, digits, _ and - only, and does not start with a -."
                )
        own = [(f"rows.{name}.baseline", row.baseline) for name, row in self.rows.items()]
        for key, name in (("baseline", self.baseline), ("ceiling", self.ceiling), *own):
            if name and name not in self.rows:
                raise UserError(
                    f"{key} is {name!r}, which is no row. Rows: {', '.join(self.rows)}.{did_you_mean(name, self.rows)}"
                )
        if self.ceiling and self.ceiling == self.baseline:
            raise UserError(f"baseline and ceiling are both {self.ceiling!r}; the gap lies between two rows.")
        if self.ceiling and not self.baseline:
            raise UserError(f"ceiling is {self.ceiling!r} and baseline is missing; the gap lies between the two.")


@dataclass(frozen=True)
class Run:
    """One training of a comparison."""

    row: str
    seed: int
    source: Path
    """The recipe's file, as the command `train` is told it."""
    overrides: tuple[str, ...]
    recipe: Recipe
    """What the two make, with name, folder and seed of this run."""

    @property
    def log(self) -> Path:
        """What the training printed. It lies beside the run's folder, which must not exist before the run."""
        return self.recipe.folder.with_name(f"{self.recipe.name}.log")


@dataclass(frozen=True)
class RunScores:
    """What a finished run reached on the val splits, at its last step."""

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
    """Wall time from the first step's preparation to the last score; None for a run that was interrupted, whose pauses
    it would count.
    """

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
        values = _values(plain, Experiment, "")
        rows = plain.get("rows") or {}
        if not isinstance(rows, dict):
            raise UserError(f"rows is {rows!r}; it is a mapping of names to rows, for example `rows: {{cct: {{}}}}`.")
        values["rows"] = {
            str(name): Row(**_values({} if row is None else row, Row, f"rows.{name}")) for name, row in rows.items()
        }
        return Experiment(**{"title": path.stem} | values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _values(section: Any, kind: type, where: str) -> dict[str, Any]:
    """A section's values with the types of the dataclass's fields, `rows` aside."""
    kinds = {each.name: str(each.type) for each in fields(kind)}
    if not isinstance(section, dict):
        raise UserError(f"{where} is {section!r}; it is a section with the keys {', '.join(kinds)}.")
    values: dict[str, Any] = {}
    for key, value in section.items():
        here = f"{where}.{key}" if where else str(key)
        if key not in kinds:
            raise UserError(
                f'unknown key "{here}". Allowed {f"in {where}" if where else "at the top"}: '
                f"{', '.join(kinds)}.{did_you_mean(str(key), list(kinds))}"
            )
        if kinds[key] == "str":
            if not isinstance(value, str) or not value.strip() or "\n" in value.strip():
                raise UserError(f"{here} is {value!r}; it is text on one line.")
            values[key] = value.strip()
        elif key == "seeds":
            values[key] = _seeds(value, here)
        elif kinds[key] == "tuple[str, ...]":
            values[key] = _overrides(value, here)
    return values


def _seeds(value: Any, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or not all(type(seed) is int and seed >= 0 for seed in value):
        raise UserError(f"{where} is {value!r}; it is a list of whole numbers from 0 up, for example [0, 1, 2].")
    for seed in value:
        if value.count(seed) > 1:
            raise UserError(f"{where} names {seed} twice; keep one.")
    return tuple(value)


def _overrides(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(override, str) for override in value):
        raise UserError(
            f"{where} is {value!r}; it is a list of key=value, for example [training.steps=600, 'data.crop=[96, 96]']."
        )
    for override in value:
        key = override.partition("=")[0]
        if key in OWN_KEYS:
            raise UserError(
                f"{where} sets {key}, which the comparison decides itself. Seeds stand in `seeds`, the folder in the "
                "experiment's `runs`."
            )
    return tuple(value)


def planned_runs(path: Path, experiment: Experiment) -> list[Run]:
    """Every run of the experiment at `path`, in the order of training: each row's first seed, then each row's second,
    so that a whole table exists early.

    Reads every recipe. Raises UserError, with the row's name, for one that cannot be used or compared.
    """
    turns = max(len(row.seeds or experiment.seeds) for row in experiment.rows.values())
    order = [
        (name, turn)
        for turn in range(turns)
        for name, row in experiment.rows.items()
        if turn < len(row.seeds or experiment.seeds)
    ]
    return [
        _planned(path, experiment, name, (experiment.rows[name].seeds or experiment.seeds)[turn])
        for name, turn in order
    ]


def _planned(path: Path, experiment: Experiment, name: str, seed: int) -> Run:
    row = experiment.rows[name]
    where = f"{path}: rows.{name}"
    written = row.recipe or experiment.recipe
    if not written:
        raise UserError(
            f"{where} has no recipe, nor has the experiment. Name one, for example `recipe: recipes/demo.yaml`."
        )
    beside = Path(os.path.normpath(path.parent / written))
    source = beside if beside.is_file() else Path(written)
    folder = _as_yaml_text((Path(experiment.runs) / path.stem).as_posix())
    chosen = (*experiment.common, *row.set)
    overrides = (*chosen, f"seed={seed}", f"name={name}-seed{seed}", f"runs={folder}", "resume=auto")
    try:
        recipe = read_recipe(source, overrides)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if not any(domain.val_split for domain in recipe.domains.values()):
        raise UserError(
            f"{where}: no domain has a val_split, so there is nothing to compare. Set domains.NAME.val_split in "
            f"{source}."
        )
    return Run(name, seed, source, overrides, recipe)


def _as_yaml_text(value: str) -> str:
    """The value so that YAML reads it as the text it is."""
    try:
        return value if yaml.safe_load(value) == value else json.dumps(value)
    except yaml.YAMLError:
        return json.dumps(value)


def finished_scores(run: Run) -> RunScores | None:
    """The scores of a run that has reached its last step and saved it; None when it has still to be trained, or its
    folder holds another run.

    Raises UserError when the recipe asks for another evaluation than the one that was made.
    """
    folder, step = run.recipe.folder, run.recipe.training.steps
    saved = [checkpoint.name for checkpoint in checkpoints(folder / "checkpoints")]
    if (
        f"step-{step:08d}" not in saved
        or not (folder / "recipe.yaml").is_file()
        or not (folder / "metrics.jsonl").is_file()
    ):
        return None
    trained = read_run_recipe(folder)
    metrics = [line for line in read_metrics(folder / "metrics.jsonl") if isinstance(line, dict) and "step" in line]
    scored = [name for name, domain in run.recipe.domains.items() if domain.val_split]
    lines = [line for line in metrics if line["step"] == step and all(f"val/{name}/miou" in line for name in scored)]
    if not lines or differences(trained, run.recipe):
        return None
    if trained.evaluation != run.recipe.evaluation:
        raise UserError(
            f"{folder} was scored with other evaluation settings than the recipe now has. Take them back, or remove "
            "the folder to train it again."
        )
    line = lines[-1]
    peaks = [value for each in metrics if (value := each.get("sys/peak_mib")) is not None]
    environment = _environment(folder / "env.json")
    return RunScores(
        row=run.row,
        seed=run.seed,
        step=step,
        miou={name: line[f"val/{name}/miou"] for name in scored},
        iou={
            name: {key.removeprefix(start): value for key, value in line.items() if key.startswith(start)}
            for name in scored
            if (start := f"val/{name}/iou/")
        },
        overrides=run.overrides,
        folder=str(folder),
        environment=environment,
        peak_mib=max(peaks, default=None),
        minutes=_minutes(environment, folder / "metrics.jsonl"),
    )


def state_of(run: Run) -> str:
    """What training the run would mean:

    `finished`, `new`, where it goes on, or that its folder is taken. Raises UserError as finished_scores does.
    """
    folder = run.recipe.folder
    if finished_scores(run):
        return "finished"
    changed = differences(read_run_recipe(folder), run.recipe) if (folder / "recipe.yaml").is_file() else []
    if changed:
        return f"will fail: {folder} holds a run of another recipe, {changed[0]}"
    saved = checkpoints(folder / "checkpoints")
    return f"goes on from {saved[-1].name}" if saved else "new"


def _environment(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError):
        return {}


def _minutes(environment: Mapping[str, Any], metrics: Path) -> float | None:
    """Wall time from the run's start to its last line of metrics."""
    if "started" not in environment or "resumed" in environment:
        return None
    seconds = metrics.stat().st_mtime - datetime.fromisoformat(environment["started"]).timestamp()
    # A copied folder may have times of its own.
    return seconds / 60 if seconds >= 0 else None
