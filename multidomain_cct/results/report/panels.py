"""Val images beside their truth and what each run predicts: evenly spread ones, and the worst and the best."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np
import torch
from PIL import Image

from multidomain_cct.data.batches.views import decode
from multidomain_cct.data.domain import IGNORE, Domain
from multidomain_cct.data.images import load_image
from multidomain_cct.data.shards.keys import unescape_key
from multidomain_cct.data.shards.reader import Shards
from multidomain_cct.errors import UserError
from multidomain_cct.results.pictures import error_map, indexed, overlay
from multidomain_cct.results.report.facts import RunFacts
from multidomain_cct.results.trained_run import TrainedRun

PANEL_WIDTH = 320
CANDIDATES = 16
"""Evenly spread images among which the worst and the best are looked for."""
EXTREMES = 2
"""How many worst and how many best images are shown."""
_UNREADABLE = (UserError, FileNotFoundError)


@dataclass(frozen=True)
class Picture:
    """One picture of a panel."""

    caption: str
    uri: str
    run: RunFacts | None = None
    """The run that predicted it."""
    has_ids: bool = True
    """Whether its pixels are classes, which must not be smoothed."""


@dataclass(eq=False)
class Panel:
    """One val image."""

    name: str
    stored: bytes
    """The image as it is in its shard."""
    truth: np.ndarray
    """(h, w) uint8 train ids at the size of the pictures."""
    even: bool
    """Whether it is one of the evenly spread ones."""
    pictures: list[Picture] = field(default_factory=list)
    wrong: float | None = None
    """Share of the labelled pixels that the first run gets wrong, 0 to 1."""


@dataclass
class DomainPanels:
    """The panels of one domain, and remarks about what is missing."""

    candidates: list[Panel] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def extremes(self) -> tuple[list[Panel], list[Panel]]:
        """The worst and the best images; none is both."""
        ranked = sorted((panel for panel in self.candidates if panel.wrong is not None), key=lambda panel: -panel.wrong)  # type: ignore[operator]
        each = min(EXTREMES, len(ranked) // 2)
        return ranked[:each], ranked[len(ranked) - each :][::-1]

    @property
    def groups(self) -> list[tuple[str, list[Panel]]]:
        """What is shown, each image once, under a title."""
        worst, best = self.extremes
        even = [panel for panel in self.candidates if panel.even and panel not in worst + best]
        titles = (f"Worst of {len(self.candidates)}", f"Best of {len(self.candidates)}", "Evenly spread")
        return [group for group in zip(titles, (worst, best, even), strict=True) if group[1]]


def panels(
    specs: Mapping[str, Domain], runs: Sequence[RunFacts], device: torch.device | None, count: int
) -> dict[str, DomainPanels]:
    """For each domain `count` images, the same for every run, with the worst and the best of the first run that can
    predict, and a remark wherever pictures are missing. The domains' colours are those of the pictures.
    """
    made = {name: DomainPanels() for name in specs}
    for run, (name, spec) in product(runs, specs.items()):
        if _has_classes(run, name, spec) and not made[name].candidates:
            try:
                made[name].candidates = _candidates(run.val_shards(name), spec, count)
            except _UNREADABLE as error:
                made[name].remarks.append(f"No pictures from {run.label}: {error}")
    for run in runs:
        pictured = [name for name in run.domains if made[name].candidates]
        try:
            trained = TrainedRun.load(run.folder, device=device)
        except _UNREADABLE as error:
            for name in pictured:
                made[name].remarks.append(f"No predictions of {run.label}: {error}")
            continue
        for name in pictured:
            if _has_classes(run, name, specs[name]):
                _predict(made[name], run, trained, specs[name])
            else:
                made[name].remarks.append(f"No predictions of {run.label}: its {name} has other classes.")
    return made


def _has_classes(run: RunFacts, name: str, spec: Domain) -> bool:
    return name in run.domains and run.domains[name].class_fingerprint == spec.class_fingerprint


def _candidates(shards: Shards, domain: Domain, count: int) -> list[Panel]:
    """Images spread evenly over the split's keys in alphabetical order: every run and every packing shows the same."""
    by_key = sorted(range(len(shards)), key=lambda number: shards.keys[number])
    even = _spread(len(by_key), count)
    made = []
    for position in sorted(even | _spread(len(by_key), CANDIDATES)):
        record = shards.read(by_key[position])
        image, mask = decode(record, domain)
        if mask is None:
            raise UserError(f"{record.where} has no mask.")
        size = (min(PANEL_WIDTH, image.width), max(1, round(image.height * min(1, PANEL_WIDTH / image.width))))
        truth = np.asarray(mask.resize(size, Image.Resampling.NEAREST))
        photo = _picture("image", image.resize(size, Image.Resampling.LANCZOS), "JPEG")
        labels = _picture("truth", indexed(truth, domain), "PNG")
        made.append(Panel(unescape_key(record.key), record.image, truth, position in even, [photo, labels]))
    return made


def _spread(length: int, count: int) -> set[int]:
    return {round(each) for each in np.linspace(0, length - 1, min(count, length))}


def _predict(made: DomainPanels, run: RunFacts, trained: TrainedRun, domain: Domain) -> None:
    """Add the run's predictions, alone and over the image, and its errors, at the size of the panels.

    The first run predicts all candidates, the others what is shown.
    """
    shown = [panel for _, group in made.groups for panel in group] if any(made.extremes) else made.candidates
    for panel in shown:
        image = load_image(panel.stored, panel.name)
        size = (panel.truth.shape[1], panel.truth.shape[0])
        # Between two classes lies no third one, so ids are never mixed.
        small = Image.fromarray(trained.predict(image, domain.name).ids).resize(size, Image.Resampling.NEAREST)
        ids, scored = np.asarray(small), panel.truth != IGNORE
        wrong = float((ids != panel.truth)[scored].mean()) if scored.any() else 0.0
        panel.wrong = wrong if panel.wrong is None else panel.wrong
        over = overlay(image.resize(size, Image.Resampling.LANCZOS), ids, domain)
        panel.pictures += [
            _picture("prediction", indexed(ids, domain), "PNG", run),
            _picture("overlay", over, "JPEG", run),
            _picture(f"{100 * wrong:.1f} % wrong", error_map(panel.truth, ids), "PNG", run),
        ]


def _picture(caption: str, picture: Image.Image, kind: str, run: RunFacts | None = None) -> Picture:
    """A JPEG, or a PNG of classes; in a palette image id 255 is transparent."""
    buffer = io.BytesIO()
    clear = {"transparency": IGNORE} if picture.mode == "P" else {}
    picture.save(buffer, kind, quality=85, optimize=True, **clear)
    uri = f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
    return Picture(caption, uri, run, has_ids=kind == "PNG")
