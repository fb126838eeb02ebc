"""Pseudo-labels: the most probable classes of a view, and what they weigh."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from multidomain_cct.methods.pseudo_labels import PseudoLabels
from multidomain_cct.methods.views import draw_cutmix


def drawn(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """(2, 4, 6, 6) class probabilities and which pixels are valid."""
    torch.manual_seed(0)
    return torch.randn(2, 4, 6, 6, dtype=torch.float64).softmax(dim=1).to(dtype), torch.rand(2, 6, 6) < 0.8


def test_a_pseudo_label_is_the_most_probable_class_with_its_probability() -> None:
    probabilities, valid = drawn(torch.bfloat16)
    labels = PseudoLabels.of(probabilities, valid)
    assert labels.confidence.dtype == torch.float32
    assert torch.equal(labels.confidence, probabilities.float().amax(dim=1))
    assert torch.equal(probabilities.gather(1, labels.ids.unsqueeze(1))[:, 0].float(), labels.confidence)


def test_ids_confidence_and_validity_are_mixed_alike() -> None:
    probabilities, valid = drawn()
    mix = draw_cutmix(torch.empty(2, 3, 6, 6), probability=1)
    mixed, of_mixed = PseudoLabels.of(probabilities, valid).mixed(mix), PseudoLabels.of(mix(probabilities), mix(valid))
    assert torch.equal(mixed.ids, of_mixed.ids)
    assert torch.equal(mixed.confidence, of_mixed.confidence)
    assert torch.equal(mixed.valid, of_mixed.valid)


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_the_cross_entropy_is_averaged_over_all_valid_pixels(threshold: float) -> None:
    probabilities, valid = drawn()
    labels = PseudoLabels.of(probabilities, valid)
    logits = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    powers = np.exp(logits.numpy())
    p = np.take_along_axis(powers / powers.sum(axis=1, keepdims=True), labels.ids.numpy()[:, None], axis=1)[:, 0]
    kept = (labels.confidence.numpy() >= threshold) & valid.numpy()
    expected = np.mean([-np.log(p[number][kept[number]]).sum() / valid[number].sum().item() for number in (0, 1)])
    assert labels.cross_entropy(logits, threshold).item() == pytest.approx(expected, rel=1e-12)
