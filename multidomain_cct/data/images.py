"""Image files, decoded safely: which formats, how large, upright.

Imports no torch, so that a packing worker starts quickly.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from multidomain_cct.errors import UserError

IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "PPM")
"""Allowed formats, whatever the file's name is. Some others of Pillow start programs (EPS) or are little tested."""
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, AttributeError, struct.error, zlib.error)
"""What Pillow raises for damaged files, found by damaging files of every format."""
_TOO_LARGE = (Image.DecompressionBombWarning, Image.DecompressionBombError)
ID_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")
"""Pillow's modes of masks that hold ids."""
_KEPT = frozenset(
    "1 L P P;1 P;2 P;4 I;16 I;16B I;16N I;12 I;16S I;16BS I;32S I;32BS I;32N "
    "RGB RGBX RGBA BGR BGRX BGRA XBGR ABGR BGR;15 BGR;16 LA CMYK F F;32F F;32BF".split()
)
"""How files store pixels whose values Pillow keeps. Others it inverts (white as 0) or narrows (16-bit colours)."""
_STRETCHED = {"L;2": 3, "L;4": 15}
"""Grey values that Pillow stretches to 0..255, with the highest in the file."""


def load_image(source: bytes | Path, name: str, *, large: bool = False) -> Image.Image:
    """The image as 8-bit RGB, turned upright as its EXIF tag asks.

    `large` allows 179 million pixels instead of 89, for a person's own photograph. Raises UserError, starting with
    `name`, when it cannot be read.
    """
    # A loaded image outlives its file.
    with open_image(source, name, large=large) as image:
        return decoded(image, name)


def open_image(source: bytes | Path, name: str, *, large: bool = False) -> Image.Image:
    """The image with only its header read, for `decoded`.

    Raises UserError, starting with `name`, when it cannot be read.
    """
    with _errors_that_name(name, large=large):
        return Image.open(_content(source), formats=IMAGE_FORMATS)


def upright_size(image: Image.Image, name: str) -> tuple[int, int]:
    """(width, height) of an opened image after it is turned upright."""
    # Pillow gives the upright size of a TIFF.
    return image.size if image.format == "TIFF" or orientation(image, name) < 5 else (image.height, image.width)


def decode_smaller(image: Image.Image, name: str, wanted: tuple[int, int]) -> tuple[float, float]:
    """Prepare an opened JPEG to be decoded at a half, a quarter or an eighth of its size, if that is at least `wanted`.

    Returns (width, height) of the whole picture in decoded pixels. They are fractions where the factor does not divide
    the size: the last column or row is then covered in part only. A JPEG that has to be turned is left at full size,
    since its partial pixels would lie on another side.
    """
    if image.format == "JPEG" and orientation(image, name) == 1 and (drafted := image.draft(None, wanted)) is not None:
        return drafted[1][2], drafted[1][3]
    return upright_size(image, name)


def decoded(image: Image.Image, name: str) -> Image.Image:
    """An opened image as 8-bit RGB, turned upright; of 16 bits, the upper 8.

    Raises UserError, starting with `name`, when it cannot be read, and for numbers that leave open which one is white.
    """
    with _errors_that_name(name):
        # Before loading, which forgets how the pixels were stored.
        stored, deep = _stored(image)[0], has_16_bits(image)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "F" or (image.mode == "I" and not deep):
            held = "floating-point numbers" if image.mode == "F" else "integers of more than 16 bits, or with a sign"
            raise UserError(
                f"{name}: the image holds {held}; nothing says which is white. Export it with 8 or 16 bits."
            )
        if not deep:
            return image if image.mode == "RGB" else image.convert("RGB")
    values, grey = np.asarray(image), image.mode.startswith("I")
    # Of colours Pillow has kept the upper 8 bits only.
    if stored != "I;12" and (0 < values.max() < 4096 if grey else values[..., :3].max() < 16):
        remedy = "Scale the values to 0..65535, or export it with 8 bits."
        raise UserError(f"{name}: the image has 16 bits, but its values end below 4096: it would be black. {remedy}")
    if grey:
        # Pillow would clip 16 bits to 255.
        image = Image.fromarray((values.astype(np.uint32) >> (4 if stored == "I;12" else 8)).astype(np.uint8))
    return image.convert("RGB")


