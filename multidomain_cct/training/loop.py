"""train(recipe): assemble, then the loop."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.tracking import get_available_trackers
from accelerate.utils import broadcast, gather_object
from torch import Tensor

from multidomain_cct.data.domain import Domain
from multidomain_cct.data.loader import Batch, TrainingSet, steps
from multidomain_cct.data.order import seed_from
from multidomain_cct.data.shards import Shards
from multidomain_cct.data.specification import find_domain
from multidomain_cct.data.streams import open_streams
from multidomain_cct.model.network import Segmenter
from multidomain_cct.training.assembly import build_model, compile_encoder, require_lenders, require_training_data, uses_unlabelled
from multidomain_cct.training.assembly import notices as model_notices
from multidomain_cct.training.checkpoint import RunState, load_checkpoint, load_initial_weights, matching_heads, save_checkpoint
from multidomain_cct.training.recipe import Recipe
from multidomain_cct.training.run_folder import fingerprints, resumable_checkpoint, write_run_folder
from multidomain_cct.training.runlog import RunLog, Window, environment
from multidomain_cct.training.schedules import build_optimiser, learning_rate, set_learning_rate
from multidomain_cct.training.scoring import Score, arithmetic_and_harmonic, score


class RunFailed(RuntimeError):
    """A run that cannot go on, for a reason that is not the user's mistake. The message is one line."""


@dataclass(frozen=True)
class _Run:
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

    @property
    def bare_model(self) -> Segmenter:
        model: Segmenter = self.accelerator.unwrap_model(self.model)
        return model


def train(recipe: Recipe, folders: Sequence[Path], *, command: str = "", named_by: str = "the recipe") -> Path:
    """Train as the recipe says and return the run's folder.

    Raises ValueError or FileNotFoundError, before anything is written, for what the user has to change, and RunFailed when the run cannot go on.
    """
    accelerator = _accelerator(recipe)
    domains = {name: find_domain(name, folders, named_by=named_by) for name in recipe.domains}
    require_lenders(domains)
    streams = [open_streams(domain, recipe.domains[name], recipe.data, use_unlabelled=uses_unlabelled(recipe, domain)) for name, domain in domains.items()]
    world = {"rank": accelerator.process_index, "world": accelerator.num_processes, "accumulation": recipe.training.accumulation}
    # A borrowed label space may add nothing to a supervised run; it is scored all the same.
    training = [stream for stream in streams if stream.labelled or stream.unlabelled]
    data = TrainingSet(training, seed=recipe.seed, augment=recipe.data.augment, schedule=recipe.data.schedule, **world)
    scored = {name: Shards.open(Path(recipe.data.shards) / name, choice.val_split) for name, choice in recipe.domains.items() if choice.val_split}
    resumed, notices = resumable_checkpoint(recipe, domains, streams)
    model = build_model(recipe, domains, unlabelled={stream.domain.name: bool(stream.unlabelled) for stream in streams})
    taught = [] if recipe.init_from is None else matching_heads(Path(recipe.init_from), domains)
    require_training_data(recipe, domains, streams, taught=taught)
    if resumed is None:
        notices += model_notices(recipe, domains, parts=accelerator.num_processes * recipe.training.accumulation)
        if recipe.init_from is not None:
            notices += [f"init_from: {line}" for line in load_initial_weights(Path(recipe.init_from), model, domains)]
    optimiser = build_optimiser(recipe.optimiser, model.encoder.trunk, model)
    prepared_model, prepared_optimiser = accelerator.prepare(model, optimiser)
    run = _Run(recipe, accelerator, prepared_model, prepared_optimiser, data, domains, scored)
    specifications = {name: domain.to_yaml() for name, domain in domains.items()}
    state = RunState(step=0, fingerprints=fingerprints(recipe, streams), recipe=recipe.to_yaml(), domains=specifications)
    if resumed is not None:
        saved = load_checkpoint(resumed, run.bare_model, run.optimiser.optimizer, accelerator.scaler)
        state = replace(saved, recipe=state.recipe, domains=state.domains)
        notices.append(f"{recipe.folder}: going on from step {state.step}.")
    if recipe.encoder.compile:
        first = next(steps(data, 0, 1, workers=0))
        notices += compile_encoder(run.bare_model, {name: batch.to(accelerator.device) for name, batch in first.items()})
    # The other processes look for an earlier run before the first one writes this one.
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_run_folder(recipe, domains, environment(command, accelerator.device, accelerator.num_processes))
    accelerator.wait_for_everyone()
    if recipe.training.trackers:
        accelerator.init_trackers(recipe.name)
    with RunLog(recipe.folder, first_step=state.step, num_steps=recipe.training.steps, enabled=accelerator.is_main_process) as log:
        for notice in notices:
            log.notice(notice)
        try:
            _loop(run, state, log)
        except (ValueError, OSError) as error:
            # One process's data may be at fault; the others end without a word of their own.
            where = f"rank {accelerator.process_index}: " if accelerator.num_processes > 1 else ""
            raise ValueError(f"{where}{error}") from None
    accelerator.end_training()
    return recipe.folder


