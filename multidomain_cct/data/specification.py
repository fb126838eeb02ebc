"""A domain's YAML file -> Domain, and the folders of such files. Mistakes in a file are refused by file and field."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from multidomain_cct.data.domain import IGNORE, LAYOUTS, Domain, LabelClass, Split
from multidomain_cct.errors import UserError, did_you_mean, require_choice
from multidomain_cct.files.strict_yaml import read_yaml

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


def read_domain(path: Path) -> Domain:
    """The domain that a YAML file describes.

    Raises UserError, naming file and field, when the file is absent and for anything in it that cannot be used.
    """
    raw = read_yaml(path)
    where = str(path)
    _refuse_unknown_keys(raw, [f.name for f in fields(Domain)], where)
    for required in ("layout", "splits", *(() if raw.get("labels_of") else ("classes",))):
        if required not in raw:
            needed = "name, layout, splits and classes (or labels_of)"
            raise UserError(f"{where}: {required} is missing. A domain needs {needed}; docs/own_data.md shows one.")
    name = str(raw.get("name", path.stem))
    _require_name(name, f"{where}: name is")
    if name != path.stem:
        raise UserError(f'{where}: name is "{name}", but the file is named {path.name}. Make them equal.')
    require_choice(f"{where}: layout", raw["layout"], LAYOUTS)
    require_choice(f"{where}: unknown", raw.get("unknown", "ignore"), ("ignore", "error"))
    domain = Domain(
        name=name,
        layout=raw["layout"],
        splits=_read_splits(raw["splits"], raw["layout"], where),
        # `find_domain`, which knows where other domains are, fills in borrowed classes; a run's folder stores them.
        classes=_read_classes(raw["classes"], where) if "classes" in raw else (),
        size=_read_size(raw.get("size", "original"), where),
        score_at_full_size=tuple(
            map(
                str, _sequence(raw.get("score_at_full_size", Domain.score_at_full_size), f"{where}: score_at_full_size")
            )
        ),
        unknown=raw.get("unknown", "ignore"),
        ignore_ids=_raw_ids(raw.get("ignore_ids", Domain.ignore_ids), f"{where}: ignore_ids"),
        ignore_colors=_colors(raw.get("ignore_colors", ()), f"{where}: ignore_colors"),
        **{key: str(raw.get(key, "")) for key in ("labels_of", "title", "licence", "source")},
    )
    _refuse_ambiguous_values(domain, where)
    return domain


def domain_folders(extra: Sequence[Path] = (), recipe: Path | None = None) -> list[Path]:
    """The folders in which domains are searched, in order. Raises UserError for an extra one that is absent."""
    for folder in extra:
        if not folder.is_dir():
            raise UserError(f"--domains: {folder}: there is no such folder.")
    beside = [] if recipe is None else [recipe.resolve().parent / "domains", recipe.resolve().parent.parent / "domains"]
    # A wheel carries domains/ inside the package; a clone has it beside the package.
    package = Path(__file__).resolve().parents[1]
    candidates = [*extra, *beside, Path("domains"), package / "domains", package.parent / "domains"]
    return list({folder.resolve(): folder for folder in candidates if folder.is_dir()}.values())


def known_domains(folders: Iterable[Path]) -> dict[str, Path]:
    """The specification file of every known domain, by name."""
    paths: dict[str, Path] = {}
    for folder in folders:
        for path in sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")]):
            paths.setdefault(path.stem, path)
    return dict(sorted(paths.items()))


def find_domain(name: str, folders: Sequence[Path], named_by: str = "the command") -> Domain:
    """The domain called `name`, from the first folder that has it, with the classes it borrows (`labels_of`)."""
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
        known_others = f"Known: {', '.join(others) or 'none'}.{did_you_mean(domain.labels_of, others)}"
        raise UserError(f"{where}; it is the name of another domain. {known_others}")
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
        raise UserError(f"{where}: splits is {raw!r}; it is a list of names, or a mapping of names to globs.")
    splits = {}
    for name, value in raw.items():
        _require_name(str(name), f"{where}: splits has the name")
        here, value = f"{where}: splits.{name}", value or {}
        if not isinstance(value, dict):
            raise UserError(f"{here} is {value!r}; it is a mapping with `images` and, for a labelled split, `masks`.")
        _refuse_unknown_keys(value, [f.name for f in fields(Split)], here)
        for key, text in value.items():
            if not isinstance(text, (str, type(None))):
                raise UserError(f"{here}.{key} is {text!r}; it is one glob, such as {key}/{name}/*.png.")
        split = Split(**{key: text or "" for key, text in value.items()})
        if layout == "folder" and not split.images:
            raise UserError(f"{here}.images is missing; the layout `folder` needs a glob such as images/{name}/*.jpg.")
        splits[str(name)] = split
    return splits


def _read_classes(raw: Any, where: str) -> tuple[LabelClass, ...]:
    if not isinstance(raw, list) or not raw:
        row = "{name: road, color: [128, 64, 128], ids: [7], thing: false}"
        raise UserError(f"{where}: classes is {raw!r}; it is a list of rows such as {row}.")
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
        if not isinstance(row.get("thing", False), bool):
            raise UserError(f"{here}.thing is {row['thing']!r}; it is true (countable object) or false (stuff).")
        ids = row.get("ids")
        rows.append(
            LabelClass(
                name=str(row["name"]),
                color=_color(row["color"], f"{here}.color"),
                ids=None if ids is None else _raw_ids([ids] if isinstance(ids, int) else ids, f"{here}.ids"),
                colors=_colors(row.get("colors", ()), f"{here}.colors"),
                thing=row.get("thing", False),
            )
        )
    return tuple(rows)


def _refuse_ambiguous_values(domain: Domain, where: str) -> None:
    with_ids = [label.ids is not None for label in domain.classes]
    if any(with_ids) and not all(with_ids):
        position = with_ids.index(False)
        raise UserError(
            f"{where}: classes[{position}] ({domain.classes[position].name}) has no ids but other classes do. Give "
            "every class its ids, or none."
        )
    positions: dict[str, int] = {}
    owners: dict[int | tuple[int, int, int], str] = {}
    """By raw id or raw colour, the class."""
    for position, label in enumerate(domain.classes):
        if label.name in positions:
            raise UserError(
                f'{where}: classes[{position}].name "{label.name}" is also the name of classes'
                f"[{positions[label.name]}]; names must differ."
            )
        positions[label.name] = position
        values: list[int | tuple[int, int, int]] = [*((position,) if label.ids is None else label.ids)]
        for value in values + [*(label.colors or (label.color,))]:
            if value in owners:
                raise UserError(
                    f'{where}: {_in_print(value)} belongs to both "{owners[value]}" and "{label.name}"; a raw '
                    f"{'id' if isinstance(value, int) else 'colour'} has one class."
                )
            owners[value] = label.name
    ignored: list[int | tuple[int, int, int]] = [*domain.ignore_ids, *domain.ignore_colors]
    for value in ignored:
        if value in owners:
            field = "ignore_ids" if isinstance(value, int) else "ignore_colors"
            raise UserError(
                f'{where}: {_in_print(value)} is in {field} and in class "{owners[value]}"; it can only be one.'
            )


def _in_print(value: int | tuple[int, int, int]) -> str:
    return f"raw id {value}" if isinstance(value, int) else f"raw color {list(value)}"


def _require_name(name: str, what: str) -> None:
    if not _NAME.fullmatch(name):
        raise UserError(f"{what} {name!r}; a name starts with a letter and holds letters, digits, - and _ only.")


def _read_size(raw: Any, where: str) -> tuple[int, int] | None:
    if raw in ("original", None):
        return None
    if isinstance(raw, (list, tuple)) and len(raw) == 2 and all(type(v) is int and v > 0 for v in raw):
        return raw[0], raw[1]
    raise UserError(f"{where}: size is {raw!r}; it is `original` or [width, height] in pixels.")


def _sequence(raw: Any, where: str) -> Sequence[Any]:
    if isinstance(raw, (list, tuple)):
        return raw
    raise UserError(f"{where} is {raw!r}; it is a list, written [...].")


def _color(raw: Any, where: str) -> tuple[int, int, int]:
    if isinstance(raw, (list, tuple)) and len(raw) == 3 and all(type(v) is int and 0 <= v <= 255 for v in raw):
        return raw[0], raw[1], raw[2]
    raise UserError(f"{where} is {raw!r}; a colour is three integers from 0 to 255.")


def _colors(raw: Any, where: str) -> tuple[tuple[int, int, int], ...]:
    return tuple(_color(color, where) for color in _sequence(raw, where))


def _raw_ids(raw: Any, where: str) -> tuple[int, ...]:
    for value in _sequence(raw, where):
        if type(value) is not int or not 0 <= value <= 65535:
            raise UserError(f"{where} holds {value!r}; a raw id is an integer from 0 to 65535.")
    return tuple(raw)


def _refuse_unknown_keys(given: Mapping[Any, Any], allowed: Sequence[str], where: str) -> None:
    for key in given:
        if key not in allowed:
            raise UserError(
                f'{where}: unknown key "{key}". Allowed: {", ".join(allowed)}.{did_you_mean(str(key), allowed)}'
            )
