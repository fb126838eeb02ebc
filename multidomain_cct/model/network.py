"""CCT: one shared encoder, heads by domain name; a forward pass is one step's losses.

Shapes: B labelled images, U unlabelled images, C classes of the domain, D feature channels, H W image size, h w feature size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from multidomain_cct.data.augment import PAD
from multidomain_cct.data.loader import Batch
from multidomain_cct.data.order import seed_from
from multidomain_cct.model.consistency import AuxiliaryDecoder, consistency_loss
from multidomain_cct.model.decoders import build_decoder
from multidomain_cct.model.encoder import Encoder, EncoderSettings
from multidomain_cct.model.losses import cross_entropy, squared_distance
from multidomain_cct.model.perturbations import Perturbation


@dataclass(frozen=True)
class HeadSettings:
    """What one domain's head is built for."""

    num_classes: int
    perturbations: tuple[Perturbation, ...] = ()
    """One auxiliary decoder each; empty trains the domain with supervision only."""
    weight: float = 1.0
    """Factor on all losses of the domain."""
    consistency_weight: float = 0.0
    """Factor on the consistency loss, after the ramp."""


class Head(nn.Module):
    """A domain's main decoder and auxiliary decoders."""

    def __init__(self, settings: HeadSettings, decoder: str, encoder: Encoder, seed: int) -> None:
        super().__init__()
        self.settings = settings

        def build(name: str) -> nn.Module:
            # Each decoder has its own seed, so a supervised run starts from the same main decoder as CCT.
            torch.manual_seed(seed_from(seed, name))
            return build_decoder(decoder, encoder.channels, settings.num_classes, encoder.stride)

        self.main = build("main")
        self.auxiliaries = nn.ModuleList(AuxiliaryDecoder(kind, build(f"auxiliary {number}")) for number, kind in enumerate(settings.perturbations))


class CCT(nn.Module):
    """Cross-consistency training over any number of domains (CCT sections 3.1 and 3.4)."""

    def __init__(self, encoder: EncoderSettings, heads: Mapping[str, HeadSettings], *, decoder: str = "pixelshuffle", seed: int = 0) -> None:
        """Raises ValueError when encoder, stride and decoder do not fit each other."""
        super().__init__()
        for name in heads:
            if hasattr(nn.ModuleDict(), name):
                raise ValueError(f'a domain is named "{name}", which torch reserves for modules. Rename the domain and its YAML file.')
        # Building draws random numbers; the caller's generator is left as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_from(seed, "encoder"))
            self.encoder = Encoder(encoder, heads)
            self.heads = nn.ModuleDict({name: Head(settings, decoder, self.encoder, seed_from(seed, name)) for name, settings in heads.items()})

    def forward(self, batches: Mapping[str, Batch], ramp: float = 1.0) -> dict[str, Tensor]:
        """The step's losses, `<domain>/<term>` -> scalar: their sum is optimised and they are what is logged. `ramp` scales the consistency terms.

        Gradients: main decoders learn from the supervised term only, auxiliary decoders from the consistency term only, the encoder from both.
        """
        features = self._encode(batches)
        losses: dict[str, Tensor] = {}
        for name, batch in batches.items():
            head = self.heads[name]
            assert isinstance(head, Head)
            labelled, unlabelled = features[name]
            losses[f"{name}/supervised"] = head.settings.weight * cross_entropy(head.main(labelled), batch.masks)
            if head.settings.perturbations and unlabelled is not None:
                with torch.no_grad():
                    logits = head.main(unlabelled)
                    target = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=1)  # (U, C, H, W)
                distance = partial(squared_distance, target=target, valid=batch.valid)
                factor = head.settings.weight * head.settings.consistency_weight * ramp
                losses[f"{name}/consistency"] = factor * consistency_loss(unlabelled, head.auxiliaries, distance)
        return losses

    def _encode(self, batches: Mapping[str, Batch]) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Per domain, (B, D, h, w) and (U, D, h, w) features.

        Images of equal crop go through the encoder together: with shared batch statistics, separate passes make training and evaluation disagree.
        """
        pieces: list[tuple[str, Tensor]] = []
        for name, batch in batches.items():
            pieces += [(name, batch.images), (name, batch.unlabelled)]
        features: dict[str, list[Tensor | None]] = {name: [None, None] for name in batches}
        for size in {images.shape[-2:]: None for _, images in pieces}:
            group = [number for number, (_, images) in enumerate(pieces) if images.shape[-2:] == size and len(images)]
            joined = self.encoder(torch.cat([pieces[n][1] for n in group]), [(pieces[n][0], len(pieces[n][1])) for n in group])
            for number, part in zip(group, torch.split(joined, [len(pieces[n][1]) for n in group]), strict=True):
                features[pieces[number][0]][number % 2] = part
        return {name: (labelled, unlabelled) for name, (labelled, unlabelled) in features.items() if labelled is not None}

    def logits(self, images: Tensor, domain: str) -> Tensor:
        """(B, C, H, W) logits of the domain's main decoder for (B, 3, H, W) uint8 images of any size."""
        height, width = images.shape[-2:]
        stride = self.encoder.stride
        missing = (-height % stride, -width % stride)
        if any(missing):
            padded = (
                torch.tensor(PAD, dtype=images.dtype, device=images.device).view(1, 3, 1, 1).repeat(len(images), 1, height + missing[0], width + missing[1])
            )
            padded[..., :height, :width] = images
            images = padded
        head = self.heads[domain]
        assert isinstance(head, Head)
        logits: Tensor = head.main(self.encoder(images, [(domain, len(images))]))
        return logits[..., :height, :width]
