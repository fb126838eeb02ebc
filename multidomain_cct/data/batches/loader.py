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
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from multidomain_cct.data.batches.handover import Handover, received
from multidomain_cct.data.batches.order import batch_positions
from multidomain_cct.data.batches.streams import DomainStreams
from multidomain_cct.data.batches.views import Augment, View, decode, image_tensor, mask_tensor, training_view
from multidomain_cct.data.domain import Domain
from multidomain_cct.data.shards.download import SourceError
from multidomain_cct.data.shards.reader import BadSample, Shards
from multidomain_cct.errors import UserError
from multidomain_cct.files.seeds import seed_from

_SUBSTITUTES = 16
"""Samples that are tried in the place of one that cannot be used."""

_QUIET_SECONDS = 0.05
"""What is waited for threads of gloo to be done before loader processes are forked."""


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
    """(U, H, W) uint8 train ids made from image-level labels, 255 = unsure or none; None in a domain that has no such
    images.
    """
    skipped: tuple[Skipped, ...] = ()
    """The images that could not be used, in whose places others stand."""

    def to(self, device: torch.device) -> Batch:
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def map_tensors(self, change: Callable[[Tensor], Any]) -> Batch:
        """The same with each tensor replaced."""
        pseudo_labels = None if self.pseudo_labels is None else change(self.pseudo_labels)
        return Batch(
            change(self.images),
            change(self.masks),
            change(self.unlabelled),
            change(self.valid),
            self.keys,
            pseudo_labels,
            self.skipped,
        )


@dataclass(frozen=True)
class _Refused:
    """A sample's error, carried from a loader process to the training process as a value so that it stays one line."""

    message: str
    kind: type[UserError] | type[SourceError]


