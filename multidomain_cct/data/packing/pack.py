"""Raw data set -> shards: every image decoded, fitted, encoded and written once, in a seeded order, with reproducible
bytes.

Workers encode; the parent writes in order, so the bytes do not depend on the number of workers. A shard that is
finished stays; packing again after an interruption goes on behind it.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from multidomain_cct.data.domain import IGNORE, Domain
from multidomain_cct.data.packing.encode import JPEG_QUALITY, Encoded, Encoder
from multidomain_cct.data.packing.layouts import raw_samples
from multidomain_cct.data.packing.raw_files import RawSample
from multidomain_cct.data.shards.index import ShardIndex, index_path, shard_paths
from multidomain_cct.data.shards.writer import MAX_SHARD_BYTES, ShardWriter
from multidomain_cct.errors import UserError
from multidomain_cct.files.seeds import seed_from


@dataclass
class Summary:
    """What lies in the packed shards of a split."""

    images: int = 0
    labelled: int = 0
    image_bytes: int = 0
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(256, dtype=np.int64))
    """Mask pixels per train id; the last entry counts ignored ones."""
    unknown: Counter[str] = field(default_factory=Counter)
    """Pixels per raw value that the class table does not name."""
    sizes: Counter[str] = field(default_factory=Counter)
    """Images per stored size, WIDTHxHEIGHT."""
    shards: int = 0

    def add(self, encoded: Encoded) -> None:
        self.images += 1
        self.labelled += encoded.mask is not None
        self.image_bytes += len(encoded.image)
        self.pixels += encoded.pixels
        self.unknown.update(encoded.unknown)
        self.sizes[encoded.stored_size] += 1

    def as_json(self) -> dict[str, Any]:
        plain = {
            "images": self.images,
            "labelled": self.labelled,
            "image_bytes": self.image_bytes,
            "pixels": self.pixels.tolist(),
        }
        return plain | {"unknown": dict(sorted(self.unknown.items())), "sizes": dict(sorted(self.sizes.items()))}

    def add_json(self, plain: dict[str, Any]) -> None:
        for name in ("images", "labelled", "image_bytes"):
            setattr(self, name, getattr(self, name) + plain[name])
        self.pixels += np.array(plain["pixels"], dtype=np.int64)
        self.unknown.update(plain["unknown"])
        self.sizes.update(plain["sizes"])


def pack(
    domain: Domain,
    raw: Path,
    split: str,
    out: Path,
    *,
    workers: int | None = None,
    seed: int = 0,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] | None = None,
) -> Summary:
    """Write the shards of one split into `out/<domain>/` and return what lies in them.

    `progress(samples, total)` wraps the iteration over finished samples. Raises UserError for raw data that cannot be
    used, and for shards that an earlier packing with other settings left there; nothing that was there is changed then.
    """
    samples = raw_samples(domain, raw, split)
    samples.sort(key=lambda sample: (seed_from(seed, sample.key, "pack"), sample.key))
    folder = out / domain.name
    plan = _plan(domain, split, samples, seed, max_shard_bytes)
    summary, shards_done = _finished_part(folder, split, plan, samples)
    remaining = samples[summary.images :]
    current = Summary()

    def note() -> dict[str, Any]:
        return {"plan": plan, "summary": current.as_json(), "total": len(samples)}

    encoded = _encode_all(Encoder(domain, raw, split), remaining, workers or os.cpu_count() or 1)
    with ShardWriter(folder, split, first_shard=shards_done, max_bytes=max_shard_bytes, note=note) as writer:
        for item in encoded if progress is None else progress(encoded, len(remaining)):
            # The note of a finished shard must not count the sample that opens the next one.
            if writer.is_full(len(item.image) + len(item.mask or b"")):
                writer.publish()
                summary.add_json(current.as_json())
                current = Summary()
            writer.write(item.key, image=item.image, mask=item.mask, meta=item.meta)
            current.add(item)
    summary.add_json(current.as_json())
    summary.shards = len(shard_paths(folder, split))
    return summary


def _plan(domain: Domain, split: str, samples: list[RawSample], seed: int, max_shard_bytes: int) -> str:
    """Digest of everything that decides the bytes of the shards; raw files stand in it with their sizes, not their
    contents.
    """
    labels = [(label.name, label.ids, label.colors, label.color) for label in domain.classes]
    facts: list[Any] = [
        domain.name,
        split,
        domain.size,
        domain.unknown,
        split in domain.score_at_full_size,
        labels,
        domain.ignore_ids,
        domain.ignore_colors,
        seed,
        max_shard_bytes,
    ]
    facts += [JPEG_QUALITY, PIL.__version__]
    for sample in samples:
        mask = sample.mask
        facts.append(
            [sample.key, sample.image.stat().st_size, mask is not None and [mask.train_ids, mask.path.stat().st_size]]
        )
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _finished_part(folder: Path, split: str, plan: str, samples: list[RawSample]) -> tuple[Summary, int]:
    """What the finished shards of an interrupted packing hold, and their number."""
    summary = Summary()
    paths = shard_paths(folder, split)
    for number, path in enumerate(paths):
        notes = ShardIndex.load(index_path(path)).notes if index_path(path).is_file() else {}
        if notes.get("plan") != plan:
            raise UserError(
                f"{path} was packed from other raw files, another class table or other settings. Remove it to pack "
                "again, or choose another folder with --out."
            )
        expected = folder / f"{split}-{number:05d}.tar"
        if path != expected:
            # The samples of a missing shard would be taken for those of the next one.
            raise UserError(
                f"{path} is there, but {expected} before it is missing. Put that back, or remove the {split} shards "
                "to pack the split again."
            )
        summary.add_json(notes["summary"])
    return summary, len(paths)


def _encode_all(encode: Encoder, samples: list[RawSample], workers: int) -> Iterator[Encoded]:
    """The encoded samples, in order, a bounded number of them ahead of the writer."""
    if workers == 1 or len(samples) < 2:
        results: Iterable[Encoded | str] = map(encode, samples)
        yield from map(_unless_refused, results)
        return
    # Spawned, not forked: the parent draws its progress from a thread, and a fork would copy that thread's locks.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)
    )
    try:
        waiting = iter(_chunks(samples, size=8))
        pending: deque[Future[list[Encoded | str]]] = deque(
            pool.submit(encode.encode_chunk, chunk) for chunk in islice(waiting, 3 * workers)
        )
        while pending:
            finished = pending.popleft().result()
            pending.extend(pool.submit(encode.encode_chunk, chunk) for chunk in islice(waiting, 1))
            yield from map(_unless_refused, finished)
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(samples: list[RawSample], size: int) -> Iterator[list[RawSample]]:
    return (samples[start : start + size] for start in range(0, len(samples), size))


def _unless_refused(result: Encoded | str) -> Encoded:
    if isinstance(result, str):
        raise UserError(result)
    return result


def ignored_share(summary: Summary) -> float:
    """Share of the mask pixels that have no class, 0 to 1."""
    return float(summary.pixels[IGNORE]) / max(1, int(summary.pixels.sum()))
