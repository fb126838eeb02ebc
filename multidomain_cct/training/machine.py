"""Whether this machine, and Accelerate's settings around the run, are what the recipe needs."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from multidomain_cct.errors import did_you_mean
from multidomain_cct.training.findings import Finding, error, warning
from multidomain_cct.training.recipe import Recipe

_FROM = "in the environment (`accelerate launch` sets it from its options and its default config file)"
_SHARDED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}


def check_machine(recipe: Recipe) -> Iterator[Finding]:
    """What Accelerate would leave out, or mix in, without a word."""
    training, available = recipe.training, [str(tracker) for tracker in get_available_trackers()]
    for name in training.trackers:
        if name not in available:
            known = [str(tracker) for tracker in LoggerType if tracker != LoggerType.ALL]
            remedy = f" Install it: pip install {name}" if name in known else did_you_mean(name, known)
            text = f"names {name!r}. Installed: {', '.join(available) or 'none'}.{remedy}"
            yield error("training.trackers", text)
    if training.precision == "fp16" and not torch.accelerator.is_available():
        yield error("training.precision", "is `fp16`, which a CPU does not train in. Use `bf16` or `no` there.")
    for variable, name in _SHARDED.items():
        if os.environ.get(variable, "").lower() in ("1", "true", "yes", "on", "y", "t"):
            remedy = "unset it, or give accelerate launch a config file without it (--config_file)"
            yield error(variable, f"is set {_FROM}. A run is plain data parallel and takes no {name}: {remedy}.")
    if (dynamo := os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")).lower() not in ("no", ""):
        yield _unused("ACCELERATE_DYNAMO_BACKEND", dynamo, "encoder.compile=true")
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("1", "", str(training.accumulation)):
        yield _unused("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", steps, f"training.accumulation={steps}")
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision == "fp8":
        remedy = "Give accelerate launch --mixed_precision no; training.precision is no, bf16 or fp16"
        yield error("ACCELERATE_MIXED_PRECISION", f"is fp8 {_FROM}. {remedy}.")
    elif precision not in ("no", "", training.mixed_precision):
        yield _unused("ACCELERATE_MIXED_PRECISION", precision, f"training.precision={precision}")


def set_tf32(allowed: bool) -> None:
    """Whether CUDA's convolutions and matrix products of 32-bit numbers may use TF32. Nothing changes elsewhere."""
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        torch.backends.cudnn.allow_tf32 = allowed


def _unused(variable: str, value: str, setting: str) -> Finding:
    return warning(variable, f"is {value} {_FROM} and is not used: the recipe decides. Set {setting} for it.")
