"""train(recipe): assemble, then the loop."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from torch import Tensor

from multidomain_cct.data.batches.bad_images import BadImages, skipped_in
from multidomain_cct.data.batches.loader import Batch, Skipped, steps
from multidomain_cct.evaluation.scoring import Score, arithmetic_and_harmonic, score
from multidomain_cct.files.seeds import seed_from
from multidomain_cct.training.build import compile_encoder
from multidomain_cct.training.checkpoints.checkpoint import RunState, save_checkpoint
from multidomain_cct.training.processes.failures import GO_ON, no_process_left, one_line_errors
from multidomain_cct.training.processes.failures import RunFailed as RunFailed
from multidomain_cct.training.processes.stopping import RunStopped, StopRequest
from multidomain_cct.training.recipe import Recipe
from multidomain_cct.training.run import Run, build_accelerator, open_run
from multidomain_cct.training.run_folder import write_run_folder
from multidomain_cct.training.runlog import RunLog, Window, environment
from multidomain_cct.training.schedules import learning_rate, set_learning_rate


class _EvaluationStopped(Exception):
    """All processes were asked to stop while they evaluated."""


def train(recipe: Recipe, folders: Sequence[Path], *, command: str = "", named_by: str = "the recipe") -> Path:
    """Train as the recipe says and return the run's folder.

    Raises UserError, before anything is written, for what the user has to change, RunFailed when the run cannot go on, and RunStopped
    when SIGTERM asked it to end and it has saved.
    """
    accelerator = build_accelerator(recipe)
    with StopRequest(accelerator) as stop, no_process_left():
        run, state, start = open_run(recipe, folders, stop, named_by=named_by)
        # The other processes look for an earlier run before the first one writes this one.
        accelerator.wait_for_everyone()
        with one_line_errors(accelerator.process_index, accelerator.num_processes):
            if accelerator.is_main_process:
                forced = {"forced": list(start.forced)} if start.forced else {}
                write_run_folder(
                    recipe, run.domains, environment(command, accelerator.device, accelerator.num_processes) | forced
                )
            accelerator.wait_for_everyone()
            if recipe.training.trackers:
                accelerator.init_trackers(recipe.name)
            log = RunLog(
                recipe.folder,
                first_step=state.step,
                num_steps=recipe.training.steps,
                enabled=accelerator.is_main_process,
                scored=not state.owes_evaluation,
            )
            with log:
                for notice in (*start.notices, *_compiled(run)):
                    log.notice(notice)
                try:
                    _loop(run, state, log)
                except RunStopped:
                    accelerator.end_training()
                    raise
        accelerator.end_training()
    return recipe.folder


def _compiled(run: Run) -> list[str]:
    """Compile the encoder on the images of the first step if the recipe asks for it; why it could not be."""
    if not run.recipe.encoder.compile:
        return []
    first = next(steps(run.data, 0, 1, workers=0))
    return compile_encoder(run.bare_model, {name: batch.to(run.accelerator.device) for name, batch in first.items()})


def _loop(run: Run, state: RunState, log: RunLog) -> None:
    recipe, settings, device = run.recipe, run.recipe.training, run.accelerator.device
    if state.owes_evaluation:
        state = _with_evaluation(run, state, log)
        _save_or_stop(run, state, save=not state.owes_evaluation)
    micro_batches = steps(
        run.data,
        state.step,
        settings.steps,
        workers=recipe.data.workers,
        prefetch=recipe.data.prefetch,
        pin_memory=device.type == "cuda",
    )
    window, skipped, last_finite = Window(run.accelerator.num_processes), 0, state.step
    bad_images = BadImages(run.data, state.images)
    run.model.train()
    for step in range(state.step, settings.steps):
        # Order, augmentation, learning rate and randomness hang on the step alone: this is all that a resume needs.
        torch.manual_seed(seed_from(recipe.seed, step, run.accelerator.process_index, "step"))
        lr = learning_rate(recipe.optimiser, step, settings.steps)
        set_learning_rate(run.optimiser, lr)
        trouble = _optimise(run, micro_batches, step / settings.steps, window, bad_images)
        done, last = step + 1, step + 1 == settings.steps
        while bad_images.untold:
            log.notice(f"step {done}: {bad_images.untold.pop(0)}")
        if trouble is None:
            skipped, last_finite = 0, done
        else:
            skipped, window.skipped = skipped + 1, window.skipped + 1
            log.notice(f"step {done}: {trouble} (last finite at {last_finite}). The step was skipped.")
            if skipped > settings.max_skipped:
                advice = "Lower optimiser.lr, set training.clip, or look at these images."
                raise RunFailed(f"step {done}: {trouble}; {skipped} steps in a row were skipped. {advice}")
        ends_window = last or done % settings.log_every == 0
        log.advance(done, window.text(device), plain=ends_window)
        if ends_window:
            _record(run, log, done, window.metrics(device) | bad_images.metrics | {"lr": lr})
            window = Window(run.accelerator.num_processes)
        state = replace(state, step=done, images=bad_images.counts)
        if run.scored and (last or done % settings.evaluate_every == 0):
            state = _with_evaluation(run, state, log)
        _save_or_stop(run, state, save=last or state.best_step == done or done % settings.save_every == 0)
        window.restart_clock()


def _with_evaluation(run: Run, state: RunState, log: RunLog) -> RunState:
    """The state with this step's scores in it; it owes them still when the run is asked to stop before they are complete."""
    try:
        mean = _evaluate(run, log, state.step)
    except _EvaluationStopped:
        return replace(state, owes_evaluation=True)
    state = replace(state, owes_evaluation=False)
    return replace(state, best_step=state.step, best_miou=mean) if mean > state.best_miou else state


