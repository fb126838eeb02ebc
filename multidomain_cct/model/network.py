"""The network that all methods train: a shared encoder and heads by name. A method adds its losses to it.

Shapes: B images, C classes of the domain, D feature channels, H W image size, h w feature size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multidomain_cct.data.batches.loader import Batch
from multidomain_cct.data.batches.views import PAD
from multidomain_cct.errors import UserError
from multidomain_cct.files.seeds import seed_from
from multidomain_cct.model.auxiliary import AuxiliaryDecoder
from multidomain_cct.model.backbone import Size
from multidomain_cct.model.decoders import Decoder, build_decoder
from multidomain_cct.model.encoder import Encoder, EncoderSettings
from multidomain_cct.model.losses import ConsistencySettings, SupervisedSettings
from multidomain_cct.model.perturbations import Perturbation

Features = Mapping[tuple[str, str], Tensor]
"""(B, D, h, w) features by domain and kind of image (`labelled`, `unlabelled`, ...); empty batches are absent."""


@dataclass(frozen=True)
class Task:
    """What the model has to know of one domain."""

    things: tuple[bool, ...]
    """For each class, whether it is a countable object."""
    head: str = ""
    """The domain whose head is used; empty: this one."""
    perturbations: tuple[Perturbation, ...] = ()
    """One for each auxiliary decoder of the domain's own head."""
    weight: float = 1.0
    """Factor on all losses of the domain."""
    crop: Size | None = None
    """Of the domain's training images; None: not known."""
    class_pixels: tuple[int, ...] = ()
    """Labelled pixels of each class in the images that are used; empty: not known."""
    supervised: SupervisedSettings = field(default_factory=SupervisedSettings)
    consistency: ConsistencySettings = field(default_factory=ConsistencySettings)
    settings: Any = None
    """The section of the method, as the domain has it."""

    @property
    def num_classes(self) -> int:
        return len(self.things)


class Head(nn.Module):
    """A main decoder and auxiliary decoders for one label space."""

    def __init__(self, task: Task, decoder: str, encoder: Encoder, seed: int) -> None:
        super().__init__()

        def build(name: str) -> Decoder:
            # Each decoder has its own seed, so a supervised run starts from the same main decoder as CCT.
            torch.manual_seed(seed_from(seed, name))
            return build_decoder(decoder, encoder.channels, task.num_classes, encoder.stride)

        self.main = build("main")
        self.auxiliaries = nn.ModuleList(
            AuxiliaryDecoder(kind, build(f"auxiliary {number}")) for number, kind in enumerate(task.perturbations)
        )


class Segmenter(nn.Module):
    """A shared encoder and heads by name."""

    def __init__(
        self, encoder: EncoderSettings, tasks: Mapping[str, Task], *, decoder: str = "pixelshuffle", seed: int = 0
    ) -> None:
        """Raises UserError when encoder, stride and decoder do not fit."""
        super().__init__()
        for name in tasks:
            if hasattr(nn.ModuleDict(), name):
                raise UserError(f'a domain is named "{name}", a word that torch reserves. Rename it and its YAML file.')
        self.tasks = dict(tasks)
        # Building draws random numbers; the caller's generator is left as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_from(seed, "encoder"))
            self.encoder = Encoder(encoder, tasks, [task.crop for task in tasks.values() if task.crop])
            own = {name: task for name, task in tasks.items() if task.head in ("", name)}
            self.heads = nn.ModuleDict(
                {name: Head(task, decoder, self.encoder, seed_from(seed, name)) for name, task in own.items()}
            )

    def head(self, domain: str) -> Head:
        """The head that the domain uses, its own or a borrowed one."""
        head = self.heads[self.tasks[domain].head or domain]
        assert isinstance(head, Head)
        return head

    def encode(self, images: Mapping[tuple[str, str], Tensor]) -> Features:
        """The features of (B, 3, H, W) uint8 images by domain and kind."""
        return encode_together(self.encoder, images)

    def logits(self, images: Tensor, domain: str) -> Tensor:
        """(B, C, H, W) logits of the domain's main decoder for (B, 3, H, W) uint8 images of any size."""
        return whole_image_logits(self.encoder, self.head(domain).main, images, domain)


