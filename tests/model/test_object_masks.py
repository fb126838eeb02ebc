"""Objects are the predicted things of the domain's class table; their regions are those that scipy finds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor

from multidomain_cct.model.object_masks import ObjectMasks, components, objects_of, regions_of

CORNERS_TOO = np.ones((3, 3), dtype=int)


def spiral(size: int) -> np.ndarray:
    """One path of width 1 that winds to the middle, its windings one position apart."""
    mask = np.zeros((size, size), dtype=bool)
    row, column, down, right = 0, -1, 0, 1
    for length in [size, *(side for rest in range(size - 1, 0, -2) for side in (rest, rest))]:
        for _ in range(length):
            row, column = row + down, column + right
            mask[row, column] = True
        down, right = right, -down
    return mask


def snake(height: int, width: int) -> np.ndarray:
    """Every second row, joined at alternating ends."""
    mask = np.zeros((height, width), dtype=bool)
    mask[::2] = True
    mask[1::4, -1] = mask[3::4, 0] = True
    return mask


def staircase(height: int, width: int) -> np.ndarray:
    """Positions that touch at corners only."""
    return (np.arange(height)[:, None] + np.arange(width)) % 2 == 0


@st.composite
def masks(draw: st.DrawFn) -> np.ndarray:
    """(B, h, w) of mixed shapes and orientations, some of them with holes punched in."""
    side = draw(st.integers(1, 14))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    found = []
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["noise", "spiral", "snake", "staircase", "none", "all"]))
        shapes = {
            "noise": rng.random((side, side)) < draw(st.floats(0.1, 0.9)),
            "spiral": spiral(side),
            "snake": snake(side, side),
            "staircase": staircase(side, side),
            "none": np.zeros((side, side), dtype=bool),
            "all": np.ones((side, side), dtype=bool),
        }
        mask = shapes[kind]
        if draw(st.booleans()):
            mask = mask & (rng.random(mask.shape) < 0.9)
        found.append(np.rot90(mask, draw(st.integers(0, 3))))
    return np.stack(found)


def scipy_regions(mask: np.ndarray) -> list[tuple[int, ...]]:
    """Image, area, top, bottom, left, right of every region of a (B, h, w) mask."""
    found = []
    for image, own in enumerate(mask):
        labels, _ = ndimage.label(own, structure=CORNERS_TOO)
        for number, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
            found.append((image, int((labels == number).sum()), rows.start, rows.stop, columns.start, columns.stop))
    return sorted(found)


def our_regions(mask: np.ndarray) -> list[tuple[int, ...]]:
    found = regions_of(torch.from_numpy(mask.copy()))
    (top, left), (bottom, right) = found.start, found.end
    return sorted(zip(*(part.tolist() for part in (found.image, found.area, top, bottom, left, right)), strict=True))


# Components


@settings(max_examples=150, deadline=None)
@given(masks())
def test_components_and_their_boxes_are_those_of_scipy(mask: np.ndarray) -> None:
    labels = components(torch.from_numpy(mask.copy())).numpy()
    for own, expected in zip(labels, (ndimage.label(each, structure=CORNERS_TOO)[0] for each in mask), strict=True):
        pairs = set(zip(own.ravel().tolist(), expected.ravel().tolist(), strict=True))
        # Each number of ours goes with one of scipy's and the other way round; 0 with 0.
        assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
        assert all((a == 0) == (b == 0) for a, b in pairs)
    assert our_regions(mask) == scipy_regions(mask)


@pytest.mark.parametrize(
    "mask",
    [spiral(63), snake(64, 48), snake(48, 64).T, staircase(40, 40)],
    ids=["spiral", "snake", "tall snake", "staircase"],
)
def test_long_and_winding_regions_are_one(mask: np.ndarray) -> None:
    assert our_regions(mask[None]) == scipy_regions(mask[None])
    assert len(our_regions(mask[None])) == 1
    cut = mask.copy()
    cut[tuple(np.argwhere(mask)[len(np.argwhere(mask)) // 2])] = False
    assert our_regions(cut[None]) == scipy_regions(cut[None])


def test_two_spirals_in_each_other_stay_apart() -> None:
    inner = np.zeros((31, 31), dtype=bool)
    inner[4:-4, 4:-4] = spiral(23)
    frame = np.ones((31, 31), dtype=bool)
    frame[1:-1, 1:-1] = False
    assert [area for _, area, *_ in our_regions((inner | frame)[None])] == sorted([int(inner.sum()), int(frame.sum())])


def test_no_objects_are_no_regions() -> None:
    assert our_regions(np.zeros((2, 3, 4), dtype=bool)) == []


def test_the_regions_of_a_batch_are_those_of_its_masks() -> None:
    mask = torch.from_numpy(np.stack([snake(6, 8), staircase(6, 8)]))
    objects = ObjectMasks(mask[:, None])
    assert torch.equal(objects.regions.area, regions_of(mask).area)
    assert objects.regions is objects.regions


# Objects


def prediction(classes: int, stride: int) -> tuple[Tensor, Tensor]:
    """Class probabilities of two images of 3x4 positions, and which pixels are valid."""
    rng = np.random.default_rng(classes)
    probabilities = rng.dirichlet(np.ones(classes), (2, 3 * stride, 4 * stride)).transpose(0, 3, 1, 2)
    return torch.from_numpy(probabilities), torch.from_numpy(rng.random((2, 3 * stride, 4 * stride)) < 0.7)


@pytest.mark.parametrize("stride", [1, 4, 8, 14])
@pytest.mark.parametrize(
    "things",
    [(True, False), (False, True, True), (False, False, True, False, True), (True,) * 4, (False,) * 4],
    ids=str,
)
def test_objects_are_the_predicted_things_at_the_middle_of_each_position(things: tuple[bool, ...], stride: int) -> None:
    target, valid = prediction(len(things), stride)
    expected = np.zeros((2, 1, 3, 4), dtype=bool)
    for image, _, row, column in np.ndindex(expected.shape):
        pixel = (image, row * stride + stride // 2, column * stride + stride // 2)
        thing = things[int(target.numpy().transpose(0, 2, 3, 1)[pixel].argmax())]
        expected[image, 0, row, column] = thing and valid.numpy()[pixel]
    middles = target[:, :, stride // 2 :: stride, stride // 2 :: stride]
    np.testing.assert_array_equal(objects_of(middles, valid, things, stride).numpy(), expected)


def test_class_0_is_an_object_where_the_class_table_says_thing() -> None:
    target = torch.zeros(1, 3, 2, 2).index_fill(1, torch.tensor([0]), 1.0)
    valid = torch.ones(1, 4, 4, dtype=torch.bool)
    assert objects_of(target, valid, (True, False, False), 2).all()
    assert not objects_of(target, valid, (False, True, True), 2).any()


def test_padding_holds_no_object() -> None:
    target, valid = torch.ones(1, 1, 1, 2), torch.ones(1, 4, 8, dtype=torch.bool)
    valid[..., 4:] = False
    assert objects_of(target, valid, (True,), 4).tolist() == [[[[True, False]]]]
