"""Packing gives reproducible shards that hold what the raw files say, and changes nothing when it cannot."""

from __future__ import annotations

import hashlib
import io
import json
import resource
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from multidomain_cct.data.batches.views import decode
from multidomain_cct.data.domain import IGNORE, Domain, LabelClass, Split
from multidomain_cct.data.images import fitted_size
from multidomain_cct.data.packing.encode import JPEG_QUALITY, SIXTEEN_BITS, TURNED, TURNED_ALONE
from multidomain_cct.data.packing.pack import pack
from multidomain_cct.data.shards.index import index_path, shard_paths
from multidomain_cct.data.shards.reader import Shards
from multidomain_cct.errors import UserError

CLASSES = (LabelClass("road", (200, 40, 40), ids=(7,)), LabelClass("car", (40, 180, 60), ids=(3, 26)))
SPLITS = {
    "train": Split("images/train/*", "masks/train/*.png"),
    "val": Split("images/val/*", "masks/val/*.png"),
    "more": Split("images/more/*"),
}
STREET = Domain("street", "folder", SPLITS, CLASSES)
SMALL_SHARDS = 6000
"""Bytes a shard in which a handful of the drawn images fit."""


def save_image(path: Path, size: tuple[int, int], seed: int, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)  # type: ignore[arg-type]


