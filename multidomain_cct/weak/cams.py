"""Image-level labels -> pseudo-labels, by a multi-label classifier on the shared encoder and its activation maps.

Shapes: B images, K classified classes, P of them present in an image, D feature channels, H W image size, h w feature
size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multidomain_cct.data.domain import IGNORE
from multidomain_cct.errors import UserError, require_number
from multidomain_cct.files.seeds import seed_from
from multidomain_cct.model.encoder import Encoder, EncoderSettings
from multidomain_cct.model.network import encode_together, scaled, whole_image_logits
from multidomain_cct.weak.crf import CrfSettings, DenseCrf


@dataclass(frozen=True)
class PseudoLabelSettings:
    """How `weaklabels` makes pseudo-labels of image-level labels (CCT section 3.3).

    Training itself does not read this section.
    """

    steps: int = 1000
    """Steps of the classifier's training."""
    batch: int = 16
    """Images of each domain per step."""
    lr: float = 0.1
    """Initial learning rate of classifier and context module, with SGD; the backbone's is optimiser.backbone_factor
    times that.
    """
    least_share: float = 0.001
    """Smallest share of a mask's pixels, 0 to below 1, at which an image-level label taken from it lists a class."""
    scales: list[float] = field(default_factory=lambda: [1.0, 0.5, 1.5, 2.0])
    """Image scales whose activation maps are averaged, each with its mirror image."""
    foreground: float = 0.3
    """Activation, as a share of the class's largest in the image, above which a position may become foreground."""
    background: float = 0.05
    """Activation below which a position may become background. What lies between the two is unsure."""
    most_common: float = 0.9
    """Classes that more than this share of the images show get no pseudo-labels, because the classifier hardly sees
    their absence; nor does the background of images that show them.
    """
    confidence: float = 0.7
    """Initial probability, in the random field, of a position's class; the other classes share the rest."""
    crf: CrfSettings = field(default_factory=CrfSettings)
    """The random field that aligns pseudo-labels with the borders in the image."""

    def __post_init__(self) -> None:
        require_number("pseudo_labels.steps", self.steps, at_least=1)
        require_number("pseudo_labels.batch", self.batch, at_least=1)
        require_number("pseudo_labels.lr", self.lr, above=0)
        require_number("pseudo_labels.least_share", self.least_share, at_least=0, below=1)
        require_number("pseudo_labels.most_common", self.most_common, above=0, at_most=1)
        require_number("pseudo_labels.confidence", self.confidence, above=0, below=1)
        require_number("pseudo_labels.foreground", self.foreground, at_least=self.background, below=1)
        require_number("pseudo_labels.background", self.background, above=0)
        if not self.scales or min(self.scales) <= 0:
            raise UserError(f"pseudo_labels.scales is {self.scales}; it has at least one, each above 0.")


class ClassHead(nn.Module):
    """A map for each class, and the logit that a class starts from: the log-odds of its share of the images.

    Without that start, the map of a common class would have to be positive nearly everywhere; with it, the map explains
    how images differ. IRN has no bias: on PASCAL VOC, where every class is rare, the background becomes negative; for
    common classes the sign turns.
    """

    base: Tensor

    def __init__(self, channels: int, shares: Sequence[float]) -> None:
        super().__init__()
        self.maps = nn.Conv2d(channels, len(shares), 1, bias=False)
        # A class in all images, or in none, has no finite log-odds.
        self.register_buffer("base", torch.tensor(shares).clamp(0.01, 0.99).logit())

    def forward(self, features: Tensor) -> Tensor:
        maps: Tensor = self.maps(features)
        return maps