def encode_together(encoder: nn.Module, images: Mapping[tuple[str, str], Tensor]) -> Features:
    """The features of (B, 3, H, W) uint8 images by domain and kind; empty batches have none.

    Images of equal crop go through the encoder in one pass: with shared batch norms, separate passes would make
    training and evaluation disagree.
    """
    sizes: dict[tuple[int, ...], dict[tuple[str, str], Tensor]] = {}
    for key, batch in images.items():
        if len(batch):
            sizes.setdefault(tuple(batch.shape[-2:]), {})[key] = batch
    features: dict[tuple[str, str], Tensor] = {}
    for group in sizes.values():
        counts = [len(batch) for batch in group.values()]
        parts = [(domain, count) for (domain, _), count in zip(group, counts, strict=True)]
        joined = encoder(torch.cat(list(group.values())), parts)
        features |= zip(group, torch.split(joined, counts), strict=True)
    return features


def labelled_images(batches: Mapping[str, Batch]) -> dict[tuple[str, str], Tensor]:
    """The labelled images of a step, for `encode`."""
    return {(name, "labelled"): batch.images for name, batch in batches.items()}


def unlabelled_images(batches: Mapping[str, Batch]) -> dict[tuple[str, str], Tensor]:
    """The unlabelled images of a step, for `encode`."""
    return {(name, "unlabelled"): batch.unlabelled for name, batch in batches.items()}


def whole_image_logits(encoder: nn.Module, decoder: nn.Module, images: Tensor, domain: str) -> Tensor:
    """(B, C, H, W) logits of (B, 3, H, W) uint8 images of any size, padded on the way to one that the backbone takes.

    A backbone of one size sees windows, whose logits are averaged where they overlap.
    """
    assert isinstance(encoder, Encoder)

    def logits_of(whole: Tensor) -> Tensor:
        logits: Tensor = decoder(encoder(whole, [(domain, whole.shape[0])]))
        return logits

    (height, width), unit, window = images.shape[-2:], encoder.plan.unit, encoder.plan.size
    if window is None:
        padded = _padded(images, -(-height // unit) * unit, -(-width // unit) * unit)
        return logits_of(padded)[..., :height, :width]
    images = _padded(images, max(height, window[0]), max(width, window[1]))
    total, seen = torch.zeros(()), torch.zeros(images.shape[-2:], device=images.device)
    for top, left in product(_starts(images.shape[-2], window[0]), _starts(images.shape[-1], window[1])):
        place = (..., slice(top, top + window[0]), slice(left, left + window[1]))
        logits = logits_of(images[place])
        if not total.ndim:
            total = logits.new_zeros(*logits.shape[:2], *images.shape[-2:])
        total[place] += logits
        seen[place] += 1
    return (total / seen)[..., :height, :width]


def _padded(images: Tensor, height: int, width: int) -> Tensor:
    """Images with what training pads crops with at the right and the bottom."""
    if images.shape[-2:] == (height, width):
        return images
    padding = torch.tensor(PAD, dtype=images.dtype, device=images.device).view(1, 3, 1, 1)
    padded = padding.repeat(images.shape[0], 1, height, width)
    padded[..., : images.shape[-2], : images.shape[-1]] = images
    return padded


def _starts(length: int, window: int) -> list[int]:
    """Of windows that cover the length evenly; neighbours share a third or more."""
    steps = math.ceil(1.5 * (length / window - 1))
    return [round(step * (length - window) / max(1, steps)) for step in range(steps + 1)]


def scaled(images: Tensor, scale: float) -> Tensor:
    """(B, 3, scale * H, scale * W) uint8 images of (B, 3, H, W) ones, smoothed where they shrink."""
    if scale == 1.0:
        return images
    size = [max(1, round(side * scale)) for side in images.shape[-2:]]
    resized = F.interpolate(images.float(), size=size, mode="bilinear", align_corners=False, antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)
