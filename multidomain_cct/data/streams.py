"""Which images of a domain a run uses, labelled and unlabelled, and how batches are cut from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from multidomain_cct.data.augment import Augment
from multidomain_cct.data.domain import Domain
from multidomain_cct.data.order import labelled_subset
from multidomain_cct.data.shards import Shards

SCHEDULES = ("together", "alternate")
UNLABELLED = ("rest", "all", "none")
WEAK_ENDING = "_weak"
"""How splits of pseudo-labels end, which `weaklabels` makes. A split of true masks cannot be taken for one by mistake."""


@dataclass(frozen=True)
class DomainSettings:
    """What the recipe takes of one domain. Settings left out are those of `data`."""

    labelled: str = "all"
    """How many labelled images are used: a number, a share such as 1/16, `all`, `none`, or a text file with one key a line. Smaller budgets lie inside larger
    ones.
    """
    unlabelled: str = "rest"
    """Which images of the training split are used without labels: the `rest`, `all`, or `none`."""
    train_split: str = "train"
    """Split of the labelled images."""
    unlabelled_splits: list[str] = field(default_factory=list)
    """Further splits whose images are used without labels; their masks, if any, are never read."""
    weak_split: str = ""
    """Split of pseudo-labels that `weaklabels` made, such as train_weak: its images join the unlabelled ones, and auxiliary decoders learn from its masks."""
    image_labels: str = ""
    """Where `weaklabels` finds image-level labels: a text or JSON list, or `masks` to take them from the masks of train_split."""
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
            raise ValueError(f"unlabelled is {self.unlabelled!r}; it is one of {', '.join(UNLABELLED)}.")
        if self.weight < 0:
            raise ValueError(f"a domain's weight is {self.weight}; it is 0 or more.")
        if self.labelled == "0":
            raise ValueError("labelled is 0; write `none` for a domain that has unlabelled images only.")
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
class DomainStreams:
    """The training images of one domain: which samples are labelled, which are not, and how batches are cut from them."""

    domain: Domain
    sources: tuple[Shards, ...]
    """The training split, the further unlabelled splits, and the split of pseudo-labels."""
    labelled: tuple[tuple[int, int], ...]
    """(source, sample number) of the labelled images."""
    unlabelled: tuple[tuple[int, int], ...]
    """(source, sample number) of the unlabelled images."""
    weak_source: int | None
    """The source whose masks are pseudo-labels."""
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
    chosen = _labelled_keys(domain, train, settings, data.budget_seed)
    labelled = [(0, number) for number, key in enumerate(train.keys) if key in chosen]
    sources, unlabelled, weak_source = [train], [], None
    if use_unlabelled:
        if settings.unlabelled != "none":
            unlabelled = [(0, number) for number, key in enumerate(train.keys) if settings.unlabelled == "all" or key not in chosen]
        for split in settings.unlabelled_splits:
            sources.append(Shards.open(folder, split))
            unlabelled += [(len(sources) - 1, number) for number in range(len(sources[-1]))]
        if settings.weak_split:
            weak_source = len(sources)
            sources.append(Shards.open(folder, settings.weak_split))
            # Where pseudo-labels are all a domain has, main and auxiliary decoders learn from the same ones.
            unlabelled = _with_pseudo_labels(unlabelled, sources, set() if settings.weak_split == settings.train_split else chosen)
    crop = settings.crop or data.crop
    return DomainStreams(
        domain=domain,
        sources=tuple(sources),
        labelled=tuple(labelled),
        unlabelled=tuple(unlabelled),
        weak_source=weak_source,
        labelled_batch=settings.labelled_batch or data.labelled_batch,
        unlabelled_batch=settings.unlabelled_batch or data.unlabelled_batch,
        crop=(crop[0], crop[1]),
    )


def _labelled_keys(domain: Domain, train: Shards, settings: DomainSettings, seed: int) -> set[str]:
    """The keys whose masks are used."""
    if settings.labelled == "none":
        return set()
    where = f"domains.{domain.name}.labelled"
    with_mask = [key for key, has in zip(train.keys, train.labelled, strict=True) if has]
    chosen = set(labelled_subset(with_mask, settings.labelled, seed=seed, where=where))
    if not chosen:
        raise ValueError(
            f"{where}: the split {settings.train_split!r} has no labelled images. Pack it with masks, name another train_split, or write `none` when the domain"
            " borrows its labels (labels_of)."
        )
    return chosen


def _with_pseudo_labels(unlabelled: list[tuple[int, int]], sources: list[Shards], chosen: set[str]) -> list[tuple[int, int]]:
    """The unlabelled samples with those of the last source, which has pseudo-labels: an image stands there once, and not when its true mask is used."""
    weak = len(sources) - 1
    pseudo = {key: number for number, key in enumerate(sources[weak].keys) if key not in chosen}
    others = [(source, number) for source, number in unlabelled if sources[source].keys[number] not in pseudo]
    return others + [(weak, number) for number in pseudo.values()]
