"""Image-level labels: the classes that an image shows, without positions.

They come from a text list, a JSON list, or, for experiments, from the masks of the training split.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import numpy as np

from multidomain_cct.data.batches.streams import DataSettings, DomainSettings, DomainStreams, open_streams
from multidomain_cct.data.batches.views import decode
from multidomain_cct.data.domain import IGNORE, Domain
from multidomain_cct.data.shards.reader import Shards
from multidomain_cct.errors import UserError, did_you_mean

FROM_MASKS = "masks"
_FORMATS = "Image-level labels are a text list (`key class class`) or JSON ({key: [class, ...]})."
_WORD = re.compile(r'"([^"]*)"|\S+')


@dataclass(frozen=True)
class TaggedImages:
    """The images of a domain whose classes are known."""

    domain: Domain
    sources: tuple[Shards, ...]
    """The training split, then the further unlabelled splits."""
    samples: Mapping[str, tuple[int, int]]
    """(source, sample number) of every image with known classes, by key."""
    classes: Mapping[str, frozenset[int]]
    """Train ids of the classes that the image shows, by key, without the background."""
    listed: tuple[str, ...]
    """Keys of the images with image-level labels, in the order of the shards. The classes of the other images, those of
    the labelled budget, come from their masks.
    """

    def shares(self) -> np.ndarray:
        """(K,) share of the images, 0 to 1, that show each of the classified classes."""
        shown = [[train_id in classes for train_id in classified(self.domain)] for classes in self.classes.values()]
        share: np.ndarray = np.mean(shown, axis=0)
        return share

    def streams(self, data: DataSettings, choice: DomainSettings, batch: int) -> DomainStreams:
        """All these images as a stream without masks, `batch` of them a step."""
        crop = choice.crop or data.crop
        return DomainStreams(
            domain=self.domain,
            sources=self.sources,
            labelled=(),
            unlabelled=tuple(self.samples.values()),
            weak_source=None,
            labelled_batch=batch,
            unlabelled_batch=batch,
            crop=(crop[0], crop[1]),
        )


def background_class(domain: Domain) -> int | None:
    """The train id of the only class that is no `thing`; None when there is none, or several."""
    stuff = [train_id for train_id, label in enumerate(domain.classes) if not label.thing]
    return stuff[0] if len(stuff) == 1 else None


def classified(domain: Domain) -> tuple[int, ...]:
    """The train ids of all classes but the background."""
    background = background_class(domain)
    return tuple(train_id for train_id in range(domain.num_classes) if train_id != background)


def open_tagged(domain: Domain, choice: DomainSettings, data: DataSettings, *, least_share: float) -> TaggedImages:
    """The images with image-level labels, and those of the labelled budget, whose classes are read from their masks.

    A mask shows a class that has at least `least_share` of its pixels. Raises UserError for a list that does not fit
    the domain, and when the list or the shards are missing.
    """
    trained = open_streams(domain, choice, data, use_unlabelled=False)
    train = trained.sources[0]
    sources = (train, *(Shards.open(Path(data.shards) / domain.name, split) for split in choice.unlabelled_splits))
    positions: dict[str, tuple[int, int]] = {}
    for source, shards in enumerate(sources):
        for number, key in enumerate(shards.keys):
            positions.setdefault(key, (source, number))
    if choice.image_labels == FROM_MASKS:
        numbers = np.flatnonzero(train.labelled).tolist()
        if not numbers:
            where = f"domains.{domain.name}.image_labels is `masks`"
            raise UserError(f"{where}, but the split {choice.train_split!r} has none. Name a list instead.")
        shown = classes_of_masks(train, domain, numbers, least_share=least_share)
    else:
        path = Path(choice.image_labels)
        if not path.is_file():
            where = f"domains.{domain.name}.image_labels is {choice.image_labels!r}"
            raise UserError(f"{where}; it is `masks`, or a text or JSON file that is there.")
        shown = read_image_labels(path, domain, positions)
    budget = [number for _, number in trained.labelled if train.keys[number] not in shown]
    known = shown | classes_of_masks(train, domain, budget, least_share=least_share)
    background = {background_class(domain)}
    return TaggedImages(
        domain=domain,
        sources=sources,
        samples={key: position for key, position in positions.items() if key in known},
        classes={key: frozenset(classes - background) for key, classes in known.items()},
        listed=tuple(key for key in positions if key in shown),
    )


def classes_of_masks(
    shards: Shards, domain: Domain, numbers: Sequence[int], *, least_share: float
) -> dict[str, frozenset[int]]:
    """By key of these samples, the train ids that have at least `least_share` of the mask's pixels."""
    shown = {}
    for number in numbers:
        record = shards.read(number)
        _, mask = decode(record, domain)
        assert mask is not None
        counts = np.bincount(np.asarray(mask).ravel(), minlength=IGNORE + 1)
        present = np.flatnonzero(counts[: domain.num_classes] >= max(1.0, least_share * counts.sum()))
        shown[record.key] = frozenset(present.tolist())
    return shown


def read_image_labels(path: Path, domain: Domain, keys: Collection[str]) -> dict[str, frozenset[int]]:
    """The train ids of the classes that each listed image shows.

    A text list has one image a line, `key class [class ...]`. A word that begins with # starts a comment; names with
    spaces are written in double quotes. A JSON list is {key: [class, ...]}. `keys` are those of all images.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: this is not text in UTF-8. {_FORMATS}") from None
    rows = _json_rows(path, text) if path.suffix.lower() == ".json" else _text_rows(path, text)
    ids = {label.name: train_id for train_id, label in enumerate(domain.classes)}
    shown: dict[str, frozenset[int]] = {}
    for where, key, names in rows:
        where = f"{where}: the key {key!r}"
        if key in shown:
            raise UserError(f"{where} is listed twice. An image has one line with all its classes.")
        if key not in keys:
            known = f"the {len(keys)} images in the training and unlabelled splits of {domain.name}"
            raise UserError(f"{where} is none of {known}.{did_you_mean(key, keys)}")
        if not names:
            raise UserError(f"{where} has no class. Name the classes that it shows, or leave the image out.")
        for name in names:
            if name not in ids:
                # Without quotes, a name with spaces falls apart.
                quotes = ' Write names with spaces in double quotes: "a name".' if " " in "".join(ids) else ""
                known = f"Known: {', '.join(ids)}.{quotes}"
                raise UserError(f"{where} has the class {name!r}. {known}{did_you_mean(name, ids)}")
        shown[key] = frozenset(ids[name] for name in names)
    if not shown:
        raise UserError(f"{path}: no image is listed. {_FORMATS}")
    return shown


def _text_rows(path: Path, text: str) -> Iterable[tuple[str, str, list[str]]]:
    for number, line in enumerate(text.splitlines(), start=1):
        matches = takewhile(lambda match: not match[0].startswith("#"), _WORD.finditer(line))
        words = [match[0] if match[1] is None else match[1] for match in matches]
        if words:
            yield f"{path}: line {number}", words[0], words[1:]


def _json_rows(path: Path, text: str) -> Iterable[tuple[str, str, list[str]]]:
    try:
        # Pairs, because a dictionary would silently keep the last of two equal keys.
        pairs = json.loads(text, object_pairs_hook=tuple)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno}: this is not valid JSON ({error.msg}).") from None
    if not isinstance(pairs, tuple):
        raise UserError(f"{path}: holds {type(pairs).__name__}; it is {{key: [class, ...]}}.")
    for key, names in pairs:
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{path}: the key {key!r} has {json.dumps(names)[:60]}; it has a list of class names.")
        yield str(path), key, names
