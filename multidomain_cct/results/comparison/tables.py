"""The table of an experiment's scores: mean and standard deviation over seeds, points over the baseline, share of the
gap to the ceiling.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from multidomain_cct.files.durable import replace_text
from multidomain_cct.results.comparison.bootstrap import Interval, paired_interval
from multidomain_cct.results.comparison.experiment import MEAN, Experiment, PlannedRun, RunScores


@dataclass(frozen=True)
class Spread:
    """A mean over seeds."""

    mean: float
    std: float | None
    """Sample standard deviation (ddof 1); None of a single value."""
    count: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """The spread of the known values; None when there are none."""
        known = [value for value in values if value is not None]
        return cls(mean(known), stdev(known) if len(known) > 1 else None, len(known)) if known else None

    def percent(self) -> str:
        """`mean ± std (count)` in percent."""
        std = "" if self.std is None else f" ± {100 * self.std:.1f}"
        return f"{100 * self.mean:.1f}{std} ({self.count})"


@dataclass(frozen=True)
class Comparison:
    """The scores of an experiment's finished runs, and the tables that they make."""

    experiment: Experiment
    runs: Sequence[PlannedRun]
    """All of the experiment."""
    scores: Sequence[RunScores]
    failures: Mapping[str, str] = field(default_factory=dict)
    """Why a run failed, by the run's name."""

    @property
    def columns(self) -> list[str]:
        """The scored domains of all rows, and their mean when there are several."""
        scored = (name for run in self.runs for name, domain in run.recipe.domains.items() if domain.val_split)
        domains = list(dict.fromkeys(scored))
        return [*domains, MEAN] if len(domains) > 1 else domains

    def spread(self, row: str, column: str) -> Spread | None:
        """The mIoU (0 to 1) of a row over its finished seeds.

        None when no run is finished; in the column of the mean also when the row lacks a domain: its mean is of others.
        """
        runs = [run for run in self.scores if run.row == row]
        if column == MEAN:
            runs = [run for run in runs if len(run.miou) == len(self.columns) - 1]
        return Spread.of(run.score(column) for run in runs)

    def gain(self, row: str, column: str) -> float | None:
        """The row's mean minus its baseline's, 0 to 1."""
        return self._difference(row, self._baseline(row), column)

    def gap_share(self, row: str, column: str) -> float | None:
        """(row - baseline) / (ceiling - baseline), of the means over seeds; in the column of the mean, the mean of the
        domains' shares.

        None when one of the three is missing or the ceiling is not above the baseline.
        """
        if column == MEAN:
            shares = [share for domain in self.columns[:-1] if (share := self.gap_share(row, domain)) is not None]
            return mean(shares) if len(shares) == len(self.columns) - 1 else None
        gain, gap = self.gain(row, column), self._difference(self.experiment.ceiling, self._baseline(row), column)
        return gain / gap if gain is not None and gap is not None and gap > 0 else None

    def interval(self, row: str, column: str) -> Interval | None:
        """Of the difference to the row's baseline, over the val images; None unless both rows have counts of a seed."""
        name = self._baseline(row)
        mine, theirs = (
            {run.seed: run.counts[column] for run in self.scores if run.row == each and column in run.counts}
            for each in (row, name)
        )
        shared = sorted(mine.keys() & theirs.keys())
        if row == name or not shared:
            return None
        return paired_interval([theirs[seed] for seed in shared], [mine[seed] for seed in shared])

    def _baseline(self, row: str) -> str:
        return self.experiment.rows[row].baseline or self.experiment.baseline

    def _difference(self, row: str, other: str, column: str) -> float | None:
        """One row's mean minus another's."""
        first, second = self.spread(row, column), self.spread(other, column)
        return first.mean - second.mean if first and second else None

    def tables(self) -> list[list[list[str]]]:
        """The tables as rows of cells, headings first: mIoU and cost; then, with a baseline, the gains over it."""
        scores = [["row", *(f"{column} mIoU %" for column in self.columns), "peak MiB", "minutes"]]
        for name in self.experiment.rows:
            runs = [run for run in self.scores if run.row == name]
            spreads = [self.spread(name, column) for column in self.columns]
            peak, minutes = Spread.of(run.peak_mib for run in runs), Spread.of(run.minutes for run in runs)
            cells = [spread.percent() if spread else "n/a" for spread in spreads]
            cost = [f"{peak.mean:.0f}" if peak else "n/a", f"{minutes.mean:.1f}" if minutes else "n/a"]
            scores.append([name, *cells, *cost])
        if not self.experiment.baseline:
            return [scores]
        shared = self.columns if self.experiment.ceiling else []
        titles = [f"{column} points" for column in self.columns] + [f"{column} gap closed %" for column in shared]
        gains = [["row", *titles]]
        for name in self.experiment.rows:
            points = [_points(self.gain(name, column), self.interval(name, column)) for column in self.columns]
            gains.append([name, *points, *(_percent(self.gap_share(name, column), ".0f") for column in shared)])
        return [scores, gains]

    def missing(self) -> list[str]:
        """Names of the runs that are not finished."""
        finished = {(run.row, run.seed) for run in self.scores}
        return [run.recipe.name for run in self.runs if (run.row, run.seed) not in finished]

    def machines(self) -> list[str]:
        """The machines that the finished runs were trained on."""
        environments = [run.environment for run in self.scores]
        return sorted(
            {f"{each.get('device', 'unknown')}, {each.get('threads', '?')} thread(s)" for each in environments}
        )


