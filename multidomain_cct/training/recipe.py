"""Recipe: every setting of a run, read from one YAML file and `key=value` overrides and checked key by key."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from multidomain_cct.data.batches.streams import DataSettings, DomainSettings
from multidomain_cct.errors import UserError, did_you_mean, require_choice, require_number
from multidomain_cct.evaluation.inference import InferenceSettings
from multidomain_cct.files.strict_yaml import StrictLoader, read_yaml
from multidomain_cct.methods import METHODS
from multidomain_cct.methods.cct_strong import CCTStrongSettings
from multidomain_cct.methods.mean_teacher import MeanTeacherSettings
from multidomain_cct.methods.unimatch import UniMatchSettings
from multidomain_cct.methods.usss import UsssSettings
from multidomain_cct.model.decoders import DECODERS
from multidomain_cct.model.encoder import EncoderSettings
from multidomain_cct.model.losses import ConsistencySettings, SupervisedSettings
from multidomain_cct.model.perturbations import Perturbations
from multidomain_cct.training.schedules import OptimiserSettings
from multidomain_cct.weak.cams import PseudoLabelSettings

_MAY_CHANGE = (
    r"file|name|runs|resume|init_from|evaluation\..*|domains\..*\.remote|data\.(shards|workers|prefetch|remote|cache|cache_gib)|"
    r"training\.(accumulation|log_every|evaluate_every|save_every|keep|trackers|max_skipped)"
)
"""What a resumed run may change: where files lie, how work is cut, and how often it is logged, scored and saved."""
INHERITED = ("consistency", "perturbations", "cct_strong")
"""Sections that a domain may have too: its keys replace those of the recipe's section, the others stay."""
RENAMED = {"optimiser.trunk_factor": "optimiser.backbone_factor"}
"""Keys of earlier versions. In a recipe they are refused; in a run's folder they are read."""


@dataclass(frozen=True)
class TrainingSettings:
    """Length, precision and bookkeeping of the run."""

    steps: int = 40000
    """Optimiser steps."""
    precision: str = "no"
    """Mixed precision: `no`, `bf16` or `fp16`."""
    accumulation: int = 1
    """Micro-batches per step and process; the batch sizes in `data` are those of the whole step."""
    clip: float = 0.0
    """Largest norm of the gradient; 0 does not clip."""
    log_every: int = 10
    """Steps between lines in metrics.jsonl."""
    evaluate_every: int = 1000
    """Steps between evaluations on the val splits; the last step is always evaluated."""
    save_every: int = 1000
    """Steps between checkpoints; the last step and each new best are always saved."""
    keep: int = 2
    """Newest checkpoints that are kept, besides the best."""
    max_skipped: int = 10
    """Steps in a row that may be skipped because a loss or gradient is not finite; one more ends the run."""
    trackers: list[str] = field(default_factory=list)
    """Trackers of Accelerate that also receive the metrics, for example tensorboard."""

    def __post_init__(self) -> None:
        require_choice("training.precision", self.precision, ("no", "bf16", "fp16"))
        require_number("training.clip", self.clip, at_least=0)
        for name in ("steps", "accumulation", "log_every", "evaluate_every", "save_every", "keep", "max_skipped"):
            require_number(f"training.{name}", vars(self)[name], at_least=1)


@dataclass(frozen=True)
class DomainRecipe(DomainSettings):
    """What the recipe uses of one domain, and how the model learns from it."""

    consistency: ConsistencySettings | None = None
    """The unsupervised loss of this domain; keys left out are those of the recipe's `consistency`."""
    perturbations: Perturbations | None = None
    """The auxiliary decoders of this domain; keys left out are those of the recipe's `perturbations`. A borrowed head
    has the mix of its lender.
    """
    cct_strong: CCTStrongSettings | None = None
    """Strong views of this domain; keys left out are those of the recipe's `cct_strong`."""