class Classifier(nn.Module):
    """The shared encoder with a multi-label head by domain: a logit per class and position, averaged over the image.

    The average of a linear map is linear, so the map itself explains the logit.
    """

    def __init__(
        self,
        encoder: EncoderSettings,
        shares: Mapping[str, Sequence[float]],
        *,
        seed: int = 0,
        crops: Sequence[tuple[int, int]] = (),
    ) -> None:
        """`shares` is, by domain, the share of the images that show each of its K classes; `crops`, (H, W), are
        the sizes of training images.

        Raises UserError for encoder settings that do not fit.
        """
        super().__init__()
        # Building draws random numbers; the caller's generator is left as it was.
        with torch.random.fork_rng(devices=[]):
            # The seed of the segmentation network's encoder: its new layers start from the same weights.
            torch.manual_seed(seed_from(seed, "encoder"))
            self.encoder = Encoder(encoder, shares, crops)
            self.heads = nn.ModuleDict()
            for name, own in shares.items():
                torch.manual_seed(seed_from(seed, name, "classifier"))
                self.heads[name] = ClassHead(self.encoder.channels, own)

    def forward(self, images: Mapping[str, Tensor], inside: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """(B, K) logits by domain, of (B, 3, H, W) uint8 images.

        Padding, where the (B, H, W) bool `inside` is False, is left out of the average.
        """
        logits = {}
        features = encode_together(self.encoder, {(name, "tagged"): batch for name, batch in images.items()})
        for (name, _), own in features.items():
            maps = self.heads[name](own)  # (B, K, h, w)
            weight = F.interpolate(inside[name][:, None].to(maps.dtype), size=maps.shape[-2:], mode="area")
            # Only a view that shows nothing but padding could divide by 0.
            means = (maps * weight).sum(dim=(2, 3)) / weight.sum(dim=(2, 3)).clamp_min(1e-6)
            logits[name] = self.base(name) + means
        return logits

    def base(self, domain: str) -> Tensor:
        """(K,) logits without an image: the log-odds of the classes' shares."""
        head = self.heads[domain]
        assert isinstance(head, ClassHead)
        return head.base

    def maps(self, image: Tensor, domain: str) -> Tensor:
        """(K, H, W) class maps of a (3, H, W) uint8 image of any size."""
        upsample = nn.Upsample(scale_factor=self.encoder.stride, mode="bilinear", align_corners=False)
        decoder = nn.Sequential(self.heads[domain], upsample)
        return whole_image_logits(self.encoder, decoder, image[None], domain)[0]


def multilabel_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean binary cross-entropy over (B, K) logits and targets of 0 or 1 (multi-label soft-margin loss)."""
    return F.binary_cross_entropy_with_logits(logits, targets)


@torch.no_grad()
def activation_maps(
    model: Classifier, image: Tensor, domain: str, *, present: Sequence[int], scales: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """(P, H, W) activations of the `present` classes, 0 to 1, and the (K,) logits of the whole image.

    Maps of the scales and of their mirror images are rectified, averaged and divided by the largest value of the class.
    A class whose map is nowhere positive stays 0.
    """
    size = image.shape[-2:]
    total = torch.zeros(len(present), *size, device=image.device)
    for scale in scales if present else ():
        view = scaled(image[None], scale)[0]
        for mirrored in (False, True):
            maps = model.maps(view.flip(-1) if mirrored else view, domain)[list(present)]
            maps = maps.flip(-1) if mirrored else maps
            total += F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0].relu()
    peak = total.amax(dim=(1, 2), keepdim=True)
    return total / peak.clamp_min(1e-5), model.base(domain) + model.maps(image, domain).mean(dim=(1, 2))


@torch.no_grad()
def confident_labels(
    activations: Tensor, train_ids: Sequence[int], settings: PseudoLabelSettings, *, background: int | None
) -> Tensor:
    """(H, W) uint8 train ids of the sure positions, 255 elsewhere, without a random field.

    `activations` are the (P, H, W) ones of the classes `train_ids`.
    """
    over, under = (_above(activations, threshold) for threshold in (settings.foreground, settings.background))
    return _combined(over, under, train_ids, background)


@torch.no_grad()
def pseudo_labels(
    activations: Tensor,
    image: Tensor,
    train_ids: Sequence[int],
    settings: PseudoLabelSettings,
    *,
    background: int | None,
) -> Tensor:
    """(H, W) uint8 train ids of the sure positions, 255 elsewhere, refined by a random field over the (3, H, W) image.

    As in IRN (Ahn, Cho and Kwak 2019), which CCT follows: once with `foreground` as the activation of "none of them"
    and once with `background`, the winners become unary terms of probability `confidence` and are refined. A position
    is foreground where the first result has a class, background where neither has one, else unsure. Without a
    background class only the first is made, and what is not foreground is unsure.
    """
    thresholds = [settings.foreground] if background is None else [settings.foreground, settings.background]
    winners = torch.stack([_above(activations, threshold) for threshold in thresholds])  # (1 or 2, H, W)
    if train_ids:
        chosen = F.one_hot(winners, len(train_ids) + 1).movedim(-1, 1).bool()
        others = (1 - settings.confidence) / len(train_ids)
        winners = DenseCrf(image, settings.crf)(torch.where(chosen, settings.confidence, others)).argmax(dim=1)
    return _combined(winners[0], winners[-1], train_ids, background)


def _above(activations: Tensor, threshold: float) -> Tensor:
    """(H, W): 1 + the number of the strongest class, or 0 where none is above the threshold."""
    return F.pad(activations, (0, 0, 0, 0, 1, 0), value=threshold).argmax(dim=0)


def _combined(over: Tensor, under: Tensor, train_ids: Sequence[int], background: int | None) -> Tensor:
    """Train ids of the (H, W) winners at the upper threshold; background where the lower one has none either."""
    ids = torch.tensor([IGNORE, *train_ids], dtype=torch.uint8, device=over.device)[over]
    if background is not None:
        ids[(over == 0) & (under == 0)] = background
    return ids
