"""Losses of the K auxiliary decoders, without ever holding the logits of all of them.

Decoders are taken in groups of as many as a budget of logits allows; one that exceeds it alone is taken in pieces of
its pixels. The losses of each group are computed by ordinary code under autograd, and only their gradients are kept,
which the backward pass scales. The result is exact, and memory does not grow with K.

Shapes: K decoders, G of a group, B images, C classes, D feature channels, h w feature size, T losses, U V pixels in
the decoders' order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from multidomain_cct.model.decoders import ALL_PIXELS, Decoder, DecoderGroup, Grid, budget_of
from multidomain_cct.model.losses import PixelLoss
from multidomain_cct.model.object_masks import ObjectMasks
from multidomain_cct.model.perturbations import Perturbation

Perturb = Callable[[Tensor, DecoderGroup, int], Tensor]
"""(B, D, h, w) features, a group and the number of its first decoder -> (1 or G, B, D, h, w) perturbed features."""


class AuxiliaryDecoder(nn.Module):
    """A decoder that sees perturbed features."""

    def __init__(self, perturbation: Perturbation, decoder: Decoder) -> None:
        super().__init__()
        self.perturbation = perturbation
        self.decoder = decoder


def auxiliary_losses(
    features: Tensor,
    auxiliaries: nn.ModuleList,
    objects: ObjectMasks,
    losses: Sequence[PixelLoss],
    *,
    sample: int = 0,
    grid: Grid = ALL_PIXELS,
) -> Tensor:
    """(T,): each loss as a mean over the decoders (CCT equation 2), differentiable in features and parameters.

    `features` are (B, D, h, w), not perturbed. An image whose features are zeroed entirely contributes 0. With
    `sample` only that many decoders are drawn, and with a `grid` only its pixels count: both estimate the whole mean
    without bias.
    """
    decoders = cast(Sequence[AuxiliaryDecoder], auxiliaries)
    group = DecoderGroup.of([auxiliary.decoder for auxiliary in decoders], grid)
    perturbations = [auxiliary.perturbation for auxiliary in decoders]
    if sample:
        drawn = torch.randperm(len(decoders))[:sample].sort().values
        perturbations = [perturbations[number] for number in drawn.tolist()]
        # Decoders that are not drawn get a gradient of 0: a wrapper for several processes waits for every parameter.
        drawn = drawn.to(features.device)
        group = replace(group, weights=tuple(weight[drawn] for weight in group.weights))

    def perturb(still: Tensor, part: DecoderGroup, first: int) -> Tensor:
        """Equal perturbations that follow each other are drawn at once."""
        perturbed: list[Tensor] = []
        start = 0
        for perturbation, run in groupby(perturbations[first : first + len(part)]):
            end = start + len(list(run))
            perturbed.append(perturbation(still, objects, part[start:end]))
            start = end
        return torch.cat(perturbed) if len(perturbed) > 1 else perturbed[0]

    return _losses(features, group, perturb, losses)


def decoder_losses(features: Tensor, decoder: Decoder, losses: Sequence[PixelLoss]) -> Tensor:
    """(T,): the losses of one decoder that sees the (B, D, h, w) features as they are."""
    return _losses(features, DecoderGroup.of([decoder]), lambda still, group, first: still[None], losses)


@dataclass(frozen=True)
class _Plan:
    """What the autograd function needs besides the tensors that it differentiates."""

    group: DecoderGroup
    perturb: Perturb
    losses: Sequence[PixelLoss]
    differentiate: bool

    def groups(self, features: Tensor) -> Iterator[tuple[int, DecoderGroup]]:
        """As many decoders at once as the budget allows, with the number of the first; their weights are detached."""
        logits = len(features) * self.group.num_classes * self.group.num_pixels(features.shape[2:])
        most = max(1, budget_of(features.device) // logits)
        for start in range(0, len(self.group), most):
            weights = (weight[start : start + most].detach().requires_grad_() for weight in self.group.weights)
            yield start, replace(self.group, weights=tuple(weights))


def _losses(features: Tensor, group: DecoderGroup, perturb: Perturb, losses: Sequence[PixelLoss]) -> Tensor:
    device = features.device.type
    plan = _Plan(group, perturb, losses, torch.is_grad_enabled())
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
        # Gradients of a mean over pixels underflow in fp16, and a GradScaler's factor is not known here.
        with torch.autocast(device, enabled=False):
            return _GradientsOnly.apply(plan, features.float(), *group.weights)  # type: ignore[no-any-return, no-untyped-call]
    return _GradientsOnly.apply(plan, features, *group.weights)  # type: ignore[no-any-return, no-untyped-call]


class _GradientsOnly(torch.autograd.Function):
    """(T,) losses of a group; only the gradients of features and stacked weights are kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, features: Tensor, *weights: Tensor) -> Tensor:
        still = features.detach().contiguous()
        kept = [_Gradients() for _ in plan.losses]
        values: list[Tensor] = []
        for first, group in plan.groups(still):
            of_pieces, gradients = _group_losses(plan, group, first, still)
            values += of_pieces
            for number, new in enumerate(gradients):  # none without a graph
                kept[number].add(new)
        if plan.differentiate:
            ctx.save_for_backward(*(tensor for gradients in kept for tensor in gradients.tensors()))
        ctx.num_decoders, ctx.num_losses, ctx.dtype = len(weights[0]), len(plan.losses), features.dtype
        channels_last = features.is_contiguous(memory_format=torch.channels_last)
        ctx.format = torch.channels_last if channels_last else torch.contiguous_format
        return torch.stack(values).view(-1, len(plan.losses)).sum(dim=0) / len(weights[0])

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, factors: Tensor) -> tuple[Tensor | None, ...]:
        saved, share = ctx.saved_tensors, len(ctx.saved_tensors) // ctx.num_losses
        total: list[Tensor] = []
        for number, factor in enumerate((factors / ctx.num_decoders).unbind()):
            scaled = torch._foreach_mul(saved[number * share : (number + 1) * share], factor)
            total = list(torch._foreach_add(total, scaled) if total else scaled)
        return (None, total[0].to(ctx.dtype, memory_format=ctx.format), *total[1:])


