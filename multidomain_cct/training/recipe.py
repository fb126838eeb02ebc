"""A recipe, read from one YAML file and `key=value` overrides and checked key by key."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from multidomain_cct.errors import UserError, did_you_mean
from multidomain_cct.files.strict_yaml import StrictLoader, read_yaml
from multidomain_cct.training.settings import Recipe as Recipe

_MAY_CHANGE = (
    r"file|name|runs|resume|init_from|evaluation\..*|encoder\.checkpoint|domains\..*\.remote|"
    r"data\.(shards|workers|prefetch|remote|cache|cache_gib)|"
    r"training\.(accumulation|log_every|evaluate_every|save_every|keep|trackers|max_skipped)"
)
"""What a resumed run may change: where files lie, how work is cut, and how often it is logged, scored and saved."""
_PACKAGE = Path(__file__).resolve().parents[1]
INHERITED = ("consistency", "perturbations", "cct_strong")
"""Sections that a domain may have too: its keys replace those of the recipe's section, the others stay."""
SYNONYMS = {"batch_size": "labelled_batch", "batch": "labelled_batch", "learning_rate": "lr", "crop_size": "crop"}
"""What people write for settings."""
RENAMED = {"optimiser.trunk_factor": "optimiser.backbone_factor"}
"""Keys of earlier versions. In a recipe they are refused; in a run's folder they are read."""


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, with dotted `key=value` overrides applied.

    Raises UserError, with one line that names the file or override and the key, for anything that cannot be used.
    """
    own, path = path.exists(), _found(path)
    plain = read_yaml(path)
    for override in overrides:
        _apply(override, plain)
    recipe = recipe_from(plain, " ".join([str(path), *overrides]))
    recipe = replace(recipe, name=recipe.name or path.stem, file=path if own else None)
    return _located(recipe, recipe.places)


def read_run_recipe(run: Path) -> Recipe:
    """The recipe in a run's folder, which an earlier version may have written. Raises UserError like `read_recipe`."""
    path = run / "recipe.yaml"
    plain = read_yaml(path)
    for old, new in RENAMED.items():
        section, _, key = old.partition(".")
        settings = plain.get(section)
        if isinstance(settings, dict) and key in settings:
            settings[new.removeprefix(f"{section}.")] = settings.pop(key)
    domains = plain.get("domains")
    for choice in domains.values() if isinstance(domains, dict) else ():
        if isinstance(choice, dict):
            # Earlier versions knew no other order.
            choice.setdefault("order", "random")
    # `runs` lies beside what the run's paths began in.
    return _located(replace(recipe_from(plain, str(path)), file=path), run.resolve().parents[1:2])


def _located(recipe: Recipe, places: Sequence[Path]) -> Recipe:
    """The recipe with its relative paths where they are found: in the working directory, or in one of these places."""

    def at(text: str, exists: Callable[[Path], bool] = Path.is_dir) -> str:
        here = not text or exists(Path(text))
        return next((str(place / text) for place in places if not here and exists(place / text)), text)

    domains = {
        name: replace(
            choice, labelled=at(choice.labelled, Path.is_file), image_labels=at(choice.image_labels, Path.is_file)
        )
        for name, choice in recipe.domains.items()
    }
    data = replace(recipe.data, shards=at(recipe.data.shards), cache=at(recipe.data.cache))
    encoder = replace(recipe.encoder, weights=at(recipe.encoder.weights, Path.is_file))
    init_from = recipe.init_from and at(recipe.init_from)
    return replace(recipe, runs=at(recipe.runs), init_from=init_from, domains=domains, data=data, encoder=encoder)


def recipe_from(plain: dict[str, Any], where: str) -> Recipe:
    """A Recipe of plain values, checked key by key. `where` begins every error."""
    domains = plain.get("domains") or {}
    if not isinstance(domains, dict):
        raise UserError(
            f"{where}: domains is {domains!r}; it is a mapping, for example `domains: {{camvid: {{labelled: 50}}}}`."
        )
    plain = {**plain, "domains": {name: value or {} for name, value in domains.items()}}
    _check_keys(plain, Recipe, where)
    for choice in plain["domains"].values():
        if choice.get("val_split", "") in (None, "none"):
            choice["val_split"] = ""
        own = {name: choice[name] for name in INHERITED if choice.get(name) is not None}
        choice |= {name: _merged(plain.get(name) or {}, section) for name, section in own.items()}
    try:
        recipe: Recipe = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Recipe), OmegaConf.create(plain)))
    except OmegaConfBaseException as error:
        key = str(error.full_key or error.key)
        reason = str(error.msg or error).splitlines()[0].rstrip(".")
        reason = "a list is expected" if "ListConfig" in reason else reason
        value = OmegaConf.select(OmegaConf.create(plain), key)
        raise UserError(f"{where}: {key} is {value!r}: {reason}. See docs/recipe.md for its type.") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    for key, value in _flat(asdict(recipe)).items():
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise UserError(f"{where}: {key} is {value}; it is a finite number.")
    return recipe