def fitted_size(size: tuple[int, int], box: tuple[int, int] | None) -> tuple[int, int]:
    """The largest (width, height) of the same aspect ratio within both the box and the original."""
    if box is None:
        return size
    ratio = min(1.0, box[0] / size[0], box[1] / size[1])
    return max(1, round(size[0] * ratio)), max(1, round(size[1] * ratio))


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The image at (width, height), as `pack` shrinks images and as predictions see them."""
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def load_mask(source: bytes | Path, name: str, formats: tuple[str, ...]) -> tuple[Image.Image, np.ndarray]:
    """A mask, turned upright by its own EXIF tag, and the values in its file, (H, W) or (H, W, channels).

    Raises UserError, starting with `name`, when it cannot be read, or not without a change of its values.
    """
    with _errors_that_name(name, "mask", formats=formats):
        with Image.open(_content(source), formats=formats) as image:
            stored, highest = _stored(image)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
        values = np.asarray(image)
    if highest is not None:
        scale = highest / (65535 if image.mode == "I" else 255)
        values = np.rint(values * scale).astype(np.uint16 if highest > 255 else np.uint8)
    elif stored not in _KEPT:
        raise UserError(
            f"{name}: the mask's pixels are stored as {stored} (Pillow's name), and cannot be read unchanged. Export "
            "8- or 16-bit ids in one channel, palette indices or 8-bit RGB colours."
        )
    return image, values.astype(np.uint8) if values.dtype == bool else values


def _content(source: bytes | Path) -> io.BytesIO:
    # Given a path, Pillow 12.3 maps plain TIFFs into memory, and then turns them by their EXIF tag twice.
    return io.BytesIO(source if isinstance(source, bytes) else source.read_bytes())


def _stored(image: Image.Image) -> tuple[str, int | None]:
    """How the file of an opened image stores its pixels, in Pillow's words, and the highest value of grey ones that
    Pillow scales to its own range.
    """
    if not isinstance(image, ImageFile.ImageFile) or not image.tile or image.format == "GIF":
        return image.mode, None
    codec, _, _, args = image.tile[0]
    kind = str(args[0] if isinstance(args, tuple) else args)
    if not codec.startswith("ppm") or not isinstance(args, tuple):
        return kind, _STRETCHED.get(kind)
    if kind == "L":
        return kind, int(args[1])
    return (kind if args[1] == 255 else f"{kind} of 0..{args[1]}"), None


def has_16_bits(image: Image.Image) -> bool:
    """Whether an opened image has 16 bits a channel, of which `decoded` keeps 8."""
    kind, _, bits = _stored(image)[0].partition(";")
    grey = image.mode.startswith("I;16") or (image.format == "PPM" and image.mode == "I")
    return grey or (bits.startswith("16") and kind not in ("I", "BGR"))


def orientation(image: Image.Image, name: str) -> int:
    """The EXIF tag of an opened image: 1 is upright, 5 to 8 lie on their side."""
    with _errors_that_name(name):
        tag: int = image.getexif().get(ExifTags.Base.Orientation, 1)
    return tag if tag in range(1, 9) else 1


@contextmanager
def _errors_that_name(
    name: str, what: str = "image", *, formats: Sequence[str] = IMAGE_FORMATS, large: bool = False
) -> Iterator[None]:
    """Pillow's errors become UserErrors of one line."""
    try:
        with warnings.catch_warnings():
            # Pillow goes on after a warning. Broken EXIF is no reason to fail; a size that would fill the memory is.
            warnings.simplefilter("ignore")
            warnings.simplefilter("ignore" if large else "error", Image.DecompressionBombWarning)
            yield
    except _TOO_LARGE as error:
        raise UserError(
            f"{name}: the {what} is too large to be read safely ({error}). Cut image and mask into tiles."
        ) from None
    except _UNREADABLE as error:
        unknown = isinstance(error, UnidentifiedImageError)
        reason = f"it is none of {', '.join(formats)}" if unknown else error
        raise UserError(f"{name}: the {what} cannot be read ({reason}). Fetch or export it again.") from None
