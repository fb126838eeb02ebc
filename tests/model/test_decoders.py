"""Decoders bring features to the image's resolution and start without artefacts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from multidomain_cct.model import upsampling
from multidomain_cct.model.decoders import Decoder, Grid, PixelShuffleDecoder, build_decoder, icnr_


@pytest.mark.parametrize("kind", ["pixelshuffle", "bilinear"])
@pytest.mark.parametrize("stride", [1, 2, 8, 16, 32])
def test_logits_have_the_images_resolution_and_one_channel_per_class(kind: str, stride: int) -> None:
    decoder = build_decoder(kind, channels=12, num_classes=5, stride=stride)
    assert decoder(torch.rand(2, 12, 3, 2)).shape == (2, 5, 3 * stride, 2 * stride)


def test_bilinear_undoes_any_stride() -> None:
    assert build_decoder("bilinear", 12, 5, stride=14)(torch.rand(1, 12, 2, 3)).shape == (1, 5, 28, 42)


def test_a_stride_that_is_no_power_of_two_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError) as caught:
        build_decoder("pixelshuffle", 12, 5, stride=14)
    assert "the encoder's stride is 14, not a power of two. Use decoder=bilinear." in str(caught.value)


def test_an_unknown_decoder_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError) as caught:
        build_decoder("unet", 12, 5, stride=8)
    assert str(caught.value) == "decoder is 'unet'; it is one of pixelshuffle, bilinear."


def test_icnr_fills_groups_of_four_equal_rows() -> None:
    weight = nn.Conv2d(6, 24, 1).weight
    icnr_(weight)
    groups = weight.detach().view(6, 4, 6)
    assert torch.equal(groups, groups[:, :1].expand_as(groups))
    assert len(groups[:, 0].unique(dim=0)) == 6 and weight.requires_grad
    # Kaiming's deviation of a row with 6 inputs and a ReLU behind it.
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
    assert negative.max() > 0.2 and not (logits == 0).any()


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
    # Pixel centres of a stride of 4: two pixels beyond each position's centre, four equal steps of a quarter between them.
    weights = torch.tensor([0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1])
    torch.testing.assert_close(row, ends[0, :, :1] + (ends[0, :, 1:] - ends[0, :, :1]) * weights)


# Pixels in the decoder's own order


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("kind", "stride"), [("pixelshuffle", 1), ("pixelshuffle", 2), ("pixelshuffle", 8), ("bilinear", 6)])
def test_pixels_are_those_of_the_picture_in_the_decoders_order(kind: str, stride: int, memory_format: torch.memory_format) -> None:
    decoder, features = trained_looking(kind, stride), torch.rand(2, 16, 3, 5).to(memory_format=memory_format)
    picture = decoder(features)
    assert picture.unique().numel() > picture.numel() // 2  # a wrong order would show
    torch.testing.assert_close(decoder.pixels(features), decoder.in_order(picture))


def test_a_pixelshuffle_decoder_is_its_convolutions_and_shuffles() -> None:
    decoder, features = trained_looking("pixelshuffle", 8), torch.rand(2, 16, 3, 5)
    assert isinstance(decoder, PixelShuffleDecoder)
    expected = decoder.classify(features)
    for number, doubling in enumerate(decoder.doublings):
        expected = F.pixel_shuffle(doubling(expected.relu() if number else expected), 2)
    torch.testing.assert_close(decoder(features), expected)


@pytest.mark.parametrize("grid", [Grid(2, 0, 1), Grid(2, 1, 0), Grid(4, 3, 2), Grid(8, 5, 6)])
@pytest.mark.parametrize("kind", ["pixelshuffle", "bilinear"])
def test_a_grid_leaves_every_so_manyth_pixel_of_every_so_manyth_row(kind: str, grid: Grid) -> None:
    decoder, features = trained_looking(kind, 8), torch.rand(2, 16, 3, 5)
    picture = decoder(features)
    found = decoder.pixels(features, grid)
    assert found.shape == (2, 3, 24 * 40 // grid.step**2)
    torch.testing.assert_close(found, decoder.in_order(picture, grid))
    kept = picture[:, :, grid.row :: grid.step, grid.column :: grid.step]
    torch.testing.assert_close(found.sort(dim=2).values, kept.flatten(2).sort(dim=2).values)


@pytest.mark.parametrize("most", [1, 100, 10**6])
@pytest.mark.parametrize("grid", [Grid(), Grid(2, 0, 1), Grid(8, 5, 6)])
@pytest.mark.parametrize(("kind", "stride"), [("pixelshuffle", 1), ("pixelshuffle", 8), ("bilinear", 8)])
def test_the_upsampling_gives_the_pixels_and_takes_their_gradients_piece_by_piece(
    kind: str, stride: int, grid: Grid, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upsampling, "LOGITS_OF_A_THREAD", most)
    grid = grid if stride > 1 else Grid()
    decoder = trained_looking(kind, stride).double()
    features = torch.rand(2, 16, 3, 5, dtype=torch.float64)
    classify, *weights = (weight[0].detach() for weight in decoder.joined([decoder]))
    coarse = torch.einsum("cd,bdhw->bchw", classify, features).requires_grad_()
    leaves = [coarse, *(weight.requires_grad_() for weight in weights)]
    pixels = decoder.upsampling(coarse.clone(), weights, grid).logits(slice(None))
    torch.testing.assert_close(pixels, decoder.pixels(features, grid), rtol=1e-12, atol=1e-12)
    factors = torch.randn_like(pixels)
    with torch.no_grad():
        by_hand = decoder.upsampling(coarse.clone(), weights, grid)
        pieces, total = by_hand.pieces(), by_hand.no_gradients()
        for piece in pieces:
            logits = by_hand.logits(piece)
            assert len(pieces) == 1 or logits.numel() <= max(most * torch.get_num_threads(), by_hand.values)
            torch.testing.assert_close(logits, by_hand.cut(pixels, piece), rtol=1e-12, atol=1e-12)
            by_hand.add_gradients(piece, by_hand.cut(factors, piece), total)
        assert sum(by_hand.cut(pixels, piece).numel() for piece in pieces) == pixels.numel()
        of_coarse, *found = by_hand.gradients(total)
    expected = torch.autograd.grad(pixels, leaves, factors, allow_unused=True)
    # The logits of the three classes: where the upsampling has a further one, it comes of weights that are 0.
    torch.testing.assert_close(of_coarse.view_as(coarse)[:, :3], expected[0][:, :3], rtol=1e-12, atol=1e-12)
    assert not classify[3:].any() and of_coarse.isfinite().all()
    # As parameters: what keeps a channel of ones is none.
    parameters, gradients = (decoder.separated([classify[None], *(weight[None] for weight in own)]) for own in (weights, found))
    assert all(torch.equal(own[0], parameter) for own, parameter in zip(parameters, decoder.parameters(), strict=True))
    _, *of_parameters = torch.autograd.grad(decoder.pixels(features, grid), list(decoder.parameters()), factors)
    torch.testing.assert_close([gradient[0] for gradient in gradients[1:]], of_parameters, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["pixelshuffle", "bilinear"])
def test_maps_of_any_type_and_leading_dimensions_are_ordered_alike(kind: str) -> None:
    decoder = build_decoder(kind, 16, 3, 4)
    ids = torch.arange(2 * 8 * 12).view(2, 8, 12)
    order = decoder.in_order(ids)
    assert order.shape == (2, 96) and [part.unique().numel() for part in order] == [96, 96]
    assert torch.equal(decoder.in_order(ids < 20), order < 20)
    assert torch.equal(decoder.in_order(ids[:, None].expand(2, 3, 8, 12)), order[:, None].expand(2, 3, 96))


def trained_looking(kind: str, stride: int) -> Decoder:
    """A decoder whose sub-pixels differ."""
    torch.manual_seed(3)
    decoder = build_decoder(kind, 16, 3, stride)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_()
    return decoder
