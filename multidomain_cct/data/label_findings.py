"""Labels that teach nothing, or something else than they should: what `pack` and `train` say about a class table and
about the pixels that were counted with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from multidomain_cct.data.domain import IGNORE, Domain
from multidomain_cct.files.printable import first_few

_MANY_UNNAMED = 0.05
"""Share of pixels that may lack a class without a word."""


def table_findings(domain: Domain) -> list[str]:
    """What a class table makes impossible, each with its remedy."""
    if domain.num_classes == 1:
        return [
            "the class table has one class, so there is nothing to distinguish. Add the rest, such as a background."
        ]
    if not any(label.thing for label in domain.classes):
        return ["no class is marked as a countable object. Write `thing: true` for those that are, such as cars."]
    return []


def pixel_findings(domain: Domain, pixels: Sequence[int], unnamed: Mapping[str, int]) -> list[str]:
    """What labelled images cannot teach, each with its remedy.

    `pixels` counts them by train id, the last entry those that are ignored; `unnamed` by raw value as printed ("12",
    "#ff0080"), of those that the table neither names nor ignores.
    """
    findings = [text for text in (_shifted(domain, unnamed), _binary(domain, pixels), _grey(domain, unnamed)) if text]
    absent = [label.name for label, count in zip(domain.classes, pixels, strict=False) if not count]
    if len(absent) == domain.num_classes:
        findings.append("no pixel of any class: nothing can be learnt. Check ids or colors in the class table.")
    elif absent:
        names = first_few([f'"{name}"' for name in absent])
        first = " If the ids of the masks begin at 1, give them: `ids: [1]` and so on." * (
            not pixels[0] and not findings
        )
        remedy = "Check ids or colors in the class table, or choose images that show it."
        findings.append(f"no pixel of the class {names}. {remedy}{first}")
    share = sum(unnamed.values()) / max(1, sum(pixels))
    if share > _MANY_UNNAMED:
        values = first_few(sorted(unnamed, key=lambda value: -unnamed[value]))
        findings.append(
            f"{share:.1%} of the pixels are ignored because no class names their raw values: {values}. Give them to a "
            "class, or list them in ignore_ids or ignore_colors."
        )
    return findings


def shared_findings(scored: Mapping[str, Mapping[Any, str]], others: Mapping[str, Mapping[Any, str]]) -> list[str]:
    """Which scored splits share images with others. A split is given as the contents of its images, with their keys."""
    findings = []
    for name, images in scored.items():
        for other, contents in others.items():
            if shared := sorted(images[content] for content in images.keys() & contents.keys()):
                findings.append(
                    f"{len(shared)} of {len(images)} images of {name} are also in {other}, so its scores are too "
                    f"high: {first_few(shared)}. Take them out of one of the two."
                )
    return findings


def _raw_ids(domain: Domain) -> set[int]:
    ids = ((place,) if label.ids is None else label.ids for place, label in enumerate(domain.classes))
    return {raw_id for of_class in ids for raw_id in of_class}


def _shifted(domain: Domain, unnamed: Mapping[str, int]) -> str:
    """Ids from 0 or 1 to N for a table from 0 to N - 1."""
    count = domain.num_classes
    highest = max((int(value) for value in unnamed if value.isdecimal()), default=0)
    if highest != count or _raw_ids(domain) != set(range(count)):
        return ""
    return (
        f"raw ids look shifted by one: the class table has 0 to {count - 1}, and masks hold {count}. Give the classes "
        "the ids of the masks, such as `ids: [1]`."
    )


def _binary(domain: Domain, pixels: Sequence[int]) -> str:
    """Masks of 0 and 255 whose 255 is ignored."""
    train, _ = domain.id_lookup
    with_pixels = {train_id for train_id, count in enumerate(pixels) if count}
    if with_pixels != {int(train[0]), IGNORE} or domain.ignore_ids != (255,) or domain.ignore_colors:
        return ""
    return (
        "masks seem to hold 0 and 255 only, and 255 is ignored. If it is the foreground, write `ids: [255]` for its "
        "class, `ids: [0]` for the other, and `ignore_ids: []`."
    )


def _grey(domain: Domain, unnamed: Mapping[str, int]) -> str:
    """Ids stored in three equal channels."""
    # Black and white often lack a class in masks of colours too.
    if not unnamed.keys() & {f"#{3 * f'{raw_id:02x}'}" for raw_id in _raw_ids(domain) if 0 < raw_id < 255}:
        return ""
    return (
        "masks have three equal channels, which look like ids stored as grey colours. Export them with one channel, or "
        "give the classes such colors as [1, 1, 1]."
    )
