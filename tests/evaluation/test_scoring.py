import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from multidomain_cct.data.batches.loader import ScoredImage
from multidomain_cct.data.domain import Domain, LabelClass, Split
from multidomain_cct.data.shards.index import index_path
from multidomain_cct.data.shards.reader import Shards
from multidomain_cct.evaluation.inference import InferenceSettings
from multidomain_cct.evaluation.scoring import (
    Score,
    Share,
    _batches,
    arithmetic_and_harmonic,
    class_iou,
    confusion_of,
    mean_iou,
    score,
)
from multidomain_cct.model.network import Segmenter
from multidomain_cct.training.checkpoints.checkpoint import load_run

TinyShards = Callable[..., Path]


def counted(truth: np.ndarray, prediction: np.ndarray, num_classes: int) -> np.ndarray:
    """The confusion matrix of one image, by its definition."""
    valid = truth != 255
    reference = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(reference, (truth[valid], prediction[valid]), 1)
    return reference


@given(
    seed=st.integers(0, 1000),
    num_classes=st.sampled_from([1, 2, 5, 19, 127, 128, 255]),
    kind=st.sampled_from([np.int64, np.uint8]),
)
def test_confusion_counts_every_labelled_pixel_by_truth_and_prediction(seed: int, num_classes: int, kind: type) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.choice([*range(num_classes), 255, 255], (3, 7, 9)).astype(np.uint8)
    prediction = rng.integers(0, num_classes, (3, 7, 9)).astype(kind)
    found = confusion_of(torch.from_numpy(truth), torch.from_numpy(prediction), num_classes)
    assert found.dtype == torch.int64
    assert np.array_equal(
        found.numpy(), sum(counted(t, p, num_classes) for t, p in zip(truth, prediction, strict=True))
    )


@pytest.mark.parametrize("num_classes", [2, 127, 128, 200])
def test_ignored_pixels_do_not_count_whatever_they_are_predicted_as(num_classes: int) -> None:
    truth = torch.tensor([255, 255, 255, num_classes - 1], dtype=torch.uint8)
    found = confusion_of(truth, torch.tensor([0, num_classes - 1, 255, 1], dtype=torch.uint8), num_classes)
    assert found.sum() == 1
    assert found[num_classes - 1, 1] == 1


def test_confusion_of_ignored_pixels_alone_is_zero_and_its_arguments_stay() -> None:
    truth, prediction = torch.full((4, 4), 255, dtype=torch.uint8), torch.ones(4, 4, dtype=torch.int64)
    assert confusion_of(truth, prediction, 3).equal(torch.zeros(3, 3, dtype=torch.int64))
    assert (truth == 255).all()
    assert (prediction == 1).all()


def test_iou_is_hits_over_union_and_absent_classes_are_left_out() -> None:
    confusion = np.array([[6, 2, 0], [1, 3, 0], [0, 0, 0]])
    assert class_iou(confusion) == [6 / 9, 3 / 6, None]
    assert mean_iou(confusion) == pytest.approx((6 / 9 + 3 / 6) / 2)


def test_a_class_that_is_only_predicted_counts_as_zero() -> None:
    assert class_iou(np.array([[5, 1], [0, 0]])) == [5 / 6, 0.0]


def test_a_score_says_over_what_it_is_a_mean() -> None:
    classes = tuple(LabelClass(name, (number, 0, 0)) for number, name in enumerate("abc"))
    domain = Domain("three", "folder", {"val": Split("*.jpg")}, classes)
    confusion = np.array([[6, 2, 0], [1, 3, 0], [0, 0, 0]])
    made = Score(domain, "val", confusion, np.zeros((4, 3, 3)), ("64x96", "96x72"), InferenceSettings())
    assert made.protocol.startswith("three/val: 4 images at label resolution (2 sizes), ")
    assert made.protocol.endswith(", mean over 2 of 3 classes")
    assert made.iou == {"a": 6 / 9, "b": 3 / 6, "c": None}
    assert made.miou == pytest.approx((6 / 9 + 3 / 6) / 2)
    assert made.pixel_accuracy == 9 / 12
    assert json.loads(json.dumps(made.as_json())) == {
        "split": "val",
        "images": 4,
        "miou": made.miou,
        "pixel_accuracy": 0.75,
        "iou": made.iou,
        "confusion": confusion.tolist(),
        "protocol": made.protocol,
    }


def test_a_score_without_a_labelled_pixel_is_zero() -> None:
    domain = Domain("one", "folder", {"val": Split("*.jpg")}, (LabelClass("a", (0, 0, 0)),))
    made = Score(domain, "val", np.zeros((1, 1)), np.zeros((1, 3, 1)), ("8x8",), InferenceSettings())
    assert (made.miou, made.pixel_accuracy) == (0, 0)


def test_processes_ask_equally_often_whatever_their_shares(
    model: Segmenter, shapes: tuple[Shards, Domain, str]
) -> None:
    def asked(rank: int) -> int:
        times: list[int] = []
        share = Share(rank, 2, lambda count: count * 5 if count.numel() == 1 else count, lambda: times.append(1))
        with pytest.raises(AssertionError, match="of 5 images were scored"):
            score(model, *shapes, InferenceSettings(), share=share)
        return len(times)

    assert asked(0) == asked(1) == 3


def test_both_means_over_domains() -> None:
    assert arithmetic_and_harmonic([0.2, 0.6]) == (pytest.approx(0.4), pytest.approx(0.3))
    assert arithmetic_and_harmonic([0.0, 0.6])[1] == 0


@pytest.fixture
def model(tiny_run: Path) -> Segmenter:
    return load_run(tiny_run).model.to("cpu")


