"""train(recipe): assemble, then the loop."""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.tracking import get_available_trackers
from torch import Tensor

from multidomain_cct.data.domain import Domain
from multidomain_cct.data.loader import Batch, DomainStreams, TrainingSet, open_streams, steps
from multidomain_cct.data.order import seed_from
from multidomain_cct.data.shards import Shards
from multidomain_cct.data.specification import find_domain
from multidomain_cct.model.network import CCT
from multidomain_cct.training.checkpoint import (
    RunState,
    build_model,
    load_checkpoint,
    load_initial_weights,
    newest_checkpoint,
    read_state,
    save_checkpoint,
)
from multidomain_cct.training.recipe import Recipe, differences, read_recipe
from multidomain_cct.training.runlog import RunLog, environment, peak_mib
from multidomain_cct.training.schedules import build_optimiser, learning_rate, ramp_at, set_learning_rate
from multidomain_cct.training.scoring import Score, arithmetic_and_harmonic, score


class RunFailed(RuntimeError):
    """A run that cannot go on, for a reason that is not the user's mistake. The message is one line."""


def train(recipe: Recipe, folders: Sequence[Path], *, command: str = "", named_by: str = "the recipe") -> Path:
    """Train as the recipe says and return the run's folder.

    Raises ValueError or FileNotFoundError, before anything is written, for what the user has to change, and RunFailed when the run cannot go on.
    """
    _require_trackers(recipe.training.trackers)
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
    domains = {name: find_domain(name, folders, named_by=named_by) for name in recipe.domains}
    streams = [open_streams(domain, recipe.domains[name], recipe.data, use_unlabelled=recipe.uses_consistency(name)) for name, domain in domains.items()]
    data = TrainingSet(
        streams,
        seed=recipe.seed,
        augment=recipe.data.augment,
        schedule=recipe.data.schedule,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        accumulation=recipe.training.accumulation,
    )
    scored = {name: Shards.open(Path(recipe.data.shards) / name, choice.val_split) for name, choice in recipe.domains.items() if choice.val_split}
    resumed, notices = _resumable_checkpoint(recipe, domains, streams)
    model = build_model(recipe, domains, unlabelled={stream.domain.name: bool(stream.unlabelled) for stream in streams})
    if resumed is None and recipe.encoder.norm == "frozen" and recipe.encoder.weights == "none" and recipe.init_from is None:
        notices.append(
            "encoder.norm is `frozen` and encoder.weights is `none`: norms of random weights stay random; `shared` or pretrained weights train better."
        )
    if resumed is None and recipe.init_from is not None:
        notices += [f"init_from: {line}" for line in load_initial_weights(Path(recipe.init_from), model, domains)]
    optimiser = build_optimiser(recipe.optimiser, model.encoder.trunk, model)
    model, optimiser = accelerator.prepare(model, optimiser)
    state = RunState(step=0, fingerprints=_fingerprints(recipe, streams))
    if resumed is not None:
        state = load_checkpoint(resumed, accelerator.unwrap_model(model), optimiser.optimizer, accelerator.scaler)
        notices.append(f"{recipe.folder}: going on from step {state.step}.")
    # The other processes look for an earlier run before the first one writes this one.
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _write_run_folder(recipe, domains, environment(command, accelerator.device, accelerator.num_processes))
    accelerator.wait_for_everyone()
    if recipe.training.trackers:
        accelerator.init_trackers(recipe.name)
    with RunLog(recipe.folder, first_step=state.step, num_steps=recipe.training.steps, enabled=accelerator.is_main_process) as log:
        for notice in notices:
            log.notice(notice)
        _run(recipe, accelerator, model, optimiser, data, domains, scored, state, log)
    accelerator.end_training()
    return recipe.folder


