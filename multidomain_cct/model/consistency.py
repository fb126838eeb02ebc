"""The K auxiliary decoders of a domain, one at a time.

Their logits never exist all at once: for each decoder in turn the loss and, in the same forward pass, its gradients with respect to the features and to that
decoder are computed and only these are kept. Backward scales them. The result is exact, and memory does not grow with K.

Shapes: B images, C classes, D feature channels, h w feature size, H W image size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from multidomain_cct.model.perturbations import Perturbation

FP16_LOSS_SCALE = 2.0**12
"""In 16-bit floats the gradients of a mean over pixels underflow unless the loss is scaled, and a GradScaler's factor is not known inside a forward pass."""


class AuxiliaryDecoder(nn.Module):
    """A decoder that sees perturbed features."""

    def __init__(self, perturbation: Perturbation, decoder: nn.Module) -> None:
        super().__init__()
        self.perturbation = perturbation
        self.decoder = decoder

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W) logits of the perturbed (B, D, h, w) features."""
        logits: Tensor = self.decoder(self.perturbation(features))
        return logits


def consistency_loss(features: Tensor, auxiliaries: nn.ModuleList, distance: Callable[[Tensor], Tensor]) -> Tensor:
    """Scalar: the mean over the decoders of `distance(logits)` (CCT equation 2), differentiable in the features and in the decoders' parameters."""
    if not torch.is_grad_enabled():
        return torch.stack([distance(auxiliary(features)) for auxiliary in auxiliaries]).mean()
    parameters = [parameter for auxiliary in auxiliaries for parameter in auxiliary.parameters()]
    loss: Tensor = _EachInTurn.apply(features, auxiliaries, distance, *parameters)  # type: ignore[no-untyped-call]
    return loss


class _EachInTurn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, auxiliaries: nn.ModuleList, distance: Callable[[Tensor], Tensor], *parameters: Tensor) -> Tensor:
        leaf = features.detach().requires_grad_()
        half = torch.is_autocast_enabled(features.device.type) and torch.get_autocast_dtype(features.device.type) == torch.float16
        scale = FP16_LOSS_SCALE if half else 1.0
        # Sums stay scaled, in 32 bits, until backward: taking the scale out of 16-bit numbers would flush most of them to 0.
        feature_gradient = torch.zeros_like(features, dtype=torch.promote_types(features.dtype, torch.float32))
        gradients: list[Tensor] = []
        total = features.new_zeros((), dtype=torch.float32 if features.itemsize < 4 else features.dtype)
        for auxiliary in auxiliaries:
            with torch.enable_grad():
                loss = distance(auxiliary(leaf)) / len(auxiliaries)
                first, *rest = torch.autograd.grad(loss * scale, [leaf, *auxiliary.parameters()])
            feature_gradient += first
            gradients += rest
            total += loss.detach()
        ctx.save_for_backward(feature_gradient, *gradients)
        ctx.scale, ctx.dtype = scale, features.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        factor = outputs[0] / ctx.scale
        feature_gradient, *gradients = ctx.saved_tensors
        return ((feature_gradient * factor).to(ctx.dtype), None, None, *(gradient * factor for gradient in gradients))
