"""The teacher: a running average of a model, which predicts in its place (Tarvainen and Valpola 2017)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from multidomain_cct.model.network import Segmenter, whole_image_logits


class Teacher(nn.Module):
    """A copy of a model's encoder and main decoders, without gradients and always in evaluation mode."""

    def __init__(self, model: Segmenter) -> None:
        super().__init__()
        mains = {name: nn.ModuleDict({"main": model.head(name).main}) for name in model.heads}
        # One deep copy of both, so that what they share stays shared.
        parts = nn.ModuleDict({"encoder": model.encoder, "heads": nn.ModuleDict(mains)})
        copied = copy.deepcopy(parts).requires_grad_(False)
        self.encoder, self.heads = copied["encoder"], copied["heads"]
        self.eval()

    def train(self, mode: bool = True) -> Teacher:
        return super().train(False)

    @torch.no_grad()
    def follow(self, model: Segmenter, *, decay: float) -> None:
        """Move toward the model: floating-point tensors keep the share `decay`, counters are copied."""
        theirs = model.state_dict()
        pairs = [(mine, theirs[name]) for name, mine in self.state_dict().items()]
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        counters = [pair for pair in pairs if not pair[0].is_floating_point()]
        torch._foreach_lerp_([mine for mine, _ in floats], [their for _, their in floats], 1 - decay)
        if counters:
            torch._foreach_copy_([mine for mine, _ in counters], [their for _, their in counters])

    def logits(self, images: Tensor, domain: str, head: str) -> Tensor:
        """(B, C, H, W) logits for (B, 3, H, W) uint8 images."""
        return whole_image_logits(self.encoder, self.heads.get_submodule(f"{head}.main"), images, domain)


def warm_decay(decay: float, updates: int) -> float:
    """The decay at an update, counted from 1: a plain mean at first, so that the random start is soon forgotten."""
    return min(decay, 1 - 1 / (updates + 1))
