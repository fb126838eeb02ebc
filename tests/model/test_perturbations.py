"""The perturbations are what METHOD.md defines, each image on its own, and gradients flow through them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from multidomain_cct.errors import UserError
from multidomain_cct.model.auxiliary import AuxiliaryDecoder, auxiliary_losses
from multidomain_cct.model.decoders import Decoder, DecoderGroup, build_decoder
from multidomain_cct.model.distances import squared_distance
from multidomain_cct.model.losses import PixelLoss
from multidomain_cct.model.object_masks import ObjectMasks
from multidomain_cct.model.perturbations import (
    AdversarialNoise,
    ContextMask,
    Dropout,
    FeatureDrop,
    FeatureNoise,
    GuidedCutout,
    ObjectMask,
    Perturbation,
    Perturbations,
)

RANDOM: list[Perturbation] = [
    FeatureNoise(),
    FeatureDrop(),
    FeatureDrop(mode="quantile"),
    Dropout(),
    GuidedCutout(min_area=1),
    AdversarialNoise(),
]
KINDS: list[Perturbation] = [*RANDOM, ObjectMask(), ContextMask(), AdversarialNoise(eps=2.0)]
FACTORS = [kind for kind in KINDS if not isinstance(kind, AdversarialNoise)]
"""Those that multiply the features."""


def random_features(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Positive, as a backbone that ends in a ReLU gives them, and nowhere 0."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).add(0.1).to(dtype)


def peaked_features(images: int) -> Tensor:
    """(B, 4, 16, 16) with one bright spot, the same in every image."""
    rows = torch.arange(16, dtype=torch.float64)
    spot = torch.exp(-((rows[:, None] - 5) ** 2 + (rows - 9) ** 2) / 20)
    return spot.expand(images, 4, 16, 16).clone()


def one_block(features: Tensor) -> ObjectMasks:
    """In every image an object in the left two thirds of the upper half."""
    masks = torch.zeros(len(features), 1, *features.shape[2:], dtype=torch.bool)
    masks[..., : features.shape[2] // 2 + 1, : features.shape[3] * 2 // 3] = True
    return ObjectMasks(masks)


def linear_decoder(features: Tensor, classes: int = 4, seed: int = 11) -> Decoder:
    """In the precision that it would have in training beside such features."""
    torch.manual_seed(seed)
    dtype = torch.promote_types(features.dtype, torch.float32)
    return build_decoder("bilinear", features.shape[1], classes, 1).to(dtype)


def seeded(
    kind: Perturbation,
    features: Tensor,
    seed: int = 0,
    *,
    objects: ObjectMasks | None = None,
    decoder: Decoder | None = None,
) -> Tensor:
    """(B, D, h, w): the features as the perturbation changes them for one decoder."""
    group = DecoderGroup.of([decoder or linear_decoder(features)])
    torch.manual_seed(seed)
    return kind(features, objects or one_block(features), group)[0]


# What all have in common


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_features_keep_shape_and_precision(kind: Perturbation, dtype: torch.dtype) -> None:
    features = random_features(2, 6, 5, 7, dtype=dtype)
    before = features.clone()
    perturbed = seeded(kind, features)
    assert perturbed.shape == features.shape
    assert perturbed.dtype == dtype
    assert not torch.equal(perturbed, features)
    assert torch.equal(features, before)


@pytest.mark.parametrize("kind", RANDOM, ids=str)
def test_each_image_of_a_batch_is_perturbed_on_its_own(kind: Perturbation) -> None:
    perturbed = seeded(kind, random_features(1, 32, 12, 12).repeat(3, 1, 1, 1))
    assert not torch.equal(perturbed[0], perturbed[1])
    assert not torch.equal(perturbed[1], perturbed[2])


@pytest.mark.parametrize("kind", RANDOM, ids=str)
def test_the_generators_seed_fixes_the_draw(kind: Perturbation) -> None:
    features = random_features(2, 32, 12, 12)
    assert torch.equal(seeded(kind, features, 1), seeded(kind, features, 1))
    assert not torch.equal(seeded(kind, features, 1), seeded(kind, features, 2))


@pytest.mark.parametrize("kind", [ObjectMask(), ContextMask()], ids=str)
def test_masks_draw_nothing_at_random(kind: Perturbation) -> None:
    features = random_features(2, 3, 5, 5)
    assert torch.equal(seeded(kind, features, 1), seeded(kind, features, 2))
    group = DecoderGroup.of([linear_decoder(features)])
    state = torch.random.get_rng_state()
    kind(features, one_block(features), group)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("kind", FACTORS, ids=str)
def test_the_gradient_is_the_factor_that_was_applied(kind: Perturbation) -> None:
    features = random_features(2, 6, 5, 7).requires_grad_()
    perturbed = seeded(kind, features)
    (gradient,) = torch.autograd.grad(perturbed.sum(), features)
    torch.testing.assert_close(gradient, (perturbed / features).detach(), rtol=1e-12, atol=1e-12)
    assert gradient.any()


@pytest.mark.parametrize("kind", FACTORS, ids=str)
def test_gradients_match_finite_differences(kind: Perturbation) -> None:
    features = random_features(2, 3, 4, 4).requires_grad_()
    objects, decoder = one_block(features), linear_decoder(features)
    assert torch.autograd.gradcheck(lambda z: seeded(kind, z, objects=objects, decoder=decoder), features)


@pytest.mark.parametrize("kind", RANDOM, ids=str)
def test_each_decoder_of_a_group_sees_its_own_draw(kind: Perturbation) -> None:
    features = random_features(2, 32, 12, 12)
    perturbed = kind(features, one_block(features), DecoderGroup.of([linear_decoder(features)] * 3))
    assert perturbed.shape == (3, *features.shape)
    assert not torch.equal(perturbed[0], perturbed[1])
    assert not torch.equal(perturbed[1], perturbed[2])


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_group_is_perturbed_as_its_decoders_in_turn(kind: Perturbation) -> None:
    features = random_features(2, 8, 5, 6)
    decoders = [linear_decoder(features, seed=seed) for seed in range(3)]
    torch.manual_seed(0)
    together = kind(features, one_block(features), DecoderGroup.of(decoders))
    torch.manual_seed(0)
    in_turn = [kind(features, one_block(features), DecoderGroup.of([decoder]))[0] for decoder in decoders]
    torch.testing.assert_close(together, torch.stack(in_turn), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 1)])
def test_maps_of_any_size_are_perturbed(kind: Perturbation, size: tuple[int, int]) -> None:
    features = random_features(2, 6, *size)
    assert seeded(kind, features).isfinite().all()


# Noise


@pytest.mark.parametrize("amplitude", [0.3, 0.05])
def test_noise_is_uniform_within_its_amplitude_and_in_proportion_to_the_features(amplitude: float) -> None:
    features = random_features(4, 32, 16, 16)
    noise = (seeded(FeatureNoise(amplitude=amplitude), features) / features - 1).numpy()
    assert np.abs(noise).max() <= amplitude + 1e-12
    counts, _ = np.histogram(noise, bins=10, range=(-amplitude, amplitude))
    assert counts.min() > 0.95 * noise.size / 10
    assert counts.max() < 1.05 * noise.size / 10


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
    lowest = (
        features[:, 0].where(~kept, 9).amin(dim=(1, 2)) / features[0, 0].max()
    )  # of the least active position dropped
    assert (activity <= 0.9).all()
    assert (lowest >= 0.6).all()
    assert (activity < lowest).all()
    assert activity.min() < 0.65
    assert activity.max() > 0.8


def test_feature_drop_takes_whole_positions() -> None:
    gone = seeded(FeatureDrop(), random_features(3, 5, 8, 8)) == 0
    assert torch.equal(gone.any(dim=1), gone.all(dim=1))
    assert gone.any()


def test_a_fraction_of_the_maximum_is_no_fraction_of_the_area_which_quantile_is() -> None:
    features = 1 + 0.1 * random_features(300, 8, 20, 20)  # without structure
    by_max = (seeded(FeatureDrop(), features)[:, 0] == 0).double().mean(dim=(1, 2))
    assert by_max.min() > 0.95
    share = (seeded(FeatureDrop(mode="quantile"), features)[:, 0] == 0).double().mean(dim=(1, 2)).numpy()
    assert share.min() >= 0.1 - 1 / 400
    assert share.max() <= 0.4
    assert share.min() < 0.13
    assert share.max() > 0.37
    assert abs(share.mean() - 0.25) < 0.02


@pytest.mark.parametrize("area", [0.1, 0.25, 0.4, 1.0])
def test_quantile_drops_the_most_active_positions(area: float) -> None:
    features = random_features(2, 5, 6, 7)
    dropped = seeded(FeatureDrop(mode="quantile", area_low=area, area_high=area), features)
    activity = features.mean(dim=1).float().numpy().reshape(2, -1)
    order = np.argsort(-activity, axis=1)[
        :, : min(int(np.float32(area) * 42), 41)
    ]  # the least active position always stays
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


def test_dropout_takes_other_channels_from_each_image() -> None:
    dropped = (seeded(Dropout(), random_features(8, 64, 2, 2))[:, :, 0, 0] == 0).numpy()
    agreement = [(dropped[a] == dropped[b]).mean() for a in range(8) for b in range(a)]
    assert max(agreement) < 0.8
    assert abs(np.mean(agreement) - 0.5) < 0.05


# Masks


def test_object_and_context_masks_complement_each_other() -> None:
    features = random_features(3, 5, 6, 7)
    masks = torch.rand(3, 1, 6, 7, generator=torch.Generator().manual_seed(1)) < 0.4
    context, things = (seeded(kind, features, objects=ObjectMasks(masks)) for kind in (ObjectMask(), ContextMask()))
    assert torch.equal(context + things, features)
    np.testing.assert_array_equal(things.numpy(), features.numpy() * masks.numpy())


def test_without_objects_the_object_mask_changes_nothing_and_the_context_mask_leaves_nothing() -> None:
    features = random_features(2, 5, 4, 4)
    objects = ObjectMasks(torch.zeros(2, 1, 4, 4, dtype=torch.bool))
    assert torch.equal(seeded(ObjectMask(), features, objects=objects), features)
    assert not seeded(ContextMask(), features, objects=objects).any()


# Guided cutout


def separate_objects(seed: int) -> tuple[Tensor, list[tuple[int, int, int, int, int, int]]]:
    """(2, 1, 24, 36) objects, crosses in boxes that do not touch; image, top, bottom, left, right and area of each."""
    rng = np.random.default_rng(seed)
    objects, boxes = np.zeros((2, 1, 24, 36), dtype=bool), []
    for image, row, column in np.ndindex(2, 2, 3):
        height, width = rng.integers(1, 11, 2)
        top, left = row * 12 + rng.integers(0, 12 - height), column * 12 + rng.integers(0, 12 - width)
        own = np.zeros((height, width), dtype=bool)
        own[height // 2] = own[:, width // 2] = True
        objects[image, 0, top : top + height, left : left + width] = own
        boxes.append((image, int(top), int(top + height), int(left), int(left + width), int(own.sum())))
    return torch.from_numpy(objects), boxes


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), side=st.sampled_from([0.2, 0.4, 0.5, 1.0]), min_area=st.integers(1, 12))
def test_one_rectangle_of_the_stated_sides_is_cut_from_the_box_of_each_large_object_and_nothing_else(
    seed: int, side: float, min_area: int
) -> None:
    objects, boxes = separate_objects(seed)
    features = torch.ones(2, 3, 24, 36)
    kept = seeded(GuidedCutout(side=side, min_area=min_area), features, seed, objects=ObjectMasks(objects))
    assert torch.equal(kept, kept[:, :1].expand_as(kept))
    gone = kept[:, 0].numpy() == 0
    for image, top, bottom, left, right, area in boxes:
        inside = gone[image, top:bottom, left:right]
        rows, columns = inside.any(axis=1).nonzero()[0], inside.any(axis=0).nonzero()[0]
        if area < min_area:
            assert not inside.any()
        else:
            assert np.ptp(rows) + 1 == max(1, round(side * (bottom - top)))
            assert np.ptp(columns) + 1 == max(1, round(side * (right - left)))
            assert inside[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()
            assert inside.sum() == len(rows) * len(columns)
        gone[image, top:bottom, left:right] = False
    assert not gone.any()


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), density=st.floats(0.05, 0.8), min_area=st.integers(1, 6))
def test_of_objects_in_each_others_boxes_no_more_is_cut_than_their_rectangles(
    seed: int, density: float, min_area: int
) -> None:
    objects = torch.rand(2, 1, 12, 13, generator=torch.Generator().manual_seed(seed)) < density
    blocks = ObjectMasks(objects)
    gone = seeded(GuidedCutout(min_area=min_area), torch.ones(2, 1, 12, 13), seed, objects=blocks)[:, 0] == 0
    allowed, most, least = torch.zeros_like(gone), 0, 0
    regions = blocks.regions
    for image, area, top, left, bottom, right in zip(
        *(part.tolist() for part in (regions.image, regions.area, *regions.start, *regions.end)), strict=True
    ):
        if area >= min_area:
            allowed[image, top:bottom, left:right] = True
            cut = max(1, round(0.4 * (bottom - top))) * max(1, round(0.4 * (right - left)))
            most, least = most + cut, max(least, cut)
    assert not (gone & ~allowed).any()
    assert least <= gone.sum() <= most


def test_every_place_in_the_box_is_reached_about_as_often() -> None:
    objects = torch.zeros(4000, 1, 9, 9, dtype=torch.bool)
    objects[:, :, 1:6, 2:8] = True  # a box of 5x6, a rectangle of 2x2
    gone = seeded(GuidedCutout(), torch.ones(4000, 1, 9, 9), objects=ObjectMasks(objects))[:, 0] == 0
    firsts = gone.flatten(1).int().argmax(dim=1)
    places, counts = firsts.unique(return_counts=True)
    assert {divmod(place, 9) for place in places.tolist()} == {
        (row, column) for row in range(1, 5) for column in range(2, 7)
    }
    assert counts.min() > 0.7 * 200
    assert counts.max() < 1.3 * 200


def test_an_image_without_objects_is_left_as_it_is_beside_one_with() -> None:
    features = random_features(2, 3, 8, 8)
    objects = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    objects[1, :, 2:6, 2:6] = True
    cut = seeded(GuidedCutout(), features, objects=ObjectMasks(objects))
    assert torch.equal(cut[0], features[0])
    assert not torch.equal(cut[1], features[1])
    assert torch.equal(seeded(GuidedCutout(), features, objects=ObjectMasks(torch.zeros_like(objects))), features)


# Adversarial noise


def trained_decoder(kind: str = "bilinear", classes: int = 4, stride: int = 4) -> tuple[Decoder, Tensor]:
    """A decoder that has learnt to classify noisy prototypes, and new features of that kind; 32 bits."""
    torch.manual_seed(3)
    prototypes = torch.rand(classes, 16)
    decoder = build_decoder(kind, 16, classes, stride)

    def draw(images: int) -> tuple[Tensor, Tensor]:
        ids = torch.randint(0, classes, (images, 6, 8))
        features = (prototypes[ids].movedim(-1, 1) + 0.3 * torch.randn(images, 16, 6, 8)).relu()
        return features, ids.repeat_interleave(stride, dim=1).repeat_interleave(stride, dim=2)

    optimiser = torch.optim.Adam(decoder.parameters(), lr=0.03)
    for _ in range(60):
        features, ids = draw(4)
        loss = F.cross_entropy(decoder(features), ids)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    features, ids = draw(8)
    assert (decoder(features).argmax(dim=1) == ids).double().mean() > 0.6
    optimiser.zero_grad()
    return decoder, features


def per_image(maps: Tensor) -> Tensor:
    return torch.linalg.vector_norm(maps.double(), dim=(1, 2, 3))


def cosines(first: Tensor, second: Tensor) -> Tensor:
    # F.cosine_similarity takes norms under 1e-8 for 1e-8.
    return (first.double() * second.double()).sum(dim=(1, 2, 3)) / (per_image(first) * per_image(second))


def divergence(decoder: nn.Module, features: Tensor, moved: Tensor) -> Tensor:
    """(B,): KL(p(z) || p(moved)) of each image, in 64 bits."""
    exact = copy.deepcopy(decoder).double()
    with torch.no_grad():
        p, q = exact(features.double()).log_softmax(dim=1), exact(moved.double()).log_softmax(dim=1)
    return (p.exp() * (p - q)).sum(dim=1).mean(dim=(1, 2))


def random_direction(features: Tensor) -> Tensor:
    """Not yet of norm 1, in 64 bits: the numbers that a perturbation draws."""
    drawn = torch.empty(-(-features.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    return drawn.view(torch.int16)[: features.numel()].view(features.shape).double()


def float64_direction(decoder: nn.Module, features: Tensor, seed: int, xi: float) -> Tensor:
    """The gradient of the divergence with respect to the trial direction that this seed draws."""
    exact, z = copy.deepcopy(decoder).double(), features.double()
    torch.manual_seed(seed)
    d = random_direction(features)
    d = (d / per_image(d)[:, None, None, None]).requires_grad_()
    p = exact(z).detach().softmax(dim=1)
    return torch.autograd.grad((p * (p.log() - exact(z + xi * d).log_softmax(dim=1))).sum(), d)[0]


@pytest.mark.parametrize("xi", [1e-2, 0.1, 1.0])
def test_vat_direction_is_that_of_the_float64_formula(xi: float) -> None:
    decoder, features = trained_decoder(stride=1)
    found = seeded(AdversarialNoise(xi=xi), features, 7, decoder=decoder) - features
    torch.manual_seed(7)
    d = random_direction(features).numpy()
    d /= np.sqrt((d**2).sum(axis=(1, 2, 3), keepdims=True))
    weight, bias = (parameter.detach().double().numpy() for parameter in decoder.parameters())

    def probabilities(z: np.ndarray) -> np.ndarray:
        powers = np.exp(np.einsum("cd,bdhw->bchw", weight[:, :, 0, 0], z) + bias[:, None, None])
        return powers / powers.sum(axis=1, keepdims=True)

    z = features.double().numpy()
    # The gradient of KL with respect to the second distribution's logits is the difference of the two.
    expected = np.einsum("cd,bchw->bdhw", weight[:, :, 0, 0], probabilities(z + xi * d) - probabilities(z))
    assert cosines(found, torch.from_numpy(expected)).min() >= 0.999


@pytest.mark.parametrize("kind", ["bilinear", "pixelshuffle"])
def test_vat_direction_through_a_whole_decoder_is_that_of_float64(kind: str) -> None:
    decoder, features = trained_decoder(kind)
    found = seeded(AdversarialNoise(), features, 7, decoder=decoder) - features
    assert cosines(found, float64_direction(decoder, features, 7, xi=AdversarialNoise().xi)).min() >= 0.999


@pytest.mark.parametrize("kind", ["bilinear", "pixelshuffle"])
def test_vat_direction_at_the_default_xi_is_the_one_that_smaller_ones_tend_to(kind: str) -> None:
    """At the size of real features: the trial step spreads over 200,000 numbers."""
    torch.manual_seed(0)
    decoder = build_decoder(kind, 512, 21, 8)
    features = torch.rand(1, 512, 20, 20)
    found = seeded(AdversarialNoise(), features, 7, decoder=decoder) - features
    assert cosines(found, float64_direction(decoder, features, 7, xi=1e-6)).min() >= 0.999


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "kind",
    [AdversarialNoise(), AdversarialNoise(eps_relative=0.5), AdversarialNoise(eps=2.0), AdversarialNoise(eps=0.01)],
    ids=str,
)
def test_vat_noise_has_the_norm_that_was_set(kind: AdversarialNoise, dtype: torch.dtype) -> None:
    decoder, features = trained_decoder()
    features = features.to(dtype) * torch.arange(1, 9).view(8, 1, 1, 1)
    found = per_image(seeded(kind, features, decoder=decoder.to(dtype)) - features)
    expected = torch.full((8,), kind.eps, dtype=torch.float64) if kind.eps else kind.eps_relative * per_image(features)
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0)


@pytest.mark.parametrize("certainty", [20.0, 40.0, 50.0, 70.0, 90.0, 1e4])
def test_vat_noise_is_never_stronger_than_set_where_the_decoder_is_certain(certainty: float) -> None:
    """The gradient's squares, then the gradient itself, vanish in 32 bits."""
    features = random_features(2, 8, 6, 6, dtype=torch.float32)
    decoder = linear_decoder(features)
    with torch.no_grad():
        decoder.classify.bias[0] = certainty  # type: ignore[index]
    found = per_image(seeded(AdversarialNoise(), features, decoder=decoder) - features) / per_image(features)
    assert (found <= 0.101).all()
    if certainty <= 70:
        assert (found >= 0.099).all()


