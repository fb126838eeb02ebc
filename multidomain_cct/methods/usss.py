"""Universal semi-supervised segmentation: entropy in a label embedding that all domains share (Kalluri, Varma,
Chandraker, Jawahar, ICCV 2019).

Each position of an image is embedded and compared with the embeddings of the classes; on unlabelled images it should
resemble few classes of its own domain, and few of every other domain.

Shapes: B images, C classes of a domain, E embedding channels, D feature channels, h w feature size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from multidomain_cct.data.batches.loader import Batch
from multidomain_cct.data.domain import IGNORE
from multidomain_cct.errors import require_number
from multidomain_cct.files.seeds import seed_from
from multidomain_cct.methods.supervised import Supervised
from multidomain_cct.model.distances import at_least_float32
from multidomain_cct.model.losses import mean_over_valid
from multidomain_cct.model.network import labelled_images, unlabelled_images


@dataclass(frozen=True)
class UsssSettings:
    """For `method: usss`; the ramp is that of `consistency`."""

    across: float = 0.1
    """Weight of the entropy over the classes of each other domain (alpha)."""
    within: float = 0.1
    """Weight of the entropy over the domain's own classes (beta)."""
    channels: int = 100
    """Size of the embedding."""
    temperature: float = 0.1
    """Divides the cosine similarities before the softmax over classes."""
    momentum: float = 0.99
    """Share of a class's embedding that a step with labelled images keeps, 0 to below 1."""

    def __post_init__(self) -> None:
        require_number("usss.across", self.across, at_least=0)
        require_number("usss.within", self.within, at_least=0)
        require_number("usss.channels", self.channels, at_least=1)
        require_number("usss.temperature", self.temperature, above=0)
        require_number("usss.momentum", self.momentum, at_least=0, below=1)


class Usss(Supervised):
    """Class embeddings are running means of the labelled positions' embeddings, without gradient.

    The paper takes fixed ones from networks trained on each domain beforehand; running means need no such networks and
    follow the encoder that is being trained.
    """

    settings_type = UsssSettings
    settings: UsssSettings
    min_label_spaces = 2
    needs_unlabelled = True

    def __init__(self, *arguments: Any, seed: int = 0, **options: Any) -> None:
        super().__init__(*arguments, seed=seed, **options)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_from(seed, "embedding"))
            self.embedding = nn.Conv2d(self.encoder.channels, self.settings.channels, 1, bias=False)
            for name in self.heads:
                start = torch.randn(self.tasks[name].num_classes, self.settings.channels)
                self.register_buffer(f"classes_{name}", F.normalize(start, dim=1))

    def forward(self, batches: Mapping[str, Batch], progress: float = 1.0) -> dict[str, Tensor]:
        """The step's losses: supervised, and the entropies `<domain>/within` and `<domain>/across` of unlabelled images
        in nats.
        """
        batches = self.with_labelled_views(batches)
        features = self.encode(labelled_images(batches) | unlabelled_images(batches))
        losses = self.supervised_losses(features, batches, progress)
        for name, batch in batches.items():
            if (name, "labelled") in features:
                self._remember(self._label_space(name), self._embed(features[name, "labelled"]), batch.masks)
        for name, batch in batches.items():
            if (name, "unlabelled") in features:
                embedded, own = self._embed(features[name, "unlabelled"]), self._label_space(name)
                valid = self._at_positions(batch.valid)
                entropies = {label_space: self._entropy(embedded, label_space, valid) for label_space in self.heads}
                across = torch.stack([value for label_space, value in entropies.items() if label_space != own]).mean()
                factor = self.tasks[name].weight * self.tasks[name].consistency.ramp_at(progress)
                losses[f"{name}/within"] = factor * self.settings.within * entropies[own]
                losses[f"{name}/across"] = factor * self.settings.across * across
        return losses

    def _label_space(self, domain: str) -> str:
        return self.tasks[domain].head or domain

    def _embed(self, features: Tensor) -> Tensor:
        """(B, E, h, w) embeddings of unit length."""
        return F.normalize(at_least_float32(self.embedding(features)), dim=1)

    def _entropy(self, embedded: Tensor, label_space: str, valid: Tensor) -> Tensor:
        """Scalar: mean entropy over valid positions of the softmax over a label space's classes."""
        similarity = torch.einsum("behw,ce->bchw", embedded, self.get_buffer(f"classes_{label_space}"))
        log = (similarity / self.settings.temperature).log_softmax(dim=1)
        return mean_over_valid(-(log.exp() * log).sum(dim=1), valid)

    @torch.no_grad()
    def _remember(self, label_space: str, embedded: Tensor, masks: Tensor) -> None:
        """Move each class that occurs toward the mean embedding of its positions, over all processes."""
        table = self.get_buffer(f"classes_{label_space}")
        ids = self._at_positions(masks)
        labelled = ids != IGNORE
        one_hot = F.one_hot(ids[labelled].long(), len(table)).to(table.dtype)  # (positions, C)
        sums = one_hot.T @ embedded.detach().permute(0, 2, 3, 1)[labelled].to(table.dtype)  # (C, E)
        counts = one_hot.sum(dim=0)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
            torch.distributed.all_reduce(counts)
        moved = F.normalize(
            self.settings.momentum * table + (1 - self.settings.momentum) * F.normalize(sums, dim=1), dim=1
        )
        # A new tensor, not a change in place: a graph may still need the old one.
        setattr(self, f"classes_{label_space}", torch.where(counts[:, None] > 0, moved, table))

    def _at_positions(self, pixels: Tensor) -> Tensor:
        """(B, h, w) of (B, H, W) values: the pixel in the middle of each position."""
        stride = self.encoder.stride
        return pixels[:, stride // 2 :: stride, stride // 2 :: stride]