@pytest.fixture
def shapes(tiny_run: Path, two_domains: Path) -> tuple[Shards, Domain, str]:
    """Five images of a domain that the model knows."""
    return Shards.open(two_domains / "shapes", "val"), load_run(tiny_run).domains["shapes"], "val"


def test_a_split_is_scored_once_whole_and_at_the_labels_resolution(
    model: Segmenter, shapes: tuple[Shards, Domain, str]
) -> None:
    asked: list[int] = []
    share = Share(between=lambda: asked.append(1))
    result = score(model, *shapes, InferenceSettings(), share=share)
    assert len(asked) == result.images == 5
    assert result.sizes == ("96x72",)
    assert result.confusion.sum() == 5 * 94 * 72
    for words in ("5 images", "96x72", "whole image"):
        assert words in result.protocol


@pytest.mark.parametrize("training", [False, True])
def test_scoring_leaves_the_model_in_the_mode_it_was_in(
    model: Segmenter, shapes: tuple[Shards, Domain, str], training: bool
) -> None:
    model.train(training)
    modes: list[bool] = []
    model.encoder.register_forward_pre_hook(lambda module, inputs: modes.append(module.training))
    score(model, *shapes, InferenceSettings())
    assert set(modes) == {False}
    assert {module.training for module in model.modules()} == {training}


def shapes_of(model: Segmenter) -> list[int]:
    """A list that grows by the number of images each time the encoder is used."""
    found: list[int] = []
    model.encoder.register_forward_pre_hook(lambda module, inputs: found.append(len(inputs[0])))
    return found


@pytest.mark.parametrize("workers", [0, 1])
def test_images_of_equal_size_are_predicted_together(
    model: Segmenter, shapes: tuple[Shards, Domain, str], workers: int
) -> None:
    sizes = shapes_of(model)
    alone, together = (score(model, *shapes, InferenceSettings(batch=batch), workers=workers) for batch in (1, 2))
    assert sizes == [1] * 5 + [2, 2, 1]
    assert alone.images == together.images == 5
    # Rounding may turn a pixel whose two best classes are all but equal.
    assert np.abs(alone.confusion - together.confusion).sum() <= 4
    assert alone.confusion.sum() == together.confusion.sum()


def test_images_of_equal_size_are_predicted_together_wherever_they_are(
    model: Segmenter, shapes: tuple[Shards, Domain, str], tiny_shards: TinyShards, tmp_path: Path
) -> None:
    domain, sizes, expected = shapes[1], shapes_of(model), 0
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for number, size in enumerate([(96, 72), (96, 72), (64, 96), (96, 72)]):
        folder = tiny_shards(tmp_path / str(number), domain, {f"val{number}": 1}, size=size)
        (shard,) = folder.glob("*.tar")
        index_path(shard).rename(index_path(mixed / f"val-{number:05d}.tar"))
        shard.rename(mixed / f"val-{number:05d}.tar")
        expected += (size[0] - 2) * size[1]
    alone = score(model, Shards.open(mixed, "val"), domain, "val", InferenceSettings())
    sizes.clear()
    result = score(model, Shards.open(mixed, "val"), domain, "val", InferenceSettings(batch=8))
    assert sizes == [3, 1]
    # Each image keeps its own row; rounding may turn single pixels.
    assert np.array_equal(result.counts[:, 1], alone.counts[:, 1])
    assert np.abs(result.counts - alone.counts).sum() <= 8
    assert result.images == 4
    assert result.confusion.sum() == expected
    assert set(result.sizes) == {"96x72", "64x96"}


def test_images_that_wait_for_others_of_their_size_are_few() -> None:
    items = [
        (number, ScoredImage(str(number), torch.empty(3, number % 5, 1), torch.empty(1, 1))) for number in range(9)
    ]
    seen = []
    batches = [(len(seen), [number for number, _ in batch]) for batch in _batches(items, 2, lambda: seen.append(1))]
    assert sorted(number for _, batch in batches for number in batch) == list(range(9))
    assert batches[0] == (6, [0, 5])
    alone = [item for item in items if item[0] < 5]
    seen.clear()
    # With batches of one, nothing waits.
    assert [(len(seen), len(batch)) for batch in _batches(alone, 1, lambda: seen.append(1))] == [
        (n, 1) for n in range(1, 6)
    ]
    many = [(number, ScoredImage("", torch.empty(3, number, 1), torch.empty(1, 1))) for number in range(20)]
    seen.clear()
    assert next(_batches(many, 2, lambda: seen.append(1)))[0][0] == 0
    assert len(seen) == 9


def test_parts_of_a_split_add_up_to_the_whole(model: Segmenter, shapes: tuple[Shards, Domain, str]) -> None:
    counts: list[torch.Tensor] = []

    def add(tensor: torch.Tensor) -> torch.Tensor:
        """What a reduction over two processes would do, with the first process's tensors kept for the second."""
        counts.append(tensor.clone())
        return tensor if len(counts) <= 3 else tensor + counts[len(counts) - 4]

    with pytest.raises(AssertionError, match="3 of 5 images were scored"):
        score(model, *shapes, InferenceSettings(), share=Share(0, 2, add))
    both = score(model, *shapes, InferenceSettings(), share=Share(1, 2, add))
    alone = score(model, *shapes, InferenceSettings())
    assert np.array_equal(both.confusion, alone.confusion)
    assert np.array_equal(both.counts, alone.counts)
    right, truth, predicted = alone.counts.sum(0)
    assert np.array_equal(right, alone.confusion.diagonal())
    assert np.array_equal(truth, alone.confusion.sum(1))
    assert np.array_equal(predicted, alone.confusion.sum(0))
    assert both.images == 5
