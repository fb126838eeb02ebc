"""The state of a run in a checkpoint, besides its tensors: state.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from multidomain_cct.errors import UserError
from multidomain_cct.files.printable import first_few

SCHEMA = 3
STATE = "state.json"
_ANOTHER = "Choose another checkpoint, or start another run with name=OTHER."


@dataclass(frozen=True)
class RunState:
    """What a run knows besides its tensors."""

    step: int
    """Optimiser steps done."""
    fingerprints: dict[str, str]
    """Contents of the shards the run trains on, by domain/split."""
    best_step: int = 0
    """Step with the best mean mIoU so far; 0 before the first evaluation."""
    best_miou: float = -1.0
    owes_evaluation: bool = False
    """The run was asked to stop before this step's evaluation was done."""
    images: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Images read and skipped, over all processes, by domain that may skip some."""
    recipe: str = ""
    """The recipe as YAML, so that a checkpoint can be understood without its run's folder."""
    domains: dict[str, str] = field(default_factory=dict)
    """The domains' specifications as YAML, by name."""
    schema: int = SCHEMA


_STATE_TYPES: dict[str, tuple[type, ...]] = {
    **{name: (get_origin(hint) or hint,) for name, hint in get_type_hints(RunState).items()},
    "optimiser": (list,),
    "scaler": (dict, type(None)),
}
"""The contents of state.json: the fields of RunState, the names of the optimiser's tensors, and a scaler's state."""


def read_state(checkpoint: Path) -> RunState:
    """The run's state in a checkpoint.

    Raises UserError when it is not of a schema that this version reads, or not complete.
    """
    return run_state(plain_state(checkpoint))


def run_state(plain: Mapping[str, Any]) -> RunState:
    """The state in the contents of state.json."""
    return RunState(**{name: plain[name] for name in plain if name not in ("optimiser", "scaler")})


def plain_state(checkpoint: Path) -> dict[str, Any]:
    """The contents of state.json, in the newest schema. Raises UserError like `read_state`."""
    path = checkpoint / STATE
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        plain = None
    if not isinstance(plain, dict):
        raise UserError(f"{path}: this is not the state of a run. {_ANOTHER}")
    if plain.get("schema") == 1 and isinstance(plain.get("optimiser"), dict):
        # It had no owed evaluations, and a place for plain numbers that no optimiser used.
        plain |= {"schema": 2, "owes_evaluation": False, "optimiser": plain["optimiser"].get("entries")}
    if plain.get("schema") == 2:
        # Each process counted its bad images, from its last start.
        plain |= {"schema": SCHEMA, "images": {}}
    if plain.get("schema") != SCHEMA:
        found = plain.get("schema")
        raise UserError(
            f"{path}: the checkpoint has the schema {found!r}; this version reads 1 to {SCHEMA}. {_ANOTHER}"
        )
    trouble = [f"{name} is missing" for name in _STATE_TYPES if name not in plain]
    # type(), because to isinstance True is a number.
    trouble += [
        f"{name} is {value!r}" if name in _STATE_TYPES else f"{name} is unknown"
        for name, value in plain.items()
        if type(value) not in _STATE_TYPES.get(name, ())
    ]
    if trouble:
        raise UserError(f"{path}: {first_few(trouble)}. {_ANOTHER}")
    return plain
