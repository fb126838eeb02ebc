"""The auxiliary decoders one at a time give exactly the losses and gradients of their plain sum, and keep only gradients."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from multidomain_cct.model import upsampling
from multidomain_cct.model.consistency import AuxiliaryDecoder, auxiliary_losses, decoder_losses
from multidomain_cct.model.decoders import Grid, build_decoder
from multidomain_cct.model.guides import Guide
from multidomain_cct.model.losses import CrossEntropy, KullbackLeibler, SquaredDistance, Term, mean_over_valid
from multidomain_cct.model.perturbations import (
    AdversarialNoise,
    ContextMask,
    Dropout,
    FeatureDrop,
    FeatureNoise,
    GuidedCutout,
    ObjectMask,
    Perturbation,
)

CHANNELS, CLASSES, STRIDE = 16, 3, 4
PIXELS = 4 * STRIDE * 5 * STRIDE
"""Of an image whose features are 4 x 5."""
ALL: list[Perturbation] = [FeatureNoise(), FeatureDrop(), Dropout(), ObjectMask(), ContextMask(), GuidedCutout(), AdversarialNoise()]
WEIGHTS = torch.tensor([7.0, 0.3])
"""Of the two terms."""


class Kept:
    """A tensor that some graph keeps for its backward pass."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def decoders(dtype: torch.dtype = torch.float64, kind: str = "pixelshuffle", copies: int = 1, kinds: Sequence[Perturbation] = ALL) -> nn.ModuleList:
    """One per perturbation, times `copies`."""
    torch.manual_seed(1)
    return nn.ModuleList(AuxiliaryDecoder(each, build_decoder(kind, CHANNELS, CLASSES, STRIDE)) for each in kinds * copies).to(dtype)


def drawn(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Features, a target, and which of its pixels count."""
    torch.manual_seed(2)
    features = torch.rand(2, CHANNELS, 4, 5, dtype=dtype)
    target = torch.randn(2, CLASSES, PIXELS, dtype=dtype).mul(3).softmax(dim=1)
    return features, target, torch.rand(2, PIXELS) < 0.8


def example(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Guide, list[Term]]:
    """Features, where objects are, and two distances of logits to a target of which some pixels do not count."""
    features, target, valid = drawn(dtype)
    objects = torch.zeros(2, 1, 4, 5, dtype=torch.bool)
    objects[:, :, :3, 1:4] = True
    return features, Guide(objects), [SquaredDistance(target, valid), KullbackLeibler(target, valid)]


def perturbed(auxiliary: nn.Module, features: Tensor, guide: Guide) -> tuple[Tensor, Tensor]:
    """The features that the decoder sees, and (B,) bool: the images of which something is left."""
    assert isinstance(auxiliary, AuxiliaryDecoder)
    found = auxiliary.perturbation(features, guide, auxiliary.decoder).of(features)
    return found, (found != 0).flatten(1).any(dim=1)


def plain_mean(features: Tensor, auxiliaries: nn.ModuleList, guide: Guide, terms: Sequence[Term]) -> Tensor:
    """CCT equation 2 for the terms of the example, all decoders at once, with autograd's gradients."""
    with torch.random.fork_rng():  # the perturbations' draws stay as seeded
        _, target, valid = drawn(features.dtype)
    losses = []
    for auxiliary in auxiliaries:
        seen, kept = perturbed(auxiliary, features, guide)
        logits = auxiliary.decoder.pixels(seen)
        pixels = [(logits.softmax(dim=1) - target).square().sum(dim=1), (target * (target.log() - logits.log_softmax(dim=1))).sum(dim=1)]
        losses.append(torch.stack([mean_over_valid(each, valid & kept[:, None]) for each in pixels]))
    return torch.stack(losses).mean(dim=0)


def weighted(losses: Tensor) -> Tensor:
    return (losses * WEIGHTS.to(losses.dtype)).sum()


def gradients(loss: Tensor, features: Tensor, auxiliaries: nn.ModuleList) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [features, *auxiliaries.parameters()]))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("most", [10, 10**6])
@pytest.mark.parametrize("kind", ["pixelshuffle", "bilinear"])
def test_losses_and_gradients_equal_the_plain_sum(dtype: torch.dtype, tolerance: float, kind: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upsampling, "LOGITS_OF_A_THREAD", most)  # pieces of an image, or whole ones
    auxiliaries = decoders(dtype, kind)
    features, guide, terms = example(dtype)
    results = []
    for compute in (plain_mean, auxiliary_losses):
        leaf = features.clone().requires_grad_()
        torch.manual_seed(3)  # the same draws of the perturbations
        losses = compute(leaf, auxiliaries, guide, terms)
        results.append((losses.detach(), *gradients(weighted(losses), leaf, auxiliaries)))
    assert (results[0][0] > 0).all() and all(gradient.any() for gradient in results[0][1:])
    for expected, found in zip(*results, strict=True):
        assert found.dtype == dtype
        assert (found - expected).abs().max() <= tolerance * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("most", [10, 10**6])