class _Gradients:
    """Of one loss: of the features added up over groups, of the weights group by group."""

    def __init__(self) -> None:
        self.features: Tensor | None = None
        self.weights: list[list[Tensor]] = []

    def add(self, gradients: Sequence[Tensor]) -> None:
        """Those of one group: (B, D, h, w) of the features, (G, ...) of each weight."""
        of_features, *of_weights = gradients
        # In 32 bits or more: many are added up.
        wide = of_features.to(torch.promote_types(of_features.dtype, torch.float32))
        self.features = wide if self.features is None else self.features.add_(wide)
        self.weights.append(of_weights)

    def tensors(self) -> list[Tensor]:
        """Of the features, then (K, ...) of each weight."""
        assert self.features is not None
        each = zip(*self.weights, strict=True)
        return [self.features, *(parts[0] if len(parts) == 1 else torch.cat(parts) for parts in each)]


def _group_losses(
    plan: _Plan, group: DecoderGroup, first: int, still: Tensor
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """The T losses of each piece of a group, in turn; and for each loss its gradients, of features and weights."""
    with torch.set_grad_enabled(plan.differentiate):
        features = still.detach().requires_grad_()
        perturbed = plan.perturb(features, group, first)  # (G, B, D, h, w)
        coarse = group.coarse(perturbed)  # (G, B, C, h, w)
    left = perturbed.detach().flatten(2).any(dim=2)  # (G, B): False where an image is zeroed entirely
    of_coarse, of_upsampling = group.split_weights()
    values: list[Tensor] = []
    sums: list[list[Tensor]] = []
    # The graph of one piece at a time, from the coarse logits on.
    for piece in group.pieces(coarse):
        with torch.set_grad_enabled(plan.differentiate):
            part = piece.needed(coarse.detach()).contiguous().requires_grad_()
            logits = piece.logits(part)
            losses = [loss.total(logits, left, piece) for loss in plan.losses]
        values += [loss.detach() for loss in losses]
        if plan.differentiate:
            new = _gradients(losses, [part, *of_upsampling])
            new = [[piece.whole(of_part, coarse), *others] for of_part, *others in new]
            sums = [list(torch._foreach_add(*pair)) for pair in zip(sums, new, strict=True)] if sums else new
    if not plan.differentiate:
        return values, []
    before = _gradients([coarse] * len(sums), [features, *of_coarse], [own for own, *_ in sums])
    return values, [[*own, *others] for own, (_, *others) in zip(before, sums, strict=True)]


def _gradients(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], factors: Sequence[Tensor | None] | None = None
) -> list[list[Tensor]]:
    """For each output, on the same graph, its gradients with respect to the inputs."""
    last = len(outputs) - 1
    return [
        list(torch.autograd.grad(output, inputs, factor, retain_graph=number < last))
        for number, (output, factor) in enumerate(zip(outputs, factors or [None] * len(outputs), strict=True))
    ]
