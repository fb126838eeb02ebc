"""A raw folder -> the first version of its domain's file, for a person to correct."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from multidomain_cct.data.domain import IGNORE
from multidomain_cct.data.images import load_mask
from multidomain_cct.data.packing.annotations import annotations_of_many, annotations_of_one, read_json
from multidomain_cct.data.packing.raw_files import CLASS, Glob
from multidomain_cct.data.packing.survey import Finding, survey
from multidomain_cct.errors import UserError
from multidomain_cct.files.strict_yaml import read_yaml

MASKS_READ = 200
"""Masks whose values are looked at, evenly spread."""
LOOK = "# LOOK: "
"""Begins the comments that a person should read."""
_STUFF = frozenset(
    "background building bush carpet ceiling cloud dirt door earth fence field floor forest grass gravel ground house "
    "lake lane mountain other path pavement plant road rock sand sea sidewalk sky snow soil stuff street terrain tree "
    "vegetation wall water window".split()
)
_IGNORED = frozenset(("__ignore__", "ignore", "ignored", "void", "unlabeled", "unlabelled"))
_BACKGROUND = frozenset(("background", "_background_", "__background__", "bg"))
_FIRST_COLOUR = (210, 210, 210)
"""Of the background."""


@dataclass(frozen=True)
class _Row:
    """A class of the first table. `remark` is for the person."""

    name: str
    ids: tuple[int, ...] | None = None
    color: tuple[int, int, int] | None = None
    names: tuple[str, ...] = ()
    thing: bool | None = None
    remark: str = ""


@dataclass(frozen=True)
class _Table:
    """Classes with what the file says beside them."""

    rows: tuple[_Row, ...]
    background: str = ""
    ignore_names: tuple[str, ...] = ()
    keeps_255: bool = False
    """Whether the id 255 is a class, and not ignored."""
    remarks: tuple[str, ...] = field(default=())


def first_domain(name: str, raw: Path) -> tuple[str, dict[str, Finding]]:
    """The YAML of a domain that reads the raw folder, and its splits.

    Raises UserError when nothing in the folder can be packed, or no classes can be found in its labels.
    """
    findings = survey(raw)
    forms = {finding.form for finding in findings.values() if finding.form}
    if not forms:
        raise UserError(
            f"{raw}: has photographs, but no labels that go by their names (masks, or annotations of COCO, CVAT, "
            "Labelme or YOLO). With the classes of another domain, write `labels_of`; docs/own_data.md shows both."
        )
    if len(forms) > 1:
        raise UserError(
            f"{raw}: has labels of several kinds, {' and '.join(sorted(forms))}. Name a folder that has one of them."
        )
    files = [path for finding in findings.values() for path in finding.labels]
    (form,) = forms
    if form in ("COCO", "CVAT", "Labelme"):
        table = _of_names(_label_names(form, files))
    elif form == "class masks":
        patterns = {finding.split.masks for finding in findings.values() if CLASS in finding.split.masks}
        globs = [Glob(raw, pattern, "masks") for pattern in patterns]
        table = _of_names(sorted({glob.class_name(path) for glob in globs for path in glob.files}))
    else:
        table = (_of_yolo if form == "YOLO" else _of_masks)(files, _given_names(raw))
    return _text(name, findings, _with_colours(table)), findings


def _label_names(form: str, files: Iterable[Path]) -> list[str]:
    """Names of classes in annotations: COCO's in the order of its table, others sorted."""
    if form == "COCO":
        rows = [row for path in dict.fromkeys(files) for row in read_json(path).get("categories", ())]
        return list(dict.fromkeys(str(row["name"]) for row in rows))
    many = form == "CVAT"
    annotations = [
        annotation
        for path in dict.fromkeys(files)
        for annotation in (annotations_of_many(path).values() if many else [annotations_of_one(path, (1, 1))])
    ]
    return sorted({str(shape.label) for annotation in annotations for shape in annotation.shapes})


def _of_names(names: Sequence[str]) -> _Table:
    """The table of annotations whose classes have names."""
    if not names:
        raise UserError("--raw: the annotations have no shape, so nothing says which classes there are. Annotate some.")
    known = [name for name in names if name.lower() not in _IGNORED]
    ground = next((name for name in known if name.lower() in _BACKGROUND), "")
    rows = [_Row(name) for name in known if name != ground]
    first = _Row("background", names=(ground,) if ground not in ("", "background") else ())
    ignored = tuple(name for name in names if name not in known)
    return _Table((first, *rows), background="background", ignore_names=ignored)


