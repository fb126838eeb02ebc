"""Losses of decoders: those of the K auxiliary decoders of a domain, one at a time, and of a main decoder.

The logits that losses compare never exist all at once: for each decoder in turn the losses and, in the same forward pass, their gradients with respect to the
features and to that decoder are computed, a piece of the pixels after the other, and only these are kept. Backward scales them. Only first products, at the
features' resolution, are taken of several decoders together, as many as make no more numbers than the features. The result is exact, and beyond that memory
does not grow with K.

Shapes: B images, T terms of the loss, C classes, D feature channels, h w feature size, P pixels, in the decoders' order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from multidomain_cct.model.decoders import ALL_PIXELS, Decoder, Grid
from multidomain_cct.model.guides import Guide
from multidomain_cct.model.losses import Term
from multidomain_cct.model.perturbations import Perturbation
from multidomain_cct.model.pointwise import Change, ChangedProducts
from multidomain_cct.model.upsampling import Upsampling

FP16_LOSS_SCALE = 2.0**12
"""In 16-bit floats the gradients of a mean over pixels underflow unless the loss is scaled, and a GradScaler's factor is not known inside a forward pass."""


class AuxiliaryDecoder(nn.Module):
    """A decoder that sees perturbed features."""

    def __init__(self, perturbation: Perturbation, decoder: Decoder) -> None:
        super().__init__()
        self.perturbation = perturbation
        self.decoder = decoder


def auxiliary_losses(features: Tensor, auxiliaries: nn.ModuleList, guide: Guide, terms: Sequence[Term], *, sample: int = 0, grid: Grid = ALL_PIXELS) -> Tensor:
    """(T,): the mean over the decoders of each term of the loss (CCT equation 2), differentiable in the features and in the decoders' parameters.

    An image of whose features a perturbation leaves nothing says nothing, and counts as 0. With `sample` it is the mean over so many decoders, drawn at
    random, and with a `grid` over the pixels in it: both estimate the whole mean without bias. The gradient of a decoder that was not drawn is 0.
    """
    drawn = torch.randperm(len(auxiliaries))[:sample].sort().values.tolist() if sample else range(len(auxiliaries))
    parameters = [parameter for auxiliary in auxiliaries for parameter in auxiliary.parameters()]
    chosen = [cast(AuxiliaryDecoder, auxiliaries[number]) for number in drawn]
    decoders = [(auxiliary.decoder, partial(auxiliary.perturbation, guide=guide, decoder=auxiliary.decoder)) for auxiliary in chosen]
    losses: Tensor = _EachInTurn.apply(torch.is_grad_enabled(), features, decoders, terms, grid, *parameters)  # type: ignore[no-untyped-call]
    return losses


def decoder_losses(features: Tensor, decoder: Decoder, terms: Sequence[Term]) -> Tensor:
    """(T,): each term of the loss of one decoder that sees the features as they are, differentiable in them and in its parameters."""
    as_they_are = [(decoder, lambda features: Change())]
    losses: Tensor = _EachInTurn.apply(torch.is_grad_enabled(), features, as_they_are, terms, ALL_PIXELS, *decoder.parameters())  # type: ignore[no-untyped-call]
    return losses


def in_fp16(features: Tensor) -> bool:
    """Whether autocast makes 16-bit floats of small range of what is computed from the features."""
    kind = features.device.type
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16


