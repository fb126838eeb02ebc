"""Decoders bring features to the image's resolution, alone and in groups, and start without artefacts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multidomain_cct.errors import UserError
from multidomain_cct.model import decoders
from multidomain_cct.model.decoders import (
    ALL_PIXELS,
    Decoder,
    DecoderGroup,
    Grid,
    PixelShuffleDecoder,
    build_decoder,
    icnr_,
)


@pytest.mark.parametrize("kind", ["pixelshuffle", "bilinear"])
@pytest.mark.parametrize("stride", [1, 2, 8, 16, 32])
def test_logits_have_the_images_resolution_and_one_channel_per_class(kind: str, stride: int) -> None:
    decoder = build_decoder(kind, channels=12, num_classes=5, stride=stride)
    assert decoder(torch.rand(2, 12, 3, 2)).shape == (2, 5, 3 * stride, 2 * stride)


def test_bilinear_undoes_any_stride() -> None:
    assert build_decoder("bilinear", 12, 5, stride=14)(torch.rand(1, 12, 2, 3)).shape == (1, 5, 28, 42)


def test_a_stride_that_is_no_power_of_two_is_refused_with_the_remedy() -> None:
    with pytest.raises(UserError, match=r"stride.* 14\b.*[Uu]se decoder=bilinear"):
        build_decoder("pixelshuffle", 12, 5, stride=14)


def test_an_unknown_decoder_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="decoder is 'unet'.*pixelshuffle, bilinear"):
        build_decoder("unet", 12, 5, stride=8)


def test_icnr_fills_groups_of_four_equal_rows() -> None:
    weight = nn.Conv2d(6, 24, 1).weight
    icnr_(weight)
    groups = weight.detach().view(6, 4, 6)
    assert torch.equal(groups, groups[:, :1].expand_as(groups))
    assert len(groups[:, 0].unique(dim=0)) == 6
    assert weight.requires_grad
    # Kaiming's std of a row with 6 inputs and a ReLU behind it.
    large = torch.empty(4 * 64, 50, 1, 1)
    icnr_(large)
    assert large.std().item() == pytest.approx((2 / 50) ** 0.5, rel=0.05)


@pytest.mark.parametrize("stride", [2, 8])
def test_sub_pixels_of_a_position_start_equal(stride: int) -> None:
    torch.manual_seed(0)
    logits = build_decoder("pixelshuffle", 12, 5, stride)(torch.randn(2, 12, 3, 4)).detach()
    blocks = logits.unflatten(2, (3, stride)).unflatten(4, (4, stride))  # (B, C, h, s, w, s)
    assert torch.equal(blocks, blocks[:, :, :, :1, :, :1].expand_as(blocks))
    assert len(blocks[:, :, :, 0, :, 0].flatten().unique()) > 10


def test_pixelshuffle_logits_may_be_negative() -> None:
    torch.manual_seed(0)
    logits = build_decoder("pixelshuffle", 32, 5, stride=8)(torch.rand(4, 32, 8, 8))
    negative = (logits < 0).double().mean(dim=(0, 2, 3))  # (C,)
    assert negative.max() > 0.2
    assert not (logits == 0).any()


def test_a_pixelshuffle_decoder_fits_a_checkerboard_which_its_start_does_not_show() -> None:
    torch.manual_seed(0)
    decoder = build_decoder("pixelshuffle", 4, 2, stride=2)
    features = torch.ones(1, 4, 2, 2)
    target = (torch.arange(4)[:, None] + torch.arange(4)).remainder(2)[None]
    optimiser = torch.optim.Adam(decoder.parameters(), lr=0.05)
    for _ in range(100):
        loss = nn.functional.cross_entropy(decoder(features), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert torch.equal(decoder(features).argmax(dim=1), target)


def test_bilinear_passes_constants_and_interpolates_between_positions() -> None:
    decoder = build_decoder("bilinear", 3, 2, stride=4)
    flat = decoder(torch.ones(1, 3, 2, 2))
    torch.testing.assert_close(flat, flat[..., :1, :1].expand_as(flat))
    with torch.no_grad():
        ends = decoder.classify(torch.tensor([1.0, 2.0]).expand(1, 3, 1, 2))[..., 0, :]  # (1, C, 2)
        row = decoder(torch.tensor([1.0, 2.0]).expand(1, 3, 1, 2))[0, :, 0]  # (C, 8)
    # With a stride of 4, two pixels lie beyond each position's centre, and four equal steps between two centres.
    weights = torch.tensor([0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1])
    torch.testing.assert_close(row, ends[0, :, :1] + (ends[0, :, 1:] - ends[0, :, :1]) * weights)


# Pixels in the decoder's order

KINDS = [("pixelshuffle", 1), ("pixelshuffle", 2), ("pixelshuffle", 8), ("bilinear", 6)]
GRIDS = [Grid(2, 0, 1), Grid(2, 1, 0), Grid(4, 3, 2), Grid(8, 5, 6)]


def trained_looking(kind: str, stride: int) -> Decoder:
    """A decoder whose sub-pixels differ."""
    decoder = build_decoder(kind, 16, 3, stride)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_()
    return decoder


def trained_group(kind: str, stride: int, size: int = 3, grid: Grid = ALL_PIXELS) -> tuple[DecoderGroup, list[Decoder]]:
    torch.manual_seed(3)
    members = [trained_looking(kind, stride).double() for _ in range(size)]
    return DecoderGroup.of(members, grid), members


def random_features(*shape: int) -> Tensor:
    return torch.rand(*shape, 16, 3, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_pixelshuffle_decoder_is_its_convolutions_and_shuffles(memory_format: torch.memory_format) -> None:
    torch.manual_seed(3)
    decoder, features = trained_looking("pixelshuffle", 8), torch.rand(2, 16, 3, 5).to(memory_format=memory_format)
    assert isinstance(decoder, PixelShuffleDecoder)
    expected = decoder.classify(features)
    for number, doubling in enumerate(decoder.doublings):
        expected = F.pixel_shuffle(doubling(expected.relu() if number else expected), 2)
    torch.testing.assert_close(decoder(features), expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_bilinear_decoder_is_its_convolution_and_torchs_interpolation(memory_format: torch.memory_format) -> None:
    torch.manual_seed(3)
    decoder, features = trained_looking("bilinear", 6), torch.rand(2, 16, 3, 5).to(memory_format=memory_format)
    expected = F.interpolate(decoder.classify(features), scale_factor=6, mode="bilinear", align_corners=False)
    torch.testing.assert_close(decoder(features), expected)


@pytest.mark.parametrize(("kind", "stride"), KINDS)
def test_a_group_gives_each_decoders_logits_for_features_of_its_own_or_shared_ones(kind: str, stride: int) -> None:
    group, members = trained_group(kind, stride)
    for features in (random_features(3, 2), random_features(1, 2)):
        logits = group.logits(group.coarse(features))
        assert logits.numel() == 3 * 2 * group.num_classes * group.num_pixels((3, 5))
        for number, (member, each) in enumerate(zip(members, features.expand(3, -1, -1, -1, -1), strict=True)):
            picture = member(each)
            assert picture.unique().numel() > picture.numel() // 3  # a wrong order would show
            torch.testing.assert_close(logits[number], member.pixels(picture), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(member.picture(logits[number], (3, 5)), picture, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kind", "stride"), KINDS)
def test_autograd_follows_a_group_back_to_its_decoders(kind: str, stride: int) -> None:
    group, members = trained_group(kind, stride)
    features = random_features(3, 2).requires_grad_()
    inputs = [features, *(parameter for member in members for parameter in member.parameters())]
    together = group.logits(group.coarse(features))
    alone = torch.stack([member.pixels(member(each)) for member, each in zip(members, features, strict=True)])
    direction = torch.randn_like(together)
    both = [torch.autograd.grad(logits, inputs, direction, allow_unused=True) for logits in (together, alone)]
    torch.testing.assert_close(both[0], both[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", ["pixelshuffle", "bilinear"])
def test_a_grid_keeps_every_step_th_pixel_and_row(kind: str, grid: Grid) -> None:
    group, (decoder,) = trained_group(kind, 8, 1, grid)
    features = random_features(1, 2)
    picture, logits = decoder(features[0]), group.logits(group.coarse(features))[0]
    assert logits.flatten(2).shape == (2, 3, 24 * 40 // grid.step**2)
    torch.testing.assert_close(logits, decoder.pixels(picture, grid), rtol=1e-12, atol=1e-12)
    kept = picture[:, :, grid.row :: grid.step, grid.column :: grid.step]
    torch.testing.assert_close(logits.flatten(2).sort(dim=2).values, kept.flatten(2).sort(dim=2).values)


@pytest.mark.parametrize("budget", [1, 100, 2000, 10**6])
@pytest.mark.parametrize("grid", [ALL_PIXELS, Grid(2, 0, 1), Grid(8, 5, 6)])
@pytest.mark.parametrize(("kind", "stride"), [("pixelshuffle", 8), ("bilinear", 8)])
def test_the_pieces_are_all_pixels_and_keep_to_the_budget(
    kind: str, stride: int, grid: Grid, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(decoders.LOGITS_AT_ONCE, "cpu", budget)
    group, members = trained_group(kind, stride, 2, grid)
    coarse = group.coarse(random_features(2, 3)).detach()
    logits = group.logits(coarse)
    # Maps that count in how many pieces a pixel is, and that give each pixel's number.
    counts, numbers = (
        torch.zeros(3, *logits.shape[3:]),
        torch.arange(logits[0, :, 0].numel()).view(3, *logits.shape[3:]),
    )
    # At least the pixels of one position, or one column of pixels.
    smallest = 2 * group.num_classes * ((stride // grid.step) ** 2 if kind == "pixelshuffle" else 24 // grid.step)
    for images, part in group.pieces(coarse):
        own = group.logits(coarse[:, images], part)
        assert own.numel() <= max(budget, smallest)
        counts[images][..., part] += 1
        expected = logits.movedim(2, 0).flatten(2)[:, :, numbers[images][..., part].flatten()]
        torch.testing.assert_close(own.movedim(2, 0).flatten(2), expected, rtol=1e-12, atol=1e-12)
    assert (counts == 1).all()


@pytest.mark.parametrize("kind", ["pixelshuffle", "bilinear"])
def test_maps_of_any_type_and_leading_dimensions_are_ordered_alike(kind: str) -> None:
    decoder = build_decoder(kind, 16, 3, 4)
    ids = torch.arange(2 * 8 * 12).view(2, 8, 12)
    order = decoder.pixels(ids)
    assert [image.unique().numel() for image in order] == [96, 96]
    assert torch.equal(decoder.pixels(ids < 20), order < 20)
    assert torch.equal(decoder.pixels(ids[:, None].expand(2, 3, 8, 12)), order[:, None].expand(2, 3, -1, -1))