@pytest.mark.parametrize("kind", ["pixelshuffle", "bilinear"])
def test_losses_of_one_decoder_on_features_as_they_are_equal_the_plain_ones(kind: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upsampling, "LOGITS_OF_A_THREAD", most)
    torch.manual_seed(1)
    decoder = build_decoder(kind, CHANNELS, CLASSES, STRIDE).double()
    features, target, valid = drawn(torch.float64)
    ids = torch.randint(0, CLASSES, (2, PIXELS), dtype=torch.uint8).where(valid, 255)
    leaf = features.requires_grad_()
    inputs = [leaf, *decoder.parameters()]
    found = decoder_losses(leaf, decoder, [CrossEntropy(ids, torch.float64), SquaredDistance(target, valid)])
    logits = decoder.pixels(leaf)
    entropies = torch.nn.functional.cross_entropy(logits, ids.long(), ignore_index=255, reduction="none")
    distances = (logits.softmax(dim=1) - target).square().sum(dim=1)
    expected = torch.stack([mean_over_valid(entropies, valid), mean_over_valid(distances, valid)])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(weighted(losses), inputs) for losses in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)
    with torch.no_grad():
        silent = decoder_losses(leaf, decoder, [CrossEntropy(ids, torch.float64)])
    assert not silent.requires_grad and silent[0] == found[0]


RUNS = [*[FeatureNoise()] * 2, *[FeatureDrop()] * 6, *[Dropout()] * 6, ObjectMask(), GuidedCutout(min_area=1), AdversarialNoise()]
"""More of a kind than are taken together."""


@pytest.mark.parametrize("kind", ["pixelshuffle", "bilinear"])
@pytest.mark.parametrize(
    ("channels", "classes", "stride", "size"),
    [(16, 3, 4, (4, 5)), (3, 5, 2, (3, 4)), (8, 3, 4, (1, 1)), (1, 2, 4, (2, 3)), (6, 3, 1, (3, 2))],
    ids=["several runs", "more classes than channels", "one position", "one channel", "stride 1"],
)
def test_decoders_of_all_sizes_equal_the_plain_mean(channels: int, classes: int, stride: int, size: tuple[int, int], kind: str) -> None:
    torch.manual_seed(4)
    auxiliaries = nn.ModuleList(AuxiliaryDecoder(each, build_decoder(kind, channels, classes, stride)) for each in RUNS).double()
    features = torch.rand(2, channels, *size, dtype=torch.float64, requires_grad=True)
    pixels = size[0] * size[1] * stride**2
    target, valid = torch.randn(2, classes, pixels, dtype=torch.float64).softmax(dim=1), torch.rand(2, pixels) < 0.8
    guide = Guide(torch.rand(2, 1, *size) < 0.5)
    torch.manual_seed(3)
    (found,) = auxiliary_losses(features, auxiliaries, guide, [SquaredDistance(target, valid)])
    torch.manual_seed(3)
    losses = []
    for auxiliary in auxiliaries:
        seen, kept = perturbed(auxiliary, features, guide)
        losses.append(mean_over_valid((auxiliary.decoder.pixels(seen).softmax(dim=1) - target).square().sum(dim=1), valid & kept[:, None]))
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(gradients(found, features, auxiliaries), gradients(expected, features, auxiliaries), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_perturbation_gives_finite_gradients_inside_autocast(dtype: torch.dtype) -> None:
    auxiliaries = decoders(torch.float32)
    features, guide, terms = example(torch.float32)
    for leaf in (features.clone().requires_grad_(), features.to(dtype).requires_grad_()):
        with torch.autocast("cpu", dtype=dtype):
            losses = auxiliary_losses(leaf, auxiliaries, guide, terms)
        assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients(weighted(losses), leaf, auxiliaries))


