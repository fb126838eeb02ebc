"""Which images of a domain a run uses, labelled and unlabelled, and how batches are cut from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from multidomain_cct.data.batches.budget import labelled_subset
from multidomain_cct.data.batches.order import Stream
from multidomain_cct.data.batches.selection import AllBut, Only, Selection
from multidomain_cct.data.batches.views import Augment
from multidomain_cct.data.domain import Domain
from multidomain_cct.data.shards.cache import FileCache
from multidomain_cct.data.shards.download import PROTOCOLS, require_address
from multidomain_cct.data.shards.index import shard_paths
from multidomain_cct.data.shards.reader import Shards
from multidomain_cct.data.shards.sources import RemoteFolder
from multidomain_cct.errors import UserError

SCHEDULES = ("together", "alternate")
UNLABELLED = ("rest", "all", "none")
ON_BAD = ("fatal", "skip")
_NONE = np.empty(0, dtype=np.int64)
WEAK_ENDING = "_weak"
"""How splits of pseudo-labels end, which `weaklabels` makes. A split of true masks cannot be taken for one by mistake.
"""


@dataclass(frozen=True)
class DomainSettings:
    """What the recipe takes of one domain. Settings left out are those of `data`."""

    labelled: str = "all"
    """How many labelled images are used: a number, a share such as 1/16, `all`, `none`, or a text file with one key a
    line. Smaller budgets lie inside larger ones.
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
    """Split that is scored during training and on which `best` is chosen; never the test split. Empty: none."""
    weight: float = 1.0
    """Factor on all losses of the domain."""
    labelled_batch: int | None = None
    """Labelled images of this domain per step, over all processes, in place of data.labelled_batch."""
    unlabelled_batch: int | None = None
    """Unlabelled images of this domain per step, over all processes, in place of data.unlabelled_batch."""
    crop: list[int] | None = None
    """Training crop of this domain, [width, height], in place of data.crop."""

    def __post_init__(self) -> None:
        if self.unlabelled not in UNLABELLED:
            raise UserError(f"unlabelled is {self.unlabelled!r}; it is one of {', '.join(UNLABELLED)}.")
        if self.weight < 0:
            raise UserError(f"a domain's weight is {self.weight}; it is 0 or more.")
        if self.labelled == "0":
            raise UserError("labelled is 0; write `none` for a domain that has unlabelled images only.")
        for name, batch in (("labelled_batch", self.labelled_batch), ("unlabelled_batch", self.unlabelled_batch)):
            if batch is not None and batch < 1:
                raise UserError(f"{name} is {batch}; it is at least 1.")


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
    """Which labelled images a budget takes; apart from the run's seed, so that runs with different seeds share their
    labels.
    """
    workers: int = 2
    """Loader processes per training process; 0 loads in the training process."""
    prefetch: int = 2
    """Batches that each worker prepares ahead. It keeps room in shared memory (`/dev/shm`) for one more."""
    remote: list[str] = field(default_factory=list)
    """Protocols that a domain's `remote` may have: http, https, s3. Empty: nothing is read from a network."""
    cache: str = "data/cache"
    """Folder in which remote shards are kept."""
    cache_gib: float = 50.0
    """Largest size of that folder, in GiB; what was used longest ago goes first."""
    window: int = 0
    """0: an epoch is one permutation of all images. K: it permutes the shards, and images within windows of K shards
    only; for shards that are read slowly.
    """
    on_bad: str = "fatal"
    """What becomes of a training image that cannot be used: `fatal` ends the run, `skip` takes another in its place and
    counts it.
    """
    max_bad_fraction: float = 0.01
    """With `skip`: the run ends when more than this share of a domain's images had to be skipped, 0 to 1."""

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise UserError(f"data.schedule is {self.schedule!r}; it is one of {', '.join(SCHEDULES)}.")
        for name in ("labelled_batch", "unlabelled_batch", "prefetch"):
            if getattr(self, name) < 1:
                raise UserError(f"data.{name} is {getattr(self, name)}; it is at least 1.")
        for name in ("workers", "window"):
            if getattr(self, name) < 0:
                raise UserError(f"data.{name} is {getattr(self, name)}; it is at least 0.")
        for protocol in self.remote:
            if protocol not in PROTOCOLS:
                raise UserError(f"data.remote names {protocol!r}; it is a list of {', '.join(PROTOCOLS)}.")
        if self.cache_gib <= 0:
            raise UserError(f"data.cache_gib is {self.cache_gib}; it is above 0.")
        if self.on_bad not in ON_BAD:
            raise UserError(f"data.on_bad is {self.on_bad!r}; it is one of {', '.join(ON_BAD)}.")
        if not 0 <= self.max_bad_fraction <= 1:
            raise UserError(f"data.max_bad_fraction is {self.max_bad_fraction}; it is a share, 0 to 1.")


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

    def order(self, kind: str, seed: int) -> Stream:
        """The order of the `labelled` or `unlabelled` samples."""
        samples = self.labelled if kind == "labelled" else self.unlabelled
        name = f"{self.domain.name}/{kind}"
        if self.window and len(samples) and isinstance(samples, Selection):
            return Stream(name, len(samples), seed, self.window, samples.shard_ends(self.sources))
        return Stream(name, len(samples), seed)


