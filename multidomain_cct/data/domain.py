"""A domain: one data set with one label space, read from one YAML file.

The class table is the only source of label facts. Number of classes, palette, and the lookup from raw ids or colours to train ids are computed from it. A train
id is a class's position in the table.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

IGNORE = 255
"""Train id of a pixel that has no class: never trained on, never scored."""

LAYOUTS = ("folder", "cityscapes", "camvid", "sun_rgbd", "voc", "toy")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class LabelClass:
    """One row of a domain's class table."""

    name: str
    color: tuple[int, int, int]
    """RGB colour of the class in pictures; also its raw colour unless `colors` says otherwise."""
    ids: tuple[int, ...] | None = None
    """Raw ids in single-channel masks. Absent for every class: the position in the table."""
    colors: tuple[tuple[int, int, int], ...] = ()
    """Raw colours in RGB masks. Empty: `color`."""
    thing: bool = False
    """True for countable objects (car, person, chair), False for stuff (road, sky, wall)."""


@dataclass(frozen=True)
class Split:
    """Where the raw files of a split lie. Only the layout `folder` needs the globs."""

    images: str = ""
    """Glob of the images, relative to the raw folder."""
    masks: str = ""
    """Glob of the masks; empty for an unlabelled split."""


@dataclass(frozen=True)
class Domain:
    """Facts about one data set. Everything below the class table is derived from it."""

    name: str
    layout: str
    """How the raw tree is laid out; one of LAYOUTS."""
    splits: dict[str, Split]
    classes: tuple[LabelClass, ...]
    title: str = ""
    licence: str = ""
    source: str = ""
    """Where the data set is published."""
    size: tuple[int, int] | None = None
    """Box (width, height) into which `pack` fits the images, keeping their aspect ratio and never enlarging; None keeps the original size."""
    score_at_full_size: tuple[str, ...] = ("val", "test")
    """Splits whose masks keep their own resolution when packed, so that scores are at the labels' resolution."""
    unknown: str = "ignore"
    """What `pack` does with raw values that nothing names: `ignore` (becomes 255, counted) or `error`."""
    ignore_ids: tuple[int, ...] = (IGNORE,)
    """Raw ids that are known to mean "no class"."""
    ignore_colors: tuple[tuple[int, int, int], ...] = ()
    """Raw colours that are known to mean "no class"."""

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @cached_property
    def palette(self) -> np.ndarray:
        """(256, 3) uint8 RGB: one row per train id; ids without a class are black."""
        table = np.zeros((256, 3), dtype=np.uint8)
        for train_id, label in enumerate(self.classes):
            table[train_id] = label.color
        return table

    @cached_property
    def id_lookup(self) -> tuple[np.ndarray, np.ndarray]:
        """Two arrays of length 65536 over raw ids: uint8 train ids (255 where none), and bool, whether the table knows the id."""
        train = np.full(65536, IGNORE, dtype=np.uint8)
        known = np.zeros(65536, dtype=bool)
        known[list(self.ignore_ids)] = True
        for train_id, label in enumerate(self.classes):
            ids = [train_id] if label.ids is None else list(label.ids)
            train[ids] = train_id
            known[ids] = True
        return train, known

    @cached_property
    def color_lookup(self) -> tuple[np.ndarray, np.ndarray]:
        """Sorted int64 raw colours (r << 16 | g << 8 | b) and the uint8 train id of each."""
        pairs = [(color, IGNORE) for color in self.ignore_colors]
        for train_id, label in enumerate(self.classes):
            pairs += [(color, train_id) for color in (label.colors or (label.color,))]
        pairs.sort()
        codes = np.array([r << 16 | g << 8 | b for (r, g, b), _ in pairs], dtype=np.int64)
        return codes, np.array([train_id for _, train_id in pairs], dtype=np.uint8)

    @property
    def class_fingerprint(self) -> str:
        """Hex digest of what gives a train id its meaning: the names, in order."""
        return hashlib.sha256(json.dumps([label.name for label in self.classes]).encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        """The specification as YAML; reading it back gives an equal Domain."""
        plain: dict[str, Any] = _plain(asdict(self))
        plain["size"] = plain["size"] or "original"
        for row in plain["classes"]:
            # No ids at all (null) and an empty list differ: the first means the position in the table.
            if row["ids"] is None:
                del row["ids"]
            if not row["colors"]:
                del row["colors"]
        return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=160)


