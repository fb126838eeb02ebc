"""Checkpoints: atomic, verified, without pickles.

`checkpoints/step-00000100/` holds model.safetensors, optimiser.safetensors, state.json and MANIFEST.json (sizes and
sha256 of the others). It is written under a temporary name, synced and renamed, so a folder with its final name is
whole. A resume needs nothing else: order, augmentation, learning rate and randomness are functions of the step. Names
that begin with a dot are being written or removed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from multidomain_cct.data.domain import Domain
from multidomain_cct.data.specification import read_domain
from multidomain_cct.errors import UserError
from multidomain_cct.files.durable import file_sha256, make_folder, sync, write_tensors, write_text
from multidomain_cct.files.printable import first_few
from multidomain_cct.methods.supervised import Supervised
from multidomain_cct.training.build import build_model
from multidomain_cct.training.checkpoints.optimiser_state import optimiser_tensors, restore_optimiser
from multidomain_cct.training.checkpoints.state import STATE, RunState, plain_state, read_state, run_state
from multidomain_cct.training.recipe import Recipe, read_run_recipe

_MODEL, _OPTIMISER, _MANIFEST = "model.safetensors", "optimiser.safetensors", "MANIFEST.json"
_REPLACED = ".before"
"""Ending of a checkpoint while another of the same step takes its place."""


def save_checkpoint(
    folder: Path,
    state: RunState,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None = None,
    *,
    keep: int,
) -> Path:
    """Publish a checkpoint in `folder`; of the older ones keep the newest `keep` and the best.

    The checkpoint survives a loss of power once this returns. Raises OSError, and leaves nothing behind, when it cannot
    be written.
    """
    target = folder / f"step-{state.step:08d}"
    temporary, replaced = folder / f".{target.name}.tmp", target.with_name(f"{target.name}{_REPLACED}")
    make_folder(folder)
    for left_by_a_crash in folder.glob(".step-*"):
        _remove(left_by_a_crash)
    try:
        temporary.mkdir()
        _write(temporary, state, model, optimiser, scaler)
        if target.exists():
            # It keeps a name that `checkpoints` lists: a run is never without a checkpoint.
            if replaced.exists():
                _discard(replaced)
            os.replace(target, replaced)
        os.replace(temporary, target)
        sync(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    # Later steps are damaged checkpoints that a resume passed over; they must not push this one out.
    published = [checkpoint for checkpoint in checkpoints(folder) if checkpoint.name <= target.name]
    for old in [*published[:-keep], replaced]:
        if old.name != f"step-{state.best_step:08d}" and old.exists():
            _discard(old)
    return target


def _write(
    folder: Path,
    state: RunState,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
) -> None:
    """The files of a checkpoint, all on the disk."""
    write_tensors(
        folder / _MODEL, {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    )
    tensors = optimiser_tensors(model, optimiser)
    write_tensors(folder / _OPTIMISER, tensors)
    plain = asdict(state) | {"optimiser": sorted(tensors), "scaler": scaler.state_dict() if scaler else None}
    write_text(folder / STATE, json.dumps(plain, indent=1))
    manifest = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
        for name in (_MODEL, _OPTIMISER, STATE)
    }
    write_text(folder / _MANIFEST, json.dumps(manifest, indent=1))
    sync(folder)


def checkpoints(folder: Path) -> list[Path]:
    """Published checkpoints, oldest first; one that is being replaced comes before its replacement."""
    return sorted(
        (path for path in folder.glob(f"step-{'[0-9]' * 8}*") if path.is_dir()),
        key=lambda path: (path.name.removesuffix(_REPLACED), not path.suffix),
    )


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        manifest = json.loads((checkpoint / _MANIFEST).read_text(encoding="utf-8"))
        for name in (_MODEL, _OPTIMISER, STATE):
            size = (checkpoint / name).stat().st_size
            if size != manifest[name]["bytes"]:
                return f"{name} has {size} bytes, not {manifest[name]['bytes']}"
            if file_sha256(checkpoint / name) != manifest[name]["sha256"]:
                return f"the contents of {name} have changed"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except OSError as error:
        return f"{Path(str(error.filename)).name} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError):
        return f"{_MANIFEST} cannot be read"
    return None


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and a warning for each newer one that is not.

    Raises UserError when there are checkpoints but none is whole.
    """
    warnings: list[str] = []
    for checkpoint in reversed(checkpoints(folder)):
        trouble = damage(checkpoint)
        if trouble is None:
            return checkpoint, warnings
        warnings.append(f"{checkpoint} is damaged ({trouble}); the one before it is used.")
    if warnings:
        raise UserError(f"{folder}: no checkpoint is whole: {warnings[0]} Start a new run with another name.")
    return None, []


