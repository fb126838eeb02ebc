"""Budgets that cover classes."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from multidomain_cct.data.batches.coverage import covering_order, pixels_per_class
from multidomain_cct.data.batches.streams import DataSettings, DomainSettings, DomainStreams, open_streams
from multidomain_cct.data.domain import Domain, LabelClass, Split
from multidomain_cct.data.shards.index import ShardIndex, index_path
from multidomain_cct.data.shards.reader import Shards
from multidomain_cct.data.shards.scan import index_shard
from multidomain_cct.data.shards.writer import ShardWriter

CLASSES = tuple(LabelClass(f"class {number}", (number, 0, 0)) for number in range(6))
DOMAIN = Domain("fields", "folder", {"train": Split("*.jpg", "*.png")}, CLASSES)


def png(ids: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(ids).save(buffer, "PNG")
    return buffer.getvalue()


def write(root: Path, masks: dict[str, np.ndarray], *, counted: bool = True) -> Path:
    with ShardWriter(root / DOMAIN.name, "train") as writer:
        for key, ids in masks.items():
            pixels = dict(enumerate(np.bincount(ids.ravel(), minlength=256).tolist())) if counted else None
            writer.write(key, image=b"never decoded", mask=png(ids), meta=b"{}", pixels=pixels)
    return root / DOMAIN.name / "train-00000.tar"


def masks(count: int = 40) -> dict[str, np.ndarray]:
    """Class 0 and one other in each; classes 4 and 5 are in two images each."""
    shown = [4, 4, 5, 5, *(1 + number % 3 for number in range(count - 4))]
    return {f"image_{number:02d}": np.array([[0, 0], [0, other]], np.uint8) for number, other in enumerate(shown)}


def opened(root: Path, budget: int | str, *, order: str = "covering", seed: int = 0) -> DomainStreams:
    settings = DomainSettings(labelled=str(budget), order=order)
    return open_streams(DOMAIN, settings, DataSettings(shards=str(root), budget_seed=seed))


def chosen(streams: DomainStreams) -> set[str]:
    return {streams.sources[0].keys[number] for _, number in streams.labelled}


@pytest.mark.parametrize("counted", [True, False])
def test_a_budget_shows_every_class_and_nests(tmp_path: Path, counted: bool) -> None:
    write(tmp_path, masks(), counted=counted)
    smaller: set[str] = set()
    for budget in (5, 6, 10, 20, 40):
        streams = opened(tmp_path, budget)
        assert smaller < chosen(streams)
        assert streams.labelled_classes is not None
        images = streams.labelled_classes.images
        assert images[0] == budget
        assert images[1:].min() >= 1
        assert images[1:4].max() - images[1:4].min() <= 1
        smaller = chosen(streams)
    assert chosen(opened(tmp_path, 10, seed=1)) != chosen(opened(tmp_path, 10))


def test_the_choice_depends_on_the_data_and_not_on_where_the_counts_come_from(tmp_path: Path) -> None:
    write(tmp_path / "counted", masks())
    shard = write(tmp_path / "decoded", dict(reversed(masks().items())), counted=False)
    assert len(ShardIndex.load(index_path(shard)).pixels) == 0
    for budget in (3, 12):
        assert chosen(opened(tmp_path / "counted", budget)) == chosen(opened(tmp_path / "decoded", budget))


def test_a_random_order_reads_no_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, masks(), counted=False)
    monkeypatch.setattr(Shards, "read", lambda *_, **__: pytest.fail("a mask was read"))
    taken = chosen(opened(tmp_path, 10, order="random"))
    assert len(taken) == 10


def test_counts_survive_a_new_index_of_the_same_shard(tmp_path: Path) -> None:
    shard = write(tmp_path, masks(8))
    before = index_path(shard).read_bytes()
    index_shard(shard)
    assert index_path(shard).read_bytes() == before
    assert Shards.open(shard.parent, "train").pixels(0) == {0: 3, 4: 1}


def test_an_unreadable_mask_counts_as_empty(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "train") as writer:
        writer.write("broken", image=b"x", mask=b"no picture", meta=b"{}")
        writer.write("whole", image=b"x", mask=png(np.array([[0, 1], [1, 255]], np.uint8)), meta=b"{}")
    counts = pixels_per_class(Shards.open(tmp_path, "train"), [0, 1], DOMAIN)
    assert counts.tolist() == [[0] * 7, [1, 2, 0, 0, 0, 0, 1]]
    assert covering_order(counts, 2) == [1, 0]


@given(st.lists(st.lists(st.integers(0, 3), min_size=5, max_size=5), min_size=1, max_size=30))
def test_each_class_that_occurs_is_among_as_many_images_as_there_are_classes(rows: list[list[int]]) -> None:
    pixels = np.array(rows) * 100
    order = covering_order(pixels, len(pixels))
    assert sorted(order) == list(range(len(pixels)))
    assert covering_order(pixels, 7) == order[:7]
    classes = pixels[:, :-1] > 0
    assert (classes[order[: classes.shape[1]]].any(0) == classes.any(0)).all()


def test_a_speck_of_a_class_is_not_an_image_of_it() -> None:
    # Class 1 usually covers a tenth of its images; the first image shows one pixel of it.
    pixels = np.array([[9999, 1, 0], [9000, 1000, 0], [9000, 1000, 0]])
    assert covering_order(pixels, 1) == [1]
    # A class that is never larger counts where it is at least as large as usual.
    assert covering_order(np.array([[9999, 1, 0], [9990, 10, 0], [9985, 15, 0]]), 1) == [1]
