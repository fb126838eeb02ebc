"""Photographs of any size are predicted at the scale of training, in bounded memory, and answered at their own size."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from multidomain_cct.data.batches.views import image_tensor
from multidomain_cct.evaluation import photos
from multidomain_cct.evaluation.inference import InferenceSettings, class_probabilities
from multidomain_cct.evaluation.photos import photo_probabilities, trained_size
from multidomain_cct.model.encoder import EncoderSettings
from multidomain_cct.model.network import Segmenter, Task


@pytest.fixture(scope="module")
def model() -> Segmenter:
    """A network that sees at each position of its features the 32 x 32 pixels of that position only."""
    encoder = EncoderSettings(name="test_convnext", stride=32, context="none", width=32)
    network = Segmenter(encoder, {"room": Task((False,) * 3)}, decoder="pixelshuffle").eval()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.mul_(2)  # sharper answers than those of fresh weights
                centre = module.kernel_size[0] // 2
                if module.stride == (1, 1) and centre:
                    kept = module.weight[..., centre, centre].clone()
                    module.weight.zero_()[..., centre, centre] = kept
    return network


def drawn(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def assembled(model: Segmenter, photo: Image.Image, seen_at: tuple[int, int], **settings: object) -> torch.Tensor:
    """(C, H, W) of all blocks, each pixel of which is given once."""
    result = torch.full((3, photo.height, photo.width), math.nan)
    for (rows, columns), block in photo_probabilities(
        model,
        photo,
        "room",
        seen_at,
        InferenceSettings(**settings),  # type: ignore[arg-type]
    ):
        assert result[:, rows, columns].isnan().all()
        result[:, rows, columns] = block
    assert not result.isnan().any()
    assert result.std() > 0.01
    return result


@pytest.mark.parametrize(
    ("size", "box", "typical", "expected"),
    [
        ((640, 480), (320, 320), None, (320, 240)),
        ((200, 100), (320, 320), None, (200, 100)),  # pack never enlarges
        ((640, 480), (320, 320), (999, 999), (320, 240)),
        ((4000, 3000), None, (400, 300), (400, 300)),
        ((3000, 4000), None, (400, 300), (300, 400)),
        ((100, 75), None, (400, 300), (400, 300)),
        ((599, 449), None, (400, 300), (599, 449)),
        ((267, 201), None, (400, 300), (267, 201)),
        ((4000, 3000), None, None, (4000, 3000)),
        ((1, 5000), None, (40, 30), (1, 2449)),
    ],
)
def test_the_network_sees_a_photograph_at_the_size_of_the_training_images(
    size: tuple[int, int], box: tuple[int, int] | None, typical: tuple[int, int] | None, expected: tuple[int, int]
) -> None:
    found = trained_size(size, box, typical)
    assert found == expected or math.isclose(math.prod(found), math.prod(expected), rel_tol=0.05)
    assert found[0] == expected[0]


@pytest.mark.parametrize("settings", [{}, {"scales": [0.5, 1.0], "flip": True}, {"window": [40, 40]}], ids=str)
@pytest.mark.parametrize(("size", "seen_at"), [((150, 90), (75, 45)), ((30, 20), (90, 60)), ((96, 72), (96, 72))])
def test_blocks_are_what_the_scores_of_an_evaluation_are_made_from(
    model: Segmenter,
    monkeypatch: pytest.MonkeyPatch,
    size: tuple[int, int],
    seen_at: tuple[int, int],
    settings: dict[str, object],
) -> None:
    monkeypatch.setattr(photos, "_BLOCK", 3 * size[0] * 7)  # seven rows at a time
    photo = drawn(*size)
    shrunk = image_tensor(photo.resize(seen_at, Image.Resampling.BICUBIC))[None]
    with torch.no_grad():
        expected = class_probabilities(
            model,
            shrunk,
            "room",
            size[::-1],
            InferenceSettings(**settings),  # type: ignore[arg-type]
        )[0]
    torch.testing.assert_close(assembled(model, photo, seen_at, **settings), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("seen_at", "tolerance"), [((300, 200), 1e-4), ((150, 100), 0.02), ((420, 280), 0.02)])
def test_a_large_photograph_is_seen_in_tiles_with_surroundings(
    model: Segmenter, monkeypatch: pytest.MonkeyPatch, seen_at: tuple[int, int], tolerance: float
) -> None:
    photo = drawn(300, 200)
    whole = assembled(model, photo, seen_at)
    for name, value in (("WHOLE_PIXELS", 64 * 64), ("TILE", 64), ("MARGIN", 32)):
        monkeypatch.setattr(photos, name, value)
    sizes: list[tuple[int, ...]] = []
    hook = model.encoder.register_forward_pre_hook(lambda module, inputs: sizes.append(inputs[0].shape[-2:]))
    tiled = assembled(model, photo, seen_at)
    hook.remove()
    assert len(sizes) == math.prod(math.ceil(side / 64) for side in seen_at)
    assert max(math.prod(size) for size in sizes) <= 160 * 160
    assert (tiled - whole).abs().mean() < tolerance
