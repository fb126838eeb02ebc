"""Decoders: encoder features -> logits at the image's resolution.

Shapes: B images, C classes, D feature channels, h w feature size, s the encoder's stride.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DECODERS = ("pixelshuffle", "bilinear")


def build_decoder(kind: str, channels: int, num_classes: int, stride: int) -> nn.Module:
    """A decoder from (B, D, h, w) features to (B, C, s*h, s*w) logits.

    Raises ValueError, with the remedy, for a stride that the decoder cannot undo.
    """
    if kind == "bilinear":
        return BilinearDecoder(channels, num_classes, stride)
    if kind != "pixelshuffle":
        raise ValueError(f"decoder is {kind!r}; it is one of {', '.join(DECODERS)}.")
    if stride & (stride - 1):
        raise ValueError(
            f"decoder `pixelshuffle` doubles the resolution step by step, but the encoder's stride is {stride}, not a power of two. Use decoder=bilinear."
        )
    return PixelShuffleDecoder(channels, num_classes, stride)


class PixelShuffleDecoder(nn.Sequential):
    """A 1x1 convolution to C channels, then one doubling by sub-pixel convolution per factor 2 of the stride (CCT section 4.1).

    The authors also put a ReLU behind the last doubling, which keeps logits from being negative and leaves classes stuck at IoU 0; here the last doubling
    ends with its convolution.
    """

    def __init__(self, channels: int, num_classes: int, stride: int) -> None:
        layers: list[nn.Module] = [nn.Conv2d(channels, num_classes, 1, bias=False)]
        doublings = stride.bit_length() - 1
        for doubling in range(doublings):
            convolution = nn.Conv2d(num_classes, 4 * num_classes, 1)
            icnr_(convolution.weight)
            # Random biases would differ between the sub-pixels.
            nn.init.zeros_(convolution.get_parameter("bias"))
            layers += [convolution, nn.PixelShuffle(2)]
            if doubling < doublings - 1:
                layers.insert(-1, nn.ReLU())
        super().__init__(*layers)


class BilinearDecoder(nn.Module):
    """A 1x1 convolution to C channels, then bilinear upsampling to the image's resolution."""

    def __init__(self, channels: int, num_classes: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.classify = nn.Conv2d(channels, num_classes, 1)

    def forward(self, features: Tensor) -> Tensor:
        return upsample_bilinear(self.classify(features), self.stride)


def upsample_bilinear(maps: Tensor, factor: int) -> Tensor:
    """(B, C, factor*h, factor*w): what `F.interpolate` gives in mode `bilinear` without aligned corners, as a matrix product along each axis.

    On a CPU its backward pass, above all, is much faster.
    """
    rows, columns = (_interpolation(length, factor, maps) for length in maps.shape[-2:])
    with torch.autocast(maps.device.type, enabled=False):
        upsampled: Tensor = rows.T @ (maps @ columns)
    return upsampled


def _interpolation(length: int, factor: int, like: Tensor) -> Tensor:
    """(length, factor*length): the weights of each position in each interpolated one."""
    identity = torch.eye(length, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
    return F.interpolate(identity[None], scale_factor=float(factor), mode="linear")[0].to(like.dtype)


def icnr_(weight: Tensor) -> None:
    """Fill a (4C, D, 1, 1) weight in place so that the four sub-pixels of a position start equal (Aitken et al. 2017): no checkerboard at initialisation."""
    with torch.no_grad():
        kernel = nn.init.kaiming_normal_(torch.empty_like(weight[::4]))
        weight.copy_(kernel.repeat_interleave(4, dim=0))