def test_each_term_has_its_own_gradient() -> None:
    auxiliaries = decoders()
    features, guide, terms = example()
    features.requires_grad_()
    for number in range(2):
        found = []
        for compute in (plain_mean, auxiliary_losses):
            torch.manual_seed(3)
            found.append(gradients(compute(features, auxiliaries, guide, terms)[number], features, auxiliaries))
        torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-15)


def test_gradients_reach_what_the_features_were_computed_from_and_add_up_with_other_losses() -> None:
    auxiliaries = decoders()
    images, guide, terms = example()
    encoder = nn.Conv2d(CHANNELS, CHANNELS, 1).double()
    found = []
    for compute in (plain_mean, auxiliary_losses):
        encoder.zero_grad()
        features = encoder(images).relu()
        torch.manual_seed(3)
        (features.square().mean() + 0.5 * weighted(compute(features, auxiliaries, guide, terms))).backward()
        found.append(encoder.weight.grad.clone())  # type: ignore[union-attr]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-15)


def test_gradients_accumulate_over_two_backward_passes() -> None:
    auxiliaries = decoders()
    features, guide, terms = example()
    features.requires_grad_()
    sums = []
    for _ in range(2):
        torch.manual_seed(3)
        weighted(auxiliary_losses(features, auxiliaries, guide, terms)).backward()  # type: ignore[no-untyped-call]
        sums.append([tensor.grad.clone() for tensor in (features, *auxiliaries.parameters())])  # type: ignore[union-attr]
    torch.testing.assert_close(sums[1], [2 * first for first in sums[0]])


def test_only_the_decoders_learn_from_features_without_a_graph() -> None:
    auxiliaries = decoders()
    features, guide, terms = example()
    weighted(auxiliary_losses(features, auxiliaries, guide, terms)).backward()  # type: ignore[no-untyped-call]
    assert features.grad is None and all(parameter.grad is not None for parameter in auxiliaries.parameters())


def test_no_graph_is_built_and_no_logits_are_kept() -> None:
    auxiliaries = decoders(copies=3)
    features, guide, terms = example()
    kept: list[Tensor] = []
    logits: list[weakref.ref[Tensor]] = []

    class Watched(SquaredDistance):
        def weighted(self, given: Tensor) -> tuple[Tensor, Tensor]:
            assert sum(each() is not None for each in logits) <= 1  # at most those of the decoder before
            logits.append(weakref.ref(given))
            return super().weighted(given)

    target, valid = torch.rand(2, CLASSES, PIXELS, dtype=torch.float64).softmax(dim=1), torch.ones(2, PIXELS, dtype=torch.bool)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):  # type: ignore[func-returns-value]
        losses = auxiliary_losses(features.requires_grad_(), auxiliaries, guide, [Watched(target, valid)])
        assert len(logits) == 3 * len(ALL)
        assert [tensor.shape for tensor in kept] == [tensor.shape for tensor in losses.grad_fn.saved_tensors]  # type: ignore[union-attr]


