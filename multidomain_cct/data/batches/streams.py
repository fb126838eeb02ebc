"""Which images of a domain a run uses, labelled and unlabelled, and how batches are cut from them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from multidomain_cct.data.batches.budget import labelled_subset
from multidomain_cct.data.batches.coverage import ClassCounts, count_classes, covering_order, pixels_per_class
from multidomain_cct.data.batches.order import Stream
from multidomain_cct.data.batches.selection import Selection
from multidomain_cct.data.batches.views import Augment
from multidomain_cct.data.domain import Domain
from multidomain_cct.data.images import open_image, upright_size
from multidomain_cct.data.shards.cache import FileCache
from multidomain_cct.data.shards.download import PROTOCOLS, require_address
from multidomain_cct.data.shards.index import shard_paths
from multidomain_cct.data.shards.reader import Shards
from multidomain_cct.data.shards.sources import LocalFolder, RemoteFolder
from multidomain_cct.errors import UserError, require_choice, require_number

SCHEDULES = ("together", "alternate")
UNLABELLED = ("rest", "all", "none")
ORDERS = ("covering", "random")
ON_BAD = ("fatal", "skip")
_MEASURED = 32
"""Labelled, and unlabelled, images whose sizes are read."""
WEAK_ENDING = "_weak"
"""Ending of the splits that `weaklabels` makes, so that no split of true masks is taken for pseudo-labels."""


@dataclass(frozen=True)
class DomainSettings:
    """How a run uses one domain. Settings left out are those of `data`."""

    labelled: str = "all"
    """How many labelled images are used: a number, a share such as 1/16, `all`, `none`, or a text file with one image
    a line: its key, its file, or its file and its mask. Smaller budgets lie inside larger ones.
    """
    order: str = "covering"
    """Which images a budget takes first: `covering`, so that every class appears early and evenly, by the pixel counts
    in the shards' indexes (without them, the labelled masks are decoded), or `random`. Both depend on the data and
    data.budget_seed alone.
    """
    unlabelled: str = "rest"
    """Which images of the training split are used without labels: the `rest`, `all`, or `none`."""
    train_split: str = "train"
    """Split of the labelled images."""
    unlabelled_splits: list[str] = field(default_factory=list)
    """Further splits whose images are used without labels; their masks, if any, are never read."""
    weak_split: str = ""
    """Split of pseudo-labels that `weaklabels` made, such as train_weak: its images join the unlabelled ones, and
    auxiliary decoders learn from its masks.
    """
    image_labels: str = ""
    """Where `weaklabels` finds image-level labels: a text or JSON list, or `masks` to take them from the masks of
    train_split.
    """
    remote: str = ""
    """Address of a folder with shards, such as https://HOST/FOLDER, from which training splits that are not in
    data.shards are read. See data.remote.
    """
    val_split: str = "val"
    """Split that is scored in training and on which `best` is chosen; never the test split. Empty or `none`: none."""
    weight: float = 1.0
    """Factor on all losses of the domain."""
    labelled_batch: int | None = None
    """Labelled images of this domain per step, over all processes, in place of data.labelled_batch."""
    unlabelled_batch: int | None = None
    """Unlabelled images of this domain per step, over all processes, in place of data.unlabelled_batch."""
    crop: list[int] | None = None
    """Training crop of this domain, [width, height], in place of data.crop."""

    def __post_init__(self) -> None:
        require_choice("unlabelled", self.unlabelled, UNLABELLED)
        require_choice("order", self.order, ORDERS)
        require_number("weight", self.weight, at_least=0)
        if self.labelled == "0":
            raise UserError("labelled is 0; write `none` for a domain that has unlabelled images only.")
        for name, batch in (("labelled_batch", self.labelled_batch), ("unlabelled_batch", self.unlabelled_batch)):
            if batch is not None:
                require_number(name, batch, at_least=1)


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
    """Chooses the labelled images of a budget. It is not the run's seed, so runs with different seeds share labels."""
    workers: int = 2
    """Loader processes per training process; 0 loads in the training process."""
    prefetch: int = 2
    """Batches that each worker prepares ahead, in shared memory (`/dev/shm`)."""
    remote: list[str] = field(default_factory=list)
    """Protocols that a domain's `remote` may have: http, https, s3. Empty: nothing is read from a network."""
    cache: str = "data/cache"
    """Folder in which remote shards are kept."""
    cache_gib: float = 50.0
    """Largest size of that folder, in GiB; the files used longest ago are removed first."""
    window: int = 0
    """0: an epoch is one permutation of all images. K: it permutes the shards, and images only within windows of K
    shards, for slow storage.
    """
    on_bad: str = "fatal"
    """A training image that cannot be used ends the run (`fatal`), or is counted and replaced by another (`skip`)."""
    max_bad_fraction: float = 0.01
    """With `skip`: the run ends when more than this share of a domain's images had to be skipped, 0 to 1."""

    def __post_init__(self) -> None:
        require_choice("data.schedule", self.schedule, SCHEDULES)
        require_choice("data.on_bad", self.on_bad, ON_BAD)
        for protocol in self.remote:
            require_choice("data.remote", protocol, PROTOCOLS)
        require_number("data.labelled_batch", self.labelled_batch, at_least=1)
        require_number("data.unlabelled_batch", self.unlabelled_batch, at_least=1)
        require_number("data.prefetch", self.prefetch, at_least=1)
        require_number("data.workers", self.workers, at_least=0)
        require_number("data.window", self.window, at_least=0)
        require_number("data.cache_gib", self.cache_gib, above=0)
        require_number("data.max_bad_fraction", self.max_bad_fraction, at_least=0, at_most=1)


