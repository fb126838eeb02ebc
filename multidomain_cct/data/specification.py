"""A domain's YAML file -> Domain, and where such files are found.

Everything a person can get wrong in one is refused here, by file and field.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from multidomain_cct.data.domain import IGNORE, LAYOUTS, Domain, LabelClass, Split
from multidomain_cct.errors import UserError, did_you_mean
from multidomain_cct.files.strict_yaml import read_yaml

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


def read_domain(path: Path) -> Domain:
    """The domain that a YAML file describes.

    Raises UserError, naming file and field, when there is no such file and for anything in it that cannot be used.
    """
    raw = read_yaml(path)
    where = str(path)
    allowed = [f.name for f in fields(Domain)]
    _refuse_unknown_keys(raw, allowed, where)
    for required in ("layout", "splits", *(() if raw.get("labels_of") else ("classes",))):
        if required not in raw:
            raise UserError(
                f"{where}: {required} is missing. A domain needs name, layout, splits and classes (or labels_of); "
                "docs/own_data.md shows one."
            )
    name = str(raw.get("name", path.stem))
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{where}: name is {name!r}; a name starts with a letter and holds letters, digits, - and _ only."
        )
    if name != path.stem:
        raise UserError(
            f'{where}: name is "{name}", but the file is named {path.name}. A domain is found by its file name: make '
            "them equal."
        )
    if raw["layout"] not in LAYOUTS:
        raise UserError(
            f"{where}: layout is {raw['layout']!r}. Known: "
            f"{', '.join(LAYOUTS)}.{did_you_mean(str(raw['layout']), LAYOUTS)}"
        )
    if raw.get("unknown", "ignore") not in ("ignore", "error"):
        raise UserError(
            f"{where}: unknown is {raw['unknown']!r}; it is `ignore` (such pixels become {IGNORE} and are counted) or "
            "`error`."
        )
    domain = Domain(
        name=name,
        layout=raw["layout"],
        splits=_read_splits(raw["splits"], raw["layout"], where),
        # Borrowed classes are filled in by `find_domain`, which knows where other domains are; a run's folder keeps
        # them.
        classes=_read_classes(raw["classes"], where) if "classes" in raw else (),
        size=_read_size(raw.get("size", "original"), where),
        score_at_full_size=tuple(
            str(s)
            for s in _list(raw.get("score_at_full_size", Domain.score_at_full_size), f"{where}: score_at_full_size")
        ),
        unknown=raw.get("unknown", "ignore"),
        ignore_ids=tuple(
            _raw_id(v, f"{where}: ignore_ids")
            for v in _list(raw.get("ignore_ids", Domain.ignore_ids), f"{where}: ignore_ids")
        ),
        ignore_colors=tuple(
            _color(v, f"{where}: ignore_colors") for v in _list(raw.get("ignore_colors", ()), f"{where}: ignore_colors")
        ),
        **{key: str(raw.get(key, "")) for key in ("labels_of", "title", "licence", "source")},
    )
    _refuse_ambiguous_values(domain, where)
    return domain


def domain_folders(extra: Sequence[Path] = (), recipe: Path | None = None) -> list[Path]:
    """The folders in which domains are looked for, first match first.

    Raises UserError for an extra one that is not there.
    """
    for folder in extra:
        if not folder.is_dir():
            raise UserError(f"--domains: {folder}: there is no such folder.")
    beside = [] if recipe is None else [recipe.resolve().parent / "domains", recipe.resolve().parent.parent / "domains"]
    # A wheel carries domains/ inside the package; a clone has it beside the package.
    package = Path(__file__).resolve().parents[1]
    candidates = [*extra, *beside, Path("domains"), package / "domains", package.parent / "domains"]
    return list({folder.resolve(): folder for folder in candidates if folder.is_dir()}.values())


def known_domains(folders: Iterable[Path]) -> dict[str, Path]:
    """The specification file of every domain that can be found, by name."""
    found: dict[str, Path] = {}
    for folder in folders:
        for path in sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")]):
            found.setdefault(path.stem, path)
    return dict(sorted(found.items()))


def find_domain(name: str, folders: Sequence[Path], named_by: str = "the command") -> Domain:
    """The domain called `name`, from the first folder that has it, with the classes that it borrows (`labels_of`)."""
    known = known_domains(folders)
    if name not in known:
        raise UserError(
            f'{named_by} names the domain "{name}". Known: {", ".join(known) or "none"}.{did_you_mean(name, known)}'
        )
    domain = read_domain(known[name])
    if not domain.labels_of:
        return domain
    where = f'{known[name]}: labels_of is "{domain.labels_of}"'
    others = [other for other in known if other != name]
    if domain.labels_of not in others:
        raise UserError(
            f"{where}; it is the name of another domain. Known: "
            f"{', '.join(others) or 'none'}.{did_you_mean(domain.labels_of, others)}"
        )
    lender = read_domain(known[domain.labels_of])
    if lender.labels_of:
        raise UserError(f'{where}, which borrows its labels itself. Name "{lender.labels_of}".')
    if domain.classes and domain.class_fingerprint != lender.class_fingerprint:
        raise UserError(f"{where}, but its classes are others. Leave `classes` out, or leave labels_of out.")
    borrower = replace(
        domain,
        classes=domain.classes or lender.classes,
        ignore_ids=tuple(sorted({*domain.ignore_ids, *lender.ignore_ids})),
        ignore_colors=tuple(sorted({*domain.ignore_colors, *lender.ignore_colors})),
    )
    _refuse_ambiguous_values(borrower, str(known[name]))
    return borrower


def _read_splits(raw: Any, layout: str, where: str) -> dict[str, Split]:
    if isinstance(raw, list):
        raw = {name: None for name in raw}
    if not isinstance(raw, dict) or not raw:
        raise UserError(
            f"{where}: splits is {raw!r}; it is a list of split names, or a mapping of names to images and masks."
        )
    splits = {}
    for name, value in raw.items():
        if not _NAME.fullmatch(str(name)):
            raise UserError(
                f"{where}: splits has the name {name!r}; a name starts with a letter and holds letters, digits, - and "
                "_ only."
            )
        value = value or {}
        if not isinstance(value, dict):
            raise UserError(
                f"{where}: splits.{name} is {value!r}; it is a mapping with `images` and, for a labelled split, "
                "`masks`."
            )
        _refuse_unknown_keys(value, [f.name for f in fields(Split)], f"{where}: splits.{name}")
        for key, text in value.items():
            if not isinstance(text, (str, type(None))):
                raise UserError(
                    f"{where}: splits.{name}.{key} is {text!r}; it is one glob, such as {key}/{name}/*.png."
                )
        split = Split(**{key: text or "" for key, text in value.items()})
        if layout == "folder" and not split.images:
            raise UserError(
                f"{where}: splits.{name}.images is missing; the layout `folder` needs a glob such as "
                f"images/{name}/*.jpg."
            )
        splits[str(name)] = split
    return splits


def _read_classes(raw: Any, where: str) -> tuple[LabelClass, ...]:
    if not isinstance(raw, list) or not raw:
        raise UserError(
            f"{where}: classes is {raw!r}; it is a list of rows such as {{name: road, color: [128, 64, 128], ids: "
            f"[7], thing: false}}."
        )
    if len(raw) > IGNORE:
        raise UserError(
            f"{where}: classes has {len(raw)} rows; masks are 8 bits wide, so at most {IGNORE} classes fit."
        )
    rows = []
    for position, row in enumerate(raw):
        here = f"{where}: classes[{position}]"
        if not isinstance(row, dict) or row.get("name") in (None, "") or "color" not in row:
            raise UserError(f"{here} is {row!r}; a row needs at least name and color.")
        _refuse_unknown_keys(row, [f.name for f in fields(LabelClass)], here)
        ids = row.get("ids")
        if isinstance(ids, int):
            ids = [ids]
        if not isinstance(row.get("thing", False), bool):
            raise UserError(f"{here}.thing is {row['thing']!r}; it is true (countable object) or false (stuff).")
        rows.append(
            LabelClass(
                name=str(row["name"]),
                color=_color(row["color"], f"{here}.color"),
                ids=None if ids is None else tuple(_raw_id(v, f"{here}.ids") for v in _list(ids, f"{here}.ids")),
                colors=tuple(_color(v, f"{here}.colors") for v in _list(row.get("colors", ()), f"{here}.colors")),
                thing=row.get("thing", False),
            )
        )
    return tuple(rows)


def _refuse_ambiguous_values(domain: Domain, where: str) -> None:
    names: dict[str, int] = {}
    ids: dict[int, str] = {}
    colors: dict[tuple[int, int, int], str] = {}
    with_ids = [label.ids is not None for label in domain.classes]
    if any(with_ids) and not all(with_ids):
        position = with_ids.index(False)
        raise UserError(
            f"{where}: classes[{position}] ({domain.classes[position].name}) has no ids but other classes do. Give "
            "every class its ids, or none."
        )
    for position, label in enumerate(domain.classes):
        if label.name in names:
            raise UserError(
                f'{where}: classes[{position}].name "{label.name}" is also the name of classes[{names[label.name]}]; '
                "names must differ."
            )
        names[label.name] = position
        for raw_id in label.ids if label.ids is not None else (position,):
            if raw_id in ids:
                raise UserError(
                    f'{where}: raw id {raw_id} belongs to both "{ids[raw_id]}" and "{label.name}"; a raw id has one '
                    "class."
                )
            ids[raw_id] = label.name
        for color in label.colors or (label.color,):
            if color in colors:
                raise UserError(
                    f'{where}: raw color {list(color)} belongs to both "{colors[color]}" and "{label.name}"; a raw '
                    "colour has one class."
                )
            colors[color] = label.name
    for raw_id in domain.ignore_ids:
        if raw_id in ids:
            raise UserError(
                f'{where}: raw id {raw_id} is in ignore_ids and in class "{ids[raw_id]}"; it can only be one.'
            )
    for color in domain.ignore_colors:
        if color in colors:
            raise UserError(
                f'{where}: raw color {list(color)} is in ignore_colors and in class "{colors[color]}"; it can only be '
                "one."
            )


def _read_size(raw: Any, where: str) -> tuple[int, int] | None:
    if raw in ("original", None):
        return None
    if isinstance(raw, (list, tuple)) and len(raw) == 2 and all(type(v) is int and v > 0 for v in raw):
        return raw[0], raw[1]
    raise UserError(f"{where}: size is {raw!r}; it is `original` or [width, height] in pixels.")


def _list(raw: Any, where: str) -> Sequence[Any]:
    if isinstance(raw, (list, tuple)):
        return raw
    raise UserError(f"{where} is {raw!r}; it is a list, written [...].")


def _color(raw: Any, where: str) -> tuple[int, int, int]:
    if isinstance(raw, (list, tuple)) and len(raw) == 3 and all(type(v) is int and 0 <= v <= 255 for v in raw):
        return raw[0], raw[1], raw[2]
    raise UserError(f"{where} is {raw!r}; a colour is three integers from 0 to 255.")


def _raw_id(raw: Any, where: str) -> int:
    if type(raw) is int and 0 <= raw <= 65535:
        return raw
    raise UserError(f"{where} holds {raw!r}; a raw id is an integer from 0 to 65535.")


def _refuse_unknown_keys(found: Mapping[Any, Any], allowed: Sequence[str], where: str) -> None:
    for key in found:
        if key not in allowed:
            raise UserError(
                f'{where}: unknown key "{key}". Allowed: {", ".join(allowed)}.{did_you_mean(str(key), allowed)}'
            )
