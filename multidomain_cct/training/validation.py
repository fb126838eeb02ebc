"""Scores on the val splits while a run trains."""

from __future__ import annotations

from collections.abc import Mapping

from accelerate.utils import broadcast

from multidomain_cct.evaluation.scoring import Score, Share, arithmetic_and_harmonic, score
from multidomain_cct.training.run import Run
from multidomain_cct.training.run_folder import write_counts
from multidomain_cct.training.runlog import RunLog


class ValidationStopped(Exception):
    """All processes were asked to stop while they scored."""


def validate(run: Run, log: RunLog, step: int) -> float:
    """Score every domain's val split, record the scores, and return their mean mIoU.

    Raises ValidationStopped in all processes when one was asked to stop.
    """
    model = run.bare_model
    for buffer in model.buffers():
        # Each process has its own running statistics; the first process's are scored, because they are saved.
        buffer.copy_(broadcast(buffer.clone()))
    scores = _scores(run)
    values = _metrics(scores)
    if model.teacher is not None:
        # The running average is what predicts; the weights that are trained are scored beside it.
        with model.as_student():
            for name, result in _scores(run).items():
                values[f"val/{name}/student/miou"] = result.miou
                values |= {f"val/{name}/student/iou/{label}": iou for label, iou in result.iou.items()}
    record(run, log, step, values | _class_health(run, log, step))
    if run.accelerator.is_main_process:
        write_counts(run.recipe.folder, step, scores)
    log.notice(f"step {step}: " + "  ".join(f"{name} mIoU {100 * result.miou:.1f}" for name, result in scores.items()))
    return arithmetic_and_harmonic([result.miou for result in scores.values()])[0]


def record(run: Run, log: RunLog, step: int, values: Mapping[str, float | None]) -> None:
    """Write values into metrics.jsonl and give them to the trackers."""
    log.metrics(step, values)
    run.accelerator.log({key: value for key, value in values.items() if value is not None}, step=step)


def _scores(run: Run) -> dict[str, Score]:
    """Every domain's score on its val split, in 32 bits, so that `evaluate` gives the same numbers."""
    recipe, accelerator = run.recipe, run.accelerator

    def leave_if_asked() -> None:
        if run.stop.agreed():
            raise ValidationStopped

    share = Share(
        accelerator.process_index,
        accelerator.num_processes,
        total=lambda tensor: accelerator.reduce(tensor, reduction="sum"),
        between=leave_if_asked,
    )
    workers = recipe.scoring_workers(accelerator.device)
    scores: dict[str, Score] = {}
    for name, shards in run.scored.items():
        domain, split = run.domains[name], recipe.domains[name].val_split
        scores[name] = score(run.bare_model, shards, domain, split, recipe.evaluation, workers=workers, share=share)
    return scores


def _metrics(scores: Mapping[str, Score]) -> dict[str, float | None]:
    values: dict[str, float | None] = {}
    for name, result in scores.items():
        values[f"val/{name}/miou"] = result.miou
        values[f"val/{name}/pixel_accuracy"] = result.pixel_accuracy
        values |= {f"val/{name}/iou/{label}": iou for label, iou in result.iou.items()}
    values["val/mean_miou"], values["val/harmonic_miou"] = arithmetic_and_harmonic(
        [result.miou for result in scores.values()]
    )
    return values


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
                    "labelled ones. Label more images of it; cct_strong.gate=pixel or a higher cct_strong.alignment "
                    "may help."
                )
    return values
