"""Auxiliary decoders in groups and pieces give the losses and gradients of their plain sum, and keep only gradients.

The plain sum is computed on whole pictures with autograd, one decoder after the other.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multidomain_cct.model import decoders
from multidomain_cct.model.auxiliary import AuxiliaryDecoder, auxiliary_losses, decoder_losses
from multidomain_cct.model.decoders import ALL_PIXELS, Decoder, DecoderGroup, Grid, build_decoder
from multidomain_cct.model.distances import kl_divergence, squared_distance
from multidomain_cct.model.losses import PixelLoss, mean_over_valid, pixel_cross_entropy
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
)

CHANNELS, CLASSES, STRIDE, SIZE = 16, 3, 4, (4, 5)
LOGITS = 2 * CLASSES * SIZE[0] * SIZE[1] * STRIDE**2
"""Of one decoder for the two images of an example."""
ALL: list[Perturbation] = [
    FeatureNoise(),
    FeatureDrop(),
    Dropout(),
    ObjectMask(),
    ContextMask(),
    GuidedCutout(),
    AdversarialNoise(),
]
FACTORS = torch.tensor([7.0, 0.3])
"""Weights of the two losses."""


def auxiliaries_of(
    kinds: Sequence[Perturbation] = ALL, *, decoder: str = "pixelshuffle", dtype: torch.dtype = torch.float64
) -> nn.ModuleList:
    torch.manual_seed(1)
    built = [AuxiliaryDecoder(kind, build_decoder(decoder, CHANNELS, CLASSES, STRIDE)) for kind in kinds]
    return nn.ModuleList(built).to(dtype)


class Example:
    """Two images: features, object masks, and a target picture of which a fifth of the pixels do not count."""

    def __init__(
        self,
        dtype: torch.dtype = torch.float64,
        *,
        channels: int = CHANNELS,
        classes: int = CLASSES,
        stride: int = STRIDE,
        size: tuple[int, int] = SIZE,
    ) -> None:
        draw = torch.Generator().manual_seed(2)
        height, width = size[0] * stride, size[1] * stride
        self.features = torch.rand(2, channels, *size, dtype=dtype, generator=draw).requires_grad_()
        self.objects = ObjectMasks(torch.rand(2, 1, *size, generator=draw) < 0.5)
        self.target = torch.randn(2, classes, height, width, dtype=dtype, generator=draw).mul(3).softmax(dim=1)
        self.valid = torch.rand(2, height, width, generator=draw) < 0.8

    def losses(self, decoder: Decoder, grid: Grid = ALL_PIXELS) -> list[PixelLoss]:
        target, valid = decoder.pixels(self.target, grid), decoder.pixels(self.valid, grid)
        return [PixelLoss(squared_distance, target, valid), PixelLoss(kl_divergence, target, valid)]

    def plain(self, logits: Tensor, left: Tensor) -> Tensor:
        """(2,): both losses of a (B, C, H, W) picture of logits."""
        squares = (logits.softmax(dim=1) - self.target).square().sum(dim=1)
        divergences = (self.target * (self.target.log() - logits.log_softmax(dim=1))).sum(dim=1)
        counted = self.valid & left[:, None, None]
        return torch.stack([mean_over_valid(squares, counted), mean_over_valid(divergences, counted)])


def perturbed(auxiliary: nn.Module, features: Tensor, objects: ObjectMasks) -> tuple[Tensor, Tensor]:
    """(B, D, h, w) features that the decoder sees, and (B,) bool: the images that are not zeroed entirely."""
    assert isinstance(auxiliary, AuxiliaryDecoder)
    maps = auxiliary.perturbation(features, objects, DecoderGroup.of([auxiliary.decoder]))[0]
    return maps, (maps != 0).flatten(1).any(dim=1)


def plain_mean(example: Example, features: Tensor, auxiliaries: nn.ModuleList) -> Tensor:
    """CCT equation 2 for both losses: whole pictures, autograd's gradients."""
    losses = []
    for auxiliary in auxiliaries:
        maps, left = perturbed(auxiliary, features, example.objects)
        losses.append(example.plain(auxiliary.decoder(maps), left))  # type: ignore[operator, union-attr]
    return torch.stack(losses).mean(dim=0)


