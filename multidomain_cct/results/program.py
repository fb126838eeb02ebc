"""A run as a graph of tensor operations that other software can run: photographs in, classes out.

Shapes: B photographs of equal size, C classes of a domain, H W size of the photographs, h w size at which the network
sees them, h' w' that size padded.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import AvgPool2dSame, Conv2dSame
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from multidomain_cct.data.batches.views import PAD
from multidomain_cct.data.domain import Domain
from multidomain_cct.errors import UserError
from multidomain_cct.evaluation.photos import SAME_SCALE
from multidomain_cct.model.backbone import BackbonePlan
from multidomain_cct.model.network import whole_image_logits
from multidomain_cct.results.records import recorded_image_size
from multidomain_cct.results.trained_run import TrainedRun

KINDS = ("ids", "probabilities")
"""What the program gives of each domain."""
_MOST_CELLS = 4096
"""Units of the backbone in a side of a padded image; the export needs a bound."""


@dataclass(frozen=True)
class _Scale:
    """The size at which the network sees photographs of a domain: `trained_size`, as tensor operations."""

    box: tuple[int, int] | None
    typical: tuple[int, int] | None
    fixed: tuple[int, int] | None
    """(h, w), where all photographs have one size."""

    def seen_at(self, height: int, width: int) -> Tensor:
        """(h, w) int64, in 64 bits like Python's, so that rounding agrees."""
        if self.fixed is not None:
            return torch.tensor(self.fixed)
        size = torch.stack([torch.scalar_tensor(side, dtype=torch.float64) for side in (height, width)])
        if self.box is not None:
            factor = (torch.tensor(self.box[::-1], dtype=torch.float64) / size).amin().clamp(max=1.0)
        elif self.typical is not None:
            factor = torch.sqrt(self.typical[0] * self.typical[1] / size.prod())
            near = (factor >= 1 / SAME_SCALE) & (factor <= SAME_SCALE)
            factor = torch.where(near, torch.ones_like(factor), factor)
        else:
            return size.long()
        return torch.round(size * factor).clamp(min=1).long()


class _Heads(nn.ModuleDict):
    """Decoders by domain: features -> the logits of all of them, class after class."""

    def forward(self, features: Tensor) -> Tensor:
        return torch.cat([decoder(features) for decoder in self.values()], dim=1)


