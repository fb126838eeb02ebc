"""The optimiser, and its learning rate as a function of the step alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from multidomain_cct.errors import require_choice, require_number

SCHEDULES = ("poly", "cosine", "constant")


@dataclass(frozen=True)
class OptimiserSettings:
    """The optimiser and its learning rate."""

    name: str = "sgd"
    """`sgd` with momentum, or `adamw`."""
    lr: float = 0.01
    """Learning rate of decoders and context module at the start."""
    backbone_factor: float = 0.1
    """Factor on the learning rate for the pretrained backbone."""
    layer_decay: float = 1.0
    """Factor on the learning rate from each layer of a ViT to the one before it, 0 to 1: 0.75 to 0.9 keeps early layers
    near their pretrained weights.
    """
    momentum: float = 0.9
    """Of `sgd`."""
    weight_decay: float = 1e-4
    """L2 for `sgd`, decoupled for `adamw`; on all parameters, as in the authors' code."""
    schedule: str = "poly"
    """`poly`: lr * (1 - t/T)^power; `cosine`: lr * (1 + cos(pi t/T)) / 2; `constant`."""
    power: float = 0.9
    """Of `poly`."""
    warmup: int = 0
    """Steps of linear rise at the start."""

    def __post_init__(self) -> None:
        require_choice("optimiser.name", self.name, ("sgd", "adamw"))
        require_choice("optimiser.schedule", self.schedule, SCHEDULES)
        require_number("optimiser.lr", self.lr, above=0)
        require_number("optimiser.momentum", self.momentum, at_least=0, below=1)
        require_number("optimiser.backbone_factor", self.backbone_factor, at_least=0)
        require_number("optimiser.layer_decay", self.layer_decay, above=0, at_most=1)
        require_number("optimiser.weight_decay", self.weight_decay, at_least=0)
        require_number("optimiser.power", self.power, at_least=0)
        require_number("optimiser.warmup", self.warmup, at_least=0)


def learning_rate(settings: OptimiserSettings, step: int, num_steps: int) -> float:
    """The learning rate outside the backbone at a step."""
    t = step / num_steps
    factor: float = {"poly": (1 - t) ** settings.power, "cosine": (1 + math.cos(math.pi * t)) / 2, "constant": 1.0}[
        settings.schedule
    ]
    return settings.lr * factor * min(1.0, (step + 1) / (settings.warmup + 1))


def build_optimiser(
    settings: OptimiserSettings, backbone: nn.Module, model: nn.Module, depths: Mapping[str, int] | None = None
) -> torch.optim.Optimizer:
    """An optimiser with two layer groups, the backbone and the rest of the model; with a layer decay, the backbone has
    one for each layer. `depths`: layers above each parameter of the backbone.

    `set_learning_rate` must run before each step. The model is on the device on which it will be trained.
    """
    in_backbone = {id(parameter) for parameter in backbone.parameters()}
    layers: dict[float, list[nn.Parameter]] = {}
    for name, parameter in backbone.named_parameters():
        if parameter.requires_grad:
            factor = settings.backbone_factor * settings.layer_decay ** (depths or {}).get(name, 0)
            layers.setdefault(factor, []).append(parameter)
    groups: list[dict[str, Any]] = [{"params": params, "factor": factor} for factor, params in layers.items()]
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in in_backbone]
    groups.append({"params": rest, "factor": 1.0})
    # On a GPU one kernel updates all parameters.
    common: dict[str, Any] = {
        "lr": settings.lr,
        "weight_decay": settings.weight_decay,
        "fused": next(model.parameters()).is_cuda,
    }
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, **common)
    return torch.optim.SGD(groups, momentum=settings.momentum, **common)


def set_learning_rate(optimiser: torch.optim.Optimizer, lr: float) -> None:
    """Give every layer group its learning rate."""
    for group in optimiser.param_groups:
        group["lr"] = lr * group["factor"]
