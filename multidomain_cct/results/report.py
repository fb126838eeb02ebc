"""One HTML page about one or several runs: scores, curves, pictures, and how each run was made.

It opens without a network.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from multidomain_cct.results.trained_run import TrainedRun
from multidomain_cct.training.recipe import Recipe, read_run_recipe
from multidomain_cct.training.runlog import read_metrics

RUN_COLORS = ("#2f7fd1", "#e07b1a", "#2f9e62", "#c24a97", "#8468d0", "#a38a00", "#1a9aa8", "#d0525a")
"""One per run, legible on white and on black; they repeat."""
PANEL_WIDTH = 320
_CURVE_POINTS = 400
_INK = "#0b0c0d"
"""Drawn by matplotlib, then replaced by the page's own text colour."""


@dataclass(frozen=True)
class RunFacts:
    """What a run's folder tells, without its checkpoints."""

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
        return [step for step, _ in points], [float("nan") if value is None else float(value) for _, value in points]

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


@dataclass(frozen=True)
class Panel:
    """One val image beside its truth and what each run says of it."""

    key: str
    image: Image.Image
    truth: np.ndarray
    """(h, w) uint8 train ids at the size of the pictures."""
    pictures: list[tuple[str, str, RunFacts | None]]
    """Caption and data URI of each picture, and the run whose it is."""


