import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from multidomain_cct.data.batches.views import PAD, Augment, View, decode, training_view
from multidomain_cct.data.domain import Domain, LabelClass, Split
from multidomain_cct.data.images import decode_smaller, decoded, open_image
from multidomain_cct.data.shards.reader import Record
from multidomain_cct.errors import UserError

DOMAIN = Domain(
    "two", "folder", {"train": Split("*.jpg")}, (LabelClass("a", (255, 0, 0)), LabelClass("b", (0, 255, 0)))
)


def picture() -> tuple[Image.Image, Image.Image]:
    """An image whose red channel is 200 exactly where the mask is 1."""
    ids = np.zeros((48, 64), dtype=np.uint8)
    ids[10:30, 20:50] = 1
    pixels = np.repeat((ids * 200)[:, :, None], 3, axis=2)
    return Image.fromarray(pixels), Image.fromarray(ids)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def view_of(image: bytes, mask: Image.Image | None, augment: Augment, crop: tuple[int, int], seed: int = 0) -> View:
    record = Record("key", Path("s.tar"), image, None if mask is None else encoded(mask, "PNG"))
    return training_view(record, DOMAIN, augment, crop, np.random.default_rng(seed))


def exact_view(
    image: Image.Image, mask: Image.Image | None, augment: Augment, crop: tuple[int, int], seed: int = 0
) -> View:
    """The view of an image stored without loss, which is never decoded smaller."""
    return view_of(encoded(image, "PNG"), mask, augment, crop, seed)


def test_image_and_mask_take_the_same_view() -> None:
    image, mask = picture()
    agreement = []
    for seed in range(30):
        view = exact_view(image, mask, Augment(scale=[0.5, 2.0]), (32, 32), seed)
        assert torch.equal(view.inside, view.ids != 255)
        agreement.append(((view.image[0] > 100) == (view.ids == 1))[view.inside].float().mean().item())
    assert min(agreement) > 0.95  # the border moves by half a pixel between bilinear and nearest
    assert np.mean(agreement) > 0.98


def test_the_crop_has_its_size_and_padding_is_ignored() -> None:
    image, mask = picture()
    view = exact_view(image, mask, Augment(scale=[0.5, 0.5]), (96, 80))
    assert view.image.shape == (3, 80, 96)
    assert view.ids.shape == view.inside.shape == (80, 96)
    padding = view.ids == 255
    assert padding.sum() == 80 * 96 - 24 * 32
    assert torch.equal(view.inside, ~padding)
    assert torch.equal(view.image[:, padding].unique(dim=1)[:, 0], torch.tensor(PAD, dtype=torch.uint8))


def test_pixels_without_a_class_are_inside_all_the_same() -> None:
    image, mask = picture()
    mask = mask.point(lambda train_id: 255 if train_id else 0)
    view = exact_view(image, mask, Augment(scale=[1, 1], flip=1), (80, 48))
    assert (view.ids == 255).sum() == 20 * 30 + 48 * 16
    # Mirrored, the padding lies on the left.
    assert not view.inside[:, :16].any()
    assert view.inside[:, 16:].all()


def test_an_unlabelled_view_has_no_class_and_marks_padding() -> None:
    view = exact_view(picture()[0], None, Augment(scale=[0.5, 0.5], flip=0), (96, 80))
    assert (view.ids == 255).all()
    assert view.inside[:24, :32].all()
    assert view.inside.sum() == 24 * 32


def test_a_seed_fixes_the_view_and_seeds_differ() -> None:
    image, mask = picture()
    views = [exact_view(image, mask, Augment(), (32, 32), seed).image for seed in (1, 1, 2)]
    assert torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])


def test_flips_are_drawn_at_their_probability() -> None:
    image, mask = picture()

    def flipped(seed: int, flip: float) -> bool:
        ids = exact_view(image, mask, Augment(scale=[1, 1], flip=flip), (64, 48), seed).ids
        return bool(ids[20, 15] == 1)  # column 15 is in the object only when mirrored

    assert not any(flipped(seed, 0) for seed in range(20))
    assert all(flipped(seed, 1) for seed in range(20))
    assert 60 < sum(flipped(seed, 0.5) for seed in range(200)) < 140


