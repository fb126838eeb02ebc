"""A run, opened: its data, model and optimiser, and the state in which it begins. Nothing is written yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.tracking import get_available_trackers
from accelerate.utils import gather_object

from multidomain_cct.data.batches.loader import TrainingSet
from multidomain_cct.data.batches.streams import DomainStreams, open_streams
from multidomain_cct.data.domain import Domain
from multidomain_cct.data.shards.reader import Shards
from multidomain_cct.data.specification import find_domain
from multidomain_cct.errors import UserError
from multidomain_cct.model.network import Segmenter
from multidomain_cct.training.build import build_model, require_lenders, require_training_data, uses_unlabelled
from multidomain_cct.training.build import notices as model_notices
from multidomain_cct.training.checkpoints.checkpoint import RunState, load_checkpoint
from multidomain_cct.training.checkpoints.initial_weights import load_initial_weights, matching_heads
from multidomain_cct.training.processes.failures import RunFailed as RunFailed
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
    scored: Mapping[str, Shards]
    """Val shards by domain."""
    stop: StopRequest

    @property
    def bare_model(self) -> Segmenter:
        model: Segmenter = self.accelerator.unwrap_model(self.model)
        return model


def open_run(
    recipe: Recipe, folders: Sequence[Path], stop: StopRequest, *, named_by: str
) -> tuple[Run, RunState, Start]:
    """Everything that the loop needs, the state in which it begins, and what the user should know.

    Raises UserError, in all processes, for what the user has to change.
    """
    accelerator = stop.accelerator
    with mistakes_in_common(accelerator):
        domains = {name: find_domain(name, folders, named_by=named_by) for name in recipe.domains}
        require_lenders(domains)
        streams = [
            open_streams(domain, recipe.domains[name], recipe.data, use_unlabelled=uses_unlabelled(recipe, domain))
            for name, domain in domains.items()
        ]
        world = {
            "rank": accelerator.process_index,
            "world": accelerator.num_processes,
            "accumulation": recipe.training.accumulation,
        }
        # A borrowed label space may add nothing to a supervised run; it is scored all the same.
        training = [stream for stream in streams if stream.labelled or stream.unlabelled]
        data = TrainingSet(
            training, seed=recipe.seed, augment=recipe.data.augment, schedule=recipe.data.schedule, **world
        )
        scored = {
            name: Shards.open(Path(recipe.data.shards) / name, choice.val_split)
            for name, choice in recipe.domains.items()
            if choice.val_split
        }
        start = find_start(recipe, domains, streams)
        model, notices = _initial_model(
            recipe, domains, streams, start, parts=accelerator.num_processes * recipe.training.accumulation
        )
    _require_the_same_start(recipe, start, accelerator)
    prepared_model, prepared_optimiser = accelerator.prepare(
        model, build_optimiser(recipe.optimiser, model.encoder.backbone, model)
    )
    run = Run(recipe, accelerator, prepared_model, prepared_optimiser, data, domains, scored, stop)
    specifications = {name: domain.to_yaml() for name, domain in domains.items()}
    state = RunState(
        step=0, fingerprints=fingerprints(recipe, streams), recipe=recipe.to_yaml(), domains=specifications
    )
    if start.checkpoint is not None:
        with mistakes_in_common(accelerator):
            saved = load_checkpoint(start.checkpoint, run.bare_model, run.optimiser.optimizer, accelerator.scaler)
        state = replace(saved, recipe=state.recipe, domains=state.domains, fingerprints=state.fingerprints)
        notices.append(f"{recipe.folder}: going on from step {state.step}.")
    return run, state, replace(start, notices=(*start.notices, *notices))


def _initial_model(
    recipe: Recipe, domains: Mapping[str, Domain], streams: Sequence[DomainStreams], start: Start, *, parts: int
) -> tuple[Segmenter, list[str]]:
    """The model before a checkpoint is loaded, and what the user should know of it."""
    model = build_model(recipe, domains, unlabelled={stream.domain.name: bool(stream.unlabelled) for stream in streams})
    taught = [] if recipe.init_from is None else matching_heads(Path(recipe.init_from), domains)
    require_training_data(recipe, domains, streams, taught=taught)
    if start.checkpoint is not None:
        return model, []
    notices = model_notices(recipe, domains, parts=parts)
    if recipe.init_from is not None:
        notices += [f"init_from: {line}" for line in load_initial_weights(Path(recipe.init_from), model, domains)]
    return model, notices


def _require_the_same_start(recipe: Recipe, start: Start, accelerator: Accelerator) -> None:
    """Raises UserError when the processes do not begin at the same checkpoint: each would train another run."""
    found: list[str] = gather_object([start.checkpoint.name if start.checkpoint else "no checkpoint"])
    if len(set(found)) > 1:
        listed = ", ".join(f"rank {rank} finds {name}" for rank, name in enumerate(found))
        raise UserError(
            f"{recipe.folder} is not the same for all processes: {listed}. Put `runs` on storage that all nodes share."
        )


def build_accelerator(recipe: Recipe) -> Accelerator:
    """Accelerate as the recipe needs it.

    Raises UserError for trackers that are not installed and for a precision that the device does not have.
    """
    available = [str(tracker) for tracker in get_available_trackers()]
    for name in recipe.training.trackers:
        # Accelerate would leave it out in silence.
        if name not in available:
            raise UserError(
                f"training.trackers names {name!r}. Installed: {', '.join(available) or 'none'}. For example: pip "
                "install tensorboard"
            )
    try:
        accelerator = Accelerator(
            # Without being told, Accelerate runs each process of a CPU launch on its own.
            cpu=not torch.accelerator.is_available(),
            mixed_precision=recipe.training.precision,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=recipe.data.schedule == "alternate")],
            log_with=recipe.training.trackers or None,
            project_dir=recipe.folder,
        )
    except ValueError as error:
        # A precision that the device does not have; and what Accelerate finds in the environment.
        raise UserError(
            f"training.precision is `{recipe.training.precision}`: Accelerate cannot be set up as asked ({error})."
        ) from error
    if recipe.training.precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError(
            "training.precision is `fp16`, which Accelerate leaves out in silence on a CPU. Use `bf16` or `no` there."
        )
    return accelerator