def write_report(
    runs: Sequence[Path], out: Path | None = None, *, device: torch.device | None = None, panels: int = 4
) -> Path:
    """Write the page and return its path: `out`, or report.html in the run's folder, for several runs beside the first
    one's folder.

    Several runs share their charts, one colour each. Pictures need the val shards and the last checkpoint; a line on
    the page says so where they are missing. `device` None is the GPU when there is one. Raises UserError for a folder
    that is not a run.
    """
    facts = _read_runs(list(dict.fromkeys(runs)))
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out = out or (facts[0].folder if len(facts) == 1 else facts[0].folder.parent) / "report.html"
    out = out / "report.html" if out.is_dir() else out
    specs = {
        name: next(run.domains[name] for run in facts if name in run.domains) for each in facts for name in each.domains
    }
    pictures, remarks = _panels(facts, specs, device, panels)
    sections = [
        _domain_section(name, spec, facts) | {"panels": pictures.get(name, []), "remarks": remarks[name]}
        for name, spec in specs.items()
    ]
    means = [
        {"run": run, "last": run.evaluations[-1], "best": run.best}
        for run in facts
        if run.evaluations and len(run.domains) > 1
    ]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"shown": printable, "percent": _percent}
    page = environment.get_template("report.html.jinja").render(
        runs=facts, sections=sections, means=means, speeds=[_speed(run) for run in facts]
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
    facts, names = [], [folder.resolve().name for folder in folders]
    for number, (folder, name) in enumerate(zip(folders, names, strict=True)):
        recipe, metrics = read_run_recipe(folder), folder / "metrics.jsonl"
        facts.append(
            RunFacts(
                folder=folder,
                label=name if names.count(name) == 1 else str(folder),
                color=RUN_COLORS[number % len(RUN_COLORS)],
                recipe=recipe,
                domains={domain: read_domain(folder / "domains" / f"{domain}.yaml") for domain in recipe.domains},
                metrics=[line for line in read_metrics(metrics) if isinstance(line, dict) and "step" in line]
                if metrics.is_file()
                else [],
                environment=_environment(folder / "env.json"),
            )
        )
    return facts


def _environment(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError):
        return {}


def _domain_section(name: str, spec: Domain, facts: Sequence[RunFacts]) -> dict[str, Any]:
    """Scores, curves and class bars of one domain."""
    own = [run for run in facts if name in run.domains]
    rows = []
    for run in own:
        row: dict[str, Any] = {
            "run": run,
            "choice": run.recipe.domains[name],
            "images": _num_images(run, name),
            "last": None,
            "best": None,
        }
        lines = [line for line in run.evaluations if f"val/{name}/miou" in line]
        if lines:
            last = _scores(lines[-1], name)
            row |= {"last": last, "best": _scores(run.best, name), "protocol": _protocol(run, name, last)}
        rows.append(row)
    scored = [row for row in rows if row["last"] is not None]
    names = dict.fromkeys(label.name for run in own for label in run.domains[name].classes)
    bars = [
        {"name": label, "values": [(row["run"], row["last"]["iou"].get(label)) for row in scored]} for label in names
    ]
    return {
        "name": name,
        "spec": spec,
        "rows": rows,
        "charts": list(_charts(name, own)),
        "bars": bars if scored else [],
    }


def _scores(line: Mapping[str, Any], name: str) -> dict[str, Any]:
    prefix = f"val/{name}/iou/"
    iou = {key.removeprefix(prefix): value for key, value in line.items() if key.startswith(prefix)}
    return {
        "step": line["step"],
        "miou": line.get(f"val/{name}/miou"),
        "accuracy": line.get(f"val/{name}/pixel_accuracy"),
        "iou": iou,
    }


def _protocol(run: RunFacts, name: str, score: Mapping[str, Any]) -> str:
    """How the numbers of the last evaluation were made, in one line."""
    settings = run.recipe.evaluation
    view = "whole image" if settings.window is None else f"window {settings.window[0]}x{settings.window[1]}"
    view += (f", scales {settings.scales}" if settings.scales != [1.0] else "") + (", flip" if settings.flip else "")
    counted = sum(value is not None for value in score["iou"].values())
    split = run.recipe.domains[name].val_split
    return (
        f"{run.label}, step {score['step']}: {split} split at label resolution, {view}, mean over {counted} of "
        f"{len(score['iou'])} classes."
    )


def _speed(run: RunFacts) -> dict[str, Any]:
    def values(key: str) -> list[float]:
        return [value for value in run.series(f"sys/{key}")[1] if value == value]

    rates, peaks, waits = values("images_per_s"), values("peak_mib"), values("data_wait_fraction")
    return {
        "run": run,
        "images_per_s": median(rates) if rates else None,
        "peak_mib": max(peaks, default=None),
        "data_wait": mean(waits) if waits else None,
    }


def _num_images(run: RunFacts, name: str) -> int | None:
    try:
        return len(_val_shards(run, name))
    except (UserError, FileNotFoundError):
        return None


def _val_shards(run: RunFacts, name: str) -> Shards:
    split = run.recipe.domains[name].val_split
    if not split:
        raise UserError("the recipe names no val split")
    return Shards.open(Path(run.recipe.data.shards) / name, split)


def _charts(name: str, runs: Sequence[RunFacts]) -> Iterator[tuple[str, str]]:
    """(title, SVG) of each loss term and of the val mIoU."""
    prefix = f"train/{name}/"
    for key in dict.fromkeys(key for run in runs for line in run.metrics for key in line if key.startswith(prefix)):
        yield f"{key.removeprefix(prefix)} loss", _chart(key, runs)
    if any(f"val/{name}/miou" in line for run in runs for line in run.metrics):
        yield "val mIoU, %", _chart(f"val/{name}/miou", runs, factor=100)


def _chart(key: str, runs: Sequence[RunFacts], *, factor: float = 1) -> str:
    """An inline SVG of one metric over the steps, a line per run."""
    style = {
        "font.size": 8.5,
        "font.sans-serif": ["DejaVu Sans"],
        "svg.fonttype": "none",
        "svg.hashsalt": "report",
        "axes.linewidth": 0.6,
    }
    style |= {f"{part}.color": _INK for part in ("text", "xtick", "ytick")} | {
        "axes.edgecolor": _INK,
        "axes.labelcolor": _INK,
        "grid.color": _INK,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(3.5, 2.1), layout="constrained")
        axes = figure.add_subplot()
        for run in runs:
            steps, values = _thinned(*run.series(key))
            axes.plot(
                steps,
                np.array(values) * factor,
                color=run.color,
                linewidth=1.4,
                marker="o" if len(steps) < 25 else "",
                markersize=3,
                clip_on=False,
            )
        end = max(max(run.steps, run.recipe.training.steps) for run in runs)
        axes.set(xlabel="step", xlim=(0, end), ylim=(0, 1.05 * max(axes.get_ylim()[1], 1e-6)))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(alpha=0.15, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        buffer = io.StringIO()
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace(_INK, "currentColor").replace("'DejaVu Sans'", "system-ui")


def _thinned(*series: Sequence[float]) -> list[list[float]]:
    """At most _CURVE_POINTS points of each; where there are more, each is the mean of its neighbours."""
    parts = min(len(series[0]), _CURVE_POINTS)
    return [[float(part.mean()) for part in np.array_split(values, parts)] if parts else [] for values in series]


def _panels(
    facts: Sequence[RunFacts], specs: Mapping[str, Domain], device: torch.device, count: int
) -> tuple[dict[str, list[Panel]], dict[str, list[str]]]:
    """Panels by domain, the same images for every run, and what has to be said where there are none."""
    panels: dict[str, list[Panel]] = {}
    remarks: dict[str, list[str]] = {name: [] for name in specs}
    for name, spec in specs.items():
        for run in facts:
            if (
                name in run.domains
                and name not in panels
                and run.domains[name].class_fingerprint == spec.class_fingerprint
            ):
                try:
                    panels[name] = _chosen_images(_val_shards(run, name), spec, count)
                except (UserError, FileNotFoundError) as error:
                    remarks[name].append(f"No pictures from {run.label}: {error}")
    for run in facts:
        wanted = [name for name in panels if name in run.domains]
        try:
            loaded = TrainedRun.load(run.folder, device=device)
        except (UserError, FileNotFoundError) as error:
            for name in wanted:
                remarks[name].append(f"No predictions of {run.label}: {error}")
            continue
        for name in wanted:
            if run.domains[name].class_fingerprint != specs[name].class_fingerprint:
                remarks[name].append(f"No predictions of {run.label}: its {name} has other classes.")
                continue
            for panel in panels[name]:
                ids = loaded.predict(panel.image, name).ids
                panel.pictures.extend(_answer(run, panel, ids, specs[name]))
    return panels, remarks


def _chosen_images(shards: Shards, domain: Domain, count: int) -> list[Panel]:
    """Images spread evenly over the split's keys in alphabetical order, so that every run and every packing shows the
    same ones.
    """
    by_key = sorted(range(len(shards)), key=lambda number: shards.keys[number])
    panels = []
    for place in dict.fromkeys(np.linspace(0, len(by_key) - 1, min(count, len(by_key))).round().astype(int).tolist()):
        record = shards.read(by_key[place])
        image, mask = decode(record, domain)
        if mask is None:
            raise UserError(f"{record.shard}: key {record.key!r} has no mask.")
        size = (min(PANEL_WIDTH, image.width), max(1, round(image.height * min(1, PANEL_WIDTH / image.width))))
        truth = np.asarray(mask.resize(size, Image.Resampling.NEAREST))
        photo = _data_uri(image.resize(size, Image.Resampling.LANCZOS), "JPEG")
        panels.append(
            Panel(
                record.key,
                image,
                truth,
                [("image", photo, None), ("truth", _data_uri(indexed(truth, domain), "PNG"), None)],
            )
        )
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
