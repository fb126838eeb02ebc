"""One step of cross-consistency training as its formulas say it: loops over images, every auxiliary decoder's logits at
once, plain autograd.

What ours is held against: its numbers in tests/test_reference.py, its time and memory in benchmarks/step.py. It calls a
network's backbone and norms, reads the weights of its context module and decoders and its settings, and shares no other
computation of the step with the package. Random numbers are drawn in the package's order, so that on a CPU a seed gives
both the same perturbations.

Shapes: B labelled images, U unlabelled images, C classes of the domain, K auxiliary decoders, D feature channels, h w
feature size, H W image size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = 255
Box = tuple[int, int, int, int]
"""Top, bottom, left, right; ends are exclusive."""


def step_losses(model: Any, batches: Mapping[str, Any], progress: float, *, passes: str = "one") -> dict[str, Tensor]:
    """`<domain>/<term>` -> scalar.

    `passes` through the encoder: `one` for all images of the step, or `two` for each domain, labelled and unlabelled.
    """
    features = encode(model.encoder, batches, passes)
    losses = {}
    for name, batch in batches.items():
        task = model.tasks[name]
        if len(batch.images):
            supervised = supervised_loss(
                task.supervised,
                decode(model.heads[task.head or name].main, features[name, "labelled"]),
                batch.masks,
                progress,
            )
            losses[f"{name}/supervised"] = task.weight * supervised
    for name, batch in batches.items():
        if len(batch.unlabelled) and len(model.heads[model.tasks[name].head or name].auxiliaries):
            losses |= unsupervised_losses(model, name, features[name, "unlabelled"], batch, progress)
    return losses


def encode(encoder: nn.Module, batches: Mapping[str, Any], passes: str) -> dict[tuple[str, str], Tensor]:
    """(B or U, D, h, w) features by domain and kind of image."""
    images = [
        ((name, kind), part)
        for name, batch in batches.items()
        for kind, part in (("labelled", batch.images), ("unlabelled", batch.unlabelled))
    ]
    images.sort(key=lambda item: item[0][1])  # all labelled, then all unlabelled images
    if passes == "two":
        return {
            (name, kind): features_of(encoder, part, [(name, len(part))]) for (name, kind), part in images if len(part)
        }
    joined = features_of(
        encoder, torch.cat([part for _, part in images]), [(name, len(part)) for (name, _), part in images]
    )
    return dict(zip([key for key, _ in images], torch.split(joined, [len(part) for _, part in images]), strict=True))


def features_of(encoder: Any, images: Tensor, parts: list[tuple[str, int]]) -> Tensor:
    """(B, D, h, w): the encoder's; a pyramid pooling is spelled out, as PSPNet has it."""
    context = encoder.context
    if type(context).__name__ != "PyramidPooling":
        found: Tensor = encoder(images, parts)
        return found
    encoder.segments.parts = tuple(parts)
    top = encoder.backbone((images - encoder.normalise.mean) / encoder.normalise.std)[-1]
    pooled = [
        F.interpolate(
            branch(F.adaptive_avg_pool2d(top, bins)), size=top.shape[-2:], mode="bilinear", align_corners=False
        )
        for bins, branch in zip(context.BINS, context.branches, strict=True)
    ]
    fused: Tensor = context.fuse(torch.cat([top, *pooled], dim=1))
    return fused


def unsupervised_losses(model: Any, name: str, z: Tensor, batch: Any, progress: float) -> dict[str, Tensor]:
    """w_u L_u and, with pseudo-labels, w_w L_w."""
    task = model.tasks[name]
    head = model.heads[task.head or name]
    settings, num_classes = task.consistency, len(task.things)
    with torch.no_grad():
        target = torch.softmax(decode(head.main, z), dim=1)  # (U, C, H, W)
    counted = batch.valid & (target.max(dim=1).values >= settings.confidence)
    objects = object_mask(target, batch.valid, task.things, model.encoder.stride)  # (U, h, w)
    perturbed = [perturb(auxiliary.perturbation, z, objects, auxiliary.decoder) for auxiliary in head.auxiliaries]
    kept = [torch.stack([(image != 0).any() for image in maps]) for maps in perturbed]
    logits = torch.stack(
        [decode(auxiliary.decoder, maps) for auxiliary, maps in zip(head.auxiliaries, perturbed, strict=True)]
    )  # (K, U, C, H, W)

    distance = {"mse": squared_distance, "kl": kl_divergence, "js": jensen_shannon}[settings.distance]
    weight = settings.weight / num_classes if settings.weight_unit == "authors" else settings.weight
    ramp = weight_ramp(settings.ramp, progress / settings.ramp_fraction if settings.ramp_fraction else 1.0)
    terms = [
        mean_over_images(distance(own, target), counted & left[:, None, None])
        for own, left in zip(logits, kept, strict=True)
    ]
    losses = {f"{name}/consistency": task.weight * ramp * weight * sum(terms) / len(terms)}
    if batch.pseudo_labels is not None:
        known = batch.pseudo_labels != IGNORE
        terms = [
            mean_over_images(entropy(own, batch.pseudo_labels), known & left[:, None, None])
            for own, left in zip(logits, kept, strict=True)
        ]
        losses[f"{name}/weak"] = task.weight * ramp * settings.weak_weight * sum(terms) / len(terms)
    return losses


