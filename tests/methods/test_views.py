"""Strong views change how a pixel looks and never where it is; patches carry ids and validity with them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from multidomain_cct.methods.strong_view import strong_view
from multidomain_cct.methods.views import (
    Mix,
    draw_classmix,
    draw_cutmix,
    draw_half_boxes,
    draw_rare_class,
    draw_strong_view,
)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def two_colours(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(count, 3, 48, 48) uint8 images of an orange ground with one blue rectangle each, and (count, 48, 48) bool, where
    the rectangle is.
    """
    inside = torch.zeros(count, 48, 48, dtype=torch.bool)
    for number in range(count):
        inside[number, 12 + number % 5 : 30, 10 : 32 + number % 7] = True
    colours = torch.tensor([[220, 120, 40], [40, 60, 180]], dtype=torch.uint8)
    return colours[inside.long()].permute(0, 3, 1, 2), inside


def test_a_strong_view_keeps_every_pixel_in_its_place() -> None:
    images, inside = two_colours(40)
    views = strong_view(images)
    assert views.shape == images.shape
    assert views.dtype == torch.uint8
    # Beyond the reach of the blur, 4 pixels, each region keeps one colour, and it is not the other region's.
    shrunk = [
        -F.max_pool2d(-F.pad(region[:, None].float(), [4] * 4, value=1), 9, stride=1)[:, 0] > 0
        for region in (inside, ~inside)
    ]
    colours = []
    for region in shrunk:
        pixels = [view[:, own] for view, own in zip(views, region, strict=True)]
        assert all((own.amax(dim=1) == own.amin(dim=1)).all() for own in pixels)
        colours.append(torch.stack([own[:, 0] for own in pixels]).float())
    assert ((colours[0] - colours[1]).abs().sum(dim=1) > 0).float().mean() > 0.9


def test_strong_views_differ_between_the_images_of_a_batch_and_from_them() -> None:
    image = torch.randint(0, 256, (1, 3, 24, 24), dtype=torch.uint8)
    views = strong_view(image.expand(12, -1, -1, -1))
    assert len({view.numpy().tobytes() for view in views}) == 12
    assert sum(torch.equal(view, image[0]) for view in views) <= 3


def test_strong_views_depend_on_torchs_seed_alone() -> None:
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append((strong_view(images), draw_cutmix(images, probability=1).inside))
    assert all(torch.equal(first, second) for first, second in zip(drawn[0], drawn[1], strict=True))
    assert not torch.equal(drawn[0][0], drawn[2][0])
    assert not torch.equal(drawn[0][1], drawn[2][1])


@pytest.mark.parametrize(("side", "reach"), [(256, 2), (24, 0)])
def test_half_of_the_views_are_blurred_as_far_as_the_crop_is_large(side: int, reach: int) -> None:
    images = torch.zeros(60, 3, side, side, dtype=torch.uint8)
    images[:, :, 12, 12] = 255
    views = strong_view(images)
    changed = (views != views[:, :, :1, :1]).any(dim=1)  # (60, H, W): what is not ground
    rows = changed.any(dim=2).int()
    assert rows[:, 12].all()
    assert rows.sum(dim=1).max() == 2 * reach + 1
    assert rows[:, 12 - reach : 13 + reach].sum() == rows.sum()
    if reach:
        # Half of them, less those whose blur does not reach the next pixel.
        assert 0.25 < (rows.sum(dim=1) > 1).float().mean() < 0.65


def test_most_views_change_in_colour_and_some_are_grey() -> None:
    image = torch.tensor([200, 120, 60], dtype=torch.uint8)[:, None, None]
    views = strong_view(image.expand(300, 3, 2, 2))[:, :, 0, 0].int()
    same = (views == image[:, 0, 0]).all(dim=1).float().mean()
    grey = ((views - views[:, :1]).abs() <= 1).all(dim=1).float().mean()
    assert 0.08 < same < 0.25
    assert 0.12 < grey < 0.3
    assert views.float().std(dim=0).min() > 20


def test_a_step_without_unlabelled_images_has_empty_views() -> None:
    none = torch.empty(0, 3, 16, 16, dtype=torch.uint8)
    mix = draw_cutmix(none)
    assert mix(strong_view(none)).shape == (0, 3, 16, 16)
    assert mix(none[:, 0]).shape == (0, 16, 16)


def test_a_patch_is_a_rectangle_of_the_asked_share_of_the_area() -> None:
    inside = draw_cutmix(torch.empty(400, 3, 64, 80), probability=1).inside
    assert inside.dtype == torch.bool
    assert inside.shape == (400, 64, 80)
    rows, columns = inside.any(dim=2), inside.any(dim=1)
    assert torch.equal(inside, rows[:, :, None] & columns[:, None, :])
    for line in (rows, columns):
        # One run of pixels: it starts once.
        assert (line.int().diff(dim=1, prepend=torch.zeros(400, 1, dtype=torch.int)) == 1).sum(dim=1).eq(1).all()
    area = inside.float().mean(dim=(1, 2))
    # Whole pixels blur the smallest and largest share; a rectangle taller than the image is cut.
    assert area.min() > 0.005
    assert area.max() < 0.45
    assert 0.12 < area.mean() < 0.25
    assert area.std() > 0.05


