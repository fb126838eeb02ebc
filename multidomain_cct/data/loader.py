"""What a step sees: per-domain streams of labelled and unlabelled images, as batches.

The whole input pipeline is a map-style data set from the number of a micro-batch to its content. Its only state is the step number.

Shapes: B labelled images, U unlabelled images, H W crop size.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from multidomain_cct.data.augment import Augment, decode, mask_tensor, training_view, whole_view
from multidomain_cct.data.domain import IGNORE, Domain
from multidomain_cct.data.order import Stream, batch_positions, labelled_subset, seed_from
from multidomain_cct.data.shards import Shards

SCHEDULES = ("together", "alternate")
UNLABELLED = ("rest", "all", "none")


@dataclass(frozen=True)
class DomainSettings:
    """What the recipe takes of one domain. Settings left out are those of `data`."""

    labelled: str = "all"
    """How many labelled images are used: a number, a share such as 1/16, `all`, or a text file with one key a line. Smaller budgets lie inside larger ones."""
    unlabelled: str = "rest"
    """Which images of the training split are used without labels: the `rest`, `all`, or `none`."""
    train_split: str = "train"
    """Split of the labelled images."""
    unlabelled_splits: list[str] = field(default_factory=list)
    """Further splits whose images are used without labels; their masks, if any, are never read."""
    val_split: str = "val"
    """Split that is scored during training and on which `best` is chosen; never the test split. Empty: none."""
    weight: float = 1.0
    """Factor on all losses of the domain."""
    consistency_weight: float | None = None
    """Weight of the consistency loss in this domain, in place of consistency.weight."""
    labelled_batch: int | None = None
    """Labelled images of this domain per step, over all processes, in place of data.labelled_batch."""
    unlabelled_batch: int | None = None
    """Unlabelled images of this domain per step, over all processes, in place of data.unlabelled_batch."""
    crop: list[int] | None = None
    """Training crop of this domain, [width, height], in place of data.crop."""

    def __post_init__(self) -> None:
        if self.unlabelled not in UNLABELLED:
            raise ValueError(f"unlabelled is {self.unlabelled!r}; it is one of {', '.join(UNLABELLED)}.")
        for name, value in (("weight", self.weight), ("consistency_weight", self.consistency_weight)):
            if value is not None and value < 0:
                raise ValueError(f"a domain's {name} is {value}; it is 0 or more.")
        if self.labelled == "0":
            raise ValueError("labelled is 0; a domain needs at least one labelled image.")
        for name, batch in (("labelled_batch", self.labelled_batch), ("unlabelled_batch", self.unlabelled_batch)):
            if batch is not None and batch < 1:
                raise ValueError(f"{name} is {batch}; it is at least 1.")


@dataclass(frozen=True)
class DataSettings:
    """Where the shards are and how batches are made of them."""

    shards: str = "data/shards"
    """Folder with one folder of shards per domain."""
    labelled_batch: int = 8
    """Labelled images per domain and step, over all processes and accumulated micro-batches."""
    unlabelled_batch: int = 8
    """Unlabelled images per domain and step, over all processes and accumulated micro-batches."""
    crop: list[int] = field(default_factory=lambda: [320, 320])
    """Training crop, [width, height]."""
    schedule: str = "together"
    """`together`: every domain in every step; `alternate`: one domain after the other, as in the paper."""
    augment: Augment = field(default_factory=Augment)
    """Random views."""
    budget_seed: int = 0
    """Which labelled images a budget takes; apart from the run's seed, so that runs with different seeds share their labels."""
    workers: int = 2
    """Loader processes per training process; 0 loads in the training process."""
    prefetch: int = 2
    """Batches that each worker prepares ahead."""

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"data.schedule is {self.schedule!r}; it is one of {', '.join(SCHEDULES)}.")
        for name in ("labelled_batch", "unlabelled_batch", "prefetch"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} is {getattr(self, name)}; it is at least 1.")
        if self.workers < 0:
            raise ValueError(f"data.workers is {self.workers}; it is at least 0.")


