from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from multidomain_cct.data.shards import Shards
from multidomain_cct.training.checkpoint import load_run
from multidomain_cct.training.scoring import arithmetic_and_harmonic, class_iou, confusion_of, mean_iou, score


@given(seed=st.integers(0, 1000), num_classes=st.integers(2, 6))
def test_confusion_counts_every_labelled_pixel_by_truth_and_prediction(seed: int, num_classes: int) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.choice([*range(num_classes), 255], (7, 9)).astype(np.uint8)
    prediction = rng.integers(0, num_classes, (7, 9))
    reference = np.zeros((num_classes, num_classes), dtype=np.int64)
    for t, p in zip(truth.ravel(), prediction.ravel(), strict=True):
        if t != 255:
            reference[t, p] += 1
    assert np.array_equal(confusion_of(torch.from_numpy(truth), torch.from_numpy(prediction), num_classes).numpy(), reference)


def test_iou_is_hits_over_union_and_absent_classes_are_left_out() -> None:
    confusion = np.array([[6, 2, 0], [1, 3, 0], [0, 0, 0]])
    assert class_iou(confusion) == [6 / 9, 3 / 6, None]
    assert mean_iou(confusion) == pytest.approx((6 / 9 + 3 / 6) / 2)


def test_a_class_that_is_only_predicted_counts_as_zero() -> None:
    assert class_iou(np.array([[5, 1], [0, 0]])) == [5 / 6, 0.0]


def test_both_means_over_domains() -> None:
    assert arithmetic_and_harmonic([0.2, 0.6]) == (pytest.approx(0.4), pytest.approx(0.3))
    assert arithmetic_and_harmonic([0.0, 0.6])[1] == 0


def test_a_split_is_scored_once_whole_and_at_the_labels_resolution(tiny_run: Path, two_domains: Path) -> None:
    run = load_run(tiny_run)
    seen: list[str] = []
    shards = Shards.open(two_domains / "shapes", "val")
    result = score(run.model, shards, run.domains["shapes"], "val", run.recipe.evaluation, device=torch.device("cpu"), seen=seen.append)
    assert sorted(seen) == sorted(shards.keys) and result.images == 5
    assert result.sizes == ("96x72",) and result.confusion.sum() == 5 * 94 * 72
    assert "5 images" in result.protocol and "96x72" in result.protocol and "whole image" in result.protocol


def test_parts_of_a_split_add_up_to_the_whole(tiny_run: Path, two_domains: Path) -> None:
    run = load_run(tiny_run)
    shards = Shards.open(two_domains / "shapes", "val")
    whole = score(run.model, shards, run.domains["shapes"], "val", run.recipe.evaluation, device=torch.device("cpu"))
    counts: list[torch.Tensor] = []

    def add(tensor: torch.Tensor) -> torch.Tensor:
        """What a reduction over two processes would do, with the first process's tensors kept for the second."""
        counts.append(tensor.clone())
        return tensor if len(counts) <= 2 else tensor + counts[len(counts) - 3]

    with pytest.raises(AssertionError, match="3 of 5 images were scored"):
        score(run.model, shards, run.domains["shapes"], "val", run.recipe.evaluation, device=torch.device("cpu"), rank=0, world=2, total=add)
    both = score(run.model, shards, run.domains["shapes"], "val", run.recipe.evaluation, device=torch.device("cpu"), rank=1, world=2, total=add)
    assert np.array_equal(both.confusion, whole.confusion) and both.images == 5