@pytest.mark.parametrize("copies", [1, 4])
def test_what_is_kept_for_backward_is_gradients_only(copies: int) -> None:
    auxiliaries = decoders(copies=copies)
    features, guide, terms = example()
    losses = auxiliary_losses(features.requires_grad_(), auxiliaries, guide, terms)
    saved = losses.grad_fn.saved_tensors  # type: ignore[union-attr]
    # Each term has its own, because only backward knows their weights.
    weights = auxiliaries[0].decoder.joined([auxiliary.decoder for auxiliary in auxiliaries])
    assert [tensor.shape for tensor in saved] == [features.shape] * 2 + [weight.shape for weight in weights] * 2
    assert not any(tensor.requires_grad for tensor in saved)


def test_without_gradients_the_losses_are_the_same_and_nothing_is_kept() -> None:
    auxiliaries = decoders()
    features, guide, terms = example()
    torch.manual_seed(3)
    expected = auxiliary_losses(features.requires_grad_(), auxiliaries, guide, terms)
    torch.manual_seed(3)
    with torch.no_grad():
        found = auxiliary_losses(features, auxiliaries, guide, terms)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features_too", [False, True])
def test_autocast_gives_finite_results_close_to_32_bits(dtype: torch.dtype, features_too: bool) -> None:
    # The draws of noise in 16 bits are others; the dropped regions and channels are the same.
    auxiliaries = decoders(torch.float32, kinds=[kind for kind in ALL if not isinstance(kind, (FeatureNoise, AdversarialNoise))])
    features, guide, terms = example(torch.float32)
    results = []
    for enabled in (False, True):
        leaf = (features.to(dtype) if enabled and features_too else features.clone()).requires_grad_()
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            losses = auxiliary_losses(leaf, auxiliaries, guide, terms)
        results.append((losses.detach(), *(gradient.float() for gradient in gradients(weighted(losses), leaf, auxiliaries))))
    assert results[1][0].dtype == torch.float32
    assert all(found.isfinite().all() for found in results[1])
    (losses, *expected), (found_losses, *found) = results
    torch.testing.assert_close(found_losses, losses, rtol=0.02, atol=0)
    # Together: where rounding moves a single hidden unit across its ReLU, the gradient of one bias of a decoder this small changes by a tenth.
    whole, difference = (torch.cat([gradient.flatten() for gradient in each]) for each in (expected, [a - b for a, b in zip(found, expected, strict=True)]))
    assert difference.norm() <= 0.05 * whole.norm()


def test_small_gradients_do_not_vanish_in_16_bit_floats() -> None:
    torch.manual_seed(0)
    auxiliaries = nn.ModuleList([AuxiliaryDecoder(Dropout(), build_decoder("pixelshuffle", CHANNELS, CLASSES, 32))])
    features, guide = torch.rand(1, CHANNELS, 8, 8), Guide(torch.zeros(1, 1, 8, 8, dtype=torch.bool))
    target = torch.rand(1, CLASSES, 256 * 256).softmax(dim=1)
    valid = torch.ones(1, 256 * 256, dtype=torch.bool)
    found = []
    for enabled in (False, True):
        leaf = features.clone().requires_grad_()
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype=torch.float16, enabled=enabled):
            # One of a thousand images: the gradient of a pixel lies below the smallest 16-bit float.
            (loss,) = auxiliary_losses(leaf, auxiliaries, guide, [SquaredDistance(target, valid)])
        (gradient,) = torch.autograd.grad(loss / 1000, leaf)
        found.append(gradient)
    assert (found[0] - found[1]).norm() <= 0.02 * found[0].norm()


