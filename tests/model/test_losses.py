"""Losses agree with float64 formulas; pixels and images that do not count change nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from multidomain_cct.data.domain import IGNORE
from multidomain_cct.model.losses import cross_entropy, mean_over_valid, squared_distance


def example(seed: int = 0, images: int = 4, classes: int = 5, size: tuple[int, int] = (6, 7)) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, train ids of which some are ignored, and target probabilities."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, classes, (images, *size))
    ids[rng.random(ids.shape) < 0.3] = IGNORE
    logits, other = rng.normal(0, 3, (2, images, classes, *size))
    return torch.from_numpy(logits), torch.from_numpy(ids.astype(np.uint8)), torch.from_numpy(softmax(other))


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def numpy_mean(pixels: np.ndarray, valid: np.ndarray) -> float:
    return float(np.mean([own[keep].mean() if keep.any() else 0.0 for own, keep in zip(pixels, valid, strict=True)]))


def numpy_cross_entropy(logits: Tensor, ids: Tensor) -> float:
    known = np.where(ids == IGNORE, 0, ids).astype(np.int64)
    chosen = np.take_along_axis(softmax(logits.double().numpy()), known[:, None], axis=1)[:, 0]
    return numpy_mean(-np.log(chosen), ids.numpy() != IGNORE)


def numpy_squared_distance(logits: Tensor, target: Tensor, valid: Tensor) -> float:
    return numpy_mean(((softmax(logits.double().numpy()) - target.double().numpy()) ** 2).sum(axis=1), valid.numpy())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), images=st.integers(1, 5), classes=st.integers(1, 7))
def test_losses_match_float64(seed: int, images: int, classes: int) -> None:
    logits, ids, target = example(seed, images, classes)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        own = logits.to(dtype)
        assert cross_entropy(own, ids).item() == pytest.approx(numpy_cross_entropy(logits, ids), rel=tolerance, abs=tolerance)
        distance = squared_distance(own, target.to(dtype), ids != IGNORE)
        assert distance.dtype == dtype
        assert distance.item() == pytest.approx(numpy_squared_distance(logits, target, ids != IGNORE), rel=tolerance, abs=tolerance)


def test_gradients_match_finite_differences() -> None:
    logits, ids, target = example(images=2, classes=3, size=(2, 3))
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, ids), logits)
    assert torch.autograd.gradcheck(lambda x: squared_distance(x, target, ids != IGNORE), logits)


@pytest.mark.parametrize("poison", [1e4, math.inf, math.nan])
def test_ignored_pixels_change_neither_loss_nor_gradient(poison: float) -> None:
    logits, ids, target = example()
    ignored = (ids == IGNORE)[:, None].expand_as(logits)
    results = []
    for filled in (logits, logits.masked_fill(ignored, 1e4)):
        leaf = filled.clone().requires_grad_()
        total = cross_entropy(leaf, ids) + squared_distance(leaf, target, ids != IGNORE)
        results.append((total.item(), *torch.autograd.grad(total, leaf)))
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])
    assert not results[0][1][ignored].any()
    pixels = logits[:, 0].masked_fill(ids == IGNORE, poison)
    assert mean_over_valid(pixels, ids != IGNORE) == mean_over_valid(logits[:, 0], ids != IGNORE)


def test_where_nothing_counts_the_loss_is_0_with_a_graph() -> None:
    logits, _, target = example()
    logits.requires_grad_()
    nothing = torch.full((4, 6, 7), IGNORE, dtype=torch.uint8)
    for loss in (cross_entropy(logits, nothing), squared_distance(logits, target, nothing != IGNORE)):
        assert loss.item() == 0
        (gradient,) = torch.autograd.grad(loss, logits)
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_an_image_in_which_nothing_counts_contributes_0_to_the_mean_over_images() -> None:
    logits, ids, target = example(images=2)
    ids[1] = IGNORE
    assert cross_entropy(logits, ids).item() == pytest.approx(cross_entropy(logits[:1], ids[:1]).item() / 2)
    valid = ids != IGNORE
    assert squared_distance(logits, target, valid).item() == pytest.approx(squared_distance(logits[:1], target[:1], valid[:1]).item() / 2)


def test_squared_distance_lies_between_0_and_2() -> None:
    ids = torch.arange(4).view(1, 2, 2)
    certain = torch.nn.functional.one_hot(ids, 4).permute(0, 3, 1, 2).double()
    valid = torch.ones(1, 2, 2, dtype=torch.bool)
    assert squared_distance(100 * certain, certain, valid).item() == pytest.approx(0)
    assert squared_distance(100 * certain, certain.roll(1, dims=1), valid).item() == pytest.approx(2)


def test_squared_distance_sums_over_classes_so_that_more_classes_do_not_weigh_less() -> None:
    logits, ids, target = example(classes=4)
    # Six more classes that neither side believes in.
    none = torch.full((4, 6, 6, 7), -1e4, dtype=torch.float64)
    more = squared_distance(torch.cat([logits, none], dim=1), torch.cat([target, torch.zeros_like(none)], dim=1), ids != IGNORE)
    assert more.item() == pytest.approx(squared_distance(logits, target, ids != IGNORE).item())


@pytest.mark.parametrize("parts", [2, 4])
def test_a_batch_in_parts_of_equal_size_has_the_same_loss_and_gradient(parts: int) -> None:
    logits, ids, target = example()
    ids[0] = IGNORE
    ids[1, 0, 0] = 1  # images have very different numbers of valid pixels
    leaf = logits.requires_grad_()

    def loss(part: slice) -> Tensor:
        return cross_entropy(leaf[part], ids[part]) + squared_distance(leaf[part], target[part], ids[part] != IGNORE)

    whole = loss(slice(None))
    split = torch.stack([loss(slice(start, start + 4 // parts)) for start in range(0, 4, 4 // parts)]).mean()
    torch.testing.assert_close(split, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(split, leaf), torch.autograd.grad(whole, leaf), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_16_bit_logits_are_computed_in_32_bits(dtype: torch.dtype) -> None:
    logits, ids, target = example()
    rounded = logits.to(dtype)
    entropy, distance = cross_entropy(rounded, ids), squared_distance(rounded, target.float(), ids != IGNORE)
    assert entropy.dtype == distance.dtype == torch.float32
    assert entropy.item() == pytest.approx(numpy_cross_entropy(rounded, ids), rel=1e-5)
    assert distance.item() == pytest.approx(numpy_squared_distance(rounded, target, ids != IGNORE), rel=1e-5)
