"""Which images of a domain a run uses: budgets, further splits, pseudo-labels, and what of a recipe's domain section
cannot be.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from multidomain_cct.data.batches.streams import DataSettings, DomainSettings, DomainStreams, open_streams
from multidomain_cct.data.domain import Domain, LabelClass, Split
from multidomain_cct.data.shards.reader import Shards
from multidomain_cct.data.shards.writer import ShardWriter

CLASSES = (LabelClass("ground", (0, 0, 0)), LabelClass("thing", (255, 255, 255)))


def domain(name: str) -> Domain:
    return Domain(name, "folder", {"train": Split("*.jpg", "*.png"), "more": Split("*.jpg")}, CLASSES)


def picture(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def write(root: Path, name: str, split: str, keys: Sequence[str], *, without_mask: Sequence[str] = ()) -> None:
    with ShardWriter(root / name, split) as writer:
        for key in keys:
            writer.write(key, image=picture("JPEG"), mask=None if key in without_mask else picture("PNG"), meta=b"{}")


def numbered(split: str, count: int) -> list[str]:
    return [f"{split}_{number}" for number in range(count)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """d0 with 6 training images and 4 further ones without masks, d1 with 13 training images."""
    root = tmp_path_factory.mktemp("shards")
    write(root, "d0", "train", numbered("train", 6))
    write(root, "d0", "more", numbered("more", 4), without_mask=numbered("more", 4))
    write(root, "d1", "train", numbered("train", 13))
    return root


def opened(
    root: Path, name: str = "d0", *, use_unlabelled: bool = True, data: DataSettings | None = None, **chosen: object
) -> DomainStreams:
    settings = DomainSettings(**{"labelled": "3", **chosen})  # type: ignore[arg-type]
    return open_streams(
        domain(name), settings, replace(data or DataSettings(), shards=str(root)), use_unlabelled=use_unlabelled
    )


def keys(parts: DomainStreams, kind: str) -> list[str]:
    samples = parts.labelled if kind == "labelled" else parts.unlabelled
    return [parts.sources[source].keys[number] for source, number in samples]


# Budgets


def test_a_budget_splits_the_images_into_labelled_and_the_rest(shards: Path) -> None:
    smaller: set[str] = set()
    for budget in (1, 2, 5):
        parts = opened(shards, labelled=str(budget))
        labelled, rest = set(keys(parts, "labelled")), set(keys(parts, "unlabelled"))
        assert len(labelled) == budget
        assert labelled | rest == set(Shards.open(shards / "d0", "train").keys)
        assert not labelled & rest
        assert smaller < labelled
        smaller = labelled


def test_the_budgets_seed_and_not_the_runs_chooses_the_labels(shards: Path) -> None:
    chosen = [set(keys(opened(shards, "d1", data=DataSettings(budget_seed=seed)), "labelled")) for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]


@pytest.mark.parametrize(("unlabelled", "count"), [("rest", 6), ("all", 6), ("none", 0)])
def test_a_domain_without_labels_has_unlabelled_images_only(shards: Path, unlabelled: str, count: int) -> None:
    parts = opened(shards, labelled="none", unlabelled=unlabelled)
    assert len(parts.labelled) == 0
    assert len(parts.unlabelled) == count


def test_further_splits_add_their_images_without_labels(shards: Path) -> None:
    parts = opened(shards, labelled="all", unlabelled_splits=["more"])
    assert sorted(keys(parts, "unlabelled")) == numbered("more", 4)
    assert len(parts.labelled) == 6


def test_supervised_runs_open_no_unlabelled_images(shards: Path) -> None:
    # d1 has no such splits: they are not even looked for.
    parts = opened(
        shards, "d1", use_unlabelled=False, labelled="all", unlabelled_splits=["more"], weak_split="train_weak"
    )
    assert len(parts.unlabelled) == 0
    assert len(parts.labelled) == 13
    assert len(parts.sources) == 1
    assert parts.weak_source is None


def test_images_without_a_mask_are_unlabelled_whatever_the_budget(tmp_path: Path) -> None:
    write(tmp_path, "d0", "train", numbered("train", 4), without_mask=["train_2", "train_3"])
    parts = opened(tmp_path, labelled="all")
    assert keys(parts, "labelled") == ["train_0", "train_1"]
    assert keys(parts, "unlabelled") == ["train_2", "train_3"]


# Pseudo-labels


@pytest.fixture
def weak(tmp_path: Path) -> Path:
    """d0 with six training images, of which four have pseudo-labels, four further images, and a list that labels
    train_0 and train_1.
    """
    write(tmp_path, "d0", "train", numbered("train", 6))
    write(tmp_path, "d0", "more", numbered("more", 4))
    write(tmp_path, "d0", "train_weak", ["train_1", "train_2", "train_3", "train_4"])
    (tmp_path / "labelled.txt").write_text("train_0\ntrain_1\n")
    return tmp_path


@pytest.mark.parametrize("unlabelled", ["rest", "all"])
def test_an_image_with_pseudo_labels_stands_once_among_the_unlabelled_ones(weak: Path, unlabelled: str) -> None:
    parts = opened(
        weak,
        labelled=str(weak / "labelled.txt"),
        unlabelled=unlabelled,
        unlabelled_splits=["more"],
        weak_split="train_weak",
    )
    assert keys(parts, "labelled") == ["train_0", "train_1"]
    # With `all` the labelled images are used without their labels too, but never with pseudo-labels in place of them.
    again = ["train_0", "train_1"] if unlabelled == "all" else []
    assert sorted(keys(parts, "unlabelled")) == sorted(
        [*again, "train_2", "train_3", "train_4", "train_5", *numbered("more", 4)]
    )
    with_pseudo = {
        parts.sources[source].keys[number] for source, number in parts.unlabelled if source == parts.weak_source
    }
    assert with_pseudo == {"train_2", "train_3", "train_4"}


def test_pseudo_labels_can_be_all_that_is_used_without_labels(weak: Path) -> None:
    parts = opened(weak, labelled=str(weak / "labelled.txt"), unlabelled="none", weak_split="train_weak")
    assert sorted(keys(parts, "unlabelled")) == ["train_2", "train_3", "train_4"]


def test_where_pseudo_labels_are_all_there_is_every_decoder_learns_from_them(weak: Path) -> None:
    parts = opened(weak, labelled="all", train_split="train_weak", weak_split="train_weak")
    assert (
        sorted(keys(parts, "labelled"))
        == sorted(keys(parts, "unlabelled"))
        == ["train_1", "train_2", "train_3", "train_4"]
    )
    assert {source for source, _ in parts.labelled} == {0}
    assert {source for source, _ in parts.unlabelled} == {parts.weak_source}


def test_pseudo_labels_may_stand_for_labels_of_some_images(weak: Path) -> None:
    parts = opened(weak, labelled="1", train_split="train_weak", weak_split="train_weak")
    assert len(parts.labelled) == 1
    assert len(parts.unlabelled) == 4
