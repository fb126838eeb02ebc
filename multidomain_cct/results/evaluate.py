"""Scores of a trained run on any labelled split, from the run's folder and its shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from multidomain_cct.data.shards.reader import Shards
from multidomain_cct.errors import UserError
from multidomain_cct.evaluation.inference import InferenceSettings
from multidomain_cct.evaluation.scoring import Score, arithmetic_and_harmonic, score
from multidomain_cct.files.durable import replace_text
from multidomain_cct.results.trained_run import TrainedRun


def evaluate(
    run: TrainedRun,
    names: Sequence[str] = (),
    split: str | None = None,
    settings: InferenceSettings | None = None,
    *,
    shards: Path | None = None,
    workers: int | None = None,
) -> list[Score]:
    """One score per domain; no names: all.

    `split` None scores each domain's val split of the recipe; `settings` None predicts as in training; `shards`
    replaces the recipe's folder of shards; `workers` None: one loader process, on a GPU as many as in training. Raises
    UserError for a domain without a head and for a split without shards.
    """
    chosen = [run.head(name).name for name in names] or list(run.domains)
    splits = {name: split or run.recipe.domains[name].val_split for name in chosen}
    if not names:
        splits = {name: each for name, each in splits.items() if each}
    missing = [name for name in chosen if not splits.get(name)]
    if missing and (names or not splits):
        raise UserError(f"{run.folder}: the recipe gives {missing[0]} no val_split. Name a split with --split.")
    root = shards or Path(run.recipe.data.shards)
    opened = {name: Shards.open(root / name, each) for name, each in splits.items()}
    settings = settings or run.recipe.evaluation
    if workers is None:
        workers = run.recipe.data.workers if run.device.type == "cuda" else 1
    score_split = partial(score, run.model, settings=settings, workers=workers)
    return [score_split(opened[name], run.domains[name], each) for name, each in splits.items()]


def scores_as_json(run: TrainedRun, scores: Sequence[Score]) -> dict[str, Any]:
    """Scores as plain values: `domains.<name>.miou` and `.iou.<class>`, 0 to 1, and how they were made."""
    arithmetic, harmonic = arithmetic_and_harmonic([result.miou for result in scores])
    domains = {result.domain.name: result.as_json() for result in scores}
    return {
        "run": str(run.folder),
        "checkpoint": run.checkpoint.name,
        "weights": run.weights,
        "step": run.state.step,
        "mean_miou": arithmetic,
        "harmonic_miou": harmonic,
        "domains": domains,
    }


def write_scores(run: TrainedRun, scores: Sequence[Score]) -> Path:
    """Keep the scores in a file of the run, named by split, checkpoint, domains, weights and settings; return it."""
    parts = ["evaluation", *dict.fromkeys(result.split for result in scores), run.checkpoint.name]
    if len(scores) < len(run.domains):
        parts += [result.domain.name for result in scores]
    if run.weights == "student":
        parts.append(run.weights)
    if scores[0].settings != run.recipe.evaluation:
        parts.append(hashlib.sha256(repr(scores[0].settings).encode()).hexdigest()[:6])
    path = run.folder / f"{'-'.join(parts)}.json"
    replace_text(path, json.dumps(scores_as_json(run, scores), indent=1))
    return path
