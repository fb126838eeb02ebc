"""What a step sees: per-domain streams of labelled and unlabelled images, as batches.

The whole input pipeline is a map-style data set from the number of a micro-batch to its content. Its only state is the
step number.

Shapes: B labelled images, U unlabelled images, H W crop size.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from multidomain_cct.data.batches.loader_room import require_room, tensor_bytes
from multidomain_cct.data.batches.order import batch_positions
from multidomain_cct.data.batches.streams import DomainStreams
from multidomain_cct.data.batches.views import Augment, View, decode, image_tensor, mask_tensor, training_view
from multidomain_cct.data.domain import Domain
from multidomain_cct.data.shards.download import SourceError
from multidomain_cct.data.shards.reader import BadSample, Shards
from multidomain_cct.errors import UserError
from multidomain_cct.files.seeds import seed_from

_SCORED_AHEAD = 4
"""Images that each worker prepares ahead in an evaluation."""

_SUBSTITUTES = 16
"""Samples that are tried in place of one that cannot be used."""

_QUIET_SECONDS = 0.05
"""Time in which gloo's threads finish before loader processes are forked."""


@dataclass(frozen=True)
class Skipped:
    """An image that could not be used."""

    key: str
    reason: str
    """The same words for all images with this fault, to count by."""
    message: str
    """One line: shard, key, field, what was found."""


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
    pseudo_labels: Tensor | None = None
    """(U, H, W) uint8 train ids made from image-level labels, 255 = unsure or none; None in a domain without such
    images.
    """
    skipped: tuple[Skipped, ...] = ()
    """The images that could not be used and were replaced by others."""

    def to(self, device: torch.device) -> Batch:
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory. DataLoader calls this in its own thread."""
        return self._mapped(Tensor.pin_memory)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **changed)


@dataclass(frozen=True)
class _Refused:
    """A sample's error as a value, so that it leaves a loader process as one line, not as a traceback."""

    message: str
    error: type[UserError] | type[SourceError]


class TrainingSet(Dataset[Any]):
    """Micro-batch number -> {domain name: Batch}, for one process.

    A step has `accumulation` micro-batches. The global batch of a step is cut into accumulation x world equal parts;
    their number changes neither which images a step sees nor their augmentation.
    """

    def __init__(
        self,
        streams: Sequence[DomainStreams],
        *,
        seed: int,
        augment: Augment,
        schedule: str = "together",
        rank: int = 0,
        world: int = 1,
        accumulation: int = 1,
    ) -> None:
        self.streams = tuple(streams)
        self.seed, self.augment, self.schedule = seed, augment, schedule
        self.rank, self.world, self.accumulation = rank, world, accumulation
        if not self.streams:
            raise ValueError("no stream has images")
        self._orders = {
            (stream.domain.name, subset): stream.order(subset, seed)
            for stream in self.streams
            for subset in ("labelled", "unlabelled")
        }
        parts = world * accumulation
        for stream in self.streams:
            for subset in ("labelled", "unlabelled"):
                if stream.samples(subset) and stream.batch(subset) % parts:
                    raise ValueError(f"{stream.domain.name}: {parts} parts do not divide {subset}_batch")

    def __getitem__(self, micro_batch: int) -> dict[str, Batch] | _Refused:
        turn, part = divmod(micro_batch, self.accumulation)
        present = self.streams
        if self.schedule == "alternate":
            turn, position = divmod(turn, len(self.streams))
            present = self.streams[position : position + 1]
        try:
            return {stream.domain.name: self._batch(stream, turn, part * self.world + self.rank) for stream in present}
        except (UserError, OSError) as error:
            return _Refused(str(error), SourceError if isinstance(error, SourceError) else UserError)

    def _batch(self, streams: DomainStreams, turn: int, part: int) -> Batch:
        skipped: list[Skipped] = []
        labelled = self._views(streams, "labelled", turn, part, skipped)
        unlabelled = self._views(streams, "unlabelled", turn, part, skipped)
        size = streams.crop[::-1]
        return Batch(
            images=_stacked_images(labelled, size),
            masks=_stacked([view.ids for view in labelled], size),
            unlabelled=_stacked_images(unlabelled, size),
            valid=_stacked([view.inside for view in unlabelled], size, torch.bool),
            keys=tuple(view.key for view in [*labelled, *unlabelled]),
            pseudo_labels=None if streams.weak_source is None else _stacked([view.ids for view in unlabelled], size),
            skipped=tuple(skipped),
        )

    def _views(
        self, streams: DomainStreams, subset: str, turn: int, part: int, skipped: list[Skipped]
    ) -> tuple[View, ...]:
        """The views of one part of a batch; none of an empty stream. Images that are passed over join `skipped`."""
        order = self._orders[streams.domain.name, subset]
        if not order.num_samples:
            return ()
        positions = batch_positions(turn, streams.batch(subset), part=part, parts=self.world * self.accumulation)
        return tuple(self._usable_view(streams, subset, *order.at(position), skipped) for position in positions)

    def _usable_view(
        self, streams: DomainStreams, subset: str, epoch: int, chosen: int, skipped: list[Skipped]
    ) -> View:
        """The view of a sample. If it cannot be used and skipping is allowed, the next usable sample in the shards
        takes its place; all other positions stay.
        """
        samples = streams.samples(subset)
        for step in range(min(_SUBSTITUTES + 1, len(samples))):
            source, number = samples[(chosen + step) % len(samples)]
            try:
                return self._view(streams, subset, epoch, source, number)
            except BadSample as error:
                if streams.max_bad is None:
                    raise
                skipped.append(Skipped(streams.sources[source].keys[number], error.reason, str(error)))
        last = f"It is the last of {step + 1} neighbouring samples that cannot be used; check the shard."
        raise UserError(f"{skipped[-1].message} {last}")

    def _view(self, streams: DomainStreams, subset: str, epoch: int, source: int, number: int) -> View:
        with_mask = subset == "labelled" or source == streams.weak_source
        record = streams.sources[source].read(number, with_mask=with_mask)
        rng = np.random.default_rng(seed_from(self.seed, streams.domain.name, epoch, record.key, subset))
        return training_view(record, streams.domain, self.augment, streams.crop, rng)