def read_domain(path: Path) -> Domain:
    """The domain that a YAML file describes.

    Raises FileNotFoundError when there is no such file, and ValueError, naming file and field, for anything in it that cannot be used.
    """
    raw = read_yaml(path)
    where = str(path)
    allowed = [f.name for f in fields(Domain)]
    _refuse_unknown_keys(raw, allowed, where)
    for required in ("layout", "splits", "classes"):
        if required not in raw:
            raise ValueError(f"{where}: {required} is missing. A domain needs name, layout, splits and classes; docs/own_data.md shows one.")
    name = str(raw.get("name", path.stem))
    if not _NAME.fullmatch(name):
        raise ValueError(f"{where}: name is {name!r}; a name starts with a letter and holds letters, digits, - and _ only.")
    if name != path.stem:
        raise ValueError(f'{where}: name is "{name}", but the file is named {path.name}. A domain is found by its file name: make them equal.')
    if raw["layout"] not in LAYOUTS:
        raise ValueError(f"{where}: layout is {raw['layout']!r}. Known: {', '.join(LAYOUTS)}.{did_you_mean(str(raw['layout']), LAYOUTS)}")
    if raw.get("unknown", "ignore") not in ("ignore", "error"):
        raise ValueError(f"{where}: unknown is {raw['unknown']!r}; it is `ignore` (such pixels become {IGNORE} and are counted) or `error`.")
    domain = Domain(
        name=name,
        layout=raw["layout"],
        splits=_read_splits(raw["splits"], raw["layout"], where),
        classes=_read_classes(raw["classes"], where),
        size=_read_size(raw.get("size", "original"), where),
        score_at_full_size=tuple(str(s) for s in _list(raw.get("score_at_full_size", Domain.score_at_full_size), f"{where}: score_at_full_size")),
        unknown=raw.get("unknown", "ignore"),
        ignore_ids=tuple(_raw_id(v, f"{where}: ignore_ids") for v in _list(raw.get("ignore_ids", Domain.ignore_ids), f"{where}: ignore_ids")),
        ignore_colors=tuple(_color(v, f"{where}: ignore_colors") for v in _list(raw.get("ignore_colors", ()), f"{where}: ignore_colors")),
        **{key: str(raw.get(key, "")) for key in ("title", "licence", "source")},
    )
    _refuse_ambiguous_values(domain, where)
    return domain


def domain_folders(extra: Sequence[Path] = (), recipe: Path | None = None) -> list[Path]:
    """The folders in which domains are looked for, first match first."""
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
    """The domain called `name`, from the first folder that has it."""
    known = known_domains(folders)
    if name not in known:
        raise ValueError(f'{named_by} names the domain "{name}". Known: {", ".join(known) or "none"}.{did_you_mean(name, known)}')
    return read_domain(known[name])


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A closing question that names the nearest known word, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f' Did you mean "{near[0]}"?' if near else ""