@dataclass(frozen=True)
class Batch:
    """One domain's images in one step of one process."""

    images: Tensor
    """(B, 3, H, W) uint8, labelled."""
    masks: Tensor
    """(B, H, W) uint8 train ids, 255 = ignore."""
    unlabelled: Tensor
    """(U, 3, H, W) uint8; U may be 0."""
    valid: Tensor
    """(U, H, W) bool, False on padding."""
    keys: tuple[str, ...] = ()
    """Keys of the labelled, then of the unlabelled images."""

    def to(self, device: torch.device) -> Batch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(change(self.images), change(self.masks), change(self.unlabelled), change(self.valid), self.keys)


@dataclass(frozen=True)
class DomainStreams:
    """The training images of one domain: which samples are labelled, which are not, and how batches are cut from them."""

    domain: Domain
    sources: tuple[Shards, ...]
    """The training split, then the further unlabelled splits."""
    labelled: tuple[tuple[int, int], ...]
    """(source, sample number) of the labelled images."""
    unlabelled: tuple[tuple[int, int], ...]
    """(source, sample number) of the unlabelled images."""
    labelled_batch: int
    unlabelled_batch: int
    crop: tuple[int, int]
    """(width, height)"""


def open_streams(domain: Domain, settings: DomainSettings, data: DataSettings, *, use_unlabelled: bool = True) -> DomainStreams:
    """A domain's streams, from its shards and what the recipe says of them.

    Raises FileNotFoundError when shards are missing and ValueError when the budget cannot be met, naming the recipe's key.
    """
    folder = Path(data.shards) / domain.name
    train = Shards.open(folder, settings.train_split)
    with_mask = train.labelled
    where = f"domains.{domain.name}.labelled"
    chosen = set(labelled_subset([key for key, has in zip(train.keys, with_mask, strict=True) if has], settings.labelled, seed=data.budget_seed, where=where))
    if not chosen:
        raise ValueError(f"{where}: the split {settings.train_split!r} has no labelled images. Pack it with masks, or name another train_split.")
    labelled = [(0, number) for number, key in enumerate(train.keys) if key in chosen]
    sources, unlabelled = [train], []
    if use_unlabelled:
        if settings.unlabelled != "none":
            unlabelled = [(0, number) for number, key in enumerate(train.keys) if settings.unlabelled == "all" or key not in chosen]
        for position, split in enumerate(settings.unlabelled_splits, start=1):
            sources.append(Shards.open(folder, split))
            unlabelled += [(position, number) for number in range(len(sources[-1]))]
    crop = settings.crop or data.crop
    return DomainStreams(
        domain=domain,
        sources=tuple(sources),
        labelled=tuple(labelled),
        unlabelled=tuple(unlabelled),
        labelled_batch=settings.labelled_batch or data.labelled_batch,
        unlabelled_batch=settings.unlabelled_batch or data.unlabelled_batch,
        crop=(crop[0], crop[1]),
    )


@dataclass(frozen=True)
class _Refused:
    """A sample's error, carried from a loader process to the training process as a value so that it stays one line."""

    message: str