def _run(
    recipe: Recipe,
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimiser: torch.optim.Optimizer,
    data: TrainingSet,
    domains: Mapping[str, Domain],
    scored: Mapping[str, Shards],
    state: RunState,
    log: RunLog,
) -> None:
    settings = recipe.training
    bare: CCT = accelerator.unwrap_model(model)
    micro_batches = steps(
        data, state.step, settings.steps, workers=recipe.data.workers, prefetch=recipe.data.prefetch, pin_memory=accelerator.device.type == "cuda"
    )
    window = _Window(accelerator.num_processes)
    skipped, last_finite = 0, state.step
    model.train()
    for step in range(state.step, settings.steps):
        # Order, augmentation, learning rate and randomness hang on the step alone: this is all that a resume needs.
        torch.manual_seed(seed_from(recipe.seed, step, accelerator.process_index, "step"))
        lr = learning_rate(recipe.optimiser, step, settings.steps)
        set_learning_rate(optimiser, lr)
        trouble = _optimise(recipe, accelerator, model, optimiser, micro_batches, ramp_at(recipe.consistency, step, settings.steps), window)
        done = step + 1
        if trouble is None:
            skipped, last_finite = 0, done
        else:
            skipped += 1
            log.notice(f"step {done}: {trouble} (last finite at {last_finite}). The step was skipped.")
            if skipped > settings.max_skipped:
                raise RunFailed(
                    f"step {done}: {trouble}; {skipped} steps in a row were skipped. Lower optimiser.lr, set training.clip, or look at these images."
                )
        ends_window = done % settings.log_every == 0 or done == settings.steps
        log.advance(done, window.text(accelerator.device), plain=ends_window)
        if ends_window:
            _record(accelerator, log, done, window.metrics(accelerator.device) | {"lr": lr})
            window = _Window(accelerator.num_processes)
        last = done == settings.steps
        best = False
        if scored and (last or done % settings.evaluate_every == 0):
            scores = _evaluate(recipe, accelerator, bare, domains, scored)
            values = _score_metrics(scores)
            _record(accelerator, log, done, values)
            log.notice(f"step {done}: " + "  ".join(f"{name} mIoU {100 * scores[name].miou:.1f}" for name in scores))
            mean = arithmetic_and_harmonic([result.miou for result in scores.values()])[0]
            best = mean > state.best_miou
            if best:
                state = replace(state, best_step=done, best_miou=mean)
            window.restart_clock()
        if last or best or done % settings.save_every == 0:
            state = replace(state, step=done)
            if accelerator.is_main_process:
                save_checkpoint(recipe.folder / "checkpoints", state, bare, optimiser.optimizer, accelerator.scaler, keep=settings.keep)  # type: ignore[attr-defined]
            accelerator.wait_for_everyone()


def _optimise(
    recipe: Recipe,
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimiser: torch.optim.Optimizer,
    micro_batches: Iterator[dict[str, Batch]],
    ramp: float,
    window: _Window,
) -> str | None:
    """One optimiser step. Returns what was not finite, and then nothing has changed.

    Whether to skip is decided on losses that are summed over the processes, so all of them skip the same step.
    """
    accumulation = recipe.training.accumulation
    trouble: str | None = None
    # A forward pass that is not finite has already spoilt the running statistics of batch norms.
    statistics = [buffer.clone() for buffer in model.buffers()]
    for micro in range(accumulation):
        batches = {name: batch.to(accelerator.device) for name, batch in window.timed_next(micro_batches).items()}
        if trouble is not None:
            continue
        synchronised = micro == accumulation - 1
        with _no_sync(accelerator, model, synchronised):
            losses: dict[str, Tensor] = model(batches, ramp=ramp)
            values = accelerator.reduce(torch.stack([loss.detach().float() for loss in losses.values()]), reduction="mean").tolist()
            window.add(dict(zip(losses, values, strict=True)), batches)
            broken = [term for term, value in zip(losses, values, strict=True) if not math.isfinite(value)]
            if broken:
                trouble = f"{broken[0]} is {values[list(losses).index(broken[0])]}; keys {', '.join(batches[broken[0].split('/')[0]].keys)}"
                continue
            accelerator.backward(torch.stack(list(losses.values())).sum() / accumulation)
    if trouble is None:
        limit = recipe.training.clip or math.inf
        norm = float(accelerator.clip_grad_norm_(model.parameters(), limit))
        # A GradScaler skips such steps itself and lowers its scale.
        if not math.isfinite(norm) and accelerator.scaler is None:
            trouble = f"the gradient's norm is {norm}"
        else:
            optimiser.step()
    optimiser.zero_grad()
    if trouble is not None:
        for buffer, before in zip(model.buffers(), statistics, strict=True):
            buffer.copy_(before)
    return trouble


def _no_sync(accelerator: Accelerator, model: torch.nn.Module, synchronised: bool) -> torch.autograd.grad_mode.enable_grad:
    context: torch.autograd.grad_mode.enable_grad = torch.enable_grad() if synchronised else accelerator.no_sync(model)
    return context


class _Window:
    """Sums since the last line of metrics."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.sums: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)
        self.images = 0
        self.waited = 0.0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave what happened between two steps (evaluation, saving) out of the rates."""
        self.started = time.perf_counter()
        self.images, self.waited = 0, 0.0

    def timed_next(self, micro_batches: Iterator[dict[str, Batch]]) -> dict[str, Batch]:
        before = time.perf_counter()
        batches = next(micro_batches)
        self.waited += time.perf_counter() - before
        return batches

    def add(self, losses: Mapping[str, float], batches: Mapping[str, Batch]) -> None:
        for term, value in losses.items():
            self.sums[term] += value
            self.counts[term] += 1
        self.images += self.world * sum(len(batch.images) + len(batch.unlabelled) for batch in batches.values())

    def metrics(self, device: torch.device) -> dict[str, float]:
        seconds = max(1e-9, time.perf_counter() - self.started)
        losses = {f"train/{term}": total / self.counts[term] for term, total in self.sums.items()}
        return losses | {"sys/images_per_s": self.images / seconds, "sys/peak_mib": peak_mib(device), "sys/data_wait_fraction": self.waited / seconds}

    def text(self, device: torch.device) -> str:
        """Losses by domain, speed, waiting for data, memory."""
        domains: dict[str, list[str]] = defaultdict(list)
        for term, total in self.sums.items():
            name, _, kind = term.partition("/")
            domains[name].append(f"{kind[:3]} {total / self.counts[term]:.3f}")
        values = self.metrics(device)
        losses = " | ".join(f"{name} {' '.join(terms)}" for name, terms in domains.items())
        return f"{losses}  {values['sys/images_per_s']:.1f} img/s  wait {values['sys/data_wait_fraction']:.0%}  {values['sys/peak_mib']:.0f} MiB"


