"""Image-level labels -> shards of pseudo-labels: a classifier on the shared encoder is trained, the confident part of
its activation maps is written, and compared with true masks where there are any.

Shapes: C classes of the domain, K classified classes, H W image size.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from multidomain_cct.data.batches.bad_images import BadImages, skipped_in
from multidomain_cct.data.batches.loader import TrainingSet, steps
from multidomain_cct.data.batches.views import decode, image_tensor
from multidomain_cct.data.domain import IGNORE, Domain
from multidomain_cct.data.packing.encode import mask_png
from multidomain_cct.data.shards.index import index_path, shard_paths
from multidomain_cct.data.shards.writer import ShardWriter
from multidomain_cct.data.specification import find_domain
from multidomain_cct.errors import UserError, require_choice
from multidomain_cct.evaluation.scoring import confusion_of, mean_iou
from multidomain_cct.files.seeds import seed_from
from multidomain_cct.results.pictures import legend, overlay, with_legend
from multidomain_cct.training.loop import RunFailed
from multidomain_cct.training.recipe import Recipe
from multidomain_cct.training.schedules import build_optimiser, learning_rate, set_learning_rate
from multidomain_cct.weak.cams import Classifier, activation_maps, confident_labels, multilabel_loss, pseudo_labels
from multidomain_cct.weak.image_labels import TaggedImages, background_class, classified, open_tagged

Progress = Callable[[Iterable[Any], int], Iterable[Any]]
"""Wraps an iteration of known length."""
SHEET_ROWS, SHEET_CELL = 10, 260
"""Images on a contact sheet, and the longer side of each picture there in pixels."""


def unwatched(items: Iterable[Any], total: int) -> Iterable[Any]:
    """The progress of an iteration that nobody watches."""
    return items


@dataclass
class Tally:
    """Pixel counts of pseudo-labels over images, against true masks where there are any."""

    num_classes: int
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(256, dtype=np.int64))
    confusion: np.ndarray | None = None
    """(C, C) int64 pixels that have both labels; rows are the truth, columns the pseudo-label."""

    def add(self, ids: Tensor, truth: Tensor | None) -> None:
        self.pixels += np.bincount(ids.cpu().numpy().ravel(), minlength=256)
        if truth is not None:
            both = torch.where(ids == IGNORE, IGNORE, truth)
            added = confusion_of(both, ids, self.num_classes).cpu().numpy()
            self.confusion = added if self.confusion is None else self.confusion + added

    @property
    def labelled(self) -> float:
        """Share of the pixels with a pseudo-label, 0 to 1."""
        return 1 - float(self.pixels[IGNORE]) / max(1, int(self.pixels.sum()))

    @property
    def precision(self) -> float | None:
        """Share of the pseudo-labels that are right, 0 to 1; None without true masks."""
        return None if self.confusion is None else float(np.trace(self.confusion) / max(1, self.confusion.sum()))

    @property
    def miou(self) -> float | None:
        """Mean intersection over union, 0 to 1; unsure pixels count neither as right nor as missed."""
        return None if self.confusion is None else mean_iou(self.confusion)


@dataclass(frozen=True)
class WeakSummary:
    """What was written for one domain."""

    domain: Domain
    split: str
    images: int
    shown: np.ndarray
    """(C,) int64: images that show the class, as their image-level labels say."""
    precision: np.ndarray
    """(C,) average precision of the classifier over these images; nan where all or none show the class, and for the
    background.
    """
    maps: Tally
    """Pseudo-labels straight from the activation maps."""
    refined: Tally
    """Pseudo-labels as they were written, after the random field."""
    shards: tuple[Path, ...]
    sheet: Path

    @property
    def mean_precision(self) -> float:
        """Mean average precision over the classes that have one, 0 to 1; nan when none has."""
        known = self.precision[~np.isnan(self.precision)]
        return float(known.mean()) if len(known) else math.nan


def too_common(images: TaggedImages, most_common: float) -> frozenset[int]:
    """Train ids of the classes that more than this share of the images show."""
    shares = zip(classified(images.domain), images.shares(), strict=True)
    return frozenset(train_id for train_id, share in shares if share > most_common)


def weak_split(train_split: str) -> str:
    """The split of pseudo-label shards that `weaklabels` writes."""
    return f"{train_split}_weak"


def tagged_domains(
    recipe: Recipe, folders: Sequence[Path], names: Sequence[str], *, named_by: str, force: bool = False
) -> list[TaggedImages]:
    """The images with image-level labels of the named domains, or of all that have such labels.

    Raises UserError for domains without image-level labels, for lists that do not fit, and, unless `force`, when
    pseudo-labels exist already.
    """
    for name in names:
        require_choice("--domain", name, recipe.domains)
    chosen = list(dict.fromkeys(names)) or [name for name, choice in recipe.domains.items() if choice.image_labels]
    for name in chosen or recipe.domains:
        if not recipe.domains[name].image_labels:
            raise UserError(
                f"{named_by}: domains.{name}.image_labels is empty. Name a text or JSON list of image-level labels, or "
                "`masks`."
            )
    domains = {name: find_domain(name, folders, named_by=named_by) for name in chosen}
    for name, domain in domains.items():
        split = weak_split(recipe.domains[name].train_split)
        existing = shard_paths(Path(recipe.data.shards) / name, split)
        if existing and not force:
            raise UserError(
                f"{existing[0]} exists. Train with it: domains.{name}.weak_split={split}; or replace it with --force."
            )
        if not classified(domain):
            raise UserError(f"{name} has no class beside its background. Add classes to the domain.")
    crops = Counter(recipe.crop_of(name) for name in domains)
    alone = recipe.encoder.norm == "per_domain" or min(crops.values()) == 1
    if recipe.pseudo_labels.batch == 1 and alone and recipe.encoder.norm != "frozen":
        raise UserError(
            "pseudo_labels.batch is 1, and batch norms would see a single image. Raise it, or set encoder.norm=frozen."
        )
    least_share = recipe.pseudo_labels.least_share
    return [
        open_tagged(domain, recipe.domains[name], recipe.data, least_share=least_share)
        for name, domain in domains.items()
    ]


def train_classifier(
    recipe: Recipe, tagged: Sequence[TaggedImages], *, device: torch.device, progress: Progress = unwatched
) -> tuple[Classifier, list[float]]:
    """The classifier, trained in 32 bits on the images of all these domains, and its loss at each step.

    The recipe's seed decides order, augmentation and initial weights. Raises RunFailed when the loss is not finite.
    """
    settings = recipe.pseudo_labels
    apart = len(tagged) == 1 or recipe.encoder.norm == "per_domain"
    if settings.batch == 1 and apart and recipe.encoder.norm != "frozen":
        raise UserError("pseudo_labels.batch is 1, too few for batch norms. Raise it, or set encoder.norm=frozen.")
    optimisation = replace(recipe.optimiser, name="sgd", lr=settings.lr, schedule="poly", warmup=0)
    streams = [images.streams(recipe.data, recipe.domains[images.domain.name], settings.batch) for images in tagged]
    data = TrainingSet(streams, seed=seed_from(recipe.seed, "weaklabels"), augment=recipe.data.augment)
    targets = {images.domain.name: _targets(images, device) for images in tagged}
    shares = {images.domain.name: images.shares().tolist() for images in tagged}
    crops = [recipe.crop_of(name) for name in shares]
    model = Classifier(recipe.encoder, shares, seed=recipe.seed, crops=crops).to(device).train()
    optimiser = build_optimiser(optimisation, model.encoder.backbone, model)
    losses: list[float] = []
    pin = device.type == "cuda"
    batches = steps(data, 0, settings.steps, workers=recipe.data.workers, prefetch=recipe.data.prefetch, pin_memory=pin)
    bad_images = BadImages(data)
    for step, batch in enumerate(progress(batches, settings.steps)):
        bad_images.count(batch, skipped_in(batch))
        torch.manual_seed(seed_from(recipe.seed, step, "weaklabels"))
        set_learning_rate(optimiser, learning_rate(optimisation, step, settings.steps))
        parts = {name: part.to(device) for name, part in batch.items()}
        logits = model(
            {name: part.unlabelled for name, part in parts.items()}, {name: part.valid for name, part in parts.items()}
        )
        loss = torch.zeros((), device=device)
        for name, part in parts.items():
            loss = loss + multilabel_loss(logits[name], torch.stack([targets[name][key] for key in part.keys]))
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise RunFailed(f"step {step + 1}: the classifier's loss is {losses[-1]}. Lower pseudo_labels.lr.")
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
    return model.eval(), losses


def _targets(images: TaggedImages, device: torch.device) -> dict[str, Tensor]:
    """(K,) zeros and ones by key."""
    ids = classified(images.domain)
    return {
        key: torch.tensor([float(train_id in shown) for train_id in ids], device=device)
        for key, shown in images.classes.items()
    }


def write_pseudo_labels(
    recipe: Recipe, images: TaggedImages, model: Classifier, *, progress: Progress = unwatched
) -> WeakSummary:
    """Write a labelled sample for every image with image-level labels, and a contact sheet.

    Everything is written to a temporary folder first: earlier shards stay until the new ones are whole.
    """
    domain, split = images.domain, weak_split(recipe.domains[images.domain.name].train_split)
    folder = Path(recipe.data.shards) / domain.name
    temporary, sheet = folder / f".{split}.tmp", f"{domain.name}-{split}.png"
    left_out = too_common(images, recipe.pseudo_labels.most_common)
    shutil.rmtree(temporary, ignore_errors=True)
    maps, refined = Tally(domain.num_classes), Tally(domain.num_classes)
    scores: list[np.ndarray] = []
    rows: list[list[Image.Image]] = []
    settings = asdict(recipe.pseudo_labels)
    notes = {"total": len(images.listed), "pseudo_labels": settings, "recipe": recipe.name, "seed": recipe.seed}
    try:
        with ShardWriter(temporary, split, note=lambda: notes) as writer:
            for key in progress(images.listed, len(images.listed)):
                made = _pseudo_labelled(recipe, images, key, model, left_out=left_out)
                maps.add(made.from_maps, made.truth)
                refined.add(made.ids, made.truth)
                scores.append(made.logits)
                if len(rows) < SHEET_ROWS:
                    rows.append(_sheet_row(made, domain))
                mask = mask_png(Image.fromarray(made.ids.cpu().numpy()))
                if writer.is_full(len(made.stored) + len(mask)):
                    writer.publish()
                names = [domain.classes[train_id].name for train_id in sorted(images.classes[key])]
                writer.write(key, image=made.stored, mask=mask, meta=json.dumps({"image_labels": names}).encode())
        _contact_sheet(rows, domain, refined.pixels).save(temporary / sheet)
        shards = _move_into_place(temporary, folder, split)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    ids = list(classified(domain))
    truth = np.array([[train_id in images.classes[key] for train_id in ids] for key in images.listed])
    shown, precision = np.zeros(domain.num_classes, dtype=np.int64), np.full(domain.num_classes, np.nan)
    shown[ids] = truth.sum(axis=0)
    precision[ids] = average_precision(np.stack(scores), truth)
    return WeakSummary(domain, split, len(images.listed), shown, precision, maps, refined, shards, folder / sheet)


@dataclass(frozen=True)
class _Made:
    """One image and its labels, (H, W) uint8 train ids."""

    stored: bytes
    picture: Image.Image
    logits: np.ndarray
    """(K,)"""
    from_maps: Tensor
    ids: Tensor
    truth: Tensor | None


def _pseudo_labelled(
    recipe: Recipe, images: TaggedImages, key: str, model: Classifier, *, left_out: frozenset[int]
) -> _Made:
    domain, settings, device = images.domain, recipe.pseudo_labels, model.encoder.normalise.mean.device
    source, number = images.samples[key]
    record = images.sources[source].read(number)
    picture, mask = decode(record, domain)
    pixels = image_tensor(picture).to(device)
    present = sorted(images.classes[key] - left_out)
    columns = [classified(domain).index(train_id) for train_id in present]
    activations, logits = activation_maps(model, pixels, domain.name, present=columns, scales=settings.scales)
    # A class without a map would pass for background; in its images, pixels of no other class are unsure.
    background = None if images.classes[key] & left_out else background_class(domain)
    truth = None
    if mask is not None:
        truth = torch.from_numpy(np.array(mask.resize(picture.size, Image.Resampling.NEAREST))).to(device)
    return _Made(
        stored=record.image,
        picture=picture,
        logits=logits.cpu().numpy(),
        from_maps=confident_labels(activations, present, settings, background=background),
        ids=pseudo_labels(activations, pixels, present, settings, background=background),
        truth=truth,
    )


def _move_into_place(temporary: Path, folder: Path, split: str) -> tuple[Path, ...]:
    """Replace the split's shards and contact sheet.

    Old shards are removed first: readers refuse an index that counts missing shards, but not a mixture of two sets.
    """
    for path in shard_paths(folder, split):
        path.unlink()
        index_path(path).unlink(missing_ok=True)
    for picture in temporary.glob("*.png"):
        os.replace(picture, folder / picture.name)
    moved = []
    for path in shard_paths(temporary, split):
        os.replace(index_path(path), folder / index_path(path).name)
        os.replace(path, folder / path.name)
        moved.append(folder / path.name)
    return tuple(moved)


def average_precision(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(K,) average precision, 0 to 1, of (n, K) scores against (n, K) bool truth: the mean of the precision at the rank
    of each positive.

    nan for a class with no positive or no negative. Of equal scores the positive ranks last.
    """
    precision = np.full(truth.shape[1], np.nan)
    for column, (score, positive) in enumerate(zip(scores.T, truth.T, strict=True)):
        if positive.any() and not positive.all():
            hits = positive[np.lexsort((positive, -score))]
            precision[column] = (np.cumsum(hits) / np.arange(1, len(hits) + 1))[hits].mean()
    return precision


