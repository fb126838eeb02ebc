"""A domain's YAML file -> Domain, and the folders of such files. Mistakes in a file are refused by file and field."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from multidomain_cct.data.domain import IGNORE, LAYOUTS, Domain, LabelClass, Split
from multidomain_cct.errors import UserError, did_you_mean, require_choice
from multidomain_cct.files.printable import first_few, printable
from multidomain_cct.files.strict_yaml import read_yaml

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_TEXTS = ("labels_of", "title", "licence", "source", "background")


def read_domain(path: Path) -> Domain:
    """The domain that a YAML file describes.

    Raises UserError, naming file and field, when the file is absent and for anything in it that cannot be used.
    """
    raw, where = read_yaml(path), str(path)
    _refuse_unknown_keys(raw, Domain, where)
    for required in ("layout", "splits", *(() if raw.get("labels_of") else ("classes",))):
        if required not in raw:
            needed = "name, layout, splits and classes (or labels_of)"
            raise UserError(f"{where}: {required} is missing. A domain needs {needed}; docs/own_data.md shows one.")
    name = valid_name(raw.get("name", path.stem), f"{where}: name is")
    if name != path.stem:
        raise UserError(f'{where}: name is "{name}", but the file is named {path.name}. Make them equal.')
    require_choice(f"{where}: layout", raw["layout"], LAYOUTS)
    require_choice(f"{where}: unknown", raw.get("unknown", Domain.unknown), ("ignore", "error"))
    score_at_full_size = raw.get("score_at_full_size", Domain.score_at_full_size)
    domain = Domain(
        name=name,
        layout=raw["layout"],
        splits=_read_splits(raw["splits"], raw["layout"], where),
        # `find_domain`, which knows where other domains are, fills in borrowed classes; a run's folder stores them.
        classes=_read_classes(raw["classes"], where) if "classes" in raw else (),
        size=_read_size(raw.get("size"), where),
        score_at_full_size=tuple(map(str, _sequence(score_at_full_size, f"{where}: score_at_full_size"))),
        unknown=raw.get("unknown", Domain.unknown),
        ignore_ids=_raw_ids(raw.get("ignore_ids", Domain.ignore_ids), f"{where}: ignore_ids"),
        ignore_colors=_colors(raw.get("ignore_colors", ()), f"{where}: ignore_colors"),
        ignore_names=_names(raw.get("ignore_names", ()), f"{where}: ignore_names"),
        **{key: _text(raw.get(key, ""), f"{where}: {key}") for key in _TEXTS},
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
        # Unlike glob, which would leave out a folder that may not be read.
        for path in sorted(path for path in folder.iterdir() if path.suffix in (".yaml", ".yml")):
            paths.setdefault(path.stem, path)
    return dict(sorted(paths.items()))


def find_domain(name: str, folders: Sequence[Path], named_by: str = "the command") -> Domain:
    """The domain called `name`, from the first folder that has it, with the classes it borrows (`labels_of`)."""
    return known_domain(name, known_domains(folders), named_by)


def known_domain(name: str, known: Mapping[str, Path], named_by: str = "the command") -> Domain:
    """As `find_domain`, from what `known_domains` listed."""
    if name not in known:
        raise UserError(f'{named_by} names the domain "{name}". {_known(name, known)}')
    domain = read_domain(known[name])
    if not domain.labels_of:
        return domain
    where = f'{known[name]}: labels_of is "{domain.labels_of}"'
    others = [other for other in known if other != name]
    if domain.labels_of not in others:
        raise UserError(f"{where}; it is the name of another domain. {_known(domain.labels_of, others)}")
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
        ignore_names=tuple(sorted({*domain.ignore_names, *lender.ignore_names})),
        background=domain.background or lender.background,
    )
    _refuse_ambiguous_values(borrower, str(known[name]))
    return borrower


def _known(name: str, known: Iterable[str]) -> str:
    names = list(known)
    return f"Known: {first_few(names, 20) or 'none'}.{did_you_mean(name, names)}"


def _read_splits(raw: Any, layout: str, where: str) -> dict[str, Split]:
    if isinstance(raw, list):
        raw = dict.fromkeys(raw)
    if not isinstance(raw, dict) or not raw:
        raise UserError(f"{where}: splits is {raw!r}; it is a list of names, or a mapping of names to globs.")
    splits = {}
    for name, value in raw.items():
        name, value = valid_name(name, f"{where}: splits has the name"), value or {}
        here = f"{where}: splits.{name}"
        if not isinstance(value, dict):
            raise UserError(f"{here} is {value!r}; it is a mapping with `images` and, for a labelled split, `masks`.")
        _refuse_unknown_keys(value, Split, here)
        for key, text in value.items():
            if not isinstance(text, (str, type(None))):
                raise UserError(f"{here}.{key} is {text!r}; it is one glob, such as {key}/{name}/*.png.")
        splits[name] = Split(**{key: text or "" for key, text in value.items()})
        if splits[name].images.endswith(".txt") and splits[name].masks:
            raise UserError(f"{here}.masks is given, but the list {splits[name].images} names the masks. Remove one.")
        if layout == "folder" and not splits[name].images:
            raise UserError(f"{here}.images is missing; the layout `folder` needs a glob such as images/{name}/*.jpg.")
    return splits


def _read_classes(raw: Any, where: str) -> tuple[LabelClass, ...]:
    if not isinstance(raw, list) or not raw:
        row = "{name: road, color: [128, 64, 128], ids: [7], thing: false}"
        raise UserError(f"{where}: classes is {raw!r}; it is a list of rows such as {row}.")
    if len(raw) > IGNORE:
        raise UserError(f"{where}: classes has {len(raw)} rows; masks have 8 bits, so at most {IGNORE} classes fit.")
    return tuple(_read_class(row, f"{where}: classes[{position}]") for position, row in enumerate(raw))


def _read_class(row: Any, where: str) -> LabelClass:
    if not isinstance(row, dict) or row.get("name") in (None, "") or "color" not in row:
        raise UserError(f"{where} is {row!r}; a row needs at least name and color.")
    _refuse_unknown_keys(row, LabelClass, where)
    thing, ids = row.get("thing", False), row.get("ids")
    if not isinstance(thing, bool):
        raise UserError(f"{where}.thing is {thing!r}; it is true (countable object) or false (stuff).")
    return LabelClass(
        name=_text(row["name"], f"{where}.name"),
        color=_color(row["color"], f"{where}.color"),
        ids=None if ids is None else _raw_ids([ids] if isinstance(ids, int) else ids, f"{where}.ids"),
        colors=_colors(row.get("colors", ()), f"{where}.colors"),
        names=_names(row.get("names", ()), f"{where}.names"),
        thing=thing,
    )


def _refuse_ambiguous_values(domain: Domain, where: str) -> None:
    with_ids = [label.ids is not None for label in domain.classes]
    if len(set(with_ids)) > 1:
        lacks = with_ids.index(False)
        raise UserError(
            f"{where}: classes[{lacks}] ({domain.classes[lacks].name}) has no ids but other classes do. Give every "
            "class its ids, or none."
        )
    names: dict[str, int] = {}
    owners: dict[str, str] = {}
    """By raw id, colour or name as printed, what has it."""
    kinds = {int: "id", tuple: "color", str: "name"}

    def claim(values: Iterable[int | str | tuple[int, ...]], owner: str) -> None:
        for value in values:
            text = f"raw {kinds[type(value)]} {list(value) if isinstance(value, tuple) else value}"
            if text in owners:
                raise UserError(f"{where}: {text} belongs to both {owners[text]} and {owner}; it can only be one.")
            owners[text] = owner

    # Otherwise a colour that two classes share is refused when a mask with colours is read.
    masks_hold_colors = bool(domain.ignore_colors) or any(label.colors for label in domain.classes)
    for position, label in enumerate(domain.classes):
        if names.setdefault(label.name, position) != position:
            raise UserError(
                f'{where}: classes[{position}].name "{label.name}" is also the name of classes[{names[label.name]}]; '
                "names must differ."
            )
        claim((position,) if label.ids is None else label.ids, f'"{label.name}"')
        if masks_hold_colors:
            claim(label.colors or (label.color,), f'"{label.name}"')
        claim(label.names or (label.name,), f'"{label.name}"')
    claim(set(domain.ignore_ids), "ignore_ids")
    claim(set(domain.ignore_colors), "ignore_colors")
    claim(set(domain.ignore_names), "ignore_names")
    if domain.background and domain.classes:
        require_choice(f"{where}: background", domain.background, (*names, "ignore"))


def valid_name(raw: Any, what: str) -> str:
    """The name of a domain or split. Raises UserError, starting with `what`, for one that cannot be a file's."""
    if not _NAME.fullmatch(str(raw)):
        raise UserError(f"{what} {str(raw)!r}; a name starts with a letter and holds letters, digits, - and _ only.")
    return str(raw)


