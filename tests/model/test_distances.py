"""Distances per pixel agree with float64 formulas, keep their bounds and are sums over classes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from multidomain_cct.model.distances import DISTANCES, jensen_shannon, kl_divergence, squared_distance

SEEDS = st.integers(0, 10_000)
every_distance = pytest.mark.parametrize("name", DISTANCES)


def example(seed: int = 0, images: int = 2, classes: int = 5, size: tuple[int, int] = (6, 7)) -> tuple[Tensor, Tensor]:
    """Logits, and those of the target."""
    logits, other = np.random.default_rng(seed).normal(0, 3, (2, images, classes, *size))
    return torch.from_numpy(logits), torch.from_numpy(other)


def numpy_softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def numpy_kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return (p * np.log(p / q)).sum(axis=1)


def numpy_distance(name: str, logits: Tensor, target: Tensor) -> np.ndarray:
    q, p = numpy_softmax(logits.double().numpy()), target.double().numpy()
    return {
        "mse": ((q - p) ** 2).sum(axis=1),
        "kl": numpy_kl(p, q),
        "js": (numpy_kl(q, (q + p) / 2) + numpy_kl(p, (q + p) / 2)) / 2,
    }[name]


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, images=st.integers(1, 5), classes=st.integers(1, 7))
def test_distances_match_float64(seed: int, images: int, classes: int) -> None:
    logits, other = example(seed, images, classes)
    target = other.softmax(dim=1)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        for name, distance in DISTANCES.items():
            pixels = distance(logits.to(dtype), target.to(dtype))
            assert pixels.dtype == dtype
            np.testing.assert_allclose(pixels, numpy_distance(name, logits, target), rtol=tolerance, atol=tolerance)


@every_distance
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_distances_of_16_bit_logits_are_computed_in_32_bits(name: str, dtype: torch.dtype) -> None:
    logits, other = example()
    rounded, target = logits.to(dtype), other.softmax(dim=1).float()
    pixels = DISTANCES[name](rounded, target)
    assert pixels.dtype == torch.float32
    np.testing.assert_allclose(pixels, numpy_distance(name, rounded, target), rtol=1e-4, atol=1e-6)


@every_distance
def test_gradients_match_finite_differences(name: str) -> None:
    logits, other = example(classes=3, size=(2, 3))
    target = other.softmax(dim=1)
    assert torch.autograd.gradcheck(lambda x: DISTANCES[name](x, target), logits.requires_grad_())


@every_distance
def test_decoders_of_a_group_share_the_target(name: str) -> None:
    first, second = example()
    target = second.roll(1, dims=2).softmax(dim=1)
    together = DISTANCES[name](torch.stack([first, second]), target)
    alone = torch.stack([DISTANCES[name](logits, target) for logits in (first, second)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(seed=SEEDS, classes=st.integers(1, 6), sharpness=st.sampled_from([0.1, 1.0, 10.0, 1000.0]))
def test_distances_keep_their_bounds(seed: int, classes: int, sharpness: float) -> None:
    logits, other = (sharpness * maps for maps in example(seed, classes=classes))
    squares, kl, js = (distance(logits, other.softmax(dim=1)) for distance in DISTANCES.values())
    assert squares.min() >= 0
    assert squares.max() <= 2
    assert kl.min() >= -1e-12
    assert js.min() >= -1e-12
    assert js.max() <= math.log(2) + 1e-12


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, sharpness=st.sampled_from([0.1, 1.0, 30.0]))
def test_js_is_symmetric_and_kl_is_not(seed: int, sharpness: float) -> None:
    logits, other = (sharpness * maps for maps in example(seed))
    for distance, symmetric in ((jensen_shannon, True), (kl_divergence, False)):
        there, back = distance(logits, other.softmax(dim=1)), distance(other, logits.softmax(dim=1))
        assert torch.allclose(there, back, rtol=1e-9, atol=1e-12) == symmetric


@every_distance
@pytest.mark.parametrize("sharpness", [1.0, 1e4])
def test_distances_of_equal_predictions_are_0_and_teach_nothing(name: str, sharpness: float) -> None:
    logits = (sharpness * example()[0]).requires_grad_()
    pixels = DISTANCES[name](logits, logits.detach().softmax(dim=1))
    assert pixels.abs().max() < 1e-12
    assert torch.autograd.grad(pixels.sum(), logits)[0].abs().max() < 1e-12


def test_predictions_that_are_certain_of_different_classes_are_as_far_apart_as_can_be() -> None:
    certain = torch.nn.functional.one_hot(torch.arange(4).view(1, 2, 2), 4).permute(0, 3, 1, 2).double()
    other = certain.roll(1, dims=1)
    everywhere = torch.ones(1, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(squared_distance(100 * certain, other), 2 * everywhere)
    torch.testing.assert_close(jensen_shannon(100 * certain, other), math.log(2) * everywhere)
    torch.testing.assert_close(kl_divergence(100 * certain, other), 100 * everywhere)  # it has no bound


@every_distance
def test_more_classes_do_not_weigh_less(name: str) -> None:
    logits, other = example(classes=4)
    target = other.softmax(dim=1)
    # Six more classes that neither side believes in.
    none = torch.full((2, 6, 6, 7), -1e4, dtype=torch.float64)
    more = DISTANCES[name](torch.cat([logits, none], dim=1), torch.cat([target, torch.zeros_like(none)], dim=1))
    torch.testing.assert_close(more, DISTANCES[name](logits, target), rtol=1e-6, atol=1e-12)
