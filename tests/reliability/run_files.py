"""What a run has left in its folder, for comparing runs to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from multidomain_cct.training.checkpoints.checkpoint import checkpoints
from multidomain_cct.training.runlog import read_metrics

DETERMINISTIC: dict[str, Any] = {
    "encoder": {"name": "test_resnet", "stride": 8, "context": "fpn", "width": 32, "norm": "frozen"},
    "perturbations": {
        **{kind: {"count": 0} for kind in ("feature_noise", "dropout", "adversarial_noise")},
        "feature_drop": {"count": 2, "low": 0.7, "high": 0.7},
    },
}
"""A recipe in which nothing but the data is random, so that two processes compute what one does."""


def tensors_of(run: Path, step: int | None = None) -> dict[str, bytes]:
    """The bytes of a checkpoint's tensor files; of the newest one when no step is named."""
    folder = checkpoints(run / "checkpoints")[-1] if step is None else run / "checkpoints" / f"step-{step:08d}"
    return {name: (folder / name).read_bytes() for name in ("model.safetensors", "optimiser.safetensors")}


def logged(run: Path) -> list[dict[str, Any]]:
    """Losses, learning rates and scores of every step, as they stand in metrics.jsonl: whole numbers of bits, since
    JSON keeps every digit.
    """
    lines = [
        {key: value for key, value in line.items() if not key.startswith("sys/")}
        for line in read_metrics(run / "metrics.jsonl")
    ]
    return [line for line in lines if len(line) > 1]


def state_of(run: Path, step: int) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "checkpoints" / f"step-{step:08d}" / "state.json").read_text())
    return content


def steps_of(run: Path) -> list[int]:
    """The steps of the published checkpoints."""
    return [int(path.name.removeprefix("step-")) for path in checkpoints(run / "checkpoints")]


def rewrite_manifest(checkpoint: Path) -> None:
    """Make a checkpoint that was tampered with look whole, to test what is behind the check of the bytes."""
    import hashlib

    names = ("model.safetensors", "optimiser.safetensors", "state.json")
    contents = {name: (checkpoint / name).read_bytes() for name in names}
    manifest = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in contents.items()
    }
    (checkpoint / "MANIFEST.json").write_text(json.dumps(manifest))