def _text(raw: Any, where: str) -> str:
    """Words on one line, without what could control a terminal or turn the direction of writing."""
    text = " ".join(str(raw).split())
    if re.search("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", text):
        raise UserError(f"{where} is {printable(text)!r}; it holds control characters. Remove them.")
    return text


def _read_size(raw: Any, where: str) -> tuple[int, int] | None:
    if raw in ("original", None):
        return None
    if not isinstance(raw, (list, tuple)) or len(raw) != 2 or not all(type(side) is int and side > 0 for side in raw):
        raise UserError(f"{where}: size is {raw!r}; it is `original` or [width, height] in pixels.")
    return raw[0], raw[1]


def _sequence(raw: Any, where: str) -> Sequence[Any]:
    if not isinstance(raw, (list, tuple)):
        raise UserError(f"{where} is {raw!r}; it is a list, written [...].")
    return raw


def _color(raw: Any, where: str) -> tuple[int, int, int]:
    if not isinstance(raw, (list, tuple)) or len(raw) != 3 or not all(type(v) is int and 0 <= v <= 255 for v in raw):
        raise UserError(f"{where} is {raw!r}; a colour is three integers from 0 to 255.")
    return raw[0], raw[1], raw[2]


def _colors(raw: Any, where: str) -> tuple[tuple[int, int, int], ...]:
    return tuple(_color(color, where) for color in _sequence(raw, where))


def _names(raw: Any, where: str) -> tuple[str, ...]:
    return tuple(_text(name, where) for name in _sequence(raw, where))


def _raw_ids(raw: Any, where: str) -> tuple[int, ...]:
    for value in _sequence(raw, where):
        if type(value) is not int or not 0 <= value <= 65535:
            raise UserError(f"{where} holds {value!r}; a raw id is an integer from 0 to 65535.")
    return tuple(raw)


def _refuse_unknown_keys(given: Mapping[Any, Any], described: type[Domain | Split | LabelClass], where: str) -> None:
    for key in given:
        require_choice(f"{where}: the key", str(key), [field.name for field in fields(described)])
