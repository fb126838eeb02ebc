"""Products of changed features are those of the features after the change, with the same gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from multidomain_cct.model.pointwise import Change, ChangedProduct, at_each_position, weight_gradients

IMAGES, CHANNELS, OUTPUTS, HEIGHT, WIDTH = 2, 6, 3, 4, 5
DOUBLE = torch.float64


def changes() -> dict[str, Change]:
    torch.manual_seed(1)
    shape = (IMAGES, CHANNELS, HEIGHT, WIDTH)
    return {
        "nothing": Change(),
        "positions": Change(torch.rand(IMAGES, 1, HEIGHT, WIDTH) < 0.5),
        "channels": Change(torch.rand(IMAGES, CHANNELS, 1, 1, dtype=DOUBLE)),
        "values": Change(torch.rand(shape, dtype=DOUBLE)),
        "noise": Change(noise=torch.rand(shape, dtype=DOUBLE)),
    }


def example() -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.rand(IMAGES, CHANNELS, HEIGHT, WIDTH, dtype=DOUBLE), torch.randn(OUTPUTS, CHANNELS, dtype=DOUBLE)


@pytest.mark.parametrize("change", changes().values(), ids=changes())
def test_values_and_gradients_are_those_of_a_convolution_of_the_changed_features(change: Change) -> None:
    features, weight = (tensor.requires_grad_() for tensor in example())
    expected = torch.nn.functional.conv2d(change.of(features), weight[..., None, None])
    direction = torch.randn_like(expected)
    of_features, of_weight = torch.autograd.grad(expected, [features, weight], direction)
    with torch.no_grad():
        product = ChangedProduct(features, weight, change)
        torch.testing.assert_close(product.values, expected.flatten(2), rtol=1e-12, atol=1e-12)
        total = torch.ones_like(features)
        given = direction.flatten(2).clone()
        torch.testing.assert_close(product.add_gradients(given, total), of_weight, rtol=1e-12, atol=1e-12)
        assert torch.equal(given, direction.flatten(2))  # several terms of a loss may have it
    torch.testing.assert_close(total - 1, of_features, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("change", changes().values(), ids=changes())
def test_totals_of_more_bits_than_the_products_take_their_gradients(change: Change) -> None:
    features, weight = (tensor.float() for tensor in example())
    change = Change(*(part if part is None or part.dtype == torch.bool else part.bfloat16() for part in (change.factor, change.noise)))
    totals = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            product = ChangedProduct(features.bfloat16() if enabled else features, weight, change)
            assert product.values.dtype == (torch.bfloat16 if enabled else torch.float32)
            totals.append(torch.zeros_like(features))
            product.add_gradients(torch.ones_like(product.values), totals[-1])
    torch.testing.assert_close(*totals, rtol=0.05, atol=0.05)


def test_images_of_which_nothing_is_left_are_found_also_behind_weights_of_zero() -> None:
    features, weight = example()
    weight[0] = 0  # of the output that is looked at first
    features[1] = 0
    assert ChangedProduct(features, weight, Change()).images_left() is None  # nothing was changed
    left = ChangedProduct(features, weight, Change(torch.ones(IMAGES, 1, HEIGHT, WIDTH, dtype=DOUBLE))).images_left()
    assert left is not None and left.tolist() == [True, False]


def test_where_something_is_left_of_every_image_none_is_named() -> None:
    features, weight = example()
    mask = torch.zeros(IMAGES, 1, HEIGHT, WIDTH, dtype=torch.bool)
    mask[:, :, 2, 3] = True
    assert ChangedProduct(features, weight, Change(mask)).images_left() is None
    mask[0] = False
    left = ChangedProduct(features, weight, Change(mask)).images_left()
    assert left is not None and left.tolist() == [False, True]


@pytest.mark.parametrize(("inputs", "outputs"), [(3, 7), (7, 3)])
def test_weight_gradients_are_those_of_autograd_image_by_image(inputs: int, outputs: int) -> None:
    torch.manual_seed(3)
    features, weight = torch.randn(IMAGES, inputs, 10, dtype=DOUBLE), torch.randn(IMAGES, outputs, inputs, dtype=DOUBLE, requires_grad=True)
    values = torch.stack([at_each_position(own[None], each)[0] for own, each in zip(features, weight, strict=True)])
    direction = torch.randn_like(values)
    (expected,) = torch.autograd.grad(values, weight, direction)
    torch.testing.assert_close(weight_gradients(features, direction), expected, rtol=1e-12, atol=1e-12)
