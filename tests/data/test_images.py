"""Images of every kind are shown upright and as bright as they are, or refused."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from multidomain_cct.data.images import decoded, has_16_bits, load_image, open_image, upright_size
from multidomain_cct.errors import UserError

RAMP = np.linspace(0, 1, 80 * 64).reshape(64, 80)


def deep_png(channels: np.ndarray) -> bytes:
    """A PNG of 16 bits and three channels, which Pillow cannot write."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width, _ = channels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in channels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "values",
    [
        RAMP.astype(np.float32),
        (RAMP * 10_000).astype(np.float32),
        (RAMP * 255).astype(np.int32),
        (RAMP * 200 - 100).astype(np.int32),
        (RAMP * 4095).astype(np.uint16),
        (RAMP * 255).astype(np.uint16),
    ],
    ids=["float 0..1", "float 0..10000", "int32 0..255", "int32 with a sign", "12 bits in 16", "8 bits in 16"],
)
def test_numbers_that_leave_open_which_one_is_white_are_refused(tmp_path: Path, values: np.ndarray) -> None:
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"^here: the image h.*xport it with 8 (or 16 )?bits"):
        load_image(tmp_path / "a.tif", "here")


@pytest.mark.parametrize("top", [4095, 255])
def test_colours_of_16_bits_that_end_far_below_white_are_refused(top: int) -> None:
    with pytest.raises(UserError, match="Scale the values"):
        load_image(deep_png(np.repeat((RAMP * top)[..., None], 3, 2)), "here")


def test_16_bits_keep_the_upper_8(tmp_path: Path) -> None:
    values = (RAMP * 65535).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(deep_png(np.repeat(values[..., None], 3, 2)))
    for name in ("a.png", "b.png"):
        assert has_16_bits(open_image(tmp_path / name, name))
        assert np.array_equal(np.asarray(load_image(tmp_path / name, name))[..., 0], values >> 8)


def test_a_black_image_of_16_bits_is_black(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), dtype=np.uint16)).save(tmp_path / "a.png")
    assert not np.asarray(load_image(tmp_path / "a.png", "a")).any()


def test_grey_values_are_scaled_by_the_highest_that_a_pgm_states(tmp_path: Path) -> None:
    (tmp_path / "a.pgm").write_bytes(b"P5 3 1 4095\n" + np.array([0, 2048, 4095], dtype=">u2").tobytes())
    assert np.asarray(load_image(tmp_path / "a.pgm", "a"))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_of_any_format_is_turned_as_its_tag_asks(tmp_path: Path, suffix: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.zeros((64, 96, 3), dtype=np.uint8)
    pixels[:32, :48] = 255
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(pixels).save(path, exif=exif)
    turns = (
        lambda a: a, lambda a: a[:, ::-1], lambda a: a[::-1, ::-1], lambda a: a[::-1],
        lambda a: a.swapaxes(0, 1), lambda a: np.rot90(a, -1), lambda a: np.rot90(a, 2).swapaxes(0, 1), np.rot90,
    )  # fmt: skip
    expected = turns[orientation - 1](pixels)
    opened = open_image(path, "a")
    assert upright_size(opened, "a") == (expected.shape[1], expected.shape[0])
    assert np.abs(np.asarray(decoded(opened, "a")).astype(int) - expected).mean() < 10