class Program(nn.Module):
    """What `predict` does with photographs in memory, seen whole and once: resized as Pillow does, segmented, and the
    logits resized back. Domains whose images have one scale share a pass of the encoder.
    """

    def __init__(self, run: TrainedRun, domains: Sequence[Domain], size: tuple[int, int] | None = None) -> None:
        """`size` (width, height) is that of all photographs; None: any size, of which a backbone of one size makes a
        UserError.
        """
        super().__init__()
        model = run.model
        predicts = model if model.teacher is None or model.predicts_as_student else model.teacher
        # A copy: layers are exchanged below.
        self.encoder = copy.deepcopy(predicts.encoder)
        plan = predicts.encoder.plan
        assert isinstance(plan, BackbonePlan)
        self.unit = plan.unit
        self.scales: dict[str, _Scale] = {}
        """One for each pass of the encoder, by its first domain."""
        self.heads = nn.ModuleDict()
        self.counts = {domain.name: domain.num_classes for domain in domains}
        self.takes_any_size = size is None
        for domain in domains:
            scale = _scale(run, domain, size)
            shared = run.recipe.encoder.norm != "per_domain"
            first = next((name for name, other in self.scales.items() if shared and other == scale), domain.name)
            self.scales.setdefault(first, scale)
            if first == domain.name:
                self.heads[first] = _Heads()
            decoder = predicts.heads.get_submodule(f"{model.tasks[domain.name].head or domain.name}.main")
            self.heads.get_submodule(first).add_module(domain.name, decoder)
        if size is None:
            if plan.size is not None:
                height, width = plan.size
                raise UserError(
                    f"{run.recipe.encoder.name} takes images of {width}x{height} only, and cuts others into windows, "
                    "which a file for photographs of any size cannot. Give their size, such as --size 640,480."
                )
            _exchange_sized_layers(self.encoder)

    def suffix(self, domain: str) -> str:
        """Of the names of a domain's outputs; empty where the program has one domain."""
        return "" if len(self.counts) == 1 else f"_{domain}"

    @property
    def outputs(self) -> list[str]:
        """Names, in order."""
        names = [name for heads in self.heads.children() for name, _ in heads.named_children()]
        return [f"{kind}{self.suffix(name)}" for name in names for kind in KINDS]

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """`ids` (B, H, W) uint8 and `probabilities` (B, C, H, W) float32 of (B, H, W, 3) uint8 RGB photographs.

        Of several domains, `ids_<domain>` and `probabilities_<domain>` for each.
        """
        results = {}
        for first, heads in self.heads.named_children():
            names = [name for name, _ in heads.named_children()]
            logits = torch.split(self._logits(image, first), [self.counts[name] for name in names], dim=1)
            for name, each in zip(names, logits, strict=True):
                probabilities = each.softmax(dim=1)
                results[f"ids{self.suffix(name)}"] = probabilities.argmax(dim=1).to(torch.uint8)
                results[f"probabilities{self.suffix(name)}"] = probabilities
        return results

    def _logits(self, image: Tensor, first: str) -> Tensor:
        """(B, C, H, W) logits of one pass of the encoder, C being the classes of its domains together."""
        height, width = image.shape[1:3]
        scale, unit = self.scales[first], self.unit
        seen_at = scale.seen_at(height, width)
        if scale.fixed is None:
            rows, columns = (_as_length(cells) for cells in ((seen_at + (unit - 1)) // unit).unbind())
            padded = (unit * rows, unit * columns)
        else:
            padded = scale.fixed
        pixels = image.permute(0, 3, 1, 2)
        if scale.fixed == (height, width):
            return whole_image_logits(self.encoder, self.heads[first], pixels, first)
        logits = whole_image_logits(self.encoder, self.heads[first], _resized(pixels, seen_at, padded), first)
        return _rows(_rows(logits, seen_at[0], height).mT, seen_at[1], width).mT


def _scale(run: TrainedRun, domain: Domain, size: tuple[int, int] | None) -> _Scale:
    if size is None:
        return _Scale(domain.size, recorded_image_size(run.folder, domain.name), None)
    width, height = run.seen_at(size, domain)
    return _Scale(None, None, (height, width))


def _as_length(number: Tensor) -> int:
    """A number that depends on the data, as the length of an axis."""
    length = int(number.item()) if not torch.compiler.is_exporting() else number.item()
    torch._check(length >= 1)
    torch._check(length <= _MOST_CELLS)
    return length  # type: ignore[return-value]


def _resized(pixels: Tensor, seen_at: Tensor, padded: tuple[int, int]) -> Tensor:
    """(B, 3, h', w') pixels, 0 to 255, of (B, 3, H, W) ones: bit for bit those of Pillow's bicubic filter within
    `seen_at` (h, w), and beyond it what training pads crops with.
    """
    height, width = pixels.shape[-2:]
    rows, columns = _bicubic(height, seen_at[0], padded[0]), _bicubic(width, seen_at[1], padded[1])
    shrunk = _to_8_bits(rows @ _to_8_bits(pixels.double() @ columns.T))
    inside = (torch.arange(padded[0]) < seen_at[0])[:, None] & (torch.arange(padded[1]) < seen_at[1])
    return torch.where(inside, shrunk.float(), torch.tensor(PAD, dtype=torch.float32).view(1, 3, 1, 1))


def _to_8_bits(values: Tensor) -> Tensor:
    return (values + 0.5).floor().clamp(0, 255)


def _bicubic(length: int, seen: Tensor, steps: int) -> Tensor:
    """(steps, length) float64: the weight of each pixel of a row in each of the `seen` that it is resized to, as
    Pillow computes it, in units of 2**-22. Steps beyond have no meaning.
    """
    scale = length / seen.double()
    centres = (torch.arange(steps, dtype=torch.float64) + 0.5) * scale
    offsets = torch.arange(length, dtype=torch.float64) + 0.5 - centres[:, None]
    x = (offsets / scale.clamp(min=1.0)).abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((x - 5) * x + 8) * x * -0.5 + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
    weights = weights / weights.sum(dim=1, keepdim=True)
    return (weights * 2**22 + 0.5).floor() / 2**22


def _rows(maps: Tensor, seen: Tensor, length: int) -> Tensor:
    """(..., length, w) maps: the first `seen` rows of (..., h', w') ones, resized bilinearly."""
    position = (torch.arange(length, dtype=torch.float64) + 0.5) * (seen / length) - 0.5
    position = torch.minimum(position.clamp(min=0), (seen - 1).double())
    above = position.long()
    below = torch.minimum(above + 1, seen - 1)
    upper, lower = maps.index_select(-2, above), maps.index_select(-2, below)
    return upper + (position - above).float()[:, None] * (lower - upper)


class _Same(nn.Module):
    """A layer of timm's with the padding of TensorFlow, whose amount depends on the size of the image."""

    def __init__(self, layer: Conv2dSame | AvgPool2dSame) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, maps: Tensor) -> Tensor:
        own = self.layer
        dilations = own.dilation if isinstance(own, Conv2dSame) else (1, 1)
        for dim, side, stride, dilation in zip((-2, -1), own.kernel_size, own.stride, dilations, strict=True):
            maps = _padded_as_same(maps, dim, dilation * (side - 1) + 1, stride)
        if isinstance(own, Conv2dSame):
            return F.conv2d(maps, own.weight, own.bias, own.stride, 0, own.dilation, own.groups)
        return F.avg_pool2d(maps, own.kernel_size, own.stride)


def _padded_as_same(maps: Tensor, dim: int, reach: int, stride: int) -> Tensor:
    """Maps with zeros before and after, as many as a layer of this reach and stride needs for every position."""
    length = maps.shape[dim]
    if statically_known_true(length % stride == 0):
        total = max(reach - stride, 0)
        around = (total // 2, total - total // 2)
        return F.pad(maps, (0, 0, *around) if dim == -2 else around)
    before = (reach - stride + (-length) % stride) // 2
    wide = F.pad(maps, (0, 0, reach, reach) if dim == -2 else (reach, reach))
    kept = torch.arange(((length + stride - 1) // stride - 1) * stride + reach) + (reach - before)
    return wide.index_select(dim, kept)


class _HalvingPool(nn.Module):
    """Averages of 2x2 pixels; those that an odd side leaves over are averages of what there is."""

    def forward(self, maps: Tensor) -> Tensor:
        for dim in (-2, -1):
            length = maps.shape[dim]
            if not statically_known_true(length % 2 == 0):
                maps = maps.index_select(dim, torch.arange(2 * ((length + 1) // 2)).clamp(max=length - 1))
        return F.avg_pool2d(maps, 2)


def _exchange_sized_layers(module: nn.Module) -> None:
    """In place. The sizes within a backbone are then short expressions, without which its export takes minutes."""
    for name, child in module.named_children():
        if isinstance(child, (Conv2dSame, AvgPool2dSame)):
            setattr(module, name, _Same(child))
        elif isinstance(child, nn.AvgPool2d) and child.ceil_mode and (child.kernel_size, child.stride) == (2, 2):
            setattr(module, name, _HalvingPool())
        else:
            _exchange_sized_layers(child)
