"""Experiments: recipes x seeds read from one YAML file, the runs they mean, and the table of their scores."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

from multidomain_cct.data.strict_yaml import did_you_mean, read_yaml
from multidomain_cct.training.checkpoint import checkpoints
from multidomain_cct.training.recipe import Recipe, differences, read_recipe
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
            raise ValueError("rows is empty; name at least one, for example `rows: {cct: {}}`.")
        for name in self.rows:
            if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", name):
                raise ValueError(f"rows has the name {name!r}; it holds letters, digits, _ and - only, and does not start with a -.")
        for key, name in (("baseline", self.baseline), ("ceiling", self.ceiling)):
            if name and name not in self.rows:
                raise ValueError(f"{key} is {name!r}, which is no row. Rows: {', '.join(self.rows)}.{did_you_mean(name, self.rows)}")
        if self.ceiling and self.ceiling == self.baseline:
            raise ValueError(f"baseline and ceiling are both {self.ceiling!r}; the gap lies between two rows.")
        if self.ceiling and not self.baseline:
            raise ValueError(f"ceiling is {self.ceiling!r} and baseline is missing; the gap lies between the two.")


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
    """Wall time from the first step's preparation to the last score; None for a run that was interrupted, whose pauses it would count."""

    def score(self, column: str) -> float | None:
        """The mIoU of a domain, or their mean; None when it is not known."""
        if column != MEAN:
            return self.miou.get(column)
        known = [value for value in self.miou.values() if value is not None]
        return mean(known) if known and len(known) == len(self.miou) else None


@dataclass(frozen=True)
class Spread:
    """A mean over seeds."""

    mean: float
    deviation: float | None
    """Sample standard deviation (ddof 1); None of a single value."""
    count: int

    def text(self, factor: float = 100, digits: int = 1) -> str:
        """The values times `factor`, as `mean ± deviation (count)`."""
        deviation = "" if self.deviation is None else f" ± {factor * self.deviation:.{digits}f}"
        return f"{factor * self.mean:.{digits}f}{deviation} ({self.count})"