def _merged(general: Any, own: Any) -> Any:
    """Nested mappings, in which the keys of `own` replace those of `general`."""
    if not (isinstance(general, dict) and isinstance(own, dict)):
        return own
    return general | {key: _merged(general.get(key), value) for key, value in own.items()}


def differences(old: Recipe, new: Recipe) -> list[str]:
    """The settings that would make the new recipe another run than the old one, as `key: old -> new`."""
    before, after = (
        asdict(replace(each, training=replace(each.training, precision=each.training.mixed_precision)))
        for each in (old, new)
    )
    return changes(before, after, may_change=_MAY_CHANGE)


def changes(old: dict[str, Any], new: dict[str, Any], *, may_change: str = "") -> list[str]:
    """`key: old -> new` for every nested value that differs, but for keys that match the pattern."""
    before, after = _flat(old), _flat(new)
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in before | after
        if not _same(before.get(key), after.get(key)) and not re.fullmatch(may_change, key)
    ]


def _same(one: Any, other: Any) -> bool:
    """Whether two values are equal; a path is, wherever its beginning was found."""
    texts = isinstance(one, str) and isinstance(other, str)
    return one == other or (texts and (one.endswith(f"/{other}") or other.endswith(f"/{one}")))


def _found(path: Path) -> Path:
    """The path, or the recipe of that name that is installed with the package."""
    installed = [folder / "recipes" / path.name for folder in (_PACKAGE, _PACKAGE.parent)]
    for candidate in [path, *(installed if path.parent.name in ("", "recipes") else [])]:
        if candidate.exists():
            return candidate
    raise UserError(f"{path}: there is no such recipe. A recipe is a YAML file such as recipes/demo.yaml.")


def _apply(override: str, plain: dict[str, Any]) -> None:
    """Put a `key=value` into nested mappings."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{override!r} is not an override; write key=value, for example optimiser.lr=0.02.")
    try:
        value = yaml.load(text, Loader=StrictLoader) if text else ""
    except (yaml.YAMLError, UserError, ValueError):
        raise UserError(f"{override!r}: the value is not valid YAML.") from None
    *parents, last = key.split(".")
    for position, parent in enumerate(parents):
        if plain.get(parent) is None:
            plain[parent] = {}
        plain = plain[parent]
        if not isinstance(plain, dict):
            raise UserError(f"{override!r}: {'.'.join(parents[: position + 1])} is a value, not a section.")
    if value is None and parents == ["domains"]:
        # In a file, a domain without settings is null; on the command line, null takes it out.
        if last not in plain:
            raise UserError(f"{override!r}: the recipe has no such domain.{did_you_mean(last, plain)}")
        del plain[last]
    else:
        plain[last] = value


def _check_keys(value: Any, annotation: Any, where: str, path: str = "") -> None:
    """Raises UserError for keys that no field has, and for strings that OmegaConf would interpolate."""
    if isinstance(value, str) and "${" in value:
        raise UserError(f"{where}: {path} is {value!r}; recipes hold plain values, without ${{...}}.")
    if get_origin(annotation) is UnionType and value is not None:
        annotation = get_args(annotation)[0]
    hints: dict[str, Any] = {}
    if is_dataclass(annotation):
        types = get_type_hints(annotation)
        hints = {each.name: types[each.name] for each in fields(annotation) if each.compare}
        if not isinstance(value, dict):
            raise UserError(f"{where}: {path} is {value!r}; it is a section with the keys {', '.join(hints)}.")
    of_each = get_args(annotation)[1] if get_origin(annotation) is dict else None
    for key, item in value.items() if isinstance(value, dict) else []:
        full = f"{path}.{key}" if path else str(key)
        if hints and key not in hints:
            if full in RENAMED:
                raise UserError(f"{where}: {full} is now {RENAMED[full]}. Rename it.")
            longer = [each for each in _settings(Recipe) if each.endswith(f".{SYNONYMS.get(str(key), key)}")]
            if 0 < len(longer) < 5:
                raise UserError(f'{where}: unknown key "{full}". Its full key is {" or ".join(longer)}.')
            allowed = f"{f'in {path}' if path else 'at the top'}: {', '.join(hints)}."
            raise UserError(f'{where}: unknown key "{full}". Allowed {allowed}{did_you_mean(str(key), hints)}')
        _check_keys(item, hints.get(key, of_each), where, full)
    for item in value if isinstance(value, list) else []:
        _check_keys(item, None, where, path)


def _settings(kind: Any, path: str = "") -> Iterator[str]:
    """The full key of every setting of a recipe's sections, such as training.steps; not those of single domains."""
    types = get_type_hints(kind)
    for each in fields(kind):
        key = f"{path}.{each.name}" if path else each.name
        yield key
        if is_dataclass(types[each.name]):
            yield from _settings(types[each.name], key)


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Every value of nested mappings and lists by its key, such as `fields.classes[2].name`."""
    if isinstance(value, dict):
        parts = [(f"{path}.{key}" if path else str(key), part) for key, part in value.items()]
    elif isinstance(value, list) and any(isinstance(part, dict) for part in value):
        parts = [(f"{path}[{number}]", part) for number, part in enumerate(value)]
    else:
        return {path: value}
    return {key: item for place, part in parts for key, item in _flat(part, place).items()}
