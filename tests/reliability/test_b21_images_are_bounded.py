"""B21: what would unfold into more than memory holds is refused from its header, and only known formats are opened."""

from __future__ import annotations

import io
import re
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from multidomain_cct.data.batches.views import decode
from multidomain_cct.data.domain import Domain, LabelClass
from multidomain_cct.data.shards.reader import BadSample, Record

DOMAIN = Domain("yard", "folder", {}, (LabelClass("ground", (0, 0, 0)),))


def png(width: int, height: int, body: bytes, extra: bytes = b"") -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def zeros(count: int) -> bytes:
    """So many zero bytes, deflated."""
    deflate, block = zlib.compressobj(1), bytes(1 << 20)
    return (
        b"".join(deflate.compress(block) for _ in range(count >> 20))
        + deflate.compress(bytes(count & 0xFFFFF))
        + deflate.flush()
    )


def saved(kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, kind, **options)
    return buffer.getvalue()


def large_jpeg() -> bytes:
    content = saved("JPEG")
    frame = content.index(b"\xff\xc0")
    return content[: frame + 5] + struct.pack(">HH", 65000, 65000) + content[frame + 9 :]


def text_bomb() -> bytes:
    content = b"Comment\0\0" + zeros(100 << 20)
    return struct.pack(">I", len(content)) + b"zTXt" + content + struct.pack(">I", zlib.crc32(b"zTXt" + content))


def bombs() -> dict[str, bytes]:
    small = zlib.compress(b"\0" * 17)
    # Its pixels are really there: 100 million of them.
    whole = zeros(10000 * 10001)
    return {
        "a PNG that claims to be huge": png(60000, 60000, small),
        "a PNG of one endless row": png(2**31 - 1, 1, small),
        "a huge PNG": png(10000, 10000, whole),
        "a JPEG that claims to be huge": large_jpeg(),
        "a BMP that claims to be huge": saved("BMP")[:18] + struct.pack("<ii", 60000, 60000) + saved("BMP")[26:],
        "a GIF that claims to be huge": saved("GIF")[:6] + struct.pack("<HH", 65000, 65000) + saved("GIF")[10:],
        "a PPM that claims to be huge": b"P6 60000 60000 255\n\0",
        "a PNG with an endless comment": png(4, 4, zlib.compress(b"\0" * 20), text_bomb()),
    }


def resident(field: str) -> float:
    """MB of this process: VmRSS now, VmHWM at its peak since that was last forgotten."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1000


def refuse(image: bytes, mask: bytes | None = None) -> tuple[float, float]:
    """Seconds and MB that it took to refuse the sample."""
    Path("/proc/self/clear_refs").write_text("5")
    before, started = resident("VmRSS"), time.perf_counter()
    with pytest.raises(
        BadSample, match=r"train-00000.tar: key 'image_7': the (image|mask) .*(cannot be read|too large)"
    ) as error:
        decode(Record("image_7", "train-00000.tar", image, mask), DOMAIN)
    assert "\n" not in str(error.value)
    return time.perf_counter() - started, resident("VmHWM") - before


def test_b21_bombs_are_refused_at_once_as_image_and_as_mask(record_property: Callable[[str, object], None]) -> None:
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    assert len(b"x" * (100 << 20))
    assert resident("VmHWM") - before > 90, "memory that was taken and given back is seen"
    made = bombs()
    costs = [refuse(content) for content in made.values()]
    costs += [refuse(saved("JPEG"), content) for name, content in made.items() if "PNG" in name]
    seconds, growth = (max(column) for column in zip(*costs, strict=True))
    record_property("B21", f"{len(costs)} bombs refused, in {1000 * seconds:.0f} ms and {growth:.0f} MB at most")
    assert seconds < 1
    assert growth < 200


@pytest.mark.parametrize("kind", ["EPS", "PDF", "ICO", "TGA", "PCX", "SGI", "JPEG2000", "DDS", "MSP"])
def test_b21_formats_that_nobody_asked_for_are_not_opened(kind: str, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("1" if kind == "MSP" else "RGB", (16, 16)).save(buffer, kind)
    refuse(buffer.getvalue())
    refuse(saved("JPEG"), buffer.getvalue())


@pytest.mark.parametrize("kind", ["JPEG", "BMP", "GIF", "TIFF", "WEBP"])
def test_b21_a_mask_is_a_png_and_nothing_else(kind: str) -> None:
    refuse(saved("JPEG"), saved(kind))
