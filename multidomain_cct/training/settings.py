"""Recipe: every setting of a run."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from multidomain_cct.data.batches.streams import DataSettings, DomainSettings
from multidomain_cct.errors import UserError, require_choice, require_number
from multidomain_cct.evaluation.inference import InferenceSettings
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


@dataclass(frozen=True)
class TrainingSettings:
    """Length, precision and bookkeeping of the run."""

    steps: int = 40000
    """Optimiser steps."""
    precision: str = "auto"
    """Mixed precision: `no`, `bf16`, `fp16`; or `auto`, which is `bf16` on a GPU that has it and `no` elsewhere."""
    tf32: bool = True
    """On NVIDIA GPUs, multiply 32-bit numbers with 10 bits of mantissa where that uses tensor cores; `false`: with all
    24, several times slower where `precision` is `no`.
    """
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
        require_choice("training.precision", self.precision, ("auto", "no", "bf16", "fp16"))
        require_number("training.clip", self.clip, at_least=0)
        for name in ("steps", "accumulation", "log_every", "evaluate_every", "save_every", "keep", "max_skipped"):
            require_number(f"training.{name}", vars(self)[name], at_least=1)

    @property
    def mixed_precision(self) -> str:
        """`no`, `bf16` or `fp16`: what `precision` means on this machine."""
        if self.precision != "auto":
            return self.precision
        return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False) else "no"


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
    """The file that it was read from; none for an installed recipe. What is not compared is no setting."""

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
    def places(self) -> list[Path]:
        """Where relative paths are looked for that are not in the working directory: beside the file and above it."""
        return [] if self.file is None else list(self.file.resolve().parents[:2])

    @property
    def method_settings(self) -> Any:
        """The section of the recipe's method; None when the method has none."""
        wanted = METHODS[self.method].settings_type
        return next((section for section in vars(self).values() if type(section) is wanted), None)

    def scoring_workers(self, device: torch.device) -> int:
        """Loader processes of an evaluation: one keeps a CPU busy, a GPU takes what training has."""
        return self.data.workers if device.type == "cuda" else min(1, self.data.workers)

    def crop_of(self, domain: str) -> tuple[int, int]:
        """(height, width) of the domain's training images."""
        width, height = self.domains[domain].crop or self.data.crop
        return height, width

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