def _evaluate(recipe: Recipe, accelerator: Accelerator, model: CCT, domains: Mapping[str, Domain], scored: Mapping[str, Shards]) -> dict[str, Score]:
    with accelerator.autocast():
        return {
            name: score(
                model,
                shards,
                domains[name],
                recipe.domains[name].val_split,
                recipe.evaluation,
                device=accelerator.device,
                workers=min(1, recipe.data.workers),
                rank=accelerator.process_index,
                world=accelerator.num_processes,
                total=lambda tensor: accelerator.reduce(tensor, reduction="sum"),
            )
            for name, shards in scored.items()
        }


def _score_metrics(scores: Mapping[str, Score]) -> dict[str, float | None]:
    values: dict[str, float | None] = {}
    for name, result in scores.items():
        values[f"val/{name}/miou"] = result.miou
        values[f"val/{name}/pixel_accuracy"] = result.pixel_accuracy
        values |= {f"val/{name}/iou/{label}": iou for label, iou in result.iou.items()}
    values["val/mean_miou"], values["val/harmonic_miou"] = arithmetic_and_harmonic([result.miou for result in scores.values()])
    return values


def _record(accelerator: Accelerator, log: RunLog, step: int, values: Mapping[str, float | None]) -> None:
    log.metrics(step, values)
    accelerator.log({key: value for key, value in values.items() if value is not None}, step=step)


def _require_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that Accelerate would leave out in silence."""
    available = [str(tracker) for tracker in get_available_trackers()]
    for name in names:
        if name not in available:
            raise ValueError(f"training.trackers names {name!r}. Installed: {', '.join(available) or 'none'}. For example: pip install tensorboard")


def _fingerprints(recipe: Recipe, streams: Sequence[DomainStreams]) -> dict[str, str]:
    found = {}
    for stream in streams:
        choice = recipe.domains[stream.domain.name]
        for split, shards in zip([choice.train_split, *choice.unlabelled_splits], stream.sources, strict=False):
            found[f"{stream.domain.name}/{split}"] = shards.fingerprint
    return found


def _resumable_checkpoint(recipe: Recipe, domains: Mapping[str, Domain], streams: Sequence[DomainStreams]) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, or None for a new run, and what the user should know of it. Raises ValueError rather than touch a folder that holds
    another run.
    """
    folder = recipe.folder
    if not folder.exists() or not any(folder.iterdir()):
        return None, []
    if recipe.resume == "never":
        raise ValueError(f"{folder} exists. Continue it with resume=auto, or start another run with name=OTHER.")
    if not (folder / "recipe.yaml").is_file():
        raise ValueError(f"{folder} exists and is not a run (it has no recipe.yaml). Choose another name=.")
    changed = differences(read_recipe(folder / "recipe.yaml"), recipe)
    for name, domain in domains.items():
        spec = folder / "domains" / f"{name}.yaml"
        if spec.is_file() and spec.read_text(encoding="utf-8") != domain.to_yaml():
            changed.append(f"the specification of {name}")
    if changed:
        more = f", and {len(changed) - 4} more" if len(changed) > 4 else ""
        raise ValueError(f"{folder} is a run of another recipe: {', '.join(changed[:4])}{more}. Take these back, or start another run with name=OTHER.")
    checkpoint, warnings = newest_checkpoint(folder / "checkpoints")
    if checkpoint is not None:
        old, new = read_state(checkpoint).fingerprints, _fingerprints(recipe, streams)
        for split in new:
            if old.get(split) != new[split]:
                raise ValueError(
                    f"{folder} was trained on other shards of {split}: {old.get(split)} -> {new[split]}. Restore them, or start another run with name=OTHER."
                )
    return checkpoint, warnings


def _write_run_folder(recipe: Recipe, domains: Mapping[str, Domain], env: Mapping[str, object]) -> None:
    (recipe.folder / "domains").mkdir(parents=True, exist_ok=True)
    (recipe.folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    (recipe.folder / "env.json").write_text(json.dumps(env, indent=1), encoding="utf-8")
    for name, domain in domains.items():
        (recipe.folder / "domains" / f"{name}.yaml").write_text(domain.to_yaml(), encoding="utf-8")
