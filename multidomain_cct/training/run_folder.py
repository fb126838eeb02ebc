"""A run's folder: what is written into it before the first step, and whether a run in it may be continued."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from multidomain_cct.data.domain import Domain
from multidomain_cct.data.streams import DomainStreams
from multidomain_cct.training.checkpoint import newest_checkpoint, read_state
from multidomain_cct.training.recipe import Recipe, differences, read_recipe


def resumable_checkpoint(recipe: Recipe, domains: Mapping[str, Domain], streams: Sequence[DomainStreams]) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, or None for a new run, and what the user should know of it.

    Raises ValueError rather than touch a folder that holds another run.
    """
    folder = recipe.folder
    if not folder.exists() or _never_began(folder):
        return None, []
    if recipe.resume == "never":
        raise ValueError(f"{folder} exists. Continue it with resume=auto, or start another run with name=OTHER.")
    if not (folder / "recipe.yaml").is_file():
        raise ValueError(f"{folder} exists and is not a run (it has no recipe.yaml). Choose another name=.")
    changed = differences(read_recipe(folder / "recipe.yaml"), recipe)
    for name, domain in domains.items():
        spec = folder / "domains" / f"{name}.yaml"
        if spec.is_file() and spec.read_text(encoding="utf-8") != domain.to_yaml():
            changed.append(f"the specification of {name}")
    if changed:
        more = f", and {len(changed) - 4} more" if len(changed) > 4 else ""
        raise ValueError(f"{folder} is a run of another recipe: {', '.join(changed[:4])}{more}. Take these back, or start another run with name=OTHER.")
    checkpoint, warnings = newest_checkpoint(folder / "checkpoints")
    if checkpoint is not None:
        old, new = read_state(checkpoint).fingerprints, fingerprints(recipe, streams)
        for split in new:
            if old.get(split) != new[split]:
                raise ValueError(
                    f"{folder} was trained on other data in {split}: {old.get(split)} -> {new[split]}. Restore them, or start another run with name=OTHER."
                )
    return checkpoint, warnings


def _never_began(folder: Path) -> bool:
    """Whether the folder is empty, or holds only what a run writes before its first step."""
    before = {"recipe.yaml", "env.json", "domains", "metrics.jsonl"}
    metrics = folder / "metrics.jsonl"
    return {path.name for path in folder.iterdir()} <= before and not (metrics.is_file() and metrics.stat().st_size)


def write_run_folder(recipe: Recipe, domains: Mapping[str, Domain], environment: Mapping[str, object]) -> None:
    """Write what a reader, and `evaluate`, need to know of the run: recipe, domains as used, environment of each start."""
    (recipe.folder / "domains").mkdir(parents=True, exist_ok=True)
    _write(recipe.folder / "recipe.yaml", recipe.to_yaml())
    for name, domain in domains.items():
        _write(recipe.folder / "domains" / f"{name}.yaml", domain.to_yaml())
    path = recipe.folder / "env.json"
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    # The first start is what made the run; later ones are listed under it.
    content = earlier | {"resumed": [*earlier.get("resumed", []), environment]} if earlier else environment
    _write(path, json.dumps(content, indent=1))


def _write(path: Path, text: str) -> None:
    """Replace the file as a whole: a crash leaves the old one or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def fingerprints(recipe: Recipe, streams: Sequence[DomainStreams]) -> dict[str, str]:
    """Contents of the shards a run trains on, by domain/split, and which of their images are labelled, by domain/labelled."""
    found = {}
    for stream in streams:
        choice = recipe.domains[stream.domain.name]
        splits = [choice.train_split, *choice.unlabelled_splits, *([choice.weak_split] if choice.weak_split else [])]
        for split, shards in zip(splits, stream.sources, strict=False):
            found[f"{stream.domain.name}/{split}"] = shards.fingerprint
        keys = [stream.sources[source].keys[number] for source, number in stream.labelled]
        found[f"{stream.domain.name}/labelled"] = hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()[:16]
    return found