def _accelerator(recipe: Recipe) -> Accelerator:
    available = [str(tracker) for tracker in get_available_trackers()]
    for name in recipe.training.trackers:
        # Accelerate would leave it out in silence.
        if name not in available:
            raise ValueError(f"training.trackers names {name!r}. Installed: {', '.join(available) or 'none'}. For example: pip install tensorboard")
    accelerator = Accelerator(
        # Without being told, Accelerate runs each process of a CPU launch on its own.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=recipe.training.precision,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=recipe.data.schedule == "alternate")],
        log_with=recipe.training.trackers or None,
        project_dir=recipe.folder,
    )
    if recipe.training.precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("training.precision is `fp16`, which Accelerate leaves out in silence on a CPU. Use `bf16` or `no` there.")
    return accelerator


def _loop(run: _Run, state: RunState, log: RunLog) -> None:
    recipe, settings, device = run.recipe, run.recipe.training, run.accelerator.device
    micro_batches = steps(run.data, state.step, settings.steps, workers=recipe.data.workers, prefetch=recipe.data.prefetch, pin_memory=device.type == "cuda")
    window, skipped, last_finite = Window(run.accelerator.num_processes), 0, state.step
    run.model.train()
    for step in range(state.step, settings.steps):
        # Order, augmentation, learning rate and randomness hang on the step alone: this is all that a resume needs.
        torch.manual_seed(seed_from(recipe.seed, step, run.accelerator.process_index, "step"))
        lr = learning_rate(recipe.optimiser, step, settings.steps)
        set_learning_rate(run.optimiser, lr)
        trouble = _optimise(run, micro_batches, step / settings.steps, window)
        done, last = step + 1, step + 1 == settings.steps
        if trouble is None:
            skipped, last_finite = 0, done
        else:
            skipped += 1
            log.notice(f"step {done}: {trouble} (last finite at {last_finite}). The step was skipped.")
            if skipped > settings.max_skipped:
                advice = "Lower optimiser.lr, set training.clip, or look at these images."
                raise RunFailed(f"step {done}: {trouble}; {skipped} steps in a row were skipped. {advice}")
        ends_window = last or done % settings.log_every == 0
        log.advance(done, window.text(device), plain=ends_window)
        if ends_window:
            _record(run, log, done, window.metrics(device) | {"lr": lr})
            window = Window(run.accelerator.num_processes)
        best = False
        if run.scored and (last or done % settings.evaluate_every == 0):
            mean = _evaluate(run, log, done)
            best = mean > state.best_miou
            state = replace(state, best_step=done, best_miou=mean) if best else state
            window.restart_clock()
        if last or best or done % settings.save_every == 0:
            state = replace(state, step=done)
            if run.accelerator.is_main_process:
                save_checkpoint(recipe.folder / "checkpoints", state, run.bare_model, run.optimiser.optimizer, run.accelerator.scaler, keep=settings.keep)
            run.accelerator.wait_for_everyone()
            window.restart_clock()


