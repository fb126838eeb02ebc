"""Losses of the K auxiliary decoders, without ever holding the logits of all of them.

Decoders are taken in groups of as many as a budget of logits allows; one that exceeds it alone is taken in pieces of
its pixels. The losses of each group are computed by ordinary code under autograd, and only their gradients are kept,
which the backward pass scales. The result is exact, and memory does not grow with K.

Shapes: K decoders, G of a group, B images, C classes, D feature channels, h w feature size, T losses, U V pixels in
the decoders' order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from multidomain_cct.model.decoders import ALL_PIXELS, Decoder, DecoderGroup, Grid, budget_of
from multidomain_cct.model.losses import PixelLoss
from multidomain_cct.model.object_masks import ObjectMasks
from multidomain_cct.model.perturbations import Perturbation

Perturb = Callable[[Tensor, DecoderGroup, slice], Tensor]
"""(B, D, h, w) features, a group and which of the K decoders it has -> (1 or G, B, D, h, w) perturbed features."""


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
        group = group[drawn]

    def perturb(still: Tensor, part: DecoderGroup, span: slice) -> Tensor:
        """Equal perturbations that follow each other are drawn at once."""
        perturbed: list[Tensor] = []
        start = 0
        for perturbation, run in groupby(perturbations[span]):
            alike = slice(start, start + len(list(run)))
            perturbed.append(perturbation(still, objects, part[alike]))
            start = alike.stop
        return torch.cat(perturbed) if len(perturbed) > 1 else perturbed[0]

    return _losses(features, group, perturb, losses)


def decoder_losses(features: Tensor, decoder: Decoder, losses: Sequence[PixelLoss]) -> Tensor:
    """(T,): the losses of one decoder that sees the (B, D, h, w) features as they are."""
    return _losses(features, DecoderGroup.of([decoder]), lambda still, group, span: still[None], losses)


def _losses(features: Tensor, group: DecoderGroup, perturb: Perturb, losses: Sequence[PixelLoss]) -> Tensor:
    device = features.device.type
    # Gradients of a mean over pixels underflow in fp16, and a GradScaler's factor is not known here.
    fp16 = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    with torch.autocast(device, enabled=False) if fp16 else nullcontext():
        values: Tensor = _GradientsOnly.apply(  # type: ignore[no-untyped-call]
            group, perturb, losses, torch.is_grad_enabled(), features.float() if fp16 else features, *group.weights
        )
    return values


class _GradientsOnly(torch.autograd.Function):
    """(T,) losses of a group; only the gradients of features and stacked weights are kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        group: DecoderGroup,
        perturb: Perturb,
        losses: Sequence[PixelLoss],
        differentiate: bool,
        features: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        still = features.detach().contiguous()
        # As many decoders at once as the budget allows.
        most = max(1, budget_of(still.device) // (len(still) * group.num_classes * group.num_pixels(still.shape[2:])))
        values: list[Tensor] = []
        kept: list[Tensor] = []
        of_features: list[Tensor] = []  # by loss, added up
        of_weights: list[list[list[Tensor]]] = []  # by group, loss and weight
        for start in range(0, len(group), most):
            span = slice(start, start + most)
            more, gradients = _group_losses(group[span], perturb, span, still, losses, differentiate)
            values += more
            # In 32 bits or more: many are added up.
            new = [first.to(torch.promote_types(first.dtype, torch.float32)) for first, *_ in gradients]
            of_features = _added(of_features, new)
            of_weights.append([others for _, *others in gradients])
        for first, groups in zip(of_features, zip(*of_weights, strict=True), strict=True):  # none without a graph
            each = zip(*groups, strict=True)
            kept += [first, *(parts[0] if len(parts) == 1 else torch.cat(parts) for parts in each)]
        ctx.save_for_backward(*kept)
        ctx.num_decoders, ctx.num_losses, ctx.dtype = len(group), len(losses), features.dtype
        channels_last = features.is_contiguous(memory_format=torch.channels_last)
        ctx.format = torch.channels_last if channels_last else torch.contiguous_format
        return torch.stack(values).view(-1, len(losses)).sum(dim=0) / len(group)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, factors: Tensor) -> tuple[Tensor | None, ...]:
        saved, share = ctx.saved_tensors, len(ctx.saved_tensors) // ctx.num_losses
        total: list[Tensor] = []
        for number, factor in enumerate((factors / ctx.num_decoders).unbind()):
            total = _added(total, list(torch._foreach_mul(saved[number * share : (number + 1) * share], factor)))
        return (None, None, None, None, total[0].to(ctx.dtype, memory_format=ctx.format), *total[1:])


def _group_losses(
    group: DecoderGroup, perturb: Perturb, span: slice, still: Tensor, losses: Sequence[PixelLoss], differentiate: bool
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """The T losses of each piece of a group, in turn; and for each loss its gradients, of features and weights.

    Called without a graph, in which all weights are leaves.
    """
    features, *_ = (leaf.requires_grad_() for leaf in (still.detach(), *group.weights))
    with torch.set_grad_enabled(differentiate):
        perturbed = perturb(features, group, span)  # (1 or G, B, D, h, w)
        coarse = group.coarse(perturbed)  # (G, B, C, h, w)
    left = perturbed.detach().flatten(2).any(dim=2)  # (1 or G, B): False where an image is zeroed entirely
    values: list[Tensor] = []
    sums: list[list[Tensor]] = [[] for _ in losses]
    # The graph of one piece at a time, from the coarse logits on.
    for images, part in group.pieces(coarse):
        with torch.set_grad_enabled(differentiate):
            leaf = coarse[:, images].detach().requires_grad_()
            logits = group.logits(leaf, part)
            totals = [loss.total(logits, left, images, part) for loss in losses]
        values += [total.detach() for total in totals]
        if differentiate:
            for number, (of_leaf, *others) in enumerate(_gradients(totals, [leaf, *group.upsampling])):
                if of_leaf.numel() < coarse.numel():
                    whole = torch.zeros_like(coarse)
                    whole[:, images] = of_leaf
                    of_leaf = whole
                sums[number] = _added(sums[number], [of_leaf, *others])
    if not differentiate:
        return values, []
    before = _gradients([coarse] * len(sums), [features, *group.classify], [own for own, *_ in sums])
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


def _added(total: list[Tensor], new: list[Tensor]) -> list[Tensor]:
    """The sums; what is added where there are none yet."""
    return list(torch._foreach_add(total, new)) if total else new