class StrictLoader(yaml.SafeLoader):
    """YAML without executable tags, without keys that silently replace each other, and with `no` as the word it is (only true and false are booleans)."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if not isinstance(key, Hashable):
                raise ValueError(f"line {key_node.start_mark.line + 1}: the key {key!r} is no word; in front of a colon stands one.")
            if key in seen:
                raise ValueError(f"line {key_node.start_mark.line + 1}: the key {key!r} appears twice; keep one.")
            seen.add(key)
        return super().construct_mapping(node, deep)


StrictLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF"))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ValueError, with the line, when it is not one."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file.")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=StrictLoader)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark is not None else ""
        raise ValueError(f"{path}: {line}this is not valid YAML: {getattr(error, 'problem', 'it holds control characters')}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds {type(content).__name__}; a mapping of keys to values is expected.")
    return content


def _read_splits(raw: Any, layout: str, where: str) -> dict[str, Split]:
    if isinstance(raw, list):
        raw = {name: None for name in raw}
    if not isinstance(raw, dict) or not raw:
        raise ValueError(f"{where}: splits is {raw!r}; it is a list of split names, or a mapping of names to images and masks.")
    splits = {}
    for name, value in raw.items():
        if not _NAME.fullmatch(str(name)):
            raise ValueError(f"{where}: splits has the name {name!r}; a name starts with a letter and holds letters, digits, - and _ only.")
        value = value or {}
        if not isinstance(value, dict):
            raise ValueError(f"{where}: splits.{name} is {value!r}; it is a mapping with `images` and, for a labelled split, `masks`.")
        _refuse_unknown_keys(value, [f.name for f in fields(Split)], f"{where}: splits.{name}")
        for key, text in value.items():
            if not isinstance(text, (str, type(None))):
                raise ValueError(f"{where}: splits.{name}.{key} is {text!r}; it is one glob, such as {key}/{name}/*.png.")
        split = Split(**{key: text or "" for key, text in value.items()})
        if layout == "folder" and not split.images:
            raise ValueError(f"{where}: splits.{name}.images is missing; the layout `folder` needs a glob such as images/{name}/*.jpg.")
        splits[str(name)] = split
    return splits


def _read_classes(raw: Any, where: str) -> tuple[LabelClass, ...]:
    if not isinstance(raw, list) or not raw:
        raise ValueError(f"{where}: classes is {raw!r}; it is a list of rows such as {{name: road, color: [128, 64, 128], ids: [7], thing: false}}.")
    if len(raw) > IGNORE:
        raise ValueError(f"{where}: classes has {len(raw)} rows; masks are 8 bits wide, so at most {IGNORE} classes fit.")
    rows = []
    for position, row in enumerate(raw):
        here = f"{where}: classes[{position}]"
        if not isinstance(row, dict) or row.get("name") in (None, "") or "color" not in row:
            raise ValueError(f"{here} is {row!r}; a row needs at least name and color.")
        _refuse_unknown_keys(row, [f.name for f in fields(LabelClass)], here)
        ids = row.get("ids")
        if isinstance(ids, int):
            ids = [ids]
        if not isinstance(row.get("thing", False), bool):
            raise ValueError(f"{here}.thing is {row['thing']!r}; it is true (countable object) or false (stuff).")
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
        raise ValueError(f"{where}: classes[{position}] ({domain.classes[position].name}) has no ids but other classes do. Give every class its ids, or none.")
    for position, label in enumerate(domain.classes):
        if label.name in names:
            raise ValueError(f'{where}: classes[{position}].name "{label.name}" is also the name of classes[{names[label.name]}]; names must differ.')
        names[label.name] = position
        for raw_id in label.ids if label.ids is not None else (position,):
            if raw_id in ids:
                raise ValueError(f'{where}: raw id {raw_id} belongs to both "{ids[raw_id]}" and "{label.name}"; a raw id has one class.')
            ids[raw_id] = label.name
        for color in label.colors or (label.color,):
            if color in colors:
                raise ValueError(f'{where}: raw color {list(color)} belongs to both "{colors[color]}" and "{label.name}"; a raw colour has one class.')
            colors[color] = label.name
    for raw_id in domain.ignore_ids:
        if raw_id in ids:
            raise ValueError(f'{where}: raw id {raw_id} is in ignore_ids and in class "{ids[raw_id]}"; it can only be one.')
    for color in domain.ignore_colors:
        if color in colors:
            raise ValueError(f'{where}: raw color {list(color)} is in ignore_colors and in class "{colors[color]}"; it can only be one.')


def _read_size(raw: Any, where: str) -> tuple[int, int] | None:
    if raw in ("original", None):
        return None
    if isinstance(raw, (list, tuple)) and len(raw) == 2 and all(type(v) is int and v > 0 for v in raw):
        return raw[0], raw[1]
    raise ValueError(f"{where}: size is {raw!r}; it is `original` or [width, height] in pixels.")


def _list(raw: Any, where: str) -> Sequence[Any]:
    if isinstance(raw, (list, tuple)):
        return raw
    raise ValueError(f"{where} is {raw!r}; it is a list, written [...].")


def _color(raw: Any, where: str) -> tuple[int, int, int]:
    if isinstance(raw, (list, tuple)) and len(raw) == 3 and all(type(v) is int and 0 <= v <= 255 for v in raw):
        return raw[0], raw[1], raw[2]
    raise ValueError(f"{where} is {raw!r}; a colour is three integers from 0 to 255.")


def _raw_id(raw: Any, where: str) -> int:
    if type(raw) is int and 0 <= raw <= 65535:
        return raw
    raise ValueError(f"{where} holds {raw!r}; a raw id is an integer from 0 to 65535.")


def _refuse_unknown_keys(found: Mapping[Any, Any], allowed: Sequence[str], where: str) -> None:
    for key in found:
        if key not in allowed:
            raise ValueError(f'{where}: unknown key "{key}". Allowed: {", ".join(allowed)}.{did_you_mean(str(key), allowed)}')


def _plain(value: Any) -> Any:
    """Tuples as lists, for YAML."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