def _optimise(run: _Run, micro_batches: Iterator[dict[str, Batch]], progress: float, window: Window) -> str | None:
    """One optimiser step. Returns what was not finite, and then nothing has changed.

    Whether to skip is decided on losses that are summed over the processes, so all of them skip the same step.
    """
    accelerator, model, accumulation = run.accelerator, run.model, run.recipe.training.accumulation
    trouble: str | None = None
    # A forward pass that is not finite has already spoilt the running statistics of batch norms.
    statistics = [buffer.clone() for buffer in model.buffers()]
    for micro in range(accumulation):
        batches = {name: batch.to(accelerator.device) for name, batch in window.timed_next(micro_batches).items()}
        synchronised = micro == accumulation - 1
        with nullcontext() if synchronised else accelerator.no_sync(model):
            losses: dict[str, Tensor] = model(batches, progress=progress)
            values = accelerator.reduce(torch.stack([loss.detach().float() for loss in losses.values()]), reduction="mean").tolist()
            broken = [term for term, value in zip(losses, values, strict=True) if not math.isfinite(value)]
            if not broken:
                window.add(dict(zip(losses, values, strict=True)), batches)
            elif trouble is None:
                value = values[list(losses).index(broken[0])]
                trouble = f"{broken[0]} is {value}; keys {', '.join(_broken_keys(broken[0], losses, batches))}"
            # Also when the step will be skipped: every forward pass of a wrapped model is answered by a backward pass.
            accelerator.backward(torch.stack(list(losses.values())).sum() / accumulation)
    if trouble is None:
        limit = run.recipe.training.clip or math.inf
        norm = float(accelerator.clip_grad_norm_(model.parameters(), limit))
        if not math.isfinite(norm):
            trouble = f"the gradient's norm is {norm}"
        # A GradScaler must see such a step too: it leaves it out itself, and lowers its scale.
        if trouble is None or accelerator.scaler is not None:
            run.optimiser.step()
        if trouble is None:
            run.bare_model.after_step()
    run.optimiser.zero_grad()
    if trouble is not None:
        for buffer, before in zip(model.buffers(), statistics, strict=True):
            buffer.copy_(before)
    return trouble


def _broken_keys(term: str, losses: Mapping[str, Tensor], batches: Mapping[str, Batch]) -> list[str]:
    """Keys of the images, on whichever processes, whose loss was not finite."""
    own = [] if math.isfinite(losses[term].item()) else list(batches[term.split("/")[0]].keys)
    keys: list[str] = gather_object(own)
    return keys


def _evaluate(run: _Run, log: RunLog, step: int) -> float:
    """Score every domain's val split, record the scores, and return their mean mIoU."""
    recipe, accelerator, model = run.recipe, run.accelerator, run.bare_model
    for buffer in model.buffers():
        # Each process has its own running statistics; what is scored are those that are saved, the first one's.
        buffer.copy_(broadcast(buffer.clone()))
    scores: dict[str, Score] = {}
    # In 32 bits whatever the precision of training, so that `evaluate` finds the same numbers.
    for name, shards in run.scored.items():
        scores[name] = score(
            model,
            shards,
            run.domains[name],
            recipe.domains[name].val_split,
            recipe.evaluation,
            device=accelerator.device,
            workers=min(1, recipe.data.workers),
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            total=lambda tensor: accelerator.reduce(tensor, reduction="sum"),
        )
    _record(run, log, step, _score_metrics(scores))
    log.notice(f"step {step}: " + "  ".join(f"{name} mIoU {100 * result.miou:.1f}" for name, result in scores.items()))
    return arithmetic_and_harmonic([result.miou for result in scores.values()])[0]


def _score_metrics(scores: Mapping[str, Score]) -> dict[str, float | None]:
    values: dict[str, float | None] = {}
    for name, result in scores.items():
        values[f"val/{name}/miou"] = result.miou
        values[f"val/{name}/pixel_accuracy"] = result.pixel_accuracy
        values |= {f"val/{name}/iou/{label}": iou for label, iou in result.iou.items()}
    values["val/mean_miou"], values["val/harmonic_miou"] = arithmetic_and_harmonic([result.miou for result in scores.values()])
    return values


def _record(run: _Run, log: RunLog, step: int, values: Mapping[str, float | None]) -> None:
    log.metrics(step, values)
    run.accelerator.log({key: value for key, value in values.items() if value is not None}, step=step)