def _sheet_row(made: _Made, domain: Domain) -> list[Image.Image]:
    """The image, its labels from the maps, after the random field, and the true ones if there are any."""
    labels = [made.from_maps, made.ids, *([] if made.truth is None else [made.truth])]
    return [made.picture, *(overlay(made.picture, ids.cpu().numpy(), domain, opacity=0.65) for ids in labels)]


def _contact_sheet(rows: Sequence[Sequence[Image.Image]], domain: Domain, pixels: np.ndarray) -> Image.Image:
    """The rows under each other, a title over each column, and a legend of the train ids that have `pixels`."""
    titles = ("image", "activation maps", "pseudo-labels", "truth")[: max(len(row) for row in rows)]
    cell, head = SHEET_CELL, 24
    sheet = Image.new("RGB", (cell * len(titles), head + cell * len(rows)), "white")
    for column, title in enumerate(titles):
        ImageDraw.Draw(sheet).text((cell * column + 3, head // 2), title, fill="black", font_size=14, anchor="lm")
    for top, row in enumerate(rows):
        for column, picture in enumerate(row):
            sheet.paste(ImageOps.contain(picture, (cell - 6, cell - 6)), (cell * column + 3, head + cell * top))
    present = np.flatnonzero(pixels[: domain.num_classes]).tolist()
    return with_legend(sheet, legend(domain, present, width=sheet.width))


def loss_ends(losses: Sequence[float]) -> tuple[float, float]:
    """The mean loss over the first and over the last tenth of the steps."""
    tenth = max(1, len(losses) // 10)
    return float(np.mean(losses[:tenth])), float(np.mean(losses[-tenth:]))
