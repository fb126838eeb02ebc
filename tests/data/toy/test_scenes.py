"""The toy domains: what `make demo` trains on must be the same everywhere, and worth learning."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from multidomain_cct.data.specification import read_domain
from multidomain_cct.data.toy.painter import HEIGHT, WIDTH
from multidomain_cct.data.toy.scenes import CLASSES, SPLITS, render_toy
from multidomain_cct.errors import UserError

DOMAINS = Path(__file__).resolve().parents[3] / "domains"


@pytest.fixture(scope="module", params=list(CLASSES))
def rendered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """(name, raw folder) of each toy domain."""
    folder = tmp_path_factory.mktemp(request.param)
    render_toy(request.param, folder)
    return request.param, folder


def read_split(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, H, W, 3) and masks (N, H, W)."""
    images = sorted((folder / "images" / split).iterdir())
    masks = sorted((folder / "masks" / split).iterdir())
    return np.stack([np.asarray(Image.open(path)) for path in images]), np.stack(
        [np.asarray(Image.open(path)) for path in masks]
    )


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time of writing and bytes of every file."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_raw_tree_holds_one_mask_for_each_image_and_nothing_else(rendered: tuple[str, Path]) -> None:
    _, folder = rendered
    stems = {f"{split}/{split}_{index:03d}" for split, count in SPLITS.items() for index in range(count)}
    assert set(snapshot(folder)) == {f"images/{stem}.jpg" for stem in stems} | {f"masks/{stem}.png" for stem in stems}


def test_images_are_rgb_and_masks_are_eight_bit_ids_of_the_same_size(rendered: tuple[str, Path]) -> None:
    _, folder = rendered
    for split in SPLITS:
        with (
            Image.open(folder / "images" / split / f"{split}_000.jpg") as image,
            Image.open(folder / "masks" / split / f"{split}_000.png") as mask,
        ):
            assert (image.mode, mask.mode) == ("RGB", "L")
            assert image.size == mask.size == (WIDTH, HEIGHT)


def test_the_specification_names_every_split_and_every_id(rendered: tuple[str, Path]) -> None:
    name, folder = rendered
    domain = read_domain(DOMAINS / f"{name}.yaml")
    assert tuple(domain.splits) == tuple(SPLITS)
    assert tuple(label.name for label in domain.classes) == CLASSES[name]
    _, known = domain.id_lookup
    for split in SPLITS:
        _, masks = read_split(folder, split)
        assert known[np.unique(masks)].all()


def test_the_two_domains_share_no_label() -> None:
    assert not set(CLASSES["toy_street"]) & set(CLASSES["toy_room"])


@pytest.mark.parametrize("split", SPLITS)
def test_every_class_has_a_fair_share(rendered: tuple[str, Path], split: str) -> None:
    name, folder = rendered
    _, masks = read_split(folder, split)
    for raw_id, label in enumerate(CLASSES[name]):
        found = masks == raw_id
        assert found.any(axis=(1, 2)).mean() > 0.5, f"{label} is in fewer than half of the {split} masks"
        assert 0.02 < found.mean() < 0.6, f"{label} covers {found.mean():.1%} of the {split} pixels"


def test_no_two_images_are_alike(rendered: tuple[str, Path]) -> None:
    _, folder = rendered
    for kind in ("images", "masks"):
        files = [path.read_bytes() for path in (folder / kind).rglob("*.*")]
        assert len(set(files)) == len(files) == sum(SPLITS.values())


def test_color_alone_does_not_give_the_class_away(rendered: tuple[str, Path]) -> None:
    name, folder = rendered
    (train_images, train_masks), (val_images, val_masks) = read_split(folder, "train"), read_split(folder, "val")
    bins = [(images // 16).astype(np.int64) @ np.array([256, 16, 1]) for images in (train_images, val_images)]
    num_classes = len(CLASSES[name])
    votes = np.bincount((bins[0] * num_classes + train_masks).ravel(), minlength=4096 * num_classes).reshape(
        4096, num_classes
    )
    predicted = votes.argmax(axis=1)[bins[1]]
    iou = [
        ((predicted == c) & (val_masks == c)).sum() / ((predicted == c) | (val_masks == c)).sum()
        for c in range(num_classes)
    ]
    assert np.mean(iou) < 0.4


def test_rendering_again_changes_nothing(rendered: tuple[str, Path]) -> None:
    name, folder = rendered
    before = snapshot(folder)
    render_toy(name, folder)
    assert snapshot(folder) == before


def test_missing_files_come_back_with_the_same_bytes(rendered: tuple[str, Path]) -> None:
    name, folder = rendered
    before = snapshot(folder)
    for missing in (
        "images/train/train_007.jpg",
        "masks/train/train_123.png",
        "images/val/val_000.jpg",
        "masks/val/val_000.png",
    ):
        (folder / missing).unlink()
    render_toy(name, folder)
    after = snapshot(folder)
    assert {path: content for path, (_, content) in after.items()} == {
        path: content for path, (_, content) in before.items()
    }


def test_a_name_that_is_no_toy_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match='can draw toy_street and toy_room, not "toy_garden"'):
        render_toy("toy_garden", tmp_path)
    assert not list(tmp_path.iterdir())
