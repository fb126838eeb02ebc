"""What a page knows of a run without its checkpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

from multidomain_cct.data.domain import Domain
from multidomain_cct.data.shards.reader import Shards
from multidomain_cct.data.specification import read_domain
from multidomain_cct.errors import UserError
from multidomain_cct.results.records import recorded_environment, recorded_metrics
from multidomain_cct.training.recipe import Recipe, read_run_recipe

RUN_COLORS = ("#2f7fd1", "#e07b1a", "#2f9e62", "#c24a97", "#8468d0", "#a38a00", "#1a9aa8", "#d0525a")
"""One per run, legible on white and on black; they repeat."""


@dataclass(frozen=True)
class RunFacts:
    """A run's folder without its checkpoints."""

    folder: Path
    label: str
    """Name on the page; differs between runs."""
    color: str
    recipe: Recipe
    domains: dict[str, Domain]
    metrics: list[dict[str, Any]]
    environment: dict[str, Any]

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric; a value that was not finite is nan."""
        points = [(line["step"], line[key]) for line in self.metrics if key in line]
        return [step for step, _ in points], [math.nan if value is None else float(value) for _, value in points]

    @property
    def steps(self) -> int:
        """Optimiser steps that were logged."""
        return max((line["step"] for line in self.metrics), default=0)

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return [line for line in self.metrics if line.get("val/mean_miou") is not None]

    @property
    def best(self) -> dict[str, Any]:
        """The evaluation at which the checkpoint `best` was saved: the first with the highest mean."""
        return max(self.evaluations, key=lambda line: line["val/mean_miou"])

    @property
    def speed(self) -> dict[str, float | None]:
        """Median images per second, peak memory in MiB, mean share of waiting for data, and seconds of all starts."""
        rates, peaks, waits, seconds = (
            [value for value in self.series(f"sys/{key}")[1] if not math.isnan(value)]
            for key in ("images_per_s", "peak_mib", "data_wait_fraction", "wall_s")
        )
        # Each start counts from zero.
        ends = [before for before, after in pairwise([*seconds, 0.0]) if after < before]
        return {
            "images_per_s": median(rates) if rates else None,
            "peak_mib": max(peaks, default=None),
            "data_wait": mean(waits) if waits else None,
            "seconds": sum(ends) if ends else None,
        }

    def images(self, domain: str) -> dict[str, Any]:
        """What the run recorded of the domain's training images; empty for runs of earlier versions."""
        images: dict[str, Any] = self.environment.get("images", {}).get(domain, {})
        return images

    def val_shards(self, domain: str) -> Shards:
        """The shards of the domain's val split. Raises UserError when there are none."""
        split = self.recipe.domains[domain].val_split
        if not split:
            raise UserError("the recipe names no val split")
        return Shards.open(Path(self.recipe.data.shards) / domain, split)


def read_runs(folders: Sequence[Path]) -> list[RunFacts]:
    """The runs, each with a label and a colour of its own. Raises UserError for a folder that is not a run."""
    for folder in folders:
        if not (folder / "recipe.yaml").is_file():
            raise UserError(f"{folder}: this is not a run's folder (it has no recipe.yaml).")
    names = [folder.resolve().name for folder in folders]
    return [
        RunFacts(
            folder=folder,
            label=name if names.count(name) == 1 else str(folder),
            color=color,
            recipe=(recipe := read_run_recipe(folder)),
            domains={domain: read_domain(folder / "domains" / f"{domain}.yaml") for domain in recipe.domains},
            metrics=recorded_metrics(folder),
            environment=recorded_environment(folder),
        )
        for folder, name, color in zip(folders, names, cycle(RUN_COLORS), strict=False)
    ]
