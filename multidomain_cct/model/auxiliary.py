"""The K auxiliary decoders: what they lose, without ever holding the logits of all of them.

Decoders are taken in groups of as many as a budget of logits allows, and one that exceeds it alone is taken in pieces
of its pixels. For each group the losses are computed by ordinary code under autograd, their gradients are taken in the
same forward pass, and nothing else is kept; the backward pass scales them. The result is exact, and memory does not
grow with K.

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

    def groups(self, features: Tensor) -> Iterator[tuple[slice, DecoderGroup]]:
        """As many decoders at once as the budget allows, at least one; their weights are detached."""
        logits = len(features) * self.group.num_classes * self.group.num_pixels(features.shape[2:])
        most = max(1, budget_of(features.device) // logits)
        for start in range(0, len(self.group), most):
            span = slice(start, min(start + most, len(self.group)))
            weights = tuple(weight[span].detach().requires_grad_() for weight in self.group.weights)
            yield span, replace(self.group, weights=weights)


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
        totals: list[Tensor] = []
        kept = [_Gradients.zeros(still, weights) for _ in plan.losses] if plan.differentiate else []
        for span, group in plan.groups(still):
            totals.extend(_add_group(plan, group, span, still, kept))
        ctx.save_for_backward(*(tensor for gradients in kept for tensor in (gradients.features, *gradients.weights)))
        ctx.num_decoders, ctx.num_losses, ctx.dtype = len(weights[0]), len(plan.losses), features.dtype
        channels_last = features.is_contiguous(memory_format=torch.channels_last)
        ctx.format = torch.channels_last if channels_last else torch.contiguous_format
        return torch.stack(totals).view(-1, len(plan.losses)).sum(dim=0) / len(weights[0])

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, factors: Tensor) -> tuple[Tensor | None, ...]:
        saved, share = ctx.saved_tensors, len(ctx.saved_tensors) // ctx.num_losses
        total: list[Tensor] = []
        for number, factor in enumerate((factors / ctx.num_decoders).unbind()):
            scaled = torch._foreach_mul(saved[number * share : (number + 1) * share], factor)
            total = list(torch._foreach_add(total, scaled) if total else scaled)
        return (None, total[0].to(ctx.dtype, memory_format=ctx.format), *total[1:])


@dataclass(frozen=True)
class _Gradients:
    """Of one loss, added up over groups and pieces."""

    features: Tensor
    """(B, D, h, w), in 32 bits or more."""
    weights: list[Tensor]
    """(K, ...) for each parameter of the decoders."""

    @classmethod
    def zeros(cls, features: Tensor, weights: Sequence[Tensor]) -> _Gradients:
        wide = torch.promote_types(features.dtype, torch.float32)
        return cls(torch.zeros_like(features, dtype=wide), [torch.zeros_like(weight) for weight in weights])

    def add_weights(self, span: slice, gradients: Sequence[Tensor | None]) -> None:
        pairs = [(own[span], new) for own, new in zip(self.weights, gradients, strict=True) if new is not None]
        if pairs:
            torch._foreach_add_(*map(list, zip(*pairs, strict=True)))


def _add_group(
    plan: _Plan, group: DecoderGroup, span: slice, still: Tensor, kept: Sequence[_Gradients]
) -> list[Tensor]:
    """The T losses of each piece of a group, in turn. Their gradients are added to those that are kept for each loss."""
    found: list[Tensor] = []
    with torch.set_grad_enabled(plan.differentiate):
        features = still.detach().requires_grad_()
        perturbed = plan.perturb(features, group, span.start)  # (G, B, D, h, w)
        coarse = group.coarse(perturbed)  # (G, B, C, h, w)
    left = perturbed.detach().flatten(2).any(dim=2)  # (G, B): False where an image is zeroed entirely
    of_coarse = [torch.zeros_like(coarse) for _ in kept]
    # The graph of one piece at a time, from the coarse logits on.
    for piece in group.pieces(coarse):
        with torch.set_grad_enabled(plan.differentiate):
            middle = piece.needed(coarse.detach()).contiguous().requires_grad_()
            logits = piece.logits(middle)
            values = [loss.total(logits, left, piece) for loss in plan.losses]
        for number, gradients in enumerate(kept):
            own, *of_weights = _gradients(values[number], [middle, *group.weights], more=number + 1 < len(kept))
            piece.needed(of_coarse[number]).add_(own)
            gradients.add_weights(span, of_weights)
        found += [value.detach() for value in values]
    for number, gradients in enumerate(kept):
        inputs = [features, *group.weights]
        own, *of_weights = _gradients(coarse, inputs, of_coarse[number], more=number + 1 < len(kept))
        gradients.features.add_(own)
        gradients.add_weights(span, of_weights)
    return found


def _gradients(output: Tensor, inputs: Sequence[Tensor], given: Tensor | None = None, *, more: bool) -> tuple[Any, ...]:
    """None for inputs that the output does not depend on. `more`: the graph is used again."""
    return torch.autograd.grad(output, inputs, given, retain_graph=more, allow_unused=True)