@pytest.mark.parametrize("classes", [1, 5])
def test_vat_noise_is_0_where_nothing_changes_the_prediction(classes: int) -> None:
    """A decoder that is certain, or has one class, on large features, where strong noise is allowed."""
    features = 10 * random_features(2, 64, 10, 10, dtype=torch.float32)
    decoder = linear_decoder(features, classes)
    with torch.no_grad():
        decoder.classify.bias[0] = 1e4  # type: ignore[index]
    assert torch.equal(seeded(AdversarialNoise(), features, decoder=decoder), features)


@pytest.mark.parametrize("kind", ["bilinear", "pixelshuffle"])
def test_vat_noise_changes_a_trained_decoders_prediction_more_than_random_noise_of_its_norm(kind: str) -> None:
    decoder, features = trained_decoder(kind)
    perturbed = seeded(AdversarialNoise(), features, decoder=decoder)
    by_vat = divergence(decoder, features, perturbed)
    norm = per_image(perturbed - features)
    by_chance = []
    for seed in range(20):
        noise = torch.randn(features.shape, generator=torch.Generator().manual_seed(seed))
        by_chance.append(
            divergence(decoder, features, features + noise * (norm / per_image(noise))[:, None, None, None])
        )
    # More than any of twenty draws, in every image.
    assert (by_vat > 2 * torch.stack(by_chance).amax(dim=0)).all()


