"""The table of an experiment's scores: mean and standard deviation over seeds, points over the baseline, share of the
gap to the ceiling.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from multidomain_cct.files.durable import replace_text
from multidomain_cct.results.comparison.experiment import MEAN, Experiment, Run, RunScores


@dataclass(frozen=True)
class Spread:
    """A mean over seeds."""

    mean: float
    std: float | None
    """Sample standard deviation (ddof 1); None of a single value."""
    count: int

    def text(self, factor: float = 100, digits: int = 1) -> str:
        """The values times `factor`, as `mean ± std (count)`."""
        std = "" if self.std is None else f" ± {factor * self.std:.{digits}f}"
        return f"{factor * self.mean:.{digits}f}{std} ({self.count})"


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
        domains = list(
            dict.fromkeys(name for run in self.runs for name, domain in run.recipe.domains.items() if domain.val_split)
        )
        return [*domains, MEAN] if len(domains) > 1 else domains

    def spread(self, row: str, column: str) -> Spread | None:
        """The mIoU (0 to 1) of a row over its finished seeds.

        None when no run is finished, or when the column is the mean and the row was not trained on every domain: it
        would be a mean of other things.
        """
        finished = [
            run for run in self.scores if run.row == row and (column != MEAN or len(run.miou) == len(self.columns) - 1)
        ]
        return _spread([run.score(column) for run in finished])

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

    def _baseline(self, row: str) -> str:
        return self.experiment.rows[row].baseline or self.experiment.baseline

    def _difference(self, row: str, other: str, column: str) -> float | None:
        """One row's mean minus another's."""
        first, second = self.spread(row, column), self.spread(other, column)
        return first.mean - second.mean if first and second else None

    def tables(self) -> list[list[list[str]]]:
        """The tables as rows of cells, headings first: mIoU and cost; then, with a baseline, what each row gained on
        it.
        """
        scores = [["row", *(f"{column} mIoU %" for column in self.columns), "peak MiB", "minutes"]]
        for name in self.experiment.rows:
            finished = [run for run in self.scores if run.row == name]
            cost = [_spread([run.peak_mib for run in finished]), _spread([run.minutes for run in finished])]
            cells = [spread.text() if (spread := self.spread(name, column)) else "n/a" for column in self.columns]
            scores.append(
                [
                    name,
                    *cells,
                    *(
                        f"{spread.mean:.{digits}f}" if spread else "n/a"
                        for spread, digits in zip(cost, (0, 1), strict=True)
                    ),
                ]
            )
        if not self.experiment.baseline:
            return [scores]
        shared = self.columns if self.experiment.ceiling else []
        gains = [
            ["row", *(f"{column} points" for column in self.columns), *(f"{column} gap closed %" for column in shared)]
        ]
        for name in self.experiment.rows:
            points = [self.gain(name, column) for column in self.columns]
            shares = [self.gap_share(name, column) for column in shared]
            gains.append(
                [name, *("n/a" if gain is None else f"{100 * gain:+.1f}" for gain in points), *_percents(shares)]
            )
        return [scores, gains]

    def missing(self) -> list[str]:
        """Names of the runs that are not finished."""
        finished = {(run.row, run.seed) for run in self.scores}
        return [run.recipe.name for run in self.runs if (run.row, run.seed) not in finished]

    def machines(self) -> list[str]:
        """The machines that the finished runs were trained on."""
        return sorted(
            {
                f"{run.environment.get('device', 'unknown')}, {run.environment.get('threads', '?')} thread(s)"
                for run in self.scores
            }
        )


def write_comparison(comparison: Comparison, out: Path, *, command: str, date: str) -> None:
    """Write the tables to `out` and every run's numbers beside it, as JSON. Each file is replaced as a whole."""
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_text(out, _markdown(comparison, command, date))
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
    replace_text(out.with_suffix(".json"), json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _row_numbers(comparison: Comparison, row: str) -> dict[str, Any]:
    spreads = {column: comparison.spread(row, column) for column in comparison.columns}
    return {
        "miou": {column: asdict(spread) if spread else None for column, spread in spreads.items()},
        "gain": {column: comparison.gain(row, column) for column in comparison.columns},
        "gap_share": {column: comparison.gap_share(row, column) for column in comparison.columns},
    }


def _markdown(comparison: Comparison, command: str, date: str) -> str:
    experiment, missing = comparison.experiment, comparison.missing()
    lines = [
        f"# {experiment.title}",
        "",
        f"    {command}",
        "",
        f"{date}. {'; '.join(comparison.machines()) or 'No run is finished'}.",
        "",
    ]
    if missing:
        lines += [
            f"**Not complete**: {len(comparison.scores)} of {len(comparison.runs)} runs are finished; missing: "
            f"{', '.join(missing)}.",
            "",
        ]
    explained = [
        "Val mIoU in % of the last checkpoint: mean ± sample standard deviation (number of seeds). Peak memory and "
        "wall time of a run: means over seeds."
    ]
    if experiment.baseline:
        others = ", ".join(f"of {name} to `{row.baseline}`" for name, row in experiment.rows.items() if row.baseline)
        explained.append(
            f"Difference of the means to `{experiment.baseline}`{f' ({others})' if others else ''} in points."
        )
    if experiment.ceiling:
        explained[-1] = (
            explained[-1][:-1] + f", and the share of the gap from there to `{experiment.ceiling}` that is closed."
        )
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