def test_sixteen_bit_feature_gradients_do_not_vanish_or_overflow() -> None:
    """Against float64, at the outer scale a GradScaler starts with."""
    torch.manual_seed(0)
    auxiliaries = nn.ModuleList(AuxiliaryDecoder(Dropout(), build_decoder("pixelshuffle", 16, 21, stride=1)) for _ in range(6))
    features, guide = torch.rand(4, 16, 64, 64), Guide(torch.zeros(4, 1, 64, 64, dtype=torch.bool))
    target = torch.rand(4, 21, 64 * 64).softmax(dim=1)
    valid = torch.ones(4, 64 * 64, dtype=torch.bool)

    def gradient(leaf: Tensor, scale: float) -> Tensor:
        torch.manual_seed(1)
        (loss,) = auxiliary_losses(leaf, auxiliaries, guide, [SquaredDistance(target, valid)])
        (found,) = torch.autograd.grad(loss * scale, leaf)
        return found.double() / scale

    with torch.autocast("cpu", dtype=torch.float16):
        half = gradient(features.half().requires_grad_(), 65536.0)
    exact = gradient(features.clone().requires_grad_(), 1.0)
    assert torch.isfinite(half).all()
    assert (half - exact).norm() / exact.norm() < 0.02


# Images of which nothing is left


