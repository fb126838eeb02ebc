"""What a run's folder records besides its checkpoints, read leniently: a run that died at once has records too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from multidomain_cct.training.runlog import read_metrics


def recorded_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that have a step; none when there is no such file."""
    return read_metrics(run / "metrics.jsonl")


def recorded_environment(run: Path) -> dict[str, Any]:
    """env.json: command, date, device, versions; empty when it cannot be read."""
    try:
        content = json.loads((run / "env.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def recorded_counts(run: Path, step: int) -> dict[str, np.ndarray]:
    """(n, 3, C) pixel counts of each val image by domain, of the scores at `step`; empty when there are none."""
    try:
        content = json.loads((run / "val_counts.json").read_text(encoding="utf-8"))
        domains = content["domains"] if content["step"] == step else {}
        return {name: np.array(each["right, truth, prediction"]) for name, each in domains.items()}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def scores_by_class(line: dict[str, Any], domain: str) -> dict[str, float | None]:
    """IoU by class of one domain in a line of metrics; None for a class in neither truth nor prediction."""
    start = f"val/{domain}/iou/"
    return {key.removeprefix(start): value for key, value in line.items() if key.startswith(start)}


def recorded_image_size(run: Path, domain: str) -> tuple[int, int] | None:
    """(width, height) of the domain's median training image; None where it was not recorded."""
    size = recorded_environment(run).get("images", {}).get(domain, {}).get("median_size")
    return (size[0], size[1]) if size else None