def test_vat_passes_the_gradient_of_the_features_on_unchanged() -> None:
    features = random_features(2, 6, 5, 7).requires_grad_()
    (gradient,) = torch.autograd.grad(seeded(AdversarialNoise(), features).square().sum() / 2, features)
    torch.testing.assert_close(gradient, seeded(AdversarialNoise(), features).detach(), rtol=1e-12, atol=1e-12)


def test_vat_leaves_the_gradients_that_are_being_collected_alone() -> None:
    features = random_features(2, 6, 5, 7, dtype=torch.float32).requires_grad_()
    decoder = linear_decoder(features)
    for tensor in (features, *decoder.parameters()):
        tensor.grad = torch.full_like(tensor, 3.0)
    seeded(AdversarialNoise(), features, decoder=decoder)
    assert all((tensor.grad == 3).all() for tensor in (features, *decoder.parameters()))  # type: ignore[union-attr]
    decoder.zero_grad(set_to_none=True)
    seeded(AdversarialNoise(), features, decoder=decoder)
    assert all(parameter.grad is None for parameter in decoder.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_vat_is_computed_in_32_bits_inside_autocast(dtype: torch.dtype) -> None:
    decoder, features = trained_decoder()
    plain = seeded(AdversarialNoise(), features, decoder=decoder)
    with torch.autocast("cpu", dtype=dtype):
        inside = seeded(AdversarialNoise(), features, decoder=decoder)
        rounded = features.to(dtype)
        half = seeded(AdversarialNoise(), rounded, decoder=decoder)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, plain)
    assert half.dtype == dtype
    # Half-precision draws are others, but the norm is the same but for the rounding of the sum.
    torch.testing.assert_close(per_image(half.double() - rounded.double()), 0.1 * per_image(rounded), rtol=0.01, atol=0)


