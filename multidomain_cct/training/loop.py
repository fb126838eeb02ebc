"""train(recipe): open the run, then step, log, evaluate and save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate.utils import broadcast

from multidomain_cct.data.batches.bad_images import BadImages
from multidomain_cct.data.batches.loader import steps
from multidomain_cct.evaluation.scoring import Score, Share, arithmetic_and_harmonic, score
from multidomain_cct.files.seeds import seed_from
from multidomain_cct.training.build import compile_encoder
from multidomain_cct.training.checkpoints.checkpoint import save_checkpoint
from multidomain_cct.training.checkpoints.state import RunState
from multidomain_cct.training.processes.failures import RunFailed as RunFailed
from multidomain_cct.training.processes.failures import no_process_left, one_line_errors
from multidomain_cct.training.processes.stopping import RunStopped, StopRequest
from multidomain_cct.training.recipe import Recipe
from multidomain_cct.training.run import Run, build_accelerator, open_run
from multidomain_cct.training.run_folder import write_run_folder
from multidomain_cct.training.runlog import RunLog, Window, environment
from multidomain_cct.training.schedules import learning_rate, set_learning_rate
from multidomain_cct.training.step import BufferBackup, take_step


class _EvaluationStopped(Exception):
    """All processes were asked to stop while they evaluated."""


def train(recipe: Recipe, folders: Sequence[Path], *, command: str = "", named_by: str = "the recipe") -> Path:
    """Train as the recipe says and return the run's folder.

    Raises UserError, before anything is written, for what the user has to change, RunFailed when the run cannot go on,
    and RunStopped when SIGTERM or Ctrl-C asked it to stop and it has saved.
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
    """Compile the encoder on the first step's images if the recipe asks for it. Returns why that failed."""
    if not run.recipe.encoder.compile:
        return []
    first = next(steps(run.data, 0, 1, workers=0))
    return compile_encoder(run.bare_model, {name: batch.to(run.accelerator.device) for name, batch in first.items()})


def _loop(run: Run, state: RunState, log: RunLog) -> None:
    recipe, settings, device = run.recipe, run.recipe.training, run.accelerator.device
    run.stop.training = True
    if state.owes_evaluation:
        state = _with_evaluation(run, state, log)
        _save_or_stop(run, state, save=not state.owes_evaluation, stopping=state.owes_evaluation)
    micro_batches = steps(
        run.data,
        state.step,
        settings.steps,
        workers=recipe.data.workers,
        prefetch=recipe.data.prefetch,
        pin_memory=device.type == "cuda",
    )
    window, skips = Window(run.accelerator.num_processes), _Skips(settings.max_skipped, state.step)
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
        log.advance(done, window.text(device), plain=ends_window)
        if ends_window:
            _record(run, log, done, window.metrics(device) | bad_images.metrics | {"lr": lr})
            window = Window(run.accelerator.num_processes)
        state = replace(state, step=done, images=bad_images.counts)
        if run.scored and (last or done % settings.evaluate_every == 0):
            state = _with_evaluation(run, state, log)
        save = last or state.best_step == done or done % settings.save_every == 0
        _save_or_stop(run, state, save=save, stopping=result.stopping or state.owes_evaluation)
        window.restart_clock()


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
    last_finite: int
    in_a_row: int = 0

    def count(self, step: int, trouble: str | None, log: RunLog) -> None:
        """Print what was not finite in a step. Raises RunFailed after too many in a row."""
        if trouble is None:
            self.in_a_row, self.last_finite = 0, step
            return
        self.in_a_row += 1
        log.notice(f"step {step}: {trouble} (last finite at {self.last_finite}). The step was skipped.")
        if self.in_a_row > self.max_skipped:
            raise RunFailed(
                f"step {step}: {trouble}; {self.in_a_row} steps in a row were skipped. Lower optimiser.lr, set "
                "training.clip, or look at these images."
            )


def _with_evaluation(run: Run, state: RunState, log: RunLog) -> RunState:
    """The state with this step's scores, or one that owes them because the run was asked to stop meanwhile."""
    try:
        mean = _evaluate(run, log, state.step)
    except _EvaluationStopped:
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


def _evaluate(run: Run, log: RunLog, step: int) -> float:
    """Score every domain's val split, record the scores, and return their mean mIoU.

    Raises _EvaluationStopped in all processes when one was asked to stop.
    """
    model = run.bare_model
    for buffer in model.buffers():
        # Each process has its own running statistics; the first process's are scored, because they are saved.
        buffer.copy_(broadcast(buffer.clone()))
    scores = _scores(run)
    values = _score_metrics(scores)
    if model.teacher is not None:
        # The running average is what predicts; the weights that are trained are scored beside it.
        with model.as_student():
            values |= {f"val/{name}/student/miou": result.miou for name, result in _scores(run).items()}
    _record(run, log, step, values | _class_health(run, log, step))
    log.notice(f"step {step}: " + "  ".join(f"{name} mIoU {100 * result.miou:.1f}" for name, result in scores.items()))
    return arithmetic_and_harmonic([result.miou for result in scores.values()])[0]


def _scores(run: Run) -> dict[str, Score]:
    """Every domain's score on its val split. Raises _EvaluationStopped like `_evaluate`."""
    recipe, accelerator = run.recipe, run.accelerator
    share = Share(
        accelerator.process_index,
        accelerator.num_processes,
        total=lambda tensor: accelerator.reduce(tensor, reduction="sum"),
        between=lambda: _leave_if_asked(run.stop),
    )
    scores: dict[str, Score] = {}
    # In 32 bits whatever the precision of training, so that `evaluate` gives the same numbers.
    for name, shards in run.scored.items():
        scores[name] = score(
            run.bare_model,
            shards,
            run.domains[name],
            recipe.domains[name].val_split,
            recipe.evaluation,
            workers=min(1, recipe.data.workers),
            share=share,
        )
    return scores


def _class_health(run: Run, log: RunLog, step: int) -> dict[str, float]:
    """What unlabelled images teach of each class, as metrics. Says which classes have labels and hardly any target."""
    values: dict[str, float] = {}
    for name, domain in run.domains.items():
        for label, health in zip(domain.classes, run.bare_model.class_health(name), strict=False):
            values[f"train/{name}/pseudo_labels/{label.name}"] = health.predicted
            values[f"train/{name}/kept/{label.name}"] = health.kept
            if health.vanishes:
                log.notice(
                    f"step {step}: {name}: {label.name} is vanishing from the pseudo-labels: "
                    f"{100 * health.predicted:.2f} % of the unlabelled pixels, {100 * health.labelled:.2f} % of the "
                    "labelled ones. Label more images of it, or raise cct_strong.alignment."
                )
    return values


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