def in_groups(example: Example, features: Tensor, auxiliaries: nn.ModuleList, **options: Any) -> Tensor:
    decoder: Any = auxiliaries[0].decoder
    return auxiliary_losses(features, auxiliaries, example.objects, example.losses(decoder), **options)


Compute = Callable[[Example, Tensor, nn.ModuleList], Tensor]


def results_of(compute: Compute, example: Example, auxiliaries: nn.ModuleList, seed: int = 3) -> list[Tensor]:
    """The losses, then the gradients of their weighted sum: of the features, of each parameter."""
    leaf = example.features.detach().clone().requires_grad_()
    torch.manual_seed(seed)  # the same draws of the perturbations
    losses = compute(example, leaf, auxiliaries)
    return [losses.detach(), *gradients(weighted(losses), leaf, auxiliaries)]


def weighted(losses: Tensor) -> Tensor:
    return (losses * FACTORS.to(losses.dtype)).sum()


def gradients(loss: Tensor, features: Tensor, auxiliaries: nn.ModuleList) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [features, *auxiliaries.parameters()]))


def allow(monkeypatch: pytest.MonkeyPatch, logits: int) -> None:
    """So many logits at once."""
    monkeypatch.setitem(decoders.LOGITS_AT_ONCE, "cpu", logits)


# Groups and pieces

