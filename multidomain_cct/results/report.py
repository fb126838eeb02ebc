"""One HTML page about one or several runs: scores, curves, pictures, and how each run was made.

It opens without a network.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import mean, median
from typing import Any

import jinja2
import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from multidomain_cct.data.batches.views import decode
from multidomain_cct.data.domain import IGNORE, Domain
from multidomain_cct.data.shards.reader import Shards
from multidomain_cct.data.specification import read_domain
from multidomain_cct.errors import UserError
from multidomain_cct.files.durable import replace_text
from multidomain_cct.files.printable import printable
from multidomain_cct.results.pictures import error_map, indexed
from multidomain_cct.results.records import recorded_environment, recorded_metrics, scores_by_class
from multidomain_cct.results.trained_run import TrainedRun
from multidomain_cct.training.recipe import Recipe, read_run_recipe

RUN_COLORS = ("#2f7fd1", "#e07b1a", "#2f9e62", "#c24a97", "#8468d0", "#a38a00", "#1a9aa8", "#d0525a")
"""One per run, legible on white and on black; they repeat."""
PANEL_WIDTH = 320
_CURVE_POINTS = 400
_INK = "#0b0c0d"
"""Drawn by matplotlib, then replaced by the page's own text colour."""
_INKED = ("text.color", "xtick.color", "ytick.color", "axes.edgecolor", "axes.labelcolor", "grid.color")
_CHART_STYLE: dict[str, Any] = dict.fromkeys(_INKED, _INK) | {
    "font.size": 8.5,
    "font.sans-serif": ["DejaVu Sans"],
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 3,
}


@dataclass(frozen=True)
class RunFacts:
    """A run's folder without its checkpoints."""

    folder: Path
    label: str
    """Name on the page; differs between runs."""
    color: str
    recipe: Recipe
    domains: dict[str, Domain]
    metrics: list[dict[str, Any]]
    environment: dict[str, Any]

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric; a value that was not finite is nan."""
        points = [(line["step"], line[key]) for line in self.metrics if key in line]
        return [step for step, _ in points], [math.nan if value is None else float(value) for _, value in points]

    @property
    def steps(self) -> int:
        """Optimiser steps that were logged."""
        return max((line["step"] for line in self.metrics), default=0)

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return [line for line in self.metrics if line.get("val/mean_miou") is not None]

    @property
    def best(self) -> dict[str, Any]:
        """The evaluation at which the checkpoint `best` was saved: the first with the highest mean."""
        return max(self.evaluations, key=lambda line: line["val/mean_miou"])

    def val_shards(self, domain: str) -> Shards:
        """The shards of the domain's val split. Raises UserError when there are none."""
        split = self.recipe.domains[domain].val_split
        if not split:
            raise UserError("the recipe names no val split")
        return Shards.open(Path(self.recipe.data.shards) / domain, split)


@dataclass(frozen=True)
class Panel:
    """One val image beside its truth and each run's prediction."""

    key: str
    image: Image.Image
    truth: np.ndarray
    """(h, w) uint8 train ids at the size of the pictures."""
    pictures: list[tuple[str, str, RunFacts | None]]
    """Caption and data URI of each picture, and the run that predicted it."""


