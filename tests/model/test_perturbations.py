"""The perturbations are what METHOD.md defines, each image on its own, and gradients flow through them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from multidomain_cct.model.perturbations import Dropout, FeatureDrop, FeatureNoise, Perturbation, Perturbations

KINDS: list[Perturbation] = [FeatureNoise(), FeatureDrop(), FeatureDrop(mode="quantile"), Dropout()]


def random_features(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Positive, as a trunk that ends in a ReLU gives them, and nowhere 0."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).add(0.1).to(dtype)


def peaked_features(images: int) -> Tensor:
    """(B, 4, 16, 16) with one bright spot, the same in every image."""
    rows = torch.arange(16, dtype=torch.float64)
    spot = torch.exp(-((rows[:, None] - 5) ** 2 + (rows - 9) ** 2) / 20)
    return spot.expand(images, 4, 16, 16).clone()


def seeded(kind: Perturbation, features: Tensor, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return kind(features)


# What all have in common


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_features_keep_shape_and_precision(kind: Perturbation, dtype: torch.dtype) -> None:
    features = random_features(2, 6, 5, 7, dtype=dtype)
    before = features.clone()
    perturbed = seeded(kind, features)
    assert perturbed.shape == features.shape and perturbed.dtype == dtype
    assert not torch.equal(perturbed, features) and torch.equal(features, before)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_each_image_of_a_batch_is_perturbed_on_its_own(kind: Perturbation) -> None:
    perturbed = seeded(kind, random_features(1, 32, 8, 8).repeat(3, 1, 1, 1))
    assert not torch.equal(perturbed[0], perturbed[1]) and not torch.equal(perturbed[1], perturbed[2])


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_generators_seed_fixes_the_draw(kind: Perturbation) -> None:
    features = random_features(2, 32, 8, 8)
    assert torch.equal(seeded(kind, features, 1), seeded(kind, features, 1))
    assert not torch.equal(seeded(kind, features, 1), seeded(kind, features, 2))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_gradient_is_the_factor_that_was_applied(kind: Perturbation) -> None:
    features = random_features(2, 6, 5, 7).requires_grad_()
    perturbed = seeded(kind, features)
    (gradient,) = torch.autograd.grad(perturbed.sum(), features)
    torch.testing.assert_close(gradient, (perturbed / features).detach(), rtol=1e-12, atol=1e-12)
    assert gradient.any()


# Noise


@pytest.mark.parametrize("amplitude", [0.3, 0.05])
def test_noise_is_uniform_within_its_amplitude_and_in_proportion_to_the_features(amplitude: float) -> None:
    features = random_features(4, 32, 16, 16)
    noise = (seeded(FeatureNoise(amplitude=amplitude), features) / features - 1).numpy()
    assert np.abs(noise).max() <= amplitude + 1e-12
    counts, _ = np.histogram(noise, bins=10, range=(-amplitude, amplitude))
    assert counts.min() > 0.95 * noise.size / 10 and counts.max() < 1.05 * noise.size / 10


def test_noise_leaves_silent_features_silent() -> None:
    assert not seeded(FeatureNoise(), torch.zeros(1, 2, 3, 3)).any()


# Dropped regions


@pytest.mark.parametrize("fraction", [0.6, 0.75, 0.9])
def test_feature_drop_zeroes_what_exceeds_its_fraction_of_the_images_own_maximum(fraction: float) -> None:
    features = random_features(3, 5, 6, 7)
    features[1] *= 10
    dropped = seeded(FeatureDrop(low=fraction, high=fraction), features).numpy()
    z = features.numpy()
    activity = z.mean(axis=1)
    threshold = np.float32(fraction) * activity.max(axis=(1, 2))
    expected = z * (activity <= threshold[:, None, None])[:, None]
    np.testing.assert_array_equal(dropped, expected)
    assert (dropped == 0).any()


def test_feature_drop_draws_its_fraction_of_the_maximum_for_each_image_between_low_and_high() -> None:
    features = peaked_features(200)
    kept = seeded(FeatureDrop(low=0.6, high=0.9), features)[:, 0] > 0
    activity = features[:, 0].where(kept, 0).amax(dim=(1, 2)) / features[0, 0].max()  # of the most active position kept
    lowest = features[:, 0].where(~kept, 9).amin(dim=(1, 2)) / features[0, 0].max()  # of the least active position dropped
    assert (activity <= 0.9).all() and (lowest >= 0.6).all() and (activity < lowest).all()
    assert activity.min() < 0.65 and activity.max() > 0.8


def test_feature_drop_takes_whole_positions() -> None:
    gone = seeded(FeatureDrop(), random_features(3, 5, 8, 8)) == 0
    assert torch.equal(gone.any(dim=1), gone.all(dim=1)) and gone.any()


def test_a_fraction_of_the_maximum_is_no_fraction_of_the_area_which_quantile_is() -> None:
    features = 1 + 0.1 * random_features(300, 8, 20, 20)  # without structure
    by_max = (seeded(FeatureDrop(), features)[:, 0] == 0).double().mean(dim=(1, 2))
    assert by_max.min() > 0.95
    share = (seeded(FeatureDrop(mode="quantile"), features)[:, 0] == 0).double().mean(dim=(1, 2)).numpy()
    assert share.min() >= 0.1 - 1 / 400 and share.max() <= 0.4
    assert share.min() < 0.13 and share.max() > 0.37 and abs(share.mean() - 0.25) < 0.02


@pytest.mark.parametrize("area", [0.1, 0.25, 0.4, 1.0])
def test_quantile_drops_the_most_active_positions(area: float) -> None:
    features = random_features(2, 5, 6, 7)
    dropped = seeded(FeatureDrop(mode="quantile", area_low=area, area_high=area), features)
    activity = features.mean(dim=1).float().numpy().reshape(2, -1)
    order = np.argsort(-activity, axis=1)[:, : min(int(np.float32(area) * 42), 41)]  # the least active position always stays
    expected = np.zeros((2, 42), dtype=bool)
    np.put_along_axis(expected, order, True, axis=1)
    np.testing.assert_array_equal((dropped[:, 0] == 0).numpy().reshape(2, -1), expected)


@pytest.mark.parametrize("mode", ["max", "quantile"])
def test_features_that_are_equal_everywhere_lose_nothing_more_than_the_rule_says(mode: str) -> None:
    flat = torch.ones(2, 3, 4, 4)
    dropped = seeded(FeatureDrop(mode=mode), flat)
    # Every position is the maximum: all exceed a fraction of it, and none is more active than another.
    assert not dropped.any() if mode == "max" else torch.equal(dropped, flat)
    assert torch.equal(seeded(FeatureDrop(mode=mode), torch.zeros(2, 3, 4, 4)), torch.zeros(2, 3, 4, 4))


# Dropped channels


@pytest.mark.parametrize("probability", [0.5, 0.2])
def test_dropout_zeroes_whole_channels_at_its_rate_and_rescales_the_rest(probability: float) -> None:
    features = random_features(16, 256, 2, 2)
    factor = (seeded(Dropout(probability=probability), features) / features).numpy()
    assert np.ptp(factor, axis=(2, 3)).max() < 1e-12
    channels = factor[:, :, 0, 0]
    np.testing.assert_allclose(np.unique(channels.round(9)), [0, 1 / (1 - probability)], atol=1e-8)
    assert abs((channels == 0).mean() - probability) < 0.03


# Settings


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (FeatureNoise, {"amplitude": 0.0}, "perturbations.feature_noise.amplitude is 0.0; it is above 0."),
        (FeatureNoise, {"amplitude": float("nan")}, "perturbations.feature_noise.amplitude is nan; it is above 0."),
        (FeatureNoise, {"count": -1}, "perturbations.feature_noise.count is -1; it is 0 or more."),
        (FeatureDrop, {"mode": "area"}, "perturbations.feature_drop.mode is 'area'; it is `max` or `quantile`."),
        (FeatureDrop, {"low": 0.95}, "perturbations.feature_drop has the range 0.95 to 0.9; both lie in 0 to 1, the smaller one first."),
        (FeatureDrop, {"area_high": 1.5}, "perturbations.feature_drop has the range 0.1 to 1.5; both lie in 0 to 1, the smaller one first."),
        (FeatureDrop, {"count": -2}, "perturbations.feature_drop.count is -2; it is 0 or more."),
        (Dropout, {"probability": 1.0}, "perturbations.dropout.probability is 1.0; it lies between 0 and 1."),
        (Dropout, {"probability": 0.0}, "perturbations.dropout.probability is 0.0; it lies between 0 and 1."),
        (Dropout, {"count": -1}, "perturbations.dropout.count is -1; it is 0 or more."),
    ],
)
def test_settings_that_cannot_be_are_refused(kind: type, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        kind(**settings)
    assert str(caught.value) == message


def test_the_mix_has_one_entry_per_auxiliary_decoder() -> None:
    assert len(Perturbations().each()) == 18  # 6 of each, as the authors
    mix = Perturbations(FeatureNoise(count=2), FeatureDrop(count=0), Dropout(count=1, probability=0.3))
    assert mix.each() == [mix.feature_noise, mix.feature_noise, mix.dropout]
    assert Perturbations(FeatureNoise(count=0), FeatureDrop(count=0), Dropout(count=0)).each() == []
