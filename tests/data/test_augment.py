import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from multidomain_cct.data.augment import PAD, Augment, decode, training_view
from multidomain_cct.data.domain import Domain, LabelClass, Split
from multidomain_cct.data.shards import Record

DOMAIN = Domain("two", "folder", {"train": Split("*.jpg")}, (LabelClass("a", (255, 0, 0)), LabelClass("b", (0, 255, 0))))


def picture() -> tuple[Image.Image, Image.Image]:
    """An image whose red channel is 200 exactly where the mask is 1."""
    ids = np.zeros((48, 64), dtype=np.uint8)
    ids[10:30, 20:50] = 1
    pixels = np.repeat((ids * 200)[:, :, None], 3, axis=2)
    return Image.fromarray(pixels), Image.fromarray(ids)


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def test_image_and_mask_take_the_same_view() -> None:
    image, mask = picture()
    agreement = []
    for seed in range(30):
        view = training_view(image, mask, Augment(scale=[0.5, 2.0]), (32, 32), np.random.default_rng(seed))
        assert torch.equal(view.inside, view.ids != 255)
        agreement.append(((view.image[0] > 100) == (view.ids == 1))[view.inside].float().mean().item())
    assert min(agreement) > 0.95  # the border moves by half a pixel between bilinear and nearest
    assert np.mean(agreement) > 0.98


def test_the_crop_has_its_size_and_padding_is_ignored() -> None:
    image, mask = picture()
    view = training_view(image, mask, Augment(scale=[0.5, 0.5]), (96, 80), np.random.default_rng(0))
    assert view.image.shape == (3, 80, 96) and view.ids.shape == view.inside.shape == (80, 96)
    padding = view.ids == 255
    assert padding.sum() == 80 * 96 - 24 * 32 and torch.equal(view.inside, ~padding)
    assert torch.equal(view.image[:, padding].unique(dim=1)[:, 0], torch.tensor(PAD, dtype=torch.uint8))


def test_pixels_without_a_class_are_inside_all_the_same() -> None:
    image, mask = picture()
    mask = mask.point(lambda train_id: 255 if train_id else 0)
    view = training_view(image, mask, Augment(scale=[1, 1], flip=1), (80, 48), np.random.default_rng(0))
    assert (view.ids == 255).sum() == 20 * 30 + 48 * 16
    # Mirrored, the padding lies on the left.
    assert not view.inside[:, :16].any() and view.inside[:, 16:].all()


def test_an_unlabelled_view_has_no_class_and_marks_padding() -> None:
    view = training_view(picture()[0], None, Augment(scale=[0.5, 0.5], flip=0), (96, 80), np.random.default_rng(0))
    assert (view.ids == 255).all() and view.inside[:24, :32].all() and view.inside.sum() == 24 * 32


def test_a_seed_fixes_the_view_and_seeds_differ() -> None:
    image, mask = picture()
    views = [training_view(image, mask, Augment(), (32, 32), np.random.default_rng(seed)).image for seed in (1, 1, 2)]
    assert torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])


def test_flips_are_drawn_at_their_probability() -> None:
    image, mask = picture()

    def flipped(seed: int, flip: float) -> bool:
        ids = training_view(image, mask, Augment(scale=[1, 1], flip=flip), (64, 48), np.random.default_rng(seed)).ids
        return bool(ids[20, 15] == 1)  # column 15 is in the object only when mirrored

    assert not any(flipped(seed, 0) for seed in range(20)) and all(flipped(seed, 1) for seed in range(20))
    assert 60 < sum(flipped(seed, 0.5) for seed in range(200)) < 140


def test_long_side_takes_the_place_of_scale() -> None:
    view = training_view(picture()[0], None, Augment(long_side=[32, 32]), (64, 64), np.random.default_rng(0))
    assert view.inside.sum() == 32 * 24


def test_palette_masks_are_read_as_indices() -> None:
    image, mask = picture()
    paletted = mask.copy()
    paletted.putpalette([255, 255, 255, 9, 9, 9])
    record = Record("key", Path("s.tar"), encoded(image, "JPEG"), encoded(paletted, "PNG"))
    _, ids = decode(record, DOMAIN)
    assert ids is not None and np.array_equal(np.asarray(ids), np.asarray(mask))


@pytest.mark.parametrize(
    ("image", "mask", "message"),
    [
        (b"no image", None, "the image cannot be read"),
        (None, b"no mask", "the mask cannot be read"),
        (None, encoded(Image.new("L", (4, 4), 2), "PNG"), r"train id 2, but two has the classes 0 to 1"),
        (None, encoded(Image.new("RGB", (4, 4)), "PNG"), "has the mode RGB"),
    ],
)
def test_unusable_bytes_are_named_by_shard_and_key(image: bytes | None, mask: bytes | None, message: str) -> None:
    record = Record("street_7", Path("data/train-00000.tar"), image or encoded(picture()[0], "JPEG"), mask)
    with pytest.raises(ValueError, match=message) as error:
        decode(record, DOMAIN)
    assert str(error.value).startswith("data/train-00000.tar: key 'street_7'")


@pytest.mark.parametrize("settings", [{"scale": [2.0, 1.0]}, {"scale": [1.0]}, {"flip": 1.5}, {"long_side": [0, 5]}])
def test_impossible_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="augment"):
        Augment(**settings)  # type: ignore[arg-type]
