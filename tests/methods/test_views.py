"""Strong views change how a pixel looks and never where it is; patches carry ids and validity with them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from multidomain_cct.methods.views import Mix, draw_cutmix, draw_strong_view, strong_view


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