class _EachInTurn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        wanted: bool,
        features: Tensor,
        decoders: Sequence[tuple[Decoder, Callable[[Tensor], Change]]],
        terms: Sequence[Term],
        grid: Grid,
        *parameters: Tensor,
    ) -> Tensor:
        """`wanted` says whether gradients are. `parameters` are those of all decoders, drawn or not: a wrapper for several processes waits for each."""
        # Matrix products and sums of other formats are slower.
        maps = features.detach().contiguous()
        scale = FP16_LOSS_SCALE if in_fp16(features) else 1.0
        # Sums stay scaled, in 32 bits, until backward: taking the scale out of 16-bit numbers would flush most of them to 0.
        feature_gradients = [maps.new_zeros(maps.shape, dtype=torch.promote_types(maps.dtype, torch.float32)) for _ in terms if wanted]
        classify, *others = decoders[0][0].joined([decoder for decoder, _ in decoders])
        weight_gradients = [[torch.empty_like(weight) for weight in (classify, *others)] for _ in terms if wanted]
        found: list[Tensor] = []
        parts: list[tuple[slice, list[Term]]] = []
        # As many at once as their products are no more than the features; in 16 bits of small range a sum over several decoders may overflow.
        most = max(1, maps.shape[1] // classify.shape[1]) if scale == 1 else 1
        for span, changes in _together(maps, decoders, most=most):
            first = ChangedProducts(maps, classify[span], changes)
            of_values = [torch.empty_like(first.values) for _ in terms if wanted]
            for number, kept in enumerate(first.images_left()):
                place = span.start + number
                coarse = first.values[:, number].view(len(maps), -1, *maps.shape[2:])
                upsampling = decoders[place][0].upsampling(coarse, [weight[place] for weight in others], grid)
                # Cut once: the decoders differ in their weights only.
                parts = parts or [(piece, [term.part(partial(upsampling.cut, piece=piece)) for term in terms]) for piece in upsampling.pieces()]
                collected = [upsampling.no_gradients() for _ in terms if wanted]
                found.append(_over_pieces(upsampling, parts, kept, collected, scale))
                for own, rooms, total in zip(of_values, weight_gradients, collected, strict=True):
                    own[:, number], *gradients = upsampling.gradients(total)
                    for room, gradient in zip(rooms[1:], gradients, strict=True):
                        room[place] = gradient
            for own, rooms, total in zip(of_values, weight_gradients, feature_gradients, strict=True):
                rooms[0][span] = first.add_gradients(own, total)
            del first, of_values  # before the next changes are drawn
        ctx.save_for_backward(*feature_gradients, *(gradient for own in weight_gradients for gradient in own))
        known = {id(parameter): (place, number) for place, (decoder, _) in enumerate(decoders) for number, parameter in enumerate(decoder.parameters())}
        ctx.places = [known.get(id(parameter)) for parameter in parameters]
        ctx.shapes, ctx.separated = [parameter.shape for parameter in parameters], decoders[0][0].separated
        ctx.scale, ctx.num_terms = scale * len(decoders), len(terms)
        ctx.dtype, ctx.format = features.dtype, torch.channels_last if features.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        return torch.stack(found).mean(dim=0)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        factors = outputs[0] / ctx.scale  # (T,)
        saved = ctx.saved_tensors
        feature_gradients, rest = saved[: ctx.num_terms], saved[ctx.num_terms :]
        share = len(rest) // ctx.num_terms

        def weighted(gradients: Sequence[Tensor]) -> Tensor:
            total: Tensor = gradients[0] * factors[0]
            for gradient, factor in zip(gradients[1:], factors[1:], strict=True):
                total = total + gradient * factor
            return total

        own = ctx.separated([weighted(rest[place::share]) for place in range(share)])
        each = (factors.new_zeros(shape) if place is None else own[place[1]][place[0]] for place, shape in zip(ctx.places, ctx.shapes, strict=True))
        return (None, weighted(feature_gradients).to(ctx.dtype, memory_format=ctx.format), None, None, None, *each)


def _over_pieces(
    upsampling: Upsampling, parts: Sequence[tuple[slice, Sequence[Term]]], kept: Tensor | None, collected: Sequence[list[Tensor]], scale: float
) -> Tensor:
    """(T,): the losses of one decoder. Their gradients, times the scale, are collected, if room for them is given."""
    losses = []
    for piece, terms in parts:
        logits = upsampling.logits(piece)
        for number, term in enumerate(terms):
            loss, gradient = term(logits, kept)
            losses.append(loss)
            if collected:
                upsampling.add_gradients(piece, (gradient if scale == 1 else gradient.mul_(scale)).to(logits.dtype), collected[number])
    return torch.stack(losses).view(len(parts), -1).sum(dim=0)


def _together(maps: Tensor, decoders: Sequence[tuple[Decoder, Callable[[Tensor], Change]]], *, most: int) -> Iterator[tuple[slice, list[Change]]]:
    """The changes that the decoders see, drawn in their order, in runs of at most so many whose first products can be taken at once."""
    start = 0
    changes: list[Change] = []
    for _, change in decoders:
        following = change(maps)
        if changes and (len(changes) == most or not ChangedProducts.fit([*changes, following])):
            yield slice(start, start + len(changes)), changes
            start, changes = start + len(changes), []
        changes.append(following)
        if following.kind == "values":
            # Nothing can join it, and it is large.
            yield slice(start, start + 1), changes
            start, changes = start + 1, []
    if changes:
        yield slice(start, start + len(changes)), changes
