"""The auxiliary decoders one at a time give exactly the loss and gradients of their plain sum, and keep only gradients."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from multidomain_cct.model.consistency import AuxiliaryDecoder, consistency_loss
from multidomain_cct.model.decoders import build_decoder
from multidomain_cct.model.losses import squared_distance
from multidomain_cct.model.perturbations import Dropout, FeatureDrop, FeatureNoise

CHANNELS, CLASSES, STRIDE = 16, 3, 4


class Kept:
    """A tensor that some graph keeps for its backward pass."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def decoders(dtype: torch.dtype = torch.float64, kind: str = "pixelshuffle", copies: int = 1) -> nn.ModuleList:
    """One per perturbation, times `copies`."""
    torch.manual_seed(1)
    kinds = [FeatureNoise(), FeatureDrop(), Dropout()] * copies
    return nn.ModuleList(AuxiliaryDecoder(each, build_decoder(kind, CHANNELS, CLASSES, STRIDE)) for each in kinds).to(dtype)


def example(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Features, and the distance of logits to a target of which some pixels do not count."""
    torch.manual_seed(2)
    features = torch.rand(2, CHANNELS, 4, 5, dtype=dtype)
    target = torch.randn(2, CLASSES, 4 * STRIDE, 5 * STRIDE, dtype=dtype).mul(3).softmax(dim=1)
    valid = torch.rand(2, 4 * STRIDE, 5 * STRIDE) < 0.8
    return features, partial(squared_distance, target=target, valid=valid)


def plain_mean(features: Tensor, auxiliaries: nn.ModuleList, distance: Callable[[Tensor], Tensor]) -> Tensor:
    """CCT equation 2, all decoders at once."""
    return torch.stack([distance(auxiliary(features)) for auxiliary in auxiliaries]).mean()


def gradients(loss: Tensor, features: Tensor, auxiliaries: nn.ModuleList) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [features, *auxiliaries.parameters()]))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kind", ["pixelshuffle", "bilinear"])
def test_loss_and_gradients_equal_the_plain_sum(dtype: torch.dtype, tolerance: float, kind: str) -> None:
    auxiliaries = decoders(dtype, kind)
    features, distance = example(dtype)
    results = []
    for compute in (plain_mean, consistency_loss):
        leaf = features.clone().requires_grad_()
        torch.manual_seed(3)  # the same draws of the perturbations
        loss = compute(leaf, auxiliaries, distance)
        results.append((loss.detach(), *gradients(7 * loss, leaf, auxiliaries)))
    assert results[0][0] > 0 and all(gradient.any() for gradient in results[0][1:])
    for expected, found in zip(*results, strict=True):
        assert found.dtype == dtype
        assert (found - expected).abs().max() <= tolerance * max(1.0, expected.abs().max().item())


def test_gradients_reach_what_the_features_were_computed_from_and_add_up_with_other_losses() -> None:
    auxiliaries = decoders()
    images, distance = example()
    encoder = nn.Conv2d(CHANNELS, CHANNELS, 1).double()
    found = []
    for compute in (plain_mean, consistency_loss):
        encoder.zero_grad()
        features = encoder(images).relu()
        torch.manual_seed(3)
        (features.square().mean() + 0.5 * compute(features, auxiliaries, distance)).backward()
        found.append(encoder.weight.grad.clone())  # type: ignore[union-attr]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-15)


def test_gradients_accumulate_over_two_backward_passes() -> None:
    auxiliaries = decoders()
    features, distance = example()
    features.requires_grad_()
    sums = []
    for _ in range(2):
        torch.manual_seed(3)
        consistency_loss(features, auxiliaries, distance).backward()  # type: ignore[no-untyped-call]
        sums.append([tensor.grad.clone() for tensor in (features, *auxiliaries.parameters())])  # type: ignore[union-attr]
    torch.testing.assert_close(sums[1], [2 * first for first in sums[0]])


def test_only_the_decoders_learn_from_features_without_a_graph() -> None:
    auxiliaries = decoders()
    features, distance = example()
    consistency_loss(features, auxiliaries, distance).backward()  # type: ignore[no-untyped-call]
    assert features.grad is None and all(parameter.grad is not None for parameter in auxiliaries.parameters())


def test_a_decoders_graph_is_gone_before_the_next_ones_is_built() -> None:
    auxiliaries = decoders(copies=3)
    features, distance = example()
    kept: weakref.WeakSet[Kept] = weakref.WeakSet()
    alive: list[int] = []

    def keep(tensor: Tensor) -> Kept:
        holder = Kept(tensor)
        kept.add(holder)
        return holder

    def watched(logits: Tensor) -> Tensor:
        alive.append(sum(holder.tensor.numel() for holder in kept))
        return distance(logits)

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda holder: holder.tensor):
        consistency_loss(features.requires_grad_(), auxiliaries, watched)
    # The same three perturbations three times: the same numbers are kept each time.
    assert len(alive) == 9 and min(alive) > 0 and alive[:3] == alive[3:6] == alive[6:]


@pytest.mark.parametrize("copies", [1, 4])
def test_what_is_kept_for_backward_is_gradients_only(copies: int) -> None:
    auxiliaries = decoders(copies=copies)
    features, distance = example()
    loss = consistency_loss(features.requires_grad_(), auxiliaries, distance)
    saved = loss.grad_fn.saved_tensors  # type: ignore[union-attr]
    assert [tensor.shape for tensor in saved] == [features.shape, *(parameter.shape for parameter in auxiliaries.parameters())]
    assert not any(tensor.requires_grad for tensor in saved)


def test_without_gradients_the_loss_is_the_same_and_nothing_is_kept() -> None:
    auxiliaries = decoders()
    features, distance = example()
    torch.manual_seed(3)
    expected = consistency_loss(features.requires_grad_(), auxiliaries, distance)
    torch.manual_seed(3)
    with torch.no_grad():
        found = consistency_loss(features, auxiliaries, distance)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features_too", [False, True])
def test_autocast_gives_finite_results_close_to_32_bits(dtype: torch.dtype, features_too: bool) -> None:
    auxiliaries = decoders(torch.float32)
    features, distance = example(torch.float32)
    results = []
    for enabled in (False, True):
        leaf = (features.to(dtype) if enabled and features_too else features.clone()).requires_grad_()
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            # The draws of noise in 16 bits are others; the dropped regions and channels are the same.
            loss = consistency_loss(leaf, nn.ModuleList(list(auxiliaries)[1:]), distance)
        results.append((loss.detach(), *(gradient.float() for gradient in gradients(loss, leaf, nn.ModuleList(list(auxiliaries)[1:])))))
    assert results[1][0].dtype == torch.float32
    for expected, found in zip(*results, strict=True):
        assert found.isfinite().all()
        assert (found - expected).norm() <= 0.05 * expected.norm() + 1e-7


def test_small_gradients_do_not_vanish_in_16_bit_floats() -> None:
    torch.manual_seed(0)
    auxiliaries = nn.ModuleList([AuxiliaryDecoder(Dropout(), build_decoder("pixelshuffle", CHANNELS, CLASSES, 32))])
    features = torch.rand(1, CHANNELS, 8, 8)
    target = torch.rand(1, CLASSES, 256, 256).softmax(dim=1)
    valid = torch.ones(1, 256, 256, dtype=torch.bool)
    found = []
    for enabled in (False, True):
        leaf = features.clone().requires_grad_()
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype=torch.float16, enabled=enabled):
            # One of a thousand images: the gradient of a pixel lies below the smallest 16-bit float.
            loss = consistency_loss(leaf, auxiliaries, lambda logits: squared_distance(logits, target, valid) / 1000)
        (gradient,) = torch.autograd.grad(loss, leaf)
        found.append(gradient)
    assert (found[0] - found[1]).norm() <= 0.02 * found[0].norm()


def test_sixteen_bit_feature_gradients_do_not_vanish_or_overflow() -> None:
    """Against float64, at the outer scale a GradScaler starts with."""
    torch.manual_seed(0)
    auxiliaries = nn.ModuleList(AuxiliaryDecoder(Dropout(), nn.Conv2d(16, 21, 1)) for _ in range(6))
    features = torch.rand(4, 16, 64, 64)
    target = torch.rand(4, 21, 64, 64).softmax(dim=1)

    def gradient(leaf: Tensor, scale: float) -> Tensor:
        torch.manual_seed(1)
        valid = torch.ones(4, 64, 64, dtype=torch.bool)
        loss = consistency_loss(leaf, auxiliaries, lambda logits: squared_distance(logits, target.to(torch.promote_types(logits.dtype, torch.float32)), valid))
        (found,) = torch.autograd.grad(loss * scale, leaf)
        return found.double() / scale

    with torch.autocast("cpu", dtype=torch.float16):
        half = gradient(features.half().requires_grad_(), 65536.0)
    exact = gradient(features.clone().requires_grad_(), 1.0)
    assert torch.isfinite(half).all()
    assert (half - exact).norm() / exact.norm() < 0.02
