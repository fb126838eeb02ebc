"""Two domains whose images differ as night and day, one encoder: what evaluation sees is what training saw."""

from collections.abc import Callable

import pytest
import torch

from multidomain_cct.model.encoder import EncoderSettings
from multidomain_cct.model.network import Segmenter, Task

IMAGES = 8


def images(domain: str) -> torch.Tensor:
    """(8, 3, 32, 32) uint8: dark and flat, or bright and rough."""
    noise = torch.randn(IMAGES, 3, 32, 32, generator=torch.Generator().manual_seed(len(domain)))
    return (30 + 8 * noise if domain == "night" else 200 + 40 * noise).clamp(0, 255).to(torch.uint8)


def gap(norm: str, *, together: bool) -> float:
    """Mean difference between the features in training and in evaluation, in standard deviations of the features.

    The images of all steps are the same, so that running statistics settle on what a pass has seen and only a leak is
    left.
    """
    tasks = {name: Task(things=(False, True)) for name in ("night", "day")}
    model = Segmenter(
        EncoderSettings(name="test_resnet", stride=8, context="none", width=32, norm=norm), tasks, decoder="bilinear"
    ).train()
    batch = {(name, "labelled"): images(name) for name in tasks}
    with torch.no_grad():
        for _ in range(120):
            if together:
                trained = dict(model.encode(batch))
            else:
                trained = {key: model.encode({key: content})[key] for key, content in batch.items()}
        model.eval()
        evaluated = model.encode(batch)
    std = float(torch.cat(list(evaluated.values())).std())
    return max(float((trained[key] - evaluated[key]).abs().mean()) / std for key in batch)


@pytest.mark.parametrize("norm", ["shared", "per_domain"])
def test_evaluation_sees_the_features_that_training_saw(figure: Callable[[str, str], None], norm: str) -> None:
    found = gap(norm, together=True)
    assert found <= 0.05
    figure("B8", f"{norm}: gap {found:.3f}")


def test_the_measure_sees_the_leak_of_separate_passes(figure: Callable[[str, str], None]) -> None:
    found = gap("shared", together=False)
    assert found > 0.3
    figure("B8", f"separate passes, for comparison: gap {found:.2f}")
