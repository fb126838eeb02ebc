"""Masks in every form in which they are published give the same train ids."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from multidomain_cct.data.domain import IGNORE, Domain, LabelClass, Split
from multidomain_cct.data.packing.raw_files import MaskFile
from multidomain_cct.data.packing.raw_masks import read_mask
from multidomain_cct.errors import UserError

IDS = np.array([[0, 1, 2], [3, 4, 255]])
"""Raw ids with one of each kind: 0 ignored, 1 and 2 the first class, 3 the second, 4 unknown, 255 ignored."""
TRAIN_IDS = [[IGNORE, 0, 0], [1, IGNORE, IGNORE]]


def domain(**changes: object) -> Domain:
    fields: dict[str, object] = {
        "name": "street",
        "layout": "folder",
        "splits": {"train": Split("*.jpg", "*.png")},
        "classes": (
            LabelClass("road", (128, 64, 128), ids=(1, 2), colors=((128, 64, 128), (1, 2, 3))),
            LabelClass("car", (0, 0, 142), ids=(3, 1000)),
        ),
        "ignore_ids": (0, 255),
        "ignore_colors": ((0, 0, 0),),
    }
    return Domain(**{**fields, **changes})  # type: ignore[arg-type]


def read(path: Path, **changes: object) -> tuple[list[list[int]], dict[str, int]]:
    train_ids, unknown = read_mask(MaskFile(path), domain(**changes))
    assert train_ids.dtype == np.uint8
    return train_ids.tolist(), unknown


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif"])
def test_eight_bit_ids_are_looked_up(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"mask.{suffix}"
    Image.fromarray(IDS.astype(np.uint8)).save(path)
    assert read(path) == (TRAIN_IDS, {"4": 1})


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif"])
@pytest.mark.parametrize("seed", range(3))
def test_palette_images_count_by_index_whatever_their_palette(tmp_path: Path, suffix: str, seed: int) -> None:
    path = tmp_path / f"mask.{suffix}"
    image = Image.fromarray(IDS.astype(np.uint8))
    image.putpalette(np.random.default_rng(seed).integers(0, 256, 768).tolist())
    image.save(path)
    with Image.open(path) as stored:
        assert stored.mode == "P"
    assert read(path) == (TRAIN_IDS, {"4": 1})


def test_gif_counts_by_index(tmp_path: Path) -> None:
    path = tmp_path / "mask.gif"
    image = Image.fromarray(np.array([[0, 1, 2, 3, 4]], dtype=np.uint8))
    image.putpalette([9, 8, 7] * 2 + list(range(24)))
    image.save(path)
    assert read(path) == ([[IGNORE, 0, 0, 1, IGNORE]], {"4": 1})


def test_one_bit_masks_hold_zero_and_one(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    Image.fromarray(np.array([[False, True]])).save(path)
    assert read(path) == ([[IGNORE, 0]], {})


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grey_png_of_few_bits_gives_the_stored_ids(tmp_path: Path, bits: int) -> None:
    # Written by hand: Pillow cannot write 2 and 4 bits, and stretches them to 0..255 when it reads them.
    ids = [1, 0] if bits == 1 else [0, 1, 2, 3]
    digits = [int(digit) for value in ids for digit in f"{value:0{bits}b}"]
    path = tmp_path / "mask.png"
    path.write_bytes(grey_png(np.packbits(digits).tobytes(), width=len(ids), bits=bits))
    assert read(path) == ([[0, IGNORE] if bits == 1 else [IGNORE, 0, 0, 1]], {})


def grey_png(line: bytes, width: int, bits: int) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" + line)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_ids_keep_their_high_byte(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"mask.{suffix}"
    Image.fromarray(np.array([[1000, 3, 1001, 65535]], dtype=np.uint16)).save(path)
    assert read(path) == ([[1, 1, IGNORE, IGNORE]], {"1001": 1, "65535": 1})


def test_ids_beyond_sixteen_bits_are_unknown_not_wrapped_around(tmp_path: Path) -> None:
    path = tmp_path / "mask.tif"
    Image.fromarray(np.array([[1000, 0, 65536, 65536 + 3, -1]], dtype=np.int32)).save(path)
    classes = (LabelClass("road", (1, 1, 1), ids=(0,)), LabelClass("car", (2, 2, 2), ids=(3, 1000)))
    expected = ([[1, 0, IGNORE, IGNORE, IGNORE]], {"-1": 1, "65536": 1, "65539": 1})
    assert read(path, classes=classes, ignore_ids=(255,)) == expected
    train_ids, unknown = read_mask(MaskFile(path, train_ids=True), domain())
    assert (train_ids.tolist(), unknown) == (
        [[IGNORE, 0, IGNORE, IGNORE, IGNORE]],
        {"-1": 1, "1000": 1, "65536": 1, "65539": 1},
    )


def test_colours_are_looked_up_exactly(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    colors = np.array(
        [[[128, 64, 128], [1, 2, 3], [0, 0, 142]], [[0, 0, 0], [128, 64, 129], [255, 255, 255]]], dtype=np.uint8
    )
    Image.fromarray(colors).save(path)
    assert read(path) == ([[0, 0, 1], [IGNORE, IGNORE, IGNORE]], {"#804081": 1, "#ffffff": 1})


def test_transparency_changes_no_label(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    Image.fromarray(np.array([[[128, 64, 128, 0], [0, 0, 142, 255]]], dtype=np.uint8)).save(path)
    assert read(path) == ([[0, 1]], {})


def test_colour_lookup_agrees_with_a_plain_dictionary(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    # Few levels, so that many random pixels hit a class.
    colors = rng.choice(np.array([0, 1, 2, 3, 64, 128, 142], dtype=np.uint8), size=(40, 50, 3))
    path = tmp_path / "mask.png"
    Image.fromarray(colors).save(path)
    table = {(128, 64, 128): 0, (1, 2, 3): 0, (0, 0, 142): 1, (0, 0, 0): IGNORE}
    expected = [[table.get(tuple(pixel), IGNORE) for pixel in line] for line in colors.tolist()]
    train_ids, unknown = read(path)
    assert train_ids == expected
    assert sum(unknown.values()) == sum(tuple(pixel) not in table for line in colors.tolist() for pixel in line)


def test_unknown_values_are_counted_by_pixel_and_expected_ones_are_not(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    Image.fromarray(np.array([[0, 255, 9, 9, 9, 12]], dtype=np.uint8)).save(path)
    assert read(path)[1] == {"9": 3, "12": 1}


def test_train_ids_are_taken_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    Image.fromarray(IDS.astype(np.uint8)).save(path)
    train_ids, unknown = read_mask(MaskFile(path, train_ids=True), domain())
    assert (train_ids.tolist(), unknown) == ([[0, 1, IGNORE], [IGNORE, IGNORE, IGNORE]], {"2": 1, "3": 1, "4": 1})


def test_the_labels_of_a_matlab_table_are_turned_upright(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "SUNRGBD2Dseg.mat"
    upright = [IDS, IDS[:, :2]]
    with h5py.File(path, "w") as table:
        cells = table.create_dataset("SUNRGBD2Dseg/seglabel", (2, 1), dtype=h5py.ref_dtype)
        for cell, ids in enumerate(upright):
            cells[cell, 0] = table.create_dataset(f"#refs#/{cell}", data=ids.T.astype(np.uint8)).ref
    train_ids, unknown = read_mask(MaskFile(path, cell=0), domain())
    assert (train_ids.tolist(), unknown) == (TRAIN_IDS, {"4": 1})
    assert read_mask(MaskFile(path, cell=1), domain())[0].shape == (2, 2)
    with pytest.raises(
        UserError, match=r"SUNRGBD2Dseg.mat: the labels of image 3 cannot be read .* Fetch SUNRGBDtoolbox.zip again"
    ):
        read_mask(MaskFile(path, cell=2), domain())


def test_an_unknown_id_is_an_error_where_the_domain_says_so(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    Image.fromarray(np.array([[0, 255, 9, 9, 9, 12]], dtype=np.uint8)).save(path)
    message = (
        r"mask.png: 3 pixels have the id 9, which no class of street names, and 1 more such values. Add it to a class "
        r"or to ignore_ids."
    )
    with pytest.raises(UserError, match=message):
        read(path, unknown="error")
    assert read(path, unknown="error", ignore_ids=(0, 9, 12, 255)) == ([[IGNORE] * 6], {})


def test_an_unknown_colour_is_an_error_where_the_domain_says_so(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    Image.fromarray(np.full((2, 2, 3), 200, dtype=np.uint8)).save(path)
    with pytest.raises(
        UserError,
        match="mask.png: 4 pixels have the colour #c8c8c8, which no class of street names. Add it to a class or to "
        "ignore_colors.",
    ):
        read(path, unknown="error")


def test_jpeg_masks_are_refused_whatever_their_name(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    Image.fromarray(IDS.astype(np.uint8)).save(path, "JPEG")
    with pytest.raises(
        UserError,
        match="mask.png: the mask is JPEG-compressed, which changes labels along every border. Export it as PNG.",
    ):
        read(path)


def test_tiff_masks_with_jpeg_inside_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mask.tif"
    Image.fromarray(np.zeros((16, 16), dtype=np.uint8)).save(path, compression="jpeg")
    with pytest.raises(UserError, match="JPEG-compressed"):
        read(path)


@pytest.mark.parametrize("mode", ["F", "CMYK", "LA"])
def test_pixels_that_are_neither_ids_nor_colours_are_refused(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "mask.tif"
    Image.new(mode, (4, 4)).save(path)
    with pytest.raises(
        UserError, match=f"mask.tif: the mask has pixels of Pillow's mode {mode}. Export it as 8- or 16-bit ids"
    ):
        read(path)


def test_a_damaged_mask_is_named(tmp_path: Path) -> None:
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 4, (64, 64), dtype=np.uint8)).save(whole)
    content = whole.read_bytes()
    broken = tmp_path / "broken.png"
    flipped = content[:60] + bytes([content[60] ^ 0xFF]) + content[61:]
    for damage in (b"", b"no picture", content[: len(content) // 2], content[:20], flipped):
        broken.write_bytes(damage)
        with pytest.raises(UserError, match=r"broken.png: the mask cannot be read \(.*Fetch or export it again"):
            read(broken)
    with pytest.raises(UserError, match=r"absent.png: the mask cannot be read"):
        read(tmp_path / "absent.png")


def test_a_mask_that_would_fill_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mask.png"
    Image.fromarray(np.zeros((10, 15), dtype=np.uint8)).save(path)
    for limit in (100, 70):  # Pillow warns above its limit, and raises above twice that.
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(
            UserError, match=r"mask.png: the mask is too large to be read safely .*Cut image and mask into tiles"
        ):
            read(path)


def test_ids_of_a_pgm_are_those_in_the_file_whatever_maximum_it_states(tmp_path: Path) -> None:
    path = tmp_path / "mask.pgm"
    for highest, kind in ((255, np.uint8), (5, np.uint8), (1000, ">u2"), (65535, ">u2")):
        ids = np.array([0, 1, 3, 4] + ([1000] if highest >= 1000 else []))
        path.write_bytes(b"P5 %d 1 %d\n" % (len(ids), highest) + ids.astype(kind).tobytes())
        assert read(path) == ([[IGNORE, 0, 1, IGNORE, *[1] * (len(ids) - 4)]], {"4": 1})
    path.write_text("P2 4 1 9\n0 1 3 4\n")
    assert read(path) == ([[IGNORE, 0, 1, IGNORE]], {"4": 1})


def rgb_png(bits: int) -> bytes:
    """Ids in the first of three channels, as SYNTHIA stores them in 16 bits."""
    header = struct.pack(">IIBBBBB", 4, 1, bits, 2, 0, 0, 0)
    channels = np.zeros((4, 3), dtype=">u2" if bits == 16 else np.uint8)
    channels[:, 0] = [0, 1, 2, 3]
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" + channels.tobytes())), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts
    )


def inverted_tiff(folder: Path) -> bytes:
    """Grey values stored with 0 as white, which Pillow turns around."""
    Image.fromarray(IDS.astype(np.uint8)).save(folder / "plain.tif", tiffinfo={262: 0})
    return (folder / "plain.tif").read_bytes()


@pytest.mark.parametrize("kind", ["RGB;16B", "L;I", "1;I", "RGB of 0..31"])
def test_values_that_a_decoder_would_change_are_refused(tmp_path: Path, kind: str) -> None:
    contents = {
        "RGB;16B": rgb_png(16),
        "L;I": inverted_tiff(tmp_path),
        "1;I": b"P4 8 1\n\x0f",
        "RGB of 0..31": b"P6 1 1 31\n\x01\x02\x03",
    }
    path = tmp_path / "mask.png"
    path.write_bytes(contents[kind])
    with pytest.raises(UserError, match=f"mask.png: the mask's pixels are stored as {kind} .*one channel"):
        read(path)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("mode", ["L", "P", "I;16", "RGB"])
def test_a_mask_is_turned_by_its_own_tag(tmp_path: Path, suffix: str, mode: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    ids = np.array([[1, 1, 3]])
    pixels = np.where(ids[..., None] == 1, (1, 2, 3), (0, 0, 142)) if mode == "RGB" else ids
    image = Image.fromarray(pixels.astype(np.uint16 if mode == "I;16" else np.uint8))
    if mode == "P":
        image.putpalette([9] * 12)
    image.save(tmp_path / f"mask.{suffix}", exif=exif)
    assert read(tmp_path / f"mask.{suffix}") == ([[0], [0], [1]], {})


def palette_mask(path: Path, indices: list[int], palette: list[tuple[int, int, int]]) -> Path:
    image = Image.fromarray(np.array([indices], dtype=np.uint8))
    image.putpalette([channel for color in palette for channel in color])
    image.save(path)
    return path


def test_a_palette_whose_colours_are_other_classes_than_its_indices_is_refused_with_both_readings(
    tmp_path: Path,
) -> None:
    table = (LabelClass("road", (128, 64, 128)), LabelClass("car", (0, 0, 142)), LabelClass("sky", (70, 130, 180)))
    own = [(128, 64, 128), (0, 0, 142), (70, 130, 180)]
    path = tmp_path / "mask.png"
    options: dict[str, object] = {"classes": table, "ignore_ids": (255,)}
    assert read(palette_mask(path, [0, 1, 2], own), **options)[0] == [[0, 1, 2]]
    with pytest.raises(
        UserError, match=r'entry 0 is "road" by its number, and "sky" by its colour \[70, 130, 180\].*RGB'
    ):
        read(palette_mask(path, [0, 1], [own[2], own[0]]), **options)
    # A colour that the table lacks, or one colour alone, shows that the palette is only for the eye.
    assert read(palette_mask(path, [0, 1, 2], [own[2], own[0], (1, 1, 1)]), **options)[0] == [[0, 1, 2]]
    assert read(palette_mask(path, [0, 0], [own[2], own[0]]), **options)[0] == [[0, 0]]


def test_classes_may_share_a_colour_as_long_as_masks_hold_ids(tmp_path: Path) -> None:
    table = (LabelClass("road", (128, 64, 128)), LabelClass("path", (128, 64, 128)), LabelClass("sky", (1, 1, 1)))
    ids, colors = tmp_path / "ids.png", tmp_path / "colors.png"
    Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8)).save(ids)
    Image.new("RGB", (1, 1), (128, 64, 128)).save(colors)
    assert read(ids, classes=table, ignore_ids=(255,)) == ([[0, 1, 2]], {})
    with pytest.raises(UserError, match="colors.png: the mask holds colours, and the classes road and path"):
        read(colors, classes=table, ignore_ids=(255,))