def choose_checkpoint(run: Path, which: str) -> Path:
    """The checkpoint that `last`, `best` or a folder names. Raises UserError when it is absent or damaged."""
    if which in ("last", "best"):
        published = checkpoints(run / "checkpoints")
        if not published:
            raise UserError(f"{run} has no checkpoints; train it first.")
        checkpoint = published[-1]
        _require_whole(checkpoint)
        if which == "last":
            return checkpoint
        step = read_state(checkpoint).best_step
        if not step:
            raise UserError(f"{run} has not been evaluated, so no checkpoint is the best. Use --checkpoint last.")
        best = run / "checkpoints" / f"step-{step:08d}"
        if best != checkpoint:
            _require_whole(best)
        return best
    checkpoint = Path(which)
    if not checkpoint.is_dir():
        example = run / "checkpoints" / "step-00000100"
        raise UserError(
            f"{checkpoint}: there is no such checkpoint; it is `last`, `best` or a folder such as {example}."
        )
    # A checkpoint may be a link to another disk.
    if run.resolve() not in (checkpoint.parent.resolve() / checkpoint.name).parents:
        raise UserError(f"{checkpoint} is not a checkpoint of {run}. Name the run that it belongs to.")
    _require_whole(checkpoint)
    return checkpoint


def load_checkpoint(
    checkpoint: Path, model: nn.Module, optimiser: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None = None
) -> RunState:
    """Put model and optimiser into the state of a checkpoint, strictly, and return the run's state.

    Its files are not verified again: it comes from newest_checkpoint or choose_checkpoint. Raises UserError that names
    the item which is missing, left over or of another shape.
    """
    plain = plain_state(checkpoint)
    load_strictly(model, model_tensors(checkpoint), str(checkpoint))
    entries = [_current_name(entry) for entry in plain["optimiser"]]
    restore_optimiser(model, optimiser, _tensors(checkpoint / _OPTIMISER), entries, str(checkpoint))
    saved, own = plain["scaler"], scaler.state_dict() if scaler else None
    if (saved is None) != (own is None) or (saved or {}).keys() != (own or {}).keys():
        raise UserError(
            f"{checkpoint}: the gradient scaler's state is {saved!r}, this run's has {sorted(own or {})}. Use the "
            "precision that it was saved with."
        )
    if scaler is not None:
        scaler.load_state_dict(saved)
    return run_state(plain)


def model_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """The model's tensors in a checkpoint, by name."""
    return _tensors(checkpoint / _MODEL)


def load_strictly(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Load every tensor. Raises UserError that names what is missing, left over or of another shape or type."""
    wanted = model.state_dict()
    trouble = [f"{name} is missing" for name in wanted if name not in tensors]
    trouble += [f"{name} is unknown" for name in tensors if name not in wanted]
    for name in [name for name in wanted if name in tensors]:
        saved, own = tensors[name], wanted[name]
        if saved.shape != own.shape:
            trouble.append(f"{name} is {list(saved.shape)}, not {list(own.shape)}")
        elif saved.dtype != own.dtype:
            trouble.append(f"{name} is {saved.dtype}, not {own.dtype}")
    if trouble:
        raise UserError(f"{where} does not fit the model: {first_few(trouble)}.")
    model.load_state_dict(dict(tensors))


@dataclass(frozen=True)
class LoadedRun:
    """A trained run, ready to predict."""

    folder: Path
    recipe: Recipe
    domains: dict[str, Domain]
    model: Supervised
    """In evaluation mode, with main decoders only."""
    checkpoint: Path
    state: RunState


def load_run(run: Path, which: str = "last") -> LoadedRun:
    """A run from its folder alone. Raises UserError when the folder is not a run or its checkpoint is damaged."""
    if not (run / "recipe.yaml").is_file():
        raise UserError(f"{run}: this is not a run's folder (it has no recipe.yaml).")
    recipe = read_run_recipe(run)
    domains = {name: read_domain(run / "domains" / f"{name}.yaml") for name in recipe.domains}
    checkpoint = choose_checkpoint(run, which)
    model = build_model(recipe, domains, pretrained=False)
    tensors = model_tensors(checkpoint)
    kept = {name: tensor for name, tensor in tensors.items() if ".auxiliaries." not in name}
    load_strictly(model, kept, str(checkpoint))
    return LoadedRun(run, recipe, domains, model.eval(), checkpoint, read_state(checkpoint))


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return {_current_name(name): tensor for name, tensor in load_file(path).items()}
    except SafetensorError as error:
        raise UserError(f"{path}: this is not a whole safetensors file ({error}).") from None


def _current_name(name: str) -> str:
    """Earlier versions called the backbone `trunk`."""
    return name.replace("encoder.trunk.", "encoder.backbone.", 1)


def _require_whole(checkpoint: Path) -> None:
    trouble = damage(checkpoint)
    if trouble is not None:
        raise UserError(f"{checkpoint} is damaged ({trouble}). Choose another with --checkpoint.")


def _discard(checkpoint: Path) -> None:
    """Remove a checkpoint under another name, so that its own name never shows a part of it."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.old")
    if hidden.exists():
        _remove(hidden)
    os.replace(checkpoint, hidden)
    _remove(hidden)


def _remove(folder: Path) -> None:
    """Remove a folder, or a link to one, of which what it leads to stays."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)
