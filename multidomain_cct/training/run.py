"""A run, opened: its data, model and optimiser, and the state in which it begins. Nothing is written yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import GradientAccumulationPlugin, gather_object

from multidomain_cct.data.batches.loader import TrainingSet
from multidomain_cct.data.batches.streams import DomainStreams
from multidomain_cct.data.domain import Domain
from multidomain_cct.data.shards.reader import Shards
from multidomain_cct.errors import UserError
from multidomain_cct.files.lock import locked
from multidomain_cct.methods.supervised import Supervised
from multidomain_cct.training.build import build_model
from multidomain_cct.training.check import TrainingData, check
from multidomain_cct.training.checkpoints.checkpoint import load_checkpoint
from multidomain_cct.training.checkpoints.initial_weights import load_initial_weights
from multidomain_cct.training.checkpoints.state import RunState
from multidomain_cct.training.findings import Finding, require
from multidomain_cct.training.machine import check_machine, set_tf32
from multidomain_cct.training.processes.failures import mistakes_in_common
from multidomain_cct.training.processes.stopping import StopRequest
from multidomain_cct.training.recipe import Recipe
from multidomain_cct.training.run_folder import Start, find_start, fingerprints
from multidomain_cct.training.schedules import build_optimiser


@dataclass(frozen=True)
class Run:
    """What the loop works with."""

    recipe: Recipe
    accelerator: Accelerator
    model: torch.nn.Module
    """As prepared: perhaps wrapped for several processes."""
    optimiser: Any
    """As prepared; `.optimizer` is torch's own."""
    data: TrainingSet
    domains: Mapping[str, Domain]
    streams: Sequence[DomainStreams]
    """Of each domain, also of those without training images."""
    findings: Sequence[Finding]
    """Warnings and notices about the recipe."""
    scored: Mapping[str, Shards]
    """Val shards by domain."""
    stop: StopRequest

    @property
    def bare_model(self) -> Supervised:
        model: Supervised = self.accelerator.unwrap_model(self.model)
        return model


def open_run(
    recipe: Recipe, folders: Sequence[Path], stop: StopRequest, lock: ExitStack, *, named_by: str
) -> tuple[Run, RunState, Start]:
    """What the loop needs, the state in which it begins, and what to print about that. `lock` will hold the run's
    folder for this process.

    Raises UserError, in all processes, for what the user has to change.
    """
    accelerator, accumulation = stop.accelerator, recipe.training.accumulation
    with mistakes_in_common(accelerator):
        findings, opened = check(recipe, folders, named_by=named_by, parts=accelerator.num_processes * accumulation)
        findings = require(findings)
        model = _initial_model(recipe, opened)
        if accelerator.is_main_process:
            lock.enter_context(locked(recipe.folder, "training"))
        start = find_start(recipe, opened.domains, opened.streams)
        left_out = []
        if start.checkpoint is None and recipe.init_from is not None:
            left_out = load_initial_weights(Path(recipe.init_from), model, opened.domains)
    _require_the_same_start(recipe, start, accelerator)
    # Moved first: the optimiser takes the kernels of the device on which it finds its parameters.
    model.to(accelerator.device)
    optimiser = build_optimiser(recipe.optimiser, model.encoder.backbone, model, model.encoder.plan.depths)
    wrapped, optimiser = accelerator.prepare(model, optimiser)
    data = _training_set(recipe, opened, accelerator)
    run = Run(
        recipe, accelerator, wrapped, optimiser, data, opened.domains, opened.streams, findings, opened.scored, stop
    )
    state = RunState(
        step=0,
        fingerprints=fingerprints(recipe, opened.streams),
        recipe=recipe.to_yaml(),
        domains={name: domain.to_yaml() for name, domain in opened.domains.items()},
    )
    notices = [f"init_from: {line}" for line in left_out]
    if start.checkpoint is not None:
        with mistakes_in_common(accelerator):
            saved = load_checkpoint(start.checkpoint, run.bare_model, run.optimiser.optimizer, accelerator.scaler)
        state = replace(saved, recipe=state.recipe, domains=state.domains, fingerprints=state.fingerprints)
        notices = [f"{recipe.folder}: going on from step {state.step}."]
    return run, state, replace(start, notices=(*start.notices, *notices))


def _initial_model(recipe: Recipe, opened: TrainingData) -> Supervised:
    unlabelled = {stream.domain.name: bool(stream.unlabelled) for stream in opened.streams}
    counts = {stream.domain.name: stream.labelled_classes for stream in opened.streams if stream.labelled}
    pixels = {name: each.pixels.tolist() for name, each in counts.items() if each is not None}
    return build_model(recipe, opened.domains, unlabelled=unlabelled, class_pixels=pixels)


def _training_set(recipe: Recipe, opened: TrainingData, accelerator: Accelerator) -> TrainingSet:
    return TrainingSet(
        # A borrowed label space may add nothing to a supervised run; it is scored all the same.
        [stream for stream in opened.streams if stream.labelled or stream.unlabelled],
        seed=recipe.seed,
        augment=recipe.data.augment,
        schedule=recipe.data.schedule,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        accumulation=recipe.training.accumulation,
    )


def _require_the_same_start(recipe: Recipe, start: Start, accelerator: Accelerator) -> None:
    """Raises UserError when the processes do not begin at the same checkpoint: each would train another run."""
    starts: list[str] = gather_object([start.checkpoint.name if start.checkpoint else "no checkpoint"])
    if len(set(starts)) > 1:
        listed = ", ".join(f"rank {rank} finds {name}" for rank, name in enumerate(starts))
        raise UserError(
            f"{recipe.folder} is not the same for all processes: {listed}. Put `runs` on storage that all nodes share."
        )


def build_accelerator(recipe: Recipe) -> Accelerator:
    """Accelerate as the recipe needs it. Raises UserError when this machine lacks a tracker or the precision."""
    require(check_machine(recipe))
    set_tf32(recipe.training.tf32)
    try:
        return Accelerator(
            # Left to itself, Accelerate runs each process of a CPU launch on its own.
            cpu=not torch.accelerator.is_available(),
            mixed_precision=recipe.training.mixed_precision,
            # What these leave out, Accelerate would read from its environment; check_machine says what is there.
            dynamo_backend="no",
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=recipe.data.schedule == "alternate")],
            log_with=recipe.training.trackers or None,
            project_dir=recipe.folder,
        )
    except ValueError as error:
        # A precision that the device does not have, and what Accelerate finds in the environment.
        precision = recipe.training.precision
        raise UserError(
            f"training.precision is `{precision}`: Accelerate cannot be set up like that ({error})."
        ) from error
