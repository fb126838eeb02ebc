"""B20: a mask in a shard gives the ids that were written into it, whatever kind of PNG it is."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from multidomain_cct.data.batches.views import decode
from multidomain_cct.data.domain import Domain, LabelClass
from multidomain_cct.data.shards.reader import BadSample, Shards
from multidomain_cct.data.shards.scan import index_shard

GREY, PALETTE = 0, 3
KINDS = [(GREY, 1), (GREY, 2), (GREY, 4), (GREY, 8), (GREY, 16), (PALETTE, 1), (PALETTE, 2), (PALETTE, 4), (PALETTE, 8)]
DOMAIN = Domain("yard", "folder", {}, tuple(LabelClass(f"class {n}", (n, 0, 0)) for n in range(20)))
WIDTH, HEIGHT = 13, 7


def png(ids: np.ndarray, kind: int, depth: int) -> bytes:
    """A PNG written by hand; Pillow cannot write all of these."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", ids.shape[1], ids.shape[0], depth, kind, 0, 0, 0))]
    if kind == PALETTE:
        # A palette in which nothing resembles its index.
        chunks.append((b"PLTE", bytes((255 - 37 * n) % 256 for n in range(3 * 2**depth))))
    if depth == 16:
        rows = [row.astype(">u2").tobytes() for row in ids]
    else:
        bits = (ids[:, :, None] >> np.arange(depth - 1, -1, -1)) & 1
        rows = [np.packbits(row.reshape(-1).astype(np.uint8)).tobytes() for row in bits]
    chunks += [(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


def shard_of(folder: Path, mask: bytes) -> Shards:
    path, image = folder / "train-00000.tar", io.BytesIO()
    Image.new("RGB", (WIDTH, HEIGHT)).save(image, "JPEG")
    with tarfile.open(path, "w") as tar:
        for name, content in (("image_7.jpg", image.getvalue()), ("image_7.png", mask)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    index_shard(path)
    return Shards.of([path])


@pytest.mark.parametrize(("kind", "depth"), KINDS)
def test_b20_ids_come_back_as_they_were_written(
    tmp_path: Path, kind: int, depth: int, record_property: Callable[[str, object], None]
) -> None:
    ids = np.random.default_rng(depth).integers(0, min(20, 2**depth), (HEIGHT, WIDTH))
    if depth >= 8:
        ids[0, 0] = 255
    _, mask = decode(shard_of(tmp_path, png(ids, kind, depth)).read(0), DOMAIN)
    assert mask is not None
    assert mask.mode == "L"
    assert np.array_equal(np.asarray(mask), ids)
    record_property(
        "B20", f"ids equal in {len(KINDS)} kinds of PNG: grey of 1, 2, 4, 8, 16 bits, palettes of 1, 2, 4, 8 bits"
    )


@pytest.mark.parametrize(
    ("kind", "depth", "wrong"),
    [(GREY, 8, 20), (GREY, 8, 254), (PALETTE, 8, 33), (GREY, 16, 300), (GREY, 16, 511), (GREY, 16, 65535)],
)
def test_b20_an_id_outside_the_class_table_is_named_with_shard_and_key(
    tmp_path: Path, kind: int, depth: int, wrong: int
) -> None:
    ids = np.zeros((HEIGHT, WIDTH), dtype=np.int64)
    ids[3, 4] = wrong
    shards = shard_of(tmp_path, png(ids, kind, depth))
    with pytest.raises(
        BadSample,
        match=rf"train-00000.tar: key 'image_7': the mask holds the train id {wrong}, but yard has the classes 0 to 19",
    ):
        decode(shards.read(0), DOMAIN)


@pytest.mark.parametrize(("depth", "wrong"), [(2, 3), (4, 15)])
def test_b20_the_brightest_grey_of_few_bits_is_not_taken_for_ignore(tmp_path: Path, depth: int, wrong: int) -> None:
    few = Domain("yard", "folder", {}, DOMAIN.classes[:2])
    ids = np.full((HEIGHT, WIDTH), wrong, dtype=np.int64)
    with pytest.raises(BadSample, match=f"the mask holds the train id {wrong},"):
        decode(shard_of(tmp_path, png(ids, GREY, depth)).read(0), few)