def erasing() -> list[tuple[Perturbation, Tensor, Tensor]]:
    """For each kind a way to lose all of the second of two images and not of the first: the perturbation, the features and where objects are."""
    features = torch.rand(2, CHANNELS, 4, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.1
    second = torch.tensor([False, True]).view(2, 1, 1, 1)
    silent, single = features.where(~second, 0), features.where(~second | (torch.arange(CHANNELS) == 0).view(1, -1, 1, 1), 0)
    flat = features.where(~second, 1.0)
    objects = torch.zeros(2, 1, 4, 5, dtype=torch.bool)
    objects[0, :, 1:3, 1:3] = True
    return [
        (FeatureNoise(), silent, objects),
        (FeatureDrop(), flat, objects),
        (FeatureDrop(mode="quantile"), silent, objects),
        (Dropout(), single, objects),
        (ObjectMask(), features, objects | second),
        (ContextMask(), features, objects),
        (GuidedCutout(side=1.0), features, objects | second),
        (AdversarialNoise(), silent, objects),
    ]


def seed_that_erases(auxiliary: nn.Module, features: Tensor, guide: Guide) -> int:
    """The first one with which nothing is left of the second image, and something of the first."""
    for seed in range(100):
        torch.manual_seed(seed)
        if perturbed(auxiliary, features, guide)[1].tolist() == [True, False]:
            return seed
    raise AssertionError("none of a hundred seeds")


@pytest.mark.parametrize("case", erasing(), ids=lambda case: str(case[0]))
def test_an_image_of_which_nothing_is_left_is_told_apart_and_counts_as_0(case: tuple[Perturbation, Tensor, Tensor]) -> None:
    kind, features, guide = case[0], case[1].clone().requires_grad_(), Guide(case[2])
    auxiliaries = decoders(kinds=[kind])
    target = torch.rand(2, CLASSES, PIXELS, dtype=torch.float64).softmax(dim=1)

    terms = [SquaredDistance(target, torch.ones(2, PIXELS, dtype=torch.bool))]
    seed = seed_that_erases(auxiliaries[0], features, guide)
    torch.manual_seed(seed)
    losses = auxiliary_losses(features, auxiliaries, guide, terms)
    torch.manual_seed(seed)
    logits = auxiliaries[0].decoder.pixels(perturbed(auxiliaries[0], features, guide)[0])
    # The first image's mean over its pixels, shared among two images.
    expected = (logits[0].softmax(dim=0) - target[0]).square().sum(dim=0).mean() / 2
    torch.testing.assert_close(losses[0], expected, rtol=1e-12, atol=0)
    of_features, *own = gradients(losses[0], features, auxiliaries)
    assert of_features[0].any() and not of_features[1].any() and all(gradient.isfinite().all() for gradient in own)


def test_where_nothing_is_left_of_any_image_the_losses_are_0_and_teach_nothing() -> None:
    auxiliaries = decoders(kinds=[ContextMask(), ContextMask()])
    features, guide, terms = example()
    features.requires_grad_()
    losses = auxiliary_losses(features, auxiliaries, Guide(torch.zeros_like(guide.objects)), terms)
    assert losses.tolist() == [0, 0]
    assert not any(gradient.any() for gradient in gradients(weighted(losses), features, auxiliaries))


def test_a_decoder_for_which_nothing_is_left_still_counts_among_the_decoders() -> None:
    features, guide, terms = example()
    nothing = Guide(torch.zeros_like(guide.objects))
    pair = decoders(kinds=[ObjectMask(), ContextMask()])
    only = nn.ModuleList([pair[0]])  # without objects it changes nothing
    torch.testing.assert_close(auxiliary_losses(features, pair, nothing, terms), auxiliary_losses(features, only, nothing, terms) / 2, rtol=1e-12, atol=0)


# Some of the decoders, some of the pixels


def test_a_sample_of_decoders_estimates_the_mean_over_all_without_bias() -> None:
    """Over all draws of two of four decoders, each pair once in six: the mean of losses and gradients is that of all four."""
    auxiliaries = decoders(kinds=[ObjectMask(), ContextMask()] * 2)  # nothing in them is drawn
    features, guide, terms = example()
    features.requires_grad_()
    losses = auxiliary_losses(features, auxiliaries, guide, terms)
    expected = [losses.detach(), *gradients(weighted(losses), features, auxiliaries)]
    found: dict[tuple[float, ...], list[Tensor]] = {}
    for seed in range(200):
        torch.manual_seed(seed)
        losses = auxiliary_losses(features, auxiliaries, guide, terms, sample=2)
        found.setdefault(tuple(losses.tolist()), [losses.detach(), *gradients(weighted(losses), features, auxiliaries)])
    assert len(found) == 6
    for whole, parts in zip(expected, zip(*found.values(), strict=True), strict=True):
        torch.testing.assert_close(torch.stack(parts).mean(dim=0), whole, rtol=1e-9, atol=1e-15)


def test_decoders_that_were_not_drawn_have_a_gradient_of_0() -> None:
    auxiliaries = decoders()
    features, guide, terms = example()
    torch.manual_seed(0)
    weighted(auxiliary_losses(features.requires_grad_(), auxiliaries, guide, terms, sample=3)).backward()  # type: ignore[no-untyped-call]
    learning = [any(parameter.grad.any() for parameter in auxiliary.parameters()) for auxiliary in auxiliaries]  # type: ignore[union-attr]
    assert sum(learning) == 3 and len(learning) == 7


def test_a_sample_of_all_decoders_is_the_whole_mean() -> None:
    auxiliaries = decoders(kinds=[ObjectMask(), ContextMask()])
    features, guide, terms = example()
    torch.testing.assert_close(auxiliary_losses(features, auxiliaries, guide, terms, sample=2), auxiliary_losses(features, auxiliaries, guide, terms))


@pytest.mark.parametrize("kind", ["pixelshuffle", "bilinear"])
def test_the_mean_over_all_grids_is_the_mean_over_all_pixels(kind: str) -> None:
    auxiliaries = decoders(kind=kind, kinds=[ObjectMask(), ContextMask()])
    features, guide, _ = example()
    features.requires_grad_()
    target = torch.rand(2, CLASSES, 4 * STRIDE, 5 * STRIDE, dtype=torch.float64).softmax(dim=1)

    def on(grid: Grid) -> list[Tensor]:
        kept = auxiliaries[0].decoder.in_order(target, grid)

        terms = [SquaredDistance(kept, torch.ones(2, kept.shape[2], dtype=torch.bool))]
        (loss,) = auxiliary_losses(features, auxiliaries, guide, terms, grid=grid)
        return [loss.detach(), *gradients(loss, features, auxiliaries)]

    grids = [on(Grid(2, row, column)) for row in range(2) for column in range(2)]
    for whole, parts in zip(on(Grid()), zip(*grids, strict=True), strict=True):
        torch.testing.assert_close(torch.stack(parts).mean(dim=0), whole, rtol=1e-9, atol=1e-15)
