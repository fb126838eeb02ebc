"""One picture of a diagnosis: for each image the local variation of its patches, above that of the features."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from multidomain_cct.data.domain import IGNORE
from multidomain_cct.files.durable import replacing
from multidomain_cct.files.printable import printable
from multidomain_cct.results.pictures import colored
from multidomain_cct.results.smoothness.diagnosis import Diagnosis, Example

COLUMNS = 6
"""Stages that a picture shows; of more, as many evenly spaced ones, with the first and the last."""
_WIDTH, _HEAD, _FLATTEST, _TALLEST = 2.3, 0.8, 0.4, 1.0
"""Inches: a column, the heading. Height to width of a map's place; other shapes fill a part of theirs."""
_LINE, _OUTLINED = (0.2, 1.0, 1.0, 0.75), 8
"""Colour of class borders, and the stride from which a map shows them; they would hide a finer one."""
_KEY_LENGTH = 30
"""Characters of a key above its image."""
_LEGEND = (
    "Mean Euclidean distance to the 8 neighbours; dark: small, bright: large, each map on its own scale. Above: image "
    "patches; below: features. Thin lines on coarse maps: class borders."
)


def write_panel(diagnosis: Diagnosis, examples: Sequence[Example], path: Path) -> None:
    """Write the PNG: a column per stage headed by its AUCs over all images, two rows per example."""
    stages = chosen_stages(len(diagnosis.stages))
    shapes = [min(_TALLEST, max(_FLATTEST, each.image.shape[0] / each.image.shape[1])) for each in examples]
    heights = [_HEAD, *(_WIDTH * shape for shape in shapes for _ in range(2))]
    size = ((len(stages) + 1) * (_WIDTH + 0.16), sum(heights) + 0.3 * len(heights) + 0.6)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    grid = figure.subplots(len(heights), len(stages) + 1, squeeze=False, height_ratios=heights)
    for axes in grid.flat:
        axes.set_axis_off()
        axes.set_anchor("NW")
    title = f"Local variation: {printable(diagnosis.subject)} on {diagnosis.domain.name}/{diagnosis.split}"
    # Keys and names are not mathematics, whatever dollar signs they hold.
    figure.suptitle(title, x=0, ha="left", fontsize=14, weight="bold", parse_math=False)
    figure.supxlabel(_LEGEND, x=0, ha="left", fontsize=9, color="0.3")
    borders = "class borders of the labels" if diagnosis.borders == "labels" else "the model's own borders"
    _write(grid[0, 0], f"AUC as a detector of\n{borders},\nmean of {diagnosis.images} images")
    for axes, number in zip(grid[0, 1:], stages, strict=True):
        score = diagnosis.stages[number]
        auc = f"AUC {_figure(score.auc)}, patches {_figure(score.patch_auc)}"
        _write(axes, f"{score.name}\nstride {score.stride}, {score.channels} channels\n{auc}")
    for rows, example in zip(grid[1:].reshape(len(examples), 2, -1), examples, strict=True):
        _draw_example(rows, example, stages, diagnosis)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, warnings.catch_warnings():
        # The font lacks letters that a key or a title may have; it draws a box in their place.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(temporary, format="png", bbox_inches="tight", pad_inches=0.2)


def chosen_stages(count: int) -> list[int]:
    """Which of the stages are shown, by position."""
    return sorted({round(position) for position in np.linspace(0, count - 1, min(count, COLUMNS))})


def _draw_example(rows: Any, example: Example, stages: Sequence[int], diagnosis: Diagnosis) -> None:
    key = printable(example.key)
    _show(rows[0, 0], example.image, key if len(key) <= _KEY_LENGTH else f"...{key[3 - _KEY_LENGTH :]}")
    _show(rows[1, 0], np.asarray(colored(example.ids, diagnosis.domain)), diagnosis.borders)
    shown = 0
    for (upper, lower), number in zip(rows[:, 1:].T, stages, strict=True):
        result = example.measured[number]
        stride = result.stage.stride
        # Neighbours of one stride, such as the blocks of a ViT, share one map of the patches.
        if stride != shown:
            title = f"patches {stride} x {stride}, AUC {_figure(result.patch_area)}"
            _draw_map(upper, result.patches, stride, example, title)
        shown = stride
        _draw_map(lower, result.features, stride, example, f"{result.stage.name}, AUC {_figure(result.area)}")


def _draw_map(axes: Any, variation: Tensor, stride: int, example: Example, title: str) -> None:
    """A map where its patches lie in the image; what no whole patch covers stays white."""
    if not variation.numel():
        axes.set_title(f"{title}: image too small", loc="left", fontsize=9, parse_math=False)
        return
    rows, columns = variation.shape
    height, width = example.image.shape[:2]
    _show(axes, variation.cpu().numpy(), title, extent=(0, columns * stride, rows * stride, 0))
    if stride >= _OUTLINED:
        axes.imshow(outline(example.ids), extent=(0, width, height, 0), interpolation="antialiased")
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)


def _show(axes: Any, values: np.ndarray, title: str, extent: tuple[float, float, float, float] | None = None) -> None:
    # Pictures (H, W, 3) have no scale. In a map a few values lie beyond it: one lamp must not darken all else.
    low, high = (float(np.percentile(values, share)) for share in (2, 98)) if values.ndim == 2 else (None, None)
    axes.imshow(values, cmap="magma", vmin=low, vmax=high, interpolation="nearest", extent=extent)
    axes.set_title(title, loc="left", fontsize=9, parse_math=False)


def _write(axes: Any, text: str) -> None:
    axes.text(0, 0, text, transform=axes.transAxes, fontsize=9.5, linespacing=1.35, va="bottom", parse_math=False)


def outline(ids: np.ndarray) -> np.ndarray:
    """(H', W', 4) RGBA 0 to 1: a line where (H', W') train ids differ from those above or to the left, else
    transparent; none towards ignored pixels.
    """
    picture = np.zeros((*ids.shape, 4))
    for before, after, part in ((ids[:-1], ids[1:], picture[1:]), (ids[:, :-1], ids[:, 1:], picture[:, 1:])):
        part[(before != after) & (before != IGNORE) & (after != IGNORE)] = _LINE
    return picture


def _figure(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
