"""Checkpoints: atomic, verified, without pickles.

`checkpoints/step-00000100/` holds model.safetensors, optimiser.safetensors, state.json and MANIFEST.json (sizes and sha256 of the others). It is written
under a temporary name, synced and renamed, so a folder with its final name is whole. Nothing else is needed to resume: order, augmentation, learning rate and
per-step randomness are functions of the step.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from multidomain_cct.data.domain import Domain
from multidomain_cct.data.specification import read_domain
from multidomain_cct.model.network import Segmenter
from multidomain_cct.training.assembly import build_model
from multidomain_cct.training.recipe import Recipe, read_recipe

SCHEMA = 1
_MODEL, _OPTIMISER, _STATE, _MANIFEST = "model.safetensors", "optimiser.safetensors", "state.json", "MANIFEST.json"


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
    recipe: str = ""
    """The recipe as YAML, so that a checkpoint tells what it is without its run's folder."""
    domains: dict[str, str] = field(default_factory=dict)
    """The domains' specifications as YAML, by name."""
    schema: int = SCHEMA


def save_checkpoint(
    folder: Path, state: RunState, model: nn.Module, optimiser: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None = None, *, keep: int
) -> Path:
    """Publish a checkpoint in `folder` and remove older ones but the newest `keep` and the best."""
    target = folder / f"step-{state.step:08d}"
    temporary = folder / f".{target.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}, temporary / _MODEL)
        tensors, numbers = _optimiser_tensors(model, optimiser)
        save_file(tensors, temporary / _OPTIMISER)
        (temporary / _STATE).write_text(
            json.dumps(asdict(state) | {"optimiser": numbers, "scaler": scaler.state_dict() if scaler else None}, indent=1), encoding="utf-8"
        )
        manifest = {name: {"bytes": (temporary / name).stat().st_size, "sha256": _sha256(temporary / name)} for name in (_MODEL, _OPTIMISER, _STATE)}
        (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            # safetensors creates files that only their owner may read; a team shares its runs.
            path.chmod(0o755 if path.is_dir() else 0o644)
            _sync(path)
        if target.exists():
            _discard(target)
        os.replace(temporary, target)
        _sync(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    # Later steps can only be damaged ones that a resume passed over; they must not push this one out.
    own = [checkpoint for checkpoint in checkpoints(folder) if checkpoint.name <= target.name]
    for old in own[:-keep]:
        if old.name != f"step-{state.best_step:08d}":
            _discard(old)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """Published checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        manifest = json.loads((checkpoint / _MANIFEST).read_text(encoding="utf-8"))
        for name in (_MODEL, _OPTIMISER, _STATE):
            size = (checkpoint / name).stat().st_size
            if size != manifest[name]["bytes"]:
                return f"{name} has {size} bytes, not {manifest[name]['bytes']}"
            if _sha256(checkpoint / name) != manifest[name]["sha256"]:
                return f"the contents of {name} have changed"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (ValueError, KeyError, TypeError):
        return f"{_MANIFEST} cannot be read"
    return None


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and a warning for each newer one that is not.

    Raises ValueError when there are checkpoints but none is whole.
    """
    warnings: list[str] = []
    for checkpoint in reversed(checkpoints(folder)):
        trouble = damage(checkpoint)
        if trouble is None:
            return checkpoint, warnings
        warnings.append(f"{checkpoint} is damaged ({trouble}); the one before it is used.")
    if warnings:
        raise ValueError(f"{folder}: no checkpoint is whole: {warnings[0]} Start a new run with another name.")
    return None, []


def choose_checkpoint(run: Path, which: str) -> Path:
    """The checkpoint that `last`, `best` or a folder names. Raises ValueError or FileNotFoundError when it is absent or damaged."""
    if which in ("last", "best"):
        found = checkpoints(run / "checkpoints")
        if not found:
            raise FileNotFoundError(f"{run} has no checkpoints; train it first.")
        checkpoint = found[-1]
        if which == "best":
            _require_whole(checkpoint)
            step = read_state(checkpoint).best_step
            checkpoint = run / "checkpoints" / f"step-{step:08d}"
            if not step:
                raise ValueError(f"{run} has not been evaluated, so no checkpoint is the best. Use --checkpoint last.")
    else:
        checkpoint = Path(which)
        if not checkpoint.is_dir():
            raise FileNotFoundError(
                f"{checkpoint}: there is no such checkpoint; it is `last`, `best` or a folder such as {run / 'checkpoints' / 'step-00000100'}."
            )
        if run.resolve() not in checkpoint.resolve().parents:
            raise ValueError(f"{checkpoint} is not a checkpoint of {run}. Name the run that it belongs to.")
    _require_whole(checkpoint)
    return checkpoint


def read_state(checkpoint: Path) -> RunState:
    """The run's state in a checkpoint. Raises ValueError for another schema."""
    plain = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    if plain.get("schema") != SCHEMA:
        raise ValueError(f"{checkpoint}: the checkpoint has the schema {plain.get('schema')!r}, this version reads {SCHEMA}.")
    return RunState(**{name: plain[name] for name in RunState.__dataclass_fields__})


def load_checkpoint(checkpoint: Path, model: nn.Module, optimiser: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None = None) -> RunState:
    """Put model and optimiser into the state of a checkpoint, strictly, and return the run's state."""
    _require_whole(checkpoint)
    load_strictly(model, _tensors(checkpoint / _MODEL), str(checkpoint))
    plain = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    _restore_optimiser(model, optimiser, _tensors(checkpoint / _OPTIMISER), plain["optimiser"], str(checkpoint))
    if scaler is not None and plain["scaler"] is not None:
        scaler.load_state_dict(plain["scaler"])
    return read_state(checkpoint)


def load_strictly(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Load every tensor. Raises ValueError that names what is missing, left over or of another shape."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    trouble = [f"{name} is missing" for name in wanted if name not in tensors]
    trouble += [f"{name} is unknown" for name in tensors if name not in wanted]
    trouble += [
        f"{name} is {list(tensors[name].shape)}, not {list(shape)}" for name, shape in wanted.items() if name in tensors and tuple(tensors[name].shape) != shape
    ]
    if trouble:
        raise ValueError(f"{where} does not fit the model: {', '.join(trouble[:4])}{f', and {len(trouble) - 4} more' if len(trouble) > 4 else ''}.")
    model.load_state_dict(dict(tensors))


@dataclass(frozen=True)
class LoadedRun:
    """A trained run, ready to predict."""

    folder: Path
    recipe: Recipe
    domains: dict[str, Domain]
    model: Segmenter
    """In evaluation mode, with main decoders only."""
    checkpoint: Path
    state: RunState


def load_run(run: Path, which: str = "last") -> LoadedRun:
    """A run from its folder alone. Raises FileNotFoundError or ValueError when the folder is not a run or its checkpoint is damaged."""
    if not (run / "recipe.yaml").is_file():
        raise FileNotFoundError(f"{run}: this is not a run's folder (it has no recipe.yaml).")
    recipe = read_recipe(run / "recipe.yaml")
    domains = {name: read_domain(run / "domains" / f"{name}.yaml") for name in recipe.domains}
    checkpoint = choose_checkpoint(run, which)
    model = build_model(recipe, domains, pretrained=False)
    tensors = _tensors(checkpoint / _MODEL)
    load_strictly(model, {name: tensor for name, tensor in tensors.items() if ".auxiliaries." not in name}, str(checkpoint))
    return LoadedRun(run, recipe, domains, model.eval(), checkpoint, read_state(checkpoint))


def load_initial_weights(run: Path, model: Segmenter, domains: Mapping[str, Domain]) -> list[str]:
    """Start `model` from another run's last checkpoint: the encoder, and the heads whose names and classes match. Returns one line per thing that was left out.

    Raises ValueError when the encoders differ.
    """
    checkpoint = choose_checkpoint(run, "last")
    tensors = _tensors(checkpoint / _MODEL)
    if any(name.startswith("teacher.") for name in tensors):
        # What such a run was scored with.
        tensors = {name.removeprefix("teacher."): tensor for name, tensor in tensors.items() if name.startswith("teacher.")}
    own = model.state_dict()
    old_domains, matching = _old_domains(run), set(matching_heads(run, domains))
    left_out = [f"head {name}: not in this run" for name in old_domains if name not in domains]
    left_out += [f"head {name}: its classes differ" for name in old_domains if name in domains and name not in matching]
    taken = {}
    for name, tensor in tensors.items():
        # A teacher starts from the model, and what other methods keep beside it belongs to their run.
        if not name.startswith(("encoder.", "heads.")):
            continue
        in_head = name.split(".")[1] if name.startswith("heads.") else None
        if in_head is not None and in_head not in matching:
            continue
        if name in own and own[name].shape == tensor.shape:
            taken[name] = tensor
        else:
            left_out.append(f"{name}: {'another shape' if name in own else 'not in this model'}")
    missing = [name for name in own if name.startswith("encoder.") and name not in taken and not any(f".norms.{domain}." in name for domain in domains)]
    if missing:
        raise ValueError(
            f"init_from: the encoder of {run} is another one ({missing[0]} does not fit, and {len(missing) - 1} more). Use the same encoder settings."
        )
    model.load_state_dict(own | taken)
    return left_out


def matching_heads(run: Path, domains: Mapping[str, Domain]) -> list[str]:
    """The domains with a head of their own that the run has too, with the same classes. Raises FileNotFoundError when the folder is not a run."""
    old = _old_domains(run)
    own = {name: domain for name, domain in domains.items() if not domain.labels_of}
    return [name for name, domain in own.items() if name in old and old[name].class_fingerprint == domain.class_fingerprint]


def _old_domains(run: Path) -> dict[str, Domain]:
    """The domains of a run that have a head of their own there."""
    if not (run / "recipe.yaml").is_file():
        raise FileNotFoundError(f"init_from: {run}: this is not a run's folder (it has no recipe.yaml).")
    found = {path.stem: read_domain(path) for path in sorted((run / "domains").glob("*.yaml"))}
    return {name: domain for name, domain in found.items() if not domain.labels_of}


def _optimiser_tensors(model: nn.Module, optimiser: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimiser's tensors, under the names of the parameters they belong to, and what of its state is no tensor."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors, numbers = {}, {}
    for parameter, values in optimiser.state.items():
        for key, value in values.items():
            entry = f"{names[id(parameter)]}/{key}"
            if isinstance(value, Tensor):
                tensors[entry] = value.detach().cpu().contiguous()
            elif value is not None:
                numbers[entry] = value
    # A parameter has no state before its first gradient: the heads of a domain whose turn has not come.
    return tensors, {"numbers": numbers, "entries": sorted([*tensors, *numbers])}


def _restore_optimiser(model: nn.Module, optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor], saved: Mapping[str, Any], where: str) -> None:
    parameters = dict(model.named_parameters())
    optimised = {id(parameter) for group in optimiser.param_groups for parameter in group["params"]}
    found = {**tensors, **saved["numbers"]}
    missing = [entry for entry in saved["entries"] if entry not in found]
    if missing:
        raise ValueError(f"{where}: the optimiser's {missing[0]} is missing, and {len(missing) - 1} more.")
    optimiser.state.clear()
    for entry, value in found.items():
        name, _, key = entry.rpartition("/")
        if name not in parameters or id(parameters[name]) not in optimised:
            raise ValueError(f"{where}: the optimiser holds {entry}, which this model does not train.")
        parameter = parameters[name]
        # Counters stay on the CPU, where the optimisers keep them; moments live with their parameter.
        optimiser.state[parameter][key] = value.to(parameter.device) if isinstance(value, Tensor) and value.shape == parameter.shape else value


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: this is not a whole safetensors file ({error}).") from None


def _require_whole(checkpoint: Path) -> None:
    trouble = damage(checkpoint)
    if trouble is not None:
        raise ValueError(f"{checkpoint} is damaged ({trouble}). Choose another with --checkpoint.")


def _discard(checkpoint: Path) -> None:
    """Remove a checkpoint so that at no moment a part of it bears its name."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(checkpoint, hidden)
    shutil.rmtree(hidden)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