def test_vat_works_without_gradients() -> None:
    decoder, features = trained_decoder()
    with torch.no_grad():
        silent = seeded(AdversarialNoise(), features, decoder=decoder)
    assert torch.equal(silent, seeded(AdversarialNoise(), features, decoder=decoder))
    assert not silent.requires_grad


def test_vat_adds_up_over_accumulated_micro_batches_as_in_one_plain_sum() -> None:
    decoder, features = trained_decoder()
    auxiliaries = nn.ModuleList([AuxiliaryDecoder(AdversarialNoise(), decoder)]).double()
    micro_batches = [features[:4].double(), features[4:].double()]
    collected = []
    for plain in (False, True):
        auxiliaries.zero_grad()
        for number, own in enumerate(micro_batches):
            own.requires_grad_().grad = None
            if plain:
                noisy = seeded(AdversarialNoise(), own, number, decoder=decoder)
                loss = decoder(noisy).softmax(dim=1).square().sum(dim=1).mean()
            else:
                nothing = torch.zeros_like(decoder.pixels(decoder(own).detach()))
                torch.manual_seed(number)
                target = PixelLoss(squared_distance, nothing, nothing[:, 0] == 0)
                (loss,) = auxiliary_losses(own, auxiliaries, one_block(own), [target])
            loss.backward()
        collected.append([tensor.grad.clone() for tensor in (*micro_batches, *decoder.parameters())])  # type: ignore[union-attr]
    torch.testing.assert_close(*collected, rtol=1e-12, atol=1e-15)


