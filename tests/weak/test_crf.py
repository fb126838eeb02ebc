"""The dense random field agrees with a direct float64 mean field, and does what it is there for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from multidomain_cct.errors import UserError
from multidomain_cct.weak.crf import CrfSettings, DenseCrf, Lattice, appearance_features

SIZE = (24, 20)


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(axis=0))
    return powers / powers.sum(axis=0)


def exact_kernel(points: np.ndarray) -> np.ndarray:
    """(N, N) Gaussian of standard deviation 1 between (d, N) points, symmetrically normalised."""
    kernel = np.exp(-0.5 * ((points[:, :, None] - points[:, None]) ** 2).sum(axis=0))
    scale = kernel.sum(axis=1) ** -0.5
    return scale[:, None] * kernel * scale


def direct_mean_field(probabilities: np.ndarray, image: np.ndarray, settings: CrfSettings) -> np.ndarray:
    """Mean field with all N x N pairs, in float64."""
    height, width = image.shape[1:]
    position = np.indices((height, width), dtype=np.float64).reshape(2, -1)
    color = image.reshape(3, -1).astype(np.float64)
    smooth = exact_kernel(position / settings.smooth_position)
    appearance = exact_kernel(np.concatenate([position / settings.color_position, color / settings.color_value]))
    coupling = settings.smooth_weight * smooth + settings.color_weight * appearance
    unary = np.log(probabilities.reshape(len(probabilities), -1))
    belief = softmax(unary)
    for _ in range(settings.iterations):
        belief = softmax(unary + belief @ coupling)
    return belief.reshape(probabilities.shape)


def blurred_noise(rng: np.random.Generator, channels: int, size: tuple[int, int]) -> np.ndarray:
    """(channels, H, W) smooth random planes of about unit standard deviation."""
    coarse = torch.from_numpy(rng.normal(0, 1.5, (1, channels, 5, 5)))
    fine: Tensor = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic", align_corners=False)[0]
    return fine.numpy()


def example(seed: int, size: tuple[int, int] = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """(4, H, W) uncertain probabilities, and a (3, H, W) image of three coloured regions with grain, whose borders the
    probabilities follow in part only.
    """
    rng = np.random.default_rng(seed)
    regions = blurred_noise(rng, 3, size).argmax(axis=0)
    colors = np.array([[200, 60, 50], [60, 180, 70], [50, 80, 190]])[regions].transpose(2, 0, 1)
    image = np.clip(colors + rng.normal(0, 6, colors.shape), 0, 255).astype(np.uint8)
    hint = np.eye(4)[regions].transpose(2, 0, 1)
    return softmax(1.5 * hint + blurred_noise(rng, 4, size)), image


def refined(probabilities: np.ndarray, image: np.ndarray, settings: CrfSettings) -> np.ndarray:
    return DenseCrf(torch.from_numpy(image), settings)(torch.from_numpy(probabilities)).numpy()


@pytest.mark.parametrize("seed", range(4))
def test_the_smoothness_kernel_alone_is_exact(seed: int) -> None:
    probabilities, image = example(seed)
    settings = CrfSettings(color_weight=0)
    assert (
        np.abs(refined(probabilities, image, settings) - direct_mean_field(probabilities, image, settings)).max() < 1e-5
    )


@pytest.mark.parametrize(("size", "agreement", "difference"), [((24, 20), 0.97, 0.015), ((48, 40), 0.999, 0.001)])
def test_labels_agree_with_the_direct_mean_field(size: tuple[int, int], agreement: float, difference: float) -> None:
    """Over eight images. The lattice approximates: a region whose classes are about equal may tip over as a whole, so
    single pixels may differ by up to 1.

    On an image as small as the first, the 480 points lie thinly in the five dimensions; the second shows what is usual.
    """
    pairs = [
        (refined(*case, CrfSettings()), direct_mean_field(*case, CrfSettings()))
        for case in (example(seed, size) for seed in range(8))
    ]
    assert np.mean([found.argmax(axis=0) == exact.argmax(axis=0) for found, exact in pairs]) >= agreement
    assert np.mean([np.abs(found - exact) for found, exact in pairs]) < difference


@pytest.mark.parametrize("seed", range(4))
def test_the_lattice_filters_as_the_gaussian_within_five_percent(seed: int) -> None:
    probabilities, image = example(seed)
    values = torch.from_numpy(probabilities).float().flatten(1).T.contiguous()
    features = appearance_features(torch.from_numpy(image), CrfSettings())
    exact = exact_kernel(features.double().numpy()) @ values.double().numpy()
    assert np.linalg.norm(Lattice(features)(values).numpy() - exact) / np.linalg.norm(exact) < 0.05


def test_the_lattice_of_a_plane_that_is_densely_covered_is_within_two_percent() -> None:
    grid = np.indices((40, 40)).reshape(2, -1)
    values = np.stack([np.sin(0.2 * grid[0]) + 1, np.cos(0.15 * grid[1]) + 1], axis=1)
    exact = exact_kernel(grid / 2.0) @ values
    found = Lattice(torch.from_numpy(grid / 2.0).float())(torch.from_numpy(values).float()).numpy()
    assert np.linalg.norm(found - exact) / np.linalg.norm(exact) < 0.02


@pytest.mark.parametrize("seed", range(3))
def test_probabilities_sum_to_one(seed: int) -> None:
    found = refined(*example(seed, (30, 17)), CrfSettings(iterations=3))
    assert np.allclose(found.sum(axis=0), 1, atol=1e-5)
    assert (found >= 0).all()


def test_one_class_on_a_constant_image_stays() -> None:
    probabilities = np.stack([np.full(SIZE, 0.9), np.full(SIZE, 0.1)])
    found = refined(probabilities, np.full((3, *SIZE), 128, dtype=np.uint8), CrfSettings())
    assert (found[0] > 0.9).all()


def test_a_single_wrong_pixel_in_an_even_region_is_repaired() -> None:
    probabilities = np.stack([np.full(SIZE, 0.7), np.full(SIZE, 0.3)])
    probabilities[:, 10, 10] = 0.3, 0.7
    found = refined(probabilities, np.full((3, *SIZE), 90, dtype=np.uint8), CrfSettings())
    assert found[0, 10, 10] > 0.5


def test_borders_snap_to_edges_of_colour() -> None:
    """The probabilities put the border four columns to the right of where the colours change."""
    image = np.zeros((3, *SIZE), dtype=np.uint8)
    image[0, :, :10], image[2, :, 10:] = 220, 220
    probabilities = np.where(np.arange(SIZE[1]) < 14, 0.7, 0.3)[None].repeat(SIZE[0], axis=0)
    found = refined(np.stack([probabilities, 1 - probabilities]), image, CrfSettings())
    assert (found.argmax(axis=0) == (np.arange(SIZE[1]) >= 10)).all()


def test_no_iterations_and_no_kernels_leave_the_probabilities_as_they_are() -> None:
    probabilities, image = example(0)
    assert np.allclose(refined(probabilities, image, CrfSettings(iterations=0)), probabilities, atol=1e-6)
    assert np.allclose(
        refined(probabilities, image, CrfSettings(smooth_weight=0, color_weight=0)), probabilities, atol=1e-6
    )


def test_classes_of_probability_zero_stay_finite() -> None:
    probabilities = np.stack([np.ones(SIZE), np.zeros(SIZE)])
    assert np.isfinite(refined(probabilities, np.zeros((3, *SIZE), dtype=np.uint8), CrfSettings())).all()


def test_the_same_image_gives_the_same_bytes_whatever_was_refined_before() -> None:
    probabilities, image = example(1)
    field = DenseCrf(torch.from_numpy(image), CrfSettings())
    first = field(torch.from_numpy(probabilities))
    field(torch.rand(7, *SIZE))
    assert torch.equal(field(torch.from_numpy(probabilities)), first)
    assert np.array_equal(refined(probabilities, image, CrfSettings()), first.numpy())


def test_problems_on_one_image_that_are_refined_together_do_not_mix() -> None:
    (first, image), (second, _) = example(0), example(1)
    field, both = DenseCrf(torch.from_numpy(image), CrfSettings()), torch.from_numpy(np.stack([first, second]))
    for found, alone in zip(field(both), both, strict=True):
        assert torch.allclose(found, field(alone), atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 1)])
def test_images_of_one_row_or_column_are_refined(size: tuple[int, int]) -> None:
    found = refined(np.full((3, *size), 1 / 3), np.zeros((3, *size), dtype=np.uint8), CrfSettings(iterations=2))
    assert np.allclose(found, 1 / 3, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "key", "allowed"),
    [
        ({"iterations": -1}, "crf.iterations is -1", "at least 0"),
        ({"smooth_position": 0.0}, "crf.smooth_position is 0.0", "at least 1"),
        ({"color_value": -5.0}, "crf.color_value is -5.0", "at least 1"),
        ({"color_weight": -1.0}, "crf.color_weight is -1.0", "at least 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], key: str, allowed: str) -> None:
    with pytest.raises(UserError, match=f"{key}.*{allowed}"):
        CrfSettings(**settings)  # type: ignore[arg-type]