@dataclass(frozen=True)
class Recipe:
    """A run, complete."""

    name: str = ""
    """Name of the run's folder; left out: the recipe's file name."""
    runs: str = "runs"
    """Folder of the runs."""
    seed: int = 0
    """Decides initial weights, order, augmentation and perturbations."""
    resume: str = "never"
    """`never`: refuse a run folder that exists; `auto`: go on from its newest checkpoint, or start when there is none;
    `force`: the same, although settings or data have changed.
    """
    init_from: str | None = None
    """Run folder whose weights a new run starts from: the encoder, and the heads whose names and classes match."""
    method: str = "cct"
    """How unlabelled images are used: `cct`; `cct_strong` (CCT on strong views, with a teacher); `supervised` (not at
    all); `mean_teacher`; `unimatch`; or `usss` (entropy across label spaces).
    """
    ema: float | None = None
    """Decay of a running average of the weights, 0 to below 1, which then predicts and is scored; none: no average. For
    methods without a teacher of their own.
    """
    domains: dict[str, DomainRecipe] = field(default_factory=dict)
    """The domains, by name, each with its settings."""
    data: DataSettings = field(default_factory=DataSettings)
    """Shards, batches, views."""
    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    """The shared encoder."""
    decoder: str = "pixelshuffle"
    """`pixelshuffle` (the paper) or `bilinear`."""
    perturbations: Perturbations = field(default_factory=Perturbations)
    """The auxiliary decoders of every domain."""
    supervised: SupervisedSettings = field(default_factory=SupervisedSettings)
    """The loss on labelled images."""
    consistency: ConsistencySettings = field(default_factory=ConsistencySettings)
    """The loss on unlabelled images, of `cct` and `mean_teacher`; of `cct_strong`, that of the auxiliary decoders."""
    cct_strong: CCTStrongSettings = field(default_factory=CCTStrongSettings)
    """Of `method: cct_strong`."""
    mean_teacher: MeanTeacherSettings = field(default_factory=MeanTeacherSettings)
    """Of `method: mean_teacher`."""
    unimatch: UniMatchSettings = field(default_factory=UniMatchSettings)
    """Of `method: unimatch`."""
    usss: UsssSettings = field(default_factory=UsssSettings)
    """Of `method: usss`."""
    optimiser: OptimiserSettings = field(default_factory=OptimiserSettings)
    """Optimiser and learning rate."""
    training: TrainingSettings = field(default_factory=TrainingSettings)
    """Length and bookkeeping."""
    evaluation: InferenceSettings = field(default_factory=InferenceSettings)
    """How val images are predicted."""
    pseudo_labels: PseudoLabelSettings = field(default_factory=PseudoLabelSettings)
    """How `weaklabels` makes pseudo-labels of image-level labels."""
    file: Path | None = field(default=None, compare=False)
    """The file that it was read from. What is not compared is no setting."""

    def __post_init__(self) -> None:
        if not self.domains:
            raise UserError("domains is empty; name at least one, for example `domains: {camvid: {labelled: 50}}`.")
        if not re.fullmatch(r"[\w+-][\w.+-]*|", self.name):
            raise UserError(
                f"name is {self.name!r}; it holds letters, digits and . _ + - only, and starts without a dot."
            )
        require_choice("resume", self.resume, ("never", "auto", "force"))
        require_choice("method", self.method, METHODS)
        require_choice("decoder", self.decoder, DECODERS)
        if self.ema is not None:
            require_number("ema", self.ema, at_least=0, below=1)
            if METHODS[self.method].has_own_teacher:
                raise UserError(f"ema is for methods without a teacher of their own; set {self.method}.decay.")

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.runs) / self.name

    @property
    def method_settings(self) -> Any:
        """The section of the recipe's method; None when the method has none."""
        wanted = METHODS[self.method].settings_type
        return next((section for section in vars(self).values() if type(section) is wanted), None)

    def consistency_of(self, domain: str) -> ConsistencySettings:
        """The domain's own settings. A recipe's consistency.weight=0 turns every domain's consistency off."""
        own = self.domains[domain].consistency
        return self.consistency if own is None or self.consistency.weight == 0 else own

    def perturbations_of(self, domain: str) -> Perturbations:
        """The domain's own mix, or the recipe's."""
        return self.domains[domain].perturbations or self.perturbations

    def to_yaml(self) -> str:
        """Every setting, with defaults filled in; reading it back gives an equal Recipe."""
        plain = asdict(replace(self, file=None))
        del plain["file"]
        return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=160)


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, with dotted `key=value` overrides applied.

    Raises UserError, with one line that names the file or override and the key, for anything that cannot be used.
    """
    path = _found(path)
    plain = read_yaml(path)
    for override in overrides:
        _apply(override, plain)
    recipe = recipe_from(plain, " ".join([str(path), *overrides]))
    return replace(recipe, name=recipe.name or path.stem, file=path)


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
    return replace(recipe_from(plain, str(path)), file=path)


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
    return changes(asdict(old), asdict(new), may_change=_MAY_CHANGE)


def changes(old: dict[str, Any], new: dict[str, Any], *, may_change: str = "") -> list[str]:
    """`key: old -> new` for every nested value that differs, but for keys that match the pattern."""
    before, after = _flat(old), _flat(new)
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in before | after
        if before.get(key) != after.get(key) and not re.fullmatch(may_change, key)
    ]


def _found(path: Path) -> Path:
    """The path, or the recipe of that name that is installed with the package."""
    package = Path(__file__).resolve().parents[1]
    installed = [package / "recipes" / path.name, package.parent / "recipes" / path.name]
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
        value = yaml.load(text, Loader=StrictLoader)
    except (yaml.YAMLError, UserError, ValueError):
        raise UserError(f"{override!r}: the value is not valid YAML.") from None
    *parents, last = key.split(".")
    for position, parent in enumerate(parents):
        if plain.get(parent) is None:
            plain[parent] = {}
        plain = plain[parent]
        if not isinstance(plain, dict):
            raise UserError(f"{override!r}: {'.'.join(parents[: position + 1])} is a value, not a section.")
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
            allowed = f"{f'in {path}' if path else 'at the top'}: {', '.join(hints)}."
            raise UserError(f'{where}: unknown key "{full}". Allowed {allowed}{did_you_mean(str(key), hints)}')
        _check_keys(item, hints.get(key, of_each), where, full)
    for item in value if isinstance(value, list) else []:
        _check_keys(item, None, where, path)


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Every value of nested mappings and lists by its key, such as `fields.classes[2].name`."""
    if isinstance(value, dict):
        parts = [(f"{path}.{key}" if path else str(key), part) for key, part in value.items()]
    elif isinstance(value, list) and any(isinstance(part, dict) for part in value):
        parts = [(f"{path}[{number}]", part) for number, part in enumerate(value)]
    else:
        return {path: value}
    return {key: item for place, part in parts for key, item in _flat(part, place).items()}