def open_streams(
    domain: Domain, settings: DomainSettings, data: DataSettings, *, use_unlabelled: bool = True
) -> DomainStreams:
    """A domain's streams, from its shards and what the recipe says of them.

    Raises UserError, naming the recipe's key, when shards are missing and when the budget cannot be met.
    """
    if settings.remote:
        require_address(settings.remote, data.remote, f"domains.{domain.name}.remote")
    train = _open_split(domain, settings.train_split, settings, data)
    labelled = _labelled(domain, train, settings, data.budget_seed)
    sources, unlabelled, weak_source = [train], [], None
    if use_unlabelled:
        if settings.unlabelled != "none":
            unlabelled.append(
                _complement(labelled, len(train)) if settings.unlabelled == "rest" else AllBut(0, len(train), _NONE)
            )
        for split in settings.unlabelled_splits:
            sources.append(_open_split(domain, split, settings, data))
            unlabelled.append(AllBut(len(sources) - 1, len(sources[-1]), _NONE))
        if settings.weak_split:
            weak_source = len(sources)
            sources.append(_open_split(domain, settings.weak_split, settings, data))
            # Where pseudo-labels are all a domain has, main and auxiliary decoders learn from the same ones.
            chosen = (
                set()
                if settings.weak_split == settings.train_split
                else {train.keys[labelled.at(position)] for position in range(len(labelled))}
            )
            unlabelled = _with_pseudo_labels(unlabelled, sources, chosen)
    crop = settings.crop or data.crop
    return DomainStreams(
        domain=domain,
        sources=tuple(sources),
        labelled=Selection([labelled]),
        unlabelled=Selection(unlabelled),
        weak_source=weak_source,
        labelled_batch=settings.labelled_batch or data.labelled_batch,
        unlabelled_batch=settings.unlabelled_batch or data.unlabelled_batch,
        crop=(crop[0], crop[1]),
        window=data.window,
        max_bad=data.max_bad_fraction if data.on_bad == "skip" else None,
    )


def _open_split(domain: Domain, split: str, settings: DomainSettings, data: DataSettings) -> Shards:
    """The split from this machine or, where it is not there and the domain has an address, from there."""
    folder = Path(data.shards) / domain.name
    if not settings.remote or shard_paths(folder, split):
        return Shards.open(folder, split)
    source = RemoteFolder(settings.remote, FileCache(Path(data.cache), int(data.cache_gib * 2**30)))
    return Shards(source, source.catalogue(split))


def _labelled(domain: Domain, train: Shards, settings: DomainSettings, seed: int) -> Only | AllBut:
    """The samples whose masks are used.

    Keys are read only when a budget has to choose, and then only those of samples with a mask.
    """
    if settings.labelled == "none":
        return Only(0, _NONE)
    where = f"domains.{domain.name}.labelled"
    num_labelled = int(train.catalogue.labelled.sum())
    if not num_labelled and settings.labelled == "all":
        raise UserError(
            f"{where}: the split {settings.train_split!r} has no labelled images. Pack it with masks, name another "
            "train_split, or write `none` when the domain"
            " borrows its labels (labels_of)."
        )
    if settings.labelled == "all":
        return AllBut(0, len(train), train.numbers(labelled=False))
    numbers = {train.keys[number]: number for number in train.numbers(labelled=True).tolist()}
    chosen = labelled_subset(list(numbers), settings.labelled, seed=seed, where=where)
    return Only(0, np.array(sorted(numbers[key] for key in chosen), dtype=np.int64))


def _complement(part: Only | AllBut, total: int) -> Only | AllBut:
    return AllBut(part.source, total, part.numbers) if isinstance(part, Only) else Only(part.source, part.left_out)


def _with_pseudo_labels(
    unlabelled: Sequence[Only | AllBut], sources: Sequence[Shards], chosen: set[str]
) -> list[Only | AllBut]:
    """The unlabelled samples with those of the last source, which has pseudo-labels: an image stands there once, and
    not when its true mask is used.
    """
    weak = len(sources) - 1
    pseudo = {key: number for number, key in enumerate(sources[weak].keys) if key not in chosen}
    parts: list[Only | AllBut] = []
    for part in unlabelled:
        keys = sources[part.source].keys
        numbers = [number for number in map(part.at, range(len(part))) if keys[number] not in pseudo]
        parts.append(Only(part.source, np.array(numbers, dtype=np.int64)))
    return [*parts, Only(weak, np.array(list(pseudo.values()), dtype=np.int64))]