# Settings


@pytest.mark.parametrize(
    ("kind", "settings", "key", "allowed"),
    [
        (FeatureNoise, {"amplitude": 0.0}, "feature_noise.amplitude is 0.0", "above 0"),
        (FeatureNoise, {"amplitude": float("nan")}, "feature_noise.amplitude is nan", "above 0"),
        (FeatureNoise, {"count": -1}, "feature_noise.count is -1", "0"),
        (FeatureDrop, {"mode": "area"}, "feature_drop.mode is 'area'", "quantile"),
        (FeatureDrop, {"low": 0.95}, "feature_drop", "0.95 to 0.9"),
        (FeatureDrop, {"area_high": 1.5}, "feature_drop", "0.1 to 1.5"),
        (FeatureDrop, {"count": -2}, "feature_drop.count is -2", "0"),
        (Dropout, {"probability": 1.0}, "dropout.probability is 1.0", "0 and"),
        (Dropout, {"probability": 0.0}, "dropout.probability is 0.0", "0 and"),
        (Dropout, {"count": -1}, "dropout.count is -1", "0"),
        (ObjectMask, {"count": -1}, "object_mask.count is -1", "0"),
        (ContextMask, {"count": -1}, "context_mask.count is -1", "0"),
        (GuidedCutout, {"count": -1}, "guided_cutout.count is -1", "0"),
        (GuidedCutout, {"side": 0.0}, "guided_cutout.side is 0.0", "above 0"),
        (GuidedCutout, {"side": 1.2}, "guided_cutout.side is 1.2", "at most 1"),
        (GuidedCutout, {"min_area": 0}, "guided_cutout.min_area is 0", "at least 1"),
        (AdversarialNoise, {"count": -1}, "adversarial_noise.count is -1", "0"),
        (AdversarialNoise, {"xi": 1e-6}, "adversarial_noise.xi is 1e-06", "at least 0.01"),
        (AdversarialNoise, {"xi": float("nan")}, "adversarial_noise.xi is nan", "at least 0.01"),
        (AdversarialNoise, {"eps": -1.0}, "adversarial_noise", "eps"),
        (AdversarialNoise, {"eps_relative": -1.0}, "adversarial_noise", "eps_relative"),
        (AdversarialNoise, {"eps_relative": 0.0}, "adversarial_noise", "eps_relative"),
    ],
)
def test_settings_out_of_range_are_refused(kind: type, settings: dict[str, object], key: str, allowed: str) -> None:
    section = key.split(".")[0]
    with pytest.raises(UserError) as caught:
        Perturbations(**{section: kind(**settings)})
    assert f"perturbations.{key}" in str(caught.value)
    assert allowed in str(caught.value)