BUDGETS = {"pieces": LOGITS // 7, "one by one": LOGITS, "groups of three": 3 * LOGITS, "all at once": 100 * LOGITS}
every_budget = pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
every_decoder = pytest.mark.parametrize("decoder", ["pixelshuffle", "bilinear"])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@every_budget
@every_decoder
def test_losses_and_gradients_equal_the_plain_sum(
    dtype: torch.dtype, tolerance: float, decoder: str, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow(monkeypatch, budget)
    auxiliaries = auxiliaries_of(decoder=decoder, dtype=dtype)
    plain, grouped = (results_of(compute, Example(dtype), auxiliaries) for compute in (plain_mean, in_groups))
    assert (plain[0] > 0).all()
    assert all(gradient.any() for gradient in plain[1:])
    for expected, actual in zip(plain, grouped, strict=True):
        assert actual.dtype == dtype
        assert (actual - expected).abs().max() <= tolerance * max(1.0, expected.abs().max().item())


MANY: list[Perturbation] = [
    *[FeatureNoise()] * 2,
    *[FeatureDrop()] * 6,
    *[Dropout()] * 6,
    ObjectMask(),
    *[GuidedCutout(min_area=1)] * 2,
    *[AdversarialNoise()] * 2,
]
"""Runs of equal perturbations, which are drawn at once."""


@pytest.mark.parametrize("share", [0.4, 1, 4, 100], ids=["pieces", "one by one", "groups of four", "all at once"])
@every_decoder
@pytest.mark.parametrize(
    ("channels", "classes", "stride", "size"),
    [(16, 3, 4, (4, 5)), (3, 5, 2, (3, 4)), (8, 3, 4, (1, 1)), (2, 2, 4, (2, 3)), (6, 3, 1, (3, 2))],
    ids=["many", "more classes than channels", "one position", "two channels", "stride 1"],
)
def test_decoders_of_all_sizes_equal_the_plain_sum(
    channels: int,
    classes: int,
    stride: int,
    size: tuple[int, int],
    decoder: str,
    share: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    example = Example(channels=channels, classes=classes, stride=stride, size=size)
    allow(monkeypatch, max(1, int(share * example.target.numel())))
    built = [AuxiliaryDecoder(kind, build_decoder(decoder, channels, classes, stride)) for kind in MANY]
    auxiliaries = nn.ModuleList(built).double()
    plain, grouped = (results_of(compute, example, auxiliaries) for compute in (plain_mean, in_groups))
    torch.testing.assert_close(grouped, plain, rtol=1e-9, atol=1e-12)


@every_budget
@every_decoder
def test_one_decoder_on_unchanged_features_has_the_plain_losses(
    decoder: str, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow(monkeypatch, budget)
    torch.manual_seed(1)
    main, example = build_decoder(decoder, CHANNELS, CLASSES, STRIDE).double(), Example()
    ids = torch.randint(0, CLASSES, example.valid.shape, dtype=torch.uint8).where(example.valid, 255)
    entropy = PixelLoss(pixel_cross_entropy, main.pixels(ids), main.pixels(ids) != 255)
    inputs = [example.features, *main.parameters()]
    actual = decoder_losses(example.features, main, [entropy, example.losses(main)[0]])
    logits = main(example.features)
    pixels = F.cross_entropy(logits, ids.long(), ignore_index=255, reduction="none")
    squares = example.plain(logits, torch.ones(2, dtype=torch.bool))[0]
    expected = torch.stack([mean_over_valid(pixels, ids != 255), squares])
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    both = [torch.autograd.grad(weighted(losses), inputs) for losses in (actual, expected)]
    torch.testing.assert_close(*both, rtol=1e-12, atol=1e-15)


def test_each_loss_has_its_own_gradient() -> None:
    auxiliaries, example = auxiliaries_of(), Example()
    for number in range(2):
        both = []
        for compute in (plain_mean, in_groups):
            torch.manual_seed(3)
            loss = compute(example, example.features, auxiliaries)[number]
            both.append(gradients(loss, example.features, auxiliaries))
        torch.testing.assert_close(both[1], both[0], rtol=1e-12, atol=1e-13)


# As a part of a larger graph


def test_gradients_reach_what_the_features_were_computed_from_and_add_up_with_other_losses() -> None:
    auxiliaries, example = auxiliaries_of(), Example()
    encoder = nn.Conv2d(CHANNELS, CHANNELS, 1).double()
    both = []
    for compute in (plain_mean, in_groups):
        encoder.zero_grad()
        features = encoder(example.features.detach()).relu()
        torch.manual_seed(3)
        (features.square().mean() + 0.5 * weighted(compute(example, features, auxiliaries))).backward()
        both.append(encoder.weight.grad.clone())  # type: ignore[union-attr]
    torch.testing.assert_close(*both, rtol=1e-12, atol=1e-13)


def test_gradients_accumulate_over_two_backward_passes() -> None:
    auxiliaries, example = auxiliaries_of(), Example()
    sums = []
    for _ in range(2):
        torch.manual_seed(3)
        weighted(in_groups(example, example.features, auxiliaries)).backward()  # type: ignore[no-untyped-call]
        sums.append([tensor.grad.clone() for tensor in (example.features, *auxiliaries.parameters())])  # type: ignore[union-attr]
    torch.testing.assert_close(sums[1], [2 * first for first in sums[0]])


def test_only_the_decoders_learn_from_features_without_a_graph() -> None:
    auxiliaries, example = auxiliaries_of(), Example()
    features = example.features.detach()
    weighted(in_groups(example, features, auxiliaries)).backward()  # type: ignore[no-untyped-call]
    assert features.grad is None
    assert all(parameter.grad is not None for parameter in auxiliaries.parameters())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_of_the_features_has_their_memory_format(memory_format: torch.memory_format) -> None:
    auxiliaries, example = auxiliaries_of(), Example()
    leaf = example.features.detach().to(memory_format=memory_format).requires_grad_()
    gradient = gradients(weighted(in_groups(example, leaf, auxiliaries)), leaf, auxiliaries)[0]
    assert gradient.is_contiguous(memory_format=memory_format)


# What is kept


class Kept:
    """A tensor that a graph keeps for its backward pass."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize("copies", [1, 4])
def test_what_is_kept_for_backward_is_gradients_only(copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    allow(monkeypatch, 3 * LOGITS)
    auxiliaries, example = auxiliaries_of(ALL * copies), Example()
    packed: list[weakref.ref[Kept]] = []

    def pack(tensor: Tensor) -> Kept:
        kept = Kept(tensor.detach())  # an output that refers to its own graph would keep it alive
        packed.append(weakref.ref(kept))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        losses = in_groups(example, example.features, auxiliaries)
        alive = [kept.tensor for reference in packed if (kept := reference()) is not None]
    # Each loss has its own gradients, because only backward knows the losses' weights.
    weights = DecoderGroup.of([auxiliary.decoder for auxiliary in auxiliaries]).weights  # type: ignore[misc]
    shapes = [example.features.shape, *(weight.shape for weight in weights)]
    assert [tensor.shape for tensor in alive] == shapes * 2
    assert losses.requires_grad


@pytest.mark.parametrize("budget", [LOGITS // 7, 3 * LOGITS])
@every_decoder
def test_logits_of_one_group_or_piece_exist_at_a_time(
    decoder: str, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow(monkeypatch, budget)
    auxiliaries, example = auxiliaries_of(ALL * 3, decoder=decoder), Example()
    seen: list[weakref.ref[Tensor]] = []
    sizes = []

    def watched(logits: Tensor, target: Tensor) -> Tensor:
        assert not any(reference() is not None for reference in seen)
        seen.append(weakref.ref(logits))
        sizes.append(logits.numel())
        return squared_distance(logits, target)

    first: Any = auxiliaries[0].decoder
    loss = PixelLoss(watched, first.pixels(example.target), first.pixels(example.valid))
    auxiliary_losses(example.features, auxiliaries, example.objects, [loss])
    assert sum(sizes) == 21 * LOGITS
    assert len(sizes) == 7 if budget == 3 * LOGITS else len(sizes) > 21
    # A bilinear piece is at least one column of pixels.
    assert max(sizes) <= budget
    assert not any(reference() is not None for reference in seen)


def test_without_gradients_the_losses_are_the_same_and_nothing_is_kept() -> None:
    auxiliaries, example = auxiliaries_of(), Example()
    torch.manual_seed(3)
    expected = in_groups(example, example.features, auxiliaries)
    torch.manual_seed(3)
    with torch.no_grad():
        silent = in_groups(example, example.features, auxiliaries)
    assert not silent.requires_grad
    torch.testing.assert_close(silent, expected.detach(), rtol=1e-12, atol=1e-12)


# 16 bits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features_too", [False, True])
def test_every_perturbation_gives_finite_gradients_inside_autocast(dtype: torch.dtype, features_too: bool) -> None:
    auxiliaries, example = auxiliaries_of(dtype=torch.float32), Example(torch.float32)
    leaf = example.features.detach().to(dtype if features_too else torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        losses = in_groups(example, leaf, auxiliaries)
    for gradient in gradients(weighted(losses), leaf, auxiliaries):
        assert gradient.isfinite().all()
        assert gradient.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features_too", [False, True])
def test_autocast_gives_results_close_to_32_bits(dtype: torch.dtype, features_too: bool) -> None:
    # In 16 bits noise is drawn differently; the dropped regions and channels are the same.
    kinds = [kind for kind in ALL if not isinstance(kind, FeatureNoise | AdversarialNoise)]
    auxiliaries, example = auxiliaries_of(kinds, dtype=torch.float32), Example(torch.float32)
    both = []
    for enabled in (False, True):
        leaf = example.features.detach().to(dtype if enabled and features_too else torch.float32).requires_grad_()
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            losses = in_groups(example, leaf, auxiliaries)
        both.append((losses.detach(), gradients(weighted(losses), leaf, auxiliaries)))
    (losses, exact), (rounded_losses, rounded) = both
    assert rounded_losses.dtype == torch.float32
    torch.testing.assert_close(rounded_losses, losses, rtol=0.02, atol=0)
    # Together: where rounding moves a single hidden unit across its ReLU, the gradient of one bias of a decoder this
    # small changes by a tenth.
    difference = torch.cat([(a.float() - b).flatten() for a, b in zip(rounded, exact, strict=True)])
    assert difference.norm() <= 0.05 * torch.cat([gradient.flatten() for gradient in exact]).norm()


@pytest.mark.parametrize(("dtype", "in_32_bits"), [(torch.float16, True), (torch.bfloat16, False)])
def test_decoders_leave_autocast_for_float16_only(dtype: torch.dtype, in_32_bits: bool) -> None:
    auxiliaries, example = auxiliaries_of([Dropout()], dtype=torch.float32), Example(torch.float32)
    found = []
    for enabled in (False, True):
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            found.append(in_groups(example, example.features, auxiliaries))
    assert torch.equal(*found) == in_32_bits


def test_small_gradients_do_not_vanish_in_16_bit_floats() -> None:
    """One of a thousand images: the gradient of a pixel lies below the smallest 16-bit float."""
    example = Example(torch.float32, stride=32, size=(8, 8))
    torch.manual_seed(0)
    decoder = build_decoder("pixelshuffle", CHANNELS, CLASSES, 32)
    auxiliaries = nn.ModuleList([AuxiliaryDecoder(Dropout(), decoder)])
    found = []
    for enabled in (False, True):
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype=torch.float16, enabled=enabled):
            loss = in_groups(example, example.features, auxiliaries)[0]
        found.append(torch.autograd.grad(loss / 1000, example.features)[0])
    assert (found[0] - found[1]).norm() <= 0.02 * found[0].norm()


def test_sixteen_bit_feature_gradients_do_not_vanish_or_overflow() -> None:
    """At the outer scale that a GradScaler starts with."""
    example = Example(torch.float32, classes=21, stride=1, size=(64, 64))
    torch.manual_seed(0)
    auxiliaries = nn.ModuleList(
        AuxiliaryDecoder(Dropout(), build_decoder("pixelshuffle", CHANNELS, 21, stride=1)) for _ in range(6)
    )

    def gradient(leaf: Tensor, scale: float) -> Tensor:
        torch.manual_seed(1)
        loss = in_groups(example, leaf, auxiliaries)[0]
        return torch.autograd.grad(loss * scale, leaf)[0].double() / scale

    with torch.autocast("cpu", dtype=torch.float16):
        half = gradient(example.features.detach().half().requires_grad_(), 65536.0)
    exact = gradient(example.features, 1.0)
    assert half.isfinite().all()
    assert (half - exact).norm() / exact.norm() < 0.02


# Images that are zeroed entirely


def erasing() -> list[tuple[Perturbation, Tensor, Tensor]]:
    """For each perturbation features and object masks with which it can erase the second image and not the first."""
    features = torch.rand(2, CHANNELS, *SIZE, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.1
    second = torch.tensor([False, True]).view(2, 1, 1, 1)
    first_channel = (torch.arange(CHANNELS) == 0).view(1, -1, 1, 1)
    silent, single = features.where(~second, 0), features.where(~second | first_channel, 0)
    objects = torch.zeros(2, 1, *SIZE, dtype=torch.bool)
    objects[0, :, 1:3, 1:3] = True
    return [
        (FeatureNoise(), silent, objects),
        (FeatureDrop(), features.where(~second, 1.0), objects),
        (FeatureDrop(mode="quantile"), silent, objects),
        (Dropout(), single, objects),
        (ObjectMask(), features, objects | second),
        (ContextMask(), features, objects),
        (GuidedCutout(side=1.0), features, objects | second),
        (AdversarialNoise(), silent, objects),
    ]


def seed_that_erases(auxiliary: nn.Module, features: Tensor, objects: ObjectMasks) -> int:
    """The first seed that erases the second image and not the first."""
    for seed in range(100):
        torch.manual_seed(seed)
        if perturbed(auxiliary, features, objects)[1].tolist() == [True, False]:
            return seed
    raise AssertionError("none of a hundred seeds erases the second image only")


@pytest.mark.parametrize("case", erasing(), ids=lambda case: str(case[0]))
def test_an_image_that_is_zeroed_entirely_contributes_0(case: tuple[Perturbation, Tensor, Tensor]) -> None:
    kind, features, masks = case
    auxiliaries, example = auxiliaries_of([kind]), Example()
    example.objects = ObjectMasks(masks)
    leaf = features.clone().requires_grad_()
    seed = seed_that_erases(auxiliaries[0], leaf, example.objects)
    torch.manual_seed(seed)
    losses = in_groups(example, leaf, auxiliaries)
    torch.manual_seed(seed)
    maps, _ = perturbed(auxiliaries[0], leaf, example.objects)
    logits = auxiliaries[0].decoder(maps)[0]  # type: ignore[operator, union-attr]
    # The first image's mean over its pixels, shared among two images.
    squares = (logits.softmax(dim=0) - example.target[0]).square().sum(dim=0)
    torch.testing.assert_close(losses[0], squares[example.valid[0]].mean() / 2, rtol=1e-12, atol=0)
    of_features, *of_weights = gradients(losses[0], leaf, auxiliaries)
    assert of_features[0].any()
    assert not of_features[1].any()
    assert all(gradient.isfinite().all() for gradient in of_weights)


def test_where_every_image_is_zeroed_the_losses_are_0_and_teach_nothing() -> None:
    auxiliaries, example = auxiliaries_of([ContextMask(), ContextMask()]), Example()
    example.objects = ObjectMasks(torch.zeros_like(example.objects.masks))
    losses = in_groups(example, example.features, auxiliaries)
    assert losses.tolist() == [0, 0]
    assert not any(gradient.any() for gradient in gradients(weighted(losses), example.features, auxiliaries))


def test_a_decoder_whose_images_are_all_zeroed_still_counts_among_the_decoders() -> None:
    example = Example()
    example.objects = ObjectMasks(torch.zeros_like(example.objects.masks))
    pair = auxiliaries_of([ObjectMask(), ContextMask()])
    only = nn.ModuleList([pair[0]])  # without objects it changes nothing
    both, one = (in_groups(example, example.features, each) for each in (pair, only))
    torch.testing.assert_close(both, one / 2, rtol=1e-12, atol=0)


# Some of the decoders, some of the pixels


def test_a_sample_of_decoders_estimates_the_mean_over_all_without_bias() -> None:
    """Each pair of four decoders once: the mean over the six pairs of losses and gradients is that of all four."""
    auxiliaries = auxiliaries_of([ObjectMask(), ContextMask()] * 2)  # they draw nothing at random
    example = Example()
    expected = results_of(in_groups, example, auxiliaries)
    pairs: dict[tuple[float, ...], list[Tensor]] = {}
    for seed in range(200):
        sample = results_of(lambda *inputs: in_groups(*inputs, sample=2), example, auxiliaries, seed)
        pairs.setdefault(tuple(sample[0].tolist()), sample)
    assert len(pairs) == 6
    for whole, parts in zip(expected, zip(*pairs.values(), strict=True), strict=True):
        torch.testing.assert_close(torch.stack(parts).mean(dim=0), whole, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("budget", [LOGITS, 100 * LOGITS])
def test_decoders_that_were_not_drawn_have_a_gradient_of_0(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not None: DDP waits for the gradient of every parameter."""
    allow(monkeypatch, budget)
    auxiliaries, example = auxiliaries_of(), Example()
    weighted(in_groups(example, example.features, auxiliaries, sample=3)).backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is not None for parameter in auxiliaries.parameters())
    learning = [
        any(parameter.grad.any() for parameter in auxiliary.parameters())  # type: ignore[union-attr]
        for auxiliary in auxiliaries
    ]
    assert (len(learning), sum(learning)) == (7, 3)


def test_a_sample_of_all_decoders_is_the_whole_mean() -> None:
    auxiliaries, example = auxiliaries_of([ObjectMask(), ContextMask()]), Example()
    sample, whole = (in_groups(example, example.features, auxiliaries, sample=number) for number in (2, 0))
    torch.testing.assert_close(sample, whole)


@every_decoder
def test_the_mean_over_all_grids_is_the_mean_over_all_pixels(decoder: str) -> None:
    auxiliaries, example = auxiliaries_of([ObjectMask(), ContextMask()], decoder=decoder), Example()
    example.valid.fill_(True)

    def on(grid: Grid) -> list[Tensor]:
        losses = example.losses(auxiliaries[0].decoder, grid)  # type: ignore[arg-type]
        computed = auxiliary_losses(example.features, auxiliaries, example.objects, losses, grid=grid)
        return [computed.detach(), *gradients(weighted(computed), example.features, auxiliaries)]

    grids = [on(Grid(2, row, column)) for row in range(2) for column in range(2)]
    for whole, parts in zip(on(ALL_PIXELS), zip(*grids, strict=True), strict=True):
        torch.testing.assert_close(torch.stack(parts).mean(dim=0), whole, rtol=1e-9, atol=1e-15)