def decode(decoder: Any, z: Tensor) -> Tensor:
    """(U, C, H, W) logits of (U, D, h, w) features:

    1x1 convolutions, then sub-pixel convolutions or bilinear upsampling (CCT section 4.1).
    """
    logits = F.conv2d(z, decoder.classify.weight, decoder.classify.bias)
    if type(decoder).__name__ == "BilinearDecoder":
        return F.interpolate(logits, scale_factor=decoder.stride, mode="bilinear", align_corners=False)
    for number, doubling in enumerate(decoder.doublings):
        logits = F.pixel_shuffle(F.conv2d(torch.relu(logits) if number else logits, doubling.weight, doubling.bias), 2)
    return logits


# Losses


def supervised_loss(settings: Any, logits: Tensor, masks: Tensor, progress: float) -> Tensor:
    """Cross-entropy, or its annealed bootstrapped form."""
    valid, values = masks != IGNORE, entropy(logits, masks)
    if settings.loss == "ce":
        return mean_over_images(values, valid)
    low, t = 1 / logits.shape[1], progress / settings.ab_fraction
    threshold = low + (settings.ab_high - low) * (1 - math.exp(-5 * t)) if t < 1 else settings.ab_high
    hard = []
    for own, own_valid in zip(torch.exp(-values.detach()), valid, strict=True):
        chosen = own_valid & (own < threshold)
        hard.append(chosen if chosen.any() or not own_valid.any() else own_valid & (own == own[own_valid].min()))
    return mean_over_images(values, torch.stack(hard))


def entropy(logits: Tensor, ids: Tensor) -> Tensor:
    """(B, H, W) cross-entropy; at ignored pixels that of class 0, which nothing counts."""
    chosen = torch.where(ids == IGNORE, 0, ids).long()
    return -torch.log_softmax(logits, dim=1).gather(1, chosen[:, None])[:, 0]


def squared_distance(logits: Tensor, target: Tensor) -> Tensor:
    return (torch.softmax(logits, dim=1) - target).pow(2).sum(dim=1)


def kl_divergence(logits: Tensor, target: Tensor) -> Tensor:
    return (target * (torch.log(target) - torch.log_softmax(logits, dim=1))).sum(dim=1)


def jensen_shannon(logits: Tensor, target: Tensor) -> Tensor:
    own = torch.softmax(logits, dim=1)
    mixture = (own + target) / 2
    return ((own * torch.log(own / mixture)).sum(dim=1) + (target * torch.log(target / mixture)).sum(dim=1)) / 2


def mean_over_images(values: Tensor, counted: Tensor) -> Tensor:
    """Mean over images of the mean of each over its counted pixels; an image without one gives 0."""
    means = [own[keep].mean() if keep.any() else 0 * own.sum() for own, keep in zip(values, counted, strict=True)]
    return sum(means[1:], means[0]) / len(means)


def weight_ramp(kind: str, t: float) -> float:
    if t >= 1:
        return 1.0
    return {
        "exp": math.exp(-5 * (1 - t) ** 2),
        "linear": t,
        "cosine": (1 - math.cos(math.pi * t)) / 2,
        "log": 1 - math.exp(-5 * t),
        "none": 1.0,
    }[kind]


# Where objects are


def object_mask(target: Tensor, valid: Tensor, things: tuple[bool, ...], stride: int) -> Tensor:
    """(U, h, w) bool: the most probable class of the middle pixel of each position is a thing."""
    classes, middle = target.argmax(dim=1), stride // 2
    rows, columns = classes.shape[1] // stride, classes.shape[2] // stride
    mask = torch.zeros(len(target), rows, columns, dtype=torch.bool)
    for image in range(len(target)):
        for row in range(rows):
            for column in range(columns):
                pixel = (image, row * stride + middle, column * stride + middle)
                mask[image, row, column] = things[int(classes[pixel])] and bool(valid[pixel])
    return mask.to(target.device)