def test_a_crop_reaches_every_column_and_row() -> None:
    pixels = np.zeros((5, 7, 3), dtype=np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(7), np.arange(5)[:, None]
    views = [exact_view(Image.fromarray(pixels), None, Augment([1, 1], flip=0), (4, 3), seed) for seed in range(99)]
    assert {tuple(view.image[:2, 0, 0].tolist()) for view in views} == {(x, y) for x in range(4) for y in range(3)}


@pytest.mark.parametrize("ids", [(0, 7), (3, 200)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_resized_mask_holds_no_id_that_the_mask_does_not_hold(ids: tuple[int, int], kind: str) -> None:
    classes = tuple(LabelClass(f"class {number}", (number, 0, 0)) for number in range(201))
    domain = Domain("many", "folder", {"train": Split("*.jpg")}, classes)
    mask = picture()[1].point([*ids, *[255] * 254])
    record = Record("key", "s.tar", encoded(picture()[0], kind), encoded(mask, "PNG"))
    for seed in range(10):
        view = training_view(record, domain, Augment([0.3, 1.9]), (32, 32), np.random.default_rng(seed))
        assert set(view.ids[view.inside].tolist()) <= set(ids)
        assert set(view.ids[~view.inside].tolist()) <= {255}


def test_long_side_takes_the_place_of_scale() -> None:
    view = exact_view(picture()[0], None, Augment(long_side=[32, 32]), (64, 64))
    assert view.inside.sum() == 32 * 24


def waves(size: tuple[int, int]) -> Image.Image:
    """A smooth colour picture, about one wave across, that no two places of share."""
    x, y = (np.arange(side) / side * 5 for side in size)
    pixels = np.stack(
        [np.sin(x + y[:, None]), np.cos(x * 1.3 - y[:, None]), np.sin(x)[None, :] * np.cos(y)[:, None]], axis=-1
    )
    return Image.fromarray((127 + 120 * pixels).round().astype(np.uint8))


def shift(view: torch.Tensor, reference: torch.Tensor) -> np.ndarray:
    """(2,) pixels down and right by which the view is displaced, by least squares on the reference's gradients."""
    before, after = (image.double().numpy() for image in (reference, view))
    down, right = np.gradient(before, axis=(1, 2))
    found, *_ = np.linalg.lstsq(np.stack([-down.ravel(), -right.ravel()], axis=1), (after - before).ravel())
    return found


@pytest.mark.parametrize("size", [(640, 480), (601, 459), (499, 777)], ids=str)
@pytest.mark.parametrize("scale", [0.47, 0.24, 0.12])
def test_a_jpeg_decoded_smaller_shows_its_whole_pixels_where_they_are(size: tuple[int, int], scale: float) -> None:
    image = waves(size)
    content = encoded(image, "JPEG", quality=98)
    scaled = (round(size[0] * scale), round(size[1] * scale))
    opened = open_image(content, "s")
    extent = decode_smaller(opened, "s", scaled)
    factor = size[0] / extent[0]
    assert max(opened.size) < max(size) / 1.9, "the reduced decode is what is tested here"
    # 601 pixels are 75.1 of an eighth: 75 are shown, which are the first 600.
    whole = image.crop((0, 0, size[0] // factor * factor, size[1] // factor * factor))
    reference = torch.from_numpy(np.array(whole.resize(scaled, Image.Resampling.BILINEAR))).permute(2, 0, 1)
    for flip in (0, 1):
        found = view_of(content, None, Augment([scale, scale], flip=flip), scaled).image
        expected = reference.flip(-1) if flip else reference
        assert (found.int() - expected.int()).abs().double().mean() < 1.5
        far = (..., slice(-scaled[1] // 3, None), slice(None, scaled[0] // 3) if flip else slice(-scaled[0] // 3, None))
        # A wrong extent shows at the far end.
        assert np.abs(shift(found[far], expected[far])).max() < 0.06
        assert np.abs(shift(found, expected)).max() < 0.06


@settings(deadline=None)
@given(
    size=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    crop=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    scale=st.floats(0.05, 3),
    seed=st.integers(0, 99),
)
def test_a_view_is_a_rectangle_of_the_image_resized(
    size: tuple[int, int], crop: tuple[int, int], scale: float, seed: int
) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    view = exact_view(Image.fromarray(pixels), None, Augment([scale, scale], flip=0), crop, seed)
    height, width = int(view.inside.any(dim=1).sum()), int(view.inside.any(dim=0).sum())
    scaled = [max(1, round(side * scale)) for side in size]
    assert (width, height) == (min(scaled[0], crop[0]), min(scaled[1], crop[1]))
    region = [min(size[axis], max(1, round((width, height)[axis] * size[axis] / scaled[axis]))) for axis in (0, 1)]
    shown = view.image[:, :height, :width].int()
    nearest = min(
        (
            shown
            - torch.from_numpy(np.array(part.resize((width, height), Image.Resampling.BILINEAR))).permute(2, 0, 1).int()
        )
        .abs()
        .max()
        .item()
        for left in range(size[0] - region[0] + 1)
        for top in range(size[1] - region[1] + 1)
        for part in [Image.fromarray(pixels[top : top + region[1], left : left + region[0]])]
    )
    assert nearest <= 2  # of 255: Pillow and torchvision round their weights differently


def test_images_have_their_channels_last_in_memory() -> None:
    view = exact_view(picture()[0], None, Augment(scale=[0.5, 0.5], flip=0), (96, 80))
    assert view.image.permute(1, 2, 0).is_contiguous()
    assert exact_view(picture()[0], None, Augment(flip=1), (8, 8)).image.permute(1, 2, 0).is_contiguous()


@pytest.mark.parametrize("size", [(640, 480), (601, 459), (499, 777)], ids=str)
def test_a_jpeg_decoded_smaller_takes_the_same_view_as_its_mask(size: tuple[int, int]) -> None:
    ids = np.zeros((size[1], size[0]), dtype=np.uint8)
    ids[size[1] // 5 : size[1] // 2, size[0] // 3 :] = 1
    content = encoded(Image.fromarray(np.repeat((ids * 200)[:, :, None], 3, axis=2)), "JPEG")
    agreement = []
    for seed in range(30):
        view = view_of(content, Image.fromarray(ids), Augment(scale=[0.1, 0.5]), (96, 64), seed)
        agreement.append(((view.image[0] > 100) == (view.ids == 1))[view.inside].float().mean().item())
    assert min(agreement) > 0.97
    assert np.mean(agreement) > 0.99


@given(size=st.tuples(st.integers(1, 70), st.integers(1, 70)), wanted=st.tuples(st.integers(1, 90), st.integers(1, 90)))
def test_a_jpeg_is_never_decoded_smaller_than_what_is_wanted_of_it(
    size: tuple[int, int], wanted: tuple[int, int]
) -> None:
    opened = open_image(encoded(Image.new("RGB", size, (9, 99, 199)), "JPEG"), "s")
    extent = decode_smaller(opened, "s", wanted)
    image = decoded(opened, "s")
    if extent == size:
        assert image.size == size
        assert any(2 * needed > has for needed, has in zip(wanted, size, strict=True)), "half the size would have done"
    else:
        assert all(has >= needed for has, needed in zip(extent, wanted, strict=True))
        assert size[0] / extent[0] == size[1] / extent[1]
        assert size[0] / extent[0] in (2, 4, 8)
        assert image.size == tuple(math.ceil(part) for part in extent)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_on_its_side_is_turned_upright_before_the_view_is_taken(orientation: int) -> None:
    image = waves((160, 96))
    content = encoded(image, "JPEG", quality=98, exif=exif(orientation))
    upright, _ = decode(Record("key", Path("s.tar"), content, None), DOMAIN)
    assert upright.size == ((160, 96) if orientation < 5 else (96, 160))
    for seed in range(5):
        choices = (None, Augment(scale=[0.3, 0.6]), (40, 40), seed)
        found, reference = view_of(content, *choices), exact_view(upright, *choices)
        assert torch.equal(found.inside, reference.inside)
        # Only the upright one may be decoded smaller; its view then begins at an even pixel.
        assert (found.image.int() - reference.image.int()).abs().max() <= (24 if orientation == 1 else 0)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_images_of_other_formats_are_turned_upright_too(kind: str, orientation: int) -> None:
    lossless = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(waves((160, 96)), kind, exif=exif(orientation), **lossless)
    upright, _ = decode(Record("key", Path("s.tar"), content, None), DOMAIN)
    assert upright.size == ((160, 96) if orientation < 5 else (96, 160))
    for seed in range(5):
        choices = (None, Augment(scale=[0.5, 1.5]), (120, 120), seed)
        found, reference = view_of(content, *choices), exact_view(upright, *choices)
        assert torch.equal(found.inside, reference.inside)
        assert torch.equal(found.image, reference.image)


def test_an_image_whose_pixels_are_not_of_the_size_in_its_header_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multidomain_cct.data.batches.views.upright_size", lambda image, name: (99, 48))
    monkeypatch.setattr("multidomain_cct.data.batches.views.decode_smaller", lambda image, name, wanted: (99, 48))
    with pytest.raises(
        UserError, match=r"s.tar: key 'key': .* 99x48 by its header, but 64x48 when decoded. Store it as a JPEG"
    ):
        exact_view(picture()[0], None, Augment(), (16, 16))


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def test_image_and_mask_of_different_sizes_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"s.tar: key 'key': the mask is 64x48 but the image is 32x48. Pack the split again."
    ):
        exact_view(Image.new("RGB", (32, 48)), Image.new("L", (64, 48)), Augment(), (16, 16))


def test_palette_masks_are_read_as_indices() -> None:
    image, mask = picture()
    paletted = mask.copy()
    paletted.putpalette([255, 255, 255, 9, 9, 9])
    record = Record("key", Path("s.tar"), encoded(image, "JPEG"), encoded(paletted, "PNG"))
    _, ids = decode(record, DOMAIN)
    assert ids is not None
    assert np.array_equal(np.asarray(ids), np.asarray(mask))


@pytest.mark.parametrize(
    ("image", "mask", "message"),
    [
        (b"no image", None, "the image cannot be read"),
        (None, b"no mask", "the mask cannot be read"),
        (None, encoded(Image.new("L", (4, 4), 2), "PNG"), r"train id 2, but two has the classes 0 to 1"),
        (None, encoded(Image.new("L", (4, 4), 254), "PNG"), r"train id 254, but two"),
        (None, encoded(Image.new("RGB", (4, 4)), "PNG"), "has the mode RGB"),
        (encoded(picture()[0], "JPEG")[:300], None, "the image cannot be read"),
    ],
)
def test_unusable_bytes_are_named_by_shard_and_key(image: bytes | None, mask: bytes | None, message: str) -> None:
    record = Record("street_7", Path("data/train-00000.tar"), image or encoded(picture()[0], "JPEG"), mask)
    for use in (
        lambda: decode(record, DOMAIN),
        lambda: training_view(record, DOMAIN, Augment(), (16, 16), np.random.default_rng(0)),
    ):
        with pytest.raises(UserError, match=message) as error:
            use()
        assert str(error.value).startswith("data/train-00000.tar: key 'street_7'")


def test_padding_has_the_mean_colour_of_imagenet() -> None:
    assert tuple(round(255 * mean) for mean in (0.485, 0.456, 0.406)) == PAD


@pytest.mark.parametrize(
    "impossible",
    [
        {"scale": [2.0, 1.0]},
        {"scale": [1.0]},
        {"scale": [0, 1]},
        {"scale": [1, 1, 1]},
        {"flip": 1.5},
        {"flip": -0.5},
        {"long_side": [0, 5]},
        {"long_side": [5]},
        {"long_side": [6, 5]},
    ],
)
def test_impossible_settings_are_refused(impossible: dict[str, object]) -> None:
    with pytest.raises(UserError, match="augment"):
        Augment(**impossible)  # type: ignore[arg-type]
