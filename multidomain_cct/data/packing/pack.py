"""Raw data set -> shards: every image is decoded, resized, encoded and written once, in a seeded order.

Workers encode and the parent writes in order, so the bytes do not depend on the number of workers. After an
interruption, packing again continues after the finished shards.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from multidomain_cct.data.domain import Domain
from multidomain_cct.data.packing.encode import JPEG_QUALITY, Encoded, Encoder
from multidomain_cct.data.packing.layouts import raw_samples
from multidomain_cct.data.packing.raw_files import RawSample
from multidomain_cct.data.shards.index import ShardIndex, index_path, shard_paths
from multidomain_cct.data.shards.writer import MAX_SHARD_BYTES, ShardWriter
from multidomain_cct.errors import UserError
from multidomain_cct.files.seeds import seed_from

_CHUNK = 8
"""Samples that a worker encodes at a time."""
_SEED = 0
"""Of the order in the shards."""


@dataclass
class Summary:
    """Contents of the packed shards of a split."""

    images: int = 0
    labelled: int = 0
    image_bytes: int = 0
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(256, dtype=np.int64))
    """Mask pixels per train id; the last entry counts ignored ones."""
    unknown: Counter[str] = field(default_factory=Counter)
    """Pixels per raw value that the class table lacks."""
    sizes: Counter[str] = field(default_factory=Counter)
    """Images per stored size, WIDTHxHEIGHT."""
    remarks: Counter[str] = field(default_factory=Counter)
    """Images by what was done to them that is worth a look."""
    shards: int = 0

    def add(self, facts: Mapping[str, Any]) -> None:
        """Add what another summary, or one sample, holds, as `as_json` gives it."""
        self.images += facts["images"]
        self.labelled += facts["labelled"]
        self.image_bytes += facts["image_bytes"]
        self.pixels += np.array(facts["pixels"], dtype=np.int64)
        self.unknown.update(facts["unknown"])
        self.sizes.update(facts["sizes"])
        # Shards of earlier versions have none.
        self.remarks.update(facts.get("remarks", {}))

    def as_json(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "shards"} | {
            "pixels": self.pixels.tolist()
        }


def pack(
    domain: Domain,
    raw: Path,
    split: str,
    out: Path,
    *,
    workers: int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] | None = None,
) -> Summary:
    """Write the shards of one split into `out/<domain>/` and return a summary of them.

    `progress(samples, total)` wraps the iteration over finished samples. Raises UserError for raw data that cannot be
    used, and, leaving them unchanged, for shards of an earlier packing with other settings.
    """
    samples = raw_samples(domain, raw, split)
    samples.sort(key=lambda sample: (seed_from(_SEED, sample.key, "pack"), sample.key))
    folder = out / domain.name
    plan = _plan(domain, split, samples, max_shard_bytes)
    summary, shards_done = _finished_part(folder, split, plan, samples)
    remaining = samples[summary.images :]
    current = Summary()

    def note() -> dict[str, Any]:
        return {"plan": plan, "summary": current.as_json(), "total": len(samples)}

    encoded = _encode_all(Encoder(domain, raw, split), remaining, workers or os.cpu_count() or 1)
    with ShardWriter(folder, split, first_shard=shards_done, max_bytes=max_shard_bytes, note=note) as writer:
        for item in encoded if progress is None else progress(encoded, len(remaining)):
            # Before the sample is added: the note of a finished shard does not count the first sample of the next.
            if writer.is_full(len(item.image) + len(item.mask or b"")):
                writer.publish()
                summary.add(current.as_json())
                current = Summary()
            pixels = dict(enumerate(item.facts["pixels"]))
            writer.write(item.key, image=item.image, mask=item.mask, meta=item.meta, pixels=pixels)
            current.add(item.facts)
    summary.add(current.as_json())
    summary.shards = len(shard_paths(folder, split))
    return summary


def _plan(domain: Domain, split: str, samples: list[RawSample], max_shard_bytes: int) -> str:
    """Digest of everything that determines the bytes of the shards; of raw files the sizes, not the contents."""
    labels: list[Any] = [(label.name, label.ids, label.colors, label.color) for label in domain.classes]
    if any(sample.mask and sample.mask.holds_shapes for sample in samples):
        labels += [domain.background, domain.ignore_names, *(label.names for label in domain.classes)]
    facts: list[Any] = [domain.name, split, domain.size, domain.unknown, split in domain.score_at_full_size, labels]
    facts += [domain.ignore_ids, domain.ignore_colors, _SEED, max_shard_bytes, JPEG_QUALITY, PIL.__version__]
    for sample in samples:
        mask = sample.mask and [sample.mask.train_ids, *(path.stat().st_size for path in sample.mask.files)]
        facts.append([sample.key, sample.image.stat().st_size, mask or False])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _finished_part(folder: Path, split: str, plan: str, samples: list[RawSample]) -> tuple[Summary, int]:
    """The summary of the finished shards of an interrupted packing, and their number."""
    summary = Summary()
    paths = shard_paths(folder, split)
    for number, path in enumerate(paths):
        notes = ShardIndex.load(index_path(path)).notes if index_path(path).is_file() else {}
        if notes.get("plan") != plan:
            remedy = "Remove it to pack again, or choose another folder with --out."
            raise UserError(f"{path} was packed from other raw files, another class table or other settings. {remedy}")
        expected = folder / f"{split}-{number:05d}.tar"
        if path != expected:
            # Otherwise the next shard's samples would count as those of the missing one.
            remedy = f"Put that back, or remove the {split} shards to pack the split again."
            raise UserError(f"{path} exists, but {expected} before it is missing. {remedy}")
        summary.add(notes["summary"])
    return summary, len(paths)


def _encode_all(encode: Encoder, samples: list[RawSample], workers: int) -> Iterator[Encoded]:
    """The encoded samples, in order, a bounded number of them ahead of the writer."""
    alone = workers == 1 or len(samples) < 2
    chunks = map(encode, ([sample] for sample in samples)) if alone else _encode_in_processes(encode, samples, workers)
    for item in chain.from_iterable(chunks):
        if isinstance(item, str):
            raise UserError(item)
        yield item


def _encode_in_processes(encode: Encoder, samples: list[RawSample], workers: int) -> Iterator[list[Encoded | str]]:
    chunks = (samples[start : start + _CHUNK] for start in range(0, len(samples), _CHUNK))
    # Spawned, not forked: the parent draws its progress from a thread, and a fork would copy that thread's locks.
    context = multiprocessing.get_context("spawn")
    ignore = (signal.SIGINT, signal.SIG_IGN)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=signal.signal, initargs=ignore)
    try:
        pending = deque(pool.submit(encode, chunk) for chunk in islice(chunks, 3 * workers))
        while pending:
            finished = pending.popleft().result()
            pending.extend(pool.submit(encode, chunk) for chunk in islice(chunks, 1))
            yield finished
    finally:
        pool.shutdown(cancel_futures=True)