def test_the_mix_has_one_entry_per_auxiliary_decoder() -> None:
    kinds = [type(kind).__name__ for kind in Perturbations().each()]
    # As the authors.
    assert {name: kinds.count(name) for name in kinds} == {
        **{name: 6 for name in ("FeatureNoise", "FeatureDrop", "Dropout", "GuidedCutout")},
        **{name: 2 for name in ("ObjectMask", "ContextMask", "AdversarialNoise")},
    }


NONE = Perturbations(
    FeatureNoise(0), FeatureDrop(0), Dropout(0), ObjectMask(0), ContextMask(0), GuidedCutout(0), AdversarialNoise(0)
)


def test_a_count_of_0_leaves_a_kind_out() -> None:
    mix = Perturbations(
        FeatureNoise(2),
        FeatureDrop(0),
        Dropout(1, probability=0.3),
        ObjectMask(0),
        ContextMask(1),
        GuidedCutout(0),
        AdversarialNoise(0),
    )
    assert mix.each() == [mix.feature_noise, mix.feature_noise, mix.dropout, mix.context_mask]
    assert NONE.each() == []


def test_a_domain_without_objects_or_without_stuff_gets_no_perturbation_that_needs_object_masks() -> None:
    assert {type(kind) for kind in Perturbations().each(objects=False)} == {
        FeatureNoise,
        FeatureDrop,
        Dropout,
        AdversarialNoise,
    }
    assert len(Perturbations().each(objects=False)) == 20
