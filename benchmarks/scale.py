"""A thousand million samples in a hundred thousand shards, without their data: memory of index and order, time to the
first batch, time to seek.

    python benchmarks/scale.py

The index is made up and every sample shows the same image; the catalogue, the selection, the order, the loader and the
decoding are those of a run. Prints the figures of docs/scale.md: at most 1 s to seek, at most 100 MB a process beyond
the indexes in use.
"""

from __future__ import annotations

import gc
import io
import os
import re
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from multidomain_cct.data.batches.loader import TrainingSet, steps
from multidomain_cct.data.batches.selection import Selection
from multidomain_cct.data.batches.streams import DomainStreams
from multidomain_cct.data.batches.views import Augment
from multidomain_cct.data.domain import Domain, LabelClass
from multidomain_cct.data.shards.catalogue import Catalogue, catalogue_path
from multidomain_cct.data.shards.index import ShardIndex
from multidomain_cct.data.shards.reader import Shards

NUM_SHARDS, PER_SHARD, BATCH, WINDOW = 100_000, 10_000, 8, 64


@dataclass(frozen=True)
class MadeUpFolder:
    """Made-up shards that all show one image, with the methods of LocalFolder."""

    image: Path

    def location(self, name: str) -> str:
        return name

    def index(self, catalogue: Catalogue, shard: int) -> ShardIndex:
        content = self.image.read_bytes()
        absent = np.full((PER_SHARD, 3), -1, dtype=np.int64)
        size, crc32 = absent.copy(), absent.copy()
        size[:, 0], crc32[:, 0] = len(content), zlib.crc32(content)
        keys = tuple(f"{shard:06d}_{row:05d}" for row in range(PER_SHARD))
        return ShardIndex(keys, np.zeros_like(absent), size, crc32, len(content), "", {})

    def descriptor(self, catalogue: Catalogue, shard: int) -> int:
        return os.open(self.image, os.O_RDONLY)


def made_up_catalogue() -> Catalogue:
    def checksums(width: int) -> np.ndarray:
        return np.random.default_rng(width).integers(0, 256, (NUM_SHARDS, width), dtype=np.uint8)

    names = tuple(f"train-{number:05d}.tar" for number in range(NUM_SHARDS))
    counts = np.full(NUM_SHARDS, PER_SHARD, dtype=np.int64)
    return Catalogue(names, counts, np.zeros_like(counts), counts * 30_000, checksums(32), checksums(32), checksums(16))


def resident() -> float:
    """MB of this process."""
    gc.collect()
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1000


def streams(shards: Shards, window: int) -> DomainStreams:
    samples = Selection.all_but(0, len(shards))
    domain = Domain("web", "folder", {}, (LabelClass("ground", (0, 0, 0)),))
    return DomainStreams(domain, (shards,), Selection(), samples, None, BATCH, BATCH, (320, 320), window)


def first_batch(source: DomainStreams, start: int) -> tuple[float, tuple[str, ...]]:
    """Seconds from the step's number to its batch, and the batch's keys."""
    began = time.perf_counter()
    batch = next(steps(TrainingSet([source], seed=0, augment=Augment()), start, start + 1, workers=0))["web"]
    return time.perf_counter() - began, batch.keys


def measure(window: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        image, buffer = Path(folder) / "image.jpg", io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (320, 480, 3), dtype=np.uint8)).save(buffer, "JPEG")
        image.write_bytes(buffer.getvalue())
        path = catalogue_path(Path(folder), "train")
        made_up_catalogue().save(path)
        # The first batch of all pays for what is imported when first used.
        first_batch(
            streams(
                Shards(
                    MadeUpFolder(image),
                    Catalogue(("a.tar",), np.array([99]), np.array([0]), *(np.zeros((1, 1), np.uint8),) * 4),
                ),
                0,
            ),
            0,
        )
        before, began = resident(), time.perf_counter()
        shards = Shards(MadeUpFolder(image), Catalogue.load(path))
        source, opened = streams(shards, window), time.perf_counter() - began
        late = len(shards) // BATCH * 99 // 100
        seconds, keys = first_batch(source, 0)
        seek, late_keys = first_batch(source, late)
        used, index = resident() - before, shards._index_bytes / 1e6
    assert len({*keys, *late_keys}) == 2 * BATCH
    print(
        f"{len(shards):.0e} samples, {NUM_SHARDS:.0e} shards, window {window}: opened in {opened:.2f} s, first batch "
        f"in {seconds:.2f} s, batch at 99 % in "
        f"{seek:.2f} s; {used:.0f} MB more in the process, about {index:.0f} MB of them indexes in use"
    )


def main() -> None:
    if len(sys.argv) == 2:
        measure(int(sys.argv[1]))
        return
    # A process each: memory that one has given back would be used again by the next.
    for window in (0, WINDOW):
        subprocess.run([sys.executable, __file__, str(window)], check=True)


if __name__ == "__main__":
    main()