@dataclass(frozen=True)
class DomainStreams:
    """The training images of one domain: which are labelled, which are not, and how batches are cut from them."""

    domain: Domain
    sources: tuple[Shards, ...]
    """The training split, the further unlabelled splits, and the split of pseudo-labels."""
    labelled: Sequence[tuple[int, int]]
    """(source, sample number) of the labelled images."""
    unlabelled: Sequence[tuple[int, int]]
    """(source, sample number) of the unlabelled images."""
    weak_source: int | None
    """The source whose masks are pseudo-labels."""
    labelled_batch: int
    unlabelled_batch: int
    crop: tuple[int, int]
    """(width, height)"""
    window: int = 0
    """Shards within which samples are shuffled; 0: all."""
    max_bad: float | None = None
    """Largest share of images that may be skipped because they cannot be used, 0 to 1; None: none may."""

    @cached_property
    def labelled_classes(self) -> ClassCounts | None:
        """The classes in the masks of the labelled images; None when that would take decoding very many masks."""
        return count_classes(self.sources[0], [number for _, number in self.labelled], self.domain)

    @cached_property
    def largest_image(self) -> tuple[int, int] | None:
        """The largest width and height among some of the images, by their headers; None when none can be read here."""
        sizes = [(0, 0)]
        for samples in (self.labelled, self.unlabelled):
            for source, number in (samples[place] for place in range(0, len(samples), -(-len(samples) // 32) or 1)):
                # A remote shard would be fetched whole.
                if isinstance(self.sources[source].source, LocalFolder):
                    with suppress(UserError):
                        record = self.sources[source].read(number, with_mask=False)
                        sizes.append(upright_size(open_image(record.image, record.where), record.where))
        width, height = (max(sides) for sides in zip(*sizes, strict=True))
        return (width, height) if width else None

    @cached_property
    def some_sizes(self) -> list[tuple[int, int]]:
        """(width, height) of a few labelled and a few unlabelled images, evenly spaced."""
        sizes = []
        for samples in (self.labelled, self.unlabelled):
            # Each read of a remote image may fetch a shard, so those of the first one have to do.
            remote = bool(samples) and isinstance(self.sources[samples[0][0]].source, RemoteFolder)
            last = min(len(samples), _MEASURED) if remote else len(samples)
            for position in np.linspace(0, last - 1, min(last, _MEASURED)).astype(int).tolist():
                source, number = samples[position]
                # Training says what is wrong with a bad sample.
                with suppress(UserError):
                    record = self.sources[source].read(number, with_mask=False)
                    sizes.append(upright_size(open_image(record.image, record.where), record.where))
        return sizes

    def samples(self, subset: str) -> Sequence[tuple[int, int]]:
        """The `labelled` or the `unlabelled` samples."""
        return self.labelled if subset == "labelled" else self.unlabelled

    def batch(self, subset: str) -> int:
        """`labelled` or `unlabelled` images per step, over all processes and micro-batches."""
        return self.labelled_batch if subset == "labelled" else self.unlabelled_batch

    def order(self, subset: str, seed: int) -> Stream:
        """The order of the `labelled` or `unlabelled` samples."""
        samples, name = self.samples(subset), f"{self.domain.name}/{subset}"
        if self.window and samples and isinstance(samples, Selection):
            return Stream(name, len(samples), seed, self.window, samples.shard_ends(self.sources))
        return Stream(name, len(samples), seed)


def open_streams(
    domain: Domain, settings: DomainSettings, data: DataSettings, *, use_unlabelled: bool = True
) -> DomainStreams:
    """A domain's streams, from its shards and the recipe's settings.

    Raises UserError, naming the recipe's key, when shards are missing and when the budget cannot be met.
    """
    if settings.remote:
        require_address(settings.remote, data.remote, f"domains.{domain.name}.remote")
    train = _open_split(domain, settings.train_split, settings, data)
    labelled = _labelled(domain, train, settings, data.budget_seed)
    sources, unlabelled, weak_source = [train], Selection(), None
    if use_unlabelled:
        if settings.unlabelled != "none":
            unlabelled = Selection.all_but(0, len(train), labelled if settings.unlabelled == "rest" else None)
        for split in settings.unlabelled_splits:
            sources.append(_open_split(domain, split, settings, data))
            unlabelled += Selection.all_but(len(sources) - 1, len(sources[-1]))
        if settings.weak_split:
            weak_source = len(sources)
            sources.append(_open_split(domain, settings.weak_split, settings, data))
            # When the training split itself has pseudo-labels, main and auxiliary decoders learn from the same ones.
            use_true_masks = settings.weak_split != settings.train_split
            chosen = {train.keys[number] for _, number in labelled} if use_true_masks else set()
            unlabelled = _with_pseudo_labels(unlabelled, sources, chosen)
    width, height = settings.crop or data.crop
    return DomainStreams(
        domain=domain,
        sources=tuple(sources),
        labelled=labelled,
        unlabelled=unlabelled,
        weak_source=weak_source,
        labelled_batch=settings.labelled_batch or data.labelled_batch,
        unlabelled_batch=settings.unlabelled_batch or data.unlabelled_batch,
        crop=(width, height),
        window=data.window,
        max_bad=data.max_bad_fraction if data.on_bad == "skip" else None,
    )


def _open_split(domain: Domain, split: str, settings: DomainSettings, data: DataSettings) -> Shards:
    """The split from this machine, or from the domain's address when it is not here."""
    folder = Path(data.shards) / domain.name
    if not settings.remote or shard_paths(folder, split):
        return Shards.open(folder, split)
    source = RemoteFolder(settings.remote, FileCache(Path(data.cache), int(data.cache_gib * 2**30)))
    return Shards(source, source.catalogue(split))


def _labelled(domain: Domain, train: Shards, settings: DomainSettings, seed: int) -> Selection:
    """The samples whose masks are used.

    Keys are read only when a budget has to choose, and then only those of samples with a mask.
    """
    if settings.labelled == "none":
        return Selection()
    where = f"domains.{domain.name}.labelled"
    if settings.labelled == "all":
        if not train.catalogue.labelled.any():
            raise UserError(
                f"{where}: the split {settings.train_split!r} has no labelled images. Pack it with masks, name another "
                "train_split, or write `none` when the domain borrows its labels (labels_of)."
            )
        return Selection.all_but(0, len(train), Selection.of(0, train.numbers(labelled=False)))
    numbers = {train.keys[number]: number for number in train.numbers(labelled=True).tolist()}

    def covering(keys: list[str], count: int) -> list[str]:
        pixels = pixels_per_class(train, [numbers[key] for key in keys], domain)
        return [keys[row] for row in covering_order(pixels, count)]

    chosen = labelled_subset(
        list(numbers),
        settings.labelled,
        seed=seed,
        where=where,
        first=covering if settings.order == "covering" else None,
        origins=lambda: map(train.origin, numbers.values()),
    )
    return Selection.of(0, sorted(numbers[key] for key in chosen))


def _with_pseudo_labels(unlabelled: Selection, sources: Sequence[Shards], chosen: set[str]) -> Selection:
    """The unlabelled samples and those of the last source, which has pseudo-labels. An image of both is used once, with
    its pseudo-labels, and never when its true mask is used.
    """
    *others, weak = range(len(sources))
    pseudo = {key: number for number, key in enumerate(sources[weak].keys) if key not in chosen}
    numbers: dict[int, list[int]] = {source: [] for source in others}
    for source, number in unlabelled:
        if sources[source].keys[number] not in pseudo:
            numbers[source].append(number)
    numbers[weak] = list(pseudo.values())
    return sum((Selection.of(source, each) for source, each in numbers.items()), start=Selection())
