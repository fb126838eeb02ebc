"""train(recipe): open the run, then step, log, validate and save."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from multidomain_cct.data.batches.bad_images import BadImages
from multidomain_cct.data.batches.loader import Batch, steps
from multidomain_cct.files.seeds import seed_from
from multidomain_cct.training.build import compile_encoder
from multidomain_cct.training.checkpoints.checkpoint import checkpoints, save_checkpoint
from multidomain_cct.training.checkpoints.state import RunState
from multidomain_cct.training.processes.failures import RunFailed as RunFailed
from multidomain_cct.training.processes.failures import no_process_left, one_line_errors, one_line_out_of_memory
from multidomain_cct.training.processes.stopping import RunStopped, StopRequest
from multidomain_cct.training.recipe import Recipe
from multidomain_cct.training.run import Run, build_accelerator, open_run
from multidomain_cct.training.run_folder import training_images, write_run_folder
from multidomain_cct.training.runlog import RunLog, Window, environment
from multidomain_cct.training.schedules import learning_rate, set_learning_rate
from multidomain_cct.training.startup import show_startup
from multidomain_cct.training.step import BufferBackup, take_step
from multidomain_cct.training.validation import ValidationStopped, record, validate


def train(recipe: Recipe, folders: Sequence[Path], *, command: str = "", named_by: str = "the recipe") -> Path:
    """Train as the recipe says and return the run's folder.

    Raises UserError, before anything is written, for what the user has to change, RunFailed when the run cannot go on,
    and RunStopped when SIGTERM or Ctrl-C asked it to stop and it has saved.
    """
    accelerator = build_accelerator(recipe)
    rank, world = accelerator.process_index, accelerator.num_processes
    out_of_memory = one_line_out_of_memory(rank, world, lambda: _less_memory(recipe))
    with ExitStack() as lock, StopRequest(accelerator) as stop, no_process_left(), out_of_memory:
        run, state, start = open_run(recipe, folders, stop, lock, named_by=named_by)
        # The other processes look for an earlier run before the first one writes this one.
        accelerator.wait_for_everyone()
        with one_line_errors(rank, world):
            if accelerator.is_main_process:
                facts = environment(command, accelerator.device, world)
                facts |= {"forced": list(start.forced)} if start.forced else {}
                write_run_folder(recipe, run.domains, facts | {"images": training_images(run.streams)})
            accelerator.wait_for_everyone()
            if recipe.training.trackers:
                accelerator.init_trackers(recipe.name)
            enabled, scored = accelerator.is_main_process, not state.owes_evaluation
            log = RunLog(recipe.folder, state.step, recipe.training.steps, enabled=enabled, scored=scored)
            with log:
                show_startup(run, log)
                for notice in (*start.notices, *_compiled(run)):
                    log.notice(notice)
                try:
                    _loop(run, state, log)
                except RunStopped:
                    accelerator.end_training()
                    raise
        accelerator.end_training()
    return recipe.folder


def _less_memory(recipe: Recipe) -> str:
    """What to change for less memory, in order, and what is saved."""
    encoder, training = recipe.encoder, recipe.training
    ways = [] if encoder.checkpoint or encoder.norm == "per_domain" else ["encoder.checkpoint=true"]
    ways += [f"training.accumulation={2 * training.accumulation}, a smaller data.crop or smaller batches"]
    ways += ["training.precision=bf16"] if training.mixed_precision == "no" else []
    newest = checkpoints(recipe.folder / "checkpoints")[-1:]
    go_on = "go on with resume=auto, or with resume=force after a change of crop, batch or precision"
    safe = f"{newest[0]} is safe: {go_on}" if newest else "No checkpoint was written yet"
    return f"Set, in this order: {'; '.join(ways)}. {safe}."


def _compiled(run: Run) -> list[str]:
    """Compile the encoder on the first step's images if the recipe asks for it. Returns why that failed."""
    if not run.recipe.encoder.compile:
        return []
    first = next(steps(run.data, 0, 1, workers=0))
    return compile_encoder(run.bare_model, {name: batch.to(run.accelerator.device) for name, batch in first.items()})


