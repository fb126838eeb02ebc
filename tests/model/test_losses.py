"""Losses agree with float64 formulas; pixels and images that do not count change nothing."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from multidomain_cct.data.domain import IGNORE
from multidomain_cct.errors import UserError
from multidomain_cct.model import decoders
from multidomain_cct.model.decoders import DecoderGroup, build_decoder
from multidomain_cct.model.distances import DISTANCES
from multidomain_cct.model.losses import (
    ConsistencySettings,
    PixelLoss,
    SupervisedSettings,
    ab_threshold,
    bootstrapped_cross_entropy,
    confident,
    mean_over_valid,
    pixel_cross_entropy,
)

SEEDS = st.integers(0, 10_000)


def cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    return mean_over_valid(pixel_cross_entropy(logits, ids), ids != IGNORE)


def distance(name: str, logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    return mean_over_valid(DISTANCES[name](logits, target), valid)


def example(
    seed: int = 0, images: int = 4, classes: int = 5, size: tuple[int, int] = (6, 7)
) -> tuple[Tensor, Tensor, Tensor]:
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


def numpy_true_probability(logits: Tensor, ids: Tensor) -> np.ndarray:
    known = np.where(ids == IGNORE, 0, ids).astype(np.int64)
    return np.take_along_axis(softmax(logits.double().numpy()), known[:, None], axis=1)[:, 0]


def numpy_cross_entropy(logits: Tensor, ids: Tensor) -> float:
    return numpy_mean(-np.log(numpy_true_probability(logits, ids)), ids.numpy() != IGNORE)


def numpy_bootstrapped(logits: Tensor, ids: Tensor, threshold: float) -> float:
    true, valid = numpy_true_probability(logits, ids), ids.numpy() != IGNORE
    hardest = np.where(valid, true, 2.0).min(axis=(1, 2), keepdims=True)
    return numpy_mean(-np.log(true), valid & ((true < threshold) | (true == hardest)))


# Against float64


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, images=st.integers(1, 5), classes=st.integers(1, 7))
def test_cross_entropy_matches_float64(seed: int, images: int, classes: int) -> None:
    logits, ids, _ = example(seed, images, classes)
    expected = numpy_cross_entropy(logits, ids)
    assert cross_entropy(logits, ids).item() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert cross_entropy(logits.float(), ids).item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, classes=st.integers(1, 7), threshold=st.floats(0, 1))
def test_bootstrapped_cross_entropy_matches_float64(seed: int, classes: int, threshold: float) -> None:
    logits, ids, _ = example(seed, classes=classes)
    found = bootstrapped_cross_entropy(logits, ids, threshold)
    assert found.item() == pytest.approx(numpy_bootstrapped(logits, ids, threshold), rel=1e-12, abs=1e-12)


def test_gradients_of_cross_entropies_match_finite_differences() -> None:
    logits, ids, _ = example(images=2, classes=3, size=(2, 3))
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, ids), logits)
    assert torch.autograd.gradcheck(lambda x: bootstrapped_cross_entropy(x, ids, 0.5), logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_16_bit_logits_are_computed_in_32_bits(dtype: torch.dtype) -> None:
    logits, ids, _ = example()
    rounded = logits.to(dtype)
    for loss, expected in (
        (cross_entropy(rounded, ids), numpy_cross_entropy(rounded, ids)),
        (bootstrapped_cross_entropy(rounded, ids, 0.5), numpy_bootstrapped(rounded, ids, 0.5)),
    ):
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected, rel=1e-5)


# What all have in common

LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "ce": lambda logits, ids, target: cross_entropy(logits, ids),
    "ab_ce": lambda logits, ids, target: bootstrapped_cross_entropy(logits, ids, 0.5),
    "mse": lambda logits, ids, target: distance("mse", logits, target, ids != IGNORE),
    "kl": lambda logits, ids, target: distance("kl", logits, target, ids != IGNORE),
    "js": lambda logits, ids, target: distance("js", logits, target, ids != IGNORE),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@every_loss
@pytest.mark.parametrize("poison", [1e4, -1e4, math.inf, -math.inf, math.nan])
def test_ignored_pixels_change_neither_the_loss_nor_the_gradient_of_the_others(
    loss: Callable[..., Tensor], poison: float
) -> None:
    logits, ids, target = example()
    ignored = (ids == IGNORE)[:, None].expand_as(logits)
    results = []
    for filled, other in ((logits, target), (logits.masked_fill(ignored, poison), target.masked_fill(ignored, poison))):
        leaf = filled.clone().requires_grad_()
        total = loss(leaf, ids, other)
        results.append((total.item(), *torch.autograd.grad(total, leaf)))
    assert results[0][0] == results[1][0] > 0
    assert torch.equal(results[0][1][~ignored], results[1][1][~ignored])
    if abs(poison) == 1e4:
        assert not results[1][1][ignored].any()


@every_loss
def test_a_pixel_that_counts_and_is_nan_shows_in_the_loss(loss: Callable[..., Tensor]) -> None:
    logits, ids, target = example()
    ids[0, 0, 0], logits[0, :, 0, 0] = 1, math.nan
    assert loss(logits, ids, target).isnan()


@every_loss
def test_where_nothing_counts_the_loss_is_0_with_a_graph(loss: Callable[..., Tensor]) -> None:
    logits, _, target = example()
    logits.requires_grad_()
    found = loss(logits, torch.full((4, 6, 7), IGNORE, dtype=torch.uint8), target)
    assert found.item() == 0
    found.backward()  # type: ignore[no-untyped-call]
    assert torch.equal(logits.grad, torch.zeros_like(logits))  # type: ignore[arg-type]


@every_loss
def test_an_image_in_which_nothing_counts_contributes_0_to_the_mean_over_images(loss: Callable[..., Tensor]) -> None:
    logits, ids, target = example(images=2)
    ids[1] = IGNORE
    assert loss(logits, ids, target).item() == pytest.approx(loss(logits[:1], ids[:1], target[:1]).item() / 2)


@every_loss
@pytest.mark.parametrize("parts", [2, 4])
def test_a_batch_in_parts_of_equal_size_has_the_same_loss_and_gradient(loss: Callable[..., Tensor], parts: int) -> None:
    logits, ids, target = example()
    ids[0] = IGNORE
    ids[1, 0, 0] = 1  # images have very different numbers of valid pixels
    leaf = logits.requires_grad_()
    whole = loss(leaf, ids, target)
    slices = [slice(start, start + 4 // parts) for start in range(0, 4, 4 // parts)]
    split = torch.stack([loss(leaf[part], ids[part], target[part]) for part in slices]).mean()
    torch.testing.assert_close(split, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(split, leaf), torch.autograd.grad(whole, leaf), rtol=1e-12, atol=1e-15
    )


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_give_finite_losses_and_gradients(loss: Callable[..., Tensor], dtype: torch.dtype) -> None:
    _, ids, target = example()
    signs = torch.randint(0, 3, target.shape, generator=torch.Generator().manual_seed(0)) - 1
    certain = torch.nn.functional.one_hot(target.argmax(dim=1), 5).movedim(-1, 1)
    nearly = (200 * certain).to(dtype).softmax(dim=1)  # of which the small probabilities are no longer normal numbers
    for other in (target.to(dtype), certain.to(dtype), nearly, (90 * certain).to(dtype).softmax(dim=1)):
        for scale in (1e4, 100.0, 90.0):
            logits = (scale * signs).to(dtype).requires_grad_()
            found = loss(logits, ids, other)
            (gradient,) = torch.autograd.grad(found, logits)
            assert found.isfinite()
            assert gradient.isfinite().all()


# Confidence


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, threshold=st.floats(0, 0.99))
def test_confident_pixels_are_the_valid_ones_whose_largest_probability_reaches_the_threshold(
    seed: int, threshold: float
) -> None:
    _, ids, target = example(seed)
    valid = ids != IGNORE
    expected = valid.numpy() & (target.numpy().max(axis=1) >= threshold)
    np.testing.assert_array_equal(confident(target, valid, threshold).numpy(), expected)


@pytest.mark.parametrize("name", DISTANCES)
def test_the_mean_is_over_confident_pixels_and_without_any_it_is_0_with_a_graph(name: str) -> None:
    logits, ids, target = example()
    target = target / target.sum(dim=1, keepdim=True)
    logits.requires_grad_()
    some = confident(target, ids != IGNORE, 0.8)
    assert 0 < some.sum() < (ids != IGNORE).sum()
    pixels = DISTANCES[name](logits, target)
    assert distance(name, logits, target, some).item() == pytest.approx(
        numpy_mean(pixels.detach().numpy(), some.numpy())
    )
    flat = torch.full_like(target, 0.2)
    found = distance(name, logits, flat, confident(flat, ids != IGNORE, 0.8))
    assert found.item() == 0
    assert torch.equal(torch.autograd.grad(found, logits)[0], torch.zeros_like(logits))


def test_a_mean_over_valid_pixels_ignores_what_is_not_finite_elsewhere() -> None:
    logits, ids, _ = example()
    for poison in (math.inf, math.nan):
        pixels = logits[:, 0].masked_fill(ids == IGNORE, poison)
        assert mean_over_valid(pixels, ids != IGNORE) == mean_over_valid(logits[:, 0], ids != IGNORE)


# Annealed bootstrapped cross-entropy


@settings(max_examples=25, deadline=None)
@given(classes=st.integers(2, 150), fraction=st.floats(0.01, 1), progress=st.floats(0, 1), high=st.floats(0, 1))
def test_the_threshold_rises_from_chance_to_its_end_along_its_formula(
    classes: int, fraction: float, progress: float, high: float
) -> None:
    found = ab_threshold(SupervisedSettings(loss="ab_ce", ab_fraction=fraction, ab_high=high), classes, progress)
    rise = 1 - np.exp(-5 * progress / fraction) if progress < fraction else 1.0
    assert found == pytest.approx(1 / classes + (high - 1 / classes) * rise, abs=1e-12)


def test_the_default_threshold_starts_at_chance_and_is_nine_tenths_after_two_fifths_of_the_run() -> None:
    thresholds = [ab_threshold(SupervisedSettings(loss="ab_ce"), 5, progress) for progress in (0.0, 0.1, 0.2, 0.4, 1.0)]
    assert thresholds == sorted(thresholds)
    assert thresholds[0] == 0.2
    assert thresholds[-2:] == pytest.approx([0.9, 0.9])


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, threshold=st.floats(0, 1))
def test_ab_ce_keeps_at_least_one_pixel_of_each_image_that_has_one(seed: int, threshold: float) -> None:
    logits, ids, _ = example(seed)
    ids[1] = IGNORE
    right = torch.where(ids == IGNORE, 0, ids).long()
    logits.scatter_(1, right[:, None], 50.0)  # right everywhere with certainty
    leaf = logits.requires_grad_()
    (gradient,) = torch.autograd.grad(bootstrapped_cross_entropy(leaf, ids, threshold), leaf)
    learns = gradient.abs().sum(dim=1) > 0
    assert learns[[0, 2, 3]].flatten(1).any(dim=1).all()
    assert not learns[1].any()


def test_the_threshold_of_ab_ce_follows_the_progress_of_the_run() -> None:
    logits, ids, _ = example()
    chosen = SupervisedSettings(loss="ab_ce")
    thresholds = [ab_threshold(chosen, 5, progress) for progress in (0.0, 0.05, 1.0)]
    found = [bootstrapped_cross_entropy(logits, ids, threshold).item() for threshold in thresholds]
    assert found == pytest.approx([numpy_bootstrapped(logits, ids, threshold) for threshold in thresholds])
    assert found[0] > found[1] > found[2] > cross_entropy(logits, ids)  # the easy pixels come in later


def test_the_cross_entropy_of_an_ignored_pixel_is_0() -> None:
    logits, ids, _ = example()
    assert not pixel_cross_entropy(logits, ids)[ids == IGNORE].any()


# Settings


def test_a_weight_in_the_authors_unit_is_divided_by_the_classes() -> None:
    authors, ours = ConsistencySettings(weight=30, weight_unit="authors"), ConsistencySettings()
    assert [authors.weight_per_pixel(classes) for classes in (21, 11, 37)] == pytest.approx([30 / 21, 30 / 11, 30 / 37])
    assert ours.weight_per_pixel(11) == ours.weight_per_pixel(37) == authors.weight_per_pixel(21)
    # The authors' distance is a mean over classes as well.
    logits, ids, target = example()
    valid = torch.ones_like(ids, dtype=torch.bool)
    theirs = 30 * ((softmax(logits.numpy()) - target.numpy()) ** 2).mean()
    assert authors.weight_per_pixel(5) * distance("mse", logits, target, valid).item() == pytest.approx(theirs)


def test_the_ramp_of_the_settings_is_the_one_that_was_chosen() -> None:
    assert ConsistencySettings().ramp_at(0.05) == pytest.approx(math.exp(-5 / 4))
    assert ConsistencySettings(ramp="linear", ramp_fraction=0.4).ramp_at(0.1) == pytest.approx(0.25)
    assert ConsistencySettings(ramp="none").ramp_at(0.0) == ConsistencySettings(ramp_fraction=0).ramp_at(0.0) == 1


@pytest.mark.parametrize(
    ("kind", "settings", "key", "allowed"),
    [
        (SupervisedSettings, {"loss": "focal"}, "supervised.loss is 'focal'", "ab_ce"),
        (SupervisedSettings, {"ab_fraction": 1.5}, "supervised.ab_fraction is 1.5", "1"),
        (SupervisedSettings, {"ab_fraction": -0.1}, "supervised.ab_fraction is -0.1", "0"),
        (SupervisedSettings, {"ab_high": -0.1}, "supervised.ab_high is -0.1", "0"),
        (SupervisedSettings, {"ab_high": 1.1}, "supervised.ab_high is 1.1", "1"),
        (SupervisedSettings, {"colour": -0.1}, "supervised.colour is -0.1", "0"),
        (SupervisedSettings, {"colour": 1.1}, "supervised.colour is 1.1", "1"),
        (SupervisedSettings, {"cutmix": -0.1}, "supervised.cutmix is -0.1", "0"),
        (SupervisedSettings, {"cutmix": 1.1}, "supervised.cutmix is 1.1", "1"),
        (SupervisedSettings, {"class_weights": "equal"}, "supervised.class_weights is 'equal'", "none, balanced"),
        (SupervisedSettings, {"logit_adjustment": -0.5}, "supervised.logit_adjustment is -0.5", "0"),
        (ConsistencySettings, {"weight": -1}, "consistency.weight is -1", "0"),
        (ConsistencySettings, {"weight": math.nan}, "consistency.weight is nan", "0"),
        (ConsistencySettings, {"weak_weight": -0.5}, "consistency.weak_weight is -0.5", "0"),
        (ConsistencySettings, {"weight_unit": "class"}, "consistency.weight_unit is 'class'", "pixel, authors"),
        (ConsistencySettings, {"distance": "l1"}, "consistency.distance is 'l1'", "mse, kl, js"),
        (ConsistencySettings, {"ramp": "fast"}, "consistency.ramp is 'fast'", "exp, linear, cosine, log, none"),
        (ConsistencySettings, {"confidence": 1.0}, "consistency.confidence is 1.0", "below 1"),
        (ConsistencySettings, {"confidence": -0.1}, "consistency.confidence is -0.1", "0"),
        (ConsistencySettings, {"ramp_fraction": -0.1}, "consistency.ramp_fraction is -0.1", "0"),
        (ConsistencySettings, {"ramp_fraction": 2}, "consistency.ramp_fraction is 2", "1"),
        (ConsistencySettings, {"sample": -1}, "consistency.sample is -1", "0"),
        (ConsistencySettings, {"stride": 0}, "consistency.stride is 0", "at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(kind: type, settings: dict[str, object], key: str, allowed: str) -> None:
    with pytest.raises(UserError) as caught:
        kind(**settings)
    message = str(caught.value)
    assert message.startswith(key)
    assert allowed in message.removeprefix(key)


def test_settings_at_their_bounds_are_taken() -> None:
    for bound in (0, 1):
        SupervisedSettings(ab_fraction=bound, ab_high=bound, colour=bound, cutmix=bound, logit_adjustment=bound)
    ConsistencySettings(weight=0, confidence=0, ramp_fraction=0, sample=0, stride=1, weak_weight=0)
    ConsistencySettings(ramp_fraction=1)


@pytest.mark.parametrize("weighing", [{"class_weights": "balanced"}, {"logit_adjustment": 0.5}])
def test_classes_are_weighed_in_cross_entropy_only(weighing: dict[str, object]) -> None:
    SupervisedSettings(loss="ce", **weighing)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="go with supervised.loss=ce, not with ab_ce"):
        SupervisedSettings(loss="ab_ce", **weighing)  # type: ignore[arg-type]


# Losses of groups of decoders, in pieces


@pytest.mark.parametrize("name", ["mse", "kl", "js", "ce"])
@pytest.mark.parametrize("kind", ["pixelshuffle", "bilinear"])
@pytest.mark.parametrize("budget", [40, 200, 10**6])
def test_the_pieces_of_a_loss_add_up_to_the_sum_over_decoders(
    name: str, kind: str, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of means over images, in which an image that is zeroed for a decoder contributes 0."""
    monkeypatch.setitem(decoders.LOGITS_AT_ONCE, "cpu", budget)
    torch.manual_seed(0)
    members = [build_decoder(kind, 8, 5, 2).double() for _ in range(2)]
    group = DecoderGroup.of(members)
    features = torch.rand(2, 4, 8, 3, 4, dtype=torch.float64)
    left = torch.tensor([[True, False, True, True], [False, False, True, True]])
    _, ids, target = example(size=(6, 8))
    expected = torch.zeros((), dtype=torch.float64)
    for member, own, images in zip(members, features, left, strict=True):
        logits, counted = member(own), (ids != IGNORE) & images[:, None, None]
        pixels = pixel_cross_entropy(logits, ids) if name == "ce" else DISTANCES[name](logits, target)
        expected = expected + mean_over_valid(pixels, counted)
    value, aim = (pixel_cross_entropy, ids) if name == "ce" else (DISTANCES[name], target)
    loss = PixelLoss(value, members[0].pixels(aim), members[0].pixels(ids != IGNORE))
    coarse = group.coarse(features)
    pieces = list(group.pieces(coarse))
    assert (len(pieces) > 1) == (budget < 10**6)
    total = sum(loss.total(group.logits(coarse[:, images], part), left, images, part) for images, part in pieces)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    weights = [parameter for member in members for parameter in member.parameters()]
    both = [torch.autograd.grad(each, weights, allow_unused=True) for each in (total, expected)]
    torch.testing.assert_close(*both, rtol=1e-9, atol=1e-15)
