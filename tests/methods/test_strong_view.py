"""Strong views of a batch are torchvision's views of its images, drawn one after the other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import v2

from multidomain_cct.methods.strong_view import BLURRED, GREY, JITTER, JITTERED, blur_of, strong_view


def photographs(count: int, height: int, width: int) -> torch.Tensor:
    """(count, 3, H, W) uint8, smooth with some noise, with saturated, grey and black parts; channels last in memory."""
    coarse = torch.randint(-60, 310, (count, 3, 6, 6)).float()
    images = F.interpolate(coarse, size=(height, width), mode="bilinear") + 4 * torch.randn(count, 3, height, width)
    images[:, :, :4] = images[:, :1, :4]
    return images.clamp(0, 255).to(torch.uint8).contiguous(memory_format=torch.channels_last)


def one_after_the_other(images: torch.Tensor) -> torch.Tensor:
    """What the batch must equal: torchvision's own transforms on every image by itself."""
    view = v2.Compose(
        [
            v2.RandomApply([JITTER], p=JITTERED),
            v2.RandomGrayscale(p=GREY),
            v2.RandomApply([blur_of(images.shape[-2:])], p=BLURRED),
        ]
    )
    return torch.stack([view(image) for image in images])


@pytest.mark.parametrize(("height", "width"), [(40, 40), (96, 300), (300, 264)])
def test_a_batch_equals_torchvisions_views_image_by_image(height: int, width: int) -> None:
    torch.manual_seed(0)
    images = photographs(40, height, width)
    found = []
    for view in (one_after_the_other, strong_view):
        torch.manual_seed(1)
        found.append((view(images).int(), torch.rand(1)))
    (expected, after), (views, after_too) = found
    # Everything is drawn from the same numbers, so that the distribution is the same.
    assert torch.equal(after, after_too)
    # Both round to whole numbers after each operation, where sums of another order may fall to the other side.
    assert (views == expected).float().mean() > 0.999
    assert (views - expected).abs().max() <= 4


def test_an_image_does_not_depend_on_its_memory_format_or_on_autocast() -> None:
    torch.manual_seed(0)
    images = photographs(12, 280, 280)
    found = []
    for given, precision in ((images, None), (images.contiguous(), None), (images, torch.bfloat16)):
        torch.manual_seed(2)
        with torch.autocast("cpu", dtype=precision, enabled=precision is not None):
            found.append(strong_view(given))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
