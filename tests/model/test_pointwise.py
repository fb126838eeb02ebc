"""Products of changed features are those of the features after the change, with the same gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from multidomain_cct.model.pointwise import Change, ChangedProducts, at_each_position, weight_gradients

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
        "factor and noise": Change(torch.rand(IMAGES, 1, HEIGHT, WIDTH) < 0.5, torch.rand(shape, dtype=DOUBLE)),
    }


TOGETHER = {kind: [change] for kind, change in changes().items()} | {
    "several positions": [Change(torch.rand(IMAGES, 1, HEIGHT, WIDTH) < 0.5) for _ in range(3)],
    "several channels": [Change(torch.rand(IMAGES, CHANNELS, 1, 1, dtype=DOUBLE)) for _ in range(3)],
}


def example(convolutions: int = 1) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.rand(IMAGES, CHANNELS, HEIGHT, WIDTH, dtype=DOUBLE), torch.randn(convolutions, OUTPUTS, CHANNELS, dtype=DOUBLE)


@pytest.mark.parametrize("together", TOGETHER.values(), ids=TOGETHER)
def test_values_and_gradients_are_those_of_convolutions_of_the_changed_features(together: list[Change]) -> None:
    features, weights = (tensor.requires_grad_() for tensor in example(len(together)))
    assert ChangedProducts.fit(together)
    each = zip(weights, together, strict=True)
    expected = torch.stack([torch.nn.functional.conv2d(change.of(features), weight[..., None, None]) for weight, change in each], dim=1)  # (B, K, C, h, w)
    direction = torch.randn_like(expected)
    of_features, of_weights = torch.autograd.grad(expected, [features, weights], direction)
    with torch.no_grad():
        products = ChangedProducts(features, weights, together)
        torch.testing.assert_close(products.values, expected.flatten(3), rtol=1e-12, atol=1e-12)
        total = torch.ones_like(features)
        torch.testing.assert_close(products.add_gradients(direction.flatten(3), total), of_weights, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(total - 1, of_features, rtol=1e-12, atol=1e-12)


def test_only_factors_of_positions_or_of_channels_fit_together() -> None:
    known = changes()
    for kind, change in known.items():
        assert ChangedProducts.fit([change])
        for other, following in known.items():
            assert ChangedProducts.fit([change, following]) == (kind == other and kind in ("positions", "channels"))


@pytest.mark.parametrize("change", changes().values(), ids=changes())
def test_totals_of_more_bits_than_the_products_take_their_gradients(change: Change) -> None:
    features, weights = (tensor.float() for tensor in example())
    change = Change(*(part if part is None or part.dtype == torch.bool else part.bfloat16() for part in (change.factor, change.noise)))
    totals = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            products = ChangedProducts(features.bfloat16() if enabled else features, weights, [change])
            assert products.values.dtype == (torch.bfloat16 if enabled else torch.float32)
            totals.append(torch.zeros_like(features))
            products.add_gradients(torch.ones_like(products.values), totals[-1])
    torch.testing.assert_close(*totals, rtol=0.05, atol=0.05)


def test_what_a_mask_hides_may_overflow() -> None:
    features, weights = torch.ones(IMAGES, CHANNELS, HEIGHT, WIDTH, dtype=torch.float16), torch.ones(1, OUTPUTS, CHANNELS, dtype=torch.float16)
    features[..., 0, 0] = 60_000
    mask = torch.ones(IMAGES, 1, HEIGHT, WIDTH, dtype=torch.bool)
    mask[..., 0, 0] = False
    products = ChangedProducts(features, weights, [Change(mask)])
    assert products.values.isfinite().all() and not products.values[..., 0].any()
    assert products.add_gradients(torch.ones_like(products.values), torch.zeros_like(features, dtype=torch.float32)).isfinite().all()


def test_images_of_which_nothing_is_left_are_found_also_behind_weights_of_zero() -> None:
    features, weights = example(2)
    weights[:, 0] = 0  # of the output that is looked at first
    features[1] = 0
    assert ChangedProducts(features, weights[:1], [Change()]).images_left() == [None]  # nothing was changed
    all_kept = Change(torch.ones(IMAGES, 1, HEIGHT, WIDTH, dtype=torch.bool))
    assert [left.tolist() for left in ChangedProducts(features, weights, [all_kept] * 2).images_left() if left is not None] == [[True, False]] * 2


def test_where_something_is_left_of_every_image_none_is_named() -> None:
    features, weights = example(2)
    masks = torch.zeros(2, IMAGES, 1, HEIGHT, WIDTH, dtype=torch.bool)
    masks[..., 2, 3] = True
    masks[1, 0] = False
    whole, part = ChangedProducts(features, weights, [Change(mask) for mask in masks]).images_left()
    assert whole is None and part is not None and part.tolist() == [False, True]


@pytest.mark.parametrize(("inputs", "outputs"), [(3, 7), (7, 3)])
def test_weight_gradients_are_those_of_autograd_image_by_image(inputs: int, outputs: int) -> None:
    torch.manual_seed(3)
    features, weight = torch.randn(IMAGES, inputs, 10, dtype=DOUBLE), torch.randn(IMAGES, outputs, inputs, dtype=DOUBLE, requires_grad=True)
    values = torch.stack([at_each_position(own[None], each)[0] for own, each in zip(features, weight, strict=True)])
    direction = torch.randn_like(values)
    (expected,) = torch.autograd.grad(values, weight, direction)
    torch.testing.assert_close(weight_gradients(features, direction), expected, rtol=1e-12, atol=1e-12)