def _stacked(parts: Sequence[Tensor], size: Sequence[int], dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.stack(list(parts)) if parts else torch.empty(0, *size, dtype=dtype)


def _stacked_images(views: Sequence[View], size: Sequence[int]) -> Tensor:
    """(n, 3, H, W) with channels last in memory, as in the views: torch.stack would reorder them pixel by pixel."""
    return _stacked([view.image.permute(1, 2, 0) for view in views], [*size, 3]).permute(0, 3, 1, 2)


def steps(
    data: TrainingSet, start: int, stop: int, *, workers: int, prefetch: int = 2, pin_memory: bool = False
) -> Iterator[dict[str, Batch]]:
    """The micro-batches of the steps from `start` (inclusive) to `stop`, in order; each step has `data.accumulation` of
    them.

    Raises UserError with one line when the machine has no room for the loader, or a sample cannot be used and none
    replaces it, and SourceError when its shard cannot be fetched.
    """
    numbers = range(start * data.accumulation, stop * data.accumulation)
    sizes = tensor_bytes(data.streams, data.world * data.accumulation, together=data.schedule == "together")
    require_room(sizes, workers=workers, prefetch=prefetch)
    return _loaded(data, numbers, workers=workers, prefetch=prefetch, pin_memory=pin_memory)


@dataclass(frozen=True)
class ScoredImage:
    """One image of an evaluation split."""

    key: str
    image: Tensor
    """(3, H, W) uint8."""
    mask: Tensor
    """(H', W') uint8 train ids at the labels' own resolution, which may differ from the image's."""

    def pin_memory(self) -> ScoredImage:
        """The same in page-locked memory, from which a GPU copies without the host waiting."""
        return ScoredImage(self.key, self.image.pin_memory(), self.mask.pin_memory())


class _ScoredSet(Dataset[Any]):
    def __init__(self, shards: Shards, domain: Domain) -> None:
        self.shards, self.domain = shards, domain

    def __getitem__(self, number: int) -> ScoredImage | _Refused:
        try:
            record = self.shards.read(number)
            image, mask = decode(record, self.domain)
            if mask is None:
                raise UserError(f"{record.where} has no mask. Only labelled splits can be scored.")
            return ScoredImage(record.key, image_tensor(image), mask_tensor(mask))
        except (UserError, OSError) as error:
            return _Refused(str(error), UserError)


def scored_images(
    shards: Shards, domain: Domain, numbers: Sequence[int], *, workers: int, pin_memory: bool = False
) -> Iterator[ScoredImage]:
    """The samples with these numbers, whole, with their masks; without loader processes where there is no room for
    them.
    """
    data = _ScoredSet(shards, domain)
    if workers and len(numbers) and isinstance(first := data[numbers[0]], ScoredImage):
        try:
            require_room([first.image.nbytes, first.mask.nbytes], workers=workers, prefetch=_SCORED_AHEAD)
        except UserError:
            workers = 0
    return _loaded(data, numbers, workers=workers, prefetch=_SCORED_AHEAD, pin_memory=pin_memory)


def _loaded(
    data: Dataset[Any], numbers: Sequence[int], *, workers: int, prefetch: int, pin_memory: bool
) -> Iterator[Any]:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if workers and distributed and sys.version_info < (3, 12):
        # After a reduction, a thread of gloo registers with Python to release its tensors. A process that is forked
        # at that moment inherits a locked lock and hangs (https://github.com/python/cpython/issues/112275).
        time.sleep(_QUIET_SECONDS)
    # A range is a sampler of item numbers; batch_size=None because an item is a whole batch already.
    loader = DataLoader(
        data,
        sampler=numbers,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_leave_interrupts_to_the_parent,
        # A loader draws a seed for its workers when it starts; from its own generator, or a resumed run would differ
        # from an uninterrupted one.
        generator=torch.Generator().manual_seed(0),
    )
    for item in loader:
        if isinstance(item, _Refused):
            raise item.error(item.message)
        yield item


def _leave_interrupts_to_the_parent(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