def _given_names(raw: Path) -> dict[int, str]:
    """Names of class numbers from YOLO's data.yaml, or from a list such as classes.txt; none if there is neither."""
    for path in (path for ending in ("yaml", "yml") for path in Glob(raw, f"**/*.{ending}", "--raw").files):
        try:
            names = read_yaml(path).get("names")
        except UserError:
            if path.stem in ("data", "dataset"):
                raise
            continue
        if isinstance(names, list):
            return dict(enumerate(map(str, names)))
        if isinstance(names, dict) and all(isinstance(number, int) for number in names):
            return {number: str(name) for number, name in names.items()}
    for path in Glob(raw, "**/*.txt", "--raw").files:
        if path.name.lower() in ("classes.txt", "labels.txt", "class_names.txt", "obj.names"):
            lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
            return dict(enumerate(line.strip() for line in lines if line.strip()))
    return {}


def _of_yolo(files: Sequence[Path], names: Mapping[int, str]) -> _Table:
    used = {int(shape.label) for path in files for shape in annotations_of_one(path, (1, 1)).shapes}
    unnamed = sorted(used - names.keys())
    remark = "no name in data.yaml or classes.txt"
    rows = [_Row(names.get(number, f"class_{number}"), (number,)) for number in sorted(used | names.keys())]
    rows = [replace(row, remark=remark * ((row.ids or (0,))[0] in unnamed)) for row in rows]
    ground = next((row for row in rows if row.name.lower() in _BACKGROUND), _Row("background", ()))
    others = [row for row in rows if row is not ground]
    return _Table((ground, *others), background=ground.name)


