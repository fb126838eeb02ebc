"""B19: a byte that changes in a shard, its index or its catalogue is seen."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from multidomain_cct.data.shards.catalogue import Catalogue, catalogue_path
from multidomain_cct.data.shards.index import ShardIndex, index_path
from multidomain_cct.data.shards.reader import BadSample, Shards
from multidomain_cct.data.shards.scan import verify_shard
from multidomain_cct.data.shards.writer import ShardWriter
from multidomain_cct.errors import UserError

FLIPS = 200


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    with ShardWriter(tmp_path, "train") as writer:
        for number in range(6):
            image, mask = io.BytesIO(), io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(image, "JPEG")
            Image.fromarray(rng.integers(0, 2, (24, 32), dtype=np.uint8)).save(mask, "PNG")
            writer.write(f"image_{number}", image=image.getvalue(), mask=mask.getvalue(), meta=b'{"source": "a.jpg"}')
    return writer.finished[0]


def flipped(content: bytes, rng: np.random.Generator) -> tuple[int, bytes]:
    """A place, and the content with another byte there."""
    place = int(rng.integers(len(content)))
    changed = bytearray(content)
    changed[place] ^= int(rng.integers(1, 256))
    return place, bytes(changed)


def region(index: ShardIndex, place: int) -> str:
    """Where in the shard a byte lies: image, mask, description, header or padding."""
    for column, name in enumerate(("image", "mask", "description")):
        starts, sizes = index.offset[:, column], index.size[:, column]
        if ((starts <= place) & (place < starts + sizes)).any():
            return name
    return "header" if (((index.offset - 512) <= place) & (place < index.offset)).any() else "padding"


def test_b19_every_changed_byte_of_a_shard_is_seen(shard: Path, record_property: Callable[[str, object], None]) -> None:
    whole, index, rng = shard.read_bytes(), ShardIndex.load(index_path(shard)), np.random.default_rng(1)
    seen: Counter[str] = Counter()
    for _ in range(FLIPS):
        place, changed = flipped(whole, rng)
        shard.write_bytes(changed)
        with pytest.raises(UserError, match="differs from what was indexed"):
            verify_shard(shard)
        where = region(index, place)
        if where in ("image", "mask"):
            # These are what training reads; it sees them without being asked to verify.
            shards = Shards.of([shard])
            with pytest.raises(BadSample, match=rf"key 'image_\d': the bytes differ from what was indexed \({where}\)"):
                for number in range(len(shards)):
                    shards.read(number)
        seen[where] += 1
    assert seen["header"]
    assert seen["image"]
    assert seen["mask"]
    record_property(
        "B19",
        f"{seen.total()} of {FLIPS} flips in a shard seen "
        f"({', '.join(f'{count} {name}' for name, count in sorted(seen.items()))})",
    )


@pytest.mark.parametrize("what", ["index", "catalogue"])
def test_b19_a_changed_byte_of_an_index_or_catalogue_never_changes_what_it_says(
    shard: Path, what: str, record_property: Callable[[str, object], None]
) -> None:
    path = index_path(shard) if what == "index" else catalogue_path(shard.parent, "train")
    if what == "catalogue":
        Catalogue.of([shard]).save(path)
    read = ShardIndex.load if what == "index" else Catalogue.load
    whole, rng, refused = path.read_bytes(), np.random.default_rng(2), 0
    right = repr(read(path))
    for _ in range(FLIPS):
        path.write_bytes(flipped(whole, rng)[1])
        try:
            # White space in the file's own header may change without a change of meaning.
            assert repr(read(path)) == right
        except UserError as error:
            assert str(path) in str(error)
            assert "\n" not in str(error)
            refused += 1
    assert refused >= FLIPS * 0.9
    record_property("B19", f"{refused} of {FLIPS} flips in the {what} refused, the others without effect")