def read_experiment(path: Path) -> Experiment:
    """The experiment in a YAML file.

    Raises FileNotFoundError when there is no such file and ValueError, with one line that names the file and the key, for anything that cannot be used.
    """
    plain = read_yaml(path)
    try:
        values = _values(plain, Experiment, "")
        rows = plain.get("rows") or {}
        if not isinstance(rows, dict):
            raise ValueError(f"rows is {rows!r}; it is a mapping of names to rows, for example `rows: {{cct: {{}}}}`.")
        values["rows"] = {str(name): Row(**_values({} if row is None else row, Row, f"rows.{name}")) for name, row in rows.items()}
        return Experiment(**{"title": path.stem} | values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _values(section: Any, kind: type, where: str) -> dict[str, Any]:
    """A section's values with the types of the dataclass's fields, `rows` aside."""
    kinds = {each.name: str(each.type) for each in fields(kind)}
    if not isinstance(section, dict):
        raise ValueError(f"{where} is {section!r}; it is a section with the keys {', '.join(kinds)}.")
    values: dict[str, Any] = {}
    for key, value in section.items():
        here = f"{where}.{key}" if where else str(key)
        if key not in kinds:
            raise ValueError(
                f'unknown key "{here}". Allowed {f"in {where}" if where else "at the top"}: {", ".join(kinds)}.{did_you_mean(str(key), list(kinds))}'
            )
        if kinds[key] == "str":
            if not isinstance(value, str) or not value.strip() or "\n" in value.strip():
                raise ValueError(f"{here} is {value!r}; it is text on one line.")
            values[key] = value.strip()
        elif key == "seeds":
            values[key] = _seeds(value, here)
        elif kinds[key] == "tuple[str, ...]":
            values[key] = _overrides(value, here)
    return values


def _seeds(value: Any, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or not all(type(seed) is int and seed >= 0 for seed in value):
        raise ValueError(f"{where} is {value!r}; it is a list of whole numbers from 0 up, for example [0, 1, 2].")
    for seed in value:
        if value.count(seed) > 1:
            raise ValueError(f"{where} names {seed} twice; keep one.")
    return tuple(value)


def _overrides(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(override, str) for override in value):
        raise ValueError(f"{where} is {value!r}; it is a list of key=value, for example [training.steps=600, 'data.crop=[96, 96]'].")
    for override in value:
        key = override.partition("=")[0]
        if key in OWN_KEYS:
            raise ValueError(f"{where} sets {key}, which the comparison decides itself. Seeds stand in `seeds`, the folder in the experiment's `runs`.")
    return tuple(value)


def planned_runs(path: Path, experiment: Experiment) -> list[Run]:
    """Every run of the experiment at `path`, in the order of training: each row's first seed, then each row's second, so that a whole table exists early.

    Reads every recipe. Raises ValueError or FileNotFoundError, with the row's name, for one that cannot be used or compared.
    """
    turns = max(len(row.seeds or experiment.seeds) for row in experiment.rows.values())
    order = [(name, turn) for turn in range(turns) for name, row in experiment.rows.items() if turn < len(row.seeds or experiment.seeds)]
    return [_planned(path, experiment, name, (experiment.rows[name].seeds or experiment.seeds)[turn]) for name, turn in order]


def _planned(path: Path, experiment: Experiment, name: str, seed: int) -> Run:
    row = experiment.rows[name]
    where = f"{path}: rows.{name}"
    written = row.recipe or experiment.recipe
    if not written:
        raise ValueError(f"{where} has no recipe, nor has the experiment. Name one, for example `recipe: recipes/demo.yaml`.")
    beside = Path(os.path.normpath(path.parent / written))
    source = beside if beside.is_file() else Path(written)
    folder = _as_yaml_text((Path(experiment.runs) / path.stem).as_posix())
    chosen = (*experiment.common, *row.set)
    overrides = (*chosen, f"seed={seed}", f"name={name}-seed{seed}", f"runs={folder}", "resume=auto")
    try:
        recipe = read_recipe(source, overrides)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"{where}: {error}") from None
    if not any(domain.val_split for domain in recipe.domains.values()):
        raise ValueError(f"{where}: no domain has a val_split, so there is nothing to compare. Set domains.NAME.val_split in {source}.")
    return Run(name, seed, source, overrides, recipe)


def _as_yaml_text(value: str) -> str:
    """The value so that YAML reads it as the text it is."""
    try:
        return value if yaml.safe_load(value) == value else json.dumps(value)
    except yaml.YAMLError:
        return json.dumps(value)


def finished_scores(run: Run) -> RunScores | None:
    """The scores of a run that has reached its last step and saved it; None when it has still to be trained, or its folder holds another run.

    Raises ValueError when the recipe asks for another evaluation than the one that was made.
    """
    folder, step = run.recipe.folder, run.recipe.training.steps
    saved = [checkpoint.name for checkpoint in checkpoints(folder / "checkpoints")]
    if f"step-{step:08d}" not in saved or not (folder / "recipe.yaml").is_file() or not (folder / "metrics.jsonl").is_file():
        return None
    trained = read_recipe(folder / "recipe.yaml")
    metrics = [line for line in read_metrics(folder / "metrics.jsonl") if isinstance(line, dict) and "step" in line]
    scored = [name for name, domain in run.recipe.domains.items() if domain.val_split]
    lines = [line for line in metrics if line["step"] == step and all(f"val/{name}/miou" in line for name in scored)]
    if not lines or differences(trained, run.recipe):
        return None
    if trained.evaluation != run.recipe.evaluation:
        raise ValueError(f"{folder} was scored with other evaluation settings than the recipe now has. Take them back, or remove the folder to train it again.")
    line = lines[-1]
    peaks = [value for each in metrics if (value := each.get("sys/peak_mib")) is not None]
    environment = _environment(folder / "env.json")
    return RunScores(
        row=run.row,
        seed=run.seed,
        step=step,
        miou={name: line[f"val/{name}/miou"] for name in scored},
        iou={
            name: {key.removeprefix(start): value for key, value in line.items() if key.startswith(start)} for name in scored if (start := f"val/{name}/iou/")
        },
        overrides=run.overrides,
        folder=str(folder),
        environment=environment,
        peak_mib=max(peaks, default=None),
        minutes=_minutes(environment, folder / "metrics.jsonl"),
    )


def state_of(run: Run) -> str:
    """What training the run would mean: `finished`, `new`, where it goes on, or that its folder is taken. Raises ValueError as finished_scores does."""
    folder = run.recipe.folder
    if finished_scores(run):
        return "finished"
    changed = differences(read_recipe(folder / "recipe.yaml"), run.recipe) if (folder / "recipe.yaml").is_file() else []
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


@dataclass(frozen=True)
class Comparison:
    """The scores of an experiment's finished runs, and the tables that they make."""

    experiment: Experiment
    runs: Sequence[Run]
    """All that the experiment means."""
    scores: Sequence[RunScores]
    failures: Mapping[str, str] = field(default_factory=dict)
    """Why a run failed, by the run's name."""

    @property
    def columns(self) -> list[str]:
        """The scored domains of all rows, and their mean when there are several."""
        domains = list(dict.fromkeys(name for run in self.runs for name, domain in run.recipe.domains.items() if domain.val_split))
        return [*domains, MEAN] if len(domains) > 1 else domains

    def spread(self, row: str, column: str) -> Spread | None:
        """The mIoU (0 to 1) of a row over its finished seeds.

        None when no run is finished, or when the column is the mean and the row was not trained on every domain: it would be a mean of other things.
        """
        finished = [run for run in self.scores if run.row == row and (column != MEAN or len(run.miou) == len(self.columns) - 1)]
        return _spread([run.score(column) for run in finished])

    def gain(self, row: str, column: str) -> float | None:
        """The row's mean minus the baseline's, 0 to 1."""
        own, baseline = self.spread(row, column), self.spread(self.experiment.baseline, column)
        return own.mean - baseline.mean if own and baseline else None

    def gap_share(self, row: str, column: str) -> float | None:
        """(row - baseline) / (ceiling - baseline), of the means over seeds; in the column of the mean, the mean of the domains' shares.

        None when one of the three is missing or the ceiling is not above the baseline.
        """
        if column == MEAN:
            shares = [share for domain in self.columns[:-1] if (share := self.gap_share(row, domain)) is not None]
            return mean(shares) if len(shares) == len(self.columns) - 1 else None
        gain, gap = self.gain(row, column), self.gain(self.experiment.ceiling, column)
        return gain / gap if gain is not None and gap is not None and gap > 0 else None

    def tables(self) -> list[list[list[str]]]:
        """The tables as rows of cells, headings first: mIoU and cost; then, with a baseline, what each row gained on it."""
        scores = [["row", *(f"{column} mIoU %" for column in self.columns), "peak MiB", "minutes"]]
        for name in self.experiment.rows:
            finished = [run for run in self.scores if run.row == name]
            cost = [_spread([run.peak_mib for run in finished]), _spread([run.minutes for run in finished])]
            cells = [spread.text() if (spread := self.spread(name, column)) else "n/a" for column in self.columns]
            scores.append([name, *cells, *(f"{spread.mean:.{digits}f}" if spread else "n/a" for spread, digits in zip(cost, (0, 1), strict=True))])
        if not self.experiment.baseline:
            return [scores]
        shared = self.columns if self.experiment.ceiling else []
        gains = [["row", *(f"{column} points" for column in self.columns), *(f"{column} gap closed %" for column in shared)]]
        for name in self.experiment.rows:
            points = [self.gain(name, column) for column in self.columns]
            shares = [self.gap_share(name, column) for column in shared]
            gains.append([name, *("n/a" if gain is None else f"{100 * gain:+.1f}" for gain in points), *_percents(shares)])
        return [scores, gains]

    def missing(self) -> list[str]:
        """Names of the runs that are not finished."""
        finished = {(run.row, run.seed) for run in self.scores}
        return [run.recipe.name for run in self.runs if (run.row, run.seed) not in finished]

    def machines(self) -> list[str]:
        """The machines that the finished runs were trained on."""
        return sorted({f"{run.environment.get('device', 'unknown')}, {run.environment.get('threads', '?')} thread(s)" for run in self.scores})


def write_comparison(comparison: Comparison, out: Path, *, command: str, date: str) -> None:
    """Write the tables to `out` and every run's numbers beside it, as JSON. Each file is replaced as a whole."""
    out.parent.mkdir(parents=True, exist_ok=True)
    _replace(out, _markdown(comparison, command, date))
    content = {
        "title": comparison.experiment.title,
        "command": command,
        "date": date,
        "baseline": comparison.experiment.baseline or None,
        "ceiling": comparison.experiment.ceiling or None,
        "rows": {name: _row_numbers(comparison, name) for name in comparison.experiment.rows},
        "runs": [asdict(run) for run in comparison.scores],
        "missing": comparison.missing(),
        "failed": dict(comparison.failures),
    }
    _replace(out.with_suffix(".json"), json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _row_numbers(comparison: Comparison, row: str) -> dict[str, Any]:
    spreads = {column: comparison.spread(row, column) for column in comparison.columns}
    return {
        "miou": {column: asdict(spread) if spread else None for column, spread in spreads.items()},
        "gain": {column: comparison.gain(row, column) for column in comparison.columns},
        "gap_share": {column: comparison.gap_share(row, column) for column in comparison.columns},
    }


def _markdown(comparison: Comparison, command: str, date: str) -> str:
    experiment, missing = comparison.experiment, comparison.missing()
    lines = [f"# {experiment.title}", "", f"    {command}", "", f"{date}. {'; '.join(comparison.machines()) or 'No run is finished'}.", ""]
    if missing:
        lines += [f"**Not complete**: {len(comparison.scores)} of {len(comparison.runs)} runs are finished; missing: {', '.join(missing)}.", ""]
    explained = [
        "Val mIoU in % of the last checkpoint: mean ± sample standard deviation (number of seeds). Peak memory and wall time of a run: means over seeds."
    ]
    if experiment.baseline:
        explained.append(f"Difference of the means to `{experiment.baseline}` in points.")
    if experiment.ceiling:
        explained[-1] = explained[-1][:-1] + f", and the share of the gap between it and `{experiment.ceiling}` that is closed."
    for text, (heading, *rows) in zip((explained[0], explained[-1]), comparison.tables(), strict=False):
        lines += [text, "", _cells(heading), "|---" + "|---:" * (len(heading) - 1) + "|", *map(_cells, rows), ""]
    lines += [f"- {name} failed: {error}" for name, error in comparison.failures.items()]
    return "\n".join(lines).rstrip() + "\n"


def _cells(texts: Sequence[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"


def _spread(values: Sequence[float | None]) -> Spread | None:
    known = [value for value in values if value is not None]
    return Spread(mean(known), stdev(known) if len(known) > 1 else None, len(known)) if known else None


def _percents(shares: Sequence[float | None]) -> list[str]:
    return ["n/a" if share is None else f"{100 * share:.0f}" for share in shares]


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