def regions(mask: Tensor) -> list[list[tuple[int, int]]]:
    """The positions of each connected region of an (h, w) mask, by flood fill over edges and corners; in the order of
    their last positions.
    """
    left = {(row, column) for row, column in mask.nonzero().tolist()}
    found = []
    while left:
        region, border = [], [left.pop()]
        while border:
            row, column = border.pop()
            region.append((row, column))
            near = {(row + down, column + right) for down in (-1, 0, 1) for right in (-1, 0, 1)} & left
            left -= near
            border += near
        found.append(sorted(region))
    return sorted(found, key=lambda region: region[-1])


def box(region: list[tuple[int, int]]) -> Box:
    rows, columns = zip(*region, strict=True)
    return min(rows), max(rows) + 1, min(columns), max(columns) + 1


# Perturbations


def perturb(settings: Any, z: Tensor, objects: Tensor, decoder: nn.Module) -> Tensor:
    """The features as the perturbation with these settings changes them."""
    own = objects[:, None].to(z.dtype)  # (U, 1, h, w)
    kind = type(settings).__name__
    if kind == "FeatureNoise":
        return z * settings.amplitude * random_like(z) + z
    if kind == "FeatureDrop":
        return feature_drop(settings, z)
    if kind == "Dropout":
        kept = torch.rand(*z.shape[:2], 1, 1, device=z.device) >= settings.probability
        return z * kept.to(z.dtype) / (1 - settings.probability)
    if kind == "ObjectMask":
        return z * (1 - own)
    if kind == "ContextMask":
        return z * own
    return guided_cutout(settings, z, objects) if kind == "GuidedCutout" else adversarial_noise(settings, z, decoder)


def random_like(z: Tensor) -> Tensor:
    """Uniform between -1 and 1, in steps of 2^-15, of which four are drawn at a time."""
    drawn = torch.empty((z.numel() + 3) // 4, dtype=torch.int64, device=z.device).random_(-(2**63), None)
    return (drawn.view(torch.int16)[: z.numel()].to(z.dtype) / 32768).reshape(z.shape)


def feature_drop(settings: Any, z: Tensor) -> Tensor:
    low, high = (settings.low, settings.high) if settings.mode == "max" else (settings.area_low, settings.area_high)
    drawn = torch.empty(len(z), device=z.device).uniform_(low, high)
    images = []
    for maps, share in zip(z, drawn, strict=True):
        activity = maps.detach().mean(dim=0)  # (h, w)
        if settings.mode == "max":
            dropped = activity > share * activity.max()
        else:
            count = min(int(share * activity.numel()), activity.numel() - 1)
            dropped = torch.zeros(activity.numel(), dtype=torch.bool, device=z.device)
            dropped[activity.flatten().argsort(descending=True)[:count]] = True
            dropped = dropped.view_as(activity)
        images.append(torch.where(dropped, torch.zeros_like(maps), maps))
    return torch.stack(images)


def guided_cutout(settings: Any, z: Tensor, objects: Tensor) -> Tensor:
    found = [(image, region) for image, mask in enumerate(objects) for region in regions(mask)]
    places = torch.rand(len(found), 2, device=z.device)
    keep = torch.ones_like(z)
    for (image, region), (down, across) in zip(found, places, strict=True):
        if len(region) < settings.min_area:
            continue
        top, bottom, left, right = box(region)
        height, width = (max(1, round((end - start) * settings.side)) for start, end in ((top, bottom), (left, right)))
        first_row = top + int(down * (bottom - top - height + 1))
        first_column = left + int(across * (right - left - width + 1))
        keep[image, :, first_row : first_row + height, first_column : first_column + width] = 0
    return z * keep


def adversarial_noise(settings: Any, z: Tensor, decoder: nn.Module) -> Tensor:
    still = z.detach()
    d = random_like(still)
    d = torch.stack([own / own.norm() for own in d]).requires_grad_()
    p = torch.softmax(decode(decoder, still).detach(), dim=1)
    divergence = kl_divergence(decode(decoder, still + settings.xi * d), p).mean()
    g = torch.autograd.grad(divergence, d)[0]
    strength = [settings.eps if settings.eps > 0 else settings.eps_relative * own.norm() for own in still]
    return z + torch.stack([size * own / own.norm() for size, own in zip(strength, g, strict=True)])