def write_report(
    runs: Sequence[Path], out: Path | None = None, *, device: torch.device | None = None, panels: int = 4
) -> Path:
    """Write the page and return its path: `out`, or report.html in the run's folder, for several runs beside the first
    one's folder.

    Several runs share their charts, one colour each. Pictures need the val shards and the last checkpoint; where they
    are missing, the page has a remark. Raises UserError for a folder that is not a run.
    """
    facts = _read_runs(list(dict.fromkeys(runs)))
    out = out or (facts[0].folder if len(facts) == 1 else facts[0].folder.parent) / "report.html"
    out = out / "report.html" if out.is_dir() else out
    specs: dict[str, Domain] = {}
    for run in facts:
        specs = run.domains | specs
    names = dict.fromkeys(name for run in facts for name in run.domains)
    pictures, remarks = _panels(facts, {name: specs[name] for name in names}, device, panels)
    sections = [
        _domain_section(name, specs[name], facts) | {"panels": pictures.get(name, []), "remarks": remarks[name]}
        for name in names
    ]
    several = [run for run in facts if run.evaluations and len(run.domains) > 1]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"shown": printable, "percent": _percent}
    page = environment.get_template("report.html.jinja").render(
        runs=facts,
        sections=sections,
        means=[{"run": run, "last": run.evaluations[-1], "best": run.best} for run in several],
        speeds=[_speed(run) for run in facts],
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_text(out, page)
    return out


def last_scores(run: Path) -> dict[str, float]:
    """The newest val mIoU of each domain, 0 to 1, and their mean; empty before the first evaluation."""
    (facts,) = _read_runs([run])
    newest = facts.evaluations[-1] if facts.evaluations else {}
    scores = {name: newest[f"val/{name}/miou"] for name in facts.domains if f"val/{name}/miou" in newest}
    return scores | ({"mean": newest["val/mean_miou"]} if len(scores) > 1 else {})


def _read_runs(folders: Sequence[Path]) -> list[RunFacts]:
    for folder in folders:
        if not (folder / "recipe.yaml").is_file():
            raise UserError(f"{folder}: this is not a run's folder (it has no recipe.yaml).")
    names = [folder.resolve().name for folder in folders]
    return [
        RunFacts(
            folder=folder,
            label=name if names.count(name) == 1 else str(folder),
            color=color,
            recipe=(recipe := read_run_recipe(folder)),
            domains={domain: read_domain(folder / "domains" / f"{domain}.yaml") for domain in recipe.domains},
            metrics=recorded_metrics(folder),
            environment=recorded_environment(folder),
        )
        for folder, name, color in zip(folders, names, cycle(RUN_COLORS), strict=False)
    ]


def _domain_section(name: str, spec: Domain, facts: Sequence[RunFacts]) -> dict[str, Any]:
    """Scores, curves and class bars of one domain."""
    runs = [run for run in facts if name in run.domains]
    rows = []
    for run in runs:
        try:
            images = len(run.val_shards(name))
        except (UserError, FileNotFoundError):
            images = None
        lines = [line for line in run.evaluations if f"val/{name}/miou" in line]
        row: dict[str, Any] = {
            "run": run,
            "choice": run.recipe.domains[name],
            "images": images,
            "last": None,
            "best": None,
        }
        if lines:
            last = _scores(lines[-1], name)
            row |= {"last": last, "best": _scores(run.best, name), "protocol": _protocol(run, name, last)}
        rows.append(row)
    scored = [row for row in rows if row["last"] is not None]
    labels = dict.fromkeys(label.name for run in runs for label in run.domains[name].classes) if scored else ()
    bars = [
        {"name": label, "values": [(row["run"], row["last"]["iou"].get(label)) for row in scored]} for label in labels
    ]
    return {"name": name, "spec": spec, "rows": rows, "charts": list(_charts(name, runs)), "bars": bars}


def _scores(line: dict[str, Any], name: str) -> dict[str, Any]:
    return {
        "step": line["step"],
        "miou": line.get(f"val/{name}/miou"),
        "accuracy": line.get(f"val/{name}/pixel_accuracy"),
        "iou": scores_by_class(line, name),
    }


def _protocol(run: RunFacts, name: str, score: Mapping[str, Any]) -> str:
    """How the numbers of the last evaluation were made, in one line."""
    counted = sum(value is not None for value in score["iou"].values())
    split = run.recipe.domains[name].val_split
    return (
        f"{run.label}, step {score['step']}: {split} split at label resolution, {run.recipe.evaluation.described}, "
        f"mean over {counted} of {len(score['iou'])} classes."
    )


def _speed(run: RunFacts) -> dict[str, Any]:
    rates, peaks, waits = (
        [value for value in run.series(f"sys/{key}")[1] if not math.isnan(value)]
        for key in ("images_per_s", "peak_mib", "data_wait_fraction")
    )
    return {
        "run": run,
        "images_per_s": median(rates) if rates else None,
        "peak_mib": max(peaks, default=None),
        "data_wait": mean(waits) if waits else None,
    }


def _charts(name: str, runs: Sequence[RunFacts]) -> Iterator[tuple[str, str]]:
    """(title, SVG) of each loss term and of the val mIoU."""
    prefix = f"train/{name}/"
    for key in dict.fromkeys(key for run in runs for line in run.metrics for key in line if key.startswith(prefix)):
        yield f"{key.removeprefix(prefix)} loss", _chart(key, runs)
    if any(f"val/{name}/miou" in line for run in runs for line in run.metrics):
        yield "val mIoU, %", _chart(f"val/{name}/miou", runs, factor=100)


def _chart(key: str, runs: Sequence[RunFacts], *, factor: float = 1) -> str:
    """An inline SVG of one metric over the steps, a line per run."""
    with matplotlib.rc_context(_CHART_STYLE):
        figure = Figure(figsize=(3.5, 2.1), layout="constrained")
        axes = figure.add_subplot()
        for run in runs:
            steps, values = _thinned(*run.series(key))
            marker = "o" if len(steps) < 25 else ""
            axes.plot(steps, np.array(values) * factor, color=run.color, marker=marker, clip_on=False)
        end = max(max(run.steps, run.recipe.training.steps) for run in runs)
        axes.set(xlabel="step", xlim=(0, end), ylim=(0, 1.05 * max(axes.get_ylim()[1], 1e-6)))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(alpha=0.15, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        buffer = io.StringIO()
        # Without a date and names of software, equal runs give equal pages.
        none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=none)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace(_INK, "currentColor").replace("'DejaVu Sans'", "system-ui")


def _thinned(*series: Sequence[float]) -> list[list[float]]:
    """At most _CURVE_POINTS points of each; where there are more, each is the mean of its neighbours."""
    parts = min(len(series[0]), _CURVE_POINTS)
    return [[float(part.mean()) for part in np.array_split(values, parts)] if parts else [] for values in series]


def _panels(
    facts: Sequence[RunFacts], specs: Mapping[str, Domain], device: torch.device | None, count: int
) -> tuple[dict[str, list[Panel]], dict[str, list[str]]]:
    """Panels by domain, the same images for every run, and a remark wherever pictures are missing."""
    panels: dict[str, list[Panel]] = {}
    remarks: dict[str, list[str]] = {name: [] for name in specs}

    def same_classes(run: RunFacts, name: str) -> bool:
        return run.domains[name].class_fingerprint == specs[name].class_fingerprint

    for name, spec in specs.items():
        for run in facts:
            if name in run.domains and name not in panels and same_classes(run, name):
                try:
                    panels[name] = _chosen_images(run.val_shards(name), spec, count)
                except (UserError, FileNotFoundError) as error:
                    remarks[name].append(f"No pictures from {run.label}: {error}")
    for run in facts:
        wanted = [name for name in panels if name in run.domains]
        try:
            trained = TrainedRun.load(run.folder, device=device)
        except (UserError, FileNotFoundError) as error:
            for name in wanted:
                remarks[name].append(f"No predictions of {run.label}: {error}")
            continue
        for name in wanted:
            if not same_classes(run, name):
                remarks[name].append(f"No predictions of {run.label}: its {name} has other classes.")
                continue
            for panel in panels[name]:
                panel.pictures.extend(_answer(run, panel, trained.predict(panel.image, name).ids, specs[name]))
    return panels, remarks


def _chosen_images(shards: Shards, domain: Domain, count: int) -> list[Panel]:
    """Images spread evenly over the split's keys in alphabetical order: every run and every packing shows the same."""
    by_key = sorted(range(len(shards)), key=lambda number: shards.keys[number])
    panels = []
    for position in sorted({round(each) for each in np.linspace(0, len(by_key) - 1, min(count, len(by_key)))}):
        record = shards.read(by_key[position])
        image, mask = decode(record, domain)
        if mask is None:
            raise UserError(f"{record.shard}: key {record.key!r} has no mask.")
        size = (min(PANEL_WIDTH, image.width), max(1, round(image.height * min(1, PANEL_WIDTH / image.width))))
        truth = np.asarray(mask.resize(size, Image.Resampling.NEAREST))
        photo = _data_uri(image.resize(size, Image.Resampling.LANCZOS), "JPEG")
        labels = _data_uri(indexed(truth, domain), "PNG")
        panels.append(Panel(record.key, image, truth, [("image", photo, None), ("truth", labels, None)]))
    return panels


def _answer(run: RunFacts, panel: Panel, ids: np.ndarray, domain: Domain) -> list[tuple[str, str, RunFacts | None]]:
    """The run's prediction and its errors, at the size of the panel."""
    small = np.asarray(Image.fromarray(ids).resize(panel.truth.shape[::-1], Image.Resampling.NEAREST))
    scored = panel.truth != IGNORE
    wrong = float((small != panel.truth)[scored].mean()) if scored.any() else 0.0
    prediction, errors = _data_uri(indexed(small, domain), "PNG"), _data_uri(error_map(panel.truth, small), "PNG")
    return [("prediction", prediction, run), (f"{100 * wrong:.1f} % wrong", errors, run)]


def _data_uri(picture: Image.Image, kind: str) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind, quality=85, optimize=True)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"