def test_a_patch_has_the_asked_ratio_of_width_to_height_and_may_be_anywhere() -> None:
    inside = draw_cutmix(torch.empty(400, 3, 64, 80), probability=1, area=(0.1, 0.1), aspect=(3, 3)).inside
    heights, widths = inside.any(dim=2).sum(dim=1), inside.any(dim=1).sum(dim=1)
    height = (0.1 * 64 * 80 / 3) ** 0.5
    assert (heights - height).abs().max() <= 1
    assert (widths - 3 * height).abs().max() <= 1
    tops, lefts = inside.any(dim=2).int().argmax(dim=1), inside.any(dim=1).int().argmax(dim=1)
    for first, room in ((tops, 64 - height), (lefts, 80 - 3 * height)):
        assert first.min() <= 1
        assert first.max() >= room - 1
        assert first.float().mean() == pytest.approx(room / 2, abs=4)


def test_half_boxes_have_half_of_the_area_and_half_to_twice_as_wide_as_high() -> None:
    inside = draw_half_boxes(torch.empty(400, 3, 96, 96), 1.0).inside
    ratio = inside.any(dim=1).sum(dim=1) / inside.any(dim=2).sum(dim=1)
    assert inside.float().mean(dim=(1, 2)).sub(0.5).abs().max() < 0.03
    assert 0.45 < ratio.min() < 0.6
    assert 1.85 < ratio.max() < 2.1


@pytest.mark.parametrize(("probability", "low", "high"), [(0.0, 0, 0), (0.5, 150, 250), (1.0, 400, 400)])
def test_patches_are_drawn_at_their_probability(probability: float, low: int, high: int) -> None:
    inside = draw_cutmix(torch.empty(400, 3, 32, 32), probability=probability).inside
    assert low <= inside.any(dim=(1, 2)).sum() <= high


def test_images_ids_and_validity_are_mixed_alike() -> None:
    count = 3
    inside = torch.rand(count, 6, 5) < 0.5
    mix = Mix(inside)
    images, ids = torch.rand(count, 3, 6, 5), torch.randint(0, 9, (count, 6, 5))
    for number in range(count):
        for row in range(6):
            for column in range(5):
                source = (number - 1) % count if inside[number, row, column] else number
                assert torch.equal(mix(images)[number, :, row, column], images[source, :, row, column])
                assert mix(ids)[number, row, column] == ids[source, row, column]
    valid = ids > 4
    assert torch.equal(mix(valid), mix(ids) > 4)


def test_a_strong_view_comes_with_the_mix_that_its_targets_need() -> None:
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    torch.manual_seed(3)
    view, mix = draw_strong_view(images, 1.0)
    torch.manual_seed(3)
    expected = draw_cutmix(images, probability=1.0)
    assert torch.equal(mix.inside, expected.inside)
    assert torch.equal(view, expected(strong_view(images)))


def test_classmix_pastes_whole_classes() -> None:
    ids = torch.randint(0, 5, (6, 8, 8))
    mix = draw_classmix(ids, 1.0, 7)
    theirs = ids.roll(1, dims=0)
    for image in range(6):
        pasted, left = theirs[image][mix.inside[image]].unique(), theirs[image][~mix.inside[image]].unique()
        assert not set(pasted.tolist()) & set(left.tolist())
        shown = len(theirs[image].unique())
        assert len(pasted) == -(-shown // 2)
    assert not draw_classmix(ids, 0.0, 7).inside.any()
    drawn = torch.stack([draw_classmix(ids, 0.5, 7).inside for _ in range(80)])
    assert 0.4 < drawn.any(dim=(2, 3)).float().mean() < 0.6
    # Every class is pasted now and then.
    assert drawn.any(dim=0).all()


def test_rare_classes_are_pasted_more_often() -> None:
    masks = torch.randint(0, 2, (4, 8, 8), dtype=torch.uint8)
    pasted = draw_rare_class(masks, 400, torch.tensor([0.9, 0.1, 0.0]), 0.5)
    assert 0.85 < pasted.classes.float().mean() < 0.95
    assert 0.4 < pasted.inside.flatten(1).any(dim=1).float().mean() < 0.6
    unlabelled = torch.full((2, 8, 8), 255, dtype=torch.uint8)
    assert not draw_rare_class(unlabelled, 5, torch.tensor([0.5, 0.5]), 1.0).inside.any()


def test_pasted_pixels_are_those_of_a_class_of_a_labelled_image() -> None:
    masks = torch.randint(0, 3, (5, 8, 8), dtype=torch.uint8)
    pasted = draw_rare_class(masks, 90, torch.tensor([0.5, 0.2, 0.3, 0.0]), 1.0)
    assert pasted.inside.equal(masks[pasted.donors] == pasted.classes[:, None, None])
    assert set(pasted.donors.tolist()) == set(range(5))
    # The last class is the rarest, but no image shows it.
    assert set(pasted.classes.tolist()) == {0, 1, 2}