def _loop(run: Run, state: RunState, log: RunLog) -> None:
    settings, device, world = run.recipe.training, run.accelerator.device, run.accelerator.num_processes
    run.stop.training = True
    if state.owes_evaluation:
        state = _with_scores(run, state, log)
        _save_or_stop(run, state, save=not state.owes_evaluation, stopping=state.owes_evaluation)
    micro_batches = _micro_batches(run, state.step)
    window, skips = Window(world), _Skips(settings.max_skipped, settings.steps, state.step)
    bad_images, backup = BadImages(run.data, state.images), BufferBackup(run.model)
    run.model.train()
    for step in range(state.step, settings.steps):
        lr, progress = _prepare(run, step), step / settings.steps
        result = take_step(run, micro_batches, progress, window=window, bad_images=bad_images, backup=backup)
        done, last = step + 1, step + 1 == settings.steps
        for line in bad_images.untold:
            log.notice(f"step {done}: {line}")
        bad_images.untold.clear()
        window.skipped += result.trouble is not None
        skips.count(done, result.trouble, log)
        ends_window = last or done % settings.log_every == 0
        log.advance(done, window, device, plain=ends_window)
        if ends_window:
            record(run, log, done, window.metrics(device) | bad_images.metrics | {"lr": lr})
            window = Window(world)
        state = replace(state, step=done, images=bad_images.counts)
        if run.scored and (last or done % settings.evaluate_every == 0):
            state = _with_scores(run, state, log)
        save = last or state.best_step == done or done % settings.save_every == 0
        _save_or_stop(run, state, save=save, stopping=result.stopping or state.owes_evaluation)
        window.restart_clock()


def _micro_batches(run: Run, start: int) -> Iterator[dict[str, Batch]]:
    data, last = run.recipe.data, run.recipe.training.steps
    pinned = run.accelerator.device.type == "cuda"
    return steps(run.data, start, last, workers=data.workers, prefetch=data.prefetch, pin_memory=pinned)


def _prepare(run: Run, step: int) -> float:
    """Seed the step and set its learning rate, which is returned.

    Order, augmentation, learning rate and randomness depend on the step alone, so a resume needs nothing else.
    """
    recipe = run.recipe
    torch.manual_seed(seed_from(recipe.seed, step, run.accelerator.process_index, "step"))
    lr = learning_rate(recipe.optimiser, step, recipe.training.steps)
    set_learning_rate(run.optimiser, lr)
    return lr


@dataclass
class _Skips:
    """Steps in a row that were skipped because something was not finite."""

    max_skipped: int
    num_steps: int
    last_finite: int
    in_a_row: int = 0

    def count(self, step: int, trouble: str | None, log: RunLog) -> None:
        """Print what was not finite in a step. Raises RunFailed after too many in a row, or when a run has no other."""
        if trouble is None:
            self.in_a_row, self.last_finite = 0, step
            return
        self.in_a_row += 1
        log.warning(f"step {step}: {trouble} (last finite at {self.last_finite}). The step was skipped.")
        if self.in_a_row > self.max_skipped or self.in_a_row == self.num_steps:
            raise RunFailed(
                f"step {step}: {trouble}; {self.in_a_row} steps in a row were skipped. Lower optimiser.lr, set "
                "training.clip, or look at these images."
            )


def _with_scores(run: Run, state: RunState, log: RunLog) -> RunState:
    """The state with this step's scores, or one that owes them because the run was asked to stop meanwhile."""
    try:
        mean = validate(run, log, state.step)
    except ValidationStopped:
        return replace(state, owes_evaluation=True)
    state = replace(state, owes_evaluation=False)
    return replace(state, best_step=state.step, best_miou=mean) if mean > state.best_miou else state


def _save_or_stop(run: Run, state: RunState, *, save: bool, stopping: bool) -> None:
    """Save when it is time, and always before stopping. Raises RunStopped."""
    accelerator, folder, keep = run.accelerator, run.recipe.folder / "checkpoints", run.recipe.training.keep
    if save or stopping:
        if accelerator.is_main_process:
            save_checkpoint(folder, state, run.bare_model, run.optimiser.optimizer, accelerator.scaler, keep=keep)
        accelerator.wait_for_everyone()
    if stopping:
        raise run.stop.stopped(state.step)