def save_mask(path: Path, ids: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(ids.astype(np.uint8)).save(path)


def raw_ids(seed: int, size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(seed).choice([7, 3, 26, 255], (size[1], size[0]))


def draw(raw: Path, count: int = 20, split: str = "train", size: tuple[int, int] = (16, 12)) -> Path:
    """JPEG images of noise, with masks of raw ids."""
    for number in range(count):
        save_image(raw / "images" / split / f"img_{number:02d}.jpg", size, number)
        save_mask(raw / "masks" / split / f"img_{number:02d}.png", raw_ids(number, size))
    return raw


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty labelled images; not to be changed."""
    return draw(tmp_path_factory.mktemp("raw"))


def digests(out: Path) -> dict[str, str]:
    """sha256 of every file, hidden ones included."""
    return {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


def identity(out: Path) -> dict[str, tuple[int, int]]:
    """What changes when a file is written anew."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.rglob("*") if path.is_file()}


def members(out: Path, split: str = "train") -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for path in shard_paths(out / "street", split):
        with tarfile.open(path) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    return found


def refused(*arguments: object, **options: object) -> str:
    """What is said about raw data that cannot be packed."""
    with pytest.raises(UserError) as caught:
        pack(*arguments, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def interrupted_after(count: int) -> Callable[[Iterable[object], int], Iterator[object]]:
    """A progress display that is interrupted, as by Ctrl-C, once `count` samples have been written."""

    def show(samples: Iterable[object], total: int) -> Iterator[object]:
        for number, sample in enumerate(samples):
            if number == count:
                raise KeyboardInterrupt
            yield sample

    return show


# The same bytes, however they come about


def test_any_number_of_workers_and_a_second_packing_give_equal_bytes(raw: Path, tmp_path: Path) -> None:
    for name, workers in (("one", 1), ("two", 2), ("again", 1)):
        pack(STREET, raw, "train", tmp_path / name, workers=workers, max_shard_bytes=SMALL_SHARDS)
    first = digests(tmp_path / "one")
    assert len([name for name in first if name.endswith(".tar")]) > 2
    assert digests(tmp_path / "two") == first
    assert digests(tmp_path / "again") == first


def test_the_order_in_the_shards_is_not_the_listings(raw: Path, tmp_path: Path) -> None:
    pack(STREET, raw, "train", tmp_path, workers=1)
    keys = Shards.open(tmp_path / "street", "train").keys
    listed = [f"img_{n:02d}" for n in range(20)]
    assert sorted(keys) == listed
    assert list(keys) not in (listed, listed[::-1])


@pytest.mark.parametrize("workers", [1, 2])
def test_packing_again_after_an_interruption_goes_on_behind_the_finished_shards(
    raw: Path, tmp_path: Path, workers: int
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    expected = pack(STREET, raw, "train", whole, workers=1, max_shard_bytes=SMALL_SHARDS)
    with pytest.raises(KeyboardInterrupt):
        pack(STREET, raw, "train", out, workers=workers, max_shard_bytes=SMALL_SHARDS, progress=interrupted_after(9))
    left = identity(out)
    assert 2 <= len(left) < len(identity(whole))
    assert not any(name.startswith(".") for name in left)

    remaining: list[int] = []

    def show(samples: Iterable[object], total: int) -> Iterable[object]:
        remaining.append(total)
        return samples

    summary = pack(STREET, raw, "train", out, workers=1, max_shard_bytes=SMALL_SHARDS, progress=show)
    assert digests(out) == digests(whole)
    assert left.items() <= identity(out).items()
    assert remaining[0] < 20
    assert summary.as_json() == expected.as_json()
    assert summary.shards == expected.shards


def test_what_a_killed_process_leaves_behind_is_in_nobodys_way(raw: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    for folder in (whole, out):
        pack(STREET, raw, "train", folder, workers=1, max_shard_bytes=SMALL_SHARDS)
    *_, last = shard_paths(out / "street", "train")
    # Killed between the writing of the index and the renaming of the shard.
    last.rename(last.with_name(f".{last.name}.tmp"))
    pack(STREET, raw, "train", out, workers=1, max_shard_bytes=SMALL_SHARDS)
    assert digests(out) == digests(whole)


def test_packing_what_is_packed_writes_nothing(raw: Path, tmp_path: Path) -> None:
    first = pack(STREET, raw, "train", tmp_path, workers=1)
    before = identity(tmp_path)
    again = pack(STREET, raw, "train", tmp_path, workers=1)
    assert identity(tmp_path) == before
    assert again.as_json() == first.as_json()
    assert again.shards == first.shards == 1


# What it will not touch


@pytest.mark.parametrize("other", ["class table", "size", "raw files", "no index"])
def test_shards_of_another_packing_are_refused_and_stay(raw: Path, tmp_path: Path, other: str) -> None:
    pack(STREET, raw, "train", tmp_path, workers=1)
    domain, source = STREET, raw
    if other == "class table":
        domain = replace(STREET, classes=CLASSES[::-1])
    if other == "size":
        domain = replace(STREET, size=(8, 8))
    if other == "raw files":
        source = draw(tmp_path / "fewer", count=19)
    shard = shard_paths(tmp_path / "street", "train")[0]
    if other == "no index":
        index_path(shard).unlink()
    before = identity(tmp_path)
    message = refused(domain, source, "train", tmp_path, workers=1)
    assert message.startswith(
        f"{shard} was packed from other raw files, another class table or other settings. Remove it"
    )
    assert identity(tmp_path) == before


def test_shards_that_were_renamed_to_another_split_are_refused(tmp_path: Path) -> None:
    raw = draw(draw(tmp_path / "raw"), split="val")
    pack(STREET, raw, "train", tmp_path, workers=1)
    for path in (tmp_path / "street").iterdir():
        path.rename(path.with_name(path.name.replace("train", "val")))
    assert "was packed from other raw files" in refused(STREET, raw, "val", tmp_path, workers=1)


def test_a_gap_in_the_finished_shards_is_refused(raw: Path, tmp_path: Path) -> None:
    pack(STREET, raw, "train", tmp_path, workers=1, max_shard_bytes=SMALL_SHARDS)
    first, second, *_ = shard_paths(tmp_path / "street", "train")
    first.unlink()
    before = identity(tmp_path)
    message = refused(STREET, raw, "train", tmp_path, workers=1, max_shard_bytes=SMALL_SHARDS)
    assert message.startswith(str(second))
    assert str(first) in message
    assert identity(tmp_path) == before


# Raw data that cannot be used


@pytest.mark.parametrize("workers", [1, 2])
def test_a_mask_of_another_size_is_named_with_its_image(tmp_path: Path, workers: int) -> None:
    raw = draw(tmp_path / "raw", count=3)
    mask = raw / "masks/train/img_01.png"
    save_mask(mask, raw_ids(0, (12, 16)))
    message = refused(STREET, raw, "train", tmp_path / "out", workers=workers)
    assert message.startswith(f"{mask}: the mask is 12x16 but its image is 16x12. Export the mask")
    assert digests(tmp_path / "out") == {}


def test_a_raw_id_without_a_class_is_an_error_where_the_domain_says_so(tmp_path: Path) -> None:
    raw = draw(tmp_path / "raw", count=2)
    ids = np.full((12, 16), 7)
    ids[:2] = 99
    save_mask(raw / "masks/train/img_01.png", ids)
    message = refused(replace(STREET, unknown="error"), raw, "train", tmp_path / "out", workers=1)
    assert message.startswith(
        f"{raw / 'masks/train/img_01.png'}: 32 pixels have the id 99, which no class of street names"
    )
    assert pack(STREET, raw, "train", tmp_path / "out", workers=1).unknown == {"99": 32}


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    raw = draw(tmp_path / "raw", count=2)
    broken = raw / "images/train/img_00.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    assert refused(STREET, raw, "train", tmp_path / "out", workers=1).startswith(f"{broken}: the image cannot be read")


def test_a_full_disk_is_named_with_the_shard_and_leaves_nothing(raw: Path, tmp_path: Path) -> None:
    # The system's limit on the size of a file stands in for a full disk.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, hard))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            pack(STREET, raw, "train", tmp_path, workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.filename == str(tmp_path / "street/train-00000.tar")
    assert digests(tmp_path) == {}


# What lies in the shards


def test_the_summary_counts_images_pixels_unknown_values_and_sizes(tmp_path: Path) -> None:
    raw = draw(tmp_path / "raw", count=3)
    draw(tmp_path / "raw", count=1, split="val", size=(20, 10))  # another split does not count
    save_image(raw / "images/train/img_03.png", (10, 8), 3)
    save_mask(raw / "masks/train/img_03.png", np.array([[7] * 10] * 4 + [[9] * 10] * 3 + [[200] * 10]))
    summary = pack(STREET, raw, "train", tmp_path / "out", workers=1)

    ids = np.concatenate([raw_ids(n, (16, 12)).ravel() for n in range(3)])
    counts = {0: (ids == 7).sum() + 40, 1: np.isin(ids, [3, 26]).sum(), IGNORE: (ids == 255).sum() + 40}
    assert {value: int(n) for value, n in enumerate(summary.pixels) if n} == counts
    assert summary.images == summary.labelled == 4
    assert summary.shards == 1
    assert summary.unknown == {"9": 30, "200": 10}
    assert summary.sizes == {"16x12": 3, "10x8": 1}
    assert summary.image_bytes == sum(
        len(content) for name, content in members(tmp_path / "out").items() if name.endswith(".jpg")
    )


def test_packed_shards_read_back_to_the_original_ids(raw: Path, tmp_path: Path) -> None:
    pack(STREET, raw, "train", tmp_path, workers=1, max_shard_bytes=SMALL_SHARDS)
    shards = Shards.open(tmp_path / "street", "train")
    assert len(shards) == 20
    assert shards.labelled.all()
    to_train = {7: 0, 3: 1, 26: 1, 255: IGNORE}
    for number, key in enumerate(shards.keys):
        image, mask = decode(shards.read(number), STREET)
        assert np.asarray(mask).tolist() == [
            [to_train[value] for value in row] for row in raw_ids(int(key[-2:]), (16, 12)).tolist()
        ]
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(raw / "images/train" / f"{key}.jpg")))


def test_each_sample_says_where_it_came_from(raw: Path, tmp_path: Path) -> None:
    pack(replace(STREET, size=(8, 8)), raw, "train", tmp_path, workers=1)
    assert json.loads(members(tmp_path)["img_04.json"]) == {"size": [16, 12], "source": "images/train/img_04.jpg"}


def test_an_unlabelled_split_has_no_masks(tmp_path: Path) -> None:
    raw = draw(tmp_path / "raw", count=3, split="more")  # masks lie there too, but the split does not name them
    summary = pack(STREET, raw, "more", tmp_path / "out", workers=1)
    assert summary.images == 3
    assert summary.labelled == 0
    assert not summary.pixels.any()
    assert {Path(name).suffix for name in members(tmp_path / "out", "more")} == {".jpg", ".json"}
    assert not Shards.open(tmp_path / "out/street", "more").labelled.any()


def test_masks_are_grey_pngs_of_8_bits_whose_rows_are_stored_as_they_are(raw: Path, tmp_path: Path) -> None:
    # What any reader shows as ids, and the quickest to read.
    pack(STREET, raw, "train", tmp_path, workers=1)
    masks = [content for name, content in members(tmp_path).items() if name.endswith(".png")]
    assert len(masks) == 20
    for content in masks:
        with Image.open(io.BytesIO(content)) as mask:
            assert mask.mode == "L"
            assert mask.info == {}
            ids = np.asarray(mask)
        width, height, *kind = struct.unpack(">IIBBBBB", content[16:29])
        assert ids.shape == (height, width)
        assert kind == [8, 0, 0, 0, 0]
        start = content.index(b"IDAT")
        rows = np.frombuffer(
            zlib.decompress(content[start + 4 : start + 4 + int.from_bytes(content[start - 4 : start])]), dtype=np.uint8
        )
        assert np.array_equal(rows.reshape(height, width + 1), np.pad(ids, ((0, 0), (1, 0))))


def test_a_plain_jpeg_of_the_right_size_is_kept_byte_for_byte(raw: Path, tmp_path: Path) -> None:
    pack(replace(STREET, size=(16, 16)), raw, "train", tmp_path, workers=1)
    packed = members(tmp_path)
    assert all(packed[f"img_{n:02d}.jpg"] == (raw / f"images/train/img_{n:02d}.jpg").read_bytes() for n in range(20))


@pytest.mark.parametrize("kind", ["png", "grey jpeg", "too large"])
def test_any_other_image_is_encoded_as_rgb_jpeg_of_quality_95(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "raw/images/more" / ("a.png" if kind == "png" else "a.jpg")
    save_image(path, (32, 24), 0)
    source = Image.open(path).convert("L" if kind == "grey jpeg" else "RGB")
    source.save(path, **({} if kind == "png" else {"quality": 70}))
    source = Image.open(path).convert("RGB")
    if kind == "too large":
        source = source.resize((16, 12), Image.Resampling.BICUBIC)
    pack(replace(STREET, size=(16, 16) if kind == "too large" else None), tmp_path / "raw", "more", tmp_path, workers=1)
    expected = io.BytesIO()
    source.save(expected, "JPEG", quality=95)
    assert members(tmp_path, "more")["a.jpg"] == expected.getvalue()
    assert JPEG_QUALITY == 95


def test_grey_images_of_16_bits_are_scaled_to_8(tmp_path: Path) -> None:
    shades = np.linspace(0, 65535, 16 * 16).reshape(16, 16).astype(np.uint16)
    path = tmp_path / "raw/images/more/a.png"
    path.parent.mkdir(parents=True)
    Image.fromarray(shades).save(path)
    assert pack(STREET, tmp_path / "raw", "more", tmp_path, workers=1).remarks == {SIXTEEN_BITS: 1}
    stored = np.asarray(Image.open(io.BytesIO(members(tmp_path, "more")["a.jpg"]))).astype(int)
    assert np.abs(stored - (shades // 256)[..., None]).max() <= 3  # what JPEG loses


def test_exif_orientation_is_applied_to_the_image_and_fits_an_upright_mask(tmp_path: Path) -> None:
    lying = np.zeros((16, 24, 3), dtype=np.uint8)
    lying[:, :12] = (255, 0, 0)  # the left half, which orientation 6 turns to the top
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "raw/images/train/a.jpg"
    path.parent.mkdir(parents=True)
    Image.fromarray(lying).save(path, exif=exif, quality=95)
    upright = np.full((24, 16), 7)
    upright[12:] = 3
    save_mask(tmp_path / "raw/masks/train/a.png", upright)
    assert pack(STREET, tmp_path / "raw", "train", tmp_path, workers=1).sizes == {"16x24": 1}
    stored = Image.open(io.BytesIO(members(tmp_path)["a.jpg"]))
    red = np.asarray(stored)[..., 0]
    assert stored.size == (16, 24)
    assert stored.getexif().get(0x0112, 1) == 1
    assert red[:10].min() > 200
    assert red[14:].max() < 50


def draw_turned(raw: Path, orientation: int, *, mask_has_it: bool) -> None:
    """A JPEG whose left half is white in the file, and a mask with the car there."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels, ids = np.zeros((16, 24, 3), dtype=np.uint8), np.full((16, 24), 7, dtype=np.uint8)
    pixels[:, :12], ids[:, :12] = 255, 3
    for folder in ("images", "masks"):
        (raw / folder / "train").mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(raw / "images/train/a.jpg", exif=exif, quality=95)
    Image.fromarray(ids).save(raw / "masks/train/a.png", **({"exif": exif} if mask_has_it else {}))


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_mask_with_the_tag_of_its_image_fits_it(tmp_path: Path, orientation: int) -> None:
    draw_turned(tmp_path / "raw", orientation, mask_has_it=True)
    summary = pack(STREET, tmp_path / "raw", "train", tmp_path, workers=1)
    image, mask = (Image.open(io.BytesIO(members(tmp_path)[name])) for name in ("a.jpg", "a.png"))
    assert np.array_equal(np.asarray(image)[..., 0] > 128, np.asarray(mask) == 1)
    assert summary.remarks == {TURNED: 1}


@pytest.mark.parametrize("orientation", [2, 3, 4])
def test_a_turned_image_whose_mask_has_no_tag_is_counted(tmp_path: Path, orientation: int) -> None:
    draw_turned(tmp_path / "raw", orientation, mask_has_it=False)
    assert pack(STREET, tmp_path / "raw", "train", tmp_path, workers=1).remarks == {TURNED: 1, TURNED_ALONE: 1}


def test_a_mask_as_the_turned_image_is_stored_is_refused_with_the_tag(tmp_path: Path) -> None:
    draw_turned(tmp_path / "raw", 6, mask_has_it=False)
    message = refused(STREET, tmp_path / "raw", "train", tmp_path, workers=1)
    assert "24x16" in message
    assert "16x24" in message
    assert "EXIF orientation 6" in message


# Sizes


@given(
    size=st.tuples(st.integers(1, 4000), st.integers(1, 4000)),
    box=st.none() | st.tuples(st.integers(1, 2000), st.integers(1, 2000)),
)
def test_a_stored_image_fits_the_box_keeps_its_aspect_ratio_and_is_never_enlarged(
    size: tuple[int, int], box: tuple[int, int] | None
) -> None:
    width, height = fitted_size(size, box)
    if box is None or (size[0] <= box[0] and size[1] <= box[1]):
        assert (width, height) == size
        return
    assert 1 <= width <= box[0]
    assert 1 <= height <= box[1]
    assert width == box[0] or height == box[1]  # the largest that fits
    exact = min(box[0] / size[0], box[1] / size[1])
    assert abs(width - size[0] * exact) <= 0.5 + 1e-9 or width == 1
    assert abs(height - size[1] * exact) <= 0.5 + 1e-9 or height == 1


def test_masks_of_scored_splits_keep_their_size_and_training_masks_are_resized_without_new_ids(tmp_path: Path) -> None:
    raw = draw(draw(tmp_path / "raw", count=1, size=(32, 24)), count=1, split="val", size=(32, 24))
    small = replace(STREET, size=(16, 16))
    stored = {}
    for split in ("train", "val"):
        pack(small, raw, split, tmp_path / "out", workers=1)
        stored[split] = decode(Shards.open(tmp_path / "out/street", split).read(0), small)
    full = STREET.id_lookup[0][raw_ids(0, (32, 24))]
    assert stored["train"][0].size == stored["val"][0].size == (16, 12)
    assert np.array_equal(np.asarray(stored["val"][1]), full)
    # Halving by nearest neighbour takes one pixel of each 2 x 2 block, the same of all blocks.
    train = np.asarray(stored["train"][1])
    assert any(np.array_equal(train, full[row::2, column::2]) for row in (0, 1) for column in (0, 1))