def _save_or_stop(run: Run, state: RunState, *, save: bool) -> None:
    """Save when it is time, and always before stopping; all processes stop after the same step. Raises RunStopped."""
    stopping = run.stop.agreed()
    folder, keep = run.recipe.folder, run.recipe.training.keep
    if save or stopping:
        if run.accelerator.is_main_process:
            save_checkpoint(
                folder / "checkpoints",
                state,
                run.bare_model,
                run.optimiser.optimizer,
                run.accelerator.scaler,
                keep=keep,
            )
        run.accelerator.wait_for_everyone()
    if stopping:
        raise RunStopped(f"stopped after step {state.step}, as SIGTERM asked, and saved. {GO_ON}")


def _optimise(
    run: Run, micro_batches: Iterator[dict[str, Batch]], progress: float, window: Window, bad_images: BadImages
) -> str | None:
    """One optimiser step. Returns what was not finite, and then nothing has changed.

    Whether to skip is decided on losses that are summed over the processes, so all of them skip the same step; so is whether bad images are too many.
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
            means, bad = _over_processes(accelerator, losses, batches)
            bad_images.count(batches, bad)
            broken = [term for term, value in means.items() if not math.isfinite(value)]
            if not broken:
                window.add(means, batches)
            elif trouble is None:
                trouble = (
                    f"{broken[0]} is {means[broken[0]]}; keys {', '.join(_broken_keys(broken[0], losses, batches))}"
                )
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


def _over_processes(
    accelerator: Accelerator, losses: Mapping[str, Tensor], batches: Mapping[str, Batch]
) -> tuple[dict[str, float], list[tuple[str, Skipped]]]:
    """The losses' means over the processes, and the images that were skipped in any of them, each with its domain.

    Whether there are such images travels with the losses; only then, which is seldom, do the processes tell each other which.
    """
    own = skipped_in(batches)
    numbers = [
        *(loss.detach().float() for loss in losses.values()),
        torch.full((), float(len(own)), device=accelerator.device),
    ]
    *means, anywhere = accelerator.reduce(torch.stack(numbers), reduction="mean").tolist()
    return dict(zip(losses, means, strict=True)), gather_object(own) if anywhere else []


def _broken_keys(term: str, losses: Mapping[str, Tensor], batches: Mapping[str, Batch]) -> list[str]:
    """Keys of the images, on whichever processes, whose loss was not finite."""
    own = [] if math.isfinite(losses[term].item()) else list(batches[term.split("/")[0]].keys)
    keys: list[str] = gather_object(own)
    return keys


def _evaluate(run: Run, log: RunLog, step: int) -> float:
    """Score every domain's val split, record the scores, and return their mean mIoU. Raises _EvaluationStopped in all processes when one was asked to stop."""
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
            between=lambda: _leave_if_asked(run.stop),
        )
    _record(run, log, step, _score_metrics(scores))
    log.notice(f"step {step}: " + "  ".join(f"{name} mIoU {100 * result.miou:.1f}" for name, result in scores.items()))
    return arithmetic_and_harmonic([result.miou for result in scores.values()])[0]


def _leave_if_asked(stop: StopRequest) -> None:
    if stop.agreed():
        raise _EvaluationStopped


def _score_metrics(scores: Mapping[str, Score]) -> dict[str, float | None]:
    values: dict[str, float | None] = {}
    for name, result in scores.items():
        values[f"val/{name}/miou"] = result.miou
        values[f"val/{name}/pixel_accuracy"] = result.pixel_accuracy
        values |= {f"val/{name}/iou/{label}": iou for label, iou in result.iou.items()}
    values["val/mean_miou"], values["val/harmonic_miou"] = arithmetic_and_harmonic(
        [result.miou for result in scores.values()]
    )
    return values


def _record(run: Run, log: RunLog, step: int, values: Mapping[str, float | None]) -> None:
    log.metrics(step, values)
    run.accelerator.log({key: value for key, value in values.items() if value is not None}, step=step)
