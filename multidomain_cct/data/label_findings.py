"""Labels that teach nothing, or something else than they should: what `pack` and `train` say about a class table and
about the pixels that were counted with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from multidomain_cct.data.domain import LabelClass
from multidomain_cct.files.printable import first_few

_MANY_UNNAMED = 0.05
"""Share of pixels that may lack a class without a word."""


def table_findings(classes: Sequence[LabelClass]) -> list[str]:
    """What a class table makes impossible, each with its remedy."""
    if len(classes) == 1:
        return [
            "the class table has one class, so there is nothing to distinguish. Add the rest, such as a background."
        ]
    if not any(label.thing for label in classes):
        return ["no class is marked as a countable object. Write `thing: true` for those that are, such as cars."]
    return []


def pixel_findings(
    classes: Sequence[LabelClass], pixels: Sequence[int], *, unnamed: Mapping[str, int], raw: Mapping[str, int]
) -> list[str]:
    """What the labelled images of a split cannot teach, each with its remedy.

    `pixels` counts by train id, the last entry those that are ignored. `unnamed` and `raw` count by raw value as
    printed ("12", "#ff0080"): the values that the table neither names nor ignores, and all of them; empty where they
    are not known.
    """
    total = max(1, sum(pixels))
    causes = (_shifted(classes, unnamed, raw), _binary(classes, raw), _grey(classes, unnamed))
    findings = [text for text in causes if text]
    absent = [label.name for label, count in zip(classes, pixels, strict=False) if not count]
    if len(absent) == len(classes):
        findings.append("no pixel of any class: nothing can be learnt. Check ids or colors in the class table.")
    elif absent:
        names = first_few([f'"{name}"' for name in absent])
        findings.append(
            f"no pixel of the class {names}. Check ids or colors in the class table, or choose images that show it."
        )
    if (ignored := sum(unnamed.values())) > _MANY_UNNAMED * total:
        values = first_few(sorted(unnamed, key=lambda value: -unnamed[value]))
        findings.append(
            f"{ignored / total:.1%} of the pixels are ignored because no class names their raw values: {values}. "
            "Give them to a class, or list them in ignore_ids or ignore_colors."
        )
    return findings


def _raw_ids(classes: Sequence[LabelClass]) -> set[int]:
    return {raw_id for place, label in enumerate(classes) for raw_id in ((place,) if label.ids is None else label.ids)}


def _shifted(classes: Sequence[LabelClass], unnamed: Mapping[str, int], raw: Mapping[str, int]) -> str:
    """Ids from 1 to N, or a background 0 and those, for a table from 0 to N - 1."""
    count = len(classes)
    beyond = max((int(value) for value in unnamed if value.isdecimal()), default=0) == count
    never_zero = "0" not in raw and all(str(raw_id) in raw for raw_id in range(1, count))
    if count < 2 or _raw_ids(classes) != set(range(count)) or not (beyond or never_zero):
        return ""
    held = " and ".join([f"hold {count}"] * beyond + ["never hold 0"] * never_zero)
    return (
        f"raw ids look shifted by one: masks {held}, and the class table has 0 to {count - 1}. Give the classes the "
        "ids of the masks, such as `ids: [1]`."
    )


def _binary(classes: Sequence[LabelClass], raw: Mapping[str, int]) -> str:
    """Masks of 0 and 255 whose 255 is ignored."""
    if raw.keys() != {"0", "255"} or 255 in _raw_ids(classes):
        return ""
    return (
        "masks hold 0 and 255 only, and 255 is ignored. If it is the foreground, write `ids: [255]` for its class, "
        "`ids: [0]` for the other, and `ignore_ids: []`."
    )


def _grey(classes: Sequence[LabelClass], unnamed: Mapping[str, int]) -> str:
    """Ids stored in three equal channels."""
    if not unnamed.keys() & {f"#{raw_id:02x}" + 2 * f"{raw_id:02x}" for raw_id in _raw_ids(classes) if raw_id < 256}:
        return ""
    return (
        "masks have three equal channels, which look like ids stored as grey colours. Export them with one channel, or "
        "give the classes such colors as [1, 1, 1]."
    )
