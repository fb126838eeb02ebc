"""B4: every sample stands once in each epoch, whatever the numbers of samples, processes, workers and shards."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from multidomain_cct.data.batches.loader import TrainingSet, steps
from multidomain_cct.data.batches.streams import DataSettings, DomainSettings, open_streams
from multidomain_cct.data.batches.views import Augment
from multidomain_cct.data.domain import Domain, LabelClass, Split
from multidomain_cct.data.shards.writer import ShardWriter

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

SIZES = (1, 2, 3, 5, 8, 13, 21, 30)
EXAMPLES = 220


def domain(size: int) -> Domain:
    return Domain(f"d{size}", "folder", {"train": Split("*.jpg", "*.png")}, (LabelClass("ground", (0, 0, 0)),))


def picture(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A domain for each size, in shards of 1 to 4 samples."""
    root, image, mask = tmp_path_factory.mktemp("shards"), picture("JPEG"), picture("PNG")
    for size in SIZES:
        with ShardWriter(root / f"d{size}", "train") as writer:
            for number in range(size):
                writer.write(f"{number:02d}", image=image, mask=mask, meta=b"{}")
                if number % 7 in (0, 2, 6) and number + 1 < size:
                    writer.publish()
    return root


def seen(
    root: Path,
    sizes: tuple[int, int],
    share: int,
    world: int,
    workers: int,
    seed: int,
    schedule: str,
    window: int,
    epochs: int,
) -> dict[str, list[str]]:
    """By domain, the keys of the labelled images of that many epochs and more, in the order of their positions."""
    data = DataSettings(
        shards=str(root),
        labelled_batch=share * world,
        unlabelled_batch=share * world,
        crop=[8, 8],
        schedule=schedule,
        window=window,
    )
    streams = [open_streams(domain(size), DomainSettings(), data, use_unlabelled=False) for size in sizes]
    turns = -(-epochs * max(sizes) // (share * world))
    count = turns * (len(sizes) if schedule == "alternate" else 1)
    keys: dict[str, list[str]] = {stream.domain.name: [] for stream in streams}
    ranks = [
        TrainingSet(streams, seed=seed, augment=Augment(), schedule=schedule, rank=rank, world=world)
        for rank in range(world)
    ]
    for batches in zip(*(steps(rank, 0, count, workers=workers) for rank in ranks), strict=True):
        for batch in batches:
            for name, part in batch.items():
                keys[name] += part.keys
    return keys


def test_b04_every_sample_stands_once_in_each_epoch(
    shards: Path, record_property: Callable[[str, object], None]
) -> None:
    tried = 0

    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(
        sizes=st.tuples(st.sampled_from(SIZES), st.sampled_from(SIZES)).filter(lambda pair: pair[0] != pair[1]),
        share=st.integers(1, 5),
        world=st.integers(1, 3),
        # Starting processes takes most of the time: one case in eight has them.
        workers=st.sampled_from([0] * 14 + [1, 2]),
        seed=st.integers(0, 2**40),
        schedule=st.sampled_from(["together", "alternate"]),
        window=st.integers(0, 4),
    )
    def check(
        sizes: tuple[int, int], share: int, world: int, workers: int, seed: int, schedule: str, window: int
    ) -> None:
        nonlocal tried
        for size, keys in zip(
            sizes, seen(shards, sizes, share, world, workers, seed, schedule, window, epochs=2).values(), strict=True
        ):
            every = [f"{number:02d}" for number in range(size)]
            assert sorted(keys[:size]) == every
            assert sorted(keys[size : 2 * size]) == every
        tried += 1

    check()
    assert tried >= 200
    record_property("B4", f"0 missing, 0 repeated in {tried} random settings")