class TrainingSet(Dataset[Any]):
    """Micro-batch number -> {domain name: Batch}, for one process.

    A step has `accumulation` micro-batches. The global batch of a step is cut into accumulation x world equal parts; how many there are changes neither
    which images a step sees nor their augmentation.
    """

    def __init__(
        self, streams: Sequence[DomainStreams], *, seed: int, augment: Augment, schedule: str = "together", rank: int = 0, world: int = 1, accumulation: int = 1
    ) -> None:
        self.streams = tuple(streams)
        self.seed, self.augment, self.schedule = seed, augment, schedule
        self.rank, self.world, self.accumulation = rank, world, accumulation
        parts = world * accumulation
        for stream in self.streams:
            for kind in ("labelled_batch", "unlabelled_batch"):
                if getattr(stream, kind) % parts:
                    raise ValueError(
                        f"{stream.domain.name}: {kind} is {getattr(stream, kind)}, which {world} process(es) x {accumulation} accumulated micro-batches do not"
                        f" divide. Use a multiple of {parts}."
                    )

    def __getitem__(self, micro_batch: int) -> dict[str, Batch] | _Refused:
        step, part = divmod(micro_batch, self.accumulation)
        if self.schedule == "alternate":
            turn, position = divmod(step, len(self.streams))
            present, turns = self.streams[position : position + 1], turn
        else:
            present, turns = self.streams, step
        try:
            return {stream.domain.name: self._batch(stream, turns, part * self.world + self.rank) for stream in present}
        except (ValueError, OSError) as error:
            return _Refused(str(error))

    def _batch(self, streams: DomainStreams, turn: int, part: int) -> Batch:
        parts = self.world * self.accumulation
        labelled = self._views(streams, "labelled", batch_positions(turn, streams.labelled_batch, part=part, parts=parts))
        unlabelled = self._views(streams, "unlabelled", batch_positions(turn, streams.unlabelled_batch, part=part, parts=parts))
        return Batch(labelled[0], labelled[1], unlabelled[0], unlabelled[1] != IGNORE, keys=labelled[2] + unlabelled[2])

    def _views(self, streams: DomainStreams, kind: str, positions: range) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        samples = streams.labelled if kind == "labelled" else streams.unlabelled
        name = streams.domain.name
        width, height = streams.crop
        if not samples:
            return torch.empty(0, 3, height, width, dtype=torch.uint8), torch.empty(0, height, width, dtype=torch.uint8), ()
        order = Stream(f"{name}/{kind}", len(samples), self.seed)
        views, keys = [], []
        for position in positions:
            epoch, chosen = order.at(position)
            source, number = samples[chosen]
            record = streams.sources[source].read(number, with_mask=kind == "labelled")
            image, mask = decode(record, streams.domain)
            if mask is not None and mask.size != image.size:
                raise ValueError(
                    f"{record.shard}: key {record.key!r}: the mask is {mask.size[0]}x{mask.size[1]} but the image is {image.size[0]}x{image.size[1]}. Pack the"
                    " split again."
                )
            rng = np.random.default_rng(seed_from(self.seed, name, epoch, record.key, kind))
            views.append(training_view(image, mask, self.augment, streams.crop, rng))
            keys.append(record.key)
        return torch.stack([view for view, _ in views]), torch.stack([ids for _, ids in views]), tuple(keys)


def steps(data: TrainingSet, start: int, stop: int, *, workers: int, prefetch: int = 2, pin_memory: bool = False) -> Iterator[dict[str, Batch]]:
    """The micro-batches of the steps from `start` (inclusive) to `stop`, in order; each step has `data.accumulation` of them.

    Raises ValueError with one line when a sample cannot be used.
    """
    numbers = range(start * data.accumulation, stop * data.accumulation)
    for item in _loader(data, numbers, workers=workers, prefetch=prefetch, pin_memory=pin_memory):
        if isinstance(item, _Refused):
            raise ValueError(item.message)
        yield item


@dataclass(frozen=True)
class ScoredImage:
    """One image of an evaluation split."""

    key: str
    image: Tensor
    """(3, H, W) uint8."""
    mask: Tensor
    """(H', W') uint8 train ids at the labels' own resolution, which may differ from the image's."""


class _ScoredSet(Dataset[Any]):
    def __init__(self, shards: Shards, domain: Domain) -> None:
        self.shards, self.domain = shards, domain

    def __getitem__(self, number: int) -> ScoredImage | _Refused:
        try:
            record = self.shards.read(number)
            image, mask = decode(record, self.domain)
            if mask is None:
                raise ValueError(f"{record.shard}: key {record.key!r} has no mask. Only labelled splits can be scored.")
            return ScoredImage(record.key, whole_view(image), mask_tensor(mask))
        except (ValueError, OSError) as error:
            return _Refused(str(error))


def scored_images(shards: Shards, domain: Domain, numbers: Sequence[int], *, workers: int) -> Iterator[ScoredImage]:
    """The samples with these numbers, whole, with their masks."""
    for item in _loader(_ScoredSet(shards, domain), numbers, workers=workers, prefetch=4, pin_memory=False):
        if isinstance(item, _Refused):
            raise ValueError(item.message)
        yield item


def _loader(data: Dataset[Any], numbers: Sequence[int], *, workers: int, prefetch: int, pin_memory: bool) -> DataLoader[Any]:
    # A range is a sampler of item numbers; batch_size=None because an item is a whole batch already.
    return DataLoader(
        data,
        sampler=numbers,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_leave_interrupts_to_the_parent,
        # A loader draws a seed for its workers when it starts; from its own generator, or a resumed run would differ from an uninterrupted one.
        generator=torch.Generator().manual_seed(0),
    )


def _leave_interrupts_to_the_parent(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
