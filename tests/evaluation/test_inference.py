"""Whole images are predicted at once or by windows that cover them, and what is averaged is still a probability."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multidomain_cct.errors import UserError
from multidomain_cct.evaluation.inference import InferenceSettings, class_probabilities
from multidomain_cct.model.encoder import EncoderSettings
from multidomain_cct.model.network import Segmenter, Task

CLASSES = 3


def network(*, local: bool = False) -> Segmenter:
    """A network for the domain `room`; a local one sees at each position of its features the pixels of that position
    only.
    """
    encoder = EncoderSettings(name="test_convnext", stride=32, context="none", width=32)
    model = Segmenter(
        encoder, {"room": Task((False,) * CLASSES)}, decoder="pixelshuffle" if local else "bilinear"
    ).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.mul_(2)  # sharper answers than those of fresh weights
                centre = module.kernel_size[0] // 2
                if local and module.stride == (1, 1) and centre:
                    kept = module.weight[..., centre, centre].clone()
                    module.weight.zero_()[..., centre, centre] = kept
    return model


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def predict(model: Segmenter, image: Tensor, size: tuple[int, int] | None = None, **settings: object) -> Tensor:
    with torch.no_grad():
        return class_probabilities(
            model,
            image[None],
            "room",
            size or tuple(image.shape[1:]),  # type: ignore[arg-type]
            InferenceSettings(**settings),  # type: ignore[arg-type]
        )[0]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"window": [64, 32]},
        {"flip": True},
        {"scales": [0.5, 1.0, 1.75]},
        {"window": [40, 40], "overlap": 0.5, "flip": True, "scales": [1.0, 1.5]},
    ],
    ids=str,
)
def test_probabilities_have_the_size_that_was_asked_for_and_sum_to_one(settings: dict[str, object]) -> None:
    model, image = network(), picture(70, 90)
    for size in ((70, 90), (35, 120)):
        probabilities = predict(model, image, size, **settings)
        assert probabilities.shape == (CLASSES, *size)
        assert probabilities.dtype == torch.float32
        assert probabilities.min() >= 0
        torch.testing.assert_close(probabilities.sum(dim=0), torch.ones(size))
        assert probabilities.std() > 0.01


def test_plain_prediction_is_the_softmax_of_the_logits_at_the_size_asked_for() -> None:
    model, image = network(), picture(64, 96)
    logits = model.logits(image[None], "room").detach()
    torch.testing.assert_close(predict(model, image), logits.softmax(dim=1)[0])
    larger = F.interpolate(logits, size=(100, 140), mode="bilinear", align_corners=False)
    torch.testing.assert_close(predict(model, image, (100, 140)), larger.softmax(dim=1)[0])


@pytest.mark.parametrize("window", [[96, 64], [200, 64], [96, 65]])
def test_a_window_as_large_as_the_image_is_the_whole_image(window: list[int]) -> None:
    model, image = network(), picture(64, 96)
    assert torch.equal(predict(model, image, window=window), predict(model, image))


@pytest.mark.parametrize(("window", "overlap"), [([64, 64], 0.5), ([32, 96], 0.0), ([64, 32], 0.0), ([96, 96], 2 / 3)])
def test_windows_give_what_the_whole_image_gives_when_the_network_sees_no_further(
    window: list[int], overlap: float
) -> None:
    model, image = network(local=True), picture(128, 192)
    assert predict(model, image).std() > 0.01
    torch.testing.assert_close(
        predict(model, image, window=window, overlap=overlap), predict(model, image), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("size", "window", "overlap"), [((70, 101), (40, 32), 1 / 3), ((30, 101), (40, 64), 0.0), ((64, 65), (64, 48), 0.9)]
)
def test_logits_are_averaged_over_the_windows_that_see_a_pixel(
    size: tuple[int, int], window: tuple[int, int], overlap: float
) -> None:
    model, image = network(), picture(*size)
    found = predict(model, image, window=list(window), overlap=overlap)
    starts = []
    for length, side in zip(size, window[::-1], strict=True):
        own = list(range(0, max(length - side, 0), max(1, round(side * (1 - overlap))))) + [max(length - side, 0)]
        covered = np.zeros(length)
        for start in own:
            assert 0 <= start
            assert start + min(side, length) <= length
            covered[start : start + side] += 1
        assert covered.min() >= 1
        starts.append(own)
    total, seen = np.zeros((CLASSES, *size)), np.zeros(size)
    for top in starts[0]:
        for left in starts[1]:
            rows, columns = slice(top, top + window[1]), slice(left, left + window[0])
            total[:, rows, columns] += model.logits(image[None, :, rows, columns], "room")[0].detach().double().numpy()
            seen[rows, columns] += 1
    np.testing.assert_allclose(found, torch.from_numpy(total / seen).softmax(dim=0).numpy(), atol=1e-5)


def test_a_symmetric_image_gives_a_symmetric_answer_with_flips() -> None:
    model, half = network(), picture(64, 48)
    image = torch.cat([half, half.flip(-1)], dim=2)
    flipped = predict(model, image, flip=True)
    torch.testing.assert_close(flipped, flipped.flip(-1), rtol=1e-4, atol=1e-5)
    plain = predict(model, image)
    assert not torch.allclose(plain, plain.flip(-1), atol=1e-3)


def test_flips_average_the_image_and_its_mirror_image() -> None:
    model, image = network(), picture(64, 96)
    expected = (predict(model, image) + predict(model, image.flip(-1)).flip(-1)) / 2
    torch.testing.assert_close(predict(model, image, flip=True), expected)


def test_scales_average_their_probabilities() -> None:
    model, image = network(), picture(64, 96)
    expected = torch.stack([predict(model, image, scales=[scale]) for scale in (0.5, 1.0, 1.5)]).mean(dim=0)
    torch.testing.assert_close(predict(model, image, scales=[0.5, 1.0, 1.5]), expected)
    assert not torch.allclose(predict(model, image, scales=[0.5]), predict(model, image), atol=1e-3)


@pytest.mark.parametrize("settings", [{}, {"window": [40, 32], "flip": True, "scales": [0.75, 1.0]}], ids=str)
def test_a_batch_gives_what_its_images_give_alone(settings: dict[str, object]) -> None:
    model, images = network(), torch.stack([picture(70, 90, seed) for seed in range(3)])
    with torch.no_grad():
        found = class_probabilities(model, images, "room", (50, 100), InferenceSettings(**settings))  # type: ignore[arg-type]
    assert found.shape == (3, CLASSES, 50, 100)
    torch.testing.assert_close(
        found, torch.stack([predict(model, image, (50, 100), **settings) for image in images]), rtol=1e-4, atol=1e-5
    )
    assert not torch.allclose(found[0], found[1], atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "key", "allowed"),
    [
        ({"window": [64]}, "evaluation.window is [64]", "[width, height]"),
        ({"window": [64, 0]}, "evaluation.window is [64, 0]", "[width, height]"),
        ({"overlap": 1.0}, "evaluation.overlap is 1.0", "below 1"),
        ({"batch": 0}, "evaluation.batch is 0", "at least 1"),
        ({"scales": []}, "evaluation.scales is []", "above 0"),
        ({"scales": [1.0, 0.0]}, "evaluation.scales is [1.0, 0.0]", "above 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], key: str, allowed: str) -> None:
    with pytest.raises(UserError) as caught:
        InferenceSettings(**settings)  # type: ignore[arg-type]
    assert str(caught.value).startswith(key)
    assert allowed in str(caught.value)
