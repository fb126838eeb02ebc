"""The K auxiliary decoders of a domain, one at a time.

Their logits never exist all at once: for each decoder in turn the losses and, in the same forward pass, their gradients with respect to the features and to
that decoder are computed and only these are kept. Backward scales them. The result is exact, and memory does not grow with K.

Shapes: B images, T terms of the loss, C classes, D feature channels, h w feature size, H W image size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from multidomain_cct.model.guides import Guide
from multidomain_cct.model.perturbations import Perturbation

FP16_LOSS_SCALE = 2.0**12
"""In 16-bit floats the gradients of a mean over pixels underflow unless the loss is scaled, and a GradScaler's factor is not known inside a forward pass."""


class AuxiliaryDecoder(nn.Module):
    """A decoder that sees perturbed features."""

    def __init__(self, perturbation: Perturbation, decoder: nn.Module) -> None:
        super().__init__()
        self.perturbation = perturbation
        self.decoder = decoder

    def forward(self, features: Tensor, guide: Guide) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) logits of the perturbed (B, D, h, w) features, and (B,) bool: False where nothing was left of an image's features."""
        perturbed = self.perturbation(features, guide, self.decoder)
        logits: Tensor = self.decoder(perturbed)
        return logits, (perturbed.detach() != 0).flatten(1).any(dim=1)


Terms = Callable[[Tensor, Tensor], Tensor]
"""(B, C, H, W) logits and (B,) kept -> (T,): the terms of the loss for one decoder."""


def auxiliary_losses(features: Tensor, auxiliaries: nn.ModuleList, guide: Guide, terms: Terms) -> Tensor:
    """(T,): the mean over the decoders of `terms(logits, kept)` (CCT equation 2), differentiable in the features and in the decoders' parameters."""
    if not torch.is_grad_enabled():
        return torch.stack([terms(*auxiliary(features, guide)) for auxiliary in auxiliaries]).mean(dim=0)
    parameters = [parameter for auxiliary in auxiliaries for parameter in auxiliary.parameters()]
    losses: Tensor = _EachInTurn.apply(features, auxiliaries, guide, terms, *parameters)  # type: ignore[no-untyped-call]
    return losses


class _EachInTurn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, auxiliaries: nn.ModuleList, guide: Guide, terms: Terms, *parameters: Tensor) -> Tensor:
        leaf = features.detach().requires_grad_()
        half = torch.is_autocast_enabled(features.device.type) and torch.get_autocast_dtype(features.device.type) == torch.float16
        scale = FP16_LOSS_SCALE if half else 1.0
        # Sums stay scaled, in 32 bits, until backward: taking the scale out of 16-bit numbers would flush most of them to 0.
        feature_gradients: list[Tensor] = []
        own_gradients: list[list[Tensor]] = []
        totals: Tensor | None = None
        for auxiliary in auxiliaries:
            with torch.enable_grad():
                losses = terms(*auxiliary(leaf, guide)) / len(auxiliaries)
                scaled = (losses * scale).unbind()
            if totals is None:
                totals = torch.zeros_like(losses)
                feature_gradients = [torch.zeros_like(leaf, dtype=torch.promote_types(leaf.dtype, torch.float32)) for _ in losses]
                own_gradients = [[] for _ in losses]
            for number, loss in enumerate(scaled):
                first, *rest = torch.autograd.grad(loss, [leaf, *auxiliary.parameters()], retain_graph=number < len(scaled) - 1)
                feature_gradients[number] += first
                own_gradients[number] += rest
            totals += losses.detach()
        assert totals is not None
        ctx.save_for_backward(*feature_gradients, *(gradient for term in own_gradients for gradient in term))
        ctx.scale, ctx.dtype, ctx.num_terms = scale, features.dtype, len(totals)
        return totals

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        factors = outputs[0] / ctx.scale  # (T,)
        saved = ctx.saved_tensors
        feature_gradients, rest = saved[: ctx.num_terms], saved[ctx.num_terms :]
        share = len(rest) // ctx.num_terms
        own_gradients = [rest[number * share : (number + 1) * share] for number in range(ctx.num_terms)]

        def weighted(gradients: Sequence[Tensor]) -> Tensor:
            total: Tensor = gradients[0] * factors[0]
            for gradient, factor in zip(gradients[1:], factors[1:], strict=True):
                total = total + gradient * factor
            return total

        own = (weighted(gradients) for gradients in zip(*own_gradients, strict=True))
        return (weighted(feature_gradients).to(ctx.dtype), None, None, None, *own)
