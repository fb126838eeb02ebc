"""One optimiser step: all forward and backward passes, one collective, and only then what depends on its numbers.

The host reads nothing before the last backward pass, so that a GPU always has work.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from multidomain_cct.data.batches.bad_images import BadImages, skipped_in
from multidomain_cct.data.batches.loader import Batch, Skipped
from multidomain_cct.training.run import Run
from multidomain_cct.training.runlog import Window


@dataclass(frozen=True)
class StepResult:
    """What the processes agree on after a step."""

    trouble: str | None
    """What was not finite; the step then changed nothing."""
    stopping: bool
    """Whether a process was asked to stop."""


@dataclass(frozen=True)
class _Pass:
    """What is kept of a micro-batch once its gradients are added up."""

    losses: Mapping[str, Tensor]
    keys: Mapping[str, Sequence[str]]
    skipped: Sequence[tuple[str, Skipped]]
    num_images: int


class BufferBackup:
    """A copy of the model's buffers: a forward pass that is not finite spoils the running statistics of batch norms."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._copies = [buffer.clone() for buffer in model.buffers()]

    def keep(self) -> None:
        torch._foreach_copy_(self._copies, list(self._model.buffers()))

    def restore(self) -> None:
        torch._foreach_copy_(list(self._model.buffers()), self._copies)


def take_step(
    run: Run,
    micro_batches: Iterator[dict[str, Batch]],
    progress: float,
    *,
    window: Window,
    bad_images: BadImages,
    backup: BufferBackup,
) -> StepResult:
    """One optimiser step on the next micro-batches; `progress` is the share of the run that is done, 0 to 1.

    All processes decide on the same reduced losses, so that all of them skip the same steps. Raises TooManyBadImages,
    in all processes.
    """
    backup.keep()
    accumulation = run.recipe.training.accumulation
    passes = [
        _forward_backward(run, window.timed_next(micro_batches), progress, bad_images, last=number == accumulation - 1)
        for number in range(accumulation)
    ]
    means, num_skipped, stopping = _reduced(run, passes)
    if num_skipped:
        bad_images.count({}, gather_object([image for each in passes for image in each.skipped]))
    trouble = None
    for each, losses in zip(passes, means, strict=True):
        broken = [name for name, value in losses.items() if not math.isfinite(value)]
        if not broken:
            window.add(losses, each.num_images)
        elif trouble is None:
            keys = _keys_of_broken_loss(broken[0], each)
            trouble = f"{broken[0]} is {losses[broken[0]]}; keys {', '.join(keys)}"
    trouble = trouble or _optimise(run)
    run.optimiser.zero_grad()
    if trouble is not None:
        backup.restore()
    return StepResult(trouble, stopping)


def _forward_backward(
    run: Run, batches: Mapping[str, Batch], progress: float, bad_images: BadImages, *, last: bool
) -> _Pass:
    """Add the gradients of a micro-batch. The processes exchange gradients in the `last` one of a step."""
    bad_images.count(batches, [])
    accelerator, model = run.accelerator, run.model
    on_device = {name: batch.to(accelerator.device) for name, batch in batches.items()}
    with nullcontext() if last else accelerator.no_sync(model):
        losses: dict[str, Tensor] = model(on_device, progress=progress)
        accelerator.backward(torch.stack(list(losses.values())).sum() / run.recipe.training.accumulation)
    return _Pass(
        losses={name: loss.detach() for name, loss in losses.items()},
        keys={name: batch.keys for name, batch in batches.items()},
        skipped=skipped_in(batches),
        num_images=sum(len(batch.images) + len(batch.unlabelled) for batch in batches.values()),
    )


def _reduced(run: Run, passes: Sequence[_Pass]) -> tuple[list[dict[str, float]], float, bool]:
    """The losses of each pass averaged over the processes, a number above 0 when images were skipped in any of them,
    and whether any was asked to stop: the step's only collective, and the host's only read.
    """
    accelerator, stop = run.accelerator, run.stop
    losses = torch.stack([loss.float() for each in passes for loss in each.losses.values()])
    others = [float(sum(len(each.skipped) for each in passes)), *stop.flags]
    numbers = torch.cat([losses, torch.tensor(others, device=accelerator.device)])
    values = iter(accelerator.reduce(numbers, reduction="mean").tolist())
    means = [{name: next(values) for name in each.losses} for each in passes]
    return means, next(values), stop.agree(list(values))


def _keys_of_broken_loss(name: str, broken: _Pass) -> list[str]:
    """Keys of the images, in all processes, whose loss is not finite."""
    keys: list[str] = gather_object(
        [] if math.isfinite(broken.losses[name].item()) else list(broken.keys[name.split("/")[0]])
    )
    return keys


def _optimise(run: Run) -> str | None:
    """Clip the gradients and change the weights. Returns what was not finite."""
    accelerator = run.accelerator
    norm = float(accelerator.clip_grad_norm_(run.model.parameters(), run.recipe.training.clip or math.inf))
    finite = math.isfinite(norm)
    # A GradScaler has to see a step that is not finite: it leaves it out itself, and lowers its scale.
    if finite or accelerator.scaler is not None:
        run.optimiser.step()
    if not finite:
        return f"the gradient's norm is {norm}"
    run.bare_model.after_step()
    return None
