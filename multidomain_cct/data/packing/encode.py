"""One raw sample -> the bytes of a shard. Imports no torch, so that a worker starts quickly."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from multidomain_cct.data.domain import Domain
from multidomain_cct.data.images import decoded, fitted_size, has_16_bits, open_image, orientation, resized
from multidomain_cct.data.packing.annotations import annotations_of_one
from multidomain_cct.data.packing.raw_files import MaskFile, RawSample
from multidomain_cct.data.packing.raw_masks import read_mask
from multidomain_cct.errors import UserError

JPEG_QUALITY = 95
NO_SHAPES = "images have annotations without any area: all of their pixels are the background"
LEFT_OUT = "images have annotations that cover no pixels (points, lines), which were left out"
SIXTEEN_BITS = "images of 16 bits, of which the upper 8 are kept"
TURNED = "images turned upright by their EXIF orientation"
TURNED_ALONE = (
    "images were turned by their EXIF orientation, and their masks have none and were not: look whether they fit"
)


@dataclass(frozen=True)
class Encoded:
    """One sample as it is stored."""

    key: str
    image: bytes
    mask: bytes | None
    meta: bytes
    facts: dict[str, Any]
    """What it adds to pack's summary."""


@dataclass(frozen=True)
class Encoder:
    """Encodes raw samples of one split. Calls return errors as text, so that they leave a process as one line."""

    domain: Domain
    raw: Path
    split: str

    def __call__(self, samples: Sequence[RawSample]) -> list[Encoded | str]:
        """The encoded samples up to the first error, and that."""
        encoded: list[Encoded | str] = []
        try:
            for sample in samples:
                encoded.append(self.encode(sample))
        except (UserError, OSError) as error:
            encoded.append(str(error))
        return encoded

    def encode(self, sample: RawSample) -> Encoded:
        source, name = sample.image.read_bytes(), str(sample.image)
        opened = open_image(source, name)
        # Before decoding, which turns the image. All readers show an upright 8-bit RGB JPEG alike.
        turned, is_deep = orientation(opened, name), has_16_bits(opened)
        is_plain = (opened.format, opened.mode, turned) == ("JPEG", "RGB", 1)
        image = decoded(opened, name)
        stored = fitted_size(image.size, self.domain.size)
        remarks = [TURNED] * (turned > 1) + [SIXTEEN_BITS] * is_deep
        facts: dict[str, Any] = {"images": 1, "labelled": 0, "pixels": [0] * 256, "unknown": {}, "remarks": remarks}
        mask = None
        if sample.mask is not None:
            if sample.mask.holds_shapes:
                picture = self._drawn(sample.mask, image.size, remarks)
            else:
                picture, facts["unknown"] = self._mask(sample.mask, image.size, turned)
            if turned > 1 and sample.mask.holds_shapes:
                remarks.append(TURNED_ALONE)
            elif turned > 1 and sample.mask.cell is None:
                with open_image(sample.mask.path, str(sample.mask.path)) as mask_file:
                    remarks += [TURNED_ALONE] * (orientation(mask_file, str(sample.mask.path)) == 1)
            if self.split not in self.domain.score_at_full_size and stored != image.size:
                picture = picture.resize(stored, Image.Resampling.NEAREST)
            facts |= {"labelled": 1, "pixels": picture.histogram()}
            mask = mask_png(picture)
        # A plain JPEG of the right size is kept byte for byte: no second loss.
        content = source if is_plain and stored == image.size else _jpeg(resized(image, stored))
        meta = {"size": list(image.size), "source": sample.image.relative_to(self.raw).as_posix()}
        facts |= {"image_bytes": len(content), "sizes": {_text(stored): 1}}
        return Encoded(sample.key, content, mask, json.dumps(meta, sort_keys=True).encode(), facts)

    def _drawn(self, mask: MaskFile, size: tuple[int, int], remarks: list[str]) -> Image.Image:
        """The train ids of annotated shapes as a picture; adds what is worth a look to `remarks`."""
        annotation = mask.annotation or annotations_of_one(mask.path, size)
        remarks += [NO_SHAPES] * (not annotation.shapes) + [LEFT_OUT] * (annotation.num_left_out > 0)
        return Image.fromarray(annotation.train_ids(self.domain, size, str(mask.path)))

    def _mask(self, mask: MaskFile, size: tuple[int, int], turned: int) -> tuple[Image.Image, dict[str, int]]:
        """Train ids as a picture, and the pixels of raw values without a class. `turned`: the image's orientation."""
        train_ids, unknown = read_mask(mask, self.domain)
        picture = Image.fromarray(train_ids)
        if picture.size != size:
            exif = f", turned by its EXIF orientation {turned}" if turned > 4 else ""
            raise UserError(
                f"{mask.path}: the mask is {_text(picture.size)} but its image is {_text(size)}{exif}. Export the mask "
                "upright and at the image's size."
            )
        return picture, unknown


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def mask_png(mask: Image.Image) -> bytes:
    """A PNG of 8-bit grey values with unfiltered rows.

    Pillow's filters, which cannot be turned off, make label masks smaller but several times slower to read
    (benchmarks/loader.py).
    """
    rows = np.zeros((mask.height, 1 + mask.width), dtype=np.uint8)
    rows[:, 1:] = np.asarray(mask)
    header = struct.pack(">IIBBBBB", mask.width, mask.height, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), level=3)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