def write_comparison(comparison: Comparison, out: Path, *, command: str, date: str) -> None:
    """Write the tables to `out` and every run's numbers beside it, as JSON. Each file is replaced as a whole."""
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_text(out, _markdown(comparison, command, date))
    experiment = comparison.experiment
    content = {
        "title": experiment.title,
        "command": command,
        "date": date,
        "baseline": experiment.baseline or None,
        "ceiling": experiment.ceiling or None,
        "rows": {name: _row_numbers(comparison, name) for name in experiment.rows},
        "runs": [asdict(replace(run, counts={})) for run in comparison.scores],
        "missing": comparison.missing(),
        "failed": dict(comparison.failures),
    }
    replace_text(out.with_suffix(".json"), json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    counts = {run.folder: {name: each.tolist() for name, each in run.counts.items()} for run in comparison.scores}
    if any(counts.values()):
        replace_text(out.with_suffix(".counts.json"), json.dumps(counts, separators=(",", ":")) + "\n")


def _row_numbers(comparison: Comparison, row: str) -> dict[str, Any]:
    spreads = {column: comparison.spread(row, column) for column in comparison.columns}
    return {
        "miou": {column: asdict(spread) if spread else None for column, spread in spreads.items()},
        "interval": {
            column: asdict(interval) if (interval := comparison.interval(row, column)) else None
            for column in comparison.columns
        },
        "gain": {column: comparison.gain(row, column) for column in comparison.columns},
        "gap_share": {column: comparison.gap_share(row, column) for column in comparison.columns},
    }


def _markdown(comparison: Comparison, command: str, date: str) -> str:
    experiment, missing = comparison.experiment, comparison.missing()
    made = f"{date}. {'; '.join(comparison.machines()) or 'No run is finished'}."
    lines = [f"# {experiment.title}", "", f"    {command}", "", made, ""]
    if missing:
        finished = f"{len(comparison.scores)} of {len(comparison.runs)} runs are finished"
        lines += [f"**Not complete**: {finished}; missing: {', '.join(missing)}.", ""]
    scores = (
        "Val mIoU in % of the last checkpoint: mean ± sample standard deviation (number of seeds). Peak memory and "
        "wall time of a run: means over seeds."
    )
    others = ", ".join(f"of {name} to `{row.baseline}`" for name, row in experiment.rows.items() if row.baseline)
    gains = f"Difference of the means to `{experiment.baseline}`{f' ({others})' if others else ''} in points"
    if any(run.counts for run in comparison.scores):
        gains += " (95 % interval of a paired bootstrap over the val images; share of its draws above 0)"
    if experiment.ceiling:
        gains += f", and the share of the gap from there to `{experiment.ceiling}` that is closed"
    for text, (heading, *rows) in zip((scores, f"{gains}."), comparison.tables(), strict=False):
        lines += [text, "", _cells(heading), "|---" + "|---:" * (len(heading) - 1) + "|", *map(_cells, rows), ""]
    lines += [f"- {name} failed: {error}" for name, error in comparison.failures.items()]
    return "\n".join(lines).rstrip() + "\n"


def _cells(texts: Sequence[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"


def _points(gain: float | None, interval: Interval | None) -> str:
    """A difference in points, its 95 % interval over the val images, and how often it is above 0."""
    if gain is None or interval is None:
        return _percent(gain, "+.1f")
    span = f"{100 * interval.low:+.1f} to {100 * interval.high:+.1f}"
    return f"{100 * gain:+.1f} ({span}; {interval.probability:.0%})"


def _percent(value: float | None, form: str) -> str:
    return "n/a" if value is None else format(100 * value, form)
