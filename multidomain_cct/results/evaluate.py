"""Scores of a trained run on any labelled split, from the run's folder and its shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from multidomain_cct.data.shards.reader import Shards
from multidomain_cct.errors import UserError
from multidomain_cct.evaluation.inference import InferenceSettings
from multidomain_cct.evaluation.scoring import Score, arithmetic_and_harmonic, score
from multidomain_cct.results.trained_run import TrainedRun


def evaluate(
    run: TrainedRun,
    names: Sequence[str],
    split: str | None,
    settings: InferenceSettings | None = None,
    *,
    shards: Path | None = None,
    workers: int = 1,
    seen: Callable[[str], None] = lambda key: None,
) -> list[Score]:
    """One score per domain.

    `split` None scores each domain's val split of the recipe; `settings` None predicts as in training; `shards`
    replaces the recipe's folder of shards. `seen` is told each key. Raises UserError for a domain without a head and
    for a split without shards.
    """
    root = shards or Path(run.recipe.data.shards)
    splits = {name: split or run.recipe.domains[run.require_head(name)].val_split for name in names or run.domains}
    if not names:
        splits = {name: chosen for name, chosen in splits.items() if chosen}
    if not splits or not all(splits.values()):
        name = next((name for name, chosen in splits.items() if not chosen), next(iter(run.domains)))
        raise UserError(
            f"{run.folder}: the recipe gives {name} no val_split, so there is nothing to score by default. Name a "
            "split with --split."
        )
    opened = {name: Shards.open(root / name, chosen) for name, chosen in splits.items()}
    settings = settings or run.recipe.evaluation
    return [
        score(
            run.model,
            opened[name],
            run.domains[name],
            splits[name],
            settings,
            device=run.device,
            workers=workers,
            seen=seen,
        )
        for name in splits
    ]


def scores_as_json(run: TrainedRun, scores: Sequence[Score]) -> dict[str, Any]:
    """The same as plain values."""
    arithmetic, harmonic = arithmetic_and_harmonic([result.miou for result in scores])
    domains = {result.domain.name: result.as_json() for result in scores}
    return {
        "run": str(run.folder),
        "checkpoint": run.checkpoint.name,
        "step": run.state.step,
        "mean_miou": arithmetic,
        "harmonic_miou": harmonic,
        "domains": domains,
    }


def write_scores(run: TrainedRun, scores: Sequence[Score]) -> Path:
    """Keep the scores in the run's folder and return the file; other splits, checkpoints, domains or settings have
    files of their own.
    """
    parts = ["evaluation", *dict.fromkeys(result.split for result in scores), run.checkpoint.name]
    if len(scores) < len(run.domains):
        parts += [result.domain.name for result in scores]
    if scores[0].settings != run.recipe.evaluation:
        parts.append(hashlib.sha256(repr(scores[0].settings).encode()).hexdigest()[:6])
    path = run.folder / f"{'-'.join(parts)}.json"
    path.write_text(json.dumps(scores_as_json(run, scores), indent=1), encoding="utf-8")
    return path
