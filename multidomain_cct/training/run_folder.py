"""A run's folder: what is written into it before the first step, and whether a run in it may be continued."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from multidomain_cct.data.batches.streams import DomainStreams
from multidomain_cct.data.domain import Domain
from multidomain_cct.errors import UserError
from multidomain_cct.evaluation.scoring import Score
from multidomain_cct.files.durable import make_folder, replace_text
from multidomain_cct.files.printable import first_few
from multidomain_cct.files.strict_yaml import read_yaml
from multidomain_cct.training.checkpoints.checkpoint import newest_checkpoint
from multidomain_cct.training.checkpoints.state import read_state
from multidomain_cct.training.recipe import Recipe, changes, differences, read_run_recipe


@dataclass(frozen=True)
class Start:
    """Where a run begins."""

    checkpoint: Path | None = None
    """None: at the first step."""
    notices: tuple[str, ...] = ()
    """What to print about it."""
    forced: tuple[str, ...] = ()
    """Differences from the run so far, `key: old -> new`, that `resume=force` overrules."""


def find_start(recipe: Recipe, domains: Mapping[str, Domain], streams: Sequence[DomainStreams]) -> Start:
    """Where the recipe's run begins: anew, or at the newest whole checkpoint of its folder.

    Raises UserError for a folder that holds something else, or a run with other settings or data.
    """
    folder = recipe.folder
    if not folder.exists() or _never_began(folder):
        return Start()
    if recipe.resume == "never":
        raise UserError(f"{folder} exists. Continue it with resume=auto, or start another run with name=OTHER.")
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder} exists and is not a run (it has no recipe.yaml). Choose another name=.")
    checkpoint, warnings = newest_checkpoint(folder / "checkpoints")
    settings = differences(read_run_recipe(folder), recipe) + _changed_domains(folder, domains)
    trained_on = read_state(checkpoint).fingerprints if checkpoint is not None else None
    data = [] if trained_on is None else changes(trained_on, fingerprints(recipe, streams))
    if recipe.resume == "force":
        forced = (*settings, *data)
        return Start(checkpoint, (*warnings, *(f"resume=force goes on although {change}" for change in forced)), forced)
    otherwise = "start another run with name=OTHER, or go on all the same with resume=force, which env.json records."
    if settings:
        raise UserError(f"{folder} is a run of another recipe: {first_few(settings)}. Take these back, {otherwise}")
    if data:
        raise UserError(f"{folder} was trained on other data in {first_few(data)}. Restore them, {otherwise}")
    return Start(checkpoint, tuple(warnings))


def _changed_domains(folder: Path, domains: Mapping[str, Domain]) -> list[str]:
    """What differs in the specifications of the domains that the run knows, as `key: old -> new`."""
    changed = []
    for name, domain in domains.items():
        path = folder / "domains" / f"{name}.yaml"
        if path.is_file():
            old, new = read_yaml(path), yaml.safe_load(domain.to_yaml())
            changed += changes({name: old}, {name: new})
    return changed


def _never_began(folder: Path) -> bool:
    """Whether the folder is empty, or holds only what a run writes before its first step."""
    before = {"recipe.yaml", "env.json", "domains", "metrics.jsonl"}
    metrics = folder / "metrics.jsonl"
    return {path.name for path in folder.iterdir()} <= before and not (metrics.is_file() and metrics.stat().st_size)


def write_run_folder(recipe: Recipe, domains: Mapping[str, Domain], environment: Mapping[str, object]) -> None:
    """Write the recipe, the domains as used, and the environment of each start."""
    make_folder(recipe.folder / "domains")
    replace_text(recipe.folder / "recipe.yaml", recipe.to_yaml())
    for name, domain in domains.items():
        replace_text(recipe.folder / "domains" / f"{name}.yaml", domain.to_yaml())
    path = recipe.folder / "env.json"
    try:
        earlier = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        # The first start is what made the run; later ones are listed under it.
        content = earlier | {"resumed": [*earlier.get("resumed", []), environment]} if earlier else environment
    except (ValueError, TypeError, AttributeError):
        remedy = "Remove it to go on without the record of earlier starts."
        raise UserError(f"{path}: this is not the JSON that training writes. {remedy}") from None
    replace_text(path, json.dumps(content, indent=1))


def write_counts(folder: Path, step: int, scores: Mapping[str, Score]) -> None:
    """Keep the pixel counts of each val image, of each domain, from which `compare` computes intervals."""
    domains = {
        name: {"classes": list(score.iou), "right, truth, prediction": score.counts.tolist()}
        for name, score in scores.items()
    }
    replace_text(folder / "val_counts.json", json.dumps({"step": step, "domains": domains}, separators=(",", ":")))


def fingerprints(recipe: Recipe, streams: Sequence[DomainStreams]) -> dict[str, str]:
    """Hashes of the shards that a run trains on, by domain/split, and of its labelled keys, by domain/labelled."""
    hashes = {}
    for stream in streams:
        choice = recipe.domains[stream.domain.name]
        splits = [choice.train_split, *choice.unlabelled_splits, *([choice.weak_split] if choice.weak_split else [])]
        for split, shards in zip(splits, stream.sources, strict=False):
            hashes[f"{stream.domain.name}/{split}"] = shards.fingerprint
        keys = [stream.sources[source].keys[number] for source, number in stream.labelled]
        hashes[f"{stream.domain.name}/labelled"] = hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()[:16]
    return hashes


def training_images(streams: Sequence[DomainStreams]) -> dict[str, dict[str, Any]]:
    """For env.json, by domain: the images that the run learns from, their labelled pixels, and the median size."""
    facts = {}
    for stream in streams:
        counts = stream.labelled_classes if stream.labelled else None
        names = [label.name for label in stream.domain.classes]
        facts[stream.domain.name] = {
            "labelled": len(stream.labelled),
            "unlabelled": len(stream.unlabelled),
            "class_pixels": counts and dict(zip(names, counts.pixels.tolist(), strict=True)),
            "median_size": _median_size(stream),
        }
    return facts


def _median_size(stream: DomainStreams) -> tuple[int, int] | None:
    """(width, height) of the image of median area among a few; None where the domain's `size` says it."""
    sizes = stream.some_sizes if stream.domain.size is None else []
    return sorted(sizes, key=math.prod)[len(sizes) // 2] if sizes else None
