"""The page: scores, curves, pictures, and how each run was made. It opens without a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import jinja2
import torch

from multidomain_cct.data.batches.coverage import count_classes
from multidomain_cct.data.domain import Domain
from multidomain_cct.errors import UserError
from multidomain_cct.files.durable import replace_text
from multidomain_cct.files.printable import printable
from multidomain_cct.results.pictures import with_distinct_colors
from multidomain_cct.results.records import scores_by_class
from multidomain_cct.results.report.charts import charts
from multidomain_cct.results.report.facts import RunFacts, read_runs
from multidomain_cct.results.report.panels import panels as domain_panels


def write_report(
    runs: Sequence[Path], out: Path | None = None, *, device: torch.device | None = None, panels: int = 4
) -> Path:
    """Write the page and return its path: `out`, or report.html in the run's folder, for several runs beside the first
    one's folder.

    Several runs share their charts, one colour each, and are compared with the first. Pictures need the val shards and
    the last checkpoint; where they are missing, the page has a remark. Raises UserError for a folder that is not a run.
    """
    facts = read_runs(list(dict.fromkeys(runs)))
    out = out or (facts[0].folder if len(facts) == 1 else facts[0].folder.parent) / "report.html"
    out = out / "report.html" if out.is_dir() else out
    specs: dict[str, Domain] = {}
    for run in facts:
        specs |= {name: with_distinct_colors(spec) for name, spec in run.domains.items() if name not in specs}
    pictures = domain_panels(specs, facts, device, panels)
    several = [run for run in facts if run.evaluations and len(run.domains) > 1]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"shown": printable, "percent": _percent, "signed": _signed, "duration": _duration}
    page = environment.get_template("page.html.jinja").render(
        runs=facts,
        sections=[_section(name, spec, facts) | {"pictures": pictures[name]} for name, spec in specs.items()],
        means=[{"run": run, "last": run.evaluations[-1], "best": run.best} for run in several],
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_text(out, page)
    return out


def last_scores(run: Path) -> dict[str, float]:
    """The newest val mIoU of each domain, 0 to 1, and their mean; empty before the first evaluation."""
    (facts,) = read_runs([run])
    newest = facts.evaluations[-1] if facts.evaluations else {}
    scores = {name: newest[f"val/{name}/miou"] for name in facts.domains if f"val/{name}/miou" in newest}
    return scores | ({"mean": newest["val/mean_miou"]} if len(scores) > 1 else {})


def _section(name: str, spec: Domain, facts: Sequence[RunFacts]) -> dict[str, Any]:
    """Scores, curves and classes of one domain."""
    runs = [run for run in facts if name in run.domains]
    rows = [_row(name, run) for run in runs]
    scored = [row for row in rows if row["last"]]
    labels = dict.fromkeys(label.name for run in runs for label in run.domains[name].classes)
    trained = next((pixels for run in runs if (pixels := run.images(name).get("class_pixels"))), None)
    scores = {label: [(row["run"], row["last"]["iou"].get(label)) for row in scored] for label in labels}
    return {
        "name": name,
        "spec": spec,
        "rows": rows,
        "charts": list(charts(name, runs)),
        "scores": scores if scored else {},
        "val_share": _shares(_val_pixels(name, spec, runs)),
        "train_share": _shares(trained),
        "never": [label for label, values in scores.items() if any(iou == 0 for _, iou in values)],
    }


def _row(name: str, run: RunFacts) -> dict[str, Any]:
    """A run's scores of one domain, and what it learnt from."""
    try:
        images = len(run.val_shards(name))
    except (UserError, FileNotFoundError):
        images = None
    lines = [line for line in run.evaluations if f"val/{name}/miou" in line]
    last, best = (_scores(lines[-1], name), _scores(run.best, name)) if lines else (None, None)
    return {
        "run": run,
        "choice": run.recipe.domains[name],
        "val_images": images,
        "images": run.images(name),
        "last": last,
        "best": best,
        "protocol": last and _protocol(run, name, last),
        "pseudo_labels": _pseudo_labels(run, name, lines[-1]) if lines else [],
    }


def _pseudo_labels(run: RunFacts, name: str, line: dict[str, Any]) -> list[dict[str, Any]]:
    """What a teacher taught of each class before an evaluation; empty for methods without one."""
    labelled = _shares(run.images(name).get("class_pixels"))
    ema, student = scores_by_class(line, name), scores_by_class(line, f"{name}/student")
    return [
        {
            "label": label.name,
            "labelled": labelled.get(label.name),
            "predicted": line[f"train/{name}/pseudo_labels/{label.name}"],
            "kept": line[f"train/{name}/kept/{label.name}"],
            "ema": ema.get(label.name),
            "student": student.get(label.name),
        }
        for label in run.domains[name].classes
        if f"train/{name}/pseudo_labels/{label.name}" in line
    ]


def _scores(line: dict[str, Any], name: str) -> dict[str, Any]:
    return {
        "step": line["step"],
        "miou": line.get(f"val/{name}/miou"),
        "accuracy": line.get(f"val/{name}/pixel_accuracy"),
        "iou": scores_by_class(line, name),
        "student": line.get(f"val/{name}/student/miou"),
    }


def _protocol(run: RunFacts, name: str, score: Mapping[str, Any]) -> str:
    """How the numbers of the last evaluation were made, in one line."""
    counted = sum(value is not None for value in score["iou"].values())
    split = run.recipe.domains[name].val_split
    student = score["student"]
    return (
        f"{run.label}, step {score['step']}: {split} split at label resolution, {run.recipe.evaluation.described}, "
        f"mean over {counted} of {len(score['iou'])} classes."
        + ("" if student is None else f" These are the running average's (EMA); student: mIoU {100 * student:.1f}.")
    )


def _val_pixels(name: str, spec: Domain, runs: Sequence[RunFacts]) -> dict[str, int] | None:
    """Labelled pixels by class in the first val split that can be read."""
    for run in runs:
        try:
            shards = run.val_shards(name)
            counts = count_classes(shards, range(len(shards)), spec)
        except (UserError, FileNotFoundError):
            continue
        if counts is not None:
            return dict(zip((label.name for label in spec.classes), counts.pixels.tolist(), strict=True))
    return None


def _shares(pixels: Mapping[str, int] | None) -> dict[str, float]:
    """Each class's share of the pixels, 0 to 1; empty when they are not known."""
    return {label: count / max(1, sum(pixels.values())) for label, count in pixels.items()} if pixels else {}


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _signed(value: float | None, reference: float | None) -> str:
    """The difference in percentage points, with its sign; empty where one is missing."""
    return "" if value is None or reference is None else f"{100 * (value - reference):+.1f}".replace("-", "−")


def _duration(seconds: float | None) -> str:
    return "–" if seconds is None else str(timedelta(seconds=round(seconds)))