def _of_masks(files: Sequence[Path], names: Mapping[int, str]) -> _Table:
    """The table of masks, from the values in at most MASKS_READ of them."""
    masks = sorted(set(files))
    chosen = masks[:: max(1, -(-len(masks) // MASKS_READ))]
    ids: set[int] = set()
    colors: set[tuple[int, int, int]] = set()
    palette: list[int] = []
    for path in chosen:
        image, values = load_mask(path, str(path), ("PNG", "BMP", "TIFF", "GIF", "PPM"))
        if values.ndim == 2:
            ids |= set(np.unique(values).tolist())
            palette = palette or (image.getpalette("RGB") or [] if image.mode == "P" else [])
        else:
            colors |= {(r, g, b) for r, g, b in np.unique(values[..., :3].reshape(-1, 3), axis=0).tolist()}
        if len(ids) + len(colors) > IGNORE:
            raise UserError(
                f"{path}: with it, masks hold more than {IGNORE} values, so they are not classes. Are they "
                "photographs, instance numbers, or smoothed at borders? Export ids or plain colours, or name another "
                "folder."
            )
    if ids and colors:
        raise UserError(f"{chosen[0]}: some masks hold ids and others colours. Export all in one way.")
    table = _of_colors(colors) if colors else _of_ids(ids, names, palette)
    seen = f"the values are those of {len(chosen)} of {len(masks)} masks; `pack` counts values that no class names"
    return replace(table, remarks=(*table.remarks, seen)) if len(chosen) < len(masks) else table


def _of_ids(ids: set[int], names: Mapping[int, str], palette: Sequence[int]) -> _Table:
    remarks, binary = [], ids == {0, 255}
    if binary:
        remarks = ["masks hold 0 and 255; 255 is taken to be the foreground"]
    elif 255 in ids:
        ids, remarks = ids - {255}, ["masks hold 255, which is taken to mean `no class`"]
    rows = []
    for number in sorted(ids):
        color = (
            (palette[3 * number], palette[3 * number + 1], palette[3 * number + 2])
            if 3 * number + 2 < len(palette)
            else None
        )
        name = "background" if number == 0 and color in (None, (0, 0, 0)) else f"class_{number}"
        name = names.get(number, name)
        rows.append(_Row(name, (number,), color, remark="" if number in names else "a name for this id"))
    return _Table(tuple(rows), keeps_255=binary, remarks=tuple(remarks))


def _of_colors(colors: set[tuple[int, int, int]]) -> _Table:
    rows = []
    for color in sorted(colors):
        name = "background" if color == (0, 0, 0) else "color_{:02x}{:02x}{:02x}".format(*color)
        rows.append(_Row(name, None, color, remark="a name for this colour"))
    return _Table(tuple(rows), remarks=("a colour that means `no class` belongs into ignore_colors",))


def _with_colours(table: _Table) -> _Table:
    """The table with a colour for each class that has none of its own, and a guess at what is countable."""
    own = [row.color for row in table.rows if row.color is not None]
    distinct = len(set(own)) == len(own) == len(table.rows)
    colours = own if distinct else colours_apart(len(table.rows))
    return replace(
        table,
        rows=tuple(
            replace(row, color=colour, thing=not _STUFF & set(re.split(r"[^a-z]+", row.name.lower())))
            for row, colour in zip(table.rows, colours, strict=True)
        ),
    )


def colours_apart(count: int) -> list[tuple[int, int, int]]:
    """RGB colours, each as far as possible from those before; the first is light grey, and none is black or white."""
    levels = np.array(np.meshgrid(*3 * [np.linspace(25, 235, 8).round()])).reshape(3, -1).T
    chosen = [np.array(_FIRST_COLOUR, dtype=np.float64)]
    # The eye tells greens apart best. https://www.compuphase.com/cmetric.htm
    weights = np.array([2.0, 4.0, 3.0])
    nearest = ((levels - 0.0) ** 2 @ weights).clip(max=((levels - 255.0) ** 2) @ weights)
    while len(chosen) < count:
        nearest = np.minimum(nearest, (levels - chosen[-1]) ** 2 @ weights)
        chosen.append(levels[int(nearest.argmax())])
    return [(int(red), int(green), int(blue)) for red, green, blue in chosen[:count]]


def _text(name: str, findings: Mapping[str, Finding], table: _Table) -> str:
    """The YAML, with comments where a person should look."""
    lines = [
        "# The first version, by `domains new`. Read what is marked LOOK, correct what is wrong, then pack it.",
        f"name: {name}",
        "layout: folder",
        "splits:",
    ]
    for split, finding in findings.items():
        masks = f", masks: {_scalar(finding.split.masks)}" * bool(finding.split.masks)
        lacking = finding.num_images - finding.num_labelled
        remark = f"{finding.num_images} images" + f", {finding.form}" * bool(finding.form)
        if finding.form and lacking > 0:
            remedy = "move them to a split without masks"
            remedy += ", or give those without objects an empty file" * (finding.form == "YOLO")
            remark = f"{LOOK[2:]}{lacking} of {finding.num_images} images have no labels; {remedy}"
        lines.append(f"  {split}: {{images: {_scalar(finding.split.images)}{masks}}}  # {remark}")
    if "val" not in findings:
        lines.append(
            f"  {LOOK}there is no split `val`, on which runs are scored; put some labelled images aside for it"
        )
    lines.append("size: original  # or [width, height]: larger images are scaled down to fit into this box")
    if table.background:
        lines.append(
            f"background: {_scalar(table.background)}  {LOOK}the class of pixels outside all areas; or `ignore`"
        )
    if table.ignore_names:
        lines.append(f"ignore_names: [{', '.join(map(_scalar, table.ignore_names))}]")
    if table.keeps_255:
        lines.append("ignore_ids: []")
    lines += [f"{LOOK}{remark}" for remark in table.remarks]
    lines += ["classes:", f"  {LOOK}names, and `thing`: true for what can be counted, such as cars; these are guesses"]
    return "\n".join([*lines, *map(_row_text, table.rows)]) + "\n"


def _row_text(row: _Row) -> str:
    fields = [f"name: {_scalar(row.name)}", f"color: {list(row.color or ())}"]
    fields += [f"ids: {list(row.ids or ())}"] * (row.ids is not None)
    fields += [f"names: [{', '.join(map(_scalar, row.names))}]"] * bool(row.names)
    fields.append(f"thing: {str(bool(row.thing)).lower()}")
    return f"  - {{{', '.join(fields)}}}" + f"  {LOOK}{row.remark}" * bool(row.remark)


def _scalar(text: str) -> str:
    """A text as YAML reads it back."""
    plain = re.fullmatch(r"[A-Za-z][\w/.*-]*( [\w/.*-]+)*", text, flags=re.ASCII)
    return text if plain and text.lower() not in ("true", "false", "null") else json.dumps(text)


def shown(findings: Mapping[str, Finding]) -> list[tuple[str, str, str, str]]:
    """Rows for a table: split, images, labels, and how many images have them."""
    return [
        (
            split,
            finding.split.images,
            finding.split.masks or finding.form or "none",
            f"{finding.num_labelled} of {finding.num_images}",
        )
        for split, finding in findings.items()
    ]