class TrainingSet(Dataset[Any]):
    """Micro-batch number -> {domain name: Batch}, for one process.

    A step has `accumulation` micro-batches. The global batch of a step is cut into accumulation x world equal parts;
    how many there are changes neither which images a step sees nor their augmentation.
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
        self._orders = {
            (stream.domain.name, kind): stream.order(kind, seed)
            for stream in self.streams
            for kind in ("labelled", "unlabelled")
        }
        parts = world * accumulation
        if not self.streams:
            raise UserError(
                "domains: none has images to train on. Set `labelled` of one, or choose a method that uses unlabelled "
                "images."
            )
        for stream in self.streams:
            for kind, samples in (("labelled_batch", stream.labelled), ("unlabelled_batch", stream.unlabelled)):
                if samples and getattr(stream, kind) % parts:
                    raise UserError(
                        f"{stream.domain.name}: {kind} is {getattr(stream, kind)}, which {world} process(es) x "
                        f"{accumulation} accumulated micro-batches do not"
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
        except (UserError, OSError) as error:
            return _Refused(str(error), SourceError if isinstance(error, SourceError) else UserError)

    def _batch(self, streams: DomainStreams, turn: int, part: int) -> Batch:
        parts = self.world * self.accumulation
        skipped: list[Skipped] = []
        labelled, labelled_keys = self._views(
            streams, "labelled", batch_positions(turn, streams.labelled_batch, part=part, parts=parts), skipped
        )
        unlabelled, unlabelled_keys = self._views(
            streams, "unlabelled", batch_positions(turn, streams.unlabelled_batch, part=part, parts=parts), skipped
        )
        width, height = streams.crop
        no_images, no_ids = (
            torch.empty(0, 3, height, width, dtype=torch.uint8),
            torch.empty(0, height, width, dtype=torch.uint8),
        )
        return Batch(
            images=_stacked_images([view.image for view in labelled], no_images),
            masks=_stacked([view.ids for view in labelled], no_ids),
            unlabelled=_stacked_images([view.image for view in unlabelled], no_images),
            valid=_stacked([view.inside for view in unlabelled], no_ids.bool()),
            keys=labelled_keys + unlabelled_keys,
            pseudo_labels=None if streams.weak_source is None else _stacked([view.ids for view in unlabelled], no_ids),
            skipped=tuple(skipped),
        )

    def _views(
        self, streams: DomainStreams, kind: str, positions: range, skipped: list[Skipped]
    ) -> tuple[tuple[View, ...], tuple[str, ...]]:
        """The views at these positions and their keys; none of a stream without samples.

        What had to be skipped is added to `skipped`.
        """
        order = self._orders[streams.domain.name, kind]
        if not order.num_samples:
            return (), ()
        views, keys = zip(
            *(self._usable_view(streams, kind, *order.at(position), skipped) for position in positions), strict=True
        )
        return views, keys

    def _usable_view(
        self, streams: DomainStreams, kind: str, epoch: int, chosen: int, skipped: list[Skipped]
    ) -> tuple[View, str]:
        """The view of a sample; where it cannot be used and others may stand in, of the next one in the shards that
        can: no position shifts for it.
        """
        samples = streams.labelled if kind == "labelled" else streams.unlabelled
        for step in range(min(_SUBSTITUTES + 1, len(samples))):
            place = samples[(chosen + step) % len(samples)]
            try:
                return self._view(streams, kind, epoch, place)
            except BadSample as error:
                if streams.max_bad is None:
                    raise
                skipped.append(Skipped(streams.sources[place[0]].keys[place[1]], error.reason, str(error)))
        raise UserError(
            f"{skipped[-1].message} It is the last of {step + 1} neighbouring samples that cannot be used; look at "
            "the shard."
        )

    def _view(self, streams: DomainStreams, kind: str, epoch: int, place: tuple[int, int]) -> tuple[View, str]:
        source, number = place
        record = streams.sources[source].read(number, with_mask=kind == "labelled" or source == streams.weak_source)
        rng = np.random.default_rng(seed_from(self.seed, streams.domain.name, epoch, record.key, kind))
        return training_view(record, streams.domain, self.augment, streams.crop, rng), record.key


def _stacked(parts: Sequence[Tensor], none: Tensor) -> Tensor:
    """The parts along a new first axis, or `none` where there are no parts."""
    return torch.stack(list(parts)) if parts else none


def _stacked_images(parts: Sequence[Tensor], none: Tensor) -> Tensor:
    """The same for images whose channels are last in memory, as those of the result are: torch.stack would put them
    first, pixel by pixel.
    """
    return torch.stack([part.permute(1, 2, 0) for part in parts]).permute(0, 3, 1, 2) if parts else none


def steps(
    data: TrainingSet, start: int, stop: int, *, workers: int, prefetch: int = 2, pin_memory: bool = False
) -> Iterator[dict[str, Batch]]:
    """The micro-batches of the steps from `start` (inclusive) to `stop`, in order; each step has `data.accumulation` of
    them.

    Raises UserError with one line when a sample cannot be used and none stands in for it, and SourceError when its
    shard cannot be fetched.
    """
    numbers = range(start * data.accumulation, stop * data.accumulation)
    return _loaded(data, numbers, workers=workers, prefetch=prefetch, pin_memory=pin_memory)


@dataclass(frozen=True)
class ScoredImage:
    """One image of an evaluation split."""

    key: str
    image: Tensor
    """(3, H, W) uint8."""
    mask: Tensor
    """(H', W') uint8 train ids at the labels' own resolution, which may differ from the image's."""

    def map_tensors(self, change: Callable[[Tensor], Any]) -> ScoredImage:
        """The same with each tensor replaced."""
        return ScoredImage(self.key, change(self.image), change(self.mask))


class _ScoredSet(Dataset[Any]):
    def __init__(self, shards: Shards, domain: Domain) -> None:
        self.shards, self.domain = shards, domain

    def __getitem__(self, number: int) -> ScoredImage | _Refused:
        try:
            record = self.shards.read(number)
            image, mask = decode(record, self.domain)
            if mask is None:
                raise UserError(f"{record.shard}: key {record.key!r} has no mask. Only labelled splits can be scored.")
            return ScoredImage(record.key, image_tensor(image), mask_tensor(mask))
        except (UserError, OSError) as error:
            return _Refused(str(error), UserError)


def scored_images(shards: Shards, domain: Domain, numbers: Sequence[int], *, workers: int) -> Iterator[ScoredImage]:
    """The samples with these numbers, whole, with their masks."""
    return _loaded(_ScoredSet(shards, domain), numbers, workers=workers, prefetch=4, pin_memory=False)


def _loaded(
    data: Dataset[Any], numbers: Sequence[int], *, workers: int, prefetch: int, pin_memory: bool
) -> Iterator[Any]:
    if (
        workers
        and sys.version_info < (3, 12)
        and torch.distributed.is_available()
        and torch.distributed.is_initialized()
    ):
        # After a reduction a thread of gloo lets go of its tensors, and for that makes itself known to Python. What is
        # forked while it holds the lock for that finds it locked for ever, and the run waits for it
        # (https://github.com/python/cpython/issues/112275).
        time.sleep(_QUIET_SECONDS)
    # A range is a sampler of item numbers; batch_size=None because an item is a whole batch already.
    loader = DataLoader(
        Handover(data, prefetch=prefetch),
        sampler=numbers,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        worker_init_fn=_leave_interrupts_to_the_parent,
        # A loader draws a seed for its workers when it starts; from its own generator, or a resumed run would differ
        # from an uninterrupted one.
        generator=torch.Generator().manual_seed(0),
    )
    for item in received(loader, pin_memory=pin_memory):
        if isinstance(item, _Refused):
            raise item.kind(item.message)
        yield item


def _leave_interrupts_to_the_parent(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
